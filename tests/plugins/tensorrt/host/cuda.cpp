// CUDA's driver on the host: modules are libraries that the stand-in for NVRTC made, and a launch runs the kernel
// thread by thread (tests/plugins/host/gpu.h). A line on standard output tells each load and launch.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

struct Module {
  void* library;
  int cluster;
  bool quantized;
};

struct Function {
  void (*entry)();
  int (*launch)(void (*)(), int, int, int, const uint64_t*, unsigned);
  int cluster;
  std::string name;
  bool quantized;
};

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

// Bytes of a kernel's parameters, by its name and whether it is given y's scale: the order of kernel.cu and generic.cu.
std::string sizes_of(const std::string& name, bool quantized) {
  const bool adds = name.find("add_rms_norm") != std::string::npos;
  return std::string(adds ? "888" : "88") + (quantized ? "8" : "") + (adds ? "488" : "48") +
         (name.rfind("generic", 0) == 0 ? "4444" : "");
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) {
  return *context = reinterpret_cast<CUcontext>(static_cast<uintptr_t>(setting("RMSNORM_TEST_CONTEXT", 1))), CUDA_SUCCESS;
}
CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
  return *id = reinterpret_cast<uintptr_t>(context), CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute what, CUdevice) {
  const int architecture = setting("RMSNORM_TEST_GPU", 89);
  switch (what) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return *value = architecture / 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return *value = architecture % 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return *value = 4, CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (setting("RMSNORM_TEST_FAIL_LOAD", 0)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  char library[4096], name[256], architecture[64];
  int cluster = 1, quantized = 0;
  const char* text = static_cast<const char*>(image);
  if (!std::memcmp(text, "\x50\xed\x55\xba", 4)) {  // a fatbin: the generic kernel
    std::snprintf(library, sizeof library, "%s", std::getenv("RMSNORM_TEST_GENERIC"));
    std::snprintf(architecture, sizeof architecture, "generic");
  } else if (std::sscanf(text, "HOST %4095s %d %255s %63s %d", library, &cluster, name, architecture, &quantized) != 5) {
    return CUDA_ERROR_INVALID_IMAGE;
  }
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) return CUDA_ERROR_INVALID_IMAGE;
  std::printf("load %s\n", architecture);
  std::fflush(stdout);
  *module = reinterpret_cast<CUmodule>(new Module{opened, cluster, quantized != 0});
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule opaque, const char* name) {
  auto* module = reinterpret_cast<Module*>(opaque);
  auto* found = new Function{reinterpret_cast<void (*)()>(dlsym(module->library, name)), nullptr, module->cluster, name,
                             module->quantized};
  found->launch = reinterpret_cast<decltype(found->launch)>(dlsym(module->library, "launch"));
  if (!found->entry || !found->launch) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(found);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction opaque, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void** extra) {
  auto* function = reinterpret_cast<Function*>(opaque);
  if (!gx || gy != 1 || gz != 1 || !bx || by != 1 || bz != 1 || shared || extra) return CUDA_ERROR_INVALID_VALUE;
  uint64_t values[16] = {};
  const std::string sizes = sizes_of(function->name, function->quantized);
  for (size_t i = 0; i < sizes.size(); ++i) std::memcpy(&values[i], parameters[i], sizes[i] - '0');
  std::printf("launch %s grid %u block %u cluster %d stream %p\n", function->name.c_str(), gx, bx, function->cluster,
              static_cast<void*>(stream));
  std::fflush(stdout);
  const int waits = function->launch(function->entry, static_cast<int>(gx), static_cast<int>(bx), function->cluster, values, 7);
  return waits ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

// A launch that may overlap with the one before it.
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (config->numAttrs != 1 || config->attrs[0].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION ||
      config->attrs[0].value.programmaticStreamSerializationAllowed != 1)
    return CUDA_ERROR_INVALID_VALUE;
  std::printf("overlapping ");
  return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                        config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream, parameters, extra);
}

CUresult cuGetErrorName(CUresult status, const char** name) {
  *name = status == CUDA_ERROR_NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : status == CUDA_ERROR_INVALID_IMAGE   ? "CUDA_ERROR_INVALID_IMAGE"
                                                 : "CUDA_ERROR_OTHER";
  return CUDA_SUCCESS;
}

}  // extern "C"
