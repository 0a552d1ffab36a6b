// System headers first: what they define must be compiled for every machine.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define SPD_ISA avx2
#define SPD_VECTOR_BYTES 32
#include "kernels.inl"
#endif
