// The kernel's source, which the library holds, compiled by NVRTC when an engine is built.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "images.h"

namespace rmsnorm_deploy {

// Both layouts for each architecture, and PTX of the newest; compiled once for all norms that are equal. Without NVRTC
// there are no images, and the generic kernel runs the norm. Throws Refusal where NVRTC refuses the source or an
// architecture that was asked for, and without NVRTC where the output is quantized, which the generic kernel cannot.
// The result is packed.
std::shared_ptr<const std::string> packed_images(const Norm& norm);

// Architectures to compile for: RMSNORM_DEPLOY_ARCHITECTURES (such as 86,89), else the GPU's, else all that are usual.
std::vector<int> wanted_architectures(bool* asked_for = nullptr);

// NVRTC's version, such as 13.0; empty where it cannot be loaded.
std::string nvrtc_version();

}  // namespace rmsnorm_deploy
