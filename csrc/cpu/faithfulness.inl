// ||W - (V U)^T||^2 and its gradients, a chunk of rows of W at a time.

// Delta of rows [o0, o0 + count): out [count, d_in].
template <class T>
static void weight_delta_rows(const Host<T>& host, const Faithfulness<T>& a, int64_t o0, int64_t count, T* out) {
  host.product(count, a.d_in, a.components, Matrix<T>{a.U.data + o0 * a.U.col, a.U.col, a.U.row}, a.V.transposed(),
               out, a.d_in, 1, false);
  constexpr int64_t rows_a_task = 64;
  run_tasks(host.parallel, ceil_div(count, rows_a_task), [&](int64_t task) {
    for (int64_t o = task * rows_a_task; o < smaller(count, (task + 1) * rows_a_task); ++o) {
      const T* w = a.W.data + (o0 + o) * a.W.row;
      T* row = out + o * a.d_in;
      for (int64_t i = 0; i < a.d_in; ++i) row[i] = w[i * a.W.col] - row[i];
    }
  });
}

// About four megabytes of Delta at a time.
template <class T>
static int64_t delta_chunk(const Faithfulness<T>& a) {
  const int64_t rows = (int64_t(1) << 22) / int64_t(sizeof(T)) / a.d_in;
  return smaller(a.d_out, rows > 64 ? rows : 64);
}

template <class T>
static double faithfulness_forward(const Host<T>& host, const Faithfulness<T>& a) {
  const int64_t chunk = delta_chunk(a);
  Scratch<T> scratch(chunk * a.d_in);
  T* delta = scratch.take(chunk * a.d_in);
  double total = 0;
  for (int64_t o0 = 0; o0 < a.d_out; o0 += chunk) {
    const int64_t count = smaller(chunk, a.d_out - o0);
    weight_delta_rows(host, a, o0, count, delta);
    double lanes[8] = {};
    const int64_t size = count * a.d_in;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8)
      for (int64_t k = 0; k < 8; ++k) lanes[k] += double(delta[i + k]) * double(delta[i + k]);
    for (; i < size; ++i) lanes[0] += double(delta[i]) * double(delta[i]);
    for (int64_t k = 0; k < 8; ++k) total += lanes[k];
  }
  return total;
}

template <class T>
static void faithfulness_backward(const Host<T>& host, const Faithfulness<T>& a, T grad, T* grad_V, T* grad_U) {
  const int64_t chunk = delta_chunk(a);
  const int64_t C = a.components;
  Scratch<T> scratch(chunk * a.d_in);
  T* delta = scratch.take(chunk * a.d_in);
  for (int64_t o0 = 0; o0 < a.d_out; o0 += chunk) {
    const int64_t count = smaller(chunk, a.d_out - o0);
    weight_delta_rows(host, a, o0, count, delta);
    const T scale = T(-2) * grad;
    for (int64_t i = 0; i < count * a.d_in; ++i) delta[i] *= scale;
    const Matrix<T> u{a.U.data + o0 * a.U.col, a.U.row, a.U.col};  // [C, count]
    host.product(a.d_in, C, count, Matrix<T>{delta, 1, a.d_in}, u.transposed(), grad_V, C, 1, o0 > 0);
    host.product(C, count, a.d_in, a.V.transposed(), Matrix<T>{delta, 1, a.d_in}, grad_U + o0, a.d_out, 1, false);
  }
}
