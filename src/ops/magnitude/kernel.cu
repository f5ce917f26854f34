// How large the elements of a tensor are.
//   largest[block] = max |x| over the block's part, NaN where any element is
// Shapes     x (n); largest (blocks). Contiguous.
// Types      x bf16 or f32; largest f32.
// Launch     256 threads per block, any grid: groups of N = 8 or 1 in turns; shared 32 floats.
// Writes     largest with =.
// Requires   for N = 8: n % 8 == 0, address aligned to 16; checked in cuda.rs.
// Reference  cpu.rs.
#include "kernel.cuh"

// Where y is NaN it is neither smaller nor larger.
__device__ inline float larger(float x, float y) { return y <= x || x != x ? x : y; }

template <typename X, int N> __device__ inline void magnitude(const X* x, float* largest, int64_t groups) {
    SHARED(shared);
    float* scratch = reinterpret_cast<float*>(shared);
    float most = 0;
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t group = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; group < groups; group += step) {
        float values[N];
        load_all(values, x + group * N);
#pragma unroll
        for (int i = 0; i < N; i++) most = larger(most, fabsf(values[i]));
    }
    for (int lane = 16; lane > 0; lane /= 2) most = larger(most, __shfl_xor_sync(ALL_LANES, most, lane));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < int(blockDim.x / 32); warp++) most = larger(most, scratch[warp]);
        largest[blockIdx.x] = most;
    }
}

KERNEL(magnitude_f32_8, const float* x, float* largest, int64_t groups) { magnitude<float, 8>(x, largest, groups); }
KERNEL(magnitude_bf16_8, const bf16* x, float* largest, int64_t groups) { magnitude<bf16, 8>(x, largest, groups); }
KERNEL(magnitude_f32_1, const float* x, float* largest, int64_t groups) { magnitude<float, 1>(x, largest, groups); }
KERNEL(magnitude_bf16_1, const bf16* x, float* largest, int64_t groups) { magnitude<bf16, 1>(x, largest, groups); }
