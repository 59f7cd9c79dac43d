#include "plugin.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>

#include "compiler.h"
#include "library.h"

namespace rmsnorm_deploy {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

bool is_supported(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

Dtype dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return Dtype::float32;
    case DataType::kHALF: return Dtype::float16;
    case DataType::kBF16: return Dtype::bfloat16;
    default: throw Refusal("x: expected float32, float16 or bfloat16, got TensorRT's data type " +
                           std::to_string(static_cast<int>(type)));
  }
}

// The scale is multiplied in float32 or in the type of x.
void check_scale_type(int scale_type, Dtype dtype) {
  if (scale_type == static_cast<int>(Dtype::float32) || scale_type == static_cast<int>(dtype)) return;
  throw Refusal("scale_type: expected 1 or " + std::to_string(static_cast<int>(dtype)) + " for x of " + name_of(dtype) +
                ", got " + std::to_string(scale_type));
}

std::string text_of(const nvinfer1::Dims& dims) {
  std::string text = "(";
  for (int i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + ")";
}

bool equal(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
  if (a.nbDims != b.nbDims) return false;
  for (int i = 0; i < a.nbDims; ++i)
    if (a.d[i] != b.d[i] && a.d[i] >= 0 && b.d[i] >= 0) return false;
  return true;
}

// Number of inputs, from the first, that have x's dtype: all but y_scale.
int inputs_of_x(const contract::Operator& op) { return op.quantized ? op.inputs - 1 : op.inputs; }

// Checks dims and types of all inputs; returns the width.
template <class Describe>
int checked_width(int input_count, const contract::Operator& op, Describe describe) {
  if (input_count != op.inputs)
    throw Refusal("expected " + std::to_string(op.inputs) + " inputs, got " + std::to_string(input_count));
  const nvinfer1::PluginTensorDesc &x = describe(0), &scale = describe(inputs_of_x(op) - 1);
  for (int i = 1; i < inputs_of_x(op); ++i)
    if (describe(i).type != x.type) throw Refusal("expected inputs of one dtype");
  if (x.dims.nbDims < 1 || x.dims.d[x.dims.nbDims - 1] < 1)
    throw Refusal("x: expected a static last dim when the engine is built, got " + text_of(x.dims));
  const int width = static_cast<int>(x.dims.d[x.dims.nbDims - 1]);
  if (width > contract::widest)
    throw Refusal("x: expected a width of at most " + std::to_string(contract::widest) + ", got " + std::to_string(width));
  if (scale.dims.nbDims != 1 || scale.dims.d[0] != width)
    throw Refusal("scale: expected shape (" + std::to_string(width) + "), got " + text_of(scale.dims));
  if (op.adds && !equal(describe(1).dims, x.dims))
    throw Refusal("residual: expected x's shape " + text_of(x.dims) + ", got " + text_of(describe(1).dims));
  if (op.quantized) {
    const nvinfer1::PluginTensorDesc& y_scale = describe(input_count - 1);
    if (y_scale.type != DataType::kFLOAT)
      throw Refusal("y_scale: expected float32, got TensorRT's data type " + std::to_string(static_cast<int>(y_scale.type)));
    for (int i = 0; i < y_scale.dims.nbDims; ++i)
      if (y_scale.dims.d[i] != 1) throw Refusal("y_scale: expected one element, got shape " + text_of(y_scale.dims));
  }
  return width;
}

int64_t rows_of(const nvinfer1::PluginTensorDesc& x) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.dims.nbDims; ++i) rows *= x.dims.d[i];
  if (rows > 0x7fffffff) throw Refusal("x: expected at most 2147483647 rows, got " + std::to_string(rows));
  return rows;
}

template <class T>
T value_of(const PluginField& field, PluginFieldType type) {
  if (field.type != type || field.length != 1 || !field.data)
    throw Refusal(std::string(field.name) + ": expected one value of field type " +
                  std::to_string(static_cast<int>(type)) + ", got " + std::to_string(field.length) + " of type " +
                  std::to_string(static_cast<int>(field.type)));
  T value;
  std::memcpy(&value, field.data, sizeof value);
  return value;
}

void check(const Attributes& attributes, const contract::Operator& op) {
  char text[64];
  if (!(std::isfinite(attributes.epsilon) && attributes.epsilon >= 0.0f)) {
    std::snprintf(text, sizeof text, "%g", attributes.epsilon);
    throw Refusal(std::string("epsilon: expected a finite number of at least 0, got ") + text);
  }
  if (attributes.scale_offset != 0.0f && attributes.scale_offset != 1.0f) {
    std::snprintf(text, sizeof text, "%g", attributes.scale_offset);
    throw Refusal(std::string("scale_offset: expected 0 or 1, got ") + text);
  }
  if (!is_dtype(attributes.scale_type))
    throw Refusal("scale_type: expected one of 1 (float32), 10 (float16), 16 (bfloat16), got " +
                  std::to_string(attributes.scale_type));
  if (op.quantized && !is_quant_type(attributes.quant_type))
    throw Refusal("quant_type: expected one of 3 (int8), 17 (float8_e4m3), got " +
                  std::to_string(attributes.quant_type));
}

}  // namespace

// NormPlugin -----------------------------------------------------------------------------------------------------

NormPlugin::NormPlugin(
    const contract::Operator& op, const Attributes& attributes, std::shared_ptr<const std::string> packed)
    : op_(op), attributes_(attributes), packed_(std::move(packed)) {
  char text[96];
  std::snprintf(text, sizeof text, "%a-%g-%d", attributes.epsilon, attributes.scale_offset, attributes.scale_type);
  timing_id_ = text;
  if (op.quantized) timing_id_ += "-" + std::to_string(attributes.quant_type);
}

template <class Work, class Result>
Result NormPlugin::guarded(const char* where, Result failed, Work work) const noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    report_error(std::string(op_.name) + " " + where, error.what());
  } catch (...) {
    report_error(std::string(op_.name) + " " + where, "an unknown error");
  }
  return failed;
}

nvinfer1::IPluginCapability* NormPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* NormPlugin::clone() noexcept {
  return guarded("clone", static_cast<NormPlugin*>(nullptr), [&] {
    auto* copy = new NormPlugin(op_, attributes_, packed_);
    copy->kernels_ = kernels_;
    return copy;
  });
}

int32_t NormPlugin::getOutputDataTypes(
    DataType* outputs, int32_t output_count, DataType const* inputs, int32_t input_count) const noexcept {
  return guarded("getOutputDataTypes", -1, [&] {
    if (input_count != op_.inputs || output_count != op_.outputs)
      throw Refusal("expected " + std::to_string(op_.inputs) + " inputs and " + std::to_string(op_.outputs) +
                    " outputs, got " + std::to_string(input_count) + " and " + std::to_string(output_count));
    check_scale_type(attributes_.scale_type, dtype_of(inputs[0]));
    for (int i = 1; i < inputs_of_x(op_); ++i)
      if (inputs[i] != inputs[0]) throw Refusal("expected inputs of one dtype");
    if (op_.quantized && inputs[input_count - 1] != DataType::kFLOAT)
      throw Refusal("y_scale: expected float32, got TensorRT's data type " +
                    std::to_string(static_cast<int>(inputs[input_count - 1])));
    for (int i = 0; i < output_count; ++i) outputs[i] = i ? inputs[0] : output_type(inputs[0]);
    return 0;
  });
}

int32_t NormPlugin::getOutputShapes(
    nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
    nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  return guarded("getOutputShapes", -1, [&] {
    if (input_count != op_.inputs || output_count != op_.outputs) throw Refusal("unexpected number of inputs or outputs");
    const nvinfer1::DimsExprs &x = inputs[0], &scale = inputs[inputs_of_x(op_) - 1];
    if (x.nbDims < 1) throw Refusal("x: expected at least one dim, got none");
    if (scale.nbDims != 1) throw Refusal("scale: expected one dim, got " + std::to_string(scale.nbDims));
    if (op_.quantized && inputs[input_count - 1].nbDims > 1)
      throw Refusal("y_scale: expected one element, got " + std::to_string(inputs[input_count - 1].nbDims) + " dims");
    if (op_.adds && inputs[1].nbDims != x.nbDims)
      throw Refusal("residual: expected x's " + std::to_string(x.nbDims) + " dims, got " +
                    std::to_string(inputs[1].nbDims));
    for (int i = 0; i < output_count; ++i) outputs[i] = x;
    return 0;
  });
}

bool NormPlugin::supportsFormatCombination(
    int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t input_count, int32_t) noexcept {
  const nvinfer1::PluginTensorDesc &tensor = tensors[position].desc, &x = tensors[0].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (op_.quantized && position == input_count - 1) return tensor.type == DataType::kFLOAT;  // y_scale
  if (op_.quantized && position == input_count) return tensor.type == output_type(x.type);   // y
  if (!is_supported(tensor.type)) return false;
  if (position > 0) return tensor.type == x.type;
  const int dtype = static_cast<int>(dtype_of(x.type));
  return attributes_.scale_type == static_cast<int>(Dtype::float32) || attributes_.scale_type == dtype;
}

DataType NormPlugin::output_type(DataType x) const {
  if (!op_.quantized) return x;
  return attributes_.quant_type == static_cast<int>(QuantType::int8) ? DataType::kINT8 : DataType::kFP8;
}

Norm NormPlugin::norm_of(DataType type, int width) const {
  Norm norm;
  if (op_.quantized) norm.quant_type = static_cast<QuantType>(attributes_.quant_type);
  norm.adds = op_.adds, norm.dtype = dtype_of(type), norm.width = width, norm.epsilon = attributes_.epsilon;
  norm.one_plus = attributes_.scale_offset != 0.0f;
  norm.cast_first = norm.dtype != Dtype::float32 && attributes_.scale_type == static_cast<int>(norm.dtype);
  return norm;
}

int32_t NormPlugin::configurePlugin(
    nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count, nvinfer1::DynamicPluginTensorDesc const*,
    int32_t) noexcept {
  return guarded("configurePlugin", -1, [&] {
    const int width = checked_width(
        input_count, op_, [&](int i) -> const nvinfer1::PluginTensorDesc& { return inputs[i].desc; });
    const DataType type = inputs[0].desc.type;
    check_scale_type(attributes_.scale_type, dtype_of(type));
    packed_ = packed_images(norm_of(type, width));
    kernels_.reset();
    return 0;
  });
}

void NormPlugin::load_kernels(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count) {
  const int width =
      checked_width(input_count, op_, [&](int i) -> const nvinfer1::PluginTensorDesc& { return inputs[i]; });
  const Norm norm = norm_of(inputs[0].type, width);
  if (!packed_) throw Refusal("the engine has no kernels");
  std::shared_ptr<LoadedKernels> found = kernels_ ? kernels_ : LoadedKernels::get(*packed_, norm);
  if (found->width() != width || found->dtype() != norm.dtype)
    throw Refusal("the engine has kernels for width " + std::to_string(found->width()) + " of " +
                  name_of(found->dtype()) + ", and x has width " + std::to_string(width) + " of " +
                  name_of(norm.dtype));
  if (found->quant_type() != norm.quant_type)
    throw Refusal(std::string("the engine has kernels for a quantized type of ") + name_of(found->quant_type()) +
                  ", and the plugin's is " + name_of(norm.quant_type));
  kernels_ = found;
}

int32_t NormPlugin::onShapeChange(
    nvinfer1::PluginTensorDesc const* inputs, int32_t input_count, nvinfer1::PluginTensorDesc const*,
    int32_t) noexcept {
  return guarded("onShapeChange", -1, [&] {
    load_kernels(inputs, input_count);
    kernels_->prepare(static_cast<int>(rows_of(inputs[0])));
    return 0;
  });
}

int32_t NormPlugin::enqueue(
    nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded("enqueue", -1, [&] {
    if (!kernels_) load_kernels(input_descs, op_.inputs);
    kernels_->launch(inputs, op_.inputs, outputs, op_.outputs, static_cast<int>(rows_of(input_descs[0])), stream);
    return 0;
  });
}

nvinfer1::IPluginV3* NormPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

nvinfer1::PluginFieldCollection const* NormPlugin::getFieldsToSerialize() noexcept {
  return guarded("getFieldsToSerialize", static_cast<nvinfer1::PluginFieldCollection const*>(nullptr), [&] {
    fields_ = {{contract::epsilon, &attributes_.epsilon, PluginFieldType::kFLOAT32, 1},
               {contract::scale_offset, &attributes_.scale_offset, PluginFieldType::kFLOAT32, 1},
               {contract::scale_type, &attributes_.scale_type, PluginFieldType::kINT32, 1}};
    if (op_.quantized) fields_.push_back({contract::quant_type, &attributes_.quant_type, PluginFieldType::kINT32, 1});
    if (packed_)
      fields_.push_back(
          {contract::kernels, packed_->data(), PluginFieldType::kINT8, static_cast<int32_t>(packed_->size())});
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return static_cast<nvinfer1::PluginFieldCollection const*>(&collection_);
  });
}

// NormCreator ----------------------------------------------------------------------------------------------------

NormCreator::NormCreator(const contract::Operator& op) : op_(op) {
  fields_ = {{contract::epsilon, nullptr, PluginFieldType::kFLOAT32, 1},
             {contract::scale_offset, nullptr, PluginFieldType::kFLOAT32, 1},
             {contract::scale_type, nullptr, PluginFieldType::kINT32, 1}};
  if (op.quantized) fields_.push_back({contract::quant_type, nullptr, PluginFieldType::kINT32, 1});
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* NormCreator::createPlugin(
    char const* name, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase) noexcept {
  const std::string where = std::string(name && *name ? name : "a node without a name") + " (" + op_.name + ")";
  try {
    if (!fields) throw Refusal("expected fields, got none");
    Attributes found;
    bool epsilon = false, scale_offset = false, scale_type = false, quant_type = !op_.quantized;
    std::shared_ptr<const std::string> packed;
    for (int i = 0; i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      const std::string field_name = field.name ? field.name : "";
      if (field_name == contract::epsilon)
        found.epsilon = value_of<float>(field, PluginFieldType::kFLOAT32), epsilon = true;
      else if (field_name == contract::scale_offset)
        found.scale_offset = value_of<float>(field, PluginFieldType::kFLOAT32), scale_offset = true;
      else if (field_name == contract::scale_type)
        found.scale_type = value_of<int32_t>(field, PluginFieldType::kINT32), scale_type = true;
      else if (field_name == contract::quant_type && op_.quantized)
        found.quant_type = value_of<int32_t>(field, PluginFieldType::kINT32), quant_type = true;
      else if (field_name == contract::kernels && field.data)
        packed = std::make_shared<const std::string>(static_cast<const char*>(field.data), field.length);
    }
    const std::pair<bool, const char*> wanted[] = {
        {epsilon, contract::epsilon}, {scale_offset, contract::scale_offset}, {scale_type, contract::scale_type},
        {quant_type, contract::quant_type}};
    for (const auto& [is_there, attribute] : wanted)
      if (!is_there) throw Refusal(std::string("attribute ") + attribute + " is missing");
    check(found, op_);
    if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
      if (!packed) throw Refusal(std::string("field ") + contract::kernels + " is missing, so the engine has no kernel");
      Images::unpack(packed->data(), packed->size());  // damaged bytes are refused when the engine is loaded
    }
    return new NormPlugin(op_, found, packed);
  } catch (const std::exception& error) {
    report_error(where, error.what());
  } catch (...) {
    report_error(where, "an unknown error");
  }
  return nullptr;
}

std::vector<nvinfer1::IPluginCreatorInterface*>& creators() {
  static std::vector<nvinfer1::IPluginCreatorInterface*> all = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> made;
    for (const contract::Operator& op : contract::operators) made.push_back(new NormCreator(op));
    return made;
  }();
  return all;
}

}  // namespace rmsnorm_deploy
