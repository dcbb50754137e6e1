// Causal depthwise convolution over time with bias and SiLU, channel-last, forward and backward.
//
// One lane is one channel; the rows that a step looks back at are still in the first cache. Backward
// computes the value before the activation again instead of reading it from memory.
#include "memory.h"
#include "simd.h"

using namespace mail;
using namespace simd;

extern "C" {

/// What is optional may be null; results are contiguous.
struct Conv {
  int64_t batch, length, channels, width, silu;
  Sequence x;
  const float *weight, *bias;  // (channels, width), (channels)
  Sequence history;            // the width - 1 rows before x
  float* out;
  Sequence dout;
  float *dx, *dweight, *dbias, *dhistory;
  int64_t threads;
};
}

namespace {

constexpr int64_t SEGMENT = 256;  // channels of one pass over time
constexpr int64_t SUMMED = 64;    // steps whose gradients are summed in float32

int64_t segments_of(const Conv& s) { return (s.channels + SEGMENT - 1) / SEGMENT; }

/// Scratch memory of one thread.
struct Scratch {
  float *taps, *bias, *ring;  // (width, SEGMENT), (SEGMENT,), (width, SEGMENT)
  const float** rows;         // (width,)

  static int64_t bytes(const Conv& s) {
    return 2 * room<float>(s.width * SEGMENT) + room<float>(SEGMENT) + room<float*>(s.width);
  }
  Scratch(const Conv& s, Arena memory) {
    taps = memory.take<float>(s.width * SEGMENT);
    bias = memory.take<float>(SEGMENT);
    ring = memory.take<float>(s.width * SEGMENT);
    rows = memory.take<const float*>(s.width);
  }
};

/// Sums of the gradients of filters and bias of one segment, (width + 1, SEGMENT): of the last
/// steps, and of all before them; batches have so many that single precision would show.
struct Sums {
  int64_t size, *steps;
  float* recent;
  double* total;

  static int64_t bytes(const Conv& s) {
    int64_t size = (s.width + 1) * SEGMENT;
    return room<int64_t>(1) + room<float>(size) + room<double>(size);
  }
  Sums(const Conv& s, Arena memory) : size((s.width + 1) * SEGMENT) {
    steps = memory.take<int64_t>(1);
    recent = memory.take<float>(size);
    total = memory.take<double>(size);
  }
  void step_done() const {
    if (++*steps % SUMMED) return;
    for (int64_t i = 0; i < size; i++) {
      total[i] += double(recent[i]);
      recent[i] = 0.0f;
    }
  }
};

/// One segment of channels of one sequence.
struct Part {
  const Conv& s;
  int64_t b, first, count;
  const float* nothing;  // a row of zeros

  /// Row t of the input, which the history precedes.
  const float* row(int64_t t) const {
    if (t >= 0) return s.x.at(b, t) + first;
    return s.history.data ? s.history.at(b, s.width - 1 + t) + first : nothing;
  }
};

/// Sum over the taps of one vector of channels; taps (width, SEGMENT), oldest row first.
template <int W>
inline vf sum_taps(int64_t width, const float* const* rows, const float* taps, vf sum, int64_t c,
                   int64_t lanes) {
  for (int64_t k = 0; k < (W ? W : width); k++)
    sum = fma(load_part(rows[k] + c, lanes), load(taps + k * SEGMENT + c), sum);
  return sum;
}

/// Transposes the filters of a segment into (width, SEGMENT), and pads its bias.
void arrange(const Part& p, const Scratch& w) {
  for (int64_t c = 0; c < p.count; c++) {
    for (int64_t k = 0; k < p.s.width; k++)
      w.taps[k * SEGMENT + c] = p.s.weight[(p.first + c) * p.s.width + k];
    w.bias[c] = p.s.bias ? p.s.bias[p.first + c] : 0.0f;
  }
}

/// W is the width, or 0 where it is not known.
template <int W>
void forward_part(const Part& p, const Scratch& w) {
  const Conv& s = p.s;
  int64_t width = W ? W : s.width;
  const float *few[W ? W : 1], **rows = W ? few : w.rows;
  arrange(p, w);
  for (int64_t t = 0; t < s.length; t++) {
    for (int64_t k = 0; k < width; k++) rows[k] = p.row(t - width + 1 + k);
    float* out = s.out + (p.b * s.length + t) * s.channels + p.first;
    for (int64_t c = 0; c < p.count; c += LANES) {
      vf sum = sum_taps<W>(width, rows, w.taps, load(w.bias + c), c, p.count - c);
      store_part(out + c, s.silu ? siluv(sum) : sum, p.count - c);
    }
  }
}

/// Cotangents before the activation of step t; adds to the sums what they give filters and bias.
template <int W>
void through_step(const Part& p, const Scratch& w, int64_t t, const float** rows, float* now,
                  float* sums) {
  const Conv& s = p.s;
  int64_t width = W ? W : s.width;
  for (int64_t k = 0; k < width; k++) rows[k] = p.row(t - width + 1 + k);
  const float* dout = s.dout.at(p.b, t) + p.first;
  for (int64_t c = 0; c < p.count; c += LANES) {
    vf g = load_part(dout + c, p.count - c);
    if (s.silu) {
      vf pre = sum_taps<W>(width, rows, w.taps, load(w.bias + c), c, p.count - c);
      vf gate = sigmoidv(pre);
      g *= gate * fma(pre, 1.0f - gate, splat(1.0f));
    }
    store(now + c, g);
    for (int64_t k = 0; k < width; k++) {
      float* sum = sums + k * SEGMENT + c;
      store(sum, fma(g, load_part(rows[k] + c, p.count - c), load(sum)));
    }
    float* sum = sums + width * SEGMENT + c;
    store(sum, load(sum) + g);
  }
}

template <int W>
void backward_part(const Part& p, const Scratch& w, const Sums& sums) {
  const Conv& s = p.s;
  int64_t width = W ? W : s.width;
  const float *few[W ? W : 1], **rows = W ? few : w.rows;
  arrange(p, w);
  memset(w.ring, 0, sizeof(float) * width * SEGMENT);
  for (int64_t t = 0; t < s.length + width - 1; t++) {
    // Cotangents before the activation of the last steps, t - k in row (t - k) % width.
    float* now = w.ring + t % width * SEGMENT;
    if (t < s.length) {
      through_step<W>(p, w, t, rows, now, sums.recent);
      sums.step_done();
    } else {
      memset(now, 0, sizeof(float) * SEGMENT);
    }
    // Row e of input or history has met its last filter tap.
    int64_t e = t - width + 1;
    float* to = nullptr;
    if (e >= 0)
      to = s.dx + (p.b * s.length + e) * s.channels;
    else if (s.dhistory)
      to = s.dhistory + (p.b * (width - 1) + t) * s.channels;
    if (!to) continue;
    for (int64_t k = 0; k < width; k++) rows[k] = w.ring + (t + k + 1) % width * SEGMENT;
    for (int64_t c = 0; c < p.count; c += LANES) {
      vf sum = vf{};
      for (int64_t k = 0; k < width; k++)
        sum = fma(load(rows[k] + c), load(w.taps + (width - 1 - k) * SEGMENT + c), sum);
      store_part(to + p.first + c, sum, p.count - c);
    }
  }
}

/// Calls work(part, thread) for every sequence and segment of channels.
template <class Work>
void for_parts(const Conv& s, const float* nothing, const Work& work) {
  int64_t segments = segments_of(s);
  for_all(s.batch * segments, s.threads, [&](int64_t i, int64_t me) {
    int64_t first = i % segments * SEGMENT, left = s.channels - first;
    work(Part{s, i / segments, first, left < SEGMENT ? left : SEGMENT, nothing}, me);
  });
}

}  // namespace

extern "C" {

/// Fills out. Returns 0, or 1 without memory.
int mail_conv_forward(const Conv* args) {
  const Conv& s = *args;
  int64_t own = Scratch::bytes(s);
  Memory memory(room<float>(SEGMENT) + s.threads * own);
  if (!memory) return 1;
  const float* nothing = memory.zeros<float>(SEGMENT);
  for_parts(s, nothing, [&](const Part& p, int64_t me) {
    Scratch w(s, {memory.next + me * own});
    s.width == 4 ? forward_part<4>(p, w) : forward_part<0>(p, w);
  });
  return 0;
}

/// Fills dx, dweight, and dbias and dhistory where they are not null. Returns 0, or 1 without
/// memory.
int mail_conv_backward(const Conv* args) {
  const Conv& s = *args;
  int64_t own = Scratch::bytes(s), each = Sums::bytes(s), segments = segments_of(s);
  Memory memory(room<float>(SEGMENT) + s.threads * (segments * each + own));
  if (!memory) return 1;
  const float* nothing = memory.zeros<float>(SEGMENT);
  char* all = memory.zeros<char>(s.threads * segments * each);
  auto sums_of = [&](int64_t segment, int64_t thread) {
    return Sums(s, {all + (thread * segments + segment) * each});
  };
  for_parts(s, nothing, [&](const Part& p, int64_t me) {
    Scratch w(s, {memory.next + me * own});
    Sums sums = sums_of(p.first / SEGMENT, me);
    s.width == 4 ? backward_part<4>(p, w, sums) : backward_part<0>(p, w, sums);
  });
  for (int64_t c = 0; c < s.channels; c++)
    for (int64_t k = 0; k <= s.width; k++) {
      double sum = 0.0;
      for (int64_t i = 0; i < s.threads; i++) {
        Sums sums = sums_of(c / SEGMENT, i);
        int64_t at = k * SEGMENT + c % SEGMENT;
        sum += sums.total[at] + double(sums.recent[at]);
      }
      if (k < s.width)
        s.dweight[c * s.width + k] = float(sum);
      else if (s.dbias)
        s.dbias[c] = float(sum);
    }
  return 0;
}
}
