// Where rows lie, and what queries see.
#pragma once

#include "kernel.cuh"

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
// What a hidden score is, and what a maximum is before there is one: 2^(HIDDEN - NONE) is 0.
constexpr float HIDDEN = -1e30f, NONE = -1e20f;
// Queries to an entry of bounds.
constexpr int BOUND = 64;

struct Sizes {
    int sq, sk, h, kv, hd;
    // From one position to the next, in q and dq, and in k, v, dk and dv; unknown where nothing asks for their rows.
    int q_stride, k_stride;

    // The row of the batch of a block, where each has a head of one.
    __device__ int row(int heads) const { return blockIdx.z * (gridDim.x / heads) + blockIdx.x / heads; }
    __device__ int past() const { return sk - sq; }
    __device__ int key_head(int head) const { return head / (h / kv); }
    // Offset of row i of a head.
    __device__ size_t query(int row, int i, int head) const { return (size_t(row) * sq + i) * q_stride + head * hd; }
    __device__ size_t key(int row, int i, int head) const { return (size_t(row) * sk + i) * k_stride + head * hd; }
    // In what is contiguous: y and dy, and few queries.
    __device__ size_t result(int row, int i, int head) const { return ((size_t(row) * sq + i) * h + head) * hd; }
    __device__ int y_stride() const { return h * hd; }
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

// Which queries a block has, of tiles of so many, the last of all heads first; and which keys these see, from a multiple of
// `n_keys` on: some of them up to `common`, and all of them from there.
struct OfQueries {
    int row, head, query, first, end, common;
    Mask mask;

    __device__ OfQueries(const Sizes& sizes, const uint32_t* starts, const uint32_t* bounds, int n_queries, int n_keys)
        : row(sizes.row(sizes.h)), head(blockIdx.x % sizes.h), query((gridDim.y - 1 - blockIdx.y) * n_queries),
          mask{starts, bounds, row, sizes.sq} {
        first = mask.first(query, n_queries) / n_keys * n_keys;
        end = sizes.past() + min(query + n_queries, sizes.sq);
        common = mask.common(query, n_queries);
    }
};

// tanh(x), for inner = 2 log2(e) x / score.
__device__ inline float capped(float score, float inner) { return 1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(score * inner)); }

} // namespace
