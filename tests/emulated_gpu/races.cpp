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

// Memory that kernels share, and what is known of it.
struct Area {
    const unsigned char* start;
    size_t bytes;
    Cell* cells;
};
// Of one OS thread.
__thread Area device_area, dynamic_area, static_area;
__thread size_t n_static_bytes; // That there are cells for.
__thread const unsigned char* library; // Of the kernel.

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

[[noreturn]] void race(Access access, const void* address, const Identity& thread, const void* at, Access before, uint16_t who,
                       uint32_t where, bool is_other_block) {
    std::string text;
    say(text, "a race: thread %u %s %p, %s\n", thread.number, name_of(access), address, describe(address).c_str());
    say(text, "  at  %s\n", place(at).c_str());
    say(text, "  thread %u of %s %s it, and nothing orders the two\n  at  %s\n", unsigned(who & THREAD),
        is_other_block ? "another block" : "the block", name_of(before), place(library + where).c_str());
    die_in_kernel(text);
}

__attribute__((noinline)) void check_cell(Cell& cell, Access access, const void* address, const Identity& identity,
                                          bool is_shared_memory, const void* at) {
    const unsigned thread = identity.number;
    const uint16_t sync = uint16_t(*identity.n_syncs);
    const uint32_t where = uint32_t(static_cast<const unsigned char*>(at) - library);
    const uint32_t now = time_of_block.now;
    if (cell.write_time >= time_of_block.launch) {
        const Order order = order_of(cell.write_time, cell.writer, cell.write_sync, thread, sync, is_shared_memory);
        const bool are_atomic = access == Access::Atomic && (cell.writer & ATOMIC);
        const bool is_other = order > Order::SameThread || (order == Order::SameThread && (cell.writer & OTHER_LANES));
        if (is_other && !are_atomic)
            race(access, address, identity, at, cell.writer & ATOMIC ? Access::Atomic : Access::Write, cell.writer, cell.write_at,
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
            race(access, address, identity, at, Access::Read, cell.reader, cell.read_at, by_other_block || order == Order::OtherBlock);
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

inline __attribute__((always_inline)) void check_each(Access access, const void* address, size_t bytes, const Identity& thread, const void* at) {
    const unsigned char* const start = static_cast<const unsigned char*>(address);
    const auto holds = [=](const Area& area) { return size_t(start - area.start) < area.bytes; };
    const Area* const area = holds(dynamic_area)  ? &dynamic_area
                             : holds(device_area) ? &device_area
                             : holds(static_area) ? &static_area
                                                  : nullptr;
    if (!area) return;
    const size_t offset = size_t(start - area->start);
    for (size_t i = offset / BYTES_PER_CELL; i <= (offset + bytes - 1) / BYTES_PER_CELL; i++) {
        Cell& cell = area->cells[i];
        // Read before in this phase, by this thread or by so many that no other may be added: nothing has been written since,
        // or that would have been a race.
        if (access == Access::Read && cell.read_time == time_of_block.now &&
            ((cell.reader & OTHER_WARPS) ||
             ((cell.reader & THREAD) == thread.number && cell.read_sync == uint16_t(*thread.n_syncs))))
            continue;
        check_cell(cell, access, address, thread, area != &device_area, at);
    }
}

} // namespace

bool races_are_found() { return is_on; }

void start_launch() {
    if (!is_on) return;
    const SharedMemory& shared = shared_memory();
    library = library_of_kernel();
    device_area = {device_start, DEVICE_SPAN, device_cells()};
    Cell* const cells = dynamic_area.cells ? dynamic_area.cells : reserve_cells(shared.dynamic_span);
    dynamic_area = {shared.dynamic_start, shared.dynamic_span, cells};
    static_area.start = shared.static_start;
    static_area.bytes = shared.static_bytes;
    if (n_static_bytes < shared.static_bytes) {
        if (static_area.cells) munmap(static_area.cells, (n_static_bytes / BYTES_PER_CELL + 1) * sizeof(Cell));
        n_static_bytes = shared.static_bytes;
        static_area.cells = reserve_cells(n_static_bytes);
    }
    time_of_block.launch = last_time.fetch_add(1) + 1;
}

void start_block() {
    time_of_block.block = time_of_block.now = last_time.fetch_add(1) + 1;
    time_of_block.has_fenced = false;
}

void pass_barrier() { time_of_block.now = last_time.fetch_add(1) + 1; }

void check_access(Access access, const void* address, size_t bytes, const Identity& thread, const void* at) {
    if (is_on) check_each(access, address, bytes, thread, at);
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

inline __attribute__((always_inline)) void on_access(Access access, const void* address, size_t bytes, void* returns_to) {
    if (here.thread) check_each(access, address, bytes, *here.thread, static_cast<char*>(returns_to) - 1);
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
