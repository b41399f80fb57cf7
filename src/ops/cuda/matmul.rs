//! Products with weights of every format.

use super::CudaOps;
use super::launcher::Launcher;
use crate::ops::args::MatmulArgs;

impl<L: Launcher> CudaOps<L> {
    /// See [`crate::ops::Ops::matmul`].
    pub(super) fn multiply(&self, _: MatmulArgs<'_>) {
        panic!("no CUDA kernel yet for matmul on {} multiprocessors", self.facts().multiprocessors);
    }
}
