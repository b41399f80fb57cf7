//! Tile products of attention: scores of one column of sixteen queries, and its sums of weighted
//! values, through inline assembly.
//!
//! Each function is a few products, so that its caller can do vector work between them: tiles and
//! vectors are different units, but a processor looks ahead some five hundred instructions only.
//! Tiles 0 to 3 are sums, 4 and 5 hold queries, 6 a tile of scores or the weights, and 7 what
//! streams. The processor renames tiles, so that a second use does not wait for the first.

use std::arch::asm;

use super::amx::{ROW_BYTES, TILE_BYTES, TILE_LEN, TILE_ROWS, Tiles};

/// Sixteen columns of a row: one number or pair of numbers per query.
pub type Row = [u32; TILE_ROWS];

/// Tiles of sums that are added to at once.
pub const SUM_TILES: usize = 4;

/// The queries of a column: right operands that follow each other along the head.
#[derive(Clone, Copy)]
pub struct Queries {
    /// The first one.
    pub start: *const u8,
    /// How many: 32 elements of the head each.
    pub steps: usize,
}

/// Sixteen keys.
#[derive(Clone, Copy)]
pub struct SixteenKeys {
    /// The first one.
    pub start: *const u8,
    /// Bytes from one to the next.
    pub stride: usize,
}

/// Which operand is which in products of weights and values. Both sum the same products in the same
/// order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sides {
    /// Values have a row per element of the head, weights a row per pair of keys, and sums a row per
    /// element.
    ValuesByWeights,
    /// Weights have a row per query, values a row per pair of keys, and sums a row per query.
    WeightsByValues,
}

/// Products of two tiles of values, which pass through tile 7.
macro_rules! two_products {
    ($first:literal, $second:literal, $values:expr, $stride:expr) => {
        asm!(
            "tileloadd tmm7, [{values} + {line}*1]",
            concat!("tdpbf16ps ", $first),
            "tileloadd tmm7, [{next} + {line}*1]",
            concat!("tdpbf16ps ", $second),
            values = in(reg) $values,
            next = in(reg) $values.wrapping_byte_add($stride * TILE_BYTES),
            line = in(reg) ROW_BYTES, options(readonly, nostack),
        )
    };
}

impl Tiles {
    /// Loads the queries that [`Tiles::score`] multiplies by, past the first-level cache's reuse.
    ///
    /// # Safety
    /// All their tiles must be readable.
    #[inline(always)]
    pub unsafe fn hold_queries(&mut self, queries: Queries) {
        // SAFETY: the caller vouches for the first tile, and for the second where there is one.
        unsafe {
            asm!("tileloaddt1 tmm4, [{at} + {line}*1]",
                 at = in(reg) queries.start, line = in(reg) ROW_BYTES, options(readonly, nostack));
            if queries.steps == 2 {
                asm!("tileloaddt1 tmm5, [{at} + {line}*1 + 1024]",
                     at = in(reg) queries.start, line = in(reg) ROW_BYTES,
                     options(readonly, nostack));
            }
        }
    }

    /// Writes scores of sixteen keys and the held queries, a row per key: `begin` plus their products.
    ///
    /// # Safety
    /// The keys and the queries, which are those held, must be readable to their last step, and
    /// sixteen rows writable.
    #[inline(always)]
    pub unsafe fn score(
        &mut self,
        begin: &[f32; TILE_ROWS],
        keys: SixteenKeys,
        queries: Queries,
        to: *mut Row,
    ) {
        // SAFETY: the caller vouches for the memory; a stride of 0 reads `begin` sixteen times.
        unsafe {
            if queries.steps == 2 {
                asm!(
                    "tileloadd tmm6, [{begin} + {zero}*1]",
                    "tileloadd tmm7, [{keys} + {stride}*1]",
                    "tdpbf16ps tmm6, tmm7, tmm4",
                    "tileloadd tmm7, [{keys} + {stride}*1 + 64]",
                    "tdpbf16ps tmm6, tmm7, tmm5",
                    "tilestored [{to} + {line}*1], tmm6",
                    begin = in(reg) begin, zero = in(reg) 0usize, keys = in(reg) keys.start,
                    stride = in(reg) keys.stride, to = in(reg) to, line = in(reg) ROW_BYTES,
                    options(nostack),
                );
            } else {
                asm!(
                    "tileloadd tmm6, [{begin} + {zero}*1]",
                    "tileloadd tmm7, [{keys} + {stride}*1]",
                    "tdpbf16ps tmm6, tmm7, tmm4",
                    "dec {n}",
                    "jz 3f",
                    "2:",
                    "add {keys}, 64",
                    "add {queries}, 1024",
                    "tileloadd tmm7, [{keys} + {stride}*1]",
                    "tileloadd tmm5, [{queries} + {line}*1]",
                    "tdpbf16ps tmm6, tmm7, tmm5",
                    "dec {n}",
                    "jnz 2b",
                    "3:",
                    "tilestored [{to} + {line}*1], tmm6",
                    begin = in(reg) begin, zero = in(reg) 0usize,
                    keys = inout(reg) keys.start => _, stride = in(reg) keys.stride,
                    queries = inout(reg) queries.start => _, n = inout(reg) queries.steps => _,
                    to = in(reg) to, line = in(reg) ROW_BYTES,
                    options(nostack),
                );
            }
        }
    }

    /// Reads sums: two tiles, or four.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    pub unsafe fn load_sums(&mut self, from: *const [u32; TILE_LEN], all: bool) {
        // SAFETY: the caller vouches for the memory.
        unsafe {
            asm!("tileloaddt1 tmm0, [{at} + {line}*1]", "tileloaddt1 tmm1, [{at} + {line}*1 + 1024]",
                 at = in(reg) from, line = in(reg) ROW_BYTES, options(readonly, nostack));
            if all {
                asm!("tileloaddt1 tmm2, [{at} + {line}*1 + 2048]",
                     "tileloaddt1 tmm3, [{at} + {line}*1 + 3072]",
                     at = in(reg) from, line = in(reg) ROW_BYTES, options(readonly, nostack));
            }
        }
    }

    /// Writes sums: two tiles, or four.
    ///
    /// # Safety
    /// They must be writable.
    #[inline(always)]
    pub unsafe fn store_sums(&mut self, to: *mut [u32; TILE_LEN], all: bool) {
        // SAFETY: the caller vouches for the memory.
        unsafe {
            asm!("tilestored [{at} + {line}*1], tmm0", "tilestored [{at} + {line}*1 + 1024], tmm1",
                 at = in(reg) to, line = in(reg) ROW_BYTES, options(nostack));
            if all {
                asm!("tilestored [{at} + {line}*1 + 2048], tmm2",
                     "tilestored [{at} + {line}*1 + 3072], tmm3",
                     at = in(reg) to, line = in(reg) ROW_BYTES, options(nostack));
            }
        }
    }

    /// Adds weighted values to the first two tiles of sums, in the order that `sides` says. The
    /// next sixteen elements of `values` follow `stride` tiles later.
    ///
    /// # Safety
    /// Both tiles of values, and that of the weights, must be readable.
    #[inline(always)]
    pub unsafe fn add_weighted(
        &mut self,
        sides: Sides,
        values: *const [u32; TILE_LEN],
        stride: usize,
        weights: *const Row,
    ) {
        // SAFETY: the caller vouches for the memory.
        unsafe {
            asm!("tileloadd tmm6, [{weights} + {line}*1]",
                 weights = in(reg) weights, line = in(reg) ROW_BYTES, options(readonly, nostack));
            match sides {
                Sides::ValuesByWeights => {
                    two_products!("tmm0, tmm7, tmm6", "tmm1, tmm7, tmm6", values, stride);
                }
                Sides::WeightsByValues => {
                    two_products!("tmm0, tmm6, tmm7", "tmm1, tmm6, tmm7", values, stride);
                }
            }
        }
    }

    /// The same for the other two tiles of sums, with the weights of the call before.
    ///
    /// # Safety
    /// Both tiles of values must be readable.
    #[inline(always)]
    pub unsafe fn add_weighted_lower(
        &mut self,
        sides: Sides,
        values: *const [u32; TILE_LEN],
        stride: usize,
    ) {
        // SAFETY: the caller vouches for the memory.
        unsafe {
            match sides {
                Sides::ValuesByWeights => {
                    two_products!("tmm2, tmm7, tmm6", "tmm3, tmm7, tmm6", values, stride);
                }
                Sides::WeightsByValues => {
                    two_products!("tmm2, tmm6, tmm7", "tmm3, tmm6, tmm7", values, stride);
                }
            }
        }
    }
}
