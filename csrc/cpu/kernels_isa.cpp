// The kernels of one instruction set. Compiled once for each with -DRK_ISA=<name> and that set's flags; the standard
// library is instantiated for types of this namespace alone, so no code for a newer machine can leak into shared inline
// functions.
#include "conv.h"
#include "conv1x1.h"
#include "kernels.h"
#include "peak.h"
#include "pointwise.h"

namespace resnext_kernels::cpu {
namespace RK_ISA {
namespace {

// f(T{}) with the storage type of dtype.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

bool supported_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every AVX2 machine has F16C
#else
  return true;
#endif
}

template <bool channel_pairs>
void conv_affine_relu_any(const ConvProblem& problem, const void* x, const void* weight, Affine affine,
                          const void* residual, Affine prologue, void* y, int num_threads) {
  with_dtype(problem.dtype, [&](auto t) {
    conv_affine_relu<decltype(t)>(problem, x, weight, affine, residual, prologue, y, num_threads, channel_pairs);
  });
}

template <bool channel_pairs>
void conv_stats_any(const ConvProblem& problem, const void* x, const void* weight, Affine prologue, void* z,
                    float* mean, float* var, int num_threads) {
  with_dtype(problem.dtype, [&](auto t) {
    conv_stats<decltype(t)>(problem, x, weight, prologue, z, mean, var, num_threads, channel_pairs);
  });
}

void conv_backward_any(const ConvProblem& problem, const ReluBNGradient& gradient, const void* x, Affine prologue,
                       const void* weight, void* dx, void* dweight, int num_threads) {
  with_dtype(problem.dtype, [&](auto t) {
    conv_backward<decltype(t)>(problem, gradient, x, prologue, weight, dx, dweight, num_threads);
  });
}

void batch_stats_any(DType dtype, int64_t M, int64_t C, const void* z, float* mean, float* var, int num_threads) {
  with_dtype(dtype, [&](auto t) { batch_stats<decltype(t)>(M, C, z, mean, var, num_threads); });
}

void normalize_relu_any(DType dtype, int64_t M, int64_t C, const void* z, Affine affine, const void* residual,
                        Affine residual_affine, void* y, int num_threads) {
  with_dtype(dtype,
             [&](auto t) { normalize_relu<decltype(t)>(M, C, z, affine, residual, residual_affine, y, num_threads); });
}

void bn_relu_backward_any(DType dtype, int64_t M, int64_t C, const ReluBNGradient& gradient, const float* mean,
                          const float* rstd, float* sum_g, float* sum_g_xhat, void* g, int num_threads) {
  with_dtype(dtype, [&](auto t) {
    const auto kernel = gradient.y ? bn_relu_backward<decltype(t), true> : bn_relu_backward<decltype(t), false>;
    kernel(M, C, gradient, mean, rstd, sum_g, sum_g_xhat, g, num_threads);
  });
}

void bn_relu_input_gradient_any(DType dtype, int64_t M, int64_t C, const ReluBNGradient& gradient, void* dz,
                                int num_threads) {
  with_dtype(dtype, [&](auto t) {
    const auto kernel =
        gradient.y ? bn_relu_input_gradient<decltype(t), true> : bn_relu_input_gradient<decltype(t), false>;
    kernel(M, C, gradient, dz, num_threads);
  });
}

}  // namespace
}  // namespace RK_ISA

#define RK_TEXT_(name) #name
#define RK_TEXT(name) RK_TEXT_(name)
#define RK_JOIN_(a, b) a##b
#define RK_JOIN(a, b) RK_JOIN_(a, b)

namespace RK_ISA {
namespace {
// `channel_pairs`: bfloat16 is multiplied in pairs.
template <bool channel_pairs>
constexpr Kernels table_of(const char* isa, bool (*supported)()) {
  return {
      isa,
      supported,
      conv_affine_relu_any<channel_pairs>,
      conv_stats_any<channel_pairs>,
      conv_backward_any,
      conv1x1,
      conv1x1_backward,
      batch_stats_any,
      normalize_relu_any,
      bn_relu_backward_any,
      bn_relu_input_gradient_any,
      bn_affine,
      bn_vectors,
      update_running,
      bn_gradient_vectors,
      multiply_adds,
  };
}
}  // namespace
}  // namespace RK_ISA

const Kernels& RK_JOIN(kernels_, RK_ISA)() {
  static constexpr Kernels table = RK_ISA::table_of<false>(RK_TEXT(RK_ISA), RK_ISA::supported_here);
  return table;
}

#if defined(__AVX512F__)
const Kernels& RK_JOIN(RK_JOIN(kernels_, RK_ISA), _bf16)() {
  static constexpr Kernels table = RK_ISA::table_of<true>(
      RK_TEXT(RK_ISA) "_bf16", [] { return RK_ISA::supported_here() && RK_ISA::pair_products_here(); });
  return table;
}
#endif

}  // namespace resnext_kernels::cpu
