// One kernel, named and configured by the macros of plugins/kernel/macros.py. May be included again with other macros.
#include "rms_norm.cuh"

#define RMSNORM_JOINED(a, b) a##b
#define RMSNORM_JOIN(a, b) RMSNORM_JOINED(a, b)
#define RMSNORM_CONFIG RMSNORM_JOIN(Config_, RMSNORM_NAME)

namespace rmsnorm {

struct RMSNORM_CONFIG {
  using X = RMSNORM_X;
  using Residual = RMSNORM_RESIDUAL;
  using Weight = RMSNORM_WEIGHT;
  using Y = RMSNORM_Y;
  using Out = RMSNORM_OUT;
  static constexpr int width = RMSNORM_WIDTH, inner = RMSNORM_INNER, weight_rows = RMSNORM_WEIGHT_ROWS;
  static constexpr int scale = RMSNORM_SCALE, gate = RMSNORM_GATE, activation = RMSNORM_ACTIVATION;
  static constexpr int quantization = RMSNORM_QUANTIZATION;
  static constexpr bool cast_first = RMSNORM_CAST_FIRST, strided = RMSNORM_STRIDED;
  static constexpr int threads = RMSNORM_THREADS, vectors = RMSNORM_VECTORS, elements = RMSNORM_ELEMENTS;
  static constexpr int rows = RMSNORM_ROWS, cluster = RMSNORM_CLUSTER;
  static constexpr bool prefetch = RMSNORM_PREFETCH;
  static RMSNORM_INLINE float epsilon() { return float_of(RMSNORM_EPSILON); }
};

}  // namespace rmsnorm

// Inputs, then scalars, then outputs: the order in which TensorRT passes them.
extern "C" __global__ void
#if RMSNORM_CLUSTER > 1
    __cluster_dims__(RMSNORM_CLUSTER)
#endif
        __launch_bounds__(RMSNORM_THREADS * RMSNORM_ROWS) RMSNORM_NAME(
            const void* x
#if RMSNORM_ADDS
            , const void* residual
#endif
#if RMSNORM_GATE
            , const void* gate
#endif
#if RMSNORM_SCALE
            , const void* weight
#endif
#if RMSNORM_QUANTIZATION == 1
            , const void* scale
#endif
            , int rows
#if RMSNORM_STRIDED
            , long long x_outer, long long x_inner
#if RMSNORM_ADDS
            , long long residual_outer, long long residual_inner
#endif
#if RMSNORM_GATE
            , long long gate_outer, long long gate_inner
#endif
#endif
            , void* y
#if RMSNORM_ADDS
            , void* sum
#endif
#if RMSNORM_QUANTIZATION == 2
            , void* row_scale
#endif
        ) {
  rmsnorm::Arguments a = {};
  a.x = x;
  a.rows = rows;
  a.y = y;
#if RMSNORM_ADDS
  a.residual = residual;
  a.sum = sum;
#endif
#if RMSNORM_GATE
  a.gate = gate;
#endif
#if RMSNORM_SCALE
  a.weight = weight;
#endif
#if RMSNORM_QUANTIZATION == 1
  a.scale = scale;
#endif
#if RMSNORM_QUANTIZATION == 2
  a.row_scale = row_scale;
#endif
#if RMSNORM_STRIDED
  a.x_strides = {x_outer, x_inner};
#if RMSNORM_ADDS
  a.residual_strides = {residual_outer, residual_inner};
#endif
#if RMSNORM_GATE
  a.gate_strides = {gate_outer, gate_inner};
#endif
#endif
  RMSNORM_SHARED(shared, 2 * (RMSNORM_THREADS * RMSNORM_ROWS / 32) + 2);
  rmsnorm::rms_norm<rmsnorm::RMSNORM_CONFIG>(a, shared);
}

#undef RMSNORM_CONFIG
#undef RMSNORM_JOIN
#undef RMSNORM_JOINED
