/* >>pack : format version 1 against an independent decoder, golden bytes, the quantiser's error,
   bad input. `test_pack --write` writes golden_v1/ anew (for a new format version alone). */
#include "decode_v1.h"
#include "problem.h"

/* ---- the block against the format's text ----------------------------------------------------- */

/* Words count from the block's start: first is that of p. */
static uint64_t ref_checksum(const uint8_t *p, size_t bytes, uint64_t first) {
  uint64_t sum = 0, i;
  for (i = 0; i * 8 < bytes; i++) {
    uint64_t z = read_le(p + 8 * i, bytes - 8 * i < 8 ? (int)(bytes - 8 * i) : 8);
    z += (first + i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    sum += z ^ (z >> 31);
  }
  return sum;
}

static void check_header(const problem *p, int first_layer, uint64_t token_begin) {
  const uint8_t *b = p->block;
  uint64_t head_bytes = read_le(b + 16, 8), head_sum = read_le(b + 24, 8), body_sum;
  uint8_t *copy = (uint8_t *)mem_new(p->block_bytes);
  size_t i;
  memcpy(copy, b, p->block_bytes);
  CHECK_EQ(sizeof(rdkv_header), 256), CHECK_EQ(sizeof(rdkv_record), 64);
  CHECK(memcmp(b, "RDKV", 4) == 0);
  CHECK_EQ(read_le(b + 4, 4), 1);
  CHECK_EQ(read_le(b + 8, 8), p->block_bytes);
  CHECK_EQ(read_le(b + 40, 4), first_layer), CHECK_EQ(read_le(b + 44, 4), p->cfg.n_layers);
  CHECK_EQ(read_le(b + 48, 4), p->cfg.n_q_heads), CHECK_EQ(read_le(b + 52, 4), p->cfg.n_kv_heads);
  CHECK_EQ(read_le(b + 56, 4), p->cfg.k_dim), CHECK_EQ(read_le(b + 60, 4), p->cfg.v_dim);
  CHECK_EQ(read_le(b + 64, 8), token_begin), CHECK_EQ(read_le(b + 72, 4), p->n_tokens);
  CHECK_EQ(read_le(b + 76, 4), p->cfg.positions);
  CHECK_EQ(read_le(b + 80, 4), p->cfg.profile), CHECK_EQ(read_le(b + 84, 4), p->cfg.scope);
  CHECK_EQ(read_le(b + 88, 4), p->cfg.window), CHECK_EQ(read_le(b + 92, 4), p->cfg.pool);
  for (i = 168; i < 256; i++) CHECK_EQ(b[i], 0);
  if (CHECK(head_bytes >= 256 && head_bytes <= p->block_bytes && head_bytes % 128 == 0)) {
    memset(copy + 24, 0, 8);
    CHECK(head_sum == ref_checksum(copy, (size_t)head_bytes, 0));
    body_sum = ref_checksum(b + head_bytes, p->block_bytes - (size_t)head_bytes, head_bytes / 8);
    CHECK(read_le(b + 32, 8) == body_sum);
    CHECK(rdkv_checksum(b + head_bytes, p->block_bytes - (size_t)head_bytes, head_bytes / 8) ==
          body_sum);
  }
  mem_free(copy);
}

/* The pads of a head are zero and its parts lie where they may. */
static void check_pads(const v1_head *h, size_t block_bytes) {
  const uint8_t *scale = h->table, *mid = scale + 2 * h->padded_channels;
  const uint8_t *channel = mid + 2 * (h->padded_channels + h->dropped), *tile = h->tile;
  uint32_t run, i, j, slot = 0, tile_index = 0;
  uint64_t tile_bytes = 0;
  for (run = 0; run < 4; run++) tile_bytes += (uint64_t)h->tiles[run] * h->tile_bytes[run];
  CHECK_EQ((h->table - h->block) % 128, 0);
  if (tile_bytes) CHECK_EQ((h->tile - h->block) % 128, 0);
  CHECK((uint64_t)(h->tile - h->block) + tile_bytes <= block_bytes);
  if (h->position) CHECK_EQ((h->position - h->block) % 128, 0);
  for (run = 0; run < 3; slot += 16 * h->k_blocks[run++])
    for (i = h->channels[run]; i < 16 * h->k_blocks[run]; i++) {
      CHECK_EQ(read_le(scale + 2 * (slot + i), 2), 0),
          CHECK_EQ(read_le(mid + 2 * (slot + i), 2), 0);
      CHECK_EQ(channel[slot + i], 0);
    }
  for (run = 0; run < 4; run++)
    for (i = 0; i < 32 * h->tiles[run]; i++) {
      const uint8_t *v = tile + h->k_bytes + 128;
      int b = 2 << run;
      if (i >= h->n[run]) {
        CHECK_EQ(read_le(v - 128 + 16 * (i % 8) + 4 * (i % 32 / 8), 4), 0);
        for (j = 0; j < 16 * h->v_blocks; j++)
          CHECK_EQ(v1_code(b == 16 ? v : v + 64u * (uint32_t)b * (j / 16), b, 0, i % 32, j % 16,
                           h->v_blocks, j / 16),
                   0);
        if (h->position)
          CHECK_EQ(read_le(h->position + 4 * (32 * tile_index + i % 32), 4), UINT32_MAX);
      }
      if (i % 32 == 31) tile += h->tile_bytes[run], tile_index++;
    }
}

/* Half a step: nothing saturates, whatever rounding scale and mid to halves does. */
static double step_error(float scale, float x) {
  return 0.5001 * (double)scale + 1e-6 * fabs((double)x);
}

/* Every kept token is there once at its width, every channel at its width, and the values are as
   near to the input as the widths allow (RDKV_JOINT). Needs positions. */
static void check_values(const problem *p, int layer, int head, const v1_values *x) {
  size_t n = p->n_tokens, kd = (size_t)p->cfg.k_dim, vd = (size_t)p->cfg.v_dim, i, d, kept = 0;
  size_t heads = (size_t)p->cfg.n_kv_heads, hh = (size_t)head;
  const uint8_t *v_bits = p->layer[layer].v_bits + hh * n,
                *k_bits = p->layer[layer].k_bits + hh * kd;
  uint8_t *seen = (uint8_t *)calloc(n + 1, 1);
  for (i = 0; i < n; i++) kept += v_bits[i] != 0;
  CHECK_EQ(x->n, kept);
  for (d = 0; d < kd; d++) CHECK_EQ(x->k_bits[d], k_bits[d] == 16 ? 8 : k_bits[d]);
  for (i = 0; i < x->n; i++) {
    uint32_t t = x->position[i];
    const float *v;
    if (!CHECK(t < n && !seen[t])) break;
    seen[t] = 1;
    CHECK_EQ(x->v_bits[i], v_bits[t]);
    v = p->v[layer] + (t * heads + hh) * vd;
    if (p->cfg.profile == RDKV_PAPER) continue;
    for (d = 0; d < vd; d++)
      if (x->v_bits[i] == 16)
        CHECK_EQ(x->v_code[i * vd + d], to_half(v[d]));
      else
        CHECK_LE(fabs((double)x->v[i * vd + d] - (double)v[d]), step_error(x->v_scale[i], v[d]));
  }
  for (d = 0; d < kd && p->cfg.profile == RDKV_JOINT && x->n; d++) {
    double lo = HUGE_VAL, hi = -HUGE_VAL, mean = 0.0;
    for (i = 0; i < x->n; i++) {
      double k = (double)p->k[layer][(x->position[i] * heads + hh) * kd + d];
      if (k < lo) lo = k;
      if (k > hi) hi = k;
      mean += k / x->n;
      if (x->k_bits[d])
        CHECK_LE(fabs((double)x->k[i * kd + d] - k), step_error(x->k_scale[d], (float)k));
    }
    if (x->k_bits[d]) { /* and the step is no wider than the range and the rounding ask for */
      double half = ldexp(1.0, x->k_bits[d] - 1);
      CHECK_LE((double)x->k_scale[d], (hi - lo) / (2 * half - 1) * 1.001 +
                                          fabs((double)x->k_mid[d]) * ldexp(1.0, -10) / (half - 1) +
                                          ldexp(1.0, -23));
    } else {
      CHECK_LE(fabs((double)x->k_mid[d] - mean), fabs(mean) * ldexp(1.0, -10) + 1e-6);
    }
  }
  free(seen);
}

/* rdkv_unpack says the same as the decoder. */
static void check_unpack(const problem *p, const rdkv_segment *s, int layer, int head,
                         const v1_values *x) {
  size_t kd = (size_t)p->cfg.k_dim, vd = (size_t)p->cfg.v_dim, i, bad = 0;
  uint32_t n = 99, *position = (uint32_t *)mem_new(4 * (size_t)x->n);
  float *k = new_floats(x->n * kd), *v = new_floats(x->n * vd);
  CHECK_OK(rdkv_unpack(s, layer, head, NULL, NULL, NULL, &n));
  CHECK_EQ(n, x->n);
  if (n == x->n) {
    CHECK_OK(rdkv_unpack(s, layer, head, k, v, x->position ? position : NULL, &n));
    for (i = 0; i < x->n * kd; i++) {
      double size = fabs((double)x->k_mid[i % kd]) + 128.0 * fabs((double)x->k_scale[i % kd]);
      bad += !(fabs((double)k[i] - (double)x->k[i]) <= 1e-6 * size);
    }
    CHECK_EQ(bad, 0);
    for (bad = 0, i = 0; i < x->n * vd; i++)
      bad += !(fabs((double)v[i] - (double)x->v[i]) <=
               1e-6 * fabs((double)x->v[i]) + 1e-4 * (double)x->v_scale[i / vd]);
    CHECK_EQ(bad, 0);
    if (x->position) CHECK(memcmp(position, x->position, 4 * (size_t)n) == 0);
  }
  mem_free(position), mem_free(k), mem_free(v);
}

static void check_block(const problem *p) {
  rdkv_segment s = problem_open(p);
  int l, h;
  check_header(p, 0, 0);
  for (l = 0; l < p->cfg.n_layers; l++)
    for (h = 0; h < p->cfg.n_kv_heads; h++) {
      v1_head head = v1_read(p->block, (uint32_t)l, (uint32_t)h);
      v1_values x = v1_decode(&head);
      check_pads(&head, p->block_bytes);
      if (x.position) check_values(p, l, h, &x);
      check_unpack(p, &s, l, h, &x);
      v1_free(&x);
    }
}

static void pack_case(const rdkv_config *c, uint32_t n, unsigned mix, uint64_t seed) {
  problem p = problem_make(c, n, RDKV_F32, DENSE, seed);
  test_where("T %u, dims %d/%d, mix %x, profile %d", n, p.cfg.k_dim, p.cfg.v_dim, mix,
             p.cfg.profile);
  problem_widths(&p, mix, seed);
  if (CHECK_OK(problem_pack(&p))) check_block(&p);
  problem_free(&p);
}

static void width_mixes(void) {
  unsigned v, k;
  for (v = 1; v < 32; v++)
    for (k = 1; k < 16; k++) {
      rdkv_config c = config_of(2, 2, 40, 24);
      c.positions = 1;
      pack_case(&c, 75, v | k << 5, v * 16 + k);
    }
}

static void shapes(void) {
  static const uint32_t tokens[] = {0, 1, 2, 31, 32, 33, 160};
  static const int dims[] = {1, 8, 48, 80, 96, 112, 256};
  size_t i, j;
  for (i = 0; i < 7; i++)
    for (j = 0; j < 7; j++) {
      rdkv_config c = config_of(2, 1, dims[j], dims[(i + j) % 7]);
      c.positions = j % 2, c.n_layers = 1 + (int)(i % 3);
      pack_case(&c, tokens[i], MIX_ALL, 1000 + i * 7 + j);
      c.profile = RDKV_PAPER;
      pack_case(&c, tokens[i], MIX_ALL, 1000 + i * 7 + j);
    }
}

/* Many channels and none dropped: with pads there are more columns than channels. */
static void widest_rows(void) {
  int i;
  for (i = 0; i < 6; i++) {
    rdkv_config c = config_of(2, 1, 256 - 5 * (i / 2), 256 - i);
    c.positions = 1, c.profile = i % 2 ? RDKV_PAPER : RDKV_JOINT;
    pack_case(&c, 70, MIX_ALL & ~(1u | 32u), 2000u + (uint64_t)i);
  }
}

/* The bytes come from the values alone, not from how they lie in memory. */
static void layouts(void) {
  static const rdkv_dtype dtypes[] = {RDKV_F32, RDKV_F16, RDKV_BF16};
  int i, where;
  for (i = 0; i < 3; i++) {
    rdkv_config c = config_of(2, 2, 72, 40);
    problem first = problem_make(&c, 77, RDKV_BF16, DENSE, 5); /* values that all three can hold */
    problem_widths(&first, MIX_ALL, 5);
    CHECK_OK(problem_pack(&first));
    for (where = 0; where < N_LAYOUTS; where++) {
      problem p = problem_make(&c, 77, RDKV_BF16, DENSE, 5);
      mem_free(p.raw[0][0]), mem_free(p.raw[0][1]), mem_free(p.raw[0][2]);
      problem_tensors(&p, 0, dtypes[i], (layout)where);
      test_where("dtype %d, layout %d", dtypes[i], where);
      problem_widths(&p, MIX_ALL, 5);
      CHECK_OK(problem_pack(&p));
      CHECK(p.block_bytes == first.block_bytes && memcmp(p.block, first.block, p.block_bytes) == 0);
      problem_free(&p);
    }
    problem_free(&first);
  }
}

/* first_layer and token_begin are carried; layers packed apart hold what they hold together. */
static void layers_apart(void) {
  rdkv_config c = config_of(4, 2, 64, 0);
  problem p;
  uint8_t *block;
  size_t bytes = 0, need;
  int l, h;
  c.n_layers = 3, c.positions = 1;
  p = problem_make(&c, 100, RDKV_F16, DENSE, 6);
  problem_widths(&p, MIX_ALL, 6);
  CHECK_OK(problem_pack(&p));
  for (l = 0; l < 3; l++) {
    rdkv_segment s;
    need = rdkv_block_bytes(&p.cfg, &p.layer[l], 1);
    block = (uint8_t *)mem_new(need);
    CHECK_OK(rdkv_pack(&p.cfg, &p.kv[l], &p.layer[l], 1, 10 + l, 5000000000u, block, need, &bytes,
                       p.scratch, p.scratch_bytes));
    CHECK_EQ(bytes, need);
    CHECK_OK(rdkv_open(block, bytes, RDKV_VERIFY, &s));
    CHECK_EQ(s.header->first_layer, 10 + l), CHECK_EQ(s.header->n_layers, 1);
    CHECK_EQ(s.header->token_begin, 5000000000u);
    for (h = 0; h < 2; h++) {
      v1_head together = v1_read(p.block, (uint32_t)l, (uint32_t)h),
              apart = v1_read(block, 0, (uint32_t)h);
      v1_values a = v1_decode(&together), b = v1_decode(&apart);
      CHECK(a.n == b.n && memcmp(a.k, b.k, a.n * 64 * sizeof(float)) == 0);
      CHECK(a.n == b.n && memcmp(a.v, b.v, a.n * 64 * sizeof(float)) == 0);
      v1_free(&a), v1_free(&b);
    }
    mem_free(block);
  }
  problem_free(&p);
}

/* Values at the ends of what halves hold, constants, and ranges far from zero. */
static void extreme_values(void) {
  static const float lows[] = {0.0f,     3.0f,   -2.5f, 5.0f,   -65504.0f,
                               65000.0f, -1e-6f, 1e-7f, 1000.0f};
  static const float highs[] = {0.0f, 3.0f, -2.5f, 6.0f, 65504.0f, 65504.0f, 1e-6f, 1e-7f, 1000.5f};
  static const unsigned widths[] = {2 | 64, 4 | 128, 8 | 256};
  size_t i, j, r, w;
  for (r = 0; r < 9; r++)
    for (w = 0; w < 3; w++) {
      rdkv_config c = config_of(1, 1, 16, 16);
      problem p;
      uint64_t rng = 8;
      c.positions = 1;
      p = problem_make(&c, 40, RDKV_F32, DENSE, 8);
      for (i = 0; i < 40; i++)
        for (j = 0; j < 16; j++) {
          p.k[0][i * 16 + j] = p.v[0][i * 16 + j] =
              (float)((double)lows[r] + ((double)highs[r] - (double)lows[r]) * rng_uniform(&rng));
          if (i == j) p.k[0][i * 16 + j] = p.v[0][i * 16 + j] = highs[r];
          if (i == j + 1) p.k[0][i * 16 + j] = p.v[0][i * 16 + j] = lows[r];
        }
      mem_free(p.raw[0][0]), mem_free(p.raw[0][1]), mem_free(p.raw[0][2]);
      problem_tensors(&p, 0, RDKV_F32, DENSE);
      test_where("range [%g, %g], %d bits", (double)lows[r], (double)highs[r], 2 << w);
      problem_widths(&p, widths[w], 1);
      if (CHECK_OK(problem_pack(&p))) check_block(&p);
      problem_free(&p);
    }
}

/* ---- golden bytes of version 1 --------------------------------------------------------------- */

static const char *golden_dir = "golden_v1";
enum { N_GOLDEN = 6 };

/* The golden problems are made with integer arithmetic, so that they are the same everywhere. */
static problem golden_problem(int i) {
  static const int k_dims[] = {48, 1, 80, 256, 33, 256}, v_dims[] = {48, 1, 112, 33, 8, 16};
  static const uint32_t tokens[] = {150, 1, 97, 70, 0, 9};
  rdkv_config c = config_of(6, 2, k_dims[i], v_dims[i]);
  problem p;
  uint64_t rng = 123u + (uint64_t)i;
  size_t j, h;
  int l;
  c.positions = i != 3, c.n_layers = i == 0 ? 2 : 1;
  if (i == 2) c.profile = RDKV_PAPER;
  c.keep = 0.25;
  p = problem_make(&c, tokens[i], RDKV_F32, DENSE, 1);
  for (l = 0; l < c.n_layers; l++) {
    for (h = 0; h < 2; h++) {
      float *x = h ? p.v[l] : p.k[l];
      for (j = 0; j < p.n_tokens * 2u * (size_t)(h ? v_dims[i] : k_dims[i]); j++)
        x[j] = (float)((int)rng_below(&rng, 4001) - 2000) / 512.0f + (float)((int)(j % 5) - 2);
    }
    for (j = 0; j < 3; j++) mem_free(p.raw[l][j]);
    problem_tensors(&p, l, RDKV_F32, DENSE);
  }
  /* the last: V of 2 bits alone, no channel dropped, so more columns than channels */
  problem_widths(&p, i == 5 ? 2 | 64 | 128 | 256 : MIX_ALL, 77u + (uint64_t)i);
  if (i == 2) /* the profile's own word for the widest K */
    for (j = 0; j < 160; j++)
      if (p.layer[0].k_bits[j] == 8 && j % 2) p.layer[0].k_bits[j] = 16;
  return p;
}

static void write_golden_bytes(void) {
  int i;
  for (i = 0; i < N_GOLDEN; i++) {
    problem p = golden_problem(i);
    char path[64];
    FILE *f;
    snprintf(path, sizeof path, "%s/%d.rdkv", golden_dir, i);
    CHECK_OK(problem_pack(&p));
    f = fopen(path, "wb");
    if (CHECK(f != NULL)) {
      CHECK_EQ(fwrite(p.block, 1, p.block_bytes, f), p.block_bytes);
      fclose(f);
    }
    problem_free(&p);
  }
}

static void golden_bytes(void) {
  rdkv_isa isa;
  int i, h;
  for (i = 0; i < N_GOLDEN; i++) {
    problem p = golden_problem(i);
    size_t room = 1 << 20, bytes;
    uint8_t *want = (uint8_t *)mem_new(room);
    char path[64];
    FILE *f;
    rdkv_segment s;
    snprintf(path, sizeof path, "%s/%d.rdkv", golden_dir, i);
    f = fopen(path, "rb");
    if (!CHECK(f != NULL && "run in the tests folder")) exit(2);
    bytes = fread(want, 1, room, f);
    fclose(f);
    for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      size_t j, bad = 0;
      test_where("%s, isa %s", path, isa_name(isa));
      p.cfg.isa = isa;
      CHECK_OK(problem_pack(&p));
      CHECK_EQ(p.block_bytes, bytes);
      for (j = 0; j < bytes && p.block_bytes == bytes; j++)
        if (p.block[j] != want[j] && !bad++) printf("first difference at byte %u\n", (unsigned)j);
      CHECK_EQ(bad, 0);
    }
    /* what version 1 wrote stays readable */
    CHECK_OK(rdkv_open(want, bytes, RDKV_VERIFY, &s));
    for (h = 0; h < 2; h++) {
      v1_head head = v1_read(want, 0, (uint32_t)h);
      v1_values x = v1_decode(&head);
      check_unpack(&p, &s, 0, h, &x);
      v1_free(&x);
    }
    mem_free(want);
    problem_free(&p);
  }
}

/* ---- bad input ------------------------------------------------------------------------------- */

typedef struct pack_args {
  const rdkv_config *cfg;
  const rdkv_kv *kv;
  const rdkv_layer *layers;
  int n_layers, first_layer;
  void *block;
  size_t capacity, *bytes;
  void *scratch;
  size_t scratch_bytes;
} pack_args;

static rdkv_status pack(const pack_args *a) {
  return rdkv_pack(a->cfg, a->kv, a->layers, a->n_layers, a->first_layer, 0, a->block, a->capacity,
                   a->bytes, a->scratch, a->scratch_bytes);
}

#define WRONG(field, value, status) (a = good, a.field = (value), CHECK_STATUS(pack(&a), status))

static void bad_arguments(void) {
  rdkv_config c = config_of(4, 2, 32, 0), other;
  problem p = problem_make(&c, 50, RDKV_F32, DENSE, 9);
  size_t need, bytes = 77, i;
  uint8_t *block, old;
  pack_args good, a;
  problem_widths(&p, MIX_ALL, 9);
  need = rdkv_block_bytes(&p.cfg, p.layer, 1);
  block = (uint8_t *)mem_new(need + 128);
  good.cfg = &p.cfg, good.kv = p.kv, good.layers = p.layer, good.n_layers = 1, good.first_layer = 0;
  good.block = block, good.capacity = need, good.bytes = &bytes;
  good.scratch = p.scratch, good.scratch_bytes = p.scratch_bytes;
  WRONG(cfg, NULL, RDKV_ERR_ARGUMENT), WRONG(kv, NULL, RDKV_ERR_ARGUMENT);
  WRONG(layers, NULL, RDKV_ERR_ARGUMENT), WRONG(n_layers, -1, RDKV_ERR_ARGUMENT);
  WRONG(first_layer, -1, RDKV_ERR_ARGUMENT), WRONG(block, NULL, RDKV_ERR_ARGUMENT);
  WRONG(bytes, NULL, RDKV_ERR_ARGUMENT), WRONG(scratch, NULL, RDKV_ERR_ARGUMENT);
  WRONG(capacity, need - 1, RDKV_ERR_MEMORY), WRONG(capacity, 0, RDKV_ERR_MEMORY);
  WRONG(scratch_bytes, p.scratch_bytes - 1, RDKV_ERR_MEMORY);
  WRONG(block, block + 64, RDKV_ERR_ALIGNMENT), WRONG(block, block + 1, RDKV_ERR_ALIGNMENT);
  WRONG(scratch, (char *)p.scratch + 4, RDKV_ERR_ALIGNMENT);
  good.capacity = need + 128;
  for (i = 0; i < 256; i++) {
    int v_legal = i == 0 || i == 2 || i == 4 || i == 8 || i == 16,
        k_legal = i == 0 || i == 2 || i == 4 || i == 8;
    test_where("width %d", (int)i);
    old = p.layer[0].v_bits[99], p.layer[0].v_bits[99] = (uint8_t)i;
    if (!v_legal) CHECK_STATUS(pack(&good), RDKV_ERR_CONFIG);
    p.layer[0].v_bits[99] = old;
    old = p.layer[0].k_bits[63], p.layer[0].k_bits[63] = (uint8_t)i;
    if (!k_legal && i != 16) CHECK_STATUS(pack(&good), RDKV_ERR_CONFIG);
    p.layer[0].k_bits[63] = old;
  }
  for (i = 0; i < 6; i++) { /* in the first, the last and a middle token, in K and in V */
    float *x = i < 3 ? p.k[0] : p.v[0], *raw = (float *)p.raw[0][i < 3 ? 0 : 1];
    size_t token = i % 3 == 0 ? 0 : i % 3 == 1 ? 49 : 20;
    size_t head = token == 20 ? 0 : 1, at = (token * 2 + head) * 32 + (i % 3) * 15;
    old = p.layer[0].v_bits[head * 50 + token];
    if (old == 0) continue; /* what is dropped need not be looked at */
    test_where("NaN in %s of token %d", i < 3 ? "K" : "V", (int)token);
    raw[at] = i % 2 ? INFINITY : NAN;
    CHECK_STATUS(pack(&good), RDKV_ERR_NONFINITE);
    raw[at] = 66000.0f;
    CHECK_STATUS(pack(&good), RDKV_ERR_NONFINITE);
    raw[at] = x[at];
  }
  CHECK(mem_untouched(block, need + 128));
  CHECK_EQ(bytes, 77);
  CHECK_OK(pack(&good));
  CHECK_EQ(bytes, need);

  other = p.cfg; /* more than 2^64 bytes */
  other.k_dim = other.v_dim = 256, other.n_q_heads = other.n_kv_heads = other.n_layers = 65535;
  CHECK_OK(rdkv_resolve(&other, &other));
  other.keep = 1.0;
  CHECK_EQ(rdkv_block_bound(&other, UINT32_MAX), 0);
  CHECK_EQ(rdkv_compress_scratch(&other, UINT32_MAX), 0);
  mem_free(block);
  problem_free(&p);
}

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "--write") == 0) {
    RUN(write_golden_bytes);
    return test_done();
  }
  RUN(golden_bytes);
  RUN(width_mixes);
  RUN(shapes);
  RUN(widest_rows);
  RUN(layouts);
  RUN(layers_apart);
  RUN(extreme_values);
  RUN(bad_arguments);
  return test_done();
}
