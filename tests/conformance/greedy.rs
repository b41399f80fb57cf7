//! Greedy tokens chosen while logits are computed: the sampler's own, in every format.

use tokenmill::formats::PackedMatrix;
use tokenmill::ops::Ops;
use tokenmill::ops::args::{
    GreedyArgs, MatmulArgs, Projection, RowTask, SampleArgs, SampleRow, TokenBitmask,
};
use tokenmill::request::SamplingParams;
use tokenmill::tensor::{DType, Tensor, View};

use crate::support::*;

/// Rows around tiles and pairs of them.
const ROWS: [usize; 5] = [1, 2, 17, 33, 64];
/// Vocabularies of one block, of some, and of several tasks; most do not fill their last block.
const VOCABS: [usize; 5] = [1, 15, 33, 160, 1003];
const K: usize = 300;
/// `(rows, vocabulary, k)` of a product that tiles compute in groups of rows.
const GROUPS_OF_ROWS: (usize, usize, usize) = (1100, 130, 1280);

pub fn check(ops: &dyn Ops) {
    let rng = &mut Rng::new(61);
    for vocab in VOCABS {
        for (i, (name, weight)) in matrices(rng, ops, vocab, K).into_iter().enumerate() {
            for (j, rows) in ROWS.into_iter().enumerate() {
                let x = activations(rng, rows, K);
                let biases = biases(vocab);
                let planted = biases.len() - 1;
                for which in [None, Some(planted), Some((i + j) % planted)] {
                    let (how, bias) = which.map_or(("no bias", None), |which| {
                        let (how, values) = &biases[which];
                        (*how, Some(Tensor::from_slice(values, [vocab])))
                    });
                    let what = format!("{} greedy {rows} x {vocab} {name}, {how}", ops.name());
                    let bias = bias.as_ref().map(Tensor::view);
                    compare(ops, &what, x.view(), &weight, bias);
                }
            }
        }
    }
    let (rows, vocab, k) = GROUPS_OF_ROWS;
    let (name, weight) = quantized(rng, vocab, k).swap_remove(0);
    let what = format!("{} greedy {rows} x {vocab} {name}", ops.name());
    compare(ops, &what, activations(rng, rows, k).view(), &weight, None);
}

/// Every format, and every float dtype as it is and as it is multiplied.
fn matrices(
    rng: &mut Rng,
    ops: &dyn Ops,
    vocab: usize,
    k: usize,
) -> Vec<(&'static str, PackedMatrix)> {
    let mut all = quantized(rng, vocab, k);
    for (name, dtype) in ["f32", "bf16", "f16"].into_iter().zip(FLOATS) {
        all.push((name, rng.matrix(dtype, vocab, k)));
    }
    all.push(("bf16, arranged", ops.arrange(rng.matrix(DType::BF16, vocab, k)).unwrap()));
    all
}

/// Every third row is zeros, whose logits are the bias.
fn activations(rng: &mut Rng, rows: usize, k: usize) -> Tensor {
    let mut x = rng.floats(rows * k);
    x.chunks_mut(k).step_by(3).for_each(|row| row.fill(0.0));
    Tensor::from_slice(&x, [rows, k])
}

/// Biases that make logits equal, infinite or no numbers. In the last, the largest come again and
/// again, first in the middle, so that tasks and threads find the same.
fn biases(vocab: usize) -> Vec<(&'static str, Vec<f32>)> {
    let of = |f: &dyn Fn(usize) -> f32| (0..vocab).map(f).collect::<Vec<f32>>();
    vec![
        ("all alike", vec![-500.0; vocab]),
        ("all -inf", vec![f32::NEG_INFINITY; vocab]),
        ("all NaN", vec![f32::NAN; vocab]),
        ("zeros", of(&|i| if i % 2 == 0 { -0.0 } else { 0.0 })),
        ("some NaN", of(&|i| if i % 3 == 0 { f32::NAN } else { (i % 50) as f32 })),
        ("one above -inf", of(&|i| if i + 1 == vocab { f32::MIN } else { f32::NEG_INFINITY })),
        ("infinities", of(&|i| if i % 31 == 7 { f32::INFINITY } else { 0.0 })),
        ("ties", of(&|i| if i >= vocab / 3 && i % 32 > 30 { 2.0e9 } else { -1.0 })),
    ]
}

fn compare(ops: &dyn Ops, what: &str, x: View<'_>, weight: &PackedMatrix, bias: Option<View<'_>>) {
    let tokens = ops.greedy(GreedyArgs { x, weight, bias });
    assert_eq!(tokens.is_some(), weight.format.is_in_blocks(), "{what}: blocks are read so");
    if let Some(tokens) = tokens {
        assert_eq!(tokens, through_logits(ops, x, weight, bias), "{what}");
    }
}

fn through_logits(
    ops: &dyn Ops,
    x: View<'_>,
    weight: &PackedMatrix,
    bias: Option<View<'_>>,
) -> Vec<u32> {
    let params = SamplingParams::greedy();
    let mut logits = Tensor::zeros(DType::F32, [x.size(0), weight.num_rows]);
    let projection = Projection { out: logits.view_mut(), weight, bias };
    ops.matmul(MatmulArgs { x, projections: vec![projection] });
    let rows: Vec<_> = (0..x.size(0)).map(|_| row(&params)).collect();
    assert!(rows.iter().all(SampleRow::is_plain_greedy));
    let tokens = ops.sample(SampleArgs { logits: logits.view_mut(), rows: &rows });
    tokens.into_iter().map(|token| token.token_id).collect()
}

fn row(params: &SamplingParams) -> SampleRow<'_> {
    SampleRow {
        task: RowTask::Sample,
        params,
        seed: 1,
        position: 2,
        seen: &[],
        banned_token_ids: &[],
        bitmask: None,
    }
}

#[test]
fn a_row_is_plain_greedy_when_nothing_else_is_asked_of_its_logits() {
    let greedy = SamplingParams::greedy;
    assert!(row(&greedy()).is_plain_greedy());
    assert!(row(&SamplingParams { top_k: 5, top_p: 0.5, ..greedy() }).is_plain_greedy());
    for params in [
        SamplingParams { temperature: 0.1, ..greedy() },
        SamplingParams { logprobs: Some(0), ..greedy() },
        SamplingParams { logit_bias: vec![(1, 1.0)], ..greedy() },
        SamplingParams { allowed_token_ids: Some(vec![1]), ..greedy() },
        SamplingParams { presence_penalty: 0.1, ..greedy() },
        SamplingParams { frequency_penalty: 0.1, ..greedy() },
        SamplingParams { repetition_penalty: 1.1, ..greedy() },
    ] {
        assert!(!row(&params).is_plain_greedy(), "{params:?}");
    }
    let params = greedy();
    assert!(!SampleRow { banned_token_ids: &[1], ..row(&params) }.is_plain_greedy());
    let bitmask = Some(TokenBitmask::new(&[1]));
    assert!(!SampleRow { bitmask, ..row(&params) }.is_plain_greedy());
    let task = RowTask::Score { token_id: 1 };
    assert!(!SampleRow { task, ..row(&params) }.is_plain_greedy());
}
