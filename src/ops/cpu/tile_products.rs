//! Tile products, through inline assembly: steps along the summed axis, in which loads, products,
//! and requests for what memory shall bring next alternate.
//!
//! Requests are spread between the loads. A core has sixteen places for lines that are on their
//! way to its first-level cache; a burst of requests takes all of them for as long as memory
//! needs, and tiles that the second-level cache holds wait behind it.

use std::arch::asm;

use super::amx::{ROW_BYTES, TileElement, Tiles};

/// The left operand: two tiles of rows, sixteen rows each, 64 bytes apart.
#[derive(Clone, Copy)]
pub struct Left {
    /// The first tile of the upper sixteen rows.
    pub upper: *const u8,
    /// The first tile of the lower sixteen rows.
    pub lower: *const u8,
    /// Bytes from a tile to the next along the summed axis.
    pub step: usize,
}

/// What memory shall bring to the second-level cache meanwhile. Any address will do.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// Where the next lines of one operand lie.
    pub first: *const u8,
    /// The same of another.
    pub second: *const u8,
    /// Lines that a step asks for: 0, 1 of the first operand, or half a power of two of each, up to
    /// [`Ahead::MOST`] in all.
    pub lines: usize,
}

impl Ahead {
    /// Lines of two tiles: what a step asks for at most.
    pub const MOST: usize = 32;
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

/// A step of products by one block. `$a` and `$b` lines of the first operand are asked for, `$c` and
/// `$d` of the second.
macro_rules! step_by_one {
    ($op:literal, $left:expr, $first:expr, $ahead:expr, [$a:tt $b:tt $c:tt $d:tt]) => {
        asm!(
            "tileloadd tmm4, [{upper} + {row}*1]",
            ask!("next_first", "0", $a),
            "tileloadd tmm6, [{first} + {row}*1]",
            ask!("next_second", "0", $c),
            "tileloadd tmm5, [{lower} + {row}*1]",
            ask!("next_first", concat!($a, " * 64"), $b),
            concat!($op, " tmm0, tmm4, tmm6"),
            ask!("next_second", concat!($c, " * 64"), $d),
            concat!($op, " tmm1, tmm5, tmm6"),
            concat!("add {next_first}, (", $a, " + ", $b, ") * 64"),
            concat!("add {next_second}, (", $c, " + ", $d, ") * 64"),
            upper = in(reg) $left.upper,
            lower = in(reg) $left.lower,
            first = in(reg) $first,
            row = in(reg) ROW_BYTES,
            next_first = inout(reg) $ahead.first,
            next_second = inout(reg) $ahead.second,
            options(readonly, nostack),
        )
    };
}

/// The same by two blocks, with the instruction that loads rows.
macro_rules! step_by_two {
    ($op:literal, $load:literal, $left:expr, $first:expr, $second:expr, $ahead:expr,
     [$a:tt $b:tt $c:tt $d:tt]) => {
        asm!(
            concat!($load, " tmm4, [{upper} + {row}*1]"),
            ask!("next_first", "0", $a),
            "tileloadd tmm6, [{first} + {row}*1]",
            ask!("next_second", "0", $c),
            concat!($load, " tmm5, [{lower} + {row}*1]"),
            concat!($op, " tmm0, tmm4, tmm6"),
            ask!("next_first", concat!($a, " * 64"), $b),
            "tileloadd tmm7, [{second} + {row}*1]",
            concat!($op, " tmm1, tmm5, tmm6"),
            concat!($op, " tmm2, tmm4, tmm7"),
            ask!("next_second", concat!($c, " * 64"), $d),
            concat!($op, " tmm3, tmm5, tmm7"),
            concat!("add {next_first}, (", $a, " + ", $b, ") * 64"),
            concat!("add {next_second}, (", $c, " + ", $d, ") * 64"),
            upper = in(reg) $left.upper,
            lower = in(reg) $left.lower,
            first = in(reg) $first,
            second = in(reg) $second,
            row = in(reg) ROW_BYTES,
            next_first = inout(reg) $ahead.first,
            next_second = inout(reg) $ahead.second,
            options(readonly, nostack),
        )
    };
}

/// The upper rows by two blocks.
macro_rules! step_of_upper {
    ($op:literal, $left:expr, $first:expr, $second:expr, $ahead:expr, [$a:tt $b:tt $c:tt $d:tt]) => {
        asm!(
            "tileloadd tmm4, [{upper} + {row}*1]",
            ask!("next_first", "0", $a),
            "tileloadd tmm6, [{first} + {row}*1]",
            ask!("next_second", "0", $c),
            concat!($op, " tmm0, tmm4, tmm6"),
            ask!("next_first", concat!($a, " * 64"), $b),
            "tileloadd tmm7, [{second} + {row}*1]",
            ask!("next_second", concat!($c, " * 64"), $d),
            concat!($op, " tmm2, tmm4, tmm7"),
            concat!("add {next_first}, (", $a, " + ", $b, ") * 64"),
            concat!("add {next_second}, (", $c, " + ", $d, ") * 64"),
            upper = in(reg) $left.upper,
            first = in(reg) $first,
            second = in(reg) $second,
            row = in(reg) ROW_BYTES,
            next_first = inout(reg) $ahead.first,
            next_second = inout(reg) $ahead.second,
            options(readonly, nostack),
        )
    };
}

/// A step with the lines that it asks for, in as many places as there are.
macro_rules! step_asking {
    ($op:literal, $kind:ident, $ahead:expr, $($args:tt)*) => {
        match LINES {
            0 => $kind!($op, $($args)*, $ahead, [0 0 0 0]),
            1 => $kind!($op, $($args)*, $ahead, [1 0 0 0]),
            2 => $kind!($op, $($args)*, $ahead, [1 0 1 0]),
            4 => $kind!($op, $($args)*, $ahead, [1 1 1 1]),
            8 => $kind!($op, $($args)*, $ahead, [2 2 2 2]),
            16 => $kind!($op, $($args)*, $ahead, [4 4 4 4]),
            _ => $kind!($op, $($args)*, $ahead, [8 8 8 8]),
        }
    };
}

/// The element's instruction.
macro_rules! products {
    ($kind:ident, $($args:tt)*) => {
        if E::IS_INT8 {
            $kind!("tdpbssd", $($args)*)
        } else {
            $kind!("tdpbf16ps", $($args)*)
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
    /// Adds to the accumulators 0 and 1 the products of the first tiles of `left` with the tile at `first`, and asks for the next lines ahead.
    ///
    /// # Safety
    /// All tiles must be readable.
    #[inline(always)]
    pub unsafe fn step_by_one<E: TileElement, const LINES: usize>(
        &mut self,
        left: &Left,
        first: *const u8,
        ahead: &mut Ahead,
    ) {
        // SAFETY: the caller vouches for the memory; requests for lines never fault.
        unsafe { products!(step_asking, step_by_one, ahead, left, first) }
    }

    /// Adds to all four accumulators the products of the first tiles of `left`, whose rows are 64
    /// bytes apart, with the tiles at `first` and `second`. With `PASSES`, rows are read around
    /// the first-level cache, which keeps weights for other rows.
    ///
    /// # Safety
    /// As of [`Tiles::step_by_one`].
    #[inline(always)]
    pub unsafe fn step_by_two<E: TileElement, const PASSES: bool, const LINES: usize>(
        &mut self,
        left: &Left,
        [first, second]: [*const u8; 2],
        ahead: &mut Ahead,
    ) {
        // SAFETY: as in `step_by_one`.
        unsafe {
            if PASSES {
                products!(step_asking, step_by_two, ahead, "tileloaddt1", left, first, second);
            } else {
                products!(step_asking, step_by_two, ahead, "tileloadd", left, first, second);
            }
        }
    }

    /// Adds to the accumulators 0 and 2 the products of the first upper tile of `left`, whose rows
    /// are 64 bytes apart, with the tiles at `first` and `second`.
    ///
    /// # Safety
    /// As of [`Tiles::step_by_one`].
    #[inline(always)]
    pub unsafe fn step_of_upper<E: TileElement, const LINES: usize>(
        &mut self,
        left: &Left,
        [first, second]: [*const u8; 2],
        ahead: &mut Ahead,
    ) {
        // SAFETY: as in `step_by_one`.
        unsafe { products!(step_asking, step_of_upper, ahead, left, first, second) }
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
