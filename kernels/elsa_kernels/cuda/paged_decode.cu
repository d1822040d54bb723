// Attention of up to 8 packed rows (queries × heads of a group) over a paged FP16 or BF16 KV with D = 128, in one launch.
// sm_80 and newer, compiled by NVRTC.
//
// Tensor cores multiply transposed: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·P, so that keys and channels fill the long side of
// mma.m16n8k16 and the rows its short one. K and V go from global memory straight into the registers that the products
// want, no shared memory between. K: a thread's 16 bytes are eight neighbours in D, and since a sum may be taken in any
// order they serve as they lie. V: pairs along the keys are put together from two rows' registers. So a warp has the
// next 8 KiB in flight whenever it computes, and needs nobody: warps meet once a chunk.
//
// A sequence's keys are cut into chunks of CHUNK, counted from key 0; of a chunk's tiles of 16 keys warp w takes every
// WARPS-th. The warps' states merge to the chunk's, up to FAN chunks' to a node's, nodes' to the sequence's, always in
// the order of positions. Who merges is whom an integer counter names last, or, in calls that would need much memory for
// chunks (`whole_nodes`), the block that has computed all chunks of the node; the sums are the same ones. Bits depend
// on the sequence alone.
//
// Needs: ELSA_BF16, ELSA_GROUP, ELSA_PAGE (a multiple of 16), ELSA_WARPS, ELSA_CHUNK, ELSA_MIN_BLOCKS.

constexpr int WARPS = ELSA_WARPS, CHUNK = ELSA_CHUNK, THREADS = 32 * WARPS, GROUP = ELSA_GROUP, PAGE = ELSA_PAGE;
constexpr int D = 128, ROWS = 8, TILE = 16, FAN = 32;
constexpr int WARM = 2;  // tiles a warp that are brought to the L2 cache ahead of their chunk
constexpr int PITCH = D + 4;  // of a row in shared memory
static_assert(CHUNK % (TILE * WARPS) == 0 && CHUNK / (TILE * WARPS) <= 32, "a lane has the page of each of its warp's tiles");
static_assert(PAGE % TILE == 0, "a tile lies on one page");

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

struct Params {
  const u16 *q, *k, *v;
  u16* out;
  float* lse;          // may be null, [T, H]
  const float* sinks;  // may be null, [H]
  const int *cu, *used, *table;
  // States [slots, ROWS], [slots, ROWS], [slots, ROWS, D]: of chunks (an item's, or FAN a block), from nodes0 on of nodes.
  float *state_m, *state_l, *state_w;
  int *node_counters, *counters;  // [slots]; [B, Hkv]. Zeros, left as zeros
  i64 q_token, q_head, k_block, k_place, k_head, v_block, v_place, v_head, table_row, out_token, out_head;  // strides
  int B, T, Hkv, table_width, causal, whole_nodes, nodes0;
  float scale;  // times log2(e)
};

// ---- what the machine offers ----
__device__ __forceinline__ uint4 stream(const u16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ void prefetch(const void* p) {  // 128 bytes
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ u32 pack(float first, float second) {  // first in the low half
  u32 d;
#if ELSA_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
#endif
  return d;
}

__device__ __forceinline__ float unpack(u16 bits) {
#if ELSA_BF16
  return __uint_as_float((u32)bits << 16);
#else
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
#endif
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if ELSA_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 transposed(u32 a) {  // 8 × 8 elements of a warp, a thread's pair in row lane / 4
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

__device__ __forceinline__ float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// ---- end of what the machine offers ----

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float anchor_of(float m) { return m == minus_infinity() ? 0.f : m; }

// A chunk of keys for one key head.
struct Chunk {
  int s, head, at;     // sequence, key head, chunk
  int item, last;      // the item of work it belongs to; the last chunk of that item
  int chunks;          // of the sequence
  int q0, rows;        // the sequence's first query, packed rows
  int keys, start;     // of the sequence; position of its first query
  int first_item;      // of the sequence, over all heads
};

struct Tile {
  uint4 k[4][2];  // d 32i + 8t … + 7 of the keys g, g + 8
  uint4 v[4][2];  // of the keys 2t, 2t + 1, 2t + 8, 2t + 9: d 8g … + 7, 64 + 8g … + 7
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Items of sequence s: chunks, or nodes of FAN chunks; 0 where the sequence is not of this launch.
__device__ __forceinline__ int items_of(const Params& p, int s) {
  const int q0 = p.cu[s], keys = p.used[s], rows = (p.cu[s + 1] - q0) * GROUP;
  const int items = max(divide_up(keys, p.whole_nodes ? CHUNK * FAN : CHUNK), 1);
  return rows > 0 && rows <= ROWS && q0 < p.T ? items : 0;
}

// Inclusive sums of the sequences' items. Returns the number of all, of one head.
__device__ int sum_items(const Params& p, int* ends, int* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int base = 0; base < p.B; base += THREADS) {
    const int s = base + threadIdx.x;
    int sum = s < p.B ? items_of(p, s) : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) room[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += room[w];
    if (s < p.B) ends[s] = before + sum;
    for (int w = 0; w < WARPS; w++) before += room[w];
    __syncthreads();
  }
  return before;
}

__device__ __forceinline__ Chunk first_chunk(const Params& p, const int* ends, int item) {
  Chunk c;
  const int unit = item / p.Hkv;
  c.item = item;
  c.head = item - unit * p.Hkv;
  int low = 0, high = p.B - 1;  // the first sequence that ends after the unit
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > unit) high = middle;
    else low = middle + 1;
  }
  c.s = low;
  c.first_item = low ? ends[low - 1] : 0;
  c.at = (unit - c.first_item) * (p.whole_nodes ? FAN : 1);
  c.q0 = p.cu[low];
  const int queries = p.cu[low + 1] - c.q0;
  c.keys = p.used[low];
  c.start = c.keys - queries;
  c.rows = min(queries, p.T - c.q0) * GROUP;
  c.chunks = max(divide_up(c.keys, CHUNK), 1);
  c.last = min(c.at + (p.whole_nodes ? FAN : 1), c.chunks) - 1;
  return c;
}

__device__ __forceinline__ Chunk following(Chunk c) {  // within an item
  c.at++;
  return c;
}

__device__ __forceinline__ void describe(Chunk& to, const Chunk& c, int lane) {
  if (lane == 0) to = c;
  __syncwarp();
}

// How many tiles of a chunk warp `warp` has.
__device__ __forceinline__ int tiles_of(const Chunk& c, int warp) {
  const int keys = min(c.keys - c.at * CHUNK, CHUNK) - TILE * warp;
  return keys > 0 ? divide_up(keys, TILE * WARPS) : 0;
}

// Lane i gets the page of the warp's tile i.
__device__ __forceinline__ int pages_of(const Params& p, const Chunk& c, int warp, int lane) {
  const int place = (c.at * CHUNK + TILE * (warp + WARPS * lane)) / PAGE;
  return lane < tiles_of(c, warp) && place < p.table_width ? p.table[c.s * p.table_row + place] : 0;
}

__device__ __forceinline__ void load_k(const Params& p, Tile& tile, int page, int key, int head, int g, int t) {
  const u16* from = p.k + page * p.k_block + (key % PAGE + g) * p.k_place + head * p.k_head + 8 * t;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    tile.k[i][0] = stream(from + 32 * i);
    tile.k[i][1] = stream(from + 8 * p.k_place + 32 * i);
  }
}

__device__ __forceinline__ void load_v(const Params& p, Tile& tile, int page, int key, int head, int g, int t) {
  const u16* from = p.v + page * p.v_block + (key % PAGE + 2 * t) * p.v_place + head * p.v_head + 8 * g;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u16* row = from + (i % 2 + i / 2 * 8) * p.v_place;
    tile.v[i][0] = stream(row);
    tile.v[i][1] = stream(row + 64);
  }
}

// Has the first of a chunk's tiles brought to the L2 cache, while the chunk before it is merged.
__device__ __forceinline__ void warm_up(const Params& p, const Chunk& c, int pages, int warp, int lane) {
  const int tiles = tiles_of(c, warp);
#pragma unroll
  for (int i = 0; i < WARM; i++) {
    const int page = __shfl_sync(~0u, pages, i);
    if (i >= tiles) break;
    const int place = (c.at * CHUNK + TILE * (warp + WARPS * i)) % PAGE + lane / 2, d = lane % 2 * 64;
    prefetch(p.k + page * p.k_block + place * p.k_place + c.head * p.k_head + d);
    prefetch(p.v + page * p.v_block + place * p.v_place + c.head * p.v_head + d);
  }
}

// A warp's state of rows 2t and 2t + 1: w[j] has d 8g + j (two rows), then d 64 + 8g + j. l: this lane's keys alone.
struct Rows {
  float m[2], l[2], w[8][4];
};

// Scaled products with rows 2t and 2t + 1: of key g (two rows), then of key g + 8.
__device__ __forceinline__ void products(const Tile& tile, const uint4* q, int lane, float scale, float (&s)[4]) {
  float a[4] = {0.f, 0.f, 0.f, 0.f}, b[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 f = q[32 * i + lane];
    mma(a, tile.k[i][0].x, tile.k[i][1].x, tile.k[i][0].y, tile.k[i][1].y, f.x, f.y);
    mma(b, tile.k[i][0].z, tile.k[i][1].z, tile.k[i][0].w, tile.k[i][1].w, f.z, f.w);
  }
#pragma unroll
  for (int c = 0; c < 4; c++) s[c] = (a[c] + b[c]) * scale;
}

// New maxima, and P in the fragments that the second product wants.
__device__ __forceinline__ void softmax(const float (&s)[4], Rows& rows, u32& low, u32& high) {
  float top[2], anchor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top[r] = fmaxf(s[r], s[r + 2]);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], d));
    top[r] = fmaxf(top[r], rows.m[r]);
    anchor[r] = anchor_of(top[r]);
  }
  if (__any_sync(~0u, top[0] != rows.m[0] || top[1] != rows.m[1])) {  // else the factors are 1
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float decay = exp_2(rows.m[r] - anchor[r]);
      rows.m[r] = top[r];
      rows.l[r] *= decay;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        rows.w[j][r] *= decay;
        rows.w[j][r + 2] *= decay;
      }
    }
  }
  float e[4];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    e[c] = exp_2(s[c] - anchor[c % 2]);
    rows.l[c % 2] += e[c];
  }
  low = transposed(pack(e[0], e[1]));
  high = transposed(pack(e[2], e[3]));
}

__device__ __forceinline__ u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

__device__ __forceinline__ void accumulate(const Tile& tile, u32 low, u32 high, Rows& rows) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; i++)  // d 8g + j and 64 + 8g + j, of the first two and of the last two keys
      a[i] = __byte_perm(word(tile.v[i / 2 * 2][i % 2], j / 2), word(tile.v[i / 2 * 2 + 1][i % 2], j / 2),
                         j % 2 ? 0x7632 : 0x5410);
    mma(rows.w[j], a[0], a[1], a[2], a[3], low, high);
  }
}

// Hides keys that do not exist or that a row does not see. Values of keys that do not exist are set to 0.
__device__ __forceinline__ void hide(const Params& p, const Chunk& c, int key, int g, int t, float (&s)[4], Tile& tile) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int mine = key + g + i / 2 * 8, row = 2 * t + i % 2;
    if (mine >= c.keys || (p.causal && mine > c.start + row / GROUP)) s[i] = minus_infinity();
    if (key + 2 * t + i % 2 + i / 2 * 8 >= c.keys)
#pragma unroll
      for (int h = 0; h < 2; h++) tile.v[i][h] = make_uint4(0, 0, 0, 0);
  }
}

// A warp's tiles of a chunk, the next one's loads under way while one is computed.
__device__ __forceinline__ void walk(const Params& p, const Chunk& c, int pages, const uint4* q, int warp, int lane,
                                     Rows& rows) {
  const int g = lane / 4, t = lane % 4, tiles = tiles_of(c, warp);
  const int plain = p.causal ? min(c.keys, c.start + 1) : c.keys;  // all rows see the keys before it
  if (tiles == 0) return;
  int key = c.at * CHUNK + TILE * warp;
  const int head = c.head;
  Tile tile;
  load_k(p, tile, __shfl_sync(~0u, pages, 0), key, head, g, t);
  load_v(p, tile, __shfl_sync(~0u, pages, 0), key, head, g, t);
  for (int i = 1; i <= tiles; i++) {
    const int page = __shfl_sync(~0u, pages, i);
    float s[4];
    products(tile, q, lane, p.scale, s);
    if (key + TILE > plain) hide(p, c, key, g, t, s, tile);
    key += TILE * WARPS;
    if (i < tiles) load_k(p, tile, page, key, head, g, t);
    u32 low, high;
    softmax(s, rows, low, high);
    accumulate(tile, low, high, rows);
    if (i < tiles) load_v(p, tile, page, key, head, g, t);
  }
}

struct Shared {
  uint4 q[2][4 * 32];                    // fragments of Q, of this item and of the next in turn
  alignas(16) float w[WARPS][ROWS][PITCH];  // the warps' states
  float m[WARPS][ROWS], l[WARPS][ROWS];
  Chunk chunk[2][WARPS];  // a warp's copy of this chunk's description and of the next one's, in turn
  int room[WARPS], answer;
};

__device__ __forceinline__ i64 place_of(const Chunk& c, int row, i64 token_stride, i64 head_stride) {
  return (c.q0 + row / GROUP) * token_stride + (c.head * GROUP + row % GROUP) * head_stride;
}

__device__ __forceinline__ void load_q(const Params& p, const Chunk& c, uint4* q) {
  for (int i = threadIdx.x; i < 4 * 32; i += THREADS) {
    const int row = i % 32 / 4, d = i / 32 * 32 + i % 4 * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < c.rows) v = *reinterpret_cast<const uint4*>(p.q + place_of(c, row, p.q_token, p.q_head) + d);
    q[i] = v;
  }
}

// Returns whether something in the warp's state is not finite.
__device__ __forceinline__ bool leave(const Rows& rows, Shared& sh, int warp, int g, int t) {
  float zero = 0.f;  // times anything finite
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float l = rows.l[r];
#pragma unroll
    for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(~0u, l, d);
    if (g == 0) {
      sh.m[warp][2 * t + r] = rows.m[r];
      sh.l[warp][2 * t + r] = l;
    }
    zero = fmaf(l, 0.f, zero);
#pragma unroll
    for (int j = 0; j < 8; j++) zero = fmaf(rows.w[j][r + 2], 0.f, fmaf(rows.w[j][r], 0.f, zero));
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      float4* to = reinterpret_cast<float4*>(&sh.w[warp][2 * t + r][8 * g + j]);
      to[0] = make_float4(rows.w[j][r], rows.w[j + 1][r], rows.w[j + 2][r], rows.w[j + 3][r]);
      to[16] = make_float4(rows.w[j][r + 2], rows.w[j + 1][r + 2], rows.w[j + 2][r + 2], rows.w[j + 3][r + 2]);
    }
  }
  return zero != 0.f;
}

// A row's state as a warp holds it: a lane has channels 4·lane … + 3.
struct State {
  float m, l;
  float4 w;
};

__device__ __forceinline__ float4 scaled(const float4& a, float f) {
  return make_float4(a.x * f, a.y * f, a.z * f, a.w * f);
}

__device__ __forceinline__ void add(float4& to, float f, const float4& a) {
  to = make_float4(fmaf(f, a.x, to.x), fmaf(f, a.y, to.y), fmaf(f, a.z, to.z), fmaf(f, a.w, to.w));
}

// The warps' states of a row as one.
__device__ __forceinline__ State gather(const Shared& sh, int row, int lane) {
  State x = {minus_infinity(), 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll
  for (int w = 0; w < WARPS; w++) x.m = fmaxf(x.m, sh.m[w][row]);
  const float anchor = anchor_of(x.m);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float weight = exp_2(sh.m[w][row] - anchor);
    x.l = fmaf(weight, sh.l[w][row], x.l);
    add(x.w, weight, *reinterpret_cast<const float4*>(&sh.w[w][row][4 * lane]));
  }
  return x;
}

// The chunk again, a row a warp: in a tile's product a hidden key's weight 0 meets its ∞ and NaN, here it is left out,
// as is a key with logit −∞. Leaves the state of every row as that of warp 0, the other warps' empty.
__device__ __noinline__ void careful(const Params& p, const Chunk& c, Shared& sh, int warp, int lane) {
  const int lo = c.at * CHUNK, end = min(c.keys, lo + CHUNK);
  for (int row = warp; row < c.rows; row += WARPS) {
    float q[D / 32], w[D / 32] = {}, m = minus_infinity(), l = 0.f;
    for (int i = 0; i < D / 32; i++) q[i] = unpack(p.q[place_of(c, row, p.q_token, p.q_head) + lane + 32 * i]);
    const int seen = p.causal ? min(end, c.start + row / GROUP + 1) : end;
    for (int key = lo; key < seen; key++) {
      const i64 page = p.table[c.s * p.table_row + key / PAGE];
      const u16* k = p.k + page * p.k_block + key % PAGE * p.k_place + c.head * p.k_head;
      const u16* v = p.v + page * p.v_block + key % PAGE * p.v_place + c.head * p.v_head;
      float s = 0.f;
      for (int i = 0; i < D / 32; i++) s = fmaf(q[i], unpack(k[lane + 32 * i]), s);
      for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
      s *= p.scale;
      if (s == minus_infinity()) continue;
      const float top = fmaxf(m, s), decay = exp_2(m - top), e = exp_2(s - top);
      m = top;
      l = fmaf(l, decay, e);
      for (int i = 0; i < D / 32; i++) w[i] = fmaf(w[i], decay, e * unpack(v[lane + 32 * i]));
    }
    for (int of = 0; of < WARPS; of++) {
      if (lane == 0) sh.m[of][row] = of ? minus_infinity() : m, sh.l[of][row] = of ? 0.f : l;
      for (int i = 0; i < D / 32; i++) sh.w[of][row][lane + 32 * i] = of ? 0.f : w[i];
    }
  }
}

// Joins the sinks, once, and writes a row of output and its logsumexp.
__device__ __forceinline__ void finish(const Params& p, const Chunk& c, int row, int lane, State x) {
  const int head = c.head * GROUP + row % GROUP;
  if (p.sinks) {
    const float sink = p.sinks[head] * 1.4426950408889634f, top = fmaxf(x.m, sink), anchor = anchor_of(top);
    const float decay = exp_2(x.m - anchor);
    x.l = fmaf(x.l, decay, exp_2(sink - anchor));
    x.w = scaled(x.w, decay);
    x.m = top;
  }
  const float l = x.l == 0.f ? 1.f : x.l;
  uint2* to = reinterpret_cast<uint2*>(p.out + place_of(c, row, p.out_token, p.out_head) + 4 * lane);
  *to = make_uint2(pack(x.w.x / l, x.w.y / l), pack(x.w.z / l, x.w.w / l));
  if (p.lse && lane == 0) {
    p.lse[(i64)(c.q0 + row / GROUP) * p.Hkv * GROUP + head] = (x.m + log2f(x.l)) * 0.6931471805599453f;
  }
}

__device__ __forceinline__ void put(const Params& p, i64 slot, int row, int lane, const State& x) {
  const i64 at = slot * ROWS + row;
  __stcg(reinterpret_cast<float4*>(p.state_w + at * D) + lane, x.w);
  if (lane == 0) {
    __stcg(p.state_m + at, x.m);
    __stcg(p.state_l + at, x.l);
  }
}

// A row's states in n slots, `step` apart, as one, 32 at a time: lane j has the weight of the j-th.
__device__ __forceinline__ State merge(const Params& p, i64 slot, i64 step, int n, int row, int lane) {
  constexpr int AT_ONCE = 8;
  State x = {minus_infinity(), 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
  for (int base = 0; base < n; base += 32) {
    const int count = min(n - base, 32);
    const i64 at = (slot + base * step) * ROWS + row, stride = step * ROWS;
    float m = minus_infinity(), l = 0.f;
    if (lane < count) {
      m = __ldcg(p.state_m + at + lane * stride);
      l = __ldcg(p.state_l + at + lane * stride);
    }
    float top = fmaxf(m, x.m);
#pragma unroll
    for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    const float anchor = anchor_of(top), decay = exp_2(x.m - anchor), weight = exp_2(m - anchor);
    l *= weight;
#pragma unroll
    for (int o = 16; o; o /= 2) l += __shfl_xor_sync(~0u, l, o);
    x.m = top;
    x.l = fmaf(x.l, decay, l);
    x.w = scaled(x.w, decay);
    const float4* from = reinterpret_cast<const float4*>(p.state_w + at * D) + lane;
    for (int j = 0; j < count; j += AT_ONCE) {
      float4 w[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        w[i] = j + i < count ? __ldcg(from + (j + i) * stride * (D / 4)) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) add(x.w, __shfl_sync(~0u, weight, j + i), w[i]);
    }
  }
  return x;
}

// Counts this block; true for the one that comes last of `all`, who then sees what the others have written.
__device__ __forceinline__ bool arrives_last(int* counter, int all, Shared& sh) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    sh.answer = atomicAdd(counter, 1) == all - 1;
    if (sh.answer) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return sh.answer;
}

// The warps' states of a chunk are in shared memory: takes their sum to its place, and merges what is complete by it.
__device__ __forceinline__ void deliver(const Params& p, const Chunk& c, int warp, int lane, Shared& sh) {
  const int node = c.at / FAN, nodes = divide_up(c.chunks, FAN);
  const i64 own = p.whole_nodes ? (i64)blockIdx.x * FAN : ((i64)c.first_item + node * FAN) * p.Hkv + c.head;
  const i64 step = p.whole_nodes ? 1 : p.Hkv;  // between the slots of a node's chunks
  for (int row = warp; row < c.rows; row += WARPS) {
    const State x = gather(sh, row, lane);
    if (c.chunks == 1) finish(p, c, row, lane, x);
    else put(p, own + c.at % FAN * step, row, lane, x);
  }
  if (c.chunks == 1 || (p.whole_nodes && c.at != c.last)) return;
  const int in_node = min(FAN, c.chunks - node * FAN);
  if (p.whole_nodes) {
    __threadfence_block();  // rows are a warp's own: no other has written what it reads
    __syncwarp();
  } else if (!arrives_last(p.node_counters + own, in_node, sh)) {
    return;
  }
  // Nodes of a sequence follow one another; sequences that begin within the same FAN items are told apart by s.
  const i64 first = p.nodes0 + (p.whole_nodes ? c.first_item : c.first_item / FAN + c.s) * (i64)p.Hkv + c.head;
  for (int row = warp; row < c.rows; row += WARPS) {
    const State x = merge(p, own, step, in_node, row, lane);
    if (nodes == 1) finish(p, c, row, lane, x);
    else put(p, first + (i64)node * p.Hkv, row, lane, x);
  }
  if (nodes == 1 || !arrives_last(p.counters + c.s * p.Hkv + c.head, nodes, sh)) return;
  for (int row = warp; row < c.rows; row += WARPS) {
    finish(p, c, row, lane, merge(p, first, p.Hkv, nodes, row, lane));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) paged_decode(const __grid_constant__ Params p) {
  __shared__ Shared sh;
  extern __shared__ int ends[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  if (p.B == 1 && !p.whole_nodes) {  // what the first loads of the only sequence wait for
    const int place = (int)blockIdx.x / p.Hkv * (CHUNK / PAGE) + lane;
    if (warp == 0 && place < p.table_width) prefetch(p.table + place);
  }
  const int items = sum_items(p, ends, sh.room) * p.Hkv;
  if ((int)blockIdx.x >= items) return;
  int turn = 0, q_turn = 0;
  describe(sh.chunk[0][warp], first_chunk(p, ends, blockIdx.x), lane);
  int pages = pages_of(p, sh.chunk[0][warp], warp, lane);
  load_q(p, sh.chunk[0][warp], sh.q[0]);
  __syncthreads();
  for (bool more = true; more; turn ^= 1) {
    const Chunk& now = sh.chunk[turn][warp];
    Chunk& next = sh.chunk[turn ^ 1][warp];
    more = now.at < now.last || now.item + (int)gridDim.x < items;
    int next_pages = 0;
    if (more) {
      describe(next, now.at < now.last ? following(now) : first_chunk(p, ends, now.item + gridDim.x), lane);
      next_pages = pages_of(p, next, warp, lane);
    }
    Rows rows = {{minus_infinity(), minus_infinity()}, {0.f, 0.f}, {}};
    walk(p, now, pages, sh.q[q_turn], warp, lane, rows);
    if (more) warm_up(p, next, next_pages, warp, lane);
    if (__syncthreads_or(leave(rows, sh, warp, g, t))) {
      careful(p, now, sh, warp, lane);
      __syncthreads();
    }
    if (more && next.item != now.item) {
      q_turn ^= 1;
      load_q(p, next, sh.q[q_turn]);
    }
    deliver(p, now, warp, lane, sh);
    __syncthreads();  // the warps' states have been read, and the next Q is there
    pages = next_pages;
  }
}
