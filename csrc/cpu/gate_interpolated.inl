// The gate of gate.inl with each component's logit s(h) = sum_j o_j GELU(w_j h + b_j) + b_out, a function of one number,
// taken from cubic Hermite pieces on a grid of that component; forward, and the exact adjoint of the interpolant.
//
// Grid: nodes at the integer multiples of a spacing D, from floor(min(h, 0) / D) to one past floor(max(h, 0) / D): they
// do not move when h does. With s and s' at both ends of a piece, |error| <= D^4 / 384 max|s''''|, and
// |s''''| <= 4 phi(0) sum_j |o_j| w_j^4 since |GELU''''(z)| = phi(z) |z^4 - 7 z^2 + 4| is largest at 0. D is the largest
// power of the fourth root of two, at most 1, that keeps this bound below kGridError: a ladder, so that it does not move
// with the weights either. Components whose grid would have more than a quarter as many nodes as there are rows, or more
// than kMaxNodes, and components with an infinite or undefined h or weight are evaluated exactly.
//
// Cost, H hidden units: a node takes H (2 + 24 + 4) multiply-adds forward (GELU and its derivative) and H (30 + 12)
// backward (second derivatives for w_in and b_in); a row takes about 14 forward and 30 backward, whatever H is, with 16
// bytes of the table read and, backward, 16 added to. Exact takes 19 H and 36 H a row. At H = 16 with 64 nodes for
// 4096 rows: 22 against 304 forward, 41 against 576 backward. What is left is memory: forward 8 bytes written and 4 read
// an element, backward 12 read and 4 written, from the second-level cache, since one task takes one component.
//
// One task a component, all rows in order: no partial sums across tasks.

constexpr double kGridError = 5e-6;
constexpr double kFinestSpacing = 1.0 / (1 << 20);
constexpr int64_t kMaxNodes = 2048;
constexpr int64_t kRowsPerNode = 4;
// |h| / D below this: the whole part fits an int, the fraction keeps digits.
constexpr double kFarthestNode = 1 << 20;
// Copies of the accumulators, so that neighbouring rows of one piece do not wait for each other's additions.
constexpr int64_t kCopies = 4;

// Nodes first .. first + nodes - 1, at multiples of the spacing; nodes == 0: evaluate exactly.
template <class T>
struct Grid {
  T spacing, inverse;
  int64_t first, nodes;
  SPD_METHOD int64_t padded() const { return round_up(nodes, 2 * Lanes<T>::count); }
};

// The largest power of 2^(1/4), at most 1, that does not exceed `widest` (rounded to T).
template <class T>
static T ladder_spacing(double widest) {
  constexpr double steps[] = {1.0, 0.84089641525371454, 0.70710678118654752, 0.59460355750136054};
  double octave = 1;
  while (octave / 2 > widest) octave /= 2;
  for (double step : steps)
    if (octave * step <= widest) return T(octave * step);
  return T(octave / 2);
}

template <class T>
static Grid<T> choose_grid(const Gate<T>& gate, int64_t c, const T* h, int64_t rows) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  const Grid<T> exact{T(0), T(0), 0, 0};
  double fourth = 0;
  for (int64_t j = c * gate.hidden; j < (c + 1) * gate.hidden; ++j) {
    const double square = double(gate.w_in[j]) * double(gate.w_in[j]);
    fourth += std::fabs(double(gate.w_out[j])) * square * square;
  }
  fourth *= 4 * 0.39894228040143267794;
  const double widest = std::sqrt(std::sqrt(384 * kGridError / fourth));
  if (!(widest >= kFinestSpacing)) return exact;
  const T spacing = ladder_spacing<T>(widest);

  Vec low{}, high{}, undefined{};
  int64_t n = 0;
  for (; n + lanes <= rows; n += lanes) {
    const Vec x = load<Vec>(h + n);
    low = minimum(x, low);
    high = maximum(x, high);
    undefined += x - x;
  }
  T from = T(0), to = T(0), doubt = T(0);
  const auto widen = [&](T l, T u, T d) {
    from = l < from ? l : from;
    to = u > to ? u : to;
    doubt += d;
  };
  for (int64_t i = 0; i < lanes; ++i) widen(low[i], high[i], undefined[i]);
  for (; n < rows; ++n) widen(h[n], h[n], h[n] - h[n]);
  // As in locate(), so that every h falls on a piece.
  const T inverse = T(1) / spacing;
  from *= inverse;
  to *= inverse;
  if (doubt != T(0) || !(double(to) < kFarthestNode && double(from) > -kFarthestNode)) return exact;
  const int64_t first = int64_t(std::floor(from));
  const int64_t nodes = int64_t(std::floor(to)) - first + 2;
  if (nodes > kMaxNodes || nodes * kRowsPerNode > rows) return exact;
  return {spacing, inverse, first, nodes};
}

template <class V>
SPD_HD void gelu_with_curvature_vec(V z, V& value, V& slope, V& curvature) {
  if constexpr (sizeof(z[0]) == 4) {
    gelu_with_curvature(z, value, slope, curvature);
  } else {
    for (int i = 0; i < int(sizeof(V) / sizeof(z[0])); ++i) {
      double v, s, c;
      gelu_with_curvature(double(z[i]), v, s, c);
      value[i] = v;
      slope[i] = s;
      curvature[i] = c;
    }
  }
}

// Positions of the nodes from `k` on.
template <class T>
SPD_HD typename Lanes<T>::Vec node_positions(const Grid<T>& grid, int64_t k) {
  using Vec = typename Lanes<T>::Vec;
  const auto index = iota<T>() + typename Lanes<T>::Scalar(grid.first + k);
  return __builtin_convertvector(index, Vec) * grid.spacing;
}

// s and D s' at the nodes, up to the padded number of them.
template <class T>
static void grid_values(const Gate<T>& gate, int64_t c, const Grid<T>& grid, T* values, T* slopes) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  const T* w = gate.w_in + c * gate.hidden;
  const T* b = gate.b_in + c * gate.hidden;
  const T* o = gate.w_out + c * gate.hidden;
  for (int64_t k = 0; k < grid.padded(); k += 2 * lanes) {
    Vec x[2], s[2], d[2];
    for (int v = 0; v < 2; ++v) {
      x[v] = node_positions(grid, k + v * lanes);
      s[v] = splat<Vec>(gate.b_out[c]);
      d[v] = Vec{};
    }
    for (int64_t j = 0; j < gate.hidden; ++j) {
      const Vec wj = splat<Vec>(w[j]), bj = splat<Vec>(b[j]), oj = splat<Vec>(o[j]), ow = splat<Vec>(o[j] * w[j]);
      for (int v = 0; v < 2; ++v) {
        Vec value, slope;
        gelu_with_slope_vec(mul_add(wj, x[v], bj), value, slope);
        s[v] = mul_add(oj, value, s[v]);
        d[v] = mul_add(ow, slope, d[v]);
      }
    }
    for (int v = 0; v < 2; ++v) {
      store(values + k + v * lanes, s[v]);
      store(slopes + k + v * lanes, d[v] * grid.spacing);
    }
  }
}

// A piece k is p(t) = p0 + p1 t + p2 t^2 + p3 t^3 for t = h / D - (first + k) in [0, 1); its four numbers lie together.
template <class T>
static void grid_pieces(const Grid<T>& grid, const T* values, const T* slopes, T* pieces) {
  for (int64_t k = 0; k + 1 < grid.nodes; ++k) {
    const T rise = values[k + 1] - values[k];
    pieces[4 * k] = values[k];
    pieces[4 * k + 1] = slopes[k];
    pieces[4 * k + 2] = T(3) * rise - T(2) * slopes[k] - slopes[k + 1];
    pieces[4 * k + 3] = slopes[k] + slopes[k + 1] - T(2) * rise;
  }
}

// out[i] lane n = pieces[4 piece[n] + i].
template <class T>
SPD_HD void load_pieces(const T* pieces, const typename Lanes<T>::Scalar* piece, typename Lanes<T>::Vec out[4]) {
  constexpr int lanes = Lanes<T>::count;
#if SPD_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
    const auto row = [&](int n) { return _mm_loadu_ps(pieces + 4 * piece[n]); };
#if SPD_VECTOR_BYTES == 64
    __m512 r[4];
    for (int j = 0; j < 4; ++j) {
      r[j] = _mm512_castps128_ps512(row(j));
      r[j] = _mm512_insertf32x4(r[j], row(4 + j), 1);
      r[j] = _mm512_insertf32x4(r[j], row(8 + j), 2);
      r[j] = _mm512_insertf32x4(r[j], row(12 + j), 3);
    }
#else
    __m256 r[4];
    for (int j = 0; j < 4; ++j) r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(row(j)), row(4 + j), 1);
#endif
    for (int j = 0; j < 4; ++j) out[j] = (VecF)r[j];
    transpose_quads(out);
  } else
#endif
  {
    for (int i = 0; i < 4; ++i) {
      typename Lanes<T>::Vec lane{};
      for (int n = 0; n < lanes; ++n) lane[n] = pieces[4 * piece[n] + i];
      out[i] = lane;
    }
  }
}

// sums[copy][4 piece[n] + i] += in[i] lane n, where copy = n % kCopies.
template <class T>
SPD_HD void add_to_pieces(T* sums, int64_t copy_size, const typename Lanes<T>::Scalar* piece,
                          typename Lanes<T>::Vec in[4]) {
  constexpr int lanes = Lanes<T>::count;
#if SPD_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
    transpose_quads(in);
    const auto add = [&](int n, __m128 row) {
      float* to = sums + n % kCopies * copy_size + 4 * piece[n];
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), row));
    };
    for (int j = 0; j < 4; ++j) {
#if SPD_VECTOR_BYTES == 64
      const __m512 r = (__m512)in[j];
      add(j, _mm512_castps512_ps128(r));
      add(4 + j, _mm512_extractf32x4_ps(r, 1));
      add(8 + j, _mm512_extractf32x4_ps(r, 2));
      add(12 + j, _mm512_extractf32x4_ps(r, 3));
#else
      const __m256 r = (__m256)in[j];
      add(j, _mm256_castps256_ps128(r));
      add(4 + j, _mm256_extractf128_ps(r, 1));
#endif
    }
  } else
#endif
  {
    for (int n = 0; n < lanes; ++n)
      for (int i = 0; i < 4; ++i) sums[n % kCopies * copy_size + 4 * piece[n] + i] += in[i][n];
  }
}

// The piece and the position in it of a vector of rows.
template <class T>
SPD_HD typename Lanes<T>::Vec locate(const Grid<T>& grid, typename Lanes<T>::Vec h,
                                     typename Lanes<T>::Scalar* piece) {
  using Vec = typename Lanes<T>::Vec;
  using Int = typename Lanes<T>::Int;
  const Vec u = h * grid.inverse;
  Int whole = __builtin_convertvector(u, Int);
  whole += __builtin_convertvector(whole, Vec) > u;  // a comparison is -1 where true: truncation becomes floor
  store(piece, whole - typename Lanes<T>::Scalar(grid.first));
  return u - __builtin_convertvector(whole, Vec);
}

// Logits of one strip.
template <class T>
static void interpolate_strip(const Grid<T>& grid, const T* pieces, const T* h, int64_t padded, T* s_rows) {
  using Vec = typename Lanes<T>::Vec;
  alignas(64) typename Lanes<T>::Scalar piece[Lanes<T>::count];
  for (int64_t n = 0; n < padded; n += Lanes<T>::count) {
    const Vec t = locate(grid, load<Vec>(h + n), piece);
    Vec p[4];
    load_pieces(pieces, piece, p);
    store(s_rows + n, mul_add(mul_add(mul_add(p[3], t, p[2]), t, p[1]), t, p[0]));
  }
}

// Every component of a chunk whose inner activations are known; penalty sums by block, then in order.
template <class T>
static void interpolate_components(const Host<T>& host, const GateForward<T>& a, int64_t c0, int64_t count) {
  run_tasks(host.parallel, count, [&](int64_t task) {
    const int64_t c = c0 + task;
    const Grid<T> grid = choose_grid(a.gate, c, a.inner + c * a.rows, a.rows);
    Scratch<T> scratch(2 * kTileStride + 6 * grid.padded());
    T* h_scratch = scratch.take(kTileStride);
    T* lower_scratch = scratch.take(kTileStride);
    T* pieces = scratch.take(4 * grid.padded());
    if (grid.nodes > 0) {
      T* values = scratch.take(2 * grid.padded());
      grid_values(a.gate, c, grid, values, values + grid.padded());
      grid_pieces(grid, values, values + grid.padded(), pieces);
    }
    T total = T(0);
    for (int64_t block = 0; block < ceil_div(a.rows, kBlock); ++block) {
      const Rows r = block_rows<T>(a.rows, block);
      const Strip<const T> h = strip_in<T>(a.inner, a.rows, r, c, 1, h_scratch);
      const Strip<T> lower = strip_out(a.lower, a.rows, r, c, lower_scratch);
      if (grid.nodes > 0) {
        alignas(64) T s_rows[kBlock];
        interpolate_strip(grid, pieces, h.data, r.padded, s_rows);
        total += write_importances(a.gate, s_rows, r, lower.data);
      } else {
        total += gate_strip_forward(a.gate, c, h.data, r, lower.data);
      }
      flush_strip(a.lower, a.rows, r, c, 1, lower);
    }
    a.penalty_sum[c] = total;
  });
}

template <class T>
static void gate_interpolated_forward(const Host<T>& host, const GateForward<T>& a) {
  // Nothing to save where the gate is linear.
  if (a.gate.hidden == 0) return gate_forward(host, a);
  if (large_gate(host, a.d_in, a.components)) {
    const int64_t chunk = component_chunk<T>(a.rows, a.components);
    for (int64_t c0 = 0; c0 < a.components; c0 += chunk) {
      const int64_t count = smaller(chunk, a.components - c0);
      if (a.rows > 0)
        host.product(count, a.rows, a.d_in, Matrix<T>{a.V.data + c0 * a.V.col, a.V.col, a.V.row}, a.x.transposed(),
                     a.inner + c0 * a.rows, a.rows, 1, false);
      interpolate_components(host, a, c0, count);
    }
    return;
  }
  Scratch<T> shared(panel_size(a.components, a.d_in));
  T* panels = shared.take(panel_size(a.components, a.d_in));
  pack_panels(panels, a.components, a.d_in, a.V.transposed());
  run_tasks(host.parallel, ceil_div(a.rows, kBlock), [&](int64_t block) {
    const Rows r = block_rows<T>(a.rows, block);
    Scratch<T> scratch((a.d_in + kPanel) * kTileStride);
    T* x = scratch.take(a.d_in * kTileStride);
    T* inner_scratch = scratch.take(kPanel * kTileStride);
    load_transposed(x, a.x, a.d_in, r);
    for (int64_t c0 = 0; c0 < a.components; c0 += kPanel) {
      const int64_t count = smaller(kPanel, a.components - c0);
      const Strip<T> h = strip_out(a.inner, a.rows, r, c0, inner_scratch);
      multiply_rows(panels + c0 * a.d_in, a.d_in, 0, count, a.d_in, x, kTileStride, h.data, h.stride, r.padded, false);
      flush_strip(a.inner, a.rows, r, c0, count, h);
    }
  });
  interpolate_components(host, a, 0, a.components);
}

// One strip: h_bar out, and into `sums` the moments s_bar (1, t, t^2, t^3) of every piece.
template <class T>
static void interpolate_strip_backward(const Gate<T>& gate, const Grid<T>& grid, const T* pieces, const T* h,
                                       const T* grad_inner, const T* grad_lower, const PenaltyBar<T>& penalty, Rows r,
                                       T* h_bar, T* sums, int64_t copy_size) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  const auto lane = iota<T>();
  alignas(64) typename Lanes<T>::Scalar piece[Lanes<T>::count];
  for (int64_t n = 0; n < r.padded; n += lanes) {
    const Vec t = locate(grid, load<Vec>(h + n), piece);
    Vec p[4];
    load_pieces(pieces, piece, p);
    const Vec s = mul_add(mul_add(mul_add(p[3], t, p[2]), t, p[1]), t, p[0]);
    const Vec slope = mul_add(mul_add(T(3) * p[3], t, T(2) * p[2]), t, p[1]) * grid.inverse;
    Vec s_bar = logit_gradient(gate, s, grad_lower ? load<Vec>(grad_lower + n) : Vec{}, penalty);
    s_bar = lane < typename Lanes<T>::Scalar(r.count - n) ? s_bar : Vec{};
    store(h_bar + n, mul_add(s_bar, slope, grad_inner ? load<Vec>(grad_inner + n) : Vec{}));
    Vec moments[4];
    moments[0] = s_bar;
    for (int i = 1; i < 4; ++i) moments[i] = moments[i - 1] * t;
    add_to_pieces(sums, copy_size, piece, moments);
  }
}

// From the moments of the pieces to the gradients of s (into `values`) and of D s' (into `slopes`) at the nodes.
template <class T>
static void node_gradients(const Grid<T>& grid, const T* sums, int64_t copy_size, T* values, T* slopes) {
  for (int64_t k = 0; k < grid.padded(); ++k) values[k] = slopes[k] = T(0);
  for (int64_t k = 0; k + 1 < grid.nodes; ++k) {
    T m[4] = {};
    for (int64_t copy = 0; copy < kCopies; ++copy)
      for (int i = 0; i < 4; ++i) m[i] += sums[copy * copy_size + 4 * k + i];
    const T right = T(3) * m[2] - T(2) * m[3];
    values[k] += m[0] - right;
    values[k + 1] += right;
    slopes[k] += m[1] - T(2) * m[2] + m[3];
    slopes[k + 1] += m[3] - m[2];
  }
}

// The gate's parameters: what s and s' at the nodes depend on. d_k is the gradient of s' at node k.
template <class T>
static void grid_backward(const Gate<T>& gate, int64_t c, const Grid<T>& grid, const T* s_bars, const T* d_bars,
                          GateSums<T> sums) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  const T* w = gate.w_in + c * gate.hidden;
  const T* b = gate.b_in + c * gate.hidden;
  const T* o = gate.w_out + c * gate.hidden;
  Vec b_out{};
  for (int64_t k = 0; k < grid.padded(); k += lanes) b_out += load<Vec>(s_bars + k);
  sums.b_out[0] = sum_lanes(b_out);
  for (int64_t j = 0; j < gate.hidden; ++j) {
    const Vec wj = splat<Vec>(w[j]), bj = splat<Vec>(b[j]);
    Vec by_value{}, by_slope{}, by_z{}, by_zx{};
    for (int64_t k = 0; k < grid.padded(); k += lanes) {
      const Vec x = node_positions(grid, k);
      const Vec s_bar = load<Vec>(s_bars + k), d_bar = load<Vec>(d_bars + k) * grid.spacing;
      Vec value, slope, curvature;
      gelu_with_curvature_vec(mul_add(wj, x, bj), value, slope, curvature);
      const Vec z_bar = mul_add(d_bar * wj, curvature, s_bar * slope);  // without the factor o_j
      by_value = mul_add(s_bar, value, by_value);
      by_slope = mul_add(d_bar, slope, by_slope);
      by_z += z_bar;
      by_zx = mul_add(z_bar, x, by_zx);
    }
    const T slope_sum = sum_lanes(by_slope);
    sums.w_out[j] = sum_lanes(by_value) + w[j] * slope_sum;
    sums.b_in[j] = o[j] * sum_lanes(by_z);
    sums.w_in[j] = o[j] * (sum_lanes(by_zx) + slope_sum);
  }
}

// h_bar [count, N] of the components from c0 on, and the gradients of their gates.
template <class T>
static void interpolate_components_backward(const Host<T>& host, const GateBackward<T>& a, int64_t c0, int64_t count,
                                            T* h_bar) {
  const int64_t hidden = a.gate.hidden;
  run_tasks(host.parallel, count, [&](int64_t task) {
    const int64_t c = c0 + task;
    const Grid<T> grid = choose_grid(a.gate, c, a.inner + c * a.rows, a.rows);
    const bool exact = grid.nodes == 0;
    const int64_t copy_size = 4 * grid.padded();
    Scratch<T> scratch(4 * kTileStride + (6 + 4 * kCopies) * grid.padded() + (exact ? gate_scratch_size<T>(hidden) : 0));
    T* h_scratch = scratch.take(kTileStride);
    T* inner_scratch = scratch.take(kTileStride);
    T* lower_scratch = scratch.take(kTileStride);
    T* out_scratch = scratch.take(kTileStride);
    T* pieces = scratch.take(4 * grid.padded());
    T* values = scratch.take(2 * grid.padded());
    T* slopes = values + grid.padded();
    T* sums = scratch.zeros(kCopies * copy_size);
    T* gate_scratch = exact ? scratch.take(gate_scratch_size<T>(hidden)) : nullptr;
    const GateSums<T> outputs{a.grad_w_in + c * hidden, a.grad_b_in + c * hidden, a.grad_w_out + c * hidden,
                              a.grad_b_out + c};
    if (exact) {
      std::memset(outputs.w_in, 0, size_t(hidden) * sizeof(T));
      std::memset(outputs.b_in, 0, size_t(hidden) * sizeof(T));
      std::memset(outputs.w_out, 0, size_t(hidden) * sizeof(T));
      outputs.b_out[0] = T(0);
    } else {
      grid_values(a.gate, c, grid, values, slopes);
      grid_pieces(grid, values, slopes, pieces);
    }
    const T grad_sum = a.grad_penalty ? a.grad_penalty[c] : T(0);
    const PenaltyBar<T> penalty(a.gate, grad_sum);
    for (int64_t block = 0; block < ceil_div(a.rows, kBlock); ++block) {
      const Rows r = block_rows<T>(a.rows, block);
      const T* h = strip_in<T>(a.inner, a.rows, r, c, 1, h_scratch).data;
      const T* g_inner = a.grad_inner ? strip_in<T>(a.grad_inner, a.rows, r, c, 1, inner_scratch).data : nullptr;
      const T* g_lower = a.grad_lower ? strip_in<T>(a.grad_lower, a.rows, r, c, 1, lower_scratch).data : nullptr;
      const Strip<T> out = strip_out(h_bar, a.rows, r, task, out_scratch);
      if (exact)
        gate_strip_backward(a.gate, c, h, g_inner, g_lower, grad_sum, r, out.data, outputs, gate_scratch);
      else
        interpolate_strip_backward(a.gate, grid, pieces, h, g_inner, g_lower, penalty, r, out.data, sums, copy_size);
      flush_strip(h_bar, a.rows, r, task, 1, out);
    }
    if (exact) return;
    node_gradients(grid, sums, copy_size, values, slopes);
    grid_backward(a.gate, c, grid, values, slopes, outputs);
  });
}

// grad_V and grad_x of a small site from h_bar [C, N].
template <class T>
static void small_site_gradients(const Host<T>& host, const GateBackward<T>& a, const T* h_bar) {
  const int64_t C = a.components, d_in = a.d_in;
  const Segments segments(a.rows);
  const int64_t segment_count = segments.count > 0 ? segments.count : 1;
  const int64_t size = a.grad_V ? C * d_in : 0;
  Scratch<T> shared(Scratch<T>::padded(segment_count * size) + Scratch<T>::padded(panel_size(d_in, C)));
  T* partial = shared.zeros(segment_count * size);
  T* panels = shared.take(panel_size(d_in, C));
  if (a.grad_x) pack_panels(panels, d_in, C, a.V);
  run_tasks(host.parallel, segments.count, [&](int64_t segment) {
    Scratch<T> scratch((C + d_in + round_up(d_in, kPanel)) * kTileStride);
    T* bar_scratch = scratch.take(C * kTileStride);
    T* x = scratch.take(d_in * kTileStride);
    T* x_bar = scratch.take(round_up(d_in, kPanel) * kTileStride);
    for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
      const Rows r = block_rows<T>(a.rows, block);
      const Strip<const T> bar = strip_in<T>(h_bar, a.rows, r, 0, C, bar_scratch);
      if (a.grad_V) {
        load_transposed(x, a.x, d_in, r);
        multiply_dots(bar.data, bar.stride, C, x, kTileStride, d_in, r.padded, partial + segment * size, d_in);
      }
      if (a.grad_x) {
        multiply_rows(panels, C, 0, d_in, C, bar.data, bar.stride, x_bar, kTileStride, r.padded, false);
        store_transposed<T>(a.grad_x, x_bar, d_in, r, nullptr);
      }
    }
  });
  reduce_segments(host.parallel, partial, segment_count, size,
                  [&](int64_t i, T sum) { a.grad_V[i % d_in * C + i / d_in] = sum; });
}

template <class T>
static void gate_interpolated_backward(const Host<T>& host, const GateBackward<T>& a) {
  if (a.gate.hidden == 0) return gate_backward(host, a);
  const int64_t C = a.components, d_in = a.d_in;
  const bool large = large_gate(host, d_in, C);
  const int64_t chunk = large ? component_chunk<T>(a.rows, C) : C;
  Scratch<T> shared(chunk * a.rows);
  T* h_bar = shared.take(chunk * a.rows);
  for (int64_t c0 = 0; c0 < C; c0 += chunk) {
    const int64_t count = smaller(chunk, C - c0);
    interpolate_components_backward(host, a, c0, count, h_bar);
    if (!large) {
      small_site_gradients(host, a, h_bar);
      continue;
    }
    if (a.grad_V)
      host.product(d_in, count, a.rows, a.x.transposed(), Matrix<T>{h_bar, 1, a.rows}, a.grad_V + c0, C, 1, false);
    if (a.grad_x)
      host.product(a.rows, d_in, count, Matrix<T>{h_bar, 1, a.rows},
                   Matrix<T>{a.V.data + c0 * a.V.col, a.V.col, a.V.row}, a.grad_x, d_in, 1, c0 > 0);
  }
}
