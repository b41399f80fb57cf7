// Products of the experts of a layer with the tokens that chose them, by the kernels for products of
// few and of many rows: what is theirs (columns, formats, tiles) stays theirs.
//
// Layout      Choices are sorted by expert (`moe.cu`): row r of such a product is the r-th choice.
//             A row tile is rows of one expert; a list of them lies in device memory, of which a
//             launch knows only the longest that there can be. `weights[i].data`, `scales` and
//             `zeros` of the parameters are expert 0's, all others' lie in a table of addresses.
// Order       That of the kernels, whose splits of k are not used: a row's bits depend neither on
//             the rows beside it nor on the size of tiles in shared memory.
// Bound       memory while experts have few rows: only the weights of chosen experts are read, once
//             per row tile. Tensor cores beyond.
#pragma once

#include "matmul_skinny.cuh"
#include "matmul_tiles.cuh"

struct ExpertMatrix {
  const unsigned char* data;
  const void* scales;          // null where there are none
  const unsigned char* zeros;  // null where there are none
};

constexpr int EXPERT_MATRICES = 3;  // gate, up, down

// Rows of one expert; none behind the last tile.
struct alignas(16) RowTile {
  int expert, first_row, num_rows, unused;
};

// A format whose activations stand where `x_rows` says.
template <class W>
struct OfTokens : W {
  static __device__ __forceinline__ int x_row(const Product& p, int row) { return p.x_rows ? p.x_rows[row] : row; }
};

#define EXPERT_PARAMETERS                                                                                        \
  const ExpertMatrix *matrices /* [experts, EXPERT_MATRICES] */, const RowTile *row_tiles /* [most row tiles] */, \
      const int *x_rows /* [rows], or null: all in order */, int first_matrix /* 0: gate and up; 2: down */
#define EXPERTS \
  Experts { matrices, row_tiles, first_matrix }

struct Experts {
  const ExpertMatrix* matrices;
  const RowTile* row_tiles;
  int first_matrix;

  static __device__ __forceinline__ void point(Weight& weight, const ExpertMatrix& to) {
    weight.data = to.data, weight.scales = to.scales, weight.zeros = to.zeros;
  }

  // The same columns of this expert.
  __device__ __forceinline__ Tile of_expert(Tile tile, int expert) const {
    const ExpertMatrix* const own = matrices + expert * EXPERT_MATRICES + first_matrix;
    point(tile.even, own[0]);
    point(tile.odd, own[tile.gated]);
    return tile;
  }
};

// Items of a skinny product: a panel of a row tile. Row tiles of an expert follow each other, so that
// its weights are read again from L2.
struct ExpertPanels {
  Experts experts;
  int num_row_tiles;
  __device__ __forceinline__ SkinnyItem item(const Product& p, int index) const {
    const RowTile rows = experts.row_tiles[index % num_row_tiles];
    return {experts.of_expert(find_tile(p, index / num_row_tiles, 2), rows.expert), rows.first_row, rows.num_rows};
  }
};

template <class W>
__device__ __forceinline__ void experts_skinny(const Product& p, const Experts& experts, int num_row_tiles, int panels) {
  const int num_items = num_row_tiles * panels;
  if (int(blockIdx.x) >= num_items) return;  // fewer experts were chosen than could have been
  matmul_skinny<OfTokens<W>>(p, ExpertPanels{experts, num_row_tiles}, num_items);
}

// Grid: row tiles as many as there can be, column tiles.
template <class S>
__device__ __forceinline__ void experts_tiles(Product& p, const Experts& experts) {
  SIMT_DYN_SHARED(unsigned char, shared);
  const RowTile rows = experts.row_tiles[blockIdx.x];
  if (rows.num_rows == 0) return;
  p.rows = rows.first_row + rows.num_rows;
  const Tile tile = experts.of_expert(find_tile(p, blockIdx.y, S::HALVES), rows.expert);
  const int live_rows = find_half(tile, S::warp_half()).exists() ? rows.num_rows - S::warp_row() : 0;
  typename S::Sums sums = {};
  run_steps<S>(p, tile, shared, rows.first_row, 0, p.steps, live_rows, sums);
  leave_sums<S>(shared, sums);
  finish<S>(p, tile, shared, rows.first_row);
}
