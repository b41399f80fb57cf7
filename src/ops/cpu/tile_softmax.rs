//! Streaming softmax of scores that lie as tiles leave them: one row per key, one lane per query.
//!
//! Every operation is vertical, so that nothing of a query reaches another one's lane. Scores
//! are powers of two: queries were multiplied by log2 e beforehand. Weights are taken relative
//! to a reference, a whole number that rises when a score exceeds it by more than [`SLACK`].
//! Rescaling is therefore rare, and exact; a weight is at most `2^SLACK`. Weights are rounded to
//! bf16, and their totals are totals of the rounded ones, so that numerator and denominator
//! agree.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{TILE_LEN, TILE_ROWS};
use super::avx512::Avx512;
use super::context_parts::State;
use super::simd::tanh;

/// Keys per product: two tiles of rows of scores, one tile of rows of pairs of weights.
pub const CHUNK: usize = 2 * TILE_ROWS;
/// Accumulators of a chunk: upper and lower keys of one tile of queries, then of another.
pub type Sums = [[u32; TILE_LEN]; 4];
/// How far scores may exceed their reference, as a power of two.
const SLACK: f32 = 8.0;

/// Sixteen queries.
#[repr(C, align(64))]
pub struct Column {
    /// Their positions, ascending.
    position: [i32; TILE_ROWS],
    /// The first position that each one sees, ascending.
    first: [i32; TILE_ROWS],
    /// Scores are taken relative to this.
    reference: [f32; TILE_ROWS],
    /// Sums of weights.
    total: [f32; TILE_ROWS],
}

impl Column {
    /// Queries at ascending positions, each of which sees `window` positions up to its own.
    pub fn new(positions: [usize; TILE_ROWS], window: usize) -> Column {
        let place = |position: usize| i32::try_from(position).expect("a context below 2^31");
        Column {
            position: positions.map(place),
            first: positions.map(|position| place((position + 1).saturating_sub(window))),
            reference: [State::START.reference; TILE_ROWS],
            total: [State::START.total; TILE_ROWS],
        }
    }

    /// Forgets what was seen.
    pub fn restart(&mut self) {
        self.reference = [State::START.reference; TILE_ROWS];
        self.total = [State::START.total; TILE_ROWS];
    }

    /// What each query has seen since the last start.
    pub fn states(&self) -> [State; TILE_ROWS] {
        let state = |i: usize| State { reference: self.reference[i], total: self.total[i] };
        std::array::from_fn(state)
    }

    /// Positions that any of them sees.
    pub fn seen(&self) -> Range<usize> {
        self.first[0] as usize..self.position[TILE_ROWS - 1] as usize + 1
    }

    /// All of them see all keys of the chunk at `key`.
    fn sees_all(&self, key: usize) -> bool {
        self.first[TILE_ROWS - 1] as usize <= key && key + CHUNK <= self.position[0] as usize + 1
    }

    /// Turns scores of chunks, the first of which is at position `start`, into pairs of weights;
    /// `tile` says which half of each [`Sums`] is this one's. Scores come with what they must be
    /// multiplied by, a positive number per key. Returns what earlier sums must be multiplied
    /// by, where that is not 1 for all.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn weigh(
        &mut self,
        start: usize,
        (scores, scales): (&mut [Sums], Option<&[f32]>),
        tile: usize,
        weights: &mut [[u32; TILE_LEN]],
    ) -> Option<[f32; TILE_ROWS]> {
        match scales {
            Some(scales) => self.weigh_scaled::<true>(start, (scores, scales), tile, weights),
            None => self.weigh_scaled::<false>(start, (scores, &[]), tile, weights),
        }
    }

    /// As [`Column::weigh`]; scales are looked at when `SCALED`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn weigh_scaled<const SCALED: bool>(
        &mut self,
        start: usize,
        (scores, scales): (&mut [Sums], &[f32]),
        tile: usize,
        weights: &mut [[u32; TILE_LEN]],
    ) -> Option<[f32; TILE_ROWS]> {
        let scales = scales.as_chunks::<CHUNK>().0;
        assert!(!SCALED || scales.len() >= scores.len());
        // Rounded before anything is subtracted, as the reference is.
        let score = |chunk: usize, key: usize, row: &[u32; TILE_ROWS]| match SCALED {
            true => _mm512_mul_ps(load(row), _mm512_set1_ps(scales[chunk][key])),
            false => load(row),
        };
        let mut top = [_mm512_set1_ps(f32::NEG_INFINITY); 4];
        for (i, sums) in scores.iter_mut().enumerate() {
            let rows = rows_of(sums, tile);
            if !self.sees_all(start + i * CHUNK) {
                self.hide(start + i * CHUNK, rows);
            }
            for (key, row) in rows.iter().enumerate() {
                top[key % 4] = _mm512_max_ps(score(i, key, row), top[key % 4]);
            }
        }
        let top = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
        let factors = self.raise(top);
        let reference = load_f32(&self.reference);
        let mut total = load_f32(&self.total);
        for (i, (sums, weights)) in scores.iter_mut().zip(weights).enumerate() {
            let rows = rows_of(sums, tile);
            let weight = |key| exp2(_mm512_sub_ps(score(i, key, &rows[key]), reference));
            for (pair, weights) in weights.as_chunks_mut::<TILE_ROWS>().0.iter_mut().enumerate() {
                let pairs = interleave(weight(2 * pair), weight(2 * pair + 1));
                total = add_pairs(total, pairs);
                // SAFETY: sixteen words are written to an array of sixteen words.
                unsafe { _mm512_storeu_si512(weights.as_mut_ptr().cast(), pairs) }
            }
        }
        store_f32(&mut self.total, total);
        factors
    }

    /// Raises references to `top` where scores exceed them too far, and totals with them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn raise(&mut self, top: __m512) -> Option<[f32; TILE_ROWS]> {
        let old = load_f32(&self.reference);
        let limit = _mm512_add_ps(old, _mm512_set1_ps(SLACK));
        let rises = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, limit);
        if rises == 0 {
            return None;
        }
        const UP: i32 = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
        let new = _mm512_mask_roundscale_ps::<UP>(old, rises, top);
        let factors = _mm512_scalef_ps(_mm512_set1_ps(1.0), _mm512_sub_ps(old, new));
        store_f32(&mut self.reference, new);
        let total = _mm512_mul_ps(load_f32(&self.total), factors);
        store_f32(&mut self.total, total);
        let mut lanes = [0.0; TILE_ROWS];
        store_f32(&mut lanes, factors);
        Some(lanes)
    }

    /// Scores that a query must not see become -∞.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn hide(&self, key: usize, rows: &mut [[u32; TILE_ROWS]]) {
        // SAFETY: both arrays have sixteen words.
        let (first, last) = unsafe {
            (
                _mm512_loadu_si512(self.first.as_ptr().cast()),
                _mm512_loadu_si512(self.position.as_ptr().cast()),
            )
        };
        for (i, row) in rows.iter_mut().enumerate() {
            let key = _mm512_set1_epi32((key + i) as i32);
            let visible = _mm512_cmple_epi32_mask(first, key) & _mm512_cmple_epi32_mask(key, last);
            let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
            let scores = _mm512_mask_mov_ps(hidden, visible, load(row));
            // SAFETY: sixteen words are written to an array of sixteen words.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr().cast(), scores) }
        }
    }
}

/// Turns scores `x`, parts of `cap`, into `cap · tanh(x)` as powers of two; `tile` says which half
/// of each [`Sums`]. Scores are multiplied by their scales before.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn limit((scores, scales): (&mut [Sums], Option<&[f32]>), tile: usize, cap: f32) {
    // SAFETY: this function is only entered where the instructions exist.
    let simd = unsafe { Avx512::assume() };
    let cap = _mm512_set1_ps(cap * std::f32::consts::LOG2_E);
    let rows = scores.iter_mut().flat_map(|sums| rows_of(sums, tile));
    for (key, row) in rows.enumerate() {
        let scale = _mm512_set1_ps(scales.map_or(1.0, |scales| scales[key]));
        let capped = _mm512_mul_ps(tanh(simd, _mm512_mul_ps(load(row), scale)), cap);
        // SAFETY: sixteen words are written to an array of sixteen words.
        unsafe { _mm512_storeu_ps(row.as_mut_ptr().cast(), capped) }
    }
}

/// Multiplies the sums of one tile of queries, lane by lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn rescale(sums: &mut [Sums], tile: usize, factors: &[f32; TILE_ROWS]) {
    let factors = load_f32(factors);
    for sums in sums {
        for row in rows_of(sums, tile) {
            let scaled = _mm512_mul_ps(load(row), factors);
            // SAFETY: sixteen words are written to an array of sixteen words.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr().cast(), scaled) }
        }
    }
}

/// `before = before * factors[0] + sums * factors[1]` for one tile of queries, lane by lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn join_sums(
    before: &mut [Sums],
    sums: &mut [Sums],
    tile: usize,
    factors: [[f32; TILE_ROWS]; 2],
) {
    let [a, b] = factors.map(|factors| load_f32(&factors));
    for (before, sums) in before.iter_mut().zip(sums) {
        for (before, sums) in rows_of(before, tile).iter_mut().zip(rows_of(sums, tile)) {
            let joined = _mm512_fmadd_ps(load(sums), b, _mm512_mul_ps(load(before), a));
            // SAFETY: sixteen words are written to an array of sixteen words.
            unsafe { _mm512_storeu_ps(before.as_mut_ptr().cast(), joined) }
        }
    }
}

/// As [`rows_of`], to be read.
pub fn rows_in(sums: &Sums, tile: usize) -> &[[u32; TILE_ROWS]] {
    sums[2 * tile..2 * tile + 2].as_flattened().as_chunks().0
}

/// The upper and lower rows of one of the two tiles of columns.
pub fn rows_of(sums: &mut Sums, tile: usize) -> &mut [[u32; TILE_ROWS]] {
    sums[2 * tile..2 * tile + 2].as_flattened_mut().as_chunks_mut().0
}

/// `2^x` within a relative error of 2^-13, a sixteenth of a step of bf16; 0 at -∞.
///
/// The minimax polynomial of degree 3 of `2^f` for the fraction `f` of `x`, scaled by the power
/// of two below.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp2(x: __m512) -> __m512 {
    const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let fraction = _mm512_reduce_ps::<DOWN>(x);
    let mut p = _mm512_set1_ps(7.802_452e-2);
    for c in [2.260_671_6e-1, 6.958_335_6e-1, 9.999_252e-1] {
        p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, x)
}

/// Rounds to bf16: lane `i` of the result holds lanes `i` of both.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn interleave(even: __m512, odd: __m512) -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 16 {
            order[2 * i] = i as u16;
            order[2 * i + 1] = 16 + i as u16;
            i += 1;
        }
        order
    };
    // SAFETY: vectors of the same size, all of whose bits are valid; the array fills a vector.
    unsafe {
        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
        _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), rounded)
    }
}

/// Adds both halves of each lane of `pairs` to the sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn add_pairs(sums: __m512, pairs: __m512i) -> __m512 {
    // SAFETY: vectors of the same size, all of whose bits are valid.
    unsafe {
        let ones = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(0x3f80));
        _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(pairs), ones)
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[u32; TILE_ROWS]) -> __m512 {
    // SAFETY: an array of sixteen words.
    unsafe { _mm512_loadu_ps(row.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(lanes: &[f32; TILE_ROWS]) -> __m512 {
    // SAFETY: an array of sixteen floats.
    unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_f32(lanes: &mut [f32; TILE_ROWS], v: __m512) {
    // SAFETY: an array of sixteen floats.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), v) }
}
