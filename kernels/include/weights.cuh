// Weight formats as tensor cores want them: where a lane's sixteen bytes lie, and how they become
// fragments. One struct per format; the kernels know nothing else of formats.
//
// Weights are the left operand of a product, 16 rows × 8 tokens, so that what a lane needs of a
// token is a pair of neighbouring registers and what it needs of weights is computed anyway. A step
// is 128 bytes of every activation row, in two parts of 64. Within a part, lane t of four
// (t = lane % 4) owns the sixteen bytes 16 t .. 16 t + 15 of a row: 8 elements of two bytes or 16
// codes. Two products share a part, and product q takes the lane's words 2 q and 2 q + 1. This is a
// permutation of k, the same for both operands, so that no sum changes; what a lane needs of a row
// becomes one load of sixteen bytes, of row-major elements and of blocks.
//
// In blocks (formats/blocks.rs) a word of four codes of one row is such a pair or half of it, and
// sixteen bytes are one word of four neighbouring rows: rows 4 g .. 4 g + 3 of a panel's 32 belong
// to the lanes of g = lane / 4. Row r of the tensor core's tile m (of two) is row 4 r + 2 m of the
// panel, and row r + 8 the next one.
//
//   codes        16-bit bits      how                                    exact because
//   int4         bf16             0x43 · c = 128 + c, minus (128 + zero)  |c - zero| <= 15
//   int8         bf16             (128 + low 7 bits) - (128 or 256)      8 significant bits
//   fp8 e4m3     bf16             bits moved, times 2^120                4 significant bits
//   mxfp4 e2m1   bf16             bits moved, times 2^126                2 significant bits
//
// Scales of groups multiply f32 sums of 32 or 64 products, not fragments: codes stay exact, and the
// only rounding of a weight-only product is that of f32 sums. It costs an FFMA per sum, which runs
// beside the tensor cores. Scales of rows multiply the finished sum.
#pragma once

#include "mma.cuh"
#include "product.cuh"

// Where scales are applied: nowhere, to finished sums of a row, to sums over a part of a step (groups
// of 32), to sums over a step (groups of 64 or a multiple).
enum class Scaling { None, Row, Part, Step };

// Two bf16 at once: a · b + c. All uses are exact.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  uint32_t out = 0;
  for (int i = 0; i < 2; i++) {
    const auto half = [i](uint32_t x) { return mma_model::from_bf16(uint16_t(x >> 16 * i)); };
    const float value = half(a) * half(b) + half(c);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    out |= bits >> 16 << 16 * i;
  }
  return out;
#endif
}

constexpr uint32_t ONES = 0x3f803f80;  // two bf16 of 1

// Four two's-complement bytes as two pairs of bf16.
__device__ __forceinline__ void int8_pairs(uint32_t word, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t spread = __byte_perm(word, 0x43434343, i == 0 ? 0x4140 : 0x4342);
    pairs[i] = fma_bf16x2(spread & 0xff7fff7f, ONES, (spread & 0xff80ff80) | 0x80008000);
  }
}

// Four e4m3 bytes as two pairs of bf16. Exponents keep their place relative to the mantissa, so
// that subnormals come out right; 2^120 makes up for the other bias.
__device__ __forceinline__ void fp8_pairs(uint32_t word, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t spread = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);
    const uint32_t moved = (spread >> 4 & 0x07f007f0) | (spread & 0x80008000);
    pairs[i] = fma_bf16x2(moved, 0x7b807b80, 0x80008000);
  }
}

// Four codes below 16 as two pairs of bf16; `minus` is two times -(128 + zero).
__device__ __forceinline__ void int4_pairs(uint32_t codes, uint32_t minus, uint32_t (&pairs)[2]) {
  pairs[0] = fma_bf16x2(__byte_perm(codes, 0x43434343, 0x4140), ONES, minus);
  pairs[1] = fma_bf16x2(__byte_perm(codes, 0x43434343, 0x4342), ONES, minus);
}

// The four e2m1 codes in the low or the high halves of bytes as two pairs of bf16, as above.
__device__ __forceinline__ void mxfp4_pairs(uint32_t word, int high, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t spread = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);
    const uint32_t moved = (spread << (4 - 4 * high) & 0x80008000) | (spread >> (2 + 4 * high) & 0x01c001c0);
    pairs[i] = fma_bf16x2(moved, 0x7e807e80, 0x80008000);
  }
}

// Where sixteen bytes come from; not read unless valid.
struct Source {
  const void* from;
  bool valid;
};

// [q][m][register]: what the lane's rows 2 m and 2 m + 1 bring to product q of a part.
typedef uint32_t Fragments[2][2][4];

__device__ __forceinline__ void set_rows(uint32_t (&fragment)[4], const uint32_t (&even)[2], const uint32_t (&odd)[2]) {
  fragment[0] = even[0], fragment[1] = odd[0], fragment[2] = even[1], fragment[3] = odd[1];
}

// What formats share. Row `row` of a product is that of its activations; experts have others
// (experts.cuh).
struct InOrder {
  static __device__ __forceinline__ int x_row(const Product&, int row) { return row; }
  // Which sixteen bytes of an activation row's step lane t multiplies in a part.
  static __device__ __forceinline__ int x_unit(int part, int t) { return 4 * part + t; }
  // Where they lie: of two rows that are loaded together, one has its halves swapped.
  static __device__ __forceinline__ int lane_place(int row, int unit) { return unit ^ (row & 1) << 2; }
};

// Codes in blocks of sixteen rows: a step of a block is one run of memory. Behind the last block
// it is read again, for columns that nobody asks for.
template <int SLOTS_>
struct InBlocks : InOrder {
  static constexpr int SLOTS = SLOTS_;  // loads of sixteen bytes per lane, panel and step
  static constexpr int STEP_STRIDE = 256 * SLOTS;
  // Unit `unit` (sixteen bytes) of a half's first step.
  static __device__ __forceinline__ const unsigned char* source(const Product& p, const Half& half, int unit) {
    const int last = (half.weight.columns - 1) / BLOCK_ROWS;
    return half.weight.data + size_t(min(half.block, last)) * p.block_bytes + 16 * unit;
  }
  static __device__ __forceinline__ bool valid(const Product&, int, int) { return true; }
};

// Row-major elements of two bytes, rows of a multiple of 16 bytes.
template <bool IS_F16>
struct Dense : InOrder {
  typedef float Sum;
  static constexpr bool X_IS_CODES = false, HAS_ZEROS = false, IS_ROW_MAJOR = true, BY_LDMATRIX = true;
  static constexpr int SLOTS = 8, SLOTS_PER_PART = 4, STEP_STRIDE = X_STEP_BYTES, GROUP_SCALE_BYTES = 0;
  static constexpr Scaling SCALING = Scaling::None;
  static __device__ __forceinline__ const unsigned char* source(const Product& p, const Half& half, int unit) {
    const int row = min(half.block * BLOCK_ROWS + unit / X_STEP_UNITS, half.weight.columns - 1);
    return half.weight.data + 2 * size_t(row) * p.k + unit % X_STEP_UNITS * 16;
  }
  static __device__ __forceinline__ bool valid(const Product& p, int step, int unit) { return step * 64 + unit % X_STEP_UNITS * 8 < p.k; }
  // The unit of a half's step that slot `slot` of a lane holds.
  static __device__ __forceinline__ int unit(int part, int slot, int quad, int t) { return (4 * quad + slot) * 8 + 4 * part + t; }
  // Where a unit of a half lies in shared memory, so that lanes that load together meet all banks:
  // ldmatrix takes every fourth row of a panel.
  static __device__ __forceinline__ int place(int half, int unit) { return unit ^ ((unit >> 5 & 3) | (half & 1) << 2); }
  static __device__ __forceinline__ int x_place(int row, int unit) { return unit ^ (row & 7); }
  static __device__ __forceinline__ void fragments(const Words (&raw)[4], int, const uint32_t (&)[4], Fragments& out) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const uint32_t even[2] = {raw[2 * m].w[2 * q], raw[2 * m].w[2 * q + 1]};
        const uint32_t odd[2] = {raw[2 * m + 1].w[2 * q], raw[2 * m + 1].w[2 * q + 1]};
        set_rows(out[q][m], even, odd);
      }
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (IS_F16) mma_f16(c, a, b0, b1);
    else mma_bf16(c, a, b0, b1);
  }
};

// What formats in blocks share.
template <int SLOTS>
struct Coded : InBlocks<SLOTS> {
  static constexpr bool X_IS_CODES = false, HAS_ZEROS = false, IS_ROW_MAJOR = false, BY_LDMATRIX = false;
  static __device__ __forceinline__ int x_place(int row, int unit) { return InOrder::lane_place(row, unit); }
};

// W8A8: codes times codes.
struct Int8 : Coded<8> {
  typedef int32_t Sum;
  static constexpr bool X_IS_CODES = true;
  static constexpr int SLOTS_PER_PART = 4, GROUP_SCALE_BYTES = 0;
  static constexpr Scaling SCALING = Scaling::Row;
  // A step has 128 codes of a row, and rows may end half-way.
  static __device__ __forceinline__ bool valid(const Product& p, int step, int unit) { return step * STEP_STRIDE + 16 * unit < p.block_bytes; }
  static __device__ __forceinline__ int unit(int part, int slot, int quad, int t) { return (16 * part + 4 * t + slot) * 4 + quad; }
  static __device__ __forceinline__ int place(int, int unit) { return unit ^ 2 * (unit >> 4 & 3); }
  // The tensor core takes four neighbouring registers that no load leaves so. `zero` is 0, which the
  // compiler cannot know: adding it once stands for a move, which it would repeat for every product.
  static __device__ __forceinline__ void fragments(const Words (&raw)[4], int, const uint32_t (&zero)[4], Fragments& out) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const uint32_t even[2] = {raw[2 * q].w[2 * m] + zero[0], raw[2 * q + 1].w[2 * m] + zero[0]};
        const uint32_t odd[2] = {raw[2 * q].w[2 * m + 1] + zero[0], raw[2 * q + 1].w[2 * m + 1] + zero[0]};
        set_rows(out[q][m], even, odd);
      }
  }
  static __device__ __forceinline__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_s8(c, a, b0, b1); }
};

// Bytes that become bf16: `PAIRS` makes two pairs of a word.
template <Scaling S, int SCALE_BYTES, void (*PAIRS)(uint32_t, uint32_t (&)[2])>
struct Bytes : Coded<4> {
  typedef float Sum;
  static constexpr int SLOTS_PER_PART = 2, GROUP_SCALE_BYTES = SCALE_BYTES;
  static constexpr Scaling SCALING = S;
  static __device__ __forceinline__ int unit(int part, int slot, int quad, int t) { return (8 * part + 2 * t + slot) * 4 + quad; }
  static __device__ __forceinline__ int place(int, int unit) { return unit ^ 2 * (unit >> 3 & 3); }
  static __device__ __forceinline__ void fragments(const Words (&raw)[2], int, const uint32_t (&)[4], Fragments& out) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t even[2], odd[2];
        PAIRS(raw[q].w[2 * m], even);
        PAIRS(raw[q].w[2 * m + 1], odd);
        set_rows(out[q][m], even, odd);
      }
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(c, a, b0, b1); }
};

// Folded codes: the low halves of a step's bytes are its first 32 codes, the high halves the others.
template <Scaling S>
struct Int4 : Coded<2> {
  typedef float Sum;
  static constexpr bool HAS_ZEROS = true;
  static constexpr int SLOTS_PER_PART = 2, GROUP_SCALE_BYTES = 2;
  static constexpr Scaling SCALING = S;
  static __device__ __forceinline__ int unit(int, int slot, int quad, int t) { return (2 * t + slot) * 4 + quad; }
  static __device__ __forceinline__ int place(int, int unit) { return unit ^ 2 * (unit >> 3 & 3); }
  static __device__ __forceinline__ void fragments(const Words (&raw)[2], int part, const uint32_t (&minus)[4], Fragments& out) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t even[2], odd[2];
        int4_pairs((raw[q].w[2 * m] >> 4 * part) & 0x0f0f0f0f, minus[2 * m], even);
        int4_pairs((raw[q].w[2 * m + 1] >> 4 * part) & 0x0f0f0f0f, minus[2 * m + 1], odd);
        set_rows(out[q][m], even, odd);
      }
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(c, a, b0, b1); }
};

// The same of e2m1 codes; a scale is a byte, the exponent of a power of two.
struct Mxfp4 : Coded<2> {
  typedef float Sum;
  static constexpr int SLOTS_PER_PART = 2, GROUP_SCALE_BYTES = 1;
  static constexpr Scaling SCALING = Scaling::Part;
  static __device__ __forceinline__ int unit(int, int slot, int quad, int t) { return (2 * t + slot) * 4 + quad; }
  static __device__ __forceinline__ int place(int, int unit) { return unit ^ 2 * (unit >> 3 & 3); }
  static __device__ __forceinline__ void fragments(const Words (&raw)[2], int part, const uint32_t (&)[4], Fragments& out) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t even[2], odd[2];
        mxfp4_pairs(raw[q].w[2 * m], part, even);
        mxfp4_pairs(raw[q].w[2 * m + 1], part, odd);
        set_rows(out[q][m], even, odd);
      }
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(c, a, b0, b1); }
};

// Row-major e4m3, rows of a multiple of 16 codes: as FP8 tensor cores want them, which multiply more
// rows than the skinny kernels take (src/ops/cuda/fp8.rs). Sixteen bytes are sixteen k of one row, a
// lane's share of both parts of a step, of which part p takes the eight codes from 8 p on; so a lane's
// activations are two neighbouring units, one for each part.
struct Fp8Rows : InOrder {
  typedef float Sum;
  static constexpr bool X_IS_CODES = false, HAS_ZEROS = false, IS_ROW_MAJOR = true, BY_LDMATRIX = false;
  static constexpr int SLOTS = 4, SLOTS_PER_PART = 4, STEP_STRIDE = X_STEP_BYTES / 2, GROUP_SCALE_BYTES = 0;
  static constexpr int ROW_UNITS = STEP_STRIDE / 16;  // of a step of a row
  static constexpr Scaling SCALING = Scaling::Row;
  static __device__ __forceinline__ const unsigned char* source(const Product& p, const Half& half, int unit) {
    const int row = min(half.block * BLOCK_ROWS + unit / ROW_UNITS, half.weight.columns - 1);
    return half.weight.data + size_t(row) * p.k + unit % ROW_UNITS * 16;
  }
  static __device__ __forceinline__ bool valid(const Product& p, int step, int unit) { return step * STEP_STRIDE + unit % ROW_UNITS * 16 < p.k; }
  static __device__ __forceinline__ int unit(int, int slot, int quad, int t) { return (4 * quad + slot) * ROW_UNITS + t; }
  // Lanes of two neighbouring quads load together.
  static __device__ __forceinline__ int place(int, int unit) { return unit ^ (unit >> 4 & 1) << 2; }
  static __device__ __forceinline__ int x_unit(int part, int t) { return 2 * t + part; }
  static __device__ __forceinline__ int lane_place(int row, int unit) { return unit ^ (row & 1); }
  static __device__ __forceinline__ int x_place(int row, int unit) { return lane_place(row, unit); }
  static __device__ __forceinline__ void fragments(const Words (&raw)[4], int part, const uint32_t (&)[4], Fragments& out) {
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t even[2], odd[2];
        fp8_pairs(raw[2 * m].w[2 * part + q], even);
        fp8_pairs(raw[2 * m + 1].w[2 * part + q], odd);
        set_rows(out[q][m], even, odd);
      }
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(c, a, b0, b1); }
};

typedef Dense<false> DenseBf16;
typedef Dense<true> DenseF16;
typedef Int4<Scaling::Part> Int4By32;
typedef Int4<Scaling::Step> Int4By64;
typedef Bytes<Scaling::Part, 2, int8_pairs> Q8;
typedef Bytes<Scaling::Row, 0, int8_pairs> W8A16;
typedef Bytes<Scaling::Row, 0, fp8_pairs> Fp8;
typedef Bytes<Scaling::Step, 4, fp8_pairs> Fp8Groups;

// Bytes of a step of a half.
template <class W>
constexpr int STEP_BYTES = W::SLOTS * 256;

template <class W>
constexpr bool HAS_GROUPS = W::SCALING == Scaling::Part || W::SCALING == Scaling::Step;
// Parts of a step that share scales, and how many such there are.
template <class W>
constexpr int GROUP_PARTS = W::SCALING == Scaling::Step ? 2 : 1;
template <class W>
constexpr int STEP_GROUPS = 2 / GROUP_PARTS<W>;
// Scales and zero points of a half for one of them, staged as they lie.
template <class W>
constexpr int SCALES_BYTES = HAS_GROUPS<W> ? BLOCK_ROWS * W::GROUP_SCALE_BYTES : 0;
template <class W>
constexpr int GROUP_BYTES = SCALES_BYTES<W> + (W::HAS_ZEROS ? BLOCK_ROWS : 0);
template <class W>
constexpr int GROUP_UNITS = GROUP_BYTES<W> / 16;

// Unit `unit` of the scales and zero points of the group that element `at` of a row is in.
template <class W>
__device__ __forceinline__ Source group_source(const Product& p, const Half& half, int at, int unit) {
  const int last = (half.weight.columns - 1) / BLOCK_ROWS;
  const size_t row = (size_t(min(half.block, last)) * p.groups + (at >> p.group_shift)) * BLOCK_ROWS;
  if (unit < SCALES_BYTES<W> / 16) {
    return {static_cast<const unsigned char*>(half.weight.scales) + row * W::GROUP_SCALE_BYTES + 16 * unit, at < p.k};
  }
  return {half.weight.zeros + row, at < p.k && half.weight.zeros};
}

// N scales of neighbouring rows.
template <class W, int N>
__device__ __forceinline__ void read_scales(const unsigned char* from, float (&scales)[N]) {
  if constexpr (W::GROUP_SCALE_BYTES == 2) {
    const Pack<f16, N> pack = load_pack<f16, N>(reinterpret_cast<const f16*>(from));
#pragma unroll
    for (int i = 0; i < N; i++) scales[i] = to_float(pack.x[i]);
  } else if constexpr (W::GROUP_SCALE_BYTES == 1) {
    static_assert(N == 4, "a word of bytes");
    const uint32_t exponents = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int i = 0; i < N; i++) scales[i] = power_of_two(exponents >> 8 * i & 255);
  } else {
    const Pack<float, N> pack = load_pack<float, N>(reinterpret_cast<const float*>(from));
#pragma unroll
    for (int i = 0; i < N; i++) scales[i] = pack.x[i];
  }
}

// Four times two -(128 + zero) of four zero points; symmetric codes have none, and 8 stands for 0.
__device__ __forceinline__ void negated_zeros(const unsigned char* from, bool symmetric, uint32_t (&minus)[4]) {
  const uint32_t zeros = symmetric ? 0x08080808 : *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
  for (int j = 0; j < 4; j++) minus[j] = 0xc300c300 | (zeros >> 8 * j & 0xff) * 0x00010001;
}

// The scale of a row, applied to its finished sum.
template <class W>
__device__ __forceinline__ float row_scale(const Product& p, const Weight& weight, int row) {
  if (W::SCALING != Scaling::Row || row >= weight.columns) return 1.f;
  return read_element(weight.scales, p.scale_type, row);
}

// Of activations that are codes.
template <class W>
__device__ __forceinline__ float token_scale(const Product& p, int row) {
  return W::X_IS_CODES ? p.x_scales[W::x_row(p, row)] : 1.f;
}

// The scales and negated zero points of a lane's four rows; `group` is that of their half.
template <class W>
__device__ __forceinline__ void load_group(const Product& p, const unsigned char* group, float (&scales)[4], uint32_t (&minus)[4]) {
  const int quad = threadIdx.x % 32 / 4 % 4;
  if constexpr (HAS_GROUPS<W>) read_scales<W, 4>(group + quad * 4 * W::GROUP_SCALE_BYTES, scales);
  if constexpr (W::HAS_ZEROS) negated_zeros(group + SCALES_BYTES<W> + 4 * quad, !p.weights[0].zeros, minus);
}

// Adds the products of the parts that share scales to sums [m][register] of eight tokens.
template <class W>
__device__ __forceinline__ void multiply_tokens(const Fragments (&w)[GROUP_PARTS<W>], const Words (&x)[GROUP_PARTS<W>], const float (&scales)[4], typename W::Sum (&sums)[2][4]) {
#pragma unroll
  for (int m = 0; m < 2; m++) {
    typename W::Sum group[4] = {};
#pragma unroll
    for (int part = 0; part < GROUP_PARTS<W>; part++)
#pragma unroll
      for (int q = 0; q < 2; q++) {
        if constexpr (HAS_GROUPS<W>) W::multiply(group, w[part][q][m], x[part].w[2 * q], x[part].w[2 * q + 1]);
        else W::multiply(sums[m], w[part][q][m], x[part].w[2 * q], x[part].w[2 * q + 1]);
      }
    if constexpr (HAS_GROUPS<W>) {
#pragma unroll
      for (int e = 0; e < 4; e++) sums[m][e] += group[e] * scales[2 * m + e / 2];
    }
  }
}
