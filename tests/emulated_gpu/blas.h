// Matrix products on the emulated device.
#pragma once

#include <stdint.h>

namespace emulated {

// cuBLAS's numbers for dtypes, ways to compute, and results.
enum DataType { R_32F = 0, R_64F = 1, R_16BF = 14, R_8F_E4M3 = 28, R_8F_E5M2 = 29 };
enum ComputeType { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_16BF = 75, COMPUTE_32F_FAST_TF32 = 77 };
enum BlasResult { BLAS_SUCCESS = 0, BLAS_INVALID_VALUE = 7, BLAS_EXECUTION_FAILED = 13, BLAS_NOT_SUPPORTED = 15 };

// As it is stored: by columns, `ld` elements apart.
struct Matrix {
    void* address;
    int dtype;
    int64_t rows, cols, ld, batch_stride;
};

struct Product {
    int compute;
    bool transpose_a, transpose_b;
    float alpha, beta;
    Matrix a, b, c, d;
    int64_t batch;
    // Of 8-bit floats: what each row of op(a) and each column of op(b) is multiplied by, or all by the first; null: 1.
    const float *a_scales, *b_scales;
    bool scale_by_line;
};

// d = alpha op(a) op(b) + beta c. Refuses in words what the library would refuse, and what is not in device memory.
int multiply(const Product& product, void* stream);

} // namespace emulated
