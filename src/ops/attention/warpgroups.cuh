// Products of tiles by warpgroups, on Hopper's tensor cores: see hopper.cuh. A warpgroup has 64 rows of its block's own.
#pragma once

#include "attention/tiles.cuh"
#include "hopper.cuh"

namespace {

// As ByWarps, but products go on while threads do, until they are waited for. Tiles are panels of 64 columns, all rows of
// one after another, and begin at multiples of 1,024 bytes.
struct ByWarpgroups {
    static constexpr int ALIGNED = 512; // 1,024 bytes.

    // The 64 rows of this thread's warpgroup.
    template <int W, int M, bool HELD> struct Left {
        static_assert(M == 1 && !HELD, "a warpgroup has 64 rows, and reads them where they are");
        const bf16* tile;
        int panel;

        template <int ROWS> __device__ void hold(const bf16* tile, int first) {
            this->tile = tile + first / 64 * 64 * 64;
            panel = ROWS * 64;
        }
        __device__ Operand<false> at(int k) const { return along_rows(tile + k / 4 * panel).later(k % 4 * 16); }
    };

    template <int W, int ROWS, int THREADS>
    __device__ static void load(bf16* tile, const bf16* from, int stride, int rows, int hd) {
#pragma unroll
        for (int panel = 0; panel < W / 64; panel++) {
            load_tile<64, ROWS, THREADS>(tile + panel * ROWS * 64, from + panel * 64, stride, rows, hd - panel * 64);
        }
    }
    template <int ROWS, int N, int W, bool HELD>
    __device__ static void multiply(float (&d)[1][N / 8][4], const Left<W, 1, HELD>& left, const bf16* b, int first) {
        product_begin();
#pragma unroll
        for (int k = 0; k < W / 16; k++) {
            product(d[0], left.at(k), along_rows(b + k / 4 * ROWS * 64 + first * 64).later(k % 4 * 16), k > 0);
        }
        product_commit();
    }
    template <int ROWS, int N, int W>
    __device__ static void add_product(float (&d)[1][W / 8][4], const float (&p)[1][N / 8][4], const bf16* b, int first) {
        uint32_t a[N / 16][4];
#pragma unroll
        for (int k = 0; k < N / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* const pair = &p[0][2 * k + i / 2][i % 2 * 2];
                a[k][i] = pack_bf16(pair[0], pair[1]);
            }
        product_begin();
#pragma unroll
        for (int k = 0; k < N / 16; k++) product(d[0], a[k], over_rows(b, ROWS * 64).later((first + 16 * k) * 64), true);
        product_commit();
    }
    template <int N, int COLS> __device__ static void wait(float (&d)[1][COLS][4]) {
        product_wait<N>();
        product_result(d[0]);
    }
    __device__ static void loaded() { shared_for_products(); }
    // What others multiply may be overwritten.
    __device__ static void finish() { __syncthreads(); }
};

} // namespace
