/* rdkv_compress is its stages in a row; rdkv_stream_layer ends on the budget, a layer at a time. */
#include "problem.h"

static void one_call_is_the_stages(void) {
  int i;
  for (i = 0; i < 6; i++) {
    rdkv_config c = config_of(8, 4, 64, 48);
    problem p;
    size_t bound, scratch_bytes, bytes = 0;
    void *scratch;
    uint8_t *block;
    rdkv_segment s;
    c.n_layers = 1 + i % 3, c.keep = 0.2, c.scope = (rdkv_scope)(i % 3), c.positions = i % 2;
    if (i == 5) c.profile = RDKV_PAPER, c.keep = 0.3;
    p = problem_make(&c, 500, RDKV_F16, i % 2 ? HEADS_FIRST : DENSE, (uint64_t)i);
    test_where("case %d", i);
    bound = rdkv_block_bound(&p.cfg, 500), scratch_bytes = rdkv_compress_scratch(&p.cfg, 500);
    scratch = mem_new(scratch_bytes), block = (uint8_t *)mem_new(bound);
    CHECK_OK(rdkv_compress(&p.cfg, p.kv, 500, block, bound, &bytes, scratch, scratch_bytes));
    CHECK_LE(bytes, bound);
    CHECK_OK(rdkv_open(block, bytes, RDKV_VERIFY, &s));
    CHECK_EQ(s.header->n_layers, c.n_layers), CHECK_EQ(s.header->first_layer, 0);
    CHECK_EQ(s.header->token_begin, 0), CHECK_EQ(s.header->n_tokens, 500);
    problem_compress(&p);
    if (i == 5) CHECK(p.block_bytes == bytes && memcmp(p.block, block, bytes) == 0);
    if (i < 5) CHECK_LE(bytes, 0.2 * 2 * c.n_layers * 500 * 4 * (64 + 48));
    mem_free(scratch), mem_free(block);
    problem_free(&p);
  }
}

/* Everything that the input may be: dtypes and layouts with one result each, T from 0 up. */
static void small_inputs(void) {
  static const uint32_t tokens[] = {0, 1, 2, 31, 32, 33, 100};
  int i, j;
  for (i = 0; i < 7; i++)
    for (j = 0; j < 6; j++) {
      rdkv_config c = config_of(7, 1, 80, 48);
      problem p;
      size_t bound, scratch_bytes, bytes = 77;
      void *scratch;
      uint8_t *block;
      rdkv_segment s;
      rdkv_status status;
      c.keep = j < 3 ? 0.1 : 1.0, c.profile = j % 3 == 2 ? RDKV_PAPER : RDKV_JOINT;
      if (j % 3 == 1) c.budget_bytes = 100000;
      p = problem_make(&c, tokens[i], (rdkv_dtype)(i % 3), (layout)j, 5);
      bound = rdkv_block_bound(&p.cfg, tokens[i]),
      scratch_bytes = rdkv_compress_scratch(&p.cfg, tokens[i]);
      scratch = mem_new(scratch_bytes), block = (uint8_t *)mem_new(bound);
      status = rdkv_compress(&p.cfg, p.kv, tokens[i], block, bound, &bytes, scratch, scratch_bytes);
      test_where("T %u, case %d", tokens[i], j);
      CHECK(status == RDKV_OK || status == RDKV_ERR_BUDGET);
      if (c.budget_bytes) CHECK_OK(status);
      if (status == RDKV_OK)
        CHECK_OK(rdkv_open(block, bytes, RDKV_VERIFY, &s));
      else
        CHECK(bytes == 77 && mem_untouched(block, bound));
      mem_free(scratch), mem_free(block);
      problem_free(&p);
    }
}

static void bad_arguments(void) {
  rdkv_config c = config_of(4, 2, 32, 0);
  problem p = problem_make(&c, 200, RDKV_F32, DENSE, 6);
  size_t bound, need, bytes = 77;
  uint8_t *block, *scratch;
  p.cfg.keep = 0.3;
  bound = rdkv_block_bound(&p.cfg, 200), need = rdkv_compress_scratch(&p.cfg, 200);
  block = (uint8_t *)mem_new(bound + 128), scratch = (uint8_t *)mem_new(need + 64);
  CHECK_STATUS(rdkv_compress(NULL, p.kv, 200, block, bound, &bytes, scratch, need),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_compress(&p.cfg, NULL, 200, block, bound, &bytes, scratch, need),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, NULL, bound, &bytes, scratch, need),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, bound, NULL, scratch, need),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, bound, &bytes, NULL, need),
               RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, 100, &bytes, scratch, need),
               RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, bound, &bytes, scratch, need - 1),
               RDKV_ERR_MEMORY);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block + 64, bound, &bytes, scratch, need),
               RDKV_ERR_ALIGNMENT);
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, bound, &bytes, scratch + 4, need),
               RDKV_ERR_ALIGNMENT);
  ((float *)p.raw[0][0])[777] = NAN;
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, bound, &bytes, scratch, need),
               RDKV_ERR_NONFINITE);
  ((float *)p.raw[0][0])[777] = 0.0f;
  p.cfg.budget_bytes = 1;
  CHECK_STATUS(rdkv_compress(&p.cfg, p.kv, 200, block, bound, &bytes, scratch, need),
               RDKV_ERR_BUDGET);
  CHECK(bytes == 77 && mem_untouched(block, bound + 128));
  mem_free(block), mem_free(scratch);
  problem_free(&p);
}

/* Layer by layer: never over the budget, and nearly all of it spent in the end. */
static void streaming(void) {
  static const uint32_t tokens[] = {200, 4096};
  static const double keeps[] = {0.06, 0.1, 0.25};
  int i, j, l;
  for (i = 0; i < 2; i++)
    for (j = 0; j < 3; j++) {
      rdkv_config c = config_of(4, 2, 64, 0);
      problem p;
      rdkv_stream stream;
      rdkv_segment s[4];
      uint8_t *block[4];
      size_t scratch_bytes, bytes, total = 0;
      void *scratch;
      double budget, together, apart = 0.0;
      rdkv_report report;
      c.n_layers = 4, c.keep = keeps[j];
      p = problem_make(&c, tokens[i], RDKV_F16, DENSE, 30);
      memset(&stream, 0, sizeof stream);
      scratch_bytes = rdkv_stream_scratch(&p.cfg, tokens[i]);
      scratch = mem_new(scratch_bytes);
      for (l = 0; l < 4; l++) {
        size_t bound = rdkv_stream_bound(&p.cfg, tokens[i], &stream);
        rdkv_stream before = stream;
        uint16_t *raw = (uint16_t *)p.raw[l][1], old = raw[5];
        test_where("T %u, keep %g, layer %d", tokens[i], keeps[j], l);
        block[l] = (uint8_t *)mem_new(bound);
        raw[5] = 0x7e00; /* NaN: an error, and the stream is as before */
        bytes = 77;
        CHECK_STATUS(rdkv_stream_layer(&p.cfg, &stream, &p.kv[l], tokens[i], block[l], bound,
                                       &bytes, scratch, scratch_bytes),
                     RDKV_ERR_NONFINITE);
        CHECK(memcmp(&before, &stream, sizeof stream) == 0);
        CHECK(bytes == 77 && mem_untouched(block[l], bound));
        raw[5] = old;
        CHECK_OK(rdkv_stream_layer(&p.cfg, &stream, &p.kv[l], tokens[i], block[l], bound, &bytes,
                                   scratch, scratch_bytes));
        CHECK_LE(bytes, bound);
        CHECK_OK(rdkv_open(block[l], bytes, RDKV_VERIFY, &s[l]));
        CHECK_EQ(s[l].header->first_layer, l), CHECK_EQ(s[l].header->n_layers, 1);
        CHECK_EQ(stream.next_layer, l + 1);
        total += bytes;
        CHECK_EQ(stream.spent_bytes, total);
        CHECK_OK(rdkv_report_segment(&s[l], -1, 0, &report));
        apart += report.v_distortion + report.k_distortion;
      }
      budget = keeps[j] * 2.0 * 4 * tokens[i] * 2 * 128;
      CHECK_LE(total, budget);
      CHECK_LE(1.0 - (double)total / budget, tokens[i] >= 4096 ? 0.005 : 0.05);
      bytes = 77;
      CHECK(rdkv_stream_layer(&p.cfg, &stream, &p.kv[0], tokens[i], block[0], 0, &bytes, scratch,
                              scratch_bytes) != RDKV_OK);
      /* the model scope, which sees all layers at once, is better, but not by much */
      problem_score(&p);
      CHECK_OK(problem_allocate(&p));
      CHECK_OK(problem_pack(&p));
      s[0] = problem_open(&p);
      CHECK_OK(rdkv_report_segment(&s[0], -1, 0, &report));
      together = report.v_distortion + report.k_distortion;
      printf("T %u keep %g: %.4g bytes of the budget, distortion %.4g streamed, %.4g at once\n",
             tokens[i], keeps[j], (double)total / budget, apart, together);
      for (l = 0; l < 4; l++) mem_free(block[l]);
      mem_free(scratch);
      problem_free(&p);
    }
  {
    rdkv_config c = config_of(4, 2, 64, 0), many;
    many = c, c.n_layers = 2, many.n_layers = 80;
    CHECK_OK(rdkv_resolve(&c, &c));
    CHECK_OK(rdkv_resolve(&many, &many));
    CHECK_EQ(rdkv_stream_scratch(&c, 3000),
             rdkv_stream_scratch(&many, 3000)); /* no growth with layers */
  }
}

/* A second prompt knows from the first what each layer needs, and comes near the model scope. */
static void streaming_again(void) {
  rdkv_config c = config_of(4, 2, 64, 0);
  rdkv_histogram *earlier = (rdkv_histogram *)calloc(4, sizeof *earlier), *before;
  double distortion[2];
  int prompt, l;
  c.n_layers = 4, c.keep = 0.08;
  before = (rdkv_histogram *)calloc(4, sizeof *before);
  for (prompt = 0; prompt < 2; prompt++) {
    problem p = problem_make(&c, prompt ? 3000 : 2000, RDKV_F32, DENSE, 40 + (uint64_t)prompt);
    size_t scratch_bytes = rdkv_stream_scratch(&p.cfg, p.n_tokens), bytes, total = 0, i;
    void *scratch = mem_new(scratch_bytes);
    rdkv_stream stream;
    rdkv_segment s;
    rdkv_report report;
    memset(&stream, 0, sizeof stream);
    stream.earlier = earlier;
    distortion[prompt] = 0;
    for (l = 0; l < 4; l++) {
      size_t bound = rdkv_stream_bound(&p.cfg, p.n_tokens, &stream);
      void *block = mem_new(bound);
      float old = p.v[l][7];
      /* the later the layer, the more its V matters */
      for (i = 0; i < (size_t)p.n_tokens * 128; i++) p.v[l][i] *= (float)(1 << l);
      for (i = 0; i < 3; i++) mem_free(p.raw[l][i]);
      problem_tensors(&p, l, RDKV_F32, DENSE);
      memcpy(before, earlier, 4 * sizeof *earlier);
      ((float *)p.raw[l][1])[7] = HUGE_VALF;
      CHECK_STATUS(rdkv_stream_layer(&p.cfg, &stream, &p.kv[l], p.n_tokens, block, bound, &bytes,
                                     scratch, scratch_bytes),
                   RDKV_ERR_NONFINITE);
      CHECK(memcmp(before, earlier, 4 * sizeof *earlier) == 0);
      ((float *)p.raw[l][1])[7] = old * (float)(1 << l);
      CHECK_OK(rdkv_stream_layer(&p.cfg, &stream, &p.kv[l], p.n_tokens, block, bound, &bytes,
                                 scratch, scratch_bytes));
      CHECK(memcmp(&before[l], &earlier[l], sizeof *earlier) != 0);
      CHECK_OK(rdkv_open(block, bytes, RDKV_VERIFY, &s));
      CHECK_OK(rdkv_report_segment(&s, -1, 0, &report));
      distortion[prompt] += report.v_distortion + report.k_distortion, total += bytes;
      mem_free(block);
    }
    CHECK_LE(total, c.keep * 2 * 4 * p.n_tokens * 2 * 128);
    CHECK_LE(0.99 * c.keep * 2 * 4 * p.n_tokens * 2 * 128, total);
    problem_score(&p);
    CHECK_OK(problem_allocate(&p));
    CHECK_OK(problem_pack(&p));
    s = problem_open(&p);
    CHECK_OK(rdkv_report_segment(&s, -1, 0, &report));
    distortion[prompt] /= report.v_distortion + report.k_distortion;
    mem_free(scratch);
    problem_free(&p);
  }
  printf("distortion streamed over that at once: first prompt %.3f, second %.3f\n", distortion[0],
         distortion[1]);
  CHECK_LE(1.5, distortion[0]); /* or the problem shows nothing */
  CHECK_LE(distortion[1], 1.2);
  free(earlier), free(before);
}

int main(void) {
  RUN(one_call_is_the_stages);
  RUN(small_inputs);
  RUN(bad_arguments);
  RUN(streaming);
  RUN(streaming_again);
  return test_done();
}
