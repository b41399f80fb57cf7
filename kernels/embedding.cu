// Rows of a table, chosen by ids: token embeddings, and the rows whose logits are wanted.
//
//   out [num_ids, width], T;  ids [num_ids];  table [num_rows, width] in any format
//
// A block per id; a thread takes a chunk of sixteen bytes of T (dense tables) or four columns
// (packed ones: a word of a block, see formats/blocks.rs, or of a row of FP8). A code times its scale is rounded once.
//
// Bound: latency for a decode, else memory: width · (bytes of an element or code + sizeof(T)).
//
// Report: gather_* threads=256
// Report: gather_f32_* sass=LDG.128,STG.128
// Report: gather_bf16_bf16 sass=LDG.128,STG.128
// Report: gather_f16_bf16 sass=LDG.128,STG.128
#include "dtype.cuh"

template <class T, class W>
__device__ __forceinline__ void gather(T* __restrict__ out, const W* __restrict__ table, const uint32_t* __restrict__ ids, int width) {
  const W* from = table + static_cast<size_t>(ids[blockIdx.x]) * width;
  T* to = out + static_cast<size_t>(blockIdx.x) * width;
  const bool whole = can_load_chunks(table, width) && can_load_chunks(out, width);
  for (int at = threadIdx.x * CHUNK; at < width; at += blockDim.x * CHUNK) {
    float x[CHUNK];
    load_chunk(x, from, at, width, whole);
    store_chunk(to, x, at, width, whole);
  }
}

// Geometry of formats/blocks.rs.
constexpr int BLOCK_ROWS = 16;
constexpr int LINE_BYTES = 64;
constexpr int FOLDED_BYTES = 8 * LINE_BYTES;
// The code of 0 where a matrix of four bits has no zero points (formats/int4.rs).
constexpr int MIDDLE = 8;
// Columns of a thread: the codes of a word.
constexpr int WORD = 4;

enum class Layout { BF16_BLOCKS, BYTE_BLOCKS, NIBBLE_BLOCKS, MXFP4_BLOCKS, FP8_BLOCKS, FP8_ROWS };

// A table in blocks. Scales: [blocks, groups, BLOCK_ROWS]; a group is group_cols elements of a row.
struct Packed {
  const uint8_t* data;   // [blocks, BLOCK_ROWS · row_bytes], of FP8_ROWS [rows, row_bytes]
  const void* scales;    // f16 or f32, exponents of MXFP4_BLOCKS; null for BF16_BLOCKS
  const uint8_t* zeros;  // as the scales, or null
  int row_bytes, groups, group_cols;
  bool scales_are_f16;
};

// What a code of MXFP4 stands for.
__device__ __forceinline__ float e2m1(int code) {
  const int exponent = code >> 1 & 3, mantissa = code & 1;
  const float magnitude = exponent == 0 ? 0.5f * mantissa : (2 + mantissa) * 0.25f * (1 << exponent);
  return code & 8 ? -magnitude : magnitude;
}

// What the codes of columns at..at + WORD stand for, before scaling.
template <Layout LAYOUT>
__device__ __forceinline__ void load_codes(float (&x)[WORD], const Packed& table, size_t row, int at, int zero) {
  const int in_block = row % BLOCK_ROWS;
  const uint8_t* block = table.data + row / BLOCK_ROWS * BLOCK_ROWS * table.row_bytes;
  if constexpr (LAYOUT == Layout::BF16_BLOCKS) {
#pragma unroll
    for (int i = 0; i < WORD; i++) {
      const int byte = 2 * (at + i);
      x[i] = to_float(*reinterpret_cast<const bf16*>(block + byte / 4 * LINE_BYTES + in_block * 4 + byte % 4));
    }
  } else if constexpr (LAYOUT == Layout::NIBBLE_BLOCKS || LAYOUT == Layout::MXFP4_BLOCKS) {
    const int place = at / 4 * LINE_BYTES + in_block * 4;
    const bool high = place % (2 * FOLDED_BYTES) >= FOLDED_BYTES;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(block + place / (2 * FOLDED_BYTES) * FOLDED_BYTES + place % FOLDED_BYTES);
#pragma unroll
    for (int i = 0; i < WORD; i++) {
      const int code = static_cast<int>(word >> (8 * i + (high ? 4 : 0)) & 15);
      x[i] = LAYOUT == Layout::MXFP4_BLOCKS ? e2m1(code) : static_cast<float>(code - zero);
    }
  } else {
    const int place = LAYOUT == Layout::FP8_ROWS ? in_block * table.row_bytes + at : at / 4 * LINE_BYTES + in_block * 4;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(block + place);
#pragma unroll
    for (int i = 0; i < WORD; i++) {
      const uint8_t code = word >> (8 * i) & 255;
      x[i] = LAYOUT == Layout::FP8_BLOCKS || LAYOUT == Layout::FP8_ROWS ? to_float(fp8{code}) : static_cast<float>(static_cast<int8_t>(code));
    }
  }
}

template <class T, Layout LAYOUT>
__device__ __forceinline__ void gather_packed(T* __restrict__ out, const Packed& table, const uint32_t* __restrict__ ids, int width) {
  const size_t row = ids[blockIdx.x];
  T* to = out + static_cast<size_t>(blockIdx.x) * width;
  for (int at = threadIdx.x * WORD; at < width; at += blockDim.x * WORD) {
    float x[WORD], scale = 1.0f;
    int zero = MIDDLE;
    if (LAYOUT != Layout::BF16_BLOCKS) {
      const size_t group = row / BLOCK_ROWS * table.groups + at / table.group_cols;
      const size_t cell = group * BLOCK_ROWS + row % BLOCK_ROWS;
      if (LAYOUT == Layout::MXFP4_BLOCKS) scale = power_of_two(static_cast<const uint8_t*>(table.scales)[cell]);
      else scale = table.scales_are_f16 ? to_float(static_cast<const f16*>(table.scales)[cell]) : static_cast<const float*>(table.scales)[cell];
      if (table.zeros) zero = table.zeros[cell];
    }
    load_codes<LAYOUT>(x, table, row, at, zero);
#pragma unroll
    for (int i = 0; i < WORD; i++)
      if (at + i < width) to[at + i] = from_float<T>(x[i] * scale);
  }
}

#define GATHER(name, T, W)                                                                                             \
  extern "C" __global__ void gather_##name(T* out, const W* table, const uint32_t* ids, int width) {                   \
    gather<T, W>(out, table, ids, width);                                                                              \
  }                                                                                                                    \
  SIMT_EXPORT(gather_##name)

#define GATHER_PACKED(name, T, LAYOUT)                                                                                 \
  extern "C" __global__ void gather_##name(T* out, const uint8_t* data, const void* scales, const uint8_t* zeros,      \
                                           const uint32_t* ids, int width, int row_bytes, int groups, int group_cols,  \
                                           int scales_are_f16) {                                                       \
    const Packed table{data, scales, zeros, row_bytes, groups, group_cols, scales_are_f16 != 0};                       \
    gather_packed<T, Layout::LAYOUT>(out, table, ids, width);                                                          \
  }                                                                                                                    \
  SIMT_EXPORT(gather_##name)

#define GATHERS(suffix, T)                                \
  GATHER(f32_##suffix, T, float)                          \
  GATHER(bf16_##suffix, T, bf16)                          \
  GATHER(f16_##suffix, T, f16)                            \
  GATHER_PACKED(bf16_blocks_##suffix, T, BF16_BLOCKS)     \
  GATHER_PACKED(byte_blocks_##suffix, T, BYTE_BLOCKS)     \
  GATHER_PACKED(nibble_blocks_##suffix, T, NIBBLE_BLOCKS) \
  GATHER_PACKED(mxfp4_blocks_##suffix, T, MXFP4_BLOCKS)   \
  GATHER_PACKED(fp8_blocks_##suffix, T, FP8_BLOCKS)       \
  GATHER_PACKED(fp8_rows_##suffix, T, FP8_ROWS)

GATHERS(bf16, bf16)
GATHERS(f16, f16)
