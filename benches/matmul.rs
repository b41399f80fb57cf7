//! Matmuls and gated MLPs in every format, at the shapes of a 0.5 B model.
//!
//! Every call takes the next of several copies of the weights, more than the caches hold, as a
//! step through a model's layers does. Beside criterion's times it prints the best call: on a
//! machine with neighbours, short calls hit undisturbed moments and means do not. Each line ends
//! with the fraction of what bounds it: the memory's limit, or that of the arithmetic which multiplies
//! the format, read at the start in the same way. `machine` says which variables choose threads and
//! instructions.

mod machine;

use std::cell::Cell;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use machine::Limits;
use tokenmill::formats::{PackedMatrix, dense, fp8, int4, int8, mxfp4, q8, quantize};
use tokenmill::ops::Ops;
use tokenmill::ops::args::{Activation, GatedMatmulArgs, GatedMlpArgs, MatmulArgs, Projection};
use tokenmill::ops::cpu::CpuOps;
use tokenmill::tensor::{DType, Tensor};

const HIDDEN: usize = 896;
const INTERMEDIATE: usize = 4864;
/// `[out_features, in_features]`.
const SHAPES: [(usize, usize); 4] =
    [(INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (HIDDEN, HIDDEN), (32_768, HIDDEN)];
const ROWS: [usize; 5] = [1, 16, 64, 256, 1024];
const FORMATS: [&str; 7] = ["bf16", "int8", "int4", "mxfp4", "q8_0", "w8a16", "fp8"];
/// All copies of one matrix together.
const WEIGHTS_BYTES: usize = 400 << 20;

fn matrix(ops: &CpuOps, format: &str, cols: usize, k: usize) -> PackedMatrix {
    let value = |row: usize, at: usize| ((row * k + at) % 97) as f32 / 97.0 - 0.5;
    let read = |row: usize, to: &mut [f32]| {
        to.iter_mut().enumerate().for_each(|(at, to)| *to = value(row, at));
    };
    let (shape, threads) = ([cols, k], ops.threads());
    match format {
        "int8" => quantize(&int8::PerRow, shape, threads, read),
        "int4" => quantize(&int4::Grouped(32), shape, threads, read),
        "mxfp4" => quantize(&mxfp4::Mxfp4, shape, threads, read),
        "q8_0" => quantize(&q8::Q8_0, shape, threads, read),
        "w8a16" => quantize(&q8::W8A16, shape, threads, read),
        "fp8" => quantize(&fp8::PerRow, shape, threads, read),
        _ => {
            let values = (0..cols * k).map(|i| half::bf16::from_f32(value(i / k, i % k)));
            let weights = Tensor::from_slice(&values.collect::<Vec<_>>(), shape);
            ops.arrange(dense::pack(weights)).expect("bf16 is supported")
        }
    }
}

/// As many of them as caches cannot hold.
fn copies(ops: &CpuOps, format: &str, (cols, k): (usize, usize)) -> Vec<PackedMatrix> {
    let first = matrix(ops, format, cols, k);
    let count = (WEIGHTS_BYTES / first.size_bytes()).max(2);
    let rest = (1..count).map(|_| matrix(ops, format, cols, k));
    std::iter::once(first).chain(rest.collect::<Vec<_>>()).collect()
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    ops: CpuOps,
    limits: Limits,
    /// Cases that the command line's filter leaves out are not even prepared.
    filter: String,
}

impl Bench<'_> {
    /// Times calls, which are told how many were before.
    fn time(&mut self, name: &str, limit: f64, flops: usize, mut call: impl FnMut(&CpuOps, usize)) {
        let (best, turn) = (Cell::new(Duration::MAX), Cell::new(0));
        let ops = &self.ops;
        self.criterion.bench_function(name, |bencher| {
            bencher.iter(|| {
                turn.set(turn.get() + 1);
                let start = Instant::now();
                call(ops, turn.get());
                best.set(best.get().min(start.elapsed()));
            });
        });
        let seconds = best.get().as_secs_f64();
        println!(
            "    best {:.3} ms: {:.1} GFLOP/s, {:.0} % of the limit",
            seconds * 1e3,
            flops as f64 / seconds / 1e9,
            limit / seconds * 100.0,
        );
    }

    fn is_wanted(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    fn matmuls(&mut self, format: &str, (cols, k): (usize, usize)) {
        let name = |rows: usize| format!("matmul {rows} x {cols} x {k} {format}");
        if !ROWS.iter().any(|&rows| self.is_wanted(&name(rows))) {
            return;
        }
        let weights = copies(&self.ops, format, (cols, k));
        for rows in ROWS {
            if !self.is_wanted(&name(rows)) {
                continue;
            }
            let x = Tensor::from_slice(&vec![0.5f32; rows * k], [rows, k]);
            let mut out = Tensor::zeros(DType::F32, [rows, cols]);
            let flops = 2 * rows * cols * k;
            let limit = self.limits.seconds(format, weights[0].size_bytes(), flops);
            self.time(&name(rows), limit, flops, |ops, turn| {
                let weight = &weights[turn % weights.len()];
                let projections = vec![Projection { out: out.view_mut(), weight, bias: None }];
                ops.matmul(MatmulArgs { x: x.view(), projections });
            });
        }
    }

    fn mlps(&mut self, format: &str) {
        let name = |rows: usize| format!("mlp {rows} x {INTERMEDIATE} x {HIDDEN} {format}");
        if !ROWS.iter().any(|&rows| self.is_wanted(&name(rows))) {
            return;
        }
        let inner = copies(&self.ops, format, (INTERMEDIATE, HIDDEN));
        let outer = copies(&self.ops, format, (HIDDEN, INTERMEDIATE));
        for rows in ROWS {
            if !self.is_wanted(&name(rows)) {
                continue;
            }
            let x = Tensor::from_slice(&vec![0.5f32; rows * HIDDEN], [rows, HIDDEN]);
            let mut wide: [Tensor; 3] =
                std::array::from_fn(|_| Tensor::zeros(DType::F32, [rows, INTERMEDIATE]));
            let mut out = Tensor::zeros(DType::F32, [rows, HIDDEN]);
            let flops = 2 * rows * 3 * HIDDEN * INTERMEDIATE;
            let limit = self.limits.seconds(format, 3 * inner[0].size_bytes(), flops);
            self.time(&name(rows), limit, flops, |ops, turn| {
                let pair = 2 * turn % (inner.len() - 1);
                let [between, a, b] = &mut wide;
                let gated = GatedMatmulArgs {
                    out: between.view_mut(),
                    x: x.view(),
                    gate: (&inner[pair], None),
                    up: (&inner[pair + 1], None),
                    activation: Activation::Silu,
                    scratch: [a.view_mut(), b.view_mut()],
                };
                let weight = &outer[turn % outer.len()];
                let down = Projection { out: out.view_mut(), weight, bias: None };
                ops.gated_mlp(GatedMlpArgs { gated, down });
            });
        }
    }
}

fn products(criterion: &mut Criterion) {
    let device = machine::device();
    let ops = CpuOps::new(device.threads, device.cpu_isa).expect("the machine has what was asked");
    println!("{}", ops.name());
    let limits = Limits::read(&device);
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let mut bench = Bench { criterion, ops, limits, filter };
    for format in FORMATS {
        SHAPES.into_iter().for_each(|shape| bench.matmuls(format, shape));
        bench.mlps(format);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = products
}
criterion_main!(benches);
