// Sums the tensors of all ranks of a replica, on every rank: one-shot all-reduce between GPUs that
// reach each other's memory.
//
//   data          [num_elements] from first_element on, T; replaced by the sums
//   exchanges     [world] addresses; exchange r is memory of rank r that every rank can reach:
//                   flags   u32 [MAX_BLOCKS][MAX_WORLD]  the last round that rank j's block b said it was ready for
//                   rounds  u32 [MAX_BLOCKS]             the last round of rank r's block b; its own
//                   halves  two of capacity_bytes, from HEADER_BYTES on
//                 all zero before the first launch of any rank
//
// A block copies its part of `data` to its rank's exchange, tells the blocks of the same number on
// all ranks, waits until all of them told it, and adds what lies in all exchanges, in the order
// of ranks, in f32: so every rank gets the same bits. Written after the published descriptions of
// one-shot all-reduce in TensorRT-LLM and vLLM.
//
// One barrier is enough, because rounds take turns between two halves: a block writes to a half
// again two rounds later, and the barrier of the round in between told it that all ranks had read
// what was there. That holds for every block by itself, since it owns the same bytes of every
// exchange in every launch, whatever the size: packs first, first + MAX_BLOCKS * THREADS, and so
// on. Rounds are counted in device memory, so that a recorded launch can be replayed.
//
// All ranks launch the same sizes in the same order, and the blocks of a launch are resident
// together: there are fewer than any supported device has multiprocessors.
//
// Bound: latency, of a write and a read over the link; then (world - 1) · bytes over the link.
//
// Report: all_reduce_* threads=512 sass=LDG.128,STG.128
#include "dtype.cuh"
#include "reduce.cuh"

// As ops/cuda/all_reduce.rs has them. Of the whole data 256 KiB are one pack per thread: more than
// the sums of a decode step.
constexpr int THREADS = 512;
constexpr int MAX_BLOCKS = 32;
constexpr int MAX_WORLD = 8;
constexpr int HEADER_BYTES = 4096;
static_assert((MAX_WORLD + 1) * MAX_BLOCKS * sizeof(uint32_t) <= HEADER_BYTES, "flags and rounds lie in the header");

#ifdef __CUDACC__
// What this thread wrote, and what it saw others write before a barrier, is there for whoever
// reads this value.
__device__ __forceinline__ void tell(uint32_t* flag, uint32_t round) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(round) : "memory");
}
__device__ __forceinline__ void wait_for(const uint32_t* flag, uint32_t round) {
  uint32_t told;
  do {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(told) : "l"(flag) : "memory");
  } while (static_cast<int32_t>(told - round) < 0);
}
#else
// Ranks are threads of the host there, which let others go first wherever that might matter.
#include <sched.h>
#include <time.h>
inline void let_others_go_first() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  for (long i = now.tv_nsec / 64 % 4; i > 0; i--) sched_yield();
}
inline void tell(uint32_t* flag, uint32_t round) {
  let_others_go_first();
  __atomic_store_n(flag, round, __ATOMIC_RELEASE);
}
inline void wait_for(const uint32_t* flag, uint32_t round) {
  constexpr time_t PATIENCE_SECONDS = 20;  // of this thread alone
  const auto seconds = [] {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec;
  };
  const time_t until = seconds() + PATIENCE_SECONDS;
  while (static_cast<int32_t>(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - round) < 0) {
    if (seconds() > until) simt::machine().fail_at({"wait_for", __FILE__, __LINE__}, "a rank does not come to an all-reduce");
    sched_yield();
  }
  let_others_go_first();
}
#endif

__device__ __forceinline__ unsigned char* exchange_of(const uint64_t* exchanges, int rank) { return reinterpret_cast<unsigned char*>(exchanges[rank]); }

// Until the blocks of this number are here on all ranks, with everything that they wrote.
template <int WORLD>
__device__ __forceinline__ void meet(const uint64_t* exchanges, int rank, uint32_t round) {
  __syncthreads();
  if (threadIdx.x < WARP_LANES) {
    const int peer = threadIdx.x, row = blockIdx.x * MAX_WORLD;
    if (peer < WORLD) tell(reinterpret_cast<uint32_t*>(exchange_of(exchanges, peer)) + row + rank, round);
    __syncwarp();  // nobody waits before all were told
    if (peer < WORLD) wait_for(reinterpret_cast<const uint32_t*>(exchange_of(exchanges, rank)) + row + peer, round);
  }
  __syncthreads();
}

template <class T, int WORLD>
__device__ __forceinline__ void all_reduce(T* data, const uint64_t* exchanges, int rank, int num_elements, int capacity_bytes) {
  constexpr int LANES = 16 / sizeof(T), STRIDE = MAX_BLOCKS * THREADS;
  using Lanes = Pack<T, LANES>;
  unsigned char* const own = exchange_of(exchanges, rank);
  uint32_t* const rounds = reinterpret_cast<uint32_t*>(own) + MAX_BLOCKS * MAX_WORLD;
  const uint32_t round = rounds[blockIdx.x] + 1;
  const size_t half = HEADER_BYTES + static_cast<size_t>(round % 2) * capacity_bytes;
  const int first = blockIdx.x * THREADS + threadIdx.x, num_packs = (num_elements + LANES - 1) / LANES;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const auto is_whole = [&](int i) { return aligned && (i + 1) * LANES <= num_elements; };

  for (int i = first; i < num_packs; i += STRIDE) {
    Lanes mine;
    if (is_whole(i)) {
      mine = load_pack<T, LANES>(data + i * LANES);
    } else {
#pragma unroll
      for (int lane = 0; lane < LANES; lane++) mine.x[lane] = i * LANES + lane < num_elements ? data[i * LANES + lane] : T{};
    }
    store_pack<T, LANES>(reinterpret_cast<T*>(own + half) + i * LANES, mine);
  }
  meet<WORLD>(exchanges, rank, round);

  const T* from[WORLD];
#pragma unroll
  for (int r = 0; r < WORLD; r++) from[r] = reinterpret_cast<const T*>(exchange_of(exchanges, r) + half);
  for (int i = first; i < num_packs; i += STRIDE) {
    Lanes of_rank[WORLD];
#pragma unroll
    for (int r = 0; r < WORLD; r++) of_rank[r] = load_pack<T, LANES>(from[r] + i * LANES);
    Lanes sums;
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      float sum = to_float(of_rank[0].x[lane]);
#pragma unroll
      for (int r = 1; r < WORLD; r++) sum += to_float(of_rank[r].x[lane]);
      sums.x[lane] = from_float<T>(sum);
    }
    if (is_whole(i)) {
      store_pack<T, LANES>(data + i * LANES, sums);
    } else {
#pragma unroll
      for (int lane = 0; lane < LANES; lane++)
        if (i * LANES + lane < num_elements) data[i * LANES + lane] = sums.x[lane];
    }
  }
  if (threadIdx.x == 0) rounds[blockIdx.x] = round;  // which all threads read before they met
}

#define ALL_REDUCE(name, T, WORLD)                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                          \
      all_reduce_##name(T* data, const uint64_t* exchanges, int rank, uint64_t first_element, int num_elements, int capacity_bytes) { \
    all_reduce<T, WORLD>(data + first_element, exchanges, rank, num_elements, capacity_bytes);                                   \
  }                                                                                                                              \
  SIMT_EXPORT(all_reduce_##name)

ALL_REDUCE(bf16_w2, bf16, 2)
ALL_REDUCE(bf16_w4, bf16, 4)
ALL_REDUCE(bf16_w8, bf16, 8)
ALL_REDUCE(f16_w2, f16, 2)
ALL_REDUCE(f16_w4, f16, 4)
ALL_REDUCE(f16_w8, f16, 8)
ALL_REDUCE(f32_w2, float, 2)
ALL_REDUCE(f32_w4, float, 4)
ALL_REDUCE(f32_w8, float, 8)
