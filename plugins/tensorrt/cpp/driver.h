// CUDA's driver, opened when it is first wanted: the library links against no CUDA library at all, and a machine that
// only builds engines needs no driver.
#pragma once

#include <memory>
#include <string>

#include "images.h"

namespace rmsnorm_deploy {

// The kernels of one engine's norm, loaded once for each CUDA context and shared by all plugins that carry the same
// bytes. Modules stay loaded until the process ends.
class LoadedKernels {
 public:
  LoadedKernels(Images images, const Norm& norm);
  ~LoadedKernels();
  LoadedKernels(const LoadedKernels&) = delete;
  LoadedKernels& operator=(const LoadedKernels&) = delete;

  // The same object for the same bytes and norm.
  static std::shared_ptr<LoadedKernels> get(const std::string& packed, const Norm& norm);

  // What the kernels were compiled for.
  int width() const;
  Dtype dtype() const;
  QuantType quant_type() const;

  // Load what `rows` rows need into the current context, so that nothing is loaded while a stream is captured.
  void prepare(int rows);
  // `pointers`: addresses of inputs, then of outputs. Nothing is launched for no rows. Throws Refusal.
  void launch(const void* const* inputs, int input_count, void* const* outputs, int output_count, int rows,
              void* stream);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

struct Driver {
  // Compute capability of the first GPU without its point, such as 89; 0 without a GPU.
  static int first_architecture();
};

}  // namespace rmsnorm_deploy
