/* test.h - what every test needs: checks, guarded memory, random numbers, halves, .npy files, fp64
   attention. Nothing here calls the library's arithmetic, so that it is tested against something
   else. C99 and C++11. */
#ifndef TEST_H
#define TEST_H

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../rdkv.h"

#if defined(__SANITIZE_ADDRESS__)
#define TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_ASAN 1
#endif
#endif
#ifdef TEST_ASAN
#include <sanitizer/asan_interface.h>
#define TEST_POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define TEST_UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define TEST_POISON(p, n) ((void)0)
#define TEST_UNPOISON(p, n) ((void)0)
#endif

/* ---- checks ---------------------------------------------------------------------------------- */

static struct {
  long checks, failed;
  char where[160]; /* the case at hand, printed with a failure */
} test;

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static inline void
test_where(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(test.where, sizeof test.where, format, args);
  va_end(args);
}

/* Counts a check; says whether to print its failure (the first few of a program alone). */
static inline int test_fails(int ok, const char *file, int line) {
  test.checks++;
  if (ok || test.failed++ >= 25) return 0;
  printf("%s:%d: [%s] ", file, line, test.where);
  return 1;
}

static inline int test_true(int ok, const char *what, const char *file, int line) {
  if (test_fails(ok, file, line)) printf("not so: %s\n", what);
  return ok;
}

static inline int test_equal(long long a, long long b, const char *what, const char *file,
                             int line) {
  if (test_fails(a == b, file, line)) printf("%s: %lld, want %lld\n", what, a, b);
  return a == b;
}

static inline int test_at_most(double a, double b, const char *what, const char *file, int line) {
  int ok = a <= b; /* a NaN fails */
  if (test_fails(ok, file, line)) printf("%s: %.9g, want at most %.9g\n", what, a, b);
  return ok;
}

static inline int test_status(rdkv_status a, rdkv_status b, const char *what, const char *file,
                              int line) {
  if (test_fails(a == b, file, line))
    printf("%s: '%s', want '%s'\n", what, rdkv_status_string(a), rdkv_status_string(b));
  return a == b;
}

#define CHECK(x) test_true((x) ? 1 : 0, #x, __FILE__, __LINE__)
#define CHECK_EQ(a, b) test_equal((long long)(a), (long long)(b), #a, __FILE__, __LINE__)
#define CHECK_LE(a, b) test_at_most((double)(a), (double)(b), #a, __FILE__, __LINE__)
#define CHECK_STATUS(a, b) test_status(a, b, #a, __FILE__, __LINE__)
#define CHECK_OK(a) test_status(a, RDKV_OK, #a, __FILE__, __LINE__)

#define RUN(function)                                                                         \
  do {                                                                                        \
    long failed_before = test.failed, checks_before = test.checks;                            \
    test.where[0] = 0;                                                                        \
    function();                                                                               \
    printf("%s %s (%ld checks)\n", test.failed == failed_before ? "ok  " : "FAIL", #function, \
           test.checks - checks_before);                                                      \
    fflush(stdout);                                                                           \
  } while (0)

static inline int test_done(void) {
  printf("%ld checks, %ld failed\n", test.checks, test.failed);
  return test.failed != 0;
}

/* ---- guarded memory -------------------------------------------------------------------------- */

enum { MEM_ALIGN = 128, MEM_GUARD = 64 };

typedef struct mem_head {
  void *base;
  size_t bytes;
} mem_head;

/* 128-byte aligned memory full of 0xa5, with a guard at both ends. */
static inline void *mem_new(size_t bytes) {
  char *base = bytes > SIZE_MAX / 2 ? NULL : (char *)malloc(bytes + 4 * MEM_ALIGN), *p;
  mem_head head;
  if (!base) {
    printf("no memory for %lu bytes\n", (unsigned long)bytes);
    exit(2);
  }
  p = base + MEM_ALIGN;
  p += (MEM_ALIGN - (uintptr_t)p % MEM_ALIGN) % MEM_ALIGN;
  head.base = base, head.bytes = bytes;
  memcpy(p - MEM_ALIGN, &head, sizeof head);
  memset(p, 0xa5, bytes);
  memset(p - MEM_GUARD, 0xc3, MEM_GUARD);
  memset(p + bytes, 0xc3, MEM_GUARD);
  TEST_POISON(p - MEM_GUARD, MEM_GUARD);
  TEST_POISON(p + bytes, MEM_GUARD);
  return p;
}

static inline void mem_free(void *memory) {
  char *p = (char *)memory;
  mem_head head;
  int i, whole = 1;
  if (!p) return;
  memcpy(&head, p - MEM_ALIGN, sizeof head);
  TEST_UNPOISON(p - MEM_GUARD, MEM_GUARD);
  TEST_UNPOISON(p + head.bytes, MEM_GUARD);
  for (i = 0; i < MEM_GUARD; i++)
    whole &= (uint8_t)p[i - MEM_GUARD] == 0xc3 && (uint8_t)p[head.bytes + (size_t)i] == 0xc3;
  CHECK(whole && "nothing written beyond the buffer");
  free(head.base);
}

/* 1 if the bytes are as mem_new left them. */
static inline int mem_untouched(const void *p, size_t bytes) {
  size_t i;
  for (i = 0; i < bytes; i++)
    if (((const uint8_t *)p)[i] != 0xa5) return 0;
  return 1;
}

static inline float *new_floats(size_t n) { return (float *)mem_new(n * sizeof(float)); }

/* ---- random numbers (splitmix64) ------------------------------------------------------------- */

static inline uint64_t rng_next(uint64_t *state) {
  uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
  z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
  return z ^ (z >> 31);
}

static inline uint32_t rng_below(uint64_t *state, uint32_t n) {
  return (uint32_t)(((rng_next(state) >> 32) * n) >> 32);
}

static inline double rng_uniform(uint64_t *state) {
  return (double)(rng_next(state) >> 11) * (1.0 / 9007199254740992.0);
}

static inline double rng_normal(uint64_t *state) {
  double u = 1.0 - rng_uniform(state), v = rng_uniform(state);
  return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* ---- halves, by arithmetic ------------------------------------------------------------------- */

static inline float from_half(uint16_t h) {
  int e = (h >> 10) & 31, m = h & 1023;
  double v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
  return (float)(h & 0x8000 ? -v : v);
}

static inline uint16_t to_half(float x) {
  unsigned sign = signbit(x) ? 0x8000u : 0u;
  double a = fabs((double)x);
  int e;
  if (isnan(x)) return (uint16_t)(sign | 0x7e00u);
  if (a >= 65520.0) return (uint16_t)(sign | 0x7c00u);
  frexp(a, &e); /* a in [2^(e-1), 2^e) */
  if (a == 0.0 || e - 1 < -14) return (uint16_t)(sign | (unsigned)nearbyint(ldexp(a, 24)));
  return (uint16_t)(sign |
                    (((unsigned)(e + 14) << 10) + (unsigned)nearbyint(ldexp(a, 11 - e)) - 1024u));
}

static inline float from_bfloat(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

static inline uint16_t to_bfloat(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  if (isnan(x)) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline size_t dtype_bytes(rdkv_dtype dtype) { return dtype == RDKV_F32 ? 4 : 2; }

/* Writes x as element i of an array of the dtype. */
static inline void put_value(void *array, rdkv_dtype dtype, ptrdiff_t i, float x) {
  uint16_t h = dtype == RDKV_F16 ? to_half(x) : to_bfloat(x);
  if (dtype == RDKV_F32)
    ((float *)array)[i] = x;
  else
    ((uint16_t *)array)[i] = h;
}

/* x as the dtype holds it. */
static inline float round_to(rdkv_dtype dtype, float x) {
  return dtype == RDKV_F32   ? x
         : dtype == RDKV_F16 ? from_half(to_half(x))
                             : from_bfloat(to_bfloat(x));
}

/* ---- .npy files ------------------------------------------------------------------------------ */

typedef struct npy {
  int n_dims;
  size_t shape[4], count;
  float *f;   /* floating-point data, widened; or */
  int32_t *i; /* integer data, widened */
} npy;

/* Reads a version 1.0 file of f2, f4, u1 or i4; ends the program if it cannot. */
static inline npy npy_read(const char *folder, const char *name) {
  npy a;
  char path[512], header[1024];
  unsigned char start[10];
  size_t header_bytes, width, j;
  const char *type, *shape;
  FILE *file;
  memset(&a, 0, sizeof a);
  snprintf(path, sizeof path, "golden/%s/%s.npy", folder, name);
  file = fopen(path, "rb");
  if (!file || fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY\x01", 7) != 0) goto bad;
  header_bytes = start[8] + 256u * start[9];
  if (header_bytes >= sizeof header || fread(header, 1, header_bytes, file) != header_bytes)
    goto bad;
  header[header_bytes] = 0;
  type = strstr(header, "'descr': '"), shape = strstr(header, "'shape': (");
  if (!type || !shape) goto bad;
  type += 10, shape += 10;
  for (a.count = 1; *shape != ')' && a.n_dims < 4;) {
    a.shape[a.n_dims] = (size_t)strtoul(shape, (char **)&shape, 10);
    a.count *= a.shape[a.n_dims++];
    while (*shape == ',' || *shape == ' ') shape++;
  }
  width = (size_t)(type[2] - '0');
  if (type[1] == 'f')
    a.f = new_floats(a.count);
  else
    a.i = (int32_t *)mem_new(a.count * sizeof(int32_t));
  for (j = 0; j < a.count; j++) {
    unsigned char b[4] = {0, 0, 0, 0};
    uint32_t u;
    if (fread(b, 1, width, file) != width) goto bad;
    u = b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
    if (a.i)
      a.i[j] = (int32_t)u;
    else if (width == 2)
      a.f[j] = from_half((uint16_t)u);
    else
      memcpy(&a.f[j], &u, 4);
  }
  fclose(file);
  return a;
bad:
  printf("cannot read %s (run the test in the tests folder)\n", path);
  exit(2);
}

static inline void npy_free(npy *a) { mem_free(a->f), mem_free(a->i); }

/* ---- fp64 attention -------------------------------------------------------------------------- */

/* One query over n tokens, k [n][k_dim], v [n][v_dim]: out [v_dim], returns the log-sum-exp. */
static inline double ref_attend(const float *q, const float *k, const float *v, size_t n, int k_dim,
                                int v_dim, double scale, double *out) {
  double *logit = (double *)malloc((n + 1) * sizeof(double)), top = -HUGE_VAL, sum = 0.0;
  size_t t;
  int d;
  for (d = 0; d < v_dim; d++) out[d] = 0.0;
  for (t = 0; t < n; t++) {
    double dot = 0.0;
    for (d = 0; d < k_dim; d++) dot += (double)q[d] * (double)k[t * (size_t)k_dim + (size_t)d];
    logit[t] = dot * scale;
    if (logit[t] > top) top = logit[t];
  }
  for (t = 0; t < n; t++) sum += exp(logit[t] - top);
  for (t = 0; t < n; t++) {
    double p = exp(logit[t] - top) / sum;
    for (d = 0; d < v_dim; d++) out[d] += p * (double)v[t * (size_t)v_dim + (size_t)d];
  }
  free(logit);
  return n ? top + log(sum) : -HUGE_VAL;
}

/* |a - b| / |b| over n values; 0 if both are 0. */
static inline double relative_l2(const float *a, const double *b, size_t n) {
  double error = 0.0, size = 0.0;
  size_t i;
  for (i = 0; i < n; i++) {
    double e = (double)a[i] - b[i];
    error += e * e, size += b[i] * b[i];
  }
  return error == 0.0 ? 0.0 : sqrt(error / size);
}

#endif
