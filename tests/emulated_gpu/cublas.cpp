// What candle calls of cuBLAS, on the emulated device.
#include "blas.h"

using namespace emulated;

namespace {

struct Handle {
    void* stream;
};

} // namespace

extern "C" {

int cublasCreate_v2(Handle** made) { return *made = new Handle(), BLAS_SUCCESS; }
int cublasDestroy_v2(Handle* handle) { return delete handle, BLAS_SUCCESS; }
int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, BLAS_SUCCESS; }
int cublasGetStream_v2(Handle* handle, void** stream) { return *stream = handle->stream, BLAS_SUCCESS; }
int cublasSetWorkspace_v2(Handle*, void*, unsigned long) { return BLAS_SUCCESS; }
int cublasSetMathMode(Handle*, int) { return BLAS_SUCCESS; }
int cublasSetPointerMode_v2(Handle*, int) { return BLAS_SUCCESS; }

int cublasGemmStridedBatchedEx(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                               const void* a, int a_type, int lda, long long a_stride, const void* b, int b_type, int ldb,
                               long long b_stride, const void* beta, void* c, int c_type, int ldc, long long c_stride, int batch,
                               int compute, int) {
    Product product{};
    product.compute = compute;
    product.transpose_a = transpose_a != 0;
    product.transpose_b = transpose_b != 0;
    product.alpha = *static_cast<const float*>(alpha);
    product.beta = *static_cast<const float*>(beta);
    product.a = {const_cast<void*>(a), a_type, transpose_a ? k : m, transpose_a ? m : k, lda, a_stride};
    product.b = {const_cast<void*>(b), b_type, transpose_b ? n : k, transpose_b ? k : n, ldb, b_stride};
    product.c = product.d = {c, c_type, m, n, ldc, c_stride};
    product.batch = batch;
    return multiply(product, handle->stream);
}
int cublasGemmEx(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a,
                 int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                 int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0,
                                      beta, c, c_type, ldc, 0, 1, compute, algorithm);
}
int cublasSgemmStridedBatched(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const float* alpha,
                              const float* a, int lda, long long a_stride, const float* b, int ldb, long long b_stride,
                              const float* beta, float* c, int ldc, long long c_stride, int batch) {
    return cublasGemmStridedBatchedEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, R_32F, lda, a_stride, b, R_32F, ldb,
                                      b_stride, beta, c, R_32F, ldc, c_stride, batch, COMPUTE_32F, 0);
}

} // extern "C"
