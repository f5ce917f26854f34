// Attention in bf16 on Hopper's tensor cores: the kernels of kernel.cu, whose contracts are theirs, multiplying by warpgroups.
// Shared memory is a multiple of 1,024 bytes, as is each of its tiles.
#include "attention/kernels.cuh"
#include "attention/warpgroups.cuh"

FORWARD_BF16(hopper, ByWarpgroups, SHARED_PANELS, 64, 1, 4, 128, 2, false, 3)
FORWARD_BF16(hopper, ByWarpgroups, SHARED_PANELS, 128, 1, 8, 128, 2, false, 1)

BACKWARD_KEYS_BF16(keys, hopper, ByWarpgroups, SHARED_PANELS, 64, 1, 4, 64, 64, false, true, true, 3)
BACKWARD_KEYS_BF16(keys, hopper, ByWarpgroups, SHARED_PANELS, 128, 1, 4, 64, 64, false, true, true, 2)

BACKWARD_QUERIES_BF16(hopper, ByWarpgroups, SHARED_PANELS, 64, 1, 4, 64, 64, false, 4)
BACKWARD_QUERIES_BF16(hopper, ByWarpgroups, SHARED_PANELS, 128, 1, 4, 64, 64, false, 2)
