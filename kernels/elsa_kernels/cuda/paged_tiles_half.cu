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

#if ELSA_FP8
__device__ __forceinline__ u32 widen(u16 two) {  // two neighbours of an FP8 cache
  u32 d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(two));
#if ELSA_BF16
  float a, b;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(a), "=f"(b) : "r"(d));
  return pack(a, b);
#else
  return d;
#endif
}
#endif
// machine: end

#if ELSA_FP8
__device__ __forceinline__ uint4 widen(u32 a, u32 b) {
  return make_uint4(widen((u16)a), widen((u16)(a >> 16)), widen((u16)b), widen((u16)(b >> 16)));
}
__device__ __forceinline__ float unpack(cell bits) { return unpack((u16)widen((u16)bits)); }
#endif

static_assert(TILE == 16 && ROWS == 8, "the sides of mma.m16n8k16");

struct Query {
  uint4 fragment[4 * 32];
};

struct Scratch {};  // a warp's room while it walks: none

__device__ __forceinline__ void load_q(const Params& p, const Chunk& c, Query& q, int lane) {
  const int row = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int d = ELSA_FP8 ? i / 2 * 64 + 16 * t + i % 2 * 8 : i * 32 + 8 * t;
    if (row < c.rows) copy(&q.fragment[32 * i + lane], p.q + place_of(c, row, p.q_token, p.q_head) + d);
    else q.fragment[32 * i + lane] = make_uint4(0, 0, 0, 0);
  }
}

struct Tile {
  uint4 k[STEP][PARTS];  // d 32i + 8t … + 7 of the keys g, g + 8 at 2i, 2i + 1
  uint4 v[STEP][PARTS];  // of the keys 2t, 2t + 1, 2t + 8, 2t + 9: d 8g … + 7, 64 + 8g … + 7
};

__device__ __forceinline__ void load_k(const Params& p, Tile& tile, int h, int page, int key, int head, int lane) {
  const int g = lane / 4, t = lane % 4;
  constexpr int EACH = 16 / sizeof(cell);
  const cell* from = p.k + page * p.k_block + (key % PAGE + g) * p.k_place + head * p.k_head + EACH * t;
#pragma unroll
  for (int i = 0; i < PARTS / 2; i++) {
    tile.k[h][2 * i] = stream(from + 4 * EACH * i);
    tile.k[h][2 * i + 1] = stream(from + 8 * p.k_place + 4 * EACH * i);
  }
}

__device__ __forceinline__ void load_v(const Params& p, Tile& tile, int h, int page, int key, int head, int lane) {
  const int g = lane / 4, t = lane % 4;
  const cell* from = p.v + page * p.v_block + (key % PAGE + 2 * t) * p.v_place + head * p.v_head + 16 / sizeof(cell) * g;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const cell* row = from + (i % 2 + i / 2 * 8) * p.v_place;
#pragma unroll
    for (int j = 0; j < PARTS / 4; j++) tile.v[h][PARTS / 4 * i + j] = stream(row + 64 * j);
  }
}

__device__ __forceinline__ uint4 key_part(const uint4 (&from)[PARTS], int i, int h) {
#if ELSA_FP8
  const uint4& x = from[i / 2 * 2 + h];
  return i % 2 ? widen(x.z, x.w) : widen(x.x, x.y);
#else
  return from[2 * i + h];
#endif
}

// A warp's state of rows 2t and 2t + 1: w[j] has d 8g + j (two rows), then d 64 + 8g + j. l: this lane's keys alone.
struct Rows {
  float m[2], l[2], w[8][4];
};

__device__ __forceinline__ void clear(Rows& rows) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows.m[r] = minus_infinity();
    rows.l[r] = 0.f;
  }
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) rows.w[j][i] = 0.f;
}

typedef float Logits[STEP][4];

// Scaled products with rows 2t and 2t + 1: of key g (two rows), then of key g + 8.
__device__ __forceinline__ void products(const Tile& tile, const Query& q, int lane, float scale, Logits& s) {
  float a[STEP][4] = {}, b[STEP][4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 f = q.fragment[32 * i + lane];
#pragma unroll
    for (int h = 0; h < STEP; h++) {
      const uint4 low = key_part(tile.k[h], i, 0), high = key_part(tile.k[h], i, 1);
      mma(a[h], low.x, high.x, low.y, high.y, f.x, f.y);
      mma(b[h], low.z, high.z, low.w, high.w, f.z, f.w);
    }
  }
#pragma unroll
  for (int h = 0; h < STEP; h++)
#pragma unroll
    for (int c = 0; c < 4; c++) s[h][c] = (a[h][c] + b[h][c]) * scale;
}

__device__ __forceinline__ u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// New maxima, then the values weighed with P, which is brought to the fragments that the second product wants.
__device__ __forceinline__ void weigh(const Logits& s, Rows& rows, int, int lane, Scratch&, const Tile& tile) {
  u32 low[STEP], high[STEP];
  float top[2], anchor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top[r] = fmaxf(s[0][r], s[0][r + 2]);
#pragma unroll
    for (int h = 1; h < STEP; h++) top[r] = fmaxf(top[r], fmaxf(s[h][r], s[h][r + 2]));
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
#pragma unroll
  for (int h = 0; h < STEP; h++) {
    float e[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      e[c] = exp_2(s[h][c] - anchor[c % 2]);
      rows.l[c % 2] += e[c];
    }
    low[h] = transposed(pack(e[0], e[1]));
    high[h] = transposed(pack(e[2], e[3]));
  }
#pragma unroll
  for (int h = 0; h < STEP; h++) {
    uint4 v[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELSA_FP8
      const uint4& x = tile.v[h][i];
      v[i][0] = widen(x.x, x.y);
      v[i][1] = widen(x.z, x.w);
#else
      v[i][0] = tile.v[h][2 * i];
      v[i][1] = tile.v[h][2 * i + 1];
#endif
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; i++)  // d 8g + j and 64 + 8g + j, of the first two and of the last two keys
        a[i] = __byte_perm(word(v[i / 2 * 2][i % 2], j / 2), word(v[i / 2 * 2 + 1][i % 2], j / 2), j % 2 ? 0x7632 : 0x5410);
      mma(rows.w[j], a[0], a[1], a[2], a[3], low[h], high[h]);
    }
  }
}

// Hides keys that are not the chunk's or that a row does not see. Values of those that are not the chunk's are set to 0.
__device__ __forceinline__ void hide(const Params& p, const Chunk& c, int h, int key, int lane, Logits& s, Tile& tile) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int mine = key + g + i / 2 * 8, row = 2 * t + i % 2;
    if (mine >= c.end || (p.causal && mine > c.start + row / GROUP)) s[h][i] = minus_infinity();
    if (key + 2 * t + i % 2 + i / 2 * 8 >= c.end)
#pragma unroll
      for (int j = 0; j < PARTS / 4; j++) tile.v[h][PARTS / 4 * i + j] = make_uint4(0, 0, 0, 0);
  }
}

// Returns whether something in the warp's state is not finite.
__device__ __forceinline__ bool leave(const Rows& rows, Left& to, int lane) {
  const int g = lane / 4, t = lane % 4;
  float zero = 0.f;  // times anything finite
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = 2 * t + r;
    const float(&w)[8][4] = rows.w;
    float l = rows.l[r];
#pragma unroll
    for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(~0u, l, d);
    if (g == 0) {
      to.m[row] = rows.m[r];
      to.l[row] = l;
    }
    zero = fmaf(l, 0.f, zero);
#pragma unroll
    for (int j = 0; j < 8; j++) zero = fmaf(w[j][r + 2], 0.f, fmaf(w[j][r], 0.f, zero));
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      float4* at = reinterpret_cast<float4*>(&to.w[row][(ELSA_FP8 ? 16 : 8) * g + j]);
      at[0] = make_float4(w[j][r], w[j + 1][r], w[j + 2][r], w[j + 3][r]);
      at[ELSA_FP8 ? 2 : 16] = make_float4(w[j][r + 2], w[j + 1][r + 2], w[j + 2][r + 2], w[j + 3][r + 2]);
    }
  }
  return zero != 0.f;
}

__device__ __forceinline__ void write(element* to, const float4& x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(x.x, x.y), pack(x.z, x.w));
}
