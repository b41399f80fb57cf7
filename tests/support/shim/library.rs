//! A vendor's library of dense products for the SIMT machine, whose device memory is the host's.
//!
//! It holds its callers to what cuBLASLt demands, computes in plain loops, and keeps what it was
//! asked for. Sums are f64, rounded once to f32 and then to the output's dtype.

use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use tokenmill::formats::fp8;
use tokenmill::ops::cuda::DenseProducts;
use tokenmill::tensor::{DType, View, ViewMut};

use super::memory;

/// A product that the library was asked for: dtype of the operands, rows, columns, k.
pub type Asked = (DType, [usize; 3]);

/// What the library does of what it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skill {
    /// All of it.
    Everything,
    /// It has no products of codes, and says so.
    NoCodes,
    /// It says that it has products of codes, and refuses each.
    RefusesCodes,
}

/// The library; clones share what they were asked for.
#[derive(Clone)]
pub struct HostLibrary {
    skill: Skill,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl HostLibrary {
    /// One that nobody has asked for anything.
    pub fn new(skill: Skill) -> HostLibrary {
        HostLibrary { skill, asked: Arc::default() }
    }

    /// What it was asked for since this was asked last.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl DenseProducts for HostLibrary {
    fn multiplies_codes(&self) -> bool {
        self.skill != Skill::NoCodes
    }

    fn multiply(
        &self,
        mut out: ViewMut<'_>,
        x: View<'_>,
        weight: View<'_>,
        bias: Option<View<'_>>,
    ) -> bool {
        let [rows, k, columns] = [x.size(0), x.size(1), weight.size(0)];
        let asked = (x.dtype(), [rows, columns, k]);
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
        assert_eq!((x.dtype(), k), (weight.dtype(), weight.size(1)), "operands of one kind");
        assert_eq!(out.shape().sizes(), [rows, columns], "room for results");
        if x.dtype() == DType::I8 {
            assert!(bias.is_none() && out.dtype() == DType::U32, "sums of bytes have 32 bits");
        }
        if x.dtype() == DType::Fp8 {
            check_codes(&mut out, x, weight, bias);
            if self.skill == Skill::RefusesCodes {
                return false;
            }
        }
        let [x, weight] = [x, weight].map(|operand| floats(&operand));
        let bias = bias.map(|bias| floats(&bias));
        let results = x.chunks_exact(k).flat_map(|x| {
            let bias = bias.as_deref();
            weight.chunks_exact(k).enumerate().map(move |(column, weight)| {
                let products = x.iter().zip(weight).map(|(&a, &b)| f64::from(a) * f64::from(b));
                let sum: f64 = products.sum();
                (sum + bias.map_or(0.0, |bias| f64::from(bias[column]))) as f32
            })
        });
        write(&mut out, results);
        true
    }
}

/// Products of FP8: sizes of multiples of sixteen, operands and results at sixteen bytes, a dtype
/// that holds a sum of codes, and no bias.
fn check_codes(out: &mut ViewMut<'_>, x: View<'_>, weight: View<'_>, bias: Option<View<'_>>) {
    let sizes = [weight.size(0), weight.size(1)];
    assert!(sizes.iter().all(|size| size.is_multiple_of(16)), "FP8 weights of {sizes:?}");
    let addresses = [out.address().addr(), x.address().addr(), weight.address().addr()];
    assert!(addresses.iter().all(|address| address % 16 == 0), "FP8 at {addresses:x?}");
    assert!(matches!(out.dtype(), DType::BF16 | DType::F32), "sums of codes in {}", out.dtype());
    assert!(bias.is_none(), "scales come before a bias");
}

fn floats(view: &View<'_>) -> Vec<f32> {
    let bytes = memory::bytes(view);
    let words = bytes.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
    match view.dtype() {
        DType::Fp8 => bytes.iter().map(|&code| fp8::decode(code)).collect(),
        DType::I8 => bytes.iter().map(|&code| f32::from(code.cast_signed())).collect(),
        DType::BF16 => words.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        DType::F16 => words.map(|bits| f16::from_bits(bits).to_f32()).collect(),
        DType::F32 => bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
        other => panic!("a dense product of {other}"),
    }
}

fn write(out: &mut ViewMut<'_>, results: impl Iterator<Item = f32>) {
    let bytes: Vec<u8> = match out.dtype() {
        DType::BF16 => results.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F16 => results.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::F32 => results.flat_map(f32::to_le_bytes).collect(),
        DType::U32 => results.flat_map(|x| (x as i32).to_le_bytes()).collect(),
        other => panic!("results of {other}"),
    };
    memory::bytes_mut(out).copy_from_slice(&bytes);
}
