// Launches of emulated kernels: fibers, and what they wait for.
#include "machine.h"

#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>

#include "races.h"

namespace emulated {

__thread Here here;

// ----------------------------------------------------------------------------------------------------------------- fibers

// Saves where this fiber is, and goes on where another one was.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");

namespace {

constexpr int MAX_THREADS = 1024;
constexpr size_t PAGE = 4096, STACK_BYTES = 128 << 10;

struct Copy {
    void* to;
    const void* from;
    bool valid;
    int group;
};

} // namespace

struct Thread : Identity {
    void* stack_pointer;
    // What it waits for, if it does; `caller` is the address behind the call.
    const char* waits_for;
    int line;
    void* caller;
    std::vector<Copy> copies;
    int n_groups;
    // Rows that its copies have written, and no fence has shown to products yet.
    std::vector<const void*> unshown;
    // Products under way, and what their results are added to.
    std::vector<GroupProduct> products;
    std::map<float*, std::vector<float>> sums;
    int n_product_groups;
};

namespace {

// The lanes of a mask meet again and again: while some still read what was brought to one meeting, others come to the next.
struct Meetings {
    unsigned mask, n_concluded;
    const char* what;
    int line;
    void (*conclude)(Meeting&);
    Meeting turns[2];

    Meeting& next() { return turns[n_concluded % 2]; }
};

// As many masks may be in use in a warp during a block.
constexpr int MAX_MASKS = 64;

struct Warp {
    unsigned live, runnable, n_syncs;
    int n_masks;
    Meetings meetings[MAX_MASKS];
};

enum class Order { Forward, Backward, Random };

struct Machine {
    Thread threads[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    unsigned runnable_warps;
    int n_live, n_at_barrier;
    const char* barrier;
    int barrier_line;
    int n_barriers;
    int n_brought[2];
    Thread* running;
    void* launcher;
    const Launch* launch;
    Order order;
    uint64_t random;
    // The dynamic shared memory ends where these bytes end, and a fault comes behind them.
    size_t shared_bytes;
    // Static shared memory is all thread-local memory of the library of the kernel.
    SharedMemory shared;
    const unsigned char* library;

    Machine();
    void choose_order();
    void wait();
    void conclude(Warp& warp, Meetings& meetings);
    void conclude_without_the_dead(Warp& warp);
    bool release_barrier();
    unsigned pick(unsigned mask);
};

__thread Machine* machine;

[[noreturn]] void fiber_main() {
    for (;;) {
        const Kernel& kernel = *machine->launch->kernel;
        kernel.run(kernel, machine->launch->arguments);
        Thread& self = *machine->running;
        Warp& warp = machine->warps[self.warp];
        warp.live &= ~(1u << self.lane);
        machine->n_live--;
        machine->conclude_without_the_dead(warp);
        machine->release_barrier();
        machine->wait();
    }
}

Machine::Machine() {
    // Each stack starts at other cache lines than the next.
    const size_t pitch = STACK_BYTES + PAGE;
    void* stacks = mmap(nullptr, MAX_THREADS * pitch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) fail("no memory for the stacks of emulated threads", nullptr);
    for (int i = 0; i < MAX_THREADS; i++) {
        unsigned char* start = static_cast<unsigned char*>(stacks) + i * pitch;
        mprotect(start, PAGE, PROT_NONE);
        uintptr_t top = reinterpret_cast<uintptr_t>(start + pitch) - 64 * size_t(i % 61) - 64;
        void** frame = reinterpret_cast<void**>(top);
        *--frame = nullptr; // A caller of fiber_main, whose frame is aligned as if it were called.
        *--frame = reinterpret_cast<void*>(&fiber_main);
        for (int saved = 0; saved < 6; saved++) *--frame = nullptr;
        threads[i].stack_pointer = frame;
    }
    shared.dynamic_span = (MAX_SHARED_BYTES + PAGE - 1) / PAGE * PAGE;
    void* area = mmap(nullptr, shared.dynamic_span + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    shared.dynamic_start = static_cast<unsigned char*>(area) + PAGE;
    if (area == MAP_FAILED || mprotect(shared.dynamic_start, shared.dynamic_span, PROT_READ | PROT_WRITE))
        fail("no memory for the shared memory of emulated blocks", nullptr);
    order = Order::Forward;
}

void Machine::choose_order() {
    const char* wish = getenv("TITAN_EMULATED_ORDER");
    const std::string name = wish ? wish : "forward";
    random = 1;
    if (name == "forward") order = Order::Forward;
    else if (name == "backward") order = Order::Backward;
    else if (name.compare(0, 6, "random") == 0) {
        order = Order::Random;
        if (name.size() > 7) random = strtoull(name.c_str() + 7, nullptr, 10) * 2 + 1;
    } else fail("TITAN_EMULATED_ORDER is forward, backward, random or random:SEED", nullptr);
}

// One of the numbers in a mask that is not empty.
unsigned Machine::pick(unsigned mask) {
    if (order == Order::Forward) return unsigned(__builtin_ctz(mask));
    if (order == Order::Backward) return 31 - unsigned(__builtin_clz(mask));
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    for (unsigned skip = unsigned((random >> 20) % unsigned(__builtin_popcount(mask))); skip > 0; skip--) mask &= mask - 1;
    return unsigned(__builtin_ctz(mask));
}

} // namespace

// ----------------------------------------------------------------------------------------------------------------- faults

std::string place(const void* address) {
    Dl_info info;
    if (!address || !dladdr(address, &info) || !info.dli_fname) return "?";
    char command[512];
    snprintf(command, sizeof(command), "addr2line -Cfips -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
             static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase));
    std::string text;
    if (FILE* pipe = popen(command, "r")) {
        char line[512];
        while (fgets(line, sizeof(line), pipe)) text += text.empty() ? line : std::string("      ") + line;
        pclose(pipe);
    }
    while (!text.empty() && text.back() == '\n') text.pop_back();
    if (text.empty()) text = info.dli_sname ? info.dli_sname : info.dli_fname;
    return text;
}

void say(std::string& text, const char* format, ...) {
    char line[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof(line), format, values);
    va_end(values);
    text += line;
}

namespace {

// The address of a call, from where it returns to.
const void* call_of(const void* returns_to) { return returns_to ? static_cast<const char*>(returns_to) - 1 : nullptr; }

void say_where(std::string& text) {
    if (!machine || !machine->launch) return;
    const Launch& launch = *machine->launch;
    say(text, "  kernel %s, grid %u %u %u, block %u, %zu bytes of dynamic shared memory\n", launch.kernel->name, launch.grid.x,
        launch.grid.y, launch.grid.z, launch.block.x, launch.shared_bytes);
    if (!machine->running) return;
    const uint3 thread = machine->running->index;
    say(text, "  block %u %u %u, thread %u", here.block.x, here.block.y, here.block.z, thread.x);
    if (launch.block.y * launch.block.z > 1) say(text, " %u %u", thread.y, thread.z);
    say(text, " (warp %u, lane %u)\n", machine->running->warp, machine->running->lane);
}

} // namespace

void die(const std::string& text) {
    signal(SIGABRT, SIG_DFL);
    const std::string all = "emulated GPU: " + text;
    if (write(STDERR_FILENO, all.data(), all.size()) < 0) {
    }
    abort();
}

void die_in_kernel(std::string text) {
    say_where(text);
    die(text);
}

namespace {

// Nobody can go on, but some threads of the block have not ended.
[[noreturn]] void deadlock() {
    std::string text = "threads wait for threads that do not come\n";
    machine->running = nullptr;
    say_where(text);
    say(text, "  block %u %u %u\n", here.block.x, here.block.y, here.block.z);
    std::map<std::pair<void*, std::string>, std::vector<const Thread*>> groups;
    const unsigned n_threads = machine->launch->block.x * machine->launch->block.y * machine->launch->block.z;
    unsigned n_ended = 0;
    for (unsigned i = 0; i < n_threads; i++) {
        const Thread& thread = machine->threads[i];
        if ((machine->warps[thread.warp].live >> thread.lane) & 1) groups[{thread.caller, thread.waits_for}].push_back(&thread);
        else n_ended++;
    }
    for (const auto& [at, threads] : groups) {
        say(text, "  %zu threads (", threads.size());
        for (size_t i = 0; i < threads.size() && i < 8; i++) say(text, "%s%u", i ? " " : "", threads[i]->number);
        say(text, "%s) wait at %s\n      %s\n", threads.size() > 8 ? " .." : "", threads[0]->waits_for,
            place(call_of(at.first)).c_str());
    }
    if (n_ended) say(text, "  %u threads have ended\n", n_ended);
    die(text);
}

} // namespace

void fail(const char* what, const void* returns_to) {
    std::string text = std::string(what) + "\n";
    if (returns_to) text += "  at  " + place(call_of(returns_to)) + "\n";
    die_in_kernel(text);
}

namespace {

struct sigaction previous[65];

void on_fault(int number, siginfo_t* info, void* context) {
    if (!machine || !machine->running) {
        // Not of a kernel: whoever was asked before is asked again.
        sigaction(number, &previous[number], nullptr);
        return;
    }
    const ucontext_t* at = static_cast<const ucontext_t*>(context);
    std::string text;
    if (number == SIGSEGV || number == SIGBUS)
        say(text, "a kernel touches %p, %s\n", info->si_addr, describe(info->si_addr).c_str());
    else if (number == SIGILL) text = "a kernel reads or writes a misaligned address, or outside of an array\n";
    else text = "a kernel divides by zero\n";
    text += "  at  " + place(reinterpret_cast<void*>(at->uc_mcontext.gregs[REG_RIP])) + "\n";
    die_in_kernel(text);
}

// Faults on the stack of a fiber are told on another one.
void prepare_signal_stack() {
    stack_t current;
    if (sigaltstack(nullptr, &current) || !(current.ss_flags & SS_DISABLE)) return;
    stack_t own = {};
    own.ss_size = 256 << 10;
    own.ss_sp = malloc(own.ss_size);
    sigaltstack(&own, nullptr);
}

} // namespace

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(number, &action, &previous[number]);
    });
}

// ----------------------------------------------------------------------------------------------------------------- waiting

// Lets another thread go on until this one can.
void Machine::wait() {
    Thread* const self = running;
    Thread* next;
    unsigned warp = self->warp;
    if (order == Order::Random || !warps[warp].runnable) {
        if (!runnable_warps) {
            if (n_live > 0) deadlock();
            here.thread = nullptr;
            emulated_switch(&self->stack_pointer, launcher);
            return;
        }
        warp = pick(runnable_warps);
    }
    next = &threads[warp * 32 + pick(warps[warp].runnable)];
    warps[warp].runnable &= ~(1u << next->lane);
    if (!warps[warp].runnable) runnable_warps &= ~(1u << warp);
    if (next == self) return;
    running = next;
    here.thread = next;
    emulated_switch(&self->stack_pointer, next->stack_pointer);
}

// If all lanes are there that still can come.
void Machine::conclude(Warp& warp, Meetings& meetings) {
    Meeting& meeting = meetings.next();
    if (meeting.lanes == 0 || (meetings.mask & warp.live & ~meeting.lanes)) return;
    if (meetings.conclude) meetings.conclude(meeting);
    if (!strcmp(meetings.what, "__syncwarp")) warp.n_syncs++;
    meetings.n_concluded++;
    meetings.next().lanes = 0;
    warp.runnable |= meeting.lanes & warp.live;
    if (warp.runnable) runnable_warps |= 1u << (&warp - warps);
}

void Machine::conclude_without_the_dead(Warp& warp) {
    for (int i = 0; i < warp.n_masks; i++) conclude(warp, warp.meetings[i]);
}

const Meeting& meet(unsigned mask, const char* what, unsigned long long brought, void (*conclude)(Meeting&), int line) {
    void* const caller = __builtin_return_address(0);
    Thread& self = *machine->running;
    Warp& warp = machine->warps[self.warp];
    if (!((mask >> self.lane) & 1)) fail("a lane is at an instruction whose mask leaves it out", caller);
    Meetings* meetings = nullptr;
    for (int i = 0; i < warp.n_masks && !meetings; i++)
        if (warp.meetings[i].mask == mask) meetings = &warp.meetings[i];
    if (!meetings) {
        if (warp.n_masks == MAX_MASKS) fail("a warp uses more masks than this emulator keeps", caller);
        meetings = &warp.meetings[warp.n_masks++];
        meetings->mask = mask;
        meetings->n_concluded = 0;
        meetings->turns[0].lanes = meetings->turns[1].lanes = 0;
    }
    Meeting& meeting = meetings->next();
    self.waits_for = what;
    self.line = line;
    self.caller = caller;
    if (meeting.lanes == 0) {
        meetings->what = what;
        meetings->line = line;
        meetings->conclude = conclude;
    } else if (meetings->line != line || (meetings->what != what && strcmp(meetings->what, what))) {
        std::string text;
        say(text, "lanes of a warp are at different instructions: %s and %s", meetings->what, what);
        for (unsigned i = 0; i < 32; i++)
            if ((meeting.lanes >> i) & 1) {
                say(text, ", the first called from\n      %s", place(call_of(machine->threads[self.warp * 32 + i].caller)).c_str());
                break;
            }
        fail(text.c_str(), caller);
    }
    meeting.brought[self.lane] = brought;
    meeting.lanes |= 1u << self.lane;
    machine->conclude(warp, *meetings);
    // The last one goes on at once, unless chance decides.
    if (meetings->next().lanes == 0 && machine->order != Order::Random) {
        warp.runnable &= ~(1u << self.lane);
        if (!warp.runnable) machine->runnable_warps &= ~(1u << self.warp);
    } else {
        machine->wait();
    }
    return meeting;
}

// If all threads are there that still can come.
bool Machine::release_barrier() {
    if (n_at_barrier == 0 || n_at_barrier < n_live) return false;
    n_at_barrier = 0;
    n_barriers++;
    pass_barrier();
    n_brought[n_barriers % 2] = 0;
    runnable_warps = 0;
    for (int i = 0; i < MAX_THREADS / 32; i++) {
        warps[i].runnable = warps[i].live;
        if (warps[i].live) runnable_warps |= 1u << i;
    }
    return true;
}

int barrier(const char* what, bool brought, int line) {
    void* const caller = __builtin_return_address(0);
    Thread& self = *machine->running;
    self.waits_for = what;
    self.line = line;
    self.caller = caller;
    if (machine->n_at_barrier == 0) {
        machine->barrier = what;
        machine->barrier_line = line;
    } else if (machine->barrier_line != line) {
        std::string text;
        say(text, "threads of a block are at different barriers: line %d and line %d", machine->barrier_line, line);
        fail(text.c_str(), caller);
    }
    const int number = machine->n_barriers;
    machine->n_brought[number % 2] += brought;
    machine->n_at_barrier++;
    machine->release_barrier();
    machine->wait();
    return machine->n_brought[number % 2];
}

const unsigned char* library_of_kernel() { return machine->library; }
const SharedMemory& shared_memory() { return machine->shared; }

std::string describe_shared(const void* address) {
    std::string text;
    if (!machine) return text;
    const unsigned char* at = static_cast<const unsigned char*>(address);
    const SharedMemory& shared = machine->shared;
    if (at >= shared.dynamic_start - PAGE && at < shared.dynamic_start + shared.dynamic_span + PAGE)
        say(text, "%td bytes from the start of the %zu bytes of dynamic shared memory", at - here.shared, machine->shared_bytes);
    else if (size_t(at - shared.static_start) < shared.static_bytes)
        say(text, "%td bytes into static shared memory", at - shared.static_start);
    return text;
}

// ------------------------------------------------------------------------------------------------------ asynchronous copies

bool is_shared(const void* address, size_t bytes) {
    const unsigned char* start = static_cast<const unsigned char*>(address);
    const auto in = [&](const unsigned char* area, size_t size) { return start >= area && start + bytes <= area + size; };
    return in(here.shared, machine->shared_bytes) || in(machine->shared.static_start, machine->shared.static_bytes);
}

namespace {

void check_row(const void* address, const char* what, const void* caller) {
    std::string text;
    if (reinterpret_cast<uintptr_t>(address) % 16) say(text, "%s of %p, which is not aligned to 16 bytes", what, address);
    else if (!is_shared(address, 16)) say(text, "%s of %p, which is not in shared memory", what, address);
    else return;
    fail(text.c_str(), caller);
}

} // namespace

void copy_async(void* to, const void* from, bool valid) {
    void* const caller = __builtin_return_address(0);
    check_row(to, "an asynchronous copy", caller);
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("an asynchronous copy from an address that is not aligned to 16 bytes", caller);
    if (valid) *static_cast<const volatile unsigned char*>(from), static_cast<const volatile unsigned char*>(from)[15];
    // The copy may be done at any time from here on: what is read before the wait is lost.
    const unsigned long long nothing[2] = {NOTHING, NOTHING};
    memcpy(to, nothing, 16);
    Thread& self = *machine->running;
    check_access(Access::Write, to, 16, self, call_of(caller));
    if (valid) check_access(Access::Read, from, 16, self, call_of(caller));
    self.copies.push_back({to, from, valid, self.n_groups});
}

void copy_async_commit() { machine->running->n_groups++; }

void copy_async_wait(int n_under_way) {
    void* const caller = __builtin_return_address(0);
    Thread& self = *machine->running;
    const int end = self.n_groups - n_under_way;
    size_t n_done = 0;
    for (; n_done < self.copies.size() && self.copies[n_done].group < end; n_done++) {
        const Copy& copy = self.copies[n_done];
        if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
        check_access(Access::Write, copy.to, 16, self, call_of(caller));
        self.unshown.push_back(copy.to);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + long(n_done));
}

// ------------------------------------------------------------------------------------------------------------- tensor cores

void mma_16x8x16(Meeting& meeting) {
    float a[16][16], b[16][8], d[16][8];
    const auto number = [](uint32_t pair, int i) { return bits<float>(i ? pair & 0xffff0000u : pair << 16); };
    const auto operands = [&](int lane) { return reinterpret_cast<const MmaOperands*>(meeting.brought[lane]); };
    if (meeting.lanes != 0xffffffffu) fail("mma_16x8x16 in a warp that is not whole", nullptr);
    for (int lane = 0; lane < 32; lane++) {
        const MmaOperands& of = *operands(lane);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 2; i++) {
            a[row][column + i] = number(of.a[0], i);
            a[row + 8][column + i] = number(of.a[1], i);
            a[row][column + 8 + i] = number(of.a[2], i);
            a[row + 8][column + 8 + i] = number(of.a[3], i);
            b[column + i][row] = number(of.b[0], i);
            b[column + 8 + i][row] = number(of.b[1], i);
        }
    }
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) d[i][j] = 0;
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    }
    for (int lane = 0; lane < 32; lane++) {
        float* of = operands(lane)->d;
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 2; i++) {
            of[i] += d[row][column + i];
            of[2 + i] += d[row + 8][column + i];
        }
    }
}

namespace {

void ldmatrix(Meeting& meeting, bool transposed) {
    const auto operands = [&](int lane) { return reinterpret_cast<const LdmatrixOperands*>(meeting.brought[lane]); };
    if (meeting.lanes != 0xffffffffu) fail("ldmatrix in a warp that is not whole", nullptr);
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 32; lane++) {
        const void* row = operands(lane)->row;
        const Thread& thread = machine->threads[machine->running->warp * 32 + unsigned(lane)];
        check_row(row, "ldmatrix", thread.caller);
        check_access(Access::Read, row, 16, thread, call_of(thread.caller));
        memcpy(matrices[lane / 8][lane % 8], row, 16);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4, column = lane % 4 * 2;
            const uint16_t low = transposed ? matrices[i][column][row] : matrices[i][row][column];
            const uint16_t high = transposed ? matrices[i][column + 1][row] : matrices[i][row][column + 1];
            operands(lane)->r[i] = uint32_t(high) << 16 | low;
        }
}

} // namespace

void ldmatrix_x4(Meeting& meeting) { ldmatrix(meeting, false); }
void ldmatrix_x4_trans(Meeting& meeting) { ldmatrix(meeting, true); }

void shared_for_products() { machine->running->unshown.clear(); }

void product_begin() {}

void product(GroupProduct product) {
    product.caller = __builtin_return_address(0);
    Thread& self = *machine->running;
    product.group = self.n_product_groups;
    const int n = product.columns / 2;
    // Until it is waited for, nobody knows what is there.
    if (self.sums.emplace(product.d, std::vector<float>(product.d, product.d + n)).second)
        for (int i = 0; i < n; i++) product.d[i] = bits<float>(unsigned(NOTHING));
    self.products.push_back(product);
}

void product_commit() { machine->running->n_product_groups++; }

namespace {

// Reads a panel's rows (of a left operand; columns of a right one), `n` from `first` on, of 16 numbers that products sum over:
// `to(row, k)` gets each. Chunks of 8 are where their addresses say.
template <typename To> void read_panel(const Panel& panel, int first, int n, Thread* lanes, void* caller, To to) {
    for (int chunk = 0; chunk < 2 * n; chunk++) {
        const int row = panel.over_rows ? chunk / 16 * 8 : chunk / 2, k = panel.over_rows ? chunk % 16 : chunk % 2 * 8;
        const int column = first + row;
        const int at = panel.over_rows ? column / 64 * panel.next_panel + k * 64 + column % 64 : column * 64 + k;
        const uintptr_t address = reinterpret_cast<uintptr_t>(panel.start) + 2 * intptr_t(at);
        const void* const from = reinterpret_cast<const void*>(address ^ (address >> 7 & 7) << 4);
        if (!is_shared(from, 16)) fail("a product of what is not in shared memory", caller);
        for (unsigned i = 0; i < here.block_dim.x; i++) {
            const auto& unshown = machine->threads[i].unshown;
            if (!unshown.empty() && std::find(unshown.begin(), unshown.end(), from) != unshown.end())
                fail("a product of a copy without shared_for_products behind its wait", caller);
        }
        check_access(Access::Read, from, 16, lanes[chunk % 32], call_of(caller));
        uint16_t numbers[8];
        memcpy(numbers, from, 16);
        for (int i = 0; i < 8; i++)
            to(panel.over_rows ? row + i : row, panel.over_rows ? k : k + i) = bits<float>(unsigned(numbers[i]) << 16);
    }
}

// The products of a warp's lanes that are at the same place of their lists.
void perform(Thread* lanes, size_t at) {
    const GroupProduct& first = lanes[0].products[at];
    for (int lane = 1; lane < 32; lane++) {
        const GroupProduct& other = lanes[lane].products[at];
        if (other.line != first.line || other.a.start != first.a.start || other.b.start != first.b.start || other.add != first.add)
            fail("lanes of a warp bring different products", other.caller);
    }
    static thread_local float a[16][16], b[16][256]; // Lambdas need not capture them.
    const auto number = [](uint32_t pair, int i) { return bits<float>(i ? pair & 0xffff0000u : pair << 16); };
    if (!first.in_registers)
        read_panel(first.a, int(lanes[0].warp % 4) * 16, 16, lanes, first.caller, [](int row, int k) -> float& { return a[row][k]; });
    for (int lane = 0; lane < 32; lane++) {
        const GroupProduct& of = lanes[lane].products[at];
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 8 && of.in_registers; i++)
            a[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] = number(of.registers[i / 2], i % 2);
    }
    read_panel(first.b, 0, first.columns, lanes, first.caller, [](int column, int k) -> float& { return b[k][column]; });
    for (int i = 0; i < 16; i++) {
        float d[256] = {};
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < first.columns; j++) d[j] += a[i][k] * b[k][j];
        for (int j = 0; j < first.columns; j++) {
            Thread& lane = lanes[i % 8 * 4 + j / 2 % 4];
            float& sum = lane.sums[lane.products[at].d][size_t(j / 8 * 4 + i / 8 * 2 + j % 2)];
            sum = (first.add ? sum : 0.0f) + d[j];
        }
    }
}

void perform_products(Meeting& meeting) {
    if (meeting.lanes != 0xffffffffu) fail("products of a warp that is not whole", nullptr);
    Thread* const lanes = machine->threads + machine->running->warp * 32;
    const int end = lanes[0].n_product_groups - int(meeting.brought[0]);
    size_t n_done = 0;
    for (int lane = 1; lane < 32; lane++)
        if (lanes[lane].products.size() != lanes[0].products.size() || lanes[lane].n_product_groups != lanes[0].n_product_groups)
            fail("lanes of a warp bring different numbers of products", lanes[lane].caller);
    for (; n_done < lanes[0].products.size() && lanes[0].products[n_done].group < end; n_done++) perform(lanes, n_done);
    for (int i = 0; i < 32; i++) {
        Thread& lane = lanes[i];
        lane.products.erase(lane.products.begin(), lane.products.begin() + long(n_done));
        for (auto sum = lane.sums.begin(); sum != lane.sums.end();) {
            const auto is_its = [&](const GroupProduct& product) { return product.d == sum->first; };
            if (std::any_of(lane.products.begin(), lane.products.end(), is_its)) {
                ++sum;
                continue;
            }
            std::copy(sum->second.begin(), sum->second.end(), sum->first);
            sum = lane.sums.erase(sum);
        }
    }
}

} // namespace

void product_wait(int n_under_way, int line) { meet(0xffffffffu, "product_wait", unsigned(n_under_way), perform_products, line); }

// ---------------------------------------------------------------------------------------------------------------- launches

namespace {

std::unordered_map<std::string, Kernel>& kernels() {
    static std::unordered_map<std::string, Kernel> all;
    return all;
}

// Machines that no launch uses now.
std::mutex idle_lock;
std::vector<Machine*>& idle() {
    static std::vector<Machine*> all;
    return all;
}

Machine* take_machine() {
    std::lock_guard<std::mutex> lock(idle_lock);
    if (idle().empty()) return new Machine();
    Machine* taken = idle().back();
    idle().pop_back();
    return taken;
}

void give_machine(Machine* machine) {
    std::lock_guard<std::mutex> lock(idle_lock);
    idle().push_back(machine);
}

// The thread-local memory of the library that holds an address.
void find_static(const void* address, SharedMemory& shared) {
    struct Search {
        uintptr_t address;
        unsigned char* start;
        size_t bytes;
    } search{reinterpret_cast<uintptr_t>(address), nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Search& search = *static_cast<Search*>(data);
            bool holds = false;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const ElfW(Phdr)& part = info->dlpi_phdr[i];
                const uintptr_t start = info->dlpi_addr + part.p_vaddr;
                holds |= part.p_type == PT_LOAD && search.address >= start && search.address < start + part.p_memsz;
            }
            if (!holds) return 0;
            for (int i = 0; i < info->dlpi_phnum; i++)
                if (info->dlpi_phdr[i].p_type == PT_TLS) {
                    search.start = static_cast<unsigned char*>(info->dlpi_tls_data);
                    search.bytes = search.start ? info->dlpi_phdr[i].p_memsz : 0;
                }
            return 1;
        },
        &search);
    shared.static_start = search.start;
    shared.static_bytes = search.bytes;
}

} // namespace

void fill_with_nothing(unsigned char* start, size_t bytes) {
    // As if it were written from an address that is a multiple of 2.
    size_t i = 0;
    for (; i < bytes && reinterpret_cast<uintptr_t>(start + i) % 8; i++)
        start[i] = reinterpret_cast<uintptr_t>(start + i) % 2 ? 0x7f : 0xff;
    for (; i + 8 <= bytes; i += 8) memcpy(start + i, &NOTHING, 8);
    for (; i < bytes; i++) start[i] = reinterpret_cast<uintptr_t>(start + i) % 2 ? 0x7f : 0xff;
}

namespace {

void run_block(unsigned n_threads) {
    Machine& m = *machine;
    fill_with_nothing(here.shared, m.shared_bytes);
    fill_with_nothing(m.shared.static_start, m.shared.static_bytes);
    start_block();
    m.n_live = int(n_threads);
    m.n_at_barrier = m.n_barriers = 0;
    m.n_brought[0] = m.n_brought[1] = 0;
    m.runnable_warps = 0;
    for (unsigned i = 0; i < MAX_THREADS / 32; i++) {
        const unsigned n_lanes = n_threads > i * 32 ? std::min(32u, n_threads - i * 32) : 0;
        m.warps[i].live = m.warps[i].runnable = n_lanes == 32 ? ~0u : (1u << n_lanes) - 1;
        if (n_lanes) m.runnable_warps |= 1u << i;
        m.warps[i].n_masks = 0;
        m.warps[i].n_syncs = 0;
    }
    for (unsigned i = 0; i < n_threads; i++) {
        m.threads[i].copies.clear();
        m.threads[i].n_groups = 0;
        m.threads[i].unshown.clear();
        m.threads[i].products.clear();
        m.threads[i].sums.clear();
        m.threads[i].n_product_groups = 0;
    }
    // As if a thread had called wait().
    const unsigned warp = m.pick(m.runnable_warps), lane = m.pick(m.warps[warp].runnable);
    m.warps[warp].runnable &= ~(1u << lane);
    if (!m.warps[warp].runnable) m.runnable_warps &= ~(1u << warp);
    m.running = &m.threads[warp * 32 + lane];
    here.thread = m.running;
    emulated_switch(&m.launcher, m.running->stack_pointer);
    m.running = nullptr;
}

std::string refusal(const Launch& launch) {
    std::string text;
    const dim3 grid = launch.grid, block = launch.block;
    const unsigned long long n_threads = 1ull * block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || !n_threads) text = "a grid or a block of nothing";
    else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        say(text, "a grid of %u %u %u blocks: y and z are at most 65535", grid.x, grid.y, grid.z);
    else if (n_threads > MAX_THREADS || block.z > 64) say(text, "a block of %llu threads: at most 1024", n_threads);
    else if (n_threads > unsigned(launch.kernel->max_threads))
        say(text, "a block of %llu threads for a kernel that is bounded to %d", n_threads, launch.kernel->max_threads);
    else if (launch.shared_bytes > max_shared_bytes())
        say(text, "%zu bytes of shared memory: at most %zu", launch.shared_bytes, max_shared_bytes());
    return text;
}

} // namespace

int capability() {
    const char* wish = getenv("TITAN_EMULATED_CAPABILITY");
    return wish ? atoi(wish) : 90;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
size_t max_shared_bytes() {
    switch (capability()) {
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: return 99 << 10;
    default: return MAX_SHARED_BYTES;
    }
}

void add_kernel(const Kernel& kernel) {
    if (!kernels().emplace(kernel.name, kernel).second) {
        std::string text;
        say(text, "two kernels are called %s", kernel.name);
        fail(text.c_str(), nullptr);
    }
}

const Kernel* find_kernel(const char* name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

std::string run(const Launch& launch) {
    std::string refused = refusal(launch);
    if (!refused.empty()) return refused;
    const Kernel& kernel = *launch.kernel;
    prepare_signal_stack();
    machine = take_machine();
    Machine& m = *machine;
    m.launch = &launch;
    m.running = nullptr;
    m.choose_order();
    for (int i = 0; i < kernel.n_arguments; i++) {
        if (!kernel.argument_is_pointer[i]) continue;
        const void* pointer = *static_cast<void**>(launch.arguments[i]);
        if (pointer && !is_allocated(pointer, 0)) {
            std::string text;
            say(text, "argument %d is %p, %s", i, pointer, describe(pointer).c_str());
            fail(text.c_str(), nullptr);
        }
    }
    m.shared_bytes = (launch.shared_bytes + 15) / 16 * 16;
    here.shared = m.shared.dynamic_start + m.shared.dynamic_span - m.shared_bytes;
    here.block_dim = {launch.block.x, launch.block.y, launch.block.z};
    here.grid_dim = {launch.grid.x, launch.grid.y, launch.grid.z};
    find_static(reinterpret_cast<void*>(kernel.function), m.shared);
    Dl_info info;
    m.library = dladdr(reinterpret_cast<void*>(kernel.function), &info) ? static_cast<unsigned char*>(info.dli_fbase) : nullptr;
    start_launch();
    const unsigned n_threads = launch.block.x * launch.block.y * launch.block.z;
    for (unsigned i = 0; i < n_threads; i++) {
        Thread& thread = m.threads[i];
        thread.index = {i % launch.block.x, i / launch.block.x % launch.block.y, i / (launch.block.x * launch.block.y)};
        thread.number = i;
        thread.lane = i % 32;
        thread.warp = i / 32;
        thread.n_syncs = &m.warps[i / 32].n_syncs;
    }
    const size_t n_blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    std::vector<size_t> blocks(n_blocks);
    for (size_t i = 0; i < n_blocks; i++) blocks[i] = m.order == Order::Backward ? n_blocks - 1 - i : i;
    if (m.order == Order::Random) std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(m.random));
    for (const size_t block : blocks) {
        here.block = {unsigned(block % launch.grid.x), unsigned(block / launch.grid.x % launch.grid.y),
                      unsigned(block / launch.grid.x / launch.grid.y)};
        run_block(n_threads);
    }
    for (int i = 0; i < kernel.n_arguments; i++)
        if (kernel.argument_is_pointer[i])
            if (const void* pointer = *static_cast<void**>(launch.arguments[i])) check_edges(pointer, kernel.name);
    m.launch = nullptr;
    give_machine(machine);
    machine = nullptr;
    return "";
}

} // namespace emulated
