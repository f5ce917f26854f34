// Operands of products in 8-bit floats, and what comes out of them.
//   amax:    the largest magnitude of x: of all of it, of each row, of each column
//   cast:    codes = round(x scale),  scale = largest of the format / amax, as `scale` in mod.rs;  inverse = 1 / scale.
//            by_row as x lies, a scale for each row; by_column transposed, a scale for each column
//   finish:  y = c + sums a b
// Shapes     x (rows, cols); amax: whole (1), by_row (rows), by_column (cols), or null; cast: row_codes (rows, cols),
//            row_inverse (rows), column_codes (cols, padded), column_inverse (cols), codes of either or null; a step of 0 takes one
//            amax for all. finish: sums, c, y (rows, cols), a (rows), b (cols), c may be null or y. Contiguous.
// Types      x bf16 or f32; codes uint8 as the hardware has them, or bf16 of the same value; sums, amax, inverse, a, b f32;
//            c, y bf16 or f32.
// Launch     256 threads. amax: a block per 256 rows of 64 columns; shared 512 unsigned. cast: a block per 64 rows of 64 columns
//            of what is written; shared 64 x 68 codes. finish: groups of N = 8 or 1 in a row, a thread each.
// Writes     amax with atomicMax into zeroed memory, which gives the same in any order; the rest with =. Codes behind `rows` are
//            zeros.
// Requires   cols % 16 == 0, padded % 16 == 0; `aligned`: x to 16 bytes. For N = 8: sums, c, y aligned to 16.
// Reference  the tests in mod.rs.
#include "kernel.cuh"

struct E4m3 {
    static constexpr float largest = 448.0f, least_normal = 1.0f / 64, shift = 16384.0f, scale_of_nothing = float(448 / 1e-12);
    static constexpr int mantissa_bits = 3;
    static constexpr unsigned bias = 7;
};

struct E5m2 {
    static constexpr float largest = 57344.0f, least_normal = 1.0f / 16384, shift = 128.0f, scale_of_nothing = float(57344 / 1e-12);
    static constexpr int mantissa_bits = 2;
    static constexpr unsigned bias = 15;
};

template <typename F> __device__ inline float scale_of(float amax, bool power_of_two) {
    const float scale = amax <= 1e-12f ? F::scale_of_nothing : F::largest / amax;
    return power_of_two && scale == scale ? __uint_as_float(__float_as_uint(scale) & 0x7f800000u) : scale;
}

// The nearest number of the format, of two the even one, the largest one of what is larger: its bits as an f32 without a sign.
template <typename F> __device__ inline unsigned rounded(float x) {
    const float magnitude = fminf(fabsf(x), F::largest);
    // What lies below the least normal number is as far apart as what lies above it.
    if (magnitude < F::least_normal) return __float_as_uint((magnitude + F::shift) - F::shift);
    constexpr int dropped = 23 - F::mantissa_bits;
    const unsigned bits = __float_as_uint(magnitude);
    return (bits + ((1u << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) & (~0u << dropped);
}

template <typename F, typename C> struct Code;

template <typename F> struct Code<F, bf16> {
    __device__ static inline bf16 of(float x) {
        if (x != x) return store<bf16>(x);
        return store<bf16>(__uint_as_float(rounded<F>(x) | (__float_as_uint(x) & 0x80000000u)));
    }
};

template <typename F> struct Code<F, uint8_t> {
    __device__ static inline uint8_t of(float x) {
        const float magnitude = fminf(fabsf(x), F::largest);
        // The last bits of the sum count steps of the smallest number; the first normal number follows on the last below it.
        unsigned code = magnitude < F::least_normal
                            ? __float_as_uint(magnitude + F::shift) - __float_as_uint(F::shift)
                            : (rounded<F>(x) >> (23 - F::mantissa_bits)) - ((127 - F::bias) << F::mantissa_bits);
        if (x != x) code = 0x7f;
        return uint8_t(code | ((__float_as_uint(x) >> 24) & 0x80));
    }
};

template <typename X> __device__ inline void load_eight(float (&to)[8], const X* from, bool aligned) {
    if (aligned) return load_all(to, from);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = load(from[i]);
}

// Columns of a block, of which a thread has eight.
constexpr int TILE = 64;

template <typename X>
__device__ inline void float8_amax(const X* x, int64_t rows, int64_t cols, unsigned* whole, unsigned* by_row, unsigned* by_column,
                                   bool aligned) {
    SHARED(amax_scratch);
    unsigned* scratch = reinterpret_cast<unsigned*>(amax_scratch); // (warps, TILE)
    const int64_t across = (cols + TILE - 1) / TILE;
    const int64_t first_row = blockIdx.x / across * 256, first_column = blockIdx.x % across * TILE;
    const int64_t column = first_column + threadIdx.x % 8 * 8;
    unsigned of_columns[8] = {};
    for (int pass = 0; pass < 8; pass++) {
        const int64_t row = first_row + pass * 32 + threadIdx.x / 8;
        unsigned of_row = 0;
        if (row < rows && column < cols) {
            float values[8];
            load_eight(values, x + row * cols + column, aligned);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // The order of the bits is that of the numbers, NaN last.
                const unsigned bits = __float_as_uint(fabsf(values[i]));
                of_columns[i] = max(of_columns[i], bits);
                of_row = max(of_row, bits);
            }
        }
        if (by_row != nullptr) {
            for (int lane = 4; lane > 0; lane /= 2) of_row = max(of_row, __shfl_xor_sync(ALL_LANES, of_row, lane));
            if (threadIdx.x % 8 == 0 && row < rows) atomicMax(by_row + row, of_row);
        }
    }
    if (whole != nullptr) {
        unsigned most = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) most = max(most, of_columns[i]);
        for (int lane = 16; lane > 0; lane /= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, lane));
        if (threadIdx.x % 32 == 0) atomicMax(whole, most);
    }
    if (by_column == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        for (int lane = 16; lane >= 8; lane /= 2) of_columns[i] = max(of_columns[i], __shfl_xor_sync(ALL_LANES, of_columns[i], lane));
        if (threadIdx.x % 32 < 8) scratch[threadIdx.x / 32 * TILE + threadIdx.x % 8 * 8 + i] = of_columns[i];
    }
    __syncthreads();
    if (threadIdx.x >= TILE || first_column + threadIdx.x >= cols) return;
    unsigned most = 0;
    for (int warp = 0; warp < 8; warp++) most = max(most, scratch[warp * TILE + threadIdx.x]);
    atomicMax(by_column + first_column + threadIdx.x, most);
}

template <typename X, typename F, typename C>
__device__ inline void float8_cast(const X* x, int64_t rows, int64_t cols, bool power_of_two, const float* row_amax, int64_t row_step,
                                   C* row_codes, float* row_inverse, const float* column_amax, int64_t column_step, C* column_codes,
                                   float* column_inverse, int64_t padded, bool aligned) {
    SHARED(cast_scratch);
    constexpr int STRIDE = TILE + 4; // Rows of the tile begin in different banks.
    C* tile = reinterpret_cast<C*>(cast_scratch); // (columns, rows)
    const int64_t across = (cols + TILE - 1) / TILE;
    const int64_t first_row = blockIdx.x / across * TILE, first_column = blockIdx.x % across * TILE;
    const int64_t column = first_column + threadIdx.x % 8 * 8;
    float column_scales[8] = {};
    if (column_codes != nullptr && column < cols) {
#pragma unroll
        for (int i = 0; i < 8; i++) column_scales[i] = scale_of<F>(column_amax[(column + i) * column_step], power_of_two);
    }
    for (int pass = 0; pass < 2; pass++) {
        const int64_t own = pass * 32 + threadIdx.x / 8, row = first_row + own;
        const bool is_inside = row < rows && column < cols;
        float values[8] = {};
        if (is_inside) load_eight(values, x + row * cols + column, aligned);
        if (row_codes != nullptr && is_inside) {
            const float scale = scale_of<F>(row_amax[row * row_step], power_of_two);
            Pack<C, 8> pack;
#pragma unroll
            for (int i = 0; i < 8; i++) pack.at[i] = Code<F, C>::of(values[i] * scale);
            *reinterpret_cast<Pack<C, 8>*>(row_codes + row * cols + column) = pack;
            if (column == 0) row_inverse[row] = 1.0f / scale;
        }
        if (column_codes != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                tile[(threadIdx.x % 8 * 8 + i) * STRIDE + own] = row < rows ? Code<F, C>::of(values[i] * column_scales[i]) : C(0);
            }
        }
    }
    if (column_codes == nullptr) return;
    __syncthreads();
    const int64_t own = threadIdx.x / 4, part = threadIdx.x % 4 * 16, line = first_column + own;
    if (line >= cols || first_row + part >= padded) return;
#pragma unroll
    for (int half = 0; half < 16; half += 8) {
        Pack<C, 8> pack;
#pragma unroll
        for (int i = 0; i < 8; i++) pack.at[i] = tile[own * STRIDE + part + half + i];
        *reinterpret_cast<Pack<C, 8>*>(column_codes + line * padded + first_row + part + half) = pack;
    }
    if (first_row + part == 0) column_inverse[line] = 1.0f / scale_of<F>(column_amax[line * column_step], power_of_two);
}

template <typename Y, int N>
__device__ inline void float8_finish(const float* sums, const float* a, const float* b, const Y* c, Y* y, int64_t cols,
                                     int64_t groups) {
    const int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    const int64_t at = group * N, row = at / cols, column = at % cols;
    float values[N], others[N] = {};
    load_all(values, sums + at);
    if (c != nullptr) load_all(others, c + at);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = others[i] + values[i] * (a[row] * b[column + i]);
    store_all(y + at, values);
}

#define AMAX(NAME, X)                                                                                                    \
    KERNEL(float8_amax_##NAME, const X* x, int64_t rows, int64_t cols, unsigned* whole, unsigned* by_row,                \
           unsigned* by_column, int aligned) {                                                                           \
        float8_amax<X>(x, rows, cols, whole, by_row, by_column, aligned != 0);                                           \
    }
AMAX(bf16, bf16)
AMAX(f32, float)

#define CAST(NAME, X, F, C)                                                                                              \
    KERNEL(float8_cast_##NAME, const X* x, int64_t rows, int64_t cols, int power_of_two, const float* row_amax,          \
           int64_t row_step, C* row_codes, float* row_inverse, const float* column_amax, int64_t column_step,            \
           C* column_codes, float* column_inverse, int64_t padded, int aligned) {                                        \
        float8_cast<X, F, C>(x, rows, cols, power_of_two != 0, row_amax, row_step, row_codes, row_inverse, column_amax,  \
                             column_step, column_codes, column_inverse, padded, aligned != 0);                           \
    }
CAST(bf16_e4m3_codes, bf16, E4m3, uint8_t)
CAST(bf16_e5m2_codes, bf16, E5m2, uint8_t)
CAST(bf16_e4m3_bf16, bf16, E4m3, bf16)
CAST(bf16_e5m2_bf16, bf16, E5m2, bf16)
CAST(f32_e4m3_codes, float, E4m3, uint8_t)
CAST(f32_e5m2_codes, float, E5m2, uint8_t)
CAST(f32_e4m3_bf16, float, E4m3, bf16)
CAST(f32_e5m2_bf16, float, E5m2, bf16)

#define FINISH(NAME, Y, N)                                                                                               \
    KERNEL(float8_finish_##NAME, const float* sums, const float* a, const float* b, const Y* c, Y* y, int64_t cols,      \
           int64_t groups) {                                                                                             \
        float8_finish<Y, N>(sums, a, b, c, y, cols, groups);                                                             \
    }
FINISH(bf16_8, bf16, 8)
FINISH(bf16_1, bf16, 1)
FINISH(f32_8, float, 8)
FINISH(f32_1, float, 1)
