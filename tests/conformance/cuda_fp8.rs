//! Products of FP8 by FP8 on the SIMT machine, with a library of plain loops in place of cuBLASLt:
//! the whole path, launches and layouts included.
//!
//! The referee has the weights' values, and activations as one rounding to E4M3 per token leaves
//! them. What is allowed beyond f32 sums is two roundings to bf16 (the library's of sums alone,
//! ours of results), each of them half a step, at most 2^-8; where the output is f32, none.

use tokenmill::formats::{Format, PackedMatrix, RowQuantizer, fp8, quantize};
use tokenmill::ops::Ops;
use tokenmill::ops::args::*;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::ops::cuda::launcher::{DeviceFacts, KernelArg, Launch, Launcher};
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::{DType, Tensor};

use crate::cuda_matmul::{Device, assert_product, expected};
use crate::on_device::OnDevice;
use crate::shim::Shim;
use crate::shim::library::{HostLibrary, Skill};
use crate::support::*;

/// `(rows, columns, k)`: the fewest that the library takes, one block of columns and several, k of
/// half a step and of many, rows of no whole block of threads.
const SHAPES: [(usize, usize, usize); 4] =
    [(17, 16, 16), (70, 1040, 48), (33, 48, 1040), (300, 144, 96)];

fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
    let num_shapes = if wants_few_cases() { 2 } else { SHAPES.len() };
    SHAPES.into_iter().take(num_shapes)
}

fn with_library(skill: Skill) -> (Device, HostLibrary) {
    let library = HostLibrary::new(skill);
    let ops = CudaOps::new(Shim::new()).with_dense_products(Box::new(library.clone()));
    (Device { ops }, library)
}

/// Random weights under a scale per row, with no two scales alike.
fn matrix(rng: &mut Rng, [rows, cols]: [usize; 2]) -> PackedMatrix {
    let values = rng.floats(rows * cols);
    quantize(&fp8::PerRow, [rows, cols], 1, |row, to| {
        let size = 1.0 / (1.0 + row as f32 / 16.0);
        let values = &values[row * cols..][..cols];
        to.iter_mut().zip(values).for_each(|(to, value)| *to = value * size);
    })
}

/// The same twice: a matrix cannot be copied.
fn matrices(seed: u64, shape: [usize; 2]) -> [PackedMatrix; 2] {
    [(); 2].map(|()| matrix(&mut Rng::new(seed), shape))
}

/// What FP8 makes of each row: codes and scales.
fn codes(x: &Tensor) -> (Vec<u8>, Vec<f32>) {
    let k = x.shape().sizes()[1];
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in widened(x).chunks_exact(k) {
        let (mut of_row, mut scale) = (vec![0; k], [0.0]);
        fp8::PerRow.quantize_row(row, &mut of_row, &mut scale, &mut []);
        codes.extend(of_row);
        scales.extend(scale);
    }
    (codes, scales)
}

/// Activations after that.
fn rounded(x: &Tensor) -> Tensor {
    let (codes, scales) = codes(x);
    let k = x.shape().sizes()[1];
    let values = codes.iter().enumerate().map(|(i, code)| fp8::decode(*code) * scales[i / k]);
    Tensor::from_slice(&values.collect::<Vec<_>>(), x.shape())
}

/// Within the tolerance above of `sum + bias`; the library rounds the sum alone.
fn assert_scaled(what: &str, got: &[f32], sums: &[f32], bias: &[f32], (k, out): (usize, DType)) {
    let step = if out == DType::BF16 { 2f32.powi(-8) } else { 1e-6 };
    for (i, (got, sum)) in got.iter().zip(sums).enumerate() {
        let want = sum + bias[i % bias.len()];
        let allowed = 2e-6 + 2e-7 * k as f32 + step * (sum.abs() + want.abs());
        assert!((got - want).abs() <= allowed, "{what}: element {i} is {got}, expected {want}");
    }
}

/// Projections of two weights, one with a bias, by the library; and by our own kernels what has
/// too few rows for it.
pub fn check_products() {
    let (device, library) = with_library(Skill::Everything);
    for (seed, (rows, cols, k)) in shapes().enumerate() {
        let rng = &mut Rng::new(seed as u64);
        let x = rng.tensor(DType::BF16, [rows, k]);
        let bias = rng.tensor(FLOATS[seed % 3], [cols]);
        let placed_bias = device.place(&bias);
        let [weight, same] = matrices(seed as u64, [cols, k]);
        let arranged = device.ops.arrange(same).unwrap();
        assert_eq!(arranged.format, Format::Fp8Rows);
        for out in [DType::BF16, DType::F32] {
            let what = format!("{} {rows} x {cols} x {k} {out}", device.ops.name());
            let weights = [(&arranged, Some(&placed_bias)), (&arranged, None)];
            let got = device.products(&x, &weights, out, &what);
            let of_library = (DType::Fp8, [rows, cols, k]);
            assert_eq!(library.take_asked(), [of_library; 2], "{what}");
            let sums = expected(&rounded(&x), &weight, None);
            assert_scaled(&what, &got[0], &sums, &widened(&bias), (k, out));
            assert_scaled(&what, &got[1], &sums, &[0.0], (k, out));

            let few = cast(&widened(&x)[..16 * k], DType::BF16, [16, k]);
            let what = format!("{what}, 16 rows of them");
            let got = device.product(&few, &arranged, out, &what);
            assert_eq!(library.take_asked(), [], "{what}");
            assert_product(&what, &got, &expected(&few, &weight, None), Format::Fp8, (k, out));
        }
    }
}

/// What a library refuses is done by our own kernels, whose activations keep their precision: one
/// shape for each kind, the second with k cut over blocks.
pub fn check_refused() {
    let (device, library) = with_library(Skill::RefusesCodes);
    for (rows, cols, k) in [(9, 144, 208), (33, 64, 208), (66, 32, 2112), (257, 16, 64)] {
        let x = Rng::new(3).tensor(DType::BF16, [rows, k]);
        let [weight, same] = matrices(4, [cols, k]);
        let arranged = device.ops.arrange(same).unwrap();
        let what = format!("{} {rows} x {cols} x {k}, refused", device.ops.name());
        let got = device.product(&x, &arranged, DType::BF16, &what);
        assert_eq!(library.take_asked().len(), usize::from(rows > 16), "{what}");
        let want = expected(&x, &weight, None);
        assert_product(&what, &got, &want, Format::Fp8, (k, DType::BF16));
    }
}

/// A gated product is its two products, activated; also when the library refuses them.
pub fn check_gated() {
    for (skill, calls) in [(Skill::Everything, 2), (Skill::RefusesCodes, 3)] {
        let (device, library) = with_library(skill);
        let (rows, cols, k) = (37, 1040, 80);
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            let rng = &mut Rng::new(78);
            let x = rng.tensor(DType::BF16, [rows, k]);
            let biases = [DType::F32, DType::BF16].map(|dtype| rng.tensor(dtype, [cols]));
            let [gate_bias, up_bias] = biases.each_ref().map(|bias| device.place(bias));
            let [gate, up] = [5, 6]
                .map(|seed| matrix(&mut Rng::new(seed), [cols, k]))
                .map(|matrix| device.ops.arrange(matrix).unwrap());
            let what = format!("{} gated by {activation:?}, {skill:?}", device.ops.name());
            let weights = [(&gate, Some(&gate_bias)), (&up, Some(&up_bias))];
            let steps = device.products(&x, &weights, DType::BF16, &what);
            library.take_asked();
            let x = device.place(&x);
            let [mut out, mut a, mut b] = [(); 3].map(|()| device.empty(DType::BF16, [rows, cols]));
            device.ops.gated_matmul(GatedMatmulArgs {
                out: out.view_mut(),
                x: x.view(),
                gate: (&gate, Some(gate_bias.view())),
                up: (&up, Some(up_bias.view())),
                activation,
                scratch: [a.view_mut(), b.view_mut()],
            });
            assert_eq!(library.take_asked(), vec![(DType::Fp8, [rows, cols, k]); calls], "{what}");
            let [gate, up] = [0, 1].map(|i| Tensor::from_slice(&steps[i], [rows, cols]));
            let mut want = Guarded::poisoned([rows, cols]);
            ReferenceOps.gated_activation(GatedActivationArgs {
                out: want.view(),
                gate: gate.view(),
                up: up.view(),
                activation,
            });
            // As gated products of other formats.
            let tolerance = (1e-5, 2f32.powi(-8));
            assert_close(&what, &device.widened(&out, &what), &want.finish(&what), tolerance);
        }
    }
}

/// Codes and scales have the bits of `formats::fp8`, also of zeros and of very large and small rows.
pub fn check_codes() {
    let device = Device::new();
    for (rows, k) in [(5, 16), (3, 2064)] {
        let values = Rng::new(k as u64).floats(rows * k);
        let sizes = [1.0, 0.0, 1e30, 1e-30, 3e-3];
        let scaled = values.iter().enumerate().map(|(i, x)| x * sizes[i / k]);
        let x = cast(&scaled.collect::<Vec<_>>(), DType::BF16, [rows, k]);
        let (want, want_scales) = codes(&x);
        let launcher = device.ops.launcher();
        let placed = device.place(&x);
        let mut codes = launcher.allocate(DType::Fp8, [rows, k].into()).unwrap();
        let mut scales = launcher.allocate(DType::F32, [rows].into()).unwrap();
        let to = [KernelArg::from(&mut codes), KernelArg::from(&mut scales)];
        let arguments = [to[0], to[1], KernelArg::from(&placed), k.into(), k.into()];
        launcher.launch("quantize_rows_fp8", Launch::new(rows, 256), &arguments);
        let what = format!("{} codes of {rows} x {k}", device.ops.name());
        assert_same(&what, &device.widened(&scales, &what), &want_scales);
        let mut bytes = vec![0; rows * k];
        launcher.download(&mut bytes, codes.view());
        assert_eq!(bytes, want, "{what}");
    }
}

/// Dense products by the library, and gated ones, which it has no kernel for.
pub fn check_dense() {
    let (device, library) = with_library(Skill::NoCodes);
    let (rows, cols, k) = (21, 40, 72);
    for dtype in [DType::BF16, DType::F16] {
        let rng = &mut Rng::new(9);
        let x = rng.tensor(dtype, [rows, k]);
        let (weight, bias) = (rng.matrix(dtype, cols, k), rng.tensor(dtype, [cols]));
        let (placed, placed_bias) = (device.matrix(&weight), device.place(&bias));
        let what = format!("{} library {dtype}", device.ops.name());
        let got = device.products(&x, &[(&placed, Some(&placed_bias))], dtype, &what).remove(0);
        assert_eq!(library.take_asked(), [(dtype, [rows, cols, k])], "{what}");
        let want = expected(&x, &weight, Some(&bias));
        assert_product(&what, &got, &want, Format::Dense, (k, dtype));
    }
}

/// Rows of tables of FP8.
pub fn check_tables() {
    let token_ids = ids(&[3, 47, 0, 3]);
    for activations in [DType::BF16, DType::F16] {
        let (device, _) = with_library(Skill::Everything);
        let ops = OnDevice::of(device.ops, activations);
        for width in [16, 1040] {
            let [table, _] = matrices(2, [48, width]);
            let what = format!("{} from a table of {width}", ops.name());
            let run = |ops: &dyn Ops| {
                let mut out = Guarded::poisoned([4, width]);
                let token_ids = token_ids.view();
                ops.embed(EmbedArgs { out: out.view(), table: &table, token_ids });
                out.finish(&what)
            };
            assert_outputs(&ops, &what, &run(&ops), &run(&ReferenceOps), (0.0, 0.0));
        }
    }
}

/// A device with a library, for tables of cases of the host.
pub fn simt_with_library() -> OnDevice<Shim> {
    OnDevice::of(with_library(Skill::Everything).0.ops, DType::BF16)
}

/// Weights stay in blocks, and products as they are, where FP8 is not multiplied by FP8.
pub fn check_choice() {
    let on = |capability, skill: Option<Skill>| {
        let facts = DeviceFacts { compute_capability: capability, ..Shim::new().facts() };
        let ops = CudaOps::new(Shim::with_facts(facts));
        match skill {
            Some(skill) => ops.with_dense_products(Box::new(HostLibrary::new(skill))),
            None => ops,
        }
    };
    let arranged =
        |ops: &CudaOps<Shim>, shape| ops.arrange(matrix(&mut Rng::new(1), shape)).unwrap().format;
    let able = on((8, 9), Some(Skill::Everything));
    assert_eq!(arranged(&able, [32, 48]), Format::Fp8Rows);
    assert_eq!(arranged(&able, [40, 48]), Format::Fp8, "columns");
    assert_eq!(arranged(&able, [32, 40]), Format::Fp8, "k");
    let grouped = quantized(&mut Rng::new(1), 32, 256).pop().unwrap();
    assert_eq!(able.arrange(grouped.1).unwrap().format, Format::Fp8, "{}", grouped.0);
    for (capability, skill) in
        [((8, 6), Some(Skill::Everything)), ((9, 0), Some(Skill::NoCodes)), ((9, 0), None)]
    {
        let ops = on(capability, skill);
        assert_eq!(arranged(&ops, [32, 48]), Format::Fp8, "{capability:?} with {skill:?}");
        let [mut out, x, weight] =
            [DType::BF16, DType::Fp8, DType::Fp8].map(|dtype| ops.zeros(dtype, [16, 16].into()));
        let (out, x, weight) = (out.as_mut().unwrap(), x.unwrap(), weight.unwrap());
        assert!(!ops.multiply_codes(out.view_mut(), x.view(), weight.view()));
    }
    check_bytes(&able);
    let [mut out, x, weight] = [DType::U32, DType::I8, DType::I8].map(|dtype| {
        let none = on((9, 0), None);
        none.zeros(dtype, [16, 16].into()).unwrap()
    });
    let none = on((9, 0), None);
    assert!(!none.multiply_codes(out.view_mut(), x.view(), weight.view()), "without a library");
}

/// Bytes times bytes are a library's too, with sums of 32 bits.
fn check_bytes(ops: &CudaOps<Shim>) {
    let codes: Vec<i8> = (0..16 * 32).map(|i| (i * 7 % 255) as i8).collect();
    let place = |codes: &[i8]| ops.place(Tensor::from_slice(codes, [16, 32])).unwrap();
    let mut out = ops.zeros(DType::U32, [16, 16].into()).unwrap();
    let operand = place(&codes);
    assert!(ops.multiply_codes(out.view_mut(), operand.view(), operand.view()));
    let mut bytes = vec![0; out.size_bytes()];
    ops.download(&mut bytes, out.view());
    ops.synchronize().unwrap();
    let row = |row: usize| codes[32 * row..][..32].iter().map(|&code| i32::from(code));
    for (i, sum) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let expected: i32 = row(i / 16).zip(row(i % 16)).map(|(a, b)| a * b).sum();
        assert_eq!(i32::from_le_bytes(*sum), expected, "{i}");
    }
}
