// Python bindings of the CUDA plans, which need no CUDA, and of their launcher, where it was compiled.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan.h"
#ifdef RK_WITH_CUDA
#include "launch.h"
#endif

namespace py = pybind11;

namespace resnext_kernels::cuda {
namespace {

using Pointer = uintptr_t;  // tensor.data_ptr(), 0 = absent

const void* in(Pointer p) { return reinterpret_cast<const void*>(p); }
void* out(Pointer p) { return reinterpret_cast<void*>(p); }
const float* vec(Pointer p) { return reinterpret_cast<const float*>(p); }
float* out_vec(Pointer p) { return reinterpret_cast<float*>(p); }
Affine affine(Pointer scale, Pointer shift) { return {vec(scale), vec(shift)}; }
// C, gamma, beta, mean, var, eps
using BatchNormPointers = std::tuple<int64_t, Pointer, Pointer, Pointer, Pointer, float>;
// scale, shift and a are rows of the vectors, b and c of the coefficients; relu false: no mask
Gradient gradient(int64_t C, Pointer dy, Pointer z, Pointer vectors, Pointer coefficients, Pointer y, bool relu) {
  Gradient made;
  made.dy = in(dy), made.z = in(z), made.y = in(y);
  if (vectors) made.a = vec(vectors) + 3 * C;
  if (vectors && relu) made.affine = {vec(vectors) + 3 * C, vec(vectors) + 4 * C};
  if (coefficients) made.b = vec(coefficients), made.c = vec(coefficients) + C;
  return made;
}
BatchNorm batch_norm(const BatchNormPointers& bn) {
  const auto& [C, gamma, beta, mean, var, eps] = bn;
  return {C, vec(gamma), vec(beta), vec(mean), vec(var), eps};
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Device>(m, "CudaDevice", "What a plan depends on of a device.")
      .def(py::init([](int multiprocessors, int shared_bytes) {
             return Device{multiprocessors, shared_bytes};
           }),
           py::arg("multiprocessors"), py::arg("shared_bytes"))
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_bytes", &Device::shared_bytes);
  py::class_<Launch>(m, "CudaLaunch")
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("grid", &Launch::grid)
      .def_readonly("block", &Launch::block)
      .def_readonly("shared_bytes", &Launch::shared_bytes)
      .def_property_readonly("params", [](const Launch& l) { return py::bytes(l.params.data(), l.params.size()); })
      .def_readonly("workspace_at", &Launch::workspace_at);
  py::class_<Plan>(m, "CudaPlan")
      .def_readonly("launches", &Plan::launches)
      .def_readonly("workspace_floats", &Plan::workspace_floats);

  m.def("cuda_why_not", &why_not, py::arg("problem"), "Why the CUDA kernels do not take a problem; '' if they do.");
  m.def("cuda_plan_conv_bn_relu",
        [](const ConvProblem& problem, const Device& device, Pointer x, Pointer weight, bool channels_last,
           const BatchNormPointers& bn, Pointer residual, Pointer in_scale, Pointer in_shift, Pointer y) {
          return plan_conv_bn_relu(problem, device, in(x), {in(weight), channels_last}, batch_norm(bn), in(residual),
                                   affine(in_scale, in_shift), out(y));
        });
  m.def("cuda_plan_conv_stats",
        [](const ConvProblem& problem, const Device& device, Pointer x, Pointer weight, bool channels_last,
           Pointer in_scale, Pointer in_shift, Pointer z, const BatchNormPointers& bn, Pointer vectors) {
          return plan_conv_stats(problem, device, in(x), {in(weight), channels_last}, affine(in_scale, in_shift),
                                 out(z), batch_norm(bn), out_vec(vectors));
        });
  m.def("cuda_plan_conv_backward",
        [](const ConvProblem& problem, const Device& device, Pointer dy, Pointer z, Pointer vectors,
           Pointer coefficients, Pointer y, bool relu, Pointer x, Pointer in_scale, Pointer in_shift, Pointer weight,
           bool channels_last, Pointer dx, Pointer dweight) {
          return plan_conv_backward(problem, device, gradient(problem.K, dy, z, vectors, coefficients, y, relu), in(x),
                                    affine(in_scale, in_shift), {in(weight), channels_last}, out(dx), out(dweight));
        });
  m.def("cuda_plan_batch_stats", [](int dtype, int64_t M, int64_t C, const Device& device, Pointer z,
                                    const BatchNormPointers& bn, Pointer vectors) {
    return plan_batch_stats(static_cast<DType>(dtype), M, C, device, in(z), batch_norm(bn), out_vec(vectors));
  });
  m.def("cuda_plan_normalize_relu",
        [](int dtype, int64_t M, int64_t C, const Device& device, Pointer z, Pointer scale, Pointer shift,
           Pointer residual, Pointer res_scale, Pointer res_shift, Pointer y) {
          return plan_normalize_relu(static_cast<DType>(dtype), M, C, device, in(z), affine(scale, shift), in(residual),
                                     affine(res_scale, res_shift), out(y));
        });
  m.def("cuda_plan_bn_relu_backward", [](int dtype, int64_t M, int64_t C, const Device& device, Pointer dy, Pointer z,
                                         Pointer vectors, Pointer y, bool relu, Pointer sum_g, Pointer sum_g_xhat,
                                         Pointer coefficients, Pointer g) {
    return plan_bn_relu_backward(static_cast<DType>(dtype), M, C, device, gradient(C, dy, z, vectors, 0, y, relu),
                                 vec(vectors), out_vec(sum_g), out_vec(sum_g_xhat), out_vec(coefficients), out(g));
  });
  m.def("cuda_plan_bn_relu_input_gradient",
        [](int dtype, int64_t M, int64_t C, const Device& device, Pointer dy, Pointer z, Pointer vectors,
           Pointer coefficients, Pointer y, bool relu, Pointer dz) {
          return plan_bn_relu_input_gradient(static_cast<DType>(dtype), M, C, device,
                                             gradient(C, dy, z, vectors, coefficients, y, relu), out(dz));
        });
  m.def("cuda_plan_bn_affine",
        [](const BatchNormPointers& bn, Pointer affine) { return plan_bn_affine(batch_norm(bn), out_vec(affine)); });
  m.def("cuda_plan_bn_vectors", [](const BatchNormPointers& bn, float unbias, Pointer vectors) {
    return plan_bn_vectors(batch_norm(bn), unbias, out_vec(vectors));
  });

  m.def(
      "cuda_compiled",
      [] {
#ifdef RK_WITH_CUDA
        return true;
#else
        return false;
#endif
      },
      "Whether this library holds the CUDA kernels.");
#ifdef RK_WITH_CUDA
  m.def("cuda_device", &device, py::arg("index"));
  m.def(
      "cuda_run",
      [](const Plan& plan, Pointer workspace, int device, Pointer stream) {
        run(plan, out(workspace), device, out(stream));
      },
      py::call_guard<py::gil_scoped_release>(), "Enqueues a plan's kernels; RuntimeError names the kernel.");
#endif
}

}  // namespace resnext_kernels::cuda
