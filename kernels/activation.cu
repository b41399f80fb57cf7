// Gated activations: out = activation(gate) · up, element by element.
//
//   out, gate, up [num_elements], T
//
// A thread takes a chunk of sixteen bytes. The arithmetic is f32; exponentials are the hardware's,
// whose error is far below a step of T.
//
// Bound: memory, 3 · sizeof(T) bytes per element.
//
// Report: gated_* threads=256 sass=LDG.128,STG.128
#include "dtype.cuh"

struct Silu {
  __device__ static __forceinline__ float of(float x) { return x / (1.0f + __expf(-x)); }
};

// x · sigmoid(2 √(2/π) (x + 0.044715 x³)): the tanh form rearranged, which needs no tanh.
struct GeluTanh {
  __device__ static __forceinline__ float of(float x) {
    const float inner = -1.5957691f * (x + 0.044715f * x * x * x);
    return x / (1.0f + __expf(inner));
  }
};

struct Gelu {
  __device__ static __forceinline__ float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};

template <class T, class Activation>
__device__ __forceinline__ void gated(T* __restrict__ out, const T* __restrict__ gate, const T* __restrict__ up, int num_elements) {
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * CHUNK;
  if (at >= num_elements) return;
  const bool whole = can_load_chunks(out, CHUNK) && can_load_chunks(gate, CHUNK) && can_load_chunks(up, CHUNK) && at + CHUNK <= num_elements;
  float x[CHUNK], factor[CHUNK];
  load_chunk(x, gate, at, num_elements, whole);
  load_chunk(factor, up, at, num_elements, whole);
#pragma unroll
  for (int i = 0; i < CHUNK; i++) x[i] = Activation::of(x[i]) * factor[i];
  store_chunk(out, x, at, num_elements, whole);
}

#define GATED(name, T, Activation)                                                                        \
  extern "C" __global__ void gated_##name(T* out, const T* gate, const T* up, int num_elements) {         \
    gated<T, Activation>(out, gate, up, num_elements);                                                    \
  }                                                                                                       \
  SIMT_EXPORT(gated_##name)

GATED(silu_bf16, bf16, Silu)
GATED(gelu_tanh_bf16, bf16, GeluTanh)
GATED(gelu_bf16, bf16, Gelu)
GATED(silu_f16, f16, Silu)
GATED(gelu_tanh_f16, f16, GeluTanh)
GATED(gelu_f16, f16, Gelu)
