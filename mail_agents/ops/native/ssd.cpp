// State space duality of Mamba-2 (Dao & Gu 2024, section 6) inside one chunk, forward and backward:
//
//   y_i = sum_{j <= i} W_ij x_j + D x_i,   W_ij = 2^(s_i - s_j) (C_i . B_j) dt_j
//
// with s the running sum of dt A log2(e). Only the lower triangle is computed. One task is one
// group of one sequence: C_i . B_j serves all heads of the group, and everything that belongs to a
// head stays in the first or second cache. Running sums, their differences and those sums of the
// backward pass that nearly cancel are float64. The forward pass also starts from a state and ends
// in one.
#include "gemm.h"
#include "memory.h"
#include "simd.h"

using namespace mail;
using namespace simd;

extern "C" {

/// Results are contiguous; those of the backward pass have a leading axis of batch rows.
struct Ssd {
  int64_t batch, length, heads, head, groups, states;
  Sequence x, B, C;       // (..., heads, head), (..., groups, states)
  const float *dt, *A, *D;   // (batch, length, heads), (heads,), (heads, head) or null
  const uint8_t* reset;      // (batch, length) or null
  // States before and after, (batch, heads, head, states) or null; only the forward pass has them.
  const float* h0;
  float *last, *y;  // y (batch, length, heads, head)
  Sequence dy;
  float *dx, *ddt, *dB, *dC;  // like x, dt, B, C
  float *dA, *dD;             // (batch, heads), (batch, heads, head) or null
  int64_t threads;
};
}

namespace {

constexpr double LOG2_E = 1.4426950408889634;
/// Zero as a power of two even in float64; see the backend in Python.
constexpr double NOTHING = -1100.0;

int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/// Rows of `width` floats from a strided source, padded with zeros to whole vectors.
void gather(const float* from, int64_t step, int64_t rows, int64_t width, float* out) {
  int64_t wide = padded(width);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t p = 0; p < width; p += LANES)
      store(out + i * wide + p, load_part(from + i * step + p, width - p));
}

/// ROWS rows and V vectors of out = M X, where M has any two strides and k runs in [first, last). In
/// a triangle, row r has r elements more.
template <int ROWS, int V, bool TRIANGLE>
inline void block(const float* m, int64_t row_step, int64_t k_step, int64_t first, int64_t last,
                  const float* x, float* out, int64_t width) {
  vf acc[ROWS][V] = {};
  for (int64_t k = first; k < last; k++) {
    vf right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) right[v] = load(x + k * width + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      vf left = splat(m[r * row_step + k * k_step]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] += left * right[v];
    }
  }
  // Zeros in place of these branches would let what is not finite go back in time.
  if (TRIANGLE)
#pragma GCC unroll 8
    for (int more = 1; more < ROWS; more++)
#pragma GCC unroll 8
      for (int r = more; r < ROWS; r++) {
        int64_t k = last - 1 + more;
        vf left = splat(m[r * row_step + k * k_step]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] += left * load(x + k * width + v * LANES);
      }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(out + r * width + v * LANES, acc[r][v]);
}

template <int ROWS, bool TRIANGLE = false>
inline void stripe(const float* m, int64_t row_step, int64_t k_step, int64_t first, int64_t last,
                   const float* x, float* out, int64_t width) {
  int64_t p = 0;
  for (; p + 4 * LANES <= width; p += 4 * LANES)
    block<ROWS, 4, TRIANGLE>(m, row_step, k_step, first, last, x + p, out + p, width);
  for (; p + 2 * LANES <= width; p += 2 * LANES)
    block<ROWS, 2, TRIANGLE>(m, row_step, k_step, first, last, x + p, out + p, width);
  for (; p < width; p += LANES)
    block<ROWS, 1, TRIANGLE>(m, row_step, k_step, first, last, x + p, out + p, width);
}

constexpr int ROWS = LANES >= 16 ? 4 : 2;

/// out = M X for a lower triangular M, or M^T X, where zeros above the diagonal are stored.
template <bool TRANSPOSED>
void triangle(const float* m, int64_t step, int64_t length, const float* x, float* out,
              int64_t width) {
  int64_t i = 0;
  for (; i < length; i += ROWS) {
    bool whole = i + ROWS <= length;
    const float* start = TRANSPOSED ? m + i : m + i * step;
    int64_t row_step = TRANSPOSED ? 1 : step, k_step = TRANSPOSED ? step : 1;
    if (whole) {
      stripe<ROWS, !TRANSPOSED>(start, row_step, k_step, TRANSPOSED ? i : 0,
                                TRANSPOSED ? length : i + 1, x, out + i * width, width);
    } else {
      for (int64_t r = 0; i + r < length; r++)
        stripe<1>(start + r * row_step, row_step, k_step, TRANSPOSED ? i + r : 0,
                  TRANSPOSED ? length : i + r + 1, x, out + (i + r) * width, width);
    }
  }
}

/// Lower triangle (and a little more) of out_ij = a_i . b_j.
void products(const float* a, const float* b, int64_t length, int64_t width, float* out,
              int64_t step) {
  constexpr int64_t BLOCK = 16;
  for (int64_t i = 0; i < length; i += BLOCK) {
    int64_t end = i + BLOCK < length ? i + BLOCK : length;
    multiply({a + i * width, width, b, end, width, nullptr, out + i * step, step, false}, end - i);
  }
}

struct Sizes {
  int64_t length, head, states, step;  // widths of rows: padded head, states and length
  explicit Sizes(const Ssd& s)
      : length(s.length), head(padded(s.head)), states(padded(s.states)), step(padded(s.length)) {}
};

/// One group of one sequence: B, C and their products, then head by head.
struct Group {
  const Ssd& s;
  const Sizes size;
  float *B, *C, *table, *x, *W, *dt, *exponent, *state;
  double* sum;
  int64_t b = 0;

  Group(const Ssd& ssd, Arena& memory) : s(ssd), size(ssd) {
    B = memory.take<float>(size.length * size.states);
    C = memory.take<float>(size.length * size.states);
    table = memory.take<float>(size.length * size.step);
    x = memory.take<float>(size.length * size.head);
    W = memory.take<float>(size.length * size.step);
    dt = memory.take<float>(size.step);
    exponent = memory.take<float>(size.step);
    sum = memory.take<double>(size.step);
    int64_t inner = s.h0 ? size.length * size.head : 0, end = s.last ? s.head * size.states : 0;
    state = memory.take<float>(inner > end ? inner : end);
  }

  void start(int64_t row, int64_t group) {
    b = row;
    gather(s.B.at(b, 0) + group * s.states, s.B.time_stride, size.length, s.states, B);
    gather(s.C.at(b, 0) + group * s.states, s.C.time_stride, size.length, s.states, C);
    products(C, B, size.length, size.states, table, size.step);
  }

  void start_head(int64_t h) {
    gather(s.x.at(b, 0) + h * s.head, s.x.time_stride, size.length, s.head, x);
    double total = 0.0, rate = double(s.A[h]) * LOG2_E;
    for (int64_t t = 0; t < size.length; t++) {
      dt[t] = s.dt[(b * size.length + t) * s.heads + h];
      double step = double(dt[t]) * rate;
      step = step < NOTHING ? NOTHING : step > -NOTHING ? -NOTHING : step;
      if (s.reset && s.reset[b * size.length + t]) step = NOTHING;
      total += step;
      sum[t] = total;
    }
    for (int64_t t = size.length; t < size.step; t++) dt[t] = 0.0f, sum[t] = 0.0;
  }

  /// Exponents of row i; beyond the diagonal, where the power has to be 0, far below zero.
  void row(int64_t i, int64_t end) {
    for (int64_t j = 0; j < end; j++) exponent[j] = float(sum[i] - sum[j]);
    for (int64_t j = i + 1; j < end; j++) exponent[j] = -2000.0f;
  }

  void forward_head(int64_t h, float* out) {
    start_head(h);
    for (int64_t i = 0; i < size.length; i++) {
      int64_t end = padded(i + 1);
      row(i, end);
      const float* g = table + i * size.step;
      float* w = W + i * size.step;
      for (int64_t j = 0; j < end; j += LANES)
        store(w + j, keep(j, i, exp2v(load(exponent + j)) * load(g + j) * load(dt + j)));
      for (int64_t j = end; j < size.step; j += LANES) store(w + j, vf{});
    }
    triangle<false>(W, size.step, size.length, x, out, size.head);
    if (s.h0) from_state(h, out);
    int64_t row_step = s.heads * s.head;
    float* y = s.y + b * size.length * row_step + h * s.head;
    scatter(out, x, h, y, row_step);
    if (s.last) to_state(h);
  }

  int64_t state_of(int64_t h) const { return (b * s.heads + h) * s.head * s.states; }

  /// Adds 2^(s_i) C_i h to the rows of the outputs.
  void from_state(int64_t h, float* out) {
    const float* start = s.h0 + state_of(h);
    multiply({C, size.states, start, s.head, s.states, nullptr, state, size.head, false},
             size.length);
    for (int64_t i = 0; i < size.length; i++) {
      vf decay = exp2v(splat(float(sum[i])));
      float* y = out + i * size.head;
      for (int64_t p = 0; p < s.head; p += LANES)
        store(y + p, load(y + p) + decay * load_part(state + i * size.head + p, s.head - p));
    }
  }

  /// Writes the state after the last step; overwrites the inputs x of this head.
  void to_state(int64_t h) {
    double end = sum[size.length - 1];
    for (int64_t j = 0; j < size.length; j++) {
      vf weight = exp2v(splat(float(end - sum[j]))) * dt[j];
      for (int64_t p = 0; p < size.head; p += LANES)
        store(x + j * size.head + p, weight * load(x + j * size.head + p));
    }
    int64_t p = 0;
    for (; p + ROWS <= s.head; p += ROWS)
      stripe<ROWS>(x + p, 1, size.head, 0, size.length, B, state + p * size.states, size.states);
    for (; p < s.head; p++)
      stripe<1>(x + p, 1, size.head, 0, size.length, B, state + p * size.states, size.states);
    vf decay = exp2v(splat(float(end)));
    for (p = 0; p < s.head; p++)
      for (int64_t n = 0; n < s.states; n += LANES) {
        int64_t left = s.states - n, index = state_of(h) + p * s.states + n;
        vf value = load(state + p * size.states + n);
        if (s.h0) value += decay * load_part(s.h0 + index, left);
        store_part(s.last + index, value, left);
      }
  }

  /// Zero beyond the diagonal, where the table of products holds anything.
  static vf keep(int64_t j, int64_t i, vf value) {
    return j + LANES <= i + 1 ? value : load_part(reinterpret_cast<float*>(&value), i + 1 - j);
  }

  /// Writes rows + D * skipped.
  void scatter(const float* rows, const float* skipped, int64_t h, float* out, int64_t row_step) {
    for (int64_t p = 0; p < s.head; p += LANES) {
      vf d = s.D ? load_part(s.D + h * s.head + p, s.head - p) : vf{};
      for (int64_t t = 0; t < size.length; t++) {
        vf value = load(rows + t * size.head + p);
        if (s.D) value += d * load(skipped + t * size.head + p);
        store_part(out + t * row_step + p, value, s.head - p);
      }
    }
  }
};

struct Backward {
  Group& group;
  const Ssd& s;
  const Sizes& size;
  float *dy, *S, *dtable, *direct, *through;
  double *rows, *columns;

  Backward(Group& g, Arena& memory) : group(g), s(g.s), size(g.size) {
    dy = memory.take<float>(size.length * size.head);
    S = memory.take<float>(size.length * size.step);
    dtable = memory.take<float>(size.length * size.step);
    direct = memory.take<float>(size.step);
    through = memory.take<float>(size.step);
    rows = memory.take<double>(size.step);
    columns = memory.take<double>(size.step);
  }

  /// Gradients of one head; `out` holds rows of the width of a head.
  void head(int64_t h, float* out) {
    group.start_head(h);
    gather(s.dy.at(group.b, 0) + h * s.head, s.dy.time_stride, size.length, s.head, dy);
    products(dy, group.x, size.length, size.head, S, size.step);
    memset(direct, 0, sizeof(float) * size.step);
    memset(columns, 0, sizeof(double) * size.step);
    for (int64_t i = 0; i < size.length; i++) pairs(i);
    triangle<true>(group.W, size.step, size.length, dy, out, size.head);
    int64_t row_step = s.heads * s.head;
    group.scatter(out, dy, h, s.dx + group.b * size.length * row_step + h * s.head, row_step);
    steps(h);
    if (s.dD) skip(h);
  }

  /// What goes through row i of W: its entries, C_i . B_j, step sizes and their running sum.
  void pairs(int64_t i) {
    int64_t end = padded(i + 1);
    group.row(i, end);
    const float *g = group.table + i * size.step, *ds = S + i * size.step;
    float *w = group.W + i * size.step, *dg = dtable + i * size.step;
    double sums[LANES] = {};
    for (int64_t j = 0; j < end; j += LANES) {
      vf decay = exp2v(load(group.exponent + j)), dt = load(group.dt + j), product = load(g + j);
      vf arriving = Group::keep(j, i, decay * load(ds + j)), weight = decay * product * dt;
      store(w + j, Group::keep(j, i, weight));
      store(dg + j, load(dg + j) + arriving * dt);
      vf found = arriving * product;
      if (j + LANES > i + 1) found = Group::keep(j, i, found);
      store(direct + j, load(direct + j) + found);
      store(through + j, found * dt);
    }
    for (int64_t j = end; j < size.step; j += LANES) store(w + j, vf{});
    // No step decays itself, so the diagonal would only cancel.
    through[i] = 0.0f;
    for (int64_t j = 0; j < end; j += LANES)
      for (int l = 0; l < LANES; l++) {
        columns[j + l] += double(through[j + l]);
        sums[l] += double(through[j + l]);
      }
    double total = 0.0;
    for (int l = 0; l < LANES; l++) total += sums[l];
    rows[i] = total;
  }

  void steps(int64_t h) {
    double later = 0.0, dA = 0.0, rate = s.A[h];
    for (int64_t t = size.length - 1; t >= 0; t--) {
      later += rows[t] - columns[t];
      double here = s.reset && s.reset[group.b * size.length + t] ? 0.0 : later;
      dA += here * double(group.dt[t]);
      s.ddt[(group.b * size.length + t) * s.heads + h] = float(double(direct[t]) + here * rate);
    }
    s.dA[group.b * s.heads + h] = float(dA);
  }

  void skip(int64_t h) {
    for (int64_t p = 0; p < s.head; p += LANES) {
      vf total = {};
      for (int64_t t = 0; t < size.length; t++)
        total += load(dy + t * size.head + p) * load(group.x + t * size.head + p);
      store_part(s.dD + (group.b * s.heads + h) * s.head + p, total, s.head - p);
    }
  }

  /// Gradients of B and C from those of their products.
  void projections(int64_t index, float* out) {
    int64_t row_step = s.groups * s.states;
    for (int side = 0; side < 2; side++) {
      if (side)
        triangle<true>(dtable, size.step, size.length, group.C, out, size.states);
      else
        triangle<false>(dtable, size.step, size.length, group.B, out, size.states);
      float* to = (side ? s.dB : s.dC) + group.b * size.length * row_step + index * s.states;
      for (int64_t t = 0; t < size.length; t++)
        for (int64_t p = 0; p < s.states; p += LANES)
          store_part(to + t * row_step + p, load(out + t * size.states + p), s.states - p);
    }
  }
};

/// An upper bound of what one thread takes from its memory; whole cache lines.
int64_t bytes_of(const Ssd& s) {
  Sizes size(s);
  int64_t widest = size.head > size.states ? size.head : size.states;
  int64_t floats = size.length * (2 * size.states + 2 * size.head + widest + 4 * size.step);
  if (s.h0 || s.last) floats += size.length * size.head + s.head * size.states;
  return room<float>(floats + 4 * size.step) + room<double>(3 * size.step) + 20 * 64;
}

/// One group of one sequence.
template <bool BACKWARD>
void run_group(const Ssd& s, int64_t row, int64_t index, Arena memory) {
  Group group(s, memory);
  Backward backward(group, memory);
  const Sizes& size = group.size;
  int64_t widest = size.head > size.states ? size.head : size.states;
  float* out = memory.take<float>(size.length * widest);
  int64_t heads = s.heads / s.groups;
  group.start(row, index);
  if (BACKWARD) memset(backward.dtable, 0, sizeof(float) * size.length * size.step);
  for (int64_t h = index * heads; h < (index + 1) * heads; h++) {
    if (BACKWARD)
      backward.head(h, out);
    else
      group.forward_head(h, out);
  }
  if (BACKWARD) backward.projections(index, out);
}

template <bool BACKWARD>
int run(const Ssd& s) {
  int64_t own = bytes_of(s);
  Memory memory(s.threads * own);
  if (!memory) return 1;
  for_all(s.batch * s.groups, s.threads, [&](int64_t i, int64_t me) {
    run_group<BACKWARD>(s, i / s.groups, i % s.groups, {memory.next + me * own});
  });
  return 0;
}

}  // namespace

extern "C" int mail_ssd_forward(const Ssd* s) { return run<false>(*s); }

extern "C" int mail_ssd_backward(const Ssd* s) { return run<true>(*s); }

/// Two steps from a state, worked out by hand: h = 1, 1 + 1, 2 / e + 6.
extern "C" const char* selftest_ssd(void) {
  const float x[] = {2.0f, 3.0f}, dt[] = {0.5f, 1.0f}, B[] = {1.0f, 2.0f}, C[] = {3.0f, -1.0f};
  const float A = -1.0f, D = 2.0f, h0 = 1.64872127f;  // the root of e
  float y[2] = {}, last = 0.0f;
  Ssd s = {};
  s.batch = s.heads = s.head = s.groups = s.states = s.threads = 1;
  s.length = 2;
  s.x = {x, 2, 1}, s.B = {B, 2, 1}, s.C = {C, 2, 1};
  s.dt = dt, s.A = &A, s.D = &D, s.h0 = &h0, s.last = &last, s.y = y;
  if (mail_ssd_forward(&s)) return "no memory";
  const float found[] = {y[0], y[1], last}, known[] = {10.0f, -0.735758882f, 6.73575888f};
  for (int i = 0; i < 3; i++)
    if (!(found[i] - known[i] < 1e-5f && known[i] - found[i] < 1e-5f)) return "state space duality";
  return nullptr;
}
