// Attention of up to ROWS packed rows (queries × heads of a group) over a paged KV with D = 128, in one launch. sm_80 and
// newer, compiled by NVRTC, with the tiles of paged_tiles_half.cu or paged_tiles_fp32.cu.
//
// K and V go from global memory straight into the registers of the products. So a warp has the next tiles in flight
// whenever it computes, and needs nobody: warps meet once a chunk, and while they do, each has the first tiles of the
// next chunk in flight.
//
// A sequence's keys are cut into chunks, counted from key 0, of a size that follows from their number (`chunk_of`); of a
// chunk's tiles warp w takes every WARPS-th, STEP at a time.
// The warps' states merge to the chunk's, up to FAN chunks' to a node's, nodes' to the sequence's, always in the order of
// positions. Who merges is whom an integer counter names last, or, in calls that would need much memory for chunks
// (`whole_nodes`), the block that has computed all chunks of the node; the sums are the same ones. Bits depend on the
// sequence alone.
//
// Needs: ELSA_FP32 and ELSA_BF16 (both 0 for FP16), ELSA_FP8 (of the caches, 16-bit queries), ELSA_ROWS, ELSA_GROUP,
// ELSA_PAGE (a multiple of 16), ELSA_WARPS, ELSA_CHUNK, ELSA_LONGEST, ELSA_STEP, ELSA_MIN_BLOCKS.

constexpr int WARPS = ELSA_WARPS, CHUNK = ELSA_CHUNK, THREADS = 32 * WARPS, GROUP = ELSA_GROUP, PAGE = ELSA_PAGE;
constexpr int D = 128, ROWS = ELSA_ROWS, FAN = 32, TILE = ELSA_FP32 ? 8 : 16;
constexpr int STEP = ELSA_STEP;  // tiles that a warp multiplies at a time
constexpr int PITCH = D + 4;  // of a row in shared memory
constexpr int LONGEST = ELSA_LONGEST;  // of all chunks
static_assert(CHUNK / 2 % (TILE * WARPS * STEP) == 0 && LONGEST % CHUNK == 0, "whole steps of all warps");
static_assert(LONGEST <= 32 * TILE * WARPS, "a lane asks for the page of each of its warp's tiles");
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

__device__ __forceinline__ void copy(int* to, const int* from) {  // into shared memory, until `arrived`
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void prefetch(const void* p) {  // 128 bytes
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
  int first_item;      // of the sequence, over all heads
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Keys of the chunks of a sequence of so many keys: short ones are cut for one sequence to occupy many multiprocessors,
// long ones for fewer ends of chunks. As `Form.chunk_of`.
__device__ __forceinline__ int chunk_of(int keys) {
  if (keys > CHUNK && keys < 8 * CHUNK) return CHUNK / 2;
  return keys >= 64 * CHUNK ? LONGEST : CHUNK;
}

// Items of sequence s: chunks, or nodes of FAN chunks; 0 where the sequence is not of this launch.
__device__ __forceinline__ int items_of(const Params& p, int s) {
  const int q0 = p.cu[s], keys = p.used[s], rows = (p.cu[s + 1] - q0) * GROUP;
  const int items = max(divide_up(keys, chunk_of(keys) * (p.whole_nodes ? FAN : 1)), 1);
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
  c.size = chunk_of(c.keys);
  c.chunks = max(divide_up(c.keys, c.size), 1);
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

__device__ __forceinline__ i64 place_of(const Chunk& c, int row, i64 token_stride, i64 head_stride) {
  return (c.q0 + row / GROUP) * token_stride + (c.head * GROUP + row % GROUP) * head_stride;
}

// What a warp leaves of a chunk.
struct Left {
  alignas(16) float w[ROWS][PITCH];
  float m[ROWS], l[ROWS];
};

// How many tiles of a chunk warp `warp` has.
__device__ __forceinline__ int tiles_of(const Chunk& c, int warp) {
  const int keys = min(c.keys - c.at * c.size, c.size) - TILE * warp;
  return keys > 0 ? divide_up(keys, TILE * WARPS) : 0;
}

// A chunk that a warp is about to read: of each of the warp's tiles the page, in shared memory.
struct Ahead {
  const int* pages;
  int tiles;
};

// Asks for the pages of a warp's tiles; they are there when each lane has `arrived` and the warp has met.
__device__ __forceinline__ Ahead look(const Params& p, const Chunk& c, int* pages, int warp, int lane) {
  const int place = (c.at * c.size + TILE * (warp + WARPS * lane)) / PAGE, tiles = tiles_of(c, warp);
  if (lane < tiles) {
    if (place < p.table_width) copy(pages + lane, p.table + c.s * p.table_row + place);
    else pages[lane] = 0;
  }
  return {pages, tiles};
}

// What a head's logits (times log2(e)) and values are to be multiplied by.
__device__ __forceinline__ float scale_of(const Params& p, int head) {
  return ELSA_FP8 && p.k_scale ? p.scale * p.k_scale[p.k_scales ? head : 0] : p.scale;
}
__device__ __forceinline__ float factor_of(const Params& p, int head) {
  return ELSA_FP8 && p.v_scale ? p.v_scale[p.v_scales ? head : 0] : 1.f;
}

#include TILES  // put in its place by the launcher

// Asks for the tiles of the warp's first step in chunk c.
__device__ __forceinline__ void load_first(const Params& p, Tile& tile, const Chunk& c, const Ahead& a, int warp, int lane) {
  arrived();
  __syncwarp();
#pragma unroll
  for (int h = 0; h < STEP; h++)
    if (h < a.tiles) load_k(p, tile, h, a.pages[h], c.at * c.size + TILE * (warp + WARPS * h), c.head, lane);
#pragma unroll
  for (int h = 0; h < STEP; h++)
    if (h < a.tiles) load_v(p, tile, h, a.pages[h], c.at * c.size + TILE * (warp + WARPS * h), c.head, lane);
}

// A warp's tiles of chunk c, the first of which are in `tile` or on their way; at the end the next chunk's first ones are.
__device__ __forceinline__ void walk(const Params& p, const Chunk& c, const Ahead& here, const Chunk& next,
                                     const Ahead& ahead, const Query& q, int warp, int lane, Scratch& scratch,
                                     Tile& tile, Rows& rows) {
  const int plain = p.causal ? min(c.keys, c.start + 1) : c.keys;  // all rows see the keys before it
  const float scale = scale_of(p, c.head);
  clear(rows);
  if (here.tiles == 0 && ahead.tiles) load_first(p, tile, next, ahead, warp, lane);
  int key = c.at * c.size + TILE * warp;
  for (int i = 0; i < here.tiles; i += STEP) {
    const bool inside = i + STEP < here.tiles;
    const int more = inside ? here.tiles - i - STEP : ahead.tiles;  // tiles that may be asked for
    if (!inside) {
      arrived();
      __syncwarp();
    }
    const int* pages = inside ? here.pages + i + STEP : ahead.pages;
    int page[STEP];
#pragma unroll
    for (int h = 0; h < STEP; h++) page[h] = h < more ? pages[h] : 0;
    Logits s;
    products(tile, q, lane, scale, s);
#pragma unroll
    for (int h = 0; h < STEP; h++)
      if (key + TILE * WARPS * h + TILE > plain) hide(p, c, h, key + TILE * WARPS * h, lane, s, tile);
    key = inside ? key + STEP * TILE * WARPS : next.at * next.size + TILE * warp;
    const int head = inside ? c.head : next.head;
#pragma unroll
    for (int h = 0; h < STEP; h++)
      if (h < more) load_k(p, tile, h, page[h], key + TILE * WARPS * h, head, lane);
    weigh(s, rows, i / STEP, lane, scratch, tile);
#pragma unroll
    for (int h = 0; h < STEP; h++)
      if (h < more) load_v(p, tile, h, page[h], key + TILE * WARPS * h, head, lane);
  }
}

struct Shared {
  Query q[2];  // of this item and of the next in turn
  Left left[WARPS];
  Scratch scratch[WARPS];
  Chunk chunk[2][WARPS];  // a warp's copy of this chunk's description and of the next one's, in turn
  int pages[2][WARPS][32];  // likewise, of each of a warp's tiles
  int room[WARPS], answer;
};

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

// The chunk again, a row a warp: in a tile's product a hidden key's weight 0 meets its ∞ and NaN, here it is left out,
// as is a key with logit −∞. Leaves the state of every row as that of warp 0, the other warps' empty.
__device__ __noinline__ void careful(const Params& p, const Chunk& c, Shared& sh, int warp, int lane) {
  const int lo = c.at * c.size, end = min(c.keys, lo + c.size);
  const float scale = scale_of(p, c.head);
  for (int row = warp; row < c.rows; row += WARPS) {
    float q[D / 32], w[D / 32] = {}, m = minus_infinity(), l = 0.f;
    for (int i = 0; i < D / 32; i++) q[i] = unpack(p.q[place_of(c, row, p.q_token, p.q_head) + lane + 32 * i]);
    const int seen = p.causal ? min(end, c.start + row / GROUP + 1) : end;
    for (int key = lo; key < seen; key++) {
      const i64 page = p.table[c.s * p.table_row + key / PAGE];
      const cell* k = p.k + page * p.k_block + key % PAGE * p.k_place + c.head * p.k_head;
      const cell* v = p.v + page * p.v_block + key % PAGE * p.v_place + c.head * p.v_head;
      float s = 0.f;
      for (int i = 0; i < D / 32; i++) s = fmaf(q[i], unpack(k[lane + 32 * i]), s);
      for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
      s *= scale;
      if (s == minus_infinity()) continue;
      const float top = fmaxf(m, s), decay = exp_2(m - top), e = exp_2(s - top);
      m = top;
      l = fmaf(l, decay, e);
      for (int i = 0; i < D / 32; i++) w[i] = fmaf(w[i], decay, e * unpack(v[lane + 32 * i]));
    }
    for (int of = 0; of < WARPS; of++) {
      if (lane == 0) sh.left[of].m[row] = of ? minus_infinity() : m, sh.left[of].l[row] = of ? 0.f : l;
      for (int i = 0; i < D / 32; i++) sh.left[of].w[row][lane + 32 * i] = of ? 0.f : w[i];
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
  float4 out = make_float4(x.w.x / l, x.w.y / l, x.w.z / l, x.w.w / l);
  if (ELSA_FP8) out = scaled(out, factor_of(p, c.head));
  write(p.out + place_of(c, row, p.out_token, p.out_head) + 4 * lane, out);
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

// Of a row's states in n slots, `step` apart, those at even or at odd places (`half`), as one, under a maximum and a sum
// that are all states'. 32 at a time: lane j has the weight of the j-th.
__device__ __forceinline__ State merge_half(const Params& p, i64 slot, i64 step, int n, int half, int row, int lane) {
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
    const float4* from = reinterpret_cast<const float4*>(p.state_w + at * D) + lane;
    float weight = 0.f;
    for (int j = half; j < count; j += 2 * AT_ONCE) {
      float4 w[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        w[i] = j + 2 * i < count ? __ldcg(from + (j + 2 * i) * stride * (D / 4)) : make_float4(0.f, 0.f, 0.f, 0.f);
      if (j == half) {  // while those are on their way
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
        x.w = scaled(x.w, decay);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) add(x.w, __shfl_sync(~0u, weight, j + 2 * i), w[i]);
    }
  }
  return x;
}

// The states of n slots as one, row by row, two warps a row: `take(row, state)` gets it.
template <class Take>
__device__ __forceinline__ void merge(const Params& p, i64 slot, i64 step, int n, int rows, int warp, int lane,
                                      Shared& sh, Take take) {
  for (int first = 0; first < rows; first += WARPS / 2) {
    const int row = first + warp / 2, half = warp % 2;
    State x;
    if (row < rows) x = merge_half(p, slot, step, n, half, row, lane);
    float4* other = reinterpret_cast<float4*>(&sh.left[warp / 2].w[0][4 * lane]);
    if (row < rows && half) *other = x.w;
    __syncthreads();
    if (row < rows && !half) {
      add(x.w, 1.f, *other);
      take(row, x);
    }
    __syncthreads();
  }
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

__device__ __forceinline__ int node_of(const Chunk& c) { return c.at / FAN; }
__device__ __forceinline__ int nodes_of(const Chunk& c) { return divide_up(c.chunks, FAN); }
__device__ __forceinline__ int chunks_in_node(const Chunk& c) { return min(FAN, c.chunks - node_of(c) * FAN); }

// The slots of a node's chunks begin here and are `slot_step` apart.
__device__ __forceinline__ i64 first_slot(const Params& p, const Chunk& c) {
  return p.whole_nodes ? (i64)blockIdx.x * FAN : ((i64)c.first_item + node_of(c) * FAN) * p.Hkv + c.head;
}
__device__ __forceinline__ i64 slot_step(const Params& p) { return p.whole_nodes ? 1 : p.Hkv; }

// Merges the node of a chunk, all of whose chunks are there, and the nodes, if this was the last.
__device__ __forceinline__ void complete(const Params& p, const Chunk& c, int warp, int lane, Shared& sh) {
  const int nodes = nodes_of(c);
  // Nodes of a sequence follow one another; sequences that begin within the same FAN items are told apart by s.
  const i64 first = p.nodes0 + (p.whole_nodes ? c.first_item : c.first_item / FAN + c.s) * (i64)p.Hkv + c.head;
  merge(p, first_slot(p, c), slot_step(p), chunks_in_node(c), c.rows, warp, lane, sh, [&](int row, const State& x) {
    if (nodes == 1) finish(p, c, row, lane, x);
    else put(p, first + (i64)node_of(c) * p.Hkv, row, lane, x);
  });
  if (nodes == 1 || !arrives_last(p.counters + c.s * p.Hkv + c.head, nodes, sh)) return;
  merge(p, first, p.Hkv, nodes, c.rows, warp, lane, sh,
        [&](int row, const State& x) { finish(p, c, row, lane, x); });
}

// The warps' states of a chunk are in shared memory: takes their sum to its place, and merges what is complete by it.
__device__ __forceinline__ void deliver(const Params& p, const Chunk& c, int warp, int lane, Shared& sh) {
  const i64 slot = first_slot(p, c);
  for (int row = warp; row < c.rows; row += WARPS) {
    const State x = gather(sh, row, lane);
    if (c.chunks == 1) finish(p, c, row, lane, x);
    else put(p, slot + c.at % FAN * slot_step(p), row, lane, x);
  }
  if (c.chunks == 1 || (p.whole_nodes && c.at != c.last)) return;
  bool last = true;
  if (p.whole_nodes) {
    __threadfence_block();
    __syncthreads();
  } else {
    last = arrives_last(p.node_counters + slot, chunks_in_node(c), sh);
  }
  if (last) complete(p, c, warp, lane, sh);
}

extern "C" __global__ void __launch_bounds__(THREADS, ELSA_MIN_BLOCKS) paged_decode(const __grid_constant__ Params p) {
  __shared__ Shared sh;
  extern __shared__ int ends[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (p.B == 1 && threadIdx.x == 0)  // what the first loads of the only sequence wait for: a part of it each block
    for (int place = 32 * blockIdx.x; place < p.table_width; place += 32 * gridDim.x) prefetch(p.table + place);
  const int items = (p.B == 1 ? items_of(p, 0) : sum_items(p, ends, sh.room)) * p.Hkv;
  if ((int)blockIdx.x >= items) return;
  int turn = 0, q_turn = 0;
  describe(sh.chunk[0][warp], first_chunk(p, ends, blockIdx.x), lane);
  Ahead ahead = look(p, sh.chunk[0][warp], sh.pages[0][warp], warp, lane);
  Tile tile;
  if (ahead.tiles) load_first(p, tile, sh.chunk[0][warp], ahead, warp, lane);
  load_q(p, sh.chunk[0][warp], sh.q[0]);
  __syncthreads();
  for (bool more = true; more; turn ^= 1) {
    const Chunk& now = sh.chunk[turn][warp];
    Chunk& next = sh.chunk[turn ^ 1][warp];
    const Ahead here = ahead;
    more = now.at < now.last || now.item + (int)gridDim.x < items;
    ahead = {nullptr, 0};
    if (more) {
      describe(next, now.at < now.last ? following(now) : first_chunk(p, ends, now.item + gridDim.x), lane);
      ahead = look(p, next, sh.pages[turn ^ 1][warp], warp, lane);
    }
    Rows rows;
    walk(p, now, here, next, ahead, sh.q[q_turn], warp, lane, sh.scratch[warp], tile, rows);
    if (__syncthreads_or(leave(rows, sh.left[warp], lane))) {
      careful(p, now, sh, warp, lane);
      __syncthreads();
    }
    if (more && next.item != now.item) {
      q_turn ^= 1;
      load_q(p, next, sh.q[q_turn]);
    }
    deliver(p, now, warp, lane, sh);
    __syncthreads();  // the warps' states have been read, and the next Q is there
  }
}
