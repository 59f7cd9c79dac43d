#include "sources.h"

// RMSNORM_CUDA_FOLDER, RMSNORM_FATBIN and RMSNORM_GENERIC_ARCHITECTURES come from CMakeLists.txt.
#define EMBED(symbol, file)                                                       \
  asm(".section .rodata\n.balign 16\n.hidden " symbol "\n.globl " symbol "\n"     \
      symbol ":\n.incbin \"" file "\"\n.byte 0\n.previous\n")

EMBED("rmsnorm_embedded_kernel", RMSNORM_CUDA_FOLDER "/kernel.cu");
EMBED("rmsnorm_embedded_rms_norm", RMSNORM_CUDA_FOLDER "/rms_norm.cuh");
EMBED("rmsnorm_embedded_numbers", RMSNORM_CUDA_FOLDER "/numbers.cuh");
EMBED("rmsnorm_embedded_generic", RMSNORM_FATBIN);

extern "C" {
extern const char rmsnorm_embedded_kernel[], rmsnorm_embedded_rms_norm[], rmsnorm_embedded_numbers[];
extern const char rmsnorm_embedded_generic[];
}

namespace rmsnorm_deploy {

const char* kernel_source() { return rmsnorm_embedded_kernel; }
const char* rms_norm_source() { return rmsnorm_embedded_rms_norm; }
const char* numbers_source() { return rmsnorm_embedded_numbers; }
const char* generic_fatbin() { return rmsnorm_embedded_generic; }
const char* generic_architectures() { return RMSNORM_GENERIC_ARCHITECTURES; }

}  // namespace rmsnorm_deploy
