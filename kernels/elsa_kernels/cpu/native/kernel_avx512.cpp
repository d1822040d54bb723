#if defined(__x86_64__)
#include "simd_avx512.h"

#include "kernel.h"

namespace elsa {
const Kernels avx512_kernels = {attend, merge, read};
}
#endif
