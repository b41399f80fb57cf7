// Experts of few tokens, in every format: see include/experts.cuh and include/matmul_skinny.cuh.
//
// Row tiles have up to eight rows. `panels` are those of an expert.
//
// Shared memory in the report is that of one row on an A100; more rows take more and have fewer
// steps in flight.
//
// Report: experts_skinny_* sass=HMMA,LDS.128,LDGSTS.128 dynamic=68608
// Report: experts_skinny_int8 sass=IMMA,LDS.128,LDGSTS.128
// Report: experts_skinny_w8a16 dynamic=70656
// Report: experts_skinny_fp8 dynamic=70656
// Report: experts_skinny_fp8_rows dynamic=70656
// Report: experts_skinny_q8 dynamic=74752
// Report: experts_skinny_fp8_groups dynamic=74752
// Report: experts_skinny_int4 dynamic=80896
// Report: experts_skinny_int4_g32 dynamic=76288
// Report: experts_skinny_mxfp4 dynamic=78848
#include "experts.cuh"

// BLOCKS per multiprocessor is what shared memory allows on an H100, or one less where its registers would
// spill; left to itself, the compiler spills some at 64.
#define EXPERTS_SKINNY(format, W, BLOCKS)                                                                      \
  extern "C" __global__ void __launch_bounds__(32 * SKINNY_WARPS, BLOCKS)                                      \
      experts_skinny_##format(PRODUCT_PARAMETERS, EXPERT_PARAMETERS, const int* num_row_tiles, int panels) {   \
    Product product = PRODUCT;                                                                                 \
    product.x_rows = x_rows;                                                                                   \
    experts_skinny<W>(product, EXPERTS, *num_row_tiles, panels);                                               \
  }                                                                                                            \
  SIMT_EXPORT(experts_skinny_##format)

EXPERTS_SKINNY(bf16, DenseBf16, 3)
EXPERTS_SKINNY(int8, Int8, 3)
EXPERTS_SKINNY(w8a16, W8A16, 3)
EXPERTS_SKINNY(q8, Q8, 3)
EXPERTS_SKINNY(int4, Int4By64, 2)
EXPERTS_SKINNY(int4_g32, Int4By32, 2)
EXPERTS_SKINNY(mxfp4, Mxfp4, 2)
EXPERTS_SKINNY(fp8, Fp8, 3)
EXPERTS_SKINNY(fp8_rows, Fp8Rows, 2)
EXPERTS_SKINNY(fp8_groups, Fp8Groups, 2)
