//! `out = x · weightᵀ` on AMX for codes in blocks that are widened to bf16: W8A16 and FP8.
//!
//! Codes are exact in bf16. With a scale per row it is left to the sums; with one per group,
//! code × scale is rounded once. Either way a row of an accumulator is one sum over all of `k`.
//!
//! Few rows: a step of weights is widened in the first-level cache while tiles multiply an
//! earlier one. Many rows: some blocks are widened in the second-level cache, and are multiplied
//! as blocks of bf16 are.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use super::amx::{Bf16, ROW_BYTES, TILE_BYTES, TILE_ROWS, TileElement, Tiles};
use super::avx512_bf16::Avx512Bf16;
use super::share::Scratch;
use super::tile_blocks::{BlockTask, Half, sums_of};
use super::tile_products::Ahead;
use super::tile_write::ScaleCols;
use super::weight_blocks::{Blocks, SliceScales};
use super::wide_simd::Words;
use crate::formats::blocks::{LINE_BYTES, WORD_BYTES};

/// Up to this many rows, codes are widened once: one pair of tiles.
const FEW_ROWS: usize = 2 * TILE_ROWS;
/// Lines of codes of a step: a tile of bf16.
const STEP_LINES: usize = Bf16::PER_ROW / WORD_BYTES;
/// Bytes of codes of a step.
const STEP_BYTES: usize = STEP_LINES * LINE_BYTES;
/// Steps between widening and multiplying: what was stored has left for the cache by then.
const STEPS_AHEAD: usize = 3;
/// Steps that are kept: a power of two beyond those ahead.
const RING: usize = 4;
/// Bytes of widened weights that stay in the second-level cache beside activations.
const WIDENED_BYTES: usize = 512 << 10;
/// Bytes from what is read to what is asked for while whole blocks are widened.
const BYTES_AHEAD: usize = 8192;

/// A product whose blocks hold codes.
pub struct CodedTask<'a, W> {
    /// The product as if they were blocks of bf16.
    pub coded: BlockTask<'a, Bf16, ScaleCols<'a>>,
    /// What the codes are.
    pub words: PhantomData<W>,
}

impl<W: Words<Avx512Bf16>> CodedTask<'_, W> {
    /// Computes some blocks of output columns for all rows.
    pub fn run_blocks(&self, blocks: Range<usize>, [sums, widened]: &mut [Scratch; 2]) {
        if self.coded.x.num_rows <= FEW_ROWS {
            self.stream(blocks, sums, widened);
        } else {
            self.reuse(blocks, sums, widened);
        }
    }

    /// Few rows.
    fn stream(&self, blocks: Range<usize>, sums: &mut Scratch, widened: &mut Scratch) {
        let mut tiles = Tiles::open(self.coded.amx);
        let sums = sums_of(sums.take_words(4 * TILE_BYTES / 4));
        let ring = widened.take_words(2 * RING * TILE_BYTES / 4);
        for pass in self.coded.passes(&blocks) {
            tiles.clear();
            // SAFETY: the machine has tiles, so the instructions too; blocks have all steps.
            unsafe { self.stream_pass(&mut tiles, &pass, ring) }
            tiles.store(&mut sums[0]);
            self.coded.write_pass(pass, sums);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn stream_pass(&self, tiles: &mut Tiles, pass: &Range<usize>, ring: &mut [u32]) {
        let task = &self.coded;
        let steps = task.x.steps;
        let first = self.codes(&task.main, pass.start);
        let second = match &task.up {
            Some(up) => Some(self.codes(up, pass.start)),
            None => (pass.len() > 1).then(|| self.codes(&task.main, pass.start + 1)),
        };
        let mut nothing = Ahead::NOTHING;
        let ahead = task.blocks_per_pass() * task.main.blocks.block_bytes;
        let (ring, is_alone) = (ring.as_mut_ptr().cast::<u8>(), task.x.num_tiles() == 1);
        for next in 0..steps + STEPS_AHEAD {
            if next < steps {
                let to = ring.wrapping_add(next % RING * 2 * TILE_BYTES);
                // SAFETY: the ring has room for two tiles per step.
                unsafe {
                    first.widen(next, to, ahead);
                    if let Some(second) = &second {
                        second.widen(next, to.wrapping_add(TILE_BYTES), ahead);
                    }
                }
            }
            let Some(step) = next.checked_sub(STEPS_AHEAD) else { continue };
            let start = ring.wrapping_add(step % RING * 2 * TILE_BYTES).cast_const();
            let (left, both) = (&task.left(0, step), [start, start.wrapping_add(TILE_BYTES)]);
            // SAFETY: these steps were widened; rows have room to be read as whole tiles.
            unsafe {
                match second {
                    Some(_) if is_alone => tiles.step_of_upper::<Bf16, 0>(left, both, &mut nothing),
                    Some(_) => tiles.step_by_two::<Bf16, false, 0>(left, both, &mut nothing),
                    None => tiles.step_by_one::<Bf16, 0>(left, start, &mut nothing),
                }
            }
        }
    }

    /// Many rows.
    fn reuse(&self, blocks: Range<usize>, sums: &mut Scratch, widened: &mut Scratch) {
        let task = &self.coded;
        let block_bytes = task.x.steps * TILE_BYTES;
        let halves = if task.up.is_some() { 2 } else { 1 };
        let per_pass = task.blocks_per_pass();
        let most = (WIDENED_BYTES / (halves * block_bytes)).next_multiple_of(per_pass);
        let most = most.min(blocks.len()).max(per_pass);
        for first in blocks.clone().step_by(most) {
            let blocks = first..blocks.end.min(first + most);
            let room = widened.take_bytes(halves * blocks.len() * block_bytes);
            let (main, up) = room.split_at_mut(blocks.len() * block_bytes);
            BlockTask {
                main: self.widened(&task.main, blocks.clone(), main),
                up: task.up.as_ref().map(|half| self.widened(half, blocks.clone(), up)),
                ..*task
            }
            .run_blocks(blocks, sums);
        }
    }

    /// Blocks of bf16 in `to`, which has room for them.
    fn widened<'a>(
        &self,
        half: &Half<'a, ScaleCols<'a>>,
        blocks: Range<usize>,
        to: &'a mut [i8],
    ) -> Half<'a, ScaleCols<'a>> {
        let block_bytes = to.len() / blocks.len();
        for (block, to) in blocks.clone().zip(to.chunks_exact_mut(block_bytes)) {
            // SAFETY: the machine has tiles, so the instructions too.
            unsafe { self.widen_block(half, block, to) }
        }
        Half { blocks: Blocks::in_scratch(blocks.start, block_bytes, to), finish: half.finish }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen_block(&self, half: &Half<'_, ScaleCols<'_>>, block: usize, to: &mut [i8]) {
        let codes = self.codes(half, block);
        for (step, to) in to.chunks_exact_mut(TILE_BYTES).enumerate() {
            // SAFETY: blocks have all steps, and a chunk is a tile.
            unsafe { codes.widen(step, to.as_mut_ptr().cast(), BYTES_AHEAD) }
        }
    }

    #[inline(always)]
    fn codes<'a>(&self, half: &Half<'a, ScaleCols<'a>>, block: usize) -> Codes<'a, W> {
        Codes {
            products: self.coded.amx.pairs(),
            start: half.blocks.block(block),
            scales: half.finish.0,
            block,
            words: PhantomData,
        }
    }
}

/// A block of codes.
struct Codes<'a, W> {
    products: Avx512Bf16,
    start: *const u8,
    scales: SliceScales<'a>,
    block: usize,
    words: PhantomData<W>,
}

impl<W: Words<Avx512Bf16>> Codes<'_, W> {
    /// Widens a step to a tile and asks for what lies `ahead` bytes further.
    ///
    /// # Safety
    /// The block must have the step, and there must be room for a tile; the machine must have
    /// the instructions of its token.
    #[inline(always)]
    unsafe fn widen(&self, step: usize, to: *mut u8, ahead: usize) {
        let from = self.start.wrapping_add(step * STEP_BYTES);
        let scales = self.scales.of_element(self.block, step * Bf16::PER_ROW);
        for line in 0..STEP_LINES {
            // SAFETY: the same contract; a prefetch never faults.
            unsafe {
                let from = from.add(line * LINE_BYTES);
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(ahead).cast());
                let wide = W::widen(self.products, from);
                for (i, &units) in wide.iter().enumerate().take(W::UNITS) {
                    let to = to.add((line * W::UNITS + i) * ROW_BYTES);
                    let units = if self.scales.is_per_row() {
                        units
                    } else {
                        scale_pairs(units, _mm512_loadu_ps(scales.as_ptr()))
                    };
                    _mm512_storeu_si512(to.cast(), units);
                }
            }
        }
    }
}

/// Where the elements of sixteen pairs lie when all first ones lie before all second ones.
static PAIRS_FROM_HALVES: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Pairs of bf16 times the scale of their lane, rounded.
///
/// # Safety
/// The machine must have AVX-512 with BF16.
#[inline(always)]
unsafe fn scale_pairs(pairs: __m512i, scales: __m512) -> __m512i {
    // SAFETY: the same contract; vectors of the same size, all of whose bits are valid.
    unsafe {
        let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let second = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
        let apart =
            _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, scales), _mm512_mul_ps(first, scales));
        let order = _mm512_loadu_si512(PAIRS_FROM_HALVES.as_ptr().cast());
        _mm512_permutexvar_epi16(order, std::mem::transmute::<__m512bh, __m512i>(apart))
    }
}
