// The instructions of the GPU that the kernels use, each as a function. tests/flash/emulate.h has the same for a CPU.

#ifndef FLASH_PRIMITIVES
#define FLASH_PRIMITIVES

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

typedef unsigned short Half;  // the bits of an fp16 number
typedef uint4 Chunk;          // 8 of them

extern __shared__ __align__(128) Half shared_memory[];

// Which thread and block this is. "volatile": read again at each call, so that what follows from it takes no register
// between two calls.
DEVICE int thread_index() {
    int i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    return i;
}
DEVICE int block_x() {
    int x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}
DEVICE int block_y() {
    int y;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
    return y;
}
DEVICE int block_z() {
    int z;
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
    return z;
}
DEVICE int blocks_x() { return gridDim.x; }
DEVICE int blocks_y() { return gridDim.y; }
DEVICE void barrier() { __syncthreads(); }

// Global memory. What is not `there` is 0 and is not read: without a branch, so that loads can be moved.
DEVICE Chunk load_chunk(const Half* from, bool there) {
    Chunk x;
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        " @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(from), "r"(static_cast<int>(there)));
    return x;
}
DEVICE unsigned load_word(const void* from, bool there) {
    unsigned x;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1]; }"
                 : "=&r"(x)
                 : "l"(from), "r"(static_cast<int>(there)));
    return x;
}
DEVICE unsigned load_pair(const Half* from, bool there) { return load_word(from, there); }
DEVICE float load_float(const float* from, bool there) { return __uint_as_float(load_word(from, there)); }
DEVICE int load_int(const int* from, bool there) { return static_cast<int>(load_word(from, there)); }
DEVICE void store_pair(Half* to, unsigned pair) { *reinterpret_cast<unsigned*>(to) = pair; }
DEVICE void store_float(float* to, float x) { *to = x; }

// Shared memory, by addresses of 32 bits.
DEVICE unsigned shared_begin() { return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory)); }
DEVICE void put_chunk(unsigned to, Chunk x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
DEVICE void put_float(unsigned to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
DEVICE void get_floats(float (&two)[2], unsigned from) {  // from a multiple of 8 bytes
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two[0]), "=f"(two[1]) : "r"(from) : "memory");
}

// Read four matrices of 8 x 8 fp16 numbers. Lane l gives the address of row l % 8 of matrix l / 8, and gets numbers
// 2 (l % 4) and the next of row l / 4 of each; or of the column instead.
DEVICE void load_matrices(unsigned (&r)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// c += a b on the tensor cores.
DEVICE void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Numbers.
DEVICE unsigned pack(float low, float high) {  // two fp16 numbers, rounded to nearest even
    unsigned both;
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(both)
        : "f"(low), "f"(high));
    return both;
}
DEVICE void unpack(float (&two)[2], unsigned both) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(two[0]), "=f"(two[1])
        : "r"(both));
}
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log_of_two(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

#endif
