//! Row-wise operations: embedding, norms, rotary embedding, activations, gathers, cache writes.

use super::launcher::{Launch, Launcher, args};
use super::{CudaOps, by_activation};
use crate::ops::args::*;
use crate::tensor::{DType, View};

/// Elements of a row that a thread loads at once (`CHUNK` in `dtype.cuh`).
const CHUNK: usize = 8;
/// Threads of a warp.
const WARP: usize = 32;
/// Threads of the largest block.
const MAX_THREADS: usize = 1024;
/// Rows of a block whose rows have a warp each: four warps keep a multiprocessor's four
/// schedulers busy.
const ROWS_PER_BLOCK: usize = 4;
/// Longest row of a norm (`MAX_HELD` in `norm.cu`).
const MAX_NORM_WIDTH: usize = 4 * MAX_THREADS * CHUNK;

impl<L: Launcher> CudaOps<L> {
    pub(super) fn embed_rows(&self, _: EmbedArgs<'_>) {
        panic!("no CUDA kernel yet for embed");
    }

    pub(super) fn norm_rows(&self, args: NormArgs<'_>) {
        let NormArgs { mut out, x, weight, eps } = args;
        let kernel = match weight.dtype() {
            DType::F32 => by_activation!(x.dtype(), "rms_norm_wf32"),
            DType::BF16 => by_activation!(x.dtype(), "rms_norm_wbf16"),
            DType::F16 => by_activation!(x.dtype(), "rms_norm_wf16"),
            other => panic!("a norm's weight of {other}"),
        };
        let (num_rows, width) = rows_of(x);
        let args = args![&mut out, x, weight, num_rows, width, eps];
        self.launch(kernel, norm_launch(num_rows, width), &args);
    }

    pub(super) fn add_norm_rows(&self, args: AddNormArgs<'_>) {
        let AddNormArgs { mut out, mut residual, x, weight, eps } = args;
        let kernel = match weight.dtype() {
            DType::F32 => by_activation!(x.dtype(), "add_rms_norm_wf32"),
            DType::BF16 => by_activation!(x.dtype(), "add_rms_norm_wbf16"),
            DType::F16 => by_activation!(x.dtype(), "add_rms_norm_wf16"),
            other => panic!("a norm's weight of {other}"),
        };
        let (num_rows, width) = rows_of(x);
        let args = args![&mut out, &mut residual, x, weight, num_rows, width, eps];
        self.launch(kernel, norm_launch(num_rows, width), &args);
    }

    pub(super) fn rotate(&self, _: RopeArgs<'_>) {
        panic!("no CUDA kernel yet for rope");
    }

    pub(super) fn activate(&self, _: GatedActivationArgs<'_>) {
        panic!("no CUDA kernel yet for gated_activation");
    }

    pub(super) fn write_slots(&self, _: WriteKvArgs<'_>) {
        panic!("no CUDA kernel yet for write_kv");
    }

    pub(super) fn gather(&self, _: GatherRowsArgs<'_>) {
        panic!("no CUDA kernel yet for gather_rows");
    }

    pub(super) fn copy_cache_blocks(&self, _: CopyBlocksArgs<'_>) {
        panic!("no CUDA kernel yet for copy_blocks");
    }
}

/// Rows and width of a tensor of two axes.
fn rows_of(view: View<'_>) -> (usize, usize) {
    (view.size(0), view.size(1))
}

/// A thread per chunk of a row; rows that a warp can hold share a block.
fn norm_launch(num_rows: usize, width: usize) -> Launch {
    assert!(width <= MAX_NORM_WIDTH, "a norm over {width} elements, at most {MAX_NORM_WIDTH}");
    let threads = width.div_ceil(CHUNK).next_multiple_of(WARP).min(MAX_THREADS);
    let rows = if threads == WARP { ROWS_PER_BLOCK } else { 1 };
    let launch = Launch::new(num_rows.div_ceil(rows), threads);
    Launch { block: [launch.block[0], rows as u32, 1], ..launch }
}
