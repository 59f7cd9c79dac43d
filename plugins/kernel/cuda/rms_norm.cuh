// RMSNorm and residual add + RMSNorm, specialized at compile time by a configuration C.
//
//   h = x                                              (in float32, like all values below)
//   h = x + residual, rounded to the residual's format  when it adds; it then has no gate
//   h = h * act(gate)                                  when C::gate is before
//   n = h / sqrt(mean(h^2) + eps)
//   y = n * s, s the weight or 1 + weight              when C::cast_first is false
//   y = round(n) * round(s)                            when it is true: both to y's format
//   y = round(y) * act(gate)                           when C::gate is after (not rounded before unless cast_first)
//   q = round(y / scale), y rounded to its own format  when the output is quantized
//
// One row is read by C::threads threads of each of C::cluster blocks; one block reads C::rows rows. A thread holds
// C::vectors vectors of C::elements adjacent values, which are all loaded before any computation. A row that is wider
// than threads x vectors x elements x cluster is read in several tiles, and is read again for the second half of the
// formula.
//
// y may overwrite x, and the sum the residual, if formats agree and rows are contiguous: each element is written by the
// thread that read it, after it read it.
#pragma once

#include "numbers.cuh"

namespace rmsnorm {

// In the order of models/spec.py.
enum Scale { no_scale, weight_scale, one_plus_weight_scale };
enum Gate { no_gate, gate_before, gate_after };
enum Activation { no_activation, silu, sigmoid };
enum Quantization { not_quantized, static_scale, scale_per_row };

struct None {
  static constexpr int bytes = 1;
};

// Rows may be strided: row r begins at (r / C::inner) * outer + (r % C::inner) * inner, in elements.
struct Strides {
  long long outer, inner;
};

struct Arguments {
  const void *x, *residual, *gate, *weight, *scale;
  int rows;
  Strides x_strides, residual_strides, gate_strides;
  void *y, *sum, *row_scale;
};

// Threads --------------------------------------------------------------------------------------------------------

// Without a GPU, the including file defines these, and threadIdx, blockIdx and __syncthreads.
#if RMSNORM_ON_GPU
#define RMSNORM_SHARED(name, count) __shared__ float name[count]

RMSNORM_INLINE float lane_across(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// 1 / sqrt(value), rounded once.
RMSNORM_INLINE float inverse_root(float value) { return __frsqrt_rn(value); }

// e^value, off by up to 2 ULP.
RMSNORM_INLINE float approximate_exponential(float value) { return expf(value); }

RMSNORM_INLINE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

RMSNORM_INLINE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Programmatic dependent launch, from sm_90 on: the blocks may begin while the kernel before this one in the stream still
// runs. What that one writes, which may be any input and output, is touched only after this wait, which lasts until all
// of it is in memory. It is also what keeps the loads before it before those behind it. Every thread must call it, so
// that the end of this kernel means the end of all kernels before it.
RMSNORM_INLINE void wait_for_previous() {
#if RMSNORM_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin once every block has called this; it waits for what this one writes, as above.
RMSNORM_INLINE void let_next_begin() {
#if RMSNORM_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Brings a line into a cache. Before sm_90, whose compiler moves loads behind each other's use, into the first one; from
// sm_90 on into the second, which alone may hold what the kernel before this one has yet to write.
RMSNORM_INLINE void prefetched(const void* from) {
#if RMSNORM_ARCH >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#else
  asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(from)));
#endif
}

// The value in the shared memory of another block of the cluster, at the address of `mine` in this block.
RMSNORM_INLINE float of_block(const float* mine, u32 rank) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(mine)), theirs;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(theirs) : "memory");
  return value;
}
#endif

struct Sum {
  static RMSNORM_INLINE float of(float a, float b) { return a + b; }
};

struct Maximum {
  static RMSNORM_INLINE float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces a value over all threads of a row; every thread of the block must call it. `partial` and `total` are shared
// memory used only by this reduction, so no barrier is required after it.
template <class C, class Op>
RMSNORM_INLINE float reduced(float value, float* partial, float* total) {
  constexpr int lanes = C::threads < 32 ? C::threads : 32;
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) value = Op::of(value, lane_across(value, distance));
  if constexpr (C::threads > 32) {
    constexpr int warps = C::threads / 32;
    const int warp = threadIdx.x / 32, first = threadIdx.x / C::threads * warps;
    if (threadIdx.x % 32 == 0) partial[warp] = value;
    __syncthreads();
    value = partial[first];
#pragma unroll
    for (int i = 1; i < warps; ++i) value = Op::of(value, partial[first + i]);
  }
  if constexpr (C::cluster > 1) {
    if (threadIdx.x == 0) *total = value;
    cluster_barrier();
    value = of_block(total, 0);
#pragma unroll
    for (int rank = 1; rank < C::cluster; ++rank) value = Op::of(value, of_block(total, rank));
  }
  return value;
}

// Rows -----------------------------------------------------------------------------------------------------------

// e^-a = (high + low) * 2^power for 0 <= a <= 170: within 2^-27 by a polynomial, without the GPU's approximate units.
struct Exponential {
  float high, low;
  int power;

  explicit RMSNORM_INLINE Exponential(float a) {
    const float shifted = fmaf(a, -0x1.715476p+0f, 0x1.8p+23f), n = shifted - 0x1.8p+23f;  // a / -ln(2), rounded
    power = static_cast<int>(bits_of(shifted) - 0x4b400000u);
    const float exact = fmaf(n, -0x1.62e4p-1f, -a), r = fmaf(n, -0x1.7f7d1cp-20f, exact);  // -a - n ln(2), in two parts
    float q = 1.0f / 40320;  // (e^r - 1 - r) / r^2
    q = fmaf(q, r, 1.0f / 5040);
    q = fmaf(q, r, 1.0f / 720);
    q = fmaf(q, r, 1.0f / 120);
    q = fmaf(q, r, 1.0f / 24);
    q = fmaf(q, r, 1.0f / 6);
    q = fmaf(q, r, 0.5f);
    const float sum = 1.0f + r;
    const float rest = (r - (sum - 1.0f)) + fmaf(n, -0x1.7f7d1cp-20f, exact - r) + r * r * q;
    high = sum + rest;
    low = rest - (high - sum);
  }
};

RMSNORM_INLINE float power_of_two(int exponent) { return float_of(static_cast<u32>(exponent + 127) << 23); }

// value * silu(z) or value * sigmoid(z), by e^-|z|, which cannot overflow. With `exact` everything but the last product
// has a low part, so that a float32 result has a single rounding more than its value.
template <int activation, bool exact>
RMSNORM_INLINE float gated(float value, float z) {
  static_assert(activation == silu || activation == sigmoid, "expected silu or sigmoid");
  if constexpr (exact) {
    if (z > -170.0f && z < 1e30f) {
      const Exponential e(fminf(fabsf(z), 170.0f));
      const float one_half = power_of_two(e.power - e.power / 2), other_half = power_of_two(e.power / 2);
      const float added = e.high * one_half * other_half, divisor = 1.0f + added;
      const float lost = (added - (divisor - 1.0f)) + e.low * one_half * other_half;
      const float dividend = z < 0.0f ? e.high : 1.0f, inverse = 1.0f / divisor, quotient = dividend * inverse;
      const float left = fmaf(-quotient, divisor, dividend) + (z < 0.0f ? e.low : 0.0f) - quotient * lost;
      float high = quotient, low = left * inverse;
      if constexpr (activation == silu) {
        high = quotient * z;
        low = fmaf(quotient, z, -high) + low * z;
      }
      if (z < 0.0f) high *= one_half, low *= one_half;  // the other half last: the result alone may be subnormal
      const float result = fmaf(value, high, value * low);
      return z < 0.0f ? result * other_half : result;
    }
  }
  const float e = approximate_exponential(-fabsf(z));
  return value * ((z < 0.0f ? e : 1.0f) * (activation == silu ? z : 1.0f) / (1.0f + e));
}

template <class C>
RMSNORM_INLINE long long begin_of(int row, const Strides& strides) {
  if constexpr (C::strided) return row / C::inner * strides.outer + row % C::inner * strides.inner;
  return static_cast<long long>(row) * C::width;
}

// The vectors of one thread in one tile of one row.
template <class C>
struct Tile {
  static constexpr bool adds = !same<typename C::Residual, None>;
  static constexpr int count = C::elements;
  using Y = typename C::Y;
  static constexpr int tiles =
      (C::width + C::cluster * C::threads * C::vectors * count - 1) / (C::cluster * C::threads * C::vectors * count);
  static constexpr bool whole = tiles * C::cluster * C::threads * C::vectors * count == C::width;
  // The format that h is rounded to: packed, a half type takes half the registers.
  using Held = typename Either<adds, typename C::Residual, typename C::X>::type;
  static constexpr bool exact_gate = C::Y::bytes == 4;
  static constexpr bool packed = C::gate != gate_before;
  static_assert(!adds || C::gate == no_gate, "expected a residual or a gate");
  static constexpr bool same_scale = C::scale == weight_scale && same<typename C::Weight, Y>;  // rounded already
  // Without an instruction for e4m3 its conversion needs the registers of a wide row.
  static constexpr bool converts = RMSNORM_ARCH == 0 || RMSNORM_ARCH >= 890 || !same<typename C::Out, Float8E4M3>;
  static constexpr bool keeps = C::quantization == scale_per_row && tiles == 1 && (converts || C::threads < 512);

  Packed<Held, count> held[packed ? C::vectors : 1];
  float wide[packed ? 1 : C::vectors][count];
  Packed<typename C::X, count> gate[C::gate == gate_after ? C::vectors : 1];
  Packed<typename C::Weight, count> weight[C::prefetch ? C::vectors : 1];
  // Vectors of the weight that are loaded at a time where they are not loaded first: 64 bytes, in 16 registers. In a
  // block of 512 threads that would be fewer resident blocks.
  static constexpr int batch =
      C::threads < 512 && count * C::Weight::bytes < 64 ? 64 / (count * C::Weight::bytes) : 1;
  Packed<Y, count> kept[keeps ? C::vectors : 1];

  static RMSNORM_INLINE int column(int tile, int vector) {
    const int thread = threadIdx.x % C::threads;
    const int rank = C::cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    return (((tile * C::cluster + rank) * C::vectors + vector) * C::threads + thread) * count;
  }

  static RMSNORM_INLINE bool inside(int column) { return whole || column < C::width; }

  template <class T>
  static RMSNORM_INLINE const void* at(const void* from, long long element) {
    return static_cast<const char*>(from) + element * T::bytes;
  }

  template <class T>
  static RMSNORM_INLINE void* at(void* to, long long element) {
    return static_cast<char*>(to) + element * T::bytes;
  }

  static RMSNORM_INLINE int weight_begin(int row) { return C::weight_rows > 1 ? row % C::weight_rows * C::width : 0; }

  RMSNORM_INLINE void read(const Arguments& a, int row, int tile, bool live) {
    Packed<typename C::X, count> x[C::vectors], before[C::gate == gate_before ? C::vectors : 1];
    Packed<Held, count> residual[adds ? C::vectors : 1];
    if constexpr (C::prefetch) {
#pragma unroll
      for (int v = 0; v < C::vectors; ++v) read_weight(weight[v], a, row, tile, v, live);
      wait_for_previous();  // for the order only: else the weight is loaded when x has arrived
    }
#pragma unroll
    for (int v = 0; v < C::vectors; ++v) {
      x[v].clear();
      if (live && inside(column(tile, v)))
        x[v].load(at<typename C::X>(a.x, begin_of<C>(row, a.x_strides) + column(tile, v)));
    }
    if constexpr (adds) {
#pragma unroll
      for (int v = 0; v < C::vectors; ++v) {
        residual[v].clear();
        if (live && inside(column(tile, v)))
          residual[v].load(at<Held>(a.residual, begin_of<C>(row, a.residual_strides) + column(tile, v)));
      }
    }
    if constexpr (C::gate != no_gate) {
      auto& to = choose<C::gate == gate_before>(before, gate);
#pragma unroll
      for (int v = 0; v < C::vectors; ++v) {
        to[v].clear();
        if (live && inside(column(tile, v)))
          to[v].load(at<typename C::X>(a.gate, begin_of<C>(row, a.gate_strides) + column(tile, v)));
      }
    }
#pragma unroll
    for (int v = 0; v < C::vectors; ++v) {
      if constexpr (!adds && packed) {
        held[v] = x[v];
      } else {
        float h[count];
#pragma unroll
        for (int i = 0; i < count; ++i) {
          h[i] = x[v].get(i);
          if constexpr (adds) h[i] += residual[v].get(i);
          if constexpr (C::gate == gate_before) h[i] = gated<C::activation, exact_gate>(h[i], before[v].get(i));
        }
        if constexpr (packed) {
          held[v].set(h);
        } else {
#pragma unroll
          for (int i = 0; i < count; ++i) wide[v][i] = h[i];
        }
      }
    }
  }

  RMSNORM_INLINE float value(int vector, int i) const {
    if constexpr (packed) return held[vector].get(i);
    return wide[vector][i];
  }

  // The sum of the squares, by a tree within each vector.
  RMSNORM_INLINE float squares() const {
    float total = 0.0f;
#pragma unroll
    for (int v = 0; v < C::vectors; ++v) {
      float square[count];
#pragma unroll
      for (int i = 0; i < count; ++i) square[i] = value(v, i) * value(v, i);
#pragma unroll
      for (int step = 1; step < count; step *= 2) {
#pragma unroll
        for (int i = 0; i + step < count; i += 2 * step) square[i] += square[i + step];
      }
      total += square[0];
    }
    return total;
  }

  RMSNORM_INLINE void read_weight(
      Packed<typename C::Weight, count>& to, const Arguments& a, int row, int tile, int vector, bool live) const {
    if constexpr (C::scale != no_scale) {
      if (live && inside(column(tile, vector)))
        to.load(at<typename C::Weight>(a.weight, weight_begin(row) + column(tile, vector)));
      else
        to.clear();
    }
  }

  // Before a vector is used: the vectors of the weight up to the end of its batch, all of which are loaded before any
  // is used.
  RMSNORM_INLINE void read_batch(
      Packed<typename C::Weight, count> (&to)[batch], const Arguments& a, int row, int tile, int v, bool live) const {
    if constexpr (!C::prefetch) {
      if (v % batch == 0) {
#pragma unroll
        for (int i = 0; i < batch; ++i)
          if (v + i < C::vectors) read_weight(to[i], a, row, tile, v + i, live);
      }
    }
  }

  RMSNORM_INLINE void prefetch_weight(const Arguments& a, int row, bool live) const {
    if constexpr (C::prefetch && C::scale != no_scale) {
#pragma unroll
      for (int v = 0; v < C::vectors; ++v)
        if (live && inside(column(0, v))) prefetched(at<typename C::Weight>(a.weight, weight_begin(row) + column(0, v)));
    }
  }

  // One vector of y.
  RMSNORM_INLINE Packed<Y, count> result(
      const Packed<typename C::Weight, count> (&loaded)[batch], int v, float factor) const {
    float y[count];
    const auto& weights = choose<C::prefetch>(weight[C::prefetch ? v : 0], loaded[v % batch]);
#pragma unroll
    for (int i = 0; i < count; ++i) y[i] = value(v, i) * factor;
    if constexpr (C::cast_first) {
      Packed<Y, count> normalized;  // a GPU converts pairs faster than single values
      normalized.set(y);
#pragma unroll
      for (int i = 0; i < count; ++i) y[i] = normalized.get(i);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if constexpr (C::scale != no_scale) {
        float scale = weights.get(i);
        if constexpr (C::scale == one_plus_weight_scale) scale += 1.0f;
        if constexpr (C::cast_first && !same_scale) scale = rounded<Y>(scale);
        y[i] *= scale;
        if constexpr (C::cast_first && C::gate == gate_after) y[i] = rounded<Y>(y[i]);
      }
      if constexpr (C::gate == gate_after) y[i] = gated<C::activation, exact_gate>(y[i], gate[v].get(i));
    }
    Packed<Y, count> packed_y;
    packed_y.set(y);
    return packed_y;
  }

  RMSNORM_INLINE void write_sum(const Arguments& a, int row, int tile, int v) const {
    if constexpr (adds) held[v].store(at<Held>(a.sum, static_cast<long long>(row) * C::width + column(tile, v)));
  }

  // The largest absolute value of y. Of a row that is held whole, y is kept and the sum is written, to free registers.
  RMSNORM_INLINE float largest(const Arguments& a, int row, int tile, bool live, float factor) {
    float most = 0.0f;
    Packed<typename C::Weight, count> weights[batch];
#pragma unroll
    for (int v = 0; v < C::vectors; ++v) {
      read_batch(weights, a, row, tile, v, live);
      if (live && inside(column(tile, v))) {
        const Packed<Y, count> y = result(weights, v, factor);
        most = fmaxf(most, y.largest());
        if constexpr (keeps) {
          kept[v] = y;
          write_sum(a, row, tile, v);
        }
      }
    }
    return most;
  }

  RMSNORM_INLINE void write(const Arguments& a, int row, int tile, float factor, float scale) const {
    Packed<typename C::Weight, count> weights[batch];
    const Divisor<Y> divisor(scale);
#pragma unroll
    for (int v = 0; v < C::vectors; ++v) {
      const int c = column(tile, v);
      if (!inside(c)) continue;
      Packed<Y, count> y;
      if constexpr (keeps) {
        y = kept[v];
      } else {
        write_sum(a, row, tile, v);
        read_batch(weights, a, row, tile, v, true);
        y = result(weights, v, factor);
      }
      void* to = at<typename C::Out>(a.y, static_cast<long long>(row) * C::width + c);
      if constexpr (C::quantization == not_quantized) {
        y.store(to);
      } else {
        float values[count];
#pragma unroll
        for (int i = 0; i < count; ++i) values[i] = y.get(i);
        divisor.divide(values);
        Packed<typename C::Out, count> out;
        out.set(values);
        out.store(to);
      }
    }
  }
};

template <class C>
RMSNORM_INLINE void rms_norm(const Arguments& a, float* shared) {
  constexpr int slots = C::threads * C::rows / 32;
  using Tiles = Tile<C>;
  const long long wanted = static_cast<long long>(blockIdx.x / C::cluster) * C::rows + threadIdx.x / C::threads;
  const bool live = wanted < a.rows;
  const int row = live ? static_cast<int>(wanted) : 0;
  Tiles tile;

  tile.prefetch_weight(a, row, live);
  wait_for_previous();
  let_next_begin();
  float scale = 1.0f, squares = 0.0f;
  if constexpr (C::quantization == static_scale) scale = *static_cast<const float*>(a.scale);
#pragma unroll 1
  for (int t = 0; t < Tiles::tiles; ++t) {
    tile.read(a, row, t, live);
    squares += tile.squares();
  }
  squares = reduced<C, Sum>(squares, shared, shared + slots);
  const float factor = inverse_root(squares / static_cast<float>(C::width) + C::epsilon());

  if constexpr (C::quantization == scale_per_row) {
    float most = 0.0f;
#pragma unroll 1
    for (int t = 0; t < Tiles::tiles; ++t) {
      if constexpr (Tiles::tiles > 1) tile.read(a, row, t, live);
      most = fmaxf(most, tile.largest(a, row, t, live, factor));
    }
    most = reduced<C, Maximum>(most, shared + slots + 1, shared + 2 * slots + 1);
    scale = most / C::Out::largest;
    if (scale == 0.0f) scale = 1.0f;
    if (live && Tiles::column(0, 0) == 0) static_cast<float*>(a.row_scale)[row] = scale;
  }
  if (live) {
#pragma unroll 1
    for (int t = 0; t < Tiles::tiles; ++t) {
      if constexpr (Tiles::tiles > 1) tile.read(a, row, t, live);
      tile.write(a, row, t, factor, scale);
    }
  }
  // A block must not exit while another block reads its shared memory.
  if constexpr (C::cluster > 1) cluster_barrier();
}

}  // namespace rmsnorm
