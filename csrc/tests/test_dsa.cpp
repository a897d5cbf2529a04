#include <algorithm>
#include <cmath>
#include <random>

#include "check.h"
#include "kernels/dsa.h"

namespace ddpp::test {
namespace {

template <class T>
const Dsa<T>& launchers(const Setting& setting) {
  return setting.cuda ? dsa_cuda<T>() : dsa_cpu<T>();
}

using Plan = std::vector<float>;     // [16]
using Values = std::vector<double>;  // [channels, height, width]

// ---- the definition, pixel by pixel in double ----

struct Naive {
  int channels, height, width;
  bool transpose;

  int64_t at(int c, int y, int x) const { return (int64_t{c} * height + y) * width + x; }
  Values zeros() const { return Values(static_cast<size_t>(int64_t{channels} * height * width), 0.0); }
  bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }

  // to[a] += weight * from[b], or the transpose of that
  void add(const Values& from, Values& to, int64_t a, int64_t b, double weight) const {
    if (transpose) {
      to[b] += weight * from[a];
    } else {
      to[a] += weight * from[b];
    }
  }

  Values brightness(Values image, double offset) const {
    if (!transpose)
      for (double& v : image) v += offset;
    return image;
  }

  Values saturation(const Values& from, double factor) const {
    Values to = zeros();
    for (int c = 0; c < channels; ++c)
      for (int64_t i = 0; i < height * width; ++i) {
        add(from, to, at(c, 0, 0) + i, at(c, 0, 0) + i, factor);
        for (int d = 0; d < channels; ++d)
          add(from, to, at(c, 0, 0) + i, at(d, 0, 0) + i, (1 - factor) / channels);
      }
    return to;
  }

  Values contrast(const Values& from, double factor) const {
    double mean = 0;
    for (const double v : from) mean += v / static_cast<double>(from.size());
    Values to = from;  // symmetric
    for (double& v : to) v = (v - mean) * factor + mean;
    return to;
  }

  Values crop(const Values& from, int dy, int dx) const {
    Values to = zeros();
    each([&](int c, int y, int x) {
      if (inside(y + dy, x + dx)) add(from, to, at(c, y, x), at(c, y + dy, x + dx), 1);
    });
    return to;
  }

  Values cutout(Values image, int top, int bottom, int left, int right) const {
    each([&](int c, int y, int x) {
      if (y >= top && y < bottom && x >= left && x < right) image[at(c, y, x)] = 0;
    });
    return image;
  }

  Values flip(const Values& from) const {
    Values to = zeros();
    each([&](int c, int y, int x) { to[at(c, y, x)] = from[at(c, y, width - 1 - x)]; });
    return to;
  }

  // Rows of the 2 x 3 matrix without its zeros: normalised x = xx u + xy v, y = yx u + yy v.
  Values resample(const Values& from, double xx, double xy, double yx, double yy) const {
    Values to = zeros();
    each([&](int c, int y, int x) {
      const double u = width > 1 ? 2.0 * x / (width - 1) - 1 : 0,
                   v = height > 1 ? 2.0 * y / (height - 1) - 1 : 0;
      const double px = (xx * u + xy * v + 1) / 2 * (width - 1),
                   py = (yx * u + yy * v + 1) / 2 * (height - 1);
      if (!(std::abs(px) < 1e6 && std::abs(py) < 1e6)) return;
      const int column = static_cast<int>(std::floor(px)), row = static_cast<int>(std::floor(py));
      for (int k = 0; k < 4; ++k) {
        const int tap_y = row + k / 2, tap_x = column + k % 2;
        const double weight = (1 - std::abs(py - tap_y)) * (1 - std::abs(px - tap_x));
        if (inside(tap_y, tap_x)) add(from, to, at(c, y, x), at(c, tap_y, tap_x), weight);
      }
    });
    return to;
  }

  template <class Body>
  void each(const Body& body) const {
    for (int c = 0; c < channels; ++c)
      for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x) body(c, y, x);
  }

  Values apply(Values image, const Plan& p) const {
    const int stages = 8;
    for (int k = 0; k < stages; ++k) {
      const int stage = transpose ? stages - 1 - k : k;
      if (stage == 0) image = brightness(image, p[kBrightness]);
      if (stage == 1) image = saturation(image, p[kSaturation]);
      if (stage == 2) image = contrast(image, p[kContrast]);
      if (stage == 3) image = crop(image, static_cast<int>(p[kShiftY]), static_cast<int>(p[kShiftX]));
      if (stage == 4)
        image = cutout(image, static_cast<int>(p[kTop]), static_cast<int>(p[kBottom]),
                       static_cast<int>(p[kLeft]), static_cast<int>(p[kRight]));
      if (stage == 5 && p[kFlip] != 0) image = flip(image);
      if (stage == 6) image = resample(image, p[kScaleX], 0, 0, p[kScaleY]);
      if (stage == 7) image = resample(image, p[kCos], -p[kSin], p[kSin], p[kCos]);
    }
    return image;
  }
};

// ---- plans: every group alone, all of them, and values that no draw gives ----

Plan identity() { return {0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0}; }

Plan with(std::initializer_list<std::pair<int, double>> changes) {
  Plan p = identity();
  for (const auto& change : changes) p[change.first] = static_cast<float>(change.second);
  return p;
}

std::vector<Plan> plans(int h, int w) {
  const auto turn = [](double degrees) {
    const double angle = degrees * std::acos(-1.0) / 180;
    return with({{kCos, std::cos(angle)}, {kSin, std::sin(angle)}});
  };
  std::vector<Plan> result{
      identity(),
      with({{kBrightness, 0.25}, {kSaturation, 1.7}, {kContrast, 0.6}}),
      with({{kShiftY, 1}, {kShiftX, -1}}),
      with({{kShiftY, -h / 8}, {kShiftX, w / 8}}),
      with({{kShiftY, h}, {kShiftX, 0}}),
      with({{kShiftX, -w + 1}}),
      with({{kTop, h / 4}, {kBottom, h}, {kLeft, 0}, {kRight, (w + 1) / 2}}),
      with({{kTop, 0}, {kBottom, 1}, {kLeft, w - 1}, {kRight, w}}),
      with({{kFlip, 1}}),
      with({{kFlip, 1},
            {kShiftX, 2},
            {kShiftY, -1},
            {kTop, 1},
            {kBottom, h - 1},
            {kLeft, 1},
            {kRight, w / 2}}),
      with({{kScaleX, 1 / 1.2}, {kScaleY, 1.2}}),
      with({{kScaleX, 1.13}, {kScaleY, 0.91}}),
      with({{kScaleX, 0.3}, {kScaleY, 2.5}}),
      with({{kScaleX, -1}, {kScaleY, 1}}),
      with({{kScaleX, 0}, {kScaleY, 1.1}}),
      turn(15),
      turn(-7.3),
      turn(90),
      turn(133),
  };
  // Chains: what a crop or a flip brings from outside meets scales that reach beyond the image, and others.
  const auto chain = [&](double degrees, std::initializer_list<std::pair<int, double>> others) {
    Plan plan = with(others);
    const Plan turned = turn(degrees);
    std::copy(turned.begin() + kCos, turned.end(), plan.begin() + kCos);
    result.push_back(plan);
  };
  chain(-12, {{kBrightness, -0.4},
              {kSaturation, 0.2},
              {kContrast, 1.4},
              {kShiftY, 2},
              {kShiftX, -3},
              {kTop, 1},
              {kBottom, h / 2},
              {kLeft, w / 3},
              {kRight, w},
              {kFlip, 1},
              {kScaleX, 0.88},
              {kScaleY, 1.07}});
  chain(8, {{kShiftY, -2},
            {kShiftX, -1},
            {kTop, h / 3},
            {kBottom, h},
            {kLeft, 0},
            {kRight, w / 2},
            {kScaleX, 1.19},
            {kScaleY, 0.9}});
  chain(0, {{kShiftY, 1}, {kShiftX, 2}, {kFlip, 1}, {kScaleX, 1.15}, {kScaleY, 1.1}});
  return result;
}

// ---- checks ----

template <class T>
struct Batch {
  Batch(const ImageBatch& shape, const std::vector<Plan>& rows, int64_t shift)
      : shape(shape),
        size(int64_t{shape.channels} * shape.height * shape.width),
        images(shape.n * size, shift),
        plan(shape.n * kPlanSize) {
    std::mt19937 random(static_cast<unsigned>(size + 1));
    std::normal_distribution<T> normal;
    for (int64_t i = 0; i < images.size(); ++i) images[i] = normal(random);
    for (int64_t i = 0; i < shape.n; ++i)
      std::copy_n(rows[static_cast<size_t>(i) % rows.size()].begin(), int{kPlanSize},
                  plan.data() + i * kPlanSize);
  }

  Array<T> run(const Setting& setting, const Queue& queue, bool transpose, int64_t shift = 0) const {
    const Dsa<T>& kernels = launchers<T>(setting);
    Array<T> out(shape.n * size, shift),
        scratch((kernels.scratch_bytes(shape) + 15) / 16 * 16 / int64_t{sizeof(T)});
    const auto launch = transpose ? kernels.adjoint : kernels.augment;
    CHECK(launch(images.data(), plan.data(), shape, scratch.data(), out.data(), queue) == 0);
    return out;
  }

  const ImageBatch shape;
  const int64_t size;
  Array<T> images;
  Array<float> plan;
};

template <class T>
void check_against_definition(const Setting& setting, int channels, int h, int w, int64_t shift) {
  const std::vector<Plan> rows = plans(h, w);
  const Batch<T> batch({static_cast<int64_t>(rows.size()), channels, h, w}, rows, shift);
  // A sample point is known to a rounding error of the side, and neighbouring pixels differ by a few units.
  const double tolerance = 8 * std::numeric_limits<T>::epsilon() * (std::max(h, w) + 8);
  for (const bool transpose : {false, true}) {
    const Array<T> out = batch.run(setting, setting.queues[0], transpose, shift);
    for (size_t q = 1; q < setting.queues.size(); ++q)
      CHECK(batch.run(setting, setting.queues[q], transpose, shift).same_bits(out));
    const Naive naive{channels, h, w, transpose};
    for (int64_t i = 0; i < batch.shape.n; ++i) {
      const T* image = batch.images.data() + i * batch.size;
      const Values expected = naive.apply(Values(image, image + batch.size), rows[static_cast<size_t>(i)]);
      for (int64_t k = 0; k < batch.size; ++k) {
        if (std::abs(out[i * batch.size + k] - expected[k]) <= tolerance * (1 + std::abs(expected[k])))
          continue;
        std::printf("plan %d, transpose %d, value %d of [%d, %d, %d]: got %.9g, expected %.9g\n",
                    static_cast<int>(i), transpose, static_cast<int>(k), channels, h, w,
                    static_cast<double>(out[i * batch.size + k]), expected[k]);
        CHECK(false);
      }
    }
  }
}

// Groups that copy pixels copy their bits, and the plan that changes nothing changes nothing.
template <class T>
void check_copies(const Setting& setting) {
  const int h = 9, w = 13;
  const std::vector<Plan> rows{identity(), with({{kFlip, 1}}), with({{kShiftY, -2}, {kShiftX, 3}})};
  const Batch<T> batch({3, 3, h, w}, rows, 0);
  const Array<T> out = batch.run(setting, setting.queues[0], false);
  for (int c = 0; c < 3; ++c)
    for (int y = 0; y < h; ++y)
      for (int x = 0; x < w; ++x) {
        const auto at = [&](int i, int row, int column) {
          return i * batch.size + (c * h + row) * w + column;
        };
        CHECK(out[at(0, y, x)] == batch.images[at(0, y, x)]);
        CHECK(out[at(1, y, x)] == batch.images[at(1, y, w - 1 - x)]);
        if (y >= 2 && x < w - 3) CHECK(out[at(2, y, x)] == batch.images[at(2, y - 2, x + 3)]);
      }
}

// A NaN goes where its pixel is copied to and nowhere else, not to the other channels either.
template <class T>
void check_nan_stays(const Setting& setting) {
  const int h = 9, w = 13;
  const std::vector<Plan> rows{identity(), with({{kFlip, 1}}), with({{kShiftY, -2}, {kShiftX, 3}}),
                               with({{kTop, 3}, {kBottom, 5}, {kLeft, 4}, {kRight, 9}})};
  Batch<T> batch({4, 3, h, w}, rows, 0);
  for (int i = 0; i < 4; ++i)
    batch.images[i * batch.size + (h + 4) * w + 5] = std::numeric_limits<T>::quiet_NaN();
  for (const bool transpose : {false, true}) {
    const Array<T> out = batch.run(setting, setting.queues[0], transpose);
    for (int i = 0; i < 4; ++i) {
      const T* image = out.data() + i * batch.size;
      const auto found = std::count_if(image, image + batch.size, [](T x) { return std::isnan(x); });
      CHECK(found == (i == 3 ? 0 : 1));  // it is cut out of the last one
    }
  }
}

// Images do not touch each other, whatever is in them or in their rows.
template <class T>
void check_not_finite(const Setting& setting) {
  const int h = 12, w = 10;
  std::vector<Plan> rows = plans(h, w);
  const size_t good = rows.size();
  Plan bad = rows.back();
  for (int column = 0; column < kPlanSize; ++column)
    for (const float value : {NAN, INFINITY, -INFINITY, 1e30f, 0.f}) {
      Plan row = bad;
      row[column] = value;
      rows.push_back(row);
    }
  for (size_t i = 0; i < good; ++i) rows.push_back(rows[i]);  // after all the bad ones
  Batch<T> batch({static_cast<int64_t>(rows.size()), 3, h, w}, rows, 0);
  for (int64_t k = 0; k < 3 * batch.size; ++k)
    batch.images[static_cast<int64_t>(good) * batch.size + k] = NAN;
  for (int64_t k = 0; k < static_cast<int64_t>(good) * batch.size; ++k)
    batch.images[static_cast<int64_t>(rows.size() - good) * batch.size + k] = batch.images[k];
  for (const bool transpose : {false, true}) {
    const Array<T> out = batch.run(setting, setting.queues[0], transpose);
    const T *first = out.data(), *last = first + (rows.size() - good) * static_cast<size_t>(batch.size);
    CHECK(!std::memcmp(first, last, good * static_cast<size_t>(batch.size) * sizeof(T)));
    for (int64_t k = 0; k < static_cast<int64_t>(good) * batch.size; ++k) CHECK(std::isfinite(first[k]));
  }
}

// A NaN in the taps of one image does not reach the next one through a buffer.
template <class T>
void check_neighbours(const Setting& setting) {
  const int h = 12, w = 10;
  Batch<T> batch({2, 3, h, w}, {with({{kCos, 0.97}, {kSin, 0.24}}), with({{kScaleX, 0.9}, {kScaleY, 0.9}})},
                 0);
  std::fill_n(batch.images.data(), batch.size, std::numeric_limits<T>::quiet_NaN());
  for (const bool transpose : {false, true}) {
    const Array<T> out = batch.run(setting, setting.queues[0], transpose);
    for (int64_t k = 0; k < batch.size; ++k) CHECK(std::isfinite(out[batch.size + k]));
  }
}

template <class T>
void check_more_images_than_blocks(const Setting& setting) {
  const Batch<T> many({1100, 1, 1, 2}, {identity()}, 0);
  CHECK(many.run(setting, setting.queues[0], false).same_bits(many.images));
}

#if !defined(DDPP_ON_DEVICE)  // a GPU has the shared memory that it has
// Images that fit into shared memory or not: the same bits.
template <class T>
void check_placement(const Setting& setting) {
  const auto same = [&](const ImageBatch& shape, const std::vector<Plan>& rows) {
    const Batch<T> batch(shape, rows, 0);
    for (const bool transpose : {false, true}) {
      CHECK(launchers<T>(setting).scratch_bytes(shape) == 0);
      const Array<T> shared = batch.run(setting, setting.queues[0], transpose);
      const size_t before = ddpp_emul::max_shared;
      ddpp_emul::max_shared = 1500;
      const int64_t scratch = launchers<T>(setting).scratch_bytes(shape);
      const Array<T> global = batch.run(setting, setting.queues[0], transpose);
      ddpp_emul::max_shared = before;
      CHECK(scratch > 0);
      CHECK(global.same_bits(shared));
      for (int64_t i = 0; i < global.size(); ++i) CHECK(!std::isnan(global[i]));
    }
  };
  same({19, 3, 17, 13}, plans(17, 13));
  same({300, 1, 8, 16}, plans(8, 16));
}
#endif

// The same bits whatever the instruction set.
template <class T>
void check_same_bits_on_every_isa() {
  const std::vector<Plan> rows = plans(33, 31);
  const Batch<T> batch({static_cast<int64_t>(rows.size()), 3, 33, 31}, rows, 0);
  Array<T> expected(batch.images.size()), out(batch.images.size());
  for (const bool transpose : {false, true})
    for (const Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
      if (!isa_runs_here(isa)) continue;
      const auto launch = transpose ? dsa_cpu<T>(isa).adjoint : dsa_cpu<T>(isa).augment;
      Array<T>& result = isa == Isa::base ? expected : out;
      launch(batch.images.data(), batch.plan.data(), batch.shape, nullptr, result.data(), kThisThread);
      CHECK(result.same_bits(expected));
    }
}

template <class T>
void check_all(const Setting& setting) {
  const int sizes[][2] = {{1, 1},  {1, 6},   {5, 1},   {2, 3},   {8, 8},
                          {7, 33}, {28, 28}, {32, 32}, {33, 31}, {64, 64}};
  for (const auto& size : sizes)
    for (const int channels : {1, 3}) {
      check_against_definition<T>(setting, channels, size[0], size[1], 0);
      if (size[0] < 30) check_against_definition<T>(setting, channels, size[0], size[1], 1);
    }
  check_against_definition<T>(setting, 3, 128, 128, 0);
  check_copies<T>(setting);
  check_nan_stays<T>(setting);
  check_not_finite<T>(setting);
  check_neighbours<T>(setting);
  for (const auto& shape : {ImageBatch{0, 3, 8, 8}, ImageBatch{2, 3, 0, 8}, ImageBatch{2, 1, 8, 0}})
    CHECK(Batch<T>(shape, {identity()}, 0).run(setting, setting.queues[0], false).size() == 0);
  check_more_images_than_blocks<T>(setting);
#if !defined(DDPP_ON_DEVICE)
  if (setting.cuda) check_placement<T>(setting);
#endif
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
