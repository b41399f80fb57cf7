//! Peak arithmetic of x86-64: loops of FMA, of products of bytes and of bf16, and of AMX tile
//! products, with all operands in registers.

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

use super::peak::Arithmetic;

/// Passes of a loop per call: milliseconds.
const LOOPS: usize = 400_000;
/// Independent accumulators: latency 4 × 2 units, with room to spare.
const CHAINS: usize = 12;

/// What this machine has.
pub fn arithmetic() -> Vec<Arithmetic> {
    let flops = |lanes: usize| (LOOPS * CHAINS * lanes * 2) as f64;
    let mut found: Vec<Arithmetic> = Vec::new();
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: just detected.
        found.push(("f32 FMA, AVX2", flops(8), || unsafe { fma_avx2() }));
        // SAFETY: as above.
        found.push(("int8, AVX2", flops(16), || unsafe { bytes_avx2() }));
        // SAFETY: as above.
        found.push(("int4, AVX2", flops(32), || unsafe { four_bits_avx2() }));
    }
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just detected.
        found.push(("f32 FMA, AVX-512", flops(16), || unsafe { fma_avx512() }));
    }
    if is_x86_feature_detected!("avx512vnni") {
        // SAFETY: just detected.
        found.push(("int8 VNNI, AVX-512", flops(64), || unsafe { bytes_avx512() }));
    }
    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: just detected.
        found.push(("bf16, AVX-512", flops(32), || unsafe { bf16_avx512() }));
    }
    if has_amx(AMX_BF16) {
        let flops = (AMX_LOOPS * 4 * 16 * 16 * 32 * 2) as f64;
        // SAFETY: the tiles exist and the system lets this process use them.
        found.push(("bf16 AMX", flops, || unsafe { amx_bf16() }));
    }
    if has_amx(AMX_INT8) {
        let flops = (AMX_LOOPS * 4 * 16 * 16 * 64 * 2) as f64;
        // SAFETY: as above.
        found.push(("int8 AMX", flops, || unsafe { amx_int8() }));
    }
    found
}

#[target_feature(enable = "avx2,fma")]
fn fma_avx2() {
    let factor = _mm256_set1_ps(black_box(0.999));
    let mut acc = [factor; CHAINS];
    for _ in 0..LOOPS {
        for acc in &mut acc {
            *acc = _mm256_fmadd_ps(*acc, factor, factor);
        }
    }
    black_box(acc);
}

/// Codes as sixteen bits, sums of 32: without VNNI, the fastest exact sums of products of bytes.
#[target_feature(enable = "avx2")]
fn bytes_avx2() {
    let factor = _mm256_set1_epi16(black_box(1));
    let mut acc = [factor; CHAINS];
    for _ in 0..LOOPS {
        for acc in &mut acc {
            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(*acc, factor));
        }
    }
    black_box(acc);
}

/// Bytes of codes below 16, sums of sixteen bits.
#[target_feature(enable = "avx2")]
fn four_bits_avx2() {
    let factor = _mm256_set1_epi8(black_box(1));
    let mut acc = [factor; CHAINS];
    for _ in 0..LOOPS {
        for acc in &mut acc {
            *acc = _mm256_add_epi16(*acc, _mm256_maddubs_epi16(*acc, factor));
        }
    }
    black_box(acc);
}

#[target_feature(enable = "avx512f")]
fn fma_avx512() {
    let factor = _mm512_set1_ps(black_box(0.999));
    let mut acc = [factor; CHAINS];
    for _ in 0..LOOPS {
        for acc in &mut acc {
            *acc = _mm512_fmadd_ps(*acc, factor, factor);
        }
    }
    black_box(acc);
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn bytes_avx512() {
    let factor = _mm512_set1_epi8(black_box(1));
    let mut acc = [factor; CHAINS];
    for _ in 0..LOOPS {
        for acc in &mut acc {
            *acc = _mm512_dpbusd_epi32(*acc, factor, factor);
        }
    }
    black_box(acc);
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_avx512() {
    // SAFETY: vectors of the same size, all of whose bits are valid.
    let factor: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi16(black_box(0x3f00))) };
    let mut acc = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..LOOPS {
        for acc in &mut acc {
            *acc = _mm512_dpbf16_ps(*acc, factor, factor);
        }
    }
    black_box(acc);
}

/// Passes of four tile products.
const AMX_LOOPS: usize = 50_000;
/// `ARCH_REQ_XCOMP_PERM` for the tile data state.
const REQUEST_TILES: (libc::c_long, libc::c_long) = (0x1023, 18);

/// Bits of CPUID leaf 7: tiles, and what they multiply.
const AMX_TILE: u32 = 1 << 24;
const AMX_BF16: u32 = 1 << 22;
const AMX_INT8: u32 = 1 << 25;

/// CPUID says tiles and `what`, and Linux grants the tile state.
fn has_amx(what: u32) -> bool {
    let features = __cpuid_count(7, 0).edx;
    let both = AMX_TILE | what;
    // SAFETY: asks for a permission; no memory is involved.
    features & both == both
        && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_TILES.0, REQUEST_TILES.1) } == 0
}

/// The operand of `ldtilecfg`: unused tiles must have no rows and columns.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Four accumulators, two tiles of each operand, multiplied in a loop by `$op`.
macro_rules! amx_loop {
    ($name:ident, $op:literal) => {
        /// # Safety
        /// The machine must have the instruction and the process the permission to use it.
        unsafe fn $name() {
            let mut config = TileConfig {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: [0; 16],
                rows: [0; 16],
            };
            config.row_bytes[..8].fill(64);
            config.rows[..8].fill(16);
            // SAFETY: the configuration is valid and read within its 64 bytes (the block may
            // read memory, so that the stores above are not dropped); tiles are released before
            // the end.
            unsafe {
                asm!(
                    "ldtilecfg [{config}]",
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                    "2:",
                    concat!($op, " tmm0, tmm4, tmm6"),
                    concat!($op, " tmm1, tmm4, tmm7"),
                    concat!($op, " tmm2, tmm5, tmm6"),
                    concat!($op, " tmm3, tmm5, tmm7"),
                    "dec {count}",
                    "jnz 2b",
                    "tilerelease",
                    config = in(reg) &config,
                    count = inout(reg) AMX_LOOPS => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

amx_loop!(amx_bf16, "tdpbf16ps");
amx_loop!(amx_int8, "tdpbssd");
