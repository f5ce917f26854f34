// Rows of a table by index, and sums of rows back into it.
//   embedding:        y[i] = table[tokens[i]], NaN where the table has no such row
//   embedding_chunk:  grad[k] += sum of dy[order[i]] over i with keys[i] = k, for k that only occur within one chunk of keys;
//                     of k that go on beyond, the chunk's sums into partials
//   embedding_join:   adds those up into grad
// Shapes     table, grad (vocab_size, dim); tokens, keys, order (n); y, dy (n, dim); partials (chunks, 2, dim): of the key
//            that began in an earlier chunk, and of one that begins here and goes on in the next. Contiguous.
// Types      tokens, keys, order u32, keys sorted, order their places; table, dy bf16 or f32; the rest and every sum f32.
// Launch     embedding: one thread per group of N = 8 or 1, 256 per block, grid = ceil(groups / 256). embedding_chunk: 128
//            threads, a group of columns each, grid = (ceil(n / chunk), ceil(dim / 128 N)). embedding_join: 256 threads, a
//            column each, grid = (ceil(n / chunk), ceil(dim / 256)).
// Writes     y, partials (those that are read) with =; grad with +=, each number by one thread, in the order of the places.
// Requires   for N = 8: dim % 8 == 0, addresses aligned to 16; fewer than 2^32 groups; checked in cuda.rs.
// Reference  the test in mod.rs.
#include "kernel.cuh"

template <typename W, int N>
__device__ inline void embedding(const uint32_t* tokens, const W* table, float* y, int64_t groups, int64_t vocab_size,
                                 int64_t dim) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const unsigned per_row = unsigned(dim / N), row = unsigned(group) / per_row;
    const uint32_t token = tokens[row];
    float values[N];
    if (token < vocab_size) {
        load_all(values, table + token * dim + int64_t(unsigned(group) - row * per_row) * N);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = __int_as_float(0x7fffffff);
    }
    store_all(y + group * N, values);
}

template <typename Y, int N>
__device__ inline void embedding_chunk(const uint32_t* keys, const uint32_t* order, const Y* dy, float* grad, float* partials,
                                       int64_t n, int64_t chunk, int64_t vocab_size, int64_t dim) {
    const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (column >= dim) return;
    const int64_t first = blockIdx.x * chunk, end = first + chunk < n ? first + chunk : n;
    bool began_earlier = first > 0 && keys[first - 1] == keys[first];
    float sum[N] = {};
#pragma unroll 4
    for (int64_t i = first; i < end; i++) {
        const uint32_t key = keys[i];
        float values[N];
        load_all(values, dy + order[i] * dim + column);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] += values[j];
        const bool is_last = i + 1 == n || keys[i + 1] != key;
        if (!is_last && i + 1 < end) continue;
        if (began_earlier || !is_last) {
            store_all(partials + (blockIdx.x * 2 + (began_earlier ? 0 : 1)) * dim + column, sum);
        } else if (key < vocab_size) {
            float* to = grad + key * dim + column;
            float total[N];
            load_all(total, to);
#pragma unroll
            for (int j = 0; j < N; j++) total[j] += sum[j];
            store_all(to, total);
        }
        began_earlier = false;
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = 0;
    }
}

KERNEL(embedding_join, const uint32_t* keys, const float* partials, float* grad, int64_t n, int64_t chunk, int64_t vocab_size,
       int64_t dim) {
    const int64_t first = blockIdx.x * chunk, next = first + chunk;
    if (next >= n) return;
    const uint32_t key = keys[next - 1];
    const bool begins_here = first == 0 || keys[first - 1] != key;
    if (keys[next] != key || !begins_here || key >= vocab_size) return;
    const int64_t column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
    if (column >= dim) return;
    float sum = partials[(blockIdx.x * 2 + 1) * dim + column];
    int64_t later = blockIdx.x + 1;
#pragma unroll 4
    for (; later * chunk < n && keys[later * chunk] == key; later++) sum += partials[later * 2 * dim + column];
    grad[key * dim + column] += sum;
}

#define EMBEDDING(T, W, N)                                                                                                    \
    KERNEL(embedding_##T##_##N, const uint32_t* tokens, const W* table, float* y, int64_t groups, int64_t vocab_size,         \
           int64_t dim) {                                                                                                     \
        embedding<W, N>(tokens, table, y, groups, vocab_size, dim);                                                           \
    }                                                                                                                         \
    KERNEL(embedding_chunk_##T##_##N, const uint32_t* keys, const uint32_t* order, const W* dy, float* grad, float* partials, \
           int64_t n, int64_t chunk, int64_t vocab_size, int64_t dim) {                                                       \
        embedding_chunk<W, N>(keys, order, dy, grad, partials, n, chunk, vocab_size, dim);                                    \
    }
EMBEDDING(f32, float, 8)
EMBEDDING(bf16, bf16, 8)
EMBEDDING(f32, float, 1)
EMBEDDING(bf16, bf16, 1)
