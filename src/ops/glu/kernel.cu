// The gate of a feed-forward.
//   forward:   y = gate factor * up factor, as gates.cuh has them
//   backward:  dgate = dy * up factor * gate slope,  dup = dy * gate factor * up slope,  hidden = y of forward
// Shapes     gate, up, y, dy, dgate, dup (rows, width), hidden the same or null. Rows of gate, up, dgate and dup begin `apart`
//            numbers from one another, the others are contiguous.
// Types      all bf16 or all f32; computed in f32.
// Launch     one thread per group of N = 8 or 1, 256 per block, grid = ceil(groups / 256).
// Writes     y, dgate, dup, hidden with =.
// Requires   for N = 8: width % 8 == 0, apart % 8 == 0, addresses aligned to 16; fewer than 2^32 groups; checked in cuda.rs.
// Reference  the test in mod.rs.
#include "gates.cuh"

// Where a group begins in gate and up.
template <int N> __device__ inline int64_t place(int64_t group, int64_t width, int64_t apart) {
    const unsigned per_row = unsigned(width / N), row = unsigned(group) / per_row;
    return row * apart + (unsigned(group) - row * per_row) * int64_t(N);
}

template <typename T, int N>
__device__ inline void glu_forward(const T* gate, const T* up, T* y, int kind, float limit, int64_t groups, int64_t width,
                                   int64_t apart) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const int64_t at = place<N>(group, width, apart);
    float g[N], u[N];
    load_all(g, gate + at);
    load_all(u, up + at);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const GateFactors factors = gate_factors(kind, limit, g[i], u[i]);
        g[i] = factors.gate * factors.up;
    }
    store_all(y + group * N, g);
}

template <typename T, int N>
__device__ inline void glu_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, T* hidden, int kind,
                                    float limit, int64_t groups, int64_t width, int64_t apart) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const int64_t at = place<N>(group, width, apart);
    float g[N], u[N], d[N], h[N];
    load_all(g, gate + at);
    load_all(u, up + at);
    load_all(d, dy + group * N);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const GateFactors factors = gate_factors(kind, limit, g[i], u[i]);
        h[i] = factors.gate * factors.up;
        g[i] = d[i] * factors.up * factors.dgate;
        u[i] = d[i] * factors.gate * factors.dup;
    }
    store_all(dgate + at, g);
    store_all(dup + at, u);
    if (hidden != nullptr) store_all(hidden + group * N, h);
}

#define GLU(T, X, N)                                                                                                          \
    KERNEL(glu_forward_##T##_##N, const X* gate, const X* up, X* y, int32_t kind, float limit, int64_t groups, int64_t width, \
           int64_t apart) {                                                                                                   \
        glu_forward<X, N>(gate, up, y, kind, limit, groups, width, apart);                                                    \
    }                                                                                                                         \
    KERNEL(glu_backward_##T##_##N, const X* gate, const X* up, const X* dy, X* dgate, X* dup, X* hidden, int32_t kind,        \
           float limit, int64_t groups, int64_t width, int64_t apart) {                                                       \
        glu_backward<X, N>(gate, up, dy, dgate, dup, hidden, kind, limit, groups, width, apart);                              \
    }
GLU(f32, float, 8)
GLU(bf16, bf16, 8)
GLU(f32, float, 1)
GLU(bf16, bf16, 1)
