# ruff: noqa: N999
"""The compiled kernels: pointers are integers from data_ptr(), 0 means absent.

dtype codes: 0 float32, 1 bfloat16, 2 float16. Vectors are float32. Every function releases the GIL.
"""

class ConvProblem:
    def __init__(
        self,
        N: int,
        H: int,
        W: int,
        C: int,
        K: int,
        groups: int,
        stride: int,
        dilation: int,
        dtype: int,
        weight_channels_last: bool = False,
    ) -> None: ...

def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
def conv_affine_relu(
    problem: ConvProblem,
    x: int,
    weight: int,
    scale: int,
    shift: int,
    residual: int,
    in_scale: int,
    in_shift: int,
    y: int,
    num_threads: int,
    /,
) -> None: ...
def conv_bn_relu(
    problem: ConvProblem,
    x: int,
    weight: int,
    gamma: int,
    beta: int,
    mean: int,
    var: int,
    eps: float,
    residual: int,
    in_gamma: int,
    in_beta: int,
    in_mean: int,
    in_var: int,
    in_eps: float,
    y: int,
    num_threads: int,
    /,
) -> None: ...
def conv_stats(
    problem: ConvProblem,
    x: int,
    weight: int,
    in_scale: int,
    in_shift: int,
    z: int,
    mean: int,
    var: int,
    num_threads: int,
    /,
) -> None: ...
def conv1x1(
    M: int,
    C: int,
    K: int,
    x: int,
    in_scale: int,
    in_shift: int,
    weight: int,
    scale: int,
    shift: int,
    residual: int,
    y: int,
    mean: int,
    var: int,
    num_threads: int,
    /,
) -> None: ...
def conv1x1_backward(
    M: int,
    C: int,
    K: int,
    dz: int,
    x: int,
    in_scale: int,
    in_shift: int,
    weight: int,
    da: int,
    add: bool,
    dweight: int,
    num_threads: int,
    /,
) -> None: ...
def batch_stats(
    dtype: int, M: int, C: int, z: int, mean: int, var: int, num_threads: int, /
) -> None: ...
def bn_affine(
    C: int,
    gamma: int,
    beta: int,
    mean: int,
    var: int,
    eps: float,
    scale: int,
    shift: int,
    /,
) -> None: ...
def bn_vectors(
    C: int,
    gamma: int,
    beta: int,
    mean: int,
    var: int,
    eps: float,
    unbias: float,
    vectors: int,
    /,
) -> None: ...
def update_running(C: int, vectors: int, momentum: float, mean: int, var: int, /) -> None: ...
def bn_gradient_vectors(
    C: int, sum_g: int, sum_g_xhat: int, vectors: int, count: float, b: int, c: int, /
) -> None: ...
def normalize_relu(
    dtype: int,
    M: int,
    C: int,
    z: int,
    scale: int,
    shift: int,
    residual: int,
    res_scale: int,
    res_shift: int,
    y: int,
    num_threads: int,
    /,
) -> None: ...
def bn_relu_backward(
    dtype: int,
    M: int,
    C: int,
    dy: int,
    z: int,
    scale: int,
    shift: int,
    y: int,
    mean: int,
    rstd: int,
    sum_g: int,
    sum_g_xhat: int,
    g: int,
    num_threads: int,
    /,
) -> None: ...
def bn_relu_input_gradient(
    dtype: int,
    M: int,
    C: int,
    dy: int,
    z: int,
    scale: int,
    shift: int,
    y: int,
    a: int,
    b: int,
    c: int,
    dz: int,
    num_threads: int,
    /,
) -> None: ...
def conv_backward(
    problem: ConvProblem,
    dy: int,
    z: int,
    scale: int,
    shift: int,
    y: int,
    a: int,
    b: int,
    c: int,
    x: int,
    in_scale: int,
    in_shift: int,
    weight: int,
    dx: int,
    dweight: int,
    num_threads: int,
    /,
) -> None: ...
def multiply_adds(rounds: int, num_threads: int) -> int:
    """Multiply-adds on registers, on the machine's best instruction set; the operations made."""

# The CUDA kernels: a plan is made on any machine, cuda_device and cuda_run exist where they were
# compiled (cuda_compiled).

class CudaDevice:
    multiprocessors: int
    shared_bytes: int
    def __init__(self, multiprocessors: int, shared_bytes: int) -> None: ...

class CudaLaunch:
    kernel: str
    grid: list[int]
    block: int
    shared_bytes: int
    params: bytes
    workspace_at: int

class CudaPlan:
    launches: list[CudaLaunch]
    workspace_floats: int

def cuda_compiled() -> bool: ...
def cuda_why_not(problem: ConvProblem) -> str: ...
def cuda_device(index: int) -> CudaDevice: ...
def cuda_run(plan: CudaPlan, workspace: int, device: int, stream: int, /) -> None: ...
def cuda_plan_conv_bn_relu(
    problem: ConvProblem,
    device: CudaDevice,
    x: int,
    weight: int,
    channels_last: bool,
    bn: tuple[int, int, int, int, int, float],
    residual: int,
    in_scale: int,
    in_shift: int,
    y: int,
    /,
) -> CudaPlan: ...
def cuda_plan_conv_stats(
    problem: ConvProblem,
    device: CudaDevice,
    x: int,
    weight: int,
    channels_last: bool,
    in_scale: int,
    in_shift: int,
    z: int,
    bn: tuple[int, int, int, int, int, float],
    vectors: int,
    /,
) -> CudaPlan: ...
def cuda_plan_conv_backward(
    problem: ConvProblem,
    device: CudaDevice,
    dy: int,
    z: int,
    vectors: int,
    coefficients: int,
    y: int,
    relu: bool,
    x: int,
    in_scale: int,
    in_shift: int,
    weight: int,
    channels_last: bool,
    dx: int,
    dweight: int,
    /,
) -> CudaPlan: ...
def cuda_plan_batch_stats(
    dtype: int,
    M: int,
    C: int,
    device: CudaDevice,
    z: int,
    bn: tuple[int, int, int, int, int, float],
    vectors: int,
    /,
) -> CudaPlan: ...
def cuda_plan_normalize_relu(
    dtype: int,
    M: int,
    C: int,
    device: CudaDevice,
    z: int,
    scale: int,
    shift: int,
    residual: int,
    res_scale: int,
    res_shift: int,
    y: int,
    /,
) -> CudaPlan: ...
def cuda_plan_bn_relu_backward(
    dtype: int,
    M: int,
    C: int,
    device: CudaDevice,
    dy: int,
    z: int,
    vectors: int,
    y: int,
    relu: bool,
    sum_g: int,
    sum_g_xhat: int,
    coefficients: int,
    g: int,
    /,
) -> CudaPlan: ...
def cuda_plan_bn_relu_input_gradient(
    dtype: int,
    M: int,
    C: int,
    device: CudaDevice,
    dy: int,
    z: int,
    vectors: int,
    coefficients: int,
    y: int,
    relu: bool,
    dz: int,
    /,
) -> CudaPlan: ...

# A BatchNorm: C, gamma, beta, mean, var, eps
def cuda_plan_bn_affine(bn: tuple[int, int, int, int, int, float], affine: int, /) -> CudaPlan: ...
def cuda_plan_bn_vectors(
    bn: tuple[int, int, int, int, int, float], unbias: float, vectors: int, /
) -> CudaPlan: ...
