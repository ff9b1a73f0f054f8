// The gradient of the queries, and of each query the product of its output and that output's gradient.
//
// A block takes 16 * M * WARPS queries of one head and goes through their keys in tiles of N, as in the forward pass.
// The weights are made again from the scores and the logarithms of their sums:
//   weight = 2 ** (score - log_sum)    d_score = weight * (d_out value - d_out out)    d_query = sum of d_score * key
// `dots`, the d_out out of each query, is what the kernel of keys and values needs too: it runs after this one.

#include "tiles.cuh"

template <int H, int M, int WARPS, int N>
DEVICE void backward_q(const Half* q, const Half* k, const Half* v, const Half* out, const Half* d_out,
                       const float* log_sums, const int* segments, Half* d_q, float* dots, Layout at) {
    constexpr int ROWS = 16 * M * WARPS, TILE = N * H * 2;
    constexpr float TO_EXPONENT = INVERSE_ROOT<H> * LOG2_E;
    const Place keys = shared_begin();
    const Place values = shared_begin() + 2 * TILE;
    const int lane = thread_index() % 32;
    const Corner<H> corner(lane);
    const int begin = (blocks_x() - 1 - block_x()) * ROWS;  // the longest work first
    const int mine = begin + thread_index() / 32 * 16 * M;  // this warp's first query
    const int head = block_y(), heads = blocks_y(), T = at.length;
    q += query_head(at, head, H);
    out += row_of_batch(at, heads * H) + head * H;
    d_out += row_of_batch(at, heads * H) + head * H;
    log_sums += row_of_batch(at, heads) + static_cast<long long>(head) * T;
    dots += row_of_batch(at, heads) + static_cast<long long>(head) * T;

    unsigned queries[M][H / 8][2], gradients[M][H / 8][2];  // of the outputs
    float sums[M][H / 8][4], log_sum[M][2], dot[M][2];
    UNROLL
    for (int m = 0; m < M; m++) {
        load_rows<H>(queries[m], out, heads * H, mine + 16 * m, T, lane);  // the outputs, for a moment
        load_rows<H>(gradients[m], d_out, heads * H, mine + 16 * m, T, lane);
        UNROLL
        for (int half = 0; half < 2; half++) {
            int row = mine + 16 * m + 8 * half + lane / 4;
            float sum = 0.0f;
            UNROLL
            for (int i = 0; i < H / 8; i++) {
                float a[2], b[2];
                unpack(a, queries[m][i][half]);
                unpack(b, gradients[m][i][half]);
                sum = multiply_add(a[1], b[1], multiply_add(a[0], b[0], sum));
            }
            dot[m][half] = sum_of_row(sum);
            log_sum[m][half] = load_float(log_sums + row, row < T);
            if (lane % 4 == 0 && row < T) store_float(dots + row, dot[m][half]);
        }
        load_rows<H>(queries[m], q, at.q_row, mine + 16 * m, T, lane);
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

    const int tiles = ((begin + ROWS < T ? begin + ROWS : T) + N - 1) / N;
    load(0, T);
    store(0);
    barrier();
    for (int tile = 0; tile < tiles; tile++) {
        const int now = tile % 2 * TILE, column = tile * N;
        load(tile + 1, tile + 1 < tiles ? T : 0);  // after the last tile, nothing is read
        if (column < mine + 16 * M) {              // else this warp sees none of these keys
            float scores[M][N / 8][4], d_weights[M][N / 8][4];
            set_zero(scores);
            multiply_by_rows<H, M, N>(scores, queries, keys + now, corner);
            if (column + N > mine + 1 || at.packed) {
                mask_scores<M, N, false>(scores, mine + lane / 4, column + lane % 4 * 2, segments, at);
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int e = 0; e < 4; e++) d_weights[m][n][e] = -dot[m][e / 2];
                }
            }
            multiply_by_rows<H, M, N>(d_weights, gradients, values + now, corner);
            unsigned d_scores[M][N / 8][2];
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                UNROLL
                for (int m = 0; m < M; m++) {
                    float (&d_score)[4] = d_weights[m][n];
                    UNROLL
                    for (int e = 0; e < 4; e++) {
                        // Rounding puts huge scores above the logarithm of their sum: a weight is at most 1.
                        float exponent = smaller(multiply_add(scores[m][n][e], TO_EXPONENT, -log_sum[m][e / 2]), 0.0f);
                        d_score[e] *= power_of_two(exponent);
                    }
                    round_sums(d_scores[m][n], d_score);
                }
            }
            multiply_by_columns<H, M, N>(sums, d_scores, keys + now, corner);
        }
        store(1 - tile % 2);
        barrier();
    }
    d_q += query_head(at, block_y(), H);
    UNROLL
    for (int m = 0; m < M; m++)
        store_rows<H>(sums[m], INVERSE_ROOT<H>, INVERSE_ROOT<H>, d_q, at.q_row, mine + 16 * m, T, lane);
}

#ifdef ENTRY
extern "C" __global__ void __launch_bounds__(32 * SHAPE_WARPS, SHAPE_BLOCKS)
    ENTRY(const Half* q, const Half* k, const Half* v, const Half* out, const Half* d_out, const float* log_sums,
          const int* segments, Half* d_q, float* dots, LAYOUT_PARAMETERS) {
    backward_q<SHAPE_WIDTH, SHAPE_M, SHAPE_WARPS, SHAPE_N>(q, k, v, out, d_out, log_sums, segments, d_q, dots,
                                                           LAYOUT_ARGUMENTS);
}
#endif
