//! The compute seam: every operation a decoder needs, as one object-safe trait.
//!
//! Outputs come first, inputs next, scalars last; every argument struct checks its shapes
//! once, in `args`. Operations write into the caller's tensors and allocate nothing that
//! grows with the step. `reference` is the referee that every backend is tested against.
//! Knows nothing of models, sequences or files.
//!
//! A device may have memory of its own, and may compute while the host goes on. So tensors are
//! made by the operations that will use them, weights are placed, inputs of a step are [`staged`],
//! and whoever wants to know that a step was computed asks [`Ops::synchronize`]. How an operation
//! is launched may depend on the shapes and scalars of its arguments alone: what lies in a
//! device's memory cannot be looked at.

pub mod args;
pub mod cpu;
pub mod cuda;
mod error;
pub mod kv_tensor;
pub mod random;
mod recording;
pub mod reference;
pub mod staged;

use crate::formats::PackedMatrix;
use crate::output::SampledToken;
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};
use args::*;
pub use error::OpsError;
pub use recording::Recording;

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemoryInfo {
    /// What nobody has taken.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// The largest step, for those who need memory beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows of activations.
    pub max_num_tokens: usize,
    /// Sequences.
    pub max_num_seqs: usize,
    /// Tokens of a sequence, cached and new.
    pub max_context_len: usize,
    /// Columns of the widest activations that a matrix multiplies.
    pub max_width: usize,
    /// Query heads of the layer that has most.
    pub num_heads: usize,
    /// Elements of the longest head.
    pub head_dim: usize,
    /// Rows of logits.
    pub max_logit_rows: usize,
    /// Columns of logits.
    pub vocab_size: usize,
    /// Elements of a row of the residual stream.
    pub hidden_size: usize,
    /// Experts of the layer that has most.
    pub num_experts: usize,
    /// Most experts that compute a token.
    pub experts_per_token: usize,
    /// Width of the widest expert.
    pub expert_width: usize,
}

/// A layer of a model and its cache, as far as kernels depend on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Elements of a cached vector.
    pub head_dim: usize,
    /// With latent attention, what a cached vector is made of, and a head.
    pub latent: Option<LatentShape>,
    /// Elements of a row of the residual stream.
    pub hidden_size: usize,
    /// Elements of the KV cache.
    pub kv_dtype: DType,
    /// Tokens of a KV block.
    pub block_size: usize,
}

/// A layer of latent attention, as far as kernels depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Elements of a latent.
    pub rank: usize,
    /// Elements of a key that rotate.
    pub rope_dim: usize,
    /// Elements of a head's query that do not.
    pub nope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
}

/// One device's implementation of the operations.
pub trait Ops: Send + Sync {
    /// Name for logs, for example `cpu (avx512, 2 threads)`.
    fn name(&self) -> String;

    /// For people: what computes what on this device, and up to which sizes.
    fn choices(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// The dtype of activations on this device.
    fn activation_dtype(&self) -> DType;

    /// Bytes that the device may still give and has at all; `None` where its memory is the host's.
    fn device_memory(&self) -> Result<Option<DeviceMemoryInfo>, OpsError> {
        Ok(None)
    }

    /// Takes this much of the device's memory in one piece for tensors that will be made; nothing
    /// where memory is the host's.
    fn set_aside(&self, bytes: usize) -> Result<(), OpsError> {
        let _ = bytes;
        Ok(())
    }

    /// A new tensor of zero bytes for activations.
    fn zeros(&self, dtype: DType, shape: Shape) -> Result<Tensor, OpsError> {
        Ok(Tensor::zeros_on_large_pages(dtype, shape))
    }

    /// A new tensor of zero bytes for cached keys or values, or their scales.
    fn zeros_kv(&self, dtype: DType, shape: Shape) -> Result<Tensor, OpsError> {
        Ok(kv_tensor::host_zeros(dtype, shape))
    }

    /// Brings a norm's weight, a bias or a table, at load, to where operations read it.
    fn place(&self, tensor: Tensor) -> Result<Tensor, OpsError> {
        Ok(tensor)
    }

    /// Memory beside a host tensor, into which [`Ops::upload`] copies what operations shall read;
    /// `None` where they read the host's.
    fn mirror(&self, host: &Tensor) -> Result<Option<Tensor>, OpsError> {
        let _ = host;
        Ok(None)
    }

    /// Copies the host's elements into a mirror, in order with the operations around it. The
    /// host's may change as soon as this returns.
    fn upload(&self, mut to: ViewMut<'_>, from: View<'_>) {
        to.reborrow().into_rows(0..from.size(0)).copy_from(from);
    }

    /// Copies a tensor's bytes to the host, once everything before has run. After an error they
    /// are worthless.
    fn download(&self, to: &mut [u8], from: View<'_>) {
        to.copy_from_slice(from.bytes());
    }

    /// Waits for everything that was asked for. An error names the first operation that failed;
    /// what was computed after it is worthless, and so is what will be.
    fn synchronize(&self) -> Result<(), OpsError> {
        Ok(())
    }

    /// Whether operations return before they have run, so that the host has time for other things.
    fn runs_beside_host(&self) -> bool {
        false
    }

    /// Whether a step can be recorded once and replayed with other inputs.
    fn can_record(&self) -> bool {
        false
    }

    /// Records the operations of a step instead of running them. `None` when one of them failed,
    /// which [`Ops::synchronize`] reports.
    fn record(&self, step: &mut dyn FnMut()) -> Option<Recording> {
        let _ = step;
        None
    }

    /// Runs a recorded step on what lies in its tensors now.
    fn replay(&self, recording: &Recording) {
        let _ = recording;
    }

    /// Refuses a model that this device has no kernels for, before anything is allocated for it.
    fn check(&self, limits: &StepLimits, layer: &LayerShape) -> Result<(), OpsError> {
        let _ = (limits, layer);
        Ok(())
    }

    /// Bytes that [`Ops::reserve`] will take for steps of this size.
    fn scratch_bytes(&self, limits: &StepLimits) -> usize {
        let _ = limits;
        0
    }

    /// Makes room for steps of up to this size, so that no later operation has to; backends that
    /// need none do nothing.
    fn reserve(&self, limits: &StepLimits) -> Result<(), OpsError> {
        let _ = limits;
        Ok(())
    }

    /// Brings a matrix, at load, to where and into the layout that this device multiplies by
    /// fastest; its values stay the same. Refuses one that it has no kernels for.
    fn arrange(&self, matrix: PackedMatrix) -> Result<PackedMatrix, OpsError> {
        Ok(matrix)
    }

    /// Brings matrices of heads, `[num_heads, out_features, in_features]`, at load, to where and
    /// into the dtype in which [`Ops::head_matmul`] reads them.
    fn place_heads(&self, matrices: Tensor) -> Result<Tensor, OpsError> {
        self.place(matrices)
    }

    /// Makes one thing of the experts of a layer, at load, whose matrices were arranged. Refuses
    /// those that this device cannot multiply together.
    fn index_experts(&self, experts: Vec<Expert>) -> Result<Experts, OpsError> {
        Ok(Experts::from(experts))
    }

    /// Rows of [`ExpertScratch`] that [`Ops::expert_mlp`] needs for so many tokens; none where
    /// [`Ops::reserve`] makes its room.
    fn expert_rows(&self, num_tokens: usize) -> usize {
        num_tokens
    }

    /// Bytes that a floating-point matrix of this dtype and shape takes once arranged.
    fn arranged_bytes(&self, dtype: DType, shape: [usize; 2]) -> usize {
        shape.iter().product::<usize>() * dtype.size_bytes()
    }

    /// `out[t, :] = table[token_ids[t], :]`.
    fn embed(&self, args: EmbedArgs<'_>);

    /// `out = x / rms(x) * weight`, over the last axis.
    fn norm(&self, args: NormArgs<'_>);

    /// `residual += x; out = residual / rms(residual) * weight`.
    fn add_norm(&self, args: AddNormArgs<'_>);

    /// `out = (x - mean(x)) / deviation(x) * weight (+ bias)`, over the last axis; with a residual,
    /// `residual += x` first, and it is normalised.
    fn layer_norm(&self, args: LayerNormArgs<'_>);

    /// Rotates query and key heads in place by the angles of their positions.
    fn rope(&self, args: RopeArgs<'_>);

    /// `out = x · weightᵀ (+ bias)`.
    fn matmul(&self, args: MatmulArgs<'_>);

    /// A norm, then [`Ops::matmul`] of what it yields; the same bits as both one after the other.
    fn norm_matmul(&self, args: MatmulArgs<'_, NormedRows<'_>>) {
        args.check();
        self.matmul(args.map_x(|rows| rows.run(self)));
    }

    /// `out = activation(x · gateᵀ) * (x · upᵀ)`.
    fn gated_matmul(&self, args: GatedMatmulArgs<'_>) {
        gated_in_steps(self, args);
    }

    /// `out = x · weightᵀ` of codes as they are, what products of them are measured against: E4M3 with
    /// sums in `out`'s dtype, or bytes with sums of 32 bits, whose bits a `u32` holds. False, and
    /// nothing done, where a device's library has no such product.
    fn multiply_codes(&self, out: ViewMut<'_>, x: View<'_>, weight: View<'_>) -> bool {
        let _ = (out, x, weight);
        false
    }

    /// `out = (activation(x · gateᵀ) * (x · upᵀ)) · downᵀ`.
    fn gated_mlp(&self, args: GatedMlpArgs<'_>) {
        mlp_in_steps(self, args);
    }

    /// A norm, then [`Ops::gated_mlp`] of what it yields; the same bits as both one after the other.
    fn norm_mlp(&self, args: GatedMlpArgs<'_, NormedRows<'_>>) {
        args.check();
        self.gated_mlp(args.map_x(|rows| rows.run(self)));
    }

    /// Chooses experts for every token, and what their results are multiplied by.
    fn route_experts(&self, args: RouteExpertsArgs<'_>);

    /// `out[t] = Σ weights[t, i] · mlp of expert expert_ids[t, i] (x[t])`, added up in ascending
    /// order of the experts' ids.
    fn expert_mlp(&self, args: ExpertMlpArgs<'_>);

    /// `out = activation(gate) * up`.
    fn gated_activation(&self, args: GatedActivationArgs<'_>);

    /// Stores keys and values of new tokens at their slots.
    fn write_kv(&self, args: WriteKvArgs<'_>);

    /// [`Ops::rope`], then [`Ops::write_kv`] of the rotated keys.
    fn rope_and_write_kv(&self, args: RopeKvArgs<'_>) {
        args.in_steps(self);
    }

    /// Causal attention of new tokens over the paged KV cache.
    fn attention(&self, args: AttentionArgs<'_>);

    /// `out[r, h, :n] = weight[h] · x[r, h, :k]`: a matrix per head.
    fn head_matmul(&self, args: HeadMatmulArgs<'_>);

    /// Normalises latents, rotates their keys and the queries, and stores the former at the tokens'
    /// slots.
    fn write_latent(&self, args: WriteLatentArgs<'_>);

    /// Causal attention of new tokens over a paged cache whose vectors are key and value of all
    /// heads.
    fn latent_attention(&self, args: LatentAttentionArgs<'_>);

    /// `out += x`.
    fn add(&self, args: AddArgs<'_>);

    /// `out[i, :] = x[rows[i], :]`.
    fn gather_rows(&self, args: GatherRowsArgs<'_>);

    /// Copies whole KV blocks (copy-on-write).
    fn copy_blocks(&self, args: CopyBlocksArgs<'_>);

    /// Chooses the row of `weight` with the largest `x · weightᵀ (+ bias)` for every row of `x`, as
    /// [`Ops::sample`] would for a [greedy](SampleRow::is_plain_greedy) row of these logits, which
    /// are not written. `None`, and nothing done, where a device has no kernels for that.
    fn greedy(&self, args: GreedyArgs<'_>) -> Option<Vec<u32>> {
        let _ = args;
        None
    }

    /// `x = cap · tanh(x / cap)`, element by element, in place.
    fn soft_cap(&self, args: SoftCapArgs<'_>);

    /// Chooses (or scores) one token per row of logits.
    fn sample(&self, args: SampleArgs<'_>) -> Vec<SampledToken>;
}

/// A gated MLP as a gated matmul, then a matmul.
pub fn mlp_in_steps<O: Ops + ?Sized>(ops: &O, args: GatedMlpArgs<'_>) {
    args.check();
    let GatedMatmulArgs { out: mut middle, x, gate, up, activation, scratch } = args.gated;
    let out = middle.reborrow();
    ops.gated_matmul(GatedMatmulArgs { out, x, gate, up, activation, scratch });
    ops.matmul(MatmulArgs { x: middle.as_view(), projections: vec![args.down] });
}

/// A gated matmul as a matmul of two projections into the scratch tensors, then the activation.
pub fn gated_in_steps<O: Ops + ?Sized>(ops: &O, args: GatedMatmulArgs<'_>) {
    args.check();
    let GatedMatmulArgs { out, x, gate, up, activation, scratch: [mut gate_out, mut up_out] } =
        args;
    let projections = vec![
        Projection { out: gate_out.reborrow(), weight: gate.0, bias: gate.1 },
        Projection { out: up_out.reborrow(), weight: up.0, bias: up.1 },
    ];
    ops.matmul(MatmulArgs { x, projections });
    let (gate, up) = (gate_out.as_view(), up_out.as_view());
    ops.gated_activation(GatedActivationArgs { out, gate, up, activation });
}
