// Which instruction set runs, and the scratch memory: everything here is compiled for the baseline machine.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace resnext_kernels::cpu {

const Kernels* const* supported_kernels() {
  struct Supported {
    const Kernels* list[5] = {};
    Supported() {
#if defined(__x86_64__)
      const Kernels* compiled[] = {&kernels_avx512_bf16(), &kernels_avx512(), &kernels_avx2(), &kernels_baseline()};
#elif defined(__aarch64__)
      const Kernels* compiled[] = {&kernels_neon()};
#else
      const Kernels* compiled[] = {&kernels_baseline()};
#endif
      int count = 0;
      for (const Kernels* candidate : compiled)
        if (candidate->supported()) list[count++] = candidate;
    }
  };
  static const Supported supported;
  return supported.list;
}

namespace {
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{supported_kernels()[0]};
  return table;
}
}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const Kernels* select_kernels(const char* isa) {
  for (auto table = supported_kernels(); *table != nullptr; ++table) {
    if (std::strcmp((*table)->isa, isa) == 0) {
      current().store(*table);
      return *table;
    }
  }
  return nullptr;
}

float* workspace(size_t floats) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  thread_local std::unique_ptr<float[], Free> data;
  thread_local size_t size = 0;
  if (size < floats) {
    data.reset();
    size = 0;
    data.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kAlignment)));
    size = floats;
  }
  return data.get();
}

}  // namespace resnext_kernels::cpu
