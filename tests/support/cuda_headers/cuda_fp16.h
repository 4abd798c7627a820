// What does a kernel see of CUDA's cuda_fp16.h? The type __half: a 16-bit float, to be stored and converted.
#pragma once
#include "cuda_on_cpu.h"

// Only what is meant: made from a float (rounded to nearest, ties to even) and turned into one. CUDA's header
// converts from and to every number; int is named here to make arithmetic as ambiguous as it is there.
struct __half {
    unsigned short bits;

    __half() = default;
    __half(float x) : bits(rounded(simulator::bits_of(x))) {}
    template <class T> __half(T) = delete;

    operator float() const {
        unsigned sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
        if (rest < 0x0400) return (sign ? -1.0f : 1.0f) * rest * 0x1p-24f;  // 0, or below the normal numbers
        unsigned exponent_change = rest < 0x7c00 ? (127 - 15) << 23 : (255 - 31) << 23;  // the last for inf, NaN
        return simulator::float_of(sign | ((rest << 13) + exponent_change));
    }
    operator int() const = delete;

  private:
    static unsigned short rounded(unsigned x) {
        unsigned sign = x >> 16 & 0x8000, rest = x & 0x7fffffff;
        if (rest > 0x7f800000) return 0x7fff;         // NaN
        if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and more is infinite
        if (rest < 0x38800000) {                       // below 2^-14 the last place is 2^-24, as that of 0.5f
            float half = 0.5f;
            return sign | (simulator::bits_of(simulator::float_of(rest) + half) - simulator::bits_of(half));
        }
        return sign | ((rest + 0xfff + (rest >> 13 & 1) - ((127 - 15) << 23)) >> 13);
    }
};

inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }

template <> struct simulator::Name<__half> { static constexpr const char* text = "__half"; };
