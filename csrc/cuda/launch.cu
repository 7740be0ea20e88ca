#include <cuda_runtime.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.h"
#include "launch.h"
#include "params.h"

using namespace resnext_kernels::cuda;

#define RK_DECLARE_CONV(T, DTYPE, GEOMETRY, Q, PASS) \
  extern "C" __global__ void conv_##DTYPE##_##GEOMETRY##_q##Q##_##PASS(const __grid_constant__ ConvParams);
#define RK_DECLARE_POINTWISE(T, DTYPE, NAME) \
  extern "C" __global__ void NAME##_##DTYPE(const __grid_constant__ PointwiseParams);
#define RK_DECLARE_SMALL(NAME, PARAMS) extern "C" __global__ void NAME(const __grid_constant__ PARAMS);
RK_CONV_KERNELS(RK_DECLARE_CONV, , f16)
RK_CONV_KERNELS(RK_DECLARE_CONV, , bf16)
RK_POINTWISE_KERNELS(RK_DECLARE_POINTWISE, , f16)
RK_POINTWISE_KERNELS(RK_DECLARE_POINTWISE, , bf16)
RK_SMALL_KERNELS(RK_DECLARE_SMALL)

namespace resnext_kernels::cuda {
namespace {

constexpr int kMaxDevices = 64;

struct Kernel {
  const void* function;
  // whether the device's whole shared memory has been made available to it
  std::atomic<bool> prepared[kMaxDevices] = {};
  explicit Kernel(const void* f) : function(f) {}
};

std::unordered_map<std::string, Kernel>& kernels() {
  static std::unordered_map<std::string, Kernel> table = [] {
    std::unordered_map<std::string, Kernel> made;
#define RK_ENTER(NAME) made.try_emplace(#NAME, reinterpret_cast<const void*>(&NAME));
#define RK_ENTER_CONV(T, DTYPE, GEOMETRY, Q, PASS) RK_ENTER(conv_##DTYPE##_##GEOMETRY##_q##Q##_##PASS)
#define RK_ENTER_POINTWISE(T, DTYPE, NAME) RK_ENTER(NAME##_##DTYPE)
#define RK_ENTER_SMALL(NAME, PARAMS) RK_ENTER(NAME)
    RK_CONV_KERNELS(RK_ENTER_CONV, , f16)
    RK_CONV_KERNELS(RK_ENTER_CONV, , bf16)
    RK_POINTWISE_KERNELS(RK_ENTER_POINTWISE, , f16)
    RK_POINTWISE_KERNELS(RK_ENTER_POINTWISE, , bf16)
    RK_SMALL_KERNELS(RK_ENTER_SMALL)
    return made;
  }();
  return table;
}

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // do not report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes `device` current for as long as it lives.
class DeviceGuard {
 public:
  DeviceGuard(int device, const std::string& what) : device_(device) {
    check(cudaGetDevice(&before_), what);
    if (before_ != device_) check(cudaSetDevice(device_), what);
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int device_, before_;
};

void launch(const Launch& launch, void* workspace, int device, cudaStream_t stream) {
  const auto found = kernels().find(launch.kernel);
  if (found == kernels().end()) throw std::runtime_error("CUDA kernel " + launch.kernel + ": not in this library");
  Kernel& kernel = found->second;
  const std::string what = "CUDA kernel " + launch.kernel;
  if (device >= kMaxDevices || !kernel.prepared[device].load(std::memory_order_acquire)) {
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel.function), what);
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes)),
          what);
    if (device < kMaxDevices) kernel.prepared[device].store(true, std::memory_order_release);
  }
  std::vector<char> params = launch.params;
  if (launch.workspace_at >= 0) std::memcpy(params.data() + launch.workspace_at, &workspace, sizeof(workspace));
  void* arguments[] = {params.data()};
  check(cudaLaunchKernel(kernel.function, dim3(launch.grid[0], launch.grid[1], launch.grid[2]), dim3(launch.block),
                         arguments, launch.shared_bytes, stream),
        what);
}

}  // namespace

Device device(int index) {
  Device found{};
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "cudaDeviceGetAttribute");
  return found;
}

void run(const Plan& plan, void* workspace, int device, void* stream) {
  if (plan.launches.empty()) return;
  const DeviceGuard guard(device, "CUDA kernel " + plan.launches[0].kernel);
  for (const Launch& each : plan.launches) launch(each, workspace, device, static_cast<cudaStream_t>(stream));
}

}  // namespace resnext_kernels::cuda
