// The CPU kernels: plain C++, float and double, no torch. One table of functions per instruction set.
//
// N rows (positions), C components. Tensors [N, C] are component-major: element (n, c) lies at c * N + n, so
// that everything elementwise runs along contiguous rows while a component's gate weights are scalars.
// Tensors [N, d] are row-major. Results do not depend on the number of threads: work is cut into fixed
// blocks of rows, and partial sums are added in a fixed order.
#pragma once

#include <cstdint>

#include "../common/penalties.h"
#include "../common/sigmoids.h"

// Never a function of its own: these headers are compiled once per instruction set.
#define SPD_METHOD __attribute__((always_inline)) inline

namespace spd {

// A read-only matrix; element (i, j) lies at data[i * row + j * col].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;
  SPD_METHOD Matrix transposed() const { return {data, col, row}; }
};

// What the kernels need from their host: a parallel loop, and a matrix product for large sites.
struct Parallel {
  void (*loop)(int64_t tasks, void* state, void (*body)(void* state, int64_t task));
};
// c[m, n] = a[m, k] b[k, n] + (accumulate ? c : 0).
template <class T>
using MatrixProduct = void (*)(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, T* c, int64_t c_row,
                               int64_t c_col, bool accumulate);

template <class T>
struct Host {
  Parallel parallel;
  MatrixProduct<T> product;
  // Forces the path for small (1) or large (2) sites; 0 chooses by size.
  int path;
};

// One scalar MLP per component; hidden == 0 is the linear gate s = w_out h + b_out.
template <class T>
struct Gate {
  const T* w_in;   // [C, hidden]
  const T* b_in;   // [C, hidden]
  const T* w_out;  // [C, max(hidden, 1)]
  const T* b_out;  // [C]
  int64_t hidden;
  Sigmoid sigmoid;
  Penalty penalty;
  T power, eps;
};

template <class T>
struct GateForward {
  int64_t rows, d_in, components;
  Matrix<T> x;  // col == 1
  Matrix<T> V;
  Gate<T> gate;
  T* inner;        // [N, C]
  T* lower;        // [N, C]
  T* penalty_sum;  // [C]
};

template <class T>
struct GateBackward {
  int64_t rows, d_in, components;
  const T* grad_inner;    // [N, C] or null
  const T* grad_lower;    // [N, C] or null
  const T* grad_penalty;  // [C] or null
  Matrix<T> x;
  Matrix<T> V;
  const T* inner;
  Gate<T> gate;
  T* grad_x;  // [N, d_in] or null
  T* grad_V;  // [d_in, C] or null
  T *grad_w_in, *grad_b_in, *grad_w_out, *grad_b_out;
};

// How the mask's sources and delta are drawn (spd_fast/ops/random.py).
struct Key {
  bool on;
  bool binomial;
  uint32_t seed, step, draw, site, row_offset;
};

template <class T>
struct ComponentLinear {
  int64_t rows, d_in, components, d_out;
  Matrix<T> x;
  const T* inner;  // [N, C] or null: x V is then formed tile by tile
  Matrix<T> V;
  Matrix<T> U;
  const T* lower;   // [N, C] or null
  const T* source;  // [N, C] or null
  Key key;
  const T* delta;  // [N] or null
  bool random_delta;
  Matrix<T> weight;       // data null when neither delta nor routing is on
  const T* bias;          // [d_out] or null
  const uint8_t* routed;  // [N] or null
  SPD_METHOD bool has_delta() const { return delta || random_delta; }
  SPD_METHOD bool mixes_weight() const { return has_delta() || routed; }
};

// Null outputs are not computed.
template <class T>
struct ComponentLinearGrads {
  Matrix<T> grad_y;  // col == 1
  T* x;              // [N, d_in]
  T* inner;          // [N, C]
  T* V;              // [d_in, C]
  T* U;              // [C, d_out]
  T* lower;          // [N, C]
  T* source;         // [N, C]
  T* delta;          // [N]
  T* bias;           // [d_out]
};

// Gate and masked component sum in one; `linear` has neither inner activations nor lower importances nor sources.
template <class T>
struct Layer {
  ComponentLinear<T> linear;
  Gate<T> gate;
};

template <class T>
struct LayerGrads {
  Matrix<T> grad_y;   // col == 1
  const T* penalty;   // [C] incoming, or null
  T* x;               // [N, d_in] or null
  T* V;               // [d_in, C]
  T* U;               // [C, d_out]
  T* bias;            // [d_out] or null
  T *w_in, *b_in, *w_out, *b_out;
};

template <class T>
struct Faithfulness {
  int64_t d_in, components, d_out;
  Matrix<T> V, U, W;
};

template <class T>
struct Kernels {
  void (*gate_forward)(const Host<T>&, const GateForward<T>&);
  void (*gate_backward)(const Host<T>&, const GateBackward<T>&);
  // The same, with gates of one hidden layer interpolated on a grid (gate_interpolated.inl).
  void (*gate_interpolated_forward)(const Host<T>&, const GateForward<T>&);
  void (*gate_interpolated_backward)(const Host<T>&, const GateBackward<T>&);
  void (*component_linear_forward)(const Host<T>&, const ComponentLinear<T>&, T* y);
  void (*component_linear_backward)(const Host<T>&, const ComponentLinear<T>&,
                                    const ComponentLinearGrads<T>&);
  void (*layer_forward)(const Host<T>&, const Layer<T>&, T* y, T* penalty_sum);
  void (*layer_backward)(const Host<T>&, const Layer<T>&, const LayerGrads<T>&);
  double (*faithfulness_forward)(const Host<T>&, const Faithfulness<T>&);
  void (*faithfulness_backward)(const Host<T>&, const Faithfulness<T>&, T grad, T* grad_V, T* grad_U);
  // out [rows, columns] row-major.
  void (*uniform)(const Host<T>&, const Key&, int64_t rows, int64_t columns, T* out);
  // `count` sparse features (features.inl), float whatever T is.
  void (*sparse_features)(uint32_t seed, int64_t count, float probability, float low, float width, float* out);
};

// "baseline", "avx2" or "avx512": the best this machine has, or the one named in SPD_FAST_CPU_ISA.
// Throws std::runtime_error for a name that is unknown, not compiled in or not supported here.
const char* instruction_set();
template <class T>
const Kernels<T>& kernels();

}  // namespace spd
