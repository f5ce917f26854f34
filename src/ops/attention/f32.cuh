// f32: blocks of 256 threads, 16 by 16 of them over tiles of R rows of W numbers. Thread (y, x) computes rows
// y + 16 i and columns x + 16 j of a product of two tiles, and columns 4 x + 64 j.. of a sum.
#pragma once

#include "attention/sizes.cuh"

namespace {

constexpr int THREADS_F32 = 256;

// A row is 16 bytes longer than it need be, so that a column is spread over the banks.
template <int W> constexpr int ROW_F32 = W + 4;

template <int W, int R> __device__ inline void load_tile_f32(float* tile, const float* from, int stride, int rows, int hd) {
    for (int i = threadIdx.x; i < R * W / 4; i += THREADS_F32) {
        const int row = i / (W / 4), column = i % (W / 4) * 4;
        copy_async_16(tile + row * ROW_F32<W> + column, from + size_t(row) * stride + column, row < rows && column < hd);
    }
}

__device__ inline void await_tiles() {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
}

// d = a b^T.
template <int W, int R> __device__ inline void multiply_f32(float (&d)[R / 16][R / 16], const float* a, const float* b) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < R / 16; j++) d[i][j] = 0.0f;
#pragma unroll 4
    for (int c = 0; c < W; c += 4) {
        float left[R / 16][4], right[R / 16][4];
#pragma unroll
        for (int i = 0; i < R / 16; i++) {
            load_all<4>(left[i], a + (y + 16 * i) * ROW_F32<W> + c);
            load_all<4>(right[i], b + (x + 16 * i) * ROW_F32<W> + c);
        }
#pragma unroll
        for (int i = 0; i < R / 16; i++)
#pragma unroll
            for (int j = 0; j < R / 16; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) d[i][j] += left[i][k] * right[j][k];
    }
}

template <int W> constexpr int PARTS_F32 = (W + 63) / 64;

// d += p b.
template <int W, int R>
__device__ inline void add_product_f32(float (&d)[R / 16][PARTS_F32<W>][4], const float* p, const float* b) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < R; k++) {
        float left[R / 16];
#pragma unroll
        for (int i = 0; i < R / 16; i++) left[i] = p[(y + 16 * i) * ROW_F32<R> + k];
#pragma unroll
        for (int j = 0; j < PARTS_F32<W>; j++) {
            if (4 * x + 64 * j >= W) continue;
            float right[4];
            load_all<4>(right, b + k * ROW_F32<W> + 4 * x + 64 * j);
#pragma unroll
            for (int i = 0; i < R / 16; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) d[i][j][c] += left[i] * right[c];
        }
    }
}

template <int W, int R> __device__ inline void clear_f32(float (&d)[R / 16][PARTS_F32<W>][4]) {
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < PARTS_F32<W>; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) d[i][j][c] = 0.0f;
}

template <int R> __device__ inline void put_f32(float* p, const float (&s)[R / 16][R / 16]) {
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < R / 16; j++) p[(threadIdx.x / 16 + 16 * i) * ROW_F32<R> + threadIdx.x % 16 + 16 * j] = s[i][j];
}

template <int W, int R>
__device__ inline void store_f32(
    float* to, const float (&d)[R / 16][PARTS_F32<W>][4], const float (&scale)[R / 16], int stride, int rows, int hd) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < PARTS_F32<W>; j++) {
            if (y + 16 * i >= rows || 4 * x + 64 * j >= hd) continue;
            float scaled[4];
#pragma unroll
            for (int c = 0; c < 4; c++) scaled[c] = d[i][j][c] * scale[i];
            store_all<4>(to + size_t(y + 16 * i) * stride + 4 * x + 64 * j, scaled);
        }
}

template <int W, int R>
__device__ inline void forward_f32(
    const float* q, const float* k, const float* v, const uint32_t* starts, const uint32_t* bounds, const float* sinks,
    float* y, float* logsumexp, const Sizes& sizes, float inner, float factor, unsigned char* shared) {
    float* const q_tile = reinterpret_cast<float*>(shared);
    float* const k_tile = q_tile + R * ROW_F32<W>; // values too, after the keys
    float* const p_tile = k_tile + R * ROW_F32<W>;

    const auto [row, head, query, first, end, common, mask] = OfQueries(sizes, starts, bounds, R, R);
    const int past = sizes.past(), hd = sizes.hd, k_stride = sizes.k_stride;
    load_tile_f32<W, R>(q_tile, q + sizes.query(row, query, head), sizes.q_stride, sizes.sq - query, hd);

    float sums[R / 16][PARTS_F32<W>][4], max[R / 16], total[R / 16];
    clear_f32<W, R>(sums);
#pragma unroll
    for (int i = 0; i < R / 16; i++) max[i] = NONE, total[i] = 0.0f;
    for (int key = first; key < end; key += R) {
        const size_t at = sizes.key(row, key, sizes.key_head(head));
        __syncthreads();
        load_tile_f32<W, R>(k_tile, k + at, k_stride, sizes.sk - key, hd);
        await_tiles();
        float s[R / 16][R / 16];
        multiply_f32<W, R>(s, q_tile, k_tile);
        __syncthreads();
        load_tile_f32<W, R>(k_tile, v + at, k_stride, sizes.sk - key, hd);
#pragma unroll
        for (int i = 0; i < R / 16; i++) {
            const int own = query + threadIdx.x / 16 + 16 * i, start = mask.start(own);
            float largest = HIDDEN;
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                const int other = key + threadIdx.x % 16 + 16 * j;
                if (inner != 0.0f) s[i][j] = capped(s[i][j], inner);
                if (other < start || other > past + own) s[i][j] = HIDDEN;
                largest = fmaxf(largest, s[i][j]);
            }
            for (int lane = 8; lane > 0; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lane));
            const float new_max = fmaxf(max[i], largest * factor), shrink = exp2_fast(max[i] - new_max);
            max[i] = new_max;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                s[i][j] = exp2_fast(s[i][j] * factor - new_max);
                sum += s[i][j];
            }
            total[i] = total[i] * shrink + sum;
#pragma unroll
            for (int j = 0; j < PARTS_F32<W>; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[i][j][c] *= shrink;
        }
        put_f32<R>(p_tile, s);
        await_tiles();
        add_product_f32<W, R>(sums, p_tile, k_tile);
    }

    float scale[R / 16];
    const float sink = sinks ? sinks[head] * LOG2_E : NONE;
#pragma unroll
    for (int i = 0; i < R / 16; i++) {
        float sum = total[i];
        for (int lane = 8; lane > 0; lane /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lane);
        const float new_max = fmaxf(max[i], sink), shrink = exp2_fast(max[i] - new_max);
        sum = sum * shrink + exp2_fast(sink - new_max);
        scale[i] = shrink / sum;
        const int own = query + threadIdx.x / 16 + 16 * i;
        if (threadIdx.x % 16 == 0 && own < sizes.sq) {
            logsumexp[(size_t(row) * sizes.h + head) * sizes.sq + own] = new_max + log2f(sum);
        }
    }
    store_f32<W, R>(y + sizes.result(row, query, head), sums, scale, sizes.y_stride(), sizes.sq - query, hd);
}

template <int W, int R>
__device__ inline void backward_keys_f32(
    const float* q, const float* k, const float* v, const float* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, float* dk, float* dv, const Sizes& sizes, float inner, float factor, float scale,
    unsigned char* shared) {
    constexpr int TILE = R * ROW_F32<W>;
    float* const k_tile = reinterpret_cast<float*>(shared);
    float *const v_tile = k_tile + TILE, *const q_tile = v_tile + TILE, *const dy_tile = q_tile + TILE;
    float* const p_tile = dy_tile + TILE; // P^T, then dS^T

    const int row = sizes.row(sizes.kv), key_head = blockIdx.x % sizes.kv, group = sizes.h / sizes.kv;
    const int key = blockIdx.y * R, past = sizes.past(), hd = sizes.hd;
    const Mask mask{starts, bounds, row, sizes.sq};
    const int k_stride = sizes.k_stride;
    const size_t own = sizes.key(row, key, key_head);
    load_tile_f32<W, R>(k_tile, k + own, k_stride, sizes.sk - key, hd);
    load_tile_f32<W, R>(v_tile, v + own, k_stride, sizes.sk - key, hd);

    float dk_sums[R / 16][PARTS_F32<W>][4], dv_sums[R / 16][PARTS_F32<W>][4];
    clear_f32<W, R>(dk_sums);
    clear_f32<W, R>(dv_sums);
    for (int head = key_head * group; head < (key_head + 1) * group; head++) {
        const float* const stat = stats + (size_t(row) * sizes.h + head) * sizes.padded() * 2;
        for (int query = max(key - past, 0) / R * R; query < sizes.sq; query += R) {
            if (mask.first_from(query) >= key + R) break;
            if (mask.first(query, R) >= key + R) continue;
            __syncthreads();
            load_tile_f32<W, R>(q_tile, q + sizes.query(row, query, head), sizes.q_stride, sizes.sq - query, hd);
            load_tile_f32<W, R>(dy_tile, dy + sizes.result(row, query, head), sizes.y_stride(), sizes.sq - query, hd);
            await_tiles();
            float s[R / 16][R / 16], ds[R / 16][R / 16];
            multiply_f32<W, R>(s, k_tile, q_tile);
            multiply_f32<W, R>(ds, v_tile, dy_tile);
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                const int other = query + threadIdx.x % 16 + 16 * j, start = mask.start(other);
                const float logsumexp = stat[other * 2], d = stat[other * 2 + 1];
#pragma unroll
                for (int i = 0; i < R / 16; i++) {
                    const int at = key + threadIdx.x / 16 + 16 * i;
                    ds[i][j] -= d;
                    if (inner != 0.0f) {
                        s[i][j] = capped(s[i][j], inner);
                        ds[i][j] *= 1.0f - s[i][j] * s[i][j];
                    }
                    if (at < start || at > past + other) s[i][j] = HIDDEN;
                    s[i][j] = exp2_fast(s[i][j] * factor - logsumexp);
                    ds[i][j] *= s[i][j];
                }
            }
            put_f32<R>(p_tile, s);
            __syncthreads();
            add_product_f32<W, R>(dv_sums, p_tile, dy_tile);
            __syncthreads();
            put_f32<R>(p_tile, ds);
            __syncthreads();
            add_product_f32<W, R>(dk_sums, p_tile, q_tile);
        }
    }
    copy_async_wait<0>(); // If there was no query, keys and values are still on their way.
    float scales[R / 16];
#pragma unroll
    for (int i = 0; i < R / 16; i++) scales[i] = scale;
    store_f32<W, R>(dk + own, dk_sums, scales, k_stride, sizes.sk - key, hd);
#pragma unroll
    for (int i = 0; i < R / 16; i++) scales[i] = 1.0f;
    store_f32<W, R>(dv + own, dv_sums, scales, k_stride, sizes.sk - key, hd);
}

template <int W, int R>
__device__ inline void backward_queries_f32(
    const float* q, const float* k, const float* v, const float* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, float* dq, const Sizes& sizes, float inner, float factor, float scale, unsigned char* shared) {
    constexpr int TILE = R * ROW_F32<W>;
    float* const q_tile = reinterpret_cast<float*>(shared);
    float *const dy_tile = q_tile + TILE, *const k_tile = dy_tile + TILE, *const v_tile = k_tile + TILE;
    float* const ds_tile = v_tile + TILE;

    const auto [row, head, query, first, end, common, mask] = OfQueries(sizes, starts, bounds, R, R);
    const int past = sizes.past(), hd = sizes.hd, k_stride = sizes.k_stride;
    const float* const stat = stats + (size_t(row) * sizes.h + head) * sizes.padded() * 2;
    const size_t own = sizes.query(row, query, head);
    load_tile_f32<W, R>(q_tile, q + own, sizes.q_stride, sizes.sq - query, hd);
    load_tile_f32<W, R>(dy_tile, dy + sizes.result(row, query, head), sizes.y_stride(), sizes.sq - query, hd);

    float sums[R / 16][PARTS_F32<W>][4];
    clear_f32<W, R>(sums);
    for (int key = first; key < end; key += R) {
        const size_t at = sizes.key(row, key, sizes.key_head(head));
        __syncthreads();
        load_tile_f32<W, R>(k_tile, k + at, k_stride, sizes.sk - key, hd);
        load_tile_f32<W, R>(v_tile, v + at, k_stride, sizes.sk - key, hd);
        await_tiles();
        float s[R / 16][R / 16], ds[R / 16][R / 16];
        multiply_f32<W, R>(s, q_tile, k_tile);
        multiply_f32<W, R>(ds, dy_tile, v_tile);
#pragma unroll
        for (int i = 0; i < R / 16; i++) {
            const int at = query + threadIdx.x / 16 + 16 * i, start = mask.start(at);
            const float logsumexp = stat[at * 2], d = stat[at * 2 + 1];
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                const int other = key + threadIdx.x % 16 + 16 * j;
                ds[i][j] -= d;
                if (inner != 0.0f) {
                    s[i][j] = capped(s[i][j], inner);
                    ds[i][j] *= 1.0f - s[i][j] * s[i][j];
                }
                if (other < start || other > past + at) s[i][j] = HIDDEN;
                ds[i][j] *= exp2_fast(s[i][j] * factor - logsumexp);
            }
        }
        put_f32<R>(ds_tile, ds);
        __syncthreads();
        add_product_f32<W, R>(sums, ds_tile, k_tile);
    }
    float scales[R / 16];
#pragma unroll
    for (int i = 0; i < R / 16; i++) scales[i] = scale;
    store_f32<W, R>(dq + own, sums, scales, sizes.q_stride, sizes.sq - query, hd);
}

} // namespace
