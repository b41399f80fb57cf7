//! Configuration: what was typed, resolved once into what each part needs.
//!
//! Every default lives here. Nothing else reads flags or the environment.

mod device;
mod hub;

use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

pub use device::{CpuIsa, DeviceArgs, DeviceChoice, DeviceConfig};
pub use hub::HubSettings;

/// How weights reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// Read the checkpoint.
    Auto,
    /// Random weights of the shapes that `config.json` gives, for speed work.
    Dummy,
}

/// Formats to which floating-point weights can be quantized while they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    /// 8-bit weights with a scale per row, activations quantized per token (W8A8).
    Int8,
    /// 8-bit weights with a scale per row, activations as they are.
    #[value(name = "w8a16")]
    W8A16,
    /// 4-bit weights with a scale and a zero point per 32.
    #[value(alias = "int4-g32")]
    Int4,
    /// 4-bit weights with a scale and a zero point per 64.
    #[value(name = "int4-g64")]
    Int4G64,
    /// 4-bit weights with a scale and a zero point per 128.
    #[value(name = "int4-g128")]
    Int4G128,
    /// FP8 E4M3 weights with a scale per row.
    Fp8,
    /// 8-bit weights with a scale per 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit weights with a scale per 32, without zero points.
    #[value(name = "q4_0")]
    Q4_0,
    /// 4-bit floating-point weights (E2M1) with a power of two per 32.
    Mxfp4,
}

/// Order in which waiting requests are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SchedulingPolicy {
    /// First come, first served.
    Fcfs,
    /// Lower `priority` first, then first come.
    Priority,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    /// bf16; f32 for f32 models on the CPU.
    Auto,
    /// Brain float.
    Bf16,
    /// Half precision.
    F16,
    /// Single precision; on the CPU only.
    F32,
    /// Signed bytes with a scale per token and head.
    Int8,
    /// FP8 E4M3 without scales.
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

/// Fraction of the host's free memory that the KV cache takes by default.
const KV_CACHE_FRACTION: f64 = 0.4;

/// Flags about the model and how it is computed.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Folder or hub id of the model; without it the bundled model is served
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,

    /// Same as the positional MODEL
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model")]
    pub model_flag: Option<String>,

    /// Branch, tag or commit on the hub
    #[arg(long, default_value = "main")]
    pub revision: String,

    /// Folder for downloads instead of the hub cache ($HF_HOME)
    #[arg(long, value_name = "DIR")]
    pub download_dir: Option<PathBuf>,

    /// Read the checkpoint, or make up random weights from config.json alone
    #[arg(long, value_enum, default_value = "auto")]
    pub load_format: LoadFormat,

    /// Quantize the weights while they are loaded
    #[arg(long, value_enum)]
    pub quantization: Option<Quantization>,

    /// Longest prompt plus output, in tokens (accepts 32k); default: what the model supports
    #[arg(long, value_parser = parse_tokens)]
    pub max_model_len: Option<usize>,

    /// Jinja file that replaces the model's chat template
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,

    /// Where sampling defaults come from: `auto` (the model's generation_config.json) or `vllm`
    /// (the OpenAI defaults)
    #[arg(long, default_value = "auto", value_parser = ["auto", "vllm"])]
    pub generation_config: String,

    /// Seed for requests that bring none; default: a fresh random seed per request
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Flags about the KV cache and the device.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Memory and device")]
pub struct CacheArgs {
    /// Device flags.
    #[command(flatten)]
    pub device: DeviceArgs,

    /// Bytes for the KV cache (accepts 512M, 4G)
    #[arg(long, alias = "kv-cache-memory-bytes", value_parser = parse_bytes)]
    pub kv_cache_memory: Option<u64>,

    /// On the CPU, without --kv-cache-memory: the KV cache takes this fraction of the memory that
    /// is free after loading [default: 0.4]
    #[arg(long)]
    pub kv_cache_fraction: Option<f64>,

    /// On a GPU: weights, workspace and, without --kv-cache-memory, the KV cache take this
    /// fraction of its memory
    #[arg(long, default_value_t = 0.9)]
    pub gpu_memory_utilization: f64,

    /// Tokens per KV block
    #[arg(long, default_value_t = 16, value_parser = parse_block_size)]
    pub block_size: usize,

    /// Element type of the KV cache
    #[arg(long, value_enum, default_value = "auto")]
    pub kv_cache_dtype: KvCacheDtype,

    /// Compute every prompt anew instead of reusing cached prefixes
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
}

/// Flags about batching and admission.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub struct SchedulerArgs {
    /// Most sequences running at once
    #[arg(long, default_value_t = 256)]
    pub max_num_seqs: usize,

    /// Most tokens computed in one step, prefill and decode together
    #[arg(long, default_value_t = 2048, value_parser = parse_tokens)]
    pub max_num_batched_tokens: usize,

    /// Requests that may wait; one more is refused with 503 and Retry-After
    #[arg(long, alias = "max-num-queued-reqs", default_value_t = 1024)]
    pub max_num_queued_requests: usize,

    /// Order in which waiting requests are served
    #[arg(long, value_enum, default_value = "fcfs")]
    pub scheduling_policy: SchedulingPolicy,
}

/// Flags about the HTTP server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// Port to listen on; 0 picks a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,

    /// Require `Authorization: Bearer KEY`; repeat for several keys
    #[arg(
        long = "api-key",
        env = "TOKENMILL_API_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub api_keys: Vec<String>,

    /// Names under which the model is served; repeat for several
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Vec<String>,

    /// Largest request body in bytes (accepts 8M)
    #[arg(long, default_value = "32M", value_parser = parse_bytes)]
    pub max_body_size: u64,

    /// Most log-probabilities that a request may ask for per token
    #[arg(long, default_value_t = 20)]
    pub max_logprobs: u32,

    /// On SIGTERM, let running requests finish for up to this many seconds
    #[arg(long, default_value_t = 30)]
    pub shutdown_timeout: u64,

    /// On a GPU, a step that runs for more seconds than this hangs: /health answers 503
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub step_timeout: u64,

    /// Write logs as JSON lines
    #[arg(long)]
    pub log_json: bool,
}

/// Everything that `tokenmill serve` accepts.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Model flags.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Cache and device flags.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Scheduler flags.
    #[command(flatten)]
    pub scheduler: SchedulerArgs,
    /// Server flags.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The model inside this binary.
    Bundled,
    /// A folder on disk.
    Folder(PathBuf),
    /// A repository on the hub.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
        /// How to reach it and where to keep it.
        hub: HubSettings,
    },
}

/// What `model::open` needs.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Where the files are.
    pub source: ModelSource,
    /// Read or make up the weights.
    pub load_format: LoadFormat,
    /// Quantize floating-point weights to this.
    pub quantization: Option<Quantization>,
    /// Longest prompt plus output; `None` takes the model's own limit.
    pub max_model_len: Option<usize>,
    /// Replaces the model's template.
    pub chat_template: Option<PathBuf>,
    /// Use the model's own sampling defaults.
    pub use_generation_config: bool,
}

/// What the memory plan needs.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Bytes for KV blocks; `None` takes `fraction` of what is free.
    pub memory_bytes: Option<u64>,
    /// Fraction of the host's free memory.
    pub fraction: f64,
    /// Fraction of a GPU's memory that everything may take together.
    pub gpu_memory_utilization: f64,
    /// Tokens per block: 8, 16 or 32.
    pub block_size: usize,
    /// Element type.
    pub dtype: KvCacheDtype,
    /// Reuse cached prefixes.
    pub enable_prefix_caching: bool,
}

/// What the scheduler and admission need.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Most sequences running at once.
    pub max_num_seqs: usize,
    /// Most tokens per step.
    pub max_num_batched_tokens: usize,
    /// Most requests waiting.
    pub max_num_queued_requests: usize,
    /// Order of the waiting queue.
    pub policy: SchedulingPolicy,
}

/// What the HTTP server needs.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on.
    pub port: u16,
    /// Accepted keys; empty accepts everyone.
    pub api_keys: Vec<String>,
    /// Public names of the model, the first is canonical.
    pub served_model_names: Vec<String>,
    /// Largest request body in bytes.
    pub max_body_bytes: u64,
    /// Most log-probabilities per token.
    pub max_logprobs: u32,
    /// Grace for running requests on shutdown.
    pub shutdown_timeout: Duration,
    /// After this a step of a device hangs.
    pub step_timeout: Duration,
    /// Seed for requests that bring none.
    pub seed: Option<u64>,
    /// Requests may carry a `priority`, because the scheduler looks at it.
    pub accepts_priority: bool,
}

/// Everything, resolved.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The model.
    pub model: ModelConfig,
    /// The device.
    pub device: DeviceConfig,
    /// Memory.
    pub cache: CacheConfig,
    /// Batching and admission.
    pub scheduler: SchedulerConfig,
    /// HTTP.
    pub server: ServerConfig,
}

/// A flag combination that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value is out of range.
    #[error("--{flag} is {value}, but {expected}")]
    OutOfRange {
        /// Name of the flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A GPU was asked for, and something that it does not have.
    #[error("--{flag} has a meaning on the CPU only; leave it out or use --device cpu")]
    OnlyOnCpu {
        /// The flag, perhaps with its value.
        flag: &'static str,
    },
}

impl EngineConfig {
    /// Resolves the flags: every choice made, every range checked.
    pub fn resolve(args: ServeArgs) -> Result<EngineConfig, ConfigError> {
        let ServeArgs { model, cache, scheduler, server } = args;
        check(
            "max-num-seqs",
            scheduler.max_num_seqs,
            scheduler.max_num_seqs >= 1,
            "at least 1 is needed",
        )?;
        check(
            "max-num-batched-tokens",
            scheduler.max_num_batched_tokens,
            scheduler.max_num_batched_tokens >= scheduler.max_num_seqs,
            "it must be at least --max-num-seqs, so that every running sequence can decode in each step",
        )?;
        let fraction = cache.kv_cache_fraction.unwrap_or(KV_CACHE_FRACTION);
        check(
            "kv-cache-fraction",
            fraction,
            fraction > 0.0 && fraction <= 0.95,
            "it must lie above 0 and at most at 0.95",
        )?;
        let utilization = cache.gpu_memory_utilization;
        check(
            "gpu-memory-utilization",
            utilization,
            utilization > 0.0 && utilization <= 1.0,
            "it must lie above 0 and at most at 1",
        )?;
        let cpu_only_flags = [
            cache.kv_cache_fraction.map(|_| "kv-cache-fraction"),
            (cache.kv_cache_dtype == KvCacheDtype::F32).then_some("kv-cache-dtype f32"),
        ];
        check(
            "max-model-len",
            format!("{:?}", model.max_model_len),
            model.max_model_len.is_none_or(|len| len >= 2),
            "at least 2 tokens are needed",
        )?;
        let named = model.model.clone().or_else(|| model.model_flag.clone());
        let mut names = server.served_model_name.clone();
        if names.is_empty() {
            names.push(named.clone().unwrap_or_else(|| "tiny".to_owned()));
        }
        Ok(EngineConfig {
            server: ServerConfig {
                host: server.host,
                port: server.port,
                api_keys: server.api_keys,
                served_model_names: names,
                max_body_bytes: server.max_body_size,
                max_logprobs: server.max_logprobs,
                shutdown_timeout: Duration::from_secs(server.shutdown_timeout),
                step_timeout: Duration::from_secs(server.step_timeout),
                seed: model.seed,
                accepts_priority: scheduler.scheduling_policy == SchedulingPolicy::Priority,
            },
            scheduler: SchedulerConfig {
                max_num_seqs: scheduler.max_num_seqs,
                max_num_batched_tokens: scheduler.max_num_batched_tokens,
                max_num_queued_requests: scheduler.max_num_queued_requests,
                policy: scheduler.scheduling_policy,
            },
            device: cache.device.resolve(cpu_only_flags.into_iter().flatten())?,
            cache: CacheConfig {
                memory_bytes: cache.kv_cache_memory,
                fraction,
                gpu_memory_utilization: utilization,
                block_size: cache.block_size,
                dtype: cache.kv_cache_dtype,
                enable_prefix_caching: !cache.no_enable_prefix_caching,
            },
            model: ModelConfig {
                source: ModelSource::resolve(named, model.revision, model.download_dir),
                load_format: model.load_format,
                quantization: model.quantization,
                max_model_len: model.max_model_len,
                chat_template: model.chat_template,
                use_generation_config: model.generation_config == "auto",
            },
        })
    }
}

impl ModelSource {
    /// No name is the bundled model, an existing path a folder, all else a hub id.
    pub fn resolve(
        named: Option<String>,
        revision: String,
        download_dir: Option<PathBuf>,
    ) -> ModelSource {
        match named {
            None => ModelSource::Bundled,
            Some(name) if name == "tiny" => ModelSource::Bundled,
            Some(name) if looks_like_path(&name) => ModelSource::Folder(PathBuf::from(name)),
            Some(id) => ModelSource::Hub { id, revision, hub: HubSettings::from_env(download_dir) },
        }
    }
}

fn looks_like_path(name: &str) -> bool {
    let explicit = name.starts_with(['/', '.', '~']) || name.matches('/').count() != 1;
    explicit || PathBuf::from(name).is_dir()
}

fn check(
    flag: &'static str,
    value: impl Display,
    holds: bool,
    expected: &'static str,
) -> Result<(), ConfigError> {
    if holds {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { flag, value: value.to_string(), expected })
    }
}

fn parse_block_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ (8 | 16 | 32)) => Ok(size),
        _ => Err("the block size is 8, 16 or 32".to_owned()),
    }
}

/// Parses `4096`, `32k` (×1,000) or `32K` (×1,024) tokens.
fn parse_tokens(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, if text.ends_with('k') { 1000 } else { 1024 }),
        None => (text, 1),
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| format!("`{text}` is not a number of tokens like 4096 or 32k"))
}

/// Parses bytes with an optional binary suffix K, M, G or T.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim_end_matches(['B', 'b']).trim_end_matches('i');
    let (digits, shift) = match trimmed.chars().last() {
        Some('k' | 'K') => (&trimmed[..trimmed.len() - 1], 10),
        Some('m' | 'M') => (&trimmed[..trimmed.len() - 1], 20),
        Some('g' | 'G') => (&trimmed[..trimmed.len() - 1], 30),
        Some('t' | 'T') => (&trimmed[..trimmed.len() - 1], 40),
        _ => (trimmed, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is not a size like 1073741824, 512M or 4G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_accept_binary_suffixes() {
        assert_eq!(parse_bytes("512M"), Ok(512 << 20));
        assert_eq!(parse_bytes("4GiB"), Ok(4 << 30));
        assert_eq!(parse_bytes("17"), Ok(17));
        assert!(parse_bytes("lots").is_err());
        assert!(parse_bytes("").is_err());
    }

    #[test]
    fn token_counts_accept_both_thousands() {
        assert_eq!(parse_tokens("32k"), Ok(32_000));
        assert_eq!(parse_tokens("32K"), Ok(32_768));
        assert!(parse_tokens("-1").is_err());
    }

    #[test]
    fn a_model_name_is_a_path_or_a_hub_id() {
        let resolve = |name: &str| ModelSource::resolve(Some(name.into()), "main".into(), None);
        assert!(matches!(resolve("./x"), ModelSource::Folder(_)));
        assert!(matches!(resolve("/a/b"), ModelSource::Folder(_)));
        assert!(matches!(resolve("owner/name"), ModelSource::Hub { .. }));
        assert_eq!(resolve("tiny"), ModelSource::Bundled);
    }
}
