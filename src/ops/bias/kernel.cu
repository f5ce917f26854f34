// A vector added to every row, and sums over rows.
//   add_bias:      y = x + bias
//   column_sums:   partials[p] = sum of the rows of part p of dy
//   add_partials:  grads[g] += sum over p of partials[g, p]
// Shapes     x, y, dy (rows, dim); bias, grads (dim); partials (parts, dim), for add_partials one or two of these. Contiguous.
// Types      x, y, dy bf16 or f32; bias bf16 or f32; partials, grads and every sum f32.
// Launch     add_bias: one thread per group of N = 8 or 1, 256 per block, grid = ceil(groups / 256).
//            column_sums: 8 warps per block, a lane per group; grid = (ceil(dim / 32 N), parts); shared 8 x 32 N floats.
//            add_partials: 32 warps per block, a lane per column; grid = (ceil(dim / 32), grads); shared 32 x 32 floats.
// Writes     y, partials with =; grads with +=, each by one thread, in an order that is always the same.
// Requires   for N = 8: dim % 8 == 0, addresses aligned to 16; fewer than 2^32 groups; checked in cuda.rs.
// Reference  the test in mod.rs.
#include "kernel.cuh"

template <typename X, typename B, int N>
__device__ inline void add_bias(const X* x, const B* bias, X* y, int64_t groups, int64_t dim) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    float values[N], b[N];
    load_all(values, x + group * N);
    load_all(b, bias + unsigned(group) % unsigned(dim / N) * N);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] += b[i];
    store_all(y + group * N, values);
}

#define ADD_BIAS(name, X, B, N)                                                          \
    KERNEL(name, const X* x, const B* bias, X* y, int64_t groups, int64_t dim) {         \
        add_bias<X, B, N>(x, bias, y, groups, dim);                                      \
    }
ADD_BIAS(add_bias_f32_f32_8, float, float, 8)
ADD_BIAS(add_bias_f32_bf16_8, float, bf16, 8)
ADD_BIAS(add_bias_bf16_f32_8, bf16, float, 8)
ADD_BIAS(add_bias_bf16_bf16_8, bf16, bf16, 8)
ADD_BIAS(add_bias_f32_f32_1, float, float, 1)
ADD_BIAS(add_bias_f32_bf16_1, float, bf16, 1)
ADD_BIAS(add_bias_bf16_f32_1, bf16, float, 1)
ADD_BIAS(add_bias_bf16_bf16_1, bf16, bf16, 1)

template <typename Y, int N>
__device__ inline void column_sums(const Y* dy, float* partials, int64_t rows, int64_t dim) {
    SHARED(shared_sums);
    float* sums = reinterpret_cast<float*>(shared_sums); // (warps, 32 N)
    constexpr int WIDTH = 32 * N;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t first_column = int64_t(blockIdx.x) * WIDTH, column = first_column + lane * N;
    const int64_t rows_per_part = (rows + gridDim.y - 1) / gridDim.y;
    const int64_t first = blockIdx.y * rows_per_part;
    const int64_t end = first + rows_per_part < rows ? first + rows_per_part : rows;
    float sum[N] = {};
    if (column < dim) {
#pragma unroll 4
        for (int64_t row = first + warp; row < end; row += warps) {
            float values[N];
            load_all(values, dy + row * dim + column);
#pragma unroll
            for (int i = 0; i < N; i++) sum[i] += values[i];
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) sums[warp * WIDTH + lane * N + i] = sum[i];
    __syncthreads();
    const int i = threadIdx.x;
    if (i < WIDTH && first_column + i < dim) {
        float total = 0;
        for (int w = 0; w < warps; w++) total += sums[w * WIDTH + i];
        partials[blockIdx.y * dim + first_column + i] = total;
    }
}

KERNEL(column_sums_f32_8, const float* dy, float* partials, int64_t rows, int64_t dim) {
    column_sums<float, 8>(dy, partials, rows, dim);
}
KERNEL(column_sums_bf16_8, const bf16* dy, float* partials, int64_t rows, int64_t dim) {
    column_sums<bf16, 8>(dy, partials, rows, dim);
}
KERNEL(column_sums_f32_1, const float* dy, float* partials, int64_t rows, int64_t dim) {
    column_sums<float, 1>(dy, partials, rows, dim);
}
KERNEL(column_sums_bf16_1, const bf16* dy, float* partials, int64_t rows, int64_t dim) {
    column_sums<bf16, 1>(dy, partials, rows, dim);
}

KERNEL(add_partials, const float* partials, float* grad0, float* grad1, int64_t parts, int64_t dim) {
    SHARED(shared_parts);
    float* sums = reinterpret_cast<float*>(shared_parts); // (warps, 32)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t column = int64_t(blockIdx.x) * 32 + lane;
    partials += blockIdx.y * parts * dim;
    float sum = 0;
    if (column < dim) {
#pragma unroll 4
        for (int64_t part = warp; part < parts; part += warps) sum += partials[part * dim + column];
    }
    sums[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp == 0 && column < dim) {
        float total = 0;
        for (int w = 0; w < warps; w++) total += sums[w * 32 + lane];
        float* grad = blockIdx.y == 0 ? grad0 : grad1;
        grad[column] += total;
    }
}
