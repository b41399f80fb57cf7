// One source, two compilers. Under nvcc this is nearly empty; under a C++ compiler it is the
// vocabulary of CUDA on a SIMT machine (simt_machine.h) that runs a kernel on one CPU thread:
// every CUDA thread is a fiber, the order in which they run is random, and what a GPU would
// leave undefined (a barrier that not all threads reach, a shuffle from a lane that is not
// there, shared memory that nobody wrote) is an error or a NaN instead of luck.
//
//   kernel       extern "C" __global__ void name(...) { ... }   then   SIMT_EXPORT(name)
//   shared       __shared__ T x[N];   or, sized at launch, once per kernel:   SIMT_DYN_SHARED(T, x);
//   parameters   pointers, float, and integers of 4 or 8 bytes
//
// Blocks of a grid run one after the other, also in random order.
#pragma once

#ifdef __CUDACC__

#include <cstdint>
#include <cuda_runtime.h>

#define SIMT_DYN_SHARED(T, name)                            \
  extern __shared__ __align__(128) unsigned char simt_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(simt_dynamic_shared)
#define SIMT_EXPORT(kernel)

#else

#include "simt_machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// A library runs one block at a time, so static storage is the block's own storage.
#define __shared__ static
#define SIMT_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::machine().dynamic_shared())

// Makes a kernel known to the launcher.
#define SIMT_EXPORT(kernel) static const bool simt_exported_##kernel = simt::publish<kernel>(#kernel);

#define threadIdx (simt::machine().current->thread)
#define blockIdx (simt::machine().block)
#define blockDim (simt::machine().block_size)
#define gridDim (simt::machine().grid_size)
constexpr int warpSize = 32;

#include "simt_intrinsics.h"

#endif
