//! Chooses and scores tokens without sorting or copying the vocabulary where that can be
//! avoided. The order of work and the results are the referee's (`reference/sample.rs`).
//!
//! A plain greedy row is one pass over its logits. Everything else works in place: edit the
//! logits, divide by the temperature, then narrow the row to candidates by one threshold
//! (min-p and top-k), narrow those by top-p, and walk the rest in ascending token id.

mod edit;
pub(super) mod kernels;
mod select;

use super::isa::Isa;
use crate::ops::args::{RowTask, SampleRow, TokenBitmask};
use crate::ops::random;
use crate::output::{SampledToken, TokenLogprobs};
use crate::request::SamplingParams;
use kernels::{Argmax, Clean, CountAtLeast, Divide, Exp, SumExp};
use select::Candidates;

/// Buffers of one thread.
#[derive(Default)]
pub struct SampleScratch {
    /// The raw logits, where log-probabilities are wanted.
    raw: Vec<f32>,
    /// Values while searching for the k-th largest.
    values: Vec<f32>,
    /// Tokens that are left.
    candidates: Candidates,
}

/// Chooses or scores one token. Overwrites `logits`.
pub fn sample_row(
    isa: Isa,
    logits: &mut [f32],
    row: &SampleRow<'_>,
    scratch: &mut SampleScratch,
) -> SampledToken {
    let params = row.params;
    let num_top = match row.task {
        RowTask::Score { .. } => Some(params.prompt_logprobs.unwrap_or(0)),
        RowTask::Sample => params.logprobs,
    };
    let edits = row.edits_logits();
    if params.temperature != 0.0 || edits || num_top.is_some() {
        isa.run(Clean { x: logits });
    }
    let report = num_top.map(|num_top| Report::new(isa, logits, num_top as usize, scratch));
    let token_id = match row.task {
        RowTask::Score { token_id } => token_id,
        RowTask::Sample => choose(isa, logits, row, edits, scratch),
    };
    let logprobs = report.map(|report| report.finish(isa, token_id, &scratch.raw));
    SampledToken { token_id, logprobs }
}

fn choose(
    isa: Isa,
    logits: &mut [f32],
    row: &SampleRow<'_>,
    edits: bool,
    scratch: &mut SampleScratch,
) -> u32 {
    let params = row.params;
    let mut best = isa.run(Argmax { x: logits });
    if edits {
        if let Some(bitmask) = row.bitmask {
            best = best_allowed(isa, logits, bitmask, best);
        }
        let raw_best = best;
        edit::apply(logits, row, &mut scratch.values);
        isa.run(Clean { x: logits });
        best = isa.run(Argmax { x: logits });
        if best.1 == f32::NEG_INFINITY {
            return raw_best.0;
        }
    }
    if params.temperature == 0.0 || best.1 == f32::NEG_INFINITY {
        return best.0;
    }
    if params.temperature != 1.0 {
        isa.run(Divide { x: logits, by: params.temperature });
    }
    let max = logits[best.0 as usize];
    let u = random::uniform(row.seed, row.position);
    draw(isa, logits, params, (max, u), scratch)
}

/// Leaves only tokens that a grammar allows and finds the best of them; where it allows none, the
/// best of all, which nothing else can replace then.
fn best_allowed(
    isa: Isa,
    logits: &mut [f32],
    bitmask: TokenBitmask<'_>,
    best_of_all: (u32, f32),
) -> (u32, f32) {
    edit::keep_allowed(logits, bitmask);
    let best = isa.run(Argmax { x: logits });
    if best.1 > f32::NEG_INFINITY {
        return best;
    }
    edit::first_allowed(bitmask, logits.len()).map_or(best_of_all, |id| (id, best.1))
}

/// Filters and draws; `max` is the largest of the scaled logits.
fn draw(
    isa: Isa,
    logits: &mut [f32],
    params: &SamplingParams,
    (max, u): (f32, f32),
    scratch: &mut SampleScratch,
) -> u32 {
    let candidates = &mut scratch.candidates;
    let mut least = f32::NEG_INFINITY;
    if params.min_p > 0.0 {
        least = max + params.min_p.ln();
    }
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < logits.len() {
        least = least.max(select::kth_largest(isa, logits, top_k, &mut scratch.values));
    }
    let narrowed = least > f32::NEG_INFINITY;
    if !narrowed && params.top_p >= 1.0 {
        isa.run(Exp { x: logits, max });
        return kernels::inverse_cdf(isa, logits, u) as u32;
    }
    let total = if narrowed {
        candidates.gather(isa, logits, least, max)
    } else {
        let total = isa.run(SumExp { x: logits, max });
        // All tokens below this bound together weigh less than what top-p drops; half of it
        // leaves room for rounding.
        let bound = 0.5 * (1.0 - f64::from(params.top_p)) * total / logits.len() as f64;
        candidates.gather(isa, logits, max + bound.ln() as f32, max);
        total
    };
    if params.top_p < 1.0 {
        candidates.keep_top_p(f64::from(params.top_p) * total, max);
    }
    candidates.draw(isa, u)
}

/// What is known about a row's log-probabilities before a token is chosen.
struct Report {
    max: f32,
    log_total: f64,
    top: Vec<(u32, f32)>,
}

impl Report {
    /// Reads the raw logits and keeps a copy of them in `scratch.raw`.
    fn new(isa: Isa, logits: &[f32], num_top: usize, scratch: &mut SampleScratch) -> Report {
        scratch.raw.clear();
        scratch.raw.extend_from_slice(logits);
        let max = isa.run(Argmax { x: logits }).1;
        let log_total = isa.run(SumExp { x: logits, max }).ln();
        let mut report = Report { max, log_total, top: Vec::new() };
        let top = select::largest(isa, logits, num_top, &mut scratch.values);
        report.top = top.into_iter().map(|(id, x)| (id, report.logprob(x))).collect();
        report
    }

    fn logprob(&self, logit: f32) -> f32 {
        // Equal infinities leave no NaN behind.
        let below = if logit == self.max { 0.0 } else { f64::from(logit) - f64::from(self.max) };
        (below - self.log_total) as f32
    }

    fn finish(self, isa: Isa, token_id: u32, raw: &[f32]) -> TokenLogprobs {
        let chosen = raw[token_id as usize];
        let better = if chosen == f32::INFINITY {
            0
        } else {
            isa.run(CountAtLeast { x: raw, bound: chosen.next_up() })
        };
        TokenLogprobs { logprob: self.logprob(chosen), rank: 1 + better, top: self.top }
    }
}
