// Mixtures of experts, all but their products: which experts compute a token, which tokens an
// expert computes, and the weighted sum of what they yield.
//
// A choice is an expert of a token. Choices are sorted by expert, so that an expert's products are
// of rows that follow each other; products are those of `moe_skinny.cu` and `moe_tiles.cu`.
//
// Bound: latency while tokens are few; then memory, for the sum 2 · (experts per token + 1) bytes per element.
//
// Report: experts_sum_bf16 sass=LDG.128,STG.128
#include "dtype.cuh"
#include "experts.cuh"
#include "reduce.cuh"

constexpr int ROUTE_WARPS = 4;      // a token each
constexpr int SORT_THREADS = 1024;  // an expert each: one block, because counting a step's choices takes microseconds
constexpr int SUM_THREADS = 128;    // 1,024 elements: several blocks for one token
constexpr float LEAST_SCORE_SUM = 1e-20f;  // as in ops/args/experts.rs

// Larger for larger values, of equal ones for lower ids; never below 2^32. What is no number comes last.
__device__ __forceinline__ uint64_t rank_of(float value, int id) {
  const float x = value == value ? __fadd_rn(value, 0.f) : __int_as_float(0xff800000);  // there is one zero
  const uint32_t bits = __float_as_uint(x), ordered = bits >> 31 ? ~bits : bits | 1u << 31;
  return uint64_t(ordered) << 32 | ~uint32_t(id);
}

__device__ __forceinline__ int id_of(uint64_t rank) { return int(~uint32_t(rank)); }

__device__ __forceinline__ float logit_of(uint64_t rank) {
  const uint32_t ordered = uint32_t(rank >> 32);
  return __uint_as_float(ordered >> 31 ? ordered ^ 1u << 31 : ~ordered);
}

// What experts of a token are chosen by, in some groups of `group_len` experts: logits, which have the order of
// probabilities, or sigmoids of logits and a bias.
struct Values {
  const float *logits, *bias;
  bool sigmoid;
  int group_len;
  unsigned groups;  // a bit for each

  __device__ __forceinline__ float score(int id) const { return __fdiv_rn(1.f, 1.f + expf(-logits[id])); }
  __device__ __forceinline__ float biased(int id) const {
    if (!sigmoid) return logits[id];
    return bias ? __fadd_rn(score(id), bias[id]) : score(id);
  }

  __device__ __forceinline__ unsigned long long rank(int id) const {
    return groups >> id / group_len & 1 ? rank_of(biased(id), id) : 1;
  }

  // The groups whose best experts have the largest values, or whose two best have the largest sums; a group per lane.
  // 1 ranks below all.
  __device__ __forceinline__ unsigned best_groups(int num_groups, int num_chosen) const {
    const int lane = threadIdx.x % 32;
    if (num_groups == num_chosen) return ~0u;
    const bool two = sigmoid && group_len > 1;
    float first = __int_as_float(0xff800000), second = two ? first : 0.f;
    for (int i = 0; lane < num_groups && i < group_len; i++) {
      const float value = biased(lane * group_len + i);
      if (value > first) {
        if (two) second = first;
        first = value;
      } else if (value > second && two) {
        second = value;
      }
    }
    const unsigned long long mine = lane < num_groups ? rank_of(__fadd_rn(first, second), lane) : 0;
    int better = 0;
    for (int i = 0; i < num_groups; i++) better += __shfl_sync(FULL_WARP, mine, i) > mine;
    return __ballot_sync(FULL_WARP, lane < num_groups && better < num_chosen);
  }
};

// A warp per token. Lane i gets the i-th choice: every time the largest rank below the last one.
// Then choices are brought into the order of their ids.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS)
    route_experts(uint32_t* ids /* [tokens, per_token] */, float* weights /* as ids */, const float* logits /* [tokens, experts] */,
                  const float* bias /* [experts] of scores, or null */, int tokens, int experts, int per_token /* at most 32 */,
                  int renormalize, int sigmoid /* or a softmax */, int num_groups /* at most 32 */, int num_chosen_groups, float scale) {
  const int token = blockIdx.x * ROUTE_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;
  Values values = {logits + size_t(token) * experts, bias, sigmoid != 0, experts / num_groups, 0};
  values.groups = values.best_groups(num_groups, num_chosen_groups);
  unsigned long long chosen = 0, last = ~0ull;
  for (int i = 0; i < per_token; i++) {
    unsigned long long best = 0;
    for (int id = lane; id < experts; id += 32) {
      const unsigned long long rank = values.rank(id);
      if (rank < last && rank > best) best = rank;
    }
    last = warp_reduce(best, Max());
    if (lane == i) chosen = last;
  }
  const bool chose = lane < per_token;
  const int id = id_of(chosen);
  int place = 0;
  for (int i = 0; i < per_token; i++) place += __shfl_sync(FULL_WARP, id, i) < id;
  const float largest = logit_of(__shfl_sync(FULL_WARP, chosen, 0));
  float weight = 0.f, sum = 1.f;
  if (chose) weight = sigmoid ? values.score(id) : expf(logit_of(chosen) - largest);
  if (renormalize) {
    sum = warp_sum(weight);
    if (sigmoid) sum += LEAST_SCORE_SUM;
  } else if (!sigmoid) {
    sum = 0.f;
    for (int i = lane; i < experts; i += 32) sum += expf(values.logits[i] - largest);
    sum = warp_sum(sum);
  }
  if (!chose) return;
  ids[size_t(token) * per_token + place] = id;
  weights[size_t(token) * per_token + place] = __fmul_rn(__fdiv_rn(weight, sum), scale);
}
SIMT_EXPORT(route_experts)

// The sum over lower threads; `total` is that over all. All threads of the block call it.
__device__ __forceinline__ int sum_before(int x, int& total) {
  __shared__ int of_warps[SORT_THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int through = x;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const int lower = __shfl_up_sync(FULL_WARP, through, apart);
    if (lane >= apart) through += lower;
  }
  __syncthreads();
  if (lane == 31) of_warps[warp] = through;
  __syncthreads();
  total = warp_reduce(of_warps[lane], Sum());
  return through - x + warp_reduce(lane < warp ? of_warps[lane] : 0, Sum());
}

// Counts every expert's choices, adds counts up, and gives every choice the next row of its expert.
// In which order an expert's choices get them is chance, and nothing depends on it.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    experts_sort(int* places /* [choices]: a choice's row */, int* tokens /* [choices]: a row's token */,
                 RowTile* row_tiles /* [most_tiles] */, int* num_row_tiles /* one number */,
                 const uint32_t* ids /* [choices / per_token, per_token], each below SORT_THREADS */, int choices, int per_token,
                 int tile_rows, int most_tiles) {
  __shared__ int next[SORT_THREADS];
  const int expert = threadIdx.x;
  next[expert] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < choices; i += SORT_THREADS) atomicAdd(&next[ids[i]], 1);
  __syncthreads();
  const int count = next[expert], tiles = (count + tile_rows - 1) / tile_rows;
  int num_rows, num_tiles;
  const int first_row = sum_before(count, num_rows), first_tile = sum_before(tiles, num_tiles);
  next[expert] = first_row;
  for (int i = 0; i < tiles; i++) row_tiles[first_tile + i] = {expert, first_row + i * tile_rows, min(tile_rows, count - i * tile_rows), 0};
  for (int i = num_tiles + threadIdx.x; i < most_tiles; i += SORT_THREADS) row_tiles[i] = {0, 0, 0, 0};
  if (threadIdx.x == 0) *num_row_tiles = num_tiles;
  __syncthreads();
  for (int i = threadIdx.x; i < choices; i += SORT_THREADS) {
    const int row = atomicAdd(&next[ids[i]], 1);
    places[i] = row;
    tokens[row] = i / per_token;
  }
}
SIMT_EXPORT(experts_sort)

// Grid: tokens, runs of SUM_THREADS chunks. Choices are added in their order, rounded after every
// product and every sum like the referee's.
template <class T>
__device__ __forceinline__ void experts_sum(T* out, const T* yielded, const int* places, const float* weights, int per_token, int width) {
  const size_t token = blockIdx.x;
  const int at = (blockIdx.y * SUM_THREADS + threadIdx.x) * CHUNK;
  if (at >= width) return;
  const bool whole = can_load_chunks(yielded, width) && can_load_chunks(out, width);
  float sum[CHUNK] = {};
#pragma unroll 4
  for (int i = 0; i < per_token; i++) {
    const float weight = weights[token * per_token + i];
    float x[CHUNK];
    load_chunk(x, yielded + size_t(places[token * per_token + i]) * width, at, width, whole);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) sum[j] = __fadd_rn(sum[j], __fmul_rn(weight, x[j]));
  }
  store_chunk(out + token * width, sum, at, width, whole);
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    experts_sum_bf16(bf16* out /* [tokens, width] */, const bf16* yielded /* [choices, width] */, const int* places /* [tokens, per_token] */,
                     const float* weights /* as places */, int per_token, int width) {
  experts_sum(out, yielded, places, weights, per_token, width);
}
SIMT_EXPORT(experts_sum_bf16)
