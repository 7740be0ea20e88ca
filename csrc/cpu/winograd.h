// The 3x3 convolution of stride 1 with two thirds of the multiplications, for one instruction set.
//
// Winograd's F(2, 3) along the rows: two neighbouring outputs y0 y1 of a row take the three taps g of that row over
// four inputs d, in four products where six would be written down:
//
//     V0 = d0 - d2    U0 = g0                     y0 = m0 + m1 + m2        m = V * U, summed over ky and
//     V1 = d1 + d2    U1 = (g0 + g1 + g2) / 2     y1 = m1 - m2 - m3        input channels before the last step
//     V2 = d2 - d1    U2 = (g0 - g1 + g2) / 2
//     V3 = d1 - d3    U3 = g2
//
// and the gradient of the taps from y's gradients e, summed over all pairs:
//
//     M0 = V0 e0      M1 = V1 (e0 + e1)           dg0 = M0 + (M1 + M2) / 2
//     M2 = V2 (e0 - e1)   M3 = -V3 e1             dg1 = (M1 - M2) / 2      dg2 = (M1 + M2) / 2 + M3
//
// (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016; Winograd, 1980.) With coefficients of
// 1 and 1/2 rounding errors are those of sums over what both columns of a pair read. But Inf - Inf is NaN where the
// direct sum has Inf: where V or U is not finite, the callers compute again without this algorithm.
//
// Inputs are staged as V, once per element, for a few rows at a time:
//
//     [slot][row][pair][V0 V1 V2 V3][lane]        slot: one vector of channels, whole groups or part of one
//
// so a tile finds everything it reads at constant distances. Packed weights: [block][ky][ci][U0 U1 U2 U3][lane], or
// where a group fills vectors [block][U0 U1 U2 U3][ky][ci][lane], for one product at a time. Two groups that share a
// vector are interleaved here, a0 b0 a1 b1 ..., so that one load spreads both values of an input channel over their
// lanes. Groups of four and eight have a form of their own, without V in memory (narrow.h).
#pragma once

#include <type_traits>

#include "plan.h"
#include "pointwise.h"
#include "tiles.h"

namespace resnext_kernels::cpu::RK_ISA {

// Most FMAs read a value of their own, which only AVX-512 does for nothing: with 8 lanes and 16 registers the loads
// take longer than what is saved.
constexpr bool kWinograd = kLanes == 16;
constexpr int kPairs = kTileColumns / 2;     // of a tile: four accumulators each
constexpr int kTall = 8, kTallFrom = 3;      // rows of a tall tile, at most and at least
constexpr int kPairInputs = 4;               // input channels of a permuting dweight tile: four accumulators each
constexpr int64_t kPairFloats = 4 * kLanes;  // of V, or U
constexpr int64_t kStepPixels = 196;         // pixels that a block's weights serve once they are in the cache
constexpr int64_t kStepFloats = 80 * 1024;   // 320 KiB of V at a time

// On narrower maps pairs save nothing: too many of their products are with padding.
inline bool winograd_serves(const ConvProblem& p) { return p.stride == 1 && p.dilation == 1 && p.W >= 4; }

// `winograd`: from V in memory, where two groups of a vector are interleaved.
inline Access access_of(const Blocks& blocks, bool winograd) {
  return winograd && blocks.groups_per_block == 2 ? Access::two : blocks.access();
}

// Floats from one product of a packed U to the next, and from one input channel.
struct WeightSteps {
  int64_t product, input;
  WeightSteps(Access access, int64_t din)
      : product(access == Access::broadcast ? 3 * din * kLanes : kLanes),
        input(access == Access::broadcast ? kLanes : kPairFloats) {}
};

// How many groups are interleaved; 1: none.
constexpr int interleaved_groups(Access access) { return access == Access::two ? 2 : 1; }

// Lanes of such groups of d channels, interleaved from side by side, and back.
inline IVec interleaved(int64_t groups, int64_t d) {
  IVec index{};
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = (int32_t)min(lane % groups * d + lane / groups, kLanes - 1);
  return index;
}
inline IVec side_by_side(int64_t groups, int64_t d) {
  IVec index{};
  for (int lane = 0; lane < min(groups * d, kLanes); ++lane) index[lane] = (int32_t)(lane % d * groups + lane / d);
  return index;
}
// What the tiles of `blocks` need: where an input channel is, or for interleaved groups how results lie in memory.
inline void fill_index(const Blocks& blocks, bool winograd, IVec* index) {
  const int groups = interleaved_groups(access_of(blocks, winograd));
  if (groups > 1)
    index[0] = side_by_side(groups, blocks.dout);
  else
    blocks.fill_index(index);
}

// The vectors of a tensor with `d` channels per group, `other` on the convolution's other side.
struct Slots {
  Blocks vectors;
  int64_t per_group;  // 0: a slot holds whole groups
  int64_t count;
  Slots(int64_t d, int64_t other, int64_t groups)
      : vectors(other, d),
        per_group(vectors.groups_per_block > 1 ? 0 : vectors.blocks_per_group),
        count(vectors.count(groups)) {}
  // of a block of `blocks`, which are of the other side
  int64_t first(const Blocks& blocks, int64_t block) const {
    return per_group == 0 ? block : block / blocks.blocks_per_group * per_group;
  }
};

// The pairs of an image's rows, in a ring of `rows` rows.
template <int kVectors>
struct Pairs {
  float* data;
  int64_t rows, slots, pairs;
  static constexpr int64_t kFloats = kVectors * kLanes;
  int64_t slot_floats() const { return rows * pairs * kFloats; }
  int64_t floats() const { return slots * slot_floats(); }
  Pairs of(float* memory, int64_t slot_count, const Window& window) const {
    return {memory, rows, slot_count, ceil_div(window.columns, 2)};
  }
  float* at(int64_t row, int64_t slot, int64_t pair) const {
    return data + ((slot * rows + row % rows) * pairs + pair) * kFloats;
  }
};

// The ring for units of `plan`: steps of as many rows as use the weights well and fit into `step_floats`.
inline Pairs<4> pairs_for(const Plan& plan, int64_t slots, int64_t step_floats) {
  const int64_t pairs = ceil_div(plan.columns, 2);
  const int64_t fit = step_floats / (slots * pairs * kPairFloats) - 2;
  return {nullptr, max(1, min(min(plan.rows, ceil_div(kStepPixels, plan.columns)), fit)) + 2, slots, pairs};
}

// f(rows to compute, rows to stage, rows to stage after them) for steps of at most `step` rows of a window; `next` is
// the window after this one.
template <class F>
RK_INLINE void for_steps(const Window& window, const Window& next, int64_t step, int64_t H, F&& f) {
  const auto rows_of = [](Window w, int64_t begin, int64_t end) {
    w.row = begin;
    w.rows = end - begin;
    return w;
  };
  const int64_t last = window.row + window.rows;
  Window stage = rows_of(window, max(0, window.row - 1), min(H, window.row + step + 1));
  for (int64_t row = window.row; row < last; row += step) {
    const Window rows = rows_of(window, row, min(row + step, last));
    const int64_t staged = stage.row + stage.rows;
    const Window then = row + step < last ? rows_of(window, staged, min(min(H, last + 1), staged + step))
                                          : rows_of(next, max(0, next.row - 1), min(H, next.row + step + 1));
    f(rows, stage, then);
    stage = then;
  }
}

RK_INLINE bool any_nan(Vec v) {
  const IVec nan = v != v;
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= nan[lane];
  return any != 0;
}

// Stages a window of an (N, H, W, C) tensor; false if a value is not finite. With `raw`, d1 and d2 as well.
template <class F>
RK_INLINE bool stage_pairs(const Pairs<4>& to, const Pairs<2>* raw, const Slots& slots, int64_t groups,
                           const Window& window, int64_t H, int64_t W, int64_t C, int64_t channel, F&& value) {
  const int64_t n = window.n, column = window.column;
  const int interleave = interleaved_groups(access_of(slots.vectors, true));
  const IVec order = interleaved(interleave, slots.vectors.dout);
  Vec bad[4] = {};  // sums of zeros
  for (int64_t row = window.row; row < window.row + window.rows; ++row) {
    for (int64_t slot = 0; slot < slots.count; ++slot) {
      const Block block = slots.vectors.block(slot, groups);
      const auto run = [&](auto lanes) RK_INLINE_LAMBDA {
        float* v = to.at(row, slot, 0);
        float* d = raw ? raw->at(row, slot, 0) : nullptr;
        const int64_t c = channel + block.out;
        const int64_t first = ((n * H + row) * W + column) * C + c;
        const auto vector = value(c, lanes);
        const auto read = [&](int64_t q) RK_INLINE_LAMBDA {  // column q of the window
          if (column + q < 0 || column + q >= W) return Vec{};
          const Vec v = vector(first + q * C);
          return interleave > 1 ? permute(v, order) : v;
        };
        Vec d0 = read(-1), d1 = read(0);
        for (int64_t q = 0; q < 2 * to.pairs; q += 2, v += kPairFloats) {
          const Vec d2 = read(q + 1), d3 = read(q + 2);
          const Vec values[4] = {d0 - d2, d1 + d2, d2 - d1, d1 - d3};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            store(v + i * kLanes, values[i]);
            bad[i] += values[i] * Vec{};
          }
          if (d) {
            store(d, d1);
            store(d + kLanes, d2);
            d += 2 * kLanes;
          }
          d0 = d2;
          d1 = d3;
        }
      };
      if (block.lanes == kLanes)
        run(AllLanes{});
      else
        run(FirstLanes{block.lanes});
    }
  }
  return !any_nan((bad[0] + bad[1]) + (bad[2] + bad[3]));
}

// U0 ... U3 of a row of taps, `product` floats apart. Returns U1, which is finite only if all taps are.
RK_INLINE Vec transform_row(const Vec (&g)[3], float* u, int64_t product) {
  const Vec outer = (g[0] + g[2]) * broadcast(0.5f), inner = g[1] * broadcast(0.5f), sum = outer + inner;
  store(u, g[0]);
  store(u + product, sum);
  store(u + 2 * product, outer - inner);
  store(u + 3 * product, g[2]);
  return sum;
}

// U of one block from its packed taps [ci][ky][kx][lane]; `rotated` turns the kernel by 180 degrees. False if a weight
// is not finite.
inline bool transform_weight(const Blocks& blocks, Access access, const float* taps, bool rotated, float* to) {
  const WeightSteps steps(access, blocks.din);
  const int interleave = interleaved_groups(access);
  const IVec order = interleaved(interleave, blocks.dout);
  Vec bad{};
  for (int64_t ci = 0; ci < blocks.din; ++ci) {
    for (int64_t ky = 0; ky < 3; ++ky, taps += 3 * kLanes) {
      Vec g[3];
      for (int kx = 0; kx < 3; ++kx) {
        Vec& tap = g[rotated ? 2 - kx : kx];
        tap = load(taps + kx * kLanes);
        if (interleave > 1) tap = permute(tap, order);
      }
      const int64_t row = (rotated ? 2 - ky : ky) * blocks.din + ci;
      bad += transform_row(g, to + row * steps.input, steps.product) * Vec{};
    }
  }
  return !any_nan(bad);
}

// ---- the register tile: P pairs of one row, one block or, of a group that is wider, several
template <Access X>
constexpr int kSpread = interleaved_groups(X);  // floats that one broadcast reads
template <Access X>
RK_INLINE Vec spread(const float* p) {
  return X == Access::two ? repeat_two(p) : broadcast(*p);
}

// Outputs of interleaved groups as they lie in memory.
template <Access X, int A>
RK_INLINE void put_side_by_side(Vec (&y)[A], const IVec& order) {
  if (kSpread<X> == 1) return;
  const IVec lanes = order;
#pragma GCC unroll 16
  for (int i = 0; i < A; ++i) y[i] = permute(y[i], lanes);
}

// One block, one row. All four products of an input channel at once, for enough sums.
template <Access X, int P>
void winograd_tile(const RowTap* taps, int tap_count, int64_t slot_floats, int64_t din, const IVec* index,
                   const TileOut* to) {
  const WeightSteps steps(X, din);
  Vec m[P][4] = {};
  for (int t = 0; t < tap_count; ++t) {
    const float* weight = taps[t].weight;
    for (int64_t ci = 0; ci < din; ++ci, weight += steps.input) {
      const float* input = fresh(taps[t].input + ci / kLanes * slot_floats + ci % kLanes * kSpread<X>);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec u = load(weight + i * steps.product);
#pragma GCC unroll 8
        for (int pair = 0; pair < P; ++pair) m[pair][i] += u * spread<X>(input + pair * kPairFloats + i * kLanes);
      }
    }
  }
  Vec y[2 * P];
#pragma GCC unroll 8
  for (int pair = 0; pair < P; ++pair) {
    y[2 * pair] = m[pair][0] + m[pair][1] + m[pair][2];
    y[2 * pair + 1] = m[pair][1] - m[pair][2] - m[pair][3];
  }
  put_side_by_side<X>(y, *index);
  emit(to[0], y);
}

// Adds product i to the outputs of a pair.
RK_INLINE void add_to_outputs(int i, Vec m, Vec& y0, Vec& y1) {
  if (i == 0) y0 = m;
  if (i == 1) y0 += m, y1 = m;
  if (i == 2) y0 += m, y1 -= m;
  if (i == 3) y1 -= m;
}

// What an input row adds to m[ky], the output rows that it meets with its taps kFirst ... kLast.
template <Access X, int kFirst, int kLast, int P>
RK_INLINE void add_input_row(Vec (&m)[3][P], const float* input, const float* weight, int64_t slot_floats,
                             int64_t din) {
  const int64_t step = WeightSteps(X, din).input, ky_floats = din * step;
  for (int64_t ci = 0; ci < din; ++ci, weight += step) {
    const float* const v = fresh(input + ci / kLanes * slot_floats + ci % kLanes * kSpread<X>);
    Vec u[3];
#pragma GCC unroll 3
    for (int ky = kFirst; ky <= kLast; ++ky) u[ky] = load(weight + ky * ky_floats);
#pragma GCC unroll 8
    for (int pair = 0; pair < P; ++pair) {
      const Vec value = spread<X>(v + pair * kPairFloats);
#pragma GCC unroll 3
      for (int ky = kFirst; ky <= kLast; ++ky) m[ky][pair] += u[ky] * value;
    }
  }
}

// One block, several rows: a value is spread over the lanes once for the three output rows that read it. One product at
// a time, down the rows. The taps are the input rows from the one above the tile to the one below, null where they are
// outside of the image, all with the weights of ky = 0.
template <Access X, int P>
void winograd_tall_tile(const RowTap* taps, int tap_count, int64_t slot_floats, int64_t din, const IVec* index,
                        const TileOut* to, Ahead& ahead, int64_t lines) {
  const int rows = tap_count - 2;
  const int64_t lines_of_row = ceil_div(lines, 4 * tap_count);
  const int64_t product = WeightSteps(X, din).product;
  const float* weight = taps[0].weight;
  Vec y[kTall][2 * P];
  for (int i = 0; i < 4; ++i, weight += product) {
    Vec m[3][P] = {};  // of the output rows r, r - 1, r - 2
    for (int r = 0; r < tap_count; ++r) {
      ahead.fetch(lines_of_row);
      if (taps[r].input) {
        const auto add = [&](auto first, auto last) RK_INLINE_LAMBDA {
          add_input_row<X, first.value, last.value>(m, taps[r].input + i * kLanes, weight, slot_floats, din);
        };
        using Tap0 = std::integral_constant<int, 0>;
        using Tap1 = std::integral_constant<int, 1>;
        using Tap2 = std::integral_constant<int, 2>;
        if (r >= 2 && r < rows)
          add(Tap0{}, Tap2{});
        else if (r < 2)
          r == 0 ? add(Tap0{}, Tap0{}) : add(Tap0{}, Tap1{});
        else
          r == rows ? add(Tap1{}, Tap2{}) : add(Tap2{}, Tap2{});
      }
      if (r >= 2) {
        Vec(&out)[2 * P] = y[r - 2];
#pragma GCC unroll 8
        for (int pair = 0; pair < P; ++pair) add_to_outputs(i, m[2][pair], out[2 * pair], out[2 * pair + 1]);
        if (i == 3) {
          put_side_by_side<X>(out, *index);
          emit(*to, out, r - 2);
        }
      }
#pragma GCC unroll 8
      for (int pair = 0; pair < P; ++pair) m[2][pair] = m[1][pair], m[1][pair] = m[0][pair], m[0][pair] = Vec{};
    }
  }
}

// Whether the first of several rows lacks the taps of ky = 0, and the last one those of ky = 2.
struct Edges {
  bool top, bottom;
};

// Several blocks of a group: what the taps of one ky add to product i of the rows kFrom ... kTo - 1.
template <int kFrom, int kTo, int P, int Q, int B, int R, int N>
RK_INLINE void add_row_tap(Vec (&m)[B][R][N], int i, const RowTap& tap, int64_t slot_floats, int64_t din) {
  if constexpr (kFrom < kTo && P > 0) {
    const int64_t product_floats = 3 * din * kLanes;
    const float* weight = tap.weight + i * product_floats;
    for (int64_t ci = 0; ci < din; ++ci, weight += kLanes) {
      const float* input = fresh(tap.input + i * kLanes + ci / kLanes * slot_floats + ci % kLanes);
      Vec u[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) u[b] = load(weight + b * 4 * product_floats);
#pragma GCC unroll 8
      for (int r = kFrom; r < kTo; ++r) {
#pragma GCC unroll 8
        for (int pair = 0; pair < P; ++pair) {
          const Vec v = broadcast(input[((r - kFrom) * Q + pair) * kPairFloats]);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) m[b][r][pair] += u[b] * v;
        }
      }
    }
  }
}
template <int P, int Q, int B, int R, int N>
RK_INLINE void add_row_taps(Vec (&m)[B][R][N], int i, const RowTap* taps, Edges edges, int64_t slot_floats,
                            int64_t din) {
  if (edges.top)
    add_row_tap<1, R, P, Q>(m, i, taps[0], slot_floats, din);
  else
    add_row_tap<0, R, P, Q>(m, i, taps[0], slot_floats, din);
  add_row_tap<0, R, P, Q>(m, i, taps[1], slot_floats, din);
  if (edges.bottom)
    add_row_tap<0, R - 1, P, Q>(m, i, taps[2], slot_floats, din);
  else
    add_row_tap<0, R, P, Q>(m, i, taps[2], slot_floats, din);
}

// B blocks of a group: an input value is broadcast once for all of them. One product at a time, which leaves registers
// for the sums of all blocks, and of R rows of Q pairs where rows are short; outputs wait in the first-level cache.
// taps[ky]: at the first row that has them. The results of block b go to to[b].
template <int P, int B, int R, int Q>
void winograd_wide_tile(const RowTap* taps, Edges edges, int64_t slot_floats, int64_t din, const TileOut* to) {
  const bool odd = to[0].count < 2 * P;  // nobody needs the last y1, nor its m3
  Vec y[B][R][2 * P];
  for (int i = 0; i < 4; ++i) {
    Vec m[B][R][P] = {};
    if (i == 3 && odd)
      add_row_taps<P - 1, Q>(m, i, taps, edges, slot_floats, din);
    else
      add_row_taps<P, Q>(m, i, taps, edges, slot_floats, din);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int pair = 0; pair < P; ++pair) add_to_outputs(i, m[b][r][pair], y[b][r][2 * pair], y[b][r][2 * pair + 1]);
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) emit(to[b], y[b][r], r);
}

// Other groups that share a vector: V is read once and permuted in registers for every input channel. One product at a
// time, so that V, the sums and y fit.
template <int P>
void winograd_permuting_tile(const RowTap* taps, int tap_count, int64_t, int64_t din, const IVec* index,
                             const TileOut* to) {
  Vec y[2 * P];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vec m[P] = {};
    for (int t = 0; t < tap_count; ++t) {
      const float* input = fresh(taps[t].input) + i * kLanes;
      const float* weight = taps[t].weight + i * kLanes;
      Vec v[P];
#pragma GCC unroll 8
      for (int pair = 0; pair < P; ++pair) v[pair] = load(input + pair * kPairFloats);
      for (int64_t ci = 0; ci < din; ++ci) {
        const Vec u = load(weight + ci * kPairFloats);
        const IVec lanes = index[ci];
#pragma GCC unroll 8
        for (int pair = 0; pair < P; ++pair) m[pair] += u * permute(v[pair], lanes);
      }
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < P; ++pair) add_to_outputs(i, m[pair], y[2 * pair], y[2 * pair + 1]);
  }
  emit(to[0], y);
}

// A tile takes `kWide` blocks of a group where there are as many, and then up to kRows rows of at most kShortRow pairs.
// The kMapRows rows of a 7x7 map are taken together, in pairs of pairs, where there are weights enough that reading
// them less often counts.
constexpr int kWide = 2, kRows = 3, kShortRow = 4;
constexpr int kMapRows = 7, kMapPairs = 2, kMapInputs = 64;
inline int64_t blocks_together(const Blocks& blocks, int64_t block) {
  return blocks.blocks_per_group - block % blocks.blocks_per_group >= kWide ? kWide : 1;
}

using WinogradTile = void (*)(const RowTap*, int, int64_t, int64_t, const IVec*, const TileOut*);
using WinogradTallTile = void (*)(const RowTap*, int, int64_t, int64_t, const IVec*, const TileOut*, Ahead&, int64_t);
using WinogradWideTile = void (*)(const RowTap*, Edges, int64_t, int64_t, const TileOut*);
struct WinogradTiles {
  WinogradTile by_pairs[kPairs + 1];
  WinogradTallTile tall[kPairs + 1];                // none where groups are permuted
  WinogradWideTile wide[kMapRows + 1][kPairs + 1];  // by rows and pairs
};
template <Access X, int P>
constexpr void fill_winograd_tiles(WinogradTiles& tiles) {
  if constexpr (P > 0) {
    if constexpr (X != Access::lanes) {
      tiles.by_pairs[P] = winograd_tile<X, P>;
      tiles.tall[P] = winograd_tall_tile<X, P>;
    } else {
      tiles.by_pairs[P] = winograd_permuting_tile<P>;
    }
    if constexpr (X == Access::broadcast) {
      tiles.wide[1][P] = winograd_wide_tile<P, kWide, 1, P>;
      if constexpr (P <= kShortRow) {
        tiles.wide[2][P] = winograd_wide_tile<P, kWide, 2, P>;
        tiles.wide[3][P] = winograd_wide_tile<P, kWide, 3, P>;
      }
      if constexpr (P <= kMapPairs) tiles.wide[kMapRows][P] = winograd_wide_tile<P, kWide, kMapRows, kShortRow>;
    }
    fill_winograd_tiles<X, P - 1>(tiles);
  }
}
inline const WinogradTiles& winograd_tiles(Access access) {
  struct All {
    WinogradTiles broadcast{}, two{}, lanes{};
    constexpr All() {
      fill_winograd_tiles<Access::broadcast, kPairs>(broadcast);
      fill_winograd_tiles<Access::two, kPairs>(two);
      fill_winograd_tiles<Access::lanes, kPairs>(lanes);
    }
  };
  static constexpr All all;
  switch (access) {
    case Access::broadcast: return all.broadcast;
    case Access::two: return all.two;
    default: return all.lanes;
  }
}

// The tiles of some rows of `out` from the staged rows around them, asking for `lines` of what is ahead; `sink` as of
// UnitPass.
struct WinogradPass {
  const ConvProblem& p;
  const Blocks& blocks;
  const Slots& slots;  // of the input
  int64_t groups;      // of the chunk
  const float* packed;
  const IVec* index;

  // How many rows from `row` on a wide tile takes: all they read lies side by side in the ring.
  int64_t rows_together(const Window& out, const Pairs<4>& input, int64_t row) const {
    const int64_t left = out.row + out.rows - row, first = max(row - 1, 0);
    const auto fits = [&](int64_t rows) {
      return rows <= left && min(row + rows + 1, p.H) - first <= input.rows - first % input.rows;
    };
    if (input.pairs > kShortRow) return 1;
    if (input.pairs == kShortRow && blocks.din >= kMapInputs && fits(kMapRows)) return kMapRows;
    int64_t rows = left == kRows + 1 ? kRows - 1 : kRows;  // rather 2 + 2 than 3 + 1
    while (rows > 1 && !fits(rows)) --rows;
    return rows;
  }

  template <class S>
  RK_INLINE void run(const Window& out, const Pairs<4>& input, Ahead& ahead, int64_t lines, const S& sink) const {
    const Access access = access_of(blocks, true);
    const WinogradTiles& tiles = winograd_tiles(access);
    const int64_t weight_row = blocks.din * WeightSteps(access, blocks.din).input;
    alignas(64) float values[kWide][kTall * kTileColumns * kLanes];
    const int64_t quota = ceil_div(lines, blocks.count(groups) * out.rows);
    for (int64_t b = 0, together; b < blocks.count(groups); b += together) {
      together = blocks_together(blocks, b);
      const float* weight = packed + b * blocks.din * 3 * kPairFloats;
      const int64_t slot = slots.first(blocks, b);
      Block block[kWide];
      for (int64_t i = 0; i < together; ++i) block[i] = blocks.block(b + i, groups);
      for (int64_t row = out.row, rows; row < out.row + out.rows; row += rows) {
        const int64_t left = out.row + out.rows - row;
        const bool tall = together == 1 && left >= kTallFrom && tiles.tall[1];
        rows = together > 1 ? rows_together(out, input, row) : tall ? min(kTall, left) : 1;
        const Edges edges{row == 0, row + rows == p.H};
        RowTap taps[kTall + 2];  // moves along the row
        const int tap_count = tall ? (int)rows + 2 : 3;
        for (int t = 0; t < tap_count; ++t) {
          const int64_t from = min(max(row - 1 + t, 0), p.H - 1);
          taps[t] = {input.at(from, slot, 0), weight + (tall ? 0 : t * weight_row)};
          if (tall && from != row - 1 + t) taps[t].input = nullptr;
        }
        const int64_t tile_count = ceil_div(input.pairs, together > 1 && rows == kMapRows ? kMapPairs : kPairs);
        const int64_t tile_lines = ceil_div(together * rows * quota, tile_count);
        for (int64_t tile = 0, begin = 0, end; tile < tile_count; ++tile, begin = end) {
          end = tile + 1 == tile_count ? input.pairs : (tile + 1) * input.pairs / tile_count;
          const int64_t column = out.column + 2 * begin;
          const int64_t count = min(2 * (end - begin), out.columns - 2 * begin);
          TileOut to[kWide];
          for (int64_t i = 0; i < together; ++i) sink.target(to[i], block[i], row, rows, column, 1, count, values[i]);
          if (!tall) ahead.fetch(tile_lines);
          if (tall)
            tiles.tall[end - begin](taps, tap_count, input.slot_floats(), blocks.din, index, to, ahead, tile_lines);
          else if (together > 1)
            tiles.wide[rows][end - begin](taps, edges, input.slot_floats(), blocks.din, to);
          else
            tiles.by_pairs[end - begin](taps + edges.top, 3 - edges.top - edges.bottom, input.slot_floats(), blocks.din,
                                        index, to);
          for (int64_t i = 0; i < together; ++i) sink.finish(b + i, block[i], row, rows, column, 1, to[i]);
          for (int t = 0; t < tap_count; ++t)
            if (taps[t].input) taps[t].input += (end - begin) * kPairFloats;
        }
      }
    }
  }
};

// ---- dweight, packed as [block][ky][ci][M0 M1 M2 M3][lane]
// The rows `row` ... `row + rows - 1` of e with those of a that are `shift` further, as runs of pairs that lie side by
// side in a slot of either.
struct PairRuns {
  struct Run {
    int64_t a, e, count;  // in pairs from the start of a slot
  };
  Run runs[3];
  int count = 0;

  PairRuns(const Pairs<4>& a, const Pairs<4>& e, int64_t row, int64_t rows, int64_t shift) {
    for (const int64_t end = row + rows; row < end;) {
      const int64_t of_a = (row + shift) % a.rows, of_e = row % e.rows;
      const int64_t n = min(end - row, min(a.rows - of_a, e.rows - of_e));
      runs[count++] = {of_a * a.pairs, of_e * e.pairs, n * e.pairs};
      row += n;
    }
  }
};

struct WinogradWeightArgs {
  const Pairs<4>&a, &e;
  const Pairs<2>& raw_e;
  int64_t a_slot, e_slot, din;
};

// Input channels ci ... ci + I - 1 and kWide blocks of a group, one row of taps. K products at a time: 16 sums.
template <int I, int K>
void winograd_weight_tile(const WinogradWeightArgs& args, const PairRuns& runs, int64_t ci, float* dweight) {
  static constexpr int order[4] = {0, 3, 1, 2};  // the first two multiply e itself
  const int64_t block_floats = 3 * args.din * kPairFloats;
  const float* const first_v = args.a.data + (args.a_slot + ci / kLanes) * args.a.slot_floats() + ci % kLanes;
#pragma GCC unroll 4
  for (int first = 0; first < 4; first += K) {
    const bool raw = first < 2;
    const int64_t step = raw ? 2 * kLanes : kPairFloats;
    const int64_t slot_floats = raw ? args.raw_e.slot_floats() : args.e.slot_floats();
    const float* const first_e = (raw ? args.raw_e.data : args.e.data) + args.e_slot * slot_floats;
    Vec acc[K][kWide][I] = {};
    for (int run = 0; run < runs.count; ++run) {
      const PairRuns::Run& pairs = runs.runs[run];
      const float* v = first_v + pairs.a * kPairFloats;
      const float* e = first_e + pairs.e * step;
      for (int64_t pair = 0; pair < pairs.count; ++pair, v += kPairFloats, e += step) {
        const float* const input = fresh(v);
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
          const int product = order[first + k];
          Vec gradient[kWide];
#pragma GCC unroll 4
          for (int b = 0; b < kWide; ++b)
            gradient[b] = load(e + b * slot_floats + (raw ? product / 3 : product) * kLanes);
#pragma GCC unroll 16
          for (int i = 0; i < I; ++i) {
            const Vec value = broadcast(input[product * kLanes + i]);
#pragma GCC unroll 4
            for (int b = 0; b < kWide; ++b) acc[k][b][i] += value * gradient[b];
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int b = 0; b < kWide; ++b)
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) {
          float* to = dweight + b * block_floats + (ci + i) * kPairFloats + order[first + k] * kLanes;
          store(to, load(to) + acc[k][b][i]);
        }
  }
}
template <int I, int K>
void winograd_weight_tiles(const WinogradWeightArgs& args, const PairRuns& runs, int64_t ci, float* dweight) {
  for (; ci + I <= args.din; ci += I) winograd_weight_tile<I, K>(args, runs, ci, dweight);
  if constexpr (I > 1)
    if (ci < args.din) winograd_weight_tiles<I / 2, 2>(args, runs, ci, dweight);
}

// Where the rows of a step and the one above and below start in a ring, in pairs; -1 outside of the image.
struct RingRows {
  int64_t pair[kStepPixels / 4 + 2];  // rows have four pixels at least
  int64_t count;

  RingRows(const Pairs<4>& ring, const Window& rows, int64_t H) : count(rows.rows + 2) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows.row - 1 + i;
      pair[i] = row < 0 || row >= H ? -1 : row % ring.rows * ring.pairs;
    }
  }
};

// What a row of pairs of V adds to the taps kFirst ... kLast, whose rows of e are e[ky].
template <Access X, int kFirst, int kLast, int I>
RK_INLINE void add_weight_row(Vec (&acc)[3][I], const float* v, const float* const* e, int64_t step, int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float* const input = fresh(v + pair * kPairFloats);
    Vec gradient[3];
#pragma GCC unroll 3
    for (int ky = kFirst; ky <= kLast; ++ky) gradient[ky] = load(e[ky] + pair * step);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vec value = spread<X>(input + i * kSpread<X>);
#pragma GCC unroll 3
      for (int ky = kFirst; ky <= kLast; ++ky) acc[ky][i] += value * gradient[ky];
    }
  }
}

// Input channels ci ... ci + I - 1 of one block, one product at a time: a value is spread once for the three rows of e
// that it meets. Down the rows of V, whose neighbours in e are in the ring too; asks for `lines` for an input channel.
template <Access X, int I>
void winograd_tall_weight_tile(const WinogradWeightArgs& args, const RingRows& rows, int64_t ci, float* dweight,
                               Ahead& ahead, int64_t lines) {
  const float* const first_v =
      args.a.data + (args.a_slot + ci / kLanes) * args.a.slot_floats() + ci % kLanes * kSpread<X>;
  for (int product = 0; product < 4; ++product) {
    const bool raw = product % 3 == 0;
    const int64_t step = raw ? 2 * kLanes : kPairFloats;
    const float* const first_e =
        raw ? args.raw_e.at(0, args.e_slot, 0) + product / 3 * kLanes : args.e.at(0, args.e_slot, 0) + product * kLanes;
    ahead.fetch(lines * I / 4);
    Vec acc[3][I] = {};
    for (int64_t row = 1; row + 1 < rows.count; ++row) {
      const float* const v = first_v + product * kLanes + rows.pair[row] * kPairFloats;
      const float* e[3];
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t pair = rows.pair[row + 1 - ky];
        e[ky] = pair < 0 ? nullptr : first_e + pair * step;
      }
      if (e[0] && e[2])
        add_weight_row<X, 0, 2>(acc, v, e, step, args.a.pairs);
      else if (e[0])
        add_weight_row<X, 0, 1>(acc, v, e, step, args.a.pairs);
      else if (e[2])
        add_weight_row<X, 1, 2>(acc, v, e, step, args.a.pairs);
      else
        add_weight_row<X, 1, 1>(acc, v, e, step, args.a.pairs);
    }
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) {
        float* const to = dweight + (ky * args.din + ci + i) * kPairFloats + product * kLanes;
        store(to, load(to) + acc[ky][i]);
      }
  }
}
template <Access X, int I>
void winograd_tall_weight_tiles(const WinogradWeightArgs& args, const RingRows& rows, int64_t ci, float* dweight,
                                Ahead& ahead, int64_t lines) {
  for (; ci + I <= args.din; ci += I) winograd_tall_weight_tile<X, I>(args, rows, ci, dweight, ahead, lines);
  if constexpr (I > 1)
    if (ci < args.din) winograd_tall_weight_tiles<X, I / 2>(args, rows, ci, dweight, ahead, lines);
}

// Other groups in a vector, permuted in registers: all four products, so that what is permuted is read once.
template <int I>
void winograd_permuting_weight_tile(const WinogradWeightArgs& args, const PairRuns& runs, int64_t ci, const IVec* index,
                                    float* dweight) {
  Vec acc[I][4] = {};
  IVec lanes[I] = {};
  for (int i = 0; i < I; ++i) lanes[i] = index[ci + i];
  for (int run = 0; run < runs.count; ++run) {
    const PairRuns::Run& pairs = runs.runs[run];
    const float* v = args.a.data + args.a_slot * args.a.slot_floats() + pairs.a * kPairFloats;
    const float* s = args.e.data + args.e_slot * args.e.slot_floats() + pairs.e * kPairFloats;
    const float* d = args.raw_e.data + args.e_slot * args.raw_e.slot_floats() + pairs.e * 2 * kLanes;
    for (int64_t pair = 0; pair < pairs.count; ++pair, v += kPairFloats, s += kPairFloats, d += 2 * kLanes) {
      const Vec e[4] = {load(d), load(s + kLanes), load(s + 2 * kLanes), load(d + kLanes)};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Vec value = in_register(load(fresh(v + k * kLanes)));
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i) acc[i][k] += permute(value, lanes[i]) * e[k];
      }
    }
  }
  dweight += ci * kPairFloats;
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k, dweight += kLanes) store(dweight, load(dweight) + acc[i][k]);
  }
}
template <int I>
void winograd_permuting_weight_tiles(const WinogradWeightArgs& args, const PairRuns& runs, int64_t ci,
                                     const IVec* index, float* dweight) {
  for (; ci + I <= args.din; ci += I) winograd_permuting_weight_tile<I>(args, runs, ci, index, dweight);
  if constexpr (I > 1)
    if (ci < args.din) winograd_permuting_weight_tiles<I / 2>(args, runs, ci, index, dweight);
}

// M of a chunk, from the rows of a step; asks for `lines` of what is ahead.
inline void add_winograd_weight_gradient(const ConvProblem& p, const Blocks& blocks, const Slots& slots, int64_t groups,
                                         const Window& rows, const Pairs<4>& a, const Pairs<4>& e,
                                         const Pairs<2>& raw_e, const IVec* index, float* dweight, Ahead& ahead,
                                         int64_t lines) {
  const Access access = access_of(blocks, true);
  const int64_t quota = ceil_div(lines, 3 * blocks.count(groups));
  const auto runs_of = [&](int64_t ky) {
    const int64_t first = max(rows.row, 1 - ky), last = min(rows.row + rows.rows, p.H + 1 - ky);
    return PairRuns(a, e, first, last - first, ky - 1);
  };
  const PairRuns runs[3] = {runs_of(0), runs_of(1), runs_of(2)};
  const RingRows ring_rows(a, rows, p.H);
  for (int64_t b = 0, together; b < blocks.count(groups); b += together) {
    together = blocks_together(blocks, b);
    const WinogradWeightArgs args{a, e, raw_e, slots.first(blocks, b), b, blocks.din};
    if (together == 1 && access != Access::lanes) {
      const auto tiles = access == Access::two ? winograd_tall_weight_tiles<Access::two, 8>
                                               : winograd_tall_weight_tiles<Access::broadcast, 8>;
      tiles(args, ring_rows, 0, dweight + 3 * b * blocks.din * kPairFloats, ahead, ceil_div(3 * quota, blocks.din));
      continue;
    }
    for (int64_t ky = 0; ky < 3; ++ky) {
      ahead.fetch(together * quota);
      float* const to = dweight + (3 * b + ky) * blocks.din * kPairFloats;
      if (access == Access::broadcast)
        winograd_weight_tiles<16 / kWide, 1>(args, runs[ky], 0, to);
      else
        winograd_permuting_weight_tiles<kPairInputs>(args, runs[ky], 0, index, to);
    }
  }
}

// dg from sums of V0 e0, V1 (e0 + e1), V2 (e1 - e0), V3 e1.
RK_INLINE void weight_gradient_of_pairs(Vec (&m)[4]) {
  const Vec half = broadcast(0.5f), outer = (m[1] - m[2]) * half, inner = (m[1] + m[2]) * half;
  m[0] += outer;
  m[1] = inner;
  m[2] = outer - m[3];
}

}  // namespace resnext_kernels::cpu::RK_ISA
