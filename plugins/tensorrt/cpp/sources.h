// Files that are embedded in the library: the kernel's source, for NVRTC, and the compiled generic kernel.
#pragma once

#include <cstddef>

namespace rmsnorm_deploy {

const char* kernel_source();
const char* rms_norm_source();
const char* numbers_source();
// A fatbin of plugins/kernel/cuda/generic.cu, and its architectures, such as "75,80,86".
const char* generic_fatbin();
const char* generic_architectures();

}  // namespace rmsnorm_deploy
