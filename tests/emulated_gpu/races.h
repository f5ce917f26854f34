// Accesses of threads to the same memory that nothing orders, and reads of what nothing has written: found if kernels are
// compiled with -fsanitize=thread, whose calls for each access come here instead of to a library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "emulate.h"

namespace emulated {

// Numbers that only grow: what now counts as the present, and when the block and the launch began. The present changes at
// barriers, which order all that a block did before against all that it does after.
struct Clock {
    uint32_t launch, block, now;
    bool has_fenced; // The block, which makes what other blocks wrote before visible.
};
extern __thread Clock time_of_block;
void start_launch();
void start_block();
void pass_barrier();

bool races_are_found();

enum class Access { Read, Write, Atomic };

// One access by a thread of the block that runs; `at` is an address of code.
void check_access(Access access, const void* address, size_t bytes, const Identity& thread, const void* at);
// Where device memory is that nothing has written since it was allocated, or null.
const void* first_unwritten(const void* start, size_t bytes);
// That memory is used for other things now.
void forget_accesses(const void* start, size_t bytes);

} // namespace emulated
