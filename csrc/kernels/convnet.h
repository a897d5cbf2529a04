// A student step of a ConvNet, whole: the gradient of its cross-entropy by the parameters and, on dual
// numbers (value, tangent), phi = <gradient, tangent> with its derivatives. ddpp/ops/convnet.py gives the
// formulas.
#pragma once

#include <cstdint>

#include "kernels/isa.h"
#include "kernels/queue.h"

namespace ddpp {

// `depth` blocks of a 3x3 convolution of `filters` outputs, instance normalisation, ReLU and 2x2 average
// pooling, then a linear layer. Around the images [n, channels, height, width] stand pad_y and pad_x zero
// pixels, around later planes one. Parameters are one vector: of each block the weight [filters, inputs, 3,
// 3], its bias (which the normalisation cancels), scale and shift; then weight [classes, features] and bias.
struct ConvNetSize {
  int64_t n, channels, height, width, pad_y, pad_x, depth, filters, classes;
  double eps;

  int64_t inputs(int64_t block) const { return block ? filters : channels; }
  // sides of a convolution's output
  int64_t rows(int64_t block) const { return (height + 2 * pad_y - 2) >> block; }
  int64_t columns(int64_t block) const { return (width + 2 * pad_x - 2) >> block; }
  int64_t features() const { return filters * rows(depth) * columns(depth); }

  // where parameters begin
  int64_t weight(int64_t block) const {
    return block ? filters * (9 * (channels + (block - 1) * filters) + 3 * block) : 0;
  }
  int64_t bias(int64_t block) const { return weight(block) + filters * 9 * inputs(block); }
  int64_t scale(int64_t block) const { return bias(block) + filters; }
  int64_t shift(int64_t block) const { return scale(block) + filters; }
  int64_t linear() const { return weight(depth); }
  int64_t linear_bias() const { return linear() + classes * features(); }
  int64_t parameters() const { return linear_bias() + classes; }
};

// An account of a step: seconds by what they went into, the mean of all parts, and bytes by what they hold,
// the sum of all parts.
enum ConvNetAccount {
  kColumnsTime,
  kConvolutionsTime,
  kNormsTime,
  kWeightsTime,
  kWeightGradientsTime,
  kLinearTime,
  kTimes,
  kPlanesBytes = kTimes,
  kTilesBytes,
  kStagesBytes,
  kColumnsBytes,
  kParametersBytes,
  kConvNetAccounts
};

// Images are worked through in `parts` parts, each by one thread from the first layer to the last and back:
// the threads share the parameters and nothing else. Results depend on the number of parts, not on the
// threads.
template <class T>
struct ConvNetStep {
  ConvNetSize size;
  int m;             // side of the Winograd tiles, 2 or 4
  int64_t parts;     // at most n
  const T* theta;    // [parameters]
  const T* tangent;  // [parameters], or null for the gradient alone
  const T* images;   // [n, channels, height, width]
  const T* targets;  // probabilities [n, classes]
  T* scratch;        // [parts - 1, parameters]
  T* gradient;       // of the cross-entropy or, with a tangent, of phi [parameters]
  T* d_images;       // with a tangent, as images
  T* d_labels;       // with a tangent, by the logits whose softmax the targets are [n, classes]
  T* phi;            // with a tangent [1]
  double* account;   // [kConvNetAccounts], to which times are added, and where bytes are written; may be null
};

// The launchers of the CPU; T is float or double.
template <class T>
struct ConvNet {
  void (*step)(const ConvNetStep<T>& step, const Queue& queue);
  // The outputs [n, classes] of size, m, parts, theta, images.
  void (*logits)(const ConvNetStep<T>& step, T* logits, const Queue& queue);
};

DDPP_PER_ISA(template <class T> const ConvNet<T>& convnet();)

template <class T>
const ConvNet<T>& convnet_cpu(Isa isa = active_isa()) {
  return DDPP_SELECT(isa, convnet<T>());
}

}  // namespace ddpp
