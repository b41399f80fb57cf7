//! What operations are given: numbers like those of real layers, and weights that no cache holds.
//!
//! Zeros, or numbers that are all alike, switch fewer transistors: a GPU multiplies them at a
//! higher clock. So operands are normally distributed, as PyTorch's `randn` makes them.

use half::bf16;

use crate::config::Quantization;
use crate::formats::{PackedMatrix, Quantized, dense, fp8};
use crate::ops::cpu::physical_cores;
use crate::ops::{Ops, OpsError};
use crate::tensor::{DType, Fp8, Shape, Tensor};
use crate::weights;

/// Numbers that operands repeat, each row from another place on: no power of two, so that rows of
/// usual sizes do not begin alike.
const NUM_NORMALS: usize = 999_983;
/// What codes of bytes are multiplied by: four deviations reach the largest.
const BYTE_SCALE: f32 = 32.0;

/// Normally distributed numbers, the same in every run.
pub(super) struct Normals(Vec<f32>);

impl Normals {
    /// Makes them, by Box and Muller.
    pub fn new() -> Normals {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut uniform = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let mixed = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
            ((mixed >> 40) as f32 + 0.5) / (1u32 << 24) as f32
        };
        let mut normal = || {
            let (radius, angle) =
                ((-2.0 * uniform().ln()).sqrt(), std::f32::consts::TAU * uniform());
            radius * angle.cos()
        };
        Normals((0..NUM_NORMALS).map(|_| normal()).collect())
    }

    /// As many of them.
    fn take(&self, len: usize) -> impl Iterator<Item = f32> {
        self.0.iter().copied().cycle().take(len)
    }

    /// In the host's memory.
    pub fn bf16(&self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let values: Vec<bf16> = self.take(shape.len()).map(bf16::from_f32).collect();
        Tensor::from_slice(&values, shape)
    }

    /// On the device, in its dtype of activations.
    pub fn activations(&self, ops: &dyn Ops, shape: impl Into<Shape>) -> Result<Tensor, OpsError> {
        let shape = shape.into();
        ops.place(match ops.activation_dtype() {
            DType::BF16 => self.bf16(shape),
            _ => Tensor::from_slice(&self.take(shape.len()).collect::<Vec<_>>(), shape),
        })
    }

    /// On the device, as codes that a library multiplies: FP8 or bytes.
    pub fn codes(
        &self,
        ops: &dyn Ops,
        dtype: DType,
        shape: [usize; 2],
    ) -> Result<Tensor, OpsError> {
        let values = self.take(shape.iter().product());
        ops.place(match dtype {
            DType::Fp8 => {
                let codes: Vec<Fp8> = values.map(|x| Fp8(fp8::encode(x))).collect();
                Tensor::from_slice(&codes, shape)
            }
            _ => {
                let codes: Vec<i8> = values.map(|x| (BYTE_SCALE * x) as i8).collect();
                Tensor::from_slice(&codes, shape)
            }
        })
    }

    /// Weights, and as many copies of them that together they are larger than `least_bytes`:
    /// products that take turns with them read memory, as those of a model's layers do.
    pub fn weights(
        &self,
        ops: &dyn Ops,
        format: Option<Quantization>,
        shape: [usize; 2],
        least_bytes: usize,
    ) -> Result<Vec<PackedMatrix>, OpsError> {
        let plain = dense::pack(self.bf16(shape));
        let packed = weights::quantized(plain, format, physical_cores());
        let num_copies = (least_bytes / packed.size_bytes()).clamp(1, MAX_COPIES);
        let copies = (0..num_copies).map(|_| ops.arrange(copy_of(&packed)));
        copies.chain([ops.arrange(copy_of(&packed))]).collect()
    }
}

/// Most copies of weights: as many products are recorded at once.
const MAX_COPIES: usize = 63;

/// The same matrix in memory of its own.
fn copy_of(matrix: &PackedMatrix) -> PackedMatrix {
    let quantized = matrix.quantized.as_ref().map(|quantized| Quantized {
        grid: quantized.grid,
        scales: quantized.scales.to_owned_memory(),
        zero_points: quantized.zero_points.as_ref().map(Tensor::to_owned_memory),
    });
    PackedMatrix { data: matrix.data.to_owned_memory(), quantized, ..*matrix }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_normally_distributed() {
        let normals = Normals::new();
        let mean = |f: fn(f32) -> f32| {
            normals.0.iter().map(|&x| f64::from(f(x))).sum::<f64>() / NUM_NORMALS as f64
        };
        assert!(mean(|x| x).abs() < 0.01, "{}", mean(|x| x));
        assert!((mean(|x| x * x) - 1.0).abs() < 0.01, "{}", mean(|x| x * x));
        assert!((mean(|x| x.powi(4)) - 3.0).abs() < 0.1, "{}", mean(|x| x.powi(4)));
    }

    #[test]
    fn copies_are_larger_than_caches_and_alike() {
        let ops = crate::ops::cpu::CpuOps::new(Some(1), crate::config::CpuIsa::Scalar);
        let ops = ops.expect("it is portable");
        let format = Some(Quantization::Int4);
        let copies = Normals::new().weights(&ops, format, [32, 64], 10_000).expect("there is room");
        let bytes: usize = copies.iter().map(PackedMatrix::size_bytes).sum();
        assert!(bytes > 10_000 && copies.len() < MAX_COPIES, "{} copies", copies.len());
        assert!(copies.iter().all(|copy| copy.row(31) == copies[0].row(31)));
    }
}
