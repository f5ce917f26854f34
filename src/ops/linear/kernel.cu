// Softcap of logits, and dropout of what goes into an adapter.
//   softcap: x = cap * tanh(x / cap), in place;  dropout: y = word(i) >= threshold ? x * factor : 0
// where word(i) is number i of a ChaCha8 stream, so that the host leaves out the same.
// Shapes     x, y (n).
// Types      softcap f32; dropout bf16 or f32.
// Launch     softcap: one thread per number, blocks of 256; dropout: one thread per 16 numbers, blocks of 128.
// Writes     with =.
// Reference  logits_may_be_capped in mod.rs, dropout's tests in adapter.rs. ChaCha: Bernstein, "ChaCha, a variant of
//            Salsa20", 2008, with a 64-bit counter and a 64-bit stream number.
#include "kernel.cuh"

KERNEL(softcap, float* x, int64_t n, float cap) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = cap * tanhf(x[i] / cap);
}

__device__ inline uint32_t rotated(uint32_t x, int bits) { return (x << bits) | (x >> (32 - bits)); }

__device__ inline void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    a += b, d = rotated(d ^ a, 16);
    c += d, b = rotated(b ^ c, 12);
    a += b, d = rotated(d ^ a, 8);
    c += d, b = rotated(b ^ c, 7);
}

template <typename T>
__device__ inline void dropout(const T* x, T* y, int64_t n, const uint64_t (&key)[4], uint64_t stream, uint32_t threshold,
                               float factor) {
    const int64_t block = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (block * 16 >= n) return;
    uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}, words[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        start[4 + 2 * i] = (uint32_t)key[i];
        start[5 + 2 * i] = (uint32_t)(key[i] >> 32);
    }
    start[12] = (uint32_t)block, start[13] = (uint32_t)((uint64_t)block >> 32);
    start[14] = (uint32_t)stream, start[15] = (uint32_t)(stream >> 32);
#pragma unroll
    for (int i = 0; i < 16; i++) words[i] = start[i];
#pragma unroll
    for (int round = 0; round < 4; round++) {
#pragma unroll
        for (int i = 0; i < 4; i++) quarter_round(words[i], words[4 + i], words[8 + i], words[12 + i]);
#pragma unroll
        for (int i = 0; i < 4; i++)
            quarter_round(words[i], words[4 + (i + 1) % 4], words[8 + (i + 2) % 4], words[12 + (i + 3) % 4]);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int64_t at = block * 16 + i;
        if (at < n) y[at] = store<T>(words[i] + start[i] >= threshold ? load(x[at]) * factor : 0.0f);
    }
}

#define DROPOUT(name, T)                                                                                                \
    KERNEL(name, const T* x, T* y, int64_t n, uint64_t key0, uint64_t key1, uint64_t key2, uint64_t key3,               \
           uint64_t stream, uint32_t threshold, float factor) {                                                        \
        dropout<T>(x, y, n, {key0, key1, key2, key3}, stream, threshold, factor);                                       \
    }
DROPOUT(dropout_f32, float)
DROPOUT(dropout_bf16, bf16)
