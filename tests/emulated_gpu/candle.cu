// Kernels of candle that titan may come to launch: filling, copying, casting and plain arithmetic, with candle's names and
// parameters. `info` holds the dimensions and then the strides of what is read, or is null if that is contiguous.
#include "emulate.h"

typedef __nv_bfloat16 bf16;

static size_t element(size_t i, size_t n_dims, const size_t* info, int operand = 0) {
    if (!info) return i;
    const size_t* strides = info + n_dims * size_t(1 + operand);
    size_t at = 0;
    for (size_t d = n_dims; d-- > 0; i /= info[d]) at += i % info[d] * strides[d];
    return at;
}

#define FOR_EACH(n) for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += blockDim.x * gridDim.x)

#define FILL(T, name)                                                                                                  \
    KERNEL(fill_##name, T* to, T value, size_t n) { FOR_EACH(n) to[i] = value; }                                       \
    KERNEL(const_set_##name, size_t n, size_t n_dims, const size_t* info, T value, T* to) {                            \
        FOR_EACH(n) to[element(i, n_dims, info)] = value;                                                              \
    }                                                                                                                  \
    KERNEL(copy2d_##name, const T* from, T* to, uint32_t rows, uint32_t cols, uint32_t from_row, uint32_t to_row) {    \
        FOR_EACH(size_t(rows) * cols) to[i / cols * to_row + i % cols] = from[i / cols * from_row + i % cols];         \
    }                                                                                                                  \
    KERNEL(ucopy_##name, size_t n, size_t n_dims, const size_t* info, const T* from, T* to) {                          \
        FOR_EACH(n) to[i] = from[element(i, n_dims, info)];                                                            \
    }
FILL(float, f32)
FILL(double, f64)
FILL(bf16, bf16)
FILL(uint8_t, u8)
FILL(uint32_t, u32)
FILL(int64_t, i64)

#define CAST(From, from_name, To, to_name)                                                                             \
    KERNEL(cast_##from_name##_##to_name, size_t n, size_t n_dims, const size_t* info, const From* from, To* to) {      \
        FOR_EACH(n) to[i] = To(from[element(i, n_dims, info)]);                                                        \
    }
CAST(float, f32, float, f32)
CAST(float, f32, double, f64)
CAST(float, f32, bf16, bf16)
CAST(float, f32, uint32_t, u32)
CAST(float, f32, uint8_t, u8)
CAST(double, f64, float, f32)
CAST(double, f64, double, f64)
CAST(double, f64, bf16, bf16)
CAST(double, f64, uint32_t, u32)
CAST(bf16, bf16, float, f32)
CAST(bf16, bf16, double, f64)
CAST(bf16, bf16, bf16, bf16)
CAST(bf16, bf16, uint32_t, u32)
CAST(uint32_t, u32, float, f32)
CAST(uint32_t, u32, double, f64)
CAST(uint32_t, u32, bf16, bf16)
CAST(uint32_t, u32, uint32_t, u32)
CAST(uint32_t, u32, uint8_t, u8)
CAST(uint32_t, u32, int64_t, i64)
CAST(int64_t, i64, float, f32)
CAST(int64_t, i64, uint32_t, u32)
CAST(uint8_t, u8, float, f32)
CAST(uint8_t, u8, uint32_t, u32)

#define AFFINE(T, name)                                                                                                \
    KERNEL(affine_##name, size_t n, size_t n_dims, const size_t* info, const T* from, T* to, T factor, T add) {        \
        FOR_EACH(n) to[i] = (from ? from[element(i, n_dims, info)] : to[i]) * factor + add;                            \
    }
AFFINE(float, f32)
AFFINE(double, f64)
AFFINE(bf16, bf16)
AFFINE(uint32_t, u32)

#define UNARY(T, name, op, expression)                                                                                 \
    KERNEL(u##op##_##name, size_t n, size_t n_dims, const size_t* info, const T* from, T* to) {                        \
        FOR_EACH(n) {                                                                                                  \
            const T x = from ? from[element(i, n_dims, info)] : to[i];                                                 \
            to[i] = T(expression);                                                                                     \
        }                                                                                                              \
    }
#define UNARY_OPS(T, name)               \
    UNARY(T, name, neg, -x)              \
    UNARY(T, name, recip, T(1) / x)      \
    UNARY(T, name, exp, expf(float(x)))  \
    UNARY(T, name, log, logf(float(x)))  \
    UNARY(T, name, sin, sinf(float(x)))  \
    UNARY(T, name, cos, cosf(float(x)))  \
    UNARY(T, name, tanh, tanhf(float(x))) \
    UNARY(T, name, abs, fabsf(float(x))) \
    UNARY(T, name, sqr, x * x)           \
    UNARY(T, name, sqrt, sqrtf(float(x)))
UNARY_OPS(float, f32)
UNARY_OPS(bf16, bf16)

#define BINARY(T, name, op, expression)                                                                                \
    KERNEL(b##op##_##name, size_t n, size_t n_dims, const size_t* info, const T* left, const T* right, T* to) {        \
        FOR_EACH(n) {                                                                                                  \
            const T x = left[element(i, n_dims, info)], y = right[element(i, n_dims, info, 1)];                        \
            to[i] = T(expression);                                                                                     \
        }                                                                                                              \
    }
#define BINARY_OPS(T, name)                        \
    BINARY(T, name, add, x + y)                    \
    BINARY(T, name, sub, x - y)                    \
    BINARY(T, name, mul, x * y)                    \
    BINARY(T, name, div, x / y)                    \
    BINARY(T, name, maximum, float(x) < float(y) ? y : x) \
    BINARY(T, name, minimum, float(y) < float(x) ? y : x)
BINARY_OPS(float, f32)
BINARY_OPS(bf16, bf16)

#define INDEX_SELECT(T, name)                                                                                          \
    KERNEL(is_u32_##name, size_t n, size_t n_dims, const size_t* info, const uint32_t* ids, const T* from, T* to,      \
           size_t left, size_t from_size, size_t n_ids, size_t right) {                                                \
        FOR_EACH(n) {                                                                                                  \
            const uint32_t id = ids[i / right % n_ids];                                                                \
            if (id == 0xffffffffu) {                                                                                   \
                to[i] = T(0);                                                                                          \
                continue;                                                                                              \
            }                                                                                                          \
            assert(id < from_size && left > 0);                                                                        \
            to[i] = from[element(i / (n_ids * right) * (from_size * right) + id * right + i % right, n_dims, info)];   \
        }                                                                                                              \
    }
INDEX_SELECT(float, f32)
INDEX_SELECT(bf16, bf16)
INDEX_SELECT(uint32_t, u32)
