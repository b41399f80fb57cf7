// Tensor-core products and the copies that feed them: PTX on the device, a model of one warp on
// the host.
//
// Layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16 / m16n8k32", "ldmatrix").
// With g = lane / 4 and t = lane % 4, where a pair or a quad is packed from the low bits up:
//
//   16-bit  A [16 rows, 16 k]   a[0] (g, 2t..)    a[1] (g+8, 2t..)    a[2] (g, 2t+8..)    a[3] (g+8, 2t+8..)
//           B [16 k, 8 columns] b0 (2t.., g)      b1 (2t+8.., g)
//   8-bit   A [16 rows, 32 k]   a[0] (g, 4t..)    a[1] (g+8, 4t..)    a[2] (g, 4t+16..)   a[3] (g+8, 4t+16..)
//           B [32 k, 8 columns] b0 (4t.., g)      b1 (4t+16.., g)
//   C [16 rows, 8 columns]      c[0] (g, 2t)      c[1] (g, 2t+1)      c[2] (g+8, 2t)      c[3] (g+8, 2t+1)
//
// All 32 lanes of a warp call each product and each ldmatrix together.
//
// Host model: lanes leave their registers in a staging area of their warp, the last one to come
// computes for all of them, so that a product costs one switch per lane. Sums run over k in
// ascending order in f32; tensor cores sum in an order of their own, so the last bits differ.
// Asynchronous copies happen at the wait that they must be waited for by, and until then their
// destination holds NaNs: a missing wait, or a buffer filled while it is still read, shows.
#pragma once

#include <cstdint>

#include "simt.h"

#ifndef __CUDACC__
#include <cassert>
#include <cstring>
#include <vector>

namespace mma_model {

// What the lanes of a warp bring and take away. Results outlive the barrier: the next operation
// writes them only after every lane has come again, and so has read them.
struct Warp {
  uint32_t in[32][6];
  const void* rows[32];
  uint32_t out[32][4];
  unsigned arrived = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: sixteen zeros
};

// Copies of one thread: those not yet committed, and the number of copies in each group.
struct Copies {
  std::vector<Copy> queue;
  std::vector<size_t> groups;
  size_t open = 0;
};

inline thread_local Warp warps[32];
inline thread_local Copies copies[1024];

inline unsigned flat_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

// Runs `compute` once all lanes have brought what they bring; `bring` and `take` get the lane.
template <class Bring, class Compute, class Take>
void together(Bring bring, Compute compute, Take take) {
  Warp& warp = warps[flat_thread() / 32];
  const unsigned lane = flat_thread() % 32;
  bring(warp, lane);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    compute(warp);
  }
  __syncwarp();
  take(warp, lane);
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float from_f16(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}

// Element `index` of the packed registers `x`.
template <class T>
T element(const uint32_t* x, unsigned index) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(x) + index * sizeof(T), sizeof(T));
  return value;
}

// c += A · B for fragments whose k axis holds `PER_REGISTER` elements of type T per register. A row
// of C is one vector, because this loop is where conformance spends its time.
template <class Sum, class T, unsigned PER_REGISTER, class Widen>
void multiply(Warp& warp, Widen widen) {
  typedef Sum Row __attribute__((vector_size(8 * sizeof(Sum))));
  constexpr unsigned HALF = 4 * PER_REGISTER, K = 2 * HALF;
  Sum a[16][K];
  Row b[K], c[16];
  for (unsigned lane = 0; lane < 32; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned r = 0; r < 4; r++)
      for (unsigned e = 0; e < PER_REGISTER; e++)
        a[g + r % 2 * 8][r / 2 * HALF + t * PER_REGISTER + e] = widen(element<T>(&warp.in[lane][r], e));
    for (unsigned r = 0; r < 2; r++)
      for (unsigned e = 0; e < PER_REGISTER; e++)
        b[r * HALF + t * PER_REGISTER + e][g] = widen(element<T>(&warp.in[lane][4 + r], e));
    for (unsigned h = 0; h < 2; h++) std::memcpy(reinterpret_cast<char*>(&c[g + 8 * h]) + 8 * t, &warp.out[lane][2 * h], 8);
  }
  for (unsigned m = 0; m < 16; m++) {
    Row sum = c[m];
    for (unsigned k = 0; k < K; k++) sum += a[m][k] * b[k];
    c[m] = sum;
  }
  for (unsigned lane = 0; lane < 32; lane++)
    for (unsigned h = 0; h < 2; h++) std::memcpy(&warp.out[lane][2 * h], reinterpret_cast<const char*>(&c[lane / 4 + 8 * h]) + lane % 4 * 8, 8);
}

template <class Sum, class T, unsigned PER_REGISTER, class Widen>
void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen) {
  const auto bring = [&](Warp& warp, unsigned lane) {
    const uint32_t in[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(warp.in[lane], in, sizeof in);
    std::memcpy(warp.out[lane], c, sizeof c);
  };
  const auto compute = [&](Warp& warp) { multiply<Sum, T, PER_REGISTER>(warp, widen); };
  together(bring, compute, [&](Warp& warp, unsigned lane) { std::memcpy(c, warp.out[lane], sizeof c); });
}

template <unsigned COUNT, bool TRANS>
void load_matrices(uint32_t (&x)[COUNT], const void* row) {
  const auto bring = [&](Warp& warp, unsigned lane) {
    assert(lane >= 8 * COUNT || reinterpret_cast<uintptr_t>(row) % 16 == 0);
    warp.rows[lane] = row;
  };
  const auto compute = [&](Warp& warp) {
    for (unsigned lane = 0; lane < 32; lane++)
      for (unsigned i = 0; i < COUNT; i++)
        for (unsigned e = 0; e < 2; e++) {
          const unsigned along = lane % 4 * 2 + e, across = lane / 4;
          const char* from = static_cast<const char*>(warp.rows[8 * i + (TRANS ? along : across)]);
          std::memcpy(reinterpret_cast<char*>(&warp.out[lane][i]) + 2 * e, from + 2 * (TRANS ? across : along), 2);
        }
  };
  together(bring, compute, [&](Warp& warp, unsigned lane) { std::memcpy(x, warp.out[lane], sizeof x); });
}

// Performs what was committed but for the `pending` youngest groups.
inline void finish_copies(unsigned pending) {
  Copies& mine = copies[flat_thread()];
  size_t count = 0, groups = mine.groups.size() > pending ? mine.groups.size() - pending : 0;
  for (size_t i = 0; i < groups; i++) count += mine.groups[i];
  for (size_t i = 0; i < count; i++) {
    const Copy& copy = mine.queue[i];
    if (copy.from) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
  mine.queue.erase(mine.queue.begin(), mine.queue.begin() + count);
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + groups);
}

}  // namespace mma_model
#endif

#ifdef __CUDACC__
// Shared memory has an address space of its own; its instructions take 32-bit addresses.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// c += A · B, bf16 products, f32 sums: half the instructions of m16n8k8.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_model::mma<float, uint16_t, 2>(c, a, b0, b1, mma_model::from_bf16);
#endif
}

// c += A · B, f16 products, f32 sums: f16 sums would lose what long contexts and rows need.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_model::mma<float, uint16_t, 2>(c, a, b0, b1, mma_model::from_f16);
#endif
}

// c += A · B, signed bytes, exact sums: twice the rate of 16-bit products, in any order the same bits.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_model::mma<int32_t, int8_t, 4>(c, a, b0, b1, [](int8_t x) { return int32_t(x); });
#endif
}

// Four 8 × 8 matrices of 16 bits from shared memory, in fragments' layout; lane i brings the
// address of row i % 8 of matrix i / 8 (16 bytes, aligned): one instruction for a whole A.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<4, false>(x, row);
#endif
}

// Each matrix transposed: B fragments of what lies row-major along the columns (values in attention).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<4, true>(x, row);
#endif
}

// Two matrices, addresses from lanes 0 to 15: the B of a single product.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&x)[2], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(x[0]), "=r"(x[1]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<2, false>(x, row);
#endif
}

// Two matrices, each transposed.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&x)[2], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(x[0]), "=r"(x[1]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<2, true>(x, row);
#endif
}

// Sixteen bytes from global to shared memory beside the arithmetic, without a register and past
// the first-level cache; zeros where `valid` is false, and then `from` is not read.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
#else
  auto& mine = mma_model::copies[mma_model::flat_thread()];
  assert(reinterpret_cast<uintptr_t>(to) % 16 == 0 && (!valid || reinterpret_cast<uintptr_t>(from) % 16 == 0));
  std::memset(to, 0xff, 16);
  mine.queue.push_back({to, valid ? from : nullptr});
  mine.open++;
#endif
}

// Closes this thread's group of copies: the unit that a wait counts.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  auto& mine = mma_model::copies[mma_model::flat_thread()];
  mine.groups.push_back(mine.open);
  mine.open = 0;
#endif
}

// Until all but the `PENDING` youngest groups of this thread have arrived; others' need a barrier
// on top. A kernel ends with a wait for 0.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#else
  mma_model::finish_copies(PENDING);
#endif
}
