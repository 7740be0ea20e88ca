// One vector type, as wide as the instruction set, on the compilers' vector extensions (GCC, Clang). Arithmetic is
// written with operators; a * b + c contracts to one FMA. Only what the operators lack is spelled per instruction
// set. Included once per instruction set, so everything lives in a namespace named after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__)
// both in GCC 12's own AVX-512 header, in _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace resnext_kernels::cpu::RK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HVec __attribute__((vector_size(2 * kLanes)));

#define RK_INLINE inline __attribute__((always_inline))
#define RK_INLINE_LAMBDA __attribute__((always_inline))

// ---- storage types: 16-bit floats are opaque bits, converted as they are loaded and stored
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

RK_INLINE Vec broadcast(float value) { return value - Vec{}; }

RK_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RK_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

RK_INLINE HVec load_bits(const void* p) {
  HVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RK_INLINE void store_bits(void* p, HVec v) { __builtin_memcpy(p, &v, sizeof v); }

// bfloat16 is the upper half of a float32; stores round to nearest even and keep NaN a NaN.
RK_INLINE Vec load(const bf16* p) { return (Vec)(__builtin_convertvector(load_bits(p), UVec) << 16); }
RK_INLINE HVec round_bf16(Vec v) {
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec nan = (UVec)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), HVec);
}
RK_INLINE void store(bf16* p, Vec v) { store_bits(p, round_bf16(v)); }

#if defined(__AVX512F__)
RK_INLINE Vec load(const f16* p) { return (Vec)_mm512_cvtph_ps((__m256i)load_bits(p)); }
RK_INLINE void store(f16* p, Vec v) {
  store_bits(p, (HVec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
RK_INLINE Vec load(const f16* p) { return (Vec)_mm256_cvtph_ps((__m128i)load_bits(p)); }
RK_INLINE void store(f16* p, Vec v) {
  store_bits(p, (HVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
RK_INLINE Vec load(const f16* p) { return (Vec)vcvt_f32_f16((float16x4_t)load_bits(p)); }
RK_INLINE void store(f16* p, Vec v) { store_bits(p, (HVec)vcvt_f16_f32((float32x4_t)v)); }
#else
// Without conversion instructions: scale by a power of two in float32, which gets subnormals right as well.
RK_INLINE Vec load(const f16* p) {
  const UVec h = __builtin_convertvector(load_bits(p), UVec);
  const UVec magnitude = (h & 0x7fff) << 13;
  const Vec scaled = (Vec)magnitude * 0x1p112f;                          // rebias the exponent: 2^(127 - 15)
  const UVec special = (UVec)(magnitude >= (UVec{} + (0x7c00u << 13)));  // Inf and NaN
  const UVec bits = (special & (magnitude | 0x7f800000)) | (~special & (UVec)scaled);
  return (Vec)(bits | ((h & 0x8000) << 16));
}
RK_INLINE void store(f16* p, Vec v) {
  uint16_t bits[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    uint32_t u;
    const float value = v[i];
    __builtin_memcpy(&u, &value, 4);
    const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    uint32_t h;
    if (magnitude > 0x7f800000) {
      h = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      h = 0x7c00;                         // 65520 and above round to Inf
    } else if (magnitude < 0x38800000) {  // subnormal in float16: the addition rounds to a multiple of 2^-24
      float m;
      __builtin_memcpy(&m, &magnitude, 4);
      m += 0.5f;
      __builtin_memcpy(&h, &m, 4);
      h -= 0x3f000000;
    } else {
      h = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    bits[i] = (uint16_t)(sign | h);
  }
  __builtin_memcpy(p, bits, sizeof bits);
}
#endif

// ---- memory beyond the cache
// A tensor of this size will not be in the cache when its reader comes: it is written past it, which saves reading its
// lines first. Needs vectors aligned to their size.
constexpr int64_t kStreamBytes = 8 << 20;
template <class T>
inline bool streams(const T* p, int64_t pixels, int64_t C) {
#if defined(__AVX2__) || defined(__AVX512F__)
  return pixels * C * (int64_t)sizeof(T) >= kStreamBytes && (uintptr_t)p % 64 == 0 && C % kLanes == 0;
#else
  return (void)p, (void)pixels, (void)C, false;
#endif
}
#if defined(__AVX512F__)
RK_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
RK_INLINE void stream_bits(void* p, HVec v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
#elif defined(__AVX2__)
RK_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
RK_INLINE void stream_bits(void* p, HVec v) { _mm_stream_si128((__m128i*)p, (__m128i)v); }
#else
RK_INLINE void stream(float* p, Vec v) { store(p, v); }
RK_INLINE void stream_bits(void* p, HVec v) { store_bits(p, v); }
#endif
RK_INLINE void stream(bf16* p, Vec v) { stream_bits(p, round_bf16(v)); }
RK_INLINE void stream(f16* p, Vec v) {
  HVec bits;
  store((f16*)&bits, v);
  stream_bits(p, bits);
}
// What was streamed is visible to others from here on.
RK_INLINE void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
// Asks for what a loop over consecutive elements will load soon: the processor alone does not look far enough ahead.
template <class T>
RK_INLINE void prefetch_ahead(const T* p) {
  __builtin_prefetch((const char*)p + 2048);
}

// ---- the first n lanes only (0 < n < kLanes); the other lanes load as zero
template <class T>
RK_INLINE Vec load_partial(const T* p, int n) {
  T padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T>
RK_INLINE void store_partial(T* p, Vec v, int n) {
  T padded[kLanes];
  store(padded, v);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}
#if defined(__AVX2__) && !defined(__AVX512F__)
RK_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
RK_INLINE Vec load_partial(const float* p, int n) { return (Vec)_mm256_maskload_ps(p, first_lanes(n)); }
RK_INLINE void store_partial(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#elif defined(__AVX512F__)
RK_INLINE Vec load_partial(const float* p, int n) { return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
RK_INLINE void store_partial(float* p, Vec v, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
#endif

// The lower half of the lanes; the upper ones load as zero.
RK_INLINE Vec load_half(const float* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_zextps256_ps512(_mm256_loadu_ps(p));
#else
  return load_partial(p, kLanes / 2);
#endif
}

// Holds v in a register, so that what is made of it several times is not loaded several times.
RK_INLINE Vec in_register(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// ---- lanes chosen by index
RK_INLINE Vec permute(Vec v, IVec index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = v[index[i] & (kLanes - 1)];
  return result;
#endif
}
// Lane i of every 128-bit quarter in all four lanes of that quarter.
RK_INLINE Vec spread_quads(Vec v, int i) {
#if defined(__AVX512F__)
#define RK_SPREAD(i) (Vec) _mm512_permute_ps((__m512)v, (i)*0x55)
  return i == 0 ? RK_SPREAD(0) : i == 1 ? RK_SPREAD(1) : i == 2 ? RK_SPREAD(2) : RK_SPREAD(3);
#undef RK_SPREAD
#elif defined(__AVX2__)
#define RK_SPREAD(i) (Vec) _mm256_permute_ps((__m256)v, (i)*0x55)
  return i == 0 ? RK_SPREAD(0) : i == 1 ? RK_SPREAD(1) : i == 2 ? RK_SPREAD(2) : RK_SPREAD(3);
#undef RK_SPREAD
#else
  return broadcast(v[i]);
#endif
}

// p[0] and p[1], over and over.
RK_INLINE Vec repeat_two(const float* p) {
#if defined(__AVX512F__)
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return (Vec)_mm512_set1_pd(both);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i % 2];
  return v;
#endif
}

// The lower (0) or the upper (1) four of every eight lanes, twice; sixteen lanes only.
RK_INLINE Vec spread_octets(Vec v, int half) {
#if defined(__AVX512F__)
  return half == 0 ? (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xa0)
                   : (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xf5);
#else
  (void)half;
  return v;
#endif
}

// ---- lanes as pairs of bfloat16: sum + a.even * b.even + a.odd * b.odd in float32, denormals taken as zero
#if defined(__AVX512F__)
constexpr bool kPairProducts = true;
inline bool pair_products_here() { return __builtin_cpu_supports("avx512bf16"); }
RK_INLINE Vec add_pair_products(Vec sum, Vec a, Vec b) {
  // as text: only where pair_products_here() may it run, so the compiler must not know it
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
constexpr bool kPairProducts = false;
inline bool pair_products_here() { return false; }
RK_INLINE Vec add_pair_products(Vec sum, Vec, Vec) { return sum; }
#endif

// ---- rows[i][j] <- rows[j][i], by exchanging the off-diagonal halves of ever larger squares
template <int S, size_t... L>
RK_INLINE void exchange(Vec& upper, Vec& lower, std::index_sequence<L...>) {
  const Vec a = upper, b = lower;
#if defined(__clang__)
  upper = __builtin_shufflevector(a, b, (L & S ? kLanes + L - S : L)...);
  lower = __builtin_shufflevector(a, b, (L & S ? kLanes + L : L + S)...);
#else
  upper = __builtin_shuffle(a, b, IVec{(int)(L & S ? kLanes + L - S : L)...});
  lower = __builtin_shuffle(a, b, IVec{(int)(L & S ? kLanes + L : L + S)...});
#endif
}
template <int S = 1>
RK_INLINE void transpose(Vec* rows) {
#if defined(__AVX512F__)
  // The same in instructions of one operation each: 4x4 within quarters of the vectors, then 4x4 of quarters.
  __m512 quads[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = (__m512)rows[i], b = (__m512)rows[i + 1], c = (__m512)rows[i + 2], d = (__m512)rows[i + 3];
    const __m512d ab = (__m512d)_mm512_unpacklo_ps(a, b), AB = (__m512d)_mm512_unpackhi_ps(a, b);
    const __m512d cd = (__m512d)_mm512_unpacklo_ps(c, d), CD = (__m512d)_mm512_unpackhi_ps(c, d);
    quads[i] = (__m512)_mm512_unpacklo_pd(ab, cd);
    quads[i + 1] = (__m512)_mm512_unpackhi_pd(ab, cd);
    quads[i + 2] = (__m512)_mm512_unpacklo_pd(AB, CD);
    quads[i + 3] = (__m512)_mm512_unpackhi_pd(AB, CD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = quads[i], b = quads[i + 4], c = quads[i + 8], d = quads[i + 12];
    const __m512 ab02 = _mm512_shuffle_f32x4(a, b, 0x88), ab13 = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 cd02 = _mm512_shuffle_f32x4(c, d, 0x88), cd13 = _mm512_shuffle_f32x4(c, d, 0xdd);
    rows[i] = (Vec)_mm512_shuffle_f32x4(ab02, cd02, 0x88);
    rows[i + 4] = (Vec)_mm512_shuffle_f32x4(ab13, cd13, 0x88);
    rows[i + 8] = (Vec)_mm512_shuffle_f32x4(ab02, cd02, 0xdd);
    rows[i + 12] = (Vec)_mm512_shuffle_f32x4(ab13, cd13, 0xdd);
  }
#else
  if constexpr (S < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<kLanes>());
    transpose<2 * S>(rows);
  }
#endif
}

// Written so that NaN passes: relu(NaN) = NaN, and the mask of a NaN is true.
RK_INLINE Vec relu(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps(__m512{}, (__m512)v);  // the second of the two if one is NaN
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps(__m256{}, (__m256)v);
#else
  return (Vec)((IVec)v & ~(IVec)(v < Vec{}));
#endif
}
RK_INLINE Vec where_positive(Vec pre, Vec v) { return (Vec)((IVec)v & ~(IVec)(pre <= Vec{})); }

}  // namespace resnext_kernels::cpu::RK_ISA
