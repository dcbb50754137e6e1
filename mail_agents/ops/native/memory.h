// What kernels share besides arithmetic: tensors with strides, scratch memory, and work for threads.
#ifndef MAIL_MEMORY_H
#define MAIL_MEMORY_H

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mail {

/// A (batch, time, ...) tensor whose inner axes are contiguous.
struct Sequence {
  const float* data;
  int64_t batch_stride, time_stride;

  const float* at(int64_t b, int64_t t) const { return data + b * batch_stride + t * time_stride; }
};

/// Bytes that an array takes from Memory: whole cache lines.
template <class T>
int64_t room(int64_t count) {
  return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
}

/// Arrays are taken from memory in order.
struct Arena {
  char* next;

  /// Memory for `count` values, of which nothing is known.
  template <class T>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(next);
    next += room<T>(count);
    return found;
  }

  template <class T>
  T* zeros(int64_t count) {
    T* found = take<T>(count);
    memset(static_cast<void*>(found), 0, size_t(room<T>(count)));
    return found;
  }
};

/// A block that frees itself; false when there is none.
struct Memory : Arena {
  explicit Memory(int64_t bytes) {
    block = next = static_cast<char*>(aligned_alloc(64, size_t(bytes < 64 ? 64 : bytes)));
  }
  ~Memory() { free(block); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  explicit operator bool() const { return block; }

 private:
  char* block;
};

/// Calls work(item, thread) for all items; every thread takes an equal run of them.
template <class Work>
void for_all(int64_t items, int64_t threads, const Work& work) {
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
  {
    int64_t me = 0, team = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), team = omp_get_num_threads();
#endif
    for (int64_t i = items * me / team; i < items * (me + 1) / team; i++) work(i, me);
  }
}

}  // namespace mail

#endif
