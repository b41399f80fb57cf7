//! From a resolved configuration to a running engine: the one place where the layers meet.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::Value;
use tokio::runtime::Handle;
use tracing::info;

use crate::checkpoint::files::{self, ModelFiles};
use crate::checkpoint::hub::Progress;
use crate::config::{EngineConfig, LoadFormat, ModelSource};
use crate::device::RankContext;
use crate::engine::{Engine, EngineOptions, ModelInfo};
use crate::model::check::check;
use crate::model::decoder::Decoder;
use crate::model::spec::ModelSpec;
use crate::ops::OpsError;
use crate::ops::cpu::physical_cores;
use crate::ops::cuda::{Image, KERNELS};
use crate::request::SamplingDefaults;
use crate::runner::ModelRunner;
use crate::runner::memory_plan::{MemoryDemand, MemoryPlan, free_memory_bytes};
use crate::scheduler::SchedulerParams;
use crate::telemetry::Metrics;
use crate::tensor::give_back_freed;
use crate::text::{self, TextPipeline};
use crate::weights::Loader;

/// A running engine and how it came to be.
pub struct Opened {
    /// The handle.
    pub engine: Engine,
    /// The model.
    pub spec: ModelSpec,
    /// Where the bytes went.
    pub plan: MemoryPlan,
    /// Name of the compute backend.
    pub backend: String,
    /// From the first file to a started engine.
    pub load_time: Duration,
}

/// A loaded model that can compute steps.
pub struct Loaded {
    /// The runner.
    pub runner: ModelRunner,
    /// The model.
    pub spec: ModelSpec,
    /// Where the bytes went.
    pub plan: MemoryPlan,
    /// Name of the compute backend.
    pub backend: String,
}

/// Opens the model and starts its engine, whose generations will be polled in `runtime`.
pub fn open(config: &EngineConfig, runtime: &Handle) -> anyhow::Result<Opened> {
    open_with(config, KERNELS, runtime)
}

/// The same with other kernels for GPUs than those of this binary.
pub fn open_with(
    config: &EngineConfig,
    kernels: &'static [Image],
    runtime: &Handle,
) -> anyhow::Result<Opened> {
    let started = Instant::now();
    let files = ModelFiles::open(&config.model.source, Progress::Bars)?;
    let Loaded { runner, spec, plan, backend } = load(config, &files, kernels)?;
    let text = Arc::new(text_pipeline(&files, config, spec.vocab_size)?);
    let options = engine_options(config, &files, &spec, &plan)?;
    let engine = Engine::start(Box::new(runner), text, options, runtime);
    give_back_freed();
    Ok(Opened { engine, spec, plan, backend, load_time: started.elapsed() })
}

/// Opens the model without an engine, for those who plan their own steps.
pub fn open_runner(config: &EngineConfig) -> anyhow::Result<Loaded> {
    load(config, &ModelFiles::open(&config.model.source, Progress::Bars)?, KERNELS)
}

fn load(
    config: &EngineConfig,
    files: &ModelFiles,
    kernels: &'static [Image],
) -> anyhow::Result<Loaded> {
    let spec = ModelSpec::from_config(&files.required_text(files::CONFIG)?)?;
    let expected = spec.expected_tensors();
    let source = files.weights(config.model.load_format, expected, spec.dtype)?;
    check(&spec, &*source)?;
    let rank = RankContext::open_with(&config.device, kernels)?;
    info!(family = %spec.family, backend = %rank.ops.name(), "opening the model");
    let free = free_memory_bytes();
    let threads = config.device.threads.unwrap_or_else(physical_cores);
    let loader =
        Loader::new(&*source).quantized(config.model.quantization, threads).arranged(&*rank.ops);
    let demand = MemoryDemand {
        spec: &spec,
        weights_bytes: loader.size_bytes(&spec.expected_tensors()),
        wanted_len: config.model.max_model_len,
        cache: &config.cache,
        scheduler: &config.scheduler,
    };
    let plan = MemoryPlan::new(&*rank.ops, &demand, free)?;
    info!("memory plan: {plan}");
    rank.ops.set_aside(plan.room_for_weights(&spec)).map_err(advised)?;
    let decoder = Decoder::load(&spec, &loader, plan.max_model_len)?;
    let plan = plan.with_weights_loaded(&*rank.ops, &demand)?;
    let backend = rank.ops.name();
    let mut runner = ModelRunner::new(decoder, &spec, rank.clone(), &plan).map_err(advised)?;
    runner.record_common_steps()?;
    Ok(Loaded { runner, spec, plan, backend })
}

/// Says what to do where a device has less room than it said when the plan was made.
fn advised(error: OpsError) -> anyhow::Error {
    let is_full = matches!(error, OpsError::OutOfMemory { .. });
    let error = anyhow::Error::from(error);
    if !is_full {
        return error;
    }
    error.context(
        "the device is fuller than it was when memory was planned; end what else is using it, or \
         lower --gpu-memory-utilization",
    )
}

fn text_pipeline(
    files: &ModelFiles,
    config: &EngineConfig,
    vocab_size: usize,
) -> anyhow::Result<TextPipeline> {
    let override_template = match &config.model.chat_template {
        Some(path) => Some(
            std::fs::read_to_string(path)
                .with_context(|| format!("--chat-template {} cannot be read", path.display()))?,
        ),
        None => None,
    };
    let is_dummy = config.model.load_format == LoadFormat::Dummy;
    if is_dummy && files.text(files::TOKENIZER).is_none() {
        return Ok(text::dummy::pipeline(vocab_size)?);
    }
    let tokenizer = files.required_text(files::TOKENIZER)?;
    let tokenizer_config = files.text(files::TOKENIZER_CONFIG).transpose()?;
    let jinja = files.text(files::CHAT_TEMPLATE).transpose()?;
    Ok(TextPipeline::from_files(
        tokenizer.as_bytes(),
        tokenizer_config.as_deref(),
        jinja.as_deref(),
        override_template.as_deref(),
    )?)
}

fn engine_options(
    config: &EngineConfig,
    files: &ModelFiles,
    spec: &ModelSpec,
    plan: &MemoryPlan,
) -> anyhow::Result<EngineOptions> {
    let generation: Value = match files.text(files::GENERATION_CONFIG).transpose()? {
        Some(text) => serde_json::from_str(&text)
            .context("generation_config.json is not valid JSON; mend or remove it")?,
        None => Value::Null,
    };
    let eos_token_ids = eos_token_ids(&generation).unwrap_or_else(|| spec.eos_token_ids.clone());
    let defaults = if config.model.use_generation_config {
        sampling_defaults(&generation)
    } else {
        SamplingDefaults::default()
    };
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    Ok(EngineOptions {
        model: ModelInfo {
            root: root(&config.model.source),
            created,
            max_model_len: plan.max_model_len,
            vocab_size: spec.vocab_size,
            eos_token_ids: eos_token_ids.clone(),
            block_size: plan.block_size,
            num_blocks: plan.num_blocks,
            defaults,
        },
        scheduler: SchedulerParams {
            max_num_seqs: config.scheduler.max_num_seqs,
            max_num_batched_tokens: config.scheduler.max_num_batched_tokens,
            max_model_len: plan.max_model_len,
            policy: config.scheduler.policy,
            block_size: plan.block_size,
            num_blocks: plan.num_blocks,
            enable_prefix_caching: config.cache.enable_prefix_caching,
            eos_token_ids,
        },
        max_num_queued_requests: config.scheduler.max_num_queued_requests,
        step_timeout: config.server.step_timeout,
        metrics: Arc::new(Metrics::new(&config.server.served_model_names[0], plan.max_model_len)),
    })
}

fn root(source: &ModelSource) -> String {
    match source {
        ModelSource::Bundled => "tiny".to_owned(),
        ModelSource::Folder(path) => path.display().to_string(),
        ModelSource::Hub { id, .. } => id.clone(),
    }
}

/// One id or a list, as `generation_config.json` allows.
fn eos_token_ids(generation: &Value) -> Option<Vec<u32>> {
    let as_id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match generation.get("eos_token_id")? {
        Value::Array(ids) => Some(ids.iter().filter_map(as_id).collect()),
        id => as_id(id).map(|id| vec![id]),
    }
}

fn sampling_defaults(generation: &Value) -> SamplingDefaults {
    let number = |key: &str| generation.get(key).and_then(Value::as_f64);
    let count =
        |key: &str| generation.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
    let greedy = generation.get("do_sample") == Some(&Value::Bool(false));
    SamplingDefaults {
        temperature: if greedy { Some(0.0) } else { number("temperature").map(|t| t as f32) },
        top_p: number("top_p").map(|p| p as f32),
        top_k: count("top_k"),
        min_p: number("min_p").map(|p| p as f32),
        repetition_penalty: number("repetition_penalty").map(|p| p as f32),
        max_new_tokens: count("max_new_tokens"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn generation_config_gives_defaults_and_end_tokens() {
        let generation = json!({"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]});
        assert_eq!(eos_token_ids(&generation), Some(vec![1, 2]));
        let defaults = sampling_defaults(&generation);
        assert_eq!((defaults.temperature, defaults.top_k), (Some(0.6), Some(20)));
        assert_eq!(eos_token_ids(&json!({"eos_token_id": 7})), Some(vec![7]));
        assert_eq!(eos_token_ids(&json!({})), None);
    }

    #[test]
    fn a_generation_config_that_does_not_sample_is_greedy() {
        assert_eq!(sampling_defaults(&json!({"do_sample": false})).temperature, Some(0.0));
    }
}
