// What every matmul kernel is told, which output columns a tile has, and what happens to a finished
// sum. `src/ops/cuda/product.rs` passes these parameters in the same order.
//
// A product is `out = x · weightᵀ (+ bias)` for up to three weights of one format (as q, k and v
// have), or the gated product of two: `activation(x · gateᵀ) * (x · upᵀ)`.
//
// Columns are dealt out in halves of sixteen, which are blocks of sixteen weight rows; two halves
// are a panel. A plain panel takes two neighbouring blocks of one weight; a gated one takes the same
// block of gate and of up, so that the activation happens where both sums are.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "dtype.cuh"
#include "simt.h"

constexpr int BLOCK_ROWS = 16;     // weight rows of a block: columns of a half
constexpr int PANEL_COLUMNS = 32;  // what the four rows of each of a warp's eight quads add up to
constexpr int X_STEP_BYTES = 128;  // of an activation row per step: 64 elements of two bytes, or 128 codes
constexpr int X_STEP_UNITS = X_STEP_BYTES / 16;

// Sixteen bytes: one load.
struct alignas(16) Words {
  uint32_t w[4];
};

// Element types of biases, scales and outputs.
enum ElementType : int { TYPE_F32 = 0, TYPE_BF16 = 1, TYPE_F16 = 2 };

struct Weight {
  const unsigned char* data;   // elements [columns, k], or codes in blocks
  const void* scales;          // [blocks, groups, 16]; null where there are none
  const unsigned char* zeros;  // as scales; null: 8 stands for 0 (int4)
  const void* bias;            // [columns], or null
  void* out;                   // [rows, columns]; of a gated product the gate's
  int columns;                 // 0: there is no such weight
  int bias_type;
};

struct Product {
  Weight weights[3];
  const unsigned char* x;  // [rows, x_pitch] bytes: elements or codes, zeros beyond k
  const float* x_scales;   // [rows], of codes
  Words* partial;          // sums over parts of k: [tiles, splits, words of a thread, threads]
  unsigned* arrived;       // [tiles], 0 before and after
  int activation;          // ActivationKind
  int rows;
  int k;            // elements of a weight row
  int x_pitch;      // a multiple of 16
  int block_bytes;  // of the codes of sixteen weight rows
  int scale_type;
  int group_shift;  // elements of a row that share a scale: a power of two, at least 32
  int groups;       // of a row
  int steps;   // of X_STEP_BYTES
  int splits;  // parts of k that different blocks of threads sum over
  int stages;  // steps in flight per warp, for few rows
  int out_type;
  const int* x_rows = nullptr;  // of formats that look for activations there: [rows], null for all in order
};

#define WEIGHT_PARAMETERS(i)                                                                                    \
  const unsigned char *data##i, const void *scales##i, const unsigned char *zeros##i, const void *bias##i, void *out##i, \
      int columns##i, int bias_type##i
#define WEIGHT(i) {data##i, scales##i, zeros##i, bias##i, out##i, columns##i, bias_type##i}
#define PRODUCT_PARAMETERS                                                                                  \
  WEIGHT_PARAMETERS(0), WEIGHT_PARAMETERS(1), WEIGHT_PARAMETERS(2), const unsigned char *x, const float *x_scales, \
      void *partial, unsigned *arrived, int activation, int rows, int k, int x_pitch, int block_bytes,     \
      int scale_type, int group_shift, int groups, int steps, int splits, int stages, int out_type
#define PRODUCT                                                                                                       \
  Product {                                                                                                           \
    {WEIGHT(0), WEIGHT(1), WEIGHT(2)}, x, x_scales, static_cast<Words*>(partial), arrived, activation, rows, k, x_pitch, \
        block_bytes, scale_type, group_shift, groups, steps, splits, stages, out_type                                       \
  }

// Some neighbouring halves: the weights that even and odd ones belong to, and the first block.
struct Tile {
  Weight even, odd;
  int first;
  bool gated;
};

// Tile `index` of tiles of `halves` halves each, which follow each other weight by weight.
__device__ __forceinline__ Tile find_tile(const Product& p, int index, int halves) {
  if (p.activation != ACTIVATION_NONE) return {p.weights[0], p.weights[1], index * halves / 2, true};
  Tile tile = {p.weights[0], p.weights[0], index * halves, false};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int blocks = (p.weights[i].columns + BLOCK_ROWS - 1) / BLOCK_ROWS, tiles = (blocks + halves - 1) / halves;
    if (index < tiles) return tile;
    index -= tiles;
    tile = {p.weights[i + 1], p.weights[i + 1], index * halves, false};
  }
  return tile;
}

// Sixteen output columns: which weight has them, and which of its blocks.
struct Half {
  Weight weight;
  int block;
  __device__ __forceinline__ bool exists() const { return block * BLOCK_ROWS < weight.columns; }
};

__device__ __forceinline__ Half find_half(const Tile& tile, int half) {
  const bool odd = half & 1;
  return {odd ? tile.odd : tile.even, tile.gated ? tile.first + half / 2 : tile.first + half};
}

// Element `at` of a float tensor.
__device__ __forceinline__ float read_element(const void* from, int type, size_t at) {
  if (type == TYPE_F32) return static_cast<const float*>(from)[at];
  if (type == TYPE_BF16) return to_float(static_cast<const bf16*>(from)[at]);
  return to_float(static_cast<const f16*>(from)[at]);
}

__device__ __forceinline__ void write_element(void* to, int type, size_t at, float value) {
  if (type == TYPE_F32) static_cast<float*>(to)[at] = value;
  else if (type == TYPE_BF16) static_cast<bf16*>(to)[at] = from_float<bf16>(value);
  else static_cast<f16*>(to)[at] = from_float<f16>(value);
}

// As written and read again.
__device__ __forceinline__ float rounded(float value, int type) {
  if (type == TYPE_BF16) return to_float(from_float<bf16>(value));
  return type == TYPE_F16 ? to_float(from_float<f16>(value)) : value;
}

__device__ __forceinline__ float bias_of(const Weight& weight, int column) {
  return weight.bias && column < weight.columns ? read_element(weight.bias, weight.bias_type, column) : 0.f;
}

// `sum · scale + bias`, rounded after each: the referee's arithmetic, from which a fused step strays.
__device__ __forceinline__ float finished(float sum, float scale, float bias) { return __fadd_rn(__fmul_rn(sum, scale), bias); }

// The fused product sees of gate and up what steps would hand on: the same bits either way.
__device__ __forceinline__ float gated_value(const Product& p, float gate, float up) {
  return activate(rounded(gate, p.out_type), p.activation) * rounded(up, p.out_type);
}
