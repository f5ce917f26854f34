// Cross-entropy over rows of logits that lie in memory, and what frames it.
//   loss = logsumexp(logits) - logits[target],  dlogits = mean * (softmax - onehot) * slope of the softcap
// Shapes     logits, dlogits (rows, vocab_size), contiguous; targets, losses (rows); scalars (2): mean, number of targets.
// Types      logits bf16 or f32, dlogits in their place; targets u32 (IGNORE is no target); all else f32.
// Launch     count_targets and sum_losses: one block of 1,024; cross_entropy: one block of 512 per row.
// Writes     everything with =; a target outside the vocabulary makes its loss NaN.
// Requires   nothing: rows that are not aligned to 16 bytes go number by number.
// Reference  cross_entropy_matches_its_reference in mod.rs. Source: Milakov & Gimelshein, arXiv:1805.02867, algorithm 3.
#include "kernel.cuh"

constexpr uint32_t IGNORE = 0xffffffffu;

// scalars[0] = scale / number of targets (0 if there are none), scalars[1] = that number.
KERNEL(count_targets, const uint32_t* targets, int64_t n, float scale, float* scalars) {
    __shared__ float scratch[32];
    float count = 0; // Of one thread, far below 2^24.
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) count += targets[i] != IGNORE;
    count = block_sum(count, scratch);
    if (threadIdx.x == 0) {
        scalars[0] = count > 0 ? scale / count : 0;
        scalars[1] = count;
    }
}

// loss = scalars[0] * sum of losses, in double, in an order that is always the same.
KERNEL(sum_losses, const float* losses, int64_t n, const float* scalars, float* loss) {
    __shared__ double scratch[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += losses[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *loss = (float)(sum * scalars[0]);
}

// A running maximum, and the sum of exponentials relative to it.
struct Statistics {
    float max, sum;

    __device__ void add(float x) {
        if (x > max) {
            sum = sum * __expf(max - x) + 1;
            max = x;
        } else {
            sum += __expf(x - max);
        }
    }

    __device__ void join(float other_max, float other_sum) {
        const float joint = fmaxf(max, other_max);
        // Nothing has been seen where the maximum is -inf; then the sum is 0 and must stay so.
        sum = (sum > 0 ? sum * __expf(max - joint) : 0) + (other_sum > 0 ? other_sum * __expf(other_max - joint) : 0);
        max = joint;
    }
};

template <typename T, bool CAPPED, bool GRADIENT>
__device__ inline void cross_entropy_row(T* logits, const uint32_t* targets, int vocab_size, float cap,
                                         const float* scalars, float* losses) {
    constexpr int WIDTH = 16 / sizeof(T);
    typedef Pack<T, WIDTH> Numbers;
    __shared__ float maxima[32], sums[32];
    T* row = logits + (int64_t)blockIdx.x * vocab_size;
    const uint32_t target = targets[blockIdx.x];
    const bool is_aligned = ((uintptr_t)row % 16) == 0;
    const int packs = is_aligned ? vocab_size / WIDTH : 0;
    Numbers* packed = reinterpret_cast<Numbers*>(row);

    if (target == IGNORE) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        if (GRADIENT)
            for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) row[i] = store<T>(0);
        return;
    }

    auto capped = [cap](float x) { return CAPPED ? cap * tanhf(x / cap) : x; };
    Statistics own = {-INFINITY, 0};
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        const Numbers numbers = packed[i];
        float values[WIDTH], largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) largest = fmaxf(largest, values[j] = capped(load(numbers.at[j])));
        if (largest > own.max) {
            own.sum *= __expf(own.max - largest);
            own.max = largest;
        }
#pragma unroll
        for (int j = 0; j < WIDTH; j++) own.sum += __expf(values[j] - own.max);
    }
    for (int i = packs * WIDTH + threadIdx.x; i < vocab_size; i += blockDim.x) own.add(capped(load(row[i])));
    for (int lane = 16; lane > 0; lane /= 2) {
        const float max = __shfl_xor_sync(ALL_LANES, own.max, lane), sum = __shfl_xor_sync(ALL_LANES, own.sum, lane);
        own.join(max, sum);
    }
    if (threadIdx.x % 32 == 0) {
        maxima[threadIdx.x / 32] = own.max;
        sums[threadIdx.x / 32] = own.sum;
    }
    __syncthreads();
    own = {maxima[0], sums[0]};
    for (int warp = 1; warp < blockDim.x / 32; warp++) own.join(maxima[warp], sums[warp]);
    const float logsumexp = own.max + __logf(own.sum);

    const float at_target = target < (uint32_t)vocab_size ? capped(load(row[target])) : NAN;
    if (threadIdx.x == 0) losses[blockIdx.x] = logsumexp - at_target;
    if (!GRADIENT) return;
    __syncthreads(); // All have read the target's logit.

    const float mean = scalars[0];
    auto gradient = [&](float x, int i) {
        const float y = capped(x);
        const float slope = CAPPED ? 1 - (y / cap) * (y / cap) : 1;
        return mean * (__expf(y - logsumexp) - (i == (int)target ? 1.0f : 0.0f)) * slope;
    };
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        Numbers numbers = packed[i];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) numbers.at[j] = store<T>(gradient(load(numbers.at[j]), i * WIDTH + j));
        packed[i] = numbers;
    }
    for (int i = packs * WIDTH + threadIdx.x; i < vocab_size; i += blockDim.x) row[i] = store<T>(gradient(load(row[i]), i));
}

#define CROSS_ENTROPY(name, T, CAPPED, GRADIENT)                                                               \
    KERNEL(name, T* logits, const uint32_t* targets, int vocab_size, float cap, const float* scalars,           \
           float* losses) {                                                                                    \
        cross_entropy_row<T, CAPPED, GRADIENT>(logits, targets, vocab_size, cap, scalars, losses);              \
    }
CROSS_ENTROPY(loss_f32, float, false, false)
CROSS_ENTROPY(loss_bf16, bf16, false, false)
CROSS_ENTROPY(loss_capped_f32, float, true, false)
CROSS_ENTROPY(loss_capped_bf16, bf16, true, false)
CROSS_ENTROPY(loss_grad_f32, float, false, true)
CROSS_ENTROPY(loss_grad_bf16, bf16, false, true)
CROSS_ENTROPY(loss_grad_capped_f32, float, true, true)
CROSS_ENTROPY(loss_grad_capped_bf16, bf16, true, true)
