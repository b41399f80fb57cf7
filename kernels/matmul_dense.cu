// Products of more than sixteen rows with row-major bf16 or f16 weights, where cuBLASLt cannot be
// opened: see include/matmul_tiles.cuh. And products with dense weights that no other kernel takes.
//
// Report: matmul_few_* dynamic=98304 sass=HMMA,LDSM,LDGSTS.128
// Report: matmul_many_* dynamic=98304 sass=HMMA,LDSM,LDGSTS.128
#include "matmul_tiles.cuh"
#include "reduce.cuh"

#define MATMUL_TILES(size, format, W, BLOCKS, TOKENS, WARPS_M, WARPS_N, PANELS, STAGES)                                   \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS) matmul_##size##_##format(PRODUCT_PARAMETERS) { \
    const Product product = PRODUCT;                                                                                  \
    matmul_tiles<Shape<W, TOKENS, WARPS_M, WARPS_N, PANELS, STAGES>>(product);                                                   \
  }                                                                                                                   \
  SIMT_EXPORT(matmul_##size##_##format)

MATMUL_TILES(few, bf16, DenseBf16, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(few, f16, DenseF16, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(many, bf16, DenseBf16, 2, 8, 2, 2, 2, 3)
MATMUL_TILES(many, f16, DenseF16, 2, 8, 2, 2, 2, 3)

constexpr int PLAIN_WARPS = 4;

// One output per warp, any dtypes: for weights whose rows are not whole runs of sixteen bytes, or
// whose dtype is not the activations'. Lanes sum every 32nd product, then each other's. Bound: loads.
template <class T>
__device__ __forceinline__ void matmul_plain(void* out, const T* x, const void* weight, const void* bias, int columns, int k, int weight_type, int bias_type, int out_type) {
  const int column = blockIdx.x * PLAIN_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t row = blockIdx.y;
  if (column >= columns) return;
  float sum = 0.f;
  for (int i = lane; i < k; i += 32) sum += to_float(x[row * k + i]) * read_element(weight, weight_type, size_t(column) * k + i);
  sum = warp_sum(sum);
  if (bias) sum += read_element(bias, bias_type, column);
  if (lane == 0) write_element(out, out_type, row * columns + column, sum);
}

#define MATMUL_PLAIN(T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * PLAIN_WARPS)                                                     \
      matmul_plain_##T(void* out /* [rows, columns] */, const T* x /* [rows, k] */, const void* weight /* [columns, k] */, \
                       const void* bias /* [columns] or null */, int columns, int k, int weight_type, int bias_type, int out_type) { \
    matmul_plain(out, x, weight, bias, columns, k, weight_type, bias_type, out_type);                                \
  }                                                                                                                  \
  SIMT_EXPORT(matmul_plain_##T)

MATMUL_PLAIN(bf16)
MATMUL_PLAIN(f16)
