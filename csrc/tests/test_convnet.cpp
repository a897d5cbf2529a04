#include "kernels/convnet.h"

#include <cmath>
#include <functional>
#include <random>

#include "check.h"

namespace ddpp::test {
namespace {

using Vector = std::vector<double>;

Vector random_vector(int64_t n, unsigned seed, double scale = 1) {
  Vector values(n);
  std::mt19937 draw(seed);
  std::uniform_real_distribution<double> uniform(-scale, scale);
  for (double& value : values) value = uniform(draw);
  return values;
}

template <class T>
Array<T> as_array(const Vector& values) {
  Array<T> array(static_cast<int64_t>(values.size()), 1);
  for (int64_t i = 0; i < array.size(); ++i) array[i] = static_cast<T>(values[i]);
  return array;
}

// ---- the network, written down once more with plain loops ----

// Planes [channels, rows, columns] of one image.
struct Planes {
  int64_t channels, rows, columns;
  Vector values;
  double& at(int64_t c, int64_t y, int64_t x) { return values[(c * rows + y) * columns + x]; }
  double padded(int64_t c, int64_t y, int64_t x) const {
    return y < 0 || y >= rows || x < 0 || x >= columns ? 0 : values[(c * rows + y) * columns + x];
  }
};

Planes planes(int64_t channels, int64_t rows, int64_t columns) {
  return {channels, rows, columns, Vector(channels * rows * columns)};
}

Planes block(const ConvNetSize& size, int64_t k, const double* theta, const Planes& x) {
  const int64_t pad_y = k ? 1 : size.pad_y, pad_x = k ? 1 : size.pad_x;
  Planes out = planes(size.filters, size.rows(k) / 2, size.columns(k) / 2);
  for (int64_t c = 0; c < size.filters; ++c) {
    Planes y = planes(1, size.rows(k), size.columns(k));
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < y.rows; ++i)
      for (int64_t j = 0; j < y.columns; ++j) {
        for (int64_t from = 0; from < x.channels; ++from)
          for (int64_t tap = 0; tap < 9; ++tap)
            y.at(0, i, j) += theta[size.weight(k) + (c * x.channels + from) * 9 + tap] *
                             x.padded(from, i - pad_y + tap / 3, j - pad_x + tap % 3);
        mean += y.at(0, i, j) / (y.rows * y.columns);
      }
    for (const double v : y.values) variance += (v - mean) * (v - mean) / (y.rows * y.columns);
    const double gain = theta[size.scale(k) + c] / std::sqrt(variance + size.eps),
                 shift = theta[size.shift(k) + c];
    for (int64_t i = 0; i < out.rows * 2; ++i)
      for (int64_t j = 0; j < out.columns * 2; ++j)
        out.at(c, i / 2, j / 2) += std::max(0., (y.at(0, i, j) - mean) * gain + shift) / 4;
  }
  return out;
}

Vector outputs(const ConvNetSize& size, const double* theta, const double* image) {
  Planes x{size.channels, size.height, size.width,
           Vector(image, image + size.channels * size.height * size.width)};
  for (int64_t k = 0; k < size.depth; ++k) x = block(size, k, theta, x);
  Vector logits(theta + size.linear_bias(), theta + size.linear_bias() + size.classes);
  for (int64_t k = 0; k < size.classes; ++k)
    for (int64_t f = 0; f < size.features(); ++f)
      logits[k] += theta[size.linear() + k * size.features() + f] * x.values[f];
  return logits;
}

Vector softmax(const double* logits, int64_t classes) {
  Vector p(classes);
  double sum = 0;
  for (int64_t k = 0; k < classes; ++k) sum += p[k] = std::exp(logits[k]);
  for (double& value : p) value /= sum;
  return p;
}

// Everything a step depends on. Targets are the softmax of labels.
struct Point {
  ConvNetSize size;
  Vector theta, tangent, images, labels;

  explicit Point(const ConvNetSize& size)
      : size(size),
        theta(random_vector(size.parameters(), 1)),
        tangent(random_vector(size.parameters(), 2)),
        images(random_vector(size.n * size.channels * size.height * size.width, 3, 2)),
        labels(random_vector(size.n * size.classes, 4, 2)) {}

  int64_t pixels() const { return size.channels * size.height * size.width; }
  Vector targets() const {
    Vector q;
    for (int64_t i = 0; i < size.n; ++i)
      for (const double value : softmax(&labels[i * size.classes], size.classes)) q.push_back(value);
    return q;
  }
  double loss() const {
    const Vector q = targets();
    double sum = 0;
    for (int64_t i = 0; i < size.n; ++i) {
      const Vector p = softmax(outputs(size, theta.data(), &images[i * pixels()]).data(), size.classes);
      for (int64_t k = 0; k < size.classes; ++k) sum -= q[i * size.classes + k] * std::log(p[k]) / size.n;
    }
    return sum;
  }
};

// ---- the step, and what it must agree with ----

template <class T>
struct Found {
  explicit Found(const Point& p)
      : gradient(p.size.parameters(), 1),
        d_images(p.images.size(), 1),
        d_labels(p.labels.size(), 1),
        logits(p.labels.size(), 1),
        phi(1) {}
  bool same_bits(const Found& other) const {
    return gradient.same_bits(other.gradient) && d_images.same_bits(other.d_images) &&
           d_labels.same_bits(other.d_labels) && logits.same_bits(other.logits) && phi.same_bits(other.phi);
  }
  Array<T> gradient, d_images, d_labels, logits, phi;
};

template <class T>
Found<T> run(const Point& p, int m, int64_t parts, bool dual, const Queue& queue) {
  const auto theta = as_array<T>(p.theta), tangent = as_array<T>(p.tangent), images = as_array<T>(p.images),
             targets = as_array<T>(p.targets());
  Array<T> scratch((parts - 1) * p.size.parameters());
  Found<T> found(p);
  ConvNetStep<T> step{p.size,
                      m,
                      parts,
                      theta.data(),
                      dual ? tangent.data() : nullptr,
                      images.data(),
                      targets.data(),
                      scratch.data(),
                      found.gradient.data(),
                      found.d_images.data(),
                      found.d_labels.data(),
                      found.phi.data(),
                      nullptr};
  convnet_cpu<T>().step(step, queue);
  convnet_cpu<T>().logits(step, found.logits.data(), queue);
  return found;
}

double size_of(const Array<double>& x) {
  double most = 0;
  for (int64_t i = 0; i < x.size(); ++i) most = std::max(most, std::abs(x[i]));
  return most;
}

// Entries of `found`, `trials` with the first and the last, against central differences of f at those of x.
void check_differences(const char* what, const Array<double>& found, Vector& x, int64_t trials,
                       const std::function<double()>& f) {
  const double step = 1e-5, largest = size_of(found);
  std::mt19937 draw(7);
  for (int64_t trial = 0; trial < trials; ++trial) {
    const int64_t i = trial < 2 ? trial * (found.size() - 1) : draw() % found.size();
    const double before = x[i];
    x[i] = before + step;
    const double above = f();
    x[i] = before - step;
    const double below = f();
    x[i] = before;
    const double off = std::abs((above - below) / (2 * step) - found[i]);
    if (!(off <= 1e-6 * largest))
      std::printf("%s: entry %d is off by %g of %g\n", what, int(i), off, largest);
    CHECK(off <= 1e-6 * largest);
  }
}

template <class T>
void check_near(const char* what, const Array<T>& found, const Array<double>& wanted, double tolerance) {
  const double largest = size_of(wanted);
  for (int64_t i = 0; i < found.size(); ++i) {
    const double off = std::abs(static_cast<double>(found[i]) - wanted[i]);
    if (!(off <= tolerance * largest)) std::printf("%s: off by %g of %g\n", what, off, largest);
    CHECK(off <= tolerance * largest);
  }
}

void check_step(const Setting& setting, const ConvNetSize& size, int m, int64_t parts, int64_t trials = 40) {
  Point p(size);
  const Queue& queue = setting.queues[0];
  const auto plain = run<double>(p, m, parts, false, queue), dual = run<double>(p, m, parts, true, queue);
  for (int64_t i = 0; i < size.n; ++i) {
    const Vector wanted = outputs(size, p.theta.data(), &p.images[i * p.pixels()]);
    for (int64_t k = 0; k < size.classes; ++k)
      CHECK(std::abs(plain.logits[i * size.classes + k] - wanted[k]) <= 1e-11 * (1 + std::abs(wanted[k])));
  }
  check_differences("gradient", plain.gradient, p.theta, trials, [&] { return p.loss(); });
  double phi = 0;
  for (int64_t i = 0; i < plain.gradient.size(); ++i) phi += plain.gradient[i] * p.tangent[i];
  CHECK(std::abs(dual.phi[0] - phi) <= 1e-11 * (1 + std::abs(phi)));
  const auto phi_here = [&] { return run<double>(p, m, parts, true, queue).phi[0]; };
  check_differences("phi by parameters", dual.gradient, p.theta, trials, phi_here);
  check_differences("phi by images", dual.d_images, p.images, trials, phi_here);
  check_differences("phi by labels", dual.d_labels, p.labels, trials, phi_here);
  for (const Queue& other : setting.queues) CHECK(run<double>(p, m, parts, true, other).same_bits(dual));
  const auto single = run<float>(p, m, parts, true, queue);
  check_near("float32 gradient", single.gradient, dual.gradient, 2e-3);
  check_near("float32 images", single.d_images, dual.d_images, 2e-3);
}

}  // namespace
}  // namespace ddpp::test

int main(int argc, char** argv) {
  const ddpp::test::Setting setting = ddpp::test::setting(argc, argv);
  for (const int m : {2, 4}) {
    ddpp::test::check_step(setting, {3, 3, 8, 9, 1, 1, 2, 5, 4, 1e-5}, m, 1);
    ddpp::test::check_step(setting, {5, 1, 9, 8, 3, 2, 3, 17, 3, 1e-3}, m, 3);
    ddpp::test::check_step(setting, {2, 2, 4, 5, 1, 1, 1, 3, 18, 1e-5}, m, 2);
  }
  ddpp::test::check_step(setting, {3, 1, 80, 80, 1, 1, 2, 2, 2, 1e-5}, 2, 1,
                         4);  // more than is held at a time
  return 0;
}
