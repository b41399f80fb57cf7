//! Tensors in device memory: making them, bringing weights and inputs there.

use super::CudaOps;
use super::launcher::{CudaError, Launcher};
use crate::formats::{PackedMatrix, Quantized};
use crate::ops::OpsError;
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};

impl<L: Launcher> CudaOps<L> {
    /// A new tensor of zero bytes.
    pub(super) fn zeroed(&self, dtype: DType, shape: Shape) -> Result<Tensor, OpsError> {
        let mut tensor = self.named(self.launcher.allocate(dtype, shape))?;
        self.launcher.clear(tensor.view_mut());
        Ok(tensor)
    }

    /// A copy of a host tensor; what lies on the device already stays where it is.
    pub(super) fn placed(&self, tensor: Tensor) -> Result<Tensor, OpsError> {
        if tensor.is_on_device() {
            return Ok(tensor);
        }
        let mut placed = self.named(self.launcher.allocate(tensor.dtype(), tensor.shape()))?;
        self.launcher.upload(placed.view_mut(), tensor.bytes());
        Ok(placed)
    }

    /// A matrix with all of its tensors placed.
    pub(super) fn placed_matrix(&self, matrix: PackedMatrix) -> Result<PackedMatrix, OpsError> {
        let place = |quantized: Quantized| -> Result<Quantized, OpsError> {
            Ok(Quantized {
                grid: quantized.grid,
                scales: self.placed(quantized.scales)?,
                zero_points: quantized.zero_points.map(|t| self.placed(t)).transpose()?,
            })
        };
        let PackedMatrix { format, num_rows, num_cols, data, quantized } = matrix;
        let quantized = quantized.map(place).transpose()?;
        Ok(PackedMatrix { format, num_rows, num_cols, data: self.placed(data)?, quantized })
    }

    /// Makes a tensor of at least as many elements, zeros, of one that is too small.
    pub(super) fn make_room(
        &self,
        tensor: &mut Option<Tensor>,
        dtype: DType,
        len: usize,
    ) -> Result<(), CudaError> {
        if tensor.as_ref().is_none_or(|tensor| tensor.shape().len() < len) {
            // The old one goes first: they would not fit beside each other.
            *tensor = None;
            let mut larger = self.launcher.allocate(dtype, Shape::from([len]))?;
            self.launcher.clear(larger.view_mut());
            *tensor = Some(larger);
        }
        Ok(())
    }

    /// Brings the first rows of a mirror up to date.
    pub(super) fn upload_rows(&self, mut to: ViewMut<'_>, from: View<'_>) {
        let rows = to.reborrow().into_rows(0..from.size(0));
        self.launcher.upload(rows, from.bytes());
    }

    /// Puts the device's name to an error.
    pub(super) fn named<T>(&self, result: Result<T, CudaError>) -> Result<T, OpsError> {
        result.map_err(|error| error.of_device(self.launcher.name()))
    }
}
