//! The memory plan: how many bytes go where, decided once before anything is allocated.
//!
//! Weights, workspace and KV blocks are all that the engine ever allocates in proportion to a
//! model or a step, so a plan that fits at start fits for good.

use std::fmt;

use super::recorded::MOST_PADDING;
use crate::config::{CacheConfig, KvCacheDtype, SchedulerConfig};
use crate::model::batch::{BatchLimits, ForwardBatch};
use crate::model::kv_cache::KvCache;
use crate::model::spec::{LatentInputs, ModelSpec};
use crate::model::workspace::Workspace;
use crate::ops::{DeviceMemoryInfo, LayerShape, Ops, OpsError, StepLimits};
use crate::tensor::DType;

/// Most bytes that one round of logits may take.
const LOGITS_BYTES: usize = 128 << 20;

/// Bytes that recorded steps may take on a device: some hundred, of some hundred launches each.
const RECORDINGS_BYTES: usize = 256 << 20;

/// What a device may take beyond what tensors need: pages are 2 MiB, two pieces are set aside
/// (`ops::cuda::driver`), and tensors that nobody planned begin a third.
const ROUNDING_BYTES: usize = 24 << 20;

/// A tensor begins at a multiple of this on any device.
const TENSOR_ALIGN: usize = 256;

/// Memory for the KV cache.
struct Pool {
    bytes: usize,
    /// The flag that would change it.
    flag: &'static str,
}

/// What is to be served.
#[derive(Clone, Copy, Debug)]
pub struct MemoryDemand<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// Bytes of its weights.
    pub weights_bytes: usize,
    /// `--max-model-len`.
    pub wanted_len: Option<usize>,
    /// How the cache is to be.
    pub cache: &'a CacheConfig,
    /// How large steps may be.
    pub scheduler: &'a SchedulerConfig,
}

/// The decided sizes.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// Bytes of weights.
    pub weights_bytes: usize,
    /// Bytes of activations, logits and step inputs.
    pub workspace_bytes: usize,
    /// Bytes of a device that are no tensor's: recorded steps, and what is rounded up.
    pub overhead_bytes: usize,
    /// KV blocks in the pool.
    pub num_blocks: usize,
    /// Blocks beside the pool, for the rows with which recorded steps are filled up.
    pub spare_blocks: usize,
    /// Bytes of one block over all layers.
    pub block_bytes: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Element type of the KV cache.
    pub kv_dtype: DType,
    /// Longest prompt plus output.
    pub max_model_len: usize,
    /// The largest step.
    pub limits: BatchLimits,
    /// Rows of logits computed at once.
    pub max_logit_rows: usize,
}

/// The model cannot be served within the given memory.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MemoryPlanError {
    /// Not even one sequence of the wanted length fits.
    #[error(
        "--max-model-len {max_model_len} needs {} of KV cache, but only {} is available; lower \
         --max-model-len to at most {fits} or raise --{flag}",
        Bytes(*needed), Bytes(*available)
    )]
    ContextTooLong {
        /// What was asked for.
        max_model_len: usize,
        /// Bytes for one such sequence.
        needed: usize,
        /// Bytes for the pool.
        available: usize,
        /// The longest context that fits.
        fits: usize,
        /// What decides how much there is.
        flag: &'static str,
    },
    /// Not even one block fits.
    #[error(
        "the KV cache has {} but one block needs {}; raise --{flag}",
        Bytes(*available), Bytes(*block_bytes)
    )]
    NoBlock {
        /// Bytes for the pool.
        available: usize,
        /// Bytes of one block.
        block_bytes: usize,
        /// What decides how much there is.
        flag: &'static str,
    },
    /// A device is too small even without a cache, or too full.
    #[error(
        "weights ({}) and workspace ({}) do not fit into the {} that --gpu-memory-utilization \
         leaves of {}; quantize the weights (--quantization), lower --max-num-batched-tokens, or \
         end what else is using the GPU",
        Bytes(*weights), Bytes(*workspace), Bytes(*usable), Bytes(*total)
    )]
    NoRoom {
        /// Bytes of weights.
        weights: usize,
        /// Bytes of activations, logits, step inputs and recorded steps.
        workspace: usize,
        /// What this process may take.
        usable: usize,
        /// All memory of the device.
        total: usize,
    },
    /// The device does not say what it has, or has no kernels for the model.
    #[error(transparent)]
    Device(#[from] OpsError),
    /// A context longer than the model's positions.
    #[error(
        "--max-model-len {max_model_len} is longer than the model's {max_position} positions \
         (max_position_embeddings in config.json); lower it"
    )]
    BeyondPositions {
        /// What was asked for.
        max_model_len: usize,
        /// What the model has.
        max_position: usize,
    },
}

impl MemoryPlan {
    /// Decides. `free_bytes` is what this machine can still give when the weights are in memory.
    pub fn new(
        ops: &dyn Ops,
        demand: &MemoryDemand<'_>,
        free_bytes: u64,
    ) -> Result<MemoryPlan, MemoryPlanError> {
        let &MemoryDemand { spec, weights_bytes, wanted_len, cache, scheduler } = demand;
        let max_position = spec.max_position;
        if let Some(max_model_len) = wanted_len.filter(|&len| len > max_position) {
            return Err(MemoryPlanError::BeyondPositions { max_model_len, max_position });
        }
        let kv_dtype = kv_dtype(cache.dtype, spec.dtype, ops.activation_dtype());
        let block_size = cache.block_size;
        let block_bytes = KvCache::block_bytes(spec, block_size, kv_dtype);
        let longest = wanted_len.unwrap_or(max_position);
        let max_num_tokens = scheduler.max_num_batched_tokens;
        let device = ops.device_memory()?;
        let mut plan = MemoryPlan {
            weights_bytes,
            workspace_bytes: 0,
            overhead_bytes: device.map_or(0, |_| overhead(ops, spec)),
            num_blocks: 0,
            spare_blocks: spare_blocks(ops, block_size),
            block_bytes,
            block_size,
            kv_dtype,
            max_model_len: longest,
            limits: BatchLimits {
                max_num_tokens,
                max_num_seqs: scheduler.max_num_seqs,
                max_blocks_per_seq: longest.div_ceil(block_size),
            },
            max_logit_rows: most_logit_rows(ops, spec.vocab_size, scheduler),
        };
        for layer in &spec.layers {
            let layer = LayerShape {
                head_dim: layer.attention.head_dim,
                latent: layer.attention.latent().map(LatentInputs::kernel_shape),
                hidden_size: spec.hidden_size,
                kv_dtype,
                block_size,
            };
            ops.check(&plan.step_limits(spec), &layer)?;
        }
        plan.workspace_bytes = plan.workspace(ops, spec);
        let pool = plan.pool(device, cache, plan.most_used(), free_bytes)?;
        plan.give(&pool, wanted_len)?;
        plan.workspace_bytes = plan.workspace(ops, spec);
        Ok(plan)
    }

    /// The same when the weights are in memory: a device says what is left beside them, and the KV
    /// cache gets no more than that.
    pub fn with_weights_loaded(
        mut self,
        ops: &dyn Ops,
        demand: &MemoryDemand<'_>,
    ) -> Result<MemoryPlan, MemoryPlanError> {
        let Some(now) = ops.device_memory()? else { return Ok(self) };
        // As if the weights that are there had yet to come.
        let device = DeviceMemoryInfo { free: now.free + self.weights_bytes as u64, ..now };
        let pool = self.pool(Some(device), demand.cache, self.most_used(), 0)?;
        self.give(&pool, demand.wanted_len)?;
        Ok(self)
    }

    /// Bytes that all sequences could ever cache.
    fn most_used(&self) -> usize {
        let blocks_per_seq = self.max_model_len.div_ceil(self.block_size);
        self.limits.max_num_seqs * blocks_per_seq * self.block_bytes
    }

    /// Makes blocks of the pool; the context gets as long as they allow.
    fn give(&mut self, pool: &Pool, wanted_len: Option<usize>) -> Result<(), MemoryPlanError> {
        let longest = self.max_model_len;
        self.num_blocks = (pool.bytes / self.block_bytes).saturating_sub(self.spare_blocks);
        let fits = context_that_fits(wanted_len, longest, self.num_blocks, self.block_size);
        self.max_model_len = fits.ok_or_else(|| self.refuse(pool))?;
        self.limits.max_blocks_per_seq = self.max_model_len.div_ceil(self.block_size);
        Ok(())
    }

    /// Bytes of everything but weights and KV blocks.
    fn workspace(&self, ops: &dyn Ops, spec: &ModelSpec) -> usize {
        let max_num_tokens = self.limits.max_num_tokens;
        Workspace::size_bytes(ops, spec, max_num_tokens, self.max_logit_rows)
            + ForwardBatch::size_bytes(self.limits)
            + ops.scratch_bytes(&self.step_limits(spec))
    }

    /// Bytes in which all weights find room one after the other.
    pub fn room_for_weights(&self, spec: &ModelSpec) -> usize {
        self.weights_bytes + weights_padding(spec)
    }

    /// Bytes in which everything else finds room one after the other.
    pub fn room_beside_weights(&self, spec: &ModelSpec) -> usize {
        let blocks = (self.num_blocks + self.spare_blocks) * self.block_bytes;
        self.workspace_bytes + blocks + other_padding(spec)
    }

    /// How much the KV cache takes. `most_used` bounds what it could ever need.
    fn pool(
        &self,
        device: Option<DeviceMemoryInfo>,
        cache: &CacheConfig,
        most_used: usize,
        free_bytes: u64,
    ) -> Result<Pool, MemoryPlanError> {
        let Some(DeviceMemoryInfo { free, total }) = device else {
            let share = (free_bytes as f64 * cache.fraction) as u64;
            let bytes = cache.memory_bytes.unwrap_or(share.min(most_used as u64)) as usize;
            return Ok(Pool { bytes, flag: "kv-cache-memory" });
        };
        let allowed = (total as f64 * cache.gpu_memory_utilization) as u64;
        let usable = allowed.saturating_sub(total - free) as usize;
        let weights = self.weights_bytes;
        let workspace = self.workspace_bytes + self.overhead_bytes;
        let Some(rest) = usable.checked_sub(weights + workspace) else {
            return Err(MemoryPlanError::NoRoom {
                weights,
                workspace,
                usable,
                total: total as usize,
            });
        };
        let spare = self.spare_blocks * self.block_bytes;
        Ok(match cache.memory_bytes {
            Some(wanted) => Pool { bytes: rest.min(wanted as usize), flag: "kv-cache-memory" },
            None => Pool { bytes: rest.min(most_used + spare), flag: "gpu-memory-utilization" },
        })
    }

    fn refuse(&self, pool: &Pool) -> MemoryPlanError {
        let &Pool { bytes: available, flag } = pool;
        if self.num_blocks == 0 {
            return MemoryPlanError::NoBlock { available, block_bytes: self.block_bytes, flag };
        }
        MemoryPlanError::ContextTooLong {
            max_model_len: self.max_model_len,
            needed: self.max_model_len.div_ceil(self.block_size) * self.block_bytes,
            available,
            fits: self.num_blocks * self.block_size,
            flag,
        }
    }

    /// What operations must have room for.
    pub fn step_limits(&self, spec: &ModelSpec) -> StepLimits {
        let attentions = || spec.layers.iter().map(|layer| &layer.attention);
        StepLimits {
            max_num_tokens: self.limits.max_num_tokens,
            max_num_seqs: self.limits.max_num_seqs,
            max_context_len: self.max_model_len,
            max_width: spec.widest_input(),
            num_heads: attentions().map(|a| a.num_heads).max().unwrap_or(0),
            head_dim: attentions().map(|a| a.head_dim).max().unwrap_or(0),
            max_logit_rows: self.max_logit_rows,
            vocab_size: spec.vocab_size,
            hidden_size: spec.hidden_size,
            num_experts: spec.num_experts(),
            experts_per_token: spec.experts_per_token(),
            expert_width: spec.expert_width(),
        }
    }
}

/// A typed length must fit as it is; the model's own limit may be lowered to what fits.
fn context_that_fits(
    wanted: Option<usize>,
    longest: usize,
    num_blocks: usize,
    block_size: usize,
) -> Option<usize> {
    let capacity = num_blocks * block_size;
    match wanted {
        Some(len) => (len <= capacity).then_some(len),
        None => (capacity >= 2).then_some(longest.min(capacity)),
    }
}

/// What tensors do not get of a device's memory.
fn overhead(ops: &dyn Ops, spec: &ModelSpec) -> usize {
    let recorded = if ops.can_record() { RECORDINGS_BYTES } else { 0 };
    recorded + ROUNDING_BYTES + weights_padding(spec) + other_padding(spec)
}

/// Bytes between weights. A quantized one is three tensors.
fn weights_padding(spec: &ModelSpec) -> usize {
    3 * spec.expected_tensors().len() * TENSOR_ALIGN
}

/// Bytes between what lies beside weights: some hundred tensors, and up to four per layer's cache.
fn other_padding(spec: &ModelSpec) -> usize {
    (128 + 4 * spec.layers.len()) * TENSOR_ALIGN
}

/// Rows of logits that have room at once. A recorded step computes those of all of its rows.
fn most_logit_rows(ops: &dyn Ops, vocab_size: usize, scheduler: &SchedulerConfig) -> usize {
    let least = if ops.can_record() { scheduler.max_num_seqs } else { 1 };
    let fitting = LOGITS_BYTES / (4 * vocab_size);
    fitting.min(1024).max(least).min(scheduler.max_num_batched_tokens)
}

/// Blocks for the rows that fill a recorded step up: every row writes a slot of its own.
fn spare_blocks(ops: &dyn Ops, block_size: usize) -> usize {
    if ops.can_record() { MOST_PADDING.div_ceil(block_size) } else { 0 }
}

/// Exact weights want an exact cache, where activations are exact too.
fn kv_dtype(wanted: KvCacheDtype, weights: DType, activations: DType) -> DType {
    match wanted {
        KvCacheDtype::Auto if (weights, activations) == (DType::F32, DType::F32) => DType::F32,
        KvCacheDtype::Auto | KvCacheDtype::Bf16 => DType::BF16,
        KvCacheDtype::F16 => DType::F16,
        KvCacheDtype::F32 => DType::F32,
        KvCacheDtype::Int8 => DType::I8,
        KvCacheDtype::Fp8 => DType::Fp8,
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "weights {}, KV cache {} ({} blocks × {} tokens, {}), workspace {}",
            Bytes(self.weights_bytes),
            Bytes(self.num_blocks * self.block_bytes),
            self.num_blocks,
            self.block_size,
            self.kv_dtype,
            Bytes(self.workspace_bytes + self.overhead_bytes),
        )
    }
}

/// Bytes for people: three digits and a binary unit.
pub struct Bytes(pub usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut unit = "B";
        for next in ["KiB", "MiB", "GiB", "TiB"] {
            if value < 1024.0 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        let decimals = if unit == "B" || value >= 100.0 { 0 } else { 1 };
        write!(f, "{value:.decimals$} {unit}")
    }
}

/// Bytes that this process may still take: what the system has available, or less when the
/// process lives in a memory-limited control group.
pub fn free_memory_bytes() -> u64 {
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024)
    });
    let read = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = read("/sys/fs/cgroup/memory.max")
        .zip(read("/sys/fs/cgroup/memory.current"))
        .map(|(max, current)| max.saturating_sub(current));
    // Where neither can be read (not Linux), plan for a small machine.
    let system = system.unwrap_or(4 << 30);
    group.map_or(system, |group| group.min(system))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    /// A plan of 10 GiB of weights and 1 GiB of workspace.
    fn plan() -> MemoryPlan {
        MemoryPlan {
            weights_bytes: 10 * GIB,
            workspace_bytes: GIB - (1 << 20),
            overhead_bytes: 1 << 20,
            num_blocks: 0,
            spare_blocks: 2,
            block_bytes: 1 << 20,
            block_size: 16,
            kv_dtype: DType::BF16,
            max_model_len: 4096,
            limits: BatchLimits { max_num_tokens: 64, max_num_seqs: 8, max_blocks_per_seq: 256 },
            max_logit_rows: 64,
        }
    }

    fn config(memory_bytes: Option<u64>) -> CacheConfig {
        CacheConfig {
            memory_bytes,
            fraction: 0.5,
            gpu_memory_utilization: 0.75,
            block_size: 16,
            dtype: KvCacheDtype::Auto,
            enable_prefix_caching: true,
        }
    }

    /// Bytes of the pool on a GPU of 32 GiB, of which others have taken some.
    fn on_gpu(taken: usize, wanted: Option<u64>, most_used: usize) -> Result<usize, String> {
        let device = DeviceMemoryInfo { free: (32 * GIB - taken) as u64, total: 32 << 30 };
        let pool = plan().pool(Some(device), &config(wanted), most_used, 0);
        pool.map(|pool| pool.bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn on_a_gpu_the_cache_takes_what_weights_workspace_and_others_leave() {
        assert_eq!(on_gpu(0, None, 100 * GIB), Ok(13 * GIB));
        assert_eq!(on_gpu(2 * GIB, None, 100 * GIB), Ok(11 * GIB));
        assert_eq!(on_gpu(0, None, GIB), Ok(GIB + (2 << 20)), "and blocks to fill steps up");
        assert_eq!(on_gpu(0, Some(4 << 30), 100 * GIB), Ok(4 * GIB));
        assert_eq!(on_gpu(0, Some(40 << 30), 100 * GIB), Ok(13 * GIB));
    }

    #[test]
    fn a_gpu_that_is_too_full_is_refused_with_numbers() {
        let refusal = on_gpu(20 * GIB, None, GIB).unwrap_err();
        assert!(
            refusal.starts_with(
                "weights (10.0 GiB) and workspace (1.0 GiB) do not fit into the 4.0 GiB that \
                 --gpu-memory-utilization leaves of 32.0 GiB"
            ),
            "{refusal}"
        );
    }

    #[test]
    fn on_a_cpu_the_cache_takes_a_fraction_of_what_is_free() {
        let pool = |wanted, most_used| {
            let free = 8 << 30;
            plan().pool(None, &config(wanted), most_used, free).map(|pool| pool.bytes).unwrap()
        };
        assert_eq!(pool(None, 100 * GIB), 4 * GIB);
        assert_eq!(pool(None, GIB), GIB);
        assert_eq!(pool(Some(6 << 30), GIB), 6 * GIB);
    }

    #[test]
    fn bytes_are_short_to_read() {
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Bytes(18 << 20).to_string(), "18.0 MiB");
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
    }

    #[test]
    fn a_typed_context_must_fit_but_the_models_own_may_shrink() {
        assert_eq!(context_that_fits(Some(64), 64, 4, 16), Some(64));
        assert_eq!(context_that_fits(Some(65), 65, 4, 16), None);
        assert_eq!(context_that_fits(None, 4096, 4, 16), Some(64));
        assert_eq!(context_that_fits(None, 4096, 0, 16), None);
    }
}
