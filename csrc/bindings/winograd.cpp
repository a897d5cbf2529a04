#include "kernels/winograd.h"

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

void input_op(const Tensor& images, int64_t m, Tensor tiles) {
  const TiledImages size = checked_images("images", images);
  const int tile = checked_tile(m);
  check_dtype("tiles", tiles, images);
  by_dtype(images, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().input(images.const_data_ptr<T>(), size, tile,
                            written_matrices<T>("tiles", tiles, stages(m), size.tiles(tile), size.channels),
                            Device(images).queue);
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

void input_transposed_op(const Tensor& tiles, int64_t m, Tensor images) {
  const TiledImages size = checked_images("images", images);
  const int tile = checked_tile(m);
  check_dtype("tiles", tiles, images);
  by_dtype(images, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().input_transposed(
        checked_matrices<T>("tiles", tiles, stages(m), size.tiles(tile), size.channels), size, tile,
        images.mutable_data_ptr<T>(), Device(images).queue);
  });
}

void output_op(const Tensor& tiles, int64_t m, Tensor images) {
  const TiledImages size = checked_images("images", images);
  const int tile = checked_tile(m);
  check_dtype("tiles", tiles, images);
  by_dtype(images, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().output(checked_matrices<T>("tiles", tiles, stages(m), size.tiles(tile), size.channels),
                             size, tile, images.mutable_data_ptr<T>(), Device(images).queue);
  });
}

void check_weight(const Tensor& weight) {
  check_floating("weight", weight);
  if (weight.dim() != 4 || weight.size(2) != 3 || weight.size(3) != 3 || !weight.is_contiguous())
    fail("ddpp: weight must be [O, I, 3, 3] and contiguous, got ", shape(weight));
}

void weight_op(const Tensor& weight, int64_t m, bool by_input, Tensor transformed) {
  check_weight(weight);
  const int tile = checked_tile(m);
  check_dtype("transformed", transformed, weight);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  by_dtype(weight, [&](auto t) {
    using T = decltype(t);
    winograd_cpu<T>().weight(weight.const_data_ptr<T>(), outputs, inputs, tile, by_input,
                             written_matrices<T>("transformed", transformed, stages(m),
                                                 by_input ? inputs : outputs, by_input ? outputs : inputs),
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
  m.impl("winograd_input", TORCH_BOX(&ddpp::input_op));
  m.impl("winograd_input_transposed", TORCH_BOX(&ddpp::input_transposed_op));
  m.impl("winograd_output", TORCH_BOX(&ddpp::output_op));
  m.impl("winograd_output_transposed", TORCH_BOX(&ddpp::output_transposed_op));
  m.impl("winograd_weight", TORCH_BOX(&ddpp::weight_op));
  m.impl("winograd_weight_transposed", TORCH_BOX(&ddpp::weight_transposed_op));
  m.impl("multiply_matrices", TORCH_BOX(&ddpp::multiply_op));
}

#endif
