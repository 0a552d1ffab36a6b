// Batches of sparse features from the stream that torch's CPU generator draws: MT19937 (Matsumoto and Nishimura 1998)
// seeded with 32 bits, one word a number, of which the low 24 bits count. A word after the other depends on one 397
// words before, so that a state's 624 words are made by a few vector operations each; torch makes them one by one.

struct MersenneTwister {
  static constexpr int64_t kSize = 624, kShift = 397;
  uint32_t state[kSize];

  explicit MersenneTwister(uint32_t seed) {
    state[0] = seed;
    for (int64_t i = 1; i < kSize; ++i)
      state[i] = 1812433253u * (state[i - 1] ^ (state[i - 1] >> 30)) + uint32_t(i);
  }

  // The next 624 words, to be tempered.
  void advance() {
    const auto mix = [](uint32_t far, uint32_t word, uint32_t next) {
      const uint32_t y = (word & 0x80000000u) | (next & 0x7fffffffu);
      return far ^ (y >> 1) ^ (-(next & 1u) & 0x9908b0dfu);
    };
    for (int64_t i = 0; i < kSize - kShift; ++i) state[i] = mix(state[i + kShift], state[i], state[i + 1]);
    for (int64_t i = kSize - kShift; i < kSize - 1; ++i)
      state[i] = mix(state[i + kShift - kSize], state[i], state[i + 1]);
    state[kSize - 1] = mix(state[kShift - 1], state[kSize - 1], state[0]);
  }

  // u in [0, 1) of word i.
  float uniform(int64_t i) const {
    uint32_t y = state[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    y ^= y >> 18;
    return float(int32_t(y & 0xffffffu)) * (1.0f / 16777216.0f);
  }
};

// Of 2 count numbers u the first half says which features are present, the second half what they are worth:
// out[i] = (width u[count + i] + low) (u[i] < probability).
static void sparse_features(uint32_t seed, int64_t count, float probability, float low, float width, float* out) {
  MersenneTwister words(seed);
  for (int64_t begin = 0; begin < 2 * count; begin += MersenneTwister::kSize) {
    words.advance();
    const int64_t end = smaller(begin + MersenneTwister::kSize, 2 * count);
    for (int64_t i = begin; i < smaller(end, count); ++i) out[i] = words.uniform(i - begin) < probability ? 1.0f : 0.0f;
    for (int64_t i = begin < count ? count : begin; i < end; ++i)
      out[i - count] = (words.uniform(i - begin) * width + low) * out[i - count];
  }
}
