// Tiles of FP16 and BF16 keys and values, 16 at a time, for paged_decode.cu.
//
// Tensor cores multiply transposed: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·P, so that keys and channels fill the long side of
// mma.m16n8k16 and the rows its short one. K: a thread's 16 bytes are eight neighbours in D, and since a sum may be
// taken in any order they serve as fragments as they lie. V: pairs along the keys are put together from two keys'
// registers. In a group of four lanes, t is the lane, g the group.

// machine: begin
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
// machine: end

static_assert(TILE == 16 && ROWS == 8, "the sides of mma.m16n8k16");

struct Tile {
  uint4 k[4][2];  // d 32i + 8t … + 7 of the keys g, g + 8
  uint4 v[4][2];  // of the keys 2t, 2t + 1, 2t + 8, 2t + 9: d 8g … + 7, 64 + 8g … + 7
};

struct Query {
  uint4 fragment[4 * 32];
};

struct Scratch {};  // a warp's room while it walks: none

__device__ __forceinline__ void load_q(const Params& p, const Chunk& c, Query& q) {
  for (int i = threadIdx.x; i < 4 * 32; i += THREADS) {
    const int row = i % 32 / 4, d = i / 32 * 32 + i % 4 * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < c.rows) v = *reinterpret_cast<const uint4*>(p.q + place_of(c, row, p.q_token, p.q_head) + d);
    q.fragment[i] = v;
  }
}

__device__ __forceinline__ void load_k(const Params& p, Tile& tile, int page, int key, int head, int lane) {
  const int g = lane / 4, t = lane % 4;
  const element* from = p.k + page * p.k_block + (key % PAGE + g) * p.k_place + head * p.k_head + 8 * t;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    tile.k[i][0] = stream(from + 32 * i);
    tile.k[i][1] = stream(from + 8 * p.k_place + 32 * i);
  }
}

__device__ __forceinline__ void load_v(const Params& p, Tile& tile, int page, int key, int head, int lane) {
  const int g = lane / 4, t = lane % 4;
  const element* from = p.v + page * p.v_block + (key % PAGE + 2 * t) * p.v_place + head * p.v_head + 8 * g;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const element* row = from + (i % 2 + i / 2 * 8) * p.v_place;
    tile.v[i][0] = stream(row);
    tile.v[i][1] = stream(row + 64);
  }
}

// A warp's state of rows 2t and 2t + 1: w[j] has d 8g + j (two rows), then d 64 + 8g + j. l: this lane's keys alone.
struct Rows {
  float m[2], l[2], w[8][4];
};

// Scaled products with rows 2t and 2t + 1: of key g (two rows), then of key g + 8.
__device__ __forceinline__ void products(const Tile& tile, const Query& q, int lane, float scale, float (&s)[4]) {
  float a[4] = {0.f, 0.f, 0.f, 0.f}, b[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 f = q.fragment[32 * i + lane];
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
__device__ __forceinline__ void hide(const Params& p, const Chunk& c, int key, int lane, float (&s)[4], Tile& tile) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int mine = key + g + i / 2 * 8, row = 2 * t + i % 2;
    if (mine >= c.keys || (p.causal && mine > c.start + row / GROUP)) s[i] = minus_infinity();
    if (key + 2 * t + i % 2 + i / 2 * 8 >= c.keys)
#pragma unroll
      for (int h = 0; h < 2; h++) tile.v[i][h] = make_uint4(0, 0, 0, 0);
  }
}

// A warp's tiles of chunk c, the first of which is in `tile` or on its way; at the end the next chunk's first one is.
__device__ __forceinline__ void walk(const Params& p, const Chunk& c, const Ahead& here, const Chunk& next,
                                     const Ahead& ahead, const Query& q, int warp, int lane, Scratch&, Tile& tile,
                                     Rows& rows) {
  const int plain = p.causal ? min(c.keys, c.start + 1) : c.keys;  // all rows see the keys before it
  rows = {{minus_infinity(), minus_infinity()}, {0.f, 0.f}, {}};
  if (here.tiles == 0 && ahead.tiles) load_first(p, tile, next, ahead, warp, lane);
  int key = c.at * CHUNK + TILE * warp;
  for (int i = 1; i <= here.tiles; i++) {
    const bool inside = i < here.tiles, more = inside || ahead.tiles;
    const int page = __shfl_sync(~0u, inside ? here.pages : ahead.pages, inside ? i : 0);
    float s[4];
    products(tile, q, lane, p.scale, s);
    if (key + TILE > plain) hide(p, c, key, lane, s, tile);
    key = inside ? key + TILE * WARPS : next.at * CHUNK + TILE * warp;
    const int head = inside ? c.head : next.head;
    if (more) load_k(p, tile, page, key, head, lane);
    u32 low, high;
    softmax(s, rows, low, high);
    accumulate(tile, low, high, rows);
    if (more) load_v(p, tile, page, key, head, lane);
  }
}

// Returns whether something in the warp's state is not finite.
__device__ __forceinline__ bool leave(const Rows& rows, Left& to, int lane) {
  const int g = lane / 4, t = lane % 4;
  float zero = 0.f;  // times anything finite
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float l = rows.l[r];
#pragma unroll
    for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(~0u, l, d);
    if (g == 0) {
      to.m[2 * t + r] = rows.m[r];
      to.l[2 * t + r] = l;
    }
    zero = fmaf(l, 0.f, zero);
#pragma unroll
    for (int j = 0; j < 8; j++) zero = fmaf(rows.w[j][r + 2], 0.f, fmaf(rows.w[j][r], 0.f, zero));
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      float4* at = reinterpret_cast<float4*>(&to.w[2 * t + r][8 * g + j]);
      at[0] = make_float4(rows.w[j][r], rows.w[j + 1][r], rows.w[j + 2][r], rows.w[j + 3][r]);
      at[16] = make_float4(rows.w[j][r + 2], rows.w[j + 1][r + 2], rows.w[j + 2][r + 2], rows.w[j + 3][r + 2]);
    }
  }
  return zero != 0.f;
}


__device__ __forceinline__ void write(element* to, const float4& x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(x.x, x.y), pack(x.z, x.w));
}
