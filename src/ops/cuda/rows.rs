//! Row-wise operations: embedding, norms, rotary embedding, activations, gathers, cache writes.

use super::launcher::{Launch, Launcher, args};
use super::{CudaOps, by_activation, support};
use crate::formats::{Format, PackedMatrix, Quantized, ScaleGrid};
use crate::ops::args::*;
use crate::tensor::{DType, Tensor, View, ViewMut};

/// Elements of a row that a thread loads at once (`CHUNK` in `dtype.cuh`).
const CHUNK: usize = 8;
/// Threads of a warp.
const WARP: usize = 32;
/// Threads of the largest block.
const MAX_THREADS: usize = 1024;
/// Rows of a block whose rows have a warp each: four warps keep a multiprocessor's four
/// schedulers busy.
const ROWS_PER_BLOCK: usize = 4;

/// Threads of a block of an operation that goes through memory once: enough to hide its latency,
/// few enough to leave registers.
const THREADS: usize = 256;
/// Columns of a packed table that a thread reads: a word (`WORD` in `embedding.cu`).
const WORD: usize = 4;

/// The kernel that writes activations of a dtype into a cache of another one.
macro_rules! by_kv_activation {
    ($dtype:expr, $name:literal, $cache:literal) => {
        match $dtype {
            DType::BF16 => concat!($name, "_bf16_", $cache),
            DType::F16 => concat!($name, "_f16_", $cache),
            other => panic!("{}: activations of {other}", $name),
        }
    };
}

/// The same for every cache.
macro_rules! by_cache {
    ($dtype:expr, $name:literal, $cache:expr) => {
        match $cache {
            DType::BF16 => by_kv_activation!($dtype, $name, "kvbf16"),
            DType::F16 => by_kv_activation!($dtype, $name, "kvf16"),
            DType::Fp8 => by_kv_activation!($dtype, $name, "kvfp8"),
            DType::I8 => by_kv_activation!($dtype, $name, "kvi8"),
            other => panic!("a cache of {other}"),
        }
    };
}

impl<L: Launcher> CudaOps<L> {
    pub(super) fn embed_rows(&self, args: EmbedArgs<'_>) {
        let EmbedArgs { out, table, token_ids } = args;
        match (table.format, &table.quantized) {
            (Format::Dense, _) => self.gather_from(out, table.data.view(), token_ids),
            (Format::DenseBlocks, _) => self.gather_packed(out, table, token_ids, None),
            (_, Some(quantized)) => self.gather_packed(out, table, token_ids, Some(quantized)),
            (format, None) => panic!("a table in {format:?} without scales"),
        }
    }

    fn gather_packed(
        &self,
        mut out: ViewMut<'_>,
        table: &PackedMatrix,
        ids: View<'_>,
        quantized: Option<&Quantized>,
    ) {
        let dtype = out.dtype();
        let kernel = match table.format {
            Format::DenseBlocks => by_activation!(dtype, "gather_bf16_blocks"),
            Format::Int8 | Format::Q8 | Format::W8A16 => {
                by_activation!(dtype, "gather_byte_blocks")
            }
            Format::Int4 => by_activation!(dtype, "gather_nibble_blocks"),
            Format::Mxfp4 => by_activation!(dtype, "gather_mxfp4_blocks"),
            Format::Fp8 => by_activation!(dtype, "gather_fp8_blocks"),
            Format::Fp8Rows => by_activation!(dtype, "gather_fp8_rows"),
            Format::Dense => panic!("a dense table is not packed"),
        };
        let scales = quantized.map(|quantized| quantized.scales.view());
        let zeros = quantized.and_then(|quantized| quantized.zero_points.as_ref());
        let groups = scales.map_or(1, |scales| scales.size(1));
        let grid = quantized.map_or(ScaleGrid::per_row(table.num_cols), |q| q.grid);
        let scales_are_f16 = scales.is_some_and(|scales| scales.dtype() == DType::F16);
        let launch = row_launch(ids.size(0), table.num_cols.div_ceil(WORD));
        let args = args![
            &mut out,
            &table.data,
            scales,
            zeros.map(Tensor::view),
            ids,
            table.num_cols,
            table.row_bytes(),
            groups,
            grid.cols,
            u32::from(scales_are_f16),
        ];
        self.launch(kernel, launch, &args);
    }

    pub(super) fn gather(&self, args: GatherRowsArgs<'_>) {
        self.gather_from(args.out, args.x, args.rows);
    }

    /// `out[i, :] = table[ids[i], :]`, converted.
    fn gather_from(&self, mut out: ViewMut<'_>, table: View<'_>, ids: View<'_>) {
        let kernel = match table.dtype() {
            DType::F32 => by_activation!(out.dtype(), "gather_f32"),
            DType::BF16 => by_activation!(out.dtype(), "gather_bf16"),
            DType::F16 => by_activation!(out.dtype(), "gather_f16"),
            other => panic!("rows of {other}"),
        };
        let width = table.size(1);
        let launch = row_launch(ids.size(0), width.div_ceil(CHUNK));
        self.launch(kernel, launch, &args![&mut out, table, ids, width]);
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

    pub(super) fn layer_norm_rows(&self, args: LayerNormArgs<'_>) {
        let LayerNormArgs { mut out, mut residual, x, weight, bias, eps } = args;
        let kernel = match (residual.is_some(), weight.dtype()) {
            (false, DType::F32) => by_activation!(x.dtype(), "layer_norm_wf32"),
            (false, DType::BF16) => by_activation!(x.dtype(), "layer_norm_wbf16"),
            (false, DType::F16) => by_activation!(x.dtype(), "layer_norm_wf16"),
            (true, DType::F32) => by_activation!(x.dtype(), "add_layer_norm_wf32"),
            (true, DType::BF16) => by_activation!(x.dtype(), "add_layer_norm_wbf16"),
            (true, DType::F16) => by_activation!(x.dtype(), "add_layer_norm_wf16"),
            (_, other) => panic!("a norm's weight of {other}"),
        };
        let (num_rows, width) = rows_of(x);
        let launch = norm_launch(num_rows, width);
        let rest = args![x, weight, bias, num_rows, width, eps];
        match &mut residual {
            None => self.launch(kernel, launch, &[&args![&mut out][..], &rest].concat()),
            Some(sum) => self.launch(kernel, launch, &[&args![&mut out, sum][..], &rest].concat()),
        }
    }

    pub(super) fn rotate(&self, args: RopeArgs<'_>) {
        let RopeArgs { mut q, mut k, positions, cos, sin, style } = args;
        let kernel = match style {
            RopeStyle::Halves => by_activation!(q.dtype(), "rope_halves"),
            RopeStyle::Interleaved => by_activation!(q.dtype(), "rope_interleaved"),
        };
        let (num_heads, num_kv_heads) = (q.size(1), k.size(1));
        let (head_dim, half) = (q.size(2), cos.size(1));
        let pairs = (num_heads + num_kv_heads) * half;
        let launch = row_launch(positions.size(0), pairs.div_ceil(CHUNK));
        let sizes = args![num_heads, num_kv_heads, head_dim, half];
        let tensors = args![&mut q, &mut k, positions, cos, sin];
        self.launch(kernel, launch, &[&tensors[..], &sizes].concat());
    }

    pub(super) fn rotate_and_write_slots(&self, args: RopeKvArgs<'_>) {
        let RopeKvArgs { rope, v, mut k_cache, mut v_cache, slot_mapping } = args;
        let RopeArgs { mut q, mut k, positions, cos, sin, style } = rope;
        let kernel = match style {
            RopeStyle::Halves => by_cache!(q.dtype(), "rope_kv_halves", k_cache.data.dtype()),
            RopeStyle::Interleaved => {
                by_cache!(q.dtype(), "rope_kv_interleaved", k_cache.data.dtype())
            }
        };
        let (num_heads, num_kv_heads) = (q.size(1), k.size(1));
        let (head_dim, half) = (q.size(2), cos.size(1));
        // What rotates decides, and more threads than that where vectors are stored.
        let parts = ((num_heads + num_kv_heads) * half).div_ceil(CHUNK);
        let launch = row_launch(positions.size(0), parts.max(2 * num_kv_heads * WARP));
        let block_size = k_cache.size(2);
        let (k_scales, v_scales) = (k_cache.scales.as_mut(), v_cache.scales.as_mut());
        let tensors = args![&mut q, &mut k, v, positions, slot_mapping, cos, sin];
        let caches = args![&mut k_cache.data, &mut v_cache.data, k_scales, v_scales];
        let sizes = args![num_heads, num_kv_heads, head_dim, half, block_size];
        self.launch(kernel, launch, &[&tensors[..], &caches, &sizes].concat());
    }

    pub(super) fn activate(&self, args: GatedActivationArgs<'_>) {
        let GatedActivationArgs { mut out, gate, up, activation } = args;
        let kernel = match activation {
            Activation::Silu => by_activation!(gate.dtype(), "gated_silu"),
            Activation::GeluTanh => by_activation!(gate.dtype(), "gated_gelu_tanh"),
            Activation::Gelu => by_activation!(gate.dtype(), "gated_gelu"),
        };
        let num_elements = gate.shape().len();
        let launch = Launch::new(num_elements.div_ceil(THREADS * CHUNK), THREADS);
        self.launch(kernel, launch, &args![&mut out, gate, up, num_elements]);
    }

    pub(super) fn cap_elements(&self, args: SoftCapArgs<'_>) {
        let SoftCapArgs { mut x, cap } = args;
        let num_elements = x.shape().len();
        let launch = Launch::new(num_elements.div_ceil(THREADS * CHUNK), THREADS);
        self.launch("soft_cap_f32", launch, &args![&mut x, num_elements, cap]);
    }

    pub(super) fn write_slots(&self, args: WriteKvArgs<'_>) {
        let WriteKvArgs { mut k_cache, mut v_cache, k, v, slot_mapping } = args;
        let kernel = by_cache!(k.dtype(), "write_kv", k_cache.data.dtype());
        let (num_kv_heads, head_dim) = (k.size(1), k.size(2));
        let (num_vectors, block_size) = (k.size(0) * num_kv_heads, k_cache.size(2));
        let launch = Launch {
            block: [WARP as u32, ROWS_PER_BLOCK as u32, 1],
            ..Launch::new(num_vectors.div_ceil(ROWS_PER_BLOCK), WARP).by(2)
        };
        let (k_scales, v_scales) = (k_cache.scales.as_mut(), v_cache.scales.as_mut());
        let caches = args![&mut k_cache.data, &mut v_cache.data, k_scales, v_scales];
        let rest = args![k, v, slot_mapping, num_vectors, num_kv_heads, head_dim, block_size];
        self.launch(kernel, launch, &[&caches[..], &rest].concat());
    }

    pub(super) fn copy_cache_blocks(&self, args: CopyBlocksArgs<'_>) {
        for cache in std::iter::once(args.k_cache).chain(args.v_cache) {
            for mut tensor in std::iter::once(cache.data).chain(cache.scales) {
                for &(source, destination) in args.pairs {
                    let (from, to) = tensor.two_rows(source as usize, destination as usize);
                    self.launcher.copy(to, from);
                }
            }
        }
    }
}

/// A block per row; as many threads as the row has parts, up to [`THREADS`].
fn row_launch(num_rows: usize, parts: usize) -> Launch {
    Launch::new(num_rows, parts.next_multiple_of(WARP).clamp(WARP, THREADS))
}

/// Rows and width of a tensor of two axes.
fn rows_of(view: View<'_>) -> (usize, usize) {
    (view.size(0), view.size(1))
}

/// A thread per chunk of a row; rows that a warp can hold share a block.
fn norm_launch(num_rows: usize, width: usize) -> Launch {
    let checked = support::check_norm_width(width);
    assert_eq!(checked, Ok(()), "Ops::check was not asked before a step");
    let threads = width.div_ceil(CHUNK).next_multiple_of(WARP).min(MAX_THREADS);
    let rows = if threads == WARP { ROWS_PER_BLOCK } else { 1 };
    let launch = Launch::new(num_rows.div_ceil(rows), threads);
    Launch { block: [launch.block[0], rows as u32, 1], ..launch }
}
