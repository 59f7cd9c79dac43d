#include "compiler.h"

#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>

#include "driver.h"
#include "library.h"
#include "sources.h"

namespace rmsnorm_deploy {
namespace {

// From here on kernels wait for the one before them: see wait_for_previous in the kernel's source.
constexpr int waiting_architecture = 90;

constexpr int usual_architectures[] = {75, 80, 86, 89, 90, 100, 120};

// NVRTC's interface; the library is loaded at its first use, because running an engine does not require it.
struct Nvrtc {
  using Program = void*;
  int (*version)(int*, int*);
  int (*architecture_count)(int*);
  int (*architectures)(int*);
  int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  int (*compile)(Program, int, const char* const*);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);
  int (*ptx_size)(Program, size_t*);
  int (*ptx)(Program, char*);
  int (*destroy)(Program*);

  static const Nvrtc* get();
};

// NVRTC loads a second library by its name, which the loader finds only if it is loaded already or in its search path.
void open_builtins(const std::string& nvrtc) {
  const std::string folder = nvrtc.substr(0, nvrtc.find_last_of('/') + 1);
  glob_t found = {};
  if (!glob((folder + "libnvrtc-builtins.so.*").c_str(), 0, nullptr, &found))
    for (size_t i = 0; i < found.gl_pathc; ++i) dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_GLOBAL);
  globfree(&found);
}

const Nvrtc* Nvrtc::get() {
  static const Nvrtc* found = []() -> const Nvrtc* {
    const char* named = std::getenv("RMSNORM_DEPLOY_NVRTC");
    void* library = nullptr;
    if (named && *named) {
      open_builtins(named);
      library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
      if (!library) report_warning(std::string("RMSNORM_DEPLOY_NVRTC: ") + dlerror());
    } else {
      for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
        if ((library = dlopen(name, RTLD_NOW | RTLD_LOCAL))) break;
    }
    if (!library) return nullptr;
    static Nvrtc it;
    bool all = true;
    auto load = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      all = all && function;
    };
    load(it.version, "nvrtcVersion"), load(it.architecture_count, "nvrtcGetNumSupportedArchs");
    load(it.architectures, "nvrtcGetSupportedArchs"), load(it.create, "nvrtcCreateProgram");
    load(it.compile, "nvrtcCompileProgram"), load(it.log_size, "nvrtcGetProgramLogSize");
    load(it.log, "nvrtcGetProgramLog"), load(it.cubin_size, "nvrtcGetCUBINSize"), load(it.cubin, "nvrtcGetCUBIN");
    load(it.ptx_size, "nvrtcGetPTXSize"), load(it.ptx, "nvrtcGetPTX"), load(it.destroy, "nvrtcDestroyProgram");
    if (!all) report_warning("NVRTC lacks functions that the plugin requires; it is not used");
    return all ? &it : nullptr;
  }();
  return found;
}

void check(int status, const char* what) {
  if (status) throw Refusal(std::string(what) + ": NVRTC returned " + std::to_string(status));
}

Image compiled(const Nvrtc& nvrtc, const Norm& norm, const Layout& layout, int architecture, bool ptx) {
  const std::vector<std::string> options = compile_options(norm, layout, architecture);
  std::vector<const char*> pointers;
  for (const std::string& option : options) pointers.push_back(option.c_str());
  const char* contents[] = {numbers_source(), rms_norm_source()};
  const char* names[] = {"numbers.cuh", "rms_norm.cuh"};
  Nvrtc::Program program = nullptr;
  check(nvrtc.create(&program, kernel_source(), "kernel.cu", 2, contents, names), "nvrtcCreateProgram");
  std::unique_ptr<Nvrtc::Program, void (*)(Nvrtc::Program*)> owner(
      &program, [](Nvrtc::Program* it) { Nvrtc::get()->destroy(it); });
  const int status = nvrtc.compile(program, static_cast<int>(pointers.size()), pointers.data());
  if (status) {
    size_t size = 0;
    std::string log;
    if (!nvrtc.log_size(program, &size) && size) log.resize(size), nvrtc.log(program, log.data());
    throw Refusal("NVRTC failed to compile " + std::string(norm.kernel()) + " of width " + std::to_string(norm.width) +
                  " for sm_" + std::to_string(architecture) + ": " + log.c_str());
  }
  size_t size = 0;
  check((ptx ? nvrtc.ptx_size : nvrtc.cubin_size)(program, &size), "the compiled kernel's size");
  std::string bytes(size, '\0');
  check((ptx ? nvrtc.ptx : nvrtc.cubin)(program, bytes.data()), "the compiled kernel");
  return {ptx, architecture, layout.few, layout.block(), layout.rows, layout.cluster, bytes,
          architecture >= waiting_architecture};
}

std::vector<int> supported(const Nvrtc& nvrtc) {
  int count = 0;
  check(nvrtc.architecture_count(&count), "nvrtcGetNumSupportedArchs");
  std::vector<int> found(count);
  check(nvrtc.architectures(found.data()), "nvrtcGetSupportedArchs");
  return found;
}

std::string report(const Norm& norm, const Images& images, size_t bytes) {
  std::ostringstream text;
  text << "{\"operator\": \"" << norm.op_type() << "\", \"width\": " << norm.width
       << ", \"dtype\": \"" << name_of(norm.dtype) << "\", ";
  if (norm.is_quantized()) text << "\"quantized\": \"" << name_of(norm.quant_type) << "\", ";
  text << "\"architectures\": [";
  const char* comma = "";
  int last = 0;
  for (const Image& image : images.images)
    if (!image.ptx && image.architecture != last) text << comma << (last = image.architecture), comma = ", ";
  text << "], \"bytes\": " << bytes << ", \"generic\": " << (images.images.empty() ? "true" : "false")
       << "}";
  return text.str();
}

Images compile(const Norm& norm) {
  Images result;
  result.width = norm.width, result.dtype = norm.dtype, result.quant_type = norm.quant_type;
  const Nvrtc* nvrtc = Nvrtc::get();
  if (!nvrtc) {
    const std::string text = "NVRTC is not found (libnvrtc.so.13, or the file that RMSNORM_DEPLOY_NVRTC names): " +
                             std::string(norm.kernel()) + " of width " + std::to_string(norm.width);
    if (norm.is_quantized())
      throw Refusal(text + " has a quantized output, which the generic kernel does not support; install NVRTC, or "
                           "rewrite the file with: rmsnorm rewrite --target primitives");
    report_warning(text + " runs in the generic kernel, which is slower");
    return result;
  }
  bool asked_for = false;
  std::vector<int> wanted = wanted_architectures(&asked_for);
  const std::vector<int> known = supported(*nvrtc);
  std::sort(wanted.begin(), wanted.end());
  std::vector<int> usable;
  for (int architecture : wanted) {
    if (std::find(known.begin(), known.end(), architecture) != known.end()) usable.push_back(architecture);
    else if (asked_for) throw Refusal("NVRTC " + nvrtc_version() + " does not support sm_" + std::to_string(architecture));
  }
  if (usable.empty()) throw Refusal("NVRTC " + nvrtc_version() + " supports none of the requested architectures");
  for (int architecture : usable)
    for (const Layout& layout : layouts_of(norm, architecture))
      result.images.push_back(compiled(*nvrtc, norm, layout, architecture, false));
  for (const Layout& layout : layouts_of(norm, usable.back()))
    result.images.push_back(compiled(*nvrtc, norm, layout, usable.back(), true));
  return result;
}

}  // namespace

std::string nvrtc_version() {
  const Nvrtc* nvrtc = Nvrtc::get();
  int major = 0, minor = 0;
  if (!nvrtc || nvrtc->version(&major, &minor)) return "";
  return std::to_string(major) + "." + std::to_string(minor);
}

std::vector<int> wanted_architectures(bool* asked_for) {
  const char* named = std::getenv("RMSNORM_DEPLOY_ARCHITECTURES");
  std::vector<int> found;
  if (named && *named) {
    if (asked_for) *asked_for = true;
    std::istringstream parts(named);
    for (std::string part; std::getline(parts, part, ',');) {
      const int number = std::atoi(part.c_str());
      if (number < 50) throw Refusal("RMSNORM_DEPLOY_ARCHITECTURES: expected numbers such as 86,89, got " + part);
      found.push_back(number);
    }
    return found;
  }
  if (const int device = Driver::first_architecture()) return {device};
  return {std::begin(usual_architectures), std::end(usual_architectures)};
}

std::shared_ptr<const std::string> packed_images(const Norm& norm) {
  static std::mutex guard;
  static std::map<decltype(norm.key()), std::shared_ptr<const std::string>> known;
  std::lock_guard<std::mutex> lock(guard);
  auto& found = known[norm.key()];
  if (!found) {
    const Images images = compile(norm);
    found = std::make_shared<const std::string>(images.pack());
    report_kernel(report(norm, images, found->size()));
  }
  return found;
}

}  // namespace rmsnorm_deploy
