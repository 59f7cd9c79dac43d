// The compiled kernels of one norm and the bytes that an engine carries them in; see plugins/tensorrt/images.py for the
// format.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "norm.h"

namespace rmsnorm_deploy {

struct Image {
  bool ptx;
  int architecture;
  bool few;
  int block, rows, cluster;
  std::string bytes;

  bool runs_on(int device) const {
    return ptx ? architecture <= device : architecture / 10 == device / 10 && architecture <= device;
  }
};

struct Images {
  int width = 0;
  Dtype dtype = Dtype::float32;
  QuantType quant_type = QuantType::none;
  std::vector<Image> images;

  // A cubin before PTX, the nearest architecture, the layout for this many rows; -1 where none runs.
  int choose(int architecture, int rows, int multiprocessors) const;
  std::string pack() const;
  // Throws Refusal where the bytes were cut short or are not ours.
  static Images unpack(const char* bytes, size_t size);
};

}  // namespace rmsnorm_deploy
