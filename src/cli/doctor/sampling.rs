//! Cases of choosing tokens, and of steps that are recorded and replayed.

use super::cases::reserve;
use super::verify::Side;
use super::weights::{Weights, matrix};
use crate::config::Quantization;
use crate::formats::PackedMatrix;
use crate::ops::args::*;
use crate::ops::{Ops, OpsError};
use crate::request::{SamplingParams, SeenToken};
use crate::tensor::Tensor;

const VOCAB_SIZE: usize = 1000;

/// The chosen tokens and their log-probabilities, as numbers.
pub(super) fn sample(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    let greedy = SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() };
    let random =
        SamplingParams { temperature: 0.7, logprobs: Some(0), ..SamplingParams::default() };
    let narrow = SamplingParams { top_k: 20, top_p: 0.9, ..random.clone() };
    let likely = SamplingParams { min_p: 0.2, ..random.clone() };
    let penalised = SamplingParams { repetition_penalty: 1.3, ..greedy.clone() };
    let counted =
        SamplingParams { frequency_penalty: 2.0, presence_penalty: 1.0, ..greedy.clone() };
    let biased = SamplingParams { logit_bias: vec![(5, 30.0), (6, 31.0)], ..greedy.clone() };
    let allowed = SamplingParams { allowed_token_ids: Some(vec![3, 90, 777]), ..greedy.clone() };
    let every_third: Vec<u32> = (0..VOCAB_SIZE.div_ceil(32))
        .map(|word| (0..32).filter(|bit| (32 * word + bit) % 3 == 0).map(|bit| 1 << bit).sum())
        .collect();
    let mask = Some(TokenBitmask::new(&every_third));
    choose(side, "greedy", &greedy, None)?;
    choose(side, "random", &random, None)?;
    choose(side, "top-k, top-p", &narrow, None)?;
    choose(side, "min-p", &likely, None)?;
    choose(side, "penalty", &penalised, None)?;
    choose(side, "counted penalties", &counted, None)?;
    choose(side, "a bias, one of two banned", &biased, None)?;
    choose(side, "three allowed tokens", &allowed, None)?;
    choose(side, "greedy under a mask", &greedy, mask)?;
    choose(side, "random under a mask", &random, mask)
}

/// Three tokens of a prompt, and two that were generated.
const PAST: [SeenToken; 5] = [
    SeenToken { token_id: 1, times_generated: 0 },
    SeenToken { token_id: 2, times_generated: 0 },
    SeenToken { token_id: 3, times_generated: 0 },
    SeenToken { token_id: 4, times_generated: 1 },
    SeenToken { token_id: 5, times_generated: 2 },
];

fn choose(
    side: &mut Side<'_>,
    name: &str,
    params: &SamplingParams,
    bitmask: Option<TokenBitmask<'_>>,
) -> Result<(), OpsError> {
    let values: Vec<f32> = side.numbers(4 * VOCAB_SIZE).into_iter().map(|x| 8.0 * x).collect();
    let mut logits = side.ops.place(Tensor::from_slice(&values, [4, VOCAB_SIZE]))?;
    let row = |i: u32| SampleRow {
        task: RowTask::Sample,
        params,
        seed: 7 + u64::from(i),
        position: 11 * i,
        seen: &PAST,
        banned_token_ids: &[6],
        bitmask,
    };
    let rows: Vec<_> = (0..4).map(row).collect();
    let sampled = side.ops.sample(SampleArgs { logits: logits.view_mut(), rows: &rows });
    let numbers = sampled.iter().flat_map(|token| {
        let logprob = token.logprobs.as_ref().map_or(0.0, |logprobs| logprobs.logprob);
        [token.token_id as f32, logprob]
    });
    side.note_numbers(name, numbers.collect());
    Ok(())
}

/// What a recorded step reads and writes.
struct Step {
    x: Tensor,
    normed: Tensor,
    out: Tensor,
    weight: Tensor,
    matrix: PackedMatrix,
}

impl Step {
    fn run(&mut self, ops: &dyn Ops) {
        let Step { x, normed, out, weight, matrix } = self;
        let (x, weight) = (x.view(), weight.view());
        ops.norm(NormArgs { out: normed.view_mut(), x, weight, eps: 1e-5 });
        let projection = Projection { out: out.view_mut(), weight: matrix, bias: None };
        ops.matmul(MatmulArgs { x: normed.view(), projections: vec![projection] });
    }
}

/// A norm and a product, replayed on other activations than those that they were recorded with;
/// where a device records nothing, run again.
pub(super) fn recorded(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    let formats =
        [("bf16", None), ("int8", Some(Quantization::Int8)), ("int4", Some(Quantization::Int4))];
    for (name, format) in formats {
        for rows in [1, 40] {
            let mut step = Step {
                x: side.activations([rows, 192])?,
                normed: side.room([rows, 192])?,
                out: side.room([rows, 96])?,
                weight: side.floats([192])?,
                matrix: matrix(side, Weights::Online(format), [96, 192])?,
            };
            let ops = side.ops;
            step.run(ops);
            let recording = if ops.can_record() { ops.record(&mut || step.run(ops)) } else { None };
            for pass in ["first", "second"] {
                let other = side.host_activations([rows, 192]);
                ops.upload(step.x.view_mut(), other.view());
                match &recording {
                    Some(recording) => ops.replay(recording),
                    None => step.run(ops),
                }
                side.note(format!("{name}, {rows} rows, {pass} replay"), &step.out);
            }
        }
    }
    Ok(())
}
