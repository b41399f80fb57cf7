// Products of 1 to 16 rows in every format: see include/matmul_skinny.cuh.
//
// `tiles` are panels of 32 columns, of all weights together.
//
// Shared memory in the report is that of one row on an A100; more rows take more and have fewer
// steps in flight.
//
// Report: matmul_skinny_* sass=HMMA,LDS.128,LDGSTS.128 dynamic=68608
// Report: matmul_skinny_int8 sass=IMMA,LDS.128,LDGSTS.128
// Report: matmul_skinny_w8a16 dynamic=70656
// Report: matmul_skinny_fp8 dynamic=70656
// Report: matmul_skinny_fp8_rows dynamic=70656
// Report: matmul_skinny_q8 dynamic=74752
// Report: matmul_skinny_fp8_groups dynamic=74752
// Report: matmul_skinny_int4 dynamic=80896
// Report: matmul_skinny_int4_g32 dynamic=76288
// Report: matmul_skinny_mxfp4 dynamic=78848
#include "matmul_skinny.cuh"

#define MATMUL_SKINNY(format, W)                                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * SKINNY_WARPS) matmul_skinny_##format(PRODUCT_PARAMETERS, int tiles) { \
    const Product product = PRODUCT;                                                                               \
    matmul_skinny<W>(product, Panels(), tiles);                                                                    \
  }                                                                                                                \
  SIMT_EXPORT(matmul_skinny_##format)

MATMUL_SKINNY(bf16, DenseBf16)
MATMUL_SKINNY(f16, DenseF16)
MATMUL_SKINNY(int8, Int8)
MATMUL_SKINNY(w8a16, W8A16)
MATMUL_SKINNY(q8, Q8)
MATMUL_SKINNY(int4, Int4By64)
MATMUL_SKINNY(int4_g32, Int4By32)
MATMUL_SKINNY(mxfp4, Mxfp4)
MATMUL_SKINNY(fp8, Fp8)
MATMUL_SKINNY(fp8_rows, Fp8Rows)
MATMUL_SKINNY(fp8_groups, Fp8Groups)
