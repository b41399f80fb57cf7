//! Cached keys and values of one KV head of one sequence as operands of tile products.
//!
//! Sixteen keys are read where they lie when their block has them all as bf16. Values are rearranged,
//! because a product with weights sums over keys: transposed, a row per element of the head, or for
//! few queries only interleaved, a row per pair of keys.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::amx::{TILE_LEN, TILE_ROWS};
use super::attention::AttendTile;
use super::avx512::transpose16;
use super::tile_rows::TileRows;
use super::tile_softmax::CHUNK;
use super::tile_sums::SixteenKeys;

/// Positions that all queries of a task are led past at a time: enough for a sum to stay in
/// its accumulator for a while, few enough for scores to stay in the first-level cache.
pub const KV_TILE: usize = 128;
/// Products of a KV tile.
pub const CHUNKS: usize = KV_TILE / CHUNK;
/// Longest heads.
pub const MAX_HEAD_DIM: usize = 256;

/// The cached vectors of one KV head of one sequence.
pub struct Cache<'a> {
    /// Says which head of which sequence, and where its blocks are.
    pub task: &'a AttendTile<'a>,
    /// `[num_blocks, num_kv_heads, block_size]` rows, without scales: scores are scaled instead.
    pub keys: TileRows<'a>,
    /// As `keys`, scaled.
    pub values: TileRows<'a>,
    /// Elements of the head.
    pub dim: usize,
    /// Positions that a query of the task sees.
    pub seen: Range<usize>,
}

/// Stands for values that nobody sees.
static ZEROS: [bf16; MAX_HEAD_DIM] = [bf16::ZERO; MAX_HEAD_DIM];

impl<'a> Cache<'a> {
    /// What a task that tiles fit reads, at positions `seen`.
    pub fn new(task: &'a AttendTile<'a>, seen: Range<usize>) -> Cache<'a> {
        let dim = task.sizes.head_dim;
        let v_cache = task.v_cache.expect("tiles read values from a cache of their own");
        let keys = TileRows::new(task.k_cache, dim).without_scales();
        Cache { task, keys, values: TileRows::new(v_cache, dim), dim, seen }
    }

    /// Keys of the chunk at `position`, upper and lower; rows that nobody sees are any numbers.
    /// `room` is for keys that do not lie as a tile needs them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn keys(&self, position: usize, room: &mut [u32]) -> [SixteenKeys; 2] {
        let middle = position + TILE_ROWS;
        let (first, second) = room.split_at_mut(TILE_ROWS * self.dim / 2);
        let starts = [self.sixteen_keys(position, first), self.sixteen_keys(middle, second)];
        starts.map(|start| SixteenKeys { start, stride: 2 * self.dim })
    }

    /// The first of sixteen rows of keys: in place where a block has them all as bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn sixteen_keys(&self, position: usize, room: &mut [u32]) -> *const u8 {
        let seen = self.seen.start.max(position)..self.seen.end.min(position + TILE_ROWS);
        if self.task.sizes.block_size.is_multiple_of(TILE_ROWS) && !seen.is_empty() {
            let (row, _) = self.task.rows_at(position);
            if let Some(keys) = self.keys.in_place(row, TILE_ROWS) {
                return keys.as_ptr().cast();
            }
        }
        let words = self.dim / 2;
        self.for_runs(seen, |first, row, run| {
            self.keys.widen(row, &mut room[(first - position) * words..][..run * words]);
        });
        room.as_ptr().cast()
    }

    /// What scores of the keys of the chunk at `position` must be multiplied by: 1 where nobody
    /// looks or all codes are 0, so that a score of -∞ stays one. False when keys have no scales.
    pub fn key_scales(&self, position: usize, scales: &mut [f32]) -> bool {
        let seen = self.seen.start.max(position)..self.seen.end.min(position + CHUNK);
        let mut found = false;
        scales.fill(1.0);
        self.for_runs(seen, |first, row, run| {
            let Some(stored) = self.keys.scales(row, run) else { return };
            found = true;
            for (scale, &stored) in scales[first - position..].iter_mut().zip(stored) {
                *scale = if stored > 0.0 { stored } else { 1.0 };
            }
        });
        found
    }

    /// Calls `visit` with a position, its cache row and how many rows follow each other there.
    #[inline(always)]
    fn for_runs(&self, positions: Range<usize>, mut visit: impl FnMut(usize, usize, usize)) {
        let mut position = positions.start;
        while position < positions.end {
            let (row, run) = self.task.rows_at(position);
            let run = run.min(positions.end - position);
            visit(position, row, run);
            position += run;
        }
    }

    /// Values of the chunk at `position` as left operands, `CHUNKS` tiles apart: word `i` of the
    /// row of an element is the pair of values at positions `2 i` and `2 i + 1`. `room` is for a
    /// chunk of values that are not bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn transpose_values(
        &self,
        position: usize,
        room: &mut [u32],
        tiles: &mut [[u32; TILE_LEN]],
    ) {
        let rows = self.value_rows(position, room);
        for at in (0..self.dim).step_by(32) {
            let (upper, lower) = tiles[at / TILE_ROWS * CHUNKS..].split_at_mut(CHUNKS);
            // SAFETY: all rows have `dim` elements.
            unsafe { transpose_square(&rows, at, &mut upper[0], &mut lower[0]) }
        }
    }

    /// The same as right operands, for a fifth of the work: row `i` has the pairs at positions
    /// `2 i` and `2 i + 1`, of the elements that [`element_of`] says.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn interleave_values(
        &self,
        position: usize,
        room: &mut [u32],
        tiles: &mut [[u32; TILE_LEN]],
    ) {
        let rows = self.value_rows(position, room);
        for at in (0..self.dim).step_by(32) {
            let (low, high) = tiles[at / TILE_ROWS * CHUNKS..].split_at_mut(CHUNKS);
            let low = low[0].as_chunks_mut::<TILE_ROWS>().0.iter_mut();
            let lines = low.zip(high[0].as_chunks_mut::<TILE_ROWS>().0);
            for (rows, (low, high)) in rows.as_chunks::<2>().0.iter().zip(lines) {
                // SAFETY: all rows have `dim` elements; lines have sixteen words.
                unsafe {
                    let [even, odd] = rows.map(|row| _mm512_loadu_si512(row.add(at).cast()));
                    let pairs = _mm512_unpacklo_epi16(even, odd);
                    _mm512_storeu_si512(low.as_mut_ptr().cast(), pairs);
                    let pairs = _mm512_unpackhi_epi16(even, odd);
                    _mm512_storeu_si512(high.as_mut_ptr().cast(), pairs);
                }
            }
        }
    }

    /// Where the values of the chunk at `position` lie as bf16; zeros where nobody looks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn value_rows(&self, position: usize, room: &mut [u32]) -> [*const bf16; CHUNK] {
        let mut rows = [ZEROS.as_ptr(); CHUNK];
        let seen = self.seen.start.max(position)..self.seen.end.min(position + CHUNK);
        self.for_runs(seen, |first, row, run| {
            let start = match self.values.in_place(row, run) {
                Some(values) => values.as_ptr(),
                None => {
                    let words = self.dim / 2;
                    let room = &mut room[(first - position) * words..][..run * words];
                    self.values.widen(row, room);
                    room.as_ptr().cast()
                }
            };
            for (i, row) in rows[first - position..][..run].iter_mut().enumerate() {
                *row = start.wrapping_add(i * self.dim);
            }
        });
        rows
    }

    /// Asks for keys and values of the chunk at `position`: blocks lie apart, so the hardware
    /// cannot guess where the next one is.
    pub fn prefetch(&self, position: usize) {
        let positions = position..self.seen.end.min(position + CHUNK);
        self.for_runs(positions, |_, row, run| {
            self.keys.prefetch(row, run);
            self.values.prefetch(row, run);
        });
    }
}

/// Which of 32 elements comes `i`th when halves of 128 bits are unpacked: quarter `i / 4` of the
/// vectors held elements `8 (i / 4) + 0..4`, or `4..8` when high.
pub fn element_of(i: usize, is_high: bool) -> usize {
    8 * (i / 4) + i % 4 + if is_high { 4 } else { 0 }
}

/// Elements `at..at + 32` of 32 rows, transposed.
///
/// # Safety
/// All rows must have these elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose_square(
    rows: &[*const bf16; CHUNK],
    at: usize,
    upper: &mut [u32; TILE_LEN],
    lower: &mut [u32; TILE_LEN],
) {
    for is_high in [false, true] {
        let mut pairs = [_mm512_setzero_ps(); TILE_ROWS];
        for (pair, rows) in pairs.iter_mut().zip(rows.as_chunks::<2>().0) {
            // SAFETY: the caller vouches for the rows.
            let [even, odd] = rows.map(|row| unsafe { _mm512_loadu_si512(row.add(at).cast()) });
            *pair = _mm512_castsi512_ps(if is_high {
                _mm512_unpackhi_epi16(even, odd)
            } else {
                _mm512_unpacklo_epi16(even, odd)
            });
        }
        // SAFETY: the instructions exist here.
        let columns = unsafe { transpose16(pairs) };
        for (i, column) in columns.into_iter().enumerate() {
            let element = element_of(i, is_high);
            let tile = if element < TILE_ROWS { &mut *upper } else { &mut *lower };
            let row = &mut tile[element % TILE_ROWS * TILE_ROWS..][..TILE_ROWS];
            // SAFETY: the row has sixteen words.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr().cast(), column) }
        }
    }
}
