// Sums and maxima over a warp or a block, in one fixed order: the same bits in every run.
#pragma once

#include "simt.h"

constexpr unsigned FULL_WARP = 0xffffffff;
constexpr int WARP_LANES = 32;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

struct Min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return b < a ? b : a; }
};

// Every lane gets the result. All 32 lanes call it.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, Combine combine) {
#pragma unroll
  for (int lanes = WARP_LANES / 2; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) { return warp_reduce(x, Sum()); }
__device__ __forceinline__ float warp_max(float x) { return warp_reduce(x, Max()); }

// Every thread of a block of whole warps gets the result; `identity` changes nothing. Begins with
// a barrier, so that it may be called again at once.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, Combine combine, T identity) {
  __shared__ T partial[WARP_LANES];
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned num_warps = (blockDim.x * blockDim.y * blockDim.z) / WARP_LANES;
  x = warp_reduce(x, combine);
  if (num_warps == 1) return x;
  __syncthreads();
  if (thread % WARP_LANES == 0) partial[thread / WARP_LANES] = x;
  __syncthreads();
  x = thread % WARP_LANES < num_warps ? partial[thread % WARP_LANES] : identity;
  return warp_reduce(x, combine);
}

__device__ __forceinline__ float block_sum(float x) { return block_reduce(x, Sum(), 0.0f); }
