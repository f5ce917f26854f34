// Products on Hopper's tensor cores, which only code that is compiled for compute capability 9.0a can use.
//
// A warpgroup is four warps, the first with a number that 4 divides. Together they multiply 64 rows: warp w has rows 16 w to
// 16 w + 15 of the result, as mma_16x8x16 has them, and d[n] their columns 8 n to 8 n + 7. Right operands, and left ones that
// are not in registers, are read from shared memory while the threads go on: until product_wait says that a product is done,
// its operands stay as they are, and nobody looks at its result.
#pragma once

#include "kernel.cuh"

// Where a chunk of 8 numbers of a panel's row of 64 is.
__device__ inline int in_panel(int row, int chunk) { return row * 64 + (chunk ^ row % 8) * 8; }

#ifndef TITAN_EMULATE
// Dynamic shared memory for operands.
#define SHARED_PANELS(name) extern __shared__ __align__(1024) unsigned char name[]

// An operand in shared memory: panels that begin at a multiple of 1,024 bytes, of rows of 64 bf16 each, whose chunks of 8 are
// where in_panel says. With OVER_ROWS products sum over the rows of a panel, 16 at a time; without, along them.
template <bool OVER_ROWS> struct Operand {
    uint64_t bits;

    // The operand so many numbers later: 16 for the next product along rows, 16 rows for the next over them.
    __device__ Operand later(int numbers) const { return {bits + numbers / 8}; }
};

__device__ inline uint64_t operand_bits(const bf16* panel, int next_panel, int next_rows) {
    const uint64_t start = (uint64_t)__cvta_generic_to_shared(panel);
    return (start & 0x3ffff) >> 4 | uint64_t(next_panel * 2 / 16) << 16 | uint64_t(next_rows * 2 / 16) << 32 | uint64_t(1) << 62;
}

// 64 rows of a left operand, or N of a transposed right one.
__device__ inline Operand<false> along_rows(const bf16* panel) { return {operand_bits(panel, 8, 8 * 64)}; }

// A transposed left operand, or a right one, whose columns 64 to 127 are in the panel that is `next` numbers later.
__device__ inline Operand<true> over_rows(const bf16* panel, int next) { return {operand_bits(panel, next, 8 * 64)}; }

// Before the first product, and where threads have written to registers that one reads or adds to.
__device__ inline void product_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Ends a group of products.
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most the last N groups are under way.
template <int N> __device__ inline void product_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory"); }
// Behind product_wait: what uses these results stays behind it, which the compiler knows from nowhere else.
template <int N> __device__ inline void product_result(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// What this thread has written to shared memory, if a barrier follows, is what products read.
__device__ inline void shared_for_products() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

#define D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D32(n) D4(n), D4(n + 1), D4(n + 2), D4(n + 3), D4(n + 4), D4(n + 5), D4(n + 6), D4(n + 7)

#define PRODUCTS_64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// d = a b, or d += a b with `add`, of 64 x 16 by 16 x 64 numbers.
template <bool A, bool B> __device__ inline void product(float (&d)[8][4], Operand<A> a, Operand<B> b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PRODUCTS_64 "}, %32, %33, p, 1, 1, %35, %36;\n}\n"
        : D32(0)
        : "l"(a.bits), "l"(b.bits), "r"(int(add)), "n"(int(A)), "n"(int(B)));
}

// The same with a left operand in registers, as that of mma_16x8x16.
__device__ inline void product(float (&d)[8][4], const uint32_t (&a)[4], Operand<true> b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PRODUCTS_64 "}, {%32,%33,%34,%35}, %36, p, 1, 1, "
        "%38;\n}\n"
        : D32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(add)), "n"(1));
}

#define PRODUCTS_128 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d = a b, or d += a b with `add`, of 64 x 16 by 16 x 128 numbers.
template <bool A, bool B> __device__ inline void product(float (&d)[16][4], Operand<A> a, Operand<B> b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PRODUCTS_128 "}, %64, %65, p, 1, 1, %67, %68;\n}\n"
        : D32(0), D32(8)
        : "l"(a.bits), "l"(b.bits), "r"(int(add)), "n"(int(A)), "n"(int(B)));
}

// The same with a left operand in registers, as that of mma_16x8x16.
__device__ inline void product(float (&d)[16][4], const uint32_t (&a)[4], Operand<true> b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PRODUCTS_128 "}, {%64,%65,%66,%67}, %68, p, 1, 1, "
        "%70;\n}\n"
        : D32(0), D32(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(add)), "n"(1));
}

#undef D4
#undef D32
#undef PRODUCTS_64
#undef PRODUCTS_128
#endif
