/* Vectors, and what every file here needs of them.

   They are GCC/Clang vector extensions, so one source serves AVX2, AVX-512 and NEON. */

#pragma once

#include <stdint.h>

typedef int64_t i64;
typedef int32_t i32;

/* Sums of products are kept in `vec`, as wide as the processor's registers; element-wise work is done in `eight`. */
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define EIGHT 8

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(4 * EIGHT), aligned(4), may_alias));
typedef i32 ieight __attribute__((vector_size(4 * EIGHT), aligned(4), may_alias));

#define LOAD(TYPE, p) (*(const TYPE *)(p))
#define STORE(TYPE, p, v) (*(TYPE *)(p) = (v))
#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLLED _Pragma("GCC unroll 16")

INLINE eight splat(float x) { return x - (eight){}; }
INLINE eight choose(ieight where, eight yes, eight no) { return (eight)((where & (ieight)yes) | (~where & (ieight)no)); }

/* e^x for x <= 88 with a relative error below 2e-7: 2^round(x log2 e) times a polynomial on [-ln2/2, ln2/2] (that of
   Cephes' expf). NaN stays NaN: a sick request must be noticed, not healed. */
INLINE eight vexp(eight x) {
    const eight low = splat(-87.3f), high = splat(88.0f);
    x = choose(x < low, low, choose(x > high, high, x));
    eight t = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to nearest */
    ieight n = (ieight)t - 0x4b400000;
    eight k = t - 12582912.0f;
    eight r = x - k * 0.693359375f + k * 2.12194440e-4f;
    eight p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (eight)((n + 127) << 23);
}

INLINE float exp1(float x) { return vexp(splat(x))[0]; }
