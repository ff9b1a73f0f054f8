// The gradients of the keys and of the values.
//
// A block takes 16 * M * WARPS keys of one key/value head and goes through the queries that see them, in tiles of N, for
// each of the query heads that share the keys: what they give is summed in registers, in one order, with no atomic
// addition. Scores are kept with the keys as rows, so that they are fragments A of both products:
//   d_value = sum of weight * d_out    d_key = sum of d_score * query

#include "tiles.cuh"

template <int H, int M, int WARPS, int N>
DEVICE void backward_kv(const Half* q, const Half* k, const Half* v, const Half* d_out, const float* log_sums,
                        const float* dots, const int* segments, Half* d_k, Half* d_v, Layout at) {
    constexpr int ROWS = 16 * M * WARPS, TILE = N * H * 2, THREADS = 32 * WARPS;
    constexpr float TO_EXPONENT = INVERSE_ROOT<H> * LOG2_E;
    static_assert(2 * N <= THREADS, "a thread carries one number of a row");
    const Place queries = shared_begin();               // two tiles
    const Place gradients = shared_begin() + 2 * TILE;  // of the outputs: two tiles
    const Place numbers = shared_begin() + 4 * TILE;    // [2][log_sum, dot][N]
    const Corner<H> corner(thread_index() % 32);
    const int T = at.length;
    auto begin = [] { return block_x() * ROWS; };  // this block's first key; blocks of the first keys have most work
    auto first_row = [&] { return begin() + thread_index() / 32 * 16 * M; };  // this warp's first key

    unsigned keys[M][H / 8][2], values[M][H / 8][2];
    float of_keys[M][H / 8][4], of_values[M][H / 8][4];
    UNROLL
    for (int m = 0; m < M; m++) {
        load_rows<H>(keys[m], k + key_head(at, block_y()) + at.k_offset, at.kv_row, first_row() + 16 * m, T,
                     thread_index() % 32);
        load_rows<H>(values[m], v + key_head(at, block_y()) + at.v_offset, at.kv_row, first_row() + 16 * m, T,
                     thread_index() % 32);
    }

    set_zero(of_keys);
    set_zero(of_values);

    Transit<H, N, THREADS> next_queries, next_gradients;
    float next_number;  // the first N threads carry a logarithm of the sums, the next N a dot, for each query
    // Where all this comes from is worked out for each tile: that takes time, but no registers between.
    auto load = [&](int member, int tile, int end) {
        const int head = block_y() * at.members + member, heads = blocks_y() * at.members, thread = thread_index();
        next_queries.load(q + query_head(at, head, H), at.q_row, tile * N, end);
        next_gradients.load(d_out + row_of_batch(at, heads * H) + head * H, heads * H, tile * N, end);
        const int row = tile * N + thread % N;
        const float* from = (thread < N ? log_sums : dots) + row_of_batch(at, heads) + static_cast<long long>(head) * T;
        next_number = load_float(from + row, thread < 2 * N && row < end);
    };
    auto store = [&](int slot) {
        const int thread = thread_index();
        next_queries.store(queries + slot * TILE);
        next_gradients.store(gradients + slot * TILE);
        if (thread < 2 * N) put_float(numbers + (slot * 2 * N + thread) * 4, next_number);
    };

    int member = 0, tile = begin() / N, slot = 0;
    load(member, tile, T);
    store(slot);
    barrier();
    while (member < at.members) {
        const int column = tile * N;
        tile++;
        if (tile * N >= T) tile = begin() / N, member++;
        load(member, tile, member < at.members ? T : 0);  // after the last tile, nothing is read
        if (column + N > first_row()) {                   // else all its queries come before this warp's keys
            float scores[M][N / 8][4], d_weights[M][N / 8][4];
            // Where the two logarithms of the lane's columns are; N numbers further on, its dots.
            const Place log_sum = numbers + slot * 2 * N * 4 + thread_index() % 4 * 8;
            set_zero(scores);
            multiply_by_rows<H, M, N>(scores, keys, queries + slot * TILE, corner);
            if (column < first_row() + 16 * M - 1 || at.packed) {
                const int lane = thread_index() % 32;
                mask_scores<M, N, true>(scores, first_row() + lane / 4, column + lane % 4 * 2, segments, at);
            }
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                float dot[2];
                get_floats(dot, log_sum + (N + n * 8) * 4);
                UNROLL
                for (int m = 0; m < M; m++) {
                    UNROLL
                    for (int e = 0; e < 4; e++) d_weights[m][n][e] = -dot[e % 2];
                }
            }
            multiply_by_rows<H, M, N>(d_weights, values, gradients + slot * TILE, corner);
            unsigned weights[M][N / 8][2], d_scores[M][N / 8][2];
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                float sums[2];
                get_floats(sums, log_sum + n * 8 * 4);
                UNROLL
                for (int m = 0; m < M; m++) {
                    float (&weight)[4] = scores[m][n], (&d_score)[4] = d_weights[m][n];
                    UNROLL
                    for (int e = 0; e < 4; e++) {
                        // Rounding puts huge scores above the logarithm of their sum: a weight is at most 1.
                        weight[e] = power_of_two(smaller(multiply_add(weight[e], TO_EXPONENT, -sums[e % 2]), 0.0f));
                        d_score[e] *= weight[e];
                    }
                    round_sums(weights[m][n], weight);
                    round_sums(d_scores[m][n], d_score);
                }
            }
            multiply_by_columns<H, M, N>(of_values, weights, gradients + slot * TILE, corner);
            multiply_by_columns<H, M, N>(of_keys, d_scores, queries + slot * TILE, corner);
        }
        slot ^= 1;
        store(slot);
        barrier();
    }
    d_k += key_head(at, block_y()) + at.k_offset;
    d_v += key_head(at, block_y()) + at.v_offset;
    UNROLL
    for (int m = 0; m < M; m++) {
        store_rows<H>(of_keys[m], INVERSE_ROOT<H>, INVERSE_ROOT<H>, d_k, at.kv_row, first_row() + 16 * m, T,
                      thread_index() % 32);
        store_rows<H>(of_values[m], 1.0f, 1.0f, d_v, at.kv_row, first_row() + 16 * m, T, thread_index() % 32);
    }
}

#ifdef ENTRY
extern "C" __global__ void __launch_bounds__(32 * SHAPE_WARPS, SHAPE_BLOCKS)
    ENTRY(const Half* q, const Half* k, const Half* v, const Half* d_out, const float* log_sums, const float* dots,
          const int* segments, Half* d_k, Half* d_v, LAYOUT_PARAMETERS) {
    backward_kv<SHAPE_WIDTH, SHAPE_M, SHAPE_WARPS, SHAPE_N>(q, k, v, d_out, log_sums, dots, segments, d_k, d_v,
                                                            LAYOUT_ARGUMENTS);
}
#endif
