// The output of causal attention, and of each row of scores the logarithm of the sum of its exponentials.
//
// FlashAttention-2 (Dao, arXiv 2307.08691): a block takes 16 * M * WARPS queries of one head and goes through their keys
// in tiles of N. A warp has 16 * M queries: their fragments, the tile's scores and the sums of values all stay in
// registers. Each row keeps its largest score so far, and what it has summed is scaled down when a larger one comes.

#include "tiles.cuh"

template <int H, int M, int WARPS, int N>
DEVICE void forward(const Half* q, const Half* k, const Half* v, const int* segments, Half* out, float* log_sums, Layout at) {
    constexpr int ROWS = 16 * M * WARPS, TILE = N * H;
    constexpr float TO_EXPONENT = INVERSE_ROOT<H> * LOG2_E;
    Half* const keys = shared_memory;              // two tiles: one is read while the other is filled
    Half* const values = shared_memory + 2 * TILE;  // two tiles
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int begin = (blocks_x() - 1 - block_x()) * ROWS;  // the longest work first
    const int head = block_y(), heads = blocks_y(), batch = block_z();
    const int group = head / at.members, member = head % at.members, T = at.length;
    const long long first_row = static_cast<long long>(batch) * T;
    q += first_row * at.q_row + group * at.q_group + member * H;
    k += first_row * at.kv_row + group * at.kv_group + at.k_offset;
    v += first_row * at.kv_row + group * at.kv_group + at.v_offset;
    out += (first_row * heads + head) * H;
    log_sums += (static_cast<long long>(batch) * heads + head) * T;
    segments += first_row;

    const int mine = begin + warp * 16 * M;  // this warp's first query
    unsigned queries[M][H / 8][2];
    float sums[M][H / 8][4], largest[M][2], total[M][2];
    int own[M][2];  // segments of the lane's rows
    UNROLL
    for (int m = 0; m < M; m++) {
        load_rows<H>(queries[m], q, at.q_row, mine + 16 * m, T, lane);
        UNROLL
        for (int i = 0; i < H / 8; i++) { UNROLL for (int e = 0; e < 4; e++) sums[m][i][e] = 0.0f; }
        UNROLL
        for (int half = 0; half < 2; half++) {
            int row = mine + 16 * m + 8 * half + lane / 4;
            largest[m][half] = MASKED, total[m][half] = 0.0f;
            own[m][half] = at.packed && row < T ? load_int(segments + row) : 0;
        }
    }

    Transit<H, N, 32 * WARPS> next;
    const int tiles = ((begin + ROWS < T ? begin + ROWS : T) + N - 1) / N;
    next.load(k, at.kv_row, 0, T);
    next.store(keys);
    next.load(v, at.kv_row, 0, T);
    next.store(values);
    barrier();
    for (int tile = 0; tile < tiles; tile++) {
        const int now = tile % 2 * TILE, other = TILE - now, column = tile * N;
        const bool more = tile + 1 < tiles, active = column < mine + 16 * M;  // else this warp sees none of its keys
        float scores[M][N / 8][4];
        if (more) next.load(k, at.kv_row, column + N, T);
        if (active) multiply_by_rows<H, M, N>(scores, queries, keys + now, lane);
        if (more) {
            next.store(keys + other);
            next.load(v, at.kv_row, column + N, T);
        }
        if (active) {
            if (column + N > mine + 1 || at.packed) {
                UNROLL
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int e = 0; e < 2; e++) {
                        int key = column + n * 8 + lane % 4 * 2 + e;
                        int segment = at.packed && key < T ? load_int(segments + key) : 0;
                        UNROLL
                        for (int m = 0; m < M; m++) {
                            UNROLL
                            for (int half = 0; half < 2; half++) {
                                int row = mine + 16 * m + 8 * half + lane / 4;
                                if (key > row || segment != own[m][half]) scores[m][n][2 * half + e] = MASKED;
                            }
                        }
                    }
                }
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    float highest = largest[m][half];
                    UNROLL
                    for (int n = 0; n < N / 8; n++)
                        highest = larger(highest, larger(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                    highest = max_of_row(highest);
                    // The difference first: it is exact where it counts, however large the scores are.
                    float shrink = power_of_two((largest[m][half] - highest) * TO_EXPONENT), sum = 0.0f;
                    UNROLL
                    for (int n = 0; n < N / 8; n++) {
                        UNROLL
                        for (int e = 2 * half; e < 2 * half + 2; e++) {
                            scores[m][n][e] = power_of_two((scores[m][n][e] - highest) * TO_EXPONENT);
                            sum += scores[m][n][e];
                        }
                    }
                    largest[m][half] = highest;
                    total[m][half] = total[m][half] * shrink + sum;
                    UNROLL
                    for (int i = 0; i < H / 8; i++) sums[m][i][2 * half] *= shrink, sums[m][i][2 * half + 1] *= shrink;
                }
            }
            unsigned weights[M][N / 8][2];
            round_sums<M, N / 8>(weights, scores);
            multiply_by_columns<H, M, N>(sums, weights, values + now, lane);
        }
        if (more) next.store(values + other);
        barrier();
    }

    UNROLL
    for (int m = 0; m < M; m++) {
        float divided[2];
        UNROLL
        for (int half = 0; half < 2; half++) {
            int row = mine + 16 * m + 8 * half + lane / 4;
            float sum = sum_of_row(total[m][half]);
            divided[half] = 1.0f / sum;
            if (lane % 4 == 0 && row < T)
                store_float(log_sums + row, multiply_add(largest[m][half], TO_EXPONENT, log_of_two(sum)));
        }
        store_rows<H>(sums[m], divided[0], divided[1], out, heads * H, mine + 16 * m, T, lane);
    }
}

#ifdef ENTRY
extern "C" __global__ void __launch_bounds__(32 * SHAPE_WARPS, SHAPE_BLOCKS)
ENTRY(const Half* q, const Half* k, const Half* v, const int* segments, Half* out, float* log_sums, LAYOUT_PARAMETERS) {
    forward<SHAPE_WIDTH, SHAPE_M, SHAPE_WARPS, SHAPE_N>(q, k, v, segments, out, log_sums, LAYOUT_ARGUMENTS);
}
#endif
