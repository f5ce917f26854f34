// One pass of a stable radix sort: indices sorted by some bits of their keys, in two kernels.
//   digit = (key >> shift) % 2^bits; sort_count counts the digits of each chunk of keys, sort_scatter moves the chunk's
//   indices behind those with smaller digits, those of earlier chunks, and those before them in the chunk.
// Shapes     keys, sorted, order, from, positions (n); counts (blocks, 2^bits); offsets (n_offsets).
// Types      u32; all sums are of integers, so that the result is always the same.
// Launch     256 threads, grid = blocks = ceil(n / chunk), at least 1. Shared memory: sort_count 4 * 2^bits bytes,
//            sort_scatter 8 * 4 * 2^bits.
// Writes     with =: order, and where they are not null sorted (the keys), positions (order[positions[i]] = i), and
//            offsets (of the first digit that is not smaller; n behind the last).
// Requires   chunk % 256 == 0, bits <= 9.
// Reference  cpu.rs.
#include "kernel.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

KERNEL(sort_count, const uint32_t* keys, int64_t n, int shift, int bits, int64_t chunk, uint32_t* counts) {
    SHARED(shared);
    uint32_t* own = reinterpret_cast<uint32_t*>(shared);
    const int digits = 1 << bits;
    for (int digit = threadIdx.x; digit < digits; digit += THREADS) own[digit] = 0;
    __syncthreads();
    const int64_t first = blockIdx.x * chunk, end = first + chunk < n ? first + chunk : n;
    for (int64_t i = first + threadIdx.x; i < end; i += THREADS) atomicAdd(&own[(keys[i] >> shift) & (digits - 1)], 1u);
    __syncthreads();
    for (int digit = threadIdx.x; digit < digits; digit += THREADS) counts[blockIdx.x * (int64_t)digits + digit] = own[digit];
}

// `from`: what stands for each key in the order, the key's index if null.
KERNEL(sort_scatter, const uint32_t* keys, const uint32_t* from, const uint32_t* counts, int64_t n, int shift, int bits,
       int64_t chunk, uint32_t* sorted, uint32_t* order, uint32_t* positions, uint32_t* offsets, int64_t n_offsets) {
    SHARED(shared);
    __shared__ uint32_t scratch[32];
    // For each warp, where its next index with a digit goes; at first, how many of these it has.
    uint32_t* next = reinterpret_cast<uint32_t*>(shared);
    const int digits = 1 << bits;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t end = blockIdx.x * chunk + chunk < n ? blockIdx.x * chunk + chunk : n;
    const int64_t part = chunk / WARPS, warp_first = blockIdx.x * chunk + warp * part;
    const int64_t warp_end = warp_first + part < end ? warp_first + part : end;
    uint32_t* own = next + warp * digits;

    for (int i = threadIdx.x; i < WARPS * digits; i += THREADS) next[i] = 0;
    __syncthreads();
    for (int64_t i = warp_first + lane; i < warp_end; i += 32) atomicAdd(&own[(keys[i] >> shift) & (digits - 1)], 1u);
    __syncthreads();

    uint32_t smaller = 0; // How many have smaller digits than those of this round.
    for (int base = 0; base < digits; base += THREADS) {
        const int digit = base + threadIdx.x;
        uint32_t earlier = 0, all = 0;
        if (digit < digits) {
            for (unsigned block = 0; block < gridDim.x; block++) {
                const uint32_t count = counts[block * (int64_t)digits + digit];
                earlier += block < blockIdx.x ? count : 0;
                all += count;
            }
        }
        uint32_t total;
        const uint32_t start = smaller + block_scan(all, scratch, total);
        smaller += total;
        if (digit < digits) {
            if (offsets != nullptr && blockIdx.x == 0 && digit < n_offsets) offsets[digit] = start;
            uint32_t to = start + earlier;
            for (int w = 0; w < WARPS; w++) {
                const uint32_t count = next[w * digits + digit];
                next[w * digits + digit] = to;
                to += count;
            }
        }
    }
    if (offsets != nullptr && blockIdx.x == 0) {
        for (int64_t i = digits + threadIdx.x; i < n_offsets; i += THREADS) offsets[i] = n;
    }
    __syncthreads();

    for (int64_t round = warp_first; round < warp_end; round += 32) {
        const int64_t i = round + lane;
        const bool valid = i < warp_end;
        const uint32_t key = valid ? keys[i] : 0, digit = (key >> shift) & (digits - 1);
        const uint32_t peers = lanes_with(digit, bits, valid);
        const uint32_t before = __popc(peers & ((1u << lane) - 1));
        if (valid) {
            const uint32_t to = own[digit] + before, index = from != nullptr ? from[i] : (uint32_t)i;
            order[to] = index;
            if (sorted != nullptr) sorted[to] = key;
            if (positions != nullptr) positions[index] = to;
        }
        __syncwarp();
        if (valid && before == 0) own[digit] += __popc(peers);
        __syncwarp();
    }
}

// Where each of `n_offsets` keys would begin in n sorted keys. One thread each.
KERNEL(sort_offsets, const uint32_t* sorted, int64_t n, uint32_t* offsets, int64_t n_offsets) {
    const int64_t key = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (key >= n_offsets) return;
    int64_t first = 0, end = n;
    while (first < end) {
        const int64_t middle = (first + end) / 2;
        if (sorted[middle] < key) first = middle + 1;
        else end = middle;
    }
    offsets[key] = first;
}
