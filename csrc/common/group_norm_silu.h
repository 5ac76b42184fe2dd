// The maths of y = silu(norm(x + channel_bias) * (1 + scale) + shift) and of its backward, one channel and one element
// at a time, and the arguments both devices take. The specification is group_norm_silu_reference in
// rftcore/ops/group_norm_silu.py.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "silu.h"
#include "vector.h"

namespace rftcore::group_norm_silu {

struct Problem {
  int dtype;  // of x, y and their gradients
  int64_t batch, channels, groups, positions;
  bool channels_last;  // memory is (batch, positions, channels), else (batch, channels, positions)
  bool silu;
  const void* x;
  Vector weight, bias;                // (channels,)
  Vector channel_bias, scale, shift;  // (batch, channels)

  RFTCORE_HOST_DEVICE int64_t channels_per_group() const { return channels / groups; }
};

// mean, inverse_deviation: (batch, groups), in the maths type, of x + channel_bias. workspace: so many elements of the
// maths type, of any value, as the device asks for.
struct Forward : Problem {
  double eps;
  void *y, *mean, *inverse_deviation, *workspace;
};

// Gradients are null where not needed, but grad_x.
struct Backward : Problem {
  const void *mean, *inverse_deviation, *grad_y;
  void* grad_x;
  Vector grad_weight, grad_bias, grad_channel_bias, grad_scale, grad_shift;
  void* workspace;

  // Whether a gradient other than that of x is needed.
  RFTCORE_HOST_DEVICE bool per_channel() const {
    return grad_weight || grad_bias || grad_channel_bias || grad_scale || grad_shift;
  }
};

// What a workspace is for; rftcore/ops has the same codes.
enum class Pass : int { forward = 0, backward = 1, backward_per_channel = 2 };

// One channel of one sample: y = activation((x - center) * gain + offset).
template <class T>
struct Channel {
  T center, gain, offset;
};

// From its group's statistics.
template <class T>
RFTCORE_HOST_DEVICE Channel<T> channel_of(const Problem& p, T mean, T inverse_deviation, int64_t sample, int64_t c) {
  const int64_t index = sample * p.channels + c;
  const T factor = T(1) + p.scale.get(index, T(0));
  return {mean - p.channel_bias.get(index, T(0)), inverse_deviation * p.weight.get(c, T(1)) * factor,
          p.bias.get(c, T(0)) * factor + p.shift.get(index, T(0))};
}

template <class T>
RFTCORE_HOST_DEVICE Channel<T> channel_at(const Problem& p, const void* mean, const void* inverse_deviation,
                                          int64_t sample, int64_t c) {
  const int64_t group = sample * p.groups + c / p.channels_per_group();
  return channel_of(p, static_cast<const T*>(mean)[group], static_cast<const T*>(inverse_deviation)[group], sample, c);
}

// The activation is a template argument, so that a loop over elements has no branch.
template <bool silu_follows, class T>
RFTCORE_HOST_DEVICE T output(const Channel<T>& channel, T x) {
  const T affined = (x - channel.center) * channel.gain + channel.offset;
  if constexpr (silu_follows) return silu(affined);
  return affined;
}

// The gradient of the affined value: SiLU' is taken there, after weight, bias, scale and shift.
template <bool silu_follows, class T>
RFTCORE_HOST_DEVICE T affined_gradient(const Channel<T>& channel, T x, T grad_y) {
  if constexpr (silu_follows) return silu_gradient((x - channel.center) * channel.gain + channel.offset, grad_y);
  return grad_y;
}

// Sums over a channel's positions, with g the gradient of the affined value and d = x - center.
struct ChannelSums {
  double g = 0, gd = 0, d = 0;

  RFTCORE_HOST_DEVICE void add(const ChannelSums& other) {
    g += other.g;
    gd += other.gd;
    d += other.d;
  }
};

// One group of one sample: grad_x = weight (1 + scale) inverse_deviation g + constant + slope d.
struct GroupGradient {
  double constant, slope;
};

// From the sums of the group's channels.
template <class T>
RFTCORE_HOST_DEVICE GroupGradient group_gradient(const Backward& a, const ChannelSums* sums, int64_t sample,
                                                 int64_t group) {
  const int64_t first = group * a.channels_per_group();
  const double inverse_deviation = static_cast<const T*>(a.inverse_deviation)[sample * a.groups + group];
  double g = 0, gd = 0;
  for (int64_t c = first; c < first + a.channels_per_group(); ++c) {
    const double gain = a.weight.get(c, 1.0) * (1.0 + a.scale.get(sample * a.channels + c, 0.0));
    g += gain * sums[c].g;
    gd += gain * sums[c].gd;
  }
  const double elements = double(a.channels_per_group()) * double(a.positions > 0 ? a.positions : 1);
  const double factor = inverse_deviation / elements;
  return {-factor * g, -factor * gd * inverse_deviation * inverse_deviation};
}

// Writes the gradients of channel_bias, scale and shift of one channel of one sample.
template <class T>
RFTCORE_HOST_DEVICE void modulation_gradients(const Backward& a, const ChannelSums& sums, const GroupGradient& group,
                                              int64_t sample, int64_t c) {
  const int64_t index = sample * a.channels + c;
  const double inverse_deviation =
      static_cast<const T*>(a.inverse_deviation)[sample * a.groups + c / a.channels_per_group()];
  const double weight = a.weight.get(c, 1.0);
  if (a.grad_shift) a.grad_shift.set(index, sums.g);
  if (a.grad_scale) a.grad_scale.set(index, weight * inverse_deviation * sums.gd + a.bias.get(c, 0.0) * sums.g);
  if (a.grad_channel_bias)
    a.grad_channel_bias.set(index, weight * (1.0 + a.scale.get(index, 0.0)) * inverse_deviation * sums.g +
                                       group.constant * double(a.positions) + group.slope * sums.d);
}

// Gradients of weight and bias of one channel, added up over samples.
struct AffineGradients {
  double weight = 0, bias = 0;

  template <class T>
  RFTCORE_HOST_DEVICE void add(const Backward& a, const ChannelSums& sums, int64_t sample, int64_t c) {
    const double factor = 1.0 + a.scale.get(sample * a.channels + c, 0.0);
    weight += factor * sums.gd *
              static_cast<const T*>(a.inverse_deviation)[sample * a.groups + c / a.channels_per_group()];
    bias += factor * sums.g;
  }

  RFTCORE_HOST_DEVICE void write(const Backward& a, int64_t c) const {
    if (a.grad_weight) a.grad_weight.set(c, weight);
    if (a.grad_bias) a.grad_bias.set(c, bias);
  }
};

}  // namespace rftcore::group_norm_silu
