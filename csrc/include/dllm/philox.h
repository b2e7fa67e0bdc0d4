// Counter-based noise, the same words on every backend (dllm_engine/noise.py is its definition).
#pragma once

#include "row_stats.h"

namespace dllm {

struct Words {
    std::uint32_t w[4];
};

// Philox 4x32-10 (Salmon et al., SC 2011).
DLLM_HD Words philox(Words c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c.w[0], p1 = std::uint64_t{0xCD9E8D57u} * c.w[2];
        c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<std::uint32_t>(p1),
              static_cast<std::uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<std::uint32_t>(p0)}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Float32 in (0, 1): exact near 0, where the Gumbel tail that decides is; capped one ulp below 1.
DLLM_HD float uniform(std::uint32_t word) {
    const float u = static_cast<float>((static_cast<double>(word) + 0.5) * 0x1p-32);
    return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

// Standard Gumbel noise of four neighbouring vocabulary ids; key: seed, position, step of the sequence.
DLLM_HD void gumbel4(const std::int64_t key[3], std::int32_t quad, float noise[4]) {
    const Words words = philox({{static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(key[1]),
                                 static_cast<std::uint32_t>(key[2]), 0u}},
                               static_cast<std::uint32_t>(key[0]),
                               static_cast<std::uint32_t>(static_cast<std::uint64_t>(key[0]) >> 32));
    for (int i = 0; i < 4; ++i) noise[i] = -logf(-log1pf(-uniform(words.w[i])));
}

}  // namespace dllm
