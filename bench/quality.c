/* quality.c - what compression costs in answers: this library against the usual methods at equal
   bytes

     cc -O3 -fopenmp -o quality bench/quality.c -lm && ./quality

   One small model (examples/needle-4m.q8.bin), the same prompts for all, every byte counted. rdkv
   rows go through the library's pack and attend; the others quantise or evict in place, their
   scales kept in float, which can only flatter them. --help lists the options; README.md beside
   this has results.

   A question counts as right if greedy decoding would give exactly the answer. It is measured by
   forcing the right answer: the greedy answer is right if and only if each byte is the likeliest
   after the right ones before it. So all methods run as rows of one pass, and the divergence of
   their logits from those of the full cache (KL, in nats) is taken on the same inputs. The first
   byte of an answer comes from the prompt's own pass where the question is part of it, and is not
   measured. */

#define CLI_PROGRAM "quality"
#define RDKV_IMPLEMENTATION
#include "../examples/cli.h"
#include "../examples/packed.h"
#include "../examples/tasks.h"
#include "ablations.h"

#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#define STDERR_IS_TERMINAL isatty(2)
#else
#define STDERR_IS_TERMINAL 0
#endif

#define MAX_KEEPS 12
#define PROSE_BYTES 128          /* that follow the prompt of the prose task */
#define ROOM (PROSE_BYTES + 64)  /* tokens that a sequence may grow by */
#define N_TASKS (TASK_KINDS + 1) /* and prose */
#define PROSE TASK_KINDS

enum method {
  FULL,
  SNAPKV,
  SINK,
  H2O,
  ADAKV,
  SNAPKV_4,
  SNAPKV_2,
  KIVI_4,
  KIVI_2,
  Q8_0,
  Q4_0,
  RDKV_PAPER_,
  RDKV_HEAD,
  RDKV_LAYER,
  RDKV_MODEL,
  RDKV_STREAM,
  ABLATIONS, /* in the order of enum ablation */
  METHODS = ABLATIONS + ABLATION_SUMMARY + 1
};

static const struct {
  const char *name, *title, *colour;
  int fixed; /* its bytes do not depend on keep */
} METHOD[METHODS] = {
    {"full", "full fp16 cache", "#222222", 1},
    {"snapkv", "SnapKV, fp16", "#9aa0a6", 0},
    {"sink", "sinks + recent, fp16", "#c9ccd1", 0},
    {"h2o", "H2O, fp16", "#b39b7d", 0},
    {"adakv", "AdaKV, fp16", "#7fa37f", 0},
    {"snapkv4", "SnapKV + 4 bit", "#5b8fd9", 0},
    {"snapkv2", "SnapKV + 2 bit", "#8fbbe8", 0},
    {"kivi4", "KIVI, 4 bit", "#7b4fb5", 1},
    {"kivi2", "KIVI, 2 bit", "#b08fd9", 1},
    {"q8_0", "q8_0", "#444444", 1},
    {"q4_0", "q4_0", "#777777", 1},
    {"paper", "rdkv paper profile", "#e0962d", 0},
    {"head", "rdkv joint, head scope", "#f2b0a5", 0},
    {"layer", "rdkv joint, layer scope", "#e88474", 0},
    {"model", "rdkv joint, model scope", "#c8102e", 0},
    {"stream", "rdkv joint, layer by layer", "#8c1c2b", 0},
    {"flat", "  queries weigh alike", "#555555", 0},
    {"square", "  root mean square attention", "#555555", 0},
    {"max", "  largest attention", "#555555", 0},
    {"alone", "  tokens judged alone", "#555555", 0},
    {"pins", "  sinks and recent pinned", "#555555", 0},
    {"pairs", "  K widths by RoPE pair", "#555555", 0},
    {"rotate", "  V rotated", "#555555", 0},
    {"clip", "  clipped ranges", "#555555", 0},
    {"summary", "  summary token and clipped", "#555555", 0},
};

static const char *task_name(int kind) { return kind == PROSE ? "prose" : TASK_NAME[kind]; }

/* The tasks of which means are taken. */
static int is_mean_task(int kind) {
  return kind == TASK_MULTIKEY || kind == TASK_MULTIQUERY || kind == TASK_MULTIVALUE ||
         kind == TASK_KV;
}

typedef struct options {
  const char *model, *text, *svg, *map;
  int length, samples, window, pool, threads, agnostic, csv, n_keeps;
  int method[METHODS], task[N_TASKS]; /* 1: run it */
  double keep[MAX_KEEPS];
  uint64_t seed;
} options;

typedef struct result {
  double ratio, exact, kl, top1, bits; /* sums over n questions */
  int n;
} result;

static void *need(void *memory) {
  if (!memory) die("out of memory");
  return memory;
}

/* ---- the other methods: eviction and fake quantisation of a kv_list ---------------------------
 */

/* n values of x, stride apart, to b bits between their minimum and maximum. */
static void quantise(float *x, int n, int stride, int bits) {
  float low = x[0], high = x[0], scale;
  int i;
  for (i = 1; i < n; i++) {
    low = x[i * stride] < low ? x[i * stride] : low;
    high = x[i * stride] > high ? x[i * stride] : high;
  }
  scale = (high - low) / (float)((1 << bits) - 1);
  for (i = 0; i < n && scale > 0; i++)
    x[i * stride] = low + scale * rintf((x[i * stride] - low) / scale);
}

/* KIVI (arXiv 2402.02750): K by channel in groups of 32 tokens, V by token in groups of 32
   channels; the last `dense` tokens stay. Returns the bytes, with a half scale and minimum for each
   group. */
static double kivi(kv_list *list, int bits, int dense) {
  const model *m = list->m;
  int heads = m->n_layers * m->n_kv_heads, dim = m->head_dim, h;
  double bytes = 0;
  for (h = 0; h < heads; h++) {
    int n = list->n[h] - dense > 0 ? (list->n[h] - dense) : 0, t, d;
    float *k = list->k + h * list->capacity * dim, *v = list->v + h * list->capacity * dim;
    if (dense) n = n / 32 * 32;
    for (t = 0; t < n; t += 32)
      for (d = 0; d < dim; d++) quantise(k + t * dim + d, n - t < 32 ? n - t : 32, dim, bits);
    for (t = 0; t < n; t++)
      for (d = 0; d < dim; d += 32) quantise(v + t * dim + d, dim - d < 32 ? dim - d : 32, 1, bits);
    bytes += 2.0 * n * dim * bits / 8 + (n + 31) / 32 * dim * 4.0 + (dim + 31) / 32 * n * 4.0;
    bytes += (list->n[h] - n) * 4.0 * dim;
  }
  return bytes;
}

/* llama.cpp's blocks of 32 values with one half scale: q8_0 divides the largest by 127, q4_0 the
   largest in size by -8. */
static double ggml_blocks(kv_list *list, int bits) {
  const model *m = list->m;
  int heads = m->n_layers * m->n_kv_heads, h, side, i, j;
  double bytes = 0;
  for (h = 0; h < heads; h++) {
    int n = list->n[h] * m->head_dim;
    for (side = 0; side < 2; side++) {
      float *x = (side ? list->v : list->k) + h * list->capacity * m->head_dim;
      for (i = 0; i < n; i += 32) {
        float most = 0, scale;
        for (j = i; j < i + 32; j++) most = fabsf(x[j]) > fabsf(most) ? x[j] : most;
        if (most == 0) continue;
        scale = bits == 8 ? fabsf(most) / 127 : most / -8;
        for (j = i; j < i + 32; j++) {
          float code = rintf(x[j] / scale);
          x[j] = scale * (bits == 4 && code > 7 ? 7 : code);
        }
      }
    }
    bytes += 2.0 * n / 32 * (bits * 4 + 2);
  }
  return bytes;
}

/* ---- a prompt, and what every method makes of it ----------------------------------------------
 */

typedef struct prompt {
  kv_cache cache;
  float *window; /* [layer][kv head][n] attention of the last queries, pooled */
  float *all;    /* [layer][kv head][n] attention of all queries (H2O) */
  float *body;   /* the same of the body's queries on the body's tokens, [..][body_bytes] */
  int body_bytes;
  /* [MAX_KEEPS][n_layers] slopes for layer-by-layer compression: of the context before, and of this
     one */
  rdkv_histogram *earlier, *latest;
} prompt;

typedef struct variant {
  int method, keep; /* keep: index, 0 if the method has none */
  model_attention *attend;
  void *context;
  kv_list list;
  int *length; /* of the lists, before anything was appended */
  packed packed;
  double bytes, kl, bits;
  int wrong, agree;
} variant;

/* Attention that the scores of all eviction methods are made from. */
static void prompt_score(prompt *p, const options *o) {
  const model *m = p->cache.m;
  int n = p->cache.n, heads = m->n_kv_heads, begin = n > o->window ? n - o->window : 0, l, h, t;
  float *mass = (float *)need(malloc((size_t)(heads * n) * sizeof *mass));
  for (l = 0; l < m->n_layers; l++) {
    if (!kv_cache_mass(&p->cache, l, begin, mass)) die("out of memory");
    for (h = 0; h < heads; h++) kv_pool(mass + h * n, n, o->pool, p->window + (l * heads + h) * n);
    if (!o->method[H2O]) continue;
    if (!kv_cache_mass(&p->cache, l, p->body_bytes, mass)) die("out of memory");
    for (h = 0; h < heads; h++)
      for (t = 0; t < n; t++)
        p->all[(l * heads + h) * n + t] =
            mass[h * n + t] +
            (t < p->body_bytes ? p->body[(l * heads + h) * p->body_bytes + t] : 0);
  }
  free(mass);
}

/* AdaKV (arXiv 2407.11550): the heads of a layer share their tokens: the best scores of all, where
   a fifth is dealt out evenly first. keep [n_kv_heads] of this layer. */
static void adakv_share(const model *m, const float *score, int n, int window, int each,
                        int *keep) {
  kv__ranked *rank = (kv__ranked *)need(malloc((size_t)(m->n_kv_heads * n) * sizeof *rank));
  int left, all = 0, h, t, i;
  int base = each < window ? each : window + (each - window) / 5;
  for (h = 0; h < m->n_kv_heads; h++) {
    float sum = 0;
    for (t = 0; t < n; t++) sum += score[h * n + t];
    for (t = 0; t < n - window; t++, all++)
      rank[all].score = score[h * n + t] / sum, rank[all].token = h;
    keep[h] = base;
  }
  qsort(rank, (size_t)all, sizeof *rank, kv__by_score);
  left = (each - base) * m->n_kv_heads;
  { /* of the best ones, those beyond what a head has anyway */
    int *seen = (int *)need(calloc((size_t)m->n_kv_heads, sizeof *seen));
    for (i = 0; i < all && left > 0; i++) {
      h = rank[i].token;
      if (++seen[h] > keep[h] - window && keep[h] < n) keep[h]++, left--;
    }
    free(seen);
  }
  free(rank);
}

static void variant_is_list(variant *v) {
  size_t bytes = (size_t)(v->list.m->n_layers * v->list.m->n_kv_heads) * sizeof(int);
  v->length = (int *)need(malloc(bytes));
  memcpy(v->length, v->list.n, bytes);
  v->attend = kv_list_attend, v->context = &v->list;
}

static void variant_evict(variant *v, const prompt *p, const options *o, double budget) {
  const model *m = p->cache.m;
  int n = p->cache.n, heads = m->n_layers * m->n_kv_heads, dim = m->head_dim, l, h, t, capacity = n;
  int bits = v->method == SNAPKV_4 ? 4 : v->method == SNAPKV_2 ? 2 : 0;
  double token = bits ? dim * (bits / 4.0 + 0.25) : 4.0 * dim;
  int keep = METHOD[v->method].fixed ? n : (int)(budget / heads / token), *share;
  int window = o->window < n ? o->window : n, ok = 1;
  float *first = (float *)need(calloc((size_t)n, sizeof *first));
  if (bits) keep = keep < 32 ? 32 : keep / 32 * 32; /* whole groups */
  if (keep > n) keep = n;
  share = (int *)need(malloc((size_t)m->n_kv_heads * sizeof *share));
  for (t = 0; t < 4 && t < n; t++) first[t] = 1;
  if (v->method != ADAKV) capacity = keep;
  if (!kv_list_init(&v->list, m, capacity + ROOM)) die("out of memory");
  for (l = 0; l < m->n_layers; l++) {
    const float *score = p->window + l * m->n_kv_heads * n;
    for (h = 0; h < m->n_kv_heads; h++) share[h] = keep;
    if (v->method == ADAKV) adakv_share(m, score, n, window, keep, share);
    for (h = 0; h < m->n_kv_heads; h++) {
      const float *by = v->method == SINK  ? first
                        : v->method == H2O ? p->all + (l * m->n_kv_heads + h) * n
                                           : score + h * n;
      int always = v->method == SINK ? keep - 4 : v->method == H2O ? keep / 2 : window;
      ok &= kv_list_take(&v->list, &p->cache, l, h, by, share[h], always > 0 ? always : 0);
    }
  }
  if (!ok) die("out of memory");
  free(first), free(share);
  v->bytes = 0;
  for (h = 0; h < heads; h++) v->bytes += v->list.n[h] * 4.0 * dim;
  if (bits) v->bytes = kivi(&v->list, bits, 0);
  if (v->method == KIVI_4 || v->method == KIVI_2)
    v->bytes = kivi(&v->list, v->method == KIVI_4 ? 4 : 2, 128);
  if (v->method == Q8_0 || v->method == Q4_0)
    v->bytes = ggml_blocks(&v->list, v->method == Q8_0 ? 8 : 4);
  variant_is_list(v);
}

/* Makes the method's cache of a prompt. 0 if the budget is too small for it. */
static int variant_init(variant *v, int method, int keep, prompt *p, const options *o) {
  const model *m = p->cache.m;
  double full = 4.0 * p->cache.n * m->n_layers * m->kv_dim, budget = full * o->keep[keep] / 100;
  memset(v, 0, sizeof *v);
  v->method = method, v->keep = keep;
  if (method == FULL) {
    v->attend = kv_cache_attend, v->context = &p->cache, v->bytes = full;
  } else if (method < RDKV_PAPER_) {
    variant_evict(v, p, o, budget);
  } else if (method >= ABLATIONS) {
    rdkv_config want;
    rdkv_status st;
    memset(&want, 0, sizeof want);
    want.window = o->window, want.pool = o->pool, want.budget_bytes = (uint64_t)budget;
    st = ablation_init(&v->packed, &v->list, &p->cache, method - ABLATIONS, &want, ROOM, &v->bytes);
    if (st == RDKV_ERR_BUDGET) return 0;
    if (st != RDKV_OK)
      die("%s at %g %%: %s", METHOD[method].name, o->keep[keep], rdkv_status_string(st));
    v->attend = method == ABLATIONS + ABLATION_ROTATE ? ablation_attend_rotated : packed_attend;
    v->context = &v->packed;
    if (method - ABLATIONS >= ABLATION_CLIP) variant_is_list(v);
  } else {
    rdkv_config want;
    rdkv_status st;
    rdkv_histogram *by_layer = NULL;
    memset(&want, 0, sizeof want);
    want.window = o->window, want.pool = o->pool, want.budget_bytes = (uint64_t)budget;
    want.profile = method == RDKV_PAPER_ ? RDKV_PAPER : RDKV_JOINT;
    want.scope = method == RDKV_HEAD    ? RDKV_SCOPE_HEAD
                 : method == RDKV_LAYER ? RDKV_SCOPE_LAYER
                                        : RDKV_SCOPE_MODEL;
    if (method == RDKV_STREAM) {
      by_layer = p->latest + keep * m->n_layers;
      memcpy(by_layer, p->earlier + keep * m->n_layers, (size_t)m->n_layers * sizeof *by_layer);
    }
    st = packed_init(&v->packed, &p->cache, &want, by_layer, ROOM);
    if (st == RDKV_ERR_BUDGET) return 0;
    if (st != RDKV_OK)
      die("%s at %g %%: %s", METHOD[method].name, o->keep[keep], rdkv_status_string(st));
    v->bytes = (double)v->packed.bytes;
    v->attend = packed_attend, v->context = &v->packed;
  }
  return 1;
}

static void variant_rewind(variant *v) {
  if (v->attend == kv_list_attend)
    memcpy(v->list.n, v->length,
           (size_t)(v->list.m->n_layers * v->list.m->n_kv_heads) * sizeof(int));
  else if (v->attend != kv_cache_attend)
    rdkv_tail_rewind(&v->packed.tail, 0);
}

static void variant_free(variant *v) {
  if (v->attend == kv_list_attend)
    kv_list_free(&v->list), free(v->length);
  else if (v->attend != kv_cache_attend)
    packed_free(&v->packed);
}

/* ---- forcing an answer ------------------------------------------------------------------------
 */

typedef struct batch {
  variant *v;
  int n;
} batch;

/* model_attention of a batch: row r is the next token of variant r. */
static void batch_attend(void *context, int layer, int n, const int *position, const float *q,
                         const float *k, const float *v, float *out) {
  const batch *b = (const batch *)context;
  const model *m = ((const kv_cache *)b->v[0].context)->m;
  int r;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
  for (r = 0; r < n; r++)
    b->v[r].attend(b->v[r].context, layer, 1, position + r, q + r * m->dim, k + r * m->kv_dim,
                   v + r * m->kv_dim, out + r * m->dim);
}

static int likeliest(const float *logits, int n) {
  int best = 0, i;
  for (i = 1; i < n; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

static double log_sum(const float *logits, int n) {
  double sum = 0, max = logits[likeliest(logits, n)];
  int i;
  for (i = 0; i < n; i++) sum += exp(logits[i] - max);
  return max + log(sum);
}

/* Feeds text to every variant (the first is the full cache) from position on and compares what they
   think of text[measured..]. */
static void force(model *m, batch *b, int position, const char *text, int bytes, int measured,
                  float *logits) {
  uint8_t token[MODEL_ROWS];
  int at[MODEL_ROWS], i, r, c;
  for (i = 0; i + 1 < bytes; i++) {
    for (r = 0; r < b->n; r++) token[r] = (uint8_t)text[i], at[r] = position + i;
    model_forward(m, b->n, token, at, batch_attend, b, logits);
    if (i + 1 < measured) continue;
    for (r = 0; r < b->n; r++) {
      const float *row = logits + r * m->vocab;
      double sum = log_sum(row, m->vocab), full = log_sum(logits, m->vocab), kl = 0;
      for (c = 0; c < m->vocab; c++)
        kl += exp(logits[c] - full) * ((logits[c] - full) - (row[c] - sum));
      b->v[r].kl += kl;
      b->v[r].bits += (sum - row[(uint8_t)text[i + 1]]) / log(2.0);
      b->v[r].agree += likeliest(row, m->vocab) == likeliest(logits, m->vocab);
      b->v[r].wrong += likeliest(row, m->vocab) != (uint8_t)text[i + 1];
    }
  }
}

/* ---- the table --------------------------------------------------------------------------------
 */

static result results[N_TASKS][METHODS][MAX_KEEPS];

/* Mean over the tasks; returns the number of tasks with results. */
static int mean_of(int method, int keep, result *mean) {
  int kind, n = 0;
  memset(mean, 0, sizeof *mean);
  for (kind = 0; kind < N_TASKS; kind++) {
    const result *r = &results[kind][method][keep];
    if (!is_mean_task(kind) || r->n == 0) continue;
    mean->ratio += r->ratio / r->n, mean->exact += r->exact / r->n;
    mean->kl += r->kl / r->n, mean->top1 += r->top1 / r->n;
    mean->n += r->n, n++;
  }
  if (n) mean->ratio /= n, mean->exact /= n, mean->kl /= n, mean->top1 /= n;
  return n;
}

static void print_csv(const options *o) {
  int kind, method, k;
  printf("protocol,length,task,method,keep,bytes_ratio,exact,kl,top1,n,bits_per_byte\n");
  for (kind = 0; kind < N_TASKS; kind++) {
    for (k = 0; k < o->n_keeps; k++) {
      for (method = 0; method < METHODS; method++) {
        const result *r = &results[kind][method][k];
        double n = r->n;
        if (!r->n) continue;
        printf("%s,%d,%s,%s,%.4f,%.5f,%.4f,%.5f,%.4f,%d,%.4f\n", o->agnostic ? "agnostic" : "aware",
               o->length, task_name(kind), METHOD[method].name,
               METHOD[method].fixed ? r->ratio / n : o->keep[k] / 100, r->ratio / n, r->exact / n,
               r->kl / n, r->top1 / n, r->n, r->bits / n);
      }
    }
  }
}

static void print_table(const options *o) {
  int kind, method, k;
  for (k = -1; k < o->n_keeps; k++) {
    if (k < 0)
      printf(
          "\n%d bytes of context, question %s; exact answers by task, KL as the mean of *\n%-28s "
          "bytes",
          o->length, o->agnostic ? "unknown when compressing" : "in the compressed prompt", "");
    else
      printf("keep %g %%", o->keep[k]);
    for (kind = 0; kind < TASK_KINDS && k < 0; kind++)
      if (o->task[kind]) printf(" %9.9s%s", task_name(kind), is_mean_task(kind) ? "*" : " ");
    if (k < 0) printf("   mean*     KL* %s", o->task[PROSE] ? " prose KL  bits" : "");
    putchar('\n');
    for (method = 0; method < METHODS; method++) {
      int at = k < 0 ? 0 : k;
      result mean;
      double ratio = 0;
      if (!o->method[method] || METHOD[method].fixed != (k < 0)) continue;
      for (kind = 0; kind < N_TASKS; kind++)
        if (results[kind][method][at].n)
          ratio = results[kind][method][at].ratio / results[kind][method][at].n;
      if (ratio == 0) continue;
      printf("%-26s %5.2f%%", METHOD[method].title, 100 * ratio);
      for (kind = 0; kind < TASK_KINDS; kind++) {
        const result *r = &results[kind][method][at];
        if (o->task[kind]) printf(" %9.3f ", r->n ? r->exact / r->n : 0.0);
      }
      if (mean_of(method, at, &mean)) printf("  %6.3f %7.4f", mean.exact, mean.kl);
      if (results[PROSE][method][at].n) {
        const result *r = &results[PROSE][method][at];
        printf("  %7.4f %5.3f", r->kl / r->n, r->bits / r->n);
      }
      putchar('\n');
    }
  }
}

/* ---- pictures ---------------------------------------------------------------------------------
 */

static FILE *svg_open(const char *path, int width, int height) {
  FILE *f = fopen(path, "w");
  if (!f) die("%s: cannot be written", path);
  fprintf(
      f,
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" "
      "font-family=\"Helvetica,Arial,sans-serif\" font-size=\"12\" fill=\"#333\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
      width, height, width, height);
  return f;
}

#define PLOT_WIDTH 380
#define PLOT_HEIGHT 300
#define PLOT_TOP 50

/* Bytes kept, as a part of the fp16 cache, from 2 % to 100 % on a logarithmic axis. */
static double plot_x(double left, double ratio) {
  return left + PLOT_WIDTH * log(ratio / 0.02) / log(1 / 0.02);
}

static double plot_y(int kl,
                     double value) { /* exact from 0 to 1; KL from 1e-4 to 10, logarithmic */
  double part = kl ? log(value / 1e-4) / log(1e5) : value;
  part = part < 0 ? 0 : part > 1 ? 1 : part;
  return PLOT_TOP + PLOT_HEIGHT * (1 - part);
}

static void save_curves(const options *o) {
  static const double x_tick[] = {0.02, 0.05, 0.1, 0.2, 0.5, 1};
  FILE *f = svg_open(o->svg, 1120, 410);
  int kl, method, k, i;
  for (kl = 0; kl < 2; kl++) {
    double left = kl ? 520 : 60;
    fprintf(f, "<text x=\"%g\" y=\"28\" font-size=\"15\" font-weight=\"bold\">%s</text>\n", left,
            kl ? "KL divergence from the full cache (nats)" : "Questions answered exactly");
    for (i = 0; i < 6; i++) {
      double x = plot_x(left, x_tick[i]);
      fprintf(f,
              "<path d=\"M%.1f %d V%d\" stroke=\"#eee\"/><text x=\"%.1f\" y=\"%d\" "
              "text-anchor=\"middle\">%g %%</text>\n",
              x, PLOT_TOP, PLOT_TOP + PLOT_HEIGHT, x, PLOT_TOP + PLOT_HEIGHT + 18, 100 * x_tick[i]);
    }
    for (i = 0; i < 6; i++) {
      double value = kl ? 1e-4 * pow(10, i) : i / 5.0, y = plot_y(kl, value);
      fprintf(f,
              "<path d=\"M%g %.1f h%d\" stroke=\"#eee\"/><text x=\"%g\" y=\"%.1f\" "
              "text-anchor=\"end\">%g</text>\n",
              left, y, PLOT_WIDTH, left - 6, y + 4, value);
    }
    fprintf(f,
            "<text x=\"%g\" y=\"%d\" text-anchor=\"middle\">bytes kept, of the fp16 cache</text>\n",
            left + PLOT_WIDTH / 2.0, PLOT_TOP + PLOT_HEIGHT + 40);
    for (method = 1; method < METHODS; method++) {
      const char *colour = METHOD[method].colour;
      double width = method == RDKV_MODEL ? 3.5 : method >= RDKV_PAPER_ ? 2 : 1.5;
      int points = 0;
      fprintf(
          f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"%g\" stroke-linejoin=\"round\" d=\"",
          colour, width);
      for (k = 0; k < o->n_keeps; k++) {
        result mean;
        if (mean_of(method, k, &mean))
          fprintf(f, "%c%.1f %.1f", points++ ? 'L' : 'M', plot_x(left, mean.ratio),
                  plot_y(kl, kl ? mean.kl : mean.exact));
      }
      fputs("\"/>\n", f);
      for (k = 0; k < o->n_keeps; k++) {
        result mean;
        if (mean_of(method, k, &mean))
          fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\"/>\n",
                  plot_x(left, mean.ratio), plot_y(kl, kl ? mean.kl : mean.exact),
                  METHOD[method].fixed ? 4.5 : width + 0.8, colour);
      }
    }
  }
  for (method = METHODS - 1, i = 0; method > 0; method--) {
    result mean;
    if (!mean_of(method, 0, &mean) && !mean_of(method, o->n_keeps - 1, &mean)) continue;
    fprintf(
        f, "<circle cx=\"930\" cy=\"%d\" r=\"5\" fill=\"%s\"/><text x=\"944\" y=\"%d\">%s</text>\n",
        60 + 20 * i, METHOD[method].colour, 64 + 20 * i, METHOD[method].title);
    i++;
  }
  fputs("</svg>\n", f);
  fclose(f);
}

/* Height-wise shares of the widths among n units, as a bar of the path of one width. */
static void map_bar(FILE *f, const uint8_t *bits, int n, int width, double x, double y, double w) {
  int below = 0, count = 0, i;
  for (i = 0; i < n; i++) below += bits[i] > width, count += bits[i] == width;
  if (count)
    fprintf(f, "M%.4g %.4gh%.3gv%.3gh-%.3gz", x, y + 18.0 * (n - below - count) / n, w,
            18.0 * count / n, w);
}

/* Which tokens and channels of what the cache holds get which width, by layer and head. */
static void save_map(const kv_cache *cache, const options *o) {
  static const char *const COLOUR[5] = {"#eceff1", "#a6cee3", "#4292c6", "#084594", "#d94801"};
  static const int WIDTH[5] = {0, 2, 4, 8, 16};
  const model *m = cache->m;
  int n = cache->n, heads = m->n_layers * m->n_kv_heads, h, i, w, bins = 190;
  stages s;
  rdkv_config c;
  rdkv_status st;
  FILE *f;
  memset(&c, 0, sizeof c);
  c.window = o->window, c.pool = o->pool, c.keep = o->keep[o->n_keeps / 2] / 100;
  st = stages_score(&s, cache, &c);
  if (st == RDKV_OK) st = stages_measure(&s, &s.c);
  if (st == RDKV_OK) st = rdkv_allocate(&s.c, s.layer, m->n_layers, s.scratch, s.scratch_bytes);
  if (st != RDKV_OK) die("--map: %s", rdkv_status_string(st));

  f = svg_open(o->map, 1120, 90 + 22 * heads);
  fprintf(
      f,
      "<text x=\"70\" y=\"24\" font-size=\"15\" font-weight=\"bold\">Widths at %g %% of the bytes: "
      "%d V tokens</text><text x=\"860\" y=\"24\" font-size=\"15\" font-weight=\"bold\">%d K "
      "channels</text>\n",
      100 * c.keep, n, m->head_dim);
  for (h = 0; h < heads; h++)
    fprintf(f, "<text x=\"62\" y=\"%d\" text-anchor=\"end\">%d.%d</text>\n", 54 + 22 * h,
            h / m->n_kv_heads, h % m->n_kv_heads);
  for (w = 0; w < 5; w++) {
    fprintf(f, "<path fill=\"%s\" d=\"", COLOUR[w]);
    for (h = 0; h < heads; h++) {
      const rdkv_layer *y = &s.layer[h / m->n_kv_heads];
      const uint8_t *v = y->v_bits + (h % m->n_kv_heads) * n;
      const uint8_t *k = y->k_bits + (h % m->n_kv_heads) * m->head_dim;
      for (i = 0; i < bins; i++) {
        int first = (int)((double)n * i / bins), end = (int)((double)n * (i + 1) / bins);
        map_bar(f, v + first, end - first, WIDTH[w], 70 + 4 * i, 40 + 22 * h, 4);
      }
      for (i = 0; i < m->head_dim; i++)
        map_bar(f, k + i, 1, WIDTH[w], 860 + 240.0 / m->head_dim * i, 40 + 22 * h,
                240.0 / m->head_dim);
    }
    fputs("\"/>\n", f);
    fprintf(
        f,
        "<rect x=\"%d\" y=\"%d\" width=\"14\" height=\"14\" fill=\"%s\"/><text x=\"%d\" y=\"%d\">"
        "%d bits</text>\n",
        70 + 90 * w, 58 + 22 * heads, COLOUR[w], 90 + 90 * w, 70 + 22 * heads, WIDTH[w]);
  }
  fprintf(
      f,
      "<text x=\"560\" y=\"%d\">rows: layer.head; left to right: position in the prompt</text>\n"
      "</svg>\n",
      70 + 22 * heads);
  fclose(f);
  stages_free(&s);
}

/* ---- main -------------------------------------------------------------------------------------
 */

/* Takes the next word of a list with commas; 0 if it is empty or too long. */
static int split(const char **at, char *word, int room) {
  int n = (int)strcspn(*at, ",");
  if (n == 0 || n >= room) return 0;
  memcpy(word, *at, (size_t)n), word[n] = 0;
  *at += n + ((*at)[n] == ',');
  return 1;
}

static void usage(const options *o) {
  int i;
  printf(
      "usage: quality [options]\n"
      "  --length N     bytes of context (%d)\n"
      "  --samples N    contexts a task (%d)\n"
      "  --seed N       of the first (%d)\n"
      "  --keep LIST    budgets in %% of the fp16 cache (2.5,4,6.5,10,25)\n"
      "  --protocol P   aware: the question is part of the compressed prompt; agnostic: it comes "
      "after\n"
      "  --window N     queries that score (%d)   --pool N  tokens to average over (%d)\n"
      "  --model FILE   --text FILE   --threads N\n"
      "  --csv          instead of the table\n"
      "  --svg FILE     curves of exact match and KL against bytes\n"
      "  --map FILE     the widths that model scope chooses for the first prompt (aware) at the "
      "middle budget\n"
      "  --methods LIST ",
      o->length, o->samples, (int)o->seed, o->window, o->pool);
  for (i = 0; i < METHODS; i++) printf("%s%s", i ? "," : "", METHOD[i].name);
  printf("\n                 ablations: all from flat on, variants of model\n  --tasks LIST   ");
  for (i = 0; i < N_TASKS; i++) printf("%s%s", i ? "," : "", task_name(i));
  putchar('\n');
  exit(0);
}

static void parse(int argc, char **argv, options *o) {
  int i, j;
  char word[32];
  for (i = 1; i < argc; i++) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(name, "--help") == 0) usage(o);
    if (strcmp(name, "--csv") == 0) {
      o->csv = 1;
      continue;
    }
    if (!value) die("%s: unknown, or without its value; see --help", name);
    i++;
    if (strcmp(name, "--length") == 0)
      o->length = number(value, 512, 1 << 15);
    else if (strcmp(name, "--samples") == 0)
      o->samples = number(value, 1, 1000000);
    else if (strcmp(name, "--seed") == 0)
      o->seed = (uint64_t)number(value, 0, 1 << 30);
    else if (strcmp(name, "--window") == 0)
      o->window = number(value, 1, 1024);
    else if (strcmp(name, "--pool") == 0)
      o->pool = number(value, 1, 255);
    else if (strcmp(name, "--threads") == 0)
      o->threads = number(value, 1, 1024);
    else if (strcmp(name, "--model") == 0)
      o->model = value;
    else if (strcmp(name, "--text") == 0)
      o->text = value;
    else if (strcmp(name, "--svg") == 0)
      o->svg = value;
    else if (strcmp(name, "--map") == 0)
      o->map = value;
    else if (strcmp(name, "--protocol") == 0) {
      o->agnostic = strcmp(value, "agnostic") == 0;
      if (!o->agnostic && strcmp(value, "aware") != 0) die("--protocol is aware or agnostic");
    } else if (strcmp(name, "--keep") == 0) {
      for (o->n_keeps = 0; *value; o->n_keeps++) {
        char *end;
        if (o->n_keeps == MAX_KEEPS || !split(&value, word, 32))
          die("--keep: at most %d", MAX_KEEPS);
        o->keep[o->n_keeps] = strtod(word, &end);
        if (*end || !(o->keep[o->n_keeps] > 0 && o->keep[o->n_keeps] <= 100))
          die("--keep: %s", word);
      }
      if (o->n_keeps == 0) die("--keep is empty");
    } else if (strcmp(name, "--methods") == 0) {
      memset(o->method, 0, sizeof o->method);
      while (*value) {
        if (!split(&value, word, 32)) die("--methods");
        if (strcmp(word, "ablations") == 0) {
          for (j = ABLATIONS; j < METHODS; j++) o->method[j] = 1;
          continue;
        }
        for (j = 0; j < METHODS && strcmp(word, METHOD[j].name) != 0; j++) {
        }
        if (j == METHODS) die("unknown method %s", word);
        o->method[j] = 1;
      }
    } else if (strcmp(name, "--tasks") == 0) {
      memset(o->task, 0, sizeof o->task);
      while (*value) {
        if (!split(&value, word, 32)) die("--tasks");
        for (j = 0; j < N_TASKS && strcmp(word, task_name(j)) != 0; j++) {
        }
        if (j == N_TASKS) die("unknown task %s", word);
        o->task[j] = 1;
      }
    } else
      die("unknown option %s; see --help", name);
  }
  o->method[FULL] = 1; /* what the others are compared with */
}

/* All methods' caches of what the prompt holds now. */
static void batch_init(batch *b, prompt *p, const options *o) {
  int plan[METHODS * MAX_KEEPS][2], n = 0, method, k, i;
  prompt_score(p, o);
  for (method = 0; method < METHODS; method++)
    for (k = 0; o->method[method] && k < (METHOD[method].fixed ? 1 : o->n_keeps); k++, n++)
      plan[n][0] = method, plan[n][1] = k;
  if (n > MODEL_ROWS) die("too many methods and budgets at once");
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
  for (i = 0; i < n; i++)
    if (!variant_init(&b->v[i], plan[i][0], plan[i][1], p, o)) b->v[i].attend = NULL;
  for (b->n = 0, i = 0; i < n; i++) { /* close the gaps; contexts point into their own variant */
    variant *v = &b->v[b->n];
    if (!b->v[i].attend) continue;
    if (i != b->n) {
      *v = b->v[i];
      if (v->attend == kv_list_attend) {
        v->context = &v->list;
      } else if (v->attend != kv_cache_attend) {
        v->context = &v->packed;
        v->packed.cache.segments = v->packed.segment, v->packed.cache.tail = &v->packed.tail;
      }
    }
    b->n++;
  }
}

static void batch_free(batch *b) {
  int i;
  for (i = 0; i < b->n; i++) variant_free(&b->v[i]);
}

/* Forces one answer on all variants and books what came out. */
static void measure(model *m, batch *b, const prompt *p, const options *o, int kind,
                    const char *question, const char *answer, int first_wrong, float *logits) {
  char text[1024];
  int i, begin = o->agnostic ? (int)strlen(question) : 0, bytes, measured;
  snprintf(text, sizeof text, "%s%s", o->agnostic ? question : "", answer);
  bytes = (int)strlen(text);
  measured = begin > 0 ? begin : 1;
  for (i = 0; i < b->n; i++) {
    variant_rewind(&b->v[i]);
    b->v[i].kl = b->v[i].bits = 0, b->v[i].agree = 0, b->v[i].wrong = first_wrong;
  }
  force(m, b, p->cache.n, text, bytes, measured, logits);
  for (i = 0; i < b->n; i++) {
    const variant *v = &b->v[i];
    result *r = &results[kind][v->method][v->keep];
    r->ratio += v->bytes / (4.0 * p->cache.n * m->n_layers * m->kv_dim);
    r->exact += v->wrong == 0;
    r->kl += v->kl / (bytes - measured), r->top1 += (double)v->agree / (bytes - measured);
    r->bits += v->bits / (bytes - measured);
    r->n++;
  }
}

int main(int argc, char **argv) {
  static const double default_keep[] = {2.5, 4, 6.5, 10, 25};
  static options o;
  static model m;
  static prompt p;
  static batch b;
  const char *error;
  char *text;
  size_t text_bytes = 0, slopes;
  float *logits;
  double three_bits[MAX_KEEPS] = {0};
  int three_bits_n = 0, sample, kind, q, i, room, done = 0, all = 0, show = STDERR_IS_TERMINAL;
  time_t start;

  o.length = 4096, o.samples = 16, o.window = 64, o.pool = 17, o.seed = 1, o.n_keeps = 5;
  for (i = 0; i < 5; i++) o.keep[i] = default_keep[i];
  for (i = 0; i < ABLATIONS; i++) o.method[i] = 1;
  for (i = 0; i < N_TASKS; i++) o.task[i] = 1;
  parse(argc, argv, &o);
#ifdef _OPENMP
  if (o.threads) omp_set_num_threads(o.threads);
#endif
  if (!o.model) o.model = locate("examples/needle-4m.q8.bin", "../examples/needle-4m.q8.bin");
  if (!o.text) o.text = locate("examples/frankenstein.txt", "../examples/frankenstein.txt");
  if ((error = model_load(&m, o.model)) != NULL) die("%s: %s", o.model, error);
  text = (char *)model_read_file(o.text, &text_bytes);
  if (!text || text_bytes < 2 * (size_t)o.length || text_bytes > 1 << 30)
    die("%s: cannot be used", o.text);
  room = o.length + ROOM;
  if (room > m.context) die("the model reads at most %d bytes", m.context - ROOM);
  logits = (float *)need(malloc((size_t)(room * m.vocab) * sizeof *logits));
  p.window = (float *)need(malloc((size_t)(3 * m.n_layers * m.n_kv_heads * room) * sizeof(float)));
  p.all = p.window + m.n_layers * m.n_kv_heads * room,
  p.body = p.all + m.n_layers * m.n_kv_heads * room;
  b.v = (variant *)need(malloc(METHODS * MAX_KEEPS * sizeof *b.v));
  slopes = (size_t)(MAX_KEEPS * m.n_layers);
  p.earlier = (rdkv_histogram *)need(calloc(2 * slopes, sizeof *p.earlier));
  p.latest = p.earlier + slopes;
  if (!kv_cache_init(&p.cache, &m, room)) die("out of memory");

  for (kind = 0; kind < N_TASKS; kind++) all += o.task[kind] * o.samples;
  start = time(NULL);
  for (sample = 0; sample < o.samples; sample++) {
    for (kind = 0; kind < N_TASKS; kind++) {
      task t;
      int body, l;
      if (!o.task[kind]) continue;
      if (!task_make(&t, kind == PROSE ? TASK_SINGLE : (task_kind)kind, o.length - 48,
                     o.seed + (uint64_t)sample, text, (int)text_bytes))
        die("out of memory");
      if (kind == PROSE) { /* not a task: the text itself, and its next bytes */
        uint64_t random = o.seed + (uint64_t)sample;
        const char *from =
            text + task__random(&random, (uint32_t)((int)text_bytes - o.length - ROOM));
        t.body_bytes = o.length, t.n_questions = 1;
        t.body = (char *)need(realloc(t.body, (size_t)(o.length + PROSE_BYTES + 1)));
        memcpy(t.body, from, (size_t)(o.length + PROSE_BYTES));
        t.body[o.length + PROSE_BYTES] = 0;
      }
      p.cache.n = 0;
      kv_cache_prefill(&m, &p.cache, (const uint8_t *)t.body, t.body_bytes, logits, NULL);
      p.body_bytes = body = p.cache.n;
      for (l = 0; l < m.n_layers && o.method[H2O]; l++)
        if (!kv_cache_mass(&p.cache, l, 0, p.body + l * m.n_kv_heads * body)) die("out of memory");
      if (o.agnostic || kind == PROSE) batch_init(&b, &p, &o);
      for (q = 0; q < t.n_questions; q++) {
        const char *question = t.question[q], *answer = t.answer[q];
        int bytes = (int)strlen(question), first = 0;
        if (kind == PROSE) {
          question = "", answer = t.body + body;
        } else if (!o.agnostic) {
          p.cache.n = body;
          kv_cache_prefill(&m, &p.cache, (const uint8_t *)question, bytes, logits, NULL);
          if (o.map && sample == 0 && q == 0) save_map(&p.cache, &o);
          first = likeliest(logits + (bytes - 1) * m.vocab, m.vocab) != (uint8_t)answer[0];
          batch_init(&b, &p, &o);
          for (i = 0; i < o.n_keeps && o.method[METHODS - 1] && is_mean_task(kind) && q == 0; i++) {
            rdkv_config want;
            memset(&want, 0, sizeof want);
            want.window = o.window, want.pool = o.pool, want.keep = o.keep[i] / 100;
            three_bits[i] += ablation_three_bits(&p.cache, &want), three_bits_n += i == 0;
          }
        }
        measure(&m, &b, &p, &o, kind, question, answer, first, logits);
        if (!o.agnostic && kind != PROSE) batch_free(&b);
      }
      if (o.agnostic || kind == PROSE) batch_free(&b);
      free(t.body);
      memcpy(p.earlier, p.latest, slopes * sizeof *p.earlier);
      done++;
      if (show) {
        int left = (int)(difftime(time(NULL), start) / done * (all - done));
        fprintf(stderr, "\r%d of %d contexts, %d:%02d left \033[K", done, all, left / 60,
                left % 60);
      }
    }
  }
  if (show) fputs("\r\033[K", stderr);
  if (o.csv)
    print_csv(&o);
  else
    print_table(&o);
  for (i = 0; i < o.n_keeps && three_bits_n && !o.csv; i++)
    printf("%s%.3f at %g %%%s", i ? ", " : "V's distortion if there were a width of 3 bits: times ",
           three_bits[i] / three_bits_n, o.keep[i], i + 1 < o.n_keeps ? "" : "\n");
  if (o.svg) save_curves(&o);
  kv_cache_free(&p.cache), model_free(&m), free(text), free(logits), free(p.window),
      free(p.earlier);
  free(b.v);
  return 0;
}
