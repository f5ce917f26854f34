// RMSNorm, forward and backward.
//   forward:   y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + eps)
//   backward:  dx = sum + rstd * (w*dy - xhat * mean(w*dy*xhat)),  xhat = x * rstd,  w = offset + weight or 1
//   columns:   partials = sums over some of the rows of dy*xhat
// Shapes     x, y, dy, dx (rows, dim), sum the same or null; weight (dim) or null; rstd (rows); partials (parts, dim), backward: or null, parts =
//            grid. Contiguous.
// Types      x, sum, dx bf16 or f32; y, dy as x or bf16; weight bf16 or f32; rstd, partials and every sum f32.
// Launch     Rows in registers: _32_1, _32_4 a warp per row, 8 per block, dim <= 256, 1024; _256_2, _256_4 a block of 256 per
//            row, dim <= 4096, 8192. forward: a row per warp or block. backward: rows in turns, shared max(8 x dim, 32) floats
//            for warps, 32 floats for blocks.
//            _any: a block of 256 per row, which is read twice; shared 32 floats; backward leaves partials alone. columns:
//            norm_columns in norms.cuh.
// Writes     all with =, in an order that is always the same.
// Requires   rows in registers: dim % 8 == 0, addresses aligned to 16; checked in cuda.rs.
// Reference  the tests in mod.rs.
#include "norms.cuh"

template <typename X, typename Y, int WIDTH, int K>
__device__ inline void rms_norm_forward(const X* x, Weights weight, float offset, float eps, Y* y, float* rstd, int64_t rows,
                                        int64_t dim) {
    SHARED(forward_scratch);
    float* scratch = reinterpret_cast<float*>(forward_scratch);
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / WIDTH) + threadIdx.x / WIDTH;
    if (row >= rows) return;
    float values[K][8];
    load_row<WIDTH, K>(values, x + row * dim, dim);
    float squares = 0;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) squares += values[k][i] * values[k][i];
    const float r = 1.0f / sqrtf(row_sum<WIDTH>(squares, scratch) / dim + eps);
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * WIDTH + threadIdx.x % WIDTH) * 8;
        if (column >= dim) break;
        float w[8];
        weight.load_at(w, column);
#pragma unroll
        for (int i = 0; i < 8; i++) values[k][i] = values[k][i] * r * (offset + w[i]);
    }
    store_row<WIDTH, K>(y + row * dim, values, dim);
    if (threadIdx.x % WIDTH == 0) rstd[row] = r;
}

template <typename X, typename Y, int WIDTH, int K>
__device__ inline void rms_norm_backward(const X* x, Weights weight, float offset, const float* rstd, const Y* dy,
                                         const X* sum_of_others, X* dx, float* partials, int64_t rows, int64_t dim) {
    SHARED(backward_scratch);
    float* scratch = reinterpret_cast<float*>(backward_scratch);
    const int64_t per_block = blockDim.x / WIDTH;
    float dw[K][8] = {};
    for (int64_t row = blockIdx.x * per_block + threadIdx.x / WIDTH; row < rows; row += gridDim.x * per_block) {
        float xhat[K][8], wdy[K][8];
        load_row<WIDTH, K>(xhat, x + row * dim, dim);
        load_row<WIDTH, K>(wdy, dy + row * dim, dim);
        const float r = rstd[row];
        float sum = 0;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * WIDTH + threadIdx.x % WIDTH) * 8;
            if (column >= dim) break;
            float w[8];
            weight.load_at(w, column);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                xhat[k][i] *= r;
                const float product = wdy[k][i] * xhat[k][i];
                dw[k][i] += product;
                sum += (offset + w[i]) * product;
                wdy[k][i] *= offset + w[i];
            }
        }
        const float mean = row_sum<WIDTH>(sum, scratch) / dim;
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 8; i++) wdy[k][i] = r * (wdy[k][i] - xhat[k][i] * mean);
        if (sum_of_others != nullptr) {
            load_row<WIDTH, K>(xhat, sum_of_others + row * dim, dim);
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int i = 0; i < 8; i++) wdy[k][i] += xhat[k][i];
        }
        store_row<WIDTH, K>(dx + row * dim, wdy, dim);
    }
    if (partials != nullptr) store_columns<WIDTH, K>(partials + blockIdx.x * dim, dw, dim, scratch);
}

template <typename X, typename Y>
__device__ inline void rms_norm_forward_any(const X* x, Weights weight, float offset, float eps, Y* y, float* rstd, int64_t dim) {
    SHARED(forward_any_scratch);
    x += blockIdx.x * dim;
    float squares = 0;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) squares += load(x[i]) * load(x[i]);
    const float r = 1.0f / sqrtf(block_sum(squares, reinterpret_cast<float*>(forward_any_scratch)) / dim + eps);
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
        y[blockIdx.x * dim + i] = store<Y>(load(x[i]) * r * (offset + weight[i]));
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

template <typename X, typename Y>
__device__ inline void rms_norm_backward_any(const X* x, Weights weight, float offset, const float* rstd, const Y* dy,
                                             const X* sum_of_others, X* dx, int64_t dim) {
    SHARED(backward_any_scratch);
    x += blockIdx.x * dim;
    dy += blockIdx.x * dim;
    const float r = rstd[blockIdx.x];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) sum += (offset + weight[i]) * (load(dy[i]) * (load(x[i]) * r));
    const float mean = block_sum(sum, reinterpret_cast<float*>(backward_any_scratch)) / dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
        const float others = sum_of_others != nullptr ? load(sum_of_others[blockIdx.x * dim + i]) : 0.0f;
        dx[blockIdx.x * dim + i] = store<X>(others + r * ((offset + weight[i]) * load(dy[i]) - load(x[i]) * r * mean));
    }
}

#define ROWS(X, Y, T, WIDTH, K)                                                                                                \
    KERNEL(rms_norm_forward_##T##_##WIDTH##_##K, const X* x, const void* weight, int32_t is_bf16, float offset, float eps,     \
           Y* y, float* rstd, int64_t rows, int64_t dim) {                                                                     \
        rms_norm_forward<X, Y, WIDTH, K>(x, {weight, is_bf16 != 0, 1.0f}, offset, eps, y, rstd, rows, dim);                    \
    }                                                                                                                          \
    KERNEL(rms_norm_backward_##T##_##WIDTH##_##K, const X* x, const void* weight, int32_t is_bf16, float offset,               \
           const float* rstd, const Y* dy, const X* sum, X* dx, float* partials, int64_t rows, int64_t dim) {                  \
        rms_norm_backward<X, Y, WIDTH, K>(x, {weight, is_bf16 != 0, 1.0f}, offset, rstd, dy, sum, dx, partials, rows, dim);    \
    }
#define RMS_NORM(X, Y, T)                                                                                                      \
    ROWS(X, Y, T, 32, 1)                                                                                                       \
    ROWS(X, Y, T, 32, 4)                                                                                                       \
    ROWS(X, Y, T, 256, 2)                                                                                                      \
    ROWS(X, Y, T, 256, 4)                                                                                                      \
    KERNEL(rms_norm_forward_##T##_any, const X* x, const void* weight, int32_t is_bf16, float offset, float eps, Y* y,         \
           float* rstd, int64_t rows, int64_t dim) {                                                                           \
        rms_norm_forward_any<X, Y>(x, {weight, is_bf16 != 0, 1.0f}, offset, eps, y, rstd, dim);                                \
    }                                                                                                                          \
    KERNEL(rms_norm_backward_##T##_any, const X* x, const void* weight, int32_t is_bf16, float offset, const float* rstd,      \
           const Y* dy, const X* sum, X* dx, float* partials, int64_t rows, int64_t dim) {                                     \
        rms_norm_backward_any<X, Y>(x, {weight, is_bf16 != 0, 1.0f}, offset, rstd, dy, sum, dx, dim);                          \
    }                                                                                                                          \
    KERNEL(rms_norm_columns_##T, const X* x, const float* rstd, const Y* dy, float* partials, int64_t rows, int64_t dim) {     \
        SHARED(columns_scratch);                                                                                               \
        float* sums = reinterpret_cast<float*>(columns_scratch);                                                               \
        norm_columns<X, Y>(x, dy, nullptr, rstd, 1, partials, nullptr, rows, dim, sums);                                       \
    }
RMS_NORM(float, float, f32_f32)
RMS_NORM(float, bf16, f32_bf16)
RMS_NORM(bf16, bf16, bf16_bf16)
