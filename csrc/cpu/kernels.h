// Interface of the CPU kernels: one table of functions per instruction set.
//
// Tensors are dense NHWC, the weight is OIHW or OHWI, per-channel vectors are float32. `dtype` is the storage type of
// tensors and weight; sums are float32. A null pointer means "absent".
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace resnext_kernels::cpu {

// v -> scale * v + shift per channel; absent when scale is null.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// The gradient behind BatchNorm + ReLU, formed as dy is loaded:
//   g = dy where the ReLU passed, else 0;   dz = a * g + b * z + c
// The mask is !(y <= 0) when y is given, else !(scale * z + shift <= 0); with neither, g = dy. With z null, dz = dy;
// with b and c null (frozen statistics), dz = a * g.
struct ReluBNGradient {
  const void* dy = nullptr;
  const void* z = nullptr;
  Affine affine;
  const void* y = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* c = nullptr;
};

// Per channel: gamma * (v - mean) / sqrt(var + eps) + beta; 1 and 0 when gamma and beta are null.
struct BatchNorm {
  const float* gamma = nullptr;
  const float* beta = nullptr;
  const float* mean = nullptr;
  const float* var = nullptr;
  float eps = 0;
};

// A result must not overlap an input, except where it is said.
struct Kernels {
  const char* isa;
  bool (*supported)();

  // y = relu(scale * conv(a) + shift [+ residual]),  a = x or relu(prologue(x))
  void (*conv_affine_relu)(const ConvProblem&, const void* x, const void* weight, Affine affine, const void* residual,
                           Affine prologue, void* y, int num_threads);

  // z = conv(a); mean and biased variance of z per channel unless mean is null
  void (*conv_stats)(const ConvProblem&, const void* x, const void* weight, Affine prologue, void* z, float* mean,
                     float* var, int num_threads);

  // dx (with respect to a) unless null, dweight unless null
  void (*conv_backward)(const ConvProblem&, const ReluBNGradient& gradient, const void* x, Affine prologue,
                        const void* weight, void* dx, void* dweight, int num_threads);

  // The dense 1x1 convolution in float32 on matrices, x (M, C), weight (K, C), C and K multiples of 16:
  // z = a weight^T, or y = relu(scale * z + shift [+ residual]) where affine is given; a = x or relu(prologue(x));
  // mean and biased variance of z per channel unless mean is null
  void (*conv1x1)(int64_t M, int64_t C, int64_t K, const float* x, Affine prologue, const float* weight, Affine affine,
                  const float* residual, float* y, float* mean, float* var, int num_threads);

  // da = dz weight, with `add` added to what is there, unless null; dweight = dz^T a unless null
  void (*conv1x1_backward)(int64_t M, int64_t C, int64_t K, const float* dz, const float* x, Affine prologue,
                           const float* weight, float* da, bool add, float* dweight, int num_threads);

  // The rest works on z as an (M, C) matrix.
  void (*batch_stats)(DType, int64_t M, int64_t C, const void* z, float* mean, float* var, int num_threads);

  // y = relu(scale * z + shift [+ residual_affine(residual)]); y may be z
  void (*normalize_relu)(DType, int64_t M, int64_t C, const void* z, Affine affine, const void* residual,
                         Affine residual_affine, void* y, int num_threads);

  // sum_g = sum of g, sum_g_xhat = sum of g * (z - mean) * rstd, and g itself unless null
  void (*bn_relu_backward)(DType, int64_t M, int64_t C, const ReluBNGradient& gradient, const float* mean,
                           const float* rstd, float* sum_g, float* sum_g_xhat, void* g, int num_threads);

  // dz = a * g + b * z + c; dz may be dy
  void (*bn_relu_input_gradient)(DType, int64_t M, int64_t C, const ReluBNGradient& gradient, void* dz,
                                 int num_threads);

  // On vectors of C channels alone.
  // scale = gamma * rstd and shift = beta - mean * scale, rstd = 1 / sqrt(var + eps)
  void (*bn_affine)(int64_t C, const BatchNorm& bn, float* scale, float* shift);

  // vectors, (5, C): mean, unbias * var, rstd, scale, shift
  // bn.mean and bn.var may be the first two rows of `vectors`
  void (*bn_vectors)(int64_t C, const BatchNorm& bn, float unbias, float* vectors);

  // running = (1 - momentum) * running + momentum * batch, from the first two rows of the (5, C) of bn_vectors
  void (*update_running)(int64_t C, const float* vectors, double momentum, float* mean, float* var);

  // b and c of dz = scale * g + b * z + c from the sums over `count` values and the (5, C) of bn_vectors
  void (*bn_gradient_vectors)(int64_t C, const float* sum_g, const float* sum_g_xhat, const float* vectors, float count,
                              float* b, float* c);

  // Multiply-adds on registers, to measure the peak of the machine; returns the floating-point operations made.
  int64_t (*multiply_adds)(int64_t rounds, int num_threads);
};

const Kernels& kernels_avx512_bf16();  // bfloat16 multiplied in pairs, forward without a prologue
const Kernels& kernels_avx512();
const Kernels& kernels_avx2();
const Kernels& kernels_neon();
const Kernels& kernels_baseline();

// The tables that were compiled and that this machine can run, best first; ends with a null pointer.
const Kernels* const* supported_kernels();

// The table in use; null from select_kernels when the name is not among the supported.
const Kernels& kernels();
const Kernels* select_kernels(const char* isa);

// Scratch memory of a call, 64-byte aligned: it belongs to the calling thread, which shares it with the threads of its
// parallel regions, is kept between calls and grown on demand. Throws std::bad_alloc, so never within a region.
float* workspace(size_t floats);

}  // namespace resnext_kernels::cpu
