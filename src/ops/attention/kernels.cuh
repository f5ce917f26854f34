// The kernels of products in bf16, for any way to multiply: PRODUCTS, whose dynamic shared memory MEMORY declares.
#pragma once

#include "attention/backward.cuh"
#include "attention/forward.cuh"

// What kernels are told of where rows lie.
#define SIZES int sq, int sk, int h, int kv, int hd, int q_stride, int k_stride
#define SIZES_GIVEN Sizes{sq, sk, h, kv, hd, q_stride, k_stride}

#define FORWARD_BF16(NAME, PRODUCTS, MEMORY, W, M, WARPS, KEYS, STAGES, HELD, BLOCKS)                                       \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_forward_##NAME##_##W, const bf16* q, const bf16* k, const bf16* v,          \
                  const uint32_t* starts, const uint32_t* bounds, const float* sinks, bf16* y, float* logsumexp, SIZES,     \
                  float inner, float factor) {                                                                              \
        MEMORY(shared);                                                                                                     \
        forward<PRODUCTS, W, M, WARPS, KEYS, STAGES, HELD>(q, k, v, starts, bounds, sinks, y, logsumexp, SIZES_GIVEN,       \
                                                           inner, factor, shared);                                          \
    }

#define BACKWARD_KEYS_BF16(PART, NAME, PRODUCTS, MEMORY, W, M, WARPS, QUERIES, SUB, HELD, DK, DV, BLOCKS)                   \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_backward_##PART##_##NAME##_##W, const bf16* q, const bf16* k,               \
                  const bf16* v, const bf16* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds,        \
                  bf16* dk, bf16* dv, SIZES, float inner, float factor, float scale, int stages) {                          \
        MEMORY(shared);                                                                                                     \
        backward_keys<PRODUCTS, W, M, WARPS, QUERIES, SUB, HELD, DK, DV>(q, k, v, dy, stats, starts, bounds, dk, dv,        \
                                                                         SIZES_GIVEN, inner, factor, scale, stages,         \
                                                                         shared);                                           \
    }

#define BACKWARD_QUERIES_BF16(NAME, PRODUCTS, MEMORY, W, M, WARPS, KEYS, SUB, HELD, BLOCKS)                                 \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_backward_queries_##NAME##_##W, const bf16* q, const bf16* k,                \
                  const bf16* v, const bf16* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds,        \
                  bf16* dq, SIZES, float inner, float factor, float scale, int stages) {                                    \
        MEMORY(shared);                                                                                                     \
        backward_queries<PRODUCTS, W, M, WARPS, KEYS, SUB, HELD>(q, k, v, dy, stats, starts, bounds, dq, SIZES_GIVEN,       \
                                                                 inner, factor, scale, stages, shared);                     \
    }
