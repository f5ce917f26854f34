// Products of the rows of each expert with that expert's matrices, on tensor cores and without them.
//
// A product is written once, for any engine: the engine multiplies a tile of ROWS x COLS, to which `a` and `b` give windows
// of the operands for each step of DEPTH along k, and hands out the sums, N side by side.
#pragma once

#include "gates.cuh"

// Rows of the tiles that moe_tiles cuts experts into. Engines with smaller tiles take these in parts, by blockIdx.z.
constexpr int TILE_ROWS = 128;

// Rows first..end of the sorted slots, all of one expert; none if first = end.
struct alignas(16) RowTile {
    uint32_t expert, first, end, unused;
};

// A part of a row-major matrix, from `first` on; outside of `rows` and `cols` it counts as zeros, whose addresses are not read.
template <typename T> struct Window {
    const T* first;
    int64_t stride;
    int rows, cols;

    __device__ const T* at(int row, int col, bool& valid) const {
        valid = row < rows && col < cols;
        return first + row * stride + col;
    }
};

// Rows of a matrix that lie anywhere: row i of the window is row places[i] of the matrix.
template <typename T> struct Picked {
    const T* first;
    const uint32_t* places;
    int64_t stride;
    int rows, cols;

    __device__ const T* at(int row, int col, bool& valid) const {
        valid = row < rows && col < cols;
        return first + places[row] * stride + col;
    }
};

// Rows of two matrices in turn, PAIR / 2 of each, so that whoever has sums of one has the other's as well.
template <typename T, int PAIR> struct Paired {
    const T *gate, *up;
    int64_t stride;
    int rows, cols;

    __device__ const T* at(int row, int col, bool& valid) const {
        constexpr int HALF = PAIR / 2;
        const T* first = row / HALF % 2 == 0 ? gate : up;
        row = row / PAIR * HALF + row % HALF;
        valid = row < rows && col < cols;
        return first + row * stride + col;
    }
};

// SIZE rows or columns of an operand by DEPTH of k in shared memory, as they lie in memory: rows of k if ALONG_K, else k of
// rows. In each row, chunks of 8 numbers change places so that the 8 that ldmatrix reads at once lie in different banks.
template <int SIZE, int DEPTH, bool ALONG_K> struct Tile {
    static constexpr int WIDTH = (ALONG_K ? DEPTH : SIZE) / 8, HEIGHT = ALONG_K ? SIZE : DEPTH;
    static constexpr int NUMBERS = SIZE * DEPTH;

    __device__ static int place(int row, int chunk) {
        static_assert(WIDTH == 4 || WIDTH % 8 == 0, "two rows fill the banks, or one");
        return (row * WIDTH + (chunk ^ (WIDTH == 4 ? row / 2 % 4 : row % 8))) * 8;
    }

    template <int THREADS, typename Source> __device__ static void fetch(bf16* tile, const Source& source) {
        static_assert(HEIGHT * WIDTH % THREADS == 0, "each thread copies as many chunks");
#pragma unroll
        for (int i = 0; i < HEIGHT * WIDTH / THREADS; i++) {
            const int at = i * THREADS + threadIdx.x, row = at / WIDTH, chunk = at % WIDTH;
            bool valid;
            const bf16* from = source.at(row, chunk * 8, valid);
            copy_async_16(tile + place(row, chunk), from, valid);
        }
    }

    // Rows first.. (16 of them) of the left operand, k.. (16) in the order of mma_16x8x16.
    __device__ static void left(uint32_t (&r)[4], const bf16* tile, int first, int k) {
        const int lane = threadIdx.x % 32;
        if (ALONG_K) ldmatrix_x4(r, tile + place(first + lane % 16, k / 8 + lane / 16));
        else ldmatrix_x4_trans(r, tile + place(k + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2));
    }

    // Columns first.. (16) of the right operand, for two of mma_16x8x16.
    __device__ static void right(uint32_t (&r)[4], const bf16* tile, int first, int k) {
        const int lane = threadIdx.x % 32;
        if (ALONG_K) ldmatrix_x4(r, tile + place(first + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
        else ldmatrix_x4_trans(r, tile + place(k + lane % 16, first / 8 + lane / 16));
    }
};

// What engines have in common that gather their sums of ROWS x COLS in shared memory, in place of the operands: rows can then
// be moved 16 bytes at a time, by code that is not repeated for each sum.
template <typename Engine, int ROWS, int COLS, int PAIR, int N, int THREADS> struct Gathered {
    // Groups of 8 change places so that those of 4 rows lie in different banks.
    __device__ static int place(int row, int col) { return row * COLS + (col ^ row % 4 * 8); }

    // Sums of 16 x 8 as mma_16x8x16 has them.
    __device__ static void put(float* all, int row, int col, const float (&sums)[4]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float two[2] = {sums[2 * half], sums[2 * half + 1]};
            store_all(all + place(row + lane / 4 + 8 * half, col + lane % 4 * 2), two);
        }
    }

    // write(row, col, N sums) for all sums of the block.
    template <typename Sums, typename Write> __device__ static void each(const Sums& sums, const Write& write) {
        const float* all = Engine::gather(sums);
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLS / N; i += THREADS) {
            const int row = i / (COLS / N), col = i % (COLS / N) * N;
            float values[N];
            load_all(values, all + place(row, col));
            write(row, col, values);
        }
    }

    // write(row, col, N sums of gates, N of ups), where b was Paired.
    template <typename Sums, typename Write> __device__ static void each_pair(const Sums& sums, const Write& write) {
        constexpr int HALF = PAIR / 2;
        const float* all = Engine::gather(sums);
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLS / 2 / N; i += THREADS) {
            const int row = i / (COLS / 2 / N), col = i % (COLS / 2 / N) * N;
            const int of_gate = col / HALF * PAIR + col % HALF;
            float gate[N], up[N];
            load_all(gate, all + place(row, of_gate));
            load_all(up, all + place(row, of_gate + HALF));
            write(row, col, gate, up);
        }
    }
};

// On tensor cores: sums of WARP x WARP for each warp, STAGES of operands under way. Operands are bf16, their rows and what is
// summed over multiples of 8, their addresses of 16.
template <int ROWS_, int COLS_, int WARP, int BLOCKS_>
struct TensorCores
    : Gathered<TensorCores<ROWS_, COLS_, WARP, BLOCKS_>, ROWS_, COLS_, WARP, 8, ROWS_ / WARP * (COLS_ / WARP) * 32> {
    static constexpr int ROWS = ROWS_, COLS = COLS_, DEPTH = 32, PAIR = WARP, N = 8;
    static constexpr int THREADS = ROWS / WARP * (COLS / WARP) * 32, BLOCKS = BLOCKS_, STAGES = 4;
    static constexpr int DOWN = WARP / 16, ACROSS = WARP / 8;
    typedef float Sums[DOWN][ACROSS][4];

    template <bool A_ALONG_K, bool B_ALONG_K, typename A, typename B>
    __device__ static void multiply(Sums& sums, int n_steps, const A& a, const B& b) {
        typedef Tile<ROWS, DEPTH, A_ALONG_K> TileA;
        typedef Tile<COLS, DEPTH, B_ALONG_K> TileB;
        SHARED(bytes);
        bf16* stages = reinterpret_cast<bf16*>(bytes);
        const auto fetch = [&](int step) {
            if (step < n_steps) {
                bf16* stage = stages + step % STAGES * (TileA::NUMBERS + TileB::NUMBERS);
                TileA::template fetch<THREADS>(stage, a(step));
                TileB::template fetch<THREADS>(stage + TileA::NUMBERS, b(step));
            }
            copy_async_commit();
        };
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int l = 0; l < 4; l++) sums[i][j][l] = 0;
        for (int step = 0; step < STAGES - 1; step++) fetch(step);
        for (int step = 0; step < n_steps; step++) {
            copy_async_wait<STAGES - 2>();
            // What this step reads is there for all, and what the next fetch overwrites has been read by all.
            __syncthreads();
            fetch(step + STAGES - 1);
            const bf16* stage = stages + step % STAGES * (TileA::NUMBERS + TileB::NUMBERS);
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16) {
                uint32_t left[DOWN][4], right[ACROSS][2];
#pragma unroll
                for (int i = 0; i < DOWN; i++) TileA::left(left[i], stage, warp_row() + 16 * i, k);
#pragma unroll
                for (int j = 0; j < ACROSS; j += 2) {
                    uint32_t two[4];
                    TileB::right(two, stage + TileA::NUMBERS, warp_col() + 8 * j, k);
                    right[j][0] = two[0], right[j][1] = two[1], right[j + 1][0] = two[2], right[j + 1][1] = two[3];
                }
#pragma unroll
                for (int i = 0; i < DOWN; i++)
#pragma unroll
                    for (int j = 0; j < ACROSS; j++) mma_16x8x16(sums[i][j], left[i], right[j]);
            }
        }
    }

    __device__ static const float* gather(const Sums& sums) {
        static_assert(ROWS * COLS * sizeof(float) <= STAGES * (ROWS + COLS) * DEPTH * sizeof(bf16), "sums fit");
        SHARED(bytes);
        float* all = reinterpret_cast<float*>(bytes);
        __syncthreads(); // All operands have been read.
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int j = 0; j < ACROSS; j++) TensorCores::put(all, warp_row() + 16 * i, warp_col() + 8 * j, sums[i][j]);
        __syncthreads();
        return all;
    }

    __device__ static int warp_row() { return threadIdx.x / 32 / (COLS / WARP) * WARP; }
    __device__ static int warp_col() { return threadIdx.x / 32 % (COLS / WARP) * WARP; }
};

// Without tensor cores, for f32 and for rows of any length: 4 x 4 sums for each thread, in f32.
struct Plain {
    static constexpr int ROWS = 64, COLS = 64, DEPTH = 16, PAIR = 4, N = 1, THREADS = 256, BLOCKS = 2;
    typedef float Sums[4][4];

    // Operands first, sums at last.
    __device__ static float* memory() {
        __shared__ __align__(16) float all[ROWS * COLS];
        return all;
    }

    // Number (row, k) of a window, whose rows are those of k if not ALONG_K, goes to numbers[k * STRIDE + row].
    static constexpr int STRIDE = ROWS + 4;
    template <bool ALONG_K, typename Source> __device__ static void fetch(float* numbers, const Source& source) {
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
            const int row = ALONG_K ? i / DEPTH : i % ROWS, k = ALONG_K ? i % DEPTH : i / ROWS;
            bool valid;
            const auto* from = source.at(ALONG_K ? row : k, ALONG_K ? k : row, valid);
            numbers[k * STRIDE + row] = valid ? load(*from) : 0.0f;
        }
    }

    template <bool A_ALONG_K, bool B_ALONG_K, typename A, typename B>
    __device__ static void multiply(Sums& sums, int n_steps, const A& a, const B& b) {
        static_assert(2 * DEPTH * STRIDE <= ROWS * COLS, "operands fit");
        float *left = memory(), *right = left + DEPTH * STRIDE;
        const int row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][j] = 0;
        for (int step = 0; step < n_steps; step++) {
            fetch<A_ALONG_K>(left, a(step));
            fetch<B_ALONG_K>(right, b(step));
            __syncthreads();
#pragma unroll
            for (int k = 0; k < DEPTH; k++) {
                float x[4], y[4];
                load_all(x, left + k * STRIDE + row);
                load_all(y, right + k * STRIDE + col);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][j] += x[i] * y[j];
            }
            __syncthreads();
        }
    }

    template <typename Write> __device__ static void each(const Sums& sums, const Write& write) {
        const float* all = gather(sums);
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
            const float one[1] = {all[i]};
            write(i / COLS, i % COLS, one);
        }
    }

    template <typename Write> __device__ static void each_pair(const Sums& sums, const Write& write) {
        constexpr int HALF = PAIR / 2;
        const float* all = gather(sums);
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLS / 2; i += THREADS) {
            const int row = i / (COLS / 2), col = i % (COLS / 2), of_gate = row * COLS + col / HALF * PAIR + col % HALF;
            const float gate[1] = {all[of_gate]}, up[1] = {all[of_gate + HALF]};
            write(row, col, gate, up);
        }
    }

    // Behind the last barrier of multiply, when all operands have been read.
    __device__ static const float* gather(const Sums& sums) {
        float* all = memory();
#pragma unroll
        for (int i = 0; i < 4; i++) store_all(all + (threadIdx.x / 16 * 4 + i) * COLS + threadIdx.x % 16 * 4, sums[i]);
        __syncthreads();
        return all;
    }
};

// The rows of this block's tile.
template <typename E> __device__ inline RowTile row_tile(const RowTile* tiles) {
    RowTile tile = tiles[blockIdx.y];
    tile.first += blockIdx.z * E::ROWS;
    tile.end = tile.end < tile.first + E::ROWS ? tile.end : tile.first + E::ROWS;
    return tile;
}

__device__ inline int steps(int size, int depth) { return (size + depth - 1) / depth; }

// The biases of all experts, bf16 if `low`, else f32; zeros if null.
struct Bias {
    const void* all;
    int low;
    int64_t start;

    __device__ float operator[](int i) const {
        if (all == nullptr) return 0.0f;
        return low ? load(static_cast<const bf16*>(all)[start + i]) : static_cast<const float*>(all)[start + i];
    }
};

// gate = x W1^T + b1, up = x W3^T + b3, activated = act(gate) up, where x is the row of the slot's token, times the slot's
// weight unless weights is null. w1, w3 (n_experts, hidden, dim).
template <typename E, typename T>
__device__ inline void expert_up(const T* x, const uint32_t* sorted, const float* weights, int top_k, const T* w1, const T* w3, const void* b1, const void* b3, int low,
                                 const RowTile* tiles, int dim, int hidden, int kind, float limit, T* gate, T* up,
                                 T* activated) {
    const RowTile tile = row_tile<E>(tiles);
    if (tile.first >= tile.end) return;
    const int rows = tile.end - tile.first, col = blockIdx.x * (E::COLS / 2);
    const int64_t start = (tile.expert * (int64_t)hidden + col) * dim;
    __shared__ uint32_t places[E::ROWS];
    __shared__ float scales[E::ROWS];
    for (int i = threadIdx.x; i < E::ROWS; i += E::THREADS) {
        const uint32_t slot = i < rows ? sorted[tile.first + i] : 0;
        places[i] = slot / top_k;
        scales[i] = weights != nullptr ? weights[slot] : 1.0f;
    }
    __syncthreads();
    typename E::Sums sums;
    E::template multiply<true, true>(
        sums, steps(dim, E::DEPTH),
        [&](int step) {
            const int k = step * E::DEPTH;
            return Picked<T>{x + k, places, dim, rows, dim - k};
        },
        [&](int step) {
            const int k = step * E::DEPTH;
            return Paired<T, E::PAIR>{w1 + start + k, w3 + start + k, dim, hidden - col, dim - k};
        });
    const Bias of_gate = {b1, low, tile.expert * (int64_t)hidden + col};
    const Bias of_up = {b3, low, tile.expert * (int64_t)hidden + col};
    E::each_pair(sums, [&](int i, int j, const float(&gates)[E::N], const float(&ups)[E::N]) {
        if (i >= rows || col + j >= hidden) return;
        float rounded_gates[E::N], rounded_ups[E::N], products[E::N];
#pragma unroll
        for (int l = 0; l < E::N; l++) {
            // As backward will have them.
            rounded_gates[l] = load(store<T>(gates[l] * scales[i] + of_gate[j + l]));
            rounded_ups[l] = load(store<T>(ups[l] * scales[i] + of_up[j + l]));
            const GateFactors factors = gate_factors(kind, limit, rounded_gates[l], rounded_ups[l]);
            products[l] = factors.gate * factors.up;
        }
        const int64_t at = (tile.first + i) * (int64_t)hidden + col + j;
        store_all(gate + at, rounded_gates);
        store_all(up + at, rounded_ups);
        store_all(activated + at, products);
    });
}

// result = activated W2^T + b2. w2 (n_experts, dim, hidden).
template <typename E, typename T>
__device__ inline void expert_down(const T* activated, const T* w2, const void* b2, int low, const RowTile* tiles, int dim,
                                   int hidden, T* result) {
    const RowTile tile = row_tile<E>(tiles);
    if (tile.first >= tile.end) return;
    const int rows = tile.end - tile.first, col = blockIdx.x * E::COLS;
    const int64_t start = (tile.expert * (int64_t)dim + col) * hidden;
    typename E::Sums sums;
    E::template multiply<true, true>(
        sums, steps(hidden, E::DEPTH),
        [&](int step) {
            const int k = step * E::DEPTH;
            return Window<T>{activated + tile.first * (int64_t)hidden + k, hidden, rows, hidden - k};
        },
        [&](int step) {
            const int k = step * E::DEPTH;
            return Window<T>{w2 + start + k, hidden, dim - col, hidden - k};
        });
    const Bias bias = {b2, low, tile.expert * (int64_t)dim + col};
    E::each(sums, [&](int i, int j, const float(&values)[E::N]) {
        if (i >= rows || col + j >= dim) return;
        float y[E::N];
#pragma unroll
        for (int l = 0; l < E::N; l++) y[l] = values[l] + bias[j + l];
        store_all(result + (tile.first + i) * (int64_t)dim + col + j, y);
    });
}

// The gradients of gate and up under dresult W2, and the activated anew unless that is null.
template <typename E, typename T>
__device__ inline void expert_down_backward(const T* dresult, const T* w2, const RowTile* tiles, int dim, int hidden,
                                            int kind, float limit, const T* gate, const T* up, T* dgate, T* dup,
                                            T* activated) {
    const RowTile tile = row_tile<E>(tiles);
    if (tile.first >= tile.end) return;
    const int rows = tile.end - tile.first, col = blockIdx.x * E::COLS;
    const T* own = w2 + tile.expert * (int64_t)dim * hidden + col;
    typename E::Sums sums;
    E::template multiply<true, false>(
        sums, steps(dim, E::DEPTH),
        [&](int step) {
            const int k = step * E::DEPTH;
            return Window<T>{dresult + tile.first * (int64_t)dim + k, dim, rows, dim - k};
        },
        [&](int step) {
            const int k = step * E::DEPTH;
            return Window<T>{own + k * (int64_t)hidden, hidden, dim - k, hidden - col};
        });
    E::each(sums, [&](int i, int j, const float(&values)[E::N]) {
        if (i >= rows || col + j >= hidden) return;
        const int64_t at = (tile.first + i) * (int64_t)hidden + col + j;
        float gates[E::N], ups[E::N], dgates[E::N], dups[E::N], products[E::N];
        load_all(gates, gate + at);
        load_all(ups, up + at);
#pragma unroll
        for (int l = 0; l < E::N; l++) {
            const GateFactors factors = gate_factors(kind, limit, gates[l], ups[l]);
            dgates[l] = values[l] * factors.up * factors.dgate;
            dups[l] = values[l] * factors.gate * factors.dup;
            products[l] = factors.gate * factors.up;
        }
        store_all(dgate + at, dgates);
        store_all(dup + at, dups);
        if (activated != nullptr) store_all(activated + at, products);
    });
}

// dinput = dgate W1 + dup W3.
template <typename E, typename T>
__device__ inline void expert_up_backward(const T* dgate, const T* dup, const T* w1, const T* w3, const RowTile* tiles,
                                          int dim, int hidden, T* dinput) {
    const RowTile tile = row_tile<E>(tiles);
    if (tile.first >= tile.end) return;
    const int rows = tile.end - tile.first, col = blockIdx.x * E::COLS, per_term = steps(hidden, E::DEPTH);
    const int64_t start = tile.expert * (int64_t)hidden * dim + col, first = tile.first * (int64_t)hidden;
    typename E::Sums sums;
    E::template multiply<true, false>(
        sums, 2 * per_term,
        [&](int step) {
            const int k = (step < per_term ? step : step - per_term) * E::DEPTH;
            return Window<T>{(step < per_term ? dgate : dup) + first + k, hidden, rows, hidden - k};
        },
        [&](int step) {
            const int k = (step < per_term ? step : step - per_term) * E::DEPTH;
            return Window<T>{(step < per_term ? w1 : w3) + start + k * (int64_t)dim, dim, hidden - k, dim - col};
        });
    E::each(sums, [&](int i, int j, const float(&values)[E::N]) {
        if (i < rows && col + j < dim) store_all(dinput + (tile.first + i) * (int64_t)dim + col + j, values);
    });
}

// grad += dy^T x over the rows of an expert. dy (slots, height), x (slots, width), grad (n_experts, height, width).
template <typename E, typename T>
__device__ inline void expert_gradient(const T* dy, const T* x, const uint32_t* offsets, int expert, int height, int width,
                                       float* grad) {
    const int first = offsets[expert], n = offsets[expert + 1] - first;
    if (n == 0) return;
    const int row = blockIdx.y * E::ROWS, col = blockIdx.x * E::COLS;
    typename E::Sums sums;
    E::template multiply<false, false>(
        sums, steps(n, E::DEPTH),
        [&](int step) {
            const int k = step * E::DEPTH;
            return Window<T>{dy + (first + k) * (int64_t)height + row, height, n - k, height - row};
        },
        [&](int step) {
            const int k = step * E::DEPTH;
            return Window<T>{x + (first + k) * (int64_t)width + col, width, n - k, width - col};
        });
    E::each(sums, [&](int i, int j, const float(&values)[E::N]) {
        if (row + i >= height || col + j >= width) return;
        float* to = grad + (expert * (int64_t)height + row + i) * width + col + j;
        float sum[E::N];
        load_all(sum, to);
#pragma unroll
        for (int l = 0; l < E::N; l++) sum[l] += values[l];
        store_all(to, sum);
    });
}

// The kernels of an engine, whose names end in NAME.
#define PRODUCTS(NAME, E, T)                                                                                            \
    KERNEL_BOUNDS(E::THREADS, E::BLOCKS, moe_up_##NAME, const T* x, const uint32_t* sorted, const float* weights,       \
                  int top_k, const T* w1, const T* w3, const void* b1, const void* b3, int low, const RowTile* tiles,   \
                  int dim, int hidden, int kind, float limit, T* gate, T* up, T* activated) {                           \
        expert_up<E, T>(x, sorted, weights, top_k, w1, w3, b1, b3, low, tiles, dim, hidden, kind, limit, gate, up,      \
                        activated);                                                                                     \
    }                                                                                                                   \
    KERNEL_BOUNDS(E::THREADS, E::BLOCKS, moe_down_##NAME, const T* activated, const T* w2, const void* b2, int low,     \
                  const RowTile* tiles, int dim, int hidden, T* result) {                                               \
        expert_down<E, T>(activated, w2, b2, low, tiles, dim, hidden, result);                                          \
    }                                                                                                                   \
    KERNEL_BOUNDS(E::THREADS, E::BLOCKS, moe_down_backward_##NAME, const T* dresult, const T* w2, const RowTile* tiles, \
                  int dim, int hidden, int kind, float limit, const T* gate, const T* up, T* dgate, T* dup,             \
                  T* activated) {                                                                                       \
        expert_down_backward<E, T>(dresult, w2, tiles, dim, hidden, kind, limit, gate, up, dgate, dup, activated);      \
    }                                                                                                                   \
    KERNEL_BOUNDS(E::THREADS, E::BLOCKS, moe_up_backward_##NAME, const T* dgate, const T* dup, const T* w1,             \
                  const T* w3, const RowTile* tiles, int dim, int hidden, T* dinput) {                                  \
        expert_up_backward<E, T>(dgate, dup, w1, w3, tiles, dim, hidden, dinput);                                       \
    }                                                                                                                   \
    KERNEL_BOUNDS(E::THREADS, E::BLOCKS, moe_gradient_##NAME, const T* dy, const T* dy2, const T* x,                    \
                  const uint32_t* offsets, int n_experts, int height, int width, float* grad, float* grad2) {           \
        const bool first = blockIdx.z < n_experts;                                                                      \
        expert_gradient<E, T>(first ? dy : dy2, x, offsets, blockIdx.z % n_experts, height, width,                      \
                              first ? grad : grad2);                                                                    \
    }
