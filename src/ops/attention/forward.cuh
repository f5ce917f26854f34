// bf16, forward. A warp has 16 M queries; keys and values come in tiles of KEYS, the next of which is copied while
// one is worked on: both of them with STAGES = 2, one at a time with 1.
#pragma once

#include "attention/tiles.cuh"

namespace {

template <typename Products, int W, int M, int WARPS, int KEYS, int STAGES, bool HELD>
__device__ inline void forward(
    const bf16* q, const bf16* k, const bf16* v, const uint32_t* starts, const uint32_t* bounds, const float* sinks, bf16* y,
    float* logsumexp, const Sizes& sizes, float inner, float factor, unsigned char* shared) {
    constexpr int QUERIES = 16 * M * WARPS, THREADS = 32 * WARPS, TILE = KEYS * W;
    bf16* const q_tile = reinterpret_cast<bf16*>(shared);
    bf16* const k_tiles = q_tile + QUERIES * W;
    bf16* const v_tiles = k_tiles + STAGES * TILE;

    const auto [row, head, query, first, end, common, mask] = OfQueries(sizes, starts, bounds, QUERIES, KEYS);
    const int past = sizes.past(), hd = sizes.hd, k_stride = sizes.k_stride;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = query + warp * 16 * M; // the warp's first query
    size_t at = sizes.key(row, first, sizes.key_head(head)); // where the tile of keys is that is copied next

    Products::template load<W, QUERIES, THREADS>(q_tile, q + sizes.query(row, query, head), sizes.q_stride, sizes.sq - query, hd);
    Products::template load<W, KEYS, THREADS>(k_tiles, k + at, k_stride, sizes.sk - first, hd);
    if (STAGES == 2) Products::template load<W, KEYS, THREADS>(v_tiles, v + at, k_stride, sizes.sk - first, hd);
    copy_async_commit();
    typename Products::template Left<W, M, HELD> queries;
    if (HELD) {
        copy_async_wait<0>();
        __syncthreads();
    }
    queries.template hold<QUERIES>(q_tile, warp * 16 * M);

    float sums[M][W / 8][4], max[M][2], total[M][2];
    clear<W, M>(sums);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) max[m][r] = NONE, total[m][r] = 0.0f;

    int stage = 0;
    for (int key = first; key < end; key += KEYS) {
        const int next = key + KEYS;
        copy_async_wait<0>();
        Products::loaded();
        __syncthreads(); // This tile is here, and the last one is done with.
        if (STAGES == 1) Products::template load<W, KEYS, THREADS>(v_tiles, v + at, k_stride, sizes.sk - key, hd);
        at += size_t(KEYS) * k_stride;
        if (STAGES == 2 && next < end) {
            const int other = (stage ^ 1) * TILE;
            Products::template load<W, KEYS, THREADS>(k_tiles + other, k + at, k_stride, sizes.sk - next, hd);
            Products::template load<W, KEYS, THREADS>(v_tiles + other, v + at, k_stride, sizes.sk - next, hd);
        }
        copy_async_commit();

        float s[M][KEYS / 8][4];
        Products::template multiply<KEYS, KEYS>(s, queries, k_tiles + stage * TILE, 0);
        Products::template wait<0>(s);
        if (STAGES == 1) {
            copy_async_wait<0>();
            Products::loaded();
            __syncthreads(); // Values are here, and keys are done with.
            if (next < end) Products::template load<W, KEYS, THREADS>(k_tiles, k + at, k_stride, sizes.sk - next, hd);
            copy_async_commit();
        }
        if (inner != 0.0f) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[m][n][i] = capped(s[m][n][i], inner);
        }
        if (key < common || next > past + query + 1) hide<M, KEYS>(s, mask, own, past, key);

#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float largest = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
                for (int n = 1; n < KEYS / 8; n++) largest = fmaxf(largest, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
                const float new_max = fmaxf(max[m][r], largest * factor);
                const float shrink = exp2_fast(max[m][r] - new_max);
                max[m][r] = new_max;
                float sum = 0.0f; // of this thread's columns
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        s[m][n][2 * r + c] = exp2_fast(s[m][n][2 * r + c] * factor - new_max);
                        sum += s[m][n][2 * r + c];
                    }
                total[m][r] = total[m][r] * shrink + sum;
#pragma unroll
                for (int n = 0; n < W / 8; n++) {
                    sums[m][n][2 * r] *= shrink;
                    sums[m][n][2 * r + 1] *= shrink;
                }
            }
        Products::template add_product<KEYS, KEYS, W>(sums, s, v_tiles + stage * TILE, 0);
        Products::template wait<0>(sums);
        if (STAGES == 2) stage ^= 1;
    }

    // Computed again, so as not to take registers in the loop.
    const int own_again = (gridDim.y - 1 - renewed(blockIdx.y)) * QUERIES + warp * 16 * M;
    float scale[M][2];
    const float sink = sinks ? sinks[head] * LOG2_E : NONE;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = total[m][r];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            // The sink takes part in the sum of exponentials, and in nothing else.
            const float new_max = fmaxf(max[m][r], sink), shrink = exp2_fast(max[m][r] - new_max);
            sum = sum * shrink + exp2_fast(sink - new_max);
            scale[m][r] = shrink / sum;
            const int i = own_again + 16 * m + 8 * r + lane / 4;
            if (lane % 4 == 0 && i < sizes.sq) {
                logsumexp[(size_t(row) * sizes.h + head) * sizes.sq + i] = new_max + log2f(sum);
            }
        }
    Products::finish();
    store_sums<W, M>(
        y + sizes.result(row, own_again, head), q_tile + warp * 16 * M * W, sums, scale, sizes.y_stride(),
        sizes.sq - own_again, hd);
}

} // namespace
