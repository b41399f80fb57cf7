//! The column with the largest result of every row, found while results are computed: what greedy
//! sampling wants to know of logits, without writing and reading them.
//!
//! Threads share a word per row. A vector of results is compared with the best so far, which few
//! vectors reach, so a row costs a comparison where it would have cost a store. What is kept is the
//! largest of words in one order, and therefore the same whoever comes first. That order is the
//! sampler's (`sample/kernels::Argmax`): of equal columns the first, zeros of both signs are
//! equal, a NaN is never best, and where all are -∞ it is column 0.

use std::sync::atomic::{AtomicU64, Ordering};

use super::simd::{MAX_LANES, Simd};

/// What rows of results have best so far.
pub struct BestColumns {
    /// [`word`]s. Nothing else is handed from thread to thread by them, so `Relaxed` is enough: the
    /// pool orders what comes after an operation.
    rows: Vec<AtomicU64>,
}

impl BestColumns {
    /// For rows of which nothing is known.
    pub fn new(num_rows: usize) -> BestColumns {
        let nothing = || AtomicU64::new(word(f32::NEG_INFINITY, 0));
        BestColumns { rows: std::iter::repeat_with(nothing).take(num_rows).collect() }
    }

    /// Those of some rows.
    #[inline(always)]
    pub fn rows(&self, rows: std::ops::Range<usize>) -> &[AtomicU64] {
        &self.rows[rows]
    }

    /// The best column of every row.
    pub fn into_columns(self) -> Vec<u32> {
        self.rows.into_iter().map(|row| !(row.into_inner() as u32)).collect()
    }
}

/// Compares results of one row, of which the first `len` exist and are those of the columns from
/// `first` on.
#[inline(always)]
pub fn offer<S: Simd>(simd: S, row: &AtomicU64, (first, len): (u32, u32), values: S::V) {
    let best = value(row.load(Ordering::Relaxed));
    let exist = ((1u64 << len) - 1) as u32;
    let reached = simd.at_least(values, simd.splat(best)) & exist;
    if reached != 0 {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: there is room for the widest vector.
        unsafe { simd.store_f32(lanes.as_mut_ptr(), values) }
        raise(row, first, &lanes, reached);
    }
}

/// Takes in the lanes whose bits are set.
#[cold]
#[inline(never)]
fn raise(row: &AtomicU64, first: u32, lanes: &[f32; MAX_LANES], mut reached: u32) {
    let mut best = 0;
    while reached != 0 {
        let lane = reached.trailing_zeros();
        best = best.max(word(lanes[lane as usize], first + lane));
        reached &= reached - 1;
    }
    row.fetch_max(best, Ordering::Relaxed);
}

const SIGN: u32 = 1 << 31;

/// A result that is no NaN and its column, larger the better it is: the result's bits in the order
/// of numbers, then the column's complement.
fn word(value: f32, column: u32) -> u64 {
    // Of the two zeros this leaves one.
    let bits = (value + 0.0).to_bits();
    let ordered = if bits & SIGN == 0 { bits | SIGN } else { !bits };
    u64::from(ordered) << 32 | u64::from(!column)
}

/// The result of a word.
#[inline(always)]
fn value(word: u64) -> f32 {
    let ordered = (word >> 32) as u32;
    f32::from_bits(if ordered & SIGN == 0 { !ordered } else { ordered & !SIGN })
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::sample::kernels::Argmax;
    use super::super::simd::Kernel;
    use super::*;

    struct Offer<'a> {
        row: &'a AtomicU64,
        first: usize,
        x: &'a [f32],
    }

    impl Kernel for Offer<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for at in (0..self.x.len()).step_by(S::LANES) {
                let len = S::LANES.min(self.x.len() - at);
                let values = super::super::simd::load(simd, self.x, at);
                offer(simd, self.row, ((self.first + at) as u32, len as u32), values);
            }
        }
    }

    #[test]
    fn the_best_column_is_the_samplers_in_whatever_order_columns_come() {
        use std::f32::consts::PI;
        const NAN: f32 = f32::NAN;
        const LESS: f32 = f32::NEG_INFINITY;
        let mut rows = vec![
            vec![LESS; 40],
            vec![NAN; 40],
            vec![0.0; 40],
            vec![-0.0; 40],
            vec![-PI; 37],
            vec![NAN, LESS, -PI, NAN, -PI],
            vec![LESS, NAN, f32::INFINITY, 3.0, f32::INFINITY],
            vec![f32::MIN, LESS, f32::MIN],
        ];
        rows.push((0..40).map(|i| if i % 3 == 0 { -0.0 } else { 0.0 }).collect());
        rows.push((0..100).map(|i| [-1.5, NAN, 7.0, -0.0, 6.5][i * i % 5]).collect());
        rows.push((0..100).map(|i| -1.0 - (i as f32 - 60.0).abs()).collect());
        for isa in Isa::supported() {
            for row in &rows {
                let parts: Vec<_> = row.chunks(16).enumerate().collect();
                let offered = |parts: &mut dyn Iterator<Item = &(usize, &[f32])>| {
                    let best = BestColumns::new(1);
                    for &(i, x) in parts {
                        isa.run(Offer { row: &best.rows[0], first: 16 * i, x });
                    }
                    best.into_columns()[0]
                };
                let want = isa.run(Argmax { x: row }).0;
                assert_eq!(offered(&mut parts.iter()), want, "{} {row:?}", isa.name());
                assert_eq!(offered(&mut parts.iter().rev()), want, "{} {row:?}", isa.name());
            }
        }
    }
}
