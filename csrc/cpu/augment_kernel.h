// Augmentation: the passes over one view, on planes of float that stay in the second-level cache.
//
// AugmentedView::make is the order of the passes. An image is first packed with a rim of zeros, pixel by pixel, so that
// the four neighbours of a place are read without a test. A view that is neither turned nor sheared is sampled axis by
// axis; one without a warp is read into its planes at once.
#pragma once

#include "cpu/augment.h"
#include "cpu/augment_noise.h"
#include "cpu/augment_pixels.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace anomem::cpu::ANOMEM_ISA {

// Pixels of the rim before and after a line: a place between −1 and the size reads one before it and two after it.
constexpr int64_t kRimBefore = 1, kRim = 3;

ANOMEM_INLINE vec<float> clamped(vec<float> x) { return smaller(broadcast(1.0f), larger(vec<float>{}, x)); }

// x ← f(x), vector by vector; returns the sum of the results, of short sums of float: rounding grows with their length.
template <class F>
ANOMEM_INLINE double replace_and_sum(float* x, int64_t n, F f) {
  constexpr int64_t run = 64 * kLanes<float>;
  double total = 0;
  for (int64_t start = 0; start < n; start += run) {
    vec<float> sum{};
    for_vectors<float>(at_most(run, n - start), [&](int64_t i, int64_t count) ANOMEM_ALWAYS {
      const vec<float> found = f(load_some(x + start + i, count));
      store_some(x + start + i, found, count);
      sum += count == kLanes<float> ? found : keep_first<float>(found, count);
    });
    total += static_cast<double>(sum_lanes<float>(sum));
  }
  return total;
}

// Where the pixels of one line of a view lie in the packed image.
struct Places {
  explicit Places(int64_t width)
      : at(width + kLanes<float>), right(width + kLanes<float>), down(width + kLanes<float>) {}

  Buffer<int32_t> at;         // the upper left neighbour
  Buffer<float> right, down;  // weight of the right and of the lower neighbours
};

// The same on one axis of an upright view, whose matrix mixes no axes: all lines share it.
struct AxisPlaces {
  explicit AxisPlaces(int64_t size) : before(size + kLanes<float>), weight(size + kLanes<float>) {}

  Buffer<int32_t> before;  // the neighbour before
  Buffer<float> weight;    // of the one after
};

// A place on a line of `size` pixels, brought to [−1, size] where the rim continues it.
ANOMEM_INLINE vec<float> padded_place(vec<float> place, float size, Padding padding) {
  float low = 0, high = size - 1;
  if (padding == Padding::kZeros) {
    low = -1;
    high = size;
  } else if (padding == Padding::kReflection) {
    // The distance from the left edge; odd multiples of the size are reflected. Far places have no fraction left.
    vec<float> from_edge = place + 0.5f;
    from_edge = from_edge < vec<float>{} ? -from_edge : from_edge;
    from_edge = from_edge < 0x1p22f ? from_edge : broadcast(0x1p22f);
    const auto times = __builtin_convertvector(from_edge / size, typename Simd<float>::bits);
    const vec<float> rest = from_edge - __builtin_convertvector(times, vec<float>) * size;
    place = ((times & 1) != 0 ? size - rest : rest) - 0.5f;
  }
  place = place > low ? place : broadcast(low);  // NaN too
  return place < high ? place : broadcast(high);
}

// The place before another on a line of `size` pixels, counted from the rim's first, and the weight of the one after.
struct Between {
  Between(vec<float> place, int64_t size, Padding padding) {
    const vec<float> from_rim = padded_place(place, static_cast<float>(size), padding) + 1.0f;
    before = __builtin_convertvector(from_rim, Simd<float>::bits);  // not negative: truncation is floor
    weight = from_rim - __builtin_convertvector(before, vec<float>);
  }

  Simd<float>::bits before;
  vec<float> weight;
};

// The place that a line's first pixel is read from: the matrix maps centres of pixels in [−1, 1] coordinates; here it
// maps pixels.
struct FirstPlace {
  FirstPlace(const Augment& a, const float* matrix, int64_t line) {
    const double w = static_cast<double>(a.images.width), h = static_cast<double>(a.images.height);
    const double cx = 1 / w - 1, cy = (2 * static_cast<double>(line) + 1) / h - 1;
    x = static_cast<float>(((matrix[0] * cx + matrix[1] * cy + matrix[2] + 1) * w - 1) / 2);
    y = static_cast<float>(((matrix[3] * cx + matrix[4] * cy + matrix[5] + 1) * h - 1) / 2);
  }

  float x, y;
};

// The places of line y.
inline void find_places(const Augment& a, const float* matrix, int64_t y, Places& places) {
  const int64_t width = a.images.width, height = a.images.height;
  const FirstPlace first(a, matrix, y);
  const float dx = matrix[0];
  const float dy = static_cast<float>(matrix[3] * static_cast<double>(height) / static_cast<double>(width));
  const int32_t stride = static_cast<int32_t>(width + kRim);
  const auto lane = lane_index<float>();
  for (int64_t x = 0; x < width; x += kLanes<float>) {
    const vec<float> step = __builtin_convertvector(lane + static_cast<int32_t>(x), vec<float>);
    const Between across(multiply_add(step, broadcast(dx), broadcast(first.x)), width, a.padding);
    const Between along(multiply_add(step, broadcast(dy), broadcast(first.y)), height, a.padding);
    const auto at = along.before * stride + across.before;
    std::memcpy(places.at.data() + x, &at, sizeof at);
    store(places.right.data() + x, across.weight);
    store(places.down.data() + x, along.weight);
  }
}

// The places first, first + step, … on one axis; `unit` numbers lie between neighbours.
inline void find_axis_places(float first, float step, int64_t size, Padding padding, int unit, AxisPlaces& places) {
  const auto lane = lane_index<float>();
  for (int64_t i = 0; i < size; i += kLanes<float>) {
    const vec<float> number = __builtin_convertvector(lane + static_cast<int32_t>(i), vec<float>);
    const Between between(multiply_add(number, broadcast(step), broadcast(first)), size, padding);
    const auto before = between.before * unit;
    std::memcpy(places.before.data() + i, &before, sizeof before);
    store(places.weight.data() + i, between.weight);
  }
}

// A line of a view from an image of one channel, bilinearly.
inline void sample_line(const float* image, const Places& places, int64_t stride, int64_t width, float* line) {
  const int32_t* at = places.at.data();
  const float *right = places.right.data(), *down = places.down.data();
  for (int64_t x = 0; x < width; ++x) {
    const float* upper = image + at[x];
    const float* lower = upper + stride;
    const float first = upper[0] + (lower[0] - upper[0]) * down[x];
    const float second = upper[1] + (lower[1] - upper[1]) * down[x];
    line[x] = first + (second - first) * right[x];
  }
}

// The same from packed pixels: the left and the right neighbours are read at once.
inline void sample_pixels(const float* image, const Places& places, int64_t stride, int64_t width, float* line) {
  typedef float Neighbours __attribute__((vector_size(2 * sizeof(Pixel)), aligned(4), may_alias));
  const int32_t* at = places.at.data();
  const float *right = places.right.data(), *down = places.down.data();
  for (int64_t x = 0; x < width; ++x) {
    const float* upper = image + kPacked * at[x];
    const Neighbours above = *reinterpret_cast<const Neighbours*>(upper);
    const Neighbours below = *reinterpret_cast<const Neighbours*>(upper + kPacked * stride);
    const Neighbours both = above + (below - above) * down[x];
    Pixel pixel[2];
    std::memcpy(pixel, &both, sizeof both);
    const Pixel sampled = pixel[0] + (pixel[1] - pixel[0]) * right[x];
    std::memcpy(line + x * kPacked, &sampled, sizeof sampled);
  }
}

// A line of an image, sampled along itself; P is a float or a packed pixel.
template <class P>
inline void sample_along(const float* image, const AxisPlaces& places, int64_t width, float* line) {
  const int32_t* before = places.before.data();
  const float* weight = places.weight.data();
  P* to = reinterpret_cast<P*>(line);
#pragma GCC unroll 4
  for (int64_t x = 0; x < width; ++x) {
    const P* left = reinterpret_cast<const P*>(image + before[x]);
    to[x] = left[0] + (left[1] - left[0]) * weight[x];
  }
}

// Weights of one side of a Gaussian, weights[0] its middle. Returns how far it reaches: what follows is below rounding.
inline int64_t gaussian(double sigma, int64_t radius, float* weights) {
  sigma = sigma < 1e-3 ? 1e-3 : sigma;
  const auto weight = [&](int64_t k) { return std::exp(-0.5 * (k / sigma) * (k / sigma)); };
  double sum = 1;
  int64_t reach = 0;
  for (int64_t k = 1; k <= radius && weight(k) > 1e-10; ++k) {
    sum += 2 * weight(k);
    reach = k;
  }
  for (int64_t k = 0; k <= reach; ++k) weights[k] = static_cast<float>(weight(k) / sum);
  return reach;
}

// i on a line of `size` positions that is mirrored at its ends, for −size < i < 2 size − 1.
inline int64_t mirrored(int64_t i, int64_t size) {
  if (i < 0) return -i;
  return i < size ? i : 2 * (size - 1) - i;
}

constexpr int64_t kBlurred = 8;  // lines that are blurred together

// Makes views one after another in the same scratch. Views of one image that follow each other pack it once.
template <class From>
class AugmentedView {
 public:
  explicit AugmentedView(const Augment& a)
      : a_(a),
        c_(a.images.channels),
        h_(a.images.height),
        w_(a.images.width),
        area_(a.images.area()),
        packed_(a.matrices.given ? packed_bytes() / static_cast<int64_t>(sizeof(float)) : 0),
        lines_(round_up(w_, kLanes<float>) * kPacked),
        places_(a.matrices.given ? w_ : 0),
        columns_(a.matrices.given ? w_ : 0),
        rows_(a.matrices.given ? h_ : 0),
        sampled_(a.matrices.given ? 2 * at_most(c_, kPacked) * w_ : 0),
        planes_(c_ * area_),
        blurred_(a.blur.given ? c_ * area_ : 0),
        padded_stride_(round_up(w_, kLanes<float>) + 2 * a.radius + kLanes<float>),
        padded_(a.blur.given ? kBlurred * padded_stride_ : 0),
        weights_(a.radius + 1) {
    if (a.matrices.given) std::memset(packed_.data(), 0, packed_bytes());  // the rim stays zero
  }

  void make(int64_t view) {
    out_ = a_.out + view * c_ * area_;
    x_ = planes_.data();
    read(view);
    const bool has_brightness = a_.brightness.given, has_contrast = a_.contrast.given;
    const float grey = has_brightness || has_contrast ? change_brightness(view) : 0;
    if (a_.saturation.given && c_ == 3) change_saturation(view, grey);
    else if (has_contrast) change_contrast(view, grey);
    if (a_.blur.given && a_.blur.data[view] > 0) blur(a_.blur.data[view]);
    const bool direct = c_ == 1 || !a_.channels_last;
    float* to = direct ? out_ : x_;
    if (a_.noise.given) add_noise(a_.noise.data[view], a_.keys.data[view], to);
    else if (direct) std::memcpy(to, x_, c_ * area_ * sizeof(float));
    if (!direct) interleave();
  }

 private:
  int64_t packed_bytes() const {
    return (h_ + kRim) * (w_ + kRim) * (c_ == 1 ? 1 : kPacked) * static_cast<int64_t>(sizeof(float));
  }

  const From* line_of(int64_t image, int64_t channel, int64_t y) const {
    const FeatureMap& map = a_.images;
    return static_cast<const From*>(map.data) + image * map.batch_stride + channel * map.channel_stride +
           y * map.height_stride;
  }

  void read(int64_t view) {
    const int64_t image = view % a_.images.batch;
    if (!a_.matrices.given) return read_planes(image);
    const float* matrix = a_.matrices.data + view * 6;
    const bool packed = image == packed_image_ && c_ <= kPacked;
    packed_image_ = image;
    const bool upright = matrix[1] == 0 && matrix[3] == 0;
    if (upright) {
      const FirstPlace first(a_, matrix, 0);
      find_axis_places(first.x, matrix[0], w_, a_.padding, c_ == 1 ? 1 : kPacked, columns_);
      find_axis_places(first.y, matrix[4], h_, a_.padding, 1, rows_);
    }
    for (int64_t first = 0; first < c_; first += kPacked) {
      const int64_t count = at_most(kPacked, c_ - first);
      if (!packed && c_ == 1) pack_plane(image);
      else if (!packed) pack_pixels(image, first, count);
      if (upright) sample_upright(count, x_ + first * area_);
      else sample(matrix, count, x_ + first * area_);
    }
  }

  // From the packed channels to as many planes.
  void sample(const float* matrix, int64_t count, float* to) {
    for (int64_t y = 0; y < h_; ++y) {
      fetch_part(y);
      find_places(a_, matrix, y, places_);
      if (c_ == 1) {
        sample_line(packed_.data(), places_, w_ + kRim, w_, to + y * w_);
        continue;
      }
      sample_pixels(packed_.data(), places_, w_ + kRim, w_, lines_.data());
      unpack_pixels(lines_.data(), w_, static_cast<int>(count), to + y * w_, area_);
    }
  }

  // The same for an upright view: first along each line of the image, then between two lines. The next line of the view
  // mostly lies between the same ones or needs one more.
  void sample_upright(int64_t count, float* to) {
    const int64_t width = w_, area = area_;
    int64_t held[2] = {-1, -1};  // lines of even and of odd number
    const auto sampled = [&](int64_t row) {
      float* line = sampled_.data() + row % 2 * count * width;
      if (held[row % 2] == row) return line;
      held[row % 2] = row;
      const float* image = packed_.data() + row * (width + kRim) * (c_ == 1 ? 1 : kPacked);
      if (c_ == 1) {
        sample_along<float>(image, columns_, width, line);
      } else {
        sample_along<Pixel>(image, columns_, width, lines_.data());
        unpack_pixels(lines_.data(), width, static_cast<int>(count), line, width);
      }
      return line;
    };
    for (int64_t y = 0; y < h_; ++y, to += width) {
      fetch_part(y);
      const float *upper = sampled(rows_.before[y]), *lower = sampled(rows_.before[y] + 1);
      const float down = rows_.weight[y];
      for (int64_t c = 0; c < count; ++c)
        for_vectors<float>(width, [&](int64_t x, int64_t n) ANOMEM_ALWAYS {
          const vec<float> above = load_some(upper + c * width + x, n), below = load_some(lower + c * width + x, n);
          store_some(to + c * area + x, above + (below - above) * down, n);
        });
    }
  }

  // Asks for a line's share of the result, which is written at the end of a view: nothing waits for it meanwhile.
  void fetch_part(int64_t y) const { fetch_row(out_ + y * w_ * c_, w_ * c_); }

  // Whether a line of the images is one run of bytes, three a pixel.
  bool reads_bytes() const {
    return std::is_same_v<From, uint8_t> && c_ == 3 && a_.images.channel_stride == 1 && a_.images.width_stride == 3;
  }

  void read_planes(int64_t image) {
    for (int64_t y = 0; y < h_; ++y) {
      fetch_part(y);
      if (reads_bytes()) {
        pack_bytes(reinterpret_cast<const uint8_t*>(line_of(image, 0, y)), w_, lines_.data());
        unpack_pixels(lines_.data(), w_, 3, x_ + y * w_, area_);
        continue;
      }
      for (int64_t c = 0; c < c_; ++c)
        read_line(line_of(image, c, y), a_.images.width_stride, w_, x_ + c * area_ + y * w_);
    }
  }

  void pack_plane(int64_t image) {
    const int64_t stride = w_ + kRim;
    for (int64_t y = 0; y < h_; ++y)
      read_line(line_of(image, 0, y), a_.images.width_stride, w_,
                packed_.data() + (y + kRimBefore) * stride + kRimBefore);
  }

  // Channels first … first + count of an image.
  void pack_pixels(int64_t image, int64_t first, int64_t count) {
    const int64_t stride = w_ + kRim, line = round_up(w_, kLanes<float>);
    if (!reads_bytes()) std::memset(lines_.data(), 0, line * kPacked * sizeof(float));
    for (int64_t y = 0; y < h_; ++y) {
      float* to = packed_.data() + ((y + kRimBefore) * stride + kRimBefore) * kPacked;
      if (reads_bytes()) {  // the zeros after a line are the rim's
        pack_bytes(reinterpret_cast<const uint8_t*>(line_of(image, 0, y)), w_, to);
        continue;
      }
      for (int64_t c = 0; c < count; ++c)
        read_line(line_of(image, first + c, y), a_.images.width_stride, w_, lines_.data() + c * line);
      pack_lines(lines_.data(), line, w_, to);
    }
  }

  // Returns the mean grey of the result: luma of three channels, the mean of any other number.
  float change_brightness(int64_t view) {
    double total = 0;
    for (int64_t c = 0; c < c_; ++c) {
      float* plane = x_ + c * area_;
      if (a_.brightness.given) {
        const float factor = a_.brightness.data[view];
        total += weight_of(c) *
                 replace_and_sum(plane, area_, [&](vec<float> x) ANOMEM_ALWAYS { return clamped(x * factor); });
      } else {
        total += weight_of(c) * replace_and_sum(plane, area_, [&](vec<float> x) ANOMEM_ALWAYS { return x; });
      }
    }
    return static_cast<float>(total / static_cast<double>(area_));
  }

  // x brought nearer to `about`, or further from it; a factor of 1, whose `rest` is 0, changes no bit.
  static ANOMEM_INLINE vec<float> drawn_to(vec<float> x, vec<float> about, float rest) {
    return clamped(x + (about - x) * rest);
  }

  void change_contrast(int64_t view, float grey) {
    const float rest = 1 - a_.contrast.data[view];
    const vec<float> about = broadcast(grey);
    for_vectors<float>(c_ * area_, [&](int64_t i, int64_t count) {
      store_some(x_ + i, drawn_to(load_some(x_ + i, count), about, rest), count);
    });
  }

  double weight_of(int64_t channel) const {
    constexpr double luma[] = {0.2989, 0.587, 0.114};  // ITU-R BT.601 with torchvision's rounding
    return c_ == 3 ? luma[channel] : 1 / static_cast<double>(c_);
  }

  // About each pixel's grey, after the contrast.
  void change_saturation(int64_t view, float mean) {
    const bool contrast = a_.contrast.given;
    const float contrast_rest = contrast ? 1 - a_.contrast.data[view] : 0, rest = 1 - a_.saturation.data[view];
    const vec<float> about = broadcast(mean);
    float *r = x_, *g = r + area_, *b = g + area_;
    const float wr = static_cast<float>(weight_of(0)), wg = static_cast<float>(weight_of(1)),
                wb = static_cast<float>(weight_of(2));
    for_vectors<float>(area_, [&](int64_t i, int64_t count) {
      vec<float> red = load_some(r + i, count), green = load_some(g + i, count), blue = load_some(b + i, count);
      if (contrast) {
        red = drawn_to(red, about, contrast_rest);
        green = drawn_to(green, about, contrast_rest);
        blue = drawn_to(blue, about, contrast_rest);
      }
      const vec<float> grey = wr * red + wg * green + wb * blue;
      store_some(r + i, drawn_to(red, grey, rest), count);
      store_some(g + i, drawn_to(green, grey, rest), count);
      store_some(b + i, drawn_to(blue, grey, rest), count);
    });
  }

  // Some lines at a time: down the columns into padded lines, then along those. A line that was only just written would
  // be waited for.
  void blur(float sigma) {
    const int64_t reach = gaussian(sigma, a_.radius, weights_.data());
    if (reach == 0) return;
    for (int64_t c = 0; c < c_; ++c)
      for (int64_t start = 0; start < h_; start += kBlurred) {
        const int64_t lines = at_most(kBlurred, h_ - start);
        for (int64_t i = 0; i < lines; ++i) {
          const float* from = x_ + c * area_;
          const int64_t y = start + i, height = h_, width = w_;
          const bool inside = y >= reach && y + reach < height;
          float* line = padded_.data() + i * padded_stride_ + reach;
          weigh(reach, line, [=](int64_t k) { return from + (inside ? y + k : mirrored(y + k, height)) * width; });
          for (int64_t k = 1; k <= reach; ++k) {
            line[-k] = line[mirrored(-k, width)];
            line[width - 1 + k] = line[mirrored(width - 1 + k, width)];
          }
        }
        for (int64_t i = 0; i < lines; ++i) {
          const float* line = padded_.data() + i * padded_stride_ + reach;
          weigh(reach, blurred_.data() + c * area_ + (start + i) * w_, [=](int64_t k) { return line + k; });
        }
      }
    x_ = blurred_.data();
  }

  // A line: the weighted sum of lines −reach … reach. In whole vectors, of which the last may pass the end: what lies
  // beyond is written before its own values are.
  template <class Line>
  ANOMEM_INLINE void weigh(int64_t reach, float* to, Line line) const {
    constexpr int64_t L = kLanes<float>;
    int64_t x = 0;
    for (; x + 4 * L <= w_; x += 4 * L) weigh_vectors<4>(reach, x, to, line);
    for (; x + 2 * L <= w_; x += 2 * L) weigh_vectors<2>(reach, x, to, line);
    for (; x < w_; x += L) weigh_vectors<1>(reach, x, to, line);
  }

  template <int kVectors, class Line>
  ANOMEM_INLINE void weigh_vectors(int64_t reach, int64_t x, float* to, Line line) const {
    constexpr int64_t L = kLanes<float>;
    const float* weights = weights_.data();
    vec<float> sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = load(line(0) + x + v * L) * weights[0];
    for (int64_t k = 1; k <= reach; ++k) {
      const float *before = line(-k) + x, *after = line(k) + x;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += (load(before + v * L) + load(after + v * L)) * weights[k];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(to + x + v * L, sum[v]);
  }

  // Values i and i + ⌈n / 2⌉ have the two normal numbers of pair i.
  void add_noise(float sigma, int64_t key, float* to) {
    constexpr int64_t L = kLanes<float>, together = kNormalVectors * L;
    const int64_t n = c_ * area_, half = (n + 1) / 2;
    const float* from = x_;
    const vec<float> spread = broadcast(sigma);
    const auto add = [&](int64_t i, vec<float> normal, int64_t count) ANOMEM_ALWAYS {
      store_some(to + i, clamped(multiply_add(normal, spread, load_some(from + i, count))), count);
    };
    int64_t i = 0;
    for (; i + together <= n - half; i += together) {
      const NormalPairs<kNormalVectors> normal(i, key);
#pragma GCC unroll 4
      for (int v = 0; v < kNormalVectors; ++v) {
        add(i + v * L, normal.first[v], L);
        add(i + half + v * L, normal.second[v], L);
      }
    }
    for (; i < half; i += L) {
      const NormalPairs<1> normal(i, key);
      add(i, normal.first[0], at_most(half - i, L));
      if (i + half < n) add(i + half, normal.second[0], at_most(n - half - i, L));
    }
  }

  void interleave() const {
    if (c_ == 3) return interleave_three(x_, area_, out_);
    for (int64_t i = 0; i < area_; ++i)
      for (int64_t c = 0; c < c_; ++c) out_[i * c_ + c] = x_[c * area_ + i];
  }

  const Augment& a_;
  int64_t c_, h_, w_, area_;
  Buffer<float> packed_;       // [H + 3, W + 3] pixels
  Buffer<float> lines_;        // one line of pixels, or of four channels
  Places places_;              // of one line
  AxisPlaces columns_, rows_;  // of an upright view
  Buffer<float> sampled_;      // two lines of its image, sampled along themselves: [2, C ≤ 4, W]
  Buffer<float> planes_;       // [C, H, W]
  Buffer<float> blurred_;      // [C, H, W]
  int64_t padded_stride_;
  Buffer<float> padded_;   // some lines, each with a rim as wide as the filter reaches
  Buffer<float> weights_;  // of the filter
  int64_t packed_image_ = -1;
  float* x_ = nullptr;    // the view so far, [C, H, W]
  float* out_ = nullptr;  // where it goes
};

template <class From>
void make_views(const Augment& a) {
  const int64_t batch = a.images.batch, each = batch > 0 ? a.views / batch : 0;
  parallel_ranges(a.views, [&](int64_t begin, int64_t end) {
    AugmentedView<From> one(a);
    for (int64_t i = begin; i < end; ++i) one.make(i / each + i % each * batch);  // all views of an image
  });
}

inline void compute_views(const Augment& a) {
  if (a.bytes) make_views<uint8_t>(a);
  else make_views<float>(a);
}

}  // namespace anomem::cpu::ANOMEM_ISA
