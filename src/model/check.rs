//! Does a checkpoint hold what the description asks for?
//!
//! Compares names, shapes and element types and reports every difference at once, before
//! any weight is read. A tensor without a place in the description is a difference too: it
//! would have changed the result.

use std::collections::{BTreeMap, BTreeSet};

use super::error::{ModelError, TensorProblem};
use super::spec::ModelSpec;
use crate::checkpoint::{
    ExpectedTensor, FLOATS, TensorInfo, TensorRole, TensorSource, supported_dtype,
};
use crate::tensor::DType;
use crate::weights::mxfp4::Stored;
use crate::weights::plain::layer_name;

/// Buffers that old checkpoints carry and every program computes for itself.
const HARMLESS_ENDINGS: [&str; 3] =
    ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"];

/// Passes when the source has exactly the tensors of the model.
pub fn check(spec: &ModelSpec, source: &dyn TensorSource) -> Result<(), ModelError> {
    let expected = spec.expected_tensors();
    let mut problems = Vec::new();
    let mut coded: BTreeMap<String, Coded> = BTreeMap::new();
    for tensor in &expected {
        if let Some(stored) = stored_codes(spec, tensor, source) {
            for (name, shape) in [stored.codes, stored.scales] {
                let of_all = Coded { shape, num_experts: None };
                let most = &mut coded.entry(name).or_insert(of_all).num_experts;
                *most = (*most).max(stored.expert.map(|expert| expert + 1));
            }
            continue;
        }
        let is_float = |dtype| matches!(dtype, Some(DType::F32 | DType::BF16 | DType::F16));
        let found = source.info(&tensor.name);
        problems.extend(problem(&tensor.name, &tensor.shape, found, (is_float, FLOATS)));
    }
    for (name, Coded { shape, num_experts }) in &coded {
        let shape: Vec<usize> = num_experts.iter().chain(shape).copied().collect();
        let is_byte = |dtype| dtype == Some(DType::U8);
        problems.extend(problem(name, &shape, source.info(name), (is_byte, "U8")));
    }
    problems.extend(mixed_norms(&expected, source));
    let known = expected.iter().map(|tensor| tensor.name.as_str());
    let known: BTreeSet<&str> = known.chain(coded.keys().map(String::as_str)).collect();
    problems.extend(extra(spec, source, &known));
    if problems.is_empty() { Ok(()) } else { Err(ModelError::Tensors { problems }) }
}

/// A tensor of codes or of their scales.
struct Coded {
    /// Without an axis of experts.
    shape: Vec<usize>,
    /// The length of that axis, if there is one.
    num_experts: Option<usize>,
}

/// What stores a layer whose matrix is quantized, in the way that config.json names. Embeddings are
/// rows to be read, and nobody stores those so.
fn stored_codes(
    spec: &ModelSpec,
    tensor: &ExpectedTensor,
    source: &dyn TensorSource,
) -> Option<Stored> {
    let &[rows, cols] = tensor.shape.as_slice() else { return None };
    let may_be = tensor.role == TensorRole::Matrix && tensor.name != spec.embedding;
    if !may_be || source.info(&tensor.name).is_some() {
        return None;
    }
    Stored::find(source, spec.stored?, layer_name(&tensor.name)?, [rows, cols])
}

/// What is wrong with a tensor, if anything is.
fn problem(
    name: &str,
    shape: &[usize],
    found: Option<TensorInfo>,
    (is_right, supported): (impl Fn(Option<DType>) -> bool, &'static str),
) -> Option<TensorProblem> {
    let (name, expected) = (name.to_owned(), shape.to_vec());
    let Some(TensorInfo { dtype, shape: found, file }) = found else {
        return Some(TensorProblem::Missing { name, expected });
    };
    if found != expected {
        return Some(TensorProblem::WrongShape { name, expected, found, file });
    }
    let wrong = !is_right(supported_dtype(dtype));
    wrong.then(|| TensorProblem::WrongDType { name, found: dtype.to_string(), supported, file })
}

/// Biases of norms that have another element type than their weights: operations read both alike.
fn mixed_norms(
    expected: &[ExpectedTensor],
    source: &dyn TensorSource,
) -> impl Iterator<Item = TensorProblem> {
    let norms = expected.iter().filter(|tensor| tensor.role == TensorRole::Norm);
    norms.filter_map(|norm| {
        let name = format!("{}.bias", layer_name(&norm.name)?);
        let (weight, bias) = (source.info(&norm.name)?, source.info(&name)?);
        let (found, supported) = (bias.dtype.to_string(), "those of the norm's weight");
        let is_mixed = bias.dtype != weight.dtype;
        is_mixed.then_some(TensorProblem::WrongDType { name, found, supported, file: bias.file })
    })
}

fn extra(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    known: &BTreeSet<&str>,
) -> Vec<TensorProblem> {
    let unused_head = spec.lm_head.weight_name();
    let harmless = |name: &str| {
        HARMLESS_ENDINGS.iter().any(|end| name.ends_with(end))
            || spec.unused_prefixes.iter().any(|start| name.starts_with(start))
            || (spec.tied && name == unused_head)
    };
    let names = source.names().into_iter();
    names
        .filter(|name| !known.contains(name.as_str()) && !harmless(name))
        .filter_map(|name| {
            let info = source.info(&name)?;
            Some(TensorProblem::Extra { name, found: info.shape, file: info.file })
        })
        .collect()
}
