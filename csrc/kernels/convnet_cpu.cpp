#include "kernels/convnet.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "kernels/buffer.h"
#include "kernels/norm_pool.h"
#include "kernels/winograd.h"

#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

constexpr int64_t kRow = 16;     // values of a row of few: a whole number of registers
constexpr int64_t kSquare = 16;  // side of what is transposed at once: its lines stay in the L1 cache
constexpr int64_t kPixels =
    10 * 32 * 32;  // at a time: what a part holds of the first block stays in the caches

int64_t whole_rows(int64_t values) { return (values + kRow - 1) / kRow * kRow; }

// Arrays of this thread that are kept from call to call: fresh pages would cost more than the work in them.
template <class T>
class Workspace {
 public:
  explicit Workspace(double* account) : account_(account) {}
  T* take(ConvNetAccount what, int64_t values) {
    account_[what] += static_cast<double>(sizeof(T) * values);
    thread_local std::vector<Buffer<T>> held;
    if (next_ == held.size()) held.emplace_back();
    Buffer<T>& memory = held[next_++];
    if (memory.size() < values) memory = Buffer<T>(values);
    return memory.get();
  }

 private:
  double* account_;
  size_t next_ = 0;
};

// Adds the time since the last lap to a stage.
class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds), last_(Clock::now()) {}
  void lap(ConvNetAccount stage) {
    const Clock::time_point now = Clock::now();
    seconds_[stage] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  Clock::time_point last_;
};

// c = a b, or c += a b, of one matrix each.
template <class T>
void multiply(const T* a, const T* b, int64_t rows, int64_t inner, int64_t columns, bool a_transposed,
              bool accumulate, T* c) {
  winograd<T>().multiply({a, 0}, {b, 0}, 1, rows, inner, columns, a_transposed, accumulate, {c, 0},
                         kThisThread);
}

template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t to_row, T* to) {
  for (int64_t r0 = 0; r0 < rows; r0 += kSquare)
    for (int64_t c0 = 0; c0 < columns; c0 += kSquare)
      for (int64_t r = r0; r < std::min(r0 + kSquare, rows); ++r)
        for (int64_t c = c0; c < std::min(c0 + kSquare, columns); ++c)
          to[c * to_row + r] = from[r * columns + c];
}

template <class T>
void add(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Planes are channels last. With a tangent the batch of every array holds values, then as many tangents.
template <class T>
struct Block {
  T *y, *pooled, *statistics;
  Matrices<T> tiles;  // of the convolution's input; none in the first block
};

// Some of the images; as many at a time as stay in the caches.
template <class T>
class Part {
 public:
  Part(const ConvNetStep<T>& step, int64_t first, int64_t count, T* gradient, double* account)
      : step_(step),
        size_(step.size),
        first_(first),
        count_(count),
        chunks_((count * size_.height * size_.width + kPixels - 1) / kPixels),
        faces_(step.tangent ? 2 : 1),
        gradient_(gradient),
        watch_(account),
        memory_(account) {
    chunks_ = std::min(chunks_, count);
    allocate((count + chunks_ - 1) / chunks_);
    arrange_parameters();
  }

  // phi, or 0 without a tangent
  double step() {
    std::fill_n(gradient_, size_.parameters(), T(0));
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      select(chunk);
      forward();
      differentiate_outputs();
      backward_linear();
      for (int64_t block = size_.depth; block-- > 0;) backward(block);
    }
    finish();
    return phi_;
  }

  void logits(T* to) {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      select(chunk);
      forward();
      for (int64_t i = 0; i < n_; ++i)
        std::copy_n(outputs_ + i * row_, size_.classes, to + (begin_ + i) * size_.classes);
    }
  }

 private:
  int64_t pixels(int64_t block) const { return size_.rows(block) * size_.columns(block); }
  int64_t stages() const { return (step_.m + 2) * (step_.m + 2); }
  int64_t taps() const { return kTaps * size_.channels; }
  int64_t tap_row() const { return whole_rows(taps()); }
  // what a convolution after the first sees
  TiledImages planes(int64_t block) const {
    return {faces_ * n_, size_.filters, size_.rows(block), size_.columns(block)};
  }
  Neighbourhoods neighbourhoods(int64_t row) const {
    return {1, size_.channels, size_.height, size_.width, size_.pad_y, size_.pad_x, row};
  }
  Dual<const T> parameters(int64_t offset) const {
    return {step_.theta + offset, step_.tangent ? step_.tangent + offset : nullptr};
  }
  static Dual<const T> read(Dual<T> x) { return {x.value, x.tangent}; }
  static Matrices<const T> read(Matrices<T> x) { return {x.data, x.stride}; }

  void allocate(int64_t most) {
    const int64_t c = size_.filters;
    n_ = most;
    row_ = whole_rows(size_.classes);
    blocks_.resize(size_.depth);
    for (int64_t k = 0; k < size_.depth; ++k) {
      Block<T>& block = blocks_[k];
      block.y = memory_.take(kPlanesBytes, faces_ * most * pixels(k) * c);
      block.pooled = memory_.take(kPlanesBytes, faces_ * most * pixels(k + 1) * c);
      block.statistics = memory_.take(kPlanesBytes, kDualStatistics * most * c);
      if (k == 0) continue;
      block.tiles.stride = planes(k).tiles(step_.m) * c + kApart;
      block.tiles.data = memory_.take(kTilesBytes, stages() * block.tiles.stride);
    }
    columns_ = memory_.take(kColumnsBytes, most * pixels(0) * tap_row());
    taps_sum_ = memory_.take(kParametersBytes, taps() * c);
    for (T*& matrix : taps_) matrix = memory_.take(kParametersBytes, taps() * c);
    for (T*& matrix : taps_transposed_) matrix = memory_.take(kParametersBytes, tap_row() * c);
    share_stages();
    norm_scratch_ = memory_.take(
        kParametersBytes,
        norm_pool<T>().scratch_bytes({most, c, size_.rows(0), size_.columns(0)}) / sizeof(T) + 1);
    d_norm_ = memory_.take(kParametersBytes, 2 * c);
    outputs_ = memory_.take(kParametersBytes, faces_ * most * row_);
    for (T*& matrix : by_feature_) matrix = memory_.take(kParametersBytes, size_.features() * row_);
    for (T*& matrix : by_class_) matrix = memory_.take(kParametersBytes, row_ * size_.features());
    linear_sum_ = memory_.take(kParametersBytes, size_.features() * row_);
  }

  // What is used up before the next of it begins lies in the same memory: it stays in the caches.
  void share_stages() {
    const int64_t c = size_.filters, stride = c * c + kApart;
    const int64_t rows = size_.depth > 1 ? planes(1).tiles(step_.m) : 0;
    grads_.stride = rows * c + kApart;
    sum_.stride = weights_[0].stride = weights_[1].stride = stride;
    const int64_t second = step_.tangent ? std::max(stride, grads_.stride) : grads_.stride;
    T* const memory = memory_.take(kStagesBytes, stages() * (stride + second));
    sum_.data = weights_[0].data = memory;
    grads_.data = weights_[1].data = memory + stages() * stride;
  }

  // The first and the last layer as matrices: taps or features by outputs, and their transposes.
  void arrange_parameters() {
    const int64_t c = size_.filters, pixels_left = pixels(size_.depth);
    for (int64_t face = 0; face < faces_; ++face) {
      const T* theta = face ? step_.tangent : step_.theta;
      transpose(theta, c, taps(), c, taps_[face]);
      std::fill_n(taps_transposed_[face], c * tap_row(), T(0));
      transpose(taps_[face], taps(), c, tap_row(), taps_transposed_[face]);
      std::fill_n(by_class_[face], row_ * size_.features(), T(0));
      for (int64_t k = 0; k < size_.classes; ++k)
        transpose(theta + size_.linear() + k * size_.features(), c, pixels_left, c,
                  by_class_[face] + k * size_.features());
      transpose(by_class_[face], row_, size_.features(), row_, by_feature_[face]);
    }
    watch_.lap(kLinearTime);
  }

  void select(int64_t chunk) {
    begin_ = first_ + count_ * chunk / chunks_;
    n_ = first_ + count_ * (chunk + 1) / chunks_ - begin_;
    adding_ = chunk > 0;
  }

  void forward() {
    const T* x = nullptr;
    for (int64_t k = 0; k < size_.depth; ++k) {
      if (k == 0) {
        forward_images();
      } else {
        convolve(k, x, blocks_[k].tiles, false, blocks_[k].y);
        normalise(k, 0, n_);
      }
      x = blocks_[k].pooled;
    }
    const int64_t features = size_.features();
    multiply(x, by_feature_[0], faces_ * n_, features, row_, false, false, outputs_);
    if (step_.tangent) multiply(x, by_feature_[1], n_, features, row_, false, true, outputs_ + n_ * row_);
    for (int64_t i = 0; i < faces_ * n_; ++i)
      add((i < n_ ? step_.theta : step_.tangent) + size_.linear_bias(), size_.classes, outputs_ + i * row_);
    watch_.lap(kLinearTime);
  }

  // The first block, image by image: the planes of one are still in the L2 cache when they are normalised.
  void forward_images() {
    const int64_t rows = pixels(0), c = size_.filters;
    for (int64_t i = 0; i < n_; ++i) {
      winograd<T>().columns(image(step_.images, i), neighbourhoods(taps()), columns(i), kThisThread);
      watch_.lap(kColumnsTime);
      for (int64_t face = 0; face < faces_; ++face)
        multiply(columns(i), taps_[face], rows, taps(), c, false, false,
                 blocks_[0].y + (face * n_ + i) * rows * c);
      watch_.lap(kConvolutionsTime);
      normalise(0, i, 1);
    }
  }

  template <class U>
  U* image(U* images, int64_t i) const {
    return images + (begin_ + i) * size_.channels * size_.height * size_.width;
  }
  T* columns(int64_t i) const { return columns_ + i * pixels(0) * tap_row(); }

  // By the weight of a block, or, for the input gradient, by the turned weight.
  void convolve(int64_t block, const T* x, Matrices<T> tiles, bool backward, T* y) {
    const int64_t c = size_.filters, weight = size_.weight(block);
    for (int64_t face = 0; face < faces_; ++face)
      winograd<T>().weight((face ? step_.tangent : step_.theta) + weight, c, c, step_.m, backward,
                           weights_[face], kThisThread);
    watch_.lap(kWeightsTime);
    const Matrices<const T> tangent = step_.tangent ? read(weights_[1]) : Matrices<const T>{nullptr, 0};
    winograd<T>().convolve({x, planes(block), c, read(weights_[0]), tangent, backward, tiles, y}, step_.m,
                           kThisThread);
    watch_.lap(kConvolutionsTime);
  }

  // `count` images from the i-th on.
  void normalise(int64_t k, int64_t i, int64_t count) {
    const Norm norm = select_norm(k, i, count);
    const Dual<const T> shift = parameters(size_.shift(k));
    if (step_.tangent) {
      norm_pool<T>().dual(read(norm.y), norm.scale, shift, size_.eps, norm.size, norm.pooled, norm.statistics,
                          kThisThread);
    } else {
      norm_pool<T>().forward(norm.y.value, norm.scale.value, shift.value, size_.eps, norm.size,
                             norm.pooled.value, norm.statistics, kThisThread);
    }
    watch_.lap(kNormsTime);
  }

  // The gradient of planes takes their place.
  void normalise_backward(int64_t k, int64_t i, int64_t count) {
    const Norm norm = select_norm(k, i, count);
    const T* const shift = step_.theta + size_.shift(k);
    T *const d_scale = d_norm_, *const d_shift = d_norm_ + size_.filters;
    if (step_.tangent) {
      norm_pool<T>().dual_backward(read(norm.pooled), read(norm.y), norm.scale, shift, norm.statistics,
                                   norm.size, norm_scratch_, norm.y, d_scale, d_shift, kThisThread);
    } else {
      norm_pool<T>().backward(norm.pooled.value, norm.y.value, norm.scale.value, shift, norm.statistics,
                              norm.size, norm_scratch_, norm.y.value, d_scale, d_shift, kThisThread);
    }
    add(d_norm_, 2 * size_.filters, gradient_ + size_.scale(k));
    watch_.lap(kNormsTime);
  }

  struct Norm {
    PlaneBatch size;
    Dual<T> y, pooled;
    Dual<const T> scale;
    T* statistics;
  };
  Norm select_norm(int64_t k, int64_t i, int64_t count) const {
    const int64_t c = size_.filters;
    return {{count, c, size_.rows(k), size_.columns(k)},
            faces(blocks_[k].y, i, pixels(k) * c),
            faces(blocks_[k].pooled, i, pixels(k + 1) * c),
            parameters(size_.scale(k)),
            blocks_[k].statistics + i * kDualStatistics * c};
  }
  Dual<T> faces(T* planes, int64_t i, int64_t plane) const {
    return {planes + i * plane, planes + (n_ + i) * plane};
  }

  // Outputs are replaced by the cotangents of their values and, with a tangent, of their tangents.
  void differentiate_outputs() {
    const T n = static_cast<T>(size_.n);
    for (int64_t i = 0; i < n_; ++i) {
      T *value = outputs_ + i * row_, *tangent = value + n_ * row_;
      const T* target = step_.targets + (begin_ + i) * size_.classes;
      softmax(value);
      if (!step_.tangent) {
        for (int64_t k = 0; k < size_.classes; ++k) value[k] = (value[k] - target[k]) / n;
        continue;
      }
      const T along = inner(value, tangent), target_along = inner(target, tangent);
      T* d_label = step_.d_labels + (begin_ + i) * size_.classes;
      for (int64_t k = 0; k < size_.classes; ++k) {
        const T t = tangent[k], by_tangent = (value[k] - target[k]) / n;
        phi_ += static_cast<double>(by_tangent) * t;
        d_label[k] = target[k] * (target_along - t) / n;
        value[k] *= (t - along) / n;
        tangent[k] = by_tangent;
      }
    }
  }

  void softmax(T* x) const {
    const T most = *std::max_element(x, x + size_.classes);
    T sum = 0;
    for (int64_t k = 0; k < size_.classes; ++k) sum += x[k] = std::exp(x[k] - most);
    for (int64_t k = 0; k < size_.classes; ++k) x[k] /= sum;
  }

  T inner(const T* x, const T* y) const {
    T sum = 0;
    for (int64_t k = 0; k < size_.classes; ++k) sum += x[k] * y[k];
    return sum;
  }

  // The gradient of the features takes their place.
  void backward_linear() {
    const int64_t features = size_.features();
    T* const x = blocks_.back().pooled;
    multiply(x, outputs_, features, faces_ * n_, row_, true, adding_, linear_sum_);
    for (int64_t i = 0; i < n_; ++i) add(outputs_ + i * row_, size_.classes, gradient_ + size_.linear_bias());
    multiply(outputs_, by_class_[0], faces_ * n_, row_, features, false, false, x);
    if (step_.tangent) multiply(outputs_ + n_ * row_, by_class_[1], n_, row_, features, false, true, x);
    watch_.lap(kLinearTime);
  }

  // From the gradient in a block's pooled planes to that in the pooled planes before, or in the images.
  void backward(int64_t k) {
    if (k == 0) return backward_images();
    normalise_backward(k, 0, n_);
    const Block<T>& block = blocks_[k];
    const int64_t c = size_.filters, rows = planes(k).tiles(step_.m);
    const Matrices<T> grads{grads_.data, rows * c + kApart};
    winograd<T>().output_transposed(block.y, planes(k), step_.m, grads, kThisThread);
    winograd<T>().multiply(read(grads), read(block.tiles), stages(), c, rows, c, true, false, sum_,
                           kThisThread);
    winograd<T>().weight_transposed(read(sum_), c, c, step_.m, gradient_ + size_.weight(k), kThisThread);
    watch_.lap(kWeightGradientsTime);
    convolve(k, block.y, {nullptr, 0}, true, blocks_[k - 1].pooled);
  }

  void backward_images() {
    const int64_t rows = pixels(0), c = size_.filters;
    for (int64_t i = 0; i < n_; ++i) {
      normalise_backward(0, i, 1);
      const Dual<T> d_y = faces(blocks_[0].y, i, rows * c);
      multiply(columns(i), d_y.value, taps(), rows, c, true, adding_ || i > 0, taps_sum_);
      watch_.lap(kWeightGradientsTime);
      if (!step_.tangent) continue;
      multiply(d_y.value, taps_transposed_[0], rows, c, tap_row(), false, false, columns(i));
      multiply(d_y.tangent, taps_transposed_[1], rows, c, tap_row(), false, true, columns(i));
      watch_.lap(kConvolutionsTime);
      winograd<T>().columns_transposed(columns(i), neighbourhoods(tap_row()), image(step_.d_images, i),
                                       kThisThread);
      watch_.lap(kColumnsTime);
    }
  }

  // The sums over chunks, as the gradients of parameters.
  void finish() {
    const int64_t c = size_.filters, pixels_left = pixels(size_.depth);
    transpose(taps_sum_, taps(), c, taps(), gradient_);
    transpose(linear_sum_, size_.features(), row_, size_.features(), by_class_[0]);
    for (int64_t k = 0; k < size_.classes; ++k)
      transpose(by_class_[0] + k * size_.features(), pixels_left, c, pixels_left,
                gradient_ + size_.linear() + k * size_.features());
    watch_.lap(kLinearTime);
  }

  const ConvNetStep<T>& step_;
  const ConvNetSize& size_;
  int64_t first_, count_, chunks_, faces_;
  T* gradient_;
  Stopwatch watch_;
  Workspace<T> memory_;
  int64_t begin_ = 0, n_ = 0, row_ = 0;  // the chunk's images; values of a row of outputs
  bool adding_ = false;                  // to the sums of earlier chunks
  double phi_ = 0;
  std::vector<Block<T>> blocks_;
  T *columns_, *taps_sum_, *norm_scratch_, *d_norm_, *outputs_, *linear_sum_;
  T *taps_[2], *taps_transposed_[2], *by_feature_[2], *by_class_[2];  // of values and tangents
  Matrices<T> grads_, sum_, weights_[2];
};

// body(part, first image, images, account) for every part, then the account of all.
template <class T, class Body>
void for_parts(const ConvNetStep<T>& step, const Queue& queue, const Body& body) {
  std::vector<double> accounts(step.parts * kConvNetAccounts);
  parallel_for(queue, step.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = step.size.n * part / step.parts;
      body(part, first, step.size.n * (part + 1) / step.parts - first, &accounts[part * kConvNetAccounts]);
    }
  });
  if (!step.account) return;
  std::fill(step.account + kTimes, step.account + kConvNetAccounts, 0.);
  for (size_t i = 0; i < accounts.size(); ++i) {
    const int64_t which = i % kConvNetAccounts;
    step.account[which] += which < kTimes ? accounts[i] / step.parts : accounts[i];
  }
}

template <class T>
void run(const ConvNetStep<T>& step, const Queue& queue) {
  const int64_t parameters = step.size.parameters();
  std::vector<double> phi(step.parts);
  for_parts(step, queue, [&](int64_t part, int64_t first, int64_t count, double* account) {
    T* const gradient = part ? step.scratch + (part - 1) * parameters : step.gradient;
    phi[part] = Part<T>(step, first, count, gradient, account).step();
  });
  parallel_for(queue, parameters, 1 << 14, [=](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < step.parts; ++part)
      add(step.scratch + (part - 1) * parameters + begin, end - begin, step.gradient + begin);
  });
  if (!step.tangent) return;
  *step.phi = 0;
  for (const double value : phi) *step.phi += static_cast<T>(value);
}

template <class T>
void logits(const ConvNetStep<T>& step, T* to, const Queue& queue) {
  for_parts(step, queue, [&](int64_t, int64_t first, int64_t count, double* account) {
    Part<T>(step, first, count, nullptr, account).logits(to);
  });
}

template <class T>
const ConvNet<T> kLaunchers{run<T>, logits<T>};

}  // namespace

template <class T>
const ConvNet<T>& convnet() {
  return kLaunchers<T>;
}
template const ConvNet<float>& convnet();
template const ConvNet<double>& convnet();

}  // namespace DDPP_ISA
}  // namespace ddpp

DDPP_ISA_END
