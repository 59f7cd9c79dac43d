#include "images.h"

#include <cstring>
#include <tuple>

#include "library.h"

namespace rmsnorm_deploy {
namespace {

constexpr char magic[] = "RMSNORM1";

void put(std::string& to, uint32_t value) {
  for (int i = 0; i < 4; ++i) to.push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

struct Reader {
  const char* bytes;
  size_t size, position = 0;

  const char* take(size_t count) {
    if (count > size - position)
      throw Refusal("packed kernels: expected " + std::to_string(count) + " more bytes, got " +
                    std::to_string(size - position));
    position += count;
    return bytes + position - count;
  }

  uint32_t number() {
    const unsigned char* at = reinterpret_cast<const unsigned char*>(take(4));
    return at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
  }
};

}  // namespace

int Images::choose(int architecture, int rows, int multiprocessors) const {
  int best = -1;
  auto rank = [&](const Image& image) {
    const bool suits = !image.few || image.grid(rows) <= multiprocessors;
    return std::make_tuple(!image.ptx, image.architecture, suits, image.few, image.cluster);
  };
  for (size_t i = 0; i < images.size(); ++i)
    if (images[i].runs_on(architecture) && (best < 0 || rank(images[i]) > rank(images[best]))) best = static_cast<int>(i);
  return best;
}

std::string Images::pack() const {
  std::string to(magic, 8);
  put(to, width), put(to, static_cast<int>(dtype)), put(to, static_cast<uint32_t>(images.size()));
  put(to, static_cast<uint32_t>(quant_type));
  for (const Image& image : images) {
    for (uint32_t value : {static_cast<uint32_t>(image.ptx), static_cast<uint32_t>(image.architecture),
                           static_cast<uint32_t>(image.few), static_cast<uint32_t>(image.block),
                           static_cast<uint32_t>(image.rows), static_cast<uint32_t>(image.cluster),
                           static_cast<uint32_t>(image.bytes.size()), static_cast<uint32_t>(image.waits)})
      put(to, value);
    to += image.bytes;
    to.append((8 - image.bytes.size() % 8) % 8, '\0');
  }
  return to;
}

Images Images::unpack(const char* bytes, size_t size) {
  Reader from{bytes, size};
  if (std::memcmp(from.take(8), magic, 8)) throw Refusal("packed kernels: expected RMSNORM1 at the beginning");
  Images found;
  found.width = static_cast<int>(from.number());
  const int dtype = static_cast<int>(from.number());
  if (!is_dtype(dtype)) throw Refusal("packed kernels: unknown data type " + std::to_string(dtype));
  found.dtype = static_cast<Dtype>(dtype);
  const uint32_t count = from.number();
  const int quant_type = static_cast<int>(from.number());
  if (quant_type && !is_quant_type(quant_type))
    throw Refusal("packed kernels: unknown quantized data type " + std::to_string(quant_type));
  found.quant_type = static_cast<QuantType>(quant_type);
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t values[8];
    for (uint32_t& value : values) value = from.number();
    if (!values[3] || !values[4] || !values[5])
      throw Refusal("packed kernels: image " + std::to_string(i) + ": expected block, rows and cluster above 0");
    const char* image = from.take(values[6]);
    found.images.push_back({values[0] != 0, static_cast<int>(values[1]), values[2] != 0, static_cast<int>(values[3]),
                            static_cast<int>(values[4]), static_cast<int>(values[5]), std::string(image, values[6]),
                            values[7] != 0});
    from.take((8 - values[6] % 8) % 8);
  }
  return found;
}

}  // namespace rmsnorm_deploy
