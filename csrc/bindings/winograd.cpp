#include "kernels/winograd.h"

#include <optional>

#include "bindings/checks.h"

// On a GPU the vendor's library convolves: there are kernels for the CPU only.
#if defined(DDPP_FOR_CPU)

namespace ddpp {
namespace {

// ---- checks: a direct call of an op must not reach foreign memory ----

int checked_tile(int64_t m) {
  if (m != 2 && m != 4) fail("ddpp: m must be 2 or 4, got ", m);
  return static_cast<int>(m);
}

int64_t stages(int64_t m) { return (m + 2) * (m + 2); }

void check_dtype(const char* name, const Tensor& t, const Tensor& model) {
  if (t.scalar_type() != model.scalar_type())
    fail("ddpp: ", name, " must have the dtype of the first tensor");
}

TiledImages checked_images(const char* name, const Tensor& t) {
  check_floating(name, t);
  if (t.dim() != 4) fail("ddpp: ", name, " must be [N, C, H, W], got ", shape(t));
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) == 0) break;
    if (t.size(dim) != 1 && t.stride(dim) != expected)
      fail("ddpp: ", name, " must be channels last and without gaps");
    expected *= t.size(dim);
  }
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

// [count, rows, columns], of which only the matrices may stand apart.
template <class T>
Matrices<const T> checked_matrices(const char* name, const Tensor& t, int64_t count, int64_t rows,
                                   int64_t columns) {
  if (t.dim() != 3 || t.size(0) != count || t.size(1) != rows || t.size(2) != columns)
    fail("ddpp: ", name, " must be [", count, ", ", rows, ", ", columns, "], got ", shape(t));
  const bool empty = rows * columns == 0;
  if (!empty && ((columns > 1 && t.stride(2) != 1) || (rows > 1 && t.stride(1) != columns)))
    fail("ddpp: ", name, " must be without gaps inside a matrix");
  return {t.const_data_ptr<T>(), t.stride(0)};
}

template <class T>
Matrices<T> written_matrices(const char* name, Tensor& t, int64_t count, int64_t rows, int64_t columns) {
  const Matrices<const T> read = checked_matrices<T>(name, t, count, rows, columns);
  if (count > 1 && read.stride < rows * columns) fail("ddpp: ", name, " must not overlap itself");
  return {t.mutable_data_ptr<T>(), read.stride};
}

// run(T()) for the dtype of t
template <class Run>
void by_dtype(const Tensor& t, const Run& run) {
  t.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

// ---- the ops ----

void convolve_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& tangent, bool transposed,
                 int64_t m, std::optional<Tensor> tiles, Tensor y) {
  const TiledImages size = checked_images("x", x), written = checked_images("y", y);
  const int tile = checked_tile(m);
  if (written.n != size.n || written.height != size.height || written.width != size.width)
    fail("ddpp: y must have the batch and the sides of x ", shape(x), ", got ", shape(y));
  if (tangent && size.n % 2) fail("ddpp: x must hold as many values as tangents, got ", size.n, " images");
  check_dtype("y", y, x);
  by_dtype(x, [&](auto t) {
    using T = decltype(t);
    const auto factor = [&](const char* name, const Tensor& w) {
      check_dtype(name, w, x);
      return checked_matrices<T>(name, w, stages(m), size.channels, written.channels);
    };
    Convolution<T> c{
        x.const_data_ptr<T>(),  size, written.channels, factor("weight", weight), {}, transposed, {},
        y.mutable_data_ptr<T>()};
    if (tangent) c.tangent = factor("tangent", *tangent);
    if (tiles) {
      check_dtype("tiles", *tiles, x);
      c.tiles = written_matrices<T>("tiles", *tiles, stages(m), size.tiles(tile), size.channels);
    }
    winograd_cpu<T>().convolve(c, tile, Device(x).queue);
  });
}

void output_transposed_op(const Tensor& images, int64_t m, Tensor tiles) {
  const TiledImages size = checked_images("images", images);
  const int tile = checked_tile(m);
  check_dtype("tiles", tiles, images);
  by_dtype(images, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().output_transposed(
        images.const_data_ptr<T>(), size, tile,
        written_matrices<T>("tiles", tiles, stages(m), size.tiles(tile), size.channels),
        Device(images).queue);
  });
}

void check_weight(const Tensor& weight) {
  check_floating("weight", weight);
  if (weight.dim() != 4 || weight.size(2) != 3 || weight.size(3) != 3 || !weight.is_contiguous())
    fail("ddpp: weight must be [O, I, 3, 3] and contiguous, got ", shape(weight));
}

void weight_op(const Tensor& weight, int64_t m, bool backward, Tensor transformed) {
  check_weight(weight);
  const int tile = checked_tile(m);
  check_dtype("transformed", transformed, weight);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  by_dtype(weight, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().weight(weight.const_data_ptr<T>(), outputs, inputs, tile, backward,
                             written_matrices<T>("transformed", transformed, stages(m),
                                                 backward ? outputs : inputs, backward ? inputs : outputs),
                             Device(weight).queue);
  });
}

void weight_transposed_op(const Tensor& transformed, int64_t m, Tensor weight) {
  check_weight(weight);
  const int tile = checked_tile(m);
  check_dtype("transformed", transformed, weight);
  by_dtype(weight, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().weight_transposed(
        checked_matrices<T>("transformed", transformed, stages(m), weight.size(0), weight.size(1)),
        weight.size(0), weight.size(1), tile, weight.mutable_data_ptr<T>(), Device(weight).queue);
  });
}

// columns [n, pixels, row] of images [n, channels, height, width]
Neighbourhoods checked_neighbourhoods(const Tensor& images, int64_t pad_y, int64_t pad_x,
                                      const Tensor& columns) {
  check_floating("images", images);
  check_dtype("columns", columns, images);
  if (images.dim() != 4 || !images.is_contiguous())
    fail("ddpp: images must be [N, C, H, W] and contiguous, got ", shape(images));
  const Neighbourhoods size{images.size(0),
                            images.size(1),
                            images.size(2),
                            images.size(3),
                            pad_y,
                            pad_x,
                            columns.dim() == 3 ? columns.size(2) : 0};
  if (pad_y < 0 || pad_x < 0 || size.rows() < 1 || size.columns() < 1)
    fail("ddpp: images must have room for a neighbourhood of 3x3, got ", shape(images));
  if (columns.dim() != 3 || columns.size(0) != size.n || columns.size(1) != size.rows() * size.columns() ||
      size.row < 9 * size.channels || !columns.is_contiguous())
    fail("ddpp: columns must be [", size.n, ", ", size.rows() * size.columns(), ", ", 9 * size.channels,
         " or more] and contiguous, got ", shape(columns));
  return size;
}

void columns_op(const Tensor& images, int64_t pad_y, int64_t pad_x, Tensor columns) {
  const Neighbourhoods size = checked_neighbourhoods(images, pad_y, pad_x, columns);
  by_dtype(images, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().columns(images.const_data_ptr<T>(), size, columns.mutable_data_ptr<T>(),
                              Device(images).queue);
  });
}

void columns_transposed_op(const Tensor& columns, int64_t pad_y, int64_t pad_x, Tensor images) {
  const Neighbourhoods size = checked_neighbourhoods(images, pad_y, pad_x, columns);
  by_dtype(images, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().columns_transposed(columns.const_data_ptr<T>(), size, images.mutable_data_ptr<T>(),
                                         Device(images).queue);
  });
}

void multiply_op(const Tensor& a, const Tensor& b, bool a_transposed, bool accumulate, Tensor c) {
  check_floating("a", a);
  if (a.dim() != 3 || b.dim() != 3) fail("ddpp: a and b must be [count, rows, columns]");
  check_dtype("b", b, a);
  check_dtype("c", c, a);
  const int64_t count = a.size(0), columns = b.size(2);
  const int64_t rows = a.size(a_transposed ? 2 : 1), inner = a.size(a_transposed ? 1 : 2);
  by_dtype(a, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().multiply(checked_matrices<T>("a", a, count, a.size(1), a.size(2)),
                               checked_matrices<T>("b", b, count, inner, columns), count, rows, inner,
                               columns, a_transposed, accumulate,
                               written_matrices<T>("c", c, count, rows, columns), Device(a).queue);
  });
}

}  // namespace
}  // namespace ddpp

DDPP_LIBRARY(m) {
  m.impl("winograd_convolve", TORCH_BOX(&ddpp::convolve_op));
  m.impl("winograd_output_transposed", TORCH_BOX(&ddpp::output_transposed_op));
  m.impl("winograd_weight", TORCH_BOX(&ddpp::weight_op));
  m.impl("winograd_weight_transposed", TORCH_BOX(&ddpp::weight_transposed_op));
  m.impl("columns_of_images", TORCH_BOX(&ddpp::columns_op));
  m.impl("images_of_columns", TORCH_BOX(&ddpp::columns_transposed_op));
  m.impl("multiply_matrices", TORCH_BOX(&ddpp::multiply_op));
}

#endif
