/* bench_cpu.c - what rdkv.h costs on this CPU, against dense attention written with the same care.

   Build and run:  cc -O3 -o bench_cpu bench/bench_cpu.c -lm && ./bench_cpu

   For each head dimension, group size, length and budget, in one run and on one thread:

   score, measure, allocate, pack: milliseconds for one layer of 8 kv heads (f16 input).

   attend: milliseconds for one token's attention over the packed layer, against dense f32 and f16
   attention over the full context, and against a plain read of the same bytes.

   element cost: the time of a kept element against that of a dense f16 element when as many tokens
   are attended to, head by head and over and over, so that both lie in cache.

   The contenders of a case run in turns and the median of their times is taken: what else the
   machine does hits all of them alike. --help lists the options.

   The data imitates a real cache: each head has a direction along which keys of neighbouring tokens
   move together, channels differ in size and in use, a few have a large mean, the first tokens are
   sinks, and the pooled token weights are about log-normal with sigma 1.4 to 3.5, 2.4 on average.

   The file includes itself once for each instruction set. */

#ifndef BODY

#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200112L /* clock_gettime */
#endif

#define RDKV_IMPLEMENTATION
#define RDKV_STATIC
#include "../rdkv.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__GNUC__) && !defined(RDKV_NO_SIMD) && defined(__x86_64__)
#define BENCH_X86 1
#include <immintrin.h>
#elif defined(__GNUC__) && !defined(RDKV_NO_SIMD) && defined(__aarch64__)
#define BENCH_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum { MAX_DIM = 128, MAX_GROUP = 16, BLOCK = 128, N_KV_HEADS = 8, WINDOW = 32, MAX_LIST = 8 };

/* ---- dense attention: one body, instantiated below ------------------------------------------- */

/* One block of n <= BLOCK tokens from token begin, for some query heads of one kv head. q, out
   [heads][dim], k, v [tokens][dim], running maximum m and sum l [heads]; far: prefetch; out is not
   yet divided by l. */
typedef void block_fn(const float *q, const void *k, const void *v, int begin, int n, int far,
                      float *m, float *l, float *out);

typedef struct kernels {
  const char *name;
  rdkv_isa isa;
  int group_max;                   /* query heads that one call takes */
  block_fn *const (*blocks)[2][2]; /* [log2 of the heads][dim 64, 128][f32, f16] */
  float (*read)(const void *data, size_t bytes);
  float (*fma)(long rounds, double *done);
} kernels;

static float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, bits = (uint32_t)(h & 0x7fffu) << 13;
  float f, scale;
  uint32_t scale_bits = 0x77800000u; /* 2^112 moves the exponent's bias */
  memcpy(&f, &bits, 4), memcpy(&scale, &scale_bits, 4);
  f *= scale;
  memcpy(&bits, &f, 4);
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}

/* For the bench's data alone: below the normal range to zero, no overflow. */
static uint16_t float_to_half(float f) {
  uint32_t bits, sign, magnitude;
  memcpy(&bits, &f, 4);
  sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x38800000u) return (uint16_t)sign;
  return (uint16_t)(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
#define EACH_4(M) M(0) M(1) M(2) M(3)
#define EACH_8(M) EACH_4(M) M(4) M(5) M(6) M(7)
#define EACH_16(M) EACH_8(M) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)

#ifdef BENCH_X86

#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")))
#define T256 __attribute__((target("avx2,f16c,fma")))

T512 INLINE __m512 pow2_512(__m512 n, __m512 x) { return _mm512_scalef_ps(x, n); }
T512 INLINE __m512 f16_512(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
/* Four vectors to one: 128-bit lane i holds the partial sums of a, b, c, d over lane i. */
T512 INLINE __m512 fold_512(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
/* Four such vectors to one: element 4 i + j is the sum of vector j of the i-th four. */
T512 INLINE __m512 fold_lanes_512(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

T256 INLINE __m256 pow2_256(__m256 n, __m256 x) {
  __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shift));
}
T256 INLINE __m256 f16_256(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}
T256 INLINE __m256 fold_256(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  __m256d x = _mm256_castps_pd(ab), y = _mm256_castps_pd(cd);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                       _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
T256 INLINE __m256 fold_lanes_256(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

#define BODY
#define TARGET T512
#define ISA(x) x##_avx512
#define ISA_TEXT "avx512"
#define ISA_VALUE RDKV_ISA_AVX512
#define WIDTH 16
#define GROUP_MAX 8
#define N_ACC 16
#define EACH EACH_16
#define VEC __m512
#define VSET1(x) _mm512_set1_ps(x)
#define VLOAD(p) _mm512_loadu_ps(p)
#define VSTORE(p, a) _mm512_storeu_ps(p, a)
#define VADD(a, b) _mm512_add_ps(a, b)
#define VMUL(a, b) _mm512_mul_ps(a, b)
#define VMAX(a, b) _mm512_max_ps(a, b)
#define VFMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define VROUND(a) _mm512_roundscale_ps(a, 8)
#define VPOW2(n, x) pow2_512(n, x)
#define SUMS(s)                                                                \
  VSTORE(s, fold_lanes_512(fold_512(a0, a1, a2, a3), fold_512(a4, a5, a6, a7), \
                           fold_512(a8, a9, a10, a11), fold_512(a12, a13, a14, a15)))
#define VLOAD_F16(p) f16_512(p)
#include "bench_cpu.c"

#define BODY
#define TARGET T256
#define ISA(x) x##_avx2
#define ISA_TEXT "avx2"
#define ISA_VALUE RDKV_ISA_AVX2
#define WIDTH 8
#define GROUP_MAX 4
#define N_ACC 8
#define EACH EACH_8
#define VEC __m256
#define VSET1(x) _mm256_set1_ps(x)
#define VLOAD(p) _mm256_loadu_ps(p)
#define VSTORE(p, a) _mm256_storeu_ps(p, a)
#define VADD(a, b) _mm256_add_ps(a, b)
#define VMUL(a, b) _mm256_mul_ps(a, b)
#define VMAX(a, b) _mm256_max_ps(a, b)
#define VFMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define VROUND(a) _mm256_round_ps(a, 8)
#define VPOW2(n, x) pow2_256(n, x)
#define SUMS(s) VSTORE(s, fold_lanes_256(fold_256(a0, a1, a2, a3), fold_256(a4, a5, a6, a7)))
#define VLOAD_F16(p) f16_256(p)
#include "bench_cpu.c"

#elif defined(BENCH_NEON)

INLINE float32x4_t pow2_128(float32x4_t n, float32x4_t x) {
  int32x4_t shift = vshlq_n_s32(vcvtq_s32_f32(n), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), shift));
}
INLINE float32x4_t f16_128(const uint16_t *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
INLINE float32x4_t fold_128(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
  return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

#define BODY
#define TARGET
#define ISA(x) x##_neon
#define ISA_TEXT "neon"
#define ISA_VALUE RDKV_ISA_NEON
#define WIDTH 4
#define GROUP_MAX 4
#define N_ACC 16
#define EACH EACH_16
#define VEC float32x4_t
#define VSET1(x) vdupq_n_f32(x)
#define VLOAD(p) vld1q_f32(p)
#define VSTORE(p, a) vst1q_f32(p, a)
#define VADD(a, b) vaddq_f32(a, b)
#define VMUL(a, b) vmulq_f32(a, b)
#define VMAX(a, b) vmaxq_f32(a, b)
#define VFMA(a, b, c) vfmaq_f32(c, a, b)
#define VROUND(a) vrndnq_f32(a)
#define VPOW2(n, x) pow2_128(n, x)
#define SUMS(s)                                                                 \
  VSTORE(s, fold_128(a0, a1, a2, a3)), VSTORE(s + 4, fold_128(a4, a5, a6, a7)), \
      VSTORE(s + 8, fold_128(a8, a9, a10, a11)), VSTORE(s + 12, fold_128(a12, a13, a14, a15))
#define VLOAD_F16(p) f16_128(p)
#include "bench_cpu.c"

#endif

#define BODY
#define TARGET
#define ISA(x) x##_scalar
#define ISA_TEXT "scalar"
#define ISA_VALUE RDKV_ISA_SCALAR
#define WIDTH 1
#define GROUP_MAX 1
#define N_ACC 4
#define EACH EACH_4
#define VEC float
#define VSET1(x) (x)
#define VLOAD(p) (*(p))
#define VSTORE(p, a) (*(p) = (a))
#define VADD(a, b) ((a) + (b))
#define VMUL(a, b) ((a) * (b))
#define VMAX(a, b) ((a) > (b) ? (a) : (b))
#define VFMA(a, b, c) ((a) * (b) + (c))
#define VROUND(a) rintf(a)
#define VPOW2(n, x) ldexpf(x, (int)(n))
#define SUMS(s) ((s)[0] = a0, (s)[1] = a1, (s)[2] = a2, (s)[3] = a3)
#define VLOAD_F16(p) half_to_float(*(p))
#include "bench_cpu.c"

/* Dense attention of one kv head: q [group][dim] times the softmax scale, k and v [n][dim] in f32
   or f16 (half), n a multiple of 16, dim 64 or 128. Blocks of tokens, in each chunks of heads. */
static void dense_head(const kernels *kn, const float *q, const void *k, const void *v, int n,
                       int dim, int group, int half, float *out) {
  float m[MAX_GROUP], l[MAX_GROUP];
  int begin, g, c, far = (double)n * dim * (half ? 4 : 8) > 1e6; /* past the cache */
  for (g = 0; g < group; g++) m[g] = -FLT_MAX, l[g] = 0.0f;
  for (c = 0; c < group * dim; c++) out[c] = 0.0f;
  for (begin = 0; begin < n; begin += BLOCK) {
    int nb = n - begin < BLOCK ? n - begin : BLOCK;
    for (g = 0; g < group;) {
      int heads = 1, log2 = 0;
      while (heads * 2 <= kn->group_max && heads * 2 <= group - g) heads *= 2, log2++;
      kn->blocks[log2][dim == 128][half](q + g * dim, k, v, begin, nb, far, m + g, l + g,
                                         out + g * dim);
      g += heads;
    }
  }
  for (g = 0; g < group; g++) {
    float scale = 1.0f / l[g];
    for (c = 0; c < dim; c++) out[g * dim + c] *= scale;
  }
}

/* ---- data ------------------------------------------------------------------------------------ */

static void fail(const char *what) {
  fprintf(stderr, "bench_cpu: %s\n", what);
  exit(1);
}

static void check(rdkv_status status, const char *call) {
  if (status == RDKV_OK) return;
  fprintf(stderr, "bench_cpu: %s: %s\n", call, rdkv_status_string(status));
  exit(1);
}

/* 128-byte aligned; freed by release. The byte before the block holds the distance. */
static void *acquire(size_t bytes) {
  unsigned char *raw = malloc(bytes + 129), *p;
  if (!raw) fail("out of memory");
  p = raw + 1;
  while ((uintptr_t)p % 128) p++;
  p[-1] = (unsigned char)(p - raw);
  return p;
}

static void release(void *p) {
  unsigned char *block = p;
  if (block) free(block - block[-1]);
}

/* Nearly normal: four uniform 16-bit numbers of one xorshift step. */
static float normal(uint64_t *state) {
  uint64_t x = *state, r;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  *state = x;
  r = x * 0x2545f4914f6cdd1du;
  return (1.0f / 37837.0f) * ((float)(r & 0xffff) + (float)(r >> 16 & 0xffff) +
                              (float)(r >> 32 & 0xffff) + (float)(r >> 48) - 131070.0f);
}

typedef struct problem {
  int dim, group, n_tokens;
  float *k32, *v32;    /* [kv head][token][dim] */
  uint16_t *k16, *v16; /* the same values */
  float *window;       /* [WINDOW][q head][dim] */
  float *query;        /* [q head][dim]: the token that decodes */
} problem;

static void problem_make(problem *p, int dim, int group, int n_tokens) {
  size_t n = (size_t)N_KV_HEADS * (size_t)n_tokens * (size_t)dim, q_row;
  float size[MAX_DIM], mean[MAX_DIM], use[MAX_DIM], along[MAX_DIM];
  float v_size[MAX_DIM], v_mean[MAX_DIM], v_along[MAX_DIM];
  int h, t, c, i, g;
  p->dim = dim, p->group = group, p->n_tokens = n_tokens;
  q_row = (size_t)N_KV_HEADS * (size_t)group * (size_t)dim;
  p->k32 = acquire(n * 4), p->v32 = acquire(n * 4);
  p->k16 = acquire(n * 2), p->v16 = acquire(n * 2);
  p->window = acquire(WINDOW * q_row * 4), p->query = acquire(q_row * 4);
  for (h = 0; h < N_KV_HEADS; h++) {
    uint64_t rng = 0x9e3779b97f4a7c15u * (uint64_t)(h + 1);
    float spread = 2.0f + 2.5f * (float)h / (N_KV_HEADS - 1), latent = 0.0f, length = 0.0f;
    size_t at = (size_t)h * (size_t)n_tokens * (size_t)dim;
    for (c = 0; c < dim; c++) {
      size[c] = expf(0.5f * normal(&rng));
      mean[c] = (c % 16 == 3 ? 4.0f : 0.3f) * normal(&rng);
      use[c] = expf(0.5f * normal(&rng));
      along[c] = normal(&rng);
      v_size[c] = expf(0.3f * normal(&rng));
      v_mean[c] = normal(&rng), v_along[c] = normal(&rng);
      length += use[c] * use[c] * along[c] * along[c];
    }
    for (t = 0; t < n_tokens; t++) {
      float weight = expf(0.3f * normal(&rng)), load;
      latent = 0.8f * latent + 0.6f * normal(&rng);
      load = t < 4 ? 4.0f : latent;
      for (c = 0; c < dim; c++, at++) {
        float k = size[c] * (mean[c] + normal(&rng) + load * along[c]);
        float v = weight * v_size[c] * (v_mean[c] + load * v_along[c] + normal(&rng));
        p->k16[at] = float_to_half(k), p->v16[at] = float_to_half(v);
        p->k32[at] = half_to_float(p->k16[at]), p->v32[at] = half_to_float(p->v16[at]);
      }
    }
    /* the logit of a token with load x is about spread times x */
    for (c = 0; c < dim; c++) use[c] *= sqrtf((float)dim / length);
    for (i = 0; i <= WINDOW; i++)
      for (g = 0; g < group; g++) {
        float *q = (i < WINDOW ? p->window + (size_t)i * q_row : p->query) +
                   (size_t)(h * group + g) * (size_t)dim;
        for (c = 0; c < dim; c++)
          q[c] = use[c] / size[c] *
                 (spread * use[c] * along[c] / sqrtf((float)dim) + 0.5f * normal(&rng));
      }
  }
}

static void problem_free(problem *p) {
  release(p->k32), release(p->v32), release(p->k16), release(p->v16);
  release(p->window), release(p->query);
}

/* ---- timing ---------------------------------------------------------------------------------- */

static volatile float sink;

static double seconds(void) {
#ifdef _WIN32
  return (double)clock() / CLOCKS_PER_SEC;
#else
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#endif
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

enum { MAX_ROUNDS = 15, MAX_RUNNERS = 4 + 2 * MAX_LIST };

/* Something to time: run(context) does it once. */
typedef struct runner {
  void (*run)(void *context);
  void *context;
  long repeats;
  double times[MAX_ROUNDS];
  double median; /* seconds for once */
} runner;

/* Takes the runners in turns, each for at least so many seconds, and sets their medians. */
static void race(runner *runners, int n, int rounds, double least) {
  int i, round;
  for (i = 0; i < n; i++) { /* warm up, and find the repeats */
    runner *r = runners + i;
    for (r->repeats = 1;; r->repeats *= 2) {
      double begin = seconds();
      long j;
      for (j = 0; j < r->repeats; j++) r->run(r->context);
      if (seconds() - begin >= least) break;
    }
  }
  for (round = 0; round < rounds; round++)
    for (i = 0; i < n; i++) {
      runner *r = runners + i;
      double begin = seconds();
      long j;
      for (j = 0; j < r->repeats; j++) r->run(r->context);
      r->times[round] = (seconds() - begin) / (double)r->repeats;
    }
  for (i = 0; i < n; i++) {
    qsort(runners[i].times, (size_t)rounds, sizeof(double), ascending);
    runners[i].median = runners[i].times[rounds / 2];
  }
}

/* Dense attention over the first n[h] tokens of head h, all tokens where n is NULL. */
typedef struct dense_job {
  const kernels *kn;
  const problem *p;
  int half, head; /* head -1: all */
  const int *n;
  float *out;
} dense_job;

static void run_dense(void *context) {
  const dense_job *job = context;
  const problem *p = job->p;
  float q[MAX_GROUP * MAX_DIM], scale = 1.0f / sqrtf((float)p->dim);
  int h, c, row = p->group * p->dim;
  int begin = job->head < 0 ? 0 : job->head, end = job->head < 0 ? N_KV_HEADS : job->head + 1;
  for (h = begin; h < end; h++) {
    size_t at = (size_t)h * (size_t)p->n_tokens * (size_t)p->dim;
    int n = job->n ? job->n[h] : p->n_tokens;
    for (c = 0; c < row; c++) q[c] = p->query[h * row + c] * scale;
    if (job->half)
      dense_head(job->kn, q, p->k16 + at, p->v16 + at, n, p->dim, p->group, 1, job->out + h * row);
    else
      dense_head(job->kn, q, p->k32 + at, p->v32 + at, n, p->dim, p->group, 0, job->out + h * row);
  }
  sink = job->out[begin * row];
}

typedef struct packed_job {
  const rdkv_config *cfg;
  const rdkv_cache *cache;
  const problem *p;
  int head; /* -1: the layer */
  float *out;
  void *scratch;
  size_t scratch_bytes;
} packed_job;

static void run_packed(void *context) {
  const packed_job *job = context;
  int at = job->head * job->p->group * job->p->dim;
  if (job->head < 0)
    check(rdkv_attend(job->cfg, job->cache, 0, job->p->query, job->out, NULL, job->scratch,
                      job->scratch_bytes),
          "rdkv_attend");
  else
    check(rdkv_attend_head(job->cfg, job->cache, 0, job->head, job->p->query + at, job->out + at,
                           NULL, job->scratch, job->scratch_bytes),
          "rdkv_attend_head");
}

/* Up to two stretches of memory, as K and V are. */
typedef struct read_job {
  const kernels *kn;
  const void *data[2];
  size_t bytes;
} read_job;

static void run_read(void *context) {
  const read_job *job = context;
  int i;
  for (i = 0; i < 2; i++)
    if (job->data[i]) sink = job->kn->read(job->data[i], job->bytes / 1024 * 1024);
}

typedef struct fma_job {
  const kernels *kn;
  double done;
} fma_job;

static void run_fma(void *context) {
  fma_job *job = context;
  sink = job->kn->fma(20000, &job->done);
}

/* ---- a case ---------------------------------------------------------------------------------- */

typedef struct options {
  int dims[MAX_LIST], groups[MAX_LIST], tokens[MAX_LIST];
  double keeps[MAX_LIST];
  int n_dims, n_groups, n_tokens, n_keeps;
  int csv, rounds;
  const kernels *kn;
} options;

/* One budget of one shape. */
typedef struct packed {
  double keep;
  rdkv_config cfg;
  uint8_t *block;
  size_t bytes, capacity;
  rdkv_segment segment;
  rdkv_cache cache;
  int kept[N_KV_HEADS]; /* tokens, for the dense contender: rounded up to 16 */
  double kept_tokens;
  double elements[N_KV_HEADS], kept_elements; /* tokens x (K channels + V dims) */
  double measure[MAX_ROUNDS], allocate[MAX_ROUNDS], pack[MAX_ROUNDS]; /* seconds, [0] the median */
  double compress[MAX_ROUNDS];
  double element_cost, ns_packed, ns_dense; /* of an element in cache */
  double error;
} packed;

/* What the bars are about; negative: not run. */
static struct { double element_cost, speed_small, speed_large, compress; } bars = {-1, -1, -1, -1};

static double middle(double *times, int n) {
  qsort(times, (size_t)n, sizeof(double), ascending);
  return times[0] = times[n / 2];
}

static void configure(rdkv_config *cfg, const problem *p, const kernels *kn, double keep) {
  memset(cfg, 0, sizeof *cfg);
  cfg->n_q_heads = N_KV_HEADS * p->group, cfg->n_kv_heads = N_KV_HEADS;
  cfg->k_dim = p->dim, cfg->window = WINDOW, cfg->keep = keep, cfg->isa = kn->isa;
  check(rdkv_resolve(cfg, cfg), "rdkv_resolve");
}

/* Scores, allocates and packs at every budget, in turns; returns the median time of scoring. */
static double compress(const problem *p, packed *packs, int n_packs, int rounds) {
  const rdkv_config *cfg = &packs[0].cfg;
  uint32_t n = (uint32_t)p->n_tokens;
  size_t layer_bytes = rdkv_layer_bytes(cfg, n), scratch_bytes = rdkv_layer_scratch(cfg, n);
  size_t allocate_bytes = rdkv_allocate_scratch(cfg, 1, n);
  double score[MAX_ROUNDS], begin = seconds();
  size_t whole_bytes = rdkv_compress_scratch(cfg, n);
  void *memory, *scratch, *whole;
  rdkv_layer layer;
  rdkv_kv kv;
  int round, i;
  if (scratch_bytes < allocate_bytes) scratch_bytes = allocate_bytes;
  memory = acquire(layer_bytes), scratch = acquire(scratch_bytes), whole = acquire(whole_bytes);
  memset(whole, 0, whole_bytes); /* touch the pages */
  kv.k = rdkv_dense(p->k16, RDKV_F16, 1, p->dim);
  kv.k.head_stride = (ptrdiff_t)p->n_tokens * p->dim;
  kv.v = kv.k, kv.v.data = p->v16;
  kv.q = rdkv_dense(p->window, RDKV_F32, cfg->n_q_heads, p->dim);
  check(rdkv_layer_init(cfg, n, memory, layer_bytes, &layer), "rdkv_layer_init");
  for (round = 0; round < rounds; round++) {
    double t0 = seconds(), t1;
    check(rdkv_score(cfg, &kv, &layer, scratch, scratch_bytes), "rdkv_score");
    score[round] = seconds() - t0;
    for (i = 0; i < n_packs; i++) {
      packed *a = packs + i;
      memset(layer.v_bits, 0, (size_t)N_KV_HEADS * n); /* measure looks at what is kept */
      t0 = seconds();
      check(rdkv_measure(&a->cfg, &kv, &layer, scratch, scratch_bytes), "rdkv_measure");
      t1 = seconds(), a->measure[round] = t1 - t0;
      check(rdkv_allocate(&a->cfg, &layer, 1, scratch, scratch_bytes), "rdkv_allocate");
      a->allocate[round] = seconds() - t1;
      if (!a->block) {
        a->capacity = rdkv_block_bytes(&a->cfg, &layer, 1);
        if (a->capacity < rdkv_block_bound(&a->cfg, n)) a->capacity = rdkv_block_bound(&a->cfg, n);
        a->block = acquire(a->capacity);
        memset(a->block, 0, a->capacity); /* touch the pages */
      }
      t0 = seconds();
      check(rdkv_pack(&a->cfg, &kv, &layer, 1, 0, 0, a->block, a->capacity, &a->bytes, scratch,
                      scratch_bytes),
            "rdkv_pack");
      t1 = seconds(), a->pack[round] = t1 - t0;
      check(rdkv_compress(&a->cfg, &kv, n, a->block, a->capacity, &a->bytes, whole, whole_bytes),
            "rdkv_compress");
      a->compress[round] = seconds() - t1;
    }
    if (seconds() - begin > 6.0) { /* long cases: what there is must do */
      round++;
      break;
    }
  }
  for (i = 0; i < n_packs; i++)
    middle(packs[i].measure, round), middle(packs[i].allocate, round), middle(packs[i].pack, round),
        middle(packs[i].compress, round);
  release(memory), release(scratch), release(whole);
  return middle(score, round);
}

/* Opens the block, counts what it keeps. */
static void inspect(packed *a, const problem *p) {
  int h;
  check(rdkv_open(a->block, a->bytes, RDKV_VERIFY, &a->segment), "rdkv_open");
  memset(&a->cache, 0, sizeof a->cache);
  a->cache.segments = &a->segment, a->cache.n_segments = 1, a->cache.isa = a->cfg.isa;
  for (h = 0; h < N_KV_HEADS; h++) {
    rdkv_report report;
    uint64_t tokens, channels;
    check(rdkv_report_segment(&a->segment, 0, h, &report), "rdkv_report_segment");
    tokens = report.v_tokens[1] + report.v_tokens[2] + report.v_tokens[3] + report.v_tokens[4];
    channels = report.k_channels[1] + report.k_channels[2] + report.k_channels[3];
    a->kept[h] = (int)(tokens + 15) / 16 * 16;
    if (a->kept[h] > p->n_tokens) a->kept[h] = p->n_tokens / 16 * 16;
    a->kept_tokens += (double)tokens;
    a->elements[h] = (double)tokens * ((double)channels + p->dim);
    a->kept_elements += a->elements[h];
  }
}

/* Head by head, packed tokens against as many dense f16 tokens, over and over, so that both stay in
   the nearest cache that holds them. */
static void element_cost(packed *a, packed_job packed_one, dense_job dense_one) {
  double time_packed = 0, time_dense = 0, dense_elements = 0;
  int h;
  for (h = 0; h < N_KV_HEADS; h++) {
    runner r[2];
    if (a->kept[h] == 0) continue;
    packed_one.head = dense_one.head = h, dense_one.n = a->kept;
    r[0].run = run_packed, r[0].context = &packed_one;
    r[1].run = run_dense, r[1].context = &dense_one;
    race(r, 2, MAX_ROUNDS, 5e-4); /* many short ones: less falls on an interruption */
    time_packed += r[0].median, time_dense += r[1].median;
    dense_elements += 2.0 * a->kept[h] * dense_one.p->dim;
  }
  a->ns_packed = 1e9 * time_packed / a->kept_elements;
  a->ns_dense = 1e9 * time_dense / dense_elements;
  a->element_cost = a->ns_packed / a->ns_dense;
}

static double distance(const float *a, const float *b, size_t n) {
  double difference = 0, norm = 0;
  size_t i;
  for (i = 0; i < n; i++) {
    difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    norm += (double)b[i] * (double)b[i];
  }
  return sqrt(difference / norm);
}

static void run_case(const options *o, int dim, int group, int n_tokens) {
  static packed packs[MAX_LIST];
  static runner r[MAX_RUNNERS];
  size_t n_out = (size_t)N_KV_HEADS * (size_t)group * (size_t)dim;
  size_t half_bytes = (size_t)N_KV_HEADS * (size_t)n_tokens * (size_t)dim * 2; /* of K alone */
  double score, gb = 1e-9 * (double)half_bytes * 2;
  packed_job attend[MAX_LIST];
  read_job read_packed[MAX_LIST], read_dense[2];
  dense_job dense[2];
  float *out[3];
  void *scratch;
  problem p;
  int i, n = 0;

  problem_make(&p, dim, group, n_tokens);
  memset(packs, 0, sizeof packs);
  for (i = 0; i < o->n_keeps; i++) {
    packs[i].keep = o->keeps[i];
    configure(&packs[i].cfg, &p, o->kn, o->keeps[i] / 100);
  }
  score = compress(&p, packs, o->n_keeps, o->rounds);

  for (i = 0; i < 3; i++) out[i] = acquire(n_out * 4);
  scratch = acquire(rdkv_attend_scratch(&packs[0].cfg));
  for (i = 0; i < 2; i++) {
    dense_job d = {NULL, NULL, 0, -1, NULL, NULL};
    d.kn = o->kn, d.p = &p, d.half = i, d.out = out[i];
    dense[i] = d;
    r[n].run = run_dense, r[n++].context = dense + i;
    read_dense[i].kn = o->kn;
    read_dense[i].data[0] = i ? (const void *)p.k16 : (const void *)p.k32;
    read_dense[i].data[1] = i ? (const void *)p.v16 : (const void *)p.v32;
    read_dense[i].bytes = i ? half_bytes : half_bytes * 2;
    r[n].run = run_read, r[n++].context = read_dense + i;
  }
  for (i = 0; i < o->n_keeps; i++) {
    packed *a = packs + i;
    inspect(a, &p);
    attend[i].cfg = &a->cfg, attend[i].cache = &a->cache, attend[i].p = &p, attend[i].head = -1;
    attend[i].out = out[2], attend[i].scratch = scratch;
    attend[i].scratch_bytes = rdkv_attend_scratch(&a->cfg);
    r[n].run = run_packed, r[n++].context = attend + i;
    read_packed[i].kn = o->kn, read_packed[i].data[0] = a->block, read_packed[i].data[1] = NULL;
    read_packed[i].bytes = a->bytes;
    r[n].run = run_read, r[n++].context = read_packed + i;
  }
  race(r, n, o->rounds, 2e-3);
  for (i = 0; i < o->n_keeps; i++) {
    run_packed(attend + i);
    packs[i].error = distance(out[2], out[0], n_out);
    element_cost(packs + i, attend[i], dense[1]);
  }

  if (!o->csv) {
    printf("\nD %d  G %d  T %d: %.0f MB in f16, score %.1f ms\n", dim, group, n_tokens, gb * 1e3,
           score * 1e3);
    printf("  dense f16 %8.3f ms  %5.1f GB/s  (read %8.3f ms  %5.1f GB/s)\n", r[2].median * 1e3,
           gb / r[2].median, r[3].median * 1e3, gb / r[3].median);
    printf("  dense f32 %8.3f ms  %5.1f GB/s  (read %8.3f ms  %5.1f GB/s)\n", r[0].median * 1e3,
           2 * gb / r[0].median, r[1].median * 1e3, 2 * gb / r[1].median);
    printf("%s",
           "    keep tokens | measure  alloc   pack   all/ | attend    GB/s   over   f16/   f32/ |"
           " element   f16  cost |  error\n"
           "                |      ms     ms     ms  score |     ms           read     us     us |"
           "      ns    ns       |\n");
  }
  for (i = 0; i < o->n_keeps; i++) {
    packed *a = packs + i;
    double time = r[4 + 2 * i].median, read = r[5 + 2 * i].median;
    double all = a->compress[0];
    double speed = r[2].median / time;
    if (o->csv)
      printf(
          "%s,%d,%d,%d,%g,%lu,%.0f,%.0f,%.4f,%.4f,%.4f,%.4f,%.4f,%.5f,%.5f,%.5f,%.5f,%.5f,%.5f,%."
          "4f,"
          "%.4f,%.3f,%.5f\n",
          o->kn->name, dim, group, n_tokens, a->keep, (unsigned long)a->bytes, a->kept_tokens,
          a->kept_elements, score * 1e3, a->measure[0] * 1e3, a->allocate[0] * 1e3,
          a->pack[0] * 1e3, all * 1e3, time * 1e3, r[2].median * 1e3, r[0].median * 1e3, read * 1e3,
          r[3].median * 1e3, r[1].median * 1e3, a->ns_packed, a->ns_dense, a->element_cost,
          a->error);
    else
      printf(
          "  %5.1f%% %5.1f%% | %7.1f %6.1f %6.1f %6.2f | %8.3f %5.1f %6.2f %6.2f %6.2f |"
          " %7.4f %.4f %.2f | %6.4f\n",
          a->keep, 100 * a->kept_tokens / ((double)N_KV_HEADS * n_tokens), a->measure[0] * 1e3,
          a->allocate[0] * 1e3, a->pack[0] * 1e3, all / score, time * 1e3,
          1e-9 * (double)a->bytes / time, time / read, speed, r[0].median / time, a->ns_packed,
          a->ns_dense, a->element_cost, a->error);
    if (dim == 128 && group == 4) {
      if (n_tokens == 4096 && a->element_cost > bars.element_cost)
        bars.element_cost = a->element_cost;
      if (n_tokens == 32768 && all / score > bars.compress) bars.compress = all / score;
      if (n_tokens == 131072 && a->keep >= 2.49 && a->keep <= 2.51) bars.speed_small = speed;
      if (n_tokens == 131072 && a->keep >= 6.49 && a->keep <= 6.51) bars.speed_large = speed;
    }
    release(a->block);
  }
  fflush(stdout);
  for (i = 0; i < 3; i++) release(out[i]);
  release(scratch);
  problem_free(&p);
}

/* What this machine can do, and how near to it the dense contender comes from cache. */
static void machine(const options *o) {
  const size_t far_bytes = (size_t)256 << 20, near_bytes = (size_t)256 << 10;
  fma_job fma = {NULL, 0};
  read_job near_read = {NULL, {NULL, NULL}, 0}, far_read;
  runner r[3];
  double peak;
  char *memory = acquire(far_bytes);
  int group, half;
  memset(memory, 1, far_bytes);
  fma.kn = near_read.kn = o->kn;
  near_read.data[0] = memory, near_read.bytes = near_bytes;
  far_read = near_read, far_read.bytes = far_bytes;
  r[0].run = run_fma, r[0].context = &fma;
  r[1].run = run_read, r[1].context = &near_read;
  r[2].run = run_read, r[2].context = &far_read;
  race(r, 3, o->rounds, 2e-3);
  release(memory);
  peak = fma.done / r[0].median;
  printf("%s: %.1f G fused multiply-adds/s; plain read of 256 KB %.1f GB/s, of 256 MB %.1f GB/s\n",
         o->kn->name, 1e-9 * peak, 1e-9 * (double)near_bytes / r[1].median,
         1e-9 * (double)far_bytes / r[2].median);
  printf("dense attention over 512 cached tokens, D 128, part of that rate:");
  for (half = 0; half < 2; half++)
    for (group = 1; group <= 8; group = group == 1 ? 4 : group * 2) {
      static float out[N_KV_HEADS * MAX_GROUP * MAX_DIM];
      dense_job job = {NULL, NULL, 0, 0, NULL, NULL};
      problem p;
      problem_make(&p, 128, group, 512);
      job.kn = o->kn, job.p = &p, job.half = half, job.out = out;
      r[0].run = run_dense, r[0].context = &job;
      race(r, 1, o->rounds, 2e-3);
      problem_free(&p);
      printf("%s G %d %.0f%%", group == 1 ? half ? ";  f16" : "  f32" : ",", group,
             100 * 2.0 * 512 * 128 * group / r[0].median / peak);
    }
  printf("\n");
}

/* ---- program --------------------------------------------------------------------------------- */

static const char help[] =
    "bench_cpu: compression and decoding speed of rdkv.h against dense attention\n"
    "  --quick       a small part of the table, in under 20 seconds\n"
    "  --csv         comma-separated values; times in ms, element times in ns\n"
    "  --d LIST      head dimensions, of 64 and 128        (64,128)\n"
    "  --g LIST      query heads a kv head, 1 to 16        (1,4,8)\n"
    "  --t LIST      tokens, multiples of 16 from 64 up    (4096,32768,131072)\n"
    "  --keep LIST   percent of the f16 bytes              (2.5,6.5,12.5,25)\n"
    "  --rounds N    timings of each, 1 to 15              (7)\n"
    "  --isa NAME    scalar, avx2, avx512 or neon          (the best of this machine)\n"
    "Columns\n"
    "  tokens      part of the tokens that is kept\n"
    "  all/score   rdkv_compress, which does the four stages, over scoring alone\n"
    "  over read   attend over a plain read of the packed bytes\n"
    "  f16/us      dense attention over the full context, its time over ours; f32/us likewise\n"
    "  element     a kept element from cache; a token has K channels + V dims of them\n"
    "  f16, cost   a dense f16 element from cache, and the ratio\n"
    "  error       relative L2 of the output against dense f32\n";

static int parse_list(const char *text, double *values) {
  int n = 0;
  while (n < MAX_LIST) {
    char *end;
    values[n++] = strtod(text, &end);
    if (end == text || (*end && *end != ',')) fail("a list is numbers with commas between");
    if (!*end) return n;
    text = end + 1;
  }
  fail("a list is too long");
  return 0;
}

static int parse_ints(const char *text, int *values, int low, int high, int step) {
  double list[MAX_LIST];
  int i, n = parse_list(text, list);
  for (i = 0; i < n; i++) {
    if (!(list[i] >= low && list[i] <= high) || (int)list[i] % step)
      fail("a number is out of range");
    values[i] = (int)list[i];
  }
  return n;
}

static void bar(const char *what, double figure, double limit, int at_most) {
  if (figure < 0)
    printf("%-64s not run\n", what);
  else
    printf("%-64s %6.2fx  (bar %s %.1fx)  %s\n", what, figure, at_most ? "at most" : "at least",
           limit, (at_most ? figure <= limit : figure >= limit) ? "met" : "missed");
}

int main(int argc, char **argv) {
  static const kernels *const levels[] = {
#ifdef BENCH_X86
      &kernels_avx512, &kernels_avx2,
#elif defined(BENCH_NEON)
      &kernels_neon,
#endif
      &kernels_scalar};
  const int n_levels = (int)(sizeof levels / sizeof *levels);
  options o = {{64, 128}, {1, 4, 8}, {4096, 32768, 131072}, {2.5, 6.5, 12.5, 25}, 2, 3, 3, 4, 0,
               7,         NULL};
  int i, d, g, t;
  for (i = 1; i < argc; i++) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(name, "--help")) {
      fputs(help, stdout);
      return 0;
    } else if (!strcmp(name, "--quick")) {
      o.dims[0] = 128, o.groups[0] = 4, o.n_dims = o.n_groups = 1;
      o.n_tokens = 2, o.keeps[0] = 2.5, o.keeps[1] = 6.5, o.n_keeps = 2;
      o.rounds = 5;
    } else if (!strcmp(name, "--csv")) {
      o.csv = 1;
    } else if (i++, !strcmp(name, "--d")) {
      o.n_dims = parse_ints(value, o.dims, 64, 128, 64);
    } else if (!strcmp(name, "--g")) {
      o.n_groups = parse_ints(value, o.groups, 1, MAX_GROUP, 1);
    } else if (!strcmp(name, "--t")) {
      o.n_tokens = parse_ints(value, o.tokens, 64, 1 << 21, 16);
    } else if (!strcmp(name, "--keep")) {
      o.n_keeps = parse_list(value, o.keeps);
    } else if (!strcmp(name, "--rounds")) {
      parse_ints(value, &o.rounds, 1, MAX_ROUNDS, 1);
    } else if (!strcmp(name, "--isa")) {
      int j;
      for (j = 0; j < n_levels; j++)
        if (!strcmp(value, levels[j]->name)) o.kn = levels[j];
      if (!o.kn || !rdkv_isa_available(o.kn->isa)) fail("no such instruction set here");
    } else {
      fputs(help, stderr);
      return 2;
    }
  }
  for (i = 0; !o.kn; i++)
    if (rdkv_isa_available(levels[i]->isa)) o.kn = levels[i];

  if (o.csv)
    printf(
        "isa,dim,group,tokens,keep,bytes,kept_tokens,kept_elements,score,measure,allocate,pack,"
        "compress,"
        "attend,dense_f16,dense_f32,read_packed,read_f16,read_f32,element_packed,element_f16,"
        "element_cost,error\n");
  else
    machine(&o);
  for (d = 0; d < o.n_dims; d++)
    for (g = 0; g < o.n_groups; g++)
      for (t = 0; t < o.n_tokens; t++) run_case(&o, o.dims[d], o.groups[g], o.tokens[t]);
  if (o.csv) return 0;
  printf("\nD 128, G 4, one thread:\n");
  bar("kept element over dense f16 element, T 4096, worst budget", bars.element_cost, 1.3, 1);
  bar("attend against dense f16, T 131072, 2.5 % of the bytes", bars.speed_small, 8.0, 0);
  bar("attend against dense f16, T 131072, 6.5 % of the bytes", bars.speed_large, 3.0, 0);
  bar("score, measure, allocate and pack over score, T 32768, worst", bars.compress, 3.0, 1);
  return 0;
}

#else /* BODY: dense attention of one instruction set, included above ---------------------------- \
       */

/* Accumulators are named variables, so that they stay in registers: EACH(M) is M(0) ... M(N_ACC-1).
 */
#define DECLARE_ACC(i) VEC a##i;
#define ZERO_ACC(i) a##i = VSET1(0.0f);

TARGET INLINE VEC ISA(load)(const void *p, ptrdiff_t i, int half) {
  return half ? VLOAD_F16((const uint16_t *)p + i) : VLOAD((const float *)p + i);
}

TARGET INLINE VEC ISA(exp)(VEC x) {
  VEC n, r, y;
  x = VMAX(x, VSET1(-87.0f));
  n = VROUND(VMUL(x, VSET1(1.44269504f)));
  r = VFMA(n, VSET1(-0.693359375f), x); /* ln 2 in two parts */
  r = VFMA(n, VSET1(2.12194440e-4f), r);
  y = VFMA(r, VSET1(1.0f / 720), VSET1(1.0f / 120)); /* |r| < 0.35: the Taylor series does */
  y = VFMA(y, r, VSET1(1.0f / 24));
  y = VFMA(y, r, VSET1(1.0f / 6));
  y = VFMA(y, r, VSET1(0.5f));
  y = VFMA(y, r, VSET1(1.0f));
  y = VFMA(y, r, VSET1(1.0f));
  return VPOW2(n, y);
}

/* s[t][g] = q[g] . k[t] for n tokens and gc heads; a load of K serves all gc of them. */
TARGET INLINE void ISA(logits)(const float *q, const void *k, const void *next, ptrdiff_t row,
                               int n, int dim, int gc, int half, float *s) {
  EACH(DECLARE_ACC)
  int t, c;
  for (t = 0; t < n; t += N_ACC / gc, row += (ptrdiff_t)(N_ACC / gc) * dim, s += N_ACC) {
    EACH(ZERO_ACC)
#if defined(__GNUC__)
#pragma GCC unroll 16
#endif
    for (c = 0; c < dim; c += WIDTH) {
#define DOT(i)                                                         \
  a##i = VFMA(ISA(load)(k, row + (ptrdiff_t)(i / gc) * dim + c, half), \
              VLOAD(q + i % gc * dim + c), a##i);
      EACH(DOT)
#undef DOT
    }
    SUMS(s);
    for (c = 0; next && c < N_ACC / gc * dim; c += half ? 32 : 16)
      PREFETCH((const char *)next + (row + c) * (half ? 2 : 4));
  }
}

/* out[g] += sum over t of p[t][g] v[t], nd vectors of dims at a time, for gc heads. Where these are
   fewer than the accumulators, further tokens take the others. */
TARGET INLINE void ISA(values)(const float *p, const void *v, const void *next, ptrdiff_t row,
                               int n, int dim, int gc, int nd, int half, float *out) {
  EACH(DECLARE_ACC)
  int t, c, i, j;
  for (c = 0; c < dim; c += nd * WIDTH) {
    ptrdiff_t at = row + c;
    const float *pt = p;
    EACH(ZERO_ACC)
    for (t = 0; t < n; t += N_ACC / (gc * nd)) {
#define AXPY(i)                  \
  a##i = VFMA(VSET1(pt[i / nd]), \
              ISA(load)(v, at + (ptrdiff_t)(i / (gc * nd)) * dim + i % nd * WIDTH, half), a##i);
      EACH(AXPY)
#undef AXPY
      for (i = 0; next && i < N_ACC / (gc * nd); i++)
        for (j = 0; j < nd * WIDTH; j += half ? 32 : 16)
          PREFETCH((const char *)next + (at + i * dim + j) * (half ? 2 : 4));
      at += (ptrdiff_t)(N_ACC / (gc * nd)) * dim;
      pt += N_ACC / nd;
    }
#define ADD(i)                                               \
  {                                                          \
    float *o = out + i / nd % gc * dim + c + i % nd * WIDTH; \
    VSTORE(o, VADD(VLOAD(o), a##i));                         \
  }
    EACH(ADD)
#undef ADD
  }
}

/* gc heads over n tokens from token begin: online softmax with running maximum m and sum l. */
TARGET INLINE void ISA(block)(const float *q, const void *k, const void *v, int begin, int n,
                              int far, int dim, int gc, int nd, int half, float *m, float *l,
                              float *out) {
  float s[BLOCK * MAX_GROUP], fold[WIDTH];
  ptrdiff_t row = (ptrdiff_t)begin * dim;
  VEC top, total;
  int i, g, c;
  ISA(logits)(q, k, far ? v : NULL, row, n, dim, gc, half, s);
  top = VSET1(-FLT_MAX);
  for (i = 0; i < n * gc; i += WIDTH) top = VMAX(top, VLOAD(s + i));
  VSTORE(fold, top);
  for (g = 0; g < gc; g++) { /* lane i belongs to head i % gc */
    float best = fold[g];
    for (i = g + gc; i < WIDTH; i += gc) best = fold[i] > best ? fold[i] : best;
    if (best > m[g]) {
      float scale = expf(m[g] - best);
      m[g] = best, l[g] *= scale;
      for (c = 0; c < dim; c += WIDTH)
        VSTORE(out + g * dim + c, VMUL(VLOAD(out + g * dim + c), VSET1(scale)));
    }
    for (i = g; i < WIDTH; i += gc) fold[i] = -m[g];
  }
  top = VLOAD(fold), total = VSET1(0.0f);
  for (i = 0; i < n * gc; i += WIDTH) {
    VEC p = ISA(exp)(VADD(VLOAD(s + i), top));
    VSTORE(s + i, p);
    total = VADD(total, p);
  }
  VSTORE(fold, total);
  for (i = 0; i < WIDTH; i++) l[i % gc] += fold[i];
  ISA(values)
  (s, v, far ? (const char *)k + (ptrdiff_t)BLOCK * dim * (half ? 2 : 4) : NULL, row, n, dim, gc,
   nd, half, out);
}

/* Head dim, heads and element type are constants in each instance: the loops hold no index work. */
#define BLOCK_FN(gc, nd, dim, half)                                                             \
  TARGET static void ISA(block_##gc##_##dim##_##half)(const float *q, const void *k,            \
                                                      const void *v, int begin, int n, int far, \
                                                      float *m, float *l, float *out) {         \
    ISA(block)(q, k, v, begin, n, far, dim, gc, nd, half, m, l, out);                           \
  }
#define BLOCK_FNS(gc, nd) \
  BLOCK_FN(gc, nd, 64, 0) BLOCK_FN(gc, nd, 64, 1) BLOCK_FN(gc, nd, 128, 0) BLOCK_FN(gc, nd, 128, 1)
#define BLOCK_ROW(gc)                                   \
  {                                                     \
    {ISA(block_##gc##_64_0), ISA(block_##gc##_64_1)}, { \
      ISA(block_##gc##_128_0), ISA(block_##gc##_128_1)  \
    }                                                   \
  }

BLOCK_FNS(1, 4)
#if GROUP_MAX >= 4
BLOCK_FNS(2, 4)
BLOCK_FNS(4, (N_ACC / 4))
#endif
#if GROUP_MAX >= 8
BLOCK_FNS(8, (N_ACC / 8))
#endif

static block_fn *const ISA(blocks)[][2][2] = {
    BLOCK_ROW(1),
#if GROUP_MAX >= 4
    BLOCK_ROW(2),
    BLOCK_ROW(4),
#endif
#if GROUP_MAX >= 8
    BLOCK_ROW(8),
#endif
};

/* A plain read: bytes a multiple of 1024. Maxima, since they take any bit pattern at full speed. */
TARGET static float ISA(read)(const void *data, size_t bytes) {
  const float *p = data, *end = p + bytes / 4;
  float lanes[WIDTH];
  EACH(DECLARE_ACC)
  EACH(ZERO_ACC)
  for (; p < end; p += N_ACC * WIDTH) {
#define READ(i) a##i = VMAX(VLOAD(p + i * WIDTH), a##i);
    EACH(READ)
#undef READ
  }
#define JOIN(i) a0 = VMAX(a##i, a0);
  EACH(JOIN)
#undef JOIN
  VSTORE(lanes, a0);
  return lanes[0];
}

/* Independent chains of fused multiply-adds; returns their number in *done. */
TARGET static float ISA(fma)(long rounds, double *done) {
  static volatile float one = 1.0f;
  float lanes[WIDTH];
  VEC x = VSET1(one);
  EACH(DECLARE_ACC)
  long r;
#define START(i) a##i = VSET1(one + i);
  EACH(START)
#undef START
  for (r = 0; r < rounds; r++) {
#define STEP(i) a##i = VFMA(a##i, x, x);
    EACH(STEP)
#undef STEP
  }
#define JOIN(i) a0 = VMAX(a##i, a0);
  EACH(JOIN)
#undef JOIN
  VSTORE(lanes, a0);
  *done = (double)rounds * N_ACC * WIDTH;
  return lanes[0];
}

static const kernels ISA(kernels) = {ISA_TEXT,    ISA_VALUE, GROUP_MAX,
                                     ISA(blocks), ISA(read), ISA(fma)};

#undef DECLARE_ACC
#undef BLOCK_FN
#undef BLOCK_FNS
#undef BLOCK_ROW
#undef ZERO_ACC
#undef BODY
#undef TARGET
#undef ISA
#undef ISA_TEXT
#undef ISA_VALUE
#undef WIDTH
#undef GROUP_MAX
#undef N_ACC
#undef EACH
#undef VEC
#undef VSET1
#undef VLOAD
#undef VSTORE
#undef VADD
#undef VMUL
#undef VMAX
#undef VFMA
#undef VROUND
#undef VPOW2
#undef SUMS
#undef VLOAD_F16
#endif /* BODY */
