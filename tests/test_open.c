/* >>open : no prefix and no corruption of a block gets past rdkv_open to do harm. Worth running
   under ASan and UBSan; RDKV_SLOW_TESTS makes it ten times longer. */
#define FUZZ_NO_ENTRY
#include "fuzz_open.c"
#include "problem.h"

enum { N_BLOCKS = 4 };

/* Small blocks of different shapes, with a byte count that no buffer rounds up. */
static problem sample(int i) {
  rdkv_config c = config_of(4, 2, 40, 24);
  problem p;
  c.positions = i % 2, c.n_layers = i == 1 ? 2 : 1;
  if (i == 2) c = config_of(7, 1, 16, 16), c.profile = RDKV_PAPER;
  if (i == 3) c = config_of(2, 2, 1, 1), c.positions = 1;
  p = problem_make(&c, i == 3 ? 0 : 70, RDKV_F32, DENSE, (uint64_t)i);
  problem_widths(&p, i == 0 ? 2 | 16 | 64 | 32 : MIX_ALL, (uint64_t)i);
  CHECK_OK(problem_pack(&p));
  return p;
}

static void prefixes(void) {
  int i, mode;
  for (i = 0; i < N_BLOCKS; i++) {
    problem p = sample(i);
    size_t n;
    for (n = 0; n < p.block_bytes; n++) {
      uint8_t *prefix = (uint8_t *)mem_new(n); /* its end is guarded */
      memcpy(prefix, p.block, n);
      for (mode = RDKV_VERIFY; mode <= RDKV_MAP; mode++) {
        rdkv_segment s;
        rdkv_status status;
        memset(&s, 0xa5, sizeof s);
        test_where("block %d, %d of %d bytes, mode %d", i, (int)n, (int)p.block_bytes, mode);
        status = rdkv_open(prefix, n, (rdkv_open_mode)mode, &s);
        CHECK_STATUS(status, RDKV_ERR_TRUNCATED);
        CHECK(mem_untouched(&s, sizeof s));
      }
      mem_free(prefix);
    }
    problem_free(&p);
  }
}

/* A block may lie in a larger buffer, and may be moved. */
static void longer_buffer(void) {
  problem p = sample(1);
  rdkv_segment s;
  uint8_t *larger = (uint8_t *)mem_new(p.block_bytes + 999);
  memcpy(larger, p.block, p.block_bytes);
  CHECK_OK(rdkv_open(larger, p.block_bytes + 999, RDKV_VERIFY, &s));
  CHECK_OK(rdkv_open(larger, p.block_bytes + 999, RDKV_MAP, &s));
  CHECK(s.block == larger && (const void *)s.header == (const void *)larger);
  CHECK(memcmp(larger, p.block, p.block_bytes) == 0);
  mem_free(larger);
  problem_free(&p);
}

static void bad_arguments(void) {
  problem p = sample(0);
  rdkv_segment s;
  uint8_t *room = (uint8_t *)mem_new(p.block_bytes + 128);
  size_t i;
  memset(&s, 0xa5, sizeof s);
  CHECK_STATUS(rdkv_open(NULL, p.block_bytes, RDKV_VERIFY, &s), RDKV_ERR_ARGUMENT);
  CHECK_STATUS(rdkv_open(p.block, p.block_bytes, RDKV_VERIFY, NULL), RDKV_ERR_ARGUMENT);
  for (i = 1; i < 128; i *= 2) {
    memcpy(room + i, p.block, p.block_bytes);
    CHECK_STATUS(rdkv_open(room + i, p.block_bytes, RDKV_VERIFY, &s), RDKV_ERR_ALIGNMENT);
  }
  CHECK(mem_untouched(&s, sizeof s));
  mem_free(room);
  problem_free(&p);
}

/* Any one bit that flips anywhere is noticed. */
static void single_bits(void) {
  int i, bit;
  for (i = 0; i < N_BLOCKS; i++) {
    problem p = sample(i);
    size_t at;
    for (at = 0; at < p.block_bytes; at++)
      for (bit = 0; bit < 8; bit++) {
        rdkv_segment s;
        if (at % 16 && bit != (int)(at % 8)) continue;
        test_where("block %d, byte %d, bit %d", i, (int)at, bit);
        p.block[at] ^= (uint8_t)(1 << bit);
        CHECK(rdkv_open(p.block, p.block_bytes, RDKV_VERIFY, &s) != RDKV_OK);
        p.block[at] ^= (uint8_t)(1 << bit);
      }
    problem_free(&p);
  }
}

/* One field set to a value; the checksums are made right. */
static rdkv_status with_field(const problem *p, size_t at, int bytes, uint64_t value,
                              rdkv_open_mode mode) {
  uint8_t *block = (uint8_t *)mem_new(p->block_bytes);
  rdkv_segment s;
  rdkv_status status;
  int i;
  memcpy(block, p->block, p->block_bytes);
  for (i = 0; i < bytes; i++) block[at + (size_t)i] = (uint8_t)(value >> (8 * i));
  repair_checksums(block, p->block_bytes);
  status = rdkv_open(block, p->block_bytes, mode, &s);
  mem_free(block);
  return status;
}

static void statuses(void) {
  problem p = sample(1);
  rdkv_segment s;
  CHECK_STATUS(with_field(&p, 0, 4, 0x12345678, RDKV_VERIFY), RDKV_ERR_FORMAT);
  CHECK_STATUS(with_field(&p, 4, 4, 0, RDKV_VERIFY), RDKV_ERR_VERSION);
  CHECK_STATUS(with_field(&p, 4, 4, 2, RDKV_MAP), RDKV_ERR_VERSION);
  CHECK_STATUS(with_field(&p, 8, 8, p.block_bytes + 128, RDKV_MAP), RDKV_ERR_TRUNCATED);
  p.block[p.block_bytes - 1] ^= 1; /* a code */
  CHECK_STATUS(rdkv_open(p.block, p.block_bytes, RDKV_VERIFY, &s), RDKV_ERR_CHECKSUM);
  CHECK_OK(rdkv_open(p.block, p.block_bytes, RDKV_MAP, &s));
  p.block[p.block_bytes - 1] ^= 1;
  p.block[128] ^= 1; /* a field for information */
  CHECK_STATUS(rdkv_open(p.block, p.block_bytes, RDKV_VERIFY, &s), RDKV_ERR_CHECKSUM);
  CHECK_STATUS(rdkv_open(p.block, p.block_bytes, RDKV_MAP, &s), RDKV_ERR_CHECKSUM);
  problem_free(&p);
}

/* Each structural field set wrong, checksums right: refused for what it says. */
static void structure(void) {
  static const struct {
    size_t at;
    int bytes;
    uint64_t value;
  } wrong[] = {
      {8, 8, 0},
      {8, 8, 255},
      {8, 8, 256},
      {8, 8, UINT64_MAX},
      {16, 8, 0},
      {16, 8, 255},
      {16, 8, 256},
      {16, 8, UINT64_MAX},
      {44, 4, 0},
      {44, 4, 3},
      {44, 4, UINT32_MAX},
      {40, 4, UINT32_MAX},
      {48, 4, 0},
      {48, 4, 3},
      {48, 4, UINT32_MAX},
      {52, 4, 0},
      {52, 4, 4},
      {52, 4, UINT32_MAX},
      {56, 4, 0},
      {56, 4, 39},
      {56, 4, 257},
      {56, 4, UINT32_MAX},
      {60, 4, 0},
      {60, 4, 257},
      {60, 4, UINT32_MAX},
      {76, 4, 2},
      {76, 4, 0},
      {72, 4, 1},
      {256, 4, UINT32_MAX},
      {268, 4, 0x7fffffff},
      {272, 2, 0xffff},
      {274, 2, 41},
      {278, 2, 0xffff},
      {280, 8, 0},
      {280, 8, 64},
      {280, 8, 1},
      {280, 8, UINT64_MAX},
      {280, 8, UINT64_MAX - 127},
      {288, 8, 0},
      {288, 8, UINT64_MAX - 127},
      {288, 8, 1},
      {296, 8, 1},
      {296, 8, 128},
      {296, 8, UINT64_MAX - 127},
      {296, 8, UINT64_MAX},
  };
  problem p = sample(1);
  size_t i;
  for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    rdkv_status a = with_field(&p, wrong[i].at, wrong[i].bytes, wrong[i].value, RDKV_VERIFY);
    rdkv_status b = with_field(&p, wrong[i].at, wrong[i].bytes, wrong[i].value, RDKV_MAP);
    test_where("%d bytes at %d = %#llx: %s / %s", wrong[i].bytes, (int)wrong[i].at,
               (unsigned long long)wrong[i].value, rdkv_status_string(a), rdkv_status_string(b));
    CHECK(a != RDKV_OK && b != RDKV_OK);
  }
  problem_free(&p);
}

/* A channel that is not there, or there twice, is refused. */
static void channel_tables(void) {
  problem p = sample(1);
  const uint8_t *record = p.block + 256;
  uint64_t table;
  uint32_t padded, dropped;
  uint16_t counts[4];
  size_t channel;
  memcpy(counts, record + 16, 8), memcpy(&table, record + 24, 8);
  padded = 16u * ((counts[0] + 15u) / 16u + (counts[1] + 15u) / 16u + (counts[2] + 15u) / 16u);
  dropped = counts[3];
  channel = (size_t)table + 2 * padded + 2 * (padded + dropped);
  CHECK_STATUS(with_field(&p, channel, 1, 40, RDKV_MAP), RDKV_ERR_FORMAT);
  CHECK_STATUS(with_field(&p, channel, 1, 255, RDKV_VERIFY), RDKV_ERR_FORMAT);
  CHECK_STATUS(with_field(&p, channel, 1, p.block[channel + 1], RDKV_MAP), RDKV_ERR_FORMAT);
  problem_free(&p);
}

/* ---- random corruption ----------------------------------------------------------------------- */

static void corrupt(uint8_t *block, size_t bytes, uint64_t *rng) {
  static const uint64_t notable[] = {0,
                                     1,
                                     31,
                                     32,
                                     33,
                                     127,
                                     128,
                                     255,
                                     256,
                                     257,
                                     0x7fff,
                                     0xffff,
                                     0x7fffffff,
                                     0x80000000u,
                                     UINT32_MAX,
                                     UINT64_MAX,
                                     UINT64_MAX - 127,
                                     UINT64_C(1) << 63,
                                     1u << 20};
  uint32_t n = 1 + rng_below(rng, 4);
  while (n--) {
    /* half of them in the header and the first records */
    size_t room = rng_below(rng, 2) && bytes > 512 ? 512 : bytes,
           at = rng_below(rng, (uint32_t)room), width, i;
    uint64_t value;
    switch (rng_below(rng, 4)) {
      case 0:
        block[at] ^= (uint8_t)(1u << rng_below(rng, 8));
        break;
      case 1:
        block[at] = (uint8_t)rng_below(rng, 256);
        break;
      case 2:
        block[at] = (uint8_t)(block[at] + (rng_below(rng, 2) ? 1 : -1));
        break;
      default: /* a whole field */
        width = (size_t)2 << rng_below(rng, 3);
        at -= at % width;
        value = rng_below(rng, 3) ? notable[rng_below(rng, 19)] : rng_next(rng);
        if (!rng_below(rng, 4)) value = 128 * (uint64_t)rng_below(rng, (uint32_t)bytes / 64 + 2);
        for (i = 0; i < width && at + i < bytes; i++) block[at + i] = (uint8_t)(value >> (8 * i));
    }
  }
}

static void corruptions(void) {
#ifdef RDKV_SLOW_TESTS
  const int n = 1000000;
#else
  const int n = 100000;
#endif
  problem p[N_BLOCKS];
  uint8_t *block[N_BLOCKS];
  uint64_t rng = 2024;
  rdkv_isa isa = RDKV_ISA_AUTO;
  int i, opened = 0;
  for (i = 0; i < N_BLOCKS; i++) {
    p[i] = sample(i);
    block[i] = (uint8_t *)mem_new(p[i].block_bytes);
  }
  for (i = 0; i < n; i++) {
    int which = i % N_BLOCKS, how = (int)rng_below(&rng, 4);
    size_t bytes = p[which].block_bytes;
    memcpy(block[which], p[which].block, bytes);
    corrupt(block[which], bytes, &rng);
    if (how & 1) repair_checksums(block[which], bytes);
    test_where("corruption %d", i);
    isa = next_isa(isa); /* AUTO in its turn */
    opened += use_block(block[which], bytes, how & 2 ? RDKV_MAP : RDKV_VERIFY, isa);
  }
  printf("%d of %d corrupted blocks could be opened and were used\n", opened, n);
  CHECK(opened > n / 50 && "the corruptions reach beyond rdkv_open");
  for (i = 0; i < N_BLOCKS; i++) problem_free(&p[i]), mem_free(block[i]);
}

int main(void) {
  RUN(prefixes);
  RUN(longer_buffer);
  RUN(bad_arguments);
  RUN(single_bits);
  RUN(statuses);
  RUN(structure);
  RUN(channel_tables);
  RUN(corruptions);
  return test_done();
}
