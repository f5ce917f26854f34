// Attention in bf16 on Hopper's tensor cores: the kernels of kernel.cu, whose contracts are theirs, multiplying by warpgroups.
// Shared memory is a multiple of 1,024 bytes, as is each of its tiles.
#include "attention/backward.cuh"
#include "attention/forward.cuh"
#include "attention/warpgroups.cuh"

#define SIZES int sq, int sk, int h, int kv, int hd, int q_stride, int k_stride
#define SIZES_GIVEN Sizes{sq, sk, h, kv, hd, q_stride, k_stride}

#define FORWARD(NAME, W, GROUPS, KEYS, BLOCKS)                                                                        \
    KERNEL_BOUNDS(128 * GROUPS, BLOCKS, attention_forward_##NAME, const bf16* q, const bf16* k, const bf16* v,              \
                  const uint32_t* starts, const uint32_t* bounds, const float* sinks, bf16* y, float* logsumexp, SIZES,     \
                  float inner, float factor) {                                                                              \
        SHARED_PANELS(shared);                                                                                              \
        forward<ByWarpgroups, W, 1, 4 * GROUPS, KEYS, 2, false>(q, k, v, starts, bounds, sinks, y, logsumexp, SIZES_GIVEN,   \
                                                               inner, factor, shared);                                      \
    }
#define KEYS(NAME, W, GROUPS, QUERIES, SUB, BLOCKS)                                                                   \
    KERNEL_BOUNDS(128 * GROUPS, BLOCKS, attention_backward_keys_##NAME, const bf16* q, const bf16* k, const bf16* v,        \
                  const bf16* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, bf16* dk, bf16* dv,   \
                  SIZES, float inner, float factor, float scale, int stages) {                                              \
        SHARED_PANELS(shared);                                                                                              \
        backward_keys<ByWarpgroups, W, 1, 4 * GROUPS, QUERIES, SUB, false, true, true>(                                      \
            q, k, v, dy, stats, starts, bounds, dk, dv, SIZES_GIVEN, inner, factor, scale, stages, shared);                 \
    }
#define QUERIES(NAME, W, GROUPS, KEYS, SUB, BLOCKS)                                                                   \
    KERNEL_BOUNDS(128 * GROUPS, BLOCKS, attention_backward_queries_##NAME, const bf16* q, const bf16* k, const bf16* v,     \
                  const bf16* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, bf16* dq, SIZES,      \
                  float inner, float factor, float scale, int stages) {                                                     \
        SHARED_PANELS(shared);                                                                                              \
        backward_queries<ByWarpgroups, W, 1, 4 * GROUPS, KEYS, SUB, false>(q, k, v, dy, stats, starts, bounds, dq,           \
                                                                          SIZES_GIVEN, inner, factor, scale, stages,        \
                                                                          shared);                                          \
    }
FORWARD(hopper_64, 64, 1, 128, 3)
FORWARD(hopper_128, 128, 2, 128, 1)
KEYS(hopper_64, 64, 1, 64, 64, 3)
KEYS(hopper_128, 128, 1, 64, 64, 2)
QUERIES(hopper_64, 64, 1, 64, 64, 4)
QUERIES(hopper_128, 128, 1, 64, 64, 2)
