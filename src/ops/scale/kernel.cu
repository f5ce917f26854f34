// Products with a number, or with one for each position.
//   scale:            y = factor * x
//   scale_positions:  y[b, p, i] = factors[p] * x[b, p, i]
// Shapes     x, y (n); for scale_positions (b, s, width), factors (s). Contiguous.
// Types      x, y bf16 or f32; factors f32.
// Launch     one thread per group of N = 8 or 1, 256 per block, grid = ceil(groups / 256).
// Writes     y with =.
// Requires   for N = 8: n % 8 == 0, width % 8 == 0, addresses aligned to 16; fewer than 2^32 groups; checked in cuda.rs.
// Reference  the tests in mod.rs.
#include "kernel.cuh"

template <typename X, int N> __device__ inline void scale_group(const X* x, X* y, float factor, int64_t group) {
    float values[N];
    load_all(values, x + group * N);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] *= factor;
    store_all(y + group * N, values);
}

#define SCALE(T, X, N)                                                                                                       \
    KERNEL(scale_##T##_##N, const X* x, X* y, float factor, int64_t groups) {                                                \
        const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;                                                \
        if (group < groups) scale_group<X, N>(x, y, factor, group);                                                          \
    }                                                                                                                        \
    KERNEL(scale_positions_##T##_##N, const X* x, X* y, const float* factors, int64_t groups, int64_t s, int64_t width) {    \
        const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;                                                \
        if (group < groups) scale_group<X, N>(x, y, factors[unsigned(group) / unsigned(width / N) % unsigned(s)], group);    \
    }
SCALE(f32, float, 8)
SCALE(bf16, bf16, 8)
SCALE(f32, float, 1)
SCALE(bf16, bf16, 1)
