//! Mixtures of experts: routing, and products of every expert with the tokens that chose it.
//!
//! Which experts were chosen lies in device memory, so launches are as large as any choice could
//! make them: `experts_sort` puts choices in the order of their experts and writes a list of row
//! tiles, of which [`RowTiles`] says how long it can be; blocks that find no tile end at once.
//! Products then read x through the sorted choices, and what experts yield is added up token by
//! token. A step of very many choices runs in passes, so that memory is bounded.

use std::sync::PoisonError;

use super::CudaOps;
use super::launcher::{CudaError, KernelArg, Launch, Launcher, args};
use super::matmul::{Factor, Factors, Parameters};
use super::product::{Kind, RowTiles};
use crate::formats::PackedMatrix;
use crate::ops::args::{
    Activation, Expert, ExpertMlpArgs, Experts, GroupedRouting, RouteExpertsArgs, Routing, Scoring,
};
use crate::ops::{OpsError, StepLimits};
use crate::tensor::{DType, Tensor, View, ViewMut};

/// Tokens of a block that routes (`ROUTE_WARPS` in `moe.cu`).
const ROUTE_TOKENS: usize = 4;
/// Threads of the block that sorts (`SORT_THREADS`).
const SORT_THREADS: usize = 1024;
/// Threads of a block that adds up, and elements of a thread (`SUM_THREADS`, `CHUNK`).
const SUM_THREADS: usize = 128;
const CHUNK: usize = 8;
/// Choices of a pass, at most: in Qwen3-30B-A3B 256 per expert, enough for large row tiles, and
/// 176 MiB of what they yield.
const PASS_CHOICES: usize = 1 << 15;
/// Bytes of an `ExpertMatrix` (`experts.cuh`).
const MATRIX_BYTES: usize = 24;

/// Choices of the largest pass.
pub(super) fn most_choices(limits: &StepLimits) -> usize {
    tokens_per_pass(limits.experts_per_token).min(limits.max_num_tokens) * limits.experts_per_token
}

fn tokens_per_pass(per_token: usize) -> usize {
    (PASS_CHOICES / per_token.max(1)).max(1)
}

/// Device memory for a pass.
#[derive(Default)]
pub(super) struct Scratch {
    /// Every choice's row.
    places: Option<Tensor>,
    /// Every row's token.
    tokens: Option<Tensor>,
    /// `[most row tiles, 4]`.
    row_tiles: Option<Tensor>,
    num_row_tiles: Option<Tensor>,
    /// `[choices, width]`: gated products.
    middle: Option<Tensor>,
    /// `[choices, hidden_size]`.
    yielded: Option<Tensor>,
}

impl Scratch {
    fn parts_mut(&mut self) -> [&mut Option<Tensor>; 6] {
        let Scratch { places, tokens, row_tiles, num_row_tiles, middle, yielded } = self;
        [places, tokens, row_tiles, num_row_tiles, middle, yielded]
    }
}

/// Elements of the parts of [`Scratch`], in order.
struct ScratchLens([usize; 6]);

impl ScratchLens {
    const DTYPES: [DType; 6] =
        [DType::U32, DType::U32, DType::U32, DType::U32, DType::BF16, DType::BF16];

    fn new(choices: usize, experts: usize, hidden_size: usize, width: usize) -> ScratchLens {
        let row_tiles = RowTiles::most_of_all(choices, experts);
        let counter = usize::from(choices > 0);
        let elements = [choices * width, choices * hidden_size];
        ScratchLens([choices, choices, 4 * row_tiles, counter, elements[0], elements[1]])
    }

    /// For all layers of a step; nothing without experts.
    fn of_step(limits: &StepLimits) -> ScratchLens {
        let StepLimits { hidden_size, expert_width, num_experts, .. } = *limits;
        ScratchLens::new(most_choices(limits), num_experts, hidden_size, expert_width)
    }
}

/// Bytes that [`CudaOps::reserve_experts`] takes.
pub(super) fn scratch_bytes(limits: &StepLimits) -> usize {
    let parts = ScratchLens::of_step(limits).0.into_iter().zip(ScratchLens::DTYPES);
    parts.map(|(len, dtype)| len * dtype.size_bytes()).sum()
}

/// Tokens of a step that are computed together.
struct Pass<'a> {
    x: View<'a>,
    expert_ids: View<'a>,
    weights: View<'a>,
    experts: &'a Experts,
    activation: Activation,
    tiles: RowTiles,
}

impl Pass<'_> {
    fn num_choices(&self) -> usize {
        self.expert_ids.shape().len()
    }

    fn most_row_tiles(&self) -> usize {
        self.tiles.most(self.num_choices(), self.experts.len())
    }
}

/// What kernels are told of sorted choices.
#[derive(Clone, Copy)]
struct Sorted<'a> {
    row_tiles: View<'a>,
    num_row_tiles: View<'a>,
    /// Where rows of activations are; `None`: in the order of choices.
    x_rows: Option<View<'a>>,
    /// The first of an expert's matrices: 0 for gate and up, 2 for down.
    first_matrix: usize,
}

impl<L: Launcher> CudaOps<L> {
    /// Experts with the addresses of all of their matrices in device memory.
    pub(super) fn indexed(&self, experts: Vec<Expert>) -> Result<Experts, OpsError> {
        let matrices = experts.iter().flat_map(|e| [&e.gate, &e.up, &e.down]);
        let bytes: Vec<u8> = matrices.flat_map(addresses).flat_map(u64::to_le_bytes).collect();
        let index = Tensor::from_slice(&bytes, [experts.len(), 3 * MATRIX_BYTES]);
        Ok(Experts::with_index(experts, self.placed(index)?))
    }

    /// See [`crate::ops::Ops::route_experts`].
    pub(super) fn route(&self, args: RouteExpertsArgs<'_>) {
        let RouteExpertsArgs { mut expert_ids, mut weights, logits, bias, routing } = args;
        let (num_tokens, per_token) = (expert_ids.size(0), expert_ids.size(1));
        // All experts are one group.
        let routing = match routing {
            Routing::Softmax { renormalize } => GroupedRouting {
                scoring: Scoring::Softmax,
                num_groups: 1,
                num_chosen_groups: 1,
                renormalize,
                scale: 1.0,
            },
            Routing::Grouped(routing) => routing,
        };
        let launch = Launch::new(num_tokens.div_ceil(ROUTE_TOKENS), 32 * ROUTE_TOKENS);
        let arguments = args![
            &mut expert_ids,
            &mut weights,
            logits,
            bias,
            num_tokens,
            logits.size(1),
            per_token,
            u32::from(routing.renormalize),
            u32::from(routing.scoring == Scoring::Sigmoid),
            routing.num_groups,
            routing.num_chosen_groups,
            routing.scale,
        ];
        self.launch("route_experts", launch, &arguments);
    }

    /// Makes room for steps of this size.
    pub(super) fn reserve_experts(&self, limits: &StepLimits) -> Result<(), CudaError> {
        let mut scratch = self.expert_scratch.lock().unwrap_or_else(PoisonError::into_inner);
        self.make_rooms(&mut scratch, &ScratchLens::of_step(limits))
    }

    fn make_rooms(&self, scratch: &mut Scratch, lens: &ScratchLens) -> Result<(), CudaError> {
        let parts = scratch.parts_mut().into_iter();
        for ((part, len), dtype) in parts.zip(lens.0).zip(ScratchLens::DTYPES) {
            if len > 0 {
                self.make_room(part, dtype, len)?;
            }
        }
        Ok(())
    }

    /// See [`crate::ops::Ops::expert_mlp`].
    pub(super) fn multiply_experts(&self, args: ExpertMlpArgs<'_>) {
        let ExpertMlpArgs { mut out, x, experts, activation, expert_ids, weights, .. } = args;
        let (num_tokens, per_token) = (x.size(0), expert_ids.size(1));
        if num_tokens == 0 {
            return;
        }
        // As all tokens want them: no bit depends on where a pass ends.
        let tiles = RowTiles::new(num_tokens * per_token, num_tokens, experts.len());
        let pass_len = tokens_per_pass(per_token).min(num_tokens);
        let [hidden_size, width] = [out.size(1), experts[0].gate.num_rows];
        let lens = ScratchLens::new(pass_len * per_token, experts.len(), hidden_size, width);
        let mut scratch = self.expert_scratch.lock().unwrap_or_else(PoisonError::into_inner);
        self.make_rooms(&mut scratch, &lens).unwrap_or_else(|error| {
            panic!("a step is larger than what was reserved, and there is no room: {error}")
        });
        for start in (0..num_tokens).step_by(pass_len) {
            let tokens = start..num_tokens.min(start + pass_len);
            let [x, expert_ids, weights] =
                [x, expert_ids, weights].map(|view| view.rows(tokens.clone()));
            let pass = Pass { x, expert_ids, weights, experts, activation, tiles };
            self.run_pass(out.reborrow().into_rows(tokens), &pass, &mut scratch);
        }
    }

    /// Sorts, multiplies twice, adds up.
    fn run_pass(&self, mut out: ViewMut<'_>, pass: &Pass<'_>, scratch: &mut Scratch) {
        self.sort(pass, scratch);
        let [places, tokens, row_tiles, num_row_tiles, middle, yielded] =
            scratch.parts_mut().map(|part| part.as_mut().expect("room was made for all parts"));
        let (choices, per_token) = (pass.num_choices(), pass.expert_ids.size(1));
        let Expert { gate, up, down } = &pass.experts[0];
        let sorted = Sorted {
            row_tiles: row_tiles.view(),
            num_row_tiles: num_row_tiles.view(),
            x_rows: Some(tokens.view()),
            first_matrix: 0,
        };
        let mut gated = middle.front_mut([choices, gate.num_rows]);
        self.multiply_sorted(pass, sorted, pass.x, &mut gated, (gate, Some(up)));
        let sorted = Sorted { x_rows: None, first_matrix: 2, ..sorted };
        let mut of_choices = yielded.front_mut([choices, down.num_rows]);
        self.multiply_sorted(pass, sorted, gated.as_view(), &mut of_choices, (down, None));

        let width = out.size(1);
        let launch = Launch::new(out.size(0), SUM_THREADS).by(width.div_ceil(SUM_THREADS * CHUNK));
        let arguments =
            args![&mut out, of_choices.as_view(), &*places, pass.weights, per_token, width];
        self.launch("experts_sum_bf16", launch, &arguments);
    }

    /// Brings choices into the order of their experts.
    fn sort(&self, pass: &Pass<'_>, scratch: &mut Scratch) {
        let Scratch { places, tokens, row_tiles, num_row_tiles, .. } = scratch;
        let arguments = args![
            places.as_ref().map(Tensor::view),
            tokens.as_ref().map(Tensor::view),
            row_tiles.as_ref().map(Tensor::view),
            num_row_tiles.as_ref().map(Tensor::view),
            pass.expert_ids,
            pass.num_choices(),
            pass.expert_ids.size(1),
            pass.tiles.rows,
            pass.most_row_tiles(),
        ];
        self.launch("experts_sort", Launch::new(1, SORT_THREADS), &arguments);
    }

    /// One launch: gate, up and the activation, or down.
    fn multiply_sorted(
        &self,
        pass: &Pass<'_>,
        sorted: Sorted<'_>,
        x: View<'_>,
        out: &mut ViewMut<'_>,
        (first, up): (&PackedMatrix, Option<&PackedMatrix>),
    ) {
        let kind = Kind::of(first, x.dtype()).expect("experts without kernels were refused");
        let dtype = out.dtype();
        let out = KernelArg::from(out);
        let factor = |weight, out| Factor { weight, bias: None, out };
        let factors = Factors {
            kind,
            x,
            weights: [Some(factor(first, out)), up.map(|up| factor(up, KernelArg::null())), None],
            activation: up.map(|_| pass.activation),
            out: dtype,
        };
        let (tiles, most) = (pass.tiles, pass.most_row_tiles());
        let plan = factors.with_problem(tiles.rows, |p| p.plan_experts(tiles, most, self.facts()));
        self.launch_as(&plan, tiles.rows, &factors, |parameters: &mut Parameters<'_>| {
            parameters.push(pass.experts.index());
            parameters.push(sorted.row_tiles);
            parameters.push(sorted.x_rows);
            parameters.push(sorted.first_matrix);
            if plan.panels.is_some() {
                parameters.push(sorted.num_row_tiles);
            }
        });
    }
}

/// As `ExpertMatrix` has them.
fn addresses(matrix: &PackedMatrix) -> impl Iterator<Item = u64> {
    let address = |tensor: &Tensor| tensor.view().address().addr() as u64;
    let quantized = matrix.quantized.as_ref();
    let scales = quantized.map_or(0, |quantized| address(&quantized.scales));
    let zeros = quantized.and_then(|quantized| quantized.zero_points.as_ref()).map_or(0, address);
    [address(&matrix.data), scales, zeros].into_iter()
}
