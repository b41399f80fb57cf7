//! Choosing and scoring tokens on the device.

use super::CudaOps;
use super::launcher::Launcher;
use crate::ops::args::SampleArgs;
use crate::output::SampledToken;

impl<L: Launcher> CudaOps<L> {
    /// See [`crate::ops::Ops::sample`].
    pub(super) fn sample_rows(&self, _: SampleArgs<'_>) -> Vec<SampledToken> {
        panic!("no CUDA kernel yet for sample");
    }
}
