// The two leaky hard sigmoids of the causal importances (lower for masks, upper for the penalty).
// V is a scalar or a SIMD vector, T its scalar type.
#pragma once

#include "host_device.h"

namespace spd {

enum class Sigmoid { paper, preset2026 };

// s > 1: 1 + 0.01 (s - 1), otherwise s clamped to [0, 1].
template <class T, class V>
SPD_HD V upper_sigmoid(V s) {
  const V one = splat<V>(T(1));
  return s > one ? mul_add(s - one, splat<V>(T(0.01)), one) : maximum(splat<V>(T(0)), s);
}

// 0.01 above 1, 1 on [0, 1], 0 below; the end points pass the gradient, as torch.clamp does.
template <class T, class V>
SPD_HD V upper_sigmoid_slope(V s) {
  const V one = splat<V>(T(1));
  const V zero = splat<V>(T(0));
  return s > one ? splat<V>(T(0.01)) : (s >= zero ? one : zero);
}

// paper: s <= 0: 0.01 s, otherwise min(s, 1). 2026: s clamped to [0, 1].
template <class T, class V>
SPD_HD V lower_sigmoid(V s, Sigmoid kind) {
  const V zero = splat<V>(T(0));
  const V one = splat<V>(T(1));
  const V capped = minimum(one, s);
  if (kind == Sigmoid::paper) return s <= zero ? s * splat<V>(T(0.01)) : capped;
  return maximum(zero, capped);
}

// The gradient with respect to s. 2026: where s <= 0 only a negative gradient, which raises s, leaks.
template <class T, class V>
SPD_HD V lower_sigmoid_backward(V s, V grad, Sigmoid kind) {
  const V zero = splat<V>(T(0));
  const V one = splat<V>(T(1));
  const V leak = grad * splat<V>(T(0.01));
  const V below = kind == Sigmoid::paper ? leak : minimum(leak, zero);
  return s <= zero ? below : (s > one ? zero : grad);
}

}  // namespace spd
