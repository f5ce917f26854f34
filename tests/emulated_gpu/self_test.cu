// Kernels that put each thing that emulate.h gives to use, for self_test.cpp.
#include "hopper.cuh"
#include "kernel.cuh"

KERNEL(test_indices, uint32_t* out) {
    const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block << 16 | thread;
}

KERNEL(test_block_sum, const float* x, float* out, int64_t n) {
    __shared__ float scratch[32];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    for (int repeat = 0; repeat < 3; repeat++) {
        const float all = block_sum(sum, scratch);
        out[repeat * blockDim.x + threadIdx.x] = all;
    }
}

// The matrices a (16, 16), b (16, 8) and d (16, 8) in rows.
KERNEL(test_mma, const bf16* a, const bf16* b, float* d) {
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
    const auto pair = [](bf16 low, bf16 high) { return pack_bf16(load(low), load(high)); };
    uint32_t fragment_a[4], fragment_b[2];
    for (int i = 0; i < 4; i++) {
        const bf16* at = a + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
        fragment_a[i] = pair(at[0], at[1]);
    }
    for (int i = 0; i < 2; i++) fragment_b[i] = pair(b[(column + 8 * i) * 8 + row], b[(column + 8 * i + 1) * 8 + row]);
    float sums[4] = {1, 2, 3, 4};
    mma_16x8x16(sums, fragment_a, fragment_b);
    for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

// With `what` 0: d = 1 + a b^T of a (64, 128) and b (N, 128); 1 and 2: d = a b and a^T b of a (64, 64) and b (64, N), a by way of
// registers and of shared memory.
template <int N> __device__ inline void products(const bf16* a, const bf16* b, float* d, int what) {
    SHARED_PANELS(bytes);
    const int width_a = what == 0 ? 128 : 64, rows_b = what == 0 ? N : 64, width_b = what == 0 ? 128 : N;
    bf16* const panels_a = reinterpret_cast<bf16*>(bytes);
    bf16* const panels_b = panels_a + 64 * 128;
    const auto fill = [](bf16* panels, const bf16* from, int rows, int width) {
        for (int i = threadIdx.x; i < rows * width; i += 128) {
            const int row = i / width, column = i % width;
            panels[column / 64 * rows * 64 + in_panel(row, column % 64 / 8) + column % 8] = from[i];
        }
    };
    fill(panels_a, a, 64, width_a);
    fill(panels_b, b, rows_b, width_b);
    shared_for_products();
    __syncthreads();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[N / 8][4];
    uint32_t registers[4][4];
    for (int n = 0; n < N / 8; n++)
        for (int i = 0; i < 4; i++) sums[n][i] = 1;
    for (int k = 0; k < 4; k++) ldmatrix_x4(registers[k], panels_a + in_panel(16 * warp + lane % 16, 2 * k + lane / 16));
    product_begin();
    for (int k = 0; k < width_a / 16; k++) {
        const auto right = over_rows(panels_b, 64 * 64).later(k * 16 * 64);
        if (what == 0) {
            product(sums, along_rows(panels_a).later(k / 4 * 64 * 64 + k % 4 * 16),
                    along_rows(panels_b).later(k / 4 * N * 64 + k % 4 * 16), true);
        } else if (what == 1) {
            product(sums, registers[k], right, k > 0);
        } else {
            product(sums, over_rows(panels_a, 0).later(k * 16 * 64), right, k > 0);
        }
    }
    product_commit();
    product_wait<0>();
    for (int n = 0; n < N / 8; n++)
        for (int i = 0; i < 4; i++) d[(16 * warp + lane / 4 + i / 2 * 8) * N + 8 * n + lane % 4 * 2 + i % 2] = sums[n][i];
}
KERNEL(test_products_64, const bf16* a, const bf16* b, float* d, int what) { products<64>(a, b, d, what); }
KERNEL(test_products_128, const bf16* a, const bf16* b, float* d, int what) { products<128>(a, b, d, what); }

// A product of what has been copied, but not shown to it.
KERNEL(test_product_unshown, const bf16* from) {
    SHARED_PANELS(bytes);
    bf16* const to = reinterpret_cast<bf16*>(bytes);
    for (int row = threadIdx.x / 8; row < 64; row += 16)
        copy_async_16(to + in_panel(row, threadIdx.x % 8), from + row * 64 + threadIdx.x % 8 * 8, true);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    float sums[8][4];
    product_begin();
    product(sums, along_rows(to), along_rows(to), false);
    product_commit();
    product_wait<0>();
}

// A product's result read before it is waited for.
KERNEL(test_product_in_haste, float* d) {
    SHARED_PANELS(bytes);
    const auto panel = along_rows(reinterpret_cast<bf16*>(bytes));
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) reinterpret_cast<bf16*>(bytes)[i] = 0;
    shared_for_products();
    __syncthreads();
    float sums[8][4] = {};
    product_begin();
    product(sums, panel, panel, false);
    product_commit();
    d[threadIdx.x] = sums[0][0];
    product_wait<0>();
}

// Four matrices one after another; what each lane gets, and what it gets of their transposes.
KERNEL(test_ldmatrix, const bf16* matrices, uint32_t* straight, uint32_t* transposed) {
    SHARED(bytes);
    bf16* shared = reinterpret_cast<bf16*>(bytes);
    for (int i = threadIdx.x; i < 256; i += 32) shared[i] = matrices[i];
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, shared + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) straight[threadIdx.x * 4 + i] = r[i];
    ldmatrix_x4_trans(r, shared + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) transposed[threadIdx.x * 4 + i] = r[i];
}

// One copy for each thread, in two groups; what shared memory holds after each wait.
KERNEL(test_copies, const uint4* from, uint4* early, uint4* first, uint4* second) {
    SHARED(bytes);
    uint4* shared = reinterpret_cast<uint4*>(bytes);
    const int i = threadIdx.x, n = blockDim.x;
    copy_async_16(&shared[i], &from[i], i % 3 != 0);
    copy_async_commit();
    copy_async_16(&shared[n + i], &from[n + i], true);
    copy_async_commit();
    early[i] = shared[i];
    copy_async_wait<1>();
    first[i] = shared[i];
    first[n + i] = shared[n + i];
    copy_async_wait<0>();
    second[i] = shared[n + i];
}

KERNEL(test_shuffles, uint32_t* out) {
    const uint32_t lane = threadIdx.x, x = lane * lane + 5;
    uint32_t* at = out + lane;
    at[0 * 32] = __shfl_sync(ALL_LANES, x, lane * 7);
    at[1 * 32] = __shfl_xor_sync(ALL_LANES, x, 9);
    at[2 * 32] = __shfl_up_sync(ALL_LANES, x, 3);
    at[3 * 32] = __shfl_down_sync(ALL_LANES, x, 3);
    at[4 * 32] = __shfl_sync(ALL_LANES, x, 5, 8);
    at[5 * 32] = __shfl_xor_sync(ALL_LANES, x, 12, 8);
    at[6 * 32] = __shfl_up_sync(ALL_LANES, x, 2, 8);
    at[7 * 32] = __shfl_down_sync(ALL_LANES, x, 2, 8);
    at[8 * 32] = (uint32_t)(__shfl_xor_sync(ALL_LANES, (double)x * 4294967296.0, 1) / 4294967296.0);
    at[9 * 32] = __ballot_sync(ALL_LANES, lane % 5 == 0);
    at[10 * 32] = __any_sync(ALL_LANES, lane == 31) + 2 * __any_sync(ALL_LANES, lane == 32);
    at[11 * 32] = __all_sync(ALL_LANES, lane < 32) + 2 * __all_sync(ALL_LANES, lane < 31);
    at[12 * 32] = __match_any_sync(ALL_LANES, lane / 4);
    at[13 * 32] = __reduce_add_sync(ALL_LANES, x);
    at[14 * 32] = __reduce_max_sync(ALL_LANES, (int)lane - 40);
    at[15 * 32] = __reduce_min_sync(ALL_LANES, (int)lane - 7);
    // Warps that come apart, each part with its own mask.
    const unsigned mask = lane < 20 ? 0x000fffffu : 0xfff00000u;
    uint32_t sum;
    if (lane < 20) sum = __reduce_add_sync(mask, lane);
    else sum = __reduce_add_sync(mask, 1000 + lane);
    at[16 * 32] = sum;
}

// Lanes that have ended are not waited for.
KERNEL(test_early_ends, uint32_t* out) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    out[threadIdx.x] = __reduce_add_sync(ALL_LANES, threadIdx.x) + __syncthreads_count(threadIdx.x % 2);
}

KERNEL(test_atomics, float* f, double* d, int* i, unsigned* u, unsigned long long* l) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
    atomicAdd(i, x);
    atomicMax(i + 1, x);
    atomicMin(i + 2, -x);
    atomicAdd(u, 3u);
    atomicOr(u + 1, 1u << (x % 32));
    atomicAdd(l, 1ull << 33);
    if (atomicCAS(u + 2, 0u, 7u) == 0u) atomicExch(u + 3, (unsigned)x + 1);
}

KERNEL(test_numbers, const float* x, bf16* rounded, float* fast, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        rounded[i] = store<bf16>(x[i]);
        fast[i] = exp2_fast(x[i]);
    }
}

// What no thread has written, of both kinds of shared memory and of the device's.
KERNEL(test_nothing, float* out, const float* unwritten) {
    __shared__ float own[64];
    SHARED(bytes);
    out[blockIdx.x * 64 + threadIdx.x] = own[threadIdx.x] + reinterpret_cast<float*>(bytes)[threadIdx.x] + unwritten[threadIdx.x];
    __syncthreads();
    own[threadIdx.x] = reinterpret_cast<float*>(bytes)[threadIdx.x] = 1;
}

// Each thread passes its number on through shared memory; with `is_right` it waits before others read.
KERNEL(test_race, uint32_t* out, int is_right) {
    __shared__ uint32_t numbers[64];
    numbers[threadIdx.x] = threadIdx.x;
    if (is_right) __syncthreads();
    out[threadIdx.x] = numbers[(threadIdx.x + 40) % 64];
}

// What nothing orders, by number; the even ones are ordered.
KERNEL(test_order, int which, float* x, float* y) {
    __shared__ float shared[64];
    SHARED(bytes);
    const int i = threadIdx.x, block = blockIdx.x;
    shared[i] = 0;
    reinterpret_cast<float4*>(bytes)[i] = float4();
    __syncthreads();
    switch (which) {
    case 0: // Within a warp.
        shared[i] = x[i];
        __syncwarp();
        y[i + 64 * block] = shared[i ^ 1];
        break;
    case 1:
        shared[i] = x[i];
        y[i + 64 * block] = shared[i ^ 1];
        break;
    case 2: // Within a block: written, read, and written again.
        for (int round = 0; round < 2; round++) {
            shared[i] = x[i];
            __syncthreads();
            y[i + 64 * block] = shared[63 - i];
            __syncthreads();
        }
        break;
    case 3:
        for (int round = 0; round < 2; round++) {
            shared[i] = x[i];
            __syncthreads();
            y[i + 64 * block] = shared[63 - i];
        }
        break;
    case 4: atomicAdd(y, 1.0f); break; // Between blocks.
    case 5: y[i] += 1; break;
    case 6: y[i + 64 * block] = x[i] + x[63 - i]; break;
    case 7: y[i + 64 * (block + 1) % 128] = y[i + 64 * block]; break;
    case 8: // The last block to come sums up what the others wrote.
        y[i + 64 * block] = x[i];
        __threadfence();
        __syncthreads();
        if (i == 0) shared[0] = atomicAdd(&y[128], 1.0f);
        __syncthreads();
        if (shared[0] == gridDim.x - 1) y[129 + i] = y[i] + y[64 + i];
        break;
    case 9: // Where a copy arrives.
    case 10: {
        float4* packs = reinterpret_cast<float4*>(bytes);
        copy_async_16(&packs[i], reinterpret_cast<float4*>(x) + i % 16, true);
        copy_async_commit();
        copy_async_wait<0>();
        if (which == 10) __syncthreads();
        y[i + 64 * block] = packs[63 - i].x;
        break;
    }
    case 11: atomicAdd(&shared[0], 1.0f), y[i + 64 * block] = shared[0]; break;
    case 12: // Words, and their bytes.
        reinterpret_cast<unsigned char*>(shared)[i] = i;
        __syncthreads();
        y[i + 64 * block] = shared[i / 4];
        break;
    case 13:
        shared[i] = 0;
        reinterpret_cast<unsigned char*>(shared)[(4 * i + 7) % 256] = i;
        break;
    }
}

// Reads of what nothing has written, by number, and of what something has; `x` is written, `y` and `halves` are not.
KERNEL(test_unwritten, int which, const float* x, float* y, bf16* halves) {
    __shared__ float shared[64];
    const int i = threadIdx.x;
    switch (which) {
    case 0: y[i] = x[i], y[i] += 1; break; // The device's.
    case 1: y[i] += x[i]; break;
    case 2: y[i] = x[i], atomicAdd(&y[i], x[i]); break;
    case 3: atomicAdd(&y[i], x[i]); break;
    case 4: halves[2 * i] = 1, y[i] = float(halves[2 * i]); break; // One half of a word.
    case 5: halves[2 * i] = 1, y[i] = float(halves[2 * i + 1]); break;
    case 6: shared[i] = NAN, y[i] = shared[i], y[i] += 1; break; // Shared by a block, and what the block before has left.
    case 7:
        if (blockIdx.x == 0) shared[i] = 1;
        y[i + 64 * blockIdx.x] = shared[i];
        break;
    case 8: // NaNs that are written.
        halves[i] = __ushort_as_bfloat16(0x7fff), y[i] = float(halves[i]);
        break;
    case 9: { // By a copy.
        SHARED(bytes);
        copy_async_16(bytes + 16 * i, reinterpret_cast<const float4*>(y) + i, true);
        copy_async_commit();
        copy_async_wait<0>();
        break;
    }
    }
}

// What a kernel must not do, by number.
KERNEL(test_fault, int which, float* x, int n) {
    __shared__ float small[8];
    SHARED(bytes);
    uint32_t r[4];
    switch (which) {
    case 0: if (threadIdx.x == 0) x[n] = 1; break;                                    // Behind the end, in its page.
    case 1: x[n + 4096] = 1; break;                                                   // Far behind it.
    case 2: if (threadIdx.x == 0) x[-1] = 1; break;
    case 3: if (threadIdx.x != 5) __syncthreads(); else __shfl_sync(ALL_LANES, 1, 0); break;
    case 4: if (threadIdx.x < 8) __syncwarp(); else __syncthreads(); break;
    case 5:
        if (threadIdx.x < 32) __syncthreads();
        else __syncthreads();
        break;
    case 6: ldmatrix_x4(r, bytes + threadIdx.x * 16 + 8); break;
    case 7: ldmatrix_x4(r, x); break;
    case 8: copy_async_16(bytes, x + 1, true); break;
    case 9: *reinterpret_cast<float4*>(x + 1) = float4(); break;                     // Misaligned.
    case 10: small[n + threadIdx.x] = 1; break;
    case 11: __syncwarp(0xfffffffeu); break;
    case 12: bytes[n] = 1; break;
    case 13: __trap(); break;
    }
    if (which == 10) x[0] = small[0];
}

KERNEL_BOUNDS(64, 2, test_bounds, int* out) { out[threadIdx.x] = blockIdx.x; }

KERNEL(test_increment, float* x, float by) { x[threadIdx.x] += by; }
