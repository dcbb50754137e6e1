// Inference of a residual stack of Mamba-1 layers (Gu & Dao 2023, figure 3, algorithm 2), whole:
//
//   q += out_proj(scan(conv(in_proj(norm(q))))) (+ aggregate)     for every layer, then the last norm
//
// Batch rows are independent and are split among threads. One thread takes some tokens, all of whose
// values fit into its scratch memory, through all layers; a long sequence goes by in pieces, which
// hand on their states. Weights are read where torch keeps them, and nothing is kept between calls.
// What a row gives depends on nothing but that row: not on the other rows, their number, the number
// of threads, or how a sequence is cut. Convolution and scan are those of conv.cpp and scan.cpp
// without what training needs, in the layout that the products leave behind.
#include <cmath>

#include "gemm.h"
#include "memory.h"

using namespace simd;

namespace {

/// Tokens that go through the layers together: enough to use weights often, few enough for a cache.
constexpr int64_t TOKENS = 96;
/// Vectors of channels that the scan advances together.
constexpr int WIDTH = 2;
constexpr int64_t LINE = 16;  // floats of a cache line

/// Parameters of one layer as pointers; those that are absent are null.
struct Layer {
  const float *norm_weight, *norm_bias, *in_weight, *in_bias, *conv_weight, *conv_bias, *x_weight,
      *dt_weight, *dt_bias, *A_log, *D, *out_weight, *out_bias;
};

/// State of one layer: where it is, and distances between its elements. History is
/// (row, step, channel) with neighbouring channels; ssm is (row, channel, n).
struct State {
  const float* history;
  int64_t history_row, history_step;
  const float* ssm;
  int64_t ssm_row, ssm_channel, ssm_n;
};

/// A state that is written: (row, step, channel) and (row, n, channel), contiguous; may be null.
struct NewState {
  float *history, *ssm;
};

struct Sizes {
  int64_t layers, batch, length, model, inner, n, taps, rank, residual;
  int64_t selected() const { return rank + 2 * n; }
  /// Floats between tokens in scratch memory: not a power of two, or they meet in a cache set.
  static int64_t apart(int64_t width) { return (width + LINE - 1) / LINE * LINE + LINE; }
  int64_t projected_step() const { return apart(2 * inner); }
  int64_t u_step() const { return apart(inner); }
  int64_t history() const { return (taps - 1) * inner; }
  int64_t ssm() const { return n * inner; }
  int64_t steps() const { return length < TOKENS ? length : TOKENS; }
  int64_t rows(int64_t threads) const {
    int64_t share = (batch + threads - 1) / threads, fit = length ? TOKENS / length : share;
    return fit < 1 ? 1 : fit < share ? fit : share;
  }
};

/// Memory of one thread, of which every part begins a cache line.
struct Scratch {
  float *normed, *projected, *u, *selected, *decay, *dt_weight, *taps, *h, *carried;
  int64_t floats;

  Scratch(const Sizes& s, int64_t threads, float* memory) : floats(0) {
    int64_t tokens = s.rows(threads) * s.steps(), block = WIDTH * LANES;
    int64_t channels = (s.inner + block - 1) / block * block;
    auto take = [&](int64_t count) {
      float* found = memory + floats;
      floats += (count + LINE - 1) / LINE * LINE;
      return found;
    };
    normed = take(tokens * s.model);
    projected = take(tokens * s.projected_step());
    u = take(tokens * s.u_step());
    selected = take(tokens * s.selected());
    decay = take(s.n * channels);
    dt_weight = take(s.rank * channels);
    taps = take(s.taps * channels);
    h = take(s.n * block);
    carried = take(s.length > TOKENS ? s.layers * (s.history() + s.ssm()) : 0);
  }
};

/// Some tokens on their way through the layers: `rows` rows of `steps` steps, from `row` on.
struct Piece {
  int64_t row, rows, steps;
  int64_t tokens() const { return rows * steps; }
};

/// LayerNorm of one token.
void normalise(const float* x, const float* weight, const float* bias, int64_t size, float eps,
               float* out) {
  vf index;
  for (int i = 0; i < LANES; i++) index[i] = float(i);
  vf total{}, square{};
  for (int64_t i = 0; i < size; i += LANES) total += load_part(x + i, size - i);
  vf mean = splat(hsum(total) / float(size));
  for (int64_t i = 0; i < size; i += LANES) {
    vf centred = load_part(x + i, size - i) - mean;
    if (size - i < LANES) centred = index < splat(float(size - i)) ? centred : vf{};
    square += centred * centred;
  }
  vf scale = splat(1.0f / std::sqrt(hsum(square) / float(size) + eps));
  for (int64_t i = 0; i < size; i += LANES) {
    int64_t left = size - i;
    vf y = (load_part(x + i, left) - mean) * scale;
    if (weight) y *= load_part(weight + i, left);
    if (bias) y += load_part(bias + i, left);
    store_part(out + i, y, left);
  }
}

/// Filters of the convolution, transposed so that neighbours are channels.
void transpose_taps(const Sizes& s, const Layer& p, float* taps) {
  for (int64_t c = 0; c < s.inner; c += LANES) {
    int64_t left = s.inner - c < LANES ? s.inner - c : LANES;
    load_columns(p.conv_weight + c * s.taps, s.taps, left, s.taps,
                 p.conv_weight + s.inner * s.taps, taps + c * s.taps, LANES);
  }
}

/// Convolution and SiLU of one row, and its new history (which may be the old one).
void convolve(const Sizes& s, const Layer& p, const float* taps, const float* old,
              int64_t old_step, int64_t steps, const float* x, float* u, float* history) {
  int64_t past = s.taps - 1;
  for (int64_t c = 0; c < s.inner; c += LANES, taps += s.taps * LANES) {
    int64_t left = s.inner - c;
    vf bias = p.conv_bias ? load_part(p.conv_bias + c, left) : vf{};
    auto input = [&](int64_t t) {
      if (t >= 0) return load_part(x + t * s.projected_step() + c, left);
      return old ? load_part(old + (t + past) * old_step + c, left) : vf{};
    };
    for (int64_t t = 0; t < steps; t++) {
      vf y = bias;
      for (int64_t k = 0; k < s.taps; k++) y += load(taps + k * LANES) * input(t - past + k);
      store_part(u + t * s.u_step() + c, siluv(y), left);
    }
    if (history)  // every element is read before it is overwritten
      for (int64_t k = 0; k < past; k++)
        store_part(history + k * s.inner + c, input(steps - past + k), left);
  }
}

/// V vectors of channels from `first` on, and their parameters so that neighbours are channels.
template <int V>
struct Channels {
  int64_t first, left[V];
  vf dt_bias[V], D[V];
  float *decay, *dt_weight;  // (n, channel), (rank, channel)

  Channels(const Sizes& s, const Layer& p, const Scratch& m, int64_t c)
      : first(c), decay(m.decay + c * s.n), dt_weight(m.dt_weight + c * s.rank) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      int64_t at = c + v * LANES, rest = s.inner - at;
      left[v] = rest < LANES ? rest : LANES;
      dt_bias[v] = load_part(p.dt_bias + at, left[v]);
      D[v] = load_part(p.D + at, left[v]);
    }
  }

  /// Once per layer.
  void transpose_parameters(const Sizes& s, const Layer& p) const {
    for (int v = 0; v < V; v++) {
      int64_t at = first + v * LANES;
      load_columns(p.dt_weight + at * s.rank, s.rank, left[v], s.rank,
                   p.dt_weight + s.inner * s.rank, dt_weight + v * LANES, V * LANES);
      float* a = decay + v * LANES;
      load_columns(p.A_log + at * s.n, s.n, left[v], s.n, p.A_log + s.inner * s.n, a, V * LANES);
      for (int64_t n = 0; n < s.n; n++, a += V * LANES) store(a, expv(load(a)) * -LOG2E);
    }
  }
};

template <int V>
void load_state(const Sizes& s, const Channels<V>& c, const State& from, int64_t row, float* h) {
  for (int v = 0; v < V; v++) {
    int64_t at = c.first + v * LANES;
    const float* p = from.ssm ? from.ssm + row * from.ssm_row + at * from.ssm_channel : nullptr;
    if (p && from.ssm_channel != 1) {
      const float* end = p + (c.left[v] - 1) * from.ssm_channel + s.n;
      load_columns(p, from.ssm_channel, c.left[v], s.n, end, h + v * LANES, V * LANES);
      continue;
    }
    for (int64_t n = 0; n < s.n; n++)
      store(h + (n * V + v) * LANES, p ? load_part(p + n * from.ssm_n, c.left[v]) : vf{});
  }
}

/// Step sizes, recurrence, skip and gate of some channels of one row, in place of u.
template <int V>
void scan(const Sizes& s, const Channels<V>& c, float* state, int64_t steps,
          const float* selected, const float* z, float* u) {
  for (int64_t t = 0; t < steps; t++) {
    const float *B = selected + s.rank, *C = B + s.n;
    vf dt[V], x[V], input[V], y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      dt[v] = c.dt_bias[v];
      y[v] = vf{};
    }
    for (int64_t r = 0; r < s.rank; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++)
        dt[v] += splat(selected[r]) * load(c.dt_weight + (r * V + v) * LANES);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      dt[v] = softplusv(dt[v]);
      x[v] = load_part(u + c.first + v * LANES, c.left[v]);
      input[v] = dt[v] * x[v];
    }
    for (int64_t n = 0; n < s.n; n++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        int64_t at = (n * V + v) * LANES;
        vf h = exp2v(dt[v] * load(c.decay + at)) * load(state + at) + input[v] * splat(B[n]);
        store(state + at, h);
        y[v] += h * splat(C[n]);
      }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      vf gate = siluv(load_part(z + c.first + v * LANES, c.left[v]));
      store_part(u + c.first + v * LANES, (y[v] + c.D[v] * x[v]) * gate, c.left[v]);
    }
    selected += s.selected();
    z += s.projected_step();
    u += s.u_step();
  }
}

/// scan() for some channels of one row, from a state to a state.
template <int V>
void scan_channels(const Sizes& s, const Channels<V>& c, const Scratch& m, const Piece& piece,
                   int64_t r, const State& old, const NewState& next) {
  int64_t token = r * piece.steps;
  load_state(s, c, old, piece.row + r, m.h);
  scan<V>(s, c, m.h, piece.steps, m.selected + token * s.selected(),
          m.projected + token * s.projected_step() + s.inner, m.u + token * s.u_step());
  if (next.ssm)
    for (int64_t n = 0; n < s.n; n++)
      for (int v = 0; v < V; v++)
        store_part(next.ssm + (r * s.n + n) * s.inner + c.first + v * LANES,
                   load(m.h + (n * V + v) * LANES), c.left[v]);
}

/// Calls visit with Channels for all channels.
template <typename Visit>
void all_channels(const Sizes& s, const Layer& p, const Scratch& m, Visit visit) {
  int64_t c = 0;
  for (; c + WIDTH * LANES <= s.inner; c += WIDTH * LANES) visit(Channels<WIDTH>(s, p, m, c));
  for (; c < s.inner; c += LANES) visit(Channels<1>(s, p, m, c));
}

/// Memory that is needed soon, asked for piece by piece while the CPU computes with other data.
struct Upcoming {
  const char *next, *end;
  Upcoming(const float* p, int64_t floats)
      : next(reinterpret_cast<const char*>(p)), end(reinterpret_cast<const char*>(p + floats)) {}
  void fetch(int64_t bytes) {
    const char* stop = end - next < bytes ? end : next + bytes;
    for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

/// One layer for one piece; `x` is the input of the mixer and `out` takes its output.
void run_layer(const Sizes& s, const Layer& p, const Scratch& m, const Piece& piece,
               const float* x, float* out, const State& old, const NewState& next) {
  int64_t tokens = piece.tokens();
  multiply({x, s.model, p.in_weight, 2 * s.inner, s.model, p.in_bias, m.projected,
            s.projected_step(), false},
           tokens);
  transpose_taps(s, p, m.taps);
  for (int64_t r = 0; r < piece.rows; r++)
    convolve(s, p, m.taps, old.history ? old.history + (piece.row + r) * old.history_row : nullptr,
             old.history_step, piece.steps, m.projected + r * piece.steps * s.projected_step(),
             m.u + r * piece.steps * s.u_step(),
             next.history ? next.history + r * s.history() : nullptr);
  multiply({m.u, s.u_step(), p.x_weight, s.selected(), s.inner, nullptr, m.selected, s.selected(),
            false},
           tokens);
  Upcoming weights(p.out_weight, s.model * s.inner);
  all_channels(s, p, m, [&](const auto& c) {
    weights.fetch(8192);
    c.transpose_parameters(s, p);
  });
  for (int64_t r = 0; r < piece.rows; r++)
    all_channels(s, p, m, [&](const auto& c) {
      weights.fetch(16384);
      scan_channels(s, c, m, piece, r, old, next);
    });
  multiply({m.u, s.u_step(), p.out_weight, s.model, s.inner, p.out_bias, out, s.model,
            s.residual != 0},
           tokens);
}

/// Arguments of mamba_layers.
struct Call {
  Sizes s;
  const Layer* layers;
  const State* states;  // of the layers, or null for zero
  const float *last_weight, *last_bias, *x, *aggregate;
  float *out, *histories, *ssms;
  float eps;
};

/// All layers for one piece that starts at step `start` of its sequence.
void run_piece(const Call& call, const Scratch& m, const Piece& piece, int64_t start) {
  const Sizes& s = call.s;
  int64_t begin = (piece.row * s.length + start) * s.model, floats = piece.tokens() * s.model;
  const float* x = call.x + begin;
  float* q = call.out + begin;
  if (s.residual)
    for (int64_t i = 0; i < floats; i++) q[i] = x[i];
  for (int64_t l = 0; l < s.layers; l++) {
    const Layer& p = call.layers[l];
    State old = call.states ? call.states[l] : State{};
    NewState next{};
    if (call.ssms) {
      next.history = call.histories + (l * s.batch + piece.row) * s.history();
      next.ssm = call.ssms + (l * s.batch + piece.row) * s.ssm();
    } else if (s.length > TOKENS) {
      next.history = m.carried + l * (s.history() + s.ssm());
      next.ssm = next.history + s.history();
    }
    if (start) {  // goes on from where the piece before it left off
      old = {next.history, s.history(), s.inner, next.ssm, s.ssm(), 1, s.inner};
      old.history -= piece.row * old.history_row;
      old.ssm -= piece.row * old.ssm_row;
    }
    if (s.residual)
      for (int64_t i = 0; i < piece.tokens(); i++)
        normalise(q + i * s.model, p.norm_weight, p.norm_bias, s.model, call.eps,
                  m.normed + i * s.model);
    run_layer(s, p, m, piece, s.residual ? m.normed : x, q, old, next);
    if (call.aggregate)
      for (int64_t i = 0; i < floats; i++) q[i] += call.aggregate[begin + i];
  }
  if (call.last_weight)
    for (int64_t i = 0; i < piece.tokens(); i++)
      normalise(q + i * s.model, call.last_weight, call.last_bias, s.model, call.eps,
                q + i * s.model);
}

/// All pieces of some rows, in order.
void run_rows(const Call& call, const Scratch& m, int64_t row, int64_t rows) {
  int64_t steps = call.s.steps();
  for (int64_t start = 0; start < call.s.length; start += steps) {
    int64_t left = call.s.length - start;
    run_piece(call, m, {row, rows, left < steps ? left : steps}, start);
  }
}

}  // namespace

extern "C" {

/// Products of small whole numbers, which are exact in any order.
const char* selftest_layer(void) {
  constexpr int64_t ROWS = 7, COLUMNS = 21, K = 2 * LANES + 3;
  float x[ROWS * K], w[COLUMNS * K], bias[COLUMNS], out[ROWS * COLUMNS];
  for (int64_t i = 0; i < ROWS * K; i++) x[i] = float(i * 5 % 13 - 6);
  for (int64_t i = 0; i < COLUMNS * K; i++) w[i] = float(i * 7 % 11 - 5);
  for (int64_t i = 0; i < COLUMNS; i++) bias[i] = float(i);
  for (int64_t i = 0; i < ROWS * COLUMNS; i++) out[i] = float(-i);
  multiply({x, K, w, COLUMNS, K, bias, out, COLUMNS, true}, ROWS);
  for (int64_t i = 0; i < ROWS * COLUMNS; i++) {
    float sum = bias[i % COLUMNS] - float(i);
    for (int64_t k = 0; k < K; k++) sum += x[i / COLUMNS * K + k] * w[i % COLUMNS * K + k];
    if (!(out[i] == sum)) return "a matrix product differs";
  }
  return nullptr;
}

/// Floats of scratch memory that mamba_layers needs.
int64_t mamba_layers_scratch(const int64_t* sizes, int64_t threads) {
  return threads * Scratch(*reinterpret_cast<const Sizes*>(sizes), threads, nullptr).floats;
}

/// All layers for `batch` x `length` tokens x (contiguous), at least one of them. `states` is null
/// (zero) or holds a State per layer. `histories` (layers, batch, taps - 1, inner) and `ssms`
/// (layers, batch, n, inner) take the new states, or are null. `last_weight` is null without a norm
/// after the layers, `aggregate` (like x) when there is none.
void mamba_layers(const int64_t* sizes, const void* layers, const void* states,
                  const float* last_weight, const float* last_bias, const float* x,
                  const float* aggregate, float* out, float* histories, float* ssms,
                  float* scratch, float eps, int64_t threads) {
  Call call{*reinterpret_cast<const Sizes*>(sizes),
            static_cast<const Layer*>(layers),
            static_cast<const State*>(states),
            last_weight,
            last_bias,
            x,
            aggregate,
            out,
            histories,
            ssms,
            eps};
  int64_t rows = call.s.rows(threads), blocks = (call.s.batch + rows - 1) / rows;
  mail::for_all(blocks, blocks > 1 ? threads : 1, [&](int64_t i, int64_t thread) {
    int64_t row = i * rows, left = call.s.batch - row;
    Scratch first(call.s, threads, scratch);
    Scratch mine(call.s, threads, scratch + thread * first.floats);
    run_rows(call, mine, row, left < rows ? left : rows);
  });
}
}
