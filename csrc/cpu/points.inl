// Where a gate is evaluated. Sparse inputs make h exactly zero in many rows, and there a gate gives one and the same
// value: those rows share one point.

// Points of some rows (whole vectors): the rows themselves, or, where a quarter of them or more have h zero, the others in
// their order followed by one zero (at index `zero`) and by zeros up to a whole vector.
template <class T>
struct Points {
  const T* h;
  int64_t count, zero;
  bool shared;
};

template <class T>
static Points<T> find_points(const T* h, int64_t rows, T* packed) {
  using Vec = typename Lanes<T>::Vec;
  using Int = typename Lanes<T>::Int;
  constexpr int64_t lanes = Lanes<T>::count;
  Int zeros{};
  for (int64_t n = 0; n < rows; n += lanes) zeros -= load<Vec>(h + n) == Vec{};
  int64_t total = 0;
  for (int64_t i = 0; i < lanes; ++i) total += zeros[i];
  if (4 * total < rows) return {h, rows, 0, false};
  const int64_t zero = rows - total;
  const int64_t count = round_up(zero + 1, lanes);
  int64_t k = 0;
  for (int64_t n = 0; n < rows; n += lanes) k += pack_lanes<T>(packed + k, load<Vec>(h + n), load<Vec>(h + n) != Vec{});
  for (k = zero; k < count; ++k) packed[k] = T(0);
  return {packed, count, zero, true};
}

// Values at the points, spread over the rows.
template <class T>
static void spread_points(const Points<T>& points, const T* values, const T* h, int64_t rows, T* out) {
  using Vec = typename Lanes<T>::Vec;
  const Vec at_zero = splat<Vec>(values[points.zero]);
  for (int64_t n = 0, k = 0; n < rows; n += Lanes<T>::count) {
    const auto own = load<Vec>(h + n) != Vec{};
    const auto [spread, taken] = spread_lanes<T>(values + k, own);
    store(out + n, own ? spread : at_zero);
    k += taken;
  }
}

// The adjoint: gradients of the rows, gathered at the points.
template <class T>
static void gather_points(const Points<T>& points, const T* grads, const T* h, int64_t rows, T* out) {
  using Vec = typename Lanes<T>::Vec;
  Vec at_zero{};
  int64_t k = 0;
  for (int64_t n = 0; n < rows; n += Lanes<T>::count) {
    const auto own = load<Vec>(h + n) != Vec{};
    const Vec grad = load<Vec>(grads + n);
    k += pack_lanes<T>(out + k, grad, own);
    at_zero += own ? Vec{} : grad;
  }
  out[k] = sum_lanes(at_zero);
  for (++k; k < points.count; ++k) out[k] = T(0);
}
