// Experts of many tokens, in every format: see include/experts.cuh and include/matmul_tiles.cuh.
//
// `few` has row tiles of 64 rows, `many` of 128; shapes of tiles and steps in flight are those of
// `matmul_dense.cu` and `matmul_quant.cu`.
//
// Report: experts_* sass=HMMA,LDS.128,LDGSTS.128
// Report: experts_*_int8 sass=IMMA,LDS.128,LDGSTS.128
// Report: experts_few_bf16 dynamic=98304 sass=HMMA,LDSM,LDGSTS.128
// Report: experts_many_bf16 dynamic=98304 sass=HMMA,LDSM,LDGSTS.128
// Report: experts_few_int8 dynamic=98304
// Report: experts_many_int8 dynamic=98304
// Report: experts_few_w8a16 dynamic=65536
// Report: experts_many_w8a16 dynamic=98304
// Report: experts_few_fp8 dynamic=65536
// Report: experts_many_fp8 dynamic=98304
// Report: experts_few_fp8_rows dynamic=65536
// Report: experts_many_fp8_rows dynamic=98304
// Report: experts_few_q8 dynamic=67584
// Report: experts_many_q8 dynamic=75264
// Report: experts_few_fp8_groups dynamic=67584
// Report: experts_many_fp8_groups dynamic=75264
// Report: experts_few_int4 dynamic=63360
// Report: experts_many_int4 dynamic=83456
// Report: experts_few_int4_g32 dynamic=65280
// Report: experts_many_int4_g32 dynamic=84992
// Report: experts_few_mxfp4 dynamic=62720
// Report: experts_many_mxfp4 dynamic=82944
#include "experts.cuh"

#define EXPERTS_TILES(size, format, W, BLOCKS, TOKENS, WARPS_M, WARPS_N, PANELS, STAGES)         \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS)                   \
      experts_##size##_##format(PRODUCT_PARAMETERS, EXPERT_PARAMETERS) {                         \
    Product product = PRODUCT;                                                                   \
    product.x_rows = x_rows;                                                                     \
    experts_tiles<Shape<OfTokens<W>, TOKENS, WARPS_M, WARPS_N, PANELS, STAGES>>(product, EXPERTS); \
  }                                                                                              \
  SIMT_EXPORT(experts_##size##_##format)

EXPERTS_TILES(few, bf16, DenseBf16, 2, 8, 1, 4, 1, 4)
EXPERTS_TILES(few, int8, Int8, 2, 8, 1, 4, 1, 4)
EXPERTS_TILES(few, w8a16, W8A16, 2, 8, 1, 4, 1, 4)
EXPERTS_TILES(few, q8, Q8, 2, 8, 1, 4, 1, 4)
EXPERTS_TILES(few, int4, Int4By64, 2, 8, 1, 4, 1, 5)
EXPERTS_TILES(few, int4_g32, Int4By32, 2, 8, 1, 4, 1, 5)
EXPERTS_TILES(few, mxfp4, Mxfp4, 2, 8, 1, 4, 1, 5)
EXPERTS_TILES(few, fp8, Fp8, 2, 8, 1, 4, 1, 4)
EXPERTS_TILES(few, fp8_rows, Fp8Rows, 2, 8, 1, 4, 1, 4)
EXPERTS_TILES(few, fp8_groups, Fp8Groups, 2, 8, 1, 4, 1, 4)

EXPERTS_TILES(many, bf16, DenseBf16, 2, 8, 2, 2, 2, 3)
EXPERTS_TILES(many, int8, Int8, 2, 8, 2, 2, 2, 3)
EXPERTS_TILES(many, w8a16, W8A16, 2, 8, 2, 2, 2, 4)
EXPERTS_TILES(many, q8, Q8, 1, 8, 2, 4, 1, 3)
EXPERTS_TILES(many, int4, Int4By64, 1, 8, 2, 4, 1, 4)
EXPERTS_TILES(many, int4_g32, Int4By32, 1, 8, 2, 4, 1, 4)
EXPERTS_TILES(many, mxfp4, Mxfp4, 1, 8, 2, 4, 1, 4)
EXPERTS_TILES(many, fp8, Fp8, 2, 8, 2, 2, 2, 4)
EXPERTS_TILES(many, fp8_rows, Fp8Rows, 2, 8, 2, 2, 2, 4)
EXPERTS_TILES(many, fp8_groups, Fp8Groups, 1, 8, 2, 4, 1, 3)
