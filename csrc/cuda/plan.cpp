#include "plan.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "params.h"

namespace resnext_kernels::cuda {
namespace {

constexpr int kMaxD = 64;

template <class T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
uint32_t magic(int64_t divisor) { return static_cast<uint32_t>(ceil_div<int64_t>(int64_t{1} << kMagicShift, divisor)); }

std::string name_of(DType dtype) { return dtype == DType::f16 ? "f16" : "bf16"; }

template <class Params>
Launch launch(std::string kernel, std::array<unsigned, 3> grid, unsigned block, int shared_bytes, const Params& params,
              int workspace_at = -1) {
  Launch made{std::move(kernel), grid, block, shared_bytes, std::vector<char>(sizeof(Params)), workspace_at};
  std::memcpy(made.params.data(), &params, sizeof(Params));
  return made;
}

// The second stage of a reduction over so many columns.
template <class Params>
Launch reduce_launch(std::string kernel, int64_t columns, const Params& params) {
  const int warps = ceil_div(params.parts, kReduceParts * 32 / kReduceColumns);
  return launch(std::move(kernel), {static_cast<unsigned>(ceil_div<int64_t>(columns, kReduceColumns)), 1, 1},
                32 * std::min(warps, 32), 0, params, offsetof(Params, partial));
}
Launch finish_moments(const BatchNorm& bn, float* vectors, int parts) {
  const FinishMomentsParams params{nullptr, bn.gamma, bn.beta, vectors, bn.eps, static_cast<int32_t>(bn.C), parts};
  return reduce_launch("finish_moments", bn.C, params);
}

// ---- channels of a block ---------------------------------------------------------------------------------------

// Input chunks (of 8 channels) that a pair of output chunks reads at most, in blocks of `chunks`.
int band(int64_t D, int chunks) {
  if (8 % D == 0) return 1;  // each output chunk reads its own input chunk only
  int64_t most = 0;
  for (int64_t first = 0; first < chunks; first += 2) {
    const int64_t last = std::min<int64_t>(first + 2, chunks) * 8 - 1;
    const int64_t begin = first * 8 / D * D / 8, end = ceil_div((last / D + 1) * D, int64_t{8});
    most = std::max(most, end - begin);
  }
  return most <= 2 ? 2 : most <= 4 && chunks <= slots(4) ? 4 : 8;
}

// Whole groups in whole chunks, at most 64 channels: as many as leave the band as narrow as fewest would.
int block_chunks(int64_t D) {
  const int fewest = static_cast<int>(std::lcm(D, int64_t{8}) / 8);
  int chunks = fewest;
  for (int more = fewest; more <= kMostSlots; more += fewest) {
    if (band(D, more) == band(D, fewest)) chunks = more;
  }
  return chunks;
}

// ---- positions of a block --------------------------------------------------------------------------------------

struct Tiling {
  ConvParams params;
  int shared_bytes;
  unsigned channel_blocks, pair_blocks;
  int parts() const { return params.strips * params.segments * params.walks; }
};

int shared_bytes(ConvParams& p, Geometry g, Pass pass) {
  const bool forward = pass <= Pass::forward;
  const int pixel_bytes = 16 * slots(p.band);
  p.in_pixels = p.streams * p.pitch;
  p.out_pixels = ceil_div(p.streams * p.units, 2) * 2 * kUnit * out_stride(g);
  p.group_bytes = rows_per_group(g, p.band) * p.in_pixels * pixel_bytes;
  p.side_bytes = rows_per_step(g, p.band) * p.out_pixels * pixel_bytes;
  const int group = ceil_div(p.group_bytes, 128) * 128, side = p.side_bytes;
  int offset = ceil_div(kRing * p.group_bytes, 128) * 128;
  p.z_offset = offset;
  if (!forward && p.in_z) offset += group;
  p.y_offset = offset;
  if (!forward && p.in_y) offset += group;
  p.side_offset = p.out_offset = offset;
  if (p.side) offset += 2 * side;
  if (!forward || !p.side) {  // a residual's place takes the output
    p.out_offset = offset;
    if (p.out) offset += side;
  }
  const int rows = p.block_chunks * 8;
  const int weights = pass == Pass::dweight ? 0 : rows * (p.D * 9 + (p.D % 16 ? 0 : 8)) * 2 + 48;
  const int dweight_rows = pass == Pass::dweight && p.band == 8 ? std::min(rows, 32) : rows;
  const int dweight = p.dweight ? dweight_rows * (p.D * 9 + (p.D % 8 ? 0 : 4)) * 4 : 0;
  return std::max({offset, weights, dweight});
}

// Divides the map into strips of columns, and images into walks, so that the blocks fill the device evenly.
Tiling tile(ConvParams p, Geometry g, Pass pass, const Device& device) {
  const bool forward = pass <= Pass::forward;
  Tiling t{};
  const int positions = g == Geometry::t2 ? p.in_w : p.out_w;
  p.block_chunks = block_chunks(p.D);
  p.band = band(p.D, p.block_chunks);
  const int out_rows = rows_per_step(g, p.band), run = kThreads / slots(p.band);
  p.slots = std::min(slots(p.band), std::max((p.block_chunks + 1) / 2 * 2, p.band));
  p.steps = ceil_div(p.out_h, out_rows);

  const int units = ceil_div(positions, kUnit);
  const int held = blocks_held::conv(p.band, pass);
  int places = held * device.multiprocessors;
  // of a multiprocessor's shared memory the driver keeps 1024 bytes for each block
  const int soft_limit = (device.shared_bytes + 1024) / held - 1024;
  const auto lay_out = [&](int width, int streams) {  // whether it fits
    p.units = width;
    p.streams = streams;
    p.positions = std::min(width * kUnit, positions);
    p.pitch = pitch(g, p.positions);
    t.shared_bytes = shared_bytes(p, g, pass);
    return t.shared_bytes <= soft_limit;
  };
  int strips = ceil_div(units, kMostUnits);
  while (!lay_out(ceil_div(units, strips), 1) && strips < units) ++strips;
  const int width = ceil_div(units, strips);
  p.strips = ceil_div(units, width);
  if (t.shared_bytes > soft_limit) places = device.multiprocessors;
  if (t.shared_bytes > device.shared_bytes) throw std::invalid_argument("the device has too little shared memory");

  t.channel_blocks = static_cast<unsigned>(ceil_div(p.C / 8, p.block_chunks));
  t.pair_blocks = pass == Pass::dweight && p.band == 8 ? (p.block_chunks > 4 ? 2 : 1) : 1;

  // Time in bytes a multiprocessor moves: full rounds of blocks, each of set-up (weights) and turns; and the partial
  // dweight of every part, written and read again. Blocks that share a multiprocessor hardly slow each other down: most
  // of a block's time is waiting.
  const double setup_bytes = 2.0 * p.block_chunks * 8 * p.D * 18;
  const double partial_bytes = p.dweight ? 8.0 * p.C * p.D * 9 : 0;
  double best = -1;
  int best_streams = 1;
  for (int streams = p.strips > 1 ? 1 : std::min(std::max(1, kMostUnits / width), p.N); streams > 0; --streams) {
    if (!lay_out(width, streams) && streams > 1) continue;
    const int image_groups = ceil_div(p.N, streams);
    // a turn costs its tiles of 16 positions, its input pixels, which threads fetch a run at a time, and whatever its
    // size as much as 64 positions more
    const double positions_done = out_rows * ceil_div(streams * width, 2) * 16 * (forward ? 1.0 : 2.5);
    const int runs = ceil_div(streams * std::min(p.in_w, p.pitch), run);
    const double pixels_done = rows_per_group(g, p.band) * runs * run * (forward ? 1.0 : 2.5);
    const double turn_bytes = (64 + positions_done + pixels_done) * p.block_chunks * 16;
    for (int segments = 1; segments <= std::min(p.steps, 8); ++segments) {
      const int segment_steps = ceil_div(p.steps, segments);
      if (ceil_div(p.steps, segment_steps) != segments) continue;
      const int64_t per_walk = static_cast<int64_t>(t.channel_blocks) * t.pair_blocks * p.strips * segments;
      for (int rounds = 1; rounds <= 8; ++rounds) {
        const int64_t wanted = std::max<int64_t>(1, rounds * int64_t{places} / per_walk);
        const int walk = ceil_div<int64_t>(image_groups, std::min<int64_t>(wanted, image_groups));
        const int walks = ceil_div(image_groups, walk);
        const double full_rounds = ceil_div<int64_t>(per_walk * walks, places);
        const double parts = static_cast<double>(p.strips) * segments * walks;
        const double time = full_rounds * (setup_bytes + walk * (segment_steps + 1) * turn_bytes) +
                            (parts > 1 ? parts * partial_bytes / device.multiprocessors : 0);
        if (best < 0 || time < 0.99 * best) {
          best = time, best_streams = streams;
          p.segments = segments, p.segment_steps = segment_steps, p.walk = walk, p.walks = walks;
        }
      }
    }
  }
  lay_out(width, best_streams);
  p.in_row = int64_t{2} * p.in_w * p.C, p.in_image = p.in_row * p.in_h;
  p.out_row = int64_t{2} * p.out_w * p.C, p.out_image = p.out_row * p.out_h;
  p.in_magic = p.strips == 1 ? magic(p.in_w) : 0;
  p.out_magic = p.strips == 1 ? magic(p.out_w) : 0;
  p.stream_magic = magic(p.streams);
  p.walk_magic = magic(int64_t{p.strips} * p.segments);
  p.strip_magic = magic(p.strips);
  p.unit_magic = magic(p.units);
  p.group_magic = magic(p.D);
  p.row_magic = magic(std::max(1, p.D * 9 / 8));
  t.params = p;
  return t;
}

std::string name_of(Pass pass) {
  static const char* const names[] = {"eval", "forward", "backward", "dx", "dweight"};
  return names[static_cast<int>(pass)];
}

Launch conv_launch(DType dtype, const Tiling& t, Geometry g, Pass pass) {
  const char* geometry = g == Geometry::s1 ? "s1" : g == Geometry::s2 ? "s2" : "t2";
  std::string kernel =
      "conv_" + name_of(dtype) + "_" + geometry + "_q" + std::to_string(t.params.band) + "_" + name_of(pass);
  return launch(std::move(kernel), {t.channel_blocks, static_cast<unsigned>(t.parts()), t.pair_blocks}, kThreads,
                t.shared_bytes, t.params);
}

void require(const ConvProblem& problem) {
  const std::string reason = why_not(problem);
  if (!reason.empty()) throw std::invalid_argument(reason);
}

void set_weight(ConvParams& p, Weight weight, int64_t D) {
  p.weight = weight.data;
  p.weight_in = weight.channels_last ? 1 : 9, p.weight_tap = weight.channels_last ? static_cast<int32_t>(D) : 1;
}

ConvParams forward_params(const ConvProblem& problem, const void* x, Weight weight, Affine prologue, void* out) {
  ConvParams p{};
  p.in = x, p.out = out;
  set_weight(p, weight, problem.din());
  p.in_scale = prologue.scale, p.in_shift = prologue.shift;
  p.N = problem.N, p.C = problem.C, p.D = problem.din();
  p.in_h = problem.H, p.in_w = problem.W, p.out_h = problem.out_h(), p.out_w = problem.out_w();
  return p;
}

Plan plan_forward(const ConvProblem& problem, const Device& device, const ConvParams& params, Pass pass,
                  const BatchNorm& bn, float* vectors) {
  const Geometry g = problem.stride == 1 ? Geometry::s1 : Geometry::s2;
  const Tiling t = tile(params, g, pass, device);
  Plan plan;
  plan.launches.push_back(conv_launch(problem.dtype, t, g, pass));
  if (vectors) {
    plan.workspace_floats = int64_t{4} * t.parts() * problem.C;
    plan.launches[0].workspace_at = offsetof(ConvParams, stats);
    plan.launches.push_back(finish_moments(bn, vectors, t.parts()));
  }
  return plan;
}

}  // namespace

std::string why_not(const ConvProblem& p) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "dtype must be float16 or bfloat16";
  if (p.N < 1) return "the batch is empty";
  if (p.stride > 2) return "stride must be 1 or 2, not " + std::to_string(p.stride);
  if (p.dilation != 1) return "dilation must be 1, not " + std::to_string(p.dilation);
  if (p.C != p.K) {
    return "input and output channels must be as many, not " + std::to_string(p.C) + " and " + std::to_string(p.K);
  }
  if (p.C % 8) return "channels must be a multiple of 8, not " + std::to_string(p.C);
  if (p.din() > kMaxD) return "channels per group must be at most 64, not " + std::to_string(p.din());
  if (std::lcm(p.din(), int64_t{8}) > 8 * kMostSlots) {
    return "channels per group must have a common multiple with 8 of at most 64, not " + std::to_string(p.din());
  }
  const int64_t most = int64_t{1} << 30, widest = int64_t{1} << 17;
  if (std::max({p.N, p.H, p.C}) > most) return "sizes must be at most 2**30";
  if (p.W > widest) return "images must be at most 2**17 pixels wide, not " + std::to_string(p.W);
  return "";
}

Plan plan_conv_bn_relu(const ConvProblem& problem, const Device& device, const void* x, Weight weight,
                       const BatchNorm& bn, const void* residual, Affine prologue, void* y) {
  require(problem);
  ConvParams p = forward_params(problem, x, weight, prologue, y);
  p.side = residual;
  p.gamma = bn.gamma, p.beta = bn.beta, p.mean = bn.mean, p.var = bn.var, p.eps = bn.eps;
  return plan_forward(problem, device, p, Pass::eval, bn, nullptr);
}

Plan plan_conv_stats(const ConvProblem& problem, const Device& device, const void* x, Weight weight, Affine prologue,
                     void* z, const BatchNorm& bn, float* vectors) {
  require(problem);
  return plan_forward(problem, device, forward_params(problem, x, weight, prologue, z), Pass::forward, bn, vectors);
}

Plan plan_conv_backward(const ConvProblem& problem, const Device& device, const Gradient& gradient, const void* x,
                        Affine prologue, Weight weight, void* dx, void* dweight) {
  require(problem);
  const Geometry g = problem.stride == 1 ? Geometry::s1 : Geometry::t2;
  ConvParams p{};
  p.in = gradient.dy, p.in_z = gradient.z, p.in_y = gradient.y;
  p.in_scale = gradient.affine.scale, p.in_shift = gradient.affine.shift;
  p.a = gradient.a, p.b = gradient.b, p.c = gradient.c;
  set_weight(p, weight, problem.din());
  p.N = problem.N, p.C = problem.C, p.D = problem.din();
  p.in_h = problem.out_h(), p.in_w = problem.out_w(), p.out_h = problem.H, p.out_w = problem.W;

  Plan plan;
  const auto add = [&](Pass pass) {
    const bool wants_dweight = pass != Pass::dx && dweight;
    ConvParams q = p;
    q.out = pass == Pass::dweight ? nullptr : dx;
    if (wants_dweight) q.side = x, q.side_scale = prologue.scale, q.side_shift = prologue.shift, q.dweight = dweight;
    Tiling t = tile(q, g, pass, device);
    const bool reduces = wants_dweight && (t.parts() > 1 || weight.channels_last);
    if (reduces) t.params.dweight = nullptr;
    plan.launches.push_back(conv_launch(problem.dtype, t, g, pass));
    if (!reduces) return;
    const int64_t size = problem.K * problem.din() * 9;
    plan.workspace_floats = size * t.parts();
    plan.launches.back().workspace_at = offsetof(ConvParams, dweight_partial);
    const AddDweightParams reduce{nullptr, dweight, size, t.parts(), weight.channels_last ? p.D : 0};
    plan.launches.push_back(reduce_launch("add_dweight_" + name_of(problem.dtype), ceil_div<int64_t>(size, 4), reduce));
  };
  if (band(p.D, block_chunks(p.D)) < 8) {
    if (dx || dweight) add(Pass::backward);
  } else {  // too many weights and sums for one kernel's registers
    if (dx) add(Pass::dx);
    if (dweight) add(Pass::dweight);
  }
  return plan;
}

namespace {

// held: blocks of the kernel on a multiprocessor
PointwiseParams pointwise(int64_t M, int64_t C, const Gradient& g, const Device& device, int held) {
  if (C % 8) throw std::invalid_argument("channels must be a multiple of 8, not " + std::to_string(C));
  PointwiseParams p{};
  p.dy = g.dy, p.z = g.z, p.y = g.y;
  p.scale = g.affine.scale, p.shift = g.affine.shift;
  p.a = g.a, p.b = g.b, p.c = g.c;
  p.M = M, p.C = static_cast<int32_t>(C);
  const int64_t columns = ceil_div<int64_t>(C, 64), runs = ceil_div<int64_t>(M, kThreads / kMostSlots);
  const int64_t blocks = int64_t{held} * device.multiprocessors;
  p.parts = static_cast<int32_t>(std::max<int64_t>(1, std::min(runs, blocks / columns)));
  p.rows = static_cast<int32_t>(ceil_div<int64_t>(runs, p.parts));
  return p;
}
std::array<unsigned, 3> pointwise_grid(const PointwiseParams& p) {
  return {static_cast<unsigned>(ceil_div(p.C, 64)), static_cast<unsigned>(p.parts), 1};
}

}  // namespace

Plan plan_batch_stats(DType dtype, int64_t M, int64_t C, const Device& device, const void* z, const BatchNorm& bn,
                      float* vectors) {
  Gradient g;
  g.z = z;
  const PointwiseParams p = pointwise(M, C, g, device, blocks_held::moments);
  Plan plan;
  plan.workspace_floats = 4 * C * p.parts;
  plan.launches.push_back(
      launch("moments_" + name_of(dtype), pointwise_grid(p), kThreads, 0, p, offsetof(PointwiseParams, partial)));
  plan.launches.push_back(finish_moments(bn, vectors, p.parts));
  return plan;
}

Plan plan_normalize_relu(DType dtype, int64_t M, int64_t C, const Device& device, const void* z, Affine affine,
                         const void* residual, Affine residual_affine, void* y) {
  Gradient g;
  g.z = z, g.affine = affine;
  PointwiseParams p = pointwise(M, C, g, device, blocks_held::normalize_relu);
  p.residual = residual, p.res_scale = residual_affine.scale, p.res_shift = residual_affine.shift;
  p.out = y;
  Plan plan;
  plan.launches.push_back(launch("normalize_relu_" + name_of(dtype), pointwise_grid(p), kThreads, 0, p));
  return plan;
}

Plan plan_bn_relu_backward(DType dtype, int64_t M, int64_t C, const Device& device, const Gradient& gradient,
                           const float* vectors, float* sum_g, float* sum_g_xhat, float* coefficients, void* g) {
  PointwiseParams p = pointwise(M, C, gradient, device, blocks_held::bn_relu_sums);
  p.mean = vectors, p.rstd = vectors + 2 * C, p.out = g;
  Plan plan;
  plan.workspace_floats = 2 * C * p.parts;
  plan.launches.push_back(
      launch("bn_relu_sums_" + name_of(dtype), pointwise_grid(p), kThreads, 0, p, offsetof(PointwiseParams, partial)));
  const float count = static_cast<float>(std::max<int64_t>(M, 1));
  const AddSumsParams reduce{nullptr, vectors, sum_g, sum_g_xhat, coefficients, count, p.C, p.parts};
  plan.launches.push_back(reduce_launch("add_sums", C, reduce));
  return plan;
}

Plan plan_bn_relu_input_gradient(DType dtype, int64_t M, int64_t C, const Device& device, const Gradient& gradient,
                                 void* dz) {
  PointwiseParams p = pointwise(M, C, gradient, device, blocks_held::bn_relu_dz);
  p.out = dz;
  Plan plan;
  plan.launches.push_back(launch("bn_relu_dz_" + name_of(dtype), pointwise_grid(p), kThreads, 0, p));
  return plan;
}

namespace {

BatchNormParams batch_norm_params(const BatchNorm& bn, float* affine) {
  return {bn.gamma, bn.beta, bn.mean, bn.var, bn.eps, 1.f, nullptr, affine, static_cast<int32_t>(bn.C)};
}

Plan vectors_plan(const BatchNormParams& params) {
  Plan plan;
  plan.launches.push_back(
      launch("bn_vectors", {static_cast<unsigned>(ceil_div(params.C, kThreads)), 1, 1}, kThreads, 0, params));
  return plan;
}

}  // namespace

Plan plan_bn_affine(const BatchNorm& bn, float* affine) { return vectors_plan(batch_norm_params(bn, affine)); }

Plan plan_bn_vectors(const BatchNorm& bn, float unbias, float* vectors) {
  BatchNormParams params = batch_norm_params(bn, vectors + 3 * bn.C);
  params.unbias = unbias, params.statistics = vectors;
  return vectors_plan(params);
}

}  // namespace resnext_kernels::cuda
