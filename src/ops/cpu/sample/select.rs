//! The most likely tokens of a row, without sorting the row.

use super::super::isa::Isa;
use super::kernels::{Exp, ForEachAtLeast, inverse_cdf};

/// The `k`-th largest value, counting equal values separately; `1 <= k <= x.len()`, no NaN.
///
/// Keeps the values above a rising bound and cuts them back to `k` whenever the buffer is full,
/// so that almost all of a long row is only compared with the bound.
pub fn kth_largest(isa: Isa, x: &[f32], k: usize, values: &mut Vec<f32>) -> f32 {
    let capacity = (4 * k).max(256);
    values.clear();
    let mut bound = f32::NEG_INFINITY;
    isa.run(ForEachAtLeast {
        x,
        bound,
        found: |_, value| {
            values.push(value);
            if values.len() >= capacity {
                bound = cut(values, k);
            }
            bound
        },
    });
    cut(values, k)
}

/// Leaves the `k` largest values and returns the least of them.
fn cut(values: &mut Vec<f32>, k: usize) -> f32 {
    let (_, kth, _) = values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let kth = *kth;
    values.truncate(k);
    kth
}

/// The `n` largest elements, best first, equal ones in ascending order.
pub fn largest(isa: Isa, x: &[f32], n: usize, values: &mut Vec<f32>) -> Vec<(u32, f32)> {
    let n = n.min(x.len());
    let mut found = Vec::new();
    if n == 0 {
        return found;
    }
    let bound = kth_largest(isa, x, n, values);
    isa.run(ForEachAtLeast {
        x,
        bound,
        found: |i, value| {
            found.push((i as u32, value));
            bound
        },
    });
    found.sort_by(|a, b| best_first(*a, *b));
    found.truncate(n);
    found
}

fn best_first(a: (u32, f32), b: (u32, f32)) -> std::cmp::Ordering {
    let order = b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal);
    order.then(a.0.cmp(&b.0))
}

/// Tokens that are left, in ascending id, with their scaled logits and weights `e^(x - max)`.
#[derive(Default)]
pub struct Candidates {
    ids: Vec<u32>,
    logits: Vec<f32>,
    weights: Vec<f32>,
    cut: Vec<(u32, f32, f32)>,
}

/// Resolution of the first look for the top-p cut.
const NUM_BUCKETS: usize = 256;

impl Candidates {
    /// Takes all tokens whose logit is at least `least`; returns their total weight.
    pub fn gather(&mut self, isa: Isa, x: &[f32], least: f32, max: f32) -> f64 {
        self.ids.clear();
        self.logits.clear();
        isa.run(ForEachAtLeast {
            x,
            bound: least,
            found: |i, value| {
                self.ids.push(i as u32);
                self.logits.push(value);
                least
            },
        });
        self.weights.clear();
        self.weights.extend_from_slice(&self.logits);
        isa.run(Exp { x: &mut self.weights, max });
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }

    /// Keeps the shortest prefix, most likely first, whose weight reaches `target`.
    ///
    /// Weights are summed in buckets of similar logits; only the bucket in which the sum
    /// crosses the target is sorted.
    pub fn keep_top_p(&mut self, target: f64, max: f32) {
        let least = self.logits.iter().copied().fold(f32::INFINITY, f32::min);
        let scale = NUM_BUCKETS as f32 / (max - least).max(f32::MIN_POSITIVE);
        // Monotonic in the logit; NaN, from infinite logits, falls into bucket 0.
        let bucket_of = |x: f32| (((max - x) * scale) as usize).min(NUM_BUCKETS - 1);
        let mut sums = [0.0f64; NUM_BUCKETS];
        for (&x, &weight) in self.logits.iter().zip(&self.weights) {
            sums[bucket_of(x)] += f64::from(weight);
        }
        let mut before = 0.0;
        let crossing = sums.iter().position(|sum| {
            let reached = before + sum >= target;
            before += if reached { 0.0 } else { *sum };
            reached
        });
        let Some(crossing) = crossing else { return };
        let cut = &mut self.cut;
        cut.clear();
        let all = self.ids.iter().zip(&self.logits).zip(&self.weights);
        cut.extend(all.map(|((&id, &x), &w)| (id, x, w)).filter(|c| bucket_of(c.1) == crossing));
        cut.sort_by(|a, b| best_first((a.0, a.1), (b.0, b.1)));
        let Some(&(mut last)) = cut.first() else { return };
        for &candidate in &*cut {
            if before >= target && before > 0.0 {
                break;
            }
            last = candidate;
            before += f64::from(candidate.2);
        }
        self.retain(|id, x| x > last.1 || (x == last.1 && id <= last.0));
    }

    fn retain(&mut self, keep: impl Fn(u32, f32) -> bool) {
        let mut kept = 0;
        for i in 0..self.ids.len() {
            if keep(self.ids[i], self.logits[i]) {
                self.ids[kept] = self.ids[i];
                self.logits[kept] = self.logits[i];
                self.weights[kept] = self.weights[i];
                kept += 1;
            }
        }
        self.ids.truncate(kept);
        self.logits.truncate(kept);
        self.weights.truncate(kept);
    }

    /// The token at quantile `u` of what is left.
    pub fn draw(&self, isa: Isa, u: f32) -> u32 {
        self.ids[inverse_cdf(isa, &self.weights, u)]
    }
}
