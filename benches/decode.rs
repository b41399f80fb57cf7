//! Whole forward passes: decode steps and prefills of the bundled model and of real shapes.
//!
//! Criterion prints tokens per second; beside them stand, of the best step, bytes that it must read and
//! operations that it must do per second, and the fraction of what bounds it, read at the start. A step
//! is executed again and again at the same positions, so that its cost does not drift while it is
//! measured. Real shapes have random weights: `bench-0.5b` is Qwen2.5-0.5B's geometry and `bench-1b`
//! Llama-3.2-1B's, both with a tied vocabulary of 32,768. `machine` says which variables choose threads
//! and instructions.

mod machine;

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use machine::Limits;
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::cli::bench::steps::{StepCost, prompt_flops, uniform_batch};
use tokenmill::config::{
    CacheConfig, KvCacheDtype, Quantization, SchedulerConfig, SchedulingPolicy,
};
use tokenmill::device::RankContext;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::cpu::physical_cores;
use tokenmill::runner::{MemoryDemand, MemoryPlan, ModelRunner, StepRunner};
use tokenmill::scheduler::batch::ScheduledBatch;
use tokenmill::tensor::DType;
use tokenmill::weights::Loader;

const TINY: &str = include_str!("../models/tiny/config.json");

const BENCH_0_5B: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": true, "hidden_act": "silu", "use_sliding_window": false
}"#;

const BENCH_1B: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": true, "hidden_act": "silu"
}"#;

/// Formats of the weights that are measured; `None` is bf16.
const FORMATS: [Option<Quantization>; 4] =
    [None, Some(Quantization::Int8), Some(Quantization::Int4), Some(Quantization::Fp8)];

const BLOCK_SIZE: usize = 16;
const MAX_NUM_SEQS: usize = 64;
const MAX_CONTEXT: usize = 1024;

/// A model with random weights.
struct Model {
    runner: ModelRunner,
    spec: ModelSpec,
    /// Of which every step reads all: there are no experts, and tables are output heads too.
    weights_bytes: usize,
    kv_dtype: DType,
    format: String,
}

/// A model of the shapes that `config_json` gives.
fn model(config_json: &str, quantization: Option<Quantization>, format: &str) -> Model {
    let spec = ModelSpec::from_config(config_json).expect("the config is supported");
    let cache = CacheConfig {
        memory_bytes: None,
        fraction: 0.4,
        block_size: BLOCK_SIZE,
        dtype: KvCacheDtype::Auto,
        enable_prefix_caching: false,
        gpu_memory_utilization: 0.9,
    };
    let scheduler = SchedulerConfig {
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: 1024,
        max_num_queued_requests: 1,
        policy: SchedulingPolicy::Fcfs,
    };
    let expected = spec.expected_tensors();
    let source = DummySource::new(expected.clone(), spec.dtype);
    let rank = RankContext::cpu(&machine::device()).expect("the machine has what was asked");
    let loader =
        Loader::new(&source).quantized(quantization, physical_cores()).arranged(&*rank.ops);
    let weights_bytes = loader.size_bytes(&expected);
    let demand = MemoryDemand {
        spec: &spec,
        weights_bytes,
        wanted_len: None,
        cache: &cache,
        scheduler: &scheduler,
    };
    let mut plan = MemoryPlan::new(&*rank.ops, &demand, 8 << 30).expect("the machine has room");
    plan.num_blocks = MAX_NUM_SEQS * MAX_CONTEXT / BLOCK_SIZE;
    let decoder = Decoder::load(&spec, &loader, MAX_CONTEXT).expect("dummy weights fit");
    let runner = ModelRunner::new(decoder, &spec, rank.clone(), &plan);
    let runner = runner.expect("the machine has room");
    let (kv_dtype, format) = (plan.kv_dtype, format.to_owned());
    Model { runner, spec, weights_bytes, kv_dtype, format }
}

/// Steps of sequences alike; token ids exist in every vocabulary here.
fn batch(num_seqs: usize, num_tokens: usize, context_len: usize) -> ScheduledBatch {
    uniform_batch(num_seqs, num_tokens, context_len, (BLOCK_SIZE, 4000))
}

/// Benches one model in every format; formats that the command line's filter leaves out are not
/// even loaded.
fn bench_model(
    c: &mut Criterion,
    limits: &Limits,
    (name, config_json): (&str, &str),
    formats: &[Option<Quantization>],
) {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    for &format in formats {
        let format_name = format.map_or("bf16".to_owned(), |f| format!("{f:?}").to_lowercase());
        let name = format!("{name} {format_name}");
        if name.contains(filter.split('/').next().unwrap_or_default()) {
            bench_steps(c, limits, &name, model(config_json, format, &format_name));
        }
    }
}

fn bench_steps(c: &mut Criterion, limits: &Limits, name: &str, mut model: Model) {
    println!("{name}: {:.1} MB of weights", model.weights_bytes as f64 / 1e6);
    let mut group = c.benchmark_group(name);
    group.sample_size(10).measurement_time(Duration::from_secs(4));
    for num_seqs in [1, 16, 64] {
        let batch = batch(num_seqs, 1, 256);
        let cost = StepCost::of(&model.spec, model.kv_dtype, 256);
        let step = Step {
            id: BenchmarkId::new("decode at context 256, batch", num_seqs),
            num_tokens: num_seqs,
            bytes: model.weights_bytes + num_seqs * cost.kv_bytes,
            flops: num_seqs * cost.flops,
        };
        bench_step(&mut group, limits, &mut model, step, &batch);
    }
    for prompt_len in [128, 1024] {
        let batch = batch(1, prompt_len, prompt_len);
        let step = Step {
            id: BenchmarkId::new("prefill", prompt_len),
            num_tokens: prompt_len,
            bytes: model.weights_bytes,
            flops: prompt_flops(&model.spec, model.kv_dtype, prompt_len),
        };
        bench_step(&mut group, limits, &mut model, step, &batch);
    }
    group.finish();
}

/// A step, and what it must do.
struct Step {
    id: BenchmarkId,
    num_tokens: usize,
    bytes: usize,
    flops: usize,
}

fn bench_step(
    group: &mut BenchmarkGroup<'_, WallTime>,
    limits: &Limits,
    model: &mut Model,
    step: Step,
    batch: &ScheduledBatch,
) {
    let Step { id, num_tokens, bytes, flops } = step;
    let best = Cell::new(Duration::MAX);
    group.throughput(Throughput::Elements(num_tokens as u64));
    group.bench_function(id, |bencher| {
        bencher.iter(|| {
            let start = Instant::now();
            let results = model.runner.execute(black_box(batch)).expect("the step succeeds");
            best.set(best.get().min(start.elapsed()));
            results
        });
    });
    // Left out by the command line's filter.
    if best.get() == Duration::MAX {
        return;
    }
    let seconds = best.get().as_secs_f64();
    println!(
        "    best {:.3} ms: {:.1} GB/s, {:.1} GFLOP/s, {:.0} % of the limit",
        seconds * 1e3,
        bytes as f64 / seconds / 1e9,
        flops as f64 / seconds / 1e9,
        limits.seconds(&model.format, bytes, flops) / seconds * 100.0,
    );
}

fn forward_passes(c: &mut Criterion) {
    let limits = Limits::read(&machine::device());
    bench_model(c, &limits, ("tiny", TINY), &FORMATS[..1]);
    bench_model(c, &limits, ("bench-0.5b", BENCH_0_5B), &FORMATS);
    bench_model(c, &limits, ("bench-1b", BENCH_1B), &FORMATS);
}

criterion_group!(benches, forward_passes);
criterion_main!(benches);
