// Hands plans to the CUDA runtime.
#pragma once

#include "plan.h"

namespace resnext_kernels::cuda {

// Of the device with this index. Throws std::runtime_error as `run`.
Device device(int index);

// Throws std::runtime_error with the kernel's name where the runtime reports an error.
void run(const Plan& plan, void* workspace, int device, void* stream);

}  // namespace resnext_kernels::cuda
