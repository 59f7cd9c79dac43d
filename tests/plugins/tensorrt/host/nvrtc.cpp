// NVRTC's interface on the host: it compiles the kernel's source with g++ and gpu.h, and what it gives for a cubin is a
// text that the stand-in for CUDA's driver reads.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

namespace {

struct Program {
  std::string source, log, image;
  std::vector<std::pair<std::string, std::string>> headers;
};

void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }

const int known[] = {75, 80, 86, 89, 90, 100, 120};
int nvrtcGetNumSupportedArchs(int* count) { return *count = 7, 0; }
int nvrtcGetSupportedArchs(int* all) { return std::memcpy(all, known, sizeof known), 0; }

int nvrtcCreateProgram(void** out, const char* source, const char*, int count, const char* const* headers,
                       const char* const* names) {
  auto* program = new Program{source, "", "", {}};
  for (int i = 0; i < count; ++i) program->headers.push_back({names[i], headers[i]});
  *out = program;
  return 0;
}

int nvrtcCompileProgram(void* opaque, int count, const char* const* options) {
  auto& program = *static_cast<Program*>(opaque);
  std::string macros, cluster = "1", name, architecture, quantized = "0";
  for (int i = 0; i < count; ++i) {
    const std::string option = options[i];
    if (!option.rfind("-DRMSNORM_CLUSTER=", 0)) cluster = option.substr(18);
    if (!option.rfind("-DRMSNORM_QUANTIZATION=", 0)) quantized = option.substr(23);
    if (!option.rfind("-DRMSNORM_NAME=", 0)) name = option.substr(15);
    if (!option.rfind("--gpu-architecture=", 0)) architecture = option.substr(19);
    if (!option.rfind("-D", 0)) macros += " '" + option + "'";
  }
  if (setting("RMSNORM_TEST_FAIL_COMPILE") == "1") return program.log = "a planted error", 6;
  // The host's kernel is the same for all architectures: equal macros are compiled once.
  const std::string folder = setting("RMSNORM_TEST_SCRATCH") + "/" + std::to_string(std::hash<std::string>()(macros));
  const std::string library = folder + "/kernel.so";
  program.image = "HOST " + library + " " + cluster + " " + name + " " + architecture + " " + quantized + "\n";
  if (std::ifstream(library).good()) return 0;
  std::system(("mkdir -p " + folder).c_str());
  for (const auto& [header, text] : program.headers) write(folder + "/" + header, text);
  write(folder + "/kernel.cpp", program.source);
  const std::string command = "g++ -std=c++17 -O1 -ffp-contract=off -shared -fPIC -w -include gpu.h -I" +
                              setting("RMSNORM_TEST_HOST") + " -I" + folder + macros + " " + folder +
                              "/kernel.cpp -o " + library + " 2> " + folder + "/log";
  if (std::system(command.c_str())) return program.log = "g++ failed in " + folder, 6;
  return 0;
}

int nvrtcGetProgramLogSize(void* it, size_t* size) { return *size = static_cast<Program*>(it)->log.size() + 1, 0; }
int nvrtcGetProgramLog(void* it, char* to) { return std::strcpy(to, static_cast<Program*>(it)->log.c_str()), 0; }
int nvrtcGetCUBINSize(void* it, size_t* size) { return *size = static_cast<Program*>(it)->image.size() + 1, 0; }
int nvrtcGetCUBIN(void* it, char* to) { return std::strcpy(to, static_cast<Program*>(it)->image.c_str()), 0; }
int nvrtcGetPTXSize(void* it, size_t* size) { return nvrtcGetCUBINSize(it, size); }
int nvrtcGetPTX(void* it, char* to) { return nvrtcGetCUBIN(it, to); }
int nvrtcDestroyProgram(void** it) { return delete static_cast<Program*>(*it), *it = nullptr, 0; }

}  // extern "C"
