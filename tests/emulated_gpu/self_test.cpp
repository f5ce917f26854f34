// Holds the emulated GPU to plain computations, and to what it must refuse.
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "blas.h"
#include "machine.h"
#include "races.h"

using namespace emulated;

extern "C" {
int cuInit(unsigned);
int cuMemAllocAsync(uint64_t*, size_t, void*);
int cuMemFreeAsync(uint64_t, void*);
int cuMemsetD32Async(uint64_t, unsigned, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, uint64_t, size_t, void*);
int cuMemcpyDtoDAsync_v2(uint64_t, uint64_t, size_t, void*);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuStreamCreate(void**, unsigned);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
int cuGraphLaunch(void*, void*);
int cuGraphDestroy(void*);
int cuGraphExecDestroy(void*);
}

namespace {

int n_faults = 0;

void check(bool is_right, const std::string& what) {
    if (is_right) return;
    n_faults++;
    printf("FAULT: %s\n", what.c_str());
}

// Numbers on the device. The host may touch them.
template <typename T> struct Array {
    T* at;
    size_t n;

    explicit Array(size_t n) : at(static_cast<T*>(allocate(n * sizeof(T)))), n(n) {}
    Array(size_t n, std::function<T(size_t)> make) : Array(n) {
        for (size_t i = 0; i < n; i++) at[i] = make(i);
    }
    ~Array() { release(at); }
    Array(const Array&) = delete;

    void check_each(const std::string& what, std::function<T(size_t)> expected) {
        for (size_t i = 0; i < n; i++)
            if (!(at[i] == expected(i))) {
                printf("  at %zu: %g, expected %g\n", i, double(at[i]), double(expected(i)));
                return check(false, what);
            }
    }
};

template <typename... Arguments>
std::string launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
    const Kernel* kernel = find_kernel(name);
    if (!kernel) return "no such kernel";
    void* pointers[] = {&arguments..., nullptr};
    return run({kernel, grid, block, shared_bytes, pointers});
}

// Runs `body` in a process of its own, which has to end itself with words that hold `expected`.
void check_dies(const std::string& what, const std::string& expected, std::function<void()> body) {
    int ends[2];
    if (pipe(ends)) abort();
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string words;
    char part[4096];
    for (ssize_t n; (n = read(ends[0], part, sizeof(part))) > 0;) words.append(part, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && words.find(expected) != std::string::npos,
          what + ": no \"" + expected + "\" in:\n" + words);
    if (getenv("TITAN_EMULATED_SHOW")) printf("%s: %s", what.c_str(), words.c_str());
}

std::mt19937 generator(1);
float random_number(size_t = 0) { return std::uniform_real_distribution<float>(-1, 1)(generator); }

// What is refused is said to stderr; here it is meant to be.
struct Quiet {
    int kept;

    Quiet() : kept(dup(STDERR_FILENO)) {
        if (!freopen("/dev/null", "w", stderr)) abort();
    }
    ~Quiet() {
        fflush(stderr);
        dup2(kept, STDERR_FILENO);
        close(kept);
    }
};

void check_kernels() {
    {
        Array<uint32_t> out(2 * 3 * 4 * 5 * 6 * 7);
        launch("test_indices", dim3(2, 3, 4), dim3(5, 6, 7), 0, out.at);
        out.check_each("indices", [](size_t i) { return uint32_t(i / 210 << 16 | i % 210); });
    }
    for (unsigned threads : {32u, 64u, 1024u}) {
        Array<float> x(5000, [](size_t i) { return float(i % 7); }), out(3 * threads);
        launch("test_block_sum", 1, threads, 0, x.at, out.at, int64_t(x.n));
        float sum = 0;
        for (size_t i = 0; i < x.n; i++) sum += x.at[i];
        out.check_each("block_sum", [=](size_t) { return sum; });
    }
    {
        Array<__nv_bfloat16> a(256, random_number), b(128, random_number);
        Array<float> d(128);
        launch("test_mma", 1, 32, 0, a.at, b.at, d.at);
        d.check_each("mma_16x8x16", [&](size_t i) {
            const size_t row = i / 8, column = i % 8;
            double sum = row / 8 * 2 + column % 2 + 1;
            for (size_t k = 0; k < 16; k++) sum += double(float(a.at[row * 16 + k])) * double(float(b.at[k * 8 + column]));
            return fabs(sum - d.at[i]) < 1e-5 ? d.at[i] : float(sum);
        });
    }
    for (const size_t n : {64, 128}) {
        for (int what = 0; what < 3; what++) {
            const size_t depth = what == 0 ? 128 : 64;
            const std::string kernel = "test_products_" + std::to_string(n);
            Array<__nv_bfloat16> a(64 * depth, [](size_t) { return __nv_bfloat16(random_number()); });
            Array<__nv_bfloat16> b(n * depth, [](size_t) { return __nv_bfloat16(random_number()); });
            Array<float> d(64 * n);
            launch(kernel.c_str(), 1, 128, (64 * 128 + n * 128) * 2, a.at, b.at, d.at, what);
            d.check_each(kernel + " of kind " + std::to_string(what), [&](size_t i) {
                const size_t row = i / n, column = i % n;
                double sum = what == 0 ? 1 : 0;
                for (size_t k = 0; k < depth; k++) {
                    const size_t left = what == 2 ? k * 64 + row : row * depth + k;
                    const size_t right = what == 0 ? column * depth + k : k * n + column;
                    sum += double(float(a.at[left])) * double(float(b.at[right]));
                }
                return fabs(sum - d.at[i]) < 1e-4 ? d.at[i] : float(sum);
            });
        }
    }
    {
        Array<uint32_t> d(128);
        launch("test_product_in_haste", 1, 128, 16384, d.at);
        d.check_each("products are late", [](size_t) { return 0x7fff7fffu; });
    }
    {
        Array<uint16_t> matrices(256, [](size_t i) { return uint16_t(i); });
        Array<uint32_t> straight(128), transposed(128);
        launch("test_ldmatrix", 1, 32, 512, matrices.at, straight.at, transposed.at);
        const auto number = [&](size_t matrix, size_t row, size_t column) { return uint32_t(matrix * 64 + row * 8 + column); };
        straight.check_each("ldmatrix_x4", [&](size_t i) {
            const size_t lane = i / 4, column = lane % 4 * 2;
            return number(i % 4, lane / 4, column + 1) << 16 | number(i % 4, lane / 4, column);
        });
        transposed.check_each("ldmatrix_x4_trans", [&](size_t i) {
            const size_t lane = i / 4, row = lane % 4 * 2;
            return number(i % 4, row + 1, lane / 4) << 16 | number(i % 4, row, lane / 4);
        });
    }
    {
        const size_t n = 64;
        Array<uint32_t> from(8 * n, [](size_t i) { return uint32_t(i); }), early(4 * n), first(8 * n), second(4 * n);
        launch("test_copies", 1, n, 32 * n, from.at, early.at, first.at, second.at);
        early.check_each("copies are late", [](size_t) { return 0x7fff7fffu; });
        first.check_each("copies of one group", [=](size_t i) {
            return i >= 4 * n ? 0x7fff7fffu : i / 4 % 3 == 0 ? 0u : uint32_t(i);
        });
        second.check_each("copies of all groups", [=](size_t i) { return uint32_t(4 * n + i); });
    }
    {
        Array<uint32_t> out(17 * 32);
        launch("test_shuffles", 1, 32, 0, out.at);
        const auto x = [](size_t lane) { return uint32_t(lane * lane + 5); };
        out.check_each("what a warp exchanges", [&](size_t i) -> uint32_t {
            const size_t lane = i % 32, segment = lane & ~size_t(7);
            switch (i / 32) {
            case 0: return x(lane * 7 % 32);
            case 1: return x(lane ^ 9);
            case 2: return x(lane < 3 ? lane : lane - 3);
            case 3: return x(lane + 3 > 31 ? lane : lane + 3);
            case 4: return x(segment + 5);
            case 5: return x((lane ^ 12) > (lane | 7) ? lane : lane ^ 12);
            case 6: return x(lane - segment < 2 ? lane : lane - 2);
            case 7: return x(lane + 2 > (lane | 7) ? lane : lane + 2);
            case 8: return x(lane ^ 1);
            case 9: return 1u | 1u << 5 | 1u << 10 | 1u << 15 | 1u << 20 | 1u << 25 | 1u << 30;
            case 10: case 11: return 1;
            case 12: return 0xfu << (lane & ~size_t(3));
            case 13: return 32 * 5 + 31 * 32 * 63 / 6;
            case 14: return uint32_t(-9);
            case 15: return uint32_t(-7);
            default: return lane < 20 ? 190 : 12 * 1000 + (20 + 31) * 6;
            }
        });
    }
    {
        Array<uint32_t> out(40);
        launch("test_early_ends", 1, 70, 0, out.at);
        out.check_each("lanes that have ended", [](size_t i) { return (i < 32 ? 496u : 284u) + 20; });
    }
    {
        Array<float> f(1, [](size_t) { return 1.0f; });
        Array<double> d(1, [](size_t) { return 1.0; });
        Array<int> i(3, [](size_t) { return 0; });
        Array<unsigned> u(4, [](size_t) { return 0; });
        Array<unsigned long long> l(1, [](size_t) { return 0; });
        launch("test_atomics", 3, 64, 0, f.at, d.at, i.at, u.at, l.at);
        check(*f.at == 97 && *d.at == 49 && *l.at == 192ull << 33, "atomic sums");
        check(i.at[0] == 191 * 96 && i.at[1] == 191 && i.at[2] == -191, "atomics of int");
        check(u.at[0] == 576 && u.at[1] == ~0u && u.at[2] == 7 && u.at[3] > 0 && u.at[3] <= 192, "atomics of unsigned");
    }
    {
        const float values[] = {1.0f, 1.00390625f, 1.01171875f, -3.14159f, 3.3e38f, 3.4e38f, 1e-40f, NAN, -INFINITY, 0.1f, -150.0f};
        const uint16_t bf16[] = {0x3f80, 0x3f80, 0x3f82, 0xc049, 0x7f78, 0x7f80, 0x0001, 0x7fff, 0xff80, 0x3dcd, 0xc316};
        const int n = int(sizeof(values) / sizeof(float));
        Array<float> x(n, [&](size_t i) { return values[i]; }), fast(n);
        Array<uint16_t> rounded(n);
        launch("test_numbers", 1, 32, 0, x.at, rounded.at, fast.at, n);
        rounded.check_each("rounding to bf16", [&](size_t i) { return bf16[i]; });
        check(fast.at[0] == 2 && fast.at[8] == 0 && fast.at[10] == 0 && fast.at[6] == 1, "exp2_fast");
    }
    if (!races_are_found()) {
        Array<float> out(128), unwritten(64);
        launch("test_nothing", 2, 64, 256, out.at, unwritten.at);
        for (size_t i = 0; i < 128; i++) check(out.at[i] != out.at[i], "memory that nothing has written is NaN");
    }
    {
        Array<uint32_t> out(64);
        launch("test_race", 1, 64, 0, out.at, 1);
        out.check_each("a barrier", [](size_t i) { return uint32_t((i + 40) % 64); });
    }
    {
        Array<int> out(64);
        check(launch("test_bounds", 1, 65, 0, out.at).find("bounded to 64") != std::string::npos, "a block beyond its bounds");
        check(launch("test_bounds", dim3(1, 65536), 64, 0, out.at).find("65535") != std::string::npos, "too large a grid");
        check(launch("test_bounds", 0, 64, 0, out.at).find("nothing") != std::string::npos, "an empty grid");
        check(launch("test_bounds", 1, 64, 228 << 10, out.at).find("shared") != std::string::npos, "too much shared memory");
        check(launch("test_bounds", 1, 64, 227 << 10, out.at).empty(), "all shared memory");
    }
}

void check_faults() {
    const struct {
        int which;
        const char *what, *words;
    } faults[] = {
        {0, "a write just behind the end", "written behind the 44 bytes"},
        {1, "a write far behind the end", "behind the end of the 44 bytes of device memory"},
        {2, "a write before the start", "written before the 44 bytes"},
        {3, "a thread that misses a barrier", "1 threads (5) wait at __shfl_sync"},
        {4, "a warp that comes apart", "8 threads (0 1 2 3 4 5 6 7) wait at __syncwarp"},
        {5, "different barriers", "at different barriers"},
        {6, "a misaligned ldmatrix", "not aligned to 16 bytes"},
        {7, "ldmatrix of device memory", "not in shared memory"},
        {8, "a copy from a misaligned address", "not aligned to 16 bytes"},
        {9, "a misaligned pack", "misaligned"},
        {10, "an index outside of shared memory", "outside of an array"},
        {11, "a mask without its lane", "whose mask leaves it out"},
        {12, "an index behind dynamic shared memory", "bytes of dynamic shared memory"},
        {13, "a trap", "trapped"},
    };
    for (const auto& fault : faults)
        check_dies(fault.what, fault.words, [&] {
            Array<float> x(11, random_number);
            launch("test_fault", 1, 64, 16384, fault.which, x.at, fault.which == 12 ? 16384 : 11);
        });
    check_dies("an argument that is no device memory", "argument 1", [] { launch("test_fault", 1, 1, 0, 99, (float*)&n_faults, 1); });
    check_dies("a product of what no fence has shown it", "without shared_for_products", [] {
        Array<__nv_bfloat16> from(64 * 64, [](size_t) { return __nv_bfloat16(random_number()); });
        launch("test_product_unshown", 1, 128, 16384, from.at);
    });
    check_dies("memory that is released", "that were released", [] {
        Array<float> x(8);
        release(x.at);
        launch("test_increment", 1, 8, 0, x.at, 1.0f);
    });
    check_dies("the place of a fault", "self_test.cu:", [] {
        Array<float> x(8);
        launch("test_fault", 1, 64, 0, 1, x.at, 8);
    });
}

void check_order() {
    const char* kinds[] = {
        "", "reads that a warp does not wait for", "", "writes that a block does not wait for", "", "sums without atomics",
        "", "what another block reads", "", "a copy that only its own thread has waited for", "", "a sum that others add to",
        "", "a byte of a word that another writes",
    };
    for (int which = 0; which < 14; which++) {
        const auto body = [&] {
            Array<float> x(64, random_number), y(193, [](size_t) { return 0.0f; });
            launch("test_order", 2, 64, 1024, which, x.at, y.at);
        };
        if (which % 2) check_dies(kinds[which], "a race", body);
        else body();
    }
}

void check_unwritten() {
    for (int which = 0; which < 10; which++) {
        const auto body = [&] {
            Array<float> x(64, random_number), y(256);
            Array<uint16_t> halves(128);
            launch("test_unwritten", 1 + (which == 7), 64, 1024, which, x.at, y.at, halves.at);
        };
        if (which % 2) check_dies("unwritten, case " + std::to_string(which), "reads what nothing has written", body);
        else body();
    }
    check_dies("a copy of what nothing has written", "reads what nothing has written", [] {
        Array<float> x(64), y(64);
        cuMemcpyDtoDAsync_v2(uint64_t(y.at), uint64_t(x.at), 256, nullptr);
        launch("test_increment", 1, 64, 0, y.at, 1.0f);
    });
}

void check_driver() {
    const Quiet quiet;
    void *stream, *module, *function, *graph, *runnable;
    uint64_t x;
    float found[4];
    cuStreamCreate(&stream, 1);
    cuMemAllocAsync(&x, 16, stream);
    cuModuleLoadData(&module, "");
    cuModuleGetFunction(&function, module, "test_increment");
    float by = 2;
    void* arguments[] = {&x, &by};
    const auto launch_increment = [&](unsigned shared_bytes) {
        return cuLaunchKernel(function, 1, 1, 1, 4, 1, 1, shared_bytes, stream, arguments, nullptr);
    };
    cuMemsetD32Async(x, 0, 4, stream);
    check(launch_increment(0) == 0 && launch_increment(64 << 10) == 1, "shared memory that a kernel has no attribute for");
    check(cuFuncSetAttribute(function, 8, 64 << 10) == 0 && launch_increment(64 << 10) == 0, "shared memory with it");

    cuStreamBeginCapture_v2(stream, 0);
    uint64_t scratch, first = x;
    cuMemAllocAsync(&scratch, 16, stream);
    cuMemsetD32Async(scratch, 0x3f800000, 4, stream);
    launch_increment(0);
    by = 100;
    arguments[0] = &scratch;
    launch_increment(0);
    cuMemFreeAsync(scratch, stream);
    check(cuMemFreeAsync(first, stream) == 1, "a graph that frees what it has not allocated");
    cuStreamEndCapture(stream, &graph);
    cuMemcpyDtoHAsync_v2(found, first, 16, stream);
    check(found[0] == 4 && found[3] == 4, "what is captured is not done");
    cuGraphInstantiateWithFlags(&runnable, graph, 0);
    cuGraphLaunch(runnable, stream);
    cuGraphLaunch(runnable, stream);
    cuMemcpyDtoHAsync_v2(found, first, 16, stream);
    check(found[0] == 8 && found[3] == 8, "a graph does what was captured");
    cuGraphExecDestroy(runnable);
    cuGraphDestroy(graph);
    check(cuMemcpyDtoHAsync_v2(found, first, 20, stream) == 1, "a copy of more than there is");
    cuMemFreeAsync(first, stream);
}

void check_products() {
    const Quiet quiet;
    for (const int kind : {0, 1, 2, 3})
        for (const bool is_bf16 : {false, true}) {
            const bool ta = kind % 2, tb = kind / 2;
            const int64_t m = 37, n = 19, k = 53, batch = 3, ld_a = (ta ? k : m) + 2, ld_b = (tb ? n : k) + 1, ld_d = m + 3;
            Array<float> a(size_t(batch * ld_a * (ta ? m : k)), random_number), b(size_t(batch * ld_b * (tb ? k : n)), random_number);
            Array<float> d(size_t(batch * ld_d * n), random_number);
            Array<__nv_bfloat16> a16(a.n, [&](size_t i) { return __nv_bfloat16(a.at[i]); });
            Array<__nv_bfloat16> b16(b.n, [&](size_t i) { return __nv_bfloat16(b.at[i]); });
            std::vector<float> before(d.at, d.at + d.n);
            Product product{};
            product.compute = COMPUTE_32F;
            product.transpose_a = ta;
            product.transpose_b = tb;
            product.alpha = 0.5f;
            product.beta = 2;
            const int dtype = is_bf16 ? R_16BF : R_32F;
            product.a = {is_bf16 ? (void*)a16.at : a.at, dtype, ta ? k : m, ta ? m : k, ld_a, ld_a * (ta ? m : k)};
            product.b = {is_bf16 ? (void*)b16.at : b.at, dtype, tb ? n : k, tb ? k : n, ld_b, ld_b * (tb ? k : n)};
            product.c = product.d = {d.at, R_32F, m, n, ld_d, ld_d * n};
            product.batch = batch;
            check(multiply(product, nullptr) == 0, "a product");
            d.check_each("a product", [&](size_t i) {
                const int64_t in = int64_t(i) / (ld_d * n), column = int64_t(i) % (ld_d * n) / ld_d, row = int64_t(i) % ld_d;
                if (row >= m) return before[i];
                double sum = 0;
                for (int64_t l = 0; l < k; l++) {
                    const size_t at_a = size_t(in * product.a.batch_stride + (ta ? row * ld_a + l : l * ld_a + row));
                    const size_t at_b = size_t(in * product.b.batch_stride + (tb ? l * ld_b + column : column * ld_b + l));
                    sum += is_bf16 ? double(float(a16.at[at_a])) * double(float(b16.at[at_b])) : double(a.at[at_a]) * b.at[at_b];
                }
                const double expected = 0.5 * sum + 2 * before[i];
                return fabs(expected - d.at[i]) < 1e-4 ? d.at[i] : float(expected);
            });
            product.a.ld = 1;
            check(multiply(product, nullptr) == BLAS_INVALID_VALUE, "columns that overlap");
            product.a.ld = ld_a + 4;
            check(multiply(product, nullptr) == BLAS_INVALID_VALUE, "a matrix larger than its memory");
            product.a.ld = ld_a;
            product.b.dtype = is_bf16 ? R_32F : R_16BF;
            check(multiply(product, nullptr) == BLAS_NOT_SUPPORTED, "dtypes that do not mix");
        }
}

} // namespace

int main() {
    cuInit(0);
    for (const char* order : {"forward", "backward", "random:3"}) {
        setenv("TITAN_EMULATED_ORDER", order, 1);
        check_kernels();
    }
    // Without a barrier, what threads read depends on their order.
    std::vector<uint32_t> found[2] = {{1}, {2}};
    for (int forward = 0; forward < 2 && !races_are_found(); forward++) {
        setenv("TITAN_EMULATED_ORDER", forward ? "forward" : "backward", 1);
        Array<uint32_t> out(64);
        launch("test_race", 1, 64, 0, out.at, 0);
        found[forward].assign(out.at, out.at + 64);
    }
    check(found[0] != found[1], "a missing barrier shows");
    check_faults();
    if (races_are_found()) {
        check_order();
        check_unwritten();
    }
    check_driver();
    check_products();
    check(allocated_bytes() == 0, "memory that is not released");
    puts(n_faults ? "the emulated GPU is at fault" : "the emulated GPU is right");
    return n_faults != 0;
}
