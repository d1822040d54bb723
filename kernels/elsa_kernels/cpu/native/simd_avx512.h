// Vectors of 16 floats (AVX-512 F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace elsa {
namespace {

using V = __m512;
constexpr int L = 16;
constexpr int ROW_TILE = 8;
constexpr int ACCUMULATORS = 16;

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline V abs(V a) { return _mm512_abs_ps(a); }
inline V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scale_by_power(V a, V n) { return _mm512_scalef_ps(a, n); }
inline V if_less(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
inline V copy_sign(V a, V sign) {
    const __m512 bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, a), _mm512_and_ps(bit, sign));
}

inline V load(const float *p) { return _mm512_loadu_ps(p); }
inline V widen(__m256i x, bfloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V widen(__m256i x, float16) { return _mm512_cvtph_ps(x); }
inline V load(const bfloat16 *p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), bfloat16{}); }
inline V load(const float16 *p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), float16{}); }

// The first n < L elements, zeros behind them; nothing behind them is read or written.
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V load(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
template <class T> inline V load(const T *p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p), T{}); }
inline void store(float *p, V a) { _mm512_storeu_ps(p, a); }
inline void store(float *p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

inline float sum(V a) { return _mm512_reduce_add_ps(a); }
inline float largest(V a) { return _mm512_reduce_max_ps(a); }

// The sums of four vectors, to out[0 … 3].
inline void sum4(V a, V b, V c, V d, float *out) {
    const V ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const V cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    const V lanes = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline __m512i read_line(const void *p) { return _mm512_loadu_si512(p); }
inline uint64_t read_lines(const char *p, int64_t bytes) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        a = _mm512_xor_si512(a, read_line(p + i));
        b = _mm512_xor_si512(b, read_line(p + i + 64));
        c = _mm512_xor_si512(c, read_line(p + i + 128));
        d = _mm512_xor_si512(d, read_line(p + i + 192));
    }
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(a));
}

}  // namespace
}  // namespace elsa
