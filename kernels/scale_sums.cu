// What a library's sums of e4m3 codes become: times the scales of their token and of their weight row,
// plus a bias; and the gated product of two such.
//
//   sums, out [rows, columns]; x_scales [rows]; scales, bias [columns]; columns a multiple of CHUNK
//
// Threads     a thread has CHUNK neighbouring columns of SCALE_ROWS rows, and reads their scales once.
// Bound       memory: sums read and results written, once each.
//
// Report: scale_* sass=LDG.128,STG.128
#include "product.cuh"

constexpr int SCALE_THREADS = 128;
constexpr int SCALE_ROWS = 4;  // as many loads are on their way at once, per operand

// What a thread reads of an operand before it writes anything.
template <class T>
struct Sums {
  Pack<T, CHUNK> rows[SCALE_ROWS];
  // Rows behind the last are copies of it, which nobody writes.
  __device__ __forceinline__ Sums(const T* from, int num_rows, int columns, int column) {
#pragma unroll
    for (int i = 0; i < SCALE_ROWS; i++) {
      const int row = min(int(blockIdx.y) * SCALE_ROWS + i, num_rows - 1);
      rows[i] = load_pack<T, CHUNK>(from + size_t(row) * columns + column);
    }
  }
};

// Of the columns of a thread.
struct ColumnScales {
  float scale[CHUNK], bias[CHUNK];
  __device__ __forceinline__ ColumnScales(const void* scales, int scale_type, const void* biases, int bias_type, int column) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      scale[i] = read_element(scales, scale_type, column + i);
      bias[i] = biases ? read_element(biases, bias_type, column + i) : 0.f;
    }
  }
  // As our own kernels finish their sums.
  __device__ __forceinline__ float finish(float sum, float of_token, int i) const { return finished(sum, __fmul_rn(of_token, scale[i]), bias[i]); }
};

template <class T>
__device__ __forceinline__ void scale_sums(T* out, const float* x_scales, const void* scales, const void* bias, int rows, int columns, int scale_type, int bias_type) {
  const int column = (blockIdx.x * SCALE_THREADS + threadIdx.x) * CHUNK;
  if (column >= columns) return;
  Sums<T> sums(out, rows, columns, column);
  const ColumnScales of_columns(scales, scale_type, bias, bias_type, column);
#pragma unroll
  for (int i = 0; i < SCALE_ROWS; i++) {
    const int row = blockIdx.y * SCALE_ROWS + i;
    if (row >= rows) break;
    const float of_token = x_scales[row];
#pragma unroll
    for (int j = 0; j < CHUNK; j++) sums.rows[i].x[j] = from_float<T>(of_columns.finish(to_float(sums.rows[i].x[j]), of_token, j));
    store_pack<T, CHUNK>(out + size_t(row) * columns + column, sums.rows[i]);
  }
}

#define SCALE_SUMS(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(SCALE_THREADS)                                                             \
      scale_sums_##name(T* out /* in: sums */, const float* x_scales, const void* scales, const void* bias /* or null */, \
                        int rows, int columns, int scale_type, int bias_type) {                                           \
    scale_sums(out, x_scales, scales, bias, rows, columns, scale_type, bias_type);                                        \
  }                                                                                                                       \
  SIMT_EXPORT(scale_sums_##name)

SCALE_SUMS(bf16, bf16)
SCALE_SUMS(f32, float)

// `activation(gate) · up` of two sums, each rounded to bf16 first as if it had been written.
extern "C" __global__ void __launch_bounds__(SCALE_THREADS)
    scale_gated(bf16* out, const bf16* gate /* sums */, const bf16* up /* sums */, const float* x_scales, const void* gate_scales,
                const void* gate_bias /* or null */, const void* up_scales, const void* up_bias /* or null */, int rows, int columns,
                int scale_type, int gate_bias_type, int up_bias_type, int activation) {
  const int column = (blockIdx.x * SCALE_THREADS + threadIdx.x) * CHUNK;
  if (column >= columns) return;
  const Sums<bf16> gates(gate, rows, columns, column), ups(up, rows, columns, column);
  const ColumnScales of_gate(gate_scales, scale_type, gate_bias, gate_bias_type, column);
  const ColumnScales of_up(up_scales, scale_type, up_bias, up_bias_type, column);
#pragma unroll
  for (int i = 0; i < SCALE_ROWS; i++) {
    const int row = blockIdx.y * SCALE_ROWS + i;
    if (row >= rows) break;
    const float of_token = x_scales[row];
    Pack<bf16, CHUNK> pack;
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const float value = rounded(of_gate.finish(to_float(gates.rows[i].x[j]), of_token, j), TYPE_BF16);
      const float factor = rounded(of_up.finish(to_float(ups.rows[i].x[j]), of_token, j), TYPE_BF16);
      pack.x[j] = from_float<bf16>(activate(value, activation) * factor);
    }
    store_pack<bf16, CHUNK>(out + size_t(row) * columns + column, pack);
  }
}
SIMT_EXPORT(scale_gated)
