// Element types of tensors, conversions, and loads of several elements at once.
//
// Conversions have the bits of Rust's `half` crate and of `formats::fp8`, in both directions: to
// nearest, ties to even; FP8 (E4M3) has no infinities and saturates at 448. On the device they
// are CUDA's own, which agree for everything but the payload of a NaN. On the host they are
// written out here.
#pragma once

#include <cstdint>

#include "simt.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

// Storage only: no arithmetic happens in these types.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct fp8 { uint8_t bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

__device__ __forceinline__ float to_float(fp8 x) {
#ifdef __CUDACC__
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
#else
  const uint32_t sign = uint32_t(x.bits & 0x80) << 24, exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
  if ((x.bits & 0x7f) == 0x7f) return __uint_as_float(sign | 0x7fc00000);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-9f;
  return __uint_as_float(sign | (exponent + 120) << 23 | mantissa << 20);
#endif
}

// What a byte of E8M0 stands for: 2^(exponent - 127), the least of which has no exponent of its own.
__device__ __forceinline__ float power_of_two(uint32_t exponent) { return __uint_as_float(exponent == 0 ? 1u << 22 : exponent << 23); }

template <class T>
struct Convert;

template <>
struct Convert<float> {
  __device__ static __forceinline__ float from(float x) { return x; }
};

template <>
struct Convert<bf16> {
  __device__ static __forceinline__ bf16 from(float x) {
#ifdef __CUDACC__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
  }
};

template <>
struct Convert<f16> {
  __device__ static __forceinline__ f16 from(float x) {
#ifdef __CUDACC__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and beyond
    if (magnitude < 0x38800000) {                                   // subnormal: a multiple of 2^-24
      // Adding 2^-1 leaves the sum's last bit worth 2^-24: the addition rounds.
      const float sum = __uint_as_float(magnitude) + 0.5f;
      return {uint16_t(sign | (__float_as_uint(sum) - 0x3f000000))};
    }
    return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
#endif
  }
};

template <>
struct Convert<fp8> {
  __device__ static __forceinline__ fp8 from(float x) {
#ifdef __CUDACC__
    return {uint8_t(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3))};
#else
    const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x43e00000) return {uint8_t(sign | 0x7e)};  // 448 and beyond
    if (magnitude < 0x3c800000) {                                // below 2^-6: a multiple of 2^-9
      const float sum = __uint_as_float(magnitude) + 0x1p14f;    // whose last bit is worth 2^-9
      return {uint8_t(sign | (__float_as_uint(sum) - 0x46800000))};
    }
    return {uint8_t(sign | (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20)};
#endif
  }
};

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return Convert<T>::from(x);
}

// N elements that lie together; loaded and stored in pieces of sixteen bytes where N elements
// have as many, else in one piece.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T x[N];
};

// Elements per thread of kernels that walk along rows: sixteen bytes of bf16.
constexpr int CHUNK = 8;

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) * N % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) * N / 16); i++)
      reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    pack = *reinterpret_cast<const Pack<T, N>*>(from);
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(T) * N % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) * N / 16); i++)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&pack)[i];
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

// Whether elements can be loaded CHUNK at a time from every row of `width` elements.
template <class T>
__device__ __forceinline__ bool can_load_chunks(const T* rows, int width) {
  constexpr size_t BYTES = alignof(Pack<T, CHUNK>);
  return reinterpret_cast<uintptr_t>(rows) % BYTES == 0 && width % CHUNK == 0;
}

// Elements at..at + CHUNK of a row as floats; zeros beyond its end. `whole` as can_load_chunks.
template <class T>
__device__ __forceinline__ void load_chunk(float (&x)[CHUNK], const T* row, int at, int width, bool whole) {
  if (whole) {
    const Pack<T, CHUNK> pack = load_pack<T, CHUNK>(row + at);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = to_float(pack.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_chunk(T* row, const float (&x)[CHUNK], int at, int width, bool whole) {
  if (whole) {
    Pack<T, CHUNK> pack;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) pack.x[i] = from_float<T>(x[i]);
    store_pack<T, CHUNK>(row + at, pack);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
      if (at + i < width) row[at + i] = from_float<T>(x[i]);
  }
}
