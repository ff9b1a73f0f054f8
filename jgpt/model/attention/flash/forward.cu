// The output of causal attention, and of each row of scores the logarithm of the sum of its exponentials.
//
// FlashAttention-2 (Dao, arXiv 2307.08691): a block takes 16 * M * WARPS queries of one head and goes through their keys
// in tiles of N. A warp has 16 * M queries: their fragments, the tile's scores and the sums of values all stay in
// registers. Scores are taken relative to a large score of the row. When one comes that is larger by 8 powers of two
// (FlashAttention-4's way), it is the new one, and what the row has summed is scaled down; else weights go up to 256.

#include "tiles.cuh"

template <int H, int M, int WARPS, int N>
DEVICE void forward(const Half* q, const Half* k, const Half* v, const int* segments, Half* out, float* log_sums,
                    Layout at) {
    constexpr int ROWS = 16 * M * WARPS, TILE = N * H * 2;
    constexpr float TO_EXPONENT = INVERSE_ROOT<H> * LOG2_E;
    constexpr float SLACK = 8.0f / TO_EXPONENT;
    const Place keys = shared_begin();               // two tiles: one is read while the other is filled
    const Place values = shared_begin() + 2 * TILE;  // two tiles
    const int lane = thread_index() % 32;
    const Corner<H> corner(lane);
    // This block's first query; the longest work first.
    auto begin = [] { return (blocks_x() - 1 - block_x()) * ROWS; };
    auto first_row = [&] { return begin() + thread_index() / 32 * 16 * M; };  // this warp's first query
    const int head = block_y(), heads = blocks_y(), T = at.length;
    q += query_head(at, head, H);

    unsigned queries[M][H / 8][2];
    float sums[M][H / 8][4], largest[M][2], total[M][2];
    UNROLL
    for (int m = 0; m < M; m++) {
        load_rows<H>(queries[m], q, at.q_row, first_row() + 16 * m, T, lane);
        UNROLL
        for (int half = 0; half < 2; half++) largest[m][half] = MASKED, total[m][half] = 0.0f;
    }

    set_zero(sums);

    Transit<H, N, 32 * WARPS> next_keys, next_values;
    // Where they come from is worked out for each tile: that takes time, but no registers between.
    auto load = [&](int tile, int end) {
        const long long place = key_head(at, block_y() / at.members);
        next_keys.load(k + place + at.k_offset, at.kv_row, tile * N, end);
        next_values.load(v + place + at.v_offset, at.kv_row, tile * N, end);
    };
    auto store = [&](int slot) {
        next_keys.store(keys + slot * TILE);
        next_values.store(values + slot * TILE);
    };

    const int tiles = ((begin() + ROWS < T ? begin() + ROWS : T) + N - 1) / N;
    load(0, T);
    store(0);
    barrier();
    for (int tile = 0; tile < tiles; tile++) {
        const int now = tile % 2 * TILE, column = tile * N;
        load(tile + 1, tile + 1 < tiles ? T : 0);  // after the last tile, nothing is read
        if (column < first_row() + 16 * M) {       // else this warp sees none of these keys
            float scores[M][N / 8][4];
            set_zero(scores);
            multiply_by_rows<H, M, N>(scores, queries, keys + now, corner);
            if (column + N > first_row() + 1 || at.packed) {
                const int lane = thread_index() % 32;
                mask_scores<M, N, false>(scores, first_row() + lane / 4, column + lane % 4 * 2, segments, at);
            }
            float here[M][2];  // the largest score of each row, of those that the lane has
            bool grown = false;
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int half = 0; half < 2; half++) {
                    here[m][half] = MASKED;
                    UNROLL
                    for (int n = 0; n < N / 8; n++) {
                        float two = larger(scores[m][n][2 * half], scores[m][n][2 * half + 1]);
                        here[m][half] = larger(here[m][half], two);
                    }
                    grown |= here[m][half] - largest[m][half] > SLACK;
                }
            }
            if (any_lane(grown)) {
                UNROLL
                for (int m = 0; m < M; m++) {
                    UNROLL
                    for (int half = 0; half < 2; half++) {
                        float highest = larger(largest[m][half], max_of_row(here[m][half]));
                        float shrink = power_of_two((largest[m][half] - highest) * TO_EXPONENT);
                        largest[m][half] = highest, total[m][half] *= shrink;
                        UNROLL
                        for (int i = 0; i < H / 8; i++)
                            sums[m][i][2 * half] *= shrink, sums[m][i][2 * half + 1] *= shrink;
                    }
                }
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int e = 0; e < 4; e++) {
                        // The difference first: it is exact where it counts, however large the scores are.
                        scores[m][n][e] = power_of_two((scores[m][n][e] - largest[m][e / 2]) * TO_EXPONENT);
                        total[m][e / 2] += scores[m][n][e];
                    }
                }
            }
            unsigned weights[M][N / 8][2];
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                UNROLL
                for (int m = 0; m < M; m++) round_sums(weights[m][n], scores[m][n]);
            }
            multiply_by_columns<H, M, N>(sums, weights, values + now, corner);
        }
        store(1 - tile % 2);
        barrier();
    }

    out += row_of_batch(at, heads * H) + block_y() * H;
    log_sums += row_of_batch(at, heads) + static_cast<long long>(block_y()) * T;
    UNROLL
    for (int m = 0; m < M; m++) {
        float divided[2];
        UNROLL
        for (int half = 0; half < 2; half++) {
            int row = first_row() + 16 * m + 8 * half + lane / 4;
            float sum = sum_of_row(total[m][half]);
            divided[half] = 1.0f / sum;
            if (lane % 4 == 0 && row < T)
                store_float(log_sums + row, multiply_add(largest[m][half], TO_EXPONENT, log_of_two(sum)));
        }
        store_rows<H>(sums[m], divided[0], divided[1], out, heads * H, first_row() + 16 * m, T, lane);
    }
}

#ifdef ENTRY
extern "C" __global__ void __launch_bounds__(32 * SHAPE_WARPS, SHAPE_BLOCKS)
    ENTRY(const Half* q, const Half* k, const Half* v, const int* segments, Half* out, float* log_sums,
          LAYOUT_PARAMETERS) {
    forward<SHAPE_WIDTH, SHAPE_M, SHAPE_WARPS, SHAPE_N>(q, k, v, segments, out, log_sums, LAYOUT_ARGUMENTS);
}
#endif
