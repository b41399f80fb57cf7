//! Row-wise operations: embedding, norms, rotary embedding, gated activations, KV writes.
//!
//! Each kernel computes one row (or one token); a row's result never depends on its batch.
//! Sums accumulate in f32 lanes, in ascending order, then over the lanes in one fixed order.

use super::attention::cap_row;
use super::simd::{Float, Kernel, Simd, exp, load, store};
use crate::ops::args::{Activation, RopeStyle};

/// `out = from`, converted.
pub struct Convert<'a, A, B> {
    /// Destination.
    pub out: &'a mut [A],
    /// Source, of the same length.
    pub from: &'a [B],
}

impl<A: Float, B: Float> Kernel for Convert<'_, A, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for at in (0..self.from.len()).step_by(S::LANES) {
            store(simd, self.out, at, load(simd, self.from, at));
        }
    }
}

/// Rows of `out = x / rms(x) * weight`; with a residual, `residual += x` first and the norm is
/// that of the residual.
pub struct Norm<'a, W> {
    /// `[num_rows, width]`.
    pub out: &'a mut [f32],
    /// `[num_rows, width]`.
    pub x: &'a [f32],
    /// `[num_rows, width]`, updated.
    pub residual: Option<&'a mut [f32]>,
    /// `[width]`.
    pub weight: &'a [W],
    /// Added to the mean square.
    pub eps: f32,
}

impl<W: Float> Kernel for Norm<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let mut residual = self.residual;
        for (i, out) in self.out.chunks_exact_mut(width).enumerate() {
            let x = &self.x[i * width..][..width];
            let residual = residual.as_mut().map(|rows| &mut rows[i * width..][..width]);
            let summed = sum_row(simd, x, residual);
            scale_row(simd, out, summed, (self.weight, self.eps));
        }
    }
}

/// What a norm is of, and its lanes' sums of squares: `x`, or the residual after `residual += x`.
#[inline(always)]
pub fn sum_row<'a, S: Simd>(
    simd: S,
    x: &'a [f32],
    residual: Option<&'a mut [f32]>,
) -> (&'a [f32], S::V) {
    let mut squares = simd.splat(0.0);
    let Some(sum) = residual else {
        for at in (0..x.len()).step_by(S::LANES) {
            let x = load(simd, x, at);
            squares = simd.mul_add(x, x, squares);
        }
        return (x, squares);
    };
    for at in (0..x.len()).step_by(S::LANES) {
        let total = simd.add(load(simd, sum, at), load(simd, x, at));
        store(simd, sum, at, total);
        squares = simd.mul_add(total, total, squares);
    }
    (sum, squares)
}

/// `out = x / rms(x) * weight`, of a row whose squares were summed.
#[inline(always)]
pub fn scale_row<S: Simd, W: Float>(
    simd: S,
    out: &mut [f32],
    (x, squares): (&[f32], S::V),
    (weight, eps): (&[W], f32),
) {
    let mean_square = simd.sum(squares) / x.len() as f32;
    let scale = simd.splat(1.0 / (mean_square + eps).sqrt());
    for at in (0..x.len()).step_by(S::LANES) {
        let scaled = simd.mul(load(simd, x, at), scale);
        store(simd, out, at, simd.mul(scaled, load(simd, weight, at)));
    }
}

/// Rows of `out = (x - mean(x)) / deviation(x) * weight (+ bias)`; with a residual, `residual += x`
/// first and the norm is that of the residual.
pub struct LayerNorm<'a, W> {
    /// `[num_rows, width]`.
    pub out: &'a mut [f32],
    /// `[num_rows, width]`.
    pub x: &'a [f32],
    /// `[num_rows, width]`, updated.
    pub residual: Option<&'a mut [f32]>,
    /// `[width]`.
    pub weight: &'a [W],
    /// `[width]`.
    pub bias: Option<&'a [W]>,
    /// Added to the variance.
    pub eps: f32,
}

impl<W: Float> Kernel for LayerNorm<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        let mut residual = self.residual;
        for (i, out) in self.out.chunks_exact_mut(width).enumerate() {
            let mut x = &self.x[i * width..][..width];
            if let Some(residual) = &mut residual {
                let sum = &mut residual[i * width..][..width];
                Add { out: sum, x }.run(simd);
                x = sum;
            }
            let deviation = centre(simd, out, x, self.eps);
            let scale = simd.splat(1.0 / deviation);
            for at in (0..width).step_by(S::LANES) {
                let scaled = simd.mul(load(simd, out, at), scale);
                let weight = load(simd, self.weight, at);
                let bias = self.bias.map_or(simd.splat(0.0), |bias| load(simd, bias, at));
                store(simd, out, at, simd.mul_add(scaled, weight, bias));
            }
        }
    }
}

/// `out = x - mean(x)`; returns its deviation. Squares are those of the differences, so that they
/// do not cancel where the mean is large.
#[inline(always)]
fn centre<S: Simd>(simd: S, out: &mut [f32], x: &[f32], eps: f32) -> f32 {
    let mut sum = simd.splat(0.0);
    for at in (0..x.len()).step_by(S::LANES) {
        sum = simd.add(sum, load(simd, x, at));
    }
    let mean = simd.splat(simd.sum(sum) / x.len() as f32);
    let mut squares = simd.splat(0.0);
    for at in (0..x.len()).step_by(S::LANES) {
        store(simd, out, at, simd.sub(load(simd, x, at), mean));
        // Read again: lanes beyond the row's end are zeros then, not `0 - mean`.
        let difference = load(simd, out, at);
        squares = simd.mul_add(difference, difference, squares);
    }
    (simd.sum(squares) / x.len() as f32 + eps).sqrt()
}

/// `out += x`.
pub struct Add<'a> {
    /// Updated.
    pub out: &'a mut [f32],
    /// As many elements.
    pub x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for at in (0..self.x.len()).step_by(S::LANES) {
            let sum = simd.add(load(simd, self.out, at), load(simd, self.x, at));
            store(simd, self.out, at, sum);
        }
    }
}

/// `x = cap · tanh(x / cap)`.
pub struct SoftCap<'a> {
    /// Updated.
    pub x: &'a mut [f32],
    /// Above 0.
    pub cap: f32,
}

impl Kernel for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        cap_row(simd, self.x, self.cap);
    }
}

/// Rotates all heads of one token in place.
pub struct Rotate<'a> {
    /// `[num_heads, head_dim]`.
    pub heads: &'a mut [f32],
    /// Elements per head.
    pub head_dim: usize,
    /// Cosines of the token's angles.
    pub cos: &'a [f32],
    /// Sines of the same angles.
    pub sin: &'a [f32],
    /// Which elements form a pair.
    pub style: RopeStyle,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            match self.style {
                RopeStyle::Halves => {
                    let (low, high) = head[..2 * half].split_at_mut(half);
                    rotate_halves(simd, low, high, (self.cos, self.sin));
                }
                RopeStyle::Interleaved => {
                    for (pair, (cos, sin)) in
                        head.chunks_exact_mut(2).zip(self.cos.iter().zip(self.sin))
                    {
                        let (x, y) = (pair[0], pair[1]);
                        pair[0] = x * cos - y * sin;
                        pair[1] = y * cos + x * sin;
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn rotate_halves<S: Simd>(
    simd: S,
    low: &mut [f32],
    high: &mut [f32],
    (cos, sin): (&[f32], &[f32]),
) {
    for at in (0..low.len()).step_by(S::LANES) {
        let (x, y) = (load(simd, low, at), load(simd, high, at));
        let (cos, sin) = (load(simd, cos, at), load(simd, sin, at));
        store(simd, low, at, simd.sub(simd.mul(x, cos), simd.mul(y, sin)));
        store(simd, high, at, simd.mul_add(y, cos, simd.mul(x, sin)));
    }
}

/// `out = activation(gate) * up`.
pub struct GatedActivation<'a> {
    /// Destination.
    pub out: &'a mut [f32],
    /// Of the same length.
    pub gate: &'a [f32],
    /// Of the same length.
    pub up: &'a [f32],
    /// Applied to `gate`.
    pub activation: Activation,
}

impl Kernel for GatedActivation<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for at in (0..self.out.len()).step_by(S::LANES) {
            let gate = load(simd, self.gate, at);
            let activated = activate(simd, gate, self.activation);
            store(simd, self.out, at, simd.mul(activated, load(simd, self.up, at)));
        }
    }
}

/// The activation of every lane.
#[inline(always)]
pub fn activate<S: Simd>(simd: S, x: S::V, activation: Activation) -> S::V {
    match activation {
        Activation::Silu => silu(simd, x),
        Activation::GeluTanh => gelu_tanh(simd, x),
        Activation::Gelu => gelu(simd, x),
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
fn silu<S: Simd>(simd: S, x: S::V) -> S::V {
    let minus_x = simd.sub(simd.splat(0.0), x);
    simd.mul(x, simd.recip(simd.add(simd.splat(1.0), exp(simd, minus_x))))
}

/// `x · sigmoid(2 √(2/π) (x + 0.044715 x³))`, which is the tanh form rearranged.
#[inline(always)]
fn gelu_tanh<S: Simd>(simd: S, x: S::V) -> S::V {
    let cubic = simd.mul(simd.mul(x, x), simd.mul(x, simd.splat(0.044_715)));
    let inner = simd.mul(simd.splat(-1.595_769), simd.add(x, cubic));
    simd.mul(x, simd.recip(simd.add(simd.splat(1.0), exp(simd, inner))))
}

/// `x · Φ(x)` with `erfc(z) = t·P(t)·e^(-z²)`, `t = 1 / (1 + 0.3275911 z)` (Abramowitz and
/// Stegun 7.1.26; absolute error of Φ below 1e-7).
#[inline(always)]
fn gelu<S: Simd>(simd: S, x: S::V) -> S::V {
    let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
    let magnitude = simd.max(x, simd.sub(zero, x));
    let z = simd.mul(magnitude, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = simd.div(one, simd.mul_add(z, simd.splat(0.327_591_1), one));
    let mut p = simd.splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = simd.mul_add(p, t, simd.splat(c));
    }
    let tail = exp(simd, simd.sub(zero, simd.mul(z, z)));
    let upper_tail = simd.mul(simd.mul(simd.mul(p, t), tail), simd.splat(0.5));
    // Φ(|x|) = 1 - tail; for negative x the result is x · tail = max(x, 0) - |x| · tail.
    simd.sub(simd.max(x, zero), simd.mul(magnitude, upper_tail))
}
