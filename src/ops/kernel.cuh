// What the kernels of all ops share: conversions, reductions, tensor-core and copy instructions.
//
// Kernels are declared with KERNEL, dynamic shared memory with SHARED. Under TITAN_EMULATE the same sources are compiled
// for the host, where emulate.h gives each thread a fiber and each instruction its meaning: that is how they are tested on
// machines without a GPU. So nothing here or in a kernel uses inline assembly or warp intrinsics outside this file.
#pragma once

#ifdef TITAN_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>

// KERNEL(name, parameters...) { body }
#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
// The same for blocks of at most `threads`, of which `blocks` are to fit on a multiprocessor.
#define KERNEL_BOUNDS(threads, blocks, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
// Dynamic shared memory, as an array of bytes aligned to 16.
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

typedef __nv_bfloat16 bf16;

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float load(float x) { return x; }
__device__ inline float load(bf16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T store(float x);
template <> __device__ inline float store<float>(float x) { return x; }
template <> __device__ inline bf16 store<bf16>(float x) { return __float2bfloat16_rn(x); }

// N numbers that are moved at once: aligned to all of their bytes, at most 16.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// How many of N numbers one access moves.
template <typename T, int N> constexpr int PACKED = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);

// N numbers that lie side by side, as f32. Their address is aligned to 16, or to all their bytes if these are fewer.
template <int N, typename T> __device__ inline void load_all(float (&to)[N], const T* from) {
    constexpr int M = PACKED<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        const Pack<T, M> pack = *reinterpret_cast<const Pack<T, M>*>(from + i);
#pragma unroll
        for (int j = 0; j < M; j++) to[i + j] = load(pack.at[j]);
    }
}

// The same the other way.
template <int N, typename T> __device__ inline void store_all(T* to, const float (&from)[N]) {
    constexpr int M = PACKED<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        Pack<T, M> pack;
#pragma unroll
        for (int j = 0; j < M; j++) pack.at[j] = store<T>(from[i + j]);
        *reinterpret_cast<Pack<T, M>*>(to + i) = pack;
    }
}

// N numbers as they are.
template <int N, typename T> __device__ inline void copy_all(T* to, const T* from) {
    constexpr int M = PACKED<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) *reinterpret_cast<Pack<T, M>*>(to + i) = *reinterpret_cast<const Pack<T, M>*>(from + i);
}

__device__ inline float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

__device__ inline double warp_sum(double x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

__device__ inline unsigned long long warp_max(unsigned long long x) {
    for (int lane = 16; lane > 0; lane /= 2) {
        const unsigned long long other = __shfl_xor_sync(ALL_LANES, x, lane);
        x = other > x ? other : x;
    }
    return x;
}

// Those of the warp's valid lanes whose value, of so many bits, is this lane's: a bit each. All lanes call it.
__device__ inline uint32_t lanes_with(uint32_t value, int bits, bool valid) {
    uint32_t lanes = __ballot_sync(ALL_LANES, valid);
    for (int bit = 0; bit < bits; bit++) {
        const bool is_set = value >> bit & 1;
        const uint32_t set = __ballot_sync(ALL_LANES, is_set);
        lanes &= is_set ? set : ~set;
    }
    return lanes;
}

// The sum over a block of whole warps, in every thread, in an order that is always the same. `scratch`: 32 numbers of
// shared memory.
template <typename T> __device__ inline T block_sum(T x, T* scratch) {
    x = warp_sum(x);
    const int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    __syncthreads(); // What an earlier sum has left in scratch has been read.
    if (threadIdx.x % 32 == 0) scratch[warp] = x;
    __syncthreads();
    x = (threadIdx.x % 32) < warps ? scratch[threadIdx.x % 32] : T(0);
    return warp_sum(x);
}

// The sum over the threads before this one in a block of whole warps, for integers; `total` gets that over all threads.
// `scratch`: 32 numbers of shared memory.
template <typename T> __device__ inline T block_scan(T x, T* scratch, T& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    T until = x;
    for (int step = 1; step < 32; step *= 2) {
        const T before = __shfl_up_sync(ALL_LANES, until, step);
        if (lane >= step) until += before;
    }
    __syncthreads(); // What an earlier sum has left in scratch has been read.
    if (lane == 31) scratch[warp] = until;
    __syncthreads();
    T before = 0;
    total = 0;
    for (int w = 0; w < warps; w++) {
        before += w < warp ? scratch[w] : T(0);
        total += scratch[w];
    }
    return before + until - x;
}

#ifndef TITAN_EMULATE
// d += a b of 16 x 16 by 16 x 8 numbers, one warp. Lane l holds, with row = l / 4 and column = 2 (l % 4):
//   a[0] (row, column..), a[1] (row + 8, column..), a[2] (row, column + 8..), a[3] (row + 8, column + 8..), pairs of bf16;
//   b[0] (k = column.., n = row), b[1] (k = column + 8.., n = row);
//   d[0], d[1] (row, column..), d[2], d[3] (row + 8, column..).
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of bf16 from shared memory. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned
// to 16); afterwards r[i] of lane l holds numbers 2 (l % 4) and the next of row l / 4 of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// As ldmatrix_x4, each matrix transposed: r[i] of lane l holds column l / 4, rows 2 (l % 4) and the next.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Starts to copy 16 bytes to shared memory, zeros if not `valid`. Both addresses are aligned to 16; `from` may be
// any such number if not `valid`.
__device__ inline void copy_async_16(void* to, const void* from, bool valid) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(to);
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the last N groups are under way; a barrier then shows the others to all threads.
template <int N> __device__ inline void copy_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

// x, as if it were new: what is computed of it is computed where it is used, and takes no registers in a loop around that.
__device__ inline int renewed(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x, of which the device has an instruction.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, within one unit in the last place.
__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// Two numbers as the pair of bf16 that tensor-core instructions take; `low` is the first.
__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}
