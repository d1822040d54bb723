// Y = X·Wᵀ (+ b) in FP32 accuracy for up to 16 rows of X: one pass over W's two FP16 planes, one launch. sm_80 and newer,
// compiled by NVRTC.
//
// A block has an equal share of W's rows, up to 16·MT, and its SLICES warps share K: a warp takes every SLICES-th 32 of
// it. Shares, not tiles, so that every multiprocessor has as much to read. W goes from global memory straight into the
// registers that mma.m16n8k16 wants: a thread's 16 bytes are eight neighbours in K, and since a sum over K may be taken
// in any order, they serve as the fragments of two products as they lie. X arrives in FP32 and is split here, 32 of K at
// a time under a power-of-two scale of its own.
//
// Every 16 of K is three products from zero, smallest first (the tensor core truncates inside its accumulator); two of
// them are added in FP32, FLUSH such sums in a register, those in shared memory, and the slices at the end as a tree:
// no chain is long. None of this depends on the other rows of X, on their number, or on the GPU. A result that is not
// finite, be it for an Inf or NaN in X or for a sum beyond FP32, is computed anew without splitting.
//
// Needs: ELSA_TILES (8 rows of X each), ELSA_MT, ELSA_SLICES (a power of two), ELSA_MIN_BLOCKS.

constexpr int TILES = ELSA_TILES, MT = ELSA_MT, SLICES = ELSA_SLICES;
constexpr int THREADS = 32 * SLICES, ROWS = 16 * MT, COLS = 8 * TILES;
constexpr int STEP = 32 * SLICES, FLUSH = 8;
static_assert((SLICES & (SLICES - 1)) == 0, "the slices are added as a tree");

typedef unsigned int u32;
typedef long long i64;

struct Params {
  const float *x, *bias;  // bias may be null
  float *out;
  const unsigned short *w_hi, *w_lo;  // FP16
  const int *w_exponent;
  i64 x_stride;
  int M, N, K;
};

struct Fragment {  // of one plane of W: 16 rows, 32 of K
  uint4 low, high;  // row g, row g + 8
};

__device__ __forceinline__ uint4 stream(const unsigned short* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
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

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c0 and c1 are of the first and the second 16 of K.
__device__ __forceinline__ void product(float (&c0)[4], float (&c1)[4], const Fragment& w, const u32 (&x)[4]) {
  mma(c0, w.low.x, w.high.x, w.low.y, w.high.y, x[0], x[1]);
  mma(c1, w.low.z, w.high.z, w.low.w, w.high.w, x[2], x[3]);
}

__device__ __forceinline__ float power_of_two(int e) {  // below 2^-126 it stays there
  return __int_as_float((max(e, -126) + 127) << 23);
}

__device__ __forceinline__ float apply_exponent(float v, int e) {
  const int half = e >> 1;
  return v * power_of_two(half) * power_of_two(e - half);
}

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

struct Planes {
  Fragment hi[MT], lo[MT];
};

struct Rows {  // this thread's rows of W: g and g + 8 of every 16
  i64 offset[MT][2];
  bool mine[MT][2];  // in the block's share; of others nothing is read, and zeros are multiplied
};

__device__ __forceinline__ uint4 stream_or_zero(const unsigned short* from, bool wanted) {
  const uint4 zero = {0, 0, 0, 0};
  return wanted ? stream(from) : zero;
}

__device__ __forceinline__ void load(const Params& p, const Rows& rows, int k, Planes& w) {
  const bool inside = k < p.K;
#pragma unroll
  for (int i = 0; i < MT; i++) {
    w.hi[i].low = stream_or_zero(p.w_hi + rows.offset[i][0] + k, inside && rows.mine[i][0]);
    w.hi[i].high = stream_or_zero(p.w_hi + rows.offset[i][1] + k, inside && rows.mine[i][1]);
    w.lo[i].low = stream_or_zero(p.w_lo + rows.offset[i][0] + k, inside && rows.mine[i][0]);
    w.lo[i].high = stream_or_zero(p.w_lo + rows.offset[i][1] + k, inside && rows.mine[i][1]);
  }
}

__device__ __forceinline__ void accumulate(int t, const float4 (&x)[TILES][2], const Planes& w,
                                           float (&acc)[MT][TILES][4]) {
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    u32 hi[4], lo[4];
    const float down = split(x[j][0], x[j][1], hi, lo);
    // This thread's results belong to rows 2t and 2t + 1 of X, whose scales lanes 8t and 8t + 4 hold.
    const float first = __shfl_sync(~0u, down, 8 * t), second = __shfl_sync(~0u, down, 8 * t + 4);
#pragma unroll
    for (int i = 0; i < MT; i++) {
      float c0[4] = {0.f, 0.f, 0.f, 0.f}, c1[4] = {0.f, 0.f, 0.f, 0.f};
      product(c0, c1, w.hi[i], lo);
      product(c0, c1, w.lo[i], hi);
      product(c0, c1, w.hi[i], hi);
#pragma unroll
      for (int c = 0; c < 4; c++) acc[i][j][c] = fmaf(c0[c] + c1[c], c % 2 ? second : first, acc[i][j][c]);
    }
  }
}

// Adds what has been summed to this thread's place in shared memory, and starts anew.
__device__ __forceinline__ void flush(float (*sums)[COLS + 1], int g, int t, float (&acc)[MT][TILES][4]) {
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        sums[16 * i + 8 * (c / 2) + g][8 * j + 2 * t + c % 2] += acc[i][j][c];
        acc[i][j][c] = 0.f;
      }
}

// One element as FP32 arithmetic has it, Inf and NaN included, by one warp; in FP64, for it is rare.
__device__ float exact(const Params& p, int m, int n, int lane) {
  const int e = p.w_exponent[n];
  double sum = 0.;
  for (int k = lane; k < p.K; k += 32) {
    const u32 both = p.w_hi[(i64)n * p.K + k] | (u32)p.w_lo[(i64)n * p.K + k] << 16;
    const float2 w = unpack(both);
    sum += (double)p.x[m * p.x_stride + k] * apply_exponent(w.x + w.y, e);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  return (float)sum;
}

// Adds the slices, applies exponents and bias, stores; keeps count of the results that are not finite.
__device__ __forceinline__ void finish(const Params& p, float (*sums)[ROWS][COLS + 1], int row0, int rows, int* again,
                                       int* count) {
  for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
    const int r = i % ROWS, m = i / ROWS, n = row0 + r;
    if (m >= p.M || r >= rows) continue;
    float v[SLICES];
#pragma unroll
    for (int s = 0; s < SLICES; s++) v[s] = sums[s][r][m];
#pragma unroll
    for (int width = SLICES / 2; width; width /= 2)
#pragma unroll
      for (int s = 0; s < width; s++) v[s] += v[s + width];
    const float y = apply_exponent(v[0], p.w_exponent[n]);
    if (finite(y))
      p.out[(i64)m * p.N + n] = p.bias ? y + p.bias[n] : y;
    else
      again[atomicAdd(count, 1)] = i;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) linear_few(const Params p) {
  __shared__ float sums[SLICES][ROWS][COLS + 1];
  __shared__ int again[ROWS * COLS], count;
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;  // g: row of W within 8, and row of X within 8; t: which eight of 32 of K
  const int row0 = (i64)blockIdx.x * p.N / gridDim.x;
  const int share = (i64)(blockIdx.x + 1) * p.N / gridDim.x - row0;
  Rows rows;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      rows.offset[i][h] = (i64)(row0 + 16 * i + 8 * h + g) * p.K;
      rows.mine[i][h] = 16 * i + 8 * h + g < share;
    }
  const float* x_rows[TILES];
#pragma unroll
  for (int j = 0; j < TILES; j++) x_rows[j] = p.x + min(8 * j + g, p.M - 1) * p.x_stride;
  if (threadIdx.x == 0) count = 0;
  for (int i = lane; i < ROWS * (COLS + 1); i += 32) sums[slice][0][i] = 0.f;
  __syncwarp();

  float acc[MT][TILES][4] = {};
  Planes w;
  int k = 32 * slice + 8 * t, summed = 0;
  load(p, rows, k, w);
  for (int base = 32 * slice; base < p.K; base += STEP, k += STEP) {
    float4 x[TILES][2];
    const bool inside = k < p.K;
    const float4 zero = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const float4* from = reinterpret_cast<const float4*>(x_rows[j] + k);
      x[j][0] = inside ? __ldg(from) : zero;
      x[j][1] = inside ? __ldg(from + 1) : zero;
    }
    const Planes now = w;
    load(p, rows, k + STEP, w);
    accumulate(t, x, now, acc);
    if (++summed == FLUSH) {
      flush(sums[slice], g, t, acc);
      summed = 0;
    }
  }
  flush(sums[slice], g, t, acc);
  __syncthreads();
  finish(p, sums, row0, share, again, &count);
  __syncthreads();
  for (int i = slice; i < count; i += SLICES) {
    const int n = row0 + again[i] % ROWS, m = again[i] / ROWS;
    const float y = exact(p, m, n, lane);
    if (lane == 0) p.out[(i64)m * p.N + n] = p.bias ? y + p.bias[n] : y;
  }
}
