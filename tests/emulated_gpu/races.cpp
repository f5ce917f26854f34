#include "races.h"

#include <dlfcn.h>
#include <string.h>
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

// The last accesses to some bytes. Readers are many: of them it keeps the last, and whether there were others.
struct Cell {
    uint32_t write_time, read_time;
    uint32_t write_at, read_at; // Code, relative to where the kernel's library begins.
    uint16_t writer, reader;    // Threads, and flags.
    uint16_t write_sync, read_sync; // How often their warp had come to __syncwarp.
};

constexpr size_t WORD_BYTES = 4;

// Of a word that was accessed whole; once it is accessed in parts, until the launch ends, its bytes have cells of their own.
struct WordCell : Cell {
    uint32_t split_time;
    uint32_t written_time; // The last write of any of its bytes.
    uint32_t written;      // Those that kernels have written, a bit each; in shared memory those that this block has.
};

constexpr uint16_t THREAD = 1023;
constexpr uint16_t ATOMIC = 1 << 10;
constexpr uint16_t OTHER_LANES = 1 << 11; // Of the same warp.
constexpr uint16_t OTHER_WARPS = 1 << 12;
constexpr uint16_t OTHER_BLOCKS = 1 << 13;

// Memory that kernels share, and what is known of it.
struct Area {
    const unsigned char* start; // A multiple of a word's bytes.
    size_t n_bytes;
    WordCell* words;
    Cell* bytes;
    size_t n_reserved; // Bytes that there are cells for.

    void reserve(const unsigned char* from, size_t n) {
        const uintptr_t lost = reinterpret_cast<uintptr_t>(from) % WORD_BYTES;
        start = from - lost;
        n_bytes = n + lost;
        if (n_bytes <= n_reserved) return;
        if (n_reserved) {
            munmap(words, n_words() * sizeof(WordCell));
            munmap(bytes, n_words() * WORD_BYTES * sizeof(Cell));
        }
        n_reserved = n_bytes;
        words = static_cast<WordCell*>(zeros(n_words() * sizeof(WordCell)));
        bytes = static_cast<Cell*>(zeros(n_words() * WORD_BYTES * sizeof(Cell)));
    }

  private:
    size_t n_words() const { return n_reserved / WORD_BYTES + 1; }

    // That take memory where they are written.
    static void* zeros(size_t n) {
        void* made = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) die("no addresses to keep accesses to memory\n");
        return made;
    }
};

Area& device_area() {
    static Area& all = *[] {
        Area* made = new Area();
        made->reserve(device_start, DEVICE_SPAN);
        return made;
    }();
    return all;
}

// Of one OS thread.
__thread Area dynamic_area, static_area;
__thread const Area* areas[3]; // With the one that is the same for all.
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

// Those of a word at `from`, a bit each, that are between two places.
inline unsigned bytes_of_word(size_t from, size_t first, size_t end) {
    const size_t low = first > from ? first - from : 0, high = end < from + WORD_BYTES ? end - from : WORD_BYTES;
    return (1u << high) - (1u << low);
}

// Whether these bytes of a word, a bit each, are numbers that nothing has written: none of them, so that a read of a word of
// which half is written passes. They look like NOTHING, as what the host and other libraries write does not: only kernels are
// asked for what they write.
inline __attribute__((always_inline)) bool is_unwritten(const WordCell& word, unsigned bytes, const unsigned char* at,
                                                        bool is_shared_memory) {
    uint32_t content, mask = 0;
    memcpy(&content, at, WORD_BYTES);
    for (unsigned i = 0; i < WORD_BYTES; i++) mask |= bytes >> i & 1 ? 0xffu << 8 * i : 0;
    if ((content ^ uint32_t(NOTHING)) & mask) return false;
    const bool has_writes = word.written_time >= (is_shared_memory ? time_of_block.block : 1);
    // A byte may be anything.
    return (bytes & (bytes - 1)) && !(has_writes && word.written & bytes);
}

[[noreturn]] void unwritten(const void* address, const Identity& thread, const void* at) {
    std::string text;
    say(text, "thread %u reads what nothing has written: %p, %s\n", thread.number, address, describe(address).c_str());
    say(text, "  at  %s\n", place(at).c_str());
    die_in_kernel(text);
}

inline __attribute__((always_inline)) void check_each(Access access, const void* address, size_t n, const Identity& thread,
                                                     const void* at) {
    const unsigned char* const start = static_cast<const unsigned char*>(address);
    const Area* area = nullptr;
    for (const Area* candidate : areas)
        if (size_t(start - candidate->start) < candidate->n_bytes) area = candidate;
    if (!area) return;
    const auto check = [&](Cell& cell) {
        // Read before in this phase, by this thread or by so many that no other may be added: nothing has been written since,
        // or that would have been a race.
        if (access == Access::Read && cell.read_time == time_of_block.now &&
            ((cell.reader & OTHER_WARPS) ||
             ((cell.reader & THREAD) == thread.number && cell.read_sync == uint16_t(*thread.n_syncs))))
            return;
        check_cell(cell, access, address, thread, area != areas[0], at);
    };
    const size_t first = size_t(start - area->start), end = first + n;
    for (size_t word = first / WORD_BYTES; word * WORD_BYTES < end; word++) {
        WordCell& whole = area->words[word];
        const size_t from = word * WORD_BYTES, to = from + WORD_BYTES;
        const bool is_split = whole.split_time >= time_of_block.launch;
        const unsigned bytes = bytes_of_word(from, first, end);
        if (access != Access::Write && is_unwritten(whole, bytes, area->start + from, area != areas[0]))
            unwritten(area->start + from, thread, at);
        if (access != Access::Read) {
            if (area != areas[0] && whole.written_time < time_of_block.block) whole.written = 0;
            whole.written |= bytes;
            whole.written_time = time_of_block.now;
        }
        if (!is_split && first <= from && to <= end) {
            check(whole);
            continue;
        }
        if (!is_split) {
            for (size_t byte = from; byte < to; byte++) area->bytes[byte] = whole;
            whole.split_time = time_of_block.now;
        }
        for (unsigned byte = 0; byte < WORD_BYTES; byte++)
            if (bytes >> byte & 1) check(area->bytes[from + byte]);
    }
}

} // namespace

bool races_are_found() { return is_on; }

const void* first_unwritten(const void* start, size_t bytes) {
    if (!is_on || !bytes) return nullptr;
    const Area& area = device_area();
    const size_t first = size_t(static_cast<const unsigned char*>(start) - area.start), end = first + bytes;
    for (size_t word = first / WORD_BYTES; word * WORD_BYTES < end; word++) {
        const size_t from = word * WORD_BYTES;
        const unsigned own = bytes_of_word(from, first, end);
        if (is_unwritten(area.words[word], own, area.start + from, false)) return area.start + from;
    }
    return nullptr;
}

void start_launch() {
    if (!is_on) return;
    const SharedMemory& shared = shared_memory();
    library = library_of_kernel();
    dynamic_area.reserve(shared.dynamic_start, shared.dynamic_span);
    static_area.reserve(shared.static_start, shared.static_bytes);
    areas[0] = &device_area();
    areas[1] = &dynamic_area;
    areas[2] = &static_area;
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
    // The pages of cells that these are in: around them, nothing is accessed.
    const auto drop = [](void* from, size_t n) {
        const uintptr_t first = reinterpret_cast<uintptr_t>(from) & ~uintptr_t(4095);
        madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(from) + n - first, MADV_DONTNEED);
    };
    const size_t word = size_t(static_cast<const unsigned char*>(start) - device_start) / WORD_BYTES, n = bytes / WORD_BYTES;
    drop(device_area().words + word, n * sizeof(WordCell));
    drop(device_area().bytes + word * WORD_BYTES, n * WORD_BYTES * sizeof(Cell));
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
    if (is_on) on_access(Access::Atomic, address, bytes, __builtin_return_address(0));
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
