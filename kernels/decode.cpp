// Routed attention on a CPU: the scan over low-bit keys, the choice of groups, and attention over them, query by query.
//
// Plain C++ on the vectors that GCC and Clang know; no library but the standard one. The reference is
// lowbit.LowBitSummary.scorer, route.merge_votes, a topk and attend.attend_gathered; native.py says what is passed.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#if defined(__clang__)
#define HGA_UNROLL _Pragma("unroll")
#else
#define HGA_UNROLL _Pragma("GCC unroll 8")
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are read as little-endian words"
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;                // bytes of a word
constexpr int kBlock = kLanes * kVectors;  // tokens at a time
constexpr int kCentred = 128;              // tokens that are coded about one centre, if centres move
static_assert(kCentred % kBlock == 0);
constexpr int kHeads = 4;                  // heads at a time
constexpr int kAhead = 8 * kBlock;         // tokens to fetch in advance
constexpr int kPages = 4;                  // pages to fetch in advance
constexpr int kFlush = 64;                 // vectors that are summed in float32 before float64 takes over
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Integers = std::int32_t __attribute__((vector_size(4 * kLanes)));
using Floats = float __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }

inline Floats larger(const Floats& one, const Floats& other) { return one > other ? one : other; }

inline float sum_of(const Floats& value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

inline float largest_of(const Floats& value) {
  float lanes[kLanes];
  store(lanes, value);
  return *std::max_element(lanes, lanes + kLanes);
}

// exp for x <= 0 (Cephes expf: the argument is reduced by multiples of log 2, then a polynomial).
inline Floats exp_negative(Floats x) {
  x = larger(x, Floats{} - 87.0f);
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, which the low bits then hold.
  const float magic = 12582912.0f;
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers bits = ((Integers)shifted + 127) << 23;
  return p * (Floats)bits;
}

// Products of `kCount` queries with the levels of `kBlock` tokens, not yet scaled. Sums stay in registers. The bytes
// of four tokens are read as one word and shifted into place: lane `l` of vector `v` is token `4 * l + v`.
template <int kBits, int kCount>
inline void score_block(const std::uint8_t* codes, std::int64_t stride, const float* query, const float* start,
                        int bytes, Floats (&sum)[kCount][kVectors]) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kMask = (1 << kBits) - 1;
  HGA_UNROLL
  for (int head = 0; head < kCount; ++head) {
    HGA_UNROLL
    for (int part = 0; part < kVectors; ++part) sum[head][part] = Floats{} + start[head];
  }
  for (int byte = 0; byte < bytes; ++byte) {
    __builtin_prefetch(codes + byte * stride + kAhead);
    Words words;
    std::memcpy(&words, codes + byte * stride, sizeof words);
    HGA_UNROLL
    for (int place = 0; place < kPerByte; ++place) {
      Floats level[kVectors];
      HGA_UNROLL
      for (int part = 0; part < kVectors; ++part)
        level[part] = __builtin_convertvector((Integers)((words >> (8 * part)) & (kMask << (place * kBits))), Floats);
      HGA_UNROLL
      for (int head = 0; head < kCount; ++head) {
        const float factor = query[(byte * kPerByte + place) * kCount + head];
        HGA_UNROLL
        for (int part = 0; part < kVectors; ++part) sum[head][part] += level[part] * factor;
      }
    }
  }
}

inline float dot(const float* one, const float* other, int dim) {
  Floats sum = {};
  int channel = 0;
  for (; channel + kLanes <= dim; channel += kLanes) sum += load(one + channel) * load(other + channel);
  float rest = 0.0f;
  for (; channel < dim; ++channel) rest += one[channel] * other[channel];
  return sum_of(sum) + rest;
}

inline void widen(const std::uint16_t* halves, float* to, int dim) {
  for (int channel = 0; channel < dim; ++channel) {
    const std::uint32_t bits = static_cast<std::uint32_t>(halves[channel]) << 16;
    std::memcpy(to + channel, &bits, sizeof bits);
  }
}

// Scores [heads, blocks, kVectors, kLanes] of whole blocks, scaled; what lies past the last token is -infinity.
// Keys of each kCentred tokens are coded about one of `centres` [*, dim], bfloat16; null: all about the same.
// Sets the heads' `peaks`; returns false if a score is not finite.
template <int kBits, int kCount>
bool score_heads(const std::uint8_t* codes, std::int64_t stride, const float* query, int dim, const float* scales,
                 const std::uint16_t* centres, float* out, float* peaks, std::int64_t tokens) {
  constexpr int kPerByte = 8 / kBits;
  constexpr float kTop = ((1 << kBits) - 1) / 2.0f;
  const int bytes = (dim + kPerByte - 1) / kPerByte;
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  // A level that is left in its place in a byte is a power of two too large: the query makes up for it, exactly.
  std::vector<float> shrunk(static_cast<std::size_t>(bytes) * kPerByte * kCount);
  float start[kCount] = {};
  for (int head = 0; head < kCount; ++head)
    for (int channel = 0; channel < dim; ++channel) {
      const float value = query[head * dim + channel];
      start[head] -= kTop * value;
      shrunk[channel * kCount + head] = value / static_cast<float>(1 << (channel % kPerByte * kBits));
    }
  std::vector<std::uint8_t> rest;
  std::vector<float> centre(centres ? dim : 0);
  float moved[kCount] = {};
  Floats peak[kCount], bad = {};
  for (Floats& most : peak) most = Floats{} - kInfinity;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t count = std::min<std::int64_t>(kBlock, tokens - block * kBlock);
    if (centres && block % (kCentred / kBlock) == 0) {
      widen(centres + block / (kCentred / kBlock) * dim, centre.data(), dim);
      for (int head = 0; head < kCount; ++head) moved[head] = dot(query + head * dim, centre.data(), dim);
    }
    const std::uint8_t* source = codes + block * kBlock;
    std::int64_t step = stride;
    if (count < kBlock) {
      // Nothing is read past the last token's codes.
      rest.resize(static_cast<std::size_t>(bytes) * kBlock);
      for (int byte = 0; byte < bytes; ++byte)
        std::memcpy(rest.data() + byte * kBlock, source + byte * stride, static_cast<std::size_t>(count));
      source = rest.data(), step = kBlock;
    }
    Floats sum[kCount][kVectors];
    score_block<kBits, kCount>(source, step, shrunk.data(), start, bytes, sum);
    float ordered[kVectors][kLanes] = {};
    for (std::int64_t token = 0; token < count; ++token)
      ordered[token % kVectors][token / kVectors] = scales[block * kBlock + token];
    for (int part = 0; part < kVectors; ++part) {
      const Floats scale = load(ordered[part]);
      for (int head = 0; head < kCount; ++head) {
        Floats score = sum[head][part] * scale;
        if (centres) score += moved[head];
        bad += score * 0.0f;  // not a number where the score is not finite
        if (count < kBlock)
          for (int lane = 0; lane < kLanes; ++lane)
            if (lane * kVectors + part >= count) score[lane] = -kInfinity;
        peak[head] = larger(score, peak[head]);
        store(out + ((head * blocks + block) * kVectors + part) * kLanes, score);
      }
    }
  }
  for (int head = 0; head < kCount; ++head) peaks[head] = largest_of(peak[head]);
  return sum_of(bad) == 0.0f;
}

template <int kBits>
bool score_row(const std::uint8_t* codes, std::int64_t stride, const float* query, int heads, int dim,
               const float* scales, const std::uint16_t* centres, float* out, float* peaks, std::int64_t tokens) {
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  bool finite = true;
  for (int head = 0; head < heads; head += kHeads) {
    const int left = std::min(kHeads, heads - head);
    auto run = left == 1   ? score_heads<kBits, 1>
               : left == 2 ? score_heads<kBits, 2>
               : left == 3 ? score_heads<kBits, 3>
                           : score_heads<kBits, 4>;
    finite &= run(codes, stride, query + head * dim, dim, scales, centres, out + head * blocks * kBlock, peaks + head,
                  tokens);
  }
  return finite;
}

auto scorer_of(int bits) {
  return bits == 1 ? score_row<1> : bits == 2 ? score_row<2> : bits == 4 ? score_row<4> : score_row<8>;
}

// Softmax masses [blocks, kBlock / kRun] of runs of `kRun` tokens, in their order; returns their sum.
template <int kRun>
double sum_runs(const float* scores, float peak, float* masses, std::int64_t blocks) {
  constexpr int kRuns = kVectors / kRun;  // runs of four tokens
  double total = 0.0;
  for (std::int64_t begin = 0; begin < blocks; begin += kFlush) {
    Floats lanes = {};
    for (std::int64_t block = begin; block < std::min(blocks, begin + kFlush); ++block) {
      Floats mass[kRuns] = {};
      HGA_UNROLL
      for (int part = 0; part < kVectors; ++part)
        mass[part / kRun] += exp_negative(load(scores + (block * kVectors + part) * kLanes) - peak);
      float* to = masses + block * (kBlock / kRun);
      for (int lane = 0; lane < kLanes; ++lane)
        HGA_UNROLL
        for (int run = 0; run < kRuns; ++run) to[lane * kRuns + run] = mass[run][lane];
      HGA_UNROLL
      for (int run = 0; run < kRuns; ++run) lanes += mass[run];
    }
    total += sum_of(lanes);
  }
  return total;
}

// Tokens of the longest runs that make up groups of `size`.
inline int run_of(int size) { return size % 4 == 0 ? 4 : size % 2 == 0 ? 2 : 1; }

auto summer_of(int size) {
  const int run = run_of(size);
  return run == 4 ? sum_runs<4> : run == 2 ? sum_runs<2> : sum_runs<1>;
}

// Adds one head's votes for groups of `runs` runs.
void add_votes(const float* masses, float share, float* votes, std::int64_t groups, int runs, bool most) {
  const auto add = [=](std::int64_t group, float vote) {
    votes[group] = most ? std::max(votes[group], vote) : votes[group] + vote;
  };
  if (runs == 1) {
    for (std::int64_t group = 0; group < groups; ++group) add(group, masses[group] * share);
    return;
  }
  for (std::int64_t group = 0; group < groups; ++group) {
    float mass = 0.0f;
    for (int run = 0; run < runs; ++run) mass += masses[group * runs + run];
    add(group, mass * share);
  }
}

// Appends the `count` groups of `first <= group < end` with the most votes, ascending; of equals the first ones.
void choose(const float* votes, std::int64_t first, std::int64_t end, std::int64_t count, std::vector<float>& sorted,
            std::vector<std::int64_t>& groups) {
  count = std::min(count, end - first);
  if (count <= 0) return;
  // Votes are not negative: their bits have their order. Only those that share their first bits with the least one
  // that is taken need to be ordered.
  constexpr int kShift = 20, kBins = 1 << (31 - kShift);
  const auto bin_of = [&](std::int64_t group) {
    std::uint32_t bits;
    std::memcpy(&bits, votes + group, sizeof bits);
    return static_cast<int>(bits >> kShift);
  };
  std::int32_t sizes[kBins] = {};
  for (std::int64_t group = first; group < end; ++group) ++sizes[bin_of(group)];
  int bin = kBins - 1;
  std::int64_t left = count;
  for (; sizes[bin] < left; --bin) left -= sizes[bin];
  sorted.clear();
  for (std::int64_t group = first; group < end; ++group)
    if (bin_of(group) == bin) sorted.push_back(votes[group]);
  std::nth_element(sorted.begin(), sorted.begin() + (left - 1), sorted.end(), std::greater<float>());
  const float least = sorted[left - 1];
  std::int64_t equals = left - std::count_if(sorted.begin(), sorted.end(), [=](float vote) { return vote > least; });
  std::size_t at = groups.size();
  groups.resize(at + count + 1);  // one that is written to and not kept
  for (std::int64_t group = first; group < end; ++group) {
    const bool same = votes[group] == least, taken = votes[group] > least || (same && equals > 0);
    groups[at] = group;
    at += taken, equals -= same;
  }
  groups.resize(at);
}

// Softmax attention of queries [heads, dim] over the first `tokens` tokens of pages: a page holds the keys
// [size, dim] and then the values [size, v_dim] of one group of one row.
void attend_row(const float* pages, std::int64_t stride, const std::int64_t* groups, std::int64_t count,
                std::int64_t tokens, const float* query, float* out, int heads, int dim, int v_dim, int size,
                float scale, std::vector<float>& weights) {
  const std::int64_t page = static_cast<std::int64_t>(size) * (dim + v_dim);
  weights.resize(static_cast<std::size_t>(heads * tokens));
  for (std::int64_t place = 0; place < count; ++place) {
    // The pages lie far apart: the next ones are fetched while this one is worked on.
    if (place + kPages < count)
      for (std::int64_t line = 0; line < page; line += kLanes)
        __builtin_prefetch(pages + groups[place + kPages] * stride + line);
    const float* keys = pages + groups[place] * stride;
    for (std::int64_t token = place * size; token < std::min(tokens, (place + 1) * size); ++token, keys += dim)
      for (int head = 0; head < heads; ++head)
        weights[head * tokens + token] = dot(query + head * dim, keys, dim) * scale;
  }
  for (int head = 0; head < heads; ++head) {
    float* weight = weights.data() + head * tokens;
    float peak = -kInfinity, total = 0.0f;
    // Written so that a score that is not a number stays one.
    for (std::int64_t token = 0; token < tokens; ++token) peak = weight[token] <= peak ? peak : weight[token];
    for (std::int64_t token = 0; token < tokens; ++token) total += weight[token] = std::exp(weight[token] - peak);
    for (std::int64_t token = 0; token < tokens; ++token) weight[token] /= total;
    std::fill(out + head * v_dim, out + (head + 1) * v_dim, 0.0f);
  }
  for (std::int64_t place = 0; place < count; ++place) {
    const float* values = pages + groups[place] * stride + static_cast<std::int64_t>(size) * dim;
    for (std::int64_t token = place * size; token < std::min(tokens, (place + 1) * size); ++token, values += v_dim)
      for (int head = 0; head < heads; ++head) {
        const float weight = weights[head * tokens + token];
        float* to = out + head * v_dim;
        int channel = 0;
        for (; channel + kLanes <= v_dim; channel += kLanes)
          store(to + channel, load(to + channel) + load(values + channel) * weight);
        for (; channel < v_dim; ++channel) to[channel] += weight * values[channel];
      }
  }
}

// Groups of one unpadded query, as native.Span has them.
struct Span {
  std::int64_t sink_start, sink_end, window, chosen, length;
};

// Lists the groups of one query of one row (see hga_steps); false if a score is not finite.
bool list_groups(const std::uint8_t* codes, std::int64_t byte_stride, const float* scales,
                 const std::uint16_t* centres, const float* turned, const Span& span, int heads, int dim, int size,
                 int bits, int most, std::vector<std::int64_t>& groups) {
  const std::int64_t tokens = span.window * size, blocks = (tokens + kBlock - 1) / kBlock;
  const std::int64_t last = (span.length + size - 1) / size;
  // Kept from step to step: fresh memory costs more than what is done with it.
  thread_local std::vector<float> scores, peaks, masses, votes, sorted;
  groups.clear();
  for (std::int64_t group = span.sink_start; group < span.sink_end; ++group) groups.push_back(group);
  if (span.chosen >= span.window - span.sink_end) {
    for (std::int64_t group = span.sink_end; group < span.window; ++group) groups.push_back(group);
  } else if (span.chosen > 0) {
    scores.resize(heads * blocks * kBlock);
    peaks.resize(heads);
    masses.resize(blocks * kBlock / run_of(size));
    if (!scorer_of(bits)(codes, byte_stride, turned, heads, dim, scales, centres, scores.data(), peaks.data(), tokens))
      return false;
    votes.assign(span.window, 0.0f);
    for (int head = 0; head < heads; ++head) {
      const double total = summer_of(size)(scores.data() + head * blocks * kBlock, peaks[head], masses.data(), blocks);
      add_votes(masses.data(), static_cast<float>(1.0 / total), votes.data(), span.window, size / run_of(size), most);
    }
    choose(votes.data(), span.sink_end, span.window, span.chosen, sorted, groups);
  }
  for (std::int64_t group = span.window; group < last; ++group) groups.push_back(group);
  return true;
}

// One query of one row (see hga_steps); false if a score is not finite.
bool step(const float* pages, std::int64_t page_stride, const std::uint8_t* codes, std::int64_t byte_stride,
          const float* scales, const std::uint16_t* centres, const float* turned, const float* query, float* out,
          const Span& span, int heads, int dim, int v_dim, int size, int bits, int most, float scale) {
  thread_local std::vector<float> weights;
  thread_local std::vector<std::int64_t> groups;
  if (!list_groups(codes, byte_stride, scales, centres, turned, span, heads, dim, size, bits, most, groups))
    return false;
  const std::int64_t count = static_cast<std::int64_t>(groups.size());
  const std::int64_t missing = (span.length + size - 1) / size * size - span.length;
  attend_row(pages, page_stride, groups.data(), count, count * size - missing, query, out, heads, dim, v_dim, size,
             scale, weights);
  return true;
}

}  // namespace

extern "C" {

// Scores [rows, heads, tokens] of queries [rows, heads, dim]; 1 if one is not finite. Centres that move
// [rows, *, dim], bfloat16, or null; rows of them, as of codes, lie a stride apart.
int hga_scores(const std::uint8_t* codes, std::int64_t row_stride, std::int64_t byte_stride, const float* scales,
               const std::uint16_t* centres, std::int64_t centre_stride, const float* query, float* scores,
               std::int64_t rows, int heads, int dim, int bits, std::int64_t tokens) {
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  std::vector<float> found(heads * blocks * kBlock), peaks(heads);
  for (std::int64_t row = 0; row < rows; ++row) {
    if (!scorer_of(bits)(codes + row * row_stride, byte_stride, query + row * heads * dim, heads, dim,
                         scales + row * tokens, centres ? centres + row * centre_stride : nullptr, found.data(),
                         peaks.data(), tokens))
      return 1;
    for (int head = 0; head < heads; ++head)
      for (std::int64_t token = 0; token < tokens; ++token)
        scores[(row * heads + head) * tokens + token] =
            found[(head * blocks + token / kBlock) * kBlock + token % kVectors * kLanes + token % kBlock / kVectors];
  }
  return 0;
}

// Attention of queries [rows, heads, dim] over the first `tokens` tokens of groups [rows, count].
void hga_attend(const float* pages, const std::int64_t* groups, const float* query, float* out, std::int64_t rows,
                int heads, int dim, int v_dim, int size, std::int64_t count, std::int64_t tokens, float scale) {
  const std::int64_t page = static_cast<std::int64_t>(size) * (dim + v_dim);
  std::vector<float> weights;
  for (std::int64_t row = 0; row < rows; ++row)
    attend_row(pages + row * page, rows * page, groups + row * count, count, tokens, query + row * heads * dim,
               out + row * heads * v_dim, heads, dim, v_dim, size, scale, weights);
}

// Routes and attends, one query at a time: scores the groups before its window, chooses `chosen` of them behind the
// sinks, and attends to sinks, chosen groups and window up to token `length`. Queries [rows, queries, heads, dim] and
// scales [rows, tokens]; spans [queries]; centres as hga_scores takes them. 1 if a score is not finite: `out` counts
// for nothing.
int hga_steps(const float* pages, const std::uint8_t* codes, std::int64_t row_stride, std::int64_t byte_stride,
              const float* scales, std::int64_t scale_stride, const std::uint16_t* centres, std::int64_t centre_stride,
              const float* turned, const float* query, float* out, const Span* spans, std::int64_t rows,
              std::int64_t queries, int heads, int dim, int v_dim, int size, int bits, int most, float scale,
              int threads) {
  const std::int64_t page = static_cast<std::int64_t>(size) * (dim + v_dim);
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> finite{true};
  const auto work = [&] {
    for (std::int64_t item; finite && (item = next++) < rows * queries;) {
      // The last queries see most: begun first, they do not keep others waiting at the end.
      const std::int64_t row = item % rows, number = queries - 1 - item / rows, at = row * queries + number;
      if (!step(pages + row * page, rows * page, codes + row * row_stride, byte_stride, scales + row * scale_stride,
                centres ? centres + row * centre_stride : nullptr, turned + at * heads * dim, query + at * heads * dim,
                out + at * heads * v_dim, spans[number], heads, dim, v_dim, size, bits, most, scale))
        finite = false;
    }
  };
  std::vector<std::thread> others;
  for (int number = 1; number < std::min<std::int64_t>(threads, rows * queries); ++number) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return finite ? 0 : 1;
}
// The groups [rows, width] that hga_steps attends to from one query of each row. 1 if a score is not finite.
int hga_routes(const std::uint8_t* codes, std::int64_t row_stride, std::int64_t byte_stride, const float* scales,
               std::int64_t scale_stride, const std::uint16_t* centres, std::int64_t centre_stride,
               const float* turned, const Span* span, std::int64_t* groups, std::int64_t rows, std::int64_t width,
               int heads, int dim, int size, int bits, int most) {
  std::vector<std::int64_t> found;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (!list_groups(codes + row * row_stride, byte_stride, scales + row * scale_stride,
                     centres ? centres + row * centre_stride : nullptr, turned + row * heads * dim, *span, heads, dim, size,
                     bits, most, found))
      return 1;
    std::copy(found.begin(), found.begin() + std::min<std::int64_t>(width, found.size()), groups + row * width);
  }
  return 0;
}
}
