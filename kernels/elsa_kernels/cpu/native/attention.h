// Attention of few queries over a long KV that lies in host memory: what the translation units share.
//
// A unit of work is one chunk of CHUNK keys for one block of query rows of one key head. It yields a state (m, S, W):
// the max of the logits, Σ exp(s − m), Σ exp(s − m)·v. States of chunks are merged in a binary tree over the chunks'
// absolute positions, so a row's bits depend neither on threads, nor on the batch, nor on the rows beside it.
#pragma once

#include <cstdint>

namespace elsa {

constexpr int CHUNK = 512;       // keys of one unit of work, counted from key 0
constexpr int KEY_BLOCK = 16;    // keys of one pass of Q·K
constexpr int VALUE_BLOCK = 64;  // keys summed in registers before they are added to W
constexpr int MAX_ROWS = 32;     // query rows of a block: those of a group's heads together
constexpr int MAX_D = 256;

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// One call. Mirrors the ctypes structure of library.py, field by field. Strides are in elements.
struct Problem {
    const void *q;  // [B, H, Nq, D]
    const void *k;  // [B, Hkv, Nk, D]
    const void *v;
    float *m;                     // [B, H, Nq], contiguous
    float *S;                     // [B, H, Nq], contiguous
    float *W;                     // [B, H, Nq, D], contiguous
    const float *sinks;           // [H] or null
    const float *slopes;          // [H] or null
    const int32_t *kv_range;      // [B, 2] or null
    int64_t q_strides[3], k_strides[3], v_strides[3];  // of batch, head and token
    int64_t B, H, Hkv, Nq, Nk, D;
    int64_t q_start;
    int64_t window;   // 0: none
    int32_t causal;
    int32_t dtype;
    float scale;
    float softcap;    // 0: none
};

// A block of query rows of one key head, and the half-open range of keys that any of them sees. Row r of a key head is
// query r % Nq of its group's head r / Nq.
struct Block {
    int64_t batch, head, row, rows;
    int64_t first, end;
};

// The states of a block's rows over some keys.
struct States {
    float *W;  // [rows, D]
    float *m;  // [rows]
    float *S;  // [rows]
};

// What a thread needs to work on a unit.
struct alignas(64) Scratch {
    float q[MAX_ROWS][MAX_D];
    float logits[MAX_ROWS][CHUNK];
    float staged[VALUE_BLOCK][MAX_D];  // rows of K or V in FP32, where they cannot be used as they lie
};

struct Keys { int64_t lo, hi; };

// The keys that a row sees are an interval, whatever the masks.
inline Keys visible_keys(const Problem &p, int64_t batch, int64_t query) {
    int64_t lo = 0, hi = p.Nk, position = p.q_start + query;
    if (p.kv_range) {
        if (p.kv_range[2 * batch] > lo) lo = p.kv_range[2 * batch];
        if (p.kv_range[2 * batch + 1] < hi) hi = p.kv_range[2 * batch + 1];
    }
    if (p.causal && position + 1 < hi) hi = position + 1;
    if (p.window) {
        if (position - p.window + 1 > lo) lo = position - p.window + 1;
        if (position + p.window < hi) hi = position + p.window;
    }
    return {lo, hi > lo ? hi : lo};
}

// One instruction set's code.
struct Kernels {
    void (*attend)(const Problem &, const Block &, int64_t chunk, States out, Scratch &);
    void (*merge)(States into, States other, int64_t rows, int64_t D);  // `into` holds the earlier keys
    uint64_t (*read)(const void *, int64_t bytes);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace elsa
