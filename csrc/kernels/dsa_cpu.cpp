#include "kernels/dsa.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "kernels/dsa_plan.h"
#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

constexpr int kLanes = 64;       // independent partial sums, which vectorise without -ffast-math
constexpr int kBorder = 3;       // zero pixels around an image, 1 before and 2 after: no tap needs a test
constexpr int kTaps = 3;         // output pixels that one input pixel reaches in the separable adjoint
constexpr int64_t kTask = 8192;  // values worth a thread

// ---- colour ----

template <class T>
T sum(const T* __restrict x, int n) {
  T part[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) part[k] += x[i + k];
  for (int k = 0; k < n - i; ++k) part[k] += x[i + k];
  for (int k = 1; k < kLanes; ++k) part[0] += part[k];
  return part[0];
}

template <class T, int channels>
void recolor(const T* __restrict from, T* __restrict to, int size, const Color& color) {
  const T brightness = color.brightness, saturation = color.saturation, contrast = color.contrast;
  const T mean = sum(from, channels * size) / static_cast<T>(channels * size) + brightness;
  if constexpr (channels == 1) {
    for (int i = 0; i < size; ++i) to[i] = (from[i] + brightness - mean) * contrast + mean;
    return;
  }
  for (int i = 0; i < size; ++i) {
    const T r = from[i] + brightness, g = from[i + size] + brightness, b = from[i + 2 * size] + brightness;
    const T gray = (r + g + b) * (T(1) / 3);
    to[i] =
        ((r - gray) * saturation + gray - mean) * contrast + mean;  // the saturated image has the same mean
    to[i + size] = ((g - gray) * saturation + gray - mean) * contrast + mean;
    to[i + 2 * size] = ((b - gray) * saturation + gray - mean) * contrast + mean;
  }
}

// ---- crop, cutout and flip: copies ----

template <class T>
void move(const T* __restrict from, T* __restrict to, const ImageBatch& image, const Move& m) {
  const int h = image.height, w = image.width, size = h * w;
  // The part of `to` that comes from inside.
  const int top = std::max(0, -m.dy), bottom = std::min(h, h - m.dy);
  const int left = std::min(w, std::max(0, m.mirror ? m.dx - w + 1 : -m.dx));
  const int right = std::max(left, std::min(w, m.mirror ? m.dx + 1 : w - m.dx));
  for (int c = 0; c < image.channels; ++c, from += size, to += size) {
    if (top >= bottom || left >= right) {
      std::fill_n(to, size, T(0));
      continue;
    }
    if (m.mirror) {
      for (int y = top; y < bottom; ++y) {
        const T* row = from + (y + m.dy) * w + m.dx;
        for (int x = left; x < right; ++x) to[y * w + x] = row[-x];
      }
    } else {
      const int begin = top * w + left, end = (bottom - 1) * w + right, shift = m.dy * w + m.dx;
      std::copy(from + begin + shift, from + end + shift, to + begin);
    }
    std::fill_n(to, top * w, T(0));
    std::fill_n(to + bottom * w, (h - bottom) * w, T(0));
    for (int y = top; y < bottom; ++y) {
      for (int x = 0; x < left; ++x) to[y * w + x] = 0;
      for (int x = right; x < w; ++x) to[y * w + x] = 0;
    }
    for (int y = m.top; y < m.bottom; ++y)
      for (int x = m.left; x < m.right; ++x) to[y * w + x] = 0;
  }
}

// ---- scale and rotation: bilinear resampling ----

// The channels of a pixel side by side, so that one load fetches a tap of all of them.
template <class T, int channels>
struct Packed {
  typedef T Pixel __attribute__((vector_size(4 * sizeof(T))));
};
template <class T>
struct Packed<T, 1> {
  typedef T Pixel;
};

// One axis of a scaling as a sparse matrix: output i is the sum over t of weight(t)[i] * input[tap[i] + t].
template <class T>
struct Axis {
  explicit Axis(int size) : size(size), tap(new int[size]), weights(new T[size * kTaps]) {}
  T* weight(int t) const { return weights.get() + t * size; }

  void set(T scale, bool transpose) {
    const T centre = static_cast<T>(size - 1) / 2;
    if (transpose) clear();
    for (int i = 0; i < size; ++i) {
      T second;
      const int first = locate(scale * (static_cast<T>(i) - centre) + centre, size, &second);
      if (transpose) {
        add(first - 1, i, 1 - second);
        add(first, i, second);
      } else {
        tap[i] = first;
        weight(0)[i] = 1 - second;
        weight(1)[i] = second;
      }
    }
  }

  int size;
  std::unique_ptr<int[]> tap;  // counted in the bordered image
  std::unique_ptr<T[]> weights;

 private:
  void clear() {
    std::fill_n(tap.get(), size, 0);
    std::fill_n(weights.get(), size * kTaps, T(0));
  }

  // In the transposed matrix: pixel i of the input, the next one in a row of them, is a tap of output pixel
  // `to`.
  void add(int to, int i, T share) {
    if (to < 0 || to >= size || share == 0) return;
    if (tap[to] == 0) tap[to] = i + 1;
    weight(i + 1 - tap[to])[to] = share;
  }
};

template <class T, int channels>
class Resampler {
 public:
  using Pixel = typename Packed<T, channels>::Pixel;

  explicit Resampler(const ImageBatch& image)
      : height_(image.height),
        width_(image.width),
        pitch_(image.width + kBorder),
        area_((image.height + kBorder) * pitch_),
        front_(new Pixel[area_]()),
        back_(new Pixel[area_]()),
        row_(new Pixel[pitch_]()),
        taps_(new int[width_]),
        weights_(new T[2 * width_]),
        vertical_(height_),
        horizontal_(width_) {}

  // p: the row of the plan
  static bool on(const float* p) { return make_scale<T>(p).on() || make_rotation<T>(p, 2, 2).on(); }

  void augment(const T* from, const float* p, T* to) {
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, height_, width_);
    pack(from);
    if (scale.on()) {
      if (separable(scale))
        apply_axes<2, 2>(scale, false);
      else
        gather(scale);
    }
    if (rotation.on()) gather(rotation);
    unpack(to);
  }

  void adjoint(const T* from, const float* p, T* to) {
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, height_, width_);
    pack(from);
    if (rotation.on()) scatter(rotation);
    if (scale.on()) {
      if (separable(scale))
        apply_transposed_axes(scale);
      else
        scatter(scale);
    }
    unpack(to);
  }

 private:
  // Whether an input pixel reaches no more than kTaps output pixels on each axis, as it does in every drawn
  // plan.
  static bool separable(const Linear<T>& scale) {
    return std::min(std::abs(scale.xx), std::abs(scale.yy)) > T(0.7);
  }

  Pixel* inner_row(Pixel* image, int y) const { return image + (y + 1) * pitch_ + 1; }

  void pack(const T* __restrict from) {
    const int size = height_ * width_;
    for (int y = 0; y < height_; ++y, from += width_) {
      Pixel* __restrict to = inner_row(front_.get(), y);
      for (int x = 0; x < width_; ++x) {
        if constexpr (channels == 1)
          to[x] = from[x];
        else
          to[x] = Pixel{from[x], from[x + size], from[x + 2 * size], 0};
      }
    }
  }

  void unpack(T* __restrict to) {
    const int size = height_ * width_;
    for (int y = 0; y < height_; ++y, to += width_) {
      const T* __restrict from = reinterpret_cast<const T*>(inner_row(front_.get(), y));
      if constexpr (channels == 1) {
        std::copy(from, from + width_, to);
      } else {
        for (int x = 0; x < width_; ++x) {
          to[x] = from[4 * x];
          to[x + size] = from[4 * x + 1];
          to[x + 2 * size] = from[4 * x + 2];
        }
      }
    }
  }

  // Where a scaling does not shrink the distances between sample points below a pixel, two taps do.
  void apply_transposed_axes(const Linear<T>& scale) {
    const bool two_rows = std::abs(scale.yy) >= 1, two_columns = std::abs(scale.xx) >= 1;
    if (two_rows) {
      two_columns ? apply_axes<2, 2>(scale, true) : apply_axes<2, kTaps>(scale, true);
    } else {
      two_columns ? apply_axes<kTaps, 2>(scale, true) : apply_axes<kTaps, kTaps>(scale, true);
    }
  }

  template <int row_taps, int column_taps>
  void apply_axes(const Linear<T>& scale, bool transpose) {
    horizontal_.set(scale.xx, transpose);
    vertical_.set(scale.yy, transpose);
    for (int y = 0; y < height_; ++y) {
      const T* __restrict source = reinterpret_cast<const T*>(front_.get() + vertical_.tap[y] * pitch_ + 1);
      T* __restrict blend = reinterpret_cast<T*>(row_.get() + 1);
      T weight[row_taps];
      for (int t = 0; t < row_taps; ++t) weight[t] = vertical_.weight(t)[y];
      for (int x = 0; x < width_ * lanes; ++x) {
        T value = weight[0] * source[x];
        for (int t = 1; t < row_taps; ++t) value += weight[t] * source[x + t * pitch_ * lanes];
        blend[x] = value;
      }
      const Pixel* __restrict row = row_.get();
      Pixel* __restrict to = inner_row(back_.get(), y);
      const int* __restrict first = horizontal_.tap.get();
      const T* __restrict weights = horizontal_.weights.get();
      const int width = width_;
      for (int x = 0; x < width; ++x) {
        const Pixel* tap = row + first[x];
        Pixel value = weights[x] * tap[0];
        for (int t = 1; t < column_taps; ++t) value += weights[x + t * width] * tap[t];
        to[x] = value;
      }
    }
    front_.swap(back_);
  }

  // taps_ and weights_ of row y: the pixel above and left of each sample point, and the shares of right and
  // below.
  void locate_row(int y, const Linear<T>& map) {
    const T cx = static_cast<T>(width_ - 1) / 2, cy = static_cast<T>(height_ - 1) / 2;
    const T v = static_cast<T>(y) - cy, x0 = map.xy * v + cx, y0 = map.yy * v + cy, xx = map.xx, yx = map.yx;
    int* __restrict taps = taps_.get();
    T* __restrict shares = weights_.get();
    const int width = width_, height = height_, pitch = pitch_;
    for (int i = 0; i < width; ++i) {
      const T u = static_cast<T>(i) - cx;
      T right, below;
      const int column = locate(xx * u + x0, width, &right), row = locate(yx * u + y0, height, &below);
      taps[i] = row * pitch + column;
      shares[i] = right;
      shares[i + width] = below;
    }
  }

  void gather(const Linear<T>& map) {
    const T* __restrict fx = weights_.get(), * __restrict fy = fx + width_;
    for (int y = 0; y < height_; ++y) {
      locate_row(y, map);
      Pixel* __restrict to = inner_row(back_.get(), y);
      for (int x = 0; x < width_; ++x) {
        const Pixel *above = front_.get() + taps_[x], *below = above + pitch_;
        const Pixel a = above[0] + fx[x] * (above[1] - above[0]),
                    b = below[0] + fx[x] * (below[1] - below[0]);
        to[x] = a + fy[x] * (b - a);
      }
    }
    front_.swap(back_);
  }

  void scatter(const Linear<T>& map) {
    std::fill_n(back_.get(), area_, Pixel{});
    const int half = width_ / 2;
    for (int y = 0; y < height_; ++y) {
      locate_row(y, map);
      const Pixel* from = inner_row(front_.get(), y);
      // Neighbours add to the same pixels; taking turns between the halves spares the wait for the last
      // store.
      for (int x = 0; x < half; ++x) {
        add_taps(from, x);
        add_taps(from, x + half);
      }
      if (width_ % 2) add_taps(from, width_ - 1);
    }
    front_.swap(back_);
    clear_border();
  }

  void clear_border() {
    Pixel* image = front_.get();
    std::fill_n(image, pitch_, Pixel{});
    for (int y = 1; y <= height_; ++y) {
      image[y * pitch_] = Pixel{};
      image[y * pitch_ + width_ + 1] = image[y * pitch_ + width_ + 2] = Pixel{};
    }
    std::fill_n(image + (height_ + 1) * pitch_, 2 * pitch_, Pixel{});
  }

  void add_taps(const Pixel* from, int x) {
    const T fx = weights_[x], fy = weights_[x + width_];
    Pixel *above = back_.get() + taps_[x], *below = above + pitch_;
    const Pixel b = fy * from[x], a = from[x] - b, b1 = fx * b, a1 = fx * a;
    above[0] += a - a1;
    above[1] += a1;
    below[0] += b - b1;
    below[1] += b1;
  }

  static constexpr int lanes = sizeof(Pixel) / sizeof(T);
  int height_, width_, pitch_, area_;
  std::unique_ptr<Pixel[]> front_, back_, row_;
  std::unique_ptr<int[]> taps_;
  std::unique_ptr<T[]> weights_;
  Axis<T> vertical_, horizontal_;
};

// ---- the stages in turn, image by image ----

// One task's buffers. Each stage that is on reads what the one before it wrote; the last one writes `to`.
template <class T, int channels>
class Chain {
 public:
  explicit Chain(const ImageBatch& image)
      : image_(image),
        size_(image.height * image.width),
        buffers_(new T[2 * static_cast<size_t>(channels) * size_]) {}

  void augment(const T* from, const float* p, T* to) {
    const Color color = make_color(p, false);
    const Move moved = make_move(p, image_.height, image_.width, false);
    start(from, to, color.on() + moved.on() + resamples(p));
    if (color.on()) stage([&](const T* x, T* y) { recolor<T, channels>(x, y, size_, color); });
    if (moved.on()) stage([&](const T* x, T* y) { move(x, y, image_, moved); });
    if (resamples(p)) stage([&](const T* x, T* y) { resampler().augment(x, p, y); });
  }

  void adjoint(const T* from, const float* p, T* to) {
    const Color color = make_color(p, true);
    const Move moved = make_move(p, image_.height, image_.width, true);
    start(from, to, color.on() + moved.on() + resamples(p));
    if (resamples(p)) stage([&](const T* x, T* y) { resampler().adjoint(x, p, y); });
    if (moved.on()) stage([&](const T* x, T* y) { move(x, y, image_, moved); });
    if (color.on()) stage([&](const T* x, T* y) { recolor<T, channels>(x, y, size_, color); });
  }

 private:
  static bool resamples(const float* p) { return Resampler<T, channels>::on(p); }

  void start(const T* from, T* to, int stages) {
    from_ = from;
    to_ = to;
    left_ = stages;
    if (stages == 0) std::copy_n(from, channels * size_, to);
  }

  template <class Stage>
  void stage(const Stage& apply) {
    T* out = --left_ == 0 ? to_ : buffers_.get() + (left_ % 2) * channels * size_;
    apply(from_, out);
    from_ = out;
  }

  Resampler<T, channels>& resampler() {
    if (!resampler_) resampler_.emplace(image_);
    return *resampler_;
  }

  const ImageBatch image_;
  const int size_;
  const std::unique_ptr<T[]> buffers_;
  std::optional<Resampler<T, channels>> resampler_;
  const T* from_;
  T* to_;
  int left_;
};

template <class T, int channels, bool transpose>
void run_images(const T* images, const float* plan, const ImageBatch& batch, T* out, const Queue& queue) {
  const int64_t size = int64_t{channels} * batch.height * batch.width;
  if (batch.n == 0 || size == 0) return;
  parallel_for(queue, batch.n, (kTask + size - 1) / size, [=](int64_t begin, int64_t end) {
    Chain<T, channels> chain(batch);
    for (int64_t i = begin; i < end; ++i) {
      const float* p = plan + i * kPlanSize;
      if (transpose) {
        chain.adjoint(images + i * size, p, out + i * size);
      } else {
        chain.augment(images + i * size, p, out + i * size);
      }
    }
  });
}

template <class T, bool transpose>
int run(const T* images, const float* plan, const ImageBatch& batch, void*, T* out, const Queue& queue) {
  const auto run_as = batch.channels == 1 ? run_images<T, 1, transpose> : run_images<T, 3, transpose>;
  run_as(images, plan, batch, out, queue);
  return 0;
}

int64_t scratch_bytes(const ImageBatch&) { return 0; }

}  // namespace

template <class T>
const Dsa<T>& dsa() {
  static const Dsa<T> launchers{scratch_bytes, run<T, false>, run<T, true>};
  return launchers;
}
template const Dsa<float>& dsa();
template const Dsa<double>& dsa();

}  // namespace DDPP_ISA
}  // namespace ddpp

DDPP_ISA_END
