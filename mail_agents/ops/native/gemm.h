// Matrix products with row-major weights (out, in), as linear layers have them, without packing.
//
// Every output is one dot product along the contiguous axis: one vector of partial sums, then a
// tree of fixed shape over its lanes. So its rounding depends neither on the number of rows, nor on
// where its row and column stand, nor on how the work is split.
#ifndef MAIL_GEMM_H
#define MAIL_GEMM_H

#include <utility>

#include "simd.h"

namespace simd {

/// Lane i of halves(): a number below LANES is a lane of the first vector, else of the second.
template <int S, bool UPPER>
constexpr int halves_lane(int i) {
  return i / (2 * S) * (2 * S) + i % S + (UPPER ? S : 0) + (i % (2 * S) < S ? 0 : LANES);
}

/// For every block of 2 S lanes: the lower (or upper) half of a's block, then that of b's block.
template <int S, bool UPPER, int... I>
static inline vf halves(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, halves_lane<S, UPPER>(I)...);
#else
  return __builtin_shuffle(a, b, vi{halves_lane<S, UPPER>(I)...});
#endif
}

template <int S, bool UPPER>
static inline vf halves(vf a, vf b) {
  return halves<S, UPPER>(a, b, std::make_integer_sequence<int, LANES>{});
}

/// Sums over lanes: lane i of the result is the sum of v[i]. Overwrites v.
template <int S = LANES / 2>
static inline vf sums(vf* v) {
  if constexpr (S == 0) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < S; i++)
      v[i] = halves<S, false>(v[i], v[i + S]) + halves<S, true>(v[i], v[i + S]);
    return sums<S / 2>(v);
  }
}

/// Transposes a LANES x LANES matrix of rows v in place.
template <int S = LANES / 2>
static inline void transpose(vf* v) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & S)) {
        vf a = v[i], b = v[i + S];
        v[i] = halves<S, false>(a, b);
        v[i + S] = halves<S, true>(a, b);
      }
    transpose<S / 2>(v);
  }
}

/// Writes `columns` vectors: vector j holds element j of each of `rows` <= LANES rows of a matrix
/// with row length ld. Lanes beyond `rows` are zero. No float from `end` on is read.
static inline void load_columns(const float* p, int64_t ld, int64_t rows, int64_t columns,
                                const float* end, float* out, int64_t out_step) {
  for (int64_t c = 0; c < columns; c += LANES) {
    vf v[LANES];
    int64_t left = columns - c < LANES ? columns - c : LANES;
    for (int i = 0; i < LANES; i++) {
      const float* from = p + i * ld + c;
      if (i >= rows)
        v[i] = vf{};
      else
        v[i] = end - from >= LANES ? load(from) : load_part(from, left);
    }
    transpose(v);
    for (int i = 0; i < left; i++) store(out + (c + i) * out_step, v[i]);
  }
}

/// x W^T for some rows x and a matrix W.
struct Product {
  const float* x;  // (rows, k)
  int64_t x_step;
  const float* w;  // (columns, k), contiguous
  int64_t columns, k;
  const float* bias;  // (columns,) or null
  float* out;         // (rows, columns)
  int64_t out_step;
  bool add;  // to what is in out
};

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

/// ROWS rows times COLUMNS columns (4 n, of which the first `valid` exist) of a product.
template <int ROWS, int COLUMNS>
static inline void tile(const Product& p, int64_t row, int64_t column, int64_t valid) {
  constexpr int COUNT = ROWS * COLUMNS, GROUPS = (COUNT + LANES - 1) / LANES;
  vf acc[GROUPS * LANES] = {};
  const float* x[ROWS];
  const float* w[COLUMNS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) x[i] = p.x + (row + i) * p.x_step;
#pragma GCC unroll 16
  for (int j = 0; j < COLUMNS; j++) w[j] = p.w + (column + (j < valid ? j : 0)) * p.k;
  int64_t k = 0;
  for (; k + LANES <= p.k; k += LANES) {
    vf right[COLUMNS];
#pragma GCC unroll 16
    for (int j = 0; j < COLUMNS; j++) right[j] = load(w[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      vf left = load(x[i] + k);
#pragma GCC unroll 16
      for (int j = 0; j < COLUMNS; j++) acc[i * COLUMNS + j] += left * right[j];
    }
  }
  if (k < p.k) {
    vf right[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) right[j] = load_part(w[j] + k, p.k - k);
    for (int i = 0; i < ROWS; i++) {
      vf left = load_part(x[i] + k, p.k - k);
#pragma GCC unroll 16
      for (int j = 0; j < COLUMNS; j++) acc[i * COLUMNS + j] += left * right[j];
    }
  }
  float found[GROUPS * LANES];
#pragma GCC unroll 16
  for (int g = 0; g < GROUPS; g++) store(found + g * LANES, sums(acc + g * LANES));
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    float* out = p.out + (row + i) * p.out_step + column;
    const float* sum = found + i * COLUMNS;
    if (valid >= COLUMNS) {
#pragma GCC unroll 16
      for (int j = 0; j < COLUMNS; j += 4) {
        quad y = *reinterpret_cast<const quad*>(sum + j);
        if (p.bias) y += *reinterpret_cast<const quad*>(p.bias + column + j);
        if (p.add) y += *reinterpret_cast<const quad*>(out + j);
        *reinterpret_cast<quad*>(out + j) = y;
      }
    } else {
      for (int j = 0; j < valid; j++) {
        float y = sum[j];
        if (p.bias) y += p.bias[column + j];
        if (p.add) y += out[j];
        out[j] = y;
      }
    }
  }
}

/// ROWS rows times one panel of columns.
template <int ROWS, int COLUMNS>
static inline void panel(const Product& p, int64_t row, int64_t first, int64_t last) {
  for (int64_t column = first; column < last; column += COLUMNS)
    tile<ROWS, COLUMNS>(p, row, column, last - column < COLUMNS ? last - column : COLUMNS);
}

/// Weights of one panel stay in the first-level cache while all rows pass by.
constexpr int64_t PANEL = 16;

/// out = x W^T (+ bias) (+ out) for all rows. Shapes of tiles were chosen by measuring.
static inline void multiply(const Product& p, int64_t rows) {
  constexpr bool WIDE = LANES >= 16;  // then there are 32 registers, too
  for (int64_t first = 0; first < p.columns; first += PANEL) {
    int64_t last = first + PANEL < p.columns ? first + PANEL : p.columns;
    int64_t row = 0;
    if constexpr (WIDE) {
      for (; row + 5 <= rows; row += 5) panel<5, 4>(p, row, first, last);
      for (; row + 4 <= rows; row += 4) panel<4, 8>(p, row, first, last);
    }
    for (; row + 2 <= rows; row += 2) panel<2, WIDE ? 8 : 4>(p, row, first, last);
    for (; row < rows; row++) panel<1, WIDE ? 16 : 8>(p, row, first, last);
  }
}

}  // namespace simd

#endif
