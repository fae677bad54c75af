/* Everything that can be done with an untrusted block: open it, then unpack, attend and report.
   As a fuzz target: clang -fsanitize=fuzzer,address,undefined fuzz_open.c rdkv_impl.c -lm.
   The first byte of the input chooses: bit 0 repairs the checksums, bit 1 opens with RDKV_MAP. */
#include "test.h"

static uint64_t mix_word(uint64_t w, uint64_t i) {
  uint64_t z = w + (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

/* Of bytes [begin, end) of a block. */
static uint64_t checksum_of(const uint8_t *block, uint64_t begin, uint64_t end) {
  uint64_t sum = 0, i, w;
  for (i = begin; i < end; i += 8) {
    w = 0;
    memcpy(&w, block + i, end - i < 8 ? (size_t)(end - i) : 8);
    sum += mix_word(w, i / 8);
  }
  return sum;
}

/* Makes both checksums right wherever the block's own lengths let them be computed. */
static void repair_checksums(uint8_t *block, size_t bytes) {
  uint64_t total, head, sum = 0;
  if (bytes < 256) return;
  memcpy(&total, block + 8, 8), memcpy(&head, block + 16, 8);
  if (total > bytes || head > total || head < 40 || head % 8) return;
  sum = checksum_of(block, head, total), memcpy(block + 32, &sum, 8);
  sum = 0, memcpy(block + 24, &sum, 8);
  sum = checksum_of(block, 0, head), memcpy(block + 24, &sum, 8);
}

static void use_head(const rdkv_segment *s, const rdkv_config *cfg, int layer, int head) {
  uint32_t n = 0, *position;
  float *k, *v, *q, *out, lse[64];
  size_t kd = (size_t)cfg->k_dim, vd = (size_t)cfg->v_dim;
  int group = cfg->n_q_heads / cfg->n_kv_heads, i;
  rdkv_report report;
  rdkv_cache cache;
  void *scratch;
  CHECK_OK(rdkv_report_segment(s, layer, head, &report));
  CHECK_OK(rdkv_unpack(s, layer, head, NULL, NULL, NULL, &n));
  position = (uint32_t *)mem_new(4 * (size_t)n);
  k = new_floats(n * kd), v = new_floats(n * vd);
  CHECK_OK(rdkv_unpack(s, layer, head, k, v, s->header->positions ? position : NULL, &n));
  mem_free(position), mem_free(k), mem_free(v);
  if (group > 64) return;
  memset(&cache, 0, sizeof cache);
  cache.segments = s, cache.n_segments = 1, cache.isa = cfg->isa;
  q = new_floats((size_t)group * kd), out = new_floats((size_t)group * vd);
  for (i = 0; i < group * cfg->k_dim; i++) q[i] = (float)(i % 7) - 3.0f;
  scratch = mem_new(rdkv_attend_scratch(cfg));
  CHECK_OK(
      rdkv_attend_head(cfg, &cache, layer, head, q, out, lse, scratch, rdkv_attend_scratch(cfg)));
  mem_free(q), mem_free(out), mem_free(scratch);
}

/* 1 if the block could be opened (and then everything was done with it). */
static int use_block(const uint8_t *block, size_t bytes, rdkv_open_mode mode, rdkv_isa isa) {
  rdkv_segment s;
  rdkv_config cfg;
  rdkv_report report;
  uint32_t l, h;
  if (rdkv_open(block, bytes, mode, &s) != RDKV_OK) return 0;
  memset(&cfg, 0, sizeof cfg);
  cfg.n_q_heads = (int32_t)s.header->n_q_heads, cfg.n_kv_heads = (int32_t)s.header->n_kv_heads;
  cfg.k_dim = (int32_t)s.header->k_dim, cfg.v_dim = (int32_t)s.header->v_dim, cfg.isa = isa;
  if (!CHECK_OK(rdkv_resolve(&cfg, &cfg))) return 1;
  CHECK_OK(rdkv_report_segment(&s, -1, 0, &report));
  for (l = 0; l < s.header->n_layers; l++)
    for (h = 0; h < s.header->n_kv_heads; h++)
      use_head(&s, &cfg, (int)(s.header->first_layer + l), (int)h);
  return 1;
}

#ifndef FUZZ_NO_ENTRY
#ifdef __cplusplus
extern "C"
#endif
    int
    LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint8_t *block;
  if (size < 1) return 0;
  block = (uint8_t *)mem_new(size - 1);
  memcpy(block, data + 1, size - 1);
  if (data[0] & 1) repair_checksums(block, size - 1);
  use_block(block, size - 1, data[0] & 2 ? RDKV_MAP : RDKV_VERIFY, RDKV_ISA_AUTO);
  mem_free(block);
  if (test.failed) abort();
  return 0;
}
#endif
