/* >>report : the bytes add up, the counts are those of the widths, and the measured error is the
 * error. */
#include "problem.h"

static void check_sums(const rdkv_report *r) {
  CHECK_EQ(r->bytes_total, r->bytes_head + r->bytes_tables + r->bytes_positions + r->bytes_k +
                               r->bytes_v + r->bytes_v_params);
  CHECK_LE(fabs(r->ratio * (double)r->bytes_fp16 - (double)r->bytes_total),
           1e-9 * (double)r->bytes_total);
}

static void bytes_and_counts(void) {
  int i, l, h, w;
  for (i = 0; i < 6; i++) {
    rdkv_config c = config_of(4, 2, i % 2 ? 80 : 33, i % 3 ? 48 : 17);
    problem p;
    rdkv_segment s;
    rdkv_report all, one, sum;
    uint32_t t;
    c.n_layers = 1 + i % 3, c.positions = i % 2, c.keep = 0.3;
    if (i == 4) c.profile = RDKV_PAPER;
    p = problem_make(&c, 300, RDKV_F32, DENSE, (uint64_t)i);
    problem_compress(&p);
    s = problem_open(&p);
    test_where("case %d", i);
    memset(&sum, 0, sizeof sum);
    CHECK_OK(rdkv_report_segment(&s, -1, 0, &all));
    check_sums(&all);
    CHECK_EQ(all.bytes_total, p.block_bytes);
    CHECK_EQ(all.bytes_fp16, 2 * 2 * 300 * (p.cfg.k_dim + p.cfg.v_dim) * c.n_layers);
    CHECK(all.bytes_head >= 256u + 64u * 2u * (unsigned)c.n_layers);
    CHECK((all.bytes_positions > 0) == (c.positions == 1));
    for (l = 0; l < c.n_layers; l++)
      for (h = 0; h < 2; h++) {
        uint64_t v_tokens[5] = {0, 0, 0, 0, 0}, k_channels[5] = {0, 0, 0, 0, 0};
        CHECK_OK(rdkv_report_segment(&s, l, h, &one));
        check_sums(&one);
        CHECK_EQ(one.bytes_head, 0);
        CHECK_EQ(one.bytes_fp16, 2 * 300 * (p.cfg.k_dim + p.cfg.v_dim));
        for (t = 0; t < 300; t++) {
          int b = p.layer[l].v_bits[(uint32_t)h * 300 + t];
          v_tokens[b == 0 ? 0 : b == 2 ? 1 : b == 4 ? 2 : b == 8 ? 3 : 4]++;
        }
        for (w = 0; w < p.cfg.k_dim; w++) {
          int b = p.layer[l].k_bits[h * p.cfg.k_dim + w];
          k_channels[b == 0 ? 0 : b == 2 ? 1 : b == 4 ? 2 : 3]++;
        }
        for (w = 0; w < 5; w++)
          CHECK_EQ(one.v_tokens[w], v_tokens[w]), sum.v_tokens[w] += one.v_tokens[w];
        for (w = 0; w < 4; w++)
          CHECK_EQ(one.k_channels[w], k_channels[w]), sum.k_channels[w] += one.k_channels[w];
        sum.bytes_k += one.bytes_k, sum.bytes_v += one.bytes_v,
            sum.bytes_v_params += one.bytes_v_params;
        sum.bytes_positions += one.bytes_positions;
        sum.v_distortion += one.v_distortion, sum.k_distortion += one.k_distortion;
      }
    CHECK_EQ(sum.bytes_k, all.bytes_k), CHECK_EQ(sum.bytes_v, all.bytes_v);
    CHECK_EQ(sum.bytes_v_params, all.bytes_v_params),
        CHECK_EQ(sum.bytes_positions, all.bytes_positions);
    CHECK(memcmp(sum.v_tokens, all.v_tokens, sizeof sum.v_tokens) == 0);
    CHECK(memcmp(sum.k_channels, all.k_channels, sizeof sum.k_channels) == 0);
    CHECK_LE(fabs(sum.v_distortion - all.v_distortion), 1e-9 * all.v_distortion);
    CHECK_LE(fabs(sum.k_distortion - all.k_distortion), 1e-9 * all.k_distortion);
    CHECK(i == 4 ? all.v_distortion == 0.0 : all.v_distortion > 0.0);
    problem_free(&p);
  }
}

/* The predicted distortion is that of the widths, as the layer's tables have it. */
static void prediction(void) {
  rdkv_config c = config_of(4, 2, 64, 48);
  problem p;
  rdkv_segment s;
  rdkv_report r;
  double v = 0.0, k = 0.0;
  int h, i;
  c.keep = 0.2;
  p = problem_make(&c, 300, RDKV_F32, DENSE, 7);
  problem_compress(&p);
  s = problem_open(&p);
  for (h = 0; h < 2; h++) {
    static const int index[17] = {0, 0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4};
    for (i = 0; i < 300; i++)
      v += (double)p.layer[0]
               .v_distortion[(h * 5 + index[p.layer[0].v_bits[h * 300 + i]]) * 300 + i];
    for (i = 0; i < 64; i++)
      k += (double)p.layer[0].k_distortion[(h * 4 + index[p.layer[0].k_bits[h * 64 + i]]) * 64 + i];
  }
  CHECK_OK(rdkv_report_segment(&s, -1, 0, &r));
  CHECK_LE(fabs(r.v_distortion - v), 1e-5 * v);
  CHECK_LE(fabs(r.k_distortion - k), 1e-5 * k);
  problem_free(&p);
}

/* Relative L2 of attention over the cache against fp64 over the dense K, V. */
static double ref_error(const problem *p, const rdkv_segment *s, const float *q, int n_queries) {
  const rdkv_config *c = &p->cfg;
  size_t kd = (size_t)c->k_dim, vd = (size_t)c->v_dim, heads = (size_t)c->n_kv_heads, t,
         n = p->n_tokens;
  double error = 0.0, square = 0.0;
  int h, g, i, d, group = group_of(c);
  for (h = 0; h < c->n_kv_heads; h++) {
    float *k = new_floats(n * kd), *v = new_floats(n * vd), *ck = new_floats(n * kd),
          *cv = new_floats(n * vd);
    uint32_t kept;
    double want[256], got[256];
    for (t = 0; t < n; t++) {
      memcpy(k + t * kd, p->k[0] + (t * heads + (size_t)h) * kd, kd * sizeof(float));
      memcpy(v + t * vd, p->v[0] + (t * heads + (size_t)h) * vd, vd * sizeof(float));
    }
    CHECK_OK(rdkv_unpack(s, 0, h, ck, cv, NULL, &kept));
    for (i = 0; i < n_queries; i++)
      for (g = h * group; g < (h + 1) * group; g++) {
        const float *row = q + (i * c->n_q_heads + g) * c->k_dim;
        ref_attend(row, k, v, n, c->k_dim, c->v_dim, (double)c->softmax_scale, want);
        ref_attend(row, ck, cv, kept, c->k_dim, c->v_dim, (double)c->softmax_scale, got);
        for (d = 0; d < c->v_dim; d++)
          error += (got[d] - want[d]) * (got[d] - want[d]), square += want[d] * want[d];
      }
    mem_free(k), mem_free(v), mem_free(ck), mem_free(cv);
  }
  return sqrt(error / square);
}

static void measured_error(void) {
  int i;
  for (i = 0; i < 6; i++) {
    rdkv_config c = config_of(8, 4, 64, 48);
    problem p;
    rdkv_segment s;
    rdkv_cache cache;
    size_t bytes;
    void *scratch;
    float *q;
    double error = -1.0, want;
    uint64_t rng = 9;
    int j;
    c.keep = i % 3 == 0 ? 0.05 : i % 3 == 1 ? 0.2 : 0.5, c.n_layers = 1;
    p = problem_make(&c, 400, i < 3 ? RDKV_F32 : RDKV_F16, i < 3 ? DENSE : HEADS_FIRST, 8);
    problem_compress(&p);
    s = problem_open(&p);
    memset(&cache, 0, sizeof cache);
    cache.segments = &s, cache.n_segments = 1, cache.isa = p.cfg.isa;
    bytes = rdkv_measure_error_scratch(&p.cfg, 400), scratch = mem_new(bytes);
    q = new_floats(3 * 8 * 64);
    for (j = 0; j < 3 * 8 * 64; j++) q[j] = (float)rng_normal(&rng);
    CHECK_OK(rdkv_measure_error(&p.cfg, &cache, 0, &p.kv[0], 400, q, 3, &error, scratch, bytes));
    want = ref_error(&p, &s, q, 3);
    test_where("case %d: %g, want %g", i, error, want);
    CHECK_LE(fabs(error - want), 1e-4 * want + 1e-6);
    CHECK(want > 1e-4 && want < 1.0);
    if (i == 0) {
      double untouched = 5.0;
      rdkv_kv kv = p.kv[0];
      CHECK_STATUS(rdkv_measure_error(&p.cfg, &cache, 0, &p.kv[0], 400, q, 3, &untouched, scratch,
                                      bytes - 1),
                   RDKV_ERR_MEMORY);
      CHECK_STATUS(
          rdkv_measure_error(&p.cfg, &cache, 0, NULL, 400, q, 3, &untouched, scratch, bytes),
          RDKV_ERR_ARGUMENT);
      CHECK_STATUS(rdkv_measure_error(&p.cfg, NULL, 0, &kv, 400, q, 3, &untouched, scratch, bytes),
                   RDKV_ERR_ARGUMENT);
      CHECK_STATUS(
          rdkv_measure_error(&p.cfg, &cache, 0, &kv, 400, q, -1, &untouched, scratch, bytes),
          RDKV_ERR_ARGUMENT);
      CHECK_STATUS(rdkv_measure_error(&p.cfg, &cache, 0, &kv, 400, q, 3, NULL, scratch, bytes),
                   RDKV_ERR_ARGUMENT);
      ((float *)p.raw[0][1])[50] = NAN;
      CHECK_STATUS(
          rdkv_measure_error(&p.cfg, &cache, 0, &kv, 400, q, 3, &untouched, scratch, bytes),
          RDKV_ERR_NONFINITE);
      CHECK(untouched == 5.0);
    }
    mem_free(q), mem_free(scratch);
    problem_free(&p);
  }
}

/* What the default profile is for: at equal bytes it errs less than the paper's. */
static void joint_beats_paper(void) {
  rdkv_config c = config_of(8, 4, 64, 0);
  problem p;
  rdkv_segment s;
  double error[2];
  int i;
  c.profile = RDKV_PAPER, c.keep = 0.12;
  for (i = 0; i < 2; i++) {
    p = problem_make(&c, 1500, RDKV_F16, DENSE, 12);
    problem_compress(&p);
    s = problem_open(&p);
    error[i] = ref_error(&p, &s, p.q[0], 8);
    c.profile = RDKV_JOINT, c.budget_bytes = p.block_bytes; /* the second has as many bytes */
    problem_free(&p);
  }
  test_where("paper %g, joint %g", error[0], error[1]);
  printf("relative output error at equal bytes: paper %.4f, joint %.4f\n", error[0], error[1]);
  CHECK_LE(error[1], 0.8 * error[0]);
}

static void bad_arguments(void) {
  rdkv_config c = config_of(4, 2, 32, 0);
  problem p = problem_make(&c, 60, RDKV_F32, DENSE, 9);
  rdkv_segment s;
  rdkv_report r;
  problem_widths(&p, MIX_ALL, 9);
  CHECK_OK(problem_pack(&p));
  s = problem_open(&p);
  memset(&r, 0xa5, sizeof r);
  CHECK_STATUS(rdkv_report_segment(NULL, -1, 0, &r), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_report_segment(&s, -1, 0, NULL), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_report_segment(&s, 1, 0, &r), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_report_segment(&s, 0, 2, &r), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_report_segment(&s, 0, -1, &r), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_report_segment(&s, -2, 0, &r), RDKV_ERR_ARGUMENT);
  CHECK(mem_untouched(&r, sizeof r));
  {
    float k[60 * 32];
    uint32_t position[60], n = 77;
    CHECK_STATUS(rdkv_unpack(NULL, 0, 0, k, NULL, NULL, &n), RDKV_ERR_ARGUMENT);
    CHECK_STATUS(rdkv_unpack(&s, 1, 0, k, NULL, NULL, &n), RDKV_ERR_ARGUMENT);
    CHECK_STATUS(rdkv_unpack(&s, -1, 0, k, NULL, NULL, &n), RDKV_ERR_ARGUMENT);
    CHECK_STATUS(rdkv_unpack(&s, 0, 2, k, NULL, NULL, &n), RDKV_ERR_ARGUMENT);
    CHECK_STATUS(rdkv_unpack(&s, 0, 0, NULL, NULL, position, &n),
                 RDKV_ERR_ARGUMENT); /* none stored */
    CHECK_EQ(n, 77);
  }
  problem_free(&p);
}

int main(void) {
  RUN(bytes_and_counts);
  RUN(prediction);
  RUN(measured_error);
  RUN(joint_beats_paper);
  RUN(bad_arguments);
  return test_done();
}
