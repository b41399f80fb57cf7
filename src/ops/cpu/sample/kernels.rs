//! Vector passes over one row of logits or weights.

use super::super::isa::Isa;
use super::super::simd::{Kernel, Simd, exp, load, store};

/// Elements per block of a pass that sums: f32 within a block, f64 over blocks.
const BLOCK: usize = 512;

/// Replaces NaN by -inf.
pub struct Clean<'a> {
    /// Logits.
    pub x: &'a mut [f32],
}

impl Kernel for Clean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let least = simd.splat(f32::NEG_INFINITY);
        for at in (0..self.x.len()).step_by(S::LANES) {
            let x = load(simd, self.x, at);
            store(simd, self.x, at, simd.max(x, least));
        }
    }
}

/// Divides all elements.
pub struct Divide<'a> {
    /// Logits.
    pub x: &'a mut [f32],
    /// The temperature.
    pub by: f32,
}

impl Kernel for Divide<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let by = simd.splat(self.by);
        for at in (0..self.x.len()).step_by(S::LANES) {
            let x = load(simd, self.x, at);
            store(simd, self.x, at, simd.div(x, by));
        }
    }
}

/// The first largest element and its value; NaN counts as -inf.
pub struct Argmax<'a> {
    /// Logits, at least one.
    pub x: &'a [f32],
}

impl Kernel for Argmax<'_> {
    type Output = (u32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (u32, f32) {
        // The block of the first maximum; a second look at that block finds the element.
        let (mut best, mut best_start) = (f32::NEG_INFINITY, 0);
        for start in (0..self.x.len()).step_by(BLOCK) {
            let block = &self.x[start..self.x.len().min(start + BLOCK)];
            let max = block_max(simd, block);
            if max > best {
                (best, best_start) = (max, start);
            }
        }
        if best == f32::NEG_INFINITY {
            return (0, best);
        }
        let mut block = self.x[best_start..].iter().take(BLOCK);
        let offset = block.position(|&x| x == best).unwrap_or(0);
        ((best_start + offset) as u32, best)
    }
}

#[inline(always)]
fn block_max<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let least = simd.splat(f32::NEG_INFINITY);
    let mut max = [least; 4];
    let mut quads = x.chunks_exact(4 * S::LANES);
    for quad in &mut quads {
        for (i, max) in max.iter_mut().enumerate() {
            *max = simd.max(load(simd, quad, i * S::LANES), *max);
        }
    }
    let max = simd.max(simd.max(max[0], max[1]), simd.max(max[2], max[3]));
    let rest = quads.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    simd.max_lane(max).max(rest)
}

/// `Σ e^(x - max)`; elements equal to an infinite `max` count 1.
pub struct SumExp<'a> {
    /// Logits without NaN.
    pub x: &'a [f32],
    /// Their maximum.
    pub max: f32,
}

impl Kernel for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        if self.max.is_infinite() {
            return self.x.iter().filter(|x| **x == self.max).count() as f64;
        }
        let max = simd.splat(self.max);
        let mut total = 0.0;
        for block in self.x.chunks(BLOCK) {
            let mut sum = simd.splat(0.0);
            let whole = block.len() - block.len() % S::LANES;
            for at in (0..whole).step_by(S::LANES) {
                sum = simd.add(sum, exp(simd, simd.sub(load(simd, block, at), max)));
            }
            total += f64::from(simd.sum(sum));
            total += block[whole..].iter().map(|x| f64::from((x - self.max).exp())).sum::<f64>();
        }
        total
    }
}

/// `x = e^(x - max)` in place; elements equal to an infinite `max` become 1.
pub struct Exp<'a> {
    /// Logits without NaN.
    pub x: &'a mut [f32],
    /// Their maximum.
    pub max: f32,
}

impl Kernel for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.max.is_infinite() {
            for x in self.x {
                *x = f32::from(u8::from(*x == self.max));
            }
            return;
        }
        let max = simd.splat(self.max);
        for at in (0..self.x.len()).step_by(S::LANES) {
            let x = load(simd, self.x, at);
            store(simd, self.x, at, exp(simd, simd.sub(x, max)));
        }
    }
}

/// `Σ x`.
struct Sum<'a> {
    x: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let mut sum = simd.splat(0.0);
        for at in (0..self.x.len()).step_by(S::LANES) {
            sum = simd.add(sum, load(simd, self.x, at));
        }
        f64::from(simd.sum(sum))
    }
}

/// How many elements are at least `bound`.
pub struct CountAtLeast<'a> {
    /// Logits.
    pub x: &'a [f32],
    /// The bound.
    pub bound: f32,
}

impl Kernel for CountAtLeast<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u32 {
        let bound = simd.splat(self.bound);
        let mut count = 0;
        let mut chunks = self.x.chunks_exact(S::LANES);
        for chunk in &mut chunks {
            count += simd.at_least(load(simd, chunk, 0), bound).count_ones();
        }
        count + chunks.remainder().iter().filter(|x| **x >= self.bound).count() as u32
    }
}

/// Calls `found(index, value)` for every element that is at least `bound`, in order; the
/// callback returns the bound for the elements after it.
pub struct ForEachAtLeast<'a, F> {
    /// Logits.
    pub x: &'a [f32],
    /// The first bound.
    pub bound: f32,
    /// The callback.
    pub found: F,
}

impl<F: FnMut(usize, f32) -> f32> Kernel for ForEachAtLeast<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let whole = self.x.len() - self.x.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            let mut mask = simd.at_least(load(simd, self.x, at), simd.splat(self.bound));
            while mask != 0 {
                let i = at + mask.trailing_zeros() as usize;
                self.bound = (self.found)(i, self.x[i]);
                mask &= mask - 1;
            }
        }
        for (i, &x) in self.x.iter().enumerate().skip(whole) {
            if x >= self.bound {
                self.bound = (self.found)(i, x);
            }
        }
    }
}

/// The first index at which the cumulative weight exceeds `u` times the total weight.
pub fn inverse_cdf(isa: Isa, weights: &[f32], u: f32) -> usize {
    let total: f64 = weights.chunks(BLOCK).map(|block| isa.run(Sum { x: block })).sum();
    let target = f64::from(u) * total;
    let mut before = 0.0;
    for (i, block) in weights.chunks(BLOCK).enumerate() {
        let sum = isa.run(Sum { x: block });
        if before + sum > target {
            return i * BLOCK + cross(block, target - before);
        }
        before += sum;
    }
    last_positive(weights)
}

/// The first index at which the cumulative weight exceeds `target`; where rounding keeps it
/// from getting there, the last that weighs anything.
fn cross(weights: &[f32], target: f64) -> usize {
    let mut cumulative = 0.0;
    for (i, &weight) in weights.iter().enumerate() {
        cumulative += f64::from(weight);
        if cumulative > target {
            return i;
        }
    }
    last_positive(weights)
}

fn last_positive(weights: &[f32]) -> usize {
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0)
}
