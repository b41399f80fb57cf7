// What latent attention needs beside attention: products with a matrix per head, and what is cached.
//
//   x [rows, heads, x_width], weight [heads, num_out, num_in], out [rows, heads, out_width], bf16
//   latent [tokens, rank + rope_dim]: before its norm, and before its last elements rotate
//
// head_matmul: out[r, h, n] = Σ x[r, h, k] · weight[h, n, k]. A CTA has a head, 64 columns and 16 rows (decode: four warps
// of 16 columns each) or 64 (prompts: four warps of 16 rows each). Slices of 64 elements of k come through cp.async three
// ahead. Sums are f32, in ascending order of k, so that a row's bits depend neither on other rows nor on the kernel.
//
// write_latent: a block per token normalises the latent, rotates its key and the last elements of every query, and stores
// the former in the cache and the latter behind the absorbed queries. Rows of a few KiB: bound by latency.
//
// Bound: memory. head_matmul reads num_heads · num_out · num_in · 2 bytes, once per sixteen rows or per 64; write_latent
// reads and writes every element once.
//
// Report: head_matmul_* threads=128 sass=HMMA,LDSM,LDGSTS.128
// Report: head_matmul_16 dynamic=34560
// Report: head_matmul_64 dynamic=55296
// Report: write_latent_* threads=256
#include "attention.cuh"
#include "reduce.cuh"

using attention::a_address;
using attention::b_address;
using attention::lane_id;
using attention::MmaBf16;
using attention::warp_id;

namespace {

constexpr int HEAD_WARPS = 4, HEAD_THREADS = 32 * HEAD_WARPS;
constexpr int HEAD_COLS = 64, SLICE = 64, SLICE_STRIDE = SLICE + 8, SLICES_AHEAD = 3;

struct HeadShape {
  int num_rows, num_heads, num_out, num_in, x_width, out_width;
};

// Slices of activations and weights in shared memory: [SLICES_AHEAD, ROWS + HEAD_COLS, SLICE_STRIDE].
template <int ROWS>
struct Slices {
  uint16_t* shared;
  const bf16 *x, *weight;  // this CTA's first row and column
  HeadShape shape;
  int num_rows, num_cols;  // those that there are

  __device__ __forceinline__ uint16_t* x_slice(int stage) const { return shared + stage * (ROWS + HEAD_COLS) * SLICE_STRIDE; }
  __device__ __forceinline__ uint16_t* weight_slice(int stage) const { return x_slice(stage) + ROWS * SLICE_STRIDE; }

  // Zeros beyond rows, columns and k.
  __device__ __forceinline__ void fetch(int slice, int stage) const {
    constexpr int CHUNKS = SLICE / 8;
    if (slice * SLICE < shape.num_in) {
      for (int i = threadIdx.x; i < (ROWS + HEAD_COLS) * CHUNKS; i += HEAD_THREADS) {
        const int row = i / CHUNKS, k = slice * SLICE + i % CHUNKS * 8;
        const bool is_x = row < ROWS, valid = k < shape.num_in && (is_x ? row < num_rows : row - ROWS < num_cols);
        const bf16* from = is_x ? x : weight;
        if (valid) from += (is_x ? size_t(row) * shape.num_heads * shape.x_width : size_t(row - ROWS) * shape.num_in) + k;
        cp_async_16(x_slice(stage) + row * SLICE_STRIDE + i % CHUNKS * 8, from, valid);
      }
    }
    cp_async_commit();
  }
};

template <int ROWS>
__device__ __forceinline__ void head_matmul(uint16_t* shared, bf16* out, const bf16* x, const bf16* weight, const HeadShape& shape) {
  // Column blocks of sixteen per warp.
  constexpr int BLOCKS = ROWS == 16 ? 1 : HEAD_COLS / 16;
  const int head = blockIdx.y, first_row = blockIdx.z * ROWS, first_col = blockIdx.x * HEAD_COLS;
  const Slices<ROWS> slices{shared,
                            x + (size_t(first_row) * shape.num_heads + head) * shape.x_width,
                            weight + (size_t(head) * shape.num_out + first_col) * shape.num_in,
                            shape,
                            shape.num_rows - first_row,
                            shape.num_out - first_col};
  const int num_slices = (shape.num_in + SLICE - 1) / SLICE;
  const int my_row = ROWS == 16 ? 0 : warp_id() * 16, my_col = ROWS == 16 ? warp_id() * 16 : 0;
  float sums[BLOCKS][2][4] = {};
#pragma unroll
  for (int slice = 0; slice < SLICES_AHEAD - 1; slice++) slices.fetch(slice, slice);
  for (int slice = 0; slice < num_slices; slice++) {
    const int stage = slice % SLICES_AHEAD;
    cp_async_wait<SLICES_AHEAD - 2>();
    __syncthreads();
    slices.fetch(slice + SLICES_AHEAD - 1, (slice + SLICES_AHEAD - 1) % SLICES_AHEAD);
    const uint16_t* const rows = a_address<SLICE_STRIDE>(slices.x_slice(stage)) + my_row * SLICE_STRIDE;
    const uint16_t* const cols = b_address<SLICE_STRIDE>(slices.weight_slice(stage)) + my_col * SLICE_STRIDE;
#pragma unroll
    for (int k = 0; k < SLICE; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, rows + k);
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        uint32_t b[4];
        ldmatrix_x4(b, cols + i * 16 * SLICE_STRIDE + k);
        mma_bf16(sums[i][0], a, b[0], b[1]);
        mma_bf16(sums[i][1], a, b[2], b[3]);
      }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < BLOCKS; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = first_row + my_row + lane_id() / 4 + e % 2 * 8, col = first_col + my_col + i * 16 + e / 2 * 8 + lane_id() % 4 * 2;
      if (row < shape.num_rows && col < shape.num_out)
        *reinterpret_cast<uint32_t*>(out + (size_t(row) * shape.num_heads + head) * shape.out_width + col) =
            MmaBf16::pack(sums[i][e / 2][e % 2 * 2], sums[i][e / 2][e % 2 * 2 + 1]);
    }
}

}  // namespace

// num_out is even, num_in and x_width are multiples of eight. Grid: (columns / 64, heads, rows / ROWS), rounded up.
#define HEAD_MATMUL(ROWS)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(HEAD_THREADS) head_matmul_##ROWS(                                           \
      bf16* out, const bf16* x, const bf16* weight, int num_rows, int num_heads, int num_out, int num_in, int x_width,     \
      int out_width) {                                                                                                     \
    SIMT_DYN_SHARED(uint16_t, shared);                                                                                     \
    head_matmul<ROWS>(shared, out, x, weight, HeadShape{num_rows, num_heads, num_out, num_in, x_width, out_width});        \
  }                                                                                                                        \
  SIMT_EXPORT(head_matmul_##ROWS)

HEAD_MATMUL(16)
HEAD_MATMUL(64)

namespace {

constexpr int LATENT_THREADS = 256;

struct LatentShape {
  int num_heads, rank, rope_dim, q_width, interleaved;
};

// A pair of elements, turned.
template <class C>
__device__ __forceinline__ void turn(C* to, const bf16* from, int pair, const LatentShape& shape, const float* cos, const float* sin) {
  const int first = shape.interleaved ? 2 * pair : pair, second = shape.interleaved ? first + 1 : pair + shape.rope_dim / 2;
  const float x = to_float(from[first]), y = to_float(from[second]);
  to[first] = from_float<C>(x * cos[pair] - y * sin[pair]);
  to[second] = from_float<C>(y * cos[pair] + x * sin[pair]);
}

template <class W, class C>
__device__ __forceinline__ void write_latent(
    C* cache, bf16* absorbed, const bf16* latent, const bf16* q, const W* weight, const uint32_t* positions, const float* cos,
    const float* sin, const uint32_t* slots, const LatentShape& shape, float eps) {
  const int half = shape.rope_dim / 2, dim = shape.rank + shape.rope_dim;
  const size_t token = blockIdx.x, angles = size_t(positions[token]) * half;
  const bf16* const from = latent + token * dim;
  // Slot s is vector s of the cache, because there is one head.
  C* const to = cache + size_t(slots[token]) * dim;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < shape.rank; i += LATENT_THREADS) squares = fmaf(to_float(from[i]), to_float(from[i]), squares);
  const float factor = 1.0f / sqrtf(block_sum(squares) / shape.rank + eps);
  for (int i = threadIdx.x; i < shape.rank; i += LATENT_THREADS) to[i] = from_float<C>(to_float(from[i]) * factor * to_float(weight[i]));
  for (int pair = threadIdx.x; pair < half; pair += LATENT_THREADS) turn(to + shape.rank, from + shape.rank, pair, shape, cos + angles, sin + angles);
  for (int i = threadIdx.x; i < shape.num_heads * half; i += LATENT_THREADS) {
    const size_t head = token * shape.num_heads + i / half;
    turn(absorbed + head * dim + shape.rank, q + (head + 1) * shape.q_width - shape.rope_dim, i % half, shape, cos + angles, sin + angles);
  }
}

}  // namespace

// absorbed [tokens, heads, rank + rope_dim], q [tokens, heads, q_width]; cos, sin [max_position, rope_dim / 2].
#define WRITE_LATENT(name, W, C)                                                                                           \
  extern "C" __global__ void __launch_bounds__(LATENT_THREADS) write_latent_##name(                                        \
      C* cache, bf16* absorbed, const bf16* latent, const bf16* q, const W* weight, const uint32_t* positions,             \
      const float* cos, const float* sin, const uint32_t* slots, int num_heads, int rank, int rope_dim, int q_width,       \
      int interleaved, float eps) {                                                                                        \
    write_latent<W, C>(cache, absorbed, latent, q, weight, positions, cos, sin, slots,                                     \
                       LatentShape{num_heads, rank, rope_dim, q_width, interleaved}, eps);                                 \
  }                                                                                                                        \
  SIMT_EXPORT(write_latent_##name)

WRITE_LATENT(wf32_kvbf16, float, bf16)
WRITE_LATENT(wbf16_kvbf16, bf16, bf16)
WRITE_LATENT(wf16_kvbf16, f16, bf16)
WRITE_LATENT(wf32_kvf16, float, f16)
WRITE_LATENT(wbf16_kvf16, bf16, f16)
WRITE_LATENT(wf16_kvf16, f16, f16)
