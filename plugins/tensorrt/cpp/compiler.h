// Compiles the kernel's source, which is embedded in the library, with NVRTC when an engine is built.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "images.h"

namespace rmsnorm_deploy {

// The packed images: both layouts for each architecture, and PTX of the newest; compiled once for equal norms. Without
// NVRTC there are no images, and the generic kernel runs the norm. Throws Refusal if NVRTC does not compile the source
// or does not support a requested architecture, and, without NVRTC, if the output is quantized, which the generic
// kernel does not support.
std::shared_ptr<const std::string> packed_images(const Norm& norm);

// Architectures to compile for: RMSNORM_DEPLOY_ARCHITECTURES (such as 86,89), else the GPU's, else all common ones.
std::vector<int> wanted_architectures(bool* asked_for = nullptr);

// NVRTC's version, such as 13.0; empty if it cannot be loaded.
std::string nvrtc_version();

}  // namespace rmsnorm_deploy
