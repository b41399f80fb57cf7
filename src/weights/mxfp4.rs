//! Two schemes that store MXFP4 (see `formats::mxfp4`) in bytes of two codes, the first of which is
//! in the low half, and bytes of scales.
//!
//! - `mxfp4-pack-quantized`, as the compressed-tensors library writes and vLLM reads it: for a layer
//!   `[N, K]`, `name.weight_packed` is `[N, K / 2]` and `name.weight_scale` `[N, K / 32]`.
//! - blocks, as gpt-oss publishes its experts and transformers reads them: `name_blocks` is
//!   `[N, K / 32, 16]` and `name_scales` `[N, K / 32]`. All experts of a layer may lie in one
//!   tensor, with their number as the first axis and not in the name.

use super::Scheme;
use crate::checkpoint::{CheckpointError, TensorSource};
use crate::formats::PackedMatrix;
use crate::formats::mxfp4::{GROUP, NAN_SCALE, pack};
use crate::tensor::{DType, Tensor};

/// `mxfp4-pack-quantized`.
pub const PACKED: Scheme = Scheme {
    name: "mxfp4-pack-quantized",
    holds: |source, name| Stored::find(source, Layout::Packed, name, [0, 0]).is_some(),
    load: |source, name, shape, threads| load(source, Layout::Packed, (name, shape), threads),
};

/// Blocks.
pub const BLOCKS: Scheme = Scheme {
    name: "mxfp4 blocks",
    holds: |source, name| Stored::find(source, Layout::Blocks, name, [0, 0]).is_some(),
    load: |source, name, shape, threads| load(source, Layout::Blocks, (name, shape), threads),
};

/// What stands before an expert's number in its name.
const EXPERTS: &str = ".experts.";

/// Which of the schemes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [`PACKED`].
    Packed,
    /// [`BLOCKS`].
    Blocks,
}

/// The tensors of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Name and shape of the codes, both without the expert.
    pub codes: (String, Vec<usize>),
    /// The same of the scales.
    pub scales: (String, Vec<usize>),
    /// Where the layer lies on the first axis, if all experts share the tensors.
    pub expert: Option<usize>,
}

impl Stored {
    /// What the source has of the layer `name` (without `.weight`) of `[out_features,
    /// in_features]`; `None` when it has neither codes nor scales.
    pub fn find(
        source: &dyn TensorSource,
        layout: Layout,
        name: &str,
        shape: [usize; 2],
    ) -> Option<Stored> {
        let own = Stored::named(layout, name, shape, None);
        let stored = match layout {
            Layout::Packed => own,
            Layout::Blocks if own.is_in(source) => own,
            Layout::Blocks => {
                let (before, after) = name.split_once(EXPERTS)?;
                let (expert, after) = after.split_once('.')?;
                let name = format!("{before}{EXPERTS}{after}");
                Stored::named(layout, &name, shape, Some(expert.parse().ok()?))
            }
        };
        stored.is_in(source).then_some(stored)
    }

    fn named(layout: Layout, name: &str, [n, k]: [usize; 2], expert: Option<usize>) -> Stored {
        let groups = k.div_ceil(GROUP);
        let ([codes, scales], shape) = match layout {
            Layout::Packed => ([".weight_packed", ".weight_scale"], vec![n, k.div_ceil(2)]),
            Layout::Blocks => (["_blocks", "_scales"], vec![n, groups, GROUP / 2]),
        };
        Stored {
            codes: (format!("{name}{codes}"), shape),
            scales: (format!("{name}{scales}"), vec![n, groups]),
            expert,
        }
    }

    fn is_in(&self, source: &dyn TensorSource) -> bool {
        [&self.codes, &self.scales].iter().any(|(name, _)| source.info(name).is_some())
    }
}

fn load(
    source: &dyn TensorSource,
    layout: Layout,
    (name, shape): (&str, [usize; 2]),
    threads: usize,
) -> Result<PackedMatrix, CheckpointError> {
    let missing = || CheckpointError::MissingTensor { name: name.to_owned() };
    let stored = Stored::find(source, layout, name, shape).ok_or_else(missing)?;
    let codes = Bytes::read(source, &stored.codes, stored.expert)?;
    let scales = Bytes::read(source, &stored.scales, stored.expert)?;
    if let Some(at) = scales.all().iter().position(|&scale| scale == NAN_SCALE) {
        let (name, groups) = (stored.scales.0, scales.row_bytes);
        let place = stored.expert.into_iter().chain([at / groups, at % groups]).collect();
        let file = source.info(&name).map(|info| info.file).unwrap_or_default();
        return Err(CheckpointError::NanScale { name, place, file });
    }
    Ok(pack(shape, threads, |row| (codes.row(row), scales.row(row))))
}

/// Bytes of a layer, within a tensor that may hold those of others too.
struct Bytes {
    tensor: Tensor,
    first: usize,
    len: usize,
    row_bytes: usize,
}

impl Bytes {
    fn read(
        source: &dyn TensorSource,
        (name, shape): &(String, Vec<usize>),
        expert: Option<usize>,
    ) -> Result<Bytes, CheckpointError> {
        let info = source
            .info(name)
            .ok_or_else(|| CheckpointError::MissingTensor { name: name.clone() })?;
        // Those before and behind an expert were counted when the checkpoint was opened.
        let others = expert.map(|expert| info.shape.first().map_or(0, |&n| n.max(expert + 1)));
        let whole: Vec<usize> = others.into_iter().chain(shape.iter().copied()).collect();
        let tensor = source.tensor_of_shape(name, &whole)?;
        if tensor.dtype() != DType::U8 {
            return Err(CheckpointError::UnsupportedDType {
                name: name.clone(),
                dtype: info.dtype.to_string(),
                supported: "U8",
                file: info.file,
            });
        }
        let len = shape.iter().product();
        let row_bytes = shape[1..].iter().product();
        Ok(Bytes { tensor, first: expert.unwrap_or(0) * len, len, row_bytes })
    }

    fn all(&self) -> &[u8] {
        &self.tensor.as_slice::<u8>()[self.first..][..self.len]
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.all()[row * self.row_bytes..][..self.row_bytes]
    }
}
