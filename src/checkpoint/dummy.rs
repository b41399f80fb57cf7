//! Random weights from shapes alone, for speed work without a download.
//!
//! The values are a function of the tensor's name, so that two runs agree. A matrix holds
//! magnitudes between 2⁻⁷ and 2⁻⁵ of either sign (standard deviation near 0.02), which
//! keeps activations finite through any number of layers; norms hold ones and biases zeros.

use std::collections::BTreeMap;

use half::{bf16, f16};

use super::{CheckpointError, ExpectedTensor, StoredDType, TensorInfo, TensorRole, TensorSource};
use crate::tensor::{DType, Tensor};

/// Generates every tensor a model expects.
pub struct DummySource {
    expected: BTreeMap<String, ExpectedTensor>,
    dtype: DType,
}

impl DummySource {
    /// Random weights of these names and shapes; panics for an integer dtype.
    pub fn new(expected: Vec<ExpectedTensor>, dtype: DType) -> DummySource {
        assert!(dtype.is_float(), "weights are floating-point");
        let expected = expected.into_iter().map(|t| (t.name.clone(), t)).collect();
        DummySource { expected, dtype }
    }
}

impl TensorSource for DummySource {
    fn names(&self) -> Vec<String> {
        self.expected.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let tensor = self.expected.get(name)?;
        let dtype = match self.dtype {
            DType::F32 => StoredDType::F32,
            DType::BF16 => StoredDType::BF16,
            DType::F16 => StoredDType::F16,
            DType::U32 | DType::I8 | DType::U8 | DType::Fp8 => {
                unreachable!("weights are floating-point")
            }
        };
        Some(TensorInfo { dtype, shape: tensor.shape.clone(), file: "random weights".to_owned() })
    }

    fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let expected = self
            .expected
            .get(name)
            .ok_or_else(|| CheckpointError::MissingTensor { name: name.to_owned() })?;
        let mut tensor = Tensor::zeros(self.dtype, expected.shape.as_slice());
        match expected.role {
            TensorRole::Bias => {}
            TensorRole::Norm => fill_ones(&mut tensor),
            TensorRole::Matrix | TensorRole::Router | TensorRole::Heads => {
                fill_random(&mut tensor, seed_of(name));
            }
        }
        Ok(tensor)
    }
}

fn fill_ones(tensor: &mut Tensor) {
    match tensor.dtype() {
        DType::F32 => tensor.as_mut_slice::<f32>().fill(1.0),
        DType::BF16 => tensor.as_mut_slice::<bf16>().fill(bf16::ONE),
        DType::F16 => tensor.as_mut_slice::<f16>().fill(f16::ONE),
        DType::U32 | DType::I8 | DType::U8 | DType::Fp8 => {
            unreachable!("weights are floating-point")
        }
    }
}

/// Random sign and mantissa under an exponent of 2⁻⁷ or 2⁻⁶: one mask per element, because
/// a real normal distribution would take longer than reading the weights from disk.
fn fill_random(tensor: &mut Tensor, seed: u64) {
    match tensor.dtype() {
        DType::F32 => fill_chunks(tensor.as_mut_slice::<f32>(), seed, |word| {
            [0, 32]
                .map(|shift| f32::from_bits(((word >> shift) as u32 & 0x80ff_ffff) | 0x3c00_0000))
        }),
        DType::BF16 => fill_chunks(tensor.as_mut_slice::<bf16>(), seed, |word| {
            let word = (word & 0x80ff_80ff_80ff_80ff) | 0x3c00_3c00_3c00_3c00;
            [0, 16, 32, 48].map(|shift| bf16::from_bits((word >> shift) as u16))
        }),
        DType::F16 => fill_chunks(tensor.as_mut_slice::<f16>(), seed, |word| {
            let word = (word & 0x87ff_87ff_87ff_87ff) | 0x2000_2000_2000_2000;
            [0, 16, 32, 48].map(|shift| f16::from_bits((word >> shift) as u16))
        }),
        DType::U32 | DType::I8 | DType::U8 | DType::Fp8 => {
            unreachable!("weights are floating-point")
        }
    }
}

/// Fills `out` with the values of successive random words, `N` to a word.
fn fill_chunks<T: Copy, const N: usize>(
    out: &mut [T],
    seed: u64,
    values_of: impl Fn(u64) -> [T; N],
) {
    let mut state = seed;
    let (chunks, rest) = out.as_chunks_mut::<N>();
    for chunk in chunks {
        *chunk = values_of(next_word(&mut state));
    }
    let last = values_of(next_word(&mut state));
    rest.copy_from_slice(&last[..rest.len()]);
}

/// One step of xorshift64 with a multiplied output (Vigna, 2014).
fn next_word(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// FNV-1a of the name, made odd because xorshift must not start at zero.
fn seed_of(name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    hash | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(dtype: DType) -> DummySource {
        let tensor = |name: &str, shape: &[usize], role| ExpectedTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            role,
        };
        let expected = vec![
            tensor("a.weight", &[301, 7], TensorRole::Matrix),
            tensor("b.weight", &[301, 7], TensorRole::Matrix),
            tensor("a.bias", &[301], TensorRole::Bias),
            tensor("norm.weight", &[7], TensorRole::Norm),
        ];
        DummySource::new(expected, dtype)
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        match tensor.dtype() {
            DType::F32 => tensor.as_slice::<f32>().to_vec(),
            DType::BF16 => tensor.as_slice::<bf16>().iter().map(|v| v.to_f32()).collect(),
            DType::F16 => tensor.as_slice::<f16>().iter().map(|v| v.to_f32()).collect(),
            _ => unreachable!("weights are floating-point"),
        }
    }

    #[test]
    fn random_weights_are_small_centred_and_depend_on_the_name_only() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let a = values(&source(dtype).tensor("a.weight").unwrap());
            let again = values(&source(dtype).tensor("a.weight").unwrap());
            let b = values(&source(dtype).tensor("b.weight").unwrap());
            assert_eq!(a, again);
            assert_ne!(a, b);
            assert!(a.iter().all(|v| (1.0 / 128.0..1.0 / 32.0).contains(&v.abs())), "{dtype}");
            let mean = a.iter().sum::<f32>() / a.len() as f32;
            let deviation = (a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32).sqrt();
            assert!(mean.abs() < 2e-3, "{dtype}: mean {mean}");
            assert!((0.015..0.025).contains(&deviation), "{dtype}: deviation {deviation}");
        }
    }

    #[test]
    fn norms_are_ones_and_biases_zeros() {
        let source = source(DType::BF16);
        assert_eq!(values(&source.tensor("norm.weight").unwrap()), [1.0; 7]);
        assert_eq!(values(&source.tensor("a.bias").unwrap()), [0.0; 301]);
    }

    #[test]
    fn an_unexpected_name_is_an_error() {
        let error = source(DType::F32).tensor("c.weight").unwrap_err();
        assert_eq!(error.to_string(), "the checkpoint has no tensor c.weight");
    }
}
