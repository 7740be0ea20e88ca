// Every CPU kernel, in every instruction set this machine can run, against naive references in double precision.
//
//   kernels_test [EVERY]    runs every EVERY-th problem only (default 1: all of them)
//
// Inputs are rounded to the storage type first, so the reference sees the same numbers. Outputs are filled with NaN
// before each call, every buffer lies between guards that must survive, and inputs must come back unchanged. Guards
// hold a finite number, which no result may depend on: NaN would send some kernels back to another algorithm. Under
// AddressSanitizer every buffer is exactly as large as its tensor, so that it sees every read past an end.
//
// Bounds are derived, never tuned. A float32 sum of n terms, each the product of rounded factors, is off by at most
// (n + 4) * 2^-24 * sum|terms| in whatever order it is taken (Higham, Accuracy and Stability of Numerical Algorithms,
// section 3.1); storing it adds half a unit in the last place of the storage type.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAS_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define HAS_ASAN
#endif

using namespace resnext_kernels;
using cpu::Affine;
using cpu::Kernels;
using cpu::ReluBNGradient;
using std::vector;

namespace {

constexpr double kUnit = 0x1p-24;  // float32's unit roundoff
constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr int kThreads[] = {1, 3, 17};

int passed = 0, failed = 0;

// ---- storage types, independent of csrc/cpu/simd.h

struct Format {
  const char* name;
  size_t bytes;
  int digits;        // bits of the significand, the implicit one included
  int min_exponent;  // of the smallest normal number, as frexp counts

  // The largest error of rounding v is unit() * |v| + tiny(), the second term for subnormal numbers.
  double unit() const { return std::ldexp(1, -digits); }
  double tiny() const { return std::ldexp(1, min_exponent - digits - 1); }
};
Format format(DType dtype) {
  switch (dtype) {
    case DType::bf16: return {"bf16", 2, 8, -125};
    case DType::f16: return {"f16", 2, 11, -13};
    default: return {"f32", 4, 24, -125};
  }
}

// To nearest even, subnormals included; the tests' numbers never overflow.
double rounded(DType dtype, double v) {
  if (v == 0 || !std::isfinite(v)) return v;
  const Format f = format(dtype);
  int exponent;
  std::frexp(v, &exponent);
  const int shift = f.digits - std::max(exponent, f.min_exponent);
  return std::ldexp(std::nearbyint(std::ldexp(v, shift)), -shift);
}

void encode(DType dtype, double v, char* p) {
  const float value = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::f32) {
    std::memcpy(p, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::f16) {
    const double magnitude = std::fabs(v);
    if (std::isnan(v)) {
      half = 0x7e00;
    } else if (std::isinf(v)) {
      half = 0x7c00;
    } else if (magnitude < 0x1p-14) {
      half = static_cast<uint16_t>(std::ldexp(magnitude, 24));
    } else {
      int exponent;
      const double significand = std::frexp(magnitude, &exponent);
      half = static_cast<uint16_t>(((exponent + 13) << 10) + (int)std::ldexp(significand, 11));
    }
    if (std::signbit(v)) half |= 0x8000;
  }
  std::memcpy(p, &half, 2);
}

double decode(DType dtype, const char* p) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, p, 2);
  if (dtype == DType::bf16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

// ---- tensors in guarded memory

#if defined(HAS_ASAN)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 512;  // a pixel of 128 channels
#endif
constexpr char kGuardByte = 0x4b;  // 1e7 in float32 and bfloat16, 15 in float16

// A dense tensor. Its address is aligned to one element only (every other one), as torch's views may be.
class Tensor {
 public:
  Tensor(DType dtype, size_t count)
      : dtype_(dtype), bytes_(count * format(dtype).bytes), offset_(kGuard + (++made_ % 2) * format(dtype).bytes) {
    memory_ = static_cast<char*>(std::malloc(offset_ + bytes_ + kGuard));
    std::memset(memory_, kGuardByte, offset_ + bytes_ + kGuard);
    poison();
  }
  Tensor(DType dtype, const vector<double>& values) : Tensor(dtype, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) encode(dtype, values[i], bytes_at(i));
    original_.assign(memory_ + offset_, memory_ + offset_ + bytes_);
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { std::free(memory_); }

  void* data() { return memory_ + offset_; }
  float* floats() { return static_cast<float*>(data()); }
  DType dtype() const { return dtype_; }
  size_t bytes() const { return bytes_; }
  size_t count() const { return bytes_ / format(dtype_).bytes; }
  double operator[](size_t i) const { return decode(dtype_, memory_ + offset_ + i * format(dtype_).bytes); }
  vector<double> values() const {
    vector<double> v(count());
    for (size_t i = 0; i < v.size(); ++i) v[i] = (*this)[i];
    return v;
  }
  void poison() { std::memset(memory_ + offset_, 0xff, bytes_); }  // NaN in every type
  bool intact() const {                                            // the guards, and the contents if this is an input
    const auto survived = [](const char* guard, size_t bytes) {
      return std::all_of(guard, guard + bytes, [](char byte) { return byte == kGuardByte; });
    };
    if (!survived(memory_, offset_) || !survived(memory_ + offset_ + bytes_, kGuard)) return false;
    return original_.empty() || std::memcmp(memory_ + offset_, original_.data(), bytes_) == 0;
  }

 private:
  char* bytes_at(size_t i) { return memory_ + offset_ + i * format(dtype_).bytes; }

  static inline size_t made_ = 0;
  DType dtype_;
  size_t bytes_, offset_;
  char* memory_;
  vector<char> original_;
};

// A result of the reference with the largest error that float32 arithmetic may make, before storing. A bound of NaN:
// the order of the sum decides between NaN and another value, as where Inf or NaN meets the zeros of the padding (torch
// itself does either) or where partial means of Inf are merged.
struct Expected {
  vector<double> value, bound;
  explicit Expected(size_t count = 0) : value(count), bound(count) {}
};

void report(bool ok, const std::string& name, const std::string& message) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 20) std::printf("FAILED %s: %s\n", name.c_str(), message.c_str());
}

void check(const std::string& name, const Tensor& got, const Expected& expected) {
  const Format f = format(got.dtype());
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.count(); ++i) {
    const double want = expected.value[i], bound = expected.bound[i], have = got[i];
    bool ok;
    if (std::isnan(want)) {  // also where the bound is NaN: something did depend on it
      ok = std::isnan(have);
    } else if (std::isinf(want)) {
      ok = have == want || (std::isnan(bound) && std::isnan(have));
    } else {
      ok = std::isnan(bound) || std::fabs(have - want) <= bound + f.unit() * (std::fabs(want) + bound) + f.tiny();
    }
    if (!ok && wrong++ == 0) first = i;
  }
  char message[200] = "";
  if (wrong != 0)
    std::snprintf(message, sizeof message, "%zu of %zu wrong, first at %zu: got %.9g, want %.9g +- %.3g", wrong,
                  got.count(), first, got[first], expected.value[first], expected.bound[first]);
  report(wrong == 0, name, message);
}

void check_intact(const std::string& name, std::initializer_list<const Tensor*> tensors) {
  int index = 0;
  for (const Tensor* tensor : tensors) {
    if (tensor != nullptr && !tensor->intact())
      return report(false, name, "tensor " + std::to_string(index) + ": guard or input overwritten");
    ++index;
  }
  report(true, name, "");
}

// ---- numbers

std::mt19937 generator;

vector<double> uniform(DType dtype, size_t count, double low = -2, double high = 2) {
  std::uniform_real_distribution<double> distribution(low, high);
  vector<double> v(count);
  for (double& value : v) value = rounded(dtype, distribution(generator));
  return v;
}

// Batch norm's scale and shift: both signs, zeros, and powers of two, which make exact zeros at the ReLU.
struct Vectors {
  vector<double> scale, shift;
  explicit Vectors(size_t channels)
      : scale(uniform(DType::f32, channels)), shift(uniform(DType::f32, channels, -1, 1)) {
    for (size_t c = 0; c < channels; ++c) {
      if (c % 5 == 1) scale[c] = c % 2 != 0 ? -1 : 0.5;
      if (c % 5 == 1) shift[c] = std::nearbyint(8 * shift[c]) / 8;
      if (c % 11 == 7) scale[c] = 0;
      if (c % 13 == 3) shift[c] = 0;
    }
  }
};

// z with zeros of scale * z + shift among its values, but none whose sign hangs on a float32 rounding.
vector<double> near_relu(DType dtype, size_t rows, const Vectors& bn) {
  const size_t channels = bn.scale.size();
  vector<double> z = uniform(dtype, rows * channels);
  for (size_t i = 0; i < z.size(); ++i) {
    const double scale = bn.scale[i % channels], shift = bn.shift[i % channels];
    if (i % 4 == 0 && scale != 0 && rounded(dtype, -shift / scale) * scale + shift == 0)
      z[i] = rounded(dtype, -shift / scale);
    const double pre = scale * z[i] + shift, terms = std::fabs(scale * z[i]) + std::fabs(shift);
    if (std::fabs(pre) <= 2 * kUnit * terms && (pre != 0 || rounded(DType::f32, scale * z[i]) != scale * z[i]))
      z[i] = rounded(dtype, z[i] + 1);
  }
  return z;
}

double relu(double v) { return v <= 0 ? 0 : v; }  // NaN passes

// ---- references

// A tensor as float32 arithmetic forms it: values and the sum of the magnitudes of the terms that make them.
struct Terms {
  vector<double> value, magnitude;
  explicit Terms(size_t count) : value(count), magnitude(count) {}
};

Terms activation(const vector<double>& x, const Vectors* prologue) {
  Terms a(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    a.value[i] = x[i];
    a.magnitude[i] = std::fabs(x[i]);
    if (prologue != nullptr) {
      const size_t c = i % prologue->scale.size();
      const double scaled = prologue->scale[c] * x[i];
      a.value[i] = relu(scaled + prologue->shift[c]);
      a.magnitude[i] = std::fabs(scaled) + std::fabs(prologue->shift[c]);
    }
    if (!std::isfinite(a.magnitude[i])) a.magnitude[i] = std::fabs(a.value[i]);
  }
  return a;
}

// g = dy where the ReLU passed;  dz = a * g + b * z + c, or g alone without a
struct GradientInputs {
  vector<double> dy, z, y;  // empty: absent
  const Vectors* bn;
  vector<double> a, b, c;
  bool relu = true;
};
Terms gradient(const GradientInputs& in) {
  Terms dz(in.dy.size());
  for (size_t i = 0; i < in.dy.size(); ++i) {
    dz.value[i] = in.dy[i];
    dz.magnitude[i] = std::fabs(in.dy[i]);
    if (in.z.empty()) continue;
    const size_t channel = i % in.bn->scale.size();
    const double pre = in.y.empty() ? in.bn->scale[channel] * in.z[i] + in.bn->shift[channel] : in.y[i];
    const double g = in.relu && pre <= 0 ? 0 : in.dy[i];
    dz.value[i] = g;
    if (!in.a.empty()) {
      dz.value[i] = in.a[channel] * g + in.b[channel] * in.z[i] + in.c[channel];
      dz.magnitude[i] = std::fabs(in.a[channel] * g) + std::fabs(in.b[channel] * in.z[i]) + std::fabs(in.c[channel]);
    }
  }
  return dz;
}

// Calls f(pixel of z, pixel of x or -1 in the padding, tap) for every tap of every window.
template <class F>
void for_each_tap(const ConvProblem& p, F f) {
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t oh = 0; oh < p.out_h(); ++oh)
      for (int64_t ow = 0; ow < p.out_w(); ++ow)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t h = oh * p.stride + (tap / 3 - 1) * p.dilation, w = ow * p.stride + (tap % 3 - 1) * p.dilation;
          const bool inside = h >= 0 && h < p.H && w >= 0 && w < p.W;
          f((n * p.out_h() + oh) * p.out_w() + ow, inside ? (n * p.H + h) * p.W + w : -1, tap);
        }
}

// Calls f(index of x, index of weight, index of z) for every product of the convolution.
template <class F>
void for_each_product(const ConvProblem& p, F f) {
  const int64_t din = p.din(), dout = p.dout();
  for_each_tap(p, [&](int64_t z_pixel, int64_t x_pixel, int64_t tap) {
    if (x_pixel < 0) return;
    for (int64_t k = 0; k < p.K; ++k)
      for (int64_t i = 0; i < din; ++i)
        f(x_pixel * p.C + k / dout * din + i, (k * din + i) * 9 + tap, z_pixel * p.K + k);
  });
}

// Where the kernels compute pairs of columns by F(2, 3), rounding enters by more products than those of the
// convolution: all of a pair with what either of its columns reads, ky fixed. The magnitudes of V0 U0 ... V3 U3 sum to
// at most twice those of these products, and so do those of the gradient's M. Calls f(index of the operand, index of
// weight, index of the result) for each, twice; `transposed`: the result is x, else z.
template <class F>
void for_each_rounding(const ConvProblem& p, bool transposed, F f) {
  if (p.stride != 1 || p.dilation != 1 || p.W < 4) return;
  const int64_t din = p.din(), dout = p.dout();
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t row = 0; row < p.H; ++row)
      for (int64_t from = std::max<int64_t>(row - 1, 0); from <= std::min(row + 1, p.H - 1); ++from)
        for (int64_t column = 0; column < p.W; ++column)
          for (int64_t c = std::max<int64_t>(column / 2 * 2 - 1, 0); c <= std::min(column / 2 * 2 + 2, p.W - 1); ++c)
            for (int64_t kx = 0; kx < 6; ++kx) {
              const int64_t ky = transposed ? row - from + 1 : from - row + 1;
              const int64_t result = (n * p.H + row) * p.W + column, operand = (n * p.H + from) * p.W + c;
              for (int64_t k = 0; k < p.K; ++k)
                for (int64_t i = 0; i < din; ++i) {
                  const int64_t x = k / dout * din + i, w = (k * din + i) * 9 + ky * 3 + kx % 3;
                  if (transposed)
                    f(operand * p.K + k, w, result * p.C + x);
                  else
                    f(operand * p.C + x, w, result * p.K + k);
                }
            }
}

double finite_or_zero(double v) { return std::isfinite(v) ? v : 0; }

Expected summed(const Terms& sum, double count) {
  Expected e(sum.value.size());
  e.value = sum.value;
  for (size_t i = 0; i < e.bound.size(); ++i) e.bound[i] = (count + 4) * kUnit * sum.magnitude[i];
  return e;
}

size_t rows(const ConvProblem& p) { return static_cast<size_t>(p.N * p.out_h() * p.out_w()); }

Expected convolution(const ConvProblem& p, const Terms& a, const vector<double>& weight) {
  Terms z(rows(p) * p.K);
  for_each_product(p, [&](size_t x, size_t w, size_t o) {
    z.value[o] += a.value[x] * weight[w];
    z.magnitude[o] += a.magnitude[x] * std::fabs(weight[w]);
  });
  for_each_rounding(p, false, [&](size_t x, size_t w, size_t o) {
    z.magnitude[o] += finite_or_zero(a.magnitude[x] * std::fabs(weight[w]));
  });
  return summed(z, 9.0 * p.din());
}

Expected data_gradient(const ConvProblem& p, const Terms& dz, const vector<double>& weight) {
  Terms dx(static_cast<size_t>(p.N * p.H * p.W * p.C));
  for_each_product(p, [&](size_t x, size_t w, size_t o) {
    dx.value[x] += dz.value[o] * weight[w];
    dx.magnitude[x] += dz.magnitude[o] * std::fabs(weight[w]);
  });
  for_each_rounding(p, true, [&](size_t o, size_t w, size_t x) {
    dx.magnitude[x] += finite_or_zero(dz.magnitude[o] * std::fabs(weight[w]));
  });
  return summed(dx, 9.0 * p.dout());
}

Expected weight_gradient(const ConvProblem& p, const Terms& dz, const Terms& a) {
  Terms dweight(static_cast<size_t>(p.K * p.din() * 9));
  for_each_product(p, [&](size_t x, size_t w, size_t o) {
    dweight.value[w] += dz.value[o] * a.value[x];
    dweight.magnitude[w] += dz.magnitude[o] * a.magnitude[x];
  });
  for_each_rounding(p, false, [&](size_t x, size_t w, size_t o) {
    dweight.magnitude[w] += finite_or_zero(dz.magnitude[o] * a.magnitude[x]);
  });
  Expected result = summed(dweight, rows(p));
  for_each_tap(p, [&](int64_t z_pixel, int64_t x_pixel, int64_t tap) {
    if (x_pixel >= 0) return;
    for (int64_t k = 0; k < p.K; ++k)
      if (!std::isfinite(dz.value[z_pixel * p.K + k]))
        for (int64_t i = 0; i < p.din(); ++i) result.bound[(k * p.din() + i) * 9 + tap] = NAN;
  });
  return result;
}

// OIHW values in the order in which the problem stores weights.
vector<double> as_stored(const ConvProblem& p, const vector<double>& oihw) {
  if (!p.weight_channels_last) return oihw;
  vector<double> ohwi(oihw.size());
  for (int64_t k = 0; k < p.K; ++k)
    for (int64_t i = 0; i < p.din(); ++i)
      for (int64_t tap = 0; tap < 9; ++tap) ohwi[(k * 9 + tap) * p.din() + i] = oihw[(k * p.din() + i) * 9 + tap];
  return ohwi;
}

// y = relu(scale * z + shift + residual_scale * residual + residual_shift)
Expected normalized(const Expected& z, const Vectors& bn, const vector<double>& residual, const Vectors* residual_bn) {
  Expected y(z.value.size());
  for (size_t i = 0; i < y.value.size(); ++i) {
    const size_t c = i % bn.scale.size();
    const double scaled = bn.scale[c] * z.value[i];
    double sum = scaled + bn.shift[c], magnitude = std::fabs(scaled) + std::fabs(bn.shift[c]);
    if (!residual.empty()) {
      const double r = residual_bn != nullptr ? residual_bn->scale[c] * residual[i] : residual[i];
      const double h = residual_bn != nullptr ? residual_bn->shift[c] : 0;
      sum += r + h;
      magnitude += std::fabs(r) + std::fabs(h);
    }
    y.value[i] = relu(sum);
    y.bound[i] = std::fabs(bn.scale[c]) * z.bound[i] + 5 * kUnit * magnitude;
  }
  return y;
}

// Mean and biased variance over the rows of z, each value of which may be off by a relative error `unit` and an
// absolute error `tiny`: what the kernel reduced may not have been rounded to the storage type yet. The variance's
// bound is that of algorithms that subtract the mean or one of the values first (Chan, Golub and LeVeque, Algorithms
// for Computing the Sample Variance), which stay accurate when the mean is large against the deviation.
struct ExpectedStats {
  Expected mean, var;
};
ExpectedStats statistics(const vector<double>& z, size_t channels, double unit = 0, double tiny = 0) {
  ExpectedStats stats{Expected(channels), Expected(channels)};
  const size_t count = z.size() / channels;
  for (size_t c = 0; c < channels; ++c) {
    double sum = 0, squares = 0, largest = 0, deviation = 0, furthest = 0;
    for (size_t i = c; i < z.size(); i += channels) {
      sum += z[i];
      squares += z[i] * z[i];
      largest = std::max(largest, std::fabs(z[i]));
    }
    const double mean = sum / count;
    for (size_t i = c; i < z.size(); i += channels) {
      deviation += (z[i] - mean) * (z[i] - mean);
      furthest = std::max(furthest, std::fabs(z[i] - mean));
    }
    const double var = deviation / count, steps = (count + 4) * kUnit;
    const double error = (steps + unit) * std::sqrt(squares / count) + tiny;  // of a value less the mean
    stats.mean.value[c] = mean;
    stats.mean.bound[c] = std::isfinite(mean) ? (2 * steps + unit) * largest + tiny : NAN;
    stats.var.value[c] = var;
    stats.var.bound[c] = 2 * error * std::sqrt(var) + error * error + steps * (var + furthest * furthest);
  }
  return stats;
}

// ---- tests

const char* const kMasks[] = {"no bn", "recomputed", "from-y", "no relu"};

Affine affine(Tensor* scale, Tensor* shift) {
  return scale != nullptr ? Affine{scale->floats(), shift->floats()} : Affine{};
}

std::string describe(const ConvProblem& p) {
  char text[160];
  std::snprintf(text, sizeof text, "n%d-h%d-w%d-c%d-k%d-g%d-s%d-d%d-%s%s", (int)p.N, (int)p.H, (int)p.W, (int)p.C,
                (int)p.K, (int)p.groups, (int)p.stride, (int)p.dilation, format(p.dtype).name,
                p.weight_channels_last ? "-ohwi" : "");
  return text;
}

// Every convolution kernel in every variant. `poison` puts NaN and Inf into x and dy: they may reach only the
// results that depend on them.
void test_convolution(const ConvProblem& p, bool poison = false) {
  generator.seed(static_cast<unsigned>(passed));
  const size_t x_count = p.N * p.H * p.W * p.C, z_count = rows(p) * p.K;
  const Format f = format(p.dtype);
  const Vectors bn(p.K), prologue(p.C);
  vector<double> x = uniform(p.dtype, x_count), dy = uniform(p.dtype, z_count);
  if (poison) {
    x[x_count / 2] = NAN;
    x[x_count / 3] = INFINITY;
    dy[z_count / 2] = NAN;
    dy[z_count / 3] = -INFINITY;
  }
  const vector<double> weight = uniform(p.dtype, p.K * p.din() * 9), residual = uniform(p.dtype, z_count);
  const vector<double> z = near_relu(p.dtype, rows(p), bn);
  vector<double> y = uniform(p.dtype, z_count);
  for (double& value : y) value = relu(value);
  const vector<double> a = uniform(DType::f32, p.K), b = uniform(DType::f32, p.K), c = uniform(DType::f32, p.K);

  Tensor x_tensor(p.dtype, x), dy_tensor(p.dtype, dy), weight_tensor(p.dtype, as_stored(p, weight)),
      z_tensor(p.dtype, z), y_tensor(p.dtype, y), residual_tensor(p.dtype, residual), scale(DType::f32, bn.scale),
      shift(DType::f32, bn.shift), in_scale(DType::f32, prologue.scale), in_shift(DType::f32, prologue.shift),
      a_tensor(DType::f32, a), b_tensor(DType::f32, b), c_tensor(DType::f32, c);
  Tensor out(p.dtype, z_count), mean(DType::f32, p.K), var(DType::f32, p.K), dx(p.dtype, x_count),
      dweight(p.dtype, weight.size());

  for (const bool with_prologue : {false, true}) {
    const Terms activated = activation(x, with_prologue ? &prologue : nullptr);
    const Expected conv = convolution(p, activated, weight);
    const Affine in = with_prologue ? affine(&in_scale, &in_shift) : Affine{};

    for (const bool with_residual : {false, true}) {
      const Expected expected = normalized(conv, bn, with_residual ? residual : vector<double>(), nullptr);
      for (auto table = cpu::supported_kernels(); *table != nullptr; ++table)
        for (const int threads : kThreads) {
          const std::string name = describe(p) + " conv_affine_relu " + (*table)->isa + " threads " +
                                   std::to_string(threads) + (with_residual ? " residual" : "") +
                                   (with_prologue ? " prologue" : "");
          out.poison();
          (*table)->conv_affine_relu(p, x_tensor.data(), weight_tensor.data(), affine(&scale, &shift),
                                     with_residual ? residual_tensor.data() : nullptr, in, out.data(), threads);
          check(name, out, expected);
          check_intact(name, {&x_tensor, &weight_tensor, &scale, &shift, &residual_tensor, &in_scale, &in_shift, &out});
        }
    }

    for (const bool with_stats : {false, p.N > 0})
      for (auto table = cpu::supported_kernels(); *table != nullptr; ++table)
        for (const int threads : kThreads) {
          const std::string name = describe(p) + " conv_stats " + (*table)->isa + " threads " +
                                   std::to_string(threads) + (with_stats ? " stats" : "") +
                                   (with_prologue ? " prologue" : "");
          out.poison();
          mean.poison();
          var.poison();
          (*table)->conv_stats(p, x_tensor.data(), weight_tensor.data(), in, out.data(),
                               with_stats ? mean.floats() : nullptr, with_stats ? var.floats() : nullptr, threads);
          check(name, out, conv);
          check_intact(name, {&x_tensor, &weight_tensor, &in_scale, &in_shift, &out, &mean, &var});
          if (with_stats) {
            const bool exact = p.dtype == DType::f32;
            const ExpectedStats expected = statistics(out.values(), p.K, exact ? 0 : f.unit(), exact ? 0 : f.tiny());
            check(name + " mean", mean, expected.mean);
            check(name + " var", var, expected.var);
          }
        }

    for (int mask = 0; mask < 4; ++mask) {
      GradientInputs inputs{dy, {}, {}, &bn, {}, {}, {}};
      if (mask != 0) {
        inputs.z = z;
        inputs.a = a;
        inputs.b = b;
        inputs.c = c;
      }
      if (mask == 2) inputs.y = y;
      inputs.relu = mask != 3;
      const Terms dz = gradient(inputs);
      const Expected expected_dx = data_gradient(p, dz, weight);
      const Expected dweight_oihw = weight_gradient(p, dz, activated);
      Expected expected_dweight;
      expected_dweight.value = as_stored(p, dweight_oihw.value);
      expected_dweight.bound = as_stored(p, dweight_oihw.bound);
      ReluBNGradient bn_gradient;
      bn_gradient.dy = dy_tensor.data();
      if (mask != 0)
        bn_gradient = {dy_tensor.data(),  z_tensor.data(),   affine(&scale, &shift), nullptr,
                       a_tensor.floats(), b_tensor.floats(), c_tensor.floats()};
      if (mask == 2) bn_gradient.y = y_tensor.data();
      if (mask == 3) bn_gradient.affine = {};

      for (const int needed : {1, 2, 3})
        for (auto table = cpu::supported_kernels(); *table != nullptr; ++table)
          for (const int threads : kThreads) {
            const std::string name = describe(p) + " conv_backward " + (*table)->isa + " threads " +
                                     std::to_string(threads) + " bn " + kMasks[mask] +
                                     (with_prologue ? " prologue" : "");
            dx.poison();
            dweight.poison();
            (*table)->conv_backward(p, bn_gradient, x_tensor.data(), in, weight_tensor.data(),
                                    (needed & 1) != 0 ? dx.data() : nullptr,
                                    (needed & 2) != 0 ? dweight.data() : nullptr, threads);
            if ((needed & 1) != 0) check(name + " dx", dx, expected_dx);
            if ((needed & 2) != 0) check(name + " dweight", dweight, expected_dweight);
            check_intact(name, {&x_tensor, &weight_tensor, &dy_tensor, &z_tensor, &y_tensor, &scale, &shift, &a_tensor,
                                &b_tensor, &c_tensor, &in_scale, &in_shift, &dx, &dweight});
          }
    }
  }
}

// The kernels on an (M, C) matrix. `offset` is added to z: the statistics must stay accurate.
void test_matrix(DType dtype, int64_t M, int64_t C, double offset) {
  generator.seed(static_cast<unsigned>(passed));
  const std::string problem =
      "m" + std::to_string(M) + "-c" + std::to_string(C) + "-" + format(dtype).name + (offset != 0 ? "-offset" : "");
  const Vectors bn(C), residual_bn(C);
  vector<double> z = near_relu(dtype, M, bn);
  if (offset != 0)
    for (double& value : z) value = rounded(dtype, value + offset);
  const vector<double> dy = uniform(dtype, M * C), residual = uniform(dtype, M * C);
  vector<double> y = uniform(dtype, M * C);
  for (double& value : y) value = relu(value);
  const vector<double> a = uniform(DType::f32, C), b = uniform(DType::f32, C), c = uniform(DType::f32, C);

  const ExpectedStats stats = statistics(z, C);
  vector<double> center(C), rstd(C);
  for (int64_t i = 0; i < C; ++i) {
    center[i] = rounded(DType::f32, stats.mean.value[i]);
    rstd[i] = rounded(DType::f32, 1 / std::sqrt(stats.var.value[i] + 1e-5));
  }

  Tensor z_tensor(dtype, z), dy_tensor(dtype, dy), y_tensor(dtype, y), residual_tensor(dtype, residual),
      scale(DType::f32, bn.scale), shift(DType::f32, bn.shift), residual_scale(DType::f32, residual_bn.scale),
      residual_shift(DType::f32, residual_bn.shift), a_tensor(DType::f32, a), b_tensor(DType::f32, b),
      c_tensor(DType::f32, c), center_tensor(DType::f32, center), rstd_tensor(DType::f32, rstd);
  Tensor out(dtype, M * C), mean(DType::f32, C), var(DType::f32, C);

  for (auto table = cpu::supported_kernels(); *table != nullptr; ++table)
    for (const int threads : kThreads) {
      const std::string where = std::string(" ") + (*table)->isa + " threads " + std::to_string(threads);

      std::string name = problem + " batch_stats" + where;
      mean.poison();
      var.poison();
      (*table)->batch_stats(dtype, M, C, z_tensor.data(), mean.floats(), var.floats(), threads);
      check(name + " mean", mean, stats.mean);
      check(name + " var", var, stats.var);
      check_intact(name, {&z_tensor, &mean, &var});
      if (offset != 0) continue;

      Expected exact(z.size());
      exact.value = z;
      for (const int variant : {0, 1, 2}) {  // no residual, a residual, a residual with its own batch norm
        name = problem + " normalize_relu" + where + " residual " + std::to_string(variant);
        out.poison();
        (*table)->normalize_relu(
            dtype, M, C, z_tensor.data(), affine(&scale, &shift), variant != 0 ? residual_tensor.data() : nullptr,
            variant == 2 ? affine(&residual_scale, &residual_shift) : Affine{}, out.data(), threads);
        check(name, out,
              normalized(exact, bn, variant != 0 ? residual : vector<double>(), variant == 2 ? &residual_bn : nullptr));
        check_intact(name, {&z_tensor, &scale, &shift, &residual_tensor, &residual_scale, &residual_shift, &out});
      }

      for (const int mask : {1, 2, 3}) {
        GradientInputs inputs{dy, z, {}, &bn, {}, {}, {}};
        if (mask == 2) inputs.y = y;
        inputs.relu = mask != 3;
        ReluBNGradient bn_gradient{dy_tensor.data(), z_tensor.data(), mask == 3 ? Affine{} : affine(&scale, &shift),
                                   mask == 2 ? y_tensor.data() : nullptr};

        name = problem + " bn_relu_backward" + where + " mask " + kMasks[mask];
        const Terms g = gradient(inputs);
        Terms sum_g(C), sum_g_xhat(C);
        for (size_t i = 0; i < g.value.size(); ++i) {
          const size_t channel = i % C;
          const double xhat = (z[i] - center[channel]) * rstd[channel];
          sum_g.value[channel] += g.value[i];
          sum_g.magnitude[channel] += std::fabs(g.value[i]);
          sum_g_xhat.value[channel] += g.value[i] * xhat;
          sum_g_xhat.magnitude[channel] += std::fabs(g.value[i] * xhat);
        }
        for (const bool with_g : {false, true}) {
          mean.poison();
          var.poison();
          out.poison();
          (*table)->bn_relu_backward(dtype, M, C, bn_gradient, center_tensor.floats(), rstd_tensor.floats(),
                                     mean.floats(), var.floats(), with_g ? out.data() : nullptr, threads);
          check(name + " sum_g", mean, summed(sum_g, M));
          check(name + " sum_g_xhat", var, summed(sum_g_xhat, M));
          if (with_g) check(name + " g", out, summed(g, 0));
          check_intact(name, {&dy_tensor, &z_tensor, &y_tensor, &scale, &shift, &center_tensor, &rstd_tensor, &mean,
                              &var, &out});
        }

        bn_gradient.a = a_tensor.floats();
        bn_gradient.b = b_tensor.floats();
        bn_gradient.c = c_tensor.floats();
        inputs.a = a;
        inputs.b = b;
        inputs.c = c;
        const Expected dz = summed(gradient(inputs), 0);
        for (const bool inplace : {false, true}) {
          name = problem + " bn_relu_input_gradient" + where + " mask " + kMasks[mask] + (inplace ? " inplace" : "");
          out.poison();
          if (inplace) {
            std::memcpy(out.data(), dy_tensor.data(), out.bytes());
            bn_gradient.dy = out.data();
          }
          (*table)->bn_relu_input_gradient(dtype, M, C, bn_gradient, out.data(), threads);
          check(name, out, dz);
          check_intact(name, {&dy_tensor, &z_tensor, &y_tensor, &scale, &shift, &a_tensor, &b_tensor, &c_tensor, &out});
        }
      }
    }
}

// out[i][j] = sum over d < depth of left(i, d) * right(j, d), each with strides of its own.
struct Strides {
  size_t row, step;
};
Expected product(size_t rows, size_t depth, size_t columns, const Terms& left, Strides l, const Terms& right,
                 Strides r) {
  Terms sum(rows * columns);
  for (size_t i = 0; i < rows; ++i)
    for (size_t d = 0; d < depth; ++d) {
      const double value = left.value[i * l.row + d * l.step], magnitude = left.magnitude[i * l.row + d * l.step];
      for (size_t j = 0; j < columns; ++j) {
        sum.value[i * columns + j] += value * right.value[j * r.row + d * r.step];
        sum.magnitude[i * columns + j] += magnitude * right.magnitude[j * r.row + d * r.step];
      }
    }
  return summed(sum, depth);
}

// Where NaN or Inf is among the terms the result is known exactly: one of them, or 0 behind the ReLU.
void make_exact_where_infinite(Expected& e) {
  for (double& bound : e.bound)
    if (!std::isfinite(bound)) bound = 0;
}

// The dense 1x1 convolution in every variant. `poison` puts NaN and Inf into x, weight and dz.
void test_conv1x1(int64_t M, int64_t C, int64_t K, bool poison = false) {
  generator.seed(static_cast<unsigned>(passed));
  const std::string problem =
      "conv1x1 m" + std::to_string(M) + "-c" + std::to_string(C) + "-k" + std::to_string(K) + (poison ? "-poison" : "");
  const Vectors bn(K), prologue(C);
  vector<double> x = near_relu(DType::f32, M, prologue), weight = uniform(DType::f32, K * C),
                 dz = uniform(DType::f32, M * K);
  const vector<double> residual = uniform(DType::f32, M * K);
  if (poison) {  // in different rows and columns of each
    x[M / 2 * C + C - 1] = NAN;
    x[M / 3 * C + C / 3] = INFINITY;
    x[(M - 1) * C + C / 5] = -INFINITY;
    weight[K / 2 * C + C / 4] = NAN;
    weight[(K - 1) * C + C / 2] = INFINITY;
    dz[M / 4 * K] = NAN;
    dz[(M - 1) * K + K / 3] = -INFINITY;
  }
  const size_t m = M, c = C, k = K;
  const Terms w = activation(weight, nullptr), g = activation(dz, nullptr);
  Tensor x_tensor(DType::f32, x), weight_tensor(DType::f32, weight), dz_tensor(DType::f32, dz),
      residual_tensor(DType::f32, residual), scale(DType::f32, bn.scale), shift(DType::f32, bn.shift),
      in_scale(DType::f32, prologue.scale), in_shift(DType::f32, prologue.shift);
  Tensor out(DType::f32, m * k), da(DType::f32, m * c), dweight(DType::f32, k * c), mean(DType::f32, k),
      var(DType::f32, k);
  Expected expected_da = product(m, k, c, g, {k, 1}, w, {1, c});
  make_exact_where_infinite(expected_da);
  const vector<double> before = uniform(DType::f32, M * C);
  Tensor before_tensor(DType::f32, before);
  Expected expected_added = expected_da;
  for (size_t i = 0; i < before.size(); ++i) {
    expected_added.value[i] += before[i];
    expected_added.bound[i] += kUnit * (std::fabs(expected_da.value[i]) + std::fabs(before[i]));
  }
  make_exact_where_infinite(expected_added);

  for (const bool with_prologue : {false, true}) {
    const Terms a = activation(x, with_prologue ? &prologue : nullptr);
    const Affine in = with_prologue ? affine(&in_scale, &in_shift) : Affine{};
    Expected z = product(m, c, k, a, {c, 1}, w, {c, 1}), expected_dweight = product(k, m, c, g, {1, k}, a, {1, c});
    make_exact_where_infinite(z);
    make_exact_where_infinite(expected_dweight);
    for (auto table = cpu::supported_kernels(); *table != nullptr; ++table)
      for (const int threads : kThreads) {
        const std::string where = std::string(" ") + (*table)->isa + " threads " + std::to_string(threads) +
                                  (with_prologue ? " prologue" : "");
        for (const int variant : {0, 1, 2, 3}) {  // z, y, y with a residual, z with its statistics
          const bool with_stats = variant == 3, with_affine = variant == 1 || variant == 2;
          const std::string name = problem + where + " variant " + std::to_string(variant);
          Expected expected = z;
          if (with_affine) expected = normalized(z, bn, variant == 2 ? residual : vector<double>(), nullptr);
          make_exact_where_infinite(expected);
          out.poison();
          mean.poison();
          var.poison();
          (*table)->conv1x1(M, C, K, x_tensor.floats(), in, weight_tensor.floats(),
                            with_affine ? affine(&scale, &shift) : Affine{},
                            variant == 2 ? residual_tensor.floats() : nullptr, out.floats(),
                            with_stats ? mean.floats() : nullptr, with_stats ? var.floats() : nullptr, threads);
          check(name, out, expected);
          check_intact(name, {&x_tensor, &weight_tensor, &scale, &shift, &residual_tensor, &in_scale, &in_shift, &out,
                              &mean, &var});
          if (with_stats && M > 0) {
            const ExpectedStats stats = statistics(out.values(), K);
            check(name + " mean", mean, stats.mean);
            check(name + " var", var, stats.var);
          }
        }
        for (const int needed : {1, 2, 3, 5}) {  // 5: da is added to what is there
          const bool need_da = (needed & 1) != 0, need_dweight = (needed & 2) != 0, add = (needed & 4) != 0;
          const std::string name = problem + " backward" + where + " needed " + std::to_string(needed);
          da.poison();
          dweight.poison();
          if (add) std::memcpy(da.data(), before_tensor.data(), da.bytes());
          (*table)->conv1x1_backward(M, C, K, dz_tensor.floats(), need_dweight ? x_tensor.floats() : nullptr, in,
                                     weight_tensor.floats(), need_da ? da.floats() : nullptr, add,
                                     need_dweight ? dweight.floats() : nullptr, threads);
          if (need_da) check(name + " da", da, add ? expected_added : expected_da);
          if (need_dweight) check(name + " dweight", dweight, expected_dweight);
          check_intact(name, {&x_tensor, &weight_tensor, &dz_tensor, &in_scale, &in_shift, &da, &dweight});
        }
      }
  }
}

// The same bits from run to run at one thread count, also while other threads compute something else.
void test_repeatable() {
  const ConvProblem p{2, 15, 17, 64, 64, 16, 1, 1, DType::f32};
  generator.seed(1);
  const size_t count = p.N * p.H * p.W * p.C;
  Tensor x(p.dtype, uniform(p.dtype, count)), weight(p.dtype, uniform(p.dtype, p.K * p.din() * 9)),
      dy(p.dtype, uniform(p.dtype, count));
  constexpr int64_t m = 392, c = 48, k = 272;  // of the dense 1x1 convolution
  Tensor x1(p.dtype, uniform(p.dtype, m * c)), weight1(p.dtype, uniform(p.dtype, k * c)),
      dz1(p.dtype, uniform(p.dtype, m * k));
  struct Result {
    Tensor z, mean, var, dx, dweight, z1{DType::f32, m*k}, mean1{DType::f32, k}, var1{DType::f32, k},
        dx1{DType::f32, m*c}, dweight1{DType::f32, k*c};
    explicit Result(const ConvProblem& p)
        : z(p.dtype, rows(p) * p.K),
          mean(DType::f32, p.K),
          var(DType::f32, p.K),
          dx(p.dtype, static_cast<size_t>(p.N * p.H * p.W * p.C)),
          dweight(p.dtype, static_cast<size_t>(p.K * p.din() * 9)) {}
    bool operator==(Result& other) {
      const auto same = [](Tensor& s, Tensor& t) { return std::memcmp(s.data(), t.data(), s.bytes()) == 0; };
      return same(z, other.z) && same(mean, other.mean) && same(var, other.var) && same(dx, other.dx) &&
             same(dweight, other.dweight) && same(z1, other.z1) && same(mean1, other.mean1) && same(var1, other.var1) &&
             same(dx1, other.dx1) && same(dweight1, other.dweight1);
    }
  };
  for (auto table = cpu::supported_kernels(); *table != nullptr; ++table) {
    const auto run = [&](Result& r, int threads) {
      ReluBNGradient gradient;
      gradient.dy = dy.data();
      (*table)->conv_stats(p, x.data(), weight.data(), Affine{}, r.z.data(), r.mean.floats(), r.var.floats(), threads);
      (*table)->conv_backward(p, gradient, x.data(), Affine{}, weight.data(), r.dx.data(), r.dweight.data(), threads);
      (*table)->conv1x1(m, c, k, x1.floats(), {}, weight1.floats(), {}, nullptr, r.z1.floats(), r.mean1.floats(),
                        r.var1.floats(), threads);
      (*table)->conv1x1_backward(m, c, k, dz1.floats(), x1.floats(), {}, weight1.floats(), r.dx1.floats(), false,
                                 r.dweight1.floats(), threads);
    };
    for (const int threads : {1, 2, 3}) {
      const std::string name = std::string((*table)->isa) + " threads " + std::to_string(threads);
      Result first(p), again(p);
      run(first, threads);
      run(again, threads);
      report(first == again, name + " repeated", "other bits");
      Result one(p), two(p), three(p);
      std::thread workers[] = {std::thread(run, std::ref(one), threads), std::thread(run, std::ref(two), threads),
                               std::thread(run, std::ref(three), threads)};
      for (std::thread& worker : workers) worker.join();
      report(first == one && first == two && first == three, name + " from three threads at once", "other bits");
    }
  }
}

vector<ConvProblem> problems() {
  vector<ConvProblem> list;
  const int64_t widths[] = {1, 2, 3, 4, 5, 8, 14, 16, 24, 32, 40, 64};
  const int64_t maps[][2] = {{1, 1}, {7, 7}, {1, 5}, {5, 9}, {6, 1}, {3, 3}, {4, 18}, {2, 2}, {8, 13}, {1, 33}, {9, 4}};
  size_t index = 0;
  for (const int64_t din : widths)
    for (const int64_t groups : {(int64_t)1, (int64_t)3, std::max<int64_t>(2, 64 / din)})
      for (const int64_t stride : {1, 2, 3})
        for (const int64_t dilation : {1, 2}) {
          // the same, twice, half, or an unrelated number of channels out
          const int64_t douts[] = {din, din, din, 2 * din, din, (din + 1) / 2, din, 3};
          const int64_t dout = din > 24 ? din : douts[index % 8];
          const int64_t* map = maps[index % 11];
          const int64_t n = 1 + static_cast<int64_t>(index % 3);
          list.push_back(
              {n, map[0], map[1], groups * din, groups * dout, groups, stride, dilation, kDTypes[index / 2 % 3]});
          ++index;
        }
  for (const DType dtype : kDTypes) {  // whole rows of ResNeXt's layers, many groups, few rows
    list.push_back({1, 6, 56, 128, 128, 32, 1, 1, dtype});
    list.push_back({1, 9, 57, 64, 64, 16, 2, 1, dtype});
    list.push_back({2, 5, 28, 64, 64, 8, 1, 1, dtype});
    list.push_back({1, 14, 14, 64, 64, 4, 1, 1, dtype});
    list.push_back({1, 7, 7, 128, 128, 4, 1, 1, dtype});
    list.push_back({1, 7, 7, 28, 28, 2, 1, 1, dtype});
    list.push_back({1, 7, 7, 16, 64, 16, 1, 1, dtype});  // a vector of four groups, in and out of other widths
    list.push_back({1, 7, 7, 48, 36, 12, 1, 1, dtype});
    list.push_back({1, 9, 9, 40, 64, 8, 1, 1, dtype});  // of two, interleaved
    list.push_back({1, 9, 9, 64, 40, 8, 1, 1, dtype});
    list.push_back({2, 5, 28, 56, 56, 8, 1, 1, dtype});
    list.push_back({1, 4, 67, 35, 35, 5, 1, 1, dtype});
    list.push_back({1, 7, 7, 80, 80, 1, 1, 1, dtype});    // all rows in a tile
    list.push_back({2, 2, 4, 576, 544, 2, 1, 1, dtype});  // groups so wide that chunks are parts of them
    list.push_back({3, 7, 7, 72, 72, 3, 2, 1, dtype});
    list.push_back({1, 10, 11, 33, 33, 33, 1, 1, dtype});
    list.push_back({1, 12, 20, 3, 16, 1, 2, 1, dtype});
    list.push_back({1, 3, 3, 16, 16, 4, 1, 4, dtype});
    list.push_back({2, 5, 6, 10, 6, 2, 5, 3, dtype});
    list.push_back({0, 5, 6, 8, 8, 2, 1, 1, dtype});
    list.push_back({1, 5, 67, 32, 32, 8, 1, 1, dtype});   // wider than a unit
    list.push_back({2, 31, 13, 20, 20, 5, 1, 1, dtype});  // more rows than a tile of groups of four takes, or of eight
    list.push_back({2, 31, 13, 40, 40, 5, 1, 1, dtype});
    list.push_back({1, 56, 9, 20, 20, 5, 1, 1, dtype});  // as many as one takes where x is read in place, and more
    list.push_back({1, 58, 9, 40, 40, 5, 1, 1, dtype});
    list.push_back({1, 30, 67, 32, 32, 8, 1, 1, dtype});
    list.push_back({1, 3, 131, 16, 16, 2, 1, 1, dtype});
    list.push_back({1, 5, 133, 16, 16, 4, 2, 1, dtype});
    list.push_back({1, 4, 71, 16, 16, 4, 1, 2, dtype});
    list.push_back({2, 8, 9, 280, 280, 70, 2, 1, dtype});  // more channels than are staged at a time
    list.push_back({1, 17, 9, 264, 264, 33, 2, 1, dtype});
    list.push_back({1, 9, 5, 270, 270, 90, 1, 2, dtype});
  }
  for (size_t i = 0; i < list.size(); ++i) list[i].weight_channels_last = i % 5 < 2;
  return list;
}

// What is made of vectors alone, with gamma and beta and without.
void test_vectors(int64_t C) {
  generator.seed(static_cast<unsigned>(passed));
  const vector<double> gamma = uniform(DType::f32, C), beta = uniform(DType::f32, C), mean = uniform(DType::f32, C),
                       sum_g = uniform(DType::f32, C), sum_g_xhat = uniform(DType::f32, C);
  vector<double> var = uniform(DType::f32, C);
  for (double& value : var) value = std::abs(value);
  const float eps = 1e-3f, unbias = 1.125f, count = 98;
  const double momentum = 0.3;
  Tensor gamma_tensor(DType::f32, gamma), beta_tensor(DType::f32, beta), mean_tensor(DType::f32, mean),
      var_tensor(DType::f32, var), sum_g_tensor(DType::f32, sum_g), sum_g_xhat_tensor(DType::f32, sum_g_xhat);
  Tensor scale(DType::f32, C), shift(DType::f32, C), vectors(DType::f32, 5 * C), b(DType::f32, C), c(DType::f32, C);

  for (const bool affine : {true, false}) {
    const cpu::BatchNorm bn{affine ? gamma_tensor.floats() : nullptr, affine ? beta_tensor.floats() : nullptr,
                            mean_tensor.floats(), var_tensor.floats(), eps};
    Expected expected(5 * C), expected_scale(C), expected_shift(C), expected_b(C), expected_c(C),
        expected_running_mean(C), expected_running_var(C);
    // error: in roundings of the terms, besides the last one; sqrt halves the one of its argument
    const auto expect = [](Expected& to, int64_t i, double value, double error) {
      to.value[i] = value;
      to.bound[i] = error * format(DType::f32).unit();
    };
    for (int64_t i = 0; i < C; ++i) {
      const double rstd = 1 / std::sqrt(var[i] + (double)eps), scale_i = affine ? gamma[i] * rstd : rstd;
      const double by_mean = mean[i] * scale_i, of_sum = -scale_i / count * sum_g[i];
      const double b_i = -scale_i / count * rstd * sum_g_xhat[i];
      expect(expected_scale, i, scale_i, 2.5 * std::fabs(scale_i));
      expect(expected_shift, i, (affine ? beta[i] : 0) - by_mean, 4.5 * std::fabs(by_mean));
      expect(expected, i, mean[i], 0);
      expect(expected, C + i, unbias * var[i], 0);
      expect(expected, 2 * C + i, rstd, 1.5 * rstd);
      expect(expected, 3 * C + i, scale_i, 2.5 * std::fabs(scale_i));
      expect(expected, 4 * C + i, expected_shift.value[i], 4.5 * std::fabs(by_mean));
      const double old_mean = (1 - momentum) * sum_g[i], old_var = (1 - momentum) * sum_g_xhat[i];
      const double new_mean = momentum * mean[i], new_var = momentum * unbias * var[i];
      expect(expected_running_mean, i, old_mean + new_mean, 2 * (std::fabs(old_mean) + std::fabs(new_mean)));
      expect(expected_running_var, i, old_var + new_var, 3 * (std::fabs(old_var) + std::fabs(new_var)));
      expect(expected_b, i, b_i, 8 * std::fabs(b_i));
      expect(expected_c, i, of_sum - b_i * mean[i], 5.5 * std::fabs(of_sum) + 10 * std::fabs(b_i * mean[i]));
    }
    for (auto table = cpu::supported_kernels(); *table != nullptr; ++table) {
      const std::string name = "vectors c" + std::to_string(C) + (affine ? " affine " : " ") + (*table)->isa;
      for (Tensor* t : {&scale, &shift, &vectors, &b, &c}) t->poison();
      (*table)->bn_affine(C, bn, scale.floats(), shift.floats());
      check(name + " scale", scale, expected_scale);
      check(name + " shift", shift, expected_shift);
      (*table)->bn_vectors(C, bn, unbias, vectors.floats());
      check(name, vectors, expected);
      vectors.poison();
      std::copy_n(bn.mean, C, vectors.floats());
      std::copy_n(bn.var, C, vectors.floats() + C);
      auto in_place = bn;
      in_place.mean = vectors.floats(), in_place.var = vectors.floats() + C;
      (*table)->bn_vectors(C, in_place, unbias, vectors.floats());
      check(name + " in place", vectors, expected);
      Tensor running_mean(DType::f32, C), running_var(DType::f32, C);
      std::copy_n(sum_g_tensor.floats(), C, running_mean.floats());
      std::copy_n(sum_g_xhat_tensor.floats(), C, running_var.floats());
      (*table)->update_running(C, vectors.floats(), momentum, running_mean.floats(), running_var.floats());
      check(name + " running mean", running_mean, expected_running_mean);
      check(name + " running var", running_var, expected_running_var);
      (*table)->bn_gradient_vectors(C, sum_g_tensor.floats(), sum_g_xhat_tensor.floats(), vectors.floats(), count,
                                    b.floats(), c.floats());
      check(name + " b", b, expected_b);
      check(name + " c", c, expected_c);
      check_intact(name, {&gamma_tensor, &beta_tensor, &mean_tensor, &var_tensor, &sum_g_tensor, &sum_g_xhat_tensor,
                          &scale, &shift, &vectors, &b, &c, &running_mean, &running_var});
    }
  }
}

// Every thread makes the same number of operations.
void test_multiply_adds() {
  for (auto table = cpu::supported_kernels(); *table != nullptr; ++table) {
    const int64_t once = (*table)->multiply_adds(1, 1), more = (*table)->multiply_adds(7, 2);
    if (once > 0 && more == 14 * once) {
      ++passed;
    } else {
      ++failed;
      std::printf("FAILED multiply_adds %s: %lld, then %lld\n", (*table)->isa, (long long)once, (long long)more);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const size_t every = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::printf("instruction sets:");
  for (auto table = cpu::supported_kernels(); *table != nullptr; ++table) std::printf(" %s", (*table)->isa);
  std::printf("\n");

  const vector<ConvProblem> list = problems();
  for (size_t i = 0; i < list.size(); i += every) test_convolution(list[i]);
  for (const DType dtype : kDTypes) {
    for (const int64_t d : {4, 5, 6, 8, 16, 32}) test_convolution({1, 7, 9, 4 * d, 4 * d, 4, 1, 1, dtype}, true);
    test_convolution({2, 7, 9, 8, 8, 2, 2, 1, dtype}, true);
    test_convolution({2, 6, 19, 24, 24, 24, 1, 1, dtype}, true);
    for (const int64_t m : {1, 2, 7, 64, 1000})
      for (const int64_t c : {1, 3, 4, 8, 17, 64, 130}) test_matrix(dtype, m, c, 0);
    test_matrix(dtype, 1000, 17, 1000);
    test_matrix(dtype, 301, 64, -64);
  }
  for (const int64_t c : {1, 3, 16, 17, 130}) test_vectors(c);
  // rows around whole tiles (6 and 14), and chunks of 128; channels around panels, parts of 256, and blocks of panels
  const int64_t matrices[][3] = {{1, 16, 16},    {13, 32, 48},  {129, 256, 32}, {15, 80, 32},   {392, 16, 272},
                                 {0, 32, 48},    {14, 48, 80},  {49, 272, 256}, {30, 528, 528}, {1000, 48, 112},
                                 {13, 1040, 16}, {1, 528, 528}, {128, 288, 16}, {28, 528, 272}, {127, 32, 256},
                                 {7, 16, 1040},  {257, 64, 64}, {14, 272, 528}, {6, 256, 512},  {49, 112, 16}};
  for (size_t i = 0; i < std::size(matrices); i += every) test_conv1x1(matrices[i][0], matrices[i][1], matrices[i][2]);
  test_conv1x1(29, 48, 80, true);
  test_conv1x1(150, 272, 32, true);
  test_conv1x1(13, 32, 288, true);
  test_repeatable();
  test_multiply_adds();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
