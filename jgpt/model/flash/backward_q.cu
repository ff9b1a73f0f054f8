// The gradient of the queries, and of each query the product of its output and that output's gradient.
//
// A block takes 16 * M * WARPS queries of one head and goes through their keys in tiles of N, as in the forward pass.
// The weights are made again from the scores and the logarithms of their sums:
//   weight = 2 ** (score - log_sum)    d_score = weight * (d_out value - d_out out)    d_query = sum of d_score * key
// `dots`, the d_out out of each query, is what the kernel of keys and values needs too: it runs after this one.

#include "tiles.cuh"

template <int H, int M, int WARPS, int N>
DEVICE void backward_q(const Half* q, const Half* k, const Half* v, const Half* out, const Half* d_out, const float* log_sums,
                       const int* segments, Half* d_q, float* dots, Layout at) {
    constexpr int ROWS = 16 * M * WARPS, TILE = N * H;
    constexpr float TO_EXPONENT = INVERSE_ROOT<H> * LOG2_E;
    Half* const keys = shared_memory;
    Half* const values = shared_memory + 2 * TILE;
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int begin = (blocks_x() - 1 - block_x()) * ROWS;
    const int head = block_y(), heads = blocks_y(), batch = block_z();
    const int group = head / at.members, member = head % at.members, T = at.length;
    const long long first_row = static_cast<long long>(batch) * T;
    q += first_row * at.q_row + group * at.q_group + member * H;
    d_q += first_row * at.q_row + group * at.q_group + member * H;
    k += first_row * at.kv_row + group * at.kv_group + at.k_offset;
    v += first_row * at.kv_row + group * at.kv_group + at.v_offset;
    out += (first_row * heads + head) * H;
    d_out += (first_row * heads + head) * H;
    log_sums += (static_cast<long long>(batch) * heads + head) * T;
    dots += (static_cast<long long>(batch) * heads + head) * T;
    segments += first_row;

    const int mine = begin + warp * 16 * M;
    unsigned queries[M][H / 8][2], gradients[M][H / 8][2];  // of the outputs
    float sums[M][H / 8][4], log_sum[M][2], dot[M][2];
    int own[M][2];
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
            log_sum[m][half] = row < T ? load_float(log_sums + row) : 0.0f;
            own[m][half] = at.packed && row < T ? load_int(segments + row) : 0;
            if (lane % 4 == 0 && row < T) store_float(dots + row, dot[m][half]);
        }
        load_rows<H>(queries[m], q, at.q_row, mine + 16 * m, T, lane);
        UNROLL
        for (int i = 0; i < H / 8; i++) { UNROLL for (int e = 0; e < 4; e++) sums[m][i][e] = 0.0f; }
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
        const bool more = tile + 1 < tiles, active = column < mine + 16 * M;
        float scores[M][N / 8][4], d_weights[M][N / 8][4];
        if (more) next.load(k, at.kv_row, column + N, T);
        if (active) multiply_by_rows<H, M, N>(scores, queries, keys + now, lane);
        if (more) {
            next.store(keys + other);
            next.load(v, at.kv_row, column + N, T);
        }
        if (active) {
            multiply_by_rows<H, M, N>(d_weights, gradients, values + now, lane);
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
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int e = 0; e < 4; e++) {
                        // Rounding puts huge scores above the logarithm of their sum: a weight is at most 1.
                        float exponent = smaller(multiply_add(scores[m][n][e], TO_EXPONENT, -log_sum[m][e / 2]), 0.0f);
                        scores[m][n][e] = power_of_two(exponent) * (d_weights[m][n][e] - dot[m][e / 2]);
                    }
                }
            }
            unsigned d_scores[M][N / 8][2];
            round_sums<M, N / 8>(d_scores, scores);
            multiply_by_columns<H, M, N>(sums, d_scores, keys + now, lane);
        }
        if (more) next.store(values + other);
        barrier();
    }
    UNROLL
    for (int m = 0; m < M; m++)
        store_rows<H>(sums[m], INVERSE_ROOT<H>, INVERSE_ROOT<H>, d_q, at.q_row, mine + 16 * m, T, lane);
}

#ifdef ENTRY
extern "C" __global__ void __launch_bounds__(32 * SHAPE_WARPS, SHAPE_BLOCKS)
ENTRY(const Half* q, const Half* k, const Half* v, const Half* out, const Half* d_out, const float* log_sums,
      const int* segments, Half* d_q, float* dots, LAYOUT_PARAMETERS) {
    backward_q<SHAPE_WIDTH, SHAPE_M, SHAPE_WARPS, SHAPE_N>(q, k, v, out, d_out, log_sums, segments, d_q, dots, LAYOUT_ARGUMENTS);
}
#endif
