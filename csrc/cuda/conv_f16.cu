#include "conv.cuh"
#include "kernels.h"

RK_CONV_KERNELS(RK_DEFINE_CONV, __half, f16)
