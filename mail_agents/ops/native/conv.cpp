// Causal depthwise convolution over time with bias and SiLU, channel-last, forward and backward.
//
// One lane is one channel; the rows that a step looks back at are still in the first cache. Backward
// computes the value before the activation again instead of reading it from memory.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

using namespace simd;

extern "C" {

/// Sizes, (batch, time, channel) tensors with strides of batch and time, and contiguous ones.
/// What is optional may be null.
struct Conv {
  int64_t batch, length, channels, width, silu;
  const float* x;
  int64_t x_batch, x_time;
  const float *weight, *bias;  // (channels, width), (channels)
  const float* history;        // the width - 1 rows before x
  int64_t history_batch, history_time;
  float* out;
  const float* dout;
  int64_t dout_batch, dout_time;
  float *dx, *dweight, *dbias, *dhistory;
  int64_t threads;
};
}

namespace {

constexpr int64_t SEGMENT = 256;  // channels of one pass over time
constexpr int64_t MAX_WIDTH = 64;

struct Memory {
  float* data;
  explicit Memory(int64_t size) {
    size_t bytes = (size_t(size < 1 ? 1 : size) * sizeof(float) + 63) / 64 * 64;
    data = static_cast<float*>(aligned_alloc(64, bytes));
    if (data) memset(data, 0, bytes);
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

/// One segment of channels of one sequence.
struct Part {
  const Conv& s;
  int64_t b, first, count;
  const float* nothing;  // a row of zeros

  /// Row t of the input, which the history precedes.
  const float* row(int64_t t) const {
    if (t >= 0) return s.x + b * s.x_batch + t * s.x_time + first;
    if (!s.history) return nothing;
    return s.history + b * s.history_batch + (s.width - 1 + t) * s.history_time + first;
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
void arrange(const Part& p, float* taps, float* bias) {
  for (int64_t c = 0; c < p.count; c++) {
    for (int64_t k = 0; k < p.s.width; k++)
      taps[k * SEGMENT + c] = p.s.weight[(p.first + c) * p.s.width + k];
    bias[c] = p.s.bias ? p.s.bias[p.first + c] : 0.0f;
  }
}

template <int W>
void forward_part(const Part& p, float* memory) {
  const Conv& s = p.s;
  float *taps = memory, *bias = memory + s.width * SEGMENT;
  arrange(p, taps, bias);
  const float* rows[MAX_WIDTH];
  for (int64_t t = 0; t < s.length; t++) {
    for (int64_t k = 0; k < s.width; k++) rows[k] = p.row(t - s.width + 1 + k);
    float* out = s.out + (p.b * s.length + t) * s.channels + p.first;
    for (int64_t c = 0; c < p.count; c += LANES) {
      vf sum = sum_taps<W>(s.width, rows, taps, load(bias + c), c, p.count - c);
      store_part(out + c, s.silu ? siluv(sum) : sum, p.count - c);
    }
  }
}

/// Adds to the sums (width + 1, SEGMENT) of the gradients of filters and bias.
template <int W>
void backward_part(const Part& p, float* memory, float* sums) {
  const Conv& s = p.s;
  int64_t width = W ? W : s.width;
  float *taps = memory, *bias = taps + width * SEGMENT, *ring = bias + SEGMENT;
  arrange(p, taps, bias);
  memset(ring, 0, sizeof(float) * width * SEGMENT);
  const float* rows[MAX_WIDTH];
  for (int64_t t = 0; t < s.length + width - 1; t++) {
    // Cotangents before the activation of the last steps, t - k in row (t - k) % width.
    float* now = ring + t % width * SEGMENT;
    if (t < s.length) {
      for (int64_t k = 0; k < width; k++) rows[k] = p.row(t - width + 1 + k);
      const float* dout = s.dout + p.b * s.dout_batch + t * s.dout_time + p.first;
      for (int64_t c = 0; c < p.count; c += LANES) {
        vf g = load_part(dout + c, p.count - c);
        if (s.silu) {
          vf pre = sum_taps<W>(width, rows, taps, load(bias + c), c, p.count - c);
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
    const float* later[MAX_WIDTH];
    for (int64_t k = 0; k < width; k++) later[k] = ring + (t + k + 1) % width * SEGMENT;
    for (int64_t c = 0; c < p.count; c += LANES) {
      vf sum = vf{};
      for (int64_t k = 0; k < width; k++)
        sum = fma(load(later[k] + c), load(taps + (width - 1 - k) * SEGMENT + c), sum);
      store_part(to + p.first + c, sum, p.count - c);
    }
  }
}

/// Calls work(part, thread) for every sequence and segment of channels, in equal shares.
template <class Work>
void for_all(const Conv& s, const float* nothing, const Work& work) {
  int64_t segments = (s.channels + SEGMENT - 1) / SEGMENT, items = s.batch * segments;
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
  {
    int64_t me = 0, team = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), team = omp_get_num_threads();
#endif
    for (int64_t i = items * me / team; i < items * (me + 1) / team; i++) {
      int64_t first = i % segments * SEGMENT, left = s.channels - first;
      work(Part{s, i / segments, first, left < SEGMENT ? left : SEGMENT, nothing}, me);
    }
  }
}

}  // namespace

extern "C" {

/// Widest filter.
int64_t mail_conv_max_width(void) { return MAX_WIDTH; }

/// Fills out. Returns 0, or 1 without memory.
int mail_conv_forward(const Conv* args) {
  const Conv& s = *args;
  int64_t own = (s.width + 1) * SEGMENT;
  Memory memory(SEGMENT + s.threads * own);
  if (!memory.data) return 1;
  float* rest = memory.data + SEGMENT;
  for_all(s, memory.data, [&](const Part& p, int64_t me) {
    s.width == 4 ? forward_part<4>(p, rest + me * own) : forward_part<0>(p, rest + me * own);
  });
  return 0;
}

/// Fills dx, dweight, and dbias and dhistory where they are not null. Returns 0, or 1 without
/// memory.
int mail_conv_backward(const Conv* args) {
  const Conv& s = *args;
  int64_t segments = (s.channels + SEGMENT - 1) / SEGMENT;
  int64_t own = (2 * s.width + 1) * SEGMENT, size = (s.width + 1) * SEGMENT;
  int64_t stride = segments * size;
  Memory memory(SEGMENT + s.threads * own), sums(s.threads * stride);
  if (!memory.data || !sums.data) return 1;
  float* rest = memory.data + SEGMENT;
  for_all(s, memory.data, [&](const Part& p, int64_t me) {
    float* sum = sums.data + me * stride + p.first / SEGMENT * size;
    s.width == 4 ? backward_part<4>(p, rest + me * own, sum)
                 : backward_part<0>(p, rest + me * own, sum);
  });
  for (int64_t c = 0; c < s.channels; c++)
    for (int64_t k = 0; k <= s.width; k++) {
      const float* from = sums.data + c / SEGMENT * size + k * SEGMENT + c % SEGMENT;
      float sum = 0.0f;
      for (int64_t i = 0; i < s.threads; i++) sum += from[i * stride];
      if (k < s.width)
        s.dweight[c * s.width + k] = sum;
      else if (s.dbias)
        s.dbias[c] = sum;
    }
  return 0;
}
}
