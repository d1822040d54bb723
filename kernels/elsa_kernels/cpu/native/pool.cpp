// Threads of our own, jobs in the order of their submission, and the C interface that library.py calls.
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "attention.h"

namespace elsa {
namespace {

// Work in numbered tasks, each run once, by any thread, in any order.
struct Work {
    virtual ~Work() = default;
    virtual void run(int64_t task, Scratch &scratch) = 0;
    int64_t tasks = 0, handed_out = 0, finished = 0;  // under the pool's lock
    bool failed = false;                              // a task threw; the others ran
    std::chrono::steady_clock::time_point started, ended;
    bool idle() const { return finished == tasks; }
    double seconds() const { return std::chrono::duration<double>(ended - started).count(); }
};

constexpr int64_t MOST_AT_ONCE = 8;

class Pool {
  public:
    Pool(int threads, const Kernels &kernels) : kernels(kernels) {
        try {
            for (int i = 0; i < threads; ++i) scratch.emplace_back(new Scratch);
            for (int i = 0; i < threads; ++i) workers.emplace_back([this, i] { work(*scratch[i]); });
        } catch (...) {
            stop();
            throw;
        }
    }
    ~Pool() { stop(); }

    void submit(Work &work) {
        std::lock_guard<std::mutex> guard(lock);
        work.handed_out = work.finished = 0;
        work.failed = false;
        work.started = work.ended = std::chrono::steady_clock::now();
        if (work.tasks == 0) return;
        queue.push_back(&work);
        wake.notify_all();
    }
    void wait(Work &work) {
        std::unique_lock<std::mutex> guard(lock);
        done.wait(guard, [&] { return work.idle(); });
    }
    bool idle(const Work &work) {
        std::lock_guard<std::mutex> guard(lock);
        return work.idle();
    }

    const Kernels &kernels;

  private:
    void work(Scratch &own) {
        std::fesetenv(FE_DFL_ENV);  // subnormals are kept, whatever the creating thread had set
        std::unique_lock<std::mutex> guard(lock);
        while (true) {
            wake.wait(guard, [&] { return stopping || !queue.empty(); });
            if (queue.empty()) return;
            Work &job = *queue.front();
            // Neighbouring tasks in one hand, as long as that leaves enough for all: they lie side by side in memory.
            const int64_t fair = (job.tasks - job.handed_out) / (4 * static_cast<int64_t>(scratch.size()));
            const int64_t n = fair < 1 ? 1 : fair > MOST_AT_ONCE ? MOST_AT_ONCE : fair, first = job.handed_out;
            job.handed_out += n;
            if (job.handed_out == job.tasks) queue.pop_front();
            guard.unlock();
            const bool good = run(job, first, n, own);
            guard.lock();
            if (!good) job.failed = true;
            if ((job.finished += n) == job.tasks) {
                job.ended = std::chrono::steady_clock::now();
                done.notify_all();
            }
        }
    }
    // A task that throws ends neither its thread nor the process: its job is marked as failed.
    static bool run(Work &job, int64_t first, int64_t n, Scratch &own) {
        try {
            for (int64_t i = 0; i < n; ++i) job.run(first + i, own);
            return true;
        } catch (...) {
            return false;
        }
    }
    void stop() {
        {
            std::lock_guard<std::mutex> guard(lock);
            stopping = true;
        }
        wake.notify_all();
        for (auto &worker : workers) worker.join();
    }

    std::mutex lock;
    std::condition_variable wake, done;
    std::deque<Work *> queue;
    bool stopping = false;
    std::vector<std::unique_ptr<Scratch>> scratch;
    std::vector<std::thread> workers;
};

// A call: one task for each chunk that a block of rows sees, and the merge of a block by whoever finishes its last.
class Attention : public Work {
  public:
    explicit Attention(Pool &pool) : pool(pool) {}

    void prepare(const Problem &problem) {
        p = problem;
        tasks = floats = 0;
        blocks.clear();
        const int64_t rows = p.H / p.Hkv * p.Nq;
        for (int64_t batch = 0; batch < p.B; ++batch)
            for (int64_t head = 0; head < p.Hkv; ++head)
                for (int64_t row = 0; row < rows; row += MAX_ROWS)
                    add_block(batch, head, row, rows - row < MAX_ROWS ? rows - row : MAX_ROWS);
        if (left_size < blocks.size()) {
            left.reset(new std::atomic<int64_t>[blocks.size()]);
            left_size = blocks.size();
        }
        for (size_t i = 0; i < blocks.size(); ++i) left[i].store(blocks[i].chunks, std::memory_order_relaxed);
        if (workspace_size < floats) {
            workspace.reset();
            workspace_size = 0;
            workspace.reset(new float[floats]);
            workspace_size = floats;
        }
        handed_out = 0;
        finished = tasks;  // idle until it is submitted
    }

    // A call that could not be prepared has nothing to wait for.
    void clear_tasks() { tasks = handed_out = finished = 0; }

    void run(int64_t task, Scratch &scratch) override {
        const size_t index = find(task);
        const Entry &entry = blocks[index];
        const int64_t i = task - entry.task, chunk = entry.chunk + i;
        if (entry.block.first < entry.block.end)
            pool.kernels.attend(p, entry.block, chunk, states(entry, i), scratch);
        else
            clear(states(entry, i), entry.block.rows);
        if (left[index].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(entry);
    }

    Pool &pool;

  private:
    struct Entry {
        Block block;
        int64_t chunk, chunks;  // first chunk, and how many
        int64_t task, offset;   // of the first chunk's task and states
    };

    void add_block(int64_t batch, int64_t head, int64_t row, int64_t rows) {
        Block block = {batch, head, row, rows, p.Nk, 0};
        for (int64_t r = row; r < row + rows; ++r) {
            const Keys seen = visible_keys(p, batch, r % p.Nq);
            if (seen.lo >= seen.hi) continue;
            if (seen.lo < block.first) block.first = seen.lo;
            if (seen.hi > block.end) block.end = seen.hi;
        }
        Entry entry = {block, 0, 1, tasks, floats};
        if (block.first < block.end) {
            entry.chunk = block.first / CHUNK;
            entry.chunks = (block.end + CHUNK - 1) / CHUNK - entry.chunk;
        }
        blocks.push_back(entry);
        tasks += entry.chunks;
        floats += entry.chunks * rows * (p.D + 2);
    }

    size_t find(int64_t task) const {
        size_t lo = 0, hi = blocks.size();
        while (hi - lo > 1) {
            const size_t middle = (lo + hi) / 2;
            (blocks[middle].task <= task ? lo : hi) = middle;
        }
        return lo;
    }

    States states(const Entry &entry, int64_t i) const {
        const int64_t rows = entry.block.rows;
        float *at = workspace.get() + entry.offset + i * rows * (p.D + 2);
        return {at, at + rows * p.D, at + rows * (p.D + 1)};
    }

    void clear(States s, int64_t rows) const {
        for (int64_t i = 0; i < rows * p.D; ++i) s.W[i] = 0.0f;
        for (int64_t r = 0; r < rows; ++r) s.m[r] = -__builtin_inff(), s.S[r] = 0.0f;
    }

    // Merges the chunks [first, first + span) of the absolute tree, into the earliest that exists; its index, or −1.
    int64_t merge(const Entry &entry, int64_t first, int64_t span) const {
        if (first >= entry.chunk + entry.chunks || first + span <= entry.chunk) return -1;
        if (span == 1) return first - entry.chunk;
        const int64_t a = merge(entry, first, span / 2), b = merge(entry, first + span / 2, span / 2);
        if (a < 0 || b < 0) return a < 0 ? b : a;
        pool.kernels.merge(states(entry, a), states(entry, b), entry.block.rows, p.D);
        return a;
    }

    void finish(const Entry &entry) const {
        int64_t span = 1;
        while (span < entry.chunk + entry.chunks) span *= 2;
        const States s = states(entry, merge(entry, 0, span));
        const int64_t group = p.H / p.Hkv;
        for (int64_t r = 0; r < entry.block.rows; ++r) {
            const int64_t row = entry.block.row + r, head = entry.block.head * group + row / p.Nq;
            const int64_t to = (entry.block.batch * p.H + head) * p.Nq + row % p.Nq;
            float *W = p.W + to * p.D;
            for (int64_t d = 0; d < p.D; ++d) W[d] = s.W[r * p.D + d];
            p.m[to] = s.m[r];
            p.S[to] = s.S[r];
            if (p.sinks) {
                float m = p.sinks[head], S = m == -__builtin_inff() ? 0.0f : 1.0f;
                std::vector<float> none(p.D, 0.0f);
                pool.kernels.merge({W, p.m + to, p.S + to}, {none.data(), &m, &S}, 1, p.D);
            }
        }
    }

    Problem p{};
    std::vector<Entry> blocks;
    std::unique_ptr<std::atomic<int64_t>[]> left;  // of each block: chunks not finished
    std::unique_ptr<float[]> workspace;
    size_t left_size = 0;
    int64_t workspace_size = 0, floats = 0;
};

class Read : public Work {
  public:
    Read(Pool &pool, const char *data, int64_t bytes) : pool(pool), data(data), bytes(bytes) {
        tasks = (bytes + STEP - 1) / STEP;
    }
    void run(int64_t task, Scratch &) override {
        const int64_t from = task * STEP, left = bytes - from;
        seen.fetch_xor(pool.kernels.read(data + from, left < STEP ? left : STEP), std::memory_order_relaxed);
    }
    std::atomic<uint64_t> seen{0};

  private:
    static constexpr int64_t STEP = 256 * 1024;
    Pool &pool;
    const char *data;
    int64_t bytes;
};

const Kernels *kernels_of(int level) {
    if (level == 0) return &portable_kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (level == 1 && avx2) return &avx2_kernels;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (level == 2 && avx2 && avx512) return &avx512_kernels;
#endif
    return nullptr;
}

enum Status { DONE = 0, BUSY = 1, NO_MEMORY = 2, FAILED = 3 };

}  // namespace
}  // namespace elsa

using namespace elsa;

extern "C" {

int64_t elsa_problem_size() { return sizeof(Problem); }

int elsa_level_works(int level) { return kernels_of(level) != nullptr; }

// Null if threads or memory are short.
void *elsa_pool_new(int threads, int level) {
    try {
        return new Pool(threads, *kernels_of(level));
    } catch (...) {
        return nullptr;
    }
}

// Waits for the work that was submitted.
void elsa_pool_free(void *pool) { delete static_cast<Pool *>(pool); }

void *elsa_job_new(void *pool) { return new (std::nothrow) Attention(*static_cast<Pool *>(pool)); }

// Not while it is under way.
void elsa_job_free(void *job) { delete static_cast<Attention *>(job); }

// Starts the job and returns. The problem is copied; what it points at must stay until the job is done.
int elsa_job_submit(void *job, const Problem *problem) {
    Attention &work = *static_cast<Attention *>(job);
    if (!work.pool.idle(work)) return BUSY;
    try {
        work.prepare(*problem);
    } catch (...) {
        work.clear_tasks();
        return NO_MEMORY;
    }
    work.pool.submit(work);
    return DONE;
}

// DONE, or FAILED where a task threw.
int elsa_job_wait(void *job) {
    Attention &work = *static_cast<Attention *>(job);
    work.pool.wait(work);
    return work.failed ? FAILED : DONE;
}

int elsa_job_done(void *job) {
    Attention &work = *static_cast<Attention *>(job);
    return work.pool.idle(work);
}

// One call as a GPU's stream starts it and waits for it. `status` and `seconds` are written by the join.
struct Launch {
    void *job;
    const Problem *problem;
    int32_t status;
    double seconds;  // from the submission to the end of the last task
};

struct Launches {
    Launch *items;
    int64_t count;
};

// These two have the signature that cudaLaunchHostFunc takes.
void elsa_launch(void *launches) {
    Launches &all = *static_cast<Launches *>(launches);
    for (Launch *l = all.items; l != all.items + all.count; ++l) l->status = elsa_job_submit(l->job, l->problem);
}

void elsa_join(void *launches) {
    Launches &all = *static_cast<Launches *>(launches);
    for (Launch *l = all.items; l != all.items + all.count; ++l) {
        if (l->status != DONE) continue;
        l->status = elsa_job_wait(l->job);
        l->seconds = static_cast<Attention *>(l->job)->seconds();
    }
}

// Reads a buffer once with all threads of the pool; the seconds that took.
double elsa_read(void *pool, const void *data, int64_t bytes) {
    Pool &threads = *static_cast<Pool *>(pool);
    Read work(threads, static_cast<const char *>(data), bytes);
    const auto started = std::chrono::steady_clock::now();
    threads.submit(work);
    threads.wait(work);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}
}
