//! Attention over the paged cache: which kernels a step needs and how many CTAs share a context.
//!
//! Lengths of sequences lie in device memory, so grids come from what shapes say: every sequence
//! has at least one query, so as many tokens as sequences means one each, and a block table
//! bounds a context. Sequences of one query or of few rows are `attention_decode`'s, others
//! `attention_prefill`'s; in a mixed step both kernels run and each passes over what is the
//! other's. No choice made here changes a bit of a result (`kernels/include/attention.cuh`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::launcher::{CudaError, Launch, Launcher, args, count};
use super::{CudaOps, support};
use crate::ops::StepLimits;
use crate::ops::args::AttentionArgs;
use crate::tensor::{DType, Shape, Tensor, View};

/// Positions of a part (`PART` in `attention.cuh`).
const PART: usize = 256;
/// Rows of one product (`MMA_ROWS`).
const MMA_ROWS: usize = 16;
/// Rows of the longest sequence that is decode's, but for those of one query (`SHORT_ROWS`).
const SHORT_ROWS: usize = 32;
/// What a CTA of prefill keeps of a row in shared memory (`RowState`).
const ROW_STATE_BYTES: usize = 16;
/// Threads of a warp.
const WARP: usize = 32;
/// Warps of a CTA of `attention_decode` and of `attention_join`, where each has a query head.
const DECODE_WARPS: usize = 4;
/// CTAs of decode per multiprocessor from which on contexts are not shared: two to four run at a
/// time, and twice as many even out contexts of different lengths.
const CTAS_PER_MULTIPROCESSOR: usize = 8;
/// Most bytes for what parts yield: eight sequences of 128 Ki tokens with 32 heads of 128
/// elements. Steps that would need more have CTAs enough, and keep parts in registers.
const MAX_PARTIAL_BYTES: usize = 80 << 20;
/// Numbers beside a part's sums: its largest exponent and its sum of weights.
const STATE_LEN: usize = 2;

/// What kernels for a head size and a cache are called, and the shared memory that they need.
#[derive(Clone, Copy)]
struct Kernels {
    prefill: &'static str,
    decode: &'static str,
    /// The head size rounded up to one that there are kernels for.
    head_dim: usize,
    cache: DType,
}

/// The pair of kernels for a cache dtype, by head size.
macro_rules! by_head_dim {
    ($head_dim:expr, $cache:expr, $suffix:literal) => {
        match $head_dim {
            ..=64 => by_head_dim!(@ 64, $cache, $suffix),
            65..=96 => by_head_dim!(@ 96, $cache, $suffix),
            97..=128 => by_head_dim!(@ 128, $cache, $suffix),
            _ => by_head_dim!(@ 256, $cache, $suffix),
        }
    };
    (@ $d:literal, $cache:expr, $suffix:literal) => {
        Kernels {
            prefill: concat!("attention_prefill_", $suffix, "_d", $d),
            decode: concat!("attention_decode_", $suffix, "_d", $d),
            head_dim: $d,
            cache: $cache,
        }
    };
}

impl Kernels {
    fn new(head_dim: usize, cache: DType) -> Kernels {
        match cache {
            DType::BF16 => by_head_dim!(head_dim, cache, "kvbf16"),
            DType::F16 => by_head_dim!(head_dim, cache, "kvf16"),
            DType::Fp8 => by_head_dim!(head_dim, cache, "kvfp8"),
            DType::I8 => by_head_dim!(head_dim, cache, "kvint8"),
            other => unreachable!("a cache of {other} was refused"),
        }
    }

    /// Positions of a tile (`tile_len`).
    fn tile_len(&self) -> usize {
        if self.head_dim > 128 { 32 } else { 64 }
    }

    /// Bytes of a tile of 16-bit rows (queries, keys or values), which are eight elements longer.
    fn tile_bytes(rows: usize, cols: usize) -> usize {
        rows * (cols + 8) * 2
    }

    /// `Tiles::SHARED_BYTES`: two stages of keys and of `value_cols` columns of values, and where
    /// the cache holds codes, one tile of each as 16-bit numbers.
    fn kv_tiles_bytes(&self, value_cols: usize) -> usize {
        let (rows, cols) = (self.tile_len(), [self.head_dim, value_cols]);
        let wide: usize = cols.iter().map(|&cols| Kernels::tile_bytes(rows, cols)).sum();
        let codes: usize = cols.iter().map(|&cols| rows * cols).sum();
        match self.cache {
            DType::I8 => 2 * (codes + 2 * rows * DType::F32.size_bytes()) + wide,
            DType::Fp8 => 2 * codes + wide,
            _ => 2 * wide,
        }
    }

    /// Columns of values that a CTA of prefill sums (`Shape::D_V`).
    fn prefill_cols(&self) -> usize {
        self.head_dim.min(128)
    }

    /// `Shape::WARPS`.
    fn prefill_warps(&self) -> usize {
        if self.head_dim > 128 { 4 } else { 8 }
    }

    /// Rows of a CTA of prefill.
    fn prefill_rows(&self) -> usize {
        MMA_ROWS * self.prefill_warps()
    }

    /// `Shape::WAITING_BYTES`: queries that registers have no room for beside scales.
    fn prefill_waiting_bytes(&self) -> usize {
        let products = if self.cache == DType::I8 && self.head_dim == 128 { 2 } else { 0 };
        products * self.prefill_warps() * WARP * 16
    }

    /// States of rows and queries that wait, then tiles; all queries lie before the tiles, or where
    /// tiles will lie if registers take them.
    fn prefill_shared_bytes(&self) -> usize {
        let rows = self.prefill_rows();
        let states = rows * ROW_STATE_BYTES + self.prefill_waiting_bytes();
        let queries = Kernels::tile_bytes(rows, self.head_dim);
        let tiles = self.kv_tiles_bytes(self.prefill_cols());
        states + if self.head_dim > 128 { queries + tiles } else { queries.max(tiles) }
    }

    /// Tiles, then queries and in their place what warps exchange: per stripe of sixteen keys a
    /// fragment of 16 bytes and two sums per lane, and a score per row.
    fn decode_shared_bytes(&self) -> usize {
        let exchange = self.tile_len() / MMA_ROWS * (WARP * (16 + 8) + MMA_ROWS * 4);
        let queries = Kernels::tile_bytes(MMA_ROWS, self.head_dim);
        self.kv_tiles_bytes(self.head_dim) + queries.max(exchange)
    }
}

/// Where parts of contexts leave what they yield; see `Partials` in `attention_decode.cu`.
#[derive(Default)]
pub(super) struct Partials {
    memory: Mutex<Option<PartialMemory>>,
}

/// f32: two numbers per slot, then as many per slot as a head's output has.
pub(super) struct PartialMemory {
    pub(super) states: Tensor,
    pub(super) sums: Tensor,
}

impl PartialMemory {
    /// Whether slots of `head_dim` sums have room.
    pub(super) fn has_room_for(&self, num_slots: usize, head_dim: usize) -> bool {
        num_slots * STATE_LEN <= self.states.shape().len()
            && num_slots * head_dim <= self.sums.shape().len()
    }
}

/// Slots for partial results, as many as a step of these limits could use and memory is spent on.
fn num_partial_slots(limits: &StepLimits) -> usize {
    let most_rows = limits.max_num_seqs * SHORT_ROWS;
    let wanted = most_rows * limits.num_heads * limits.max_context_len.div_ceil(PART);
    wanted.min(MAX_PARTIAL_BYTES / slot_bytes(limits.head_dim))
}

fn slot_bytes(head_dim: usize) -> usize {
    (STATE_LEN + head_dim) * DType::F32.size_bytes()
}

impl Partials {
    /// The memory, if any was reserved.
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<PartialMemory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that [`Partials::reserve`] takes.
    pub(super) fn size_bytes(limits: &StepLimits) -> usize {
        num_partial_slots(limits) * slot_bytes(limits.head_dim)
    }

    /// Makes room for steps of these limits; without it, no CTAs share a context.
    pub(super) fn reserve<L: Launcher>(
        &self,
        launcher: &L,
        limits: &StepLimits,
    ) -> Result<(), CudaError> {
        let num_slots = num_partial_slots(limits);
        let memory = if num_slots == 0 {
            None
        } else {
            let floats = |len: usize| launcher.allocate(DType::F32, Shape::from([len]));
            let states = floats(num_slots * STATE_LEN)?;
            Some(PartialMemory { states, sums: floats(num_slots * limits.head_dim)? })
        };
        *self.lock() = memory;
        Ok(())
    }
}

/// Sizes of a step, and bounds on what the device alone knows.
#[derive(Clone, Copy)]
struct Step {
    num_tokens: usize,
    num_seqs: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    table_width: usize,
    /// Keys that a query sees.
    window: usize,
}

impl Step {
    fn new(args: &AttentionArgs<'_>) -> Step {
        let step = Step {
            num_tokens: args.q.size(0),
            num_seqs: args.context_lens.size(0),
            num_heads: args.q.size(1),
            num_kv_heads: args.k_cache.size(1),
            head_dim: args.q.size(2),
            block_size: args.k_cache.size(2),
            table_width: args.block_tables.size(1),
            window: args.sliding_window.unwrap_or(usize::MAX).min(i32::MAX as usize),
        };
        let refused = support::check_heads(step.head_dim)
            .and_then(|()| support::check_cache(args.k_cache.data.dtype(), step.block_size));
        assert_eq!(refused, Ok(()), "Ops::check was not asked before a step");
        step
    }

    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Whether every sequence has one query.
    fn is_decode(&self) -> bool {
        self.num_tokens == self.num_seqs
    }

    /// Most queries of a sequence that is decode's.
    fn max_short_queries(&self) -> usize {
        if self.is_decode() { 1 } else { (SHORT_ROWS / self.group()).max(1) }
    }

    /// Most tiles of sixteen rows of such a sequence.
    fn max_row_tiles(&self) -> usize {
        (self.max_short_queries() * self.group()).div_ceil(MMA_ROWS)
    }

    /// Most tiles of `rows` rows of all other sequences.
    fn max_prefill_tiles(&self, rows: usize) -> usize {
        if self.is_decode() {
            return 0;
        }
        let num_rows = self.num_tokens * self.group();
        num_rows / rows + self.num_seqs.min(num_rows / (SHORT_ROWS + 1))
    }

    /// Most parts that sixteen rows see.
    fn max_parts(&self) -> usize {
        let in_context = (self.table_width * self.block_size).div_ceil(PART);
        // The first key lies anywhere in its part.
        let in_window = (self.window + MMA_ROWS - 1).div_ceil(PART) + 1;
        in_context.min(in_window).max(1)
    }

    /// How many CTAs share a context, as far as partial results have room.
    fn num_splits(&self, multiprocessors: usize, memory: Option<&PartialMemory>) -> usize {
        let max_parts = self.max_parts();
        // Chunks of prompts need none, however long they are.
        let num_slots = self.num_seqs * self.max_short_queries() * self.num_heads * max_parts;
        if !memory.is_some_and(|memory| memory.has_room_for(num_slots, self.head_dim)) {
            return 1;
        }
        let num_ctas = self.num_seqs * self.num_kv_heads * self.max_row_tiles();
        (multiprocessors * CTAS_PER_MULTIPROCESSOR / num_ctas.max(1)).clamp(1, max_parts)
    }
}

impl<L: Launcher> CudaOps<L> {
    /// See [`crate::ops::Ops::attention`].
    pub(super) fn attend(&self, mut args: AttentionArgs<'_>) {
        let step = Step::new(&args);
        let kernels = Kernels::new(step.head_dim, args.k_cache.data.dtype());
        if step.max_prefill_tiles(kernels.prefill_rows()) > 0 {
            self.attend_long(&mut args, step, kernels);
        }
        self.attend_short(&mut args, step, kernels);
    }

    /// Sequences of many queries.
    fn attend_long(&self, args: &mut AttentionArgs<'_>, step: Step, kernels: Kernels) {
        let halves = kernels.head_dim / kernels.prefill_cols();
        let num_tiles = step.max_prefill_tiles(kernels.prefill_rows());
        let launch = Launch::new(num_tiles, kernels.prefill_warps() * WARP)
            .by(step.num_kv_heads * halves)
            .with_shared(kernels.prefill_shared_bytes());
        self.launch(
            kernels.prefill,
            launch,
            &args![
                &mut args.out,
                args.q,
                args.k_cache.data,
                args.v_cache.data,
                args.k_cache.scales,
                args.v_cache.scales,
                args.block_tables,
                args.cu_seqlens_q,
                args.context_lens,
                args.sinks,
                args.scale,
                args.softcap.unwrap_or(0.0),
                step.window,
                step.num_seqs,
                step.table_width,
                step.num_heads,
                step.num_kv_heads,
                step.block_size.ilog2(),
                step.head_dim,
            ],
        );
    }

    /// Sequences of one query, or of few.
    fn attend_short(&self, args: &mut AttentionArgs<'_>, step: Step, kernels: Kernels) {
        let mut memory = self.partials.lock();
        let multiprocessors = self.facts().multiprocessors as usize;
        let num_splits = step.num_splits(multiprocessors, memory.as_ref());
        let (states, sums) = match memory.as_mut() {
            Some(memory) => (Some(memory.states.view_mut()), Some(memory.sums.view_mut())),
            None => (None, None),
        };
        let launch = Launch::new(num_splits, DECODE_WARPS * WARP)
            .by(step.num_kv_heads * step.max_row_tiles())
            .with_shared(kernels.decode_shared_bytes());
        let launch =
            Launch { grid: [launch.grid[0], launch.grid[1], count(step.num_seqs)], ..launch };
        let (states, sums) =
            (states.as_ref().map(|v| v.as_view()), sums.as_ref().map(|v| v.as_view()));
        self.launch(
            kernels.decode,
            launch,
            &args![
                &mut args.out,
                args.q,
                states,
                sums,
                args.k_cache.data,
                args.v_cache.data,
                args.k_cache.scales,
                args.v_cache.scales,
                args.block_tables,
                args.cu_seqlens_q,
                args.context_lens,
                args.sinks,
                args.scale,
                args.softcap.unwrap_or(0.0),
                step.window,
                step.max_parts(),
                step.max_short_queries(),
                step.table_width,
                step.num_heads,
                step.num_kv_heads,
                step.block_size.ilog2(),
                step.head_dim,
            ],
        );
        if num_splits > 1 {
            self.join_parts(args, step, states, sums);
        }
    }

    /// Joins what CTAs that shared contexts left.
    fn join_parts(
        &self,
        args: &mut AttentionArgs<'_>,
        step: Step,
        states: Option<View<'_>>,
        sums: Option<View<'_>>,
    ) {
        let launch = Launch::new(step.num_heads.div_ceil(DECODE_WARPS), DECODE_WARPS * WARP)
            .by(step.max_short_queries());
        let launch =
            Launch { grid: [launch.grid[0], launch.grid[1], count(step.num_seqs)], ..launch };
        self.launch(
            "attention_join",
            launch,
            &args![
                &mut args.out,
                states,
                sums,
                args.cu_seqlens_q,
                args.context_lens,
                args.sinks,
                step.window,
                step.max_parts(),
                step.max_short_queries(),
                step.num_heads,
                step.num_kv_heads,
                step.head_dim,
            ],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DTYPES: [DType; 4] = [DType::BF16, DType::F16, DType::Fp8, DType::I8];

    fn step(num_tokens: usize, num_seqs: usize) -> Step {
        Step {
            num_tokens,
            num_seqs,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            block_size: 16,
            table_width: 512,
            window: i32::MAX as usize,
        }
    }

    #[test]
    fn shared_memory_fits_every_supported_device() {
        const SM_86: usize = 99 << 10;
        for dtype in DTYPES {
            for head_dim in [16, 64, 80, 128, 192, 256] {
                let kernels = Kernels::new(head_dim, dtype);
                assert!(kernels.prefill_shared_bytes() <= SM_86, "{}", kernels.prefill);
                assert!(kernels.decode_shared_bytes() <= SM_86, "{}", kernels.decode);
            }
        }
    }

    #[test]
    fn a_head_size_gets_the_next_larger_kernel() {
        let names = |head_dim, dtype| {
            let kernels = Kernels::new(head_dim, dtype);
            (kernels.prefill, kernels.decode)
        };
        let expected = ("attention_prefill_kvbf16_d64", "attention_decode_kvbf16_d64");
        assert_eq!(names(32, DType::BF16), expected);
        assert_eq!(names(80, DType::I8).0, "attention_prefill_kvint8_d96");
        assert_eq!(names(112, DType::Fp8).1, "attention_decode_kvfp8_d128");
        assert_eq!(names(192, DType::F16).1, "attention_decode_kvf16_d256");
    }

    #[test]
    fn contexts_are_shared_until_the_device_is_full() {
        let memory = PartialMemory {
            states: Tensor::zeros(DType::F32, [2 << 20]),
            sums: Tensor::zeros(DType::F32, [128 << 20]),
        };
        let splits = |num_seqs| step(num_seqs, num_seqs).num_splits(132, Some(&memory));
        // A context of 8,192 has 32 parts.
        assert_eq!([1, 4, 8, 33, 66, 67, 256].map(splits), [32, 32, 16, 4, 2, 1, 1]);
        assert_eq!(step(1, 1).num_splits(132, None), 1, "nowhere to leave parts");
        let short = Step { window: 300, ..step(1, 1) };
        assert_eq!(short.num_splits(132, Some(&memory)), 3, "a window touches three parts");
        let beside_a_chunk = step(2048 + 1, 2).num_splits(132, Some(&memory));
        assert_eq!(beside_a_chunk, 32, "a prompt's chunk leaves nothing to be joined");
    }

    #[test]
    fn tiles_of_rows_are_enough_for_any_mix_of_lengths() {
        let rows = Kernels::new(128, DType::BF16).prefill_rows();
        for lengths in [vec![9; 7], vec![2048], vec![1, 1, 33, 500], vec![8, 9, 8, 9, 4000]] {
            let group = 4;
            let long = lengths.iter().filter(|&&n| n > 1 && n * group > SHORT_ROWS);
            let tiles: usize = long.map(|n| (n * group).div_ceil(rows)).sum();
            let step = step(lengths.iter().sum(), lengths.len());
            assert!(step.max_prefill_tiles(rows) >= tiles, "{lengths:?}");
            assert!(step.max_prefill_tiles(rows) <= tiles + lengths.len(), "{lengths:?}");
        }
        assert_eq!(step(5, 5).max_prefill_tiles(rows), 0, "one query each needs none");
    }

    #[test]
    fn partial_results_take_what_a_step_can_use_and_no_more_than_allowed() {
        let limits = StepLimits {
            max_num_tokens: 16,
            max_num_seqs: 1,
            max_context_len: 1000,
            max_width: 4096,
            num_heads: 8,
            head_dim: 64,
            max_logit_rows: 1,
            vocab_size: 100,
            hidden_size: 0,
            num_experts: 0,
            experts_per_token: 0,
            expert_width: 0,
        };
        assert_eq!(Partials::size_bytes(&limits), SHORT_ROWS * 8 * 4 * (64 + 2) * 4);
        let large = StepLimits { max_num_tokens: 8192, max_num_seqs: 256, ..limits };
        let large = Partials::size_bytes(&StepLimits { max_context_len: 1 << 17, ..large });
        assert!(large <= MAX_PARTIAL_BYTES && large > MAX_PARTIAL_BYTES - 4096);
    }
}
