// Activations as tensor-core products of codes and of blocks want them: rows of bytes, or rows of
// elements whose length is a multiple of sixteen bytes.
//
// Layout      x [rows, k] row-major; out [rows, pitch] with zeros from k on.
// Threads     a block per row; a thread takes CHUNK neighbouring elements at a time.
// Bound       memory: x is read twice, the second time from cache.
//
// Report: quantize_rows_* sass=LDG.128
#include "dtype.cuh"
#include "reduce.cuh"
#include "simt.h"

constexpr int QUANTIZE_THREADS = 256;  // 2,048 elements at a time: a hidden size in one or two turns

// What formats::int8::quantize_row does, bit for bit: codes = round(x · 127 / max), ties to even,
// scale = max / 127. The product must not be fused with anything.
struct Int8Codes {
  typedef int8_t Code;
  float scale, inverse;
  __device__ __forceinline__ explicit Int8Codes(float largest)
      : scale(__fdiv_rn(largest, 127.f)), inverse(largest > 0.f ? __fdiv_rn(127.f, largest) : 0.f) {}
  __device__ __forceinline__ int8_t of(float x) const { return int8_t(__float2int_rn(__fmul_rn(x, inverse))); }
};

// What formats::fp8::PerRow does, bit for bit: codes = e4m3(x / scale), scale = max / 448, or 1 for
// a row of zeros.
struct Fp8Codes {
  typedef fp8 Code;
  float scale;
  __device__ __forceinline__ explicit Fp8Codes(float largest) : scale(largest > 0.f ? __fdiv_rn(largest, 448.f) : 1.f) {}
  __device__ __forceinline__ fp8 of(float x) const { return from_float<fp8>(__fdiv_rn(x, scale)); }
};

template <class Codes>
__device__ __forceinline__ void quantize_row(const bf16* x, typename Codes::Code* to, float* scale, int k, int pitch) {
  const bool whole = can_load_chunks(x, k);
  float largest = 0.f, values[CHUNK];
  for (int at = threadIdx.x * CHUNK; at < k; at += QUANTIZE_THREADS * CHUNK) {
    load_chunk(values, x, at, k, whole);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
  }
  const Codes codes(block_reduce(largest, Max(), 0.f));
  if (threadIdx.x == 0) *scale = codes.scale;
  for (int at = threadIdx.x * CHUNK; at < pitch; at += QUANTIZE_THREADS * CHUNK) {
    load_chunk(values, x, at, k, whole && at < k);
    Pack<typename Codes::Code, CHUNK> pack;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) pack.x[i] = codes.of(values[i]);
    store_pack<typename Codes::Code, CHUNK>(to + at, pack);
  }
}

#define QUANTIZE_ROWS(name, Codes)                                                                                      \
  extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)                                                        \
      quantize_rows_##name(Codes::Code* codes /* [rows, pitch] */, float* scales /* [rows] */, const bf16* x /* [rows, k] */, \
                           int k, int pitch /* a multiple of 8 */) {                                                    \
    const size_t row = blockIdx.x;                                                                                      \
    quantize_row<Codes>(x + row * k, codes + row * pitch, scales + row, k, pitch);                                      \
  }                                                                                                                     \
  SIMT_EXPORT(quantize_rows_##name)

QUANTIZE_ROWS(int8, Int8Codes)
QUANTIZE_ROWS(fp8, Fp8Codes)

// Copies rows of 16-bit elements to a larger pitch.
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    pad_rows(uint16_t* out /* [rows, pitch] */, const uint16_t* x /* [rows, k] */, int k, int pitch) {
  const size_t row = blockIdx.x;
  for (int at = threadIdx.x; at < pitch; at += QUANTIZE_THREADS) out[row * pitch + at] = at < k ? x[row * k + at] : uint16_t(0);
}
SIMT_EXPORT(pad_rows)
