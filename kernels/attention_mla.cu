// Attention over latents (DeepSeek's multi-head latent attention, absorbed): a cached vector is the key of all heads,
// and its first `rank` elements are their value.
//
// Layout: out [tokens, heads, rank], q [tokens, heads, dim], cache [blocks, block_size, dim], dim = rank + what rotates.
//
// Decomposition: a CTA leads the queries of sixteen heads of one token, or of 32, past tiles of 32 cached vectors, which
// come through cp.async one tile ahead and are read once for all of these heads, as keys and as values. Four warps are a
// team of sixteen rows. Two of them compute the scores of sixteen keys each over the first half of `dim`, the other two
// over the second half; the first two add these up, and weigh; then all four sum their own columns of values. Prompts
// run the same way, a CTA per token: sixteen heads and more are rows enough for a product.
//
// A context is cut into parts that are joined in ascending order (attention.cuh), in registers or, where tokens are too
// few to fill the GPU, by attention_join after `gridDim.x` CTAs shared the parts: no bit depends on it, nor on how many
// teams a CTA has. Grids come from shapes alone.
//
// Bound: memory with sixteen heads (context · dim · 2 bytes per token); from 64 heads on tensor cores. Two stages are
// 73 KiB, so that two CTAs of sixteen rows run on an SM of sm_90, and one on those of sm_86 and sm_89.
//
// Report: attention_mla_* sass=HMMA,LDSM,LDGSTS.128
// Report: attention_mla_*_h16 threads=128 dynamic=97152
// Report: attention_mla_*_h32 threads=256 dynamic=119552
// Report: attention_mla_*_h32 only=80,90a: where blocks have less shared memory, all heads go through h16
#include "attention.cuh"

using namespace attention;

namespace {

constexpr int TEAM_WARPS = 4;
constexpr int MLA_TILE = 32;               // two stages and sixteen queries fit the 99 KiB of sm_86
constexpr int MLA_STRIPES = MLA_TILE / STRIPE;
constexpr int MAX_RANK = 512, MAX_DIM = 576;
constexpr int DIM_STRIDE = MAX_DIM + 8;    // rows of an ldmatrix lie in different banks
constexpr int MY_BLOCKS = MAX_RANK / 16 / TEAM_WARPS;
constexpr int MLA_TILES_PER_PART = PART / MLA_TILE;

// What warps of a team tell each other about a tile.
struct TeamExchange {
  uint4 weights[MLA_STRIPES][32];    // A fragments
  float4 halves[MLA_STRIPES][2][32]; // scores over the second half of dim
  float2 totals[MLA_STRIPES][32];    // sums of weights, of a lane's two rows
  float largest[MLA_STRIPES][MMA_ROWS];
};

// Cached vectors in shared memory: [2 stages, MLA_TILE, DIM_STRIDE].
struct LatentTiles {
  uint16_t* shared;
  PagedCache cache;  // head_dim is dim

  __device__ __forceinline__ const uint16_t* stage(int stage) const { return shared + stage * MLA_TILE * DIM_STRIDE; }

  // Starts loading a tile, a warp per vector; zeros beyond the context, because a weight of 0 does not make up for a NaN.
  __device__ __forceinline__ void fetch(int tile, int stage) const {
    const int chunks = cache.head_dim / 8;
    for (int row = warp_id(); row < MLA_TILE; row += blockDim.x / 32) {
      const int position = tile * MLA_TILE + row;
      const bool valid = position < cache.context_len;
      const unsigned char* const from = cache.k + (valid ? cache.vector(position) * cache.head_dim * 2 : 0);
      uint16_t* const to = shared + (stage * MLA_TILE + row) * DIM_STRIDE;
      for (int chunk = lane_id(); chunk < chunks; chunk += 32) cp_async_16(to + 8 * chunk, from + 16 * chunk, valid);
    }
    cp_async_commit();
  }
};

// Four warps and sixteen rows.
template <class Cache>
struct Team {
  using Mma = typename Cache::Mma;

  const uint16_t* q;  // [MMA_ROWS, DIM_STRIDE]
  TeamExchange* exchange;
  int num_steps, rank;  // sixteens of dim; elements of a value
  float part_sums[MY_BLOCKS][2][4], sums[MY_BLOCKS][2][4];
  Softmax softmax[2];
  Joined joined[2];

  __device__ __forceinline__ static int warp() { return warp_id() % TEAM_WARPS; }
  __device__ __forceinline__ static int stripe() { return warp() % MLA_STRIPES; }
  __device__ __forceinline__ static bool has_first_half() { return warp() < MLA_STRIPES; }
  __device__ __forceinline__ static int block(int i) { return warp() + i * TEAM_WARPS; }
  __device__ __forceinline__ static int col(int i, int n) { return block(i) * 16 + 8 * n + lane_id() % 4 * 2; }

  __device__ __forceinline__ void start_part() {
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) part_sums[i][e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) softmax[r] = Softmax();
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) sums[i][e / 4][e % 4] = 0.0f;
    start_part();
  }

  // Products of this warp's sixteen keys with its half of the queries.
  __device__ __forceinline__ void score_half(float (&s)[2][4], const uint16_t* vectors) const {
    const int middle = (num_steps + 1) / 2, first = has_first_half() ? 0 : middle, end = has_first_half() ? middle : num_steps;
    const uint16_t* const queries = a_address<DIM_STRIDE>(q);
    const uint16_t* const keys = b_address<DIM_STRIDE>(vectors) + stripe() * STRIPE * DIM_STRIDE;
#pragma unroll
    for (int e = 0; e < 8; e++) s[e / 4][e % 4] = 0.0f;
#pragma unroll 6
    for (int k = first; k < end; k++) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, queries + 16 * k);
      ldmatrix_x4(b, keys + 16 * k);
      Mma::mma(s[0], a, b[0], b[1]);
      Mma::mma(s[1], a, b[2], b[3]);
    }
  }

  // Adds the other half; tells the largest score of each row.
  __device__ __forceinline__ void finish_scores(float (&s)[2][4], int key, const Scoring& scoring, int position, bool is_masked) const {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float4 other = exchange->halves[stripe()][n][lane_id()];
      s[n][0] = __fadd_rn(s[n][0], other.x), s[n][1] = __fadd_rn(s[n][1], other.y);
      s[n][2] = __fadd_rn(s[n][2], other.z), s[n][3] = __fadd_rn(s[n][3], other.w);
    }
    scoring.template finish<Cache>(s, key + stripe() * STRIPE, [&](int) { return position; }, is_masked, nullptr);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float largest = quad_max(fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1])));
      if (lane_id() % 4 == 0) exchange->largest[stripe()][lane_id() / 4 + 8 * r] = largest;
    }
  }

  // Weights of all keys times this warp's columns of values.
  __device__ __forceinline__ void add_values(const uint16_t* vectors, const float (&factors)[2], float (&totals)[2]) {
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) part_sums[i][e / 4][e % 4] *= factors[e % 4 / 2];
    const uint16_t* const values = a_address<DIM_STRIDE>(vectors);
#pragma unroll
    for (int j = 0; j < MLA_STRIPES; j++) {
      const float2 stripe_totals = exchange->totals[j][lane_id()];
      totals[0] = j == 0 ? stripe_totals.x : __fadd_rn(totals[0], stripe_totals.x);
      totals[1] = j == 0 ? stripe_totals.y : __fadd_rn(totals[1], stripe_totals.y);
      const uint4 weights = exchange->weights[j][lane_id()];
      const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int i = 0; i < MY_BLOCKS; i++) {
        if (block(i) * 16 >= rank) continue;
        uint32_t b[4];
        ldmatrix_x4_trans(b, values + j * STRIPE * DIM_STRIDE + 16 * block(i));
        Mma::mma(part_sums[i][0], a, b[0], b[1]);
        Mma::mma(part_sums[i][1], a, b[2], b[3]);
      }
    }
  }

  // One tile; `key` is its first. All teams of the CTA call it.
  __device__ __forceinline__ void attend(const uint16_t* vectors, int key, const Scoring& scoring, int position, bool is_masked) {
    float s[2][4], factors[2], bases[2], totals[2] = {};
    score_half(s, vectors);
    if (!has_first_half()) {
#pragma unroll
      for (int n = 0; n < 2; n++) exchange->halves[stripe()][n][lane_id()] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
    }
    __syncthreads();
    if (has_first_half()) finish_scores(s, key, scoring, position, is_masked);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = lane_id() / 4 + 8 * r;
      factors[r] = softmax[r].raise(fmaxf(exchange->largest[0][row], exchange->largest[1][row]), scoring.factor);
      bases[r] = softmax[r].base();
    }
    if (has_first_half()) {
      uint32_t a[4];
      weigh_stripe<Cache>(s, scoring.factor, bases, nullptr, totals, a);
      exchange->weights[stripe()][lane_id()] = make_uint4(a[0], a[1], a[2], a[3]);
      exchange->totals[stripe()][lane_id()] = make_float2(totals[0], totals[1]);
    }
    __syncthreads();
    add_values(vectors, factors, totals);
#pragma unroll
    for (int r = 0; r < 2; r++) softmax[r].total = __fmaf_rn(softmax[r].total, factors[r], totals[r]);
  }

  __device__ __forceinline__ void join_part(float factor) {
    float factors[2][2];
#pragma unroll
    for (int r = 0; r < 2; r++) joined[r].join(__fmul_rn(softmax[r].largest, factor), quad_sum(softmax[r].total), factors[r]);
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++)
        sums[i][e / 4][e % 4] = Joined::join_sums(sums[i][e / 4][e % 4], part_sums[i][e / 4][e % 4], factors[e % 4 / 2]);
    start_part();
  }

  // Leaves a part of the row that elements 2r and 2r + 1 belong to; `total` is its sum of weights.
  __device__ __forceinline__ void leave_part(int r, float total, float factor, float* states, float* part, size_t slot) const {
    if (warp() == 0 && lane_id() % 4 == 0)
      *reinterpret_cast<float2*>(states + 2 * slot) = make_float2(__fmul_rn(softmax[r].largest, factor), total);
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int n = 0; n < 2; n++)
        if (col(i, n) < rank)
          *reinterpret_cast<float2*>(part + slot * rank + col(i, n)) = make_float2(part_sums[i][n][2 * r], part_sums[i][n][2 * r + 1]);
  }

  // `out` is the row's vector.
  __device__ __forceinline__ void store(int r, bf16* out) const {
    const float inverse = joined[r].inverse();
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int n = 0; n < 2; n++)
        if (col(i, n) < rank)
          *reinterpret_cast<uint32_t*>(out + col(i, n)) = MmaBf16::pack(__fmul_rn(sums[i][n][2 * r], inverse), __fmul_rn(sums[i][n][2 * r + 1], inverse));
  }
};

// The sequence that a token belongs to: the last one that begins at or before it.
__device__ __forceinline__ int sequence_of(int token, const uint32_t* cu_seqlens_q, int num_seqs) {
  int low = 0, high = num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (int(cu_seqlens_q[middle]) <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Queries of this CTA's heads as a tile in shared memory; zeros beyond the last head.
template <class Mma>
__device__ __forceinline__ void load_heads(uint16_t* tile, const bf16* q, int num_rows, int rows, int dim) {
  for (int row = warp_id(); row < rows; row += blockDim.x / 32)
    for (int chunk = lane_id(); chunk < dim / 8; chunk += 32) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < num_rows) x = *reinterpret_cast<const uint4*>(q + size_t(row) * dim + 8 * chunk);
      *reinterpret_cast<uint4*>(tile + row * DIM_STRIDE + 8 * chunk) = make_uint4(Mma::query(x.x), Mma::query(x.y), Mma::query(x.z), Mma::query(x.w));
    }
}

template <class Cache, int TEAMS>
__device__ __forceinline__ void attend_latents(
    unsigned char* shared, bf16* out, const bf16* q, float* states, float* part_sums, PagedCache cache, const uint32_t* block_tables,
    const uint32_t* cu_seqlens_q, const uint32_t* context_lens, const Scoring scoring, int num_seqs, int max_parts, int table_width,
    int num_heads, int rank) {
  const int token = blockIdx.z, num_splits = gridDim.x, dim = cache.head_dim, first_head = blockIdx.y * TEAMS * MMA_ROWS;
  const int seq = sequence_of(token, cu_seqlens_q, num_seqs);
  const int position = int(context_lens[seq]) - int(cu_seqlens_q[seq + 1]) + token;
  cache.table = block_tables + size_t(seq) * table_width;
  cache.context_len = position + 1;
  const int end = position < 0 ? 0 : position / MLA_TILE + 1;
  int tile = blockIdx.x * MLA_TILES_PER_PART, stage = 0;
  // Alone, a CTA also finishes rows that see nothing.
  if (num_splits > 1 && tile >= end) return;

  const LatentTiles tiles{reinterpret_cast<uint16_t*>(shared), cache};
  if (tile < end) tiles.fetch(tile, stage);
  uint16_t* const q_tile = tiles.shared + 2 * MLA_TILE * DIM_STRIDE;
  const size_t first_row = size_t(token) * num_heads + first_head;
  load_heads<typename Cache::Mma>(q_tile, q + first_row * dim, num_heads - first_head, TEAMS * MMA_ROWS, dim);
  const int team_id = warp_id() / TEAM_WARPS;
  Team<Cache> team;
  team.q = q_tile + team_id * MMA_ROWS * DIM_STRIDE;
  team.exchange = reinterpret_cast<TeamExchange*>(q_tile + TEAMS * MMA_ROWS * DIM_STRIDE) + team_id;
  team.num_steps = dim / 16, team.rank = rank;
  team.start();

  // From a part's last tile on to the first of the next part that is this CTA's.
  const auto next = [&](int tile) { return (tile + 1) % MLA_TILES_PER_PART == 0 ? tile + 1 + (num_splits - 1) * MLA_TILES_PER_PART : tile + 1; };
  while (tile < end) {
    const int key = tile * MLA_TILE, next_tile = next(tile);
    cp_async_wait<0>();
    __syncthreads();
    if (next_tile < end) tiles.fetch(next_tile, 1 - stage);
    team.attend(tiles.stage(stage), key, scoring, position, key + MLA_TILE > position + 1);
    if (next_tile != tile + 1 || next_tile % MLA_TILES_PER_PART == 0 || next_tile >= end) {
      if (num_splits == 1) {
        team.join_part(scoring.factor);
      } else {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = team_id * MMA_ROWS + lane_id() / 4 + 8 * r;
          const float total = quad_sum(team.softmax[r].total);
          if (first_head + row < num_heads) team.leave_part(r, total, scoring.factor, states, part_sums, (first_row + row) * max_parts + tile / MLA_TILES_PER_PART);
        }
        team.start_part();
      }
    }
    tile = next_tile, stage = 1 - stage;
  }
  if (num_splits > 1) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = team_id * MMA_ROWS + lane_id() / 4 + 8 * r;
    if (first_head + row < num_heads) team.store(r, out + (first_row + row) * rank);
  }
}

}  // namespace

// states [tokens, heads, max_parts, 2] and sums [tokens, heads, max_parts, rank]: what parts yield, unused if the grid's x
// is 1; block_tables [num_seqs, table_width]; cu_seqlens_q [num_seqs + 1]; context_lens [num_seqs]; block_shift: log2 of the
// block size. Grid: (CTAs that share a context, heads / rows of a CTA rounded up, tokens). rank and dim are multiples of 16.
#define ATTENTION_MLA(name, Cache, TEAMS)                                                                                    \
  extern "C" __global__ void __launch_bounds__(32 * TEAM_WARPS * TEAMS, TEAMS == 1 ? 2 : 1) name(                                                       \
      bf16* out, const bf16* q, float* states, float* sums, const unsigned char* cache, const uint32_t* block_tables,        \
      const uint32_t* cu_seqlens_q, const uint32_t* context_lens, float scale, int num_seqs, int max_parts, int table_width, \
      int num_heads, int block_shift, int rank, int dim) {                                                                   \
    SIMT_DYN_SHARED(unsigned char, shared);                                                                                  \
    const PagedCache paged{cache, nullptr, nullptr, nullptr, nullptr, 0, 1, 0, block_shift, dim};                            \
    attend_latents<Cache, TEAMS>(shared, out, q, states, sums, paged, block_tables, cu_seqlens_q, context_lens,              \
                                 Scoring(scale, 0.0f, 0x7fffffff), num_seqs, max_parts, table_width, num_heads, rank);       \
  }                                                                                                                          \
  SIMT_EXPORT(name)

ATTENTION_MLA(attention_mla_kvbf16_h16, CacheBf16, 1)
ATTENTION_MLA(attention_mla_kvbf16_h32, CacheBf16, 2)
ATTENTION_MLA(attention_mla_kvf16_h16, CacheF16, 1)
ATTENTION_MLA(attention_mla_kvf16_h32, CacheF16, 2)
