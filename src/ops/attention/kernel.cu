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
//            grid = (b * h, tiles). backward_keys: one block per key head and tile of keys, grid = (b * kv, tiles).
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
        for (int next = i / BOUND * BOUND + BOUND; next < min(i + n, sq); next += BOUND) first = min(first, bound(next, 0));
        return first;
    }

    // The first key that all of them see, as far as starts go.
    __device__ int common(int i, int n) const {
        if (!starts) return 0;
        int common = bound(i, 1);
        for (int next = i / BOUND * BOUND + BOUND; next < min(i + n, sq); next += BOUND) common = max(common, bound(next, 1));
        return common;
    }

    // The first key that any query from those around i on sees.
    __device__ int first_from(int i) const { return starts ? bound(i, 2) : 0; }
};

// tanh(x), for inner = 2 log2(e) x / score.
__device__ inline float capped(float score, float inner) { return 1.0f - 2.0f / (1.0f + exp2_fast(score * inner)); }

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
    const int chunk = threadIdx.x % LANES, first = threadIdx.x / LANES;
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
    const int lane = threadIdx.x % 32, at = place<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) d[m][n][i] = 0.0f;
#pragma unroll
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
    const int lane = threadIdx.x % 32, at = place<W>(lane % 16, lane / 16);
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
    const int lane = threadIdx.x % 32;
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
    const int lane = threadIdx.x % 32;
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

    const int row = blockIdx.x / sizes.h, head = blockIdx.x % sizes.h;
    const int query = (gridDim.y - 1 - blockIdx.y) * QUERIES, past = sizes.past(), hd = sizes.hd;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = query + warp * 16 * M; // the warp's first query
    const Mask mask{starts, bounds, row, sizes.sq};
    const int first = mask.first(query, QUERIES) / KEYS * KEYS, end = past + min(query + QUERIES, sizes.sq);
    const int common = mask.common(query, QUERIES);
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    k += sizes.key(row, 0, sizes.key_head(head));
    v += sizes.key(row, 0, sizes.key_head(head));

    load_tile<W, QUERIES, THREADS>(q_tile, q + sizes.query(row, query, head), q_stride, sizes.sq - query, hd);
    load_tile<W, KEYS, THREADS>(k_tiles, k + size_t(first) * k_stride, k_stride, sizes.sk - first, hd);
    if (STAGES == 2) load_tile<W, KEYS, THREADS>(v_tiles, v + size_t(first) * k_stride, k_stride, sizes.sk - first, hd);
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
        if (STAGES == 1) {
            load_tile<W, KEYS, THREADS>(v_tiles, v + size_t(key) * k_stride, k_stride, sizes.sk - key, hd);
        } else if (next < end) {
            const int other = (stage ^ 1) * TILE;
            load_tile<W, KEYS, THREADS>(k_tiles + other, k + size_t(next) * k_stride, k_stride, sizes.sk - next, hd);
            load_tile<W, KEYS, THREADS>(v_tiles + other, v + size_t(next) * k_stride, k_stride, sizes.sk - next, hd);
        }
        copy_async_commit();

        float s[M][KEYS / 8][4];
        multiply<W, M, KEYS>(s, queries, k_tiles + stage * TILE);
        if (STAGES == 1) {
            copy_async_wait<0>();
            __syncthreads(); // Values are here, and keys are done with.
            if (next < end) load_tile<W, KEYS, THREADS>(k_tiles, k + size_t(next) * k_stride, k_stride, sizes.sk - next, hd);
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
            sum = sum * shrink + (sinks ? exp2_fast(sink - new_max) : 0.0f);
            scale[m][r] = shrink / sum;
            const int i = own + 16 * m + 8 * r + lane / 4;
            if (lane % 4 == 0 && i < sizes.sq) {
                logsumexp[(size_t(row) * sizes.h + head) * sizes.sq + i] = new_max + log2f(sum);
            }
        }
    store_sums<W, M>(
        y + sizes.query(row, own, head), q_tile + warp * 16 * M * W, sums, scale, q_stride, sizes.sq - own, hd);
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

    const int row = blockIdx.x / sizes.kv, key_head = blockIdx.x % sizes.kv, group = sizes.h / sizes.kv;
    const int key = blockIdx.y * KEYS, past = sizes.past(), hd = sizes.hd;
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
    float scales[M][2];
    const size_t to = sizes.key(row, own, key_head);
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = scale;
    if constexpr (DK) store_sums<W, M>(dk + to, k_tile + warp * 16 * M * W, dk_sums, scales, k_stride, sizes.sk - own, hd);
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = 1.0f;
    if constexpr (DV) store_sums<W, M>(dv + to, k_tile + warp * 16 * M * W, dv_sums, scales, k_stride, sizes.sk - own, hd);
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

    const int row = blockIdx.x / sizes.h, head = blockIdx.x % sizes.h;
    const int query = (gridDim.y - 1 - blockIdx.y) * QUERIES, past = sizes.past(), hd = sizes.hd;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = query + warp * 16 * M; // the warp's first query
    const Mask mask{starts, bounds, row, sizes.sq};
    const int first = mask.first(query, QUERIES) / KEYS * KEYS, end = past + min(query + QUERIES, sizes.sq);
    const int common = mask.common(query, QUERIES);
    const int q_stride = sizes.h * hd, k_stride = sizes.kv * hd;
    k += sizes.key(row, 0, sizes.key_head(head));
    v += sizes.key(row, 0, sizes.key_head(head));
    const auto load = [&](int stage, int key) {
        bf16* const tile = tiles + stage * 2 * TILE;
        load_tile<W, KEYS, THREADS>(tile, k + size_t(key) * k_stride, k_stride, sizes.sk - key, hd);
        load_tile<W, KEYS, THREADS>(tile + TILE, v + size_t(key) * k_stride, k_stride, sizes.sk - key, hd);
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

} // namespace

#define FORWARD_BF16(W, M, WARPS, KEYS, STAGES, HELD, BLOCKS)                                                                \
    KERNEL_BOUNDS(32 * WARPS, BLOCKS, attention_forward_bf16_##W, const bf16* q, const bf16* k, const bf16* v,               \
                  const uint32_t* starts, const uint32_t* bounds, const float* sinks, bf16* y, float* logsumexp, int sq,     \
                  int sk, int h, int kv, int hd, float inner, float factor) {                                                \
        SHARED(shared);                                                                                                      \
        forward<W, M, WARPS, KEYS, STAGES, HELD>(q, k, v, starts, bounds, sinks, y, logsumexp, Sizes{sq, sk, h, kv, hd},     \
                                                 inner, factor, shared);                                                     \
    }

FORWARD_BF16(16, 2, 4, 64, 2, false, 4)
FORWARD_BF16(32, 2, 4, 64, 2, true, 3)
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

BACKWARD_KEYS_BF16(keys, 16, 2, 4, 64, 16, false, true, true, 4)
BACKWARD_KEYS_BF16(keys, 32, 2, 4, 64, 32, false, true, true, 3)
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

BACKWARD_QUERIES_BF16(16, 2, 4, 64, 32, false, 4)
BACKWARD_QUERIES_BF16(32, 2, 4, 64, 32, false, 3)
BACKWARD_QUERIES_BF16(64, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(96, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(128, 2, 4, 64, 32, false, 2)
BACKWARD_QUERIES_BF16(192, 1, 4, 64, 64, false, 2)
BACKWARD_QUERIES_BF16(256, 1, 4, 32, 32, false, 2)
