// Attention of up to ROWS packed rows (queries × heads of a group) over a paged KV with D = 128, in one launch. sm_80 and
// newer, compiled by NVRTC, with the tiles of paged_tiles_half.cu or paged_tiles_fp32.cu.
//
// K and V go from global memory straight into the registers of the products. A warp has the next tiles in flight whenever
// it computes, the next chunk's too, and meets nobody: one more warp, the conductor, prepares what the others read next
// (`Prepared`) and takes what they leave of a chunk to its place. A fence waits for all loads on their way, so the
// conductor makes all of them, which has none. Only with a block's last chunk do all warps help.
//
// A sequence's keys are cut into chunks, counted from key 0, of a size that follows from their number (`chunk_of`); of a
// chunk's tiles warp w takes every WARPS-th, STEP at a time.
// The warps' states merge to the chunk's, up to FAN chunks' to a node's, nodes' to the sequence's, always in the order of
// positions. Who merges is whom an integer counter names last, or, in calls that would need much memory for chunks
// (`whole_nodes`), the block that has computed all chunks of the node; the sums are the same ones. Bits depend on the
// sequence alone.
//
// Needs: ELSA_FP32 and ELSA_BF16 (both 0 for FP16), ELSA_FP8 (of the caches, 16-bit queries), ELSA_ROWS, ELSA_GROUP,
// ELSA_PAGE (a multiple of 16), ELSA_WARPS, ELSA_CONDUCTOR, ELSA_CHUNK, ELSA_LONGEST, ELSA_STEP, ELSA_SHARED,
// ELSA_MIN_BLOCKS.

constexpr int WARPS = ELSA_WARPS, CHUNK = ELSA_CHUNK, GROUP = ELSA_GROUP, PAGE = ELSA_PAGE;
constexpr bool CONDUCTOR = ELSA_CONDUCTOR;
constexpr int TEAM = WARPS + CONDUCTOR, THREADS = 32 * TEAM;  // the conductor is the last one
constexpr int D = 128, ROWS = ELSA_ROWS, FAN = 32, TILE = ELSA_FP32 ? 8 : 16;
constexpr int STEP = ELSA_STEP;  // tiles that a warp multiplies at a time
constexpr int PITCH = D + 4;  // of a row in shared memory
constexpr int LONGEST = ELSA_LONGEST;  // of all chunks
constexpr int AHEAD = CONDUCTOR ? 4 : 2;  // chunks that are prepared at a time
constexpr int LATE = 4;  // last steps of a block in which warps also ask for the one after the next
static_assert(CHUNK / 4 % TILE == 0 && LONGEST % TILE == 0, "whole tiles");
static_assert(PAGE % TILE == 0, "a tile lies on one page");

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
#if ELSA_FP32
typedef float element;
#else
typedef u16 element;
#endif
#if ELSA_FP8
typedef unsigned char cell;  // of the cache
#else
typedef element cell;
#endif
constexpr int PARTS = TILE * D * sizeof(cell) / 512;  // 16 bytes a lane of a tile's keys, and of its values

struct Params {
  const element* q;
  const cell *k, *v;
  element* out;
  float* lse;          // may be null, [T, H]
  const float* sinks;  // may be null, [H]
  const float *k_scale, *v_scale;  // of an FP8 cache; may be null, [1] or [Hkv]
  const int *cu, *used, *table;
  // States [slots, ROWS], [slots, ROWS], [slots, ROWS, D]: of chunks (an item's, or FAN a block), from nodes0 on of nodes.
  float *state_m, *state_l, *state_w;
  int *node_counters, *counters;  // [slots]; [B, Hkv]. Zeros, left as zeros
  i64 q_token, q_head, k_block, k_place, k_head, v_block, v_place, v_head, table_row, out_token, out_head;  // strides
  int B, T, Hkv, table_width, causal, whole_nodes, nodes0, k_scales, v_scales;
  float scale;  // times log2(e)
};

// machine: begin
__device__ __forceinline__ uint4 stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy(int* to, const int* from) {  // into shared memory, until `arrive_with_copies`
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copy(uint4* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
}

// Turns of a barrier end when as many have arrived as it was opened for. They are waited for by their parity.
struct Barrier {
  alignas(8) u32 state[2];
};

__device__ __forceinline__ void open(Barrier& b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared(&b)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(Barrier& b) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared(&b)) : "memory");
}

__device__ __forceinline__ void arrive_with_copies(Barrier& b) {  // when this thread's copies are there
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared(&b)) : "memory");
}

__device__ __forceinline__ void wait(Barrier& b, int turn) {
  u32 done;
  do {
    asm volatile(
#if __CUDA_ARCH__ >= 900  // sleeps a while
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#else
        "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#endif
        : "=r"(done)
        : "r"(shared(&b)), "r"(turn & 1)
        : "memory");
  } while (!done);
}

// Counts one more, after what this thread has seen was written and before what it reads from now on. Returns the old count.
__device__ __forceinline__ int count(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

__device__ __forceinline__ void hint(const void* p) {  // brings a line into the L2 cache, and only there
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// machine: end

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float anchor_of(float m) { return m == minus_infinity() ? 0.f : m; }

// A chunk of keys for one key head.
struct Chunk {
  int s, head, at;     // sequence, key head, chunk
  int item, last;      // the item of work it belongs to; the last chunk of that item
  int chunks;          // of the sequence
  int q0, rows;        // the sequence's first query, packed rows
  int keys, start;     // of the sequence; position of its first query
  int size;            // keys of the sequence's chunks, `chunk_of`
  int end;             // of the chunk's keys
  int first_item;      // of the sequence, over all heads
  u32 slot, step;      // where the states of its node's chunks begin, and how far apart they are
  bool more;           // whether the block has another one
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Keys of the chunks of a sequence of so many keys: short ones are cut for one sequence to occupy many multiprocessors,
// long ones for fewer ends of chunks. As `Form.chunk_of`.
__device__ __forceinline__ int chunk_of(int keys) {
  if (keys > CHUNK && keys < 8 * CHUNK) return keys < 4 * CHUNK ? CHUNK / 4 : CHUNK / 2;
  return keys >= 64 * CHUNK ? LONGEST : CHUNK;
}

struct Sequence {
  int q0, queries, keys;
};

__device__ __forceinline__ Sequence sequence(const Params& p, int s) {
  const int q0 = p.cu[s];
  return {q0, p.cu[s + 1] - q0, p.used[s]};
}

// Whether a sequence is of this launch.
__device__ __forceinline__ bool takes(const Params& p, const Sequence& x) {
  return x.queries > 0 && x.queries <= ROWS / GROUP && x.q0 < p.T;
}

// Items of a sequence: chunks, or nodes of FAN chunks.
__device__ __forceinline__ int items_of(const Params& p, const Sequence& x) {
  return takes(p, x) ? max(divide_up(x.keys, chunk_of(x.keys) * (p.whole_nodes ? FAN : 1)), 1) : 0;
}

// Inclusive sums of the sequences' items. Returns the number of all, of one head.
__device__ int sum_items(const Params& p, int* ends, int* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int base = 0; base < p.B; base += THREADS) {
    const int s = base + threadIdx.x;
    int sum = s < p.B ? items_of(p, sequence(p, s)) : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) room[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += room[w];
    if (s < p.B) ends[s] = before + sum;
    for (int w = 0; w < TEAM; w++) before += room[w];
    __syncthreads();
  }
  return before;
}

// The first chunk of an item, of unit `unit` and this head: x is the sequence, which is the s-th.
__device__ __forceinline__ Chunk first_chunk(const Params& p, const Sequence& x, int s, int first_item, int item, int unit,
                                             int head) {
  Chunk c;
  c.item = item;
  c.head = head;
  c.s = s;
  c.first_item = first_item;
  c.at = (unit - first_item) * (p.whole_nodes ? FAN : 1);
  c.q0 = x.q0;
  c.keys = x.keys;
  c.start = x.keys - x.queries;
  c.rows = min(x.queries, p.T - x.q0) * GROUP;
  c.size = chunk_of(x.keys);
  c.end = min(x.keys, (c.at + 1) * c.size);
  c.chunks = max(divide_up(x.keys, c.size), 1);
  c.last = min(c.at + (p.whole_nodes ? FAN : 1), c.chunks) - 1;
  c.slot = p.whole_nodes ? blockIdx.x * FAN : (first_item + c.at / FAN * FAN) * p.Hkv + head;
  c.step = p.whole_nodes ? 1 : p.Hkv;
  return c;
}

__device__ __forceinline__ Chunk first_chunk(const Params& p, const int* ends, int item) {
  const int unit = item / p.Hkv;
  int low = 0, high = p.B - 1;  // the first sequence that ends after the unit
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > unit) high = middle;
    else low = middle + 1;
  }
  return first_chunk(p, sequence(p, low), low, low ? ends[low - 1] : 0, item, unit, item - unit * p.Hkv);
}

__device__ __forceinline__ i64 place_of(const Chunk& c, int row, i64 token_stride, i64 head_stride) {
  return (c.q0 + row / GROUP) * token_stride + (c.head * GROUP + row % GROUP) * head_stride;
}

// What a warp leaves of a chunk. `broken`: something in it is not finite.
struct Left {
  alignas(16) float w[ROWS][PITCH];
  float m[ROWS], l[ROWS];
  bool broken;
};

// How many tiles of a chunk warp `warp` has.
__device__ __forceinline__ int tiles_of(const Chunk& c, int warp) {
  const int keys = c.end - c.at * c.size - TILE * warp;
  return keys > 0 ? divide_up(keys, TILE * WARPS) : 0;
}

// What a head's logits (times log2(e)) and values are to be multiplied by.
__device__ __forceinline__ float scale_of(const Params& p, int head) {
  return ELSA_FP8 && p.k_scale ? p.scale * p.k_scale[p.k_scales ? head : 0] : p.scale;
}
__device__ __forceinline__ float factor_of(const Params& p, int head) {
  return ELSA_FP8 && p.v_scale ? p.v_scale[p.v_scales ? head : 0] : 1.f;
}

#include TILES  // put in its place by the launcher

// What warps need of a chunk: its queries, and the pages of its tiles.
struct Prepared {
  Chunk chunk;
  Query q;
  int pages[LONGEST / TILE];
};

struct Shared {
  Prepared prepared[AHEAD];  // of chunk u at u % AHEAD
  Left left[WARPS];
  Scratch scratch[WARPS];
  Barrier ready[AHEAD], asked[AHEAD];  // a chunk and its pages; its queries
  Barrier full, taken;   // all warps have left a chunk's states; they have been read
  int room[TEAM];
};
static_assert(sizeof(Shared) <= ELSA_SHARED, "Form.shared_bytes");

// Waits until the pages of the block's chunk u are there.
__device__ __forceinline__ const Prepared& prepared(Shared& sh, int u) {
  wait(sh.ready[u % AHEAD], u / AHEAD);
  return sh.prepared[u % AHEAD];
}

// Asks for the tiles of the warp's first step in a chunk, of which it has `tiles`.
__device__ __forceinline__ void load_first(const Params& p, Tile& tile, const Prepared& from, int tiles, int warp, int lane) {
  const Chunk& c = from.chunk;
#pragma unroll
  for (int h = 0; h < STEP; h++)
    if (h < tiles) load_k(p, tile, h, from.pages[warp + WARPS * h], c.at * c.size + TILE * (warp + WARPS * h), c.head, lane);
#pragma unroll
  for (int h = 0; h < STEP; h++)
    if (h < tiles) load_v(p, tile, h, from.pages[warp + WARPS * h], c.at * c.size + TILE * (warp + WARPS * h), c.head, lane);
}

// Asks for the tiles of the step that begins at a warp's i-th one, into the L2 cache alone.
__device__ __forceinline__ void hint_at(const Params& p, const Prepared& from, int i, int tiles, int warp, int lane) {
  constexpr int LINE = 128 / sizeof(cell), LINES = TILE * D / LINE;  // a line's channels, a tile's lines of K or V
  const Chunk& c = from.chunk;
#pragma unroll
  for (int h = 0; h < STEP; h++) {
    if (i + h >= tiles) break;
    const int tile = warp + WARPS * (i + h), first = (c.at * c.size + TILE * tile) % PAGE;
    const i64 page = from.pages[tile];
#pragma unroll
    for (int line = lane; line < 2 * LINES; line += 32) {
      const int place = first + line % LINES * LINE / D, d = line % LINES * LINE % D;
      if (line < LINES) hint(p.k + page * p.k_block + place * p.k_place + c.head * p.k_head + d);
      else hint(p.v + page * p.v_block + place * p.v_place + c.head * p.v_head + d);
    }
  }
}

// A warp's tiles of the block's chunk u, the first of which are in `tile` or on their way; at the end the next chunk's
// first ones are.
__device__ __forceinline__ void walk(const Params& p, Shared& sh, int u, int warp, int lane, Tile& tile, Rows& rows) {
  const Prepared& here = sh.prepared[u % AHEAD];
  const Chunk& c = here.chunk;
  const int plain = p.causal ? min(c.end, c.start + 1) : c.end;  // all rows see the keys before it
  const int tiles = tiles_of(c, warp);
  const float scale = scale_of(p, c.head);
  clear(rows);
  wait(sh.asked[u % AHEAD], u / AHEAD);
  if (tiles == 0 && c.more) {
    const Prepared& next = prepared(sh, u + 1);
    load_first(p, tile, next, tiles_of(next.chunk, warp), warp, lane);
  }
  int key = c.at * c.size + TILE * warp;
  for (int i = 0; i < tiles; i += STEP) {
    // The step that is asked for: where it begins, its head, tiles that there are.
    const int* pages = here.pages + warp + WARPS * (i + STEP);
    int begin = key + STEP * TILE * WARPS, head = c.head, more = tiles - i - STEP;
    if (more <= 0 && c.more) {
      const Prepared& next = prepared(sh, u + 1);
      pages = next.pages + warp;
      begin = next.chunk.at * next.chunk.size + TILE * warp;
      head = next.chunk.head;
      more = tiles_of(next.chunk, warp);
    }
    int page[STEP];
#pragma unroll
    for (int h = 0; h < STEP; h++) page[h] = h < more ? pages[WARPS * h] : 0;
    Logits s;
    products(tile, here.q, lane, scale, s);
#pragma unroll
    for (int h = 0; h < STEP; h++)
      if (key + TILE * WARPS * h + TILE > plain) hide(p, c, h, key + TILE * WARPS * h, lane, s, tile);
    key = begin;
#pragma unroll
    for (int h = 0; h < STEP; h++)
      if (h < more) load_k(p, tile, h, page[h], key + TILE * WARPS * h, head, lane);
    if (!c.more && i + 2 * STEP < tiles && i + LATE * STEP >= tiles) hint_at(p, here, i + 2 * STEP, tiles, warp, lane);
    weigh(s, rows, i / STEP, lane, sh.scratch[warp], tile);
#pragma unroll
    for (int h = 0; h < STEP; h++)
      if (h < more) load_v(p, tile, h, page[h], key + TILE * WARPS * h, head, lane);
  }
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
  for (int w = 0; w < WARPS; w++) x.m = fmaxf(x.m, sh.left[w].m[row]);
  const float anchor = anchor_of(x.m);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float weight = exp_2(sh.left[w].m[row] - anchor);
    x.l = fmaf(weight, sh.left[w].l[row], x.l);
    add(x.w, weight, *reinterpret_cast<const float4*>(&sh.left[w].w[row][4 * lane]));
  }
  return x;
}

// The chunk again, key by key: in a tile's product a hidden key's weight 0 meets its ∞ and NaN, here it is left out, as is
// a key with logit −∞. One warp leaves the state of every row as that of warp 0, the other warps' empty.
__device__ __noinline__ void careful(const Params& p, const Chunk& c, Shared& sh, int lane) {
  const float scale = scale_of(p, c.head);
  float q[ROWS][D / 32], w[ROWS][D / 32] = {}, m[ROWS], l[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    m[row] = minus_infinity();
    l[row] = 0.f;
#pragma unroll
    for (int i = 0; i < D / 32; i++)
      q[row][i] = row < c.rows ? unpack(p.q[place_of(c, row, p.q_token, p.q_head) + lane + 32 * i]) : 0.f;
  }
  for (int key = c.at * c.size; key < c.end; key++) {
    const i64 page = p.table[c.s * p.table_row + key / PAGE];
    const cell* at_k = p.k + page * p.k_block + key % PAGE * p.k_place + c.head * p.k_head + lane;
    const cell* at_v = p.v + page * p.v_block + key % PAGE * p.v_place + c.head * p.v_head + lane;
    float k[D / 32], v[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; i++) k[i] = unpack(at_k[32 * i]), v[i] = unpack(at_v[32 * i]);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      if (row >= c.rows || (p.causal && key > c.start + row / GROUP)) continue;
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < D / 32; i++) s = fmaf(q[row][i], k[i], s);
      for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
      s *= scale;
      if (s == minus_infinity()) continue;
      const float top = fmaxf(m[row], s), decay = exp_2(m[row] - top), e = exp_2(s - top);
      m[row] = top;
      l[row] = fmaf(l[row], decay, e);
#pragma unroll
      for (int i = 0; i < D / 32; i++) w[row][i] = fmaf(w[row][i], decay, e * v[i]);
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++)
    for (int of = 0; of < WARPS; of++) {
      if (lane == 0) sh.left[of].m[row] = of ? minus_infinity() : m[row], sh.left[of].l[row] = of ? 0.f : l[row];
#pragma unroll
      for (int i = 0; i < D / 32; i++) sh.left[of].w[row][lane + 32 * i] = of ? 0.f : w[row][i];
    }
}

// Joins the sinks, once, and writes four channels of a row of output, with the first ones its logsumexp.
__device__ __forceinline__ void finish(const Params& p, const Chunk& c, int row, int d, State x) {
  const int head = c.head * GROUP + row % GROUP;
  if (p.sinks) {
    const float sink = p.sinks[head] * 1.4426950408889634f, top = fmaxf(x.m, sink), anchor = anchor_of(top);
    const float decay = exp_2(x.m - anchor);
    x.l = fmaf(x.l, decay, exp_2(sink - anchor));
    x.w = scaled(x.w, decay);
    x.m = top;
  }
  float4 out = scaled(x.w, 1.f / (x.l == 0.f ? 1.f : x.l));
  if (ELSA_FP8) out = scaled(out, factor_of(p, c.head));
  write(p.out + place_of(c, row, p.out_token, p.out_head) + d, out);
  if (p.lse && d == 0) {
    p.lse[(i64)(c.q0 + row / GROUP) * p.Hkv * GROUP + head] = (x.m + log2f(x.l)) * 0.6931471805599453f;
  }
}

__device__ __forceinline__ void put(const Params& p, u32 slot, int row, int d, const State& x) {
  const u32 at = slot * ROWS + row;
  __stcg(reinterpret_cast<float4*>(p.state_w + (i64)at * D + d), x.w);
  if (d == 0) {
    __stcg(p.state_m + at, x.m);
    __stcg(p.state_l + at, x.l);
  }
}

// A row's states in n slots, `step` apart, as one, under a maximum and a sum that are all states'. 32 at a time: lane j has
// the weight of the j-th. Lanes below 16 sum W over even places, the others over odd ones. HALVES is 2: a lane gets its
// four channels. It is 1: only half `half` of the channels, and those of lane l are 64·half + 4·(l % 16) … + 3.
template <int HALVES>
__device__ __forceinline__ State merge_states(const Params& p, u32 slot, u32 step, int n, int row, int half, int lane) {
  constexpr int AT_ONCE = 8;
  const u32 apart = step * ROWS * D * sizeof(float);  // one place and the next
  State x = {minus_infinity(), 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
  float4 sum[HALVES];
#pragma unroll
  for (int h = 0; h < HALVES; h++) sum[h] = x.w;
  for (int base = 0; base < n; base += 32) {
    const int here = min(n - base, 32);
    const u32 at = (slot + base * step) * ROWS + row;
    float m = minus_infinity(), l = 0.f;
    if (lane < here) {
      m = __ldcg(p.state_m + at + lane * step * ROWS);
      l = __ldcg(p.state_l + at + lane * step * ROWS);
    }
    const char* from = reinterpret_cast<const char*>(p.state_w + (i64)at * D + 64 * half + lane % 16 * 4) + lane / 16 * apart;
    float weight = 0.f;
    for (int j = 0; j < here; j += 2 * AT_ONCE, from += 2 * AT_ONCE * apart) {
      float4 w[AT_ONCE][HALVES];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          w[i][h] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (j + 2 * i + lane / 16 < here)
            w[i][h] = __ldcg(reinterpret_cast<const float4*>(from + (i64)(2 * i) * apart) + 16 * h);
        }
      if (j == 0) {  // while those are on their way
        float top = fmaxf(m, x.m);
#pragma unroll
        for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
        const float anchor = anchor_of(top), decay = exp_2(x.m - anchor);
        weight = exp_2(m - anchor);
        l *= weight;
#pragma unroll
        for (int o = 16; o; o /= 2) l += __shfl_xor_sync(~0u, l, o);
        x.m = top;
        x.l = fmaf(x.l, decay, l);
#pragma unroll
        for (int h = 0; h < HALVES; h++) sum[h] = scaled(sum[h], decay);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const float f = __shfl_sync(~0u, weight, j + 2 * i + lane / 16);
#pragma unroll
        for (int h = 0; h < HALVES; h++) add(sum[h], f, w[i][h]);
      }
    }
  }
  const float4 other = HALVES == 2 && lane < 16 ? sum[HALVES - 1] : sum[0];  // is summed by the lane 16 further
  x.w = HALVES == 2 && lane >= 16 ? sum[HALVES - 1] : sum[0];
  add(x.w, 1.f, make_float4(__shfl_xor_sync(~0u, other.x, 16), __shfl_xor_sync(~0u, other.y, 16),
                            __shfl_xor_sync(~0u, other.z, 16), __shfl_xor_sync(~0u, other.w, 16)));
  return x;
}

// What one warp alone (MEMBERS is 1) or all warps of the block do together.
template <int MEMBERS>
__device__ __forceinline__ void meet() {
  if (MEMBERS == 1) __syncwarp();
  else __syncthreads();
}

// Counts what the members have written; true where it comes last of `all`, and they see what the others have written.
template <int MEMBERS>
__device__ __forceinline__ bool arrives_last(int* counter, int all, int member, int lane) {
  bool last = false;
  meet<MEMBERS>();
  if (member == 0 && lane == 0) {
    last = count(counter) == all - 1;
    if (last) *counter = 0;
  }
  if (MEMBERS > 1) return __syncthreads_or(last);
  last = __any_sync(~0u, last);
  __syncwarp();
  return last;
}

// The warps' states of a chunk are in shared memory: takes their sum to its place, and merges the node that is complete by
// it, and the nodes.
template <int MEMBERS>
__device__ __forceinline__ void deliver(const Params& p, const Chunk& chunk, int member, int lane, Shared& sh) {
  if (__any_sync(~0u, lane < WARPS && sh.left[lane].broken)) {
    if (member == 0) careful(p, chunk, sh, lane);
    meet<MEMBERS>();
  }
  constexpr int EACH = MEMBERS == 1 ? 1 : 2;  // warps that merge a row
  const Chunk c = chunk;  // in registers
  const u32 place = c.slot + c.at % FAN * c.step;
#pragma unroll 1
  for (int row = member; row < c.rows; row += MEMBERS) {
    const State x = gather(sh, row, lane);
    if (c.chunks == 1) finish(p, c, row, 4 * lane, x);
    else put(p, place, row, 4 * lane, x);
  }
  if (MEMBERS == 1) {
    __syncwarp();
    if (lane == 0) arrive(sh.taken);
  }
  if (c.chunks == 1 || (p.whole_nodes && c.at != c.last)) return;
  // Nodes of a sequence follow one another; sequences that begin within the same FAN items are told apart by s.
  const u32 nodes0 = p.nodes0 + (p.whole_nodes ? c.first_item : c.first_item / FAN + c.s) * p.Hkv + c.head;
  const int nodes = divide_up(c.chunks, FAN);
  u32 slot = c.slot, step = c.step;
  int n = min(FAN, c.chunks - c.at / FAN * FAN), *counter = p.node_counters + slot;
#pragma unroll 1
  for (bool whole = nodes == 1, counted = !p.whole_nodes;; whole = counted = true) {
    if (!counted) meet<MEMBERS>();
    else if (!arrives_last<MEMBERS>(counter, n, member, lane)) return;
#pragma unroll 1
    for (int part = member; part < EACH * c.rows; part += MEMBERS) {
      const int row = part / EACH, half = part % EACH, d = 64 * half + 4 * lane;
      const State x = merge_states<2 / EACH>(p, slot, step, n, row, half, lane);
      if (EACH == 2 && lane >= 16) continue;
      if (whole) finish(p, c, row, d, x);
      else put(p, nodes0 + c.at / FAN * p.Hkv, row, d, x);
    }
    if (whole) return;
    slot = nodes0, step = p.Hkv, n = nodes, counter = p.counters + c.s * p.Hkv + c.head;
  }
}

// The pages of the block's first chunk, of the only sequence. All sizes' are asked for while it is not known of which one
// the chunk is; x gets the sequence.
__device__ __forceinline__ void first_pages(const Params& p, Sequence& x, int* pages) {
  constexpr int EACH = (LONGEST / TILE + THREADS - 1) / THREADS;
  const int at = blockIdx.x / p.Hkv * (p.whole_nodes ? FAN : 1), sizes[] = {CHUNK / 4, CHUNK / 2, CHUNK, LONGEST};
  int page[EACH][4];
#pragma unroll
  for (int j = 0; j < EACH; j++)
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int first = TILE * (threadIdx.x + j * THREADS), place = (at * sizes[n] + first) / PAGE;
      page[j][n] = first < sizes[n] && place < p.table_width ? p.table[place] : 0;
    }
  x = sequence(p, 0);
  const int size = chunk_of(x.keys);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    const int i = threadIdx.x + j * THREADS;
    if (TILE * i < size)
      pages[i] = size == LONGEST ? page[j][3] : size == CHUNK ? page[j][2] : size == CHUNK / 2 ? page[j][1] : page[j][0];
  }
}

// One warp prepares the block's chunk u, c, but for its queries.
__device__ __forceinline__ void prepare(const Params& p, int items, Chunk& c, int u, int lane, Shared& sh) {
  c.more = c.at < c.last || c.item + (int)gridDim.x < items;
  Prepared& to = sh.prepared[u % AHEAD];
  if (lane == 0) to.chunk = c;
  if (u || p.B > 1) {  // else all threads do
    const int tiles = divide_up(c.end - c.at * c.size, TILE);
    for (int i = lane; i < tiles; i += 32) {
      const int place = (c.at * c.size + TILE * i) / PAGE;
      if (place < p.table_width) copy(to.pages + i, p.table + c.s * p.table_row + place);
      else to.pages[i] = 0;
    }
  }
  arrive_with_copies(sh.ready[u % AHEAD]);
  arrive(sh.ready[u % AHEAD]);
}

__device__ __forceinline__ void prepare_q(const Params& p, const Chunk& c, int u, int lane, Shared& sh) {
  load_q(p, c, sh.prepared[u % AHEAD].q, lane);
  arrive_with_copies(sh.asked[u % AHEAD]);
  arrive(sh.asked[u % AHEAD]);
}

// The block's next chunk after c, its u-th.
__device__ __forceinline__ Chunk prepare_next(const Params& p, const int* ends, int items, Chunk c, int u, int lane,
                                              Shared& sh) {
  if (c.at < c.last) {
    c.at++;
    c.end = min(c.keys, (c.at + 1) * c.size);
  } else {
    c = first_chunk(p, ends, c.item + (int)gridDim.x);
  }
  prepare(p, items, c, u, lane, sh);
  prepare_q(p, c, u, lane, sh);
  return c;
}

// The conductor's part; c: the block's first chunk. Returns which is its last one, which is not yet delivered.
__device__ __forceinline__ int conduct(const Params& p, const int* ends, int items, Chunk c, int lane, Shared& sh) {
  int next = 1;
  for (int u = 0;; u++) {
#pragma unroll 1
    for (; next < u + AHEAD && c.more; next++) c = prepare_next(p, ends, items, c, next, lane, sh);
    const Chunk& now = prepared(sh, u).chunk;
    if (!now.more) return u;
    wait(sh.full, u);
    deliver<1>(p, now, 0, lane, sh);
    __syncwarp();
  }
}

// The other warps' part, which returns the same. Without a conductor, c is the last warp's.
__device__ __forceinline__ int stream_chunks(const Params& p, const int* ends, int items, Chunk c, int warp, int lane,
                                             Shared& sh) {
  Tile tile;
  const Prepared& first = prepared(sh, 0);
  load_first(p, tile, first, tiles_of(first.chunk, warp), warp, lane);
  for (int u = 0;; u++) {
    const bool more = sh.prepared[u % AHEAD].chunk.more;
    if (!CONDUCTOR && warp == WARPS - 1 && more) c = prepare_next(p, ends, items, c, u + 1, lane, sh);
    Rows rows;
    walk(p, sh, u, warp, lane, tile, rows);
    if (CONDUCTOR && u) wait(sh.taken, u - 1);
    const bool broken = __any_sync(~0u, leave(rows, sh.left[warp], lane));
    if (lane == 0) sh.left[warp].broken = broken;
    if (!more) return u;
    if (CONDUCTOR) {
      __syncwarp();
      if (lane == 0) arrive(sh.full);
    } else {
      __syncthreads();
      deliver<TEAM>(p, sh.prepared[u % AHEAD].chunk, warp, lane, sh);
      __syncthreads();
    }
  }
}

// Before it returns, the kernel ahead may still run: nothing it writes may be read, nor anything written. Kernels behind
// this one may start as soon as all of its blocks have.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) paged_decode(const __grid_constant__ Params p) {
  extern __shared__ uint4 dynamic[];
  Shared& sh = *reinterpret_cast<Shared*>(dynamic);
  int* ends = reinterpret_cast<int*>(&sh + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == TEAM - 1) {
    if (lane == 0) {
      for (int i = 0; i < AHEAD; i++) {
        open(sh.ready[i], 2 * 32);
        open(sh.asked[i], 2 * 32);
      }
      open(sh.full, WARPS);
      open(sh.taken, 1);
    }
    __syncwarp();
  }
  wait_for_kernel_ahead();
  int items = p.Hkv;
  if (p.B == 1) {
    Sequence only;
    first_pages(p, only, sh.prepared[0].pages);
    items *= items_of(p, only);
  } else {
    items *= sum_items(p, ends, sh.room);
  }
  if ((int)blockIdx.x >= items) return;
  Chunk c;
  if (warp == TEAM - 1) {
    c = first_chunk(p, ends, blockIdx.x);
    prepare(p, items, c, 0, lane, sh);
    prepare_q(p, c, 0, lane, sh);
  }
  __syncthreads();
  const int u = CONDUCTOR && warp == WARPS ? conduct(p, ends, items, c, lane, sh)
                                           : stream_chunks(p, ends, items, c, warp, lane, sh);
  __syncthreads();
  deliver<TEAM>(p, sh.prepared[u % AHEAD].chunk, warp, lane, sh);
}
