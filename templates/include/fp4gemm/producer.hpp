// What comes before a quantizer in a layer, fused into it: the values it quantizes are made in registers, rounded to the dtype of x
// as the layer's own kernel would have left them. docs/numerics.md counts the operations, fp4gemm/reference/producers.py has the same.
#pragma once

#include "fp4gemm/numeric.hpp"

namespace fp4gemm {

enum class Producer {
  kNone,
  kSiluMul,
  kGeluTanh,
  kRelu2,
  kRmsNorm,
  kAddRmsNorm,
  // A gradient times the derivative of an activation.
  kDRelu,
  kDRelu2,
  kDSilu,
  kDGeluTanh,
  kDQuickGelu,
};

constexpr bool is_norm(Producer producer) {
  return producer == Producer::kRmsNorm || producer == Producer::kAddRmsNorm;
}

constexpr bool is_gradient(Producer producer) { return producer >= Producer::kDRelu; }

// 1 / (1 + 2^t). There is no division: its slow path would cost more than two steps from a guess by the exponent.
__device__ __forceinline__ float logistic(float t) {
  t = fmaxf(fminf(t, 64.0f), -64.0f);
  float const shifted = __fadd_rn(t, 0x1.8p23f);  // the nearest integer is in its low bits
  float const f = __fadd_rn(t, -__fadd_rn(shifted, -0x1.8p23f));
  float p = __fmaf_rn(0x1.3a02cap-7f, f, 0x1.c9fc48p-5f);
  p = __fmaf_rn(p, f, 0x1.ec0378p-3f);
  p = __fmaf_rn(p, f, 0x1.62e12cp-1f);
  p = __fmaf_rn(p, f, 1.0f);
  float const d = __fadd_rn(__uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23)), 1.0f);
  float r = __uint_as_float(0x7EF31000u - __float_as_uint(d));
  float const error = __fmaf_rn(-d, r, 1.0f);
  r = __fmaf_rn(r, __fmaf_rn(error, error, error), r);
  return __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
}

__device__ __forceinline__ float silu_mul(float gate, float up) {
  return __fmul_rn(__fmul_rn(gate, logistic(__fmul_rn(gate, -0x1.715476p+0f))), up);
}

__device__ __forceinline__ float gelu_tanh(float x) {
  float const inner = __fmaf_rn(__fmul_rn(x, x), -0x1.a5a7d0p-4f, -0x1.26aec2p+1f);
  return __fmul_rn(x, logistic(__fmul_rn(x, inner)));
}

__device__ __forceinline__ float relu2(float x) {
  float const positive = x < 0.0f ? 0.0f : x;  // NaN stays
  return __fmul_rn(positive, positive);
}

// g times the derivative of an activation at h. Those with a logistic function s are s (1 + a (1 - s)).
template <Producer kProducer> __device__ __forceinline__ float gradient(float g, float h) {
  if constexpr (kProducer == Producer::kDRelu) {
    return h <= 0.0f ? 0.0f : g;
  } else if constexpr (kProducer == Producer::kDRelu2) {
    return h <= 0.0f ? 0.0f : __fmul_rn(g, __fadd_rn(h, h));
  } else {
    float t, a = h;
    if constexpr (kProducer == Producer::kDGeluTanh) {
      float const square = __fmul_rn(h, h);
      t = __fmul_rn(h, __fmaf_rn(square, -0x1.a5a7d0p-4f, -0x1.26aec2p+1f));
      a = __fmul_rn(h, __fmaf_rn(square, 0x1.b6676cp-3f, 0x1.988454p+0f));
    } else if constexpr (kProducer == Producer::kDQuickGelu) {
      t = __fmul_rn(h, -0x1.3a4cbep+1f);
      a = __fmul_rn(h, 0x1.b3b646p+0f);
    } else {
      t = __fmul_rn(h, -0x1.715476p+0f);
    }
    // As far below as logistic() goes, a is large enough to show.
    float const s = t >= 64.0f ? 0.0f : logistic(t);
    return __fmul_rn(g, __fmul_rn(s, __fmaf_rn(a, __fadd_rn(1.0f, -s), 1.0f)));
  }
}

// Of the values in 16 bytes, rounded.
template <Producer kProducer, class Element> __device__ __forceinline__ uint4 gradients(uint4 g, uint4 h) {
  auto const word = [](uint32_t g, uint32_t h) {
    if constexpr (Element::kBytes == 4) {
      return __float_as_uint(gradient<kProducer>(__uint_as_float(g), __uint_as_float(h)));
    } else {
      return Element::pack(gradient<kProducer>(Element::low(g), Element::low(h)),
                           gradient<kProducer>(Element::high(g), Element::high(h)));
    }
  };
  return {word(g.x, h.x), word(g.y, h.y), word(g.z, h.z), word(g.w, h.w)};
}

// Value i of 16 in fp32 -> a block of them, rounded.
template <class Element, class Value> __device__ __forceinline__ typename Element::Block block_of(Value const& value) {
  typename Element::Block y;
  if constexpr (Element::kBytes == 4) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) y.w[i] = __float_as_uint(value(i));
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; i += 2) y.w[i / 2] = Element::pack(value(i), value(i + 1));
  }
  return y;
}

// Element-wise producers; `up` is read by kSiluMul alone.
template <Producer kProducer, class Element>
__device__ __forceinline__ typename Element::Block produce(typename Element::Block const& x,
                                                           typename Element::Block const& up) {
  return block_of<Element>([&](int i) {
    float const value = Element::value(x, i);
    if constexpr (kProducer == Producer::kSiluMul) return silu_mul(value, Element::value(up, i));
    if constexpr (kProducer == Producer::kGeluTanh) return gelu_tanh(value);
    return relu2(value);
  });
}

}  // namespace fp4gemm
