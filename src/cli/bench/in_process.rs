//! The engine in this process: opened as `serve` opens it, driven without HTTP.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::load::{Outcome, Pace, RequestTrace, drive};
use super::record::Measured;
use super::steps::prompt_flops;
use crate::checkpoint::ExpectedTensor;
use crate::cli::open::{self, Opened};
use crate::config::{DeviceChoice, EngineConfig};
use crate::engine::Engine;
use crate::model::kv_cache::KvCache;
use crate::model::spec::{MlpSpec, ModelSpec, MoeSpec};
use crate::ops::cpu::physical_cores;
use crate::ops::cuda::KERNELS;
use crate::ops::cuda::driver::Survey;
use crate::output::FinishReason;
use crate::request::{GenerateRequest, Prompt, RequestId, SamplingParams, StopConditions};
use crate::runner::MemoryPlan;

/// Longest wait for the engine to forget its last requests.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// An open engine and what drives it.
pub(super) struct InProcess {
    opened: Opened,
    runtime: Runtime,
    facts: Value,
}

impl InProcess {
    /// Opens the model and makes sure that a request of `request_len` tokens fits.
    pub fn open(config: &EngineConfig, request_len: usize) -> anyhow::Result<InProcess> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("the runtime cannot start its threads")?;
        let opened = open::open(config, runtime.handle())?;
        let max_model_len = opened.plan.max_model_len;
        anyhow::ensure!(
            request_len <= max_model_len,
            "prefix, --input-len and --output-len are {request_len} tokens together, but the \
             context holds {max_model_len}; lower them or raise --max-model-len"
        );
        let mut facts = model_facts(config, &opened.spec, &opened.plan, &opened.backend);
        facts["load_s"] = json!(opened.load_time.as_secs_f64());
        println!("{}", headline(&facts));
        Ok(InProcess { opened, runtime, facts })
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.opened.spec.vocab_size
    }

    /// Bytes of weights that a step of so many tokens reads.
    pub fn step_weights_bytes(&self, num_tokens: usize) -> usize {
        step_weights_bytes(&self.opened.spec, &self.opened.plan, num_tokens)
    }

    /// Multiplications and additions of a prompt of this length.
    pub fn prompt_flops(&self, len: usize) -> usize {
        prompt_flops(&self.opened.spec, self.opened.plan.kv_dtype, len)
    }

    /// Sends the prompts and waits for `output_len` tokens after each.
    pub fn generate(&self, prompts: Vec<Vec<u32>>, output_len: usize, pace: Pace) -> Outcome {
        let send = |prompt| generate(self.opened.engine.clone(), prompt, output_len);
        self.runtime.block_on(drive(prompts, pace, send))
    }

    /// Stops the engine; what is known about the model remains.
    pub fn close(self) -> Value {
        self.runtime.block_on(self.opened.engine.drain(DRAIN_TIME));
        self.facts
    }
}

/// Whose limits bound a run: those of the device that will be opened.
pub(super) fn measured(config: &EngineConfig) -> Measured {
    let on_gpu = match (config.device.choice, config.device.cpu_only_flag) {
        (DeviceChoice::Cuda(_), _) => true,
        (DeviceChoice::Auto, None) if !KERNELS.is_empty() => {
            Survey::take().is_ok_and(|survey| survey.usable(0).is_ok())
        }
        _ => false,
    };
    if on_gpu { Measured::Gpu } else { Measured::Host { threads: num_threads(config) } }
}

/// Threads that compute.
pub(super) fn num_threads(config: &EngineConfig) -> usize {
    config.device.threads.unwrap_or_else(physical_cores)
}

/// What a record says about the model.
pub(super) fn model_facts(
    config: &EngineConfig,
    spec: &ModelSpec,
    plan: &MemoryPlan,
    backend: &str,
) -> Value {
    let quantization = config.model.quantization.and_then(|value| value.to_possible_value());
    json!({
        "name": config.server.served_model_names[0],
        "family": spec.family,
        "quantization": quantization.map(|value| value.get_name().to_owned()),
        "backend": backend,
        "threads": num_threads(config),
        "weights_bytes": plan.weights_bytes,
        "step_weights_bytes": step_weights_bytes(spec, plan, 1),
        "kv_token_bytes": KvCache::block_bytes(spec, 1, plan.kv_dtype),
        "max_model_len": plan.max_model_len,
    })
}

/// One line for people.
pub(super) fn headline(facts: &Value) -> String {
    let text = |key: &str| facts[key].as_str().unwrap_or_default();
    let weights = facts["weights_bytes"].as_f64().unwrap_or_default() / 1e9;
    let format = facts["quantization"].as_str().map(|name| format!(" in {name}"));
    let format = format.unwrap_or_default();
    format!("{}: {weights:.3} GB of weights{format}, {}", text("name"), text("backend"))
}

/// Bytes of weights that a step of so many tokens reads: all but an embedding table that is not
/// also the output projection, of which a step reads a few rows, and experts that no token chose,
/// as many as when all are equally likely. Shares are taken by elements.
pub(super) fn step_weights_bytes(spec: &ModelSpec, plan: &MemoryPlan, num_tokens: usize) -> usize {
    let elements = |tensor: &ExpectedTensor| tensor.shape.iter().product::<usize>();
    let all: usize = spec.expected_tensors().iter().map(elements).sum();
    let table = if spec.tied { 0 } else { spec.vocab_size * spec.hidden_size };
    let idle = |moe: &MoeSpec| {
        let not_chosen = 1.0 - moe.experts_per_token as f64 / moe.experts.len() as f64;
        let weights: usize = moe.experts.iter().map(MlpSpec::num_weights).sum();
        weights as f64 * not_chosen.powf(num_tokens as f64)
    };
    let moes = spec.layers.iter().filter_map(|layer| layer.feed_forward.moe());
    let unread = table as f64 + moes.map(idle).sum::<f64>();
    (plan.weights_bytes as f64 * (1.0 - unread / all as f64)) as usize
}

async fn generate(
    engine: Engine,
    prompt: Vec<u32>,
    output_len: usize,
) -> anyhow::Result<RequestTrace> {
    let num_input_tokens = prompt.len();
    let mut request = GenerateRequest::new(RequestId::random("bench"), Prompt::Tokens(prompt));
    request.sampling = SamplingParams::greedy();
    request.stop = StopConditions {
        max_tokens: Some(u32::try_from(output_len).context("--output-len is too large")?),
        ignore_eos: true,
        ..StopConditions::default()
    };
    let sent = Instant::now();
    let mut generation = engine.submit(request).await?;
    let mut trace = RequestTrace {
        sent,
        arrivals: Vec::with_capacity(output_len),
        ended: sent,
        num_input_tokens,
        num_cached_tokens: 0,
        num_output_tokens: 0,
    };
    while let Some(delta) = generation.next().await {
        trace.ended = Instant::now();
        if !delta.token_ids.is_empty() {
            trace.arrivals.push(trace.ended);
        }
        trace.num_output_tokens += delta.token_ids.len();
        trace.num_cached_tokens +=
            delta.prompt.map_or(0, |prompt| prompt.num_cached_tokens as usize);
        if let Some(FinishReason::Error(reason)) = delta.finish {
            anyhow::bail!("the engine failed: {reason}");
        }
    }
    anyhow::ensure!(
        trace.num_output_tokens == output_len,
        "a request ended after {} of {output_len} tokens",
        trace.num_output_tokens
    );
    Ok(trace)
}
