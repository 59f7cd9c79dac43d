// A GPU for one cluster of blocks, on the host: every thread of every block is a fiber that runs until it waits for
// others. What the kernel includes from here is all that it takes from a GPU besides arithmetic.
//
// Whoever waits for what can never come (a barrier that some threads of a block have passed or skipped) is an error,
// and the order in which fibers run is drawn from a seed: results that hang on it are races.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace gpu {

enum class Wait { nothing, lanes, block, cluster, done };
constexpr int shared_floats = 4096, stack_bytes = 96 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::nothing;
  float value = 0;
  int distance = 0, thread = 0, block = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<std::vector<float>> shared;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  unsigned first_block = 0;
  void (*kernel)() = nullptr;
  const uint64_t* arguments = nullptr;
  bool misused = false;
};

inline Machine machine;
// ULPs by which approximate results are off, of either sign: a GPU's are, a host's are not.
inline int ulps_off = 0;

struct Index { unsigned x; };

inline void wait(Wait what) {
  machine.now->wait = what;
  swapcontext(&machine.now->context, &machine.scheduler);
}

// Integers and pointers are passed alike, and a function ignores the arguments that it does not have.
inline void body() {
  using Any = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
  const uint64_t* a = machine.arguments;
  reinterpret_cast<Any>(machine.kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
                                        a[12], a[13], a[14], a[15]);
  machine.now->wait = Wait::done;
}

inline bool all(size_t begin, size_t end, Wait what) {
  for (size_t i = begin; i < end; ++i)
    if (machine.fibers[i].wait != what) return false;
  return true;
}

// Lets go on whoever waits for others that have all come; whether there was anyone.
inline bool release(size_t threads) {
  bool any = false;
  auto go = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) machine.fibers[i].wait = Wait::nothing;
    any = true;
  };
  auto& fibers = machine.fibers;
  for (size_t warp = 0; warp < fibers.size(); warp += 32) {
    if (!all(warp, warp + 32, Wait::lanes)) continue;
    float values[32];
    for (int lane = 0; lane < 32; ++lane) {
      values[lane] = fibers[warp + lane].value;
      machine.misused |= fibers[warp + lane].distance != fibers[warp].distance;
    }
    for (int lane = 0; lane < 32; ++lane) fibers[warp + lane].value = values[lane ^ fibers[warp].distance];
    go(warp, warp + 32);
  }
  for (size_t block = 0; block < fibers.size(); block += threads)
    if (all(block, block + threads, Wait::block)) go(block, block + threads);
  if (all(0, fibers.size(), Wait::cluster)) go(0, fibers.size());
  return any;
}

inline bool run_cluster(int threads, int cluster, std::mt19937& random) {
  auto& fibers = machine.fibers;
  fibers.resize(static_cast<size_t>(threads) * cluster);
  machine.shared.assign(cluster, std::vector<float>(shared_floats, NAN));
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
    fiber.wait = Wait::nothing, fiber.thread = i % threads, fiber.block = i / threads;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, body, 0);
  }
  std::vector<size_t> order(fibers.size());
  std::iota(order.begin(), order.end(), 0);
  while (!all(0, fibers.size(), Wait::done)) {
    std::shuffle(order.begin(), order.end(), random);
    bool any = false;
    for (size_t i : order) {
      if (fibers[i].wait != Wait::nothing) continue;
      machine.now = &fibers[i], any = true;
      swapcontext(&machine.scheduler, &fibers[i].context);
    }
    if (!release(threads) && !any) return false;
  }
  return !machine.misused;
}

}  // namespace gpu

#define threadIdx (gpu::Index{static_cast<unsigned>(gpu::machine.now->thread)})
#define blockIdx (gpu::Index{gpu::machine.first_block + gpu::machine.now->block})
#define RMSNORM_SHARED(name, count)                         \
  static_assert((count) <= gpu::shared_floats, "too much"); \
  float* name = gpu::machine.shared[gpu::machine.now->block].data()

inline void __syncthreads() { gpu::wait(gpu::Wait::block); }

namespace rmsnorm {

inline float lane_across(float value, int distance) {
  gpu::machine.now->value = value, gpu::machine.now->distance = distance;
  gpu::wait(gpu::Wait::lanes);
  return gpu::machine.now->value;
}

inline float inverse_root(float value) { return static_cast<float>(1.0 / sqrt(static_cast<double>(value))); }

inline float approximate_exponential(float value) {
  float result = expf(value);
  if (result == 0.0f) return result;
  for (int i = 0; i < abs(gpu::ulps_off); ++i) result = nextafterf(result, gpu::ulps_off < 0 ? 0.0f : INFINITY);
  return result;
}

inline unsigned cluster_rank() { return gpu::machine.now->block; }
inline void cluster_barrier() { gpu::wait(gpu::Wait::cluster); }

// There is one kernel at a time, and no cache.
inline void wait_for_previous() {}
inline void let_next_begin() {}
inline void prefetched(const void*) {}

inline float of_block(const float* mine, unsigned rank) {
  auto& shared = gpu::machine.shared;
  return shared[rank][mine - shared[gpu::machine.now->block].data()];
}

}  // namespace rmsnorm

extern "C" inline __attribute__((used)) void approximate(int ulps) { gpu::ulps_off = ulps; }

// Runs a grid, cluster by cluster. 0, or 1 where threads wait for each other in vain.
extern "C" inline __attribute__((used)) int launch(
    void (*kernel)(), int blocks, int threads, int cluster, const uint64_t* arguments, unsigned seed) {
  std::mt19937 random(seed);
  gpu::machine.kernel = kernel, gpu::machine.arguments = arguments, gpu::machine.misused = false;
  for (int block = 0; block < blocks; block += cluster) {
    gpu::machine.first_block = block;
    if (!gpu::run_cluster(threads, cluster, random)) return 1;
  }
  return 0;
}
