//! Element types, and the Rust types that read them in place.

use std::fmt;

/// Element types that a tensor can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// The upper half of an `f32`.
    BF16,
    /// IEEE 754 half precision.
    F16,
    /// Token ids, positions, block ids and slots.
    U32,
    /// Quantized weights.
    I8,
    /// Quantized weights, packed codes.
    U8,
    /// FP8 E4M3, as the KV cache may hold it.
    Fp8,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::I8 | DType::U8 | DType::Fp8 => 1,
        }
    }

    /// Whether elements are floating-point numbers that every operation takes.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::Fp8 => "fp8",
        })
    }
}

/// The bits of an FP8 E4M3 number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Fp8(pub u8);

/// A Rust type that can be read in place from a tensor of its [`DType`].
///
/// # Safety
/// Every bit pattern of `size_of::<Self>()` bytes must be a valid value.
pub unsafe trait Element: Copy + 'static {
    /// The dtype whose elements have this type.
    const DTYPE: DType;
}

// SAFETY: any 4 bytes are a valid f32.
unsafe impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
// SAFETY: any 4 bytes are a valid u32.
unsafe impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
// SAFETY: bf16 is a transparent u16.
unsafe impl Element for half::bf16 {
    const DTYPE: DType = DType::BF16;
}
// SAFETY: f16 is a transparent u16.
unsafe impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}

// SAFETY: any byte is a valid i8.
unsafe impl Element for i8 {
    const DTYPE: DType = DType::I8;
}
// SAFETY: any byte is a valid u8.
unsafe impl Element for u8 {
    const DTYPE: DType = DType::U8;
}
// SAFETY: a transparent u8.
unsafe impl Element for Fp8 {
    const DTYPE: DType = DType::Fp8;
}
