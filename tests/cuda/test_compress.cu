/* Tests of the compression side of rdkv_cuda.cuh: on the device against rdkv.h, byte by byte. Exit
   code 0: all passed. With "small" as argument: fewer and smaller cases, for compute-sanitizer;
   with another word: the tests whose names contain it.
   nvcc -O2 -std=c++17 -arch=native tests/cuda/test_compress.cu -o test_compress && ./test_compress
 */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 0 /* no attention */
#include "../../rdkv_cuda.cuh"

#include <vector>

#include "../problem.h"
#include "device.h"

static const char *wanted = ""; /* the tests whose names contain it */
#define TEST(function) \
  if (strstr(#function, wanted)) RUN(function)

/* The cases {shape, length, variant} of a small run: each kernel and each way through it once. */
template <size_t N>
static bool chosen(const int (&few)[N][3], size_t shape, size_t length, int variant) {
  for (const int(&c)[3] : few)
    if (c[0] == static_cast<int>(shape) && c[1] == static_cast<int>(length) && c[2] == variant)
      return true;
  return false;
}

/* ---- a problem's copy on the device ---------------------------------------------------------- */

struct device_problem {
  const problem *p;
  rdkv_kv kv[MAX_LAYERS];
  void *raw[MAX_LAYERS][3];
  rdkv_layer layer[MAX_LAYERS];
  void *memory[MAX_LAYERS];
  size_t layer_bytes, workspace_bytes, capacity;
  void *workspace, *block;
  double *lambda;
  uint64_t *block_bytes;
  uint32_t *status;
};

static size_t mem_bytes(const void *memory) {
  mem_head head;
  memcpy(&head, static_cast<const char *>(memory) - MEM_ALIGN, sizeof head);
  return head.bytes;
}

static size_t largest(size_t a, size_t b) { return a > b ? a : b; }

template <typename T>
static T *shifted(T *host, const void *from, void *to) {
  return reinterpret_cast<T *>(static_cast<char *>(to) + (reinterpret_cast<const char *>(host) -
                                                          static_cast<const char *>(from)));
}

static void send_layers(device_problem *d) {
  for (int l = 0; l < d->p->cfg.n_layers; ++l)
    CUDA(cudaMemcpy(d->memory[l], d->p->layer_memory[l], d->layer_bytes, cudaMemcpyHostToDevice));
}

/* Workspace, block and results full of rubbish; no error yet. */
static void poison(device_problem *d, int byte) {
  CUDA(cudaMemset(d->workspace, byte, d->workspace_bytes));
  CUDA(cudaMemset(d->block, byte, d->capacity));
  CUDA(cudaMemset(d->lambda, byte, MAX_LAYERS * sizeof(double)));
  CUDA(cudaMemset(d->block_bytes, byte, sizeof(uint64_t)));
  CUDA(cudaMemset(d->status, 0, sizeof(uint32_t)));
}

static device_problem to_device(const problem *p) {
  device_problem d;
  const rdkv_config *c = &p->cfg;
  memset(&d, 0, sizeof d);
  d.p = p, d.layer_bytes = rdkv_layer_bytes(c, p->n_tokens);
  for (int l = 0; l < c->n_layers; ++l) {
    d.kv[l] = p->kv[l];
    rdkv_tensor *t[3] = {&d.kv[l].k, &d.kv[l].v, &d.kv[l].q};
    for (int i = 0; i < 3; ++i) {
      const size_t bytes = mem_bytes(p->raw[l][i]);
      CUDA(cudaMalloc(&d.raw[l][i], bytes));
      CUDA(cudaMemcpy(d.raw[l][i], p->raw[l][i], bytes, cudaMemcpyHostToDevice));
      t[i]->data = shifted(static_cast<const char *>(t[i]->data), p->raw[l][i], d.raw[l][i]);
    }
    CUDA(cudaMalloc(&d.memory[l], d.layer_bytes + 64));
    const rdkv_layer &h = p->layer[l];
    const void *from = p->layer_memory[l];
    d.layer[l].n_tokens = h.n_tokens, d.layer[l].lambda = 0;
    d.layer[l].token = shifted(h.token, from, d.memory[l]);
    d.layer[l].q_square = shifted(h.q_square, from, d.memory[l]);
    d.layer[l].k_square = shifted(h.k_square, from, d.memory[l]);
    d.layer[l].mean_out = shifted(h.mean_out, from, d.memory[l]);
    d.layer[l].v_distortion = shifted(h.v_distortion, from, d.memory[l]);
    d.layer[l].k_distortion = shifted(h.k_distortion, from, d.memory[l]);
    d.layer[l].v_bits = shifted(h.v_bits, from, d.memory[l]);
    d.layer[l].k_bits = shifted(h.k_bits, from, d.memory[l]);
  }
  d.workspace_bytes = largest(largest(rdkv_cuda_layer_workspace(c, c->n_layers, p->n_tokens),
                                      rdkv_cuda_allocate_workspace(c, c->n_layers, p->n_tokens)),
                              rdkv_cuda_pack_workspace(c, c->n_layers, p->n_tokens));
  /* widths of one's own may take more than a budget's bound */
  rdkv_config most = *c;
  most.profile = RDKV_PAPER;
  d.capacity = rdkv_block_bound(&most, p->n_tokens);
  CUDA(cudaMalloc(&d.workspace, d.workspace_bytes));
  CUDA(cudaMalloc(&d.block, d.capacity + 128));
  CUDA(cudaMalloc(&d.lambda, MAX_LAYERS * sizeof(double)));
  CUDA(cudaMalloc(&d.block_bytes, sizeof(uint64_t)));
  CUDA(cudaMalloc(&d.status, sizeof(uint32_t)));
  poison(&d, 0xa5);
  send_layers(&d);
  return d;
}

static void device_free(device_problem *d) {
  for (int l = 0; l < d->p->cfg.n_layers; ++l) {
    for (int i = 0; i < 3; ++i) CUDA(cudaFree(d->raw[l][i]));
    CUDA(cudaFree(d->memory[l]));
  }
  CUDA(cudaFree(d->workspace)), CUDA(cudaFree(d->block)), CUDA(cudaFree(d->lambda));
  CUDA(cudaFree(d->block_bytes)), CUDA(cudaFree(d->status));
}

static uint32_t status_of(const device_problem *d) {
  uint32_t status;
  CUDA(cudaMemcpy(&status, d->status, sizeof status, cudaMemcpyDeviceToHost));
  return status;
}

/* A layer's arrays back on the host; release with free. */
static char *fetch(const device_problem *d, int l) {
  char *m = static_cast<char *>(malloc(d->layer_bytes + 1));
  CUDA(cudaMemcpy(m, d->memory[l], d->layer_bytes, cudaMemcpyDeviceToHost));
  return m;
}

/* The same bytes in an array of the host's layer l and in its copy m from the device. */
static void check_array(const problem *p, int l, const char *m, const void *array, size_t bytes,
                        const char *what) {
  const char *a = static_cast<const char *>(array);
  const char *b = m + (a - static_cast<const char *>(p->layer_memory[l]));
  size_t i = 0;
  while (i < bytes && a[i] == b[i]) ++i;
  if (!CHECK(i == bytes))
    printf("  %s, layer %d: byte %zu of %zu differs, %d, want %d\n", what, l, i, bytes, b[i], a[i]);
}

/* ---- pack ------------------------------------------------------------------------------------ */

/* Packs p's widths on both and compares. */
static void compare_pack(problem *p, device_problem *d, int first_layer, uint64_t begin) {
  const rdkv_config *c = &p->cfg;
  const size_t capacity = rdkv_block_bytes(c, p->layer, c->n_layers);
  char *want = static_cast<char *>(mem_new(capacity)),
       *got = static_cast<char *>(malloc(capacity + 128));
  size_t bytes = 0;
  uint64_t device_bytes = 0;
  double lambda[MAX_LAYERS];
  for (int l = 0; l < MAX_LAYERS; ++l) lambda[l] = p->layer[l].lambda;
  CHECK_OK(rdkv_pack(c, p->kv, p->layer, c->n_layers, first_layer, begin, want, capacity, &bytes,
                     p->scratch, p->scratch_bytes));
  send_layers(d);
  poison(d, 0x5a);
  CUDA(cudaMemcpy(d->lambda, lambda, sizeof lambda, cudaMemcpyHostToDevice));
  CUDA(rdkv_cuda_pack(c, d->kv, d->layer, c->n_layers, d->lambda, first_layer, begin, d->block,
                      capacity, d->block_bytes, d->status, d->workspace, d->workspace_bytes, 0));
  CHECK_EQ(status_of(d), RDKV_OK);
  CUDA(cudaMemcpy(&device_bytes, d->block_bytes, 8, cudaMemcpyDeviceToHost));
  CHECK_EQ(device_bytes, bytes);
  CUDA(cudaMemcpy(got, d->block, capacity + 128, cudaMemcpyDeviceToHost));
  size_t i = 0;
  while (i < bytes && got[i] == want[i]) ++i;
  if (!CHECK(i == bytes))
    printf("  byte %zu of %zu (head %llu) differs\n", i, bytes,
           (unsigned long long)((rdkv_header *)(void *)want)->head_bytes);
  for (i = capacity; i < capacity + 128; ++i)
    if (!CHECK(got[i] == 0x5a)) break;
  if (capacity > 0) { /* too small by a byte: an error, and nothing is written */
    poison(d, 0x5a);
    CUDA(rdkv_cuda_pack(c, d->kv, d->layer, c->n_layers, d->lambda, first_layer, begin, d->block,
                        capacity - 1, d->block_bytes, d->status, d->workspace, d->workspace_bytes,
                        0));
    CHECK_EQ(status_of(d), RDKV_ERR_MEMORY);
    CUDA(cudaMemcpy(&device_bytes, d->block_bytes, 8, cudaMemcpyDeviceToHost));
    CHECK_EQ(device_bytes, 0);
    CUDA(cudaMemcpy(got, d->block, capacity, cudaMemcpyDeviceToHost));
    for (i = 0; i < capacity && got[i] == 0x5a; ++i) {
    }
    CHECK_EQ(i, capacity);
  }
  mem_free(want), free(got);
}

static void test_pack() {
  static const int shape[][4] = {{8, 2, 128, 128}, {4, 4, 64, 80}, {2, 1, 40, 24},
                                 {4, 1, 256, 256}, {3, 1, 1, 1},   {6, 2, 80, 112}};
  static const uint32_t length[] = {0, 1, 31, 33, 100, 2500};
  static const unsigned mix[] = {MIX_ALL, 0x1e2, 0x22, 0x1f0, 0x21, 0x3e};
  static const int few[][3] = {{0, 0, 0}, {0, 4, 1}, {0, 3, 2}, {0, 2, 4}, {0, 1, 5},
                               {3, 2, 1}, {3, 2, 2}, {3, 4, 4}, {3, 3, 5}, {3, 3, 0},
                               {2, 3, 3}, {5, 2, 2}, {4, 1, 0}};
  uint64_t seed = 1;
  for (size_t s = 0; s < sizeof shape / sizeof *shape; ++s)
    for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
      for (int variant = 0; variant < 6; ++variant, ++seed) {
        if (small_run && !chosen(few, s, n, variant)) continue;
        if (length[n] > 1000 && (s > 1 || variant > 2)) continue;
        rdkv_config c = config_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
        c.profile = variant & 1 ? RDKV_PAPER : RDKV_JOINT;
        c.positions = variant >> 1 & 1, c.n_layers = variant % 3 + 1;
        const rdkv_dtype dtype = static_cast<rdkv_dtype>(variant % 3);
        const layout where =
            static_cast<layout>((static_cast<size_t>(variant) + s + n) % N_LAYOUTS);
        test_where("pack: shape %zu, %u tokens, variant %d", s, length[n], variant);
        problem p = problem_make(&c, length[n], dtype, where, seed);
        problem_score(&p);
        device_problem d = to_device(&p);
        for (int m = 0; m < (small_run ? 1 : 3); ++m) {
          problem_widths(&p, mix[(static_cast<size_t>(m) * 2 + seed) % 6], seed + 77);
          if (p.cfg.profile == RDKV_PAPER && length[n] > 0) p.layer[0].k_bits[0] = 16;
          for (int l = 0; l < p.cfg.n_layers; ++l) p.layer[l].lambda = 0.25 * (l + 1);
          compare_pack(&p, &d, m, static_cast<uint64_t>(m) << 33);
        }
        device_free(&d), problem_free(&p);
      }
}

/* Values that a quantiser trips over, and sums at a tie between two floats. */
static void test_pack_values() {
  rdkv_config c = config_of(2, 2, 64, 64);
  for (int kind = 0; kind < 6; ++kind) {
    if (small_run && kind != 4) continue;
    test_where("pack values: kind %d", kind);
    c.profile = kind & 1 ? RDKV_PAPER : RDKV_JOINT;
    problem p = problem_make(&c, 300, RDKV_F32, DENSE, 5);
    float *k = static_cast<float *>(p.raw[0][0]), *v = static_cast<float *>(p.raw[0][1]);
    for (int i = 0; i < 300 * 128; ++i) {
      if (kind < 2) k[i] = v[i] = 65504.0f * ((i * 7 % 13) - 6) / 6.0f;
      if (kind == 2 || kind == 3) k[i] = 3.5f, v[i] = i % 2 ? 0.0f : -0.0f;
      if (kind > 3) k[i] *= 1e-7f, v[i] *= 3e-8f;
    }
    problem_widths(&p, MIX_ALL, 9);
    for (int t = 0; t < 2 * 300 * 5; ++t)
      p.layer[0].v_distortion[t] = kind < 4 ? 0.1f * (float)t : 1.0f;
    if (kind == 4) /* 2^24 and then many halves: every one is lost in float, none in double */
      for (int t = 0; t < 2 * 300 * 5; ++t)
        p.layer[0].v_distortion[t] = t % 300 ? 1.0f : 33554432.0f;
    device_problem d = to_device(&p);
    compare_pack(&p, &d, 0, 0);
    device_free(&d), problem_free(&p);
  }
}

/* Such values as halves and as bf16, which have a kernel of their own: many at a tie between codes,
   ranges without 0, subnormals. */
static void test_pack_halves() {
  rdkv_config c = config_of(2, 2, 64, 64);
  for (int kind = 0; kind < 24; ++kind) {
    if (small_run && kind % 9 != 5) continue;
    test_where("pack halves: kind %d", kind);
    c.profile = kind & 1 ? RDKV_PAPER : RDKV_JOINT;
    const bool bf16 = kind & 2;
    problem p = problem_make(&c, 300, bf16 ? RDKV_BF16 : RDKV_F16, DENSE, 5);
    uint16_t *raw[2] = {static_cast<uint16_t *>(p.raw[0][0]), static_cast<uint16_t *>(p.raw[0][1])};
    for (int i = 0; i < 2 * 300 * 128; ++i) {
      const float n = static_cast<float>((i * 7 + i / 128 * 3) % 31 - i / 640 % 29);
      const float value[6] = {65504.0f / 32 * n, n / 2,     50 + n / 8,
                              n / 8 - 50,        6e-8f * n, n * 1e-3f + 3e-5f};
      const float x = value[kind / 4];
      raw[i & 1][i / 2] = bf16 ? rdkv__to_bf16(x) : rdkv__to_half(x);
    }
    problem_widths(&p, kind % 3 ? MIX_ALL : 0x42, 9);
    device_problem d = to_device(&p);
    compare_pack(&p, &d, 0, 0);
    device_free(&d), problem_free(&p);
  }
}

/* ---- measure --------------------------------------------------------------------------------- */

static void compare_measure(problem *p, device_problem *d) {
  const rdkv_config *c = &p->cfg;
  const size_t heads = static_cast<size_t>(c->n_kv_heads);
  send_layers(d), poison(d, 0x77);
  CUDA(rdkv_cuda_measure(c, d->kv, d->layer, c->n_layers, d->status, d->workspace,
                         d->workspace_bytes, 0));
  CHECK_EQ(status_of(d), RDKV_OK);
  for (int l = 0; l < c->n_layers; ++l) {
    CHECK_OK(rdkv_measure(c, &p->kv[l], &p->layer[l], p->scratch, p->scratch_bytes));
    char *m = fetch(d, l);
    check_array(p, l, m, p->layer[l].v_distortion, heads * 5 * p->n_tokens * 4, "v_distortion");
    check_array(p, l, m, p->layer[l].k_distortion, heads * 4 * static_cast<size_t>(c->k_dim) * 4,
                "k_distortion");
    free(m);
  }
}

static void test_measure() {
  static const int shape[][4] = {
      {8, 2, 128, 128}, {4, 4, 64, 80}, {2, 1, 40, 24}, {4, 1, 256, 256}, {3, 1, 1, 1}};
  static const uint32_t length[] = {0, 1, 31, 33, 200, 3000};
  static const int few[][3] = {{0, 3, 1}, {0, 3, 2}, {0, 4, 0}, {1, 3, 0}, {2, 3, 1},
                               {2, 3, 2}, {3, 3, 1}, {3, 3, 2}, {4, 0, 0}, {4, 1, 0}};
  uint64_t seed = 1;
  for (size_t s = 0; s < sizeof shape / sizeof *shape; ++s)
    for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
      for (int variant = 0; variant < 3; ++variant, ++seed) {
        if (small_run && !chosen(few, s, n, variant)) continue;
        if (length[n] > 1000 && s > 1) continue;
        rdkv_config c = config_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
        c.keep = variant == 0 ? 0.05 : variant == 1 ? 0.3 : 0.2, c.pool = variant * 8 + 1;
        if (variant == 2) c.budget_bytes = 4000, c.n_layers = 3;
        test_where("measure: shape %zu, %u tokens, variant %d", s, length[n], variant);
        problem p = problem_make(&c, length[n], static_cast<rdkv_dtype>(variant),
                                 static_cast<layout>(seed % N_LAYOUTS), seed);
        for (int l = 0; l < p.cfg.n_layers; ++l)
          CHECK_OK(rdkv_score(&p.cfg, &p.kv[l], &p.layer[l], p.scratch, p.scratch_bytes));
        device_problem d = to_device(&p);
        compare_measure(&p, &d);
        problem_widths(&p, MIX_ALL, seed); /* K over the tokens that are kept */
        compare_measure(&p, &d);
        device_free(&d), problem_free(&p);
      }
}

/* So many tokens that blocks have several spans of K and rounds of V. */
static void test_measure_long() {
  static const uint32_t length[] = {9000, 13000, 26000};
  for (size_t n = 0; n < (small_run ? 1 : sizeof length / sizeof *length); ++n) {
    rdkv_config c = config_of(8, 8, 40, 64);
    c.keep = 0.06, c.window = 4, c.n_layers = 3;
    test_where("measure: %u tokens", length[n]);
    problem p = problem_make(&c, length[n], RDKV_F16, DENSE, n + 1);
    for (int l = 0; l < p.cfg.n_layers; ++l)
      CHECK_OK(rdkv_score(&p.cfg, &p.kv[l], &p.layer[l], p.scratch, p.scratch_bytes));
    device_problem d = to_device(&p);
    compare_measure(&p, &d);
    problem_widths(&p, MIX_ALL, n + 1);
    compare_measure(&p, &d);
    device_free(&d), problem_free(&p);
  }
}

/* ---- score ----------------------------------------------------------------------------------- */

/* Largest difference, as a part of the largest value. */
static double difference(const float *a, const float *b, size_t n) {
  double d = 0, top = 1e-30;
  for (size_t i = 0; i < n; ++i) {
    d = fmax(d, fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
    top = fmax(top, fabs(static_cast<double>(b[i])));
    if (a[i] != a[i]) return INFINITY;
  }
  return d / top;
}

/* What attention gives the window's rows, fp64: log-sum-exp [n_q_heads][window] and outputs
   [window][n_q_heads][v_dim]. */
static void window_attention(const problem *p, std::vector<float> *lse, std::vector<float> *out) {
  const rdkv_config *c = &p->cfg;
  const size_t w = p->n_queries, kd = static_cast<size_t>(c->k_dim),
               vd = static_cast<size_t>(c->v_dim), hq = static_cast<size_t>(c->n_q_heads),
               hk = static_cast<size_t>(c->n_kv_heads);
  lse->assign(hq * w, 0), out->assign(w * hq * vd, 0);
  std::vector<double> x(p->n_tokens), o(vd);
  for (size_t h = 0; h < hq; ++h)
    for (size_t i = 0; i < w; ++i) {
      const size_t n = p->n_tokens - w + i + 1, g = h / (hq / hk);
      double top = -INFINITY, sum = 0;
      for (size_t t = 0; t < n; ++t) {
        x[t] = 0;
        for (size_t e = 0; e < kd; ++e)
          x[t] += static_cast<double>(p->q[0][(i * hq + h) * kd + e]) *
                  static_cast<double>(p->k[0][(t * hk + g) * kd + e]);
        x[t] *= static_cast<double>(c->softmax_scale), top = fmax(top, x[t]);
      }
      o.assign(vd, 0);
      for (size_t t = 0; t < n; ++t) {
        const double weight = exp(x[t] - top);
        sum += weight;
        for (size_t d = 0; d < vd && weight > 0; ++d)
          o[d] += weight * static_cast<double>(p->v[0][(t * hk + g) * vd + d]);
      }
      (*lse)[h * w + i] = static_cast<float>(top + log(sum));
      for (size_t d = 0; d < vd; ++d)
        (*out)[(i * hq + h) * vd + d] = static_cast<float>(o[d] / sum);
    }
}

/* Scores layer 0 on the device, with what attention gave the window if handed over (bit 0 of given:
   log-sum-exp, bit 1: outputs in out_type), and compares with p's arrays of rdkv_score. Returns the
   largest difference of a weight. */
static double compare_score(const problem *p, device_problem *d, int given,
                            const std::vector<float> &lse, const std::vector<float> &rows,
                            rdkv_dtype out_type, layout where) {
  const rdkv_config *c = &p->cfg;
  const size_t h = static_cast<size_t>(c->n_kv_heads), kd = static_cast<size_t>(c->k_dim),
               vd = static_cast<size_t>(c->v_dim), n = p->n_tokens;
  const size_t lse_bytes = lse.size() * sizeof(float);
  std::vector<float> rounded(rows.size() + 1);
  for (size_t i = 0; i < rows.size(); ++i) rounded[i] = round_to(out_type, rows[i]);
  void *memory = nullptr, *device_out = nullptr;
  float *device_lse = nullptr;
  rdkv_tensor out =
      tensor_of(rounded.data(), p->n_queries, c->n_q_heads, c->v_dim, out_type, where, &memory);
  CUDA(cudaMalloc(&device_lse, lse_bytes + 4));
  CUDA(cudaMemcpy(device_lse, lse.data(), lse_bytes, cudaMemcpyHostToDevice));
  CUDA(cudaMalloc(&device_out, mem_bytes(memory)));
  CUDA(cudaMemcpy(device_out, memory, mem_bytes(memory), cudaMemcpyHostToDevice));
  out.data = shifted(static_cast<const char *>(out.data), memory, device_out);
  poison(d, given ? 0xff : 0x7f);
  CUDA(cudaMemset(d->memory[0], 0x7f, d->layer_bytes));
  const float *lse_of = device_lse;
  CUDA(rdkv_cuda_score(c, d->kv, given & 1 ? &lse_of : nullptr,
                       static_cast<ptrdiff_t>(p->n_queries), given & 2 ? &out : nullptr, d->layer,
                       1, d->status, d->workspace, d->workspace_bytes, 0));
  CHECK_EQ(status_of(d), RDKV_OK);
  char *m = fetch(d, 0);
  const float *token = shifted(p->layer[0].token, p->layer_memory[0], m);
  const float *q2 = shifted(p->layer[0].q_square, p->layer_memory[0], m);
  const float *k2 = shifted(p->layer[0].k_square, p->layer_memory[0], m);
  const float *mean = shifted(p->layer[0].mean_out, p->layer_memory[0], m);
  double worst = 0;
  if (n > 0) {
    worst = difference(token, p->layer[0].token, h * n);
    CHECK_LE(worst, 1e-4);
    CHECK_LE(difference(q2, p->layer[0].q_square, h * kd), 1e-6);
    CHECK_LE(difference(k2, p->layer[0].k_square, h * kd), 1e-5);
    if (c->profile == RDKV_JOINT && !(given & 2 && out_type != RDKV_F32))
      CHECK_LE(difference(mean, p->layer[0].mean_out, h * vd), 1e-4);
    if (c->profile == RDKV_JOINT && given & 2) { /* of these very rows */
      float weight[RDKV__MAX_WINDOW];
      std::vector<float> want(h * vd);
      const size_t hq = static_cast<size_t>(c->n_q_heads), group = hq / h;
      rdkv__recency(c, static_cast<int>(p->n_queries), weight);
      for (size_t i = 0; i < h * vd; ++i) {
        double sum = 0;
        for (size_t r = 0; r < p->n_queries; ++r)
          for (size_t g = 0; g < group; ++g)
            sum += static_cast<double>(weight[r]) *
                   static_cast<double>(rounded[(r * hq + i / vd * group + g) * vd + i % vd]);
        want[i] = static_cast<float>(sum / static_cast<double>(group * p->n_queries));
      }
      CHECK_LE(difference(mean, want.data(), h * vd), 1e-6);
    }
  }
  std::vector<uint8_t> cleared(h * (n > kd ? n : kd));
  CHECK(memcmp(shifted(p->layer[0].v_bits, p->layer_memory[0], m), cleared.data(), h * n) == 0);
  CHECK(memcmp(shifted(p->layer[0].k_bits, p->layer_memory[0], m), cleared.data(), h * kd) == 0);
  free(m), mem_free(memory);
  CUDA(cudaFree(device_lse)), CUDA(cudaFree(device_out));
  return worst;
}

static void test_score() {
  static const int shape[][4] = {{8, 2, 128, 128}, {4, 4, 64, 80},  {2, 1, 40, 24},
                                 {4, 1, 256, 256}, {12, 2, 96, 96}, {2, 1, 192, 64},
                                 {20, 1, 64, 64}};
  static const uint32_t length[] = {0, 1, 31, 33, 300, 1500};
  static const int few[][3] = {{0, 0, 0}, {0, 3, 0}, {0, 4, 1}, {0, 3, 2}, {0, 2, 5}, {1, 3, 1},
                               {1, 2, 2}, {2, 1, 0}, {2, 3, 3}, {2, 2, 4}, {3, 3, 1}, {3, 3, 2},
                               {4, 3, 1}, {4, 3, 2}, {5, 3, 1}, {5, 3, 2}, {6, 4, 2}};
  uint64_t seed = 1;
  double worst = 0;
  for (size_t s = 0; s < sizeof shape / sizeof *shape; ++s)
    for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
      for (int variant = 0; variant < 6; ++variant, ++seed) {
        if (small_run && !chosen(few, s, n, variant)) continue;
        if (length[n] > 1000 && (s > 1 || variant > 3)) continue;
        rdkv_config c = config_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
        c.window = variant == 5 ? 40 : variant == 4 ? 3 : 32;
        c.profile = variant == 3 ? RDKV_PAPER : RDKV_JOINT;
        const rdkv_dtype dtype = static_cast<rdkv_dtype>(variant % 3);
        const layout where = variant == 4  ? static_cast<layout>(seed % N_LAYOUTS)
                             : variant & 1 ? HEADS_FIRST
                                           : DENSE;
        test_where("score: shape %zu, %u tokens, variant %d", s, length[n], variant);
        problem p = problem_make(&c, length[n], dtype, where, seed);
        device_problem d = to_device(&p);
        std::vector<float> lse, out;
        window_attention(&p, &lse, &out);
        CHECK_OK(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes));
        for (int given = 0; given < 4; ++given)
          worst = fmax(worst, compare_score(&p, &d, given, lse, out,
                                            static_cast<rdkv_dtype>(given == 2 ? 0 : seed % 3),
                                            static_cast<layout>((seed + n) % N_LAYOUTS)));
        device_free(&d), problem_free(&p);
      }
  printf("     score: largest difference of a weight %.2g of the largest weight\n", worst);
}

/* Logits that lie so far apart that 2^(their difference) is no float, the largest at the end: what
   the first token says about a column is of no use then. */
static void test_score_far() {
  for (int variant = 0; variant < 4; ++variant) {
    if (small_run && variant != 1) continue;
    test_where("score far: variant %d", variant);
    rdkv_config c = config_of(variant & 1 ? 8 : 2, 2, 128, 128);
    problem p = problem_make(&c, small_run ? 300 : 3000, RDKV_F32, DENSE, 21);
    for (uint32_t t = 0; t < p.n_tokens; ++t)
      for (int i = 0; i < 2 * 128; ++i)
        if (i % 128 == 125)
          p.k[0][t * 256 + static_cast<uint32_t>(i)] = t % 97 == 96 ? 40.0f : -40.0f;
    for (size_t i = 0; i < p.n_queries * static_cast<size_t>(c.n_q_heads); ++i)
      p.q[0][i * 128 + 125] = variant & 2 ? -30.0f : 30.0f;
    for (int i = 0; i < 3; ++i) mem_free(p.raw[0][i]);
    const rdkv_dtype dtype = variant & 2 ? RDKV_BF16 : RDKV_F16;
    float *values[3] = {p.k[0], p.v[0], p.q[0]};
    const size_t rows = p.n_tokens * static_cast<size_t>(256);
    const size_t sizes[3] = {rows, rows, p.n_queries * static_cast<size_t>(c.n_q_heads) * 128};
    for (int k = 0; k < 3; ++k)
      for (size_t i = 0; i < sizes[k]; ++i) values[k][i] = round_to(dtype, values[k][i]);
    problem_tensors(&p, 0, dtype, DENSE);
    device_problem d = to_device(&p);
    std::vector<float> lse, out;
    window_attention(&p, &lse, &out);
    CHECK_OK(rdkv_score(&p.cfg, &p.kv[0], &p.layer[0], p.scratch, p.scratch_bytes));
    for (int given = 0; given < 4; ++given) compare_score(&p, &d, given, lse, out, RDKV_F32, DENSE);
    device_free(&d), problem_free(&p);
  }
}

/* Many layers in one call: what one call each gives, to the bit. */
static void test_items() {
  for (int variant = 0; variant < (small_run ? 1 : 4); ++variant) {
    test_where("items: variant %d", variant);
    rdkv_config c = config_of(4, 2, variant == 1 ? 40 : 64, 64);
    c.n_layers = MAX_LAYERS, c.profile = variant == 3 ? RDKV_PAPER : RDKV_JOINT;
    problem p = problem_make(&c, small_run ? 100 : 900, variant == 2 ? RDKV_F32 : RDKV_BF16, DENSE,
                             static_cast<uint64_t>(variant) + 3);
    device_problem d = to_device(&p);
    const size_t rows = static_cast<size_t>(c.n_q_heads) * p.n_queries;
    std::vector<float> lse(rows, 5.0f);
    std::vector<char *> single;
    const float *lse_of[MAX_LAYERS];
    float *device_lse = nullptr;
    CUDA(cudaMalloc(&device_lse, MAX_LAYERS * rows * sizeof(float)));
    for (int l = 0; l < MAX_LAYERS; ++l) {
      lse_of[l] = device_lse + static_cast<size_t>(l) * rows, lse[0] = static_cast<float>(l) + 3;
      CUDA(cudaMemcpy(device_lse + static_cast<size_t>(l) * rows, lse.data(), rows * sizeof(float),
                      cudaMemcpyHostToDevice));
    }
    for (int given = 0; given < 2; ++given) {
      const ptrdiff_t stride = static_cast<ptrdiff_t>(p.n_queries);
      poison(&d, 0x44);
      for (int l = 0; l < MAX_LAYERS; ++l) {
        CUDA(cudaMemset(d.memory[l], 0, d.layer_bytes));
        CUDA(rdkv_cuda_score(&p.cfg, d.kv + l, given ? lse_of + l : nullptr, stride, nullptr,
                             d.layer + l, 1, d.status, d.workspace, d.workspace_bytes, 0));
        CUDA(rdkv_cuda_measure(&p.cfg, d.kv + l, d.layer + l, 1, d.status, d.workspace,
                               d.workspace_bytes, 0));
        single.push_back(fetch(&d, l));
        CUDA(cudaMemset(d.memory[l], 0, d.layer_bytes));
      }
      CUDA(rdkv_cuda_score(&p.cfg, d.kv, given ? lse_of : nullptr, stride, nullptr, d.layer,
                           MAX_LAYERS, d.status, d.workspace, d.workspace_bytes, 0));
      CUDA(rdkv_cuda_measure(&p.cfg, d.kv, d.layer, MAX_LAYERS, d.status, d.workspace,
                             d.workspace_bytes, 0));
      CHECK_EQ(status_of(&d), RDKV_OK);
      for (int l = 0; l < MAX_LAYERS; ++l) {
        char *together = fetch(&d, l);
        CHECK(memcmp(together, single[static_cast<size_t>(l)], d.layer_bytes) == 0);
        free(together), free(single[static_cast<size_t>(l)]);
      }
      single.clear();
    }
    CUDA(cudaFree(device_lse));
    device_free(&d), problem_free(&p);
  }
}

/* ---- allocate -------------------------------------------------------------------------------- */

/* Allocates p's weights and distortions on both and compares; then packs. */
static void compare_allocate(problem *p, device_problem *d, bool pack) {
  const rdkv_config *c = &p->cfg;
  const size_t h = static_cast<size_t>(c->n_kv_heads), kd = static_cast<size_t>(c->k_dim);
  double lambda[MAX_LAYERS];
  send_layers(d);
  poison(d, 0x3c);
  const rdkv_status want = problem_allocate(p);
  CUDA(rdkv_cuda_allocate(c, d->layer, c->n_layers, d->lambda, d->status, d->workspace,
                          d->workspace_bytes, 0));
  CHECK_EQ(status_of(d), want);
  if (want != RDKV_OK) return;
  CUDA(cudaMemcpy(lambda, d->lambda, sizeof lambda, cudaMemcpyDeviceToHost));
  for (int l = 0; l < c->n_layers; ++l) {
    char *m = fetch(d, l);
    check_array(p, l, m, p->layer[l].v_bits, h * p->n_tokens, "v_bits");
    check_array(p, l, m, p->layer[l].k_bits, h * kd, "k_bits");
    if (c->profile == RDKV_JOINT) CHECK(lambda[l] == p->layer[l].lambda);
    free(m);
  }
  if (pack) compare_pack(p, d, 0, 0);
}

static void allocate_cases(size_t from, size_t to) {
  static const int shape[][4] = {{4, 2, 128, 128}, {4, 4, 64, 80}, {2, 1, 40, 24}, {3, 1, 1, 1}};
  static const uint32_t length[] = {0, 1, 31, 33, 150, 700, 6000};
  static const double keep[] = {0.02, 0.1, 0.3, 0.7, 1.0};
  static const int few[][3] = {{0, 0, 0}, {0, 3, 0}, {2, 4, 1}, {3, 3, 2}, {2, 4, 3}, {2, 4, 4},
                               {2, 4, 5}, {3, 3, 8}, {3, 3, 9}, {3, 1, 0}, {0, 6, 0}, {0, 6, 4}};
  const rdkv_pin_reason any = RDKV_PIN_OTHER;
  const rdkv_pin pins[] = {{0, 4, 16, any, 0},         {20, 40, 8, any, 0},
                           {10, 30, 2, any, 0},        {140, 300, 4, any, 0},
                           {25, 100000, 4, any, 0.2f}, {8, 8, 16, any, 0.5f}};
  uint64_t seed = 1;
  for (size_t s = 0; s < sizeof shape / sizeof *shape; ++s)
    for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
      for (int variant = 0; variant < 10; ++variant, ++seed) {
        if (n < from || n >= to || (small_run && !chosen(few, s, n, variant))) continue;
        if (length[n] > 1000 && s > 1) continue;
        rdkv_config c = config_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
        c.keep = keep[(seed + static_cast<size_t>(variant)) % 5];
        c.n_layers = variant % 3 == 2 ? 3 : 1;
        if (length[n] == 150 && (variant == 4 || variant == 7 || variant == 8))
          c.n_layers = 9; /* more than go with a launch */
        c.scope = static_cast<rdkv_scope>(variant % 4), c.positions = variant == 5;
        if (variant == 3 || variant == 7)
          c.lambda = variant == 3 ? 1e-6 : 1e-4 * static_cast<double>(s);
        if (variant >= 8) c.profile = RDKV_PAPER, c.lambda = 0;
        if (variant == 8) c.budget_bytes = 3000 + 2 * length[n] * static_cast<uint64_t>(c.k_dim);
        if (variant == 4 || variant == 5 || variant == 7)
          c.pins = pins, c.n_pins = variant == 4 ? 4 : 6, c.keep = variant == 5 ? 0.9 : c.keep;
        test_where("allocate: shape %zu, %u tokens, variant %d", s, length[n], variant);
        problem p = problem_make(&c, length[n], RDKV_F16, DENSE, seed);
        problem_score(&p);
        device_problem d = to_device(&p);
        compare_allocate(&p, &d, !small_run);
        device_free(&d), problem_free(&p);
      }
}

static void test_allocate_short() { allocate_cases(0, 6); }

/* Prompts long enough to be solved once: of short ones the solver tries many budgets and prices of
   K, which racecheck takes very long for. */
static void test_allocate_long() { allocate_cases(6, 7); }

/* Weights that tie, vanish or stand alone, few that outweigh all others, and budgets at both ends.
 */
static void test_allocate_edges() {
  static const uint32_t length[] = {1, 31, 33, 400, 3000};
  for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
    for (int kind = 0; kind < 9; ++kind)
      for (int variant = 0; variant < 6; ++variant) {
        if (small_run && (length[n] != 33 || kind % 3 || variant != (kind + 3) % 6)) continue;
        rdkv_config c = config_of(2, 2, 64, 64);
        c.scope = variant == 2   ? RDKV_SCOPE_HEAD
                  : variant == 3 ? RDKV_SCOPE_LAMBDA
                                 : RDKV_SCOPE_MODEL;
        c.lambda = variant == 3 ? (kind < 7 ? 1e-7 : 0.02) : 0;
        c.keep = variant == 1 ? 1.0 : variant == 5 ? 0.01 : 0.15;
        if (variant == 4) c.profile = RDKV_PAPER, c.scope = RDKV_SCOPE_MODEL;
        test_where("allocate: %u tokens, kind %d, variant %d", length[n], kind, variant);
        problem p = problem_make(&c, length[n], RDKV_F16, DENSE, 3);
        problem_score(&p);
        const size_t tokens = 2 * static_cast<size_t>(length[n]);
        float *dv = p.layer[0].v_distortion, *dk = p.layer[0].k_distortion;
        for (size_t i = 0; i < tokens; ++i) {
          float *w = &p.layer[0].token[i];
          if (kind == 0 || kind == 5) *w = 0.25f;
          if (kind == 1) *w = i == tokens / 3 ? 1.0f : 0.0f;
          if (kind == 2) *w = 0;
          if (kind == 3) *w = static_cast<float>(i % 5) * 0.1f;
          if (kind == 4) *w = 1e-30f * static_cast<float>(1 + i % 7);
          if (kind >= 7) *w = 1e-3f * static_cast<float>(1 + i % 13);
          if (kind == 7 && i % 61 == 40) *w = 1e-3f * static_cast<float>(1 << i % 12);
          if (kind == 8 && i % length[n] % 401 == 30) *w = 1e4f * static_cast<float>(1 + i % 3);
        }
        for (int head = 0; head < 2; ++head) /* distortions to match; kind 6: one slope for all */
          for (size_t t = 0; t < length[n] && kind != 6; ++t)
            for (int l = 0; l < 5; ++l)
              dv[(static_cast<size_t>(head) * 5 + static_cast<size_t>(l)) * length[n] + t] =
                  p.layer[0].token[static_cast<size_t>(head) * length[n] + t] *
                  (kind == 5 ? static_cast<float>(16 - (l ? 1 << l : 0))
                             : static_cast<float>(1 << (8 - 2 * l)));
        if (kind == 2)
          for (int i = 0; i < 2 * 4 * 64; ++i) dk[i] = 0;
        if (kind == 6)
          for (size_t i = 0; i < 5 * tokens; ++i) dv[i] = 3e38f;
        device_problem d = to_device(&p);
        compare_allocate(&p, &d, false);
        if (kind == 3 && variant == 0) {
          dv[7 % tokens] = variant ? -1.0f : NAN;
          compare_allocate(&p, &d, false);
        }
        device_free(&d), problem_free(&p);
      }
}

/* The authors' solver: heads that one block has and that several share, weights far apart, nearly
   or quite alike, tables of errors off their own hull, budgets from next to nothing to all. */
static void test_allocate_paper() {
  static const uint32_t length[] = {5, 33, 2500, 9001, 33002};
  static const float eps[][3] = {
      {0, 0, 0}, {0.3f, 0.3f, 0.3f}, {0.5f, 0.6f, 0.1f}, {0.75f, 0.5f, 0}, {1e-30f, 0, 0}};
  static const double keep[] = {0.0005, 0.025, 0.1, 0.4, 0.9, 1.0};
  for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
    for (size_t kind = 0; kind < 6; ++kind)
      for (size_t variant = 0; variant < 6; ++variant) {
        if (small_run && ((n != 1 && n != 2) || variant != (kind + n) % 6)) continue;
        if (length[n] > 1000 && (variant + kind + n) % 3) continue;
        rdkv_config c = config_of(2, 2, variant == 3 ? 40 : 16, 16);
        c.profile = RDKV_PAPER, c.keep = keep[variant];
        for (int i = 0; i < 3; ++i)
          c.eps_v[i] = eps[(kind + variant) % 5][i], c.eps_k[i] = eps[kind % 3][i];
        if (variant == 4) c.k_share = 0.1;
        if (variant == 5 && length[n] < 1000) c.keep = 0.1, c.budget_bytes = 4000 + 3 * length[n];
        test_where("paper: %u tokens, kind %zu, variant %zu", length[n], kind, variant);
        problem p = problem_make(&c, length[n], RDKV_F16, DENSE, 3);
        uint64_t rng = 7 * n + kind;
        for (size_t i = 0; i < 2 * length[n]; ++i) {
          static const double spread[] = {2.5, 0.1, 0.001, 1, 30};
          double w = kind < 5 ? exp(spread[kind] * rng_normal(&rng)) : 1;
          if (kind == 1 && i % length[n] == 3) w = 1e5; /* a sink */
          if (kind == 3 && i % 2) w = 0;
          p.layer[0].token[i] = static_cast<float>(fmin(w, 1e38)) * 1e-4f;
        }
        for (int i = 0; i < 2 * p.cfg.k_dim; ++i)
          p.layer[0].q_square[i] = static_cast<float>(exp(rng_normal(&rng))),
          p.layer[0].k_square[i] = kind == 5   ? 0
                                   : kind == 4 ? 1
                                               : p.layer[0].q_square[i];
        device_problem d = to_device(&p);
        compare_allocate(&p, &d, false);
        device_free(&d), problem_free(&p);
      }
}

/* config.max_error: the same budget is found, or none. */
static void test_max_error() {
  static const int shape[][4] = {{4, 2, 128, 128}, {2, 1, 40, 24}};
  static const uint32_t length[] = {0, 1, 31, 33, 150, 3000};
  static const double error[] = {0.5, 0.1, 0.003, 1e-9};
  static const int few[][3] = {{1, 3, 1}, {1, 2, 3}};
  for (size_t s = 0; s < sizeof shape / sizeof *shape; ++s)
    for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
      for (int variant = 0; variant < 4; ++variant) {
        if (small_run && !chosen(few, s, n, variant)) continue;
        rdkv_config c = config_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
        const rdkv_pin pin = {3, 9, 8, RDKV_PIN_OTHER, 0};
        c.max_error = error[variant], c.n_layers = variant % 2 + 1;
        if (variant == 1) c.pins = &pin, c.n_pins = 1;
        test_where("max_error: shape %zu, %u tokens, variant %d", s, length[n], variant);
        problem p = problem_make(&c, length[n], RDKV_F16, DENSE, s + n);
        problem_score(&p);
        if (variant == 2)
          memset(p.layer[0].v_distortion, 0,
                 5 * sizeof(float) * length[n] * static_cast<size_t>(c.n_kv_heads));
        device_problem d = to_device(&p);
        compare_allocate(&p, &d, !small_run);
        device_free(&d), problem_free(&p);
      }
}

static double fetch_double(const double *device) {
  double x;
  CUDA(cudaMemcpy(&x, device, sizeof x, cudaMemcpyDeviceToHost));
  return x;
}

/* Histograms before and after K is chosen, over layers; lambdas; widths at a lambda that is found
   on the device. */
static void test_histogram() {
  static const int shape[][4] = {{4, 2, 128, 128}, {2, 1, 40, 24}, {3, 1, 1, 1}};
  static const uint32_t length[] = {0, 1, 33, 700, 5000};
  static const int few[][3] = {{0, 2, 1}, {2, 0, 0}};
  for (size_t s = 0; s < sizeof shape / sizeof *shape; ++s)
    for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
      for (int variant = 0; variant < 2; ++variant) {
        if (small_run && !chosen(few, s, n, variant)) continue;
        rdkv_config c = config_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
        c.n_layers = 2, c.positions = variant, c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 1e-5;
        test_where("histogram: shape %zu, %u tokens, variant %d", s, length[n], variant);
        problem p = problem_make(&c, length[n], RDKV_F16, DENSE, 3 * s + n);
        problem_score(&p);
        if (variant) CHECK_OK(problem_allocate(&p));
        device_problem d = to_device(&p);
        static rdkv_histogram want[2], got[2];
        rdkv_histogram *h;
        CUDA(cudaMalloc(&h, sizeof want));
        CUDA(cudaMemset(h, 0, sizeof want));
        memset(want, 0, sizeof want);
        for (int l = 0; l < 2; ++l) {
          CHECK_OK(rdkv_histogram_add(&p.cfg, &p.layer[l], &want[l]));
          CUDA(rdkv_cuda_histogram_add(&p.cfg, &d.layer[l], h + l, 0));
        }
        CUDA(cudaMemcpy(got, h, sizeof got, cudaMemcpyDeviceToHost));
        CHECK(memcmp(got, want, sizeof got) == 0);
        want[0].bytes[77] = ~0ull; /* sums stay at the largest */
        CUDA(cudaMemcpy(h, want, sizeof want, cudaMemcpyHostToDevice));
        rdkv_histogram_merge(&want[1], &want[0]);
        CUDA(rdkv_cuda_histogram_merge(h + 1, h, 0));
        CUDA(cudaMemcpy(got, h, sizeof got, cudaMemcpyDeviceToHost));
        CHECK(memcmp(got, want, sizeof got) == 0);
        const uint64_t budget[] = {0, 3000, 40000, 1000000, 1ull << 60};
        for (uint64_t b : budget) {
          CUDA(rdkv_cuda_histogram_lambda(h + 1, b, d.lambda, 0));
          CHECK(fetch_double(d.lambda) == rdkv_histogram_lambda(&want[1], b));
        }
        /* the widths of the last but one */
        CUDA(rdkv_cuda_histogram_lambda(h + 1, budget[2], d.lambda + 3, 0));
        p.cfg.lambda = rdkv_histogram_lambda(&want[1], budget[2]);
        CHECK_OK(problem_allocate(&p));
        CUDA(rdkv_cuda_allocate_at(&p.cfg, d.layer, 2, d.lambda + 3, d.lambda, d.status,
                                   d.workspace, d.workspace_bytes, 0));
        CHECK_EQ(status_of(&d), RDKV_OK);
        for (int l = 0; l < 2; ++l) {
          char *m = fetch(&d, l);
          const size_t heads = static_cast<size_t>(c.n_kv_heads);
          check_array(&p, l, m, p.layer[l].v_bits, heads * length[n], "v_bits");
          check_array(&p, l, m, p.layer[l].k_bits, heads * static_cast<size_t>(c.k_dim), "k_bits");
          CHECK(fetch_double(d.lambda + l) == p.cfg.lambda);
          free(m);
        }
        CUDA(cudaFree(h));
        device_free(&d), problem_free(&p);
      }
}

/* ---- the whole chain ------------------------------------------------------------------------- */

/* Two prompts, a layer at a time, each layer's K and V overwritten once it is packed. rdkv.h gets
   the scores and distortions that the device had. */
static void test_stream() {
  static const uint32_t length[] = {1, 33, 200, 3000};
  enum { LAYERS = 3, VARIANTS = 6 };
  for (size_t n = 0; n < sizeof length / sizeof *length; ++n)
    for (int variant = 0; variant < VARIANTS; ++variant) {
      if (small_run && !(variant == 0 && length[n] == 3000) && !(variant == 2 && length[n] == 33))
        continue;
      rdkv_config c = config_of(4, 2, 64, 64);
      c.n_layers = LAYERS, c.window = 8;
      if (variant == 1) c.keep = 0.4, c.positions = 1;
      if (variant == 2) c.profile = RDKV_PAPER, c.budget_bytes = 9000 + 100 * length[n];
      if (variant == 3) c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 1e-4;
      if (variant == 4) c.scope = RDKV_SCOPE_HEAD, c.keep = 0.2;
      if (variant == 5) c.profile = RDKV_PAPER;
      const bool remembers = variant != 1;
      rdkv_config one;
      static rdkv_histogram earlier[LAYERS], fetched[LAYERS], bins[2];
      static rdkv_stream want, got;
      rdkv_histogram *device_earlier;
      rdkv_stream *state;
      CUDA(cudaMalloc(&device_earlier, sizeof earlier));
      CUDA(cudaMemset(device_earlier, 0, sizeof earlier));
      CUDA(cudaMalloc(&state, sizeof want));
      memset(earlier, 0, sizeof earlier);
      for (int prompt = 0; prompt < (small_run && variant ? 1 : 2); ++prompt) {
        test_where("stream: %u tokens, variant %d, prompt %d", length[n], variant, prompt);
        problem p =
            problem_make(&c, length[n], RDKV_F16, DENSE, 7 * n + static_cast<size_t>(prompt));
        device_problem d = to_device(&p);
        const size_t work_bytes = rdkv_cuda_stream_workspace(&p.cfg, length[n]);
        void *work;
        CUDA(cudaMalloc(&work, work_bytes));
        CUDA(cudaMemset(work, 0x5c, work_bytes));
        memset(&want, 0, sizeof want), memset(&got, 0, sizeof got);
        got.earlier = remembers ? device_earlier : nullptr;
        want.earlier = remembers ? earlier : nullptr;
        CUDA(cudaMemcpy(state, &got, sizeof got, cudaMemcpyHostToDevice));
        one = p.cfg, one.n_layers = 1;
        const size_t scratch_bytes =
            largest(rdkv_allocate_scratch(&one, 1, length[n]), rdkv_layer_scratch(&one, length[n]));
        void *scratch = mem_new(scratch_bytes);
        uint64_t spent = 0;
        rdkv_status st = RDKV_OK;
        for (int l = 0; l < LAYERS && st == RDKV_OK; ++l) {
          poison(&d, 0x11 * l);
          CUDA(cudaMemset(d.memory[l], 0x6e, d.layer_bytes));
          CUDA(rdkv_cuda_stream_layer(&p.cfg, state, l, &d.kv[l], nullptr, 0, nullptr, &d.layer[l],
                                      d.block, d.capacity, d.block_bytes, d.status, work,
                                      work_bytes, 0));
          for (int i = 0; i < 3; ++i)
            CUDA(cudaMemsetAsync(d.raw[l][i], 0xff, mem_bytes(p.raw[l][i])));
          uint64_t device_bytes = 0;
          CUDA(cudaMemcpy(&device_bytes, d.block_bytes, 8, cudaMemcpyDeviceToHost));
          char *m = fetch(&d, l);
          rdkv_layer *layer = &p.layer[l];
          memcpy(p.layer_memory[l], m, d.layer_bytes);
          memset(layer->v_bits, 0, 2 * length[n]), memset(layer->k_bits, 0, 2 * 64);
          const size_t capacity = rdkv_block_bound(&one, length[n]) * 11 + 100000;
          char *block = static_cast<char *>(mem_new(capacity));
          size_t bytes = 0;
          st = rdkv__stream_pack(&p.cfg, &want, &p.kv[l], layer, bins, block, capacity, &bytes,
                                 scratch, scratch_bytes);
          CHECK_EQ(status_of(&d), st);
          CHECK_EQ(device_bytes, bytes);
          if (st == RDKV_OK && device_bytes == bytes) {
            char *packed = static_cast<char *>(malloc(bytes));
            CUDA(cudaMemcpy(packed, d.block, bytes, cudaMemcpyDeviceToHost));
            CHECK(memcmp(packed, block, bytes) == 0);
            free(packed);
          }
          spent += bytes;
          CUDA(cudaMemcpy(&got, state, sizeof got, cudaMemcpyDeviceToHost));
          CHECK_EQ(got.next_layer, want.next_layer);
          CHECK_EQ(got.spent_bytes, want.spent_bytes);
          CHECK(got.lambda == want.lambda);
          CHECK(memcmp(&got.seen, &want.seen, 2 * sizeof got.seen) == 0);
          mem_free(block), free(m);
        }
        if (p.cfg.profile == RDKV_JOINT && p.cfg.scope != RDKV_SCOPE_LAMBDA)
          CHECK_LE(spent, rdkv__budget(&p.cfg, length[n], LAYERS));
        CUDA(cudaMemcpy(fetched, device_earlier, sizeof fetched, cudaMemcpyDeviceToHost));
        CHECK(memcmp(fetched, earlier, sizeof fetched) == 0);
        /* a layer out of turn is refused and changes nothing */
        CUDA(cudaMemset(d.status, 0, 4));
        for (int i = 0; i < 3; ++i)
          CUDA(
              cudaMemcpy(d.raw[0][i], p.raw[0][i], mem_bytes(p.raw[0][i]), cudaMemcpyHostToDevice));
        CUDA(rdkv_cuda_stream_layer(&p.cfg, state, (want.next_layer + 1) % LAYERS, &d.kv[0],
                                    nullptr, 0, nullptr, &d.layer[0], d.block, d.capacity,
                                    d.block_bytes, d.status, work, work_bytes, 0));
        mem_free(scratch);
        CHECK_EQ(status_of(&d), RDKV_ERR_ARGUMENT);
        CUDA(cudaMemcpy(&got, state, sizeof got, cudaMemcpyDeviceToHost));
        CHECK_EQ(got.next_layer, want.next_layer);
        CUDA(cudaFree(work));
        device_free(&d), problem_free(&p);
      }
      CUDA(cudaFree(state)), CUDA(cudaFree(device_earlier));
    }
}

/* Values that do not belong in a cache are refused at each stage, and nothing is packed. */
static void test_refused() {
  rdkv_config c = config_of(4, 2, 64, 64);
  for (int where = 0; where < 3; ++where)
    for (int kind = 0; kind < 4; ++kind) {
      if (small_run && kind != (where < 2 ? where : 3)) continue;
      test_where("refused: tensor %d, kind %d", where, kind);
      problem p = problem_make(&c, 70, kind == 3 ? RDKV_BF16 : RDKV_F32, DENSE, 1);
      const float x = kind == 0 ? NAN : kind == 1 ? INFINITY : 70000.0f;
      put_value(p.raw[0][where], kind == 3 ? RDKV_BF16 : RDKV_F32,
                where == 2 ? 77 : 64 * 2 * 40 + 9, x);
      device_problem d = to_device(&p);
      CUDA(rdkv_cuda_score(&p.cfg, d.kv, nullptr, 0, nullptr, d.layer, 1, d.status, d.workspace,
                           d.workspace_bytes, 0));
      CHECK_EQ(status_of(&d), RDKV_ERR_NONFINITE);
      if (where < 2) {
        problem_widths(&p, 0x1e2, 4);
        send_layers(&d), poison(&d, 1);
        CUDA(rdkv_cuda_pack(&p.cfg, d.kv, d.layer, 1, nullptr, 0, 0, d.block, d.capacity,
                            d.block_bytes, d.status, d.workspace, d.workspace_bytes, 0));
        CHECK_EQ(status_of(&d), RDKV_ERR_NONFINITE);
      }
      device_free(&d), problem_free(&p);
    }
  problem p = problem_make(&c, 70, RDKV_F32, DENSE, 1);
  problem_widths(&p, MIX_ALL, 1);
  device_problem d = to_device(&p);
  p.layer[0].v_bits[9] = 3;
  send_layers(&d);
  CUDA(rdkv_cuda_pack(&p.cfg, d.kv, d.layer, 1, nullptr, 0, 0, d.block, d.capacity, d.block_bytes,
                      d.status, d.workspace, d.workspace_bytes, 0));
  CHECK_EQ(status_of(&d), RDKV_ERR_CONFIG);
  device_free(&d), problem_free(&p);
}

static void whole_chain(const problem *p, device_problem *d, cudaStream_t stream) {
  const rdkv_config *c = &p->cfg;
  CUDA(cudaMemsetAsync(d->status, 0, sizeof(uint32_t), stream));
  CUDA(rdkv_cuda_score(c, d->kv, nullptr, 0, nullptr, d->layer, c->n_layers, d->status,
                       d->workspace, d->workspace_bytes, stream));
  CUDA(rdkv_cuda_measure(c, d->kv, d->layer, c->n_layers, d->status, d->workspace,
                         d->workspace_bytes, stream));
  CUDA(rdkv_cuda_allocate(c, d->layer, c->n_layers, d->lambda, d->status, d->workspace,
                          d->workspace_bytes, stream));
  CUDA(rdkv_cuda_pack(c, d->kv, d->layer, c->n_layers, d->lambda, 0, 0, d->block, d->capacity,
                      d->block_bytes, d->status, d->workspace, d->workspace_bytes, stream));
}

#ifndef RDKV_TEST_NO_GRAPH
/* Captured, replayed on a poisoned workspace, the same block every time; and rdkv.h packs the same
   bytes from the widths that came out. */
static void test_graph() {
  rdkv_config c = config_of(8, 2, 128, 128);
  c.n_layers = 2;
  for (int paper = 0; paper < 2; ++paper) {
    test_where("graph: profile %d", paper);
    c.profile = paper ? RDKV_PAPER : RDKV_JOINT;
    problem p = problem_make(&c, small_run ? 1100 : 5000, RDKV_F16, DENSE, 11);
    device_problem d = to_device(&p);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    whole_chain(&p, &d, stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    uint64_t bytes = 0;
    char *first = nullptr, *again = static_cast<char *>(malloc(d.capacity));
    for (int run = 0; run < (small_run ? 2 : 100); ++run) {
      poison(&d, run * 37 & 0xff);
      CUDA(cudaGraphLaunch(exec, stream));
      CUDA(cudaStreamSynchronize(stream));
      CHECK_EQ(status_of(&d), RDKV_OK);
      CUDA(cudaMemcpy(&bytes, d.block_bytes, 8, cudaMemcpyDeviceToHost));
      if (!CHECK(bytes > 0 && bytes <= d.capacity)) break;
      CUDA(cudaMemcpy(again, d.block, bytes, cudaMemcpyDeviceToHost));
      if (!first) {
        first = static_cast<char *>(malloc(bytes));
        memcpy(first, again, bytes);
      }
      if (!CHECK(memcmp(first, again, bytes) == 0)) break;
    }
    double lambda[MAX_LAYERS];
    CUDA(cudaMemcpy(lambda, d.lambda, sizeof lambda, cudaMemcpyDeviceToHost));
    for (int l = 0; l < c.n_layers; ++l) {
      char *m = fetch(&d, l);
      memcpy(p.layer_memory[l], m, d.layer_bytes);
      free(m);
      p.layer[l].lambda = paper ? 0 : lambda[l];
    }
    {
      CHECK_OK(problem_pack(&p));
      CHECK(p.block_bytes == bytes && memcmp(p.block, first, bytes) == 0);
      rdkv_segment segment;
      memcpy(p.block, first, bytes);
      CHECK_OK(rdkv_open(p.block, bytes, RDKV_VERIFY, &segment));
    }
    free(first), free(again);
    CUDA(cudaGraphExecDestroy(exec)), CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    device_free(&d), problem_free(&p);
  }
}
#endif

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i)
    if (!strcmp(argv[i], "small"))
      small_run = true;
    else
      wanted = argv[i];
  TEST(test_pack);
  TEST(test_pack_values);
  TEST(test_pack_halves);
  TEST(test_measure);
  TEST(test_measure_long);
  TEST(test_score);
  TEST(test_score_far);
  TEST(test_items);
  TEST(test_allocate_short);
  TEST(test_allocate_long);
  TEST(test_allocate_edges);
  TEST(test_allocate_paper);
  TEST(test_max_error);
  TEST(test_histogram);
  TEST(test_stream);
  TEST(test_refused);
#ifndef RDKV_TEST_NO_GRAPH
  TEST(test_graph);
#endif
  (void)whole_chain;
  return test_done();
}
