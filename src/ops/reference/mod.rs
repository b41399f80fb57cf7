//! The referee: every operation as plain loops over f32, one thread, no unsafe.
//!
//! It is meant to be obviously right, not fast: sums run in f64, tensors of any float dtype
//! are widened row by row, nothing is blocked or fused. Every backend is tested against it,
//! and it is itself tested against candle (`tests/conformance/candle.rs`).

mod cache;
mod experts;
mod latent;
mod sample;

use half::{bf16, f16};

use super::Ops;
use super::args::*;
use crate::formats::{Format, PackedMatrix, int8};
use crate::output::SampledToken;
use crate::tensor::{DType, View};

/// Implements [`Ops`] for f32 activations with weights, tables and KV caches of any float dtype.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceOps;

impl Ops for ReferenceOps {
    fn name(&self) -> String {
        "reference".into()
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn embed(&self, args: EmbedArgs<'_>) {
        args.check();
        let out = args.out.into_mut_slice::<f32>();
        let rows = out.chunks_exact_mut(args.table.num_cols);
        for (row, &id) in rows.zip(args.token_ids.as_slice::<u32>()) {
            row.copy_from_slice(&args.table.row(id as usize));
        }
    }

    fn norm(&self, args: NormArgs<'_>) {
        args.check();
        let weight = read(args.weight);
        let x = args.x.as_slice::<f32>();
        let out = args.out.into_mut_slice::<f32>();
        for (out, x) in out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
            norm_row(out, x, &weight, args.eps);
        }
    }

    fn add_norm(&self, args: AddNormArgs<'_>) {
        args.check();
        let weight = read(args.weight);
        let x = args.x.as_slice::<f32>();
        let residual = args.residual.into_mut_slice::<f32>();
        for (sum, x) in residual.iter_mut().zip(x) {
            *sum += x;
        }
        let out = args.out.into_mut_slice::<f32>();
        let rows = residual.chunks_exact(weight.len());
        for (out, row) in out.chunks_exact_mut(weight.len()).zip(rows) {
            norm_row(out, row, &weight, args.eps);
        }
    }

    fn layer_norm(&self, args: LayerNormArgs<'_>) {
        args.check();
        let (weight, x) = (read(args.weight), args.x.as_slice::<f32>());
        let bias = args.bias.map_or_else(|| vec![0.0; weight.len()], read);
        let mut rows = x.to_vec();
        if let Some(residual) = args.residual {
            let residual = residual.into_mut_slice::<f32>();
            residual.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
            rows.copy_from_slice(residual);
        }
        let out = args.out.into_mut_slice::<f32>().chunks_exact_mut(weight.len());
        for (out, row) in out.zip(rows.chunks_exact(weight.len())) {
            layer_norm_row(out, row, (&weight, &bias), args.eps);
        }
    }

    fn rope(&self, args: RopeArgs<'_>) {
        args.check();
        let half = args.cos.size(1);
        let (cos, sin) = (args.cos.as_slice::<f32>(), args.sin.as_slice::<f32>());
        for heads in [args.q, args.k] {
            let (num_heads, head_dim) = (heads.size(1), heads.size(2));
            let tokens = heads.into_mut_slice::<f32>().chunks_exact_mut(num_heads * head_dim);
            for (token, &position) in tokens.zip(args.positions.as_slice::<u32>()) {
                let angles = position as usize * half..(position as usize + 1) * half;
                for head in token.chunks_exact_mut(head_dim) {
                    rotate(head, &cos[angles.clone()], &sin[angles.clone()], args.style);
                }
            }
        }
    }

    fn matmul(&self, args: MatmulArgs<'_>) {
        args.check();
        let rows: Vec<&[f32]> = args.x.as_slice().chunks_exact(args.x.size(1).max(1)).collect();
        for Projection { out, weight, bias } in args.projections {
            let (num_out, bias) = (weight.num_rows, bias.map(read));
            let out = out.into_mut_slice::<f32>();
            for n in 0..num_out {
                let bias = bias.as_ref().map_or(0.0, |bias| bias[n]);
                let weights = weight.row(n);
                for (m, x) in rows.iter().enumerate() {
                    let product = match weight.format {
                        Format::Int8 => dot_bytes(x, weight, n),
                        Format::Q8 | Format::Int4 | Format::Mxfp4 => dot_groups(x, weight, n),
                        _ => dot(x, &weights) as f32,
                    };
                    out[m * num_out + n] = product + bias;
                }
            }
        }
    }

    fn route_experts(&self, args: RouteExpertsArgs<'_>) {
        args.check();
        experts::route_experts(args);
    }

    fn expert_mlp(&self, args: ExpertMlpArgs<'_>) {
        args.check(self.expert_rows(args.x.size(0)));
        experts::expert_mlp(self, args);
    }

    fn gated_activation(&self, args: GatedActivationArgs<'_>) {
        args.check();
        let (gate, up) = (args.gate.as_slice::<f32>(), args.up.as_slice::<f32>());
        let out = args.out.into_mut_slice::<f32>();
        for (out, (&gate, &up)) in out.iter_mut().zip(gate.iter().zip(up)) {
            *out = (activate(f64::from(gate), args.activation) * f64::from(up)) as f32;
        }
    }

    fn write_kv(&self, args: WriteKvArgs<'_>) {
        args.check();
        cache::write_kv(args);
    }

    fn attention(&self, args: AttentionArgs<'_>) {
        args.check();
        cache::attention(args);
    }

    fn head_matmul(&self, args: HeadMatmulArgs<'_>) {
        args.check();
        latent::head_matmul(args);
    }

    fn write_latent(&self, args: WriteLatentArgs<'_>) {
        args.check();
        latent::write_latent(args);
    }

    fn latent_attention(&self, args: LatentAttentionArgs<'_>) {
        args.check();
        latent::latent_attention(args);
    }

    fn add(&self, args: AddArgs<'_>) {
        args.check();
        let x = args.x.as_slice::<f32>();
        args.out.into_mut_slice::<f32>().iter_mut().zip(x).for_each(|(out, x)| *out += x);
    }

    fn gather_rows(&self, args: GatherRowsArgs<'_>) {
        args.check();
        let width = args.x.size(1);
        let out = args.out.into_mut_slice::<f32>();
        for (out, &row) in out.chunks_exact_mut(width).zip(args.rows.as_slice::<u32>()) {
            out.copy_from_slice(&read_row(args.x, row as usize));
        }
    }

    fn copy_blocks(&self, args: CopyBlocksArgs<'_>) {
        for mut cache in std::iter::once(args.k_cache).chain(args.v_cache) {
            for &(source, destination) in args.pairs {
                cache.copy_block(source, destination);
            }
        }
    }

    fn soft_cap(&self, args: SoftCapArgs<'_>) {
        args.check();
        let cap = f64::from(args.cap);
        for x in args.x.into_mut_slice::<f32>() {
            *x = (cap * (f64::from(*x) / cap).tanh()) as f32;
        }
    }

    fn sample(&self, args: SampleArgs<'_>) -> Vec<SampledToken> {
        args.check();
        let vocab_size = args.logits.size(1);
        let logits = args.logits.into_mut_slice::<f32>();
        let rows = logits.chunks_exact(vocab_size).zip(args.rows);
        rows.map(|(logits, row)| sample::sample_row(logits, row)).collect()
    }
}

fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let mean_square = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    for (out, (&x, &weight)) in out.iter_mut().zip(x.iter().zip(weight)) {
        *out = (f64::from(x) * scale * f64::from(weight)) as f32;
    }
}

fn layer_norm_row(out: &mut [f32], x: &[f32], (weight, bias): (&[f32], &[f32]), eps: f32) {
    let mean = x.iter().copied().map(f64::from).sum::<f64>() / x.len() as f64;
    let centred: Vec<f64> = x.iter().map(|&x| f64::from(x) - mean).collect();
    let variance = centred.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (variance + f64::from(eps)).sqrt();
    for (i, out) in out.iter_mut().enumerate() {
        *out = (centred[i] * scale * f64::from(weight[i]) + f64::from(bias[i])) as f32;
    }
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], style: RopeStyle) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = match style {
            RopeStyle::Halves => (i, i + half),
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * cos[i] - y * sin[i];
        head[b] = y * cos[i] + x * sin[i];
    }
}

fn activate(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
    }
}

/// The error function by its Taylor series, which converges to f64 precision where it matters;
/// beyond 5 it is 1 within 2e-12.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Row `n` of an INT8 matrix times activations that are quantized the same way.
fn dot_bytes(x: &[f32], weight: &PackedMatrix, n: usize) -> f32 {
    let mut codes = vec![0; x.len()];
    let scale = int8::quantize_row(x, &mut codes);
    dot_codes(&codes, weight, n, 0) as f32 * (scale * weight.scale(n, 0))
}

/// The same for a matrix in groups: activations are quantized group by group.
fn dot_groups(x: &[f32], weight: &PackedMatrix, n: usize) -> f32 {
    let group = weight.quantized.as_ref().expect("groups have scales").grid.cols;
    let product = |(i, x): (usize, &[f32])| {
        let mut codes = vec![0; x.len()];
        let x_scale = int8::quantize_row(x, &mut codes);
        let sum = dot_codes(&codes, weight, n, i * group);
        f64::from(sum) * f64::from(x_scale) * f64::from(weight.scale(n, i * group))
    };
    x.chunks(group).enumerate().map(product).sum::<f64>() as f32
}

/// Codes times those of row `n` from column `first` on.
fn dot_codes(codes: &[i8], weight: &PackedMatrix, n: usize, first: usize) -> i32 {
    let products = codes.iter().enumerate().map(|(i, &x)| i32::from(x) * weight.code(n, first + i));
    products.sum()
}

/// All elements of a float tensor, widened.
fn read(view: View<'_>) -> Vec<f32> {
    match view.dtype() {
        DType::F32 => view.as_slice::<f32>().to_vec(),
        DType::BF16 => view.as_slice::<bf16>().iter().map(|x| x.to_f32()).collect(),
        DType::F16 => view.as_slice::<f16>().iter().map(|x| x.to_f32()).collect(),
        DType::U32 | DType::I8 | DType::U8 | DType::Fp8 => {
            panic!("an integer tensor where floats are needed")
        }
    }
}

/// One row of a float tensor, widened.
fn read_row(view: View<'_>, row: usize) -> Vec<f32> {
    read(view.rows(row..row + 1))
}
