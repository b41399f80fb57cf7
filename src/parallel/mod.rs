//! Communication between the ranks of one model replica.
//!
//! A world of one is [`Solo`]; no code above asks how large the world is. Knows only bytes.

use crate::tensor::ViewMut;

/// What the ranks of a replica say to each other.
pub trait Communicator: Send + Sync {
    /// This rank's number, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// Replaces `data` on every rank by the element-wise sum over all ranks.
    fn all_reduce(&self, data: ViewMut<'_>);
}

/// The only rank of its world.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce(&self, _data: ViewMut<'_>) {}
}
