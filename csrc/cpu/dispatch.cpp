// Chooses the kernels of the best instruction set this machine has.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace spd {

#define SPD_DECLARE(isa)                   \
  namespace isa {                          \
  const Kernels<float>& kernels_float();   \
  const Kernels<double>& kernels_double(); \
  }
SPD_DECLARE(baseline)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPD_X86 1
SPD_DECLARE(avx2)
SPD_DECLARE(avx512)
#endif
#undef SPD_DECLARE

namespace {

enum class Isa { baseline, avx2, avx512 };

#if SPD_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

Isa chosen() {
  static const bool avx2 = has_avx2();
  static const bool avx512 = has_avx512();
  // Read at every call, so that a test can change it.
  const char* wanted = std::getenv("SPD_FAST_CPU_ISA");
  if (!wanted || !*wanted) return avx512 ? Isa::avx512 : (avx2 ? Isa::avx2 : Isa::baseline);
  const std::string name = wanted;
  if (name == "baseline") return Isa::baseline;
  if (name == "avx2" && avx2) return Isa::avx2;
  if (name == "avx512" && avx512) return Isa::avx512;
  throw std::runtime_error("SPD_FAST_CPU_ISA is '" + name +
                           "', but this machine offers: baseline" + (avx2 ? ", avx2" : "") +
                           (avx512 ? ", avx512" : ""));
}

}  // namespace

const char* instruction_set() {
  switch (chosen()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

template <>
const Kernels<float>& kernels<float>() {
#if SPD_X86
  const Isa isa = chosen();
  if (isa == Isa::avx512) return avx512::kernels_float();
  if (isa == Isa::avx2) return avx2::kernels_float();
#endif
  return baseline::kernels_float();
}

template <>
const Kernels<double>& kernels<double>() {
#if SPD_X86
  const Isa isa = chosen();
  if (isa == Isa::avx512) return avx512::kernels_double();
  if (isa == Isa::avx2) return avx2::kernels_double();
#endif
  return baseline::kernels_double();
}

}  // namespace spd
