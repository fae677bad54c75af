/* >>config : defaults are filled in, every illegal value is refused. */
#include "problem.h"

static void defaults(void) {
  static const float eps_v[3] = {0.312f, 0.0138f, 4.8e-5f}, eps_k[3] = {0.277f, 0.011f, 6.1e-5f};
  rdkv_config c = config_of(8, 0, 96, 0), r, again;
  CHECK_OK(rdkv_resolve(&c, &r));
  CHECK_EQ(r.n_layers, 1), CHECK_EQ(r.n_q_heads, 8), CHECK_EQ(r.n_kv_heads, 8);
  CHECK_EQ(r.k_dim, 96), CHECK_EQ(r.v_dim, 96);
  CHECK(fabs((double)r.softmax_scale - 1.0 / sqrt(96.0)) < 1e-8);
  CHECK_EQ(r.profile, RDKV_JOINT), CHECK_EQ(r.scope, RDKV_SCOPE_MODEL);
  CHECK_EQ(r.window, 32), CHECK_EQ(r.pool, 5), CHECK_EQ(r.positions, 0);
  CHECK(fabs(r.keep - 0.10) < 1e-15);
  CHECK(r.isa != RDKV_ISA_AUTO && rdkv_isa_available(r.isa));
  CHECK_OK(rdkv_resolve(&r, &again));
  CHECK(memcmp(&r, &again, sizeof r) == 0 && "resolving twice changes nothing");
  CHECK_OK(rdkv_resolve(&c, &c));
  CHECK(memcmp(&r, &c, sizeof r) == 0 && "in and out may be one object");

  c = config_of(4, 2, 64, 0), c.profile = RDKV_PAPER;
  CHECK_OK(rdkv_resolve(&c, &r));
  CHECK(r.k_share == 0.5);
  CHECK(memcmp(r.eps_v, eps_v, sizeof eps_v) == 0 && memcmp(r.eps_k, eps_k, sizeof eps_k) == 0);
}

static void instruction_sets(void) {
  static const rdkv_isa all[] = {RDKV_ISA_SCALAR, RDKV_ISA_AVX2, RDKV_ISA_AVX512, RDKV_ISA_NEON};
  size_t i;
  CHECK_EQ(rdkv_isa_available(RDKV_ISA_SCALAR), 1);
  CHECK(!(rdkv_isa_available(RDKV_ISA_NEON) && rdkv_isa_available(RDKV_ISA_AVX2)));
#if defined(__aarch64__) && !defined(RDKV_NO_SIMD)
  CHECK_EQ(rdkv_isa_available(RDKV_ISA_NEON), 1);
#endif
  for (i = 0; i < 4; i++) {
    rdkv_config c = config_of(4, 2, 64, 0), r;
    c.isa = all[i];
    test_where("isa %s", isa_name(all[i]));
    if (rdkv_isa_available(all[i])) {
      CHECK_OK(rdkv_resolve(&c, &r));
      CHECK_EQ(r.isa, all[i]);
    } else {
      CHECK_STATUS(rdkv_resolve(&c, &r), RDKV_ERR_CONFIG);
    }
  }
}

/* The config with a wrong value is refused and out left alone. */
static void refused(const rdkv_config *c, const char *what) {
  rdkv_config out;
  memset(&out, 0xa5, sizeof out);
  test_where("%s", what);
  CHECK_STATUS(rdkv_resolve(c, &out), RDKV_ERR_CONFIG);
  CHECK(mem_untouched(&out, sizeof out));
}

/* An enum's value may be out of the enum's range only by way of memory. */
static void set_enum(void *field, int32_t value) { memcpy(field, &value, sizeof value); }

#define REFUSED(field, value) (bad = good, bad.field = (value), refused(&bad, #field " = " #value))
#define REFUSED_ENUM(field, value) \
  (bad = good, set_enum(&bad.field, value), refused(&bad, #field " = " #value))

static void illegal_values(void) {
  rdkv_config good = config_of(8, 4, 64, 0), bad;
  rdkv_pin pin[2] = {{0, 4, 8, RDKV_PIN_SINK, 0}, {10, 20, 2, RDKV_PIN_SYSTEM, 0.5f}};
  static const int32_t bad_bits[] = {-2, 0, 1, 3, 5, 7, 12, 15, 17, 32};
  size_t i;
  REFUSED(n_layers, -1), REFUSED(n_layers, INT32_MIN);
  REFUSED(n_q_heads, 0), REFUSED(n_q_heads, -8), REFUSED(n_q_heads, 6), REFUSED(n_q_heads, 3);
  REFUSED(n_kv_heads, -1), REFUSED(n_kv_heads, 3), REFUSED(n_kv_heads, 16);
  REFUSED(k_dim, 0), REFUSED(k_dim, -1), REFUSED(k_dim, 257), REFUSED(k_dim, INT32_MAX);
  REFUSED(v_dim, -1), REFUSED(v_dim, 257), REFUSED(v_dim, INT32_MAX);
  REFUSED(softmax_scale, NAN), REFUSED(softmax_scale, INFINITY), REFUSED(softmax_scale, -INFINITY);
  REFUSED_ENUM(profile, -1), REFUSED_ENUM(profile, 2);
  REFUSED_ENUM(scope, -1), REFUSED_ENUM(scope, 4);
  REFUSED_ENUM(isa, -1), REFUSED_ENUM(isa, 5);
  REFUSED(window, -1), REFUSED(window, 1025);
  REFUSED(pool, -1), REFUSED(pool, -3), REFUSED(pool, 2), REFUSED(pool, 254), REFUSED(pool, 257);
  REFUSED(positions, -1), REFUSED(positions, 2);
  REFUSED(keep, -0.1), REFUSED(keep, 1.0001), REFUSED(keep, (double)NAN);
  REFUSED(keep, (double)INFINITY);
  REFUSED(max_error, -0.1), REFUSED(max_error, 1.0), REFUSED(max_error, 2.0);
  REFUSED(max_error, (double)NAN), REFUSED(max_error, (double)INFINITY);
  REFUSED(n_pins, -1), REFUSED(n_pins, 1);
  good.pins = pin, good.n_pins = 2;
  for (i = 0; i < sizeof bad_bits / sizeof bad_bits[0]; i++) {
    pin[1].min_bits = bad_bits[i];
    refused(&good, "pin with an illegal width");
  }
  pin[1].min_bits = 2, pin[1].begin = 21;
  refused(&good, "pin that ends before it begins");
  pin[1].begin = 10, pin[1].share = 1.01f;
  refused(&good, "pin of more than its range");
  pin[1].share = NAN;
  refused(&good, "pin of no share");
  pin[1].share = 0;
  REFUSED(profile, RDKV_PAPER);
  good.pins = NULL, good.n_pins = 0;

  good.scope = RDKV_SCOPE_LAMBDA, good.lambda = 1e-3;
  REFUSED(lambda, -1e-9), REFUSED(lambda, (double)NAN), REFUSED(lambda, (double)INFINITY);
  good.scope = RDKV_SCOPE_MODEL, good.lambda = 0.0;

  good.profile = RDKV_PAPER;
  REFUSED(token_budget, -1.0), REFUSED(token_budget, (double)NAN);
  REFUSED(token_budget, (double)INFINITY);
  REFUSED(k_share, -0.1), REFUSED(k_share, 1.0), REFUSED(k_share, 1.5),
      REFUSED(k_share, (double)NAN);
  for (i = 0; i < 3; i++) {
    static const float wrong[] = {NAN, INFINITY, -0.01f};
    bad = good;
    memcpy(bad.eps_k, RDKV_EPS_K_LLAMA_3_1_8B, sizeof bad.eps_k);
    bad.eps_k[i] = wrong[i];
    refused(&bad, "eps_k");
    bad = good;
    memcpy(bad.eps_v, RDKV_EPS_V_LLAMA_3_1_8B, sizeof bad.eps_v);
    bad.eps_v[i] = wrong[i];
    refused(&bad, "eps_v");
  }
}

/* The ends of every range are legal. */
static void legal_ends(void) {
  rdkv_pin pin[2] = {{0, 0, 16, RDKV_PIN_OTHER, 0}, {5, UINT32_MAX, 2, RDKV_PIN_USER, 0}};
  rdkv_config c, r;
  int i;
  for (i = 0; i < 10; i++) {
    c = config_of(16, 1, 256, 1);
    test_where("legal config %d", i);
    if (i == 1) c.k_dim = 1, c.v_dim = 256;
    if (i == 2) c.window = 1, c.pool = 1;
    if (i == 3) c.window = 1024, c.pool = 255;
    if (i == 4) c.keep = 1.0, c.positions = 1;
    if (i == 5) c.keep = 1e-9;
    if (i == 6) c.max_error = 0.999;
    if (i == 7) c.pins = pin, c.n_pins = 2;
    if (i == 8) c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 0.0;
    if (i == 9) c.profile = RDKV_PAPER, c.k_share = 0.01, c.token_budget = 1.5;
    CHECK_OK(rdkv_resolve(&c, &r));
  }
}

static void null_pointers(void) {
  rdkv_config c = config_of(4, 2, 64, 0), out;
  memset(&out, 0xa5, sizeof out);
  CHECK_STATUS(rdkv_resolve(NULL, &out), RDKV_ERR_ARGUMENT);
  CHECK(mem_untouched(&out, sizeof out));
  CHECK_STATUS(rdkv_resolve(&c, NULL), RDKV_ERR_ARGUMENT);
}

static void status_strings(void) {
  int a, b, i;
  for (a = RDKV_OK; a <= RDKV_ERR_CHECKSUM; a++) {
    const char *s = rdkv_status_string((rdkv_status)a);
    if (!CHECK(s != NULL)) continue;
    CHECK(strlen(s) > 1 && strlen(s) < 100);
    for (b = RDKV_OK; b < a; b++) CHECK(strcmp(s, rdkv_status_string((rdkv_status)b)) != 0);
  }
  for (i = 0; i < 2; i++) {
    rdkv_status unknown = RDKV_OK;
    int32_t value = i ? 15 : RDKV_ERR_CHECKSUM + 1; /* within the enum's bits */
    memcpy(&unknown, &value, sizeof value);
    CHECK(rdkv_status_string(unknown) != NULL);
  }
}

int main(void) {
  RUN(defaults);
  RUN(instruction_sets);
  RUN(illegal_values);
  RUN(legal_ends);
  RUN(null_pointers);
  RUN(status_strings);
  return test_done();
}
