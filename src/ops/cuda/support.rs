//! What kernels cannot take: found while a model is opened, so that launch code never meets it.
//!
//! Every bound that a launch relies on stands here once. [`check_shape`] is asked before memory is
//! allocated, [`check_matrix`] when a weight is brought to the device; launch code asks the parts
//! that it needs again, where a refusal is a mistake of ours.

use std::fmt;

use super::launcher::DeviceFacts;
use super::matmul::are_alike;
use super::product::Kind;
use crate::formats::{Format, PackedMatrix};
use crate::ops::args::Expert;
use crate::ops::{LayerShape, OpsError, StepLimits};
use crate::tensor::DType;

/// Sixteen bytes are the least that attention copies; bytes of a cache have sixteen elements there.
const HEAD_DIM_UNIT: usize = 16;
/// The largest head that there are kernels for.
const MAX_HEAD_DIM: usize = 256;
/// Elements of a product's k, of which latents and what rotates are multiples.
const LATENT_UNIT: usize = 16;
/// The largest latent, and the largest cached vector (`MAX_RANK`, `MAX_DIM` in `attention_mla.cu`).
const MAX_RANK: usize = 512;
const MAX_LATENT: usize = 576;
/// Scales of a cache are copied four at a time.
const LEAST_BLOCK_SIZE: usize = 4;
/// Longest row of a norm: four chunks of eight elements for each of 1,024 threads (`MAX_HELD` in
/// `norm.cu`).
const MAX_NORM_WIDTH: usize = 4 * 1024 * 8;
/// Blocks of a grid along y and z.
const MAX_GRID: usize = 65_535;
/// Kernels count elements of activations in 32 bits with a sign, in whole blocks of threads.
const MAX_ELEMENTS: usize = (1 << 31) - (1 << 16);
/// Weights of as many tokens are added as integers of 64 bits (`WEIGHT_ONE` in `sample.cu`).
const MAX_VOCAB_SIZE: usize = 1 << 19;
/// Groups of this many elements have kernels of their own.
const SMALL_GROUP: usize = 32;
/// Elements of a step of k, which has one scale in larger groups.
const STEP: usize = 64;

/// Experts of a layer, which are sorted by a thread each (`SORT_THREADS` in `moe.cu`).
const MAX_EXPERTS: usize = 1024;
/// Choices of a token, which are the lanes of a warp.
const MAX_EXPERTS_PER_TOKEN: usize = 32;

/// A value that there is no kernel for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Its name in the configuration of the model or of the engine.
    field: &'static str,
    value: String,
    /// What would be right.
    needed: String,
}

impl Refusal {
    fn new(field: &'static str, value: impl fmt::Display, needed: impl fmt::Display) -> Refusal {
        Refusal { field, value: value.to_string(), needed: needed.to_string() }
    }

    /// For those who do not know what kind of device it is.
    pub(super) fn of_device(self, device: String) -> OpsError {
        let Refusal { field, value, needed } = self;
        OpsError::Unsupported { device, field, value, needed }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}: {} is needed", self.field, self.value, self.needed)
    }
}

/// Refuses unless `is_right`.
fn require(
    is_right: bool,
    field: &'static str,
    value: impl fmt::Display,
    needed: impl fmt::Display,
) -> Result<(), Refusal> {
    if is_right { Ok(()) } else { Err(Refusal::new(field, value, needed)) }
}

/// What everything below refuses beyond, for people.
pub(super) fn limits(facts: &DeviceFacts) -> String {
    let most_tokens = MAX_VOCAB_SIZE.min(facts.shared_bytes_per_block as usize / 4 * 32);
    format!(
        "heads of up to {MAX_HEAD_DIM} elements (latent ones {MAX_LATENT}), {MAX_EXPERTS} experts of \
         which {MAX_EXPERTS_PER_TOKEN} compute a token, vocabularies of {most_tokens} tokens, \
         {MAX_GRID} tokens or sequences of a step"
    )
}

/// A layer of a model, its cache, and the largest step.
pub(super) fn check_shape(
    facts: &DeviceFacts,
    limits: &StepLimits,
    layer: &LayerShape,
) -> Result<(), Refusal> {
    match layer.latent {
        None => {
            check_heads(layer.head_dim)?;
            check_cache(layer.kv_dtype, layer.block_size)?;
        }
        Some(latent) => {
            check_latents(latent.rank, latent.rope_dim)?;
            check_latent_heads(latent.nope_dim, latent.value_dim)?;
            check_latent_cache(layer.kv_dtype, layer.block_size)?;
        }
    }
    check_norm_width(layer.hidden_size)?;
    let StepLimits { num_experts, experts_per_token, .. } = *limits;
    let needed = format!("at most {MAX_EXPERTS}");
    require(num_experts <= MAX_EXPERTS, "num_experts", num_experts, needed)?;
    let needed = format!("at most {MAX_EXPERTS_PER_TOKEN}");
    let is_right = experts_per_token <= MAX_EXPERTS_PER_TOKEN;
    require(is_right, "num_experts_per_tok", experts_per_token, needed)?;
    let StepLimits { max_num_tokens, max_num_seqs, max_width, vocab_size, .. } = *limits;
    let most_tokens = MAX_GRID.min(MAX_ELEMENTS / max_width.max(1));
    let is_right = max_num_tokens <= most_tokens;
    let needed = format!("at most {most_tokens}");
    require(is_right, "--max-num-batched-tokens", max_num_tokens, needed)?;
    let is_right = max_num_seqs <= MAX_GRID;
    require(is_right, "--max-num-seqs", max_num_seqs, format!("at most {MAX_GRID}"))?;
    // A bit per token says whether it may be chosen.
    let most_bits = facts.shared_bytes_per_block as usize / 4 * 32;
    let most = MAX_VOCAB_SIZE.min(most_bits);
    require(vocab_size <= most, "vocab_size", vocab_size, format!("at most {most}"))
}

/// Heads of attention.
pub(super) fn check_heads(head_dim: usize) -> Result<(), Refusal> {
    let is_right = head_dim.is_multiple_of(HEAD_DIM_UNIT) && (1..=MAX_HEAD_DIM).contains(&head_dim);
    let needed = format!("a multiple of {HEAD_DIM_UNIT} up to {MAX_HEAD_DIM}");
    require(is_right, "head_dim", head_dim, needed)
}

/// The paged cache: positions are split by shifts.
pub(super) fn check_cache(dtype: DType, block_size: usize) -> Result<(), Refusal> {
    let has_kernels = matches!(dtype, DType::BF16 | DType::F16 | DType::Fp8 | DType::I8);
    require(has_kernels, "--kv-cache-dtype", dtype, "bf16, f16, fp8 or int8")?;
    let is_right = block_size.is_power_of_two() && block_size >= LEAST_BLOCK_SIZE;
    let needed = format!("a power of two from {LEAST_BLOCK_SIZE} on");
    require(is_right, "--block-size", block_size, needed)
}

/// Vectors of latent attention.
pub(super) fn check_latents(rank: usize, rope_dim: usize) -> Result<(), Refusal> {
    let is_right = |len: usize, most: usize| {
        len.is_multiple_of(LATENT_UNIT) && (LATENT_UNIT..=most).contains(&len)
    };
    let needed = |most: usize| format!("a multiple of {LATENT_UNIT} up to {most}");
    require(is_right(rank, MAX_RANK), "kv_lora_rank", rank, needed(MAX_RANK))?;
    let most = MAX_LATENT - rank;
    require(is_right(rope_dim, most), "qk_rope_head_dim", rope_dim, needed(most))
}

/// Heads of latent attention, whose matrices are copied sixteen bytes at a time.
fn check_latent_heads(nope_dim: usize, value_dim: usize) -> Result<(), Refusal> {
    let is_right = |len: usize| len.is_multiple_of(8);
    require(is_right(nope_dim), "qk_nope_head_dim", nope_dim, "a multiple of 8")?;
    require(is_right(value_dim), "v_head_dim", value_dim, "a multiple of 8")
}

/// The paged cache of latent attention.
pub(super) fn check_latent_cache(dtype: DType, block_size: usize) -> Result<(), Refusal> {
    let has_kernels = matches!(dtype, DType::BF16 | DType::F16);
    let needed = "bf16 or f16, for latent attention,";
    require(has_kernels, "--kv-cache-dtype", dtype, needed)?;
    check_cache(dtype, block_size)
}

/// Rows that a norm holds in registers.
pub(super) fn check_norm_width(width: usize) -> Result<(), Refusal> {
    let needed = format!("at most {MAX_NORM_WIDTH}");
    require(width <= MAX_NORM_WIDTH, "hidden_size", width, needed)
}

/// A weight as it will be multiplied, or a table as its rows will be read.
pub(super) fn check_matrix(matrix: &PackedMatrix) -> Result<(), Refusal> {
    let PackedMatrix { format, data, quantized, .. } = matrix;
    let Some(quantized) = quantized else {
        let is_right = *format == Format::Dense && data.dtype().is_float();
        let value = format!("{format:?} of {}", data.dtype());
        return require(is_right, "weight", value, "rows of bf16, f16 or f32");
    };
    let dtype = quantized.scales.dtype();
    if *format != Format::Mxfp4 {
        require(dtype.is_float(), "scales", dtype, "bf16, f16 or f32")?;
    }
    let (groups, group) = (quantized.scales.shape().sizes()[1], quantized.grid.cols);
    let is_whole_row = groups == 1;
    match format {
        Format::Dense | Format::DenseBlocks => {
            require(false, "weight", format!("{format:?} with scales"), "one without")
        }
        Format::Int8 | Format::W8A16 | Format::Fp8Rows => {
            require(is_whole_row, "group_size", group, format!("one scale per row of {format:?}"))
        }
        Format::Q8 | Format::Mxfp4 => {
            require(group == SMALL_GROUP, "group_size", group, SMALL_GROUP)
        }
        Format::Int4 | Format::Fp8 => {
            let is_small = *format == Format::Int4 && group == SMALL_GROUP;
            let is_large = group.is_power_of_two() && group >= STEP;
            let needed = match format {
                Format::Int4 => "32, or a power of two from 64 on, or a whole row",
                _ => "a power of two from 64 on, or a whole row",
            };
            require(is_whole_row || is_small || is_large, "group_size", group, needed)
        }
    }
}

/// Experts as one launch multiplies them: of one format, dense ones in whole runs of sixteen bytes.
pub(super) fn check_experts(experts: &[Expert]) -> Result<(), Refusal> {
    let Some(Expert { gate, down, .. }) = experts.first() else {
        return Err(Refusal::new("num_experts", 0, "at least one"));
    };
    let halves = experts.iter().flat_map(|expert| [&expert.gate, &expert.up]);
    let matrices = halves.map(|matrix| (gate, matrix));
    for (first, matrix) in matrices.chain(experts.iter().map(|expert| (down, &expert.down))) {
        let is_whole = Kind::of(matrix, DType::BF16).is_some();
        let needed = "a multiple of 8 (or --quantization)";
        require(is_whole, "width of an expert", matrix.num_cols, needed)?;
        let (value, needed) = (&matrix.format, &first.format);
        let needed = format!("one like the first, {needed:?},");
        require(are_alike(first, matrix), "format of an expert", format!("{value:?}"), needed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{Quantized, ScaleGrid, dense};
    use crate::ops::LatentShape;
    use crate::tensor::Tensor;

    const FACTS: DeviceFacts = DeviceFacts {
        compute_capability: (8, 6),
        multiprocessors: 82,
        shared_bytes_per_block: 99 << 10,
    };
    const LIMITS: StepLimits = StepLimits {
        max_num_tokens: 8192,
        max_num_seqs: 256,
        max_context_len: 1 << 17,
        max_width: 28_672,
        num_heads: 64,
        head_dim: 128,
        max_logit_rows: 256,
        vocab_size: 262_208,
        hidden_size: 0,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    };
    const LAYER: LayerShape = LayerShape {
        head_dim: 128,
        latent: None,
        hidden_size: 8192,
        kv_dtype: DType::BF16,
        block_size: 16,
    };

    fn refusal(limits: StepLimits, layer: LayerShape) -> String {
        check_shape(&FACTS, &limits, &layer)
            .map_or_else(|refusal| refusal.to_string(), |()| String::new())
    }

    #[test]
    fn shapes_of_large_models_are_taken() {
        assert_eq!(refusal(LIMITS, LAYER), "");
        for kv_dtype in [DType::F16, DType::Fp8, DType::I8] {
            assert_eq!(refusal(LIMITS, LayerShape { head_dim: 80, kv_dtype, ..LAYER }), "");
        }
    }

    #[test]
    fn a_refusal_names_the_field_the_value_and_what_is_right() {
        let layer = |layer| refusal(LIMITS, layer);
        assert_eq!(
            layer(LayerShape { head_dim: 20, ..LAYER }),
            "head_dim is 20: a multiple of 16 up to 256 is needed"
        );
        assert_eq!(
            layer(LayerShape { head_dim: 272, ..LAYER }),
            "head_dim is 272: a multiple of 16 up to 256 is needed"
        );
        assert_eq!(
            layer(LayerShape { kv_dtype: DType::F32, ..LAYER }),
            "--kv-cache-dtype is f32: bf16, f16, fp8 or int8 is needed"
        );
        assert_eq!(
            layer(LayerShape { block_size: 24, ..LAYER }),
            "--block-size is 24: a power of two from 4 on is needed"
        );
        assert_eq!(
            layer(LayerShape { hidden_size: 40_000, ..LAYER }),
            "hidden_size is 40000: at most 32768 is needed"
        );
        let limits = |limits| refusal(limits, LAYER);
        assert_eq!(
            limits(StepLimits { max_num_tokens: 1 << 17, ..LIMITS }),
            "--max-num-batched-tokens is 131072: at most 65535 is needed"
        );
        let wide = StepLimits { max_width: 1 << 20, ..LIMITS };
        assert_eq!(limits(wide), "--max-num-batched-tokens is 8192: at most 2047 is needed");
        assert_eq!(
            limits(StepLimits { max_num_seqs: 70_000, ..LIMITS }),
            "--max-num-seqs is 70000: at most 65535 is needed"
        );
        assert_eq!(
            limits(StepLimits { vocab_size: 1 << 20, ..LIMITS }),
            "vocab_size is 1048576: at most 524288 is needed"
        );
    }

    #[test]
    fn latents_that_no_kernel_reads_are_refused_by_name() {
        let latent = LatentShape { rank: 512, rope_dim: 64, nope_dim: 128, value_dim: 128 };
        let layer = LayerShape { head_dim: 576, latent: Some(latent), ..LAYER };
        let refused = |latent| refusal(LIMITS, LayerShape { latent: Some(latent), ..layer });
        assert_eq!(refused(latent), "");
        assert_eq!(
            refused(LatentShape { rank: 520, ..latent }),
            "kv_lora_rank is 520: a multiple of 16 up to 512 is needed"
        );
        assert_eq!(
            refused(LatentShape { rope_dim: 80, ..latent }),
            "qk_rope_head_dim is 80: a multiple of 16 up to 64 is needed"
        );
        assert_eq!(
            refused(LatentShape { nope_dim: 20, ..latent }),
            "qk_nope_head_dim is 20: a multiple of 8 is needed"
        );
        assert_eq!(
            refusal(LIMITS, LayerShape { kv_dtype: DType::I8, ..layer }),
            "--kv-cache-dtype is i8: bf16 or f16, for latent attention, is needed"
        );
    }

    /// A matrix of two blocks of rows with so many columns.
    fn matrix(format: Format, num_cols: usize, group: usize) -> PackedMatrix {
        let grid = ScaleGrid::groups(group);
        let scales = Tensor::zeros(DType::F16, grid.blocks_shape(32, num_cols));
        let data = Tensor::zeros(DType::U8, [2, 16 * num_cols]);
        let quantized = Some(Quantized { grid, scales, zero_points: None });
        PackedMatrix { format, num_rows: 32, num_cols, data, quantized }
    }

    #[test]
    fn weights_are_taken_in_groups_that_kernels_know() {
        for (format, group) in [
            (Format::Int4, 32),
            (Format::Int4, 128),
            (Format::Int4, 384),
            (Format::Fp8, 128),
            (Format::Fp8, 384),
            (Format::Q8, 32),
            (Format::Int8, 384),
            (Format::W8A16, 384),
        ] {
            assert_eq!(check_matrix(&matrix(format, 384, group)), Ok(()), "{format:?} by {group}");
        }
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            assert_eq!(check_matrix(&dense::pack(Tensor::zeros(dtype, [3, 5]))), Ok(()));
        }
    }

    #[test]
    fn weights_in_other_groups_are_refused_by_name() {
        let refused = |format, group| check_matrix(&matrix(format, 384, group)).unwrap_err();
        assert_eq!(
            refused(Format::Int4, 96).to_string(),
            "group_size is 96: 32, or a power of two from 64 on, or a whole row is needed"
        );
        assert_eq!(
            refused(Format::Fp8, 32).to_string(),
            "group_size is 32: a power of two from 64 on, or a whole row is needed"
        );
        assert_eq!(refused(Format::Q8, 64).to_string(), "group_size is 64: 32 is needed");
        assert_eq!(
            refused(Format::Int8, 128).to_string(),
            "group_size is 128: one scale per row of Int8 is needed"
        );
    }
}
