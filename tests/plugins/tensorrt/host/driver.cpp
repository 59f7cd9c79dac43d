// Calls every function of the plugin's interface in the order in which TensorRT does. `driver LIBRARY` reads commands
// from standard input, one a line, and answers each with a line:
//
//   create OP PHASE name=value ...   fields: epsilon and scale_offset float, scale_type and quant_type int, kernels=saved
//   describe                         capabilities, names, number of outputs, tactics, workspace, timing id
//   types T T ..                     output data types for these input types
//   dims D,D D,D ..                  output dims for these inputs
//   formats T F T F ..               supportsFormatCombination at each position
//   configure T D,D T D,D ..         for these inputs; -1 is a dim that is not known
//   serialize                        names, types and lengths of the fields; kernels are saved for `create`
//   attach / clone                   goes on with the copy
//   shape T D,D ..                   onShapeChange
//   enqueue T D,D .. IN OUT          reads the inputs' bytes from file IN, writes the outputs' to file OUT
//   error / kernels                  the library's own reports
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

class Number : public IDimensionExpr {
 public:
  explicit Number(int64_t value) : value(value) {}
  const int64_t value;
};

class Expressions : public IExprBuilder {};

IPluginV3* plugin = nullptr;
IPluginV3OneCore* core = nullptr;
IPluginV3OneBuild* build = nullptr;
IPluginV3OneRuntime* runtime = nullptr;
std::string saved_kernels;
bool quantized = false;

void take(IPluginV3* it) {
  plugin = it;
  core = it ? static_cast<IPluginV3OneCore*>(it->getCapabilityInterface(PluginCapabilityType::kCORE)) : nullptr;
  build = it ? static_cast<IPluginV3OneBuild*>(it->getCapabilityInterface(PluginCapabilityType::kBUILD)) : nullptr;
  runtime = it ? static_cast<IPluginV3OneRuntime*>(it->getCapabilityInterface(PluginCapabilityType::kRUNTIME)) : nullptr;
}

Dims dims_of(const std::string& text) {
  Dims dims{};
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');)
    if (part != "scalar") dims.d[dims.nbDims++] = std::stoll(part);
  return dims;
}

PluginTensorDesc desc_of(const std::string& type, const std::string& dims) {
  PluginTensorDesc desc{};
  desc.type = static_cast<DataType>(std::stoi(type)), desc.dims = dims_of(dims), desc.format = TensorFormat::kLINEAR;
  desc.scale = 1.0f;
  return desc;
}

size_t bytes_of(const PluginTensorDesc& desc) {
  size_t count = desc.type == DataType::kFLOAT ? 4 : desc.type == DataType::kINT8 || desc.type == DataType::kFP8 ? 1 : 2;
  for (int i = 0; i < desc.dims.nbDims; ++i) count *= static_cast<size_t>(desc.dims.d[i]);
  return count;
}

std::vector<PluginTensorDesc> descs(const std::vector<std::string>& words, size_t begin, size_t end) {
  std::vector<PluginTensorDesc> found;
  for (size_t i = begin; i + 1 < end; i += 2) found.push_back(desc_of(words[i], words[i + 1]));
  return found;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& from) {
  std::vector<DynamicPluginTensorDesc> found;
  for (const auto& desc : from) found.push_back({desc, desc.dims, desc.dims, desc.dims});
  return found;
}

// Quantized outputs are of the plugin's own type; what it refuses has outputs like x.
std::vector<PluginTensorDesc> outputs_of(const std::vector<PluginTensorDesc>& inputs) {
  std::vector<PluginTensorDesc> found(static_cast<size_t>(build->getNbOutputs()), inputs[0]);
  std::vector<DataType> given, made(found.size());
  for (const auto& desc : inputs) given.push_back(desc.type);
  if (quantized && !build->getOutputDataTypes(made.data(), static_cast<int32_t>(made.size()), given.data(),
                                              static_cast<int32_t>(given.size())))
    for (size_t i = 0; i < found.size(); ++i) found[i].type = made[i];
  return found;
}

std::string create(IPluginCreatorV3One& creator, const std::vector<std::string>& words) {
  const auto phase = words[2] == "runtime" ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD;
  std::vector<std::unique_ptr<char[]>> memory;  // given back after the call: the plugin must have copied
  std::vector<PluginField> fields;
  for (size_t i = 3; i < words.size(); ++i) {
    const size_t equals = words[i].find('=');
    auto name = std::make_unique<char[]>(equals + 1);
    std::memcpy(name.get(), words[i].data(), equals);
    const std::string key = words[i].substr(0, equals), value = words[i].substr(equals + 1);
    std::string bytes;
    PluginFieldType type = PluginFieldType::kFLOAT32;
    int32_t length = 1;
    if (key == "kernels") {
      bytes = value == "saved" ? saved_kernels : value;
      type = PluginFieldType::kINT8, length = static_cast<int32_t>(bytes.size());
    } else if (key == "scale_type" || key == "quant_type") {
      const int32_t number = std::stoi(value);
      bytes.assign(reinterpret_cast<const char*>(&number), 4), type = PluginFieldType::kINT32;
    } else {
      const float number = std::stof(value);
      bytes.assign(reinterpret_cast<const char*>(&number), 4);
    }
    auto data = std::make_unique<char[]>(bytes.size() + 1);
    std::memcpy(data.get(), bytes.data(), bytes.size());
    fields.push_back({name.get(), data.get(), type, length});
    memory.push_back(std::move(name)), memory.push_back(std::move(data));
  }
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  take(creator.createPlugin("a_node", &collection, phase));
  quantized = std::string(creator.getPluginName()).find("Quant") != std::string::npos;
  for (auto& block : memory) std::memset(block.get(), 0x7f, 1);
  return plugin ? "made" : "refused";
}

std::string answer(void* library, const std::vector<std::string>& words) {
  std::ostringstream text;
  const std::string& what = words[0];
  if (what == "create") {
    int32_t count = 0;
    auto* all = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(count);
    for (int32_t i = 0; i < count; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
      if (words[1] == creator->getPluginName()) return create(*creator, words);
    }
    return "no such creator";
  }
  if (what == "error" || what == "kernels") {
    const std::string name = what == "error" ? "rmsnorm_deploy_last_error" : "rmsnorm_deploy_kernels";
    return reinterpret_cast<const char* (*)()>(dlsym(library, name.c_str()))();
  }
  if (what == "creators") {
    int32_t count = 0;
    auto* all = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(count);
    for (int32_t i = 0; i < count; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
      text << creator->getPluginName() << " " << creator->getPluginVersion() << " " << creator->getPluginNamespace() << ":";
      const PluginFieldCollection* names = creator->getFieldNames();
      for (int32_t j = 0; j < names->nbFields; ++j)
        text << " " << names->fields[j].name << "/" << static_cast<int>(names->fields[j].type);
      text << ";";
    }
    return text.str();
  }
  if (!plugin) return "no plugin";
  if (what == "describe") {
    text << core->getPluginName() << " " << core->getPluginVersion() << " " << core->getPluginNamespace() << " "
         << build->getNbOutputs() << " " << build->getNbTactics() << " " << build->getFormatCombinationLimit() << " "
         << build->getWorkspaceSize(nullptr, 0, nullptr, 0) << " " << runtime->setTactic(0) << " "
         << build->getTimingCacheID();
  } else if (what == "types") {
    std::vector<DataType> inputs;
    for (size_t i = 1; i < words.size(); ++i) inputs.push_back(static_cast<DataType>(std::stoi(words[i])));
    std::vector<DataType> outputs(static_cast<size_t>(build->getNbOutputs()));
    text << build->getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()), inputs.data(),
                                      static_cast<int32_t>(inputs.size())) << ":";
    for (DataType type : outputs) text << " " << static_cast<int>(type);
  } else if (what == "dims") {
    std::vector<std::unique_ptr<Number>> numbers;
    std::vector<DimsExprs> inputs;
    for (size_t i = 1; i < words.size(); ++i) {
      const Dims dims = dims_of(words[i]);
      DimsExprs expressions{};
      expressions.nbDims = dims.nbDims;
      for (int j = 0; j < dims.nbDims; ++j) {
        numbers.push_back(std::make_unique<Number>(dims.d[j]));
        expressions.d[j] = numbers.back().get();
      }
      inputs.push_back(expressions);
    }
    std::vector<DimsExprs> outputs(static_cast<size_t>(build->getNbOutputs()));
    Expressions expressions;
    const int32_t status = build->getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                                  outputs.data(), static_cast<int32_t>(outputs.size()), expressions);
    text << status << ":";
    if (!status)
      for (const DimsExprs& output : outputs) {
        text << " ";
        for (int j = 0; j < output.nbDims; ++j) text << (j ? "," : "") << static_cast<const Number*>(output.d[j])->value;
      }
  } else if (what == "formats") {
    std::vector<DynamicPluginTensorDesc> all;
    for (size_t i = 1; i + 1 < words.size(); i += 2) {
      PluginTensorDesc desc = desc_of(words[i], "2,8");
      desc.format = static_cast<TensorFormat>(std::stoi(words[i + 1]));
      all.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
    const int32_t outputs = build->getNbOutputs(), inputs = static_cast<int32_t>(all.size()) - outputs;
    for (int32_t i = 0; i < static_cast<int32_t>(all.size()); ++i)
      text << build->supportsFormatCombination(i, all.data(), inputs, outputs);
  } else if (what == "configure") {
    const auto inputs = descs(words, 1, words.size());
    const auto in = dynamic(inputs), out = dynamic(outputs_of(inputs));
    text << build->configurePlugin(in.data(), static_cast<int32_t>(in.size()), out.data(), static_cast<int32_t>(out.size()));
  } else if (what == "serialize") {
    const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      text << field.name << "/" << static_cast<int>(field.type) << "/" << field.length << " ";
      if (!std::strcmp(field.name, "kernels")) saved_kernels.assign(static_cast<const char*>(field.data), field.length);
    }
  } else if (what == "attach" || what == "clone") {
    IPluginV3* before = plugin;
    take(what == "attach" ? runtime->attachToContext(nullptr) : plugin->clone());
    delete before;
    text << (plugin ? "made" : "refused");
  } else if (what == "shape") {
    const auto inputs = descs(words, 1, words.size());
    const auto outputs = outputs_of(inputs);
    text << runtime->onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
                                   static_cast<int32_t>(outputs.size()));
  } else if (what == "enqueue") {
    const auto inputs = descs(words, 1, words.size() - 2);
    const auto outputs = outputs_of(inputs);
    std::ifstream from(words[words.size() - 2], std::ios::binary);
    std::vector<std::vector<std::max_align_t>> memory;
    auto block = [&](size_t bytes) {
      memory.emplace_back(bytes / sizeof(std::max_align_t) + 1);
      return static_cast<void*>(memory.back().data());
    };
    memory.reserve(8);
    std::vector<const void*> in;
    std::vector<void*> out;
    for (const auto& desc : inputs) {
      void* data = block(bytes_of(desc));
      from.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes_of(desc)));
      in.push_back(data);
    }
    for (const auto& desc : outputs) out.push_back(block(bytes_of(desc)));
    text << runtime->enqueue(inputs.data(), outputs.data(), in.data(), out.data(), nullptr,
                             reinterpret_cast<cudaStream_t>(0x5eed));
    std::ofstream to(words.back(), std::ios::binary);
    for (size_t i = 0; i < outputs.size(); ++i)
      to.write(static_cast<const char*>(out[i]), static_cast<std::streamsize>(bytes_of(outputs[i])));
  } else {
    return "unknown command";
  }
  return text.str();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::cerr << dlerror() << "\n", 3;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream parts(line);
    std::vector<std::string> words;
    for (std::string word; parts >> word;) words.push_back(word);
    if (words.empty()) continue;
    const std::string text = answer(library, words);  // before the mark: launches print lines of their own
    std::cout << "= " << text << std::endl;
  }
  delete plugin;
  return 0;
}
