//! The scheduler with a real decoder: company, chunking, preemption and caching change nothing.
//!
//! Compared are token ids and the bits of their log-probabilities, on a small Llama with random
//! weights computed by the CPU backend.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::config::{
    CacheConfig, CpuIsa, DeviceConfig, KvCacheDtype, Quantization, SchedulerConfig,
    SchedulingPolicy,
};
use tokenmill::device::RankContext;
use tokenmill::model::decoder::Decoder;
use tokenmill::model::spec::ModelSpec;
use tokenmill::output::{FinishReason, TokenEvent};
use tokenmill::request::{RequestId, SamplingParams, StopConditions, TokenizedRequest};
use tokenmill::runner::{MemoryDemand, MemoryPlan, ModelRunner, StepRunner};
use tokenmill::scheduler::{Scheduler, SchedulerParams};
use tokenmill::weights::Loader;

const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 211,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
    "tie_word_embeddings": true, "hidden_act": "silu"
}"#;

/// How the same requests are to be computed.
#[derive(Clone, Debug)]
pub struct Setting {
    pub config: &'static str,
    pub threads: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub num_blocks: usize,
    pub block_size: usize,
    pub caching: bool,
    pub kv_dtype: KvCacheDtype,
    pub max_model_len: usize,
    pub quantization: Option<Quantization>,
    pub isa: CpuIsa,
}

pub const ROOMY: Setting = Setting {
    config: CONFIG,
    threads: 1,
    max_num_seqs: 32,
    max_num_batched_tokens: 512,
    num_blocks: 512,
    block_size: 16,
    caching: true,
    kv_dtype: KvCacheDtype::Auto,
    max_model_len: 256,
    quantization: None,
    isa: CpuIsa::Auto,
};

/// Every token of one continuation, with the bits of its log-probability.
pub type Trace = Vec<(u32, u32)>;

fn runner(setting: &Setting) -> ModelRunner {
    let device = DeviceConfig { cpu_isa: setting.isa, ..DeviceConfig::cpu(Some(setting.threads)) };
    let rank = RankContext::cpu(&device).expect("this machine has the instructions");
    runner_on(&rank, setting)
}

/// A runner of the small model on any device.
pub fn runner_on(rank: &RankContext, setting: &Setting) -> ModelRunner {
    let spec = ModelSpec::from_config(setting.config).expect("the config is supported");
    let cache = CacheConfig {
        memory_bytes: None,
        fraction: 0.4,
        block_size: setting.block_size,
        dtype: setting.kv_dtype,
        enable_prefix_caching: setting.caching,
        gpu_memory_utilization: 0.9,
    };
    let scheduler = SchedulerConfig {
        max_num_seqs: setting.max_num_seqs,
        max_num_batched_tokens: setting.max_num_batched_tokens,
        max_num_queued_requests: 64,
        policy: SchedulingPolicy::Fcfs,
    };
    let demand = MemoryDemand {
        spec: &spec,
        weights_bytes: 0,
        wanted_len: None,
        cache: &cache,
        scheduler: &scheduler,
    };
    let mut plan = MemoryPlan::new(&*rank.ops, &demand, 1 << 30).expect("it fits");
    plan.num_blocks = setting.num_blocks;
    let source = DummySource::new(spec.expected_tensors(), spec.dtype);
    let loader = Loader::new(&source).quantized(setting.quantization, 2).arranged(&*rank.ops);
    let decoder = Decoder::load(&spec, &loader, setting.max_model_len).expect("dummy weights fit");
    ModelRunner::new(decoder, &spec, rank.clone(), &plan).expect("it fits")
}

pub fn scheduler(setting: &Setting) -> Scheduler {
    Scheduler::new(SchedulerParams {
        max_num_seqs: setting.max_num_seqs,
        max_num_batched_tokens: setting.max_num_batched_tokens,
        max_model_len: setting.max_model_len,
        policy: SchedulingPolicy::Fcfs,
        block_size: setting.block_size,
        num_blocks: setting.num_blocks,
        enable_prefix_caching: setting.caching,
        eos_token_ids: vec![],
    })
}

pub fn request(
    index: usize,
    sampling: SamplingParams,
    max_tokens: u32,
    n: u32,
) -> TokenizedRequest {
    let length = 5 + index * 13 % 70;
    // Half of the prompts share their first 40 tokens, so that prefixes are reused.
    let token = |i: usize| {
        let salt = if index.is_multiple_of(2) && i < 40 { 0 } else { index * 31 };
        ((i * 17 + salt + 3) % 211) as u32
    };
    TokenizedRequest {
        id: RequestId(format!("r{index}").into()),
        prompt_token_ids: (0..length).map(token).collect(),
        sampling: Arc::new(SamplingParams { logprobs: Some(2), ..sampling }),
        stop: StopConditions { max_tokens: Some(max_tokens), ..StopConditions::default() },
        n,
        priority: 0,
        cache_salt: None,
    }
}

fn sampling_for(index: usize) -> SamplingParams {
    match index % 3 {
        0 => SamplingParams::greedy(),
        1 => SamplingParams { temperature: 0.8, top_p: 0.9, seed: 7, ..SamplingParams::default() },
        _ => SamplingParams {
            temperature: 1.2,
            top_k: 20,
            repetition_penalty: 1.2,
            frequency_penalty: 0.3,
            seed: 99,
            ..SamplingParams::default()
        },
    }
}

fn note(traces: &mut BTreeMap<(RequestId, u32), Trace>, event: TokenEvent) -> bool {
    let trace = traces.entry((event.request_id, event.index)).or_default();
    for token in event.tokens {
        let logprob = token.logprobs.expect("asked for").logprob;
        assert!(logprob.is_finite() && logprob <= 0.0, "logprob {logprob}");
        trace.push((token.token_id, logprob.to_bits()));
    }
    matches!(event.finish, Some(FinishReason::Length))
}

/// Runs the requests to their ends and returns what each yielded, and how often any was
/// preempted.
pub fn run(
    requests: Vec<TokenizedRequest>,
    setting: &Setting,
) -> (BTreeMap<(RequestId, u32), Trace>, u64) {
    run_on(runner(setting), requests, setting)
}

/// As `run`, with a runner of any device.
pub fn run_on(
    mut runner: ModelRunner,
    requests: Vec<TokenizedRequest>,
    setting: &Setting,
) -> (BTreeMap<(RequestId, u32), Trace>, u64) {
    let mut scheduler = scheduler(setting);
    let expected: usize = requests.iter().map(|r| r.n as usize).sum();
    // Arrivals are spread over steps, so that prefills meet decodes.
    let mut arrivals = requests.into_iter();
    let (mut traces, mut finished) = (BTreeMap::new(), 0);
    for _ in 0..10_000 {
        if let Some(request) = arrivals.next() {
            scheduler.admit(request).expect("the request fits");
        }
        let batch = scheduler.plan();
        let results = runner.execute_beside(&batch, &mut || {
            scheduler.plan_ahead(&batch);
        });
        let results = results.expect("the step succeeds");
        for event in scheduler.commit(&batch, results) {
            finished += usize::from(note(&mut traces, event));
        }
        if finished == expected {
            return (traces, scheduler.stats().num_preempted);
        }
    }
    panic!("{finished} of {expected} sequences finished");
}

pub fn requests(count: usize) -> Vec<TokenizedRequest> {
    (0..count).map(|i| request(i, sampling_for(i), 24, 1)).collect()
}

fn alone(requests: &[TokenizedRequest]) -> BTreeMap<(RequestId, u32), Trace> {
    let setting = Setting { caching: false, ..ROOMY };
    requests.iter().flat_map(|r| run(vec![r.clone()], &setting).0).collect()
}

#[test]
fn batched_requests_yield_the_bits_they_yield_alone() {
    let requests = requests(12);
    let (batched, _) = run(requests.clone(), &ROOMY);
    assert_eq!(batched, alone(&requests));
}

#[test]
fn chunked_prefill_changes_no_bit() {
    let requests = requests(9);
    let expected = alone(&requests);
    for max_num_batched_tokens in [7, 16, 33] {
        let setting = Setting { max_num_batched_tokens, max_num_seqs: 7, ..ROOMY };
        assert_eq!(run(requests.clone(), &setting).0, expected, "{setting:?}");
    }
}

#[test]
fn preempted_requests_yield_the_bits_of_undisturbed_ones() {
    let requests = requests(10);
    for caching in [false, true] {
        let setting = Setting { num_blocks: 14, caching, ..ROOMY };
        let (outputs, num_preempted) = run(requests.clone(), &setting);
        assert!(num_preempted > 0, "the pool is meant to be too small");
        assert_eq!(outputs, alone(&requests));
    }
}

#[test]
fn threads_and_block_sizes_change_no_bit() {
    let requests = requests(6);
    let expected = alone(&requests);
    for (threads, block_size) in [(2, 16), (1, 8), (2, 32), (3, 16)] {
        let setting = Setting { threads, block_size, ..ROOMY };
        assert_eq!(run(requests.clone(), &setting).0, expected, "{setting:?}");
    }
}

#[test]
fn continuations_share_a_prompt_and_the_first_equals_a_lone_one() {
    let sampling = SamplingParams { temperature: 1.0, seed: 3, ..SamplingParams::default() };
    let three = request(4, sampling.clone(), 20, 3);
    let (outputs, _) = run(vec![three.clone()], &ROOMY);
    let lone = alone(&[request(4, sampling, 20, 1)]);
    let of = |index: u32| outputs[&(three.id.clone(), index)].clone();
    assert_eq!(of(0), lone[&(three.id.clone(), 0)]);
    assert_ne!(of(1), of(0));
    assert_ne!(of(2), of(1));
    let uncached = Setting { caching: false, ..ROOMY };
    assert_eq!(run(vec![three], &uncached).0, outputs);
}

#[test]
fn caches_of_bytes_keep_every_promise() {
    for kv_dtype in [KvCacheDtype::Int8, KvCacheDtype::Fp8] {
        let roomy = Setting { kv_dtype, ..ROOMY };
        let mut requests = requests(8);
        // Continuations write to copies of the last block of their prompt.
        requests.push(request(4, sampling_for(1), 20, 3));
        requests[8].id = RequestId("three".into());
        let uncached = Setting { caching: false, ..roomy.clone() };
        let lone = |r: &TokenizedRequest| run(vec![r.clone()], &uncached).0;
        let expected: BTreeMap<_, _> = requests.iter().flat_map(lone).collect();
        for setting in [
            roomy.clone(),
            Setting { max_num_batched_tokens: 16, max_num_seqs: 7, ..roomy.clone() },
            Setting { num_blocks: 14, ..roomy.clone() },
            Setting { threads: 2, block_size: 8, ..roomy.clone() },
        ] {
            assert_eq!(run(requests.clone(), &setting).0, expected, "{setting:?}");
        }
        let in_floats = run(requests.clone(), &ROOMY).0;
        assert_ne!(in_floats, expected, "{kv_dtype:?} is a cache of its own");
    }
}

#[test]
fn greedy_tokens_are_the_same_with_and_without_logits() {
    let tokens = |logprobs: Option<u32>| {
        let (mut scheduler, mut runner) = (scheduler(&ROOMY), runner(&ROOMY));
        for index in 0..5 {
            let request = request(index, SamplingParams::greedy(), 12, 1);
            let sampling = Arc::new(SamplingParams { logprobs, ..SamplingParams::greedy() });
            scheduler.admit(TokenizedRequest { sampling, ..request }).expect("the request fits");
        }
        let mut tokens: BTreeMap<RequestId, Vec<u32>> = BTreeMap::new();
        while scheduler.has_work() {
            let batch = scheduler.plan();
            let results = runner.execute(&batch).expect("the step succeeds");
            for event in scheduler.commit(&batch, results) {
                let chosen = event.tokens.iter().map(|token| token.token_id);
                tokens.entry(event.request_id).or_default().extend(chosen);
            }
        }
        tokens
    };
    let without = tokens(None);
    assert!(without.len() == 5 && without.values().all(|tokens| tokens.len() == 12));
    assert_eq!(without, tokens(Some(0)));
}

#[test]
fn scoring_a_text_agrees_with_having_generated_it() {
    let greedy = request(2, SamplingParams::greedy(), 12, 1);
    let (outputs, _) = run(vec![greedy.clone()], &ROOMY);
    let generated = &outputs[&(greedy.id.clone(), 0)];
    let mut scored = request(2, SamplingParams::greedy(), 0, 1);
    let prompt_len = scored.prompt_token_ids.len();
    scored.prompt_token_ids.extend(generated.iter().map(|(id, _)| id));
    scored.sampling =
        Arc::new(SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::greedy() });
    for max_num_batched_tokens in [512, 9] {
        let setting = Setting { max_num_batched_tokens, max_num_seqs: 4, ..ROOMY };
        let (mut scheduler, mut runner) = (scheduler(&setting), runner(&setting));
        scheduler.admit(scored.clone()).expect("the request fits");
        let mut report = None;
        while scheduler.has_work() {
            let batch = scheduler.plan();
            let results = runner.execute(&batch).expect("the step succeeds");
            for event in scheduler.commit(&batch, results) {
                report = event.prompt.or(report);
            }
        }
        let scores = report.expect("the prompt is reported").logprobs;
        assert_eq!(scores.len(), scored.prompt_token_ids.len());
        assert!(scores[0].is_none());
        for (i, (_, bits)) in generated.iter().enumerate() {
            let score = scores[prompt_len + i].as_ref().expect("scored");
            assert_eq!(score.logprob.to_bits(), *bits, "token {i}");
        }
    }
}
