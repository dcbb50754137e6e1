// Known numbers for the functions that every kernel is made of, as this compiler and these flags
// made them. Called before the library is used: a result that is wrong here is wrong everywhere.
#include <cstdint>

#include "simd.h"

using namespace simd;

namespace {

struct Known {
  const char* name;
  vf (*function)(vf);
  float x, y;
};

constexpr float INFINITE = __builtin_huge_valf();

const Known KNOWN[] = {
    {"exp2(0)", exp2v, 0.0f, 1.0f},
    {"exp2(-0.3)", exp2v, -0.3f, 0.812252396f},
    {"exp2(10.75)", exp2v, 10.75f, 1722.15586f},
    {"exp2(-infinity)", exp2v, -INFINITE, 0.0f},
    {"exp(-7.5)", expv, -7.5f, 5.53084370e-4f},
    {"exp(1)", expv, 1.0f, 2.71828183f},
    {"sigmoid(-2)", sigmoidv, -2.0f, 0.119202922f},
    {"sigmoid(-infinity)", sigmoidv, -INFINITE, 0.0f},
    {"silu(3)", siluv, 3.0f, 2.85772238f},
    {"softplus(-4)", softplusv, -4.0f, 0.0181499279f},
    {"softplus(0.5)", softplusv, 0.5f, 0.974076984f},
    {"softplus(30)", softplusv, 30.0f, 30.0f},
    {"softplus(-infinity)", softplusv, -INFINITE, 0.0f},
};

bool close(float a, float b) {
  float error = a < b ? b - a : a - b, size = b < 0 ? -b : b;
  return error <= 1e-6f * size;
}

bool is_nan(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7fffffffu) > 0x7f800000u;
}

}  // namespace

extern "C" const char* selftest_check(void) {
  // Volatile, so that the answers are computed here and now, not by the compiler.
  volatile float hidden;
  for (const Known& known : KNOWN) {
    float lanes[LANES] = {};
    hidden = known.x;
    lanes[LANES - 1] = hidden;
    store(lanes, known.function(load(lanes)));
    if (!close(lanes[LANES - 1], known.y)) return known.name;
    hidden = __builtin_nanf("");
    lanes[0] = hidden;
    store(lanes, known.function(load(lanes)));
    if (!is_nan(lanes[0])) return "NaN does not propagate";
  }
  float numbers[LANES];
  for (int i = 0; i < LANES; i++) numbers[i] = float(i + 1);
  vf all = load(numbers), some = load_part(numbers, 3);
  if (hsum(all) != LANES * (LANES + 1) / 2 || hsum(some) != 6.0f) return "sum of lanes";
  numbers[2] = -1.0f;
  store_part(numbers, some + some, 2);
  if (numbers[1] != 4.0f || numbers[2] != -1.0f) return "partial store";
  return nullptr;
}
