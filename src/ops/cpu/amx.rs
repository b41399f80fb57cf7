//! AMX: matrix tiles of sixteen rows of 64 bytes, through inline assembly.
//!
//! Every tile has the full sixteen rows; what a matrix lacks is padded with zeros. A task that
//! multiplies opens a [`Tiles`] on its thread, which holds the tile configuration until it is
//! dropped. Registers are named in the assembly and the compiler never touches them, so
//! accumulators stay in tiles from one call to the next.
//!
//! Sums: `tdpbf16ps` adds the products of even and of odd positions of a row in two f32 sums,
//! each in ascending order, and adds both to the accumulator (subnormals are 0, rounding is to
//! nearest even). What a row or column yields never depends on its neighbours.

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::avx512::Avx512;
use super::avx512_bf16::Avx512Bf16;
use super::simd::Kernel;

/// Rows of a tile, and columns of an accumulator.
pub const TILE_ROWS: usize = 16;
/// Bytes of a row of a tile.
pub const ROW_BYTES: usize = 64;
/// Bytes of a tile.
pub const TILE_BYTES: usize = TILE_ROWS * ROW_BYTES;
/// Elements of an accumulator tile.
pub const TILE_LEN: usize = TILE_ROWS * TILE_ROWS;

/// Proof that the machine has AMX for bf16 and int8, AVX-512 with BF16, and that the kernel lets
/// this process use tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amx(Avx512Bf16);

impl Amx {
    /// The token, on a machine that has the instructions. Asks the kernel for the permission.
    pub fn detect() -> Option<Amx> {
        let pairs = Avx512Bf16::detect()?;
        (has_tiles() && may_use_tiles()).then_some(Amx(pairs))
    }

    /// The vectors beside the tiles.
    #[inline(always)]
    pub fn vectors(self) -> Avx512 {
        self.0.vectors()
    }

    /// The vectors of bf16 beside the tiles.
    #[inline(always)]
    pub fn pairs(self) -> Avx512Bf16 {
        self.0
    }

    /// Runs a kernel on the vectors beside the tiles.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        self.vectors().run(kernel)
    }
}

/// CPUID leaf 7: AMX-BF16, AMX-TILE, AMX-INT8; XCR0: the system saves tiles.
fn has_tiles() -> bool {
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & (1 << 27) == 0 {
        return false;
    }
    let (low, high): (u32, u32);
    // SAFETY: CPUID just said that the system uses XSAVE, so `xgetbv` exists.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    let enabled = u64::from(high) << 32 | u64::from(low);
    __cpuid_count(7, 0).edx & FEATURES == FEATURES && enabled & TILE_STATE == TILE_STATE
}

#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call that grants a permission and touches no memory of ours.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
             in("rsi") XFEATURE_XTILEDATA, out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight full tiles; the other eight places of the configuration must be zero.
static FULL_TILES: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// What the elements of a tile are, and the instruction that multiplies them.
pub trait TileElement: Copy + Send + Sync + 'static {
    /// Elements of a row of a tile: the step along the summed axis.
    const PER_ROW: usize;
    /// Multiplies integers.
    const IS_INT8: bool;
}

/// Brain floats, summed in f32.
#[derive(Clone, Copy)]
pub struct Bf16;
/// Signed bytes, summed in i32.
#[derive(Clone, Copy)]
pub struct Int8;

impl TileElement for Bf16 {
    const PER_ROW: usize = 32;
    const IS_INT8: bool = false;
}
impl TileElement for Int8 {
    const PER_ROW: usize = 64;
    const IS_INT8: bool = true;
}

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
    /// What will be the upper rows soon, asked for meanwhile; any address will do.
    pub next_upper: *const u8,
    /// As `next_upper`, for the lower rows.
    pub next_lower: *const u8,
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

/// This thread's tile registers.
///
/// Tiles 0 to 3 accumulate: `upper × first`, `lower × first`, `upper × second`,
/// `lower × second`, where first and second are tiles of sixteen columns of the right operand.
pub struct Tiles {
    // Registers belong to the thread that configured them.
    _thread: PhantomData<*mut ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: opened by `open` on this thread; nobody reads the tiles afterwards.
        unsafe { asm!("tilerelease", options(nomem, nostack)) }
    }
}

/// A loop over steps of the summed axis, for one tile of the right operand or for two, with the
/// given prefetches in between.
macro_rules! multiply_loop {
    ($op:literal, $left:expr, $first:expr, $steps:expr, [$($prefetch:literal),*]) => {
        asm!(
            "2:",
            "tileloadd tmm4, [{upper} + {row}*1]",
            "tileloadd tmm6, [{first} + {first_row}*1]",
            "tileloadd tmm5, [{lower} + {row}*1]",
            $($prefetch,)*
            concat!($op, " tmm0, tmm4, tmm6"),
            concat!($op, " tmm1, tmm5, tmm6"),
            "add {next_upper}, 1024",
            "add {next_lower}, 1024",
            "add {upper}, {step}",
            "add {lower}, {step}",
            "add {first}, {first_step}",
            "dec {n}",
            "jnz 2b",
            upper = inout(reg) $left.upper => _,
            lower = inout(reg) $left.lower => _,
            next_upper = inout(reg) $left.next_upper => _,
            next_lower = inout(reg) $left.next_lower => _,
            row = in(reg) $left.row_stride,
            step = in(reg) $left.step,
            first = inout(reg) $first.start => _,
            first_row = in(reg) $first.row_stride,
            first_step = in(reg) TILE_ROWS * $first.row_stride,
            n = inout(reg) $steps => _,
            options(readonly, nostack),
        )
    };
    ($op:literal, $left:expr, $first:expr, $second:expr, $steps:expr, [$($prefetch:literal),*]) => {
        asm!(
            "2:",
            "tileloadd tmm4, [{upper} + {row}*1]",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tileloadd tmm5, [{lower} + {row}*1]",
            $($prefetch,)*
            concat!($op, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{second} + {second_row}*1]",
            concat!($op, " tmm1, tmm5, tmm6"),
            concat!($op, " tmm2, tmm4, tmm7"),
            concat!($op, " tmm3, tmm5, tmm7"),
            "add {next_upper}, 1024",
            "add {next_lower}, 1024",
            "add {upper}, {step}",
            "add {lower}, {step}",
            "add {first}, 1024",
            "add {second}, {second_step}",
            "dec {n}",
            "jnz 2b",
            upper = inout(reg) $left.upper => _,
            lower = inout(reg) $left.lower => _,
            next_upper = inout(reg) $left.next_upper => _,
            next_lower = inout(reg) $left.next_lower => _,
            row = in(reg) $left.row_stride,
            step = in(reg) $left.step,
            first = inout(reg) $first.start => _,
            line = in(reg) ROW_BYTES,
            second = inout(reg) $second.start => _,
            second_row = in(reg) $second.row_stride,
            second_step = in(reg) TILE_ROWS * $second.row_stride,
            n = inout(reg) $steps => _,
            options(readonly, nostack),
        )
    };
}

/// A loop over steps for the upper tile of the left operand and two tiles of the right one, with
/// the given prefetches in between.
macro_rules! upper_loop {
    ($op:literal, $left:expr, $first:expr, $second:expr, $steps:expr, [$($prefetch:literal),*]) => {
        asm!(
            "2:",
            "tileloadd tmm4, [{upper} + {line}*1]",
            "tileloadd tmm6, [{first} + {line}*1]",
            $($prefetch,)*
            concat!($op, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{second} + {line}*1]",
            concat!($op, " tmm2, tmm4, tmm7"),
            "add {next_upper}, 1024",
            "add {next_lower}, 1024",
            "add {upper}, {step}",
            "add {first}, 1024",
            "add {second}, 1024",
            "dec {n}",
            "jnz 2b",
            upper = inout(reg) $left.upper => _,
            next_upper = inout(reg) $left.next_upper => _,
            next_lower = inout(reg) $left.next_lower => _,
            step = in(reg) $left.step,
            first = inout(reg) $first.start => _,
            second = inout(reg) $second.start => _,
            line = in(reg) ROW_BYTES,
            n = inout(reg) $steps => _,
            options(readonly, nostack),
        )
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

/// Asks for the next kibibyte of both halves of the left operand.
macro_rules! with_prefetches {
    ($loop:ident ! ($($args:expr),*)) => {
        $loop!($($args),*, [
            "prefetcht1 [{next_upper}]", "prefetcht1 [{next_upper} + 64]",
            "prefetcht1 [{next_upper} + 128]", "prefetcht1 [{next_upper} + 192]",
            "prefetcht1 [{next_upper} + 256]", "prefetcht1 [{next_upper} + 320]",
            "prefetcht1 [{next_upper} + 384]", "prefetcht1 [{next_upper} + 448]",
            "prefetcht1 [{next_upper} + 512]", "prefetcht1 [{next_upper} + 576]",
            "prefetcht1 [{next_upper} + 640]", "prefetcht1 [{next_upper} + 704]",
            "prefetcht1 [{next_upper} + 768]", "prefetcht1 [{next_upper} + 832]",
            "prefetcht1 [{next_upper} + 896]", "prefetcht1 [{next_upper} + 960]",
            "prefetcht1 [{next_lower}]", "prefetcht1 [{next_lower} + 64]",
            "prefetcht1 [{next_lower} + 128]", "prefetcht1 [{next_lower} + 192]",
            "prefetcht1 [{next_lower} + 256]", "prefetcht1 [{next_lower} + 320]",
            "prefetcht1 [{next_lower} + 384]", "prefetcht1 [{next_lower} + 448]",
            "prefetcht1 [{next_lower} + 512]", "prefetcht1 [{next_lower} + 576]",
            "prefetcht1 [{next_lower} + 640]", "prefetcht1 [{next_lower} + 704]",
            "prefetcht1 [{next_lower} + 768]", "prefetcht1 [{next_lower} + 832]",
            "prefetcht1 [{next_lower} + 896]", "prefetcht1 [{next_lower} + 960]"
        ])
    };
}

impl Tiles {
    /// Configures this thread's tiles.
    pub fn open(_: Amx) -> Tiles {
        // SAFETY: the token proves that tiles exist and may be used. The instruction reads the
        // configuration, so the block must not claim that it touches no memory.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const FULL_TILES, options(readonly, nostack)) }
        Tiles { _thread: PhantomData }
    }

    /// Sets the accumulators to 0.
    pub fn clear(&mut self) {
        // SAFETY: tiles are configured.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack)
            );
        }
    }

    /// Adds to the accumulators 0 and 1 the products of `left`, which comes from memory, with the
    /// first `steps` tiles of `first`.
    ///
    /// # Safety
    /// All tiles must be readable; `steps` is not 0.
    pub unsafe fn stream_one<E: TileElement>(&mut self, left: Left, first: Right, steps: usize) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times.
        unsafe {
            if E::IS_INT8 {
                with_prefetches!(multiply_loop!("tdpbssd", left, first, steps));
            } else {
                with_prefetches!(multiply_loop!("tdpbf16ps", left, first, steps));
            }
        }
    }

    /// As [`Tiles::multiply_two`], for a left operand that comes from memory.
    ///
    /// # Safety
    /// As [`Tiles::multiply_two`].
    pub unsafe fn stream_two<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        second: Right,
        steps: usize,
    ) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times.
        unsafe {
            if E::IS_INT8 {
                with_prefetches!(multiply_loop!("tdpbssd", left, first, second, steps));
            } else {
                with_prefetches!(multiply_loop!("tdpbf16ps", left, first, second, steps));
            }
        }
    }

    /// Adds to the accumulators 0 and 2 the products of the upper tile of `left`, whose rows are
    /// 64 bytes apart, with `first` and `second`, whole tiles that come from memory.
    ///
    /// # Safety
    /// As [`Tiles::multiply_two`].
    pub unsafe fn stream_upper<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        second: Right,
        steps: usize,
    ) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times.
        unsafe {
            if E::IS_INT8 {
                with_prefetches!(upper_loop!("tdpbssd", left, first, second, steps));
            } else {
                with_prefetches!(upper_loop!("tdpbf16ps", left, first, second, steps));
            }
        }
    }

    /// As [`Tiles::stream_upper`], for weights that a cache holds.
    ///
    /// # Safety
    /// As [`Tiles::multiply_two`].
    pub unsafe fn multiply_upper<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        second: Right,
        steps: usize,
    ) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times.
        unsafe {
            if E::IS_INT8 {
                upper_loop!("tdpbssd", left, first, second, steps, []);
            } else {
                upper_loop!("tdpbf16ps", left, first, second, steps, []);
            }
        }
    }

    /// Adds to the accumulators 0 and 1 the products of `left` with the first `steps` tiles of
    /// `first`.
    ///
    /// # Safety
    /// All tiles must be readable; `steps` is not 0.
    pub unsafe fn multiply_one<E: TileElement>(&mut self, left: Left, first: Right, steps: usize) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times.
        unsafe {
            if E::IS_INT8 {
                multiply_loop!("tdpbssd", left, first, steps, []);
            } else {
                multiply_loop!("tdpbf16ps", left, first, steps, []);
            }
        }
    }

    /// Adds to all four accumulators the products of `left` with the first `steps` tiles of
    /// `first`, which must be whole, and of `second`.
    ///
    /// # Safety
    /// All tiles must be readable; `steps` is not 0.
    pub unsafe fn multiply_two<E: TileElement>(
        &mut self,
        left: Left,
        first: Right,
        second: Right,
        steps: usize,
    ) {
        // SAFETY: the caller vouches for the memory; the loop runs `steps` times.
        unsafe {
            if E::IS_INT8 {
                multiply_loop!("tdpbssd", left, first, second, steps, []);
            } else {
                multiply_loop!("tdpbf16ps", left, first, second, steps, []);
            }
        }
    }

    /// Writes the accumulators, one after the other.
    pub fn store(&mut self, to: &mut [[u32; TILE_LEN]; 4]) {
        let to = to.as_mut_ptr();
        // SAFETY: each store fills sixteen rows of 64 bytes, one accumulator of `to`.
        unsafe {
            asm!(
                "tilestored [{to} + {line}*1], tmm0",
                "tilestored [{to} + {line}*1 + 1024], tmm1",
                "tilestored [{to} + {line}*1 + 2048], tmm2",
                "tilestored [{to} + {line}*1 + 3072], tmm3",
                to = in(reg) to, line = in(reg) ROW_BYTES, options(nostack),
            );
        }
    }

    /// Reads the accumulators, as [`Tiles::store`] writes them.
    pub fn load(&mut self, from: &[[u32; TILE_LEN]; 4]) {
        let from = from.as_ptr();
        // SAFETY: each load reads sixteen rows of 64 bytes, one accumulator of `from`.
        unsafe {
            asm!(
                "tileloadd tmm0, [{from} + {line}*1]",
                "tileloadd tmm1, [{from} + {line}*1 + 1024]",
                "tileloadd tmm2, [{from} + {line}*1 + 2048]",
                "tileloadd tmm3, [{from} + {line}*1 + 3072]",
                from = in(reg) from, line = in(reg) ROW_BYTES, options(readonly, nostack),
            );
        }
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
