// The CUDA driver, which is loaded at its first use: the library does not link against CUDA, and a machine that only
// builds engines does not require a driver.
#pragma once

#include <memory>
#include <string>

#include "images.h"

namespace rmsnorm_deploy {

// The kernels of one norm in an engine, loaded once for each CUDA context and shared by all plugins with the same bytes.
// Modules stay loaded until the process ends.
class LoadedKernels {
 public:
  LoadedKernels(Images images, const Norm& norm);
  ~LoadedKernels();
  LoadedKernels(const LoadedKernels&) = delete;
  LoadedKernels& operator=(const LoadedKernels&) = delete;

  // The same object for the same bytes and norm.
  static std::shared_ptr<LoadedKernels> get(const std::string& packed, const Norm& norm);

  // Width and data types that the kernels were compiled for.
  int width() const;
  Dtype dtype() const;
  QuantType quant_type() const;

  // Loads the kernel for `rows` rows into the current context, so that nothing is loaded during stream capture.
  void prepare(int rows);
  // Launches the kernel on device pointers; for 0 rows nothing is launched. Throws Refusal.
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
