#if defined(__x86_64__)
#include "simd_avx2.h"

#include "kernel.h"

namespace elsa {
const Kernels avx2_kernels = {attend, merge, read};
}
#endif
