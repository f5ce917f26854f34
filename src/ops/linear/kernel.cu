// Softcap of logits: x = cap * tanh(x / cap), in place.
// Shapes     x (n), f32.
// Launch     one thread per number, blocks of 256.
// Writes     x with =.
// Reference  logits_may_be_capped in mod.rs.
#include "kernel.cuh"

KERNEL(softcap, float* x, int64_t n, float cap) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = cap * tanhf(x[i] / cap);
}
