//! Whole forward passes: decode steps and prefills of the bundled model and of real shapes.
//!
//! Criterion prints tokens per second. A step is executed again and again at the same
//! positions, so that its cost does not drift while it is measured. Real shapes have random
//! weights: `bench-0.5b` is Qwen2.5-0.5B's geometry with a vocabulary of 32,768, tied.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::config::{CacheConfig, CpuIsa, KvCacheDtype, SchedulerConfig, SchedulingPolicy};
use tokenmill::device::RankContext;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::ModelSpec;
use tokenmill::request::SamplingParams;
use tokenmill::runner::{MemoryPlan, ModelRunner, StepRunner};
use tokenmill::scheduler::batch::{ScheduledBatch, ScheduledSequence, SequenceId};
use tokenmill::weights::Loader;

const TINY: &str = include_str!("../models/tiny/config.json");

const BENCH_0_5B: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": true, "hidden_act": "silu", "use_sliding_window": false
}"#;

const BLOCK_SIZE: usize = 16;
const MAX_NUM_SEQS: usize = 64;
const MAX_CONTEXT: usize = 1024;

/// A runner with random weights of the shapes that `config_json` gives, and their bytes.
fn runner(config_json: &str) -> (ModelRunner, usize) {
    let spec = ModelSpec::from_config(config_json).expect("the config is supported");
    let cache = CacheConfig {
        memory_bytes: None,
        fraction: 0.4,
        block_size: BLOCK_SIZE,
        dtype: KvCacheDtype::Auto,
        enable_prefix_caching: false,
        threads: None,
        cpu_isa: CpuIsa::Auto,
    };
    let scheduler = SchedulerConfig {
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: 1024,
        max_num_queued_requests: 1,
        policy: SchedulingPolicy::Fcfs,
    };
    let expected = spec.expected_tensors();
    let weights_bytes = expected.iter().map(|t| 2 * t.shape.iter().product::<usize>()).sum();
    let mut plan = MemoryPlan::new(&spec, weights_bytes, None, &cache, &scheduler, 8 << 30)
        .expect("the machine has room");
    plan.num_blocks = MAX_NUM_SEQS * MAX_CONTEXT / BLOCK_SIZE;
    let rank = RankContext::cpu(&cache).expect("this machine has a CPU");
    let source = DummySource::new(expected, spec.dtype);
    let decoder =
        Decoder::load(&spec, &Loader::new(&source), MAX_CONTEXT).expect("dummy weights fit");
    (ModelRunner::new(decoder, &spec, rank, &plan), weights_bytes)
}

/// `num_seqs` sequences that each compute the last `num_tokens` of `context_len` tokens.
fn batch(num_seqs: usize, num_tokens: usize, context_len: usize) -> ScheduledBatch {
    let params = Arc::new(SamplingParams::greedy());
    let blocks_per_seq = context_len.div_ceil(BLOCK_SIZE);
    let sequence = |i: usize| ScheduledSequence {
        id: SequenceId(i as u64),
        tokens: i * num_tokens..(i + 1) * num_tokens,
        blocks: i * blocks_per_seq..(i + 1) * blocks_per_seq,
        start_position: (context_len - num_tokens) as u32,
        samples: true,
        scores: 0..0,
        params: Arc::clone(&params),
        seed: 0,
        prompt_history: 0..0,
        output_history: 0..0,
        banned: 0..0,
    };
    ScheduledBatch {
        sequences: (0..num_seqs).map(sequence).collect(),
        token_ids: (0..num_seqs * num_tokens).map(|i| (i * 7 % 4000) as u32).collect(),
        block_ids: (0..(num_seqs * blocks_per_seq) as u32).collect(),
        ..ScheduledBatch::default()
    }
}

fn bench_model(c: &mut Criterion, name: &str, config_json: &str) {
    let (mut runner, weights_bytes) = runner(config_json);
    println!("{name}: {:.1} MB of weights", weights_bytes as f64 / 1e6);
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(4));
    for num_seqs in [1, 16, 64] {
        let batch = batch(num_seqs, 1, 256);
        group.throughput(Throughput::Elements(num_seqs as u64));
        group.bench_function(BenchmarkId::new("decode at context 256, batch", num_seqs), |b| {
            b.iter(|| runner.execute(black_box(&batch)).expect("the step succeeds"));
        });
    }
    for prompt_len in [128, 1024] {
        let batch = batch(1, prompt_len, prompt_len);
        group.throughput(Throughput::Elements(prompt_len as u64));
        group.bench_function(BenchmarkId::new("prefill", prompt_len), |b| {
            b.iter(|| runner.execute(black_box(&batch)).expect("the step succeeds"));
        });
    }
    group.finish();
}

fn forward_passes(c: &mut Criterion) {
    bench_model(c, "tiny", TINY);
    bench_model(c, "bench-0.5b", BENCH_0_5B);
}

criterion_group!(benches, forward_passes);
criterion_main!(benches);
