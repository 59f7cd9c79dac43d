// Number formats: conversions to and from float32, and loads and stores of 1 to 32 bytes.
//
// Nothing is included, because NVRTC compiles this without the headers of the CUDA toolkit. Without a CUDA compiler the
// conversions are plain C++ and give the same bits.
#pragma once

namespace rmsnorm {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#if defined(__CUDACC__)
#define RMSNORM_ON_GPU 1
#define RMSNORM_INLINE __device__ __forceinline__
#else
#define RMSNORM_ON_GPU 0
#define RMSNORM_INLINE inline
#endif

#if defined(__CUDA_ARCH__)
#define RMSNORM_ARCH __CUDA_ARCH__
#else
#define RMSNORM_ARCH 0
#endif

RMSNORM_INLINE float float_of(u32 bits) {
#if RMSNORM_ON_GPU
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}

RMSNORM_INLINE u32 bits_of(float value) {
#if RMSNORM_ON_GPU
  return __float_as_uint(value);
#else
  u32 bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <bool first, class A, class B>
struct Either {
  using type = A;
  static RMSNORM_INLINE A& of(A& a, B&) { return a; }
};
template <class A, class B>
struct Either<false, A, B> {
  using type = B;
  static RMSNORM_INLINE B& of(A&, B& b) { return b; }
};

// The first or the second of two objects of different types.
template <bool first, class A, class B>
RMSNORM_INLINE auto& choose(A& a, B& b) {
  return Either<first, A, B>::of(a, b);
}

// Rounds a finite value to `kept` bits of mantissa, to nearest, ties to even; the addition carries into the exponent.
RMSNORM_INLINE u32 rounded_to_even(u32 bits, int kept) {
  const int dropped = 23 - kept;
  return (bits + ((1u << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) >> dropped;
}

struct Float32 {
  static constexpr int bytes = 4;
  static RMSNORM_INLINE float widen(u32 bits) { return float_of(bits); }
  static RMSNORM_INLINE u32 narrow(float value) { return bits_of(value); }
};

struct Float16 {
  static constexpr int bytes = 2;

  static RMSNORM_INLINE float widen(u32 bits) {
#if RMSNORM_ON_GPU
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
    return value;
#else
    const u32 sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest < 0x400u) return (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
    return float_of(sign | ((rest << 13) + 0x38000000u));
#endif
  }

  static RMSNORM_INLINE u32 narrow(float value) {
#if RMSNORM_ON_GPU
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
    const u32 bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fffu;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;                   // 65520 and more round to infinity
    if (rest >= 0x38800000u) return sign | (rounded_to_even(rest, 10) - 0x1c000u);
    // Subnormal results are multiples of 2^-24: adding 0.5 leaves them in the last bits, rounded to even.
    return sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u);
#endif
  }
};

struct BFloat16 {
  static constexpr int bytes = 2;
  static RMSNORM_INLINE float widen(u32 bits) { return float_of(bits << 16); }

  static RMSNORM_INLINE u32 narrow(float value) {
#if RMSNORM_ARCH >= 800
    u16 half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
    const u32 bits = bits_of(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded_to_even(bits, 7);
#endif
  }
};

// Quantized values saturate; NaN becomes 0.
struct Int8 {
  static constexpr int bytes = 1;
  static constexpr float largest = 127.0f;

  static RMSNORM_INLINE u32 narrow(float value) {
#if RMSNORM_ON_GPU
    int rounded;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return static_cast<u32>(rounded) & 0xffu;
#else
    if (!(value == value)) return 0;
    const float rounded = __builtin_rintf(value);
    const float held = rounded < -128.0f ? -128.0f : rounded > 127.0f ? 127.0f : rounded;
    return static_cast<u32>(static_cast<int>(held)) & 0xffu;
#endif
  }
};

// Quantized values saturate; NaN stays NaN. The format has no infinities.
struct Float8E4M3 {
  static constexpr int bytes = 1;
  static constexpr float largest = 448.0f;

  static RMSNORM_INLINE u32 narrow(float value) {
#if RMSNORM_ARCH >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return pair & 0xffu;
#else
    const u32 bits = bits_of(value), sign = bits >> 24 & 0x80u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7fu;
    if (rest >= 0x43e00000u) return sign | 0x7eu;                      // 448 and more
    if (rest >= 0x3c800000u) {                                         // 2^-6 and more: normal
      const u32 rounded = rounded_to_even(rest, 3) - 0x3c0u;
      return sign | (rounded > 0x7eu ? 0x7eu : rounded);
    }
    // Subnormal results are multiples of 2^-9: adding 2^14 leaves them in the last bits, rounded to even.
    return sign | (bits_of(float_of(rest) + 16384.0f) - 0x46800000u);
#endif
  }
};

// Two values converted into one word, the first in the low half.
template <class T>
RMSNORM_INLINE u32 narrow_pair(float low, float high) {
#if RMSNORM_ARCH >= 800
  u32 pair;
  if constexpr (same<T, Float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  if constexpr (same<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
#endif
  return T::narrow(low) | T::narrow(high) << 16;
}

template <class T>
RMSNORM_INLINE u32 narrow_four(float a, float b, float c, float d) {
#if RMSNORM_ARCH >= 890
  if constexpr (same<T, Float8E4M3>) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return static_cast<u32>(low) | static_cast<u32>(high) << 16;
  }
#endif
#if RMSNORM_ON_GPU
  if constexpr (same<T, Int8>) {
    int of_a, of_b, of_c, of_d;
    u32 high, all;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(of_a) : "f"(a));
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(of_b) : "f"(b));
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(of_c) : "f"(c));
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(of_d) : "f"(d));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(of_d), "r"(of_c), "r"(0));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(of_b), "r"(of_a), "r"(high));
    return all;
  }
#endif
  return T::narrow(a) | T::narrow(b) << 8 | T::narrow(c) << 16 | T::narrow(d) << 24;
}

// Divides values of format Y by one scale without a division for each. What a quantized format makes of the quotient is
// what it makes of the float32 quotient y / scale, bit for bit, also for a scale that is subnormal, 0, infinite or NaN.
//
// high + low is 1 / scale to 2^-46: high is below it in size, so low has its sign and an infinite y stays infinite.
// Rounding low and y * low puts the sum at most 2^-44 of the quotient from it before it is rounded once. This matters
// only next to the middle of a tie t of the quantized format and a neighbor of t in float32. With integers 2^23 <= S <=
// 2^24 for the scale, Y for y and 128 <= T <= 256 for t, such a quotient has Y 2^24 = (T 2^17 +- 1) S + D, |D| < 22. A
// half y has at most 11 bits, so that 2^37 divides the left side: S = c 2^17 -+ D, and T |D| = c <= 128 follows. This
// leaves only T = 128, S = 2^24 - 1, where y * low is exact. A float32 y can be such a case; there the remainder
// corrects the quotient, which rounds it as a division does (Markstein).
template <class Y>
struct Divisor {
  float scale, inverse, high, low, power;

  explicit RMSNORM_INLINE Divisor(float divisor) {
    const float size = fabsf(divisor);
    power = size < 0x1p-60f ? 0x1p64f : size > 0x1p60f ? 0x1p-64f : 1.0f;
    scale = divisor * power;
    inverse = 1.0f / scale;
    high = low = inverse;
    if (inverse != 0.0f) {  // 0 for an infinite scale
      high = float_of(bits_of(inverse) - 1);
      low = fmaf(-high, scale, 1.0f) * inverse;
    }
  }

  // Values whose quotients are out of range lose bits or overflow in the multiplication by the power of two.
  template <int count>
  RMSNORM_INLINE void divide(float (&y)[count]) const {
    if (power != 1.0f) {
#pragma unroll
      for (int i = 0; i < count; ++i) y[i] *= power;
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float quotient = fmaf(y[i], high, y[i] * low);
      if constexpr (Y::bytes == 4) {
        const float better = fmaf(fmaf(-quotient, scale, y[i]), inverse, quotient);
        y[i] = quotient != 0.0f && fabsf(quotient) < 0x1p60f ? better : quotient;
      } else {
        y[i] = quotient;
      }
    }
  }
};

// `count` values of one format in their memory layout, in whole words.
template <class T, int count>
struct Packed {
  static constexpr int bytes = T::bytes * count;
  static constexpr int words = bytes < 4 ? 1 : bytes / 4;
  u32 word[words];

  RMSNORM_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = 0;
  }

  // The caller must align `from` to the smaller of 16 bytes and the size.
  RMSNORM_INLINE void load(const void* from) {
    if constexpr (bytes == 1) {
      word[0] = *static_cast<const u8*>(from);
    } else if constexpr (bytes == 2) {
      word[0] = *static_cast<const u16*>(from);
    } else if constexpr (bytes == 4) {
      word[0] = *static_cast<const u32*>(from);
    } else if constexpr (bytes == 8) {
      const uint2 two = *static_cast<const uint2*>(from);
      word[0] = two.x, word[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < words; i += 4) {
        const uint4 four = static_cast<const uint4*>(from)[i / 4];
        word[i] = four.x, word[i + 1] = four.y, word[i + 2] = four.z, word[i + 3] = four.w;
      }
    }
  }

  RMSNORM_INLINE void store(void* to) const {
    if constexpr (bytes == 1) {
      *static_cast<u8*>(to) = static_cast<u8>(word[0]);
    } else if constexpr (bytes == 2) {
      *static_cast<u16*>(to) = static_cast<u16>(word[0]);
    } else if constexpr (bytes == 4) {
      *static_cast<u32*>(to) = word[0];
    } else if constexpr (bytes == 8) {
      *static_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
      for (int i = 0; i < words; i += 4)
        static_cast<uint4*>(to)[i / 4] = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
    }
  }

  RMSNORM_INLINE float get(int i) const {
    if constexpr (T::bytes == 4) return T::widen(word[i]);
    return T::widen(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu);
  }

  RMSNORM_INLINE void set(const float (&values)[count]) {
    if constexpr (bytes < 4) {
      word[0] = 0;
#pragma unroll
      for (int i = 0; i < count; ++i) word[0] |= T::narrow(values[i]) << (8 * T::bytes * i);
    } else if constexpr (T::bytes == 4) {
#pragma unroll
      for (int i = 0; i < count; ++i) word[i] = T::narrow(values[i]);
    } else if constexpr (T::bytes == 2) {
#pragma unroll
      for (int i = 0; i < count; i += 2) word[i / 2] = narrow_pair<T>(values[i], values[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < count; i += 4)
        word[i / 4] = narrow_four<T>(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  }

  // The largest absolute value. NaN is passed over, as by fmaxf.
  RMSNORM_INLINE float largest() const {
#if RMSNORM_ARCH >= 800
    if constexpr (T::bytes == 2 && count > 1) {
      u32 most = 0;
#pragma unroll
      for (int i = 0; i < words; ++i) {
        u32 size;
        if constexpr (same<T, Float16>) {
          asm("abs.f16x2 %0, %1;" : "=r"(size) : "r"(word[i]));
          asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(most), "r"(size));
        } else {
          asm("abs.bf16x2 %0, %1;" : "=r"(size) : "r"(word[i]));
          asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(most), "r"(size));
        }
      }
      return fmaxf(T::widen(most & 0xffffu), T::widen(most >> 16));
    }
#endif
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < count; ++i) most = fmaxf(most, fabsf(get(i)));
    return most;
  }
};

// A value rounded to a format, as float.
template <class T>
RMSNORM_INLINE float rounded(float value) {
  return T::widen(T::narrow(value));
}

}  // namespace rmsnorm
