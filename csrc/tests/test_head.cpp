#include <cmath>
#include <random>

#include "check.h"
#include "kernels/head.h"

namespace ddpp::test {
namespace {

struct Sizes {
  int64_t n, f, k;
};

template <class T>
Array<T> random_values(int64_t n, int64_t shift, unsigned seed, double scale) {
  Array<T> values(n, shift);
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(scale * normal(random));
  return values;
}

template <class T>
struct Problem {
  Sizes size;
  bool dual;
  int64_t count;
  Array<T> features, weight, bias, weight_tangent, bias_tangent, targets;

  Problem(const Sizes& s, bool dual, int64_t shift)
      : size(s),
        dual(dual),
        count(s.n + 3),
        features(random_values<T>((dual ? 2 : 1) * s.n * s.f, shift, 1, 1)),
        weight(random_values<T>(s.k * s.f, shift, 2, 2 / std::sqrt(s.f))),
        bias(random_values<T>(s.k, shift, 3, 1)),
        weight_tangent(random_values<T>(s.k * s.f, shift, 4, 1 / std::sqrt(s.f))),
        bias_tangent(random_values<T>(s.k, shift, 5, 1)),
        targets(random_values<T>(s.n * s.k, shift, 6, 1)) {
    for (int64_t i = 0; i < s.n; ++i) {  // each image's targets sum to 1
      double sum = 0;
      for (int64_t k = 0; k < s.k; ++k) sum += std::exp(double(targets[i * s.k + k]));
      for (int64_t k = 0; k < s.k; ++k)
        targets[i * s.k + k] = static_cast<T>(std::exp(double(targets[i * s.k + k])) / sum);
    }
  }
  HeadLayer<T> layer() const {
    return {size.n,
            size.f,
            size.k,
            features.data(),
            weight.data(),
            bias.data(),
            dual ? weight_tangent.data() : nullptr,
            dual ? bias_tangent.data() : nullptr};
  }
};

template <class T>
struct Results {
  Array<T> cotangents, d_labels, phis, d_weight, d_bias, d_features;
  Results(const Sizes& s, bool dual, int64_t shift)
      : cotangents((dual ? 2 : 1) * s.n * s.k, shift),
        d_labels(s.n * s.k, shift),
        phis(s.n, shift),
        d_weight(s.k * s.f, shift),
        d_bias(s.k, shift),
        d_features((dual ? 2 : 1) * s.n * s.f, shift) {}
};

// The formulas of ddpp/ops/head.py, in double.
template <class T>
Results<double> expected(const Problem<T>& p) {
  const auto [n, f, k] = p.size;
  Results<double> r(p.size, p.dual, 0);
  const auto dot = [f = f](const Array<T>& a, int64_t i, const Array<T>& b, int64_t j) {
    double sum = 0;
    for (int64_t c = 0; c < f; ++c) sum += double(a[i * f + c]) * b[j * f + c];
    return sum;
  };
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> z(k), z_tangent(k);
    for (int64_t j = 0; j < k; ++j) {
      z[j] = dot(p.features, i, p.weight, j) + p.bias[j];
      if (p.dual)
        z_tangent[j] =
            dot(p.features, n + i, p.weight, j) + dot(p.features, i, p.weight_tangent, j) + p.bias_tangent[j];
    }
    const double most = *std::max_element(z.begin(), z.end());
    double sum = 0, mean = 0, target_mean = 0;
    for (int64_t j = 0; j < k; ++j) sum += std::exp(z[j] - most);
    for (int64_t j = 0; j < k; ++j) {
      mean += std::exp(z[j] - most) / sum * z_tangent[j];
      target_mean += p.targets[i * k + j] * z_tangent[j];
    }
    r.phis[i] = 0;
    for (int64_t j = 0; j < k; ++j) {
      const double softmax = std::exp(z[j] - most) / sum, q = p.targets[i * k + j];
      const double far = (softmax - q) / p.count;
      r.cotangents[((p.dual ? n : 0) + i) * k + j] = far;
      if (p.dual) r.cotangents[i * k + j] = softmax * (z_tangent[j] - mean) / p.count;
      r.d_labels[i * k + j] = q * (target_mean - z_tangent[j]) / p.count;
      r.phis[i] += far * z_tangent[j];
    }
  }
  const int64_t rows = p.dual ? 2 * n : n;
  for (int64_t j = 0; j < k; ++j) {
    r.d_bias[j] = 0;
    for (int64_t i = 0; i < n; ++i) r.d_bias[j] += r.cotangents[i * k + j];
    for (int64_t c = 0; c < f; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += r.cotangents[i * k + j] * p.features[i * f + c];
      r.d_weight[j * f + c] = sum;
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < f; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        sum += r.cotangents[i * k + j] * p.weight[j * f + c];
        if (p.dual && i < n) sum += r.cotangents[(n + i) * k + j] * p.weight_tangent[j * f + c];
      }
      r.d_features[i * f + c] = sum;
    }
  return r;
}

template <class T>
void check_near(const Array<T>& found, const Array<double>& wanted) {
  double most = 0;
  for (int64_t i = 0; i < wanted.size(); ++i) most = std::max(most, std::abs(wanted[i]));
  const double tolerance = (sizeof(T) == 4 ? 2e-6 : 1e-14) * (most + 1e-3);
  for (int64_t i = 0; i < wanted.size(); ++i) CHECK(std::abs(found[i] - wanted[i]) <= tolerance);
}

template <class T>
Results<T> run(const Problem<T>& p, bool soft, int64_t shift) {
  const auto& kernels = head_cuda<T>();
  Results<T> r(p.size, p.dual, shift);
  CHECK(kernels.cotangents(p.layer(), p.targets.data(), p.count, r.cotangents.data(),
                           soft ? r.d_labels.data() : nullptr, p.dual ? r.phis.data() : nullptr,
                           Queue{}) == 0);
  CHECK(kernels.gradients(p.layer(), r.cotangents.data(), r.d_weight.data(), r.d_bias.data(),
                          r.d_features.data(), Queue{}) == 0);
  return r;
}

template <class T>
void check(const Sizes& size, bool dual, int64_t shift) {
  const Problem<T> p(size, dual, shift);
  const Results<double> wanted = expected(p);
  const Results<T> found = run(p, dual, shift);
  check_near(found.cotangents, wanted.cotangents);
  check_near(found.d_weight, wanted.d_weight);
  check_near(found.d_bias, wanted.d_bias);
  check_near(found.d_features, wanted.d_features);
  if (!dual) return;
  check_near(found.phis, wanted.phis);
  check_near(found.d_labels, wanted.d_labels);
  const Results<T> again = run(p, false, shift);  // the derivative by labels is not asked for
  CHECK(again.cotangents.same_bits(found.cotangents) && again.phis.same_bits(found.phis));
  CHECK(again.d_weight.same_bits(found.d_weight) && again.d_features.same_bits(found.d_features));
  CHECK(again.d_labels.same_bits(Results<T>(size, dual, shift).d_labels));
}

// Outputs beyond exp's range do no harm, and what is not finite stays in its image.
template <class T>
void check_extremes() {
  Problem<T> p({4, 8, 40}, true, 0);
  for (int64_t i = 0; i < 8; ++i) p.features[i] *= T(1000);
  p.features[2 * 8 + 3] = std::numeric_limits<T>::quiet_NaN();
  const Results<T> found = run(p, true, 0);
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 40; ++j) {
      CHECK(std::isnan(found.cotangents[i * 40 + j]) == (i == 2));
      CHECK(std::isnan(found.cotangents[(4 + i) * 40 + j]) == (i == 2));
    }
  for (int64_t i = 0; i < 4; ++i) CHECK(std::isnan(found.phis[i]) == (i == 2));
  for (int64_t c = 0; c < 8 * 8; ++c) CHECK(std::isnan(found.d_features[c]) == (c / 8 % 4 == 2));
}

// More classes than shared memory holds outputs of are an error, not a wrong result.
template <class T>
void check_too_many_classes() {
  const Problem<T> p({1, 1, 20000}, true, 0);
  Results<T> r(p.size, true, 0);
  CHECK(head_cuda<T>().cotangents(p.layer(), p.targets.data(), 1, r.cotangents.data(), nullptr, r.phis.data(),
                                  Queue{}) != 0);
}

template <class T>
void check_all() {
  const Sizes sizes[] = {{1, 1, 1},   {3, 8, 10},  {2, 37, 5},  {10, 128, 10}, {5, 4, 40},
                         {70, 36, 3}, {9, 600, 2}, {1, 33, 17}, {16, 260, 33}, {0, 8, 3}};
  for (const Sizes& size : sizes)
    for (const bool dual : {false, true})
      for (const int64_t shift : {0, 1}) check<T>(size, dual, shift);
  check_extremes<T>();
  check_too_many_classes<T>();
}

}  // namespace
}  // namespace ddpp::test

int main(int argc, char** argv) {
  ddpp::test::setting(argc, argv);
  ddpp::test::check_all<float>();
  ddpp::test::check_all<double>();
  return 0;
}
