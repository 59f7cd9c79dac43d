// Errors and reports, which all parts of the library use.
#pragma once

#include <stdexcept>
#include <string>

namespace rmsnorm_deploy {

// An unsupported or invalid value; the message says what was expected and what was found.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Writes a line to standard error and keeps it for `rmsnorm_deploy_last_error`. TensorRT's logger cannot be used: its
// interface differs between the major versions that this library serves.
void report_error(const std::string& where, const std::string& message);
void report_warning(const std::string& message);
std::string last_error();

// One compiled kernel as a JSON object, for `rmsnorm_deploy_kernels`.
void report_kernel(const std::string& json);
std::string kernels_report();

}  // namespace rmsnorm_deploy
