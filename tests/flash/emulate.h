// Play a GPU on a CPU: the primitives of jgpt/model/attention/flash/primitives.cuh, so that g++ compiles the very kernels.
//
// Each thread of a block is a fiber with a stack of its own; one runs at a time. A fiber gives way where it must wait for
// others: at a barrier of the block, and at instructions that a warp executes together (mma, ldmatrix, shuffles). Who
// goes on next is drawn with a seed. So threads may run far ahead of each other, as far as the program's own barriers
// let them.
//
// Errors are found by bookkeeping, not by chance:
// - A race: shared memory that one thread writes and another reads or writes with no barrier between.
// - Shared memory that is read before it was written, or out of range, or at an address that is not a multiple of what
//   the instruction asks for. Global memory likewise; and a number of the results that is written twice.
// - Lanes of a warp that are at different instructions.

#ifndef EMULATE
#define EMULATE

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <string>
#include <vector>

#define DEVICE inline
#define UNROLL

typedef uint16_t Half;
struct Chunk {
    unsigned x, y, z, w;
};

namespace emulated {

constexpr int LANES = 32, STACK = 256 << 10;
constexpr unsigned SHARED_BEGIN = 1024;  // the address: not 0, so that an offset is not taken for one

struct Request {  // of a lane, for what its warp does together
    const char* instruction = nullptr;
    unsigned from = 0;
    unsigned* r = nullptr;
    const unsigned* a = nullptr;
    unsigned b = 0;
    float* c = nullptr;
    float x = 0;
    int lanes = 0;
};

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    std::vector<char> stack;
    bool started = false;
    Request request;
};

struct Range {  // of global memory
    const char* begin;
    size_t bytes;
    bool writable;
    std::vector<bool> written;
};

struct Word {  // what happened to 4 bytes of shared memory: in which stretch between two barriers, by which thread
    int write_stretch = -1, writer = -1, read_stretch = -1, reader = -1;
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<int> ready;
    std::vector<int> arrived;  // of each warp
    std::vector<Range> ranges;
    std::vector<Word> words;
    std::vector<Half> shared;
    jmp_buf scheduler;
    ucontext_t scheduler_context;
    int current = 0, threads = 0, at_barrier = 0, finished = 0, stretch = 0;
    int grid[3], block[3];
    uint64_t random = 1;
    std::string error;
    void (*body)(void*);
    void* argument;
};

inline Machine& machine() {
    static Machine m;
    return m;
}

inline void fail(const std::string& what) {
    Machine& m = machine();
    if (m.error.empty()) {
        char where[120];
        snprintf(where, sizeof where, " (block %d %d %d, thread %d)", m.block[0], m.block[1], m.block[2], m.current);
        m.error = what + where;
    }
}

inline void enter() {
    Machine& m = machine();
    m.body(m.argument);
    m.finished++;
    // The others may wait for a thread that has left: that is an error of the kernel, seen by nobody being ready.
    _longjmp(m.scheduler, 1);
}

// Let another fiber run. The present one is in `ready`, or somebody will put it there.
inline void give_way() {
    Machine& m = machine();
    if (_setjmp(m.fibers[m.current].at) == 0) _longjmp(m.scheduler, 1);
}

inline void wake(int thread) { machine().ready.push_back(thread); }

// Run a block's threads until all have finished, or no one can go on.
__attribute__((noinline)) inline void run_block() {
    Machine& m = machine();
    m.ready.clear();
    m.arrived.assign(m.threads / LANES, 0);
    m.at_barrier = m.finished = m.stretch = 0;
    m.words.assign(m.shared.size() / 2, Word());
    for (int i = 0; i < m.threads; i++) {
        Fiber& fiber = m.fibers[i];
        fiber.started = false;
        fiber.stack.resize(STACK);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
        wake(i);
    }
    _setjmp(m.scheduler);
    if (m.finished == m.threads) return;
    if (m.ready.empty()) {
        fail("threads wait for others that have left");
        return;
    }
    m.random = m.random * 6364136223846793005ull + 1442695040888963407ull;
    size_t pick = (m.random >> 33) % m.ready.size();
    m.current = m.ready[pick];
    m.ready[pick] = m.ready.back();
    m.ready.pop_back();
    Fiber& fiber = m.fibers[m.current];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

template <class Body>
void call_body(void* body) {
    (*static_cast<Body*>(body))();
}

// Run `body` in every thread of every block. Return whether no error was found.
template <class Body>
bool launch(int x, int y, int z, int threads, int shared_bytes, uint64_t seed, Body body) {
    Machine& m = machine();
    m.error.clear();
    m.threads = threads;
    m.random = seed;
    m.grid[0] = x, m.grid[1] = y, m.grid[2] = z;
    if (m.fibers.size() < static_cast<size_t>(threads)) m.fibers = std::vector<Fiber>(threads);
    m.shared.assign(shared_bytes / 2, 0x7e00);  // NaN
    m.body = call_body<Body>;
    m.argument = &body;
    for (m.block[2] = 0; m.block[2] < z; m.block[2]++)
        for (m.block[1] = 0; m.block[1] < y; m.block[1]++)
            for (m.block[0] = 0; m.block[0] < x; m.block[0]++) {
                run_block();
                if (!m.error.empty()) return false;
            }
    return true;
}

// Wait until all lanes of the warp are here with their requests; the last does the work of all.
template <class Work>
void together(const Request& request, Work work) {
    Machine& m = machine();
    int warp = m.current / LANES;
    m.fibers[m.current].request = request;
    if (++m.arrived[warp] < LANES) {
        give_way();
        return;
    }
    m.arrived[warp] = 0;
    Request* requests[LANES];
    for (int i = 0; i < LANES; i++) {
        requests[i] = &m.fibers[warp * LANES + i].request;
        if (strcmp(requests[i]->instruction, request.instruction))
            fail("lanes of a warp are at different instructions");
        if (warp * LANES + i != m.current) wake(warp * LANES + i);
    }
    work(requests, warp * LANES);
}

inline bool check_global(const void* at, size_t bytes, bool write) {
    Machine& m = machine();
    const char* p = static_cast<const char*>(at);
    if (reinterpret_cast<uintptr_t>(p) % bytes) {
        fail("global memory: an address that is not aligned");
        return false;
    }
    for (Range& range : m.ranges)
        if (p >= range.begin && p + bytes <= range.begin + range.bytes && range.writable == write) {
            if (write)
                for (size_t i = 0; i < bytes; i++) {
                    size_t place = p + i - range.begin;
                    if (range.written[place]) fail("global memory: a result is written twice");
                    range.written[place] = true;
                }
            return true;
        }
    fail(write ? "global memory: a write out of range" : "global memory: a read out of range");
    return false;
}

// Return where bytes of shared memory are, or nothing.
inline Half* check_shared(unsigned offset, unsigned bytes, bool write, int thread) {
    Machine& m = machine();
    if (offset < SHARED_BEGIN || offset - SHARED_BEGIN + bytes > m.shared.size() * 2) {
        fail("shared memory: out of range");
        return nullptr;
    }
    offset -= SHARED_BEGIN;
    if (offset % bytes) {
        fail("shared memory: an address that is not aligned");
        return nullptr;
    }
    for (unsigned i = 0; i < bytes / 4; i++) {
        Word& word = m.words[offset / 4 + i];
        if (word.write_stretch == m.stretch && word.writer != thread)
            fail(write ? "race: two threads write one place" : "race: read while another thread writes");
        if (write) {
            if (word.read_stretch == m.stretch && word.reader != thread)
                fail("race: written while another thread reads");
            word.write_stretch = m.stretch, word.writer = thread;
        } else {
            if (word.write_stretch < 0) fail("shared memory: read before it was written");
            bool others = word.read_stretch == m.stretch && word.reader != thread;
            word.read_stretch = m.stretch, word.reader = others ? -2 : thread;
        }
    }
    return m.shared.data() + offset / 2;
}

inline float to_float(Half bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    float magnitude;
    if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
    else if (exponent) {
        unsigned whole = (exponent + 112) << 23 | fraction << 13;
        memcpy(&magnitude, &whole, 4);
    } else magnitude = fraction * 5.9604644775390625e-08f;
    return sign ? -magnitude : magnitude;
}

inline Half to_half(float x) {  // to nearest, ties to even
    unsigned bits;
    memcpy(&bits, &x, 4);
    Half sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) return sign | static_cast<Half>(std::nearbyint(std::fabs(x) * 16777216.0f));
    bits += 0xfff + (bits >> 13 & 1);
    return sign | static_cast<Half>((bits - 0x38000000) >> 13);
}

inline float widened(Half bits) {
    static std::vector<float> table;
    if (table.empty())
        for (unsigned i = 0; i < 65536; i++) table.push_back(to_float(i));
    return table[bits];
}

inline void read_matrices(Request** requests, int first, bool transposed) {
    Half rows[4][8][8];
    for (int matrix = 0; matrix < 4; matrix++)
        for (int row = 0; row < 8; row++) {
            const Half* from = check_shared(requests[matrix * 8 + row]->from, 16, false, first + matrix * 8 + row);
            if (from) memcpy(rows[matrix][row], from, 16);
            else memset(rows[matrix][row], 0, 16);
        }
    for (int lane = 0; lane < LANES; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            unsigned both = 0;
            for (int e = 0; e < 2; e++) {
                int line = lane / 4, place = lane % 4 * 2 + e;
                Half x = transposed ? rows[matrix][place][line] : rows[matrix][line][place];
                both |= static_cast<unsigned>(x) << 16 * e;
            }
            requests[lane]->r[matrix] = both;
        }
}

inline void multiply_matrices(Request** requests) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < LANES; lane++)
        for (int e = 0; e < 2; e++) {
            int row = lane / 4, pair = lane % 4 * 2 + e;
            for (int half = 0; half < 2; half++)
                a[row + 8 * half][pair] = widened(requests[lane]->a[half] >> 16 * e & 0xffff);
            b[pair][row] = widened(requests[lane]->b >> 16 * e & 0xffff);
        }
    for (int lane = 0; lane < LANES; lane++)
        for (int e = 0; e < 4; e++) {
            int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            float sum = 0;
            for (int k = 0; k < 8; k++) sum += a[row][k] * b[k][column];
            requests[lane]->c[e] += sum;
        }
}

}  // namespace emulated

DEVICE int thread_index() { return emulated::machine().current; }
DEVICE int block_x() { return emulated::machine().block[0]; }
DEVICE int block_y() { return emulated::machine().block[1]; }
DEVICE int block_z() { return emulated::machine().block[2]; }
DEVICE int blocks_x() { return emulated::machine().grid[0]; }
DEVICE int blocks_y() { return emulated::machine().grid[1]; }

DEVICE void barrier() {
    emulated::Machine& m = emulated::machine();
    if (++m.at_barrier < m.threads) {
        emulated::give_way();
        return;
    }
    m.at_barrier = 0;
    m.stretch++;
    for (int i = 0; i < m.threads; i++)
        if (i != m.current) emulated::wake(i);
}

template <class T>
T emulated_load(const T* from) {
    return emulated::check_global(from, sizeof(T), false) ? *from : T{};
}
template <class T>
void emulated_store(T* to, T x) {
    if (emulated::check_global(to, sizeof(T), true)) *to = x;
}
DEVICE Chunk load_chunk(const Half* from, bool there) {
    return there ? emulated_load(reinterpret_cast<const Chunk*>(from)) : Chunk{};
}
DEVICE unsigned load_pair(const Half* from, bool there) {
    return there ? emulated_load(reinterpret_cast<const unsigned*>(from)) : 0;
}
DEVICE float load_float(const float* from, bool there) { return there ? emulated_load(from) : 0; }
DEVICE int load_int(const int* from, bool there) { return there ? emulated_load(from) : 0; }
DEVICE void store_chunk(Half* to, Chunk chunk) {
    if (emulated::check_global(to, sizeof(Chunk), true)) memcpy(to, &chunk, sizeof(Chunk));
}
DEVICE void store_pair(Half* to, unsigned pair) { emulated_store(reinterpret_cast<unsigned*>(to), pair); }
DEVICE void store_float(float* to, float x) { emulated_store(to, x); }

DEVICE unsigned shared_begin() { return emulated::SHARED_BEGIN; }
DEVICE void put_chunk(unsigned to, Chunk chunk) {
    if (Half* at = emulated::check_shared(to, 16, true, thread_index())) memcpy(at, &chunk, 16);
}
DEVICE void put_float(unsigned to, float x) {
    if (Half* at = emulated::check_shared(to, 4, true, thread_index())) memcpy(at, &x, 4);
}
DEVICE void get_floats(float (&two)[2], unsigned from) {
    if (Half* at = emulated::check_shared(from, 8, false, thread_index())) memcpy(two, at, 8);
}

DEVICE void load_matrices(unsigned (&r)[4], unsigned from) {
    emulated::Request request;
    request.instruction = "ldmatrix", request.from = from, request.r = r;
    emulated::together(request, [](emulated::Request** all, int first) { emulated::read_matrices(all, first, false); });
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], unsigned from) {
    emulated::Request request;
    request.instruction = "ldmatrix.trans", request.from = from, request.r = r;
    emulated::together(request, [](emulated::Request** all, int first) { emulated::read_matrices(all, first, true); });
}
DEVICE void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b) {
    emulated::Request request;
    request.instruction = "mma", request.a = a, request.b = b, request.c = c;
    emulated::together(request, [](emulated::Request** all, int) { emulated::multiply_matrices(all); });
}
DEVICE float shuffle_xor(float x, int lanes) {
    float result = 0;
    emulated::Request request;
    request.instruction = "shfl", request.x = x, request.lanes = lanes, request.c = &result;
    emulated::together(request, [](emulated::Request** all, int) {
        for (int i = 0; i < emulated::LANES; i++) *all[i]->c = all[i ^ all[i]->lanes]->x;
    });
    return result;
}

DEVICE bool any_lane(bool x) {
    float result = 0;
    emulated::Request request;
    request.instruction = "vote", request.x = x, request.c = &result;
    emulated::together(request, [](emulated::Request** all, int) {
        float any = 0;
        for (int i = 0; i < emulated::LANES; i++) any = all[i]->x ? 1.0f : any;
        for (int i = 0; i < emulated::LANES; i++) *all[i]->c = any;
    });
    return result != 0;
}

DEVICE unsigned pack(float low, float high) {
    return emulated::to_half(low) | static_cast<unsigned>(emulated::to_half(high)) << 16;
}
DEVICE void unpack(float (&two)[2], unsigned both) {
    two[0] = emulated::widened(both & 0xffff), two[1] = emulated::widened(both >> 16);
}
DEVICE float power_of_two(float x) { return exp2f(x); }
DEVICE float log_of_two(float x) { return log2f(x); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }

#endif
