// Y = X·Wᵀ (+ b) in FP32 accuracy for up to 32 rows of X: one pass over W's two FP16 planes, one launch. sm_80 and newer,
// compiled by NVRTC.
//
// A block has an equal share of W's rows, up to 8·NT, and its SLICES warps share K: a warp takes every SLICES-th 32 of
// it. Shares, not tiles, so that every multiprocessor has as much to read. W goes from global memory straight into the
// registers that mma.m16n8k16 wants as its B: a thread's 16 bytes are eight neighbours in K, and since a sum over K may
// be taken in any order, they serve as the fragments of two products as they lie. X, its A, arrives in FP32 and is split
// here, 32 of K at a time under a power-of-two scale of its own. All blocks ask for the same lines of it at about the same
// time, so it is asked for steps ahead: into registers, or with more than 8 rows into shared memory, a ring for each warp.
//
// Every 16 of K is three products from zero, smallest first. The tensor core truncates what it returns, which for rows
// of one sign is a bias, and the largest part of the error: hence the largest product is taken twice, at first only to
// learn its size, and half a unit in its last place, added to the smaller two, makes the truncated sum a rounded one.
// Two sums are added in FP32, FLUSH such sums in a register, those in shared memory, and the slices at the end in FP64:
// no chain is long. None of this depends on the other rows of X, on their number, or on the GPU. A result that is not
// finite, be it for an Inf or NaN in X or for a sum beyond FP32, is computed anew without splitting.
//
// Needs: ELSA_NT (8 rows of W each), ELSA_EIGHTS (8 rows of X each), ELSA_SETS, ELSA_X_SETS, ELSA_X_SHARED, ELSA_SLICES,
// ELSA_MIN_BLOCKS, ELSA_PITCH, ELSA_AHEAD, ELSA_LATER, and SLICES·COLS·(PITCH + RING·X_PITCH) floats of shared memory.

constexpr int SETS = ELSA_SETS;  // of a step's weights in registers, most of them on their way: 1 or 2
constexpr int X_SETS = ELSA_X_SETS;  // steps of X on their way: into registers (then it divides SETS)
constexpr bool X_SHARED = ELSA_X_SHARED;  // or into shared memory
constexpr int NT = ELSA_NT, SLICES = ELSA_SLICES;
constexpr int EIGHTS = ELSA_EIGHTS, PAIRS = (EIGHTS + 1) / 2;  // of rows of X: 1, 2 or 4; two are multiplied at once
constexpr int THREADS = 32 * SLICES, ROWS = 8 * NT, COLS = 8 * EIGHTS;
constexpr int STEP = 32 * SLICES, FLUSH = 8;
constexpr int PITCH = ELSA_PITCH;  // of a row of sums in shared memory; 8 beyond a multiple of 32, so that banks differ
constexpr int RING = X_SHARED ? X_SETS + 1 : 0, X_PITCH = 36;  // steps of X in shared memory; of a row of a warp's 32
constexpr int AHEAD = ELSA_AHEAD;  // steps of W asked of L2 before the kernel ahead has ended,
constexpr int LATER = ELSA_LATER;  // and so many more as soon as it has
static_assert(PITCH >= ROWS && PITCH % 32 == 8, "threads of a warp meet in a bank");
static_assert(X_SHARED || SETS % X_SETS == 0, "a step's registers are chosen when compiled");
static_assert(FLUSH % SETS == 0, "chains of FLUSH are part of the result's definition");

typedef unsigned int u32;
typedef long long i64;

struct Params {
  const float *x, *bias;  // bias may be null
  float *out;
  const unsigned short *w_hi, *w_lo;  // FP16
  const int *w_exponent;
  i64 x_stride;
  int M, N, K;
  int share, larger;  // rows of W that a block has; one more in the first `larger` blocks
};

// machine: begin

// Replaces v if wanted.
__device__ __forceinline__ void stream(uint4& v, const unsigned short* p, bool wanted) {
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %5, 0;"
      " @q ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"((int)wanted));
}

__device__ __forceinline__ void copy4(void* to, const void* from) {  // 4 bytes to shared memory, asynchronously
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}

// 16 bytes likewise; zeros if not wanted. Through L1: past it (.cg), layers of 16 rows took 14 % longer.
__device__ __forceinline__ void copy16(float* to, const float* from, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void end_copies() {  // of a group
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int GROUPS>
__device__ __forceinline__ void await_copies() {  // of this thread, but for the last GROUPS groups
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Has L2 fetch `count` values; nobody's later writes are missed there.
__device__ __forceinline__ void fetch(const unsigned short* from, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(2 * count));
#endif
}

// Kernels behind this one may start as soon as all of its blocks have.
__device__ __forceinline__ void let_kernel_behind_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Before it returns, the kernel ahead may still run: nothing it writes may be read, nor anything written.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Keeps the compiler from having later values of p ready: there are no registers for them.
template <class T>
__device__ __forceinline__ void only_now(T*& p) {
  asm volatile("" : "+l"(p));
}

__device__ __forceinline__ u32 pack(float first, float second) {  // first in the low half
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
  return d;
}

__device__ __forceinline__ float2 unpack(u32 d) {
  float2 v;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(v.x), "=f"(v.y) : "r"(d));
  return v;
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_from_zero(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// machine: end

// Half a unit in the last place of v, with v's sign: a sum to which it was added before it is truncated is a rounded one.
__device__ __forceinline__ float half_unit(float v) { return __int_as_float(__float_as_int(v) & 0xff800000) * 0x1p-24f; }

__device__ __forceinline__ bool finite(float v) { return (__float_as_int(v) & 0x7f800000) != 0x7f800000; }

// Eight neighbours of a row of X as pairs under the scale of the row's 32; returns what undoes the scale.
__device__ __forceinline__ float split(const float4& a, const float4& b, u32 (&hi)[4], u32 (&lo)[4]) {
  float largest = fmaxf(fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(a.z), fabsf(a.w))),
                        fmaxf(fmaxf(fabsf(b.x), fabsf(b.y)), fmaxf(fabsf(b.z), fabsf(b.w))));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  const int e = max(__float_as_int(largest) >> 23, 15);  // biased; the largest lands in [2^14, 2^15)
  const float up = __int_as_float((268 - e) << 23);
  const float v[8] = {a.x * up, a.y * up, a.z * up, a.w * up, b.x * up, b.y * up, b.z * up, b.w * up};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    hi[i] = pack(v[2 * i], v[2 * i + 1]);
    const float2 rounded = unpack(hi[i]);
    lo[i] = pack(v[2 * i] - rounded.x, v[2 * i + 1] - rounded.y);
  }
  return __int_as_float((e - 14) << 23);
}

struct Weights {  // of one step: 32 of K
  uint4 hi[NT], lo[NT];
};

struct Source {
  const unsigned short* row;  // of W's plane hi: row g at this thread's first k
  i64 pitch, to_lo;           // from row g to row g + 8; from plane hi to plane lo
  int share;                  // rows of W from g on that are the block's; of others zeros are multiplied
  int rest;                   // of K from this thread's first k on; beyond it X is 0, and W what it was before
  const float* x;             // the first row of X that this thread loads or copies, at its first k of a step
  i64 x_pitch;                // to its next row
  int x_rows, x_rest;         // rows that X has from its first one on, and the rest of K there; else zeros
  float *to, *from;           // in the warp's ring of steps of X: where this thread copies to, and what it multiplies
};

// Row 8n + g of W at k; `row` points there, and then at row 8(n + 1) + g.
__device__ __forceinline__ void load_w(const Source& from, int n, int k, const unsigned short*& row, Weights& to) {
  const bool wanted = 8 * n < (k < from.rest ? from.share : 0);
  stream(to.hi[n], row, wanted);
  stream(to.lo[n], row + from.to_lo, wanted);
  row += from.pitch;
}

__device__ __forceinline__ void load_x(const Source& from, int k, float4 (&to)[EIGHTS][2]) {
  const float4 zero = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int j = 0; j < EIGHTS; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float4* at = reinterpret_cast<const float4*>(from.x + j * from.x_pitch + k) + h;
      to[j][h] = 8 * j < from.x_rows && k < from.x_rest ? __ldg(at) : zero;
    }
}

__device__ __forceinline__ void copy_x(const Source& from, int k, int slot) {
  const float* row = from.x + k;
#pragma unroll
  for (int i = 0; i < 2 * EIGHTS; i++) {
    copy16(from.to + (slot * COLS + 4 * i) * X_PITCH, row, 4 * i < from.x_rows && k < from.x_rest);
    row += from.x_pitch;
    only_now(row);
  }
  end_copies();
}

// The step of X in a slot; its X_SETS-th next takes the place of the one before it, which every lane has read.
__device__ __forceinline__ void read_x(const Source& from, int k, int& slot, float4 (&to)[EIGHTS][2]) {
  await_copies<X_SETS - 1>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < EIGHTS; j++) {
    const float4* at = reinterpret_cast<const float4*>(from.from + (slot * COLS + 8 * j) * X_PITCH);
    to[j][0] = at[0], to[j][1] = at[1];
  }
  copy_x(from, k + X_SETS * STEP, slot ? slot - 1 : RING - 1);
  slot = slot + 1 == RING ? 0 : slot + 1;
}

// One step at k; every register is loaded anew, x at k + X_SETS·STEP, w at k + SETS·STEP, as soon as it has been used.
__device__ __forceinline__ void accumulate(const Source& from, int k, float4 (&x)[EIGHTS][2], int& slot, Weights& w,
                                           float (&acc)[NT][EIGHTS][2]) {
  u32 hi[2 * PAIRS][4] = {}, lo[2 * PAIRS][4] = {};  // rows g, g + 8, … of X; zeros where there is no such row
  float down[EIGHTS];
  if (X_SHARED) read_x(from, k, slot, x);
#pragma unroll
  for (int j = 0; j < EIGHTS; j++) down[j] = split(x[j][0], x[j][1], hi[j], lo[j]);
  if (!X_SHARED) load_x(from, k + X_SETS * STEP, x);
  const unsigned short* row = from.row + k + SETS * STEP;
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int q = 0; q < EIGHTS; q += 2) {
      const u32(&h)[4] = hi[q], (&h8)[4] = hi[q + 1], (&l)[4] = lo[q], (&l8)[4] = lo[q + 1];
      const u32 hi0[4] = {h[0], h8[0], h[1], h8[1]}, hi1[4] = {h[2], h8[2], h[3], h8[3]};
      const u32 lo0[4] = {l[0], l8[0], l[1], l8[1]}, lo1[4] = {l[2], l8[2], l[3], l8[3]};
      constexpr int BOTH = EIGHTS == 1 ? 1 : 2;
      float c0[4], c1[4], r0[4], r1[4];  // of the first and the second 16 of K
      mma_from_zero(c0, lo0, w.hi[n].x, w.hi[n].y);
      mma_from_zero(c1, lo1, w.hi[n].z, w.hi[n].w);
      mma(c0, hi0, w.lo[n].x, w.lo[n].y);
      mma(c1, hi1, w.lo[n].z, w.lo[n].w);
      mma_from_zero(r0, hi0, w.hi[n].x, w.hi[n].y);
      mma_from_zero(r1, hi1, w.hi[n].z, w.hi[n].w);
#pragma unroll
      for (int i = 0; i < 2 * BOTH; i++) c0[i] += half_unit(r0[i]), c1[i] += half_unit(r1[i]);
      mma(c0, hi0, w.hi[n].x, w.hi[n].y);
      mma(c1, hi1, w.hi[n].z, w.hi[n].w);
      if (q + 2 >= EIGHTS) load_w(from, n, k + SETS * STEP, row, w);
#pragma unroll
      for (int j = 0; j < BOTH; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float& sum = acc[n][q + j][c];
          sum = fmaf(c0[2 * j + c] + c1[2 * j + c], down[q + j], sum);
        }
    }
  }
}

// Adds what has been summed to this thread's place in shared memory, and starts anew.
__device__ __forceinline__ void flush(float (*sums)[PITCH], int g, int t, float (&acc)[NT][EIGHTS][2]) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
      float2& place = *reinterpret_cast<float2*>(&sums[8 * j + g][8 * n + 2 * t]);
      const float2 sum = place;
      place = make_float2(sum.x + acc[n][j][0], sum.y + acc[n][j][1]);
      acc[n][j][0] = acc[n][j][1] = 0.f;
    }
}

constexpr float NO_BIAS = -0.f;  // what may be added to anything

// A sum over K with its row's exponent and bias: one rounding.
__device__ __forceinline__ float result(int exponent, float bias, double sum) {
  return (float)(sum * __hiloint2double((exponent + 1023) << 20, 0) + bias);
}

// One element as FP32 arithmetic has it, Inf and NaN included, by one warp; in FP64, for it is rare.
__device__ float exact(const Params& p, int m, int n, int lane) {
  double sum = 0.;
  for (int k = lane; k < p.K; k += 32) {
    const u32 both = p.w_hi[(i64)n * p.K + k] | (u32)p.w_lo[(i64)n * p.K + k] << 16;
    const float2 w = unpack(both);
    sum += (double)p.x[m * p.x_stride + k] * (w.x + w.y);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  return result(p.w_exponent[n], p.bias ? p.bias[n] : NO_BIAS, sum);
}

// Adds the slices and stores; keeps count of the results that are not finite. All of a thread's sums are one flow of
// instructions without branches: one after another, their latencies would be a twentieth of a layer's time.
__device__ __forceinline__ void finish(const Params& p, float (*sums)[COLS][PITCH], int row0, int rows,
                                       const int* exponent, const float* bias, int* again, int* count) {
  constexpr int EACH = (ROWS * COLS + THREADS - 1) / THREADS;
  float y[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = min((int)threadIdx.x + e * THREADS, ROWS * COLS - 1), r = i % ROWS, m = i / ROWS;
    double sum[SLICES];
#pragma unroll
    for (int s = 0; s < SLICES; s++) sum[s] = sums[s][m][r];
#pragma unroll
    for (int d = 1; d < SLICES; d *= 2)
#pragma unroll
      for (int s = 0; s < SLICES; s += 2 * d) sum[s] += sum[s + d];
    y[e] = result(exponent[r], bias[r], sum[0]);
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = threadIdx.x + e * THREADS, r = i % ROWS, m = i / ROWS;
    if (m >= min(p.M, COLS) || r >= rows) continue;
    if (finite(y[e]))
      p.out[(i64)m * p.N + row0 + r] = y[e];
    else
      again[atomicAdd(count, 1)] = i;
  }
}

// Asks L2 for steps of a row of one of W's planes, of whose K `rest` are left; all threads together step by step, not row
// by row, for the first step needs the first bytes of all rows.
__device__ __forceinline__ void ask(const unsigned short* row, int rest, int first, int end) {
#pragma unroll 1
  for (int k = first * STEP; k < min(end * STEP, rest); k += STEP) fetch(row + k, min(STEP, rest - k));
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) linear_few(const Params p) {
  extern __shared__ float shared[];
  float(*sums)[COLS][PITCH] = reinterpret_cast<float(*)[COLS][PITCH]>(shared);
  __shared__ int again[ROWS * COLS], count, exponent[ROWS];
  __shared__ float bias[ROWS];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;  // g: row of W within 8, and row of X within 8; t: which eight of 32 of K
  const int row0 = blockIdx.x * p.share + min((int)blockIdx.x, p.larger), share = p.share + ((int)blockIdx.x < p.larger);
  let_kernel_behind_start();
  const int asked = lane / 2 * 8 + slice;  // row of the share that this thread asks L2 for, one plane of it
  const unsigned short* const asked_row = (lane % 2 ? p.w_lo : p.w_hi) + (i64)(row0 + asked) * p.K;
  const int asked_rest = asked < share ? p.K : 0;
  ask(asked_row, asked_rest, 0, AHEAD);
  const int first = 32 * slice + 8 * t;
  const int x_row = X_SHARED ? lane / 8 : g, x_first = X_SHARED ? 32 * slice + lane % 8 * 4 : first;
  float* const ring = shared + SLICES * COLS * PITCH + slice * RING * COLS * X_PITCH;
  Source from;
  from.row = p.w_hi + (i64)(row0 + g) * p.K + first;
  from.pitch = 8 * (i64)p.K;
  from.to_lo = p.w_lo - p.w_hi;
  from.share = share - g;
  from.rest = p.K - first;
  from.x = p.x + x_row * p.x_stride + x_first;
  from.x_pitch = (X_SHARED ? 4 : 8) * p.x_stride;
  from.x_rows = p.M - x_row;
  from.x_rest = p.K - x_first;
  from.to = ring + x_row * X_PITCH + lane % 8 * 4;
  from.from = ring + g * X_PITCH + 8 * t;
  if (threadIdx.x == 0) count = 0;
  float* const mine = sums[slice][0];
  for (int i = lane; i < COLS * PITCH; i += 32) mine[i] = 0.f;
  __syncwarp();
  wait_for_kernel_ahead();
  if (threadIdx.x < share) {  // for the end, where they would be waited for
    copy4(exponent + threadIdx.x, p.w_exponent + row0 + threadIdx.x);
    if (p.bias)
      copy4(bias + threadIdx.x, p.bias + row0 + threadIdx.x);
    else
      bias[threadIdx.x] = NO_BIAS;
  }

  float acc[NT][EIGHTS][2] = {};
  Weights w[SETS] = {};
  float4 x[SETS][EIGHTS][2];
  int slot = 0;
  if (X_SHARED) {
#pragma unroll
    for (int i = 0; i < X_SETS; i++) copy_x(from, i * STEP, i);
  }
#pragma unroll
  for (int i = 0; i < SETS; i++) {  // in the order in which they will be used
    if (!X_SHARED && i < X_SETS) load_x(from, i * STEP, x[i]);
    const unsigned short* row = from.row + i * STEP;
#pragma unroll
    for (int n = 0; n < NT; n++) load_w(from, n, i * STEP, row, w[i]);
  }
  ask(asked_row, asked_rest, AHEAD, AHEAD + LATER);
  const int steps = (p.K - 32 * slice + STEP - 1) / STEP;  // the warp's: all its lanes take part in the products
  for (int s = 0; s < steps; s += SETS) {
#pragma unroll
    for (int i = 0; i < SETS; i++) accumulate(from, (s + i) * STEP, x[i % X_SETS], slot, w[i], acc);
    if ((s + SETS) % FLUSH == 0) flush(sums[slice], g, t, acc);
  }
  flush(sums[slice], g, t, acc);
  end_copies();
  await_copies<0>();
  __syncthreads();
  finish(p, sums, row0, share, exponent, bias, again, &count);
  __syncthreads();
  for (int i = slice; i < count; i += SLICES) {
    const int n = row0 + again[i] % ROWS, m = again[i] / ROWS;
    const float y = exact(p, m, n, lane);
    if (lane == 0) p.out[(i64)m * p.N + n] = y;
  }
}
