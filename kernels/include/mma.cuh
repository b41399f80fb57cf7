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
// Host model: the last lane to come computes for all of them (Machine::together), so that a product
// costs one switch per lane. Sums run over k in ascending order in f32; tensor cores sum in an order
// of their own, so the last bits differ. Asynchronous copies happen at the wait that they must be
// waited for by, and until then their destination holds NaNs: a missing wait, or a buffer filled
// while it is still read, shows.
#pragma once

#include <cstdint>

#include "simt.h"

#ifndef __CUDACC__
#include <cstring>
#include <vector>

namespace mma_model {

constexpr uint32_t ALL_LANES = ~0u;

// What a lane brings to a product, and what it takes away.
struct Product {
  uint32_t a[4], b[2], c[4];
};

// The same of ldmatrix.
struct Rows {
  const char* row;
  uint32_t x[4];
};

struct Copy {
  void* to;
  const void* from;  // null: sixteen zeros
};

// Copies of one thread, and how many each committed group has; the rest is not committed yet.
struct Copies {
  std::vector<Copy> queue;
  std::vector<size_t> groups;
  size_t num_committed = 0;
};

// Of every thread of the block that runs; a block that ends has waited for all of its copies. As
// the machine itself: in .data, because .bss is shared memory and gets poisoned.
inline Copies* copies_of_this_library = reinterpret_cast<Copies*>(1);

inline Copies& my_copies() {
  if (reinterpret_cast<uintptr_t>(copies_of_this_library) == 1) copies_of_this_library = new Copies[simt::MAX_THREADS];
  return copies_of_this_library[simt::machine().current->flat];
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

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

// Element `index` of a packed register.
template <class T>
T element(uint32_t x, unsigned index) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&x) + index * sizeof(T), sizeof(T));
  return value;
}

// c += A · B for fragments whose k axis holds `PER_REGISTER` elements of type T per register. A row
// of C is one vector, because this loop is where conformance spends its time.
template <class Sum, class T, unsigned PER_REGISTER, class Widen>
void multiply(Product* const* lanes, Widen widen) {
  typedef Sum Row __attribute__((vector_size(8 * sizeof(Sum))));
  constexpr unsigned HALF = 4 * PER_REGISTER, K = 2 * HALF;
  Sum a[16][K];
  Row b[K], c[16];
  for (unsigned lane = 0; lane < 32; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned r = 0; r < 4; r++)
      for (unsigned e = 0; e < PER_REGISTER; e++)
        a[g + r % 2 * 8][r / 2 * HALF + t * PER_REGISTER + e] = widen(element<T>(lanes[lane]->a[r], e));
    for (unsigned r = 0; r < 2; r++)
      for (unsigned e = 0; e < PER_REGISTER; e++)
        b[r * HALF + t * PER_REGISTER + e][g] = widen(element<T>(lanes[lane]->b[r], e));
    for (unsigned h = 0; h < 2; h++) std::memcpy(reinterpret_cast<char*>(&c[g + 8 * h]) + 8 * t, &lanes[lane]->c[2 * h], 8);
  }
  for (unsigned m = 0; m < 16; m++) {
    Row sum = c[m];
    for (unsigned k = 0; k < K; k++) sum += a[m][k] * b[k];
    c[m] = sum;
  }
  for (unsigned lane = 0; lane < 32; lane++)
    for (unsigned h = 0; h < 2; h++)
      std::memcpy(&lanes[lane]->c[2 * h], reinterpret_cast<const char*>(&c[lane / 4 + 8 * h]) + lane % 4 * 8, 8);
}

// Not inlined, nor are the others: kernels call them from many places, and compile time adds up.
template <class Sum, class T, unsigned PER_REGISTER, class Widen>
__attribute__((noinline)) void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen, simt::Site site) {
  Product mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  std::memcpy(mine.c, c, sizeof c);
  simt::machine().together(ALL_LANES, site, mine, [&](Product* const* lanes) { multiply<Sum, T, PER_REGISTER>(lanes, widen); });
  std::memcpy(c, mine.c, sizeof c);
}

template <unsigned COUNT, bool TRANS>
__attribute__((noinline)) void load_matrices(uint32_t (&x)[COUNT], const void* row, simt::Site site) {
  Rows mine{static_cast<const char*>(row), {}};
  if (simt::machine().current->lane() < 8 * COUNT && !is_aligned(row)) simt::machine().fail_at(site, "a row of a matrix is not aligned");
  simt::machine().together(ALL_LANES, site, mine, [](Rows* const* lanes) {
    for (unsigned lane = 0; lane < 32; lane++)
      for (unsigned i = 0; i < COUNT; i++)
        for (unsigned e = 0; e < 2; e++) {
          const unsigned along = lane % 4 * 2 + e, across = lane / 4;
          const char* from = lanes[8 * i + (TRANS ? along : across)]->row + 2 * (TRANS ? across : along);
          std::memcpy(reinterpret_cast<char*>(&lanes[lane]->x[i]) + 2 * e, from, 2);
        }
  });
  std::memcpy(x, mine.x, sizeof x);
}

__attribute__((noinline)) inline void start_copy(void* to, const void* from, simt::Site site) {
  if (!is_aligned(to) || !is_aligned(from)) simt::machine().fail_at(site, "sixteen bytes are not aligned");
  std::memset(to, simt::POISON, 16);
  my_copies().queue.push_back({to, from});
}

__attribute__((noinline)) inline void commit_copies() {
  Copies& mine = my_copies();
  mine.groups.push_back(mine.queue.size() - mine.num_committed);
  mine.num_committed = mine.queue.size();
}

// Performs what was committed but for the `pending` youngest groups.
__attribute__((noinline)) inline void finish_copies(unsigned pending) {
  Copies& mine = my_copies();
  if (mine.groups.size() <= pending) return;
  size_t count = 0;
  const size_t num_groups = mine.groups.size() - pending;
  for (size_t i = 0; i < num_groups; i++) count += mine.groups[i];
  for (size_t i = 0; i < count; i++) {
    const Copy& copy = mine.queue[i];
    if (copy.from) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
  mine.queue.erase(mine.queue.begin(), mine.queue.begin() + count);
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + num_groups);
  mine.num_committed -= count;
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
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_model::mma<float, uint16_t, 2>(c, a, b0, b1, mma_model::from_bf16, {"mma_bf16", __FILE__, __LINE__});
#endif
}

// c += A · B, f16 products, f32 sums: f16 sums would lose what long contexts and rows need.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_model::mma<float, uint16_t, 2>(c, a, b0, b1, mma_model::from_f16, {"mma_f16", __FILE__, __LINE__});
#endif
}

// c += A · B, signed bytes, exact sums: twice the rate of 16-bit products, in any order the same bits.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_model::mma<int32_t, int8_t, 4>(c, a, b0, b1, [](int8_t x) { return int32_t(x); }, {"mma_s8", __FILE__, __LINE__});
#endif
}

// Four 8 × 8 matrices of 16 bits from shared memory, in fragments' layout; lane i brings the
// address of row i % 8 of matrix i / 8 (16 bytes, aligned): one instruction for a whole A.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<4, false>(x, row, {"ldmatrix_x4", __FILE__, __LINE__});
#endif
}

// Each matrix transposed: B fragments of what lies row-major along the columns (values in attention).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<4, true>(x, row, {"ldmatrix_x4_trans", __FILE__, __LINE__});
#endif
}

// Two matrices, addresses from lanes 0 to 15: the B of a single product.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&x)[2], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(x[0]), "=r"(x[1]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<2, false>(x, row, {"ldmatrix_x2", __FILE__, __LINE__});
#endif
}

// Two matrices, each transposed.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&x)[2], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(x[0]), "=r"(x[1]) : "r"(shared_address(row)) : "memory");
#else
  mma_model::load_matrices<2, true>(x, row, {"ldmatrix_x2_trans", __FILE__, __LINE__});
#endif
}

// Sixteen bytes from global to shared memory beside the arithmetic, without a register and past
// the first-level cache; zeros where `valid` is false, and then `from` is not read.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
#else
  mma_model::start_copy(to, valid ? from : nullptr, {"cp_async_16", __FILE__, __LINE__});
#endif
}

// Closes this thread's group of copies: the unit that a wait counts.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  mma_model::commit_copies();
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
