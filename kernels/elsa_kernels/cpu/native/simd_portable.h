// Vectors of 4 floats in the vector extensions of GCC and Clang: SSE2 on x86-64, NEON on AArch64.
#pragma once

#include <cstring>

#include "attention.h"

namespace elsa {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(8)));
constexpr int L = 4;
constexpr int ROW_TILE = 2;
constexpr int ACCUMULATORS = 8;

template <class To, class From> inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
template <class X> inline X fetch(const void *p) {
    X x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline V set1(float x) { return V{x, x, x, x}; }
inline V zero() { return set1(0.0f); }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V select(I mask, V yes, V no) { return bits<V>((mask & bits<I>(yes)) | (~mask & bits<I>(no))); }
inline V max(V a, V b) { return select(a > b, a, b); }  // b where either is NaN
inline V abs(V a) { return bits<V>(bits<I>(a) & 0x7fffffff); }
inline V round(V a) {  // |a| < 2²²
    const V magic = set1(12582912.0f);
    return (a + magic) - magic;
}
inline V power_of_two(I n) { return bits<V>((n + 127) << 23); }
inline V scale_by_power(V a, V n) {  // in two steps, so that subnormal results are rounded once
    // n + 1.5·2²³ holds n in its low bits; no conversion, which is undefined for NaN.
    const I whole = bits<I>(n + set1(12582912.0f)) - 0x4b400000, half = whole >> 1;
    return a * power_of_two(half) * power_of_two(whole - half);
}
inline V if_less(V a, V b, V yes, V no) { return select(a < b, yes, no); }
inline V copy_sign(V a, V sign) {
    const I bit = bits<I>(set1(-0.0f));
    return bits<V>((bits<I>(a) & ~bit) | (bits<I>(sign) & bit));
}

inline V load(const float *p) { return fetch<V>(p); }
inline V load(const bfloat16 *p) { return bits<V>(__builtin_convertvector(fetch<U16>(p), I) << 16); }
inline V load(const float16 *p) {
    const I half = __builtin_convertvector(fetch<U16>(p), I), sign = (half & 0x8000) << 16;
    const I shifted = (half & 0x7fff) << 13;
    const I finite = bits<I>(bits<V>(shifted) * set1(5.192296858534828e33f));  // 2¹¹²: exact, subnormals too
    const I special = shifted | 0x7f800000;
    const I is_special = shifted >= 0x0f800000;
    return bits<V>(sign | (is_special & special) | (~is_special & finite));
}
inline void store(float *p, V a) { std::memcpy(p, &a, sizeof a); }
// Head dimensions are multiples of 8: no vector is cut.
template <class T> inline V load(const T *p, int) { return load(p); }
inline void store(float *p, V a, int) { store(p, a); }

inline float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float largest(V a) {
    float x = a[0];
    for (int i = 1; i < L; ++i) x = a[i] > x ? a[i] : x;
    return x;
}
// The sums of four vectors, to out[0 … 3].
inline void sum4(V a, V b, V c, V d, float *out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

inline uint64_t read_lines(const char *p, int64_t bytes) {
    uint64_t sums[8] = {};
    for (int64_t i = 0; i + 64 <= bytes; i += 64)
        for (int lane = 0; lane < 8; ++lane) sums[lane] ^= fetch<uint64_t>(p + i + 8 * lane);
    uint64_t total = 0;
    for (uint64_t x : sums) total ^= x;
    return total;
}

}  // namespace
}  // namespace elsa
