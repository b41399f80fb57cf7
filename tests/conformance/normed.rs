//! Products whose rows are normed first: the bits of a norm, then of the product, and nothing else
//! written.

use tokenmill::formats::PackedMatrix;
use tokenmill::ops::Ops;
use tokenmill::ops::args::*;
use tokenmill::tensor::{DType, Tensor};

use crate::support::*;

/// One row, tiles of rows and what does not fill them.
const ROWS: [usize; 5] = [1, 2, 17, 33, 100];
/// Elements of a row that fill lines, half of them, and neither.
const WIDTHS: [usize; 4] = [192, 96, 100, 31];

/// What is normed.
struct Problem {
    x: Tensor,
    /// `None` where nothing is added to the rows first.
    residual: Option<Vec<f32>>,
    weight: Tensor,
}

impl Problem {
    fn new(rng: &mut Rng, ops: &dyn Ops, shape: [usize; 2], has_residual: bool) -> Problem {
        let residual = rng.floats(shape[0] * shape[1]);
        let dtype = FLOATS[rng.below(FLOATS.len())];
        Problem {
            x: rng.activations(ops, shape),
            residual: has_residual.then(|| as_activations(ops, &residual)),
            weight: rng.tensor(dtype, [shape[1]]),
        }
    }

    /// What `multiply` makes of the normed rows, and the residual afterwards.
    fn run(&self, what: &str, multiply: impl FnOnce(NormedRows<'_>) -> Vec<f32>) -> Vec<f32> {
        let (x, weight, eps) = (self.x.view(), self.weight.view(), 1e-5);
        let mut room = Tensor::zeros(DType::F32, x.shape());
        let out = room.view_mut();
        let Some(residual) = &self.residual else {
            return multiply(NormedRows::Norm(NormArgs { out, x, weight, eps }));
        };
        let mut sum = Guarded::filled(residual, x.shape());
        let residual = sum.view();
        let mut all = multiply(NormedRows::AddNorm(AddNormArgs { out, residual, x, weight, eps }));
        all.extend(sum.finish(what));
        all
    }
}

/// A matrix in every format, as the backend arranges it.
fn matrices(ops: &dyn Ops, rng: &mut Rng, rows: usize, cols: usize) -> Vec<PackedMatrix> {
    let mut all: Vec<PackedMatrix> =
        quantized(rng, rows, cols).into_iter().map(|(_, weight)| weight).collect();
    all.extend(FLOATS.map(|dtype| rng.matrix(dtype, rows, cols)));
    all.push(ops.arrange(rng.matrix(DType::BF16, rows, cols)).unwrap());
    all
}

pub fn check(ops: &dyn Ops) {
    for (seed, rows) in ROWS.into_iter().enumerate() {
        for width in WIDTHS {
            for has_residual in [false, true] {
                let rng = &mut Rng::new((seed * 1000 + width) as u64);
                let problem = Problem::new(rng, ops, [rows, width], has_residual);
                products(ops, rng, &problem);
                mlps(ops, rng, &problem);
            }
        }
    }
}

/// One matrix alone, of every format, and all of them together, which want several forms.
fn products(ops: &dyn Ops, rng: &mut Rng, problem: &Problem) {
    let shape = problem.x.shape();
    let all = matrices(ops, rng, 35, shape.sizes()[1]);
    let bias = rng.tensor(DType::F32, [35]);
    let alone = all.iter().map(std::slice::from_ref);
    for weights in alone.chain([&all[..]]) {
        let formats: Vec<_> = weights.iter().map(|weight| weight.format).collect();
        let is_added = problem.residual.is_some();
        let what = format!("{} normed {shape:?} {formats:?}, added: {is_added}", ops.name());
        let run =
            |fused: bool| {
                problem.run(&what, |x| {
                    let poisoned = |_| Guarded::poisoned([shape.sizes()[0], 35]);
                    let mut outs: Vec<Guarded> = weights.iter().map(poisoned).collect();
                    let projections = outs.iter_mut().zip(weights).map(|(out, weight)| {
                        Projection { out: out.view(), weight, bias: Some(bias.view()) }
                    });
                    let args = MatmulArgs { x, projections: projections.collect() };
                    if fused {
                        ops.norm_matmul(args);
                    } else {
                        ops.matmul(args.map_x(|rows| rows.run(ops)));
                    }
                    outs.into_iter().flat_map(|out| out.finish(&what)).collect()
                })
            };
        assert_same(&what, &run(true), &run(false));
    }
}

/// Gated MLPs of equal formats, and of a gate and an up that no kernel takes together.
fn mlps(ops: &dyn Ops, rng: &mut Rng, problem: &Problem) {
    let shape = problem.x.shape();
    let (num_rows, width, middle) = (shape.sizes()[0], shape.sizes()[1], 128);
    let [gates, ups] = [(); 2].map(|()| matrices(ops, rng, middle, width));
    let downs = matrices(ops, rng, 33, middle);
    let equal = (0..gates.len()).map(|i| (&gates[i], &ups[i], &downs[i]));
    for (gate, up, down) in equal.chain([(&gates[0], &ups[1], &downs[0])]) {
        let formats = [gate, up, down].map(|weight| weight.format);
        let is_added = problem.residual.is_some();
        let what = format!("{} normed mlp {shape:?} {formats:?}, added: {is_added}", ops.name());
        let run = |fused: bool| {
            problem.run(&what, |x| {
                let mut out = Guarded::poisoned([num_rows, 33]);
                let mut rooms = [(); 3].map(|()| Tensor::zeros(DType::F32, [num_rows, middle]));
                let [between, first, second] = rooms.each_mut().map(Tensor::view_mut);
                let args = GatedMlpArgs {
                    gated: GatedMatmulArgs {
                        out: between,
                        x,
                        gate: (gate, None),
                        up: (up, None),
                        activation: Activation::Silu,
                        scratch: [first, second],
                    },
                    down: Projection { out: out.view(), weight: down, bias: None },
                };
                if fused {
                    ops.norm_mlp(args);
                } else {
                    ops.gated_mlp(args.map_x(|rows| rows.run(ops)));
                }
                out.finish(&what)
            })
        };
        assert_same(&what, &run(true), &run(false));
    }
}
