// Launches as plain data: from a problem to kernel names, grids and parameter structs. No CUDA, no device.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../problem.h"

namespace resnext_kernels::cuda {

// What a plan depends on of a device.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block can have at most
};

struct Launch {
  std::string kernel;
  std::array<unsigned, 3> grid;
  unsigned block;
  int shared_bytes;
  std::vector<char> params;  // the kernel's one argument
  int workspace_at = -1;     // where in params the workspace's address belongs
};

struct Plan {
  std::vector<Launch> launches;  // to run in this order on one stream
  int64_t workspace_floats = 0;
};

struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// g = dy where the ReLU passed, else 0; without affine and y, g = dy. dz = a * g [+ b * z + c]; with z null, dz = dy.
struct Gradient {
  const void* dy = nullptr;
  const void* z = nullptr;
  Affine affine;
  const void* y = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* c = nullptr;
};

// Of C channels; gamma, beta null: 1 and 0. mean and var are not read where the statistics of the batch are taken.
struct BatchNorm {
  int64_t C;
  const float* gamma;
  const float* beta;
  const float* mean;
  const float* var;
  float eps;
};

// Why the convolution kernels do not take a problem; empty where they do.
std::string why_not(const ConvProblem& problem);

// (K, D, 3, 3); channels_last: (K, 3, 3, D) in memory
struct Weight {
  const void* data;
  bool channels_last;
};

// bn.var null: bn.gamma and bn.beta are scale and shift
Plan plan_conv_bn_relu(const ConvProblem&, const Device&, const void* x, Weight weight, const BatchNorm& bn,
                       const void* residual, Affine prologue, void* y);
// vectors: (5, C) of the BatchNorm: mean, unbiased variance, rstd, scale, shift; null: not needed
Plan plan_conv_stats(const ConvProblem&, const Device&, const void* x, Weight weight, Affine prologue, void* z,
                     const BatchNorm& bn, float* vectors);
// dx null, dweight null: not needed; dweight lies as the weight does
Plan plan_conv_backward(const ConvProblem&, const Device&, const Gradient& gradient, const void* x, Affine prologue,
                        Weight weight, void* dx, void* dweight);

// z as an (M, C) matrix, C a multiple of 8
Plan plan_batch_stats(DType, int64_t M, int64_t C, const Device&, const void* z, const BatchNorm& bn, float* vectors);
Plan plan_normalize_relu(DType, int64_t M, int64_t C, const Device&, const void* z, Affine affine, const void* residual,
                         Affine residual_affine, void* y);
// coefficients: (2, C) b and c of dz with these sums; g null: not needed; given only with gradient.y
Plan plan_bn_relu_backward(DType, int64_t M, int64_t C, const Device&, const Gradient& gradient, const float* vectors,
                           float* sum_g, float* sum_g_xhat, float* coefficients, void* g);
Plan plan_bn_relu_input_gradient(DType, int64_t M, int64_t C, const Device&, const Gradient& gradient, void* dz);

// Per-channel vectors, as the reference's functions of these names make them.
// affine: (2, C) scale, shift
Plan plan_bn_affine(const BatchNorm& bn, float* affine);
Plan plan_bn_vectors(const BatchNorm& bn, float unbias, float* vectors);

}  // namespace resnext_kernels::cuda
