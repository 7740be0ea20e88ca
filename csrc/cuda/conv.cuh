// The grouped 3x3 convolution on tensor cores, forward and backward, NHWC, float16 or bfloat16, float32 sums.
//
//   eval       y = relu(bn(conv(a)) [+ side]), a = in or relu(in_scale * in + in_shift), zero outside the image
//   forward    z = conv(a), and the moments of its channels
//   backward   dz = a * g [+ b * z + c], g = dy where the ReLU passed, else 0
//              dx = conv(dz) with the weights transposed and turned, dweight[tap] = sum dz shifted by tap * side
//
// A block takes up to 64 channels (whole groups; one group of about 32) and walks down `streams` images side by side.
// Each step brings the next input rows into a ring in shared memory (16-byte cp.async, one step ahead), where the
// previous BatchNorm or the gradient of this one is applied in place by the thread that fetched them, and makes the
// next output rows from the rows that are there: every input pixel enters shared memory once, halo rows are never read
// again. Columns outside the image are zeros in the ring, rows outside it are left out.
//
//   ring (3 groups of rows) x (streams x pitch pixels) x 128 bytes (8 chunks of 8 channels), or 64 bytes with Q == 4
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
// A warp has a pair of output chunks; the warps of a pair divide the positions (forward, dx), or in dweight the
// positions or input chunks. Statistics and dweight leave the block as partial results, one set per part, which
// pointwise.cu adds in a fixed order.
//
// Groups that share a product would share its NaN: 0 * Inf. Whatever was stored as NaN is summed again, one by one.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "params.h"

namespace resnext_kernels::cuda {

__device__ __forceinline__ int divide(int x, uint32_t magic) {
  return static_cast<int>(__umulhi(static_cast<uint32_t>(x) << (32 - kMagicShift), magic));
}

// Row of the fragment table that connects input row `i` of a step to its output row `r`; none outside 0..2.
__host__ __device__ constexpr int tap_row(Geometry g, int i, int r) {
  return g == Geometry::s1 ? i - r : g == Geometry::s2 ? i - 2 * r : r + 1 - 2 * i;
}
// The same for the input column at shift `s` and output column `c` of a position.
__host__ __device__ constexpr int tap_column(Geometry g, int s, int c) { return g == Geometry::t2 ? c + 1 - 2 * s : s; }
__host__ __device__ constexpr bool is_tap(int row_or_column) { return row_or_column >= 0 && row_or_column <= 2; }

template <class T, int Q, Geometry G, Pass P>
struct Conv {
  static constexpr int kSlots = slots(Q), kPixelBytes = 16 * kSlots;
  static constexpr int kGroupRows = rows_per_group(G, Q), kStepRows = rows_per_step(G, Q);
  static constexpr int kInStride = in_stride(G), kOutStride = out_stride(G);
  static constexpr int kInRows = kGroupRows + (G == Geometry::s1 ? 2 : 1);  // that one step reads
  static constexpr int kShifts = G == Geometry::t2 ? 2 : 3;                 // of the input column
  static constexpr int kOutputs = kStepRows * kOutStride;                   // pixels per position and step
  static constexpr bool kForward = P == Pass::eval || P == Pass::forward;
  static constexpr bool kHasConv = P != Pass::dweight, kHasDweight = P == Pass::backward || P == Pass::dweight;
  static constexpr int kPairs = Q / 2 > 0 ? Q / 2 : 1;
  // Warps: pairs of output chunks, and for each of them parts of the positions.
  static constexpr int kPairWarps = P == Pass::dweight && Q == 8 ? 2 : kSlots / 2, kParts = kWarps / kPairWarps;
  static constexpr int kSplits = Q <= 4 ? 2 : 1;  // of the positions, in dweight
  static constexpr int kWarpTiles = (kMostUnits / 2 + kParts - 1) / kParts;
  // Threads: chunks of a pixel, and a run of pixels.
  static constexpr int kRun = kThreads / kSlots;
  static constexpr int kInPlaces = (most_in_pixels(G) + kRun - 1) / kRun;
  static constexpr int kOutPlaces = (kMostUnits * kUnit * kOutStride + kRun - 1) / kRun;

  // Of one output chunk. Q == 1: [row of taps][0: the two taps of a product of 16, 1: the tap alone].
  struct Weights {
    uint32_t pair[Q == 1 ? 3 : 1][2];
    uint32_t single[Q == 1 ? 3 : 1];
    uint32_t full[Q > 1 ? 9 : 1][kPairs][2];
  };
  struct Gradient {
    float pair[Q == 1 ? 2 : 1][3][4];    // [chunk][row of taps]
    float single[Q == 1 ? 2 : 1][3][4];  // of a product of which nobody wants the other half
    float full[Q > 1 ? 9 : 1][2][4];     // [tap][input chunk]
  };
  struct Statistics {
    float n, pending;  // values in `of`, and in `sums`
    Moments of[2][2];  // [chunk][column]
    Sums sums[2][2];
  };
  // The pixels of a row that a thread moves, every kRun-th of those inside the image, then of the others.
  template <int kCount>
  struct Places {
    int32_t global[kCount];   // in 16 bytes from the first pixel of the first image's row
    uint32_t shared[kCount];  // in bytes from the start of the row
    int32_t stream[kCount];   // kOutside where the image has no such column
  };
  static constexpr int32_t kOutside = 0x7ffffffe, kNowhere = 0x7fffffff;  // not in shared memory either

  // A group of input rows arrives; unless it is an image's first, it completes a step.
  struct Turn {
    int image, out_row;  // of the first of the streams, and the step's first row
    // The group's first row; the image may not have it.
    __device__ __forceinline__ int in_row() const {
      const unsigned next_step = out_row + kStepRows;
      return static_cast<int>(kInStride * next_step / kOutStride) - (G != Geometry::t2);
    }
  };

  const ConvParams p;
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pair, part;        // output chunks 2 * pair, 2 * pair + 1; part of the positions, or of the input chunks
  const int channel0, chunks;  // of the block
  int column0, image0, image_end, out_begin, out_end;  // rows of the output
  uint32_t ring;
  Places<kInPlaces> in_places;
  Places<kOutPlaces> out_places;

  __device__ __forceinline__ explicit Conv(const ConvParams& params, uint32_t shared)
      : p(params),
        pair(P == Pass::dweight && Q == 8 ? 2 * blockIdx.z + warp % kPairWarps : warp % kPairWarps),
        part(warp / kPairWarps),
        channel0(blockIdx.x * params.block_chunks * 8),
        chunks(min(params.block_chunks, params.C / 8 - static_cast<int>(blockIdx.x) * params.block_chunks)),
        ring(shared) {
    const int piece = blockIdx.y, walk = divide(piece, p.walk_magic), rest = piece - walk * p.strips * p.segments;
    const int segment = divide(rest, p.strip_magic);
    column0 = (rest - segment * p.strips) * p.units * kUnit;
    out_begin = kStepRows * segment * p.segment_steps;
    out_end = min(out_begin + kStepRows * p.segment_steps, kStepRows * p.steps);
    image0 = walk * p.walk * p.streams;
    image_end = min(image0 + p.walk * p.streams, p.N);
    make_places(in_places, p.in_pixels, p.pitch, p.in_magic, kInStride * column0 - (G != Geometry::t2), p.in_h, p.in_w,
                kInStride);
    make_places(out_places, p.out_pixels, p.units * kUnit * kOutStride, p.out_magic, kOutStride * column0, p.out_h,
                p.out_w, kOutStride);
  }

  // First input chunk that the pair reads.
  __device__ __forceinline__ int band() const {
    return Q == 1 ? 0 : min(divide(16 * pair, p.group_magic) * p.D / 8, p.slots - Q);
  }
  __device__ __forceinline__ bool active() const { return 2 * pair < chunks; }
  __device__ __forceinline__ Turn first_turn(int image) const { return {image, out_begin - kStepRows}; }
  __device__ __forceinline__ Turn after(const Turn& turn) const {
    if (turn.out_row + kStepRows == out_end) return first_turn(turn.image + p.streams);
    return {turn.image, turn.out_row + kStepRows};
  }
  __device__ __forceinline__ int images(const Turn& turn) const { return min(p.streams, p.N - turn.image); }
  __device__ __forceinline__ bool completes_step(const Turn& turn) const { return turn.out_row >= out_begin; }

  // Neighbours lie in different banks: kUnit pixels at a distance of `stride`, and the chunks of a pixel.
  static __device__ __forceinline__ uint32_t place(unsigned pixel, int chunk, int stride) {
    const uint32_t spread = kSlots == 8 ? pixel * (16 / stride) & 0x70 : pixel * 8 & (stride == 1 ? 0x30 : 0x70);
    return pixel * kPixelBytes ^ spread ^ chunk << 4;
  }

  // ---- weights -------------------------------------------------------------------------------------------------

  __device__ __forceinline__ int weight_row() const { return p.D * 9 + (p.D % 16 ? 0 : 8); }  // spread over the banks

  // The nine taps of one output and two input channels, counted from the block's first.
  __device__ __forceinline__ void taps(uint32_t (&to)[9], int out, int in) const {
    const int row = weight_row(), first = in - divide(out, p.group_magic) * p.D;
    const unsigned origin = (out * row + first * p.weight_in) * 2, zeros = chunks * 8 * row * 2;
    const bool exists = out < chunks * 8;
    const auto from = [&](int i) { return exists && static_cast<unsigned>(first + i) < static_cast<unsigned>(p.D); };
    if (p.D % 2 == 0 && p.weight_in == 1) {  // both channels are of one group: a word for each tap
      const uint32_t at = ring + (from(0) ? origin : zeros), step = from(0) ? 2 * p.weight_tap : 0;
#pragma unroll
      for (int t = 0; t < 9; ++t) to[t] = load_shared_word(at + t * step);
    } else if (p.D % 2 == 0) {  // their 18 elements are nine words
      const uint32_t at = ring + (from(0) ? origin : zeros);
      const uint32_t w[9] = {load_shared_word<0>(at),  load_shared_word<4>(at),  load_shared_word<8>(at),
                             load_shared_word<12>(at), load_shared_word<16>(at), load_shared_word<20>(at),
                             load_shared_word<24>(at), load_shared_word<28>(at), load_shared_word<32>(at)};
#pragma unroll
      for (int t = 0; t < 9; ++t) {
        to[t] = __byte_perm(w[t / 2], w[(9 + t) / 2], t % 2 ? 0x5432 : 0x7610);
      }
    } else {
      const uint32_t lo = ring + (from(0) ? origin : zeros), hi = ring + (from(1) ? origin + 2 * p.weight_in : zeros);
      const uint32_t lo_step = from(0) ? 2 * p.weight_tap : 0, hi_step = from(1) ? 2 * p.weight_tap : 0;
#pragma unroll
      for (int t = 0; t < 9; ++t) {
        to[t] = load_shared_half(lo + t * lo_step) | load_shared_half(hi + t * hi_step) << 16;
      }
    }
  }

  // From global to shared memory as they lie there, the 9 D of an output channel together, then into fragments of mma.
  __device__ __forceinline__ void load_weights(Weights (&weights)[2]) const {
    const char* from = static_cast<const char*>(p.weight) + static_cast<int64_t>(channel0) * p.D * 18;
    const int pieces = chunks * p.D * 9;  // of 16 bytes
    for (int i = thread; i < pieces; i += kThreads) {
      copy_async(ring + (i + (p.D % 16 ? 0 : divide(i, p.row_magic))) * 16, from + i * 16, 16);
    }
    // what channels of different groups get
    if (thread < 3) store_shared(ring + chunks * 8 * weight_row() * 2 + thread * 16, make_uint4(0, 0, 0, 0));
    wait_copies();
    __syncthreads();
    if (!active()) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int k = 0; k < (Q == 1 ? 1 : Q); ++k) {
        // the lane's row and pair of columns; a column of b is an output of the pass
        const int own = 2 * pair + j, other = Q == 1 ? own : band() + k;
        uint32_t value[9];
        taps(value, (kForward ? own : other) * 8 + lane / 4, (kForward ? other : own) * 8 + lane % 4 * 2);
#pragma unroll
        for (int t = 0; t < 9; ++t) {
          // the fragment table is indexed by where the input pixel lies; t2 keeps the tap's own place
          const int to = G == Geometry::s1 && !kForward ? 8 - t : t, y = to / 3, x = to % 3;
          const uint32_t fragment = kForward ? value[t] : transposed(value[t]);
          if (Q > 1) {
            weights[j].full[to][k / 2][k % 2] = fragment;
          } else if (G == Geometry::t2) {
            if (x == 1) weights[j].single[y] = fragment;
            if (x != 1) weights[j].pair[y][x == 0] = fragment;
          } else {
            if (x == 2) weights[j].single[y] = fragment;
            if (x != 2) weights[j].pair[y][x] = fragment;
          }
        }
      }
    }
    // the caller's barrier lets the ring take the place
  }

  // ---- rows into shared memory ---------------------------------------------------------------------------------

  // `magic`: of the image's width.
  template <int kCount>
  __device__ __forceinline__ void make_places(Places<kCount>& places, int pixels, int pitch, uint32_t magic,
                                              int first_column, int height, int width, int stride) const {
    const int left = max(-first_column, 0), columns = min(width - first_column, pitch) - left;  // outside, inside
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int pixel = thread / kSlots + i * kRun, other = pixel - p.streams * columns;
      const bool inside = other < 0;
      const int other_column = divide(other, p.stream_magic);
      const int stream = inside ? divide(pixel, magic) : other - other_column * p.streams;
      const int column = inside ? left + pixel - stream * columns : other_column + (other_column < left ? 0 : columns);
      const bool exists = pixel < pixels && thread % kSlots < p.slots;
      places.global[i] = (stream * height * width + first_column + column) * (p.C / 8);
      places.shared[i] = place(pixel < p.streams * pitch ? stream * pitch + column : pixel, thread % kSlots, stride);
      places.stream[i] = inside && thread % kSlots < chunks ? stream : exists ? kOutside : kNowhere;
    }
  }

  __device__ __forceinline__ bool has_input_row(int row) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(p.in_h);
  }
  // Calls f(stream, shared offset, global offset) for the thread's 16 bytes of row r, of the streams before `end`, the
  // offsets from the thread's chunk of row 0's first pixel.
  template <int kCount, class F>
  static __device__ __forceinline__ void each_place(const Places<kCount>& places, int end, uint32_t row, int64_t row_at,
                                                    F f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (places.stream[i] >= end) break;
      f(places.stream[i], row + places.shared[i], row_at + places.global[i] * int64_t{16});
    }
  }
  // The same for all rows of a group or step that the image has.
  template <class F>
  __device__ __forceinline__ void each_input(const Turn& turn, int end, F f) const {
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      if (has_input_row(turn.in_row() + r)) each_place(in_places, end, r * p.in_pixels * kPixelBytes, r * p.in_row, f);
    }
  }
  template <class F>
  __device__ __forceinline__ void each_output(const Turn& turn, int end, F f) const {
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      if (turn.out_row + r >= p.out_h) break;
      each_place(out_places, end, r * p.out_pixels * kPixelBytes, r * p.out_row, f);
    }
  }
  __device__ __forceinline__ int own_channel() const { return channel0 + thread % kSlots * 8; }
  // In bytes: this thread's chunk in column 0 of a row of the first of the images; the row may lie outside.
  __device__ __forceinline__ int64_t input_start(const Turn& turn) const {
    return turn.image * p.in_image + turn.in_row() * p.in_row + own_channel() * 2;
  }
  __device__ __forceinline__ int64_t output_start(const Turn& turn) const {
    return turn.image * p.out_image + turn.out_row * p.out_row + own_channel() * 2;
  }

  __device__ __forceinline__ void fetch_input(uint32_t to, const Turn& turn) const {
    const int64_t start = input_start(turn);
    const char *in = static_cast<const char*>(p.in) + start, *z = static_cast<const char*>(p.in_z) + start;
    const char* y = static_cast<const char*>(p.in_y) + start;
    const uint32_t z_to = ring + p.z_offset, y_to = ring + p.y_offset;
    const int end = images(turn);
    each_input(turn, kNowhere, [&](int stream, uint32_t at, int64_t from) {
      const uint32_t size = stream < end ? 16 : 0;
      copy_async(to + at, in + from, size);
      if constexpr (!kForward) {
        if (p.in_z) copy_async(z_to + at, z + from, size);
        if (p.in_y) copy_async(y_to + at, y + from, size);
      }
    });
  }
  // Rows that the image does not have become zeros: dweight reads them.
  __device__ __forceinline__ void fetch_side(uint32_t to, const Turn& turn) const {
    const char* side = static_cast<const char*>(p.side) + output_start(turn);
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      const int end = turn.out_row + r < p.out_h ? images(turn) : 0;
      each_place(
          out_places, kNowhere, r * p.out_pixels * kPixelBytes, r * p.out_row,
          [&](int stream, uint32_t at, int64_t from) { copy_async(to + at, side + from, stream < end ? 16 : 0); });
    }
  }

  // In place, on what this thread fetched itself; what lies outside the image stays zero.
  static __device__ __forceinline__ void activate(uint32_t at, const Vector8& scale, const Vector8& shift) {
    float v[8];
    unpack<T>(v, load_shared(at));
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = scale.v[i] * v[i] + shift.v[i];
    store_shared(at, pack_relu<T>(v));
  }
  __device__ __forceinline__ void transform_input(uint32_t base, const Turn& turn, int images) const {
    const int channel = own_channel();
    if (thread % kSlots >= chunks) return;
    if constexpr (kForward) {
      if (!p.in_scale) return;
      const Vector8 scale(p.in_scale + channel), shift(p.in_shift + channel);
      each_input(turn, images, [&](int, uint32_t at, int64_t) { activate(base + at, scale, shift); });
    } else {
      if (!p.in_z) return;
      const Vector8 a(p.a + channel);
      Vector8 scale = a, shift = a, b = a, c = a;  // used only if given
      if (!p.in_y && p.in_scale) scale = Vector8(p.in_scale + channel), shift = Vector8(p.in_shift + channel);
      if (p.b) b = Vector8(p.b + channel), c = Vector8(p.c + channel);
      const uint32_t z_base = ring + p.z_offset, y_base = ring + p.y_offset;
      each_input(turn, images, [&](int, uint32_t at, int64_t) {
        float g[8], z[8];
        unpack<T>(g, load_shared(base + at));
        unpack<T>(z, load_shared(z_base + at));
        if (p.in_y) {
          float y[8];
          unpack<T>(y, load_shared(y_base + at));
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] = y[i] <= 0.f ? 0.f : g[i];
        } else if (p.in_scale) {
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] = scale.v[i] * z[i] + shift.v[i] <= 0.f ? 0.f : g[i];
        }
        if (p.b) {
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] = a.v[i] * g[i] + (b.v[i] * z[i] + c.v[i]);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) g[i] *= a.v[i];
        }
        store_shared(base + at, pack<T>(g));
      });
    }
  }
  __device__ __forceinline__ void transform_side(uint32_t base, const Turn& turn, int images) const {
    if (!p.side_scale || thread % kSlots >= chunks) return;
    const int channel = own_channel();
    const Vector8 scale(p.side_scale + channel), shift(p.side_shift + channel);
    each_output(turn, images, [&](int, uint32_t at, int64_t) { activate(base + at, scale, shift); });
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
  // First input pixel of a lane's row of unit u. What lies behind the last unit or position reads another one, of the
  // same bank if there is one.
  __device__ __forceinline__ int unit_pixel(int u) const {
    u = u < p.units * p.streams ? u : 0;
    const int stream = divide(u, p.unit_magic);
    const int column = (u - stream * p.units) * kUnit + lane % 8;
    return stream * p.pitch + kInStride * (column < p.positions ? column : max(column - kUnit, 0));
  }

  // First input pixel of the lane's row of a tile.
  __device__ __forceinline__ int tile_pixel(int tile) const { return unit_pixel(2 * tile + lane / 8 % 2); }

  // `in_row`: the first of `rows`, some of which the image may not have. `pixel`: `tile_pixel`.
  __device__ __forceinline__ void convolve(float (&sum)[kOutputs][2][4], const Weights (&weights)[2], const Rows& rows,
                                           int in_row, int pixel) const {
    if constexpr (Q == 1) {
      const uint32_t two_taps = place(pixel + lane / 16, 2 * pair, kInStride);
      const uint32_t one_tap = place(pixel + 2, 2 * pair, kInStride);
#pragma unroll
      for (int i = 0; i < kInRows; ++i) {
        if (!has_input_row(in_row + i)) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // the pair's second chunk is 16 bytes off
          uint32_t a[4], last[2];
          load_matrices(a, rows.at[i] + (two_taps ^ 16 * j));
          if constexpr (kShifts == 3) {
            load_matrices(last, rows.at[i] + (one_tap ^ 16 * j));
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
      uint32_t offset[kShifts][kPairs];
#pragma unroll
      for (int s = 0; s < kShifts; ++s) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) offset[s][k] = place(pixel + s, band() + 2 * k + lane / 16, kInStride);
      }
#pragma unroll
      for (int i = 0; i < kInRows; ++i) {
        if (!has_input_row(in_row + i)) continue;
#pragma unroll
        for (int s = 0; s < kShifts; ++s) {
#pragma unroll
          for (int k = 0; k < kPairs; ++k) {
            uint32_t a[4];
            load_matrices(a, rows.at[i] + offset[s][k]);
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

  // dweight: the two input chunks of a warp, and its share of the positions.
  __device__ __forceinline__ int first_in_chunk() const {
    return Q == 1 ? 2 * pair : band() + (Q == 2 ? 0 : 2 * (Q == 4 ? part % 2 : part));
  }
  __device__ __forceinline__ int split() const { return Q <= 2 ? part : Q == 4 ? part / 2 : 0; }

  // Adds the products of one tile's dz with the input at the outputs' places. The operands' rows are positions.
  __device__ __forceinline__ void add_dweight(Gradient& gradient, const Rows& rows, uint32_t side, int in_row,
                                              int tile) const {
    const int in_chunk = first_in_chunk();
    uint32_t b[kOutputs][4];  // [2 * input chunk + half of the positions]
    const uint32_t first = place((16 * tile + lane % 16) * kOutStride, in_chunk + lane / 16, kOutStride);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const uint32_t row = side + o / kOutStride * p.out_pixels * kPixelBytes;
      load_transposed(b[o], row + (first ^ o % kOutStride * kPixelBytes));
    }
    const int pixel = unit_pixel(2 * tile + lane / 16);
    if constexpr (Q == 1) {
      const uint32_t two_taps = place(pixel + lane / 8 % 2, 2 * pair, kInStride);  // two shifts of 8 channels
      const uint32_t one_tap = place(pixel + 2, 2 * pair, kInStride);              // twice the same
#pragma unroll
      for (int i = 0; i < kInRows; ++i) {
        if (!has_input_row(in_row + i)) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // the pair's second chunk is 16 bytes off
          uint32_t a[4], last[4];
          load_transposed(a, rows.at[i] + (two_taps ^ 16 * j));
          if constexpr (kShifts == 3) load_transposed(last, rows.at[i] + (one_tap ^ 16 * j));
          const uint32_t(&one)[4] = kShifts == 3 ? last : a;
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            const int y = tap_row(G, i, o / kOutStride);
            if (!is_tap(y)) continue;
            if (kOutStride == 1 || o % 2 == 1) {
              Mma<T>::k16(gradient.pair[j][y], a[0], a[1], a[2], a[3], b[o][2 * j], b[o][2 * j + 1]);
            }
            if (kOutStride == 1 || o % 2 == 0) {
              Mma<T>::k16(gradient.single[j][y], one[0], one[1], one[2], one[3], b[o][2 * j], b[o][2 * j + 1]);
            }
          }
        }
      }
    } else {
      uint32_t offset[kShifts];
#pragma unroll
      for (int s = 0; s < kShifts; ++s) offset[s] = place(pixel + s, 2 * pair + lane / 8 % 2, kInStride);
#pragma unroll
      for (int i = 0; i < kInRows; ++i) {
        if (!has_input_row(in_row + i)) continue;
#pragma unroll
        for (int s = 0; s < kShifts; ++s) {
          uint32_t a[4];  // 16 channels of dz
          load_transposed(a, rows.at[i] + offset[s]);
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
  __device__ __forceinline__ ScaleAndShift batch_norm(int channel) const {
    if (p.var) return scale_and_shift(p.gamma, p.beta, p.mean[channel], p.var[channel], p.eps, channel);
    return {p.gamma[channel], p.beta[channel], 0.f};
  }
  struct Nothing {};
  // What a pass keeps of the output's channels.
  using Columns =
      std::conditional_t<P == Pass::eval, Epilogue, std::conditional_t<P == Pass::forward, Statistics, Nothing>>;

  // Bit 2 * i + h: whether the lane's position of half h of the warp's tile i is one to count.
  __device__ __forceinline__ uint32_t counted(int images) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 2 * kWarpTiles; ++i) {
      const int unit = 2 * (part + kParts * (i / 2)) + i % 2, stream = divide(unit, p.unit_magic);
      const int column = column0 + (unit - stream * p.units) * kUnit + lane / 4;
      bits |= (stream < images && column < p.out_w) << i;
    }
    return bits;
  }

  // What the 16 positions of a tile make, all of which have a place: those outside the image are not copied out.
  // `inside`: bit h, whether to count the positions of half h.
  __device__ __forceinline__ void finish(const float (&sum)[kOutputs][2][4], Columns& columns, uint32_t inside,
                                         uint32_t out, int out_row, int tile) const {
    if constexpr (P == Pass::forward) {
      if (p.stats) count(sum, columns, inside, out_row);
    }
    out += 16 * tile * kOutStride * kPixelBytes;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int c = 0; c < kOutStride; ++c) {
        const uint32_t to = out + place(lane / 4 * kOutStride + c, 2 * pair + j, kOutStride) + lane % 4 * 4;
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          const float(&total)[4] = sum[r * kOutStride + c][j];
          const uint32_t row = to + r * p.out_pixels * kPixelBytes;
          store_result<0>(row, total[0], total[1], columns, j);
          store_result<kUnit * kOutStride * kPixelBytes>(row, total[2], total[3], columns, j);
        }
      }
    }
  }
  template <int kOffset>
  __device__ __forceinline__ void store_result(uint32_t at, float v0, float v1, const Columns& columns, int j) const {
    if constexpr (P == Pass::eval) {
      v0 = v0 * columns.scale[j][0] + columns.shift[j][0];
      v1 = v1 * columns.scale[j][1] + columns.shift[j][1];
      if (p.side) {
        const float2 residual = unpack<T>(load_shared_word<kOffset>(at));
        v0 += residual.x, v1 += residual.y;
      }
      store_shared_word<kOffset>(at, pack_relu<T>(v0, v1));
    } else {
      store_shared_word<kOffset>(at, pack<T>(v0, v1));
    }
  }

  __device__ __forceinline__ void count(const float (&sum)[kOutputs][2][4], Statistics& statistics, uint32_t inside,
                                        int out_row) const {
    if (statistics.n + statistics.pending == 0.f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&first)[4] = sum[0][i / 2];
        statistics.of[i / 2][i % 2].origin = inside & 1 ? first[i % 2] : first[2 + i % 2];
      }
    }
    const int rows = min(kStepRows, p.out_h - out_row);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!(inside & 1 << h)) continue;
      statistics.pending += rows;
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        if (r >= rows) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          statistics.sums[i / 2][i % 2].add(sum[r][i / 2][2 * h + i % 2], statistics.of[i / 2][i % 2].origin);
        }
      }
    }
  }
  // At once, since the first value is a poor origin if it is far off the others, then once there are so many.
  static __device__ __forceinline__ void take_sums(Statistics& statistics, float least) {
    if (statistics.pending < (statistics.n == 0.f ? 1.f : least)) return;
    const float share = statistics.pending * reciprocal(statistics.n + statistics.pending);
    const float inverse = reciprocal(statistics.pending);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      statistics.of[i / 2][i % 2].take(statistics.sums[i / 2][i % 2], statistics.n, share, inverse);
      statistics.sums[i / 2][i % 2] = Sums();
    }
    statistics.n += statistics.pending;
    statistics.pending = 0.f;
  }

  // `odd` is no longer zero once a NaN or an infinity was stored.
  __device__ __forceinline__ void store_output(uint32_t out, const Turn& turn, int images, uint32_t& odd) const {
    char* start = static_cast<char*>(p.out) + output_start(turn);
    each_output(turn, images, [&](int, uint32_t at, int64_t to) {
      const uint4 v = load_shared(out + at);
      *reinterpret_cast<uint4*>(start + to) = v;
      odd = times_zero_plus<T>(v.x, times_zero_plus<T>(v.y, times_zero_plus<T>(v.z, times_zero_plus<T>(v.w, odd))));
    });
  }

  // Of the lane's two values the one to keep, added to the same one of the lane `step` further, which keeps the other.
  static __device__ __forceinline__ float halved(bool second, float a, float b, int step) {
    return (second ? b : a) + __shfl_xor_sync(~0u, second ? a : b, step);
  }
  // Over the lanes with the same columns, which divide the four columns among themselves, then over the warps with the
  // same channels.
  __device__ __forceinline__ void store_statistics(const Statistics& statistics) const {
    // Lanes are added from the origin of one that has values: if it is far off the mean of all, its own values are what
    // most of the squares come from, so that little cancels. A lane without values adds nothing: its origin is that of
    // another position, which counts, or zero, and finite as nothing had to be repaired.
    const int some = __ffs(__ballot_sync(~0u, statistics.n > 0.f)) - 1;
    float origin[4], sum[4], squares[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Moments& of = statistics.of[i / 2][i % 2];
      origin[i] = __shfl_sync(~0u, of.origin, (some & ~3) + lane % 4);
      const float mean = (of.origin - origin[i]) + of.mean;
      sum[i] = statistics.n * mean;
      squares[i] = of.m2 + sum[i] * mean;
    }
    float n = statistics.n;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) n += __shfl_xor_sync(~0u, n, step);
    const bool second = lane & 4, odd = lane & 8;
    const auto total = [&](const float(&of)[4]) {
      const float own = halved(odd, halved(second, of[0], of[2], 4), halved(second, of[1], of[3], 4), 8);
      return own + __shfl_xor_sync(~0u, own, 16);
    };
    const float own_sum = total(sum), own_mean = n > 0.f ? own_sum * reciprocal(n) : 0.f;
    const float own_origin = second ? (odd ? origin[3] : origin[2]) : (odd ? origin[1] : origin[0]);
    Moments own{own_origin, own_mean, total(squares) - own_sum * own_mean};

    const auto exchange = [&](int from) { return ring + ((from * kPairWarps + pair) * 16 + lane) * 16; };
    const int chunk = 2 * pair + second;
    const bool has = chunk < chunks && lane < 16;
    if (has && part > 0) {
      store_shared(exchange(part - 1), make_uint4(__float_as_uint(n), __float_as_uint(own.origin),
                                                  __float_as_uint(own.mean), __float_as_uint(own.m2)));
    }
    __syncthreads();
    if (!has || part > 0) return;
#pragma unroll 1
    for (int other_part = 0; other_part < kParts - 1; ++other_part) {
      const uint4 v = load_shared(exchange(other_part));
      const Moments other{__uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
      own.merge(n, __uint_as_float(v.x), other);
      n += __uint_as_float(v.x);
    }
    float* to = p.stats + static_cast<int64_t>(blockIdx.y) * 4 * p.C + channel0 + chunk * 8 + lane % 4 * 2 + odd;
    to[0] = n, to[p.C] = own.origin, to[2 * p.C] = own.mean, to[3 * p.C] = own.m2;
  }

  // Into shared memory as (out channel, in channel, tap), the second half of the positions added to the first, and
  // out: as the part's partial sums, or as dweight itself where there is one part.
  __device__ __forceinline__ void store_dweight(const Gradient& gradient) const {
    const int first_row = P == Pass::dweight && Q == 8 ? 32 * blockIdx.z : 0;
    const int rows = min(chunks * 8, P == Pass::dweight && Q == 8 ? first_row + 32 : 64) - first_row;
    const int row = p.D * 9, pitch = p.D % 8 == 0 ? row + 4 : row;  // spreads the rows over the banks
    const auto put = [&](int out, int in, int tap, float value) {
      const int i = in - divide(out, p.group_magic) * p.D;
      if (out >= chunks * 8 || i < 0 || i >= p.D) return;
      const uint32_t to = ring + ((out - first_row) * pitch + i * 9 + tap) * 4;
      if (split()) value += __uint_as_float(load_shared_word(to));
      store_shared_word(to, __float_as_uint(value));
    };
    // two columns, the lanes in an order that spreads them over the banks
    const auto put_two = [&](int out, int in, int tap, const float* values) {
      const bool swap = lane / 2 % 2;
      put(out, in + swap, tap, swap ? values[1] : values[0]);
      put(out, in + !swap, tap, swap ? values[0] : values[1]);
    };
    for (int turn = 0; turn < kSplits; ++turn) {
      __syncthreads();
      if (!active() || split() != turn || rows <= 0) continue;
      if constexpr (Q == 1) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int out = (2 * pair + j) * 8 + lane / 4, in = (2 * pair + j) * 8 + lane % 4 * 2;
#pragma unroll
          for (int y = 0; y < 3; ++y) {
            // s1: the fragment table is turned by 180 degrees
            const int tap = 3 * (G == Geometry::s1 ? 2 - y : y);
            put_two(out, in, tap + 2, gradient.pair[j][y]);
            put_two(out, in, tap + (G == Geometry::s1 ? 1 : 0), gradient.pair[j][y] + 2);
            put_two(out, in, tap + (G == Geometry::s1 ? 0 : 1), gradient.single[j][y]);
          }
        }
      } else {
#pragma unroll
        for (int t = 0; t < 9; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            put_two(pair * 16 + i % 2 * 8 + lane / 4, (first_in_chunk() + i / 2) * 8 + lane % 4 * 2,
                    G == Geometry::s1 ? 8 - t : t, gradient.full[t][i / 2] + i % 2 * 2);
          }
        }
      }
    }
    __syncthreads();
    if (rows <= 0) return;
    const int64_t begin = static_cast<int64_t>(channel0 + first_row) * row;
    float* partial = p.dweight_partial + static_cast<int64_t>(blockIdx.y) * p.C * row + begin;
    T* result = static_cast<T*>(p.dweight) + begin;
    for (int i = thread; i < rows * row / 4; i += kThreads) {
      const uint4 word = load_shared(ring + (i + (pitch == row ? 0 : divide(i / 2, p.row_magic))) * 16);
      float v[4] = {__uint_as_float(word.x), __uint_as_float(word.y), __uint_as_float(word.z), __uint_as_float(word.w)};
      if (isnan(v[0]) || isnan(v[1]) || isnan(v[2]) || isnan(v[3])) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = 4 * i + e;
          v[e] = exact_dweight(channel0 + first_row + at / row, at % row / 9, at % 9);
        }
      }
      if (p.dweight) {
        *reinterpret_cast<uint2*>(result + 4 * i) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
      } else {
        *reinterpret_cast<float4*>(partial + 4 * i) = make_float4(v[0], v[1], v[2], v[3]);
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
      const float y = p.in_y ? element(p.in_y, at) : p.in_scale ? p.in_scale[channel] * z + p.in_shift[channel] : 1.f;
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
    for (int n = image0; n < image_end; ++n) {
      for (int row = out_begin; row < min(out_end, p.out_h); ++row) {
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
        const int out = kForward ? channel : group + i, in = kForward ? i : channel - group;
        const int64_t weight = int64_t{out} * p.D * 9 + in * p.weight_in + tap * p.weight_tap;
        sum += exact_input(n, y, x, group + i) * element(p.weight, weight * 2);
      }
    }
    if constexpr (P == Pass::eval) {
      const ScaleAndShift bn = batch_norm(channel);
      sum = sum * bn.scale + bn.shift;
      if (p.side) sum += element(p.side, output_at(n, row, column, channel));
      sum = relu(sum);
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
    each_pixel(8 * part + lane / 4, 8 * kParts, [&](int n, int row, int column) {
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
    Columns columns{};
    uint32_t odd = 0;
    const bool convolves = kHasConv && p.out;
    if constexpr (kHasConv) {
      if (convolves) load_weights(weights);
    }
    if constexpr (P == Pass::eval) {
      if (active()) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (2 * pair + j >= chunks) break;
          const int channel = channel0 + (2 * pair + j) * 8 + lane % 4 * 2;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const ScaleAndShift bn = batch_norm(channel + e);
            columns.scale[j][e] = bn.scale, columns.shift[j][e] = bn.shift;
          }
        }
      }
    }
    const bool adds = kHasDweight && (p.dweight || p.dweight_partial);

    // the groups of the ring: before this turn's and this turn's; this step's part of the side
    uint32_t before = ring + 2 * p.group_bytes, now = ring, side = ring + p.side_offset;
    int present = 0;  // streams that hold an image
    uint32_t inside = 0;
    __syncthreads();
    Turn turn = first_turn(image0);
    fetch_input(now, turn);
    do {
      const Turn next_turn = after(turn);
      const uint32_t next = 3 * (ring + p.group_bytes) - before - now;
      const uint32_t next_side = 2 * (ring + p.side_offset) + p.side_bytes - side;
      if (!completes_step(turn)) {
        present = images(turn);
        if (P == Pass::forward && p.stats) inside = counted(present);
      }
      wait_copies();
      transform_input(now, turn, present);
      if (p.side && completes_step(turn)) transform_side(side, turn, present);
      __syncthreads();
      if (next_turn.image < image_end) {
        fetch_input(next, next_turn);
        if (p.side && completes_step(next_turn)) fetch_side(next_side, next_turn);
      }
      if (completes_step(turn)) {
        const uint32_t out = P == Pass::eval && p.side ? side : ring + p.out_offset;
        if (active()) {
          const Rows rows = input_rows(before, now);
          const int in_row = turn.in_row() - kGroupRows, units = present * p.units;
          if constexpr (kHasConv) {
            if (convolves) {
#pragma unroll 1
              for (int i = 0; i < kWarpTiles; ++i) {
                const int tile = part + kParts * i;
                if (2 * tile >= units) break;
                float sum[kOutputs][2][4] = {};
                convolve(sum, weights, rows, in_row, tile_pixel(tile));
                finish(sum, columns, inside >> 2 * i, out, turn.out_row, tile);
              }
              if constexpr (P == Pass::forward) {
                if (p.stats) take_sums(columns, 32.f);
              }
            }
          }
          if constexpr (kHasDweight) {
            if (adds) {
              for (int tile = split(); 2 * tile < units; tile += kSplits) {
                add_dweight(gradient, rows, side, in_row, tile);
              }
            }
          }
        }
        if (convolves) {
          __syncthreads();
          store_output(out, turn, present, odd);
        }
      }
      turn = next_turn;
      before = now, now = next, side = next_side;
    } while (turn.image < image_end);
    if constexpr (kHasConv) {
      if (__syncthreads_or(odd != 0)) {
        repair();
        if constexpr (P == Pass::forward) {
          if (p.stats && active()) columns = statistics_of_output();
        }
      }
    }
    if constexpr (P == Pass::forward) {
      if (p.stats) {
        take_sums(columns, 1.f);
        store_statistics(columns);
      }
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

}  // namespace resnext_kernels::cuda

// One kernel, visible under its plain name; plan.cpp composes the same names.
#define RK_DEFINE_CONV(T, DTYPE, GEOMETRY, Q, PASS)                                                                    \
  extern "C" __global__ void __launch_bounds__(                                                                        \
      resnext_kernels::cuda::kThreads, resnext_kernels::cuda::blocks_held::conv(Q, resnext_kernels::cuda::Pass::PASS)) \
      conv_##DTYPE##_##GEOMETRY##_q##Q##_##PASS(const __grid_constant__ resnext_kernels::cuda::ConvParams p) {         \
    resnext_kernels::cuda::conv<T, Q, resnext_kernels::cuda::Geometry::GEOMETRY, resnext_kernels::cuda::Pass::PASS>(   \
        p);                                                                                                            \
  }
