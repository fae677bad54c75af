/* problem.h - seeded layers of K, V and Q in any dtype and layout, with the buffers to compress
   them. */
#ifndef PROBLEM_H
#define PROBLEM_H

#include "test.h"

enum { MAX_LAYERS = 10 };

/* How the values of a tensor lie in memory; what lies between them is NaN. */
typedef enum layout {
  DENSE,        /* [token][head][dim] */
  HEADS_FIRST,  /* [head][token][dim] */
  PADDED,       /* [token][head][dim], a gap after each row and each token */
  EVERY_SECOND, /* [token][head][dim], dim_stride 2 */
  DIM_MAJOR,    /* [head][dim][token] */
  BACKWARDS,    /* [token][head][dim], the last token first */
  N_LAYOUTS
} layout;

/* Lays out x [n][heads][dim] in memory of its own, which *memory gets. */
static inline rdkv_tensor tensor_of(const float *x, size_t n, int heads, int dim, rdkv_dtype dtype,
                                    layout where, void **memory) {
  rdkv_tensor t;
  ptrdiff_t nn = (ptrdiff_t)n, first = 0, i, h, d;
  size_t count = n * (size_t)heads * (size_t)dim;
  memset(&t, 0, sizeof t);
  t.dtype = dtype;
  t.dim_stride = 1, t.head_stride = dim, t.token_stride = (ptrdiff_t)heads * dim;
  if (where == HEADS_FIRST) t.token_stride = dim, t.head_stride = nn * dim;
  if (where == PADDED) t.head_stride = dim + 3, t.token_stride = heads * (dim + 3) + 5;
  if (where == EVERY_SECOND) t.dim_stride = 2, t.head_stride *= 2, t.token_stride *= 2;
  if (where == DIM_MAJOR) t.token_stride = 1, t.dim_stride = nn, t.head_stride = nn * dim;
  if (where == BACKWARDS) first = (nn - 1) * t.token_stride, t.token_stride = -t.token_stride;
  if (where == PADDED) count = n * (size_t)(heads * (dim + 3) + 5);
  if (where == EVERY_SECOND) count *= 2;
  *memory = mem_new((count + 1) * dtype_bytes(dtype));
  for (i = 0; i < (ptrdiff_t)count; i++) put_value(*memory, dtype, i, NAN);
  for (i = 0; i < nn; i++)
    for (h = 0; h < heads; h++)
      for (d = 0; d < dim; d++)
        put_value(*memory, dtype, first + i * t.token_stride + h * t.head_stride + d * t.dim_stride,
                  x[(i * heads + h) * dim + d]);
  t.data = (const char *)*memory + (n ? (size_t)first * dtype_bytes(dtype) : 0);
  if (where == DENSE) t.dim_stride = 0; /* 0 means 1 */
  return t;
}

typedef struct problem {
  rdkv_config cfg; /* resolved */
  uint32_t n_tokens, n_queries;
  float *k[MAX_LAYERS], *v[MAX_LAYERS], *q[MAX_LAYERS]; /* the values, dense */
  void *raw[MAX_LAYERS][3];                             /* the same in dtype and layout */
  rdkv_kv kv[MAX_LAYERS];
  rdkv_layer layer[MAX_LAYERS];
  void *layer_memory[MAX_LAYERS];
  void *scratch, *allocate_scratch;
  size_t scratch_bytes, allocate_scratch_bytes;
  uint8_t *block;
  size_t block_bytes;
} problem;

static inline rdkv_config config_of(int n_q_heads, int n_kv_heads, int k_dim, int v_dim) {
  rdkv_config c;
  memset(&c, 0, sizeof c);
  c.n_q_heads = n_q_heads, c.n_kv_heads = n_kv_heads, c.k_dim = k_dim, c.v_dim = v_dim;
  return c;
}

static inline int group_of(const rdkv_config *c) { return c->n_q_heads / c->n_kv_heads; }

/* Channels of K differ in size and mean, a few tokens stand out: attention is neither flat nor one
   token alone. */
static inline void problem_values(problem *p, int layer, rdkv_dtype dtype, uint64_t seed) {
  const rdkv_config *c = &p->cfg;
  uint64_t rng = seed * 977u + (uint64_t)layer;
  size_t n = p->n_tokens, heads = (size_t)c->n_kv_heads, kd = (size_t)c->k_dim,
         vd = (size_t)c->v_dim;
  size_t hq = (size_t)c->n_q_heads, i, h, d;
  double size[256], mean[256], gain;
  float *k = p->k[layer] = new_floats(n * heads * kd),
        *v = p->v[layer] = new_floats(n * heads * vd);
  float *q = p->q[layer] = new_floats(p->n_queries * hq * kd);
  for (h = 0; h < heads; h++) {
    for (d = 0; d < kd; d++) {
      size[d] = exp(0.7 * rng_normal(&rng));
      mean[d] = rng_below(&rng, 8) ? 0.3 * rng_normal(&rng) : 3.0 * rng_normal(&rng);
    }
    for (i = 0; i < n; i++) {
      gain = rng_below(&rng, 32) ? 0.6 : 2.0;
      for (d = 0; d < kd; d++)
        k[(i * heads + h) * kd + d] =
            round_to(dtype, (float)(mean[d] + gain * size[d] * rng_normal(&rng)));
      gain = exp(0.4 * rng_normal(&rng));
      for (d = 0; d < vd; d++)
        v[(i * heads + h) * vd + d] = round_to(dtype, (float)(gain * (rng_normal(&rng) + 0.2)));
    }
  }
  for (i = 0; i < p->n_queries * hq * kd; i++)
    q[i] = round_to(dtype, (float)(1.2 * rng_normal(&rng)));
}

static inline void problem_tensors(problem *p, int layer, rdkv_dtype dtype, layout where) {
  const rdkv_config *c = &p->cfg;
  p->kv[layer].k =
      tensor_of(p->k[layer], p->n_tokens, c->n_kv_heads, c->k_dim, dtype, where, &p->raw[layer][0]);
  p->kv[layer].v =
      tensor_of(p->v[layer], p->n_tokens, c->n_kv_heads, c->v_dim, dtype, where, &p->raw[layer][1]);
  p->kv[layer].q =
      tensor_of(p->q[layer], p->n_queries, c->n_q_heads, c->k_dim, dtype, where, &p->raw[layer][2]);
}

/* Buffers of exactly the sizes that the queries say. */
static inline void problem_buffers(problem *p) {
  const rdkv_config *c = &p->cfg;
  size_t bytes = rdkv_layer_bytes(c, p->n_tokens);
  int l;
  for (l = 0; l < c->n_layers; l++) {
    p->layer_memory[l] = mem_new(bytes);
    CHECK_OK(rdkv_layer_init(c, p->n_tokens, p->layer_memory[l], bytes, &p->layer[l]));
  }
  p->scratch_bytes = rdkv_layer_scratch(c, p->n_tokens);
  p->scratch = mem_new(p->scratch_bytes);
  p->allocate_scratch_bytes = rdkv_allocate_scratch(c, c->n_layers, p->n_tokens);
  p->allocate_scratch = mem_new(p->allocate_scratch_bytes);
}

/* A problem of cfg's shape; ends the program if cfg is refused. */
static inline problem problem_make(const rdkv_config *cfg, uint32_t n_tokens, rdkv_dtype dtype,
                                   layout where, uint64_t seed) {
  problem p;
  int l;
  memset(&p, 0, sizeof p);
  if (!CHECK_OK(rdkv_resolve(cfg, &p.cfg)) || p.cfg.n_layers > MAX_LAYERS) exit(2);
  p.n_tokens = n_tokens;
  p.n_queries = n_tokens < (uint32_t)p.cfg.window ? n_tokens : (uint32_t)p.cfg.window;
  for (l = 0; l < p.cfg.n_layers; l++) {
    problem_values(&p, l, dtype, seed);
    problem_tensors(&p, l, dtype, where);
  }
  problem_buffers(&p);
  return p;
}

static inline void problem_free(problem *p) {
  int l, i;
  for (l = 0; l < MAX_LAYERS; l++) {
    mem_free(p->k[l]), mem_free(p->v[l]), mem_free(p->q[l]);
    for (i = 0; i < 3; i++) mem_free(p->raw[l][i]);
    mem_free(p->layer_memory[l]);
  }
  mem_free(p->scratch), mem_free(p->allocate_scratch), mem_free(p->block);
  memset(p, 0, sizeof *p);
}

static inline void problem_score(problem *p) {
  int l;
  for (l = 0; l < p->cfg.n_layers; l++) {
    CHECK_OK(rdkv_score(&p->cfg, &p->kv[l], &p->layer[l], p->scratch, p->scratch_bytes));
    CHECK_OK(rdkv_measure(&p->cfg, &p->kv[l], &p->layer[l], p->scratch, p->scratch_bytes));
  }
}

static inline rdkv_status problem_allocate(problem *p) {
  return rdkv_allocate(&p->cfg, p->layer, p->cfg.n_layers, p->allocate_scratch,
                       p->allocate_scratch_bytes);
}

/* Packs into a new block of exactly rdkv_block_bytes. */
static inline rdkv_status problem_pack(problem *p) {
  size_t capacity = rdkv_block_bytes(&p->cfg, p->layer, p->cfg.n_layers), bytes = 0;
  rdkv_status status;
  mem_free(p->block);
  p->block = (uint8_t *)mem_new(capacity);
  status = rdkv_pack(&p->cfg, p->kv, p->layer, p->cfg.n_layers, 0, 0, p->block, capacity, &bytes,
                     p->scratch, p->scratch_bytes);
  p->block_bytes = bytes;
  if (status == RDKV_OK) CHECK_EQ(bytes, capacity);
  return status;
}

/* Scores, allocates and packs; nothing may fail. */
static inline void problem_compress(problem *p) {
  problem_score(p);
  CHECK_OK(problem_allocate(p));
  CHECK_OK(problem_pack(p));
}

/* Random widths in place of allocated ones. mix is a set of bits: 1, 2, 4, 8, 16 for V of 0, 2, 4,
   8, 16 bits; 32, 64, 128, 256 for K of 0, 2, 4, 8 bits. */
static inline void problem_widths(problem *p, unsigned mix, uint64_t seed) {
  static const uint8_t bits[5] = {0, 2, 4, 8, 16};
  uint64_t rng = seed;
  size_t i, nv = (size_t)p->cfg.n_kv_heads * p->n_tokens;
  size_t nk = (size_t)p->cfg.n_kv_heads * (size_t)p->cfg.k_dim;
  int l;
  uint32_t w;
  for (l = 0; l < p->cfg.n_layers; l++) {
    for (i = 0; i < nv; i++) {
      do w = rng_below(&rng, 5);
      while (!((mix >> w) & 1u));
      p->layer[l].v_bits[i] = bits[w];
    }
    for (i = 0; i < nk; i++) {
      do w = rng_below(&rng, 4);
      while (!((mix >> (5 + w)) & 1u));
      p->layer[l].k_bits[i] = bits[w];
    }
  }
}

#define MIX_ALL 0x1ffu

static inline rdkv_segment problem_open(const problem *p) {
  rdkv_segment s;
  memset(&s, 0, sizeof s);
  CHECK_OK(rdkv_open(p->block, p->block_bytes, RDKV_VERIFY, &s));
  return s;
}

/* The instruction sets of this machine, for loops: isa = next_isa(isa) from RDKV_ISA_AUTO until it
   comes back. */
static inline rdkv_isa next_isa(rdkv_isa isa) {
  static const rdkv_isa all[] = {RDKV_ISA_SCALAR, RDKV_ISA_AVX2, RDKV_ISA_AVX512, RDKV_ISA_NEON};
  size_t i;
  for (i = 0; i < 4; i++)
    if (all[i] > isa && rdkv_isa_available(all[i])) return all[i];
  return RDKV_ISA_AUTO;
}

static inline const char *isa_name(rdkv_isa isa) {
  static const char *const names[] = {"auto", "scalar", "avx2", "avx512", "neon"};
  return names[isa];
}

#endif
