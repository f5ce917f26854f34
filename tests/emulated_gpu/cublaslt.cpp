// cuBLASLt on the emulated device, as far as titan calls it: products of bf16, f32 and 8-bit float matrices with sums of f32.
#include "blas.h"

#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "machine.h"
#include "races.h"

namespace emulated {

namespace {

int refuse(int result, const char* why) {
    fprintf(stderr, "emulated GPU: a product of matrices: %s\n", why);
    return result;
}

bool is_float8(int dtype) { return dtype == R_8F_E4M3 || dtype == R_8F_E5M2; }

size_t bytes_of(int dtype) { return is_float8(dtype) ? 1 : dtype == R_16BF ? 2 : dtype == R_32F ? 4 : 8; }

// An 8-bit float, whose exponent has so many bits.
float float8(unsigned char code, int exponent_bits) {
    const int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = code & ((1 << mantissa_bits) - 1);
    const float fraction = float(mantissa) / float(1 << mantissa_bits);
    float x = exponent ? ldexpf(1 + fraction, exponent - bias) : ldexpf(fraction, 1 - bias);
    // e4m3 has one NaN and no infinity; e5m2 is as IEEE has it.
    if (exponent_bits == 4 && (code & 0x7f) == 0x7f) x = NAN;
    if (exponent_bits == 5 && exponent == 31) x = mantissa ? NAN : INFINITY;
    return code & 0x80 ? -x : x;
}

float get(const Matrix& of, int64_t index) {
    if (is_float8(of.dtype)) return float8(static_cast<unsigned char*>(of.address)[index], of.dtype == R_8F_E4M3 ? 4 : 5);
    if (of.dtype == R_16BF) return float(static_cast<__nv_bfloat16*>(of.address)[index]);
    return static_cast<float*>(of.address)[index];
}

void put(const Matrix& of, int64_t index, float x) {
    if (of.dtype == R_16BF) static_cast<__nv_bfloat16*>(of.address)[index] = __nv_bfloat16(x);
    else static_cast<float*>(of.address)[index] = x;
}

// As tensor cores take it: bf16, or f32 with fewer digits.
float rounded(float x, int compute) {
    if (compute == COMPUTE_32F_FAST_16BF) return float(__nv_bfloat16(x));
    if (compute != COMPUTE_32F_FAST_TF32 || !isfinite(x)) return x;
    return bits<float>((bits<unsigned>(x) + 0xfffu + ((bits<unsigned>(x) >> 13) & 1)) & ~0x1fffu);
}

// Sums are made for as many rows and columns at a time.
constexpr int64_t ROWS = 32, COLS = 4;

// Element (i, l) of op(of), which is `n` by k, at [(i / width * k + l) * width + i % width]; zeros behind the last i.
std::vector<float> panels(const Matrix& of, int64_t batch, bool transposed, int64_t n, int64_t k, int64_t width, int compute) {
    std::vector<float> all(size_t((n + width - 1) / width * k * width));
    for (int64_t column = 0; column < of.cols; column++)
        for (int64_t row = 0; row < of.rows; row++) {
            const int64_t i = transposed ? column : row, l = transposed ? row : column;
            const float x = rounded(get(of, batch * of.batch_stride + column * of.ld + row), compute);
            all[size_t((i / width * k + l) * width + i % width)] = x;
        }
    return all;
}

void multiply_panels(float (&sums)[COLS][ROWS], const float* a, const float* b, int64_t k) {
    typedef float Numbers __attribute__((vector_size(64), aligned(4)));
    Numbers own[COLS][2] = {};
    for (int64_t l = 0; l < k; l++, a += ROWS, b += COLS) {
        const Numbers first = *reinterpret_cast<const Numbers*>(a), second = *reinterpret_cast<const Numbers*>(a + 16);
        for (int64_t j = 0; j < COLS; j++) {
            own[j][0] += first * b[j];
            own[j][1] += second * b[j];
        }
    }
    memcpy(sums, own, sizeof(own));
}

void check_written(const Matrix& of, const char* name, int64_t batch) {
    for (int64_t column = 0; column < batch * of.cols; column++) {
        const int64_t at = column / of.cols * of.batch_stride + column % of.cols * of.ld;
        const size_t bytes = bytes_of(of.dtype);
        const void* const start = static_cast<const char*>(of.address) + size_t(at) * bytes;
        if (const void* const found = first_unwritten(start, size_t(of.rows) * bytes))
            die(std::string("a product of matrices reads what nothing has written: ") + name + ", " + describe(found) + "\n");
    }
}

int run_product(const Product& of) {
    const int64_t m = of.d.rows, n = of.d.cols, k = of.transpose_a ? of.a.rows : of.a.cols;
    check_written(of.a, "a", of.batch);
    check_written(of.b, "b", of.batch);
    if (of.beta != 0) check_written(of.c, "c", of.batch);
    for (int64_t batch = 0; batch < of.batch; batch++) {
        const std::vector<float> a = panels(of.a, batch, of.transpose_a, m, k, ROWS, of.compute);
        const std::vector<float> b = panels(of.b, batch, !of.transpose_b, n, k, COLS, of.compute);
        for (int64_t row = 0; row < m; row += ROWS)
            for (int64_t column = 0; column < n; column += COLS) {
                float sums[COLS][ROWS];
                multiply_panels(sums, &a[size_t(row * k)], &b[size_t(column * k)], k);
                for (int64_t j = column; j < std::min(column + COLS, n); j++)
                    for (int64_t i = row; i < std::min(row + ROWS, m); i++) {
                        float x = of.alpha * sums[j - column][i - row];
                        if (of.a_scales) x *= of.a_scales[of.scale_by_line ? i : 0];
                        if (of.b_scales) x *= of.b_scales[of.scale_by_line ? j : 0];
                        if (of.beta != 0) x += of.beta * get(of.c, batch * of.c.batch_stride + j * of.c.ld + i);
                        put(of.d, batch * of.d.batch_stride + j * of.d.ld + i, x);
                    }
            }
    }
    return BLAS_SUCCESS;
}

std::string fault_of(const Matrix& of, const char* name, int64_t batch) {
    if (of.rows <= 0 || of.cols <= 0) return std::string(name) + " is empty";
    if (of.ld < of.rows) return std::string("the columns of ") + name + " are nearer to each other than they are long";
    if (!of.address) return std::string(name) + " is null";
    if (reinterpret_cast<uintptr_t>(of.address) % bytes_of(of.dtype)) return std::string(name) + " is misaligned";
    const int64_t last = (batch - 1) * of.batch_stride + (of.cols - 1) * of.ld + of.rows;
    const int64_t bytes = last * int64_t(bytes_of(of.dtype));
    if (is_allocated(of.address, size_t(bytes))) return "";
    return std::string(name) + " has " + std::to_string(bytes) + " bytes, and its address is " + describe(of.address);
}

// What tensor cores ask of 8-bit floats.
std::string fault_of_float8(const Product& of) {
    if (of.a.dtype == R_8F_E5M2 && of.b.dtype == R_8F_E5M2) return "not both can be e5m2";
    if (of.c.dtype != of.d.dtype || (of.d.dtype != R_32F && of.d.dtype != R_16BF)) return "8-bit floats give f32 or bf16";
    if (!of.transpose_a || of.transpose_b) return "8-bit floats are summed over columns of both operands as they are stored";
    if (of.compute != COMPUTE_32F || of.batch != 1) return "8-bit floats are summed as f32, one product at a time";
    for (const Matrix& matrix : {of.a, of.b, of.d}) {
        if (matrix.ld * int64_t(bytes_of(matrix.dtype)) % 16) return "8-bit floats come in columns of a multiple of 16 bytes";
        if (reinterpret_cast<uintptr_t>(matrix.address) % 16) return "8-bit floats are aligned to 16 bytes";
    }
    if (of.a.rows % 16) return "8-bit floats are summed 16 at a time";
    for (const auto& [scales, n] : {std::pair(of.a_scales, of.d.rows), std::pair(of.b_scales, of.d.cols)})
        if (scales && !is_allocated(scales, sizeof(float) * size_t(of.scale_by_line ? n : 1))) return "scales are not there";
    if (of.scale_by_line && (!of.a_scales || !of.b_scales)) return "scales by line are needed for both operands";
    return "";
}

} // namespace

int multiply(const Product& of, void* stream) {
    const int inputs = of.a.dtype, outputs = of.d.dtype;
    const bool of_float8 = is_float8(of.a.dtype) && is_float8(of.b.dtype);
    if (of_float8) {
        const std::string fault = fault_of_float8(of);
        if (!fault.empty()) return refuse(BLAS_NOT_SUPPORTED, fault.c_str());
    } else if (of.a.dtype != of.b.dtype || of.c.dtype != of.d.dtype || (inputs != R_16BF && inputs != R_32F) ||
        (outputs != R_32F && (outputs != R_16BF || inputs != R_16BF)))
        return refuse(BLAS_NOT_SUPPORTED, "no such mixture of dtypes");
    const int64_t m = of.transpose_a ? of.a.cols : of.a.rows, k = of.transpose_a ? of.a.rows : of.a.cols;
    const int64_t n = of.transpose_b ? of.b.rows : of.b.cols, k_b = of.transpose_b ? of.b.cols : of.b.rows;
    if (k != k_b || m != of.d.rows || n != of.d.cols || m != of.c.rows || n != of.c.cols)
        return refuse(BLAS_INVALID_VALUE, "the sizes do not fit together");
    if (of.batch < 1 || of.batch > 65535) return refuse(BLAS_NOT_SUPPORTED, "a batch of none, or of more than 65535");
    for (const auto& [matrix, name] : {std::pair(of.a, "a"), std::pair(of.b, "b"), std::pair(of.d, "d")}) {
        const std::string fault = fault_of(matrix, name, of.batch);
        if (!fault.empty()) return refuse(BLAS_INVALID_VALUE, fault.c_str());
    }
    if (of.beta != 0) {
        const std::string fault = fault_of(of.c, "c", of.batch);
        if (!fault.empty()) return refuse(BLAS_INVALID_VALUE, fault.c_str());
    }
    return perform(stream, [=] { return run_product(of); });
}

} // namespace emulated

using namespace emulated;

namespace {

constexpr int ATTRIBUTE_SPACE = 64;

// What an object is told by number: up to 8 bytes for each.
struct Attributes {
    uint64_t values[ATTRIBUTE_SPACE];
    bool known[ATTRIBUTE_SPACE];

    int set(int attribute, const void* value, size_t bytes) {
        if (attribute < 0 || attribute >= ATTRIBUTE_SPACE || !value || bytes > 8) return BLAS_INVALID_VALUE;
        values[attribute] = 0;
        memcpy(&values[attribute], value, bytes);
        known[attribute] = true;
        return BLAS_SUCCESS;
    }
    template <typename T> T get(int attribute, T otherwise) const {
        if (!known[attribute]) return otherwise;
        T value;
        memcpy(&value, &values[attribute], sizeof(value));
        return value;
    }
};

struct MatmulDesc {
    int compute, scale;
    Attributes attributes;
};

struct Layout {
    int dtype;
    uint64_t rows, cols;
    int64_t ld;
    Attributes attributes;

    Matrix at(const void* address) const {
        return {const_cast<void*>(address), dtype, int64_t(rows), int64_t(cols), ld, attributes.get<int64_t>(6, 0)};
    }
    int batch() const { return attributes.get<int>(5, 1); }
};

struct Algorithm {
    uint64_t mark, alignment[4], workspace_bytes, unused[2];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

constexpr uint64_t MARK = 0x746974616e;

int handle;

} // namespace

extern "C" {

int cublasLtCreate(void** made) { return *made = &handle, BLAS_SUCCESS; }
int cublasLtDestroy(void*) { return BLAS_SUCCESS; }
size_t cublasLtGetVersion() { return 130000; }

int cublasLtMatmulDescCreate(MatmulDesc** made, int compute, int scale) {
    return *made = new MatmulDesc{compute, scale, {}}, BLAS_SUCCESS;
}
int cublasLtMatmulDescDestroy(MatmulDesc* desc) { return delete desc, BLAS_SUCCESS; }
int cublasLtMatmulDescSetAttribute(MatmulDesc* desc, int attribute, const void* value, size_t bytes) {
    if (attribute == 7 && *static_cast<const int*>(value) != 1) return refuse(BLAS_NOT_SUPPORTED, "no epilogue is emulated");
    return desc->attributes.set(attribute, value, bytes);
}

int cublasLtMatrixLayoutCreate(Layout** made, int dtype, uint64_t rows, uint64_t cols, int64_t ld) {
    return *made = new Layout{dtype, rows, cols, ld, {}}, BLAS_SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, BLAS_SUCCESS; }
int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    if (attribute == 1 && *static_cast<const int*>(value) != 0) return refuse(BLAS_NOT_SUPPORTED, "matrices are stored by columns");
    const size_t expected = attribute == 0 || attribute == 1 || attribute == 5 || attribute == 8 ? 4 : 8;
    if (bytes != expected) return refuse(BLAS_INVALID_VALUE, "an attribute of another size");
    switch (attribute) {
    case 0: layout->dtype = *static_cast<const int*>(value); break;
    case 2: layout->rows = *static_cast<const uint64_t*>(value); break;
    case 3: layout->cols = *static_cast<const uint64_t*>(value); break;
    case 4: layout->ld = *static_cast<const int64_t*>(value); break;
    }
    return layout->attributes.set(attribute, value, bytes);
}

int cublasLtMatmulPreferenceCreate(Attributes** made) { return *made = new Attributes(), BLAS_SUCCESS; }
int cublasLtMatmulPreferenceDestroy(Attributes* preference) { return delete preference, BLAS_SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(Attributes* preference, int attribute, const void* value, size_t bytes) {
    return preference->set(attribute, value, bytes);
}

int cublasLtMatmulAlgoGetHeuristic(void*, MatmulDesc* desc, Layout* a, Layout* b, Layout* c, Layout* d, Attributes* preference,
                                   int wanted, Heuristic* found, int* n_found) {
    if (!desc || !a || !b || !c || !d || !preference || !found || wanted < 1) return BLAS_INVALID_VALUE;
    if (is_float8(a->dtype)) {
        // Less aligned there is none.
        for (int i = 0; i < 4; i++)
            if (preference->get<uint32_t>(5 + i, 256) < 16) return *n_found = 0, BLAS_SUCCESS;
        if (desc->attributes.get<int>(3, 0) == 0 || desc->attributes.get<int>(4, 0) != 0 || a->rows % 16)
            return *n_found = 0, BLAS_SUCCESS;
    }
    memset(found, 0, sizeof(*found));
    found->algorithm.mark = MARK;
    for (int i = 0; i < 4; i++) found->algorithm.alignment[i] = preference->get<uint32_t>(5 + i, 256);
    // An algorithm of the library may need all that it is granted.
    found->workspace_bytes = found->algorithm.workspace_bytes = preference->get<uint64_t>(1, 0);
    return *n_found = 1, BLAS_SUCCESS;
}

int cublasLtMatmul(void* library, MatmulDesc* desc, const void* alpha, const void* a, Layout* a_layout, const void* b,
                   Layout* b_layout, const void* beta, const void* c, Layout* c_layout, void* d, Layout* d_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (!library || !desc || !alpha || !beta || !a_layout || !b_layout || !c_layout || !d_layout)
        return refuse(BLAS_INVALID_VALUE, "something is null");
    if (desc->scale != R_32F || (desc->compute != COMPUTE_32F && desc->compute != COMPUTE_32F_PEDANTIC &&
                                 desc->compute != COMPUTE_32F_FAST_16BF && desc->compute != COMPUTE_32F_FAST_TF32))
        return refuse(BLAS_NOT_SUPPORTED, "sums of f32 are all that is emulated");
    const void* const addresses[] = {a, b, c, d};
    if (algorithm) {
        if (algorithm->mark != MARK) return refuse(BLAS_INVALID_VALUE, "the algorithm is none");
        // What the device allocates is aligned to 256 there, to 16 here.
        for (int i = 0; i < 4; i++)
            if (reinterpret_cast<uintptr_t>(addresses[i]) % std::min<uint64_t>(algorithm->alignment[i], 16))
                return refuse(BLAS_NOT_SUPPORTED, "an operand is less aligned than the algorithm was told");
        if (workspace_bytes < algorithm->workspace_bytes) return refuse(BLAS_INVALID_VALUE, "too small a workspace");
    }
    if (workspace_bytes && !is_allocated(workspace, workspace_bytes)) return refuse(BLAS_INVALID_VALUE, "no such workspace");
    const int batch = d_layout->batch();
    if (a_layout->batch() != batch || b_layout->batch() != batch || c_layout->batch() != batch)
        return refuse(BLAS_INVALID_VALUE, "batches of different sizes");
    if (desc->attributes.get<int>(2, 0) != 0) return refuse(BLAS_NOT_SUPPORTED, "factors are on the host");
    Product product{};
    product.compute = desc->compute;
    product.transpose_a = desc->attributes.get<int>(3, 0) != 0;
    product.transpose_b = desc->attributes.get<int>(4, 0) != 0;
    product.alpha = *static_cast<const float*>(alpha);
    product.beta = *static_cast<const float*>(beta);
    product.a = a_layout->at(a);
    product.b = b_layout->at(b);
    product.c = c_layout->at(c);
    product.d = d_layout->at(d);
    product.batch = batch;
    const int a_mode = desc->attributes.get<int>(31, 0), b_mode = desc->attributes.get<int>(32, 0);
    if (a_mode != b_mode || (a_mode != 0 && a_mode != 3))
        return refuse(BLAS_NOT_SUPPORTED, "scales are one for all, or one for each row and column");
    product.a_scales = desc->attributes.get<const float*>(17, nullptr);
    product.b_scales = desc->attributes.get<const float*>(18, nullptr);
    product.scale_by_line = a_mode == 3;
    return multiply(product, stream);
}

} // extern "C"
