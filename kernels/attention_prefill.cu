// Attention of many queries of a sequence over its paged KV cache: prompts and chunks of them.
//
// Layout: q and out [num_tokens, num_heads, head_dim] bf16; caches [num_blocks, num_kv_heads,
// block_size, head_dim] in bf16, f16, FP8 or INT8 with scales; see attention.cuh for rows, tiles
// and parts. A sequence's queries are the last of its context, so a prompt and a chunk after a
// cached prefix are one case.
//
// Decomposition: a CTA leads 128 rows (64 of heads beyond 128) of one sequence and one KV head
// past the KV tiles that any of them sees, sixteen rows to a warp, as FlashAttention-2 does. Heads
// beyond 128 elements are cut into halves of value columns, each a CTA that computes all scores:
// half more products, but sums of a part and of all parts stay in registers. The grid is an upper
// bound that the host can compute; CTAs take the longest rows first, and those beyond the last
// tile of rows return.
//
// Bound: tensor cores. Per tile and warp, 128 products of 16 × 8 × 16 against 48 ldmatrix (heads
// of 128 elements), that is about as many shared-memory cycles as tensor-core cycles on sm_80;
// keys and values come from the second-level cache once per 128 rows.
//
// Report: attention_prefill_* sass=HMMA,LDSM,LDGSTS.128
// Report: attention_prefill_*_d64 dynamic=38912
// Report: attention_prefill_kvfp8_d64 dynamic=36864
// Report: attention_prefill_kvint8_d64 dynamic=37888
// Report: attention_prefill_*_d96 dynamic=55296
// Report: attention_prefill_kvfp8_d96 dynamic=53248
// Report: attention_prefill_kvint8_d96 dynamic=54272
// Report: attention_prefill_*_d128 dynamic=71680
// Report: attention_prefill_kvfp8_d128 dynamic=69632
// Report: attention_prefill_kvint8_d128 dynamic=78848
// Report: attention_prefill_*_d256 dynamic=86016
// Report: attention_prefill_kvfp8_d256 dynamic=84992
// Report: attention_prefill_kvint8_d256 dynamic=85504
#include "attention.cuh"

using namespace attention;

namespace {

// What is needed of a row once per part, or where a tile is partly hidden. It waits in shared
// memory, because registers are needed all the time.
struct alignas(16) RowState {
  Joined joined;
  int position;
};

template <class Cache, int D>
struct Shape {
  // Columns of values per CTA: sums of more would not fit the registers twice.
  static constexpr int D_V = D > 128 ? 128 : D;
  // 256 threads with 255 registers fill an SM; heads beyond 128 elements keep queries in shared
  // memory, where 64 rows are what sm_86 has room for.
  static constexpr int WARPS = D > 128 ? 4 : 8;
  static constexpr int THREADS = 32 * WARPS, ROWS = MMA_ROWS * WARPS;
  static constexpr bool HAS_Q_REGISTERS = D <= 128;
  // Products of sixteen elements whose queries wait in shared memory instead, as lanes read them:
  // where the cache has scales, 255 registers do not hold all of 128 elements. Two are the fewest
  // that nothing spills with, at 3 % more reads of shared memory.
  static constexpr int Q_WAITING = Cache::HAS_SCALES && D == 128 ? 2 : 0;
  static constexpr int Q_HELD = HAS_Q_REGISTERS ? D / 16 - Q_WAITING : 0;
  static constexpr int WAITING_BYTES = Q_WAITING * THREADS * 16;
  static constexpr int STATE_BYTES = ROWS * sizeof(RowState);
  using KvTiles = Tiles<Cache, D, D_V, THREADS>;
};

struct Work {
  int seq, tile;
};

// The `index`-th tile of `tile_rows` rows among those of sequences that are not short, counted
// from the last sequence's last one; a sequence of -1 if there are fewer. All warps find the same.
__device__ __forceinline__ Work find_work(int index, const uint32_t* cu_seqlens_q, int num_seqs, int group, int tile_rows) {
  for (int done = 0; done < num_seqs; done += 32) {
    const int seq = num_seqs - 1 - done - lane_id();
    const int num_queries = seq >= 0 ? int(cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]) : 0;
    const int count = is_short(num_queries, group) ? 0 : (num_queries * group + tile_rows - 1) / tile_rows;
    int up_to_here = count;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int before = __shfl_up_sync(~0u, up_to_here, delta);
      if (lane_id() >= delta) up_to_here += before;
    }
    const unsigned beyond = __ballot_sync(~0u, up_to_here > index);
    if (beyond != 0) {
      const int lane = __ffs(beyond) - 1;
      return {num_seqs - 1 - done - lane, __shfl_sync(~0u, up_to_here, lane) - 1 - index};
    }
    index -= __shfl_sync(~0u, up_to_here, 31);
  }
  return {-1, 0};
}

// Sixteen rows of one warp; a thread has elements of two of them.
template <class Cache, int D>
struct Warp {
  using S = Shape<Cache, D>;
  using KvTiles = typename S::KvTiles;
  using Mma = typename Cache::Mma;
  static constexpr int STRIPES = KvTiles::TILE / STRIPE;

  const uint16_t* q_tile;                                  // this warp's rows, [16, D + 8]
  uint32_t q[S::Q_HELD > 0 ? S::Q_HELD : 1][4];
  uint4* waiting;                                          // this lane's queries, S::THREADS apart
  float part_sums[S::D_V / 8][4], sums[S::D_V / 8][4];
  Softmax softmax[2];
  RowState* rows;                                          // this lane's: eight apart

  __device__ __forceinline__ void load_query(uint32_t (&a)[4], int k) const { ldmatrix_x4(a, a_address<D + 8>(q_tile) + 16 * k); }

  // Elements 16k to 16k + 16 of the queries, from where they are while tiles go past.
  __device__ __forceinline__ void query(uint32_t (&a)[4], int k) const {
    if constexpr (!S::HAS_Q_REGISTERS) {
      load_query(a, k);
    } else if (k < S::Q_HELD) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = q[k][i];
    } else {
      const uint4 from = waiting[(k - S::Q_HELD) * S::THREADS];
      a[0] = from.x, a[1] = from.y, a[2] = from.z, a[3] = from.w;
    }
  }

  __device__ __forceinline__ void start_part() {
#pragma unroll
    for (int n = 0; n < S::D_V / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) part_sums[n][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) softmax[r] = Softmax();
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int n = 0; n < S::D_V / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[n][e] = 0.0f;
    if constexpr (S::HAS_Q_REGISTERS) {
#pragma unroll
      for (int k = 0; k < S::Q_HELD; k++) load_query(q[k], k);
#pragma unroll
      for (int k = 0; k < S::Q_WAITING; k++) {
        uint32_t a[4];
        load_query(a, S::Q_HELD + k);
        waiting[k * S::THREADS] = make_uint4(a[0], a[1], a[2], a[3]);
      }
    }
    start_part();
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[STRIPES][2][4], const uint16_t* k_tile) const {
    const uint16_t* const keys = b_address<KvTiles::K_STRIDE>(k_tile);
#pragma unroll
    for (int j = 0; j < STRIPES; j++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      uint32_t a[4];
      query(a, k);
#pragma unroll
      for (int j = 0; j < STRIPES; j++) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + j * STRIPE * KvTiles::K_STRIDE + 16 * k);
        Mma::mma(s[j][0], a, b[0], b[1]);
        Mma::mma(s[j][1], a, b[2], b[3]);
      }
    }
  }

  // One tile of keys and values; `key` is its first.
  __device__ __forceinline__ void attend(const KvTiles& tiles, int stage, int key, const Scoring& scoring, bool is_masked) {
    float s[STRIPES][2][4];
    multiply_keys(s, tiles.k(stage));
    float largest[2] = {NEG_INFINITY, NEG_INFINITY}, factors[2], bases[2], totals[2] = {};
#pragma unroll
    for (int j = 0; j < STRIPES; j++) {
      const auto position_of = [&](int r) { return rows[8 * r].position; };
      scoring.template finish<Cache>(s[j], key + j * STRIPE, position_of, is_masked, tiles.k_scales(stage) + j * STRIPE);
#pragma unroll
      for (int e = 0; e < 4; e++) largest[e / 2] = fmaxf(largest[e / 2], fmaxf(s[j][0][e], s[j][1][e]));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      factors[r] = softmax[r].raise(quad_max(largest[r]), scoring.factor);
      bases[r] = softmax[r].base();
    }
#pragma unroll
    for (int n = 0; n < S::D_V / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) part_sums[n][e] *= factors[e / 2];
    const uint16_t* const values = a_address<KvTiles::V_STRIDE>(tiles.v(stage));
#pragma unroll
    for (int j = 0; j < STRIPES; j++) {
      float stripe_totals[2];
      uint32_t a[4];
      weigh_stripe<Cache>(s[j], scoring.factor, bases, tiles.v_scales(stage) + j * STRIPE, stripe_totals, a);
#pragma unroll
      for (int r = 0; r < 2; r++) totals[r] = j == 0 ? stripe_totals[r] : __fadd_rn(totals[r], stripe_totals[r]);
#pragma unroll
      for (int n = 0; n < S::D_V / 16; n++) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, values + j * STRIPE * KvTiles::V_STRIDE + 16 * n);
        Mma::mma(part_sums[2 * n], a, b[0], b[1]);
        Mma::mma(part_sums[2 * n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) softmax[r].total = __fmaf_rn(softmax[r].total, factors[r], totals[r]);
  }

  __device__ __forceinline__ void join_part(float factor) {
    float factors[2][2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float total = quad_sum(softmax[r].total);
      Joined joined = rows[8 * r].joined;
      joined.join(__fmul_rn(softmax[r].largest, factor), total, factors[r]);
      __syncwarp();
      rows[8 * r].joined = joined;
    }
#pragma unroll
    for (int n = 0; n < S::D_V / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[n][e] = Joined::join_sums(sums[n][e], part_sums[n][e], factors[e / 2]);
    start_part();
  }

  // `out` [num_tokens, num_heads, head_dim] starts at the sequence, the KV head's first query head
  // and the first column.
  __device__ __forceinline__ void store(bf16* out, int first, int end, int group, int num_heads, int head_dim, int num_cols) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first + lane_id() / 4 + 8 * r;
      if (row >= end) continue;
      const float inverse = rows[8 * r].joined.inverse();
      bf16* const to = out + (size_t(row / group) * num_heads + row % group) * head_dim;
#pragma unroll
      for (int n = 0; n < S::D_V / 8; n++) {
        const int col = 8 * n + lane_id() % 4 * 2;
        if (col < num_cols)
          *reinterpret_cast<uint32_t*>(to + col) = MmaBf16::pack(__fmul_rn(sums[n][2 * r], inverse), __fmul_rn(sums[n][2 * r + 1], inverse));
      }
    }
  }
};

template <class Cache, int D>
__device__ __forceinline__ void prefill(
    unsigned char* shared, bf16* out, const bf16* q, PagedCache cache, const uint32_t* block_tables, const uint32_t* cu_seqlens_q,
    const uint32_t* context_lens, const float* sinks, const Scoring scoring, int num_seqs, int table_width, int num_heads) {
  using S = Shape<Cache, D>;
  constexpr int TILE = S::KvTiles::TILE, TILES_PER_PART = PART / TILE;
  const int group = num_heads / cache.num_kv_heads;
  const Work work = find_work(blockIdx.x, cu_seqlens_q, num_seqs, group, S::ROWS);
  if (work.seq < 0) return;
  constexpr int HALVES = D / S::D_V;
  const int kv_head = blockIdx.y / HALVES, first_col = blockIdx.y % HALVES * S::D_V;
  if (first_col >= cache.head_dim) return;
  const size_t first_token = cu_seqlens_q[work.seq];
  const int num_queries = cu_seqlens_q[work.seq + 1] - first_token, first_head = kv_head * group;
  cache.kv_head = kv_head;
  cache.table = block_tables + size_t(work.seq) * table_width;
  cache.context_len = context_lens[work.seq];

  const Rows rows(work.tile * S::ROWS, S::ROWS, num_queries * group, group, cache.context_len, num_queries, scoring.window);
  unsigned char* const large = shared + S::STATE_BYTES + S::WAITING_BYTES;
  uint16_t* const q_tile = reinterpret_cast<uint16_t*>(large);
  const bf16* const seq_q = q + first_token * num_heads * cache.head_dim;
  load_queries<typename Cache::Mma, D, S::ROWS, S::THREADS>(q_tile, seq_q, rows.first, rows.end, group, num_heads, first_head, cache.head_dim);
  __syncthreads();

  Warp<Cache, D> warp;
  warp.q_tile = q_tile + warp_id() * MMA_ROWS * (D + 8);
  warp.rows = reinterpret_cast<RowState*>(shared) + warp_id() * MMA_ROWS + lane_id() / 4;
  warp.waiting = reinterpret_cast<uint4*>(shared + S::STATE_BYTES) + threadIdx.x;
  warp.start();
  const Rows mine(rows.first + warp_id() * MMA_ROWS, MMA_ROWS, rows.end, group, cache.context_len, num_queries, scoring.window);
  // Each row's four lanes write the same.
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = min(mine.first + lane_id() / 4 + 8 * r, rows.end - 1);
    RowState state;
    state.position = rows.position(row, group);
    if (sinks != nullptr) state.joined.start(sinks[first_head + row % group]);
    warp.rows[8 * r] = state;
  }

  // Registers have the queries: tiles lie where they were.
  if constexpr (S::HAS_Q_REGISTERS) __syncthreads();
  constexpr int Q_BYTES = S::HAS_Q_REGISTERS ? 0 : S::ROWS * (D + 8) * 2;
  const typename S::KvTiles tiles{large + Q_BYTES, cache, first_col};
  const int begin = rows.first_key / TILE, end = rows.last_position / TILE + 1;
  tiles.fetch(begin, 0);
  for (int tile = begin; tile < end; tile++) {
    const int stage = (tile - begin) % 2, key = tile * TILE;
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < end) tiles.fetch(tile + 1, 1 - stage);
    if constexpr (Cache::IS_CODES) {
      tiles.widen(tile, stage);
      __syncthreads();
    }
    if (mine.first < rows.end && !scoring.all_hidden(key, key + TILE, mine.first_position, mine.last_position)) {
      const bool is_masked = !scoring.all_visible(key, key + TILE, mine.first_position, mine.last_position);
      warp.attend(tiles, stage, key, scoring, is_masked);
    }
    if ((tile + 1) % TILES_PER_PART == 0 || tile + 1 == end) warp.join_part(scoring.factor);
  }
  warp.store(out + (first_token * num_heads + first_head) * cache.head_dim + first_col, mine.first, rows.end, group, num_heads, cache.head_dim, cache.head_dim - first_col);
}

}  // namespace

// out, q [num_tokens, num_heads, head_dim]; caches as above; block_tables [num_seqs, table_width];
// cu_seqlens_q [num_seqs + 1]; context_lens [num_seqs]; sinks [num_heads] or null; softcap 0: none;
// block_shift: log2 of the block size. Grid: (tiles of rows, num_kv_heads · halves).
#define ATTENTION_PREFILL(name, Cache, D)                                                                                    \
  extern "C" __global__ void __launch_bounds__((Shape<Cache, D>::THREADS), 1) name(                                          \
      bf16* out, const bf16* q, const unsigned char* k_cache, const unsigned char* v_cache, const float* k_scales,           \
      const float* v_scales, const uint32_t* block_tables, const uint32_t* cu_seqlens_q, const uint32_t* context_lens,       \
      const float* sinks, float scale, float softcap, int window, int num_seqs, int table_width, int num_heads,              \
      int num_kv_heads, int block_shift, int head_dim) {                                                                     \
    SIMT_DYN_SHARED(unsigned char, shared);                                                                                  \
    const PagedCache cache{k_cache, v_cache, k_scales, v_scales, nullptr, 0, num_kv_heads, 0, block_shift, head_dim};        \
    prefill<Cache, D>(shared, out, q, cache, block_tables, cu_seqlens_q, context_lens, sinks, Scoring(scale, softcap, window), \
                      num_seqs, table_width, num_heads);                                                                     \
  }                                                                                                                          \
  SIMT_EXPORT(name)

#define ATTENTION_PREFILL_CACHES(D)                                   \
  ATTENTION_PREFILL(attention_prefill_kvbf16_d##D, CacheBf16, D)      \
  ATTENTION_PREFILL(attention_prefill_kvf16_d##D, CacheF16, D)        \
  ATTENTION_PREFILL(attention_prefill_kvfp8_d##D, CacheFp8, D)        \
  ATTENTION_PREFILL(attention_prefill_kvint8_d##D, CacheInt8, D)

ATTENTION_PREFILL_CACHES(64)
ATTENTION_PREFILL_CACHES(96)
ATTENTION_PREFILL_CACHES(128)
ATTENTION_PREFILL_CACHES(256)
