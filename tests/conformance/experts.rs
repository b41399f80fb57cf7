//! Mixtures of experts: routing and expert products against the referee, and in any company.

use std::ops::Range;

use tokenmill::config::CpuIsa;
use tokenmill::formats::{Format, PackedMatrix, Quantized, dense};
use tokenmill::ops::args::*;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::ops::{Ops, StepLimits};
use tokenmill::tensor::{DType, Tensor, View};

use crate::shim::Shim;
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

/// All that can choose so many of so many experts.
fn routings(experts: usize, per_token: usize) -> Vec<Routing> {
    let groups = [(1, 1, true, 1.0), (4, 2, false, 2.5), (8, 3, true, 0.5), (32, 4, true, 2.5)];
    let fits = |&(num, chosen, ..): &(usize, usize, bool, f32)| {
        experts.is_multiple_of(num) && per_token <= chosen * (experts / num)
    };
    let grouped = |(num_groups, num_chosen_groups, renormalize, scale)| {
        [Scoring::Softmax, Scoring::Sigmoid].map(|scoring| {
            Routing::Grouped(GroupedRouting {
                scoring,
                num_groups,
                num_chosen_groups,
                renormalize,
                scale,
            })
        })
    };
    ROUTINGS.into_iter().chain(groups.into_iter().filter(fits).flat_map(grouped)).collect()
}

/// Logits of which many are equal, and a bias. Other scores are never nearer than their rounding:
/// none is what another one lacks of 1.
fn coarse(rng: &mut Rng, tokens: usize, experts: usize) -> (Tensor, Tensor) {
    let mut number = |most: f32, steps: f32| (rng.float() * most * steps).round() / steps;
    let logits: Vec<f32> = (0..tokens * experts).map(|_| number(6.0, 4.0) + 0.0625).collect();
    let bias: Vec<f32> = (0..experts).map(|_| number(1.0, 8.0)).collect();
    (Tensor::from_slice(&logits, [tokens, experts]), Tensor::from_slice(&bias, [experts]))
}

pub fn check_routing(ops: &dyn Ops) {
    for (seed, (tokens, experts, per_token)) in ROUTES.into_iter().enumerate() {
        let rng = &mut Rng::new(seed as u64);
        let mut values = rng.floats(tokens * experts);
        values.iter_mut().for_each(|logit| *logit *= 9.0);
        // A third of the tokens find many equal logits.
        for row in values.chunks_exact_mut(experts).step_by(3) {
            row.iter_mut().for_each(|logit| *logit = (*logit / 4.0).round());
        }
        let fine = Tensor::from_slice(&values, [tokens, experts]);
        let (coarse, bias) = coarse(rng, tokens, experts);
        for routing in routings(experts, per_token) {
            let (logits, bias) = match routing {
                Routing::Softmax { .. } => (&fine, None),
                Routing::Grouped(routing) => {
                    let has_bias = routing.renormalize && routing.scoring == Scoring::Sigmoid;
                    (&coarse, has_bias.then(|| bias.view()))
                }
            };
            let router = Router { logits: logits.view(), bias, per_token, routing };
            check_router(ops, &router, &format!("{tokens} x {experts} choose {per_token}"));
        }
    }
}

/// What chooses.
#[derive(Clone, Copy)]
struct Router<'a> {
    logits: View<'a>,
    bias: Option<View<'a>>,
    per_token: usize,
    routing: Routing,
}

fn check_router(ops: &dyn Ops, router: &Router<'_>, case: &str) {
    let what = format!("{} {case}, {:?}", ops.name(), router.routing);
    let (ids, weights) = router.run(ops, &what);
    let (wanted, expected) = router.run(&ReferenceOps, &what);
    assert_eq!(ids, wanted, "{what}");
    // An exponential and a sum in f32 against f64.
    assert_close(&what, &weights, &expected, (1e-7, 2e-6));
    for token in 0..router.logits.size(0) {
        let row = Router { logits: router.logits.rows(token..token + 1), ..*router };
        let (alone, lone_weights) = row.run(ops, &what);
        let chosen = token * router.per_token..(token + 1) * router.per_token;
        assert_eq!(alone, ids[chosen.clone()], "{what}: token {token} alone");
        assert_same(&what, &lone_weights, &weights[chosen]);
    }
}

impl Router<'_> {
    fn run(&self, ops: &dyn Ops, what: &str) -> (Vec<u32>, Vec<f32>) {
        let &Router { logits, bias, per_token, routing } = self;
        let shape = [logits.size(0), per_token];
        let mut expert_ids = Tensor::from_slice(&vec![u32::MAX; shape[0] * per_token], shape);
        let mut weights = Guarded::poisoned(shape);
        let (ids, to) = (expert_ids.view_mut(), weights.view());
        ops.route_experts(RouteExpertsArgs { expert_ids: ids, weights: to, logits, bias, routing });
        (expert_ids.as_slice().to_vec(), weights.finish(what))
    }
}

/// A layer of experts of one format, and tokens.
struct Problem {
    experts: Experts,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    width: usize,
}

/// `(tokens, experts, experts per token, in and out features, width)`: one token, experts that
/// nobody chose, all tokens at one expert, rows beyond what kernels keep at once, more experts than
/// run together, and experts of many tokens between experts of few.
const SHAPES: [ProblemShape; 7] = [
    (1, 4, 2, 33, 20),
    (9, 3, 3, 64, 72),
    (40, 1, 1, 96, 64),
    (61, 16, 2, 64, 128),
    (130, 3, 2, 100, 192),
    (5, 40, 4, 130, 17),
    (100, 30, 3, 64, 96),
];

type ProblemShape = (usize, usize, usize, usize, usize);

fn problems(shape: ProblemShape) -> Vec<(String, Problem)> {
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
        (name, Problem { experts: Experts::from(experts), x, expert_ids, weights, width })
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
        let experts: Vec<Expert> = self.experts.into_vec().into_iter().map(expert).collect();
        Problem { experts: ops.index_experts(experts).unwrap(), ..self }
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
        let error = relative_error(&whole, expected);
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
    for routing in routings(64, 6) {
        let router = Router { logits: logits.view(), bias: None, per_token: 6, routing };
        let (ids, weights) = router.run(one, "one");
        let (same_ids, same_weights) = router.run(two, "two");
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

/// As [`SHAPES`], for a GPU: one token, also with several groups of FP8; experts whose few tokens
/// fill more than one row tile; all tokens at one expert; row tiles of 64 and of 128 rows, some of
/// them in two.
const DEVICE_SHAPES: [ProblemShape; 8] = [
    (1, 4, 2, 40, 24),
    (1, 2, 1, 130, 24),
    (9, 12, 3, 64, 72),
    (21, 40, 4, 130, 17),
    (40, 1, 1, 96, 64),
    (61, 5, 2, 64, 136),
    (90, 3, 2, 72, 40),
    (150, 3, 1, 200, 33),
];

/// One for each kind of kernel, each with two groups of FP8.
const FEW_DEVICE_SHAPES: [ProblemShape; 3] =
    [(9, 12, 3, 136, 24), (61, 5, 2, 64, 136), (90, 3, 2, 136, 24)];

/// Formats that the device computes with these sizes: bf16 in whole runs of sixteen bytes.
fn has_kernels(name: &str, (_, _, _, hidden, width): ProblemShape) -> bool {
    match name {
        "f32" | "f16" => false,
        "bf16" => hidden % 8 == 0 && width % 8 == 0,
        _ => true,
    }
}

fn device_problems(shapes: &[ProblemShape]) -> impl Iterator<Item = (String, Problem)> {
    let with_kernels = |&shape: &ProblemShape| {
        let all = problems(shape).into_iter().filter(move |(name, _)| has_kernels(name, shape));
        all.map(move |(name, problem)| (format!("experts {shape:?} {name}"), problem.rounded()))
    };
    shapes.iter().flat_map(with_kernels)
}

impl Problem {
    /// With activations that bf16 holds.
    fn rounded(self) -> Problem {
        let x = cast(self.x.as_slice(), DType::BF16, self.x.shape());
        Problem { x: cast(&widened(&x), DType::F32, x.shape()), ..self }
    }

    /// What the referee makes of experts whose weights are stored shorter than the device's
    /// activations: products with their values. INT8's are products of codes.
    fn expected_on_device(&self) -> Vec<f32> {
        let values = |matrix: &PackedMatrix| {
            let (rows, cols) = (matrix.num_rows, matrix.num_cols);
            if matrix.format == Format::Int8 {
                return PackedMatrix {
                    data: matrix.data.to_owned_memory(),
                    quantized: copied(matrix),
                    ..*matrix
                };
            }
            let values: Vec<f32> = (0..rows).flat_map(|row| matrix.row(row)).collect();
            dense::pack(Tensor::from_slice(&values, [rows, cols]))
        };
        let expert = |Expert { gate, up, down }: &Expert| Expert {
            gate: values(gate),
            up: values(up),
            down: values(down),
        };
        let experts: Vec<Expert> = self.experts.iter().map(expert).collect();
        let (x, expert_ids) = (self.x.to_owned_memory(), self.expert_ids.to_owned_memory());
        let weights = self.weights.to_owned_memory();
        let problem =
            Problem { experts: Experts::from(experts), x, expert_ids, weights, width: self.width };
        problem.run(&ReferenceOps, 0..self.num_tokens(), "the referee")
    }

    /// The choices of some tokens, over and over.
    fn repeated(self, times: usize) -> Problem {
        let shape = |tensor: &Tensor| {
            let shape = tensor.shape();
            shape.with_rows(shape.sizes()[0] * times)
        };
        let floats = |t: &Tensor| Tensor::from_slice(&t.as_slice::<f32>().repeat(times), shape(t));
        let ids = self.expert_ids.as_slice::<u32>().repeat(times);
        let expert_ids = Tensor::from_slice(&ids, shape(&self.expert_ids));
        Problem { x: floats(&self.x), weights: floats(&self.weights), expert_ids, ..self }
    }
}

fn copied(matrix: &PackedMatrix) -> Option<Quantized> {
    matrix.quantized.as_ref().map(|quantized| Quantized {
        grid: quantized.grid,
        scales: quantized.scales.to_owned_memory(),
        zero_points: quantized.zero_points.as_ref().map(Tensor::to_owned_memory),
    })
}

fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let errors: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (errors / expected.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

/// Kernels of every format: against the referee, and where experts have few tokens, bit for bit
/// against the device's own MLP.
pub fn check_on_device(ops: &dyn Ops) {
    let shapes = if wants_few_cases() { &FEW_DEVICE_SHAPES[..] } else { &DEVICE_SHAPES };
    for (what, problem) in device_problems(shapes) {
        check_problem(ops, &problem, &format!("{} {what}", ops.name()));
    }
}

fn check_problem(ops: &dyn Ops, problem: &Problem, what: &str) {
    let expected = problem.expected_on_device();
    let got = problem.run(ops, 0..problem.num_tokens(), what);
    // Eight bits after each of five roundings; INT8 also rounds the middle to codes.
    let most = if what.contains(" int8") { 2e-2 } else { 8e-3 };
    let error = relative_error(&got, &expected);
    assert!(error <= most, "{what}: off by {error}");
    let choices = problem.expert_ids.shape().len();
    if choices <= 4 * problem.experts.len() {
        let in_steps = as_activations(ops, &problem.in_steps(ops, what));
        assert_same(what, &got, &in_steps);
    }
}

/// Kernels of FP8 in rows, as a device has it that multiplies FP8: one token, and a shape for each
/// kind of kernel, all sizes multiples of sixteen.
pub fn check_fp8_rows(ops: &dyn Ops) {
    let shapes = [(1, 4, 2, 48, 32), (9, 12, 3, 144, 32), (61, 5, 2, 64, 144), (90, 3, 2, 144, 32)];
    for (what, problem) in device_problems(&shapes).filter(|(what, _)| what.ends_with(" fp8")) {
        check_problem(ops, &problem, &format!("{} {what}", ops.name()));
    }
}

/// A token has the same bits in any company, as long as its experts have few tokens, or have many.
pub fn check_device_invariance(ops: &dyn Ops) {
    // Three experts take row tiles of 64 rows up to 72 tokens, of 128 from then on.
    let shape = (90, 3, 2, 72, 40);
    for (what, problem) in device_problems(&[shape]) {
        let whole = problem.run(ops, 0..90, &what);
        for pieces in [[0..71, 71..90], [0..8, 8..90], [0..30, 30..90]] {
            let of_piece = |piece: &Range<usize>| problem.run(ops, piece.clone(), &what);
            let together: Vec<f32> = pieces.iter().flat_map(of_piece).collect();
            assert_same(&format!("{} {what} in {pieces:?}", ops.name()), &together, &whole);
        }
        let alone: Vec<f32> = (0..6).flat_map(|t| problem.run(ops, t..t + 1, &what)).collect();
        let six = problem.run(ops, 0..6, &what);
        assert_same(&format!("{} {what} one by one", ops.name()), &alone, &six);
    }
}

/// More choices than one pass has.
pub fn check_passes(ops: &dyn Ops) {
    let (what, problem) = device_problems(&[(64, 4, 2, 16, 8)]).last().unwrap();
    let few = problem.run(ops, 0..64, &what);
    let times = 257;
    let many = problem.repeated(times).run(ops, 0..64 * times, &what);
    assert_same(&format!("{} {what}, {times} times", ops.name()), &many, &few.repeat(times));
}

/// After `reserve` experts take no memory, and what is announced is what is taken.
pub fn check_scratch() {
    let ops = CudaOps::new(Shim::new());
    let limits = StepLimits {
        max_num_tokens: 70,
        max_num_seqs: 4,
        max_context_len: 64,
        max_width: 72,
        num_heads: 4,
        head_dim: 16,
        max_logit_rows: 4,
        vocab_size: 64,
        hidden_size: 64,
        num_experts: 12,
        experts_per_token: 3,
        expert_width: 72,
    };
    let free = || ops.device_memory().unwrap().unwrap().free;
    let before = free();
    ops.reserve(&limits).unwrap();
    assert_eq!(before - free(), ops.scratch_bytes(&limits) as u64);
    let (what, problem) = device_problems(&[(70, 12, 3, 64, 72)]).next().unwrap();
    assert!(what.ends_with(" int8"), "{what}: activations are quantized, into scratch memory");
    let problem = problem.arranged(&ops);
    let placed = |tensor: &Tensor| ops.place(tensor.to_owned_memory()).unwrap();
    let x = placed(&cast(problem.x.as_slice(), DType::BF16, problem.x.shape()));
    let (expert_ids, weights) = (placed(&problem.expert_ids), placed(&problem.weights));
    let empty = |shape: [usize; 2]| ops.zeros(DType::BF16, shape.into()).unwrap();
    let (mut out, mut rows) = (empty([70, 64]), empty([0, 64]));
    let mut middle = [(); 3].map(|()| empty([0, 72]));
    let mut more = empty([0, 64]);
    let before = free();
    for tokens in [70, 1, 16, 40] {
        ops.expert_mlp(ExpertMlpArgs {
            out: out.rows_mut(tokens),
            x: x.rows(tokens),
            experts: &problem.experts,
            activation: Activation::GeluTanh,
            expert_ids: expert_ids.rows(tokens),
            weights: weights.rows(tokens),
            scratch: ExpertScratch {
                gathered: rows.view_mut(),
                middle: middle.each_mut().map(Tensor::view_mut),
                yielded: more.view_mut(),
            },
        });
    }
    ops.synchronize().unwrap();
    assert_eq!(free(), before);
}

/// What no launch can take is refused at load, by name.
pub fn check_refusals() {
    let ops = CudaOps::new(Shim::new());
    let rng = &mut Rng::new(3);
    let mut expert = |dtype: DType, width: usize| Expert {
        gate: ops.arrange(rng.matrix(dtype, width, 16)).unwrap(),
        up: ops.arrange(rng.matrix(dtype, width, 16)).unwrap(),
        down: ops.arrange(rng.matrix(dtype, 16, width)).unwrap(),
    };
    let refused = |experts| ops.index_experts(experts).unwrap_err().to_string();
    let narrow = refused(vec![expert(DType::F32, 12)]);
    assert!(narrow.contains("no kernels for width of an expert 12: a multiple of 8"), "{narrow}");
    let mut mixed = vec![expert(DType::BF16, 24), expert(DType::F16, 24)];
    let values = mixed[1].gate.num_rows;
    let (_, codes) = quantized(&mut Rng::new(4), values, 16).swap_remove(0);
    mixed[1].up = ops.arrange(codes).unwrap();
    let mixed = refused(mixed);
    assert!(mixed.contains("no kernels for format of an expert Int8: one like"), "{mixed}");
    assert!(refused(Vec::new()).contains("no kernels for num_experts 0: at least one"));
}
