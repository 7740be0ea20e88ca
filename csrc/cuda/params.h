// What the CUDA kernels take: plain structs, filled by plan.cpp on the host and passed by value.
#pragma once

#include <cstdint>

namespace resnext_kernels::cuda {

// How the nine taps connect input pixels to output pixels.
//   s1: stride 1, forward, and its gradient for the input (weights flipped)
//   s2: stride 2, forward
//   t2: stride 2, gradient for the input: one input pixel per 2x2 output pixels
enum class Geometry : int { s1, s2, t2 };

constexpr int kThreads = 256, kWarps = kThreads / 32;

enum class Pass : int { eval, forward, backward, dx, dweight };  // backward: dx and dweight from one reading of dz

// Blocks of a kernel that a multiprocessor holds, so that one computes while another waits: the compiler keeps to as
// many registers, and grids fill the device so.
namespace blocks_held {
constexpr int conv(int q, Pass pass) { return pass <= Pass::forward && q <= 2 ? 2 : 1; }
constexpr int normalize_relu = 3, bn_relu_dz = 2, bn_relu_sums = 3, moments = 3;
}  // namespace blocks_held

constexpr int kUnit = 8;  // pixels of one ldmatrix matrix
constexpr int kRing = 3;  // groups of input rows in shared memory: two in use, one in flight

// Q, the name of a kernel's variant: input chunks (of 8 channels) that a pair of output chunks reads.
// 16-byte chunks of one pixel in shared memory; with Q == 4 a block has few channels and many images instead, so that
// the weights, and as many sums of their gradient, are fewer.
constexpr int kMostSlots = 8;
constexpr int slots(int q) { return q == 4 ? 4 : kMostSlots; }
constexpr int rows_per_group(Geometry g, int q) {  // input rows loaded per step
  return g == Geometry::t2 ? 1 : q == 4 ? 4 : 2;
}
constexpr int in_stride(Geometry g) { return g == Geometry::s2 ? 2 : 1; }   // input columns per position
constexpr int out_stride(Geometry g) { return g == Geometry::t2 ? 2 : 1; }  // output columns per position
constexpr int rows_per_step(Geometry g, int q) {                            // output rows made per step
  return rows_per_group(g, q) * out_stride(g) / in_stride(g);
}
constexpr int kMostUnits = 8;  // of kUnit positions in a row of a block
// Input pixels of a row in shared memory, of one stream.
constexpr int pitch(Geometry g, int positions) { return positions * in_stride(g) + (g == Geometry::s1 ? 2 : 1); }
constexpr int most_in_pixels(Geometry g) { return kMostUnits * pitch(g, kUnit); }

// One convolution pass. `in` is what the convolution reads, `out` what it writes, `side` is read where `out` is
// written:
//             in                                  side                          out
//   eval      x or relu(in_scale * x + in_shift)  residual, or absent           y
//   forward   the same                            absent                        z
//   backward  dz, made of dy, z and vectors       x, for dweight (prologued     dx
//                                                 by side_scale, side_shift)
struct ConvParams {
  const void* in;
  const void* in_z;       // backward: z; null: dz = dy
  const void* in_y;       // backward: the mask is !(y <= 0) instead of !(in_scale * z + in_shift <= 0)
  const float* in_scale;  // null: no prologue
  const float* in_shift;
  const float* a;  // dz = a * g [+ b * z + c]
  const float* b;
  const float* c;
  const void* weight;  // (K, D, 3, 3), or (K, 3, 3, D) in memory
  const void* side;
  const float* side_scale;
  const float* side_shift;
  void* out;
  // eval: the BatchNorm of the output, gamma and beta null: 1 and 0; with var null they are scale and shift
  const float *gamma, *beta, *mean, *var;
  float eps;
  float* stats;            // forward: (parts, 4, C) count and Moments; null: none
  float* dweight_partial;  // backward: (parts, K, D, 9); null: dweight is written directly
  void* dweight;           // null: not needed, unless dweight_partial

  int32_t N, C, D;
  int32_t weight_in, weight_tap;  // elements from one input channel, one tap of the weight to the next
  int32_t in_h, in_w, out_h, out_w;
  int32_t block_chunks;             // chunks of a block's channels, the last block may have fewer
  int32_t slots;                    // chunks of a pixel that are filled in shared memory (zeros behind the block's own)
  int32_t band;                     // input chunks that a pair of output chunks reads: Q of the kernel
  int32_t positions, units;         // of a strip's row, and units of 8 of them: a pair is the 16 rows of one mma
  int32_t streams;                  // images side by side in one block
  int32_t strips, segments, walks;  // parts = strips * segments * walks, blockIdx.y counts them in that order
  int32_t walk;                     // groups of `streams` images that a block walks through
  int32_t steps, segment_steps;     // per image, per segment
  int32_t pitch;                    // input pixels per stream and row in shared memory
  int64_t in_row, in_image, out_row, out_image;  // bytes from one to the next in global memory
  int32_t in_pixels, out_pixels;                 // of one row in shared memory
  int32_t group_bytes, side_bytes;               // of a group of input rows, of the rows of a step
  // x / d == x * magic >> 31 for x * d < 2**31
  uint32_t in_magic, out_magic;  // of the image's width; zero if there are strips: they are of one stream
  uint32_t stream_magic, unit_magic, group_magic, row_magic, walk_magic, strip_magic;
  int32_t z_offset, y_offset, side_offset, out_offset;  // in shared memory; the ring starts at 0
};

constexpr int kMagicShift = 31;

// A pass over z as an (M, C) matrix; a block takes 64 channels and every `parts`-th run of 32 rows.
struct PointwiseParams {
  const void* dy;
  const void* z;
  const void* y;
  const void* residual;
  const float *scale, *shift;          // of z
  const float *res_scale, *res_shift;  // of the residual
  const float *a, *b, *c;              // dz = a * g [+ b * z + c]; without scale and y there is no ReLU: g = dy
  const float *mean, *rstd;
  void* out;
  float* partial;  // sums: (parts, 2, C), statistics: (parts, 4, C)
  int64_t M;
  int32_t C, parts;
  int32_t rows;  // of a thread, at most: some have one less
};

constexpr int kReduceColumns = 8;  // of a block of a second stage
constexpr int kReduceParts = 4;    // that a thread of one loads at once

// Second stages of reductions, in a fixed order.
struct AddDweightParams {
  const float* partial;  // (parts, K, D, 9)
  void* dweight;
  int64_t size;  // of dweight
  int32_t parts;
  int32_t D;  // of dweight in channels_last, (K, 3, 3, D); else 0
};
struct AddSumsParams {
  const float* partial;  // (parts, 2, C)
  const float* vectors;  // (5, C): mean, unbiased variance, rstd, scale, shift
  float *sum_g, *sum_g_xhat;
  float* coefficients;  // (2, C): b and c of dz = scale * g + b * z + c
  float count;
  int32_t C, parts;
};
struct FinishMomentsParams {
  const float* partial;       // (parts, 4, C) count and Moments
  const float *gamma, *beta;  // null: 1 and 0
  float* vectors;             // (5, C)
  float eps;
  int32_t C, parts;
};

// What is made of one BatchNorm.
struct BatchNormParams {
  const float *gamma, *beta;  // null: 1 and 0
  const float *mean, *var;
  float eps, unbias;
  float* statistics;  // (3, C): mean, unbias * var, rstd; null: not needed
  float* affine;      // (2, C): scale, shift
  int32_t C;
};

}  // namespace resnext_kernels::cuda
