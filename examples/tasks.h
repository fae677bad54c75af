/* tasks.h - prompts with known answers, in the wording that needle-4m.q8.bin was trained on; shared
   by examples/needle.c and bench/quality.c. After the tasks of RULER (arXiv 2404.06654). */
#ifndef TASKS_H
#define TASKS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TASK_QUESTIONS 4
#define TASK_LINES 8

typedef enum task_kind {
  TASK_SINGLE,     /* one needle */
  TASK_MULTIKEY,   /* 8 needles, one is asked for */
  TASK_MULTIQUERY, /* 8 needles, 4 are asked for */
  TASK_MULTIVALUE, /* one key with 3 values */
  TASK_KV,         /* nothing but pairs of hex numbers */
  TASK_VARIABLES,  /* which variables hold a value, through a chain of assignments */
  TASK_PASSKEY,
  TASK_KINDS
} task_kind;

static const char *const TASK_NAME[TASK_KINDS] = {"single", "multikey", "multiquery", "multivalue",
                                                  "kv",     "vt",       "passkey"};

typedef struct task {
  char *body; /* owned */
  int body_bytes, n_questions;
  char question[TASK_QUESTIONS][64]; /* "\nQ: ...?\nA: " */
  char answer[TASK_QUESTIONS][64];   /* "...\n" */
} task;

/* splitmix64: any seed is good. */
static uint32_t task__random(uint64_t *state, uint32_t below) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (uint32_t)(((z ^ (z >> 31)) >> 32) * below >> 32);
}

static void task__digits(uint64_t *random, int n, int base, char *to) {
  int i;
  for (i = 0; i < n; i++) to[i] = "0123456789abcdef"[task__random(random, (uint32_t)base)];
  to[n] = 0;
}

/* Two or three syllables, "Kobu" or "Tesila"; to [7]. */
static void task__name(uint64_t *random, char *to) {
  int i, n = 2 + (int)task__random(random, 2);
  for (i = 0; i < n; i++) {
    *to++ = "bcdfghjklmnprstvwz"[task__random(random, 18)];
    *to++ = "aeiou"[task__random(random, 5)];
  }
  *to = 0;
  to[-2 * n] = (char)(to[-2 * n] - 'a' + 'A');
}

/* Copies whole sentences of the text to to, from *at on (wrapping around), while they fit
   into room bytes; the first may take first bytes. Returns the bytes copied; the last is a blank or
   a newline. */
static int task__prose(const char *text, int text_bytes, int *at, char *to, int first, int room) {
  int copied = 0;
  for (;;) {
    int from = *at, end = from;
    while (end < text_bytes && text[end] != '\n' &&
           !(strchr(".!?", text[end]) && text[end + 1] == ' '))
      end++;
    end += end < text_bytes && text[end] != '\n' ? 2 : 1;
    if (end > text_bytes) end = text_bytes;
    if (copied + end - from > (copied ? room : first)) return copied;
    memcpy(to + copied, text + from, (size_t)(end - from));
    copied += end - from;
    *at = end < text_bytes ? end : 0;
  }
}

/* Writes the body: prose, with the lines put in between sentences at random places, in their order.
   A sentence comes first: the model has seen no text that begins with a needle. */
static void task__haystack(task *t, uint64_t *random, int bytes, const char *text, int text_bytes,
                           char (*line)[80], int n_lines) {
  int depth[TASK_LINES + 1], prose = bytes, copied = 0, at, i, j;
  char *to = t->body;
  for (i = 0; i < n_lines; i++) prose -= (int)strlen(line[i]) + 2;
  if (prose < 0) prose = 0;
  for (i = 0; i < n_lines; i++) {
    int d = (int)task__random(random, (uint32_t)prose + 1);
    for (j = i; j > 0 && depth[j - 1] > d; j--) depth[j] = depth[j - 1];
    depth[j] = d;
  }
  depth[n_lines] = prose;
  at = (int)task__random(random, (uint32_t)text_bytes);
  while (at > 0 && text[at - 1] != '\n') at--;
  for (i = 0; i <= n_lines; i++) {
    int room = depth[i] - copied,
        n = task__prose(text, text_bytes, &at, to, i ? room : prose, room);
    copied += n, to += n;
    if (i == n_lines) break;
    to += sprintf(to, "\n%s\n", line[i]);
  }
  while (to > t->body && (to[-1] == ' ' || to[-1] == '\n')) to--;
  t->body_bytes = (int)(to - t->body);
}

/* Makes a task whose body has at most bytes bytes (512 or more). text is prose, one paragraph a
   line. Returns 0 if there is no memory. Free task.body. */
static int task_make(task *t, task_kind kind, int bytes, uint64_t seed, const char *text,
                     int text_bytes) {
  static const char *const KIND[4] = {"secret code", "lucky number", "door key", "ticket number"};
  char line[TASK_LINES][80], name[TASK_LINES][8], value[TASK_LINES][8];
  uint64_t random = seed * TASK_KINDS + kind;
  int n_lines = 0, what[TASK_LINES], i, j, q;
  memset(t, 0, sizeof *t);
  t->body = (char *)malloc((size_t)bytes + 128);
  if (!t->body) return 0;

  if (kind == TASK_KV) {
    int pairs = bytes / 15;
    char *to = t->body;
    for (i = 0; i < pairs; i++, to += 15) {
      task__digits(&random, 6, 16, to), to[6] = ' ';
      task__digits(&random, 6, 16, to + 7), memcpy(to + 13, "; ", 2);
    }
    t->body_bytes = pairs * 15 - 1;
    t->n_questions = TASK_QUESTIONS;
    for (q = 0; q < TASK_QUESTIONS; q++) {
      const char *pair = t->body + 15 * task__random(&random, (uint32_t)pairs);
      sprintf(t->question[q], "\nQ: %.6s?\nA: ", pair);
      sprintf(t->answer[q], "%.6s\n", pair + 7);
    }
    return 1;
  }

  switch (kind) {
    case TASK_SINGLE:
      n_lines = t->n_questions = 1;
      break;
    case TASK_MULTIKEY:
      n_lines = 8, t->n_questions = 1;
      break;
    case TASK_MULTIQUERY:
      n_lines = 8, t->n_questions = 4;
      break;
    case TASK_MULTIVALUE:
      n_lines = 3, t->n_questions = 1;
      break;
    case TASK_VARIABLES:
      n_lines = 7, t->n_questions = 1;
      break;
    default:
      n_lines = t->n_questions = 1;
      break;
  }
  for (i = 0; i < n_lines; i++) {
    do {
      task__name(&random, name[i]);
      for (j = 0; j < i && strcmp(name[i], name[j]) != 0; j++) {
      }
    } while (j < i);
    task__digits(&random, kind == TASK_VARIABLES || kind == TASK_PASSKEY ? 5 : 6, 10, value[i]);
    what[i] = (int)task__random(&random, 4);
    if (kind == TASK_MULTIVALUE && i > 0) what[i] = what[0], strcpy(name[i], name[0]);
    if (kind == TASK_VARIABLES) /* a chain of 4, and one of 3 that is not asked for */
      sprintf(line[i], i % 4 ? "VAR %s = VAR %s." : "VAR %s = %s.", name[i],
              i % 4 ? name[i - 1] : value[i]);
    else if (kind == TASK_PASSKEY)
      sprintf(line[i], "The pass key is %s. Remember it. %s is the pass key.", value[i], value[i]);
    else
      sprintf(line[i], "The %s of %s is %s.", KIND[what[i]], name[i], value[i]);
  }
  for (q = 0; q < t->n_questions; q++) { /* every other needle, or the one that the dice choose */
    char *question = t->question[q], *answer = t->answer[q];
    i = t->n_questions > 1 ? 2 * q + (int)task__random(&random, 2)
                           : (int)task__random(&random, (uint32_t)n_lines);
    if (kind == TASK_VARIABLES) {
      sprintf(question, "\nQ: Which variables hold %s?\nA: ", value[0]);
      sprintf(answer, "%s, %s, %s, %s\n", name[0], name[1], name[2], name[3]);
    } else if (kind == TASK_PASSKEY) {
      sprintf(question, "\nQ: What is the pass key?\nA: ");
      sprintf(answer, "%s\n", value[0]);
    } else if (kind == TASK_MULTIVALUE) {
      sprintf(question, "\nQ: What are all the %ss of %s?\nA: ", KIND[what[0]], name[0]);
      sprintf(answer, "%s, %s, %s\n", value[0], value[1], value[2]);
    } else {
      sprintf(question, "\nQ: What is the %s of %s?\nA: ", KIND[what[i]], name[i]);
      sprintf(answer, "%s\n", value[i]);
    }
  }
  task__haystack(t, &random, bytes, text, text_bytes, line, n_lines);
  return 1;
}

#endif /* TASKS_H */
