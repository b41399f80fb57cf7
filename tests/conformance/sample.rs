//! The sampler: every option alone and together, ties, bitmasks, broken logits.
//!
//! Tokens must be the referee's own. Backends sum weights in f32 where the referee uses f64,
//! so a draw within 1e-6 of a token's edge could differ; the seeds here keep clear of edges.

use std::collections::{BTreeMap, BTreeSet};

use tokenmill::ops::Ops;
use tokenmill::ops::args::{RowTask, SampleArgs, SampleRow, TokenBitmask};
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::output::SampledToken;
use tokenmill::request::{SamplingParams, SeenToken};
use tokenmill::tensor::ViewMut;

use crate::support::*;

/// Sizes around vectors and blocks, and one realistic vocabulary.
const VOCABS: [usize; 8] = [1, 2, 15, 17, 63, 513, 1000, 32_768];

pub fn check(ops: &dyn Ops) {
    let vocabs = if wants_few_cases() { &VOCABS[5..7] } else { &VOCABS };
    for &vocab in vocabs {
        for (shape, spread) in [("peaked", 12.0), ("flat", 0.5), ("ties", 0.0)] {
            let logits = logits(vocab, spread);
            for (name, params) in params(vocab) {
                let what = format!("{} sample {vocab} {shape} {name}", ops.name());
                compare(ops, &what, &logits, &params, None);
            }
            masked(ops, shape, &logits);
        }
    }
    broken_logits(ops);
    many_rows(ops);
}

/// Roughly normal logits; with no spread, small integers with many ties.
fn logits(vocab: usize, spread: f32) -> Vec<f32> {
    let rng = &mut Rng::new(vocab as u64);
    let normal = |rng: &mut Rng| (0..4).map(|_| rng.float()).sum::<f32>() / 2.0;
    (0..vocab)
        .map(|_| if spread == 0.0 { rng.below(4) as f32 } else { spread * normal(rng) })
        .collect()
}

/// Every option alone, then several together.
fn params(vocab: usize) -> Vec<(&'static str, SamplingParams)> {
    let plain = SamplingParams::default;
    let some = |n: usize| (0..n as u32).map(|i| i * 7 % vocab as u32).collect::<Vec<_>>();
    let bias: Vec<(u32, f32)> = some(9).into_iter().map(|id| (id, id as f32 % 5.0 - 2.0)).collect();
    let beyond = vocab as u32 + 3;
    let everything = SamplingParams {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.8,
        min_p: 0.01,
        presence_penalty: 0.5,
        frequency_penalty: -0.25,
        repetition_penalty: 1.3,
        logit_bias: bias.clone(),
        allowed_token_ids: Some(some(vocab)),
        ..plain()
    };
    vec![
        ("greedy", SamplingParams::greedy()),
        ("greedy with bias", SamplingParams { logit_bias: bias, ..SamplingParams::greedy() }),
        ("plain", plain()),
        ("cold", SamplingParams { temperature: 0.05, ..plain() }),
        ("hot", SamplingParams { temperature: 2.0, ..plain() }),
        ("top-k 1", SamplingParams { top_k: 1, ..plain() }),
        ("top-k 5", SamplingParams { top_k: 5, ..plain() }),
        ("top-k 300", SamplingParams { top_k: 300, ..plain() }),
        ("top-k beyond", SamplingParams { top_k: 1 << 20, ..plain() }),
        ("top-p 0", SamplingParams { top_p: 0.0, ..plain() }),
        ("top-p 0.5", SamplingParams { top_p: 0.5, ..plain() }),
        ("top-p 0.95", SamplingParams { top_p: 0.95, ..plain() }),
        ("top-p 0.999", SamplingParams { top_p: 0.999, ..plain() }),
        ("min-p", SamplingParams { min_p: 0.1, ..plain() }),
        ("min-p 1", SamplingParams { min_p: 1.0, ..plain() }),
        ("presence", SamplingParams { presence_penalty: 1.5, ..plain() }),
        ("frequency", SamplingParams { frequency_penalty: 0.7, ..plain() }),
        ("repetition", SamplingParams { repetition_penalty: 1.8, ..SamplingParams::greedy() }),
        ("allowed", SamplingParams { allowed_token_ids: Some(some(3)), ..plain() }),
        ("none allowed", SamplingParams { allowed_token_ids: Some(vec![beyond]), ..plain() }),
        ("everything", everything.clone()),
        ("everything, greedy", SamplingParams { temperature: 0.0, ..everything }),
    ]
}

/// Words around those that a vocabulary needs, with bits of tokens that it does not have.
fn bitmasks(vocab: usize) -> Vec<(&'static str, Vec<u32>)> {
    let num_words = vocab.div_ceil(32);
    let rng = &mut Rng::new(vocab as u64 + 2);
    let mut random = |num_words: usize| (0..num_words).map(|_| rng.below(1 << 32) as u32).collect();
    let only = |id: usize| (0..num_words).map(|i| u32::from(i == id / 32) << (id % 32)).collect();
    let mut beyond = vec![0; num_words + 2];
    beyond[num_words..].fill(u32::MAX);
    if !vocab.is_multiple_of(32) {
        beyond[num_words - 1] = u32::MAX << (vocab % 32);
    }
    vec![
        ("half of all", random(num_words)),
        ("half of all and more words", random(num_words + 2)),
        ("half of the first", random(num_words / 2)),
        ("the last", only(vocab - 1)),
        ("the banned", only(1.min(vocab - 1))),
        ("all", vec![u32::MAX; num_words]),
        ("none", vec![0; num_words]),
        ("none, without words", vec![]),
        ("none but what does not exist", beyond),
    ]
}

/// Bitmasks beside options that they meet.
fn masked(ops: &dyn Ops, shape: &str, logits: &[f32]) {
    let vocab = logits.len();
    let meets = |name: &str| {
        ["greedy", "plain", "top-k 5", "top-p 0.5", "allowed", "none allowed", "everything"]
            .contains(&name)
    };
    // The referee sorts: of a realistic vocabulary a few rows are enough.
    let (num_masks, num_params) = if vocab > 1000 { (2, 2) } else { (usize::MAX, usize::MAX) };
    for (mask, words) in bitmasks(vocab).into_iter().take(num_masks) {
        let params = params(vocab).into_iter().filter(|(name, _)| meets(name));
        for (name, params) in params.take(num_params) {
            let what = format!("{} sample {vocab} {shape} {name}, bitmask: {mask}", ops.name());
            compare(ops, &what, logits, &params, Some(TokenBitmask::new(&words)));
        }
    }
}

/// Tokens and how often they were generated.
fn seen(counts: impl IntoIterator<Item = (u32, u32)>) -> Vec<SeenToken> {
    let token = |(token_id, times_generated)| SeenToken { token_id, times_generated };
    counts.into_iter().map(token).collect()
}

/// Draws at several positions, with and without log-probabilities, with history and bans.
fn compare(
    ops: &dyn Ops,
    what: &str,
    logits: &[f32],
    params: &SamplingParams,
    bitmask: Option<TokenBitmask<'_>>,
) {
    let vocab = logits.len();
    let rng = &mut Rng::new(vocab as u64 + 1);
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    for _ in 0..20 {
        counts.entry(rng.below(vocab + 2) as u32).or_default();
    }
    for _ in 0..30 {
        *counts.entry(rng.below(vocab.min(10)) as u32).or_default() += 1;
    }
    let past = seen(counts);
    let reported = SamplingParams { logprobs: Some(5), prompt_logprobs: Some(3), ..params.clone() };
    let row = |task, params, position| SampleRow {
        task,
        params,
        seed: 11,
        position,
        seen: &past,
        banned_token_ids: &[1, 1 << 30],
        bitmask,
    };
    let score = RowTask::Score { token_id: rng.below(vocab) as u32 };
    let rows = [
        row(RowTask::Sample, params, 0),
        row(RowTask::Sample, params, 1),
        row(RowTask::Sample, &reported, 2),
        row(score, &reported, 3),
        SampleRow { banned_token_ids: &[], ..row(RowTask::Sample, params, 4) },
    ];
    let (got, want) = (sample(ops, logits, &rows), sample(&ReferenceOps, logits, &rows));
    assert_tokens(what, &got, &want);
}

/// Samples rows that all have the same logits.
fn sample(ops: &dyn Ops, logits: &[f32], rows: &[SampleRow<'_>]) -> Vec<SampledToken> {
    let mut all = logits.repeat(rows.len());
    ops.sample(SampleArgs { logits: ViewMut::of(&mut all, [rows.len(), logits.len()]), rows })
}

fn assert_tokens(what: &str, got: &[SampledToken], want: &[SampledToken]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.token_id, want.token_id, "{what}: token of row {i}");
        match (&got.logprobs, &want.logprobs) {
            (None, None) => {}
            (Some(got), Some(want)) => {
                assert_eq!(got.rank, want.rank, "{what}: rank of row {i}");
                assert_logprob(what, got.logprob, want.logprob);
                assert_eq!(got.top.len(), want.top.len(), "{what}: alternatives of row {i}");
                for (got, want) in got.top.iter().zip(&want.top) {
                    assert_eq!(got.0, want.0, "{what}: alternatives of row {i}");
                    assert_logprob(what, got.1, want.1);
                }
            }
            _ => panic!("{what}: log-probabilities of row {i}: {got:?} instead of {want:?}"),
        }
    }
}

fn assert_logprob(what: &str, got: f32, want: f32) {
    // A total of f32 exponentials, each within 2e-7.
    let close = (got - want).abs() <= 2e-6 + 1e-6 * want.abs();
    assert!(close || got == want, "{what}: log-probability {got}, expected {want}");
}

/// NaN and infinities neither panic nor win where a number can.
fn broken_logits(ops: &dyn Ops) {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows: [Vec<f32>; 6] = [
        vec![nan; 40],
        vec![-inf; 40],
        vec![inf; 40],
        (0..40).map(|i| if i == 33 { 1.0 } else { nan }).collect(),
        (0..40).map(|i| if i % 9 == 4 { inf } else { i as f32 }).collect(),
        (0..40).map(|i| if i % 2 == 0 { -inf } else { -(i as f32) }).collect(),
    ];
    for (i, logits) in rows.iter().enumerate() {
        for (name, params) in params(40) {
            let what = format!("{} broken logits {i} {name}", ops.name());
            compare(ops, &what, logits, &params, None);
        }
        masked(ops, &format!("broken logits {i}"), logits);
    }
}

/// Different rows of one batch do not disturb each other.
fn many_rows(ops: &dyn Ops) {
    let (vocab, num_rows) = (1000, 33);
    let all = params(vocab);
    let rng = &mut Rng::new(77);
    let logits: Vec<f32> = rng.floats(vocab * num_rows).iter().map(|x| 6.0 * x).collect();
    let masks = bitmasks(vocab);
    let mask = |i: usize| TokenBitmask::new(&masks[i / 3 % masks.len()].1);
    let past = seen([(1, 0), (2, 0), (3, 1), (4, 1)]);
    let row = |i: usize| SampleRow {
        task: RowTask::Sample,
        params: &all[i % all.len()].1,
        seed: i as u64,
        position: 5,
        seen: &past,
        banned_token_ids: &[],
        bitmask: i.is_multiple_of(3).then(|| mask(i)),
    };
    let rows: Vec<SampleRow<'_>> = (0..num_rows).map(row).collect();
    let mut scratch = logits.clone();
    let view = ViewMut::of(&mut scratch, [num_rows, vocab]);
    let batched = ops.sample(SampleArgs { logits: view, rows: &rows });
    for i in 0..num_rows {
        let alone = sample(ops, &logits[i * vocab..(i + 1) * vocab], &[row(i)]);
        assert_eq!(alone[0], batched[i], "{} row {i}", ops.name());
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
    let params = SamplingParams::default();
    let row = |position| SampleRow {
        task: RowTask::Sample,
        params: &params,
        seed: 4,
        position,
        seen: &[],
        banned_token_ids: &[],
        bitmask: None,
    };
    let rows: Vec<SampleRow<'_>> = (0..8000).map(row).collect();
    for_each_backend(|ops| {
        let mut counts = [0; 4];
        for token in sample(ops, &logits, &rows) {
            counts[token.token_id as usize] += 1;
        }
        // Four standard deviations of a binomial count are below 180.
        for (count, expected) in counts.into_iter().zip([4000i32, 2000, 1000, 1000]) {
            assert!((count - expected).abs() < 180, "{counts:?}");
        }
    });
}

/// One row with bans, of logits of which nothing else is wanted.
fn choose_masked(ops: &dyn Ops, logits: &[f32], words: &[u32], banned: &[u32]) -> u32 {
    let row = SampleRow {
        task: RowTask::Sample,
        params: &SamplingParams::default(),
        seed: 9,
        position: 3,
        seen: &[],
        banned_token_ids: banned,
        bitmask: Some(TokenBitmask::new(words)),
    };
    sample(ops, logits, &[row])[0].token_id
}

#[test]
fn a_grammar_gives_way_last() {
    let inf = f32::INFINITY;
    let logits: Vec<f32> = (0..40).map(|id| if id < 35 { id as f32 } else { -inf }).collect();
    let word = |ids: &[u32]| ids.iter().fold(0, |word, id| word | 1 << id);
    let check = |ops: &dyn Ops| {
        let choose = |words: &[u32], banned: &[u32]| choose_masked(ops, &logits, words, banned);
        // What is banned is chosen before what the grammar forbids, the most likely of it.
        assert_eq!(choose(&[word(&[5, 7, 6])], &[5, 6, 7]), 7);
        // Of what is impossible, the first.
        assert_eq!(choose(&[0, word(&[5, 7, 6])], &[]), 37);
        // A bitmask that allows nothing is no bitmask.
        assert_eq!(choose(&[0, 0], &[]), 34);
        assert_eq!(choose(&[], &[]), 34);
    };
    check(&ReferenceOps);
    for_each_backend(check);
}

#[test]
fn only_tokens_with_a_set_bit_are_drawn() {
    let logits = logits(1000, 0.5);
    let words: Vec<u32> = (0..20).map(|i| 0x1111_0001 << (i % 4)).collect();
    let bitmask = TokenBitmask::new(&words);
    let params = SamplingParams { temperature: 1.5, ..SamplingParams::default() };
    let row = |position| SampleRow {
        task: RowTask::Sample,
        params: &params,
        seed: 2,
        position,
        seen: &[],
        banned_token_ids: &[],
        bitmask: Some(bitmask),
    };
    let rows: Vec<SampleRow<'_>> = (0..500).map(row).collect();
    for_each_backend(|ops| {
        let tokens = sample(ops, &logits, &rows);
        let different: BTreeSet<u32> = tokens.iter().map(|token| token.token_id).collect();
        assert!(different.iter().all(|&id| bitmask.allows(id)), "{different:?}");
        assert!(different.len() > 60, "of 100 tokens only {different:?}");
    });
}

#[test]
fn the_referee_filters_by_hand_computed_sets() {
    // Probabilities 0.4, 0.3, 0.2, 0.1; token ids in mixed order.
    let logits: Vec<f32> = [0.2f32, 0.4, 0.1, 0.3].iter().map(|p| p.ln()).collect();
    let possible_of = |params: SamplingParams, words: Option<&[u32]>| {
        let mut seen = BTreeSet::new();
        for position in 0..300 {
            let row = SampleRow {
                task: RowTask::Sample,
                params: &params,
                seed: 1,
                position,
                seen: &[SeenToken { token_id: 1, times_generated: 1 }],
                banned_token_ids: &[],
                bitmask: words.map(TokenBitmask::new),
            };
            seen.insert(sample(&ReferenceOps, &logits, &[row])[0].token_id);
        }
        seen.into_iter().collect::<Vec<_>>()
    };
    let possible = |params| possible_of(params, None);
    let plain = SamplingParams::default;
    assert_eq!(possible(plain()), [0, 1, 2, 3]);
    assert_eq!(possible(SamplingParams { top_k: 2, ..plain() }), [1, 3]);
    assert_eq!(possible(SamplingParams { top_p: 0.35, ..plain() }), [1]);
    assert_eq!(possible(SamplingParams { top_p: 0.65, ..plain() }), [1, 3]);
    assert_eq!(possible(SamplingParams { top_p: 0.75, ..plain() }), [0, 1, 3]);
    assert_eq!(possible(SamplingParams { min_p: 0.45, ..plain() }), [0, 1, 3]);
    let allowed = Some(vec![2, 0]);
    assert_eq!(possible(SamplingParams { allowed_token_ids: allowed, ..plain() }), [0, 2]);
    let penalty = 100.0;
    assert_eq!(possible(SamplingParams { presence_penalty: penalty, ..plain() }), [0, 2, 3]);
    let logit_bias = vec![(2, 100.0)];
    assert_eq!(possible(SamplingParams { logit_bias, ..plain() }), [2]);
    // Of 0.3, 0.2 and 0.1, the first is half and the first two are five sixths.
    let masked = |params| possible_of(params, Some(&[0b1101]));
    assert_eq!(masked(plain()), [0, 2, 3]);
    assert_eq!(masked(SamplingParams { top_k: 2, ..plain() }), [0, 3]);
    assert_eq!(masked(SamplingParams { top_p: 0.45, ..plain() }), [3]);
    assert_eq!(masked(SamplingParams { top_p: 0.55, ..plain() }), [0, 3]);
    assert_eq!(masked(SamplingParams { min_p: 0.5, ..plain() }), [0, 3]);
    assert_eq!(masked(SamplingParams { temperature: 0.0, ..plain() }), [3]);
}
