// Kernels with one mistake each, which the SIMT machine must find; and conversions of all values.
#include "dtype.cuh"
#include "reduce.cuh"

// The sum of a block of up to 1,024 threads; `forget` leaves a barrier out.
extern "C" __global__ void sum_i32(int* out, const int* x, int forget) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  if (!forget) __syncthreads();
  atomicAdd(&total, x[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) *out = total;
}
SIMT_EXPORT(sum_i32)

// Half of the threads do not come to the barrier, but to another one.
extern "C" __global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
SIMT_EXPORT(divergent_barrier)

// A lane waits for the others, which left through a warp's barrier of their own.
extern "C" __global__ void lonely_shuffle(int* out) {
  int x = threadIdx.x;
  if (threadIdx.x == 3) x = __shfl_xor_sync(FULL_WARP, x, 1);
  else __syncwarp();
  out[threadIdx.x] = x;
}
SIMT_EXPORT(lonely_shuffle)

// Reads the shared memory that no thread wrote.
extern "C" __global__ void unwritten_shared(float* out) {
  __shared__ float fixed[64];
  SIMT_DYN_SHARED(float, dynamic);
  if (threadIdx.x < 32) fixed[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = fixed[threadIdx.x] + 2.0f * dynamic[threadIdx.x];
}
SIMT_EXPORT(unwritten_shared)

// Writes `count` elements, of shared memory or of its output.
extern "C" __global__ void write_far(int* out, int count, int to_shared) {
  SIMT_DYN_SHARED(int, shared);
  if (to_shared) shared[count - 1] = 1;
  else out[count - 1] = 1;
}
SIMT_EXPORT(write_far)

// Halves of a warp that go separate ways, each with a mask of its own; threads that end early.
extern "C" __global__ void sound_divergence(int* out) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x >= 64) return;
  const unsigned mask = lane < 16 ? 0xffff : 0xffff0000;
  int x = threadIdx.x;
  if (lane < 16) {
    for (int by = 8; by > 0; by /= 2) x += __shfl_xor_sync(mask, x, by);
  } else {
    x = __popc(__ballot_sync(mask, lane % 4 == 0));
  }
  __syncthreads();
  out[threadIdx.x] = x;
}
SIMT_EXPORT(sound_divergence)

// out[i] = x[i] as T and back, and its bits.
template <class T>
__device__ __forceinline__ void convert(float* out, uint32_t* bits, const float* x, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const T value = from_float<T>(x[i]);
  out[i] = to_float(value);
  bits[i] = value.bits;
}
extern "C" __global__ void convert_bf16(float* out, uint32_t* bits, const float* x, int size) { convert<bf16>(out, bits, x, size); }
extern "C" __global__ void convert_f16(float* out, uint32_t* bits, const float* x, int size) { convert<f16>(out, bits, x, size); }
extern "C" __global__ void convert_fp8(float* out, uint32_t* bits, const float* x, int size) { convert<fp8>(out, bits, x, size); }
SIMT_EXPORT(convert_bf16)
SIMT_EXPORT(convert_f16)
SIMT_EXPORT(convert_fp8)
