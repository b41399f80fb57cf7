//! Arguments of the operations of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434,
//! section 2.1) in its absorbed form.
//!
//! The cache holds one vector per token: a *latent* of `rank` elements, and a rotated key of
//! `rope_dim`, both shared by all heads. A head's query is brought into the latent's space by a
//! matrix of its own, so that scores are products with cached vectors as they are; sums of latents
//! go through another matrix of the head's.

use super::RopeStyle;
use crate::ops::kv_tensor::{KvView, KvViewMut};
use crate::tensor::{DType, View, ViewMut};

/// See [`crate::ops::Ops::head_matmul`]. Heads of `x` and `out` may have more elements than are
/// multiplied; those of `out` stay as they are.
pub struct HeadMatmulArgs<'a> {
    /// `[num_rows, num_heads, at least out_features]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, num_heads, at least in_features]`.
    pub x: View<'a>,
    /// `[num_heads, out_features, in_features]`, placed by [`crate::ops::Ops::place_heads`].
    pub weight: View<'a>,
}

impl HeadMatmulArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.size(0), self.x.size(0), "head_matmul: rows");
        assert_eq!(self.x.size(1), self.weight.size(0), "head_matmul: heads of x");
        assert_eq!(self.out.size(1), self.weight.size(0), "head_matmul: heads of out");
        assert!(self.out.size(2) >= self.weight.size(1), "head_matmul: out features");
        assert!(self.x.size(2) >= self.weight.size(2), "head_matmul: in features");
        assert!(self.weight.dtype().is_float(), "head_matmul: weight");
    }
}

/// See [`crate::ops::Ops::write_latent`].
pub struct WriteLatentArgs<'a> {
    /// `[num_blocks, 1, block_size, rank + rope_dim]`.
    pub cache: KvViewMut<'a>,
    /// `[num_tokens, num_heads, rank + rope_dim]`: the last `rope_dim` elements of every head are
    /// written, the others stay as they are.
    pub absorbed: ViewMut<'a>,
    /// `[num_tokens, rank + rope_dim]`: latents before their norm and keys before they rotate; any
    /// content afterwards.
    pub latent: ViewMut<'a>,
    /// `[num_tokens, num_heads, at least rope_dim]`: queries, of which the last `rope_dim` elements
    /// rotate.
    pub q: View<'a>,
    /// `[rank]`, any float dtype.
    pub weight: View<'a>,
    /// Added to the mean square before the root.
    pub eps: f32,
    /// `[num_tokens]`, u32.
    pub positions: View<'a>,
    /// `[max_position, rope_dim / 2]`, f32.
    pub cos: View<'a>,
    /// `[max_position, rope_dim / 2]`, f32.
    pub sin: View<'a>,
    /// Pairing.
    pub style: RopeStyle,
    /// `[num_tokens]`, u32; all different.
    pub slot_mapping: View<'a>,
}

impl WriteLatentArgs<'_> {
    /// Elements of a latent.
    pub fn rank(&self) -> usize {
        self.weight.size(0)
    }

    /// Elements that rotate.
    pub fn rope_dim(&self) -> usize {
        2 * self.cos.size(1)
    }

    /// Panics unless the shapes agree.
    pub fn check(&self) {
        let (num_tokens, len) = (self.latent.size(0), self.rank() + self.rope_dim());
        assert_eq!(self.latent.size(1), len, "write_latent: latent");
        self.cache.check("write_latent: cache");
        assert_eq!(self.cache.size(1), 1, "write_latent: heads of the cache");
        assert_eq!(self.cache.size(3), len, "write_latent: cached vectors");
        assert_eq!(self.absorbed.size(0), num_tokens, "write_latent: tokens of absorbed");
        assert_eq!(self.absorbed.size(2), len, "write_latent: absorbed");
        assert_eq!(self.q.size(0), num_tokens, "write_latent: tokens of q");
        assert_eq!(self.q.size(1), self.absorbed.size(1), "write_latent: heads");
        assert!(self.q.size(2) >= self.rope_dim(), "write_latent: q");
        assert_eq!(self.cos.shape(), self.sin.shape(), "write_latent: tables");
        assert_eq!(self.positions.size(0), num_tokens, "write_latent: positions");
        assert_eq!(self.slot_mapping.size(0), num_tokens, "write_latent: slots");
    }
}

/// See [`crate::ops::Ops::latent_attention`]; sequences own rows as in [`super::AttentionArgs`].
pub struct LatentAttentionArgs<'a> {
    /// `[num_tokens, num_heads, rank]`: means of latents.
    pub out: ViewMut<'a>,
    /// `[num_tokens, num_heads, rank + rope_dim]`: absorbed queries.
    pub q: View<'a>,
    /// `[num_blocks, 1, block_size, rank + rope_dim]`: keys, whose first `rank` elements are also
    /// the values.
    pub cache: KvView<'a>,
    /// `[num_seqs, max_blocks_per_seq]`, u32; entries beyond a sequence's blocks are unread.
    pub block_tables: View<'a>,
    /// `[num_seqs + 1]`, u32.
    pub cu_seqlens_q: View<'a>,
    /// `[num_seqs]`, u32.
    pub context_lens: View<'a>,
    /// Multiplies q·k.
    pub scale: f32,
}

impl LatentAttentionArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.size(0), self.q.size(0), "latent_attention: tokens");
        assert_eq!(self.out.size(1), self.q.size(1), "latent_attention: heads");
        self.cache.check("latent_attention: cache");
        assert_eq!(self.cache.size(1), 1, "latent_attention: heads of the cache");
        assert_eq!(self.q.size(2), self.cache.size(3), "latent_attention: cached vectors");
        assert!(self.out.size(2) <= self.q.size(2), "latent_attention: rank");
        let num_seqs = self.context_lens.size(0);
        assert_eq!(self.cu_seqlens_q.size(0), num_seqs + 1, "latent_attention: cu_seqlens_q");
        assert_eq!(self.block_tables.size(0), num_seqs, "latent_attention: block_tables");
        assert_eq!(self.block_tables.dtype(), DType::U32, "latent_attention: block_tables");
    }
}

/// See [`crate::ops::Ops::add`].
pub struct AddArgs<'a> {
    /// Of any shape, updated in place.
    pub out: ViewMut<'a>,
    /// As `out`.
    pub x: View<'a>,
}

impl AddArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.out.shape(), self.x.shape(), "add: out and x");
    }
}
