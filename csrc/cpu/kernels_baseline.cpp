// System headers first: what they define must be compiled for every machine.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPD_ISA baseline
#define SPD_VECTOR_BYTES 16
#include "kernels.inl"
