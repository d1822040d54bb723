// Exact attention in IEEE FP32: FFMA only, no tensor core, from sm_60 to sm_90 and newer. Compiled by NVRTC.
//
// A block of WARPS warps owns BM = 16·WARPS queries; a warp owns 16 of them, so the softmax never leaves the warp. In a
// warp the lanes form a 2 × 16 grid (bit 0: row, bits 1-4: column) and a thread owns the rows row0 + 2·i, i < 8. Both
// products are register-blocked outer products fed by 16-byte shared loads whose half-warps hit 32 distinct banks:
//   S[8][BN/16] = Q·Kᵀ, walking along D four at a time; key of column j: lane_col + 16·j
//   T[8][D/16]  = P·V,  walking along the keys four at a time, P passing through the warp's own shared memory
// K and V stream through a ring of STAGES slots, a chunk of DC of K's D, then a chunk of NC of V's keys at a time.
//
// Sums are a tree in three levels, so that the error does not grow like a chain's: within a tile of BN keys from zero
// (T), tiles into O for SUPER tiles, and O into the output tensor in global memory, which serves as the accumulator of
// the last level. Where T does not fit the registers (TILE_SUMS 0), tiles chain in O and SUPER is small. Boundaries
// lie at absolute key positions and a fully masked tile is an exact identity: a row's bits depend on nothing else.
//
// A key with logit −∞ must contribute nothing even where its value is ∞ or NaN, but 0·∞ is NaN. Blocks whose result
// is finite are right as they are; the others run once more, in a second launch, with every product guarded.
//
// Needs: ELSA_D (head dimension padded to a multiple of 32), ELSA_WARPS, ELSA_BN, ELSA_DC, ELSA_NC, ELSA_STAGES,
// ELSA_Q_RESIDENT, ELSA_VEC (4: rows are 16-byte aligned, or 1), ELSA_SUPER, ELSA_TILE_SUMS, ELSA_MIN_BLOCKS,
// ELSA_LOGITS (1: softcap, ALiBi, bias or a scale that is not positive).

constexpr int D = ELSA_D, WARPS = ELSA_WARPS, BN = ELSA_BN, DC = ELSA_DC, NC = ELSA_NC, STAGES = ELSA_STAGES;
constexpr int VEC = ELSA_VEC, SUPER = ELSA_SUPER;
constexpr bool Q_RESIDENT = ELSA_Q_RESIDENT, TILE_SUMS = ELSA_TILE_SUMS;
constexpr int THREADS = 32 * WARPS, BM = 16 * WARPS, TM = 8, TN = BN / 16, TO = D / 16;
constexpr int K_STEPS = D / DC, V_STEPS = BN / NC, STEPS = K_STEPS + V_STEPS;
// 4 floats of padding put 8 consecutive rows on 8 distinct groups of banks.
constexpr int QS = (Q_RESIDENT ? D : DC) + 4, KS = DC + 4;
constexpr int K_FLOATS = BN * KS + (Q_RESIDENT ? 0 : BM * QS), V_FLOATS = NC * D;
constexpr int SLOT = K_FLOATS > V_FLOATS ? K_FLOATS : V_FLOATS;
constexpr int RING = Q_RESIDENT ? BM * QS : 0, PROBS = RING + STAGES * SLOT, KEPT = PROBS + BM * BN;
static_assert(D % 32 == 0 && D <= 256 && D % DC == 0 && DC % 32 == 0, "head dimension");
static_assert(BN % 32 == 0 && BN % NC == 0 && NC % 4 == 0, "keys per tile");
static_assert(STAGES >= 2, "a chunk arrives while another is used");

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, LN2_LOW = -1.904654e-9f;
constexpr int FAR = 1 << 30;  // farther than any position

typedef long long i64;

struct Params {
  const float *q, *k, *v;
  float *out, *m_out, *s_out;  // m_out and s_out only when the state is wanted; out then holds W
  const float *alibi, *bias, *sinks;
  const int* kv_range;
  i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_k;  // strides in elements
  unsigned char* redo;                                // for each block, whether it has to be run guarded
  int B, H, Hkv, Nq, Nk, d, q_start, causal, window;  // window 0: none
  int blocks;
  float scale, softcap;                               // softcap 0: none
};

struct Block {
  int b, h, hk, q0;            // batch, head, key head, first query
  int lo, hi;                  // keys that exist
  int below, above;            // query at position p sees keys j with p − below < j < p + above
  int tile, tile_end;          // tiles some query of the block sees
  int full_lo, full_hi;        // keys that every query of the block sees
};

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; exact 0 for −∞, NaN for NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float neg_inf() { return __int_as_float(0xff800000); }

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Copies WIDTH floats from global to shared memory, or writes zeros; asynchronously where the hardware can.
template <int WIDTH>
__device__ __forceinline__ void copy(float* to, const float* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  int bytes = valid ? 4 * WIDTH : 0;  // what is not read is zero-filled
  if (WIDTH == 4)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  if (WIDTH == 4)
    *(float4*)to = valid ? __ldg((const float4*)from) : make_float4(0.f, 0.f, 0.f, 0.f);
  else
    *to = valid ? __ldg(from) : 0.f;
#endif
}

__device__ __forceinline__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING>
__device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Keeps the compiler from holding in registers, all through the loops, what a few instructions compute anew.
__device__ __forceinline__ int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ constexpr int power_of_two(int at_least) {
  int n = 1;
  while (n < at_least) n *= 2;
  return n;
}

// Fills to[ROWS][STRIDE] with columns [col0, col0 + WIDTH) of rows [row0, row0 + ROWS); zeros outside [first, end) × [0, d).
template <int ROWS, int WIDTH, int STRIDE>
__device__ __forceinline__ void load_rows(float* to, const float* from, i64 row_stride, int row0, int first, int end,
                                          int col0, int d) {
  constexpr int PER_ROW = WIDTH / VEC, LANES = power_of_two(PER_ROW), PASS = THREADS / LANES;
  unsigned thread = recomputed(threadIdx.x);
  int r = thread / LANES, c = thread % LANES * VEC;
  if (PER_ROW < LANES && c >= WIDTH) return;
  int row = row0 + r - first;
  unsigned rows = col0 + c < d ? max(end - first, 0) : 0;
  from += (row0 + r) * row_stride + (col0 + c);
  to += r * STRIDE + c;
#pragma unroll
  for (int pass = 0; pass < ROWS; pass += PASS) {
    if (ROWS % PASS == 0 || r + pass < ROWS) copy<VEC>(to + pass * STRIDE, from, (unsigned)(row + pass) < rows);
    from += PASS * row_stride;
  }
}

__device__ __forceinline__ Block locate(const Params& a, int index) {
  Block k;
  int heads = a.B * a.H, tiles = (a.Nq + BM - 1) / BM;
  // Neighbours in launch order are heads, so that KV is shared through L2; late queries, the long ones, come first.
  int head = index % heads, at = tiles - 1 - index / heads;
  k.b = head / a.H, k.h = head % a.H, k.hk = k.h / (a.H / a.Hkv), k.q0 = at * BM;
  k.lo = 0, k.hi = a.Nk;
  if (a.kv_range) k.lo = max(0, a.kv_range[2 * k.b]), k.hi = min(a.Nk, a.kv_range[2 * k.b + 1]);
  k.below = a.window ? a.window : FAR;
  k.above = a.causal ? 1 : k.below;
  int first = a.q_start + k.q0, last = a.q_start + min(k.q0 + BM, a.Nq) - 1;
  int lo = max(k.lo, first - k.below + 1), hi = min(k.hi, last + k.above);
  k.full_lo = max(k.lo, last - k.below + 1), k.full_hi = min(k.hi, first + k.above);
  k.tile = lo / BN, k.tile_end = max((hi + BN - 1) / BN, k.tile + 1);  // where nobody sees a key, one masked tile
  return k;
}

// Where the stream of chunks stands: a tile is K_STEPS chunks of K, then V_STEPS chunks of V.
struct Cursor {
  int tile, step, slot;

  __device__ __forceinline__ void advance() {
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (++step == STEPS) step = 0, ++tile;
  }
};

// Starts the copies of the chunk at the cursor and moves it on.
__device__ __forceinline__ void issue(const Params& a, const Block& k, float* shared, Cursor& at) {
  if (at.tile < k.tile_end) {
    float* slot = shared + RING + at.slot * SLOT;
    if (at.step < K_STEPS) {
      const float* keys = a.k + k.b * a.k_b + k.hk * a.k_h;
      load_rows<BN, DC, KS>(slot, keys, a.k_n, at.tile * BN, k.lo, k.hi, at.step * DC, a.d);
      if (!Q_RESIDENT)
        load_rows<BM, DC, QS>(slot + BN * KS, a.q + k.b * a.q_b + k.h * a.q_h, a.q_n, k.q0, 0, a.Nq, at.step * DC, a.d);
    } else {
      const float* values = a.v + k.b * a.v_b + k.hk * a.v_h;
      load_rows<NC, D, D>(slot, values, a.v_n, at.tile * BN + (at.step - K_STEPS) * NC, k.lo, k.hi, 0, a.d);
    }
  }
  copies_commit();
  at.advance();
}

// Waits for the next chunk and starts the copies of the one that takes the slot just freed. Returns the chunk.
__device__ __forceinline__ const float* next_chunk(const Params& a, const Block& k, float* shared, Cursor& ahead, int& slot) {
  copies_wait<STAGES - 2>();
  __syncthreads();  // the chunk has arrived, and everyone is done with the slot that is filled next
  issue(a, k, shared, ahead);
  const float* chunk = shared + RING + slot * SLOT;
  slot = slot + 1 == STAGES ? 0 : slot + 1;
  return chunk;
}

// S += Q[8 rows, DC] · K[TN keys, DC]ᵀ; q and keys point at the thread's first row and key.
template <bool GUARD>
__device__ __forceinline__ void multiply_qk(float (&S)[TM][TN], const float* q, const float* keys) {
#pragma unroll(GUARD ? 1 : ELSA_UNROLL_K)
  for (int c = 0; c < DC; c += 4) {
    float4 kv[TN];
#pragma unroll
    for (int j = 0; j < TN; ++j) kv[j] = *(const float4*)(keys + 16 * j * KS + c);
#pragma unroll
    for (int i = 0; i < TM; ++i) {
      float4 qv = *(const float4*)(q + 2 * i * QS + c);
#pragma unroll
      for (int j = 0; j < TN; ++j) S[i][j] = fmaf(qv.x, kv[j].x, S[i][j]);
#pragma unroll
      for (int j = 0; j < TN; ++j) S[i][j] = fmaf(qv.y, kv[j].y, S[i][j]);
#pragma unroll
      for (int j = 0; j < TN; ++j) S[i][j] = fmaf(qv.z, kv[j].z, S[i][j]);
#pragma unroll
      for (int j = 0; j < TN; ++j) S[i][j] = fmaf(qv.w, kv[j].w, S[i][j]);
    }
  }
}

// A masked key carries the probability −0, so that the guarded product can tell it from one that underflowed.
template <bool GUARD>
__device__ __forceinline__ float add_product(float p, float v, float sum) {
  if (!GUARD || finite(v)) return fmaf(p, v, sum);
  return __float_as_uint(p) == 0x80000000u ? sum : sum + v;
}

// Column of the thread's output j: groups of four, lane_col·4 + 64·g, then a pair where D % 64 = 32.
__device__ __forceinline__ int column(int lane_col, int j) {
  return j < D / 64 * 4 ? 64 * (j / 4) + 4 * lane_col + j % 4 : D - 32 + 2 * lane_col + j % 2;
}

__device__ __forceinline__ void read_columns(float (&w)[TO], const float* row, int lane_col) {
#pragma unroll
  for (int j = 0; j + 4 <= TO; j += 4) {
    float4 x = *(const float4*)(row + column(lane_col, j));
    w[j] = x.x, w[j + 1] = x.y, w[j + 2] = x.z, w[j + 3] = x.w;
  }
  if (D % 64) {
    float2 x = *(const float2*)(row + column(lane_col, TO - 2));
    w[TO - 2] = x.x, w[TO - 1] = x.y;
  }
}

// sum[8][TO] += P[8 rows, NC keys] · V[NC keys, D] for the keys from n0 on; p points at the thread's first row.
template <bool GUARD>
__device__ __forceinline__ void multiply_pv(float (&sum)[TM][TO], const float* p, int n0, int swap, const float* values,
                                            int lane_col) {
#pragma unroll(GUARD ? 1 : ELSA_UNROLL_V)
  for (int n = 0; n < NC; n += 4) {
    float4 pv[TM];
#pragma unroll
    for (int i = 0; i < TM; ++i) pv[i] = *(const float4*)(p + 2 * i * BN + ((n0 + n) ^ swap));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float w[TO];
      read_columns(w, values + (n + e) * D, lane_col);
#pragma unroll
      for (int i = 0; i < TM; ++i) {
        float x = e == 0 ? pv[i].x : e == 1 ? pv[i].y : e == 2 ? pv[i].z : pv[i].w;
#pragma unroll
        for (int j = 0; j < TO; ++j) sum[i][j] = add_product<GUARD>(x, w[j], sum[i][j]);
      }
    }
  }
}

// What infinities and NaN of visible values reached stays as it is when the row's maximum moves.
template <bool GUARD>
__device__ __forceinline__ float rescaled(float sum, float factor) {
  return GUARD && !finite(sum) ? sum : sum * factor;
}

// −∞ − (−∞) is NaN: a row without visible keys subtracts 0 instead.
__device__ __forceinline__ float anchor(float m) { return m == neg_inf() ? 0.f : m; }

// Turns products q·k into natural logits: scale, softcap, ALiBi, bias.
__device__ __forceinline__ void make_logits(const Params& a, const Block& k, float (&S)[TM][TN], int row0, int key0) {
  float slope = a.alibi ? a.alibi[k.h] : 0.f;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    int row = k.q0 + row0 + 2 * i;
#pragma unroll
    for (int j = 0; j < TN; ++j) {
      int key = key0 + 16 * j;
      float x = S[i][j] * a.scale;
      if (a.softcap > 0.f) x = a.softcap * tanhf(x / a.softcap);
      if (a.alibi) x = fmaf(slope, (float)(key - a.q_start - row), x);
      if (a.bias && row < a.Nq && key < a.Nk)
        x += a.bias[k.b * a.bias_b + k.h * a.bias_h + row * a.bias_n + key * a.bias_k];
      S[i][j] = x;
    }
  }
}

__device__ __forceinline__ void mask(const Params& a, const Block& k, float (&S)[TM][TN], int row0, int key0) {
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    int position = a.q_start + k.q0 + row0 + 2 * i;
    int lo = max(k.lo, position - k.below + 1), hi = min(k.hi, position + k.above);
#pragma unroll
    for (int j = 0; j < TN; ++j)
      if (key0 + 16 * j < lo || key0 + 16 * j >= hi) S[i][j] = neg_inf();
  }
}

// Updates m (units of log2) and the lane's share of the sums l, writes P for the warp, and returns each row's
// rescaling factor in alpha. c: factor from S to log2 units, positive.
template <bool GUARD>
__device__ __forceinline__ void softmax(float (&S)[TM][TN], float c, float (&m)[TM], float (&l)[TM], float (&alpha)[TM],
                                        float* p, int lane_col, int swap) {
  float top[TM];
  bool higher = false;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    top[i] = S[i][0];
#pragma unroll
    for (int j = 1; j < TN; ++j) top[i] = fmaxf(top[i], S[i][j]);
    top[i] *= c;
    higher = higher || top[i] > m[i];
    alpha[i] = 1.f;
  }
  if (__any_sync(~0u, higher)) {  // rarely, after a row's first tiles
#pragma unroll
    for (int i = 0; i < TM; ++i) {
#pragma unroll
      for (int bit = 2; bit < 32; bit *= 2) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], bit));
      float m_new = fmaxf(m[i], top[i]);
      alpha[i] = exp2_fast(m[i] - anchor(m_new));
      m[i] = m_new;
    }
  }
  float* even = p + lane_col + swap;
  float* odd = p + lane_col - swap;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    float base = anchor(m[i]), sum = 0.f;
#pragma unroll
    for (int j = 0; j < TN; ++j) {
      float e = exp2_fast(fmaf(S[i][j], c, -base));
      sum += e;
      (j % 2 ? odd : even)[2 * i * BN + 16 * j] = GUARD && S[i][j] == neg_inf() ? -0.f : e;
    }
    l[i] = fmaf(l[i], alpha[i], sum);
  }
}

// Adds the thread's share of a row to what earlier flushes left in the output tensor, times beta, and stores it times
// factor. Returns whether every sum is finite.
template <bool GUARD>
__device__ __forceinline__ bool store_row(float* row, float (&O)[TO], float beta, float factor, bool first, int lane_col,
                                          int d) {
  bool good = true;
#pragma unroll
  for (int j = 0; j < TO; j += 2) {
    int c = column(lane_col, j);
    float x = O[j], y = O[j + 1];
    O[j] = 0.f, O[j + 1] = 0.f;
    if (VEC == 4) {
      if (c >= d) continue;  // d % 4 = 0: both columns exist or none does
      float2* at = (float2*)(row + c);
      if (!first) {
        float2 old = *at;
        x += rescaled<GUARD>(old.x, beta), y += rescaled<GUARD>(old.y, beta);
      }
      good = good && finite(x) && finite(y);
      *at = make_float2(x * factor, y * factor);
    } else {
      if (c < d) {
        if (!first) x += rescaled<GUARD>(row[c], beta);
        good = good && finite(x), row[c] = x * factor;
      }
      if (c + 1 < d) {
        if (!first) y += rescaled<GUARD>(row[c + 1], beta);
        good = good && finite(y), row[c + 1] = y * factor;
      }
    }
  }
  return good;
}

// Merges O and l into the output tensor and the shared (m, l) of the rows, and starts them anew; the last flush
// finishes the rows. Returns whether every sum is finite.
template <bool GUARD>
__device__ __forceinline__ bool flush(const Params& a, const Block& k, float* shared, float (&O)[TM][TO], float (&m)[TM],
                                      float (&l)[TM], int row0, int lane_col, bool first, bool last) {
  float *kept_m = shared + KEPT, *kept_l = kept_m + BM;
  bool good = true;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    int row = row0 + 2 * i;
    float sum = l[i], beta = 0.f, factor = 1.f;
#pragma unroll
    for (int bit = 2; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (!first) {
      beta = exp2_fast(kept_m[row] - anchor(m[i]));
      sum = fmaf(kept_l[row], beta, sum);
    }
    __syncwarp();
    if (lane_col == 0) kept_m[row] = m[i], kept_l[row] = sum;
    l[i] = 0.f;
    if (k.q0 + row >= a.Nq) continue;
    i64 at = ((i64)k.b * a.H + k.h) * a.Nq + k.q0 + row;
    if (last) {
      float top = m[i];
      if (a.sinks) {
        float sink = a.sinks[k.h] * LOG2E;
        top = fmaxf(top, sink);
        factor = exp2_fast(m[i] - anchor(top));
        sum = fmaf(sum, factor, exp2_fast(sink - anchor(top)));
      }
      if (a.m_out) {
        // S and W belong to the stored, rounded m: what its rounding lost goes into them.
        float natural = top * LN2;
        if (finite(top)) {
          float lost = exp2_fast((fmaf(top, LN2, -natural) + top * LN2_LOW) * LOG2E);
          sum *= lost, factor *= lost;
        }
        if (lane_col == 0) a.m_out[at] = sum != sum && top != -neg_inf() ? sum : natural, a.s_out[at] = sum;
      } else {
        factor = sum == 0.f ? 0.f : factor / sum;
      }
    }
    good &= store_row<GUARD>(a.out + at * a.d, O[i], beta, factor, first, lane_col, a.d);
  }
  return good;
}

// The whole work of a block; returns whether every sum of this thread is finite.
template <bool GUARD>
__device__ __forceinline__ bool run(const Params& a, const Block& k, float* shared) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lane_row = lane & 1, lane_col = lane >> 1;
  int row0 = 16 * warp + lane_row, swap = lane_row << 4;  // swapped halves keep two rows of P on distinct banks
  float* p = shared + PROBS + row0 * BN;
  float c = ELSA_LOGITS ? LOG2E : a.scale * LOG2E;
  float O[TM][TO], T[TM][TO], m[TM], l[TM], alpha[TM];
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    m[i] = neg_inf(), l[i] = 0.f;
#pragma unroll
    for (int j = 0; j < TO; ++j) O[i][j] = 0.f;
  }

  __syncthreads();
  if (Q_RESIDENT) load_rows<BM, D, QS>(shared, a.q + k.b * a.q_b + k.h * a.q_h, a.q_n, k.q0, 0, a.Nq, 0, a.d);
  Cursor ahead = {k.tile, 0, 0};
  for (int i = 0; i < STAGES - 1; ++i) issue(a, k, shared, ahead);

  int slot = 0;
  bool first = true, good = true;
#pragma unroll 1
  for (int tile = k.tile; tile < k.tile_end; ++tile) {
    float S[TM][TN];
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) S[i][j] = 0.f;
#pragma unroll 1
    for (int step = 0; step < K_STEPS; ++step) {
      const float* chunk = next_chunk(a, k, shared, ahead, slot);
      const float* q = Q_RESIDENT ? shared + step * DC : chunk + BN * KS;
      multiply_qk<GUARD>(S, q + row0 * QS, chunk + lane_col * KS);
    }
    int key0 = tile * BN + lane_col;
    if (ELSA_LOGITS) make_logits(a, k, S, row0, key0);
    if (tile * BN < k.full_lo || (tile + 1) * BN > k.full_hi) mask(a, k, S, row0, key0);
    softmax<GUARD>(S, c, m, l, alpha, p, lane_col, swap);
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TO; ++j) {
        if (TILE_SUMS) T[i][j] = 0.f;
        else O[i][j] = rescaled<GUARD>(O[i][j], alpha[i]);
      }
#pragma unroll 1
    for (int step = 0; step < V_STEPS; ++step) {
      const float* chunk = next_chunk(a, k, shared, ahead, slot);
      multiply_pv<GUARD>(TILE_SUMS ? T : O, p, step * NC, swap, chunk, lane_col);
    }
    if (TILE_SUMS)
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TO; ++j)
          O[i][j] = GUARD && !finite(O[i][j]) ? O[i][j] + T[i][j] : fmaf(O[i][j], alpha[i], T[i][j]);
    bool last = tile + 1 == k.tile_end;
    if (last || (tile + 1) % SUPER == 0) good = flush<GUARD>(a, k, shared, O, m, l, row0, lane_col, first, last), first = false;
  }
  return good;
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) attention_ieee(const Params a) {
  extern __shared__ __align__(16) float shared[];
  bool good = run<false>(a, locate(a, blockIdx.x), shared);
  bool redo = __syncthreads_or(!good);
  if (threadIdx.x == 0) a.redo[blockIdx.x] = redo;
}

// The blocks whose result is not finite, once more.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_ieee_guarded(const Params a) {
  extern __shared__ __align__(16) float shared[];
  for (int at = blockIdx.x; at < a.blocks; at += gridDim.x)
    if (a.redo[at]) run<true>(a, locate(a, at), shared);
}
