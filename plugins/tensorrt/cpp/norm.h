// One norm as the kernel sees it, and the layout of its threads. The layout is the choice of plugins/kernel/launch_config.py;
// the library makes it again because it compiles kernels where there is no Python, and the tests hold one to the other.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace rmsnorm_deploy {

enum class Dtype : int { float32 = 1, float16 = 10, bfloat16 = 16 };  // the numbers of ONNX

enum class QuantType : int { none = 0, int8 = 3, float8_e4m3 = 17 };       // of ONNX too; none: y has x's dtype

int bytes_of(Dtype dtype);
const char* name_of(Dtype dtype);
const char* name_of(QuantType type);
bool is_dtype(int number);
bool is_quant_type(int number);  // and not none

struct Norm {
  bool adds = false;
  Dtype dtype = Dtype::float32;
  QuantType quant_type = QuantType::none;
  int width = 0;
  float epsilon = 0.0f;
  bool one_plus = false;
  bool cast_first = false;

  // The kernel's name in its source.
  const char* kernel() const { return adds ? "add_rms_norm" : "rms_norm"; }
  const char* op_type() const;
  bool is_quantized() const { return quant_type != QuantType::none; }
  // A quantized norm has none: it is refused where nothing was compiled for it.
  std::string generic_kernel() const;
  auto key() const {
    return std::make_tuple(adds, static_cast<int>(dtype), static_cast<int>(quant_type), width, epsilon, one_plus,
                           cast_first);
  }
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
