// Selective scan of Mamba-1 (Gu & Dao 2023, equations 2a and 4, algorithm 2), forward and backward,
// with step sizes (bias, softplus), skip weight and gate in the same pass.
//
// One lane is one channel. Work is cut into chunks of time and blocks of channels whose step sizes,
// inputs and outputs stay in the first cache; inside a block the loop over the states n is outside
// of the loop over time, so that state, decay rate and the cotangents of both stay in registers.
// Backward recomputes decays and states of one chunk from the state kept at its start.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

using namespace simd;

extern "C" {

/// A (batch, time, channel) tensor; the last stride is 1.
struct Sequence {
  const float* data;
  int64_t batch_stride, time_stride;
};

/// A (batch, channel, state) tensor.
struct State {
  const float* data;
  int64_t batch_stride, channel_stride, state_stride;
};

/// Everything but sizes may be null where it is optional; results without strides are contiguous.
struct Scan {
  int64_t batch, length, channels, states, softplus;
  Sequence u, delta, z, B, C;
  const float *A, *D, *bias;  // A (channels, states)
  State h0;
  const uint8_t* reset;  // (batch, length)
  // Forward: (batch, length, channels) twice, (batch, states, channels), one such state per chunk
  // but the last.
  float *out, *ungated, *last, *kept;
  // Backward. dB and dC have a leading axis of parts: disjoint groups of channels.
  Sequence dout;
  State dlast;
  int64_t parts;
  float *du, *ddelta, *dz, *dA, *dB, *dC, *dD, *dbias, *dh0;  // dA (states, channels)
  int64_t threads;
};
}

namespace {

constexpr int64_t CHUNK = 32;
constexpr int V = 2;  // vectors of a channel block
constexpr int64_t WIDTH = V * LANES;
constexpr float LN2 = 0.693147180559945309f;

int64_t blocks_of(int64_t channels) { return (channels + WIDTH - 1) / WIDTH; }

/// Zeroed memory that frees itself; null when there is none.
struct Buffer {
  float* data;
  explicit Buffer(int64_t size) {
    size_t bytes = (size_t(size < 1 ? 1 : size) * sizeof(float) + 63) / 64 * 64;
    data = static_cast<float*>(aligned_alloc(64, bytes));
    if (data) memset(data, 0, bytes);
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

/// Rows of vectors for the steps of one chunk.
typedef vf Rows[CHUNK][V];

const float* at(const Sequence& x, int64_t b, int64_t t) {
  return x.data + b * x.batch_stride + t * x.time_stride;
}

/// One block of channels of one sequence, and its constants.
struct Block {
  const Scan& s;
  int64_t b, first, valid;  // sequence, first channel, channels that exist
  vf bias[V], skip[V];

  Block(const Scan& s, int64_t b, int64_t first) : s(s), b(b), first(first) {
    valid = s.channels - first < WIDTH ? s.channels - first : WIDTH;
    for (int v = 0; v < V; v++) {
      bias[v] = s.bias ? part(s.bias + first, v) : vf{};
      skip[v] = s.D ? part(s.D + first, v) : vf{};
    }
  }

  vf part(const float* p, int v) const {
    int64_t n = valid - v * LANES;
    return n <= 0 ? vf{} : load_part(p + v * LANES, n);
  }
  // Rows lie far apart in memory: what the next block needs of them is fetched meanwhile.
  vf part_of_row(const float* p, int v) const {
    __builtin_prefetch(p + WIDTH + v * LANES);
    return part(p, v);
  }
  vf part(const Sequence& x, int64_t t, int v) const { return part_of_row(at(x, b, t) + first, v); }
  void put(float* p, vf x, int v) const {
    int64_t n = valid - v * LANES;
    __builtin_prefetch(p + WIDTH + v * LANES, 1);
    if (n > 0) store_part(p + v * LANES, x, n);
  }
  /// Row of a contiguous (batch, length, channels) tensor.
  float* row(float* x, int64_t t) const { return x + (b * s.length + t) * s.channels + first; }
  vf raw_step(int64_t t, int v) const { return part(s.delta, t, v) + bias[v]; }
};

/// Step sizes and inputs times step sizes of a chunk.
struct Steps {
  int64_t start, count;
  bool cut[CHUNK];  // no state flows into this step
  Rows dt, x;

  void fill(const Block& k, int64_t t0, int64_t steps, bool fresh) {
    start = t0, count = steps;
    for (int64_t i = 0; i < count; i++) {
      cut[i] = k.s.reset && k.s.reset[k.b * k.s.length + t0 + i];
      for (int v = 0; v < V; v++) {
        vf raw = k.raw_step(t0 + i, v);
        dt[i][v] = k.s.softplus ? softplusv(raw) : raw;
        x[i][v] = dt[i][v] * k.part(k.s.u, t0 + i, v);
      }
    }
    cut[0] |= fresh;
  }
};

/// Decays and states of G states for one chunk.
template <int G>
struct Trace {
  vf decay[CHUNK][G][V], state[CHUNK][G][V];
};

/// Advances states n .. n + G - 1 through a chunk. Adds to the outputs y or fills the trace.
template <int G, bool OUTPUT>
void advance(const Block& k, const Steps& steps, int64_t n, const float* rates, float* state,
             Rows& y, Trace<G>* trace) {
  vf h[G][V], rate[G][V];
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) {
      h[g][v] = load(state + g * WIDTH + v * LANES);
      rate[g][v] = load(rates + g * WIDTH + v * LANES);
    }
  const float *B = at(k.s.B, k.b, steps.start) + n, *C = at(k.s.C, k.b, steps.start) + n;
  for (int64_t i = 0; i < steps.count; i++, B += k.s.B.time_stride, C += k.s.C.time_stride) {
    vf decay[G][V];
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) decay[g][v] = vf{};
    if (steps.cut[i]) {
      for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) h[g][v] = steps.x[i][v] * B[g];
    } else {
      for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) {
          decay[g][v] = exp2v(steps.dt[i][v] * rate[g][v]);
          h[g][v] = fma(decay[g][v], h[g][v], steps.x[i][v] * B[g]);
        }
    }
    if (OUTPUT) {
      for (int v = 0; v < V; v++) {
        vf sum = y[i][v];
        for (int g = 0; g < G; g++) sum = fma(h[g][v], splat(C[g]), sum);
        y[i][v] = sum;
      }
    } else {
      for (int g = 0; g < G; g++)
        for (int v = 0; v < V; v++) {
          trace->decay[i][g][v] = decay[g][v];
          trace->state[i][g][v] = h[g][v];
        }
    }
  }
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) store(state + g * WIDTH + v * LANES, h[g][v]);
}

/// Copies the state of a block into (states, WIDTH) memory; zero where there is none.
void take_state(const Block& k, const State& from, float* to) {
  int64_t states = k.s.states;
  if (!from.data) {
    memset(to, 0, sizeof(float) * states * WIDTH);
    return;
  }
  const float* p = from.data + k.b * from.batch_stride + k.first * from.channel_stride;
  for (int64_t n = 0; n < states; n++)
    for (int64_t c = 0; c < WIDTH; c++)
      to[n * WIDTH + c] =
          c < k.valid ? p[c * from.channel_stride + n * from.state_stride] : 0.0f;
}

/// Copies (states, WIDTH) memory into a contiguous (batch, states, channels) tensor.
void give_state(const Block& k, const float* from, float* to) {
  for (int64_t n = 0; n < k.s.states; n++)
    memcpy(to + (k.b * k.s.states + n) * k.s.channels + k.first, from + n * WIDTH,
           sizeof(float) * k.valid);
}

/// The state before chunk number i: one that forward kept, or the first one.
void start_state(const Block& k, int64_t i, float* to) {
  const Scan& s = k.s;
  if (i == 0) return take_state(k, s.h0, to);
  State kept = {s.kept + (i - 1) * s.batch * s.states * s.channels, s.states * s.channels, 1,
                s.channels};
  take_state(k, kept, to);
}

/// Decay rates in units of log2, (blocks, states, WIDTH).
void scale_rates(const Scan& s, float* rates) {
  for (int64_t c = 0; c < s.channels; c++)
    for (int64_t n = 0; n < s.states; n++)
      rates[(c / WIDTH * s.states + n) * WIDTH + c % WIDTH] = s.A[c * s.states + n] * LOG2E;
}

int64_t chunks_of(const Scan& s) { return (s.length + CHUNK - 1) / CHUNK; }

void forward_block(const Block& k, const float* rates, float* state) {
  const Scan& s = k.s;
  Steps steps;
  Rows y;
  take_state(k, s.h0, state);
  for (int64_t i = 0; i < chunks_of(s); i++) {
    int64_t t0 = i * CHUNK, count = s.length - t0 < CHUNK ? s.length - t0 : CHUNK;
    steps.fill(k, t0, count, i == 0 && !s.h0.data);
    for (int64_t j = 0; j < count; j++)
      for (int v = 0; v < V; v++) y[j][v] = vf{};
    int64_t n = 0;
    for (; n + 2 <= s.states; n += 2)
      advance<2, true>(k, steps, n, rates + n * WIDTH, state + n * WIDTH, y, nullptr);
    for (; n < s.states; n++)
      advance<1, true>(k, steps, n, rates + n * WIDTH, state + n * WIDTH, y, nullptr);
    if (s.kept && i + 1 < chunks_of(s))
      give_state(k, state, s.kept + i * s.batch * s.states * s.channels);
    for (int64_t j = 0; j < count; j++)
      for (int v = 0; v < V; v++) {
        vf sum = s.D ? fma(k.skip[v], k.part(s.u, t0 + j, v), y[j][v]) : y[j][v];
        if (s.ungated) k.put(k.row(s.ungated, t0 + j), sum, v);
        if (s.z.data) sum *= siluv(k.part(s.z, t0 + j, v));
        k.put(k.row(s.out, t0 + j), sum, v);
      }
  }
  if (s.last) give_state(k, state, s.last);
}

/// Sums of the gradients that are shared by all sequences, of one thread.
struct Totals {
  float *A, *D, *bias;  // (blocks, states, WIDTH), (blocks, WIDTH) twice
};

/// Per-lane sums of the gradients of B and C over the channel blocks of a chunk.
struct Shared {
  float *dB, *dC;  // (states, CHUNK, LANES)
};

/// Backward through G states of a chunk. carry is the cotangent of the state after it, then before.
template <int G>
void retreat(const Block& k, const Steps& steps, int64_t n, const float* rates, float* state,
             float* carry, float* total, const Shared& shared, const Rows& dy, Rows& dx, Rows& ddt,
             Trace<G>& trace) {
  vf first[G][V], g_state[G][V], rate[G][V], sum[G][V];
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) {
      first[g][v] = load(state + g * WIDTH + v * LANES);
      g_state[g][v] = load(carry + g * WIDTH + v * LANES);
      rate[g][v] = load(rates + g * WIDTH + v * LANES);
      sum[g][v] = load(total + g * WIDTH + v * LANES);
    }
  advance<G, false>(k, steps, n, rates, state, dx, &trace);
  for (int64_t i = steps.count - 1; i >= 0; i--) {
    const float *B = at(k.s.B, k.b, steps.start + i) + n, *C = at(k.s.C, k.b, steps.start + i) + n;
    vf gx[V], gt[V];
    for (int v = 0; v < V; v++) gx[v] = dx[i][v], gt[v] = ddt[i][v];
    for (int g = 0; g < G; g++) {
      float *at_B = shared.dB + ((n + g) * CHUNK + i) * LANES;
      float *at_C = shared.dC + ((n + g) * CHUNK + i) * LANES;
      vf dB = load(at_B), dC = load(at_C);
      for (int v = 0; v < V; v++) {
        vf cotangent = fma(dy[i][v], splat(C[g]), g_state[g][v]);
        vf before = i > 0 ? trace.state[i - 1][g][v] : first[g][v];
        dC = fma(dy[i][v], trace.state[i][g][v], dC);
        dB = fma(steps.x[i][v], cotangent, dB);
        gx[v] = fma(cotangent, splat(B[g]), gx[v]);
        g_state[g][v] = cotangent * trace.decay[i][g][v];
        vf exponent = g_state[g][v] * before;
        gt[v] = fma(exponent, rate[g][v], gt[v]);
        sum[g][v] = fma(exponent, steps.dt[i][v], sum[g][v]);
      }
      store(at_B, dB), store(at_C, dC);
    }
    for (int v = 0; v < V; v++) dx[i][v] = gx[v], ddt[i][v] = gt[v];
  }
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) {
      store(carry + g * WIDTH + v * LANES, g_state[g][v]);
      store(total + g * WIDTH + v * LANES, sum[g][v]);
    }
}

/// Scratch memory of one thread.
struct Scratch {
  float *state, *carry;  // (states, WIDTH), (blocks, states, WIDTH)
  Shared shared;
  Totals totals;
};

/// Gradients of gate, skip weight and outputs; dy is the cotangent of the ungated output.
void gate_backward(const Block& k, const Steps& steps, Rows& dy, float* total) {
  const Scan& s = k.s;
  vf sum[V];
  for (int v = 0; v < V; v++) sum[v] = load(total + v * LANES);
  for (int64_t i = 0; i < steps.count; i++)
    for (int v = 0; v < V; v++) {
      int64_t t = steps.start + i;
      vf cotangent = s.dout.data ? k.part(s.dout, t, v) : vf{};
      if (s.z.data) {
        vf z = k.part(s.z, t, v), gate = sigmoidv(z), y = k.part_of_row(k.row(s.ungated, t), v);
        k.put(k.row(s.dz, t), cotangent * y * gate * fma(z, 1.0f - gate, splat(1.0f)), v);
        cotangent *= z * gate;
      }
      dy[i][v] = cotangent;
      if (s.D) sum[v] = fma(cotangent, k.part(s.u, t, v), sum[v]);
    }
  for (int v = 0; v < V; v++) store(total + v * LANES, sum[v]);
}

/// Gradients of u, delta and bias from those of x = dt * u and, in units of log2, of dt.
void input_backward(const Block& k, const Steps& steps, const Rows& dy, const Rows& dx,
                    const Rows& ddt, float* total) {
  const Scan& s = k.s;
  vf sum[V];
  for (int v = 0; v < V; v++) sum[v] = load(total + v * LANES);
  for (int64_t i = 0; i < steps.count; i++)
    for (int v = 0; v < V; v++) {
      int64_t t = steps.start + i;
      vf u = k.part(s.u, t, v), du = dx[i][v] * steps.dt[i][v];
      k.put(k.row(s.du, t), s.D ? fma(dy[i][v], k.skip[v], du) : du, v);
      vf step = fma(dx[i][v], u, ddt[i][v] * LN2);
      if (s.softplus) step *= sigmoidv(k.raw_step(t, v));
      k.put(k.row(s.ddelta, t), step, v);
      sum[v] += step;
    }
  for (int v = 0; v < V; v++) store(total + v * LANES, sum[v]);
}

/// Backward through one chunk of one block of channels.
void backward_block(const Block& k, int64_t chunk, const float* rates, const Scratch& w) {
  const Scan& s = k.s;
  int64_t t0 = chunk * CHUNK, count = s.length - t0 < CHUNK ? s.length - t0 : CHUNK;
  int64_t block = k.first / WIDTH, size = s.states * WIDTH;
  Steps steps;
  Rows dy, dx, ddt;
  Trace<2> pair;
  Trace<1> single;
  float *carry = w.carry + block * size, *total = w.totals.A + block * size;
  steps.fill(k, t0, count, chunk == 0 && !s.h0.data);
  gate_backward(k, steps, dy, w.totals.D + block * WIDTH);
  for (int64_t i = 0; i < count; i++)
    for (int v = 0; v < V; v++) dx[i][v] = ddt[i][v] = vf{};
  start_state(k, chunk, w.state);
  int64_t n = 0;
  for (; n + 2 <= s.states; n += 2)
    retreat<2>(k, steps, n, rates + n * WIDTH, w.state + n * WIDTH, carry + n * WIDTH,
               total + n * WIDTH, w.shared, dy, dx, ddt, pair);
  for (; n < s.states; n++)
    retreat<1>(k, steps, n, rates + n * WIDTH, w.state + n * WIDTH, carry + n * WIDTH,
               total + n * WIDTH, w.shared, dy, dx, ddt, single);
  input_backward(k, steps, dy, dx, ddt, w.totals.bias + block * WIDTH);
}

/// Backward through one sequence for the channel blocks from first to last.
void backward_rows(const Scan& s, int64_t b, int64_t part, int64_t first, int64_t last,
                   const float* rates, const Scratch& w) {
  int64_t size = s.states * WIDTH;
  for (int64_t j = first; j < last; j++)
    take_state(Block(s, b, j * WIDTH), s.dlast, w.carry + j * size);
  for (int64_t chunk = chunks_of(s) - 1; chunk >= 0; chunk--) {
    int64_t t0 = chunk * CHUNK, count = s.length - t0 < CHUNK ? s.length - t0 : CHUNK;
    memset(w.shared.dB, 0, sizeof(float) * 2 * s.states * CHUNK * LANES);
    for (int64_t j = first; j < last; j++)
      backward_block(Block(s, b, j * WIDTH), chunk, rates + j * size, w);
    int64_t row = ((part * s.batch + b) * s.length + t0) * s.states;
    for (int64_t i = 0; i < count; i++)
      for (int64_t n = 0; n < s.states; n++) {
        s.dB[row + i * s.states + n] = hsum(load(w.shared.dB + (n * CHUNK + i) * LANES));
        s.dC[row + i * s.states + n] = hsum(load(w.shared.dC + (n * CHUNK + i) * LANES));
      }
  }
  if (s.dh0)
    for (int64_t j = first; j < last; j++)
      give_state(Block(s, b, j * WIDTH), w.carry + j * size, s.dh0);
}

/// Adds the totals of the threads, in their order, to contiguous results.
void collect(const Scan& s, const float* totals, int64_t stride, int64_t threads) {
  int64_t blocks = blocks_of(s.channels);
  for (int64_t c = 0; c < s.channels; c++) {
    int64_t block = c / WIDTH, lane = c % WIDTH;
    for (int64_t n = 0; n < s.states + 2; n++) {
      int64_t from = n < s.states
                         ? (block * s.states + n) * WIDTH + lane
                         : (blocks * (s.states + n - s.states) + block) * WIDTH + lane;
      float sum = 0.0f;
      for (int64_t i = 0; i < threads; i++) sum += totals[i * stride + from];
      if (n < s.states)
        s.dA[n * s.channels + c] = sum;
      else if (n == s.states && s.dD)
        s.dD[c] = sum;
      else if (n == s.states + 1 && s.dbias)
        s.dbias[c] = sum;
    }
  }
}

int64_t thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace

extern "C" {

/// Number of steps between kept states.
int64_t mail_scan_chunk(void) { return CHUNK; }

/// Number of channels of a block, the smallest part of the work.
int64_t mail_scan_width(void) { return WIDTH; }

/// Fills out, ungated, last and kept where they are not null. Returns 0, or 1 without memory.
int mail_scan_forward(const Scan* args) {
  const Scan& s = *args;
  int64_t blocks = blocks_of(s.channels), size = s.states * WIDTH, items = s.batch * blocks;
  Buffer rates(blocks * size), states(s.threads * size);
  if (!rates.data || !states.data) return 1;
  scale_rates(s, rates.data);
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
  {
    int64_t me = thread_index(), team = team_size();
    for (int64_t i = items * me / team; i < items * (me + 1) / team; i++) {
      int64_t block = i % blocks;
      forward_block(Block(s, i / blocks, block * WIDTH), rates.data + block * size,
                    states.data + me * size);
    }
  }
  return 0;
}

/// Fills all gradients that are not null (du, ddelta, dA, dB, dC always; dz with a gate).
int mail_scan_backward(const Scan* args) {
  const Scan& s = *args;
  int64_t blocks = blocks_of(s.channels), size = s.states * WIDTH;
  int64_t sums = blocks * size + 2 * blocks * WIDTH;
  int64_t lanes = s.states * CHUNK * LANES;
  int64_t own = size + blocks * size + 2 * lanes;
  Buffer rates(blocks * size), totals(s.threads * sums), scratch(s.threads * own);
  if (!rates.data || !totals.data || !scratch.data) return 1;
  scale_rates(s, rates.data);
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
  {
    int64_t me = thread_index(), team = team_size(), items = s.batch * s.parts;
    float *p = scratch.data + me * own, *sum = totals.data + me * sums;
    float* lane = p + size + blocks * size;
    Scratch w = {p, p + size, {lane, lane + lanes},
                 {sum, sum + blocks * size, sum + blocks * size + blocks * WIDTH}};
    for (int64_t i = items * me / team; i < items * (me + 1) / team; i++) {
      int64_t part = i % s.parts;
      backward_rows(s, i / s.parts, part, blocks * part / s.parts, blocks * (part + 1) / s.parts,
                    rates.data, w);
    }
  }
  collect(s, totals.data, sums, s.threads);
  return 0;
}
}
