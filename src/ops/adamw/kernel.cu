// The optimizer's step over flat buffers, which reads what it depends on where it is.
//   adam_squares:  squares[block] = sum of g^2 over the block's part
//   adam_decide:   outcome = norm, loss, whether the step is applied, and the factor that clips the gradients
//   adam:          g' = scale g + decay w;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'^2;
//                  w = keep w - rate m / (sqrt(v) inverse_sqrt2 + eps);  copy = w;  g = 0.
//                  Where the step is not applied: g = 0, and nothing else.
// Shapes     g, w, m, v, copy (n); squares (count) of all stages; loss (1); rates (5): rate, inverse_sqrt2, keep, max_norm,
//            max_loss; outcome (4): norm, loss, applied (1 or 0), scale.
// Types      g, loss f32; w, m, v all bf16 or all f32; copy the other of these, or null; squares, rates, outcome f64.
//            Sums of eight squares f32, of these f64.
// Launch     adam_squares: 256 threads, any grid: groups of 8 in turns; shared 32 doubles. adam_decide: one block of 1024;
//            shared 32 doubles. adam: a thread per group of 8, the last of fewer; 256 per block, grid = ceil(n / 2048).
// Writes     with =, sums in an order that is always the same.
// Requires   addresses aligned to 16.
// Reference  cpu.rs.
#include "kernel.cuh"

enum Rate { RATE, INVERSE_SQRT2, KEEP, MAX_NORM, MAX_LOSS };
enum Outcome { NORM, LOSS, APPLIED, SCALE };

KERNEL(adam_squares, const float* g, int64_t n, double* squares) {
    SHARED(squares_scratch);
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
    double sum = 0;
#pragma unroll 4
    for (int64_t group = first; group < n / 8; group += step) {
        float values[8], squares_of_group = 0;
        load_all(values, g + group * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) squares_of_group += values[i] * values[i];
        sum += squares_of_group;
    }
    const int64_t rest = n / 8 * 8 + first;
    if (rest < n) sum += double(g[rest]) * g[rest];
    sum = block_sum(sum, reinterpret_cast<double*>(squares_scratch));
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

__device__ inline bool is_finite(double x) { return x - x == 0; }

KERNEL(adam_decide, const double* squares, int64_t count, const float* loss, const double* rates, double* outcome) {
    SHARED(decide_scratch);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += squares[i];
    sum = block_sum(sum, reinterpret_cast<double*>(decide_scratch));
    if (threadIdx.x != 0) return;
    const double norm = sqrt(sum), own_loss = loss[0], scale = rates[MAX_NORM] / (norm + 1e-6);
    outcome[NORM] = norm;
    outcome[LOSS] = own_loss;
    outcome[APPLIED] = is_finite(norm) && is_finite(own_loss) && own_loss <= rates[MAX_LOSS] ? 1 : 0;
    outcome[SCALE] = scale < 1 ? scale : 1;
}

struct Adam {
    float beta1, beta2, one_minus_beta1, one_minus_beta2, eps, decay, rate, inverse_sqrt2, keep, scale;

    __device__ inline void step(float& weight, float gradient, float& m, float& v) const {
        gradient = gradient * scale + decay * weight;
        m = beta1 * m + one_minus_beta1 * gradient;
        v = beta2 * v + one_minus_beta2 * gradient * gradient;
        weight = weight * keep - rate * m / (sqrtf(v) * inverse_sqrt2 + eps);
    }
};

template <typename W, typename C, int N>
__device__ inline void adam_group(const Adam& adam, W* w, C* copy, float* g, W* m, W* v) {
    float weights[N], gradients[N], first[N], second[N];
    load_all(weights, w);
    load_all(gradients, g);
    load_all(first, m);
    load_all(second, v);
#pragma unroll
    for (int i = 0; i < N; i++) {
        adam.step(weights[i], gradients[i], first[i], second[i]);
        weights[i] = load(store<W>(weights[i])); // The copy is made of the weight as it is stored.
        gradients[i] = 0;
    }
    store_all(w, weights);
    store_all(m, first);
    store_all(v, second);
    store_all(g, gradients);
    if (copy != nullptr) store_all(copy, weights);
}

template <typename W, typename C>
__device__ inline void adam_step(W* w, C* copy, float* g, W* m, W* v, int64_t n, const double* rates, const double* outcome,
                                 Adam adam) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (at >= n) return;
    const int left = n - at < 8 ? int(n - at) : 8;
    if (outcome[APPLIED] == 0) {
        for (int i = 0; i < left; i++) g[at + i] = 0;
        return;
    }
    adam.rate = float(rates[RATE]);
    adam.inverse_sqrt2 = float(rates[INVERSE_SQRT2]);
    adam.keep = float(rates[KEEP]);
    adam.scale = float(outcome[SCALE]);
    if (left == 8) {
        adam_group<W, C, 8>(adam, w + at, copy == nullptr ? nullptr : copy + at, g + at, m + at, v + at);
    } else {
        for (int64_t i = at; i < n; i++) {
            adam_group<W, C, 1>(adam, w + i, copy == nullptr ? nullptr : copy + i, g + i, m + i, v + i);
        }
    }
}

#define ADAM(name, W, C)                                                                                                       \
    KERNEL(name, W* w, C* copy, float* g, W* m, W* v, int64_t n, const double* rates, const double* outcome, float beta1,      \
           float beta2, float one_minus_beta1, float one_minus_beta2, float eps, float decay) {                                \
        const Adam adam = {beta1, beta2, one_minus_beta1, one_minus_beta2, eps, decay, 0, 0, 0, 0};                            \
        adam_step<W, C>(w, copy, g, m, v, n, rates, outcome, adam);                                                            \
    }
ADAM(adam_f32, float, bf16)
ADAM(adam_bf16, bf16, float)
