// The list of kernels, for their definitions and for the launcher's table of names.
#pragma once

// X(T, DTYPE, GEOMETRY, Q, PASS) for conv_DTYPE_GEOMETRY_qQ_PASS
#define RK_CONV_KERNELS(X, T, DTYPE) \
  X(T, DTYPE, s1, 1, eval)           \
  X(T, DTYPE, s1, 1, forward)        \
  X(T, DTYPE, s1, 2, eval)           \
  X(T, DTYPE, s1, 2, forward)        \
  X(T, DTYPE, s1, 4, eval)           \
  X(T, DTYPE, s1, 4, forward)        \
  X(T, DTYPE, s1, 8, eval)           \
  X(T, DTYPE, s1, 8, forward)        \
  X(T, DTYPE, s2, 1, eval)           \
  X(T, DTYPE, s2, 1, forward)        \
  X(T, DTYPE, s2, 2, eval)           \
  X(T, DTYPE, s2, 2, forward)        \
  X(T, DTYPE, s2, 4, eval)           \
  X(T, DTYPE, s2, 4, forward)        \
  X(T, DTYPE, s2, 8, eval)           \
  X(T, DTYPE, s2, 8, forward)        \
  X(T, DTYPE, s1, 1, backward)       \
  X(T, DTYPE, s1, 2, backward)       \
  X(T, DTYPE, s1, 4, backward)       \
  X(T, DTYPE, s1, 8, dx)             \
  X(T, DTYPE, s1, 8, dweight)        \
  X(T, DTYPE, t2, 1, backward)       \
  X(T, DTYPE, t2, 2, backward)       \
  X(T, DTYPE, t2, 4, backward)       \
  X(T, DTYPE, t2, 8, dx)             \
  X(T, DTYPE, t2, 8, dweight)

// X(T, DTYPE, NAME) for NAME_DTYPE
#define RK_POINTWISE_KERNELS(X, T, DTYPE) \
  X(T, DTYPE, normalize_relu)             \
  X(T, DTYPE, bn_relu_dz)                 \
  X(T, DTYPE, bn_relu_sums)               \
  X(T, DTYPE, moments)

// X(NAME, PARAMS): second stages, and vectors
#define RK_SMALL_KERNELS(X)              \
  X(add_sums, AddSumsParams)             \
  X(finish_moments, FinishMomentsParams) \
  X(add_dweight_f16, AddDweightParams)   \
  X(add_dweight_bf16, AddDweightParams)  \
  X(bn_vectors, BatchNormParams)
