/* generate.c - a long generation whose tokens are compressed block by block: quality and memory

     cc -O3 -o generate bench/generate.c -lm && ./generate

   The model of examples/ reads a prompt of prose and is then given the bytes that follow, one at a
   time. Three sequences go along: one with only its prompt compressed, whose new tokens stay dense;
   one that turns them into segments with the same part of the bytes; and one with the prompt's
   lambda as the price of a byte. A fourth is as the first, but its prompt came in chunks, each
   compressed by queries of the next. Printed are the divergence of their logits from those of the
   full cache (KL, in nats, each on the same inputs) and their bytes. Ends with failure if KL of
   blocks with the same part is more than --bar times that of the prompt alone, KL of chunks more
   than --chunk-bar times, if more than block + recent tokens were dense, or if segments of
   generated tokens took more than their part. */

#define CLI_PROGRAM "generate"
#define RDKV_IMPLEMENTATION
#include "../examples/cli.h"
#include "../examples/packed.h"

enum { ALONE, BLOCKS, PRICE, CHUNKS, KINDS };
static const char *const NAME[KINDS] = {"prompt alone", "blocks, same part", "blocks, lambda",
                                        "prompt in chunks"};

typedef struct options {
  int prompt, tokens, block, recent, window, pool, samples;
  int block_pool, merge, chunk;
  double keep, bar, chunk_bar;
  const char *model, *text, *save;
} options;

typedef struct living {
  rdkv_config config; /* of blocks; window and pool of the prompt */
  rdkv_sequence s;
  void *owner[4];
  void *scratch;
  size_t scratch_bytes, fixed_bytes; /* of tail and queries, all of it */
} living;

static struct {
  living *v; /* [KINDS] rows of a pass */
  void *work;
  size_t work_bytes;
} run;

static void check(rdkv_status st, const char *what) {
  if (st != RDKV_OK) die("%s: %s", what, rdkv_status_string(st));
}

static void *memory(size_t bytes, void **owner) {
  void *p = bytes ? packed__memory(bytes, owner) : NULL;
  if (!p) die("out of memory");
  return p;
}

/* Compresses tokens [at, at + n) of the prompt by the last queries of the chunk after it, or the
   last chunk by its own, to memory [room]. */
static size_t compress_chunk(const rdkv_config *c, const kv_cache *dense, int at, int n, int next,
                             void *block, size_t room) {
  const model *m = dense->m;
  rdkv_kv kv[MODEL_LAYERS];
  rdkv_queries by[MODEL_LAYERS];
  size_t need = rdkv_compress_scratch(c, (uint32_t)n), bytes = 0;
  int l, first = next ? at + n : at;
  void *owner, *scratch = memory(need, &owner);
  memset(by, 0, sizeof by);
  for (l = 0; l < m->n_layers; l++) {
    int row = l * dense->capacity;
    kv[l] = packed_layer(dense, c->window, l);
    kv[l].k.data = dense->k + (row + at) * m->kv_dim;
    kv[l].v.data = dense->v + (row + at) * m->kv_dim;
    by[l].q = kv[l].q, by[l].q.data = dense->q + (row + first) * m->dim;
    by[l].n = (uint32_t)(next ? next : n), by[l].position = (uint32_t)(first - at);
  }
  check(rdkv_compress_by(c, kv, by, (uint32_t)n, (uint64_t)at, block, room, &bytes, scratch, need),
        "chunk");
  free(owner);
  return bytes;
}

/* A sequence whose prompt is the dense cache, compressed. */
static void live(living *v, int kind, const kv_cache *dense, const options *o) {
  const model *m = dense->m;
  rdkv_config *c = &v->config;
  rdkv_kv kv[MODEL_LAYERS];
  rdkv_segment prompt;
  size_t room, need, bytes = 0;
  uint32_t capacity =
      (uint32_t)(kind == ALONE || kind == CHUNKS ? o->tokens : o->block + o->recent);
  int chunk = kind == CHUNKS ? o->chunk : dense->n;
  int blocks = kind == ALONE ? 0 : kind == CHUNKS ? dense->n / chunk : o->tokens / o->block + 1;
  int l, at, n, keeps = kind == BLOCKS || kind == PRICE;
  void *scratch, *owner, *mem;
  uint8_t *to;
  memset(v, 0, sizeof *v);
  c->n_layers = m->n_layers, c->n_q_heads = m->n_heads, c->n_kv_heads = m->n_kv_heads;
  c->k_dim = m->head_dim, c->keep = o->keep / 100, c->window = o->window, c->pool = o->pool;
  check(rdkv_resolve(c, c), "config");
  v->fixed_bytes = rdkv_sequence_bytes(c, blocks + 1, capacity, RDKV_F16, keeps);
  mem = memory(v->fixed_bytes, &v->owner[1]);
  check(rdkv_sequence_init(c, blocks + 1, capacity, RDKV_F16, keeps, mem, v->fixed_bytes, &v->s),
        "sequence");
  room = (rdkv_block_bound(c, (uint32_t)chunk) + 127) / 128 * 128;
  to = (uint8_t *)memory(room * (size_t)(kind == CHUNKS ? blocks + 1 : 1), &v->owner[0]);
  if (kind == CHUNKS) {
    for (at = 0; at < dense->n; at += n, to += room) {
      n = chunk < dense->n - at ? chunk : dense->n - at;
      l = dense->n - at - n;
      bytes = compress_chunk(c, dense, at, n, l < chunk ? l : chunk, to, room);
      check(rdkv_open(to, bytes, RDKV_VERIFY, &prompt), "chunk");
      check(rdkv_sequence_add(&v->s, &prompt), "sequence");
    }
    return;
  }
  for (l = 0; l < m->n_layers; l++) kv[l] = packed_layer(dense, c->window, l);
  need = rdkv_compress_scratch(c, (uint32_t)dense->n), scratch = memory(need, &owner);
  check(rdkv_compress(c, kv, (uint32_t)dense->n, to, room, &bytes, scratch, need), "prompt");
  check(rdkv_open(to, bytes, RDKV_VERIFY, &prompt), "prompt");
  free(owner);
  check(rdkv_sequence_add(&v->s, &prompt), "sequence");
  if (kind == ALONE) return;
  c->pool = o->block_pool;
  if (kind == PRICE) c->scope = RDKV_SCOPE_LAMBDA, c->lambda = prompt.header->lambda;
  v->s.arena_bytes = rdkv_block_bound(c, (uint32_t)o->block) * (size_t)(blocks + o->merge);
  v->s.arena = (uint8_t *)memory(v->s.arena_bytes, &v->owner[2]);
  v->scratch_bytes = rdkv_sequence_scratch(c, (uint32_t)o->block);
  v->scratch = memory(v->scratch_bytes, &v->owner[3]);
}

/* Whether the last n segments are blocks, or what was made of blocks, of equally many tokens. */
static int alike(const rdkv_sequence *s, int n) {
  int i;
  if (s->n_segments - 1 < n) return 0; /* the first is the prompt */
  for (i = 2; i <= n; i++)
    if (s->segments[s->n_segments - i].header->n_tokens !=
        s->segments[s->n_segments - 1].header->n_tokens)
      return 0;
  return 1;
}

/* What the sequence takes now: segments, and dense tokens with what is kept of their queries. */
static double kept(const living *v) {
  double bytes = 0;
  int i;
  for (i = 0; i < v->s.n_segments; i++) bytes += (double)v->s.segments[i].header->total_bytes;
  return bytes;
}
static double dense(const living *v, int with_queries) {
  const rdkv_config *c = &v->config;
  double each = 2.0 * c->n_layers * (c->k_dim + c->v_dim);
  double bytes = each * c->n_kv_heads * v->s.tail.n_tokens[0];
  if (v->s.queries.memory && with_queries)
    bytes += (each * c->n_q_heads + 4.0 * c->n_layers * v->s.lse_stride) * v->s.queries.n_tokens[0];
  return bytes;
}

static void attend(void *context, int layer, int n, const int *position, const float *q,
                   const float *k, const float *val, float *out) {
  int r;
  (void)context, (void)position;
  for (r = 0; r < n; r++) {
    living *v = &run.v[r];
    const rdkv_config *c = &v->config;
    int kv_dim = c->n_kv_heads * c->k_dim, dim = c->n_q_heads * c->k_dim;
    check(rdkv_tail_append(&v->s.tail, layer,
                           rdkv_dense(k + r * kv_dim, RDKV_F32, c->n_kv_heads, c->k_dim),
                           rdkv_dense(val + r * kv_dim, RDKV_F32, c->n_kv_heads, c->k_dim), 1),
          "append");
    check(rdkv_sequence_attend(c, &v->s, layer, q + r * dim, out + r * dim, NULL, run.work,
                               run.work_bytes),
          "attend");
  }
}

/* sum p log(p / r) of two rows of 256 logits; *nats: -log of the true byte by r. */
static double divergence(const float *exact, const float *row, int truth, double *nats) {
  double p = 0, r = 0, sum = 0, pm = (double)exact[0], rm = (double)row[0];
  int i;
  for (i = 1; i < 256; i++) {
    if ((double)exact[i] > pm) pm = (double)exact[i];
    if ((double)row[i] > rm) rm = (double)row[i];
  }
  for (i = 0; i < 256; i++) p += exp((double)exact[i] - pm), r += exp((double)row[i] - rm);
  p = pm + log(p), r = rm + log(r);
  for (i = 0; i < 256; i++)
    sum += exp((double)exact[i] - p) * ((double)exact[i] - p - ((double)row[i] - r));
  *nats = r - (double)row[truth];
  return sum;
}

static int write_file(void *file, const void *data, size_t bytes) {
  return fwrite(data, 1, bytes, (FILE *)file) != bytes;
}

static void usage(const options *o) {
  printf(
      "usage: generate [options]\n"
      "  --prompt N    bytes of the prompt (%d)\n"
      "  --tokens N    bytes that follow (%d)\n"
      "  --block N     tokens of a block (%d)\n"
      "  --recent N    tokens that stay dense at least (%d)\n"
      "  --keep N      what compression leaves of prompt and blocks, in %% of fp16 (%g)\n"
      "  --window N    queries at the prompt's end that decide what matters (%d)\n"
      "  --pool N      tokens over which their attention is averaged, odd (%d)\n"
      "  --block-pool N  the same for blocks (%d)\n"
      "  --merge N     segments of equally many tokens that become one; 0 = never (%d)\n"
      "  --bar X       times the prompt's KL that blocks may cost; 0 = any (%g)\n"
      "  --chunk N     tokens of a chunk of the prompt (%d)\n"
      "  --chunk-bar X   times the prompt's KL that chunks may cost; 0 = any (%g)\n"
      "  --samples N   stretches of text (%d)\n"
      "  --model FILE  checkpoint of llama2.c, version 2 (needle-4m.q8.bin)\n"
      "  --text FILE   prose (frankenstein.txt)\n"
      "  --save FILE   writes the last sequence with blocks, for examples/inspect.c\n",
      o->prompt, o->tokens, o->block, o->recent, o->keep, o->window, o->pool, o->block_pool,
      o->merge, o->bar, o->chunk, o->chunk_bar, o->samples);
  exit(0);
}

static void parse(int argc, char **argv, options *o) {
  int i;
  for (i = 1; i < argc; i++) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    char *end;
    if (strcmp(name, "--help") == 0) usage(o);
    if (!value) die("%s: unknown, or without its value; see --help", name);
    i++;
    if (strcmp(name, "--prompt") == 0)
      o->prompt = number(value, 64, 1 << 15);
    else if (strcmp(name, "--tokens") == 0)
      o->tokens = number(value, 1, 1 << 15);
    else if (strcmp(name, "--block") == 0)
      o->block = number(value, 1, 1024);
    else if (strcmp(name, "--recent") == 0)
      o->recent = number(value, 0, 1 << 15);
    else if (strcmp(name, "--window") == 0)
      o->window = number(value, 1, 1024);
    else if (strcmp(name, "--pool") == 0)
      o->pool = number(value, 1, 255);
    else if (strcmp(name, "--samples") == 0)
      o->samples = number(value, 1, 1000);
    else if (strcmp(name, "--model") == 0)
      o->model = value;
    else if (strcmp(name, "--text") == 0)
      o->text = value;
    else if (strcmp(name, "--save") == 0)
      o->save = value;
    else if (strcmp(name, "--block-pool") == 0)
      o->block_pool = number(value, 1, 255);
    else if (strcmp(name, "--merge") == 0)
      o->merge = number(value, 0, 1000);
    else if (strcmp(name, "--chunk") == 0)
      o->chunk = number(value, 1, 1 << 15);
    else if (strcmp(name, "--bar") == 0 || strcmp(name, "--chunk-bar") == 0) {
      double *bar = name[2] == 'b' ? &o->bar : &o->chunk_bar;
      *bar = strtod(value, &end);
      if (*end || !(*bar >= 0)) die("%s wants a number", name);
    } else if (strcmp(name, "--keep") == 0) {
      o->keep = strtod(value, &end);
      if (*end || !(o->keep > 0 && o->keep <= 100)) die("--keep wants a percentage");
    } else
      die("unknown option %s; see --help", name);
  }
}

int main(int argc, char **argv) {
  options o = {4096, 2048, 256, 768, 64, 17, 1, 1, 0, 1024, 10, 1.3, 4, NULL, NULL, NULL};
  static living v[KINDS];
  model m;
  kv_cache cache;
  const char *error;
  uint8_t *text;
  size_t text_bytes = 0;
  float *exact, logits[KINDS * 256];
  double kl[KINDS] = {0}, nats[KINDS] = {0}, full = 0, part[KINDS] = {0};
  double prompt_bytes, token_bytes;
  int i, t, sample, every, failed = 0;

  parse(argc, argv, &o);
  if (!o.model) o.model = locate("examples/needle-4m.q8.bin", "../examples/needle-4m.q8.bin");
  if (!o.text) o.text = locate("examples/frankenstein.txt", "../examples/frankenstein.txt");
  if ((error = model_load(&m, o.model)) != NULL) die("%s: %s", o.model, error);
  text = model_read_file(o.text, &text_bytes);
  if (!text || text_bytes > 1 << 30 || text_bytes < (size_t)(o.prompt + o.tokens + 1))
    die("%s: cannot be used", o.text);
  if (o.prompt + o.tokens > m.context) die("the model reads at most %d bytes", m.context);
  exact = (float *)malloc((size_t)((o.prompt + o.tokens) * m.vocab) * sizeof *exact);
  if (!exact || !kv_cache_init(&cache, &m, o.prompt + o.tokens)) die("out of memory");
  every = o.tokens >= 16 ? o.tokens / 8 : o.tokens;

  for (sample = 0; sample < o.samples; sample++) {
    size_t step = (text_bytes - (size_t)(o.prompt + o.tokens + 1)) / (size_t)o.samples;
    const uint8_t *at = text + (size_t)sample * step;
    cache.n = 0;
    kv_cache_prefill(&m, &cache, at, o.prompt, exact, NULL);
    for (i = 0; i < KINDS; i++) live(&v[i], i, &cache, &o);
    kv_cache_prefill(&m, &cache, at + o.prompt, o.tokens, exact, NULL);
    run.v = v, run.work_bytes = rdkv_attend_scratch(&v[0].config);
    prompt_bytes = kept(&v[ALONE]);
    token_bytes = 2.0 * m.n_layers * 2 * m.kv_dim;
    { /* the same for all */
      void *owner;
      run.work = memory(run.work_bytes, &owner);
      if (sample == 0)
        printf("%d bytes of prompt, keep %g %%: %.0f KB (fp16: %.0f KB); blocks of %d\n", o.prompt,
               o.keep, kept(&v[0]) / 1e3,
               (double)o.prompt * 2 * (double)(m.n_layers * 2 * m.kv_dim) / 1e3, o.block);
      printf("\n          ");
      for (i = 0; i < CHUNKS; i++) printf("   %-38s", NAME[i]);
      printf("\n    tokens");
      for (i = 0; i < CHUNKS; i++) printf("   kept KB  dense KB  queries KB        KL");
      printf("\n");
      for (t = 0; t < o.tokens; t++) {
        int position[KINDS];
        uint8_t token[KINDS];
        double mean[KINDS];
        for (i = 0; i < KINDS; i++) position[i] = o.prompt + t, token[i] = at[o.prompt + t];
        model_forward(&m, KINDS, token, position, attend, NULL, logits);
        for (i = 0; i < KINDS; i++) {
          double x, exact_nats;
          double d = divergence(exact + t * 256, logits + i * 256, at[o.prompt + t + 1], &x);
          kl[i] += d, part[i] += d, nats[i] += x;
          if (i == 0)
            divergence(exact + t * 256, exact + t * 256, at[o.prompt + t + 1], &exact_nats),
                full += exact_nats;
          if (i == ALONE || i == CHUNKS) continue;
          check(rdkv_sequence_compress(&v[i].config, &v[i].s, (uint32_t)o.block, (uint32_t)o.recent,
                                       v[i].scratch, v[i].scratch_bytes),
                "block");
          while (o.merge > 0 && alike(&v[i].s, o.merge)) {
            void *own;
            size_t need = rdkv_sequence_merge_scratch(&v[i].config, &v[i].s, o.merge);
            void *scratch = memory(need, &own);
            check(rdkv_sequence_merge(&v[i].config, &v[i].s, o.merge, scratch, need), "merge");
            free(own);
          }
          if (v[i].s.tail.n_tokens[0] >= (uint32_t)(o.block + o.recent)) failed = 1;
          if (i == BLOCKS && kept(&v[i]) - prompt_bytes > o.keep / 100 * token_bytes * (t + 1))
            failed = 1;
        }
        if ((t + 1) % every) continue;
        printf("%10d", t + 1);
        for (i = 0; i < CHUNKS; i++) {
          mean[i] = part[i] / every, part[i] = 0;
          printf("  %8.1f  %8.1f    %8.1f  %8.5f", kept(&v[i]) / 1e3, dense(&v[i], 0) / 1e3,
                 (dense(&v[i], 1) - dense(&v[i], 0)) / 1e3, mean[i]);
        }
        printf("\n");
      }
      free(owner);
    }
    if (o.save) {
      FILE *file = fopen(o.save, "wb");
      if (!file) die("%s: cannot be written", o.save);
      check(rdkv_save(&v[BLOCKS].s, write_file, file), o.save);
      if (fclose(file) != 0) die("%s: cannot be written", o.save);
    }
    for (i = 0; i < KINDS; i++) {
      int j;
      for (j = 0; j < 4; j++) free(v[i].owner[j]);
    }
  }
  t = o.samples * o.tokens;
  printf(
      "\n                     KL against full   to prompt alone   bits a byte (full cache %.4f)\n",
      full / t / log(2.0));
  for (i = 0; i < KINDS; i++)
    printf("%-18s   %15.5f   %14.2fx   %11.4f\n", NAME[i], kl[i] / t, kl[i] / kl[ALONE],
           nats[i] / t / log(2.0));
  if (o.bar > 0 && !(kl[BLOCKS] <= o.bar * kl[ALONE])) failed = 1;
  if (o.chunk_bar > 0 && !(kl[CHUNKS] <= o.chunk_bar * kl[ALONE])) failed = 1;
  printf("%s: ", failed ? "FAIL" : "ok");
  if (o.bar > 0) printf("KL of blocks at most %g times that of the prompt alone, ", o.bar);
  if (o.chunk_bar > 0) printf("of chunks at most %g times, ", o.chunk_bar);
  printf("less than %d tokens dense, the others in %g %%\n", o.block + o.recent, o.keep);
  kv_cache_free(&cache), model_free(&m), free(text), free(exact);
  return failed;
}
