// Python bindings: data pointers and sizes in, nothing of torch. What works on tensors releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "problem.h"

namespace py = pybind11;

namespace resnext_kernels::cuda {
void bind(py::module_& m);  // cuda/bindings.cpp
}

using namespace resnext_kernels;
using cpu::Affine;
using cpu::BatchNorm;
using cpu::ReluBNGradient;
using Pointer = uintptr_t;  // tensor.data_ptr(), 0 = absent

namespace {

const void* in(Pointer p) { return reinterpret_cast<const void*>(p); }
void* out(Pointer p) { return reinterpret_cast<void*>(p); }
const float* vec(Pointer p) { return reinterpret_cast<const float*>(p); }
float* out_vec(Pointer p) { return reinterpret_cast<float*>(p); }
Affine affine(Pointer scale, Pointer shift) { return {vec(scale), vec(shift)}; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (auto table = cpu::supported_kernels(); *table != nullptr; ++table) names.emplace_back((*table)->isa);
  return names;
}

void set_cpu_isa(const std::string& name) {
  if (cpu::select_kernels(name.c_str()) != nullptr) return;
  std::string allowed;
  for (const auto& isa : cpu_isas()) allowed += (allowed.empty() ? "'" : ", '") + isa + "'";
  throw py::value_error("isa: got '" + name + "', this machine can run " + allowed);
}

void conv_affine_relu(const ConvProblem& problem, Pointer x, Pointer weight, Pointer scale, Pointer shift,
                      Pointer residual, Pointer in_scale, Pointer in_shift, Pointer y, int num_threads) {
  cpu::kernels().conv_affine_relu(problem, in(x), in(weight), affine(scale, shift), in(residual),
                                  affine(in_scale, in_shift), out(y), num_threads);
}

// conv_affine_relu with BatchNorms in place of the affine maps: one call from Python instead of three.
void conv_bn_relu(const ConvProblem& problem, Pointer x, Pointer weight, Pointer gamma, Pointer beta, Pointer mean,
                  Pointer var, float eps, Pointer residual, Pointer in_gamma, Pointer in_beta, Pointer in_mean,
                  Pointer in_var, float in_eps, Pointer y, int num_threads) {
  const cpu::Kernels& kernels = cpu::kernels();
  std::vector<float> scales(problem.K + problem.C), shifts(problem.K + problem.C);
  const auto affine_of = [&](int64_t channels, const BatchNorm& bn, int64_t at) {
    if (!bn.mean) return Affine{};
    kernels.bn_affine(channels, bn, &scales[at], &shifts[at]);
    return Affine{&scales[at], &shifts[at]};
  };
  const Affine affine = affine_of(problem.K, {vec(gamma), vec(beta), vec(mean), vec(var), eps}, 0);
  const Affine prologue =
      affine_of(problem.C, {vec(in_gamma), vec(in_beta), vec(in_mean), vec(in_var), in_eps}, problem.K);
  kernels.conv_affine_relu(problem, in(x), in(weight), affine, in(residual), prologue, out(y), num_threads);
}

void conv_stats(const ConvProblem& problem, Pointer x, Pointer weight, Pointer in_scale, Pointer in_shift, Pointer z,
                Pointer mean, Pointer var, int num_threads) {
  cpu::kernels().conv_stats(problem, in(x), in(weight), affine(in_scale, in_shift), out(z), out_vec(mean), out_vec(var),
                            num_threads);
}

void conv_backward(const ConvProblem& problem, Pointer dy, Pointer z, Pointer scale, Pointer shift, Pointer y,
                   Pointer a, Pointer b, Pointer c, Pointer x, Pointer in_scale, Pointer in_shift, Pointer weight,
                   Pointer dx, Pointer dweight, int num_threads) {
  const ReluBNGradient gradient{in(dy), in(z), affine(scale, shift), in(y), vec(a), vec(b), vec(c)};
  cpu::kernels().conv_backward(problem, gradient, in(x), affine(in_scale, in_shift), in(weight), out(dx), out(dweight),
                               num_threads);
}

void conv1x1(int64_t M, int64_t C, int64_t K, Pointer x, Pointer in_scale, Pointer in_shift, Pointer weight,
             Pointer scale, Pointer shift, Pointer residual, Pointer y, Pointer mean, Pointer var, int num_threads) {
  cpu::kernels().conv1x1(M, C, K, vec(x), affine(in_scale, in_shift), vec(weight), affine(scale, shift), vec(residual),
                         out_vec(y), out_vec(mean), out_vec(var), num_threads);
}

void conv1x1_backward(int64_t M, int64_t C, int64_t K, Pointer dz, Pointer x, Pointer in_scale, Pointer in_shift,
                      Pointer weight, Pointer da, bool add, Pointer dweight, int num_threads) {
  cpu::kernels().conv1x1_backward(M, C, K, vec(dz), vec(x), affine(in_scale, in_shift), vec(weight), out_vec(da), add,
                                  out_vec(dweight), num_threads);
}

void batch_stats(int dtype, int64_t M, int64_t C, Pointer z, Pointer mean, Pointer var, int num_threads) {
  cpu::kernels().batch_stats(static_cast<DType>(dtype), M, C, in(z), out_vec(mean), out_vec(var), num_threads);
}

void normalize_relu(int dtype, int64_t M, int64_t C, Pointer z, Pointer scale, Pointer shift, Pointer residual,
                    Pointer res_scale, Pointer res_shift, Pointer y, int num_threads) {
  cpu::kernels().normalize_relu(static_cast<DType>(dtype), M, C, in(z), affine(scale, shift), in(residual),
                                affine(res_scale, res_shift), out(y), num_threads);
}

void bn_relu_backward(int dtype, int64_t M, int64_t C, Pointer dy, Pointer z, Pointer scale, Pointer shift, Pointer y,
                      Pointer mean, Pointer rstd, Pointer sum_g, Pointer sum_g_xhat, Pointer g, int num_threads) {
  const ReluBNGradient gradient{in(dy), in(z), affine(scale, shift), in(y)};
  cpu::kernels().bn_relu_backward(static_cast<DType>(dtype), M, C, gradient, vec(mean), vec(rstd), out_vec(sum_g),
                                  out_vec(sum_g_xhat), out(g), num_threads);
}

void bn_relu_input_gradient(int dtype, int64_t M, int64_t C, Pointer dy, Pointer z, Pointer scale, Pointer shift,
                            Pointer y, Pointer a, Pointer b, Pointer c, Pointer dz, int num_threads) {
  const ReluBNGradient gradient{in(dy), in(z), affine(scale, shift), in(y), vec(a), vec(b), vec(c)};
  cpu::kernels().bn_relu_input_gradient(static_cast<DType>(dtype), M, C, gradient, out(dz), num_threads);
}

void bn_affine(int64_t C, Pointer gamma, Pointer beta, Pointer mean, Pointer var, float eps, Pointer scale,
               Pointer shift) {
  cpu::kernels().bn_affine(C, {vec(gamma), vec(beta), vec(mean), vec(var), eps}, out_vec(scale), out_vec(shift));
}

void bn_vectors(int64_t C, Pointer gamma, Pointer beta, Pointer mean, Pointer var, float eps, float unbias,
                Pointer vectors) {
  cpu::kernels().bn_vectors(C, {vec(gamma), vec(beta), vec(mean), vec(var), eps}, unbias, out_vec(vectors));
}

void update_running(int64_t C, Pointer vectors, double momentum, Pointer mean, Pointer var) {
  cpu::kernels().update_running(C, vec(vectors), momentum, out_vec(mean), out_vec(var));
}

void bn_gradient_vectors(int64_t C, Pointer sum_g, Pointer sum_g_xhat, Pointer vectors, float count, Pointer b,
                         Pointer c) {
  cpu::kernels().bn_gradient_vectors(C, vec(sum_g), vec(sum_g_xhat), vec(vectors), count, out_vec(b), out_vec(c));
}

// On the best instruction set of the machine, whichever is in use.
int64_t multiply_adds(int64_t rounds, int num_threads) {
  return cpu::supported_kernels()[0]->multiply_adds(rounds, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of resnext_kernels; pointers are integers from data_ptr(), 0 means absent.";

  py::class_<ConvProblem>(m, "ConvProblem")
      .def(py::init([](int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, int64_t groups, int64_t stride,
                       int64_t dilation, int dtype, bool weight_channels_last) {
             return ConvProblem{
                 N, H, W, C, K, groups, stride, dilation, static_cast<DType>(dtype), weight_channels_last};
           }),
           py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("K"), py::arg("groups"), py::arg("stride"),
           py::arg("dilation"), py::arg("dtype"), py::arg("weight_channels_last") = false);

  m.def("cpu_isas", &cpu_isas, "Instruction sets this machine can run, best first.");
  m.def(
      "cpu_isa", [] { return std::string(cpu::kernels().isa); }, "The instruction set in use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Chooses the instruction set; ValueError names the allowed.");

  const py::call_guard<py::gil_scoped_release> nogil;
  m.def("conv_affine_relu", &conv_affine_relu, nogil);
  m.def("conv_bn_relu", &conv_bn_relu, nogil);
  m.def("conv_stats", &conv_stats, nogil);
  m.def("conv_backward", &conv_backward, nogil);
  m.def("conv1x1", &conv1x1, nogil);
  m.def("conv1x1_backward", &conv1x1_backward, nogil);
  m.def("batch_stats", &batch_stats, nogil);
  m.def("normalize_relu", &normalize_relu, nogil);
  m.def("bn_relu_backward", &bn_relu_backward, nogil);
  m.def("bn_relu_input_gradient", &bn_relu_input_gradient, nogil);
  m.def("bn_affine", &bn_affine);  // a microsecond each: not worth giving the GIL away
  m.def("bn_vectors", &bn_vectors);
  m.def("update_running", &update_running);
  m.def("bn_gradient_vectors", &bn_gradient_vectors);
  m.def("multiply_adds", &multiply_adds, nogil, py::arg("rounds"), py::arg("num_threads"),
        "Multiply-adds on registers alone, on the best instruction set; returns the operations made.");

  cuda::bind(m);
}
