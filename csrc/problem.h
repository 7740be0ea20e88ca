// The one description of a convolution that every kernel of the compiled library takes.
#pragma once

#include <cstdint>

namespace resnext_kernels {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A grouped 3x3 convolution without bias, padding == dilation.
//   x (N, H, W, C)  ->  z (N, out_h, out_w, K),   weight and dweight (K, C / groups, 3, 3), or (K, 3, 3, C / groups)
struct ConvProblem {
  int64_t N, H, W, C, K, groups, stride, dilation;
  DType dtype;
  bool weight_channels_last = false;

  int64_t out_h() const { return (H - 1) / stride + 1; }
  int64_t out_w() const { return (W - 1) / stride + 1; }
  int64_t din() const { return C / groups; }   // input channels per group
  int64_t dout() const { return K / groups; }  // output channels per group
};

}  // namespace resnext_kernels
