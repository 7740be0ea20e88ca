// Winograd's pairs (winograd.h) for groups of four and of eight channels, of which a vector holds several.
//
// A pair of outputs of such a vector takes so few products that writing V to memory and reading it back costs nearly as
// much as they do. So V stays in registers: a register tile is two pairs of columns of one vector of channels and walks
// down the rows. What an input row adds to the three output rows that read it is summed for all four products at once:
//
//     d0 ... d5  ->  V0 ... V3 of either pair  ->  channel ci in all lanes of its group  ->  m[ky][pair][product]
//
// The input is read where it lies or, where it has to be converted or computed first, and for some tiles at the image's
// edges, from a copy of the tile's window in the first-level cache. The gradients dx and dweight share a copy of e.
// Pairs of bfloat16 channels walk down the rows in the same way, but are multiplied as the sum is written.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "plan.h"
#include "pointwise.h"
#include "tiles.h"
#include "winograd.h"

namespace resnext_kernels::cpu::RK_ISA {

constexpr int kNarrowPairs = 2;              // of a register tile: 24 accumulators
constexpr int64_t kNarrowRows = 28;          // of a tile, at most, forward
constexpr int64_t kNarrowInPlaceRows = 56;   // where x is read in place and stays in the cache with z
constexpr int64_t kNarrowBackwardRows = 14;  // backward, where up to three tensors are read
constexpr int64_t kCachedFloats = 1 << 22;   // 16 MiB
constexpr int64_t kNarrowColumns = 8;        // of a tile: two register tiles, which may share a copy
// Floats: of a tile or, where x could be read in place, of one of its register tiles.
constexpr int64_t kNarrowCopy =
    max((kNarrowRows + 2) * (kNarrowColumns + 2), (kNarrowInPlaceRows + 2) * (2 * kNarrowPairs + 2)) * kLanes;

inline bool narrow_serves(const ConvProblem& p) {
  return winograd_serves(p) && p.din() == p.dout() && (p.din() == 4 || p.din() == 8);
}

// Rows of a forward tile of x. Higher ones have fewer rows at their edges, but what the machine's prefetchers read
// below them is not what comes next.
inline int64_t narrow_rows(const ConvProblem& p, const float* in_place) {
  const int64_t pixels = p.N * p.H * p.W;
  return in_place && pixels * (p.C + p.K) <= kCachedFloats ? kNarrowInPlaceRows : kNarrowRows;
}

// f(tile, the one after it) for the tiles, of at most `rows` rows, of a window; `next` is the window after this one.
template <class F>
RK_INLINE void for_narrow_tiles(const Window& window, const Window& next, int64_t rows, F&& f) {
  const int64_t bands = ceil_div(window.rows, rows), end = window.column + window.columns;
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

// What the tile after this one reads, of one or two tensors of one shape: while a tile walks down its rows, it asks
// for the same rows of the next one, and every register tile asks for a piece of them. Pieces are consecutive cache
// lines, which the machine's own prefetchers follow; pixels apart, it would take a tenth longer.
class RowsAhead {
 public:
  // What `then` reads that the tile to its left has not read, from a chunk's first channel on, of (N, H, W, C) tensors
  // of T, the first of which is not null if it is ever asked for; `walks`: how often tiles walk down the rows
  // meanwhile.
  template <class T>
  static RowsAhead of(std::initializer_list<const void*> tensors, const ConvProblem& p, const Window& then,
                      int64_t channel, int64_t channels, int64_t walks) {
    RowsAhead ahead;
    for (const void* tensor : tensors)
      if (tensor) ahead.tensors_[ahead.count_++] = (const char*)tensor;
    if (then.n >= p.N) return ahead;  // the same lines again and again, which costs nothing
    constexpr int64_t kSize = sizeof(T);
    const int64_t row = max(then.row - 1, 0), column = min(then.column + 1, p.W - 1);
    ahead.first_ = (((then.n * p.H + row) * p.W + column) * p.C + channel) * kSize;
    ahead.row_bytes_ = p.W * p.C * kSize;
    ahead.pixel_bytes_ = p.C * kSize;
    ahead.pixel_lines_ = ceil_div(channels * kSize, 64);
    ahead.lines_ = ceil_div(min(then.columns, p.W - column) * ahead.pixel_lines_, walks);
    ahead.more_ = ahead.count_ > 1 || ahead.lines_ > kLines;
    return ahead;
  }
  // To the piece of the next walk.
  RK_INLINE void begin_walk() {
    const int64_t line = walk_++ * lines_;
    at_ = first_ + line / pixel_lines_ * pixel_bytes_ + line % pixel_lines_ * 64;
  }
  // Asks for one row of the piece, and goes to the next.
  RK_INLINE void fetch() {
    fetch_lines(tensors_[0] + at_);
    if (more_) {
      for (int64_t line = kLines; line < lines_; line += kLines) fetch_lines(tensors_[0] + at_ + 64 * line);
      for (int64_t i = 1; i < count_; ++i)
        for (int64_t line = 0; line < lines_; line += kLines) fetch_lines(tensors_[i] + at_ + 64 * line);
    }
    at_ += row_bytes_;
  }

 private:
  static constexpr int kLines = 4;  // of float32, what two register tiles next to one another share out
  static RK_INLINE void fetch_lines(const char* at) {
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(at + 64 * line, 0, 2);
  }
  const char* tensors_[2] = {};
  int64_t count_ = 0, walk_ = 0, at_ = 0;                                              // bytes
  int64_t first_ = 0, row_bytes_ = 0, pixel_bytes_ = 0, pixel_lines_ = 1, lines_ = 0;  // lines_: of a row, for one walk
  bool more_ = false;                                                                  // than kLines of one tensor
};

// Which of the columns that a register tile reads is outside of the image, and is not read.
enum class Outside { none, left, right };

// What a tile reads: the pixel left of the row above it, and the floats from row to row and from pixel to pixel.
struct NarrowInput {
  const float* data;
  int64_t row, pixel;
  Outside outside = Outside::none;
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

// The same, in place where it can be read there; `in_place` is null where nothing can. `leaves_out`: the reader does
// not read a column outside.
template <class F>
RK_INLINE NarrowInput input_around(const float* in_place, const Window& tile, int64_t H, int64_t W, int64_t C,
                                   int64_t channel, int lanes, float* copy, F&& value, bool leaves_out = false) {
  if (lanes < kLanes) return copy_input(tile, H, W, C, channel, copy, value(channel, FirstLanes{lanes}));
  const int64_t last = tile.column + round_up(tile.columns, 2);
  const bool left = tile.column == 0, right = last == W;
  if (in_place && last <= W && (leaves_out ? !(left && right) : !(left || right)))
    return {in_place + ((tile.n * H + tile.row - 1) * W + tile.column - 1) * C + channel, W * C, C,
            left    ? Outside::left
            : right ? Outside::right
                    : Outside::none};
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

// Product i of V from the four columns of a pair, of which the first or the last may be outside.
RK_INLINE Vec pair_value(const float* d, int64_t pixel, int i, bool left = false, bool right = false) {
  const Vec d1 = load(d + pixel), d2 = load(d + 2 * pixel);
  if (i == 0) return (left ? Vec{} : load(d)) - d2;
  if (i == 3) return right ? d1 : d1 - load(d + 3 * pixel);
  return i == 1 ? d1 + d2 : d2 - d1;
}

// Four input channels of every group, from `half` * 4 on, for spread_quads.
template <int kD>
RK_INLINE Vec quads(Vec v, int half) {
  return kD == 4 ? v : in_register(spread_octets(v, half));
}

// What an input row adds to m[ky], the output rows that it meets with its taps kFirst ... kLast.
template <int kD, Outside kOutside, int kFirst, int kLast, int P>
RK_INLINE void add_narrow_row(Vec (&m)[3][P][4], const float* input, int64_t pixel, const float* weight) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vec v[P];
#pragma GCC unroll 2
    for (int pair = 0; pair < P; ++pair)
      v[pair] = pair_value(input + 2 * pair * pixel, pixel, i, kOutside == Outside::left && pair == 0,
                           kOutside == Outside::right && pair == P - 1);
#pragma GCC unroll 8
    for (int ci = 0; ci < kD; ++ci) {
      Vec value[P];
#pragma GCC unroll 2
      for (int pair = 0; pair < P; ++pair) value[pair] = spread_quads(quads<kD>(v[pair], ci / 4), ci % 4);
#pragma GCC unroll 3
      for (int ky = kFirst; ky <= kLast; ++ky) {
        const Vec u = in_register(load(weight + (ky * kD + ci) * kPairFloats + i * kLanes));
#pragma GCC unroll 2
        for (int pair = 0; pair < P; ++pair) m[ky][pair][i] += u * value[pair];
      }
    }
  }
}

// Two pairs or, at the right end, one. `zeros` stays zero as long as all results are finite, which they are only if V
// and U are, and those of a row do not overflow when they are added.
template <class T, int kD, int P, Outside kOutside>
void narrow_tile(const NarrowInput& input, int64_t rows, Edges edges, const float* weight, const TileOutOf<T>& to,
                 Vec& zeros, RowsAhead& ahead) {
  Vec m[3][P][4] = {};  // of the output rows r, r - 1, r - 2
  Vec zero = zeros;
  const float* d = input.data;
  const auto add = [&](auto first, auto last) RK_INLINE_LAMBDA {
    add_narrow_row<kD, kOutside, first.value, last.value>(m, d, input.pixel, weight);
  };
  const auto next = [&](int64_t row) RK_INLINE_LAMBDA {
    if (row >= 0) {
      Vec y[2 * P], sum{};
#pragma GCC unroll 2
      for (int pair = 0; pair < P; ++pair) {
        const Vec(&sums)[4] = m[2][pair];
        y[2 * pair] = sums[0] + (sums[1] + sums[2]);
        y[2 * pair + 1] = (sums[1] - sums[2]) - sums[3];
        sum += y[2 * pair] + y[2 * pair + 1];
      }
      zero += sum * Vec{};
      emit(to, y, row);
    }
#pragma GCC unroll 2
    for (int pair = 0; pair < P; ++pair)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) m[2][pair][i] = m[1][pair][i], m[1][pair][i] = m[0][pair][i], m[0][pair][i] = Vec{};
    d += input.row;
    ahead.fetch();
  };
  walk_down(rows, edges, add, next);
  zeros = zero;
}

template <class T, int kD>
RK_INLINE auto narrow_tile_for(int64_t columns, Outside outside) {
  if (columns <= 2)  // not at the left edge: no map has fewer than four columns
    return outside == Outside::right ? narrow_tile<T, kD, 1, Outside::right> : narrow_tile<T, kD, 1, Outside::none>;
  return outside == Outside::left    ? narrow_tile<T, kD, kNarrowPairs, Outside::left>
         : outside == Outside::right ? narrow_tile<T, kD, kNarrowPairs, Outside::right>
                                     : narrow_tile<T, kD, kNarrowPairs, Outside::none>;
}

// run(register tile, edges, its results) for a block's register tiles of `columns` columns; `sink` as of UnitPass.
template <class F, class S>
RK_INLINE void for_register_tiles(const Window& tile, int64_t columns, int64_t H, int64_t b, const Block& block,
                                  const S& sink, F&& run) {
  alignas(64) float values[kNarrowInPlaceRows * kTileColumns * kLanes];
  const Edges edges{tile.row == 0, tile.row + tile.rows == H};
  Window part = tile;
  for (const int64_t end = tile.column + tile.columns; part.column < end; part.column += part.columns) {
    part.columns = min(columns, end - part.column);
    TileOutOf<typename S::Stored> to;
    sink.target(to, block, part.row, part.rows, part.column, 1, part.columns, values);
    run(part, edges, to);
    sink.finish(b, block, part.row, part.rows, part.column, 1, to);
  }
}

// A block by Winograd's pairs; input_of(register tile): what it reads.
template <class F, class S>
RK_INLINE void run_narrow(int64_t din, const Window& tile, int64_t H, int64_t b, const Block& block,
                          const float* packed, F&& input_of, Vec& zeros, RowsAhead& ahead, const S& sink) {
  using T = typename S::Stored;
  const float* const weight = packed + b * 3 * din * kPairFloats;
  for_register_tiles(tile, 2 * kNarrowPairs, H, b, block, sink,
                     [&](const Window& part, Edges edges, const TileOutOf<T>& to) RK_INLINE_LAMBDA {
                       const NarrowInput input = input_of(part);
                       ahead.begin_walk();
                       const auto run = din == 4 ? narrow_tile_for<T, 4> : narrow_tile_for<T, 8>;
                       run(part.columns, input.outside)(input, part.rows, edges, weight, to, zeros, ahead);
                     });
}

// ---- pairs of bfloat16 channels, as the sum is written: two lanes of input for a group's four outputs
// What an input row adds to m[ky], the output rows that it meets with its taps kFirst ... kLast.
template <int kInputs, int kFirst, int kLast, int A>
RK_INLINE void add_pair_row(Vec (&m)[3][A], const float* input, int64_t pixel, const float* weight, const IVec* index) {
#pragma GCC unroll 4
  for (int pair = 0; pair < kInputs; ++pair, weight += 9 * kLanes) {
    const IVec lanes = index[pair];
    const float* d = fresh(input);
#pragma GCC unroll 16
    for (int q = 0; q < A + 2; ++q, d += pixel) {
      const Vec value = permute(load_half(d), lanes);
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

template <class T, int kInputs, int A>
void narrow_pair_tile(const NarrowInput& input, int64_t rows, Edges edges, const float* weight, const IVec* index,
                      const TileOutOf<T>& to, RowsAhead& ahead) {
  Vec m[3][A] = {};  // of the output rows r, r - 1, r - 2
  const float* d = input.data;
  const auto add = [&](auto first, auto last) RK_INLINE_LAMBDA {
    add_pair_row<kInputs, first.value, last.value>(m, d, input.pixel, weight, index);
  };
  const auto next = [&](int64_t row) RK_INLINE_LAMBDA {
    if (row >= 0) emit<kNarrowColumns / 2 - 1>(to, m[2], row);
#pragma GCC unroll 16
    for (int i = 0; i < A; ++i) m[2][i] = m[1][i], m[1][i] = m[0][i], m[0][i] = Vec{};
    d += input.row;
    ahead.fetch();
  };
  walk_down(rows, edges, add, next);
}

template <class T>
RK_INLINE auto narrow_pair_tile_for(int64_t inputs, int64_t columns) {
  if (columns <= kNarrowColumns / 2)
    return inputs == 2 ? narrow_pair_tile<T, 2, kNarrowColumns / 2> : narrow_pair_tile<T, 4, kNarrowColumns / 2>;
  return inputs == 2 ? narrow_pair_tile<T, 2, kNarrowColumns> : narrow_pair_tile<T, 4, kNarrowColumns>;
}

// ---- dweight, packed as [block][ky][ci][M0 M1 M2 M3][lane]
// One block, from the pairs of a tile: V of a and the three rows of e that each of its rows meets, which are zeros
// outside of the image. As many products at a time as take 24 accumulators. `more_ahead` may be null.
template <int kD>
void narrow_weight_tile(const Window& tile, const NarrowInput& a, const NarrowInput& e, float* dweight,
                        RowsAhead& ahead, RowsAhead* more_ahead) {
  constexpr int kProducts = 8 / kD;
  static constexpr int order[4] = {0, 3, 1, 2};  // the first two multiply e itself
  const auto fetch = [&]() RK_INLINE_LAMBDA {
    ahead.fetch();
    if (more_ahead) more_ahead->fetch();
  };
#pragma GCC unroll 4
  for (int first = 0; first < 4; first += kProducts) {
    Vec acc[kProducts][3][kD] = {};
    const float *a_row = a.data + a.row, *e_row = e.data + e.pixel;
    for (int64_t r = 0; r < tile.rows; ++r, a_row += a.row, e_row += e.row) {
      if (first == 0) fetch();
      const float *d = a_row, *above = e_row;
      for (int64_t column = 0; column < tile.columns; column += 2, d += 2 * a.pixel, above += 2 * e.pixel) {
#pragma GCC unroll 2
        for (int k = 0; k < kProducts; ++k) {
          const int product = order[first + k];
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
#pragma GCC unroll 8
          for (int ci = 0; ci < kD; ++ci) {
            const Vec value = spread_quads(quads<kD>(v, ci / 4), ci % 4);
#pragma GCC unroll 3
            for (int ky = 0; ky < 3; ++ky) acc[k][ky][ci] += value * gradient[ky];
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < kProducts; ++k)
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 8
        for (int ci = 0; ci < kD; ++ci) {
          float* const to = dweight + (ky * kD + ci) * kPairFloats + order[first + k] * kLanes;
          store(to, load(to) + acc[k][ky][ci]);
        }
  }
  for (int i = 0; i < 2; ++i) fetch();  // of the rows above and below
}

}  // namespace resnext_kernels::cpu::RK_ISA
