// Tiles of FP32 keys and values, 8 at a time, for paged_decode.cu: FP32 products without tensor cores.
//
// 16 lanes share a key: lane u of them has channels 4u … 4u + 3 and 64 + 4u … + 3 of the four keys h + 2i. Its part of
// the 4·ROWS products is summed over the 16 lanes by halves, so that each lane ends with ROWS / 4 whole logits and takes
// only their exponentials; P comes back to all lanes through shared memory.

static_assert(TILE == 8 && ROWS % 4 == 0, "a lane has whole logits");
constexpr int MINE = ROWS / 4;  // logits of a lane: of rows MINE·(u % 4) … and key h + 2·(u / 4)

__device__ __forceinline__ float unpack(float v) { return v; }

__device__ __forceinline__ void write(element* to, const float4& x) { *reinterpret_cast<float4*>(to) = x; }

struct Tile {
  float4 k[STEP][4][2], v[STEP][4][2];
};

struct Query {
  float4 row[ROWS][D / 4];
};

struct Scratch {
  float4 p[2][STEP][8][MINE];  // P of a tile and of the next in turn: key h + 2i at 4h + i
};

__device__ __forceinline__ void load_q(const Params& p, const Chunk& c, Query& q, int lane) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float4* to = &q.row[row][lane];
    if (row < c.rows) copy(reinterpret_cast<uint4*>(to), p.q + place_of(c, row, p.q_token, p.q_head) + 4 * lane);
    else *to = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

__device__ __forceinline__ float4 stream_floats(const float* p) {
  const uint4 v = stream(p);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

__device__ __forceinline__ void load_rows(float4 (&to)[4][2], const float* cache, i64 block, i64 place, i64 of_head, int page,
                                     int key, int head, int lane) {
  const float* from = cache + page * block + (key % PAGE + lane / 16) * place + head * of_head + lane % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[i][0] = stream_floats(from + 2 * i * place);
    to[i][1] = stream_floats(from + 2 * i * place + 64);
  }
}

__device__ __forceinline__ void load_k(const Params& p, Tile& tile, int h, int page, int key, int head, int lane) {
  load_rows(tile.k[h], p.k, p.k_block, p.k_place, p.k_head, page, key, head, lane);
}

__device__ __forceinline__ void load_v(const Params& p, Tile& tile, int h, int page, int key, int head, int lane) {
  load_rows(tile.v[h], p.v, p.v_block, p.v_place, p.v_head, page, key, head, lane);
}

struct Rows {
  float m[MINE], l[MINE];  // of this lane's rows; l: of its keys alone
  float w[ROWS][8];        // of this lane's channels and keys
};

__device__ __forceinline__ void clear(Rows& rows) {
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    rows.m[j] = minus_infinity();
    rows.l[j] = 0.f;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int j = 0; j < 8; j++) rows.w[r][j] = 0.f;
}

typedef float Logits[STEP][MINE];

__device__ __forceinline__ float dot(float sum, const float4& a, const float4& b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Lanes that differ in BIT add their sums: one goes on with the first half of them, the other with the second.
template <int BIT>
__device__ __forceinline__ void halve(float (&s)[4 * ROWS], int lane) {
  constexpr int HALF = 4 * ROWS * BIT / 16;
  const bool up = lane & BIT;
#pragma unroll
  for (int j = 0; j < HALF; j++) {
    const float other = __shfl_xor_sync(~0u, up ? s[j] : s[j + HALF], BIT);
    s[j] = (up ? s[j + HALF] : s[j]) + other;
  }
}

// This lane's logits, scaled.
__device__ __forceinline__ void products(const Tile& tile, const Query& q, int lane, float scale, Logits& mine) {
#pragma unroll
  for (int h = 0; h < STEP; h++) {
    float s[4 * ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float4 low = q.row[r][lane % 16], high = q.row[r][16 + lane % 16];
#pragma unroll
      for (int i = 0; i < 4; i++) s[i * ROWS + r] = dot(dot(0.f, tile.k[h][i][0], low), tile.k[h][i][1], high);
    }
    halve<8>(s, lane);
    halve<4>(s, lane);
    halve<2>(s, lane);
    halve<1>(s, lane);
#pragma unroll
    for (int j = 0; j < MINE; j++) mine[h][j] = s[j] * scale;
  }
}

// Hides keys that are not the chunk's or that a row does not see. Values of those that are not the chunk's are set to 0.
__device__ __forceinline__ void hide(const Params& p, const Chunk& c, int h, int key, int lane, Logits& s, Tile& tile) {
  const int mine = key + lane / 16 + lane % 16 / 4 * 2;
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    const int row = lane % 4 * MINE + j;
    if (mine >= c.end || (p.causal && mine > c.start + row / GROUP)) s[h][j] = minus_infinity();
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (key + lane / 16 + 2 * i >= c.end) tile.v[h][i][0] = tile.v[h][i][1] = make_float4(0.f, 0.f, 0.f, 0.f);
}

// New maxima, this lane's P to where all lanes find it, and the values weighed with it.
__device__ __forceinline__ void weigh(const Logits& s, Rows& rows, int turn, int lane, Scratch& scratch, const Tile& tile) {
  auto& p = scratch.p[turn % 2];
  float top[MINE], anchor[MINE];
  bool changed = false;
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    top[j] = s[0][j];
#pragma unroll
    for (int h = 1; h < STEP; h++) top[j] = fmaxf(top[j], s[h][j]);
#pragma unroll
    for (int d = 4; d < 32; d *= 2) top[j] = fmaxf(top[j], __shfl_xor_sync(~0u, top[j], d));
    top[j] = fmaxf(top[j], rows.m[j]);
    anchor[j] = anchor_of(top[j]);
    changed |= top[j] != rows.m[j];
  }
  if (__any_sync(~0u, changed)) {  // else the factors are 1
    float decay[MINE];
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      decay[j] = exp_2(rows.m[j] - anchor[j]);
      rows.m[j] = top[j];
      rows.l[j] *= decay[j];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float f = __shfl_sync(~0u, decay[r % MINE], r / MINE);
#pragma unroll
      for (int j = 0; j < 8; j++) rows.w[r][j] *= f;
    }
  }
#pragma unroll
  for (int h = 0; h < STEP; h++) {
    float* mine = reinterpret_cast<float*>(&p[h][0][0]) + lane * MINE;
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      mine[j] = exp_2(s[h][j] - anchor[j]);
      rows.l[j] += mine[j];
    }
  }
  __syncwarp();
#pragma unroll
  for (int h = 0; h < STEP; h++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float4 low = tile.v[h][i][0], high = tile.v[h][i][1];
      const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int f = 0; f < MINE; f++) {
        const float4 four = p[h][lane / 16 * 4 + i][f];
        const float weights[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
          for (int j = 0; j < 8; j++) rows.w[4 * f + r][j] = fmaf(weights[r], v[j], rows.w[4 * f + r][j]);
      }
    }
}

// Returns whether something in the warp's state is not finite.
__device__ __forceinline__ bool leave(const Rows& rows, Left& to, int lane) {
  float zero = 0.f;  // times anything finite
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    float l = rows.l[j];
#pragma unroll
    for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(~0u, l, d);
    if (lane < 4) {
      to.m[MINE * lane + j] = rows.m[j];
      to.l[MINE * lane + j] = l;
    }
    zero = fmaf(l, 0.f, zero);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float w[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      w[j] = rows.w[r][j] + __shfl_xor_sync(~0u, rows.w[r][j], 16);
      zero = fmaf(w[j], 0.f, zero);
    }
    if (lane / 16 == r % 2) {
      float4* at = reinterpret_cast<float4*>(&to.w[r][lane % 16 * 4]);
      at[0] = make_float4(w[0], w[1], w[2], w[3]);
      at[16] = make_float4(w[4], w[5], w[6], w[7]);
    }
  }
  return zero != 0.f;
}
