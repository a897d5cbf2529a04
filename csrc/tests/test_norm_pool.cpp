#include <cmath>
#include <random>
#include <type_traits>

#include "check.h"
#include "kernels/norm_pool.h"

namespace ddpp::test {
namespace {

constexpr double kEps = 1e-5;

template <class S>
const NormPool<S>& launchers(const Setting& setting) {
  if constexpr (std::is_same_v<S, Bfloat16>)
    return norm_pool_cuda<S>();
  else
    return setting.cuda ? norm_pool_cuda<S>() : norm_pool_cpu<S>();
}

template <class T>
struct DualArray {
  DualArray(int64_t n, int64_t shift) : value(n, shift), tangent(n, shift) {}
  Dual<T> data() { return {value.data(), tangent.data()}; }
  Dual<const T> data() const { return {value.data(), tangent.data()}; }
  Array<T> value, tangent;
};

int64_t values(const PlaneBatch& s) { return s.n * s.height * s.width * s.channels; }
int64_t pooled_values(const PlaneBatch& s) { return s.n * (s.height / 2) * (s.width / 2) * s.channels; }

template <class S>
struct Inputs {
  Inputs(const PlaneBatch& s, int64_t shift)
      : size(s),
        y(values(s), shift),
        scale(s.channels, shift),
        shift(s.channels, shift),
        grad(pooled_values(s), shift) {}
  PlaneBatch size;
  DualArray<S> y;
  DualArray<Arithmetic<S>> scale, shift;
  DualArray<S> grad;
};

template <class S>
struct Results {
  Results(const PlaneBatch& s, int64_t shift)
      : plain_out(pooled_values(s), shift),
        plain_grad_y(values(s), shift),
        plain_grad_scale(s.channels, shift),
        plain_grad_shift(s.channels, shift),
        out(pooled_values(s), shift),
        grad_y(values(s), shift),
        grad_scale(s.channels, shift),
        grad_shift(s.channels, shift) {}
  // name(array) for every array
  template <class F>
  void each(const F& visit) {
    visit("forward: out", plain_out);
    visit("backward: grad_y", plain_grad_y);
    visit("backward: grad_scale", plain_grad_scale);
    visit("backward: grad_shift", plain_grad_shift);
    visit("dual: out", out.value);
    visit("dual: tangent of out", out.tangent);
    visit("dual_backward: grad_y", grad_y.value);
    visit("dual_backward: grad of y's tangent", grad_y.tangent);
    visit("dual_backward: grad_scale", grad_scale);
    visit("dual_backward: grad_shift", grad_shift);
  }
  Array<S> plain_out, plain_grad_y;
  Array<Arithmetic<S>> plain_grad_scale, plain_grad_shift;
  DualArray<S> out, grad_y;
  Array<Arithmetic<S>> grad_scale, grad_shift;
};

template <class S>
Inputs<S> random_inputs(const PlaneBatch& size, int64_t shift, double mean) {
  Inputs<S> in(size, shift);
  std::mt19937 random(static_cast<unsigned>(size.channels * 31 + size.width));
  std::normal_distribution<double> normal;
  const auto fill = [&](auto& array, double at) {
    using X = std::remove_reference_t<decltype(array[0])>;
    for (int64_t i = 0; i < array.size(); ++i) array[i] = static_cast<X>(at + normal(random));
  };
  fill(in.y.value, mean), fill(in.y.tangent, -mean / 2);
  fill(in.scale.value, 0.5), fill(in.scale.tangent, 0);
  fill(in.shift.value, 0.2), fill(in.shift.tangent, 0);
  fill(in.grad.value, 0), fill(in.grad.tangent, 0);
  return in;
}

// Gradients of planes may be written over the planes.
enum class Over { kOthers, kPlanes };

template <class S>
void run(const NormPool<S>& kernels, const Inputs<S>& in, Results<S>* r, const Queue& queue,
         Over over = Over::kOthers) {
  const PlaneBatch& s = in.size;
  const S* plain_y = in.y.value.data();
  Dual<const S> y = in.y.data();
  if (over == Over::kPlanes) {
    for (S* copy : {r->plain_grad_y.data(), r->grad_y.value.data()})
      std::copy_n(in.y.value.data(), values(s), copy);
    std::copy_n(in.y.tangent.data(), values(s), r->grad_y.tangent.data());
    plain_y = r->plain_grad_y.data(), y = static_cast<const Results<S>*>(r)->grad_y.data();
  }
  Array<Arithmetic<S>> statistics(kStatistics * s.n * s.channels),
      dual_statistics(kDualStatistics * s.n * s.channels);
  Array<double> scratch((kernels.scratch_bytes(s) + 7) / 8);
  CHECK(kernels.forward(plain_y, in.scale.value.data(), in.shift.value.data(), kEps, s, r->plain_out.data(),
                        statistics.data(), queue) == 0);
  CHECK(kernels.backward(in.grad.tangent.data(), plain_y, in.scale.value.data(), in.shift.value.data(),
                         statistics.data(), s, scratch.data(), r->plain_grad_y.data(),
                         r->plain_grad_scale.data(), r->plain_grad_shift.data(), queue) == 0);
  CHECK(kernels.dual(y, in.scale.data(), in.shift.data(), kEps, s, r->out.data(), dual_statistics.data(),
                     queue) == 0);
  CHECK(kernels.dual_backward(in.grad.data(), y, in.scale.data(), in.shift.value.data(),
                              dual_statistics.data(), s, scratch.data(), r->grad_y.data(),
                              r->grad_scale.data(), r->grad_shift.data(), queue) == 0);
}

// The formulas, on one plane in float64. They are those of ddpp/ops/norm_pool.py.
template <class S>
void expect_plane(const Inputs<S>& in, int64_t n, int64_t c, Results<double>* r) {
  const PlaneBatch& s = in.size;
  const int64_t area = s.height * s.width, h = s.height / 2, w = s.width / 2;
  const auto at = [&](int64_t i) { return (n * area + i) * s.channels + c; };
  const auto pooled_at = [&](int64_t i) {
    const int64_t row = i / s.width / 2, column = i % s.width / 2;
    return row < h && column < w ? ((n * h + row) * w + column) * s.channels + c : -1;
  };
  const auto mean = [&](auto value) {
    double sum = 0;
    for (int64_t i = 0; i < area; ++i) sum += value(i);
    return sum / static_cast<double>(area);
  };
  const auto y = [&](int64_t i) { return static_cast<double>(in.y.value[at(i)]); };
  const auto t = [&](int64_t i) { return static_cast<double>(in.y.tangent[at(i)]); };
  const double g = in.scale.value[c], gt = in.scale.tangent[c], b = in.shift.value[c],
               bt = in.shift.tangent[c];
  const double y_mean = mean(y), t_mean = mean(t);
  const double rstd =
      1 / std::sqrt(mean([&](int64_t i) { return (y(i) - y_mean) * (y(i) - y_mean); }) + kEps);
  const auto x = [&](int64_t i) { return (y(i) - y_mean) * rstd; };
  const double m = mean([&](int64_t i) { return x(i) * (t(i) - t_mean); });
  const auto xt = [&](int64_t i) { return rstd * (t(i) - t_mean - x(i) * m); };
  const auto active = [&](int64_t i) { return g * x(i) + b > 0; };
  const auto cotangent = [&](const Array<S>& grad, int64_t i) {
    return active(i) && pooled_at(i) >= 0 ? grad[pooled_at(i)] / 4.0 : 0.0;
  };
  const auto u = [&](int64_t i) { return cotangent(in.grad.value, i); };
  const auto v = [&](int64_t i) { return cotangent(in.grad.tangent, i); };
  const double v_mean = mean(v), vx = mean([&](int64_t i) { return v(i) * x(i); }), q = g * vx;
  const auto k = [&](int64_t i) {
    return g * u(i) + gt * v(i) - rstd * m * g * v(i) - rstd * q * (t(i) - t_mean);
  };
  const double k_mean = mean(k), kx = mean([&](int64_t i) { return k(i) * x(i); });
  const double vxt = mean([&](int64_t i) { return v(i) * xt(i); });
  const double u_sum = mean(u) * area, ux = mean([&](int64_t i) { return u(i) * x(i); }) * area;
  for (int64_t i = 0; i < area; ++i) {
    if (pooled_at(i) >= 0 && active(i)) {
      r->plain_out[pooled_at(i)] += (g * x(i) + b) / 4;
      r->out.value[pooled_at(i)] += (g * x(i) + b) / 4;
      r->out.tangent[pooled_at(i)] += (gt * x(i) + g * xt(i) + bt) / 4;
    }
    r->plain_grad_y[at(i)] = r->grad_y.tangent[at(i)] = rstd * (g * v(i) - g * v_mean - x(i) * q);
    r->grad_y.value[at(i)] = rstd * (k(i) - k_mean - x(i) * (kx + g * vxt));
  }
  r->plain_grad_scale[c] += vx * area;
  r->plain_grad_shift[c] += v_mean * area;
  r->grad_scale[c] += ux + vxt * area;
  r->grad_shift[c] += u_sum;
}

double norm(const std::vector<double>& x) {
  double square = 0;
  for (const double v : x) square += v * v;
  return std::sqrt(square);
}

template <class T>
std::vector<double> exact(const Array<T>& x) {
  return {x.data(), x.data() + x.size()};
}

template <class S>
void check_same_bits(Results<S>& expected, Results<S>& got) {
  std::vector<const void*> arrays;
  expected.each([&](const char*, const auto& array) { arrays.push_back(&array); });
  size_t place = 0;
  got.each([&](const char*, const auto& array) {
    CHECK(array.same_bits(*static_cast<decltype(&array)>(arrays[place++])));
  });
}

// How far storing as X moves a float at most, as a part of what it gives: half a unit in its last place.
template <class X>
constexpr double kRounding = std::is_same_v<X, Bfloat16> ? 1.0 / 256 : 0;

template <class S>
void check_inputs(const Setting& setting, const Inputs<S>& in, int64_t shift) {
  const PlaneBatch& s = in.size;
  Results<double> expected(s, 0);
  expected.each([](const char*, Array<double>& array) { std::fill_n(array.data(), array.size(), 0.0); });
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.channels; ++c) expect_plane(in, n, c, &expected);
  std::vector<std::vector<double>> wanted;
  expected.each([&](const char*, const Array<double>& array) { wanted.push_back(exact(array)); });
  // Gradients are differences, which may cancel: their error is measured against what they are differences
  // of.
  const double terms = std::hypot(norm(exact(in.grad.value)), norm(exact(in.grad.tangent)));

  Results<S> first(s, shift);
  run(launchers<S>(setting), in, &first, setting.queues[0]);
  size_t place = 0;
  first.each([&](const char* name, const auto& array) {
    using X = std::decay_t<decltype(array[0])>;
    const bool gradient = std::strstr(name, "grad");
    std::vector<double> beyond = exact(array);  // what rounding to X does not explain
    for (size_t i = 0; i < beyond.size(); ++i)
      beyond[i] = std::max(std::abs(beyond[i] - wanted[place][i]) - kRounding<X> * std::abs(beyond[i]), 0.0);
    const double error = norm(beyond), size = std::max(norm(wanted[place]), gradient ? terms : 0);
    const bool close = error <= (sizeof(Arithmetic<S>) == 4 ? 1e-6 : 1e-12) * size;
    if (!close)
      std::printf("%s is off by %g of %g: %d images of %d channels, %d x %d\n", name, error, size, int(s.n),
                  int(s.channels), int(s.height), int(s.width));
    CHECK(close);
    ++place;
  });
  for (const Queue& queue : setting.queues) {
    Results<S> again(s, shift);
    run(launchers<S>(setting), in, &again, queue);
    check_same_bits(first, again);
  }
  Results<S> over(s, shift);
  run(launchers<S>(setting), in, &over, setting.queues[0], Over::kPlanes);
  check_same_bits(first, over);
}

// Planes of one value are normalised to 0: the gradient is that of torch's ReLU at 0 where shift is 0.
template <class S>
void check_constant_planes(const Setting& setting, int64_t height) {
  using T = Arithmetic<S>;
  const PlaneBatch size{2, 5, height, 4};
  Inputs<S> in = random_inputs<S>(size, 0, 0);
  for (int64_t i = 0; i < in.y.value.size(); ++i)
    in.y.value[i] = static_cast<S>(T(0.1) * static_cast<T>(1 + i % size.channels));
  for (int64_t c = 0; c < size.channels; ++c) in.shift.value[c] = static_cast<T>(c - 2);
  Results<S> r(size, 0);
  run(launchers<S>(setting), in, &r, setting.queues[0]);
  for (int64_t i = 0; i < r.plain_out.size(); ++i) {
    const auto c = i % size.channels;
    CHECK(r.plain_out[i] == (c > 2 ? in.shift.value[c] : T(0)));
    if (c <= 2) CHECK(r.out.tangent[i] == 0);
  }
  for (int64_t c = 0; c <= 2; ++c) CHECK(r.plain_grad_shift[c] == 0 && r.plain_grad_scale[c] == 0);
}

// A NaN makes its plane NaN and no other.
template <class S>
void check_nan_shows(const Setting& setting, int64_t channels, int64_t height) {
  const PlaneBatch size{2, channels, height, 4};
  const int64_t area = height * size.width, pooled_area = height / 2 * (size.width / 2);
  Inputs<S> in = random_inputs<S>(size, 0, 0);
  const int64_t image = 1, channel = 33;
  in.y.value[(image * area + area - 1) * size.channels + channel] =
      static_cast<S>(std::numeric_limits<Arithmetic<S>>::quiet_NaN());
  Results<S> r(size, 0);
  run(launchers<S>(setting), in, &r, setting.queues[0]);
  const auto check = [&](const Array<S>& array, int64_t area) {
    for (int64_t i = 0; i < array.size(); ++i) {
      const bool here = i / size.channels / area == image && i % size.channels == channel;
      CHECK(std::isnan(array[i]) == here);
    }
  };
  for (const Array<S>* array : {&r.plain_out, &r.out.value, &r.out.tangent}) check(*array, pooled_area);
  for (const Array<S>* array : {&r.plain_grad_y, &r.grad_y.value, &r.grad_y.tangent}) check(*array, area);
}

template <class T>
void check_same_bits_on_every_isa() {
  const Inputs<T> in = random_inputs<T>({3, 45, 7, 6}, 0, 1);
  Results<T> expected(in.size, 0);
  run(norm_pool_cpu<T>(Isa::base), in, &expected, kThisThread);
  for (const Isa isa : {Isa::avx2, Isa::avx512}) {
    if (!isa_runs_here(isa)) continue;
    Results<T> got(in.size, 0);
    run(norm_pool_cpu<T>(isa), in, &got, kThisThread);
    check_same_bits(expected, got);
  }
}

// Planes beyond the caches are stored past them where they are aligned to a cache line, as one of these is.
template <class T>
void check_large_planes(const Setting& setting) {
  const PlaneBatch size{2, 64, 257, int64_t{1024} / sizeof(T)};
  constexpr int64_t kStep = 16 / sizeof(T);  // of malloc's alignment
  std::unique_ptr<Results<T>> expected;
  for (const int64_t shift : {int64_t{1}, 0 * kStep, 1 * kStep, 2 * kStep, 3 * kStep}) {
    Inputs<T> in(size, shift);
    for (DualArray<T>* pair : {&in.y, &in.scale, &in.shift, &in.grad})
      for (Array<T>* array : {&pair->value, &pair->tangent})
        for (int64_t i = 0; i < array->size(); ++i)
          (*array)[i] = static_cast<T>(i * 40503 % 1021) / 512 - 1;  // random enough, and quick
    auto got = std::make_unique<Results<T>>(size, shift);
    run(launchers<T>(setting), in, got.get(), setting.queues.back());
    if (expected)
      check_same_bits(*expected, *got);
    else
      expected = std::move(got);
  }
}

// Every value of 16 bits is itself again. Halfway between two of them becomes the even one, on either side
// the nearer one; beyond the largest is infinity.
void check_rounding() {
  const auto as_float = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  };
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const float x = as_float(bits << 16);
    if (std::isnan(x) || std::isinf(x)) {
      CHECK(std::isnan(Bfloat16(x)) == std::isnan(x) && std::isnan(Bfloat16(as_float(bits << 16 | 0xffff))));
      CHECK(std::isnan(x) || Bfloat16(x).bits == bits);
      continue;
    }
    CHECK(Bfloat16(x).bits == bits);
    CHECK(Bfloat16(as_float(bits << 16 | 0x7fff)).bits == bits);
    CHECK(Bfloat16(as_float(bits << 16 | 0x8000)).bits == bits + bits % 2);
    CHECK(Bfloat16(as_float(bits << 16 | 0x8001)).bits == bits + 1);
  }
}

template <class S>
void check_all(const Setting& setting) {
  for (const int64_t channels : {1, 3, 16, 17, 31, 64, 100})
    for (const auto& [height, width] : {std::pair{2, 2}, {3, 5}, {8, 8}, {5, 12}})
      for (const int64_t shift : {0, 1}) {
        check_inputs(setting, random_inputs<S>({2, channels, height, width}, shift, 0), shift);
      }
  check_inputs(setting, random_inputs<S>({0, 3, 4, 4}, 0, 0), 0);
  check_inputs(setting, random_inputs<S>({17, 8, 2, 3}, 0, 0), 0);
  check_inputs(setting, random_inputs<S>({3, 36, 32, 33}, 0, 0), 0);
  check_inputs(setting, random_inputs<S>({2, 36, 32, 32}, 0, 1), 0);
  for (const int64_t height : {8, 9})
    check_inputs(setting, random_inputs<S>({2, 8, height, 8}, 0, 1000), 0);  // a large mean
  check_inputs(setting, random_inputs<S>({1, 4, 72, 64}, 0, 2), 0);
  check_inputs(setting, random_inputs<S>({1, 4, 72, 160}, 0, 0), 0);   // beyond shared memory, in packs
  check_inputs(setting, random_inputs<S>({1, 1, 226, 224}, 0, 0), 0);  // and in single values
  check_inputs(setting, random_inputs<S>({8, 36, 16, 16}, 0, 0), 0);   // enough blocks for wide ones
  check_inputs(setting, random_inputs<S>({4, 64, 32, 32}, 0, 0), 0);   // no room for a second block
  for (const int64_t height : {3, 4}) check_constant_planes<S>(setting, height);
  for (const int64_t channels : {35, 36})
    for (const int64_t height : {5, 6}) check_nan_shows<S>(setting, channels, height);
#if !defined(DDPP_ON_DEVICE)
  const size_t before = ddpp_emul::max_shared;
  ddpp_emul::max_shared = 64 * 1024;  // as of a smaller GPU
  for (const int64_t side : {16, 32}) check_inputs(setting, random_inputs<S>({8, 36, side, side}, 0, 0), 0);
  ddpp_emul::max_shared = before;
#endif
}

}  // namespace
}  // namespace ddpp::test

int main(int argc, char** argv) {
  const ddpp::test::Setting setting = ddpp::test::setting(argc, argv);
  ddpp::test::check_all<float>(setting);
  ddpp::test::check_all<double>(setting);
  if (setting.cuda) {
    ddpp::test::check_rounding();
    ddpp::test::check_all<ddpp::Bfloat16>(setting);
  } else {
    ddpp::test::check_large_planes<float>(setting);
    ddpp::test::check_large_planes<double>(setting);
    ddpp::test::check_same_bits_on_every_isa<float>();
    ddpp::test::check_same_bits_on_every_isa<double>();
  }
  return 0;
}
