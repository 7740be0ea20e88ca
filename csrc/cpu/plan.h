// How a grouped convolution is cut into work for one instruction set: vectors of channels, chunks, units, items.
//
// Work is cut into chunks (whole groups, kChunkChannels or kStagedChannels channels, or part of a wide group's output
// channels) x units (an image's band of pixels). Items, runs of units of one chunk, are what threads take; what an item
// computes does not depend on the thread.
#pragma once

#include <omp.h>

#include <vector>

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace resnext_kernels::cpu::RK_ISA {

// ---- configuration
constexpr int64_t kChunkChannels = 128;  // wide pieces of a pixel touch few memory pages at a time
// Where a unit is staged first, and nothing else reads memory meanwhile; processors without AVX-512 have smaller
// caches.
constexpr int64_t kStagedChannels = kLanes == 16 ? 256 : kChunkChannels;
constexpr int64_t kChunkWeights = 2048;        // but channels * channels per group no more than this, or one group
constexpr int64_t kPartWeights = 64 * 1024;    // of one group's weights, if it is cut: 3 MiB with Winograd's products
constexpr int64_t kScratchFloats = 40 * 1024;  // 160 KiB, if that is kFewestRows
constexpr int64_t kBandColumns = 64;           // of a unit, at most
constexpr int64_t kFewestRows = 4, kFewestColumns = 8;  // of a unit

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- how groups map to vectors
// One vector of output channels: offsets within the chunk.
struct Block {
  int64_t out, in;
  int lanes;
};

// A convolution from din to dout channels per group.
struct Blocks {
  int64_t din, dout;
  int64_t groups_per_block;  // > 1: a vector holds several whole groups
  int64_t blocks_per_group;  // of a group wider than half a vector

  Blocks(int64_t din, int64_t dout)
      : din(din),
        dout(dout),
        groups_per_block(max(1, kLanes / max(din, dout))),
        blocks_per_group(groups_per_block > 1 ? 1 : ceil_div(dout, kLanes)) {}

  int64_t count(int64_t groups) const {
    return groups_per_block > 1 ? ceil_div(groups, groups_per_block) : groups * blocks_per_group;
  }
  Block block(int64_t index, int64_t groups) const {
    if (groups_per_block > 1) {
      const int64_t group = index * groups_per_block;
      return {group * dout, group * din, (int)(min(groups_per_block, groups - group) * dout)};
    }
    const int64_t group = index / blocks_per_group, part = index % blocks_per_group * kLanes;
    return {group * dout + part, group * din, (int)min(kLanes, dout - part)};
  }
  Access access() const {
    if (groups_per_block == 1) return Access::broadcast;
    if (din == 4 && dout == 4) return Access::quads;
    return kLanes == 16 && din == 8 && dout == 8 ? Access::octets : Access::lanes;
  }
  // index[ci]: the lane of the block's input vector that holds channel ci of the lane's group
  void fill_index(IVec* index) const {
    if (groups_per_block == 1) return;
    for (int64_t ci = 0; ci < din; ++ci)
      for (int lane = 0; lane < kLanes; ++lane)
        ((int32_t*)&index[ci])[lane] = (int32_t)min(lane / dout * din + ci, kLanes - 1);
  }
  int64_t index_floats() const { return groups_per_block == 1 ? 0 : din * kLanes; }
};

// Floats from one staged pixel to the next: an odd number of cache lines, so that the same channels of neighbouring
// pixels do not compete for the same sets of the cache.
inline int64_t staged_pixel(int64_t channels) {
  const int64_t floats = round_up(channels, kLanes);
  return floats > 32 && floats % 32 == 0 ? floats + 16 : floats;
}

// ---- how the problem is cut into work
struct Plan {
  int64_t chunk_groups, chunks;  // channels
  int64_t parts, chunk_outputs;  // a chunk's output channels per group are one of `parts`
  int64_t rows, columns;         // of z, per unit
  int64_t row_bands, column_bands, units;
  int64_t splits;  // runs of units: the items of one chunk

  // `staged`: how many windows of a unit are in scratch memory at a time; 0: none, a unit can have any number of rows.
  // `cut_columns`: tiles walk down the rows of a unit. Behind what they load and store the machine's prefetchers go on
  // for ten rows and more and take them away from another thread that writes there: better one that is beside it.
  // `cut_groups`: a chunk may be part of a wide group's output channels, so that no thread packs all its weights.
  Plan(const ConvProblem& p, int num_threads, int staged, bool cut_columns, bool cut_groups = false) {
    const int64_t width = max(p.din(), p.dout());
    const int64_t step = Blocks(p.din(), p.dout()).groups_per_block;
    const bool enough = p.N * ceil_div(p.out_h(), kFewestRows) >= 2 * num_threads;  // units for whole pixels
    const int64_t channels = min(staged && enough ? kStagedChannels : kChunkChannels, kChunkWeights / width);
    chunk_groups = min(p.groups, round_up(max(1, channels / width), step));
    const bool cut = cut_groups && chunk_groups == 1 && p.din() >= kLanes;
    chunk_outputs = cut ? max(2 * kLanes, kPartWeights / p.din()) : p.dout();
    chunk_outputs = min(p.dout(), round_up(ceil_div(p.dout(), ceil_div(p.dout(), chunk_outputs)), 2 * kLanes));
    parts = ceil_div(p.dout(), chunk_outputs);
    chunks = ceil_div(p.groups, chunk_groups) * parts;

    // The units that leave the busiest thread least to do, where each costs one row more than it has.
    const int64_t out_h = p.out_h(), out_w = p.out_w();
    int64_t least = INT64_MAX;
    for (int64_t wide = round_up(ceil_div(out_w, ceil_div(out_w, kBandColumns)), 2);; wide = (wide - 1) / 4 * 4) {
      const int64_t row_floats = (wide * p.stride + 2 * p.dilation) * staged_pixel(chunk_groups * width);
      const int64_t fit = staged == 0 ? out_h : (kScratchFloats / staged / row_floats - 2 * p.dilation) / p.stride;
      for (int64_t down = ceil_div(out_h, max(kFewestRows, fit));; ++down) {
        const int64_t high = ceil_div(out_h, down);
        const int64_t count = chunks * p.N * ceil_div(out_w, wide) * down;
        const int64_t work = ceil_div(count, num_threads) * (high + 1) * wide;
        if (work < least) least = work, rows = high, columns = wide;
        if (high <= kFewestRows) break;
      }
      if (!cut_columns || wide <= kFewestColumns) break;
    }
    row_bands = ceil_div(out_h, rows);
    column_bands = ceil_div(out_w, columns);
    units = p.N * row_bands * column_bands;
    splits = max(1, min(units, ceil_div(4 * num_threads, chunks)));
  }
  int64_t items() const { return chunks * splits; }
  int64_t groups(const ConvProblem& p, int64_t chunk) const {
    return min(chunk_groups, p.groups - chunk / parts * chunk_groups);
  }
};

// A band of pixels of image n: of z while planning, of anything while staging. Rows and columns may lie outside the
// image; columns outside are staged as zeros, rows outside are never read.
struct Window {
  int64_t n, row, rows, column, columns;
};

inline Window unit_window(const Plan& plan, const ConvProblem& p, int64_t unit) {
  const int64_t column_band = unit % plan.column_bands;
  const int64_t row_band = unit / plan.column_bands % plan.row_bands;
  const int64_t row = row_band * plan.rows, column = column_band * plan.columns;
  return {unit / plan.column_bands / plan.row_bands, row, min(plan.rows, p.out_h() - row), column,
          min(plan.columns, p.out_w() - column)};
}

// The pixels of x that z's window reads.
inline Window input_window(const Window& z, const ConvProblem& p) {
  const int64_t halo = 2 * p.dilation;
  return {z.n, z.row * p.stride - p.dilation, (z.rows - 1) * p.stride + 1 + halo, z.column * p.stride - p.dilation,
          (z.columns - 1) * p.stride + 1 + halo};
}

// The pixels of x that belong to z's window: these windows tile x.
inline Window own_window(const Window& z, const ConvProblem& p) {
  const int64_t row = z.row * p.stride, column = z.column * p.stride;
  return {z.n, row, min(z.rows * p.stride, p.H - row), column, min(z.columns * p.stride, p.W - column)};
}

// The pixels of z that the gradient of x's window reads.
inline Window gradient_window(const Window& x, const ConvProblem& p) {
  const int64_t first_row = floor_div(x.row - p.dilation, p.stride);
  const int64_t first_column = floor_div(x.column - p.dilation, p.stride);
  return {x.n, first_row, floor_div(x.row + x.rows - 1 + p.dilation, p.stride) - first_row + 1, first_column,
          floor_div(x.column + x.columns - 1 + p.dilation, p.stride) - first_column + 1};
}

// What will be staged next: asked for a few cache lines at a time, so that memory works while the tiles compute.
struct Ahead {
  // The pixels of an (N, H, W, C) tensor inside the window, from a chunk's first channel on; none for a null pointer.
  template <class T>
  void add(const T* tensor, int64_t N, int64_t H, int64_t W, int64_t C, Window w, int64_t channel, int64_t channels) {
    const int64_t row = max(w.row, 0), column = max(w.column, 0);
    const int64_t rows = min(w.row + w.rows, H) - row, pixels = min(w.column + w.columns, W) - column;
    if (!tensor || w.n >= N || rows <= 0 || pixels <= 0) return;
    constexpr int64_t kSize = sizeof(T);
    const char* first = (const char*)(tensor + ((w.n * H + row) * W + column) * C + channel);
    const int64_t skipped = (int64_t)((uintptr_t)first % 64);  // from the start of a line
    Part& part = parts_[count_++];
    part = {first - skipped, rows, W * C * kSize, pixels, C * kSize, ceil_div(channels * kSize + skipped, 64)};
    lines += rows * pixels * part.lines;
    if (part.lines * 64 == part.pixel_bytes) part.lines *= pixels, part.pixels = 1;  // without gaps
    if (count_ == 1) left_ = part.lines, at_ = part.first;
  }
  void fetch(int64_t n) {
    while (n > 0 && part_ < count_) {
      const int64_t now = min(n, left_);
      for (const char* const end = at_ + 64 * now; at_ < end; at_ += 64) __builtin_prefetch(at_, 0, 2);
      n -= now;
      left_ -= now;
      if (left_ == 0) next_pixel();
    }
  }
  int64_t lines = 0;  // all that were added

 private:
  struct Part {
    const char* first;
    int64_t rows, row_bytes, pixels, pixel_bytes, lines;
  };
  void next_pixel() {
    if (++pixel_ == parts_[part_].pixels) pixel_ = 0, ++row_;
    if (row_ == parts_[part_].rows) row_ = 0, ++part_;
    if (part_ == count_) return;
    const Part& part = parts_[part_];
    at_ = part.first + row_ * part.row_bytes + pixel_ * part.pixel_bytes;
    left_ = part.lines;
  }
  Part parts_[3];
  int64_t count_ = 0, part_ = 0, row_ = 0, pixel_ = 0;
  const char* at_ = nullptr;
  int64_t left_ = 0;  // lines of the pixel
};

// The memory of one call: a part that the threads share and a slice for each of them.
struct Scratch {
  float* shared;

  Scratch(int num_threads, int64_t shared_floats, int64_t thread_floats)
      : shared_floats_(round_up(shared_floats, 16)), thread_floats_(round_up(thread_floats, 16)) {
    shared = workspace((size_t)(shared_floats_ + num_threads * thread_floats_));
  }
  float* mine() const { return shared + shared_floats_ + omp_get_thread_num() * thread_floats_; }

 private:
  int64_t shared_floats_, thread_floats_;
};

// The items 0 ... count - 1 of a parallel region. A thread first takes its own share, which is the same in every call,
// so that its cache has what it read and wrote there the last time, and then what the others have left.
class Shares {
 public:
  Shares(int64_t count, int num_threads) : count_(count), next_((size_t)num_threads) {
    for (int64_t share = 0; share < num_threads; ++share) next_[share].item = begin(share);
  }
  // By every thread of the region: f(item) for what it takes.
  template <class F>
  RK_INLINE void run(F&& f) {
    const int64_t threads = (int64_t)next_.size(), first = omp_get_thread_num();
    for (int64_t share = first; share < first + threads; ++share) {
      const int64_t end = begin(share % threads + 1);
      int64_t& next = next_[share % threads].item;
      for (;;) {
        int64_t item;
#pragma omp atomic capture
        item = next++;
        if (item >= end) break;
        f(item);
      }
    }
  }

 private:
  struct alignas(64) Next {
    int64_t item;
  };
  int64_t begin(int64_t share) const { return share * count_ / (int64_t)next_.size(); }
  int64_t count_;
  std::vector<Next> next_;
};

// f(chunk, split, first unit, last unit, new_chunk) for every item; what it computes does not depend on the thread.
// new_chunk: the thread had another.
template <class F>
void for_items(const Plan& plan, int num_threads, F f) {
  Shares shares(plan.items(), num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && plan.items() > 1)
  {
    int64_t last = -1;
    shares.run([&](int64_t item) {
      const int64_t chunk = item / plan.splits, split = item % plan.splits;
      f(chunk, split, split * plan.units / plan.splits, (split + 1) * plan.units / plan.splits, chunk != last);
      last = chunk;
      end_streaming();
    });
  }
}

}  // namespace resnext_kernels::cpu::RK_ISA
