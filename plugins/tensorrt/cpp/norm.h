// One norm as the kernel sees it, and the layout of its threads. The layout is the choice of plugins/launch_config.py;
// the library makes it again because it compiles kernels where there is no Python, and the tests hold one to the other.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace rmsnorm_deploy {

enum class Dtype : int { float32 = 1, float16 = 10, bfloat16 = 16 };  // the numbers of ONNX

int bytes_of(Dtype dtype);
const char* name_of(Dtype dtype);
bool is_dtype(int number);

struct Norm {
  bool adds = false;
  Dtype dtype = Dtype::float32;
  int width = 0;
  float epsilon = 0.0f;
  bool one_plus = false;
  bool cast_first = false;

  // The kernel's name in its source.
  const char* kernel() const { return adds ? "add_rms_norm" : "rms_norm"; }
  std::string generic_kernel() const;
  auto key() const { return std::make_tuple(adds, static_cast<int>(dtype), width, epsilon, one_plus, cast_first); }
};

struct Layout {
  int threads, vectors, elements, rows = 1, cluster = 1;
  bool prefetch = false;
  int block() const { return threads * rows; }
};

// `few`: for at most as many rows as the GPU has multiprocessors.
Layout choose_layout(const Norm& norm, bool few, int architecture);

// What NVRTC is told: the architecture, the language, and the macros of kernel.cu.
std::vector<std::string> compile_options(const Norm& norm, const Layout& layout, int architecture);

}  // namespace rmsnorm_deploy
