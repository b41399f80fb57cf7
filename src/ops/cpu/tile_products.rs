//! Runs of tile products, through inline assembly: a loop over steps of the summed axis in which
//! loads, products, and requests for what memory shall bring next alternate.
//!
//! Requests are spread between the loads. A core has sixteen places for lines that are on their
//! way to its first-level cache; a burst of requests takes all of them for as long as memory
//! needs, and tiles that the second-level cache holds wait behind it.

use std::arch::asm;

use super::amx::{ROW_BYTES, TILE_ROWS, TileElement, Tiles};

/// The left operand of a run of products: two tiles of rows, sixteen rows each, and how the
/// run goes through them.
#[derive(Clone, Copy)]
pub struct Left {
    /// The first tile of the upper sixteen rows.
    pub upper: *const u8,
    /// The first tile of the lower sixteen rows.
    pub lower: *const u8,
    /// Bytes from a row to the next.
    pub row_stride: usize,
    /// Bytes from a tile to the next along the summed axis.
    pub step: usize,
}

/// The right operand of a run of products: tiles of sixteen rows that follow each other. A row
/// shorter than a tile's runs into the next one; the columns beyond it mean nothing then.
#[derive(Clone, Copy)]
pub struct Right {
    /// The first tile.
    pub start: *const u8,
    /// Bytes from a row to the next; a tile has sixteen.
    pub row_stride: usize,
}

/// What memory shall bring to the second-level cache during a run. Any address will do.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// Where the next lines of one operand lie.
    pub first: *const u8,
    /// The same of another.
    pub second: *const u8,
    /// Lines of each that a step asks for: 0, or a power of two up to [`Ahead::MOST`].
    pub lines: usize,
}

impl Ahead {
    /// Lines of a tile: what a step asks for at most.
    pub const MOST: usize = 16;
    /// Fewest lines that a step asks for, if any.
    pub const LEAST: usize = 2;
    /// Nothing.
    pub const NOTHING: Ahead =
        Ahead { first: std::ptr::null(), second: std::ptr::null(), lines: 0 };
}

/// Requests for 0, 1, 2, 4 or 8 lines from an offset of an operand on.
macro_rules! ask {
    ($at:literal, $offset:expr, 0) => {
        ""
    };
    ($at:literal, $offset:expr, 1) => {
        concat!("prefetcht1 [{", $at, "} + ", $offset, "]\n")
    };
    ($at:literal, $offset:expr, 2) => {
        concat!(ask!($at, $offset, 1), ask!($at, concat!($offset, " + 64"), 1))
    };
    ($at:literal, $offset:expr, 4) => {
        concat!(ask!($at, $offset, 2), ask!($at, concat!($offset, " + 128"), 2))
    };
    ($at:literal, $offset:expr, 8) => {
        concat!(ask!($at, $offset, 4), ask!($at, concat!($offset, " + 256"), 4))
    };
}

/// A loop over steps, with requests for lines ahead in its body.
macro_rules! step_loop {
    ([$($body:expr),*], $steps:expr, $ahead:expr, $lines:tt, $($operands:tt)*) => {
        asm!(
            "2:",
            $($body,)*
            concat!("add {next_first}, ", $lines, " * 128"),
            concat!("add {next_second}, ", $lines, " * 128"),
            "dec {n}",
            "jnz 2b",
            next_first = inout(reg) $ahead.first => _,
            next_second = inout(reg) $ahead.second => _,
            n = inout(reg) $steps => _,
            $($operands)*
            options(readonly, nostack),
        )
    };
}

/// Tiles of the left operand by one tile of the right one or by two. Asks in four places, each
/// time for `lines` lines.
macro_rules! product_loop {
    ($op:literal, one, $left:expr, $first:expr, $steps:expr, $ahead:expr, $lines:tt) => {
        step_loop!(
            [
                "tileloadd tmm4, [{upper} + {row}*1]",
                ask!("next_first", "0", $lines),
                "tileloadd tmm6, [{first} + {first_row}*1]",
                ask!("next_second", "0", $lines),
                "tileloadd tmm5, [{lower} + {row}*1]",
                ask!("next_first", concat!($lines, " * 64"), $lines),
                concat!($op, " tmm0, tmm4, tmm6"),
                ask!("next_second", concat!($lines, " * 64"), $lines),
                concat!($op, " tmm1, tmm5, tmm6"),
                "add {upper}, {step}",
                "add {lower}, {step}",
                "add {first}, {first_step}"
            ],
            $steps, $ahead, $lines,
            upper = inout(reg) $left.upper => _,
            lower = inout(reg) $left.lower => _,
            row = in(reg) $left.row_stride,
            step = in(reg) $left.step,
            first = inout(reg) $first.start => _,
            first_row = in(reg) $first.row_stride,
            first_step = in(reg) TILE_ROWS * $first.row_stride,
        )
    };
    ($op:literal, two, $left:expr, $first:expr, $second:expr, $steps:expr, $ahead:expr,
     $lines:tt) => {
        step_loop!(
            [
                "tileloadd tmm4, [{upper} + {row}*1]",
                ask!("next_first", "0", $lines),
                "tileloadd tmm6, [{first} + {line}*1]",
                ask!("next_second", "0", $lines),
                "tileloadd tmm5, [{lower} + {row}*1]",
                concat!($op, " tmm0, tmm4, tmm6"),
                ask!("next_first", concat!($lines, " * 64"), $lines),
                "tileloadd tmm7, [{second} + {second_row}*1]",
                concat!($op, " tmm1, tmm5, tmm6"),
                concat!($op, " tmm2, tmm4, tmm7"),
                ask!("next_second", concat!($lines, " * 64"), $lines),
                concat!($op, " tmm3, tmm5, tmm7"),
                "add {upper}, {step}",
                "add {lower}, {step}",
                "add {first}, 1024",
                "add {second}, {second_step}"
            ],
            $steps, $ahead, $lines,
            upper = inout(reg) $left.upper => _,
            lower = inout(reg) $left.lower => _,
            row = in(reg) $left.row_stride,
            step = in(reg) $left.step,
            first = inout(reg) $first.start => _,
            line = in(reg) ROW_BYTES,
            second = inout(reg) $second.start => _,
            second_row = in(reg) $second.row_stride,
            second_step = in(reg) TILE_ROWS * $second.row_stride,
        )
    };
    ($op:literal, upper, $left:expr, $first:expr, $second:expr, $steps:expr, $ahead:expr,
     $lines:tt) => {
        step_loop!(
            [
                "tileloadd tmm4, [{upper} + {line}*1]",
                ask!("next_first", "0", $lines),
                "tileloadd tmm6, [{first} + {line}*1]",
                ask!("next_second", "0", $lines),
                concat!($op, " tmm0, tmm4, tmm6"),
                ask!("next_first", concat!($lines, " * 64"), $lines),
                "tileloadd tmm7, [{second} + {line}*1]",
                ask!("next_second", concat!($lines, " * 64"), $lines),
                concat!($op, " tmm2, tmm4, tmm7"),
                "add {upper}, {step}",
                "add {first}, 1024",
                "add {second}, 1024"
            ],
            $steps, $ahead, $lines,
            upper = inout(reg) $left.upper => _,
            step = in(reg) $left.step,
            first = inout(reg) $first.start => _,
            second = inout(reg) $second.start => _,
            line = in(reg) ROW_BYTES,
        )
    };
}

/// The loop for the lines that a step asks for, of which a quarter of both operands' is asked for
/// in each place.
macro_rules! products_of {
    ($op:literal, $kind:ident, $ahead:expr, $($args:expr),*) => {
        match $ahead.lines {
            0 => product_loop!($op, $kind, $($args,)* $ahead, 0),
            2 => product_loop!($op, $kind, $($args,)* $ahead, 1),
            4 => product_loop!($op, $kind, $($args,)* $ahead, 2),
            8 => product_loop!($op, $kind, $($args,)* $ahead, 4),
            _ => product_loop!($op, $kind, $($args,)* $ahead, 8),
        }
    };
}

macro_rules! products {
    ($kind:ident, $ahead:expr, $($args:expr),*) => {
        if E::IS_INT8 {
            products_of!("tdpbssd", $kind, $ahead, $($args),*);
        } else {
            products_of!("tdpbf16ps", $kind, $ahead, $($args),*);
        }
    };
}

/// One accumulator that goes straight to memory.
macro_rules! product_apart {
    ($sum:literal, $a:literal, $b:literal, $left:expr, $right:expr, $steps:expr, $to:expr) => {
        asm!(
            concat!("tilezero ", $sum),
            "2:",
            concat!("tileloadd ", $a, ", [{left} + {line}*1]"),
            concat!("tileloadd ", $b, ", [{right} + {line}*1]"),
            "add {left}, {step}",
            "add {right}, 1024",
            concat!("tdpbssd ", $sum, ", ", $a, ", ", $b),
            "dec {n}",
            "jnz 2b",
            concat!("tilestored [{to} + {line}*1], ", $sum),
            left = inout(reg) $left.0 => _,
            step = in(reg) $left.1,
            right = inout(reg) $right => _,
            n = inout(reg) $steps => _,
            to = in(reg) $to,
            line = in(reg) ROW_BYTES,
            options(nostack),
        )
    };
}

impl Tiles {
    /// Adds to the accumulators 0 and 1 the products of `left` with the first `steps` tiles of
    /// `first`.
    ///
    /// # Safety
    /// All tiles must be readable; `steps` is not 0.
    #[inline]
    pub unsafe fn multiply_one<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        steps: usize,
        ahead: Ahead,
    ) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times; requests for
        // lines never fault.
        unsafe { products!(one, ahead, left, first, steps) }
    }

    /// Adds to all four accumulators the products of `left` with the first `steps` tiles of
    /// `first`, which must be whole, and of `second`.
    ///
    /// # Safety
    /// As [`Tiles::multiply_one`].
    #[inline]
    pub unsafe fn multiply_two<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        second: Right,
        steps: usize,
        ahead: Ahead,
    ) {
        // SAFETY: as in `multiply_one`.
        unsafe { products!(two, ahead, left, first, second, steps) }
    }

    /// Adds to the accumulators 0 and 2 the products of the upper tile of `left`, whose rows are
    /// 64 bytes apart, with the first `steps` tiles of `first` and `second`, which must be whole.
    ///
    /// # Safety
    /// As [`Tiles::multiply_one`].
    #[inline]
    pub unsafe fn multiply_upper<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        second: Right,
        steps: usize,
        ahead: Ahead,
    ) {
        // SAFETY: as in `multiply_one`.
        unsafe { products!(upper, ahead, left, first, second, steps) }
    }

    /// Writes to `to` the products of bytes of one tile after the other of `left` (its first tile
    /// and the bytes to the next) and of `right` (tiles that follow each other). `turn` chooses
    /// registers, so that products of different turns can overlap.
    ///
    /// # Safety
    /// All tiles must be readable and `to` writable; `steps` is not 0.
    pub unsafe fn multiply_apart(
        &mut self,
        turn: usize,
        left: (*const u8, usize),
        right: *const u8,
        steps: usize,
        to: *mut u32,
    ) {
        // SAFETY: the caller vouches for the memory.
        unsafe {
            match turn % 4 {
                0 => product_apart!("tmm0", "tmm4", "tmm6", left, right, steps, to),
                1 => product_apart!("tmm1", "tmm5", "tmm7", left, right, steps, to),
                2 => product_apart!("tmm2", "tmm4", "tmm6", left, right, steps, to),
                _ => product_apart!("tmm3", "tmm5", "tmm7", left, right, steps, to),
            }
        }
    }
}
