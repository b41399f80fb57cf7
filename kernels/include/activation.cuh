// Non-linearities of gated MLPs, as `ops::args::Activation` numbers them.
#pragma once

#include "simt.h"

enum ActivationKind : int { ACTIVATION_NONE = -1, ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1, ACTIVATION_GELU = 2 };

__device__ __forceinline__ float activate(float x, int kind) {
  if (kind == ACTIVATION_SILU) return x / (1.f + expf(-x));
  if (kind == ACTIVATION_GELU_TANH) return .5f * x * (1.f + tanhf(.79788456f * (x + .044715f * x * x * x)));
  return .5f * x * erfcf(x * -.70710678f);  // 1 + erf would lose what is left of it far below 0
}
