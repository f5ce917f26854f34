// The experts' products on Hopper's tensor cores: see kernel.cu.
#include "moe/warpgroups.cuh"

PRODUCTS(hopper, Warpgroups, bf16)
