// What a row of a plan means, for the kernels of every device.
#pragma once

#include "kernels/dsa.h"

#if defined(__CUDACC__)
#define DDPP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DDPP_HOST_DEVICE inline
#endif

namespace ddpp {

// NaN gives `low`.
template <class T>
DDPP_HOST_DEVICE T clamped(T x, T low, T high) {
  const T above = x > low ? x : low;
  return above < high ? above : high;
}
#if defined(__CUDACC__)  // the same, in one instruction each
DDPP_HOST_DEVICE float clamped(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
#endif

// Colour is one affine map of an image's values. Without the offset it is its own transpose.
struct Color {
  float brightness, saturation, contrast;
  DDPP_HOST_DEVICE bool on() const { return brightness != 0 || saturation != 1 || contrast != 1; }
};

DDPP_HOST_DEVICE Color make_color(const float* p, bool transpose) {
  return {transpose ? 0 : p[kBrightness], p[kSaturation], p[kContrast]};
}

// Crop, cutout and flip, or the transpose of the three: to(y, x) = from(y + dy, x + dx), mirrored
// from(y + dy, dx - x); 0 from outside and in the box of `to`.
struct Move {
  int dy, dx;
  bool mirror;
  int top, bottom, left, right;
  DDPP_HOST_DEVICE bool moves() const { return mirror || dy != 0 || dx != 0; }
  DDPP_HOST_DEVICE bool cuts() const { return top < bottom && left < right; }
  DDPP_HOST_DEVICE bool on() const { return moves() || cuts(); }
};

DDPP_HOST_DEVICE Move make_move(const float* p, int height, int width, bool transpose) {
  const auto whole = [](float x, int low, int high) {
    return static_cast<int>(clamped(x, static_cast<float>(low), static_cast<float>(high)));
  };
  const int dy = whole(p[kShiftY], -height, height), dx = whole(p[kShiftX], -width, width);
  const int top = whole(p[kTop], 0, height), bottom = whole(p[kBottom], 0, height);
  const int left = whole(p[kLeft], 0, width), right = whole(p[kRight], 0, width);
  const bool mirror = p[kFlip] != 0;
  if (!transpose) {
    if (!mirror) return {dy, dx, false, top, bottom, left, right};
    return {dy, width - 1 + dx, true, top, bottom, width - right, width - left};
  }
  return {-dy,
          mirror ? width - 1 + dx : -dx,
          mirror,
          clamped(top + dy, 0, height),
          clamped(bottom + dy, 0, height),
          clamped(left + dx, 0, width),
          clamped(right + dx, 0, width)};
}

// A resampling: to(v, u) = from(yx u + yy v, xx u + xy v), in pixels from the centre of the image.
template <class T>
struct Linear {
  T xx, xy, yx, yy;
  DDPP_HOST_DEVICE bool on() const { return xx != 1 || xy != 0 || yx != 0 || yy != 1; }
};

template <class T>
DDPP_HOST_DEVICE Linear<T> make_scale(const float* p) {
  return {p[kScaleX], 0, 0, p[kScaleY]};
}

// The plan's coordinates run from -1 to 1 between the outermost pixels' centres on both axes.
template <class T>
DDPP_HOST_DEVICE Linear<T> make_rotation(const float* p, int height, int width) {
  const T rows = static_cast<T>(height - 1), columns = static_cast<T>(width - 1);
  const T cos = p[kCos], sin = p[kSin];
  // One row has no extent: its only coordinate is 0.
  return {cos, height > 1 ? -sin * (columns / rows) : T(0), width > 1 ? sin * (rows / columns) : T(0), cos};
}

// Between which pixels of 0 to size - 1 a coordinate falls: the first tap is the result - 1, and the second
// one has the weight. Beyond one pixel from the image both taps are outside, or their weight is 0.
template <class T>
DDPP_HOST_DEVICE int locate(T x, int size, T* weight) {
  const T inside = clamped(x, T(-1), static_cast<T>(size)) + 1;
  const int tap = static_cast<int>(inside);
  *weight = inside - static_cast<T>(tap);
  return tap;
}

}  // namespace ddpp
