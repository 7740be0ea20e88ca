// Winograd's pairs (winograd.h) for groups of four channels, of which a vector holds four.
//
// A pair of outputs of such a vector takes so few products that writing V to memory and reading it back costs as much
// as they do. So V stays in registers: a register tile is two pairs of columns of one vector of channels and walks down
// the rows. What an input row adds to the three output rows that read it is summed for all four products at once:
//
//     d0 ... d5  ->  V0 ... V3 of either pair  ->  channel ci in all lanes of its group  ->  m[ky][pair][product]
//
// The input is read where it lies or, at the image's edges and where it has to be converted or computed first, from a
// copy of the tile's window in the first-level cache. The gradients dx and dweight share a copy of e.
// Pairs of bfloat16 channels walk down the rows in the same way, but are multiplied as the sum is written.
#pragma once

#include <type_traits>

#include "plan.h"
#include "pointwise.h"
#include "tiles.h"
#include "winograd.h"

namespace resnext_kernels::cpu::RK_ISA {

constexpr int kNarrow = 4;             // channels of a group
constexpr int kNarrowPairs = 2;        // of a register tile: 24 accumulators
constexpr int64_t kNarrowRows = 14;    // of a tile, at most
constexpr int64_t kNarrowColumns = 8;  // of a tile: two register tiles, which may share a copy
constexpr int64_t kNarrowCopy = (kNarrowRows + 2) * (kNarrowColumns + 2) * kLanes;  // floats

inline bool narrow_serves(const ConvProblem& p) {
  return winograd_serves(p) && p.din() == kNarrow && p.dout() == kNarrow;
}

// f(tile, the one after it) for the tiles of a window; `next` is the window after this one.
template <class F>
RK_INLINE void for_narrow_tiles(const Window& window, const Window& next, F&& f) {
  const int64_t bands = ceil_div(window.rows, kNarrowRows), end = window.column + window.columns;
  for (int64_t band = 0; band < bands; ++band) {
    const auto tile_at = [&](const Window& in, int64_t band, int64_t column) {
      const int64_t first = in.row + band * in.rows / bands, last = in.row + (band + 1) * in.rows / bands;
      return Window{in.n, first, last - first, column, min(kNarrowColumns, in.column + in.columns - column)};
    };
    for (int64_t column = window.column; column < end; column += kNarrowColumns)
      f(tile_at(window, band, column), column + kNarrowColumns < end ? tile_at(window, band, column + kNarrowColumns)
                                       : band + 1 < bands            ? tile_at(window, band + 1, window.column)
                                                                     : tile_at(next, 0, next.column));
  }
}

// What a tile reads that the one to its left has not read.
inline Window new_columns(const Window& tile) {
  return {tile.n, tile.row - 1, tile.rows + 2, tile.column + 1, tile.columns};
}

// What a tile reads: the pixel left of the row above it, and the floats from row to row and from pixel to pixel.
struct NarrowInput {
  const float* data;
  int64_t row, pixel;
};

// A tile's window of one vector of channels, copied: value(offset) inside the image, zeros outside.
template <class F>
RK_INLINE NarrowInput copy_input(const Window& tile, int64_t H, int64_t W, int64_t C, int64_t channel, float* to,
                                 F&& value) {
  const int64_t left = tile.column - 1, count = round_up(tile.columns, 2) + 2;
  const NarrowInput input{to, count * kLanes, kLanes};
  const bool whole = left >= 0 && left + count <= W;
  for (int64_t row = tile.row - 1; row <= tile.row + tile.rows; ++row, to += input.row) {
    const int64_t first = ((tile.n * H + row) * W + left) * C + channel;
    const bool outside = row < 0 || row >= H;
    if (whole && !outside)
      for (int64_t q = 0; q < count; ++q) store(to + q * kLanes, value(first + q * C));
    else
      for (int64_t q = 0; q < count; ++q)
        store(to + q * kLanes, outside || left + q < 0 || left + q >= W ? Vec{} : value(first + q * C));
  }
  return input;
}

// The same, in place where it can be read there; `in_place` is null where nothing can.
template <class F>
RK_INLINE NarrowInput input_around(const float* in_place, const Window& tile, int64_t H, int64_t W, int64_t C,
                                   int64_t channel, int lanes, float* copy, F&& value) {
  if (lanes < kLanes) return copy_input(tile, H, W, C, channel, copy, value(channel, FirstLanes{lanes}));
  if (in_place && tile.column > 0 && tile.column + round_up(tile.columns, 2) < W)
    return {in_place + ((tile.n * H + tile.row - 1) * W + tile.column - 1) * C + channel, W * C, C};
  return copy_input(tile, H, W, C, channel, copy, value(channel, AllLanes{}));
}

// Walks down the input rows of a tile: add(first tap, last tap) for what a row adds to the output rows that it meets
// with these, then next(output row), which is complete, or negative.
template <class F, class G>
RK_INLINE void walk_down(int64_t rows, Edges edges, F&& add, G&& next) {
  constexpr std::integral_constant<int, 0> kTap0;
  constexpr std::integral_constant<int, 1> kTap1;
  constexpr std::integral_constant<int, 2> kTap2;
  for (int64_t row = -2; row < rows; next(row++)) {
    if (row >= 0 && row < rows - 2)
      add(kTap0, kTap2);
    else if (row == -1)
      add(kTap0, kTap1);
    else if (row == rows - 2)
      add(kTap1, kTap2);
    else if (row == -2 && !edges.top)
      add(kTap0, kTap0);
    else if (row == rows - 1 && !edges.bottom)
      add(kTap2, kTap2);
  }
}

// Product i of V from the four columns of a pair.
RK_INLINE Vec pair_value(const float* d, int64_t pixel, int i) {
  const Vec d1 = load(d + pixel), d2 = load(d + 2 * pixel);
  return i == 0 ? load(d) - d2 : i == 1 ? d1 + d2 : i == 2 ? d2 - d1 : d1 - load(d + 3 * pixel);
}

// What an input row adds to m[ky], the output rows that it meets with its taps kFirst ... kLast.
template <int kFirst, int kLast, int P>
RK_INLINE void add_narrow_row(Vec (&m)[3][P][4], const float* input, int64_t pixel, const float* weight) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vec v[P];
#pragma GCC unroll 2
    for (int pair = 0; pair < P; ++pair) v[pair] = pair_value(input + 2 * pair * pixel, pixel, i);
#pragma GCC unroll 4
    for (int ci = 0; ci < kNarrow; ++ci) {
      Vec value[P];
#pragma GCC unroll 2
      for (int pair = 0; pair < P; ++pair) value[pair] = spread_quads(v[pair], ci);
#pragma GCC unroll 3
      for (int ky = kFirst; ky <= kLast; ++ky) {
        const Vec u = in_register(load(weight + (ky * kNarrow + ci) * kPairFloats + i * kLanes));
#pragma GCC unroll 2
        for (int pair = 0; pair < P; ++pair) m[ky][pair][i] += u * value[pair];
      }
    }
  }
}

// Two pairs or, at the right end, one. `zeros` stays zero as long as all results are finite, which they are only if V
// and U are. Asks for `lines` of what is ahead with every row.
template <int P>
void narrow_tile(const NarrowInput& input, int64_t rows, Edges edges, const float* weight, const TileOut& to,
                 Vec& zeros, Ahead& ahead, int64_t lines) {
  Vec m[3][P][4] = {};  // of the output rows r, r - 1, r - 2
  Vec zero = zeros;
  const float* d = input.data;
  const auto add = [&](auto first, auto last)
                       RK_INLINE_LAMBDA { add_narrow_row<first.value, last.value>(m, d, input.pixel, weight); };
  const auto next = [&](int64_t row) RK_INLINE_LAMBDA {
    if (row >= 0) {
      Vec y[2 * P];
#pragma GCC unroll 2
      for (int pair = 0; pair < P; ++pair) {
        const Vec(&sums)[4] = m[2][pair];
        y[2 * pair] = sums[0] + (sums[1] + sums[2]);
        y[2 * pair + 1] = (sums[1] - sums[2]) - sums[3];
        zero += y[2 * pair] * Vec{};
        zero += y[2 * pair + 1] * Vec{};
      }
      emit(to, y, row);
    }
#pragma GCC unroll 2
    for (int pair = 0; pair < P; ++pair)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) m[2][pair][i] = m[1][pair][i], m[1][pair][i] = m[0][pair][i], m[0][pair][i] = Vec{};
    d += input.row;
    ahead.fetch(lines);
  };
  walk_down(rows, edges, add, next);
  zeros = zero;
}

// run(register tile, edges, its results) for a block's register tiles of `columns` columns; `sink` as of UnitPass.
template <class F, class S>
RK_INLINE void for_register_tiles(const Window& tile, int64_t columns, int64_t H, int64_t b, const Block& block,
                                  const S& sink, F&& run) {
  alignas(64) float values[kNarrowRows * kTileColumns * kLanes];
  const Edges edges{tile.row == 0, tile.row + tile.rows == H};
  Window part = tile;
  for (const int64_t end = tile.column + tile.columns; part.column < end; part.column += part.columns) {
    part.columns = min(columns, end - part.column);
    TileOut to;
    sink.target(to, block, part.row, part.rows, part.column, 1, part.columns, values);
    run(part, edges, to);
    sink.finish(b, block, part.row, part.rows, part.column, 1, to);
  }
}

// How often the register tiles of a block ask for what is ahead.
inline int64_t fetches(const Window& tile, int64_t columns) {
  return ceil_div(tile.columns, columns) * (tile.rows + 2);
}

// A block by Winograd's pairs; input_of(register tile): what it reads.
template <class F, class S>
RK_INLINE void run_narrow(const Window& tile, int64_t H, int64_t b, const Block& block, const float* packed,
                          F&& input_of, Vec& zeros, Ahead& ahead, int64_t lines, const S& sink) {
  const float* const weight = packed + b * 3 * kNarrow * kPairFloats;
  for_register_tiles(tile, 2 * kNarrowPairs, H, b, block, sink,
                     [&](const Window& part, Edges edges, const TileOut& to) RK_INLINE_LAMBDA {
                       const auto run = part.columns > 2 ? narrow_tile<kNarrowPairs> : narrow_tile<1>;
                       run(input_of(part), part.rows, edges, weight, to, zeros, ahead, lines);
                     });
}

// ---- pairs of bfloat16 channels, as the sum is written: two lanes of input for a group's four outputs
// What an input row adds to m[ky], the output rows that it meets with its taps kFirst ... kLast.
template <int kFirst, int kLast, int A>
RK_INLINE void add_pair_row(Vec (&m)[3][A], const float* input, int64_t pixel, const float* weight, const IVec* index) {
  for (int pair = 0; pair < kNarrow / 2; ++pair, weight += 9 * kLanes) {
    const IVec lanes = index[pair];
    const float* d = fresh(input);
#pragma GCC unroll 16
    for (int q = 0; q < A + 2; ++q, d += pixel) {
      const Vec value = permute(load_partial(d, kLanes / 2), lanes);
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        if (q < kx || q - kx >= A) continue;
#pragma GCC unroll 3
        for (int ky = kFirst; ky <= kLast; ++ky)
          m[ky][q - kx] = add_pair_products(m[ky][q - kx], load(weight + (3 * ky + kx) * kLanes), value);
      }
    }
  }
}

template <int A>
void narrow_pair_tile(const NarrowInput& input, int64_t rows, Edges edges, const float* weight, const IVec* index,
                      const TileOut& to, Ahead& ahead, int64_t lines) {
  Vec m[3][A] = {};  // of the output rows r, r - 1, r - 2
  const float* d = input.data;
  const auto add = [&](auto first, auto last)
                       RK_INLINE_LAMBDA { add_pair_row<first.value, last.value>(m, d, input.pixel, weight, index); };
  const auto next = [&](int64_t row) RK_INLINE_LAMBDA {
    if (row >= 0) emit(to, m[2], row);
#pragma GCC unroll 16
    for (int i = 0; i < A; ++i) m[2][i] = m[1][i], m[1][i] = m[0][i], m[0][i] = Vec{};
    d += input.row;
    ahead.fetch(lines);
  };
  walk_down(rows, edges, add, next);
}

// ---- dweight, packed as [block][ky][ci][M0 M1 M2 M3][lane]
// One block, from the pairs of a tile: V of a and the three rows of e that each of its rows meets, which are zeros
// outside of the image. Two products at a time: 24 accumulators. Asks for `lines` of what is ahead with every row.
inline void narrow_weight_tile(const Window& tile, const NarrowInput& a, const NarrowInput& e, float* dweight,
                               Ahead& ahead, int64_t lines) {
  static constexpr int order[2][2] = {{0, 3}, {1, 2}};  // the first two multiply e itself
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vec acc[2][3][kNarrow] = {};
    const float *a_row = a.data + a.row, *e_row = e.data + e.pixel;
    for (int64_t r = 0; r < tile.rows; ++r, a_row += a.row, e_row += e.row) {
      if (half == 0) ahead.fetch(lines);
      const float *d = a_row, *above = e_row;
      for (int64_t column = 0; column < tile.columns; column += 2, d += 2 * a.pixel, above += 2 * e.pixel) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int product = order[half][k];
          Vec gradient[3];
#pragma GCC unroll 3
          for (int ky = 0; ky < 3; ++ky) {
            const float* const left = above + (2 - ky) * e.row;
            const float* const right = left + e.pixel;
            gradient[ky] = in_register(product == 0   ? load(left)
                                       : product == 1 ? load(left) + load(right)
                                       : product == 2 ? load(right) - load(left)
                                                      : load(right));
          }
          const Vec v = pair_value(d, a.pixel, product);
#pragma GCC unroll 4
          for (int ci = 0; ci < kNarrow; ++ci) {
            const Vec value = spread_quads(v, ci);
#pragma GCC unroll 3
            for (int ky = 0; ky < 3; ++ky) acc[k][ky][ci] += value * gradient[ky];
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 4
        for (int ci = 0; ci < kNarrow; ++ci) {
          float* const to = dweight + (ky * kNarrow + ci) * kPairFloats + order[half][k] * kLanes;
          store(to, load(to) + acc[k][ky][ci]);
        }
  }
}

}  // namespace resnext_kernels::cpu::RK_ISA
