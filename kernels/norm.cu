// RMS norm and layer norm over the last axis, alone or of a residual stream that is added to first.
//
//   x, out, residual [num_rows, width], T;  weight, bias [width], W
//
// A row is held in registers between its two passes, CHUNK elements (one load of sixteen bytes)
// at a time, so that it is read once. Short rows (a head of a query) have a warp each and several
// of them share a block; longer ones have a block. Sums are f32. The norm is that of the sum
// before it is rounded to T. A layer norm's variance is that of differences from the mean, taken
// from the registers, so that nothing cancels where the mean is large.
//
// Bound: memory, 2 (4 with a residual) · width · sizeof(T) bytes per row; a decode's few rows are
// bound by latency, hence as many threads as chunks.
//
// Report: rms_norm_* sass=LDG.128,STG.128
// Report: add_rms_norm_* sass=LDG.128,STG.128
// Report: layer_norm_* sass=LDG.128,STG.128
// Report: add_layer_norm_* sass=LDG.128,STG.128
#include "dtype.cuh"
#include "reduce.cuh"

// Chunks that a thread holds: with 1,024 threads, rows of up to 32,768 elements.
constexpr int MAX_HELD = 4;

template <class T, class W, bool ADD>
__device__ __forceinline__ void rms_norm(T* __restrict__ out, T* __restrict__ residual, const T* __restrict__ x,
                                         const W* __restrict__ weight, int num_rows, int width, float eps) {
  // Whole warps leave: rows share a block only where each has a warp, and then none waits for others.
  const int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const size_t start = static_cast<size_t>(row) * width;
  const bool whole = can_load_chunks(x, width) && can_load_chunks(out, width) && can_load_chunks(weight, width) &&
                     (!ADD || can_load_chunks(residual, width));
  const int stride = blockDim.x * CHUNK;
  float held[MAX_HELD][CHUNK];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_HELD; i++) {
    const int at = threadIdx.x * CHUNK + i * stride;
    if (at >= width) break;
    load_chunk(held[i], x + start, at, width, whole);
    if (ADD) {
      float sum[CHUNK];
      load_chunk(sum, residual + start, at, width, whole);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) held[i][e] += sum[e];
      store_chunk(residual + start, held[i], at, width, whole);
    }
#pragma unroll
    for (int e = 0; e < CHUNK; e++) squares = fmaf(held[i][e], held[i][e], squares);
  }
  squares = blockDim.x == WARP_LANES ? warp_sum(squares) : block_sum(squares);
  const float scale = 1.0f / sqrtf(squares / width + eps);
#pragma unroll
  for (int i = 0; i < MAX_HELD; i++) {
    const int at = threadIdx.x * CHUNK + i * stride;
    if (at >= width) break;
    float factor[CHUNK];
    load_chunk(factor, weight, at, width, whole);
#pragma unroll
    for (int e = 0; e < CHUNK; e++) factor[e] *= held[i][e] * scale;
    store_chunk(out + start, factor, at, width, whole);
  }
}

// `bias` may be null: there is none then.
template <class T, class W, bool ADD>
__device__ __forceinline__ void layer_norm(T* __restrict__ out, T* __restrict__ residual, const T* __restrict__ x,
                                           const W* __restrict__ weight, const W* __restrict__ bias, int num_rows, int width,
                                           float eps) {
  // As above.
  const int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const size_t start = static_cast<size_t>(row) * width;
  const bool whole = can_load_chunks(x, width) && can_load_chunks(out, width) && can_load_chunks(weight, width) &&
                     can_load_chunks(bias, width) && (!ADD || can_load_chunks(residual, width));
  const int stride = blockDim.x * CHUNK;
  const bool is_warp = blockDim.x == WARP_LANES;
  float held[MAX_HELD][CHUNK];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_HELD; i++) {
    const int at = threadIdx.x * CHUNK + i * stride;
    if (at >= width) break;
    load_chunk(held[i], x + start, at, width, whole);
    if (ADD) {
      float before[CHUNK];
      load_chunk(before, residual + start, at, width, whole);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) held[i][e] += before[e];
      store_chunk(residual + start, held[i], at, width, whole);
    }
#pragma unroll
    for (int e = 0; e < CHUNK; e++) sum += held[i][e];
  }
  const float mean = (is_warp ? warp_sum(sum) : block_sum(sum)) / width;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_HELD; i++) {
    const int at = threadIdx.x * CHUNK + i * stride;
    if (at >= width) break;
#pragma unroll
    for (int e = 0; e < CHUNK; e++) {
      // What lies beyond the end of a row is no element of it.
      held[i][e] = at + e < width ? held[i][e] - mean : 0.0f;
      squares = fmaf(held[i][e], held[i][e], squares);
    }
  }
  squares = is_warp ? warp_sum(squares) : block_sum(squares);
  const float scale = 1.0f / sqrtf(squares / width + eps);
#pragma unroll
  for (int i = 0; i < MAX_HELD; i++) {
    const int at = threadIdx.x * CHUNK + i * stride;
    if (at >= width) break;
    float factor[CHUNK];
    load_chunk(factor, weight, at, width, whole);
#pragma unroll
    for (int e = 0; e < CHUNK; e++) held[i][e] *= scale * factor[e];
    if (bias != nullptr) {
      load_chunk(factor, bias, at, width, whole);
#pragma unroll
      for (int e = 0; e < CHUNK; e++) held[i][e] += factor[e];
    }
    store_chunk(out + start, held[i], at, width, whole);
  }
}

#define NORMS(name, T, W)                                                                                             \
  extern "C" __global__ void __launch_bounds__(1024) rms_norm_##name(                                                 \
      T* out, const T* x, const W* weight, int num_rows, int width, float eps) {                                      \
    rms_norm<T, W, false>(out, nullptr, x, weight, num_rows, width, eps);                                             \
  }                                                                                                                   \
  SIMT_EXPORT(rms_norm_##name)                                                                                        \
  extern "C" __global__ void __launch_bounds__(1024) add_rms_norm_##name(                                             \
      T* out, T* residual, const T* x, const W* weight, int num_rows, int width, float eps) {                         \
    rms_norm<T, W, true>(out, residual, x, weight, num_rows, width, eps);                                             \
  }                                                                                                                   \
  SIMT_EXPORT(add_rms_norm_##name)                                                                                    \
  extern "C" __global__ void __launch_bounds__(1024) layer_norm_##name(                                               \
      T* out, const T* x, const W* weight, const W* bias, int num_rows, int width, float eps) {                       \
    layer_norm<T, W, false>(out, nullptr, x, weight, bias, num_rows, width, eps);                                     \
  }                                                                                                                   \
  SIMT_EXPORT(layer_norm_##name)                                                                                      \
  extern "C" __global__ void __launch_bounds__(1024) add_layer_norm_##name(                                           \
      T* out, T* residual, const T* x, const W* weight, const W* bias, int num_rows, int width, float eps) {          \
    layer_norm<T, W, true>(out, residual, x, weight, bias, num_rows, width, eps);                                     \
  }                                                                                                                   \
  SIMT_EXPORT(add_layer_norm_##name)

NORMS(wf32_bf16, bf16, float)
NORMS(wbf16_bf16, bf16, bf16)
NORMS(wf16_bf16, bf16, f16)
NORMS(wf32_f16, f16, float)
NORMS(wbf16_f16, f16, bf16)
NORMS(wf16_f16, f16, f16)
