// The gate of a feed-forward.
//   forward:   y = gate factor * up factor, as gates.cuh has them
//   backward:  dgate = dy * up factor * gate slope,  dup = dy * gate factor * up slope,  hidden = y of forward
// Shapes     gate, up, y, dy, dgate, dup (n), hidden the same or null. Contiguous.
// Types      all bf16 or all f32; computed in f32.
// Launch     one thread per group of N = 8 or 1, 256 per block, grid = ceil(groups / 256).
// Writes     y, dgate, dup, hidden with =.
// Requires   for N = 8: n % 8 == 0, addresses aligned to 16; checked in cuda.rs.
// Reference  the test in mod.rs.
#include "gates.cuh"

template <typename T, int N>
__device__ inline void glu_forward(const T* gate, const T* up, T* y, int kind, float limit, int64_t groups) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    float g[N], u[N];
    load_all(g, gate + group * N);
    load_all(u, up + group * N);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const GateFactors factors = gate_factors(kind, limit, g[i], u[i]);
        g[i] = factors.gate * factors.up;
    }
    store_all(y + group * N, g);
}

template <typename T, int N>
__device__ inline void glu_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, T* hidden, int kind,
                                    float limit, int64_t groups) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    float g[N], u[N], d[N], h[N];
    load_all(g, gate + group * N);
    load_all(u, up + group * N);
    load_all(d, dy + group * N);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const GateFactors factors = gate_factors(kind, limit, g[i], u[i]);
        h[i] = factors.gate * factors.up;
        g[i] = d[i] * factors.up * factors.dgate;
        u[i] = d[i] * factors.gate * factors.dup;
    }
    store_all(dgate + group * N, g);
    store_all(dup + group * N, u);
    if (hidden != nullptr) store_all(hidden + group * N, h);
}

#define GLU(T, X, N)                                                                                                          \
    KERNEL(glu_forward_##T##_##N, const X* gate, const X* up, X* y, int32_t kind, float limit, int64_t groups) {              \
        glu_forward<X, N>(gate, up, y, kind, limit, groups);                                                                  \
    }                                                                                                                         \
    KERNEL(glu_backward_##T##_##N, const X* gate, const X* up, const X* dy, X* dgate, X* dup, X* hidden, int32_t kind,        \
           float limit, int64_t groups) {                                                                                     \
        glu_backward<X, N>(gate, up, dy, dgate, dup, hidden, kind, limit, groups);                                            \
    }
GLU(f32, float, 8)
GLU(bf16, bf16, 8)
GLU(f32, float, 1)
GLU(bf16, bf16, 1)
