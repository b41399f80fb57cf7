//! Weights of every format that a device multiplies.

use super::verify::Side;
use crate::config::Quantization;
use crate::formats::blocks::{BLOCK_ROWS, interleave};
use crate::formats::{Format, PackedMatrix, Quantized, ROW_ALIGN, ScaleGrid, dense, fp8};
use crate::ops::OpsError;
use crate::tensor::{DType, Tensor};
use crate::weights;

/// How random numbers become weights.
#[derive(Clone, Copy)]
pub(super) enum Weights {
    /// As `--quantization` makes them.
    Online(Option<Quantization>),
    /// The same, of numbers above 0 only: zero points lie at the end of the codes.
    Positive(Quantization),
    /// FP8 with a scale per 128 × 128 elements, as checkpoints have it.
    Fp8Blocks,
}

/// A format's name, and how weights become it.
pub(super) type Named = (&'static str, Weights);

/// Weights in FP8.
pub(super) const FP8: Named = ("fp8", Weights::Online(Some(Quantization::Fp8)));
/// Weights as they are, and in every other format that weights can be quantized to.
pub(super) const OTHERS: [Named; 11] = [
    ("bf16", Weights::Online(None)),
    ("int8", Weights::Online(Some(Quantization::Int8))),
    ("w8a16", Weights::Online(Some(Quantization::W8A16))),
    ("q8_0", Weights::Online(Some(Quantization::Q8_0))),
    ("int4", Weights::Online(Some(Quantization::Int4))),
    ("int4-g64", Weights::Online(Some(Quantization::Int4G64))),
    ("int4-g128", Weights::Online(Some(Quantization::Int4G128))),
    ("int4 above 0", Weights::Positive(Quantization::Int4)),
    ("q4_0", Weights::Online(Some(Quantization::Q4_0))),
    ("mxfp4", Weights::Online(Some(Quantization::Mxfp4))),
    ("fp8 in blocks", Weights::Fp8Blocks),
];

/// All of them.
pub(super) fn formats() -> impl Iterator<Item = Named> {
    OTHERS.into_iter().chain([FP8])
}

/// Random weights, placed.
pub(super) fn matrix(
    side: &mut Side<'_>,
    weights: Weights,
    shape: [usize; 2],
) -> Result<PackedMatrix, OpsError> {
    let (quantization, is_positive) = match weights {
        Weights::Online(quantization) => (quantization, false),
        Weights::Positive(quantization) => (Some(quantization), true),
        Weights::Fp8Blocks => {
            let blocks = fp8_blocks(side, shape);
            return side.ops.arrange(blocks);
        }
    };
    let sign = |x: f32| if is_positive { x.abs() } else { x };
    let values: Vec<half::bf16> = side
        .numbers(shape[0] * shape[1])
        .into_iter()
        .map(|x| half::bf16::from_f32(sign(x)))
        .collect();
    let plain = dense::pack(Tensor::from_slice(&values, shape));
    side.ops.arrange(weights::quantized(plain, quantization, 1))
}

/// Random codes; the rows of a block of 128 repeat its scale.
fn fp8_blocks(side: &mut Side<'_>, [rows, cols]: [usize; 2]) -> PackedMatrix {
    const BLOCK: usize = 128;
    let (width, num_blocks) = (cols.next_multiple_of(ROW_ALIGN), rows.div_ceil(BLOCK_ROWS));
    let codes = side.numbers(num_blocks * BLOCK_ROWS * width);
    let codes: Vec<u8> = codes.into_iter().map(|x| fp8::encode(x * fp8::MAX_VALUE)).collect();
    let mut data = Tensor::zeros(DType::U8, [num_blocks, BLOCK_ROWS * width]);
    let blocks = data.as_mut_slice::<u8>().chunks_exact_mut(BLOCK_ROWS * width);
    for (rows, block) in codes.chunks_exact(BLOCK_ROWS * width).zip(blocks) {
        interleave(rows, block);
    }
    let grid = ScaleGrid::groups(BLOCK);
    let shape = grid.blocks_shape(rows, cols);
    let tiles = side.numbers(rows.div_ceil(BLOCK) * shape[1]);
    let scale = |i: usize| {
        let (block, group) = (i / BLOCK_ROWS / shape[1], i / BLOCK_ROWS % shape[1]);
        (2.0 + tiles[block * BLOCK_ROWS / BLOCK * shape[1] + group]) / fp8::MAX_VALUE
    };
    let scales: Vec<f32> = (0..shape.iter().product()).map(scale).collect();
    let scales = Tensor::from_slice(&scales, shape);
    PackedMatrix {
        format: Format::Fp8,
        num_rows: rows,
        num_cols: cols,
        data,
        quantized: Some(Quantized { grid, scales, zero_points: None }),
    }
}
