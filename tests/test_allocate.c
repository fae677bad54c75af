/* >>allocate : the budget is met and never exceeded, more bytes never cost quality, and the widths
   depend on the weights alone. */
#include "problem.h"

static uint64_t budget_of(const rdkv_config *c, uint32_t n) {
  return c->budget_bytes ? c->budget_bytes
                         : (uint64_t)(c->keep * 2.0 * (double)c->n_layers * (double)n *
                                      (double)c->n_kv_heads * (double)(c->k_dim + c->v_dim));
}

static size_t bytes_of(const problem *p) {
  return rdkv_block_bytes(&p->cfg, p->layer, p->cfg.n_layers);
}

static int width_index(int bits) {
  return bits == 0 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : bits == 8 ? 3 : bits == 16 ? 4 : -1;
}

/* The sum of the distortions of the chosen widths, or (empty) of none kept. K of a head that keeps
   no token does not matter. */
static double predicted(const problem *p, int empty) {
  size_t n = p->n_tokens, kd = (size_t)p->cfg.k_dim, heads = (size_t)p->cfg.n_kv_heads, h, i;
  double sum = 0.0;
  int l, kept;
  for (l = 0; l < p->cfg.n_layers; l++) {
    const rdkv_layer *x = &p->layer[l];
    for (h = 0; h < heads; h++) {
      for (i = 0, kept = 0; i < n; i++) {
        int bits = empty ? 0 : x->v_bits[h * n + i];
        sum += (double)x->v_distortion[(h * 5 + (size_t)width_index(bits)) * n + i];
        kept |= bits;
      }
      for (i = 0; i < kd && kept; i++)
        sum +=
            (double)x->k_distortion[(h * 4 + (size_t)width_index(x->k_bits[h * kd + i])) * kd + i];
    }
  }
  return sum;
}

/* Only widths that exist, and bytes within the budget; returns the bytes. */
static size_t check_widths(const problem *p) {
  size_t i, bytes = bytes_of(p), wrong = 0;
  int l;
  for (l = 0; l < p->cfg.n_layers; l++) {
    for (i = 0; i < (size_t)p->cfg.n_kv_heads * p->n_tokens; i++)
      wrong += width_index(p->layer[l].v_bits[i]) < 0;
    for (i = 0; i < (size_t)(p->cfg.n_kv_heads * p->cfg.k_dim); i++) {
      int w = width_index(p->layer[l].k_bits[i]);
      wrong += w < 0 || w > 3;
    }
  }
  CHECK_EQ(wrong, 0);
  CHECK(bytes > 0);
  if (p->cfg.scope != RDKV_SCOPE_LAMBDA && p->cfg.max_error == 0.0)
    CHECK_LE(bytes, budget_of(&p->cfg, p->n_tokens));
  return bytes;
}

/* With another keep and scope; distortions as measured at first. */
static void reallocate(problem *p, double keep, rdkv_scope scope) {
  p->cfg.keep = keep, p->cfg.scope = scope;
  CHECK_OK(rdkv_resolve(&p->cfg, &p->cfg));
  CHECK_OK(problem_allocate(p));
}

/* Never over the budget; at 4096 tokens less than 0.5 % of it is left. */
static void budget_is_met(void) {
  static const double keeps[] = {0.025, 0.04, 0.065, 0.125, 0.25, 0.5};
  static const rdkv_scope scopes[] = {RDKV_SCOPE_MODEL, RDKV_SCOPE_LAYER, RDKV_SCOPE_HEAD};
  double worst_part = 0.0;
  size_t i, s;
  int dims;
  for (dims = 64; dims <= 128; dims += 64) {
    rdkv_config c = config_of(8, 8, dims, 0);
    problem p;
    c.n_layers = dims == 64 ? 2 : 1;
    p = problem_make(&c, 4096, RDKV_F16, DENSE, (uint64_t)dims);
    problem_score(&p);
    for (i = 0; i < 6; i++)
      for (s = 0; s < 3; s++) {
        double left, budget;
        test_where("dim %d, keep %g, scope %d", dims, keeps[i], scopes[s]);
        reallocate(&p, keeps[i], scopes[s]);
        budget = (double)budget_of(&p.cfg, 4096);
        left = (budget - (double)check_widths(&p)) / budget;
        CHECK_LE(left, 0.005);
        if (left > worst_part) worst_part = left;
      }
    problem_free(&p);
  }
  printf("at most %.3f %% of the budget is left at T 4096\n", 100.0 * worst_part);
}

/* Any byte count as the budget, short and long, awkward dims. */
static void any_budget(void) {
  static const uint32_t tokens[] = {1, 2, 31, 33, 300};
  uint64_t rng = 11;
  size_t i;
  int j, fits = 0;
  for (i = 0; i < 5; i++) {
    rdkv_config c = config_of(4, 2, i % 2 ? 80 : 33, i % 2 ? 17 : 96);
    problem p;
    c.n_layers = 2, c.positions = (int)(i % 2);
    p = problem_make(&c, tokens[i], RDKV_F32, DENSE, i);
    problem_score(&p);
    for (j = 0; j < 60; j++) {
      rdkv_status status;
      p.cfg.scope = (rdkv_scope)(j % 3);
      p.cfg.budget_bytes = 1 + rng_below(&rng, 2500 + tokens[i] * 2 * 2 * 113 * 2);
      test_where("T %u, budget %u, scope %d", tokens[i], (unsigned)p.cfg.budget_bytes, j % 3);
      status = problem_allocate(&p);
      CHECK(status == RDKV_OK || status == RDKV_ERR_BUDGET);
      if (status == RDKV_OK) check_widths(&p), fits++;
    }
    problem_free(&p);
  }
  CHECK(fits > 100);
}

/* The least budget holds header, records and tables with everything dropped; a byte less is refused
   and nothing is written. */
static void least_budget(void) {
  int i, scope;
  for (i = 0; i < 2; i++)
    for (scope = 0; scope < 3; scope++) {
      rdkv_config c = config_of(4, 2, 64, 0);
      problem p;
      size_t least;
      c.scope = (rdkv_scope)scope, c.n_layers = 2;
      p = problem_make(&c, i ? 100 : 0, RDKV_F32, DENSE, 12);
      problem_score(&p);
      problem_widths(&p, 1 | 32, 1); /* all dropped */
      least = bytes_of(&p);
      test_where("T %u, scope %d, least %d", p.n_tokens, scope, (int)least);
      p.cfg.budget_bytes = least;
      CHECK_OK(problem_allocate(&p));
      CHECK_LE(bytes_of(&p), least);
      problem_widths(&p, 8 | 128, 1);
      p.cfg.budget_bytes = least - 1;
      CHECK_STATUS(problem_allocate(&p), RDKV_ERR_BUDGET);
      CHECK(i == 0 || (p.layer[0].v_bits[0] == 8 && p.layer[1].k_bits[127] == 4));
      p.cfg.budget_bytes = 1;
      CHECK_STATUS(problem_allocate(&p), RDKV_ERR_BUDGET);
      problem_free(&p);
    }
}

/* A ladder of budgets: the predicted distortion never goes up. */
#define MONOTONE_SLACK 1e-12 /* rounding alone */

static void more_is_never_worse(void) {
  static const uint32_t tokens[] = {40, 300, 1500};
  size_t i;
  int scope;
  for (i = 0; i < 3; i++)
    for (scope = 0; scope < 3; scope++) {
      rdkv_config c = config_of(8, 4, 64, 48);
      problem p;
      double keep, before = HUGE_VAL, now;
      c.n_layers = 2, c.scope = (rdkv_scope)scope;
      p = problem_make(&c, tokens[i], RDKV_F32, DENSE, 13);
      problem_score(&p);
      for (keep = i ? 0.02 : 0.3; keep < 0.9; keep *= 1.1) {
        test_where("T %u, scope %d, keep %g", tokens[i], scope, keep);
        reallocate(&p, keep, c.scope);
        now = predicted(&p, 0);
        CHECK_LE(now, before * (1.0 + MONOTONE_SLACK));
        before = now;
      }
      problem_free(&p);
    }
}

/* One lambda for all is at least as good as one a layer, and that as one a head. */
static void wider_scopes_are_better(void) {
  rdkv_config c = config_of(8, 4, 64, 0);
  problem p;
  double model, layer, head;
  c.n_layers = 4;
  p = problem_make(&c, 1000, RDKV_F16, DENSE, 14);
  problem_score(&p);
  reallocate(&p, 0.1, RDKV_SCOPE_MODEL), model = predicted(&p, 0);
  reallocate(&p, 0.1, RDKV_SCOPE_LAYER), layer = predicted(&p, 0);
  reallocate(&p, 0.1, RDKV_SCOPE_HEAD), head = predicted(&p, 0);
  test_where("model %g, layer %g, head %g", model, layer, head);
  CHECK_LE(model, layer * 1.001), CHECK_LE(layer, head * 1.001);
  problem_free(&p);
}

/* Tokens in another order get the same widths and are stored with the same values, where neighbours
   play no part. */
static void permuted_tokens(void) {
  enum { N = 333, KD = 48, VD = 80, HEADS = 2 };
  rdkv_config c = config_of(4, HEADS, KD, VD);
  problem a, b;
  uint32_t order[N], i, j, t, n;
  uint64_t rng = 15;
  int h;
  float *k[2], *v[2];
  uint32_t *position[2], where[N];
  rdkv_segment s[2];
  c.positions = 1, c.keep = 0.3, c.pool = 1;
  a = problem_make(&c, N, RDKV_F32, DENSE, 15), b = problem_make(&c, N, RDKV_F32, DENSE, 15);
  for (i = 0; i < N; i++) order[i] = i;
  for (i = N - 1; i > 0; i--)
    j = rng_below(&rng, i + 1), t = order[i], order[i] = order[j], order[j] = t;
  CHECK_OK(rdkv_score(&a.cfg, &a.kv[0], &a.layer[0], a.scratch, a.scratch_bytes));
  for (i = 0; i < N; i++) { /* token i of b is token order[i] of a */
    memcpy(b.k[0] + i * HEADS * KD, a.k[0] + order[i] * HEADS * KD, HEADS * KD * sizeof(float));
    memcpy(b.v[0] + i * HEADS * VD, a.v[0] + order[i] * HEADS * VD, HEADS * VD * sizeof(float));
    for (h = 0; h < HEADS; h++)
      b.layer[0].token[h * N + (int)i] = a.layer[0].token[h * N + (int)order[i]];
  }
  memcpy(b.layer[0].q_square, a.layer[0].q_square, HEADS * KD * sizeof(float));
  memcpy(b.layer[0].k_square, a.layer[0].k_square, HEADS * KD * sizeof(float));
  memcpy(b.layer[0].mean_out, a.layer[0].mean_out, HEADS * VD * sizeof(float));
  for (i = 0; i < 3; i++) mem_free(b.raw[0][i]);
  problem_tensors(&b, 0, RDKV_F32, DENSE);
  CHECK_OK(rdkv_measure(&a.cfg, &a.kv[0], &a.layer[0], a.scratch, a.scratch_bytes));
  CHECK_OK(rdkv_measure(&b.cfg, &b.kv[0], &b.layer[0], b.scratch, b.scratch_bytes));
  CHECK_OK(problem_allocate(&a));
  CHECK_OK(problem_allocate(&b));
  for (h = 0; h < HEADS; h++)
    for (i = 0; i < N; i++)
      CHECK_EQ(b.layer[0].v_bits[h * N + (int)i], a.layer[0].v_bits[h * N + (int)order[i]]);
  CHECK(memcmp(a.layer[0].k_bits, b.layer[0].k_bits, HEADS * KD) == 0);
  CHECK_OK(problem_pack(&a));
  CHECK_OK(problem_pack(&b));
  CHECK_EQ(a.block_bytes, b.block_bytes);
  s[0] = problem_open(&a), s[1] = problem_open(&b);
  for (h = 0; h < HEADS; h++) {
    for (i = 0; i < 2; i++) {
      k[i] = new_floats(N * KD), v[i] = new_floats(N * VD),
      position[i] = (uint32_t *)mem_new(N * 4);
      CHECK_OK(rdkv_unpack(&s[i], 0, h, k[i], v[i], position[i], &n));
    }
    for (i = 0; i < n; i++) where[position[0][i]] = i;
    for (i = 0; i < n; i++) {
      j = where[order[position[1][i]]];
      CHECK(memcmp(v[1] + i * VD, v[0] + j * VD, VD * sizeof(float)) == 0);
      for (t = 0; t < KD; t++)
        CHECK_LE(fabs((double)k[1][i * KD + t] - (double)k[0][j * KD + t]),
                 2e-3 * (1.0 + fabs((double)k[0][j * KD + t])));
    }
    for (i = 0; i < 2; i++) mem_free(k[i]), mem_free(v[i]), mem_free(position[i]);
  }
  problem_free(&a), problem_free(&b);
}

/* The same twice; and where all tokens are alike the first ones are kept. */
static void ties(void) {
  enum { N = 200 };
  rdkv_config c = config_of(2, 1, 32, 0);
  problem p;
  uint8_t bits[N];
  int i, dropped = 0;
  c.keep = 0.08;
  p = problem_make(&c, N, RDKV_F32, DENSE, 16);
  for (i = 1; i < N; i++) {
    memcpy(p.k[0] + i * 32, p.k[0], 32 * sizeof(float));
    memcpy(p.v[0] + i * 32, p.v[0], 32 * sizeof(float));
  }
  for (i = 0; i < 3; i++) mem_free(p.raw[0][i]);
  problem_tensors(&p, 0, RDKV_F32, DENSE);
  problem_score(&p);
  for (i = 0; i < N; i++) p.layer[0].token[i] = 0.25f;
  for (i = 0; i < 32; i++) p.layer[0].mean_out[i] = 0.0f;
  CHECK_OK(rdkv_measure(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes));
  CHECK_OK(problem_allocate(&p));
  check_widths(&p);
  memcpy(bits, p.layer[0].v_bits, N);
  CHECK_OK(problem_allocate(&p));
  CHECK(memcmp(bits, p.layer[0].v_bits, N) == 0);
  for (i = 1; i < N; i++) CHECK(bits[i] <= bits[i - 1]), dropped += bits[i] == 0;
  CHECK(bits[0] > 0 && dropped > 0);
  problem_free(&p);
}

static void pins(void) {
  static const int widths[] = {2, 4, 8, 16};
  uint64_t rng = 17;
  int round, scope;
  for (round = 0; round < 12; round++)
    for (scope = 0; scope < 3; scope++) {
      rdkv_config c = config_of(4, 2, 64, 0);
      rdkv_pin pin[3];
      problem p;
      int i, l, h;
      uint32_t t, n = 400;
      rdkv_status status;
      c.n_layers = 2, c.scope = (rdkv_scope)scope, c.keep = round < 10 ? 0.15 : 0.02;
      for (i = 0; i < 3; i++) {
        pin[i].begin = rng_below(&rng, n),
        pin[i].end = pin[i].begin + rng_below(&rng, round < 10 ? 25 : 300);
        pin[i].min_bits = widths[round < 10 ? rng_below(&rng, 4) : 3];
        pin[i].share = 0;
      }
      if (round % 2) pin[1].share = 0.01f * (float)(1 + rng_below(&rng, 100));
      pin[0].begin = 0; /* sinks */
      if (round < 10) pin[0].end = 4;
      pin[2].begin = n - 8, pin[2].end = UINT32_MAX; /* the recent window, open-ended */
      c.pins = pin, c.n_pins = 3;
      p = problem_make(&c, n, RDKV_F32, DENSE, 17);
      problem_score(&p);
      status = problem_allocate(&p);
      test_where("round %d, scope %d", round, scope);
      CHECK_STATUS(status, round < 10 ? RDKV_OK : RDKV_ERR_BUDGET);
      if (status == RDKV_OK) {
        check_widths(&p);
        for (i = 0; i < 3; i++)
          for (l = 0; l < 2; l++)
            for (h = 0; h < 2; h++) {
              uint32_t in = 0, kept = 0;
              for (t = pin[i].begin; t < pin[i].end && t < n; t++)
                in++, kept += p.layer[l].v_bits[(uint32_t)h * n + t] >= pin[i].min_bits;
              CHECK_LE((pin[i].share > 0 ? (double)pin[i].share : 1.0) * in, kept);
            }
        CHECK_OK(problem_pack(&p));
      }
      problem_free(&p);
    }
}

/* A range that nobody looks at keeps its share, the tokens that matter most, and no more; without
   the pin it keeps nothing. */
static void share(void) {
  enum { N = 640, BEGIN = 64, END = 192 };
  static const float shares[] = {0.001f, 0.1f, 0.25f, 1};
  size_t i;
  for (i = 0; i <= 4; i++) {
    rdkv_config c = config_of(2, 2, 64, 0);
    rdkv_pin pin = {BEGIN, END, 4, RDKV_PIN_SYSTEM, 0};
    problem p;
    int h;
    c.keep = 0.1;
    if (i < 4) pin.share = shares[i], c.pins = &pin, c.n_pins = 1;
    p = problem_make(&c, N, RDKV_F32, DENSE, 19);
    problem_score(&p);
    for (h = 0; h < 2; h++) { /* all levels alike, so that only the order is left */
      float *d = p.layer[0].v_distortion + (size_t)h * 5 * N;
      uint32_t t, l;
      for (l = 0; l < 5; l++)
        for (t = BEGIN; t < END; t++) d[l * N + t] *= 1e-6f;
    }
    CHECK_OK(problem_allocate(&p));
    check_widths(&p);
    for (h = 0; h < 2; h++) {
      const float *d = p.layer[0].v_distortion + (size_t)h * 5 * N;
      const uint8_t *bits = p.layer[0].v_bits + (size_t)h * N;
      uint32_t t, kept = 0;
      float least = 1e30f, most = 0;
      test_where("share %d, head %d", (int)i, h);
      for (t = BEGIN; t < END; t++) {
        if (bits[t]) kept++;
        if (bits[t] && d[t] < least) least = d[t];
        if (!bits[t] && d[t] > most) most = d[t];
      }
      CHECK_LE(i < 4 ? (uint32_t)ceilf(shares[i] * (END - BEGIN)) : 0, kept);
      CHECK_LE(kept, i < 4 ? (uint32_t)ceilf(shares[i] * (END - BEGIN)) : 0);
      CHECK(kept == 0 || least >= most);
    }
    problem_free(&p);
  }
}

/* The error target is met, and with 3 % fewer bytes it would not be. */
static void error_target(void) {
  static const double targets[] = {0.3, 0.1, 0.02, 0.001};
  size_t i;
  int scope;
  for (i = 0; i < 4; i++)
    for (scope = 0; scope < 3; scope++) {
      rdkv_config c = config_of(4, 2, 64, 0);
      problem p;
      double empty;
      size_t bytes;
      c.n_layers = 2, c.scope = (rdkv_scope)scope, c.max_error = targets[i];
      p = problem_make(&c, 1000, RDKV_F32, DENSE, 18);
      problem_score(&p);
      test_where("max_error %g, scope %d", targets[i], scope);
      CHECK_OK(problem_allocate(&p));
      bytes = check_widths(&p);
      empty = predicted(&p, 1);
      CHECK_LE(predicted(&p, 0), targets[i] * empty * (1.0 + 1e-9));
      if (scope == RDKV_SCOPE_MODEL) {
        p.cfg.max_error = 0.0, p.cfg.budget_bytes = (uint64_t)(0.97 * (double)bytes);
        CHECK_OK(problem_allocate(&p));
        CHECK_LE(targets[i] * empty, predicted(&p, 0));
      }
      problem_free(&p);
    }
}

/* Each query head looks for one of `few` tokens, so that these have nearly all of a head's weight.
 */
static void look_for_few(problem *p, uint32_t few, uint64_t seed) {
  size_t kd = (size_t)p->cfg.k_dim, hq = (size_t)p->cfg.n_q_heads, hk = (size_t)p->cfg.n_kv_heads;
  size_t n = p->n_tokens, i, h, d;
  uint64_t rng = seed;
  double size = sqrt(128.0 / (double)kd);
  float *k = p->k[0], *v = p->v[0], *q = p->q[0];
  for (i = 0; i < n * hk * kd; i++) k[i] = (float)rng_normal(&rng);
  for (i = 0; i < n * hk * (size_t)p->cfg.v_dim; i++) v[i] = (float)rng_normal(&rng);
  for (i = 0; i < p->n_queries; i++)
    for (h = 0; h < hq; h++) {
      size_t t = (n / few * ((i * hq + h) % few) + 17) % n;
      const float *row = k + (t * hk + h / (hq / hk)) * kd;
      for (d = 0; d < kd; d++)
        q[(i * hq + h) * kd + d] = (float)(size * ((double)row[d] + 0.5 * rng_normal(&rng)));
    }
  memcpy(p->raw[0][0], k, n * hk * kd * sizeof *k);
  memcpy(p->raw[0][1], v, n * hk * (size_t)p->cfg.v_dim * sizeof *v);
  memcpy(p->raw[0][2], q, p->n_queries * hq * kd * sizeof *q);
}

/* The most that 32 tokens of one width, one width up, would save for a byte. */
static double best_tile(const problem *p) {
  size_t n = p->n_tokens, kd = (size_t)p->cfg.k_dim, h, i, j;
  uint32_t block = ((uint32_t)p->cfg.v_dim + 15) / 16 * 64;
  double best = 0.0;
  int l, w;
  for (l = 0; l < p->cfg.n_layers; l++)
    for (h = 0; h < (size_t)p->cfg.n_kv_heads; h++)
      for (w = 0; w < 4; w++) {
        const rdkv_layer *x = &p->layer[l];
        const float *d = x->v_distortion + (h * 5 + (size_t)w) * n;
        double gain[32] = {0}, sum = 0.0, cost = w ? (double)(block << w) : 2.0 * block + 128;
        uint32_t channels[4] = {0, 0, 0, 0};
        for (i = 0; i < kd; i++) channels[width_index(x->k_bits[h * kd + i])]++;
        for (j = 1; j < 4 && w == 0; j++) cost += (double)((channels[j] + 15) / 16 * (64u << j));
        for (i = 0; i < n; i++) {
          double g = (double)d[i] - (double)d[n + i];
          if (width_index(x->v_bits[h * n + i]) != w || g <= gain[31]) continue;
          for (j = 31; j > 0 && gain[j - 1] < g; j--) gain[j] = gain[j - 1];
          gain[j] = g;
        }
        for (j = 0; j < 32; j++) sum += gain[j];
        if (sum / cost > best) best = sum / cost;
      }
  return best;
}

/* Tokens are stored 32 at a time: few of great weight are worth it too, and where one head rests on
   them its output is right. */
static void few_tokens(void) {
  static const uint32_t few[] = {1, 5, 20, 40};
  double worst = 0.0, worst_tile = 0.0;
  size_t i;
  int dim;
  for (dim = 64; dim <= 128; dim += 64)
    for (i = 0; i < sizeof few / sizeof *few; i++) {
      rdkv_config c = config_of(8, 2, dim, 0);
      problem p;
      rdkv_segment s;
      rdkv_cache cache;
      double error, tile;
      size_t bytes;
      void *scratch;
      p = problem_make(&c, 3000, RDKV_F32, DENSE, 21);
      look_for_few(&p, few[i], i);
      problem_compress(&p);
      s = problem_open(&p);
      memset(&cache, 0, sizeof cache);
      cache.segments = &s, cache.n_segments = 1, cache.isa = p.cfg.isa;
      bytes = rdkv_measure_error_scratch(&p.cfg, p.n_tokens), scratch = mem_new(bytes);
      CHECK_OK(rdkv_measure_error(&p.cfg, &cache, 0, &p.kv[0], p.n_tokens, p.q[0], (int)p.n_queries,
                                  &error, scratch, bytes));
      tile = best_tile(&p) / p.layer[0].lambda;
      test_where("dim %d, %u tokens: error %g, a tile gains %g", dim, few[i], error, tile);
      CHECK_LE(error, 0.25), CHECK_LE(tile, 4.0);
      if (error > worst) worst = error;
      if (tile > worst_tile) worst_tile = tile;
      mem_free(scratch), problem_free(&p);
    }
  printf("few tokens: error at most %.3f, 32 tokens gain at most %.1f lambda\n", worst, worst_tile);
}

static void given_lambda(void) {
  rdkv_config c = config_of(4, 2, 64, 0);
  problem p;
  double lambda;
  size_t bytes, before = SIZE_MAX, at_budget;
  c.n_layers = 2;
  p = problem_make(&c, 1000, RDKV_F32, DENSE, 19);
  problem_score(&p);
  reallocate(&p, 0.1, RDKV_SCOPE_MODEL);
  at_budget = check_widths(&p), lambda = p.layer[0].lambda;
  CHECK(lambda > 0.0 && p.layer[1].lambda == lambda);
  p.cfg.scope = RDKV_SCOPE_LAMBDA, p.cfg.lambda = lambda;
  CHECK_OK(problem_allocate(&p));
  bytes = check_widths(&p);
  test_where("%d bytes for the budget, %d for its lambda", (int)at_budget, (int)bytes);
  CHECK_LE(fabs((double)bytes / (double)at_budget - 1.0), 0.05);
  for (lambda = 1e-12; lambda < 1e12; lambda *= 8.0) {
    test_where("lambda %g", lambda);
    p.cfg.lambda = lambda;
    CHECK_OK(problem_allocate(&p));
    bytes = check_widths(&p);
    CHECK_LE(bytes, before);
    before = bytes;
    CHECK(p.layer[0].lambda == lambda);
  }
  problem_widths(&p, 1 | 32, 1);
  CHECK_EQ(bytes, bytes_of(&p)); /* nothing is worth its bytes */
  problem_free(&p);
}

static void histograms(void) {
  rdkv_config c = config_of(4, 2, 64, 0);
  problem p;
  rdkv_histogram *h = (rdkv_histogram *)calloc(6, sizeof *h), *all = h + 4, *merged = h + 5;
  uint64_t full = 0;
  double before = HUGE_VAL, part, lambda, fixed;
  int i, b;
  c.n_layers = 4;
  p = problem_make(&c, 600, RDKV_F32, DENSE, 20);
  problem_score(&p);
  for (i = 0; i < 4; i++) {
    CHECK_OK(rdkv_histogram_add(&p.cfg, &p.layer[i], &h[i]));
    CHECK_OK(rdkv_histogram_add(&p.cfg, &p.layer[3 - i], all));
  }
  /* (0 + 1) + (2 + 3) is all of them added one by one, the other way round */
  rdkv_histogram_merge(&h[0], &h[1]), rdkv_histogram_merge(&h[2], &h[3]);
  rdkv_histogram_merge(merged, &h[2]), rdkv_histogram_merge(merged, &h[0]);
  CHECK(memcmp(merged, all, sizeof *all) == 0);
  for (b = 0; b < RDKV_HISTOGRAM_BINS; b++) full += all->bytes[b];
  CHECK(full > 0);
  problem_widths(&p, 1 | 32, 1);
  fixed = (double)bytes_of(&p);
  for (part = 0.01; part < 1.0; part *= 1.5) {
    double bytes, budget = part * (double)full;
    lambda = rdkv_histogram_lambda(all, (uint64_t)budget);
    test_where("part %g, lambda %g", part, lambda);
    CHECK_LE(lambda, before);
    before = lambda;
    /* Allocating at that lambda spends about as much. Less where whole tiles of 32 tokens are few;
       more where nearly all is bought, for a bin is 9 % wide and K grows with the kept tokens. */
    p.cfg.scope = RDKV_SCOPE_LAMBDA, p.cfg.lambda = lambda;
    CHECK_OK(problem_allocate(&p));
    bytes = (double)bytes_of(&p);
    if (part < 0.5) CHECK_LE(bytes, 1.25 * budget + fixed);
    if (part > 0.05) CHECK_LE(0.8 * budget, bytes);
  }
  CHECK(rdkv_histogram_lambda(all, full) <= rdkv_histogram_lambda(all, full - 1));
  free(h);
  problem_free(&p);
}

/* Every shape goes from K, V to a block within its budget, or says that the budget is too small. */
static void edge_shapes(void) {
  static const uint32_t tokens[] = {0, 1, 2, 31, 32, 33};
  static const int dims[] = {1, 8, 48, 80, 96, 112, 256}, groups[] = {1, 5, 7, 16};
  static const double keeps[] = {0.02, 0.3, 1.0};
  int i, j, k, ok = 0;
  for (i = 0; i < 6; i++)
    for (j = 0; j < 7; j++)
      for (k = 0; k < 6; k++) {
        rdkv_config c = config_of(groups[(i + j + k) % 4], 1, dims[j], dims[(i + j) % 7]);
        problem p;
        rdkv_status status;
        c.keep = keeps[k % 3], c.profile = k < 3 ? RDKV_JOINT : RDKV_PAPER;
        p = problem_make(&c, tokens[i], RDKV_F32, DENSE, 21);
        test_where("T %u, dims %d/%d, keep %g, profile %d", tokens[i], p.cfg.k_dim, p.cfg.v_dim,
                   keeps[k % 3], p.cfg.profile);
        problem_score(&p);
        status = problem_allocate(&p);
        CHECK(status == RDKV_OK || status == RDKV_ERR_BUDGET);
        if (status == RDKV_OK) {
          if (p.cfg.profile == RDKV_JOINT) check_widths(&p);
          CHECK_OK(problem_pack(&p));
          problem_open(&p);
          ok++;
        }
        problem_free(&p);
      }
  CHECK(ok > 100);
}

static void bad_arguments(void) {
  static const float wrong[] = {NAN, INFINITY, -1.0f};
  rdkv_config c = config_of(4, 2, 32, 0);
  problem p = problem_make(&c, 60, RDKV_F32, DENSE, 22);
  rdkv_layer *x = p.layer;
  float *fields[2], old;
  static const size_t counts[2] = {2 * 5 * 60, 2 * 4 * 32};
  size_t i, j, n = p.allocate_scratch_bytes;
  problem_score(&p);
  problem_widths(&p, 8 | 128, 1);
  fields[0] = x->v_distortion, fields[1] = x->k_distortion;
  for (i = 0; i < 2; i++)
    for (j = 0; j < 9; j++) {
      size_t at = j % 3 == 0 ? 0 : j % 3 == 1 ? counts[i] - 1 : counts[i] / 2;
      test_where("field %d, place %d, value %g", (int)i, (int)at, (double)wrong[j / 3]);
      old = fields[i][at], fields[i][at] = wrong[j / 3];
      CHECK_STATUS(problem_allocate(&p), RDKV_ERR_NONFINITE);
      fields[i][at] = old;
    }
  CHECK_STATUS(rdkv_allocate(NULL, x, 1, p.allocate_scratch, n), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_allocate(&p.cfg, NULL, 1, p.allocate_scratch, n), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_allocate(&p.cfg, x, -1, p.allocate_scratch, n), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_allocate(&p.cfg, x, 1, NULL, n), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_allocate(&p.cfg, x, 1, p.allocate_scratch, n - 1), RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_allocate(&p.cfg, x, 1, (char *)p.allocate_scratch + 4, n), RDKV_ERR_ALIGNMENT);
  for (i = 0; i < 120; i++) CHECK_EQ(x->v_bits[i], 8); /* on error nothing is written */
  for (i = 0; i < 64; i++) CHECK_EQ(x->k_bits[i], 4);
  {
    rdkv_histogram h;
    memset(&h, 0, sizeof h);
    CHECK_STATUS(rdkv_histogram_add(NULL, x, &h), RDKV_ERR_ARGUMENT);
    CHECK_STATUS(rdkv_histogram_add(&p.cfg, NULL, &h), RDKV_ERR_ARGUMENT);
    CHECK_STATUS(rdkv_histogram_add(&p.cfg, x, NULL), RDKV_ERR_ARGUMENT);
  }
  p.cfg.profile = RDKV_PAPER;
  CHECK_OK(rdkv_resolve(&p.cfg, &p.cfg));
  for (j = 0; j < 3; j++) { /* RDKV_PAPER goes by the weights themselves */
    old = x->token[77], x->token[77] = wrong[j];
    CHECK_STATUS(problem_allocate(&p), RDKV_ERR_NONFINITE);
    x->token[77] = old;
  }
  problem_free(&p);
}

int main(void) {
  RUN(budget_is_met);
  RUN(any_budget);
  RUN(least_budget);
  RUN(more_is_never_worse);
  RUN(wider_scopes_are_better);
  RUN(permuted_tokens);
  RUN(ties);
  RUN(pins);
  RUN(share);
  RUN(error_target);
  RUN(few_tokens);
  RUN(given_lambda);
  RUN(histograms);
  RUN(edge_shapes);
  RUN(bad_arguments);
  return test_done();
}
