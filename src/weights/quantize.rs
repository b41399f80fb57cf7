//! Online quantization: floating-point matrices become codes while they are loaded.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::config::Quantization;
use crate::formats;
use crate::formats::{Format, PackedMatrix, fp8, int4, int8, mxfp4, q8};
use crate::tensor::DType;

/// Runs `$body` with `$quantizer` bound to the way of quantizing that `$wanted` names.
macro_rules! with_quantizer {
    ($wanted:expr, $quantizer:ident => $body:expr) => {
        match $wanted {
            Quantization::Int8 => {
                let $quantizer = int8::PerRow;
                $body
            }
            Quantization::W8A16 => {
                let $quantizer = q8::W8A16;
                $body
            }
            Quantization::Q8_0 => {
                let $quantizer = q8::Q8_0;
                $body
            }
            Quantization::Int4 => {
                let $quantizer = int4::Grouped(32);
                $body
            }
            Quantization::Int4G64 => {
                let $quantizer = int4::Grouped(64);
                $body
            }
            Quantization::Q4_0 => {
                let $quantizer = int4::Symmetric(32);
                $body
            }
            Quantization::Mxfp4 => {
                let $quantizer = mxfp4::Mxfp4;
                $body
            }
            Quantization::Int4G128 => {
                let $quantizer = int4::Grouped(128);
                $body
            }
            Quantization::Fp8 => {
                let $quantizer = fp8::PerRow;
                $body
            }
        }
    };
}

/// The matrix in the wanted format; one that is quantized already stays as it is.
pub fn quantize(matrix: PackedMatrix, wanted: Quantization, threads: usize) -> PackedMatrix {
    if matrix.format != Format::Dense {
        return matrix;
    }
    let shape = [matrix.num_rows, matrix.num_cols];
    let read = |row: usize, to: &mut [f32]| widen_row(&matrix, row, to);
    with_quantizer!(wanted, quantizer => formats::quantize(&quantizer, shape, threads, read))
}

/// Inlined always, so that it is compiled for the machine's vectors.
#[inline(always)]
fn widen_row(matrix: &PackedMatrix, row: usize, to: &mut [f32]) {
    let elements = row * matrix.num_cols..(row + 1) * matrix.num_cols;
    match matrix.data.dtype() {
        DType::F32 => to.copy_from_slice(&matrix.data.as_slice()[elements]),
        DType::BF16 => {
            let from = &matrix.data.as_slice::<bf16>()[elements];
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        }
        DType::F16 => matrix.data.as_slice::<f16>()[elements].convert_to_f32_slice(to),
        other => unreachable!("a dense matrix of {other}"),
    }
}

/// Bytes of a matrix of this shape in the wanted format.
pub fn size_bytes(wanted: Quantization, shape: [usize; 2]) -> usize {
    with_quantizer!(wanted, quantizer => formats::quantized_bytes(&quantizer, shape))
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;
    use crate::formats::dense;
    use crate::tensor::Tensor;

    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect()
    }

    #[test]
    fn every_format_takes_the_bytes_that_were_announced_and_stays_close() {
        let values = values(3 * 200);
        for &wanted in Quantization::value_variants() {
            let dense = dense::pack(Tensor::from_slice(&values, [3, 200]));
            let packed = quantize(dense, wanted, 2);
            assert_eq!(packed.size_bytes(), size_bytes(wanted, [3, 200]), "{wanted:?}");
            for row in 0..3 {
                for (got, want) in packed.row(row).iter().zip(&values[row * 200..]) {
                    // Half a step between codes: for int4 of a range that may be clipped, for
                    // FP8 of three bits of mantissa, for MXFP4 of one, of what is cut off at the
                    // most a ninth, for bytes of 1/127 of the largest value.
                    let allowed = match packed.format {
                        Format::Int4 => 0.15,
                        Format::Fp8 => want.abs() / 16.0 + 0.001,
                        Format::Mxfp4 => 0.17,
                        _ => 0.005,
                    };
                    assert!((got - want).abs() <= allowed, "{wanted:?}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn every_dtype_is_read_alike() {
        let values: Vec<f32> = values(128).iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        let half: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
        let brain: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        let tensors = [
            Tensor::from_slice(&values, [2, 64]),
            Tensor::from_slice(&half, [2, 64]),
            Tensor::from_slice(&brain, [2, 64]),
        ];
        let rows =
            tensors.map(|tensor| quantize(dense::pack(tensor), Quantization::Int8, 1).row(1));
        assert_eq!(rows[0], rows[2]);
        assert!(rows[0].iter().zip(&rows[1]).all(|(a, b)| (a - b).abs() < 1e-2));
    }
}
