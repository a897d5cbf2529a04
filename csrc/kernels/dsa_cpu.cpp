#include "kernels/dsa.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/buffer.h"
#include "kernels/dsa_plan.h"
#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

constexpr int kLanes = 64;  // independent partial sums, which vectorise without -ffast-math
// Zero pixels before a row: those a tap left of it falls on, and the two right of the row above. Four, so
// that rows of most widths begin at a cache line.
constexpr int kBorder = 4;
constexpr int kTaps = 3;              // output pixels that one input pixel reaches in the separable adjoint
constexpr int64_t kTask = 8192;       // values worth a thread
constexpr int64_t kPrefetch = 65536;  // bytes of the next image that are fetched early

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

// The three parts of colour are one affine map: of a pixel's value, the sum over its channels and the image's
// mean, which the saturation does not change.
template <class T, int channels>
void recolor(const T* __restrict from, T* __restrict to, int size, const Color& color) {
  const T contrast = color.contrast, saturation = color.saturation;
  const T mean = sum(from, channels * size) / static_cast<T>(channels * size);
  const T own = contrast * saturation, shared = contrast * (1 - saturation) * (T(1) / 3);
  const T offset = (1 - contrast) * mean + color.brightness;
  if constexpr (channels == 1) {
    for (int i = 0; i < size; ++i) to[i] = contrast * from[i] + offset;
  } else {
    for (int i = 0; i < size; ++i) {
      const T r = from[i], g = from[i + size], b = from[i + 2 * size], rest = shared * (r + g + b) + offset;
      to[i] = own * r + rest;
      to[i + size] = own * g + rest;
      to[i + 2 * size] = own * b + rest;
    }
  }
}

// ---- crop, cutout and flip: copies ----

// The part of a Move's target that comes from inside.
struct Inside {
  Inside(const Move& m, int height, int width)
      : top(std::min(height, std::max(0, -m.dy))),
        bottom(std::max(top, std::min(height, height - m.dy))),
        left(std::min(width, std::max(0, m.mirror ? m.dx - width + 1 : -m.dx))),
        right(std::max(left, std::min(width, m.mirror ? m.dx + 1 : width - m.dx))) {}
  int top, bottom, left, right;
};

template <class T>
void move(const T* __restrict from, T* __restrict to, const ImageBatch& image, const Move& m) {
  const int h = image.height, w = image.width, size = h * w;
  const Inside part(m, h, w);
  for (int c = 0; c < image.channels; ++c, from += size, to += size) {
    if (part.top == part.bottom || part.left == part.right) {
      std::fill_n(to, size, T(0));
      continue;
    }
    if (m.mirror) {
      for (int y = part.top; y < part.bottom; ++y) {
        const T* row = from + (y + m.dy) * w + m.dx;
        for (int x = part.left; x < part.right; ++x) to[y * w + x] = row[-x];
      }
    } else {
      const int begin = part.top * w + part.left, end = (part.bottom - 1) * w + part.right;
      const int shift = m.dy * w + m.dx;
      std::copy(from + begin + shift, from + end + shift, to + begin);
    }
    std::fill_n(to, part.top * w, T(0));
    std::fill_n(to + part.bottom * w, (h - part.bottom) * w, T(0));
    for (int y = part.top; y < part.bottom; ++y) {
      for (int x = 0; x < part.left; ++x) to[y * w + x] = 0;
      for (int x = part.right; x < w; ++x) to[y * w + x] = 0;
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
  typedef T Pair __attribute__((vector_size(8 * sizeof(T))));
};
template <class T>
struct Packed<T, 1> {
  typedef T Pixel;
  typedef T Pair __attribute__((vector_size(2 * sizeof(T))));
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

// Whether an input pixel reaches no more than kTaps output pixels on each axis, as it does in every drawn
// plan.
template <class T>
bool separable(const Linear<T>& scale) {
  return std::min(std::abs(scale.xx), std::abs(scale.yy)) > T(0.7);
}

// run(row_taps, column_taps). Where a transposed scaling does not shrink the distances between sample points
// below a pixel, two taps do.
template <class T, class Run>
void with_taps(const Linear<T>& scale, bool transpose, const Run& run) {
  using Two = std::integral_constant<int, 2>;
  using All = std::integral_constant<int, kTaps>;
  const bool two_rows = !transpose || std::abs(scale.yy) >= 1;
  const bool two_columns = !transpose || std::abs(scale.xx) >= 1;
  if (two_rows) {
    two_columns ? run(Two(), Two()) : run(Two(), All());
  } else {
    two_columns ? run(All(), Two()) : run(All(), All());
  }
}

// Of each sample point of a row: the pixel above and left of it, and the shares of right and below, or of all
// four taps.
template <class T>
struct Taps {
  int* tap;
  T *right, *below, *shares;
};

#if defined(DDPP_ISA_avx512)
constexpr bool kQuads = true;
#include "kernels/dsa_avx512.inl"
#else
constexpr bool kQuads = false;  // whether a register holds four pixels
#endif

template <class T, int channels>
class Resampler {
 public:
  using Pixel = typename Packed<T, channels>::Pixel;
  using Pair = typename Packed<T, channels>::Pair;

  explicit Resampler(const ImageBatch& image)
      : height_(image.height),
        width_(image.width),
        pitch_(image.width + kBorder),
        area_((image.height + 3) * pitch_ + kLane),
        slot_((image.width + kLane - 1) / kLane * kLane),
        front_(area_),
        back_(area_),
        row_(image.width + 3),
        taps_(kSlots * slot_),
        colored_(channels * height_ * width_),
        weights_(kSlots * 6 * slot_),
        columns_(slot_),
        vertical_(height_),
        horizontal_(width_) {
    for (int x = 0; x < slot_; ++x) columns_.get()[x] = static_cast<T>(x) - static_cast<T>(width_ - 1) / 2;
  }

  void augment(const T* from, const float* p, T* to) {
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, height_, width_);
    const Color color = make_color(p, false);
    const Move moved = make_move(p, height_, width_, false);
    if (color.on()) {
      recolor<T, channels>(from, colored_.get(), height_ * width_, color);
      from = colored_.get();
    }
    moved.mirror ? pack<true>(from, moved) : pack<false>(from, moved);
    if (scale.on()) {
      if (separable(scale))
        apply_axes(scale, false);
      else
        gather(scale);
    }
    if (rotation.on()) gather(rotation);
    unpack(to, Move{});
  }

  void rotate(const T* from, const Linear<T>& rotation, bool transpose, T* to) {
    pack<false>(from, Move{});
    transpose ? scatter(rotation) : gather(rotation);
    unpack(to, Move{});
  }

  void adjoint(const T* from, const float* p, T* to) {
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, height_, width_);
    const Color color = make_color(p, true);
    pack<false>(from, Move{});
    if (rotation.on()) scatter(rotation);
    if (scale.on()) {
      if (separable(scale))
        apply_axes(scale, true);
      else
        scatter(scale);
    }
    clear_box(make_move(p, height_, width_, false));
    unpack(color.on() ? colored_.get() : to, make_move(p, height_, width_, true));
    if (color.on()) recolor<T, channels>(colored_.get(), to, height_ * width_, color);
  }

 private:
  // what taps count from
  static Pixel* origin(const Buffer<Pixel>& image) { return image.get() + kBorder - 1; }
  Pixel* inner_row(const Buffer<Pixel>& image, int y) const { return origin(image) + (y + 1) * pitch_ + 1; }

  template <bool mirror>
  void pack(const T* from, const Move& m) {
    const Inside part(m, height_, width_);
    for (int y = 0; y < height_; ++y) {
      Pixel* to = inner_row(front_, y);
      if (y < part.top || y >= part.bottom) {
        std::fill_n(to, width_, Pixel{});
        continue;
      }
      for (int x = 0; x < part.left; ++x) to[x] = Pixel{};
      const T* row = from + (y + m.dy) * width_ + (mirror ? m.dx - part.right + 1 : m.dx + part.left);
      pack_row<mirror>(row, to + part.left, part.right - part.left);
      for (int x = part.right; x < width_; ++x) to[x] = Pixel{};
    }
    clear_box(m);
  }

  void clear_box(const Move& m) {
    if (m.left >= m.right) return;
    for (int y = m.top; y < m.bottom; ++y)
      std::fill_n(inner_row(front_, y) + m.left, m.right - m.left, Pixel{});
  }

  template <bool mirror>
  void pack_row(const T* __restrict from, Pixel* __restrict to, int count) {
    const int size = height_ * width_;
    if constexpr (channels == 1) {
      for (int x = 0; x < count; ++x) to[mirror ? count - 1 - x : x] = from[x];
    } else if constexpr (fast && !mirror) {
      pack_pixels(from, size, to, count);
    } else if (count < 4) {
      for (int x = 0; x < count; ++x)
        to[mirror ? count - 1 - x : x] = Pixel{from[x], from[x + size], from[x + 2 * size], 0};
    } else {
      for (int i = 0; i < count; i += 4) {
        const int x = std::min(i, count - 4);
        Pixel r, g, b;
        const Pixel zero{};
        std::memcpy(&r, from + x, sizeof r);
        std::memcpy(&g, from + x + size, sizeof g);
        std::memcpy(&b, from + x + 2 * size, sizeof b);
        const Pixel rg01 = __builtin_shufflevector(r, g, 0, 4, 1, 5),
                    rg23 = __builtin_shufflevector(r, g, 2, 6, 3, 7);
        const Pixel b01 = __builtin_shufflevector(b, zero, 0, 4, 1, 5),
                    b23 = __builtin_shufflevector(b, zero, 2, 6, 3, 7);
        Pixel* at = mirror ? to + count - 1 - x : to + x;
        constexpr int step = mirror ? -1 : 1;
        at[0] = __builtin_shufflevector(rg01, b01, 0, 1, 4, 5);
        at[step] = __builtin_shufflevector(rg01, b01, 2, 3, 6, 7);
        at[2 * step] = __builtin_shufflevector(rg23, b23, 0, 1, 4, 5);
        at[3 * step] = __builtin_shufflevector(rg23, b23, 2, 3, 6, 7);
      }
    }
  }

  // Pixels from outside are those of the border, which is zero.
  void unpack(T* to, const Move& m) {
    if constexpr (fast) {
      if (!m.on()) {
        for (int y = 0; y < height_; ++y)
          unpack_pixels(inner_row(front_, y), to + y * width_, height_ * width_, width_);
        return;
      }
    }
    int* const taps = taps_.get();
    for (int x = 0; x < width_; ++x) taps[x] = clamped(m.mirror ? m.dx - x : x + m.dx, -1, width_);
    for (int y = 0; y < height_; ++y)
      unpack_row(inner_row(front_, clamped(y + m.dy, -1, height_)), to + y * width_);
  }

  void unpack_row(const Pixel* __restrict from, T* __restrict to) {
    const int* __restrict taps = taps_.get();
    const int width = width_, size = height_ * width_;
    if constexpr (channels == 1) {
      for (int x = 0; x < width; ++x) to[x] = from[taps[x]];
    } else if (width < 4) {
      for (int x = 0; x < width; ++x)
        for (int c = 0; c < channels; ++c) to[x + c * size] = from[taps[x]][c];
    } else {
      for (int i = 0; i < width; i += 4) {
        const int x = std::min(i, width - 4);
        const Pixel p0 = from[taps[x]], p1 = from[taps[x + 1]], p2 = from[taps[x + 2]],
                    p3 = from[taps[x + 3]];
        const Pixel rg01 = __builtin_shufflevector(p0, p1, 0, 4, 1, 5),
                    rg23 = __builtin_shufflevector(p2, p3, 0, 4, 1, 5);
        const Pixel b01 = __builtin_shufflevector(p0, p1, 2, 6, 3, 7),
                    b23 = __builtin_shufflevector(p2, p3, 2, 6, 3, 7);
        const Pixel r = __builtin_shufflevector(rg01, rg23, 0, 1, 4, 5),
                    g = __builtin_shufflevector(rg01, rg23, 2, 3, 6, 7),
                    b = __builtin_shufflevector(b01, b23, 0, 1, 4, 5);
        std::memcpy(to + x, &r, sizeof r);
        std::memcpy(to + x + size, &g, sizeof g);
        std::memcpy(to + x + 2 * size, &b, sizeof b);
      }
    }
  }

  void apply_axes(const Linear<T>& scale, bool transpose) {
    horizontal_.set(scale.xx, transpose);
    vertical_.set(scale.yy, transpose);
    with_taps(scale, transpose, [&](auto rows, auto columns) {
      apply_axes<decltype(rows)::value, decltype(columns)::value>();
    });
  }

  template <int row_taps, int column_taps>
  void apply_axes() {
    for (int y = 0; y < height_; ++y) {
      const T* __restrict source = reinterpret_cast<const T*>(inner_row(front_, vertical_.tap[y] - 1));
      T* __restrict blend = reinterpret_cast<T*>(row_.get() + 1);
      T weight[row_taps];
      for (int t = 0; t < row_taps; ++t) weight[t] = vertical_.weight(t)[y];
      for (int x = 0; x < width_ * lanes; ++x) {
        T value = weight[0] * source[x];
        for (int t = 1; t < row_taps; ++t) value += weight[t] * source[x + t * pitch_ * lanes];
        blend[x] = value;
      }
      const Pixel* __restrict row = row_.get();
      Pixel* __restrict to = inner_row(back_, y);
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

  Taps<T> slot(int i) const {
    T* const weights = weights_.get() + 6 * i * slot_;
    return {taps_.get() + i * slot_, weights, weights + slot_, weights + 2 * slot_};
  }

  void locate_row(int y, const Linear<T>& map, const Taps<T>& at) {
    const T cy = static_cast<T>(height_ - 1) / 2;
    const T v = static_cast<T>(y) - cy, x0 = map.xy * v + static_cast<T>(width_ - 1) / 2,
            y0 = map.yy * v + cy, xx = map.xx, yx = map.yx;
    const T* __restrict us = columns_.get();
    int* __restrict taps = at.tap;
    T* __restrict right = at.right, * __restrict below = at.below;
    const int width = width_, height = height_, pitch = pitch_, count = slot_;
    for (int i = 0; i < count; ++i) {
      const T u = us[i];
      T share_right, share_below;
      const int column = locate(xx * u + x0, width, &share_right),
                row = locate(yx * u + y0, height, &share_below);
      taps[i] = row * pitch + column;
      right[i] = share_right;
      below[i] = share_below;
    }
  }

  // A row is located before the one ahead of it is sampled: its taps are known when their addresses are
  // needed.
  void gather(const Linear<T>& map) {
    locate_row(0, map, slot(0));
    for (int y = 0; y < height_; ++y) {
      locate_row(y + 1, map, slot((y + 1) % 2));
      const Taps<T> at = slot(y % 2);
      if constexpr (fast) {
        gather_pixels(origin(front_), pitch_, at, width_, inner_row(back_, y));
      } else {
        gather_row(at, inner_row(back_, y));
      }
    }
    front_.swap(back_);
  }

  void gather_row(const Taps<T>& at, Pixel* __restrict to) {
    const Pixel* __restrict front = origin(front_);
    for (int x = 0; x < width_; ++x) {
      const Pixel* tap = front + at.tap[x];
      Pair above, below;
      std::memcpy(&above, tap, sizeof above);
      std::memcpy(&below, tap + pitch_, sizeof below);
      const Pair blend = above + at.below[x] * (below - above);
      Pixel left, right;
      if constexpr (channels == 1) {
        left = blend[0], right = blend[1];
      } else {
        left = __builtin_shufflevector(blend, blend, 0, 1, 2, 3);
        right = __builtin_shufflevector(blend, blend, 4, 5, 6, 7);
      }
      to[x] = left + at.right[x] * (right - left);
    }
  }

  // Neighbours add to the same pixels, and a load waits where two late stores overlap it: two distant rows,
  // and of both the even and then the odd columns, take turns.
  void scatter(const Linear<T>& map) {
    std::fill_n(reinterpret_cast<T*>(back_.get()), area_ * lanes, T(0));
    const int half = (height_ + 1) / 2;
    const auto locate = [&](int y) {
      for (int k = 0; k < 2; ++k) {
        const Taps<T> at = slot(y % 2 * 2 + k);
        locate_row(y + k * half, map, at);
        if constexpr (fast) share_taps(at, width_);
      }
    };
    locate(0);
    for (int y = 0; y < half; ++y) {
      locate(y + 1);
      const Taps<T> at[] = {slot(y % 2 * 2), slot(y % 2 * 2 + 1)};
      const Pixel* const from[] = {inner_row(front_, y), inner_row(front_, y + half)};
      y + half < height_ ? scatter_rows<2>(from, at) : scatter_rows<1>(from, at);
    }
    front_.swap(back_);
    clear_border();
  }

  template <int rows>
  void scatter_rows(const Pixel* const (&from)[2], const Taps<T> (&at)[2]) {
    Pixel* const to = origin(back_);
    const int pitch = pitch_, width = width_;
    for (int first = 0; first < 2; ++first)
      for (int x = first; x < width; x += 2)
        for (int k = 0; k < rows; ++k) scatter_pixel(from[k], at[k], x, to, pitch);
  }

  // Adds what pixel x of a row is worth to its four taps.
  static void scatter_pixel(const Pixel* from, const Taps<T>& at, int x, Pixel* to, int pitch) {
    Pixel* const above = to + at.tap[x];
    if constexpr (fast) {
      scatter_taps(from[x], at.shares + 4 * x, above, above + pitch);
      return;
    }
    Pair left, step, value;
    if constexpr (channels == 1) {
      left = Pair{1, 0}, step = Pair{-1, 1}, value = Pair{from[x], from[x]};
    } else {
      left = Pair{1, 1, 1, 1, 0, 0, 0, 0}, step = Pair{-1, -1, -1, -1, 1, 1, 1, 1};
      value = __builtin_shufflevector(from[x], from[x], 0, 1, 2, 3, 0, 1, 2, 3);
    }
    const Pair share = left + at.right[x] * step, lower = at.below[x] * share;
    add_pair((share - lower) * value, above);
    add_pair(lower * value, above + pitch);
  }

  static void add_pair(const Pair& part, Pixel* to) {
    Pair sum;
    std::memcpy(&sum, to, sizeof sum);
    sum += part;
    std::memcpy(to, &sum, sizeof sum);
  }

  void clear_border() {
    std::fill_n(origin(front_), pitch_, Pixel{});
    for (int y = 0; y < height_; ++y) {
      Pixel* const row = inner_row(front_, y);
      row[-1] = row[width_] = row[width_ + 1] = Pixel{};
    }
    std::fill_n(inner_row(front_, height_) - 1, 2 * pitch_, Pixel{});
  }

  static constexpr int lanes = sizeof(Pixel) / sizeof(T);
  static constexpr bool fast = kQuads && std::is_same_v<T, float> && channels == 3;
  static constexpr int kSlots = 4, kLane = 16;  // rows of taps; their values are whole registers
  int height_, width_, pitch_, area_, slot_;
  Buffer<Pixel> front_, back_, row_;
  Buffer<int> taps_;
  Buffer<T> colored_, weights_, columns_;
  Axis<T> vertical_, horizontal_;
};

// ---- the stages in turn, image by image ----

// One task's buffers. The last stage writes `to`, those before it the buffers in turn.
template <class T, int channels>
class Chain {
 public:
  explicit Chain(const ImageBatch& image)
      : image_(image),
        size_(image.height * image.width),
        buffer_(channels * size_),
        other_(channels * size_) {}

  void augment(const T* from, const float* p, T* to) {
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, image_.height, image_.width);
    const Color color = make_color(p, false);
    const Move moved = make_move(p, image_.height, image_.width, false);
    const bool resampled = scale.on() || rotation.on(), narrow = scales_alone(scale);
    if (resampled && !narrow) return resampler().augment(from, p, to);
    start(from, to, color.on() + (narrow ? 1 + rotation.on() : moved.on()));
    if (color.on()) stage([&](const T* x, T* y) { recolor<T, channels>(x, y, size_, color); });
    if (!narrow) {
      if (moved.on()) stage([&](const T* x, T* y) { move(x, y, image_, moved); });
      return;
    }
#if defined(DDPP_ISA_avx512)
    if constexpr (std::is_same_v<T, float>) {
      stage([&](const T* x, T* y) { narrow_scaling().apply(x, moved, scale, y); });
      if (rotation.on()) stage([&](const T* x, T* y) { resampler().rotate(x, rotation, false, y); });
    }
#endif
  }

  void adjoint(const T* from, const float* p, T* to) {
    const Linear<T> scale = make_scale<T>(p), rotation = make_rotation<T>(p, image_.height, image_.width);
    const Color color = make_color(p, true);
    const Move moved = make_move(p, image_.height, image_.width, true);
    const bool resampled = scale.on() || rotation.on(), narrow = scales_alone(scale);
    if (resampled && !narrow) return resampler().adjoint(from, p, to);
    start(from, to, color.on() + (narrow ? 1 + rotation.on() : moved.on()));
#if defined(DDPP_ISA_avx512)
    if constexpr (std::is_same_v<T, float>) {
      if (narrow && rotation.on()) stage([&](const T* x, T* y) { resampler().rotate(x, rotation, true, y); });
      if (narrow) stage([&](const T* x, T* y) { narrow_scaling().apply_transposed(x, scale, moved, y); });
    }
#endif
    if (!narrow && moved.on()) stage([&](const T* x, T* y) { move(x, y, image_, moved); });
    if (color.on()) stage([&](const T* x, T* y) { recolor<T, channels>(x, y, size_, color); });
  }

 private:
  // Whether crop, cutout, flip and scaling are one stage; all other resampling is the Resampler's, with what
  // comes before.
  bool scales_alone(const Linear<T>& scale) const {
#if defined(DDPP_ISA_avx512)
    return std::is_same_v<T, float> && scale.on() && image_.width <= NarrowScaling<channels>::kWidest &&
           separable(scale);
#else
    (void)scale;
    return false;
#endif
  }

  void start(const T* from, T* to, int stages) {
    from_ = from;
    to_ = to;
    left_ = stages;
    if (stages == 0) std::copy_n(from, channels * size_, to);
  }

  template <class Stage>
  void stage(const Stage& apply) {
    T* out = --left_ == 0 ? to_ : buffer_.get();
    apply(from_, out);
    from_ = out;
    buffer_.swap(other_);
  }

  Resampler<T, channels>& resampler() {
    if (!resampler_) resampler_.emplace(image_);
    return *resampler_;
  }

#if defined(DDPP_ISA_avx512)
  NarrowScaling<channels>& narrow_scaling() {
    if (!narrow_) narrow_.emplace(image_);
    return *narrow_;
  }
  std::optional<NarrowScaling<channels>> narrow_;
#endif

  const ImageBatch image_;
  const int size_;
  Buffer<T> buffer_, other_;
  std::optional<Resampler<T, channels>> resampler_;
  const T* from_;
  T* to_;
  int left_;
};

// Asks for an image while the one before it is computed; write: 1 to store it.
template <int write, class T>
void prefetch(const T* image, int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t k = 0; k < std::min(size, kPrefetch / int64_t{sizeof(T)}); k += line)
    __builtin_prefetch(image + k, write, 2);
}

template <class T, int channels, bool transpose>
void run_images(const T* images, const float* plan, const ImageBatch& batch, T* out, const Queue& queue) {
  const int64_t size = int64_t{channels} * batch.height * batch.width;
  if (batch.n == 0 || size == 0) return;
  parallel_for(queue, batch.n, (kTask + size - 1) / size, [=](int64_t begin, int64_t end) {
    Chain<T, channels> chain(batch);
    for (int64_t i = begin; i < end; ++i) {
      const float* p = plan + i * kPlanSize;
      if (i + 1 < end) {
        prefetch<0>(images + (i + 1) * size, size);
        prefetch<1>(out + (i + 1) * size, size);
      }
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
