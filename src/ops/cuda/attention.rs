//! Attention over the paged cache.

use super::CudaOps;
use super::launcher::Launcher;
use crate::ops::args::AttentionArgs;

impl<L: Launcher> CudaOps<L> {
    /// See [`crate::ops::Ops::attention`].
    pub(super) fn attend(&self, _: AttentionArgs<'_>) {
        panic!("no CUDA kernel yet for attention");
    }
}
