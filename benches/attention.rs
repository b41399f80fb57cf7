//! Paged attention with the heads of a 0.5 B model: decode at several contexts, and prefill.
//!
//! Beside criterion's times it prints GB/s of keys and values, and GFLOP/s, of the best call, and the
//! fraction of what bounds it: the memory's limit or that of products of floats, read at the start.
//! `machine` says which variables choose threads and instructions.

mod machine;

use std::cell::Cell;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use machine::Limits;
use tokenmill::ops::Ops;
use tokenmill::ops::args::AttentionArgs;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::ops::kv_tensor::KvTensor;
use tokenmill::tensor::{DType, Fp8, Tensor};

const HEADS: usize = 14;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const BLOCK: usize = 16;
/// Caches to take turns, as layers do; more than the processor's caches hold.
const CACHES_BYTES: usize = 300 << 20;

/// `(name, sequences, queries per sequence, context)`.
const CASES: [(&str, usize, usize, usize); 11] = [
    ("decode 1 at 1024", 1, 1, 1024),
    ("decode 1 at 4096", 1, 1, 4096),
    ("decode 1 at 16384", 1, 1, 16384),
    ("decode 16 at 512", 16, 1, 512),
    ("decode 16 at 1024", 16, 1, 1024),
    ("decode 16 at 4096", 16, 1, 4096),
    ("decode 16 at 16384", 16, 1, 16384),
    ("decode 64 at 256", 64, 1, 256),
    ("prefill 1024", 1, 1024, 1024),
    ("prefill 4096", 1, 4096, 4096),
    ("prefill 512 after 1536", 1, 512, 2048),
];

fn attention(criterion: &mut Criterion) {
    let device = machine::device();
    let ops = CpuOps::new(device.threads, device.cpu_isa).expect("the machine has what was asked");
    println!("{}", ops.name());
    let limits = Limits::read(&device);
    for dtype in [DType::BF16, DType::I8, DType::Fp8] {
        attention_over(criterion, &ops, &limits, dtype);
    }
}

/// A cache with some number in every place: the first block's, in all blocks.
fn filled_cache(dtype: DType, num_blocks: usize) -> KvTensor {
    let mut cache = KvTensor::zeros(dtype, [num_blocks, KV_HEADS, BLOCK, HEAD_DIM]);
    let first = 0..KV_HEADS * BLOCK * HEAD_DIM;
    match dtype {
        DType::I8 => {
            let codes = &mut cache.data.as_mut_slice::<i8>()[first];
            codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i % 89) as i8 - 44);
        }
        DType::Fp8 => {
            let codes = &mut cache.data.as_mut_slice::<Fp8>()[first];
            codes.iter_mut().enumerate().for_each(|(i, code)| *code = Fp8((i % 48) as u8));
        }
        _ => {
            let elements = &mut cache.data.as_mut_slice::<half::bf16>()[first];
            for (i, x) in elements.iter_mut().enumerate() {
                *x = half::bf16::from_f32((i % 89) as f32 / 89.0 - 0.5);
            }
        }
    }
    if let Some(scales) = &mut cache.scales {
        scales.as_mut_slice::<f32>()[..KV_HEADS * BLOCK].fill(0.01);
    }
    let mut view = cache.view_mut();
    (1..num_blocks as u32).for_each(|block| view.copy_block(0, block));
    cache
}

/// Cases that the command line's filter leaves out are not even filled.
fn attention_over(criterion: &mut Criterion, ops: &CpuOps, limits: &Limits, dtype: DType) {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    for (name, seqs, queries, context) in CASES {
        let name = format!("attention {name} {dtype}");
        if !name.contains(&filter) {
            continue;
        }
        let num_blocks = seqs * context / BLOCK;
        let vector_bytes = KvTensor::vector_bytes(dtype, HEAD_DIM);
        let cache_bytes = 2 * num_blocks * KV_HEADS * BLOCK * vector_bytes;
        let cache = || filled_cache(dtype, num_blocks);
        let caches: Vec<_> =
            (0..(CACHES_BYTES / cache_bytes).max(1)).map(|_| (cache(), cache())).collect();
        let tables: Vec<u32> = (0..num_blocks as u32).rev().collect();
        let tables = Tensor::from_slice(&tables, [seqs, context / BLOCK]);
        let cu_seqlens: Vec<u32> = (0..=seqs).map(|seq| (seq * queries) as u32).collect();
        let cu_seqlens = Tensor::from_slice(&cu_seqlens, [seqs + 1]);
        let contexts = Tensor::from_slice(&vec![context as u32; seqs], [seqs]);
        let q = vec![0.1f32; seqs * queries * HEADS * HEAD_DIM];
        let q = Tensor::from_slice(&q, [seqs * queries, HEADS, HEAD_DIM]);
        let mut out = Tensor::zeros(DType::F32, q.shape().sizes());
        let (best, turn) = (Cell::new(Duration::MAX), Cell::new(0));
        criterion.bench_function(&name, |bencher| {
            bencher.iter(|| {
                let (k_cache, v_cache) = &caches[turn.get() % caches.len()];
                turn.set(turn.get() + 1);
                let start = Instant::now();
                ops.attention(AttentionArgs {
                    out: out.view_mut(),
                    q: q.view(),
                    k_cache: k_cache.view(),
                    v_cache: v_cache.view(),
                    block_tables: tables.view(),
                    cu_seqlens_q: cu_seqlens.view(),
                    context_lens: contexts.view(),
                    scale: 0.125,
                    sliding_window: None,
                    softcap: None,
                    sinks: None,
                });
                best.set(best.get().min(start.elapsed()));
            });
        });
        let seconds = best.get().as_secs_f64();
        let visible: usize = (context - queries + 1..=context).sum();
        let flops = 4 * seqs * visible * HEADS * HEAD_DIM;
        println!(
            "    best {:.3} ms: {:.1} GB/s of keys and values, {:.1} GFLOP/s, {:.0} % of the limit",
            seconds * 1e3,
            cache_bytes as f64 / seconds / 1e9,
            flops as f64 / seconds / 1e9,
            limits.seconds("bf16", cache_bytes, flops) / seconds * 100.0,
        );
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = attention
}
criterion_main!(benches);
