// The memory of the emulated device: each allocation alone between addresses that fault, and filled with NOTHING.
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>

#include "machine.h"
#include "races.h"

namespace emulated {

unsigned char* device_start;

namespace {

constexpr size_t PAGE = 4096;
// Between two allocations.
constexpr size_t EMPTY_BYTES = 128 << 10;
// As many released allocations keep their addresses, so that these fault.
constexpr size_t MAX_RELEASED = 4096;

// Its end is where a page ends, as far as alignment allows.
struct Allocation {
    unsigned char* start; // What the program knows.
    size_t bytes;
    unsigned char* pages;
    size_t page_bytes;
};

typedef std::map<uintptr_t, Allocation> Allocations; // By the first byte of their pages.

struct Memory {
    std::mutex lock;
    Allocations live, released;
    std::deque<uintptr_t> by_age; // The released ones.
    unsigned char* next;
    size_t bytes = 0, peak_bytes = 0;

    Memory() {
        void* all = mmap(nullptr, DEVICE_SPAN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) die("no addresses for the emulated device\n");
        device_start = next = static_cast<unsigned char*>(all);
    }
};

// Lives as long as the process.
Memory& memory() {
    static Memory& all = *new Memory();
    return all;
}

// The allocation whose pages, or the emptiness around them, hold an address.
const Allocation* find(const Allocations& in, const void* address) {
    const unsigned char* at = static_cast<const unsigned char*>(address);
    auto next = in.upper_bound(reinterpret_cast<uintptr_t>(at));
    if (next != in.end() && at + EMPTY_BYTES / 2 >= next->second.pages) return &next->second;
    if (next == in.begin()) return nullptr;
    const Allocation& before = std::prev(next)->second;
    return at < before.pages + before.page_bytes + EMPTY_BYTES / 2 ? &before : nullptr;
}

// Bytes for pages and the emptiness behind them, from `next` on, that nothing has now.
unsigned char* find_space(Memory& all, size_t bytes) {
    for (int round = 0; round < 2; round++) {
        while (all.next + EMPTY_BYTES + bytes <= device_start + DEVICE_SPAN) {
            unsigned char* const start = all.next + EMPTY_BYTES;
            unsigned char* taken_end = nullptr;
            for (const Allocations* in : {&all.live, &all.released}) {
                auto behind = in->lower_bound(reinterpret_cast<uintptr_t>(start + bytes));
                if (behind == in->begin()) continue;
                const Allocation& last = std::prev(behind)->second;
                if (last.pages + last.page_bytes + EMPTY_BYTES > start)
                    taken_end = std::max(taken_end, last.pages + last.page_bytes);
            }
            if (!taken_end) return start;
            all.next = taken_end;
        }
        all.next = device_start;
    }
    return nullptr;
}

bool is_nothing(const unsigned char* start, const unsigned char* end) {
    for (; start < end; start++)
        if (*start != (reinterpret_cast<uintptr_t>(start) % 2 ? 0x7f : 0xff)) return false;
    return true;
}

std::string edges_of(const Allocation& it) {
    std::string text;
    if (!is_nothing(it.pages, it.start)) say(text, "something was written before the %zu bytes at %p", it.bytes, it.start);
    else if (!is_nothing(it.start + it.bytes, it.pages + it.page_bytes))
        say(text, "something was written behind the %zu bytes at %p", it.bytes, it.start);
    return text;
}

} // namespace

void* allocate(size_t bytes) {
    Memory& all = memory();
    // The device aligns to 256; here the end is what counts, and 16 is what kernels ask for.
    const size_t aligned = (std::max(bytes, size_t(1)) + 15) / 16 * 16;
    Allocation it;
    it.bytes = bytes;
    it.page_bytes = (aligned + PAGE - 1) / PAGE * PAGE;
    {
        const std::lock_guard<std::mutex> lock(all.lock);
        it.pages = find_space(all, it.page_bytes);
        if (!it.pages || mprotect(it.pages, it.page_bytes, PROT_READ | PROT_WRITE)) return nullptr;
        it.start = it.pages + it.page_bytes - aligned;
        all.live[reinterpret_cast<uintptr_t>(it.pages)] = it;
        all.next = it.pages + it.page_bytes;
        all.bytes += bytes;
        all.peak_bytes = std::max(all.peak_bytes, all.bytes);
    }
    fill_with_nothing(it.pages, it.page_bytes);
    return it.start;
}

void release(void* address) {
    Memory& all = memory();
    const std::lock_guard<std::mutex> lock(all.lock);
    const Allocation* found = find(all.live, address);
    if (!found || found->start != address) {
        std::string text;
        say(text, "released what is no allocation: %p\n", address);
        die(text);
    }
    const Allocation it = *found;
    const std::string written = edges_of(it);
    if (!written.empty()) die(written + " by a kernel that has run since\n");
    madvise(it.pages, it.page_bytes, MADV_DONTNEED);
    mprotect(it.pages, it.page_bytes, PROT_NONE);
    forget_accesses(it.pages, it.page_bytes);
    const uintptr_t key = reinterpret_cast<uintptr_t>(it.pages);
    all.bytes -= it.bytes;
    all.live.erase(key);
    all.released[key] = it;
    all.by_age.push_back(key);
    while (all.by_age.size() > MAX_RELEASED) {
        all.released.erase(all.by_age.front());
        all.by_age.pop_front();
    }
}

bool is_allocated(const void* address, size_t bytes) {
    Memory& all = memory();
    const std::lock_guard<std::mutex> lock(all.lock);
    const Allocation* it = find(all.live, address);
    const unsigned char* start = static_cast<const unsigned char*>(address);
    // The end of a tensor is an address too.
    return it && start >= it->start && start + bytes <= it->start + it->bytes;
}

void check_edges(const void* address, const char* writer) {
    std::string written;
    {
        const std::lock_guard<std::mutex> lock(memory().lock);
        const Allocation* it = find(memory().live, address);
        if (it) written = edges_of(*it);
    }
    if (!written.empty()) die(written + " by " + writer + ", or a kernel before it\n");
}

std::string describe(const void* address) {
    Memory& all = memory();
    // Told from a fault, perhaps: the lock may be held.
    const std::unique_lock<std::mutex> lock(all.lock, std::try_to_lock);
    const unsigned char* at = static_cast<const unsigned char*>(address);
    std::string text = describe_shared(address);
    if (!text.empty()) return text;
    if (const Allocation* it = find(all.live, address)) {
        if (at < it->start) say(text, "%zu bytes before", size_t(it->start - at));
        else if (at >= it->start + it->bytes) say(text, "%zu bytes behind the end of", size_t(at - it->start - it->bytes));
        else say(text, "%zu bytes into", size_t(at - it->start));
        say(text, " the %zu bytes of device memory at %p", it->bytes, it->start);
    } else if (const Allocation* it = find(all.released, address)) {
        say(text, "%td bytes into the %zu bytes at %p that were released", at - it->start, it->bytes, it->start);
    } else {
        text = "which is no device memory";
    }
    return text;
}

void forget(void* address) {
    const std::lock_guard<std::mutex> lock(memory().lock);
    const Allocation* it = find(memory().live, address);
    if (!it) return;
    fill_with_nothing(it->pages, it->page_bytes);
    forget_accesses(it->pages, it->page_bytes);
}

size_t allocated_bytes() {
    const std::lock_guard<std::mutex> lock(memory().lock);
    return memory().bytes;
}

size_t& peak_bytes() { return memory().peak_bytes; }

} // namespace emulated
