//! Changes to logits that depend on token ids: masks, bias and penalties.

use crate::ops::args::{SampleRow, TokenBitmask};

/// Leaves only tokens whose bits are set.
pub fn keep_allowed(logits: &mut [f32], bitmask: TokenBitmask<'_>) {
    let words = bitmask.words(logits.len());
    for (logits, word) in logits.chunks_mut(32).zip(words) {
        match word {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            _ => keep_bits(logits, word),
        }
    }
}

fn keep_bits(logits: &mut [f32], word: u32) {
    for (bit, x) in logits.iter_mut().enumerate() {
        *x = if word >> bit & 1 == 1 { *x } else { f32::NEG_INFINITY };
    }
}

/// The first token below `vocab_size` whose bit is set.
pub fn first_allowed(bitmask: TokenBitmask<'_>, vocab_size: usize) -> Option<u32> {
    let mut words = (0..).zip(bitmask.words(vocab_size));
    words.find(|(_, word)| *word != 0).map(|(i, word)| 32 * i + word.trailing_zeros())
}

/// Lists of tokens, bias, penalties, in this order.
pub fn apply(logits: &mut [f32], row: &SampleRow<'_>, kept: &mut Vec<f32>) {
    if let Some(allowed) = &row.params.allowed_token_ids {
        keep_only(logits, allowed, kept);
    }
    for &id in row.banned_token_ids {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = f32::NEG_INFINITY;
        }
    }
    for &(id, bias) in &row.params.logit_bias {
        if let Some(x) = logits.get_mut(id as usize) {
            *x += bias;
        }
    }
    if row.params.needs_history() {
        penalise(logits, row);
    }
}

fn keep_only(logits: &mut [f32], allowed: &[u32], kept: &mut Vec<f32>) {
    kept.clear();
    kept.extend(allowed.iter().map(|&id| logits.get(id as usize).copied().unwrap_or(0.0)));
    logits.fill(f32::NEG_INFINITY);
    for (&id, &x) in allowed.iter().zip(&*kept) {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = x;
        }
    }
}

fn penalise(logits: &mut [f32], row: &SampleRow<'_>) {
    for token in row.seen {
        if let Some(logit) = logits.get_mut(token.token_id as usize) {
            *logit = penalised(*logit, row, token.times_generated);
        }
    }
}

fn penalised(mut logit: f32, row: &SampleRow<'_>, times_generated: u32) -> f32 {
    let params = row.params;
    if params.repetition_penalty != 1.0 {
        let penalty = params.repetition_penalty;
        logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
    }
    if times_generated > 0 {
        logit -= params.frequency_penalty * times_generated as f32;
        logit -= params.presence_penalty;
    }
    logit
}
