/* >>tail : append, rewind, capacity, bad input. What attention makes of a tail is in test_attend.c.
 */
#include "problem.h"

typedef struct tail_test {
  problem p; /* its K and V are what is appended */
  rdkv_tail tail;
  void *memory;
} tail_test;

static tail_test make(int n_layers, uint32_t n_tokens, uint32_t capacity, rdkv_dtype dtype,
                      rdkv_dtype from, layout where) {
  tail_test t;
  rdkv_config c = config_of(4, 2, 24, 40);
  size_t bytes;
  c.n_layers = n_layers;
  t.p = problem_make(&c, n_tokens, from, where, 3);
  bytes = rdkv_tail_bytes(&t.p.cfg, capacity, dtype);
  t.memory = mem_new(bytes);
  CHECK_OK(rdkv_tail_init(&t.p.cfg, capacity, dtype, t.memory, bytes, &t.tail));
  return t;
}

static void unmake(tail_test *t) {
  problem_free(&t->p);
  mem_free(t->memory);
}

/* Tokens [begin, end) of a tensor. */
static rdkv_tensor rows(rdkv_tensor x, uint32_t begin) {
  x.data =
      (const char *)x.data + (ptrdiff_t)dtype_bytes(x.dtype) * x.token_stride * (ptrdiff_t)begin;
  return x;
}

/* Attention over the tail alone is that over tokens [0, n) of the problem, rounded to the tail's
 * type. */
static void check_holds(const tail_test *t, int layer, uint32_t n) {
  const rdkv_config *c = &t->p.cfg;
  float *k = new_floats((size_t)n * 24), *v = new_floats((size_t)n * 40), q[4 * 24], out[4 * 40],
        lse[4];
  size_t scratch_bytes = rdkv_attend_scratch(c);
  void *scratch = mem_new(scratch_bytes);
  rdkv_cache cache;
  uint64_t rng = 4;
  double want[40], want_lse;
  uint32_t i;
  int h, d;
  memset(&cache, 0, sizeof cache);
  cache.tail = &t->tail, cache.isa = c->isa;
  for (i = 0; i < 4 * 24; i++) q[i] = (float)rng_normal(&rng);
  CHECK_EQ(t->tail.n_tokens[layer], n);
  CHECK_OK(rdkv_attend(c, &cache, layer, q, out, lse, scratch, scratch_bytes));
  for (h = 0; h < 4 && n; h++) {
    for (i = 0; i < n; i++) {
      for (d = 0; d < 24; d++)
        k[i * 24 + (uint32_t)d] =
            round_to(t->tail.dtype, t->p.k[layer][(i * 2 + (uint32_t)h / 2) * 24 + (uint32_t)d]);
      for (d = 0; d < 40; d++)
        v[i * 40 + (uint32_t)d] =
            round_to(t->tail.dtype, t->p.v[layer][(i * 2 + (uint32_t)h / 2) * 40 + (uint32_t)d]);
    }
    want_lse = ref_attend(q + h * 24, k, v, n, 24, 40, (double)c->softmax_scale, want);
    CHECK_LE(relative_l2(out + h * 40, want, 40), 1e-5);
    CHECK_LE(fabs((double)lse[h] - want_lse), 1e-5 * (1.0 + fabs(want_lse)));
  }
  mem_free(k), mem_free(v), mem_free(scratch);
}

/* From every dtype and layout to every dtype, in pieces. */
static void conversions(void) {
  static const rdkv_dtype dtypes[] = {RDKV_F32, RDKV_F16, RDKV_BF16};
  int to, from, where;
  rdkv_isa isa;
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa))
    for (to = 0; to < 3; to++)
      for (from = 0; from < 3; from++)
        for (where = 0; where < N_LAYOUTS; where++) {
          tail_test t = make(1, 50, 50, dtypes[to], dtypes[from], (layout)where);
          uint32_t at, n;
          test_where("dtype %d from %d, layout %d, isa %s", to, from, where, isa_name(isa));
          t.tail.isa = t.p.cfg.isa = isa;
          for (at = 0; at < 50; at += n) {
            n = at % 7 + 1 < 50 - at ? at % 7 + 1 : 50 - at;
            CHECK_OK(rdkv_tail_append(&t.tail, 0, rows(t.p.kv[0].k, at), rows(t.p.kv[0].v, at), n));
            if (at == 0) check_holds(&t, 0, n);
          }
          check_holds(&t, 0, 50);
          unmake(&t);
        }
}

static void full_and_rewind(void) {
  tail_test t = make(3, 20, 20, RDKV_F16, RDKV_F32, DENSE);
  uint8_t *before;
  size_t bytes = rdkv_tail_bytes(&t.p.cfg, 20, RDKV_F16);
  int l;
  for (l = 0; l < 3; l++) CHECK_EQ(t.tail.n_tokens[l], 0);
  CHECK_OK(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 15));
  CHECK_OK(rdkv_tail_append(&t.tail, 2, t.p.kv[2].k, t.p.kv[2].v, 4));
  CHECK_OK(rdkv_tail_append(&t.tail, 2, t.p.kv[2].k, t.p.kv[2].v, 0));
  check_holds(&t, 0, 15), check_holds(&t, 1, 0), check_holds(&t, 2, 4);
  before = (uint8_t *)mem_new(bytes);
  memcpy(before, t.memory, bytes);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 6), RDKV_ERR_FULL);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, UINT32_MAX), RDKV_ERR_FULL);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, UINT32_MAX - 14),
               RDKV_ERR_FULL);
  CHECK(memcmp(before, t.memory, bytes) == 0 && "on error nothing is appended");
  CHECK_OK(rdkv_tail_append(&t.tail, 0, rows(t.p.kv[0].k, 15), rows(t.p.kv[0].v, 15), 5));
  check_holds(&t, 0, 20);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 1), RDKV_ERR_FULL);
  rdkv_tail_rewind(&t.tail, 7);
  check_holds(&t, 0, 7), check_holds(&t, 1, 0), check_holds(&t, 2, 4);
  CHECK_OK(rdkv_tail_append(&t.tail, 0, rows(t.p.kv[0].k, 7), rows(t.p.kv[0].v, 7), 13));
  check_holds(&t, 0, 20);
  rdkv_tail_rewind(&t.tail, 100);
  check_holds(&t, 0, 20);
  rdkv_tail_rewind(&t.tail, 0);
  for (l = 0; l < 3; l++) check_holds(&t, l, 0);
  mem_free(before);
  unmake(&t);
}

/* A tail without room is legal, and full. */
static void no_capacity(void) {
  tail_test t = make(1, 2, 0, RDKV_F16, RDKV_F32, DENSE);
  check_holds(&t, 0, 0);
  CHECK_OK(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 0));
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 1), RDKV_ERR_FULL);
  unmake(&t);
}

static void nonfinite(void) {
  static const rdkv_dtype dtypes[] = {RDKV_F32, RDKV_F16, RDKV_BF16};
  static const float values[] = {NAN, INFINITY, -INFINITY, 70000.0f, -1e30f};
  int from, to, what, value;
  for (from = 0; from < 3; from++)
    for (to = 0; to < 3; to++)
      for (what = 0; what < 2; what++)
        for (value = 0; value < 5; value++) {
          tail_test t = make(1, 9, 20, dtypes[to], dtypes[from], DENSE);
          void *raw = t.p.raw[0][what];
          test_where("%s, from dtype %d to %d, value %d", what ? "V" : "K", from, to, value);
          CHECK_OK(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 5));
          put_value(raw, dtypes[from], 8 * 2 * (what ? 40 : 24) + 3, values[value]);
          if (value < 3 || (dtypes[to] == RDKV_F16 && dtypes[from] != RDKV_F16))
            CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, t.p.kv[0].v, 9),
                         RDKV_ERR_NONFINITE);
          check_holds(&t, 0, 5);
          unmake(&t);
        }
}

static void bad_arguments(void) {
  tail_test t = make(2, 4, 8, RDKV_F16, RDKV_F32, DENSE);
  const rdkv_config *c = &t.p.cfg;
  size_t bytes = rdkv_tail_bytes(c, 8, RDKV_F16);
  uint8_t *memory = (uint8_t *)mem_new(bytes + 64);
  rdkv_tail tail;
  rdkv_tensor none = t.p.kv[0].k;
  memset(&tail, 0xa5, sizeof tail);
  CHECK_STATUS(rdkv_tail_init(NULL, 8, RDKV_F16, memory, bytes, &tail), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_init(c, 8, RDKV_F16, NULL, bytes, &tail), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_init(c, 8, RDKV_F16, memory, bytes, NULL), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_init(c, 8, RDKV_F16, memory, bytes - 1, &tail), RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_tail_init(c, 8, RDKV_F16, memory + 4, bytes, &tail), RDKV_ERR_ALIGNMENT);
  CHECK(mem_untouched(memory, bytes + 64) && mem_untouched(&tail, sizeof tail));
  none.data = NULL;
  CHECK_STATUS(rdkv_tail_append(NULL, 0, t.p.kv[0].k, t.p.kv[0].v, 1), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_append(&t.tail, -1, t.p.kv[0].k, t.p.kv[0].v, 1), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 2, t.p.kv[0].k, t.p.kv[0].v, 1), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, none, t.p.kv[0].v, 1), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_tail_append(&t.tail, 0, t.p.kv[0].k, none, 1), RDKV_ERR_ARGUMENT);
  check_holds(&t, 0, 0);
  mem_free(memory);
  unmake(&t);
}

/* A size query says 0 or at least what the tokens take. */
static void sizes(void) {
  static const uint32_t capacities[] = {UINT32_MAX, UINT32_MAX - 7, 1u << 31};
  static const int layers[] = {1, 64, 4096, 65535};
  size_t i, j;
  for (i = 0; i < 3; i++)
    for (j = 0; j < 4; j++) {
      rdkv_config c = config_of(65535, 0, 256, 256);
      double least;
      size_t bytes;
      c.n_layers = layers[j];
      CHECK_OK(rdkv_resolve(&c, &c));
      least = (double)capacities[i] * layers[j] * 65535 * 512.0 * 4.0;
      bytes = rdkv_tail_bytes(&c, capacities[i], RDKV_F32);
      test_where("capacity %u, %d layers", capacities[i], layers[j]);
      CHECK(bytes == 0 || (double)bytes >= least);
      if (least > (double)SIZE_MAX) CHECK_EQ(bytes, 0);
    }
}

int main(void) {
  RUN(conversions);
  RUN(full_and_rewind);
  RUN(no_capacity);
  RUN(nonfinite);
  RUN(bad_arguments);
  RUN(sizes);
  return test_done();
}
