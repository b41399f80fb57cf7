// Keys and values of new tokens into their slots of the paged cache, in the cache's dtype.
//
//   k, v [num_tokens, num_kv_heads, head_dim], T;  slots [num_tokens]
//   caches [num_blocks, num_kv_heads, block_size, head_dim], C;  slot s is row s % block_size of
//   block s / block_size;  scales of int8 [num_blocks, num_kv_heads, block_size], f32
//
// A warp per vector of a head; blocks with y = 0 write keys, those with y = 1 values.
//
// Bound: memory, head_dim · (sizeof(T) + sizeof(C)) bytes per vector; a decode, latency.
//
// Report: write_kv_* threads=128
#include "kv_write.cuh"

template <class T, class C>
__device__ __forceinline__ void write_kv(const SlotWriter<C>& writer, const T* k, const T* v, const uint32_t* __restrict__ slots, int num_vectors) {
  const int vector = blockIdx.x * blockDim.y + threadIdx.y;
  if (vector >= num_vectors) return;
  const bool is_key = blockIdx.y == 0;
  const T* from = (is_key ? k : v) + static_cast<size_t>(vector) * writer.head_dim;
  writer.write(from, slots[vector / writer.num_kv_heads], vector % writer.num_kv_heads, is_key);
}

#define WRITE_KV(name, T, C)                                                                                             \
  extern "C" __global__ void write_kv_##name(C* k_cache, C* v_cache, float* k_scales, float* v_scales, const T* k,       \
                                             const T* v, const uint32_t* slots, int num_vectors, int num_kv_heads,       \
                                             int head_dim, int block_size) {                                             \
    write_kv(SlotWriter<C>{k_cache, v_cache, k_scales, v_scales, num_kv_heads, head_dim, block_size}, k, v, slots, num_vectors); \
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
