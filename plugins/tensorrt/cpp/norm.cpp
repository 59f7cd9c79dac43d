#include "norm.h"

#include "contract.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace rmsnorm_deploy {
namespace {

constexpr int most_threads = 1024, widest_access = 16, warp_bytes = 1024, block_of_warps = 128;
constexpr int cluster_architecture = 90, clustered_bytes = 64 * 1024;
constexpr int spread_bytes = 48 * 1024, spread_share = 16 * 1024;
constexpr int fewest_of_two = 513, fewest_of_four = 1024, most_of_four = 1024;

int ceiling(int a, int b) { return (a + b - 1) / b; }

// Bytes of registers that a thread may use for loaded values, by the threads of its block.
int limit_of(int threads) { return threads <= 256 ? 320 : threads <= 512 ? 192 : 96; }

std::tuple<int, double> cost_of(int threads, int held, int vectors, bool few) {
  const int tiles = ceiling(vectors, threads * held);
  const double idle = static_cast<double>(tiles * threads * held) / vectors - 1;
  const double each = few ? (vectors < fewest_of_two ? 1.0 : 2.0) : (vectors < fewest_of_four ? 2.0 : 4.0);
  const double wanted = std::min(std::max(vectors / each, few ? 128.0 : 64.0), few ? 1024.0 : 512.0);
  const double uneven = (threads & (threads - 1)) == 0 ? 0.0 : 0.02;
  return {tiles, idle + std::abs(threads - wanted) / wanted * 0.25 + uneven};
}

// A cluster of `spread` blocks for each row; a thread reads at most `most_vectors` at a time if any layout does.
Layout block_layout(
    int held_bytes, int elements, int vectors, int spread, bool few, int most_vectors = std::numeric_limits<int>::max()) {
  const int share = ceiling(vectors, spread);
  Layout best = {0, 0, elements, 1, spread};
  std::tuple<int, double> least;
  for (int threads = 32; threads <= most_threads; threads += 32) {
    const int most = std::max(limit_of(threads) / (held_bytes * elements), 1), wanted = ceiling(share, threads);
    if (wanted > most && threads != most_threads) continue;
    const int held = std::min(wanted, most);  // more is read in several tiles
    if (held > most_vectors) continue;
    const auto cost = cost_of(threads, held, share, few);
    if (best.threads == 0 || cost < least) best.threads = threads, best.vectors = held, least = cost;
  }
  if (best.threads == 0) return block_layout(held_bytes, elements, vectors, spread, few);
  best.prefetch = few && best.vectors * elements <= 16;
  best.few = few;
  return best;
}

}  // namespace

int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::float16: return "float16";
    case Dtype::bfloat16: return "bfloat16";
  }
  std::abort();
}

bool is_dtype(int number) {
  return number == static_cast<int>(Dtype::float32) || number == static_cast<int>(Dtype::float16) ||
         number == static_cast<int>(Dtype::bfloat16);
}

const char* name_of(QuantType type) {
  switch (type) {
    case QuantType::none: return "none";
    case QuantType::int8: return "int8";
    case QuantType::float8_e4m3: return "float8_e4m3";
  }
  std::abort();
}

bool is_quant_type(int number) {
  return number == static_cast<int>(QuantType::int8) || number == static_cast<int>(QuantType::float8_e4m3);
}

const char* Norm::op_type() const {
  for (const contract::Operator& op : contract::operators)
    if (op.adds == adds && op.quantized == is_quantized()) return op.name;
  std::abort();
}

std::string Norm::generic_kernel() const { return std::string("generic_") + kernel() + "_" + name_of(dtype); }

std::vector<Layout> layouts_of(const Norm& norm, int architecture) {
  const int bytes = bytes_of(norm.dtype);
  // 16 elements of half types: one access of a quantized y, two of x.
  int elements = widest_access / (norm.is_quantized() && bytes == 2 ? 1 : bytes);
  while (elements > 1 && norm.width % elements) elements /= 2;
  const int vectors = norm.width / elements;
  if (vectors <= 32 && norm.width * bytes <= warp_bytes) {
    int threads = 1;
    while (threads < vectors) threads *= 2;
    return {{threads, 1, elements, 32 / threads, 1, false, true}, {threads, 1, elements, block_of_warps / threads}};
  }
  const int held_bytes = bytes * (norm.adds ? 2 : 1), row_bytes = norm.width * held_bytes;
  const bool clusters = architecture >= cluster_architecture;
  const int spread = !clusters || row_bytes <= clustered_bytes ? 1 : row_bytes <= 2 * clustered_bytes ? 2 : 4;
  // Registers of four vectors spill there, see `launch_config.py`.
  const bool spills = architecture / 10 == 10 && norm.adds && norm.dtype == Dtype::float16;
  const auto block = [&](int blocks, bool few) {
    const bool limited = spills && ceiling(vectors, blocks) > most_of_four;
    return limited ? block_layout(held_bytes, elements, vectors, blocks, few, 2)
                   : block_layout(held_bytes, elements, vectors, blocks, few);
  };
  std::vector<Layout> found;
  if (clusters && row_bytes > spread_bytes) {
    const int wide = row_bytes <= 2 * spread_share ? 2 : row_bytes <= 4 * spread_share ? 4 : 8;
    found.push_back(block(wide, true));
  }
  for (bool few : {true, false}) found.push_back(block(spread, few));
  return found;
}

std::vector<std::string> compile_options(const Norm& norm, const Layout& layout, int architecture) {
  static const struct { Dtype dtype; const char* format; } formats[] = {
      {Dtype::float32, "Float32"}, {Dtype::float16, "Float16"}, {Dtype::bfloat16, "BFloat16"}};
  std::string format;
  for (const auto& row : formats)
    if (row.dtype == norm.dtype) format = row.format;
  std::string out = format;
  switch (norm.quant_type) {
    case QuantType::none: break;
    case QuantType::int8: out = "Int8"; break;
    case QuantType::float8_e4m3: out = "Float8E4M3"; break;
  }
  unsigned bits;
  std::memcpy(&bits, &norm.epsilon, 4);
  char epsilon[16];
  std::snprintf(epsilon, sizeof epsilon, "0x%08xu", bits);
  const std::pair<const char*, std::string> macros[] = {
      {"NAME", norm.kernel()}, {"X", format}, {"RESIDUAL", norm.adds ? format : "None"}, {"WEIGHT", format},
      {"Y", format}, {"OUT", out}, {"WIDTH", std::to_string(norm.width)}, {"INNER", "1"}, {"WEIGHT_ROWS", "1"},
      {"ADDS", norm.adds ? "1" : "0"}, {"SCALE", norm.one_plus ? "2" : "1"}, {"GATE", "0"}, {"ACTIVATION", "0"},
      {"QUANTIZATION", norm.is_quantized() ? "1" : "0"}, {"CAST_FIRST", norm.cast_first ? "1" : "0"}, {"STRIDED", "0"},
      {"EPSILON", epsilon}, {"THREADS", std::to_string(layout.threads)}, {"VECTORS", std::to_string(layout.vectors)},
      {"ELEMENTS", std::to_string(layout.elements)}, {"ROWS", std::to_string(layout.rows)},
      {"CLUSTER", std::to_string(layout.cluster)}, {"PREFETCH", layout.prefetch ? "1" : "0"}};
  std::vector<std::string> options = {"--gpu-architecture=sm_" + std::to_string(architecture), "--std=c++17"};
  for (const auto& [name, value] : macros) options.push_back(std::string("-DRMSNORM_") + name + "=" + value);
  return options;
}

}  // namespace rmsnorm_deploy
