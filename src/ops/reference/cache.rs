//! Writing the paged cache, and attention over it, as plain loops.

use half::{bf16, f16};

use super::{dot, read};
use crate::formats::{fp8, int8};
use crate::ops::args::{AttentionArgs, LatentAttentionArgs, WriteKvArgs};
use crate::ops::kv_tensor::{KvView, KvViewMut};
use crate::tensor::{DType, Fp8, View};

/// See [`crate::ops::Ops::write_kv`].
pub fn write_kv(args: WriteKvArgs<'_>) {
    let num_kv_heads = args.k.size(1);
    for (cache, new) in [(args.k_cache, args.k), (args.v_cache, args.v)] {
        write_rows(cache, new.as_slice(), num_kv_heads, args.slot_mapping);
    }
}

/// Stores `new [num_tokens, num_kv_heads, head_dim]` in the tokens' slots.
pub fn write_rows(mut cache: KvViewMut<'_>, new: &[f32], num_kv_heads: usize, slots: View<'_>) {
    let (block_size, head_dim) = (cache.size(2), cache.size(3));
    for (token, &slot) in slots.as_slice::<u32>().iter().enumerate() {
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        for head in 0..num_kv_heads {
            let from = (token * num_kv_heads + head) * head_dim;
            let row = (block * num_kv_heads + head) * block_size + offset;
            write_vector(&mut cache, row, &new[from..from + head_dim]);
        }
    }
}

/// Stores the vector at `row`, in the order of memory.
fn write_vector(cache: &mut KvViewMut<'_>, row: usize, values: &[f32]) {
    let range = row * values.len()..(row + 1) * values.len();
    let data = cache.data.reborrow();
    match data.dtype() {
        DType::I8 => {
            let scale = int8::quantize_row(values, &mut data.into_mut_slice::<i8>()[range]);
            let scales = cache.scales.as_mut().expect("bytes have scales");
            scales.reborrow().into_mut_slice::<f32>()[row] = scale;
        }
        DType::Fp8 => {
            let codes = &mut data.into_mut_slice::<Fp8>()[range];
            codes.iter_mut().zip(values).for_each(|(code, &x)| *code = Fp8(fp8::encode(x)));
        }
        DType::F32 => data.into_mut_slice::<f32>()[range].copy_from_slice(values),
        DType::BF16 => {
            let out = &mut data.into_mut_slice::<bf16>()[range];
            out.iter_mut().zip(values).for_each(|(out, &x)| *out = bf16::from_f32(x));
        }
        DType::F16 => {
            let out = &mut data.into_mut_slice::<f16>()[range];
            out.iter_mut().zip(values).for_each(|(out, &x)| *out = f16::from_f32(x));
        }
        DType::U32 | DType::U8 => panic!("a cache of {}", data.dtype()),
    }
}

/// What the vector at `row` stands for.
fn read_vector(cache: KvView<'_>, row: usize) -> Vec<f32> {
    let head_dim = cache.size(3);
    let range = row * head_dim..(row + 1) * head_dim;
    match cache.data.dtype() {
        DType::I8 => {
            let scale = cache.scales.expect("bytes have scales").as_slice::<f32>()[row];
            let codes = &cache.data.as_slice::<i8>()[range];
            codes.iter().map(|&code| f32::from(code) * scale).collect()
        }
        DType::Fp8 => {
            let codes = &cache.data.as_slice::<Fp8>()[range];
            codes.iter().map(|code| fp8::decode(code.0)).collect()
        }
        _ => {
            let num_rows = cache.data.shape().len() / head_dim;
            read(cache.data.reshape([num_rows, head_dim]).rows(row..row + 1))
        }
    }
}

/// See [`crate::ops::Ops::attention`].
pub fn attention(args: AttentionArgs<'_>) {
    let cu_seqlens = args.cu_seqlens_q.as_slice::<u32>();
    let contexts = args.context_lens.as_slice::<u32>();
    let q = args.q.as_slice::<f32>();
    let (num_heads, head_dim) = (args.q.size(1), args.q.size(2));
    let cache = PagedCache::new(&args);
    let sinks = args.sinks.map(View::as_slice::<f32>);
    let (scale, softcap) = (f64::from(args.scale), args.softcap.map(f64::from));
    let window = args.sliding_window;
    let out = args.out.into_mut_slice::<f32>();
    for (seq, &context) in contexts.iter().enumerate() {
        let rows = cu_seqlens[seq] as usize..cu_seqlens[seq + 1] as usize;
        let num_rows = rows.len();
        for (i, row) in rows.enumerate() {
            let position = context as usize - num_rows + i;
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..num_heads {
                let at = (row * num_heads + head) * head_dim;
                let at = at..at + head_dim;
                let (keys, values) =
                    cache.gather(seq, head * cache.num_kv_heads / num_heads, first..=position);
                let score = |key: &Vec<f32>| {
                    let score = dot(&q[at.clone()], key) * scale;
                    softcap.map_or(score, |cap| cap * (score / cap).tanh())
                };
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let sink = sinks.map(|sinks| f64::from(sinks[head]));
                weigh(&mut out[at.clone()], &scores, sink, &values);
            }
        }
    }
}

/// The keys and values of sequences, found through their block tables.
pub struct PagedCache<'a> {
    k: KvView<'a>,
    v: KvView<'a>,
    tables: View<'a>,
    num_kv_heads: usize,
}

impl<'a> PagedCache<'a> {
    fn new(args: &AttentionArgs<'a>) -> PagedCache<'a> {
        let num_kv_heads = args.k_cache.size(1);
        PagedCache { k: args.k_cache, v: args.v_cache, tables: args.block_tables, num_kv_heads }
    }

    /// Vectors that are keys and values.
    pub fn of_latents(args: &LatentAttentionArgs<'a>) -> PagedCache<'a> {
        PagedCache { k: args.cache, v: args.cache, tables: args.block_tables, num_kv_heads: 1 }
    }

    /// Keys and values of one head at `positions`, one vector per position.
    pub fn gather(
        &self,
        seq: usize,
        kv_head: usize,
        positions: std::ops::RangeInclusive<usize>,
    ) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
        let block_size = self.k.size(2);
        let table = self.tables.rows(seq..seq + 1).as_slice::<u32>();
        let rows = positions.map(|position| {
            let block = table[position / block_size] as usize;
            let row = (block * self.num_kv_heads + kv_head) * block_size + position % block_size;
            (read_vector(self.k, row), read_vector(self.v, row))
        });
        rows.unzip()
    }
}

/// `out = softmax(scores) · values` for one query head, of whose elements `out` may have the first
/// ones only; a sink is one more score without a value.
pub fn weigh(out: &mut [f32], scores: &[f64], sink: Option<f64>, values: &[Vec<f32>]) {
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
    for (d, out) in out.iter_mut().enumerate() {
        let sum: f64 = weights.iter().zip(values).map(|(w, v)| w * f64::from(v[d])).sum();
        *out = (sum / total) as f32;
    }
}
