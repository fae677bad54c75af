/* needle.c - find needles in a haystack, from a compressed KV cache

     cc -O3 -o needle examples/needle.c -lm && ./needle

   A small language model (examples/needle-4m.q8.bin) reads some 4000 bytes of a novel, or of hex
   pairs, and answers questions about lines hidden in them: from its full cache, and from caches of
   a twentieth of the bytes. Add -fopenmp for more than one core. packed.h is all that concerns
   rdkv.h, model.h a transformer such as you may already have, tasks.h makes the questions. */

#define CLI_PROGRAM "needle"
#define RDKV_IMPLEMENTATION
#include "cli.h"
#include "packed.h"
#include "tasks.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#define STDERR_IS_TERMINAL isatty(2)
#else
#define STDERR_IS_TERMINAL 0
#endif

#define MAX_KEEPS 16
#define ANSWER_BYTES 48 /* and so the tokens that a sequence may grow by */

typedef enum method { FULL, JOINT, PAPER, SNAPKV, METHODS } method;
static const char *const METHOD_NAME[METHODS] = {"full cache", "rdkv joint", "rdkv paper",
                                                 "SnapKV fp16"};

static const task_kind TASKS[] = {TASK_MULTIKEY, TASK_MULTIQUERY, TASK_KV, TASK_MULTIVALUE};
#define N_TASKS ((int)(sizeof TASKS / sizeof *TASKS))

typedef struct options {
  int context, samples, window, pool, n_keeps;
  double keep[MAX_KEEPS]; /* in percent */
  uint64_t seed;
  const char *model, *text;
} options;

/* ---- SnapKV : what one would do without rdkv.h ------------------------------------------------
 */

/* Keeps the window and those tokens before it that the window attends to most (arXiv 2404.14469),
   as many as fit into the budget in fp16. Returns the bytes. (K and V stay float here: no rounding
   is held against SnapKV.) */
static uint64_t snapkv_init(kv_list *list, const kv_cache *dense, const options *o,
                            uint64_t budget) {
  const model *m = dense->m;
  int n = dense->n, heads = m->n_layers * m->n_kv_heads, l, h;
  uint64_t token_bytes = 4 * (uint64_t)m->head_dim;
  int keep = (int)(budget / (uint64_t)heads / token_bytes),
      begin = n > o->window ? n - o->window : 0;
  float *mass = (float *)malloc((size_t)((m->n_kv_heads + 1) * n) * sizeof *mass);
  float *pooled = mass + m->n_kv_heads * n;
  int ok = kv_list_init(list, m, keep + ANSWER_BYTES) && mass;
  for (l = 0; l < m->n_layers && ok; l++) {
    ok = kv_cache_mass(dense, l, begin, mass);
    for (h = 0; h < m->n_kv_heads && ok; h++) {
      kv_pool(mass + h * n, n, o->pool, pooled);
      ok = kv_list_take(list, dense, l, h, pooled, keep, n - begin);
    }
  }
  if (!ok) die("out of memory");
  free(mass);
  return (uint64_t)(keep * heads) * token_bytes;
}

/* ---- questions and answers --------------------------------------------------------------------
 */

typedef struct score {
  double bytes;
  int right[N_TASKS], asked[N_TASKS];
} score;

static int show_progress;

static void progress(int done, int all) {
  if (show_progress)
    fprintf(stderr, "\rreading %d of %d bytes%s", done, all, done == all ? "\r\033[K" : "");
}

/* Greedy decoding until the end of the line, from the logits of the prompt's last byte on. */
static void generate(model *m, model_attention *attend, void *context, int position,
                     const float *logits, char *answer) {
  float next[256];
  int n = 0, i, best;
  do {
    for (best = 0, i = 1; i < m->vocab; i++)
      if (logits[i] > logits[best]) best = i;
    answer[n++] = (char)best;
    if (best == '\n' || n == ANSWER_BYTES) break;
    {
      uint8_t token = (uint8_t)best;
      model_forward(m, 1, &token, &position, attend, context, next);
    }
    position++, logits = next;
  } while (1);
  answer[n] = 0;
}

static void print_bytes(double bytes) {
  printf(bytes < 1e6 ? "%7.1f KB" : "%7.2f MB", bytes < 1e6 ? bytes / 1e3 : bytes / 1e6);
}

/* Answers one question by one method. cache holds the prompt, logits those of its last byte. */
static void ask(model *m, kv_cache *cache, const options *o, method how, double keep, const task *t,
                int question, int kind, const float *logits, score *s) {
  char answer[ANSWER_BYTES + 1];
  uint64_t full = (uint64_t)cache->n * (uint64_t)(m->n_layers * m->kv_dim) * 4, bytes = full;
  uint64_t budget = (uint64_t)(keep / 100 * (double)full);
  int right;
  if (how == FULL) {
    generate(m, kv_cache_attend, cache, cache->n, logits, answer);
  } else if (how == SNAPKV) {
    kv_list list;
    bytes = snapkv_init(&list, cache, o, budget);
    generate(m, kv_list_attend, &list, cache->n, logits, answer);
    kv_list_free(&list);
  } else {
    packed p;
    rdkv_config want;
    rdkv_status st;
    memset(&want, 0, sizeof want);
    want.profile = how == JOINT ? RDKV_JOINT : RDKV_PAPER;
    want.window = o->window, want.pool = o->pool, want.budget_bytes = budget;
    if ((st = packed_init(&p, cache, &want, NULL, ANSWER_BYTES)) != RDKV_OK)
      die("%s at %g %%: %s", METHOD_NAME[how], keep, rdkv_status_string(st));
    bytes = p.bytes;
    generate(m, packed_attend, &p, cache->n, logits, answer);
    packed_free(&p);
  }
  right = strcmp(answer, t->answer[question]) == 0;
  s->bytes += (double)bytes;
  s->right[kind] += right;
  s->asked[kind]++;
  if (o->samples == 1) {
    printf("  %-12s %5.1f %%", METHOD_NAME[how], 100.0 * (double)bytes / (double)full);
    print_bytes((double)bytes);
    answer[strcspn(answer, "\n")] = 0;
    printf(" %s%s\n", answer, right ? "" : "   <- wrong");
  }
}

static void summary(const score *s, const char *name) {
  double mean = 0;
  int k, asked = 0;
  for (k = 0; k < N_TASKS; k++) {
    asked += s->asked[k];
    mean += (double)s->right[k] / s->asked[k] / N_TASKS;
  }
  printf("%-12s", name);
  print_bytes(s->bytes / asked);
  for (k = 0; k < N_TASKS; k++) printf("   %9.3f", (double)s->right[k] / s->asked[k]);
  printf("   %6.3f\n", mean);
}

static void usage(const options *o) {
  printf(
      "usage: needle [options]\n"
      "  --context N   bytes that the model reads before a question (%d)\n"
      "  --keep LIST   what compression leaves, in %% of the fp16 cache, e.g. 4,6.5,10 (%g)\n"
      "  --samples N   contexts of each task (%d); with more than one only the summary is printed\n"
      "  --seed N      of the first context (%d)\n"
      "  --window N    queries at the prompt's end that decide what matters (%d)\n"
      "  --pool N      tokens over which their attention is averaged, odd (%d)\n"
      "  --model FILE  checkpoint of llama2.c, version 2 (needle-4m.q8.bin)\n"
      "  --text FILE   prose to hide needles in (frankenstein.txt)\n",
      o->context, o->keep[0], o->samples, (int)o->seed, o->window, o->pool);
  exit(0);
}

static void parse(int argc, char **argv, options *o) {
  int i;
  for (i = 1; i < argc; i++) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(name, "--help") == 0) usage(o);
    if (!value) die("%s: unknown, or without its value; see --help", name);
    i++;
    if (strcmp(name, "--context") == 0)
      o->context = number(value, 512, 1 << 15);
    else if (strcmp(name, "--samples") == 0)
      o->samples = number(value, 1, 1000000);
    else if (strcmp(name, "--seed") == 0)
      o->seed = (uint64_t)number(value, 0, 1 << 30);
    else if (strcmp(name, "--window") == 0)
      o->window = number(value, 1, 1024);
    else if (strcmp(name, "--pool") == 0)
      o->pool = number(value, 1, 255);
    else if (strcmp(name, "--model") == 0)
      o->model = value;
    else if (strcmp(name, "--text") == 0)
      o->text = value;
    else if (strcmp(name, "--keep") == 0) {
      for (o->n_keeps = 0;; value++) {
        char *end;
        double keep = strtod(value, &end);
        if (end == value || !(keep > 0 && keep <= 100) || o->n_keeps == MAX_KEEPS ||
            (*end && *end != ','))
          die("--keep wants up to %d percentages with commas between them", MAX_KEEPS);
        o->keep[o->n_keeps++] = keep;
        if (!*(value = end)) break;
      }
    } else
      die("unknown option %s; see --help", name);
  }
}

int main(int argc, char **argv) {
  options o = {4096, 1, 64, 17, 1, {5}, 1, NULL, NULL};
  static score full, compressed[MAX_KEEPS][METHODS];
  model m;
  kv_cache cache;
  const char *error;
  uint8_t *text;
  size_t text_bytes = 0;
  float *logits;
  int sample, kind, q, i, how, room;

  parse(argc, argv, &o);
  if (!o.model) o.model = locate("needle-4m.q8.bin", "examples/needle-4m.q8.bin");
  if (!o.text) o.text = locate("frankenstein.txt", "examples/frankenstein.txt");
  if ((error = model_load(&m, o.model)) != NULL) die("%s: %s", o.model, error);
  text = model_read_file(o.text, &text_bytes);
  if (!text || text_bytes < (size_t)o.context || text_bytes > 1 << 30)
    die("%s: cannot be used", o.text);
  room = o.context + 2 * ANSWER_BYTES;
  if (room > m.context) die("the model reads at most %d bytes", m.context - 2 * ANSWER_BYTES);
  logits = (float *)malloc((size_t)(room * m.vocab) * sizeof *logits);
  if (!logits || !kv_cache_init(&cache, &m, room)) die("out of memory");
  show_progress = STDERR_IS_TERMINAL;
  printf("%s: %d layers, %d query and %d kv heads of %d\n", o.model, m.n_layers, m.n_heads,
         m.n_kv_heads, m.head_dim);

  for (sample = 0; sample < o.samples; sample++) {
    for (kind = 0; kind < N_TASKS; kind++) {
      task t;
      int body;
      if (!task_make(&t, TASKS[kind], o.context - 48, o.seed + (uint64_t)sample, (const char *)text,
                     (int)text_bytes))
        die("out of memory");
      cache.n = 0;
      kv_cache_prefill(&m, &cache, (const uint8_t *)t.body, t.body_bytes, logits, progress);
      body = cache.n;
      if (o.samples == 1)
        printf("\n%s: %d bytes, \"%.60s...\"\n", TASK_NAME[TASKS[kind]], body, t.body);
      else if (show_progress)
        fprintf(stderr, "\r\033[Ksample %d of %d, %s", sample + 1, o.samples,
                TASK_NAME[TASKS[kind]]);
      for (q = 0; q < t.n_questions; q++) {
        int bytes = (int)strlen(t.question[q]);
        const float *last = logits + (bytes - 1) * m.vocab;
        cache.n = body; /* forget the question before; each has a prompt of its own */
        kv_cache_prefill(&m, &cache, (const uint8_t *)t.question[q], bytes, logits, NULL);
        if (o.samples == 1) printf("%.*s\n", bytes - 5, t.question[q] + 1);
        ask(&m, &cache, &o, FULL, 100, &t, q, kind, last, &full);
        for (i = 0; i < o.n_keeps; i++) {
          for (how = JOINT; how < METHODS; how++)
            ask(&m, &cache, &o, (method)how, o.keep[i], &t, q, kind, last, &compressed[i][how]);
        }
      }
      free(t.body);
    }
  }
  if (show_progress) fprintf(stderr, "\r\033[K");

  printf("\nright answers          bytes");
  for (kind = 0; kind < N_TASKS; kind++) printf("   %9s", TASK_NAME[TASKS[kind]]);
  printf("     mean\n");
  summary(&full, METHOD_NAME[FULL]);
  for (i = 0; i < o.n_keeps; i++) {
    printf("keep %g %%\n", o.keep[i]);
    for (how = JOINT; how < METHODS; how++) summary(&compressed[i][how], METHOD_NAME[how]);
  }
  kv_cache_free(&cache), model_free(&m), free(text), free(logits);
  return 0;
}
