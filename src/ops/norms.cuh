// What the norms share: rows that threads hold in registers, and weights of either type.
//
// A row of dim numbers is held by WIDTH threads, a warp or a whole block: thread t has numbers 8 (k WIDTH + t) and the seven
// after it, for each k < K. What is beyond dim is zero.
#pragma once

#include "kernel.cuh"

constexpr int MAX_WARPS = 32; // of a block, as block_sum wants it

// The sum over the threads of a row, in all of them.
template <int WIDTH> __device__ inline float row_sum(float x, float* scratch) {
    if constexpr (WIDTH == 32) {
        return warp_sum(x);
    } else {
        return block_sum(x, scratch);
    }
}

template <int WIDTH, int K, typename T> __device__ inline void load_row(float (&row)[K][8], const T* from, int64_t dim) {
    const int t = threadIdx.x % WIDTH;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * WIDTH + t) * 8;
        if (column < dim) {
            load_all(row[k], from + column);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) row[k][i] = 0;
        }
    }
}

template <int WIDTH, int K, typename T> __device__ inline void store_row(T* to, const float (&row)[K][8], int64_t dim) {
    const int t = threadIdx.x % WIDTH;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * WIDTH + t) * 8;
        if (column < dim) store_all(to + column, row[k]);
    }
}

// A weight or bias: bf16 or f32, or null for numbers that are all `otherwise`.
struct Weights {
    const void* at;
    bool is_bf16;
    float otherwise;

    template <int N> __device__ inline void load_at(float (&to)[N], int64_t column) const {
        if (at == nullptr) {
#pragma unroll
            for (int i = 0; i < N; i++) to[i] = otherwise;
        } else if (is_bf16) {
            load_all(to, static_cast<const bf16*>(at) + column);
        } else {
            load_all(to, static_cast<const float*>(at) + column);
        }
    }

    __device__ inline float operator[](int64_t column) const {
        float number[1];
        load_at(number, column);
        return number[0];
    }
};

// Writes the sum over the block's rows of what its threads hold of each column. Where rows are held by warps, `sums` is shared
// memory for a row of each of them.
template <int WIDTH, int K>
__device__ inline void store_columns(float* to, const float (&row)[K][8], int64_t dim, float* sums) {
    if constexpr (WIDTH != 32) {
        store_row<WIDTH, K>(to, row, dim);
    } else {
        __syncthreads(); // What was in sums has been read.
        store_row<WIDTH, K>(sums + threadIdx.x / 32 * dim, row, dim);
        __syncthreads();
        for (int column = threadIdx.x; column < dim; column += blockDim.x) {
            float sum = 0;
            for (int warp = 0; warp < int(blockDim.x / 32); warp++) sum += sums[warp * dim + column];
            to[column] = sum;
        }
    }
}

// Sums over rows of dy and of dy * xhat, for rows of any width: a lane per column, a warp per row. xhat = (x - mean) * rstd,
// mean null for 0. dw, db: (parts, dim); db may be null. grid = (ceil(dim / 32), parts), shared 2 x 8 x 32 floats.
template <typename X, typename Y>
__device__ inline void norm_columns(const X* x, const Y* dy, const float* mean, const float* rstd, int64_t moment_stride,
                                    float* dw, float* db, int64_t rows, int64_t dim, float* sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t column = int64_t(blockIdx.x) * 32 + lane;
    float w = 0, b = 0;
    if (column < dim) {
        for (int64_t row = int64_t(blockIdx.y) * warps + warp; row < rows; row += int64_t(gridDim.y) * warps) {
            const float d = load(dy[row * dim + column]), m = mean == nullptr ? 0 : mean[row * moment_stride];
            w += d * ((load(x[row * dim + column]) - m) * rstd[row * moment_stride]);
            b += d;
        }
    }
    float* sums_b = sums + warps * 32;
    sums[warp * 32 + lane] = w;
    sums_b[warp * 32 + lane] = b;
    __syncthreads();
    if (warp == 0 && column < dim) {
        w = b = 0;
        for (int i = 0; i < warps; i++) {
            w += sums[i * 32 + lane];
            b += sums_b[i * 32 + lane];
        }
        dw[blockIdx.y * dim + column] = w;
        if (db != nullptr) db[blockIdx.y * dim + column] = b;
    }
}
