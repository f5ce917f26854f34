// Mixture of experts: routing, the movement of rows between tokens and sorted slots, and the experts' products.
// Counts of tokens are nowhere known to the host: grids are as large as the shapes could need, and blocks that find nothing
// to do end.
// Shapes     n tokens, slots = n * top_k. logits, dlogits (n, n_experts); bias, tokens (n_experts); experts, weights,
//            dweights (n, top_k); sorted, positions (slots); offsets (n_experts + 1); tiles (n_tiles).
//            x, y, dx, dy (n, dim); rows of sorted slots: input, result, dresult, dinput (slots, dim) and gate, up,
//            activated, dgate, dup (slots, hidden). w1, w3 (n_experts, hidden, dim), w2 (n_experts, dim, hidden). Contiguous.
// Types      Indices u32. weights, dweights, bias, gradients of weights and all sums f32; the rest bf16 or f32, rows of
//            sorted slots and expert weights the same.
// Launch     moe_route, moe_route_backward: one warp per token, 8 per block, with shared memory for each warp's numbers.
//            moe_gather: one warp per row, 8 per block. moe_scatter: one block per token. moe_tiles, moe_rebalance: one
//            block of 256. Products of rows: grid (tiles of columns, n_tiles, 128 / ROWS), in moe_up with columns of gate
//            and up in pairs; gradients of one or two matrices: grid (tiles of columns, tiles of rows, n_experts or twice
//            as many). _large: tiles of 128 x 128 by 128 threads, 64 KiB of shared memory; _small: 64 x 64 by 128,
//            32 KiB; _f32 and _bf16: 64 x 64 by 256; _hopper, in hopper.cu: 128 x 128 by 256, 96 KiB.
// Writes     gradients of weights and biases with +=, each by one thread; all else with =. The same bits every time.
// Requires   _large, _small and hopper.cu: dim and hidden multiples of 8, addresses of 16; kernels that end in _8: rows as
//            gpu::by_eights. n_experts <= 1024.
// Reference  routing_weights_match_their_reference and experts_match_their_reference in mod.rs.
#include "moe/products.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// The scores of a token in shared memory, by one warp.
template <typename T> __device__ inline void score(const T* logits, int n_experts, int softmax, float* scored) {
    const int lane = threadIdx.x % 32;
    if (softmax) {
        float max = -INFINITY, sum = 0;
        for (int e = lane; e < n_experts; e += 32) max = fmaxf(max, load(logits[e]));
        max = warp_max(max);
        for (int e = lane; e < n_experts; e += 32) {
            scored[e] = expf(load(logits[e]) - max);
            sum += scored[e];
        }
        sum = warp_sum(sum);
        for (int e = lane; e < n_experts; e += 32) scored[e] /= sum;
    } else {
        for (int e = lane; e < n_experts; e += 32) scored[e] = sigmoid(load(logits[e]));
    }
    __syncwarp();
}

// As an integer that is larger for what f32::total_cmp finds larger.
__device__ inline uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Takes experts outside the best groups out of the choice. `sums`: a number per group.
__device__ inline void limit_to_groups(float* choice, int n_experts, int groups, int limit, float* sums) {
    const int lane = threadIdx.x % 32, size = n_experts / groups;
    for (int group = lane; group < groups; group += 32) {
        float first = -INFINITY, second = -INFINITY;
        for (int e = group * size; e < (group + 1) * size; e++) {
            if (choice[e] > first) {
                second = first;
                first = choice[e];
            } else {
                second = fmaxf(second, choice[e]);
            }
        }
        sums[group] = size > 1 ? first + second : first;
    }
    __syncwarp();
    for (int group = lane; group < groups; group += 32) {
        const uint32_t own = ordered(sums[group]);
        int better = 0;
        for (int other = 0; other < groups; other++) {
            const uint32_t sum = ordered(sums[other]);
            better += sum > own || (sum == own && other < group);
        }
        if (better < limit) continue;
        for (int e = group * size; e < (group + 1) * size; e++) choice[e] = -INFINITY;
    }
    __syncwarp();
}

// `groups`: 0 where a token's experts come from anywhere.
template <typename T>
__device__ inline void route(const T* logits, const float* bias, int64_t n, int n_experts, int top_k, int softmax,
                             int groups, int limit, int normalized, float scale, int balanced, uint32_t* experts,
                             float* weights) {
    SHARED(bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t token = blockIdx.x * (int64_t)WARPS + warp;
    if (token >= n) return;
    float* scored = reinterpret_cast<float*>(bytes) + warp * (2 * n_experts + groups + top_k);
    float *choice = scored + n_experts, *sums = choice + n_experts;
    uint32_t* chosen = reinterpret_cast<uint32_t*>(sums + groups);
    score(logits + token * n_experts, n_experts, softmax, scored);
    if (balanced) {
        for (int j = lane; j < top_k; j += 32) chosen[j] = (token * top_k + j) % n_experts;
    } else {
        for (int e = lane; e < n_experts; e += 32) choice[e] = scored[e] + (bias != nullptr ? bias[e] : 0.0f);
        __syncwarp();
        if (groups > 0) limit_to_groups(choice, n_experts, groups, limit, sums);
        uint32_t taken = 0; // Of the experts that this lane looks at: a bit each.
        for (int j = 0; j < top_k; j++) {
            unsigned long long best = 0; // Of equals the first expert has the larger low half.
            for (int e = lane, bit = 0; e < n_experts; e += 32, bit++) {
                const unsigned long long candidate = (unsigned long long)ordered(choice[e]) << 32 | (~0u - e);
                if (!(taken >> bit & 1) && candidate > best) best = candidate;
            }
            const uint32_t e = ~0u - (uint32_t)warp_max(best);
            if (e % 32 == lane) taken |= 1u << e / 32;
            if (lane == 0) chosen[j] = e;
        }
    }
    __syncwarp();
    float norm = 0;
    for (int j = 0; j < top_k; j++) norm += scored[chosen[j]];
    norm = normalized ? norm + 1e-20f : 1.0f;
    for (int j = lane; j < top_k; j += 32) {
        experts[token * top_k + j] = chosen[j];
        weights[token * top_k + j] = scored[chosen[j]] / norm * scale;
    }
}

template <typename T>
__device__ inline void route_backward(const T* logits, const uint32_t* experts, const float* dweights, int64_t n,
                                      int n_experts, int top_k, int softmax, int normalized, float scale, T* dlogits) {
    SHARED(bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t token = blockIdx.x * (int64_t)WARPS + warp;
    if (token >= n) return;
    float* scored = reinterpret_cast<float*>(bytes) + warp * (n_experts + top_k);
    float* dscores = scored + n_experts;
    score(logits + token * n_experts, n_experts, softmax, scored);
    experts += token * top_k;
    dweights += token * top_k;
    // From weights to scores: w = scale s / sum of s, or w = scale s.
    float norm = 0, shared_part = 0, mean = 0;
    for (int j = 0; j < top_k; j++) {
        norm += scored[experts[j]];
        shared_part += dweights[j] * scored[experts[j]];
    }
    norm = normalized ? norm + 1e-20f : 1.0f;
    shared_part = normalized ? shared_part / (norm * norm) : 0.0f;
    for (int j = lane; j < top_k; j += 32) dscores[j] = scale * (dweights[j] / norm - shared_part);
    __syncwarp();
    for (int j = 0; j < top_k; j++) mean += dscores[j] * scored[experts[j]];
    for (int e = lane; e < n_experts; e += 32) {
        const float s = scored[e], slope = softmax ? s : s * (1.0f - s);
        float d = softmax ? -s * mean : 0.0f;
        for (int j = 0; j < top_k; j++) d += experts[j] == e ? dscores[j] * slope : 0.0f;
        dlogits[token * n_experts + e] = store<T>(d);
    }
}

#define ROUTE(T)                                                                                                          \
    KERNEL(moe_route_##T, const T* logits, const float* bias, int64_t n, int n_experts, int top_k, int softmax,           \
           int groups, int limit, int normalized, float scale, int balanced, uint32_t* experts, float* weights) {         \
        route(logits, bias, n, n_experts, top_k, softmax, groups, limit, normalized, scale, balanced, experts, weights);  \
    }                                                                                                                     \
    KERNEL(moe_route_backward_##T, const T* logits, const uint32_t* experts, const float* dweights, int64_t n,            \
           int n_experts, int top_k, int softmax, int normalized, float scale, T* dlogits) {                              \
        route_backward(logits, experts, dweights, n, n_experts, top_k, softmax, normalized, scale, dlogits);              \
    }
typedef float f32;
ROUTE(f32)
ROUTE(bf16)

// Cuts the rows of each expert into tiles; those that are too many are empty. Unless tokens is null, tokens += slots of each
// expert. Shared memory: n_experts + 1 numbers.
KERNEL(moe_tiles, const uint32_t* offsets, int64_t n_experts, int64_t n_tiles, RowTile* tiles, uint32_t* tokens) {
    SHARED(shared);
    __shared__ uint32_t scratch[32];
    uint32_t* starts = reinterpret_cast<uint32_t*>(shared); // The first tile of each expert.
    uint32_t n = 0;
    for (int64_t base = 0; base < n_experts; base += THREADS) {
        const int64_t e = base + threadIdx.x;
        const uint32_t slots = e < n_experts ? offsets[e + 1] - offsets[e] : 0;
        uint32_t total;
        const uint32_t start = n + block_scan((slots + TILE_ROWS - 1) / TILE_ROWS, scratch, total);
        if (e < n_experts) starts[e] = start;
        if (e < n_experts && tokens != nullptr) tokens[e] += slots;
        n += total;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n_tiles; i += THREADS) {
        RowTile tile = {0, 0, 0, 0};
        if (i < n) {
            // The last expert that does not start behind i: those before it with the same start have no tiles.
            int64_t e = 0, end = n_experts;
            while (end - e > 1) {
                const int64_t middle = (e + end) / 2;
                if (starts[middle] <= i) e = middle;
                else end = middle;
            }
            tile.expert = e;
            tile.first = offsets[e] + (i - starts[e]) * TILE_ROWS;
            tile.end = offsets[e + 1] < tile.first + TILE_ROWS ? offsets[e + 1] : tile.first + TILE_ROWS;
        }
        tiles[i] = tile;
    }
}

// counted = tokens, tokens = 0; bias, unless null, += move - mean of moves, move = coeff towards an even load. Shared
// memory: n_experts numbers.
KERNEL(moe_rebalance, uint32_t* tokens, uint32_t* counted, float* bias, int64_t n_experts, float coeff) {
    SHARED(shared);
    __shared__ double scratch[32];
    __shared__ float drift;
    float* moves = reinterpret_cast<float*>(shared);
    double all = 0; // Exact, as these are integers.
    for (int64_t e = threadIdx.x; e < n_experts; e += THREADS) {
        all += tokens[e];
        counted[e] = tokens[e];
        tokens[e] = 0;
    }
    if (bias == nullptr) return;
    const float mean = (float)block_sum(all, scratch) / (float)n_experts;
    for (int64_t e = threadIdx.x; e < n_experts; e += THREADS) {
        const float gap = mean - (float)counted[e];
        moves[e] = gap == 0.0f ? 0.0f : (gap > 0.0f ? coeff : -coeff);
    }
    __syncthreads();
    if (threadIdx.x == 0) { // In the order of the host, which has the same numbers.
        float sum = 0;
        for (int64_t e = 0; e < n_experts; e++) sum += moves[e];
        drift = sum / (float)n_experts;
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < n_experts; e += THREADS) bias[e] += moves[e] - drift;
}

// rows[i] = x[token of slot sorted[i]], times the slot's weight unless weights is null; and unless dots is null,
// dots[sorted[i]] = x[that token] . other[i]. One warp per row.
template <typename X, typename T, int N>
__device__ inline void gather(const X* x, const uint32_t* sorted, const float* weights, int64_t slots, int top_k,
                              int64_t dim, T* rows, const T* other, float* dots) {
    const int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (row >= slots) return;
    const uint32_t slot = sorted[row];
    const float weight = weights != nullptr ? weights[slot] : 1.0f;
    x += slot / top_k * dim;
    rows += row * dim;
    float dot = 0;
    for (int64_t i = threadIdx.x % 32 * N; i < dim; i += 32 * N) {
        float values[N];
        load_all(values, x + i);
        if (dots != nullptr) {
            float others[N];
            load_all(others, other + row * dim + i);
#pragma unroll
            for (int l = 0; l < N; l++) dot += values[l] * others[l];
        }
#pragma unroll
        for (int l = 0; l < N; l++) values[l] *= weight;
        store_all(rows + i, values);
    }
    if (dots == nullptr) return;
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) dots[slot] = dot;
}

// y[token] = sum of the rows of its slots, in the order of its choices, times their weights unless weights is null, and of
// others[token] unless others is null; and unless dots is null, dots[slot] = x[token] . row of the slot. One block per token;
// shared memory for dots: top_k numbers per warp.
template <typename T, typename X, int N>
__device__ inline void scatter(const T* rows, const uint32_t* positions, const float* weights, int top_k, int64_t dim,
                               const X* others, X* y, const X* x, float* dots) {
    SHARED(bytes);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float* parts = reinterpret_cast<float*>(bytes) + warp * top_k;
    const int64_t token = blockIdx.x, first = token * top_k;
    for (int64_t base = 0; base < dim; base += blockDim.x * N) {
        const int64_t i = base + threadIdx.x * N;
        const bool inside = i < dim;
        float sums[N] = {}, own[N] = {};
        if (others != nullptr && inside) load_all(sums, others + token * dim + i);
        if (dots != nullptr && inside) load_all(own, x + token * dim + i);
#pragma unroll 2
        for (int j = 0; j < top_k; j++) {
            const float weight = weights != nullptr ? weights[first + j] : 1.0f;
            float values[N] = {}, dot = 0;
            if (inside) load_all(values, rows + positions[first + j] * dim + i);
#pragma unroll
            for (int l = 0; l < N; l++) sums[l] += values[l] * weight;
            if (dots == nullptr) continue;
#pragma unroll
            for (int l = 0; l < N; l++) dot += values[l] * own[l];
            dot = warp_sum(dot);
            if (threadIdx.x % 32 == 0) parts[j] = (base > 0 ? parts[j] : 0.0f) + dot;
        }
        if (inside) store_all(y + token * dim + i, sums);
    }
    if (dots == nullptr) return;
    __syncthreads();
    for (int j = threadIdx.x; j < top_k; j += blockDim.x) {
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += reinterpret_cast<float*>(bytes)[w * top_k + j];
        dots[first + j] = sum;
    }
}

// What lies in order of sorted slots is T, what lies in order of tokens X.
#define ROWS(T, X, N)                                                                                                    \
    KERNEL(moe_gather_##X##_##T##_##N, const X* x, const uint32_t* sorted, const float* weights, int64_t slots,          \
           int top_k, int64_t dim, T* rows, const T* other, float* dots) {                                               \
        gather<X, T, N>(x, sorted, weights, slots, top_k, dim, rows, other, dots);                                       \
    }                                                                                                                    \
    KERNEL(moe_scatter_##T##_##X##_##N, const T* rows, const uint32_t* positions, const float* weights, int top_k,       \
           int64_t dim, const X* others, X* y, const X* x, float* dots) {                                                \
        scatter<T, X, N>(rows, positions, weights, top_k, dim, others, y, x, dots);                                      \
    }
ROWS(f32, f32, 1)
ROWS(f32, f32, 8)
ROWS(f32, bf16, 1)
ROWS(f32, bf16, 8)
ROWS(bf16, f32, 1)
ROWS(bf16, f32, 8)
ROWS(bf16, bf16, 1)
ROWS(bf16, bf16, 8)

// grad[e] += sum of the rows of expert e. Grid (ceil(width / 32), n_experts); each warp sums every eighth row.
template <typename T>
__device__ inline void bias_gradient(const T* dy, const uint32_t* offsets, int64_t width, float* grad) {
    __shared__ float parts[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.y;
    const int64_t col = blockIdx.x * (int64_t)32 + lane;
    const uint32_t first = offsets[expert], end = offsets[expert + 1];
    if (first == end) return;
    float sum = 0;
    if (col < width) {
        for (int64_t row = first + warp; row < end; row += WARPS) sum += load(dy[row * width + col]);
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || col >= width) return;
    for (int w = 1; w < WARPS; w++) sum += parts[w][lane];
    grad[expert * width + col] += sum;
}

#define BIAS_GRADIENT(T)                                                                                    \
    KERNEL(moe_bias_gradient_##T, const T* dy, const uint32_t* offsets, int64_t width, float* grad) {       \
        bias_gradient(dy, offsets, width, grad);                                                            \
    }
BIAS_GRADIENT(f32)
BIAS_GRADIENT(bf16)

typedef TensorCores<128, 128, 64, 2> Large;
typedef TensorCores<64, 64, 32, 4> Small;
PRODUCTS(large, Large, bf16)
PRODUCTS(small, Small, bf16)
PRODUCTS(f32, Plain, f32)
PRODUCTS(bf16, Plain, bf16)
