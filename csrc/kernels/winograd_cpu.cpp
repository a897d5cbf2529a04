#include "kernels/winograd.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/buffer.h"
#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

// As wide as the registers. By reference, so that none crosses an ABI.
template <class T>
using Vector __attribute__((vector_size(DDPP_VECTOR_BYTES))) = T;

// Values side by side that one pass handles: a register of them, or one of the rest.
template <class V, class T>
constexpr int64_t kWidth = sizeof(V) / sizeof(T);

template <class V, class T>
DDPP_INLINE void load(V& v, const T* from) {
  std::memcpy(&v, from, sizeof v);
}
template <class V, class T>
DDPP_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

// sum += x y, rounded once where the instruction set can. Said and not left to the compiler, which might do
// so for one number of rows and not for another.
template <class V, class T>
DDPP_INLINE void add_product(V& sum, T x, const V& y) {
#if defined(DDPP_ISA_avx512)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    sum = (V)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)y, (__m512)sum);
    return;
  } else if constexpr (sizeof(V) == 64) {
    sum = (V)_mm512_fmadd_pd(_mm512_set1_pd(x), (__m512d)y, (__m512d)sum);
    return;
  }
#elif defined(DDPP_ISA_avx2)
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) {
    sum = (V)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)y, (__m256)sum);
    return;
  } else if constexpr (sizeof(V) == 32) {
    sum = (V)_mm256_fmadd_pd(_mm256_set1_pd(x), (__m256d)y, (__m256d)sum);
    return;
  }
#endif
  sum += x * y;
}

// body.template operator()<V>(c) for all channels c, in steps of a register, then one by one.
template <class T, class Body>
DDPP_INLINE void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kWidth<Vector<T>, T> <= channels; c += kWidth<Vector<T>, T>) body(Vector<T>{}, c);
  for (; c < channels; ++c) body(T{}, c);
}

// ---- F(m, 3) in one dimension: out = At ((Bt in) * (G w)). `transposed` marks A and Gt ----

template <class T, int m>
struct Filter;

template <class T>
struct Filter<T, 2> {
  template <class V>
  static DDPP_INLINE void input(const V (&d)[4], V (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  template <class V>
  static DDPP_INLINE void output(const V (&t)[4], V (&y)[2]) {
    y[0] = t[0] + t[1] + t[2];
    y[1] = t[1] - t[2] - t[3];
  }
  template <class V>
  static DDPP_INLINE void output_transposed(const V (&y)[2], V (&t)[4]) {
    t[0] = y[0];
    t[1] = y[0] + y[1];
    t[2] = y[0] - y[1];
    t[3] = -y[1];
  }
  template <class V>
  static DDPP_INLINE void weight(const V (&w)[3], V (&t)[4]) {
    const V even = (w[0] + w[2]) * T(1. / 2), odd = w[1] * T(1. / 2);
    t[0] = w[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = w[2];
  }
  template <class V>
  static DDPP_INLINE void weight_transposed(const V (&t)[4], V (&w)[3]) {
    const V even = (t[1] + t[2]) * T(1. / 2);
    w[0] = t[0] + even;
    w[1] = (t[1] - t[2]) * T(1. / 2);
    w[2] = even + t[3];
  }
};

// Interpolated at 0, +-a, +-b and infinity. The usual a = 1, b = 2 leave twice the rounding error; of some
// twenty pairs around a b = 1 these leave the least.
template <class T>
struct Filter<T, 4> {
  static constexpr T a = T(2. / 3), b = T(3. / 2), a2 = T(4. / 9), b2 = T(9. / 4), sum2 = T(97. / 36);
  static constexpr T a3 = T(8. / 27), b3 = T(27. / 8);
  // 1 / (2 a^2 (a^2 - b^2)) and 1 / (2 b^2 (b^2 - a^2)), times the powers of a and of b
  static constexpr T a_0 = T(-81. / 130), a_1 = T(-27. / 65), a_2 = T(-18. / 65);
  static constexpr T b_0 = T(8. / 65), b_1 = T(12. / 65), b_2 = T(18. / 65);

  template <class V>
  static DDPP_INLINE void input(const V (&d)[6], V (&t)[6]) {
    V even_a = d[4], even_b = d[4], odd_a = d[3], odd_b = d[3];
    add_product(even_a, -b2, d[2]);
    add_product(even_b, -a2, d[2]);
    add_product(odd_a, -b2, d[1]);
    add_product(odd_b, -a2, d[1]);
    t[0] = d[0] + d[4];
    add_product(t[0], -sum2, d[2]);
    plus_and_minus(even_a, a, odd_a, t[1], t[2]);
    plus_and_minus(even_b, b, odd_b, t[3], t[4]);
    t[5] = d[1] + d[5];
    add_product(t[5], -sum2, d[3]);
  }
  template <class V>
  static DDPP_INLINE void output(const V (&t)[6], V (&y)[4]) {
    const V sum_a = t[1] + t[2], odd_a = t[1] - t[2], sum_b = t[3] + t[4], odd_b = t[3] - t[4];
    y[0] = t[0] + sum_a + sum_b;
    y[1] = odd_a * a;
    add_product(y[1], b, odd_b);
    y[2] = sum_a * a2;
    add_product(y[2], b2, sum_b);
    y[3] = t[5];
    add_product(y[3], a3, odd_a);
    add_product(y[3], b3, odd_b);
  }
  template <class V>
  static DDPP_INLINE void output_transposed(const V (&y)[4], V (&t)[6]) {
    V even_a = y[0], even_b = y[0], odd_a = y[1], odd_b = y[1];
    add_product(even_a, a2, y[2]);
    add_product(even_b, b2, y[2]);
    add_product(odd_a, a2, y[3]);
    add_product(odd_b, b2, y[3]);
    t[0] = y[0];
    plus_and_minus(even_a, a, odd_a, t[1], t[2]);
    plus_and_minus(even_b, b, odd_b, t[3], t[4]);
    t[5] = y[3];
  }
  template <class V>
  static DDPP_INLINE void weight(const V (&w)[3], V (&t)[6]) {
    V even_a = w[0] * a_0, even_b = w[0] * b_0;
    add_product(even_a, a_2, w[2]);
    add_product(even_b, b_2, w[2]);
    t[0] = w[0];
    plus_and_minus(even_a, a_1, w[1], t[1], t[2]);
    plus_and_minus(even_b, b_1, w[1], t[3], t[4]);
    t[5] = w[2];
  }
  template <class V>
  static DDPP_INLINE void weight_transposed(const V (&t)[6], V (&w)[3]) {
    const V sum_a = t[1] + t[2], sum_b = t[3] + t[4];
    w[0] = t[0];
    add_product(w[0], a_0, sum_a);
    add_product(w[0], b_0, sum_b);
    w[1] = (t[1] - t[2]) * a_1;
    add_product(w[1], b_1, t[3] - t[4]);
    w[2] = t[5];
    add_product(w[2], a_2, sum_a);
    add_product(w[2], b_2, sum_b);
  }

 private:
  // even + x odd and even - x odd
  template <class V>
  static DDPP_INLINE void plus_and_minus(const V& even, T x, const V& odd, V& plus, V& minus) {
    plus = minus = even;
    add_product(plus, x, odd);
    add_product(minus, -x, odd);
  }
};

// The same in two dimensions: f along the columns, then along the rows.
template <int rows, int inner, class V, class F>
DDPP_INLINE void both_ways(const V (&in)[inner][inner], V (&out)[rows][rows], const F& f) {
  V half[rows][inner];
  DDPP_UNROLL_8 for (int j = 0; j < inner; ++j) {
    V column[inner], result[rows];
    DDPP_UNROLL_8 for (int i = 0; i < inner; ++i) column[i] = in[i][j];
    f(column, result);
    DDPP_UNROLL_8 for (int i = 0; i < rows; ++i) half[i][j] = result[i];
  }
  DDPP_UNROLL_8 for (int i = 0; i < rows; ++i) f(half[i], out[i]);
}

#define DDPP_FILTER(name) [](const auto& from, auto& to) DDPP_LAMBDA { Filter<T, m>::name(from, to); }

// ---- tiles ----

constexpr int kPadding = 1;

// The grid of tiles of images; tiles are counted image by image, row by row.
template <int m>
struct Grid {
  explicit Grid(const TiledImages& size)
      : size(size), down((size.height + m - 1) / m), across((size.width + m - 1) / m) {}

  // Where the pixels of a tile are, from `before` pixels above and left of it; `outside` stands for those
  // that no image has.
  template <int before, int side, class T>
  void find(int64_t tile, T* images, T* outside, T* (&at)[side][side]) const {
    const int64_t image = tile / (down * across), top = tile / across % down * m - before,
                  left = tile % across * m - before;
    for (int p = 0; p < side; ++p)
      for (int q = 0; q < side; ++q) {
        const int64_t y = top + p, x = left + q;
        const bool inside = y >= 0 && y < size.height && x >= 0 && x < size.width;
        at[p][q] = inside ? images + ((image * size.height + y) * size.width + x) * size.channels : outside;
      }
  }

  TiledImages size;
  int64_t down, across;
};

// A square of pixels, each a vector of channels at its own place, through f to (m + 2)^2 vectors `stride`
// values apart.
template <class T, int side, int a, class F>
DDPP_INLINE void transform(const T* const (&at)[side][side], int64_t channels, T* to, int64_t stride,
                           const F& f) {
  for_channels<T>(channels, [&](auto v, int64_t c) DDPP_LAMBDA {
    using V = decltype(v);
    V in[side][side], out[a][a];
    DDPP_UNROLL_8 for (int p = 0; p < side; ++p) DDPP_UNROLL_8 for (int q = 0; q < side; ++q)
        load(in[p][q], at[p][q] + c);
    both_ways(in, out, f);
    DDPP_UNROLL_8 for (int p = 0; p < a; ++p) DDPP_UNROLL_8 for (int q = 0; q < a; ++q)
        store(to + (p * a + q) * stride + c, out[p][q]);
  });
}

// A tile with its border, transformed.
template <class T, int m>
void transform_tile(const Grid<m>& grid, const T* images, int64_t tile, const T* zeros, T* to,
                    int64_t stride) {
  const T* at[m + 2][m + 2];
  grid.template find<kPadding>(tile, images, zeros, at);
  transform<T, m + 2, m + 2>(at, grid.size.channels, to, stride, DDPP_FILTER(input));
}

// The pixels of a tile from the products of its transform; `rest` takes what lies outside of the image.
template <class T, int m>
void write_tile(const Grid<m>& grid, const T* from, int64_t stride, int64_t tile, T* rest, T* images) {
  constexpr int a = m + 2;
  T* at[m][m];
  grid.template find<0>(tile, images, rest, at);
  for_channels<T>(grid.size.channels, [&](auto v, int64_t c) DDPP_LAMBDA {
    using V = decltype(v);
    V in[a][a], out[m][m];
    DDPP_UNROLL_8 for (int p = 0; p < a; ++p) DDPP_UNROLL_8 for (int q = 0; q < a; ++q)
        load(in[p][q], from + (p * a + q) * stride + c);
    both_ways(in, out, DDPP_FILTER(output));
    DDPP_UNROLL_8 for (int p = 0; p < m; ++p) DDPP_UNROLL_8 for (int q = 0; q < m; ++q)
        store(at[p][q] + c, out[p][q]);
  });
}

// Memory of this thread; kept, since fresh pages would cost more than the work in it.
template <class T>
T* thread_scratch(int64_t values) {
  thread_local Buffer<T> held;
  if (held.size() < values) held = Buffer<T>(values);
  return held.get();
}

template <class T, int m>
void output_transposed(const T* images, const TiledImages& size, Matrices<T> tiles, const Queue& queue) {
  const Grid<m> grid(size);
  parallel_for(queue, size.tiles(m), 1, [=](int64_t begin, int64_t end) {
    T* const zeros = thread_scratch<T>(size.channels);
    std::fill_n(zeros, size.channels, T(0));
    for (int64_t tile = begin; tile < end; ++tile) {
      const T* at[m][m];
      grid.template find<0>(tile, images, static_cast<const T*>(zeros), at);
      transform<T, m, m + 2>(at, size.channels, tiles.data + tile * size.channels, tiles.stride,
                             DDPP_FILTER(output_transposed));
    }
  });
}

// ---- weights ----

constexpr int64_t kWeightRows = 8;  // of one task

template <class T, int m>
void weight(const T* weight, int64_t outputs, int64_t inputs, bool backward, Matrices<T> transformed,
            const Queue& queue) {
  constexpr int a = m + 2;
  const int64_t rows = backward ? outputs : inputs, columns = backward ? inputs : outputs;
  const int64_t row_step = (backward ? inputs : 1) * kTaps, column_step = (backward ? 1 : inputs) * kTaps;
  parallel_for(queue, (rows + kWeightRows - 1) / kWeightRows, 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for_channels<T>(columns, [=](auto v, int64_t c) DDPP_LAMBDA {
        using V = decltype(v);
        constexpr int64_t width = kWidth<V, T>;
        for (int64_t row = task * kWeightRows; row < std::min(rows, (task + 1) * kWeightRows); ++row) {
          const T* from = weight + row * row_step + c * column_step;
          T* to = transformed.data + row * columns + c;
          for (int k = 0; k < a * a; ++k) __builtin_prefetch(to + k * transformed.stride + columns, 1);
          T taps[kTaps][width];
          for (int64_t i = 0; i < width; ++i) {
            __builtin_prefetch(from + (i + width) * column_step);
            for (int k = 0; k < kTaps; ++k) taps[backward ? kTaps - 1 - k : k][i] = from[i * column_step + k];
          }
          V in[3][3], out[a][a];
          for (int k = 0; k < kTaps; ++k) load(in[k / 3][k % 3], taps[k]);
          both_ways(in, out, DDPP_FILTER(weight));
          for (int p = 0; p < a; ++p)
            for (int q = 0; q < a; ++q) store(to + (p * a + q) * transformed.stride, out[p][q]);
        }
      });
  });
}

template <class T, int m>
void weight_transposed(Matrices<const T> transformed, int64_t outputs, int64_t inputs, T* weight,
                       const Queue& queue) {
  constexpr int a = m + 2;
  parallel_for(queue, outputs, kWeightRows, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for_channels<T>(inputs, [=](auto v, int64_t c) DDPP_LAMBDA {
        using V = decltype(v);
        V in[a][a], out[3][3];
        const T* from = transformed.data + row * inputs + c;
        for (int p = 0; p < a; ++p)
          for (int q = 0; q < a; ++q) load(in[p][q], from + (p * a + q) * transformed.stride);
        both_ways(in, out, DDPP_FILTER(weight_transposed));
        constexpr int64_t width = kWidth<V, T>;
        T taps[kTaps][width];
        for (int k = 0; k < kTaps; ++k) store(taps[k], out[k / 3][k % 3]);
        T* to = weight + (row * inputs + c) * kTaps;
        for (int64_t i = 0; i < width; ++i)
          for (int k = 0; k < kTaps; ++k) to[i * kTaps + k] += taps[k][i];
      });
  });
}

// ---- products of matrices ----

// Rows and registers of the block of c that one pass keeps in registers: 24 of 32, 12 of 16.
constexpr int kBlockRows = 6, kBlockVectors = DDPP_VECTOR_BYTES == 64 ? 4 : 2;
// Products in a row that one sum takes before it is added to c: the rounding errors of a sum grow with its
// length. The transforms of larger tiles multiply them, so that those are given shorter sums.
constexpr int64_t kSummed = 24, kSummedOfLargeTiles = 12;
constexpr int64_t kInner =
    160;  // of a transposed product: what of b is read again for each block stays in cache
constexpr int64_t kTaskRows = 192, kTaskColumns = 64;

// A matrix by its first element and the steps to the next row and column.
template <class T>
struct View {
  T* data;
  int64_t row, column;
};

template <class T, class V, int rows, int vectors, int64_t summed>
DDPP_INLINE void multiply_block(View<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                                int64_t inner, bool accumulate) {
  constexpr int64_t width = kWidth<V, T>;
  V sum[rows][vectors];
  DDPP_UNROLL_8 for (int r = 0; r < rows; ++r) DDPP_UNROLL_8 for (int j = 0; j < vectors; ++j) sum[r][j] =
      V{};
  for (int64_t first = 0; first == 0 || first < inner; first += summed) {
    for (int64_t k = first; k < std::min(inner, first + summed); ++k) {
      V y[vectors];
      DDPP_UNROLL_8 for (int j = 0; j < vectors; ++j) load(y[j], b + k * b_row + j * width);
      DDPP_UNROLL_8 for (int r = 0; r < rows; ++r) {
        const T x = a.data[r * a.row + k * a.column];
        DDPP_UNROLL_8 for (int j = 0; j < vectors; ++j) add_product(sum[r][j], x, y[j]);
      }
    }
    DDPP_UNROLL_8 for (int r = 0; r < rows; ++r) DDPP_UNROLL_8 for (int j = 0; j < vectors; ++j) {
      T* const to = c + r * c_row + j * width;
      V before{};
      if (accumulate || first > 0) load(before, to);
      const V total = before + sum[r][j];
      store(to, total);
      sum[r][j] -= total - before;  // what rounding took from c, for the next sum (Kahan)
    }
  }
}

// All rows of `vectors` registers' columns, in blocks of rows as equal as they can be.
template <class T, class V, int vectors, int64_t summed>
void multiply_panel(View<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                    int64_t inner, bool accumulate) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    const auto multiply = [&](auto n) DDPP_LAMBDA {
      if (count == decltype(n)::value)
        multiply_block<T, V, decltype(n)::value, vectors, summed>(
            {a.data + first * a.row, a.row, a.column}, b, b_row, c + first * c_row, c_row, inner, accumulate);
    };
    multiply(std::integral_constant<int, 6>());
    multiply(std::integral_constant<int, 5>());
    multiply(std::integral_constant<int, 4>());
    multiply(std::integral_constant<int, 3>());
    multiply(std::integral_constant<int, 2>());
    multiply(std::integral_constant<int, 1>());
  }
}

template <class T, int64_t summed>
void multiply_part(View<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                   int64_t inner, int64_t columns, bool accumulate) {
  constexpr int64_t width = kWidth<Vector<T>, T>;
  int64_t j = 0;
  for (; j + kBlockVectors * width <= columns; j += kBlockVectors * width)
    multiply_panel<T, Vector<T>, kBlockVectors, summed>(a, b + j, b_row, c + j, c_row, rows, inner,
                                                        accumulate);
  if (j + 2 * width <= columns) {
    multiply_panel<T, Vector<T>, 2, summed>(a, b + j, b_row, c + j, c_row, rows, inner, accumulate);
    j += 2 * width;
  }
  for (; j + width <= columns; j += width)
    multiply_panel<T, Vector<T>, 1, summed>(a, b + j, b_row, c + j, c_row, rows, inner, accumulate);
  for (; j < columns; ++j)
    multiply_panel<T, T, 1, summed>(a, b + j, b_row, c + j, c_row, rows, inner, accumulate);
}

template <class T>
void multiply(Matrices<const T> a, Matrices<const T> b, int64_t count, int64_t rows, int64_t inner,
              int64_t columns, bool a_transposed, bool accumulate, Matrices<T> c, const Queue& queue) {
  const int64_t part = a_transposed ? kTaskColumns : kTaskRows;
  const int64_t parts = ((a_transposed ? columns : rows) + part - 1) / part;
  parallel_for(queue, count * parts, 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const T *x = a.data + task / parts * a.stride, *y = b.data + task / parts * b.stride;
      T* z = c.data + task / parts * c.stride;
      const int64_t first = task % parts * part;
      if (!a_transposed) {
        multiply_part<T, kSummed>({x + first * inner, inner, 1}, y, columns, z + first * columns, columns,
                                  std::min(part, rows - first), inner, columns, accumulate);
        continue;
      }
      const int64_t width = std::min(part, columns - first);
      for (int64_t k = 0; k == 0 || k < inner; k += kInner)
        multiply_part<T, kSummed>({x + k * rows, 1, rows}, y + k * columns + first, columns, z + first,
                                  columns, rows, std::min(kInner, inner - k), width, accumulate || k > 0);
    }
  });
}

// ---- a convolution of few channels ----

// A row of neighbourhoods, or of an image: f(index of the neighbourhood, of the pixel) wherever the tap that
// stands `shift` pixels to the right of a neighbourhood's place lies in the image.
template <class F>
DDPP_INLINE void for_tap(int64_t columns, int64_t width, int64_t shift, const F& f) {
  for (int64_t x = std::max<int64_t>(0, -shift); x < std::min(columns, width - shift); ++x) f(x, x + shift);
}

template <class T>
void columns(const T* images, const Neighbourhoods& size, T* columns, const Queue& queue) {
  parallel_for(queue, size.n * size.rows(), 1, [=](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      T* const to = columns + line * size.columns() * size.row;
      std::fill_n(to, size.columns() * size.row, T(0));
      const T* const image = images + line / size.rows() * size.channels * size.height * size.width;
      for (int64_t tap = 0; tap < kTaps * size.channels; ++tap) {
        const int64_t v = line % size.rows() - size.pad_y + tap % kTaps / 3;
        if (v < 0 || v >= size.height) continue;
        const T* const from = image + (tap / kTaps * size.height + v) * size.width;
        for_tap(size.columns(), size.width, tap % 3 - size.pad_x,
                [=](int64_t x, int64_t u) DDPP_LAMBDA { to[x * size.row + tap] = from[u]; });
      }
    }
  });
}

template <class T>
void columns_transposed(const T* columns, const Neighbourhoods& size, T* images, const Queue& queue) {
  parallel_for(queue, size.n * size.channels, 1, [=](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* const from = columns + plane / size.channels * size.rows() * size.columns() * size.row +
                            plane % size.channels * kTaps;
      T* const image = images + plane * size.height * size.width;
      std::fill_n(image, size.height * size.width, T(0));
      for (int64_t y = 0; y < size.rows(); ++y)
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          const int64_t v = y - size.pad_y + tap / 3;
          if (v < 0 || v >= size.height) continue;
          T* const to = image + v * size.width;
          const T* const row = from + y * size.columns() * size.row + tap;
          for_tap(size.columns(), size.width, tap % 3 - size.pad_x,
                  [=](int64_t x, int64_t u) DDPP_LAMBDA { to[u] += row[x * size.row]; });
        }
    }
  });
}

// ---- the convolution ----

constexpr int64_t kBlockBytes =
    1024 << 10;  // of a block of tiles before and after the products: in the L2 cache

// Some tiles, from pixels to pixels: everything in between stays in cache.
template <class T, int m>
void convolve_block(const Convolution<T>& c, int64_t first, int64_t count, T* scratch) {
  constexpr int stages = (m + 2) * (m + 2);
  const Grid<m> grid(c.size);
  const int64_t inputs = c.size.channels, parts = c.tangent.data ? 2 : 1, half = c.size.tiles(m) / parts;
  const int64_t rows = parts * count, out_stride = rows * c.outputs + kApart;
  T *const zeros = scratch, *const rest = zeros + inputs, *const out = rest + c.outputs + kApart;
  std::fill_n(zeros, inputs, T(0));
  Matrices<T> in = c.tiles;
  int64_t part_rows = half;  // from a tile to the same one of the other part
  if (in.data) {
    in.data += first * inputs;
  } else {
    in = {out + stages * out_stride, rows * inputs + kApart};
    part_rows = count;
  }
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < count; ++k)
      transform_tile<T, m>(grid, c.x, part * half + first + k, zeros,
                           in.data + (part * part_rows + k) * inputs, in.stride);
  const int64_t lead = c.transposed ? 1 : 0;  // the part that also goes through the tangent into the other
  for (int p = 0; p < stages; ++p) {
    const auto multiply = [&](int64_t from, int64_t to, Matrices<const T> weight, bool accumulate) {
      multiply_part<T, m == 2 ? kSummed : kSummedOfLargeTiles>(
          {in.data + p * in.stride + from * part_rows * inputs, inputs, 1}, weight.data + p * weight.stride,
          c.outputs, out + p * out_stride + to * count * c.outputs, c.outputs, count, inputs, c.outputs,
          accumulate);
    };
    for (int64_t part = 0; part < parts; ++part) multiply(part, part, c.weight, false);
    if (parts == 2) multiply(lead, 1 - lead, c.tangent, true);
  }
  const Grid<m> written({c.size.n, c.outputs, c.size.height, c.size.width});
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < count; ++k)
      write_tile<T, m>(written, out + (part * count + k) * c.outputs, out_stride, part * half + first + k,
                       rest, c.y);
}

template <class T, int m>
void convolve(const Convolution<T>& c, const Queue& queue) {
  constexpr int64_t stages = (m + 2) * (m + 2);
  const int64_t parts = c.tangent.data ? 2 : 1, values = parts * (c.size.channels + c.outputs);
  const int64_t most =
      std::max<int64_t>(1, kBlockBytes / (stages * values * static_cast<int64_t>(sizeof(T))));
  parallel_for(queue, c.size.tiles(m) / parts, 1, [&](int64_t begin, int64_t end) {
    T* const scratch = thread_scratch<T>(values + kApart + stages * (most * values + 2 * kApart));
    const int64_t blocks = (end - begin + most - 1) / most;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = begin + (end - begin) * block / blocks;
      convolve_block<T, m>(c, first, begin + (end - begin) * (block + 1) / blocks - first, scratch);
    }
  });
}

// ---- m at run time ----

template <class T>
const Winograd<T> kLaunchers{
    [](const Convolution<T>& c, int m, const Queue& queue) {
      m == 2 ? convolve<T, 2>(c, queue) : convolve<T, 4>(c, queue);
    },
    [](const T* images, const TiledImages& size, int m, Matrices<T> tiles, const Queue& queue) {
      m == 2 ? output_transposed<T, 2>(images, size, tiles, queue)
             : output_transposed<T, 4>(images, size, tiles, queue);
    },
    [](const T* from, int64_t outputs, int64_t inputs, int m, bool backward, Matrices<T> to,
       const Queue& queue) {
      m == 2 ? weight<T, 2>(from, outputs, inputs, backward, to, queue)
             : weight<T, 4>(from, outputs, inputs, backward, to, queue);
    },
    [](Matrices<const T> from, int64_t outputs, int64_t inputs, int m, T* to, const Queue& queue) {
      m == 2 ? weight_transposed<T, 2>(from, outputs, inputs, to, queue)
             : weight_transposed<T, 4>(from, outputs, inputs, to, queue);
    },
    columns<T>,
    columns_transposed<T>,
    multiply<T>};

}  // namespace

template <class T>
const Winograd<T>& winograd() {
  return kLaunchers<T>;
}
template const Winograd<float>& winograd();
template const Winograd<double>& winograd();

}  // namespace DDPP_ISA
}  // namespace ddpp

DDPP_ISA_END
