//! Which instructions the kernels use: detected once, or named by the operator.

use clap::ValueEnum;

use super::CpuError;
#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::Avx512Bf16;
use super::byte_simd::ByteKernel;
use super::scalar::Scalar;
use super::simd::Kernel;
use crate::config::CpuIsa;

/// An instruction set that this machine has. A value proves it: kernels run through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Portable code.
    Scalar(Scalar),
    /// AVX2, FMA, F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX-512 with products of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// Tiles for bf16 and int8, AVX-512 for everything else.
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
}

impl Isa {
    /// Every instruction set of this machine, best first.
    pub fn supported() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Amx::detect().map(Isa::Amx));
            found.extend(Avx512Bf16::detect().map(Isa::Avx512Bf16));
            found.extend(Avx512::detect().map(Isa::Avx512));
            found.extend(Avx2::detect().map(Isa::Avx2));
        }
        found.push(Isa::Scalar(Scalar));
        found
    }

    /// The instruction set asked for; `Auto` is the best one. An error when the machine lacks it.
    pub fn choose(wanted: CpuIsa) -> Result<Isa, CpuError> {
        let supported = Isa::supported();
        let found = supported.iter().find(|isa| wanted == CpuIsa::Auto || isa.choice() == wanted);
        found.copied().ok_or_else(|| CpuError::UnsupportedIsa {
            wanted: wanted
                .to_possible_value()
                .map(|value| value.get_name().to_owned())
                .unwrap_or_default(),
            supported: supported.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The flag value that chooses this instruction set.
    pub fn choice(self) -> CpuIsa {
        match self {
            Isa::Scalar(_) => CpuIsa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => CpuIsa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => CpuIsa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => CpuIsa::Avx512Bf16,
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(_) => CpuIsa::Amx,
        }
    }

    /// Its name in flags and logs.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar(_) => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(_) => "amx",
        }
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Scalar(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(pairs) => pairs.vectors().run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(amx) => amx.run(kernel),
        }
    }

    /// The machine's products of bf16, where dense bf16 is multiplied as such.
    #[cfg(target_arch = "x86_64")]
    pub fn pairs(self) -> Option<Avx512Bf16> {
        match self {
            Isa::Avx512Bf16(pairs) => Some(pairs),
            Isa::Amx(amx) => Some(amx.pairs()),
            Isa::Scalar(_) | Isa::Avx2(_) | Isa::Avx512(_) => None,
        }
    }

    /// Whether bf16 is multiplied as such: matrices and activations are prepared for it.
    pub fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.pairs().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// As [`Isa::run`], for products of bytes.
    pub fn run_bytes<K: ByteKernel>(self, kernel: K) {
        match self {
            Isa::Scalar(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(simd) => simd.run_bytes(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(simd) => simd.run_bytes(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(pairs) => pairs.vectors().run_bytes(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(amx) => amx.vectors().run_bytes(kernel),
        }
    }
}
