// Vectors of floats as wide as the target's registers, and the functions that Mamba needs of them.
//
// Written with the vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2, SSE
// and NEON. Intrinsics appear only where the extensions have no single instruction. NaN propagates
// through every function. Needs -ffp-contract=fast for fused multiply-adds, and must not be compiled
// with -ffast-math, which breaks rounding by a large constant as well as NaN and infinity.
#ifndef MAIL_SIMD_H
#define MAIL_SIMD_H

#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vf splat(float x) { return x - vf{}; }  // x - 0 keeps the sign of a zero
static inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

/// Loads the first n lanes (0 <= n <= LANES); the others are zero.
static inline vf load_part(const float* p, int64_t n) {
  if (n >= LANES) return load(p);
  float lanes[LANES] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}

/// Stores the first n lanes (0 <= n <= LANES).
static inline void store_part(float* p, vf x, int64_t n) {
  if (n >= LANES) return store(p, x);
  for (int64_t i = 0; i < n; i++) p[i] = x[i];
}

/// a * b + c, rounded once where the target has such an instruction.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return vf(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX__) && defined(__FMA__)
  return vf(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
  return vf(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}

/// Lane-wise minimum and maximum; where x is NaN the result is NaN.
static inline vf at_most(vf x, vf limit) {
#if defined(__AVX512F__)
  return vf(_mm512_min_ps(__m512(limit), __m512(x)));
#elif defined(__AVX__)
  return vf(_mm256_min_ps(__m256(limit), __m256(x)));
#elif defined(__SSE__)
  return vf(_mm_min_ps(__m128(limit), __m128(x)));
#elif defined(__ARM_NEON)
  return vf(vminq_f32(float32x4_t(limit), float32x4_t(x)));
#else
  return limit < x ? limit : x;
#endif
}

static inline vf at_least(vf x, vf limit) {
#if defined(__AVX512F__)
  return vf(_mm512_max_ps(__m512(limit), __m512(x)));
#elif defined(__AVX__)
  return vf(_mm256_max_ps(__m256(limit), __m256(x)));
#elif defined(__SSE__)
  return vf(_mm_max_ps(__m128(limit), __m128(x)));
#elif defined(__ARM_NEON)
  return vf(vmaxq_f32(float32x4_t(limit), float32x4_t(x)));
#else
  return limit > x ? limit : x;
#endif
}

/// Adding it rounds |x| < 2^22 to an integer, which then stands, plus the exponent bias 127, in the
/// lowest bits.
constexpr float ROUND = 12582912.0f + 127.0f;
constexpr float LOG2E = 1.44269504088896341f;

/// 2^n for the integer n + ROUND = rounded, with 0 at n = -127 and infinity at n = 128.
static inline vf power_of_two(vf rounded) { return vf(vi(rounded) << 23); }

/// 2^x, relative error below 1.2e-7 and 2^0 = 1 exactly, which matters in long products. It is 0
/// below -126.5 (so that a decay with exponent -infinity is exactly nothing) and infinity from 127.5.
static inline vf exp2v(vf x) {
  x = at_least(at_most(x, splat(128.0f)), splat(-127.0f));
  vf rounded = x + ROUND;
  vf f = x - (rounded - ROUND);
  // Minimax for (2^f - 1) / f on [-1/2, 1/2], relative to 2^f: error 2e-9.
  vf p = fma(f, splat(1.53533620e-4f), splat(1.33988750e-3f));
  p = fma(f, p, splat(9.61843692e-3f));
  p = fma(f, p, splat(5.55033237e-2f));
  p = fma(f, p, splat(2.40226477e-1f));
  p = fma(f, p, splat(6.93147182e-1f));
  return fma(f, p, splat(1.0f)) * power_of_two(rounded);
}

/// e^x, relative error below 1.2e-7 in the whole range (the reduction is exact, unlike exp2v of a
/// scaled argument); 0 below -87.7, infinity from 88.4.
static inline vf expv(vf x) {
  x = at_least(at_most(x, splat(88.7228394f)), splat(-88.0296936f));
  vf rounded = fma(x, splat(LOG2E), splat(ROUND));
  vf n = rounded - ROUND;
  vf f = fma(n, splat(-0.693145752f), x);  // log(2) in two parts, the first with trailing zeros
  f = fma(n, splat(-1.42860677e-6f), f);
  // Minimax for (e^f - 1 - f) / f^2, relative to e^f: error 3e-9.
  vf p = fma(f, splat(1.38144672e-3f), splat(8.36878084e-3f));
  p = fma(f, p, splat(4.16683927e-2f));
  p = fma(f, p, splat(1.66665196e-1f));
  p = fma(f, p, splat(0.499999940f));
  p = fma(f * f, p, f);
  return (p + 1.0f) * power_of_two(rounded);
}

/// 1 / (1 + e^-x).
static inline vf sigmoidv(vf x) { return 1.0f / (1.0f + expv(-x)); }

/// x / (1 + e^-x).
static inline vf siluv(vf x) { return x / (1.0f + expv(-x)); }

/// log(1 + e^x) with a small relative error on both sides, which makes it the identity above 17 and
/// 0 at -infinity. With s = e / (2 + e), log(1 + e) = 2 artanh(s) = e - s (e - r) for the rest r of
/// the series of 2 artanh(s) / s: the largest term is e itself, without the rounding of s.
static inline vf softplusv(vf x) {
  vf e = expv(at_most(x, -x));
  vf s = e / (e + 2.0f), square = s * s;
  vf r = fma(square, splat(0.280119956f), splat(0.280018032f));
  r = fma(square, r, splat(0.400215268f));
  r = fma(square, r, splat(0.666664184f));
  return at_least(x, vf{}) + fma(s, fma(square, r, -e), e);
}

/// Sum of all lanes, in pairs.
static inline float hsum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(x));
#else
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

}  // namespace simd

#endif
