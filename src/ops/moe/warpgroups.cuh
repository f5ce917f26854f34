// The engine of products.cuh for Hopper's tensor cores.
#pragma once

#include "hopper.cuh"
#include "moe/products.cuh"

// SIZE rows or columns of an operand by 64 of k in shared memory, as they lie in memory: rows of k in one panel if ALONG_K,
// else k of rows in a panel for each 64 of their columns.
template <int SIZE, bool ALONG_K> struct Panels {
    static constexpr int DEPTH = 64, WIDTH = (ALONG_K ? DEPTH : SIZE) / 8, HEIGHT = ALONG_K ? SIZE : DEPTH;
    static constexpr int NUMBERS = SIZE * DEPTH;

    template <int THREADS, typename Source> __device__ static void fetch(bf16* panels, const Source& source) {
        constexpr int ROWS = THREADS / WIDTH; // That all threads copy a chunk of at once.
        static_assert(HEIGHT % ROWS == 0 && ROWS % 8 == 0, "a thread's chunks are at the same place of their rows");
        const int row = threadIdx.x / WIDTH, chunk = threadIdx.x % WIDTH;
        bf16* to = panels + chunk / 8 * (HEIGHT * 64) + in_panel(row, chunk % 8);
#pragma unroll
        for (int i = 0; i < HEIGHT; i += ROWS) {
            bool valid;
            const bf16* from = source.at(row + i, chunk * 8, valid);
            copy_async_16(to + i * 64, from, valid);
        }
    }

    // From row or column `first` on, a multiple of 64; k.. (16).
    __device__ static Operand<!ALONG_K> operand(const bf16* panels, int first, int k) {
        if constexpr (ALONG_K) return along_rows(panels + first * 64).later(k);
        else return over_rows(panels + first * DEPTH, DEPTH * 64).later(k * 64);
    }
};

// Sums of 64 x COLS for each warpgroup, of STAGES of operands one that products read, one that the products before may still
// read, and one under way. Operands as TensorCores has them; at least one step.
struct Warpgroups : Gathered<Warpgroups, 128, 128, 64, 8, 256> {
    static constexpr int ROWS = 128, COLS = 128, DEPTH = 64, PAIR = 64, N = 8, BLOCKS = 2, STAGES = 3;
    static constexpr int THREADS = ROWS / 64 * 128;
    typedef float Sums[COLS / 8][4];

    template <bool A_ALONG_K, bool B_ALONG_K, typename A, typename B>
    __device__ static void multiply(Sums& sums, int n_steps, const A& a, const B& b) {
        typedef Panels<ROWS, A_ALONG_K> PanelsA;
        typedef Panels<COLS, B_ALONG_K> PanelsB;
        constexpr int AHEAD = STAGES - 2;
        SHARED_PANELS(bytes);
        bf16* stages = reinterpret_cast<bf16*>(bytes);
        const auto stage = [&](int step) { return stages + step % STAGES * (PanelsA::NUMBERS + PanelsB::NUMBERS); };
        const auto fetch = [&](int step) {
            if (step < n_steps) {
                PanelsA::template fetch<THREADS>(stage(step), a(step));
                PanelsB::template fetch<THREADS>(stage(step) + PanelsA::NUMBERS, b(step));
            }
            copy_async_commit();
        };
        for (int step = 0; step < AHEAD; step++) fetch(step);
        for (int step = 0; step < n_steps; step++) {
            copy_async_wait<AHEAD - 1>();
            shared_for_products();
            product_wait<1>();
            // What this step reads is there for all. Tensor cores are busy with the step before; what the next fetch
            // overwrites was for that before it.
            __syncthreads();
            // Before the products, which a warp may have to wait for to begin.
            fetch(step + AHEAD);
            product_begin();
            // Zeros to begin with would be numbers that threads have written, and products would wait for each other.
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16)
                product(sums, PanelsA::operand(stage(step), group_row(), k),
                        PanelsB::operand(stage(step) + PanelsA::NUMBERS, 0, k), step > 0 || k > 0);
            product_commit();
        }
        product_wait<0>();
    }

    __device__ static const float* gather(const Sums& sums) {
        static_assert(ROWS * COLS * sizeof(float) <= STAGES * (ROWS + COLS) * DEPTH * sizeof(bf16), "sums fit");
        SHARED_PANELS(bytes);
        float* all = reinterpret_cast<float*>(bytes);
        __syncthreads(); // All operands have been read.
#pragma unroll
        for (int i = 0; i < COLS / 8; i++) put(all, group_row() + threadIdx.x / 32 % 4 * 16, 8 * i, sums[i]);
        __syncthreads();
        return all;
    }

    __device__ static int group_row() { return threadIdx.x / 128 * 64; }
};
