//! Dense bf16 matmul at the shapes of a 0.5 B model.
//!
//! Every call takes the next of several copies of the weights, more than the caches hold, as a
//! step through a model's layers does. Beside criterion's times it prints GB/s of weights and
//! GFLOP/s of the best call.

use std::cell::Cell;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use tokenmill::config::CpuIsa;
use tokenmill::formats::{PackedMatrix, dense};
use tokenmill::ops::Ops;
use tokenmill::ops::args::{MatmulArgs, Projection};
use tokenmill::ops::cpu::CpuOps;
use tokenmill::tensor::{DType, Tensor};

/// `[out_features, in_features]`.
const SHAPES: [(usize, usize); 4] = [(4864, 896), (896, 4864), (896, 896), (32_768, 896)];
const ROWS: [usize; 5] = [1, 4, 16, 128, 512];
/// All copies of one matrix together.
const WEIGHTS_BYTES: usize = 400 << 20;

fn copies(cols: usize, k: usize) -> Vec<PackedMatrix> {
    let weights: Vec<half::bf16> =
        (0..cols * k).map(|i| half::bf16::from_f32((i % 97) as f32 / 97.0 - 0.5)).collect();
    let count = (WEIGHTS_BYTES / (2 * cols * k)).max(1);
    (0..count).map(|_| dense::pack(Tensor::from_slice(&weights, [cols, k]))).collect()
}

fn matmul(criterion: &mut Criterion) {
    let ops = CpuOps::new(None, CpuIsa::Auto).expect("the machine has a thread");
    println!("{}", ops.name());
    for (cols, k) in SHAPES {
        let weights = copies(cols, k);
        for rows in ROWS {
            let x = Tensor::from_slice(&vec![0.5f32; rows * k], [rows, k]);
            let mut out = Tensor::zeros(DType::F32, [rows, cols]);
            let (best, turn) = (Cell::new(Duration::MAX), Cell::new(0));
            criterion.bench_function(&format!("matmul {rows} x {cols} x {k} bf16"), |bencher| {
                bencher.iter(|| {
                    let weight = &weights[turn.get() % weights.len()];
                    turn.set(turn.get() + 1);
                    let start = Instant::now();
                    let (out, x) = (out.view_mut(), x.view());
                    ops.matmul(MatmulArgs {
                        x,
                        projections: vec![Projection { out, weight, bias: None }],
                    });
                    best.set(best.get().min(start.elapsed()));
                });
            });
            let seconds = best.get().as_secs_f64();
            println!(
                "    best {:.3} ms: {:.1} GB/s of weights, {:.1} GFLOP/s",
                seconds * 1e3,
                (2 * cols * k) as f64 / seconds / 1e9,
                (2 * rows * cols * k) as f64 / seconds / 1e9,
            );
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = matmul
}
criterion_main!(benches);
