// Attention: y = softmax(scale * q k^T) v per query head over the keys that a query sees, and its gradients.
//   forward    t = factor * q k^T, y = sum over keys of 2^(t - logsumexp) v, one pass with a running maximum
//   backward   P = 2^(t - logsumexp), D = sum of dy*y, dS = P*(dy v^T - D), dv = P^T dy, dq = scale*dS k, dk = scale*dS^T q
//   softcap    t = factor * tanh(scale/cap * q k^T) with factor = cap*log2(e); its slope, 1 - tanh^2, multiplies dS
//   sinks      a score per query head in the sum of exponentials alone; gradient -sum of 2^(sink - logsumexp)*D
// Shapes     q, y, dy, dq (b, sq, h, hd); k, v, dk, dv (b, sk, kv, hd); logsumexp (b, h, sq), of base 2; sinks (h).
//            stats (b, h, sq up to a multiple of 64, 2): logsumexp and D, 1e30 and 0 beyond sq. starts (b, sq): the first key
//            that each query sees, or null; bounds (b, sq / 64 rounded up, 3): of each 64 queries the smallest start, the
//            largest, and the smallest of these and all later ones. Query i is at position sk - sq + i, up to which it sees;
//            query head j reads key head j / (h / kv). Contiguous, but that positions of q and dq lie q_stride numbers apart,
//            those of k, v, dk and dv k_stride.
// Types      q, k, v, y and their gradients bf16 or f32, all the same (decode: q and y may differ from k and v);
//            starts, bounds u32; everything else f32. Products of bf16 on tensor cores, P and dS rounded to bf16 for them.
// Launch     forward, backward_queries: one block per head and tile of queries, the last tile of all heads first, which sees
//            most, grid = (rows * h, tiles, b / rows). backward_keys: one block per key head and tile of keys, grid = (rows * kv,
//            tiles, b / rows). So many rows at once as what they read stays in the second-level cache: see cuda.rs.
//            A kernel's W is the least of 16, 32, 64, 96, 128, 192, 256 that hd fits in; tiles by W in cuda.rs.
//            stats, sinks, decode: above each.
// Writes     everything with =, in an order that is always the same; the sinks' gradient with +=. No atomics.
// Requires   hd % 8 == 0 (16-byte copies), sq <= sk, h % kv == 0, checked in cuda.rs.
// Reference  reference_of in mod.rs. Speed: benches/ops.rs.
#include "attention/decode.cuh"
#include "attention/f32.cuh"
#include "attention/kernels.cuh"

FORWARD_BF16(bf16, ByWarps, SHARED, 16, 2, 4, 64, 2, true, 3)
FORWARD_BF16(bf16, ByWarps, SHARED, 32, 2, 4, 64, 2, false, 3)
FORWARD_BF16(bf16, ByWarps, SHARED, 64, 2, 4, 64, 2, true, 2)
FORWARD_BF16(bf16, ByWarps, SHARED, 96, 2, 4, 64, 1, false, 2)
FORWARD_BF16(bf16, ByWarps, SHARED, 128, 2, 4, 64, 1, false, 2)
FORWARD_BF16(bf16, ByWarps, SHARED, 192, 1, 8, 64, 1, false, 1)
FORWARD_BF16(bf16, ByWarps, SHARED, 256, 1, 4, 64, 1, false, 2)

BACKWARD_KEYS_BF16(keys, bf16, ByWarps, SHARED, 16, 2, 4, 64, 32, false, true, true, 3)
BACKWARD_KEYS_BF16(keys, bf16, ByWarps, SHARED, 32, 2, 4, 64, 32, true, true, true, 2)
BACKWARD_KEYS_BF16(keys, bf16, ByWarps, SHARED, 64, 2, 4, 64, 32, false, true, true, 2)
BACKWARD_KEYS_BF16(keys, bf16, ByWarps, SHARED, 96, 1, 8, 64, 64, false, true, true, 1)
BACKWARD_KEYS_BF16(keys, bf16, ByWarps, SHARED, 128, 1, 8, 64, 64, false, true, true, 1)
BACKWARD_KEYS_BF16(dk, bf16, ByWarps, SHARED, 192, 1, 4, 64, 64, false, true, false, 2)
BACKWARD_KEYS_BF16(dv, bf16, ByWarps, SHARED, 192, 1, 4, 64, 64, false, false, true, 2)
BACKWARD_KEYS_BF16(dk, bf16, ByWarps, SHARED, 256, 1, 4, 32, 32, false, true, false, 2)
BACKWARD_KEYS_BF16(dv, bf16, ByWarps, SHARED, 256, 1, 4, 32, 32, false, false, true, 2)

BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 16, 2, 4, 64, 32, true, 3)
BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 32, 2, 4, 64, 32, false, 3)
BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 64, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 96, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 128, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 192, 1, 4, 64, 64, false, 2)
BACKWARD_QUERIES_BF16(bf16, ByWarps, SHARED, 256, 1, 4, 32, 32, false, 2)

#define F32(W, R)                                                                                                           \
    KERNEL_BOUNDS(THREADS_F32, 1, attention_forward_f32_##W, const float* q, const float* k, const float* v,                \
                  const uint32_t* starts, const uint32_t* bounds, const float* sinks, float* y, float* logsumexp, SIZES,    \
                  float inner, float factor) {                                                                              \
        SHARED(shared);                                                                                                     \
        forward_f32<W, R>(q, k, v, starts, bounds, sinks, y, logsumexp, SIZES_GIVEN, inner, factor, shared);                \
    }                                                                                                                       \
    KERNEL_BOUNDS(THREADS_F32, 1, attention_backward_keys_f32_##W, const float* q, const float* k, const float* v,          \
                  const float* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, float* dk, float* dv,\
                  SIZES, float inner, float factor, float scale, int) {                                                     \
        SHARED(shared);                                                                                                     \
        backward_keys_f32<W, R>(q, k, v, dy, stats, starts, bounds, dk, dv, SIZES_GIVEN, inner, factor, scale,              \
                                shared);                                                                                    \
    }                                                                                                                       \
    KERNEL_BOUNDS(THREADS_F32, 1, attention_backward_queries_f32_##W, const float* q, const float* k, const float* v,       \
                  const float* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, float* dq, SIZES,    \
                  float inner, float factor, float scale, int) {                                                            \
        SHARED(shared);                                                                                                     \
        backward_queries_f32<W, R>(q, k, v, dy, stats, starts, bounds, dq, SIZES_GIVEN, inner, factor, scale,               \
                                   shared);                                                                                 \
    }

F32(16, 64)
F32(32, 64)
F32(64, 64)
F32(96, 32)
F32(128, 32)
F32(192, 16)
F32(256, 16)

#define STATS(T)                                                                                                             \
    KERNEL_BOUNDS(256, 4, attention_stats_##T, const T* y, const T* dy, const float* logsumexp, float* stats, int64_t b,     \
                  int sq, int h, int hd, int lanes) {                                                                        \
        stats_of<T>(y, dy, logsumexp, stats, b, Sizes{sq, sq, h, h, hd}, lanes);                                             \
    }

STATS(bf16)
typedef float f32;
STATS(f32)

// grad -= sum over all queries of 2^(sink - logsumexp)*D, one block per head; `rows` of `padded` stats to a head.
KERNEL_BOUNDS(256, 1, attention_sinks, const float* sinks, const float* stats, float* grad, int rows, int padded) {
    __shared__ float scratch[32];
    const int head = blockIdx.x;
    const float sink = sinks[head] * LOG2_E;
    float sum = 0.0f;
    for (int row = 0; row < rows; row++) {
        const float* const of_row = stats + (size_t(row) * gridDim.x + head) * padded * 2;
        for (int i = threadIdx.x; i < padded; i += blockDim.x) sum += exp2_fast(sink - of_row[i * 2]) * of_row[i * 2 + 1];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) grad[head] -= sum;
}

// grid = (ceil(keys / span), b * kv, ceil(rows / G)); rows of a key head from first_row on, k_batch and v_batch numbers from
// one row of the batch to the next. stats (b * kv, rows, splits, 2): maximum, sum of exponentials; sums (.., hd).
#define DECODE(T, G)                                                                                                         \
    KERNEL_BOUNDS(THREADS_DECODE, 2, attention_decode_##T##_##G, const void* q, int q_is_bf16, const T* k, const T* v,       \
                  const uint32_t* starts, float* stats, float* sums, int first_row, int rows, int sq, int sk, int h, int kv, \
                  int hd, int64_t k_batch, int64_t v_batch, int first_key, int span, float inner, float factor) {            \
        SHARED(shared);                                                                                                      \
        decode<T, G>(q, q_is_bf16, k, v, starts, stats, sums, first_row, rows, Sizes{sq, sk, h, kv, hd}, k_batch, v_batch,   \
                     first_key, span, inner, factor, shared);                                                                \
    }

DECODE(bf16, 4)
DECODE(bf16, 8)
DECODE(bf16, 16)
DECODE(f32, 4)
DECODE(f32, 8)
DECODE(f32, 16)

#define JOIN(T)                                                                                                              \
    KERNEL_BOUNDS(128, 1, attention_join_##T, const float* stats, const float* sums, const float* sinks, T* y,               \
                  int first_row, int rows, int splits, int sq, int sk, int h, int kv, int hd) {                              \
        SHARED(shared);                                                                                                      \
        join<T>(stats, sums, sinks, y, first_row, rows, splits, Sizes{sq, sk, h, kv, hd}, reinterpret_cast<float*>(shared)); \
    }

JOIN(bf16)
JOIN(f32)
