// CUDA as kernels see it, on a CPU: what kernel.cuh includes under TITAN_EMULATE, so that the kernels of src/ops can be
// compiled by g++ and run by machine.cpp.
//
// Each thread of a block is a fiber. Fibers change where threads wait for each other, at barriers and at what the lanes of
// a warp do together, and nowhere else; blocks run one after another. An emulated kernel is more brittle than a real one
// on purpose: shared memory starts as NaNs, an asynchronous copy destroys its target at once and delivers when it is
// waited for, and lanes that do not come to where their warp meets end the process with their places.
//
// Not emulated: warps that spin until another thread writes, clusters, and the memory model (fibers see every write).
#pragma once

#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------------------------------------- declarations

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Of the one block that an OS thread runs at a time.
#define __shared__ static __thread

// ---------------------------------------------------------------------------------------------------------- vector types

struct uint3 { unsigned x, y, z; };
struct int3 { int x, y, z; };
struct float3 { float x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define TITAN_VECTORS(name, type)                                                     \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                          \
    struct alignas(sizeof(type) > 4 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
typedef unsigned char titan_uchar;
typedef unsigned short titan_ushort;
typedef unsigned titan_uint;
typedef unsigned long long titan_ulonglong;
TITAN_VECTORS(char, signed char)
TITAN_VECTORS(uchar, titan_uchar)
TITAN_VECTORS(short, short)
TITAN_VECTORS(ushort, titan_ushort)
TITAN_VECTORS(int, int)
TITAN_VECTORS(uint, titan_uint)
TITAN_VECTORS(longlong, long long)
TITAN_VECTORS(ulonglong, titan_ulonglong)
TITAN_VECTORS(float, float)
TITAN_VECTORS(double, double)
#undef TITAN_VECTORS
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ------------------------------------------------------------------------------------------------- what machine.cpp gives

struct __nv_bfloat16;

namespace emulated {

struct Identity {
    uint3 index;
    unsigned number, lane, warp;
    unsigned* n_syncs; // How often the warp came to __syncwarp in this block.
};

// Where an OS thread is in a launch.
struct Here {
    const Identity* thread; // Of the fiber that runs; null if there is none.
    uint3 block, block_dim, grid_dim;
    unsigned char* shared; // Dynamic shared memory.
};
extern __thread Here here __attribute__((tls_model("initial-exec")));

// What the lanes of a warp bring to an instruction that they execute together.
struct Meeting {
    unsigned lanes; // Those that came.
    unsigned long long result;
    unsigned long long brought[32];
};

// Waits until all lanes of `mask` that still run are at the same `what`; the last one calls `conclude`.
const Meeting& meet(unsigned mask, const char* what, unsigned long long brought, void (*conclude)(Meeting&), int line);

// Waits for all threads of the block that still run. Returns how many of them brought true.
int barrier(const char* what, bool brought, int line);

inline unsigned lane() { return here.thread->lane; }
[[noreturn]] void fail(const char* what, const void* address);
bool is_shared(const void* address, size_t bytes);
// For races.cpp.
void atomic_access(const void* address, size_t bytes);
void fence();
void copy_async(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait(int n_under_way);

// An operand of a warpgroup's product in shared memory: see hopper.cuh.
struct Panel {
    const __nv_bfloat16* start;
    int next_panel;
    bool over_rows;
};
// A product of 64 x 16 by 16 x `columns` numbers. With `in_registers`, those are this thread's part of the left operand.
struct GroupProduct {
    float* d;
    int columns;
    bool in_registers;
    uint32_t registers[4];
    Panel a, b;
    bool add;
    int group, line;
    void* caller;
};
void shared_for_products();
void product_begin();
void product(GroupProduct product);
void product_commit();
void product_wait(int n_under_way, int line);

// What a number that nothing has written looks like: a NaN as bf16, f32 and f64, and no index.
constexpr unsigned long long NOTHING = 0x7fff7fff7fff7fffull;

// A kernel by its name, for launches from outside.
struct Kernel {
    const char* name;
    void (*run)(const Kernel&, void** arguments);
    void (*function)(); // As `run` knows to call it.
    const size_t* argument_bytes;
    const bool* argument_is_pointer;
    int n_arguments;
    int max_threads;
};

void add_kernel(const Kernel& kernel);

template <typename... Arguments> struct Signature {
    static constexpr size_t bytes[] = {sizeof(Arguments)..., 0};
    static constexpr bool is_pointer[] = {std::is_pointer<Arguments>::value..., false};

    template <size_t... I> static void call(void (*function)(Arguments...), void** arguments, std::index_sequence<I...>) {
        function(*static_cast<std::remove_cv_t<Arguments>*>(arguments[I])...);
    }
    static void run(const Kernel& kernel, void** arguments) {
        call(reinterpret_cast<void (*)(Arguments...)>(kernel.function), arguments, std::index_sequence_for<Arguments...>());
    }
};

struct AddKernel {
    template <typename... Arguments> AddKernel(const char* name, void (*function)(Arguments...), int max_threads) {
        typedef Signature<Arguments...> S;
        add_kernel({name, &S::run, reinterpret_cast<void (*)()>(function), S::bytes, S::is_pointer,
                    int(sizeof...(Arguments)), max_threads});
    }
};

template <typename To, typename From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

} // namespace emulated

#define threadIdx (emulated::here.thread->index)
#define blockIdx (static_cast<const uint3&>(emulated::here.block))
#define blockDim (static_cast<const uint3&>(emulated::here.block_dim))
#define gridDim (static_cast<const uint3&>(emulated::here.grid_dim))
constexpr int warpSize = 32;

#define KERNEL(name, ...) KERNEL_BOUNDS(1024, 1, name, __VA_ARGS__)
#define KERNEL_BOUNDS(threads, blocks, name, ...)                                \
    static void name(__VA_ARGS__);                                               \
    static const emulated::AddKernel titan_add_##name(#name, &name, threads);    \
    static void name(__VA_ARGS__)
#define SHARED(name) unsigned char* const name = emulated::here.shared

// -------------------------------------------------------------------------------------------------------------- bfloat16

struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const unsigned u = emulated::bits<unsigned>(x);
        // The device makes one NaN of all NaNs.
        __x = x != x ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    __nv_bfloat16(double x) : __nv_bfloat16(to_odd(x)) {}
    __nv_bfloat16(int x) : __nv_bfloat16(double(x)) {}
    __nv_bfloat16(unsigned x) : __nv_bfloat16(double(x)) {}
    operator float() const { return emulated::bits<float>(unsigned(__x) << 16); }

  private:
    // As an f32 that says whether digits are lost, so that the next rounding is the only one.
    static float to_odd(double x) {
        float y = float(x);
        if (double(y) == x || x != x || isinf(y)) return y;
        if (fabs(double(y)) > fabs(x)) y = nextafterf(y, 0.0f);
        return emulated::bits<float>(emulated::bits<unsigned>(y) | 1);
    }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __double2bfloat16(double x) { return __nv_bfloat16(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.__x; }
inline short __bfloat16_as_short(__nv_bfloat16 x) { return short(x.__x); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return emulated::bits<__nv_bfloat16>(x); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__nv_bfloat16(x.x), __nv_bfloat16(x.y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__nv_bfloat16(x), __nv_bfloat16(x)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {float(x.x), float(x.y)}; }
inline float __low2float(__nv_bfloat162 x) { return float(x.x); }
inline float __high2float(__nv_bfloat162 x) { return float(x.y); }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 x) { return x.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 x) { return x.y; }

// Arithmetic in bf16 rounds once, from f32.
#define TITAN_BF16(name, symbol)                                                                                     \
    inline __nv_bfloat16 operator symbol(__nv_bfloat16 x, __nv_bfloat16 y) { return float(x) symbol float(y); }      \
    inline __nv_bfloat16& operator symbol##=(__nv_bfloat16& x, __nv_bfloat16 y) { return x = x symbol y; }           \
    inline __nv_bfloat16 __h##name(__nv_bfloat16 x, __nv_bfloat16 y) { return x symbol y; }                          \
    inline __nv_bfloat162 __h##name##2(__nv_bfloat162 x, __nv_bfloat162 y) { return {x.x symbol y.x, x.y symbol y.y}; }
TITAN_BF16(add, +)
TITAN_BF16(sub, -)
TITAN_BF16(mul, *)
TITAN_BF16(div, /)
#undef TITAN_BF16
inline __nv_bfloat16 operator-(__nv_bfloat16 x) { return -float(x); }
inline __nv_bfloat16 __hfma(__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return fma(double(float(x)), double(float(y)), double(float(z)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 x, __nv_bfloat162 y, __nv_bfloat162 z) {
    return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)};
}

// --------------------------------------------------------------------------------------------------------------- numbers

inline int __float_as_int(float x) { return emulated::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated::bits<double>(x); }
inline int __double2loint(double x) { return int(emulated::bits<unsigned long long>(x)); }
inline int __double2hiint(double x) { return int(emulated::bits<unsigned long long>(x) >> 32); }

#define TITAN_MIN_MAX(type)                                          \
    inline type min(type x, type y) { return y < x ? y : x; }        \
    inline type max(type x, type y) { return x < y ? y : x; }
TITAN_MIN_MAX(int)
TITAN_MIN_MAX(unsigned)
TITAN_MIN_MAX(long)
TITAN_MIN_MAX(unsigned long)
TITAN_MIN_MAX(long long)
TITAN_MIN_MAX(unsigned long long)
#undef TITAN_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }
inline unsigned umin(unsigned x, unsigned y) { return min(x, y); }
inline unsigned umax(unsigned x, unsigned y) { return max(x, y); }

inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float fdividef(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
// Not to be made one instruction with what comes before or after.
inline float titan_alone(float x) {
    asm volatile("" : "+x"(x));
    return x;
}
inline float __fadd_rn(float x, float y) { return titan_alone(titan_alone(x) + y); }
inline float __fsub_rn(float x, float y) { return titan_alone(titan_alone(x) - y); }
inline float __fmul_rn(float x, float y) { return titan_alone(x * y); }
inline float __saturatef(float x) { return x > 0.0f ? fminf(x, 1.0f) : 0.0f; }
inline float titan_exp10f(float x) { return float(pow(10.0, double(x))); }
// glibc has some of these names.
#define exp10f titan_exp10f
#define __exp10f titan_exp10f
#define __expf expf
#define __exp2f exp2f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __sincosf sincosf
inline float sinpif(float x) { return float(sin(M_PI * fmod(double(x), 2.0))); }
inline float cospif(float x) { return float(cos(M_PI * fmod(double(x), 2.0))); }

inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_ru(float x) { return int(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return unsigned(lrintf(x)); }
inline unsigned __float2uint_rz(float x) { return unsigned(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline double __uint2double_rn(unsigned x) { return double(x); }
inline float __double2float_rn(double x) { return float(x); }

inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }
inline int __mulhi(int x, int y) { return int((long long)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= ((x >> i) & 1u) << (31 - i);
    return y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((((unsigned long long)high << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long all = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned pick = selector >> (4 * i), byte = unsigned(all >> (8 * (pick & 7))) & 0xff;
        result |= (pick & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << (8 * i);
    }
    return result;
}

template <typename T> inline T __ldg(const T* from) { return *from; }
template <typename T> inline T __ldcg(const T* from) { return *from; }
template <typename T> inline T __ldcs(const T* from) { return *from; }
template <typename T> inline T __ldca(const T* from) { return *from; }
template <typename T> inline void __stcg(T* to, std::common_type_t<T> x) { *to = x; }
template <typename T> inline void __stcs(T* to, std::common_type_t<T> x) { *to = x; }
template <typename T> inline void __stwt(T* to, std::common_type_t<T> x) { *to = x; }

inline void __threadfence() { emulated::fence(); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
inline void __threadfence_system() { emulated::fence(); }
inline void __nanosleep(unsigned) {}
inline void __trap() { emulated::fail("the kernel trapped", __builtin_return_address(0)); }
inline void __prof_trigger(int) {}
#define __builtin_assume(condition) ((void)0)
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }

// --------------------------------------------------------------------------------------------------------------- barriers

inline void __syncthreads(int line = __builtin_LINE()) { emulated::barrier("__syncthreads", false, line); }
inline int __syncthreads_count(int x, int line = __builtin_LINE()) {
    return emulated::barrier("__syncthreads_count", x != 0, line);
}
inline int __syncthreads_or(int x, int line = __builtin_LINE()) {
    return emulated::barrier("__syncthreads_or", x != 0, line) > 0;
}
inline int __syncthreads_and(int x, int line = __builtin_LINE()) {
    return emulated::barrier("__syncthreads_and", x == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulated::meet(mask, "__syncwarp", 0, nullptr, line);
}

// --------------------------------------------------------------------------------------------------- what a warp exchanges

namespace emulated {

template <typename T> inline unsigned long long brought(T x) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "what lanes exchange has at most 8 bytes");
    unsigned long long all = 0;
    memcpy(&all, &x, sizeof(T));
    return all;
}

// What lane `from` brought; lanes outside of their segment of `width` lanes get their own.
template <typename T> inline T taken(const Meeting& meeting, unsigned from, bool inside) {
    if (!inside) from = lane();
    const unsigned long long all = (meeting.lanes >> from) & 1 ? meeting.brought[from] : NOTHING;
    T x;
    memcpy(&x, &all, sizeof(T));
    return x;
}

} // namespace emulated

template <typename T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32, int line = __builtin_LINE()) {
    const unsigned start = emulated::lane() & ~unsigned(width - 1);
    const emulated::Meeting& meeting = emulated::meet(mask, "__shfl_sync", emulated::brought(x), nullptr, line);
    return emulated::taken<T>(meeting, start | (unsigned(from) & unsigned(width - 1)), true);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T x, int flip, int width = 32, int line = __builtin_LINE()) {
    const unsigned last = emulated::lane() | unsigned(width - 1), from = emulated::lane() ^ unsigned(flip);
    const emulated::Meeting& meeting = emulated::meet(mask, "__shfl_xor_sync", emulated::brought(x), nullptr, line);
    return emulated::taken<T>(meeting, from & 31, from <= last);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const int first = int(emulated::lane() & ~unsigned(width - 1)), from = int(emulated::lane()) - int(by);
    const emulated::Meeting& meeting = emulated::meet(mask, "__shfl_up_sync", emulated::brought(x), nullptr, line);
    return emulated::taken<T>(meeting, unsigned(from) & 31, from >= first);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const unsigned last = emulated::lane() | unsigned(width - 1), from = emulated::lane() + by;
    const emulated::Meeting& meeting = emulated::meet(mask, "__shfl_down_sync", emulated::brought(x), nullptr, line);
    return emulated::taken<T>(meeting, from & 31, from <= last);
}

namespace emulated {

template <typename Fold> inline void fold(Meeting& meeting, unsigned long long start, Fold with) {
    meeting.result = start;
    for (int i = 0; i < 32; i++)
        if ((meeting.lanes >> i) & 1) meeting.result = with(meeting.result, meeting.brought[i]);
}
inline void ballot(Meeting& meeting) {
    meeting.result = 0;
    for (int i = 0; i < 32; i++)
        if ((meeting.lanes >> i) & 1) meeting.result |= (meeting.brought[i] & 1) << i;
}
inline void reduce_add(Meeting& meeting) {
    fold(meeting, 0, [](unsigned long long x, unsigned long long y) { return x + y; });
}
inline void reduce_min(Meeting& meeting) {
    fold(meeting, ~0ull, [](unsigned long long x, unsigned long long y) { return y < x ? y : x; });
}
inline void reduce_max(Meeting& meeting) {
    fold(meeting, 0, [](unsigned long long x, unsigned long long y) { return x < y ? y : x; });
}
inline void reduce_and(Meeting& meeting) {
    fold(meeting, ~0ull, [](unsigned long long x, unsigned long long y) { return x & y; });
}
inline void reduce_or(Meeting& meeting) {
    fold(meeting, 0, [](unsigned long long x, unsigned long long y) { return x | y; });
}
inline void reduce_xor(Meeting& meeting) {
    fold(meeting, 0, [](unsigned long long x, unsigned long long y) { return x ^ y; });
}
// In an order that unsigned numbers have.
inline unsigned long long ordered(int x) { return unsigned(x) ^ 0x80000000u; }
inline int from_ordered(unsigned long long x) { return int(unsigned(x) ^ 0x80000000u); }

} // namespace emulated

inline unsigned __ballot_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__ballot_sync", x != 0, emulated::ballot, line).result);
}
inline int __any_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    return emulated::meet(mask, "__any_sync", x != 0, emulated::ballot, line).result != 0;
}
inline int __all_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    return emulated::meet(mask, "__all_sync", x == 0, emulated::ballot, line).result == 0;
}
template <typename T> inline unsigned __match_any_sync(unsigned mask, T x, int line = __builtin_LINE()) {
    const emulated::Meeting& meeting = emulated::meet(mask, "__match_any_sync", emulated::brought(x), nullptr, line);
    unsigned same = 0;
    for (int i = 0; i < 32; i++)
        if ((meeting.lanes >> i) & 1 && meeting.brought[i] == emulated::brought(x)) same |= 1u << i;
    return same;
}
// A warp may have come apart as far as this.
inline unsigned __activemask() { return 1u << emulated::lane(); }

inline unsigned __reduce_add_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__reduce_add_sync", x, emulated::reduce_add, line).result);
}
inline int __reduce_add_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    return int(emulated::meet(mask, "__reduce_add_sync", unsigned(x), emulated::reduce_add, line).result);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__reduce_min_sync", x, emulated::reduce_min, line).result);
}
inline int __reduce_min_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    const auto least = emulated::meet(mask, "__reduce_min_sync", emulated::ordered(x), emulated::reduce_min, line).result;
    return emulated::from_ordered(least);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__reduce_max_sync", x, emulated::reduce_max, line).result);
}
inline int __reduce_max_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    const auto most = emulated::meet(mask, "__reduce_max_sync", emulated::ordered(x), emulated::reduce_max, line).result;
    return emulated::from_ordered(most);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__reduce_and_sync", x, emulated::reduce_and, line).result);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__reduce_or_sync", x, emulated::reduce_or, line).result);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
    return unsigned(emulated::meet(mask, "__reduce_xor_sync", x, emulated::reduce_xor, line).result);
}

// ---------------------------------------------------------------------------------------------------------------- atomics

namespace emulated {

template <typename T> struct BitsOf {
    typedef std::conditional_t<sizeof(T) == 8, unsigned long long,
                               std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>> type;
};

// Puts in place of *at what `change` makes of it; returns what was there.
template <typename T, typename Change> __attribute__((no_sanitize("thread"))) T atomically(T* at, Change change) {
    typedef typename BitsOf<T>::type Bits;
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) fail("an atomic of a misaligned address", __builtin_return_address(0));
    atomic_access(at, sizeof(T));
    Bits* const address = reinterpret_cast<Bits*>(at);
    Bits old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &old, bits<Bits>(T(change(bits<T>(old)))), false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
    return bits<T>(old);
}

} // namespace emulated

#define TITAN_ATOMIC_ADD(type) \
    inline type atomicAdd(type* at, type x) { return emulated::atomically(at, [=](type old) { return old + x; }); }
TITAN_ATOMIC_ADD(int)
TITAN_ATOMIC_ADD(unsigned)
TITAN_ATOMIC_ADD(unsigned long long)
TITAN_ATOMIC_ADD(float)
TITAN_ATOMIC_ADD(double)
TITAN_ATOMIC_ADD(__nv_bfloat16)
#undef TITAN_ATOMIC_ADD
inline __nv_bfloat162 atomicAdd(__nv_bfloat162* at, __nv_bfloat162 x) {
    return {atomicAdd(&at->x, x.x), atomicAdd(&at->y, x.y)};
}
#define TITAN_ATOMICS(type)                                                                                              \
    inline type atomicMax(type* at, type x) { return emulated::atomically(at, [=](type old) { return max(old, x); }); }  \
    inline type atomicMin(type* at, type x) { return emulated::atomically(at, [=](type old) { return min(old, x); }); }  \
    inline type atomicAnd(type* at, type x) { return emulated::atomically(at, [=](type old) { return old & x; }); }      \
    inline type atomicOr(type* at, type x) { return emulated::atomically(at, [=](type old) { return old | x; }); }       \
    inline type atomicXor(type* at, type x) { return emulated::atomically(at, [=](type old) { return old ^ x; }); }      \
    inline type atomicExch(type* at, type x) { return emulated::atomically(at, [=](type) { return x; }); }               \
    inline type atomicCAS(type* at, type expected, type x) {                                                             \
        return emulated::atomically(at, [=](type old) { return old == expected ? x : old; });                            \
    }
TITAN_ATOMICS(int)
TITAN_ATOMICS(unsigned)
TITAN_ATOMICS(unsigned long long)
#undef TITAN_ATOMICS
inline int atomicSub(int* at, int x) { return emulated::atomically(at, [=](int old) { return old - x; }); }
inline unsigned atomicSub(unsigned* at, unsigned x) { return emulated::atomically(at, [=](unsigned old) { return old - x; }); }
inline float atomicExch(float* at, float x) { return emulated::atomically(at, [=](float) { return x; }); }
inline unsigned atomicInc(unsigned* at, unsigned last) {
    return emulated::atomically(at, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// -------------------------------------------------------------------- what kernel.cuh writes as instructions of the device

namespace emulated {

struct MmaOperands {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};
void mma_16x8x16(Meeting& meeting);

struct LdmatrixOperands {
    uint32_t* r;
    const void* row;
};
void ldmatrix_x4(Meeting& meeting);
void ldmatrix_x4_trans(Meeting& meeting);

} // namespace emulated

inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
    const emulated::MmaOperands operands{d, a, b};
    emulated::meet(0xffffffffu, "mma_16x8x16", reinterpret_cast<uintptr_t>(&operands), emulated::mma_16x8x16, line);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    const emulated::LdmatrixOperands operands{r, row};
    emulated::meet(0xffffffffu, "ldmatrix_x4", reinterpret_cast<uintptr_t>(&operands), emulated::ldmatrix_x4, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    const emulated::LdmatrixOperands operands{r, row};
    emulated::meet(0xffffffffu, "ldmatrix_x4_trans", reinterpret_cast<uintptr_t>(&operands), emulated::ldmatrix_x4_trans,
                   line);
}
inline void copy_async_16(void* to, const void* from, bool valid) { emulated::copy_async(to, from, valid); }
inline void copy_async_commit() { emulated::copy_async_commit(); }
template <int N> inline void copy_async_wait() { emulated::copy_async_wait(N); }

#define SHARED_PANELS(name) SHARED(name)
template <bool OVER_ROWS> struct Operand {
    const __nv_bfloat16* start;
    int next_panel;

    Operand later(int numbers) const { return {start + numbers, next_panel}; }
    emulated::Panel panel() const { return {start, next_panel, OVER_ROWS}; }
};
inline Operand<false> along_rows(const __nv_bfloat16* panel) { return {panel, 0}; }
inline Operand<true> over_rows(const __nv_bfloat16* panel, int next) { return {panel, next}; }
template <int N, bool A, bool B>
inline void product(float (&d)[N][4], Operand<A> a, Operand<B> b, bool add, int line = __builtin_LINE()) {
    emulated::product({d[0], 8 * N, false, {}, a.panel(), b.panel(), add, 0, line, nullptr});
}
template <int N>
inline void product(float (&d)[N][4], const uint32_t (&a)[4], Operand<true> b, bool add, int line = __builtin_LINE()) {
    emulated::product({d[0], 8 * N, true, {a[0], a[1], a[2], a[3]}, {}, b.panel(), add, 0, line, nullptr});
}
inline void product_begin() { emulated::product_begin(); }
inline void product_commit() { emulated::product_commit(); }
template <int N> inline void product_wait(int line = __builtin_LINE()) { emulated::product_wait(N, line); }
template <int N> inline void product_result(float (&)[N][4]) {}
inline void shared_for_products() { emulated::shared_for_products(); }

inline int renewed(int x) { return x; }
inline float reciprocal_fast(float x) { return 1.0f / x; }

// Numbers too small for all of their digits are zeros to it.
inline float exp2_fast(float x) {
    const float y = exp2f(fabsf(x) < 1.17549435e-38f ? 0.0f : x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
