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

constexpr size_t MAX_SHARED_BYTES = 227 << 10;

// Runs a kernel to its end. Refuses, in words, what a device would refuse.
std::string run(const Launch& launch);

// Device memory: filled with NOTHING, and a fault to touch outside.
void* allocate(size_t bytes);
void release(void* address);
// Whether these bytes are in one allocation that is not yet released.
bool is_allocated(const void* address, size_t bytes);
// Ends the process if anything was written just before or just after the allocation that holds `address`.
void check_edges(const void* address, const char* writer);
// What an address is, in words.
std::string describe(const void* address);
// Fills an allocation with NOTHING again.
void forget(void* address);
size_t allocated_bytes();
// The most since the last reset.
size_t& peak_bytes();

// Does something now, or keeps it for a graph if the stream is being captured. Returns 0, or a CUresult.
int perform(void* stream, std::function<int()> what);

void catch_faults();

} // namespace emulated
