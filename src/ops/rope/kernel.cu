// Rotary position embedding.
//   (a, b) -> (a cos - b sin, a sin + b cos) for each pair of the last 2 half numbers of a head; the others stay.
//   A pair is numbers 2i and 2i + 1 of these (pairs), or i and half + i (halves); sin is multiplied by direction, 1 or -1.
// Shapes     x, y (b, s, all, hd), of which the first h heads rotate, the others are left alone; cos, sin (s, half).
//            Contiguous. y may be x.
// Types      x, y bf16 or f32; cos, sin f32.
// Launch     one thread per group: 8 or 2 numbers (pairs); 2 x 8 or 2 x 1 numbers, or as many that stay (halves). 256 per
//            block, grid = ceil(groups / 256).
// Writes     y with =.
// Requires   pairs: hd even; for 8 numbers hd % 8 == 0, half % 4 == 0. halves: for 8 half % 8 == 0, hd % 8 == 0. For 8:
//            addresses aligned to 16. Fewer than 2^32 groups. Checked in cuda.rs.
// Reference  the test in mod.rs.
#include "kernel.cuh"

template <typename X, int N>
__device__ inline void rope_pairs(const X* x, X* y, const float* cos, const float* sin, float direction, int64_t groups,
                                  int64_t s, int64_t h, int64_t all, int64_t hd, int64_t half) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const unsigned per_head = unsigned(hd / N), head = unsigned(group) / per_head, position = head / unsigned(h);
    const int column = int(unsigned(group) - head * per_head) * N, kept = int(hd - 2 * half);
    const int64_t at = (position * (all - h) + head) * hd + column;
    x += at;
    y += at;
    if (column < kept) {
        copy_all<N>(y, x);
        return;
    }
    const int64_t angle = int64_t(position % unsigned(s)) * half + (column - kept) / 2;
    float values[N], c[N / 2], d[N / 2];
    load_all(values, x);
    load_all(c, cos + angle);
    load_all(d, sin + angle);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float a = values[2 * i], b = values[2 * i + 1], sine = direction * d[i];
        values[2 * i] = a * c[i] - b * sine;
        values[2 * i + 1] = a * sine + b * c[i];
    }
    store_all(y, values);
}

template <typename X, int N>
__device__ inline void rope_halves(const X* x, X* y, const float* cos, const float* sin, float direction, int64_t groups,
                                   int64_t s, int64_t h, int64_t all, int64_t hd, int64_t half) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const int kept = int(hd - 2 * half);
    const unsigned per_head = unsigned((hd - half) / N), head = unsigned(group) / per_head, position = head / unsigned(h);
    const int column = int(unsigned(group) - head * per_head) * N;
    const int64_t at = (position * (all - h) + head) * hd + column;
    x += at;
    y += at;
    if (column < kept) {
        copy_all<N>(y, x);
        return;
    }
    const int64_t angle = int64_t(position % unsigned(s)) * half + (column - kept);
    float a[N], b[N], c[N], d[N];
    load_all(a, x);
    load_all(b, x + half);
    load_all(c, cos + angle);
    load_all(d, sin + angle);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float first = a[i], second = b[i], sine = direction * d[i];
        a[i] = first * c[i] - second * sine;
        b[i] = first * sine + second * c[i];
    }
    store_all(y, a);
    store_all(y + half, b);
}

#define ROPE(name, function, X, N)                                                                                            \
    KERNEL(name, const X* x, X* y, const float* cos, const float* sin, float direction, int64_t groups, int64_t s, int64_t h, \
           int64_t all, int64_t hd, int64_t half) {                                                                           \
        function<X, N>(x, y, cos, sin, direction, groups, s, h, all, hd, half);                                               \
    }
ROPE(rope_pairs_f32_8, rope_pairs, float, 8)
ROPE(rope_pairs_bf16_8, rope_pairs, bf16, 8)
ROPE(rope_pairs_f32_2, rope_pairs, float, 2)
ROPE(rope_pairs_bf16_2, rope_pairs, bf16, 2)
ROPE(rope_halves_f32_8, rope_halves, float, 8)
ROPE(rope_halves_bf16_8, rope_halves, bf16, 8)
ROPE(rope_halves_f32_1, rope_halves, float, 1)
ROPE(rope_halves_bf16_1, rope_halves, bf16, 1)
