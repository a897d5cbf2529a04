// What AVX-512 does better for float32 images; included inside the namespace of the CPU's kernels, after
// their plain forms. The arithmetic is that of the plain forms, operation by operation.

using Pixels = Packed<float, 3>::Pixel;
using Values = float __attribute__((vector_size(64)));
using Whole = int __attribute__((vector_size(64)));

constexpr __mmask16 kAll = 0xffff;

// The first `count` of 16 values.
DDPP_ALWAYS_INLINE __mmask16 leading(int count) {
  return static_cast<__mmask16>((1u << std::min(16, std::max(0, count))) - 1);
}

// What is left of a row: all of 16 values or pixels, or some. A masked store costs several plain ones.
struct All {
  static DDPP_ALWAYS_INLINE Values load(const float* from) { return _mm512_loadu_ps(from); }
  static DDPP_ALWAYS_INLINE void store(float* to, const Values& x) { _mm512_storeu_ps(to, x); }
  static DDPP_ALWAYS_INLINE void store_pixels(Pixels* to, int, const Values& x) {
    _mm512_storeu_ps(reinterpret_cast<float*>(to), x);
  }
};
struct Some {
  explicit Some(int count) : count(count), held(leading(count)) {}
  DDPP_ALWAYS_INLINE Values load(const float* from) const { return _mm512_maskz_loadu_ps(held, from); }
  DDPP_ALWAYS_INLINE void store(float* to, const Values& x) const { _mm512_mask_storeu_ps(to, held, x); }
  // Four pixels, of which the first is the i-th.
  DDPP_ALWAYS_INLINE void store_pixels(Pixels* to, int i, const Values& x) const {
    _mm512_mask_storeu_ps(reinterpret_cast<float*>(to), leading(4 * (count - i)), x);
  }
  int count;
  __mmask16 held;
};

// body(x, what is left) for every 16 of a row.
template <class Body>
DDPP_ALWAYS_INLINE void for_sixteen(int count, const Body& body) {
  int x = 0;
  for (; x + 16 <= count; x += 16) body(x, All{});
  if (x < count) body(x, Some(count - x));
}

// ---- pixels side by side ----

// In each quarter of two registers: their first or last two values in turn, and the same of pairs of values.
// One cheap instruction each; a permutation of both registers costs twice that.
#define DDPP_FIRST(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define DDPP_LAST(a, b) \
  __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define DDPP_FIRST_PAIR(a, b) \
  __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define DDPP_LAST_PAIR(a, b) \
  __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)

// Sixteen pixels of the values a, b, c, d, four in a register. Not an array, which would not stay in
// registers.
struct Quads {
  DDPP_ALWAYS_INLINE Quads(const Values& a, const Values& b, const Values& c, const Values& d) {
    const Values at = apart(a), bt = apart(b), ct = apart(c), dt = apart(d);
    const Values ab = DDPP_FIRST(at, bt), cd = DDPP_FIRST(ct, dt);
    first = DDPP_FIRST_PAIR(ab, cd);
    second = DDPP_LAST_PAIR(ab, cd);
    const Values ab_last = DDPP_LAST(at, bt), cd_last = DDPP_LAST(ct, dt);
    third = DDPP_FIRST_PAIR(ab_last, cd_last);
    fourth = DDPP_LAST_PAIR(ab_last, cd_last);
  }
  template <class Left>
  DDPP_ALWAYS_INLINE void store(Pixels* to, const Left& left) const {
    left.store_pixels(to, 0, first);
    left.store_pixels(to + 4, 4, second);
    left.store_pixels(to + 8, 8, third);
    left.store_pixels(to + 12, 12, fourth);
  }
  Values first, second, third, fourth;

 private:
  // The values of each pixel of a register in a quarter of their own.
  static DDPP_ALWAYS_INLINE Values apart(const Values& x) {
    return __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  }
};

// `count` pixels from three planes `apart` values from each other.
inline void pack_pixels(const float* from, int apart, Pixels* to, int count) {
  for_sixteen(count, [=](int x, const auto& left) DDPP_LAMBDA {
    const float* at = from + x;
    Quads(left.load(at), left.load(at + apart), left.load(at + 2 * apart), Values{}).store(to + x, left);
  });
}

inline void unpack_pixels(const Pixels* from, float* to, int apart, int count) {
  for_sixteen(count, [=](int x, const auto& left) DDPP_LAMBDA {
    // What follows the last pixels is the border and the next row, or the image's spare pixels.
    const float* const at = reinterpret_cast<const float*>(from + x);
    Values rg[2], b[2];  // of eight pixels each: all r, then all g
    for (int k = 0; k < 2; ++k) {
      const Values first = _mm512_loadu_ps(at + 32 * k), second = _mm512_loadu_ps(at + 32 * k + 16);
      rg[k] =
          __builtin_shufflevector(first, second, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
      b[k] =
          __builtin_shufflevector(first, second, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    }
    left.store(to + x,
               __builtin_shufflevector(rg[0], rg[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
    left.store(to + x + apart, __builtin_shufflevector(rg[0], rg[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26,
                                                       27, 28, 29, 30, 31));
    left.store(to + x + 2 * apart,
               __builtin_shufflevector(b[0], b[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
  });
}

// ---- rotation ----

// The pixel pairs at two taps.
DDPP_ALWAYS_INLINE Values two_pairs(const Pixels* first, const Pixels* second) {
  const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(first)));
  return _mm512_insertf32x8(low, _mm256_loadu_ps(reinterpret_cast<const float*>(second)), 1);
}

// Four pixels at a time: two registers of two pairs each, blended from above and below, then from left and
// right.
inline void gather_pixels(const Pixels* front, int pitch, const Taps<float>& taps, int count, Pixels* to) {
  const Whole by_pair = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const Whole by_pixel = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  for_sixteen(count, [=](int x, const auto& left) DDPP_LAMBDA {
    const Values right = _mm512_loadu_ps(taps.right + x), below = _mm512_loadu_ps(taps.below + x);
#pragma GCC unroll 4
    for (int k = 0; k < 16; k += 4) {
      Values blend[2];
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        const int* const tap = taps.tap + x + k + 2 * pair;
        const Pixels *first = front + tap[0], *second = front + tap[1];
        const Values upper = two_pairs(first, second), lower = two_pairs(first + pitch, second + pitch);
        const Values share = _mm512_maskz_permutexvar_ps(kAll, (__m512i)(by_pair + (k + 2 * pair)), below);
        blend[pair] = upper + share * (lower - upper);
      }
      const Values first = __builtin_shufflevector(blend[0], blend[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18,
                                                   19, 24, 25, 26, 27),
                   second = __builtin_shufflevector(blend[0], blend[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21,
                                                    22, 23, 28, 29, 30, 31);
      const Values share = _mm512_maskz_permutexvar_ps(kAll, (__m512i)(by_pixel + k), right);
      left.store_pixels(to + x + k, k, first + share * (second - first));
    }
  });
}

// From the shares of right and below to those of the four taps.
inline void share_taps(const Taps<float>& taps, int count) {
  for (int x = 0; x < count; x += 16) {
    const Values right = _mm512_loadu_ps(taps.right + x), below = _mm512_loadu_ps(taps.below + x),
                 left = 1 - right;
    const Values lower_left = below * left, lower_right = below * right;
    Quads(left - lower_left, right - lower_right, lower_left, lower_right)
        .store(reinterpret_cast<Pixels*>(taps.shares) + x, All{});
  }
}

// The pixel's part in each of its four taps.
DDPP_ALWAYS_INLINE void scatter_taps(const Pixels& from, const float* shares, Pixels* above, Pixels* below) {
  const Whole by_tap = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const Values share =
      _mm512_maskz_permutexvar_ps(kAll, (__m512i)by_tap, _mm512_castps128_ps512(_mm_loadu_ps(shares)));
  const Values parts = (Values)_mm512_maskz_broadcast_f32x4(kAll, from) * share;
  float *upper = reinterpret_cast<float*>(above), *lower = reinterpret_cast<float*>(below);
  _mm256_storeu_ps(upper,
                   _mm256_loadu_ps(upper) + __builtin_shufflevector(parts, parts, 0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_storeu_ps(
      lower, _mm256_loadu_ps(lower) + __builtin_shufflevector(parts, parts, 8, 9, 10, 11, 12, 13, 14, 15));
}

// ---- crop, cutout, flip and scaling of narrow planes at once ----

// Channel by channel: a row is two registers, and its taps are a permutation of them.
template <int channels>
class NarrowScaling {
 public:
  static constexpr int kWidest = 32;

  explicit NarrowScaling(const ImageBatch& image)
      : image_(image), vertical_(image.height), horizontal_(image.width) {}

  // to = scaled(moved(from))
  void apply(const float* from, const Move& moved, const Linear<float>& scale, float* to) {
    run(from, moved, Move{}, scale, false, to);
  }
  // to = moved(transpose of scaled(from))
  void apply_transposed(const float* from, const Linear<float>& scale, const Move& moved, float* to) {
    run(from, Move{}, moved, scale, true, to);
  }

 private:
  // Not an array, which would not stay in registers.
  struct Row {
    Values low, high;
  };

  // Where the pixels of a Move come from, and which columns of a row are left beside its box.
  struct Source {
    Source(const Move& m, const ImageBatch& image, bool at_target)
        : move(m), height(image.height), width(image.width) {
      const int left = at_target ? m.left : m.mirror ? m.dx - m.right + 1 : m.left + m.dx;
      held = columns(0, width);
      held_in_box = held & ~columns(left, left + std::max(0, m.right - m.left));
    }
    static uint32_t columns(int first, int end) {
      const auto below = [](int n) {
        return static_cast<uint32_t>((uint64_t{1} << clamped(n, 0, kWidest)) - 1);
      };
      return below(end) & ~below(first);
    }
    // -1: outside
    int row(int y) const {
      const int from = y + move.dy;
      return y < 0 || y >= height || from < 0 || from >= height ? -1 : from;
    }
    uint32_t held_of(int y) const { return y >= move.top && y < move.bottom ? held_in_box : held; }
    Whole column(const Whole& x) const { return move.mirror ? move.dx - x : x + move.dx; }
    // All bits where a column and the one it comes from are inside.
    Whole inside(const Whole& x) const {
      const Whole from = column(x);
      return (x >= 0) & (x < width) & (from >= 0) & (from < width);
    }
    Move move;
    int height, width;
    uint32_t held, held_in_box;
  };

  // Of 16 columns of the result their taps in a row as it is read.
  template <int taps>
  struct Columns {
    Columns(const Axis<float>& axis, int first, const Source& read, const Source& write) {
      const Whole x = Whole{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first;
      const __mmask16 written = _mm512_movepi32_mask((__m512i)write.inside(x));
      const __m512i column = (__m512i)write.column(x);
      const Whole tap =
          (Whole)_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), written, column, axis.tap.get(), 4);
      for (int t = 0; t < taps; ++t) {
        at[t] = read.column(tap + (t - 1));
        inside[t] = read.inside(tap + (t - 1));
        share[t] = _mm512_mask_i32gather_ps(Values{}, written, column, axis.weight(t), 4);
      }
    }
    DDPP_ALWAYS_INLINE Values of(const Row& row) const {
      Values value = share[0] * tap(row, 0);
      DDPP_UNROLL_8 for (int t = 1; t < taps; ++t) value += share[t] * tap(row, t);
      return value;
    }
    DDPP_ALWAYS_INLINE Values tap(const Row& row, int t) const {
      return (Values)((Whole)_mm512_permutex2var_ps(row.low, (__m512i)at[t], row.high) & inside[t]);
    }
    Whole at[taps], inside[taps];
    Values share[taps];
  };

  void run(const float* from, const Move& before, const Move& after, const Linear<float>& scale,
           bool transpose, float* to) {
    horizontal_.set(scale.xx, transpose);
    vertical_.set(scale.yy, transpose);
    const Source read(before, image_, false), write(after, image_, true);
    with_taps(scale, transpose, [&](auto rows, auto columns) {
      apply_axes<decltype(rows)::value, decltype(columns)::value>(from, read, write, to);
    });
  }

  // Masks cost more than the branches around them.
  static DDPP_ALWAYS_INLINE Row load(const float* from, uint32_t held) {
    if (held == ~uint32_t{0}) return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(held), from),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(held >> 16), from + 16)};
  }
  // `left` values; zeros where they are not held.
  static DDPP_ALWAYS_INLINE void store(Row row, uint32_t left, uint32_t held, float* to) {
    if (held != left)
      row = {_mm512_maskz_mov_ps(static_cast<__mmask16>(held), row.low),
             _mm512_maskz_mov_ps(static_cast<__mmask16>(held >> 16), row.high)};
    if (left == ~uint32_t{0}) {
      _mm512_storeu_ps(to, row.low);
      _mm512_storeu_ps(to + 16, row.high);
    } else {
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(left), row.low);
      _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(left >> 16), row.high);
    }
  }

  // Of a row of the result the rows at its taps.
  template <int taps>
  struct Rows {
    Rows(const Axis<float>& axis, int y, const Source& read) {
      for (int t = 0; t < taps; ++t) {
        const int tap = axis.tap[y] + t - 1;
        at[t] = read.row(tap);
        held[t] = read.held_of(tap);
        share[t] = axis.weight(t)[y];
      }
    }
    DDPP_ALWAYS_INLINE Row of(const float* plane, int width) const {
      Row sum{};
      DDPP_UNROLL_8 for (int t = 0; t < taps; ++t) {
        const Row row = at[t] < 0 ? Row{} : load(plane + at[t] * width, held[t]);
        sum = t == 0 ? Row{share[t] * row.low, share[t] * row.high}
                     : Row{sum.low + share[t] * row.low, sum.high + share[t] * row.high};
      }
      return sum;
    }
    int at[taps];
    uint32_t held[taps];
    float share[taps];
  };

  template <int row_taps, int column_taps>
  void apply_axes(const float* from, const Source& read, const Source& write, float* to) const {
    const Columns<column_taps> low(horizontal_, 0, read, write), high(horizontal_, 16, read, write);
    const int width = image_.width, size = image_.height * width;
    for (int y = 0; y < image_.height; ++y, to += width) {
      const int scaled = write.row(y);
      if (scaled < 0) {
        for (int c = 0; c < channels; ++c) store(Row{}, write.held, write.held, to + c * size);
        continue;
      }
      const Rows<row_taps> rows(vertical_, scaled, read);
      for (int c = 0; c < channels; ++c) {
        const Row row = rows.of(from + c * size, width);
        store({low.of(row), high.of(row)}, write.held, write.held_of(y), to + c * size);
      }
    }
  }

  const ImageBatch image_;
  Axis<float> vertical_, horizontal_;
};
