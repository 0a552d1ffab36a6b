// The Python face of the CPU kernels: validation, allocation, torch's thread pool and matrix products.
// The only file that knows torch and Python.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "common/philox.h"
#include "cpu/kernels.h"

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// ---- what the kernels need from torch

void parallel_loop(int64_t tasks, void* state, void (*body)(void*, int64_t)) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(state, task);
  });
}

template <class T>
Tensor view(const T* data, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, {row, column},
                       at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

template <class T>
void product(int64_t m, int64_t n, int64_t k, spd::Matrix<T> a, spd::Matrix<T> b, T* c, int64_t c_row, int64_t c_col,
             bool accumulate) {
  Tensor out = view(c, m, n, c_row, c_col);
  const Tensor left = view(a.data, m, k, a.row, a.col);
  const Tensor right = view(b.data, k, n, b.row, b.col);
  if (accumulate)
    out.addmm_(left, right);
  else
    at::mm_out(out, left, right);
}

template <class T>
spd::Host<T> host() {
  const char* path = std::getenv("SPD_FAST_CPU_PATH");
  int forced = 0;
  if (path && *path) {
    const std::string name = path;
    TORCH_CHECK_VALUE(name == "small" || name == "large", "SPD_FAST_CPU_PATH must be 'small' or 'large', not '", name,
                      "'");
    forced = name == "small" ? 1 : 2;
  }
  return {{parallel_loop}, product<T>, forced};
}

// One call of a kernel: its own products and allocations need no autograd bookkeeping, and torch's profiler sees it.
struct Plain {
  explicit Plain(const char* name) : record(at::RecordScope::FUNCTION) {
    if (record.isActive()) record.before(name);
  }
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  at::RecordFunction record;
};

// ---- validation

void check_kind(const Tensor& t, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " is on ", t.device(), "; the cpu backend needs cpu tensors");
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, name, " has dtype ", t.scalar_type(), " but x has ", dtype);
}

void check_shape(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " has shape ", t.sizes(), "; expected ", shape);
}

void check_matrix(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must have two dimensions, not shape ", t.sizes());
}

at::ScalarType compute_dtype(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " is on ", t.device(), "; the cpu backend needs cpu tensors");
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name, " has dtype ",
                    t.scalar_type(), "; the cpu backend computes in float32 and float64");
  return t.scalar_type();
}

// ---- layouts

Tensor unit_columns(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

template <class T>
spd::Matrix<T> row_matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), 1};
}

template <class T>
spd::Matrix<T> matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

// at::mm copies a matrix that has no unit stride; do it once here.
Tensor plain_matrix(const Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
}

bool is_component_major(const Tensor& t) {
  return t.numel() == 0 || ((t.size(0) == 1 || t.stride(0) == 1) && (t.size(1) == 1 || t.stride(1) == t.size(0)));
}

Tensor component_major(const Tensor& t) { return is_component_major(t) ? t : t.t().contiguous().t(); }

Tensor empty_component_major(int64_t rows, int64_t components, const at::TensorOptions& options) {
  return at::empty({components, rows}, options).t();
}

// An optional [N, C] input.
Tensor component_input(const OptTensor& t, const char* name, at::ScalarType dtype, int64_t rows, int64_t components) {
  if (!t) return {};
  check_kind(*t, name, dtype);
  check_shape(*t, name, {rows, components});
  return component_major(*t);
}

// Null means absent to the kernels, so an empty tensor, whose data is null, gets an address nobody reads.
template <class T>
const T* pointer(const Tensor& t) {
  static const T nothing{};
  if (!t.defined()) return nullptr;
  return t.numel() > 0 ? t.const_data_ptr<T>() : &nothing;
}
template <class T>
T* output(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

// Runs body(T{}) in the dtype of the call.
template <class F>
void in_dtype(at::ScalarType dtype, F&& body) {
  if (dtype == at::kFloat)
    body(float{});
  else
    body(double{});
}

// ---- gate

struct GateInputs {
  Tensor w_in, b_in, w_out, b_out;
  int64_t hidden;
  spd::Sigmoid sigmoid;
  spd::Penalty penalty;
  double power, eps;

  template <class T>
  spd::Gate<T> as() const {
    return {pointer<T>(w_in), pointer<T>(b_in), pointer<T>(w_out), pointer<T>(b_out), hidden,
            sigmoid,          penalty,          T(power),          T(eps)};
  }
};

GateInputs gate_inputs(at::ScalarType dtype, int64_t components, const Tensor& w_in, const Tensor& b_in,
                       const Tensor& w_out, const Tensor& b_out, const std::string& sigmoid,
                       const std::string& penalty, double power, double eps) {
  check_kind(w_in, "w_in", dtype);
  check_kind(b_in, "b_in", dtype);
  check_kind(w_out, "w_out", dtype);
  check_kind(b_out, "b_out", dtype);
  check_matrix(w_in, "w_in");
  const int64_t hidden = w_in.size(1);
  check_shape(w_in, "w_in", {components, hidden});
  check_shape(b_in, "b_in", {components, hidden});
  check_shape(w_out, "w_out", {components, hidden > 0 ? hidden : 1});
  check_shape(b_out, "b_out", {components});
  TORCH_CHECK_VALUE(sigmoid == "paper" || sigmoid == "2026", "sigmoid must be 'paper' or '2026', not '", sigmoid, "'");
  TORCH_CHECK_VALUE(penalty == "lp" || penalty == "smooth_l0" || penalty == "none",
                    "penalty must be 'lp', 'smooth_l0' or 'none', not '", penalty, "'");
  return {w_in.contiguous(),
          b_in.contiguous(),
          w_out.contiguous(),
          b_out.contiguous(),
          hidden,
          sigmoid == "paper" ? spd::Sigmoid::paper : spd::Sigmoid::preset2026,
          penalty == "lp" ? spd::Penalty::lp : (penalty == "none" ? spd::Penalty::none : spd::Penalty::smooth_l0),
          power,
          eps};
}

void check_site(const Tensor& x, const Tensor& V) {
  check_matrix(x, "x");
  check_kind(V, "V", x.scalar_type());
  check_matrix(V, "V");
  TORCH_CHECK_VALUE(V.size(0) == x.size(1), "V has d_in ", V.size(0), " but x has ", x.size(1), " columns");
  TORCH_CHECK_VALUE(V.size(0) > 0 && V.size(1) > 0, "V has shape ", V.sizes(), "; both sizes must be at least 1");
}

template <bool interpolated>
std::tuple<Tensor, Tensor, Tensor> gate_forward(const Tensor& x_in, const Tensor& V_in, const Tensor& w_in,
                                                const Tensor& b_in, const Tensor& w_out, const Tensor& b_out,
                                                const std::string& sigmoid, const std::string& penalty, double power,
                                                double eps) {
  Plain plain(interpolated ? "spd_fast::gate_interpolated_forward" : "spd_fast::gate_forward");
  const auto dtype = compute_dtype(x_in, "x");
  check_site(x_in, V_in);
  const Tensor x = unit_columns(x_in), V = plain_matrix(V_in);
  const int64_t rows = x.size(0), components = V.size(1);
  const GateInputs gate = gate_inputs(dtype, components, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps);
  const Tensor inner = empty_component_major(rows, components, x.options());
  const Tensor lower = empty_component_major(rows, components, x.options());
  const Tensor sums = at::empty({components}, x.options());
  in_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto& table = spd::kernels<T>();
    const auto kernel = interpolated ? table.gate_interpolated_forward : table.gate_forward;
    kernel(host<T>(), {rows, x.size(1), components, row_matrix<T>(x), matrix<T>(V), gate.as<T>(), output<T>(inner),
                       output<T>(lower), output<T>(sums)});
  });
  return {inner, lower, sums};
}

template <bool interpolated>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_backward(
    const OptTensor& grad_inner_in, const OptTensor& grad_lower_in, const OptTensor& grad_penalty_in,
    const Tensor& x_in, const Tensor& V_in, const Tensor& inner_in, const Tensor& w_in, const Tensor& b_in,
    const Tensor& w_out, const Tensor& b_out, const std::string& sigmoid, const std::string& penalty, double power,
    double eps, bool need_grad_x) {
  Plain plain(interpolated ? "spd_fast::gate_interpolated_backward" : "spd_fast::gate_backward");
  const auto dtype = compute_dtype(x_in, "x");
  check_site(x_in, V_in);
  const Tensor x = unit_columns(x_in), V = plain_matrix(V_in);
  const int64_t rows = x.size(0), d_in = x.size(1), components = V.size(1);
  const GateInputs gate = gate_inputs(dtype, components, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps);
  const Tensor inner = component_input(inner_in, "inner", dtype, rows, components);
  const Tensor grad_inner = component_input(grad_inner_in, "grad_inner", dtype, rows, components);
  const Tensor grad_lower = component_input(grad_lower_in, "grad_lower", dtype, rows, components);
  Tensor grad_penalty;
  if (grad_penalty_in) {
    check_kind(*grad_penalty_in, "grad_penalty", dtype);
    check_shape(*grad_penalty_in, "grad_penalty", {components});
    grad_penalty = grad_penalty_in->contiguous();
  }
  const auto options = x.options();
  const Tensor grad_x = need_grad_x ? at::empty({rows, d_in}, options) : Tensor();
  const Tensor grad_V = at::empty({d_in, components}, options);
  const Tensor grad_w_in = at::empty({components, gate.hidden}, options);
  const Tensor grad_b_in = at::empty({components, gate.hidden}, options);
  const Tensor grad_w_out = at::empty({components, gate.hidden > 0 ? gate.hidden : 1}, options);
  const Tensor grad_b_out = at::empty({components}, options);
  in_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto& table = spd::kernels<T>();
    const auto kernel = interpolated ? table.gate_interpolated_backward : table.gate_backward;
    kernel(host<T>(), {rows, d_in, components, pointer<T>(grad_inner), pointer<T>(grad_lower),
                       pointer<T>(grad_penalty), row_matrix<T>(x), matrix<T>(V), pointer<T>(inner), gate.as<T>(),
                       output<T>(grad_x), output<T>(grad_V), output<T>(grad_w_in), output<T>(grad_b_in),
                       output<T>(grad_w_out), output<T>(grad_b_out)});
  });
  return {grad_x, grad_V, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

// ---- component linear

spd::Key make_key(const OptTensor& key, int64_t draw, int64_t site, int64_t row_offset, bool binomial) {
  if (!key) return {};
  TORCH_CHECK_VALUE(key->device().is_cpu() && key->scalar_type() == at::kLong && key->dim() == 1 && key->size(0) == 2,
                    "key must be an int64 cpu tensor of two elements (seed, step), not ", key->scalar_type(), " ",
                    key->sizes(), " on ", key->device());
  const Tensor words = key->contiguous();
  const int64_t* word = words.const_data_ptr<int64_t>();
  return {true,           binomial,       uint32_t(word[0]),   uint32_t(word[1]),
          uint32_t(draw), uint32_t(site), uint32_t(row_offset)};
}

// The tensors of one call, kept alive, in the layouts the kernels take.
struct LinearInputs {
  Tensor x, inner, V, U, lower, source, delta, weight, bias, routed;
  spd::Key key;
  bool random_delta;
  int64_t rows, d_in, components, d_out;

  template <class T>
  spd::ComponentLinear<T> as() const {
    spd::ComponentLinear<T> a;
    a.rows = rows;
    a.d_in = d_in;
    a.components = components;
    a.d_out = d_out;
    a.x = row_matrix<T>(x);
    a.inner = pointer<T>(inner);
    a.V = V.defined() ? matrix<T>(V) : spd::Matrix<T>{nullptr, 0, 0};
    a.U = matrix<T>(U);
    a.lower = pointer<T>(lower);
    a.source = pointer<T>(source);
    a.key = key;
    a.delta = pointer<T>(delta);
    a.random_delta = random_delta;
    a.weight = weight.defined() ? matrix<T>(weight) : spd::Matrix<T>{nullptr, 0, 0};
    a.bias = pointer<T>(bias);
    a.routed = reinterpret_cast<const uint8_t*>(pointer<bool>(routed));
    return a;
  }
};

LinearInputs linear_inputs(const Tensor& x, const OptTensor& inner, const OptTensor& V, const Tensor& U,
                           const OptTensor& lower, const OptTensor& source, const OptTensor& key, int64_t draw,
                           int64_t site, int64_t row_offset, bool binomial, const OptTensor& delta, bool random_delta,
                           const OptTensor& weight, const OptTensor& bias, const OptTensor& routing) {
  LinearInputs a;
  const auto dtype = compute_dtype(x, "x");
  check_matrix(x, "x");
  check_kind(U, "U", dtype);
  check_matrix(U, "U");
  a.rows = x.size(0);
  a.d_in = x.size(1);
  a.components = U.size(0);
  a.d_out = U.size(1);
  TORCH_CHECK_VALUE(a.d_in > 0 && a.components > 0 && a.d_out > 0, "x has shape ", x.sizes(), " and U ", U.sizes(),
                    "; d_in, C and d_out must be at least 1");
  TORCH_CHECK_VALUE(inner || V, "one of inner and V is needed");
  a.x = unit_columns(x);
  a.U = plain_matrix(U);
  a.inner = component_input(inner, "inner", dtype, a.rows, a.components);
  if (V && !inner) {
    check_kind(*V, "V", dtype);
    check_shape(*V, "V", {a.d_in, a.components});
    a.V = plain_matrix(*V);
  }
  a.lower = component_input(lower, "lower", dtype, a.rows, a.components);
  a.key = make_key(key, draw, site, row_offset, binomial);
  if (!key) a.source = component_input(source, "source", dtype, a.rows, a.components);
  a.random_delta = random_delta && !delta;
  TORCH_CHECK_VALUE(!a.random_delta || key, "random_delta needs a key");
  if (delta) {
    check_kind(*delta, "delta", dtype);
    check_shape(*delta, "delta", {a.rows});
    a.delta = delta->contiguous();
  }
  if (routing) {
    TORCH_CHECK_VALUE(routing->device().is_cpu() && routing->scalar_type() == at::kBool,
                      "routing must be a bool cpu tensor, not ", routing->scalar_type(), " on ", routing->device());
    check_shape(*routing, "routing", {a.rows});
    a.routed = routing->contiguous();
  }
  if (a.random_delta || delta || routing) {
    TORCH_CHECK_VALUE(weight.has_value(), "weight is needed where delta or routing is on");
    check_kind(*weight, "weight", dtype);
    check_shape(*weight, "weight", {a.d_out, a.d_in});
    a.weight = plain_matrix(*weight);
  }
  if (bias) {
    check_kind(*bias, "bias", dtype);
    check_shape(*bias, "bias", {a.d_out});
    a.bias = bias->contiguous();
  }
  return a;
}

Tensor component_linear_forward(const Tensor& x, const OptTensor& inner, const OptTensor& V, const Tensor& U,
                                const OptTensor& lower, const OptTensor& source, const OptTensor& key, int64_t draw,
                                int64_t site, int64_t row_offset, bool binomial, const OptTensor& delta,
                                bool random_delta, const OptTensor& weight, const OptTensor& bias,
                                const OptTensor& routing) {
  Plain plain("spd_fast::component_linear_forward");
  const LinearInputs a = linear_inputs(x, inner, V, U, lower, source, key, draw, site, row_offset, binomial, delta,
                                       random_delta, weight, bias, routing);
  const Tensor y = at::empty({a.rows, a.d_out}, x.options());
  in_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    spd::kernels<T>().component_linear_forward(host<T>(), a.as<T>(), output<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> component_linear_backward(
    const Tensor& grad_y_in, const Tensor& x, const OptTensor& inner, const OptTensor& V, const Tensor& U,
    const OptTensor& lower, const OptTensor& source, const OptTensor& key, int64_t draw, int64_t site,
    int64_t row_offset, bool binomial, const OptTensor& delta, bool random_delta, const OptTensor& weight,
    const OptTensor& bias, const OptTensor& routing, bool need_x, bool need_inner, bool need_V, bool need_U,
    bool need_lower, bool need_source, bool need_delta, bool need_bias) {
  Plain plain("spd_fast::component_linear_backward");
  const LinearInputs a = linear_inputs(x, inner, V, U, lower, source, key, draw, site, row_offset, binomial, delta,
                                       random_delta, weight, bias, routing);
  check_kind(grad_y_in, "grad_y", x.scalar_type());
  check_shape(grad_y_in, "grad_y", {a.rows, a.d_out});
  const Tensor grad_y = unit_columns(grad_y_in);
  const auto options = x.options();
  const auto component_grad = [&](bool needed) {
    return needed ? empty_component_major(a.rows, a.components, options) : Tensor();
  };
  const Tensor grad_x = need_x ? at::empty({a.rows, a.d_in}, options) : Tensor();
  const Tensor grad_inner = component_grad(need_inner && a.inner.defined());
  const Tensor grad_V = need_V && !a.inner.defined() ? at::empty({a.d_in, a.components}, options) : Tensor();
  const Tensor grad_U = need_U ? at::empty({a.components, a.d_out}, options) : Tensor();
  const Tensor grad_lower = component_grad(need_lower && a.lower.defined());
  const Tensor grad_source = component_grad(need_source && a.source.defined());
  const Tensor grad_delta = need_delta && a.delta.defined() ? at::empty({a.rows}, options) : Tensor();
  const Tensor grad_bias = need_bias ? at::empty({a.d_out}, options) : Tensor();
  in_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    spd::ComponentLinearGrads<T> g;
    g.grad_y = row_matrix<T>(grad_y);
    g.x = output<T>(grad_x);
    g.inner = output<T>(grad_inner);
    g.V = output<T>(grad_V);
    g.U = output<T>(grad_U);
    g.lower = output<T>(grad_lower);
    g.source = output<T>(grad_source);
    g.delta = output<T>(grad_delta);
    g.bias = output<T>(grad_bias);
    spd::kernels<T>().component_linear_backward(host<T>(), a.as<T>(), g);
  });
  return {grad_x, grad_inner, grad_V, grad_U, grad_lower, grad_source, grad_delta, grad_bias};
}

// ---- layer

std::tuple<Tensor, Tensor> layer_forward(const Tensor& x, const Tensor& V, const Tensor& U, const Tensor& w_in,
                                         const Tensor& b_in, const Tensor& w_out, const Tensor& b_out,
                                         const std::string& sigmoid, const std::string& penalty, double power,
                                         double eps, const OptTensor& key, int64_t draw, int64_t site,
                                         int64_t row_offset, bool binomial, const OptTensor& delta, bool random_delta,
                                         const OptTensor& weight, const OptTensor& bias, const OptTensor& routing) {
  Plain plain("spd_fast::layer_forward");
  const LinearInputs a = linear_inputs(x, {}, V, U, {}, {}, key, draw, site, row_offset, binomial, delta, random_delta,
                                       weight, bias, routing);
  const GateInputs gate =
      gate_inputs(x.scalar_type(), a.components, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps);
  const Tensor y = at::empty({a.rows, a.d_out}, x.options());
  const Tensor sums = at::empty({a.components}, x.options());
  in_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    spd::kernels<T>().layer_forward(host<T>(), {a.as<T>(), gate.as<T>()}, output<T>(y), output<T>(sums));
  });
  return {y, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const Tensor& grad_y_in, const OptTensor& grad_penalty_in, const Tensor& x, const Tensor& V, const Tensor& U,
    const Tensor& w_in, const Tensor& b_in, const Tensor& w_out, const Tensor& b_out, const std::string& sigmoid,
    const std::string& penalty, double power, double eps, const OptTensor& key, int64_t draw, int64_t site,
    int64_t row_offset, bool binomial, const OptTensor& delta, bool random_delta, const OptTensor& weight,
    const OptTensor& bias, const OptTensor& routing, bool need_x) {
  Plain plain("spd_fast::layer_backward");
  const LinearInputs a = linear_inputs(x, {}, V, U, {}, {}, key, draw, site, row_offset, binomial, delta, random_delta,
                                       weight, bias, routing);
  const auto dtype = x.scalar_type();
  const GateInputs gate = gate_inputs(dtype, a.components, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps);
  check_kind(grad_y_in, "grad_y", dtype);
  check_shape(grad_y_in, "grad_y", {a.rows, a.d_out});
  const Tensor grad_y = unit_columns(grad_y_in);
  Tensor grad_penalty;
  if (grad_penalty_in) {
    check_kind(*grad_penalty_in, "grad_penalty", dtype);
    check_shape(*grad_penalty_in, "grad_penalty", {a.components});
    grad_penalty = grad_penalty_in->contiguous();
  }
  const auto options = x.options();
  const Tensor grad_x = need_x ? at::empty({a.rows, a.d_in}, options) : Tensor();
  const Tensor grad_V = at::empty({a.d_in, a.components}, options);
  const Tensor grad_U = at::empty({a.components, a.d_out}, options);
  const Tensor grad_bias = bias ? at::empty({a.d_out}, options) : Tensor();
  const Tensor grad_w_in = at::empty({a.components, gate.hidden}, options);
  const Tensor grad_b_in = at::empty({a.components, gate.hidden}, options);
  const Tensor grad_w_out = at::empty({a.components, gate.hidden > 0 ? gate.hidden : 1}, options);
  const Tensor grad_b_out = at::empty({a.components}, options);
  in_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    spd::kernels<T>().layer_backward(
        host<T>(), {a.as<T>(), gate.as<T>()},
        {row_matrix<T>(grad_y), pointer<T>(grad_penalty), output<T>(grad_x), output<T>(grad_V), output<T>(grad_U),
         output<T>(grad_bias), output<T>(grad_w_in), output<T>(grad_b_in), output<T>(grad_w_out),
         output<T>(grad_b_out)});
  });
  return {grad_x, grad_V, grad_U, grad_w_in, grad_b_in, grad_w_out, grad_b_out, grad_bias};
}

// ---- faithfulness

template <class T>
spd::Faithfulness<T> faithfulness_args(const Tensor& V, const Tensor& U, const Tensor& W) {
  return {V.size(0), V.size(1), U.size(1), matrix<T>(V), matrix<T>(U), matrix<T>(W)};
}

void check_faithfulness(const Tensor& V, const Tensor& U, const Tensor& W) {
  const auto dtype = compute_dtype(V, "V");
  check_kind(U, "U", dtype);
  check_kind(W, "W", dtype);
  check_matrix(V, "V");
  check_matrix(U, "U");
  TORCH_CHECK_VALUE(V.numel() > 0, "V has shape ", V.sizes(), "; both sizes must be at least 1");
  TORCH_CHECK_VALUE(U.size(0) == V.size(1), "U has C ", U.size(0), " but V has ", V.size(1));
  check_shape(W, "W", {U.size(1), V.size(0)});
}

Tensor faithfulness_forward(const Tensor& V_in, const Tensor& U_in, const Tensor& W) {
  Plain plain("spd_fast::faithfulness_forward");
  check_faithfulness(V_in, U_in, W);
  const Tensor V = plain_matrix(V_in), U = plain_matrix(U_in);
  double total = 0;
  in_dtype(V.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    total = spd::kernels<T>().faithfulness_forward(host<T>(), faithfulness_args<T>(V, U, W));
  });
  return at::scalar_tensor(total, V.options());
}

std::tuple<Tensor, Tensor> faithfulness_backward(const Tensor& grad, const Tensor& V_in, const Tensor& U_in,
                                                 const Tensor& W) {
  Plain plain("spd_fast::faithfulness_backward");
  check_faithfulness(V_in, U_in, W);
  check_kind(grad, "grad", V_in.scalar_type());
  TORCH_CHECK_VALUE(grad.numel() == 1, "grad has shape ", grad.sizes(), "; expected a scalar");
  const Tensor V = plain_matrix(V_in), U = plain_matrix(U_in);
  const Tensor grad_V = at::empty(V.sizes(), V.options());
  const Tensor grad_U = at::empty(U.sizes(), U.options());
  in_dtype(V.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    spd::kernels<T>().faithfulness_backward(host<T>(), faithfulness_args<T>(V, U, W), grad.item<T>(),
                                            output<T>(grad_V), output<T>(grad_U));
  });
  return {grad_V, grad_U};
}

// ---- autograd

// The differentiable operations, as spd_fast.ops' autograd.Functions define them (which trace, and serve other devices),
// without Python between the kernels and the engine.
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; }
Tensor or_undefined(const OptTensor& t) { return t ? *t : Tensor(); }

// Gradients that cannot be differentiated again: that fails where it is tried, not before.
variable_list once_differentiable(variable_list grads, const variable_list& incoming) {
  bool again = false;
  for (const Tensor& t : incoming) again = again || (t.defined() && t.requires_grad());
  if (!again || !at::GradMode::is_enabled()) return grads;
  for (Tensor& t : grads)
    if (t.defined()) t = t.detach().requires_grad_();
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable", int64_t(grads.size()));
  return (*error)(std::move(grads));
}

// A layer of the gates, [C, in, out] or [C, out] as its module holds it, as the kernels take it: [C, columns], or [C].
Tensor flat(const Tensor& layer, bool one_column = false) {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  const int64_t C = layer.size(0);
  return one_column ? layer.reshape({C}) : layer.reshape({C, C > 0 ? layer.numel() / C : 0});
}

struct GateFunction : torch::autograd::Function<GateFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& V, const Tensor& w_in,
                               const Tensor& b_in, const Tensor& w_out, const Tensor& b_out, const std::string& sigmoid,
                               const std::string& penalty, double power, double eps, bool interpolated) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = c10::ivalue::Tuple::create({sigmoid, penalty, power, eps, interpolated});
    const auto run = interpolated ? gate_forward<true> : gate_forward<false>;
    const auto [inner, lower, sums] =
        run(x, V, flat(w_in), b_in, flat(w_out), flat(b_out, true), sigmoid, penalty, power, eps);
    ctx->save_for_backward({x, V, inner, w_in, b_in, w_out, b_out});
    return {inner, lower, sums};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(11);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return out;
    const auto saved = ctx->get_saved_variables();
    const auto options = ctx->saved_data["options"].toTuple();
    const auto& o = options->elements();
    const auto run = o[4].toBool() ? gate_backward<true> : gate_backward<false>;
    std::tie(out[0], out[1], out[2], out[3], out[4], out[5]) =
        run(optional(grads[0]), optional(grads[1]), optional(grads[2]), saved[0], saved[1], saved[2], flat(saved[3]),
            saved[4], flat(saved[5]), flat(saved[6], true), o[0].toStringRef(), o[1].toStringRef(), o[2].toDouble(),
            o[3].toDouble(), ctx->needs_input_grad(0));
    for (size_t layer : {2, 4, 5}) out[layer] = out[layer].view(saved[layer + 1].sizes());
    return once_differentiable(std::move(out), grads);
  }
};

struct ComponentLinearFunction : torch::autograd::Function<ComponentLinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& inner, const OptTensor& V,
                        const Tensor& U, const OptTensor& lower, const OptTensor& source, const OptTensor& key,
                        int64_t draw, int64_t site, int64_t row_offset, bool binomial, const OptTensor& delta,
                        bool random_delta, const OptTensor& weight, const OptTensor& bias, const OptTensor& routing) {
    ctx->save_for_backward({x, or_undefined(inner), or_undefined(V), U, or_undefined(lower), or_undefined(source),
                            or_undefined(key), or_undefined(delta), or_undefined(weight), or_undefined(routing)});
    ctx->saved_data["options"] =
        c10::ivalue::Tuple::create({draw, site, row_offset, binomial, random_delta, bias.has_value()});
    return component_linear_forward(x, inner, V, U, lower, source, key, draw, site, row_offset, binomial, delta,
                                    random_delta, weight, bias, routing);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto options = ctx->saved_data["options"].toTuple();
    const auto& o = options->elements();
    // Autograd numbers the tensors that are there.
    size_t edge = 0;
    const auto needs = [&](bool there) { return there && ctx->needs_input_grad(edge++); };
    const auto [x, inner, V, U, lower, source, key, delta, weight, routing] =
        std::tie(saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8], saved[9]);
    const bool need_x = needs(true), need_inner = needs(inner.defined()), need_V = needs(V.defined());
    const bool need_U = needs(true), need_lower = needs(lower.defined()), need_source = needs(source.defined());
    needs(key.defined());
    const bool need_delta = needs(delta.defined());
    needs(weight.defined());
    const bool need_bias = needs(o[5].toBool());
    variable_list out(16);
    std::tie(out[0], out[1], out[2], out[3], out[4], out[5], out[11], out[14]) = component_linear_backward(
        grads[0], x, optional(inner), optional(V), U, optional(lower), optional(source), optional(key), o[0].toInt(),
        o[1].toInt(), o[2].toInt(), o[3].toBool(), optional(delta), o[4].toBool(), optional(weight), {},
        optional(routing), need_x, need_inner, need_V, need_U, need_lower, need_source, need_delta, need_bias);
    return once_differentiable(std::move(out), grads);
  }
};

struct FaithfulnessFunction : torch::autograd::Function<FaithfulnessFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& V, const Tensor& U, const Tensor& W) {
    ctx->save_for_backward({V, U, W});
    return faithfulness_forward(V, U, W);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list out(3);
    std::tie(out[0], out[1]) = faithfulness_backward(grads[0], saved[0], saved[1], saved[2]);
    return once_differentiable(std::move(out), grads);
  }
};

std::tuple<Tensor, Tensor, Tensor> gate(const Tensor& x, const Tensor& V, const Tensor& w_in, const Tensor& b_in,
                                        const Tensor& w_out, const Tensor& b_out, const std::string& sigmoid,
                                        const std::string& penalty, double power, double eps,
                                        const std::string& gate_eval) {
  const variable_list out = GateFunction::apply(x, V, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps,
                                                gate_eval == "interpolated");
  return {out[0], out[1], out[2]};
}

Tensor component_linear(const Tensor& x, const OptTensor& inner, const OptTensor& V, const Tensor& U,
                        const OptTensor& lower, const OptTensor& source, const OptTensor& key, int64_t draw,
                        int64_t site, int64_t row_offset, bool binomial, const OptTensor& delta, bool random_delta,
                        const OptTensor& weight, const OptTensor& bias, const OptTensor& routing) {
  return ComponentLinearFunction::apply(x, inner, V, U, lower, source, key, draw, site, row_offset, binomial, delta,
                                        random_delta, weight, bias, routing);
}

Tensor faithfulness(const Tensor& V, const Tensor& U, const Tensor& W) { return FaithfulnessFunction::apply(V, U, W); }

// ---- random numbers

Tensor uniform(const Tensor& key, int64_t rows, int64_t columns, int64_t draw, int64_t site, int64_t row_offset,
               const at::ScalarType& dtype) {
  Plain plain("spd_fast::uniform");
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, "rows and columns must not be negative: ", rows, ", ", columns);
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "dtype must be float32 or float64, not ", dtype);
  const spd::Key k = make_key(key, draw, site, row_offset, false);
  const Tensor out = at::empty({rows, columns}, at::TensorOptions(dtype));
  in_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    spd::kernels<T>().uniform(host<T>(), k, rows, columns, output<T>(out));
  });
  return out;
}

// A batch [rows, features] of sparse features, the bits of torch's own generator with this seed.
Tensor sparse_features(uint64_t seed, int64_t rows, int64_t features, double probability, double low, double high) {
  Plain plain("spd_fast::sparse_features");
  TORCH_CHECK_VALUE(rows >= 0 && features >= 0, "rows and features must not be negative: ", rows, ", ", features);
  const Tensor out = at::empty({rows, features}, at::TensorOptions(at::kFloat));
  spd::kernels<float>().sparse_features(uint32_t(seed), rows * features, float(probability), float(low),
                                        float(high - low), output<float>(out));
  return out;
}

// Lets the process keep memory it has freed. Without it glibc returns every large block to the system and each call
// takes one page fault per 4 KiB of output again, a third of the time of a gate. Process-wide, so only on request.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 && mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1;
#else
  return false;
#endif
}

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const spd::Words4 w = spd::philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {w.lane[0], w.lane[1], w.lane[2], w.lane[3]};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.doc() = "Fused CPU kernels of spd_fast; called by spd_fast.ops, which holds the documentation.";
  const auto release = py::call_guard<py::gil_scoped_release>();
  const auto def_gate = [&](const char* forward_name, auto forward, const char* backward_name, auto backward) {
    m.def(forward_name, forward, release, py::arg("x"), py::arg("V"), py::arg("w_in"), py::arg("b_in"),
          py::arg("w_out"), py::arg("b_out"), py::arg("sigmoid"), py::arg("penalty"), py::arg("power"),
          py::arg("eps"));
    m.def(backward_name, backward, release, py::arg("grad_inner"), py::arg("grad_lower"), py::arg("grad_penalty"),
          py::arg("x"), py::arg("V"), py::arg("inner"), py::arg("w_in"), py::arg("b_in"), py::arg("w_out"),
          py::arg("b_out"), py::arg("sigmoid"), py::arg("penalty"), py::arg("power"), py::arg("eps"),
          py::arg("need_grad_x"));
  };
  def_gate("gate_forward", &gate_forward<false>, "gate_backward", &gate_backward<false>);
  def_gate("gate_interpolated_forward", &gate_forward<true>, "gate_interpolated_backward", &gate_backward<true>);
  m.def("component_linear_forward", &component_linear_forward, release, py::arg("x"), py::arg("inner"), py::arg("V"),
        py::arg("U"), py::arg("lower"), py::arg("source"), py::arg("key"), py::arg("draw"), py::arg("site"),
        py::arg("row_offset"), py::arg("binomial"), py::arg("delta"), py::arg("random_delta"), py::arg("weight"),
        py::arg("bias"), py::arg("routing"));
  m.def("component_linear_backward", &component_linear_backward, release, py::arg("grad_y"), py::arg("x"),
        py::arg("inner"), py::arg("V"), py::arg("U"), py::arg("lower"), py::arg("source"), py::arg("key"),
        py::arg("draw"), py::arg("site"), py::arg("row_offset"), py::arg("binomial"), py::arg("delta"),
        py::arg("random_delta"), py::arg("weight"), py::arg("bias"), py::arg("routing"), py::arg("need_x"),
        py::arg("need_inner"), py::arg("need_V"), py::arg("need_U"), py::arg("need_lower"), py::arg("need_source"),
        py::arg("need_delta"), py::arg("need_bias"));
  m.def("layer_forward", &layer_forward, release);
  m.def("layer_backward", &layer_backward, release);
  m.def("faithfulness_forward", &faithfulness_forward, release, py::arg("V"), py::arg("U"), py::arg("W"));
  m.def("faithfulness_backward", &faithfulness_backward, release, py::arg("grad"), py::arg("V"), py::arg("U"),
        py::arg("W"));
  m.def("gate", &gate, release);
  m.def("component_linear", &component_linear, release);
  m.def("faithfulness", &faithfulness, release);
  m.def("uniform", &uniform, release, py::arg("key"), py::arg("rows"), py::arg("columns"), py::arg("draw"),
        py::arg("site"), py::arg("row_offset"), py::arg("dtype"));
  m.def("sparse_features", &sparse_features, release, py::arg("seed"), py::arg("rows"), py::arg("features"),
        py::arg("probability"), py::arg("low"), py::arg("high"));
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("instruction_set", [] { return std::string(spd::instruction_set()); });
}
