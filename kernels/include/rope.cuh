// Rotary embedding of one token's queries and keys by a block of threads.
//
// A pair (x, y) becomes (x cos - y sin, y cos + x sin). Pairs are (i, i + half) or (2i, 2i + 1);
// what lies beyond rotary_dim stays. A thread takes eight pairs (two loads of sixteen bytes) or,
// interleaved, four (one), and single pairs where sizes do not allow that.
#pragma once

#include "dtype.cuh"

struct Heads {
  int num_heads, num_kv_heads, head_dim, half;
};

__device__ __forceinline__ void turn(float& x, float& y, float cos, float sin) {
  const float rotated = x * cos - y * sin;
  y = y * cos + x * sin;
  x = rotated;
}

// A head of this block's token: those of q first, then those of k.
template <class T>
__device__ __forceinline__ T* head_of(T* q, T* k, int head, const Heads& heads) {
  const size_t token = blockIdx.x;
  return head < heads.num_heads ? q + (token * heads.num_heads + head) * heads.head_dim
                                : k + (token * heads.num_kv_heads + head - heads.num_heads) * heads.head_dim;
}

// PAIRS pairs per thread and turn.
template <class T, bool INTERLEAVED, int PAIRS>
__device__ __forceinline__ void rotate(T* q, T* k, const float* cos, const float* sin, const Heads& heads) {
  const int units = heads.half / PAIRS, total = units * (heads.num_heads + heads.num_kv_heads);
  for (int unit = threadIdx.x; unit < total; unit += blockDim.x) {
    T* head = head_of(q, k, unit / units, heads);
    const int at = unit % units * PAIRS;
    const Pack<float, PAIRS> c = load_pack<float, PAIRS>(cos + at), s = load_pack<float, PAIRS>(sin + at);
    if constexpr (INTERLEAVED) {
      Pack<T, 2 * PAIRS> pairs = load_pack<T, 2 * PAIRS>(head + 2 * at);
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        float x = to_float(pairs.x[2 * i]), y = to_float(pairs.x[2 * i + 1]);
        turn(x, y, c.x[i], s.x[i]);
        pairs.x[2 * i] = from_float<T>(x), pairs.x[2 * i + 1] = from_float<T>(y);
      }
      store_pack<T, 2 * PAIRS>(head + 2 * at, pairs);
    } else {
      Pack<T, PAIRS> low = load_pack<T, PAIRS>(head + at), high = load_pack<T, PAIRS>(head + at + heads.half);
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        float x = to_float(low.x[i]), y = to_float(high.x[i]);
        turn(x, y, c.x[i], s.x[i]);
        low.x[i] = from_float<T>(x), high.x[i] = from_float<T>(y);
      }
      store_pack<T, PAIRS>(head + at, low);
      store_pack<T, PAIRS>(head + at + heads.half, high);
    }
  }
}

template <class T, bool INTERLEAVED>
__device__ __forceinline__ void rope(T* q, T* k, const uint32_t* positions, const float* cos, const float* sin, const Heads& heads) {
  // A thread's elements are one load of sixteen bytes, two where halves are apart.
  constexpr int PAIRS = INTERLEAVED ? CHUNK / 2 : CHUNK;
  const size_t angles = static_cast<size_t>(positions[blockIdx.x]) * heads.half;
  const bool whole = can_load_chunks(q, heads.head_dim) && can_load_chunks(k, heads.head_dim) && heads.half % PAIRS == 0 &&
                     (reinterpret_cast<uintptr_t>(cos) | reinterpret_cast<uintptr_t>(sin)) % 16 == 0;
  if (whole) rotate<T, INTERLEAVED, PAIRS>(q, k, cos + angles, sin + angles, heads);
  else rotate<T, INTERLEAVED, 1>(q, k, cos + angles, sin + angles, heads);
}
