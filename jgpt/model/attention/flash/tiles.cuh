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

typedef unsigned Place;  // in shared memory: an address in bytes

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

#define LAYOUT_PARAMETERS \
    int length, int members, int q_row, int q_group, int kv_row, int kv_group, int k_offset, int v_offset, int packed
#define LAYOUT_ARGUMENTS {length, members, q_row, q_group, kv_row, kv_group, k_offset, v_offset, packed}

// Return where a head's first number is, in an array whose positions are `row` apart, for this block's row of the batch.
DEVICE long long row_of_batch(const Layout& at, int row) { return static_cast<long long>(block_z()) * at.length * row; }
DEVICE long long query_head(const Layout& at, int head, int width) {
    return row_of_batch(at, at.q_row) + head / at.members * at.q_group + head % at.members * width;
}
DEVICE long long key_head(const Layout& at, int group) { return row_of_batch(at, at.kv_row) + group * at.kv_group; }

// A chunk's index in its row is xor-ed with the row's: rows of whole 128 bytes by the row's last 3 bits; else two rows
// differ by half of that, and their bits 1 and 2 are left. Return the place of a chunk in bytes from the tile's begin.
template <int H>
DEVICE int swizzled(int row, int chunk) {
    return row * H * 2 + (H % 64 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3)) * 16;
}

// Hold a tile in registers, on its way from global to shared memory: loads take long, and other work goes on.
// A thread carries chunks whose rows differ by multiples of 8, and whose columns differ by whole lines: their places
// then differ by constants.
template <int H, int ROWS, int THREADS>
struct Transit {
    static constexpr int LINE = H == 128 ? 16 : H == 64 ? 8 : 4;  // threads that read side by side
    static constexpr int STEP = THREADS / LINE, COLUMNS = H / 8 / LINE, EACH = ROWS / STEP * COLUMNS;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "every thread carries as many chunks");
    Chunk held[EACH];

    // Read rows first.. of `source`; rows from `end` on are zeros.
    DEVICE void load(const Half* source, int stride, int first, int end) {
        const int row = first + thread_index() / LINE;
        const Half* from = source + row * stride + thread_index() % LINE * 8;
        UNROLL
        for (int i = 0; i < EACH; i++) {
            int below = i / COLUMNS * STEP;
            held[i] = load_chunk(from + below * stride + i % COLUMNS * LINE * 8, row + below < end);
        }
    }

    DEVICE void store(Place tile) const {
        const Place to = tile + swizzled<H>(thread_index() / LINE, thread_index() % LINE);
        UNROLL
        for (int i = 0; i < EACH; i++) put_chunk(to + i / COLUMNS * STEP * H * 2 + i % COLUMNS * LINE * 16, held[i]);
    }
};

// Where a lane reads the first matrices of a tile: row lane % 8, chunk lane / 8; and, `second`, four chunks on.
template <int H>
struct Corner {
    Place first, second;

    DEVICE explicit Corner(int lane)
        : first(swizzled<H>(lane & 7, lane >> 3)), second(swizzled<H>(lane & 7, 4 + (lane >> 3))) {}
};

// Read 8 rows x 32 columns of a tile as four fragments B: of the transposed rows (products over columns), or, with
// `across`, of the rows themselves (products over rows). Rows begin at a multiple of 8; `four` counts columns in 32.
template <int H, bool across>
DEVICE void load_four(unsigned (&b)[4], Place tile, int row, int four, const Corner<H>& corner) {
    constexpr bool wide = H % 64 == 0;
    Place from =
        tile + (wide && four % 2 ? corner.second : corner.first) + row * H * 2 + (wide ? four / 2 * 128 : four * 64);
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
        for (int i = 0; i < H / 8; i++) a[i][half] = load_pair(source + row * stride + i * 8 + lane % 4 * 2, row < end);
    }
}

// Write sums C of 16 rows, times a factor for each half, as fp16.
template <int H>
DEVICE void store_rows(const float (&c)[H / 8][4], float upper, float lower, Half* target, int stride, int first,
                       int end, int lane) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + 8 * half;
        float factor = half ? lower : upper;
        if (row < end) {
            UNROLL
            for (int i = 0; i < H / 8; i++)
                store_pair(target + row * stride + i * 8 + lane % 4 * 2,
                           pack(c[i][2 * half] * factor, c[i][2 * half + 1] * factor));
        }
    }
}

template <int M, int N>
DEVICE void set_zero(float (&c)[M][N][4]) {
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int n = 0; n < N; n++) {
            UNROLL
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f;
        }
    }
}

// Add A B to `c`, where A has 16 * M rows and H columns and B is the transposed tile of N rows.
template <int H, int M, int N>
DEVICE void multiply_by_rows(float (&c)[M][N / 8][4], const unsigned (&a)[M][H / 8][2], Place tile,
                             const Corner<H>& corner) {
    UNROLL
    for (int four = 0; four < H / 32; four++) {
        UNROLL
        for (int n = 0; n < N / 8; n++) {
            unsigned b[4];
            load_four<H, false>(b, tile, n * 8, four, corner);
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
DEVICE void multiply_by_columns(float (&c)[M][H / 8][4], const unsigned (&a)[M][N / 8][2], Place tile,
                                const Corner<H>& corner) {
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        UNROLL
        for (int four = 0; four < H / 32; four++) {
            unsigned b[4];
            load_four<H, true>(b, tile, n * 8, four, corner);
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int m = 0; m < M; m++) multiply(c[m][four * 4 + i], a[m][n], b[i]);
            }
        }
    }
}

// Round sums C to a fragment A.
DEVICE void round_sums(unsigned (&a)[2], const float (&c)[4]) {
    a[0] = pack(c[0], c[1]);
    a[1] = pack(c[2], c[3]);
}

// Mask the scores of pairs that must not see each other, where a lane has rows from `row` and columns from `column`.
// `rows_are_keys`: else rows are queries. Segments are read where they are needed: registers are scarce.
template <int M, int N, bool rows_are_keys>
DEVICE void mask_scores(float (&scores)[M][N / 8][4], int row, int column, const int* segments, const Layout& at) {
    int own[M][2];
    segments += row_of_batch(at, 1);
    UNROLL
    for (int m = 0; m < M; m++) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            int place = row + 16 * m + 8 * half;
            own[m][half] = load_int(segments + place, at.packed && place < at.length);
        }
    }
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            int place = column + n * 8 + e;
            int segment = load_int(segments + place, at.packed && place < at.length);
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    int other = row + 16 * m + 8 * half;
                    bool early = rows_are_keys ? place < other : place > other;  // the query is before the key
                    if (early || segment != own[m][half]) scores[m][n][2 * half + e] = MASKED;
                }
            }
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
