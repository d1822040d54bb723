#include "simd_portable.h"

#include "kernel.h"

namespace elsa {
const Kernels portable_kernels = {attend, merge, read};
}
