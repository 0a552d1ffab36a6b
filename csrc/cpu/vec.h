// SIMD vectors of the instruction set this file is compiled for: GCC vector extensions, and intrinsics
// only for what the extensions cannot say (min, max, fused multiply-add, widening multiply).
#pragma once

#include <cstring>

#include "../common/host_device.h"

namespace spd {

// SPD_VECTOR_BYTES is 64 with AVX-512, 32 with AVX2 and FMA, 16 otherwise. The compiler's own macros cannot tell: g++
// before 13 does not define them after a target pragma.
constexpr int kVectorBytes = SPD_VECTOR_BYTES;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Vec = VecF;
  using Int = VecI32;
  using Scalar = int32_t;
  static constexpr int count = kVectorBytes / 4;
};
template <>
struct Lanes<double> {
  using Vec = VecD;
  using Int = VecI64;
  using Scalar = int64_t;
  static constexpr int count = kVectorBytes / 8;
};

template <class V, class T>
SPD_HD V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
SPD_HD void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// {0, 1, 2, ...}
template <class T>
SPD_HD typename Lanes<T>::Int iota() {
  typename Lanes<T>::Int v{};
  for (int i = 0; i < Lanes<T>::count; ++i) v[i] = i;
  return v;
}

#if SPD_VECTOR_BYTES == 64
SPD_HD VecF minimum(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
SPD_HD VecD minimum(VecD a, VecD b) { return (VecD)_mm512_min_pd((__m512d)a, (__m512d)b); }
SPD_HD VecF maximum(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
SPD_HD VecD maximum(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
SPD_HD VecF mul_add(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
SPD_HD VecD mul_add(VecD a, VecD b, VecD c) {
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
SPD_HD VecU64 multiply_low_words(VecU64 a, VecU64 b) {
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#elif SPD_VECTOR_BYTES == 32
SPD_HD VecF minimum(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
SPD_HD VecD minimum(VecD a, VecD b) { return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b); }
SPD_HD VecF maximum(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
SPD_HD VecD maximum(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
SPD_HD VecF mul_add(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
SPD_HD VecD mul_add(VecD a, VecD b, VecD c) {
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
SPD_HD VecU64 multiply_low_words(VecU64 a, VecU64 b) {
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#else
#if defined(__SSE2__)
SPD_HD VecF minimum(VecF a, VecF b) { return (VecF)_mm_min_ps((__m128)a, (__m128)b); }
SPD_HD VecD minimum(VecD a, VecD b) { return (VecD)_mm_min_pd((__m128d)a, (__m128d)b); }
SPD_HD VecF maximum(VecF a, VecF b) { return (VecF)_mm_max_ps((__m128)a, (__m128)b); }
SPD_HD VecD maximum(VecD a, VecD b) { return (VecD)_mm_max_pd((__m128d)a, (__m128d)b); }
SPD_HD VecU64 multiply_low_words(VecU64 a, VecU64 b) {
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#else
SPD_HD VecF minimum(VecF a, VecF b) { return a < b ? a : b; }
SPD_HD VecD minimum(VecD a, VecD b) { return a < b ? a : b; }
SPD_HD VecF maximum(VecF a, VecF b) { return a > b ? a : b; }
SPD_HD VecD maximum(VecD a, VecD b) { return a > b ? a : b; }
SPD_HD VecU64 multiply_low_words(VecU64 a, VecU64 b) {
  return (a & 0xffffffffu) * (b & 0xffffffffu);
}
#endif
// Without a fused instruction: two roundings.
SPD_HD VecF mul_add(VecF a, VecF b, VecF c) { return a * b + c; }
SPD_HD VecD mul_add(VecD a, VecD b, VecD c) { return a * b + c; }
#endif

#if SPD_VECTOR_BYTES >= 32
// In every group of four lanes: lane j of r[i] becomes lane i of r[j].
SPD_HD void transpose_quads(VecF r[4]) {
#if SPD_VECTOR_BYTES == 64
#define SPD_VECTOR(op, a, b) (VecF) _mm512_##op##_ps((__m512)a, (__m512)b)
#define SPD_PAIRS(op, a, b) (VecF) _mm512_##op##_pd((__m512d)a, (__m512d)b)
#else
#define SPD_VECTOR(op, a, b) (VecF) _mm256_##op##_ps((__m256)a, (__m256)b)
#define SPD_PAIRS(op, a, b) (VecF) _mm256_##op##_pd((__m256d)a, (__m256d)b)
#endif
  const VecF a = SPD_VECTOR(unpacklo, r[0], r[1]), b = SPD_VECTOR(unpackhi, r[0], r[1]);
  const VecF c = SPD_VECTOR(unpacklo, r[2], r[3]), d = SPD_VECTOR(unpackhi, r[2], r[3]);
  r[0] = SPD_PAIRS(unpacklo, a, c);
  r[1] = SPD_PAIRS(unpackhi, a, c);
  r[2] = SPD_PAIRS(unpacklo, b, d);
  r[3] = SPD_PAIRS(unpackhi, b, d);
#undef SPD_VECTOR
#undef SPD_PAIRS
}
#endif

// Writes the lanes that are kept to `out` one after the other, and something after them up to a whole vector; returns
// how many.
template <class T>
SPD_HD int64_t pack_lanes(T* out, typename Lanes<T>::Vec v, typename Lanes<T>::Int keep) {
#if SPD_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_test_epi32_mask((__m512i)keep, (__m512i)keep);
    store(out, (VecF)_mm512_maskz_compress_ps(mask, (__m512)v));
    return __builtin_popcount(mask);
  } else
#endif
  {
    int64_t count = 0;
    for (int i = 0; i < Lanes<T>::count; ++i) {
      out[count] = v[i];
      count += keep[i] != 0;
    }
    return count;
  }
}

template <class T>
struct SpreadLanes {
  typename Lanes<T>::Vec values;
  int64_t taken;
};

// The opposite: the values at `in`, one after the other, in the lanes that are wanted; the other lanes hold anything. A
// whole vector is read.
template <class T>
SPD_HD SpreadLanes<T> spread_lanes(const T* in, typename Lanes<T>::Int want) {
#if SPD_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_test_epi32_mask((__m512i)want, (__m512i)want);
    const __m512 values = (__m512)load<VecF>(in);
    return {(VecF)_mm512_maskz_expand_ps(mask, values), __builtin_popcount(mask)};
  } else
#endif
  {
    typename Lanes<T>::Vec v{};
    int64_t count = 0;
    for (int i = 0; i < Lanes<T>::count; ++i) {
      v[i] = in[count];
      count += want[i] != 0;
    }
    return {v, count};
  }
}

SPD_HD VecF absolute(VecF a) { return (VecF)((VecI32)a & 0x7fffffff); }

// The lanes added pairwise, in a fixed order.
template <class V>
SPD_HD auto sum_lanes(V v) {
#if SPD_VECTOR_BYTES >= 32
  if constexpr (sizeof(v[0]) == 4) {
#if SPD_VECTOR_BYTES == 64
    const __m256 w = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
#else
    const __m256 w = (__m256)v;
#endif
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  } else
#endif
  {
    constexpr int count = sizeof(V) / sizeof(v[0]);
    auto sum = v[0];
    decltype(sum) lanes[count];
    for (int i = 0; i < count; ++i) lanes[i] = v[i];
    for (int width = count / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
  }
}

}  // namespace spd
