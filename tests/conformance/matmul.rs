//! Dense matmul, every dtype, sizes around every tile boundary.

use tokenmill::ops::Ops;
use tokenmill::ops::args::MatmulArgs;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::DType;

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

pub fn check(ops: &dyn Ops) {
    for (seed, (rows, cols, k)) in SHAPES.into_iter().enumerate() {
        for dtype in FLOATS {
            let rng = &mut Rng::new(seed as u64);
            // Tiles round activations to bf16; what is compared is the arithmetic after that.
            let rounds = dtype == DType::BF16 && ops.name().contains("amx");
            let x = rng.tensor(if rounds { DType::BF16 } else { DType::F32 }, [rows, k]);
            let x = cast(&widened(&x), DType::F32, [rows, k]);
            let weight = rng.matrix(dtype, cols, k);
            for bias_dtype in [None, Some(dtype)] {
                let bias = bias_dtype.map(|dtype| rng.tensor(dtype, [cols]));
                let what = format!("{} matmul {rows} x {cols} x {k} {dtype}", ops.name());
                let run = |ops: &dyn Ops| {
                    let mut out = Guarded::poisoned([rows, cols]);
                    let bias = bias.as_ref().map(|bias| bias.view());
                    let args = MatmulArgs { out: out.view(), x: x.view(), weight: &weight, bias };
                    ops.matmul(args);
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
