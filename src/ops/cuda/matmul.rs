//! Products with weights of every format: what kernels are told, and what happens before.
//!
//! Projections of one format that read the same activations are one launch, and so are gate, up
//! and activation. INT8 quantizes the activations first, once for all of them; rows whose length
//! is not a multiple of eight elements are copied to one that is. Products of more rows than the
//! skinny kernels take go to a library of the device's vendor where there is one
//! ([`DenseProducts`]): dense ones as they are, FP8 as `fp8` says. `product` chooses kernels; where
//! results depend on its choice is said there.

use std::sync::{MutexGuard, PoisonError};

use super::launcher::{CudaError, KernelArg, Launch, Launcher, args};
use super::product::{Kind, MAX_SKINNY_ROWS, PARTIAL_BYTES, Plan, Problem, SPLIT_TILES};
use super::{CudaOps, by_activation, experts};
use crate::formats::PackedMatrix;
use crate::formats::blocks::BLOCK_ROWS;
use crate::ops::args::{Activation, GatedMatmulArgs, MatmulArgs, Projection, WeightAndBias};
use crate::ops::{StepLimits, gated_in_steps};
use crate::tensor::{DType, Tensor, View, ViewMut};

/// Weights of a launch.
pub(super) const MAX_WEIGHTS: usize = 3;
/// Parameters of a kernel: seven per weight, sixteen of the product, four of experts, and what
/// skinny kernels take beside.
const MAX_PARAMETERS: usize = 7 * MAX_WEIGHTS + 16 + 4 + 2;
/// Elements to which the length of copied activation rows is rounded up: a step of codes.
const PITCH_ELEMENTS: usize = 128;
/// Rows from which on products are a library's.
pub(super) const LIBRARY_ROWS: usize = MAX_SKINNY_ROWS + 1;
/// Threads of a kernel that prepares a row.
const PREPARE_THREADS: usize = 256;
/// Outputs of a block of the plain kernel.
const PLAIN_COLUMNS: usize = 4;

/// A library's dense products: `out = x · weightᵀ (+ bias)` of row-major operands of one dtype,
/// bf16 or f16, and with f32 sums. Of bytes, with sums of 32 bits and no bias, it may have products that
/// nothing but a measurement asks for.
pub trait DenseProducts: Send + Sync {
    /// What it is called, with its version.
    fn name(&self) -> String {
        "a library".to_owned()
    }

    /// Whether operands may be FP8 E4M3, which stand for themselves, without a bias; rows of
    /// weights and of `x` are multiples of sixteen then, and so is the number of columns.
    fn multiplies_codes(&self) -> bool;

    /// Whether it was done; if not, our own kernels do it.
    fn multiply(
        &self,
        out: ViewMut<'_>,
        x: View<'_>,
        weight: View<'_>,
        bias: Option<View<'_>>,
    ) -> bool;
}

/// Device memory for what is between activations and sums.
#[derive(Default)]
pub(super) struct Scratch {
    /// Codes, or rows of another pitch: bytes, of the dtype that the library reads.
    pub(super) x: Option<Tensor>,
    /// A scale per row of codes.
    pub(super) x_scales: Option<Tensor>,
    /// Sums of parts of k.
    partial: Option<Tensor>,
    /// How many parts of a tile are done; zero between launches.
    arrived: Option<Tensor>,
}

/// Bytes of the parts of [`Scratch`], in order.
struct ScratchBytes([usize; 4]);

impl ScratchBytes {
    /// For all products of a step.
    fn of_step(limits: &StepLimits, multiprocessors: u32) -> ScratchBytes {
        let rows = ScratchBytes::new(limits.max_num_tokens, limits.max_width, multiprocessors);
        let choices = experts::most_choices(limits);
        let of_experts = ScratchBytes::new(choices, limits.expert_width, multiprocessors);
        ScratchBytes(std::array::from_fn(|i| rows.0[i].max(of_experts.0[i])))
    }

    fn new(rows: usize, width: usize, multiprocessors: u32) -> ScratchBytes {
        let multiprocessors = multiprocessors as usize;
        ScratchBytes([
            rows * width.next_multiple_of(PITCH_ELEMENTS) * 2,
            rows * 4,
            multiprocessors * PARTIAL_BYTES,
            multiprocessors * SPLIT_TILES * 4,
        ])
    }
}

/// Activations as the kernels read them.
struct Operand<'a> {
    x: KernelArg<'a>,
    scales: KernelArg<'a>,
    /// Bytes of a row.
    pitch: usize,
}

/// One weight of a launch.
pub(super) struct Factor<'a> {
    pub(super) weight: &'a PackedMatrix,
    pub(super) bias: Option<View<'a>>,
    pub(super) out: KernelArg<'a>,
}

/// What one launch multiplies.
pub(super) struct Factors<'a> {
    pub(super) kind: Kind,
    /// `[rows, k]`.
    pub(super) x: View<'a>,
    pub(super) weights: [Option<Factor<'a>>; MAX_WEIGHTS],
    /// Of a gated product of the first two weights.
    pub(super) activation: Option<Activation>,
    pub(super) out: DType,
}

impl Factors<'_> {
    /// The sizes, for `rows` rows.
    pub(super) fn with_problem<T>(&self, rows: usize, f: impl FnOnce(Problem<'_>) -> T) -> T {
        let columns = self.weights.each_ref().map(|f| f.as_ref().map_or(0, |f| f.weight.num_rows));
        let columns = &columns[..self.weights.iter().flatten().count()];
        let is_gated = self.activation.is_some();
        f(Problem { kind: self.kind, rows, k: self.x.size(1), columns, is_gated })
    }
}

/// Parameters of a kernel, in order.
pub(super) struct Parameters<'a> {
    args: [KernelArg<'a>; MAX_PARAMETERS],
    len: usize,
}

impl<'a> Parameters<'a> {
    pub(super) fn push(&mut self, arg: impl Into<KernelArg<'a>>) {
        self.args[self.len] = arg.into();
        self.len += 1;
    }

    /// `WEIGHT_PARAMETERS` of `product.cuh`.
    fn push_factor(&mut self, factor: Option<&Factor<'a>>) {
        let quantized = factor.and_then(|factor| factor.weight.quantized.as_ref());
        let zeros = quantized.and_then(|quantized| quantized.zero_points.as_ref());
        let bias = factor.and_then(|factor| factor.bias);
        self.push(factor.map(|factor| factor.weight.data.view()));
        self.push(quantized.map(|quantized| quantized.scales.view()));
        self.push(zeros.map(Tensor::view));
        self.push(bias);
        self.push(factor.map_or(KernelArg::null(), |factor| factor.out));
        self.push(factor.map_or(0, |factor| factor.weight.num_rows));
        self.push(bias.map_or(0, |bias| element_type(bias.dtype())));
    }
}

impl<L: Launcher> CudaOps<L> {
    /// Bytes that [`CudaOps::reserve_products`] takes.
    pub(super) fn product_scratch_bytes(&self, limits: &StepLimits) -> usize {
        ScratchBytes::of_step(limits, self.facts().multiprocessors).0.iter().sum()
    }

    /// Makes room for steps of this size.
    pub(super) fn reserve_products(&self, limits: &StepLimits) -> Result<(), CudaError> {
        self.scratch(&ScratchBytes::of_step(limits, self.facts().multiprocessors)).map(|_| ())
    }

    /// The scratch memory; grows when nothing was reserved.
    fn scratch(&self, bytes: &ScratchBytes) -> Result<MutexGuard<'_, Scratch>, CudaError> {
        let mut scratch = self.product_scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch { x, x_scales, partial, arrived } = &mut *scratch;
        let [of_x, others @ ..] = bytes.0;
        self.make_room(x, DType::Fp8, of_x)?;
        for (tensor, bytes) in [x_scales, partial, arrived].into_iter().zip(others) {
            self.make_room(tensor, DType::U8, bytes)?;
        }
        Ok(scratch)
    }

    /// The scratch memory with room for products of these activations.
    pub(super) fn product_room(&self, x: View<'_>) -> MutexGuard<'_, Scratch> {
        let bytes = ScratchBytes::new(x.size(0), x.size(1), self.facts().multiprocessors);
        self.scratch(&bytes).unwrap_or_else(|error| {
            panic!("a step is larger than what was reserved, and there is no room: {error}")
        })
    }

    /// See [`crate::ops::Ops::matmul`].
    pub(super) fn multiply(&self, args: MatmulArgs<'_>) {
        let MatmulArgs { x, mut projections } = args;
        if x.shape().is_empty() {
            return;
        }
        let mut rest = &mut projections[..];
        while let Some(first) = rest.first() {
            let (kind, out) = (Kind::of(first.weight, x.dtype()), first.out.dtype());
            let weight = first.weight;
            let joins = |p: &&Projection<'_>| p.out.dtype() == out && are_alike(weight, p.weight);
            let len = rest.iter().take(MAX_WEIGHTS).take_while(joins).count();
            let (run, others) = rest.split_at_mut(len);
            match kind {
                Some(kind) => self.multiply_run(kind, x, run),
                None => run.iter_mut().for_each(|projection| self.multiply_plainly(x, projection)),
            }
            rest = others;
        }
    }

    /// Projections of one kind.
    fn multiply_run(&self, kind: Kind, x: View<'_>, run: &mut [Projection<'_>]) {
        match self.library_for(kind, x) {
            None => self.launch_run(kind, x, run),
            Some(library) if kind == Kind::Fp8Rows => self.multiply_codes(library, x, run),
            Some(library) => {
                for p in run {
                    if !library.multiply(p.out.reborrow(), x, p.weight.data.view(), p.bias) {
                        self.launch_run(kind, x, std::slice::from_mut(p));
                    }
                }
            }
        }
    }

    /// The library that takes products of this kind with these rows.
    fn library_for(&self, kind: Kind, x: View<'_>) -> Option<&dyn DenseProducts> {
        let is_taken = matches!(kind, Kind::Bf16 | Kind::F16 | Kind::Fp8Rows);
        self.dense_products().filter(|_| is_taken && x.size(0) > MAX_SKINNY_ROWS)
    }

    pub(super) fn launch_run(&self, kind: Kind, x: View<'_>, run: &mut [Projection<'_>]) {
        let Some(out) = run.first().map(|p| p.out.dtype()) else { return };
        let mut weights = [const { None }; MAX_WEIGHTS];
        for (factor, p) in weights.iter_mut().zip(run) {
            let (weight, bias) = (p.weight, p.bias);
            *factor = Some(Factor { weight, bias, out: KernelArg::from(&mut p.out) });
        }
        self.launch_product(&Factors { kind, x, weights, activation: None, out });
    }

    /// See [`crate::ops::Ops::gated_matmul`].
    pub(super) fn multiply_gated(&self, args: GatedMatmulArgs<'_>) {
        let (gate, up) = (args.gate.0, args.up.0);
        let kind = Kind::of(gate, args.x.dtype()).filter(|_| are_alike(gate, up));
        let library = kind.and_then(|kind| self.library_for(kind, args.x));
        match (kind, library) {
            _ if args.x.shape().is_empty() => (),
            (Some(kind), None) => self.launch_gated(kind, args),
            (Some(Kind::Fp8Rows), Some(library)) => self.multiply_codes_gated(library, args),
            _ => gated_in_steps(self, args),
        }
    }

    /// A gated product in one launch.
    fn launch_gated(&self, kind: Kind, args: GatedMatmulArgs<'_>) {
        let GatedMatmulArgs { mut out, x, gate, up, activation, .. } = args;
        let ((gate, gate_bias), (up, up_bias)): (WeightAndBias<'_>, WeightAndBias<'_>) = (gate, up);
        let dtype = out.dtype();
        let out = KernelArg::from(&mut out);
        let gate = Factor { weight: gate, bias: gate_bias, out };
        let up = Factor { weight: up, bias: up_bias, out: KernelArg::null() };
        let weights = [Some(gate), Some(up), None];
        let activation = Some(activation);
        self.launch_product(&Factors { kind, x, weights, activation, out: dtype });
    }

    /// One launch for all factors.
    fn launch_product(&self, factors: &Factors<'_>) {
        let plan = factors.with_problem(factors.x.size(0), |problem| problem.plan(self.facts()));
        self.launch_as(&plan, factors.x.size(0), factors, |_| ());
    }

    /// Prepares activations and launches a kernel with parameters for `rows` rows, and what
    /// `push_others` has beside.
    pub(super) fn launch_as<'a>(
        &self,
        plan: &Plan,
        rows: usize,
        factors: &Factors<'a>,
        push_others: impl FnOnce(&mut Parameters<'a>),
    ) {
        let Some(Factor { weight, .. }) = factors.weights[0].as_ref() else { return };
        let (x, k) = (factors.x, factors.x.size(1));
        let mut scratch = self.product_room(x);
        let Scratch { x: prepared, x_scales, partial, arrived } = &mut *scratch;
        let operand = self.operand(factors.kind, x, prepared, x_scales);
        let mut parameters = Parameters { args: [KernelArg::null(); MAX_PARAMETERS], len: 0 };
        factors.weights.iter().for_each(|factor| parameters.push_factor(factor.as_ref()));
        // What the scratch memory holds is there until the launch, which this returns after.
        for pointer in [operand.x, operand.scales, pointer(partial), pointer(arrived)] {
            parameters.push(pointer.detached());
        }
        parameters.push(factors.activation.map_or(-1, activation_kind));
        let [scale_type, group_shift, groups] = scales_of(weight);
        let block_bytes = BLOCK_ROWS * weight.row_bytes();
        for size in
            [rows, k, operand.pitch, block_bytes, scale_type, group_shift, groups, plan.steps]
        {
            parameters.push(size);
        }
        for size in [plan.splits, plan.stages, element_type(factors.out)] {
            parameters.push(size);
        }
        push_others(&mut parameters);
        if let Some(panels) = plan.panels {
            parameters.push(panels);
        }
        self.launch(plan.kernel, plan.launch, &parameters.args[..parameters.len]);
    }

    /// Activations for the kernels, prepared in scratch memory where they must be.
    fn operand<'a>(
        &self,
        kind: Kind,
        x: View<'a>,
        prepared: &'a mut Option<Tensor>,
        scales: &'a mut Option<Tensor>,
    ) -> Operand<'a> {
        let (rows, k) = (x.size(0), x.size(1));
        let pitch = k.next_multiple_of(PITCH_ELEMENTS);
        if kind == Kind::Int8 {
            assert_eq!(x.dtype(), DType::BF16, "activations that become INT8");
            let to = [pointer(prepared), pointer(scales)];
            self.quantize_rows("quantize_rows_int8", to, x, pitch);
            return Operand { x: pointer(prepared), scales: pointer(scales), pitch };
        }
        if k.is_multiple_of(8) {
            return Operand { x: x.into(), scales: KernelArg::null(), pitch: 2 * k };
        }
        let launch = Launch::new(rows, PREPARE_THREADS);
        self.launch("pad_rows", launch, &[pointer(prepared), x.into(), k.into(), pitch.into()]);
        Operand { x: pointer(prepared), scales: KernelArg::null(), pitch: 2 * pitch }
    }

    /// Rows of bf16 as `[codes, scales]`, rows of codes `pitch` bytes apart.
    pub(super) fn quantize_rows(
        &self,
        kernel: &'static str,
        [codes, scales]: [KernelArg<'_>; 2],
        x: View<'_>,
        pitch: usize,
    ) {
        let launch = Launch::new(x.size(0), PREPARE_THREADS);
        self.launch(kernel, launch, &[codes, scales, x.into(), x.size(1).into(), pitch.into()]);
    }

    /// Dense weights that no other kernel takes.
    fn multiply_plainly(&self, x: View<'_>, projection: &mut Projection<'_>) {
        let Projection { out, weight, bias } = projection;
        let kernel = by_activation!(x.dtype(), "matmul_plain");
        let types = [weight.data.dtype(), bias.map_or(DType::F32, |b| b.dtype()), out.dtype()];
        let [weight_type, bias_type, out_type] = types.map(element_type);
        let (columns, k) = (weight.num_rows, weight.num_cols);
        let launch = Launch::new(columns.div_ceil(PLAIN_COLUMNS), 32 * PLAIN_COLUMNS);
        let (data, bias) = (&weight.data, *bias);
        self.launch(
            kernel,
            launch.by(x.size(0)),
            &args![out, x, data, bias, columns, k, weight_type, bias_type, out_type],
        );
    }
}

/// Where a scratch tensor lies.
pub(super) fn pointer(tensor: &mut Option<Tensor>) -> KernelArg<'_> {
    tensor.as_mut().map_or(KernelArg::null(), KernelArg::from)
}

/// Whether one kernel multiplies by both.
pub(super) fn are_alike(a: &PackedMatrix, b: &PackedMatrix) -> bool {
    let scales = |matrix: &PackedMatrix| {
        let quantized = matrix.quantized.as_ref()?;
        let has_zeros = quantized.zero_points.is_some();
        Some((quantized.grid, quantized.scales.dtype(), has_zeros))
    };
    a.format == b.format && a.data.dtype() == b.data.dtype() && scales(a) == scales(b)
}

/// `ElementType` of `product.cuh`.
pub(super) fn element_type(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
        other => panic!("a matmul of {other}"),
    }
}

/// `ActivationKind` of `activation.cuh`.
pub(super) fn activation_kind(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    }
}

/// Type of the scales, logarithm of the elements of a row that share one, scales of a row.
fn scales_of(weight: &PackedMatrix) -> [usize; 3] {
    let Some(quantized) = &weight.quantized else { return [0, 0, 0] };
    let (groups, group) = (quantized.scales.shape().sizes()[1], quantized.grid.cols);
    assert!(groups == 1 || group.is_power_of_two(), "groups of {group}: not a power of two");
    // One group takes a shift that leaves nothing of any column.
    let shift = if groups == 1 { 31 } else { group.ilog2() as usize };
    // Nobody asks for the type of a group's scales, and the bytes of MXFP4 have none.
    let scales = Some(quantized.scales.dtype()).filter(|dtype| dtype.is_float());
    [scales.map_or(0, element_type), shift, groups]
}
