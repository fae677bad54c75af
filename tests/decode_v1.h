/* decode_v1.h - reads format version 1 byte by byte and bit by bit, written from the format's
   description alone: the second opinion on rdkv_pack and rdkv_unpack. */
#ifndef DECODE_V1_H
#define DECODE_V1_H

#include "test.h"

static inline uint64_t read_le(const uint8_t *p, int bytes) {
  uint64_t x = 0;
  while (bytes--) x = x << 8 | p[bytes];
  return x;
}

static inline float read_half(const uint8_t *p) { return from_half((uint16_t)read_le(p, 2)); }

/* One (layer, kv head) of a block. */
typedef struct v1_head {
  const uint8_t *block, *table, *position, *tile; /* position NULL if not stored */
  uint32_t k_dim, v_dim, v_blocks;
  uint32_t n[4], tiles[4];           /* tokens and tiles of the runs of 2, 4, 8, 16 V bits */
  uint32_t channels[3], k_blocks[3]; /* channels and blocks of the runs of 2, 4, 8 K bits */
  uint32_t dropped, padded_channels; /* padded: 16 times the blocks */
  size_t k_bytes, v_bytes[4], tile_bytes[4];
} v1_head;

static inline v1_head v1_read(const uint8_t *block, uint32_t layer, uint32_t kv_head) {
  static const size_t k_block_bytes[3] = {128, 256, 512}, v_block_bytes[4] = {128, 256, 512, 1024};
  v1_head h;
  const uint8_t *r = block + 256 + 64 * (layer * (size_t)read_le(block + 52, 4) + kv_head);
  int i;
  memset(&h, 0, sizeof h);
  h.block = block;
  h.k_dim = (uint32_t)read_le(block + 56, 4), h.v_dim = (uint32_t)read_le(block + 60, 4);
  h.v_blocks = (h.v_dim + 15) / 16;
  for (i = 0; i < 3; i++) {
    h.channels[i] = (uint32_t)read_le(r + 16 + 2 * i, 2);
    h.k_blocks[i] = (h.channels[i] + 15) / 16;
    h.padded_channels += 16 * h.k_blocks[i];
    h.k_bytes += h.k_blocks[i] * k_block_bytes[i];
  }
  h.dropped = (uint32_t)read_le(r + 22, 2);
  for (i = 0; i < 4; i++) {
    h.n[i] = (uint32_t)read_le(r + 4 * i, 4);
    h.tiles[i] = (h.n[i] + 31) / 32;
    h.v_bytes[i] = h.v_blocks * v_block_bytes[i];
    h.tile_bytes[i] = h.k_bytes + 128 + h.v_bytes[i];
  }
  h.table = block + read_le(r + 24, 8);
  h.position = read_le(r + 32, 8) ? block + read_le(r + 32, 8) : NULL;
  h.tile = block + read_le(r + 40, 8);
  return h;
}

/* The code of b bits of row `row` (0..31) and column `column` (0..15) of a block, by the meaning of
   rows and columns in K (is_k) and in V. For V of 16 bits the block is the whole V part of the
   tile. */
static inline uint32_t v1_code(const uint8_t *words, int b, int is_k, uint32_t token,
                               uint32_t column, uint32_t v_blocks, uint32_t v_block) {
  uint32_t sub, r, pr, e, g, t, lane, word, bit;
  sub = token / 16;
  if (is_k) { /* token 16 sub + 8 r + g, channel 4 t + 2 pr + e */
    r = token / 8 % 2, g = token % 8, t = column / 4, pr = column / 2 % 2, e = column % 2;
  } else { /* token 16 sub + 2 t + 8 pr + e, dim g + 8 r */
    pr = token / 8 % 2, t = token / 2 % 4, e = token % 2, g = column % 8, r = column / 8;
  }
  lane = 4 * g + t;
  if (b == 16)
    return (uint32_t)read_le(
        words + 4 * (((sub * v_blocks + v_block) * 32 + lane) * 4 + r + 2 * pr) + 2 * e, 2);
  word = b == 2 ? 0 : b == 4 ? sub : 2 * sub + pr;
  bit = b == 2   ? 2 * (2 * sub + pr) + 8 * r + 16 * e
        : b == 4 ? 4 * pr + 8 * r + 16 * e
                 : 8 * (2 * r + e);
  return (uint32_t)(read_le(words + 4 * (lane * (uint32_t)(b / 2) + word), 4) >> bit) &
         ((1u << b) - 1u);
}

/* What a head holds, in stored order, pads left out. */
typedef struct v1_values {
  uint32_t n;
  float *k, *v;                     /* [n][k_dim], [n][v_dim] */
  float *k_scale, *k_mid, *v_scale; /* [k_dim] (scale 0 if dropped), [n] (0 at 16 bits) */
  uint16_t *k_code, *v_code;        /* [n][k_dim], [n][v_dim] */
  uint8_t *k_bits, *v_bits;         /* [k_dim], [n] */
  uint32_t *position;               /* [n], or NULL */
} v1_values;

static inline v1_values v1_decode(const v1_head *h) {
  v1_values x;
  uint32_t run, i, j, c, kd = h->k_dim, vd = h->v_dim, n = 0, tile_index = 0, slot;
  size_t total;
  const uint8_t *scale = h->table, *mid = h->table + 2 * h->padded_channels;
  const uint8_t *channel = mid + 2 * (h->padded_channels + h->dropped), *tile = h->tile;
  memset(&x, 0, sizeof x);
  x.n = h->n[0] + h->n[1] + h->n[2] + h->n[3];
  total = x.n;
  x.k = new_floats(total * kd), x.v = new_floats(total * vd);
  x.k_scale = new_floats(kd), x.k_mid = new_floats(kd), x.v_scale = new_floats(total);
  x.k_code = (uint16_t *)mem_new(2 * total * kd), x.v_code = (uint16_t *)mem_new(2 * total * vd);
  x.k_bits = (uint8_t *)mem_new(kd), x.v_bits = (uint8_t *)mem_new(total);
  if (h->position) x.position = (uint32_t *)mem_new(4 * total);
  for (i = 0; i < h->dropped; i++) {
    c = channel[h->padded_channels + i];
    x.k_bits[c] = 0, x.k_scale[c] = 0.0f,
    x.k_mid[c] = read_half(mid + 2 * (h->padded_channels + i));
  }
  for (run = 0, slot = 0; run < 3; slot += 16 * h->k_blocks[run++])
    for (i = 0; i < h->channels[run]; i++) {
      c = channel[slot + i];
      x.k_bits[c] = (uint8_t)(2u << run);
      x.k_scale[c] = read_half(scale + 2 * (slot + i)),
      x.k_mid[c] = read_half(mid + 2 * (slot + i));
    }
  for (run = 0; run < 4; run++)
    for (i = 0; i < 32 * h->tiles[run]; i++) {
      const uint8_t *blocks = tile;
      const uint8_t *params = tile + h->k_bytes + 16 * (i % 8) + 4 * (i % 32 / 8),
                    *values = tile + h->k_bytes + 128;
      int b = 2 << run, kb;
      uint32_t k_run;
      if (i < h->n[run]) {
        for (c = 0; c < kd; c++)
          x.k[(size_t)n * kd + c] = x.k_mid[c], x.k_code[(size_t)n * kd + c] = 0;
        for (k_run = 0, slot = 0; k_run < 3; k_run++) {
          kb = 2 << k_run;
          for (j = 0; j < 16 * h->k_blocks[k_run]; j++) {
            if (j < h->channels[k_run]) {
              uint32_t code =
                  v1_code(blocks + 64u * (uint32_t)kb * (j / 16), kb, 1, i % 32, j % 16, 0, 0);
              c = channel[slot + j];
              x.k_code[(size_t)n * kd + c] = (uint16_t)code;
              x.k[(size_t)n * kd + c] += x.k_scale[c] * (float)((int)code - (1 << (kb - 1)));
            }
          }
          slot += 16 * h->k_blocks[k_run], blocks += 64u * (uint32_t)kb * h->k_blocks[k_run];
        }
        x.v_bits[n] = (uint8_t)b;
        x.v_scale[n] = b == 16 ? 0.0f : read_half(params);
        for (j = 0; j < vd; j++) {
          uint32_t code = v1_code(b == 16 ? values : values + 64u * (uint32_t)b * (j / 16), b, 0,
                                  i % 32, j % 16, h->v_blocks, j / 16);
          x.v_code[(size_t)n * vd + j] = (uint16_t)code;
          x.v[(size_t)n * vd + j] =
              b == 16
                  ? from_half((uint16_t)code)
                  : read_half(params + 2) + read_half(params) * (float)((int)code - (1 << (b - 1)));
        }
        if (x.position)
          x.position[n] = (uint32_t)read_le(h->position + 4 * (32 * tile_index + i % 32), 4);
        n++;
      }
      if (i % 32 == 31) tile += h->tile_bytes[run], tile_index++;
    }
  return x;
}

static inline void v1_free(v1_values *x) {
  mem_free(x->k), mem_free(x->v), mem_free(x->k_scale), mem_free(x->k_mid), mem_free(x->v_scale);
  mem_free(x->k_code), mem_free(x->v_code), mem_free(x->k_bits), mem_free(x->v_bits);
  mem_free(x->position);
}

#endif
