// Vectors of 8 floats (AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace elsa {
namespace {

using V = __m256;
constexpr int L = 8;
constexpr int ROW_TILE = 2;
constexpr int ACCUMULATORS = 8;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline V scale_by_power(V a, V n) {  // in two steps, so that subnormal results are rounded once
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
inline V if_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline V copy_sign(V a, V sign) {
    const V bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
}

inline __m128i load_bits(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
inline V load(const float *p) { return _mm256_loadu_ps(p); }
inline V load(const bfloat16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p)), 16));
}
inline V load(const float16 *p) { return _mm256_cvtph_ps(load_bits(p)); }
inline void store(float *p, V a) { _mm256_storeu_ps(p, a); }
// Head dimensions are multiples of 8: no vector is cut.
template <class T> inline V load(const T *p, int) { return load(p); }
inline void store(float *p, V a, int) { store(p, a); }

inline float sum(V a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(V a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// The sums of four vectors, to out[0 … 3].
inline void sum4(V a, V b, V c, V d, float *out) {
    const V lanes = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}

inline uint64_t read_lines(const char *p, int64_t bytes) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    const auto at = [p](int64_t i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + i)); };
    for (int64_t i = 0; i + 128 <= bytes; i += 128) {
        a = _mm256_xor_si256(a, at(i));
        b = _mm256_xor_si256(b, at(i + 32));
        c = _mm256_xor_si256(c, at(i + 64));
        d = _mm256_xor_si256(d, at(i + 96));
    }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    return static_cast<uint64_t>(_mm256_extract_epi64(a, 0) ^ _mm256_extract_epi64(a, 2));
}

}  // namespace
}  // namespace elsa
