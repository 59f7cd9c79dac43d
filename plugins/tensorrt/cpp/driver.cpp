#include "driver.h"

#include <cuda.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "library.h"
#include "sources.h"

namespace rmsnorm_deploy {
namespace {

struct Functions {
  decltype(&cuInit) init;
  decltype(&cuDeviceGet) device;
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuCtxGetCurrent) context;
  decltype(&cuCtxGetDevice) current_device;
  decltype(&cuModuleLoadData) load;
  decltype(&cuModuleGetFunction) function;
  decltype(&cuLaunchKernel) launch;
  decltype(&cuGetErrorName) error_name;
  decltype(&cuLaunchKernelEx) launch_ex;  // from CUDA 11.8 on
  CUresult (*context_id)(CUcontext, unsigned long long*);  // from CUDA 12 on

  static const Functions* get();
};

const Functions* Functions::get() {
  static const Functions* found = []() -> const Functions* {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return nullptr;
    static Functions it;
    bool all = true;
    auto load = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      all = all && function;
    };
    load(it.init, "cuInit"), load(it.device, "cuDeviceGet"), load(it.attribute, "cuDeviceGetAttribute");
    load(it.context, "cuCtxGetCurrent"), load(it.current_device, "cuCtxGetDevice");
    load(it.load, "cuModuleLoadData"), load(it.function, "cuModuleGetFunction");
    load(it.launch, "cuLaunchKernel"), load(it.error_name, "cuGetErrorName");
    it.launch_ex = reinterpret_cast<decltype(it.launch_ex)>(dlsym(library, "cuLaunchKernelEx"));
    it.context_id = reinterpret_cast<decltype(it.context_id)>(dlsym(library, "cuCtxGetId"));
    return all ? &it : nullptr;
  }();
  return found;
}

const Functions& driver() {
  const Functions* found = Functions::get();
  if (!found) throw Refusal("the CUDA driver (libcuda.so.1) cannot be loaded");
  return *found;
}

void check(CUresult status, const char* what) {
  if (status == CUDA_SUCCESS) return;
  const char* name = nullptr;
  driver().error_name(status, &name);
  throw Refusal(std::string(what) + ": the CUDA driver returned " + (name ? name : std::to_string(status).c_str()));
}

int attribute(CUdevice device, CUdevice_attribute what) {
  int value = 0;
  check(driver().attribute(&value, what, device), "cuDeviceGetAttribute");
  return value;
}

int architecture_of(CUdevice device) {
  return 10 * attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
         attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
}

constexpr int generic_threads = 256;

// A kernel that waits for the one before it may begin before that one has ended.
void launch_kernel(CUfunction function, unsigned grid, unsigned block, bool waits, CUstream stream, void** arguments) {
  if (!waits || !driver().launch_ex) {
    check(driver().launch(function, grid, 1, 1, block, 1, 1, 0, stream, arguments, nullptr), "cuLaunchKernel");
    return;
  }
  CUlaunchAttribute overlapping{};
  overlapping.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  overlapping.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = grid, config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = block, config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream, config.attrs = &overlapping, config.numAttrs = 1;
  check(driver().launch_ex(&config, function, arguments, nullptr), "cuLaunchKernelEx");
}

}  // namespace

int Driver::first_architecture() {
  const Functions* found = Functions::get();
  CUdevice device;
  if (!found || found->init(0) != CUDA_SUCCESS || found->device(&device, 0) != CUDA_SUCCESS) return 0;
  return architecture_of(device);
}

struct LoadedKernels::Parts {
  Images images;
  Norm norm;
  std::mutex guard;

  struct Context {
    int architecture = 0, multiprocessors = 0;
    std::map<int, CUfunction> functions;  // by image; -1 is the generic kernel
  };
  std::map<unsigned long long, Context> contexts;

  Context& context() {
    CUcontext current = nullptr;
    check(driver().context(&current), "cuCtxGetCurrent");
    if (!current) throw Refusal("no CUDA context is current");
    unsigned long long id = reinterpret_cast<unsigned long long>(current);
    if (driver().context_id) check(driver().context_id(current, &id), "cuCtxGetId");
    Context& found = contexts[id];
    if (!found.architecture) {
      CUdevice device;
      check(driver().current_device(&device), "cuCtxGetDevice");
      found.multiprocessors = attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
      found.architecture = architecture_of(device);
    }
    return found;
  }

  CUfunction function(Context& in, int image) {
    CUfunction& found = in.functions[image];
    if (!found) {
      if (image < 0 && norm.is_quantized())
        throw Refusal("the engine has no kernel for this GPU (sm_" + std::to_string(in.architecture) +
                      "), and the generic kernel does not support a quantized output; build the engine for sm_" +
                      std::to_string(in.architecture));
      const char* bytes = image < 0 ? generic_fatbin() : images.images[image].bytes.data();
      const std::string name = image < 0 ? norm.generic_kernel() : norm.kernel();
      CUmodule module;
      check(driver().load(&module, bytes),
            image < 0 ? "the engine has no kernel for this GPU, and the generic kernel cannot be loaded"
                      : "loading the engine's kernel");
      check(driver().function(&found, module, name.c_str()), name.c_str());
    }
    return found;
  }
};

LoadedKernels::LoadedKernels(Images images, const Norm& norm) : parts_(new Parts) {
  parts_->images = std::move(images), parts_->norm = norm;
}

LoadedKernels::~LoadedKernels() = default;

std::shared_ptr<LoadedKernels> LoadedKernels::get(const std::string& packed, const Norm& norm) {
  static std::mutex guard;
  static std::map<std::pair<std::string, decltype(norm.key())>, std::shared_ptr<LoadedKernels>> known;
  std::lock_guard<std::mutex> lock(guard);
  auto& found = known[{packed, norm.key()}];
  if (!found) found = std::make_shared<LoadedKernels>(Images::unpack(packed.data(), packed.size()), norm);
  return found;
}

int LoadedKernels::width() const { return parts_->images.width; }

Dtype LoadedKernels::dtype() const { return parts_->images.dtype; }

QuantType LoadedKernels::quant_type() const { return parts_->images.quant_type; }

void LoadedKernels::prepare(int rows) {
  std::lock_guard<std::mutex> lock(parts_->guard);
  Parts::Context& in = parts_->context();
  parts_->function(in, parts_->images.choose(in.architecture, rows, in.multiprocessors));
}

void LoadedKernels::launch(
    const void* const* inputs, int input_count, void* const* outputs, int output_count, int rows, void* stream) {
  if (rows == 0) return;
  std::lock_guard<std::mutex> lock(parts_->guard);
  Parts::Context& in = parts_->context();
  const int number = parts_->images.choose(in.architecture, rows, in.multiprocessors);
  const CUfunction function = parts_->function(in, number);
  const Norm& norm = parts_->norm;
  unsigned epsilon;
  std::memcpy(&epsilon, &norm.epsilon, 4);
  int width = norm.width, one_plus = norm.one_plus, cast_first = norm.cast_first;
  std::vector<void*> arguments;
  for (int i = 0; i < input_count; ++i) arguments.push_back(const_cast<const void**>(&inputs[i]));
  arguments.push_back(&rows);
  for (int i = 0; i < output_count; ++i) arguments.push_back(const_cast<void**>(&outputs[i]));
  unsigned grid = static_cast<unsigned>(rows), block = generic_threads;
  bool waits = false;
  if (number < 0) {
    for (void* value : {static_cast<void*>(&width), static_cast<void*>(&epsilon), static_cast<void*>(&one_plus),
                        static_cast<void*>(&cast_first)})
      arguments.push_back(value);
  } else {
    const Image& image = parts_->images.images[number];
    grid = static_cast<unsigned>(image.grid(rows));
    block = static_cast<unsigned>(image.block);
    waits = image.waits;
  }
  launch_kernel(function, grid, block, waits, static_cast<CUstream>(stream), arguments.data());
}

}  // namespace rmsnorm_deploy
