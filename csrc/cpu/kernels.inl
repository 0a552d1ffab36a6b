// All kernels, for the instruction set of the file that includes this one.

#include "vec.h"

#include "../common/gelu.h"
#include "../common/philox.h"
#include "kernels.h"

namespace spd {
namespace SPD_ISA {

#include "tile.inl"

// Beyond this many features a tile of x no longer fits the second-level cache, and a matrix product library wins.
constexpr int64_t kSmallFeatures = 128;

// Likewise for the gates of a site, whose small path keeps partial sums of every component's parameters.
constexpr int64_t kSmallComponents = 512;

template <class T>
static bool large_site(const Host<T>& host, int64_t features_in, int64_t features_out) {
  if (host.path != 0) return host.path == 2;
  return features_in > kSmallFeatures || features_out > kSmallFeatures;
}

template <class T>
static bool large_gate(const Host<T>& host, int64_t features, int64_t components) {
  if (host.path != 0) return host.path == 2;
  return features > kSmallFeatures || components > kSmallComponents;
}

// Components whose [N, chunk] tensors stay near the cores: about four megabytes each.
template <class T>
static int64_t component_chunk(int64_t rows, int64_t components) {
  const int64_t budget = (int64_t(1) << 22) / int64_t(sizeof(T));
  const int64_t wanted = round_up(budget / (rows > 0 ? rows : 1) + 1, 64);
  return smaller(round_up(components, kGroup), wanted);
}

#include "points.inl"

#include "gate.inl"

#include "gate_interpolated.inl"

#include "component_linear.inl"

#include "layer.inl"

#include "faithfulness.inl"

#include "features.inl"

template <class T>
constexpr Kernels<T> table{gate_forward<T>,
                           gate_backward<T>,
                           gate_interpolated_forward<T>,
                           gate_interpolated_backward<T>,
                           component_linear_forward<T>,
                           component_linear_backward<T>,
                           layer_forward<T>,
                           layer_backward<T>,
                           faithfulness_forward<T>,
                           faithfulness_backward<T>,
                           uniform<T>,
                           sparse_features};

const Kernels<float>& kernels_float() { return table<float>; }
const Kernels<double>& kernels_double() { return table<double>; }

}  // namespace SPD_ISA
}  // namespace spd
