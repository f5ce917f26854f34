// Copy: a strided tensor in row-major order, in another dtype if asked for.
//   y[i0, i1, i2, i3, i4] = x[i0 s0 + i1 s1 + i2 s2 + i3 s3 + i4 s4],  i4 in groups of N
// Shapes     y (d0, d1, d2, d3, d4) contiguous; x by the strides s, in elements; dimensions that are lacking are of size 1.
// Types      x, y bf16 or f32: four kernels for N = 8 and for N = 1. Other types of 4 bytes are copied as f32.
// Launch     one thread per group, 256 per block, grid = ceil(groups / 256).
// Writes     y with =, all of it.
// Requires   fewer than 2^32 groups; for N = 8: d4 % 8 == 0, s4 = 1, other strides % 8 == 0, addresses aligned to 16;
//            checked in cuda.rs.
// Reference  host::cast.
#include "kernel.cuh"

struct Strides {
    int64_t at[5];
};

template <typename X, typename Y, int N>
__device__ inline void copy(const X* x, Y* y, int64_t groups, unsigned d1, unsigned d2, unsigned d3, unsigned d4, Strides s) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    unsigned rest = unsigned(group);
    int64_t from = 0;
    const unsigned sizes[4] = {d1, d2, d3, d4 / N};
    for (int i = 3; i >= 0; i--) {
        const unsigned next = rest / sizes[i];
        from += int64_t(rest - next * sizes[i]) * (i == 3 ? s.at[4] * N : s.at[i + 1]);
        rest = next;
    }
    from += rest * s.at[0];
    if constexpr (sizeof(X) == sizeof(Y)) {
        copy_all<N>(y + group * N, x + from); // Bits, not numbers: a NaN keeps its payload.
    } else {
        float values[N];
        load_all(values, x + from);
        store_all(y + group * N, values);
    }
}

#define COPY(name, X, Y, N)                                                                                                    \
    KERNEL(name, const X* x, Y* y, int64_t groups, int64_t d1, int64_t d2, int64_t d3, int64_t d4, int64_t s0, int64_t s1,     \
           int64_t s2, int64_t s3, int64_t s4) {                                                                               \
        copy<X, Y, N>(x, y, groups, unsigned(d1), unsigned(d2), unsigned(d3), unsigned(d4), {{s0, s1, s2, s3, s4}});           \
    }
COPY(copy_f32_f32_8, float, float, 8)
COPY(copy_f32_bf16_8, float, bf16, 8)
COPY(copy_bf16_f32_8, bf16, float, 8)
COPY(copy_bf16_bf16_8, bf16, bf16, 8)
COPY(copy_f32_f32_1, float, float, 1)
COPY(copy_f32_bf16_1, float, bf16, 1)
COPY(copy_bf16_f32_1, bf16, float, 1)
COPY(copy_bf16_bf16_1, bf16, bf16, 1)
