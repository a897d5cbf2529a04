#include "kernels/match_loss.h"

#include <cstring>
#include <limits>

#include "kernels/isa_target.h"

namespace ddpp {
namespace DDPP_ISA {
namespace {

constexpr int kLanes = 32;         // partial sums of one task, alike on every instruction set
constexpr int64_t kChunk = 16384;  // elements of one task: fixed, so that no sum depends on the threads

// Vectors of the compiler's own, as wide as the registers: plain loops over the comparisons below do not
// vectorise before AVX-512. They go by reference, so that none crosses an ABI.
template <class T>
using Vector __attribute__((vector_size(DDPP_VECTOR_BYTES))) = T;
template <class T>
using Mask = decltype(Vector<T>() < Vector<T>());  // a lane has all bits set or none
template <class T>
constexpr int kWidth = DDPP_VECTOR_BYTES / sizeof(T);

struct Partial {
  double numerator, denominator;
  int64_t kept;
};

// All comparisons with a NaN are false: a NaN is never pruned.
template <class T>
DDPP_ALWAYS_INLINE void find_pruned(const Vector<T>& student, const Vector<T>& target, T epsilon,
                                    Mask<T>& pruned) {
  // Written so that each is one instruction; with a NaN both are the target.
  const Vector<T> low = student < target ? student : target, high = student > target ? student : target;
  pruned = ((low < epsilon * high) & (high > epsilon * low))  // one sign and far apart, or two signs,
           | ((low <= 0) & (high >= 0) & (low < high));       // also where epsilon * x underflows
}

template <class T>
struct Sums {
  double numerator[kLanes] = {}, denominator[kLanes] = {};
  Mask<T> pruned{};
};

DDPP_ALWAYS_INLINE void add_square(double x, double& sum) { sum += x * x; }

// The square of a float is exact in double: fused or not, the sum has the same bits.
DDPP_ALWAYS_INLINE void add_square(float x, double& sum) {
#if defined(DDPP_ISA_base)
  sum += static_cast<double>(x) * static_cast<double>(x);
#else
  sum = __builtin_fma(x, x, sum);
#endif
}

template <bool kPrune, class T>
DDPP_ALWAYS_INLINE void add(const T* student, const T* target, const T* start, T epsilon,
                            Sums<T>& sums) {  // [kLanes]
  T far[kLanes], span[kLanes];
  for (int lane = 0; lane < kLanes; lane += kWidth<T>) {
    Vector<T> x, y, z;
    std::memcpy(&x, student + lane, sizeof x);
    std::memcpy(&y, target + lane, sizeof y);
    std::memcpy(&z, start + lane, sizeof z);
    Mask<T> pruned{};
    if (kPrune) find_pruned<T>(x, y, epsilon, pruned);
    x = pruned ? Vector<T>{} : x - y;
    z = pruned ? Vector<T>{} : z - y;
    sums.pruned += pruned;
    std::memcpy(far + lane, &x, sizeof x);
    std::memcpy(span + lane, &z, sizeof z);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    add_square(far[lane], sums.numerator[lane]);
    add_square(span[lane], sums.denominator[lane]);
  }
}

template <bool kPrune, class T>
Partial sum_chunk(const T* student, const T* target, const T* start, T epsilon, int64_t n) {
  Sums<T> sums;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add<kPrune>(student + i, target + i, start + i, epsilon, sums);
  if (i < n) {  // zeros add nothing and are not pruned
    T tail[3][kLanes] = {};
    std::memcpy(tail[0], student + i, (n - i) * sizeof(T));
    std::memcpy(tail[1], target + i, (n - i) * sizeof(T));
    std::memcpy(tail[2], start + i, (n - i) * sizeof(T));
    add<kPrune>(tail[0], tail[1], tail[2], epsilon, sums);
  }
  Partial total{0, 0, n};
  for (int lane = 0; lane < kLanes; ++lane) {
    total.numerator += sums.numerator[lane];
    total.denominator += sums.denominator[lane];
  }
  for (int lane = 0; lane < kWidth<T>; ++lane) total.kept += sums.pruned[lane];
  return total;
}

int64_t chunks(int64_t p) { return (p + kChunk - 1) / kChunk; }

int64_t scratch_bytes(int64_t p) { return chunks(p) * static_cast<int64_t>(sizeof(Partial)); }

template <class T>
int forward(const T* student, const T* target, const T* start, double epsilon, int64_t p, void* scratch,
            T* loss, int64_t* kept, double* denominator, const Queue& queue) {
  auto* partials = static_cast<Partial*>(scratch);
  const auto sum = epsilon > 0 ? sum_chunk<true, T> : sum_chunk<false, T>;
  parallel_for(queue, chunks(p), 1, [=](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t at = c * kChunk, n = p - at < kChunk ? p - at : kChunk;
      partials[c] = sum(student + at, target + at, start + at, static_cast<T>(epsilon), n);
    }
  });
  Partial total{};
  for (int64_t c = 0; c < chunks(p); ++c) {
    total.numerator += partials[c].numerator;
    total.denominator += partials[c].denominator;
    total.kept += partials[c].kept;
  }
  const bool degenerate = total.denominator == 0;
  *denominator = degenerate ? std::numeric_limits<double>::infinity() : total.denominator;
  *kept = degenerate ? 0 : total.kept;
  *loss = static_cast<T>(total.numerator / *denominator);
  return 0;
}

template <bool kPrune, class T>
DDPP_ALWAYS_INLINE void write(const T* student, const T* target, T epsilon, T scale,
                              T* gradient) {  // [kWidth<T>]
  Vector<T> x, y;
  std::memcpy(&x, student, sizeof x);
  std::memcpy(&y, target, sizeof y);
  Mask<T> pruned{};
  if (kPrune) find_pruned<T>(x, y, epsilon, pruned);
  x = pruned ? Vector<T>{} : scale * (x - y);
  std::memcpy(gradient, &x, sizeof x);
}

template <bool kPrune, class T>
void write_chunk(const T* student, const T* target, T epsilon, T scale, int64_t n, T* gradient) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>)
    write<kPrune>(student + i, target + i, epsilon, scale, gradient + i);
  if (i < n) {
    T tail[3][kWidth<T>] = {};
    std::memcpy(tail[0], student + i, (n - i) * sizeof(T));
    std::memcpy(tail[1], target + i, (n - i) * sizeof(T));
    write<kPrune>(tail[0], tail[1], epsilon, scale, tail[2]);
    std::memcpy(gradient + i, tail[2], (n - i) * sizeof(T));
  }
}

template <class T>
int backward(const T* grad, const double* denominator, const T* student, const T* target, double epsilon,
             int64_t p, T* gradient, const Queue& queue) {
  const T scale = static_cast<T>(2 * static_cast<double>(*grad) / *denominator);
  const auto chunk = epsilon > 0 ? write_chunk<true, T> : write_chunk<false, T>;
  parallel_for(queue, p, kChunk, [=](int64_t begin, int64_t end) {
    chunk(student + begin, target + begin, static_cast<T>(epsilon), scale, end - begin, gradient + begin);
  });
  return 0;
}

}  // namespace

template <class T>
const MatchLoss<T>& match_loss() {
  static const MatchLoss<T> launchers{scratch_bytes, forward<T>, backward<T>};
  return launchers;
}
template const MatchLoss<float>& match_loss();
template const MatchLoss<double>& match_loss();

}  // namespace DDPP_ISA
}  // namespace ddpp

DDPP_ISA_END
