/* packed.h - all that lies between a transformer (model.h) and rdkv.h: a sequence whose prompt is
   compressed and whose later tokens go to a dense tail. Shared by needle.c and bench/quality.c. */
#ifndef PACKED_H
#define PACKED_H

#include "../rdkv.h"
#include "model.h"

typedef struct packed {
  rdkv_config config;
  rdkv_segment segment[MODEL_LAYERS]; /* the prompt: one block, or one for each layer */
  rdkv_tail tail;                     /* what came after it */
  rdkv_cache cache;
  size_t bytes; /* of all blocks */
  void *block, *tail_memory, *work;
  size_t work_bytes;
  void *owner[3];
} packed;

/* bytes of memory, aligned to 128; *owner is what free wants. */
static void *packed__memory(size_t bytes, void **owner) {
  uint8_t *memory = (uint8_t *)malloc(bytes + 128);
  *owner = memory;
  return memory ? memory + (128 - (uintptr_t)memory % 128) : NULL;
}

/* One layer of a dense cache as rdkv.h wants it: llama2.c's layout is a [token][head][dim] array.
 */
static rdkv_kv packed_layer(const kv_cache *dense, int window, int layer) {
  const model *m = dense->m;
  int first = layer * dense->capacity, seen = window < dense->n ? window : dense->n;
  rdkv_kv kv;
  kv.k = rdkv_dense(dense->k + first * m->kv_dim, RDKV_F32, m->n_kv_heads, m->head_dim);
  kv.v = rdkv_dense(dense->v + first * m->kv_dim, RDKV_F32, m->n_kv_heads, m->head_dim);
  kv.q =
      rdkv_dense(dense->q + (first + dense->n - seen) * m->dim, RDKV_F32, m->n_heads, m->head_dim);
  return kv;
}

static inline void packed_free(packed *p) {
  free(p->owner[0]), free(p->owner[1]), free(p->owner[2]);
  memset(p, 0, sizeof *p);
}

/* Compresses what is in the dense cache, which may then be freed, and makes a tail for room tokens.
   want: profile, window, budget and so on; the shape is filled in. by_layer: NULL, or compress
   each layer without knowing the later ones, as one would do during prefill to need only one dense
   layer; [n_layers] slopes of the prompt before, zero at first, replaced by this one's. */
static inline rdkv_status packed_init(packed *p, const kv_cache *dense, const rdkv_config *want,
                                      rdkv_histogram *by_layer, int room) {
  const model *m = dense->m;
  uint32_t n = (uint32_t)dense->n;
  rdkv_config *c = &p->config;
  rdkv_kv kv[MODEL_LAYERS];
  rdkv_status st;
  void *scratch = NULL, *scratch_owner = NULL;
  size_t bound, scratch_bytes, tail_bytes;
  int l;

  memset(p, 0, sizeof *p);
  *c = *want;
  c->n_layers = m->n_layers, c->n_q_heads = m->n_heads, c->n_kv_heads = m->n_kv_heads;
  c->k_dim = m->head_dim;
  if ((st = rdkv_resolve(c, c)) != RDKV_OK) return st;
  for (l = 0; l < m->n_layers; l++) kv[l] = packed_layer(dense, c->window, l);

  bound = rdkv_block_bound(c, n);
  scratch_bytes = by_layer ? rdkv_stream_scratch(c, n) : rdkv_compress_scratch(c, n);
  tail_bytes = rdkv_tail_bytes(c, (uint32_t)room, RDKV_F16);
  p->work_bytes = rdkv_attend_scratch(c);
  p->block = packed__memory(bound, &p->owner[0]);
  p->tail_memory = packed__memory(tail_bytes, &p->owner[1]);
  p->work = packed__memory(p->work_bytes, &p->owner[2]);
  scratch = packed__memory(scratch_bytes, &scratch_owner);
  if (!p->block || !p->tail_memory || !p->work || !scratch) st = RDKV_ERR_MEMORY;

  if (st == RDKV_OK && by_layer) {
    rdkv_stream stream;
    memset(&stream, 0, sizeof stream);
    stream.earlier = by_layer;
    for (l = 0; l < m->n_layers && st == RDKV_OK; l++) {
      uint8_t *block = (uint8_t *)p->block + p->bytes;
      size_t bytes = 0;
      st = rdkv_stream_layer(c, &stream, &kv[l], n, block, bound - p->bytes, &bytes, scratch,
                             scratch_bytes);
      if (st == RDKV_OK) st = rdkv_open(block, bytes, RDKV_VERIFY, &p->segment[l]);
      p->bytes += bytes;
    }
  } else if (st == RDKV_OK) {
    st = rdkv_compress(c, kv, n, p->block, bound, &p->bytes, scratch, scratch_bytes);
    if (st == RDKV_OK) st = rdkv_open(p->block, p->bytes, RDKV_VERIFY, p->segment);
  }
  free(scratch_owner);
  if (st == RDKV_OK)
    st = rdkv_tail_init(c, (uint32_t)room, RDKV_F16, p->tail_memory, tail_bytes, &p->tail);
  p->cache.segments = p->segment, p->cache.n_segments = by_layer ? m->n_layers : 1;
  p->cache.tail = &p->tail, p->cache.isa = c->isa;
  if (st != RDKV_OK) packed_free(p);
  return st;
}

/* model_attention of a packed sequence: the new token's K and V go to the tail, its queries attend
   to segments and tail. */
static inline void packed_attend(void *context, int layer, int n, const int *position,
                                 const float *q, const float *k, const float *v, float *out) {
  packed *p = (packed *)context;
  const rdkv_config *c = &p->config;
  int kv_dim = c->n_kv_heads * c->k_dim, dim = c->n_q_heads * c->k_dim, r;
  (void)position;
  for (r = 0; r < n; r++) {
    rdkv_tensor key = rdkv_dense(k + r * kv_dim, RDKV_F32, c->n_kv_heads, c->k_dim);
    rdkv_tensor value = rdkv_dense(v + r * kv_dim, RDKV_F32, c->n_kv_heads, c->k_dim);
    rdkv_status st = rdkv_tail_append(&p->tail, layer, key, value, 1);
    if (st == RDKV_OK)
      st = rdkv_attend(c, &p->cache, layer, q + r * dim, out + r * dim, NULL, p->work,
                       p->work_bytes);
    if (st != RDKV_OK) { /* the tail is full: a bug of the caller */
      fprintf(stderr, "packed_attend: %s\n", rdkv_status_string(st));
      exit(1);
    }
  }
}

#endif /* PACKED_H */
