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
template <class T>
__device__ __forceinline__ void quantize_row(const T* x, int8_t* codes, float* scale, int k, int pitch) {
  const bool whole = can_load_chunks(x, k);
  float largest = 0.f, values[CHUNK];
  for (int at = threadIdx.x * CHUNK; at < k; at += QUANTIZE_THREADS * CHUNK) {
    load_chunk(values, x, at, k, whole);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
  }
  largest = block_reduce(largest, Max(), 0.f);
  const float inverse = largest > 0.f ? __fdiv_rn(127.f, largest) : 0.f;
  if (threadIdx.x == 0) *scale = __fdiv_rn(largest, 127.f);
  for (int at = threadIdx.x * CHUNK; at < pitch; at += QUANTIZE_THREADS * CHUNK) {
    load_chunk(values, x, at, k, whole && at < k);
    Pack<int8_t, CHUNK> pack;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) pack.x[i] = int8_t(__float2int_rn(__fmul_rn(values[i], inverse)));
    store_pack<int8_t, CHUNK>(codes + at, pack);
  }
}

#define QUANTIZE_ROWS(T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)                                                   \
      quantize_rows_##T(int8_t* codes /* [rows, pitch] */, float* scales /* [rows] */, const T* x /* [rows, k] */, \
                        int k, int pitch /* a multiple of 8 */) {                                                  \
    const size_t row = blockIdx.x;                                                                                 \
    quantize_row(x + row * k, codes + row * pitch, scales + row, k, pitch);                                        \
  }                                                                                                                \
  SIMT_EXPORT(quantize_rows_##T)

QUANTIZE_ROWS(bf16)
QUANTIZE_ROWS(f16)

// Copies rows of 16-bit elements to a larger pitch.
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    pad_rows(uint16_t* out /* [rows, pitch] */, const uint16_t* x /* [rows, k] */, int k, int pitch) {
  const size_t row = blockIdx.x;
  for (int at = threadIdx.x; at < pitch; at += QUANTIZE_THREADS) out[row * pitch + at] = at < k ? x[row * k + at] : uint16_t(0);
}
SIMT_EXPORT(pad_rows)
