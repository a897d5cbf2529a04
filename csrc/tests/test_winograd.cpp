#include "kernels/winograd.h"

#include <cmath>
#include <random>
#include <utility>

#include "check.h"

namespace ddpp::test {
namespace {

template <class T>
Array<T> random_array(int64_t n) {
  Array<T> array(n, 1);
  std::mt19937 draw(static_cast<unsigned>(n));
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int64_t i = 0; i < n; ++i) array[i] = static_cast<T>(uniform(draw));
  return array;
}

// (m + 2)^2 matrices that stand 3 values apart; what lies between them must stay as it is.
template <class T>
struct Transformed {
  Transformed(int m, int64_t rows, int64_t columns)
      : size(rows * columns), array((m + 2) * (m + 2) * (size + 3) - 3) {}
  Matrices<T> data() { return {array.data(), size + 3}; }
  Matrices<const T> data() const { return {array.data(), size + 3}; }
  int64_t size;
  Array<T> array;
};

struct Case {
  TiledImages size;  // of the input
  int64_t outputs;
  TiledImages output() const { return {size.n, outputs, size.height, size.width}; }
  int64_t values() const { return size.n * size.height * size.width * size.channels; }
  int64_t output_values() const { return size.n * size.height * size.width * outputs; }
};

// visit(output value, input value, weight) for every product of the convolution
template <class Visit>
void each_product(const Case& c, const Visit& visit) {
  const TiledImages& s = c.size;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t y = 0; y < s.height; ++y)
      for (int64_t x = 0; x < s.width; ++x)
        for (int64_t k = 0; k < 9; ++k) {
          const int64_t v = y + k / 3 - 1, u = x + k % 3 - 1;
          if (v < 0 || v >= s.height || u < 0 || u >= s.width) continue;
          for (int64_t o = 0; o < c.outputs; ++o)
            for (int64_t i = 0; i < s.channels; ++i)
              visit(((n * s.height + y) * s.width + x) * c.outputs + o,
                    ((n * s.height + v) * s.width + u) * s.channels + i, (o * s.channels + i) * 9 + k);
        }
}

template <class T>
void check_close(const char* what, const Array<T>& found, const std::vector<double>& wanted) {
  double largest = 1e-300, worst = 0;
  for (const double w : wanted) largest = std::max(largest, std::abs(w));
  for (int64_t i = 0; i < found.size(); ++i) {
    CHECK(!std::isnan(static_cast<double>(found[i])));
    worst = std::max(worst, std::abs(static_cast<double>(found[i]) - wanted[i]));
  }
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  if (worst > tolerance * largest) std::printf("%s: off by %g of %g\n", what, worst, largest);
  CHECK(worst <= tolerance * largest);
}

template <class T>
struct Results {
  explicit Results(const Case& c)
      : y(c.output_values(), 1), d_x(c.values(), 1), d_weight(c.outputs * c.size.channels * 9, 1) {}
  Array<T> y, d_x, d_weight;
};

// The convolution, its input gradient and its weight gradient.
template <class T>
Results<T> convolve(const Case& c, int m, const Array<T>& x, const Array<T>& weight, const Array<T>& grad,
                    const Queue& queue) {
  const Winograd<T>& w = winograd_cpu<T>();
  const int64_t count = (m + 2) * (m + 2), tiles = c.size.tiles(m), inputs = c.size.channels;
  Transformed<T> in(m, tiles, inputs), d_out(m, tiles, c.outputs), forward(m, inputs, c.outputs),
      backward(m, c.outputs, inputs), d_weight(m, c.outputs, inputs);
  Results<T> results(c);
  w.weight(weight.data(), c.outputs, inputs, m, false, forward.data(), queue);
  w.weight(weight.data(), c.outputs, inputs, m, true, backward.data(), queue);
  w.convolve(
      {x.data(), c.size, c.outputs, std::as_const(forward).data(), {}, false, in.data(), results.y.data()}, m,
      queue);
  w.convolve(
      {grad.data(), c.output(), inputs, std::as_const(backward).data(), {}, false, {}, results.d_x.data()}, m,
      queue);
  w.output_transposed(grad.data(), c.output(), m, d_out.data(), queue);
  w.multiply(std::as_const(d_out).data(), std::as_const(in).data(), count, c.outputs, tiles, inputs, true,
             false, d_weight.data(), queue);
  std::fill_n(results.d_weight.data(), results.d_weight.size(), T(0));
  w.weight_transposed(std::as_const(d_weight).data(), c.outputs, inputs, m, results.d_weight.data(), queue);
  const Array<T>& spaced = in.array;
  for (int64_t i = in.size; i < spaced.size(); i += in.size + 3)
    CHECK(std::isnan(static_cast<double>(spaced[i])));
  return results;
}

template <class T>
void check_convolution(const Setting& setting, const Case& c, int m) {
  const auto x = random_array<T>(c.values()), weight = random_array<T>(c.outputs * c.size.channels * 9);
  const auto grad = random_array<T>(c.output_values());
  std::vector<double> y(c.output_values()), d_x(c.values()), d_weight(c.outputs * c.size.channels * 9);
  each_product(c, [&](int64_t o, int64_t i, int64_t k) {
    y[o] += static_cast<double>(x[i]) * weight[k];
    d_x[i] += static_cast<double>(grad[o]) * weight[k];
    d_weight[k] += static_cast<double>(grad[o]) * x[i];
  });
  const Results<T> first = convolve(c, m, x, weight, grad, setting.queues[0]);
  check_close("convolution", first.y, y);
  check_close("input gradient", first.d_x, d_x);
  check_close("weight gradient", first.d_weight, d_weight);
  for (const Queue& queue : setting.queues) {
    const Results<T> other = convolve(c, m, x, weight, grad, queue);
    CHECK(other.y.same_bits(first.y) && other.d_x.same_bits(first.d_x) &&
          other.d_weight.same_bits(first.d_weight));
  }
}

// The length of the error of a convolution, as a part of its length.
template <class T>
void check_error(const Setting& setting, int m, double most) {
  const Case c{{1, 128, 8, 8}, 128};
  const auto x = random_array<T>(c.values()), weight = random_array<T>(c.outputs * c.size.channels * 9);
  const auto grad = random_array<T>(c.output_values());
  std::vector<double> wanted(c.output_values());
  each_product(c,
               [&](int64_t o, int64_t i, int64_t k) { wanted[o] += static_cast<double>(x[i]) * weight[k]; });
  const Results<T> found = convolve(c, m, x, weight, grad, setting.queues[0]);
  double off = 0, length = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    off += std::pow(static_cast<double>(found.y[i]) - wanted[i], 2);
    length += wanted[i] * wanted[i];
  }
  CHECK(std::sqrt(off / length) < most);
}

// What is written stands added to what was there.
template <class T>
void check_adding(const Setting& setting, int m) {
  const int64_t outputs = 3, inputs = 17, count = (m + 2) * (m + 2);
  const auto transformed = random_array<T>(count * outputs * inputs),
             before = random_array<T>(outputs * inputs * 9);
  Array<T> alone(before.size()), added(before.size());
  std::vector<double> wanted(before.size());
  std::fill_n(alone.data(), alone.size(), T(0));
  std::copy_n(before.data(), before.size(), added.data());
  for (Array<T>* weight : {&alone, &added})
    winograd_cpu<T>().weight_transposed({transformed.data(), outputs * inputs}, outputs, inputs, m,
                                        weight->data(), setting.queues[0]);
  for (int64_t i = 0; i < before.size(); ++i) wanted[i] = static_cast<double>(before[i]) + alone[i];
  check_close("sum of weights", added, wanted);
}

// The first half of the images are values, the second their tangents.
template <class T>
void check_dual(const Setting& setting, const Case& c, int m, bool transposed) {
  const int64_t inputs = c.size.channels, values = c.values() / 2, outputs = c.output_values() / 2;
  const auto x = random_array<T>(c.values()), weight = random_array<T>(c.outputs * inputs * 9);
  Array<T> tangent(weight.size());
  for (int64_t i = 0; i < weight.size(); ++i) tangent[i] = weight[weight.size() - 1 - i];
  std::vector<double> wanted(c.output_values());
  const Case half{{c.size.n / 2, inputs, c.size.height, c.size.width}, c.outputs};
  each_product(half, [&](int64_t o, int64_t i, int64_t k) {
    const int64_t from = transposed ? values : 0, to = transposed ? 0 : outputs;  // through the tangent
    wanted[o] += static_cast<double>(x[i]) * weight[k];
    wanted[outputs + o] += static_cast<double>(x[values + i]) * weight[k];
    wanted[to + o] += static_cast<double>(x[from + i]) * tangent[k];
  });
  Transformed<T> w(m, inputs, c.outputs), w_tangent(m, inputs, c.outputs);
  for (const Queue& queue : setting.queues) {
    const Winograd<T>& launchers = winograd_cpu<T>();
    launchers.weight(weight.data(), c.outputs, inputs, m, false, w.data(), queue);
    launchers.weight(tangent.data(), c.outputs, inputs, m, false, w_tangent.data(), queue);
    Array<T> y(c.output_values(), 1);
    launchers.convolve({x.data(),
                        c.size,
                        c.outputs,
                        std::as_const(w).data(),
                        std::as_const(w_tangent).data(),
                        transposed,
                        {},
                        y.data()},
                       m, queue);
    check_close("values and tangents", y, wanted);
  }
}

template <class T>
void check_columns(const Setting& setting, const Neighbourhoods& size) {
  const int64_t pixels = size.rows() * size.columns();
  const auto images = random_array<T>(size.n * size.channels * size.height * size.width);
  const auto columns = random_array<T>(size.n * pixels * size.row);
  std::vector<double> laid_out(columns.size()), folded(images.size());
  for (int64_t i = 0; i < size.n * pixels; ++i)
    for (int64_t k = 0; k < 9 * size.channels; ++k) {
      const int64_t y = i % pixels / size.columns() - size.pad_y + k % 9 / 3;
      const int64_t x = i % size.columns() - size.pad_x + k % 3;
      if (y < 0 || y >= size.height || x < 0 || x >= size.width) continue;
      const int64_t at = ((i / pixels * size.channels + k / 9) * size.height + y) * size.width + x;
      laid_out[i * size.row + k] = images[at];
      folded[at] += columns[i * size.row + k];
    }
  for (const Queue& queue : setting.queues) {
    Array<T> rows(columns.size()), sums(images.size());
    winograd_cpu<T>().columns(images.data(), size, rows.data(), queue);
    winograd_cpu<T>().columns_transposed(columns.data(), size, sums.data(), queue);
    check_close("columns", rows, laid_out);
    check_close("images of columns", sums, folded);
  }
}

template <class T>
void check_product(const Setting& setting, int64_t rows, int64_t inner, int64_t columns) {
  const int64_t count = 2;
  for (const bool transposed : {false, true})
    for (const bool accumulate : {false, true}) {
      const auto a = random_array<T>(count * rows * inner), b = random_array<T>(count * inner * columns);
      const auto before = random_array<T>(count * rows * columns);
      std::vector<double> wanted(before.size());
      for (int64_t z = 0; z < count; ++z)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < columns; ++j) {
            double& sum = wanted[(z * rows + r) * columns + j];
            sum = accumulate ? before[(z * rows + r) * columns + j] : 0;
            for (int64_t k = 0; k < inner; ++k)
              sum += static_cast<double>(a[z * rows * inner + (transposed ? k * rows + r : r * inner + k)]) *
                     b[(z * inner + k) * columns + j];
          }
      Array<T> c(before.size(), 1);
      if (accumulate) std::copy_n(before.data(), before.size(), c.data());
      winograd_cpu<T>().multiply({a.data(), rows * inner}, {b.data(), inner * columns}, count, rows, inner,
                                 columns, transposed, accumulate, {c.data(), rows * columns},
                                 setting.queues.back());
      check_close("product", c, wanted);
    }
}

// A long sum of positive products is as near as its last rounding and those of a short sum.
template <class T>
void check_long_sum(const Setting& setting, double most) {
  const int64_t inner = 20000, columns = 83;
  auto a = random_array<T>(inner), b = random_array<T>(inner * columns);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = std::abs(a[i]);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = std::abs(b[i]);
  Array<T> c(columns);
  winograd_cpu<T>().multiply({a.data(), 0}, {b.data(), 0}, 1, 1, inner, columns, false, false, {c.data(), 0},
                             setting.queues[0]);
  for (int64_t j = 0; j < columns; ++j) {
    double wanted = 0;
    for (int64_t k = 0; k < inner; ++k) wanted += static_cast<double>(a[k]) * b[k * columns + j];
    CHECK(std::abs(c[j] / wanted - 1) < most);
  }
}

template <class T>
void check_all(const Setting& setting) {
  for (const int m : {2, 4}) {
    for (const int64_t channels : {1, 3, 16, 20, 37})
      check_convolution<T>(setting, {{2, channels, 6, 9}, 18}, m);
    for (const int64_t side : {1, 2, 3, 4, 5, 8})
      check_convolution<T>(setting, {{3, 8, side, side + 1}, 5}, m);
    check_convolution<T>(setting, {{0, 8, 4, 4}, 5}, m);
    check_convolution<T>(setting, {{9, 32, 8, 8}, 64}, m);
    for (const bool transposed : {false, true}) {
      check_dual<T>(setting, {{4, 5, 6, 7}, 18}, m, transposed);
      check_dual<T>(setting, {{2, 20, 49, 50}, 33}, m, transposed);  // more than one block of tiles
    }
  }
  for (const int m : {2, 4}) check_adding<T>(setting, m);
  check_columns<T>(setting, {2, 3, 5, 4, 1, 1, 32});
  check_columns<T>(setting, {1, 1, 1, 7, 3, 2, 9});
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 200})
    for (const int64_t columns : {1, 8, 17, 32, 64, 83}) check_product<T>(setting, rows, 11, columns);
  check_product<T>(setting, 7, 0, 9);
  check_product<T>(setting, 7, 331, 70);  // more than is kept in cache at once
}

}  // namespace
}  // namespace ddpp::test

int main(int argc, char** argv) {
  const ddpp::test::Setting setting = ddpp::test::setting(argc, argv);
  ddpp::test::check_all<float>(setting);
  ddpp::test::check_all<double>(setting);
  ddpp::test::check_error<float>(setting, 2, 2.5e-7);
  ddpp::test::check_error<float>(setting, 4, 8e-7);
  ddpp::test::check_long_sum<float>(setting, 2e-7);
  return 0;
}
