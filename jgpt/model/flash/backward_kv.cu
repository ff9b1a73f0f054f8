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
    constexpr int ROWS = 16 * M * WARPS, TILE = N * H, THREADS = 32 * WARPS;
    constexpr float TO_EXPONENT = INVERSE_ROOT<H> * LOG2_E;
    static_assert(2 * N <= THREADS, "a thread carries one number of a row");
    Half* const queries = shared_memory;               // two tiles
    Half* const gradients = shared_memory + 2 * TILE;  // of the outputs: two tiles
    float* const numbers = reinterpret_cast<float*>(shared_memory + 4 * TILE);  // [2][log_sum, dot][N]
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int begin = block_x() * ROWS;  // the first keys are seen by most queries
    const int group = block_y(), heads = blocks_y() * at.members, batch = block_z(), T = at.length;
    const long long first_row = static_cast<long long>(batch) * T;
    q += first_row * at.q_row + group * at.q_group;
    k += first_row * at.kv_row + group * at.kv_group + at.k_offset;
    v += first_row * at.kv_row + group * at.kv_group + at.v_offset;
    d_k += first_row * at.kv_row + group * at.kv_group + at.k_offset;
    d_v += first_row * at.kv_row + group * at.kv_group + at.v_offset;
    d_out += (first_row * heads + group * at.members) * H;
    log_sums += (static_cast<long long>(batch) * heads + group * at.members) * T;
    dots += (static_cast<long long>(batch) * heads + group * at.members) * T;
    segments += first_row;

    const int mine = begin + warp * 16 * M;
    unsigned keys[M][H / 8][2], values[M][H / 8][2];
    float of_keys[M][H / 8][4], of_values[M][H / 8][4];
    int own[M][2];
    UNROLL
    for (int m = 0; m < M; m++) {
        load_rows<H>(keys[m], k, at.kv_row, mine + 16 * m, T, lane);
        load_rows<H>(values[m], v, at.kv_row, mine + 16 * m, T, lane);
        UNROLL
        for (int i = 0; i < H / 8; i++) { UNROLL for (int e = 0; e < 4; e++) of_keys[m][i][e] = of_values[m][i][e] = 0.0f; }
        UNROLL
        for (int half = 0; half < 2; half++) {
            int row = mine + 16 * m + 8 * half + lane / 4;
            own[m][half] = at.packed && row < T ? load_int(segments + row) : 0;
        }
    }

    Transit<H, N, THREADS> next;
    // The first N threads carry the logarithms, the next N the dots.
    const float* const carried = thread_index() < N ? log_sums : dots;
    const bool carries = thread_index() < 2 * N;
    const int carried_row = thread_index() % N;
    const int first = begin / N, each = (T + N - 1) / N - first, tiles = each * at.members;
    int member = 0, tile = first;
    next.load(q, at.q_row, tile * N, T);
    next.store(queries);
    next.load(d_out, heads * H, tile * N, T);
    next.store(gradients);
    if (carries) put_float(numbers + thread_index(), tile * N + carried_row < T ? load_float(carried + tile * N + carried_row) : 0.0f);
    barrier();
    for (int i = 0; i < tiles; i++) {
        const int now = i % 2 * TILE, other = TILE - now, column = tile * N;
        const bool more = i + 1 < tiles, active = column + N > mine;  // else all its queries come before this warp's keys
        const float* const log_sum = numbers + i % 2 * 2 * N;
        float* const number = numbers + (1 - i % 2) * 2 * N;
        if (++tile == first + each) tile = first, member++;
        float scores[M][N / 8][4], d_weights[M][N / 8][4], waiting = 0.0f;
        if (more) {
            next.load(q + member * H, at.q_row, tile * N, T);
            if (carries && tile * N + carried_row < T) waiting = load_float(carried + member * T + tile * N + carried_row);
        }
        if (active) multiply_by_rows<H, M, N>(scores, keys, queries + now, lane);
        if (more) {
            next.store(queries + other);
            if (carries) put_float(number + thread_index(), waiting);
            next.load(d_out + member * H, heads * H, tile * N, T);
        }
        if (active) {
            multiply_by_rows<H, M, N>(d_weights, values, gradients + now, lane);
            if (column < mine + 16 * M - 1 || at.packed) {
                UNROLL
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int e = 0; e < 2; e++) {
                        int query = column + n * 8 + lane % 4 * 2 + e;
                        int segment = at.packed && query < T ? load_int(segments + query) : 0;
                        UNROLL
                        for (int m = 0; m < M; m++) {
                            UNROLL
                            for (int half = 0; half < 2; half++) {
                                int row = mine + 16 * m + 8 * half + lane / 4;
                                if (query < row || segment != own[m][half]) scores[m][n][2 * half + e] = MASKED;
                            }
                        }
                    }
                }
            }
            unsigned weights[M][N / 8][2], d_scores[M][N / 8][2];
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                float sums[2], dot[2];
                get_floats(sums, log_sum + n * 8 + lane % 4 * 2);
                get_floats(dot, log_sum + N + n * 8 + lane % 4 * 2);
                UNROLL
                for (int m = 0; m < M; m++) {
                    UNROLL
                    for (int e = 0; e < 4; e++) {
                        // Rounding puts huge scores above the logarithm of their sum: a weight is at most 1.
                        float exponent = smaller(multiply_add(scores[m][n][e], TO_EXPONENT, -sums[e % 2]), 0.0f);
                        scores[m][n][e] = power_of_two(exponent);
                        d_weights[m][n][e] = scores[m][n][e] * (d_weights[m][n][e] - dot[e % 2]);
                    }
                }
            }
            round_sums<M, N / 8>(weights, scores);
            multiply_by_columns<H, M, N>(of_values, weights, gradients + now, lane);
            round_sums<M, N / 8>(d_scores, d_weights);
            multiply_by_columns<H, M, N>(of_keys, d_scores, queries + now, lane);
        }
        if (more) next.store(gradients + other);
        barrier();
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        store_rows<H>(of_keys[m], INVERSE_ROOT<H>, INVERSE_ROOT<H>, d_k, at.kv_row, mine + 16 * m, T, lane);
        store_rows<H>(of_values[m], 1.0f, 1.0f, d_v, at.kv_row, mine + 16 * m, T, lane);
    }
}

#ifdef ENTRY
extern "C" __global__ void __launch_bounds__(32 * SHAPE_WARPS, SHAPE_BLOCKS)
ENTRY(const Half* q, const Half* k, const Half* v, const Half* d_out, const float* log_sums, const float* dots,
      const int* segments, Half* d_k, Half* d_v, LAYOUT_PARAMETERS) {
    backward_kv<SHAPE_WIDTH, SHAPE_M, SHAPE_WARPS, SHAPE_N>(q, k, v, d_out, log_sums, dots, segments, d_k, d_v, LAYOUT_ARGUMENTS);
}
#endif
