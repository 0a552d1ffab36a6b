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
#include "kernels.inl"
