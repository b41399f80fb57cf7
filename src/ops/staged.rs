//! Integers that the host writes in every step and operations read.
//!
//! Where operations read the host's memory there is one buffer and no copy; elsewhere a mirror
//! at a fixed address, brought up to date by one copy per step, so that recorded launches find
//! the next step's inputs where they found this one's.

use std::ops::Range;

use super::{Ops, OpsError};
use crate::tensor::{DType, Tensor, View};

/// A buffer of u32 on the host, and its mirror on a device.
pub struct Staged {
    host: Tensor,
    mirror: Option<Tensor>,
}

impl Staged {
    /// Room for `len` integers.
    pub fn new(ops: &dyn Ops, len: usize) -> Result<Staged, OpsError> {
        let host = Tensor::zeros(DType::U32, [len]);
        let mirror = ops.mirror(&host)?;
        Ok(Staged { host, mirror })
    }

    /// What the host last wrote.
    pub fn host(&self) -> &[u32] {
        self.host.as_slice()
    }

    /// For the host to write to; operations see it after [`Staged::upload`].
    pub fn host_mut(&mut self) -> &mut [u32] {
        self.host.as_mut_slice()
    }

    /// Shows operations the first `len` integers as they are now.
    pub fn upload(&mut self, ops: &dyn Ops, len: usize) {
        if let Some(mirror) = &mut self.mirror {
            ops.upload(mirror.view_mut(), self.host.rows(len));
        }
    }

    /// A part, as operations read it.
    pub fn view(&self, range: Range<usize>) -> View<'_> {
        self.mirror.as_ref().unwrap_or(&self.host).view().rows(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::ReferenceOps;

    #[test]
    fn operations_that_read_the_hosts_memory_see_what_is_written_at_once() {
        let mut staged = Staged::new(&ReferenceOps, 4).expect("the host has four integers");
        staged.host_mut().copy_from_slice(&[7, 8, 9, 10]);
        assert_eq!(staged.view(1..3).as_slice::<u32>(), [8, 9]);
    }
}
