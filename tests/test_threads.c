/* Many threads attend to one const cache, append to one tail (a layer each) and compress layers of
   their own: the results are those of one thread. Worth running under TSan. POSIX threads. */
#include <pthread.h>
#include "problem.h"

enum { N_THREADS = 4, N_ROUNDS = 20, HQ = 8, DIM = 64 };

static problem shared;
static rdkv_segment segment;
static rdkv_tail tail;
static rdkv_cache cache;
static float expected[HQ * DIM];

/* What one thread works with; nothing in it is shared. */
typedef struct job {
  int index, wrong;
  uint8_t *block;
  size_t bytes;
  void *scratch;
} job;

static void *attend_many(void *argument) {
  job *j = (job *)argument;
  size_t bytes = rdkv_attend_scratch(&shared.cfg);
  float out[HQ * DIM];
  int i, h;
  for (i = 0; i < N_ROUNDS; i++) {
    memset(out, 0, sizeof out);
    if (i % 2)
      j->wrong +=
          rdkv_attend(&shared.cfg, &cache, 0, shared.q[0], out, NULL, j->scratch, bytes) != RDKV_OK;
    else
      for (h = 0; h < 2; h++)
        j->wrong += rdkv_attend_head(&shared.cfg, &cache, 0, h, shared.q[0] + h * 4 * DIM,
                                     out + h * 4 * DIM, NULL, j->scratch, bytes) != RDKV_OK;
    j->wrong += memcmp(out, expected, sizeof out) != 0;
  }
  return NULL;
}

static void *append_and_compress(void *argument) {
  job *j = (job *)argument;
  int l = j->index;
  uint32_t i;
  rdkv_config one = shared.cfg;
  one.n_layers = 1;
  for (i = 0; i < 30; i++)
    j->wrong += rdkv_tail_append(&tail, l, shared.kv[l].k, shared.kv[l].v, 2) != RDKV_OK;
  j->bytes = rdkv_block_bound(&one, shared.n_tokens);
  j->wrong += rdkv_compress(&one, &shared.kv[l], shared.n_tokens, j->block, j->bytes, &j->bytes,
                            j->scratch, rdkv_compress_scratch(&one, shared.n_tokens)) != RDKV_OK;
  return NULL;
}

static void run(void *(*work)(void *), job *jobs) {
  pthread_t threads[N_THREADS];
  int i;
  for (i = 0; i < N_THREADS; i++)
    if (pthread_create(&threads[i], NULL, work, &jobs[i])) exit(2);
  for (i = 0; i < N_THREADS; i++) {
    pthread_join(threads[i], NULL);
    CHECK_EQ(jobs[i].wrong, 0);
  }
}

static void concurrent_attend(void) {
  job jobs[N_THREADS];
  void *scratch = mem_new(rdkv_attend_scratch(&shared.cfg));
  int i;
  memset(jobs, 0, sizeof jobs);
  for (i = 0; i < N_THREADS; i++) jobs[i].scratch = mem_new(rdkv_attend_scratch(&shared.cfg));
  CHECK_OK(rdkv_attend(&shared.cfg, &cache, 0, shared.q[0], expected, NULL, scratch,
                       rdkv_attend_scratch(&shared.cfg)));
  run(attend_many, jobs);
  for (i = 0; i < N_THREADS; i++) mem_free(jobs[i].scratch);
  mem_free(scratch);
}

static void concurrent_layers(void) {
  job jobs[N_THREADS], alone[N_THREADS];
  rdkv_config one = shared.cfg;
  int i;
  one.n_layers = 1;
  memset(jobs, 0, sizeof jobs), memset(alone, 0, sizeof alone);
  for (i = 0; i < N_THREADS; i++) {
    jobs[i].index = alone[i].index = i;
    jobs[i].block = (uint8_t *)mem_new(rdkv_block_bound(&one, shared.n_tokens));
    alone[i].block = (uint8_t *)mem_new(rdkv_block_bound(&one, shared.n_tokens));
    jobs[i].scratch = alone[i].scratch = mem_new(rdkv_compress_scratch(&one, shared.n_tokens));
  }
  rdkv_tail_rewind(&tail, 0);
  run(append_and_compress, jobs);
  for (i = 0; i < N_THREADS; i++) CHECK_EQ(tail.n_tokens[i], 60);
  rdkv_tail_rewind(&tail, 0);
  for (i = 0; i < N_THREADS; i++) {
    append_and_compress(&alone[i]);
    CHECK(jobs[i].bytes == alone[i].bytes &&
          memcmp(jobs[i].block, alone[i].block, alone[i].bytes) == 0);
    mem_free(jobs[i].block), mem_free(alone[i].block), mem_free(jobs[i].scratch);
  }
}

int main(void) {
  rdkv_config c = config_of(HQ, 2, DIM, DIM);
  void *memory;
  size_t bytes;
  c.n_layers = 4, c.keep = 0.2;
  shared = problem_make(&c, 300, RDKV_F16, DENSE, 1);
  problem_compress(&shared);
  segment = problem_open(&shared);
  bytes = rdkv_tail_bytes(&shared.cfg, 60, RDKV_F16), memory = mem_new(bytes);
  CHECK_OK(rdkv_tail_init(&shared.cfg, 60, RDKV_F16, memory, bytes, &tail));
  CHECK_OK(rdkv_tail_append(&tail, 0, shared.kv[0].k, shared.kv[0].v, 33));
  cache.segments = &segment, cache.n_segments = 1, cache.tail = &tail, cache.isa = shared.cfg.isa;
  RUN(concurrent_attend);
  RUN(concurrent_layers);
  mem_free(memory);
  problem_free(&shared);
  return test_done();
}
