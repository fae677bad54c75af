/* model.h - a Llama-style transformer in plain C, shared by examples/needle.c and bench/quality.c

   It reads a checkpoint of llama2.c (version 2: int8 with group scales), turns it into float, and
   runs any number of rows at once: the tokens of a prompt, or the next token of many sequences.
   What a row attends to is the caller's affair, through one function pointer. That is where rdkv.h
   plugs in.

   OpenMP is used when the compiler is told to (-fopenmp). The one hot loop, model__panel, is
   compiled a second time for AVX2 and FMA on x86, so that a plain `cc -O3` gets them. */
#ifndef MODEL_H
#define MODEL_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODEL_ROWS                                                                                 \
  192                    /* rows of one pass: big enough to fill caches, small enough for progress \
                          */
#define MODEL_LAYERS 64  /* the most that we read */
#define MODEL_HEAD 128   /* widest head */
#define MODEL_QUERIES 96 /* rows that share a tile of keys */
#define MODEL_KEYS 128   /* keys of a tile; scores, keys and outputs of a tile stay in L2 */
#define MODEL_PANEL 16   /* columns that the inner loop computes at once */

typedef struct model_layer {
  float *norm_attention, *norm_ffn;        /* [dim] */
  float *wq, *wk, *wv, *wo, *w1, *w2, *w3; /* panels, see model__matrix */
} model_layer;

typedef struct model {
  int dim, hidden, n_layers, n_heads, n_kv_heads, vocab, context;
  int head_dim, kv_dim;
  float *embedding;  /* [vocab][dim] */
  float *norm_final; /* [dim] */
  float *classifier; /* panels */
  float *rope;       /* [context][head_dim / 2][cos, sin] */
  model_layer layer[MODEL_LAYERS];
  float *memory;                        /* everything above */
  float *x, *y, *q, *k, *v, *up, *gate; /* [MODEL_ROWS][...] of a pass */
} model;

/* Attention of one layer for n rows: q [n][n_heads * head_dim], k and v [n][kv_dim], after RoPE.
   Stores k and v wherever it keeps them and writes out [n][n_heads * head_dim]. */
typedef void model_attention(void *context, int layer, int n, const int *position, const float *q,
                             const float *k, const float *v, float *out);

/* ---- arithmetic ------------------------------------------------------------------------------ */

#if defined(__GNUC__)
typedef float model__lanes __attribute__((vector_size(32), aligned(4), may_alias));

/* c [n][16] += a [n][k] * b [k][16], six rows at a time: 12 accumulators fill a register file. A
   macro, because the vectors must be lowered for each target apart. */
#define MODEL__DEFINE_PANEL(name, attribute)                                                 \
  attribute static void name(int n, int k, const float *a, int lda, const float *b, int ldb, \
                             float *c, int ldc) {                                            \
    int row = 0, i, r;                                                                       \
    for (; row + 6 <= n; row += 6, a += 6 * lda, c += 6 * ldc) {                             \
      model__lanes sum[6][2];                                                                \
      for (r = 0; r < 6; r++) {                                                              \
        sum[r][0] = *(const model__lanes *)(c + r * ldc);                                    \
        sum[r][1] = *(const model__lanes *)(c + r * ldc + 8);                                \
      }                                                                                      \
      for (i = 0; i < k; i++) {                                                              \
        model__lanes b0 = *(const model__lanes *)(b + i * ldb);                              \
        model__lanes b1 = *(const model__lanes *)(b + i * ldb + 8);                          \
        for (r = 0; r < 6; r++) {                                                            \
          sum[r][0] += a[r * lda + i] * b0;                                                  \
          sum[r][1] += a[r * lda + i] * b1;                                                  \
        }                                                                                    \
      }                                                                                      \
      for (r = 0; r < 6; r++) {                                                              \
        *(model__lanes *)(c + r * ldc) = sum[r][0];                                          \
        *(model__lanes *)(c + r * ldc + 8) = sum[r][1];                                      \
      }                                                                                      \
    }                                                                                        \
    for (; row < n; row++, a += lda, c += ldc) {                                             \
      model__lanes s0 = *(const model__lanes *)c, s1 = *(const model__lanes *)(c + 8);       \
      for (i = 0; i < k; i++) {                                                              \
        s0 += a[i] * *(const model__lanes *)(b + i * ldb);                                   \
        s1 += a[i] * *(const model__lanes *)(b + i * ldb + 8);                               \
      }                                                                                      \
      *(model__lanes *)c = s0;                                                               \
      *(model__lanes *)(c + 8) = s1;                                                         \
    }                                                                                        \
  }
#else
#define MODEL__DEFINE_PANEL(name, attribute)                                                     \
  static void name(int n, int k, const float *a, int lda, const float *b, int ldb, float *c,     \
                   int ldc) {                                                                    \
    int row, i, j;                                                                               \
    for (row = 0; row < n; row++)                                                                \
      for (i = 0; i < k; i++)                                                                    \
        for (j = 0; j < MODEL_PANEL; j++) c[row * ldc + j] += a[row * lda + i] * b[i * ldb + j]; \
  }
#endif

MODEL__DEFINE_PANEL(model__panel_base, )

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
MODEL__DEFINE_PANEL(model__panel_avx2, __attribute__((target("avx2,fma"))))

static void model__panel(int n, int k, const float *a, int lda, const float *b, int ldb, float *c,
                         int ldc) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    model__panel_avx2(n, k, a, lda, b, ldb, c, ldc);
  else
    model__panel_base(n, k, a, lda, b, ldb, c, ldc);
}
#else
#define model__panel model__panel_base
#endif

/* y [n][out] = x [n][in] * w, w in panels: [out / 16][in][16]. */
static void model__multiply(int n, int in, int out, const float *x, const float *w, float *y) {
  int panels = out / MODEL_PANEL, blocks = (n + MODEL_QUERIES - 1) / MODEL_QUERIES, job;
  memset(y, 0, (size_t)n * (size_t)out * sizeof *y);
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
  for (job = 0; job < panels * blocks; job++) {
    int panel = job / blocks, row = job % blocks * MODEL_QUERIES;
    int rows = n - row < MODEL_QUERIES ? n - row : MODEL_QUERIES;
    model__panel(rows, in, x + row * in, in, w + panel * in * MODEL_PANEL, MODEL_PANEL,
                 y + row * out + panel * MODEL_PANEL, out);
  }
}

static void model__norm(int n, int dim, const float *x, const float *weight, float *y) {
  int r, i;
  for (r = 0; r < n; r++, x += dim, y += dim) {
    float sum = 0, scale;
    for (i = 0; i < dim; i++) sum += x[i] * x[i];
    scale = 1 / sqrtf(sum / (float)dim + 1e-5f);
    for (i = 0; i < dim; i++) y[i] = x[i] * scale * weight[i];
  }
}

/* x[i] = exp(x[i] - max) and returns the sum; max >= every x[i]. exp(y) = 2^n e^r, |r| <= ln(2)/2,
   e^r by its series, relative error about 2e-7. Minimum, rounding and 2^n work on the bits, because
   that is what compilers vectorise without being told to relax the rules of floating point. */
static float model__exp(float *x, int n, float max) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
  float sum[8] = {0};
  int i, j;
  for (i = 0; i < n; i++) {
    union {
      float f;
      uint32_t u;
    } y, power;
    float r;
    y.f = x[i] - max;
    y.u = y.u > 0xc2ae0000u ? 0xc2ae0000u : y.u; /* y <= 0: at least -87 */
    power.f = y.f * 1.44269504f + magic;
    r = y.f - (power.f - magic) * 0.693359375f + (power.f - magic) * 2.12194440e-4f;
    power.u = (power.u << 23) + 0x3f800000u;
    x[i] =
        power.f *
        (1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * 0.00833333333f)))));
  }
  for (i = 0; i + 8 <= n; i += 8)
    for (j = 0; j < 8; j++) sum[j] += x[i + j];
  for (; i < n; i++) sum[0] += x[i];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

static float model__max(const float *x, int n, float max) {
  float most[8];
  int i, j;
  for (j = 0; j < 8; j++) most[j] = max;
  for (i = 0; i + 8 <= n; i += 8)
    for (j = 0; j < 8; j++) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
  for (; i < n; i++) most[0] = x[i] > most[0] ? x[i] : most[0];
  for (j = 0; j < 8; j++) max = most[j] > max ? most[j] : max;
  return max;
}

/* ---- loading --------------------------------------------------------------------------------- */

/* Reads a whole file; NULL if that fails. */
static uint8_t *model_read_file(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  uint8_t *data = NULL;
  long size;
  if (!file) return NULL;
  if (fseek(file, 0, SEEK_END) == 0 && (size = ftell(file)) >= 0 && fseek(file, 0, SEEK_SET) == 0) {
    data = (uint8_t *)malloc((size_t)size + 1);
    if (data && fread(data, 1, (size_t)size, file) == (size_t)size) {
      data[size] = 0, *bytes = (size_t)size;
    } else {
      free(data), data = NULL;
    }
  }
  fclose(file);
  return data;
}

/* Takes a [rows][columns] int8 matrix with a float scale for each group of values from *from and
   writes it at *to: as it is, or in panels of 16 rows, [rows / 16][columns][16], which is how
   model__multiply reads it. Advances both. */
static float *model__matrix(const uint8_t **from, float **to, int rows, int columns, int group,
                            int panels) {
  const uint8_t *code = *from, *scale = code + rows * columns;
  float *matrix = *to;
  int r, c;
  for (r = 0; r < rows; r++) {
    for (c = 0; c < columns; c++) {
      int i = r * columns + c;
      float s;
      memcpy(&s, scale + i / group * 4, 4);
      if (panels) i = r / MODEL_PANEL * MODEL_PANEL * columns + c * MODEL_PANEL + r % MODEL_PANEL;
      matrix[i] = s * (float)(int8_t)code[r * columns + c];
    }
  }
  *from = scale + rows * columns / group * 4;
  *to += rows * columns;
  return matrix;
}

static float *model__floats(const uint8_t **from, float **to, int n) {
  float *array = *to;
  memcpy(array, *from, (size_t)n * 4);
  *from += n * 4;
  *to += n;
  return array;
}

static void model_free(model *m) {
  free(m->memory);
  memset(m, 0, sizeof *m);
}

/* Loads a checkpoint. Returns NULL, or what is wrong with it. */
static const char *model_load(model *m, const char *path) {
  size_t bytes = 0, weights, want, rows;
  uint8_t *file = model_read_file(path, &bytes);
  const uint8_t *from = file;
  int32_t head[9];
  int group, l, i, p;
  float *to;
  memset(m, 0, sizeof *m);
  if (!file) return "cannot be read";
  if (bytes < 256) return free(file), "too short";
  memcpy(head, file, sizeof head);
  memcpy(&group, file + 37, 4);
  if (head[0] != 0x616b3432 || head[1] != 2 || file[36] != 1)
    return free(file), "not a llama2.c checkpoint of version 2 with a shared classifier";
  m->dim = head[2], m->hidden = head[3], m->n_layers = head[4], m->n_heads = head[5];
  m->n_kv_heads = head[6], m->vocab = head[7], m->context = head[8];
  for (i = 2; i < 9; i++)
    if (head[i] < 1 || head[i] > 1 << 16) return free(file), "sizes out of range";
  if (m->n_layers > MODEL_LAYERS || m->vocab != 256 || m->n_heads % m->n_kv_heads ||
      m->dim % m->n_heads || m->dim > 4096 || m->hidden > 16384 || m->context > 1 << 15 ||
      group < 1)
    return free(file), "sizes that this program does not support";
  m->head_dim = m->dim / m->n_heads, m->kv_dim = m->head_dim * m->n_kv_heads;
  if (m->head_dim % MODEL_PANEL || m->head_dim > MODEL_HEAD || m->hidden % MODEL_PANEL ||
      m->dim % group || m->hidden % group)
    return free(file), "sizes that this program does not support";

  weights =
      (size_t)m->n_layers * (size_t)(2 * m->dim * (m->dim + m->kv_dim) + 3 * m->dim * m->hidden) +
      (size_t)(m->vocab * m->dim);
  want = 256 + (size_t)(2 * m->n_layers + 1) * (size_t)m->dim * 4 + weights +
         weights / (size_t)group * 4;
  if (bytes < want) return free(file), "too short";
  rows = (size_t)(2 * m->n_layers + 1) * (size_t)m->dim + weights + (size_t)(m->vocab * m->dim) +
         (size_t)m->context * (size_t)m->head_dim;
  want = rows + MODEL_ROWS * (size_t)(3 * m->dim + 2 * m->kv_dim + 2 * m->hidden);
  m->memory = (float *)malloc(want * sizeof(float));
  if (!m->memory) return free(file), "out of memory";

  to = m->memory;
  from += 256;
  for (l = 0; l < m->n_layers; l++) m->layer[l].norm_attention = model__floats(&from, &to, m->dim);
  for (l = 0; l < m->n_layers; l++) m->layer[l].norm_ffn = model__floats(&from, &to, m->dim);
  m->norm_final = model__floats(&from, &to, m->dim);
  m->embedding = to;
  to += m->vocab * m->dim;
  {
    const uint8_t *again = from;
    float *embedding = m->embedding;
    model__matrix(&again, &embedding, m->vocab, m->dim, group, 0);
    m->classifier = model__matrix(&from, &to, m->vocab, m->dim, group, 1);
  }
#define MODEL__EACH(name, rows_, columns_) \
  for (l = 0; l < m->n_layers; l++)        \
    m->layer[l].name = model__matrix(&from, &to, rows_, columns_, group, 1);
  MODEL__EACH(wq, m->dim, m->dim)
  MODEL__EACH(wk, m->kv_dim, m->dim)
  MODEL__EACH(wv, m->kv_dim, m->dim)
  MODEL__EACH(wo, m->dim, m->dim)
  MODEL__EACH(w1, m->hidden, m->dim)
  MODEL__EACH(w2, m->dim, m->hidden)
  MODEL__EACH(w3, m->hidden, m->dim)
#undef MODEL__EACH
  free(file);

  m->rope = to;
  for (p = 0; p < m->context; p++) {
    for (i = 0; i < m->head_dim / 2; i++, to += 2) {
      double angle = p * pow(10000.0, -2.0 * i / m->head_dim);
      to[0] = (float)cos(angle), to[1] = (float)sin(angle);
    }
  }
  m->x = to, to += MODEL_ROWS * m->dim;
  m->y = to, to += MODEL_ROWS * m->dim;
  m->q = to, to += MODEL_ROWS * m->dim;
  m->k = to, to += MODEL_ROWS * m->kv_dim;
  m->v = to, to += MODEL_ROWS * m->kv_dim;
  m->up = to, to += MODEL_ROWS * m->hidden;
  m->gate = to;
  return NULL;
}

/* ---- one pass -------------------------------------------------------------------------------- */

/* Rotates interleaved pairs of every head of x [n][n_heads * head_dim]. */
static void model__rotate(const model *m, int n, const int *position, int n_heads, float *x) {
  int r, h, i;
  for (r = 0; r < n; r++) {
    for (h = 0; h < n_heads; h++, x += m->head_dim) {
      const float *rope = m->rope + position[r] * m->head_dim;
      for (i = 0; i < m->head_dim; i += 2) {
        float a = x[i], b = x[i + 1];
        x[i] = a * rope[i] - b * rope[i + 1];
        x[i + 1] = a * rope[i + 1] + b * rope[i];
      }
    }
  }
}

/* Runs n <= MODEL_ROWS rows through the model; logits [n][vocab]. */
static void model_forward(model *m, int n, const uint8_t *token, const int *position,
                          model_attention *attend, void *context, float *logits) {
  int l, i, dim = m->dim;
  for (i = 0; i < n; i++)
    memcpy(m->x + i * dim, m->embedding + token[i] * dim, (size_t)dim * sizeof(float));
  for (l = 0; l < m->n_layers; l++) {
    const model_layer *w = &m->layer[l];
    model__norm(n, dim, m->x, w->norm_attention, m->y);
    model__multiply(n, dim, dim, m->y, w->wq, m->q);
    model__multiply(n, dim, m->kv_dim, m->y, w->wk, m->k);
    model__multiply(n, dim, m->kv_dim, m->y, w->wv, m->v);
    model__rotate(m, n, position, m->n_heads, m->q);
    model__rotate(m, n, position, m->n_kv_heads, m->k);
    attend(context, l, n, position, m->q, m->k, m->v, m->y);
    model__multiply(n, dim, dim, m->y, w->wo, m->q);
    for (i = 0; i < n * dim; i++) m->x[i] += m->q[i];
    model__norm(n, dim, m->x, w->norm_ffn, m->y);
    model__multiply(n, dim, m->hidden, m->y, w->w1, m->gate);
    model__multiply(n, dim, m->hidden, m->y, w->w3, m->up);
    for (i = 0; i < n * m->hidden; i++) m->up[i] *= m->gate[i] / (1 + expf(-m->gate[i]));
    model__multiply(n, m->hidden, dim, m->up, w->w2, m->y);
    for (i = 0; i < n * dim; i++) m->x[i] += m->y[i];
  }
  model__norm(n, dim, m->x, m->norm_final, m->y);
  model__multiply(n, dim, m->vocab, m->y, m->classifier, logits);
}

/* ---- the dense cache, laid out as in llama2.c ------------------------------------------------ */

typedef struct kv_cache {
  const model *m;
  int capacity, n; /* n tokens are in it; set it back to forget the last ones */
  float *k, *v;    /* [layer][capacity][kv_dim], k after RoPE */
  float *q;     /* [layer][capacity][dim]: the queries, of which compression wants the last few */
  float *score; /* [n_heads][capacity] scratch */
} kv_cache;

static int kv_cache_init(kv_cache *cache, const model *m, int capacity) {
  size_t rows = (size_t)m->n_layers * (size_t)capacity;
  cache->m = m, cache->capacity = capacity, cache->n = 0;
  cache->k = (float *)malloc(
      (rows * (size_t)(2 * m->kv_dim + m->dim) + (size_t)m->n_heads * (size_t)capacity) *
      sizeof(float));
  if (!cache->k) return 0;
  cache->v = cache->k + rows * (size_t)m->kv_dim;
  cache->q = cache->v + rows * (size_t)m->kv_dim;
  cache->score = cache->q + rows * (size_t)m->dim;
  return 1;
}

static void kv_cache_free(kv_cache *cache) { free(cache->k); }

/* score [n][stride], columns [0, tile) = scaled q.k of n <= MODEL_QUERIES rows of one head, q
   [n][dim], with tile <= MODEL_KEYS keys, k [tile][kv_dim]. */
static void model__scores(const model *m, int n, const float *q, const float *k, int tile,
                          float *score, int stride) {
  float keys[MODEL_HEAD * MODEL_KEYS], sum[MODEL_QUERIES * MODEL_KEYS];
  float scale = 1 / sqrtf((float)m->head_dim);
  int dim = m->head_dim, r, i, j;
  memset(keys, 0, sizeof keys);
  for (j = 0; j < tile; j++) { /* in panels of 16, each [dim][16] */
    float *to = keys + j / MODEL_PANEL * MODEL_PANEL * dim + j % MODEL_PANEL;
    for (i = 0; i < dim; i++) to[i * MODEL_PANEL] = k[j * m->kv_dim + i];
  }
  memset(sum, 0, (size_t)n * MODEL_KEYS * sizeof *sum);
  for (j = 0; j < tile; j += MODEL_PANEL)
    model__panel(n, dim, q, m->dim, keys + j * dim, MODEL_PANEL, sum + j, MODEL_KEYS);
  for (r = 0; r < n; r++)
    for (j = 0; j < tile; j++) score[r * stride + j] = sum[r * MODEL_KEYS + j] * scale;
}

/* Causal attention of n <= MODEL_QUERIES consecutive rows of one head, the first at position begin.
   q [n][dim], k and v [begin + n][kv_dim], out [n][dim]. Online softmax over tiles of keys. */
static void model__causal(const model *m, int n, int begin, const float *q, const float *k,
                          const float *v, float *out) {
  float score[MODEL_QUERIES][MODEL_KEYS], max[MODEL_QUERIES], sum[MODEL_QUERIES];
  int end = begin + n, dim = m->head_dim, first, r, i, j;
  for (r = 0; r < n; r++) {
    max[r] = -1e30f, sum[r] = 0;
    memset(out + r * m->dim, 0, (size_t)dim * sizeof *out);
  }
  for (first = 0; first < end; first += MODEL_KEYS) {
    int tile = end - first < MODEL_KEYS ? end - first : MODEL_KEYS;
    model__scores(m, n, q, k + first * m->kv_dim, tile, score[0], MODEL_KEYS);
    for (r = 0; r < n; r++) {
      int seen = begin + r - first + 1 < tile ? begin + r - first + 1 : tile;
      float before = max[r], shrink;
      if (seen < 0) seen = 0;
      max[r] = model__max(score[r], seen, before);
      shrink = expf(before - max[r]);
      sum[r] = sum[r] * shrink + model__exp(score[r], seen, max[r]);
      for (j = seen; j < tile; j++) score[r][j] = 0;
      for (i = 0; i < dim; i++) out[r * m->dim + i] *= shrink;
    }
    for (i = 0; i < dim; i += MODEL_PANEL)
      model__panel(n, tile, score[0], MODEL_KEYS, v + first * m->kv_dim + i, m->kv_dim, out + i,
                   m->dim);
  }
  for (r = 0; r < n; r++)
    for (i = 0; i < dim; i++) out[r * m->dim + i] /= sum[r];
}

/* Attention of one query over n tokens, k and v [n][stride]; score [n] is scratch. */
static void model__attend_row(int dim, int n, const float *q, const float *k, const float *v,
                              int stride, float *score, float *out) {
  float scale = 1 / sqrtf((float)dim), sum;
  int t, i, j;
  for (t = 0; t < n; t++) {
    float part[8] = {0};
    for (i = 0; i < dim; i += 8)
      for (j = 0; j < 8; j++) part[j] += q[i + j] * k[t * stride + i + j];
    score[t] = scale * (((part[0] + part[4]) + (part[2] + part[6])) +
                        ((part[1] + part[5]) + (part[3] + part[7])));
  }
  sum = model__exp(score, n, model__max(score, n, -1e30f));
  memset(out, 0, (size_t)dim * sizeof *out);
  for (i = 0; i < dim; i += MODEL_PANEL) model__panel(1, n, score, n, v + i, stride, out + i, dim);
  for (i = 0; i < dim; i++) out[i] /= sum;
}

/* model_attention of a kv_cache: rows are the next tokens of one sequence. */
static void kv_cache_attend(void *context, int layer, int n, const int *position, const float *q,
                            const float *k, const float *v, float *out) {
  kv_cache *cache = (kv_cache *)context;
  const model *m = cache->m;
  int begin = position[0], group = m->n_heads / m->n_kv_heads, job;
  int blocks = (n + MODEL_QUERIES - 1) / MODEL_QUERIES, first = layer * cache->capacity;
  memcpy(cache->k + (first + begin) * m->kv_dim, k, (size_t)(n * m->kv_dim) * sizeof(float));
  memcpy(cache->v + (first + begin) * m->kv_dim, v, (size_t)(n * m->kv_dim) * sizeof(float));
  memcpy(cache->q + (first + begin) * m->dim, q, (size_t)(n * m->dim) * sizeof(float));
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
  for (job = 0; job < blocks * m->n_heads; job++) {
    int head = job % m->n_heads, row = job / m->n_heads * MODEL_QUERIES;
    int rows = n - row < MODEL_QUERIES ? n - row : MODEL_QUERIES;
    int at = first * m->kv_dim + head / group * m->head_dim, x = row * m->dim + head * m->head_dim;
    if (n == 1)
      model__attend_row(m->head_dim, begin + 1, q + x, cache->k + at, cache->v + at, m->kv_dim,
                        cache->score + head * cache->capacity, out + x);
    else
      model__causal(m, rows, begin + row, q + x, cache->k + at, cache->v + at, out + x);
  }
}

/* Appends n tokens to the cache; logits [n][vocab]. progress, if not NULL, is called after each
   pass with the tokens done. */
static void kv_cache_prefill(model *m, kv_cache *cache, const uint8_t *token, int n, float *logits,
                             void (*progress)(int done, int all)) {
  int position[MODEL_ROWS], done, i;
  for (done = 0; done < n;) {
    int rows = n - done < MODEL_ROWS ? n - done : MODEL_ROWS;
    for (i = 0; i < rows; i++) position[i] = cache->n + i;
    model_forward(m, rows, token + done, position, kv_cache_attend, cache,
                  logits + done * m->vocab);
    done += rows;
    cache->n += rows;
    if (progress) progress(done, n);
  }
}

/* Attention that the queries at positions [begin, cache->n) pay to each token, summed over queries
   and over the query heads of a kv head: mass [n_kv_heads][cache->n]. 0 if there is no memory. */
static inline int kv_cache_mass(const kv_cache *cache, int layer, int begin, float *mass) {
  const model *m = cache->m;
  int n = cache->n, group = m->n_heads / m->n_kv_heads, head, ok = 1;
  memset(mass, 0, (size_t)(m->n_kv_heads * n) * sizeof *mass);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
  for (head = 0; head < m->n_kv_heads; head++) {
    float *score = (float *)malloc((size_t)(MODEL_QUERIES * n) * sizeof *score);
    const float *k = cache->k + layer * cache->capacity * m->kv_dim + head * m->head_dim;
    float *to = mass + head * n;
    int first, g, r, t;
    if (!score) {
      ok = 0;
      continue;
    }
    for (g = head * group; g < (head + 1) * group; g++) {
      const float *q = cache->q + layer * cache->capacity * m->dim + g * m->head_dim;
      for (first = begin; first < n; first += MODEL_QUERIES) {
        int rows = n - first < MODEL_QUERIES ? n - first : MODEL_QUERIES, end = first + rows;
        for (t = 0; t < end; t += MODEL_KEYS)
          model__scores(m, rows, q + first * m->dim, k + t * m->kv_dim,
                        end - t < MODEL_KEYS ? end - t : MODEL_KEYS, score + t, n);
        for (r = 0; r < rows; r++) {
          int seen = first + r + 1;
          float *row = score + r * n;
          float scale = 1 / model__exp(row, seen, model__max(row, seen, -1e30f));
          for (t = 0; t < seen; t++) to[t] += row[t] * scale;
        }
      }
    }
    free(score);
  }
  return ok;
}

/* Moving average of x [n] over width tokens (odd), into y. */
static inline void kv_pool(const float *x, int n, int width, float *y) {
  int t, i;
  for (t = 0; t < n; t++) {
    int begin = t - width / 2 > 0 ? t - width / 2 : 0;
    int end = t + width / 2 < n - 1 ? t + width / 2 : n - 1;
    for (y[t] = 0, i = begin; i <= end; i++) y[t] += x[i];
    y[t] /= (float)(end - begin + 1);
  }
}

/* ---- a dense cache that keeps some tokens of each head --------------------------------------- */

typedef struct kv_list {
  const model *m;
  int capacity; /* tokens that a list has room for */
  int *n;       /* [layer][kv head] tokens that it holds */
  float *k, *v; /* [layer][kv head][capacity][head_dim] */
  float *score; /* [capacity] scratch */
} kv_list;

static inline int kv_list_init(kv_list *list, const model *m, int capacity) {
  int heads = m->n_layers * m->n_kv_heads;
  size_t size = (size_t)heads * (size_t)capacity * (size_t)m->head_dim;
  list->m = m, list->capacity = capacity;
  list->n = (int *)calloc((size_t)heads, sizeof(int));
  list->k = (float *)malloc((2 * size + (size_t)capacity) * sizeof(float));
  if (!list->n || !list->k) return free(list->n), free(list->k), 0;
  list->v = list->k + size, list->score = list->v + size;
  return 1;
}

static inline void kv_list_free(kv_list *list) { free(list->n), free(list->k); }

/* Adds a token to one head's list. */
static void kv_list_add(kv_list *list, int layer, int head, const float *k, const float *v) {
  int i = layer * list->m->n_kv_heads + head, dim = list->m->head_dim;
  int at = (i * list->capacity + list->n[i]++) * dim;
  memcpy(list->k + at, k, (size_t)dim * sizeof *k);
  memcpy(list->v + at, v, (size_t)dim * sizeof *v);
}

typedef struct kv__ranked {
  float score;
  int token;
} kv__ranked;

static int kv__by_score(const void *a, const void *b) {
  const kv__ranked *x = (const kv__ranked *)a, *y = (const kv__ranked *)b;
  return x->score != y->score ? (x->score < y->score ? 1 : -1) : x->token - y->token;
}

static int kv__by_token(const void *a, const void *b) {
  return ((const kv__ranked *)a)->token - ((const kv__ranked *)b)->token;
}

/* Eviction: one head keeps the last `always` tokens and those of the highest score, `keep` in all,
   in their order. score [dense->n]. 0 if there is no memory. */
static inline int kv_list_take(kv_list *list, const kv_cache *dense, int layer, int head,
                               const float *score, int keep, int always) {
  const model *m = dense->m;
  int n = dense->n, i;
  kv__ranked *rank = (kv__ranked *)malloc((size_t)n * sizeof *rank);
  if (!rank) return 0;
  if (keep > n) keep = n;
  if (always > keep) always = keep;
  for (i = 0; i < n; i++) {
    rank[i].token = i;
    rank[i].score = i < n - always ? score[i] : INFINITY;
  }
  qsort(rank, (size_t)n, sizeof *rank, kv__by_score);
  qsort(rank, (size_t)keep, sizeof *rank, kv__by_token);
  for (i = 0; i < keep; i++) {
    int at = (layer * dense->capacity + rank[i].token) * m->kv_dim + head * m->head_dim;
    kv_list_add(list, layer, head, dense->k + at, dense->v + at);
  }
  free(rank);
  return 1;
}

/* model_attention of a kv_list: rows are the next tokens of one sequence. */
static inline void kv_list_attend(void *context, int layer, int n, const int *position,
                                  const float *q, const float *k, const float *v, float *out) {
  kv_list *list = (kv_list *)context;
  const model *m = list->m;
  int dim = m->head_dim, r, h;
  (void)position;
  for (r = 0; r < n; r++) {
    for (h = 0; h < m->n_kv_heads; h++)
      kv_list_add(list, layer, h, k + r * m->kv_dim + h * dim, v + r * m->kv_dim + h * dim);
    for (h = 0; h < m->n_heads; h++) {
      int i = layer * m->n_kv_heads + h / (m->n_heads / m->n_kv_heads);
      int at = i * list->capacity * dim, x = r * m->dim + h * dim;
      model__attend_row(dim, list->n[i], q + x, list->k + at, list->v + at, dim, list->score,
                        out + x);
    }
  }
}

#endif /* MODEL_H */
