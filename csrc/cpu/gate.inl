// Inner activations, the scalar gate MLP of each component, both sigmoids and the penalty sums, forward and backward.
// The hidden layer lives in registers and a few kilobytes of scratch.
//
// Flops a neuron (component x hidden unit), counting a fused multiply-add as one: forward 2 + 13 (tail polynomial) + 4,
// backward 2 + 13 + 11 (density) + 10. Bytes an element of [N, C]: forward writes h and g (8), backward reads h and the
// gradients (12), so the gate is bound by arithmetic at any useful hidden width.


// Rows whose hidden values and slopes are kept between the two passes of the backward.
constexpr int64_t kGateRows = 128;

template <class V>
SPD_HD V gelu_vec(V z) {
  if constexpr (sizeof(z[0]) == 4) {
    return gelu(z);
  } else {
    for (int i = 0; i < int(sizeof(V) / sizeof(z[0])); ++i) z[i] = gelu(double(z[i]));
    return z;
  }
}

template <class V>
SPD_HD void gelu_with_slope_vec(V z, V& value, V& slope) {
  if constexpr (sizeof(z[0]) == 4) {
    gelu_with_slope(z, value, slope);
  } else {
    for (int i = 0; i < int(sizeof(V) / sizeof(z[0])); ++i) {
      double v, s;
      gelu_with_slope(double(z[i]), v, s);
      value[i] = v;
      slope[i] = s;
    }
  }
}

// Vector powers other than 1 and 2 go lane by lane; most importances are exactly zero and share one value.
template <class T, class V>
SPD_HD V penalty_vec(V g, const Gate<T>& gate, T at_zero) {
  if (gate.penalty == Penalty::smooth_l0) return g * g / (g * g + gate.power * gate.power);
  const V base = g + gate.eps;
  if (gate.power == T(1)) return base;
  if (gate.power == T(2)) return base * base;
  V out = base;
  for (int i = 0; i < Lanes<T>::count; ++i)
    out[i] = g[i] == T(0) ? at_zero : std::pow(base[i], gate.power);
  return out;
}

template <class T, class V>
SPD_HD V penalty_slope_vec(V g, const Gate<T>& gate, T at_zero) {
  if (gate.penalty == Penalty::lp && gate.power == T(1)) return splat<V>(T(1));
  if (gate.penalty == Penalty::lp && gate.power == T(2)) return T(2) * (g + gate.eps);
  if (gate.penalty == Penalty::smooth_l0) {
    const T width = gate.power * gate.power;
    const V sum = g * g + width;
    return T(2) * width * g / (sum * sum);
  }
  V out = g;
  for (int i = 0; i < Lanes<T>::count; ++i)
    out[i] = g[i] == T(0) ? at_zero : gate.power * std::pow(g[i] + gate.eps, gate.power - T(1));
  return out;
}

// s of NV vectors of rows.
template <class T, int NV>
static inline void gate_logits(const Gate<T>& gate, int64_t c, const T* h, T* s_out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  Vec s[NV], x[NV];
  for (int v = 0; v < NV; ++v) {
    x[v] = load<Vec>(h + v * lanes);
    s[v] = splat<Vec>(gate.b_out[c]);
  }
  if (gate.hidden == 0) {
    for (int v = 0; v < NV; ++v) s[v] = mul_add(splat<Vec>(gate.w_out[c]), x[v], s[v]);
  }
  const T* w = gate.w_in + c * gate.hidden;
  const T* b = gate.b_in + c * gate.hidden;
  const T* o = gate.w_out + c * gate.hidden;
  for (int64_t j = 0; j < gate.hidden; ++j) {
    const Vec wj = splat<Vec>(w[j]), bj = splat<Vec>(b[j]), oj = splat<Vec>(o[j]);
    for (int v = 0; v < NV; ++v) s[v] = mul_add(oj, gelu_vec(mul_add(wj, x[v], bj)), s[v]);
  }
  for (int v = 0; v < NV; ++v) store(s_out + v * lanes, s[v]);
}

// Lower importances of one strip of rows from its logits; the penalty's sum is returned.
template <class T>
static T write_importances(const Gate<T>& gate, const T* s_rows, Rows r, T* lower) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  const T at_zero = penalty_value(T(0), gate.penalty, gate.power, gate.eps);
  const auto lane = iota<T>();
  Vec sum{};
  for (int64_t n = 0; n < r.padded; n += lanes) {
    const Vec s = load<Vec>(s_rows + n);
    store(lower + n, lower_sigmoid<T>(s, gate.sigmoid));
    if (gate.penalty != Penalty::none) {
      const Vec psi = penalty_vec<T>(upper_sigmoid<T>(s), gate, at_zero);
      sum += lane < typename Lanes<T>::Scalar(r.count - n) ? psi : Vec{};
    }
  }
  return sum_lanes(sum);
}

// One component over one strip of rows: lower importances out, the penalty's sum returned.
template <class T>
static T gate_strip_forward(const Gate<T>& gate, int64_t c, const T* h, Rows r, T* lower) {
  constexpr int64_t lanes = Lanes<T>::count;
  alignas(64) T s_rows[kBlock], s_points[kBlock + lanes], packed[kBlock + lanes];
  const Points<T> points = find_points(h, r.padded, packed);
  T* s = points.shared ? s_points : s_rows;
  int64_t n = 0;
  for (; n + 4 * lanes <= points.count; n += 4 * lanes) gate_logits<T, 4>(gate, c, points.h + n, s + n);
  for (; n < points.count; n += lanes) gate_logits<T, 1>(gate, c, points.h + n, s + n);
  if (points.shared) spread_points(points, s_points, h, r.padded, s_rows);
  return write_importances(gate, s_rows, r, lower);
}

// Components [c0, c0 + count) of one block of rows, h at `inner`.
template <class T>
static void gate_tile_forward(const GateForward<T>& a, int64_t c0, int64_t count, Rows r, Strip<const T> h,
                              T* penalty, T* scratch) {
  const Strip<T> lower = strip_out(a.lower, a.rows, r, c0, scratch);
  for (int64_t c = 0; c < count; ++c) {
    const T sum = gate_strip_forward(a.gate, c0 + c, h.data + c * h.stride, r, lower.data + c * lower.stride);
    penalty[c0 + c] = sum;
  }
  flush_strip(a.lower, a.rows, r, c0, count, lower);
}

template <class T>
static void finish_penalty(const Host<T>& host, const GateForward<T>& a, const T* partial, int64_t blocks) {
  if (blocks == 0) {
    for (int64_t c = 0; c < a.components; ++c) a.penalty_sum[c] = T(0);
    return;
  }
  reduce_segments(host.parallel, partial, blocks, a.components, [&](int64_t c, T sum) { a.penalty_sum[c] = sum; });
}

template <class T>
static void gate_forward(const Host<T>& host, const GateForward<T>& a) {
  const int64_t blocks = ceil_div(a.rows, kBlock);
  Scratch<T> shared(Scratch<T>::padded(blocks * a.components) + Scratch<T>::padded(panel_size(a.components, a.d_in)));
  T* partial = shared.take(blocks * a.components);

  if (large_gate(host, a.d_in, a.components)) {
    const int64_t chunk = component_chunk<T>(a.rows, a.components);
    for (int64_t c0 = 0; c0 < a.components; c0 += chunk) {
      const int64_t count = smaller(chunk, a.components - c0);
      if (a.rows > 0)
        host.product(count, a.rows, a.d_in, Matrix<T>{a.V.data + c0 * a.V.col, a.V.col, a.V.row}, a.x.transposed(),
                     a.inner + c0 * a.rows, a.rows, 1, false);
      const int64_t groups = ceil_div(count, kGroup);
      run_tasks(host.parallel, groups * blocks, [&](int64_t task) {
        const int64_t c = c0 + task / blocks * kGroup;
        const int64_t here = smaller(kGroup, c0 + count - c);
        const int64_t block = task % blocks;
        const Rows r = block_rows<T>(a.rows, block);
        Scratch<T> scratch(2 * kGroup * kTileStride);
        const Strip<const T> h = strip_in<T>(a.inner, a.rows, r, c, here, scratch.take(kGroup * kTileStride));
        gate_tile_forward(a, c, here, r, h, partial + block * a.components, scratch.take(kGroup * kTileStride));
      });
    }
  } else {
    T* panels = shared.take(panel_size(a.components, a.d_in));
    pack_panels(panels, a.components, a.d_in, a.V.transposed());
    run_tasks(host.parallel, blocks, [&](int64_t block) {
      const Rows r = block_rows<T>(a.rows, block);
      Scratch<T> scratch((a.d_in + 2 * kPanel) * kTileStride);
      T* x = scratch.take(a.d_in * kTileStride);
      T* inner_scratch = scratch.take(kPanel * kTileStride);
      T* lower_scratch = scratch.take(kPanel * kTileStride);
      load_transposed(x, a.x, a.d_in, r);
      for (int64_t c0 = 0; c0 < a.components; c0 += kPanel) {
        const int64_t count = smaller(kPanel, a.components - c0);
        const Strip<T> h = strip_out(a.inner, a.rows, r, c0, inner_scratch);
        multiply_rows(panels + c0 * a.d_in, a.d_in, 0, count, a.d_in, x, kTileStride, h.data, h.stride, r.padded,
                      false);
        gate_tile_forward(a, c0, count, r, Strip<const T>{h.data, h.stride}, partial + block * a.components,
                          lower_scratch);
        flush_strip(a.inner, a.rows, r, c0, count, h);
      }
    });
  }
  finish_penalty(host, a, partial, blocks);
}

// The gradient of a component's penalty sum.
template <class T>
struct PenaltyBar {
  T grad, slope_at_zero;
  bool on;
  PenaltyBar(const Gate<T>& gate, T grad_sum)
      : grad(grad_sum), slope_at_zero(0), on(gate.penalty != Penalty::none && grad_sum != T(0)) {
    if (on) slope_at_zero = penalty_slope(T(0), gate.penalty, gate.power, gate.eps);
  }
};

// The gradient of the logits s from that of the lower importances and of the penalty's sum.
template <class T, class V>
SPD_HD V logit_gradient(const Gate<T>& gate, V s, V grad_lower, const PenaltyBar<T>& penalty) {
  V s_bar = lower_sigmoid_backward<T>(s, grad_lower, gate.sigmoid);
  if (penalty.on) {
    const V psi = penalty.grad * penalty_slope_vec<T>(upper_sigmoid<T>(s), gate, penalty.slope_at_zero);
    const V slope = upper_sigmoid_slope<T>(s);
    s_bar += slope == V{} ? V{} : psi * slope;
  }
  return s_bar;
}

// Scratch and partial sums of the backward of one component.
template <class T>
struct GateSums {
  T *w_in, *b_in, *w_out, *b_out;  // at this component; accumulated into
};

template <class T>
static constexpr int64_t gate_scratch_size(int64_t hidden) {
  return Scratch<T>::padded(2 * hidden * kGateRows) + Scratch<T>::padded(3 * (hidden + 1) * Lanes<T>::count);
}

template <class T, int NV>
static inline void gate_backward_values(const Gate<T>& gate, int64_t c, const T* h, T* values, T* slopes, T* s_out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  Vec s[NV], x[NV];
  for (int v = 0; v < NV; ++v) {
    x[v] = load<Vec>(h + v * lanes);
    s[v] = splat<Vec>(gate.b_out[c]);
  }
  const T* w = gate.w_in + c * gate.hidden;
  const T* b = gate.b_in + c * gate.hidden;
  const T* o = gate.w_out + c * gate.hidden;
  for (int64_t j = 0; j < gate.hidden; ++j) {
    const Vec wj = splat<Vec>(w[j]), bj = splat<Vec>(b[j]), oj = splat<Vec>(o[j]);
    for (int v = 0; v < NV; ++v) {
      Vec value, slope;
      gelu_with_slope_vec(mul_add(wj, x[v], bj), value, slope);
      store(values + j * kGateRows + v * lanes, value);
      store(slopes + j * kGateRows + v * lanes, slope);
      s[v] = mul_add(oj, value, s[v]);
    }
  }
  for (int v = 0; v < NV; ++v) store(s_out + v * lanes, s[v]);
}

// h_bar (the gradient of the inner activations, incoming plus through the gate) of one component and one strip.
template <class T>
static void gate_strip_backward(const Gate<T>& gate, int64_t c, const T* h, const T* grad_inner, const T* grad_lower,
                                T grad_penalty, Rows r, T* h_bar, GateSums<T> sums, T* scratch) {
  using Vec = typename Lanes<T>::Vec;
  using Int = typename Lanes<T>::Int;
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t hidden = gate.hidden;
  const PenaltyBar<T> penalty_bar(gate, grad_penalty);
  T* values = scratch;
  T* slopes = scratch + hidden * kGateRows;
  T* acc = scratch + Scratch<T>::padded(2 * hidden * kGateRows);
  std::memset(acc, 0, size_t(3 * (hidden + 1) * lanes) * sizeof(T));
  const Int lane = iota<T>();
  const T* w = gate.w_in + c * hidden;
  const T* o = gate.w_out + c * hidden;
  // Logits, then their gradients, by row and by point; d the derivative of s by h.
  constexpr int64_t size = kGateRows + Lanes<T>::count;
  alignas(64) T s_rows[size], s_points[size], d_rows[size], d_points[size], packed[size];
  Vec sum_b_out{}, sum_linear{};

  for (int64_t n0 = 0; n0 < r.padded; n0 += kGateRows) {
    const int64_t here = smaller(kGateRows, r.padded - n0);
    const T* x = h + n0;
    const Points<T> points = hidden > 0 ? find_points(x, here, packed) : Points<T>{x, here, 0, false};
    T* s = points.shared ? s_points : s_rows;
    T* d = points.shared ? d_points : d_rows;
    int64_t n = 0;
    if (hidden == 0) {
      for (; n < here; n += lanes) gate_logits<T, 1>(gate, c, x + n, s + n);
    } else {
      for (; n + 2 * lanes <= points.count; n += 2 * lanes)
        gate_backward_values<T, 2>(gate, c, points.h + n, values + n, slopes + n, s + n);
      for (; n < points.count; n += lanes)
        gate_backward_values<T, 1>(gate, c, points.h + n, values + n, slopes + n, s + n);
    }
    if (points.shared) spread_points(points, s_points, x, here, s_rows);
    for (n = 0; n < here; n += lanes) {
      const Vec incoming = grad_lower ? load<Vec>(grad_lower + n0 + n) : Vec{};
      Vec s_bar = logit_gradient(gate, load<Vec>(s_rows + n), incoming, penalty_bar);
      s_bar = lane < typename Lanes<T>::Scalar(r.count - n0 - n) ? s_bar : Vec{};
      sum_b_out += s_bar;
      if (hidden == 0) sum_linear = mul_add(s_bar, load<Vec>(x + n), sum_linear);
      store(s_rows + n, s_bar);
    }
    if (points.shared) gather_points(points, s_rows, x, here, s_points);
    for (n = 0; n < points.count; n += lanes) store(d + n, splat<Vec>(hidden == 0 ? gate.w_out[c] : T(0)));
    for (int64_t j = 0; j < hidden; ++j) {
      T* acc_j = acc + 3 * j * lanes;
      Vec a_out = load<Vec>(acc_j), a_bias = load<Vec>(acc_j + lanes), a_in = load<Vec>(acc_j + 2 * lanes);
      const Vec ow = splat<Vec>(o[j] * w[j]);
      const T* value = values + j * kGateRows;
      const T* slope = slopes + j * kGateRows;
      for (n = 0; n < points.count; n += lanes) {
        const Vec s_bar = load<Vec>(s + n), slope_n = load<Vec>(slope + n);
        const Vec z_bar = s_bar * slope_n;  // without the factor o_j
        a_out = mul_add(s_bar, load<Vec>(value + n), a_out);
        a_bias += z_bar;
        a_in = mul_add(z_bar, load<Vec>(points.h + n), a_in);
        store(d + n, mul_add(slope_n, ow, load<Vec>(d + n)));
      }
      store(acc_j, a_out);
      store(acc_j + lanes, a_bias);
      store(acc_j + 2 * lanes, a_in);
    }
    if (points.shared) spread_points(points, d_points, x, here, d_rows);
    for (n = 0; n < here; n += lanes) {
      const Vec incoming = grad_inner ? load<Vec>(grad_inner + n0 + n) : Vec{};
      store(h_bar + n0 + n, mul_add(load<Vec>(s_rows + n), load<Vec>(d_rows + n), incoming));
    }
  }
  sums.b_out[0] += sum_lanes(sum_b_out);
  if (hidden == 0) sums.w_out[0] += sum_lanes(sum_linear);
  for (int64_t j = 0; j < hidden; ++j) {
    const T* acc_j = acc + 3 * j * lanes;
    sums.w_out[j] += sum_lanes(load<Vec>(acc_j));
    sums.b_in[j] += o[j] * sum_lanes(load<Vec>(acc_j + lanes));
    sums.w_in[j] += o[j] * sum_lanes(load<Vec>(acc_j + 2 * lanes));
  }
}

// Where a segment keeps its sums: V transposed [C, d_in] (small sites only), then the gate's parameters.
struct GateLayout {
  int64_t w_in, b_in, w_out, b_out, size;
  GateLayout(int64_t components, int64_t v_columns, int64_t hidden) {
    const int64_t outs = hidden > 0 ? hidden : 1;
    w_in = components * v_columns;
    b_in = w_in + components * hidden;
    w_out = b_in + components * hidden;
    b_out = w_out + components * outs;
    size = b_out + components;
  }
  template <class T>
  GateSums<T> at(T* base, int64_t c, int64_t hidden) const {
    const int64_t outs = hidden > 0 ? hidden : 1;
    return {base + w_in + c * hidden, base + b_in + c * hidden, base + w_out + c * outs, base + b_out + c};
  }
};

template <class T>
static void gate_backward(const Host<T>& host, const GateBackward<T>& a) {
  const int64_t hidden = a.gate.hidden, C = a.components, d_in = a.d_in;
  const Segments segments(a.rows);
  const bool large = large_gate(host, d_in, C);
  const GateLayout layout(C, large || !a.grad_V ? 0 : d_in, hidden);
  const int64_t segment_count = segments.count > 0 ? segments.count : 1;
  const int64_t chunk = large ? component_chunk<T>(a.rows, C) : 0;
  Scratch<T> shared(Scratch<T>::padded(segment_count * layout.size) +
                    Scratch<T>::padded(large ? chunk * a.rows : panel_size(d_in, C)));
  T* partial = shared.zeros(segment_count * layout.size);

  // One segment of one group of components: h_bar into `out`, sums into the segment's partial.
  const auto strips = [&](int64_t c0, int64_t count, Rows r, T* base, Strip<T> out, T* in_scratch, T* gate_scratch) {
    const Strip<const T> h = strip_in<T>(a.inner, a.rows, r, c0, count, in_scratch);
    Strip<const T> g_inner{nullptr, 0}, g_lower{nullptr, 0};
    if (a.grad_inner) g_inner = strip_in<T>(a.grad_inner, a.rows, r, c0, count, in_scratch + kGroup * kTileStride);
    if (a.grad_lower) g_lower = strip_in<T>(a.grad_lower, a.rows, r, c0, count, in_scratch + 2 * kGroup * kTileStride);
    for (int64_t c = 0; c < count; ++c)
      gate_strip_backward(a.gate, c0 + c, h.data + c * h.stride,
                          shifted(g_inner.data, c * g_inner.stride),
                          shifted(g_lower.data, c * g_lower.stride),
                          a.grad_penalty ? a.grad_penalty[c0 + c] : T(0), r, out.data + c * out.stride,
                          layout.at(base, c0 + c, hidden), gate_scratch);
  };

  if (large) {
    T* h_bar = shared.take(chunk * a.rows);
    for (int64_t c0 = 0; c0 < C; c0 += chunk) {
      const int64_t count = smaller(chunk, C - c0);
      const int64_t groups = ceil_div(count, kGroup);
      run_tasks(host.parallel, groups * segments.count, [&](int64_t task) {
        const int64_t c = c0 + task / segments.count * kGroup;
        const int64_t here = smaller(kGroup, c0 + count - c);
        const int64_t segment = task % segments.count;
        Scratch<T> scratch(4 * kGroup * kTileStride + gate_scratch_size<T>(hidden));
        T* in_scratch = scratch.take(3 * kGroup * kTileStride);
        T* out_scratch = scratch.take(kGroup * kTileStride);
        T* gate_scratch = scratch.take(gate_scratch_size<T>(hidden));
        for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
          const Rows r = block_rows<T>(a.rows, block);
          T* target = h_bar + (c - c0) * a.rows;
          const Strip<T> out = strip_out(target, a.rows, r, 0, out_scratch);
          strips(c, here, r, partial + segment * layout.size, out, in_scratch, gate_scratch);
          flush_strip(target, a.rows, r, 0, here, out);
        }
      });
      if (a.grad_V)
        host.product(d_in, count, a.rows, a.x.transposed(), Matrix<T>{h_bar, 1, a.rows}, a.grad_V + c0, C, 1, false);
      if (a.grad_x)
        host.product(a.rows, d_in, count, Matrix<T>{h_bar, 1, a.rows},
                     Matrix<T>{a.V.data + c0 * a.V.col, a.V.col, a.V.row}, a.grad_x, d_in, 1, c0 > 0);
    }
  } else {
    T* panels = shared.take(panel_size(d_in, C));
    if (a.grad_x) pack_panels(panels, d_in, C, a.V);
    run_tasks(host.parallel, segments.count, [&](int64_t segment) {
      const int64_t d_padded = round_up(d_in, kPanel);
      Scratch<T> scratch((4 * kGroup + d_in + d_padded) * kTileStride + gate_scratch_size<T>(hidden));
      T* in_scratch = scratch.take(3 * kGroup * kTileStride);
      T* h_bar = scratch.take(kGroup * kTileStride);
      T* x = scratch.take(d_in * kTileStride);
      T* x_bar = scratch.take(d_padded * kTileStride);
      T* gate_scratch = scratch.take(gate_scratch_size<T>(hidden));
      T* base = partial + segment * layout.size;
      for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
        const Rows r = block_rows<T>(a.rows, block);
        if (a.grad_V) load_transposed(x, a.x, d_in, r);
        for (int64_t c0 = 0; c0 < C; c0 += kGroup) {
          const int64_t count = smaller(kGroup, C - c0);
          strips(c0, count, r, base, Strip<T>{h_bar, kTileStride}, in_scratch, gate_scratch);
          if (a.grad_V)
            multiply_dots(h_bar, kTileStride, count, x, kTileStride, d_in, r.padded, base + c0 * d_in, d_in);
          if (a.grad_x)
            multiply_rows(panels, C, c0, d_in, count, h_bar, kTileStride, x_bar, kTileStride, r.padded, c0 > 0);
        }
        if (a.grad_x) store_transposed<T>(a.grad_x, x_bar, d_in, r, nullptr);
      }
    });
  }

  reduce_segments(host.parallel, partial, segment_count, layout.size, [&](int64_t i, T sum) {
    if (i < layout.w_in) {
      a.grad_V[i % d_in * C + i / d_in] = sum;
    } else if (i < layout.b_in) {
      a.grad_w_in[i - layout.w_in] = sum;
    } else if (i < layout.w_out) {
      a.grad_b_in[i - layout.b_in] = sum;
    } else if (i < layout.b_out) {
      a.grad_w_out[i - layout.w_out] = sum;
    } else {
      a.grad_b_out[i - layout.b_out] = sum;
    }
  });
}
