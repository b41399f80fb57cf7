//! The sampler over a vocabulary of 32,768: greedy, top-p, top-k and top-p, log-probabilities.
//!
//! A backend may overwrite logits, so every call is given fresh ones; making them is not timed.

use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tokenmill::config::CpuIsa;
use tokenmill::ops::Ops;
use tokenmill::ops::args::{RowTask, SampleArgs, SampleRow};
use tokenmill::ops::cpu::CpuOps;
use tokenmill::request::SamplingParams;
use tokenmill::tensor::ViewMut;

const VOCAB: usize = 32_768;

/// A few likely tokens above a broad floor, as a language model gives them.
fn logits(rows: usize) -> Vec<f32> {
    let spread = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 65_536.0;
    (0..rows * VOCAB).map(|i| 5.0 * spread(i) + 10.0 * spread(i / 3).powi(30)).collect()
}

fn sampler(criterion: &mut Criterion) {
    let ops = CpuOps::new(None, CpuIsa::Auto).expect("the machine has a thread");
    println!("{}", ops.name());
    let plain = SamplingParams::default;
    let cases = [
        ("greedy", SamplingParams::greedy()),
        ("temperature", SamplingParams { temperature: 0.8, ..plain() }),
        ("top-p", SamplingParams { top_p: 0.9, ..plain() }),
        ("top-k, top-p", SamplingParams { top_k: 50, top_p: 0.9, ..plain() }),
        ("greedy, 5 logprobs", SamplingParams { logprobs: Some(5), ..SamplingParams::greedy() }),
    ];
    for (name, params) in &cases {
        for num_rows in [1, 64, 256] {
            let fresh = logits(num_rows);
            let row = |i: usize| SampleRow {
                task: RowTask::Sample,
                params,
                seed: 1,
                position: i as u32,
                seen: &[],
                banned_token_ids: &[],
                bitmask: None,
            };
            let rows: Vec<SampleRow<'_>> = (0..num_rows).map(row).collect();
            criterion.bench_function(&format!("sample {name}, {num_rows} rows"), |bencher| {
                bencher.iter_batched_ref(
                    || fresh.clone(),
                    |logits| {
                        let logits = ViewMut::of(logits, [num_rows, VOCAB]);
                        ops.sample(SampleArgs { logits, rows: &rows })
                    },
                    BatchSize::LargeInput,
                );
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = sampler
}
criterion_main!(benches);
