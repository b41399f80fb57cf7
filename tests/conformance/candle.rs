//! The referee against candle's own operations.

use candle_core::{D, DType as CandleDType, Device, Tensor as CandleTensor};
use tokenmill::ops::Ops;
use tokenmill::ops::args::*;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::{DType, View, ViewMut};

use crate::attention::{Case, Problem};
use crate::support::*;

/// Both sides compute in f32 at least; candle sums in f32.
const TOLERANCE: (f32, f32) = (5e-6, 5e-6);

fn candle(values: &[f32], shape: &[usize]) -> CandleTensor {
    CandleTensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &CandleTensor) -> Vec<f32> {
    tensor.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn matmul_is_candles() {
    let rng = &mut Rng::new(1);
    let (rows, cols, k) = (5, 33, 100);
    let (x, w, bias) = (rng.floats(rows * k), rng.floats(cols * k), rng.floats(cols));
    for (dtype, candle_dtype) in [
        (DType::F32, CandleDType::F32),
        (DType::BF16, CandleDType::BF16),
        (DType::F16, CandleDType::F16),
    ] {
        let rounded = candle(&w, &[cols, k]).to_dtype(candle_dtype).unwrap();
        let rounded = rounded.to_dtype(CandleDType::F32).unwrap();
        let want = candle(&x, &[rows, k]).matmul(&rounded.t().unwrap()).unwrap();
        let want = want.broadcast_add(&candle(&bias, &[cols])).unwrap();
        let mut out = vec![f32::NAN; rows * cols];
        let weight = tokenmill::formats::dense::pack(cast(&w, dtype, [cols, k]));
        let projection = Projection {
            out: ViewMut::of(&mut out, [rows, cols]),
            weight: &weight,
            bias: Some(View::of(&bias, [cols])),
        };
        let x = View::of(&x, [rows, k]);
        ReferenceOps.matmul(MatmulArgs { x, projections: vec![projection] });
        assert_close("matmul", &out, &values(&want), TOLERANCE);
    }
}

#[test]
fn norm_is_candles() {
    let rng = &mut Rng::new(2);
    let (rows, width) = (3, 70);
    let (x, weight) = (rng.floats(rows * width), rng.floats(width));
    let want =
        candle_nn::ops::rms_norm(&candle(&x, &[rows, width]), &candle(&weight, &[width]), 1e-5);
    let mut out = vec![f32::NAN; rows * width];
    ReferenceOps.norm(NormArgs {
        out: ViewMut::of(&mut out, [rows, width]),
        x: View::of(&x, [rows, width]),
        weight: View::of(&weight, [width]),
        eps: 1e-5,
    });
    assert_close("norm", &out, &values(&want.unwrap()), TOLERANCE);
}

#[test]
fn layer_norm_is_candles() {
    let rng = &mut Rng::new(7);
    let (rows, width) = (3, 70);
    let x: Vec<f32> = rng.floats(rows * width).iter().map(|x| 0.5 + x).collect();
    let residual = rng.floats(rows * width);
    let (weight, bias) = (rng.floats(width), rng.floats(width));
    let sum: Vec<f32> = residual.iter().zip(&x).map(|(sum, x)| sum + x).collect();
    for (has_bias, has_residual) in [(false, false), (true, false), (false, true), (true, true)] {
        let bias = if has_bias { bias.clone() } else { vec![0.0; width] };
        let (candle_weight, candle_bias) = (candle(&weight, &[width]), candle(&bias, &[width]));
        let input = candle(if has_residual { &sum } else { &x }, &[rows, width]);
        let want = candle_nn::ops::layer_norm(&input, &candle_weight, &candle_bias, 1e-5).unwrap();
        let (mut out, mut updated) = (vec![f32::NAN; rows * width], residual.clone());
        ReferenceOps.layer_norm(LayerNormArgs {
            out: ViewMut::of(&mut out, [rows, width]),
            residual: has_residual.then(|| ViewMut::of(&mut updated, [rows, width])),
            x: View::of(&x, [rows, width]),
            weight: View::of(&weight, [width]),
            bias: has_bias.then(|| View::of(&bias, [width])),
            eps: 1e-5,
        });
        assert_close("layer_norm", &out, &values(&want), TOLERANCE);
        assert_same("residual", &updated, if has_residual { &sum } else { &residual });
    }
}

#[test]
fn rope_is_candles_in_both_styles() {
    let rng = &mut Rng::new(3);
    let (tokens, heads, head_dim) = (6, 3, 16);
    let x = rng.floats(tokens * heads * head_dim);
    let angles: Vec<f32> = rng.floats(tokens * head_dim / 2).iter().map(|x| 3.0 * x).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|x| (x.cos(), x.sin())).unzip();
    let table = [tokens, head_dim / 2];
    for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
        let by_head = candle(&x, &[1, tokens, heads, head_dim]).transpose(1, 2).unwrap();
        let by_head = by_head.contiguous().unwrap();
        let rotate = match style {
            RopeStyle::Halves => candle_nn::rotary_emb::rope,
            RopeStyle::Interleaved => candle_nn::rotary_emb::rope_i,
        };
        let want = rotate(&by_head, &candle(&cos, &table), &candle(&sin, &table)).unwrap();
        let want = values(&want.transpose(1, 2).unwrap());
        let (mut q, mut k) = (x.clone(), x.clone());
        let positions: Vec<u32> = (0..tokens as u32).collect();
        ReferenceOps.rope(RopeArgs {
            q: ViewMut::of(&mut q, [tokens, heads, head_dim]),
            k: ViewMut::of(&mut k, [tokens, heads, head_dim]),
            positions: View::of(&positions, [tokens]),
            cos: View::of(&cos, table),
            sin: View::of(&sin, table),
            style,
        });
        assert_close("rope of q", &q, &want, TOLERANCE);
        assert_close("rope of k", &k, &want, TOLERANCE);
    }
}

#[test]
fn gated_activations_are_candles() {
    let rng = &mut Rng::new(4);
    let gate: Vec<f32> = rng.floats(500).iter().map(|x| 8.0 * x).collect();
    let up = rng.floats(500);
    let x = candle(&gate, &[500]);
    for (activation, activated) in [
        (Activation::Silu, candle_nn::ops::silu(&x)),
        (Activation::GeluTanh, x.gelu()),
        (Activation::Gelu, x.gelu_erf()),
    ] {
        let want = (activated.unwrap() * candle(&up, &[500])).unwrap();
        let mut out = vec![f32::NAN; 500];
        ReferenceOps.gated_activation(GatedActivationArgs {
            out: ViewMut::of(&mut out, [500, 1]),
            gate: View::of(&gate, [500, 1]),
            up: View::of(&up, [500, 1]),
            activation,
        });
        assert_close(&format!("{activation:?}"), &out, &values(&want), TOLERANCE);
    }
}

#[test]
fn soft_cap_is_candles_tanh() {
    let x: Vec<f32> = Rng::new(8).floats(500).iter().map(|x| 90.0 * x).collect();
    let scaled = (candle(&x, &[500]) / 30.0).unwrap();
    let want = (scaled.tanh().unwrap() * 30.0).unwrap();
    let mut capped = x.clone();
    ReferenceOps.soft_cap(SoftCapArgs { x: ViewMut::of(&mut capped, [5, 100]), cap: 30.0 });
    assert_close("soft_cap", &capped, &values(&want), TOLERANCE);
}

/// Causal softmax attention of one fresh prompt, with each KV head repeated for its group.
#[test]
fn attention_is_candles_softmax() {
    let (len, (heads, kv_heads), head_dim) = (37, (6, 2), 32);
    for window in [None, Some(9)] {
        let problem = Problem::new(
            &Case {
                heads: (heads, kv_heads),
                head_dim,
                block_size: 64,
                dtype: DType::F32,
                seqs: vec![(len, len)],
                window,
            },
            1,
        );
        // One block holds the sequence: [kv_heads, 64, head_dim].
        let cached = |cache: &tokenmill::tensor::Tensor| {
            let cache = candle(cache.as_slice(), &[kv_heads, 64, head_dim]);
            let repeated = cache.narrow(1, 0, len).unwrap().unsqueeze(1).unwrap();
            let shape = (kv_heads, heads / kv_heads, len, head_dim);
            repeated.broadcast_as(shape).unwrap().reshape((heads, len, head_dim)).unwrap()
        };
        let q = candle(problem.q.as_slice(), &[len, heads, head_dim]).transpose(0, 1).unwrap();
        let keys = cached(&problem.k_cache.data).transpose(1, 2).unwrap().contiguous().unwrap();
        let scores = (q.contiguous().unwrap().matmul(&keys).unwrap()
            / f64::from(head_dim as u32).sqrt())
        .unwrap();
        let hidden = |i: usize, j: usize| j > i || window.is_some_and(|window| j + window <= i);
        let mask: Vec<f32> = (0..len * len)
            .map(|at| if hidden(at / len, at % len) { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let scores = scores.broadcast_add(&candle(&mask, &[len, len])).unwrap();
        let weights = candle_nn::ops::softmax(&scores, D::Minus1).unwrap();
        let want = weights.matmul(&cached(&problem.v_cache.data)).unwrap().transpose(0, 1).unwrap();
        let got = problem.run(&ReferenceOps, "referee");
        assert_close("attention", &got, &values(&want), TOLERANCE);
    }
}

#[test]
fn log_probabilities_are_candles() {
    let rng = &mut Rng::new(6);
    let mut logits: Vec<f32> = rng.floats(777).iter().map(|x| 9.0 * x).collect();
    let want = candle_nn::ops::log_softmax(&candle(&logits, &[777]), 0).unwrap();
    let want = values(&want);
    let params = tokenmill::request::SamplingParams {
        prompt_logprobs: Some(777),
        ..tokenmill::request::SamplingParams::default()
    };
    let row = SampleRow {
        task: RowTask::Score { token_id: 5 },
        params: &params,
        seed: 0,
        position: 0,
        seen: &[],
        banned_token_ids: &[],
        bitmask: None,
    };
    let scored = ReferenceOps
        .sample(SampleArgs { logits: ViewMut::of(&mut logits, [1, 777]), rows: &[row] });
    let report = scored[0].logprobs.as_ref().unwrap();
    assert_close("logprob", &[report.logprob], &want[5..6], TOLERANCE);
    assert_eq!(report.top[report.rank as usize - 1].0, 5);
    for &(id, logprob) in &report.top {
        assert_close("top", &[logprob], &want[id as usize..][..1], TOLERANCE);
    }
}
