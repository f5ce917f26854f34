// The experts' products on Hopper's tensor cores: see kernel.cu.
#include "moe/warpgroups.cuh"

typedef Warpgroups<128, 128, 2, 3> Square;
typedef Warpgroups<256, 128, 1, 4> Wide128;
typedef Warpgroups<256, 256, 1, 4> Wide256;
PRODUCTS(hopper, Square, bf16)
PRODUCTS(wide_128, Wide128, bf16)
PRODUCTS(wide_256, Wide256, bf16)
