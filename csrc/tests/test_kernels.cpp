// The scalar mathematics and the CPU kernels against plain loops in long double; no torch, no Python.
// Meant for AddressSanitizer and UndefinedBehaviorSanitizer: every buffer is exactly as large as its tensor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../common/gelu.h"
#include "../common/penalties.h"
#include "../common/philox.h"
#include "../common/sigmoids.h"
#include "../cpu/kernels.h"

namespace {

using Real = long double;

int failures = 0;
int checks = 0;

void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// ---- the host the kernels run on

int threads = 1;

void loop(int64_t tasks, void* state, void (*body)(void*, int64_t)) {
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(state, task);
    return;
  }
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t)
    workers.emplace_back([=] {
      for (int64_t task = t; task < tasks; task += threads) body(state, task);
    });
  for (auto& worker : workers) worker.join();
}

template <class T>
void product(int64_t m, int64_t n, int64_t k, spd::Matrix<T> a, spd::Matrix<T> b, T* c, int64_t c_row, int64_t c_col,
             bool accumulate) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      Real sum = accumulate ? Real(c[i * c_row + j * c_col]) : Real(0);
      for (int64_t l = 0; l < k; ++l)
        sum += Real(a.data[i * a.row + l * a.col]) * Real(b.data[l * b.row + j * b.col]);
      c[i * c_row + j * c_col] = T(sum);
    }
}

template <class T>
spd::Host<T> host(int path) {
  return {{loop}, product<T>, path};
}

// ---- data

std::mt19937 generator(7);

template <class T>
std::vector<T> normal(int64_t count, double scale = 1) {
  std::normal_distribution<double> d(0, scale);
  std::vector<T> v;
  v.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) v.push_back(T(d(generator)));
  return v;
}

template <class T>
std::vector<T> unit(int64_t count) {
  std::uniform_real_distribution<double> d(-0.02, 1);
  std::vector<T> v;
  for (int64_t i = 0; i < count; ++i) v.push_back(T(d(generator)));
  return v;
}

// A pointer that is never null, as the kernels read null as "absent".
template <class T>
T* at(std::vector<T>& v) {
  static T nothing;
  return v.empty() ? &nothing : v.data();
}

template <class T>
void compare(const std::string& what, const std::vector<T>& got, const std::vector<Real>& truth) {
  Real scale = 1, error = 0;
  bool finite = true;
  for (size_t i = 0; i < got.size(); ++i) {
    scale = std::max(scale, std::fabs(truth[i]));
    error = std::max(error, std::fabs(Real(got[i]) - truth[i]));
    finite = finite && std::isfinite(got[i]);
  }
  // Sums over a few hundred rows of terms of order one.
  const Real allowed = (sizeof(T) == 4 ? 4e-6L : 1e-14L) * scale;
  check(finite && got.size() == truth.size() && error <= allowed, what + ": error " + std::to_string(double(error)));
}

// ---- scalar mathematics

void test_philox() {
  const auto same = [](spd::Words4 w, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return w.lane[0] == a && w.lane[1] == b && w.lane[2] == c && w.lane[3] == d;
  };
  const uint32_t f = 0xffffffffu;
  check(same(spd::philox4x32(0, 0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8), "philox zeros");
  check(same(spd::philox4x32(f, f, f, f, f, f), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd), "philox ones");
  check(same(spd::philox4x32(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0), 0xd16cfe09,
             0x94fdcceb, 0x5001e420, 0x24126ea1),
        "philox pi");
  check(spd::uniform_from_word(0) == 0.0f && spd::uniform_from_word(f) < 1.0f, "uniform range");
}

void test_gelu() {
  Real worst_value = 0, worst_slope = 0, worst_curvature = 0, worst_small = 0;
  for (int i = -800000; i <= 800000; ++i) {
    const float z = float(i) * 1e-5f;
    const Real exact = Real(z) * std::erfc(-Real(z) * 0.70710678118654752440L) / 2;
    const Real density = 0.39894228040143267794L * std::exp(-Real(z) * Real(z) / 2);
    const Real slope = std::erfc(-Real(z) * 0.70710678118654752440L) / 2 + Real(z) * density;
    float value, d;
    spd::gelu_with_slope(z, value, d);
    worst_value = std::max({worst_value, std::fabs(value - exact), std::fabs(spd::gelu(z) - exact)});
    worst_slope = std::max(worst_slope, std::fabs(d - slope));
    if (i != 0 && std::abs(i) < 10000) worst_small = std::max(worst_small, std::fabs(value / exact - 1));
    double value64, d64;
    spd::gelu_with_slope(double(z), value64, d64);
    float curvature, same_value, same_slope;
    spd::gelu_with_curvature(z, same_value, same_slope, curvature);
    worst_curvature = std::max(worst_curvature, std::fabs(curvature - (2 - Real(z) * z) * density));
    check(same_value == value && same_slope == d, "gelu with curvature");
    check(std::fabs(value64 - exact) < 1e-15L && std::fabs(d64 - slope) < 1e-15L, "gelu double");
  }
  std::printf("gelu: value error %.2Le, relative near zero %.2Le, slope error %.2Le, curvature error %.2Le\n",
              worst_value, worst_small, worst_slope, worst_curvature);
  check(worst_value < 4e-7L, "gelu value");
  check(worst_small < 4e-7L, "gelu near zero");
  check(worst_slope < 4e-7L, "gelu slope");
  check(worst_curvature < 2e-6L, "gelu curvature");
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  float value, slope;
  spd::gelu_with_slope(nan, value, slope);
  check(std::isnan(value) && std::isnan(slope) && std::isnan(spd::gelu(nan)), "gelu nan");
  check(spd::gelu(inf) == inf && std::fabs(spd::gelu(-inf)) < 2e-7f, "gelu infinity");
}

void test_sigmoids() {
  using spd::Sigmoid;
  const double s[] = {-3, -0.5, 0, 0.25, 1, 1.5};
  const double upper[] = {0, 0, 0, 0.25, 1, 1.005}, slope[] = {0, 0, 1, 1, 1, 0.01};
  const double paper[] = {-0.03, -0.005, 0, 0.25, 1, 1}, clamp[] = {0, 0, 0, 0.25, 1, 1};
  const double paper_slope[] = {0.01, 0.01, 0.01, 1, 1, 0};
  for (int i = 0; i < 6; ++i) {
    const auto near = [](double a, double b) { return std::fabs(a - b) < 1e-15; };
    check(near(spd::upper_sigmoid<double>(s[i]), upper[i]), "upper");
    check(near(spd::upper_sigmoid_slope<double>(s[i]), slope[i]), "upper slope");
    check(near(spd::lower_sigmoid<double>(s[i], Sigmoid::paper), paper[i]), "lower paper");
    check(near(spd::lower_sigmoid<double>(s[i], Sigmoid::preset2026), clamp[i]), "lower 2026");
    for (double g : {-2.0, 2.0}) {
      check(near(spd::lower_sigmoid_backward<double>(s[i], g, Sigmoid::paper), g * paper_slope[i]), "paper backward");
      const double leak = s[i] <= 0 ? (g < 0 ? 0.01 * g : 0) : (s[i] <= 1 ? g : 0);
      check(near(spd::lower_sigmoid_backward<double>(s[i], g, Sigmoid::preset2026), leak), "2026 backward");
    }
  }
}

void test_penalties() {
  for (auto kind : {spd::Penalty::lp, spd::Penalty::smooth_l0})
    for (double power : {0.4, 1.0, 2.0})
      for (double g : {0.0, 0.1, 0.9, 1.2}) {
        const double eps = 1e-2, step = 1e-6;
        const double numeric = (spd::penalty_value(g + step, kind, power, eps) -
                                spd::penalty_value(g - step, kind, power, eps)) /
                               (2 * step);
        check(std::fabs(spd::penalty_slope(g, kind, power, eps) - numeric) < 1e-6, "penalty slope");
      }
}

// ---- kernels

struct Shape {
  int64_t rows, d_in, components, d_out, hidden;
};

template <class T>
void test_gate(const std::string& name, int path, Shape n, spd::Sigmoid sigmoid, spd::Penalty penalty, double power,
               bool sparse = false) {
  const int64_t N = n.rows, D = n.d_in, C = n.components, H = n.hidden, O = std::max<int64_t>(H, 1);
  auto x = normal<T>(N * D), V = normal<T>(D * C, 1 / std::sqrt(double(D)));
  for (int64_t r = 0; sparse && r < N; ++r)
    if (r % 5 != 2) std::fill_n(x.begin() + r * D, D, T(0));
  auto w_in = normal<T>(C * H), b_in = normal<T>(C * H, 0.5), w_out = normal<T>(C * O, 1 / std::sqrt(double(O)));
  auto b_out = normal<T>(C, 0.5);
  auto grad_inner = normal<T>(N * C), grad_lower = normal<T>(N * C), grad_penalty = normal<T>(C);
  std::vector<T> inner(size_t(N * C)), lower(size_t(N * C)), sums(size_t(C), T(-1));
  const double eps = 1e-2;
  const spd::Gate<T> gate{at(w_in), at(b_in), at(w_out), at(b_out), H, sigmoid, penalty, T(power), T(eps)};
  spd::kernels<T>().gate_forward(
      host<T>(path), {N, D, C, {at(x), D, 1}, {at(V), C, 1}, gate, at(inner), at(lower), at(sums)});
  std::vector<T> grad_x(size_t(N * D)), grad_V(size_t(D * C)), g_w_in(size_t(C * H)), g_b_in(size_t(C * H)),
      g_w_out(size_t(C * O)), g_b_out(static_cast<size_t>(C));
  spd::kernels<T>().gate_backward(
      host<T>(path), {N, D, C, at(grad_inner), at(grad_lower), at(grad_penalty), {at(x), D, 1}, {at(V), C, 1},
                      at(inner), gate, at(grad_x), at(grad_V), at(g_w_in), at(g_b_in), at(g_w_out), at(g_b_out)});

  std::vector<Real> t_lower(size_t(N * C)), t_inner(size_t(N * C)), t_sums(size_t(C), 0), t_x(size_t(N * D), 0),
      t_V(size_t(D * C), 0), t_w_in(size_t(C * H), 0), t_b_in(size_t(C * H), 0), t_w_out(size_t(C * O), 0),
      t_b_out(size_t(C), 0);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t r = 0; r < N; ++r) {
      Real h = 0, s = b_out[c];
      for (int64_t i = 0; i < D; ++i) h += Real(x[r * D + i]) * V[i * C + c];
      t_inner[c * N + r] = h;
      // The backward is that of the h the forward has returned.
      h = inner[c * N + r];
      std::vector<double> value(static_cast<size_t>(O)), slope(static_cast<size_t>(O));
      if (H == 0) s += w_out[c] * h;
      for (int64_t j = 0; j < H; ++j) {
        spd::gelu_with_slope(double(w_in[c * H + j] * h + b_in[c * H + j]), value[j], slope[j]);
        s += w_out[c * H + j] * Real(value[j]);
      }
      t_lower[c * N + r] = spd::lower_sigmoid<double>(double(s), sigmoid);
      const double g = spd::upper_sigmoid<double>(double(s));
      t_sums[c] += spd::penalty_value(g, penalty, power, eps);
      Real s_bar = spd::lower_sigmoid_backward<double>(double(s), double(grad_lower[c * N + r]), sigmoid);
      if (spd::upper_sigmoid_slope<double>(double(s)) != 0)
        s_bar += grad_penalty[c] * Real(spd::penalty_slope(g, penalty, power, eps)) * spd::upper_sigmoid_slope<double>(double(s));
      Real h_bar = grad_inner[c * N + r];
      t_b_out[c] += s_bar;
      if (H == 0) {
        t_w_out[c] += s_bar * h;
        h_bar += s_bar * w_out[c];
      }
      for (int64_t j = 0; j < H; ++j) {
        const Real z_bar = s_bar * w_out[c * H + j] * slope[j];
        t_w_out[c * H + j] += s_bar * value[j];
        t_b_in[c * H + j] += z_bar;
        t_w_in[c * H + j] += z_bar * h;
        h_bar += z_bar * w_in[c * H + j];
      }
      for (int64_t i = 0; i < D; ++i) {
        t_V[i * C + c] += x[r * D + i] * h_bar;
        t_x[r * D + i] += V[i * C + c] * h_bar;
      }
    }
  compare(name + " inner", inner, t_inner);
  compare(name + " lower", lower, t_lower);
  if (penalty != spd::Penalty::none) compare(name + " sums", sums, t_sums);
  compare(name + " grad_x", grad_x, t_x);
  compare(name + " grad_V", grad_V, t_V);
  compare(name + " grad_w_in", g_w_in, t_w_in);
  compare(name + " grad_b_in", g_b_in, t_b_in);
  compare(name + " grad_w_out", g_w_out, t_w_out);
  compare(name + " grad_b_out", g_b_out, t_b_out);
}

// The interpolated gate against its definition: every row's cubic piece from s and s' at the two nodes around it.
template <class T>
void test_interpolated_gate(const std::string& name, int path, Shape n) {
  const int64_t N = n.rows, D = n.d_in, C = n.components, H = n.hidden;
  auto x = normal<T>(N * D), V = normal<T>(D * C, 1 / std::sqrt(double(D)));
  auto w_in = normal<T>(C * H, 0.5), b_in = normal<T>(C * H, 0.5), w_out = normal<T>(C * H, 1 / std::sqrt(double(H)));
  auto b_out = normal<T>(C, 0.5), grad_inner = normal<T>(N * C), grad_lower = normal<T>(N * C);
  for (auto& v : x) v = std::min(T(1.5), std::max(T(-1.5), v));
  for (int64_t j = 0; j < H; ++j) w_in[size_t(j)] = T(20);  // too steep for the grid of so few rows
  std::vector<T> inner(size_t(N * C)), lower(size_t(N * C)), sums(size_t(C), T(-1)), grad_x(size_t(N * D)),
      grad_V(size_t(D * C)), g_w_in(size_t(C * H)), g_b_in(size_t(C * H)), g_w_out(size_t(C * H)),
      g_b_out(static_cast<size_t>(C));
  const spd::Gate<T> gate{at(w_in), at(b_in), at(w_out), at(b_out), H, spd::Sigmoid::paper, spd::Penalty::none, T(1), T(0)};
  spd::kernels<T>().gate_interpolated_forward(
      host<T>(path), {N, D, C, {at(x), D, 1}, {at(V), C, 1}, gate, at(inner), at(lower), at(sums)});
  spd::kernels<T>().gate_interpolated_backward(
      host<T>(path), {N, D, C, at(grad_inner), at(grad_lower), nullptr, {at(x), D, 1}, {at(V), C, 1}, at(inner), gate,
                      at(grad_x), at(grad_V), at(g_w_in), at(g_b_in), at(g_w_out), at(g_b_out)});
  std::vector<Real> t_lower(size_t(N * C)), t_x(size_t(N * D), 0), t_V(size_t(D * C), 0), t_w_in(size_t(C * H), 0),
      t_b_in(size_t(C * H), 0), t_w_out(size_t(C * H), 0), t_b_out(size_t(C), 0);
  for (int64_t c = 0; c < C; ++c) {
    const T *w = &w_in[size_t(c * H)], *b = &b_in[size_t(c * H)], *o = &w_out[size_t(c * H)];
    Real fourth = 0, low = 0, high = 0;
    for (int64_t j = 0; j < H; ++j) fourth += std::fabs(Real(o[j])) * std::pow(Real(w[j]), 4) * 1.5957691216057307L;
    Real spacing = 1;
    for (int quarters = 1; std::pow(spacing, 4) / 384 * fourth > 5e-6L; ++quarters) spacing = std::pow(2.0L, -quarters / 4.0L);
    for (int64_t r = 0; r < N; ++r) {
      low = std::min(low, Real(inner[size_t(c * N + r)]));
      high = std::max(high, Real(inner[size_t(c * N + r)]));
    }
    const bool exact = 4 * (std::floor(high / spacing) - std::floor(low / spacing) + 2) > N;
    for (int64_t r = 0; r < N; ++r) {
      const Real h = inner[size_t(c * N + r)];
      const Real k = std::floor(h / spacing), t = exact ? 0 : h / spacing - k;
      const Real node[2] = {exact ? h : k * spacing, (k + 1) * spacing};
      // Weights of s and s' at the two nodes, and their derivatives by h.
      const Real by_s[2] = {(1 + 2 * t) * (1 - t) * (1 - t), t * t * (3 - 2 * t)};
      const Real by_d[2] = {spacing * t * (1 - t) * (1 - t), spacing * t * t * (t - 1)};
      const Real ds[2] = {6 * t * (t - 1) / spacing, 6 * t * (1 - t) / spacing};
      const Real dd[2] = {(1 - t) * (1 - 3 * t), t * (3 * t - 2)};
      Real s = b_out[size_t(c)], slope = 0;
      std::vector<double> value(size_t(2 * H)), first(size_t(2 * H)), second(size_t(2 * H));
      for (int64_t j = 0; j < H; ++j)
        for (int e = 0; e < 2; ++e) {
          spd::gelu_with_curvature(double(w[j] * node[e] + b[j]), value[2 * j + e], first[2 * j + e], second[2 * j + e]);
          s += o[j] * (by_s[e] * value[2 * j + e] + by_d[e] * w[j] * first[2 * j + e]);
          slope += o[j] * (ds[e] * value[2 * j + e] + dd[e] * w[j] * first[2 * j + e]);
        }
      if (exact) {
        slope = 0;
        for (int64_t j = 0; j < H; ++j) slope += o[j] * w[j] * first[2 * j];
      }
      t_lower[c * N + r] = spd::lower_sigmoid<double>(double(s), gate.sigmoid);
      const Real s_bar = spd::lower_sigmoid_backward<double>(double(s), double(grad_lower[c * N + r]), gate.sigmoid);
      const Real h_bar = grad_inner[c * N + r] + s_bar * slope;
      t_b_out[c] += s_bar;
      for (int64_t j = 0; j < H; ++j)
        for (int e = 0; e < (exact ? 1 : 2); ++e) {
          const Real z_bar = s_bar * o[j] * (by_s[e] * first[2 * j + e] + by_d[e] * w[j] * second[2 * j + e]);
          t_w_out[c * H + j] += s_bar * (by_s[e] * value[2 * j + e] + by_d[e] * w[j] * first[2 * j + e]);
          t_b_in[c * H + j] += z_bar;
          t_w_in[c * H + j] += z_bar * node[e] + s_bar * o[j] * by_d[e] * first[2 * j + e];
        }
      for (int64_t i = 0; i < D; ++i) {
        t_V[i * C + c] += x[r * D + i] * h_bar;
        t_x[r * D + i] += V[i * C + c] * h_bar;
      }
    }
  }
  compare(name + " lower", lower, t_lower);
  compare(name + " grad_x", grad_x, t_x);
  compare(name + " grad_V", grad_V, t_V);
  compare(name + " grad_w_in", g_w_in, t_w_in);
  compare(name + " grad_b_in", g_b_in, t_b_in);
  compare(name + " grad_w_out", g_w_out, t_w_out);
  compare(name + " grad_b_out", g_b_out, t_b_out);
}

struct Recipe {
  bool inner, lower, source, key, binomial, delta, random_delta, routed, bias;
  std::string text() const {
    std::string s;
    for (bool b : {inner, lower, source, key, binomial, delta, random_delta, routed, bias}) s += b ? '1' : '0';
    return s;
  }
};

template <class T>
void test_linear(const std::string& name, int path, Shape n, Recipe k, std::vector<T>* everything = nullptr) {
  const int64_t N = n.rows, D = n.d_in, C = n.components, O = n.d_out;
  auto x = normal<T>(N * D), V = normal<T>(D * C), U = normal<T>(C * O), W = normal<T>(O * D), bias = normal<T>(O);
  auto inner = normal<T>(N * C), lower = unit<T>(N * C), source = unit<T>(N * C), delta = unit<T>(N);
  auto grad_y = normal<T>(N * O);
  std::vector<uint8_t> routed;
  for (int64_t i = 0; i < N; ++i) routed.push_back(generator() % 2);
  spd::ComponentLinear<T> a{};
  a.rows = N, a.d_in = D, a.components = C, a.d_out = O;
  a.x = {at(x), D, 1};
  a.inner = k.inner ? at(inner) : nullptr;
  // V as the transpose of a [C, d_in] matrix, as tied sites hold it.
  std::vector<T> Vt(size_t(C * D));
  for (int64_t i = 0; i < D; ++i)
    for (int64_t c = 0; c < C; ++c) Vt[c * D + i] = V[i * C + c];
  a.V = {at(Vt), 1, D};
  a.U = {at(U), O, 1};
  a.lower = k.lower ? at(lower) : nullptr;
  a.source = k.source ? at(source) : nullptr;
  const uint32_t offset = 0xfffffff0u;
  a.key = {k.key, k.binomial, 5, 6, 7, 8, offset};
  a.delta = k.delta ? at(delta) : nullptr;
  a.random_delta = k.random_delta;
  if (k.delta || k.random_delta || k.routed) a.weight = {at(W), D, 1};
  a.bias = k.bias ? at(bias) : nullptr;
  a.routed = k.routed ? at(routed) : nullptr;
  std::vector<T> y(size_t(N * O)), g_x(size_t(N * D)), g_inner(size_t(N * C)), g_V(size_t(D * C)), g_U(size_t(C * O)),
      g_lower(size_t(N * C)), g_source(size_t(N * C)), g_delta(static_cast<size_t>(N)), g_bias(static_cast<size_t>(O));
  spd::kernels<T>().component_linear_forward(host<T>(path), a, at(y));
  spd::ComponentLinearGrads<T> g{};
  g.grad_y = {at(grad_y), O, 1};
  g.x = at(g_x);
  if (k.inner) g.inner = at(g_inner);
  if (!k.inner) g.V = at(g_V);
  g.U = at(g_U);
  if (k.lower) g.lower = at(g_lower);
  if (k.source && !k.key) g.source = at(g_source);
  if (k.delta) g.delta = at(g_delta);
  g.bias = at(g_bias);
  spd::kernels<T>().component_linear_backward(host<T>(path), a, g);
  if (everything) {
    for (auto* part : {&y, &g_x, &g_inner, &g_V, &g_U, &g_lower, &g_source, &g_delta, &g_bias})
      everything->insert(everything->end(), part->begin(), part->end());
    return;
  }

  // The unfolded form: masked components plus the weight delta.
  std::vector<Real> t_y(size_t(N * O)), t_x(size_t(N * D), 0), t_inner(size_t(N * C), 0), t_V(size_t(D * C), 0),
      t_U(size_t(C * O), 0), t_lower(size_t(N * C), 0), t_source(size_t(N * C), 0), t_delta(size_t(N), 0),
      t_bias(size_t(O), 0);
  for (int64_t r = 0; r < N; ++r) {
    const bool here = !k.routed || routed[r];
    const auto uniform = [&](int64_t column) {
      const spd::Words4 w = spd::philox4x32(uint32_t(column / 4), offset + uint32_t(r), 7, 8, 5, 6);
      return Real(spd::uniform_from_word(w.lane[column % 4]));
    };
    const Real d = k.delta ? Real(delta[r]) : (k.random_delta ? uniform(C) : Real(0));
    const Real factor = here ? d : Real(1);
    for (int64_t o = 0; o < O; ++o) {
      Real sum = k.bias ? Real(bias[o]) : Real(0), xw = 0;
      for (int64_t i = 0; i < D; ++i) xw += Real(x[r * D + i]) * W[o * D + i];
      if (a.mixes_weight()) sum += factor * xw;
      t_y[r * O + o] = sum;
      t_bias[o] += grad_y[r * O + o];
      if (here) t_delta[r] += grad_y[r * O + o] * xw;
      if (a.mixes_weight())
        for (int64_t i = 0; i < D; ++i) t_x[r * D + i] += factor * grad_y[r * O + o] * W[o * D + i];
    }
    if (!here) continue;
    for (int64_t c = 0; c < C; ++c) {
      Real h = 0, bar = 0;
      if (k.inner) h = inner[c * N + r];
      else
        for (int64_t i = 0; i < D; ++i) h += Real(x[r * D + i]) * V[i * C + c];
      const bool drawn = k.key || k.source;
      const Real q = k.key ? (k.binomial ? Real(uniform(c) >= 0.5L) : uniform(c)) : Real(source[c * N + r]);
      const Real low = k.lower ? Real(lower[c * N + r]) : Real(0);
      const Real m = drawn ? low + (1 - low) * q : (k.lower ? low : Real(1));
      for (int64_t o = 0; o < O; ++o) {
        t_y[r * O + o] += h * (m - d) * U[c * O + o];
        bar += Real(grad_y[r * O + o]) * U[c * O + o];
        t_U[c * O + o] += h * (m - d) * grad_y[r * O + o];
      }
      const Real h_bar = bar * (m - d);
      t_inner[c * N + r] = h_bar;
      t_lower[c * N + r] = bar * h * (drawn ? 1 - q : 1);
      t_source[c * N + r] = bar * h * (1 - low);
      t_delta[r] -= bar * h;
      if (!k.inner)
        for (int64_t i = 0; i < D; ++i) {
          t_V[i * C + c] += x[r * D + i] * h_bar;
          t_x[r * D + i] += V[i * C + c] * h_bar;
        }
    }
  }
  compare(name + " y", y, t_y);
  compare(name + " grad_x", g_x, t_x);
  if (g.inner) compare(name + " grad_inner", g_inner, t_inner);
  if (g.V) compare(name + " grad_V", g_V, t_V);
  compare(name + " grad_U", g_U, t_U);
  if (g.lower) compare(name + " grad_lower", g_lower, t_lower);
  if (g.source) compare(name + " grad_source", g_source, t_source);
  if (g.delta) compare(name + " grad_delta", g_delta, t_delta);
  compare(name + " grad_bias", g_bias, t_bias);
}

// The layer against the gate and the masked sum, which are tested above.
template <class T>
void test_layer(const std::string& name, Shape n, Recipe k) {
  const int64_t N = n.rows, D = n.d_in, C = n.components, O = n.d_out, H = n.hidden, outs = std::max<int64_t>(H, 1);
  auto x = normal<T>(N * D), V = normal<T>(D * C, 1 / std::sqrt(double(D))), U = normal<T>(C * O), W = normal<T>(O * D);
  auto bias = normal<T>(O), delta = unit<T>(N), grad_y = normal<T>(N * O), grad_penalty = normal<T>(C);
  auto w_in = normal<T>(C * H), b_in = normal<T>(C * H, 0.5), w_out = normal<T>(C * outs), b_out = normal<T>(C, 0.5);
  std::vector<uint8_t> routed;
  for (int64_t i = 0; i < N; ++i) routed.push_back(generator() % 2);
  const spd::Gate<T> gate{at(w_in), at(b_in), at(w_out), at(b_out), H, spd::Sigmoid::paper, spd::Penalty::lp, T(2), T(0)};
  spd::ComponentLinear<T> a{};
  a.rows = N, a.d_in = D, a.components = C, a.d_out = O;
  a.x = {at(x), D, 1};
  a.V = {at(V), C, 1};
  a.U = {at(U), O, 1};
  a.key = {k.key, k.binomial, 5, 6, 7, 8, 9};
  a.delta = k.delta ? at(delta) : nullptr;
  a.random_delta = k.random_delta;
  if (k.delta || k.random_delta || k.routed) a.weight = {at(W), D, 1};
  a.bias = k.bias ? at(bias) : nullptr;
  a.routed = k.routed ? at(routed) : nullptr;

  std::vector<T> y(size_t(N * O)), sums(static_cast<size_t>(C)), inner(size_t(N * C)), lower(size_t(N * C)),
      g_inner(size_t(N * C)), g_lower(size_t(N * C)), x_direct(size_t(N * D)), g_x(size_t(N * D)), g_V(size_t(D * C)),
      g_U(size_t(C * O)), g_bias(static_cast<size_t>(O)), g_w_in(size_t(C * H)), g_b_in(size_t(C * H)),
      g_w_out(size_t(C * outs)), g_b_out(static_cast<size_t>(C));
  const auto& table = spd::kernels<T>();
  table.gate_forward(host<T>(2), {N, D, C, a.x, a.V, gate, at(inner), at(lower), at(sums)});
  spd::ComponentLinear<T> given = a;
  given.inner = at(inner);
  given.lower = at(lower);
  table.component_linear_forward(host<T>(2), given, at(y));
  spd::ComponentLinearGrads<T> g{};
  g.grad_y = {at(grad_y), O, 1};
  g.x = at(x_direct), g.inner = at(g_inner), g.lower = at(g_lower), g.U = at(g_U), g.bias = at(g_bias);
  table.component_linear_backward(host<T>(2), given, g);
  table.gate_backward(host<T>(2), {N, D, C, at(g_inner), at(g_lower), at(grad_penalty), a.x, a.V, at(inner), gate, at(g_x),
                                   at(g_V), at(g_w_in), at(g_b_in), at(g_w_out), at(g_b_out)});
  for (size_t i = 0; i < g_x.size(); ++i) g_x[i] += x_direct[i];
  const std::vector<std::vector<T>> expected{y, sums, g_x, g_V, g_U, g_bias, g_w_in, g_b_in, g_w_out, g_b_out};

  std::vector<std::vector<T>> got;
  for (const auto& part : expected) got.emplace_back(part.size(), T(-7));
  table.layer_forward(host<T>(0), {a, gate}, at(got[0]), at(got[1]));
  table.layer_backward(host<T>(0), {a, gate},
                       {g.grad_y, at(grad_penalty), at(got[2]), at(got[3]), at(got[4]), at(got[5]), at(got[6]), at(got[7]),
                        at(got[8]), at(got[9])});
  for (size_t i = 0; i < expected.size(); ++i)
    compare(name + " part " + std::to_string(i), got[i], std::vector<Real>(expected[i].begin(), expected[i].end()));
}

template <class T>
void test_faithfulness(const std::string& name, Shape n) {
  const int64_t D = n.d_in, C = n.components, O = n.d_out;
  auto V = normal<T>(D * C), U = normal<T>(C * O), W = normal<T>(O * D);
  const spd::Faithfulness<T> a{D, C, O, {at(V), C, 1}, {at(U), O, 1}, {at(W), D, 1}};
  std::vector<T> g_V(size_t(D * C)), g_U(size_t(C * O));
  const double loss = spd::kernels<T>().faithfulness_forward(host<T>(0), a);
  spd::kernels<T>().faithfulness_backward(host<T>(0), a, T(0.5), at(g_V), at(g_U));
  Real total = 0;
  std::vector<Real> t_V(size_t(D * C), 0), t_U(size_t(C * O), 0);
  for (int64_t o = 0; o < O; ++o)
    for (int64_t i = 0; i < D; ++i) {
      Real d = W[o * D + i];
      for (int64_t c = 0; c < C; ++c) d -= Real(V[i * C + c]) * U[c * O + o];
      total += d * d;
      for (int64_t c = 0; c < C; ++c) {
        t_V[i * C + c] -= d * U[c * O + o];
        t_U[c * O + o] -= d * V[i * C + c];
      }
    }
  compare(name + " loss", std::vector<T>{T(loss)}, {total});
  compare(name + " grad_V", g_V, t_V);
  compare(name + " grad_U", g_U, t_U);
}

template <class T>
void test_uniform(const std::string& name) {
  const spd::Key key{true, false, 1, 2, 3, 4, 0xfffffff0u};
  const int64_t rows = 261, columns = 7;
  std::vector<T> u(size_t(rows * columns));
  spd::kernels<T>().uniform(host<T>(0), key, rows, columns, u.data());
  bool same = true;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const spd::Words4 w = spd::philox4x32(uint32_t(c / 4), 0xfffffff0u + uint32_t(r), 3, 4, 1, 2);
      same = same && u[size_t(r * columns + c)] == T(spd::uniform_from_word(w.lane[c % 4]));
    }
  check(same, name + " uniform");
}

void test_sparse_features(const std::string& name) {
  for (int64_t count : {0, 1, 311, 312, 313, 625, 2000}) {
    std::mt19937 words(17);
    const auto next = [&] { return float(words() & 0xffffffu) / 16777216.0f; };
    std::vector<float> truth(static_cast<size_t>(count)), got(static_cast<size_t>(count));
    for (float& t : truth) t = next() < 0.3f ? 1.0f : 0.0f;
    for (float& t : truth) {
      const float scaled = next() * 2.0f;
      t = (scaled - 1.0f) * t;
    }
    spd::kernels<float>().sparse_features(17, count, 0.3f, -1.0f, 2.0f, got.data());
    check(count == 0 || std::memcmp(got.data(), truth.data(), got.size() * sizeof(float)) == 0,
          name + " sparse features " + std::to_string(count));
  }
}

template <class T>
void test_kernels(const std::string& isa) {
  const std::string type = isa + (sizeof(T) == 4 ? " float" : " double");
  const Shape shapes[] = {{0, 3, 5, 2, 3},   {1, 1, 1, 1, 1},   {7, 5, 3, 2, 0},     {257, 3, 18, 5, 4},
                          {300, 5, 20, 2, 16}, {519, 11, 37, 7, 2}, {130, 40, 33, 10, 130}};
  const Recipe recipes[] = {
      // inner, lower, source, key, binomial, delta, random delta, routed, bias
      {true, true, false, true, false, false, false, false, false}, {false, true, false, true, false, false, true, true, true},
      {true, true, true, false, false, true, false, true, false},   {false, true, true, false, false, true, false, false, true},
      {false, false, false, false, false, false, false, true, true}, {true, false, true, false, false, true, false, true, false},
      {true, false, false, true, true, false, true, false, false},   {true, true, false, false, false, true, false, true, true},
      {false, true, false, true, true, false, false, true, false},   {false, false, true, false, false, false, false, false, false}};
  for (int path : {1, 2}) {
    const std::string where = type + (path == 1 ? " small" : " large");
    for (size_t i = 0; i < std::size(shapes); ++i) {
      const Shape& n = shapes[i];
      const std::string at_shape = where + " shape " + std::to_string(i);
      test_gate<T>(at_shape + " paper lp 2", path, n, spd::Sigmoid::paper, spd::Penalty::lp, 2);
      test_gate<T>(at_shape + " 2026 lp 0.9", path, n, spd::Sigmoid::preset2026, spd::Penalty::lp, 0.9);
      test_gate<T>(at_shape + " paper smooth_l0", path, n, spd::Sigmoid::paper, spd::Penalty::smooth_l0, 0.5);
      test_gate<T>(at_shape + " 2026 none", path, n, spd::Sigmoid::preset2026, spd::Penalty::none, 1);
      test_gate<T>(at_shape + " sparse", path, n, spd::Sigmoid::paper, spd::Penalty::lp, 2, true);
      if (n.hidden > 0) test_interpolated_gate<T>(at_shape + " interpolated", path, n);
      for (const Recipe& k : recipes) test_linear<T>(at_shape + " recipe " + k.text(), path, n, k);
      test_faithfulness<T>(at_shape + " faithfulness", n);
      for (const Recipe& k : recipes)
        if (path == 1) test_layer<T>(at_shape + " layer " + k.text(), n, k);
    }
    std::vector<T> results[2];
    for (int t : {1, 2}) {
      threads = t;
      generator.seed(3);
      test_linear<T>(where, path, {2100, 5, 20, 3, 0}, recipes[1], &results[t - 1]);
      threads = 1;
    }
    check(std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(T)) == 0,
          where + " one and two threads");
  }
  test_uniform<T>(type);
  if (sizeof(T) == 4) test_sparse_features(isa);
}

}  // namespace

int main() {
  test_philox();
  test_gelu();
  test_sigmoids();
  test_penalties();
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    setenv("SPD_FAST_CPU_ISA", isa, 1);
    try {
      spd::instruction_set();
    } catch (const std::runtime_error&) {
      std::printf("%s: not on this machine, skipped\n", isa);
      continue;
    }
    test_kernels<float>(isa);
    test_kernels<double>(isa);
  }
  setenv("SPD_FAST_CPU_ISA", "nonsense", 1);
  bool refused = false;
  try {
    spd::instruction_set();
  } catch (const std::runtime_error&) {
    refused = true;
  }
  check(refused, "an unknown instruction set is refused");
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
