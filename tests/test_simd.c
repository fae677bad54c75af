/* >>simd : every instruction set of this machine does what the scalar code does. From the same
   weights the distortions, widths and bytes are the same; scores and attention differ by rounding.
 */
#include "problem.h"

typedef struct shape {
  int n_q_heads, n_kv_heads, k_dim, v_dim, n_layers;
  uint32_t n_tokens;
  rdkv_dtype dtype;
  layout where;
  rdkv_profile profile;
  double keep;
} shape;

static const shape shapes[] = {
    {8, 2, 128, 128, 2, 1000, RDKV_F16, DENSE, RDKV_JOINT, 0.1},
    {8, 2, 128, 128, 1, 1000, RDKV_F16, DENSE, RDKV_PAPER, 0.2},
    {4, 4, 64, 64, 2, 700, RDKV_BF16, HEADS_FIRST, RDKV_JOINT, 0.05},
    {5, 1, 80, 112, 1, 333, RDKV_F32, DIM_MAJOR, RDKV_JOINT, 0.3},
    {7, 1, 33, 17, 3, 401, RDKV_F32, DENSE, RDKV_JOINT, 0.25},
    {16, 1, 256, 1, 1, 97, RDKV_F16, PADDED, RDKV_JOINT, 0.4},
    {2, 2, 1, 256, 1, 130, RDKV_F32, EVERY_SECOND, RDKV_PAPER, 0.4},
    {2, 1, 8, 48, 1, 31, RDKV_F32, DENSE, RDKV_JOINT, 0.9},
    {2, 1, 96, 96, 1, 2, RDKV_F32, BACKWARDS, RDKV_JOINT, 1.0},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static problem make(const shape *s, rdkv_isa isa) {
  rdkv_config c = config_of(s->n_q_heads, s->n_kv_heads, s->k_dim, s->v_dim);
  c.n_layers = s->n_layers, c.profile = s->profile, c.keep = s->keep, c.isa = isa, c.positions = 1;
  return problem_make(&c, s->n_tokens, s->dtype, s->where, 1);
}

/* The largest difference of a from b over b's own size and floor_part of the largest of all. */
static double difference(const float *a, const float *b, size_t n, double floor_part) {
  double top = 0.0, worst = 0.0;
  size_t i;
  for (i = 0; i < n; i++)
    if (fabs((double)b[i]) > top) top = fabs((double)b[i]);
  for (i = 0; i < n; i++) {
    double e = fabs((double)a[i] - (double)b[i]);
    if (!(e <= DBL_MAX)) return HUGE_VAL;
    if (e > 0.0 && e / (fabs((double)b[i]) + floor_part * top) > worst)
      worst = e / (fabs((double)b[i]) + floor_part * top);
  }
  return worst;
}

static void scores(void) {
  rdkv_isa isa;
  int i;
  for (i = 0; i < N_SHAPES; i++) {
    problem a = make(&shapes[i], RDKV_ISA_SCALAR);
    problem_score(&a);
    for (isa = next_isa(RDKV_ISA_SCALAR); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      problem b = make(&shapes[i], isa);
      size_t heads = (size_t)a.cfg.n_kv_heads, kd = (size_t)a.cfg.k_dim, vd = (size_t)a.cfg.v_dim;
      test_where("shape %d, isa %s", i, isa_name(isa));
      problem_score(&b);
      CHECK_LE(difference(b.layer[0].token, a.layer[0].token, heads * a.n_tokens, 1e-6), 1e-5);
      CHECK_LE(difference(b.layer[0].q_square, a.layer[0].q_square, heads * kd, 1e-6), 1e-5);
      CHECK_LE(difference(b.layer[0].k_square, a.layer[0].k_square, heads * kd, 1e-6), 1e-5);
      if (a.cfg.profile == RDKV_JOINT) {
        /* sums with signs: what cancels to nearly 0 has the rounding of its terms */
        CHECK_LE(difference(b.layer[0].mean_out, a.layer[0].mean_out, heads * vd, 1), 1e-5);
      }
      problem_free(&b);
    }
    problem_free(&a);
  }
}

/* Measure, allocate and pack from the scalar code's weights: the same bits all the way. */
static void same_bytes(void) {
  rdkv_isa isa;
  int i, l, round;
  for (i = 0; i < N_SHAPES; i++) {
    problem a = make(&shapes[i], RDKV_ISA_SCALAR);
    problem_compress(&a);
    for (isa = next_isa(RDKV_ISA_SCALAR); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      problem b = make(&shapes[i], isa);
      size_t heads = (size_t)a.cfg.n_kv_heads, kd = (size_t)a.cfg.k_dim, vd = (size_t)a.cfg.v_dim,
             n = a.n_tokens;
      test_where("shape %d, isa %s", i, isa_name(isa));
      for (l = 0; l < a.cfg.n_layers; l++) {
        rdkv_layer *x = &a.layer[l], *y = &b.layer[l];
        memcpy(y->token, x->token, heads * n * sizeof(float));
        memcpy(y->q_square, x->q_square, heads * kd * sizeof(float)),
            memcpy(y->k_square, x->k_square, heads * kd * sizeof(float));
        memcpy(y->mean_out, x->mean_out, heads * vd * sizeof(float));
        CHECK_OK(rdkv_measure(&b.cfg, &b.kv[l], y, b.scratch, b.scratch_bytes));
        CHECK(memcmp(x->v_distortion, y->v_distortion, heads * 5 * n * sizeof(float)) == 0);
        CHECK(memcmp(x->k_distortion, y->k_distortion, heads * 4 * kd * sizeof(float)) == 0);
      }
      CHECK_OK(problem_allocate(&b));
      for (l = 0; l < a.cfg.n_layers; l++) {
        CHECK(memcmp(a.layer[l].v_bits, b.layer[l].v_bits, heads * n) == 0);
        CHECK(memcmp(a.layer[l].k_bits, b.layer[l].k_bits, heads * kd) == 0);
      }
      CHECK_OK(problem_pack(&b));
      CHECK(a.block_bytes == b.block_bytes && memcmp(a.block, b.block, a.block_bytes) == 0);
      problem_free(&b);
    }
    problem_free(&a);
  }
  for (round = 0; round < 20; round++) { /* and from given widths of every mix */
    problem a = make(&shapes[round % N_SHAPES], RDKV_ISA_SCALAR);
    problem_widths(&a, MIX_ALL, (uint64_t)round);
    CHECK_OK(problem_pack(&a));
    for (isa = next_isa(RDKV_ISA_SCALAR); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      problem b = make(&shapes[round % N_SHAPES], isa);
      problem_widths(&b, MIX_ALL, (uint64_t)round);
      test_where("round %d, isa %s", round, isa_name(isa));
      CHECK_OK(problem_pack(&b));
      CHECK(a.block_bytes == b.block_bytes && memcmp(a.block, b.block, a.block_bytes) == 0);
      problem_free(&b);
    }
    problem_free(&a);
  }
}

static void attention(void) {
  rdkv_isa isa;
  int i;
  for (i = 0; i < N_SHAPES; i++) {
    problem p = make(&shapes[i], RDKV_ISA_SCALAR);
    size_t n_out = (size_t)(p.cfg.n_q_heads * p.cfg.v_dim),
           scratch_bytes = rdkv_attend_scratch(&p.cfg), j;
    float *a = new_floats(n_out), *b = new_floats(n_out), lse[2][16];
    double *want = (double *)malloc(n_out * sizeof(double));
    void *scratch = mem_new(scratch_bytes);
    rdkv_segment s;
    rdkv_cache cache;
    problem_widths(&p, MIX_ALL & ~1u, 5);
    CHECK_OK(problem_pack(&p));
    s = problem_open(&p);
    memset(&cache, 0, sizeof cache);
    cache.segments = &s, cache.n_segments = 1, cache.isa = RDKV_ISA_SCALAR;
    CHECK_OK(rdkv_attend(&p.cfg, &cache, 0, p.q[0], a, lse[0], scratch, scratch_bytes));
    for (j = 0; j < n_out; j++) want[j] = (double)a[j];
    for (isa = next_isa(RDKV_ISA_SCALAR); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      test_where("shape %d, isa %s", i, isa_name(isa));
      cache.isa = isa;
      CHECK_OK(rdkv_attend(&p.cfg, &cache, 0, p.q[0], b, lse[1], scratch, scratch_bytes));
      CHECK_LE(relative_l2(b, want, n_out), 1e-5);
      for (j = 0; j < (size_t)p.cfg.n_q_heads; j++)
        CHECK_LE(fabs((double)lse[0][j] - (double)lse[1][j]),
                 2e-5 * (1.0 + fabs((double)lse[0][j])));
    }
    free(want);
    mem_free(a), mem_free(b), mem_free(scratch);
    problem_free(&p);
  }
}

int main(void) {
  rdkv_isa isa;
  printf("instruction sets:");
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa))
    printf(" %s", isa_name(isa));
  printf("\n");
  RUN(scores);
  RUN(same_bytes);
  RUN(attention);
  return test_done();
}
