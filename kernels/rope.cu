// Rotary embedding of queries and keys, in place.
//
//   q [num_tokens, num_heads, head_dim], k [num_tokens, num_kv_heads, head_dim], T
//   positions [num_tokens];  cos, sin [max_position, half], f32;  half = rotary_dim / 2
//
// A pair (x, y) becomes (x cos - y sin, y cos + x sin). Pairs are (i, i + half) or (2i, 2i + 1);
// what lies beyond rotary_dim stays. A block per token; a thread takes eight pairs (two loads of
// sixteen bytes) or, interleaved, four (one), and single pairs where sizes do not allow that.
//
// Bound: memory, each head read and written once; a decode is bound by latency.
//
// Report: rope_* threads=256 sass=LDG.128,STG.128
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

#define ROPE(name, T, INTERLEAVED)                                                                                        \
  extern "C" __global__ void rope_##name(T* q, T* k, const uint32_t* positions, const float* cos, const float* sin,       \
                                         int num_heads, int num_kv_heads, int head_dim, int half) {                       \
    rope<T, INTERLEAVED>(q, k, positions, cos, sin, Heads{num_heads, num_kv_heads, head_dim, half});                      \
  }                                                                                                                       \
  SIMT_EXPORT(rope_##name)

ROPE(halves_bf16, bf16, false)
ROPE(interleaved_bf16, bf16, true)
ROPE(halves_f16, f16, false)
ROPE(interleaved_f16, f16, true)
