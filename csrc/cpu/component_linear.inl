// The masked component sum y = (h * (m - delta)) U + delta' (x W^T) + b and its gradients, with the mask rebuilt from
// its recipe (lower importance, source or key, delta, routing) wherever it is needed.

// What each row of a block does: its delta where routed (else 0), the factor of x W^T, and whether it is routed.
template <class T>
struct RowRecipe {
  const T* delta;   // null: no delta
  const T* factor;  // null: x W^T does not appear
  const T* routed;  // null: everything is routed
};

constexpr int64_t kRecipeSize = 3 * kTileStride;

template <class T>
static RowRecipe<T> row_recipe(const ComponentLinear<T>& a, Rows r, T* scratch, float* uniforms) {
  if (!a.mixes_weight()) return {nullptr, nullptr, nullptr};
  T* delta = scratch;
  T* factor = scratch + kTileStride;
  T* routed = scratch + 2 * kTileStride;
  const float* u = nullptr;
  if (a.random_delta && !a.delta) {
    philox_tile(a.key, uint32_t(a.components / 4), a.key.row_offset + r.begin, round_up(r.count, Lanes<float>::count),
                uniforms, kTileStride);
    u = uniforms + a.components % 4 * kTileStride;
  }
  for (int64_t n = 0; n < r.padded; ++n) {
    const bool valid = n < r.count;
    const bool here = valid && (!a.routed || a.routed[r.begin + n]);
    const T d = !valid ? T(0) : (a.delta ? a.delta[r.begin + n] : (u ? T(u[n]) : T(0)));
    delta[n] = here ? d : T(0);
    factor[n] = here ? d : T(1);
    routed[n] = here ? T(1) : T(0);
  }
  return {a.has_delta() ? delta : nullptr, factor, a.routed ? routed : nullptr};
}

// The inputs of one panel of up to four components and one block of rows.
template <class T>
struct MaskPanel {
  Strip<const T> inner, lower, source;  // data null where absent
  float* uniforms;                      // the key's numbers, or null
};

constexpr int64_t kMaskScratch = 3 * kPanel * kTileStride;

template <class T>
static MaskPanel<T> mask_panel(const ComponentLinear<T>& a, int64_t c0, int64_t count, Rows r, Strip<const T> inner,
                               T* scratch, float* uniforms) {
  MaskPanel<T> p{inner, {nullptr, 0}, {nullptr, 0}, nullptr};
  if (a.lower) p.lower = strip_in<T>(a.lower, a.rows, r, c0, count, scratch);
  if (a.key.on) {
    philox_tile(a.key, uint32_t(c0 / 4), a.key.row_offset + r.begin, round_up(r.count, Lanes<float>::count), uniforms,
                kTileStride);
    p.uniforms = uniforms;
  } else if (a.source) {
    p.source = strip_in<T>(a.source, a.rows, r, c0, count, scratch + kPanel * kTileStride);
  }
  return p;
}

template <class T>
SPD_HD typename Lanes<T>::Vec load_uniform(const float* u, bool binomial) {
  using Vec = typename Lanes<T>::Vec;
  Vec r;
  if constexpr (sizeof(T) == 4) {
    r = load<Vec>(u);
  } else {
    for (int i = 0; i < Lanes<T>::count; ++i) r[i] = T(u[i]);
  }
  return binomial ? (r >= splat<Vec>(T(0.5)) ? splat<Vec>(T(1)) : Vec{}) : r;
}

// What a mask is made of; compile-time, so that the loop over rows has no branches.
enum MaskKind { kOnes, kLower, kSource, kLowerSource, kLowerKey, kKey };

template <class T>
static MaskKind mask_kind(const ComponentLinear<T>& a) {
  if (a.key.on) return a.lower ? kLowerKey : kKey;
  if (a.source) return a.lower ? kLowerSource : kSource;
  return a.lower ? kLower : kOnes;
}

// m = g + (1 - g) r with the roundings of the reference: no fused multiply-add here, so that masks agree bit by bit.
template <class T, MaskKind kind, class V>
SPD_HD V mask_value(V g, V r) {
  if constexpr (kind == kOnes) return splat<V>(T(1));
  if constexpr (kind == kLower) return g;
  if constexpr (kind == kSource || kind == kKey) return r;
  return g + (splat<V>(T(1)) - g) * r;
}

template <class T, MaskKind kind>
static void mask_forward(const MaskPanel<T>& p, int64_t count, int64_t padded, bool binomial, RowRecipe<T> rows, T* a) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t c = 0; c < count; ++c) {
    const T* h = p.inner.data + c * p.inner.stride;
    const T* lower = shifted(p.lower.data, c * p.lower.stride);
    const T* source = shifted(p.source.data, c * p.source.stride);
    const float* u = shifted(p.uniforms, c * kTileStride);
    T* out = a + c * kTileStride;
    for (int64_t n = 0; n < padded; n += lanes) {
      Vec g{}, r{};
      if constexpr (kind == kLower || kind == kLowerSource || kind == kLowerKey) g = load<Vec>(lower + n);
      if constexpr (kind == kSource || kind == kLowerSource) r = load<Vec>(source + n);
      if constexpr (kind == kKey || kind == kLowerKey) r = load_uniform<T>(u + n, binomial);
      Vec m = mask_value<T, kind>(g, r);
      if (rows.delta) m -= load<Vec>(rows.delta + n);
      Vec value = load<Vec>(h + n) * m;
      if (rows.routed) value = load<Vec>(rows.routed + n) != Vec{} ? value : Vec{};
      store(out + n, value);
    }
  }
}

// a = h * (m - delta) where routed, for one panel.
template <class T>
static void mask_forward(MaskKind kind, const MaskPanel<T>& p, int64_t count, int64_t padded, bool binomial,
                         RowRecipe<T> rows, T* a) {
  switch (kind) {
    case kOnes: return mask_forward<T, kOnes>(p, count, padded, binomial, rows, a);
    case kLower: return mask_forward<T, kLower>(p, count, padded, binomial, rows, a);
    case kSource: return mask_forward<T, kSource>(p, count, padded, binomial, rows, a);
    case kLowerSource: return mask_forward<T, kLowerSource>(p, count, padded, binomial, rows, a);
    case kLowerKey: return mask_forward<T, kLowerKey>(p, count, padded, binomial, rows, a);
    case kKey: return mask_forward<T, kKey>(p, count, padded, binomial, rows, a);
  }
}

// Outputs of the backward of one panel; null data is not written.
template <class T>
struct MaskGrads {
  T* a;                              // a itself, for the gradient of U
  Strip<T> inner, lower, source;     // h_bar, g_bar, r_bar
  T* row_sum;                        // sum over components of a_bar h, accumulated
};

template <class T, MaskKind kind>
static void mask_backward(const MaskPanel<T>& p, int64_t count, int64_t padded, bool binomial, RowRecipe<T> rows,
                          Strip<const T> a_bar, MaskGrads<T> out) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  const Vec one = splat<Vec>(T(1));
  for (int64_t c = 0; c < count; ++c) {
    const T* h_row = p.inner.data + c * p.inner.stride;
    const T* lower = shifted(p.lower.data, c * p.lower.stride);
    const T* source = shifted(p.source.data, c * p.source.stride);
    const float* u = shifted(p.uniforms, c * kTileStride);
    const T* bar_row = a_bar.data + c * a_bar.stride;
    T* out_inner = shifted(out.inner.data, c * out.inner.stride);
    T* out_lower = shifted(out.lower.data, c * out.lower.stride);
    T* out_source = shifted(out.source.data, c * out.source.stride);
    T* out_a = shifted(out.a, c * kTileStride);
    for (int64_t n = 0; n < padded; n += lanes) {
      Vec g{}, r{};
      if constexpr (kind == kLower || kind == kLowerSource || kind == kLowerKey) g = load<Vec>(lower + n);
      if constexpr (kind == kSource || kind == kLowerSource) r = load<Vec>(source + n);
      if constexpr (kind == kKey || kind == kLowerKey) r = load_uniform<T>(u + n, binomial);
      Vec m = mask_value<T, kind>(g, r);
      if (rows.delta) m -= load<Vec>(rows.delta + n);
      const Vec h = load<Vec>(h_row + n);
      Vec bar = load<Vec>(bar_row + n);
      Vec value = h * m;
      if (rows.routed) {
        const auto routed = load<Vec>(rows.routed + n) != Vec{};
        bar = routed ? bar : Vec{};
        value = routed ? value : Vec{};
      }
      const Vec bar_h = bar * h;
      if (out.a) store(out_a + n, value);
      if (out.inner.data) store(out_inner + n, bar * m);
      if (out.lower.data) store(out_lower + n, bar_h * (one - r));
      if (out.source.data) store(out_source + n, bar_h * (one - g));
      if (out.row_sum) store(out.row_sum + n, load<Vec>(out.row_sum + n) + bar_h);
    }
  }
}

template <class T>
static void mask_backward(MaskKind kind, const MaskPanel<T>& p, int64_t count, int64_t padded, bool binomial,
                          RowRecipe<T> rows, Strip<const T> a_bar, MaskGrads<T> out) {
  switch (kind) {
    case kOnes: return mask_backward<T, kOnes>(p, count, padded, binomial, rows, a_bar, out);
    case kLower: return mask_backward<T, kLower>(p, count, padded, binomial, rows, a_bar, out);
    case kSource: return mask_backward<T, kSource>(p, count, padded, binomial, rows, a_bar, out);
    case kLowerSource: return mask_backward<T, kLowerSource>(p, count, padded, binomial, rows, a_bar, out);
    case kLowerKey: return mask_backward<T, kLowerKey>(p, count, padded, binomial, rows, a_bar, out);
    case kKey: return mask_backward<T, kKey>(p, count, padded, binomial, rows, a_bar, out);
  }
}

// tile[i][n] *= factor[n].
template <class T>
static void scale_rows(T* tile, int64_t features, int64_t padded, const T* factor) {
  using Vec = typename Lanes<T>::Vec;
  for (int64_t i = 0; i < features; ++i)
    for (int64_t n = 0; n < padded; n += Lanes<T>::count)
      store(tile + i * kTileStride + n, load<Vec>(tile + i * kTileStride + n) * load<Vec>(factor + n));
}

template <class T>
static void component_linear_forward_small(const Host<T>& host, const ComponentLinear<T>& a, T* y) {
  const int64_t C = a.components, d_in = a.d_in, d_out = a.d_out;
  const bool mixes = a.mixes_weight();
  const MaskKind kind = mask_kind(a);
  Scratch<T> shared(Scratch<T>::padded(panel_size(C, d_in)) + Scratch<T>::padded(panel_size(d_out, C)) +
                    Scratch<T>::padded(panel_size(d_out, d_in)));
  T* v_panels = shared.take(panel_size(C, d_in));
  T* u_panels = shared.take(panel_size(d_out, C));
  T* w_panels = shared.take(panel_size(d_out, d_in));
  if (!a.inner) pack_panels(v_panels, C, d_in, a.V.transposed());
  pack_panels(u_panels, d_out, C, a.U.transposed());
  if (mixes) pack_panels(w_panels, d_out, d_in, a.weight);

  run_tasks(host.parallel, ceil_div(a.rows, kBlock), [&](int64_t block) {
    const Rows r = block_rows<T>(a.rows, block);
    Scratch<T> scratch((d_in + d_out + 2 * kGroup) * kTileStride + kMaskScratch + kRecipeSize);
    Scratch<float> uniform_scratch(4 * kTileStride);
    float* u = uniform_scratch.take(4 * kTileStride);
    T* x = scratch.take(d_in * kTileStride);
    T* out = scratch.take(d_out * kTileStride);
    T* masked = scratch.take(kGroup * kTileStride);
    T* inner_tile = scratch.take(kGroup * kTileStride);
    T* mask_scratch = scratch.take(kMaskScratch);
    const RowRecipe<T> rows = row_recipe(a, r, scratch.take(kRecipeSize), u);
    if (!a.inner || mixes) load_transposed(x, a.x, d_in, r);
    if (mixes) {
      multiply_rows(w_panels, d_in, 0, d_out, d_in, x, kTileStride, out, kTileStride, r.padded, false);
      scale_rows(out, d_out, r.padded, rows.factor);
    }
    for (int64_t c0 = 0; c0 < C; c0 += kGroup) {
      const int64_t count = smaller(kGroup, C - c0);
      if (!a.inner)
        multiply_rows(v_panels + c0 * d_in, d_in, 0, count, d_in, x, kTileStride, inner_tile, kTileStride, r.padded,
                      false);
      for (int64_t p0 = 0; p0 < count; p0 += kPanel) {
        const int64_t here = smaller(kPanel, count - p0);
        T* tile = inner_tile + p0 * kTileStride;
        const Strip<const T> h =
            a.inner ? strip_in<T>(a.inner, a.rows, r, c0 + p0, here, tile) : Strip<const T>{tile, kTileStride};
        const MaskPanel<T> panel = mask_panel(a, c0 + p0, here, r, h, mask_scratch, u);
        mask_forward(kind, panel, here, r.padded, a.key.binomial, rows, masked + p0 * kTileStride);
      }
      multiply_rows(u_panels, C, c0, d_out, count, masked, kTileStride, out, kTileStride, r.padded, mixes || c0 > 0);
    }
    store_transposed(y, out, d_out, r, a.bias);
  });
}

template <class T>
static void component_linear_forward_large(const Host<T>& host, const ComponentLinear<T>& a, T* y) {
  const int64_t C = a.components, d_in = a.d_in, d_out = a.d_out;
  const bool mixes = a.mixes_weight();
  const MaskKind kind = mask_kind(a);
  const int64_t blocks = ceil_div(a.rows, kBlock);
  const int64_t chunk = component_chunk<T>(a.rows, C);
  Scratch<T> shared(2 * Scratch<T>::padded(chunk * a.rows));
  T* masked = shared.take(chunk * a.rows);
  T* formed = a.inner ? nullptr : shared.take(chunk * a.rows);
  if (mixes) {
    host.product(a.rows, d_out, d_in, a.x, a.weight.transposed(), y, d_out, 1, false);
    run_tasks(host.parallel, blocks, [&](int64_t block) {
      const Rows r = block_rows<T>(a.rows, block);
      Scratch<T> scratch(kRecipeSize);
      Scratch<float> u(4 * kTileStride);
      const RowRecipe<T> rows = row_recipe(a, r, scratch.take(kRecipeSize), u.take(4 * kTileStride));
      for (int64_t n = 0; n < r.count; ++n) {
        T* out = y + (r.begin + n) * d_out;
        for (int64_t o = 0; o < d_out; ++o) out[o] = out[o] * rows.factor[n];
      }
    });
  }
  for (int64_t c0 = 0; c0 < C; c0 += chunk) {
    const int64_t count = smaller(chunk, C - c0);
    if (!a.inner)
      host.product(count, a.rows, d_in, Matrix<T>{a.V.data + c0 * a.V.col, a.V.col, a.V.row}, a.x.transposed(), formed,
                   a.rows, 1, false);
    const T* inner = a.inner ? a.inner + c0 * a.rows : formed;
    const int64_t groups = ceil_div(count, kGroup);
    run_tasks(host.parallel, groups * blocks, [&](int64_t task) {
      const int64_t block = task % blocks;
      const Rows r = block_rows<T>(a.rows, block);
      Scratch<T> scratch(2 * kPanel * kTileStride + kMaskScratch + kRecipeSize);
      Scratch<float> uniform_scratch(4 * kTileStride);
      float* u = uniform_scratch.take(4 * kTileStride);
      T* out = scratch.take(kPanel * kTileStride);
      T* inner_scratch = scratch.take(kPanel * kTileStride);
      T* mask_scratch = scratch.take(kMaskScratch);
      const RowRecipe<T> rows = row_recipe(a, r, scratch.take(kRecipeSize), u);
      const int64_t end = smaller(count, (task / blocks + 1) * kGroup);
      for (int64_t c = task / blocks * kGroup; c < end; c += kPanel) {
        const int64_t here = smaller(kPanel, end - c);
        const Strip<const T> h = strip_in<T>(inner, a.rows, r, c, here, inner_scratch);
        const MaskPanel<T> panel = mask_panel(a, c0 + c, here, r, h, mask_scratch, u);
        mask_forward(kind, panel, here, r.padded, a.key.binomial, rows, out);
        for (int64_t k = 0; k < here; ++k)
          std::memcpy(masked + (c + k) * a.rows + r.begin, out + k * kTileStride, size_t(r.count) * sizeof(T));
      }
    });
    host.product(a.rows, d_out, count, Matrix<T>{masked, 1, a.rows},
                 Matrix<T>{a.U.data + c0 * a.U.row, a.U.row, a.U.col}, y, d_out, 1, mixes || c0 > 0);
  }
  if (a.bias)
    run_tasks(host.parallel, blocks, [&](int64_t block) {
      const Rows r = block_rows<T>(a.rows, block);
      for (int64_t n = r.begin; n < r.begin + r.count; ++n)
        for (int64_t o = 0; o < d_out; ++o) y[n * d_out + o] += a.bias[o];
    });
}

template <class T>
static void component_linear_forward(const Host<T>& host, const ComponentLinear<T>& a, T* y) {
  if (a.rows == 0) return;
  if (large_site(host, a.inner && !a.mixes_weight() ? 1 : a.d_in, a.d_out))
    component_linear_forward_large(host, a, y);
  else
    component_linear_forward_small(host, a, y);
}

// grad_bias = the sum of grad_y over rows, in blocks. Sums of a block are double: one row after the other, float would
// lose several digits where they cancel.
template <class T>
static void bias_gradient(const Host<T>& host, const ComponentLinear<T>& a, const ComponentLinearGrads<T>& g) {
  const Segments segments(a.rows);
  const int64_t count = segments.count > 0 ? segments.count : 1;
  Scratch<T> shared(count * a.d_out);
  T* partial = shared.zeros(count * a.d_out);
  run_tasks(host.parallel, segments.count, [&](int64_t segment) {
    T* sum = partial + segment * a.d_out;
    Scratch<double> scratch(a.d_out);
    double* block_sum = scratch.take(a.d_out);
    for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
      const Rows r = block_rows<T>(a.rows, block);
      std::memset(block_sum, 0, size_t(a.d_out) * sizeof(double));
      for (int64_t n = r.begin; n < r.begin + r.count; ++n)
        for (int64_t o = 0; o < a.d_out; ++o) block_sum[o] += double(g.grad_y.data[n * g.grad_y.row + o]);
      for (int64_t o = 0; o < a.d_out; ++o) sum[o] += T(block_sum[o]);
    }
  });
  reduce_segments(host.parallel, partial, count, a.d_out, [&](int64_t o, T sum) { g.bias[o] = sum; });
}

template <class T>
static void component_linear_backward_small(const Host<T>& host, const ComponentLinear<T>& a,
                                            const ComponentLinearGrads<T>& g) {
  const int64_t C = a.components, d_in = a.d_in, d_out = a.d_out;
  const bool mixes = a.mixes_weight();
  const MaskKind kind = mask_kind(a);
  // Through the components only where h is not an input of its own.
  const bool x_from_h = g.x && !a.inner;
  const bool x_from_w = g.x && mixes;
  const bool needs_x = !a.inner || g.delta;
  const Segments segments(a.rows);
  const int64_t count_segments = segments.count > 0 ? segments.count : 1;
  const int64_t u_size = g.U ? C * d_out : 0, v_size = g.V ? C * d_in : 0;
  const int64_t size = u_size + v_size;

  Scratch<T> shared(Scratch<T>::padded(count_segments * size) + Scratch<T>::padded(panel_size(C, d_in)) +
                    Scratch<T>::padded(panel_size(C, d_out)) + Scratch<T>::padded(panel_size(d_in, C)) +
                    Scratch<T>::padded(panel_size(d_out, d_in)) + Scratch<T>::padded(panel_size(d_in, d_out)));
  T* partial = shared.zeros(count_segments * size);
  T* v_panels = shared.take(panel_size(C, d_in));
  T* u_panels = shared.take(panel_size(C, d_out));
  T* vx_panels = shared.take(panel_size(d_in, C));
  T* w_panels = shared.take(panel_size(d_out, d_in));
  T* wx_panels = shared.take(panel_size(d_in, d_out));
  if (!a.inner) pack_panels(v_panels, C, d_in, a.V.transposed());
  pack_panels(u_panels, C, d_out, a.U);
  if (x_from_h) pack_panels(vx_panels, d_in, C, a.V);
  if (g.delta) pack_panels(w_panels, d_out, d_in, a.weight);
  if (x_from_w) pack_panels(wx_panels, d_in, d_out, a.weight.transposed());

  run_tasks(host.parallel, segments.count, [&](int64_t segment) {
    using Vec = typename Lanes<T>::Vec;
    Scratch<T> scratch((2 * d_in + 2 * d_out + 7 * kGroup + 1) * kTileStride + kMaskScratch + kRecipeSize);
    Scratch<float> uniform_scratch(4 * kTileStride);
    float* u = uniform_scratch.take(4 * kTileStride);
    T* x = scratch.take(d_in * kTileStride);
    T* x_bar = scratch.take(d_in * kTileStride);
    T* y_bar = scratch.take(d_out * kTileStride);
    T* xw = scratch.take(d_out * kTileStride);
    T* a_bar = scratch.take(kGroup * kTileStride);
    T* masked = scratch.take(kGroup * kTileStride);
    T* inner_tile = scratch.take(kGroup * kTileStride);
    T* inner_bar = scratch.take(kGroup * kTileStride);
    T* lower_bar = scratch.take(kGroup * kTileStride);
    T* source_bar = scratch.take(kGroup * kTileStride);
    T* row_sum = scratch.take(kTileStride);
    T* mask_scratch = scratch.take(kMaskScratch);
    T* recipe_scratch = scratch.take(kRecipeSize);
    T* u_sum = partial + segment * size;
    T* v_sum = u_sum + u_size;

    for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
      const Rows r = block_rows<T>(a.rows, block);
      const RowRecipe<T> rows = row_recipe(a, r, recipe_scratch, u);
      if (needs_x) load_transposed(x, a.x, d_in, r);
      load_transposed(y_bar, g.grad_y, d_out, r);
      if (g.delta) std::memset(row_sum, 0, sizeof(T) * size_t(kTileStride));
      if (x_from_w) {
        multiply_rows(wx_panels, d_out, 0, d_in, d_out, y_bar, kTileStride, x_bar, kTileStride, r.padded, false);
        scale_rows(x_bar, d_in, r.padded, rows.factor);
      }
      for (int64_t c0 = 0; c0 < C; c0 += kGroup) {
        const int64_t count = smaller(kGroup, C - c0);
        multiply_rows(u_panels + c0 * d_out, d_out, 0, count, d_out, y_bar, kTileStride, a_bar, kTileStride, r.padded,
                      false);
        if (!a.inner)
          multiply_rows(v_panels + c0 * d_in, d_in, 0, count, d_in, x, kTileStride, inner_tile, kTileStride, r.padded,
                        false);
        for (int64_t p0 = 0; p0 < count; p0 += kPanel) {
          const int64_t here = smaller(kPanel, count - p0);
          const int64_t c = c0 + p0, at = p0 * kTileStride;
          const Strip<const T> h = a.inner ? strip_in<T>(a.inner, a.rows, r, c, here, inner_tile + at)
                                           : Strip<const T>{inner_tile + at, kTileStride};
          const MaskPanel<T> panel = mask_panel(a, c, here, r, h, mask_scratch, u);
          MaskGrads<T> out{g.U ? masked + at : nullptr, {nullptr, 0}, {nullptr, 0}, {nullptr, 0},
                           g.delta ? row_sum : nullptr};
          if (g.inner) out.inner = strip_out(g.inner, a.rows, r, c, inner_bar + at);
          else if (g.V || x_from_h) out.inner = {inner_bar + at, kTileStride};
          if (g.lower) out.lower = strip_out(g.lower, a.rows, r, c, lower_bar + at);
          if (g.source) out.source = strip_out(g.source, a.rows, r, c, source_bar + at);
          mask_backward(kind, panel, here, r.padded, a.key.binomial, rows, Strip<const T>{a_bar + at, kTileStride},
                        out);
          if (g.inner) flush_strip(g.inner, a.rows, r, c, here, out.inner);
          if (g.lower) flush_strip(g.lower, a.rows, r, c, here, out.lower);
          if (g.source) flush_strip(g.source, a.rows, r, c, here, out.source);
        }
        if (g.U)
          multiply_dots(masked, kTileStride, count, y_bar, kTileStride, d_out, r.padded, u_sum + c0 * d_out, d_out);
        if (g.V)
          multiply_dots(inner_bar, kTileStride, count, x, kTileStride, d_in, r.padded, v_sum + c0 * d_in, d_in);
        if (x_from_h)
          multiply_rows(vx_panels, C, c0, d_in, count, inner_bar, kTileStride, x_bar, kTileStride, r.padded,
                        x_from_w || c0 > 0);
      }
      if (g.x && (x_from_h || x_from_w)) store_transposed<T>(g.x, x_bar, d_in, r, nullptr);
      if (g.delta) {
        multiply_rows(w_panels, d_in, 0, d_out, d_in, x, kTileStride, xw, kTileStride, r.padded, false);
        for (int64_t n = 0; n < r.padded; n += Lanes<T>::count) {
          Vec sum{};
          for (int64_t o = 0; o < d_out; ++o)
            sum = mul_add(load<Vec>(y_bar + o * kTileStride + n), load<Vec>(xw + o * kTileStride + n), sum);
          store(row_sum + n, sum - load<Vec>(row_sum + n));
        }
        for (int64_t n = 0; n < r.count; ++n)
          g.delta[r.begin + n] = rows.routed && rows.routed[n] == T(0) ? T(0) : row_sum[n];
      }
    }
  });
  reduce_segments(host.parallel, partial, count_segments, size, [&](int64_t i, T sum) {
    if (i < u_size)
      g.U[i] = sum;
    else
      g.V[(i - u_size) % d_in * C + (i - u_size) / d_in] = sum;
  });
}

template <class T>
static void component_linear_backward_large(const Host<T>& host, const ComponentLinear<T>& a,
                                            const ComponentLinearGrads<T>& g) {
  const int64_t C = a.components, d_in = a.d_in, d_out = a.d_out, N = a.rows;
  const bool mixes = a.mixes_weight();
  const MaskKind kind = mask_kind(a);
  const bool x_from_h = g.x && !a.inner;
  const bool x_from_w = g.x && mixes;
  const int64_t blocks = ceil_div(N, kBlock);
  const int64_t chunk = component_chunk<T>(N, C);
  const bool needs_bar = g.V || x_from_h;
  Scratch<T> shared(4 * Scratch<T>::padded(chunk * N) + Scratch<T>::padded(N));
  T* a_bar = shared.take(chunk * N);
  T* masked = shared.take(chunk * N);
  T* formed = a.inner ? nullptr : shared.take(chunk * N);
  T* bars = needs_bar ? shared.take(chunk * N) : nullptr;
  T* row_sum = g.delta ? shared.zeros(N) : nullptr;

  if (x_from_w) {
    host.product(N, d_in, d_out, g.grad_y, a.weight, g.x, d_in, 1, false);
    run_tasks(host.parallel, blocks, [&](int64_t block) {
      const Rows r = block_rows<T>(N, block);
      Scratch<T> scratch(kRecipeSize);
      Scratch<float> u(4 * kTileStride);
      const RowRecipe<T> rows = row_recipe(a, r, scratch.take(kRecipeSize), u.take(4 * kTileStride));
      for (int64_t n = 0; n < r.count; ++n) {
        T* out = g.x + (r.begin + n) * d_in;
        for (int64_t i = 0; i < d_in; ++i) out[i] = out[i] * rows.factor[n];
      }
    });
  }
  for (int64_t c0 = 0; c0 < C; c0 += chunk) {
    const int64_t count = smaller(chunk, C - c0);
    const Matrix<T> u_chunk{a.U.data + c0 * a.U.row, a.U.row, a.U.col};
    const Matrix<T> v_chunk{a.V.data + c0 * a.V.col, a.V.row, a.V.col};
    host.product(count, N, d_out, u_chunk, g.grad_y.transposed(), a_bar, N, 1, false);
    if (!a.inner) host.product(count, N, d_in, v_chunk.transposed(), a.x.transposed(), formed, N, 1, false);
    const T* inner = a.inner ? a.inner + c0 * N : formed;
    // With a gradient of delta one task takes all components of its rows, so that row sums have one writer.
    const int64_t group = g.delta ? count : kGroup;
    const int64_t groups = ceil_div(count, group);
    run_tasks(host.parallel, groups * blocks, [&](int64_t task) {
      const int64_t block = task % blocks;
      const Rows r = block_rows<T>(N, block);
      Scratch<T> scratch((6 * kPanel + 1) * kTileStride + kMaskScratch + kRecipeSize);
      Scratch<float> uniform_scratch(4 * kTileStride);
      float* u = uniform_scratch.take(4 * kTileStride);
      T* masked_tile = scratch.take(kPanel * kTileStride);
      T* inner_tile = scratch.take(kPanel * kTileStride);
      T* bar_tile = scratch.take(kPanel * kTileStride);
      T* inner_out = scratch.take(kPanel * kTileStride);
      T* lower_out = scratch.take(kPanel * kTileStride);
      T* source_out = scratch.take(kPanel * kTileStride);
      T* sum_tile = scratch.take(kTileStride);
      T* mask_scratch = scratch.take(kMaskScratch);
      const RowRecipe<T> rows = row_recipe(a, r, scratch.take(kRecipeSize), u);
      if (row_sum) std::memset(sum_tile, 0, sizeof(T) * size_t(kTileStride));
      const int64_t end = smaller(count, (task / blocks + 1) * group);
      for (int64_t c = task / blocks * group; c < end; c += kPanel) {
        const int64_t here = smaller(kPanel, end - c);
        const Strip<const T> h = strip_in<T>(inner, N, r, c, here, inner_tile);
        const Strip<const T> bar = strip_in<T>(a_bar, N, r, c, here, bar_tile);
        const MaskPanel<T> panel = mask_panel(a, c0 + c, here, r, h, mask_scratch, u);
        MaskGrads<T> out{g.U ? masked_tile : nullptr, {nullptr, 0}, {nullptr, 0}, {nullptr, 0},
                         row_sum ? sum_tile : nullptr};
        if (g.inner) out.inner = strip_out(g.inner, N, r, c0 + c, inner_out);
        else if (bars) out.inner = strip_out(bars, N, r, c, inner_out);
        if (g.lower) out.lower = strip_out(g.lower, N, r, c0 + c, lower_out);
        if (g.source) out.source = strip_out(g.source, N, r, c0 + c, source_out);
        mask_backward(kind, panel, here, r.padded, a.key.binomial, rows, bar, out);
        if (g.inner) flush_strip(g.inner, N, r, c0 + c, here, out.inner);
        else if (bars) flush_strip(bars, N, r, c, here, out.inner);
        if (g.lower) flush_strip(g.lower, N, r, c0 + c, here, out.lower);
        if (g.source) flush_strip(g.source, N, r, c0 + c, here, out.source);
        if (g.U)
          for (int64_t k = 0; k < here; ++k)
            std::memcpy(masked + (c + k) * N + r.begin, masked_tile + k * kTileStride, size_t(r.count) * sizeof(T));
      }
      if (row_sum)
        for (int64_t n = 0; n < r.count; ++n) row_sum[r.begin + n] += sum_tile[n];
    });
    if (g.U)
      host.product(count, d_out, N, Matrix<T>{masked, N, 1}, g.grad_y, g.U + c0 * d_out, d_out, 1, false);
    if (g.V) host.product(d_in, count, N, a.x.transposed(), Matrix<T>{bars, 1, N}, g.V + c0, C, 1, false);
    if (x_from_h)
      host.product(N, d_in, count, Matrix<T>{bars, 1, N}, v_chunk.transposed(), g.x, d_in, 1, x_from_w || c0 > 0);
  }
  if (g.delta) {
    // x W^T a block of rows at a time.
    Scratch<T> product_scratch(kBlock * d_out);
    T* xw = product_scratch.take(kBlock * d_out);
    for (int64_t block = 0; block < blocks; ++block) {
      const Rows r = block_rows<T>(N, block);
      host.product(r.count, d_out, d_in, Matrix<T>{a.x.data + r.begin * a.x.row, a.x.row, a.x.col},
                   a.weight.transposed(), xw, d_out, 1, false);
      for (int64_t n = 0; n < r.count; ++n) {
        T sum = T(0);
        const T* bar = g.grad_y.data + (r.begin + n) * g.grad_y.row;
        for (int64_t o = 0; o < d_out; ++o) sum = mul_add(bar[o], xw[n * d_out + o], sum);
        const bool routed = !a.routed || a.routed[r.begin + n];
        g.delta[r.begin + n] = routed ? sum - row_sum[r.begin + n] : T(0);
      }
    }
  }
}

template <class T>
static void component_linear_backward(const Host<T>& host, const ComponentLinear<T>& a,
                                      const ComponentLinearGrads<T>& g) {
  if (g.bias) bias_gradient(host, a, g);
  // With h given and no weight to mix, x does not reach the output by this operation.
  if (g.x && a.inner && !a.mixes_weight()) std::memset(g.x, 0, size_t(a.rows * a.d_in) * sizeof(T));
  const bool uses_x = !a.inner || a.mixes_weight();
  if (large_site(host, uses_x ? a.d_in : 1, a.d_out))
    component_linear_backward_large(host, a, g);
  else
    component_linear_backward_small(host, a, g);
}
