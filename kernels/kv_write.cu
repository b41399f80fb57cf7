// Keys and values of new tokens into their slots of the paged cache, in the cache's dtype.
//
//   k, v [num_tokens, num_kv_heads, head_dim], T;  slots [num_tokens]
//   caches [num_blocks, num_kv_heads, block_size, head_dim], C;  slot s is row s % block_size of
//   block s / block_size;  scales of int8 [num_blocks, num_kv_heads, block_size], f32
//
// A warp per vector of a head; blocks with y = 0 write keys, those with y = 1 values. The bits are
// those of the CPU (ops/kv_tensor.rs): int8 codes have the scale largest magnitude / 127 of their
// vector alone, so that no roundings may be merged here.
//
// Bound: memory, head_dim · (sizeof(T) + sizeof(C)) bytes per vector; a decode, latency.
//
// Report: write_kv_* threads=128
#include "dtype.cuh"
#include "reduce.cuh"

// Elements of a lane: with 32 lanes, a head of 128 in one go.
constexpr int LANE_ELEMENTS = 4;
// Adding it leaves an integer in the low bits of a float, rounded to nearest, ties to even.
constexpr float ROUNDER = 12582912.0f;
constexpr float MAX_CODE = 127.0f;

struct Int8 { uint8_t code; };

template <class T>
__device__ __forceinline__ void load_lane(float (&x)[LANE_ELEMENTS], const T* from, int at, int head_dim, bool whole) {
  if (whole) {
    const Pack<T, LANE_ELEMENTS> pack = load_pack<T, LANE_ELEMENTS>(from + at);
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; i++) x[i] = to_float(pack.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; i++) x[i] = at + i < head_dim ? to_float(from[at + i]) : 0.0f;
  }
}

template <class C>
__device__ __forceinline__ void store_lane(C* to, const Pack<C, LANE_ELEMENTS>& pack, int at, int head_dim, bool whole) {
  if (whole) {
    store_pack<C, LANE_ELEMENTS>(to + at, pack);
  } else {
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; i++)
      if (at + i < head_dim) to[at + i] = pack.x[i];
  }
}

template <class T, class C>
struct Writer {
  __device__ static __forceinline__ void write(C* to, float*, const T* from, int head_dim, bool whole) {
    for (int at = threadIdx.x * LANE_ELEMENTS; at < head_dim; at += WARP_LANES * LANE_ELEMENTS) {
      float x[LANE_ELEMENTS];
      Pack<C, LANE_ELEMENTS> pack;
      load_lane(x, from, at, head_dim, whole);
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; i++) pack.x[i] = from_float<C>(x[i]);
      store_lane(to, pack, at, head_dim, whole);
    }
  }
};

template <class T>
struct Writer<T, Int8> {
  __device__ static __forceinline__ void write(Int8* to, float* scale, const T* from, int head_dim, bool whole) {
    float x[LANE_ELEMENTS], largest = 0.0f;
    for (int at = threadIdx.x * LANE_ELEMENTS; at < head_dim; at += WARP_LANES * LANE_ELEMENTS) {
      load_lane(x, from, at, head_dim, whole);
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; i++) largest = fmaxf(largest, fabsf(x[i]));
    }
    largest = warp_max(largest);
    if (threadIdx.x == 0) *scale = __fdiv_rn(largest, MAX_CODE);
    const float inverse = largest > 0.0f ? __fdiv_rn(MAX_CODE, largest) : 0.0f;
    for (int at = threadIdx.x * LANE_ELEMENTS; at < head_dim; at += WARP_LANES * LANE_ELEMENTS) {
      Pack<Int8, LANE_ELEMENTS> pack;
      load_lane(x, from, at, head_dim, whole);
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; i++) pack.x[i].code = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), ROUNDER)) & 255;
      store_lane(to, pack, at, head_dim, whole);
    }
  }
};

struct Sizes {
  int num_vectors, num_kv_heads, head_dim, block_size;
};

template <class T, class C>
__device__ __forceinline__ void write_kv(C* k_cache, C* v_cache, float* k_scales, float* v_scales, const T* k, const T* v,
                                         const uint32_t* __restrict__ slots, const Sizes& sizes) {
  const int vector = blockIdx.x * blockDim.y + threadIdx.y;
  if (vector >= sizes.num_vectors) return;
  const bool is_key = blockIdx.y == 0;
  const int head_dim = sizes.head_dim;
  const uint32_t slot = slots[vector / sizes.num_kv_heads];
  const size_t block = slot / sizes.block_size, head = vector % sizes.num_kv_heads;
  const size_t row = (block * sizes.num_kv_heads + head) * sizes.block_size + slot % sizes.block_size;
  const T* from = (is_key ? k : v) + static_cast<size_t>(vector) * head_dim;
  C* to = (is_key ? k_cache : v_cache) + row * head_dim;
  float* scales = is_key ? k_scales : v_scales;
  const bool whole = head_dim % LANE_ELEMENTS == 0 && reinterpret_cast<uintptr_t>(from) % alignof(Pack<T, LANE_ELEMENTS>) == 0 &&
                     reinterpret_cast<uintptr_t>(to) % alignof(Pack<C, LANE_ELEMENTS>) == 0;
  Writer<T, C>::write(to, scales ? scales + row : nullptr, from, head_dim, whole);
}

#define WRITE_KV(name, T, C)                                                                                             \
  extern "C" __global__ void write_kv_##name(C* k_cache, C* v_cache, float* k_scales, float* v_scales, const T* k,       \
                                             const T* v, const uint32_t* slots, int num_vectors, int num_kv_heads,       \
                                             int head_dim, int block_size) {                                             \
    write_kv<T, C>(k_cache, v_cache, k_scales, v_scales, k, v, slots, Sizes{num_vectors, num_kv_heads, head_dim, block_size}); \
  }                                                                                                                      \
  SIMT_EXPORT(write_kv_##name)

WRITE_KV(bf16_kvbf16, bf16, bf16)
WRITE_KV(bf16_kvf16, bf16, f16)
WRITE_KV(bf16_kvfp8, bf16, fp8)
WRITE_KV(bf16_kvi8, bf16, Int8)
WRITE_KV(f16_kvbf16, f16, bf16)
WRITE_KV(f16_kvf16, f16, f16)
WRITE_KV(f16_kvfp8, f16, fp8)
WRITE_KV(f16_kvi8, f16, Int8)
