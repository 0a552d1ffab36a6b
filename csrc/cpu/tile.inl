// Building blocks shared by the kernels: scratch memory, packing, transposes, small matrix products on tiles,
// Philox for a tile. Included inside the namespace of one instruction set.
//
// A tile holds up to kBlock rows (positions) of several components or features, each contiguous along the rows and
// kTileStride apart. Rows beyond the valid ones, up to a whole vector, are zero in every input.

constexpr int64_t kBlock = 256;
// Not a power of two: walking down a tile must not stay within a few sets of the cache.
constexpr int64_t kTileStride = kBlock + 16;
constexpr int64_t kPanel = 4;
// Components treated together in the small path.
constexpr int64_t kGroup = 16;
// Partial sums kept per call, whatever the number of threads.
constexpr int64_t kMaxSegments = 8;

SPD_HD int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
SPD_HD int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
SPD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class F>
static void run_tasks(const Parallel& parallel, int64_t tasks, F&& body) {
  if (tasks == 1) {
    body(int64_t(0));
  } else if (tasks > 1) {
    using Body = std::remove_reference_t<F>;
    parallel.loop(tasks, const_cast<void*>(static_cast<const void*>(&body)),
                  [](void* state, int64_t task) { (*static_cast<Body*>(state))(task); });
  }
}

// One allocation, handed out in aligned pieces.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const int64_t bytes = round_up(count * int64_t(sizeof(T)) + 64, 64);
    data_ = static_cast<T*>(std::aligned_alloc(64, size_t(bytes)));
    if (!data_) throw std::bad_alloc();
    next_ = data_;
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static int64_t padded(int64_t count) { return round_up(count, int64_t(64 / sizeof(T))); }
  T* take(int64_t count) {
    T* piece = next_;
    next_ += padded(count);
    return piece;
  }
  T* zeros(int64_t count) {
    T* piece = take(count);
    std::memset(piece, 0, size_t(count) * sizeof(T));
    return piece;
  }

 private:
  T *data_, *next_;
};

// p + offset, for a pointer that may be null.
template <class T>
SPD_HD T* shifted(T* p, int64_t offset) {
  return p ? p + offset : p;
}

// The rows of one block.
struct Rows {
  int64_t begin, count, padded;
};
template <class T>
static Rows block_rows(int64_t rows, int64_t block) {
  const int64_t begin = block * kBlock;
  const int64_t count = smaller(kBlock, rows - begin);
  return {begin, count, round_up(count, Lanes<T>::count)};
}

// Blocks of rows are dealt to segments; a segment is one task with its own partial sums.
struct Segments {
  int64_t blocks, count;
  explicit Segments(int64_t rows) : blocks(ceil_div(rows, kBlock)), count(smaller(blocks, kMaxSegments)) {}
  int64_t first(int64_t segment) const { return segment * blocks / count; }
};

// A pointer to rows of [N, C] storage that may be read or written up to padded rows. Full blocks use the tensor
// itself; a ragged last block goes through a zero-padded copy in scratch.
template <class T>
struct Strip {
  T* data;
  int64_t stride;
};

template <class T>
static Strip<const T> strip_in(const T* tensor, int64_t rows, Rows r, int64_t c0, int64_t count, T* scratch) {
  const T* source = tensor + c0 * rows + r.begin;
  if (r.count == r.padded) return {source, rows};
  for (int64_t c = 0; c < count; ++c) {
    std::memcpy(scratch + c * kTileStride, source + c * rows, size_t(r.count) * sizeof(T));
    for (int64_t n = r.count; n < r.padded; ++n) scratch[c * kTileStride + n] = T(0);
  }
  return {scratch, kTileStride};
}

// Components beyond `count` up to a whole panel must have room in scratch; only a strip that lies wholly in the tensor
// is written in place.
template <class T>
static Strip<T> strip_out(T* tensor, int64_t rows, Rows r, int64_t c0, T* scratch) {
  if (r.count == r.padded) return {tensor + c0 * rows + r.begin, rows};
  return {scratch, kTileStride};
}
template <class T>
static void flush_strip(T* tensor, int64_t rows, Rows r, int64_t c0, int64_t count, Strip<T> strip) {
  if (r.count == r.padded) return;
  for (int64_t c = 0; c < count; ++c)
    std::memcpy(tensor + (c0 + c) * rows + r.begin, strip.data + c * strip.stride, size_t(r.count) * sizeof(T));
}

// out[m / 4][k][m % 4] = a[m, k], zero for the missing rows of the last panel.
template <class T>
static void pack_panels(T* out, int64_t m_count, int64_t k_count, Matrix<T> a) {
  for (int64_t m0 = 0; m0 < m_count; m0 += kPanel) {
    T* panel = out + m0 * k_count;
    const int64_t m_here = smaller(kPanel, m_count - m0);
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t m = 0; m < kPanel; ++m)
        panel[k * kPanel + m] = m < m_here ? a.data[(m0 + m) * a.row + k * a.col] : T(0);
  }
}
SPD_HD int64_t panel_size(int64_t m_count, int64_t k_count) { return round_up(m_count, kPanel) * k_count; }

// tile[i][n] = x[begin + n, i], zero beyond the valid rows.
template <class T>
static void load_transposed(T* tile, Matrix<T> x, int64_t features, Rows r) {
  const T* source = x.data + r.begin * x.row;
  int64_t n = 0;
  for (; n + 8 <= r.count; n += 8) {
    for (int64_t i = 0; i < features; ++i) {
      T* out = tile + i * kTileStride + n;
      const T* in = source + n * x.row + i;
      for (int64_t k = 0; k < 8; ++k) out[k] = in[k * x.row];
    }
  }
  for (int64_t i = 0; i < features; ++i) {
    T* out = tile + i * kTileStride;
    for (int64_t k = n; k < r.count; ++k) out[k] = source[k * x.row + i];
    for (int64_t k = r.count; k < r.padded; ++k) out[k] = T(0);
  }
}

// out[begin + n, i] = tile[i][n] + bias[i]; out is row-major with `features` columns.
template <class T>
static void store_transposed(T* out, const T* tile, int64_t features, Rows r, const T* bias) {
  T* target = out + r.begin * features;
  int64_t n = 0;
  for (; n + 8 <= r.count; n += 8) {
    for (int64_t i = 0; i < features; ++i) {
      const T* in = tile + i * kTileStride + n;
      T* to = target + n * features + i;
      const T b = bias ? bias[i] : T(0);
      for (int64_t k = 0; k < 8; ++k) to[k * features] = in[k] + b;
    }
  }
  for (; n < r.count; ++n)
    for (int64_t i = 0; i < features; ++i)
      target[n * features + i] = tile[i * kTileStride + n] + (bias ? bias[i] : T(0));
}

template <class T, int M, int NV>
static inline void rows_kernel(const T* a, int64_t k_count, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                               bool accumulate) {
  using Vec = typename Lanes<T>::Vec;
  constexpr int64_t lanes = Lanes<T>::count;
  Vec acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = accumulate ? load<Vec>(c + m * c_stride + v * lanes) : Vec{};
  for (int64_t k = 0; k < k_count; ++k) {
    Vec row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load<Vec>(b + k * b_stride + v * lanes);
    for (int m = 0; m < M; ++m) {
      const Vec w = splat<Vec>(a[k * kPanel + m]);
      for (int v = 0; v < NV; ++v) acc[m][v] = mul_add(w, row[v], acc[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < NV; ++v) store(c + m * c_stride + v * lanes, acc[m][v]);
}

template <class T, int M>
static inline void rows_panel(const T* a, int64_t k_count, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                              int64_t padded, bool accumulate) {
  constexpr int64_t lanes = Lanes<T>::count;
  constexpr int wide = M == 1 ? 8 : (M == 2 ? 4 : 2);
  int64_t n = 0;
  for (; n + wide * lanes <= padded; n += wide * lanes)
    rows_kernel<T, M, wide>(a, k_count, b + n, b_stride, c + n, c_stride, accumulate);
  for (; n < padded; n += lanes) rows_kernel<T, M, 1>(a, k_count, b + n, b_stride, c + n, c_stride, accumulate);
}

// c[m][n] (+)= sum_k a[m, k] b[k][n]: a packed (its panels a_k columns wide, starting at column k0), b and c tiles.
template <class T>
static void multiply_rows(const T* a, int64_t a_k, int64_t k0, int64_t m_count, int64_t k_count, const T* b,
                          int64_t b_stride, T* c, int64_t c_stride, int64_t padded, bool accumulate) {
  for (int64_t m0 = 0; m0 < m_count; m0 += kPanel) {
    const T* panel = a + m0 * a_k + k0 * kPanel;
    T* out = c + m0 * c_stride;
    switch (m_count - m0) {
      case 1: rows_panel<T, 1>(panel, k_count, b, b_stride, out, c_stride, padded, accumulate); break;
      case 2: rows_panel<T, 2>(panel, k_count, b, b_stride, out, c_stride, padded, accumulate); break;
      case 3: rows_panel<T, 3>(panel, k_count, b, b_stride, out, c_stride, padded, accumulate); break;
      default: rows_panel<T, 4>(panel, k_count, b, b_stride, out, c_stride, padded, accumulate);
    }
  }
}

template <class T, int M, int K>
static inline void dots_kernel(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t padded, T* c,
                               int64_t c_stride) {
  using Vec = typename Lanes<T>::Vec;
  Vec acc[M][K];
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) acc[m][k] = Vec{};
  for (int64_t n = 0; n < padded; n += Lanes<T>::count) {
    Vec left[M];
    for (int m = 0; m < M; ++m) left[m] = load<Vec>(a + m * a_stride + n);
    for (int k = 0; k < K; ++k) {
      const Vec right = load<Vec>(b + k * b_stride + n);
      for (int m = 0; m < M; ++m) acc[m][k] = mul_add(left[m], right, acc[m][k]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) c[m * c_stride + k] += sum_lanes(acc[m][k]);
}

template <class T, int M>
static void dots_panel(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t k_count, int64_t padded,
                       T* c, int64_t c_stride) {
  int64_t k = 0;
  for (; k + 3 <= k_count; k += 3)
    dots_kernel<T, M, 3>(a, a_stride, b + k * b_stride, b_stride, padded, c + k, c_stride);
  if (k_count - k == 2) dots_kernel<T, M, 2>(a, a_stride, b + k * b_stride, b_stride, padded, c + k, c_stride);
  if (k_count - k == 1) dots_kernel<T, M, 1>(a, a_stride, b + k * b_stride, b_stride, padded, c + k, c_stride);
}

// c[m, k] += sum_n a[m][n] b[k][n].
template <class T>
static void multiply_dots(const T* a, int64_t a_stride, int64_t m_count, const T* b, int64_t b_stride,
                          int64_t k_count, int64_t padded, T* c, int64_t c_stride) {
  int64_t m = 0;
  for (; m + 4 <= m_count; m += 4)
    dots_panel<T, 4>(a + m * a_stride, a_stride, b, b_stride, k_count, padded, c + m * c_stride, c_stride);
  const T* rest = a + m * a_stride;
  switch (m_count - m) {
    case 1: dots_panel<T, 1>(rest, a_stride, b, b_stride, k_count, padded, c + m * c_stride, c_stride); break;
    case 2: dots_panel<T, 2>(rest, a_stride, b, b_stride, k_count, padded, c + m * c_stride, c_stride); break;
    case 3: dots_panel<T, 3>(rest, a_stride, b, b_stride, k_count, padded, c + m * c_stride, c_stride); break;
    default: break;
  }
}

// out[i] = the sum over segments of partial[segment][i], in the order of the segments.
template <class T, class F>
static void reduce_segments(const Parallel& parallel, const T* partial, int64_t segments, int64_t size, F&& write) {
  constexpr int64_t chunk = 4096;
  run_tasks(parallel, ceil_div(size, chunk), [&](int64_t task) {
    for (int64_t i = task * chunk; i < smaller(size, (task + 1) * chunk); ++i) {
      T sum = T(0);
      for (int64_t s = 0; s < segments; ++s) sum += partial[s * size + i];
      write(i, sum);
    }
  });
}

// The four columns 4 * block .. + 3 of the uniform numbers of consecutive rows: out[lane][n], n < padded.
//
// A 32-bit word lives in the low half of a 64-bit lane, where the widening multiply wants it; what is left in the
// high half is ignored by the next multiply. `even` holds rows 0, 2, 4, ... of a vector and `odd` the others. The
// first round, and half of the second and third, does not depend on the row.
static void philox_tile(const Key& key, uint32_t block, int64_t row, int64_t padded, float* out, int64_t stride) {
  constexpr int lanes = Lanes<float>::count;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (int r = 0; r < kPhiloxRounds; ++r) {
    k0[r] = key.seed + uint32_t(r) * kPhiloxW0;
    k1[r] = key.step + uint32_t(r) * kPhiloxW1;
  }
  const auto hi = [](uint64_t p) { return uint32_t(p >> 32); };
  const uint64_t p0 = uint64_t(kPhiloxM0) * block;
  const uint64_t p1 = uint64_t(kPhiloxM1) * key.draw;
  const uint32_t a0 = hi(p1) ^ k0[0];
  const uint32_t a1 = uint32_t(p1), a2 = hi(p0) ^ key.site ^ k1[0], a3 = uint32_t(p0);
  const uint64_t q1 = uint64_t(kPhiloxM1) * a2;
  const uint32_t b0 = hi(q1) ^ a1 ^ k0[1], b1 = uint32_t(q1);
  const uint64_t r0 = uint64_t(kPhiloxM0) * b0;

  const VecU64 m0 = splat<VecU64>(uint64_t(kPhiloxM0));
  const VecU64 m1 = splat<VecU64>(uint64_t(kPhiloxM1));
  VecU64 row_even;
  for (int i = 0; i < lanes / 2; ++i) row_even[i] = uint64_t(2 * i);

  for (int64_t n = 0; n < padded; n += lanes) {
    VecU64 c0[2], c1[2], c2[2], c3[2];
    for (int h = 0; h < 2; ++h) {
      const VecU64 rows = row_even + uint64_t(uint32_t(row + n) + uint64_t(h));
      const VecU64 q0 = multiply_low_words(m0, rows ^ uint64_t(a0));
      const VecU64 d2 = (q0 >> 32) ^ uint64_t(a3 ^ k1[1]);
      const VecU64 r1 = multiply_low_words(m1, d2);
      c0[h] = (r1 >> 32) ^ uint64_t(b1 ^ k0[2]);
      c1[h] = r1;
      c2[h] = q0 ^ uint64_t(hi(r0) ^ k1[2]);
      c3[h] = splat<VecU64>(uint64_t(uint32_t(r0)));
    }
    for (int r = 3; r < kPhiloxRounds; ++r) {
      for (int h = 0; h < 2; ++h) {
        const VecU64 product0 = multiply_low_words(m0, c0[h]);
        const VecU64 product1 = multiply_low_words(m1, c2[h]);
        c0[h] = (product1 >> 32) ^ c1[h] ^ uint64_t(k0[r]);
        c2[h] = (product0 >> 32) ^ c3[h] ^ uint64_t(k1[r]);
        c1[h] = product1;
        c3[h] = product0;
      }
    }
    const auto emit = [&](int lane, VecU64 even, VecU64 odd) {
      const VecU64 words = (even & 0xffffffffu) | (odd << 32);
      const VecI32 bits = (VecI32)((VecU32)words >> 8);
      store(out + lane * stride + n, __builtin_convertvector(bits, VecF) * (1.0f / 16777216.0f));
    };
    emit(0, c0[0], c0[1]);
    emit(1, c1[0], c1[1]);
    emit(2, c2[0], c2[1]);
    emit(3, c3[0], c3[1]);
  }
}

template <class T>
static void uniform(const Host<T>& host, const Key& key, int64_t rows, int64_t columns, T* out) {
  run_tasks(host.parallel, ceil_div(rows, kBlock), [&](int64_t block) {
    const Rows r = block_rows<float>(rows, block);
    Scratch<float> scratch(4 * kTileStride);
    float* u = scratch.take(4 * kTileStride);
    for (int64_t c0 = 0; c0 < columns; c0 += 4) {
      philox_tile(key, uint32_t(c0 / 4), key.row_offset + r.begin, r.padded, u, kTileStride);
      for (int64_t n = 0; n < r.count; ++n)
        for (int64_t c = c0; c < smaller(columns, c0 + 4); ++c)
          out[(r.begin + n) * columns + c] = T(u[(c - c0) * kTileStride + n]);
    }
  });
}
