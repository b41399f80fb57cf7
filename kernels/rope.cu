// Rotary embedding of queries and keys, in place.
//
//   q [num_tokens, num_heads, head_dim], k [num_tokens, num_kv_heads, head_dim], T
//   positions [num_tokens];  cos, sin [max_position, half], f32;  half = rotary_dim / 2
//
// A block per token.
//
// Bound: memory, each head read and written once; a decode is bound by latency.
//
// Report: rope_* threads=256 sass=LDG.128,STG.128
#include "rope.cuh"

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
