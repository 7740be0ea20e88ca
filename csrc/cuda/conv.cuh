// The grouped 3x3 convolution on tensor cores, forward and backward, NHWC, float16 or bfloat16, float32 sums.
//
//   forward    out = conv(a), a = in or relu(in_scale * in + in_shift), zero outside the image; then either
//              y = relu(out_scale * out + out_shift [+ side]) or z = out with the moments of its channels
//   backward   dz = a * g [+ b * z + c], g = dy where the ReLU passed, else 0
//              dx = conv(dz) with the weights transposed and turned, dweight[tap] = sum dz shifted by tap * side
//
// A block takes up to 64 channels (whole groups) and walks down `streams` images side by side. Each step brings the
// next input rows into a ring in shared memory (16-byte cp.async, one step ahead), where the previous BatchNorm or
// the gradient of this one is applied in place by the thread that fetched them, and makes the next output rows from
// the three or four rows that are there: every input pixel enters shared memory once, halo rows are never read again.
//
//   ring (3 groups of rows) x (streams x pitch pixels) x 128 bytes (8 chunks of 8 channels)
//   chunk c of pixel p lies at 128 p + 16 (c ^ (p / stride & 7)): ldmatrix reads 8 neighbours without conflicts
//
// Forward and dx: 16 positions are the rows of one m16n8k16, taken by ldmatrix from pixels shifted by each tap; the
// weights of a pair of output chunks stay in registers for the whole walk. A pair reads `Q` input chunks: with Q > 1
// the 16 columns of a product are two chunks of one tap; with Q == 1 (4 or 8 channels per group, or 1 or 2) two taps
// of one chunk.
//
//   Q == 1, D == 4, columns of a:  [ tap 0: ch 0..7 | tap 1: ch 0..7 ]     rows of b, columns = 8 output channels:
//                                                  tap 0: [ w 0 ; 0 w ]    tap 1: [ w 0 ; 0 w ]
//
// dweight: the positions are the summed dimension, both operands come from the same memory by ldmatrix.trans:
// 16 output x 8 input channels of one tap with Q > 1, two taps x 8 output x 8 input channels with Q == 1.
//
// Warp w: output chunks 2 (w % 4) and the next; positions (forward, dx), or input chunks with Q >= 4 (dweight), are
// divided between w / 4 = 0 and 1. Statistics and dweight leave the block as partial results, one set per part, which
// pointwise.cu adds in a fixed order.
#pragma once

#include "mma.cuh"
#include "params.h"

namespace resnext_kernels::cuda {

enum class Pass { forward, backward, dx, dweight };  // backward: dx and dweight from one reading of dz

__device__ __forceinline__ int divide(int x, uint32_t magic) { return static_cast<int>(x * magic >> kMagicShift); }

// Row of the fragment table that connects input row `i` of a step to its output row `r`; none outside 0..2.
__host__ __device__ constexpr int tap_row(Geometry g, int i, int r) {
  return g == Geometry::s1 ? i - r : g == Geometry::s2 ? i : r + 1 - 2 * i;
}
// The same for the input column at shift `s` and output column `c` of a position.
__host__ __device__ constexpr int tap_column(Geometry g, int s, int c) { return g == Geometry::t2 ? c + 1 - 2 * s : s; }
__host__ __device__ constexpr bool is_tap(int row_or_column) { return row_or_column >= 0 && row_or_column <= 2; }

template <class T, int Q, Geometry G, Pass P>
struct Conv {
  static constexpr int kGroupRows = rows_per_group(G), kStepRows = rows_per_step(G);
  static constexpr int kInStride = in_stride(G), kOutStride = out_stride(G);
  static constexpr int kInRows = G == Geometry::s1 ? 4 : G == Geometry::s2 ? 3 : 2;  // that one step reads
  static constexpr int kShifts = G == Geometry::t2 ? 2 : 3;                          // of the input column
  static constexpr int kOutputs = kStepRows * kOutStride;                            // pixels per position and step
  static constexpr bool kForward = P == Pass::forward;
  static constexpr bool kHasConv = P != Pass::dweight, kHasDweight = P == Pass::backward || P == Pass::dweight;
  static constexpr int kSplits = Q <= 2 ? 2 : 1;  // of the positions, in dweight
  static constexpr int kPairs = Q / 2 > 0 ? Q / 2 : 1;

  // Of one output chunk. Q == 1: [row of taps][0: the two taps of a product of 16, 1: the tap alone].
  struct Weights {
    uint32_t pair[Q == 1 ? 3 : 1][2];
    uint32_t single[Q == 1 ? 3 : 1];
    uint32_t full[Q > 1 ? 9 : 1][kPairs][2];
  };
  struct Gradient {
    float pair[Q == 1 ? 2 : 1][3][4];  // [chunk][row of taps]
    float single[Q == 1 ? 2 : 1][3][2];
    float full[Q > 1 ? 9 : 1][2][4];  // [tap][input chunk]
  };
  struct Statistics {
    float n;
    Moments of[2][2];  // [chunk][column]
  };

  const ConvParams& p;
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pair, half;        // output chunks 2 * pair, 2 * pair + 1; which half of the positions or input chunks
  const int channel0, chunks;  // of the block
  int band;                    // first input chunk that the pair reads
  int column0, image0, step0, step_count;
  uint32_t ring;

  __device__ __forceinline__ explicit Conv(const ConvParams& params, uint32_t shared)
      : p(params),
        pair(P == Pass::dweight && Q == 8 ? 2 * blockIdx.z + warp % 2 : warp % 4),
        half(P == Pass::dweight && Q == 8 ? warp / 2 : warp / 4),
        channel0(blockIdx.x * params.block_chunks * 8),
        chunks(min(params.block_chunks, params.C / 8 - static_cast<int>(blockIdx.x) * params.block_chunks)),
        ring(shared) {
    band = Q == 1 ? 0 : min(16 * pair / p.D * p.D / 8, p.slots - Q);
    const int part = blockIdx.y;
    const int walk = part / (p.strips * p.segments), rest = part % (p.strips * p.segments);
    column0 = rest % p.strips * p.units * kUnit;
    step0 = rest / p.strips * p.segment_steps;
    step_count = min(p.segment_steps, p.steps - step0);
    image0 = walk * p.walk * p.streams;
  }

  __device__ __forceinline__ bool active() const { return 2 * pair < chunks; }

  static __device__ __forceinline__ uint32_t place(unsigned pixel, int chunk, int stride) {
    return pixel * kPixelBytes + (chunk << 4 ^ (pixel * (16 / stride) & 0x70));
  }

  // ---- weights -------------------------------------------------------------------------------------------------

  // Nine taps of one (out, in) pair of channels, from element `element` on, as halves of five words.
  static __device__ __forceinline__ void taps(uint32_t (&to)[5], uint32_t slab, unsigned element) {
    const uint32_t from = slab + element / 2 * 4;
    const uint32_t words[5] = {load_shared_word<0>(from), load_shared_word<4>(from), load_shared_word<8>(from),
                               load_shared_word<12>(from), load_shared_word<16>(from)};
    const int shift = element % 2 * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = __funnelshift_r(words[i], words[i + 1], shift);
    to[4] = words[4] >> shift;
  }
  static __device__ __forceinline__ uint32_t two(const uint32_t (&lo)[5], const uint32_t (&hi)[5], int tap) {
    return __byte_perm(lo[tap / 2], hi[tap / 2], tap % 2 ? 0x7632 : 0x5410);
  }

  // From global to shared memory as they lie there, (out channel, in channel, tap), then into fragments of mma.
  __device__ __forceinline__ void load_weights(Weights (&weights)[2]) {
    const int row = p.D * 9, rows = chunks * 8;
    const int pad = p.D % 8 == 0 ? 8 : 0;  // spreads the rows over the banks
    const char* from = static_cast<const char*>(p.weight) + static_cast<int64_t>(channel0) * row * 2;
    if (pad) {
      // 8 threads to a row, neighbouring rows in one warp
      const int row_bytes = row * 2, first = thread % 8 * 16;
      for (int r = thread / 8; r < rows; r += kThreads / 8) {
        const uint32_t to = ring + r * (row_bytes + 16);
        const char* row_from = from + r * row_bytes;
        for (int i = first; i < row_bytes; i += 128) copy_async(to + i, row_from + i, true);
        if (first == 0) store_shared(to + row_bytes, make_uint4(0, 0, 0, 0));
      }
    } else {
      for (int i = thread; i < rows * row / 8; i += kThreads) copy_async(ring + i * 16, from + i * 16, true);
    }
    const unsigned zeros = rows * (row + pad);  // what a pair of channels of different groups gets
    if (thread < 2) store_shared(ring + zeros * 2 + thread * 16, make_uint4(0, 0, 0, 0));
    wait_copies();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int out = (2 * pair + j) * 8 + lane / 4;  // channel that this lane's column of b makes
      const int group = out / p.D * p.D;
      const bool exists = 2 * pair + j < chunks;
      // element of the first tap for input channel `group`, and its distance between input channels
      const int origin = kForward ? out * (row + pad) : group * (row + pad) + (out - group) * 9;
      const int stride = kForward ? 9 : row + pad;
#pragma unroll
      for (int k = 0; k < (Q == 1 ? 1 : Q); ++k) {
        const int in = (Q == 1 ? 2 * pair + j : band + k) * 8 + lane % 4 * 2 - group;
        uint32_t lo[5], hi[5];
        taps(lo, ring, exists && static_cast<unsigned>(in) < static_cast<unsigned>(p.D) ? origin + in * stride : zeros);
        taps(hi, ring,
             exists && static_cast<unsigned>(in + 1) < static_cast<unsigned>(p.D) ? origin + (in + 1) * stride : zeros);
#pragma unroll
        for (int t = 0; t < 9; ++t) {
          const int y = t / 3, x = t % 3;
          // the fragment table is indexed by where the input pixel lies; t2 keeps the tap's own place
          uint32_t value = two(lo, hi, t);
          if (G == Geometry::s1 && !kForward) value = two(lo, hi, 8 - t);
          if (Q > 1) {
            weights[j].full[t][k / 2][k % 2] = value;
          } else if (G == Geometry::t2) {
            if (x == 1) weights[j].single[y] = value;
            if (x != 1) weights[j].pair[y][x == 0] = value;
          } else {
            if (x == 2) weights[j].single[y] = value;
            if (x != 2) weights[j].pair[y][x] = value;
          }
        }
      }
    }
    // the caller's barrier lets the ring take the place
  }

  // ---- rows into shared memory ---------------------------------------------------------------------------------

  // For every pixel of a row in shared memory: where it is in the image row, and in shared memory.
  struct Place {
    int32_t global;   // in 16 bytes from the first image's row; negative: outside
    uint32_t shared;  // from the start of the row, of chunk 0; chunk c is at shared ^ 16 c
  };
  __device__ __forceinline__ uint32_t in_places() const { return ring + p.places_offset; }
  __device__ __forceinline__ uint32_t out_places() const { return in_places() + p.in_pixels * sizeof(Place); }

  __device__ __forceinline__ static void store_place(uint32_t to, int32_t global, uint32_t shared) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(global), "r"(shared) : "memory");
  }
  __device__ __forceinline__ static Place load_place(uint32_t from) {
    Place place;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(place.global), "=r"(place.shared) : "r"(from) : "memory");
    return place;
  }

  __device__ __forceinline__ void make_places() const {
    for (int i = thread; i < p.in_pixels; i += kThreads) {
      const int stream = divide(i, p.pitch_magic);
      const int column = kInStride * column0 + i - stream * p.pitch - (G != Geometry::t2);
      const bool inside = column >= 0 && column < p.in_w;
      const int32_t global = (stream * p.in_h * p.in_w + column) * (p.C / 8);
      store_place(in_places() + i * sizeof(Place), inside ? global : -1, place(i, 0, kInStride));
    }
    for (int i = thread; i < p.out_pixels; i += kThreads) {
      const int stream = divide(i, p.stream_magic);
      const int column = kOutStride * column0 + i - stream * p.units * kUnit * kOutStride;
      const bool inside = stream < p.streams && column < p.out_w;
      const int32_t global = (stream * p.out_h * p.out_w + column) * (p.C / 8);
      store_place(out_places() + i * sizeof(Place), inside ? global : -1, place(i, 0, kOutStride));
    }
  }

  // Calls f(r, shared offset, place in the image row, valid) for this thread's 16 bytes of `rows` rows, the first of
  // them `first`. A thread keeps its chunk.
  template <int kRows, class F>
  __device__ __forceinline__ void each_place(uint32_t places, int pixels, int per_stream, int walked, int first,
                                             int height, F f) const {
    const int chunk = thread % kSlots;
    const int streams = min(p.streams, p.N - image0 - walked * p.streams);
    const int inside = chunk < chunks ? streams * per_stream : 0;
#pragma unroll 2
    for (int pixel = thread / kSlots; pixel < pixels; pixel += kThreads / kSlots) {
      const Place at = load_place(places + pixel * sizeof(Place));
      const bool valid = pixel < inside && at.global >= 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        f(r, r * pixels * kPixelBytes + (at.shared ^ chunk << 4), at.global,
          valid && static_cast<unsigned>(first + r) < static_cast<unsigned>(height));
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void each_input(int walked, int group, F f) const {
    if (thread % kSlots >= p.slots) return;
    each_place<kGroupRows>(in_places(), p.in_pixels, p.pitch, walked, first_input_row(group), p.in_h, f);
  }
  template <class F>
  __device__ __forceinline__ void each_output(int walked, int step, F f) const {
    each_place<kStepRows>(out_places(), p.out_pixels, p.units * kUnit * kOutStride, walked, kStepRows * step, p.out_h,
                          f);
  }

  static __device__ __forceinline__ int first_input_row(int group) { return G == Geometry::t2 ? group : 2 * group - 1; }
  __device__ __forceinline__ int own_channel() const { return channel0 + thread % kSlots * 8; }
  // In bytes: this thread's chunk in column 0 of a row of the first of the images; the row may lie outside.
  __device__ __forceinline__ int64_t input_start(int walked, int group) const {
    return (image0 + walked * p.streams) * p.in_image + first_input_row(group) * p.in_row + own_channel() * 2;
  }
  __device__ __forceinline__ int64_t output_start(int walked, int step) const {
    return (image0 + walked * p.streams) * p.out_image + kStepRows * step * p.out_row + own_channel() * 2;
  }

  __device__ __forceinline__ void fetch_input(uint32_t to, int walked, int group) const {
    const int64_t start = input_start(walked, group);
    each_input(walked, group, [&](int r, uint32_t offset, int32_t at, bool valid) {
      const int64_t from = start + r * p.in_row + at * int64_t{16};
      copy_async(to + offset, static_cast<const char*>(p.in) + from, valid);
      if constexpr (!kForward) {
        if (p.in_z) copy_async(ring + p.z_offset + offset, static_cast<const char*>(p.in_z) + from, valid);
        if (p.in_y) copy_async(ring + p.y_offset + offset, static_cast<const char*>(p.in_y) + from, valid);
      }
    });
  }
  __device__ __forceinline__ void fetch_side(uint32_t to, int walked, int step) const {
    if (!p.side) return;
    const char* start = static_cast<const char*>(p.side) + output_start(walked, step);
    each_output(walked, step, [&](int r, uint32_t offset, int32_t at, bool valid) {
      copy_async(to + offset, start + r * p.out_row + at * int64_t{16}, valid);
    });
  }

  // In place, on what this thread fetched itself; what lies outside the image stays zero.
  static __device__ __forceinline__ void activate(uint32_t at, const Vector8& scale, const Vector8& shift) {
    float v[8];
    unpack<T>(v, load_shared(at));
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = relu(scale.v[i] * v[i] + shift.v[i]);
    store_shared(at, pack<T>(v));
  }
  __device__ __forceinline__ void transform_input(uint32_t base, int walked, int group) const {
    const int channel = own_channel();
    if (thread % kSlots >= chunks) return;
    if constexpr (kForward) {
      if (!p.in_scale) return;
      const Vector8 scale(p.in_scale + channel), shift(p.in_shift + channel);
      each_input(walked, group, [&](int, uint32_t offset, int32_t, bool valid) {
        if (valid) activate(base + offset, scale, shift);
      });
    } else {
      if (!p.in_z) return;
      each_input(walked, group, [&](int, uint32_t offset, int32_t, bool valid) {
        if (!valid) return;
        float g[8], z[8];
        unpack<T>(g, load_shared(base + offset));
        unpack<T>(z, load_shared(ring + p.z_offset + offset));
        if (p.in_y) {
          float y[8];
          unpack<T>(y, load_shared(ring + p.y_offset + offset));
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] = y[i] <= 0.f ? 0.f : g[i];
        } else {
          const Vector8 scale(p.in_scale + channel), shift(p.in_shift + channel);
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] = scale.v[i] * z[i] + shift.v[i] <= 0.f ? 0.f : g[i];
        }
        const Vector8 a(p.a + channel);
#pragma unroll
        for (int i = 0; i < 8; ++i) g[i] *= a.v[i];
        if (p.b) {
          const Vector8 b(p.b + channel), c(p.c + channel);
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] += b.v[i] * z[i] + c.v[i];
        }
        store_shared(base + offset, pack<T>(g));
      });
    }
  }
  __device__ __forceinline__ void transform_side(uint32_t base, int walked, int step) const {
    if (!p.side || !p.side_scale || thread % kSlots >= chunks) return;
    const int channel = own_channel();
    const Vector8 scale(p.side_scale + channel), shift(p.side_shift + channel);
    each_output(walked, step, [&](int, uint32_t offset, int32_t, bool valid) {
      if (valid) activate(base + offset, scale, shift);
    });
  }

  // ---- products ------------------------------------------------------------------------------------------------

  // Shared addresses of the input rows that a step reads: those of the group before this turn's, and this turn's.
  struct Rows {
    uint32_t at[kInRows];
  };
  __device__ __forceinline__ Rows input_rows(uint32_t before, uint32_t now) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < kInRows; ++i) {
      rows.at[i] = (i < kGroupRows ? before : now) + i % kGroupRows * p.in_pixels * kPixelBytes;
    }
    return rows;
  }
  // First input pixel of a lane's row of unit u; units behind the last one read the first.
  __device__ __forceinline__ int unit_pixel(int u) const {
    u = u < p.units * p.streams ? u : 0;
    const int stream = divide(u, p.unit_magic);
    return stream * p.pitch + kInStride * ((u - stream * p.units) * kUnit + lane % 8);
  }

  __device__ __forceinline__ void convolve(float (&sum)[kOutputs][2][4], const Weights (&weights)[2], const Rows& rows,
                                           int tile) const {
    const int pixel = unit_pixel(2 * tile + lane / 8 % 2);
    if constexpr (Q == 1) {
      uint32_t two_taps = place(pixel + lane / 16, 2 * pair, kInStride);
      uint32_t one_tap = place(pixel + 2, 2 * pair, kInStride);
#pragma unroll
      for (int j = 0; j < 2; ++j, two_taps ^= 16, one_tap ^= 16) {  // the pair's second chunk
#pragma unroll
        for (int i = 0; i < kInRows; ++i) {
          uint32_t a[4], last[2];
          load_matrices(a, rows.at[i] + two_taps);
          if constexpr (kShifts == 3) {
            load_matrices(last, rows.at[i] + one_tap);
          } else {
            last[0] = a[0], last[1] = a[1];
          }
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            const int y = tap_row(G, i, o / kOutStride);
            if (!is_tap(y)) continue;
            if (kOutStride == 1 || o % 2 == 1) {
              Mma<T>::k16(sum[o][j], a[0], a[1], a[2], a[3], weights[j].pair[y][0], weights[j].pair[y][1]);
            }
            if (kOutStride == 1 || o % 2 == 0) Mma<T>::k8(sum[o][j], last[0], last[1], weights[j].single[y]);
          }
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kShifts; ++s) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          const uint32_t offset = place(pixel + s, band + 2 * k + lane / 16, kInStride);
#pragma unroll
          for (int i = 0; i < kInRows; ++i) {
            uint32_t a[4];
            load_matrices(a, rows.at[i] + offset);
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) {
              const int y = tap_row(G, i, o / kOutStride), x = tap_column(G, s, o % kOutStride);
              if (!is_tap(y) || !is_tap(x)) continue;
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const auto& b = weights[j].full[3 * y + x][k];
                Mma<T>::k16(sum[o][j], a[0], a[1], a[2], a[3], b[0], b[1]);
              }
            }
          }
        }
      }
    }
  }

  // Adds the products of one tile's dz with the input at the outputs' places. The operands' rows are positions.
  __device__ __forceinline__ void add_dweight(Gradient& gradient, const Rows& rows, uint32_t side, int tile) const {
    const int in_chunk = Q == 1 ? 2 * pair : band + (Q == 2 ? 0 : 2 * half);
    uint32_t b[kOutputs][4];  // [2 * input chunk + half of the positions]
    const uint32_t first = side + place((16 * tile + lane % 16) * kOutStride, in_chunk + lane / 16, kOutStride);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      load_transposed(b[o], first + (o / kOutStride * p.out_pixels + o % kOutStride) * kPixelBytes);
    }
    const int pixel = unit_pixel(2 * tile + lane / 16);
    if constexpr (Q == 1) {
      uint32_t two_taps = place(pixel + lane / 8 % 2, 2 * pair, kInStride);  // two shifts of 8 channels
      uint32_t one_tap = place(unit_pixel(2 * tile + lane / 8 % 2) + 2, 2 * pair, kInStride);
#pragma unroll
      for (int j = 0; j < 2; ++j, two_taps ^= 16, one_tap ^= 16) {  // the pair's second chunk
#pragma unroll
        for (int i = 0; i < kInRows; ++i) {
          uint32_t a[4], last[2];
          load_transposed(a, rows.at[i] + two_taps);
          if constexpr (kShifts == 3) {
            load_transposed(last, rows.at[i] + one_tap);
          } else {
            last[0] = a[0], last[1] = a[2];
          }
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            const int y = tap_row(G, i, o / kOutStride);
            if (!is_tap(y)) continue;
            if (kOutStride == 1 || o % 2 == 1) {
              Mma<T>::k16(gradient.pair[j][y], a[0], a[1], a[2], a[3], b[o][2 * j], b[o][2 * j + 1]);
            }
            if (kOutStride == 1 || o % 2 == 0) {
              float d[4] = {gradient.single[j][y][0], gradient.single[j][y][1], 0.f, 0.f};
              Mma<T>::k16(d, last[0], 0, last[1], 0, b[o][2 * j], b[o][2 * j + 1]);
              gradient.single[j][y][0] = d[0], gradient.single[j][y][1] = d[1];
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kShifts; ++s) {
        const uint32_t offset = place(pixel + s, 2 * pair + lane / 8 % 2, kInStride);
#pragma unroll
        for (int i = 0; i < kInRows; ++i) {
          uint32_t a[4];  // 16 channels of dz
          load_transposed(a, rows.at[i] + offset);
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            const int y = tap_row(G, i, o / kOutStride), x = tap_column(G, s, o % kOutStride);
            if (!is_tap(y) || !is_tap(x)) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              Mma<T>::k16(gradient.full[3 * y + x][j], a[0], a[1], a[2], a[3], b[o][2 * j], b[o][2 * j + 1]);
            }
          }
        }
      }
    }
  }

  // ---- what becomes of the sums --------------------------------------------------------------------------------

  struct Epilogue {
    float scale[2][2], shift[2][2];  // [chunk][column]
  };

  __device__ __forceinline__ void finish(const float (&sum)[kOutputs][2][4], const Epilogue& epilogue,
                                         Statistics& statistics, uint32_t out, int walked, int step, int tile) const {
    // All 16 positions have a place; those outside the image are not copied out, and not counted.
    // Chunk c of a position's first pixel is at `first` ^ 16 c: the position's place in its unit is lane / 4.
    const uint32_t first = out + (16 * tile + lane / 4) * kOutStride * kPixelBytes + (lane / 4 << 4) + lane % 4 * 4;
    const int row_bytes = p.out_pixels * kPixelBytes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bool inside = true;
      if constexpr (kForward) {
        if (p.stats) {
          const int u = 2 * tile + h, stream = divide(u, p.unit_magic);
          const int column = column0 + (u - stream * p.units) * kUnit + lane / 4;
          inside = stream < min(p.streams, p.N - image0 - walked * p.streams) && column < p.out_w;
        }
      }
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        float inverse = 0.f;
        const bool counts = inside && kStepRows * step + r < p.out_h;
        if constexpr (kForward) {
          if (p.stats && counts) {
            statistics.n += 1.f;
            inverse = __fdividef(1.f, statistics.n);
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t to = (first ^ (2 * pair + j) << 4) + r * row_bytes;
#pragma unroll
          for (int c = 0; c < kOutStride; ++c) {
            const float(&total)[4] = sum[r * kOutStride + c][j];
            float v[2] = {total[2 * h], total[2 * h + 1]};
            constexpr int kHalf = kUnit * kOutStride * kPixelBytes;
            const uint32_t at = to + h * kHalf + c * kPixelBytes;
            if constexpr (kForward) {
              if (p.out_scale) {
                v[0] = v[0] * epilogue.scale[j][0] + epilogue.shift[j][0];
                v[1] = v[1] * epilogue.scale[j][1] + epilogue.shift[j][1];
                if (p.side) {
                  const float2 residual = unpack<T>(load_shared_word(at));
                  v[0] += residual.x, v[1] += residual.y;
                }
                v[0] = relu(v[0]), v[1] = relu(v[1]);
              } else if (p.stats && counts) {
#pragma unroll
                for (int e = 0; e < 2; ++e) statistics.of[j][e].add(v[e], statistics.n, inverse);
              }
            }
            store_shared_word(at, pack<T>(v[0], v[1]));
          }
        }
      }
    }
  }

  // `odd` is no longer zero once a NaN or an infinity was stored.
  __device__ __forceinline__ void store_output(uint32_t out, int walked, int step, uint32_t& odd) const {
    char* start = static_cast<char*>(p.out) + output_start(walked, step);
    each_output(walked, step, [&](int r, uint32_t offset, int32_t at, bool valid) {
      if (!valid) return;
      const uint4 v = load_shared(out + offset);
      *reinterpret_cast<uint4*>(start + r * p.out_row + at * int64_t{16}) = v;
      odd = times_zero_plus<T>(v.x, times_zero_plus<T>(v.y, times_zero_plus<T>(v.z, times_zero_plus<T>(v.w, odd))));
    });
  }

  // Over the lanes with the same columns, then over the two warps with the same channels.
  __device__ __forceinline__ void store_statistics(Statistics statistics) const {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      const float n = __shfl_xor_sync(~0u, statistics.n, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Moments& own = statistics.of[i / 2][i % 2];
        Moments other;
        other.origin = __shfl_xor_sync(~0u, own.origin, step);
        other.mean = __shfl_xor_sync(~0u, own.mean, step);
        other.m2 = __shfl_xor_sync(~0u, own.m2, step);
        own.merge(statistics.n, n, other);
      }
      statistics.n += n;
    }
    const uint32_t exchange = ring + (pair * 4 + lane) * 13 * 4;
    const bool has = active() && lane < 4;
    if (has && half == 1) {
      store_shared_word(exchange, __float_as_uint(statistics.n));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Moments& own = statistics.of[i / 2][i % 2];
        store_shared_word(exchange + 4 + i * 12, __float_as_uint(own.origin));
        store_shared_word(exchange + 8 + i * 12, __float_as_uint(own.mean));
        store_shared_word(exchange + 12 + i * 12, __float_as_uint(own.m2));
      }
    }
    __syncthreads();
    if (!has || half == 1) return;
    const float n = __uint_as_float(load_shared_word(exchange));
    float* to = p.stats + static_cast<int64_t>(blockIdx.y) * 4 * p.C;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * pair + i / 2 >= chunks) break;
      Moments other;
      other.origin = __uint_as_float(load_shared_word(exchange + 4 + i * 12));
      other.mean = __uint_as_float(load_shared_word(exchange + 8 + i * 12));
      other.m2 = __uint_as_float(load_shared_word(exchange + 12 + i * 12));
      Moments& own = statistics.of[i / 2][i % 2];
      own.merge(statistics.n, n, other);
      const int channel = channel0 + (2 * pair + i / 2) * 8 + lane % 4 * 2 + i % 2;
      to[channel] = statistics.n + n;
      to[p.C + channel] = own.origin;
      to[2 * p.C + channel] = own.mean;
      to[3 * p.C + channel] = own.m2;
    }
  }

  // Into shared memory as (out channel, in channel, tap), the second half of the positions added to the first, and
  // out: as the part's partial sums, or as dweight itself where there is one part.
  __device__ __forceinline__ void store_dweight(const Gradient& gradient) const {
    const int first_row = P == Pass::dweight && Q == 8 ? 32 * blockIdx.z : 0;
    const int rows = min(chunks * 8, P == Pass::dweight && Q == 8 ? first_row + 32 : 64) - first_row;
    const int row = p.D * 9, pitch = p.D % 8 == 0 ? row + 4 : row;  // spreads the rows over the banks
    const auto put = [&](int split, int out, int in, int tap, float value) {
      const int i = in - out / p.D * p.D;
      if (out >= chunks * 8 || i < 0 || i >= p.D) return;
      const uint32_t to = ring + ((out - first_row) * pitch + i * 9 + tap) * 4;
      if (split) value += __uint_as_float(load_shared_word(to));
      store_shared_word(to, __float_as_uint(value));
    };
    for (int split = 0; split < kSplits; ++split) {
      __syncthreads();
      if (!active() || (kSplits == 2 && half != split) || rows <= 0) continue;
      if constexpr (Q == 1) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int out = (2 * pair + j) * 8 + lane / 4, in = (2 * pair + j) * 8 + lane % 4 * 2;
#pragma unroll
          for (int y = 0; y < 3; ++y) {
            // s1: the fragment table is turned by 180 degrees
            const int row = 3 * (G == Geometry::s1 ? 2 - y : y);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              put(split, out, in + e, row + 2, gradient.pair[j][y][e]);
              put(split, out, in + e, row + (G == Geometry::s1 ? 1 : 0), gradient.pair[j][y][2 + e]);
              put(split, out, in + e, row + (G == Geometry::s1 ? 0 : 1), gradient.single[j][y][e]);
            }
          }
        }
      } else {
        const int in_chunk = band + (Q == 2 ? 0 : 2 * half);
#pragma unroll
        for (int t = 0; t < 9; ++t) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              put(split, pair * 16 + e / 2 * 8 + lane / 4, (in_chunk + j) * 8 + lane % 4 * 2 + e % 2,
                  G == Geometry::s1 ? 8 - t : t, gradient.full[t][j][e]);
            }
          }
        }
      }
    }
    __syncthreads();
    if (rows <= 0) return;
    const int64_t begin = static_cast<int64_t>(channel0 + first_row) * row;
    float* partial = p.dweight_partial + static_cast<int64_t>(blockIdx.y) * p.C * row + begin;
    T* result = static_cast<T*>(p.dweight) + begin;
    // rows of `pitch` elements by themselves, 8 threads to a row, or all in one piece
    const bool pieces = pitch != row;
    const int step = pieces ? 64 : kThreads * 8, length = pieces ? row : rows * row;
    for (int r = pieces ? thread / 8 : 0; r < (pieces ? rows : 1); r += kThreads / 8) {
      for (int i = (pieces ? thread % 8 : thread) * 8; i < length; i += step) {
        const uint32_t from = ring + (r * pitch + i) * 4;
        const uint4 lo = load_shared(from), hi = load_shared(from + 16);
        float v[8] = {__uint_as_float(lo.x), __uint_as_float(lo.y), __uint_as_float(lo.z), __uint_as_float(lo.w),
                      __uint_as_float(hi.x), __uint_as_float(hi.y), __uint_as_float(hi.z), __uint_as_float(hi.w)};
        bool odd = false;
#pragma unroll
        for (int e = 0; e < 8; ++e) odd |= isnan(v[e]);
        if (odd) {
#pragma unroll 1
          for (int e = 0; e < 8; ++e) {
            const int at = r * row + i + e;
            const float exact = exact_dweight(channel0 + first_row + at / row, at % row / 9, at % 9);
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] = k == e ? exact : v[k];
          }
        }
        if (p.dweight) {
          *reinterpret_cast<uint4*>(result + r * row + i) = pack<T>(v);
        } else {
          reinterpret_cast<float4*>(partial + r * row + i)[0] = make_float4(v[0], v[1], v[2], v[3]);
          reinterpret_cast<float4*>(partial + r * row + i)[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
      }
    }
  }

  // ---- NaN and infinities --------------------------------------------------------------------------------------

  // Zero times an infinity is NaN: what one group has reaches all groups of a product, and what lies at the image's
  // border the sums over padding. So what came out as NaN is summed again, over its own group and inside the image.

  static __device__ __forceinline__ float element(const void* tensor, int64_t bytes) {
    return static_cast<float>(*reinterpret_cast<const T*>(static_cast<const char*>(tensor) + bytes));
  }
  static __device__ __forceinline__ float rounded(float v) { return static_cast<float>(static_cast<T>(v)); }
  __device__ __forceinline__ int64_t output_at(int n, int row, int column, int channel) const {
    return n * p.out_image + row * p.out_row + (column * int64_t{p.C} + channel) * 2;
  }
  // What the convolution reads, as it lies in shared memory.
  __device__ __forceinline__ float exact_input(int n, int row, int column, int channel) const {
    const int64_t at = n * p.in_image + row * p.in_row + (column * int64_t{p.C} + channel) * 2;
    const float v = element(p.in, at);
    if constexpr (kForward) {
      return p.in_scale ? rounded(relu(p.in_scale[channel] * v + p.in_shift[channel])) : v;
    } else {
      if (!p.in_z) return v;
      const float z = element(p.in_z, at);
      const float y = p.in_y ? element(p.in_y, at) : p.in_scale[channel] * z + p.in_shift[channel];
      const float g = p.a[channel] * (y <= 0.f ? 0.f : v);
      return rounded(p.b ? g + p.b[channel] * z + p.c[channel] : g);
    }
  }
  // Row (or column) of the input that a tap connects to one of the output; outside the image where there is none.
  static __device__ __forceinline__ int connected(int out, int tap) {
    if (kForward) return out * kInStride + tap - 1;
    const int in = out + 1 - tap;
    return G == Geometry::t2 ? (in & 1 ? -1 : in / 2) : in;
  }
  __device__ __forceinline__ bool inside(int row, int column) const {
    return row >= 0 && row < p.in_h && column >= 0 && column < p.in_w;
  }
  // Calls f(n, row, column) for the block's output pixels, every `stride`-th of a row from `first` on.
  template <class F>
  __device__ __forceinline__ void each_pixel(int first, int stride, F f) const {
    const int column_end = min(kOutStride * (column0 + p.units * kUnit), p.out_w);
    const int row_end = min(kStepRows * (step0 + step_count), p.out_h);
    for (int n = image0; n < min(image0 + p.walk * p.streams, p.N); ++n) {
      for (int row = kStepRows * step0; row < row_end; ++row) {
#pragma unroll 1
        for (int column = kOutStride * column0 + first; column < column_end; column += stride) f(n, row, column);
      }
    }
  }

  __device__ __forceinline__ float exact(int n, int row, int column, int channel) const {
    const int group = channel / p.D * p.D;
    float sum = 0.f;
#pragma unroll 1
    for (int tap = 0; tap < 9 && !isnan(sum); ++tap) {
      const int y = connected(row, tap / 3), x = connected(column, tap % 3);
      if (!inside(y, x)) continue;
#pragma unroll 1
      for (int i = 0; i < p.D; ++i) {
        const int64_t pair = kForward ? int64_t{channel} * p.D + i : int64_t{group + i} * p.D + channel - group;
        sum += exact_input(n, y, x, group + i) * element(p.weight, (pair * 9 + tap) * 2);
      }
    }
    if constexpr (kForward) {
      if (p.out_scale) {
        sum = sum * p.out_scale[channel] + p.out_shift[channel];
        if (p.side) sum += element(p.side, output_at(n, row, column, channel));
        sum = relu(sum);
      }
    }
    return sum;
  }
  // Of the block's output pixels.
  __device__ __forceinline__ float exact_dweight(int out, int in, int tap) const {
    in += out / p.D * p.D;
    float sum = 0.f;
    each_pixel(0, 1, [&](int n, int row, int column) {
      const int y = connected(row, tap / 3), x = connected(column, tap % 3);
      if (isnan(sum) || !inside(y, x)) return;
      const float a = element(p.side, output_at(n, row, column, in));
      sum += (p.side_scale ? rounded(relu(p.side_scale[in] * a + p.side_shift[in])) : a) * exact_input(n, y, x, out);
    });
    return sum;
  }

  __device__ __forceinline__ void repair() const {
    const int chunk = thread % kSlots;
    if (chunk < chunks) {
      each_pixel(thread / kSlots, kThreads / kSlots, [&](int n, int row, int column) {
#pragma unroll 1
        for (int channel = channel0 + 8 * chunk; channel < channel0 + 8 * chunk + 8; ++channel) {
          T* at = reinterpret_cast<T*>(static_cast<char*>(p.out) + output_at(n, row, column, channel));
          if (isnan(static_cast<float>(*at))) *at = static_cast<T>(exact(n, row, column, channel));
        }
      });
    }
    __syncthreads();
  }
  __device__ __forceinline__ Statistics statistics_of_output() const {
    Statistics statistics{};
    each_pixel(8 * half + lane / 4, 16, [&](int n, int row, int column) {
      statistics.n += 1.f;
      const float inverse = 1.f / statistics.n;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = 2 * pair + i / 2;
        if (chunk >= chunks) break;
        const float z = element(p.out, output_at(n, row, column, channel0 + chunk * 8 + lane % 4 * 2 + i % 2));
        statistics.of[i / 2][i % 2].add(z, statistics.n, inverse);
      }
    });
    return statistics;
  }

  // ---- the walk ------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void run() {
    Weights weights[2];
    Gradient gradient{};
    Statistics statistics{};
    Epilogue epilogue{};
    uint32_t odd = 0;
    const bool convolves = kHasConv && p.out;
    make_places();
    if constexpr (kHasConv) {
      if (convolves) load_weights(weights);
    }
    if constexpr (kForward) {
      if (p.out_scale && active()) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (2 * pair + j >= chunks) break;
          const int channel = channel0 + (2 * pair + j) * 8 + lane % 4 * 2;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            epilogue.scale[j][e] = __ldg(p.out_scale + channel + e);
            epilogue.shift[j][e] = __ldg(p.out_shift + channel + e);
          }
        }
      }
    }
    const bool adds = kHasDweight && (p.dweight || p.dweight_partial);

    // Turn by turn: a group of input rows arrives; from the second one of an image on it completes a step.
    const int groups = step_count + 1;
    const int walked_end = min(p.walk, (p.N - image0 + p.streams - 1) / p.streams);
    const int turns = walked_end * groups;
    int walked = 0, group = 0;
    // the groups of the ring: before this turn's, this turn's, the next turn's; the same for the side's steps
    uint32_t before = ring + 2 * p.group_bytes, now = ring, next = ring + p.group_bytes;
    uint32_t side = ring + p.side_offset, next_side = side + p.side_bytes;
    __syncthreads();
    fetch_input(now, 0, step0);
    for (int turn = 0; turn < turns; ++turn) {
      int next_walked = walked, next_group = group + 1;
      if (next_group == groups) ++next_walked, next_group = 0;
      wait_copies();
      transform_input(now, walked, step0 + group);
      if (group > 0) transform_side(side, walked, step0 + group - 1);
      __syncthreads();
      if (turn + 1 < turns) {
        fetch_input(next, next_walked, step0 + next_group);
        if (next_group > 0) fetch_side(next_side, next_walked, step0 + next_group - 1);
      }
      if (group > 0) {
        const int step = step0 + group - 1;
        const uint32_t out = kForward && p.side ? side : ring + p.out_offset;
        if (active()) {
          const Rows rows = input_rows(before, now);
          if constexpr (kHasConv) {
            if (convolves) {
              for (int tile = half; tile < p.tiles; tile += 2) {
                float sum[kOutputs][2][4] = {};
                convolve(sum, weights, rows, tile);
                finish(sum, epilogue, statistics, out, walked, step, tile);
              }
            }
          }
          if constexpr (kHasDweight) {
            if (adds) {
              for (int tile = kSplits == 2 ? half : 0; tile < p.tiles; tile += kSplits) {
                add_dweight(gradient, rows, side, tile);
              }
            }
          }
        }
        if (convolves) {
          __syncthreads();
          store_output(out, walked, step, odd);
        }
      }
      walked = next_walked, group = next_group;
      const uint32_t free = before, free_side = side;
      before = now, now = next, next = free;
      side = next_side, next_side = free_side;
    }
    if constexpr (kHasConv) {
      if (__syncthreads_or(odd != 0)) {
        repair();
        if constexpr (kForward) {
          if (p.stats && active()) statistics = statistics_of_output();
        }
      }
    }
    if constexpr (kForward) {
      if (p.stats) store_statistics(statistics);
    }
    if constexpr (kHasDweight) {
      if (adds) store_dweight(gradient);
    }
  }
};

template <class T, int Q, Geometry G, Pass P>
__device__ __forceinline__ void conv(const ConvParams& p) {
  extern __shared__ __align__(128) char shared[];
  Conv<T, Q, G, P>(p, shared_address(shared)).run();
}

// Blocks that have to fit on a multiprocessor: bounds the registers to 128 or 255 a thread.
constexpr int min_blocks(int q, Pass pass) { return pass == Pass::forward && q <= 2 ? 2 : 1; }

}  // namespace resnext_kernels::cuda

// One kernel, visible under its plain name; plan.cpp composes the same names.
#define RK_DEFINE_CONV(T, DTYPE, GEOMETRY, Q, PASS)                                                                  \
  extern "C" __global__ void __launch_bounds__(                                                                      \
      resnext_kernels::cuda::kThreads, resnext_kernels::cuda::min_blocks(Q, resnext_kernels::cuda::Pass::PASS))      \
      conv_##DTYPE##_##GEOMETRY##_q##Q##_##PASS(const __grid_constant__ resnext_kernels::cuda::ConvParams p) {       \
    resnext_kernels::cuda::conv<T, Q, resnext_kernels::cuda::Geometry::GEOMETRY, resnext_kernels::cuda::Pass::PASS>( \
        p);                                                                                                          \
  }
