/* >>score : weights against fp64, every shape, dtype and layout; bad input; calibration. */
#include "problem.h"

/* ---- fp64 scoring by the definition ---------------------------------------------------------- */

typedef struct ref_scores {
  double *token; /* [n_tokens] */
  double q_square[256], k_square[256], mean_out[256];
} ref_scores;

/* The average of x over `pool` neighbours with reflected ends, the width cut to 2n - 1. */
static void ref_pool(const double *x, double *y, int n, int pool) {
  int t, j, half = (pool < 2 * n - 1 ? pool : 2 * n - 1) / 2;
  for (t = 0; t < n; t++) {
    double sum = 0.0;
    for (j = t - half; j <= t + half; j++) sum += x[j < 0 ? -j : j >= n ? 2 * (n - 1) - j : j];
    y[t] = sum / (2 * half + 1);
  }
}

/* Weight of queries `from` .. nq - 1, of nq that weigh 1 on average: with RDKV_JOINT the i-th from
   the end weighs 1/sqrt(i). */
static double ref_recency(const rdkv_config *c, int nq, int from, int to) {
  double all = 0.0, part = 0.0;
  int i;
  if (c->profile == RDKV_PAPER) return to - from;
  for (i = 0; i < nq; i++) all += 1.0 / sqrt(nq - i);
  for (i = from; i < to; i++) part += 1.0 / sqrt(nq - i);
  return part * nq / all;
}

static ref_scores ref_score(const problem *p, int layer, int head) {
  ref_scores r;
  const rdkv_config *c = &p->cfg;
  int n = (int)p->n_tokens, nq = (int)p->n_queries, group = group_of(c), g, i, t, d;
  size_t kd = (size_t)c->k_dim, vd = (size_t)c->v_dim, heads = (size_t)c->n_kv_heads;
  double *raw = (double *)calloc((size_t)n + 1, sizeof(double));
  double *a = (double *)calloc((size_t)n + 1, sizeof(double));
  memset(&r, 0, sizeof r);
  r.token = (double *)calloc((size_t)n + 1, sizeof(double));
  for (g = 0; g < group; g++)
    for (i = 0; i < nq; i++) {
      const float *q =
          p->q[layer] + ((size_t)i * (size_t)c->n_q_heads + (size_t)(head * group + g)) * kd;
      int seen = n - nq + i + 1;
      double top = -HUGE_VAL, sum = 0.0, weight = ref_recency(c, nq, i, i + 1);
      for (t = 0; t < seen; t++) {
        const float *k = p->k[layer] + ((size_t)t * heads + (size_t)head) * kd;
        for (a[t] = 0.0, d = 0; d < (int)kd; d++) a[t] += (double)q[d] * (double)k[d];
        a[t] *= (double)c->softmax_scale;
        if (a[t] > top) top = a[t];
      }
      for (t = 0; t < seen; t++) sum += a[t] = exp(a[t] - top);
      for (t = 0; t < seen; t++) {
        const float *v = p->v[layer] + ((size_t)t * heads + (size_t)head) * vd;
        a[t] *= weight / sum;
        raw[t] += a[t] / ref_recency(c, nq, t > n - nq ? t - (n - nq) : 0, nq);
        for (d = 0; d < (int)vd; d++) r.mean_out[d] += a[t] * (double)v[d] / (group * nq);
      }
      for (d = 0; d < (int)kd; d++) r.q_square[d] += (double)q[d] * (double)q[d] / (group * nq);
    }
  for (t = 0; t < n; t++)
    for (d = 0; d < (int)kd; d++) {
      double k = (double)p->k[layer][((size_t)t * heads + (size_t)head) * kd + (size_t)d];
      r.k_square[d] += k * k / n;
    }
  ref_pool(raw, r.token, n, c->pool);
  free(raw), free(a);
  return r;
}

/* The largest |x - ref| over |ref| + floor * max |ref|. */
static double worst(const float *x, const double *ref, size_t n, double floor_part) {
  double top = 0.0, w = 0.0;
  size_t i;
  for (i = 0; i < n; i++)
    if (fabs(ref[i]) > top) top = fabs(ref[i]);
  for (i = 0; i < n; i++) {
    double e = fabs((double)x[i] - ref[i]);
    if (!(e <= DBL_MAX)) return HUGE_VAL;
    if (e > 0.0 && e / (fabs(ref[i]) + floor_part * top) > w)
      w = e / (fabs(ref[i]) + floor_part * top);
  }
  return w;
}

static void compare_with_fp64(const problem *p, int layer) {
  const rdkv_layer *x = &p->layer[layer];
  size_t n = p->n_tokens, kd = (size_t)p->cfg.k_dim, vd = (size_t)p->cfg.v_dim, h;
  for (h = 0; h < (size_t)p->cfg.n_kv_heads; h++) {
    ref_scores r = ref_score(p, layer, (int)h);
    CHECK_LE(worst(x->token + h * n, r.token, n, 1e-6), 1e-5);
    CHECK_LE(worst(x->q_square + h * kd, r.q_square, kd, 1e-6), 1e-5);
    CHECK_LE(worst(x->k_square + h * kd, r.k_square, kd, 1e-6), 1e-5);
    if (p->cfg.profile == RDKV_JOINT)
      CHECK_LE(worst(x->mean_out + h * vd, r.mean_out, vd, 1.0), 1e-5);
    free(r.token);
  }
}

/* What dropping costs against fp64, and what rounding costs within what the step allows. */
static void measured(void) {
  static const int dims[][2] = {{64, 64}, {48, 80}, {1, 8}}, pools[] = {1, 5, 17};
  int i, j, h, b;
  size_t t, d;
  for (i = 0; i < 9; i++) {
    rdkv_config c = config_of(4, 2, dims[i % 3][0], dims[i % 3][1]);
    size_t n = 150, kd = (size_t)c.k_dim, vd = (size_t)c.v_dim;
    double *square = (double *)malloc(n * sizeof *square),
           *pooled = (double *)malloc(n * sizeof *pooled);
    problem p;
    c.pool = pools[i / 3], c.keep = 0.5; /* K over all tokens */
    p = problem_make(&c, (uint32_t)n, RDKV_F32, DENSE, 60 + (uint64_t)i);
    CHECK_OK(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes));
    CHECK_OK(rdkv_measure(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes));
    for (h = 0; h < 2; h++) {
      const rdkv_layer *x = &p.layer[0];
      const float *token = x->token + (size_t)h * n, *out = x->mean_out + (size_t)h * vd;
      const float *dv = x->v_distortion + (size_t)h * 5 * n,
                  *dk = x->k_distortion + (size_t)h * 4 * kd;
      test_where("dims %d/%d, pool %d, head %d", c.k_dim, c.v_dim, c.pool, h);
      for (t = 0; t < n; t++)
        for (square[t] = 0, d = 0; d < vd; d++) {
          double e = (double)p.v[0][(t * 2 + (size_t)h) * vd + d] - (double)out[d];
          square[t] += e * e;
        }
      ref_pool(square, pooled, (int)n, c.pool);
      for (t = 0; t < n; t++) {
        double low = HUGE_VAL, high = -HUGE_VAL, want = pooled[t] * (double)token[t];
        CHECK_LE(fabs((double)dv[t] - want), 1e-5 * want);
        for (d = 0; d < vd; d++) {
          double v = (double)p.v[0][(t * 2 + (size_t)h) * vd + d];
          low = v < low ? v : low, high = v > high ? v : high;
        }
        for (j = 1, b = 2; j < 4; j++, b *= 2) { /* half a step for each dim, halves apart */
          double step = (high - low) / ((1 << b) - 1) * 1.01 + 2e-3 * (fabs(low) + fabs(high));
          CHECK_LE(dv[(size_t)j * n + t], (double)token[t] * (double)vd * step * step / 4);
        }
        if (vd > 1) CHECK(dv[n + t] > dv[2 * n + t] && dv[2 * n + t] > dv[3 * n + t]);
        CHECK_LE(dv[4 * n + t], dv[3 * n + t]);
      }
      for (d = 0; d < kd; d++) {
        double mean = 0, sum = 0, scale = (double)p.cfg.softmax_scale;
        for (t = 0; t < n; t++) mean += (double)p.k[0][(t * 2 + (size_t)h) * kd + d] / (double)n;
        for (t = 0; t < n; t++) {
          double e = (double)p.k[0][(t * 2 + (size_t)h) * kd + d] - mean;
          sum += (double)dv[t] * e * e;
        }
        sum *= (double)x->q_square[(size_t)h * kd + d] * scale * scale;
        CHECK_LE(fabs((double)dk[d] - sum), 1e-4 * sum);
        CHECK(dk[kd + d] > dk[2 * kd + d] && dk[2 * kd + d] > dk[3 * kd + d]);
      }
    }
    free(square), free(pooled);
    problem_free(&p);
  }
}

static void score_case(const rdkv_config *cfg, uint32_t n, rdkv_dtype dtype, layout where,
                       uint64_t seed) {
  problem p = problem_make(cfg, n, dtype, where, seed);
  test_where("T %u, heads %d/%d, dims %d/%d, dtype %d, layout %d, window %d, pool %d, isa %s", n,
             p.cfg.n_q_heads, p.cfg.n_kv_heads, p.cfg.k_dim, p.cfg.v_dim, dtype, where,
             p.cfg.window, p.cfg.pool, isa_name(p.cfg.isa));
  problem_score(&p);
  compare_with_fp64(&p, 0);
  problem_free(&p);
}

static void shapes(void) {
  static const uint32_t tokens[] = {0, 1, 2, 31, 32, 33, 100, 513};
  static const int dims[] = {1, 8, 48, 80, 96, 112, 256}, groups[] = {1, 5, 7, 16};
  rdkv_config c;
  rdkv_isa isa;
  size_t i;
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
    for (i = 0; i < 8; i++) {
      c = config_of(4, 2, 64, 0), c.isa = isa;
      score_case(&c, tokens[i], RDKV_F32, DENSE, 10 + i);
      c.profile = RDKV_PAPER;
      score_case(&c, tokens[i], RDKV_F32, DENSE, 10 + i);
    }
    for (i = 0; i < 7; i++) {
      c = config_of(3, 3, dims[i], dims[6 - i]), c.isa = isa;
      score_case(&c, 70, RDKV_F32, DENSE, 30 + i);
    }
    for (i = 0; i < 4; i++) {
      c = config_of(2 * groups[i], 2, 48, 80), c.isa = isa;
      score_case(&c, 70, RDKV_F16, DENSE, 40 + i);
    }
  }
}

static void dtypes_and_layouts(void) {
  static const rdkv_dtype dtypes[] = {RDKV_F32, RDKV_F16, RDKV_BF16};
  rdkv_config c;
  rdkv_isa isa;
  int i, where;
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa))
    for (i = 0; i < 3; i++)
      for (where = 0; where < N_LAYOUTS; where++) {
        c = config_of(4, 2, 72, 40), c.isa = isa;
        score_case(&c, 77, dtypes[i], (layout)where, 7);
      }
}

static void windows_and_pools(void) {
  static const int windows[] = {1, 16, 64, 200}, pools[] = {1, 3, 17, 255};
  rdkv_config c;
  size_t i, j;
  for (i = 0; i < 4; i++)
    for (j = 0; j < 4; j++) {
      c = config_of(4, 2, 32, 0);
      c.window = windows[i], c.pool = pools[j];
      score_case(&c, 150, RDKV_F32, DENSE, 50 + i);
    }
  c = config_of(4, 2, 32, 0), c.window = 1024;
  score_case(&c, 5, RDKV_F32, DENSE, 60);
}

/* A scale that makes the softmax nearly one-hot, and one that makes it flat. */
static void softmax_scales(void) {
  static const float scales[] = {1e-4f, 1.0f, 4.0f};
  size_t i;
  for (i = 0; i < 3; i++) {
    rdkv_config c = config_of(4, 2, 32, 0);
    problem p;
    c.softmax_scale = scales[i];
    p = problem_make(&c, 90, RDKV_F32, DENSE, 70);
    test_where("softmax_scale %g", (double)scales[i]);
    problem_score(&p);
    if (i < 2)
      compare_with_fp64(&p, 0);
    else { /* logits in the hundreds: the rounding of a logit is the relative error of its weight */
      ref_scores r = ref_score(&p, 0, 0);
      CHECK_LE(worst(p.layer[0].token, r.token, 90, 1e-3), 2e-4);
      free(r.token);
    }
    problem_free(&p);
  }
}

/* ---- bad input ------------------------------------------------------------------------------- */

static void nonfinite(void) {
  static const rdkv_dtype dtypes[] = {RDKV_F32, RDKV_F16, RDKV_BF16};
  static const size_t at[] = {0, 1, 37, 38};
  rdkv_isa isa;
  int i, what, value, where;
  size_t j;
  for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa))
    for (i = 0; i < 3; i++)
      for (what = 0; what < 3; what++)
        for (value = 0; value < 4; value++)
          for (where = 0; where < 2; where++)
            for (j = 0; j < 5; j++) {
              rdkv_config c = config_of(2, 1, 19, 0);
              problem p;
              size_t count, place;
              float *x;
              c.isa = isa, c.window = 16;
              p = problem_make(&c, 40, dtypes[i], DENSE, 80);
              x = what == 0 ? p.k[0] : what == 1 ? p.v[0] : p.q[0];
              count = (what == 2 ? 16u * 2u : 40u) * 19u;
              place = j < 4 ? at[j] : count - 1;
              /* the fourth is finite, but K and V are stored in halves */
              x[place] = value == 0   ? NAN
                         : value == 1 ? INFINITY
                         : value == 2 ? -INFINITY
                                      : 70000.0f;
              mem_free(p.raw[0][0]), mem_free(p.raw[0][1]), mem_free(p.raw[0][2]);
              problem_tensors(&p, 0, dtypes[i], where ? EVERY_SECOND : DENSE);
              test_where("dtype %d, %s, value %d at %d, isa %s", dtypes[i],
                         what == 0   ? "K"
                         : what == 1 ? "V"
                                     : "Q",
                         value, (int)place, isa_name(isa));
              if (value < 3 || what < 2)
                CHECK_STATUS(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes),
                             RDKV_ERR_NONFINITE);
              if (what < 2) {
                float eps_k[3], eps_v[3];
                memset(eps_k, 0xa5, sizeof eps_k), memset(eps_v, 0xa5, sizeof eps_v);
                CHECK_STATUS(
                    rdkv_calibrate(&p.cfg, &p.kv[0], 40, eps_k, eps_v, p.scratch, p.scratch_bytes),
                    RDKV_ERR_NONFINITE);
                CHECK(mem_untouched(eps_k, sizeof eps_k) && mem_untouched(eps_v, sizeof eps_v));
              }
              problem_free(&p);
            }
}

static void bad_arguments(void) {
  rdkv_config c = config_of(4, 2, 32, 0);
  problem p = problem_make(&c, 50, RDKV_F32, DENSE, 90);
  size_t need = rdkv_layer_bytes(&p.cfg, 50), i;
  uint8_t *memory = (uint8_t *)mem_new(need + 64);
  float *before = new_floats(100);
  rdkv_layer layer;
  rdkv_kv kv;
  memset(&layer, 0xa5, sizeof layer);
  CHECK_STATUS(rdkv_layer_init(&p.cfg, 50, memory, need - 1, &layer), RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_layer_init(&p.cfg, 50, memory, 0, &layer), RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_layer_init(&p.cfg, 50, NULL, need, &layer), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_layer_init(NULL, 50, memory, need, &layer), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_layer_init(&p.cfg, 50, memory, need, NULL), RDKV_ERR_ARGUMENT);
  for (i = 4; i < 64; i *= 2)
    CHECK_STATUS(rdkv_layer_init(&p.cfg, 50, memory + i, need, &layer), RDKV_ERR_ALIGNMENT);
  CHECK(mem_untouched(memory, need + 64) && mem_untouched(&layer, sizeof layer));

  memcpy(before, p.layer[0].token, 100 * sizeof(float));
  CHECK_STATUS(rdkv_score(NULL, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_score(&p.cfg, NULL, &p.layer[0], p.scratch, p.scratch_bytes),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_score(&p.cfg, &p.kv[0], NULL, p.scratch, p.scratch_bytes), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], NULL, p.scratch_bytes), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes - 1),
               RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], (char *)p.scratch + 4, p.scratch_bytes),
               RDKV_ERR_ALIGNMENT);
  CHECK_STATUS(rdkv_measure(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes - 1),
               RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_measure(&p.cfg, &p.kv[0], &p.layer[0], (char *)p.scratch + 4, p.scratch_bytes),
               RDKV_ERR_ALIGNMENT);
  kv = p.kv[0], kv.k.data = NULL;
  CHECK_STATUS(rdkv_score(&p.cfg, &kv, &p.layer[0], p.scratch, p.scratch_bytes), RDKV_ERR_ARGUMENT);
  kv = p.kv[0], kv.v.data = NULL;
  CHECK_STATUS(rdkv_score(&p.cfg, &kv, &p.layer[0], p.scratch, p.scratch_bytes), RDKV_ERR_ARGUMENT);
  kv = p.kv[0], kv.q.data = NULL;
  CHECK_STATUS(rdkv_score(&p.cfg, &kv, &p.layer[0], p.scratch, p.scratch_bytes), RDKV_ERR_ARGUMENT);
  CHECK(memcmp(before, p.layer[0].token, 100 * sizeof(float)) == 0 &&
        "on error nothing is written");
  mem_free(before), mem_free(memory);
  problem_free(&p);
}

/* A size query either says 0 or at least what the arrays take; it never wraps around. */
static void sizes(void) {
  static const uint32_t tokens[] = {UINT32_MAX, UINT32_MAX - 31, UINT32_MAX / 2 + 1, 1u << 30};
  static const int heads[] = {1, 8, 1000, 65535};
  size_t i, j;
  for (i = 0; i < 4; i++)
    for (j = 0; j < 4; j++) {
      rdkv_config c = config_of(heads[j], 0, 256, 256);
      double floor_bytes = (double)tokens[i] * heads[j] * (4 + 20 + 1);
      size_t bytes;
      test_where("T %u, %d heads", tokens[i], heads[j]);
      CHECK_OK(rdkv_resolve(&c, &c));
      bytes = rdkv_layer_bytes(&c, tokens[i]);
      if (floor_bytes > (double)SIZE_MAX) CHECK_EQ(bytes, 0);
      CHECK(bytes == 0 || (double)bytes >= floor_bytes);
      if (bytes == 0) {
        rdkv_layer layer;
        void *memory = mem_new(64);
        CHECK(rdkv_layer_init(&c, tokens[i], memory, SIZE_MAX, &layer) == RDKV_ERR_OVERFLOW);
        mem_free(memory);
      }
    }
}

/* ---- calibration ----------------------------------------------------------------------------- */

/* Squared error of the paper's quantiser over x[0], x[step], ..., and its squared value. */
static void ref_fake_quantise(const float *x, int n, size_t step, int bits, double *error,
                              double *square) {
  float lo = FLT_MAX, hi = -FLT_MAX, levels = (float)((1 << bits) - 1), reciprocal = 1.0f / levels,
        scale, zp;
  float half_scale, half_zp;
  int i;
  for (i = 0; i < n; i++) {
    float a = x[(size_t)i * step];
    if (a < lo) lo = a;
    if (a > hi) hi = a;
  }
  scale = (hi - lo) * reciprocal;
  if (scale < 1e-8f) scale = 1e-8f;
  zp = -lo / scale;
  zp = nearbyintf(zp < 0.0f ? 0.0f : zp > levels ? levels : zp);
  half_scale = from_half(to_half(scale)), half_zp = from_half(to_half(zp));
  *error = *square = 0.0;
  for (i = 0; i < n; i++) {
    float a = x[(size_t)i * step], code = a / scale + zp;
    double e;
    code = nearbyintf(code < 0.0f ? 0.0f : code > levels ? levels : code);
    e = (double)((code - half_zp) * half_scale) - (double)a;
    *error += e * e, *square += (double)a * (double)a;
  }
}

/* The tables are those of the definition: sums of squared errors over sums of squares. */
static void calibration(void) {
  rdkv_config c = config_of(2, 2, 64, 48);
  problem p = problem_make(&c, 300, RDKV_F16, DENSE, 95);
  float eps_k[3] = {0}, eps_v[3] = {0};
  int i, h, j;
  CHECK_OK(rdkv_calibrate(&p.cfg, &p.kv[0], 300, eps_k, eps_v, p.scratch, p.scratch_bytes));
  for (i = 0; i < 3; i++) {
    double k_error = 0, k_square = 0, v_error = 0, v_square = 0, e, s;
    for (h = 0; h < 2; h++) {
      for (j = 0; j < 64; j++)
        ref_fake_quantise(p.k[0] + h * 64 + j, 300, 128, 2 << i, &e, &s), k_error += e,
            k_square += s;
      for (j = 0; j < 300; j++)
        ref_fake_quantise(p.v[0] + (j * 2 + h) * 48, 48, 1, 2 << i, &e, &s), v_error += e,
            v_square += s;
    }
    test_where("%d bits: K %g, V %g", 2 << i, (double)eps_k[i], (double)eps_v[i]);
    CHECK_LE(fabs((double)eps_k[i] / (k_error / k_square) - 1.0), 1e-4);
    CHECK_LE(fabs((double)eps_v[i] / (v_error / v_square) - 1.0), 1e-4);
  }
  problem_free(&p);
}

int main(void) {
  RUN(shapes);
  RUN(dtypes_and_layouts);
  RUN(windows_and_pools);
  RUN(measured);
  RUN(softmax_scales);
  RUN(nonfinite);
  RUN(bad_arguments);
  RUN(sizes);
  RUN(calibration);
  return test_done();
}
