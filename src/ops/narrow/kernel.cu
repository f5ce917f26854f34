// Parts of the last dimension.
//   resized:       y[r, i] = x[r, start + i], 0 where x has no such column
//   join_shared:   y[t, j] = x[t, j] followed by shared[t]
//   sum_of_heads:  y[t, i] = sum over heads j of x[t, j, start + i]
// Shapes     resized: x (rows, old), y (rows, width). join_shared: x (tokens, h, n), shared (tokens, m), y (tokens, h, n + m).
//            sum_of_heads: x (tokens, h, width), y (tokens, len). Contiguous.
// Types      all bf16 or all f32; sums f32.
// Launch     one thread per group of N = 8 or 1 numbers of y, 256 per block, grid = ceil(groups / 256).
// Writes     y with =.
// Requires   for N = 8: all widths and start % 8 == 0, addresses aligned to 16; fewer than 2^32 groups; checked in cuda.rs.
// Reference  the tests in mod.rs.
#include "kernel.cuh"

template <typename X, int N>
__device__ inline void resized(const X* x, X* y, int64_t groups, int64_t old, int64_t width, int64_t start) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const unsigned per_row = unsigned(width / N), row = unsigned(group) / per_row;
    const int64_t column = start + int64_t(unsigned(group) - row * per_row) * N;
    if (column >= 0 && column < old) {
        copy_all<N>(y + group * N, x + row * old + column);
    } else {
        const float zeros[N] = {};
        store_all(y + group * N, zeros);
    }
}

template <typename X, int N>
__device__ inline void join_shared(const X* x, const X* shared, X* y, int64_t groups, int64_t h, int64_t n, int64_t m) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const unsigned per_row = unsigned((n + m) / N), row = unsigned(group) / per_row;
    const int64_t column = int64_t(unsigned(group) - row * per_row) * N;
    const X* from = column < n ? x + row * n + column : shared + row / unsigned(h) * m + (column - n);
    copy_all<N>(y + group * N, from);
}

template <typename X, int N>
__device__ inline void sum_of_heads(const X* x, X* y, int64_t groups, int64_t h, int64_t width, int64_t start, int64_t len) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const unsigned per_row = unsigned(len / N), token = unsigned(group) / per_row;
    x += token * h * width + start + int64_t(unsigned(group) - token * per_row) * N;
    float sum[N] = {};
#pragma unroll 4
    for (int64_t head = 0; head < h; head++) {
        float values[N];
        load_all(values, x + head * width);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += values[i];
    }
    store_all(y + group * N, sum);
}

#define NARROW(T, X, N)                                                                                                       \
    KERNEL(resized_##T##_##N, const X* x, X* y, int64_t groups, int64_t old, int64_t width, int64_t start) {                  \
        resized<X, N>(x, y, groups, old, width, start);                                                                       \
    }                                                                                                                         \
    KERNEL(join_shared_##T##_##N, const X* x, const X* shared, X* y, int64_t groups, int64_t h, int64_t n, int64_t m) {       \
        join_shared<X, N>(x, shared, y, groups, h, n, m);                                                                     \
    }                                                                                                                         \
    KERNEL(sum_of_heads_##T##_##N, const X* x, X* y, int64_t groups, int64_t h, int64_t width, int64_t start, int64_t len) {  \
        sum_of_heads<X, N>(x, y, groups, h, width, start, len);                                                               \
    }
NARROW(f32, float, 8)
NARROW(bf16, bf16, 8)
NARROW(f32, float, 1)
NARROW(bf16, bf16, 1)
