// What does a kernel see of CUDA's cuda_bf16.h? The type __nv_bfloat16: the upper half of a float.
#pragma once
#include "cuda_on_cpu.h"

// Only what is meant, as in cuda_fp16.h: made from a float (to nearest, ties to even), turned into one.
struct __nv_bfloat16 {
    unsigned short bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(rounded(simulator::bits_of(x))) {}
    template <class T> __nv_bfloat16(T) = delete;

    operator float() const { return simulator::float_of(unsigned(bits) << 16); }
    operator int() const = delete;

  private:
    static unsigned short rounded(unsigned x) {
        if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
        return (x + 0x7fff + (x >> 16 & 1)) >> 16;
    }
};

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }

template <> struct simulator::Name<__nv_bfloat16> { static constexpr const char* text = "__nv_bfloat16"; };
