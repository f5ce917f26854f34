#include "races.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <string>

#include "machine.h"

namespace emulated {

__thread Clock time_of_block;

namespace {

// Whether kernels are compiled for it.
bool is_on = false;

std::atomic<uint32_t> last_time{1};

// The last accesses to two bytes. Readers are many: of them it keeps the last, and whether there were others.
struct Cell {
    uint32_t write_time, read_time;
    uint32_t write_at, read_at; // Code, relative to where the kernel's library begins.
    uint16_t writer, reader;    // Threads, and flags.
    uint16_t write_sync, read_sync; // How often their warp had come to __syncwarp.
};
constexpr uint16_t THREAD = 1023;
constexpr uint16_t ATOMIC = 1 << 10;
constexpr uint16_t OTHER_LANES = 1 << 11; // Of the same warp.
constexpr uint16_t OTHER_WARPS = 1 << 12;
constexpr uint16_t OTHER_BLOCKS = 1 << 13;

constexpr size_t BYTES_PER_CELL = 2;

Cell* reserve_cells(size_t bytes) {
    const size_t size = (bytes / BYTES_PER_CELL + 1) * sizeof(Cell);
    void* cells = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return cells == MAP_FAILED ? nullptr : static_cast<Cell*>(cells);
}

Cell* device_cells() {
    static Cell* const all = reserve_cells(DEVICE_SPAN);
    if (!all) die("no addresses to keep accesses to the emulated device\n");
    return all;
}

// Of one OS thread.
__thread Cell *dynamic_cells, *static_cells;
__thread size_t n_static_bytes;

enum class Order { Before, SameThread, SameWarp, SameBlock, OtherBlock };

// How an access that was is ordered against one that is now, by another or the same thread.
Order order_of(uint32_t time, uint16_t who, uint16_t sync, unsigned thread, uint16_t sync_now, bool is_shared_memory) {
    const Clock& clock = time_of_block;
    if (time < clock.launch) return Order::Before;
    if (time < clock.block) return is_shared_memory || clock.has_fenced ? Order::Before : Order::OtherBlock;
    if (time < clock.now) return Order::Before;
    const unsigned other = who & THREAD;
    if (other / 32 != thread / 32) return Order::SameBlock;
    if (sync != sync_now) return Order::Before;
    return other == thread ? Order::SameThread : Order::SameWarp;
}

const char* name_of(Access access) {
    return access == Access::Read ? "reads" : access == Access::Write ? "writes" : "atomically changes";
}

[[noreturn]] void race(Access access, const void* address, unsigned thread, const void* at, Access before, uint16_t who,
                       uint32_t where, bool is_other_block) {
    std::string text;
    say(text, "a race: thread %u %s %p, %s\n", thread, name_of(access), address, describe(address).c_str());
    say(text, "  at  %s\n", place(at).c_str());
    say(text, "  thread %u of %s %s it, and nothing orders the two\n  at  %s\n", unsigned(who & THREAD),
        is_other_block ? "another block" : "the block", name_of(before), place(library_of_kernel() + where).c_str());
    die_in_kernel(text);
}

void check_cell(Cell& cell, Access access, const void* address, unsigned thread, uint16_t sync, bool is_shared_memory,
                const void* at) {
    const uint32_t where = uint32_t(static_cast<const unsigned char*>(at) - library_of_kernel());
    const uint32_t now = time_of_block.now;
    if (cell.write_time >= time_of_block.launch) {
        const Order order = order_of(cell.write_time, cell.writer, cell.write_sync, thread, sync, is_shared_memory);
        const bool are_atomic = access == Access::Atomic && (cell.writer & ATOMIC);
        const bool is_other = order > Order::SameThread || (order == Order::SameThread && (cell.writer & OTHER_LANES));
        if (is_other && !are_atomic)
            race(access, address, thread, at, cell.writer & ATOMIC ? Access::Atomic : Access::Write, cell.writer, cell.write_at,
                 order == Order::OtherBlock);
    }
    const bool was_read = cell.read_time >= time_of_block.launch;
    const Order order =
        was_read ? order_of(cell.read_time, cell.reader, cell.read_sync, thread, sync, is_shared_memory) : Order::Before;
    if (access != Access::Read) {
        const bool by_other_block = was_read && (cell.reader & OTHER_BLOCKS) && !is_shared_memory && !time_of_block.has_fenced;
        const bool by_other_warp = cell.read_time == now && (cell.reader & OTHER_WARPS);
        const bool by_other_lane = order == Order::SameThread && (cell.reader & OTHER_LANES);
        if (order > Order::SameThread || by_other_block || by_other_warp || by_other_lane)
            race(access, address, thread, at, Access::Read, cell.reader, cell.read_at, by_other_block || order == Order::OtherBlock);
        uint16_t flags = access == Access::Atomic ? ATOMIC : 0;
        if (access == Access::Atomic && cell.write_time == now && (cell.writer & THREAD) != thread) flags |= OTHER_LANES;
        if (access == Access::Atomic && cell.write_time == now) flags |= cell.writer & OTHER_LANES;
        cell.write_time = now;
        cell.write_at = where;
        cell.writer = uint16_t(thread | flags);
        cell.write_sync = sync;
        return;
    }
    uint16_t flags = 0;
    if (was_read && !is_shared_memory) {
        flags |= cell.reader & OTHER_BLOCKS;
        if (cell.read_time < time_of_block.block) flags |= OTHER_BLOCKS;
    }
    if (cell.read_time == now) {
        flags |= cell.reader & OTHER_WARPS;
        if (order == Order::SameBlock) flags |= OTHER_WARPS;
        if (order == Order::SameThread) flags |= cell.reader & OTHER_LANES;
        if (order == Order::SameWarp) flags |= OTHER_LANES;
    }
    cell.read_time = now;
    cell.read_at = where;
    cell.reader = uint16_t(thread | flags);
    cell.read_sync = sync;
}

} // namespace

bool races_are_found() { return is_on; }

void start_launch() {
    if (!is_on) return;
    if (!dynamic_cells) dynamic_cells = reserve_cells(shared_memory().dynamic_span);
    if (n_static_bytes < shared_memory().static_bytes) {
        if (static_cells) munmap(static_cells, (n_static_bytes / BYTES_PER_CELL + 1) * sizeof(Cell));
        n_static_bytes = shared_memory().static_bytes;
        static_cells = reserve_cells(n_static_bytes);
    }
    time_of_block.launch = last_time.fetch_add(1) + 1;
}

void start_block() {
    time_of_block.block = time_of_block.now = last_time.fetch_add(1) + 1;
    time_of_block.has_fenced = false;
}

void pass_barrier() { time_of_block.now = last_time.fetch_add(1) + 1; }

void check_access(Access access, const void* address, size_t bytes, unsigned thread, const void* at) {
    if (!is_on) return;
    const unsigned char* const start = static_cast<const unsigned char*>(address);
    const SharedMemory& shared = shared_memory();
    Cell* cells;
    size_t offset;
    bool is_shared_memory = true;
    if (size_t(start - device_start) < DEVICE_SPAN) {
        cells = device_cells();
        offset = size_t(start - device_start);
        is_shared_memory = false;
    } else if (size_t(start - shared.dynamic_start) < shared.dynamic_span) {
        cells = dynamic_cells;
        offset = size_t(start - shared.dynamic_start);
    } else if (size_t(start - shared.static_start) < shared.static_bytes) {
        cells = static_cells;
        offset = size_t(start - shared.static_start);
    } else {
        return;
    }
    const uint16_t sync = uint16_t(syncs_of_warp(thread / 32));
    for (size_t i = offset / BYTES_PER_CELL; i <= (offset + bytes - 1) / BYTES_PER_CELL; i++)
        check_cell(cells[i], access, address, thread, sync, is_shared_memory, at);
}

void forget_accesses(const void* start, size_t bytes) {
    if (!is_on) return;
    Cell* const first = device_cells() + size_t(static_cast<const unsigned char*>(start) - device_start) / BYTES_PER_CELL;
    madvise(first, bytes / BYTES_PER_CELL * sizeof(Cell), MADV_DONTNEED);
}

void fence() { time_of_block.has_fenced = true; }

} // namespace emulated

// --------------------------------------------------------------------------------------------------- what the compiler calls

using namespace emulated;

namespace {

inline void on_access(Access access, const void* address, size_t bytes, void* returns_to) {
    const int thread = running_thread();
    if (thread >= 0) check_access(access, address, bytes, unsigned(thread), static_cast<char*>(returns_to) - 1);
}

} // namespace

void emulated::atomic_access(const void* address, size_t bytes) {
    on_access(Access::Atomic, address, bytes, __builtin_return_address(0));
}

#define ACCESS(name, access, bytes) \
    extern "C" void name(void* address) { on_access(Access::access, address, bytes, __builtin_return_address(0)); }
#define ACCESSES(bytes)                                      \
    ACCESS(__tsan_read##bytes, Read, bytes)                  \
    ACCESS(__tsan_write##bytes, Write, bytes)                \
    ACCESS(__tsan_unaligned_read##bytes, Read, bytes)        \
    ACCESS(__tsan_unaligned_write##bytes, Write, bytes)      \
    ACCESS(__tsan_volatile_read##bytes, Read, bytes)         \
    ACCESS(__tsan_volatile_write##bytes, Write, bytes)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

extern "C" {

void __tsan_init() { is_on = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* address, size_t bytes) { on_access(Access::Read, address, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* address, size_t bytes) { on_access(Access::Write, address, bytes, __builtin_return_address(0)); }

} // extern "C"
