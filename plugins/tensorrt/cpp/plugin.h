// RMSNorm and AddRMSNorm, with and without a quantized output, as TensorRT plugins (IPluginV3), and their creators.
// Names, fields and order of inputs are those of plugins/contract.py, from which contract.h is generated.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "contract.h"
#include "driver.h"
#include "norm.h"

namespace rmsnorm_deploy {

// The attributes of a node or the fields of an engine; their values are not checked yet.
struct Attributes {
  float epsilon = 0.0f, scale_offset = 0.0f;
  int scale_type = 0, quant_type = 0;
};

class NormPlugin : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  // `packed`: the kernels of an engine; empty while an engine is built.
  NormPlugin(const contract::Operator& op, const Attributes& attributes, std::shared_ptr<const std::string> packed);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  char const* getPluginName() const noexcept override { return op_.name; }
  char const* getPluginVersion() const noexcept override { return contract::version; }
  char const* getPluginNamespace() const noexcept override { return contract::name_space; }

  int32_t getNbOutputs() const noexcept override { return op_.outputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& expressions) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  char const* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  Norm norm_of(nvinfer1::DataType type, int width) const;
  // TensorRT's data type of y for that of x.
  nvinfer1::DataType output_type(nvinfer1::DataType x) const;
  // Finds the kernels for these inputs; throws Refusal if the engine has none for them.
  void load_kernels(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count);
  // Runs `work`; an exception is reported, and `failed` is returned.
  template <class Work, class Result>
  Result guarded(const char* where, Result failed, Work work) const noexcept;

  const contract::Operator& op_;
  Attributes attributes_;
  std::shared_ptr<const std::string> packed_;
  std::shared_ptr<LoadedKernels> kernels_;
  std::string timing_id_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

class NormCreator : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit NormCreator(const contract::Operator& op);

  nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return op_.name; }
  char const* getPluginVersion() const noexcept override { return contract::version; }
  char const* getPluginNamespace() const noexcept override { return contract::name_space; }

 private:
  const contract::Operator& op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// The creators of all operators; they live until the process ends.
std::vector<nvinfer1::IPluginCreatorInterface*>& creators();

}  // namespace rmsnorm_deploy
