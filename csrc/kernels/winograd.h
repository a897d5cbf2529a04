// Winograd's minimal filtering F(m x m, 3 x 3), m = 2 or 4, as stages: stride 1, one zero pixel around the
// image. Every stage has its exact transpose. Source: Lavin and Gray, arXiv 1509.09308.
#pragma once

#include <cstdint>

#include "kernels/isa.h"
#include "kernels/queue.h"

namespace ddpp {

constexpr int64_t kTaps = 9;
// Values between matrices: a power of two from one to the next would make them share cache lines.
constexpr int64_t kApart = 16;

// Images are channels last, without gaps. height and width need not be multiples of m.
struct TiledImages {
  int64_t n, channels, height, width;
  int64_t tiles(int m) const { return n * ((height + m - 1) / m) * ((width + m - 1) / m); }
};

// (m + 2)^2 matrices of rows x columns values each, without gaps inside a matrix; `stride` values from one to
// the next.
template <class T>
struct Matrices {
  T* data;
  int64_t stride;
};

// Images with their channels one after the other, and zeros around them.
struct Neighbourhoods {
  int64_t n, channels, height, width, pad_y, pad_x, row;
  int64_t rows() const { return height + 2 * pad_y - 2; }
  int64_t columns() const { return width + 2 * pad_x - 2; }
};

// y = x convolved, by transformed weights [inputs, outputs]. With a tangent, the batch holds values and then
// as many tangents, whose map is (weight, 0; tangent, weight), or (weight, tangent; 0, weight) if transposed.
template <class T>
struct Convolution {
  const T* x;
  TiledImages size;  // of x
  int64_t outputs;
  Matrices<const T> weight, tangent;  // tangent.data may be null
  bool transposed;
  Matrices<T> tiles;  // where to leave the transformed tiles of x [tiles, inputs]; data may be null
  T* y;
};

// The launchers of the CPU; T is float or double. On a GPU the vendor's library convolves. Launchers take m =
// 2 or 4; results depend neither on the number of threads nor on the run.
template <class T>
struct Winograd {
  void (*convolve)(const Convolution<T>& convolution, int m, const Queue& queue);

  // What the gradient of an image's tiles is behind the products: [tiles, channels].
  void (*output_transposed)(const T* images, const TiledImages& size, int m, Matrices<T> tiles,
                            const Queue& queue);

  // From weight [outputs, inputs, 3, 3]: [inputs, outputs], or, for the input gradient, [outputs, inputs] of
  // the weight turned by 180 degrees.
  void (*weight)(const T* weight, int64_t outputs, int64_t inputs, int m, bool backward,
                 Matrices<T> transformed, const Queue& queue);
  // Of [outputs, inputs]; added to the weight.
  void (*weight_transposed)(Matrices<const T> transformed, int64_t outputs, int64_t inputs, int m, T* weight,
                            const Queue& queue);

  // The 3x3 neighbourhood of each pixel of images [n, channels, height, width] with zeros around it, as a row
  // of `row` values, channel by channel and then zeros; its transpose leaves the sums in the images. A
  // convolution of few channels is a product with these.
  void (*columns)(const T* images, const Neighbourhoods& size, T* columns, const Queue& queue);
  void (*columns_transposed)(const T* columns, const Neighbourhoods& size, T* images, const Queue& queue);

  // c = a b, or c += a b, for `count` matrices: a is [rows, inner], or [inner, rows] if a_transposed,
  // b [inner, columns].
  void (*multiply)(Matrices<const T> a, Matrices<const T> b, int64_t count, int64_t rows, int64_t inner,
                   int64_t columns, bool a_transposed, bool accumulate, Matrices<T> c, const Queue& queue);
};

DDPP_PER_ISA(template <class T> const Winograd<T>& winograd();)

template <class T>
const Winograd<T>& winograd_cpu(Isa isa = active_isa()) {
  return DDPP_SELECT(isa, winograd<T>());
}

}  // namespace ddpp
