// What the three kernels share: tiles of keys or queries in shared memory, and fragments of them in registers.
//
// A tile is `ROWS` rows of `H` fp16 numbers. A row is cut into chunks of 8 numbers (16 bytes). The chunks of a row are
// stored in an order that depends on the row (`place`): the 8 rows that ldmatrix reads at once then lie in 8 different
// groups of memory banks.
//
// The tensor cores' instruction is mma.m16n8k8: C[16, 8] += A[16, 8] B[8, 8], fp16 factors and fp32 sums. Of each matrix
// a lane (a thread of the warp) holds these numbers (PTX ISA, "Matrix Fragments for mma.m16n8k8"):
//   A: row lane/4, columns 2*(lane%4) and the next, then the same 8 rows below
//   B: rows 2*(lane%4) and the next, column lane/4
//   C: row lane/4, columns 2*(lane%4) and the next, then the same 8 rows below
// So C, rounded to fp16, is A of the next product, with no exchange between lanes.

#ifndef FLASH_TILES
#define FLASH_TILES

#ifdef FLASH_EMULATED
#include "emulate.h"  // the same primitives, played by a CPU
#else
#include "primitives.cuh"
#endif

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MASKED = -1e30f;  // below every product of fp16 vectors, and not infinite: a difference of two is 0

template <int H>  // H ** -0.5: the scores' factor
constexpr float INVERSE_ROOT = H == 32   ? 0.17677669529663687f
                               : H == 64 ? 0.125f
                               : H == 96 ? 0.10206207261596575f
                                         : 0.08838834764831845f;

// Where q, k and v lie. All offsets are in numbers, not bytes. Positions of a row of the batch are `row` apart; the
// heads of a group are adjacent. In a fused array of q, k and v, all three share it and differ in their offset.
struct Layout {
    int length;    // T: positions of each row of the batch
    int members;   // G: query heads that share a key/value head
    int q_row;     // distance of two positions of q
    int q_group;   // distance of two groups of q
    int kv_row;    // distance of two positions of k and of v
    int kv_group;  // distance of two groups of k and of v
    int k_offset;  // where the first key is
    int v_offset;  // where the first value is
    int packed;    // whether `segments` counts
};

#define LAYOUT_PARAMETERS                                                                                       \
    int length, int members, int q_row, int q_group, int kv_row, int kv_group, int k_offset, int v_offset, int packed
#define LAYOUT_ARGUMENTS {length, members, q_row, q_group, kv_row, kv_group, k_offset, v_offset, packed}

// Return the place of a chunk in a tile of H columns, in numbers from the tile's begin.
template <int H>
DEVICE int place(int row, int chunk) {
    constexpr bool wide = H % 64 == 0;  // rows of whole 128 bytes; else two rows differ by half of that
    return row * H + ((wide ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3)) << 3);
}

// Hold a tile in registers, on its way from global to shared memory: loads take long, and other work goes on.
template <int H, int ROWS, int THREADS>
struct Transit {
    static constexpr int CHUNKS = ROWS * H / 8, EACH = CHUNKS / THREADS;
    static_assert(CHUNKS % THREADS == 0, "every thread carries as many chunks");
    Chunk held[EACH];

    // Read rows first.. of `source`; rows from `end` on are zeros.
    DEVICE void load(const Half* source, int stride, int first, int end) {
        UNROLL
        for (int i = 0; i < EACH; i++) {
            int chunk = thread_index() + i * THREADS, row = chunk / (H / 8), column = chunk % (H / 8);
            held[i] = Chunk{0, 0, 0, 0};
            if (first + row < end) held[i] = load_chunk(source + (first + row) * stride + column * 8);
        }
    }

    DEVICE void store(Half* tile) const {
        UNROLL
        for (int i = 0; i < EACH; i++) {
            int chunk = thread_index() + i * THREADS;
            put_chunk(tile + place<H>(chunk / (H / 8), chunk % (H / 8)), held[i]);
        }
    }
};

// Read 8 rows x 32 columns of a tile as four fragments B: of the transposed rows (products over columns), or, with
// `across`, of the rows themselves (products over rows).
template <int H, bool across>
DEVICE void load_four(unsigned (&b)[4], const Half* tile, int row, int chunk, int lane) {
    const Half* from = tile + place<H>(row + (lane & 7), chunk + (lane >> 3));
    if (across) load_matrices_transposed(b, from);
    else load_matrices(b, from);
}

// Read fragments A of 16 rows from global memory: a[i] covers columns 8 i to 8 i + 7. Rows from `end` on are zeros.
template <int H>
DEVICE void load_rows(unsigned (&a)[H / 8][2], const Half* source, int stride, int first, int end, int lane) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + 8 * half;
        UNROLL
        for (int i = 0; i < H / 8; i++)
            a[i][half] = row < end ? load_pair(source + row * stride + i * 8 + lane % 4 * 2) : 0;
    }
}

// Write sums C of 16 rows, times a factor for each half, as fp16.
template <int H>
DEVICE void store_rows(const float (&c)[H / 8][4], float upper, float lower, Half* target, int stride, int first, int end, int lane) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + 8 * half;
        float factor = half ? lower : upper;
        if (row < end) {
            UNROLL
            for (int i = 0; i < H / 8; i++)
                store_pair(target + row * stride + i * 8 + lane % 4 * 2, pack(c[i][2 * half] * factor, c[i][2 * half + 1] * factor));
        }
    }
}

// Add A B to `c`, where A has 16 * M rows and H columns and B is the transposed tile of N rows.
template <int H, int M, int N>
DEVICE void multiply_by_rows(float (&c)[M][N / 8][4], const unsigned (&a)[M][H / 8][2], const Half* tile, int lane) {
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        UNROLL
        for (int m = 0; m < M; m++) { UNROLL for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f; }
    }
    UNROLL
    for (int four = 0; four < H / 32; four++) {
        UNROLL
        for (int n = 0; n < N / 8; n++) {
            unsigned b[4];
            load_four<H, false>(b, tile, n * 8, four * 4, lane);
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int m = 0; m < M; m++) multiply(c[m][n], a[m][four * 4 + i], b[i]);
            }
        }
    }
}

// Add A B to `c`, where A has 16 * M rows and N columns and B is the tile of N rows and H columns.
template <int H, int M, int N>
DEVICE void multiply_by_columns(float (&c)[M][H / 8][4], const unsigned (&a)[M][N / 8][2], const Half* tile, int lane) {
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        UNROLL
        for (int four = 0; four < H / 32; four++) {
            unsigned b[4];
            load_four<H, true>(b, tile, n * 8, four * 4, lane);
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int m = 0; m < M; m++) multiply(c[m][four * 4 + i], a[m][n], b[i]);
            }
        }
    }
}

// Round sums C to fragments A.
template <int M, int N>
DEVICE void round_sums(unsigned (&a)[M][N][2], const float (&c)[M][N][4]) {
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) {
            a[m][n][0] = pack(c[m][n][0], c[m][n][1]);
            a[m][n][1] = pack(c[m][n][2], c[m][n][3]);
        }
    }
}

// Combine what the four lanes of a row have.
DEVICE float sum_of_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

DEVICE float max_of_row(float x) {
    x = larger(x, shuffle_xor(x, 1));
    return larger(x, shuffle_xor(x, 2));
}

#endif
