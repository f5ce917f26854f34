// The CUDA driver of a device that is emulated: what libcuda.so exports, as far as titan and candle call it. Everything
// is done before a call returns, unless a stream is captured. Other functions are stand-ins, see scripts/emulated_gpu.sh.
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "machine.h"
#include "races.h"

using namespace emulated;

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    NOT_FOUND = 500,
    OUT_OF_RESOURCES = 701,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

constexpr size_t DEVICE_BYTES = size_t(8) << 30;
constexpr size_t DEFAULT_SHARED_BYTES = 48 << 10;

// Refuses a call in words that say why; the caller gets no more than the number.
int refuse(int result, const char* format, ...) __attribute__((format(printf, 2, 3)));
int refuse(int result, const char* format, ...) {
    va_list values;
    va_start(values, format);
    fputs("emulated GPU: ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    return result;
}

struct Graph;

std::mutex graphs_lock;
// Memory that steps of graphs allocate.
std::map<void*, Graph*>& graph_memory() {
    static std::map<void*, Graph*>& all = *new std::map<void*, Graph*>();
    return all;
}

// What a stream does while it is captured, to be done again.
struct Graph {
    std::vector<std::function<int()>> steps;
    // By the address, which is the same in all launches: whether it is in use between launches.
    std::map<void*, bool> memory;

    void* add_memory(size_t bytes) {
        void* made = allocate(bytes);
        const std::lock_guard<std::mutex> guard(graphs_lock);
        memory[made] = true;
        graph_memory()[made] = this;
        return made;
    }

    ~Graph() {
        for (const auto& [address, _] : memory) {
            {
                const std::lock_guard<std::mutex> guard(graphs_lock);
                graph_memory().erase(address);
            }
            release(address);
        }
    }
};

Graph* graph_with(void* address) {
    const std::lock_guard<std::mutex> guard(graphs_lock);
    const auto found = graph_memory().find(address);
    return found == graph_memory().end() ? nullptr : found->second;
}

struct RunnableGraph {
    std::shared_ptr<Graph> graph;
    bool frees_on_launch;
};

struct Stream {
    std::shared_ptr<Graph> captured;
};

struct Event {
    timespec at;
};

struct Function {
    const Kernel* kernel;
    std::string name;
    size_t max_shared_bytes;
};

struct Module {
    std::string ptx;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

std::mutex lock;
int context, pool;
uint64_t release_threshold;
// What is reserved is what is in use, and its peak is not reset with that of the latter.
size_t peak_before_reset;
__thread void* current_context;

// Streams of these numbers always exist.
Stream* stream_of(void* handle) {
    static Stream legacy, own;
    const uintptr_t number = reinterpret_cast<uintptr_t>(handle);
    return number <= 1 ? &legacy : number == 2 ? &own : static_cast<Stream*>(handle);
}

bool is_capturing(void* stream) { return stream_of(stream)->captured != nullptr; }

int check_range(const char* what, uint64_t address, size_t bytes) {
    const void* start = reinterpret_cast<void*>(address);
    if (bytes == 0 || is_allocated(start, bytes)) return SUCCESS;
    return refuse(INVALID_VALUE, "%s %zu bytes at %p, %s", what, bytes, start, describe(start).c_str());
}

int copy(uint64_t to, uint64_t from, size_t bytes) {
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    return SUCCESS;
}

template <typename T> int set(uint64_t to, T value, size_t n) {
    if (const int refused = check_range("a fill of", to, n * sizeof(T))) return refused;
    if (to % sizeof(T)) return refuse(INVALID_VALUE, "a fill of a misaligned address");
    for (size_t i = 0; i < n; i++) reinterpret_cast<T*>(to)[i] = value;
    return SUCCESS;
}

int launch(Function* function, dim3 grid, dim3 block, size_t shared_bytes, void* stream, void** arguments) {
    if (!function->kernel) {
        fail(("a launch of " + function->name + ", which is not among the kernels that were compiled for the emulator").c_str(),
             nullptr);
    }
    if (shared_bytes > function->max_shared_bytes)
        return refuse(INVALID_VALUE, "%s: %zu bytes of shared memory, more than the %zu of its attribute", function->name.c_str(),
                      shared_bytes, function->max_shared_bytes);
    const Kernel& kernel = *function->kernel;
    // A copy, for a launch may come later.
    auto values = std::make_shared<std::vector<std::vector<unsigned char>>>();
    for (int i = 0; i < kernel.n_arguments; i++) {
        const unsigned char* value = static_cast<unsigned char*>(arguments[i]);
        values->emplace_back(value, value + kernel.argument_bytes[i]);
    }
    return perform(stream, [=, &kernel] {
        std::vector<void*> pointers;
        for (auto& value : *values) pointers.push_back(value.data());
        const std::string refused = run({&kernel, grid, block, shared_bytes, pointers.data()});
        if (refused.empty()) return int(SUCCESS);
        return refuse(INVALID_VALUE, "a launch of %s: %s", kernel.name, refused.c_str());
    });
}

} // namespace

int emulated::perform(void* stream, std::function<int()> what) {
    if (!is_capturing(stream)) return what();
    stream_of(stream)->captured->steps.push_back(std::move(what));
    return SUCCESS;
}

extern "C" {

// ---------------------------------------------------------------------------------------------------- device and context

int cuInit(unsigned) {
    // TITAN_EMULATED_GPUS=0: as on a machine that has the libraries, and no GPU.
    const char* gpus = getenv("TITAN_EMULATED_GPUS");
    if (gpus != nullptr && strcmp(gpus, "0") == 0) return NO_DEVICE;
    catch_faults();
    return SUCCESS;
}
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = DEVICE_BYTES, SUCCESS; }
int cuDeviceGetName(char* name, int bytes, int) {
    // A card whose peak titan knows: measuring it would take hours.
    snprintf(name, size_t(bytes), "Emulated H100");
    return SUCCESS;
}
int cuDeviceGetUuid(char* uuid, int) { return memset(uuid, 1, 16), SUCCESS; }
int cuDeviceGetUuid_v2(char* uuid, int) { return memset(uuid, 1, 16), SUCCESS; }
// The numbers of an H100, where they matter.
int cuDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> values = {
        {1, 1024},          // MAX_THREADS_PER_BLOCK
        {2, 1024},          // MAX_BLOCK_DIM_X
        {3, 1024},          // MAX_BLOCK_DIM_Y
        {4, 64},            // MAX_BLOCK_DIM_Z
        {5, 0x7fffffff},    // MAX_GRID_DIM_X
        {6, 65535},         // MAX_GRID_DIM_Y
        {7, 65535},         // MAX_GRID_DIM_Z
        {8, 48 << 10},      // MAX_SHARED_MEMORY_PER_BLOCK
        {10, 32},           // WARP_SIZE
        {12, 65536},        // MAX_REGISTERS_PER_BLOCK
        {13, 1980000},      // CLOCK_RATE
        {16, 132},          // MULTIPROCESSOR_COUNT
        {31, 1},            // CONCURRENT_KERNELS
        {36, 2619000},      // MEMORY_CLOCK_RATE
        {37, 5120},         // GLOBAL_MEMORY_BUS_WIDTH
        {38, 50 << 20},     // L2_CACHE_SIZE
        {39, 2048},         // MAX_THREADS_PER_MULTIPROCESSOR
        {41, 1},            // UNIFIED_ADDRESSING
        {82, 65536},        // MAX_REGISTERS_PER_MULTIPROCESSOR
        {106, 32},          // MAX_BLOCKS_PER_MULTIPROCESSOR
        {115, 1},           // MEMORY_POOLS_SUPPORTED
    };
    switch (attribute) {
    case 75: return *value = capability() / 10, SUCCESS;                     // COMPUTE_CAPABILITY_MAJOR
    case 76: return *value = capability() % 10, SUCCESS;                     // COMPUTE_CAPABILITY_MINOR
    case 81: return *value = int(max_shared_bytes() + 1024), SUCCESS;        // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 97: return *value = int(max_shared_bytes()), SUCCESS;               // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    }
    const auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return SUCCESS; }
int cuCtxGetCurrent(void** current) { return *current = current_context, SUCCESS; }
int cuCtxSetCurrent(void* current) { return current_context = current, SUCCESS; }
int cuCtxGetDevice(int* device) { return *device = 0, SUCCESS; }
int cuCtxSynchronize() { return SUCCESS; }
int cuCtxSetFlags(unsigned) { return SUCCESS; }
int cuCtxSetLimit(int, size_t) { return SUCCESS; }
int cuCtxSetCacheConfig(int) { return SUCCESS; }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }
int cuProfilerStart() { return SUCCESS; }
int cuProfilerStop() { return SUCCESS; }

int cuGetErrorName(int error, const char** name) {
    static const std::map<int, const char*> names = {
        {SUCCESS, "CUDA_SUCCESS"},
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {34, "CUDA_ERROR_STUB_LIBRARY"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
        {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    };
    const auto found = names.find(error);
    *name = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second;
    return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
    if (error == 34) return *text = "the emulated GPU has no such function", SUCCESS;
    return cuGetErrorName(error, text);
}

// -------------------------------------------------------------------------------------------------- streams and their events

int cuStreamCreate(void** stream, unsigned) { return *stream = new Stream(), SUCCESS; }
int cuStreamCreateWithPriority(void** stream, unsigned, int) { return *stream = new Stream(), SUCCESS; }
int cuStreamDestroy_v2(void* stream) { return delete static_cast<Stream*>(stream), SUCCESS; }
int cuStreamQuery(void*) { return SUCCESS; }
int cuStreamSynchronize(void* stream) {
    if (is_capturing(stream)) return refuse(CAPTURE_UNSUPPORTED, "a captured stream cannot be waited for");
    return SUCCESS;
}
int cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
int cuStreamAttachMemAsync(void*, uint64_t, size_t, unsigned) { return SUCCESS; }
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    return perform(stream, [=] { return function(data), int(SUCCESS); });
}

int cuEventCreate(void** event, unsigned) { return *event = new Event(), SUCCESS; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), SUCCESS; }
int cuEventRecord(void* event, void* stream) {
    if (is_capturing(stream)) return SUCCESS;
    clock_gettime(CLOCK_MONOTONIC, &static_cast<Event*>(event)->at);
    return SUCCESS;
}
int cuEventQuery(void*) { return SUCCESS; }
int cuEventSynchronize(void*) { return SUCCESS; }
int cuEventElapsedTime_v2(float* elapsed_ms, void* start, void* end) {
    const timespec from = static_cast<Event*>(start)->at, to = static_cast<Event*>(end)->at;
    *elapsed_ms = float(double(to.tv_sec - from.tv_sec) * 1e3 + double(to.tv_nsec - from.tv_nsec) * 1e-6);
    return SUCCESS;
}
int cuEventElapsedTime(float* elapsed_ms, void* start, void* end) { return cuEventElapsedTime_v2(elapsed_ms, start, end); }

// ------------------------------------------------------------------------------------------------------------------ memory

int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
    *address = 0;
    if (bytes == 0) return SUCCESS;
    if (allocated_bytes() + bytes > DEVICE_BYTES) return OUT_OF_MEMORY;
    Graph* const graph = stream_of(stream)->captured.get();
    void* made = graph ? graph->add_memory(bytes) : allocate(bytes);
    if (!made) return OUT_OF_MEMORY;
    *address = reinterpret_cast<uint64_t>(made);
    if (!graph) return SUCCESS;
    return perform(stream, [=] { return graph->memory[made] = true, forget(made), int(SUCCESS); });
}
int cuMemFreeAsync(uint64_t address, void* stream) {
    if (address == 0) return SUCCESS;
    void* const released = reinterpret_cast<void*>(address);
    Graph* const graph = graph_with(released);
    if (!graph && is_capturing(stream)) {
        return refuse(INVALID_VALUE, "a captured stream frees what no graph has allocated: %p, %s", released,
                      describe(released).c_str());
    }
    if (!graph) return release(released), SUCCESS;
    graph->memory[released] = false;
    return perform(stream, [=] { return graph->memory[released] = false, forget(released), int(SUCCESS); });
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    return bytes ? cuMemAllocAsync(address, bytes, nullptr) : refuse(INVALID_VALUE, "an allocation of no bytes");
}
int cuMemFree_v2(uint64_t address) { return cuMemFreeAsync(address, nullptr); }
int cuMemAllocFromPoolAsync(uint64_t* address, size_t bytes, void*, void* stream) {
    return cuMemAllocAsync(address, bytes, stream);
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    *total = DEVICE_BYTES;
    *free = DEVICE_BYTES - allocated_bytes();
    return SUCCESS;
}

int cuDeviceGetDefaultMemPool(void** found, int) { return *found = &pool, SUCCESS; }
int cuDeviceGetMemPool(void** found, int) { return *found = &pool, SUCCESS; }
int cuDeviceSetMemPool(int, void*) { return SUCCESS; }
int cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }
int cuMemPoolSetAttribute(void*, int attribute, void* value) {
    if (attribute == 4) release_threshold = *static_cast<uint64_t*>(value);
    if (attribute == 6) peak_before_reset = 0;
    if (attribute == 8) {
        peak_before_reset = std::max(peak_before_reset, peak_bytes());
        peak_bytes() = allocated_bytes();
    }
    return SUCCESS;
}
int cuMemPoolGetAttribute(void*, int attribute, void* value) {
    switch (attribute) {
    case 4: *static_cast<uint64_t*>(value) = release_threshold; break;
    case 5: case 7: *static_cast<uint64_t*>(value) = allocated_bytes(); break;
    case 6: *static_cast<uint64_t*>(value) = std::max(peak_before_reset, peak_bytes()); break;
    case 8: *static_cast<uint64_t*>(value) = peak_bytes(); break;
    default: *static_cast<int*>(value) = 1;
    }
    return SUCCESS;
}

int cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    *address = malloc(bytes);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemAllocHost_v2(void** address, size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }
int cuMemFreeHost(void* address) { return free(address), SUCCESS; }
int cuMemHostRegister_v2(void*, size_t, unsigned) { return SUCCESS; }
int cuMemHostUnregister(void*) { return SUCCESS; }

int cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void* stream) {
    return perform(stream, [=] { return set(to, value, n); });
}
int cuMemsetD16Async(uint64_t to, unsigned short value, size_t n, void* stream) {
    return perform(stream, [=] { return set(to, value, n); });
}
int cuMemsetD32Async(uint64_t to, unsigned value, size_t n, void* stream) {
    return perform(stream, [=] { return set(to, value, n); });
}
int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t n) { return set(to, value, n); }
int cuMemsetD32_v2(uint64_t to, unsigned value, size_t n) { return set(to, value, n); }

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    if (const int refused = check_range("a copy to", to, bytes)) return refused;
    return perform(stream, [=] { return copy(to, reinterpret_cast<uint64_t>(from), bytes); });
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    if (const int refused = check_range("a copy from", from, bytes)) return refused;
    return perform(stream, [=] {
        if (const void* const found = first_unwritten(reinterpret_cast<void*>(from), bytes))
            die("a copy to the host reads what nothing has written: " + describe(found) + "\n");
        return copy(reinterpret_cast<uint64_t>(to), from, bytes);
    });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    if (const int refused = check_range("a copy from", from, bytes)) return refused;
    if (const int refused = check_range("a copy to", to, bytes)) return refused;
    return perform(stream, [=] { return copy(to, from, bytes); });
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    return perform(stream, [=] { return copy(to, from, bytes); });
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }

// -------------------------------------------------------------------------------------------------------- modules and kernels

int cuModuleLoadData(void** module, const void* image) {
    Module* made = new Module();
    made->ptx = static_cast<const char*>(image);
    return *module = made, SUCCESS;
}
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    std::lock_guard<std::mutex> guard(lock);
    Module& in = *static_cast<Module*>(module);
    // The text is empty if no compiler for the device was there.
    if (in.ptx.find(".entry") != std::string::npos && in.ptx.find(std::string(" ") + name + "(") == std::string::npos)
        return refuse(NOT_FOUND, "the module has no kernel %s", name);
    std::unique_ptr<Function>& known = in.functions[name];
    if (!known) known.reset(new Function{find_kernel(name), name, DEFAULT_SHARED_BYTES});
    return *function = known.get(), SUCCESS;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8) return SUCCESS; // MAX_DYNAMIC_SHARED_SIZE_BYTES
    Function& of = *static_cast<Function*>(function);
    if (value < 0 || size_t(value) > max_shared_bytes())
        return refuse(INVALID_VALUE, "%s: %d bytes of shared memory, more than %zu", of.name.c_str(), value, max_shared_bytes());
    of.max_shared_bytes = std::max(size_t(value), DEFAULT_SHARED_BYTES);
    return SUCCESS;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
    const Function& of = *static_cast<Function*>(function);
    *value = attribute == 0 ? (of.kernel ? of.kernel->max_threads : 1024) : attribute == 8 ? int(of.max_shared_bytes) : 0;
    return SUCCESS;
}
int cuFuncSetCacheConfig(void*, int) { return SUCCESS; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared_bytes) {
    *blocks = int(std::min(size_t(2048 / threads), (max_shared_bytes() + 1024) / (shared_bytes + 1024)));
    return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void**) {
    return launch(static_cast<Function*>(function), dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared_bytes,
                  stream, arguments);
}
struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
};
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void**) {
    return launch(static_cast<Function*>(function), dim3(config->grid_x, config->grid_y, config->grid_z),
                  dim3(config->block_x, config->block_y, config->block_z), config->shared_bytes, config->stream, arguments);
}

// ------------------------------------------------------------------------------------------------------------------- graphs

int cuStreamBeginCapture_v2(void* stream, int) {
    if (is_capturing(stream)) return refuse(INVALID_VALUE, "the stream is captured already");
    return stream_of(stream)->captured = std::make_shared<Graph>(), SUCCESS;
}
int cuStreamEndCapture(void* stream, void** graph) {
    if (!is_capturing(stream)) return refuse(INVALID_VALUE, "the stream is not captured");
    *graph = new std::shared_ptr<Graph>(std::move(stream_of(stream)->captured));
    stream_of(stream)->captured.reset();
    return SUCCESS;
}
int cuStreamIsCapturing(void* stream, int* status) { return *status = is_capturing(stream), SUCCESS; }
int cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void**, const void**, size_t*) {
    if (id) *id = reinterpret_cast<uint64_t>(stream);
    return *status = is_capturing(stream), SUCCESS;
}
int cuStreamGetCaptureInfo_v3(void* stream, int* status, uint64_t* id, void**, const void**, const void**, size_t*) {
    return cuStreamGetCaptureInfo_v2(stream, status, id, nullptr, nullptr, nullptr);
}
int cuGraphInstantiateWithFlags(void** runnable, void* graph, unsigned long long flags) {
    // Nothing has run, so nothing is allocated.
    auto& of = *static_cast<std::shared_ptr<Graph>*>(graph);
    for (auto& [_, is_in_use] : of->memory) is_in_use = false;
    return *runnable = new RunnableGraph{of, (flags & 1) != 0}, SUCCESS;
}
int cuGraphUpload(void*, void*) { return SUCCESS; }
int cuGraphLaunch(void* runnable, void* stream) {
    const auto [graph, frees_on_launch] = *static_cast<RunnableGraph*>(runnable);
    return perform(stream, [graph = graph, frees_on_launch = frees_on_launch] {
        for (const auto& [_, is_in_use] : graph->memory)
            if (is_in_use && !frees_on_launch) return refuse(INVALID_VALUE, "a graph whose memory of the last launch is in use");
        for (const auto& step : graph->steps)
            if (const int result = step()) return result;
        return int(SUCCESS);
    });
}
int cuGraphDestroy(void* graph) { return delete static_cast<std::shared_ptr<Graph>*>(graph), SUCCESS; }
int cuGraphExecDestroy(void* runnable) { return delete static_cast<RunnableGraph*>(runnable), SUCCESS; }

} // extern "C"
