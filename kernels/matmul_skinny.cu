// Products of 1 to 16 rows in every format: see include/matmul_skinny.cuh.
//
// `tiles` are panels of 32 columns, of all weights together.
#include "matmul_skinny.cuh"

#define MATMUL_SKINNY(format, W)                                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * SKINNY_WARPS) matmul_skinny_##format(PRODUCT_PARAMETERS, int tiles) { \
    const Product product = PRODUCT;                                                                               \
    matmul_skinny<W>(product, tiles);                                                                              \
  }                                                                                                                \
  SIMT_EXPORT(matmul_skinny_##format)

MATMUL_SKINNY(bf16, DenseBf16)
MATMUL_SKINNY(f16, DenseF16)
MATMUL_SKINNY(int8, Int8)
MATMUL_SKINNY(w8a16, W8A16)
MATMUL_SKINNY(q8, Q8)
MATMUL_SKINNY(int4, Int4By64)
MATMUL_SKINNY(int4_g32, Int4By32)
MATMUL_SKINNY(fp8, Fp8)
MATMUL_SKINNY(fp8_groups, Fp8Groups)
