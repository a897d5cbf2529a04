#include "kernels/winograd.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

#define DDPP_UNROLL _Pragma("GCC unroll 8")

// As wide as the registers. By reference, so that none crosses an ABI.
template <class T>
using Vector __attribute__((vector_size(DDPP_VECTOR_BYTES))) = T;

// Values side by side that one pass handles: a register of them, or one of the rest.
template <class V, class T>
constexpr int64_t kWidth = sizeof(V) / sizeof(T);

template <class V, class T>
DDPP_ALWAYS_INLINE void load(V& v, const T* from) {
  std::memcpy(&v, from, sizeof v);
}
template <class V, class T>
DDPP_ALWAYS_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

// body.template operator()<V>(c) for all channels c, in steps of a register, then one by one.
template <class T, class Body>
DDPP_ALWAYS_INLINE void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kWidth<Vector<T>, T> <= channels; c += kWidth<Vector<T>, T>) body(Vector<T>{}, c);
  for (; c < channels; ++c) body(T{}, c);
}

// ---- the matrices of F(m, 3): out = At ((Bt in B) * (G w Gt)) A ----

template <int m>
struct Filter;
template <>
struct Filter<2> {
  static constexpr double bt[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
  static constexpr double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  static constexpr double at[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};
};
template <>
struct Filter<4> {
  static constexpr double bt[6][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                      {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr double g[6][3] = {{1. / 4, 0, 0},
                                     {-1. / 6, -1. / 6, -1. / 6},
                                     {-1. / 6, 1. / 6, -1. / 6},
                                     {1. / 24, 1. / 12, 1. / 6},
                                     {1. / 24, -1. / 12, 1. / 6},
                                     {0, 0, 1}};
  static constexpr double at[4][6] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};

// out = L in Lt; l(i, k) is known at compile time, so that zeros and ones cost nothing.
template <class T, int rows, int inner, class V, class L>
DDPP_ALWAYS_INLINE void sandwich(const V (&in)[inner][inner], V (&out)[rows][rows], const L& l) {
  const auto combine = [&l](int row, const auto& term, V& sum) __attribute__((always_inline)) {
    sum = V{};
    DDPP_UNROLL for (int k = 0; k < inner; ++k) {
      const T c = static_cast<T>(l(row, k));
      if (c == 1) {
        sum += term(k);
      } else if (c == -1) {
        sum -= term(k);
      } else if (c != 0) {
        sum += c * term(k);
      }
    }
  };
  V half[rows][inner];
  DDPP_UNROLL for (int i = 0; i < rows; ++i) DDPP_UNROLL for (int j = 0; j < inner; ++j)
      combine(i, [&](int k) -> const V& { return in[k][j]; }, half[i][j]);
  DDPP_UNROLL for (int i = 0; i < rows; ++i) DDPP_UNROLL for (int j = 0; j < rows; ++j)
      combine(j, [&](int k) -> const V& { return half[i][k]; }, out[i][j]);
}

// ---- tiles ----

constexpr int kPadding = 1;

// body(image, tile, y, x) for each tile, its number and its first pixel; a task is a row of tiles.
template <int m, class Body>
void for_tile_rows(const TiledImages& size, const Queue& queue, const Body& body) {
  const int64_t down = (size.height + m - 1) / m, across = (size.width + m - 1) / m;
  parallel_for(queue, size.n * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t j = 0; j < across; ++j) body(row / down, row * across + j, row % down * m, j * m);
  });
}

template <class T, int m>
void input(const T* images, const TiledImages& size, Matrices<T> tiles, const Queue& queue) {
  constexpr int a = m + 2;
  for_tile_rows<m>(size, queue, [=](int64_t image, int64_t tile, int64_t top, int64_t left) {
    for_channels<T>(size.channels, [=](auto v, int64_t c) __attribute__((always_inline)) {
      using V = decltype(v);
      V in[a][a], out[a][a];
      for (int p = 0; p < a; ++p)
        for (int q = 0; q < a; ++q) {
          const int64_t y = top + p - kPadding, x = left + q - kPadding;
          in[p][q] = V{};
          if (y >= 0 && y < size.height && x >= 0 && x < size.width)
            load(in[p][q], images + ((image * size.height + y) * size.width + x) * size.channels + c);
        }
      sandwich<T, a, a>(in, out, [](int i, int k) { return Filter<m>::bt[i][k]; });
      T* to = tiles.data + tile * size.channels + c;
      for (int p = 0; p < a; ++p)
        for (int q = 0; q < a; ++q) store(to + (p * a + q) * tiles.stride, out[p][q]);
    });
  });
}

template <class T, int m>
void input_transposed(Matrices<const T> tiles, const TiledImages& size, T* images, const Queue& queue) {
  constexpr int a = m + 2;
  const int64_t down = (size.height + m - 1) / m, across = (size.width + m - 1) / m;
  const int64_t values = size.height * size.width * size.channels;
  parallel_for(queue, size.n, 1, [=](int64_t begin, int64_t end) {  // tiles overlap: an image has one thread
    for (int64_t image = begin; image < end; ++image) {
      std::fill_n(images + image * values, values, T(0));
      for (int64_t k = 0; k < down * across; ++k) {
        const int64_t top = k / across * m, left = k % across * m;
        for_channels<T>(size.channels, [=](auto v, int64_t c) __attribute__((always_inline)) {
          using V = decltype(v);
          V in[a][a], out[a][a];
          const T* from = tiles.data + (image * down * across + k) * size.channels + c;
          for (int p = 0; p < a; ++p)
            for (int q = 0; q < a; ++q) load(in[p][q], from + (p * a + q) * tiles.stride);
          sandwich<T, a, a>(in, out, [](int i, int k) { return Filter<m>::bt[k][i]; });
          for (int p = 0; p < a; ++p)
            for (int q = 0; q < a; ++q) {
              const int64_t y = top + p - kPadding, x = left + q - kPadding;
              if (y < 0 || y >= size.height || x < 0 || x >= size.width) continue;
              T* to = images + image * values + (y * size.width + x) * size.channels + c;
              V sum;
              load(sum, to);
              sum += out[p][q];
              store(to, sum);
            }
        });
      }
    }
  });
}

template <class T, int m>
void output(Matrices<const T> tiles, const TiledImages& size, T* images, const Queue& queue) {
  constexpr int a = m + 2;
  for_tile_rows<m>(size, queue, [=](int64_t image, int64_t tile, int64_t top, int64_t left) {
    for_channels<T>(size.channels, [=](auto v, int64_t c) __attribute__((always_inline)) {
      using V = decltype(v);
      V in[a][a], out[m][m];
      const T* from = tiles.data + tile * size.channels + c;
      for (int p = 0; p < a; ++p)
        for (int q = 0; q < a; ++q) load(in[p][q], from + (p * a + q) * tiles.stride);
      sandwich<T, m, a>(in, out, [](int i, int k) { return Filter<m>::at[i][k]; });
      for (int p = 0; p < m && top + p < size.height; ++p)
        for (int q = 0; q < m && left + q < size.width; ++q)
          store(images + ((image * size.height + top + p) * size.width + left + q) * size.channels + c,
                out[p][q]);
    });
  });
}

template <class T, int m>
void output_transposed(const T* images, const TiledImages& size, Matrices<T> tiles, const Queue& queue) {
  constexpr int a = m + 2;
  for_tile_rows<m>(size, queue, [=](int64_t image, int64_t tile, int64_t top, int64_t left) {
    for_channels<T>(size.channels, [=](auto v, int64_t c) __attribute__((always_inline)) {
      using V = decltype(v);
      V in[m][m], out[a][a];
      for (int p = 0; p < m; ++p)
        for (int q = 0; q < m; ++q) {
          in[p][q] = V{};
          if (top + p < size.height && left + q < size.width)
            load(in[p][q],
                 images + ((image * size.height + top + p) * size.width + left + q) * size.channels + c);
        }
      sandwich<T, a, m>(in, out, [](int i, int k) { return Filter<m>::at[k][i]; });
      T* to = tiles.data + tile * size.channels + c;
      for (int p = 0; p < a; ++p)
        for (int q = 0; q < a; ++q) store(to + (p * a + q) * tiles.stride, out[p][q]);
    });
  });
}

// ---- weights ----

constexpr int kTaps = 9;
constexpr int64_t kWeightRows = 8;  // of one task

// One of the matrices' rows belongs to an output (or, by_input, to an input); its columns are the other.
template <class T, int m>
void weight(const T* weight, int64_t outputs, int64_t inputs, bool by_input, Matrices<T> transformed,
            const Queue& queue) {
  constexpr int a = m + 2;
  const int64_t rows = by_input ? inputs : outputs, columns = by_input ? outputs : inputs;
  const int64_t row_step = (by_input ? 1 : inputs) * kTaps, column_step = (by_input ? inputs : 1) * kTaps;
  parallel_for(queue, (rows + kWeightRows - 1) / kWeightRows, 1, [=](int64_t begin, int64_t end) {
    std::vector<T> taps(kTaps * kWeightRows * columns);  // [kTaps, kWeightRows, columns]
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kWeightRows, count = std::min(kWeightRows, rows - first);
      for (int64_t column = 0; column < columns; ++column)
        for (int64_t row = 0; row < count; ++row)
          for (int64_t k = 0; k < kTaps; ++k)
            taps[(k * kWeightRows + row) * columns + column] =
                weight[(first + row) * row_step + column * column_step + k];
      const T* from = taps.data();
      for (int64_t row = 0; row < count; ++row)
        for_channels<T>(columns, [=](auto v, int64_t c) __attribute__((always_inline)) {
          using V = decltype(v);
          V in[3][3], out[a][a];
          for (int k = 0; k < kTaps; ++k)
            load(in[k / 3][k % 3], from + (k * kWeightRows + row) * columns + c);
          sandwich<T, a, 3>(in, out, [](int i, int k) { return Filter<m>::g[i][k]; });
          T* to = transformed.data + (first + row) * columns + c;
          for (int p = 0; p < a; ++p)
            for (int q = 0; q < a; ++q) store(to + (p * a + q) * transformed.stride, out[p][q]);
        });
    }
  });
}

template <class T, int m>
void weight_transposed(Matrices<const T> transformed, int64_t outputs, int64_t inputs, T* weight,
                       const Queue& queue) {
  constexpr int a = m + 2;
  parallel_for(queue, outputs, kWeightRows, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for_channels<T>(inputs, [=](auto v, int64_t c) __attribute__((always_inline)) {
        using V = decltype(v);
        V in[a][a], out[3][3];
        const T* from = transformed.data + row * inputs + c;
        for (int p = 0; p < a; ++p)
          for (int q = 0; q < a; ++q) load(in[p][q], from + (p * a + q) * transformed.stride);
        sandwich<T, 3, a>(in, out, [](int i, int k) { return Filter<m>::g[k][i]; });
        constexpr int64_t width = kWidth<V, T>;
        T taps[kTaps][width];
        for (int k = 0; k < kTaps; ++k) store(taps[k], out[k / 3][k % 3]);
        T* to = weight + (row * inputs + c) * kTaps;
        for (int64_t i = 0; i < width; ++i)
          for (int k = 0; k < kTaps; ++k) to[i * kTaps + k] = taps[k][i];
      });
  });
}

// ---- products of matrices ----

// Rows and registers of the block of c that one pass keeps in registers: 24 of 32, 12 of 16.
constexpr int kBlockRows = 6, kBlockVectors = DDPP_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kInner =
    160;  // of a transposed product: what of b is read again for each block stays in cache
constexpr int64_t kTaskRows = 192, kTaskColumns = 64;

template <class V, class T>
DDPP_ALWAYS_INLINE void add_product(V& sum, T x, const V& y) {
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

// A matrix by its first element and the steps to the next row and column.
template <class T>
struct View {
  T* data;
  int64_t row, column;
};

template <class T, class V, int rows, int vectors>
DDPP_ALWAYS_INLINE void multiply_block(View<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                                       int64_t inner, bool accumulate) {
  constexpr int64_t width = kWidth<V, T>;
  V sum[rows][vectors];
  DDPP_UNROLL for (int r = 0; r < rows; ++r) DDPP_UNROLL for (int j = 0; j < vectors; ++j) {
    sum[r][j] = V{};
    if (accumulate) load(sum[r][j], c + r * c_row + j * width);
  }
  for (int64_t k = 0; k < inner; ++k) {
    V y[vectors];
    DDPP_UNROLL for (int j = 0; j < vectors; ++j) load(y[j], b + k * b_row + j * width);
    DDPP_UNROLL for (int r = 0; r < rows; ++r) {
      const T x = a.data[r * a.row + k * a.column];
      DDPP_UNROLL for (int j = 0; j < vectors; ++j) add_product(sum[r][j], x, y[j]);
    }
  }
  DDPP_UNROLL for (int r = 0; r < rows; ++r) DDPP_UNROLL for (int j = 0; j < vectors; ++j)
      store(c + r * c_row + j * width, sum[r][j]);
}

// All rows of `vectors` registers' columns.
template <class T, class V, int vectors>
void multiply_panel(View<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                    int64_t inner, bool accumulate) {
  int64_t r = 0;
  const auto block = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    for (; r + n <= rows; r += n)
      multiply_block<T, V, n, vectors>({a.data + r * a.row, a.row, a.column}, b, b_row, c + r * c_row, c_row,
                                       inner, accumulate);
  };
  block(std::integral_constant<int, kBlockRows>());
  block(std::integral_constant<int, 3>());
  block(std::integral_constant<int, 1>());
}

template <class T>
void multiply_part(View<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                   int64_t inner, int64_t columns, bool accumulate) {
  constexpr int64_t width = kWidth<Vector<T>, T>;
  int64_t j = 0;
  for (; j + kBlockVectors * width <= columns; j += kBlockVectors * width)
    multiply_panel<T, Vector<T>, kBlockVectors>(a, b + j, b_row, c + j, c_row, rows, inner, accumulate);
  for (; j + width <= columns; j += width)
    multiply_panel<T, Vector<T>, 1>(a, b + j, b_row, c + j, c_row, rows, inner, accumulate);
  for (; j < columns; ++j) multiply_panel<T, T, 1>(a, b + j, b_row, c + j, c_row, rows, inner, accumulate);
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
        multiply_part<T>({x + first * inner, inner, 1}, y, columns, z + first * columns, columns,
                         std::min(part, rows - first), inner, columns, accumulate);
        continue;
      }
      const int64_t width = std::min(part, columns - first);
      for (int64_t k = 0; k == 0 || k < inner; k += kInner)
        multiply_part<T>({x + k * rows, 1, rows}, y + k * columns + first, columns, z + first, columns, rows,
                         std::min(kInner, inner - k), width, accumulate || k > 0);
    }
  });
}

// ---- m at run time ----

template <class T>
const Winograd<T> kLaunchers{
    [](const T* images, const TiledImages& size, int m, Matrices<T> tiles, const Queue& queue) {
      m == 2 ? input<T, 2>(images, size, tiles, queue) : input<T, 4>(images, size, tiles, queue);
    },
    [](Matrices<const T> tiles, const TiledImages& size, int m, T* images, const Queue& queue) {
      m == 2 ? input_transposed<T, 2>(tiles, size, images, queue)
             : input_transposed<T, 4>(tiles, size, images, queue);
    },
    [](Matrices<const T> tiles, const TiledImages& size, int m, T* images, const Queue& queue) {
      m == 2 ? output<T, 2>(tiles, size, images, queue) : output<T, 4>(tiles, size, images, queue);
    },
    [](const T* images, const TiledImages& size, int m, Matrices<T> tiles, const Queue& queue) {
      m == 2 ? output_transposed<T, 2>(images, size, tiles, queue)
             : output_transposed<T, 4>(images, size, tiles, queue);
    },
    [](const T* from, int64_t outputs, int64_t inputs, int m, bool by_input, Matrices<T> to,
       const Queue& queue) {
      m == 2 ? weight<T, 2>(from, outputs, inputs, by_input, to, queue)
             : weight<T, 4>(from, outputs, inputs, by_input, to, queue);
    },
    [](Matrices<const T> from, int64_t outputs, int64_t inputs, int m, T* to, const Queue& queue) {
      m == 2 ? weight_transposed<T, 2>(from, outputs, inputs, to, queue)
             : weight_transposed<T, 4>(from, outputs, inputs, to, queue);
    },
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
