// The instructions of the GPU that the kernels use, each as a function. tests/flash/emulate.h has the same for a CPU.

#ifndef FLASH_PRIMITIVES
#define FLASH_PRIMITIVES

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

typedef unsigned short Half;  // the bits of an fp16 number
typedef uint4 Chunk;          // 8 of them

extern __shared__ __align__(128) Half shared_memory[];

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE int blocks_y() { return gridDim.y; }
DEVICE void barrier() { __syncthreads(); }

// Global memory.
DEVICE Chunk load_chunk(const Half* from) { return __ldg(reinterpret_cast<const Chunk*>(from)); }
DEVICE unsigned load_pair(const Half* from) { return __ldg(reinterpret_cast<const unsigned*>(from)); }
DEVICE float load_float(const float* from) { return __ldg(from); }
DEVICE int load_int(const int* from) { return __ldg(from); }
DEVICE void store_pair(Half* to, unsigned pair) { *reinterpret_cast<unsigned*>(to) = pair; }
DEVICE void store_float(float* to, float x) { *to = x; }

// Shared memory.
DEVICE unsigned shared_address(const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }
DEVICE void put_chunk(Half* to, Chunk chunk) { *reinterpret_cast<Chunk*>(to) = chunk; }
DEVICE void put_float(float* to, float x) { *to = x; }
DEVICE void get_floats(float (&two)[2], const float* from) {  // from a multiple of 8 bytes
    float2 both = *reinterpret_cast<const float2*>(from);
    two[0] = both.x, two[1] = both.y;
}

// Read four matrices of 8 x 8 fp16 numbers. Lane l gives the address of row l % 8 of matrix l / 8, and gets numbers
// 2 (l % 4) and the next of row l / 4 of each; or of the column instead.
DEVICE void load_matrices(unsigned (&r)[4], const Half* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(from)) : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], const Half* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(from)) : "memory");
}

// c += a b on the tensor cores.
DEVICE void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Numbers.
DEVICE unsigned pack(float low, float high) {  // two fp16 numbers, rounded to nearest even
    unsigned both;
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }" : "=r"(both) : "f"(low), "f"(high));
    return both;
}
DEVICE void unpack(float (&two)[2], unsigned both) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(two[0]), "=f"(two[1]) : "r"(both));
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

#endif
