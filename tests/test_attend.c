/* >>attend : against fp64 attention over the unpacked cache, for every width mix, shape and
   instruction set, with several segments and tails of each dtype. */
#include "problem.h"

/* What a layer's cache holds, as dense floats by kv head: segments first, then the tail. */
typedef struct dense {
  float *k, *v;
  size_t n;
} dense;

static dense gather(const rdkv_config *c, const rdkv_segment *segments, int n_segments, int layer,
                    int head, const float *tail_k, const float *tail_v, uint32_t n_tail) {
  dense x;
  size_t kd = (size_t)c->k_dim, vd = (size_t)c->v_dim, heads = (size_t)c->n_kv_heads, t,
         total = n_tail;
  uint32_t n;
  int i;
  for (i = 0; i < n_segments; i++) {
    CHECK_OK(rdkv_unpack(&segments[i], layer, head, NULL, NULL, NULL, &n));
    total += n;
  }
  x.k = new_floats(total * kd), x.v = new_floats(total * vd), x.n = 0;
  for (i = 0; i < n_segments; i++) {
    CHECK_OK(rdkv_unpack(&segments[i], layer, head, x.k + x.n * kd, x.v + x.n * vd, NULL, &n));
    x.n += n;
  }
  for (t = 0; t < n_tail; t++, x.n++) {
    memcpy(x.k + x.n * kd, tail_k + (t * heads + (size_t)head) * kd, kd * sizeof(float));
    memcpy(x.v + x.n * vd, tail_v + (t * heads + (size_t)head) * vd, vd * sizeof(float));
  }
  return x;
}

/* A cache with all that it needs: some segments of random widths and a tail. */
typedef struct setup {
  problem p[3];
  rdkv_segment segments[3];
  int n_segments;
  float *tail_k, *tail_v; /* as the tail holds them */
  uint32_t n_tail;
  void *tail_memory;
  rdkv_tail tail;
  rdkv_cache cache;
  float *q, *out, *lse;
  void *scratch;
  size_t scratch_bytes;
} setup;

static setup *setup_make(const rdkv_config *cfg, const uint32_t *tokens, int n_segments,
                         unsigned mix, uint32_t n_tail, rdkv_dtype tail_dtype, uint64_t seed) {
  setup *s = (setup *)calloc(1, sizeof *s);
  const rdkv_config *c;
  uint64_t rng = seed;
  size_t i, nk, nv;
  int j;
  for (j = 0; j < (n_segments ? n_segments : 1); j++) {
    s->p[j] = problem_make(cfg, n_segments ? tokens[j] : 0, RDKV_F32, DENSE, seed + (uint64_t)j);
    problem_widths(&s->p[j], mix, seed + (uint64_t)j);
    CHECK_OK(problem_pack(&s->p[j]));
    if (n_segments) s->segments[j] = problem_open(&s->p[j]);
  }
  c = &s->p[0].cfg;
  s->n_segments = n_segments, s->n_tail = n_tail;
  nk = (size_t)n_tail * (size_t)(c->n_kv_heads * c->k_dim),
  nv = (size_t)n_tail * (size_t)(c->n_kv_heads * c->v_dim);
  s->tail_k = new_floats(nk), s->tail_v = new_floats(nv);
  for (i = 0; i < nk; i++) s->tail_k[i] = (float)rng_normal(&rng);
  for (i = 0; i < nv; i++) s->tail_v[i] = (float)rng_normal(&rng);
  s->tail_memory = mem_new(rdkv_tail_bytes(c, n_tail + 3, tail_dtype));
  CHECK_OK(rdkv_tail_init(c, n_tail + 3, tail_dtype, s->tail_memory,
                          rdkv_tail_bytes(c, n_tail + 3, tail_dtype), &s->tail));
  CHECK_OK(rdkv_tail_append(&s->tail, 0, rdkv_dense(s->tail_k, RDKV_F32, c->n_kv_heads, c->k_dim),
                            rdkv_dense(s->tail_v, RDKV_F32, c->n_kv_heads, c->v_dim), n_tail));
  for (i = 0; i < nk; i++) s->tail_k[i] = round_to(tail_dtype, s->tail_k[i]);
  for (i = 0; i < nv; i++) s->tail_v[i] = round_to(tail_dtype, s->tail_v[i]);
  s->cache.segments = n_segments ? s->segments : NULL, s->cache.n_segments = n_segments;
  s->cache.tail = n_tail ? &s->tail : NULL, s->cache.isa = c->isa;
  s->q = new_floats((size_t)(c->n_q_heads * c->k_dim));
  for (i = 0; i < (size_t)(c->n_q_heads * c->k_dim); i++) s->q[i] = (float)(1.2 * rng_normal(&rng));
  s->out = new_floats((size_t)(c->n_q_heads * c->v_dim)), s->lse = new_floats((size_t)c->n_q_heads);
  s->scratch_bytes = rdkv_attend_scratch(c), s->scratch = mem_new(s->scratch_bytes);
  return s;
}

static void setup_free(setup *s) {
  int i;
  for (i = 0; i < 3; i++) problem_free(&s->p[i]);
  mem_free(s->tail_k), mem_free(s->tail_v), mem_free(s->tail_memory);
  mem_free(s->q), mem_free(s->out), mem_free(s->lse), mem_free(s->scratch);
  free(s);
}

static rdkv_status attend(setup *s) {
  return rdkv_attend(&s->p[0].cfg, &s->cache, 0, s->q, s->out, s->lse, s->scratch,
                     s->scratch_bytes);
}

static double worst_seen; /* relative L2, printed at the end */

/* Out and lse of every query head are fp64's within the tolerances. */
static void compare_with_fp64(const setup *s, double tolerance, double lse_tolerance) {
  const rdkv_config *c = &s->p[0].cfg;
  int h, g, group = group_of(c);
  double want[256], lse, error;
  for (h = 0; h < c->n_kv_heads; h++) {
    dense x = gather(c, s->segments, s->n_segments, 0, h, s->tail_k, s->tail_v, s->n_tail);
    for (g = h * group; g < (h + 1) * group; g++) {
      lse = ref_attend(s->q + g * c->k_dim, x.k, x.v, x.n, c->k_dim, c->v_dim,
                       (double)c->softmax_scale, want);
      error = relative_l2(s->out + g * c->v_dim, want, (size_t)c->v_dim);
      if (error > worst_seen && tolerance < 1.1e-5) worst_seen = error;
      CHECK_LE(error, tolerance);
      if (x.n)
        CHECK_LE(fabs((double)s->lse[g] - lse), lse_tolerance * (1.0 + fabs(lse)));
      else
        CHECK(memcmp(&s->lse[g], "\x00\x00\x80\xff", 4) == 0 && "-Inf");
    }
    mem_free(x.k), mem_free(x.v);
  }
}

static void attend_case(const rdkv_config *cfg, const uint32_t *tokens, int n_segments,
                        unsigned mix, uint32_t n_tail, rdkv_dtype tail_dtype, uint64_t seed) {
  setup *s = setup_make(cfg, tokens, n_segments, mix, n_tail, tail_dtype, seed);
  rdkv_isa isa;
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
    test_where("T %u, %d segments, heads %d/%d, dims %d/%d, mix %x, tail %u of dtype %d, isa %s",
               n_segments ? tokens[0] : 0, n_segments, s->p[0].cfg.n_q_heads,
               s->p[0].cfg.n_kv_heads, s->p[0].cfg.k_dim, s->p[0].cfg.v_dim, mix, n_tail,
               tail_dtype, isa_name(isa));
    s->cache.isa = s->tail.isa = isa;
    CHECK_OK(attend(s));
    compare_with_fp64(s, 1e-5, 1e-5);
  }
  setup_free(s);
}

static void width_mixes(void) {
  static const uint32_t tokens[] = {140};
  unsigned v, k;
  for (v = 1; v < 32; v++)
    for (k = 1; k < 16; k++) {
      rdkv_config c = config_of(4, 1, 64, 48);
      attend_case(&c, tokens, 1, v | k << 5, v % 3, RDKV_F16, 16 * v + k);
    }
}

static void shapes(void) {
  static const uint32_t tokens[] = {0, 1, 2, 31, 32, 33, 500};
  static const int dims[] = {1, 8, 48, 80, 96, 112, 128, 256}, groups[] = {1, 2, 3, 4, 5, 7, 8, 16};
  int i, j;
  for (i = 0; i < 8; i++)
    for (j = 0; j < 8; j++) {
      rdkv_config c = config_of(groups[i] * (j % 2 + 1), j % 2 + 1, dims[j], dims[(i + j) % 8]);
      attend_case(&c, &tokens[(i + j) % 7], 1, MIX_ALL, 0, RDKV_F16, (uint64_t)(100 + i * 8 + j));
    }
}

static void segments_and_tails(void) {
  static const uint32_t tokens[3] = {65, 0, 33};
  static const rdkv_dtype dtypes[] = {RDKV_F32, RDKV_F16, RDKV_BF16};
  static const uint32_t tails[] = {0, 1, 7, 32, 100};
  int i, j, n;
  for (i = 0; i < 3; i++)
    for (j = 0; j < 5; j++)
      for (n = 0; n < 4; n++) {
        rdkv_config c = config_of(10, 2, 80, 40);
        c.profile = n == 2 ? RDKV_PAPER : RDKV_JOINT;
        attend_case(&c, tokens, n, MIX_ALL, tails[j], dtypes[i],
                    (uint64_t)(300 + i * 20 + j * 4 + n));
      }
}

/* One head at a time, in place, and without lse: the same bits. */
static void ways_to_call(void) {
  static const uint32_t tokens[] = {150, 40};
  rdkv_isa isa;
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
    rdkv_config c = config_of(15, 3, 48, 48);
    setup *s = setup_make(&c, tokens, 2, MIX_ALL, 20, RDKV_F16, 9);
    float out[5 * 48], lse[5], *both = new_floats(15 * 48);
    int h;
    test_where("isa %s", isa_name(isa));
    s->cache.isa = s->tail.isa = isa;
    CHECK_OK(attend(s));
    for (h = 0; h < 3; h++) {
      CHECK_OK(rdkv_attend_head(&s->p[0].cfg, &s->cache, 0, h, s->q + h * 5 * 48, out, lse,
                                s->scratch, s->scratch_bytes));
      CHECK(memcmp(out, s->out + h * 5 * 48, sizeof out) == 0);
      CHECK(memcmp(lse, s->lse + h * 5, sizeof lse) == 0);
    }
    memcpy(both, s->q, 15 * 48 * sizeof(float));
    CHECK_OK(
        rdkv_attend(&s->p[0].cfg, &s->cache, 0, both, both, NULL, s->scratch, s->scratch_bytes));
    CHECK(memcmp(both, s->out, 15 * 48 * sizeof(float)) == 0);
    mem_free(both);
    setup_free(s);
  }
}

/* out aliases q where the rows of out are longer or shorter than those of q. */
static void in_place_with_other_dims(void) {
  static const uint32_t tokens[] = {90};
  int i;
  for (i = 0; i < 2; i++) {
    rdkv_config c = config_of(6, 3, i ? 16 : 80, i ? 80 : 16);
    setup *s = setup_make(&c, tokens, 1, MIX_ALL, 5, RDKV_F32, 10);
    float *both = new_floats(6 * 80);
    CHECK_OK(attend(s));
    memcpy(both, s->q, (size_t)(6 * s->p[0].cfg.k_dim) * sizeof(float));
    CHECK_OK(
        rdkv_attend(&s->p[0].cfg, &s->cache, 0, both, both, NULL, s->scratch, s->scratch_bytes));
    test_where("dims %d/%d", s->p[0].cfg.k_dim, s->p[0].cfg.v_dim);
    CHECK(memcmp(both, s->out, (size_t)(6 * s->p[0].cfg.v_dim) * sizeof(float)) == 0);
    mem_free(both);
    setup_free(s);
  }
}

static void large_logits(void) {
  static const uint32_t tokens[] = {200};
  static const float scales[] = {3.0f, -3.0f, 1e-5f, 1000.0f};
  size_t i;
  rdkv_isa isa;
  for (i = 0; i < 4; i++)
    for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      rdkv_config c = config_of(4, 2, 64, 0);
      setup *s;
      int j, finite = 1;
      c.softmax_scale = scales[i] < 0 ? -scales[i] : scales[i];
      s = setup_make(&c, tokens, 1, MIX_ALL & ~1u, 9, RDKV_F32, 20 + i);
      if (scales[i] < 0) /* nearly all weights underflow, all logits far below zero */
        for (j = 0; j < 4 * 64; j++) s->q[j] *= -2.0f;
      test_where("softmax_scale %g, isa %s", (double)scales[i], isa_name(isa));
      s->cache.isa = s->tail.isa = isa;
      CHECK_OK(attend(s));
      if (i <
          3) { /* a logit of some hundreds is rounded to 1e-7 of itself: its weight errs by 1e-4 */
        compare_with_fp64(s, i == 2 ? 1e-5 : 1e-3, 1e-5);
      } else { /* logits of 10^4 and more: at least no overflow, and the winner wins */
        for (j = 0; j < 4 * 64; j++) finite &= fabsf(s->out[j]) < 1e4f;
        CHECK(finite);
        compare_with_fp64(s, 0.05, 1e-5);
      }
      setup_free(s);
    }
}

static void nothing_to_attend_to(void) {
  static const uint32_t tokens[] = {40};
  rdkv_config c = config_of(4, 2, 32, 48);
  rdkv_isa isa;
  int i, j;
  for (i = 0; i < 4; i++)
    for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      /* no segment; a segment that keeps nothing; and each with an empty tail */
      setup *s = setup_make(&c, tokens, i % 2, 1 | 32 | 64, 0, RDKV_F16, 30);
      if (i >= 2) s->cache.tail = &s->tail;
      s->cache.isa = s->tail.isa = isa;
      test_where("case %d, isa %s", i, isa_name(isa));
      CHECK_OK(attend(s));
      for (j = 0; j < 4 * 48; j++) CHECK(s->out[j] == 0.0f);
      for (j = 0; j < 4; j++) CHECK(memcmp(&s->lse[j], "\x00\x00\x80\xff", 4) == 0);
      setup_free(s);
    }
}

/* A list may hold one block a layer: those of other layers are passed over. */
static void blocks_of_other_layers(void) {
  rdkv_config c = config_of(4, 2, 32, 0);
  problem p;
  rdkv_segment s[3], whole;
  rdkv_cache cache;
  uint8_t *block[3];
  float *apart = new_floats(4 * 32), *together = new_floats(4 * 32);
  void *scratch;
  size_t bytes;
  int l;
  c.n_layers = 3;
  p = problem_make(&c, 60, RDKV_F32, DENSE, 40);
  problem_widths(&p, MIX_ALL, 40);
  CHECK_OK(problem_pack(&p));
  whole = problem_open(&p);
  scratch = mem_new(rdkv_attend_scratch(&p.cfg));
  for (l = 0; l < 3; l++) {
    size_t need = rdkv_block_bytes(&p.cfg, &p.layer[l], 1);
    block[l] = (uint8_t *)mem_new(need);
    CHECK_OK(rdkv_pack(&p.cfg, &p.kv[l], &p.layer[l], 1, l, 0, block[l], need, &bytes, p.scratch,
                       p.scratch_bytes));
    CHECK_OK(rdkv_open(block[l], bytes, RDKV_VERIFY, &s[l]));
  }
  memset(&cache, 0, sizeof cache);
  cache.isa = p.cfg.isa;
  for (l = 0; l < 3; l++) {
    cache.segments = s, cache.n_segments = 3;
    CHECK_OK(
        rdkv_attend(&p.cfg, &cache, l, p.q[l], apart, NULL, scratch, rdkv_attend_scratch(&p.cfg)));
    cache.segments = &whole, cache.n_segments = 1;
    CHECK_OK(rdkv_attend(&p.cfg, &cache, l, p.q[l], together, NULL, scratch,
                         rdkv_attend_scratch(&p.cfg)));
    CHECK(memcmp(apart, together, 4 * 32 * sizeof(float)) == 0);
  }
  for (l = 0; l < 3; l++) mem_free(block[l]);
  mem_free(apart), mem_free(together), mem_free(scratch);
  problem_free(&p);
}

/* Two caches merged by their lse are the one cache: what lse is for. */
static void merging_by_lse(void) {
  static const uint32_t tokens[] = {120, 45};
  rdkv_config c = config_of(4, 2, 64, 0);
  setup *s = setup_make(&c, tokens, 2, MIX_ALL, 0, RDKV_F16, 50);
  float out[2][4 * 64], lse[2][4];
  int i, d, h;
  CHECK_OK(attend(s));
  for (i = 0; i < 2; i++) {
    rdkv_cache part = s->cache;
    part.segments = &s->segments[i], part.n_segments = 1;
    CHECK_OK(
        rdkv_attend(&s->p[0].cfg, &part, 0, s->q, out[i], lse[i], s->scratch, s->scratch_bytes));
  }
  for (h = 0; h < 4; h++) {
    double a = 1.0 / (1.0 + exp((double)lse[1][h] - (double)lse[0][h]));
    for (d = 0; d < 64; d++)
      CHECK_LE(fabs((double)s->out[h * 64 + d] - a * (double)out[0][h * 64 + d] -
                    (1.0 - a) * (double)out[1][h * 64 + d]),
               1e-5);
  }
  setup_free(s);
}

typedef struct attend_args {
  const rdkv_config *cfg;
  const rdkv_cache *cache;
  int layer, kv_head;
  const float *q;
  float *out;
  void *scratch;
  size_t scratch_bytes;
} attend_args;

static void refused(const attend_args *a, rdkv_status want, int whole_layer_too) {
  rdkv_status status = rdkv_attend_head(a->cfg, a->cache, a->layer, a->kv_head, a->q, a->out, NULL,
                                        a->scratch, a->scratch_bytes);
  CHECK_STATUS(status, want);
  if (!whole_layer_too) return;
  status =
      rdkv_attend(a->cfg, a->cache, a->layer, a->q, a->out, NULL, a->scratch, a->scratch_bytes);
  CHECK_STATUS(status, want);
}

#define WRONG(field, value, status, whole) \
  (a = good, a.field = (value), test_where(#field " = " #value), refused(&a, status, whole))

static void bad_arguments(void) {
  static const uint32_t tokens[] = {40};
  rdkv_config c = config_of(4, 2, 32, 48), other;
  setup *s = setup_make(&c, tokens, 1, MIX_ALL, 3, RDKV_F16, 60);
  attend_args good, a;
  rdkv_cache cache = s->cache;
  good.cfg = &s->p[0].cfg, good.cache = &s->cache, good.layer = 0, good.kv_head = 0, good.q = s->q,
  good.out = s->out;
  good.scratch = s->scratch, good.scratch_bytes = s->scratch_bytes;
  WRONG(cfg, NULL, RDKV_ERR_ARGUMENT, 1), WRONG(cache, NULL, RDKV_ERR_ARGUMENT, 1);
  WRONG(q, NULL, RDKV_ERR_ARGUMENT, 1), WRONG(out, NULL, RDKV_ERR_ARGUMENT, 1);
  WRONG(scratch, NULL, RDKV_ERR_ARGUMENT, 1), WRONG(layer, -1, RDKV_ERR_ARGUMENT, 1);
  WRONG(kv_head, -1, RDKV_ERR_ARGUMENT, 0), WRONG(kv_head, 2, RDKV_ERR_ARGUMENT, 0);
  WRONG(scratch_bytes, s->scratch_bytes - 1, RDKV_ERR_MEMORY, 1),
      WRONG(scratch_bytes, 0, RDKV_ERR_MEMORY, 1);
  WRONG(scratch, (char *)s->scratch + 4, RDKV_ERR_ALIGNMENT, 1);
  cache.n_segments = -1;
  WRONG(cache, &cache, RDKV_ERR_ARGUMENT, 1);
  cache.n_segments = 1, cache.segments = NULL;
  WRONG(cache, &cache, RDKV_ERR_ARGUMENT, 1);
#define OTHER_SHAPE(nq, nkv, kd, vd)                                           \
  (other = config_of(nq, nkv, kd, vd), CHECK_OK(rdkv_resolve(&other, &other)), \
   WRONG(cfg, &other, RDKV_ERR_ARGUMENT, 1))
  OTHER_SHAPE(4, 2, 33, 48), OTHER_SHAPE(4, 2, 32, 47), OTHER_SHAPE(4, 4, 32, 48),
      OTHER_SHAPE(4, 1, 32, 48);
  CHECK(mem_untouched(s->out, 4 * 48 * sizeof(float)));
  setup_free(s);
}

int main(void) {
  RUN(width_mixes);
  RUN(shapes);
  RUN(segments_and_tails);
  RUN(ways_to_call);
  RUN(in_place_with_other_dims);
  RUN(large_logits);
  RUN(nothing_to_attend_to);
  RUN(blocks_of_other_layers);
  RUN(merging_by_lse);
  RUN(bad_arguments);
  printf("worst relative L2 against fp64: %.2e\n", worst_seen);
  return test_done();
}
