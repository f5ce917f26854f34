// Attention: y = softmax(scale * q k^T) v per query head over the keys that a query sees, and its gradients.
//   forward    t = factor * q k^T, y = sum over keys of 2^(t - logsumexp) v, one pass with a running maximum
//   backward   P = 2^(t - logsumexp), D = sum of dy*y, dS = P*(dy v^T - D), dv = P^T dy, dq = scale*dS k, dk = scale*dS^T q
//   softcap    t = factor * tanh(scale/cap * q k^T) with factor = cap*log2(e); its slope, 1 - tanh^2, multiplies dS
//   sinks      a score per query head in the sum of exponentials alone; gradient -sum of 2^(sink - logsumexp)*D
// Shapes     q, y, dy, dq (b, sq, h, hd); k, v, dk, dv (b, sk, kv, hd); logsumexp (b, h, sq), of base 2; sinks (h).
//            stats (b, h, sq up to a multiple of 64, 2): logsumexp and D, 1e30 and 0 beyond sq. starts (b, sq): the first key
//            that each query sees, or null; bounds (b, sq / 64 rounded up, 3): of each 64 queries the smallest start, the
//            largest, and the smallest of these and all later ones. Contiguous. Query i is at position sk - sq + i, up to
//            which it sees; query head j reads key head j / (h / kv).
// Types      q, k, v, y and their gradients bf16 or f32, all the same (decode: q and y may differ from k and v);
//            starts, bounds u32; everything else f32. Products of bf16 on tensor cores, P and dS rounded to bf16 for them.
// Launch     forward, backward_queries: one block per head and tile of queries, last tiles first as they see most,
//            grid = (h, b, tiles). backward_keys: one block per key head and tile of keys, grid = (kv, b, tiles).
//            A kernel's W is the least of 16, 32, 64, 96, 128, 192, 256 that hd fits in; tiles by W in cuda.rs.
//            stats, sinks, decode: above each.
// Writes     everything with =, in an order that is always the same; the sinks' gradient with +=. No atomics.
// Requires   hd % 8 == 0 (16-byte copies), sq <= sk, h % kv == 0, checked in cuda.rs.
// Reference  reference_of in mod.rs. Speed: benches/ops.rs.
#include "kernel.cuh"

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
// What a hidden score is, and what a maximum is before there is one: 2^(HIDDEN - NONE) is 0.
constexpr float HIDDEN = -1e30f, NONE = -1e20f;
// Queries to an entry of bounds.
constexpr int BOUND = 64;

struct Sizes {
    int sq, sk, h, kv, hd;

    __device__ int past() const { return sk - sq; }
    __device__ int key_head(int head) const { return head / (h / kv); }
    // Offset of row i of a head.
    __device__ size_t query(int row, int i, int head) const { return ((size_t(row) * sq + i) * h + head) * hd; }
    __device__ size_t key(int row, int i, int head) const { return ((size_t(row) * sk + i) * kv + head) * hd; }
    __device__ int padded() const { return (sq + BOUND - 1) / BOUND * BOUND; }
};

// What the queries of one row of the batch see besides the causal limit.
struct Mask {
    const uint32_t *starts, *bounds;
    int row, sq;

    __device__ int start(int query) const { return starts ? int(starts[size_t(row) * sq + min(query, sq - 1)]) : 0; }

    __device__ int bound(int i, int which) const {
        return int(bounds[(size_t(row) * ((sq + BOUND - 1) / BOUND) + i / BOUND) * 3 + which]);
    }

    // The first key that any of queries i..i + n sees.
    __device__ int first(int i, int n) const {
        if (!starts) return 0;
        int first = bound(i, 0);
#pragma unroll 1
        for (int next = i / BOUND * BOUND + BOUND; next < min(i + n, sq); next += BOUND) first = min(first, bound(next, 0));
        return first;
    }

    // The first key that all of them see, as far as starts go.
    __device__ int common(int i, int n) const {
        if (!starts) return 0;
        int common = bound(i, 1);
#pragma unroll 1
        for (int next = i / BOUND * BOUND + BOUND; next < min(i + n, sq); next += BOUND) common = max(common, bound(next, 1));
        return common;
    }

    // The first key that any query from those around i on sees.
    __device__ int first_from(int i) const { return starts ? bound(i, 2) : 0; }
};

// tanh(x), for inner = 2 log2(e) x / score.
__device__ inline float capped(float score, float inner) { return 1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(score * inner)); }

// ---- Tiles of bf16 in shared memory: rows of W numbers, in chunks of 8 whose places are permuted so that neither the
// ---- chunks of a row nor a chunk of 8 rows meet in a bank.

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

    __device__ void hold(const bf16* tile) { this->tile = tile; }
    __device__ void get(uint32_t (&a)[4], int m, int k) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(a, tile + moved<W>(place<W>(lane % 16, lane / 16), 16 * m, 2 * k));
    }
};

template <int W, int M> struct Left<W, M, true> {
    uint32_t held[M][W / 16][4];

    __device__ void hold(const bf16* tile) {
        const int lane = threadIdx.x % 32;
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

// ---- bf16, forward. A warp has 16 M queries; keys and values come in tiles of KEYS, the next of which is copied while
// ---- one is worked on: both of them with STAGES = 2, one at a time with 1.

template <int W, int M, int WARPS, int KEYS, int STAGES, bool HELD>
__device__ inline void forward(
    const bf16* q, const bf16* k, const bf16* v, const uint32_t* starts, const uint32_t* bounds, const float* sinks, bf16* y,
    float* logsumexp, const Sizes& sizes, float inner, float factor, unsigned char* shared) {
    constexpr int QUERIES = 16 * M * WARPS, THREADS = 32 * WARPS, TILE = KEYS * W;
    bf16* const q_tile = reinterpret_cast<bf16*>(shared);
    bf16* const k_tiles = q_tile + QUERIES * W;
    bf16* const v_tiles = k_tiles + STAGES * TILE;

    const int row = blockIdx.y, head = blockIdx.x;
    const int query = (gridDim.z - 1 - blockIdx.z) * QUERIES, past = sizes.past(), hd = sizes.hd;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = query + warp * 16 * M; // the warp's first query
    const Mask mask{starts, bounds, row, sizes.sq};
    const int first = mask.first(query, QUERIES) / KEYS * KEYS, end = past + min(query + QUERIES, sizes.sq);
    const int common = mask.common(query, QUERIES);
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    size_t at = sizes.key(row, first, sizes.key_head(head)); // where the tile of keys is that is copied next

    load_tile<W, QUERIES, THREADS>(q_tile, q + sizes.query(row, query, head), q_stride, sizes.sq - query, hd);
    load_tile<W, KEYS, THREADS>(k_tiles, k + at, k_stride, sizes.sk - first, hd);
    if (STAGES == 2) load_tile<W, KEYS, THREADS>(v_tiles, v + at, k_stride, sizes.sk - first, hd);
    copy_async_commit();
    Left<W, M, HELD> queries;
    if (HELD) {
        copy_async_wait<0>();
        __syncthreads();
    }
    queries.hold(q_tile + warp * 16 * M * W);

    float sums[M][W / 8][4], max[M][2], total[M][2];
    clear<W, M>(sums);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) max[m][r] = NONE, total[m][r] = 0.0f;

    int stage = 0;
    for (int key = first; key < end; key += KEYS) {
        const int next = key + KEYS;
        copy_async_wait<0>();
        __syncthreads(); // This tile is here, and the last one is done with.
        if (STAGES == 1) load_tile<W, KEYS, THREADS>(v_tiles, v + at, k_stride, sizes.sk - key, hd);
        at += size_t(KEYS) * k_stride;
        if (STAGES == 2 && next < end) {
            const int other = (stage ^ 1) * TILE;
            load_tile<W, KEYS, THREADS>(k_tiles + other, k + at, k_stride, sizes.sk - next, hd);
            load_tile<W, KEYS, THREADS>(v_tiles + other, v + at, k_stride, sizes.sk - next, hd);
        }
        copy_async_commit();

        float s[M][KEYS / 8][4];
        multiply<W, M, KEYS>(s, queries, k_tiles + stage * TILE);
        if (STAGES == 1) {
            copy_async_wait<0>();
            __syncthreads(); // Values are here, and keys are done with.
            if (next < end) load_tile<W, KEYS, THREADS>(k_tiles, k + at, k_stride, sizes.sk - next, hd);
            copy_async_commit();
        }
        if (inner != 0.0f) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[m][n][i] = capped(s[m][n][i], inner);
        }
        if (key < common || next > past + query + 1) hide<M, KEYS>(s, mask, own, past, key);

#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float largest = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
                for (int n = 1; n < KEYS / 8; n++) largest = fmaxf(largest, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
                const float new_max = fmaxf(max[m][r], largest * factor);
                const float shrink = exp2_fast(max[m][r] - new_max);
                max[m][r] = new_max;
                float sum = 0.0f; // of this thread's columns
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        s[m][n][2 * r + c] = exp2_fast(s[m][n][2 * r + c] * factor - new_max);
                        sum += s[m][n][2 * r + c];
                    }
                total[m][r] = total[m][r] * shrink + sum;
#pragma unroll
                for (int n = 0; n < W / 8; n++) {
                    sums[m][n][2 * r] *= shrink;
                    sums[m][n][2 * r + 1] *= shrink;
                }
            }
        add_product<W, M, KEYS>(sums, s, v_tiles + stage * TILE);
        if (STAGES == 2) stage ^= 1;
    }

    // Computed again, so as not to take registers in the loop.
    const int own_again = (gridDim.z - 1 - renewed(blockIdx.z)) * QUERIES + warp * 16 * M;
    float scale[M][2];
    const float sink = sinks ? sinks[head] * LOG2_E : NONE;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = total[m][r];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            // The sink takes part in the sum of exponentials, and in nothing else.
            const float new_max = fmaxf(max[m][r], sink), shrink = exp2_fast(max[m][r] - new_max);
            sum = sum * shrink + exp2_fast(sink - new_max);
            scale[m][r] = shrink / sum;
            const int i = own_again + 16 * m + 8 * r + lane / 4;
            if (lane % 4 == 0 && i < sizes.sq) {
                logsumexp[(size_t(row) * sizes.h + head) * sizes.sq + i] = new_max + log2f(sum);
            }
        }
    store_sums<W, M>(
        y + sizes.query(row, own_again, head), q_tile + warp * 16 * M * W, sums, scale, q_stride, sizes.sq - own_again, hd);
}

// ---- bf16, backward to keys and values. A warp has 16 M keys; queries come in tiles of QUERIES, worked on SUB at a time:
// ---- scores have a row for each key, so that P^T and dS^T are left operands as they come. With `stages` = 2 the next tile
// ---- is copied while one is worked on. Where there are no registers for both gradients, DK and DV are two kernels.

template <int W, int M, int WARPS, int QUERIES, int SUB, bool HELD, bool DK, bool DV>
__device__ inline void backward_keys(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, bf16* dk, bf16* dv, const Sizes& sizes, float inner, float factor, float scale, int stages,
    unsigned char* shared) {
    constexpr int KEYS = 16 * M * WARPS, THREADS = 32 * WARPS, TILE = QUERIES * W;
    // A stage: queries, gradients, and two statistics for each query, four bf16 in size.
    constexpr int STAGE = 2 * TILE + 4 * QUERIES;
    bf16* const k_tile = reinterpret_cast<bf16*>(shared);
    bf16* const v_tile = k_tile + KEYS * W;
    bf16* const tiles = v_tile + (DK ? KEYS * W : 0);

    const int row = blockIdx.y, key_head = blockIdx.x, group = sizes.h / sizes.kv;
    const int key = blockIdx.z * KEYS, past = sizes.past(), hd = sizes.hd;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = key + warp * 16 * M; // the warp's first key
    const Mask mask{starts, bounds, row, sizes.sq};
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;

    // The tile of queries from `query` on, or after it, that sees any of these keys; sq if there is none.
    const auto visible = [&](int query) {
        while (query < sizes.sq && mask.first(query, QUERIES) >= key + KEYS) {
            query = mask.first_from(query) >= key + KEYS ? sizes.sq : query + QUERIES;
        }
        return query;
    };
    const auto load = [&](int stage, int head, int query) {
        bf16* const tile = tiles + stage * STAGE;
        const size_t at = sizes.query(row, query, key_head * group + head);
        load_tile<W, QUERIES, THREADS>(tile, q + at, q_stride, sizes.sq - query, hd);
        load_tile<W, QUERIES, THREADS>(tile + TILE, dy + at, q_stride, sizes.sq - query, hd);
        if (threadIdx.x < QUERIES / 2) {
            const size_t stat = (size_t(row) * sizes.h + key_head * group + head) * sizes.padded() + query;
            copy_async_16(tile + 2 * TILE + threadIdx.x * 8, stats + stat * 2 + threadIdx.x * 4, true);
        }
    };

    const int from = visible(max(key - past, 0) / QUERIES * QUERIES);
    int head = 0, query = from, stage = 0;
    load_tile<W, KEYS, THREADS>(k_tile, k + sizes.key(row, key, key_head), k_stride, sizes.sk - key, hd);
    if (DK) load_tile<W, KEYS, THREADS>(v_tile, v + sizes.key(row, key, key_head), k_stride, sizes.sk - key, hd);
    if (query < sizes.sq) load(0, head, query);
    copy_async_commit();
    Left<W, M, HELD> keys, values;
    if (HELD) {
        copy_async_wait<0>();
        __syncthreads();
    }
    keys.hold(k_tile + warp * 16 * M * W);
    if (DK) values.hold(v_tile + warp * 16 * M * W);

    float dk_sums[M][DK ? W / 8 : 1][4], dv_sums[M][DV ? W / 8 : 1][4];
    if constexpr (DK) clear<W, M>(dk_sums);
    if constexpr (DV) clear<W, M>(dv_sums);

    while (query < sizes.sq && head < group) {
        int next_head = head, next = visible(query + QUERIES);
        if (next >= sizes.sq) next = from, next_head++;
        copy_async_wait<0>();
        __syncthreads(); // This tile is here, and the last one is done with.
        if (stages == 2 && next_head < group) load(stage ^ 1, next_head, next);
        copy_async_commit();

        const bf16* const q_tile = tiles + stage * STAGE;
        const bf16* const dy_tile = q_tile + TILE;
        const float* const stat = reinterpret_cast<const float*>(dy_tile + TILE);
        const bool is_border = key < mask.common(query, QUERIES) || key + KEYS > past + query + 1;
#pragma unroll 1
        for (int sub = 0; sub < QUERIES; sub += SUB) {
            float s[M][SUB / 8][4], ds[M][SUB / 8][4];
            multiply<W, M, SUB>(s, keys, q_tile + sub * W);
            if constexpr (DK) multiply<W, M, SUB>(ds, values, dy_tile + sub * W);
            if (inner != 0.0f) {
#pragma unroll
                for (int n = 0; n < SUB / 8; n++) {
                    const auto at = *reinterpret_cast<const Pack<float, 4>*>(stat + (sub + 8 * n + lane % 4 * 2) * 2);
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            s[m][n][i] = capped(s[m][n][i], inner);
                            // The slope multiplies dS = P (ds - D), here ds so that subtracting D later gives that.
                            if (DK) {
                                const float d = at.at[i % 2 * 2 + 1];
                                ds[m][n][i] = (ds[m][n][i] - d) * (1.0f - s[m][n][i] * s[m][n][i]) + d;
                            }
                        }
                }
            }
            if (is_border) hide_transposed<M, SUB>(s, mask, query + sub, past, own);
#pragma unroll
            for (int n = 0; n < SUB / 8; n++) {
                // Of two neighbouring queries: logsumexp, D, logsumexp, D.
                const auto at = *reinterpret_cast<const Pack<float, 4>*>(stat + (sub + 8 * n + lane % 4 * 2) * 2);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][n][i] = exp2_fast(s[m][n][i] * factor - at.at[i % 2 * 2]);
                        if (DK) ds[m][n][i] = s[m][n][i] * (ds[m][n][i] - at.at[i % 2 * 2 + 1]);
                    }
            }
            if constexpr (DV) add_product<W, M, SUB>(dv_sums, s, dy_tile + sub * W);
            if constexpr (DK) add_product<W, M, SUB>(dk_sums, ds, q_tile + sub * W);
        }
        if (stages == 2) {
            stage ^= 1;
        } else if (next_head < group) {
            __syncthreads();
            load(0, next_head, next);
            copy_async_commit();
        }
        head = next_head, query = next;
    }

    copy_async_wait<0>();
    __syncthreads(); // If there was no query, keys and values may still be on their way.
    // Computed again, so as not to take registers in the loop.
    const int own_again = renewed(blockIdx.z) * KEYS + warp * 16 * M;
    const size_t to = sizes.key(row, own_again, key_head);
    float scales[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = scale;
    if constexpr (DK) store_sums<W, M>(dk + to, k_tile + warp * 16 * M * W, dk_sums, scales, k_stride, sizes.sk - own_again, hd);
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = 1.0f;
    if constexpr (DV) store_sums<W, M>(dv + to, k_tile + warp * 16 * M * W, dv_sums, scales, k_stride, sizes.sk - own_again, hd);
}

// ---- bf16, backward to queries. A warp has 16 M queries; keys and values come in tiles of KEYS, worked on SUB at a time.

template <int W, int M, int WARPS, int KEYS, int SUB, bool HELD>
__device__ inline void backward_queries(
    const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, bf16* dq, const Sizes& sizes, float inner, float factor, float scale, int stages,
    unsigned char* shared) {
    constexpr int QUERIES = 16 * M * WARPS, THREADS = 32 * WARPS, TILE = KEYS * W;
    bf16* const q_tile = reinterpret_cast<bf16*>(shared);
    bf16* const dy_tile = q_tile + QUERIES * W;
    bf16* const tiles = dy_tile + QUERIES * W;

    const int row = blockIdx.y, head = blockIdx.x;
    const int query = (gridDim.z - 1 - blockIdx.z) * QUERIES, past = sizes.past(), hd = sizes.hd;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = query + warp * 16 * M; // the warp's first query
    const Mask mask{starts, bounds, row, sizes.sq};
    const int first = mask.first(query, QUERIES) / KEYS * KEYS, end = past + min(query + QUERIES, sizes.sq);
    const int common = mask.common(query, QUERIES);
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    size_t at = sizes.key(row, first, sizes.key_head(head)); // where the tile of keys is that is copied next
    const auto load = [&](int stage, int key) {
        bf16* const tile = tiles + stage * 2 * TILE;
        load_tile<W, KEYS, THREADS>(tile, k + at, k_stride, sizes.sk - key, hd);
        load_tile<W, KEYS, THREADS>(tile + TILE, v + at, k_stride, sizes.sk - key, hd);
        at += size_t(KEYS) * k_stride;
    };

    load_tile<W, QUERIES, THREADS>(q_tile, q + sizes.query(row, query, head), q_stride, sizes.sq - query, hd);
    load_tile<W, QUERIES, THREADS>(dy_tile, dy + sizes.query(row, query, head), q_stride, sizes.sq - query, hd);
    load(0, first);
    copy_async_commit();
    Left<W, M, HELD> queries, grads;
    if (HELD) {
        copy_async_wait<0>();
        __syncthreads();
    }
    queries.hold(q_tile + warp * 16 * M * W);
    grads.hold(dy_tile + warp * 16 * M * W);

    float sums[M][W / 8][4], logsumexp[M][2], d[M][2];
    clear<W, M>(sums);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Beyond the last query, what is said of padding.
            const int i = own + 16 * m + 8 * r + lane / 4;
            const size_t stat = (size_t(row) * sizes.h + head) * sizes.padded() + i;
            logsumexp[m][r] = i < sizes.sq ? stats[stat * 2] : -HIDDEN;
            d[m][r] = i < sizes.sq ? stats[stat * 2 + 1] : 0.0f;
        }

    int stage = 0;
    for (int key = first; key < end; key += KEYS) {
        const int next = key + KEYS;
        copy_async_wait<0>();
        __syncthreads(); // This tile is here, and the last one is done with.
        if (stages == 2 && next < end) load(stage ^ 1, next);
        copy_async_commit();

        const bf16* const k_tile = tiles + stage * 2 * TILE;
        const bf16* const v_tile = k_tile + TILE;
        const bool is_border = key < common || next > past + query + 1;
#pragma unroll 1
        for (int sub = 0; sub < KEYS; sub += SUB) {
            float s[M][SUB / 8][4], ds[M][SUB / 8][4];
            multiply<W, M, SUB>(s, queries, k_tile + sub * W);
            multiply<W, M, SUB>(ds, grads, v_tile + sub * W);
            if (inner != 0.0f) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            s[m][n][i] = capped(s[m][n][i], inner);
                            ds[m][n][i] = (ds[m][n][i] - d[m][i / 2]) * (1.0f - s[m][n][i] * s[m][n][i]) + d[m][i / 2];
                        }
            }
            if (is_border) hide<M, SUB>(s, mask, own, past, key + sub);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < SUB / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float p = exp2_fast(s[m][n][i] * factor - logsumexp[m][i / 2]);
                        ds[m][n][i] = p * (ds[m][n][i] - d[m][i / 2]);
                    }
            add_product<W, M, SUB>(sums, ds, k_tile + sub * W);
        }
        if (stages == 2) {
            stage ^= 1;
        } else if (next < end) {
            __syncthreads();
            load(0, next);
            copy_async_commit();
        }
    }

    float scales[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = scale;
    store_sums<W, M>(
        dq + sizes.query(row, own, head), q_tile + warp * 16 * M * W, sums, scales, q_stride, sizes.sq - own, hd);
}

// ---- f32: blocks of 256 threads, 16 by 16 of them over tiles of R rows of W numbers. Thread (y, x) computes rows
// ---- y + 16 i and columns x + 16 j of a product of two tiles, and columns 4 x + 64 j.. of a sum.

constexpr int THREADS_F32 = 256;

// A row is 16 bytes longer than it need be, so that a column is spread over the banks.
template <int W> constexpr int ROW_F32 = W + 4;

template <int W, int R> __device__ inline void load_tile_f32(float* tile, const float* from, int stride, int rows, int hd) {
    for (int i = threadIdx.x; i < R * W / 4; i += THREADS_F32) {
        const int row = i / (W / 4), column = i % (W / 4) * 4;
        copy_async_16(tile + row * ROW_F32<W> + column, from + size_t(row) * stride + column, row < rows && column < hd);
    }
}

__device__ inline void await_tiles() {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
}

// d = a b^T.
template <int W, int R> __device__ inline void multiply_f32(float (&d)[R / 16][R / 16], const float* a, const float* b) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < R / 16; j++) d[i][j] = 0.0f;
#pragma unroll 4
    for (int c = 0; c < W; c += 4) {
        float left[R / 16][4], right[R / 16][4];
#pragma unroll
        for (int i = 0; i < R / 16; i++) {
            load_all<4>(left[i], a + (y + 16 * i) * ROW_F32<W> + c);
            load_all<4>(right[i], b + (x + 16 * i) * ROW_F32<W> + c);
        }
#pragma unroll
        for (int i = 0; i < R / 16; i++)
#pragma unroll
            for (int j = 0; j < R / 16; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) d[i][j] += left[i][k] * right[j][k];
    }
}

template <int W> constexpr int PARTS_F32 = (W + 63) / 64;

// d += p b.
template <int W, int R>
__device__ inline void add_product_f32(float (&d)[R / 16][PARTS_F32<W>][4], const float* p, const float* b) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < R; k++) {
        float left[R / 16];
#pragma unroll
        for (int i = 0; i < R / 16; i++) left[i] = p[(y + 16 * i) * ROW_F32<R> + k];
#pragma unroll
        for (int j = 0; j < PARTS_F32<W>; j++) {
            if (4 * x + 64 * j >= W) continue;
            float right[4];
            load_all<4>(right, b + k * ROW_F32<W> + 4 * x + 64 * j);
#pragma unroll
            for (int i = 0; i < R / 16; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) d[i][j][c] += left[i] * right[c];
        }
    }
}

template <int W, int R> __device__ inline void clear_f32(float (&d)[R / 16][PARTS_F32<W>][4]) {
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < PARTS_F32<W>; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) d[i][j][c] = 0.0f;
}

template <int R> __device__ inline void put_f32(float* p, const float (&s)[R / 16][R / 16]) {
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < R / 16; j++) p[(threadIdx.x / 16 + 16 * i) * ROW_F32<R> + threadIdx.x % 16 + 16 * j] = s[i][j];
}

template <int W, int R>
__device__ inline void store_f32(
    float* to, const float (&d)[R / 16][PARTS_F32<W>][4], const float (&scale)[R / 16], int stride, int rows, int hd) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < R / 16; i++)
#pragma unroll
        for (int j = 0; j < PARTS_F32<W>; j++) {
            if (y + 16 * i >= rows || 4 * x + 64 * j >= hd) continue;
            float scaled[4];
#pragma unroll
            for (int c = 0; c < 4; c++) scaled[c] = d[i][j][c] * scale[i];
            store_all<4>(to + size_t(y + 16 * i) * stride + 4 * x + 64 * j, scaled);
        }
}

template <int W, int R>
__device__ inline void forward_f32(
    const float* q, const float* k, const float* v, const uint32_t* starts, const uint32_t* bounds, const float* sinks,
    float* y, float* logsumexp, const Sizes& sizes, float inner, float factor, unsigned char* shared) {
    float* const q_tile = reinterpret_cast<float*>(shared);
    float* const k_tile = q_tile + R * ROW_F32<W>; // values too, after the keys
    float* const p_tile = k_tile + R * ROW_F32<W>;

    const int row = blockIdx.y, head = blockIdx.x;
    const int query = (gridDim.z - 1 - blockIdx.z) * R, past = sizes.past(), hd = sizes.hd;
    const Mask mask{starts, bounds, row, sizes.sq};
    const int first = mask.first(query, R) / R * R, end = past + min(query + R, sizes.sq);
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    load_tile_f32<W, R>(q_tile, q + sizes.query(row, query, head), q_stride, sizes.sq - query, hd);

    float sums[R / 16][PARTS_F32<W>][4], max[R / 16], total[R / 16];
    clear_f32<W, R>(sums);
#pragma unroll
    for (int i = 0; i < R / 16; i++) max[i] = NONE, total[i] = 0.0f;
    for (int key = first; key < end; key += R) {
        const size_t at = sizes.key(row, key, sizes.key_head(head));
        __syncthreads();
        load_tile_f32<W, R>(k_tile, k + at, k_stride, sizes.sk - key, hd);
        await_tiles();
        float s[R / 16][R / 16];
        multiply_f32<W, R>(s, q_tile, k_tile);
        __syncthreads();
        load_tile_f32<W, R>(k_tile, v + at, k_stride, sizes.sk - key, hd);
#pragma unroll
        for (int i = 0; i < R / 16; i++) {
            const int own = query + threadIdx.x / 16 + 16 * i, start = mask.start(own);
            float largest = HIDDEN;
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                const int other = key + threadIdx.x % 16 + 16 * j;
                if (inner != 0.0f) s[i][j] = capped(s[i][j], inner);
                if (other < start || other > past + own) s[i][j] = HIDDEN;
                largest = fmaxf(largest, s[i][j]);
            }
            for (int lane = 8; lane > 0; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lane));
            const float new_max = fmaxf(max[i], largest * factor), shrink = exp2_fast(max[i] - new_max);
            max[i] = new_max;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                s[i][j] = exp2_fast(s[i][j] * factor - new_max);
                sum += s[i][j];
            }
            total[i] = total[i] * shrink + sum;
#pragma unroll
            for (int j = 0; j < PARTS_F32<W>; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[i][j][c] *= shrink;
        }
        put_f32<R>(p_tile, s);
        await_tiles();
        add_product_f32<W, R>(sums, p_tile, k_tile);
    }

    float scale[R / 16];
    const float sink = sinks ? sinks[head] * LOG2_E : NONE;
#pragma unroll
    for (int i = 0; i < R / 16; i++) {
        float sum = total[i];
        for (int lane = 8; lane > 0; lane /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lane);
        const float new_max = fmaxf(max[i], sink), shrink = exp2_fast(max[i] - new_max);
        sum = sum * shrink + exp2_fast(sink - new_max);
        scale[i] = shrink / sum;
        const int own = query + threadIdx.x / 16 + 16 * i;
        if (threadIdx.x % 16 == 0 && own < sizes.sq) {
            logsumexp[(size_t(row) * sizes.h + head) * sizes.sq + own] = new_max + log2f(sum);
        }
    }
    store_f32<W, R>(y + sizes.query(row, query, head), sums, scale, q_stride, sizes.sq - query, hd);
}

template <int W, int R>
__device__ inline void backward_keys_f32(
    const float* q, const float* k, const float* v, const float* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, float* dk, float* dv, const Sizes& sizes, float inner, float factor, float scale,
    unsigned char* shared) {
    constexpr int TILE = R * ROW_F32<W>;
    float* const k_tile = reinterpret_cast<float*>(shared);
    float *const v_tile = k_tile + TILE, *const q_tile = v_tile + TILE, *const dy_tile = q_tile + TILE;
    float* const p_tile = dy_tile + TILE; // P^T, then dS^T

    const int row = blockIdx.y, key_head = blockIdx.x, group = sizes.h / sizes.kv;
    const int key = blockIdx.z * R, past = sizes.past(), hd = sizes.hd;
    const Mask mask{starts, bounds, row, sizes.sq};
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    const size_t own = sizes.key(row, key, key_head);
    load_tile_f32<W, R>(k_tile, k + own, k_stride, sizes.sk - key, hd);
    load_tile_f32<W, R>(v_tile, v + own, k_stride, sizes.sk - key, hd);

    float dk_sums[R / 16][PARTS_F32<W>][4], dv_sums[R / 16][PARTS_F32<W>][4];
    clear_f32<W, R>(dk_sums);
    clear_f32<W, R>(dv_sums);
    for (int head = key_head * group; head < (key_head + 1) * group; head++) {
        const float* const stat = stats + (size_t(row) * sizes.h + head) * sizes.padded() * 2;
        for (int query = max(key - past, 0) / R * R; query < sizes.sq; query += R) {
            if (mask.first_from(query) >= key + R) break;
            if (mask.first(query, R) >= key + R) continue;
            const size_t at = sizes.query(row, query, head);
            __syncthreads();
            load_tile_f32<W, R>(q_tile, q + at, q_stride, sizes.sq - query, hd);
            load_tile_f32<W, R>(dy_tile, dy + at, q_stride, sizes.sq - query, hd);
            await_tiles();
            float s[R / 16][R / 16], ds[R / 16][R / 16];
            multiply_f32<W, R>(s, k_tile, q_tile);
            multiply_f32<W, R>(ds, v_tile, dy_tile);
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                const int other = query + threadIdx.x % 16 + 16 * j, start = mask.start(other);
                const float logsumexp = stat[other * 2], d = stat[other * 2 + 1];
#pragma unroll
                for (int i = 0; i < R / 16; i++) {
                    const int at = key + threadIdx.x / 16 + 16 * i;
                    ds[i][j] -= d;
                    if (inner != 0.0f) {
                        s[i][j] = capped(s[i][j], inner);
                        ds[i][j] *= 1.0f - s[i][j] * s[i][j];
                    }
                    if (at < start || at > past + other) s[i][j] = HIDDEN;
                    s[i][j] = exp2_fast(s[i][j] * factor - logsumexp);
                    ds[i][j] *= s[i][j];
                }
            }
            put_f32<R>(p_tile, s);
            __syncthreads();
            add_product_f32<W, R>(dv_sums, p_tile, dy_tile);
            __syncthreads();
            put_f32<R>(p_tile, ds);
            __syncthreads();
            add_product_f32<W, R>(dk_sums, p_tile, q_tile);
        }
    }
    copy_async_wait<0>(); // If there was no query, keys and values are still on their way.
    float scales[R / 16];
#pragma unroll
    for (int i = 0; i < R / 16; i++) scales[i] = scale;
    store_f32<W, R>(dk + own, dk_sums, scales, k_stride, sizes.sk - key, hd);
#pragma unroll
    for (int i = 0; i < R / 16; i++) scales[i] = 1.0f;
    store_f32<W, R>(dv + own, dv_sums, scales, k_stride, sizes.sk - key, hd);
}

template <int W, int R>
__device__ inline void backward_queries_f32(
    const float* q, const float* k, const float* v, const float* dy, const float* stats, const uint32_t* starts,
    const uint32_t* bounds, float* dq, const Sizes& sizes, float inner, float factor, float scale, unsigned char* shared) {
    constexpr int TILE = R * ROW_F32<W>;
    float* const q_tile = reinterpret_cast<float*>(shared);
    float *const dy_tile = q_tile + TILE, *const k_tile = dy_tile + TILE, *const v_tile = k_tile + TILE;
    float* const ds_tile = v_tile + TILE;

    const int row = blockIdx.y, head = blockIdx.x;
    const int query = (gridDim.z - 1 - blockIdx.z) * R, past = sizes.past(), hd = sizes.hd;
    const Mask mask{starts, bounds, row, sizes.sq};
    const int first = mask.first(query, R) / R * R, end = past + min(query + R, sizes.sq);
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    const float* const stat = stats + (size_t(row) * sizes.h + head) * sizes.padded() * 2;
    const size_t own = sizes.query(row, query, head);
    load_tile_f32<W, R>(q_tile, q + own, q_stride, sizes.sq - query, hd);
    load_tile_f32<W, R>(dy_tile, dy + own, q_stride, sizes.sq - query, hd);

    float sums[R / 16][PARTS_F32<W>][4];
    clear_f32<W, R>(sums);
    for (int key = first; key < end; key += R) {
        const size_t at = sizes.key(row, key, sizes.key_head(head));
        __syncthreads();
        load_tile_f32<W, R>(k_tile, k + at, k_stride, sizes.sk - key, hd);
        load_tile_f32<W, R>(v_tile, v + at, k_stride, sizes.sk - key, hd);
        await_tiles();
        float s[R / 16][R / 16], ds[R / 16][R / 16];
        multiply_f32<W, R>(s, q_tile, k_tile);
        multiply_f32<W, R>(ds, dy_tile, v_tile);
#pragma unroll
        for (int i = 0; i < R / 16; i++) {
            const int at = query + threadIdx.x / 16 + 16 * i, start = mask.start(at);
            const float logsumexp = stat[at * 2], d = stat[at * 2 + 1];
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                const int other = key + threadIdx.x % 16 + 16 * j;
                ds[i][j] -= d;
                if (inner != 0.0f) {
                    s[i][j] = capped(s[i][j], inner);
                    ds[i][j] *= 1.0f - s[i][j] * s[i][j];
                }
                if (other < start || other > past + at) s[i][j] = HIDDEN;
                ds[i][j] *= exp2_fast(s[i][j] * factor - logsumexp);
            }
        }
        put_f32<R>(ds_tile, ds);
        __syncthreads();
        add_product_f32<W, R>(sums, ds_tile, k_tile);
    }
    float scales[R / 16];
#pragma unroll
    for (int i = 0; i < R / 16; i++) scales[i] = scale;
    store_f32<W, R>(dq + own, sums, scales, q_stride, sizes.sq - query, hd);
}

// ---- What backward needs of each query.

// `lanes`, a power of two that is at least hd / 8, take a row each; grid = ceil(b * padded * h * lanes / 256).
template <typename T>
__device__ inline void stats_of(const T* y, const T* dy, const float* logsumexp, float* stats, int64_t b, const Sizes& sizes,
                                int lanes) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
    const int lane = threadIdx.x % lanes, head = int(at % sizes.h), i = int(at / sizes.h % sizes.padded());
    const int64_t row = at / sizes.h / sizes.padded();
    const bool inside = row < b && i < sizes.sq;
    float d = 0.0f;
    if (inside && lane * 8 < sizes.hd) {
        float left[8], right[8];
        load_all<8>(left, y + sizes.query(int(row), i, head) + lane * 8);
        load_all<8>(right, dy + sizes.query(int(row), i, head) + lane * 8);
#pragma unroll
        for (int j = 0; j < 8; j++) d += left[j] * right[j];
    }
    for (int other = lanes / 2; other > 0; other /= 2) d += __shfl_xor_sync(ALL_LANES, d, other);
    if (lane == 0 && row < b) {
        const int64_t query = row * sizes.h + head;
        stats[(query * sizes.padded() + i) * 2] = inside ? logsumexp[query * sizes.sq + i] : -HIDDEN;
        stats[(query * sizes.padded() + i) * 2 + 1] = d;
    }
}

// ---- Few queries: the keys are split over blocks, each of which writes what its keys contribute to up to G rows, the
// ---- queries of the heads that share a key head; then all that is joined.

constexpr int THREADS_DECODE = 128;
// Bytes of a key that are staged at a time, and how far the keys lie apart there: no two of 8 meet in a bank.
constexpr int STAGED = 128, STAGED_ROW = STAGED + 16;

template <typename T, int G>
__device__ inline void decode(
    const void* q, int q_is_bf16, const T* k, const T* v, const uint32_t* starts, float* stats, float* sums, int first_row,
    int rows, const Sizes& sizes, int64_t k_batch, int64_t v_batch, int first_key, int span, float inner, float factor,
    unsigned char* shared) {
    constexpr int COLUMNS = STAGED / sizeof(T), CHUNK = 16 / sizeof(T);
    const int hd = sizes.hd, width = (hd + COLUMNS - 1) / COLUMNS * COLUMNS, past = sizes.past();
    const int row = blockIdx.y / sizes.kv, key_head = blockIdx.y % sizes.kv, group = sizes.h / sizes.kv;
    const int begin = first_key + blockIdx.x * span, end = min(begin + span, sizes.sk), k_stride = sizes.kv * hd;
    const int own = blockIdx.z * G; // the block's first row of `rows`
    unsigned char* const staged = shared; // two stages; later the sums of key groups
    float* const queries = reinterpret_cast<float*>(staged + 2 * THREADS_DECODE * STAGED_ROW); // (G, width)
    float* const scores = queries + G * width; // (span, G)
    // Rows are counted over heads, then queries.
    const auto query_of = [&](int g) { return (first_row + min(own + g, rows - 1)) % sizes.sq; };
    const auto start_of = [&](int g) { return starts ? int(starts[size_t(row) * sizes.sq + query_of(g)]) : 0; };
    const size_t part = (size_t(blockIdx.y) * rows + own) * gridDim.x + blockIdx.x; // of row g: part + g * gridDim.x

    bool is_visible = false;
    for (int g = 0; g < G; g++) is_visible |= start_of(g) < end && past + query_of(g) >= begin;
    if (!is_visible) {
        if (threadIdx.x < min(G, rows - own)) {
            stats[(part + threadIdx.x * gridDim.x) * 2] = NONE;
            stats[(part + threadIdx.x * gridDim.x) * 2 + 1] = 0.0f;
        }
        return;
    }

    for (int i = threadIdx.x; i < G * width; i += THREADS_DECODE) {
        const int g = i / width, column = i % width, r = first_row + own + g;
        float x = 0.0f;
        if (own + g < rows && column < hd) {
            const size_t at = sizes.query(row, r % sizes.sq, key_head * group + r / sizes.sq) + column;
            x = q_is_bf16 ? load(static_cast<const bf16*>(q)[at]) : static_cast<const float*>(q)[at];
        }
        queries[i] = x;
    }

    // A thread has one key of each THREADS_DECODE, of which a part is staged at a time.
    k += row * k_batch + key_head * hd;
    const int parts = width / COLUMNS, steps = (end - begin + THREADS_DECODE - 1) / THREADS_DECODE * parts;
    const auto stage = [&](int step) {
        const int key = begin + step / parts * THREADS_DECODE, column = step % parts * COLUMNS;
        unsigned char* const to = staged + step % 2 * THREADS_DECODE * STAGED_ROW;
        for (int i = threadIdx.x; i < THREADS_DECODE * 8; i += THREADS_DECODE) {
            const int at = column + i % 8 * CHUNK;
            copy_async_16(to + i / 8 * STAGED_ROW + i % 8 * 16, k + size_t(key + i / 8) * k_stride + at,
                          key + i / 8 < end && at < hd);
        }
    };
    float score[G];
    stage(0);
    copy_async_commit();
    for (int step = 0; step < steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) stage(step + 1);
        copy_async_commit();
        if (step % parts == 0) {
#pragma unroll
            for (int g = 0; g < G; g++) score[g] = 0.0f;
        }
        const T* const own_key =
            reinterpret_cast<const T*>(staged + (step % 2 * THREADS_DECODE + threadIdx.x) * STAGED_ROW);
        const float* const own_queries = queries + step % parts * COLUMNS;
#pragma unroll 2
        for (int c = 0; c < COLUMNS; c += CHUNK) {
            float x[CHUNK];
            load_all<CHUNK>(x, own_key + c);
#pragma unroll
            for (int g = 0; g < G; g++) {
                float y[CHUNK];
                load_all<CHUNK>(y, own_queries + g * width + c);
#pragma unroll
                for (int i = 0; i < CHUNK; i++) score[g] += x[i] * y[i];
            }
        }
        if (step % parts == parts - 1) {
            const int key = begin + step / parts * THREADS_DECODE + threadIdx.x;
            if (key < end) {
#pragma unroll
                for (int g = 0; g < G; g++) {
                    if (inner != 0.0f) score[g] = capped(score[g], inner);
                    if (key < start_of(g) || key > past + query_of(g)) score[g] = HIDDEN;
                }
                store_all<G>(scores + (key - begin) * G, score);
            }
        }
    }
    __syncthreads();

    for (int g = threadIdx.x / 32; g < min(G, rows - own); g += THREADS_DECODE / 32) {
        const int lane = threadIdx.x % 32;
        float largest = HIDDEN, total = 0.0f;
        for (int i = lane; i < end - begin; i += 32) largest = fmaxf(largest, scores[i * G + g]);
        largest = fmaxf(warp_max(largest) * factor, NONE);
        for (int i = lane; i < end - begin; i += 32) {
            const float p = exp2_fast(scores[i * G + g] * factor - largest);
            scores[i * G + g] = p;
            total += p;
        }
        total = warp_sum(total);
        if (lane == 0) {
            stats[(part + size_t(g) * gridDim.x) * 2] = largest;
            stats[(part + size_t(g) * gridDim.x) * 2 + 1] = total;
        }
    }
    __syncthreads();

    // Two columns to a thread; threads that are left over share the keys.
    v += row * v_batch + key_head * hd;
    int lanes = 1;
    while (lanes * 2 < hd && lanes < THREADS_DECODE) lanes *= 2;
    const int groups = THREADS_DECODE / lanes, lane = threadIdx.x % lanes, key_group = threadIdx.x / lanes;
    float* const partial = reinterpret_cast<float*>(staged); // (groups, G, 2 lanes)
    for (int block = 0; block < hd; block += 2 * lanes) {
        const int column = block + 2 * lane;
        float sum[G][2];
#pragma unroll
        for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = 0.0f;
        if (column < hd) {
#pragma unroll 4
            for (int i = key_group; i < end - begin; i += groups) {
                const auto value = *reinterpret_cast<const Pack<T, 2>*>(v + size_t(begin + i) * k_stride + column);
                float p[G];
                load_all<G>(p, scores + i * G);
#pragma unroll
                for (int g = 0; g < G; g++) {
                    sum[g][0] += p[g] * load(value.at[0]);
                    sum[g][1] += p[g] * load(value.at[1]);
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < G; g++) store_all<2>(partial + ((key_group * G + g) * lanes + lane) * 2, sum[g]);
        __syncthreads();
        for (int i = threadIdx.x; i < G * lanes * 2; i += THREADS_DECODE) {
            const int g = i / (lanes * 2), at = block + i % (lanes * 2);
            if (own + g >= rows || at >= hd) continue;
            float total = 0.0f;
            for (int other = 0; other < groups; other++) total += partial[other * G * lanes * 2 + i];
            sums[(part + size_t(g) * gridDim.x) * hd + at] = total;
        }
    }
}

// One block per row: what `splits` blocks of keys contribute under their joint maximum, divided by the sum of exponentials,
// that of the sink too. grid = (rows, b * kv), shared: a weight for each split.
template <typename T>
__device__ inline void join(const float* stats, const float* sums, const float* sinks, T* y, int first_row, int rows,
                            int splits, const Sizes& sizes, float* weights) {
    const int row = blockIdx.y / sizes.kv, key_head = blockIdx.y % sizes.kv, group = sizes.h / sizes.kv;
    const int r = first_row + blockIdx.x, head = key_head * group + r / sizes.sq, lane = threadIdx.x % 32;
    const size_t part = (size_t(blockIdx.y) * rows + blockIdx.x) * splits;
    const float sink = sinks ? sinks[head] * LOG2_E : NONE;
    float largest = sink, total = 0.0f;
    for (int i = lane; i < splits; i += 32) largest = fmaxf(largest, stats[(part + i) * 2]);
    largest = warp_max(largest);
    for (int i = lane; i < splits; i += 32) {
        const float weight = exp2_fast(stats[(part + i) * 2] - largest);
        total += weight * stats[(part + i) * 2 + 1];
        if (threadIdx.x < 32) weights[i] = stats[(part + i) * 2 + 1] > 0.0f ? weight : 0.0f;
    }
    total = warp_sum(total) + exp2_fast(sink - largest);
    __syncthreads();
    for (int column = threadIdx.x; column < sizes.hd; column += blockDim.x) {
        float sum = 0.0f;
        // Blocks that see nothing have written no sums.
        for (int i = 0; i < splits; i++) {
            if (weights[i] > 0.0f) sum += weights[i] * sums[(part + i) * sizes.hd + column];
        }
        y[sizes.query(row, r % sizes.sq, head) + column] = store<T>(sum / total);
    }
}

} // namespace

#define FORWARD_BF16(W, M, WARPS, KEYS, STAGES, HELD, BLOCKS)                                                                \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_forward_bf16_##W, const bf16* q, const bf16* k, const bf16* v,               \
                  const uint32_t* starts, const uint32_t* bounds, const float* sinks, bf16* y, float* logsumexp, int sq,     \
                  int sk, int h, int kv, int hd, float inner, float factor) {                                                \
        SHARED(shared);                                                                                                      \
        forward<W, M, WARPS, KEYS, STAGES, HELD>(q, k, v, starts, bounds, sinks, y, logsumexp, Sizes{sq, sk, h, kv, hd},     \
                                                 inner, factor, shared);                                                     \
    }

FORWARD_BF16(16, 2, 4, 64, 2, true, 3)
FORWARD_BF16(32, 2, 4, 64, 2, false, 3)
FORWARD_BF16(64, 2, 4, 64, 2, true, 2)
FORWARD_BF16(96, 2, 4, 64, 1, false, 2)
FORWARD_BF16(128, 2, 4, 64, 1, false, 2)
FORWARD_BF16(192, 1, 8, 64, 1, false, 1)
FORWARD_BF16(256, 1, 4, 64, 1, false, 2)

#define BACKWARD_KEYS_BF16(NAME, W, M, WARPS, QUERIES, SUB, HELD, DK, DV, BLOCKS)                                            \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_backward_##NAME##_bf16_##W, const bf16* q, const bf16* k, const bf16* v,     \
                  const bf16* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, bf16* dk, bf16* dv,    \
                  int sq, int sk, int h, int kv, int hd, float inner, float factor, float scale, int stages) {               \
        SHARED(shared);                                                                                                      \
        backward_keys<W, M, WARPS, QUERIES, SUB, HELD, DK, DV>(q, k, v, dy, stats, starts, bounds, dk, dv,                   \
                                                               Sizes{sq, sk, h, kv, hd}, inner, factor, scale, stages,       \
                                                               shared);                                                      \
    }

BACKWARD_KEYS_BF16(keys, 16, 2, 4, 64, 32, false, true, true, 3)
BACKWARD_KEYS_BF16(keys, 32, 2, 4, 64, 32, true, true, true, 2)
BACKWARD_KEYS_BF16(keys, 64, 2, 4, 64, 32, false, true, true, 2)
BACKWARD_KEYS_BF16(keys, 96, 1, 8, 64, 64, false, true, true, 1)
BACKWARD_KEYS_BF16(keys, 128, 1, 8, 64, 64, false, true, true, 1)
BACKWARD_KEYS_BF16(dk, 192, 1, 4, 64, 64, false, true, false, 2)
BACKWARD_KEYS_BF16(dv, 192, 1, 4, 64, 64, false, false, true, 2)
BACKWARD_KEYS_BF16(dk, 256, 1, 4, 32, 32, false, true, false, 2)
BACKWARD_KEYS_BF16(dv, 256, 1, 4, 32, 32, false, false, true, 2)

#define BACKWARD_QUERIES_BF16(W, M, WARPS, KEYS, SUB, HELD, BLOCKS)                                                          \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_backward_queries_bf16_##W, const bf16* q, const bf16* k, const bf16* v,      \
                  const bf16* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, bf16* dq, int sq,      \
                  int sk, int h, int kv, int hd, float inner, float factor, float scale, int stages) {                       \
        SHARED(shared);                                                                                                      \
        backward_queries<W, M, WARPS, KEYS, SUB, HELD>(q, k, v, dy, stats, starts, bounds, dq, Sizes{sq, sk, h, kv, hd},     \
                                                       inner, factor, scale, stages, shared);                                \
    }

BACKWARD_QUERIES_BF16(16, 2, 4, 64, 32, true, 3)
BACKWARD_QUERIES_BF16(32, 2, 4, 64, 32, false, 3)
BACKWARD_QUERIES_BF16(64, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(96, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(128, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(192, 1, 4, 64, 64, false, 2)
BACKWARD_QUERIES_BF16(256, 1, 4, 32, 32, false, 2)

#define F32(W, R)                                                                                                            \
    KERNEL_BOUNDS(THREADS_F32, 1, attention_forward_f32_##W, const float* q, const float* k, const float* v,                 \
                  const uint32_t* starts, const uint32_t* bounds, const float* sinks, float* y, float* logsumexp, int sq,    \
                  int sk, int h, int kv, int hd, float inner, float factor) {                                                \
        SHARED(shared);                                                                                                      \
        forward_f32<W, R>(q, k, v, starts, bounds, sinks, y, logsumexp, Sizes{sq, sk, h, kv, hd}, inner, factor, shared);    \
    }                                                                                                                        \
    KERNEL_BOUNDS(THREADS_F32, 1, attention_backward_keys_f32_##W, const float* q, const float* k, const float* v,           \
                  const float* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, float* dk, float* dv, \
                  int sq, int sk, int h, int kv, int hd, float inner, float factor, float scale, int) {                      \
        SHARED(shared);                                                                                                      \
        backward_keys_f32<W, R>(q, k, v, dy, stats, starts, bounds, dk, dv, Sizes{sq, sk, h, kv, hd}, inner, factor, scale,  \
                                shared);                                                                                     \
    }                                                                                                                        \
    KERNEL_BOUNDS(THREADS_F32, 1, attention_backward_queries_f32_##W, const float* q, const float* k, const float* v,        \
                  const float* dy, const float* stats, const uint32_t* starts, const uint32_t* bounds, float* dq, int sq,    \
                  int sk, int h, int kv, int hd, float inner, float factor, float scale, int) {                              \
        SHARED(shared);                                                                                                      \
        backward_queries_f32<W, R>(q, k, v, dy, stats, starts, bounds, dq, Sizes{sq, sk, h, kv, hd}, inner, factor, scale,   \
                                   shared);                                                                                  \
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
