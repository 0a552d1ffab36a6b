// Markers that let one header serve the host compiler and nvcc.
#pragma once

#include <cmath>
#include <cstdint>

// Internal linkage on the host: the CPU kernels compile these headers once per instruction set, and a
// function with external linkage could be merged across them and run on a machine that lacks it.
#if defined(__CUDACC__)
#define SPD_HD static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SPD_HD static inline __attribute__((always_inline))
#else
#define SPD_HD static inline
#endif

namespace spd {

// The scalar forms of the operations that SIMD vectors overload (csrc/cpu/vec.h), so that one template
// serves both. minimum(a, b) and maximum(a, b) return b when either is NaN, as the x86 instructions do.
SPD_HD float mul_add(float a, float b, float c) { return std::fma(a, b, c); }
SPD_HD double mul_add(double a, double b, double c) { return std::fma(a, b, c); }
SPD_HD float absolute(float a) { return std::fabs(a); }
SPD_HD double absolute(double a) { return std::fabs(a); }
SPD_HD float minimum(float a, float b) { return a < b ? a : b; }
SPD_HD double minimum(double a, double b) { return a < b ? a : b; }
SPD_HD float maximum(float a, float b) { return a > b ? a : b; }
SPD_HD double maximum(double a, double b) { return a > b ? a : b; }

// A scalar or a vector with every lane equal to `value`.
template <class V, class T>
SPD_HD V splat(T value) {
  return V{} + value;
}

}  // namespace spd
