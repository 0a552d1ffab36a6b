// A whole layer, gate and masked component sum, of which nothing of size N C outlives a chunk of components: h and g are
// made again in the backward, from x.
//
// Products: x V, a U forward; again x V, then y_bar U^T, a^T y_bar, x^T h_bar, h_bar V^T backward. Beyond the separate
// operations that is one product of six and one forward of the gate; saved are two tensors [N, C] between the passes and
// two more of gradients in the backward. In memory: three chunks of about four megabytes, whatever C is.

template <class T>
static MaskKind layer_mask_kind(const ComponentLinear<T>& a) {
  return a.key.on ? kLowerKey : kLower;
}

// One panel of a chunk: h as formed, g from its gate into `lower_tile`; the penalty's sums are added to `penalty`.
template <class T>
static MaskPanel<T> layer_panel(const Layer<T>& a, int64_t c, int64_t count, Rows r, Strip<const T> h, T* lower_tile,
                                T* penalty, float* uniforms) {
  for (int64_t k = 0; k < count; ++k) {
    const T sum = gate_strip_forward(a.gate, c + k, h.data + k * h.stride, r, lower_tile + k * kTileStride);
    if (penalty) penalty[k] += sum;
  }
  MaskPanel<T> panel{h, {lower_tile, kTileStride}, {nullptr, 0}, nullptr};
  if (a.linear.key.on) {
    philox_tile(a.linear.key, uint32_t(c / 4), a.linear.key.row_offset + r.begin, round_up(r.count, Lanes<float>::count),
                uniforms, kTileStride);
    panel.uniforms = uniforms;
  }
  return panel;
}

// out [N, columns] *= the factor of x W^T, row by row.
template <class T>
static void scale_by_factor(const Host<T>& host, const ComponentLinear<T>& a, T* out, int64_t columns) {
  run_tasks(host.parallel, ceil_div(a.rows, kBlock), [&](int64_t block) {
    const Rows r = block_rows<T>(a.rows, block);
    Scratch<T> scratch(kRecipeSize);
    Scratch<float> u(4 * kTileStride);
    const RowRecipe<T> rows = row_recipe(a, r, scratch.take(kRecipeSize), u.take(4 * kTileStride));
    for (int64_t n = 0; n < r.count; ++n)
      for (int64_t i = 0; i < columns; ++i) out[(r.begin + n) * columns + i] *= rows.factor[n];
  });
}

template <class T>
static void layer_forward(const Host<T>& host, const Layer<T>& a, T* y, T* penalty_sum) {
  const ComponentLinear<T>& l = a.linear;
  const int64_t C = l.components, N = l.rows;
  if (N == 0) {
    for (int64_t c = 0; c < C; ++c) penalty_sum[c] = T(0);
    return;
  }
  const bool mixes = l.mixes_weight();
  const MaskKind kind = layer_mask_kind(l);
  const Segments segments(N);
  const int64_t chunk = component_chunk<T>(N, C);
  Scratch<T> shared(2 * Scratch<T>::padded(chunk * N) + segments.count * chunk);
  T* formed = shared.take(chunk * N);
  T* masked = shared.take(chunk * N);
  T* partial = shared.take(segments.count * chunk);
  if (mixes) {
    host.product(N, l.d_out, l.d_in, l.x, l.weight.transposed(), y, l.d_out, 1, false);
    scale_by_factor(host, l, y, l.d_out);
  }
  for (int64_t c0 = 0; c0 < C; c0 += chunk) {
    const int64_t count = smaller(chunk, C - c0);
    const Matrix<T> v_chunk{l.V.data + c0 * l.V.col, l.V.row, l.V.col};
    host.product(count, N, l.d_in, v_chunk.transposed(), l.x.transposed(), formed, N, 1, false);
    std::memset(partial, 0, size_t(segments.count * chunk) * sizeof(T));
    run_tasks(host.parallel, ceil_div(count, kGroup) * segments.count, [&](int64_t task) {
      const int64_t segment = task % segments.count, group = task / segments.count * kGroup;
      Scratch<T> scratch(3 * kPanel * kTileStride + kRecipeSize);
      Scratch<float> uniform_scratch(4 * kTileStride);
      float* u = uniform_scratch.take(4 * kTileStride);
      T* inner_tile = scratch.take(kPanel * kTileStride);
      T* lower_tile = scratch.take(kPanel * kTileStride);
      T* out = scratch.take(kPanel * kTileStride);
      T* recipe = scratch.take(kRecipeSize);
      for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
        const Rows r = block_rows<T>(N, block);
        const RowRecipe<T> rows = row_recipe(l, r, recipe, u);
        for (int64_t c = group; c < smaller(count, group + kGroup); c += kPanel) {
          const int64_t here = smaller(kPanel, smaller(count, group + kGroup) - c);
          const Strip<const T> h = strip_in<T>(formed, N, r, c, here, inner_tile);
          const MaskPanel<T> panel =
              layer_panel(a, c0 + c, here, r, h, lower_tile, partial + segment * chunk + c, u);
          mask_forward(kind, panel, here, r.padded, l.key.binomial, rows, out);
          for (int64_t k = 0; k < here; ++k)
            std::memcpy(masked + (c + k) * N + r.begin, out + k * kTileStride, size_t(r.count) * sizeof(T));
        }
      }
    });
    for (int64_t c = 0; c < count; ++c) {
      T sum = T(0);
      for (int64_t s = 0; s < segments.count; ++s) sum += partial[s * chunk + c];
      penalty_sum[c0 + c] = sum;
    }
    host.product(N, l.d_out, count, Matrix<T>{masked, 1, N}, Matrix<T>{l.U.data + c0 * l.U.row, l.U.row, l.U.col}, y,
                 l.d_out, 1, mixes || c0 > 0);
  }
  if (l.bias)
    run_tasks(host.parallel, ceil_div(N, kBlock), [&](int64_t block) {
      const Rows r = block_rows<T>(N, block);
      for (int64_t n = r.begin; n < r.begin + r.count; ++n)
        for (int64_t o = 0; o < l.d_out; ++o) y[n * l.d_out + o] += l.bias[o];
    });
}

template <class T>
static void layer_backward(const Host<T>& host, const Layer<T>& a, const LayerGrads<T>& g) {
  const ComponentLinear<T>& l = a.linear;
  const int64_t C = l.components, N = l.rows, d_in = l.d_in, d_out = l.d_out, hidden = a.gate.hidden;
  const MaskKind kind = layer_mask_kind(l);
  const Segments segments(N);
  const int64_t segment_count = segments.count > 0 ? segments.count : 1;
  const int64_t chunk = component_chunk<T>(N, C);
  const GateLayout layout(chunk, 0, hidden);
  Scratch<T> shared(3 * Scratch<T>::padded(chunk * N) + segment_count * layout.size);
  T* formed = shared.take(chunk * N);
  T* masked = shared.take(chunk * N);
  T* bars = shared.take(chunk * N);  // a_bar, which h_bar replaces
  T* partial = shared.take(segment_count * layout.size);
  ComponentLinearGrads<T> only_bias{};
  only_bias.grad_y = g.grad_y;
  only_bias.bias = g.bias;
  if (g.bias) bias_gradient(host, l, only_bias);
  const bool x_from_w = g.x && l.mixes_weight();
  if (x_from_w) {
    host.product(N, d_in, d_out, g.grad_y, l.weight, g.x, d_in, 1, false);
    scale_by_factor(host, l, g.x, d_in);
  }
  for (int64_t c0 = 0; c0 < C; c0 += chunk) {
    const int64_t count = smaller(chunk, C - c0);
    const Matrix<T> u_chunk{l.U.data + c0 * l.U.row, l.U.row, l.U.col};
    const Matrix<T> v_chunk{l.V.data + c0 * l.V.col, l.V.row, l.V.col};
    if (N > 0) {
      host.product(count, N, d_out, u_chunk, g.grad_y.transposed(), bars, N, 1, false);
      host.product(count, N, d_in, v_chunk.transposed(), l.x.transposed(), formed, N, 1, false);
    }
    std::memset(partial, 0, size_t(segment_count * layout.size) * sizeof(T));
    run_tasks(host.parallel, ceil_div(count, kGroup) * segments.count, [&](int64_t task) {
      const int64_t segment = task % segments.count, group = task / segments.count * kGroup;
      Scratch<T> scratch(7 * kPanel * kTileStride + kRecipeSize + gate_scratch_size<T>(hidden));
      Scratch<float> uniform_scratch(4 * kTileStride);
      float* u = uniform_scratch.take(4 * kTileStride);
      T* inner_tile = scratch.take(kPanel * kTileStride);
      T* lower_tile = scratch.take(kPanel * kTileStride);
      T* bar_tile = scratch.take(kPanel * kTileStride);
      T* masked_tile = scratch.take(kPanel * kTileStride);
      T* inner_bar = scratch.take(kPanel * kTileStride);
      T* lower_bar = scratch.take(kPanel * kTileStride);
      T* out_tile = scratch.take(kPanel * kTileStride);
      T* recipe = scratch.take(kRecipeSize);
      T* gate_scratch = scratch.take(gate_scratch_size<T>(hidden));
      for (int64_t block = segments.first(segment); block < segments.first(segment + 1); ++block) {
        const Rows r = block_rows<T>(N, block);
        const RowRecipe<T> rows = row_recipe(l, r, recipe, u);
        for (int64_t c = group; c < smaller(count, group + kGroup); c += kPanel) {
          const int64_t here = smaller(kPanel, smaller(count, group + kGroup) - c);
          const Strip<const T> h = strip_in<T>(formed, N, r, c, here, inner_tile);
          const Strip<const T> bar = strip_in<T>(bars, N, r, c, here, bar_tile);
          const MaskPanel<T> panel = layer_panel<T>(a, c0 + c, here, r, h, lower_tile, nullptr, u);
          const MaskGrads<T> out{masked_tile, {inner_bar, kTileStride}, {lower_bar, kTileStride}, {nullptr, 0}, nullptr};
          mask_backward(kind, panel, here, r.padded, l.key.binomial, rows, bar, out);
          const Strip<T> h_bar = strip_out(bars, N, r, c, out_tile);
          for (int64_t k = 0; k < here; ++k) {
            gate_strip_backward(a.gate, c0 + c + k, h.data + k * h.stride, inner_bar + k * kTileStride,
                                lower_bar + k * kTileStride, g.penalty ? g.penalty[c0 + c + k] : T(0), r,
                                h_bar.data + k * h_bar.stride, layout.at(partial + segment * layout.size, c + k, hidden),
                                gate_scratch);
            std::memcpy(masked + (c + k) * N + r.begin, masked_tile + k * kTileStride, size_t(r.count) * sizeof(T));
          }
          flush_strip(bars, N, r, c, here, h_bar);
        }
      }
    });
    const auto reduce = [&](int64_t at, int64_t width, T* out) {
      for (int64_t i = 0; i < count * width; ++i) {
        T sum = T(0);
        for (int64_t s = 0; s < segment_count; ++s) sum += partial[s * layout.size + at + i];
        out[c0 * width + i] = sum;
      }
    };
    reduce(layout.w_in, hidden, g.w_in);
    reduce(layout.b_in, hidden, g.b_in);
    reduce(layout.w_out, hidden > 0 ? hidden : 1, g.w_out);
    reduce(layout.b_out, 1, g.b_out);
    host.product(count, d_out, N, Matrix<T>{masked, N, 1}, g.grad_y, g.U + c0 * d_out, d_out, 1, false);
    host.product(d_in, count, N, l.x.transposed(), Matrix<T>{bars, 1, N}, g.V + c0, C, 1, false);
    if (g.x)
      host.product(N, d_in, count, Matrix<T>{bars, 1, N}, v_chunk.transposed(), g.x, d_in, 1, x_from_w || c0 > 0);
  }
}
