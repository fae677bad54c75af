/* inspect.c - what is in a saved cache, and whether it is whole

     cc -O3 -o inspect examples/inspect.c -lm && ./inspect FILE

   Reads files of rdkv_save and single blocks of rdkv_pack and rdkv_compress. Everything is checked,
   every byte; --map checks only what rdkv_load checks with RDKV_MAP. Exits with 0 if all is well.
 */

#define RDKV_IMPLEMENTATION
#include "../rdkv.h"
#include <stdio.h>
#include <stdlib.h>

static const char *path;

static int fail(const char *what) {
  fprintf(stderr, "inspect: %s: %s\n", path, what);
  return 1;
}

static void usage(void) {
  printf(
      "usage: inspect [--map] [--heads] FILE\n"
      "  FILE      a sequence saved by rdkv_save, or a block of rdkv_pack or rdkv_compress\n"
      "  --heads   a line for each layer and kv head too\n"
      "  --map     check heads and tail only, not the codes\n");
  exit(0);
}

static void widths(const rdkv_report *r) {
  static const int bits[5] = {0, 2, 4, 8, 16};
  int i;
  printf("V tokens");
  for (i = 0; i < 5; i++) printf(" %d:%lu", bits[i], (unsigned long)r->v_tokens[i]);
  printf("  K channels");
  for (i = 0; i < 4; i++) printf(" %d:%lu", bits[i], (unsigned long)r->k_channels[i]);
  printf("\n");
}

static void show(const rdkv_segment *s, int heads) {
  static const char *const profile[] = {"joint", "paper"};
  static const char *const scope[] = {"model", "layer", "head", "lambda"};
  const rdkv_header *h = s->header;
  rdkv_report r;
  uint32_t layer, head;
  rdkv_report_segment(s, -1, 0, &r);
  printf("  tokens %lu to %lu, layers %lu to %lu\n", (unsigned long)h->token_begin,
         (unsigned long)(h->token_begin + h->n_tokens), (unsigned long)h->first_layer,
         (unsigned long)(h->first_layer + h->n_layers));
  printf("  %lu bytes, %.2f %% of fp16: head %lu, tables %lu, positions %lu, K %lu, V %lu + %lu\n",
         (unsigned long)r.bytes_total, 100 * r.ratio, (unsigned long)r.bytes_head,
         (unsigned long)r.bytes_tables, (unsigned long)r.bytes_positions, (unsigned long)r.bytes_k,
         (unsigned long)r.bytes_v, (unsigned long)r.bytes_v_params);
  printf("  profile %s, scope %s, window %lu, pool %lu, keep %g, lambda %g\n",
         h->profile < 2 ? profile[h->profile] : "?", h->scope < 4 ? scope[h->scope] : "?",
         (unsigned long)h->window, (unsigned long)h->pool, h->keep, h->lambda);
  printf("  all heads:         "), widths(&r);
  for (layer = 0; layer < h->n_layers && heads; layer++)
    for (head = 0; head < h->n_kv_heads; head++) {
      rdkv_report_segment(s, (int)(h->first_layer + layer), (int)head, &r);
      printf("  layer %3lu head %3lu: ", (unsigned long)(h->first_layer + layer),
             (unsigned long)head);
      widths(&r);
    }
}

/* A single block. */
static int inspect_block(const uint8_t *data, size_t bytes, rdkv_open_mode mode, int heads) {
  rdkv_segment s;
  rdkv_status st = rdkv_open(data, bytes, mode, &s);
  if (st != RDKV_OK) return fail(rdkv_status_string(st));
  printf("%s: a block, format %lu: %lu query and %lu kv heads, K %lu, V %lu\n", path,
         (unsigned long)s.header->version, (unsigned long)s.header->n_q_heads,
         (unsigned long)s.header->n_kv_heads, (unsigned long)s.header->k_dim,
         (unsigned long)s.header->v_dim);
  show(&s, heads);
  if (s.header->total_bytes < bytes) return fail("bytes after the end of the block");
  return 0;
}

static int inspect_file(const uint8_t *data, size_t bytes, rdkv_open_mode mode, int heads) {
  static const char *const type[] = {"f32", "f16", "bf16"};
  rdkv_config cfg = {0};
  rdkv_sequence s;
  rdkv_file f;
  rdkv_status st = rdkv_file_head(data, bytes, &f);
  size_t need;
  void *memory = NULL;
  int i;
  if (st != RDKV_OK) return fail(rdkv_status_string(st));
  printf("%s: a sequence, version %lu: %lu layers, %lu query and %lu kv heads, K %lu, V %lu\n",
         path, (unsigned long)f.version, (unsigned long)f.n_layers, (unsigned long)f.n_q_heads,
         (unsigned long)f.n_kv_heads, (unsigned long)f.k_dim, (unsigned long)f.v_dim);
  printf("%lu tokens in %lu bytes: %lu segments, then %lu dense tokens in %s, queries of %lu\n",
         (unsigned long)(f.tail_begin + f.n_tail), (unsigned long)f.total_bytes,
         (unsigned long)f.n_segments, (unsigned long)f.n_tail, type[f.tail_dtype],
         (unsigned long)f.n_queries);
  cfg.n_layers = (int32_t)f.n_layers, cfg.n_q_heads = (int32_t)f.n_q_heads;
  cfg.n_kv_heads = (int32_t)f.n_kv_heads, cfg.k_dim = (int32_t)f.k_dim;
  cfg.v_dim = (int32_t)f.v_dim;
  if ((st = rdkv_resolve(&cfg, &cfg)) != RDKV_OK) return fail(rdkv_status_string(st));
  need = rdkv_sequence_bytes(&cfg, (int)f.n_segments, f.n_tail, (rdkv_dtype)f.tail_dtype, 1);
  if (need) memory = malloc(need + 64);
  if (!memory) return fail("not enough memory");
  st = rdkv_sequence_init(&cfg, (int)f.n_segments, f.n_tail, (rdkv_dtype)f.tail_dtype, 1,
                          (uint8_t *)memory + (64 - (uintptr_t)memory % 64) % 64, need, &s);
  if (st == RDKV_OK) st = rdkv_load(&cfg, data, bytes, mode, &s);
  for (i = 0; st == RDKV_OK && i < s.n_segments; i++) {
    printf("segment %d\n", i);
    show(&s.segments[i], heads);
  }
  free(memory);
  return st == RDKV_OK ? 0 : fail(rdkv_status_string(st));
}

int main(int argc, char **argv) {
  rdkv_open_mode mode = RDKV_VERIFY;
  int heads = 0, i, failed;
  uint32_t magic = 0;
  uint8_t *memory, *data;
  long size = -1;
  FILE *file;
  for (i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--help") == 0) usage();
    if (strcmp(argv[i], "--map") == 0)
      mode = RDKV_MAP;
    else if (strcmp(argv[i], "--heads") == 0)
      heads = 1;
    else if (argv[i][0] == '-' || path) {
      fprintf(stderr, "inspect: '%s' is not an option, or one file too many; see --help\n",
              argv[i]);
      return 2;
    } else
      path = argv[i];
  }
  if (!path) {
    fputs("inspect: which file? see --help\n", stderr);
    return 2;
  }
  file = fopen(path, "rb");
  if (!file) return fail("cannot be opened");
  if (fseek(file, 0, SEEK_END) == 0) size = ftell(file);
  if (size < 0 || fseek(file, 0, SEEK_SET) != 0) return fclose(file), fail("cannot be read");
  memory = (uint8_t *)malloc((size_t)size + 128);
  if (!memory) return fclose(file), fail("not enough memory");
  data = memory + (128 - (uintptr_t)memory % 128) % 128;
  if (fread(data, 1, (size_t)size, file) != (size_t)size)
    return fclose(file), free(memory), fail("cannot be read");
  fclose(file);
  if (size >= 4) memcpy(&magic, data, 4);
  if (magic == 0x52444b53 || magic == 0x52444b56)
    failed = fail("was written by a machine of the other byte order");
  else if (magic == 0x564b4452) /* "RDKV" */
    failed = inspect_block(data, (size_t)size, mode, heads);
  else if (magic == 0x534b4452) /* "RDKS" */
    failed = inspect_file(data, (size_t)size, mode, heads);
  else
    failed = fail("neither a saved sequence nor a block");
  if (!failed)
    printf("ok%s\n",
           mode == RDKV_VERIFY ? ": every byte is as it was written" : ", codes unchecked");
  free(memory);
  return failed;
}
