// Exact attention in IEEE FP32: FFMA only, no tensor core, from sm_60 to sm_90 and newer. Compiled by NVRTC.
//
// A block of WARPS warps owns BM = 16·WARPS queries; a warp owns 16 of them, so the softmax never leaves the warp. In a
// warp the lanes form a 2 × 16 grid (bit 0: row, bits 1-4: column) and a thread owns 8 rows. Both products are sums of
// outer products of registers, one step of the inner dimension at a time, fed by 16-byte shared loads of which each
// half-warp hits 32 distinct banks:
//   S[8][BN/16] = Q·Kᵀ from the transposes of Q and K;  T[8][D/16] = P·V, P passing transposed through shared memory.
// The register file has two banks (even, odd) and reads one register of each a cycle, so a product with three operands
// needs one of them kept from the product before. Hence operands that lie in vectors along the rows and the columns,
// not along the inner dimension, where all would share a bank; it is worth an eighth of the speed (see add_outer).
// K and V stream through a ring of STAGES slots, a chunk of DC of K's D, then a chunk of NC of V's keys at a time.
//
// Sums are a tree in three levels, so that the error does not grow like a chain's: within a tile of BN keys, or with
// CHAINS within a chunk of NC, from zero (T), those into O for SUPER tiles, and O into the output tensor in global
// memory, which serves as the accumulator of the last level. Where T does not fit the registers (TILE_SUMS 0), tiles
// chain in O and SUPER is small. With CHAINS a chunk of DC is summed from zero too, before it is added to S; O gives its
// registers to S meanwhile and waits in the shared memory of P. Boundaries lie at absolute key positions and a fully
// masked tile is an exact identity: a row's bits depend on the keys it sees, on the sequence's first keys and on their
// number (see below).
//
// The launches: `channel_order` looks whether some channels of K are far larger than the others, which are summed last
// then; `attention_ieee`, or with CHAINS `attention_ieee_short` for short sequences, takes the heads where none are, and
// `attention_ieee_ordered` the others, where every copy has to ask where a channel lies. A key with logit −∞ must
// contribute nothing even where its value is ∞ or NaN, but 0·∞ is NaN: blocks whose result is finite are right as they
// are, `attention_ieee_guarded` runs the others once more with every product guarded. One kernel for all would be
// slower: the instruction cache is small, and registers are dealt out for all of a kernel.
//
// Needs: ELSA_HEAD (head dimension), ELSA_WARPS, ELSA_BN, ELSA_DC, ELSA_NC, ELSA_STAGES, ELSA_Q_RESIDENT, ELSA_VEC (4:
// rows of V are 16-byte aligned, or 1), ELSA_SUPER, ELSA_TILE_SUMS, ELSA_MIN_BLOCKS, ELSA_UNROLL_K, ELSA_ALONG_ROWS,
// ELSA_CHAINS, ELSA_SHORT_KEYS, ELSA_LOGITS (1: softcap, ALiBi, bias or a scale that is not positive). tiles.py chooses
// them.

constexpr int HEAD = ELSA_HEAD, D = (HEAD + 31) / 32 * 32;  // columns behind HEAD are zeros
constexpr int WARPS = ELSA_WARPS, BN = ELSA_BN, DC = ELSA_DC, NC = ELSA_NC;
constexpr int STAGES = ELSA_STAGES, VEC = ELSA_VEC, SUPER = ELSA_SUPER;
constexpr bool Q_RESIDENT = ELSA_Q_RESIDENT, TILE_SUMS = ELSA_TILE_SUMS, CHAINS = ELSA_CHAINS;
constexpr int THREADS = 32 * WARPS, BM = 16 * WARPS, TM = 8, TN = BN / 16, TO = D / 16;
constexpr int K_STEPS = D / DC, V_STEPS = BN / NC, STEPS = K_STEPS + V_STEPS;
// 4 floats of padding: a warp that stores 8 columns of 4 rows, transposed, hits 32 distinct banks.
constexpr int QS = BM + 4, KS = BN + 4;
constexpr int K_FLOATS = DC * KS + (Q_RESIDENT ? 0 : DC * QS), V_FLOATS = NC * D;
constexpr int SLOT = K_FLOATS > V_FLOATS ? K_FLOATS : V_FLOATS;
constexpr int RING = Q_RESIDENT ? D * QS : 0, PROBS = RING + STAGES * SLOT, KEPT = PROBS + BM * BN;
// Keys by which channels are judged, and the exponents by which one has to stand out (see channel_order).
constexpr int SAMPLE = 32, OUTLIER = 3;
// With CHAINS, sequences of so few keys are summed in shorter ones: the errors of chains are all there is where tiles are
// few. They cost 3 %.
constexpr int SHORT = 32, SHORT_KEYS = ELSA_SHORT_KEYS;
static_assert(D <= 256 && D % DC == 0 && DC % 8 == 0, "head dimension");
static_assert(BN % 64 == 0 && BN % NC == 0 && NC % 16 == 0, "keys per tile");
static_assert(!CHAINS || (TILE_SUMS && D % 64 == 0 && BN >= D), "O waits where P will be");
static_assert(!CHAINS || (DC == NC && DC % SHORT == 0), "a chunk is a long chain, or some short ones");
static_assert(DC % (4 * ELSA_UNROLL_K) == 0, "steps of a product");
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
  int* order;                                         // of each key head's channels; see channel_order
  int B, H, Hkv, Nq, Nk, q_start, causal, window;  // window 0: none
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

// machine: begin
__device__ __forceinline__ float exp_2(float x) {  // 2 ulp; exact 0 for −∞, NaN for NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// machine: end

__device__ __forceinline__ float neg_inf() { return __int_as_float(0xff800000); }

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Copies WIDTH floats from global to shared memory, or writes zeros; asynchronously where the hardware can.
template <int WIDTH>
__device__ __forceinline__ void copy(float* to, const float* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  int bytes = valid ? 4 * WIDTH : 0;  // what is not read is zero-filled
  if (WIDTH == 4)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
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

// Where a kernel starts before the one before it has ended: waits for what that one writes.
__device__ __forceinline__ void predecessor_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
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

// Fills to[ROWS][D] with rows [row0, row0 + ROWS) of V; zeros outside [first, end) × [0, HEAD).
template <int ROWS>
__device__ __forceinline__ void load_rows(float* to, const float* from, i64 row_stride, int row0, int first, int end) {
  constexpr int PER_ROW = D / VEC, LANES = power_of_two(PER_ROW), PASS = THREADS / LANES;
  unsigned thread = recomputed(threadIdx.x);
  int r = thread / LANES, c = thread % LANES * VEC;
  if (PER_ROW < LANES && c >= D) return;
  int row = row0 + r - first;
  unsigned rows = HEAD == D || c < HEAD ? max(end - first, 0) : 0;
  from += (row0 + r) * row_stride + c;
  to += r * D + c;
#pragma unroll
  for (int pass = 0; pass < ROWS; pass += PASS) {
    if (ROWS % PASS == 0 || r + pass < ROWS) copy<VEC>(to + pass * D, from, (unsigned)(row + pass) < rows);
    from += PASS * row_stride;
  }
}

// Fills to[DEPTH][STRIDE] with columns [col0, col0 + DEPTH) of rows [row0, row0 + ROWS) of Q or K, transposed; zeros
// outside [first, end) × [0, HEAD). A warp copies 8 columns of 4 rows: whole sectors there, distinct banks here.
// With ORDERED, column c is the order[c]-th of Q or K; where Q streams too, registers are too few to hold which.
template <bool ORDERED, int ROWS, int DEPTH, int STRIDE>
__device__ __forceinline__ void load_transposed(float* to, const float* from, i64 row_stride, int row0, int first,
                                                int end, int col0, const int* order) {
  constexpr int PASS = THREADS / 8;
  unsigned thread = recomputed(threadIdx.x);
  int r = thread / 8, c = thread % 8, channel[DEPTH / 8];
  from += (row0 + r) * row_stride;
  if (!ORDERED) from += col0 + c;
  to += c * STRIDE + r;
#pragma unroll
  for (int k = 0; k < DEPTH; k += 8) channel[k / 8] = ORDERED && Q_RESIDENT ? order[col0 + c + k] : k;
#pragma unroll
  for (int pass = 0; pass < ROWS; pass += PASS) {
    int row = row0 + r + pass;
    bool valid = row >= first && row < end;
    if (ROWS % PASS == 0 || r + pass < ROWS)
#pragma unroll
      for (int k = 0; k < DEPTH; k += 8) {
        int at = ORDERED && !Q_RESIDENT ? order[col0 + c + k] : channel[k / 8];
        copy<1>(to + k * STRIDE + pass, from + at, valid && (HEAD == D || col0 + c + k < HEAD));
      }
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

// Of one key head: D channels in the order in which a logit's products are summed, then whether any has moved.
__device__ __forceinline__ int* order_of(const Params& a, int b, int hk) {
  return a.order + (b * a.Hkv + hk) * (D + 1);
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
template <bool ORDERED>
__device__ __forceinline__ void issue(const Params& a, const Block& k, float* shared, Cursor& at) {
  if (at.tile < k.tile_end) {
    float* slot = shared + RING + at.slot * SLOT;
    if (at.step < K_STEPS) {
      const int* order = order_of(a, k.b, k.hk);
      const float* keys = a.k + k.b * a.k_b + k.hk * a.k_h;
      load_transposed<ORDERED, BN, DC, KS>(slot, keys, a.k_n, at.tile * BN, k.lo, k.hi, at.step * DC, order);
      if (!Q_RESIDENT)
        load_transposed<ORDERED, BM, DC, QS>(slot + DC * KS, a.q + k.b * a.q_b + k.h * a.q_h, a.q_n, k.q0, 0, a.Nq,
                                             at.step * DC, order);
    } else {
      const float* values = a.v + k.b * a.v_b + k.hk * a.v_h;
      load_rows<NC>(slot, values, a.v_n, at.tile * BN + (at.step - K_STEPS) * NC, k.lo, k.hi);
    }
  }
  copies_commit();
  at.advance();
}

// Waits for the next chunk and starts the copies of the one that takes the slot just freed. Returns the chunk.
template <bool ORDERED>
__device__ __forceinline__ const float* next_chunk(const Params& a, const Block& k, float* shared, Cursor& ahead,
                                                   int& slot) {
  copies_wait<STAGES - 2>();
  __syncthreads();  // the chunk has arrived, and everyone is done with the slot that is filled next
  issue<ORDERED>(a, k, shared, ahead);
  const float* chunk = shared + RING + slot * SLOT;
  slot = slot + 1 == STAGES ? 0 : slot + 1;
  return chunk;
}

template <int N>
__device__ __forceinline__ void read(float (&to)[N], const float* from, int i) {
  float4 x = *(const float4*)from;
  to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
}

// A masked key carries the probability −0, so that the guarded product can tell it from one that underflowed.
template <bool GUARD>
__device__ __forceinline__ float add_product(float p, float v, float sum) {
  if (!GUARD || finite(v)) return fmaf(p, v, sum);
  return __float_as_uint(p) == 0x80000000u ? sum : sum + v;
}

// sum[i][j] += x[i]·y[j]. The register file reads one even and one odd register a cycle, and a factor kept from the
// product before costs no read: going to and fro over the rows, or over the columns, every product shares a factor
// with the one before.
template <bool GUARD, bool ALONG_ROWS, int N>
__device__ __forceinline__ void add_outer(float (&sum)[TM][N], const float (&x)[TM], const float (&y)[N]) {
  constexpr int OUTER = ALONG_ROWS ? TM : N, INNER = ALONG_ROWS ? N : TM;
#pragma unroll
  for (int outer = 0; outer < OUTER; ++outer)
#pragma unroll
    for (int step = 0; step < INNER; ++step) {
      int inner = outer % 2 ? INNER - 1 - step : step;
      int i = ALONG_ROWS ? outer : inner, j = ALONG_ROWS ? inner : outer;
      sum[i][j] = add_product<GUARD>(x[i], y[j], sum[i][j]);
    }
}

__device__ __forceinline__ void read_qk(float (&x)[TM], float (&y)[TN], const float* q, const float* keys) {
#pragma unroll
  for (int i = 0; i < TM; i += 4) read(x, q + 2 * i, i);
#pragma unroll
  for (int j = 0; j < TN; j += 4) read(y, keys + 16 * j, j);
}

// S += Q[8 rows, depth]·K[TN keys, depth]ᵀ from their transposes; q and keys point at the thread's first row and key,
// and move on by `depth`. Operands are read one step ahead; what a chunk's last step reads lies behind it, in shared
// memory, and is not used.
template <bool GUARD>
__device__ __forceinline__ void multiply_qk(float (&S)[TM][TN], const float*& q, const float*& keys, int depth) {
  constexpr int UNROLL = GUARD ? 4 : 4 * ELSA_UNROLL_K;
  float x[2][TM], y[2][TN];
  read_qk(x[0], y[0], q, keys);
#pragma unroll 1
  for (int c = 0; c < depth; c += UNROLL) {
#pragma unroll
    for (int e = 0; e < UNROLL; ++e) {
      read_qk(x[(e + 1) % 2], y[(e + 1) % 2], q + (e + 1) * QS, keys + (e + 1) * KS);
      add_outer<false, false>(S, x[e % 2], y[e % 2]);
    }
    q += UNROLL * QS, keys += UNROLL * KS;
  }
}

// Column of the thread's output j: groups of four, lane_col·4 + 64·g, then a pair where D % 64 = 32.
__device__ __forceinline__ int column(int lane_col, int j) {
  return j < D / 64 * 4 ? 64 * (j / 4) + 4 * lane_col + j % 4 : D - 32 + 2 * lane_col + j % 2;
}

// Where rows 4·quarter … 4·quarter + 3 of key n lie in a warp's transposed P: the swizzle spreads the warp's stores.
__device__ __forceinline__ int place(int n, int quarter) { return 16 * n + 4 * (quarter ^ (n / 4 % 4)); }

__device__ __forceinline__ void read_pv(float (&x)[TM], float (&y)[TO], const float* upper, const float* lower,
                                        const float* values, int lane_col) {
  read(x, upper, 0), read(x, lower, 4);
#pragma unroll
  for (int j = 0; j + 4 <= TO; j += 4) read(y, values + column(lane_col, j), j);
  if (D % 64) {
    float2 last = *(const float2*)(values + column(lane_col, TO - 2));
    y[TO - 2] = last.x, y[TO - 1] = last.y;
  }
}

// sum[8][TO] += P[8 rows, n keys]·V[n keys, D]; p points at the first key in the warp's P. Reads ahead too.
// The swizzle of a lane's quarters repeats every 16 keys: two pointers, and the rest is in the instructions.
template <bool GUARD>
__device__ __forceinline__ void multiply_pv(float (&sum)[TM][TO], const float* p, int lane_row, const float* values,
                                            int lane_col, int keys) {
  float x[2][TM], y[2][TO];
  const float *even = p + place(0, lane_row), *odd = p + place(4, lane_row) - 64;  // of groups of four keys
  read_pv(x[0], y[0], even, even + 8, values, lane_col);
#pragma unroll 1
  for (int n = 0; n < keys; n += 16) {
#pragma unroll(GUARD ? 4 : 16)
    for (int e = 0; e < 16; ++e) {
      const int next = e + 1, group = next / 4 % 4, upper = group < 2 ? 0 : 8;
      const float* from = (group % 2 ? odd : even) + 16 * next;
      read_pv(x[next % 2], y[next % 2], from + upper, from + 8 - upper, values + next * D, lane_col);
      add_outer<GUARD, ELSA_ALONG_ROWS>(sum, x[e % 2], y[e % 2]);
    }
    even += 256, odd += 256, values += 16 * D;
  }
}

// What infinities and NaN of visible values reached stays as it is when the row's maximum moves.
template <bool GUARD>
__device__ __forceinline__ float rescaled(float sum, float factor) {
  return GUARD && !finite(sum) ? sum : sum * factor;
}

// old·factor + added, under the same rule.
template <bool GUARD>
__device__ __forceinline__ float merged(float old, float factor, float added) {
  return GUARD && !finite(old) ? old + added : fmaf(old, factor, added);
}

template <int N>
__device__ __forceinline__ void clear(float (&sum)[TM][N]) {
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) sum[i][j] = 0.f;
}

template <int N>
__device__ __forceinline__ void add(float (&sum)[TM][N], const float (&part)[TM][N]) {
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) sum[i][j] += part[i][j];
}

// O to the shared memory of the warp's P, which is free while S is computed: every lane has places of its own.
__device__ __forceinline__ void park(float* p, const float (&O)[TM][TO], int lane) {
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < TO; j += 4)
      *(float4*)(p + 128 * (TO / 4 * i + j / 4) + 4 * lane) = make_float4(O[i][j], O[i][j + 1], O[i][j + 2], O[i][j + 3]);
}

__device__ __forceinline__ void unpark(float (&O)[TM][TO], const float* p, int lane) {
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < TO; j += 4) read(O[i], p + 128 * (TO / 4 * i + j / 4) + 4 * lane, j);
}

template <bool GUARD>
__device__ __forceinline__ void rescale(float (&O)[TM][TO], const float (&alpha)[TM]) {
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < TO; ++j) O[i][j] = rescaled<GUARD>(O[i][j], alpha[i]);
}

// O ← O·alpha + T
template <bool GUARD>
__device__ __forceinline__ void merge(float (&O)[TM][TO], const float (&T)[TM][TO], const float (&alpha)[TM]) {
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < TO; ++j) O[i][j] = merged<GUARD>(O[i][j], alpha[i], T[i][j]);
}

// −∞ − (−∞) is NaN: a row without visible keys subtracts 0 instead.
__device__ __forceinline__ float anchor(float m) { return m == neg_inf() ? 0.f : m; }

// The thread's row i within the block, counted from its first, and its key j within the tile.
__device__ __forceinline__ int row_at(int i) { return 8 * (i / 4) + i % 4; }
__device__ __forceinline__ int key_at(int j) { return 64 * (j / 4) + j % 4; }

// Turns products q·k into natural logits: scale, softcap, ALiBi, bias.
__device__ __forceinline__ void make_logits(const Params& a, const Block& k, float (&S)[TM][TN], int row0, int key0) {
  float slope = a.alibi ? a.alibi[k.h] : 0.f;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    int row = k.q0 + row0 + row_at(i);
#pragma unroll
    for (int j = 0; j < TN; ++j) {
      int key = key0 + key_at(j);
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
    int position = a.q_start + k.q0 + row0 + row_at(i);
    int lo = max(k.lo, position - k.below + 1), hi = min(k.hi, position + k.above);
#pragma unroll
    for (int j = 0; j < TN; ++j)
      if (key0 + key_at(j) < lo || key0 + key_at(j) >= hi) S[i][j] = neg_inf();
  }
}

// Updates m (units of log2) and the lane's share of the sums l, writes P for the warp, and returns each row's
// rescaling factor in alpha. c: factor from S to log2 units, positive.
template <bool GUARD>
__device__ __forceinline__ void softmax(float (&S)[TM][TN], float c, float (&m)[TM], float (&l)[TM], float (&alpha)[TM],
                                        float* p, int lane_row, int lane_col) {
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
      alpha[i] = exp_2(m[i] - anchor(m_new));
      m[i] = m_new;
    }
  }
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    float base = anchor(m[i]), sum = 0.f;
#pragma unroll
    for (int j = 0; j < TN; ++j) {
      float e = exp_2(fmaf(S[i][j], c, -base));
      sum += e;
      S[i][j] = GUARD && S[i][j] == neg_inf() ? -0.f : e;
    }
    l[i] = fmaf(l[i], alpha[i], sum);
  }
#pragma unroll
  for (int i = 0; i < TM; i += 4)
#pragma unroll
    for (int j = 0; j < TN; ++j)
      *(float4*)(p + place(4 * lane_col + key_at(j), lane_row + i / 2)) =
          make_float4(S[i][j], S[i + 1][j], S[i + 2][j], S[i + 3][j]);
}

// Adds the thread's share of a row to what earlier flushes left in the output tensor, times beta, and stores it times
// factor. Returns whether every sum is finite.
template <bool GUARD>
__device__ __forceinline__ bool store_row(float* row, float (&O)[TO], float beta, float factor, bool first,
                                          int lane_col) {
  bool good = true;
#pragma unroll
  for (int j = 0; j < TO; j += 2) {
    int c = column(lane_col, j);
    float x = O[j], y = O[j + 1];
    O[j] = 0.f, O[j + 1] = 0.f;
    if (HEAD % 4 == 0) {
      if (c >= HEAD) continue;  // both columns exist or none does
      float2* at = (float2*)(row + c);
      if (!first) {
        float2 old = *at;
        x = merged<GUARD>(old.x, beta, x), y = merged<GUARD>(old.y, beta, y);
      }
      good = good && finite(x) && finite(y);
      *at = make_float2(x * factor, y * factor);
    } else {
      if (c < HEAD) {
        if (!first) x = merged<GUARD>(row[c], beta, x);
        good = good && finite(x), row[c] = x * factor;
      }
      if (c + 1 < HEAD) {
        if (!first) y = merged<GUARD>(row[c + 1], beta, y);
        good = good && finite(y), row[c + 1] = y * factor;
      }
    }
  }
  return good;
}

// Merges O and l into the output tensor and the shared (m, l) of the rows, and starts them anew; the last flush
// finishes the rows. Returns whether every sum is finite.
template <bool GUARD>
__device__ __forceinline__ bool flush(const Params& a, const Block& k, float* shared, float (&O)[TM][TO],
                                      float (&m)[TM], float (&l)[TM], int row0, int lane_col, bool first, bool last) {
  float *kept_m = shared + KEPT, *kept_l = kept_m + BM;
  bool good = true;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    int row = row0 + row_at(i);
    float sum = l[i], beta = 0.f, factor = 1.f;
#pragma unroll
    for (int bit = 2; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (!first) {
      beta = exp_2(kept_m[row] - anchor(m[i]));
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
        factor = exp_2(m[i] - anchor(top));
        sum = fmaf(sum, factor, exp_2(sink - anchor(top)));
      }
      if (a.m_out) {
        // S and W belong to the stored, rounded m: what its rounding lost goes into them.
        float natural = top * LN2;
        if (finite(top)) {
          float lost = exp_2((fmaf(top, LN2, -natural) + top * LN2_LOW) * LOG2E);
          sum *= lost, factor *= lost;
        }
        if (lane_col == 0) a.m_out[at] = sum != sum && top != -neg_inf() ? sum : natural, a.s_out[at] = sum;
      } else {
        factor = sum == 0.f ? 0.f : factor / sum;
      }
    }
    good &= store_row<GUARD>(a.out + at * HEAD, O[i], beta, factor, first, lane_col);
  }
  return good;
}

// Products of a chain, for the number of keys that the block's sequence has.
__device__ __forceinline__ int chain_of(const Block& k) { return k.hi - k.lo <= SHORT_KEYS ? SHORT : DC; }

// The whole work of a block; returns whether every sum of this thread is finite. CHAIN: what chain_of says of it, or 0.
template <bool GUARD, bool ORDERED, int CHAIN>
__device__ __forceinline__ bool run(const Params& a, const Block& k, float* shared) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lane_row = lane & 1, lane_col = lane >> 1;
  int row0 = 16 * warp + 4 * lane_row;
  float* p = shared + PROBS + 16 * warp * BN;
  float c = ELSA_LOGITS ? LOG2E : a.scale * LOG2E;
  float m[TM], l[TM], alpha[TM];
  float O[TM][TO], T[TM][TO];
#pragma unroll
  for (int i = 0; i < TM; ++i) m[i] = neg_inf(), l[i] = 0.f;
  clear(O);

  __syncthreads();
  if (Q_RESIDENT)
    load_transposed<ORDERED, BM, D, QS>(shared, a.q + k.b * a.q_b + k.h * a.q_h, a.q_n, k.q0, 0, a.Nq, 0,
                                        order_of(a, k.b, k.hk));
  Cursor ahead = {k.tile, 0, 0};
  for (int i = 0; i < STAGES - 1; ++i) issue<ORDERED>(a, k, shared, ahead);

  int slot = 0, chain = CHAIN ? CHAIN : chain_of(k);
  bool first = true, good = true;
#pragma unroll 1
  for (int tile = k.tile; tile < k.tile_end; ++tile) {
    float S[TM][TN];
    if (CHAINS) __syncwarp(), park(p, O, lane);  // all lanes have read P
    clear(S);
#pragma unroll 1
    for (int step = 0; step < K_STEPS; ++step) {
      const float* chunk = next_chunk<ORDERED>(a, k, shared, ahead, slot);
      const float* q = (Q_RESIDENT ? shared + step * DC * QS : chunk + DC * KS) + row0;
      const float* keys = chunk + 4 * lane_col;
      if (CHAINS) {
#pragma unroll 1
        for (int part = 0; part < DC; part += chain) {
          float C[TM][TN];
          clear(C);
          multiply_qk<GUARD>(C, q, keys, chain);
          add(S, C);
        }
      } else {
        multiply_qk<GUARD>(S, q, keys, DC);
      }
    }
    if (CHAINS) unpark(O, p, lane), __syncwarp();  // before any lane writes P
    int key0 = tile * BN + 4 * lane_col;
    if (ELSA_LOGITS) make_logits(a, k, S, row0, key0);
    if (tile * BN < k.full_lo || (tile + 1) * BN > k.full_hi) mask(a, k, S, row0, key0);
    softmax<GUARD>(S, c, m, l, alpha, p, lane_row, lane_col);
    if (TILE_SUMS && !CHAINS) clear(T);
    if (!TILE_SUMS) rescale<GUARD>(O, alpha);
#pragma unroll 1
    for (int step = 0; step < V_STEPS; ++step) {
      const float* chunk = next_chunk<ORDERED>(a, k, shared, ahead, slot);
      if (CHAINS) {
#pragma unroll 1
        for (int part = 0; part < NC; part += chain) {
          clear(T);
          multiply_pv<GUARD>(T, p + 16 * (step * NC + part), lane_row, chunk + part * D, lane_col, chain);
          merge<GUARD>(O, T, alpha);
#pragma unroll
          for (int i = 0; i < TM; ++i) alpha[i] = 1.f;
        }
      } else {
        multiply_pv<GUARD>(TILE_SUMS ? T : O, p + 16 * step * NC, lane_row, chunk, lane_col, NC);
      }
    }
    if (TILE_SUMS && !CHAINS) merge<GUARD>(O, T, alpha);
    bool last = tile + 1 == k.tile_end;
    if (last || (tile + 1) % SUPER == 0) {
      good = flush<GUARD>(a, k, shared, O, m, l, row0, lane_col, first, last);
      first = false;
    }
  }
  return good;
}

// Channels of K that are far larger than most are summed last: what a logit's sum takes up behind its large products
// rounds them again, and the order of a sum is free. The first SAMPLE keys of the sequence tell, and they alone: whoever
// the queries are and however they are cut up, a row keeps its bits. A channel stands out if the exponent of its
// largest finite value is by OUTLIER higher than that of half the channels or more; those go last by exponent, all
// others stay as they lie. One block a key head.
extern "C" __global__ void __launch_bounds__(THREADS) channel_order(const Params a) {
  extern __shared__ __align__(16) float shared[];
  int *largest = (int*)shared, *rank = largest + D;
  int b = blockIdx.x / a.Hkv, hk = blockIdx.x % a.Hkv, lo = 0, hi = a.Nk;
  if (a.kv_range) lo = max(0, a.kv_range[2 * b]), hi = min(a.Nk, a.kv_range[2 * b + 1]);
  const float* keys = a.k + b * a.k_b + hk * a.k_h + lo * a.k_n;
  int* order = order_of(a, b, hk);
  for (int c = threadIdx.x; c < D; c += THREADS) largest[c] = c < HEAD ? 0 : 256;
  __syncthreads();
  int bits[SAMPLE * D / THREADS];  // loaded together, or each maximum would wait for the one before
#pragma unroll
  for (int i = 0; i < SAMPLE * D / THREADS; ++i) {
    int j = (i * THREADS + threadIdx.x) / D, c = (i * THREADS + threadIdx.x) % D;
    bits[i] = c < HEAD && lo + j < hi ? __float_as_int(keys[j * a.k_n + c]) & 0x7fffffff : 0;
  }
#pragma unroll
  for (int i = 0; i < SAMPLE * D / THREADS; ++i)
    if (bits[i] < 0x7f800000) atomicMax(largest + (i * THREADS + threadIdx.x) % D, bits[i] >> 23);
  __syncthreads();
  bool moved = false;
  for (int c = threadIdx.x; c < D; c += THREADS) {
    int own = largest[c], lower = 0;
#pragma unroll 8
    for (int i = 0; i < HEAD; ++i) lower += largest[i] + OUTLIER <= own;
    bool high = c < HEAD && 2 * lower >= HEAD;
    rank[c] = c < HEAD && !high ? 0 : own;
    moved = moved || high;
  }
  moved = __syncthreads_or(moved);
  if (threadIdx.x == 0) order[D] = moved;
  for (int c = threadIdx.x; c < D; c += THREADS) {
    int own = rank[c], place = moved ? 0 : c;
    if (moved)
      for (int i = 0; i < D; ++i) place += rank[i] < own || (rank[i] == own && i < c);
    order[place] = c;
  }
}

template <bool ORDERED, int CHAIN>
__device__ __forceinline__ void attend(const Params& a, int index, float* shared) {
  Block k = locate(a, index);
  bool moved = order_of(a, k.b, k.hk)[D];
  if (moved != ORDERED || (CHAIN && CHAIN != chain_of(k))) return;
  bool good = run<false, ORDERED, CHAIN>(a, k, shared);
  bool redo = __syncthreads_or(!good);
  if (threadIdx.x == 0) a.redo[index] = redo;
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) attention_ieee(const Params a) {
  extern __shared__ __align__(16) float shared[];
  predecessor_wait();
  attend<false, CHAINS ? DC : 0>(a, blockIdx.x, shared);
}

#if ELSA_CHAINS
extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) attention_ieee_short(const Params a) {
  extern __shared__ __align__(16) float shared[];
  predecessor_wait();
  attend<false, SHORT>(a, blockIdx.x, shared);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) attention_ieee_ordered(const Params a) {
  extern __shared__ __align__(16) float shared[];
  for (int at = blockIdx.x; at < a.blocks; at += gridDim.x) attend<true, 0>(a, at, shared);
}

// The blocks whose result is not finite, once more.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_ieee_guarded(const Params a) {
  extern __shared__ __align__(16) float shared[];
  for (int at = blockIdx.x; at < a.blocks; at += gridDim.x)
    if (a.redo[at]) run<true, true, 0>(a, locate(a, at), shared);
}
