// The compiled kernels of one norm, and the bytes in which an engine stores them; plugins/tensorrt/images.py describes
// the format.
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
  bool waits;  // for the kernel before it: programmatic dependent launch

  // Number of blocks for this many rows.
  int64_t grid(int64_t count) const { return (count + rows - 1) / rows * cluster; }

  bool runs_on(int device) const {
    return ptx ? architecture <= device : architecture / 10 == device / 10 && architecture <= device;
  }
};

struct Images {
  int width = 0;
  Dtype dtype = Dtype::float32;
  QuantType quant_type = QuantType::none;
  std::vector<Image> images;

  // Index of the image to launch: a cubin before PTX, the nearest architecture, the layout for the fewest rows; -1 if
  // there is none.
  int choose(int architecture, int rows, int multiprocessors) const;
  std::string pack() const;
  // Throws Refusal if the bytes are truncated or of another format.
  static Images unpack(const char* bytes, size_t size);
};

}  // namespace rmsnorm_deploy
