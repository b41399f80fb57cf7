// out += x, element by element.
//
//   out, x [num_elements], T
//
// A thread takes a chunk of sixteen bytes; a sum is rounded once.
//
// Bound: memory, 3 · sizeof(T) bytes per element.
//
// Report: add_bf16 threads=256 sass=LDG.128,STG.128
#include "dtype.cuh"

extern "C" __global__ void __launch_bounds__(256) add_bf16(bf16* out, const bf16* x, int num_elements) {
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * CHUNK;
  if (at >= num_elements) return;
  const bool whole = can_load_chunks(out, CHUNK) && can_load_chunks(x, CHUNK) && at + CHUNK <= num_elements;
  float sum[CHUNK], add[CHUNK];
  load_chunk(sum, out, at, num_elements, whole);
  load_chunk(add, x, at, num_elements, whole);
#pragma unroll
  for (int i = 0; i < CHUNK; i++) sum[i] += add[i];
  store_chunk(out, sum, at, num_elements, whole);
}
SIMT_EXPORT(add_bf16)
