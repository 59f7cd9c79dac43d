// One norm as the kernel computes it, and the layout of its threads. The layout is that of
// plugins/kernel/launch_config.py; it is implemented twice because the library compiles kernels without Python, and the
// tests compare both.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace rmsnorm_deploy {

enum class Dtype : int { float32 = 1, float16 = 10, bfloat16 = 16 };  // the numbers of ONNX

enum class QuantType : int { none = 0, int8 = 3, float8_e4m3 = 17 };       // the numbers of ONNX; none: y has x's dtype

int bytes_of(Dtype dtype);
const char* name_of(Dtype dtype);
const char* name_of(QuantType type);
bool is_dtype(int number);
bool is_quant_type(int number);  // false for none

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
  // A quantized norm has no generic kernel: without a compiled kernel it is refused.
  std::string generic_kernel() const;
  auto key() const {
    return std::make_tuple(adds, static_cast<int>(dtype), static_cast<int>(quant_type), width, epsilon, one_plus,
                           cast_first);
  }
};

struct Layout {
  int threads, vectors, elements, rows = 1, cluster = 1;
  bool prefetch = false;
  bool few = false;  // for at most one block for each multiprocessor, or else for any number of rows
  int block() const { return threads * rows; }
};

// From that for the fewest rows to that for any number.
std::vector<Layout> layouts_of(const Norm& norm, int architecture);

// NVRTC's options: the architecture, the language, and the macros of kernel.cu.
std::vector<std::string> compile_options(const Norm& norm, const Layout& layout, int architecture);

}  // namespace rmsnorm_deploy
