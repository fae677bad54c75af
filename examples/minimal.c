/* minimal.c - compress one layer's K and V to a tenth of the bytes, attend, compare.
   cc -O3 -o minimal examples/minimal.c -lm && ./minimal */
#define RDKV_IMPLEMENTATION
#include "../rdkv.h"
#include <stdio.h>
#include <stdlib.h>
enum { TOKENS = 4096, Q_HEADS = 8, KV_HEADS = 2, DIM = 128, WINDOW = 32 };
#define MEMORY(bytes) ((void *)(((uintptr_t)malloc((bytes) + 128) + 127) & ~(uintptr_t)127))

static float noise(uint32_t i) { /* from a hash of i, uniform, variance 1 */
  i = (i ^ (i >> 16)) * 0x7feb352du, i = (i ^ (i >> 15)) * 0x846ca68bu;
  return (float)(i >> 8) / (1 << 24) * 3.46f - 1.73f;
}

int main(void) {
  float *k = MEMORY(TOKENS * KV_HEADS * DIM * 4), *v = MEMORY(TOKENS * KV_HEADS * DIM * 4);
  float *q = MEMORY(WINDOW * Q_HEADS * DIM * 4), *out = MEMORY(Q_HEADS * DIM * 4);
  for (uint32_t i = 0; i < TOKENS * KV_HEADS * DIM; i++) k[i] = noise(i), v[i] = noise(~i);
  for (uint32_t i = 0; i < WINDOW * Q_HEADS * DIM;
       i++) { /* each head looks for a token of its own */
    uint32_t head = i / DIM % Q_HEADS, token = 500 * head, kv_head = head / (Q_HEADS / KV_HEADS);
    q[i] = 0.5f * noise(i * 7) + k[(token * KV_HEADS + kv_head) * DIM + i % DIM];
  }
  rdkv_config cfg = {0}; /* zero means default */
  cfg.n_q_heads = Q_HEADS, cfg.n_kv_heads = KV_HEADS, cfg.k_dim = DIM, cfg.keep = 0.10;
  rdkv_status st = rdkv_resolve(&cfg, &cfg);
  rdkv_kv kv = {rdkv_dense(k, RDKV_F32, KV_HEADS, DIM), rdkv_dense(v, RDKV_F32, KV_HEADS, DIM),
                rdkv_dense(q, RDKV_F32, Q_HEADS, DIM)};
  size_t bytes = 0, room = rdkv_block_bound(&cfg, TOKENS), need = 64 << 20;
  void *block = MEMORY(room), *scratch = MEMORY(need); /* ample; rdkv_*_scratch tell exactly */
  if (!st) st = rdkv_compress(&cfg, &kv, TOKENS, block, room, &bytes, scratch, need);
  rdkv_segment segment;
  if (!st) st = rdkv_open(block, bytes, RDKV_VERIFY, &segment);
  rdkv_cache cache = {&segment, 1, NULL, cfg.isa};
  if (!st) st = rdkv_attend(&cfg, &cache, 0, q, out, NULL, scratch, need);
  double error = 0;
  if (!st) st = rdkv_measure_error(&cfg, &cache, 0, &kv, TOKENS, q, 1, &error, scratch, need);
  printf("%s: %lu bytes instead of %d, error of the output %.3f\n", rdkv_status_string(st),
         (unsigned long)bytes, TOKENS * KV_HEADS * DIM * 4, error);
}
