// Attention of one query, or a few, of each sequence over its paged KV cache.
//
// Layout: as attention_prefill.cu.
//
// Decomposition: a CTA leads sixteen rows (the query heads of a KV head, of one query or of several)
// past KV tiles, so that each byte of the cache is read once per group. Its four warps share each
// tile: a warp computes the scores of sixteen keys, all exchange largest scores, weights and their
// sums through shared memory, and then each sums its own columns of values over all keys. Fewer
// than sixteen rows leave rows of a product idle, which costs nothing: memory is the limit.
//
// Where sequences are too few to fill the GPU, `gridDim.x` CTAs share a context: each takes every
// gridDim.x-th part and leaves what it yields in `partials`, and attention_join joins parts in
// ascending order, as a CTA that leads its rows past all parts does in registers. Parts lie at
// fixed positions, so how many CTAs share them changes no bit. Grids come from bounds that the host
// knows, so a CUDA graph can keep them; CTAs without work return at once.
//
// Bound: memory, context · 2 · head_dim · element size per sequence and KV head. Two stages keep a
// tile of keys and values (32 KiB in bf16 with 128 elements) in flight per CTA, three CTAs per SM
// on sm_90: more than the latency of 800 ns times an SM's 25 GB/s to 36 GB/s needs.
//
// Report: attention_decode_* sass=HMMA,LDSM,LDGSTS.128
// Report: attention_decode_*_d64 dynamic=40192
// Report: attention_decode_kvfp8_d64 dynamic=38144
// Report: attention_decode_kvint8_d64 dynamic=39168
// Report: attention_decode_*_d96 dynamic=56576
// Report: attention_decode_kvfp8_d96 dynamic=54528
// Report: attention_decode_kvint8_d96 dynamic=55552
// Report: attention_decode_*_d128 dynamic=73984
// Report: attention_decode_kvfp8_d128 dynamic=71936
// Report: attention_decode_kvint8_d128 dynamic=72960
// Report: attention_decode_*_d256 dynamic=76032
// Report: attention_decode_kvfp8_d256 dynamic=75008
// Report: attention_decode_kvint8_d256 dynamic=75520
#include "attention.cuh"

using namespace attention;

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
// CTAs that run on an SM at a time, as far as registers allow: as many as two stages of a tile
// leave room for in the shared memory of sm_90.
constexpr int ctas_per_sm(int head_dim) { return head_dim > 128 ? 2 : 3; }

// Where parts of sequences of few queries leave what they yield.
struct Partials {
  float* states;  // [num_seqs, max_queries, num_heads, max_parts, 2]: largest exponent, sum of weights
  float* sums;    // [num_seqs, max_queries, num_heads, max_parts, head_dim]
  int max_parts, max_queries;

  // Of the `part`-th part of a sequence's query, counted from the first that its sixteen rows see.
  __device__ __forceinline__ size_t slot(int seq, int query, int num_heads, int head, int part) const {
    return size_t((seq * max_queries + query) * num_heads + head) * max_parts + part;
  }
};

// What warps tell each other about a tile; it lies where queries were before registers had them.
template <int STRIPES>
struct Exchange {
  uint4 weights[STRIPES][32];             // A fragments
  float2 totals[STRIPES][32];             // sums of weights, of a lane's two rows
  float largest[STRIPES][MMA_ROWS];
};

template <class Cache, int D>
struct Decoder {
  using KvTiles = Tiles<Cache, D, D, THREADS>;
  using Mma = typename Cache::Mma;
  static constexpr int TILE = KvTiles::TILE, STRIPES = TILE / STRIPE;
  // Column blocks of sixteen, of which a warp has every fourth.
  static constexpr int COL_BLOCKS = D / 16, MY_BLOCKS = (COL_BLOCKS + WARPS - 1) / WARPS;

  Exchange<STRIPES>* exchange;
  uint32_t q[D / 16][4];
  float part_sums[MY_BLOCKS][2][4], sums[MY_BLOCKS][2][4];
  Softmax softmax[2];
  Joined joined[2];

  __device__ __forceinline__ void start_part() {
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) part_sums[i][e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) softmax[r] = Softmax();
  }

  __device__ __forceinline__ void start(const uint16_t* q_tile) {
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) sums[i][e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) ldmatrix_x4(q[k], a_address<D + 8>(q_tile) + 16 * k);
    start_part();
  }

  // This warp's sixteen keys.
  __device__ __forceinline__ void score_stripe(float (&s)[2][4], const KvTiles& tiles, int stage, int key, const Scoring& scoring, const int (&positions)[2], bool is_masked) const {
    const int first = warp_id() * STRIPE;
    const uint16_t* const keys = b_address<KvTiles::K_STRIDE>(tiles.k(stage)) + first * KvTiles::K_STRIDE;
#pragma unroll
    for (int e = 0; e < 8; e++) s[e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + 16 * k);
      Mma::mma(s[0], q[k], b[0], b[1]);
      Mma::mma(s[1], q[k], b[2], b[3]);
    }
    scoring.template finish<Cache>(s, key + first, [&](int r) { return positions[r]; }, is_masked, tiles.k_scales(stage) + first);
    float largest[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      largest[r] = quad_max(fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1])));
      if (lane_id() % 4 == 0) exchange->largest[warp_id()][lane_id() / 4 + 8 * r] = largest[r];
    }
  }

  // One tile of keys and values by all warps; `key` is its first.
  __device__ __forceinline__ void attend(const KvTiles& tiles, int stage, int key, const Scoring& scoring, const int (&positions)[2], bool is_masked) {
    float s[2][4], factors[2], bases[2], totals[2] = {};
    if (warp_id() < STRIPES) score_stripe(s, tiles, stage, key, scoring, positions, is_masked);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float largest = NEG_INFINITY;
#pragma unroll
      for (int j = 0; j < STRIPES; j++) largest = fmaxf(largest, exchange->largest[j][lane_id() / 4 + 8 * r]);
      factors[r] = softmax[r].raise(largest, scoring.factor);
      bases[r] = softmax[r].base();
    }
    if (warp_id() < STRIPES) {
      uint32_t a[4];
      weigh_stripe<Cache>(s, scoring.factor, bases, tiles.v_scales(stage) + warp_id() * STRIPE, totals, a);
      exchange->weights[warp_id()][lane_id()] = make_uint4(a[0], a[1], a[2], a[3]);
      exchange->totals[warp_id()][lane_id()] = make_float2(totals[0], totals[1]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) part_sums[i][e / 4][e % 4] *= factors[e % 4 / 2];
    const uint16_t* const values = a_address<KvTiles::V_STRIDE>(tiles.v(stage));
#pragma unroll
    for (int j = 0; j < STRIPES; j++) {
      const float2 stripe_totals = exchange->totals[j][lane_id()];
      totals[0] = j == 0 ? stripe_totals.x : __fadd_rn(totals[0], stripe_totals.x);
      totals[1] = j == 0 ? stripe_totals.y : __fadd_rn(totals[1], stripe_totals.y);
      const uint4 weights = exchange->weights[j][lane_id()];
      const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int i = 0; i < MY_BLOCKS; i++) {
        const int block = warp_id() + i * WARPS;
        if (COL_BLOCKS % WARPS != 0 && block >= COL_BLOCKS) continue;
        uint32_t b[4];
        ldmatrix_x4_trans(b, values + j * STRIPE * KvTiles::V_STRIDE + 16 * block);
        Mma::mma(part_sums[i][0], a, b[0], b[1]);
        Mma::mma(part_sums[i][1], a, b[2], b[3]);
      }
    }
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

  // The first column of this lane's elements of a column block.
  __device__ __forceinline__ int col(int i, int n) const { return (warp_id() + i * WARPS) * 16 + 8 * n + lane_id() % 4 * 2; }

  // Leaves a part of the row that elements 2r and 2r + 1 belong to; `total` is its sum of weights.
  __device__ __forceinline__ void leave_part(int r, float total, float factor, const Partials& partials, size_t slot, int head_dim) const {
    if (threadIdx.x < 32 && lane_id() % 4 == 0)
      *reinterpret_cast<float2*>(partials.states + 2 * slot) = make_float2(__fmul_rn(softmax[r].largest, factor), total);
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int n = 0; n < 2; n++)
        if (col(i, n) < head_dim)
          *reinterpret_cast<float2*>(partials.sums + slot * head_dim + col(i, n)) = make_float2(part_sums[i][n][2 * r], part_sums[i][n][2 * r + 1]);
  }

  // `out` is the row's vector.
  __device__ __forceinline__ void store(int r, bf16* out, int head_dim) const {
    const float inverse = joined[r].inverse();
#pragma unroll
    for (int i = 0; i < MY_BLOCKS; i++)
#pragma unroll
      for (int n = 0; n < 2; n++)
        if (col(i, n) < head_dim)
          *reinterpret_cast<uint32_t*>(out + col(i, n)) = MmaBf16::pack(__fmul_rn(sums[i][n][2 * r], inverse), __fmul_rn(sums[i][n][2 * r + 1], inverse));
  }
};

// Where a row's query and output lie.
struct RowPlace {
  size_t token;
  int head;
  __device__ __forceinline__ RowPlace(size_t first_token, int first_head, int row, int group) : token(first_token + row / group), head(first_head + row % group) {}
};

template <class Cache, int D>
__device__ __forceinline__ void decode(
    unsigned char* shared, bf16* out, const bf16* q, const Partials partials, PagedCache cache, const uint32_t* block_tables,
    const uint32_t* cu_seqlens_q, const uint32_t* context_lens, const float* sinks, const Scoring scoring, int table_width, int num_heads) {
  using Decoder = Decoder<Cache, D>;
  constexpr int TILE = Decoder::TILE, TILES_PER_PART = PART / TILE;
  const int seq = blockIdx.z, group = num_heads / cache.num_kv_heads, num_splits = gridDim.x;
  const size_t first_token = cu_seqlens_q[seq];
  const int num_queries = cu_seqlens_q[seq + 1] - first_token, num_rows = num_queries * group;
  const int first_row = blockIdx.y / cache.num_kv_heads * MMA_ROWS;
  if (!is_short(num_queries, group) || first_row >= num_rows) return;
  cache.kv_head = blockIdx.y % cache.num_kv_heads;
  cache.table = block_tables + size_t(seq) * table_width;
  cache.context_len = context_lens[seq];
  const int first_head = cache.kv_head * group;

  const Rows rows(first_row, MMA_ROWS, num_rows, group, cache.context_len, num_queries, scoring.window);
  const int first_part = rows.first_part(), end_part = rows.end_part();
  // Alone, a CTA also finishes rows that see nothing.
  if (num_splits > 1 && first_part + int(blockIdx.x) >= end_part) return;
  uint16_t* const q_tile = reinterpret_cast<uint16_t*>(shared + Decoder::KvTiles::SHARED_BYTES);
  const bf16* const seq_q = q + first_token * num_heads * cache.head_dim;
  load_queries<typename Cache::Mma, D, MMA_ROWS, THREADS>(q_tile, seq_q, first_row, num_rows, group, num_heads, first_head, cache.head_dim);
  __syncthreads();
  Decoder decoder;
  decoder.exchange = reinterpret_cast<Exchange<Decoder::STRIPES>*>(q_tile);
  decoder.start(q_tile);
  int positions[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + lane_id() / 4 + 8 * r;
    positions[r] = rows.position(row, group);
    if (sinks != nullptr) decoder.joined[r].start(sinks[RowPlace(0, first_head, min(row, rows.end - 1), group).head]);
  }

  const typename Decoder::KvTiles tiles{shared, cache, 0};
  // From a part's last tile on to the first of the next part that is this CTA's.
  const auto next = [&](int tile) { return (tile + 1) % TILES_PER_PART == 0 ? tile + 1 + (num_splits - 1) * TILES_PER_PART : tile + 1; };
  const int end = end_part == 0 ? 0 : rows.last_position / TILE + 1;
  int tile = blockIdx.x == 0 ? rows.first_key / TILE : (first_part + int(blockIdx.x)) * TILES_PER_PART, stage = 0;
  if (tile < end) tiles.fetch(tile, stage);
  while (tile < end) {
    const int key = tile * TILE, next_tile = next(tile);
    cp_async_wait<0>();
    __syncthreads();
    if (next_tile < end) tiles.fetch(next_tile, 1 - stage);
    if constexpr (Cache::IS_CODES) {
      tiles.widen(tile, stage);
      __syncthreads();
    }
    const bool is_masked = !scoring.all_visible(key, key + TILE, rows.first_position, rows.last_position);
    decoder.attend(tiles, stage, key, scoring, positions, is_masked);
    if (next_tile != tile + 1 || next_tile % TILES_PER_PART == 0 || next_tile >= end) {
      if (num_splits == 1) {
        decoder.join_part(scoring.factor);
      } else {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = first_row + lane_id() / 4 + 8 * r, part = tile / TILES_PER_PART - first_part;
          const float total = quad_sum(decoder.softmax[r].total);
          const RowPlace place(first_token, first_head, row, group);
          if (row < rows.end)
            decoder.leave_part(r, total, scoring.factor, partials, partials.slot(seq, row / group, num_heads, place.head, part), cache.head_dim);
        }
        decoder.start_part();
      }
    }
    tile = next_tile, stage = 1 - stage;
  }
  if (num_splits > 1) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + lane_id() / 4 + 8 * r;
    const RowPlace place(first_token, first_head, row, group);
    if (row < rows.end) decoder.store(r, out + (place.token * num_heads + place.head) * cache.head_dim, cache.head_dim);
  }
}

}  // namespace

// out, q [num_tokens, num_heads, head_dim]; states and sums as in Partials, unused if the grid's x
// is 1; caches as above; block_tables [num_seqs, table_width]; cu_seqlens_q [num_seqs + 1];
// context_lens [num_seqs]; sinks [num_heads] or null; softcap 0: none; block_shift: log2 of the
// block size. Grid: (CTAs that share a context, num_kv_heads · tiles of sixteen rows, num_seqs).
#define ATTENTION_DECODE(name, Cache, D)                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS, ctas_per_sm(D)) name(                                                                \
      bf16* out, const bf16* q, float* states, float* sums, const unsigned char* k_cache, const unsigned char* v_cache,      \
      const float* k_scales, const float* v_scales, const uint32_t* block_tables, const uint32_t* cu_seqlens_q,              \
      const uint32_t* context_lens, const float* sinks, float scale, float softcap, int window, int max_parts, int max_queries, \
      int table_width, int num_heads, int num_kv_heads, int block_shift, int head_dim) {                                     \
    SIMT_DYN_SHARED(unsigned char, shared);                                                                                  \
    const PagedCache cache{k_cache, v_cache, k_scales, v_scales, nullptr, 0, num_kv_heads, 0, block_shift, head_dim};        \
    decode<Cache, D>(shared, out, q, Partials{states, sums, max_parts, max_queries}, cache, block_tables, cu_seqlens_q, context_lens,     \
                     sinks, Scoring(scale, softcap, window), table_width, num_heads);                                        \
  }                                                                                                                          \
  SIMT_EXPORT(name)

#define ATTENTION_DECODE_CACHES(D)                                  \
  ATTENTION_DECODE(attention_decode_kvbf16_d##D, CacheBf16, D)      \
  ATTENTION_DECODE(attention_decode_kvf16_d##D, CacheF16, D)        \
  ATTENTION_DECODE(attention_decode_kvfp8_d##D, CacheFp8, D)        \
  ATTENTION_DECODE(attention_decode_kvint8_d##D, CacheInt8, D)

ATTENTION_DECODE_CACHES(64)
ATTENTION_DECODE_CACHES(96)
ATTENTION_DECODE_CACHES(128)
ATTENTION_DECODE_CACHES(256)

// Joins the parts that attention_decode left, for the same sequences. A warp has one query of one
// head, a lane four columns at a time. Memory: each partial sum is read once. Parts are read eight
// ahead, because joining them is a chain but loading them is not.
// Grid: (num_heads / 4 rounded up, queries of the longest of these sequences, num_seqs).
extern "C" __global__ void __launch_bounds__(THREADS) attention_join(
    bf16* out, const float* states, const float* sums, const uint32_t* cu_seqlens_q, const uint32_t* context_lens, const float* sinks,
    int window, int max_parts, int max_queries, int num_heads, int num_kv_heads, int head_dim) {
  constexpr int COLS = 4, AHEAD = 8;
  const int seq = blockIdx.z, query = blockIdx.y, head = blockIdx.x * WARPS + warp_id(), group = num_heads / num_kv_heads;
  const size_t first_token = cu_seqlens_q[seq];
  const int num_queries = cu_seqlens_q[seq + 1] - first_token;
  if (!is_short(num_queries, group) || query >= num_queries || head >= num_heads) return;
  const int row = query * group + head % group;
  const Rows rows(row / MMA_ROWS * MMA_ROWS, MMA_ROWS, num_queries * group, group, context_lens[seq], num_queries, window);
  const int num_parts = rows.end_part() - rows.first_part();
  const Partials partials{const_cast<float*>(states), const_cast<float*>(sums), max_parts, max_queries};
  const size_t first_slot = partials.slot(seq, query, num_heads, head, 0);
  bf16* const to = out + ((first_token + query) * num_heads + head) * head_dim;
  for (int col = lane_id() * COLS; col < head_dim; col += 32 * COLS) {
    Joined joined;
    if (sinks != nullptr) joined.start(sinks[head]);
    float total[COLS] = {};
    for (int begin = 0; begin < num_parts; begin += AHEAD) {
      float2 state[AHEAD];
      float4 part[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const size_t slot = first_slot + min(begin + i, num_parts - 1);
        state[i] = *reinterpret_cast<const float2*>(states + 2 * slot);
        part[i] = *reinterpret_cast<const float4*>(sums + slot * head_dim + col);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (begin + i >= num_parts) break;
        float factors[2];
        joined.join(state[i].x, state[i].y, factors);
        const float add[COLS] = {part[i].x, part[i].y, part[i].z, part[i].w};
#pragma unroll
        for (int c = 0; c < COLS; c++) total[c] = Joined::join_sums(total[c], add[c], factors);
      }
    }
    const float inverse = joined.inverse();
#pragma unroll
    for (int c = 0; c < COLS; c += 2)
      *reinterpret_cast<uint32_t*>(to + col + c) = MmaBf16::pack(__fmul_rn(total[c], inverse), __fmul_rn(total[c + 1], inverse));
  }
}
SIMT_EXPORT(attention_join)
