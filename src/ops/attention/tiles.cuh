// Tiles of bf16 in shared memory: rows of W numbers, in chunks of 8 whose places are permuted so that neither the
// chunks of a row nor a chunk of 8 rows meet in a bank.
#pragma once

#include "attention/sizes.cuh"

namespace {

template <int W> struct Swizzle {
    static constexpr int CHUNKS = W / 8;
    static constexpr int SHIFT = CHUNKS % 8 == 0 ? 0 : CHUNKS % 4 == 0 ? 1 : 2;
    static constexpr int MASK = CHUNKS % 8 == 0 ? 7 : CHUNKS % 4 == 0 ? 3 : 1;
};

// Where a chunk of a row is.
template <int W> __device__ inline int place(int row, int chunk) {
    using S = Swizzle<W>;
    return row * W + (chunk ^ (row >> S::SHIFT & S::MASK)) * 8;
}

// The same for row `base + row` and chunk `first + chunk`, from place(row, chunk): base a multiple of 8, `first` one of a
// power of two that is above `chunk`, both constants, so that one place serves for many.
template <int W> __device__ inline int moved(int place, int base, int first) {
    using S = Swizzle<W>;
    return base * W + (place ^ (first & S::MASK) * 8) + (first & ~S::MASK) * 8;
}

// Chunks that neighbouring threads take: those of a row, up to a power of two.
template <int W> __device__ constexpr int lanes_of_row() {
    int lanes = 2;
    while (lanes * 8 < W) lanes *= 2;
    return lanes;
}

// Starts to copy `rows` rows of hd numbers, `stride` apart, to a tile of ROWS rows; the rest becomes zero.
template <int W, int ROWS, int THREADS>
__device__ inline void load_tile(bf16* tile, const bf16* from, int stride, int rows, int hd) {
    constexpr int LANES = lanes_of_row<W>(), STEP = THREADS / LANES;
    static_assert(ROWS % STEP == 0 || ROWS < STEP, "whole rounds");
    const int thread = renewed(threadIdx.x), chunk = thread % LANES, first = thread / LANES;
    if (chunk * 8 >= W || (ROWS < STEP && first >= ROWS)) return;
    from += first * stride + chunk * 8;
    rows = chunk * 8 < hd ? rows - first : 0;
#pragma unroll
    for (int step = 0; step < ROWS; step += STEP) {
        copy_async_16(tile + place<W>(first + step, chunk), from + step * stride, step < rows);
    }
}

// Writes the rows of a warp's part of a tile, `rows` of ROWS.
template <int W, int ROWS> __device__ inline void store_rows(bf16* to, const bf16* tile, int stride, int rows, int hd) {
    constexpr int LANES = lanes_of_row<W>(), STEP = 32 / LANES;
    const int chunk = threadIdx.x % 32 % LANES, first = threadIdx.x % 32 / LANES;
    if (chunk * 8 >= hd) return;
    for (int row = first; row < min(ROWS, rows); row += STEP) {
        *reinterpret_cast<Pack<bf16, 8>*>(to + row * stride + chunk * 8) =
            *reinterpret_cast<const Pack<bf16, 8>*>(tile + place<W>(row, chunk));
    }
}

// 16 M rows of a tile as left operand, held in registers or read when needed.
template <int W, int M, bool HELD> struct Left {
    const bf16* tile;

    template <int ROWS> __device__ void hold(const bf16* tile, int first) { this->tile = tile + first * W; }
    __device__ void get(uint32_t (&a)[4], int m, int k) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(a, tile + moved<W>(place<W>(lane % 16, lane / 16), 16 * m, 2 * k));
    }
};

template <int W, int M> struct Left<W, M, true> {
    uint32_t held[M][W / 16][4];

    template <int ROWS> __device__ void hold(const bf16* tile, int first) {
        const int lane = threadIdx.x % 32;
        tile += first * W;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < W / 16; k++) {
                ldmatrix_x4(held[m][k], tile + moved<W>(place<W>(lane % 16, lane / 16), 16 * m, 2 * k));
            }
    }
    __device__ void get(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = held[m][k][i];
    }
};

// d = a b^T, where b is N rows of a tile.
template <int W, int M, int N, bool HELD>
__device__ inline void multiply(float (&d)[M][N / 8][4], const Left<W, M, HELD>& left, const bf16* b) {
    // Unrolled further, the compiler loads so much ahead that it lacks registers.
    constexpr int UNROLL = HELD || W % 64 != 0 ? W / 16 : 2;
    const int lane = renewed(threadIdx.x % 32), at = place<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[m][n][i] = 0.0f;
#pragma unroll UNROLL
    for (int k = 0; k < W / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left.get(a[m], m, k);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t r[4];
            ldmatrix_x4(r, b + moved<W>(at, 16 * n, 2 * k));
            const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16x8x16(d[m][2 * n], a[m], low);
                mma_16x8x16(d[m][2 * n + 1], a[m], high);
            }
        }
    }
}

// d += p b, where p is rounded to bf16, and b is N rows of a tile.
template <int W, int M, int N>
__device__ inline void add_product(float (&d)[M][W / 8][4], const float (&p)[M][N / 8][4], const bf16* b) {
    const int lane = renewed(threadIdx.x % 32), at = place<W>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            a[m][0] = pack_bf16(p[m][2 * k][0], p[m][2 * k][1]);
            a[m][1] = pack_bf16(p[m][2 * k][2], p[m][2 * k][3]);
            a[m][2] = pack_bf16(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
            a[m][3] = pack_bf16(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < W / 16; n++) {
            uint32_t r[4];
            ldmatrix_x4_trans(r, b + moved<W>(at, 16 * k, 2 * n));
            const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16x8x16(d[m][2 * n], a[m], low);
                mma_16x8x16(d[m][2 * n + 1], a[m], high);
            }
        }
    }
}

// How a block multiplies: each warp by itself, its products done at once. Tiles have ROWS rows, of which operands have N from
// `first` on.
struct ByWarps {
    // A stage of tiles is a multiple of as many numbers.
    static constexpr int ALIGNED = 1;

    template <int W, int M, bool HELD> using Left = ::Left<W, M, HELD>;

    template <int W, int ROWS, int THREADS>
    __device__ static void load(bf16* tile, const bf16* from, int stride, int rows, int hd) {
        load_tile<W, ROWS, THREADS>(tile, from, stride, rows, hd);
    }
    template <int ROWS, int N, int W, int M, bool HELD>
    __device__ static void multiply(float (&d)[M][N / 8][4], const Left<W, M, HELD>& left, const bf16* b, int first) {
        ::multiply<W, M, N>(d, left, b + first * W);
    }
    template <int ROWS, int N, int W, int M>
    __device__ static void add_product(float (&d)[M][W / 8][4], const float (&p)[M][N / 8][4], const bf16* b, int first) {
        ::add_product<W, M, N>(d, p, b + first * W);
    }
    // Before d is looked at, when as many later products may be under way.
    template <int N, int M, int COLS> __device__ static void wait(float (&d)[M][COLS][4]) {}
    // After copies have been waited for, before the barrier.
    __device__ static void loaded() {}
    // Behind the last product, before a warp writes to its own rows of a tile.
    __device__ static void finish() {}
};

template <int W, int M> __device__ inline void clear(float (&d)[M][W / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < W / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[m][n][i] = 0.0f;
}

// Writes d, a row times scale[row] each, by way of a warp's own rows of a tile that no other warp uses any more.
template <int W, int M>
__device__ inline void store_sums(
    bf16* to, bf16* tile, const float (&d)[M][W / 8][4], const float (&scale)[M][2], int stride, int rows, int hd) {
    const int lane = threadIdx.x % 32, at = place<W>(lane / 4, 0) + lane % 4 * 2;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int n = 0; n < W / 8; n++) {
                *reinterpret_cast<uint32_t*>(tile + moved<W>(at, 16 * m + 8 * r, n)) =
                    pack_bf16(d[m][n][2 * r] * scale[m][r], d[m][n][2 * r + 1] * scale[m][r]);
            }
    __syncwarp();
    store_rows<W, 16 * M>(to, tile, stride, rows, hd);
}

// Hides the scores of 16 M queries from `query` on and N keys from `key` on, where the mask says so.
template <int M, int N>
__device__ inline void hide(float (&s)[M][N / 8][4], const Mask& mask, int query, int past, int key) {
    const int lane = renewed(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int own = query + 16 * m + 8 * r + lane / 4, start = mask.start(own);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int at = key + 8 * n + lane % 4 * 2 + c;
                    if (at < start || at > past + own) s[m][n][2 * r + c] = HIDDEN;
                }
        }
}

// As hide, of scores that have a row for each key.
template <int M, int N>
__device__ inline void hide_transposed(float (&s)[M][N / 8][4], const Mask& mask, int query, int past, int key) {
    const int lane = renewed(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int own = query + 8 * n + lane % 4 * 2 + c, start = mask.start(own);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int at = key + 16 * m + 8 * r + lane / 4;
                    if (at < start || at > past + own) s[m][n][2 * r + c] = HIDDEN;
                }
        }
}

} // namespace
