// Decoding on a CPU: the scan over low-bit keys, the votes, and attention over the routed groups of one query.
//
// Plain C++ with loops that compilers vectorise; no library but the standard one. The reference is
// lowbit.LowBitSummary.scorer, route.merge_votes and attend.attend_gathered; native.py says what is passed.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__clang__)
#define HGA_UNROLL _Pragma("unroll")
#else
#define HGA_UNROLL _Pragma("GCC unroll 8")
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;
constexpr int kBlock = kLanes * kVectors;  // tokens at a time
constexpr int kHeads = 4;                  // heads at a time
constexpr int kAhead = 8 * kBlock;          // tokens to fetch in advance
constexpr std::int64_t kPiece = 2048;      // tokens of a row that a thread takes
constexpr std::int64_t kWorthAThread = 1 << 21;

using Bytes = std::uint8_t __attribute__((vector_size(kLanes)));
using Integers = std::int32_t __attribute__((vector_size(4 * kLanes)));
using Floats = float __attribute__((vector_size(4 * kLanes)));

// exp for x <= 0 (Cephes expf: the argument is reduced by multiples of log 2, then a polynomial).
inline float exp_negative(float x) {
  x = x > -87.0f ? x : -87.0f;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, which the low bits then hold.
  const float magic = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

void exp_all(float* __restrict__ values, std::int64_t count, float peak) {
  for (std::int64_t place = 0; place < count; ++place) values[place] = exp_negative(values[place] - peak);
}

// Sums stay in registers: `kCount` heads of `kBlock` tokens, 16 tokens a vector.
template <int kBits, int kCount>
void score_block(const std::uint8_t* codes, std::int64_t stride, const float* query, const float* start, int dim,
                 const float* scales, float* out, std::int64_t out_stride, int tokens) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kMask = (1 << kBits) - 1;
  Floats sum[kCount][kVectors];
  HGA_UNROLL
  for (int head = 0; head < kCount; ++head) {
    HGA_UNROLL
    for (int part = 0; part < kVectors; ++part) sum[head][part] = Floats{} + start[head];
  }
  std::uint8_t padded[kBlock] = {};
  for (int byte = 0; byte * kPerByte < dim; ++byte) {
    const std::uint8_t* source = codes + byte * stride;
    if (tokens < kBlock) {
      std::memcpy(padded, source, tokens);
      source = padded;
    } else {
      __builtin_prefetch(source + kAhead);
    }
    Integers packed[kVectors];
    HGA_UNROLL
    for (int part = 0; part < kVectors; ++part) {
      Bytes bytes;
      std::memcpy(&bytes, source + part * kLanes, sizeof bytes);
      packed[part] = __builtin_convertvector(bytes, Integers);
    }
    for (int place = 0; place < kPerByte && byte * kPerByte + place < dim; ++place) {
      Floats level[kVectors];
      HGA_UNROLL
      for (int part = 0; part < kVectors; ++part)
        level[part] = __builtin_convertvector(packed[part] & (kMask << (place * kBits)), Floats);
      HGA_UNROLL
      for (int head = 0; head < kCount; ++head) {
        const float factor = query[head * dim + byte * kPerByte + place];
        HGA_UNROLL
        for (int part = 0; part < kVectors; ++part) sum[head][part] += level[part] * factor;
      }
    }
  }
  HGA_UNROLL
  for (int head = 0; head < kCount; ++head) {
    float scores[kBlock];
    std::memcpy(scores, sum[head], sizeof scores);
    for (int token = 0; token < tokens; ++token) out[head * out_stride + token] = scores[token] * scales[token];
  }
}

template <int kBits>
void score_row(const std::uint8_t* codes, std::int64_t stride, const float* query, int heads, int dim,
               const float* scales, float* out, std::int64_t out_stride, std::int64_t tokens) {
  constexpr int kPerByte = 8 / kBits;
  constexpr float kTop = ((1 << kBits) - 1) / 2.0f;
  // A level that is left in its place in a byte is a power of two too large: the query makes up for it, exactly.
  std::vector<float> shrunk(static_cast<std::size_t>(heads) * dim), start(heads);
  for (int head = 0; head < heads; ++head)
    for (int channel = 0; channel < dim; ++channel) {
      const float value = query[head * dim + channel];
      start[head] -= kTop * value;
      shrunk[head * dim + channel] = value / static_cast<float>(1 << (channel % kPerByte * kBits));
    }
  for (std::int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int count = static_cast<int>(tokens - begin < kBlock ? tokens - begin : kBlock);
    for (int head = 0; head < heads; head += kHeads) {
      const float* part = shrunk.data() + static_cast<std::size_t>(head) * dim;
      float* to = out + head * out_stride + begin;
      const int left = heads - head < kHeads ? heads - head : kHeads;
      auto run = left == 1   ? score_block<kBits, 1>
                 : left == 2 ? score_block<kBits, 2>
                 : left == 3 ? score_block<kBits, 3>
                             : score_block<kBits, 4>;
      run(codes + begin, stride, part, start.data() + head, dim, scales + begin, to, out_stride, count);
    }
  }
}

// Sums of `kSize` neighbours; returns the sum of all.
template <int kSize>
double sum_groups(const float* __restrict__ values, float* __restrict__ sums, std::int64_t groups, int size) {
  const int members = kSize ? kSize : size;
  double total = 0.0;
  for (std::int64_t begin = 0; begin < groups; begin += kBlock) {
    const std::int64_t end = begin + kBlock < groups ? begin + kBlock : groups;
    float lanes[kLanes] = {};
    for (std::int64_t group = begin; group < end; ++group) {
      float sum = 0.0f;
      for (int member = 0; member < members; ++member) sum += values[group * members + member];
      sums[group] = sum;
      lanes[group % kLanes] += sum;
    }
    for (const float lane : lanes) total += lane;
  }
  return total;
}

// Largest value of a run; sets `finite` to false where a value is not.
float largest(const float* values, std::int64_t count, bool& finite) {
  float most[16];
  float bad[16] = {};
  for (float& value : most) value = -INFINITY;
  std::int64_t place = 0;
  for (; place + 16 <= count; place += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const float value = values[place + lane];
      most[lane] = value > most[lane] ? value : most[lane];
      bad[lane] += value * 0.0f;  // not a number where the value is not finite
    }
  for (; place < count; ++place) {
    most[0] = values[place] > most[0] ? values[place] : most[0];
    bad[0] += values[place] * 0.0f;
  }
  for (int lane = 0; lane < 16; ++lane) {
    most[0] = most[lane] > most[0] ? most[lane] : most[0];
    finite = finite && bad[lane] == 0.0f;
  }
  return most[0];
}

}  // namespace

extern "C" {

// Scores [rows, heads, tokens] of queries [rows, heads, dim]; 0 if all are finite.
int hga_scores(const std::uint8_t* codes, std::int64_t row_stride, std::int64_t byte_stride, const float* scales,
               const float* query, float* scores, std::int64_t rows, int heads, int dim, int bits,
               std::int64_t tokens, int threads) {
  auto run = bits == 1 ? score_row<1> : bits == 2 ? score_row<2> : bits == 4 ? score_row<4> : score_row<8>;
  std::atomic<std::int64_t> next{0};
  std::atomic<int> broken{0};
  const std::int64_t pieces = rows * ((tokens + kPiece - 1) / kPiece);
  auto work = [&] {
    for (std::int64_t piece = next++; piece < pieces; piece = next++) {
      const std::int64_t row = piece % rows, begin = piece / rows * kPiece;
      const std::int64_t count = tokens - begin < kPiece ? tokens - begin : kPiece;
      float* to = scores + row * heads * tokens + begin;
      run(codes + row * row_stride + begin, byte_stride, query + row * heads * dim, heads, dim,
          scales + row * tokens + begin, to, tokens, count);
      bool finite = true;
      for (int head = 0; head < heads; ++head) largest(to + head * tokens, count, finite);
      if (!finite) broken = 1;
    }
  };
  // A thread takes longer to start than a small scan.
  const std::int64_t useful = rows * heads * dim * tokens / kWorthAThread;
  std::vector<std::thread> others;
  for (std::int64_t extra = 1; extra < threads && extra <= useful; ++extra) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return broken;
}

// Votes [rows, groups] from scores [rows, heads, groups * size], which are overwritten; finite scores only.
void hga_votes(float* scores, float* votes, std::int64_t rows, int heads, std::int64_t groups, int size, int most) {
  std::vector<float> mass(groups);
  for (std::int64_t row = 0; row < rows; ++row) {
    float* out = votes + row * groups;
    for (std::int64_t group = 0; group < groups; ++group) out[group] = 0.0f;
    for (int head = 0; head < heads; ++head) {
      float* part = scores + (row * heads + head) * groups * size;
      bool finite = true;
      const float peak = largest(part, groups * size, finite);
      exp_all(part, groups * size, peak);
      auto add = size == 4 ? sum_groups<4> : size == 8 ? sum_groups<8> : size == 16 ? sum_groups<16> : sum_groups<0>;
      const double total = add(part, mass.data(), groups, size);
      const float share = total > 0.0 ? static_cast<float>(1.0 / total) : 0.0f;
      for (std::int64_t group = 0; group < groups; ++group) {
        const float vote = mass[group] * share;
        out[group] = most ? (vote > out[group] ? vote : out[group]) : out[group] + vote;
      }
    }
  }
}

// Softmax attention of queries [rows, heads, dim] over the first `tokens` tokens of pages [*, rows, page]: a page
// holds the keys [size, dim] and then the values [size, v_dim] of one group of one row; `groups` [rows, count].
void hga_attend(const float* pages, const std::int64_t* groups, const float* query, float* out, std::int64_t rows,
                int heads, int dim, int v_dim, int size, std::int64_t count, std::int64_t tokens, float scale) {
  const std::int64_t page = static_cast<std::int64_t>(size) * (dim + v_dim);
  std::vector<float> weight(tokens);
  for (std::int64_t row = 0; row < rows; ++row)
    for (int head = 0; head < heads; ++head) {
      const float* asked = query + (row * heads + head) * dim;
      float peak = -INFINITY;
      for (std::int64_t token = 0; token < tokens; ++token) {
        // The pages lie far apart: the next ones are fetched while this one is worked on.
        if (head == 0 && token % size == 0 && token / size + 4 < count)
          for (std::int64_t place = 0; place < page; place += kLanes)
            __builtin_prefetch(pages + (groups[row * count + token / size + 4] * rows + row) * page + place);
        const float* key = pages + (groups[row * count + token / size] * rows + row) * page + token % size * dim;
        float lanes[kLanes] = {};
        int channel = 0;
        for (; channel + kLanes <= dim; channel += kLanes)
          for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += asked[channel + lane] * key[channel + lane];
        for (; channel < dim; ++channel) lanes[0] += asked[channel] * key[channel];
        float score = 0.0f;
        for (const float lane : lanes) score += lane;
        weight[token] = score * scale;
        // Written so that a score that is not a number stays one.
        peak = weight[token] <= peak ? peak : weight[token];
      }
      float* to = out + (row * heads + head) * v_dim;
      for (int channel = 0; channel < v_dim; ++channel) to[channel] = 0.0f;
      float total = 0.0f;
      for (std::int64_t token = 0; token < tokens; ++token) {
        const float share = std::exp(weight[token] - peak);
        total += share;
        const float* value =
            pages + (groups[row * count + token / size] * rows + row) * page + size * dim + token % size * v_dim;
        for (int channel = 0; channel < v_dim; ++channel) to[channel] += share * value[channel];
      }
      for (int channel = 0; channel < v_dim; ++channel) to[channel] /= total;
    }
}
}
