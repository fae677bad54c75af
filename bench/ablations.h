/* ablations.h - what else one could do at the same bytes: variants of the joint profile at model
   scope that quality.c measures when asked (--methods model,ablations). bench/README.md has what
   they gave. All but the last two go through the library's own pack and attend. */
#ifndef ABLATIONS_H
#define ABLATIONS_H

#include "../examples/packed.h"

enum ablation {
  ABLATION_FLAT,   /* the window's queries weigh all alike */
  ABLATION_SQUARE, /* a token's weight is the root of its mean squared attention */
  ABLATION_MAX,    /* ... the most that a query of the window pays */
  ABLATION_ALONE,  /* |v - o|^2 of each token alone, not of its neighbourhood */
  ABLATION_PINS,   /* the first 4 and the last 32 tokens keep at least 4 bits in every head */
  ABLATION_PAIRS,  /* the two K channels that RoPE rotates get the same distortion */
  ABLATION_ROTATE, /* V rotated by a Hadamard matrix, the output rotated back */
  ABLATION_CLIP,   /* ranges shrunk to where the squared error is least; dense copy */
  ABLATION_SUMMARY /* one fp16 token for all that a head dropped; dense copy */
};

/* ---- the stages one by one ------------------------------------------------------------------- */

typedef struct stages {
  rdkv_config c;
  rdkv_layer layer[MODEL_LAYERS];
  rdkv_kv kv[MODEL_LAYERS];
  void *owner[MODEL_LAYERS + 1], *scratch;
  size_t scratch_bytes;
} stages;

static void stages_free(stages *s) {
  int l;
  for (l = 0; l <= MODEL_LAYERS; l++) free(s->owner[l]);
}

/* Scores all layers of a dense cache. want as for packed_init. */
static rdkv_status stages_score(stages *s, const kv_cache *dense, const rdkv_config *want) {
  const model *m = dense->m;
  uint32_t n = (uint32_t)dense->n;
  rdkv_status st;
  size_t bytes;
  int l;
  memset(s, 0, sizeof *s);
  s->c = *want;
  s->c.n_layers = m->n_layers, s->c.n_q_heads = m->n_heads, s->c.n_kv_heads = m->n_kv_heads;
  s->c.k_dim = m->head_dim;
  st = rdkv_resolve(&s->c, &s->c);
  if (st != RDKV_OK) return st;
  bytes = rdkv_layer_bytes(&s->c, n), s->scratch_bytes = rdkv_layer_scratch(&s->c, n);
  if (rdkv_allocate_scratch(&s->c, s->c.n_layers, n) > s->scratch_bytes)
    s->scratch_bytes = rdkv_allocate_scratch(&s->c, s->c.n_layers, n);
  s->scratch = packed__memory(s->scratch_bytes, &s->owner[MODEL_LAYERS]);
  for (l = 0; l < m->n_layers && st == RDKV_OK; l++) {
    void *memory = packed__memory(bytes, &s->owner[l]);
    s->kv[l] = packed_layer(dense, s->c.window, l);
    st = rdkv_layer_init(&s->c, n, memory, bytes, &s->layer[l]);
    if (st == RDKV_OK)
      st = rdkv_score(&s->c, &s->kv[l], &s->layer[l], s->scratch, s->scratch_bytes);
  }
  return st;
}

static rdkv_status stages_measure(stages *s, const rdkv_config *c) {
  rdkv_status st = RDKV_OK;
  int l;
  for (l = 0; l < c->n_layers && st == RDKV_OK; l++)
    st = rdkv_measure(c, &s->kv[l], &s->layer[l], s->scratch, s->scratch_bytes);
  return st;
}

/* ---- weights --------------------------------------------------------------------------------- */

/* Another weight of the tokens of one head from the attention a of each of the window's queries. */
static void ablation__weigh(const stages *s, const kv_cache *dense, int layer, int head, int which,
                            float *token) {
  const model *m = dense->m;
  int n = dense->n, window = s->c.window < n ? s->c.window : n, group = m->n_heads / m->n_kv_heads;
  int dim = m->head_dim, i, g, t, d;
  const float *k = dense->k + layer * dense->capacity * m->kv_dim + head * dim;
  float *a = (float *)malloc(2 * (size_t)n * sizeof *a), *sum = a + n;
  if (!a) exit(1);
  memset(sum, 0, (size_t)n * sizeof *sum);
  for (i = 0; i < window; i++) {
    for (g = 0; g < group; g++) {
      int at = n - window + i, seen = at + 1;
      const float *q =
          dense->q + (layer * dense->capacity + at) * m->dim + (head * group + g) * dim;
      float max = -1e30f, inv;
      for (t = 0; t < seen; t++) {
        for (a[t] = 0, d = 0; d < dim; d++) a[t] += q[d] * k[t * m->kv_dim + d];
        a[t] *= s->c.softmax_scale, max = a[t] > max ? a[t] : max;
      }
      inv = 1 / model__exp(a, seen, max);
      for (t = 0; t < seen; t++) {
        float x = a[t] * inv, by = (float)(t > n - window ? n - t : window);
        if (which == ABLATION_FLAT) sum[t] += x / by;
        if (which == ABLATION_SQUARE) sum[t] += x * x / by;
        if (which == ABLATION_MAX) sum[t] = x > sum[t] ? x : sum[t];
      }
    }
  }
  for (t = 0; t < n && which == ABLATION_SQUARE; t++) sum[t] = sqrtf(sum[t]);
  kv_pool(sum, n, s->c.pool, token);
  free(a);
}

/* ---- rotation -------------------------------------------------------------------------------- */

/* x [n] times the Hadamard matrix over sqrt(n), n a power of two: its own inverse. */
static void ablation__hadamard(float *x, int n) {
  int half, i, j;
  for (half = 1; half < n; half *= 2)
    for (i = 0; i < n; i += 2 * half)
      for (j = i; j < i + half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
  for (i = 0; i < n; i++) x[i] /= sqrtf((float)n);
}

/* packed_attend for a cache whose V is rotated. */
static void ablation_attend_rotated(void *context, int layer, int n, const int *position,
                                    const float *q, const float *k, const float *v, float *out) {
  const rdkv_config *c = &((packed *)context)->config;
  int dim = c->k_dim, kv_dim = c->n_kv_heads * dim, r, h;
  float *rotated = (float *)malloc((size_t)(n * kv_dim) * sizeof *rotated);
  if (!rotated) exit(1);
  memcpy(rotated, v, (size_t)(n * kv_dim) * sizeof *rotated);
  for (h = 0; h < n * c->n_kv_heads; h++) ablation__hadamard(rotated + h * dim, dim);
  packed_attend(context, layer, n, position, q, k, rotated, out);
  for (r = 0; r < n; r++)
    for (h = 0; h < c->n_q_heads; h++) ablation__hadamard(out + (r * c->n_q_heads + h) * dim, dim);
  free(rotated);
}

/* ---- dense copies of what was packed --------------------------------------------------------- */

/* Quantises x [n], stride apart, to b bits between ends that leave the least squared error, of 16
   that lie ever further inside. */
static void ablation__clip(float *x, int n, int stride, int bits) {
  float low = x[0], high = x[0], best_low, best_high;
  double best = -1;
  int top = (1 << bits) - 1, step, i;
  for (i = 1; i < n; i++) {
    low = x[i * stride] < low ? x[i * stride] : low;
    high = x[i * stride] > high ? x[i * stride] : high;
  }
  best_low = low, best_high = high;
  for (step = 0; step <= 16; step++) {
    float cut = (high - low) * 0.02f * (float)step, from = low + cut,
          scale = (high - low - 2 * cut) / (float)top;
    double error = 0;
    if (step == 16) from = best_low, scale = (best_high - best_low) / (float)top;
    for (i = 0; i < n && scale > 0; i++) {
      float code = rintf((x[i * stride] - from) / scale), y;
      y = from + scale * (code < 0 ? 0 : code > (float)top ? (float)top : code);
      if (step == 16) x[i * stride] = y;
      error += (double)(y - x[i * stride]) * (double)(y - x[i * stride]);
    }
    if (best < 0 || error < best)
      best = error, best_low = from, best_high = from + scale * (float)top;
  }
}

/* One head's kept tokens as a dense list, quantised anew with clipped ranges or with a token in
   place of those that were dropped. */
static void ablation__dense_head(const stages *s, const kv_cache *dense, int l, int h, int which,
                                 kv_list *list) {
  const model *m = dense->m;
  const uint8_t *v_bits = s->layer[l].v_bits + h * dense->n;
  const uint8_t *k_bits = s->layer[l].k_bits + h * m->head_dim;
  const float *weight = s->layer[l].token + h * dense->n;
  int dim = m->head_dim, i = l * m->n_kv_heads + h, kept = 0, t, d;
  float *k = list->k + i * list->capacity * dim, *v = list->v + i * list->capacity * dim;
  float sum_k[MODEL_HEAD] = {0}, sum_v[MODEL_HEAD] = {0}, sum = 0;
  for (t = 0; t < dense->n; t++) {
    int at = (l * dense->capacity + t) * m->kv_dim + h * dim;
    if (v_bits[t]) {
      kv_list_add(list, l, h, dense->k + at, dense->v + at);
      if (v_bits[t] < 16) ablation__clip(v + kept * dim, dim, 1, v_bits[t]);
      kept++;
    } else {
      sum += weight[t];
      for (d = 0; d < dim; d++)
        sum_k[d] += weight[t] * dense->k[at + d], sum_v[d] += weight[t] * dense->v[at + d];
    }
  }
  for (d = 0; d < dim && kept > 0; d++) {
    if (k_bits[d]) {
      ablation__clip(k + d, kept, dim, k_bits[d]);
    } else {
      float mean = 0;
      for (t = 0; t < kept; t++) mean += k[t * dim + d] / (float)kept;
      for (t = 0; t < kept; t++) k[t * dim + d] = mean;
    }
  }
  for (d = 0; d < dim && sum > 0; d++) sum_k[d] /= sum, sum_v[d] /= sum;
  if (which == ABLATION_SUMMARY && sum > 0) kv_list_add(list, l, h, sum_k, sum_v);
}

/* ---- all together ---------------------------------------------------------------------------- */

/* Makes the cache of one ablation: p, or for the last two list; *bytes of what it would store. */
static rdkv_status ablation_init(packed *p, kv_list *list, const kv_cache *dense, int which,
                                 const rdkv_config *want, int room, double *bytes) {
  const model *m = dense->m;
  kv_cache rotated = *dense;
  stages s;
  rdkv_config c = *want;
  rdkv_pin pin[2];
  rdkv_status st;
  size_t size = 0, tail_bytes, values = (size_t)(m->n_layers * dense->capacity * m->kv_dim);
  int l, h, d, j;

  memset(p, 0, sizeof *p);
  memset(pin, 0, sizeof pin);
  if (which == ABLATION_PINS) {
    pin[0].begin = 0, pin[0].end = 4, pin[0].min_bits = 4;
    pin[1].begin = (uint32_t)(dense->n > 32 ? dense->n - 32 : 0), pin[1].end = (uint32_t)dense->n;
    pin[1].min_bits = 4;
    c.pins = pin, c.n_pins = 2;
  }
  if (which == ABLATION_ROTATE) {
    rotated.v = (float *)malloc(values * sizeof(float));
    if (!rotated.v) return RDKV_ERR_MEMORY;
    memcpy(rotated.v, dense->v, values * sizeof(float));
    for (l = 0; l < m->n_layers; l++)
      for (h = 0; h < dense->n * m->n_kv_heads; h++)
        ablation__hadamard(rotated.v + l * dense->capacity * m->kv_dim + h * m->head_dim,
                           m->head_dim);
  }
  st = stages_score(&s, &rotated, &c);
  c = s.c;
  for (l = 0; l < m->n_layers && st == RDKV_OK && which <= ABLATION_MAX; l++)
    for (h = 0; h < m->n_kv_heads; h++)
      ablation__weigh(&s, dense, l, h, which, s.layer[l].token + h * dense->n);
  if (which == ABLATION_ALONE) c.pool = 1;
  if (st == RDKV_OK) st = stages_measure(&s, &c);
  for (l = 0; l < m->n_layers && which == ABLATION_PAIRS; l++)
    for (h = 0; h < m->n_kv_heads; h++)
      for (j = 0; j < 4; j++)
        for (d = 0; d < m->head_dim; d += 2) {
          float *k = s.layer[l].k_distortion + (h * 4 + j) * m->head_dim + d;
          k[0] = k[1] = (k[0] + k[1]) / 2;
        }
  if (st == RDKV_OK) st = rdkv_allocate(&s.c, s.layer, m->n_layers, s.scratch, s.scratch_bytes);
  if (st == RDKV_OK) size = rdkv_block_bytes(&s.c, s.layer, m->n_layers);
  *bytes = (double)size;
  if (st == RDKV_OK && which >= ABLATION_CLIP) {
    if (!kv_list_init(list, m, dense->n + 1 + room)) st = RDKV_ERR_MEMORY;
    for (l = 0; l < m->n_layers && st == RDKV_OK; l++)
      for (h = 0; h < m->n_kv_heads; h++) ablation__dense_head(&s, dense, l, h, which, list);
    if (which == ABLATION_SUMMARY) *bytes += 4.0 * m->n_layers * m->kv_dim;
  } else if (st == RDKV_OK) {
    p->config = s.c;
    tail_bytes = rdkv_tail_bytes(&s.c, (uint32_t)room, RDKV_F16);
    p->work_bytes = rdkv_attend_scratch(&s.c);
    p->block = packed__memory(size, &p->owner[0]);
    p->tail_memory = packed__memory(tail_bytes, &p->owner[1]);
    p->work = packed__memory(p->work_bytes, &p->owner[2]);
    st = rdkv_pack(&s.c, s.kv, s.layer, m->n_layers, 0, 0, p->block, size, &p->bytes, s.scratch,
                   s.scratch_bytes);
    if (st == RDKV_OK) st = rdkv_open(p->block, p->bytes, RDKV_VERIFY, p->segment);
    if (st == RDKV_OK)
      st = rdkv_tail_init(&s.c, (uint32_t)room, RDKV_F16, p->tail_memory, tail_bytes, &p->tail);
    p->cache.segments = p->segment, p->cache.n_segments = 1;
    p->cache.tail = &p->tail, p->cache.isa = s.c.isa;
  }
  if (rotated.v != dense->v) free(rotated.v);
  stages_free(&s);
  return st;
}

/* ---- a width that the format lacks ----------------------------------------------------------- */

/* Least distortion of all V tokens at `bytes`, widths free of tiles: lambda by bisection. d
   [unit][6] at 0, 2, 3, 4, 8, 16 bits; cost [6] bytes of a token; three: 3 bits may be used. */
static double ablation__least(const double (*d)[6], int n, const double *cost, double bytes,
                              int three) {
  double lo = -60, hi = 60, sum = 0; /* log2 of lambda */
  int step, i, l;
  for (step = 0; step < 60; step++) {
    double lambda = exp2((lo + hi) / 2), spent = 0;
    for (i = 0, sum = 0; i < n; i++) {
      int best = 0;
      for (l = 1; l < 6; l++)
        if ((l != 2 || three) && d[i][l] + lambda * cost[l] < d[i][best] + lambda * cost[best])
          best = l;
      spent += cost[best], sum += d[i][best];
    }
    if (spent > bytes)
      lo = (lo + hi) / 2;
    else
      hi = (lo + hi) / 2;
  }
  return sum;
}

/* Predicted distortion of V with a width of 3 bits over that without, at the same bytes. */
static double ablation_three_bits(const kv_cache *dense, const rdkv_config *want) {
  static const int LEVEL[6] = {0, 1, 1, 2, 3, 4};
  const model *m = dense->m;
  int n = dense->n, heads = m->n_layers * m->n_kv_heads, dim = m->head_dim, i, l, t, j;
  double(*d)[6] = (double(*)[6])malloc((size_t)(heads * n) * sizeof *d);
  double cost[6] = {0}, ratio, bytes;
  float row[MODEL_HEAD];
  stages s;
  rdkv_status st = stages_score(&s, dense, want);
  if (st == RDKV_OK) st = stages_measure(&s, &s.c);
  if (!d || st != RDKV_OK) exit(1);
  for (l = 1; l < 6; l++) /* with scale and mid, and K at 6 bits a channel */
    cost[l] = dim *
                  (l == 1   ? 2
                   : l == 2 ? 3
                   : l == 3 ? 4
                   : l == 4 ? 8
                            : 16) /
                  8.0 +
              4 + dim * 6 / 8.0;
  for (i = 0; i < heads; i++) {
    const rdkv_layer *y = &s.layer[i / m->n_kv_heads];
    int h = i % m->n_kv_heads, first = i / m->n_kv_heads * dense->capacity;
    for (t = 0; t < n; t++) {
      const float *v = dense->v + (first + t) * m->kv_dim + h * dim;
      double error = 0;
      float low = v[0], high = v[0], scale;
      for (l = 0; l < 6; l++) d[i * n + t][l] = (double)y->v_distortion[(h * 5 + LEVEL[l]) * n + t];
      for (j = 1; j < dim; j++) low = v[j] < low ? v[j] : low, high = v[j] > high ? v[j] : high;
      scale = (high - low) / 7;
      for (j = 0; j < dim && scale > 0; j++) {
        row[j] = low + scale * rintf((v[j] - low) / scale) - v[j];
        error += (double)(row[j] * row[j]);
      }
      d[i * n + t][2] = (double)y->token[h * n + t] * error;
    }
  }
  bytes = s.c.budget_bytes ? (double)s.c.budget_bytes : s.c.keep * heads * n * 4.0 * dim;
  ratio = ablation__least((const double(*)[6])d, heads * n, cost, bytes, 1) /
          ablation__least((const double(*)[6])d, heads * n, cost, bytes, 0);
  free(d);
  stages_free(&s);
  return ratio;
}

#endif /* ABLATIONS_H */
