//! Operations of a device against the referee's, on small inputs: the quick form of what
//! `tests/conformance` does.
//!
//! Inputs are rounded to what the device computes with, so that both sides read the same
//! numbers. An error is the root mean square of the differences over that of the referee's
//! results: rounding to bf16 costs about 0.002 per operation, activations in codes of eight
//! bits about 0.01, in FP8 0.03; a wrong index, mask or scale costs ten times the limit or more.

use std::fmt;

use half::bf16;
use serde::Serialize;

use super::cases;
use crate::ops::reference::ReferenceOps;
use crate::ops::{Ops, OpsError};
use crate::tensor::{DType, Shape, Tensor, View};

/// The largest error of an operation that computes.
pub(super) const COMPUTED: f64 = 0.03;
/// The largest error of a product for which a device may round activations to FP8.
pub(super) const OF_FP8: f64 = 0.06;
/// The largest error of an operation that only moves numbers, and rounds them once.
pub(super) const MOVED: f64 = 0.003;

/// How one case went.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    /// The operation.
    pub operation: &'static str,
    /// Which case of it.
    pub case: String,
    /// Relative difference from the referee.
    pub error: f64,
    /// What is allowed.
    pub limit: f64,
    /// Whether it is within the limit.
    pub passed: bool,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { operation, case, error, limit, passed } = self;
        let word = if *passed { "ok   " } else { "WRONG" };
        write!(f, "{word}  {operation:<16} {case:<44} {error:.5} of {limit}")
    }
}

/// Runs every case on a device.
pub(super) fn verify(ops: &dyn Ops) -> Result<Vec<Verdict>, OpsError> {
    let mut verdicts = Vec::new();
    for (operation, limit, run) in cases::ALL {
        let mut expected = Side::new(&ReferenceOps, ops.activation_dtype());
        let mut found = Side::new(ops, ops.activation_dtype());
        run(&mut expected)?;
        run(&mut found)?;
        ops.synchronize()?;
        let cases = expected.results.iter().zip(&found.results);
        verdicts.extend(cases.map(|((case, expected), (_, found))| {
            let error = relative_error(expected, found);
            let (case, passed) = (case.clone(), error <= *limit);
            Verdict { operation, case, error, limit: *limit, passed }
        }));
    }
    Ok(verdicts)
}

fn relative_error(expected: &[f32], found: &[f32]) -> f64 {
    assert_eq!(expected.len(), found.len(), "both sides compute as much");
    let square = |x: f32| f64::from(x) * f64::from(x);
    let total: f64 = expected.iter().map(|&x| square(x)).sum();
    let errors: f64 = expected.iter().zip(found).map(|(a, b)| square(a - b)).sum();
    let error = (errors / total.max(f64::MIN_POSITIVE)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// The device, or the referee, as a case sees it: the same random numbers, in memory of its own.
pub(super) struct Side<'a> {
    pub ops: &'a dyn Ops,
    /// To what activations are rounded.
    rounded_to: DType,
    random: u64,
    /// What was computed, by case.
    results: Vec<(String, Vec<f32>)>,
}

impl<'a> Side<'a> {
    fn new(ops: &'a dyn Ops, rounded_to: DType) -> Side<'a> {
        Side { ops, rounded_to, random: 0x9e37_79b9_7f4a_7c15, results: Vec::new() }
    }

    /// Uniform in [-1, 1), by xorshift64*.
    pub fn number(&mut self) -> f32 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let mixed = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
        (mixed >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// As many random numbers.
    pub fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.number()).collect()
    }

    /// Random activations.
    pub fn activations(&mut self, shape: impl Into<Shape>) -> Result<Tensor, OpsError> {
        let host = self.host_activations(shape);
        self.ops.place(host)
    }

    /// Random activations in the host's memory.
    pub fn host_activations(&mut self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let values = self.numbers(shape.len());
        let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        match (self.rounded_to, self.ops.activation_dtype()) {
            (DType::BF16, DType::BF16) => Tensor::from_slice(&rounded, shape),
            (DType::BF16, _) => {
                let widened: Vec<f32> = rounded.iter().map(|x| x.to_f32()).collect();
                Tensor::from_slice(&widened, shape)
            }
            _ => Tensor::from_slice(&values, shape),
        }
    }

    /// Random floats that stay f32.
    pub fn floats(&mut self, shape: impl Into<Shape>) -> Result<Tensor, OpsError> {
        let shape = shape.into();
        let values = self.numbers(shape.len());
        self.ops.place(Tensor::from_slice(&values, shape))
    }

    /// Integers.
    pub fn integers(&self, values: &[u32], shape: impl Into<Shape>) -> Result<Tensor, OpsError> {
        self.ops.place(Tensor::from_slice(values, shape))
    }

    /// Room for a result.
    pub fn room(&self, shape: impl Into<Shape>) -> Result<Tensor, OpsError> {
        self.ops.zeros(self.ops.activation_dtype(), shape.into())
    }

    /// Keeps what was computed.
    pub fn note(&mut self, case: impl Into<String>, result: &Tensor) {
        let values = self.read(result.view());
        self.results.push((case.into(), values));
    }

    /// Keeps numbers that were computed.
    pub fn note_numbers(&mut self, case: impl Into<String>, numbers: Vec<f32>) {
        self.results.push((case.into(), numbers));
    }

    fn read(&self, from: View<'_>) -> Vec<f32> {
        let mut bytes = vec![0; from.size_bytes()];
        self.ops.download(&mut bytes, from);
        match from.dtype() {
            DType::F32 => {
                let words = bytes.as_chunks::<4>().0;
                words.iter().map(|&word| f32::from_le_bytes(word)).collect()
            }
            DType::BF16 => {
                let words = bytes.as_chunks::<2>().0;
                words.iter().map(|&word| bf16::from_le_bytes(word).to_f32()).collect()
            }
            DType::U32 => {
                let words = bytes.as_chunks::<4>().0;
                words.iter().map(|&word| u32::from_le_bytes(word) as f32).collect()
            }
            other => panic!("results are f32, bf16 or u32, not {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuIsa;
    use crate::ops::cpu::{CpuOps, Isa};

    #[test]
    fn every_instruction_set_agrees_with_the_referee() {
        for isa in Isa::supported() {
            let ops = CpuOps::new(Some(1), isa.choice()).expect("it is supported");
            let verdicts = verify(&ops).expect("a CPU does not fail");
            assert!(verdicts.len() >= 250, "{} cases", verdicts.len());
            for verdict in verdicts {
                assert!(verdict.passed, "{} on {}", verdict, isa.name());
            }
        }
    }

    #[test]
    fn a_wrong_result_is_found() {
        let expected = [1.0, -2.0, 3.0, 0.5];
        assert!(relative_error(&expected, &[1.001, -2.0, 3.0, 0.5]) < MOVED);
        assert!(relative_error(&expected, &[-2.0, 1.0, 3.0, 0.5]) > COMPUTED);
        assert_eq!(relative_error(&expected, &[f32::NAN, 0.0, 0.0, 0.0]), f64::INFINITY);
    }

    #[test]
    fn both_sides_read_the_same_numbers() {
        let cpu = CpuOps::new(Some(1), CpuIsa::Scalar).expect("it is portable");
        let [a, b] = [&ReferenceOps as &dyn Ops, &cpu]
            .map(|ops| Side::new(ops, DType::BF16).activations([3, 5]).expect("it is small"));
        assert_eq!(a.as_slice::<f32>(), b.as_slice::<f32>());
        assert_eq!(bf16::from_f32(a.as_slice::<f32>()[7]).to_f32(), a.as_slice::<f32>()[7]);
    }
}
