// Launches of emulated kernels, and the memory of the emulated device.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>

#include "emulate.h"

namespace emulated {

// The kernel of a name, or null.
const Kernel* find_kernel(const char* name);

struct Launch {
    const Kernel* kernel;
    dim3 grid, block;
    size_t shared_bytes;
    void** arguments;
};

// Ten times the device's major compute capability and its minor one: TITAN_EMULATED_CAPABILITY, else 90.
int capability();
// Of a block on any device, and on one of this capability.
constexpr size_t MAX_SHARED_BYTES = 227 << 10;
size_t max_shared_bytes();

// Runs a kernel to its end. Refuses, in words, what a device would refuse.
std::string run(const Launch& launch);

struct SharedMemory {
    unsigned char* dynamic_start;
    size_t dynamic_span; // Of any block.
    unsigned char* static_start;
    size_t static_bytes;
};
const SharedMemory& shared_memory();
void fill_with_nothing(unsigned char* start, size_t bytes);

const unsigned char* library_of_kernel();

// Adds to a text.
void say(std::string& text, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Where code is: functions, files and lines, if addr2line is there to tell.
std::string place(const void* code);
[[noreturn]] void die(const std::string& text);
// As die(), also saying which kernel and thread it was.
[[noreturn]] void die_in_kernel(std::string text);

// All device memory is in here.
extern unsigned char* device_start;
constexpr size_t DEVICE_SPAN = size_t(256) << 30;

// Device memory: filled with NOTHING, and a fault to touch outside.
void* allocate(size_t bytes);
void release(void* address);
// Whether these bytes are in one allocation that is not yet released.
bool is_allocated(const void* address, size_t bytes);
// Ends the process if anything was written just before or just after the allocation that holds `address`.
void check_edges(const void* address, const char* writer);
// What an address is, in words.
std::string describe(const void* address);
// The same of shared memory; nothing otherwise.
std::string describe_shared(const void* address);
// Fills an allocation with NOTHING again.
void forget(void* address);
size_t allocated_bytes();
// The most since the last reset.
size_t& peak_bytes();

// Does something now, or keeps it for a graph if the stream is being captured. Returns 0, or a CUresult.
int perform(void* stream, std::function<int()> what);

void catch_faults();

} // namespace emulated
