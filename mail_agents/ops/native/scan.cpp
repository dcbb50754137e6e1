// Selective scan of Mamba-1 (Gu & Dao 2023, equations 2a and 4, algorithm 2), forward and backward,
// with step sizes (bias, softplus), skip weight and gate in the same pass.
//
// One lane is one channel. Work is cut into chunks of time and blocks of channels whose step sizes,
// inputs and outputs stay in the first cache; inside a block the loop over the states n is outside
// of the loop over time, so that state, decay rate and the cotangents of both stay in registers.
// Backward recomputes decays and states of one chunk from the state kept at its start.
#include "memory.h"
#include "simd.h"

using namespace mail;
using namespace simd;

extern "C" {

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
constexpr int G = 4;  // states that advance together
constexpr float LN2 = 0.693147180559945309f;

int64_t blocks_of(int64_t channels) { return (channels + LANES - 1) / LANES; }
int64_t chunks_of(const Scan& s) { return (s.length + CHUNK - 1) / CHUNK; }

/// A long sum with what rounding took from it (Kahan 1965); dozens of thousands of steps add up.
struct Total {
  float *sum, *excess;

  void add(int64_t i, vf x) const {
    vf old = load(sum + i), y = x - load(excess + i), now = old + y;
    store(sum + i, now);
    store(excess + i, (now - old) - y);
  }
};

/// One value per step of a chunk.
typedef vf Column[CHUNK];

/// One block of channels of one sequence.
struct Block {
  const Scan& s;
  int64_t b, first, valid;  // sequence, first channel, channels that exist
  vf bias, skip;

  Block(const Scan& s, int64_t b, int64_t index) : s(s), b(b), first(index * LANES) {
    valid = s.channels - first < LANES ? s.channels - first : LANES;
    bias = s.bias ? load_part(s.bias + first, valid) : vf{};
    skip = s.D ? load_part(s.D + first, valid) : vf{};
  }

  // Rows lie far apart in memory: what the next blocks need of them is fetched meanwhile.
  vf get(const float* row) const {
    __builtin_prefetch(row + first + 2 * LANES);
    return load_part(row + first, valid);
  }
  vf get(const Sequence& x, int64_t t) const { return get(x.at(b, t)); }
  void put(float* row, vf x) const {
    __builtin_prefetch(row + first + 2 * LANES, 1);
    store_part(row + first, x, valid);
  }
  /// Row of a contiguous (batch, length, channels) tensor.
  float* row(float* x, int64_t t) const { return x + (b * s.length + t) * s.channels; }
};

/// Step sizes and inputs times step sizes of a chunk.
struct Steps {
  int64_t start, count;
  bool cut[CHUNK];  // no state flows into this step
  Column raw, dt, x;

  Steps(const Block& k, int64_t chunk) : start(chunk * CHUNK) {
    const Scan& s = k.s;
    count = s.length - start < CHUNK ? s.length - start : CHUNK;
    for (int64_t i = 0; i < count; i++) {
      cut[i] = s.reset && s.reset[k.b * s.length + start + i];
      raw[i] = k.get(s.delta, start + i) + k.bias;
      dt[i] = s.softplus ? softplusv(raw[i]) : raw[i];
      x[i] = dt[i] * k.get(s.u, start + i);
    }
    cut[0] |= chunk == 0 && !s.h0.data;
  }
};

/// Decays and states of some states for one chunk.
struct Trace {
  vf decay[CHUNK][G], state[CHUNK][G];
};

/// Advances the states from n on, GROUP of them, through a chunk. Adds to the outputs y, or fills
/// the trace where y is null.
template <int GROUP, bool OUTPUT>
void advance(const Block& k, const Steps& steps, int64_t n, const float* rates, float* state,
             vf* y, Trace* trace) {
  vf h[GROUP], rate[GROUP];
  for (int g = 0; g < GROUP; g++) {
    h[g] = load(state + (n + g) * LANES);
    rate[g] = load(rates + (n + g) * LANES);
  }
  const float *B = k.s.B.at(k.b, steps.start) + n, *C = k.s.C.at(k.b, steps.start) + n;
  for (int64_t i = 0; i < steps.count; i++, B += k.s.B.time_stride, C += k.s.C.time_stride) {
    vf decay[GROUP];
    for (int g = 0; g < GROUP; g++) {
      vf x = steps.x[i] * B[g];
      decay[g] = steps.cut[i] ? vf{} : exp2v(steps.dt[i] * rate[g]);
      h[g] = steps.cut[i] ? x : fma(decay[g], h[g], x);
    }
    if (OUTPUT) {
      vf sum = h[0] * C[0];
      for (int g = 1; g < GROUP; g++) sum = fma(h[g], splat(C[g]), sum);
      y[i] += sum;
    } else {
      for (int g = 0; g < GROUP; g++) trace->decay[i][g] = decay[g], trace->state[i][g] = h[g];
    }
  }
  for (int g = 0; g < GROUP; g++) store(state + (n + g) * LANES, h[g]);
}

/// Copies the state of a block into (states, LANES) memory; zero where there is none.
void take_state(const Block& k, const State& from, float* to) {
  int64_t states = k.s.states;
  if (!from.data) {
    memset(to, 0, sizeof(float) * states * LANES);
    return;
  }
  const float* p = from.data + k.b * from.batch_stride + k.first * from.channel_stride;
  for (int64_t n = 0; n < states; n++, p += from.state_stride) {
    if (from.channel_stride == 1) {
      store(to + n * LANES, load_part(p, k.valid));
    } else {
      vf lanes = {};
      for (int64_t c = 0; c < k.valid; c++) lanes[c] = p[c * from.channel_stride];
      store(to + n * LANES, lanes);
    }
  }
}

/// Copies (states, LANES) memory into a contiguous (batch, states, channels) tensor.
void give_state(const Block& k, const float* from, float* to) {
  for (int64_t n = 0; n < k.s.states; n++)
    store_part(to + (k.b * k.s.states + n) * k.s.channels + k.first, load(from + n * LANES),
               k.valid);
}

/// The state before a chunk: one that forward kept, or the first one.
void start_state(const Block& k, int64_t chunk, float* to) {
  const Scan& s = k.s;
  if (chunk == 0) return take_state(k, s.h0, to);
  State kept = {s.kept + (chunk - 1) * s.batch * s.states * s.channels, s.states * s.channels, 1,
                s.channels};
  take_state(k, kept, to);
}

/// Decay rates in units of log2, (blocks, states, LANES).
float* scaled_rates(const Scan& s, Memory& memory) {
  float* rates = memory.zeros<float>(blocks_of(s.channels) * s.states * LANES);
  for (int64_t c = 0; c < s.channels; c++)
    for (int64_t n = 0; n < s.states; n++)
      rates[(c / LANES * s.states + n) * LANES + c % LANES] = s.A[c * s.states + n] * LOG2E;
  return rates;
}

void forward_block(const Block& k, const float* rates, float* state) {
  const Scan& s = k.s;
  take_state(k, s.h0, state);
  for (int64_t chunk = 0; chunk < chunks_of(s); chunk++) {
    Steps steps(k, chunk);
    Column y;
    for (int64_t i = 0; i < steps.count; i++) y[i] = vf{};
    int64_t n = 0;
    for (; n + G <= s.states; n += G) advance<G, true>(k, steps, n, rates, state, y, nullptr);
    for (; n < s.states; n++) advance<1, true>(k, steps, n, rates, state, y, nullptr);
    if (s.kept && chunk + 1 < chunks_of(s))
      give_state(k, state, s.kept + chunk * s.batch * s.states * s.channels);
    for (int64_t i = 0; i < steps.count; i++) {
      int64_t t = steps.start + i;
      vf sum = s.D ? fma(k.skip, k.get(s.u, t), y[i]) : y[i];
      if (s.ungated) k.put(k.row(s.ungated, t), sum);
      if (s.z.data) sum *= siluv(k.get(s.z, t));
      k.put(k.row(s.out, t), sum);
    }
  }
  if (s.last) give_state(k, state, s.last);
}

/// Scratch memory of one thread; sums over its channel blocks and sequences.
struct Scratch {
  float *state, *carry;  // (states, LANES), (blocks, states, LANES)
  float *dB, *dC;        // (states, CHUNK, LANES)
  Total A, D, bias;      // (blocks, states, LANES), (blocks, LANES) twice
};

/// Cotangents of a chunk: of the output before the gate, of x = dt * u, and of dt in units of log2.
struct Cotangents {
  Column y, x, dt;
};

/// Backward through GROUP states of a chunk. w.carry holds the cotangent of the state after it, and
/// then of the state before it.
template <int GROUP>
void retreat(const Block& k, const Steps& steps, int64_t n, const float* rates, const Scratch& w,
             Cotangents& d, Trace& trace) {
  int64_t block = k.first * k.s.states + n * LANES;
  vf first[GROUP], carry[GROUP], rate[GROUP], sum[GROUP];
  for (int g = 0; g < GROUP; g++) {
    first[g] = load(w.state + (n + g) * LANES);
    carry[g] = load(w.carry + block + g * LANES);
    rate[g] = load(rates + (n + g) * LANES);
    sum[g] = vf{};
  }
  advance<GROUP, false>(k, steps, n, rates, w.state, nullptr, &trace);
  for (int64_t i = steps.count - 1; i >= 0; i--) {
    const float *B = k.s.B.at(k.b, steps.start + i) + n, *C = k.s.C.at(k.b, steps.start + i) + n;
    vf dx = {}, ddt = {};
    for (int g = 0; g < GROUP; g++) {
      float *dB = w.dB + ((n + g) * CHUNK + i) * LANES, *dC = w.dC + ((n + g) * CHUNK + i) * LANES;
      vf state = fma(d.y[i], splat(C[g]), carry[g]);
      vf before = i > 0 ? trace.state[i - 1][g] : first[g];
      store(dC, fma(d.y[i], trace.state[i][g], load(dC)));
      store(dB, fma(steps.x[i], state, load(dB)));
      dx = fma(state, splat(B[g]), dx);
      carry[g] = state * trace.decay[i][g];
      vf exponent = carry[g] * before;
      ddt = fma(exponent, rate[g], ddt);
      sum[g] = fma(exponent, steps.dt[i], sum[g]);
    }
    d.x[i] += dx;
    d.dt[i] += ddt;
  }
  for (int g = 0; g < GROUP; g++) {
    store(w.carry + block + g * LANES, carry[g]);
    w.A.add(block + g * LANES, sum[g]);
  }
}

/// Gradients of gate and skip weight; fills the cotangent of the output before the gate.
void gate_backward(const Block& k, const Steps& steps, const Scratch& w, Column& dy) {
  const Scan& s = k.s;
  for (int64_t i = 0; i < steps.count; i++) {
    int64_t t = steps.start + i;
    dy[i] = s.dout.data ? k.get(s.dout, t) : vf{};
    if (s.z.data) {
      vf z = k.get(s.z, t), gate = sigmoidv(z), y = k.get(k.row(s.ungated, t));
      k.put(k.row(s.dz, t), dy[i] * y * gate * fma(z, 1.0f - gate, splat(1.0f)));
      dy[i] *= z * gate;
    }
    if (s.D) w.D.add(k.first, dy[i] * k.get(s.u, t));
  }
}

/// Gradients of u, delta and bias.
void input_backward(const Block& k, const Steps& steps, const Scratch& w, const Cotangents& d) {
  const Scan& s = k.s;
  for (int64_t i = 0; i < steps.count; i++) {
    int64_t t = steps.start + i;
    vf du = d.x[i] * steps.dt[i];
    k.put(k.row(s.du, t), s.D ? fma(d.y[i], k.skip, du) : du);
    vf step = fma(d.x[i], k.get(s.u, t), d.dt[i] * LN2);
    if (s.softplus) step *= sigmoidv(steps.raw[i]);
    k.put(k.row(s.ddelta, t), step);
    if (s.bias) w.bias.add(k.first, step);
  }
}

/// Backward through one chunk of one block of channels.
void backward_block(const Block& k, int64_t chunk, const float* rates, const Scratch& w) {
  Steps steps(k, chunk);
  Cotangents d;
  Trace trace;
  gate_backward(k, steps, w, d.y);
  for (int64_t i = 0; i < steps.count; i++) d.x[i] = d.dt[i] = vf{};
  start_state(k, chunk, w.state);
  int64_t n = 0;
  for (; n + G <= k.s.states; n += G) retreat<G>(k, steps, n, rates, w, d, trace);
  for (; n < k.s.states; n++) retreat<1>(k, steps, n, rates, w, d, trace);
  input_backward(k, steps, w, d);
}

/// Backward through one sequence for the channel blocks from first to last.
void backward_rows(const Scan& s, int64_t b, int64_t part, int64_t first, int64_t last,
                   const float* rates, const Scratch& w) {
  int64_t size = s.states * LANES;
  for (int64_t j = first; j < last; j++) take_state(Block(s, b, j), s.dlast, w.carry + j * size);
  for (int64_t chunk = chunks_of(s) - 1; chunk >= 0; chunk--) {
    memset(w.dB, 0, sizeof(float) * CHUNK * size);
    memset(w.dC, 0, sizeof(float) * CHUNK * size);
    for (int64_t j = first; j < last; j++)
      backward_block(Block(s, b, j), chunk, rates + j * size, w);
    int64_t row = ((part * s.batch + b) * s.length + chunk * CHUNK) * s.states;
    for (int64_t i = 0; i < CHUNK && chunk * CHUNK + i < s.length; i++)
      for (int64_t n = 0; n < s.states; n++) {
        s.dB[row + i * s.states + n] = hsum(load(w.dB + (n * CHUNK + i) * LANES));
        s.dC[row + i * s.states + n] = hsum(load(w.dC + (n * CHUNK + i) * LANES));
      }
  }
  if (s.dh0)
    for (int64_t j = first; j < last; j++) give_state(Block(s, b, j), w.carry + j * size, s.dh0);
}

}  // namespace

extern "C" {

/// Number of channels of a block, the smallest part of the work.
int64_t mail_scan_width(void) { return LANES; }

/// Number of steps between kept states.
int64_t mail_scan_chunk(void) { return CHUNK; }

/// Fills out, ungated, last and kept where they are not null. Returns 0, or 1 without memory.
int mail_scan_forward(const Scan* args) {
  const Scan& s = *args;
  int64_t blocks = blocks_of(s.channels), size = s.states * LANES;
  Memory memory(room<float>(blocks * size) + room<float>(s.threads * size));
  if (!memory) return 1;
  float* rates = scaled_rates(s, memory);
  float* states = memory.take<float>(s.threads * size);
  for_all(s.batch * blocks, s.threads, [&](int64_t i, int64_t me) {
    int64_t block = i % blocks;
    forward_block(Block(s, i / blocks, block), rates + block * size, states + me * size);
  });
  return 0;
}

/// Fills all gradients that are not null (du, ddelta, dA, dB, dC always; dz with a gate).
int mail_scan_backward(const Scan* args) {
  const Scan& s = *args;
  int64_t blocks = blocks_of(s.channels), size = s.states * LANES, lanes = CHUNK * size;
  int64_t padded = blocks * LANES, count = blocks * size + 2 * padded;
  int64_t own = size + blocks * size + 2 * lanes;
  Memory memory(room<float>(blocks * size) + room<float>(s.threads * 2 * count) +
                room<float>(s.threads * own));
  if (!memory) return 1;
  float* rates = scaled_rates(s, memory);
  float* totals = memory.zeros<float>(s.threads * 2 * count);
  float* scratch = memory.take<float>(s.threads * own);
  for_all(s.batch * s.parts, s.threads, [&](int64_t i, int64_t me) {
    float *p = scratch + me * own, *lane = p + size + blocks * size;
    float *A = totals + me * 2 * count, *D = A + blocks * size, *bias = D + padded;
    Scratch w = {p, p + size, lane, lane + lanes, {A, A + count}, {D, D + count},
                 {bias, bias + count}};
    int64_t part = i % s.parts;
    backward_rows(s, i / s.parts, part, blocks * part / s.parts, blocks * (part + 1) / s.parts,
                  rates, w);
  });
  // Now that it is done, the first sums take the totals of all threads.
  for (int64_t i = 0; i < count; i++) {
    double sum = 0.0;
    for (int64_t j = 0; j < s.threads; j++) {
      const float* from = totals + j * 2 * count + i;
      sum += double(from[0]) - double(from[count]);
    }
    totals[i] = float(sum);
  }
  for (int64_t n = 0; n < s.states; n++)
    for (int64_t j = 0; j < blocks; j++)
      store_part(s.dA + n * s.channels + j * LANES, load(totals + (j * s.states + n) * LANES),
                 s.channels - j * LANES);
  const float *D = totals + blocks * size, *bias = D + padded;
  if (s.dD) memcpy(s.dD, D, sizeof(float) * s.channels);
  if (s.dbias) memcpy(s.dbias, bias, sizeof(float) * s.channels);
  return 0;
}
}
