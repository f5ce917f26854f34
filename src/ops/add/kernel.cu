// Sum of activations.
//   sum = x + y
// Shapes     x, y, sum (n). Contiguous.
// Types      x, sum bf16 or f32; y bf16 or f32; added in f32.
// Launch     one thread per group of N = 8 or 1, 256 per block, grid = ceil(groups / 256).
// Writes     sum with =.
// Requires   for N = 8: n % 8 == 0, addresses aligned to 16; checked in cuda.rs.
// Reference  the test in mod.rs.
#include "kernel.cuh"

template <typename X, typename Y, int N>
__device__ inline void add(const X* x, const Y* y, X* sum, int64_t groups) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    float a[N], b[N];
    load_all(a, x + group * N);
    load_all(b, y + group * N);
#pragma unroll
    for (int i = 0; i < N; i++) a[i] += b[i];
    store_all(sum + group * N, a);
}

#define ADD(name, X, Y, N) \
    KERNEL(name, const X* x, const Y* y, X* sum, int64_t groups) { add<X, Y, N>(x, y, sum, groups); }
ADD(add_f32_f32_8, float, float, 8)
ADD(add_f32_bf16_8, float, bf16, 8)
ADD(add_bf16_f32_8, bf16, float, 8)
ADD(add_bf16_bf16_8, bf16, bf16, 8)
ADD(add_f32_f32_1, float, float, 1)
ADD(add_f32_bf16_1, float, bf16, 1)
ADD(add_bf16_f32_1, bf16, float, 1)
ADD(add_bf16_bf16_1, bf16, bf16, 1)
