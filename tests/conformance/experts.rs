//! Mixtures of experts: routing and expert products against the referee, and in any company.

use std::ops::Range;

use tokenmill::config::CpuIsa;
use tokenmill::formats::PackedMatrix;
use tokenmill::ops::Ops;
use tokenmill::ops::args::*;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::{DType, Tensor, View};

use crate::support::*;

/// `(tokens, experts, experts per token)`: one of each, all of them, and sizes of real models.
const ROUTES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (3, 2, 1),
    (5, 8, 2),
    (17, 7, 7),
    (1, 128, 8),
    (70, 128, 8),
    (33, 65, 3),
    (300, 64, 6),
];

const ROUTINGS: [Routing; 2] =
    [Routing::Softmax { renormalize: true }, Routing::Softmax { renormalize: false }];

pub fn check_routing(ops: &dyn Ops) {
    for (seed, (tokens, experts, per_token)) in ROUTES.into_iter().enumerate() {
        let mut values = Rng::new(seed as u64).floats(tokens * experts);
        values.iter_mut().for_each(|logit| *logit *= 9.0);
        // A third of the tokens find many equal logits.
        for row in values.chunks_exact_mut(experts).step_by(3) {
            row.iter_mut().for_each(|logit| *logit = (*logit / 4.0).round());
        }
        let logits = Tensor::from_slice(&values, [tokens, experts]);
        for routing in ROUTINGS {
            let what = format!("{} {tokens} x {experts} choose {per_token}", ops.name());
            let (ids, weights) = route(ops, logits.view(), per_token, routing, &what);
            let (wanted, expected) = route(&ReferenceOps, logits.view(), per_token, routing, &what);
            assert_eq!(ids, wanted, "{what}");
            // An exponential and a sum in f32 against f64.
            assert_close(&what, &weights, &expected, (1e-7, 2e-6));
            for token in 0..tokens {
                let row = logits.view().rows(token..token + 1);
                let (alone, lone_weights) = route(ops, row, per_token, routing, &what);
                let chosen = token * per_token..(token + 1) * per_token;
                assert_eq!(alone, ids[chosen.clone()], "{what}: token {token} alone");
                assert_same(&what, &lone_weights, &weights[chosen]);
            }
        }
    }
}

fn route(
    ops: &dyn Ops,
    logits: View<'_>,
    per_token: usize,
    routing: Routing,
    what: &str,
) -> (Vec<u32>, Vec<f32>) {
    let shape = [logits.size(0), per_token];
    let mut expert_ids = Tensor::from_slice(&vec![u32::MAX; shape[0] * per_token], shape);
    let mut weights = Guarded::poisoned(shape);
    let (ids, weights_view) = (expert_ids.view_mut(), weights.view());
    ops.route_experts(RouteExpertsArgs { expert_ids: ids, weights: weights_view, logits, routing });
    (expert_ids.as_slice().to_vec(), weights.finish(what))
}

/// A layer of experts of one format, and tokens.
struct Problem {
    experts: Vec<Expert>,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    width: usize,
}

/// `(tokens, experts, experts per token, in and out features, width)`: one token, experts that
/// nobody chose, all tokens at one expert, rows beyond what kernels keep at once, more experts than
/// run together, and experts of many tokens between experts of few.
const SHAPES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 4, 2, 33, 20),
    (9, 3, 3, 64, 72),
    (40, 1, 1, 96, 64),
    (61, 16, 2, 64, 128),
    (130, 3, 2, 100, 192),
    (5, 40, 4, 130, 17),
    (100, 30, 3, 64, 96),
];

fn problems(shape: (usize, usize, usize, usize, usize)) -> Vec<(String, Problem)> {
    let (tokens, num_experts, per_token, hidden, width) = shape;
    let rng = &mut Rng::new((tokens * hidden + width) as u64);
    let formats = |rng: &mut Rng, rows: usize, cols: usize| {
        let mut all: Vec<(String, PackedMatrix)> = quantized(rng, rows, cols)
            .into_iter()
            .map(|(name, weight)| (name.to_owned(), weight))
            .collect();
        for dtype in FLOATS {
            all.push((dtype.to_string(), rng.matrix(dtype, rows, cols)));
        }
        all
    };
    let mut by_format: Vec<(String, Vec<Expert>)> = Vec::new();
    for _ in 0..num_experts {
        let [gates, ups] = [(); 2].map(|()| formats(rng, width, hidden));
        let downs = formats(rng, hidden, width);
        for (i, (((name, gate), (_, up)), (_, down))) in
            gates.into_iter().zip(ups).zip(downs).enumerate()
        {
            if by_format.len() <= i {
                by_format.push((name, Vec::new()));
            }
            by_format[i].1.push(Expert { gate, up, down });
        }
    }
    let (expert_ids, weights) = choices(rng, tokens, num_experts, per_token);
    let problem = |(name, experts)| {
        let x = Rng::new(7).tensor(DType::F32, [tokens, hidden]);
        let (expert_ids, weights) = (expert_ids.to_owned_memory(), weights.to_owned_memory());
        (name, Problem { experts, x, expert_ids, weights, width })
    };
    by_format.into_iter().map(problem).collect()
}

/// Random experts for every token, the last ones more seldom than the first.
fn choices(rng: &mut Rng, tokens: usize, experts: usize, per_token: usize) -> (Tensor, Tensor) {
    let mut ids = Vec::new();
    for _ in 0..tokens {
        let range = per_token.max(rng.below(experts) + 1);
        let mut chosen = rng.permutation(range)[..per_token].to_vec();
        chosen.sort_unstable();
        ids.extend(chosen);
    }
    let shape = [tokens, per_token];
    (Tensor::from_slice(&ids, shape), rng.tensor(DType::F32, shape))
}

impl Problem {
    /// The same with matrices of floats as a backend wants them.
    fn arranged(self, ops: &dyn Ops) -> Problem {
        let arranged = |matrix| ops.arrange(matrix).unwrap();
        let expert = |Expert { gate, up, down }| Expert {
            gate: arranged(gate),
            up: arranged(up),
            down: arranged(down),
        };
        Problem { experts: self.experts.into_iter().map(expert).collect(), ..self }
    }

    fn run(&self, ops: &dyn Ops, tokens: Range<usize>, what: &str) -> Vec<f32> {
        let num_rows = tokens.len();
        self.run_within(ops, tokens, num_rows, what)
    }

    /// With room for this many rows of experts.
    fn run_within(
        &self,
        ops: &dyn Ops,
        tokens: Range<usize>,
        num_rows: usize,
        what: &str,
    ) -> Vec<f32> {
        let hidden = self.x.shape().sizes()[1];
        let mut out = Guarded::poisoned([tokens.len(), hidden]);
        let room = |width: usize| {
            let mut room = Tensor::zeros(DType::F32, [num_rows, width]);
            room.as_mut_slice::<f32>().fill(f32::NAN);
            room
        };
        let (mut gathered, mut yielded) = (room(hidden), room(hidden));
        let mut middle = [(); 3].map(|()| room(self.width));
        ops.expert_mlp(ExpertMlpArgs {
            out: out.view(),
            x: self.x.view().rows(tokens.clone()),
            experts: &self.experts,
            activation: Activation::Silu,
            expert_ids: self.expert_ids.view().rows(tokens.clone()),
            weights: self.weights.view().rows(tokens),
            scratch: ExpertScratch {
                gathered: gathered.view_mut(),
                middle: middle.each_mut().map(Tensor::view_mut),
                yielded: yielded.view_mut(),
            },
        });
        out.finish(what)
    }

    /// Against the referee, against the backend's own MLP, and within more room.
    fn check(&self, ops: &CpuOps, expected: &[f32], tolerance: f64, what: &str) {
        let tokens = self.num_tokens();
        let whole = self.run(ops, 0..tokens, what);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let total: f64 = expected.iter().map(|&x| square(x)).sum();
        let errors: f64 = whole.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
        let error = (errors / total).sqrt();
        assert!(error <= tolerance, "{what}: off by {error}");
        assert_same(what, &whole, &self.in_steps(ops, what));
        for more in [7, 1000] {
            let within = self.run_within(ops, 0..tokens, tokens + more, what);
            assert_same(&format!("{what} within {more} rows more"), &within, &whole);
        }
    }

    fn num_tokens(&self) -> usize {
        self.x.shape().sizes()[0]
    }

    /// The same with the backend's own gated MLP, token by token, added up in plain loops.
    fn in_steps(&self, ops: &dyn Ops, what: &str) -> Vec<f32> {
        let (hidden, per_token) = (self.x.shape().sizes()[1], self.weights.shape().sizes()[1]);
        let mut all = Vec::new();
        for token in 0..self.num_tokens() {
            let mut sum = vec![0.0_f32; hidden];
            let choices = token * per_token..(token + 1) * per_token;
            let ids = &self.expert_ids.as_slice::<u32>()[choices.clone()];
            for (&id, &weight) in ids.iter().zip(&self.weights.as_slice::<f32>()[choices]) {
                let expert = &self.experts[id as usize];
                let mut out = Guarded::poisoned([1, hidden]);
                let mut middle = [(); 3].map(|()| Tensor::zeros(DType::F32, [1, self.width]));
                let [middle, first, second] = middle.each_mut().map(Tensor::view_mut);
                ops.gated_mlp(GatedMlpArgs {
                    gated: GatedMatmulArgs {
                        out: middle,
                        x: self.x.view().rows(token..token + 1),
                        gate: (&expert.gate, None),
                        up: (&expert.up, None),
                        activation: Activation::Silu,
                        scratch: [first, second],
                    },
                    down: Projection { out: out.view(), weight: &expert.down, bias: None },
                });
                for (sum, y) in sum.iter_mut().zip(out.finish(what)) {
                    *sum += weight * y;
                }
            }
            all.extend(sum);
        }
        all
    }
}

/// How far results may be from the referee's, relative to their root mean square: f32 sums, or
/// eight bits of activations (bf16, codes), which a rounding before may move by a step.
fn tolerance(ops: &CpuOps, name: &str) -> f64 {
    let is_bf16 = matches!(ops.isa().choice(), CpuIsa::Amx | CpuIsa::Avx512Bf16);
    match name {
        "f32" | "f16" => 1e-5,
        _ if name.starts_with("int") || name.starts_with("q8") => 2e-2,
        _ if is_bf16 => 1e-2,
        _ => 1e-5,
    }
}

pub fn check_products(backends: &[CpuOps]) {
    for shape in SHAPES {
        for (name, mut problem) in problems(shape) {
            let tokens = 0..problem.num_tokens();
            let expected = problem.run(&ReferenceOps, tokens, "the referee");
            // Rows first, blocks last: a matrix in blocks is no longer what others arrange.
            let (in_rows, in_blocks): (Vec<_>, Vec<_>) =
                backends.iter().partition(|ops| !ops.isa().multiplies_bf16());
            for ops in in_rows.into_iter().chain(in_blocks) {
                let what = format!("{} experts {shape:?} {name}", ops.name());
                problem.check(ops, &expected, tolerance(ops, &name), &what);
                problem = problem.arranged(ops);
                problem.check(ops, &expected, tolerance(ops, &name), &format!("{what}, arranged"));
            }
        }
    }
}

/// A token alone, in the whole batch, and in pieces of it.
pub fn check_invariance(ops: &dyn Ops) {
    for shape in [SHAPES[3], SHAPES[4], SHAPES[6]] {
        for (name, problem) in problems(shape) {
            let problem = problem.arranged(ops);
            let what = format!("{} experts {shape:?} {name}", ops.name());
            let tokens = problem.num_tokens();
            let whole = problem.run(ops, 0..tokens, &what);
            for piece in [1, 7, 33] {
                let starts = (0..tokens).step_by(piece);
                let pieces: Vec<f32> = starts
                    .flat_map(|at| problem.run(ops, at..tokens.min(at + piece), &what))
                    .collect();
                assert_same(&format!("{what} in pieces of {piece}"), &pieces, &whole);
            }
        }
    }
}

/// Runs both operations on both backends and compares bits.
pub fn check_equal(one: &dyn Ops, two: &dyn Ops) {
    let logits = Rng::new(5).tensor(DType::F32, [300, 64]);
    for routing in ROUTINGS {
        let (ids, weights) = route(one, logits.view(), 6, routing, "one");
        let (same_ids, same_weights) = route(two, logits.view(), 6, routing, "two");
        assert_eq!(ids, same_ids, "{}", two.name());
        assert_same(&two.name(), &same_weights, &weights);
    }
    for shape in [(61, 5, 2, 512, 600), (130, 3, 2, 100, 192)] {
        for (name, problem) in problems(shape) {
            let problem = problem.arranged(one);
            let tokens = 0..problem.num_tokens();
            let what = format!("{} experts {shape:?} {name}", two.name());
            let expected = problem.run(one, tokens.clone(), &what);
            assert_same(&what, &problem.run(two, tokens, &what), &expected);
        }
    }
}
