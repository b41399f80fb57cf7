//! Multi-head latent attention, one token, head and position at a time.

use super::cache::{PagedCache, weigh, write_rows};
use super::{dot, norm_row, read, read_row, rotate};
use crate::ops::args::{HeadMatmulArgs, LatentAttentionArgs, WriteLatentArgs};
use crate::tensor::View;

/// See [`crate::ops::Ops::head_matmul`].
pub fn head_matmul(args: HeadMatmulArgs<'_>) {
    let HeadMatmulArgs { out, x, weight } = args;
    let (num_heads, num_out, num_in) = (weight.size(0), weight.size(1), weight.size(2));
    let (x_width, out_width) = (x.size(2), out.size(2));
    let x = x.as_slice::<f32>().chunks_exact(x_width);
    let out = out.into_mut_slice::<f32>().chunks_exact_mut(out_width);
    for (i, (x, out)) in x.zip(out).enumerate() {
        let matrix = read_row(weight, i % num_heads);
        for (n, row) in matrix.chunks_exact(num_in).enumerate().take(num_out) {
            out[n] = dot(&x[..num_in], row) as f32;
        }
    }
}

/// See [`crate::ops::Ops::write_latent`].
pub fn write_latent(args: WriteLatentArgs<'_>) {
    let (rank, rope_dim) = (args.rank(), args.rope_dim());
    let weight = read(args.weight);
    let tables = [args.cos, args.sin].map(View::as_slice::<f32>);
    let (num_heads, width) = (args.q.size(1), args.q.size(2));
    let q = args.q.as_slice::<f32>().chunks_exact(num_heads * width);
    let len = rank + rope_dim;
    let absorbed = args.absorbed.into_mut_slice::<f32>().chunks_exact_mut(num_heads * len);
    let latent = args.latent.into_mut_slice::<f32>();
    let rows = latent.chunks_exact_mut(len).zip(q.zip(absorbed));
    for ((latent, (q, absorbed)), &position) in rows.zip(args.positions.as_slice::<u32>()) {
        let at = position as usize * rope_dim / 2;
        let [cos, sin] = tables.map(|table| &table[at..at + rope_dim / 2]);
        let raw = latent[..rank].to_vec();
        norm_row(&mut latent[..rank], &raw, &weight, args.eps);
        rotate(&mut latent[rank..], cos, sin, args.style);
        for (q, absorbed) in q.chunks_exact(width).zip(absorbed.chunks_exact_mut(len)) {
            absorbed[rank..].copy_from_slice(&q[width - rope_dim..]);
            rotate(&mut absorbed[rank..], cos, sin, args.style);
        }
    }
    write_rows(args.cache, latent, 1, args.slot_mapping);
}

/// See [`crate::ops::Ops::latent_attention`].
pub fn latent_attention(args: LatentAttentionArgs<'_>) {
    let cu_seqlens = args.cu_seqlens_q.as_slice::<u32>();
    let q = args.q.as_slice::<f32>();
    let (num_heads, len, rank) = (args.q.size(1), args.q.size(2), args.out.size(2));
    let cache = PagedCache::of_latents(&args);
    let scale = f64::from(args.scale);
    let out = args.out.into_mut_slice::<f32>();
    for (seq, &context) in args.context_lens.as_slice::<u32>().iter().enumerate() {
        let rows = cu_seqlens[seq] as usize..cu_seqlens[seq + 1] as usize;
        let num_rows = rows.len();
        for (i, row) in rows.enumerate() {
            let position = context as usize - num_rows + i;
            let (keys, _) = cache.gather(seq, 0, 0..=position);
            for head in row * num_heads..(row + 1) * num_heads {
                let q = &q[head * len..(head + 1) * len];
                let scores: Vec<f64> = keys.iter().map(|key| dot(q, key) * scale).collect();
                weigh(&mut out[head * rank..(head + 1) * rank], &scores, None, &keys);
            }
        }
    }
}
