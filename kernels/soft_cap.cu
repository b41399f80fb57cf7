// Soft-cap of logits in place: x = cap · tanh(x / cap), element by element.
//
//   x [num_elements], float
//
// A thread takes CHUNK elements. The tanh is the accurate one: logits go to the sampler, which
// compares them.
//
// Bound: memory, 2 · sizeof(float) bytes per element.
//
// Report: soft_cap_f32 threads=256 sass=LDG.128,STG.128
#include "dtype.cuh"

extern "C" __global__ void __launch_bounds__(256) soft_cap_f32(float* x, int num_elements, float cap) {
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * CHUNK;
  if (at >= num_elements) return;
  const bool whole = can_load_chunks(x, CHUNK) && at + CHUNK <= num_elements;
  float capped[CHUNK];
  load_chunk(capped, x, at, num_elements, whole);
#pragma unroll
  for (int i = 0; i < CHUNK; i++) capped[i] = cap * tanhf(capped[i] / cap);
  store_chunk(x, capped, at, num_elements, whole);
}
SIMT_EXPORT(soft_cap_f32)
