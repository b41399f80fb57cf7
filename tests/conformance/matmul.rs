//! Matmul in every format, sizes around every tile boundary.

use std::ops::Range;

use tokenmill::formats::{Format, PackedMatrix, dense};
use tokenmill::ops::args::{Activation, GatedMatmulArgs, GatedMlpArgs, MatmulArgs, Projection};
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::ops::{Ops, gated_in_steps, mlp_in_steps};
use tokenmill::tensor::{DType, Tensor};

use crate::support::*;

/// `(rows, columns, k)`: tails in every axis, several panels, blocks of k and blocks of rows.
const SHAPES: [(usize, usize, usize); 17] = [
    (1, 1, 1),
    (1, 65, 17),
    (2, 63, 16),
    (3, 4, 31),
    (5, 5, 5),
    (6, 64, 64),
    (7, 33, 100),
    (15, 63, 65),
    (16, 65, 63),
    (17, 1, 130),
    (33, 130, 48),
    (1, 300, 896),
    (16, 97, 1025),
    (33, 36, 2100),
    (97, 40, 64),
    (200, 35, 1040),
    (2, 600, 3),
];

/// Rows, columns and lengths of the summed axis that do not fill tiles, groups or vectors.
const QUANTIZED_SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 65, 130),
    (2, 63, 64),
    (3, 31, 95),
    (15, 63, 300),
    (16, 65, 128),
    (17, 33, 31),
    (17, 1, 130),
    (32, 32, 256),
    (40, 1, 640),
    (33, 65, 200),
    (1, 96, 1100),
    (70, 100, 640),
    (200, 40, 1040),
];

/// How far results in a format may be from the referee's, relative to the largest result that
/// is possible (`x` and weights are below 1 in magnitude).
fn tolerance(ops: &dyn Ops, format: Format, k: usize) -> (f32, f32) {
    match format {
        // Integers are exact, and scales are multiplied in one order.
        Format::Int8 => (0.0, 0.0),
        // Sums of groups are exact; f32 adds them up.
        Format::Q8 | Format::Int4 | Format::Mxfp4 => (1e-6 + 1e-7 * k as f32, 1e-6),
        // Tiles round weight × scale, below 2, to bf16: at most 2⁻⁸ each, √k in all.
        _ if ops.name().contains("amx") => (4e-3 * (k as f32).sqrt() + 1e-4, 1e-5),
        _ => (1e-6 + 1e-7 * k as f32, 1e-6),
    }
}

pub fn check_quantized(ops: &dyn Ops) {
    for (seed, (rows, cols, k)) in QUANTIZED_SHAPES.into_iter().enumerate() {
        for (name, weight) in quantized(&mut Rng::new(seed as u64), cols, k) {
            let rng = &mut Rng::new(100 + seed as u64);
            let x = rounded_x(rng, ops, &weight, [rows, k]);
            let bias = rng.tensor(DType::F32, [cols]);
            let what = format!("{} matmul {rows} x {cols} x {k} {name}", ops.name());
            let run = |ops: &dyn Ops| {
                let mut out = Guarded::poisoned([rows, cols]);
                let bias = (seed % 2 == 0).then(|| bias.view());
                let projection = Projection { out: out.view(), weight: &weight, bias };
                ops.matmul(MatmulArgs { x: x.view(), projections: vec![projection] });
                out.finish(&what)
            };
            let tolerance = tolerance(ops, weight.format, k);
            assert_close(&what, &run(ops), &run(&ReferenceOps), tolerance);
        }
    }
    several_projections(ops);
    gated(ops);
    mlp(ops);
}

/// `(rows, k, width, columns)` of a gated MLP whose middle is larger than second-level caches: it
/// goes past them where that pays.
const LARGE_MIDDLE: (usize, usize, usize, usize) = (2100, 64, 256, 16);

/// `(rows, columns, k)` of products whose results are more than 1 MiB: kernels write them past the
/// caches where these keep no more. Rows of the second are more than a core's cache holds, and on tiles
/// are computed in groups.
const LARGE_RESULTS: [(usize, usize, usize); 2] = [(1100, 256, 64), (1100, 256, 1280)];

/// Rows of many have the bits that they have among few, whose results stay in the caches.
pub fn check_large_results(ops: &dyn Ops) {
    const FEW: usize = 100;
    let rng = &mut Rng::new(80);
    for (rows, cols, k) in LARGE_RESULTS {
        let mut weights = quantized(rng, cols, k);
        weights.retain(|(_, weight)| k == 64 || weight.format == Format::Int8);
        let bf16 = ops.arrange(rng.matrix(DType::BF16, cols, k)).unwrap();
        weights.push(("bf16", bf16));
        let x = rng.tensor(DType::F32, [rows, k]);
        for (name, weight) in weights {
            let what = format!("{} matmul {rows} x {cols} x {k} {name}", ops.name());
            let run = |rows: Range<usize>| {
                let mut out = Guarded::poisoned([rows.len(), cols]);
                let projection = Projection { out: out.view(), weight: &weight, bias: None };
                let x = x.view().rows(rows);
                ops.matmul(MatmulArgs { x, projections: vec![projection] });
                out.finish(&what)
            };
            let few: Vec<f32> = (0..rows).step_by(FEW).flat_map(|i| run(i..i + FEW)).collect();
            assert_same(&what, &run(0..rows), &few);
        }
    }
}

/// A gated MLP equals its steps, bit for bit: with one row and many, widths that fill lines and
/// others, and matrices of equal and of different formats.
fn mlp(ops: &dyn Ops) {
    let rng = &mut Rng::new(79);
    let matrices = |rng: &mut Rng, rows: usize, cols: usize| {
        let mut all: Vec<PackedMatrix> =
            quantized(rng, rows, cols).into_iter().map(|(_, weight)| weight).collect();
        all.push(ops.arrange(rng.matrix(DType::BF16, rows, cols)).unwrap());
        all
    };
    for (rows, k, width, cols) in
        [(1, 64, 128, 33), (33, 96, 192, 40), (49, 64, 72, 16), (300, 64, 128, 50), LARGE_MIDDLE]
    {
        let (gates, ups) = (matrices(rng, width, k), matrices(rng, width, k));
        let mut downs = matrices(rng, cols, width);
        downs.rotate_left(usize::from(rows == 300));
        let x = rng.tensor(DType::F32, [rows, k]);
        let bias = rng.tensor(DType::F32, [cols]);
        for ((gate, up), down) in gates.iter().zip(&ups).zip(&downs) {
            let formats = (gate.format, down.format);
            let what = format!("{} mlp {rows} x {k} x {width} x {cols} {formats:?}", ops.name());
            let run = |fused: bool| {
                let mut out = Guarded::poisoned([rows, cols]);
                let mut scratch = [0, 1, 2].map(|_| Tensor::zeros(DType::F32, [rows, width]));
                let [middle, first, second] = scratch.each_mut().map(Tensor::view_mut);
                let args = GatedMlpArgs {
                    gated: GatedMatmulArgs {
                        out: middle,
                        x: x.view(),
                        gate: (gate, None),
                        up: (up, None),
                        activation: Activation::Silu,
                        scratch: [first, second],
                    },
                    down: Projection { out: out.view(), weight: down, bias: Some(bias.view()) },
                };
                if fused {
                    ops.gated_mlp(args);
                } else {
                    mlp_in_steps(ops, args);
                }
                out.finish(&what)
            };
            assert_same(&what, &run(true), &run(false));
        }
    }
}

/// A gated product equals its steps, bit for bit.
fn gated(ops: &dyn Ops) {
    let rng = &mut Rng::new(78);
    let k = 192;
    let matrices = |rng: &mut Rng, cols: usize| {
        let mut all: Vec<PackedMatrix> =
            quantized(rng, cols, k).into_iter().map(|(_, weight)| weight).collect();
        all.extend(FLOATS.map(|dtype| rng.matrix(dtype, cols, k)));
        all.extend(FLOATS.map(|dtype| ops.arrange(rng.matrix(dtype, cols, k)).unwrap()));
        all
    };
    for (rows, cols) in [(1, 70), (16, 16), (20, 33), (33, 130), (70, 48)] {
        let (gates, mut ups) = (matrices(rng, cols), matrices(rng, cols));
        // Neighbours have different formats.
        ups.rotate_left(usize::from(cols == 33));
        let x = rng.tensor(DType::F32, [rows, k]);
        let bias = rng.tensor(DType::F32, [cols]);
        for (gate, up) in gates.iter().zip(&ups) {
            for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
                let what = format!("{} gated {rows} x {cols} {:?}", ops.name(), gate.format);
                let run = |fused: bool| {
                    let mut out = Guarded::poisoned([rows, cols]);
                    let mut scratch = [0, 1].map(|_| Tensor::zeros(DType::F32, [rows, cols]));
                    let args = GatedMatmulArgs {
                        out: out.view(),
                        x: x.view(),
                        gate: (gate, Some(bias.view())),
                        up: (up, None),
                        activation,
                        scratch: scratch.each_mut().map(Tensor::view_mut),
                    };
                    if fused {
                        ops.gated_matmul(args);
                    } else {
                        gated_in_steps(ops, args);
                    }
                    out.finish(&what)
                };
                assert_same(&what, &run(true), &run(false));
            }
        }
    }
}

/// Projections of one operation equal projections one by one, whatever their formats.
fn several_projections(ops: &dyn Ops) {
    let rng = &mut Rng::new(77);
    let (rows, k) = (19, 192);
    let mut weights: Vec<PackedMatrix> =
        quantized(rng, 70, k).into_iter().map(|(_, weight)| weight).collect();
    weights.extend(FLOATS.map(|dtype| rng.matrix(dtype, 33, k)));
    let x = rng.tensor(DType::F32, [rows, k]);
    let mut outs: Vec<Guarded> =
        weights.iter().map(|w| Guarded::poisoned([rows, w.num_rows])).collect();
    let project = |(out, weight)| Projection { out: Guarded::view(out), weight, bias: None };
    let projections = outs.iter_mut().zip(&weights).map(project).collect();
    ops.matmul(MatmulArgs { x: x.view(), projections });
    for (out, weight) in outs.into_iter().zip(&weights) {
        let mut alone = Guarded::poisoned([rows, weight.num_rows]);
        let projection = Projection { out: alone.view(), weight, bias: None };
        ops.matmul(MatmulArgs { x: x.view(), projections: vec![projection] });
        let what = format!("{} projections {:?}", ops.name(), weight.format);
        assert_same(&what, &out.finish(&what), &alone.finish(&what));
    }
}

/// Activations as they are multiplied: where that is as bf16, they are such numbers, and what is
/// compared is the arithmetic after rounding.
fn rounded_x(rng: &mut Rng, ops: &dyn Ops, weight: &PackedMatrix, shape: [usize; 2]) -> Tensor {
    let rounds = multiplies_bf16(ops)
        && matches!(weight.format, Format::DenseBlocks | Format::W8A16 | Format::Fp8);
    let x = rng.tensor(if rounds { DType::BF16 } else { DType::F32 }, shape);
    cast(&widened(&x), DType::F32, shape)
}

pub fn check(ops: &dyn Ops) {
    for (seed, (rows, cols, k)) in SHAPES.into_iter().enumerate() {
        for dtype in FLOATS {
            let rng = &mut Rng::new(seed as u64);
            let weight = rng.matrix(dtype, cols, k);
            let arranged = ops.arrange(dense::pack(weight.data.to_owned_memory())).unwrap();
            assert_eq!(arranged.size_bytes(), ops.arranged_bytes(dtype, [cols, k]));
            for (how, weight) in [("as it is", &weight), ("arranged", &arranged)] {
                let x = rounded_x(rng, ops, weight, [rows, k]);
                for bias_dtype in [None, Some(dtype)] {
                    let bias = bias_dtype.map(|dtype| rng.tensor(dtype, [cols]));
                    let what = format!("{} matmul {rows} x {cols} x {k} {dtype} {how}", ops.name());
                    let run = |ops: &dyn Ops| {
                        let mut out = Guarded::poisoned([rows, cols]);
                        let bias = bias.as_ref().map(|bias| bias.view());
                        let projection = Projection { out: out.view(), weight, bias };
                        ops.matmul(MatmulArgs { x: x.view(), projections: vec![projection] });
                        out.finish(&what)
                    };
                    // f32 sums of k products below 1 against f64: the error grows like a random
                    // walk, √k steps of half a unit in the last place of sums of size √k.
                    let tolerance = (1e-6 + 1e-7 * k as f32, 1e-6);
                    assert_close(&what, &run(ops), &run(&ReferenceOps), tolerance);
                }
            }
        }
    }
}
