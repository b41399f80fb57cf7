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
}
