//! Does a checkpoint hold what the description asks for?
//!
//! Compares names, shapes and element types and reports every difference at once, before
//! any weight is read. A tensor without a place in the description is a difference too: it
//! would have changed the result.

use std::collections::BTreeSet;

use super::error::{ModelError, TensorProblem};
use super::spec::ModelSpec;
use crate::checkpoint::{TensorSource, supported_dtype};
use crate::tensor::DType;

/// Buffers that old checkpoints carry and every program computes for itself.
const HARMLESS_ENDINGS: [&str; 3] =
    ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"];

/// Passes when the source has exactly the tensors of the model.
pub fn check(spec: &ModelSpec, source: &dyn TensorSource) -> Result<(), ModelError> {
    let expected = spec.expected_tensors();
    let mut problems = Vec::new();
    for tensor in &expected {
        let Some(info) = source.info(&tensor.name) else {
            problems.push(TensorProblem::Missing {
                name: tensor.name.clone(),
                expected: tensor.shape.clone(),
            });
            continue;
        };
        if info.shape != tensor.shape {
            problems.push(TensorProblem::WrongShape {
                name: tensor.name.clone(),
                expected: tensor.shape.clone(),
                found: info.shape,
                file: info.file,
            });
        } else if !matches!(
            supported_dtype(info.dtype),
            Some(DType::F32 | DType::BF16 | DType::F16)
        ) {
            problems.push(TensorProblem::WrongDType {
                name: tensor.name.clone(),
                found: info.dtype.to_string(),
                file: info.file,
            });
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
    problems.extend(extra(spec, source, &known));
    if problems.is_empty() { Ok(()) } else { Err(ModelError::Tensors { problems }) }
}

fn extra(
    spec: &ModelSpec,
    source: &dyn TensorSource,
    known: &BTreeSet<&str>,
) -> Vec<TensorProblem> {
    let unused_head = spec.lm_head.weight_name();
    let harmless = |name: &str| {
        HARMLESS_ENDINGS.iter().any(|end| name.ends_with(end)) || (spec.tied && name == unused_head)
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
