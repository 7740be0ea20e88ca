// The register tiles of the grouped 3x3 convolution, for one instruction set.
//
// Lanes of a vector are neighbouring output channels. The nine taps of an input channel need its value in all lanes of
// its group, which is a broadcast from memory when a group fills a vector, and a permutation of the loaded vector when
// several groups share one:
//
//     4 channels a group, 8 lanes       pixel  | a0 a1 a2 a3 | b0 b1 b2 b3 |      groups a and b
//                                       ci = 1 | a1 a1 a1 a1 | b1 b1 b1 b1 |
//
// A tile is one vector of channels times A neighbouring pixels of a row, accumulated in registers. For one (ky, ci) it
// holds the three weights of kx and walks the columns once, so a value read serves three FMAs:
//
//     q = 0 1 2 3 4 ...    acc[q - kx] += w[kx] * a[q]
#pragma once

#include <type_traits>

#include "simd.h"

namespace resnext_kernels::cpu::RK_ISA {

constexpr int kTileColumns = 14;                   // of any tile, at most
constexpr int kTile = kRegisters == 16 ? 10 : 14;  // accumulators; + 3 weights + index + input

// How an input channel reaches the lanes of its group: from memory, from memory for two interleaved groups at once, by
// a permutation within four lanes, by one within eight, by any.
enum class Access { broadcast, two, quads, octets, lanes };

// Which accumulator the value of column q feeds through the tap kx, as the tile counts columns.
enum class Map {
  stride1,      // conv, stride 1, and its transpose: q - kx
  stride2,      // conv, stride 2: (q - kx) / 2 where it divides
  transposed2,  // transpose of stride 2: 2 q + kx - 1
};

template <Map M, int A>
constexpr int kColumnsRead = M == Map::stride1   ? A + 2
                             : M == Map::stride2 ? 2 * A + 1
                                                 : A / 2 + 1;

template <Map M, int A>
constexpr int accumulator(int q, int kx) {
  const int at = M == Map::stride1 ? q - kx : M == Map::stride2 ? ((q - kx) % 2 ? -1 : (q - kx) / 2) : 2 * q + kx - 1;
  return at < A ? at : -1;
}

// Where the A values of a tile go: pixel i < count to out + i * stride, as they are or, with a scale, as
// relu(scale * value + shift [+ residual]); without one, residual is added alone. Row r of a tile of several rows is
// row_stride * r further.
template <class T>
struct TileOutOf {
  T* out = nullptr;  // null: only `values`
  int64_t stride = 0, count = 0;
  const float* scale = nullptr;
  const float* shift = nullptr;
  const T* residual = nullptr;
  bool past_cache = false;
  int64_t row_stride = 0;
  float* values = nullptr;  // where they go as they are, for who reads them again: [row][kTileColumns][lane]
};
using TileOut = TileOutOf<float>;

// At most kSpare of the A values are not written: a tile of whole pairs may have one too many.
template <int kSpare, int A, class T, class F>
RK_INLINE void emit_each(const TileOutOf<T>& to, T* out, F&& value) {
  const int n = (int)(to.count < A ? to.count : A);
  if (std::is_same<T, float>::value && to.past_cache) {
#pragma GCC unroll 64
    for (int i = 0; i < A; ++i)
      if (i < A - kSpare || i < n) stream(out + i * to.stride, value(i));
  } else {
#pragma GCC unroll 64
    for (int i = 0; i < A; ++i)
      if (i < A - kSpare || i < n) store(out + i * to.stride, value(i));
  }
}
template <int kSpare = 1, int A, class T>
RK_INLINE void emit(const TileOutOf<T>& to, const Vec (&values)[A], int64_t row = 0) {
  if (to.values) {
#pragma GCC unroll 64
    for (int i = 0; i < A; ++i) store(to.values + (row * kTileColumns + i) * kLanes, values[i]);
  }
  if (!to.out) return;
  T* const out = to.out + row * to.row_stride;
  const T* const residual = to.residual ? to.residual + row * to.row_stride : nullptr;
  const auto emit_all = [&](auto value) RK_INLINE_LAMBDA { emit_each<kSpare, A>(to, out, value); };
  if (!to.scale && residual)
    return emit_all([&](int i) RK_INLINE_LAMBDA { return values[i] + load(residual + i * to.stride); });
  if (!to.scale) return emit_all([&](int i) RK_INLINE_LAMBDA { return values[i]; });
  const Vec scale = load(to.scale), shift = load(to.shift);
  if (residual)
    emit_all([&](int i) RK_INLINE_LAMBDA { return relu(values[i] * scale + shift + load(residual + i * to.stride)); });
  else
    emit_all([&](int i) RK_INLINE_LAMBDA { return relu(values[i] * scale + shift); });
}

// One row of input that a row of output reads: the first column of the tile and the three weights of its ky.
struct RowTap {
  const float* input;
  const float* weight;
};

template <Access X>
RK_INLINE Vec read(const float* pixel, int64_t ci, IVec index) {
  if (X == Access::broadcast) return broadcast(pixel[ci]);
  return X == Access::quads ? spread_quads(load(pixel), (int)ci) : permute(load(pixel), index);
}

// Hides where a value comes from, so that what follows from it is computed or loaded anew: the compiler would rather
// hold it in registers, of which there are none to spare, or on the stack.
template <class T>
RK_INLINE T fresh(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A pixel's value for several channels in turn, kFrom first: read once, then permuted in a register.
template <Access X, int kFrom>
struct SpreadInput {
  const float* pixel;
  Vec value;

  RK_INLINE explicit SpreadInput(const float* p) : pixel(p), value{} {
    if (X == Access::broadcast) return;
    value = load(pixel);
    if (X == Access::octets) value = spread_octets(value, kFrom / 4);
    value = in_register(value);
  }
  RK_INLINE Vec at(int i, IVec lanes) const {
    if (X == Access::broadcast) return broadcast(pixel[kFrom + i]);
    return X == Access::lanes ? permute(value, lanes) : spread_quads(value, (kFrom + i) % 4);
  }
};

// f(ci) for the din input channels of a group. Groups of four: bound and ci become constants, as permutations need.
template <Access X, class F>
RK_INLINE void for_inputs(int64_t din, F&& f) {
  if (X == Access::quads) {
#pragma GCC unroll 4
    for (int ci = 0; ci < 4; ++ci) f(ci);
  } else {
    for (int64_t ci = 0; ci < din; ++ci) f(ci);
  }
}

// What a lane holds: a float32, or two bfloat16, neighbouring input channels.
enum class Lane { single, pair };
template <Lane L>
RK_INLINE Vec add_product(Vec sum, Vec weight, Vec value) {
  return L == Lane::pair ? add_pair_products(sum, weight, value) : sum + weight * value;
}

template <Access X, Map M, int A, Lane L>
void conv_tile(const RowTap* taps, int tap_count, int64_t pixel, int64_t din, const IVec* index, const TileOut& to) {
  // A short row has too few sums to wait for one another: one for each kx then.
  constexpr int kSums = 3 * A + 5 <= kRegisters ? 3 : 1;
  Vec acc[kSums][A] = {};
  for (int t = 0; t < tap_count; ++t) {
    for_inputs<X>(din, [&](int64_t ci) RK_INLINE_LAMBDA {
      const float* weight = taps[t].weight + ci * (9 * kLanes);
      const Vec w[3] = {load(weight), load(weight + kLanes), load(weight + 2 * kLanes)};
      const IVec lanes = X == Access::lanes ? index[ci] : IVec{};
      const float* input = fresh(taps[t].input);
#pragma GCC unroll 64
      for (int q = 0; q < kColumnsRead<M, A>; ++q, input += pixel) {
        const Vec value = read<X>(input, ci, lanes);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          const int at = accumulator<M, A>(q, kx);
          Vec& sum = acc[kx % kSums][at >= 0 ? at : 0];
          if (at >= 0) sum = add_product<L>(sum, w[kx], value);
        }
      }
    });
  }
#pragma GCC unroll 64
  for (int i = 0; i < A; ++i)
    if (kSums == 3) acc[0][i] += acc[1 % kSums][i] + acc[2 % kSums][i];
  emit(to, acc[0]);
}

// Any stride and dilation: a list of taps, one FMA per value read; accumulator i reads `step` floats after i - 1.
template <Access X, int A, Lane L>
void tap_tile(const RowTap* taps, int tap_count, int64_t step, int64_t din, const IVec* index, const TileOut& to) {
  Vec acc[A] = {};
  for (int t = 0; t < tap_count; ++t) {
    for_inputs<X>(din, [&](int64_t ci) RK_INLINE_LAMBDA {
      const Vec w = load(taps[t].weight + ci * (9 * kLanes));
      const IVec lanes = X == Access::lanes ? index[ci] : IVec{};
      const float* input = fresh(taps[t].input);
#pragma GCC unroll 64
      for (int i = 0; i < A; ++i, input += step) acc[i] = add_product<L>(acc[i], w, read<X>(input, ci, lanes));
    });
  }
  emit(to, acc);
}

// The tiles by number of accumulators.
using Tile = void (*)(const RowTap*, int, int64_t, int64_t, const IVec*, const TileOut&);
struct Tiles {
  Tile by_size[kTile + 1];
};

template <Access X, Map M, int A, Lane L>
constexpr void fill_conv_tiles(Tiles& tiles) {
  if constexpr (A > 0) {
    tiles.by_size[A] = conv_tile < X, M, M == Map::transposed2 ? (A + 1) / 2 * 2 : A, L > ;
    fill_conv_tiles<X, M, A - 1, L>(tiles);
  }
}
template <Access X, int A, Lane L>
constexpr void fill_tap_tiles(Tiles& tiles) {
  if constexpr (A > 0) {
    tiles.by_size[A] = tap_tile<X, A, L>;
    fill_tap_tiles<X, A - 1, L>(tiles);
  }
}

template <Access X, Lane L>
const Tiles& tiles_for(bool transposed, int64_t stride, int64_t dilation) {
  struct All {
    Tiles stride1{}, stride2{}, transposed2{}, any{};
    constexpr All() {
      fill_conv_tiles<X, Map::stride1, kTile, L>(stride1);
      fill_conv_tiles<X, Map::stride2, kTile, L>(stride2);
      if constexpr (L == Lane::single) fill_conv_tiles<X, Map::transposed2, kTile, Lane::single>(transposed2);
      fill_tap_tiles<X, kTile, L>(any);
    }
  };
  static constexpr All all;
  if (dilation != 1 || stride > 2) return all.any;
  if (stride == 1) return all.stride1;
  return transposed ? all.transposed2 : all.stride2;
}

inline const Tiles& tiles_for(Access access, bool transposed, int64_t stride, int64_t dilation) {
  switch (access) {
    case Access::broadcast: return tiles_for<Access::broadcast, Lane::single>(transposed, stride, dilation);
    case Access::quads: return tiles_for<Access::quads, Lane::single>(transposed, stride, dilation);
    default: return tiles_for<Access::lanes, Lane::single>(transposed, stride, dilation);  // octets too
  }
}

// The forward tiles for pairs.
inline const Tiles& pair_tiles_for(Access access, int64_t stride, int64_t dilation) {
  return access == Access::broadcast ? tiles_for<Access::broadcast, Lane::pair>(false, stride, dilation)
                                     : tiles_for<Access::lanes, Lane::pair>(false, stride, dilation);
}

}  // namespace resnext_kernels::cpu::RK_ISA
