// Few queries: the keys are split over blocks, each of which writes what its keys contribute to up to G rows, the
// queries of the heads that share a key head; then all that is joined.
#pragma once

#include "attention/sizes.cuh"

namespace {

constexpr int THREADS_DECODE = 128;
// Bytes of a key that are staged at a time, and how far the keys lie apart there: no two of 8 meet in a bank.
constexpr int STAGED = 128, STAGED_ROW = STAGED + 16;

template <typename T, int G>
__device__ inline void decode(
    const void* q, int q_is_bf16, const T* k, const T* v, const uint32_t* starts, float* stats, float* sums, int first_row,
    int rows, const Sizes& sizes, int64_t k_batch, int64_t v_batch, int first_key, int span, float inner, float factor,
    unsigned char* shared) {
    constexpr int COLUMNS = STAGED / sizeof(T), CHUNK = 16 / sizeof(T);
    const int hd = sizes.hd, width = (hd + COLUMNS - 1) / COLUMNS * COLUMNS, past = sizes.past();
    const int row = blockIdx.y / sizes.kv, key_head = blockIdx.y % sizes.kv, group = sizes.h / sizes.kv;
    const int begin = first_key + blockIdx.x * span, end = min(begin + span, sizes.sk), k_stride = sizes.kv * hd;
    const int own = blockIdx.z * G; // the block's first row of `rows`
    unsigned char* const staged = shared; // two stages; later the sums of key groups
    float* const queries = reinterpret_cast<float*>(staged + 2 * THREADS_DECODE * STAGED_ROW); // (G, width)
    float* const scores = queries + G * width; // (span, G)
    // Rows are counted over heads, then queries.
    const auto query_of = [&](int g) { return (first_row + min(own + g, rows - 1)) % sizes.sq; };
    const auto start_of = [&](int g) { return starts ? int(starts[size_t(row) * sizes.sq + query_of(g)]) : 0; };
    const size_t part = (size_t(blockIdx.y) * rows + own) * gridDim.x + blockIdx.x; // of row g: part + g * gridDim.x

    bool is_visible = false;
    for (int g = 0; g < G; g++) is_visible |= start_of(g) < end && past + query_of(g) >= begin;
    if (!is_visible) {
        if (threadIdx.x < min(G, rows - own)) {
            stats[(part + threadIdx.x * gridDim.x) * 2] = NONE;
            stats[(part + threadIdx.x * gridDim.x) * 2 + 1] = 0.0f;
        }
        return;
    }

    for (int i = threadIdx.x; i < G * width; i += THREADS_DECODE) {
        const int g = i / width, column = i % width, r = first_row + own + g;
        float x = 0.0f;
        if (own + g < rows && column < hd) {
            const size_t at = sizes.result(row, r % sizes.sq, key_head * group + r / sizes.sq) + column;
            x = q_is_bf16 ? load(static_cast<const bf16*>(q)[at]) : static_cast<const float*>(q)[at];
        }
        queries[i] = x;
    }

    // A thread has one key of each THREADS_DECODE, of which a part is staged at a time.
    k += row * k_batch + key_head * hd;
    const int parts = width / COLUMNS, steps = (end - begin + THREADS_DECODE - 1) / THREADS_DECODE * parts;
    const auto stage = [&](int step) {
        const int key = begin + step / parts * THREADS_DECODE, column = step % parts * COLUMNS;
        unsigned char* const to = staged + step % 2 * THREADS_DECODE * STAGED_ROW;
        for (int i = threadIdx.x; i < THREADS_DECODE * 8; i += THREADS_DECODE) {
            const int at = column + i % 8 * CHUNK;
            copy_async_16(to + i / 8 * STAGED_ROW + i % 8 * 16, k + size_t(key + i / 8) * k_stride + at,
                          key + i / 8 < end && at < hd);
        }
    };
    float score[G];
    stage(0);
    copy_async_commit();
    for (int step = 0; step < steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) stage(step + 1);
        copy_async_commit();
        if (step % parts == 0) {
#pragma unroll
            for (int g = 0; g < G; g++) score[g] = 0.0f;
        }
        const T* const own_key =
            reinterpret_cast<const T*>(staged + (step % 2 * THREADS_DECODE + threadIdx.x) * STAGED_ROW);
        const float* const own_queries = queries + step % parts * COLUMNS;
#pragma unroll 2
        for (int c = 0; c < COLUMNS; c += CHUNK) {
            float x[CHUNK];
            load_all<CHUNK>(x, own_key + c);
#pragma unroll
            for (int g = 0; g < G; g++) {
                float y[CHUNK];
                load_all<CHUNK>(y, own_queries + g * width + c);
#pragma unroll
                for (int i = 0; i < CHUNK; i++) score[g] += x[i] * y[i];
            }
        }
        if (step % parts == parts - 1) {
            const int key = begin + step / parts * THREADS_DECODE + threadIdx.x;
            if (key < end) {
#pragma unroll
                for (int g = 0; g < G; g++) {
                    if (inner != 0.0f) score[g] = capped(score[g], inner);
                    if (key < start_of(g) || key > past + query_of(g)) score[g] = HIDDEN;
                }
                store_all<G>(scores + (key - begin) * G, score);
            }
        }
    }
    __syncthreads();

    for (int g = threadIdx.x / 32; g < min(G, rows - own); g += THREADS_DECODE / 32) {
        const int lane = threadIdx.x % 32;
        float largest = HIDDEN, total = 0.0f;
        for (int i = lane; i < end - begin; i += 32) largest = fmaxf(largest, scores[i * G + g]);
        largest = fmaxf(warp_max(largest) * factor, NONE);
        for (int i = lane; i < end - begin; i += 32) {
            const float p = exp2_fast(scores[i * G + g] * factor - largest);
            scores[i * G + g] = p;
            total += p;
        }
        total = warp_sum(total);
        if (lane == 0) {
            stats[(part + size_t(g) * gridDim.x) * 2] = largest;
            stats[(part + size_t(g) * gridDim.x) * 2 + 1] = total;
        }
    }
    __syncthreads();

    // Two columns to a thread; threads that are left over share the keys.
    v += row * v_batch + key_head * hd;
    int lanes = 1;
    while (lanes * 2 < hd && lanes < THREADS_DECODE) lanes *= 2;
    const int groups = THREADS_DECODE / lanes, lane = threadIdx.x % lanes, key_group = threadIdx.x / lanes;
    float* const partial = reinterpret_cast<float*>(staged); // (groups, G, 2 lanes)
    for (int block = 0; block < hd; block += 2 * lanes) {
        const int column = block + 2 * lane;
        float sum[G][2];
#pragma unroll
        for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = 0.0f;
        if (column < hd) {
#pragma unroll 4
            for (int i = key_group; i < end - begin; i += groups) {
                const auto value = *reinterpret_cast<const Pack<T, 2>*>(v + size_t(begin + i) * k_stride + column);
                float p[G];
                load_all<G>(p, scores + i * G);
#pragma unroll
                for (int g = 0; g < G; g++) {
                    sum[g][0] += p[g] * load(value.at[0]);
                    sum[g][1] += p[g] * load(value.at[1]);
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++) store_all<2>(partial + ((key_group * G + g) * lanes + lane) * 2, sum[g]);
        __syncthreads();
        for (int i = threadIdx.x; i < G * lanes * 2; i += THREADS_DECODE) {
            const int g = i / (lanes * 2), at = block + i % (lanes * 2);
            if (own + g >= rows || at >= hd) continue;
            float total = 0.0f;
            for (int other = 0; other < groups; other++) total += partial[other * G * lanes * 2 + i];
            sums[(part + size_t(g) * gridDim.x) * hd + at] = total;
        }
    }
}

// One block per row: what `splits` blocks of keys contribute under their joint maximum, divided by the sum of exponentials,
// that of the sink too. grid = (rows, b * kv), shared: a weight for each split.
template <typename T>
__device__ inline void join(const float* stats, const float* sums, const float* sinks, T* y, int first_row, int rows,
                            int splits, const Sizes& sizes, float* weights) {
    const int row = blockIdx.y / sizes.kv, key_head = blockIdx.y % sizes.kv, group = sizes.h / sizes.kv;
    const int r = first_row + blockIdx.x, head = key_head * group + r / sizes.sq, lane = threadIdx.x % 32;
    const size_t part = (size_t(blockIdx.y) * rows + blockIdx.x) * splits;
    const float sink = sinks ? sinks[head] * LOG2_E : NONE;
    float largest = sink, total = 0.0f;
    for (int i = lane; i < splits; i += 32) largest = fmaxf(largest, stats[(part + i) * 2]);
    largest = warp_max(largest);
    for (int i = lane; i < splits; i += 32) {
        const float weight = exp2_fast(stats[(part + i) * 2] - largest);
        total += weight * stats[(part + i) * 2 + 1];
        if (threadIdx.x < 32) weights[i] = stats[(part + i) * 2 + 1] > 0.0f ? weight : 0.0f;
    }
    total = warp_sum(total) + exp2_fast(sink - largest);
    __syncthreads();
    for (int column = threadIdx.x; column < sizes.hd; column += blockDim.x) {
        float sum = 0.0f;
        // Blocks that see nothing have written no sums.
        for (int i = 0; i < splits; i++) {
            if (weights[i] > 0.0f) sum += weights[i] * sums[(part + i) * sizes.hd + column];
        }
        y[sizes.result(row, r % sizes.sq, head) + column] = store<T>(sum / total);
    }
}

} // namespace
