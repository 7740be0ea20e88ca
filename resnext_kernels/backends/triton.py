"""Triton kernels for GPUs (NVIDIA, compute capability 8.0 and up, and AMD), behind the contract of
`reference`.

Forward:    z[n, oh, ow, k] = sum over kh, kw, d of x[n, ih, iw, g*DIN + d] * weight[k, d, kh, kw],
            ih = oh*stride + (kh - 1)*dilation, iw likewise, g = k // DOUT; outside pixels are zero
Backward:   dz = a*g [+ b*z + c], g = dy where relu passed, made where dy and z are loaded;
            dx is the convolution of dz with the weights turned round and transposed,
            dweight[k, d, kh, kw] = sum over n, oh, ow of dz[n, oh, ow, k] * x[n, ih, iw, g*DIN + d]

Images are (N, H, W, C) in memory (torch.channels_last). Groups narrower than a tensor-core tile are
packed with their neighbours into one block-diagonal tile, so that D = 4 wastes a factor of 4 of a
16-wide tile and not 16:

            4 groups of 4 channels out
            +----+----+----+----+
    x tile  | W0 |    |    |    |     (BLOCK_P pixels, 16) @ (16, 16), once for each tap
    16      +----+----+----+----+
    channels|    | W1 |    |    |     a zero times an infinite or NaN pixel would reach its
    in      +----+----+----+----+     neighbours: programs whose result is not finite
            |    |    | W2 |    |     compute it again, group by group
            +----+----+----+----+
            |    |    |    | W3 |
            +----+----+----+----+

TILES such tiles lie side by side in a program, one a warp: 64 channels of float16 are a 128-byte
line. They are loaded as one (BLOCK_P, TILES*16) tile and multiplied as TILES batched products.

Of the convolution's kernels, which all reduce BatchNorm's statistics in their epilogue,
`_conv_shift_kernel` (float16 and bfloat16; on NVIDIA D = 4, 8, 16, 32, strides 1 and 2, on AMD
D = 32, stride 1) walks 16 columns, numbered over (n, w), down the image. It loads each x once,
with the halo of its programs, and computes its activation once. `_conv_rows_kernel` (stride 1, up
to 16 channels: float32, AMD, other D, and dx where dz is made of dy and z) loads a row of x once
for each column shift; its product with the three taps of that column is one dot with 4 tiles of
columns (a power of two; the fourth is zero), and each quarter is added to one of the three output
rows that the row feeds. `_conv_kernel` does the rest, a tap at a time. All three also make dx.

`_conv_backward_kernel` (NVIDIA; float16 and bfloat16, D = 2, 4, 8, 16, 32, channels a multiple of
32, stride 1, 2) makes dx and dweight of one reading of dy, z and x. A warp has a block of 16
channels out by 16 in, walks 16 columns down the rows of dz, 14 of them its own, and keeps the
weights and dweight, nine taps of each, in registers. Like `_conv_shift_kernel` it shifts columns by
products with matrices of zeros and ones, S:

    S_kw @ dz      (P, K)  @ W    -> rows h - 1, h, h + 1 of dx
    dz^T @ S_kw^T  (K, P)  @ x    -> dweight

Such a product is exact, and leaves its result in the registers where the next one wants its
operand; for that reason images enter through a product with the identity matrix, turned. Each
pixel goes through shared memory once. A zero times an infinite or NaN pixel would reach its
neighbours: programs whose result is not finite compute everything again, without S.

Products accumulate in float32. Reductions over pixels go in two stages, a partial result a program
and then their sum in a fixed order: no atomics, and the same bits from run to run. Statistics are
merged as means and squared deviations (Welford 1962; Chan, Golub & LeVeque 1979).

Float32 products are IEEE, or TF32 where torch.backends.cudnn.allow_tf32 lets torch's own
convolutions use it. One group is a dense convolution, which cuDNN is made for: it is used for one
group, and in half precision for groups of more than 64 channels, with BatchNorm and ReLU around it
from the kernels here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..problem import ConvProblem, in_format_of
from . import reference, tuning
from .reference import (
    Affine,
    BatchNorm,
    BNGradient,
    TrainingBatchNorm,
    dense_batch_norm,
    dense_training_batch_norm,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    _MISSING: str | None = f"Triton is missing ({error})"
    _jit: Any = lambda function=None, **options: function or _jit  # noqa: E731
    _INTERPRETED = False
    _VERSION: tuple[int, ...] = ()
else:
    _MISSING = None
    _jit = triton.jit
    _INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: on CPU tensors
    _VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

NAME = "triton"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT32_MAX = 2**31 - 1


def why_not(problem: ConvProblem) -> str | None:
    """None where these kernels serve `problem`, else the reason."""
    if _MISSING is not None:
        return _MISSING
    device = "cpu" if _INTERPRETED else "cuda"
    if problem.device_type != device:
        mode = " under TRITON_INTERPRET=1" if _INTERPRETED else ""
        return f"tensors must be on {device!r}{mode}, not on {problem.device_type!r}"
    if problem.dtype not in _DTYPES:
        return f"dtype must be float32, bfloat16 or float16, not {problem.dtype}"
    if _INTERPRETED and problem.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 as integers"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device_index)
        if capability < (8, 0):
            return "compute capability must be at least 8.0, not {}.{}".format(*capability)
    pixels = problem.n * problem.h * problem.w
    if pixels > _INT32_MAX:
        return f"N*H*W must be at most {_INT32_MAX}, not {pixels}"
    return None


# Configurations ------------------------------------------------------------------------------

Arch = int | str  # 90: NVIDIA's compute capability 9.0; "gfx942": AMD's

# KiB of shared memory that one program may have. NVIDIA: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; AMD: the LDS in the CDNA instruction set references.
SHARED_KIB: dict[Arch, int] = {
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99,
    "gfx90a": 64, "gfx942": 64, "gfx950": 160,
}  # fmt: skip


def _shared_bytes(arch: Arch) -> int:
    """What one program may have; of an unknown architecture the least that its maker offers."""
    return 1024 * SHARED_KIB.get(arch, 64 if isinstance(arch, str) else 99)


@lru_cache(maxsize=64)
def _arch(device: torch.device) -> Arch:
    """The architecture of the tensors' own device; on the CPU, interpreted, that of an A100."""
    if device.type != "cuda":
        return 80
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return 10 * properties.major + properties.minor


@dataclass(frozen=True)
class Config:
    """How a convolution is cut into programs.

    Args:
        pack: Groups in one tile.
        src_width, dst_width: Channels of a tile, in and out, powers of two.
        tiles: Tiles side by side in a program, a warp each; 1: `warps` warps share one.
        block_p: Pixels, or columns of pixels, of a tile.
        rows: Output rows that a program of `_conv_rows_kernel` or `_conv_shift_kernel` walks;
            0: `_conv_kernel`.
        unroll: Rows in one turn of its loop, which share one load of the weights.
        warps, stages: Warps of a program; tiles of x under way in cp.async.
        shifts: Whether it is `_conv_shift_kernel`'s, whose outer columns are its neighbours'.
    """

    pack: int
    src_width: int
    dst_width: int
    tiles: int
    block_p: int
    rows: int
    unroll: int
    warps: int
    stages: int
    shifts: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """The most shared memory that it takes: tiles under way, one in use, or the result."""
        x = self.block_p * self.tiles * self.src_width * itemsize
        out = self.block_p * self.tiles * self.dst_width * 4
        weights = self.tiles * self.src_width * self.dst_width * itemsize
        if self.rows:  # three dots a row; their weights, four taps each, stay
            return 12 * weights + 3 * self.unroll * (self.stages - 1) * x + max(x, out)
        return (self.stages - 1) * (x + weights) + max(x + weights, out)


def _pow2(n: int, low: int) -> int:
    return max(low, 1 << (n - 1).bit_length())


# Float32 channels of a product on NVIDIA. The matrix instructions take 8; Triton 3.6, which comes
# with torch 2.11, refuses fewer than 16.
_NARROW_FLOAT32 = 8 if _VERSION >= (3, 8) else 16

# Rows that a program walks at most: one or two more are loaded, so long walks are cheap in traffic,
# but few programs leave the last wave of them half empty.
_ROWS = 14


def _conv_config(
    src_d: int,
    dst_d: int,
    groups: int,
    h: int,
    walk: int,
    dtype: torch.dtype,
    source: str,
    arch: Arch,
) -> Config:
    """The table. For src_d to dst_d channels a group, and h output rows.

    walk: the stride at which programs may walk down the rows, 0 where they may not; source: "x",
    "activation" or "dz", which the latter two are computed where they are loaded.
    """
    computed = source != "x"
    by_rows = walk == 1
    amd = isinstance(arch, str)
    hopper = isinstance(arch, int) and arch >= 90
    half = dtype.itemsize == 2
    narrow = 16 if half or amd else _NARROW_FLOAT32  # what one matrix instruction takes
    pack = max(1, narrow // max(src_d, dst_d))
    src, dst = _pow2(pack * src_d, narrow), _pow2(pack * dst_d, narrow)
    widest = max(src, dst)
    exact = pack * src_d == src and pack * dst_d == dst  # no column is padding
    tiles = min(max(64 // widest, 1), _pow2(triton.cdiv(groups, pack), 1))
    rows = triton.cdiv(h, triton.cdiv(h, _ROWS))
    if walk in (1, 2) and half and exact and src == dst and source != "dz":
        # Loaded, and made an activation, once: elsewhere that is what bounds the forward. Wider
        # than 16 columns the products that shift them would cost too much.
        # ptxas aims at six programs there, 168 registers a thread, and spills
        spills = walk == 2 and source == "x" and arch in (100, 103)
        if widest == 32 and not spills and (walk == 1 or not amd):
            # two warps to a group; with two stages both read x in conflict (6-fold in the model)
            return Config(1, 32, 32, 1, 16, rows, 1, 2, 1, shifts=True)
        # D = 4, 8, 16
        if widest == 16 and tiles == 4 and pack <= 4 and not amd:
            return Config(pack, src, dst, tiles, 16, rows, 1, tiles, 2, shifts=True)
    # D = 3, five groups of a tile one at a time: where ptxas grants fewer registers, rows spill
    crammed = pack > 4 and not exact and not amd and arch not in (90, 100, 103)
    if by_rows and widest <= 16 and half and not crammed:
        # weights stay with their warp; dz is made in registers, which leaves room for half as many
        # columns
        if pack > 4 and (amd or not exact):
            # groups one at a time: their masks, on AMD in the scalar registers, or addresses spill
            tiles = min(tiles, 2)
        # a second row a turn takes registers that odd widths have not, nor two waves on AMD; of
        # three programs, as ptxas aims at, each has 168
        crowded = pack <= 4 and (amd or arch in (90, 100, 103))
        once = not exact or tiles == 1 or (amd and pack > 4 if computed else crowded)
        # a row of x is 16 bytes for each of a wave's lanes, which are 64 on AMD
        p = 32 if amd and exact and pack <= 4 else 16
        stages = 1 if computed or (crowded and tiles < 4) else 2
        warps = tiles if tiles > 1 and (amd or exact) else 4  # two have too few registers
        return Config(pack, src, dst, tiles, p, rows, 1 if once else 2, warps, stages)
    if by_rows and not half and not amd and max(src_d, dst_d) <= 8 and widest == narrow:
        # float32, D = 4, 8: 8 warps have too few registers; for 4 ptxas leaves a stack on sm_90
        tiles = min(tiles, 2 if arch == 90 else 4)
        return Config(pack, src, dst, tiles, 16, rows, 1, tiles, 1)
    # Wide groups, strides, dilation: 32 channels in, up to 64 out at a time
    src, dst = min(src, 32), min(dst, 64)
    tiles = min(tiles, 64 // max(src, dst)) if widest <= 32 else 1
    # float32: with 16, ptxas aims at six programs there, and spills
    p = 32 if half or ((hopper or arch == 80) and widest > 8) else 16
    return Config(pack, src, dst, tiles, p, 0, 1, max(tiles, 4 if tiles == 1 else tiles), 2)


def _alternatives(config: Config, h: int, dtype: torch.dtype, arch: Arch) -> list[Config]:
    """What autotuning tries besides the table's choice: one step away from it in one respect,
    where that fits the shared memory."""
    changes: list[dict[str, Any]] = [{"stages": stages} for stages in (1, 2, 3, 4)]
    if not config.shifts:
        changes += [{"block_p": p} for p in (config.block_p // 2, config.block_p * 2) if p >= 16]
    if config.rows:
        changes += [{"unroll": unroll} for unroll in (1, 2) if not config.shifts]
        changes += [{"rows": triton.cdiv(h, triton.cdiv(h, rows))} for rows in (7, 28, 56)]
    else:
        changes += [{"warps": config.warps // 2}, {"warps": config.warps * 2}]
    found = [replace(config, **change) for change in changes]
    fitting = [c for c in found if c.shared_bytes(dtype.itemsize) <= _shared_bytes(arch)]
    return [c for c in dict.fromkeys(fitting) if c != config]


# Of the weights. A stride known to be 1 makes the compiler load 8 elements a lane, and their way
# through shared memory to the tensor cores is then full of bank conflicts (6-fold in the model).
_UNKNOWN_STRIDES = ("stride_k", "stride_d")


# Kernels: shared steps -----------------------------------------------------------------------


@_jit
def _columns(
    tile,
    first,
    limit,
    D: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
):
    """Channels of the columns of TILES tiles from `tile` on, and which exist; from `first` on."""
    f = tl.arange(0, TILES * WIDTH)
    if PACK * D == WIDTH:  # side by side
        channel = tile * WIDTH + f
        ok = channel < limit
    else:
        i = first + f % WIDTH
        channel = (tile + f // WIDTH) * (PACK * D) + i
        ok = (i < PACK * D) & (channel < limit)
    return channel, ok


@_jit
def _split(t, TILES: tl.constexpr):
    """(P, TILES*WIDTH) -> (TILES, P, WIDTH)."""
    WIDTH: tl.constexpr = t.shape[1] // TILES
    return tl.permute(tl.reshape(t, (t.shape[0], TILES, WIDTH)), (1, 0, 2))


@_jit
def _join(t):
    """(TILES, P, WIDTH) -> (P, TILES*WIDTH)."""
    return tl.reshape(tl.permute(t, (1, 0, 2)), (t.shape[1], t.shape[0] * t.shape[2]))


@_jit
def _turn(t):
    """(BLOCKS, A, B) -> (BLOCKS, B, A)."""
    return tl.permute(t, (0, 2, 1))


@_jit
def _shift(ok, by, one):
    """(BLOCKS, P, P): row p of its product with a tile is the tile's row p + by, 0 where not ok."""
    p = tl.arange(0, ok.shape[0])
    t = ((p[None, :] == p[:, None] + by) & ok[:, None]).to(one.dtype)
    return tl.dot(tl.broadcast_to(t[None, :, :], one.shape), _turn(one)).to(one.dtype)


@_jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for each tile; one tile is shared by all warps."""
    if a.shape[0] == 1:
        a = tl.reshape(a, (a.shape[1], a.shape[2]))
        b = tl.reshape(b, (b.shape[1], b.shape[2]))
        flat = tl.reshape(acc, (acc.shape[1], acc.shape[2]))
        acc = tl.reshape(tl.dot(a, b, flat, input_precision=PRECISION), acc.shape)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@_jit
def _relu(t):
    """max(t, 0); a NaN passes."""
    return tl.where(t < 0, 0.0, t)


@_jit
def _relu_gradient(dy, before):
    """dy where relu passed, else 0; where `before` is NaN it passes."""
    return tl.where(before <= 0, 0.0, dy)


@_jit
def _load(ptr, channel, ok):
    return tl.load(ptr + channel, mask=ok, other=0.0)


@_jit
def _vector(ptr, channel, ok):
    """(1, CHANNELS) of a per-channel vector."""
    return _load(ptr, channel, ok)[None, :]


@_jit
def _load_source(
    x_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr, offset, mask, channel, ok
):  # fmt: skip
    """What the convolution reads, 0 where not mask: x, relu(scale*x + shift), or dz.

    dz = a*g [+ b*z + c] is read where z_ptr is given, x_ptr is then dy; the mask is that of y or of
    scale*z + shift, whichever is given.
    """
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    if z_ptr is not None:
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dz = x.to(tl.float32)
        if y_ptr is not None:
            dz = _relu_gradient(dz, tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32))
        elif scale_ptr is not None:
            scale, shift = _vector(scale_ptr, channel, ok), _vector(shift_ptr, channel, ok)
            dz = _relu_gradient(dz, z * scale + shift)
        dz *= _vector(a_ptr, channel, ok)
        if b_ptr is not None:
            dz += z * _vector(b_ptr, channel, ok) + _vector(c_ptr, channel, ok)
        x = tl.where(mask, dz, 0.0).to(x.dtype)
    elif scale_ptr is not None:
        scale, shift = _vector(scale_ptr, channel, ok), _vector(shift_ptr, channel, ok)
        activation = _relu(x.to(tl.float32) * scale + shift)
        x = tl.where(mask, activation, 0.0).to(x.dtype)
    return x


@_jit
def _weights(
    w_ptr, tile, first_src, first_dst, tap, K, stride_k, stride_d, stride_tap,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, SRC: tl.constexpr,
    DST: tl.constexpr, TILES: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(TILES, SRC, taps*DST): block-diagonal weights, column f those of tap[f], zero from 9 on.

    TRANSPOSED: from channels out to channels in, as dx wants them.
    """
    src = first_src + tl.arange(0, SRC)
    dst = first_dst + tl.arange(0, tap.shape[0]) % DST
    if TRANSPOSED:
        o, i = src[None, :, None], dst[None, None, :]
    else:
        i, o = src[None, :, None], dst[None, None, :]
    tap = tap[None, None, :]
    k = (tile + tl.arange(0, TILES)[:, None, None]) * (PACK * DOUT) + o
    ok = (i // DIN == o // DOUT) & (i < PACK * DIN) & (o < PACK * DOUT) & (k < K) & (tap < 9)
    offset = k.to(tl.int64) * stride_k + (i % DIN) * stride_d + tap * stride_tap
    return tl.load(w_ptr + offset, mask=ok, other=0.0)


@_jit
def _dot_groups(
    x, w, acc, SRC_D: tl.constexpr, DST_D: tl.constexpr, DST: tl.constexpr, PACK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x @ w, one group at a time: what is not finite stays in its group."""
    row_group = (tl.arange(0, x.shape[2]) // SRC_D)[None, None, :]
    column_group = (tl.arange(0, acc.shape[2]) % DST // DST_D)[None, None, :]
    for group in range(PACK):
        own = tl.where(row_group == group, x, 0.0)
        acc = tl.where(column_group == group, _dot(own, w, acc, PRECISION), acc)
    return acc


@_jit
def _thirds(d, DST: tl.constexpr):
    """(TILES, P, 4*DST) -> its first three quarters, which are in the same registers."""
    d = tl.permute(tl.reshape(d, (d.shape[0], d.shape[1], 2, 2, DST)), (0, 1, 4, 2, 3))
    even, odd = tl.split(d)
    d0, d2 = tl.split(even)
    d1, _ = tl.split(odd)
    return d0, d1, d2


@_jit
def _store_result(
    y_ptr, offset, mask, y, scale_ptr, shift_ptr, residual_ptr, channel, ok
):  # fmt: skip
    """y, or relu(scale*y + shift [+ residual])."""
    if scale_ptr is not None:
        y = y * _vector(scale_ptr, channel, ok) + _vector(shift_ptr, channel, ok)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = _relu(y)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@_jit
def _pivot(t, valid):
    """The means of the columns of (P, CHANNELS): what statistics are taken relative to.

    Any value near the data does; without one, their rounding would be that of the mean.
    """
    return tl.sum(tl.where(valid[:, None], t, 0.0), 0) / tl.sum(valid.to(tl.float32), 0)


@_jit
def _store_statistics(
    partial_ptr, program, K, pivot, mean, m2, valid, count, channel, ok
):  # fmt: skip
    """Merge (P, CHANNELS) means and squared deviations of `count` (P,) values each into the partial
    of this program: count, pivot, mean - pivot, squared deviation, four rows of K."""
    count = tl.where(valid, count, 0.0)[:, None]
    total = tl.sum(count, 0)  # at least 1
    whole = tl.sum(tl.where(valid[:, None], mean * count, 0.0), 0) / total
    off = mean - whole[None, :]
    m2 = tl.sum(tl.where(valid[:, None], m2 + count * off * off, 0.0), 0)
    row = partial_ptr + program.to(tl.int64) * 4 * K + channel
    tl.store(row, total + tl.zeros_like(whole), mask=ok)
    tl.store(row + K, pivot, mask=ok)
    tl.store(row + 2 * K, whole, mask=ok)
    tl.store(row + 3 * K, m2, mask=ok)


# Kernels: convolution ------------------------------------------------------------------------


@_jit
def _taps(phase, stride, dilation):
    """First, step and number of the taps k of dx with stride | phase - (k - 1)*dilation."""
    zero = (phase + dilation) % stride == 0
    one = phase % stride == 0
    two = (phase - dilation) % stride == 0
    first = tl.where(zero, 0, tl.where(one, 1, 2))
    count = zero.to(tl.int32) + one.to(tl.int32) + two.to(tl.int32)
    return first, tl.where(count == 2, 2, 1), count  # of two, tap 1 is none


@_jit
def _conv(
    x_ptr, z_ptr, y_ptr, in_scale_ptr, in_shift_ptr, a_ptr, b_ptr, c_ptr, w_ptr,
    SRC_H, SRC_W, SRC_C, K, stride_k, stride_d, stride_tap, stride, dilation,
    tile, first_dst, n, h, w, pixel_ok, phase_h, phase_w,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, SRC: tl.constexpr,
    DST: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, TRANSPOSED: tl.constexpr,
    STRIDED: tl.constexpr, PRECISION: tl.constexpr, GROUPWISE: tl.constexpr,
):  # fmt: skip
    """(TILES, BLOCK_P, DST): the convolution at the pixels n, h, w; GROUPWISE: see `_dot_groups`.

    Forward reads row h*stride + (kh - 1)*dilation for tap kh; dx reads the row of dz of which h is
    that row, (h - (kh - 1)*dilation) / stride, if there is one; STRIDED: stride is not 1, and all
    h and w leave the remainders phase_h and phase_w.
    """
    SRC_D: tl.constexpr = DOUT if TRANSPOSED else DIN
    DST_D: tl.constexpr = DIN if TRANSPOSED else DOUT
    if STRIDED:
        first_h, step_h, count_h = _taps(phase_h, stride, dilation)
        first_w, step_w, count_w = _taps(phase_w, stride, dilation)
    acc = tl.zeros((TILES, BLOCK_P, DST), tl.float32)
    for chunk in range(0, PACK * SRC_D, SRC):
        src, src_ok = _columns(tile, chunk, SRC_C, SRC_D, PACK, SRC, TILES)
        for tap in range(count_h * count_w if STRIDED else 9):
            if STRIDED:
                kh = first_h + tap // count_w * step_h
                kw = first_w + tap % count_w * step_w
                tap = kh * 3 + kw
            down = (tap // 3 - 1) * dilation
            right = (tap % 3 - 1) * dilation
            if TRANSPOSED:
                src_h = h - down
                src_w = w - right
                ok = pixel_ok & (src_h >= 0) & (src_w >= 0)
                if STRIDED:
                    src_h //= stride
                    src_w //= stride
            else:
                src_h = h * stride + down
                src_w = w * stride + right
                ok = pixel_ok & (src_h >= 0) & (src_w >= 0)
            ok &= (src_h < SRC_H) & (src_w < SRC_W)
            pixel = (n * SRC_H + src_h) * SRC_W + src_w
            x = _load_source(
                x_ptr, z_ptr, y_ptr, in_scale_ptr, in_shift_ptr, a_ptr, b_ptr, c_ptr,
                pixel[:, None] * SRC_C + src[None, :],
                ok[:, None] & src_ok[None, :], src, src_ok,
            )  # fmt: skip
            weights = _weights(
                w_ptr, tile, chunk, first_dst,
                tl.zeros((DST,), tl.int32) + tap, K, stride_k, stride_d, stride_tap,
                DIN, DOUT, PACK, SRC, DST, TILES, TRANSPOSED,
            )  # fmt: skip
            x = _split(x, TILES)
            if GROUPWISE:
                acc = _dot_groups(x, weights, acc, SRC_D, DST_D, DST, PACK, PRECISION)
            else:
                acc = _dot(x, weights, acc, PRECISION)
    return acc


@_jit(do_not_specialize=_UNKNOWN_STRIDES)
def _conv_rows_kernel(
    x_ptr, z_ptr, y_ptr, in_scale_ptr, in_shift_ptr, a_ptr, b_ptr, c_ptr, w_ptr,
    scale_ptr, shift_ptr, residual_ptr, out_ptr, partial_ptr, dz_ptr,
    N, H, W, SRC_C, DST_C, K, rows, stride_k, stride_d, stride_tap,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, SRC: tl.constexpr,
    DST: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, UNROLL: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stride 1. Programs: (tiles / TILES, N*W / BLOCK_P, H / rows).

    dx also writes dz, which it has in registers, for dweight.
    """
    SRC_D: tl.constexpr = DOUT if TRANSPOSED else DIN
    DST_D: tl.constexpr = DIN if TRANSPOSED else DOUT
    tile = tl.program_id(0) * TILES
    src, src_ok = _columns(tile, 0, SRC_C, SRC_D, PACK, SRC, TILES)
    dst, dst_ok = _columns(tile, 0, DST_C, DST_D, PACK, DST, TILES)
    column = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    column_ok = column < N * W
    n = (column // W).to(tl.int64)
    w = column % W
    first = tl.program_id(2) * rows
    last = tl.minimum(first + rows, H)  # output rows first to last - 1
    pixel = (n * H + first - 1) * W + w  # of the input row; int64

    quarter = tl.arange(0, 4 * DST) // DST  # kh, turned round in dx; the fourth is no tap
    weights = ()
    for kw in tl.static_range(3):
        tap = tl.where(
            quarter < 3, (2 - quarter) * 3 + 2 - kw if TRANSPOSED else quarter * 3 + kw, 9
        )
        weights += (
            _weights(
                w_ptr, tile, 0, 0, tap, K, stride_k, stride_d, stride_tap,
                DIN, DOUT, PACK, SRC, DST, TILES, TRANSPOSED,
            ),
        )  # fmt: skip

    zero = tl.zeros((TILES, BLOCK_P, DST), tl.float32)
    upper = zero  # what rows above have given to output rows h - 1 and h
    middle = zero
    odd = tl.zeros((TILES, BLOCK_P), tl.float32)  # NaN where a result was not finite
    pivot = tl.zeros((TILES * DST,), tl.float32)
    mean = tl.zeros((BLOCK_P, TILES * DST), tl.float32)
    m2 = mean
    for turn in range(first - 1, last + 1, UNROLL):
        for u in tl.static_range(UNROLL):
            h = turn + u
            row_ok = column_ok & (h >= 0) & (h < H)
            d = tl.zeros((TILES, BLOCK_P, 4 * DST), tl.float32)
            for kw in tl.static_range(3):
                inside = row_ok & (w + (kw - 1) >= 0) & (w + (kw - 1) < W)
                x = _load_source(
                    x_ptr, z_ptr, y_ptr, in_scale_ptr, in_shift_ptr, a_ptr, b_ptr, c_ptr,
                    (pixel + (kw - 1))[:, None] * SRC_C + src[None, :],
                    inside[:, None] & src_ok[None, :], src, src_ok,
                )  # fmt: skip
                if dz_ptr is not None and kw == 1:
                    own = column_ok & (h >= first) & (h < last)
                    offset = pixel[:, None] * SRC_C + src[None, :]
                    tl.store(dz_ptr + offset, x, mask=own[:, None] & src_ok[None, :])
                x = _split(x, TILES)
                d = _dot(x, weights[kw], d, PRECISION)
            lower, same, above = _thirds(d, DST)
            if (h > first) & (h <= last):  # row h - 1 is complete
                result = upper + above
                if PACK > 1:
                    odd += tl.sum(result * 0.0, 2)
                _store_result(
                    out_ptr, (pixel - W)[:, None] * DST_C + dst[None, :],
                    column_ok[:, None] & dst_ok[None, :], _join(result),
                    scale_ptr, shift_ptr, residual_ptr, dst, dst_ok,
                )  # fmt: skip
                if partial_ptr is not None:
                    if h == first + 1:
                        pivot = _pivot(_join(result), column_ok)
                    relative = _join(result) - pivot[None, :]
                    off = relative - mean
                    mean += off / (h - first)
                    m2 += off * (relative - mean)
            upper = middle + same
            middle = lower
            pixel += W
    if PACK > 1:
        if tl.max((odd != odd).to(tl.int32)) > 0:
            tl.debug_barrier()  # what follows is written over what was written above
            mean = tl.zeros((BLOCK_P, TILES * DST), tl.float32)
            m2 = mean
            for h in range(first, last):
                result = _conv(
                    x_ptr, z_ptr, y_ptr, in_scale_ptr, in_shift_ptr, a_ptr, b_ptr, c_ptr, w_ptr,
                    H, W, SRC_C, K, stride_k, stride_d, stride_tap, 1, 1,
                    tile, 0, n, h + tl.zeros_like(w), w, column_ok, 0, 0,
                    DIN, DOUT, PACK, SRC, DST, TILES, BLOCK_P, TRANSPOSED, False, PRECISION, True,
                )  # fmt: skip
                _store_result(
                    out_ptr, ((n * H + h) * W + w)[:, None] * DST_C + dst[None, :],
                    column_ok[:, None] & dst_ok[None, :], _join(result),
                    scale_ptr, shift_ptr, residual_ptr, dst, dst_ok,
                )  # fmt: skip
                if partial_ptr is not None:
                    if h == first:
                        pivot = _pivot(_join(result), column_ok)
                    relative = _join(result) - pivot[None, :]
                    off = relative - mean
                    mean += off / (h + 1 - first)
                    m2 += off * (relative - mean)
    if partial_ptr is not None:
        program = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        count = (last - first) * 1.0 + tl.zeros((BLOCK_P,), tl.float32)
        _store_statistics(
            partial_ptr, program, DST_C, pivot, mean, m2, column_ok, count, dst, dst_ok
        )


@_jit
def _conv_kernel(
    x_ptr, in_scale_ptr, in_shift_ptr, w_ptr, scale_ptr, shift_ptr, residual_ptr, out_ptr,
    partial_ptr,
    N, SRC_H, SRC_W, H, W, SRC_C, DST_C, K, stride_k, stride_d, stride_tap, stride, dilation,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, SRC: tl.constexpr,
    DST: tl.constexpr, DST_CHUNKS: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr,
    PHASES: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Any stride and dilation. Programs: (tiles * DST_CHUNKS / TILES, pixels / BLOCK_P, PHASES^2);
    FLAT: the first two are one axis, for more pixels than a second one has programs.

    dx: a program takes the pixels whose h and w leave the same remainders, its phase, of the
    stride; for them the same taps count.
    """
    DST_D: tl.constexpr = DIN if TRANSPOSED else DOUT
    program = tl.program_id(0)
    block = tl.program_id(1)
    if FLAT:
        programs = tl.cdiv(tl.cdiv(DST_C // DST_D, PACK), TILES) * DST_CHUNKS
        block = program // programs
        program %= programs
    tile = program // DST_CHUNKS * TILES
    first_dst = program % DST_CHUNKS * DST
    dst, dst_ok = _columns(tile, first_dst, DST_C, DST_D, PACK, DST, TILES)
    rows = tl.cdiv(H, PHASES)
    columns = tl.cdiv(W, PHASES)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = p // (rows * columns)
    phase_h = tl.program_id(2) // PHASES
    phase_w = tl.program_id(2) % PHASES
    h = p // columns % rows * PHASES + phase_h
    w = p % columns * PHASES + phase_w
    pixel_ok = (n < N) & (h < H) & (w < W)
    n = n.to(tl.int64)
    acc = _conv(
        x_ptr, None, None, in_scale_ptr, in_shift_ptr, None, None, None, w_ptr,
        SRC_H, SRC_W, SRC_C, K, stride_k, stride_d, stride_tap, stride, dilation,
        tile, first_dst, n, h, w, pixel_ok, phase_h, phase_w,
        DIN, DOUT, PACK, SRC, DST, TILES, BLOCK_P, TRANSPOSED, PHASES > 1, PRECISION, False,
    )  # fmt: skip
    if PACK > 1:
        if tl.max((acc * 0.0 != 0.0).to(tl.int32)) > 0:
            acc = _conv(
                x_ptr, None, None, in_scale_ptr, in_shift_ptr, None, None, None, w_ptr,
                SRC_H, SRC_W, SRC_C, K, stride_k, stride_d, stride_tap, stride, dilation,
                tile, first_dst, n, h, w, pixel_ok, phase_h, phase_w,
                DIN, DOUT, PACK, SRC, DST, TILES, BLOCK_P, TRANSPOSED, PHASES > 1, PRECISION, True,
            )  # fmt: skip
    acc = _join(acc)
    pixel = (n * H + h) * W + w
    _store_result(
        out_ptr, pixel[:, None] * DST_C + dst[None, :], pixel_ok[:, None] & dst_ok[None, :], acc,
        scale_ptr, shift_ptr, residual_ptr, dst, dst_ok,
    )  # fmt: skip
    if partial_ptr is not None:
        pivot = _pivot(acc, pixel_ok)
        acc -= pivot[None, :]
        _store_statistics(
            partial_ptr, block, DST_C, pivot, acc, tl.zeros_like(acc), pixel_ok,
            tl.full((BLOCK_P,), 1.0, tl.float32), dst, dst_ok,
        )  # fmt: skip


@_jit
def _finish_row(
    out_ptr, partial_ptr, scale_ptr, shift_ptr, residual_ptr, pixel, C, result, own, channel, ok,
    count, odd, pivot, mean, m2,
):  # fmt: skip
    """Store a row of results (BLOCKS, P, 16), and add it to the statistics."""
    odd += tl.sum(result * 0.0, 2)
    result = _join(result)
    _store_result(
        out_ptr, pixel[:, None] * C + channel[None, :], own[:, None] & ok[None, :], result,
        scale_ptr, shift_ptr, residual_ptr, channel, ok,
    )  # fmt: skip
    if partial_ptr is not None:
        if count == 1:
            pivot = _pivot(result, own)
        relative = result - pivot[None, :]
        off = relative - mean
        mean += off * (1.0 / count)
        m2 += off * (relative - mean)
    return odd, pivot, mean, m2


@_jit
def _copied(a, b):
    """a @ b, one of them of zeros and ones: exact, and in float16 without a conversion."""
    if a.dtype == tl.float16:
        product = tl.dot(a, b, out_dtype=tl.float16)
    else:
        product = tl.dot(a, b).to(a.dtype)
    return product


@_jit
def _activation(
    x_ptr, scale, shift, offset, pixel_ok, ok, one, TILES: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """(TILES*CHUNKS, channels in, P): x, or relu(scale*x + shift), CHUNKS times."""
    WIDTH: tl.constexpr = 16 * CHUNKS
    x = tl.load(x_ptr + offset, mask=pixel_ok[:, None] & ok[None, :], other=0.0)
    P: tl.constexpr = x.shape[0]
    if CHUNKS > 1:
        x = tl.reshape(x, (P, TILES, 1, WIDTH))
        x = tl.broadcast_to(x, (P, TILES, CHUNKS, WIDTH))
        x = tl.reshape(x, (P, TILES * CHUNKS * WIDTH))
    x = _turn(_split(x, TILES * CHUNKS))
    if scale is None:
        turned = _copied(x, _turn(one))
    else:
        turned = tl.dot(x, _turn(one)) * scale + shift
        turned = tl.where(pixel_ok[None, None, :], _relu(turned), 0.0).to(x.dtype)
    return turned


@_jit
def _conv_shift_kernel(
    x_ptr, in_scale_ptr, in_shift_ptr, w_ptr, scale_ptr, shift_ptr, residual_ptr, out_ptr,
    partial_ptr,
    N, SRC_H, SRC_W, H, W, SRC_C, DST_C, K, rows, stride_k, stride_d, stride_tap,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, SRC: tl.constexpr,
    DST: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Strides 1 and 2. Programs: (tiles / TILES, N*W / USED, H / rows).

    A warp makes 16 of a tile's channels, for which it keeps the weights. Of BLOCK_P = 16 columns
    the first, with stride 1 also the last, are there for their neighbours.
    """
    USED: tl.constexpr = BLOCK_P - 2 if STRIDE == 1 else BLOCK_P - 1
    CHUNKS: tl.constexpr = DST // 16
    BLOCKS: tl.constexpr = TILES * CHUNKS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0) * TILES
    src, src_ok = _columns(tile, 0, SRC_C, DIN, PACK, SRC, TILES)
    dst, dst_ok = _columns(tile, 0, DST_C, DOUT, PACK, DST, TILES)
    position = tl.arange(0, BLOCK_P)
    one = (position[None, :] == position[:, None]).to(DTYPE)
    one = tl.broadcast_to(one[None, :, :], (BLOCKS, BLOCK_P, BLOCK_P))
    one = _copied(one, one)
    i = tl.arange(0, SRC)[:, None]
    f = tl.arange(0, TILES * DST)[None, :]
    o = f % DST
    in_group = i // DIN == o // DOUT  # as many in as out
    if TRANSPOSED:
        k = (tile + f // DST) * SRC + i
        d = o % DIN
    else:
        k = tile * DST + f
        d = i % DIN
    weights = ()  # (BLOCKS, 16 channels out, all in)
    for tap in tl.static_range(9):
        at = (8 - tap if TRANSPOSED else tap) * stride_tap
        at += k.to(tl.int64) * stride_k + d * stride_d
        weight = tl.load(w_ptr + at, mask=in_group & (k < K), other=0.0)
        weights += (_copied(one, _turn(_split(weight, BLOCKS))),)
    scale = None
    shift = None
    if in_scale_ptr is not None:
        block = tl.arange(0, BLOCKS)[:, None, None]
        channel = (tile + block // CHUNKS) * SRC + tl.arange(0, SRC)[None, :, None]
        scale = tl.load(in_scale_ptr + channel, mask=channel < SRC_C, other=0.0)
        shift = tl.load(in_shift_ptr + channel, mask=channel < SRC_C, other=0.0)
    column = tl.program_id(1) * USED - 1 + position
    own = (column < N * W) & (position > 0) & (position <= USED)
    n = (column // W).to(tl.int64)
    w = column % W
    # the columns at both ends are the neighbours' own
    inside = own | ((position == 0) & (column >= 0) & (w + 1 < W))
    if STRIDE == 1:
        inside |= (position == USED + 1) & (column < N * W) & (w > 0)
        right = _shift(w + 1 < W, 1, one)
    else:
        inside &= 2 * w + 1 < SRC_W
    left = _shift(w > 0, -1, one)

    first = tl.program_id(2) * rows
    last = tl.minimum(first + rows, H)  # output rows first to last - 1
    zero = tl.zeros((BLOCKS, BLOCK_P, 16), tl.float32)
    upper = zero  # what rows above have given to the next rows of the output
    middle = zero
    odd = tl.zeros((BLOCKS, BLOCK_P), tl.float32)  # NaN where a result was not finite
    pivot = tl.zeros((BLOCKS * 16,), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCKS * 16), tl.float32)
    m2 = mean
    # a turn takes row r of x; with stride 2 rows 2*r, 2*r + 1, and of them even and odd columns
    for r in range(tl.maximum(first - 1, 0), tl.minimum(last + 2 - STRIDE, H)):
        pixel = (n * SRC_H + STRIDE * r) * SRC_W + STRIDE * w
        lower = zero
        if STRIDE == 1:
            x = _activation(
                x_ptr, scale, shift, pixel[:, None] * SRC_C + src[None, :], inside, src_ok, one,
                TILES, CHUNKS,
            )  # fmt: skip
            for kw in tl.static_range(3):
                by = left if kw == 0 else (one if kw == 1 else right)
                moved = _copied(by, _turn(x))  # (BLOCKS, P, SRC)
                upper = tl.dot(moved, _turn(weights[6 + kw]), upper)
                middle = tl.dot(moved, _turn(weights[3 + kw]), middle)
                lower = tl.dot(moved, _turn(weights[kw]), lower)
        else:
            for kh in tl.static_range(1, 3):
                row = pixel + (kh - 1) * SRC_W
                row_ok = 2 * r + kh - 1 < SRC_H
                x_even = _activation(
                    x_ptr, scale, shift, row[:, None] * SRC_C + src[None, :], own & row_ok,
                    src_ok, one, TILES, CHUNKS,
                )  # fmt: skip
                x_odd = _activation(
                    x_ptr, scale, shift, (row + 1)[:, None] * SRC_C + src[None, :],
                    inside & row_ok, src_ok, one, TILES, CHUNKS,
                )  # fmt: skip
                for kw in tl.static_range(3):
                    x = x_even if kw == 1 else x_odd
                    moved = _copied(left if kw == 0 else one, _turn(x))
                    upper = tl.dot(moved, _turn(weights[3 * kh + kw]), upper)
                    if kh == 2:
                        lower = tl.dot(moved, _turn(weights[kw]), lower)
        done = r if STRIDE == 2 else r - 1
        if done >= first:
            odd, pivot, mean, m2 = _finish_row(
                out_ptr, partial_ptr, scale_ptr, shift_ptr, residual_ptr, (n * H + done) * W + w,
                DST_C, upper, own, dst, dst_ok, done + 1 - first, odd, pivot, mean, m2,
            )  # fmt: skip
        if STRIDE == 1:
            upper = middle
            middle = lower
        else:
            upper = lower
    if STRIDE == 1:
        if last == H:
            odd, pivot, mean, m2 = _finish_row(
                out_ptr, partial_ptr, scale_ptr, shift_ptr, residual_ptr, (n * H + H - 1) * W + w,
                DST_C, upper, own, dst, dst_ok, H - first, odd, pivot, mean, m2,
            )  # fmt: skip
    if tl.max((odd != 0.0).to(tl.int32)) > 0:
        # an x that is not finite reached its neighbours
        tl.debug_barrier()  # what follows is written over what was written above
        mean = tl.zeros((BLOCK_P, BLOCKS * 16), tl.float32)
        m2 = mean
        for h in range(first, last):
            result = _conv(
                x_ptr, None, None, in_scale_ptr, in_shift_ptr, None, None, None, w_ptr,
                SRC_H, SRC_W, SRC_C, K, stride_k, stride_d, stride_tap, STRIDE, 1,
                tile, 0, n, h + tl.zeros_like(w), w, own, 0, 0,
                DIN, DOUT, PACK, SRC, DST, TILES, BLOCK_P, TRANSPOSED, False, PRECISION, PACK > 1,
            )  # fmt: skip
            _, pivot, mean, m2 = _finish_row(
                out_ptr, partial_ptr, scale_ptr, shift_ptr, residual_ptr, (n * H + h) * W + w,
                DST_C, result, own, dst, dst_ok, h + 1 - first, 0.0, pivot, mean, m2,
            )  # fmt: skip
    if partial_ptr is not None:
        program = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        count = (last - first) * 1.0 + tl.zeros((BLOCK_P,), tl.float32)
        _store_statistics(partial_ptr, program, DST_C, pivot, mean, m2, own, count, dst, dst_ok)


@_jit
def _dweight_kernel(
    dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr,
    x_ptr, in_scale_ptr, in_shift_ptr, partial_ptr,
    N, X_H, X_W, H, W, C, K, rows, splits, stride, dilation,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, SRC: tl.constexpr,
    DST: tl.constexpr, SRC_CHUNKS: tl.constexpr, DST_CHUNKS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[s, tap, k, d]. Programs: (N*W / BLOCK_P * splits * 3 * chunks, tiles / TILES).

    A program takes one kh and walks BLOCK_P columns (n, w) down `rows` rows of dz. The x of its
    three taps are one tile with 4 times as many columns, the fourth zero: one dot, dz is loaded
    once.
    """
    CHUNKS: tl.constexpr = SRC_CHUNKS * DST_CHUNKS
    tile = tl.program_id(1) * TILES
    chunk = tl.program_id(0) % CHUNKS
    first_src = chunk % SRC_CHUNKS * SRC
    first_dst = chunk // SRC_CHUNKS * DST
    kh = tl.program_id(0) // CHUNKS % 3
    part = tl.program_id(0) // (3 * CHUNKS)
    dst, dst_ok = _columns(tile, first_dst, K, DOUT, PACK, DST, TILES)
    # columns of x: tile, tap, channel
    f = tl.arange(0, TILES * 4 * SRC)
    kw = f // SRC % 4
    i = first_src + f % SRC
    src = (tile + f // (4 * SRC)) * (PACK * DIN) + i
    src_ok = (i < PACK * DIN) & (src < C) & (kw < 3)
    column = part // splits * BLOCK_P + tl.arange(0, BLOCK_P)
    column_ok = column < N * W
    n = (column // W).to(tl.int64)
    w = column % W
    x_w = w[:, None] * stride + ((kw - 1) * dilation)[None, :]
    x_ok = column_ok[:, None] & src_ok[None, :] & (x_w >= 0) & (x_w < X_W)
    dz_ok = column_ok[:, None] & dst_ok[None, :]
    first = part % splits * rows
    x_columns = x_w.to(tl.int64) * C + src[None, :]
    acc = tl.zeros((TILES, DST, 4 * SRC), tl.float32)
    for h in range(first, tl.minimum(first + rows, H)):
        dz = _load_source(
            dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr,
            ((n * H + h) * W + w)[:, None] * K + dst[None, :], dz_ok, dst, dst_ok,
        )  # fmt: skip
        x_h = h * stride + (kh - 1) * dilation
        x = _load_source(
            x_ptr, None, None, in_scale_ptr, in_shift_ptr, None, None, None,
            ((n * X_H + x_h) * X_W)[:, None] * C + x_columns,
            x_ok & (x_h >= 0) & (x_h < X_H), src, src_ok,
        )  # fmt: skip
        dz = tl.permute(_split(dz, TILES), (0, 2, 1))
        acc = _dot(dz, _split(x, TILES), acc, PRECISION)
    o = first_dst + tl.arange(0, DST)[None, :, None]
    g = tl.arange(0, 4 * SRC)[None, None, :]
    i = first_src + g % SRC
    kw = g // SRC
    k = (tile + tl.arange(0, TILES)[:, None, None]) * (PACK * DOUT) + o
    ok = (i // DIN == o // DOUT) & (i < PACK * DIN) & (o < PACK * DOUT) & (k < K) & (kw < 3)
    row = (part * 9 + kh * 3 + kw).to(tl.int64) * K + k
    tl.store(partial_ptr + row * DIN + i % DIN, acc, mask=ok)


# Kernels: dx and dweight of one reading ------------------------------------------------------


@_jit
def _spread(t, TILES: tl.constexpr, CHUNKS: tl.constexpr, OUT: tl.constexpr):
    """(P, TILES*CHUNKS*16) -> (BLOCKS, 16, P): the channels out, or in, of every block.

    BLOCKS = (TILES, chunks out, chunks in).
    """
    P: tl.constexpr = t.shape[0]
    if CHUNKS > 1:
        if OUT:
            t = tl.reshape(t, (P, TILES, CHUNKS, 1, 16))
        else:
            t = tl.reshape(t, (P, TILES, 1, CHUNKS, 16))
        t = tl.broadcast_to(t, (P, TILES, CHUNKS, CHUNKS, 16))
        t = tl.reshape(t, (P, TILES * CHUNKS * CHUNKS * 16))
    return _turn(_split(t, TILES * CHUNKS * CHUNKS))


@_jit
def _gather(t, TILES: tl.constexpr, CHUNKS: tl.constexpr):
    """(BLOCKS, P, 16) -> (P, TILES*CHUNKS*16): the sum over the channels out of blocks."""
    if CHUNKS > 1:
        t = tl.reshape(t, (TILES, CHUNKS, CHUNKS, t.shape[1], t.shape[2]))
        t = tl.sum(t, 1)
        t = tl.reshape(t, (TILES * CHUNKS, t.shape[2], t.shape[3]))
    return _join(t)


@_jit
def _turned(ptr, offset, mask, one, TILES: tl.constexpr, CHUNKS: tl.constexpr, OUT: tl.constexpr):
    """(BLOCKS, 16, P) of an image, float32."""
    t = _spread(tl.load(ptr + offset, mask=mask, other=0.0), TILES, CHUNKS, OUT)
    return tl.dot(t, _turn(one))


@_jit
def _turned_x(
    x_ptr, scale, shift, offset, pixel_ok, ok, one, TILES: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """(BLOCKS, 16, P): x, or relu(scale*x + shift)."""
    x = _turned(x_ptr, offset, pixel_ok[:, None] & ok[None, :], one, TILES, CHUNKS, False)
    if scale is not None:
        x = tl.where(pixel_ok[None, None, :], _relu(x * scale + shift), 0.0)
    return x.to(one.dtype)


@_jit(do_not_specialize=("rows", "splits", "walk"))
def _conv_backward_kernel(
    dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr,
    x_ptr, in_scale_ptr, in_shift_ptr, w_ptr, dx_ptr, partial_ptr,
    N, X_H, X_W, H, W, C, K, rows, splits, walk, stride_k, stride_d, stride_tap,
    DIN: tl.constexpr, DOUT: tl.constexpr, PACK: tl.constexpr, TILES: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, and partial[s, tap, k, d]. Programs: (tiles / TILES, column sets / walk * splits)."""
    USED: tl.constexpr = BLOCK_P - 2
    HALO: tl.constexpr = 1 if STRIDE == 1 else 0  # to the left; one to the right
    WIDTH: tl.constexpr = 16 * CHUNKS
    BLOCKS: tl.constexpr = TILES * CHUNKS * CHUNKS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0) * TILES
    out, out_ok = _columns(tile, 0, K, DOUT, PACK, WIDTH, TILES)
    src, src_ok = _columns(tile, 0, C, DIN, PACK, WIDTH, TILES)
    position = tl.arange(0, BLOCK_P)
    one = (position[None, :] == position[:, None]).to(DTYPE)
    one = tl.broadcast_to(one[None, :, :], (BLOCKS, BLOCK_P, BLOCK_P))
    one = tl.dot(one, one).to(DTYPE)
    block = tl.arange(0, BLOCKS)[:, None, None]
    o = block // CHUNKS % CHUNKS * 16 + tl.arange(0, 16)[None, :, None]
    i = block % CHUNKS * 16 + tl.arange(0, 16)[None, None, :]
    k = (tile + block // (CHUNKS * CHUNKS)) * (PACK * DOUT) + o
    k_ok = (o < PACK * DOUT) & (k < K)
    weight_ok = (i // DIN == o // DOUT) & (i < PACK * DIN) & k_ok
    weights = ()  # (BLOCKS, 16 channels in, 16 out)
    for tap in tl.static_range(9):
        at = k.to(tl.int64) * stride_k + (i % DIN) * stride_d + tap * stride_tap
        weight = tl.load(w_ptr + at, mask=weight_ok, other=0.0)
        weights += (tl.dot(_turn(weight), _turn(one)).to(DTYPE),)
    if z_ptr is not None:
        a = tl.load(a_ptr + k, mask=k_ok, other=0.0)
        if y_ptr is None and scale_ptr is not None:
            scale = tl.load(scale_ptr + k, mask=k_ok, other=0.0)
            shift = tl.load(shift_ptr + k, mask=k_ok, other=0.0)
        if b_ptr is not None:
            b = tl.load(b_ptr + k, mask=k_ok, other=0.0)
            c = tl.load(c_ptr + k, mask=k_ok, other=0.0)
    in_scale = None
    in_shift = None
    if in_scale_ptr is not None:
        i_turned = block % CHUNKS * 16 + tl.arange(0, 16)[None, :, None]
        channel = (tile + block // (CHUNKS * CHUNKS)) * (PACK * DIN) + i_turned
        channel_ok = (i_turned < PACK * DIN) & (channel < C)
        in_scale = tl.load(in_scale_ptr + channel, mask=channel_ok, other=0.0)
        in_shift = tl.load(in_shift_ptr + channel, mask=channel_ok, other=0.0)

    none = tl.zeros((BLOCKS, 16, 16), tl.float32)
    zero = tl.zeros((BLOCKS, BLOCK_P, 16), tl.float32)
    dw = (none, none, none, none, none, none, none, none, none)
    first = tl.program_id(1) % splits * rows
    last = tl.minimum(first + rows, H)
    begin = tl.program_id(1) // splits * walk
    end = tl.minimum(begin + walk, tl.cdiv(N * W, USED))
    for s in range(begin, end):
        column = s * USED - HALO + position
        own = (column < N * W) & (position >= HALO) & (position < HALO + USED)
        n = (column // W).to(tl.int64)
        w = column % W
        inside = own | ((position == HALO - 1) & (column >= 0) & (w + 1 < W))
        inside |= (position == HALO + USED) & (column < N * W) & (w > 0)
        right = _shift(w + 1 < W, 1, one)
        upper = zero
        if STRIDE == 1:
            left = _shift(w > 0, -1, one)
            start = tl.maximum(first - 1, 0)
            middle = zero
            x_same = _turned_x(
                x_ptr, in_scale, in_shift, ((n * H + start) * W + w)[:, None] * C + src[None, :],
                own & (start >= first), src_ok, one, TILES, CHUNKS,
            )  # fmt: skip
            x_above = tl.zeros_like(x_same)
        else:
            start = first
            even_ok = own
            odd_ok = own & (2 * w + 1 < X_W)
            upper_odd = zero
            x_even = tl.zeros((BLOCKS, 16, BLOCK_P), DTYPE)
            x_odd = x_even
        for r in range(start, tl.minimum(last + 1, H)):
            offset = ((n * H + r) * W + w)[:, None] * K + out[None, :]
            mask = inside[:, None] & out_ok[None, :]
            dz = _turned(dy_ptr, offset, mask, one, TILES, CHUNKS, True)
            if z_ptr is not None:
                z = _turned(z_ptr, offset, mask, one, TILES, CHUNKS, True)
                if y_ptr is not None:
                    before = _turned(y_ptr, offset, mask, one, TILES, CHUNKS, True)
                    dz = _relu_gradient(dz, before)
                elif scale_ptr is not None:
                    dz = _relu_gradient(dz, z * scale + shift)
                dz *= a
                if b_ptr is not None:
                    dz += z * b + c
            dz = dz.to(DTYPE)  # (BLOCKS, DOUT, P)
            pixel = (n * X_H + STRIDE * r) * X_W + STRIDE * w
            if STRIDE == 1:
                x_below = _turned_x(
                    x_ptr, in_scale, in_shift, (pixel + X_W)[:, None] * C + src[None, :],
                    own & (r + 1 < last), src_ok, one, TILES, CHUNKS,
                )  # fmt: skip
                lower = zero
                dw_upper = ()  # the three rows of taps
                dw_middle = ()
                dw_lower = ()
                for kw in tl.static_range(3):
                    by = right if kw == 0 else (one if kw == 1 else left)
                    # not `_copied`: in float16 D = 2 would spill on sm_80
                    moved = tl.dot(by, _turn(dz)).to(DTYPE)  # (BLOCKS, P, DOUT)
                    upper = tl.dot(moved, _turn(weights[kw]), upper)
                    middle = tl.dot(moved, _turn(weights[3 + kw]), middle)
                    lower = tl.dot(moved, _turn(weights[6 + kw]), lower)
                    turned = dz if kw == 1 else tl.dot(dz, _turn(by)).to(DTYPE)
                    dw_upper += (tl.dot(turned, _turn(x_above), dw[kw]),)
                    dw_middle += (tl.dot(turned, _turn(x_same), dw[3 + kw]),)
                    dw_lower += (tl.dot(turned, _turn(x_below), dw[6 + kw]),)
                dw = dw_upper + dw_middle + dw_lower
                if r > first:
                    tl.store(
                        dx_ptr + (pixel - X_W)[:, None] * C + src[None, :],
                        _gather(upper, TILES, CHUNKS).to(DTYPE),
                        mask=own[:, None] & src_ok[None, :],
                    )  # fmt: skip
                upper = middle
                middle = lower
                x_above = x_same
                x_same = x_below
            else:
                here = tl.dot(one, _turn(dz)).to(DTYPE)
                next = tl.dot(right, _turn(dz)).to(DTYPE)
                dz_next = tl.dot(dz, _turn(right)).to(DTYPE)
                new = ()
                for kh in tl.static_range(3):
                    if kh > 0:
                        row = pixel + (kh - 1) * X_W
                        row_ok = (r < last) & (2 * r + kh - 1 < X_H)
                        x_even = _turned_x(
                            x_ptr, in_scale, in_shift, row[:, None] * C + src[None, :],
                            even_ok & row_ok, src_ok, one, TILES, CHUNKS,
                        )  # fmt: skip
                        x_odd = _turned_x(
                            x_ptr, in_scale, in_shift, (row + 1)[:, None] * C + src[None, :],
                            odd_ok & row_ok, src_ok, one, TILES, CHUNKS,
                        )  # fmt: skip
                        upper = zero
                        upper_odd = zero
                    new += (
                        tl.dot(dz_next, _turn(x_odd), dw[3 * kh]),
                        tl.dot(dz, _turn(x_even), dw[3 * kh + 1]),
                        tl.dot(dz, _turn(x_odd), dw[3 * kh + 2]),
                    )
                    upper = tl.dot(here, _turn(weights[3 * kh + 1]), upper)
                    upper_odd = tl.dot(here, _turn(weights[3 * kh + 2]), upper_odd)
                    upper_odd = tl.dot(next, _turn(weights[3 * kh]), upper_odd)
                    if kh < 2:
                        if (r < last) if kh == 1 else (r > first):
                            row = pixel + (kh - 1) * X_W
                            tl.store(
                                dx_ptr + row[:, None] * C + src[None, :],
                                _gather(upper, TILES, CHUNKS).to(DTYPE),
                                mask=even_ok[:, None] & src_ok[None, :],
                            )  # fmt: skip
                            tl.store(
                                dx_ptr + (row + 1)[:, None] * C + src[None, :],
                                _gather(upper_odd, TILES, CHUNKS).to(DTYPE),
                                mask=odd_ok[:, None] & src_ok[None, :],
                            )  # fmt: skip
                dw = new
        if last == H:
            pixel = (n * X_H + X_H - 1) * X_W + STRIDE * w
            if STRIDE == 1:
                tl.store(
                    dx_ptr + pixel[:, None] * C + src[None, :],
                    _gather(upper, TILES, CHUNKS).to(DTYPE), mask=own[:, None] & src_ok[None, :],
                )  # fmt: skip
            elif X_H % 2 == 0:
                tl.store(
                    dx_ptr + pixel[:, None] * C + src[None, :],
                    _gather(upper, TILES, CHUNKS).to(DTYPE),
                    mask=even_ok[:, None] & src_ok[None, :],
                )  # fmt: skip
                tl.store(
                    dx_ptr + (pixel + 1)[:, None] * C + src[None, :],
                    _gather(upper_odd, TILES, CHUNKS).to(DTYPE),
                    mask=odd_ok[:, None] & src_ok[None, :],
                )  # fmt: skip
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * 9 * K * DIN + k * DIN + i % DIN
    odd = none
    for tap in tl.static_range(9):
        odd += dw[tap] * 0.0
    if tl.max((odd != 0.0).to(tl.int32)) == 0:
        for tap in tl.static_range(9):
            tl.store(partial + tap * K * DIN, dw[tap], mask=weight_ok)
    else:
        # a dz that is not finite reached its neighbours, or an x: one tap, one group at a time
        tl.debug_barrier()  # what follows is written over what was written above
        for s in range(begin, end):
            column = s * USED - HALO + position
            own = (column < N * W) & (position >= HALO) & (position < HALO + USED)
            n = (column // W).to(tl.int64)
            w = column % W
            for row in range(STRIDE * first, tl.minimum(STRIDE * last, X_H)):
                for phase in range(STRIDE):
                    ok = own & (STRIDE * w + phase < X_W)
                    dx = _conv(
                        dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr, w_ptr,
                        H, W, K, K, stride_k, stride_d, stride_tap, STRIDE, 1,
                        tile, 0, n, row + tl.zeros_like(w), STRIDE * w + phase, ok,
                        row % STRIDE, phase,
                        DIN, DOUT, PACK, WIDTH, WIDTH, TILES, BLOCK_P, True, STRIDE > 1,
                        PRECISION, True,
                    )  # fmt: skip
                    tl.store(
                        dx_ptr + ((n * X_H + row) * X_W + STRIDE * w + phase)[:, None] * C
                        + src[None, :],
                        _join(dx).to(DTYPE), mask=ok[:, None] & src_ok[None, :],
                    )  # fmt: skip
        for each in range(9):
            acc = none
            for s in range(begin, end):
                column = s * USED - HALO + position
                own = (column < N * W) & (position >= HALO) & (position < HALO + USED)
                n = (column // W).to(tl.int64)
                w = column % W
                for row in range(STRIDE * first, tl.minimum(STRIDE * last, X_H)):
                    for phase in range(STRIDE):
                        h_up = row + 1 - each // 3
                        w_up = STRIDE * w + phase + 1 - each % 3
                        if (h_up % STRIDE == 0) & ((phase + 1 - each % 3) % STRIDE == 0):
                            ok = own & (STRIDE * w + phase < X_W)
                            x = _load_source(
                                x_ptr, None, None, in_scale_ptr, in_shift_ptr, None, None, None,
                                ((n * X_H + row) * X_W + STRIDE * w + phase)[:, None] * C
                                + src[None, :],
                                ok[:, None] & src_ok[None, :], src, src_ok,
                            )  # fmt: skip
                            ok &= (w_up >= 0) & (w_up // STRIDE < W)
                            ok &= (h_up >= 0) & (h_up // STRIDE < H)
                            pixel = (n * H + h_up // STRIDE) * W + w_up // STRIDE
                            dz = _load_source(
                                dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr,
                                pixel[:, None] * K + out[None, :],
                                ok[:, None] & out_ok[None, :], out, out_ok,
                            )  # fmt: skip
                            acc = tl.dot(
                                _spread(dz, TILES, CHUNKS, True),
                                _turn(_spread(x, TILES, CHUNKS, False)), acc,
                            )  # fmt: skip
            tl.store(partial + each * K * DIN, acc, mask=weight_ok)


# Kernels: a channel's sums, and what is done to each pixel -------------------------------------


@_jit
def _rows_and_channels(C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.arange(0, BLOCK_M), channel, channel < C


@_jit
def _block(M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's (BLOCK_M, BLOCK_C) part of the matrix: offsets, which exist, and its channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = channel < C
    return (
        m.to(tl.int64)[:, None] * C + channel[None, :],
        (m < M)[:, None] & ok[None, :],
        channel,
        ok,
    )


@_jit
def _batch_stats_kernel(
    z_ptr, partial_ptr, M, C, blocks, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Partial statistics of `blocks` blocks. Programs: (C / BLOCK_C, splits)."""
    row, channel, ok = _rows_and_channels(C, BLOCK_M, BLOCK_C)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    pivot = tl.zeros((BLOCK_C,), tl.float32)
    begin = tl.program_id(1) * blocks
    for block in range(begin, tl.minimum(begin + blocks, tl.cdiv(M, BLOCK_M))):
        m = block * BLOCK_M + row
        mask = (m < M)[:, None] & ok[None, :]
        z = tl.load(z_ptr + m.to(tl.int64)[:, None] * C + channel[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        if block == begin:
            pivot = _pivot(z, m < M)
        z -= pivot[None, :]
        count += (m < M).to(tl.float32)
        off = tl.where(mask, z - mean, 0.0)
        mean += off / tl.maximum(count, 1.0)[:, None]
        m2 += tl.where(mask, off * (z - mean), 0.0)
    _store_statistics(
        partial_ptr, tl.program_id(1), C, pivot, mean, m2, count > 0, count, channel, ok
    )


@_jit
def _store_vectors(
    gamma_ptr, beta_ptr, mean, var, eps, unbias, statistics_ptr, affine_ptr, C, channel, ok
):
    """statistics (3, C), if there is room for them: mean, unbias * var, rstd; affine (2, C)."""
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if gamma_ptr is not None:
        scale = _load(gamma_ptr, channel, ok) * rstd
    shift = -mean * scale
    if beta_ptr is not None:
        shift += _load(beta_ptr, channel, ok)
    tl.store(affine_ptr + channel, scale, mask=ok)
    tl.store(affine_ptr + C + channel, shift, mask=ok)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + channel, mean, mask=ok)
        tl.store(statistics_ptr + C + channel, unbias * var, mask=ok)
        tl.store(statistics_ptr + 2 * C + channel, rstd, mask=ok)


@_jit
def _merge_statistics_kernel(
    partial_ptr, gamma_ptr, beta_ptr, vectors_ptr, eps, splits, C,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """vectors (5, C) from the partial statistics. Programs: (C / BLOCK_C,)."""
    row, channel, ok = _rows_and_channels(C, BLOCK_S, BLOCK_C)
    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)  # relative to the mean of the pivots
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    pivot = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + row
        mask = (s < splits)[:, None] & ok[None, :]
        partial = partial_ptr + s.to(tl.int64)[:, None] * 4 * C + channel[None, :]
        n = tl.load(partial, mask=mask, other=0.0)
        pivot += tl.sum(n * tl.load(partial + C, mask=mask, other=0.0), 0)
        total += tl.sum(n, 0)
    pivot /= tl.maximum(total, 1.0)
    for first in range(0, splits, BLOCK_S):
        s = first + row
        mask = (s < splits)[:, None] & ok[None, :]
        partial = partial_ptr + s.to(tl.int64)[:, None] * 4 * C + channel[None, :]
        n = tl.load(partial, mask=mask, other=0.0)
        means = tl.load(partial + C, mask=mask, other=0.0) - pivot[None, :]
        means += tl.load(partial + 2 * C, mask=mask, other=0.0)
        m2s = tl.load(partial + 3 * C, mask=mask, other=0.0)
        means = tl.where(mask, means, 0.0)
        added = tl.sum(n, 0)
        theirs = tl.sum(n * means, 0) / tl.maximum(added, 1.0)
        off = means - theirs[None, :]
        both = tl.maximum(count + added, 1.0)
        apart = theirs - mean
        m2 += tl.sum(m2s + n * off * off, 0) + apart * apart * (count * added / both)
        mean += apart * (added / both)
        count += added
    var = m2 / tl.maximum(count, 1.0)
    unbias = count / tl.maximum(count - 1.0, 1.0)
    _store_vectors(
        gamma_ptr, beta_ptr, pivot + mean, var, eps, unbias,
        vectors_ptr, vectors_ptr + 3 * C, C, channel, ok,
    )  # fmt: skip


@_jit
def _bn_relu_backward_kernel(
    dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, partial_ptr, M, C, blocks,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums of g and g*xhat over `blocks` blocks. Programs: (C / BLOCK_C, splits)."""
    row, channel, ok = _rows_and_channels(C, BLOCK_M, BLOCK_C)
    mean, rstd = _vector(mean_ptr, channel, ok), _vector(rstd_ptr, channel, ok)
    if scale_ptr is not None:
        scale, shift = _vector(scale_ptr, channel, ok), _vector(shift_ptr, channel, ok)
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_g_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    begin = tl.program_id(1) * blocks
    for block in range(begin, tl.minimum(begin + blocks, tl.cdiv(M, BLOCK_M))):
        m = block * BLOCK_M + row
        mask = (m < M)[:, None] & ok[None, :]
        offset = m.to(tl.int64)[:, None] * C + channel[None, :]
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            g = _relu_gradient(g, tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32))
        elif scale_ptr is not None:
            g = _relu_gradient(g, z * scale + shift)
        sum_g += g
        sum_g_xhat += tl.where(mask, g * ((z - mean) * rstd), 0.0)
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * C + channel
    tl.store(partial, tl.sum(sum_g, 0), mask=ok)
    tl.store(partial + C, tl.sum(sum_g_xhat, 0), mask=ok)


@_jit
def _add_sums_kernel(
    partial_ptr, vectors_ptr, sum_g_ptr, sum_g_xhat_ptr, coefficients_ptr, count, splits, C,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (splits, 2, C) -> sum_g, sum_g_xhat, and b and c of dz = scale*g + b*z + c.

    Programs: (C / BLOCK_C,).
    """
    row, channel, ok = _rows_and_channels(C, BLOCK_S, BLOCK_C)
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_g_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + row
        mask = (s < splits)[:, None] & ok[None, :]
        partial = partial_ptr + s.to(tl.int64)[:, None] * 2 * C + channel[None, :]
        sum_g += tl.sum(tl.load(partial, mask=mask, other=0.0), 0)
        sum_g_xhat += tl.sum(tl.load(partial + C, mask=mask, other=0.0), 0)
    of_mean = -_load(vectors_ptr + 3 * C, channel, ok) / count
    b = of_mean * _load(vectors_ptr + 2 * C, channel, ok) * sum_g_xhat
    c = of_mean * sum_g - b * _load(vectors_ptr, channel, ok)
    tl.store(sum_g_ptr + channel, sum_g, mask=ok)
    tl.store(sum_g_xhat_ptr + channel, sum_g_xhat, mask=ok)
    tl.store(coefficients_ptr + channel, b, mask=ok)
    tl.store(coefficients_ptr + C + channel, c, mask=ok)


@_jit
def _sum_kernel(partial_ptr, out_ptr, splits, M, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """out[m, tap] = sum over s of partial[s, tap, m]. Programs: (M * TAPS / BLOCK,)."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = e < M * TAPS
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        total += tl.load(partial_ptr + tl.cast(s, tl.int64) * M * TAPS + e, mask=ok, other=0.0)
    tl.store(out_ptr + e % M * TAPS + e // M, total.to(out_ptr.dtype.element_ty), mask=ok)


@_jit
def _normalize_relu_kernel(
    z_ptr, scale_ptr, shift_ptr, residual_ptr, res_scale_ptr, res_shift_ptr, y_ptr, M, C,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Programs: (M / BLOCK_M * C / BLOCK_C,)."""
    offset, mask, channel, ok = _block(M, C, BLOCK_M, BLOCK_C)
    y = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = y * _vector(scale_ptr, channel, ok) + _vector(shift_ptr, channel, ok)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if res_scale_ptr is not None:
            r = r * _vector(res_scale_ptr, channel, ok) + _vector(res_shift_ptr, channel, ok)
        y += r
    tl.store(y_ptr + offset, _relu(y).to(y_ptr.dtype.element_ty), mask=mask)


@_jit
def _input_gradient_kernel(
    dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr, dz_ptr, M, C,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Programs: (M / BLOCK_M * C / BLOCK_C,)."""
    offset, mask, channel, ok = _block(M, C, BLOCK_M, BLOCK_C)
    dz = _load_source(
        dy_ptr, z_ptr, y_ptr, scale_ptr, shift_ptr, a_ptr, b_ptr, c_ptr, offset, mask, channel, ok
    )
    tl.store(dz_ptr + offset, dz, mask=mask)


@_jit
def _bn_vectors_kernel(
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, statistics_ptr, affine_ptr, eps, unbias, C,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """statistics (3, C): mean, unbias * var, rstd; affine (2, C). Programs: (C / BLOCK,)."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = channel < C
    mean, var = _load(mean_ptr, channel, ok), _load(var_ptr, channel, ok)
    _store_vectors(
        gamma_ptr, beta_ptr, mean, var, eps, unbias, statistics_ptr, affine_ptr, C, channel, ok
    )


# Launchers -----------------------------------------------------------------------------------

# Programs that a reduction over pixels is cut into: about four for each multiprocessor of the
# largest GPUs. Not asked of the device, so that the same sums come out on every one.
_PROGRAMS = 528

# Programs along the second axis of a grid in CUDA, and along the third; the first has 2^31 - 1.
_MOST_SECOND = 65535


def _launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **meta: Any
) -> None:
    """kernel[grid](*args), on the device of the first tensor and its current stream."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[grid](*args, num_warps=warps, num_stages=stages, **meta)


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies; it matters to float32 alone."""
    tf32 = torch.version.hip is None and torch.backends.cudnn.allow_tf32
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def _strided(weight: Tensor, transposed: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """The weight, and its strides for k, d and the tap.

    From 8 channels a group on they are read in rows of the destination's channels: one copy first,
    (3, 3, D, K), for dx (3, 3, K, D). Narrower ones are gathered as they are, once a program.
    """
    k, d, _, _ = weight.shape
    if d < 8:
        return weight, (weight.stride(0), weight.stride(1), weight.stride(3))
    if transposed:
        return weight.permute(2, 3, 0, 1).contiguous(), (d, 1, k * d)
    return weight.permute(2, 3, 1, 0).contiguous(), (1, k, k * d)


def _split_blocks(blocks: int, programs: int) -> tuple[int, int]:
    """(splits, blocks in each) for about _PROGRAMS programs, of which `programs` are given."""
    each = max(1, triton.cdiv(blocks * programs, _PROGRAMS))
    return triton.cdiv(blocks, each), each


def _vectors(z: Tensor, rows: int) -> Tensor:
    """(rows, C) for z."""
    return torch.empty((rows, z.shape[1]), dtype=torch.float32, device=z.device)


def _convolve(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    gradient: tuple[Tensor | None, ...],
    epilogue: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    stats: bool = False,
    transposed: bool = False,
    dz: Tensor | None = None,
    stride: int,
    groups: int,
    dilation: int,
    config: Config | None = None,
) -> Tensor | None:
    """Write the convolution of x, or of dz for dx, to `out`; returns partial statistics.

    gradient: z, y, scale, shift, a, b, c of `_load_source`, z for `_conv_rows_kernel` only. dz:
    where dx leaves it for dweight. config: None for the table's choice, or the one tuned.
    """
    k, din = weight.shape[:2]
    dout = k // groups
    n, dst_c, h, w = out.shape
    _, src_c, src_h, src_w = x.shape
    src_d, dst_d = (dout, din) if transposed else (din, dout)
    z, y, scale, shift, a, b, c = gradient
    if config is None:
        arch = _arch(x.device)
        walk = _walk(out, stride, dilation, transposed)
        source = "dz" if z is not None else ("x" if scale is None else "activation")
        config = _conv_config(src_d, dst_d, groups, h, walk, x.dtype, source, arch)
        if tuning.enabled(x.device):
            arguments: dict[str, Any] = {
                "gradient": gradient,
                "epilogue": epilogue,
                "stats": stats,
                "transposed": transposed,
                "dz": dz,
                "stride": stride,
                "groups": groups,
                "dilation": dilation,
            }
            kernel = _conv_rows_kernel if config.rows else _conv_kernel
            if config.shifts:
                kernel = _conv_shift_kernel
            config = tuning.choose(
                [config, *_alternatives(config, h, x.dtype, arch)],
                lambda other: _convolve(x, weight, out, **arguments, config=other),
                device=x.device,
                source=kernel.cache_key,
                problem=_described(x, weight, out, **arguments),
            )
    weight, strides = _strided(weight, transposed)
    tiles = triton.cdiv(triton.cdiv(groups, config.pack), config.tiles)
    meta: dict[str, Any] = {
        "DIN": din,
        "DOUT": dout,
        "PACK": config.pack,
        "SRC": config.src_width,
        "DST": config.dst_width,
        "TILES": config.tiles,
        "BLOCK_P": config.block_p,
        "TRANSPOSED": transposed,
        "PRECISION": _precision(x.dtype),
        "warps": config.warps,
        "stages": config.stages,
    }
    partial = None
    if config.rows:
        columns = config.block_p
        if config.shifts:
            columns -= 2 if stride == 1 else 1
        grid = (tiles, triton.cdiv(n * w, columns), triton.cdiv(h, config.rows))
        parts = grid[1] * grid[2]
    else:
        phases = stride if transposed else 1
        pixels = n * triton.cdiv(h, phases) * triton.cdiv(w, phases)
        chunks = triton.cdiv(config.pack * dst_d, config.dst_width)
        parts = triton.cdiv(pixels, config.block_p)
        flat = parts > _MOST_SECOND
        grid = (tiles * chunks, parts, phases * phases)
        if flat:
            grid = (tiles * chunks * parts, 1, phases * phases)
    if stats:
        partial = x.new_empty((parts, 4, dst_c), dtype=torch.float32)
    if config.shifts:
        assert z is None
        tensors = (x, scale, shift, weight, *epilogue, out, partial)
        sizes: tuple[int, ...] = (n, src_h, src_w, h, w, src_c, dst_c, k, config.rows, *strides)
        _launch(_conv_shift_kernel, grid, *tensors, *sizes, STRIDE=stride, **meta)
    elif config.rows:
        tensors = (x, z, y, scale, shift, a, b, c, weight, *epilogue, out, partial, dz)
        sizes = (n, h, w, src_c, dst_c, k, config.rows)
        _launch(_conv_rows_kernel, grid, *tensors, *sizes, *strides, UNROLL=config.unroll, **meta)
    else:
        assert z is None
        tensors = (x, scale, shift, weight, *epilogue, out, partial)
        sizes = (n, src_h, src_w, h, w, src_c, dst_c, k, *strides, stride, dilation)
        meta |= {"DST_CHUNKS": chunks, "PHASES": phases, "FLAT": flat}
        _launch(_conv_kernel, grid, *tensors, *sizes, **meta)
    return partial


def _described(*tensors: Tensor, **arguments: Any) -> dict[str, Any]:
    """Plain values for all that the time of a call depends on."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), *value.shape, *value.stride()]
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    described = {name: plain(value) for name, value in arguments.items()}
    return described | {"tensors": plain(tensors), "precision": _precision(tensors[0].dtype)}


def _walk(out: Tensor, stride: int, dilation: int, transposed: bool) -> int:
    """Of `_conv_config`. The rows that dx of a stride reads are not one below the other.

    Columns, 14 or more, are the second axis of those kernels' grids.
    """
    below = dilation == 1 and (stride == 1 or not transposed)
    columns = triton.cdiv(out.shape[0] * out.shape[3], 14)
    return stride if below and columns <= _MOST_SECOND else 0


def _walks_rows(x: Tensor, weight: Tensor, stride: int, groups: int, dilation: int) -> bool:
    """Whether dx is `_conv_rows_kernel`'s."""
    k, din = weight.shape[:2]
    walk = _walk(x, stride, dilation, True)
    arch = _arch(x.device)
    config = _conv_config(k // groups, din, groups, x.shape[2], walk, x.dtype, "dz", arch)
    return config.rows > 0


def _is_dense(weight: Tensor, groups: int) -> bool:
    """Whether torch's own convolution is the faster one.

    It is for one group, and in half precision for wide ones: on an H200, 28x28, 256 channels in 2
    groups, 83 us with BatchNorm and ReLU against 238.
    """
    wide = weight.dtype != torch.float32 and max(weight.shape[1], weight.shape[0] // groups) > 64
    return groups == 1 or wide


def _dense_conv(x: Tensor, weight: Tensor, prologue: Affine | None, conv: dict[str, Any]) -> Tensor:
    """z by torch's own convolution."""
    if prologue is not None:
        x = normalize_relu(x, *prologue)
    return reference.conv_stats(x, weight, **conv)[0]


def _source(prologue: Affine | None) -> tuple[Tensor | None, ...]:
    scale, shift = (None, None) if prologue is None else prologue
    return None, None, scale, shift, None, None, None


def _out(x: Tensor, k: int, stride: int) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _blocks(z: Tensor) -> tuple[int, int, dict[str, int]]:
    """M, C and the blocks of a kernel over the (M, C) matrix of pixels and channels."""
    n, c, h, w = z.shape
    block_c = min(128, _pow2(c, 1))
    # few channels: the columns of a thread are many, and their statistics spill
    return n * h * w, c, {"BLOCK_M": min(4096 // block_c, 128), "BLOCK_C": block_c}


def _of_parts(kernel: Any, partial: Tensor, *args: Any) -> None:
    """Launch a second stage over the partial results (splits, ., C)."""
    splits, _, c = partial.shape
    # about 64 programs, so that it takes little time; 8 channels are a sector
    block_c = max(8, _pow2(triton.cdiv(c, 64), 1))
    block_s = max(16, min(_pow2(splits, 1), 2048 // block_c))
    grid = (triton.cdiv(c, block_c),)
    sizes = {"BLOCK_S": block_s, "BLOCK_C": block_c}
    _launch(kernel, grid, partial, *args, splits, c, **sizes, warps=4, stages=1)


def _merged(partial: Tensor, bn: TrainingBatchNorm, z: Tensor) -> Tensor:
    """The vectors of z from its partial statistics."""
    gamma, beta, eps = dense_training_batch_norm(bn)
    vectors = _vectors(z, 5)
    _of_parts(_merge_statistics_kernel, partial, gamma, beta, vectors, float(eps))
    return vectors


def conv_affine_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    prologue: Affine | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> Tensor:
    """y = relu(scale * conv(x) + shift [+ residual])."""
    conv: dict[str, Any] = {"stride": stride, "groups": groups, "dilation": dilation}
    if _is_dense(weight, groups):
        return normalize_relu(
            _dense_conv(x, weight, prologue, conv), scale, shift, residual=residual
        )
    y = _out(x, weight.shape[0], stride)
    _convolve(x, weight, y, gradient=_source(prologue), epilogue=(scale, shift, residual), **conv)
    return y


_CHANNELS = 256  # of a program that makes vectors


def _made_vectors(
    bn: BatchNorm, statistics: Tensor | None, affine: Tensor, unbias: float = 1.0
) -> None:
    *vectors, eps = dense_batch_norm(bn)
    channels = affine.shape[1]
    _launch(
        _bn_vectors_kernel,
        (triton.cdiv(channels, _CHANNELS),),
        *(*vectors, statistics, affine, float(eps), float(unbias), channels),
        BLOCK=_CHANNELS,
        warps=4,
        stages=1,
    )


def bn_affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Affine:
    """scale = gamma / sqrt(var + eps), shift = beta - mean * scale."""
    affine = mean.new_empty((2, mean.shape[0]))
    _made_vectors((gamma, beta, mean, var, eps), None, affine)
    return affine[0], affine[1]


def bn_vectors(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float, unbias: float
) -> Tensor:
    """(5, C): mean, unbias * var, rstd, scale, shift."""
    vectors = mean.new_empty((5, mean.shape[0]))
    _made_vectors((gamma, beta, mean, var, eps), vectors[:3], vectors[3:], unbias)
    return vectors


conv_bn_relu = reference.with_batch_norms(conv_affine_relu, bn_affine)


def conv_stats(
    x: Tensor,
    weight: Tensor,
    *,
    bn: TrainingBatchNorm | None = None,
    prologue: Affine | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """z = conv(x), and with a BatchNorm the vectors of z's statistics."""
    conv: dict[str, Any] = {"stride": stride, "groups": groups, "dilation": dilation}
    if _is_dense(weight, groups):
        z = _dense_conv(x, weight, prologue, conv)
        return z, None if bn is None else batch_stats(z, bn)
    z = _out(x, weight.shape[0], stride)
    stats = bn is not None
    partial = _convolve(x, weight, z, gradient=_source(prologue), stats=stats, **conv)
    return z, None if bn is None or partial is None else _merged(partial, bn, z)


def batch_stats(z: Tensor, bn: TrainingBatchNorm) -> Tensor:
    """The vectors of the mean and variance of every channel over N, H and W."""
    m, c, meta = _blocks(z)
    channels = triton.cdiv(c, meta["BLOCK_C"])
    splits, each = _split_blocks(triton.cdiv(m, meta["BLOCK_M"]), channels)
    partial = z.new_empty((splits, 4, c), dtype=torch.float32)
    _launch(
        _batch_stats_kernel, (channels, splits), z, partial, m, c, each, warps=4, stages=2, **meta
    )
    return _merged(partial, bn, z)


def normalize_relu(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
) -> Tensor:
    """y = relu(scale * z + shift [+ residual | + rs * residual + rh]), residual_affine=(rs, rh)."""
    y = torch.empty_like(z, memory_format=torch.channels_last)
    m, c, meta = _blocks(z)
    grid = (triton.cdiv(c, meta["BLOCK_C"]) * triton.cdiv(m, meta["BLOCK_M"]),)
    affine = residual_affine or (None, None)
    tensors = (z, scale, shift, residual, *affine, y)
    _launch(_normalize_relu_kernel, grid, *tensors, m, c, warps=4, stages=1, **meta)
    return y


def _mask(vectors: Tensor, relu: bool) -> Affine | tuple[None, None]:
    """scale and shift; without a ReLU neither."""
    return (vectors[3], vectors[4]) if relu else (None, None)


def _gradient(
    z: Tensor, vectors: Tensor, coefficients: Tensor | None, y: Tensor | None, relu: bool
) -> tuple[Tensor | None, ...]:
    """z, y, scale, shift, a, b, c of `_load_source`."""
    b, c = (None, None) if coefficients is None else (coefficients[0], coefficients[1])
    return z, y, *_mask(vectors, relu), vectors[3], b, c


def bn_relu_backward(
    dy: Tensor, z: Tensor, vectors: Tensor, *, y: Tensor | None = None, relu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(g), sum(g * (z - mean) * rstd), and (2, C): b and c of dz = scale*g + b*z + c."""
    m, c, meta = _blocks(z)
    channels = triton.cdiv(c, meta["BLOCK_C"])
    splits, each = _split_blocks(triton.cdiv(m, meta["BLOCK_M"]), channels)
    partial = z.new_empty((splits, 2, c), dtype=torch.float32)
    tensors = (dy, z, y, *_mask(vectors, relu), vectors[0], vectors[2], partial)
    _launch(
        _bn_relu_backward_kernel,
        (channels, splits),
        *tensors,
        m,
        c,
        each,
        warps=4,
        stages=2,
        **meta,
    )
    sum_g, sum_g_xhat = torch.empty_like(vectors[0]), torch.empty_like(vectors[0])
    coefficients = _vectors(z, 2)
    sums = (sum_g, sum_g_xhat, coefficients)
    _of_parts(_add_sums_kernel, partial, vectors, *sums, float(max(m, 1)))
    return sums


def _sum(partial: Tensor, dweight: Tensor) -> None:
    """dweight = the sum of partial (splits, 9, K, D) over its first dimension, taps last."""
    grid = (triton.cdiv(dweight.numel(), 256),)
    args = (partial, dweight, partial.shape[0], dweight.numel() // 9)
    _launch(_sum_kernel, grid, *args, TAPS=9, BLOCK=256, warps=4, stages=1)


def bn_relu_input_gradient(
    dy: Tensor,
    z: Tensor,
    vectors: Tensor,
    coefficients: Tensor | None,
    *,
    y: Tensor | None = None,
    relu: bool = True,
    inplace: bool = False,
) -> Tensor:
    """dz = scale*g [+ b*z + c]; with inplace, in dy's memory."""
    dz = dy if inplace else torch.empty_like(z, memory_format=torch.channels_last)
    m, channels, meta = _blocks(z)
    grid = (triton.cdiv(channels, meta["BLOCK_C"]) * triton.cdiv(m, meta["BLOCK_M"]),)
    tensors = (dy, *_gradient(z, vectors, coefficients, y, relu), dz)
    _launch(_input_gradient_kernel, grid, *tensors, m, channels, warps=4, stages=1, **meta)
    return dz


def _dweight(
    dy: Tensor,
    gradient: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor,
    prologue: Affine | None,
    stride: int,
    groups: int,
    dilation: int,
) -> Tensor:
    """dweight; gradient: z, y, scale, shift, a, b, c of `_load_source`."""
    k, din = weight.shape[:2]
    dout = k // groups
    n, _, h, w = dy.shape
    _, c, x_h, x_w = x.shape
    arch = _arch(x.device)
    config = _conv_config(din, dout, groups, h, 0, x.dtype, "dz", arch)
    src, dst = config.src_width, min(config.dst_width, 32)
    src_chunks = triton.cdiv(config.pack * din, src)
    dst_chunks = triton.cdiv(config.pack * dout, dst)
    half = x.dtype.itemsize == 2
    # 32-wide products are shared by four warps: the sums of 4*32 columns fill their registers
    block_p, width = (32, config.tiles) if max(src, dst) <= 16 else (64 if half else 32, 1)
    if width > 1 and config.pack * max(din, dout) % 8:
        block_p = 16  # channels are loaded one at a time, by as many addresses
        if isinstance(arch, str):
            width = 1  # each with a mask
    if isinstance(arch, str):
        block_p = max(block_p // 2, 16)  # the masks of 64 lanes fill the scalar registers
    elif width > 1 and (arch >= 100 or _precision(x.dtype) == "ieee"):
        if not half or config.pack > 4:
            block_p = 16  # 32 take more registers than leave room for two programs, or spill
    tiles = triton.cdiv(triton.cdiv(groups, config.pack), width)
    chunks = 3 * src_chunks * dst_chunks
    columns = triton.cdiv(n * w, block_p)
    splits, rows = _split_blocks(h, tiles * chunks * columns)
    partial = x.new_empty((columns * splits, 9, k, din), dtype=torch.float32)
    in_scale, in_shift = (None, None) if prologue is None else prologue
    _launch(
        _dweight_kernel,
        (columns * splits * chunks, tiles),
        *(dy, *gradient, x, in_scale, in_shift, partial),
        *(n, x_h, x_w, h, w, c, k, rows, splits, stride, dilation),
        DIN=din,
        DOUT=dout,
        PACK=config.pack,
        SRC=src,
        DST=dst,
        SRC_CHUNKS=src_chunks,
        DST_CHUNKS=dst_chunks,
        TILES=width,
        BLOCK_P=block_p,
        PRECISION=_precision(x.dtype),
        warps=width if width > 1 else 4,
        stages=2 if gradient[0] is None and prologue is None else 1,
    )
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _sum(partial, dweight)
    return in_format_of(weight, dweight)


# Programs of `_conv_backward_kernel`. Each writes partial sums of dweight, which are read once:
# at most _PARTIAL_SHARE of the bytes of the backward pass, unless that leaves multiprocessors of
# an A100 without a program. Its registers let a multiprocessor hold two.
_PARTIAL_SHARE = 0.125
_FEWEST_PROGRAMS = 108
_MOST_PROGRAMS = 264


def _fuses(weight: Tensor, stride: int, groups: int, dilation: int) -> bool:
    """Whether `_conv_backward_kernel` makes dx and dweight.

    Its programs keep so much that more would spill: the addresses of padded tiles, those of
    channels loaded one at a time, a single warp's of stride 2, and on AMD the masks of 64 lanes,
    which are in the scalar registers.
    """
    k, din = weight.shape[:2]
    if isinstance(_arch(weight.device), str):
        return False
    fills_tiles = k // groups == din and din in (2, 4, 8, 16, 32) and k % 32 == 0
    return weight.dtype.itemsize == 2 and fills_tiles and stride <= 2 and dilation == 1


def _dx_dweight(
    dy: Tensor,
    gradient: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor,
    prologue: Affine | None,
    stride: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """dx and dweight; gradient: z, y, scale, shift, a, b, c of `_load_source`."""
    k, din = weight.shape[:2]
    dout = k // groups
    n, _, h, w = dy.shape
    _, c, x_h, x_w = x.shape
    pack = max(1, 16 // max(din, dout))
    chunks = 1 if max(din, dout) <= 16 else 2
    tiles = 1 if chunks == 2 else min(4, _pow2(triton.cdiv(groups, pack), 1))
    block_p = 16
    programs = triton.cdiv(triton.cdiv(groups, pack), tiles)
    sets = triton.cdiv(n * w, block_p - 2)
    # parts of the pixels, each with its own partial sums, which are written and read once
    affordable = _PARTIAL_SHARE * (4 * dy.numel() + 2 * x.numel()) * x.itemsize / (72 * k * din)
    most, fewest = _MOST_PROGRAMS // programs, _FEWEST_PROGRAMS // programs
    parts = max(min(int(affordable), most), fewest, 1)
    walk = max(1, triton.cdiv(sets, parts))
    splits = max(1, min(parts // max(sets, 1), h // 7))
    rows = triton.cdiv(h, splits)
    splits = triton.cdiv(h, rows)
    parts = triton.cdiv(sets, walk) * splits
    partial = x.new_empty((parts, 9, k, din), dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    in_scale, in_shift = (None, None) if prologue is None else prologue
    kernel_weight, strides = _strided(weight, True)
    _launch(
        _conv_backward_kernel,
        (programs, parts),
        *(dy, *gradient, x, in_scale, in_shift, kernel_weight, dx, partial),
        *(n, x_h, x_w, h, w, c, k, rows, splits, walk, *strides),
        DIN=din,
        DOUT=dout,
        PACK=pack,
        TILES=tiles,
        CHUNKS=chunks,
        BLOCK_P=block_p,
        STRIDE=stride,
        PRECISION=_precision(x.dtype),
        warps=tiles * chunks * chunks,
        stages=1,
    )
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _sum(partial, dweight)
    return dx, in_format_of(weight, dweight)


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    bn: BNGradient | None = None,
    y: Tensor | None = None,
    relu: bool = True,
    prologue: Affine | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the convolution's input and weight, None where not needed."""
    conv: dict[str, Any] = {"stride": stride, "groups": groups, "dilation": dilation}
    if _is_dense(weight, groups):
        dz = dy if bn is None else bn_relu_input_gradient(dy, *bn, y=y, relu=relu)
        if prologue is not None and need_dweight:
            x = normalize_relu(x, *prologue)
        needs: dict[str, Any] = {"need_dx": need_dx, "need_dweight": need_dweight}
        return reference.conv_backward(dz, x, weight, **conv, **needs)
    gradient: tuple[Tensor | None, ...] = (None,) * 7
    dx = dweight = dz = None
    if need_dx and need_dweight and _fuses(weight, **conv):
        if bn is not None:
            gradient = _gradient(*bn, y, relu)
        return _dx_dweight(dy, gradient, x, weight, prologue, stride, groups)
    if bn is not None:
        if not need_dx or _walks_rows(x, weight, **conv):
            gradient = _gradient(*bn, y, relu)
            if need_dx and need_dweight:
                # as many bytes as to read dy and z again, and nothing to compute at that load
                dz = torch.empty_like(dy, memory_format=torch.channels_last)
        else:
            # `_conv_kernel` would make each dz up to nine times
            dy = bn_relu_input_gradient(dy, *bn, y=y, relu=relu)
    if need_dx:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        _convolve(dy, weight, dx, gradient=gradient, transposed=True, dz=dz, **conv)
        if dz is not None:
            dy, gradient = dz, (None,) * 7
    if need_dweight:
        dweight = _dweight(dy, gradient, x, weight, prologue, **conv)
    return dx, dweight


# The dense convolution is cuDNN's.
conv1x1, conv1x1_stats, conv1x1_affine_relu, conv1x1_backward = reference.with_torch_convolution(
    normalize_relu, batch_stats
)
bn_residual_relu_backward = partial(reference.bn_residual_relu_backward, sums=bn_relu_backward)
