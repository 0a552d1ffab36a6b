// The sparsity penalties psi(g) of one upper importance g and their derivatives.
// lp: (g + eps)^power.   smooth_l0: g^2 / (g^2 + power^2), with power in the role of gamma.
#pragma once

#include "host_device.h"

namespace spd {

enum class Penalty { none, lp, smooth_l0 };

template <class T>
SPD_HD T penalty_value(T g, Penalty kind, T power, T eps) {
  if (kind == Penalty::lp) {
    const T base = g + eps;
    if (power == T(1)) return base;
    if (power == T(2)) return base * base;
    return std::pow(base, power);
  }
  if (kind == Penalty::smooth_l0) return g * g / (g * g + power * power);
  return T(0);
}

template <class T>
SPD_HD T penalty_slope(T g, Penalty kind, T power, T eps) {
  if (kind == Penalty::lp) {
    const T base = g + eps;
    if (power == T(1)) return T(1);
    if (power == T(2)) return T(2) * base;
    return power * std::pow(base, power - T(1));
  }
  if (kind == Penalty::smooth_l0) {
    const T width = power * power;
    const T sum = g * g + width;
    return T(2) * g * width / (sum * sum);
  }
  return T(0);
}

}  // namespace spd
