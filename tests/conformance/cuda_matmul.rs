//! Matmul kernels on the SIMT machine: every format and every kernel against the referee, what is
//! promised about bits, fused products against their steps.
//!
//! Weights that are stored shorter than the activations (W4A16, W8A16, Q8_0, FP8) have the dense
//! product with their dequantized rows as referee; INT8 has the product of codes, bit for bit.

use half::{bf16, f16};
use tokenmill::formats::{Format, PackedMatrix, Quantized, dense};
use tokenmill::ops::args::*;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::ops::cuda::launcher::{DeviceFacts, Launcher};
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::ops::{Ops, StepLimits};
use tokenmill::tensor::{DType, Tensor};

use crate::shim::Shim;
use crate::support::*;

/// `(rows, columns, k)`: every kernel, with tails in every axis, k that no group divides, and k
/// that is split over blocks.
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 65, 130),
    (2, 63, 64),
    (3, 31, 95),
    (9, 130, 200),
    (15, 63, 300),
    (16, 65, 128),
    (17, 33, 31),
    (33, 65, 200),
    (18, 63, 1100),
    (64, 1, 72),
    (70, 65, 136),
    (66, 20, 2100),
    (257, 16, 64),
];

/// One for each kind of kernel, the third with k cut over blocks, the last with rows of no whole
/// sixteen bytes.
const FEW_SHAPES: [(usize, usize, usize); 4] =
    [(9, 130, 200), (33, 65, 200), (66, 20, 2104), (3, 31, 95)];

fn shapes() -> impl Iterator<Item = (usize, (usize, usize, usize))> {
    let shapes = if wants_few_cases() { &FEW_SHAPES[..] } else { &SHAPES };
    shapes.iter().copied().enumerate()
}

/// Kernels on the SIMT machine, which runs them on tensors that this places in its memory.
pub struct Device {
    pub ops: CudaOps<Shim>,
}

impl Device {
    pub fn new() -> Device {
        Device { ops: CudaOps::new(Shim::new()) }
    }

    /// With the shared memory of a consumer card.
    fn small() -> Device {
        let facts = Shim::new().facts();
        let facts = DeviceFacts { shared_bytes_per_block: 99 << 10, ..facts };
        Device { ops: CudaOps::new(Shim::with_facts(facts)) }
    }

    pub fn place(&self, tensor: &Tensor) -> Tensor {
        self.ops.place(tensor.to_owned_memory()).unwrap()
    }

    /// The matrix as it is, on the device.
    pub fn matrix(&self, matrix: &PackedMatrix) -> PackedMatrix {
        let quantized = matrix.quantized.as_ref().map(|quantized| Quantized {
            grid: quantized.grid,
            scales: self.place(&quantized.scales),
            zero_points: quantized.zero_points.as_ref().map(|zeros| self.place(zeros)),
        });
        PackedMatrix { data: self.place(&matrix.data), quantized, ..*matrix }
    }

    pub fn empty(&self, dtype: DType, shape: [usize; 2]) -> Tensor {
        self.ops.launcher().allocate(dtype, shape.into()).unwrap()
    }

    /// The elements of an output, widened; panics when one was not written.
    pub fn widened(&self, tensor: &Tensor, what: &str) -> Vec<f32> {
        let failure = self.ops.launcher().synchronize();
        failure.unwrap_or_else(|error| panic!("{}: {what}: {error}", self.ops.name()));
        let mut bytes = vec![0; tensor.size_bytes()];
        self.ops.launcher().download(&mut bytes, tensor.view());
        let words = bytes.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
        let out: Vec<f32> = match tensor.dtype() {
            DType::BF16 => words.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            DType::F16 => words.map(|bits| f16::from_bits(bits).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
        };
        assert!(out.iter().all(|x| !x.is_nan()), "{what}: an element was not written, or is NaN");
        out
    }

    /// Products of the same activations with all weights, in one operation.
    pub fn products(
        &self,
        x: &Tensor,
        weights: &[(&PackedMatrix, Option<&Tensor>)],
        out: DType,
        what: &str,
    ) -> Vec<Vec<f32>> {
        let x = self.place(x);
        let rows = x.shape().sizes()[0];
        let mut outs: Vec<Tensor> =
            weights.iter().map(|(w, _)| self.empty(out, [rows, w.num_rows])).collect();
        let mut projections = Vec::new();
        for (out, &(weight, bias)) in outs.iter_mut().zip(weights) {
            let bias = bias.map(Tensor::view);
            projections.push(Projection { out: out.view_mut(), weight, bias });
        }
        self.ops.matmul(MatmulArgs { x: x.view(), projections });
        outs.iter().map(|out| self.widened(out, what)).collect()
    }

    pub fn product(&self, x: &Tensor, weight: &PackedMatrix, out: DType, what: &str) -> Vec<f32> {
        self.products(x, &[(weight, None)], out, what).remove(0)
    }
}

/// Every quantized format, and bf16.
fn weights(rng: &mut Rng, cols: usize, k: usize) -> Vec<(&'static str, PackedMatrix)> {
    let mut weights = quantized(rng, cols, k);
    weights.retain(|(_, weight)| weight.format.is_in_blocks());
    weights.push(("bf16", rng.matrix(DType::BF16, cols, k)));
    weights
}

/// f32 results of the referee for activations that the device holds exactly.
pub fn expected(x: &Tensor, weight: &PackedMatrix, bias: Option<&Tensor>) -> Vec<f32> {
    let rows = x.shape().sizes()[0];
    let x = cast(&widened(x), DType::F32, x.shape());
    let values: Vec<f32> = (0..weight.num_rows).flat_map(|row| weight.row(row)).collect();
    let dense = dense::pack(Tensor::from_slice(&values, [weight.num_rows, weight.num_cols]));
    let weight = if weight.format == Format::Int8 { weight } else { &dense };
    let mut out = Guarded::poisoned([rows, weight.num_rows]);
    let bias = bias.map(Tensor::view);
    let projections = vec![Projection { out: out.view(), weight, bias }];
    ReferenceOps.matmul(MatmulArgs { x: x.view(), projections });
    out.finish("referee")
}

/// Panics unless results are the referee's: INT8's are in every bit, once rounded to the output's
/// dtype. Elsewhere codes and products are exact, and f32 adds up k products below 2.
pub fn assert_product(
    what: &str,
    got: &[f32],
    want: &[f32],
    format: Format,
    (k, out): (usize, DType),
) {
    if format == Format::Int8 {
        return assert_same(what, got, &widened(&cast(want, out, [want.len()])));
    }
    let sums = 2e-6 + 2e-7 * k as f32;
    let tolerance = match out {
        DType::BF16 => (sums, 2f32.powi(-8)),
        DType::F16 => (sums + 2f32.powi(-25), 2f32.powi(-11)),
        _ => (sums, 1e-6),
    };
    assert_close(what, got, want, tolerance);
}

pub fn check() {
    let device = Device::new();
    for (seed, (rows, cols, k)) in shapes() {
        let rng = &mut Rng::new(seed as u64);
        let x = rng.tensor(DType::BF16, [rows, k]);
        let bias = rng.tensor(FLOATS[seed % 3], [cols]);
        let bias = (seed % 2 == 0).then_some(&bias);
        let placed_bias = bias.map(|bias| device.place(bias));
        for (name, weight) in weights(rng, cols, k) {
            let out = if seed % 3 == 1 { DType::F32 } else { DType::BF16 };
            let what = format!("{} {rows} x {cols} x {k} {name} {out}", device.ops.name());
            let placed = device.matrix(&weight);
            let got = device.products(&x, &[(&placed, placed_bias.as_ref())], out, &what).remove(0);
            let want = expected(&x, &weight, bias);
            assert_product(&what, &got, &want, weight.format, (k, out));
        }
    }
}

/// Dense matrices of all dtypes, as they are arranged at load and as they are, with activations
/// of bf16 and f16.
pub fn check_dense() {
    let device = Device::small();
    for (seed, (rows, cols, k)) in shapes() {
        for dtype in FLOATS {
            let rng = &mut Rng::new(seed as u64);
            let weight = rng.matrix(dtype, cols, k);
            let values: Vec<f32> = (0..cols).flat_map(|row| weight.row(row)).collect();
            let what = format!("{} {rows} x {cols} x {k} {dtype}", device.ops.name());

            // What is no bf16 is rounded to it at load.
            let x = rng.tensor(DType::BF16, [rows, k]);
            let arranged = dense::pack(weight.data.to_owned_memory());
            let arranged = device.ops.arrange(arranged).unwrap();
            assert_eq!(arranged.size_bytes(), device.ops.arranged_bytes(dtype, [cols, k]));
            let rounded = dense::pack(cast(&values, DType::BF16, [cols, k]));
            let got = device.product(&x, &arranged, DType::F32, &what);
            let want = expected(&x, &rounded, None);
            assert_product(&what, &got, &want, Format::Dense, (k, DType::F32));

            let x = rng.tensor(DType::F16, [rows, k]);
            let got = device.product(&x, &device.matrix(&weight), DType::F16, &what);
            let want = expected(&x, &weight, None);
            assert_product(&what, &got, &want, Format::Dense, (k, DType::F16));
        }
    }
}

/// A row has the same bits whatever stands beside it, as long as the number of rows stays in one
/// line of the table in `product.rs`; INT8 has the same bits in all.
pub fn check_invariance() {
    let device = Device::new();
    let (cols, k, most) = (50, 1160, 257);
    let rng = &mut Rng::new(21);
    let x = rng.tensor(DType::BF16, [most, k]);
    for (name, weight) in weights(rng, cols, k) {
        let weight = device.matrix(&weight);
        let first = |rows: usize| {
            let values = &widened(&x)[..rows * k];
            let what = format!("{} {rows} rows of {name}", device.ops.name());
            (
                device.product(&cast(values, DType::BF16, [rows, k]), &weight, DType::F32, &what),
                what,
            )
        };
        let lines: [&[usize]; 3] = [&[1, 2, 8, 9, 16], &[17, 33, 64], &[65, 130]];
        let mut int8 = Vec::new();
        for line in lines {
            let (fewest, _) = first(line[0]);
            for &rows in &line[1..] {
                let (batched, what) = first(rows);
                assert_same(&what, &batched[..fewest.len()], &fewest);
            }
            if weight.format == Format::Int8 {
                assert_same(name, &fewest[..int8.len()], &int8);
                int8 = fewest;
            }
        }
    }
}

/// Projections of one operation equal projections one by one, whatever their formats; neighbours
/// of one format are one launch.
pub fn check_projections() {
    let device = Device::new();
    let rng = &mut Rng::new(77);
    let k = 192;
    let mut all = Vec::new();
    for cols in [70, 16, 33, 40] {
        all.push(rng.matrix(DType::BF16, cols, k));
    }
    for _ in 0..2 {
        all.extend(weights(rng, 50, k).into_iter().map(|(_, weight)| weight));
    }
    all.sort_by_key(|weight| format!("{:?}", weight.format));
    let all: Vec<PackedMatrix> = all.iter().map(|weight| device.matrix(weight)).collect();
    let biases: Vec<Tensor> =
        all.iter().map(|w| device.place(&rng.tensor(DType::F32, [w.num_rows]))).collect();
    for rows in [2, 19, 66] {
        let x = rng.tensor(DType::BF16, [rows, k]);
        let weights: Vec<_> = all.iter().zip(&biases).map(|(w, bias)| (w, Some(bias))).collect();
        let what = format!("{} projections of {rows} rows", device.ops.name());
        let together = device.products(&x, &weights, DType::BF16, &what);
        for (weight, together) in weights.into_iter().zip(together) {
            let alone = device.products(&x, &[weight], DType::BF16, &what).remove(0);
            assert_same(&format!("{what} {:?}", weight.0.format), &together, &alone);
        }
    }
}

/// A gated product in one launch has the bits of its products, activated on their own.
pub fn check_gated() {
    let device = Device::new();
    let rng = &mut Rng::new(78);
    let k = 128;
    let activations = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];
    let shapes = [(16, 16), (1, 70), (20, 33), (66, 48)];
    let num_shapes = if wants_few_cases() { 1 } else { shapes.len() };
    for (case, (rows, cols)) in shapes.into_iter().take(num_shapes).enumerate() {
        let x = rng.tensor(DType::BF16, [rows, k]);
        let bias = rng.tensor(DType::F32, [cols]);
        let (gates, ups) = (weights(rng, cols, k), weights(rng, cols, k));
        for (i, ((name, gate), (_, up))) in gates.iter().zip(&ups).enumerate() {
            let activation = activations[(case + i) % 3];
            let what = format!("{} gated {rows} x {cols} {name}", device.ops.name());
            let (gate, up) = (device.matrix(gate), device.matrix(up));
            let bias = device.place(&bias);
            let steps =
                device.products(&x, &[(&gate, Some(&bias)), (&up, None)], DType::BF16, &what);
            let x = device.place(&x);
            let [mut out, mut a, mut b] = [(); 3].map(|()| device.empty(DType::BF16, [rows, cols]));
            device.ops.gated_matmul(GatedMatmulArgs {
                out: out.view_mut(),
                x: x.view(),
                gate: (&gate, Some(bias.view())),
                up: (&up, None),
                activation,
                scratch: [a.view_mut(), b.view_mut()],
            });
            let [gate, up] = [0, 1].map(|i| Tensor::from_slice(&steps[i], [rows, cols]));
            let mut want = Guarded::poisoned([rows, cols]);
            ReferenceOps.gated_activation(GatedActivationArgs {
                out: want.view(),
                gate: gate.view(),
                up: up.view(),
                activation,
            });
            // Five below 0 the referee's GELU is a difference of numbers near 1.
            let tolerance = (1e-5, 2f32.powi(-8));
            assert_close(&what, &device.widened(&out, &what), &want.finish(&what), tolerance);
        }
    }
}

/// After `reserve` no product takes memory, and what is announced is what is taken.
pub fn check_scratch() {
    let device = Device::new();
    let limits = StepLimits {
        max_num_tokens: 300,
        max_num_seqs: 4,
        max_context_len: 64,
        max_width: 256,
        num_heads: 4,
        head_dim: 32,
        max_logit_rows: 4,
        vocab_size: 64,
        hidden_size: 0,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    };
    let free = || device.ops.device_memory().unwrap().unwrap().free;
    let before = free();
    device.ops.reserve(&limits).unwrap();
    assert_eq!(before - free(), device.ops.scratch_bytes(&limits) as u64);
    let rng = &mut Rng::new(5);
    let x = device.place(&rng.tensor(DType::BF16, [300, 250]));
    let mut out = device.empty(DType::BF16, [300, 40]);
    let [(_, weight), ..] = &quantized(rng, 40, 250)[..] else { panic!("INT8 is first") };
    let weight = device.matrix(weight);
    let before = free();
    for rows in [300, 1, 60, 200] {
        let (x, out) = (x.rows(rows), out.rows_mut(rows));
        let projections = vec![Projection { out, weight: &weight, bias: None }];
        device.ops.matmul(MatmulArgs { x, projections });
    }
    assert_eq!(free(), before);
}
