//! `out = x · weightᵀ` for groups of codes on AMX, when there are too many rows for vectors.
//!
//! A group's products are one tile product of integers. It goes through memory to sixteen vectors
//! of f32, one per row of activations, where it is scaled and added: exactly what `byte_matmul`
//! computes. The vectors need twice as long as the tiles, so that one tile of rows and one block
//! of weights at a time is as good as any blocking.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{Amx, TILE_BYTES, TILE_LEN, Tiles};
use super::avx512::Avx512;
use super::byte_matmul::{ByteScales, ByteTask, ByteWeights};
use super::byte_simd::{ByteSimd, FoldedCodes, Int4Codes, Mxfp4Codes};
use super::byte_vectors;
use super::lines::{LINE_BYTES, TILE_ROWS};
use super::share::Scratch;
use super::tile_write::{Floats, TileResults};
use super::weight_blocks::{GroupCodes, GroupScales};

/// Up to this many rows, vectors read folded weights at the memory's speed.
pub const FEW_ROWS: usize = 8;
/// Bytes of activations that stay in the second-level cache beside a block of weights, also when
/// a neighbour on the same core takes half of it.
const ROWS_BYTES: usize = 256 << 10;
/// Products that are under way: enough to hide the latency of tiles.
const RING: usize = 4;
/// Products that are started ahead of the one that is added.
const AHEAD: usize = 3;
/// Bytes of half a tile of weights.
const HALF_TILE: usize = TILE_BYTES / 2;

/// Bits of the results of a tile of rows, a row's sixteen columns after the other.
type Values = [[u32; TILE_ROWS]; TILE_ROWS];

/// Computes some blocks of a task for all rows.
pub fn multiply_groups(amx: Amx, task: &ByteTask<'_>, blocks: Range<usize>, scratch: &mut Scratch) {
    let steps = task.x.lines.steps;
    let tiles_per_pass = (ROWS_BYTES / (steps * TILE_BYTES)).max(1);
    let num_tiles = task.x.lines.num_tiles();
    let tile_words = 3 * steps * HALF_TILE / 4;
    let words = scratch.take_words(2 * tile_words + RING * TILE_LEN);
    let (ring, wide) = words.split_at_mut(RING * TILE_LEN);
    let (main, up) = wide.split_at_mut(tile_words);
    let mut pass = Pass { amx, task, tiles: Tiles::open(amx), ring };
    for first in (0..num_tiles).step_by(tiles_per_pass) {
        let tiles = first..num_tiles.min(first + tiles_per_pass);
        for block in blocks.clone() {
            // SAFETY: the token proves that the instructions exist, and every block of the
            // range exists; this task alone writes its columns.
            unsafe { pass.run(tiles.clone(), block, [&mut *main, &mut *up]) }
        }
    }
}

struct Pass<'a> {
    amx: Amx,
    task: &'a ByteTask<'a>,
    tiles: Tiles,
    /// Accumulators on their way to vectors.
    ring: &'a mut [u32],
}

impl Pass<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn run(&mut self, tiles: Range<usize>, block: usize, [main_tiles, up_tiles]: [&mut [u32]; 2]) {
        let simd = self.amx.vectors();
        let main = Unpacked::new(self.task.main, block, main_tiles);
        let up = self.task.up.map(|up| Unpacked::new(up, block, up_tiles));
        let out = &self.task.out;
        let mut values = [[[0; TILE_ROWS]; TILE_ROWS]; 2];
        for tile in tiles {
            self.multiply(simd, &main, tile, &mut values[0]);
            if let Some(up) = &up {
                self.multiply(simd, up, tile, &mut values[1]);
            }
            let rows = tile * TILE_ROWS..self.task.x.lines.num_rows.min((tile + 1) * TILE_ROWS);
            let results = match self.task.up {
                Some(_) => TileResults::gated(out, rows.clone(), block, [Floats; 2]),
                None => TileResults::of_blocks(out, rows.clone(), block, (Floats, None)),
            };
            let lines = values.each_ref().map(|values| values.as_flattened().as_ptr());
            // SAFETY: the instructions exist; this task alone has the block.
            unsafe { results.write(simd, lines, 0..rows.len()) }
        }
    }

    /// The products of a tile of rows with a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn multiply(&mut self, simd: Avx512, weights: &Unpacked<'_>, tile: usize, values: &mut Values) {
        let (x, groups) = (self.task.x, weights.scales.groups);
        let mut acc = [simd.no_floats(); TILE_ROWS];
        for next in 0..groups + AHEAD {
            if next < groups {
                self.start(weights, tile, next);
            }
            let Some(group) = next.checked_sub(AHEAD) else { continue };
            let scales = weights.scales.scales(weights.block, group).load(simd);
            let x_scales = x.tile_scales(tile, group);
            let sums = &self.ring[group % RING * TILE_LEN..][..TILE_LEN];
            for (row, acc) in acc.iter_mut().enumerate() {
                // SAFETY: an accumulator has sixteen rows of sixteen sums; the instructions exist.
                *acc = unsafe {
                    let sums = _mm512_loadu_si512(sums.as_ptr().add(row * TILE_ROWS).cast());
                    simd.add_scaled(*acc, sums, x_scales[row], scales)
                };
            }
        }
        for (values, acc) in values.iter_mut().zip(acc) {
            // SAFETY: sixteen f32 are written; the instructions exist.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr().cast(), acc) }
        }
    }

    /// Starts the products of a group.
    #[inline]
    fn start(&mut self, weights: &Unpacked<'_>, tile: usize, group: usize) {
        let lines = self.task.x.lines;
        let (step, right) = weights.tile(group);
        let steps = (weights.scales.size / LINE_BYTES).clamp(1, lines.steps - step);
        let to = &mut self.ring[group % RING * TILE_LEN..][..TILE_LEN];
        let left = lines.line(tile * TILE_ROWS, step).cast();
        let left_step = lines.rows_per_tile() * LINE_BYTES;
        // SAFETY: rows have room to be read as whole tiles, weights were unpacked for all
        // steps, and `to` has room for an accumulator.
        unsafe {
            self.tiles.multiply_apart(group, (left, left_step), right, steps, to.as_mut_ptr());
        }
    }
}

/// A block of weights as signed bytes, tile by tile.
///
/// Groups of 32 take half a tile each; the other half must be zero. Half a tile of zeros between
/// the two serves both: one product begins with the first half, the other with the zeros.
struct Unpacked<'a> {
    scales: GroupScales<'a>,
    block: usize,
    bytes: &'a [u32],
}

impl<'a> Unpacked<'a> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(weights: ByteWeights<'a>, block: usize, to: &'a mut [u32]) -> Unpacked<'a> {
        let ByteScales::Groups(scales) = weights.scales else {
            panic!("codes have a scale per group")
        };
        let is_folded = scales.codes != GroupCodes::Bytes;
        let bytes_per_step = if is_folded { HALF_TILE } else { TILE_BYTES };
        let steps = weights.blocks.block_bytes / bytes_per_step;
        let from = weights.blocks.block(block);
        assert!(to.len() * 4 >= steps * 3 * HALF_TILE);
        for step in 0..steps {
            let to = to.as_mut_ptr().cast::<u8>();
            // SAFETY: the block has these steps, and `to` has room for them.
            unsafe {
                let from = from.add(step * bytes_per_step);
                let (low, high) = if scales.size < LINE_BYTES {
                    let low = to.add(step * 3 * HALF_TILE);
                    low.add(HALF_TILE).write_bytes(0, HALF_TILE);
                    (low, low.add(2 * HALF_TILE))
                } else {
                    let low = to.add(step * TILE_BYTES);
                    (low, low.add(HALF_TILE))
                };
                match scales.codes {
                    GroupCodes::Int4 => {
                        let zeros = zeros_of(scales, block, step);
                        unfold::<Int4Codes>(from, zeros, [low, high]);
                    }
                    GroupCodes::Mxfp4 => {
                        let zeros = [_mm512_set1_epi8(Mxfp4Codes::MIDDLE as i8); 2];
                        unfold::<Mxfp4Codes>(from, zeros, [low, high]);
                    }
                    GroupCodes::Bytes => {
                        low.copy_from_nonoverlapping(from, HALF_TILE);
                        high.copy_from_nonoverlapping(from.add(HALF_TILE), HALF_TILE);
                    }
                }
            }
        }
        Unpacked { scales, block, bytes: to }
    }

    /// The first step of a group, and its tile.
    #[inline]
    fn tile(&self, group: usize) -> (usize, *const u8) {
        let bytes = self.bytes.as_ptr().cast::<u8>();
        if self.scales.size < LINE_BYTES {
            return (
                group / 2,
                bytes.wrapping_add(group / 2 * 3 * HALF_TILE + group % 2 * HALF_TILE),
            );
        }
        let step = group * self.scales.size / LINE_BYTES;
        (step, bytes.wrapping_add(step * TILE_BYTES))
    }
}

/// Every one of sixteen bytes four times.
static FOURFOLD: [u8; LINE_BYTES] = {
    let mut order = [0; LINE_BYTES];
    let mut i = 0;
    while i < LINE_BYTES {
        order[i] = (i / 4) as u8;
        i += 1;
    }
    order
};

/// Zero points of the two halves of a step, for the four codes of every column.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn zeros_of(scales: GroupScales<'_>, block: usize, step: usize) -> [__m512i; 2] {
    let mut both = [_mm512_set1_epi8(Int4Codes::MIDDLE as i8); 2];
    for (half, line) in both.iter_mut().enumerate() {
        let group = (step * LINE_BYTES + half * LINE_BYTES / 2) / scales.size;
        if let Some(zeros) = scales.zeros(block, group) {
            // SAFETY: sixteen bytes, and a table of 64.
            *line = unsafe {
                let zeros = _mm512_broadcast_i32x4(_mm_loadu_si128(zeros.as_ptr().cast()));
                _mm512_shuffle_epi8(zeros, _mm512_loadu_si512(FOURFOLD.as_ptr().cast()))
            };
        }
    }
    both
}

/// Writes the codes of a step, less their zero points, as the halves of a tile.
///
/// # Safety
/// Half a tile must be readable at `from` and writable at both places.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn unfold<C: FoldedCodes>(from: *const u8, zeros: [__m512i; 2], to: [*mut u8; 2]) {
    for at in (0..HALF_TILE).step_by(LINE_BYTES) {
        // SAFETY: the caller's contract.
        unsafe {
            let [low, high] = byte_vectors::unfold::<C>(from.add(at));
            _mm512_storeu_si512(to[0].add(at).cast(), _mm512_sub_epi8(low, zeros[0]));
            _mm512_storeu_si512(to[1].add(at).cast(), _mm512_sub_epi8(high, zeros[1]));
        }
    }
}
