// Products of many rows: tiles of rows × columns that a block of threads computes from shared memory.
//
// Layout      A stage of shared memory holds one step (128 bytes of each of the tile's activation
//             rows), the weights' bytes as they lie in memory, and groups' scales and zero points.
//             Sixteen-byte units are moved within their 128 bytes (`place`, `x_place`), so that
//             eight lanes that load together meet all banks.
// Threads     WARPS_M × WARPS_N warps; a warp owns 8 · TOKENS rows × 32 · PANELS columns. `cp.async`
//             fills STAGES - 1 steps ahead; one barrier per step.
// Arithmetic  mma.sync with f32 or i32 sums, weights on the left (weights.cuh). Weights of two bytes
//             and their activations come by ldmatrix, which deals out registers in the order that
//             the tensor core takes; codes by plain loads of sixteen bytes.
// Order       A sum runs over k in ascending steps, whatever rows stand beside it. With `splits`
//             k is cut into parts that blocks sum alone; the block that comes last adds them in
//             ascending order. So a row's bits depend on k, the columns and `splits` alone.
// Bound       tensor cores; weights' bytes while rows are few.
#pragma once

#include "weights.cuh"

template <class W_, int TOKENS_, int WARPS_M, int WARPS_N, int PANELS_, int STAGES_>
struct Shape {
  typedef W_ W;
  static constexpr int TOKENS = TOKENS_, PANELS = PANELS_, STAGES = STAGES_;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int ROWS = 8 * TOKENS * WARPS_M;
  static constexpr int HALVES = 2 * PANELS * WARPS_N;
  static constexpr int WORDS = TOKENS * PANELS * 2;  // of a thread's sums
  static constexpr int X_BYTES = ROWS * X_STEP_BYTES;
  static constexpr int W_BYTES = HALVES * STEP_BYTES<W>;
  static constexpr int STAGE_BYTES = X_BYTES + W_BYTES + HALVES * STEP_GROUPS<W> * GROUP_BYTES<W>;
  static constexpr int STRIDE = HALVES * BLOCK_ROWS + 4;  // of rows of finished sums: eight lanes meet all banks
  static_assert(4 * ROWS * STRIDE <= STAGES * STAGE_BYTES, "finished sums lie where stages were");
  typedef typename W::Sum Sums[TOKENS][PANELS][2][4];
  // A warp's first row and first half in the tile.
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / WARPS_N * 8 * TOKENS; }
  static __device__ __forceinline__ int warp_half() { return threadIdx.x / 32 % WARPS_N * 2 * PANELS; }
};

// Activation rows of a step. A thread copies the same unit of rows that are THREADS / 8 apart;
// rows behind the last are copies of it, whose sums nobody asks for.
template <class S>
__device__ __forceinline__ void fill_x(const Product& p, unsigned char* stage, int first_row, int step) {
  constexpr int APART = S::THREADS / X_STEP_UNITS;
  const int row = threadIdx.x / X_STEP_UNITS, unit = threadIdx.x % X_STEP_UNITS, at = step * X_STEP_BYTES + 16 * unit;
  unsigned char* const to = stage + row * X_STEP_BYTES + 16 * S::W::x_place(row, unit);
#pragma unroll
  for (int i = 0; i < S::ROWS / APART; i++) {
    const int from = min(first_row + row + i * APART, p.rows - 1);
    cp_async_16(to + i * APART * X_STEP_BYTES, p.x + size_t(S::W::x_row(p, from)) * p.x_pitch + at, at < p.x_pitch);
  }
}

// Weights of a step: a thread copies the same unit of several halves.
template <class S>
__device__ __forceinline__ void fill_weights(const Product& p, const Tile& tile, unsigned char* stage, int step) {
  typedef typename S::W W;
  constexpr int UNITS = STEP_BYTES<W> / 16, APART = S::THREADS / UNITS;
  const int first = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
  const bool valid = W::valid(p, step, unit);
#pragma unroll
  for (int i = 0; i < S::HALVES / APART; i++) {
    const int half = first + i * APART;
    const unsigned char* from = W::source(p, find_half(tile, half), unit) + size_t(step) * W::STEP_STRIDE;
    cp_async_16(stage + half * STEP_BYTES<W> + 16 * W::place(half, unit), from, valid);
  }
}

template <class S>
__device__ __forceinline__ void fill_groups(const Product& p, const Tile& tile, unsigned char* stage, int step) {
  typedef typename S::W W;
  constexpr int UNITS = STEP_GROUPS<W> * GROUP_UNITS<W>;  // of a half
  static_assert(S::HALVES * UNITS <= S::THREADS, "a unit per thread");
  const int i = threadIdx.x, group = i % UNITS / GROUP_UNITS<W>;
  if (i >= S::HALVES * UNITS) return;
  const Source source = group_source<W>(p, find_half(tile, i / UNITS), step * 64 + 32 * group, i % GROUP_UNITS<W>);
  cp_async_16(stage + 16 * i, source.from, source.valid);
}

template <class S>
__device__ __forceinline__ void fill(const Product& p, const Tile& tile, unsigned char* stage, int first_row, int step) {
  fill_x<S>(p, stage, first_row, step);
  fill_weights<S>(p, tile, stage + S::X_BYTES, step);
  if constexpr (HAS_GROUPS<typename S::W>) fill_groups<S>(p, tile, stage + S::X_BYTES + S::W_BYTES, step);
}

// Fragments of one panel's 32 rows for one part of a step.
template <class W>
__device__ __forceinline__ void load_weights(const unsigned char* panel, const uint32_t (&minus)[4], int part, Fragments& fragments) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (W::BY_LDMATRIX) {
    // Matrices: rows 4 i + 2 m and the next ones, of two neighbouring units.
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const int row = 4 * (lane % 8) + 2 * m + lane / 8 % 2, of = row / BLOCK_ROWS;
        const int unit = row % BLOCK_ROWS * X_STEP_UNITS + 4 * part + 2 * q + lane / 16;
        ldmatrix_x4(fragments[q][m], panel + of * STEP_BYTES<W> + 16 * W::place(of, unit));
      }
  } else {
    Words raw[W::SLOTS_PER_PART];
#pragma unroll
    for (int slot = 0; slot < W::SLOTS_PER_PART; slot++) {
      const int unit = W::place(g / 4, W::unit(part, slot, g % 4, t));
      raw[slot] = *reinterpret_cast<const Words*>(panel + g / 4 * STEP_BYTES<W> + 16 * unit);
    }
    W::fragments(raw, part, minus, fragments);
  }
}

// What eight tokens bring to a part of a step.
template <class W>
__device__ __forceinline__ Words load_tokens(const unsigned char* x, int part) {
  const int lane = threadIdx.x % 32;
  Words words;
  if constexpr (W::BY_LDMATRIX) {
    ldmatrix_x4(words.w, x + lane % 8 * X_STEP_BYTES + 16 * W::x_place(lane % 8, 4 * part + lane / 8));
  } else {
    const int g = lane / 4, t = lane % 4;
    words = *reinterpret_cast<const Words*>(x + g * X_STEP_BYTES + 16 * W::x_place(g, W::x_unit(part, t)));
  }
  return words;
}

// Adds the parts of a step that share scales, from part `first` on, to the sums of a warp; rows
// from `live_rows` of it on are nobody's.
template <class S>
__device__ __forceinline__ void multiply_group(const Product& p, const unsigned char* stage, int live_rows, int first, typename S::Sums& sums) {
  typedef typename S::W W;
  constexpr int PARTS = GROUP_PARTS<W>;
  const int g = threadIdx.x % 32 / 4, group = first / PARTS;
  const unsigned char* weights = stage + S::X_BYTES + S::warp_half() * STEP_BYTES<W>;
  const unsigned char* groups = stage + S::X_BYTES + S::W_BYTES + ((S::warp_half() + g / 4) * STEP_GROUPS<W> + group) * GROUP_BYTES<W>;
  Fragments w[S::PANELS][PARTS];
  float scales[S::PANELS][4] = {};
#pragma unroll
  for (int panel = 0; panel < S::PANELS; panel++) {
    uint32_t minus[4] = {uint32_t(p.k) >> 31};
    load_group<W>(p, groups + 2 * panel * STEP_GROUPS<W> * GROUP_BYTES<W>, scales[panel], minus);
#pragma unroll
    for (int part = 0; part < PARTS; part++) load_weights<W>(weights + 2 * panel * STEP_BYTES<W>, minus, first + part, w[panel][part]);
  }
#pragma unroll
  for (int tokens = 0; tokens < S::TOKENS; tokens++) {
    if (8 * tokens >= live_rows) break;
    Words x[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) x[part] = load_tokens<W>(stage + (S::warp_row() + 8 * tokens) * X_STEP_BYTES, first + part);
#pragma unroll
    for (int panel = 0; panel < S::PANELS; panel++) multiply_tokens<W>(w[panel], x, scales[panel], sums[tokens][panel]);
  }
}

// Sums of steps first..last into `sums`.
template <class S>
__device__ __forceinline__ void run_steps(const Product& p, const Tile& tile, unsigned char* shared, int first_row, int first, int last, int live_rows, typename S::Sums& sums) {
#pragma unroll
  for (int stage = 0; stage < S::STAGES - 1; stage++) {
    if (first + stage < last) fill<S>(p, tile, shared + stage * S::STAGE_BYTES, first_row, first + stage);
    cp_async_commit();
  }
  int read = 0, write = S::STAGES - 1;
#pragma unroll 1
  for (int step = first; step < last; step++) {
    cp_async_wait<S::STAGES - 2>();
    __syncthreads();  // the step has come for all, and all have left the stage that is filled next
    if (step + S::STAGES - 1 < last) fill<S>(p, tile, shared + write * S::STAGE_BYTES, first_row, step + S::STAGES - 1);
    cp_async_commit();
    const unsigned char* stage = shared + read * S::STAGE_BYTES;
    if (live_rows > 0) {
#pragma unroll
      for (int part = 0; part < 2; part += GROUP_PARTS<typename S::W>) multiply_group<S>(p, stage, live_rows, part, sums);
    }
    read = read + 1 == S::STAGES ? 0 : read + 1;
    write = write + 1 == S::STAGES ? 0 : write + 1;
  }
  cp_async_wait<0>();
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(int32_t x) { return uint32_t(x); }
__device__ __forceinline__ void add_bits(float& sum, uint32_t bits) { sum += __uint_as_float(bits); }
__device__ __forceinline__ void add_bits(int32_t& sum, uint32_t bits) { sum += int32_t(bits); }

__device__ __forceinline__ Words load_past_l1(const Words* from) {
  const uint4 x = __ldcg(reinterpret_cast<const uint4*>(from));
  return {{x.x, x.y, x.z, x.w}};
}

// Leaves this block's sums for the block that comes last at this tile; that one gets the sums of
// all, added to zeros in the order of k. Returns whether this is the one.
template <class S>
__device__ __forceinline__ bool add_splits(const Product& p, int tile, int split, int live_rows, typename S::Sums& sums) {
  Words* const all = p.partial + size_t(tile) * p.splits * S::WORDS * S::THREADS + threadIdx.x;
#pragma unroll
  for (int tokens = 0; tokens < S::TOKENS; tokens++)
#pragma unroll
    for (int i = 0; i < 2 * S::PANELS; i++) {
      auto& sum = sums[tokens][i / 2][i % 2];
      const Words words = {{bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])}};
      if (8 * tokens < live_rows) all[(split * S::WORDS + tokens * 2 * S::PANELS + i) * S::THREADS] = words;
      sum[0] = sum[1] = sum[2] = sum[3] = 0;
    }
  __threadfence();
  __shared__ unsigned order;
  __syncthreads();
  if (threadIdx.x == 0) order = atomicAdd(&p.arrived[tile], 1u);
  __syncthreads();
  if (order + 1 != unsigned(p.splits)) return false;
  __threadfence();
  if (threadIdx.x == 0) p.arrived[tile] = 0;
#pragma unroll 1
  for (int from = 0; from < p.splits; from++) {
#pragma unroll
    for (int tokens = 0; tokens < S::TOKENS; tokens++) {
      if (8 * tokens >= live_rows) break;
#pragma unroll
      for (int i = 0; i < 2 * S::PANELS; i++) {
        const Words words = load_past_l1(&all[(from * S::WORDS + tokens * 2 * S::PANELS + i) * S::THREADS]);
#pragma unroll
        for (int e = 0; e < 4; e++) add_bits(sums[tokens][i / 2][i % 2][e], words.w[e]);
      }
    }
  }
  return true;
}

// Sums of a warp to [row][column] of the tile: four neighbouring columns at a time.
template <class S>
__device__ __forceinline__ void leave_sums(unsigned char* shared, const typename S::Sums& sums) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  __syncthreads();  // all are done with the stages
#pragma unroll
  for (int tokens = 0; tokens < S::TOKENS; tokens++)
#pragma unroll
    for (int panel = 0; panel < S::PANELS; panel++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const auto& sum = sums[tokens][panel];
        const int row = S::warp_row() + 8 * tokens + 2 * t + e, column = S::warp_half() * BLOCK_ROWS + panel * PANEL_COLUMNS + 4 * g;
        const Words words = {{bits_of(sum[0][e]), bits_of(sum[0][2 + e]), bits_of(sum[1][e]), bits_of(sum[1][2 + e])}};
        *reinterpret_cast<Words*>(shared + 4 * (row * S::STRIDE + column)) = words;
      }
  __syncthreads();
}

// Eight finished values of neighbouring columns of a half.
template <class W>
__device__ __forceinline__ void finish_columns(const Product& p, const unsigned char* from, int row, const Half& half, int column, float (&values)[8]) {
  const float of_row = token_scale<W>(p, row);
  const auto* sums = reinterpret_cast<const typename W::Sum*>(from);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float scale = __fmul_rn(of_row, row_scale<W>(p, half.weight, column + i));
    values[i] = finished(float(sums[i]), scale, bias_of(half.weight, column + i));
  }
}

__device__ __forceinline__ void store_columns(const Product& p, const Weight& weight, int row, int column, const float (&values)[8]) {
  const size_t at = size_t(row) * weight.columns + column;
  if (p.out_type == TYPE_BF16 && weight.columns % 8 == 0) {
    Pack<bf16, 8> pack;
#pragma unroll
    for (int i = 0; i < 8; i++) pack.x[i] = from_float<bf16>(values[i]);
    store_pack<bf16, 8>(static_cast<bf16*>(weight.out) + at, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (column + i < weight.columns) write_element(weight.out, p.out_type, at + i, values[i]);
}

// Scales, biases, activation: the tile's sums become outputs.
template <class S>
__device__ __forceinline__ void finish(const Product& p, const Tile& tile, const unsigned char* shared, int first_row) {
  typedef typename S::W W;
  const int runs = tile.gated ? S::HALVES : 2 * S::HALVES;  // of eight columns
#pragma unroll 1
  for (int i = threadIdx.x; i < S::ROWS * runs; i += S::THREADS) {
    const int row = i / runs, at = i % runs / 2 * (tile.gated ? 2 : 1), offset = i % 2 * 8;
    const Half half = find_half(tile, at);
    const int column = half.block * BLOCK_ROWS + offset;
    if (first_row + row >= p.rows || column >= half.weight.columns) continue;
    const unsigned char* sums = shared + 4 * (row * S::STRIDE + at * BLOCK_ROWS + offset);
    float values[8];
    finish_columns<W>(p, sums, first_row + row, half, column, values);
    if (tile.gated) {
      float up[8];
      finish_columns<W>(p, sums + 4 * BLOCK_ROWS, first_row + row, find_half(tile, at + 1), column, up);
#pragma unroll
      for (int j = 0; j < 8; j++) values[j] = gated_value(p, values[j], up[j]);
    }
    store_columns(p, half.weight, first_row + row, column, values);
  }
}

// Grid: row tiles, column tiles, splits. Neighbouring blocks share weights, which stay in L2.
template <class S>
__device__ __forceinline__ void matmul_tiles(const Product& p) {
  SIMT_DYN_SHARED(unsigned char, shared);
  const Tile tile = find_tile(p, blockIdx.y, S::HALVES);
  const int first_row = blockIdx.x * S::ROWS;
  const int first = int(int64_t(p.steps) * blockIdx.z / p.splits), last = int(int64_t(p.steps) * (blockIdx.z + 1) / p.splits);
  // A warp whose first column does not exist has nothing to do but to copy.
  const int live_rows = find_half(tile, S::warp_half()).exists() ? p.rows - first_row - S::warp_row() : 0;
  typename S::Sums sums = {};
  run_steps<S>(p, tile, shared, first_row, first, last, live_rows, sums);
  if (p.splits > 1 && !add_splits<S>(p, blockIdx.y * gridDim.x + blockIdx.x, blockIdx.z, live_rows, sums)) return;
  leave_sums<S>(shared, sums);
  finish<S>(p, tile, shared, first_row);
}
