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
const MAX_MODEL_LEN: usize = 4096;

fn scheduler(num_seqs: usize) -> Scheduler {
    Scheduler::new(SchedulerParams {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: PROMPT_LEN + num_seqs,
        max_model_len: MAX_MODEL_LEN,
        policy: SchedulingPolicy::Fcfs,
        block_size: 16,
        num_blocks: num_seqs * MAX_MODEL_LEN / 16,
        enable_prefix_caching: true,
        eos_token_ids: vec![2],
    })
}

fn request(number: usize) -> TokenizedRequest {
    TokenizedRequest {
        id: RequestId(format!("request-{number}").into()),
        prompt_token_ids: (0..PROMPT_LEN).map(|i| (number * 31 + i * 7) as u32 % 32_000).collect(),
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

/// All sequences running, each with about 1k tokens of context.
fn decoding(num_seqs: usize) -> Scheduler {
    let mut scheduler = scheduler(num_seqs);
    for number in 0..num_seqs {
        scheduler.admit(request(number)).expect("the pool is large enough");
    }
    loop {
        let batch = scheduler.plan();
        let all_decode = batch.num_tokens() == num_seqs && batch.sequences.len() == num_seqs;
        scheduler.commit(&batch, &answer(&batch));
        if all_decode {
            return scheduler;
        }
    }
}

fn decode_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler/decode_step");
    for num_seqs in [1, 64, 1024] {
        group.bench_function(BenchmarkId::from_parameter(num_seqs), |b| {
            b.iter_custom(|num_steps| time_steps(num_seqs, num_steps));
        });
    }
    group.finish();
}

/// Starts afresh now and then, off the clock, so that the context stays between 1k and 2k.
fn time_steps(num_seqs: usize, num_steps: u64) -> Duration {
    let mut elapsed = Duration::ZERO;
    let mut steps_left = num_steps;
    while steps_left > 0 {
        let mut scheduler = decoding(num_seqs);
        let results = vec![sampled(true); num_seqs];
        let num_steps = steps_left.min(PROMPT_LEN as u64);
        let start = Instant::now();
        for _ in 0..num_steps {
            let batch = scheduler.plan();
            black_box(scheduler.commit(&batch, &results));
        }
        elapsed += start.elapsed();
        steps_left -= num_steps;
    }
    elapsed
}

/// A request arrives, waits for its turn among others and is aborted.
fn admit_and_abort(c: &mut Criterion) {
    let mut scheduler = decoding(64);
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
