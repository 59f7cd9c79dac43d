// The norm with its width as an argument: one kernel for each dtype and operator, for engines without a kernel for the
// width.
//
// A block of 256 threads reads one row, element by element, and reads it again for the second half of the formula. It
// is several times slower than the specialized kernel. It is compiled into the TensorRT library, which uses it, with a
// warning, if NVRTC is missing when an engine is built.
#include "rms_norm.cuh"

namespace rmsnorm {

struct Generic {
  static constexpr int threads = 256, cluster = 1;
};

template <class T>
RMSNORM_INLINE float value_at(const void* from, long long element) {
  Packed<T, 1> one;
  one.load(static_cast<const char*>(from) + element * T::bytes);
  return one.get(0);
}

template <class T>
RMSNORM_INLINE void put(void* to, long long element, float value) {
  Packed<T, 1> one;
  const float values[1] = {value};
  one.set(values);
  one.store(static_cast<char*>(to) + element * T::bytes);
}

template <class T, bool adds>
RMSNORM_INLINE void generic_norm(
    const void* x, const void* residual, const void* weight, int rows, void* y, void* sum, int width, u32 epsilon,
    int one_plus, int cast_first, float* shared) {
  if (static_cast<int>(blockIdx.x) >= rows) return;
  const long long begin = static_cast<long long>(blockIdx.x) * width;
  float squares = 0.0f;
  for (int c = threadIdx.x; c < width; c += Generic::threads) {
    float h = value_at<T>(x, begin + c);
    if constexpr (adds) {
      h = rounded<T>(h + value_at<T>(residual, begin + c));
      put<T>(sum, begin + c, h);
    }
    squares += h * h;
  }
  squares = reduced<Generic, Sum>(squares, shared, shared + Generic::threads / 32);
  const float factor = inverse_root(squares / static_cast<float>(width) + float_of(epsilon));
  for (int c = threadIdx.x; c < width; c += Generic::threads) {
    // Each value is read by the thread that wrote it.
    float h = value_at<T>(adds ? sum : x, begin + c) * factor;
    float scale = value_at<T>(weight, c);
    if (one_plus) scale += 1.0f;
    if (cast_first) h = rounded<T>(h), scale = rounded<T>(scale);
    put<T>(y, begin + c, h * scale);
  }
}

}  // namespace rmsnorm

#define RMSNORM_GENERIC(name, format)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) generic_rms_norm_##name(                                          \
      const void* x, const void* weight, int rows, void* y, int width, unsigned epsilon, int one_plus,                \
      int cast_first) {                                                                                               \
    RMSNORM_SHARED(shared, 9);                                                                                        \
    rmsnorm::generic_norm<rmsnorm::format, false>(                                                                    \
        x, nullptr, weight, rows, y, nullptr, width, epsilon, one_plus, cast_first, shared);                          \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) generic_add_rms_norm_##name(                                      \
      const void* x, const void* residual, const void* weight, int rows, void* y, void* sum, int width,               \
      unsigned epsilon, int one_plus, int cast_first) {                                                               \
    RMSNORM_SHARED(shared, 9);                                                                                        \
    rmsnorm::generic_norm<rmsnorm::format, true>(                                                                     \
        x, residual, weight, rows, y, sum, width, epsilon, one_plus, cast_first, shared);                             \
  }

RMSNORM_GENERIC(float32, Float32)
RMSNORM_GENERIC(float16, Float16)
RMSNORM_GENERIC(bfloat16, BFloat16)
