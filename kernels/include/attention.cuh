// What attention kernels share: cache formats, tiles of keys and values in shared memory, scores,
// the streaming softmax, and how parts of a context are joined.
//
// Every query row goes past KV tiles that start at multiples of TILE positions. A context is cut
// into parts of PART positions; each part starts its softmax anew, and what it yields is joined to
// what earlier parts yielded, in ascending order, a sink first (a key with that score and a value
// of 0). Prefill joins in registers, decode in registers or, when a part is a CTA's work, in a
// kernel of its own. All of them sum in the same order with the same instructions, so the bits of
// a row depend on its own sequence only: not on the batch, on chunks, on which kernel ran, or on
// how many CTAs shared a context. Where the compiler could merge a product and a sum in one kernel
// and not in the other, intrinsics say which it is.
//
// A row is a query and one of the query heads that share a KV head: row r of a sequence is query
// r / group, head r % group, so that one load of keys serves the whole group.
#pragma once

#include <cmath>

#include "dtype.cuh"
#include "mma.cuh"

namespace attention {

// Positions per part: 32 CTAs of work in a context of 1,024 with 8 KV heads, and a join every
// four tiles, which costs prefill 3 % of its tensor-core time.
constexpr int PART = 256;
// Rows of one mma.
constexpr int MMA_ROWS = 16;
// Keys of one A fragment of weights: what is summed in one step.
constexpr int STRIPE = 16;
// A sequence of one query, or of at most this many rows, is decode's; others are prefill's.
constexpr int SHORT_ROWS = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NEG_INFINITY = -INFINITY;

// Positions per tile: 64 keys of 128 elements are 16 KiB; larger heads get half, so that two
// stages still fit the 99 KiB of sm_86 and sm_89.
__host__ __device__ constexpr int tile_len(int head_dim) { return head_dim > 128 ? 32 : 64; }

__device__ __forceinline__ bool is_short(int num_queries, int group) {
  return num_queries == 1 || num_queries * group <= SHORT_ROWS;
}

// 2^x; one instruction, whose error of 2^-22 is far below that of weights in 16 bits.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// ---- What tensor cores multiply ----------------------------------------------------------------

struct MmaBf16 {
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return from_float<bf16>(low).bits | uint32_t(from_float<bf16>(high).bits) << 16;
#endif
  }
  __device__ static __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(c, a, b0, b1); }
  // Two queries in bf16, as they are.
  __device__ static __forceinline__ uint32_t query(uint32_t pair) { return pair; }
};

struct MmaF16 {
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDACC__
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return from_float<f16>(low).bits | uint32_t(from_float<f16>(high).bits) << 16;
#endif
  }
  __device__ static __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_f16(c, a, b0, b1); }
  // bf16 to f16: exact but for magnitudes below 2^-14, where at most 2^-25 is lost, and beyond
  // 65,504, which become that.
  __device__ static __forceinline__ uint32_t query(uint32_t pair) {
    const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000);
    return pack(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
  }
};

// ---- Cache formats -----------------------------------------------------------------------------

struct CacheBf16 {
  using Mma = MmaBf16;
  static constexpr bool IS_CODES = false, HAS_SCALES = false;
};

struct CacheF16 {
  using Mma = MmaF16;
  static constexpr bool IS_CODES = false, HAS_SCALES = false;
};

// E4M3 is exact in f16.
struct CacheFp8 {
  using Mma = MmaF16;
  static constexpr bool IS_CODES = true, HAS_SCALES = false;

  __device__ static __forceinline__ void widen(uint32_t codes, uint32_t (&pairs)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(codes));
#elif defined(__CUDACC__)
    // The code's exponent and mantissa, put into an f16, are the value divided by 2^8.
    const __half2 unbias = __floats2half2_rn(256.0f, 256.0f);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t spread = __byte_perm(codes, 0, i == 0 ? 0x1404 : 0x3424);
      const uint32_t bits = (spread & 0x80008000) | (spread >> 1 & 0x3f803f80);
      const __half2 pair = __hmul2(*reinterpret_cast<const __half2*>(&bits), unbias);
      pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
#else
    for (int i = 0; i < 2; i++)
      pairs[i] = MmaF16::pack(to_float(fp8{uint8_t(codes >> 16 * i)}), to_float(fp8{uint8_t(codes >> (16 * i + 8))}));
#endif
  }
};

// Codes are exact in bf16. A key's scale multiplies its score, a value's scale its weight, for
// which f16 would have too small a range.
struct CacheInt8 {
  using Mma = MmaBf16;
  static constexpr bool IS_CODES = true, HAS_SCALES = true;

  __device__ static __forceinline__ void widen(uint32_t codes, uint32_t (&pairs)[2]) {
#ifdef __CUDACC__
    // Seven bits below 128 in bf16 are 128 + code; minus 128, or minus 256 for a negative one.
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t spread = __byte_perm(codes, 0, i == 0 ? 0x4140 : 0x4342);
      const uint32_t low = (spread & 0x007f007f) | 0x43004300, sign = (spread & 0x00800080) | 0x43004300;
      const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&low), *reinterpret_cast<const __nv_bfloat162*>(&sign));
      pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
#else
    for (int i = 0; i < 2; i++)
      pairs[i] = MmaBf16::pack(float(int8_t(codes >> 16 * i)), float(int8_t(codes >> (16 * i + 8))));
#endif
  }
};

// ---- Where a sequence's keys and values lie ----------------------------------------------------

struct PagedCache {
  const unsigned char* k;     // [num_blocks, num_kv_heads, block_size, head_dim]
  const unsigned char* v;     // as k
  const float* k_scales;      // [num_blocks, num_kv_heads, block_size], or null
  const float* v_scales;      // as k_scales
  const uint32_t* table;      // [blocks of this sequence]
  int context_len, num_kv_heads, kv_head, block_shift, head_dim;

  // The vector of a position, counted in vectors.
  __device__ __forceinline__ size_t vector(int position) const {
    const size_t block = table[position >> block_shift];
    return ((block * num_kv_heads + kv_head) << block_shift) + (position & ((1 << block_shift) - 1));
  }
};

// Tiles of keys and values in shared memory, loaded by `cp.async` one tile ahead. Rows are eight
// elements longer than heads, so that the eight rows of an ldmatrix lie in different banks.
// Elements beyond head_dim and positions beyond the context are zeros: nobody has written those
// slots, and a weight of 0 does not make up for a NaN. D: head_dim rounded up; D_V: columns of
// values from `first_col` on.
template <class Cache, int D, int D_V, int THREADS>
struct Tiles {
  static constexpr int TILE = tile_len(D), STAGES = 2;
  static constexpr int K_STRIDE = D + 8, V_STRIDE = D_V + 8;
  static constexpr int ELEMENT_BYTES = Cache::IS_CODES ? 1 : 2, CHUNK_LEN = 16 / ELEMENT_BYTES;
  static constexpr int K_ROW_BYTES = Cache::IS_CODES ? D : 2 * K_STRIDE;
  static constexpr int V_ROW_BYTES = Cache::IS_CODES ? D_V : 2 * V_STRIDE;
  static constexpr int SCALE_BYTES = Cache::HAS_SCALES ? TILE * 4 : 0;
  static constexpr int STAGE_BYTES = TILE * (K_ROW_BYTES + V_ROW_BYTES) + 2 * SCALE_BYTES;
  static constexpr int WIDE_BYTES = Cache::IS_CODES ? TILE * 2 * (K_STRIDE + V_STRIDE) : 0;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + WIDE_BYTES;

  unsigned char* shared;
  PagedCache cache;
  int first_col;

  __device__ __forceinline__ unsigned char* raw_k(int stage) const { return shared + stage * STAGE_BYTES; }
  __device__ __forceinline__ unsigned char* raw_v(int stage) const { return raw_k(stage) + TILE * K_ROW_BYTES; }
  __device__ __forceinline__ float* k_scales(int stage) const { return reinterpret_cast<float*>(raw_v(stage) + TILE * V_ROW_BYTES); }
  __device__ __forceinline__ float* v_scales(int stage) const { return k_scales(stage) + TILE; }

  // [TILE, K_STRIDE], 16 bits.
  __device__ __forceinline__ const uint16_t* k(int stage) const {
    return reinterpret_cast<const uint16_t*>(Cache::IS_CODES ? shared + STAGES * STAGE_BYTES : raw_k(stage));
  }
  // [TILE, V_STRIDE], 16 bits.
  __device__ __forceinline__ const uint16_t* v(int stage) const {
    return reinterpret_cast<const uint16_t*>(Cache::IS_CODES ? shared + STAGES * STAGE_BYTES + TILE * 2 * K_STRIDE : raw_v(stage));
  }

  // Starts loading a tile, as one group of copies.
  __device__ __forceinline__ void fetch(int tile, int stage) const {
    constexpr int CHUNKS = D / CHUNK_LEN;
#pragma unroll 2
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, col = i % CHUNKS * CHUNK_LEN, position = tile * TILE + row;
      const bool valid = position < cache.context_len && col < cache.head_dim;
      const size_t from = valid ? (cache.vector(position) * cache.head_dim + col) * ELEMENT_BYTES : 0;
      cp_async_16(raw_k(stage) + row * K_ROW_BYTES + col * ELEMENT_BYTES, cache.k + from, valid);
      const int v_col = col - first_col;
      if (D_V == D || (v_col >= 0 && v_col < D_V))
        cp_async_16(raw_v(stage) + row * V_ROW_BYTES + v_col * ELEMENT_BYTES, cache.v + from, valid);
    }
    if constexpr (Cache::HAS_SCALES) {
      // Blocks are multiples of four positions, so four scales lie together.
      for (int i = threadIdx.x; i < TILE / 2; i += THREADS) {
        const int row = i % (TILE / 4) * 4, position = tile * TILE + row;
        const bool is_k = i < TILE / 4, valid = position < cache.context_len;
        const float* from = is_k ? cache.k_scales : cache.v_scales;
        cp_async_16((is_k ? k_scales(stage) : v_scales(stage)) + row, from + (valid ? cache.vector(position) : 0), valid);
      }
    }
    cp_async_commit();
  }

  // Codes of an arrived tile as 16-bit numbers; a barrier belongs before it and after it.
  __device__ __forceinline__ void widen(int tile, int stage) const {
    if constexpr (Cache::IS_CODES) {
      widen_rows<D, K_STRIDE>(raw_k(stage), const_cast<uint16_t*>(k(stage)));
      widen_rows<D_V, V_STRIDE>(raw_v(stage), const_cast<uint16_t*>(v(stage)));
    }
    if constexpr (Cache::HAS_SCALES) {
      // The last four scales of a context may be nobody's.
      for (int i = threadIdx.x; i < 2 * TILE; i += THREADS)
        if (tile * TILE + i % TILE >= cache.context_len) k_scales(stage)[i] = 0.0f;
    }
  }

  template <int LEN, int STRIDE>
  __device__ __forceinline__ void widen_rows(const unsigned char* codes, uint16_t* wide) const {
    constexpr int CHUNKS = LEN / 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
      const uint4 from = reinterpret_cast<const uint4*>(codes)[i];
      const uint32_t words[4] = {from.x, from.y, from.z, from.w};
      uint32_t pairs[4][2];
#pragma unroll
      for (int w = 0; w < 4; w++) Cache::widen(words[w], pairs[w]);
      uint4* to = reinterpret_cast<uint4*>(wide + i / CHUNKS * STRIDE + i % CHUNKS * 16);
      to[0] = make_uint4(pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]);
      to[1] = make_uint4(pairs[2][0], pairs[2][1], pairs[3][0], pairs[3][1]);
    }
  }
};

// ---- Fragments ---------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

// This lane's address for the A of rows 0..16, elements 0..16 of a row-major tile, and for the B
// of a tile of values, whose rows are the summed axis.
template <int STRIDE>
__device__ __forceinline__ const uint16_t* a_address(const uint16_t* tile) {
  return tile + (lane_id() / 8 % 2 * 8 + lane_id() % 8) * STRIDE + lane_id() / 16 * 8;
}

// The same for two Bs of a tile of keys, whose rows are columns of scores.
template <int STRIDE>
__device__ __forceinline__ const uint16_t* b_address(const uint16_t* tile) {
  return tile + (lane_id() / 16 * 8 + lane_id() % 8) * STRIDE + lane_id() / 8 % 2 * 8;
}

// Rows first..first + COUNT of a sequence as a tile in shared memory; zeros beyond the last one
// and beyond head_dim. `q` [num_tokens, num_heads, head_dim] starts at the sequence.
template <class Mma, int D, int COUNT, int THREADS>
__device__ __forceinline__ void load_queries(uint16_t* tile, const bf16* q, int first, int num_rows, int group, int num_heads, int first_head, int head_dim) {
  constexpr int CHUNKS = D / 8;
  for (int i = threadIdx.x; i < COUNT * CHUNKS; i += THREADS) {
    const int row = first + i / CHUNKS, col = i % CHUNKS * 8;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (row < num_rows && col < head_dim)
      x = *reinterpret_cast<const uint4*>(q + (size_t(row / group) * num_heads + first_head + row % group) * head_dim + col);
    *reinterpret_cast<uint4*>(tile + i / CHUNKS * (D + 8) + col) = make_uint4(Mma::query(x.x), Mma::query(x.y), Mma::query(x.z), Mma::query(x.w));
  }
}

// ---- Scores ------------------------------------------------------------------------------------

// How a product q·k becomes an exponent of two.
struct Scoring {
  float factor;     // a score times this is the exponent
  float cap_scale;  // 0, or what a product is multiplied by before tanh
  int window;       // a query at p sees keys from p - window + 1 on

  __device__ __forceinline__ Scoring(float scale, float softcap, int window)
      : factor((softcap > 0.0f ? softcap : scale) * LOG2_E), cap_scale(softcap > 0.0f ? scale / softcap : 0.0f), window(window) {}

  // Whether all of `rows` positions from `first` to `last` see all keys of a tile.
  __device__ __forceinline__ bool all_visible(int begin, int end, int first, int last) const { return end - 1 <= first && begin > last - window; }
  // Whether none of them sees any.
  __device__ __forceinline__ bool all_hidden(int begin, int end, int first, int last) const { return begin > last || end - 1 <= first - window; }

  // Products of sixteen keys from `key` on with rows at position_of(0) (elements 0 and 1) and
  // position_of(1) (2 and 3) become scores. `k_scales` is the keys'.
  template <class Cache, class PositionOf>
  __device__ __forceinline__ void finish(float (&s)[2][4], int key, PositionOf position_of, bool is_masked, const float* k_scales) const {
    const int col = lane_id() % 4 * 2;
    if constexpr (Cache::HAS_SCALES) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 scales = *reinterpret_cast<const float2*>(k_scales + 8 * n + col);
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = __fmul_rn(s[n][e], e % 2 == 0 ? scales.x : scales.y);
      }
    }
    if (cap_scale > 0.0f) {
#pragma unroll
      for (int e = 0; e < 8; e++) s[e / 4][e % 4] = tanhf(__fmul_rn(s[e / 4][e % 4], cap_scale));
    }
    if (is_masked) {
      const int positions[2] = {position_of(0), position_of(1)};
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int at = key + 8 * (e / 4) + col + e % 2, position = positions[e % 4 / 2];
        if (at > position || at <= position - window) s[e / 4][e % 4] = NEG_INFINITY;
      }
    }
  }
};

// ---- Streaming softmax -------------------------------------------------------------------------

// The largest of the four lanes that share rows.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 2));
}

// One row within one part: the largest score so far and, per lane of a quad, its share of the sum
// of weights, which are 2^(factor · (score - largest)).
struct Softmax {
  float largest = NEG_INFINITY, total = 0.0f;

  // Raises the largest score; returns what sums so far must be multiplied by. 1 exactly if it
  // stays: tiles that other rows need change nothing.
  __device__ __forceinline__ float raise(float score, float factor) {
    const float before = largest;
    largest = fmaxf(before, score);
    return before == NEG_INFINITY ? 0.0f : exp2_fast(__fmul_rn(__fsub_rn(before, largest), factor));
  }

  // What weigh_stripe() subtracts: the largest score; 0 before any key was seen.
  __device__ __forceinline__ float base() const { return largest == NEG_INFINITY ? 0.0f : largest; }
};

// Scores of sixteen keys become weights: their sums per row, and the A fragment that multiplies
// values. The largest score is subtracted before anything is rounded (one fused operation would
// leave a huge score's rounding error as an exponent), so that no weight is beyond 1.
template <class Cache>
__device__ __forceinline__ void weigh_stripe(float (&s)[2][4], float factor, const float (&bases)[2], const float* v_scales, float (&sums)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(__fmul_rn(__fsub_rn(s[n][e], bases[e / 2]), factor));
#pragma unroll
  for (int r = 0; r < 2; r++) sums[r] = __fadd_rn(__fadd_rn(s[0][2 * r], s[0][2 * r + 1]), __fadd_rn(s[1][2 * r], s[1][2 * r + 1]));
#pragma unroll
  for (int n = 0; n < 2; n++) {
    float2 scales = make_float2(1.0f, 1.0f);
    if constexpr (Cache::HAS_SCALES) scales = *reinterpret_cast<const float2*>(v_scales + 8 * n + lane_id() % 4 * 2);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float low = s[n][2 * r], high = s[n][2 * r + 1];
      if constexpr (Cache::HAS_SCALES) low = __fmul_rn(low, scales.x), high = __fmul_rn(high, scales.y);
      a[2 * n + r] = Cache::Mma::pack(low, high);
    }
  }
}

// One row over all parts so far: its largest exponent and the sum of its weights.
struct Joined {
  float largest = NEG_INFINITY, total = 0.0f;

  // A sink is a first part: one key without a value.
  __device__ __forceinline__ void start(float sink) {
    largest = sink == NEG_INFINITY ? NEG_INFINITY : __fmul_rn(sink, LOG2_E);
    total = sink == NEG_INFINITY ? 0.0f : 1.0f;
  }

  // Joins a part; `factors` are what the sums of values so far and the part's are multiplied by.
  __device__ __forceinline__ void join(float part_largest, float part_total, float (&factors)[2]) {
    const float before = largest;
    largest = fmaxf(before, part_largest);
    factors[0] = before == NEG_INFINITY ? 0.0f : exp2_fast(__fsub_rn(before, largest));
    factors[1] = part_largest == NEG_INFINITY ? 0.0f : exp2_fast(__fsub_rn(part_largest, largest));
    total = join_sums(total, part_total, factors);
  }

  __device__ static __forceinline__ float join_sums(float sum, float part, const float (&factors)[2]) {
    return __fmaf_rn(part, factors[1], __fmul_rn(sum, factors[0]));
  }

  // What sums are multiplied by at the end; a row that saw nothing yields zeros.
  __device__ __forceinline__ float inverse() const { return total > 0.0f ? __fdiv_rn(1.0f, total) : 0.0f; }
};

// ---- A row's place -----------------------------------------------------------------------------

// Sixteen rows of a sequence, or more: which positions their queries have and which keys they see.
struct Rows {
  int first, end;                     // rows of the sequence; the last one's successor
  int first_query_position;           // of the sequence's queries in this step
  int first_position, last_position;  // of these rows' queries
  int first_key;                      // the first that any of them sees

  __device__ __forceinline__ Rows(int first, int count, int num_rows, int group, int context_len, int num_queries, int window)
      : first(first), end(min(first + count, num_rows)), first_query_position(context_len - num_queries) {
    first_position = position(first, group);
    last_position = position(end - 1, group);
    first_key = max(0, first_position - window + 1);
  }

  // The position of a row; rows beyond the end have the last one's.
  __device__ __forceinline__ int position(int row, int group) const { return first_query_position + min(row, end - 1) / group; }

  __device__ __forceinline__ int first_part() const { return first_key / PART; }
  __device__ __forceinline__ int end_part() const { return last_position < 0 ? 0 : last_position / PART + 1; }
};

}  // namespace attention
