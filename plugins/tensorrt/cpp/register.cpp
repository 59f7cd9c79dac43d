// Registers all creators when the library is loaded: for trtexec --staticPlugins, Polygraphy --plugins and ONNX
// Runtime's trt_extra_plugin_lib_paths, which load a library and do not call it.
//
// The registry's interface differs between the major versions of TensorRT, so this library is for the major version
// whose headers it was built with, and refuses others. It does not link against TensorRT, which the process has loaded.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <string>

#include "library.h"
#include "plugin.h"

namespace rmsnorm_deploy {
namespace {

void* find(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  for (const std::string& file : {"libnvinfer.so." + major, "libtensorrt_rtx.so." + major})
    if (void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_NOLOAD))
      if (void* found = dlsym(library, name)) return found;
  return nullptr;
}

// 10.14.1 is 101401 since TensorRT 10, and was 8601 for 8.6.1.
int major_of(int version) { return version >= 10000 ? version / 10000 : version / 1000; }

bool register_all() {
  const auto version = reinterpret_cast<int32_t (*)()>(find("getInferLibVersion"));
  const auto registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(find("getPluginRegistry"));
  if (!version || !registry) {
    report_error("registering", "TensorRT is not loaded in this process; load its library first");
    return false;
  }
  if (major_of(version()) != NV_TENSORRT_MAJOR) {
    report_error("registering", "expected TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ", got version " +
                                    std::to_string(version()) + "; build the library with its headers");
    return false;
  }
  bool all = true;
  for (nvinfer1::IPluginCreatorInterface* creator : creators())
    all = registry()->registerCreator(*creator, contract::name_space) && all;
  if (!all) report_error("registering", "TensorRT's registry refused a creator; the plugin may be registered already");
  return all;
}

const bool registered = register_all();

}  // namespace
}  // namespace rmsnorm_deploy

extern "C" __attribute__((visibility("default"))) int rmsnorm_deploy_registered() {
  return rmsnorm_deploy::registered;
}
