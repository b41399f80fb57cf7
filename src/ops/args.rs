//! Arguments of the operations: every tensor named, every shape checked once.
//!
//! `check` panics on a mismatch: by then a wrong shape is our mistake, never a user's.
//! Backends call it first and trust it afterwards.

mod experts;
mod latent;
mod matmul;
mod sampling;

pub use experts::*;
pub use latent::*;
pub use matmul::*;
pub use sampling::*;

use super::kv_tensor::{KvView, KvViewMut};
use crate::formats::PackedMatrix;
use crate::tensor::{DType, Shape, View, ViewMut};

/// See [`super::Ops::embed`].
pub struct EmbedArgs<'a> {
    /// `[num_tokens, hidden_size]`, activation dtype.
    pub out: ViewMut<'a>,
    /// `[vocab_size, hidden_size]` in any format.
    pub table: &'a PackedMatrix,
    /// `[num_tokens]`, u32; each below `vocab_size`.
    pub token_ids: View<'a>,
}

impl EmbedArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.size(0), self.token_ids.size(0), "embed: rows of out and token_ids");
        assert_eq!(self.out.size(1), self.table.num_cols, "embed: hidden size");
        assert_eq!(self.token_ids.dtype(), DType::U32, "embed: token_ids");
    }
}

/// See [`super::Ops::norm`].
pub struct NormArgs<'a> {
    /// `[num_rows, width]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, width]`.
    pub x: View<'a>,
    /// `[width]`, any float dtype.
    pub weight: View<'a>,
    /// Added to the mean square before the root.
    pub eps: f32,
}

impl NormArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.shape(), self.x.shape(), "norm: out and x");
        assert_eq!(self.weight.shape().sizes(), &[self.x.size(1)], "norm: weight");
    }
}

/// See [`super::Ops::add_norm`].
pub struct AddNormArgs<'a> {
    /// `[num_rows, width]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, width]`, updated in place.
    pub residual: ViewMut<'a>,
    /// `[num_rows, width]`.
    pub x: View<'a>,
    /// `[width]`, any float dtype.
    pub weight: View<'a>,
    /// Added to the mean square before the root.
    pub eps: f32,
}

impl AddNormArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.shape(), self.x.shape(), "add_norm: out and x");
        assert_eq!(self.residual.shape(), self.x.shape(), "add_norm: residual and x");
        assert_eq!(self.weight.shape().sizes(), &[self.x.size(1)], "add_norm: weight");
    }
}

/// See [`super::Ops::layer_norm`].
pub struct LayerNormArgs<'a> {
    /// `[num_rows, width]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, width]`: what is added to before, updated in place, and normalised then.
    pub residual: Option<ViewMut<'a>>,
    /// `[num_rows, width]`.
    pub x: View<'a>,
    /// `[width]`, any float dtype.
    pub weight: View<'a>,
    /// `[width]`, dtype of `weight`.
    pub bias: Option<View<'a>>,
    /// Added to the variance before the root.
    pub eps: f32,
}

impl LayerNormArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.shape(), self.x.shape(), "layer_norm: out and x");
        if let Some(residual) = &self.residual {
            assert_eq!(residual.shape(), self.x.shape(), "layer_norm: residual and x");
        }
        assert_eq!(self.weight.shape().sizes(), &[self.x.size(1)], "layer_norm: weight");
        if let Some(bias) = self.bias {
            assert_eq!(bias.shape(), self.weight.shape(), "layer_norm: bias");
            assert_eq!(bias.dtype(), self.weight.dtype(), "layer_norm: dtype of bias");
        }
    }
}

/// Which elements of a head form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Element `i` pairs with `i + rotary_dim / 2` (Llama as published on the hub, Qwen, Mistral).
    Halves,
    /// Element `2 i` pairs with `2 i + 1` (GPT-J).
    Interleaved,
}

/// See [`super::Ops::rope`]. Elements of a head beyond `rotary_dim` stay as they are.
pub struct RopeArgs<'a> {
    /// `[num_tokens, num_heads, head_dim]`, rotated in place.
    pub q: ViewMut<'a>,
    /// `[num_tokens, num_kv_heads, head_dim]`, rotated in place.
    pub k: ViewMut<'a>,
    /// `[num_tokens]`, u32.
    pub positions: View<'a>,
    /// `[max_position, rotary_dim / 2]`, f32.
    pub cos: View<'a>,
    /// `[max_position, rotary_dim / 2]`, f32.
    pub sin: View<'a>,
    /// Pairing.
    pub style: RopeStyle,
}

impl RopeArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        let num_tokens = self.positions.size(0);
        assert_eq!(self.q.size(0), num_tokens, "rope: tokens of q");
        assert_eq!(self.k.size(0), num_tokens, "rope: tokens of k");
        assert_eq!(self.q.size(2), self.k.size(2), "rope: head_dim");
        assert_eq!(self.cos.shape(), self.sin.shape(), "rope: tables");
        assert!(2 * self.cos.size(1) <= self.q.size(2), "rope: rotary_dim exceeds head_dim");
    }
}

/// The non-linearity of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the tanh approximation.
    GeluTanh,
    /// Exact GELU.
    Gelu,
}

/// See [`super::Ops::gated_activation`].
pub struct GatedActivationArgs<'a> {
    /// `[num_rows, width]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, width]`.
    pub gate: View<'a>,
    /// `[num_rows, width]`.
    pub up: View<'a>,
    /// Applied to `gate`.
    pub activation: Activation,
}

impl GatedActivationArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.shape(), self.gate.shape(), "gated_activation: out and gate");
        assert_eq!(self.out.shape(), self.up.shape(), "gated_activation: out and up");
    }
}

/// See [`super::Ops::write_kv`]. Slot `s` is row `s % block_size` of block `s / block_size`.
pub struct WriteKvArgs<'a> {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k_cache: KvViewMut<'a>,
    /// As `k_cache`.
    pub v_cache: KvViewMut<'a>,
    /// `[num_tokens, num_kv_heads, head_dim]`.
    pub k: View<'a>,
    /// As `k`.
    pub v: View<'a>,
    /// `[num_tokens]`, u32; all different.
    pub slot_mapping: View<'a>,
}

impl WriteKvArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        check_kv([&self.k_cache, &self.v_cache], self.k.shape(), self.v, self.slot_mapping);
    }
}

/// Panics unless keys of this shape, values, slots and caches agree.
fn check_kv(caches: [&KvViewMut<'_>; 2], k: Shape, v: View<'_>, slot_mapping: View<'_>) {
    let [k_cache, v_cache] = caches;
    assert_eq!(k, v.shape(), "write_kv: k and v");
    k_cache.check("write_kv: k_cache");
    v_cache.check("write_kv: v_cache");
    assert_eq!(k_cache.data.shape(), v_cache.data.shape(), "write_kv: caches");
    assert_eq!(v.size(0), slot_mapping.size(0), "write_kv: slots");
    assert_eq!(v.size(1), k_cache.size(1), "write_kv: kv heads");
    assert_eq!(v.size(2), k_cache.size(3), "write_kv: head_dim");
}

/// See [`super::Ops::rope_and_write_kv`].
pub struct RopeKvArgs<'a> {
    /// What is rotated; the rotated keys are stored.
    pub rope: RopeArgs<'a>,
    /// As `rope.k`.
    pub v: View<'a>,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k_cache: KvViewMut<'a>,
    /// As `k_cache`.
    pub v_cache: KvViewMut<'a>,
    /// `[num_tokens]`, u32; all different.
    pub slot_mapping: View<'a>,
}

impl RopeKvArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        self.rope.check();
        check_kv([&self.k_cache, &self.v_cache], self.rope.k.shape(), self.v, self.slot_mapping);
    }

    /// One after the other.
    pub fn in_steps(self, ops: &(impl super::Ops + ?Sized)) {
        let RopeKvArgs { rope, v, k_cache, v_cache, slot_mapping } = self;
        let RopeArgs { q, mut k, positions, cos, sin, style } = rope;
        ops.rope(RopeArgs { q, k: k.reborrow(), positions, cos, sin, style });
        ops.write_kv(WriteKvArgs { k_cache, v_cache, k: k.as_view(), v, slot_mapping });
    }
}

/// See [`super::Ops::attention`].
///
/// Sequence `s` owns query rows `cu_seqlens_q[s]..cu_seqlens_q[s + 1]`, which are the last
/// tokens of its `context_lens[s]` tokens; all of them are already in the cache.
pub struct AttentionArgs<'a> {
    /// `[num_tokens, num_heads, head_dim]`.
    pub out: ViewMut<'a>,
    /// `[num_tokens, num_heads, head_dim]`.
    pub q: View<'a>,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k_cache: KvView<'a>,
    /// As `k_cache`.
    pub v_cache: KvView<'a>,
    /// `[num_seqs, max_blocks_per_seq]`, u32; entries beyond a sequence's blocks are unread.
    pub block_tables: View<'a>,
    /// `[num_seqs + 1]`, u32.
    pub cu_seqlens_q: View<'a>,
    /// `[num_seqs]`, u32.
    pub context_lens: View<'a>,
    /// Multiplies q·k.
    pub scale: f32,
    /// A query at position p sees keys at positions `p - window + 1 ..= p`.
    pub sliding_window: Option<usize>,
    /// Scaled scores become `cap · tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// `[num_heads]`, f32: a score per head that takes its share of the softmax and brings no
    /// value (the sinks of gpt-oss). It is neither scaled nor capped; -∞ is none.
    pub sinks: Option<View<'a>>,
}

impl AttentionArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.shape(), self.q.shape(), "attention: out and q");
        self.k_cache.check("attention: k_cache");
        self.v_cache.check("attention: v_cache");
        let (k_cache, v_cache) = (self.k_cache.data, self.v_cache.data);
        assert_eq!(k_cache.shape(), v_cache.shape(), "attention: caches");
        assert_eq!(self.q.size(2), self.k_cache.size(3), "attention: head_dim");
        assert_eq!(self.q.size(1) % self.k_cache.size(1), 0, "attention: heads per kv head");
        assert!(self.softcap.is_none_or(|cap| cap > 0.0), "attention: softcap");
        if let Some(sinks) = self.sinks {
            assert_eq!(sinks.dtype(), DType::F32, "attention: dtype of sinks");
            assert_eq!(sinks.shape().sizes(), &[self.q.size(1)], "attention: sinks");
        }
        let num_seqs = self.context_lens.size(0);
        assert_eq!(self.cu_seqlens_q.size(0), num_seqs + 1, "attention: cu_seqlens_q");
        assert_eq!(self.block_tables.size(0), num_seqs, "attention: block_tables");
    }
}

/// See [`super::Ops::gather_rows`].
pub struct GatherRowsArgs<'a> {
    /// `[num_out, width]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, width]`.
    pub x: View<'a>,
    /// `[num_out]`, u32; each below `num_rows`.
    pub rows: View<'a>,
}

impl GatherRowsArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.size(0), self.rows.size(0), "gather_rows: rows");
        assert_eq!(self.out.size(1), self.x.size(1), "gather_rows: width");
    }
}

/// See [`super::Ops::copy_blocks`].
pub struct CopyBlocksArgs<'a> {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k_cache: KvViewMut<'a>,
    /// As `k_cache`; `None` where one vector is key and value.
    pub v_cache: Option<KvViewMut<'a>>,
    /// `(source, destination)` block ids; no destination is also a source.
    pub pairs: &'a [(u32, u32)],
}
