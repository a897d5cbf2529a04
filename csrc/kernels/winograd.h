// Winograd's minimal filtering F(m x m, 3 x 3), m = 2 or 4, as stages: stride 1, one zero pixel around the
// image. Every stage has its exact transpose. ddpp/ops/winograd.py gives the formulas.
#pragma once

#include <cstdint>

#include "kernels/isa.h"
#include "kernels/queue.h"

namespace ddpp {

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

// The launchers of the CPU; T is float or double. On a GPU the vendor's library convolves. Launchers take m =
// 2 or 4; results depend neither on the number of threads nor on the run.
template <class T>
struct Winograd {
  // Tiles of the images, transformed: [tiles, channels].
  void (*input)(const T* images, const TiledImages& size, int m, Matrices<T> tiles, const Queue& queue);
  void (*input_transposed)(Matrices<const T> tiles, const TiledImages& size, int m, T* images,
                           const Queue& queue);

  // Images from their transformed tiles.
  void (*output)(Matrices<const T> tiles, const TiledImages& size, int m, T* images, const Queue& queue);
  void (*output_transposed)(const T* images, const TiledImages& size, int m, Matrices<T> tiles,
                            const Queue& queue);

  // From weight [outputs, inputs, 3, 3]: [outputs, inputs], or [inputs, outputs] if by_input.
  void (*weight)(const T* weight, int64_t outputs, int64_t inputs, int m, bool by_input,
                 Matrices<T> transformed, const Queue& queue);
  // Of [outputs, inputs].
  void (*weight_transposed)(Matrices<const T> transformed, int64_t outputs, int64_t inputs, int m, T* weight,
                            const Queue& queue);

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
