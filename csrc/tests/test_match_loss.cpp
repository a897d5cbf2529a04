#include <cmath>
#include <random>

#include "check.h"
#include "kernels/match_loss.h"

namespace ddpp::test {
namespace {

template <class T>
const MatchLoss<T>& launchers(const Setting& setting) {
  return setting.cuda ? match_loss_cuda<T>() : match_loss_cpu<T>();
}

// The definition, word by word.
template <class T>
bool pruned(T s, T t, T epsilon) {
  if (epsilon == 0) return false;
  return (s <= 0 && t > 0) || (s >= 0 && t < 0) || (t <= 0 && s > 0) || (t >= 0 && s < 0) ||
         std::abs(s) < epsilon * std::abs(t) || std::abs(t) < epsilon * std::abs(s);
}

template <class T>
struct Vectors {
  Array<T> student, target, start;
};

template <class T>
Vectors<T> random_vectors(int64_t p, int64_t shift) {
  Vectors<T> v{Array<T>(p, shift), Array<T>(p, shift), Array<T>(p, shift)};
  std::mt19937 random(static_cast<unsigned>(p));
  std::normal_distribution<T> normal;
  for (int64_t i = 0; i < p; ++i) {
    v.target[i] = i % 11 == 3 ? T(0) : normal(random);
    v.student[i] = i % 7 == 2 ? T(0) : v.target[i] + T(0.3) * normal(random);
    v.start[i] = v.target[i] + normal(random);
  }
  return v;
}

template <class T>
void check_vectors(const Setting& setting, const Vectors<T>& v, double epsilon) {
  const int64_t p = v.student.size();
  double numerator = 0, denominator = 0;
  int64_t kept = 0;
  for (int64_t i = 0; i < p; ++i) {
    if (pruned(v.student[i], v.target[i], static_cast<T>(epsilon))) continue;
    const double far = v.student[i] - v.target[i], span = v.start[i] - v.target[i];
    numerator += far * far;
    denominator += span * span;
    ++kept;
  }
  if (denominator == 0) denominator = std::numeric_limits<double>::infinity(), kept = 0;
  const double loss = numerator / denominator, tolerance = sizeof(T) == 4 ? 1e-6 : 1e-13;

  const auto& kernels = launchers<T>(setting);
  Array<T> first_loss(1), first_gradient(p);
  for (size_t q = 0; q < setting.queues.size(); ++q) {
    Array<int64_t> scratch((kernels.scratch_bytes(p) + 7) / 8), got_kept(1);
    Array<T> got_loss(1), gradient(p), grad(1);
    Array<double> got_denominator(1);
    grad[0] = T(-1.5);
    CHECK(kernels.forward(v.student.data(), v.target.data(), v.start.data(), epsilon, p, scratch.data(),
                          got_loss.data(), got_kept.data(), got_denominator.data(), setting.queues[q]) == 0);
    CHECK(got_kept[0] == kept);
    CHECK(got_denominator[0] == denominator ||
          std::abs(got_denominator[0] - denominator) <= 1e-12 * denominator);
    CHECK(std::abs(got_loss[0] - loss) <= tolerance * loss);
    CHECK(kernels.backward(grad.data(), got_denominator.data(), v.student.data(), v.target.data(), epsilon, p,
                           gradient.data(), setting.queues[q]) == 0);
    const T scale = static_cast<T>(2 * -1.5 / got_denominator[0]);
    for (int64_t i = 0; i < p; ++i) {
      const bool drop = pruned(v.student[i], v.target[i], static_cast<T>(epsilon));
      CHECK(gradient[i] == (drop ? T(0) : scale * (v.student[i] - v.target[i])));
    }
    if (q == 0) {
      std::memcpy(first_loss.data(), got_loss.data(), sizeof(T));
      std::memcpy(first_gradient.data(), gradient.data(), p * sizeof(T));
    }
    CHECK(got_loss.same_bits(first_loss));
    CHECK(gradient.same_bits(first_gradient));
  }
}

// Every pair of values at which the mask may go wrong.
template <class T>
void check_boundary(const Setting& setting, double epsilon) {
  using Limits = std::numeric_limits<T>;
  const T e = static_cast<T>(epsilon);
  std::vector<T> values{0, Limits::denorm_min(), 7 * Limits::denorm_min(), Limits::min(), 1, 3, 10};
  for (const T at : {e, 3 * e, 10 * e})
    for (const T to : {-Limits::infinity(), at, Limits::infinity()}) values.push_back(std::nextafter(at, to));
  for (size_t i = values.size(); i-- > 0;) values.push_back(-values[i]);
  const auto n = static_cast<int64_t>(values.size());
  Vectors<T> v{Array<T>(n * n), Array<T>(n * n), Array<T>(n * n)};
  for (int64_t i = 0; i < n * n; ++i) {
    v.student[i] = values[i / n];
    v.target[i] = values[i % n];
    v.start[i] = v.target[i] + 1;
  }
  check_vectors(setting, v, epsilon);
}

// Infinite values are pruned against finite ones; a NaN is not pruned and shows.
template <class T>
void check_not_finite(const Setting& setting) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const auto& kernels = launchers<T>(setting);
  for (const T bad : {inf, -inf, nan})
    for (const int64_t place : {0, 5, 36}) {
      Vectors<T> v = random_vectors<T>(37, 0);
      for (int64_t i = 0; i < 37; ++i) v.target[i] = T(1) + i, v.student[i] = v.target[i], v.start[i] = 0;
      v.student[place] = bad;
      Array<int64_t> scratch((kernels.scratch_bytes(37) + 7) / 8), kept(1);
      Array<T> loss(1);
      Array<double> denominator(1);
      CHECK(kernels.forward(v.student.data(), v.target.data(), v.start.data(), 0.1, 37, scratch.data(),
                            loss.data(), kept.data(), denominator.data(), setting.queues[0]) == 0);
      CHECK(kept[0] == (bad != bad ? 37 : 36));
      CHECK(bad != bad ? loss[0] != loss[0] : loss[0] == 0);
    }
}

// The sums are the same bits whatever the instruction set.
template <class T>
void check_same_bits_on_every_isa() {
  const int64_t p = 40001;
  const Vectors<T> v = random_vectors<T>(p, 0);
  Array<T> loss(1), expected(1);
  for (const Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (!isa_runs_here(isa)) continue;
    const auto& kernels = match_loss_cpu<T>(isa);
    Array<int64_t> scratch((kernels.scratch_bytes(p) + 7) / 8), kept(1);
    Array<double> denominator(1);
    kernels.forward(v.student.data(), v.target.data(), v.start.data(), 0.1, p, scratch.data(), loss.data(),
                    kept.data(), denominator.data(), kThisThread);
    if (isa == Isa::base) expected[0] = loss[0];
    CHECK(loss.same_bits(expected));
  }
}

template <class T>
void check_all(const Setting& setting) {
  for (const int64_t p : {0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 1000, 4097, 16384, 16385, 70001})
    for (const double epsilon : {0.1, 0.0}) {
      check_vectors(setting, random_vectors<T>(p, 0), epsilon);
      check_vectors(setting, random_vectors<T>(p, 1), epsilon);
    }
  check_vectors(setting, random_vectors<T>(280001, 1),
                0.1);  // more than one element per thread of the largest grid
  for (const double epsilon : {0.1, 0.3, 1.0}) check_boundary<T>(setting, epsilon);
  check_not_finite<T>(setting);
}

}  // namespace
}  // namespace ddpp::test

int main(int argc, char** argv) {
  const ddpp::test::Setting setting = ddpp::test::setting(argc, argv);
  ddpp::test::check_all<float>(setting);
  ddpp::test::check_all<double>(setting);
  if (!setting.cuda) {
    ddpp::test::check_same_bits_on_every_isa<float>();
    ddpp::test::check_same_bits_on_every_isa<double>();
  }
  return 0;
}
