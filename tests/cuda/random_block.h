/* Blocks of format v1 with random codes, and their values in double, both written from the format's
   description in rdkv.h alone: a second opinion on the packer, and data for benchmarks. Host C++.
 */
#ifndef RDKV_RANDOM_BLOCK_H
#define RDKV_RANDOM_BLOCK_H

#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>
#include <vector>
#include "../../rdkv.h"

/* What one head keeps. Channels that are in no run are dropped. */
struct head_counts {
  uint32_t tokens[4];   /* V runs of 2, 4, 8, 16 bits */
  uint32_t channels[3]; /* K runs of 2, 4, 8 bits */
};

struct random_source {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
  double normal() { /* sum of 12: near enough */
    double s = -6;
    for (int i = 0; i < 12; ++i) s += uniform();
    return s;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(uniform() * n); }
};

inline uint16_t half_bits(double x) {
  return __half_as_ushort(__float2half_rn(static_cast<float>(x)));
}

inline double half_value(uint16_t bits) {
  return static_cast<double>(__half2float(__ushort_as_half(bits)));
}

static const int widths[4] = {2, 4, 8, 16};

/* Where the code of (row, column) of a block of 32 x 16 is: row = 16 sub + 8 r + g and column = 4 t
   + 2 pr + e for K; for V rows are tokens 16 sub + 2 t + 8 pr + e and columns dims g + 8 r. */
struct code_place {
  int g, t, sub, r, pr, e;
};
inline code_place key_place(int token, int channel) {
  code_place p = {token & 7,        (channel >> 2) & 3, token >> 4,
                  (token >> 3) & 1, (channel >> 1) & 1, channel & 1};
  return p;
}
inline code_place value_place(int token, int dim) {
  code_place p = {dim & 7,        (token >> 1) & 3, token >> 4,
                  (dim >> 3) & 1, (token >> 3) & 1, token & 1};
  return p;
}
inline uint32_t read_code(const uint8_t *block, int bits, code_place p) {
  const int lane = 4 * p.g + p.t;
  int word = 0, shift = 0;
  if (bits == 2) shift = 2 * (2 * p.sub + p.pr) + 8 * p.r + 16 * p.e;
  if (bits == 4) word = p.sub, shift = 4 * p.pr + 8 * p.r + 16 * p.e;
  if (bits == 8) word = 2 * p.sub + p.pr, shift = 8 * (2 * p.r + p.e);
  uint32_t x;
  memcpy(&x, block + 4 * (lane * (bits / 2) + word), 4);
  return (x >> shift) & ((1u << bits) - 1);
}

inline size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

/* counts [n_layers][n_kv_heads]. K and V have values of about spread_k and spread_v around a middle
   of a few tenths of that. Checksums are right, so that rdkv_open takes the block. */
inline std::vector<uint8_t> random_block(int n_layers, int first_layer, int n_q_heads,
                                         int n_kv_heads, int k_dim, int v_dim,
                                         const head_counts *counts, double spread_k,
                                         double spread_v, uint64_t seed) {
  random_source rng = {seed};
  const int heads = n_layers * n_kv_heads;
  std::vector<rdkv_record> records(static_cast<size_t>(heads));
  size_t at = round_up(sizeof(rdkv_header) + sizeof(rdkv_record) * static_cast<size_t>(heads), 128);
  for (int h = 0; h < heads; ++h) {
    rdkv_record &r = records[static_cast<size_t>(h)];
    memset(&r, 0, sizeof r);
    uint32_t used = 0, padded = 0;
    for (int i = 0; i < 4; ++i) r.n_tokens[i] = counts[h].tokens[i];
    for (int i = 0; i < 3; ++i) {
      r.n_channels[i] = static_cast<uint16_t>(counts[h].channels[i]);
      used += counts[h].channels[i],
          padded += static_cast<uint32_t>(round_up(counts[h].channels[i], 16));
    }
    r.n_dropped = static_cast<uint16_t>(static_cast<uint32_t>(k_dim) - used);
    r.table = at;
    at = round_up(at + 2 * padded + 3 * (padded + r.n_dropped), 128);
  }
  const size_t head_bytes = at;
  for (int h = 0; h < heads; ++h) {
    rdkv_record &r = records[static_cast<size_t>(h)];
    r.tile = at;
    size_t key = 0;
    for (int i = 0; i < 3; ++i)
      key += static_cast<size_t>((r.n_channels[i] + 15) / 16) * (128u << i);
    for (int i = 0; i < 4; ++i)
      at += (r.n_tokens[i] + 31) / 32 *
            (key + 128 + static_cast<size_t>((v_dim + 15) / 16) * (128u << i));
  }
  std::vector<uint8_t> block(at, 0);
  rdkv_header header;
  memset(&header, 0, sizeof header);
  header.magic = 0x564b4452u, header.version = RDKV_FORMAT_VERSION, header.total_bytes = at;
  header.head_bytes = head_bytes;
  header.first_layer = static_cast<uint32_t>(first_layer);
  header.n_layers = static_cast<uint32_t>(n_layers);
  header.n_q_heads = static_cast<uint32_t>(n_q_heads);
  header.n_kv_heads = static_cast<uint32_t>(n_kv_heads);
  header.k_dim = static_cast<uint32_t>(k_dim), header.v_dim = static_cast<uint32_t>(v_dim);
  header.n_tokens = 1u << 20, header.window = 32, header.pool = 5, header.softmax_scale = 1;
  memcpy(block.data(), &header, sizeof header);
  memcpy(block.data() + sizeof header, records.data(), sizeof(rdkv_record) * records.size());
  for (int h = 0; h < heads; ++h) {
    const rdkv_record &r = records[static_cast<size_t>(h)];
    /* channel table: a random permutation */
    std::vector<uint8_t> order(static_cast<size_t>(k_dim));
    for (int c = 0; c < k_dim; ++c) order[static_cast<size_t>(c)] = static_cast<uint8_t>(c);
    for (uint32_t c = static_cast<uint32_t>(k_dim); c > 1; --c) {
      const uint32_t o = rng.below(c);
      const uint8_t x = order[c - 1];
      order[c - 1] = order[o], order[o] = x;
    }
    uint32_t padded = 0;
    for (int i = 0; i < 3; ++i) padded += static_cast<uint32_t>((r.n_channels[i] + 15) / 16 * 16);
    uint8_t *table = block.data() + r.table;
    uint8_t *mids = table + 2 * padded, *channels = mids + 2 * (padded + r.n_dropped);
    size_t slot = 0, next = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t n = i < 3 ? r.n_channels[i] : r.n_dropped;
      for (uint32_t c = 0; c < n; ++c) {
        const uint16_t m = half_bits(rng.normal() * 0.3 * spread_k);
        if (i < 3) {
          const uint16_t s =
              half_bits(spread_k * (0.7 + 0.6 * rng.uniform()) * 3.4 / ((1 << widths[i]) - 1));
          memcpy(table + 2 * (slot + c), &s, 2);
        }
        memcpy(mids + 2 * (slot + c), &m, 2);
        channels[slot + c] = order[next++];
      }
      slot += i < 3 ? round_up(n, 16) : n;
    }
    uint8_t *tile = block.data() + r.tile;
    for (int run = 0; run < 4; ++run)
      for (uint32_t t = 0; t < r.n_tokens[run]; t += 32) {
        const uint32_t n = r.n_tokens[run] - t < 32 ? r.n_tokens[run] - t : 32;
        for (int i = 0; i < 3; ++i) {
          const uint32_t blocks = static_cast<uint32_t>((r.n_channels[i] + 15) / 16);
          for (uint32_t w = 0; w < blocks * (16u << i); ++w) {
            const uint64_t x = rng.next();
            memcpy(tile + 8 * w, &x, 8);
          }
          tile += blocks * (128u << i);
        }
        for (uint32_t k = 0; k < n; ++k) {
          uint16_t v[2] = {
              half_bits(spread_v * (0.7 + 0.6 * rng.uniform()) * 3.4 / ((1 << widths[run]) - 1)),
              half_bits(rng.normal() * 0.3 * spread_v)};
          if (run < 3) memcpy(tile + 16 * (k & 7) + 4 * (k >> 3), v, 4);
        }
        tile += 128;
        const uint32_t bytes = static_cast<uint32_t>((v_dim + 15) / 16) * (128u << run);
        for (uint32_t w = 0; w < bytes / 8; ++w) {
          uint64_t x = rng.next();
          if (run == 3) {
            uint16_t f[4];
            for (int k = 0; k < 4; ++k) f[k] = half_bits(spread_v * rng.normal());
            memcpy(&x, f, 8);
          }
          memcpy(tile + 8 * w, &x, 8);
        }
        tile += bytes;
      }
  }
  header.body_sum = rdkv_checksum(block.data() + head_bytes, at - head_bytes, head_bytes / 8);
  memcpy(block.data(), &header, sizeof header);
  header.head_sum = rdkv_checksum(block.data(), head_bytes, 0);
  memcpy(block.data(), &header, sizeof header);
  return block;
}

/* K [n][k_dim] and V [n][v_dim] of one head, n returned; appended to k and v. */
inline uint32_t decode_block(const uint8_t *block, int layer, int kv_head, std::vector<double> &k,
                             std::vector<double> &v) {
  rdkv_header header;
  memcpy(&header, block, sizeof header);
  const uint32_t at = static_cast<uint32_t>(layer) - header.first_layer;
  if (at >= header.n_layers) return 0;
  rdkv_record r;
  memcpy(
      &r,
      block + sizeof header + sizeof r * (at * header.n_kv_heads + static_cast<uint32_t>(kv_head)),
      sizeof r);
  uint32_t padded = 0, total = 0;
  for (int i = 0; i < 3; ++i) padded += static_cast<uint32_t>((r.n_channels[i] + 15) / 16 * 16);
  const uint8_t *table = block + r.table;
  const uint8_t *mids = table + 2 * padded, *channels = mids + 2 * (padded + r.n_dropped);
  const uint8_t *tile = block + r.tile;
  const uint32_t kd = header.k_dim, vd = header.v_dim;
  for (int run = 0; run < 4; ++run)
    for (uint32_t t = 0; t < r.n_tokens[run]; t += 32) {
      const uint32_t n = r.n_tokens[run] - t < 32 ? r.n_tokens[run] - t : 32;
      const size_t k0 = k.size(), v0 = v.size();
      k.resize(k0 + n * kd), v.resize(v0 + n * vd);
      uint32_t slot = 0;
      for (int i = 0; i < 3; ++i) {
        for (uint32_t c = 0; c < r.n_channels[i]; ++c) {
          uint16_t s, m;
          memcpy(&s, table + 2 * (slot + c), 2), memcpy(&m, mids + 2 * (slot + c), 2);
          for (uint32_t j = 0; j < n; ++j)
            k[k0 + j * kd + channels[slot + c]] =
                half_value(m) +
                half_value(s) * (static_cast<double>(read_code(
                                     tile + (c / 16) * (128u << i), widths[i],
                                     key_place(static_cast<int>(j), static_cast<int>(c & 15)))) -
                                 (1 << (widths[i] - 1)));
        }
        slot += static_cast<uint32_t>(round_up(r.n_channels[i], 16));
        tile += static_cast<uint32_t>((r.n_channels[i] + 15) / 16) * (128u << i);
      }
      for (uint32_t c = 0; c < r.n_dropped; ++c) {
        uint16_t m;
        memcpy(&m, mids + 2 * (slot + c), 2);
        for (uint32_t j = 0; j < n; ++j) k[k0 + j * kd + channels[slot + c]] = half_value(m);
      }
      const uint8_t *params = tile;
      tile += 128;
      const uint32_t db = (vd + 15) / 16;
      for (uint32_t j = 0; j < n; ++j)
        for (uint32_t d = 0; d < vd; ++d) {
          const code_place p = value_place(static_cast<int>(j), static_cast<int>(d & 15));
          if (run == 3) {
            uint16_t h;
            memcpy(&h,
                   tile +
                       ((static_cast<uint32_t>(p.sub) * db + d / 16) * 32 +
                        static_cast<uint32_t>(4 * p.g + p.t)) *
                           16 +
                       (p.r + 2 * p.pr) * 4 + p.e * 2,
                   2);
            v[v0 + j * vd + d] = half_value(h);
          } else {
            uint16_t f[2];
            memcpy(f, params + 16 * (j & 7) + 4 * (j >> 3), 4);
            v[v0 + j * vd + d] =
                half_value(f[1]) +
                half_value(f[0]) * (static_cast<double>(read_code(tile + (d / 16) * (128u << run),
                                                                  widths[run], p)) -
                                    (1 << (widths[run] - 1)));
          }
        }
      tile += db * (128u << run);
      total += n;
    }
  return total;
}

#endif
