// The algorithm, over the vectors of one instruction set. Included once by each kernel_*.cpp, behind its simd_*.h.
//
// Per row every sum runs in one fixed order: Q·K in vectors along D, exp-weights in vectors along the keys, W in runs
// of VALUE_BLOCK keys from zero. A key that a row does not see enters with weight 0, which changes no bit.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>

namespace elsa {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
// How far ahead of their use, in keys, keys and values are asked for: past a chunk's keys come its values, past these
// the next chunk's keys. Into the L2 cache, which has more misses under way than the L1.
constexpr int64_t AHEAD = 64;

// e^x for x ≤ 0 or NaN, within 1.5 ulp; subnormal results are kept.
inline V exp(V x) {
    x = max(set1(-150.0f), x);  // NaN stays
    const V n = round(mul(x, set1(1.44269504088896341f)));
    V r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    V y = set1(1.9875691500e-4f);
    y = fma(y, r, set1(1.3981999507e-3f));
    y = fma(y, r, set1(8.3334519073e-3f));
    y = fma(y, r, set1(4.1665795894e-2f));
    y = fma(y, r, set1(1.6666665459e-1f));
    y = fma(y, r, set1(5.0000001201e-1f));
    y = add(fma(mul(y, r), r, r), set1(1.0f));
    return scale_by_power(y, n);
}

inline V tanh(V x) {
    const V size = abs(x), z = mul(x, x);
    V y = set1(-5.70498872745e-3f);
    y = fma(y, z, set1(2.06390887954e-2f));
    y = fma(y, z, set1(-5.37397155531e-2f));
    y = fma(y, z, set1(1.33314422036e-1f));
    y = fma(y, z, set1(-3.33332819422e-1f));
    const V small = fma(mul(y, z), x, x);
    const V e = exp(mul(size, set1(-2.0f)));
    const V large = copy_sign(div(sub(set1(1.0f), e), add(set1(1.0f), e)), x);
    return if_less(size, set1(0.625f), small, large);
}

template <class T> inline void prefetch(const T *p) { __builtin_prefetch(p, 0, 2); }

// The keys or values of one unit: `at(j)` is row j, `ahead(j)` the row that is read AHEAD rows after it.
template <class T> struct Rows {
    const T *data, *next;  // row 0 of this operand; row `end` of it goes on at `next`
    int64_t stride, next_stride, end;
    const T *at(int64_t j) const { return data + j * stride; }
    const T *ahead(int64_t j) const {
        return j + AHEAD < end ? data + (j + AHEAD) * stride : next + (j + AHEAD - end) * next_stride;
    }
};

// out[r, i] = q[r]·k[i] for R rows and N keys. q [R, MAX_D], zero behind D; out [R, CHUNK]. The rows from
// `ahead` on are prefetched.
template <int R, int N, class T>
inline void dots(const float *q, const T *k, int64_t stride, const T *ahead, int D, float *out) {
    V sums[R][N];
    for (auto &row : sums)
        for (V &x : row) x = zero();
    constexpr int LINE = 64 / int(sizeof(T));
    int d = 0, column = 0;
    for (; d + L <= D; d += L) {
        V keys[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            keys[i] = load(k + i * stride + d);
            if (d % LINE != 0) continue;
            prefetch(ahead + column);  // in the order of memory, which is faster than row by row at column d
            if ((column += LINE) >= D) column = 0, ahead += stride;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const V query = load(q + r * MAX_D + d);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sums[r][i] = fma(query, keys[i], sums[r][i]);
        }
    }
    if (d < D) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            const V key = load(k + i * stride + d, D - d);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][i] = fma(load(q + r * MAX_D + d), key, sums[r][i]);
        }
    }
    constexpr int TOGETHER = N >= 4 ? 1 : 2;  // rows of one sum4
    static_assert(R % TOGETHER == 0 && (N == 2 || N % 4 == 0), "sum4 takes four sums");
#pragma GCC unroll 8
    for (int r = 0; r < R; r += TOGETHER)
#pragma GCC unroll 2
        for (int i = 0; i < N; i += 4) {
            float *to = out + r * CHUNK + i;
            if constexpr (N >= 4) {
                sum4(sums[r][i], sums[r][i + 1], sums[r][i + 2], sums[r][i + 3], to);
            } else {
                float four[4];
                sum4(sums[r][0], sums[r][1], sums[r + 1][0], sums[r + 1][1], four);
                to[0] = four[0], to[1] = four[1], to[CHUNK] = four[2], to[CHUNK + 1] = four[3];
            }
        }
}

// Keys or vectors of values that R rows take at a time: as many sums as there are registers for.
constexpr int beside(int rows) { return ACCUMULATORS / rows > 8 ? 8 : ACCUMULATORS / rows; }

// Logits of KEY_BLOCK keys for all rows, R at a time as far as there are as many, the rest in smaller tiles.
template <int R = ROW_TILE, class T>
inline void dots_of_rows(const float *q, int rows, const T *k, int64_t stride, const T *ahead, int D, float *out) {
    constexpr int N = beside(R);
    int r = 0;
    for (; r + R <= rows; r += R)
        for (int i = 0; i < KEY_BLOCK; i += N)
            dots<R, N>(q + r * MAX_D, k + i * stride, stride, ahead + i * stride, D, out + r * CHUNK + i);
    if constexpr (R > 1)
        if (r < rows) dots_of_rows<R / 2>(q + r * MAX_D, rows - r, k, stride, ahead, D, out + r * CHUNK);
}

// W[r, 0 … N·L) += Σ_j weights[r, j]·v[j] for R rows. `cut`: elements of a vector that is not whole, else 0.
template <int R, int N, class T>
inline void weigh(const float *weights, const T *v, int64_t stride, const T *ahead, int n, float *W, int D, int cut) {
    V sums[R][N];
    for (auto &row : sums)
        for (V &x : row) x = zero();
    for (int j = 0; j < n; ++j) {
        V values[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            values[i] = cut ? load(v + j * stride + i * L, cut) : load(v + j * stride + i * L);
            if (i * L % (64 / int(sizeof(T))) == 0) prefetch(ahead + j * stride + i * L);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const V weight = set1(weights[r * CHUNK + j]);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sums[r][i] = fma(weight, values[i], sums[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            float *w = W + r * D + i * L;
            if (cut)
                store(w, add(load(w, cut), sums[r][i]), cut);
            else
                store(w, add(load(w), sums[r][i]));
        }
}

template <int R, class T>
inline void weigh_all(const float *weights, const T *v, int64_t stride, const T *ahead, int n, float *W, int D) {
    constexpr int N = beside(R);
    int d = 0;
    for (; d + N * L <= D; d += N * L) weigh<R, N>(weights, v + d, stride, ahead + d, n, W + d, D, 0);
    for (; N > 2 && d + 2 * L <= D; d += 2 * L) weigh<R, 2>(weights, v + d, stride, ahead + d, n, W + d, D, 0);
    for (; d + L <= D; d += L) weigh<R, 1>(weights, v + d, stride, ahead + d, n, W + d, D, 0);
    if (d < D) weigh<R, 1>(weights, v + d, stride, ahead + d, n, W + d, D, D - d);
}

template <int R = ROW_TILE, class T>
inline void weigh_rows(const float *weights, int rows, const T *v, int64_t stride, const T *ahead, int n, float *W,
                       int D) {
    int r = 0;
    for (; r + R <= rows; r += R) weigh_all<R>(weights + r * CHUNK, v, stride, ahead, n, W + r * D, D);
    if constexpr (R > 1)
        if (r < rows) weigh_rows<R / 2>(weights + r * CHUNK, rows - r, v, stride, ahead, n, W + r * D, D);
}

template <class T> inline void widen_row(const T *from, int D, float *to) {
    int d = 0;
    for (; d + L <= D; d += L) store(to + d, load(from + d));
    if (d < D) store(to + d, load(from + d, D - d), D - d);
}

template <class T> Rows<T> keys_of(const Problem &p, const Block &block, int64_t first, int64_t end) {
    const T *k = static_cast<const T *>(p.k) + block.batch * p.k_strides[0] + block.head * p.k_strides[1];
    const T *v = static_cast<const T *>(p.v) + block.batch * p.v_strides[0] + block.head * p.v_strides[1];
    return {k, v + first * p.v_strides[2], p.k_strides[2], p.v_strides[2], end};
}

template <class T> Rows<T> values_of(const Problem &p, const Block &block, int64_t end) {
    const T *k = static_cast<const T *>(p.k) + block.batch * p.k_strides[0] + block.head * p.k_strides[1];
    const T *v = static_cast<const T *>(p.v) + block.batch * p.v_strides[0] + block.head * p.v_strides[1];
    return {v, k + end * p.k_strides[2], p.v_strides[2], p.k_strides[2], end};
}

template <class T> void load_queries(const Problem &p, const Block &block, Scratch &s) {
    const int64_t group = p.H / p.Hkv;
    const T *q = static_cast<const T *>(p.q) + block.batch * p.q_strides[0];
    for (int r = 0; r < block.rows; ++r) {
        const int64_t row = block.row + r, head = block.head * group + row / p.Nq;
        widen_row(q + head * p.q_strides[1] + row % p.Nq * p.q_strides[2], int(p.D), s.q[r]);
        for (int64_t d = p.D; d < MAX_D && d < p.D + L; ++d) s.q[r][d] = 0.0f;
    }
}

// q·k of the keys [first, end) of a chunk that starts at key `base`, in whole blocks of KEY_BLOCK.
template <class T>
void compute_logits(const Problem &p, const Block &block, int64_t base, int64_t first, int64_t end, Scratch &s) {
    const Rows<T> k = keys_of<T>(p, block, first, end);
    const int D = int(p.D), rows = int(block.rows);
    for (int64_t at = (first - base) / KEY_BLOCK * KEY_BLOCK; base + at < end; at += KEY_BLOCK) {
        float *out = s.logits[0] + at;
        const bool whole = base + at >= first && base + at + KEY_BLOCK <= end;
        if (whole) {
            dots_of_rows(s.q[0], rows, k.at(base + at), k.stride, k.ahead(base + at), D, out);
            continue;
        }
        for (int i = 0; i < KEY_BLOCK; ++i) {
            const int64_t j = base + at + i;
            if (j >= first && j < end) widen_row(k.at(j), D, s.staged[i]);
        }
        // Rows of `staged` outside [first, end) hold anything; their logits are masked.
        dots_of_rows(s.q[0], rows, s.staged[0], MAX_D, s.staged[0], D, out);
    }
}

// q·k to the logits of one row in place, and −∞ where the row does not see the key. Returns their max, NaN skipped.
float finish_logits(const Problem &p, const Block &block, int r, int64_t base, int from, int to, float *logits) {
    const int64_t row = block.row + r, query = row % p.Nq;
    const V scale = set1(p.scale);
    for (int j = from; j < to; j += L) store(logits + j, mul(load(logits + j), scale));
    if (p.softcap > 0) {
        const V cap = set1(p.softcap);
        for (int j = from; j < to; j += L) store(logits + j, mul(tanh(div(load(logits + j), cap)), cap));
    }
    if (p.slopes) {
        const float slope = p.slopes[block.head * (p.H / p.Hkv) + row / p.Nq];
        for (int j = from; j < to; ++j) logits[j] += slope * float(base + j - p.q_start - query);
    }
    const Keys seen = visible_keys(p, block.batch, query);
    for (int j = from; j < to && base + j < seen.lo; ++j) logits[j] = -INF;
    for (int j = to - 1; j >= from && base + j >= seen.hi; --j) logits[j] = -INF;
    V m = set1(-INF);
    for (int j = from; j < to; j += L) m = max(load(logits + j), m);
    return largest(m);
}

// Logits to weights exp(s − m) in place; returns their sum.
float exponentiate(float m, int from, int to, float *logits) {
    const V anchor = set1(m == -INF ? 0.0f : m);
    V total = zero();
    for (int j = from; j < to; j += L) {
        const V weight = exp(sub(load(logits + j), anchor));
        store(logits + j, weight);
        total = add(total, weight);
    }
    return sum(total);
}

bool all_finite(const float *x, int64_t n) {
    V check = zero();  // x·0 is NaN where x is not finite
    for (int64_t i = 0; i + L <= n; i += L) check = fma(load(x + i), zero(), check);
    float rest = sum(check);
    for (int64_t i = n / L * L; i < n; ++i) rest += x[i] * 0.0f;
    return rest == 0.0f;
}

// W from the weights. `clean`: non-finite values count as 0.
template <class T>
void weigh_values(const Problem &p, const Block &block, int64_t base, int64_t first, int64_t end, bool clean,
                  float *W, Scratch &s) {
    const Rows<T> v = values_of<T>(p, block, end);
    const int D = int(p.D), rows = int(block.rows);
    for (int64_t i = 0; i < rows * p.D; ++i) W[i] = 0.0f;
    for (int64_t at = (first - base) / VALUE_BLOCK * VALUE_BLOCK; base + at < end; at += VALUE_BLOCK) {
        const int64_t j0 = base + at < first ? first : base + at;
        const int64_t j1 = base + at + VALUE_BLOCK < end ? base + at + VALUE_BLOCK : end;
        const float *weights = s.logits[0] + (j0 - base);
        if (!clean) {
            weigh_rows(weights, rows, v.at(j0), v.stride, v.ahead(j0), int(j1 - j0), W, D);
            continue;
        }
        for (int64_t j = j0; j < j1; ++j) {
            float *row = s.staged[j - j0];
            widen_row(v.at(j), D, row);
            for (int d = 0; d < D; ++d)
                if (!(std::fabs(row[d]) < INF)) row[d] = 0.0f;
        }
        weigh_rows(weights, rows, s.staged[0], MAX_D, s.staged[0], int(j1 - j0), W, D);
    }
}

// A visible key's infinite or NaN value goes into W as IEEE addition has it, however small its weight; a masked one's
// does not, though 0·∞ and 0·NaN are NaN. The logits are needed again, since a weight of 0 does not tell the two apart.
template <class T>
void add_special_values(const Problem &p, const Block &block, int64_t base, int64_t first, int64_t end, float *W,
                        Scratch &s) {
    const Rows<T> v = values_of<T>(p, block, end);
    const int from = int((first - base) / KEY_BLOCK * KEY_BLOCK);
    const int to = int((end - base + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK);
    compute_logits<T>(p, block, base, first, end, s);
    for (int r = 0; r < block.rows; ++r) finish_logits(p, block, r, base, from, to, s.logits[r]);
    for (int64_t j = first; j < end; ++j) {
        float *row = s.staged[0];
        widen_row(v.at(j), int(p.D), row);
        for (int d = 0; d < p.D; ++d) {
            if (std::fabs(row[d]) < INF) continue;
            for (int r = 0; r < block.rows; ++r)
                if (s.logits[r][j - base] != -INF) W[r * p.D + d] += row[d];
        }
    }
}

template <class T>
void attend_as(const Problem &p, const Block &block, int64_t chunk, States out, Scratch &s) {
    const int64_t base = chunk * CHUNK;
    const int64_t first = base > block.first ? base : block.first;
    const int64_t end = base + CHUNK < block.end ? base + CHUNK : block.end;
    const int from = int((first - base) / KEY_BLOCK * KEY_BLOCK);
    const int to = int((end - base + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK);
    load_queries<T>(p, block, s);
    compute_logits<T>(p, block, base, first, end, s);
    for (int r = 0; r < block.rows; ++r) {
        out.m[r] = finish_logits(p, block, r, base, from, to, s.logits[r]);
        out.S[r] = exponentiate(out.m[r], from, to, s.logits[r]);
        if (std::isnan(out.S[r]) && out.m[r] != INF) out.m[r] = out.S[r];
    }
    weigh_values<T>(p, block, base, first, end, false, out.W, s);
    if (all_finite(out.W, block.rows * p.D)) return;
    weigh_values<T>(p, block, base, first, end, true, out.W, s);
    add_special_values<T>(p, block, base, first, end, out.W, s);
}

void attend(const Problem &p, const Block &block, int64_t chunk, States out, Scratch &s) {
    if (p.dtype == FLOAT32)
        attend_as<float>(p, block, chunk, out, s);
    else if (p.dtype == BFLOAT16)
        attend_as<bfloat16>(p, block, chunk, out, s);
    else if (p.dtype == FLOAT16)
        attend_as<float16>(p, block, chunk, out, s);
    else
        throw std::invalid_argument("dtype");
}

// Rescaled, but a weight that underflows does not turn ∞ into NaN.
inline float rescaled(float w, float by) { return std::fabs(w) < INF ? w * by : w; }

void merge(States into, States other, int64_t rows, int64_t D) {
    for (int64_t r = 0; r < rows; ++r) {
        const float a = into.m[r], b = other.m[r];
        const float m = std::isnan(a) || a > b ? a : b;
        const float keep = a == -INF ? 0.0f : std::exp(a - m), take = b == -INF ? 0.0f : std::exp(b - m);
        float *x = into.W + r * D;
        const float *y = other.W + r * D;
        into.m[r] = m;
        into.S[r] = into.S[r] * keep + other.S[r] * take;
        if (all_finite(x, D) && all_finite(y, D)) {
            const V keeps = set1(keep), takes = set1(take);
            int64_t d = 0;
            for (; d + L <= D; d += L) store(x + d, fma(load(y + d), takes, mul(load(x + d), keeps)));
            for (; d < D; ++d) x[d] = x[d] * keep + y[d] * take;
        } else {
            for (int64_t d = 0; d < D; ++d) x[d] = rescaled(x[d], keep) + rescaled(y[d], take);
        }
    }
}

uint64_t read(const void *p, int64_t bytes) { return read_lines(static_cast<const char *>(p), bytes); }

}  // namespace
}  // namespace elsa
