// Backward in bf16, and what it needs of each query in any dtype.
#pragma once

#include "attention/tiles.cuh"

namespace {

// ---- What backward needs of each query.

// `lanes`, a power of two that is at least hd / 8, take a row each; grid = ceil(b * padded * h * lanes / 256).
template <typename T>
__device__ inline void stats_of(const T* y, const T* dy, const float* logsumexp, float* stats, int64_t b, const Sizes& sizes,
                                int lanes) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
    const int lane = threadIdx.x % lanes, head = int(at % sizes.h), i = int(at / sizes.h % sizes.padded());
    const int64_t row = at / sizes.h / sizes.padded();
    const bool inside = row < b && i < sizes.sq;
    float d = 0.0f;
    if (inside && lane * 8 < sizes.hd) {
        float left[8], right[8];
        load_all<8>(left, y + sizes.result(int(row), i, head) + lane * 8);
        load_all<8>(right, dy + sizes.result(int(row), i, head) + lane * 8);
#pragma unroll
        for (int j = 0; j < 8; j++) d += left[j] * right[j];
    }
    for (int other = lanes / 2; other > 0; other /= 2) d += __shfl_xor_sync(ALL_LANES, d, other);
    if (lane == 0 && row < b) {
        const int64_t query = row * sizes.h + head;
        stats[(query * sizes.padded() + i) * 2] = inside ? logsumexp[query * sizes.sq + i] : -HIDDEN;
        stats[(query * sizes.padded() + i) * 2 + 1] = d;
    }
}

// ---- bf16, backward to keys and values. A warp has 16 M keys; queries come in tiles of QUERIES, worked on SUB at a time:
// ---- scores have a row for each key, so that P^T and dS^T are left operands as they come. With `stages` = 2 the next tile
// ---- is copied while one is worked on. Where there are no registers for both gradients, DK and DV are two kernels.

template <typename Products, int W, int M, int WARPS, int QUERIES, int SUB, bool HELD, bool DK, bool DV>
__device__ inline void backward_keys(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, bf16* dk, bf16* dv, const Sizes& sizes, float inner, float factor, float scale, int stages,
    unsigned char* shared) {
    constexpr int KEYS = 16 * M * WARPS, THREADS = 32 * WARPS, TILE = QUERIES * W;
    // A stage: queries, gradients, and two statistics for each query, four bf16 in size.
    constexpr int STAGE = (2 * TILE + 4 * QUERIES + Products::ALIGNED - 1) / Products::ALIGNED * Products::ALIGNED;
    bf16* const k_tile = reinterpret_cast<bf16*>(shared);
    bf16* const v_tile = k_tile + KEYS * W;
    bf16* const tiles = v_tile + (DK ? KEYS * W : 0);

    const int row = sizes.row(sizes.kv), key_head = blockIdx.x % sizes.kv, group = sizes.h / sizes.kv;
    const int key = blockIdx.y * KEYS, past = sizes.past(), hd = sizes.hd;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = key + warp * 16 * M; // the warp's first key
    const Mask mask{starts, bounds, row, sizes.sq};
    const int k_stride = sizes.k_stride;

    // The tile of queries from `query` on, or after it, that sees any of these keys; sq if there is none.
    const auto visible = [&](int query) {
        while (query < sizes.sq && mask.first(query, QUERIES) >= key + KEYS) {
            query = mask.first_from(query) >= key + KEYS ? sizes.sq : query + QUERIES;
        }
        return query;
    };
    const auto load = [&](int stage, int head, int query) {
        bf16* const tile = tiles + stage * STAGE;
        head += key_head * group;
        Products::template load<W, QUERIES, THREADS>(tile, q + sizes.query(row, query, head), sizes.q_stride, sizes.sq - query, hd);
        Products::template load<W, QUERIES, THREADS>(
            tile + TILE, dy + sizes.result(row, query, head), sizes.y_stride(), sizes.sq - query, hd);
        if (threadIdx.x < QUERIES / 2) {
            const size_t stat = (size_t(row) * sizes.h + head) * sizes.padded() + query;
            copy_async_16(tile + 2 * TILE + threadIdx.x * 8, stats + stat * 2 + threadIdx.x * 4, true);
        }
    };

    const int from = visible(max(key - past, 0) / QUERIES * QUERIES);
    int head = 0, query = from, stage = 0;
    Products::template load<W, KEYS, THREADS>(k_tile, k + sizes.key(row, key, key_head), k_stride, sizes.sk - key, hd);
    if (DK) Products::template load<W, KEYS, THREADS>(v_tile, v + sizes.key(row, key, key_head), k_stride, sizes.sk - key, hd);
    if (query < sizes.sq) load(0, head, query);
    copy_async_commit();
    typename Products::template Left<W, M, HELD> keys, values;
    if (HELD) {
        copy_async_wait<0>();
        __syncthreads();
    }
    keys.template hold<KEYS>(k_tile, warp * 16 * M);
    if (DK) values.template hold<KEYS>(v_tile, warp * 16 * M);

    float dk_sums[M][DK ? W / 8 : 1][4], dv_sums[M][DV ? W / 8 : 1][4];
    if constexpr (DK) clear<W, M>(dk_sums);
    if constexpr (DV) clear<W, M>(dv_sums);

    while (query < sizes.sq && head < group) {
        int next_head = head, next = visible(query + QUERIES);
        if (next >= sizes.sq) next = from, next_head++;
        copy_async_wait<0>();
        Products::loaded();
        __syncthreads(); // This tile is here, and the last one is done with.
        if (stages == 2 && next_head < group) load(stage ^ 1, next_head, next);
        copy_async_commit();

        const bf16* const q_tile = tiles + stage * STAGE;
        const bf16* const dy_tile = q_tile + TILE;
        const float* const stat = reinterpret_cast<const float*>(dy_tile + TILE);
        const bool is_border = key < mask.common(query, QUERIES) || key + KEYS > past + query + 1;
#pragma unroll 1
        for (int sub = 0; sub < QUERIES; sub += SUB) {
            float s[M][SUB / 8][4], ds[M][SUB / 8][4];
            Products::template multiply<QUERIES, SUB>(s, keys, q_tile, sub);
            if constexpr (DK) Products::template multiply<QUERIES, SUB>(ds, values, dy_tile, sub);
            Products::template wait<0>(s);
            if constexpr (DK) Products::template wait<0>(ds);
            if (inner != 0.0f) {
#pragma unroll
                for (int n = 0; n < SUB / 8; n++) {
                    const auto at = *reinterpret_cast<const Pack<float, 4>*>(stat + (sub + 8 * n + lane % 4 * 2) * 2);
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            s[m][n][i] = capped(s[m][n][i], inner);
                            // The slope multiplies dS = P (ds - D), here ds so that subtracting D later gives that.
                            if (DK) {
                                const float d = at.at[i % 2 * 2 + 1];
                                ds[m][n][i] = (ds[m][n][i] - d) * (1.0f - s[m][n][i] * s[m][n][i]) + d;
                            }
                        }
                }
            }
            if (is_border) hide_transposed<M, SUB>(s, mask, query + sub, past, own);
#pragma unroll
            for (int n = 0; n < SUB / 8; n++) {
                // Of two neighbouring queries: logsumexp, D, logsumexp, D.
                const auto at = *reinterpret_cast<const Pack<float, 4>*>(stat + (sub + 8 * n + lane % 4 * 2) * 2);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][n][i] = exp2_fast(s[m][n][i] * factor - at.at[i % 2 * 2]);
                        if (DK) ds[m][n][i] = s[m][n][i] * (ds[m][n][i] - at.at[i % 2 * 2 + 1]);
                    }
            }
            if constexpr (DV) Products::template add_product<QUERIES, SUB, W>(dv_sums, s, dy_tile, sub);
            if constexpr (DK) Products::template add_product<QUERIES, SUB, W>(dk_sums, ds, q_tile, sub);
        }
        if constexpr (DV) Products::template wait<0>(dv_sums);
        if constexpr (DK) Products::template wait<0>(dk_sums);
        if (stages == 2) {
            stage ^= 1;
        } else if (next_head < group) {
            __syncthreads();
            load(0, next_head, next);
            copy_async_commit();
        }
        head = next_head, query = next;
    }

    copy_async_wait<0>();
    __syncthreads(); // If there was no query, keys and values may still be on their way.
    // Computed again, so as not to take registers in the loop.
    const int own_again = renewed(blockIdx.y) * KEYS + warp * 16 * M;
    const size_t to = sizes.key(row, own_again, key_head);
    float scales[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = scale;
    if constexpr (DK) store_sums<W, M>(dk + to, k_tile + warp * 16 * M * W, dk_sums, scales, k_stride, sizes.sk - own_again, hd);
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = 1.0f;
    if constexpr (DV) store_sums<W, M>(dv + to, k_tile + warp * 16 * M * W, dv_sums, scales, k_stride, sizes.sk - own_again, hd);
}

// ---- bf16, backward to queries. A warp has 16 M queries; keys and values come in tiles of KEYS, worked on SUB at a time.

template <typename Products, int W, int M, int WARPS, int KEYS, int SUB, bool HELD>
__device__ inline void backward_queries(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, bf16* dq, const Sizes& sizes, float inner, float factor, float scale, int stages,
    unsigned char* shared) {
    constexpr int QUERIES = 16 * M * WARPS, THREADS = 32 * WARPS, TILE = KEYS * W;
    bf16* const q_tile = reinterpret_cast<bf16*>(shared);
    bf16* const dy_tile = q_tile + QUERIES * W;
    bf16* const tiles = dy_tile + QUERIES * W;

    const auto [row, head, query, first, end, common, mask] = OfQueries(sizes, starts, bounds, QUERIES, KEYS);
    const int past = sizes.past(), hd = sizes.hd, k_stride = sizes.k_stride;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = query + warp * 16 * M; // the warp's first query
    size_t at = sizes.key(row, first, sizes.key_head(head)); // where the tile of keys is that is copied next
    const auto load = [&](int stage, int key) {
        bf16* const tile = tiles + stage * 2 * TILE;
        Products::template load<W, KEYS, THREADS>(tile, k + at, k_stride, sizes.sk - key, hd);
        Products::template load<W, KEYS, THREADS>(tile + TILE, v + at, k_stride, sizes.sk - key, hd);
        at += size_t(KEYS) * k_stride;
    };

    Products::template load<W, QUERIES, THREADS>(q_tile, q + sizes.query(row, query, head), sizes.q_stride, sizes.sq - query, hd);
    Products::template load<W, QUERIES, THREADS>(dy_tile, dy + sizes.result(row, query, head), sizes.y_stride(), sizes.sq - query, hd);
    load(0, first);
    copy_async_commit();
    typename Products::template Left<W, M, HELD> queries, grads;
    if (HELD) {
        copy_async_wait<0>();
        __syncthreads();
    }
    queries.template hold<QUERIES>(q_tile, warp * 16 * M);
    grads.template hold<QUERIES>(dy_tile, warp * 16 * M);

    float sums[M][W / 8][4], logsumexp[M][2], d[M][2];
    clear<W, M>(sums);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Beyond the last query, what is said of padding.
            const int i = own + 16 * m + 8 * r + lane / 4;
            const size_t stat = (size_t(row) * sizes.h + head) * sizes.padded() + i;
            logsumexp[m][r] = i < sizes.sq ? stats[stat * 2] : -HIDDEN;
            d[m][r] = i < sizes.sq ? stats[stat * 2 + 1] : 0.0f;
        }

    int stage = 0;
    for (int key = first; key < end; key += KEYS) {
        const int next = key + KEYS;
        copy_async_wait<0>();
        Products::loaded();
        __syncthreads(); // This tile is here, and the last one is done with.
        if (stages == 2 && next < end) load(stage ^ 1, next);
        copy_async_commit();

        const bf16* const k_tile = tiles + stage * 2 * TILE;
        const bf16* const v_tile = k_tile + TILE;
        const bool is_border = key < common || next > past + query + 1;
#pragma unroll 1
        for (int sub = 0; sub < KEYS; sub += SUB) {
            float s[M][SUB / 8][4], ds[M][SUB / 8][4];
            Products::template multiply<KEYS, SUB>(s, queries, k_tile, sub);
            Products::template multiply<KEYS, SUB>(ds, grads, v_tile, sub);
            Products::template wait<0>(s);
            Products::template wait<0>(ds);
            if (inner != 0.0f) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            s[m][n][i] = capped(s[m][n][i], inner);
                            ds[m][n][i] = (ds[m][n][i] - d[m][i / 2]) * (1.0f - s[m][n][i] * s[m][n][i]) + d[m][i / 2];
                        }
            }
            if (is_border) hide<M, SUB>(s, mask, own, past, key + sub);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float p = exp2_fast(s[m][n][i] * factor - logsumexp[m][i / 2]);
                        ds[m][n][i] = p * (ds[m][n][i] - d[m][i / 2]);
                    }
            Products::template add_product<KEYS, SUB, W>(sums, ds, k_tile, sub);
        }
        Products::template wait<0>(sums);
        if (stages == 2) {
            stage ^= 1;
        } else if (next < end) {
            __syncthreads();
            load(0, next);
            copy_async_commit();
        }
    }

    float scales[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = scale;
    Products::finish();
    store_sums<W, M>(
        dq + sizes.query(row, own, head), q_tile + warp * 16 * M * W, sums, scales, sizes.q_stride, sizes.sq - own, hd);
}

} // namespace
