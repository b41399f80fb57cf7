//! Latent attention: products with a matrix per head, what is cached, and attention over it; and
//! sums of two tensors, which models of that kind need for what every token has beside experts.
//!
//! As in `attention`, grids come from shapes: a token has a CTA per sixteen heads, or per 32 where
//! the device has the shared memory, and where tokens are as few as sequences (a decode), several
//! that share its context. No such choice changes a bit of a result (`kernels/attention_mla.cu`).

use super::attention::PartialMemory;
use super::launcher::{Launch, Launcher, args, count};
use super::{CudaOps, support};
use crate::ops::args::{AddArgs, HeadMatmulArgs, LatentAttentionArgs, RopeStyle, WriteLatentArgs};
use crate::tensor::{DType, View};

/// Positions of a part (`PART` in `attention.cuh`).
const PART: usize = 256;
/// Heads of a team of four warps (`MMA_ROWS`, `TEAM_WARPS`).
const TEAM_HEADS: usize = 16;
const TEAM_THREADS: usize = 128;
/// Bytes of two stages of cached vectors, of a team's queries, and of what its warps exchange
/// (`MLA_TILE`, `DIM_STRIDE`, `TeamExchange`).
const TILES_BYTES: usize = 2 * 32 * DIM_STRIDE * 2;
const QUERIES_BYTES: usize = TEAM_HEADS * DIM_STRIDE * 2;
const EXCHANGE_BYTES: usize = 3712;
const DIM_STRIDE: usize = 576 + 8;
/// CTAs per multiprocessor from which on contexts are not shared: one or two run at a time, and
/// twice as many even out contexts of different lengths.
const CTAS_PER_MULTIPROCESSOR: usize = 4;
/// Columns and elements of k of a CTA of `head_matmul`, whose rows are padded (`HEAD_COLS`,
/// `SLICE_STRIDE`), and slices that are on their way (`SLICES_AHEAD`).
const HEAD_COLS: usize = 64;
const SLICE_STRIDE: usize = 64 + 8;
const SLICES_AHEAD: usize = 3;
const HEAD_THREADS: usize = 128;
/// Threads of a block that writes a latent (`LATENT_THREADS`), or adds.
const THREADS: usize = 256;
/// Elements that a thread adds (`CHUNK` in `dtype.cuh`).
const CHUNK: usize = 8;

/// The kernels for a cache, by the number of teams of a CTA.
fn kernel(cache: DType, teams: usize) -> &'static str {
    match (cache, teams) {
        (DType::BF16, 1) => "attention_mla_kvbf16_h16",
        (DType::BF16, _) => "attention_mla_kvbf16_h32",
        (DType::F16, 1) => "attention_mla_kvf16_h16",
        (DType::F16, _) => "attention_mla_kvf16_h32",
        (other, _) => unreachable!("a cache of {other} was refused"),
    }
}

fn shared_bytes(teams: usize) -> usize {
    TILES_BYTES + teams * (QUERIES_BYTES + EXCHANGE_BYTES)
}

/// Sizes of a step, and a bound on what the device alone knows.
#[derive(Clone, Copy)]
struct Step {
    num_tokens: usize,
    num_seqs: usize,
    num_heads: usize,
    rank: usize,
    /// Most parts of a context.
    max_parts: usize,
    teams: usize,
}

impl Step {
    fn new(args: &LatentAttentionArgs<'_>, shared_bytes_per_block: usize) -> Step {
        let num_heads = args.q.size(1);
        let has_two = num_heads > TEAM_HEADS && shared_bytes(2) <= shared_bytes_per_block;
        let context = args.block_tables.size(1) * args.cache.size(2);
        Step {
            num_tokens: args.q.size(0),
            num_seqs: args.context_lens.size(0),
            num_heads,
            rank: args.out.size(2),
            max_parts: context.div_ceil(PART).max(1),
            teams: if has_two { 2 } else { 1 },
        }
    }

    /// CTAs of a token.
    fn head_tiles(&self) -> usize {
        self.num_heads.div_ceil(self.teams * TEAM_HEADS)
    }

    /// How many CTAs share a context, as far as partial results have room. Where prompts are among
    /// the sequences there are tokens enough.
    fn num_splits(&self, multiprocessors: usize, memory: Option<&PartialMemory>) -> usize {
        let num_slots = self.num_tokens * self.num_heads * self.max_parts;
        let has_room = memory.is_some_and(|memory| memory.has_room_for(num_slots, self.rank));
        if self.num_tokens != self.num_seqs || !has_room {
            return 1;
        }
        let num_ctas = self.num_tokens * self.head_tiles();
        (multiprocessors * CTAS_PER_MULTIPROCESSOR / num_ctas.max(1)).clamp(1, self.max_parts)
    }
}

impl<L: Launcher> CudaOps<L> {
    /// See [`crate::ops::Ops::head_matmul`].
    pub(super) fn multiply_heads(&self, args: HeadMatmulArgs<'_>) {
        let HeadMatmulArgs { mut out, x, weight } = args;
        let (num_heads, num_out, num_in) = (weight.size(0), weight.size(1), weight.size(2));
        let num_rows = x.size(0);
        let (kernel, rows) =
            if num_rows <= 16 { ("head_matmul_16", 16) } else { ("head_matmul_64", 64) };
        let launch = Launch::new(num_out.div_ceil(HEAD_COLS), HEAD_THREADS)
            .by(num_heads)
            .with_shared(SLICES_AHEAD * (rows + HEAD_COLS) * SLICE_STRIDE * 2);
        let launch = deep(launch, num_rows.div_ceil(rows));
        let (x_width, out_width) = (x.size(2), out.size(2));
        let sizes = args![num_rows, num_heads, num_out, num_in, x_width, out_width];
        let tensors = args![&mut out, x, weight];
        self.launch(kernel, launch, &[&tensors[..], &sizes].concat());
    }

    /// See [`crate::ops::Ops::write_latent`].
    pub(super) fn write_latents(&self, args: WriteLatentArgs<'_>) {
        let (rank, rope_dim) = (args.rank(), args.rope_dim());
        let WriteLatentArgs { mut cache, mut absorbed, latent, q, weight, .. } = args;
        let kernel = match (weight.dtype(), cache.data.dtype()) {
            (DType::F32, DType::BF16) => "write_latent_wf32_kvbf16",
            (DType::BF16, DType::BF16) => "write_latent_wbf16_kvbf16",
            (DType::F16, DType::BF16) => "write_latent_wf16_kvbf16",
            (DType::F32, DType::F16) => "write_latent_wf32_kvf16",
            (DType::BF16, DType::F16) => "write_latent_wbf16_kvf16",
            (DType::F16, DType::F16) => "write_latent_wf16_kvf16",
            (weight, cache) => unreachable!("a norm of {weight} into a cache of {cache}"),
        };
        let tensors = args![
            &mut cache.data,
            &mut absorbed,
            latent.as_view(),
            q,
            weight,
            args.positions,
            args.cos,
            args.sin,
            args.slot_mapping,
        ];
        let is_interleaved = u32::from(args.style == RopeStyle::Interleaved);
        let sizes = args![q.size(1), rank, rope_dim, q.size(2), is_interleaved, args.eps];
        let launch = Launch::new(latent.size(0), THREADS);
        self.launch(kernel, launch, &[&tensors[..], &sizes].concat());
    }

    /// See [`crate::ops::Ops::latent_attention`].
    pub(super) fn attend_latents(&self, mut args: LatentAttentionArgs<'_>) {
        let (dim, block_size) = (args.q.size(2), args.cache.size(2));
        let step = Step::new(&args, self.facts().shared_bytes_per_block as usize);
        let cache_dtype = args.cache.data.dtype();
        let checked = support::check_latents(step.rank, dim - step.rank)
            .and_then(|()| support::check_latent_cache(cache_dtype, block_size));
        assert_eq!(checked, Ok(()), "Ops::check was not asked before a step");
        let mut memory = self.partials.lock();
        let multiprocessors = self.facts().multiprocessors as usize;
        let num_splits = step.num_splits(multiprocessors, memory.as_ref());
        let (states, sums) = match memory.as_mut() {
            Some(memory) => (Some(memory.states.view()), Some(memory.sums.view())),
            None => (None, None),
        };
        let launch = Launch::new(num_splits, step.teams * TEAM_THREADS)
            .by(step.head_tiles())
            .with_shared(shared_bytes(step.teams));
        let tensors = args![
            &mut args.out,
            args.q,
            states,
            sums,
            args.cache.data,
            args.block_tables,
            args.cu_seqlens_q,
            args.context_lens,
        ];
        let sizes = args![
            args.scale,
            step.num_seqs,
            step.max_parts,
            args.block_tables.size(1),
            step.num_heads,
            block_size.ilog2(),
            step.rank,
            dim,
        ];
        let arguments = [&tensors[..], &sizes].concat();
        self.launch(kernel(cache_dtype, step.teams), deep(launch, step.num_tokens), &arguments);
        if num_splits > 1 {
            self.join_latent_parts(&mut args, step, states, sums);
        }
    }

    /// Joins what CTAs that shared contexts left; every sequence has one query.
    fn join_latent_parts(
        &self,
        args: &mut LatentAttentionArgs<'_>,
        step: Step,
        states: Option<View<'_>>,
        sums: Option<View<'_>>,
    ) {
        const JOIN_WARPS: usize = 4;
        let launch = Launch::new(step.num_heads.div_ceil(JOIN_WARPS), 32 * JOIN_WARPS);
        let no_sinks: Option<View<'_>> = None;
        let arguments = args![
            &mut args.out,
            states,
            sums,
            args.cu_seqlens_q,
            args.context_lens,
            no_sinks,
            i32::MAX as usize,
            step.max_parts,
            1usize, // query of a sequence
            step.num_heads,
            1usize, // head of the cache
            step.rank,
        ];
        self.launch("attention_join", deep(launch, step.num_seqs), &arguments);
    }

    /// See [`crate::ops::Ops::add`].
    pub(super) fn add_elements(&self, args: AddArgs<'_>) {
        let AddArgs { mut out, x } = args;
        let num_elements = x.shape().len();
        let launch = Launch::new(num_elements.div_ceil(THREADS * CHUNK), THREADS);
        self.launch("add_bf16", launch, &args![&mut out, x, num_elements]);
    }
}

/// The same with several blocks along z.
fn deep(launch: Launch, blocks: usize) -> Launch {
    Launch { grid: [launch.grid[0], launch.grid[1], count(blocks)], ..launch }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_fits_every_supported_device_and_two_fit_large_ones() {
        assert!(shared_bytes(1) <= 99 << 10);
        assert!(shared_bytes(2) <= 163 << 10 && shared_bytes(2) > 99 << 10);
    }

    #[test]
    fn contexts_of_a_decode_are_shared_until_the_device_is_full() {
        use crate::tensor::Tensor;
        let memory = PartialMemory {
            states: Tensor::zeros(DType::F32, [1 << 20]),
            sums: Tensor::zeros(DType::F32, [64 << 20]),
        };
        let step = |num_tokens, num_seqs, num_heads| Step {
            num_tokens,
            num_seqs,
            num_heads,
            rank: 512,
            max_parts: 32,
            teams: if num_heads > 16 { 2 } else { 1 },
        };
        let splits = |step: Step| step.num_splits(132, Some(&memory));
        assert_eq!([1, 16, 33, 66, 200].map(|n| splits(step(n, n, 16))), [32, 32, 16, 8, 2]);
        assert_eq!([1, 8, 32].map(|n| splits(step(n, n, 128))), [32, 16, 4]);
        assert_eq!(splits(step(17, 2, 16)), 1, "prompts are tokens enough");
        assert_eq!(step(1, 1, 16).num_splits(132, None), 1, "nowhere to leave parts");
    }
}
