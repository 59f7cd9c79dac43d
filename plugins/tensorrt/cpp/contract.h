// Written by plugins/tensorrt/header.py from plugins/contract.py; change that, and write this again.
#pragma once

namespace rmsnorm_deploy::contract {

constexpr char name_space[] = "rmsnorm_deploy";
constexpr char version[] = "1";
// Changes with the contract; see header.py.
constexpr char digest[] = "67280a250146";

// Fields: the attributes of a node, and the compiled kernels that only engines have.
constexpr char epsilon[] = "epsilon";
constexpr char scale_offset[] = "scale_offset";
constexpr char scale_type[] = "scale_type";
constexpr char quant_type[] = "quant_type";
constexpr char kernels[] = "kernels";

constexpr int widest = 65536;

struct Operator {
  const char* name;
  int inputs, outputs;
  bool adds;       // x and residual are added first, and the sum is the second output
  bool quantized;  // the first output is quantized by y_scale, the last input, to quant_type
};

constexpr Operator operators[] = {
    {"RMSNorm", 2, 1, false, false},
    {"AddRMSNorm", 3, 2, true, false},
    {"RMSNormQuant", 3, 1, false, true},
    {"AddRMSNormQuant", 4, 2, true, true},
};

}  // namespace rmsnorm_deploy::contract
