// CUDA's functions on the SIMT machine: barriers, shuffles, votes, atomics, arithmetic.
//
// Semantics are those of the CUDA C++ Programming Guide for compute capability 8.0. Where the
// guide says "undefined", the machine fails the launch or answers with a NaN.
//
// Included by simt.h only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMT_SITE(name) simt::Site{name, file, line}
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

constexpr float CUDART_INF_F = __builtin_inff();

// ---- Vector types: 16 bytes are one load ------------------------------------------------------

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- Barriers ----------------------------------------------------------------------------------

inline void __syncthreads(SIMT_HERE) { simt::machine().block_barrier(SIMT_SITE("__syncthreads")); }

inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  int nothing = 0;
  simt::machine().together(mask, SIMT_SITE("__syncwarp"), nothing, [](int* const*) {});
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// ---- Shuffles ----------------------------------------------------------------------------------

namespace simt {

template <class T>
struct Shuffled {
  T value;
  unsigned source;  // lane of the warp
  T result;
};

// The value of lane `source`, or poison where that lane takes no part.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to eight bytes");
  Shuffled<T> mine{value, source, value};
  machine().together(mask, site, mine, [](Shuffled<T>* const* lanes) {
    for (unsigned i = 0; i < WARP; i++) {
      if (!lanes[i]) continue;
      const Shuffled<T>* from = lanes[i]->source < WARP ? lanes[lanes[i]->source] : nullptr;
      if (from) lanes[i]->result = from->value;
      else std::memset(static_cast<void*>(&lanes[i]->result), POISON, sizeof(T));
    }
  });
  return mine.result;
}

// All values of the mask's lanes become one.
template <class T, class Combine>
T reduce(unsigned mask, T value, Site site, Combine combine) {
  Shuffled<T> mine{value, 0, value};
  machine().together(mask, site, mine, [&](Shuffled<T>* const* lanes) {
    bool first = true;
    T total{};
    for (unsigned i = 0; i < WARP; i++)
      if (lanes[i]) total = first ? lanes[i]->value : combine(total, lanes[i]->value), first = false;
    for (unsigned i = 0; i < WARP; i++)
      if (lanes[i]) lanes[i]->result = total;
  });
  return mine.result;
}

inline unsigned lane() { return machine().current->lane(); }

}  // namespace simt

// A source outside the lane's segment of `width` lanes gives the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  const unsigned first = simt::lane() / width * width;
  return simt::shuffle(mask, value, first + static_cast<unsigned>(source) % width, SIMT_SITE("__shfl_sync"));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_HERE) {
  const unsigned lane = simt::lane(), source = lane ^ lane_mask;
  // CUDA lets a lane read from lower segments, not from higher ones.
  return simt::shuffle(mask, value, source < (lane / width + 1) * width ? source : lane, SIMT_SITE("__shfl_xor_sync"));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const unsigned lane = simt::lane();
  return simt::shuffle(mask, value, lane % width >= delta ? lane - delta : lane, SIMT_SITE("__shfl_up_sync"));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const unsigned lane = simt::lane();
  return simt::shuffle(mask, value, lane % width + delta < unsigned(width) ? lane + delta : lane, SIMT_SITE("__shfl_down_sync"));
}

// ---- Votes and reductions ----------------------------------------------------------------------

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  const unsigned bit = predicate ? 1u << simt::lane() : 0;
  return simt::reduce(mask, bit, SIMT_SITE("__ballot_sync"), [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) { return __ballot_sync(mask, !predicate, file, line) == 0; }

inline unsigned __match_any_sync(unsigned mask, unsigned value, SIMT_HERE) {
  simt::Shuffled<unsigned> mine{value, 0, 0};
  simt::machine().together(mask, SIMT_SITE("__match_any_sync"), mine, [](simt::Shuffled<unsigned>* const* lanes) {
    for (unsigned i = 0; i < simt::WARP; i++)
      for (unsigned j = 0; j < simt::WARP; j++)
        if (lanes[i] && lanes[j] && lanes[i]->value == lanes[j]->value) lanes[i]->result |= 1u << j;
  });
  return mine.result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_HERE) { return simt::reduce(mask, value, SIMT_SITE("__reduce_add_sync"), [](unsigned a, unsigned b) { return a + b; }); }
inline int __reduce_add_sync(unsigned mask, int value, SIMT_HERE) { return int(__reduce_add_sync(mask, unsigned(value), file, line)); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_HERE) { return simt::reduce(mask, value, SIMT_SITE("__reduce_max_sync"), [](unsigned a, unsigned b) { return std::max(a, b); }); }
inline int __reduce_max_sync(unsigned mask, int value, SIMT_HERE) { return simt::reduce(mask, value, SIMT_SITE("__reduce_max_sync"), [](int a, int b) { return std::max(a, b); }); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_HERE) { return simt::reduce(mask, value, SIMT_SITE("__reduce_min_sync"), [](unsigned a, unsigned b) { return std::min(a, b); }); }
inline int __reduce_min_sync(unsigned mask, int value, SIMT_HERE) { return simt::reduce(mask, value, SIMT_SITE("__reduce_min_sync"), [](int a, int b) { return std::min(a, b); }); }

// ---- Atomics: fibers are switched at barriers and collectives only -----------------------------

namespace simt {
template <class T, class Change>
T exchange(T* at, Change change) {
  const T old = *at;
  *at = change(old);
  return old;
}
}  // namespace simt

template <class T> T atomicAdd(T* at, std::type_identity_t<T> by) {
  if constexpr (std::is_integral_v<T>) return simt::exchange(at, [&](T old) { return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(by)); });
  else return simt::exchange(at, [&](T old) { return old + by; });
}
template <class T> T atomicMax(T* at, std::type_identity_t<T> with) { return simt::exchange(at, [&](T old) { return std::max(old, with); }); }
template <class T> T atomicMin(T* at, std::type_identity_t<T> with) { return simt::exchange(at, [&](T old) { return std::min(old, with); }); }
template <class T> T atomicOr(T* at, std::type_identity_t<T> with) { return simt::exchange(at, [&](T old) { return T(old | with); }); }
template <class T> T atomicAnd(T* at, std::type_identity_t<T> with) { return simt::exchange(at, [&](T old) { return T(old & with); }); }
template <class T> T atomicExch(T* at, std::type_identity_t<T> with) { return simt::exchange(at, [&](T) { return with; }); }
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> with) { return simt::exchange(at, [&](T old) { return old == expected ? with : old; }); }
inline unsigned atomicInc(unsigned* at, unsigned limit) { return simt::exchange(at, [&](unsigned old) { return old >= limit ? 0 : old + 1; }); }

// ---- Loads -------------------------------------------------------------------------------------

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcs(T* at, T value) { *at = value; }
template <class T> void __stcg(T* at, T value) { *at = value; }

// ---- Bits --------------------------------------------------------------------------------------

namespace simt {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace simt

inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return unsigned((uint64_t(high) << 32 | low) >> (by & 31)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned select = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; i++) sum += int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i)));
  return sum;
}

// ---- Arithmetic: names that C++ does not have, and roundings that no compiler may merge --------

using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, unsigned(b)); }
inline unsigned min(int a, unsigned b) { return std::min(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return std::max(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return std::max(unsigned(a), b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float exp10f(float x) { return std::pow(10.0f, x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

#undef SIMT_SITE
#undef SIMT_HERE
