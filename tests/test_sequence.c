/* >>sequence and >>file : blocks, rollback, fork; save, load, and what happens to a file that was
   changed. RDKV_SLOW_TESTS makes the corruptions ten times longer. */
#if defined(__unix__) || defined(__APPLE__)
#define _DEFAULT_SOURCE /* mmap, mprotect */
#define HAVE_MAPPING 1
#endif
#include "problem.h"
#ifdef HAVE_MAPPING
#include <sys/mman.h>
#include <unistd.h>
#endif

enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, K_DIM = 24, V_DIM = 40, MAX_SEGMENTS = 64 };

/* A sequence with all its memory, and a problem whose K, V and queries are its tokens. */
typedef struct living {
  problem *p;
  rdkv_sequence s;
  void *memory, *arena, *scratch, *work;
  size_t scratch_bytes, work_bytes, memory_bytes;
} living;

/* n_tokens tokens, each with its query; keep for blocks of 16. */
static problem tokens(uint32_t n_tokens, uint64_t seed) {
  rdkv_config c = config_of(Q_HEADS, KV_HEADS, K_DIM, V_DIM);
  c.n_layers = LAYERS, c.window = (int32_t)n_tokens, c.keep = 0.4, c.pool = 1;
  return problem_make(&c, n_tokens, RDKV_F16, DENSE, seed);
}

static living live(problem *p, uint32_t capacity, rdkv_dtype dtype, int keep_queries,
                   size_t arena_bytes) {
  living v;
  memset(&v, 0, sizeof v);
  v.p = p;
  v.memory_bytes = rdkv_sequence_bytes(&p->cfg, MAX_SEGMENTS, capacity, dtype, keep_queries);
  v.memory = mem_new(v.memory_bytes);
  CHECK_OK(rdkv_sequence_init(&p->cfg, MAX_SEGMENTS, capacity, dtype, keep_queries, v.memory,
                              v.memory_bytes, &v.s));
  v.work_bytes = rdkv_attend_scratch(&p->cfg);
  v.work = mem_new(v.work_bytes);
  v.scratch_bytes = rdkv_sequence_scratch(&p->cfg, 128);
  v.scratch = mem_new(v.scratch_bytes);
  v.arena = mem_new(arena_bytes);
  v.s.arena = (uint8_t *)v.arena, v.s.arena_bytes = arena_bytes;
  return v;
}

static void bury(living *v) {
  mem_free(v->memory), mem_free(v->arena), mem_free(v->scratch), mem_free(v->work);
  memset(v, 0, sizeof *v);
}

static rdkv_tensor row(rdkv_tensor x, uint32_t at) {
  x.data = (const char *)x.data + (ptrdiff_t)dtype_bytes(x.dtype) * x.token_stride * (ptrdiff_t)at;
  return x;
}

enum { OUT = LAYERS * Q_HEADS * V_DIM };

/* Token t of the problem through all layers; out [LAYERS][Q_HEADS][V_DIM]. */
static void step(living *v, uint32_t t, float *out) {
  const problem *p = v->p;
  int l;
  for (l = 0; l < LAYERS; l++) {
    float to[Q_HEADS * V_DIM], lse[Q_HEADS];
    CHECK_OK(rdkv_tail_append(&v->s.tail, l, row(p->kv[l].k, t), row(p->kv[l].v, t), 1));
    CHECK_OK(rdkv_sequence_attend(&p->cfg, &v->s, l, p->q[l] + t * Q_HEADS * K_DIM, to, lse,
                                  v->work, v->work_bytes));
    if (out) memcpy(out + l * Q_HEADS * V_DIM, to, sizeof to);
  }
}

static void steps(living *v, uint32_t begin, uint32_t end, float *out) {
  for (; begin < end; begin++) step(v, begin, out);
}

/* A prompt's segment of the problem's tokens [begin, end), compressed at the problem's keep. */
static uint8_t *prompt(const problem *p, uint32_t begin, uint32_t end, rdkv_segment *segment) {
  rdkv_config c = p->cfg;
  rdkv_kv kv[LAYERS];
  rdkv_queries by[LAYERS];
  size_t bytes = 0, room, need;
  uint8_t *block;
  void *scratch;
  uint32_t n = end - begin;
  int l;
  memset(by, 0, sizeof by);
  c.window = 8;
  for (l = 0; l < LAYERS; l++) {
    kv[l].k = row(p->kv[l].k, begin), kv[l].v = row(p->kv[l].v, begin);
    by[l].n = n < 8 ? n : 8, by[l].position = n - by[l].n;
    by[l].q = kv[l].q = row(p->kv[l].q, end - by[l].n);
  }
  room = rdkv_block_bound(&c, n), need = rdkv_compress_scratch(&c, n);
  block = (uint8_t *)mem_new(room), scratch = mem_new(need);
  CHECK_OK(rdkv_compress_by(&c, kv, by, n, begin, block, room, &bytes, scratch, need));
  CHECK_OK(rdkv_open(block, bytes, RDKV_VERIFY, segment));
  CHECK_EQ(segment->header->token_begin, begin);
  mem_free(scratch);
  return block;
}

static int same(const float *a, const float *b) { return memcmp(a, b, OUT * sizeof *a) == 0; }

/* ---- blocks ---------------------------------------------------------------------------------- */

/* By a range's own last queries and without log-sum-exp it is rdkv_compress to the byte. */
static void own_queries(void) {
  static const rdkv_profile profiles[] = {RDKV_JOINT, RDKV_PAPER};
  size_t i;
  for (i = 0; i < 2; i++) {
    rdkv_config c = config_of(Q_HEADS, KV_HEADS, K_DIM, V_DIM);
    problem p;
    rdkv_queries by[LAYERS];
    size_t room, need, a = 0, b = 0;
    uint8_t *one, *two;
    void *scratch;
    int l;
    c.n_layers = LAYERS, c.keep = 0.3, c.profile = profiles[i];
    p = problem_make(&c, 200, RDKV_F32, DENSE, 5);
    room = rdkv_block_bound(&p.cfg, 200), need = rdkv_compress_scratch(&p.cfg, 200);
    one = (uint8_t *)mem_new(room), two = (uint8_t *)mem_new(room), scratch = mem_new(need);
    memset(by, 0, sizeof by);
    for (l = 0; l < LAYERS; l++) by[l].q = p.kv[l].q, by[l].n = 32, by[l].position = 168;
    CHECK_OK(rdkv_compress(&p.cfg, p.kv, 200, one, room, &a, scratch, need));
    CHECK_OK(rdkv_compress_by(&p.cfg, p.kv, by, 200, 0, two, room, &b, scratch, need));
    CHECK(a == b && memcmp(one, two, a) == 0);
    by[1].position = 167; /* the last token is seen by none */
    CHECK_STATUS(rdkv_compress_by(&p.cfg, p.kv, by, 200, 0, two, room, &b, scratch, need),
                 RDKV_ERR_ARGUMENT);
    by[1].position = 168, by[1].n = 0;
    CHECK_STATUS(rdkv_compress_by(&p.cfg, p.kv, by, 200, 0, two, room, &b, scratch, need),
                 RDKV_ERR_ARGUMENT);
    CHECK(memcmp(one, two, a) == 0);
    mem_free(one), mem_free(two), mem_free(scratch), problem_free(&p);
  }
}

/* A block's distortion when all of it is dropped, sum w |v - o|^2, against double precision: w and
   o are of attention to everything, also to what is in segments and in later tokens. */
static void weights(void) {
  problem p = tokens(64, 11);
  living v = live(&p, 64, RDKV_F32, 1, 1 << 16);
  rdkv_config c = p.cfg;
  rdkv_report report;
  int l, h;
  c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 1e30;
  steps(&v, 0, 64, NULL);
  CHECK_OK(rdkv_sequence_compress(&c, &v.s, 32, 0, v.scratch, v.scratch_bytes));
  CHECK_EQ(v.s.n_segments, 1);
  CHECK_EQ(v.s.tail_begin, 32);
  for (l = 0; l < LAYERS && v.s.n_segments; l++)
    for (h = 0; h < KV_HEADS; h++) {
      double w[32] = {0}, o[V_DIM] = {0}, weight[32], sum = 0, want = 0;
      int i, g, d;
      uint32_t t;
      for (i = 0; i < 32; i++) sum += weight[i] = 1 / sqrt(32.0 - i);
      for (i = 0; i < 32; i++) weight[i] *= 32 / sum;
      for (i = 0; i < 32; i++)
        for (g = 0; g < Q_HEADS / KV_HEADS; g++) {
          const float *q = p.q[l] + ((32 + i) * Q_HEADS + h * 2 + g) * K_DIM;
          double a[64], all = 0, top = -1e300;
          for (t = 0; t <= 32 + (uint32_t)i; t++) {
            for (a[t] = 0, d = 0; d < K_DIM; d++)
              a[t] +=
                  (double)q[d] * (double)p.k[l][(t * KV_HEADS + (uint32_t)h) * K_DIM + (uint32_t)d];
            a[t] *= (double)p.cfg.softmax_scale;
            top = a[t] > top ? a[t] : top;
          }
          for (t = 0; t <= 32 + (uint32_t)i; t++) all += a[t] = exp(a[t] - top);
          for (t = 0; t <= 32 + (uint32_t)i; t++) {
            a[t] /= all;
            if (t < 32) w[t] += weight[i] * a[t] / 32;
            for (d = 0; d < V_DIM; d++)
              o[d] += weight[i] * a[t] *
                      (double)p.v[l][(t * KV_HEADS + (uint32_t)h) * V_DIM + (uint32_t)d] / 64;
          }
        }
      for (t = 0; t < 32; t++)
        for (d = 0; d < V_DIM; d++) {
          double e = (double)p.v[l][(t * KV_HEADS + (uint32_t)h) * V_DIM + (uint32_t)d] - o[d];
          want += w[t] * e * e;
        }
      CHECK_OK(rdkv_report_segment(v.s.segments, l, h, &report));
      test_where("layer %d head %d: %g, want %g", l, h, report.v_distortion, want);
      CHECK_EQ(report.v_tokens[0], 32);
      CHECK_LE(fabs(report.v_distortion - want), 2e-4 * want);
    }
  bury(&v), problem_free(&p);
}

/* Blocks come when their successor is complete; budgets hold; at the end
   everything is in segments; memory does not grow with the tokens but for the blocks. */
static void block_by_block(void) {
  problem p = tokens(300, 3);
  living v = live(&p, 39, RDKV_F16, 1, 1 << 18);
  size_t before;
  uint32_t t;
  int i;
  for (t = 0; t < 300; t++) {
    step(&v, t, NULL);
    before = v.s.arena_used;
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &v.s, 16, 23, v.scratch, v.scratch_bytes));
    CHECK_EQ(v.s.n_segments, t + 1 < 39 ? 0 : (t + 1 - 39) / 16 + 1);
    CHECK_EQ(rdkv_sequence_tokens(&v.s), t + 1);
    CHECK_LE(v.s.tail.n_tokens[1], 38);
    CHECK_EQ(v.s.queries.n_tokens[1], v.s.tail.n_tokens[1]);
    if (v.s.arena_used > before) /* keep 0.4 of 16 tokens */
      CHECK_LE(v.s.arena_used - before, 0.4 * 16 * LAYERS * KV_HEADS * (K_DIM + V_DIM) * 2);
  }
  i = v.s.n_segments;
  CHECK_OK(rdkv_sequence_flush(&p.cfg, &v.s, 16, v.scratch, v.scratch_bytes));
  CHECK_EQ(v.s.tail.n_tokens[0], 0);
  CHECK_EQ(v.s.n_segments, (300 + 15) / 16);
  CHECK(v.s.n_segments > i);
  for (i = 0; i < v.s.n_segments; i++) {
    rdkv_segment s;
    CHECK_EQ(v.s.segments[i].header->token_begin, 16 * i);
    CHECK_OK(rdkv_open(v.s.segments[i].block, (size_t)v.s.segments[i].header->total_bytes,
                       RDKV_VERIFY, &s));
  }
  bury(&v), problem_free(&p);
}

/* Pins are of the sequence: a block keeps those of its tokens that are pinned, and no others. */
static void pinned(void) {
  problem p = tokens(64, 4);
  living v = live(&p, 64, RDKV_F16, 1, 1 << 18);
  rdkv_pin pins[3] = {
      {0, 2, 8, RDKV_PIN_SINK, 0}, {19, 24, 16, RDKV_PIN_TOOLS, 0}, {30, 34, 4, RDKV_PIN_USER, 0}};
  static const unsigned want[3][5] = {{14, 0, 0, 2, 0}, {9, 0, 2, 0, 5}, {14, 0, 2, 0, 0}};
  rdkv_config c = p.cfg;
  rdkv_report report;
  void *scratch;
  size_t need;
  int i, l, h, bits;
  c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 1e30, c.pins = pins, c.n_pins = 3;
  need = rdkv_sequence_scratch(&c, 16), scratch = mem_new(need);
  steps(&v, 0, 64, NULL);
  CHECK_OK(rdkv_sequence_compress(&c, &v.s, 16, 0, scratch, need));
  CHECK_EQ(v.s.n_segments, 3);
  for (i = 0; i < v.s.n_segments; i++)
    for (l = 0; l < LAYERS; l++)
      for (h = 0; h < KV_HEADS; h++) {
        CHECK_OK(rdkv_report_segment(&v.s.segments[i], l, h, &report));
        for (bits = 0; bits < 5; bits++) {
          test_where("block %d, width %d", i, bits);
          CHECK_EQ(report.v_tokens[bits], want[i][bits]);
        }
      }
  mem_free(scratch), bury(&v), problem_free(&p);
}

/* No room in the arena or the list: nothing is lost, and with room it goes on. */
static void no_room(void) {
  problem p = tokens(64, 3);
  living v = live(&p, 64, RDKV_F16, 1, 1 << 16);
  float a[OUT], b[OUT];
  size_t room;
  steps(&v, 0, 63, NULL);
  v.s.arena_bytes = 128;
  CHECK_STATUS(rdkv_sequence_compress(&p.cfg, &v.s, 16, 0, v.scratch, v.scratch_bytes),
               RDKV_ERR_FULL);
  v.s.arena_bytes = 1 << 16, v.s.max_segments = 0;
  CHECK_STATUS(rdkv_sequence_compress(&p.cfg, &v.s, 16, 0, v.scratch, v.scratch_bytes),
               RDKV_ERR_FULL);
  v.s.max_segments = MAX_SEGMENTS, v.s.arena = NULL;
  CHECK_STATUS(rdkv_sequence_flush(&p.cfg, &v.s, 16, v.scratch, v.scratch_bytes), RDKV_ERR_FULL);
  v.s.arena = (uint8_t *)v.arena;
  CHECK_STATUS(rdkv_sequence_compress(&p.cfg, &v.s, 16, 0, v.scratch, 64), RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_sequence_compress(&p.cfg, &v.s, 1025, 0, v.scratch, v.scratch_bytes),
               RDKV_ERR_ARGUMENT);
  CHECK_EQ(v.s.n_segments, 0);
  CHECK_EQ(v.s.arena_used, 0);
  CHECK_EQ(v.s.tail.n_tokens[0], 63);
  step(&v, 63, a);
  CHECK_OK(rdkv_sequence_rollback(&v.s, 63));
  step(&v, 63, b);
  CHECK(same(a, b));
  CHECK_STATUS(rdkv_tail_append(&v.s.tail, 0, p.kv[0].k, p.kv[0].v, 1), RDKV_ERR_FULL);
  CHECK_OK(rdkv_sequence_compress(&p.cfg, &v.s, 16, 0, v.scratch, v.scratch_bytes));
  CHECK_EQ(v.s.n_segments, 3);
  CHECK_OK(rdkv_tail_append(&v.s.tail, 0, p.kv[0].k, p.kv[0].v, 1)); /* layers not equally far */
  room = v.s.arena_used;
  CHECK_STATUS(rdkv_sequence_flush(&p.cfg, &v.s, 16, v.scratch, v.scratch_bytes),
               RDKV_ERR_ARGUMENT);
  CHECK_EQ(v.s.arena_used, room);
  bury(&v), problem_free(&p);
}

/* ---- many into one, one into a smaller one -----------------------------------------------------
 */

/* What attention over segments is off that over the dense tokens [0, n), for the problem's last
   queries, largest of the layers. */
static double error_of(const problem *p, const rdkv_segment *s, int n_segments, uint32_t n) {
  size_t need = rdkv_measure_error_scratch(&p->cfg, n);
  void *scratch = mem_new(need);
  rdkv_cache cache;
  double worst = 0, e = 0;
  int l;
  memset(&cache, 0, sizeof cache);
  cache.segments = s, cache.n_segments = n_segments, cache.isa = p->cfg.isa;
  for (l = 0; l < LAYERS; l++) {
    CHECK_OK(rdkv_measure_error(&p->cfg, &cache, l, &p->kv[l], n,
                                p->q[l] + (p->n_tokens - 16) * Q_HEADS * K_DIM, 16, &e, scratch,
                                need));
    worst = e > worst ? e : worst;
  }
  mem_free(scratch);
  return worst;
}

static void repack(void) {
  problem p = tokens(160, 61);
  rdkv_segment s[4], one, small, direct;
  uint8_t *block[4], *merged, *less, *again;
  rdkv_queries by[LAYERS];
  rdkv_config c = p.cfg;
  size_t room = 1 << 20, need, bytes = 0, sum = 0;
  double apart, together, twice, once;
  void *scratch;
  int i, l;
  p.cfg.keep = 0.6;
  memset(by, 0, sizeof by);
  for (i = 0; i < 4; i++) {
    block[i] = prompt(&p, 32 * (uint32_t)i, 32 * (uint32_t)(i + 1), &s[i]);
    sum += (size_t)s[i].header->total_bytes;
  }
  for (l = 0; l < LAYERS; l++) by[l].q = row(p.kv[l].q, 128), by[l].n = 32, by[l].position = 128;
  c.window = 32, c.budget_bytes = sum;
  need = rdkv_repack_scratch(&c, s, 4), scratch = mem_new(need);
  merged = (uint8_t *)mem_new(room), less = (uint8_t *)mem_new(room);
  again = (uint8_t *)mem_new(room);
  /* in the bytes of the four: little is lost */
  CHECK_OK(rdkv_repack(&c, s, 4, by, merged, room, &bytes, scratch, need));
  CHECK_LE(bytes, sum);
  CHECK_OK(rdkv_open(merged, bytes, RDKV_VERIFY, &one));
  CHECK_EQ(one.header->token_begin, 0);
  CHECK_EQ(one.header->n_tokens, 128);
  apart = error_of(&p, s, 4, 128), together = error_of(&p, &one, 1, 128);
  test_where("apart %g, together %g", apart, together);
  CHECK_LE(together, 1.25 * apart + 0.01);
  /* a third of the bytes: within a factor of what the K and V themselves would have given */
  c.budget_bytes = 0, c.keep = 0.2, c.pool = 1;
  mem_free(scratch);
  need = rdkv_repack_scratch(&c, &one, 1);
  if (need < rdkv_compress_scratch(&c, 128)) need = rdkv_compress_scratch(&c, 128);
  scratch = mem_new(need);
  CHECK_OK(rdkv_repack(&c, &one, 1, by, less, room, &bytes, scratch, need));
  CHECK_LE((double)bytes, 0.2 * 128 * LAYERS * KV_HEADS * (K_DIM + V_DIM) * 2);
  CHECK_OK(rdkv_open(less, bytes, RDKV_VERIFY, &small));
  CHECK_OK(rdkv_compress_by(&c, p.kv, by, 128, 0, again, room, &bytes, scratch, need));
  CHECK_OK(rdkv_open(again, bytes, RDKV_VERIFY, &direct));
  twice = error_of(&p, &small, 1, 128), once = error_of(&p, &direct, 1, 128);
  test_where("from segments %g, from K and V %g", twice, once);
  CHECK_LE(twice, 1.3 * once);
  /* what cannot be */
  memset(again, 0xa5, room);
  mem_free(scratch), need = rdkv_repack_scratch(&c, s, 4), scratch = mem_new(need);
  one = s[1], s[1] = s[2], s[2] = one; /* not in order */
  CHECK_STATUS(rdkv_repack(&c, s, 4, by, again, room, &bytes, scratch, need), RDKV_ERR_ARGUMENT);
  CHECK_EQ(rdkv_repack_scratch(&c, s, 4), 0);
  one = s[1], s[1] = s[2], s[2] = one;
  CHECK_STATUS(rdkv_repack(&c, s, 4, by, again, room, &bytes, scratch, need - 64), RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_repack(&c, s, 4, by, again, 128, &bytes, scratch, need), RDKV_ERR_MEMORY);
  c.positions = 1;
  CHECK_STATUS(rdkv_repack(&c, s, 4, by, again, room, &bytes, scratch, need), RDKV_ERR_CONFIG);
  c.positions = 0, c.profile = RDKV_PAPER;
  CHECK_STATUS(rdkv_repack(&c, s, 4, by, again, room, &bytes, scratch, need), RDKV_ERR_CONFIG);
  c.profile = RDKV_JOINT, by[1].n = 0;
  CHECK_STATUS(rdkv_repack(&c, s, 4, by, again, room, &bytes, scratch, need), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_repack(&c, s, 0, by, again, room, &bytes, scratch, need), RDKV_ERR_ARGUMENT);
  CHECK(mem_untouched(again, room));
  /* nothing kept, of nothing */
  by[1].n = 32, c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 1e30;
  CHECK_OK(rdkv_repack(&c, s, 4, by, again, room, &bytes, scratch, need));
  CHECK_OK(rdkv_open(again, bytes, RDKV_VERIFY, &one));
  mem_free(scratch), need = rdkv_repack_scratch(&c, &one, 1), scratch = mem_new(need);
  CHECK_OK(rdkv_repack(&c, &one, 1, by, less, room, &bytes, scratch, need));
  CHECK_OK(rdkv_open(less, bytes, RDKV_VERIFY, &small));
  CHECK_EQ(small.header->n_tokens, 128);
  for (i = 0; i < 4; i++) mem_free(block[i]);
  mem_free(merged), mem_free(less), mem_free(again), mem_free(scratch), problem_free(&p);
}

/* The last segments of a sequence become one, in their place; shared ones are left alone. */
static void merge(void) {
  problem p = tokens(300, 62);
  living v = live(&p, 40, RDKV_F16, 1, 1 << 18), f = live(&p, 40, RDKV_F16, 1, 1 << 18);
  rdkv_config c = p.cfg;
  size_t need, used;
  void *scratch;
  uint8_t *copy;
  rdkv_segment s;
  uint32_t t;
  c.window = 16, c.keep = 0.3;
  for (t = 0; t < 200; t++) {
    step(&v, t, NULL);
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &v.s, 16, 0, v.scratch, v.scratch_bytes));
  }
  CHECK_EQ(v.s.n_segments, 11);
  need = rdkv_sequence_merge_scratch(&c, &v.s, 8), scratch = mem_new(need);
  used = v.s.arena_used;
  CHECK_STATUS(rdkv_sequence_merge(&c, &v.s, 12, scratch, need), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_sequence_merge(&c, &v.s, 8, scratch, need - 64), RDKV_ERR_MEMORY);
  v.s.arena_bytes = used + 128;
  CHECK_STATUS(rdkv_sequence_merge(&c, &v.s, 8, scratch, need), RDKV_ERR_FULL);
  CHECK(v.s.n_segments == 11 && v.s.arena_used == used);
  v.s.arena_bytes = 1 << 18;
  CHECK_OK(rdkv_sequence_merge(&c, &v.s, 8, scratch, need));
  CHECK_EQ(v.s.n_segments, 4);
  CHECK_EQ(v.s.segments[3].header->token_begin, 48);
  CHECK_EQ(v.s.segments[3].header->n_tokens, 128);
  CHECK_EQ(v.s.segments[3].block + v.s.segments[3].header->total_bytes - v.s.arena, v.s.arena_used);
  CHECK_EQ(v.s.segments[3].block - v.s.segments[2].block, v.s.segments[2].header->total_bytes);
  CHECK(v.s.arena_used < used);
  CHECK_OK(rdkv_open(v.s.segments[3].block, (size_t)v.s.segments[3].header->total_bytes,
                     RDKV_VERIFY, &s));
  CHECK_EQ(rdkv_sequence_tokens(&v.s), 200);
  steps(&v, 200, 208, NULL);
  CHECK_STATUS(rdkv_sequence_rollback(&v.s, 64), RDKV_ERR_GONE);
  /* what a fork sees does not change */
  CHECK_OK(rdkv_sequence_fork(&v.s, &f.s));
  used = v.s.arena_used, copy = (uint8_t *)mem_new(used);
  memcpy(copy, v.s.arena, used);
  mem_free(scratch), need = rdkv_sequence_merge_scratch(&c, &v.s, 4), scratch = mem_new(need);
  CHECK_OK(rdkv_sequence_merge(&c, &v.s, 4, scratch, need));
  CHECK(v.s.n_segments == 1 && f.s.n_segments == 4 && v.s.arena_used > used);
  CHECK(memcmp(copy, v.s.arena, used) == 0);
  steps(&v, 208, 209, NULL), steps(&f, 208, 209, NULL);
  mem_free(copy), mem_free(scratch), bury(&v), bury(&f), problem_free(&p);
}

/* ---- rollback and fork ----------------------------------------------------------------------- */

/* Ahead, back, and along, with blocks made in between: every output has the same bits as without.
 */
static void rollback_leaves_no_trace(void) {
  problem p = tokens(200, 21);
  living a = live(&p, 60, RDKV_F16, 1, 1 << 18), b = live(&p, 60, RDKV_F16, 1, 1 << 18);
  float x[OUT], y[OUT];
  uint64_t rng = 8;
  uint32_t t, ahead, i;
  rdkv_segment s;
  uint8_t *block = prompt(&p, 0, 50, &s);
  CHECK_OK(rdkv_sequence_add(&a.s, &s));
  CHECK_OK(rdkv_sequence_add(&b.s, &s));
  for (t = 50; t < 180; t++) {
    ahead = rng_below(&rng, 12);
    for (i = 0; i < ahead; i++) step(&b, 199 - i, NULL); /* other tokens than will come */
    CHECK_OK(rdkv_sequence_rollback(&b.s, t));
    step(&a, t, x), step(&b, t, y);
    test_where("token %u, %u ahead", t, ahead);
    CHECK(same(x, y));
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &a.s, 16, 0, a.scratch, a.scratch_bytes));
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &b.s, 16, 0, b.scratch, b.scratch_bytes));
  }
  CHECK(a.s.n_segments > 4 && a.s.arena_used > 0);
  mem_free(block), bury(&a), bury(&b), problem_free(&p);
}

/* Across segments: those behind are dropped, inside one is an error that changes nothing. */
static void rollback_over_segments(void) {
  problem p = tokens(200, 22);
  living a = live(&p, 100, RDKV_F16, 1, 1 << 18), b = live(&p, 100, RDKV_F16, 1, 1 << 18);
  rdkv_segment s[2];
  uint8_t *block[2];
  float x[OUT], y[OUT];
  uint32_t t;
  size_t used;
  block[0] = prompt(&p, 0, 60, &s[0]), block[1] = prompt(&p, 60, 100, &s[1]);
  CHECK_OK(rdkv_sequence_add(&a.s, &s[0]));
  CHECK_OK(rdkv_sequence_add(&b.s, &s[0]));
  CHECK_OK(rdkv_sequence_add(&b.s, &s[1]));
  steps(&b, 100, 180, NULL);
  CHECK_OK(rdkv_sequence_compress(&p.cfg, &b.s, 16, 0, b.scratch, b.scratch_bytes));
  CHECK_EQ(b.s.n_segments, 2 + 4); /* 80 tokens: 4 blocks and their successor */
  used = b.s.arena_used;
  CHECK_STATUS(rdkv_sequence_rollback(&b.s, 181), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_sequence_rollback(&b.s, 163), RDKV_ERR_GONE);
  CHECK_STATUS(rdkv_sequence_rollback(&b.s, 61), RDKV_ERR_GONE);
  CHECK_STATUS(rdkv_sequence_rollback(&b.s, 59), RDKV_ERR_GONE);
  CHECK(b.s.n_segments == 6 && b.s.arena_used == used && rdkv_sequence_tokens(&b.s) == 180);
  CHECK_OK(rdkv_sequence_rollback(&b.s, 170)); /* inside the tail */
  CHECK_EQ(b.s.n_segments, 6);
  CHECK_OK(rdkv_sequence_rollback(&b.s, 132)); /* drops two blocks */
  CHECK_EQ(b.s.n_segments, 4);
  CHECK_EQ(b.s.arena + b.s.arena_used - b.s.segments[3].block, b.s.segments[3].header->total_bytes);
  steps(&b, 132, 190, NULL);
  CHECK_OK(rdkv_sequence_compress(&p.cfg, &b.s, 16, 0, b.scratch, b.scratch_bytes));
  CHECK_OK(rdkv_sequence_rollback(&b.s, 60)); /* to the end of the first segment */
  CHECK_EQ(b.s.n_segments, 1);
  CHECK_EQ(b.s.arena_used, 0);
  for (t = 60; t < 140; t++) {
    step(&a, t, x), step(&b, t, y);
    CHECK(same(x, y));
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &a.s, 16, 0, a.scratch, a.scratch_bytes));
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &b.s, 16, 0, b.scratch, b.scratch_bytes));
  }
  CHECK_OK(rdkv_sequence_rollback(&b.s, 0));
  CHECK(b.s.n_segments == 0 && rdkv_sequence_tokens(&b.s) == 0);
  mem_free(block[0]), mem_free(block[1]), bury(&a), bury(&b), problem_free(&p);
}

/* Forks go their own ways, and so does the parent; each gives what it would alone. */
static void forks(void) {
  enum { N = 5 };
  problem p = tokens(200, 23);
  living v[N], alone = live(&p, 60, RDKV_F16, 1, 1 << 18);
  float x[OUT], y[OUT];
  rdkv_segment s;
  uint8_t *block = prompt(&p, 0, 50, &s);
  uint32_t t;
  int i;
  for (i = 0; i < N; i++) v[i] = live(&p, 60, RDKV_F16, 1, 1 << 18);
  CHECK_OK(rdkv_sequence_add(&v[0].s, &s));
  for (t = 50; t < 110; t++) {
    step(&v[0], t, NULL);
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &v[0].s, 16, 0, v[0].scratch, v[0].scratch_bytes));
  }
  CHECK(v[0].s.n_segments > 2);
  for (i = 1; i < N; i++) {
    CHECK_OK(rdkv_sequence_fork(&v[0].s, &v[i].s));
    CHECK_EQ(v[i].s.arena_used, 0); /* no segment was copied: a fork costs its tail */
    CHECK(v[i].s.segments[1].block == v[0].s.segments[1].block);
    CHECK(mem_untouched(v[i].arena, 1 << 18));
  }
  for (i = N - 1; i >= 0; i--) { /* the parent last, which first goes back over what is shared */
    living *w = &v[i];
    bury(&alone);
    alone = live(&p, 60, RDKV_F16, 1, 1 << 18);
    CHECK_OK(rdkv_sequence_add(&alone.s, &s));
    for (t = 50; t < 110; t++) {
      step(&alone, t, NULL);
      CHECK_OK(rdkv_sequence_compress(&p.cfg, &alone.s, 16, 0, alone.scratch, alone.scratch_bytes));
    }
    if (i == 3) { /* a child and the parent roll back over shared blocks, and write new ones */
      CHECK_OK(rdkv_sequence_rollback(&v[3].s, 66));
      CHECK_OK(rdkv_sequence_rollback(&alone.s, 66));
    }
    for (t = 0; t < 40; t++) {
      uint32_t token = 110 + (t * (uint32_t)(i + 1)) % 90;
      step(w, token, x), step(&alone, token, y);
      test_where("fork %d, token %u", i, t);
      CHECK(same(x, y));
      CHECK_OK(rdkv_sequence_compress(&p.cfg, &w->s, 16, 0, w->scratch, w->scratch_bytes));
      CHECK_OK(rdkv_sequence_compress(&p.cfg, &alone.s, 16, 0, alone.scratch, alone.scratch_bytes));
    }
    if (i == 4) { /* the parent, and still the others must find their segments */
      CHECK_OK(rdkv_sequence_rollback(&v[0].s, 66));
      steps(&v[0], 66, 110, NULL);
      CHECK_OK(rdkv_sequence_flush(&p.cfg, &v[0].s, 16, v[0].scratch, v[0].scratch_bytes));
      CHECK_OK(rdkv_sequence_rollback(&v[0].s, 50));
      CHECK_EQ(v[0].s.arena_used, v[0].s.arena_shared);
      for (t = 50; t < 110; t++) {
        step(&v[0], t, NULL);
        CHECK_OK(rdkv_sequence_compress(&p.cfg, &v[0].s, 16, 0, v[0].scratch, v[0].scratch_bytes));
      }
    }
  }
  for (i = 0; i < N; i++) bury(&v[i]);
  mem_free(block), bury(&alone), problem_free(&p);
}

/* ---- save and load --------------------------------------------------------------------------- */

typedef struct paper {
  uint8_t *data;
  size_t bytes, room;
  int pieces, stop_at;
} paper;

static int put(void *user, const void *data, size_t bytes) {
  paper *s = (paper *)user;
  if (s->pieces++ == s->stop_at) return 1;
  if (!CHECK(bytes <= s->room - s->bytes)) return 1;
  memcpy(s->data + s->bytes, data, bytes);
  s->bytes += bytes;
  return 0;
}

static paper save(const rdkv_sequence *s) {
  paper f;
  memset(&f, 0, sizeof f);
  f.room = (size_t)rdkv_save_bytes(s), f.stop_at = -1;
  f.data = (uint8_t *)mem_new(f.room);
  CHECK_OK(rdkv_save(s, put, &f));
  CHECK_EQ(f.bytes, f.room);
  return f;
}

/* A sequence with a prompt, blocks, a tail and queries, small and of odd sizes. */
static living sample(problem *p, uint8_t **block) {
  living v = live(p, 40, RDKV_F16, 1, 1 << 16);
  rdkv_segment s;
  uint32_t t;
  *block = prompt(p, 0, 33, &s);
  CHECK_OK(rdkv_sequence_add(&v.s, &s));
  for (t = 33; t < 60; t++) {
    step(&v, t, NULL);
    CHECK_OK(rdkv_sequence_compress(&p->cfg, &v.s, 8, 0, v.scratch, v.scratch_bytes));
  }
  CHECK_EQ(v.s.n_segments, 3);
  CHECK_EQ(v.s.tail.n_tokens[0], 11);
  return v;
}

/* Saved, loaded and gone on with, against never having been saved: the same bits, also where blocks
   are made of tokens from before. */
static void save_and_go_on(void) {
  static const rdkv_open_mode modes[] = {RDKV_VERIFY, RDKV_MAP};
  problem p = tokens(140, 31);
  uint8_t *block;
  living v = sample(&p, &block), w[2];
  paper f = save(&v.s), again;
  float x[OUT], y[OUT];
  rdkv_file head;
  uint32_t t;
  int i, k;
  CHECK_OK(rdkv_file_head(f.data, f.bytes, &head));
  CHECK(head.n_segments == 3 && head.n_tail == 11 && head.n_queries == 11 && head.tail_begin == 49);
  CHECK(head.n_layers == LAYERS && head.n_q_heads == Q_HEADS && head.k_dim == K_DIM);
  for (i = 0; i < 2; i++) {
    w[i] = live(&p, 40, RDKV_F16, 1, 1 << 16);
    CHECK_OK(rdkv_load(&p.cfg, f.data, f.bytes, modes[i], &w[i].s));
    CHECK_EQ((uintptr_t)w[i].s.segments[1].block % 128, 0);
    CHECK(w[i].s.segments[0].block > f.data && w[i].s.segments[0].block < f.data + f.bytes);
    again = save(&w[i].s);
    CHECK(again.bytes == f.bytes && memcmp(again.data, f.data, f.bytes) == 0);
    mem_free(again.data);
  }
  for (t = 60; t < 140; t++) {
    step(&v, t, x);
    CHECK_OK(rdkv_sequence_compress(&p.cfg, &v.s, 8, 0, v.scratch, v.scratch_bytes));
    for (i = 0; i < 2; i++) {
      step(&w[i], t, y);
      CHECK(same(x, y));
      CHECK_OK(rdkv_sequence_compress(&p.cfg, &w[i].s, 8, 0, w[i].scratch, w[i].scratch_bytes));
    }
  }
  CHECK(v.s.n_segments > 4);
  bury(&w[0]), bury(&w[1]);
  /* without queries: decodes the same, and makes blocks once it has new ones */
  w[0] = live(&p, 90, RDKV_F32, 0, 128), w[1] = live(&p, 90, RDKV_F16, 1, 1 << 16);
  CHECK_OK(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &w[0].s));
  again = save(&w[0].s);
  CHECK_OK(rdkv_load(&p.cfg, again.data, again.bytes, RDKV_VERIFY, &w[1].s));
  CHECK_EQ(w[1].s.query_begin, 11);
  CHECK_OK(rdkv_sequence_rollback(&w[1].s, 60));
  steps(&w[1], 60, 100, NULL);
  CHECK_OK(rdkv_sequence_compress(&p.cfg, &w[1].s, 16, 0, w[1].scratch, w[1].scratch_bytes));
  CHECK_EQ(w[1].s.n_segments, 5); /* 51 dense tokens */
  /* a sink that fails at any piece */
  k = f.pieces;
  for (i = 0; i < k; i++) {
    again.bytes = 0, again.pieces = 0, again.stop_at = i, again.room = f.bytes;
    mem_free(again.data), again.data = (uint8_t *)mem_new(f.bytes);
    test_where("piece %d of %d", i, k);
    if (i == 0) bury(&v), mem_free(block), v = sample(&p, &block);
    CHECK_STATUS(rdkv_save(&v.s, put, &again), RDKV_ERR_SINK);
    CHECK_EQ(again.pieces, i + 1);
  }
  mem_free(f.data), mem_free(again.data), mem_free(block);
  bury(&v), bury(&w[0]), bury(&w[1]), problem_free(&p);
}

/* A file of version 1 that was saved once and for all: it is read, and saved again as the same
   bytes. With WRITE_GOLDEN in the environment it is made anew, for a new version. */
static void golden(void) {
  static const char name[] = "golden_v1/sequence.rdks";
  problem p = tokens(80, 71);
  living w = live(&p, 40, RDKV_F16, 1, 128);
  uint8_t *data = (uint8_t *)mem_new(1 << 16), *fit;
  size_t bytes;
  FILE *file;
  paper again;
  if (getenv("WRITE_GOLDEN")) {
    uint8_t *block;
    living v = sample(&p, &block);
    paper f = save(&v.s);
    file = fopen(name, "wb");
    CHECK(file && fwrite(f.data, 1, f.bytes, file) == f.bytes && fclose(file) == 0);
    mem_free(f.data), mem_free(block), bury(&v);
  }
  file = fopen(name, "rb");
  if (!CHECK(file && "run the test in the tests folder")) exit(2);
  bytes = fread(data, 1, 1 << 16, file);
  fclose(file);
  fit = (uint8_t *)mem_new(bytes);
  memcpy(fit, data, bytes);
  CHECK_OK(rdkv_load(&p.cfg, fit, bytes, RDKV_VERIFY, &w.s));
  CHECK(w.s.n_segments == 3 && rdkv_sequence_tokens(&w.s) == 60);
  again = save(&w.s);
  CHECK(again.bytes == bytes && memcmp(again.data, fit, bytes) == 0);
  mem_free(again.data), mem_free(data), mem_free(fit), bury(&w), problem_free(&p);
}

/* An empty sequence, and one without a tail, are files too. */
static void small_files(void) {
  problem p = tokens(40, 32);
  living v = live(&p, 8, RDKV_BF16, 0, 128), w = live(&p, 8, RDKV_BF16, 0, 128);
  rdkv_segment s;
  uint8_t *block = prompt(&p, 0, 40, &s);
  paper f = save(&v.s);
  CHECK_EQ(f.bytes, 128);
  CHECK_OK(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &w.s));
  CHECK_EQ(rdkv_sequence_tokens(&w.s), 0);
  mem_free(f.data);
  CHECK_OK(rdkv_sequence_add(&v.s, &s));
  f = save(&v.s);
  CHECK_EQ(f.bytes, 256 + s.header->total_bytes);
  CHECK_OK(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &w.s));
  CHECK_EQ(rdkv_sequence_tokens(&w.s), 40);
  CHECK_STATUS(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &w.s), RDKV_ERR_ARGUMENT);
  mem_free(f.data), mem_free(block), bury(&v), bury(&w), problem_free(&p);
}

#ifdef HAVE_MAPPING
/* A file on disk, mapped; pages that hold nothing but codes cannot be read at all while it is
   opened. Then the first token has the bits that it has without saving. */
static void mapped(void) {
  problem p = tokens(1000, 33);
  living v = live(&p, 40, RDKV_F16, 1, 1 << 16), w = live(&p, 40, RDKV_F16, 1, 1 << 16);
  rdkv_segment s;
  uint8_t *block = prompt(&p, 0, 900, &s), *map;
  size_t page = (size_t)sysconf(_SC_PAGESIZE), begin, end, hidden;
  float x[OUT], y[OUT];
  FILE *file = tmpfile();
  rdkv_file head;
  paper f;
  CHECK_OK(rdkv_sequence_add(&v.s, &s));
  steps(&v, 900, 920, NULL);
  f = save(&v.s);
  if (!CHECK(file && fwrite(f.data, 1, f.bytes, file) == f.bytes && fflush(file) == 0)) exit(2);
  map = (uint8_t *)mmap(NULL, f.bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
  if (!CHECK(map != (uint8_t *)MAP_FAILED)) exit(2);
  CHECK_OK(rdkv_file_head(map, f.bytes, &head));
  begin = (size_t)(256 + s.header->head_bytes + page - 1) / page * page;
  end = (size_t)head.tail / page * page;
  hidden = end > begin ? end - begin : 0;
  printf("opened with %lu of %lu bytes out of reach\n", (unsigned long)hidden,
         (unsigned long)f.bytes);
  if (page == 4096) CHECK(hidden > f.bytes / 2);
  if (hidden) CHECK_EQ(mprotect(map + begin, hidden, PROT_NONE), 0);
  CHECK_OK(rdkv_load(&p.cfg, map, f.bytes, RDKV_MAP, &w.s));
  if (hidden) CHECK_EQ(mprotect(map + begin, hidden, PROT_READ), 0);
  step(&v, 920, x), step(&w, 920, y);
  CHECK(same(x, y));
  munmap(map, f.bytes), fclose(file);
  mem_free(f.data), mem_free(block), bury(&v), bury(&w), problem_free(&p);
}
#endif

/* ---- files that were changed ------------------------------------------------------------------
 */

static uint64_t sum_of(const uint8_t *p, uint64_t begin, uint64_t end) {
  return rdkv_checksum(p + begin, (size_t)(end - begin), begin / 8);
}

/* Makes all sums right as far as the file's own lengths go: of segments, of the tail, of the head.
 */
static void repair(uint8_t *p, size_t bytes) {
  uint64_t total, head, tail, at, n, zero = 0, sum;
  uint32_t segments, i;
  memcpy(&total, p + 8, 8), memcpy(&head, p + 16, 8), memcpy(&tail, p + 32, 8);
  memcpy(&segments, p + 56, 4);
  for (i = 0; i < segments && 128 + 32 * ((uint64_t)i + 1) <= bytes; i++) {
    uint64_t h_bytes, t_bytes;
    memcpy(&at, p + 128 + 32 * i, 8), memcpy(&n, p + 136 + 32 * i, 8);
    if (at % 128 || at > bytes || n > bytes - at || n < 256) continue;
    memcpy(&t_bytes, p + at + 8, 8), memcpy(&h_bytes, p + at + 16, 8);
    if (t_bytes > n || h_bytes > t_bytes || h_bytes < 40 || h_bytes % 8) continue;
    sum = rdkv_checksum(p + at + h_bytes, (size_t)(t_bytes - h_bytes), h_bytes / 8);
    memcpy(p + at + 32, &sum, 8), memcpy(p + 128 + 32 * i + 24, &sum, 8);
    memcpy(p + at + 24, &zero, 8);
    sum = rdkv_checksum(p + at, (size_t)h_bytes, 0);
    memcpy(p + at + 24, &sum, 8), memcpy(p + 128 + 32 * i + 16, &sum, 8);
  }
  if (total <= bytes && tail <= total && tail % 8 == 0)
    sum = sum_of(p, tail, total), memcpy(p + 40, &sum, 8);
  if (head > bytes || head < 40) return;
  memcpy(p + 24, &zero, 8), sum = sum_of(p, 0, head), memcpy(p + 24, &sum, 8);
}

/* Loads into a fresh sequence; if that works everything is done with it. */
static int used;
static rdkv_status use(const living *like, living *w, const uint8_t *file, size_t bytes,
                       rdkv_open_mode mode) {
  problem *p = like->p;
  rdkv_status st;
  rdkv_cache cache;
  float out[Q_HEADS * V_DIM];
  int l;
  CHECK_OK(rdkv_sequence_init(&p->cfg, MAX_SEGMENTS, 40, RDKV_F16, 1, w->memory, w->memory_bytes,
                              &w->s));
  st = rdkv_load(&p->cfg, file, bytes, mode, &w->s);
  if (st != RDKV_OK) {
    CHECK(w->s.n_segments == 0 && w->s.tail.n_tokens[0] == 0 && w->s.queries.n_tokens[0] == 0);
    return st;
  }
  cache = rdkv_sequence_cache(&w->s);
  for (l = 0; l < LAYERS; l++)
    CHECK_OK(rdkv_attend(&p->cfg, &cache, l, p->q[l], out, NULL, w->work, w->work_bytes));
  w->s.arena = (uint8_t *)w->arena, w->s.arena_bytes = 1 << 16;
  if (used++ % 64 == 0) rdkv_sequence_flush(&p->cfg, &w->s, 8, w->scratch, w->scratch_bytes);
  if (w->s.n_segments > 1) rdkv_sequence_rollback(&w->s, w->s.segments[1].header->token_begin);
  return RDKV_OK;
}

static void truncated(void) {
  problem p = tokens(80, 41);
  uint8_t *block;
  living v = sample(&p, &block), w = live(&p, 40, RDKV_F16, 1, 1 << 16);
  paper f = save(&v.s);
  size_t n;
  int mode;
  for (n = 0; n < f.bytes; n += n < 512 || n + 300 > f.bytes ? 1 : 37) {
    uint8_t *prefix = (uint8_t *)mem_new(n); /* its end is guarded */
    memcpy(prefix, f.data, n);
    for (mode = RDKV_VERIFY; mode <= RDKV_MAP; mode++) {
      test_where("%d of %d bytes, mode %d", (int)n, (int)f.bytes, mode);
      CHECK_STATUS(use(&v, &w, prefix, n, (rdkv_open_mode)mode), RDKV_ERR_TRUNCATED);
    }
    mem_free(prefix);
  }
  mem_free(f.data), mem_free(block), bury(&v), bury(&w), problem_free(&p);
}

/* Every byte is under a checksum: no change of any byte gets past RDKV_VERIFY, and what gets past
   RDKV_MAP is a code. */
static void any_byte(void) {
  problem p = tokens(80, 42);
  uint8_t *block;
  living v = sample(&p, &block), w = live(&p, 40, RDKV_F16, 1, 1 << 16);
  paper f = save(&v.s);
  uint64_t rng = 6;
  size_t at, codes = 0, i;
  for (i = 0; i < 3; i++)
    codes += (size_t)(v.s.segments[i].header->total_bytes - v.s.segments[i].header->head_bytes);
  for (at = 0, i = 0; at < f.bytes; at++) {
    uint8_t old = f.data[at];
    f.data[at] ^= (uint8_t)(1u << rng_below(&rng, 8));
    test_where("byte %d of %d", (int)at, (int)f.bytes);
    CHECK(use(&v, &w, f.data, f.bytes, RDKV_VERIFY) != RDKV_OK);
    i += use(&v, &w, f.data, f.bytes, RDKV_MAP) == RDKV_OK;
    f.data[at] = old;
  }
  CHECK_EQ(i, codes);
  CHECK_OK(use(&v, &w, f.data, f.bytes, RDKV_VERIFY));
  mem_free(f.data), mem_free(block), bury(&v), bury(&w), problem_free(&p);
}

static rdkv_status changed(const living *v, living *w, const paper *f, size_t at, int bytes,
                           uint64_t value) {
  uint8_t *file = (uint8_t *)mem_new(f->bytes);
  rdkv_status st, map;
  int i;
  memcpy(file, f->data, f->bytes);
  for (i = 0; i < bytes; i++) file[at + (size_t)i] = (uint8_t)(value >> (8 * i));
  repair(file, f->bytes);
  st = use(v, w, file, f->bytes, RDKV_VERIFY);
  map = use(v, w, file, f->bytes, RDKV_MAP);
  CHECK_STATUS(map, st);
  mem_free(file);
  return st;
}

static void statuses(void) {
  problem p = tokens(80, 43);
  uint8_t *block, *moved;
  living v = sample(&p, &block), w = live(&p, 40, RDKV_F16, 1, 1 << 16);
  paper f = save(&v.s);
  rdkv_config c;
  rdkv_file head;
  size_t i;
  memset(&head, 0xa5, sizeof head);
  CHECK_STATUS(changed(&v, &w, &f, 0, 4, 0x52444b53), RDKV_ERR_FORMAT); /* the other byte order */
  CHECK_STATUS(changed(&v, &w, &f, 0, 4, 0x564b4452), RDKV_ERR_FORMAT); /* a block, not a file */
  CHECK_STATUS(changed(&v, &w, &f, 4, 4, 0), RDKV_ERR_VERSION);
  CHECK_STATUS(changed(&v, &w, &f, 4, 4, 2), RDKV_ERR_VERSION);
  CHECK_STATUS(changed(&v, &w, &f, 8, 8, f.bytes + 128), RDKV_ERR_TRUNCATED);
  CHECK_STATUS(changed(&v, &w, &f, 8, 8, f.bytes - 128), RDKV_ERR_FORMAT);
  CHECK_STATUS(changed(&v, &w, &f, 60, 4, 3), RDKV_ERR_FORMAT); /* layers */
  CHECK_STATUS(rdkv_file_head(NULL, f.bytes, &head), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_file_head(f.data, f.bytes, NULL), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_file_head(f.data, f.bytes - 1, &head), RDKV_ERR_TRUNCATED);
  moved = (uint8_t *)mem_new(f.bytes + 128);
  memcpy(moved, f.data, f.bytes);
  CHECK_STATUS(rdkv_file_head(moved, f.bytes + 1, &head), RDKV_ERR_FORMAT);
  memcpy(moved + 64, f.data, f.bytes);
  CHECK_STATUS(rdkv_file_head(moved + 64, f.bytes, &head), RDKV_ERR_ALIGNMENT);
  CHECK(mem_untouched(&head, sizeof head));
  for (i = 0; i < 5; i++) { /* shapes, one field at a time */
    living other;
    problem q;
    c = config_of(Q_HEADS, KV_HEADS, K_DIM, V_DIM);
    c.n_layers = LAYERS;
    if (i == 0) c.n_layers = 1;
    if (i == 1) c.n_q_heads = 6;
    if (i == 2) c.n_kv_heads = 4;
    if (i == 3) c.k_dim = 32;
    if (i == 4) c.v_dim = 33;
    q = problem_make(&c, 4, RDKV_F16, DENSE, 1);
    other = live(&q, 40, RDKV_F16, 1, 128);
    test_where("shape %d", (int)i);
    CHECK_STATUS(rdkv_load(&q.cfg, f.data, f.bytes, RDKV_VERIFY, &other.s), RDKV_ERR_CONFIG);
    CHECK_STATUS(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &other.s), RDKV_ERR_ARGUMENT);
    CHECK_EQ(other.s.n_segments, 0);
    bury(&other), problem_free(&q);
  }
  bury(&w), w = live(&p, 10, RDKV_F16, 1, 128); /* one token short */
  CHECK_STATUS(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &w.s), RDKV_ERR_FULL);
  bury(&w), w = live(&p, 40, RDKV_F16, 1, 128);
  w.s.max_segments = 1;
  CHECK_STATUS(rdkv_load(&p.cfg, f.data, f.bytes, RDKV_VERIFY, &w.s), RDKV_ERR_FULL);
  mem_free(moved), mem_free(f.data), mem_free(block), bury(&v), bury(&w), problem_free(&p);
}

/* Random changes, half of them with all sums made right again: no crash, and whatever was changed
   without that is refused. */
static void corruptions(void) {
#ifdef RDKV_SLOW_TESTS
  const int n = 1000000;
#else
  const int n = 100000;
#endif
  static const uint64_t notable[] = {
      0,      1,      31,         32,         127,        128,        256,
      0x7fff, 0xffff, 0x7fffffff, 0x80000000, UINT32_MAX, UINT64_MAX, UINT64_MAX - 127,
      0x7e00, 0x7c00};
  problem p = tokens(80, 44);
  uint8_t *block, *file;
  living v = sample(&p, &block), w = live(&p, 40, RDKV_F16, 1, 1 << 16);
  paper f = save(&v.s);
  uint64_t rng = 2025, value;
  int i, opened = 0, refused = 0;
  file = (uint8_t *)mem_new(f.bytes);
  for (i = 0; i < n; i++) {
    uint32_t changes = 1 + rng_below(&rng, 4), how = rng_below(&rng, 4);
    rdkv_status st;
    memcpy(file, f.data, f.bytes);
    while (changes--) {
      size_t where = rng_below(&rng, 4), at, width = (size_t)1 << rng_below(&rng, 4), j;
      /* anywhere; in the head; in the first segment's head; in the tail */
      at = where == 1   ? rng_below(&rng, 256)
           : where == 2 ? 256 + rng_below(&rng, 512)
           : where == 3 ? (size_t)f.bytes - 1 - rng_below(&rng, 4096)
                        : rng_below(&rng, (uint32_t)f.bytes);
      at -= at % width;
      value = rng_below(&rng, 2) ? notable[rng_below(&rng, 16)] : rng_next(&rng);
      for (j = 0; j < width; j++) file[at + j] = (uint8_t)(value >> (8 * j));
    }
    if (memcmp(file, f.data, f.bytes) == 0) {
      i--;
      continue;
    }
    if (how & 1) repair(file, f.bytes);
    test_where("corruption %d", i);
    st = use(&v, &w, file, f.bytes, how & 2 ? RDKV_MAP : RDKV_VERIFY);
    opened += st == RDKV_OK, refused += st != RDKV_OK;
    if (how == 0) CHECK(st != RDKV_OK && "a change that was not hidden is found");
  }
  printf("%d of %d corrupted files could be opened and were used\n", opened, opened + refused);
  CHECK(opened > n / 50 && "the corruptions reach beyond rdkv_load");
  mem_free(file), mem_free(f.data), mem_free(block), bury(&v), bury(&w), problem_free(&p);
}

static void bad_arguments(void) {
  problem p = tokens(20, 51);
  living v = live(&p, 8, RDKV_F16, 1, 1 << 12);
  rdkv_config c = p.cfg;
  rdkv_sequence s;
  float q[Q_HEADS * K_DIM] = {0}, out[Q_HEADS * V_DIM];
  memset(&s, 0xa5, sizeof s);
  CHECK_EQ(rdkv_sequence_bytes(&c, -1, 8, RDKV_F16, 1), 0);
  CHECK_EQ(rdkv_sequence_bytes(&c, 1, UINT32_MAX, RDKV_F16, 1), 0);
  CHECK_EQ(rdkv_sequence_bytes(NULL, 1, 8, RDKV_F16, 1), 0);
  CHECK_STATUS(rdkv_sequence_init(&c, 64, 8, RDKV_F16, 1, v.memory, v.memory_bytes - 1, &s),
               RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_sequence_init(&c, 64, 8, RDKV_F16, 1, NULL, v.memory_bytes, &s),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_sequence_init(&c, 64, 8, (rdkv_dtype)9, 1, v.memory, v.memory_bytes, &s),
               RDKV_ERR_ARGUMENT);
  CHECK(mem_untouched(&s, sizeof s));
  memset(&s, 0, sizeof s);
  CHECK_STATUS(rdkv_sequence_rollback(&s, 0), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_sequence_fork(&v.s, &s), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_sequence_fork(&v.s, &v.s), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_save(&s, put, NULL), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_save(&v.s, NULL, NULL), RDKV_ERR_ARGUMENT);
  CHECK_EQ(rdkv_save_bytes(&s), 0);
  /* a query without its token, and twice for one token */
  CHECK_STATUS(rdkv_sequence_attend(&c, &v.s, 0, q, out, NULL, v.work, v.work_bytes),
               RDKV_ERR_ARGUMENT);
  step(&v, 0, NULL);
  CHECK_STATUS(rdkv_sequence_attend(&c, &v.s, 0, q, out, NULL, v.work, v.work_bytes),
               RDKV_ERR_ARGUMENT);
  q[3] = NAN;
  CHECK_OK(rdkv_tail_append(&v.s.tail, 0, p.kv[0].k, p.kv[0].v, 1));
  CHECK_STATUS(rdkv_sequence_attend(&c, &v.s, 0, q, out, NULL, v.work, v.work_bytes),
               RDKV_ERR_NONFINITE);
  CHECK_EQ(v.s.queries.n_tokens[0], 1);
  CHECK_STATUS(rdkv_save(&v.s, put, NULL), RDKV_ERR_ARGUMENT); /* layers not equally far */
  bury(&v), problem_free(&p);
}

int main(void) {
  RUN(own_queries);
  RUN(weights);
  RUN(block_by_block);
  RUN(pinned);
  RUN(no_room);
  RUN(repack);
  RUN(merge);
  RUN(rollback_leaves_no_trace);
  RUN(rollback_over_segments);
  RUN(forks);
  RUN(save_and_go_on);
  RUN(golden);
  RUN(small_files);
#ifdef HAVE_MAPPING
  RUN(mapped);
#endif
  RUN(truncated);
  RUN(any_byte);
  RUN(statuses);
  RUN(corruptions);
  RUN(bad_arguments);
  return test_done();
}
