// A CUDA kernel on the host: the threads of a block are fibers that meet at warp and block operations; blocks run one
// after another, in the order given. KERNEL is the kernel's source without its inline PTX, which is defined here.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int min(int a, int b) { return b < a ? b : a; }
static int max(int a, int b) { return a < b ? b : a; }

struct Index {
  int x;
};
static Index threadIdx, blockIdx, gridDim;

struct Meeting {
  int wanted, arrived = 0, turn = 0;
};
static jmp_buf scheduler;  // jumps make no system calls, as ucontext's swaps do
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started;
};
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static Meeting block;
static int running, any_in_block;
static uint32_t exchanged[64][32][8];

static void yield() {
  if (!_setjmp(fibers[threadIdx.x].at)) _longjmp(scheduler, 1);
}

static void resume(int thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  Fiber& fiber = fibers[thread];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

static void meet(Meeting& m) {
  const int turn = m.turn;
  if (++m.arrived == m.wanted) {
    m.arrived = 0;
    m.turn++;
  } else {
    while (m.turn == turn) yield();
  }
}

static int lane_id() { return threadIdx.x % 32; }
static Meeting& warp() { return warps[threadIdx.x / 32]; }
static uint32_t (*lanes())[8] { return exchanged[threadIdx.x / 32]; }

template <class T>
static T from_lane(T v, int lane) {
  memcpy(lanes()[lane_id()], &v, sizeof(T));
  meet(warp());
  T out;
  memcpy(&out, lanes()[lane & 31], sizeof(T));
  meet(warp());
  return out;
}

static float __shfl_sync(unsigned, float v, int lane) { return from_lane(v, lane); }
static int __shfl_sync(unsigned, int v, int lane) { return from_lane(v, lane); }
static float __shfl_xor_sync(unsigned, float v, int d) { return from_lane(v, lane_id() ^ d); }
static int __shfl_up_sync(unsigned, int v, int d) {
  const int other = from_lane(v, lane_id() - d);
  return lane_id() >= d ? other : v;
}
static bool __any_sync(unsigned, bool v) {
  bool any = false;
  for (int i = 0; i < 32; i++) any |= from_lane(v, i);
  return any;
}
static void __syncwarp() { meet(warp()); }
static void __syncthreads() { meet(block); }
static int __syncthreads_or(int v) {
  any_in_block |= v;
  meet(block);
  const int any = any_in_block;
  meet(block);
  any_in_block = 0;
  meet(block);
  return any;
}
template <class T>
static T __ldcg(const T* p) {
  return *p;
}
template <class T>
static T __ldg(const T* p) {
  return *p;
}
template <class T>
static void __stcg(T* p, T v) {
  *p = v;
}
static int atomicMax(int* p, int v) {
  const int old = *p;
  *p = max(old, v);
  return old;
}
static int __float_as_int(float v) { return *reinterpret_cast<int*>(&v); }
static float __int_as_float(int v) { return *reinterpret_cast<float*>(&v); }
static unsigned __float_as_uint(float v) { return *reinterpret_cast<unsigned*>(&v); }
static float __uint_as_float(unsigned v) { return *reinterpret_cast<float*>(&v); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

// What the kernels write in PTX.
static uint4 stream(const void* p) {
  if ((uintptr_t)p % 16) {
    fprintf(stderr, "a load of 16 bytes at %p\n", p);
    abort();
  }
  uint4 v;
  memcpy(&v, p, 16);
  return v;
}

struct Barrier {
  int wanted, arrived, turn;
};
struct Copy {
  int* to;
  const int* from;
  Barrier* arrives;  // null: none yet
};
static std::vector<std::vector<Copy>> copies;  // of a thread. None is made before it has to be

static void copy(int* to, const int* from) { copies[threadIdx.x].push_back({to, from, nullptr}); }

static void copy(uint4* to, const void* from) {
  for (int i = 0; i < 4; i++) copy((int*)to + i, (const int*)from + i);
}

static void arrived() {
  for (auto& c : copies[threadIdx.x])
    if (c.from) *c.to = *c.from;
  std::erase_if(copies[threadIdx.x], [](auto& c) { return !c.arrives; });
}

static void open(Barrier& b, int arrivals) { b = {arrivals, 0, 0}; }

static void arrive(Barrier& b) {
  if (++b.arrived == b.wanted) {
    b.arrived = 0;
    b.turn++;
  }
}

static void arrive_with_copies(Barrier& b) {
  for (auto& c : copies[threadIdx.x])
    if (!c.arrives) c.arrives = &b;
  copies[threadIdx.x].push_back({nullptr, nullptr, &b});
}

static void wait(Barrier& b, int turn) {
  for (int tries = 0; (b.turn - turn) % 2 == 0; tries++) {
    yield();
    if (tries < 20) continue;
    for (auto& of_thread : copies) {
      for (auto& c : of_thread) {
        if (c.arrives != &b) continue;
        if (c.from) *c.to = *c.from;
        else arrive(b);
      }
      std::erase_if(of_thread, [&](auto& c) { return c.arrives == &b; });
    }
    tries = 0;
  }
}

static int count(int* counter) { return (*counter)++; }

static void hint(const void*) {}

static float exp_2(float x) { return exp2f(x); }

#if !ELSA_FP32
static uint16_t narrow(float v) {
#if ELSA_BF16
  unsigned bits;
  memcpy(&bits, &v, 4);
  return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
  const _Float16 h = (_Float16)v;
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
#endif
}

static float unpack(uint16_t bits) {
#if ELSA_BF16
  return __uint_as_float((unsigned)bits << 16);
#else
  _Float16 h;
  memcpy(&h, &bits, 2);
  return (float)h;
#endif
}

static unsigned pack(float first, float second) { return narrow(first) | (unsigned)narrow(second) << 16; }

#if ELSA_FP8
static float e4m3(unsigned b) {
  const unsigned e = b >> 3 & 15, m = b & 7;
  const float v = e == 15 && m == 7 ? NAN : e ? ldexpf(1.f + m / 8.f, (int)e - 7) : ldexpf(m / 8.f, -6);
  return b & 0x80 ? -v : v;
}

static unsigned widen(uint16_t two) { return pack(e4m3(two & 0xff), e4m3(two >> 8)); }
#endif

// Fragments as the PTX ISA has them: in a group of four lanes t is the lane, g the group.
static void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(lanes()[lane_id()], mine, sizeof(mine));
  meet(warp());
  const int g = lane_id() / 4, t = lane_id() % 4;
  float out[4];
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const unsigned a = lanes()[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned b = lanes()[col * 4 + k % 8 / 2][4 + k / 8];
      sum += (double)unpack(a >> k % 2 * 16) * unpack(b >> k % 2 * 16);
    }
    out[i] = sum;
#if ELSA_LINEAR  // counts on the tensor core's truncation
    if (fabs((double)out[i]) > fabs(sum)) out[i] = nextafterf(out[i], 0);
#endif
  }
  meet(warp());
  memcpy(c, out, sizeof(out));
}

static unsigned transposed(unsigned a) {
  lanes()[lane_id()][0] = a;
  meet(warp());
  const int g = lane_id() / 4, t = lane_id() % 4;
  const unsigned low = lanes()[8 * t + g / 2][0] >> g % 2 * 16 & 0xffff;
  const unsigned high = lanes()[8 * t + 4 + g / 2][0] >> g % 2 * 16 & 0xffff;
  meet(warp());
  return low | high << 16;
}
#endif

#if ELSA_LINEAR
static int atomicAdd(int* p, int v) {
  *p += v;
  return *p - v;
}
static double __shfl_xor_sync(unsigned, double v, int d) { return from_lane(v, lane_id() ^ d); }
static double __hiloint2double(int high, int low) {
  const uint64_t both = (uint64_t)high << 32 | (uint32_t)low;
  double v;
  memcpy(&v, &both, 8);
  return v;
}

static void stream(uint4& v, const void* p, bool wanted) {
  if (wanted) v = stream(p);
}
static void copy4(void* to, const void* from) { copy((int*)to, (const int*)from); }
static void copy16(float* to, const float* from, bool wanted) {
  static const int zeros[4] = {};
  copy((uint4*)to, wanted ? (const void*)from : zeros);
  if (ELSA_EAGER) arrived();
}
static void end_copies() { copies[threadIdx.x].push_back({nullptr, nullptr, nullptr}); }  // the mark of a group's end
template <int GROUPS>
static void await_copies() {
  auto& mine = copies[threadIdx.x];
  int groups = -GROUPS, made = 0;
  for (auto& c : mine) groups += !c.to;
  for (; groups > 0; made++) {
    if (mine[made].to) *mine[made].to = *mine[made].from;
    groups -= !mine[made].to;
  }
  mine.erase(mine.begin(), mine.begin() + made);
}
static void fetch(const unsigned short*, int) {}
static void let_kernel_behind_start() {}
static void wait_for_kernel_ahead() {}
template <class T>
static void only_now(T*&) {}

static float2 unpack(unsigned two) { return {unpack((uint16_t)two), unpack((uint16_t)(two >> 16))}; }
static void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  mma(c, a[0], a[1], a[2], a[3], b0, b1);
}
static void mma_from_zero(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  for (float& sum : c) sum = 0;
  mma(c, a, b0, b1);
}
#endif

#include KERNEL

static const Params* params;

static void thread() {
  ELSA_ENTRY(*params);
  running--;
  for (;;) yield();
}

// order: the blocks, as they run. seed: of which warps run for how long while the others stand still; 0: all in turn.
extern "C" void launch(const Params* p, int blocks, const int* order, unsigned seed) {
  std::mt19937 random(seed);
  constexpr int STACK = 1 << 17;
  params = p;
  gridDim.x = blocks;
  std::vector<std::vector<char>> stacks(THREADS, std::vector<char>(STACK));
  for (int b = 0; b < blocks; b++) {
    blockIdx.x = order[b];
    fibers.resize(THREADS);
    warps.assign(THREADS / 32, {32});
    block = {THREADS};
    copies.assign(THREADS, {});
    running = THREADS;
    any_in_block = 0;
    for (int i = 0; i < THREADS; i++) {
      fibers[i].started = false;
      getcontext(&fibers[i].start);
      fibers[i].start.uc_stack.ss_sp = stacks[i].data();
      fibers[i].start.uc_stack.ss_size = STACK;
      makecontext(&fibers[i].start, thread, 0);
    }
    while (running) {
      const unsigned awake = seed ? random() : ~0u;
      for (int turns = seed ? 1 << random() % 11 : 1; running && turns; turns--)
        for (int i = 0; i < THREADS; i++)
          if (awake >> i / 32 & 1) resume(i);
    }
  }
}
