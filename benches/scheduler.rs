//! What bookkeeping costs per step, without any compute: plan and commit of steady decoding.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

use tokenmill::config::SchedulingPolicy;
use tokenmill::output::SampledToken;
use tokenmill::request::{RequestId, SamplingParams, StopConditions, TokenizedRequest};
use tokenmill::scheduler::batch::{ScheduledBatch, StepTokens};
use tokenmill::scheduler::{Scheduler, SchedulerParams};

const PROMPT_LEN: usize = 1024;
const MAX_MODEL_LEN: usize = 2048;
const BLOCK_SIZE: usize = 16;

fn scheduler(num_seqs: usize) -> Scheduler {
    Scheduler::new(SchedulerParams {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: 2 * PROMPT_LEN * num_seqs,
        max_model_len: MAX_MODEL_LEN,
        policy: SchedulingPolicy::Fcfs,
        block_size: BLOCK_SIZE,
        num_blocks: num_seqs * MAX_MODEL_LEN / BLOCK_SIZE,
        enable_prefix_caching: true,
        eos_token_ids: vec![2],
    })
}

fn request(number: usize) -> TokenizedRequest {
    // Lengths differ, so that not all sequences need a new block in the same step.
    let prompt_len = PROMPT_LEN + number % BLOCK_SIZE;
    TokenizedRequest {
        id: RequestId(format!("request-{number}").into()),
        prompt_token_ids: (0..prompt_len).map(|i| (number * 31 + i * 7) as u32 % 32_000).collect(),
        sampling: Arc::new(SamplingParams::greedy()),
        stop: StopConditions::default(),
        n: 1,
        priority: 0,
        cache_salt: None,
    }
}

fn sampled(samples: bool) -> StepTokens {
    let token = SampledToken { token_id: 77, logprobs: None };
    StepTokens { sampled: if samples { vec![token] } else { Vec::new() }, scores: Vec::new() }
}

fn answer(batch: &ScheduledBatch) -> Vec<StepTokens> {
    batch.sequences.iter().map(|seq| sampled(seq.samples)).collect()
}

/// Sequences that all decode, each with 1k to 1.5k tokens of context.
struct Decoding {
    scheduler: Scheduler,
    results: Vec<StepTokens>,
    steps_left: usize,
}

impl Decoding {
    fn new(num_seqs: usize) -> Decoding {
        let mut scheduler = scheduler(num_seqs);
        for number in 0..num_seqs {
            scheduler.admit(request(number)).expect("the pool is large enough");
        }
        let batch = scheduler.plan();
        scheduler.commit(&batch, answer(&batch));
        Decoding { scheduler, results: vec![sampled(true); num_seqs], steps_left: 512 }
    }

    /// Starts afresh when contexts have become too long, off the clock.
    fn time(&mut self, num_steps: u64) -> Duration {
        let mut elapsed = Duration::ZERO;
        for _ in 0..num_steps {
            if self.steps_left == 0 {
                *self = Decoding::new(self.results.len());
            }
            self.steps_left -= 1;
            let results = self.results.clone();
            let start = Instant::now();
            let batch = self.scheduler.plan();
            let events = black_box(self.scheduler.commit(&batch, results));
            drop(black_box(batch));
            elapsed += start.elapsed();
            // Events end their lives in the clients' tasks.
            drop(events);
        }
        elapsed
    }
}

fn decode_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler/decode_step");
    for num_seqs in [1, 64, 1024] {
        let mut decoding = Decoding::new(num_seqs);
        group.bench_function(BenchmarkId::from_parameter(num_seqs), |b| {
            b.iter_custom(|num_steps| decoding.time(num_steps));
        });
    }
    group.finish();
}

/// A request arrives, waits for its turn among others and is aborted.
fn admit_and_abort(c: &mut Criterion) {
    let Decoding { mut scheduler, .. } = Decoding::new(64);
    for number in 0..1024 {
        scheduler.admit(request(1000 + number)).expect("the pool is large enough");
    }
    let newcomer = request(5000);
    c.bench_function("scheduler/admit_and_abort", |b| {
        b.iter(|| {
            scheduler.admit(newcomer.clone()).expect("the pool is large enough");
            scheduler.abort(&newcomer.id, None)
        });
    });
}

criterion_group!(benches, decode_step, admit_and_abort);
criterion_main!(benches);
