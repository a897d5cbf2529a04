// What a plane needs besides its sums, for the CPU's and CUDA's kernels; included inside their namespaces. V
// holds a value for each of some channels, part is 1 / (pixels of a plane), xh the normalised plane, ' marks
// a tangent, u and v are the cotangents of value and tangent behind ReLU.

// The affine map z = deviation * gain + offset to what ReLU gets. The true deviation is deviation - rest:
// that keeps z precise where the mean is large.
template <class V>
struct Norm {
  DDPP_INLINE Norm(const V& mean, const V& rest, const V& rstd, const V& scale, const V& shift)
      : mean(mean), rest(rest), rstd(rstd), scale(scale), gain(scale * rstd), offset(shift - rest * gain) {}
  DDPP_INLINE V deviation(const V& y) const { return y - mean; }
  DDPP_INLINE V operator()(const V& deviation) const { return deviation * gain + offset; }
  V mean, rest, rstd, scale, gain, offset;
};

// grad_y = gain * grad + constant - deviation * slope
template <class V>
struct BackwardTerms {
  template <class T>
  DDPP_INLINE BackwardTerms(const Norm<V>& norm, const V& grad_sum, const V& grad_deviation, T part)
      : grad_shift(grad_sum), grad_scale(norm.rstd * (grad_deviation - norm.rest * grad_sum)) {
    slope = norm.gain * norm.rstd * grad_scale * part;
    constant = norm.rest * slope - norm.gain * grad_sum * part;
  }
  V grad_shift, grad_scale, slope, constant;
};

// The tangent's plane y'; covariance = mean(xh y').
template <class V>
struct Tangent {
  DDPP_INLINE V deviation(const V& y) const { return y - mean; }
  V mean, rest, covariance;
};

// z' = deviation * slope + tangent's deviation * gain + constant
template <class V>
struct DualTerms {
  DDPP_INLINE DualTerms(const Norm<V>& norm, const Tangent<V>& tangent, const V& scale_tangent,
                        const V& shift_tangent)
      : slope(norm.rstd * (scale_tangent - norm.gain * tangent.covariance)),
        constant(shift_tangent - norm.rest * slope - tangent.rest * norm.gain) {}
  V slope, constant;
};

template <class V>
struct DualSums {
  V u, u_deviation, v, v_deviation,
      v_tangent;  // sums of u, u deviation, v, v deviation, v tangent's deviation
};

// grad_y  = gain * u + v_gain * v + constant - deviation * slope - tangent's deviation * tangent_slope
// grad_y' = gain * v + tangent_constant - deviation * tangent_slope
template <class V>
struct DualBackwardTerms {
  template <class T>
  DDPP_INLINE DualBackwardTerms(const Norm<V>& norm, const Tangent<V>& tangent, const V& scale_tangent,
                                const DualSums<V>& sums, T part) {
    const V v_scale = scale_tangent - norm.gain * tangent.covariance;
    const V u_xh = norm.rstd * (sums.u_deviation - norm.rest * sums.u);
    const V v_xh = norm.rstd * (sums.v_deviation - norm.rest * sums.v);
    const V v_xh_tangent = norm.rstd * (sums.v_tangent - tangent.rest * sums.v - tangent.covariance * v_xh);
    grad_shift = sums.u;
    grad_scale = u_xh + v_xh_tangent;

    const V q = norm.scale * v_xh * part;
    const V mean_t = (norm.scale * sums.u + v_scale * sums.v) * part;
    const V mean_t_xh = (norm.scale * u_xh + v_scale * v_xh) * part - norm.rstd * tangent.covariance * q;
    v_gain = norm.rstd * v_scale;
    tangent_slope = norm.rstd * norm.rstd * q;
    slope = norm.rstd * norm.rstd * (mean_t_xh + norm.scale * v_xh_tangent * part);
    constant = norm.rest * slope + tangent.rest * tangent_slope - norm.rstd * mean_t;
    tangent_constant = norm.rest * tangent_slope - norm.gain * sums.v * part;
  }
  V grad_shift, grad_scale, v_gain, slope, tangent_slope, constant, tangent_constant;
};
