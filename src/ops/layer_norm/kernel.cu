// LayerNorm, forward and backward.
//   forward:   y = xhat * w + b,  xhat = (x - mean) * rstd,  rstd = 1 / sqrt(variance + eps)
//   backward:  dx = rstd * (w*dy - mean(w*dy) - xhat * mean(w*dy*xhat))
//   columns:   partials = sums over some of the rows of dy*xhat, and of dy
// Shapes     x, y, dy, dx (rows, dim); weight, bias (dim); moments (rows, 2), mean and rstd of each row; partials (2, parts,
//            dim), backward: or null, parts = grid. Contiguous.
// Types      x, dx bf16 or f32; y, dy as x or bf16; weight, bias both bf16 or both f32; moments, partials and every sum f32.
// Launch     Rows in registers: _32_1, _32_4 a warp per row, 8 per block, dim <= 256, 1024; _256_2, _256_4 a block of 256 per
//            row, dim <= 4096, 8192. forward: a row per warp or block. backward: rows in turns, shared max(8 x dim, 32) floats
//            for warps, 32 floats for blocks.
//            _any: a block of 256 per row, which is read again for each sum; shared 32 floats; backward leaves partials
//            alone. columns: norm_columns in norms.cuh.
// Writes     all with =, in an order that is always the same.
// Requires   rows in registers: dim % 8 == 0, addresses aligned to 16; checked in cuda.rs.
// Reference  the test in mod.rs.
#include "norms.cuh"

template <typename X, typename Y, int WIDTH, int K>
__device__ inline void layer_norm_forward(const X* x, Weights weight, Weights bias, float eps, Y* y, float* moments,
                                          int64_t rows, int64_t dim) {
    SHARED(forward_scratch);
    float* scratch = reinterpret_cast<float*>(forward_scratch);
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / WIDTH) + threadIdx.x / WIDTH;
    if (row >= rows) return;
    float values[K][8];
    load_row<WIDTH, K>(values, x + row * dim, dim);
    float sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) sum += values[k][i];
    const float mean = row_sum<WIDTH>(sum, scratch) / dim;
#pragma unroll
    for (int k = 0; k < K; k++) {
        if ((k * WIDTH + threadIdx.x % WIDTH) * 8 >= dim) break;
#pragma unroll
        for (int i = 0; i < 8; i++) squares += (values[k][i] - mean) * (values[k][i] - mean);
    }
    const float rstd = 1.0f / sqrtf(row_sum<WIDTH>(squares, scratch) / dim + eps);
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * WIDTH + threadIdx.x % WIDTH) * 8;
        if (column >= dim) break;
        float w[8], b[8];
        weight.load_at(w, column);
        bias.load_at(b, column);
#pragma unroll
        for (int i = 0; i < 8; i++) values[k][i] = (values[k][i] - mean) * rstd * w[i] + b[i];
    }
    store_row<WIDTH, K>(y + row * dim, values, dim);
    if (threadIdx.x % WIDTH == 0) {
        moments[2 * row] = mean;
        moments[2 * row + 1] = rstd;
    }
}

template <typename X, typename Y, int WIDTH, int K>
__device__ inline void layer_norm_backward(const X* x, Weights weight, const float* moments, const Y* dy, X* dx,
                                           float* partials, int64_t rows, int64_t dim) {
    SHARED(backward_scratch);
    float* scratch = reinterpret_cast<float*>(backward_scratch);
    const int64_t per_block = blockDim.x / WIDTH;
    float dw[K][8] = {}, db[K][8] = {};
    for (int64_t row = blockIdx.x * per_block + threadIdx.x / WIDTH; row < rows; row += gridDim.x * per_block) {
        float xhat[K][8], wdy[K][8];
        load_row<WIDTH, K>(xhat, x + row * dim, dim);
        load_row<WIDTH, K>(wdy, dy + row * dim, dim);
        const float mean = moments[2 * row], rstd = moments[2 * row + 1];
        float sum = 0, products = 0;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * WIDTH + threadIdx.x % WIDTH) * 8;
            if (column >= dim) break;
            float w[8];
            weight.load_at(w, column);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                xhat[k][i] = (xhat[k][i] - mean) * rstd;
                dw[k][i] += wdy[k][i] * xhat[k][i];
                db[k][i] += wdy[k][i];
                wdy[k][i] *= w[i];
                sum += wdy[k][i];
                products += wdy[k][i] * xhat[k][i];
            }
        }
        const float mean_wdy = row_sum<WIDTH>(sum, scratch) / dim;
        const float mean_product = row_sum<WIDTH>(products, scratch) / dim;
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 8; i++) wdy[k][i] = rstd * (wdy[k][i] - mean_wdy - xhat[k][i] * mean_product);
        store_row<WIDTH, K>(dx + row * dim, wdy, dim);
    }
    if (partials != nullptr) {
        store_columns<WIDTH, K>(partials + blockIdx.x * dim, dw, dim, scratch);
        store_columns<WIDTH, K>(partials + (gridDim.x + blockIdx.x) * dim, db, dim, scratch);
    }
}

template <typename X, typename Y>
__device__ inline void layer_norm_forward_any(const X* x, Weights weight, Weights bias, float eps, Y* y, float* moments,
                                              int64_t dim) {
    SHARED(forward_any_scratch);
    float* scratch = reinterpret_cast<float*>(forward_any_scratch);
    x += blockIdx.x * dim;
    float sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) sum += load(x[i]);
    const float mean = block_sum(sum, scratch) / dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) squares += (load(x[i]) - mean) * (load(x[i]) - mean);
    const float rstd = 1.0f / sqrtf(block_sum(squares, scratch) / dim + eps);
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
        y[blockIdx.x * dim + i] = store<Y>((load(x[i]) - mean) * rstd * weight[i] + bias[i]);
    }
    if (threadIdx.x == 0) {
        moments[2 * blockIdx.x] = mean;
        moments[2 * blockIdx.x + 1] = rstd;
    }
}

template <typename X, typename Y>
__device__ inline void layer_norm_backward_any(const X* x, Weights weight, const float* moments, const Y* dy, X* dx,
                                               int64_t dim) {
    SHARED(backward_any_scratch);
    float* scratch = reinterpret_cast<float*>(backward_any_scratch);
    x += blockIdx.x * dim;
    dy += blockIdx.x * dim;
    const float mean = moments[2 * blockIdx.x], rstd = moments[2 * blockIdx.x + 1];
    float sum = 0, products = 0;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
        const float wdy = weight[i] * load(dy[i]);
        sum += wdy;
        products += wdy * ((load(x[i]) - mean) * rstd);
    }
    const float mean_wdy = block_sum(sum, scratch) / dim, mean_product = block_sum(products, scratch) / dim;
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
        const float wdy = weight[i] * load(dy[i]), xhat = (load(x[i]) - mean) * rstd;
        dx[blockIdx.x * dim + i] = store<X>(rstd * (wdy - mean_wdy - xhat * mean_product));
    }
}

#define ROWS(X, Y, T, WIDTH, K)                                                                                                \
    KERNEL(layer_norm_forward_##T##_##WIDTH##_##K, const X* x, const void* weight, const void* bias, int32_t is_bf16,          \
           float eps, Y* y, float* moments, int64_t rows, int64_t dim) {                                                       \
        layer_norm_forward<X, Y, WIDTH, K>(x, {weight, is_bf16 != 0, 1}, {bias, is_bf16 != 0, 0}, eps, y, moments, rows, dim); \
    }                                                                                                                          \
    KERNEL(layer_norm_backward_##T##_##WIDTH##_##K, const X* x, const void* weight, int32_t is_bf16, const float* moments,     \
           const Y* dy, X* dx, float* partials, int64_t rows, int64_t dim) {                                                   \
        layer_norm_backward<X, Y, WIDTH, K>(x, {weight, is_bf16 != 0, 1}, moments, dy, dx, partials, rows, dim);               \
    }
#define LAYER_NORM(X, Y, T)                                                                                                    \
    ROWS(X, Y, T, 32, 1)                                                                                                       \
    ROWS(X, Y, T, 32, 4)                                                                                                       \
    ROWS(X, Y, T, 256, 2)                                                                                                      \
    ROWS(X, Y, T, 256, 4)                                                                                                      \
    KERNEL(layer_norm_forward_##T##_any, const X* x, const void* weight, const void* bias, int32_t is_bf16, float eps, Y* y,   \
           float* moments, int64_t rows, int64_t dim) {                                                                        \
        layer_norm_forward_any<X, Y>(x, {weight, is_bf16 != 0, 1}, {bias, is_bf16 != 0, 0}, eps, y, moments, dim);             \
    }                                                                                                                          \
    KERNEL(layer_norm_backward_##T##_any, const X* x, const void* weight, int32_t is_bf16, const float* moments, const Y* dy,  \
           X* dx, float* partials, int64_t rows, int64_t dim) {                                                                \
        layer_norm_backward_any<X, Y>(x, {weight, is_bf16 != 0, 1}, moments, dy, dx, dim);                                     \
    }                                                                                                                          \
    KERNEL(layer_norm_columns_##T, const X* x, const float* moments, const Y* dy, float* partials, int64_t rows,               \
           int64_t dim) {                                                                                                      \
        SHARED(columns_scratch);                                                                                               \
        float* sums = reinterpret_cast<float*>(columns_scratch);                                                               \
        norm_columns<X, Y>(x, dy, moments, moments + 1, 2, partials, partials + gridDim.y * dim, rows, dim, sums);             \
    }
LAYER_NORM(float, float, f32_f32)
LAYER_NORM(float, bf16, f32_bf16)
LAYER_NORM(bf16, bf16, bf16_bf16)
