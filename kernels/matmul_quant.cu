// Products of more than sixteen rows with quantized weights: see include/matmul_tiles.cuh.
//
// `few` is for up to 64 rows, whose time is that of the weights' bytes: tiles of 64 × 128, and k is
// split so that all multiprocessors load. `many` has tiles of 128 × 128, whose time is that of the
// tensor cores. A warp owns 64 × 64 where sums of groups need no second set of registers, else 64 × 32.
//
// Report: matmul_* sass=HMMA,LDS.128,LDGSTS.128
// Report: matmul_*_int8 sass=IMMA,LDS.128,LDGSTS.128
// Report: matmul_*_int8 dynamic=98304
// Report: matmul_few_w8a16 dynamic=65536
// Report: matmul_many_w8a16 dynamic=98304
// Report: matmul_few_fp8 dynamic=65536
// Report: matmul_many_fp8 dynamic=98304
// Report: matmul_few_fp8_rows dynamic=65536
// Report: matmul_many_fp8_rows dynamic=98304
// Report: matmul_few_q8 dynamic=67584
// Report: matmul_many_q8 dynamic=75264
// Report: matmul_few_fp8_groups dynamic=67584
// Report: matmul_many_fp8_groups dynamic=75264
// Report: matmul_few_int4 dynamic=63360
// Report: matmul_many_int4 dynamic=83456
// Report: matmul_few_int4_g32 dynamic=65280
// Report: matmul_many_int4_g32 dynamic=84992
// Report: matmul_few_mxfp4 dynamic=62720
// Report: matmul_many_mxfp4 dynamic=82944
#include "matmul_tiles.cuh"

#define MATMUL_TILES(size, format, W, BLOCKS, TOKENS, WARPS_M, WARPS_N, PANELS, STAGES)                                   \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS) matmul_##size##_##format(PRODUCT_PARAMETERS) { \
    const Product product = PRODUCT;                                                                                  \
    matmul_tiles<Shape<W, TOKENS, WARPS_M, WARPS_N, PANELS, STAGES>>(product);                                                   \
  }                                                                                                                   \
  SIMT_EXPORT(matmul_##size##_##format)

MATMUL_TILES(few, int8, Int8, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(few, w8a16, W8A16, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(few, q8, Q8, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(few, int4, Int4By64, 2, 8, 1, 4, 1, 5)
MATMUL_TILES(few, int4_g32, Int4By32, 2, 8, 1, 4, 1, 5)
MATMUL_TILES(few, mxfp4, Mxfp4, 2, 8, 1, 4, 1, 5)
MATMUL_TILES(few, fp8, Fp8, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(few, fp8_rows, Fp8Rows, 2, 8, 1, 4, 1, 4)
MATMUL_TILES(few, fp8_groups, Fp8Groups, 2, 8, 1, 4, 1, 4)

MATMUL_TILES(many, int8, Int8, 2, 8, 2, 2, 2, 3)
MATMUL_TILES(many, w8a16, W8A16, 2, 8, 2, 2, 2, 4)
MATMUL_TILES(many, q8, Q8, 1, 8, 2, 4, 1, 3)
MATMUL_TILES(many, int4, Int4By64, 1, 8, 2, 4, 1, 4)
MATMUL_TILES(many, int4_g32, Int4By32, 1, 8, 2, 4, 1, 4)
MATMUL_TILES(many, mxfp4, Mxfp4, 1, 8, 2, 4, 1, 4)
MATMUL_TILES(many, fp8, Fp8, 2, 8, 2, 2, 2, 4)
MATMUL_TILES(many, fp8_rows, Fp8Rows, 2, 8, 2, 2, 2, 4)
MATMUL_TILES(many, fp8_groups, Fp8Groups, 1, 8, 2, 4, 1, 3)
