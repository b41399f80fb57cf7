//! The referee's sampler: sorts the whole vocabulary and sums in f64.
//!
//! Order of work, as in vLLM: log-probabilities of the raw logits; bitmask, allowed and banned
//! tokens; bias; penalties; temperature; min-p; top-k; top-p; inverse CDF in ascending token id.
//! A NaN logit counts as -inf. What is chosen when nothing may be: [`SampleRow`].

use crate::ops::args::{RowTask, SampleRow, TokenBitmask};
use crate::ops::random;
use crate::output::{SampledToken, TokenLogprobs};
use crate::request::{SamplingParams, SeenToken};

/// Chooses or scores one token.
pub fn sample_row(logits: &[f32], row: &SampleRow<'_>) -> SampledToken {
    let raw: Vec<f32> =
        logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x }).collect();
    match row.task {
        RowTask::Score { token_id } => {
            let num_top = row.params.prompt_logprobs.unwrap_or(0);
            SampledToken { token_id, logprobs: Some(token_logprobs(&raw, token_id, num_top)) }
        }
        RowTask::Sample => {
            let token_id = choose(&raw, row);
            let logprobs =
                row.params.logprobs.map(|num_top| token_logprobs(&raw, token_id, num_top));
            SampledToken { token_id, logprobs }
        }
    }
}

/// Natural log-probabilities of the raw logits.
fn token_logprobs(raw: &[f32], token_id: u32, num_top: u32) -> TokenLogprobs {
    let max = maximum(raw);
    let total: f64 = raw.iter().map(|&x| below(x, max).exp()).sum();
    let logprob = |id: usize| (below(raw[id], max) - total.ln()) as f32;
    let chosen = raw[token_id as usize];
    let rank = 1 + raw.iter().filter(|&&x| x > chosen).count() as u32;
    let top = descending(raw).into_iter().take(num_top as usize);
    TokenLogprobs {
        logprob: logprob(token_id as usize),
        rank,
        top: top.map(|id| (id as u32, logprob(id))).collect(),
    }
}

fn choose(raw: &[f32], row: &SampleRow<'_>) -> u32 {
    let params = row.params;
    let mut logits = raw.to_vec();
    mask(&mut logits, row);
    penalise(&mut logits, params, row.seen);
    for x in &mut logits {
        *x = if x.is_nan() { f32::NEG_INFINITY } else { *x };
    }
    if maximum(&logits) == f32::NEG_INFINITY {
        return unchoosable(raw, row.bitmask);
    }
    if params.temperature == 0.0 {
        return argmax(&logits);
    }
    logits.iter_mut().for_each(|x| *x /= params.temperature);
    keep_min_p(&mut logits, params.min_p);
    keep_top_k(&mut logits, params.top_k as usize);
    keep_top_p(&mut logits, params.top_p);
    inverse_cdf(&logits, random::uniform(row.seed, row.position))
}

/// The most likely token that the bitmask allows, or, where it allows none, of all.
fn unchoosable(raw: &[f32], bitmask: Option<TokenBitmask<'_>>) -> u32 {
    let is_allowed = |id: u32| bitmask.is_none_or(|bitmask| bitmask.allows(id));
    let ids = || descending(raw).into_iter().map(|id| id as u32);
    ids().find(|&id| is_allowed(id)).unwrap_or_else(|| argmax(raw))
}

/// Leaves only allowed tokens that are not banned, then adds the bias.
fn mask(logits: &mut [f32], row: &SampleRow<'_>) {
    let params = row.params;
    if let Some(bitmask) = row.bitmask {
        for (id, x) in logits.iter_mut().enumerate() {
            *x = if bitmask.allows(id as u32) { *x } else { f32::NEG_INFINITY };
        }
    }
    if let Some(allowed) = &params.allowed_token_ids {
        for (id, x) in logits.iter_mut().enumerate() {
            if !allowed.contains(&(id as u32)) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    for &id in row.banned_token_ids {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = f32::NEG_INFINITY;
        }
    }
    for &(id, bias) in &params.logit_bias {
        if let Some(x) = logits.get_mut(id as usize) {
            *x += bias;
        }
    }
}

fn penalise(logits: &mut [f32], params: &SamplingParams, seen: &[SeenToken]) {
    for (id, x) in logits.iter_mut().enumerate() {
        let Some(token) = seen.iter().find(|token| token.token_id as usize == id) else { continue };
        if params.repetition_penalty != 1.0 {
            let penalty = params.repetition_penalty;
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
        if token.times_generated > 0 {
            *x -= params.frequency_penalty * token.times_generated as f32;
            *x -= params.presence_penalty;
        }
    }
}

/// Drops tokens less likely than `min_p` times the most likely one.
fn keep_min_p(logits: &mut [f32], min_p: f32) {
    if min_p > 0.0 {
        let least = maximum(logits) + min_p.ln();
        logits.iter_mut().filter(|x| **x < least).for_each(|x| *x = f32::NEG_INFINITY);
    }
}

/// Keeps every token at least as likely as the k-th.
fn keep_top_k(logits: &mut [f32], top_k: usize) {
    if top_k > 0 && top_k < logits.len() {
        let least = logits[descending(logits)[top_k - 1]];
        logits.iter_mut().filter(|x| **x < least).for_each(|x| *x = f32::NEG_INFINITY);
    }
}

/// Keeps the shortest prefix, most likely first, whose probability reaches `top_p`.
fn keep_top_p(logits: &mut [f32], top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let max = maximum(logits);
    let total: f64 = logits.iter().map(|&x| below(x, max).exp()).sum();
    let mut before = 0.0;
    for id in descending(logits) {
        let weight = below(logits[id], max).exp();
        if before >= f64::from(top_p) * total && before > 0.0 {
            logits[id] = f32::NEG_INFINITY;
        }
        before += weight;
    }
}

/// The first token, by id, at which the cumulative probability exceeds `u`.
fn inverse_cdf(logits: &[f32], u: f32) -> u32 {
    let max = maximum(logits);
    let weights: Vec<f64> = logits.iter().map(|&x| below(x, max).exp()).collect();
    let target = f64::from(u) * weights.iter().sum::<f64>();
    let mut cumulative = 0.0;
    let mut last = 0;
    for (id, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        cumulative += weight;
        last = id;
        if cumulative > target {
            break;
        }
    }
    last as u32
}

/// `x - max`, 0 where they are equal: infinite maxima leave no NaN behind.
fn below(x: f32, max: f32) -> f64 {
    if x == max { 0.0 } else { f64::from(x) - f64::from(max) }
}

fn maximum(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn argmax(logits: &[f32]) -> u32 {
    descending(logits)[0] as u32
}

/// Token ids from the most likely to the least; equal ones in ascending order.
fn descending(logits: &[f32]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| {
        let order = logits[b].partial_cmp(&logits[a]).expect("NaN was replaced");
        order.then(a.cmp(&b))
    });
    ids
}
