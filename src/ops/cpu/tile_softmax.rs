//! Streaming softmax of scores that lie as tiles leave them: one row per key, one lane per query.
//!
//! Every operation is vertical, so that nothing of a query reaches another one's lane. Scores
//! are powers of two: queries were multiplied by log2 e beforehand. Weights are taken relative
//! to a reference, a whole number: the largest score of the first keys that a query sees, from
//! which sums of products begin, so that subtracting it costs nothing. It rises when the weights
//! of a chunk of keys sum to more than [`MOST`], which no score has to be looked at for.
//! Rescaling is therefore rare, and exact. Weights are rounded to
//! bf16, and their totals are totals of the rounded ones, so that numerator and denominator
//! agree.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{TILE_LEN, TILE_ROWS};
use super::avx512::{Avx512, transpose16};
use super::context_parts::State;
use super::simd::tanh;
use super::tile_sums::Row;

/// Keys per product of weights and values: two tiles of rows of scores, one tile of rows of pairs
/// of weights.
pub const CHUNK: usize = 2 * TILE_ROWS;
/// Scores of a chunk: a row per key.
pub type Scores = [Row; CHUNK];
/// Weights of a chunk, as a right operand: a row per pair of keys.
pub type Weights = [Row; TILE_ROWS];
/// What the weights of a chunk may sum to. A bf16 has the exponents of an f32, so that all
/// weights that count beside such a sum are exact to their eighth bit.
const MOST: f32 = (1 << 24) as f32;

/// How scores of a chunk came out of the products.
#[derive(Clone, Copy)]
pub enum Raw<'a> {
    /// Begun from this bias of their column.
    Biased(&'a [f32; TILE_ROWS]),
    /// Begun from 0.
    Plain {
        /// What to multiply each key's by.
        scales: Option<&'a [f32; CHUNK]>,
        /// They are parts of `cap`, and become `cap · tanh(score)`.
        cap: Option<f32>,
    },
}

/// Sixteen queries.
#[repr(C, align(64))]
pub struct Column {
    /// Their positions, ascending.
    position: [i32; TILE_ROWS],
    /// The first position that each one sees, ascending.
    first: [i32; TILE_ROWS],
    /// Scores are taken relative to this.
    reference: [f32; TILE_ROWS],
    /// What is added to scores: minus the reference, or 0 before there is one.
    bias: [f32; TILE_ROWS],
    /// Sums of weights.
    total: [f32; TILE_ROWS],
    /// Whether sums of weighted values were written since the last start.
    pub has_sums: bool,
}

impl Column {
    /// Queries at ascending positions, each of which sees `window` positions up to its own.
    pub fn new(positions: [usize; TILE_ROWS], window: usize) -> Column {
        let place = |position: usize| i32::try_from(position).expect("a context below 2^31");
        Column {
            position: positions.map(place),
            first: positions.map(|position| place((position + 1).saturating_sub(window))),
            reference: [State::START.reference; TILE_ROWS],
            bias: [0.0; TILE_ROWS],
            total: [State::START.total; TILE_ROWS],
            has_sums: false,
        }
    }

    /// Forgets what was seen.
    pub fn restart(&mut self) {
        self.reference = [State::START.reference; TILE_ROWS];
        self.bias = [0.0; TILE_ROWS];
        self.total = [State::START.total; TILE_ROWS];
        self.has_sums = false;
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

    /// What sums of products of [`Raw::Biased`] begin from.
    pub fn bias(&self) -> &[f32; TILE_ROWS] {
        &self.bias
    }

    /// All of them see all keys of the chunk at `key`.
    fn sees_all(&self, key: usize) -> bool {
        self.first[TILE_ROWS - 1] as usize <= key && key + CHUNK <= self.position[0] as usize + 1
    }

    /// Makes scores of the chunk at position `key` powers of two relative to the references, and
    /// -∞ where a query must not see the key. Queries that see their first keys get a reference.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub fn prepare(&mut self, key: usize, scores: &mut Scores, raw: Raw<'_>) {
        match raw {
            Raw::Biased(bias) => {
                let moved = _mm512_sub_ps(load_f32(&self.bias), load_f32(bias));
                if _mm512_test_epi32_mask(_mm512_castps_si512(moved), _mm512_set1_epi32(-1)) != 0 {
                    shift(scores, moved);
                }
            }
            Raw::Plain { scales, cap } => self.finish(scores, scales, cap),
        }
        if !self.sees_all(key) {
            self.hide(key, scores);
        }
        let start = _mm512_set1_ps(State::START.reference);
        let fresh = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(load_f32(&self.reference), start);
        if fresh != 0 {
            self.raise(scores, fresh);
        }
    }

    /// Adds the sums of a chunk's weights to the totals. Where some exceed [`MOST`], does nothing
    /// but return those lanes: their references must rise, and the chunk be weighed again.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn add_to_totals(&mut self, sums: __m512) -> Result<(), __mmask16> {
        let lanes = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(sums, _mm512_set1_ps(MOST));
        if lanes != 0 {
            return Err(lanes);
        }
        self.add(sums);
        Ok(())
    }

    /// Adds the sums of a chunk's weights to the totals, whatever they are.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn add(&mut self, sums: __m512) {
        let total = _mm512_add_ps(load_f32(&self.total), sums);
        store_f32(&mut self.total, total);
    }

    /// Raises references of `lanes` to their largest score, and moves scores and totals with them.
    /// Returns what earlier weights and sums must be multiplied by.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn raise(&mut self, scores: &mut Scores, lanes: __mmask16) -> [f32; TILE_ROWS] {
        const UP: i32 = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut top = [hidden; 4];
        for (key, row) in scores.iter().enumerate() {
            top[key % 4] = _mm512_max_ps(load(row), top[key % 4]);
        }
        let top = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
        let lanes = lanes & _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, hidden);
        let rise = _mm512_maskz_roundscale_ps::<UP>(lanes, top);
        let (zero, one) = (_mm512_setzero_ps(), _mm512_set1_ps(1.0));
        let fall = _mm512_sub_ps(zero, rise);
        shift(scores, fall);
        let old = load_f32(&self.reference);
        let bias = _mm512_add_ps(load_f32(&self.bias), fall);
        store_f32(&mut self.bias, bias);
        store_f32(&mut self.reference, _mm512_mask_sub_ps(old, lanes, zero, bias));
        // What had no reference has nothing to be multiplied, and its rise may be anything.
        let start = _mm512_set1_ps(State::START.reference);
        let had_one = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(old, start);
        let factors = _mm512_mask_scalef_ps(one, had_one, one, fall);
        let total = _mm512_mul_ps(load_f32(&self.total), factors);
        store_f32(&mut self.total, total);
        let mut by_lane = [0.0; TILE_ROWS];
        store_f32(&mut by_lane, factors);
        by_lane
    }

    /// Scales and caps scores as [`Raw::Plain`] says, and adds the bias.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn finish(&self, scores: &mut Scores, scales: Option<&[f32; CHUNK]>, cap: Option<f32>) {
        // SAFETY: this function is only entered where the instructions exist.
        let simd = unsafe { Avx512::assume() };
        let bias = load_f32(&self.bias);
        for (key, row) in scores.iter_mut().enumerate() {
            let scale = _mm512_set1_ps(scales.map_or(1.0, |scales| scales[key]));
            let score = match cap {
                Some(cap) => {
                    let cap = _mm512_set1_ps(cap * std::f32::consts::LOG2_E);
                    _mm512_fmadd_ps(tanh(simd, _mm512_mul_ps(load(row), scale)), cap, bias)
                }
                None => _mm512_fmadd_ps(load(row), scale, bias),
            };
            store(row, score);
        }
    }

    /// Scores that a query must not see become -∞.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn hide(&self, key: usize, scores: &mut Scores) {
        // SAFETY: both arrays have sixteen words.
        let (first, last) = unsafe {
            (
                _mm512_loadu_si512(self.first.as_ptr().cast()),
                _mm512_loadu_si512(self.position.as_ptr().cast()),
            )
        };
        for (i, row) in scores.iter_mut().enumerate() {
            let key = _mm512_set1_epi32((key + i) as i32);
            let visible = _mm512_cmple_epi32_mask(first, key) & _mm512_cmple_epi32_mask(key, last);
            let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
            store(row, _mm512_mask_mov_ps(hidden, visible, load(row)));
        }
    }
}

/// Turns prepared scores of the keys of `pairs` into weights, and adds the weights to `sums`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn weigh(
    scores: &Scores,
    pairs: Range<usize>,
    weights: &mut Weights,
    mut sums: __m512,
) -> __m512 {
    let scores = scores.as_chunks::<2>().0[pairs.clone()].iter();
    for (to, [even, odd]) in weights[pairs].iter_mut().zip(scores) {
        let pair = truncate(exp2(load(even)), exp2(load(odd)));
        sums = add_pair(sums, pair);
        store(to, _mm512_castsi512_ps(pair));
    }
    sums
}

/// Multiplies weights by powers of two, lane by lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn rescale_weights(weights: &mut Weights, factors: &[f32; TILE_ROWS]) {
    let factors = load_f32(factors);
    for row in weights {
        let pair = _mm512_castps_si512(load(row));
        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
        let odd = _mm512_castsi512_ps(_mm512_and_si512(pair, upper_halves()));
        let pair = truncate(_mm512_mul_ps(even, factors), _mm512_mul_ps(odd, factors));
        store(row, _mm512_castsi512_ps(pair));
    }
}

/// Weights with a row per query instead of a lane: a left operand.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn turn(weights: &mut Weights) {
    let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
    for (line, row) in lines.iter_mut().zip(&*weights) {
        *line = load(row);
    }
    // SAFETY: the instructions exist here.
    let lines = unsafe { transpose16(lines) };
    for (row, line) in weights.iter_mut().zip(lines) {
        store(row, line);
    }
}

/// As [`rescale`], where sums have a row per query.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn rescale_turned(sums: &mut [[u32; TILE_LEN]], factors: &[f32; TILE_ROWS]) {
    for tile in sums {
        for (row, factor) in tile.as_chunks_mut::<TILE_ROWS>().0.iter_mut().zip(factors) {
            store(row, _mm512_mul_ps(load(row), _mm512_set1_ps(*factor)));
        }
    }
}

/// Multiplies rows of sums, lane by lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn rescale(sums: &mut [Row], factors: &[f32; TILE_ROWS]) {
    let factors = load_f32(factors);
    for row in sums {
        store(row, _mm512_mul_ps(load(row), factors));
    }
}

/// `before = before * factors[0] + sums * factors[1]`, lane by lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn join_sums(before: &mut [Row], sums: &[Row], factors: [[f32; TILE_ROWS]; 2]) {
    let [a, b] = factors.map(|factors| load_f32(&factors));
    for (before, sums) in before.iter_mut().zip(sums) {
        store(before, _mm512_fmadd_ps(load(sums), b, _mm512_mul_ps(load(before), a)));
    }
}

#[target_feature(enable = "avx512f")]
fn shift(scores: &mut Scores, by: __m512) {
    for row in scores {
        store(row, _mm512_add_ps(load(row), by));
    }
}

/// `2^x` within a relative error of 2^-13, a sixteenth of a step of bf16, and half a step of bf16
/// more, so that truncating rounds to nearest; 0 at -∞.
///
/// The minimax polynomial of degree 3 of `2^f` for the fraction `f` of `x`, scaled by the power
/// of two below. The polynomial lies between 1 and 2, where a step of bf16 is 2^-7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp2(x: __m512) -> __m512 {
    const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let fraction = _mm512_reduce_ps::<DOWN>(x);
    let mut p = _mm512_set1_ps(7.802_452e-2);
    for c in [2.260_671_6e-1, 6.958_335_6e-1, 9.999_252e-1 + 1.0 / 256.0] {
        p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn upper_halves() -> __m512i {
    _mm512_set1_epi32(0xffff_0000_u32 as i32)
}

/// The upper halves of both: lane `i` of the result holds lanes `i` of both as bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn truncate(even: __m512, odd: __m512) -> __m512i {
    let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
    // `even | (odd & upper_halves)`.
    _mm512_ternarylogic_epi32::<0xf8>(even, _mm512_castps_si512(odd), upper_halves())
}

/// Adds both halves of each lane of `pair` to the sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn add_pair(sums: __m512, pair: __m512i) -> __m512 {
    // SAFETY: vectors of the same size, all of whose bits are valid.
    unsafe {
        let ones = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(0x3f80));
        _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(pair), ones)
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &Row) -> __m512 {
    // SAFETY: an array of sixteen words.
    unsafe { _mm512_loadu_ps(row.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(row: &mut Row, v: __m512) {
    // SAFETY: an array of sixteen words.
    unsafe { _mm512_storeu_ps(row.as_mut_ptr().cast(), v) }
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
