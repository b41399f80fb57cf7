// A vector of a head into its slot of the paged cache, by a warp.
//
// The bits are those of the CPU (ops/kv_tensor.rs): int8 codes have the scale largest magnitude /
// 127 of their vector alone, so that no roundings may be merged here.
#pragma once

#include <cfloat>

#include "dtype.cuh"
#include "reduce.cuh"

// Elements of a lane: with 32 lanes, a head of 128 in one go.
constexpr int LANE_ELEMENTS = 4;
// Adding it leaves an integer in the low bits of a float, rounded to nearest, ties to even.
constexpr float ROUNDER = 12582912.0f;
constexpr float MAX_CODE = 127.0f;

struct Int8 { uint8_t code; };

// A warp's threads follow each other along x.
__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % WARP_LANES; }

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
    for (int at = lane_of_warp() * LANE_ELEMENTS; at < head_dim; at += WARP_LANES * LANE_ELEMENTS) {
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
    for (int at = lane_of_warp() * LANE_ELEMENTS; at < head_dim; at += WARP_LANES * LANE_ELEMENTS) {
      load_lane(x, from, at, head_dim, whole);
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; i++) largest = fmaxf(largest, fabsf(x[i]));
    }
    largest = warp_max(largest);
    if (lane_of_warp() == 0) *scale = __fdiv_rn(largest, MAX_CODE);
    // Finite even for the smallest numbers: 0 times it has to stay 0.
    const float inverse = largest > 0.0f ? fminf(__fdiv_rn(MAX_CODE, largest), FLT_MAX) : 0.0f;
    for (int at = lane_of_warp() * LANE_ELEMENTS; at < head_dim; at += WARP_LANES * LANE_ELEMENTS) {
      Pack<Int8, LANE_ELEMENTS> pack;
      load_lane(x, from, at, head_dim, whole);
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; i++) pack.x[i].code = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), ROUNDER)) & 255;
      store_lane(to, pack, at, head_dim, whole);
    }
  }
};

// Caches of one layer, in dtype C.
template <class C>
struct SlotWriter {
  C *k_cache, *v_cache;
  float *k_scales, *v_scales;
  int num_kv_heads, head_dim, block_size;

  // Key or value of a head.
  template <class T>
  __device__ __forceinline__ void write(const T* from, uint32_t slot, int head, bool is_key) const {
    const size_t row = (size_t(slot / block_size) * num_kv_heads + head) * block_size + slot % block_size;
    C* to = (is_key ? k_cache : v_cache) + row * head_dim;
    float* scales = is_key ? k_scales : v_scales;
    const bool whole = head_dim % LANE_ELEMENTS == 0 && reinterpret_cast<uintptr_t>(from) % alignof(Pack<T, LANE_ELEMENTS>) == 0 &&
                       reinterpret_cast<uintptr_t>(to) % alignof(Pack<C, LANE_ELEMENTS>) == 0;
    Writer<T, C>::write(to, scales ? scales + row : nullptr, from, head_dim, whole);
  }
};
