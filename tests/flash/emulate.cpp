// The kernels of jgpt/model/attention/flash on an emulated GPU, for ctypes. SHAPES lists what to compile (see shapes.py).

#include "backward_kv.cu"
#include "backward_q.cu"
#include "forward.cu"

using emulated::launch;

// Arrays that follow: how many bytes each has, and whether the kernel writes it. Two names of one array are one range.
extern "C" void set_arrays(void** arrays, const long long* bytes, const int* writable, int count) {
    emulated::Machine& m = emulated::machine();
    m.ranges.clear();
    for (int i = 0; i < count; i++)
        m.ranges.push_back({static_cast<const char*>(arrays[i]), static_cast<size_t>(bytes[i]), writable[i] != 0,
                            std::vector<bool>(writable[i] ? bytes[i] : 0)});
}

extern "C" const char* error() { return emulated::machine().error.c_str(); }

#define H(i) static_cast<Half*>(p[i])
#define F(i) static_cast<float*>(p[i])
#define I(i) static_cast<int*>(p[i])

template <int WIDTH, int M, int WARPS, int N>
struct Run {
    static bool forward(void** p, const Layout& at, const int* grid, int shared, unsigned seed) {
        return launch(grid[0], grid[1], grid[2], 32 * WARPS, shared, seed,
                      [&] { ::forward<WIDTH, M, WARPS, N>(H(0), H(1), H(2), I(3), H(4), F(5), at); });
    }
    static bool backward_q(void** p, const Layout& at, const int* grid, int shared, unsigned seed) {
        return launch(grid[0], grid[1], grid[2], 32 * WARPS, shared, seed, [&] {
            ::backward_q<WIDTH, M, WARPS, N>(H(0), H(1), H(2), H(3), H(4), F(5), I(6), H(7), F(8), at);
        });
    }
    static bool backward_kv(void** p, const Layout& at, const int* grid, int shared, unsigned seed) {
        return launch(grid[0], grid[1], grid[2], 32 * WARPS, shared, seed, [&] {
            ::backward_kv<WIDTH, M, WARPS, N>(H(0), H(1), H(2), H(3), F(4), F(5), I(6), H(7), H(8), at);
        });
    }
};

// Run a kernel; return whether all went well.
extern "C" int emulate(const char* name, int width, void** arrays, const int* scalars, const int* grid, int shared,
                       unsigned seed) {
    Layout at;
    memcpy(&at, scalars, sizeof at);
#define SHAPE(KERNEL, WIDTH, M, WARPS, N)         \
    if (!strcmp(name, #KERNEL) && width == WIDTH) \
        return Run<WIDTH, M, WARPS, N>::KERNEL(arrays, at, grid, shared, seed);
    SHAPES
#undef SHAPE
    emulated::machine().error = "no such kernel";
    return 0;
}
