// The exported functions of the library: TensorRT's entry points, and those of this package.
#include "library.h"

#include <NvInferRuntime.h>

#include <cstdio>
#include <mutex>
#include <sstream>
#include <vector>

#include "compiler.h"
#include "plugin.h"
#include "sources.h"

namespace rmsnorm_deploy {
namespace {

struct Reports {
  std::mutex guard;
  std::string error, kernels;
};

Reports& reports() {
  static Reports* all = new Reports;  // never destroyed: plugins may outlive static objects
  return *all;
}

// A text for C callers, which is valid until the next call in the same thread.
const char* kept(std::string text) {
  static thread_local std::string last;
  last = std::move(text);
  return last.c_str();
}

}  // namespace

void report_error(const std::string& where, const std::string& message) {
  const std::string text = where + ": " + message;
  std::fprintf(stderr, "[rmsnorm_deploy] error: %s\n", text.c_str());
  std::lock_guard<std::mutex> lock(reports().guard);
  reports().error = text;
}

void report_warning(const std::string& message) {
  std::fprintf(stderr, "[rmsnorm_deploy] warning: %s\n", message.c_str());
}

std::string last_error() {
  std::lock_guard<std::mutex> lock(reports().guard);
  return reports().error;
}

void report_kernel(const std::string& json) {
  std::lock_guard<std::mutex> lock(reports().guard);
  reports().kernels += (reports().kernels.empty() ? "" : ", ") + json;
}

std::string kernels_report() {
  std::lock_guard<std::mutex> lock(reports().guard);
  return "[" + reports().kernels + "]";
}

}  // namespace rmsnorm_deploy

using namespace rmsnorm_deploy;

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  count = static_cast<int32_t>(creators().size());
  return creators().data();
}

__attribute__((visibility("default"))) const char* rmsnorm_deploy_last_error() { return kept(last_error()); }

__attribute__((visibility("default"))) const char* rmsnorm_deploy_kernels() { return kept(kernels_report()); }

// NVRTC's options for one norm in one of its layouts, and where that is used, one per line; nothing where there is no such
// layout. The tests compare them with those of Python.
__attribute__((visibility("default"))) const char* rmsnorm_deploy_options(
    int adds, int dtype, int quant_type, int width, float epsilon, int one_plus, int cast_first, int number,
    int architecture) {
  if (!is_dtype(dtype) || width < 1 || (quant_type && !is_quant_type(quant_type))) return kept("");
  Norm norm;
  norm.adds = adds, norm.dtype = static_cast<Dtype>(dtype), norm.width = width, norm.epsilon = epsilon;
  norm.quant_type = static_cast<QuantType>(quant_type);
  norm.one_plus = one_plus, norm.cast_first = cast_first;
  const std::vector<Layout> layouts = layouts_of(norm, architecture);
  if (number < 0 || number >= static_cast<int>(layouts.size())) return kept("");
  std::string text = "few=" + std::to_string(layouts[number].few) + "\n";
  for (const std::string& option : compile_options(norm, layouts[number], architecture)) text += option + "\n";
  return kept(text);
}

// The description of the library as a JSON object: its creators, versions, architectures and contract.
__attribute__((visibility("default"))) const char* rmsnorm_deploy_info() {
  std::ostringstream text;
  text << "{\"creators\": [";
  const char* comma = "";
  for (const contract::Operator& op : contract::operators) {
    text << comma << "{\"name\": \"" << op.name << "\", \"version\": \"" << contract::version
         << "\", \"namespace\": \"" << contract::name_space << "\"}";
    comma = ", ";
  }
  text << "], \"contract\": \"" << contract::digest << "\", \"tensorrt_headers\": \"" << NV_TENSORRT_MAJOR << "."
       << NV_TENSORRT_MINOR << "." << NV_TENSORRT_PATCH << "\", \"generic_architectures\": ["
       << generic_architectures() << "], \"nvrtc\": \"" << nvrtc_version() << "\"}";
  return kept(text.str());
}

}  // extern "C"
