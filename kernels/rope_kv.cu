// Rotary embedding of queries and keys, in place, then keys and values into their slots of the
// paged cache: rope.cu and kv_write.cu in one launch, with their bits.
//
//   q [num_tokens, num_heads, head_dim], k, v [num_tokens, num_kv_heads, head_dim], T
//   positions, slots [num_tokens];  cos, sin [max_position, half], f32;  half = rotary_dim / 2
//   caches [num_blocks, num_kv_heads, block_size, head_dim], C;  scales of int8 [num_blocks,
//   num_kv_heads, block_size], f32
//
// A block per token. Its threads rotate; then a warp stores a vector of a head at a time.
//
// Bound: memory, each head read and written once, keys read again from the cache of the GPU; a
// decode is bound by latency, to which a second launch would add.
//
// Report: rope_kv_* threads=256 sass=LDG.128,STG.128
#include "kv_write.cuh"
#include "rope.cuh"

template <class T, bool INTERLEAVED, class C>
__device__ __forceinline__ void rope_kv(T* q, T* k, const T* v, const uint32_t* positions, const uint32_t* slots, const float* cos,
                                        const float* sin, const SlotWriter<C>& writer, const Heads& heads) {
  rope<T, INTERLEAVED>(q, k, positions, cos, sin, heads);
  __syncthreads();
  const size_t token = blockIdx.x;
  const uint32_t slot = slots[token];
  for (int vector = threadIdx.x / WARP_LANES; vector < 2 * heads.num_kv_heads; vector += blockDim.x / WARP_LANES) {
    const bool is_key = vector < heads.num_kv_heads;
    const int head = is_key ? vector : vector - heads.num_kv_heads;
    writer.write((is_key ? k : v) + (token * heads.num_kv_heads + head) * heads.head_dim, slot, head, is_key);
  }
}

#define ROPE_KV(name, T, INTERLEAVED, C)                                                                                       \
  extern "C" __global__ void rope_kv_##name(T* q, T* k, const T* v, const uint32_t* positions, const uint32_t* slots,          \
                                            const float* cos, const float* sin, C* k_cache, C* v_cache, float* k_scales,       \
                                            float* v_scales, int num_heads, int num_kv_heads, int head_dim, int half,          \
                                            int block_size) {                                                                  \
    const SlotWriter<C> writer{k_cache, v_cache, k_scales, v_scales, num_kv_heads, head_dim, block_size};                      \
    rope_kv<T, INTERLEAVED>(q, k, v, positions, slots, cos, sin, writer, Heads{num_heads, num_kv_heads, head_dim, half});      \
  }                                                                                                                            \
  SIMT_EXPORT(rope_kv_##name)

#define ROPE_KV_CACHES(name, T, INTERLEAVED)          \
  ROPE_KV(name##_kvbf16, T, INTERLEAVED, bf16)        \
  ROPE_KV(name##_kvf16, T, INTERLEAVED, f16)          \
  ROPE_KV(name##_kvfp8, T, INTERLEAVED, fp8)          \
  ROPE_KV(name##_kvi8, T, INTERLEAVED, Int8)

ROPE_KV_CACHES(halves_bf16, bf16, false)
ROPE_KV_CACHES(interleaved_bf16, bf16, true)
ROPE_KV_CACHES(halves_f16, f16, false)
ROPE_KV_CACHES(interleaved_f16, f16, true)
