// Chooses or scores one token per row of logits, without sorting the vocabulary.
//
//   logits [num_rows, vocab_size], f32, changed in between and restored
//   input  words (u32): ROW_WORDS per row, then what rows point to (layout: ops/cuda/sample.rs)
//   output words: OUT_WORDS per row, then the most likely tokens of rows that want them
//
// The order of work is the referee's (ops/reference/sample.rs): bitmask, lists, bias, penalties,
// temperature, min-p, top-k, top-p, and a draw by inverse CDF in ascending token id. NaN is -inf.
//
// A block per row. Weights e^(x - max) are integers of 2^-44, so that sums have the same bits in
// any order and a result depends neither on the number of threads nor on luck. A threshold (the
// k-th largest; where top-p is reached) is found eight bits of the float at a time with a
// histogram of 256 bins. Few elements take part: a bound below the threshold is known from the
// largest element that each thread saw, because k of those are k elements.
//
// Bound: latency of some passes over the row, which lies in the second-level cache: one pass for
// a greedy row, about nine with top-k and top-p.
//
// Report: sample_f32 sass=LDG.128
#include "dtype.cuh"
#include "reduce.cuh"

constexpr int MAX_THREADS = 1024;
constexpr int ROW_WORDS = 16;
constexpr int EDIT_WORDS = 3;
constexpr int OUT_WORDS = 6;
constexpr int BINS = 256;
// 2^18 weights of at most 1 still fit into 64 bits, and what truncation loses of them all is 2^-26.
constexpr float WEIGHT_ONE = 0x1p44f;

enum Flag : uint32_t { SCORE = 1, REPORT = 2, HAS_ALLOWED = 4, HAS_MIN_P = 8, HAS_BITMASK = 16 };
enum EditFlag : uint32_t { BANNED = 1, SEEN = 2 };
constexpr int COUNT_SHIFT = 2;

using u64 = unsigned long long;

// One row's words, as ops/cuda/sample.rs writes them. The words of its bitmask, where it has one,
// follow its allowed tokens: bits of all tokens, and none beyond.
struct Row {
  uint32_t flags, token_id;
  float temperature;
  uint32_t top_k;
  float top_p, ln_min_p, repetition, frequency, presence, uniform;
  uint32_t num_top, first_edit, num_edits, first_allowed, num_allowed, first_top;
};
static_assert(sizeof(Row) == ROW_WORDS * 4, "as ops/cuda/sample.rs writes it");

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000); }

// Keys have the order of floats; neither is NaN nor -0.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000 ? key & 0x7fffffff : ~key); }

__device__ __forceinline__ u64 weight_of(float x, float max) {
  return static_cast<u64>((x == max ? 1.0f : expf(x - max)) * WEIGHT_ONE);  // equal infinities weigh 1
}

// A row as some step sees it.
struct Logits {
  const float* x;
  int size;
  const uint32_t* allowed;  // a bit per token, or null
  float divisor;

  __device__ __forceinline__ float clean(float value, int i) const {
    if (allowed && !(allowed[i / 32] >> (i % 32) & 1)) return minus_infinity();
    if (value != value) return minus_infinity();
    return __fdiv_rn(value + 0.0f, divisor);  // the sum makes -0 a 0
  }
  __device__ __forceinline__ float at(int i) const { return clean(x[i], i); }

  // f(token, logit) for this thread's share.
  template <class F>
  __device__ __forceinline__ void for_mine(F f) const {
    constexpr int WIDE = 4;
    if (reinterpret_cast<uintptr_t>(x) % 16 == 0 && size % WIDE == 0) {
      for (int i = threadIdx.x * WIDE; i < size; i += blockDim.x * WIDE) {
        const float4 four = *reinterpret_cast<const float4*>(x + i);
        f(i, clean(four.x, i)), f(i + 1, clean(four.y, i + 1)), f(i + 2, clean(four.z, i + 2)), f(i + 3, clean(four.w, i + 3));
      }
    } else {
      for (int i = threadIdx.x; i < size; i += blockDim.x) f(i, at(i));
    }
  }
};

// The first largest element: its key above the complement of its index, so that one maximum finds
// both. `mine` is what this thread saw.
__device__ u64 argmax(const Logits& logits, u64& mine) {
  u64 best = 0;
  logits.for_mine([&](int i, float x) { best = Max()(best, static_cast<u64>(key_of(x)) << 32 | ~static_cast<uint32_t>(i)); });
  mine = best;
  return block_reduce(best, Max(), 0ull);
}
__device__ __forceinline__ int index_of(u64 best) { return static_cast<int>(~static_cast<uint32_t>(best)); }
__device__ __forceinline__ float largest_of(u64 best) { return value_of(best >> 32); }

template <class F>
__device__ __forceinline__ u64 total(const Logits& logits, F f) {
  u64 sum = 0;
  logits.for_mine([&](int i, float x) { sum += f(i, x); });
  return block_reduce(sum, Sum(), 0ull);
}

// The k-th largest of the threads' largest elements (as keys): at least k elements are as large.
// With more than a thread each, nothing is known.
__device__ uint32_t bound_of(u64 mine, uint32_t k) {
  __shared__ uint32_t keys[MAX_THREADS];
  __shared__ uint32_t bound;
  if (k > blockDim.x) return 0;
  __syncthreads();
  const uint32_t key = mine >> 32;
  keys[threadIdx.x] = key;
  __syncthreads();
  uint32_t rank = 0;
  for (uint32_t other = 0; other < blockDim.x; other++) rank += keys[other] > key || (keys[other] == key && other < threadIdx.x);
  if (rank == k - 1) bound = key;
  __syncthreads();
  return bound;
}

// Where the sum of measures, from the largest element down, reaches a target.
struct Crossing {
  uint32_t key;  // of the elements there
  u64 before;    // the sum of larger elements
  u64 there;     // the sum of those
};

// Bins 255 to 0 in order, eight per lane: finds the one in which the sum from `before` on reaches
// the target. Called by one warp.
__device__ __forceinline__ void cross_bins(const u64* bins, u64 before, u64 target, uint32_t* digit, Crossing* found) {
  constexpr int PER_LANE = BINS / WARP_LANES;
  const int lane = threadIdx.x % WARP_LANES;
  u64 sum = 0;
  for (int i = 0; i < PER_LANE; i++) sum += bins[BINS - 1 - lane * PER_LANE - i];
  u64 until = sum;
  for (int by = 1; by < WARP_LANES; by *= 2) {
    const u64 lower = __shfl_up_sync(FULL_WARP, until, by);
    if (lane >= by) until += lower;
  }
  const unsigned reached = __ballot_sync(FULL_WARP, before + until >= target);
  const int crossing = reached ? __ffs(reached) - 1 : WARP_LANES - 1;
  if (lane != crossing) return;
  u64 here = before + until - sum;
  int bin = BINS - 1 - lane * PER_LANE;
  const int last = bin - PER_LANE + 1;
  while (bin > last && here + bins[bin] < target) here += bins[bin--];
  *digit = bin;
  found->before = here;
  found->there = bins[bin];
}

// Elements with a key of at least `bound` take part; their measures reach the target.
template <class F>
__device__ __forceinline__ Crossing cross(const Logits& logits, uint32_t bound, u64 target, F measure) {
  __shared__ u64 bins[BINS];
  __shared__ uint32_t digit;
  __shared__ Crossing found;
  uint32_t prefix = 0, known = 0;
  u64 before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    logits.for_mine([&](int, float x) {
      const uint32_t key = key_of(x);
      if (key < bound || (key & known) != prefix) return;
      const u64 size = measure(x);
      if (size > 0) atomicAdd(&bins[key >> shift & (BINS - 1)], size);
    });
    __syncthreads();
    if (threadIdx.x < WARP_LANES) cross_bins(bins, before, target, &digit, &found);
    __syncthreads();
    prefix |= digit << shift;
    known |= static_cast<uint32_t>(BINS - 1) << shift;
    before = found.before;
  }
  return {prefix, before, found.there};
}

// The first element, by index, at which the sum of measures exceeds the target; where it never
// does, the last that measures anything.
template <class F>
__device__ __forceinline__ int first_beyond(const Logits& logits, u64 target, F measure) {
  __shared__ u64 sums[WARP_LANES];
  __shared__ int result;
  const int num_warps = blockDim.x / WARP_LANES, warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
  const int per_warp = (logits.size + num_warps - 1) / num_warps;
  const int first = min(logits.size, warp * per_warp), end = min(logits.size, first + per_warp);
  u64 sum = 0;
  int last = -1;
  for (int i = first + lane; i < end; i += WARP_LANES) {
    const u64 size = measure(i, logits.at(i));
    sum += size;
    if (size > 0) last = i;
  }
  sum = warp_reduce(sum, Sum());
  __syncthreads();
  if (lane == 0) sums[warp] = sum;
  if (threadIdx.x == 0) result = -1;
  __syncthreads();
  u64 before = 0;
  for (int w = 0; w < warp; w++) before += sums[w];
  if (before <= target && before + sum > target) {
    for (int start = first; start < end; start += WARP_LANES) {
      const int i = start + lane;
      u64 until = i < end ? measure(i, logits.at(i)) : 0;
      for (int by = 1; by < WARP_LANES; by *= 2) {
        const u64 lower = __shfl_up_sync(FULL_WARP, until, by);
        if (lane >= by) until += lower;
      }
      const unsigned beyond = __ballot_sync(FULL_WARP, before + until > target);
      if (beyond) {
        if (lane == 0) result = start + __ffs(beyond) - 1;
        break;
      }
      before += __shfl_sync(FULL_WARP, until, WARP_LANES - 1);
    }
  }
  last = block_reduce(last, Max(), -1);
  __syncthreads();
  return result >= 0 ? result : last;
}

// Which elements are left: those beyond a key, and of those with the key the first ones.
struct Kept {
  uint32_t key;
  int last;  // index up to which an element with that key is kept

  __device__ __forceinline__ bool has(int i, float x) const {
    const uint32_t found = key_of(x);
    return found > key || (found == key && i <= last);
  }
};

// Cuts so that, of the elements at a crossing, the `count` first ones are left.
__device__ __forceinline__ Kept keep_first(const Logits& logits, uint32_t key, u64 there, u64 count) {
  if (count >= there) return {key, logits.size};
  return {key, first_beyond(logits, count - 1, [&](int, float x) -> u64 { return key_of(x) == key; })};
}

// The n most likely elements, equal ones in ascending order; `mine` as argmax gives it.
__device__ Kept keep_top(const Logits& logits, u64 mine, uint32_t n) {
  const Crossing crossing = cross(logits, bound_of(mine, n), n, [](float) -> u64 { return 1; });
  return keep_first(logits, crossing.key, crossing.there, n - crossing.before);
}

// Bias, bans and penalties of single tokens. The words of an edit become its token's logit as it
// was, for undo().
__device__ void edit(float* logits, const Row& row, uint32_t* words) {
  for (uint32_t i = threadIdx.x; i < row.num_edits; i += blockDim.x) {
    uint32_t* const words_of = words + row.first_edit + i * EDIT_WORDS;
    const uint32_t flags = words_of[2], count = flags >> COUNT_SHIFT;
    float x = logits[words_of[0]];
    const float before = x;
    if (flags & BANNED) x = minus_infinity();
    if (x != x) x = minus_infinity();
    x += __uint_as_float(words_of[1]);
    if ((flags & SEEN) && row.repetition != 1.0f) x = x > 0.0f ? __fdiv_rn(x, row.repetition) : __fmul_rn(x, row.repetition);
    if (count > 0) x = __fsub_rn(__fsub_rn(x, __fmul_rn(row.frequency, static_cast<float>(count))), row.presence);
    logits[words_of[0]] = x;
    words_of[1] = __float_as_uint(before);
  }
  __syncthreads();
}

__device__ void undo(float* logits, const Row& row, const uint32_t* words) {
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < row.num_edits; i += blockDim.x) {
    const uint32_t* const words_of = words + row.first_edit + i * EDIT_WORDS;
    logits[words_of[0]] = __uint_as_float(words_of[1]);
  }
  __syncthreads();
}

// A bit per token that the list of allowed tokens, where there is one, and the bitmask, where
// there is one, both allow.
__device__ void mark_allowed(uint32_t* bits, int size, const Row& row, const uint32_t* words) {
  const uint32_t* const ids = words + row.first_allowed;
  const uint32_t* const bitmask = ids + row.num_allowed;
  const bool has_list = row.flags & HAS_ALLOWED, has_bitmask = row.flags & HAS_BITMASK;
  const int num_words = (size + 31) / 32;
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) bits[i] = has_list ? 0 : bitmask[i];
  __syncthreads();
  if (!has_list) return;
  for (uint32_t i = threadIdx.x; i < row.num_allowed; i += blockDim.x) atomicOr(&bits[ids[i] / 32], 1u << (ids[i] % 32));
  __syncthreads();
  if (!has_bitmask) return;
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) bits[i] &= bitmask[i];
  __syncthreads();
}

// Where nothing may be chosen: the first of the most likely tokens among those that the bitmask
// allows; of all, where it allows none.
__device__ int unchoosable(const Logits& raw, const Row& row, const uint32_t* words) {
  u64 mine;
  if (row.flags & HAS_BITMASK) {
    const uint32_t* const bitmask = words + row.first_allowed + row.num_allowed;
    u64 best = 0;  // less than any allowed token: keys of -inf are not 0
    raw.for_mine([&](int i, float x) {
      if (bitmask[i / 32] >> (i % 32) & 1) best = Max()(best, static_cast<u64>(key_of(x)) << 32 | ~static_cast<uint32_t>(i));
    });
    best = block_reduce(best, Max(), 0ull);
    if (best != 0) return index_of(best);
  }
  return index_of(argmax(raw, mine));
}

// Narrows scaled logits by min-p, top-k and top-p, and draws. `max` is the largest of them.
__device__ int draw(const Logits& scaled, u64 mine, float max, const Row& row) {
  // 0 stays 0: a thread that saw nothing.
  const u64 mine_scaled = mine == 0 ? 0 : static_cast<u64>(key_of(__fdiv_rn(value_of(mine >> 32), scaled.divisor))) << 32;
  float least = minus_infinity();
  if (row.flags & HAS_MIN_P) least = __fadd_rn(max, row.ln_min_p);
  if (row.top_k > 0 && row.top_k < static_cast<uint32_t>(scaled.size)) {
    const Crossing kth = cross(scaled, bound_of(mine_scaled, row.top_k), row.top_k, [](float) -> u64 { return 1; });
    least = fmaxf(least, value_of(kth.key));
  }
  Kept kept{key_of(least), scaled.size};
  const auto weight = [&](float x) { return weight_of(x, max); };
  u64 sum = total(scaled, [&](int i, float x) { return kept.has(i, x) ? weight(x) : 0; });
  if (row.top_p < 1.0f) {
    const double wanted = static_cast<double>(row.top_p) * static_cast<double>(sum);
    const u64 target = Max()(static_cast<u64>(ceil(wanted)), 1ull);
    // Usually a few hundred tokens are enough.
    uint32_t bound = Max()(kept.key, bound_of(mine_scaled, blockDim.x / 4));
    if (total(scaled, [&](int, float x) { return key_of(x) >= bound ? weight(x) : 0; }) < target) bound = kept.key;
    const Crossing crossing = cross(scaled, bound, target, weight);
    const u64 each = weight(value_of(crossing.key));
    const u64 count = (target - crossing.before + each - 1) / each;
    kept = keep_first(scaled, crossing.key, crossing.there / each, count);
    sum = crossing.before + Min()(count * each, crossing.there);
  }
  const u64 target = static_cast<u64>(static_cast<double>(row.uniform) * static_cast<double>(sum));
  return first_beyond(scaled, target, [&](int i, float x) { return kept.has(i, x) ? weight(x) : 0; });
}

__device__ int choose(float* x, int size, const Row& row, uint32_t* words, uint32_t* allowed_bits) {
  const Logits raw{x, size, nullptr, 1.0f};
  const bool has_allowed = row.flags & (HAS_ALLOWED | HAS_BITMASK);
  if (has_allowed) mark_allowed(allowed_bits, size, row, words);
  edit(x, row, words);
  Logits logits{x, size, has_allowed ? allowed_bits : nullptr, 1.0f};
  u64 mine;
  const u64 best = argmax(logits, mine);
  int chosen = index_of(best);
  const bool none = largest_of(best) == minus_infinity();
  if (!none && row.temperature != 0.0f) {
    logits.divisor = row.temperature;
    chosen = draw(logits, mine, __fdiv_rn(largest_of(best), row.temperature), row);
  }
  undo(x, row, words);
  return none ? unchoosable(raw, row, words) : chosen;
}

// The most likely tokens, in no order, after what log-probabilities are computed from.
__device__ void report(const Logits& raw, const Row& row, uint32_t* out, uint32_t* top) {
  __shared__ uint32_t num_found;
  u64 mine;
  const float max = largest_of(argmax(raw, mine));
  const u64 sum = total(raw, [&](int, float x) { return weight_of(x, max); });
  if (threadIdx.x == 0) {
    num_found = 0;
    out[3] = __float_as_uint(max), out[4] = static_cast<uint32_t>(sum), out[5] = static_cast<uint32_t>(sum >> 32);
  }
  __syncthreads();
  if (row.num_top == 0) return;
  const Kept kept = keep_top(raw, mine, row.num_top);
  raw.for_mine([&](int i, float x) {
    if (!kept.has(i, x)) return;
    const uint32_t place = atomicAdd(&num_found, 1u);
    top[2 * place] = i, top[2 * place + 1] = __float_as_uint(x);
  });
  __syncthreads();
}

// Block: whole warps. Dynamic shared memory: a bit per token where any row has a list of allowed tokens or a bitmask.
extern "C" __global__ void __launch_bounds__(MAX_THREADS) sample_f32(float* logits, uint32_t* words, uint32_t* output, int vocab_size) {
  SIMT_DYN_SHARED(uint32_t, allowed_bits);
  const Row row = reinterpret_cast<const Row*>(words)[blockIdx.x];
  float* x = logits + static_cast<size_t>(blockIdx.x) * vocab_size;
  uint32_t* out = output + blockIdx.x * OUT_WORDS;
  const Logits raw{x, vocab_size, nullptr, 1.0f};
  if (row.flags & REPORT) report(raw, row, out, output + row.first_top);
  const int token = row.flags & SCORE ? static_cast<int>(row.token_id) : choose(x, vocab_size, row, words, allowed_bits);
  if (threadIdx.x == 0) out[0] = token;
  if (!(row.flags & REPORT)) return;
  const float chosen = raw.at(token);
  const u64 better = total(raw, [&](int, float other) -> u64 { return other > chosen; });
  if (threadIdx.x == 0) out[1] = 1 + static_cast<uint32_t>(better), out[2] = __float_as_uint(chosen);
}
SIMT_EXPORT(sample_f32)
