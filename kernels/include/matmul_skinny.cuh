// Products of 1 to 16 rows, at the speed at which weights come from memory.
//
// Layout      Weights are the left operand of the tensor core: sixteen weight rows × eight tokens
//             per product, so that few tokens waste little. A warp takes 32 columns (a panel) and
//             every eighth step of k; the eight warps of a block add their sums in shared memory.
// Threads     Every lane copies the sixteen bytes of weights that it will multiply itself
//             (`cp.async`), `stages` steps ahead and on into the next panel, so that loads never
//             wait for arithmetic and no barrier stands in the loop. A block stays for several panels.
// Order       Eight sums, of steps w, w + 8, ... each, added in the order of warps: the bits of a
//             row depend on nothing but its activations and the weights.
// Bound       memory: a panel's bytes, once.
#pragma once

#include "weights.cuh"

constexpr int SKINNY_WARPS = 8;  // 64 KiB in flight per block with eight stages of int4: latency × bandwidth of an H100 per SM
constexpr int SKINNY_MAX_STAGES = 8;
constexpr int SKINNY_MAX_ROWS = 16;  // two tiles of eight tokens

template <class W>
struct SkinnyStage {
  static constexpr int W_BYTES = 2 * STEP_BYTES<W>;
  static constexpr int GROUPS_BYTES = 2 * STEP_GROUPS<W> * GROUP_BYTES<W>;
  static __device__ __forceinline__ int bytes(int rows) { return W_BYTES + GROUPS_BYTES + rows * X_STEP_BYTES; }
};

// What a block of threads computes at a time: a panel for up to `Product::rows` rows.
struct SkinnyItem {
  Tile tile;
  int first_row, num_rows;
};

// Items of a product of all rows.
struct Panels {
  static __device__ __forceinline__ SkinnyItem item(const Product& p, int index) { return {find_tile(p, index, 2), 0, p.rows}; }
};

// Where a warp is in its list of items and steps.
struct SkinnyCursor {
  int item;  // of this block's
  int step;
  __device__ __forceinline__ void advance(int steps) {
    step += SKINNY_WARPS;
    if (step >= steps) {
      step = threadIdx.x / 32;
      item += gridDim.x;
    }
  }
};

// What a lane copies for an item, at its first step.
template <class W>
struct SkinnySource {
  const unsigned char* rows[W::IS_ROW_MAJOR ? W::SLOTS_PER_PART : 1];
  SkinnyItem item;

  __device__ __forceinline__ SkinnySource(const Product& p, const SkinnyItem& item) : item(item) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Half half = find_half(item.tile, g / 4);
#pragma unroll
    for (int i = 0; i < (W::IS_ROW_MAJOR ? W::SLOTS_PER_PART : 1); i++) rows[i] = W::source(p, half, W::unit(0, i, g % 4, t));
  }

  // Slots lie at fixed distances from a row's, or from the block's, first.
  __device__ __forceinline__ const unsigned char* at(int step, int part, int slot) const {
    const int distance = 16 * (W::unit(part, slot, 0, 0) - (W::IS_ROW_MAJOR ? W::unit(0, slot, 0, 0) : 0));
    return rows[W::IS_ROW_MAJOR ? slot : 0] + size_t(step) * W::STEP_STRIDE + distance;
  }
};

template <class W>
__device__ __forceinline__ void skinny_fill(const Product& p, const SkinnySource<W>& source, int step, unsigned char* stage) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < W::SLOTS; i++) {
    const int part = i / W::SLOTS_PER_PART, slot = i % W::SLOTS_PER_PART;
    cp_async_16(stage + (i * 32 + lane) * 16, source.at(step, part, slot), W::valid(p, step, W::unit(part, slot, g % 4, t)));
  }
  stage += SkinnyStage<W>::W_BYTES;
  if constexpr (HAS_GROUPS<W>) {
    // [half, group of the step, unit]: at most 12 units.
    const int unit = lane % GROUP_UNITS<W>, group = lane / GROUP_UNITS<W> % STEP_GROUPS<W>, of = lane / (STEP_GROUPS<W> * GROUP_UNITS<W>);
    if (of < 2) {
      const Source from = group_source<W>(p, find_half(source.item.tile, of), step * 64 + 32 * group, unit);
      cp_async_16(stage + 16 * lane, from.from, from.valid);
    }
    stage += SkinnyStage<W>::GROUPS_BYTES;
  }
#pragma unroll
  for (int i = 0; i < SKINNY_MAX_ROWS * X_STEP_UNITS; i += 32) {
    const int row = (i + lane) / X_STEP_UNITS, unit = lane % X_STEP_UNITS, at = step * X_STEP_BYTES + 16 * unit;
    if (row >= source.item.num_rows) break;
    const unsigned char* from = p.x + size_t(W::x_row(p, source.item.first_row + row)) * p.x_pitch + at;
    cp_async_16(stage + row * X_STEP_BYTES + 16 * W::lane_place(row, unit), from, at < p.x_pitch);
  }
}

// [tokens / 8][rows of the panel / 16][element].
template <class Sum>
struct SkinnySums {
  Sum of[2][2][4];
};

// Adds the parts of a step that share scales, from part `first` on.
template <class W>
__device__ __forceinline__ void skinny_group(const Product& p, const unsigned char* stage, int num_rows, int first, SkinnySums<typename W::Sum>& sums) {
  constexpr int PARTS = GROUP_PARTS<W>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned char* groups = stage + SkinnyStage<W>::W_BYTES;
  const unsigned char* x = groups + SkinnyStage<W>::GROUPS_BYTES;
  Fragments w[PARTS];
  float scales[4] = {};
  uint32_t minus[4] = {};
  load_group<W>(p, groups + (g / 4 * STEP_GROUPS<W> + first / PARTS) * GROUP_BYTES<W>, scales, minus);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    Words raw[W::SLOTS_PER_PART];
#pragma unroll
    for (int slot = 0; slot < W::SLOTS_PER_PART; slot++) {
      const int i = W::SLOTS == W::SLOTS_PER_PART ? slot : (first + part) * W::SLOTS_PER_PART + slot;
      raw[slot] = reinterpret_cast<const Words*>(stage)[i * 32 + lane];
    }
    W::fragments(raw, first + part, minus, w[part]);
  }
#pragma unroll
  for (int tokens = 0; tokens < 2; tokens++) {
    if (8 * tokens >= num_rows) break;
    const int row = min(8 * tokens + g, num_rows - 1);  // what is behind the last nobody asks for
    Words b[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      b[part] = *reinterpret_cast<const Words*>(x + row * X_STEP_BYTES + 16 * W::lane_place(row, W::x_unit(first + part, t)));
    }
    multiply_tokens<W>(w, b, scales, sums.of[tokens]);
  }
}

// Sums of a warp to [row][column] of its part of `all`.
template <class Sum>
__device__ __forceinline__ void skinny_leave(const Product& p, Sum* all, SkinnySums<Sum>& sums) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int tokens = 0; tokens < 2; tokens++)
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = 8 * tokens + 2 * t + e % 2;
        if (row < p.rows) all[(warp * p.rows + row) * PANEL_COLUMNS + 4 * g + 2 * m + e / 2] = sums.of[tokens][m][e];
        sums.of[tokens][m][e] = 0;
      }
}

// A finished value of an item: the eight warps' sums in order, scaled.
template <class W>
__device__ __forceinline__ float skinny_value(const Product& p, const SkinnyItem& item, const typename W::Sum* all, int row, int column) {
  const Half half = find_half(item.tile, column / BLOCK_ROWS);
  typename W::Sum sum = all[row * PANEL_COLUMNS + column];
#pragma unroll
  for (int warp = 1; warp < SKINNY_WARPS; warp++) sum += all[(warp * p.rows + row) * PANEL_COLUMNS + column];
  const int out = half.block * BLOCK_ROWS + column % BLOCK_ROWS;
  return finished(float(sum), __fmul_rn(token_scale<W>(p, item.first_row + row), row_scale<W>(p, half.weight, out)), bias_of(half.weight, out));
}

template <class W>
__device__ __forceinline__ void skinny_finish(const Product& p, const SkinnyItem& item, const typename W::Sum* all) {
  const bool gated = item.tile.gated;
  const int columns = gated ? BLOCK_ROWS : PANEL_COLUMNS;
  for (int i = threadIdx.x; i < item.num_rows * columns; i += 32 * SKINNY_WARPS) {
    const int row = i / columns, column = i % columns;
    const Half half = find_half(item.tile, column / BLOCK_ROWS);
    const int out = half.block * BLOCK_ROWS + column % BLOCK_ROWS;
    if (out >= half.weight.columns) continue;
    float value = skinny_value<W>(p, item, all, row, column);
    if (gated) value = gated_value(p, value, skinny_value<W>(p, item, all, row, column + BLOCK_ROWS));
    write_element(half.weight.out, p.out_type, size_t(item.first_row + row) * half.weight.columns + out, value);
  }
}

// Waits until all but `pending` of this lane's groups of copies are there.
__device__ __forceinline__ void skinny_wait(int pending) {
  switch (pending) {
    case 0: return cp_async_wait<0>();
    case 1: return cp_async_wait<1>();
    case 2: return cp_async_wait<2>();
    case 3: return cp_async_wait<3>();
    case 4: return cp_async_wait<4>();
    case 5: return cp_async_wait<5>();
    default: return cp_async_wait<SKINNY_MAX_STAGES - 2>();
  }
}

// A block takes every gridDim.x-th of `num_items`, of which `items` knows more. Shared memory: the
// stages of eight warps, then their sums [8, rows, 32].
template <class W, class Items>
__device__ __forceinline__ void matmul_skinny(const Product& p, const Items& items, int num_items) {
  typedef typename W::Sum Sum;
  SIMT_DYN_SHARED(unsigned char, shared);
  const int warp = threadIdx.x / 32, stage_bytes = SkinnyStage<W>::bytes(p.rows);
  unsigned char* const stages = shared + warp * p.stages * stage_bytes;
  Sum* const all = reinterpret_cast<Sum*>(shared + SKINNY_WARPS * p.stages * stage_bytes);
  // A warp that has no step of a panel still takes part in adding up.
  SkinnyCursor ahead = {int(blockIdx.x), warp};
  if (warp >= p.steps) ahead.item = num_items;
  SkinnySource<W> source(p, items.item(p, blockIdx.x));
  const auto fetch = [&](int stage) {
    if (ahead.item < num_items) {
      skinny_fill<W>(p, source, ahead.step, stages + stage * stage_bytes);
      const int item = ahead.item;
      ahead.advance(p.steps);
      if (ahead.item != item && ahead.item < num_items) source = SkinnySource<W>(p, items.item(p, ahead.item));
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < p.stages - 1; stage++) fetch(stage);
  int read = 0, write = p.stages - 1;
  SkinnySums<Sum> sums = {};
  for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
    const int num_rows = items.item(p, index).num_rows;
#pragma unroll 1
    for (int step = warp; step < p.steps; step += SKINNY_WARPS) {
      skinny_wait(p.stages - 2);
      __syncwarp();  // the step has come for the warp, which has left the stage that is filled next
      fetch(write);
      const unsigned char* stage = stages + read * stage_bytes;
#pragma unroll
      for (int part = 0; part < 2; part += GROUP_PARTS<W>) skinny_group<W>(p, stage, num_rows, part, sums);
      read = read + 1 == p.stages ? 0 : read + 1;
      write = write + 1 == p.stages ? 0 : write + 1;
    }
    skinny_leave(p, all, sums);
    __syncthreads();
    skinny_finish<W>(p, items.item(p, index), all);  // asked for again, so that no register holds it
    __syncthreads();
  }
  cp_async_wait<0>();
}
