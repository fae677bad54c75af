/* Tests of rdkv_cuda.cuh on a GPU. Exit code 0: all passed. Arguments: "small" for few and small
   cases, for compute-sanitizer; others are parts of the names of the cases to run
   ("long", "small D128 G3", "graph").
   nvcc -O2 -std=c++17 -arch=native tests/cuda/test_cuda.cu -o test_cuda && ./test_cuda */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_NO_COMPRESS
#include "../../rdkv_cuda.cuh"

#include <math.h>
#include "device.h"
#include "random_block.h"

static int failures = 0;
static bool has_latency = false;
static std::vector<const char *> filters; /* cases to run: those whose name contains one of these */

template <typename T>
static T *to_device(const T *data, size_t n) {
  T *p = nullptr;
  CUDA(cudaMalloc(&p, n * sizeof(T) + 16));
  if (n) CUDA(cudaMemcpy(p, data, n * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

/* ---- the unpacking, exactly ------------------------------------------------------------------ */

/* Sends one block's codes through the tensor core: out [2 halves][16 rows][8 columns] = A * B for a
   B of small integers, so that every sum is exact in fp32 and must come out to the last bit. */
static __global__ void unpack_kernel(const uint32_t *words, const __half *b, int bits, float *out) {
  const int lane = static_cast<int>(threadIdx.x), g = lane >> 2, t = lane & 3;
  const uint8_t *block = reinterpret_cast<const uint8_t *>(words);
  /* B fragments in plain order of the 16 columns of A; column 4t + 2pr + e of a block is column
     2t + 8pr + e there */
  uint32_t r[2];
  for (int pr = 0; pr < 2; ++pr) {
    const __half2 h = __halves2half2(b[(2 * t + 8 * pr) * 8 + g], b[(2 * t + 8 * pr + 1) * 8 + g]);
    r[pr] = *reinterpret_cast<const uint32_t *>(&h);
  }
  for (int s = 0; s < 2; ++s) {
    float c[4] = {};
    uint32_t f[4];
    if (bits == 2) rdkv_cuda__fragment<2>(rdkv_cuda__words<2>(block), s, f);
    if (bits == 4) rdkv_cuda__fragment<4>(rdkv_cuda__words<4>(block), s, f);
    if (bits == 8) rdkv_cuda__fragment<8>(rdkv_cuda__words<8>(block), s, f);
    rdkv_cuda__mma<false>(c, f[0], f[1], f[2], f[3], r[0], r[1]);
    for (int i = 0; i < 4; ++i)
      out[(s * 16 + g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = c[i] * RDKV_CUDA__CODE_UNIT;
  }
}

static void test_unpack() {
  random_source rng = {1};
  uint32_t *words;
  __half *b;
  float *out;
  CUDA(cudaMalloc(&words, 512)), CUDA(cudaMalloc(&b, 256)), CUDA(cudaMalloc(&out, 1024));
  int wrong = 0, checked = 0;
  for (int bits = 2; bits <= 8; bits *= 2)
    for (int round = 0; round < (small_run ? 2 : 200); ++round) {
      uint32_t w[128];
      __half hb[128];
      for (int i = 0; i < 128; ++i) {
        w[i] = static_cast<uint32_t>(rng.next());
        hb[i] = __float2half(static_cast<float>(static_cast<int>(rng.below(65)) - 32));
      }
      if (round < 2) /* B selects single columns: each code must come through alone */
        for (int i = 0; i < 128; ++i)
          hb[i] = __float2half(i / 8 == i % 8 + 8 * round ? 1.0f : 0.0f);
      CUDA(cudaMemcpy(words, w, sizeof w, cudaMemcpyHostToDevice));
      CUDA(cudaMemcpy(b, hb, sizeof hb, cudaMemcpyHostToDevice));
      CUDA(cudaMemset(out, 0xff, 1024));
      unpack_kernel<<<1, 32>>>(words, b, bits, out);
      float got[256];
      CUDA(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
      for (int token = 0; token < 32; ++token)
        for (int n = 0; n < 8; ++n) {
          double want = 0;
          for (int channel = 0; channel < 16; ++channel) {
            const code_place p = key_place(token, channel);
            const int column = 2 * p.t + 8 * p.pr + p.e;
            double code = read_code(reinterpret_cast<const uint8_t *>(w), bits, p);
            if (bits == 2) code *= 1 << (2 * (2 * p.sub + p.pr));
            if (bits == 4) code *= 1 << (4 * p.pr);
            want += code * static_cast<double>(__half2float(hb[column * 8 + n]));
          }
          const float have = got[(token >> 4) * 128 + (token & 15) * 8 + n];
          ++checked;
          if (!(static_cast<double>(have) == want)) ++wrong;
        }
    }
  printf("unpack: %d of %d products differ\n", wrong, checked);
  if (wrong) ++failures;
  cudaFree(words), cudaFree(b), cudaFree(out);
}

/* ---- the blocks of these tests are what rdkv.h reads -------------------------------------------
 */

static void test_blocks() {
  const head_counts counts[2] = {{{70, 33, 1, 40}, {17, 30, 50}}, {{0, 300, 5, 0}, {0, 96, 16}}};
  const std::vector<uint8_t> block = random_block(1, 4, 8, 2, 112, 96, counts, 1, 1, 3);
  std::vector<uint8_t> memory(block.size() + 128);
  uint8_t *aligned = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  memcpy(aligned, block.data(), block.size());
  rdkv_segment segment;
  const rdkv_status opened = rdkv_open(aligned, block.size(), RDKV_VERIFY, &segment);
  int wrong = opened != RDKV_OK;
  for (int h = 0; h < 2 && !wrong; ++h) {
    std::vector<double> k, v;
    const uint32_t n = decode_block(block.data(), 4, h, k, v);
    std::vector<float> k2(k.size()), v2(v.size());
    uint32_t n2 = 0;
    wrong += rdkv_unpack(&segment, 4, h, k2.data(), v2.data(), nullptr, &n2) != RDKV_OK || n2 != n;
    for (size_t i = 0; i < k.size(); ++i) wrong += fabs(k[i] - static_cast<double>(k2[i])) > 1e-5;
    for (size_t i = 0; i < v.size(); ++i) wrong += fabs(v[i] - static_cast<double>(v2[i])) > 1e-5;
  }
  printf("blocks: %s, %d values differ from rdkv_unpack\n", rdkv_status_string(opened), wrong);
  if (wrong) ++failures;
}

/* ---- attention against double precision ------------------------------------------------------ */

struct shape {
  const char *name;
  int batch, kv_heads, group, k_dim, v_dim;
  int segments, layers_per_block;
  uint32_t tokens; /* about how many a head keeps in one segment; 0 for none */
  uint32_t tail;   /* tokens; sequence i has tail * (i + 1) / batch of them */
  bool append;
  rdkv_dtype dtype, tail_dtype;
  double spread_q, spread_k, offset_k, spread_v;
  int special; /* 1: one key dominates; 2: all V rows equal; 3: q = 0; 4: dense rows token-major */
  int overlap;
  int n_warps, blocks_per_sm, n_blocks;
  int latency; /* the kernel made for latency */
};

static uint16_t pack16(double x, rdkv_dtype t) {
  if (t == RDKV_F16) return half_bits(x);
  return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)));
}

static double value16(uint16_t bits, rdkv_dtype t) {
  if (t == RDKV_F16) return half_value(bits);
  return static_cast<double>(__bfloat162float(__ushort_as_bfloat16(bits)));
}

/* Counts of a head: ragged, with empty runs, runs of one token, and runs off 16 and 32. */
static head_counts random_counts(random_source &rng, const shape &s, int kind) {
  head_counts c;
  memset(&c, 0, sizeof c);
  uint32_t left = static_cast<uint32_t>(s.k_dim);
  for (int i = 0; i < 3; ++i) {
    const uint32_t n = i == 2 && kind == 0 ? left : rng.below(left + 1);
    c.channels[i] = n, left -= n;
  }
  if (kind == 1) c.channels[0] = c.channels[1] = 0, c.channels[2] = static_cast<uint32_t>(s.k_dim);
  for (int i = 0; i < 4; ++i) {
    c.tokens[i] = s.tokens ? rng.below(s.tokens) / 2 : 0;
    if (rng.below(4) == 0) c.tokens[i] = rng.below(3);
  }
  if (s.tokens && kind == 2) {
    memset(c.tokens, 0, sizeof c.tokens);
    c.tokens[rng.below(4)] = rng.below(2);
  }
  return c;
}

static bool wanted(const char *name) {
  for (const char *f : filters)
    if (strstr(name, f)) return true;
  return filters.empty();
}

static void run_case(const shape &s, uint64_t seed) {
  char label[80];
  snprintf(label, sizeof label, "%s D%d G%d", s.name, s.v_dim, s.group);
  if (!wanted(label)) return;
  random_source rng = {seed};
  const int layers = 2, q_heads = s.kv_heads * s.group;
  rdkv_cuda_config cfg;
  memset(&cfg, 0, sizeof cfg);
  cfg.n_layers = layers, cfg.first_layer = 3, cfg.batch = s.batch, cfg.n_q_heads = q_heads;
  cfg.n_kv_heads = s.kv_heads, cfg.k_dim = s.k_dim, cfg.v_dim = s.v_dim;
  cfg.dtype = s.dtype, cfg.tail_dtype = s.tail_dtype, cfg.overlap = s.overlap;
  cfg.n_warps = s.n_warps, cfg.blocks_per_sm = s.blocks_per_sm, cfg.n_blocks = s.n_blocks;
  cfg.max_segments = s.segments * 2 + 1, cfg.latency = s.latency ? 1 : -1;
  if (!s.latency) cfg.teams = s.n_warps > 4 ? 1 : 1 + static_cast<int>(seed % 4);
  if (s.n_blocks == 0 && s.latency) { /* from 2 to 18 parts a head, and some blocks more */
    const int heads = s.batch * s.kv_heads * ((s.group + 7) / 8);
    cfg.n_blocks = heads * (2 + 4 * static_cast<int>(seed % 5)) + static_cast<int>(seed % 3);
  }
  CUDA(rdkv_cuda_resolve(&cfg, &cfg));
  if (has_latency && (cfg.latency == 1) != (s.latency == 1)) {
    printf("%s: not the kernel asked for   FAIL\n", s.name), ++failures;
    return;
  }

  /* packed segments: of both layers in one block, or one block a layer */
  const int per = s.layers_per_block, blocks = s.segments * (layers / per);
  std::vector<std::vector<uint8_t>> host;
  std::vector<void *> device;
  std::vector<rdkv_cuda_sequence> sequences(static_cast<size_t>(s.batch));
  const uint32_t capacity = s.tail + 2;
  const size_t tail_values = static_cast<size_t>(layers + 3) * static_cast<size_t>(s.kv_heads) *
                             capacity * static_cast<size_t>(s.k_dim + s.v_dim);
  std::vector<std::vector<uint16_t>> tails;
  std::vector<uint32_t> lengths;
  std::vector<void *> owned;
  for (int b = 0; b < s.batch; ++b) {
    std::vector<const void *> list;
    for (int i = 0; i < blocks; ++i) {
      std::vector<head_counts> counts;
      for (int h = 0; h < per * s.kv_heads; ++h)
        counts.push_back(random_counts(rng, s, static_cast<int>(rng.below(6))));
      host.push_back(random_block(per, 3 + i % (layers / per) * per, q_heads, s.kv_heads, s.k_dim,
                                  s.v_dim, counts.data(), s.spread_k, s.spread_v, rng.next()));
      void *p = to_device(host.back().data(), host.back().size());
      device.push_back(p), list.push_back(p);
    }
    rdkv_cuda_sequence &q = sequences[static_cast<size_t>(b)];
    memset(&q, 0, sizeof q);
    const void **segments = to_device(list.data(), list.size());
    owned.push_back(segments);
    q.segments = segments;
    q.n_segments = static_cast<uint32_t>(list.size());
    /* tail: random, beyond its length NaN, so that reading there shows */
    const uint32_t n = s.tail * static_cast<uint32_t>(b + 1) / static_cast<uint32_t>(s.batch);
    lengths.push_back(n);
    std::vector<uint16_t> tail(tail_values, 0x7fff);
    void *data;
    CUDA(cudaMalloc(&data, tail_values * 2 + 16));
    owned.push_back(data);
    rdkv_cuda_tail(&cfg, data, capacity, &q);
    if (s.special == 4) { /* [layer][token][head][dim], K and V interleaved by layer */
      q.k_head = s.k_dim, q.v_head = s.v_dim;
      q.k_token = s.kv_heads * s.k_dim, q.v_token = s.kv_heads * s.v_dim;
    }
    uint16_t *base = static_cast<uint16_t *>(data);
    for (int l = 3; l < 3 + layers; ++l)
      for (int h = 0; h < s.kv_heads; ++h)
        for (uint32_t t = 0; t < n; ++t) {
          uint16_t *k = tail.data() + (static_cast<uint16_t *>(q.k) - base) + l * q.k_layer +
                        h * q.k_head + static_cast<int64_t>(t) * q.k_token;
          uint16_t *v = tail.data() + (static_cast<uint16_t *>(q.v) - base) + l * q.v_layer +
                        h * q.v_head + static_cast<int64_t>(t) * q.v_token;
          for (int d = 0; d < s.k_dim; ++d)
            k[d] = pack16(s.offset_k + s.spread_k * rng.normal(), s.tail_dtype);
          for (int d = 0; d < s.v_dim; ++d)
            v[d] = pack16(s.special == 2 ? 0.5 : s.spread_v * rng.normal(), s.tail_dtype);
        }
    CUDA(cudaMemcpy(data, tail.data(), tail_values * 2, cudaMemcpyHostToDevice));
    tails.push_back(tail);
  }
  rdkv_cuda_sequence *d_sequences = to_device(sequences.data(), sequences.size());
  uint32_t *d_lengths = to_device(lengths.data(), lengths.size());

  const size_t nq = static_cast<size_t>(s.batch * q_heads * s.k_dim);
  const size_t no = static_cast<size_t>(s.batch * q_heads * s.v_dim);
  const size_t nk = static_cast<size_t>(s.batch * s.kv_heads * s.k_dim);
  const size_t nv = static_cast<size_t>(s.batch * s.kv_heads * s.v_dim);
  std::vector<double> q(nq);
  std::vector<uint8_t> q_bytes(nq * 4);
  for (size_t i = 0; i < nq; ++i) {
    const double x = s.special == 3 ? 0 : s.spread_q * rng.normal();
    if (s.dtype == RDKV_F32) {
      const float f = static_cast<float>(x);
      memcpy(&q_bytes[4 * i], &f, 4), q[i] = static_cast<double>(f);
    } else {
      const uint16_t h = pack16(x, s.dtype);
      memcpy(&q_bytes[2 * i], &h, 2), q[i] = value16(h, s.dtype);
    }
  }
  std::vector<uint16_t> k_new(nk), v_new(nv);
  for (size_t i = 0; i < nk; ++i)
    k_new[i] = pack16(s.offset_k + s.spread_k * rng.normal(), s.tail_dtype);
  for (size_t i = 0; i < nv; ++i)
    v_new[i] = pack16(s.special == 2 ? 0.5 : s.spread_v * rng.normal(), s.tail_dtype);

  uint8_t *d_q = to_device(q_bytes.data(), q_bytes.size());
  uint16_t *d_k = to_device(k_new.data(), nk), *d_v = to_device(v_new.data(), nv);
  uint8_t *d_out;
  float *d_lse;
  void *plan, *workspace;
  CUDA(cudaMalloc(&d_out, no * 4));
  CUDA(cudaMalloc(&d_lse, static_cast<size_t>(s.batch * q_heads) * 4));
  CUDA(cudaMalloc(&plan, rdkv_cuda_plan_bytes(&cfg)));
  CUDA(cudaMalloc(&workspace, rdkv_cuda_workspace_bytes(&cfg)));
  CUDA(cudaMemset(plan, 0xff, rdkv_cuda_plan_bytes(&cfg)));
  CUDA(cudaMemset(workspace, 0xff, rdkv_cuda_workspace_bytes(&cfg)));
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA(cudaDeviceSynchronize()); /* that stream does not wait for the copies and memsets above */
  CUDA(rdkv_cuda_plan(&cfg, d_sequences, d_lengths, plan, stream));
  CUDA(cudaStreamSynchronize(stream));

  const size_t width = s.dtype == RDKV_F32 ? 4 : 2;
  double worst = 0, worst_lse = 0;
  bool same = true, appended = true;
  for (int l = 0; l < layers; ++l) {
    rdkv_cuda_io io;
    memset(&io, 0, sizeof io);
    io.q = d_q, io.out = d_out, io.lse = d_lse, io.tail_tokens = d_lengths;
    if (s.append) io.k_new = d_k, io.v_new = d_v;
    std::vector<uint8_t> got(no * 4), again(no * 4);
    std::vector<float> lse(static_cast<size_t>(s.batch * q_heads));
    for (int round = 0; round < (small_run ? 2 : 4); ++round) {
      CUDA(cudaMemset(d_out, 0xff, no * 4));
      CUDA(cudaMemset(d_lse, 0xff, lse.size() * 4));
      CUDA(cudaDeviceSynchronize());
      io.lse = round ? d_lse : nullptr;
      CUDA(rdkv_cuda_attend(&cfg, plan, l, &io, workspace, stream));
      CUDA(cudaStreamSynchronize(stream));
      CUDA(cudaMemcpy(again.data(), d_out, no * width, cudaMemcpyDeviceToHost));
      if (round && memcmp(again.data(), got.data(), no * width) != 0) same = false;
      got = again;
    }
    CUDA(cudaMemcpy(lse.data(), d_lse, lse.size() * 4, cudaMemcpyDeviceToHost));

    double num = 0, den = 0;
    for (int b = 0; b < s.batch; ++b) {
      const rdkv_cuda_sequence &sq = sequences[static_cast<size_t>(b)];
      const uint32_t n = lengths[static_cast<size_t>(b)];
      std::vector<uint16_t> now(tail_values);
      CUDA(cudaMemcpy(now.data(), sq.k, tail_values * 2, cudaMemcpyDeviceToHost));
      const uint16_t *base = static_cast<const uint16_t *>(sq.k);
      for (int h = 0; h < s.kv_heads; ++h) {
        std::vector<double> k, v;
        for (int i = 0; i < blocks; ++i)
          decode_block(host[static_cast<size_t>(b * blocks + i)].data(), 3 + l, h, k, v);
        for (uint32_t t = 0; t < n + s.append; ++t) {
          const uint16_t *kr = tails[static_cast<size_t>(b)].data() + (l + 3) * sq.k_layer +
                               h * sq.k_head + static_cast<int64_t>(t) * sq.k_token;
          const uint16_t *vr = tails[static_cast<size_t>(b)].data() +
                               (static_cast<uint16_t *>(sq.v) - base) + (l + 3) * sq.v_layer +
                               h * sq.v_head + static_cast<int64_t>(t) * sq.v_token;
          if (t == n) {
            const uint16_t *kn = now.data() + (kr - tails[static_cast<size_t>(b)].data());
            const uint16_t *vn = now.data() + (vr - tails[static_cast<size_t>(b)].data());
            kr = &k_new[static_cast<size_t>((b * s.kv_heads + h) * s.k_dim)];
            vr = &v_new[static_cast<size_t>((b * s.kv_heads + h) * s.v_dim)];
            if (memcmp(kn, kr, static_cast<size_t>(s.k_dim) * 2) != 0 ||
                memcmp(vn, vr, static_cast<size_t>(s.v_dim) * 2) != 0)
              appended = false;
          }
          for (int d = 0; d < s.k_dim; ++d) k.push_back(value16(kr[d], s.tail_dtype));
          for (int d = 0; d < s.v_dim; ++d) v.push_back(value16(vr[d], s.tail_dtype));
        }
        const size_t count = v.size() / static_cast<size_t>(s.v_dim);
        std::vector<double> logit(count), o(static_cast<size_t>(s.v_dim));
        for (int gq = 0; gq < s.group; ++gq) {
          const size_t head = static_cast<size_t>(b * q_heads + h * s.group + gq);
          double max = -INFINITY, sum = 0;
          for (size_t t = 0; t < count; ++t) {
            double x = 0;
            for (int d = 0; d < s.k_dim; ++d)
              x += q[head * static_cast<size_t>(s.k_dim) + static_cast<size_t>(d)] *
                   k[t * static_cast<size_t>(s.k_dim) + static_cast<size_t>(d)];
            logit[t] = x * static_cast<double>(cfg.softmax_scale);
            if (logit[t] > max) max = logit[t];
          }
          for (double &x : o) x = 0;
          for (size_t t = 0; t < count; ++t) {
            const double w = exp(logit[t] - max);
            sum += w;
            for (size_t d = 0; d < o.size(); ++d) o[d] += w * v[t * o.size() + d];
          }
          const double want_lse = count ? max + log(sum) : -INFINITY;
          const double have_lse = static_cast<double>(lse[head]);
          const double off =
              fabs(want_lse) > 100 ? fabs(want_lse) * 1e-5 : 0; /* fp32's own digits */
          if (count == 0 ? have_lse != want_lse : !(fabs(have_lse - want_lse) - off <= worst_lse))
            worst_lse = count == 0 || have_lse != have_lse ? 1e9 : fabs(have_lse - want_lse) - off;
          for (size_t d = 0; d < o.size(); ++d) {
            const double want = count ? o[d] / sum : 0;
            const size_t at = head * o.size() + d;
            double have;
            if (s.dtype == RDKV_F32) {
              float f;
              memcpy(&f, &got[4 * at], 4), have = static_cast<double>(f);
            } else {
              uint16_t x;
              memcpy(&x, &got[2 * at], 2), have = value16(x, s.dtype);
            }
            if (have != have) have = 1e30;
            num += (have - want) * (have - want), den += want * want;
          }
        }
      }
    }
    const double error = den > 0 ? sqrt(num / den) : sqrt(num);
    if (error > worst) worst = error;
  }
  double bound = s.dtype == RDKV_BF16 || s.tail_dtype == RDKV_BF16 ? 3e-3 : 1e-3, bound_lse = 1e-3;
  const bool ok = worst <= bound && worst_lse <= bound_lse && same && appended;
  if (!ok || !small_run)
    printf(
        "%-26s B%-3d H%d G%-2d D%d/%d seg %d tail %-5u w%d n%d t%d%s: error %.2e lse %.1e%s%s%s\n",
        s.name, s.batch, s.kv_heads, s.group, s.k_dim, s.v_dim, s.segments, s.tail, cfg.n_warps,
        cfg.n_blocks, cfg.teams, cfg.latency > 0 ? " L" : "", worst, worst_lse,
        same ? "" : " NOT REPRODUCIBLE", appended ? "" : " NOT APPENDED", ok ? "" : "   FAIL");
  if (!ok) ++failures;
  for (void *p : device) cudaFree(p);
  for (void *p : owned) cudaFree(p);
  cudaFree(d_sequences), cudaFree(d_lengths), cudaFree(d_q), cudaFree(d_k), cudaFree(d_v);
  cudaFree(d_out), cudaFree(d_lse), cudaFree(plan), cudaFree(workspace);
  cudaStreamDestroy(stream);
}

static shape plain_shape() {
  shape s;
  memset(&s, 0, sizeof s);
  s.name = "plain", s.batch = 1, s.kv_heads = 2, s.group = 4, s.k_dim = s.v_dim = 128;
  s.segments = 1, s.layers_per_block = 2, s.tokens = 300;
  s.dtype = RDKV_F16, s.tail_dtype = RDKV_F16;
  s.spread_q = s.spread_k = s.spread_v = 1;
  return s;
}

static void test_attend() {
  uint64_t seed = 1000;
  shape s = plain_shape();
  run_case(s, ++seed);
  const int dims[] = {64, 80, 96, 112, 128, 192, 256};
  const int groups[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 16};
  const rdkv_dtype types[] = {RDKV_F16, RDKV_BF16, RDKV_F32};
  if (small_run) {
    for (int d : {64, 128, 256})
      for (int g : {3, 8}) {
        s = plain_shape(), s.name = "small", s.k_dim = s.v_dim = d, s.group = g, s.batch = 2;
        s.tokens = 120, s.tail = 35, s.append = true, s.segments = 2,
        s.n_blocks = d == 128 ? 24 : 5;
        s.tail_dtype = g == 8 ? RDKV_BF16 : RDKV_F16;
        run_case(s, ++seed);
        s.n_blocks = 0, s.overlap = 1;
        run_case(s, ++seed);
        s.latency = 1, s.name = "latency, small";
        for (int i = 0; i < 2; ++i) {
          s.overlap = i, s.tail = i ? 0 : 35, s.append = !i;
          run_case(s, ++seed);
        }
      }
    return;
  }
  for (int d : dims)
    for (int g : groups)
      for (rdkv_dtype t : types) {
        s = plain_shape(), s.name = t == RDKV_F16 ? "f16" : t == RDKV_BF16 ? "bf16" : "f32";
        s.k_dim = s.v_dim = d, s.group = g, s.dtype = t;
        s.tail_dtype = t == RDKV_BF16 ? RDKV_BF16 : RDKV_F16;
        s.tail = 40, s.append = true, s.batch = 2;
        run_case(s, ++seed);
      }
  for (int k = 16; k <= 256; k += 16) {
    s = plain_shape(), s.name = "k_dim differs", s.k_dim = k, s.tail = 20;
    run_case(s, ++seed);
  }
  for (uint32_t n : {0u, 1u, 15u, 16u, 17u, 1000u})
    for (int append = 0; append < 2; ++append) {
      s = plain_shape(), s.name = append ? "tail, append" : "tail", s.tail = n, s.append = append;
      run_case(s, ++seed);
      s.name = "dense", s.segments = 0, s.batch = 3, s.special = append ? 4 : 0;
      run_case(s, ++seed);
    }
  for (int batch : {3, 17, 70}) {
    s = plain_shape(), s.name = "batch", s.batch = batch, s.tokens = 200, s.tail = 30,
    s.kv_heads = 3;
    run_case(s, ++seed);
    s.segments = 3, s.layers_per_block = 1, s.name = "segments", s.append = true;
    run_case(s, ++seed);
    s.n_blocks = 7, s.n_warps = 4, s.name = "few blocks";
    run_case(s, ++seed);
  }
  s = plain_shape(), s.name = "long", s.tokens = 9000, s.tail = 100;
  run_case(s, ++seed);
  s.n_warps = 16, s.overlap = 1, s.name = "long, 16 warps";
  run_case(s, ++seed);
  for (int g : {4, 8}) {
    s = plain_shape(), s.group = g, s.tail = 50;
    s.name = "one dominates", s.spread_q = 8, s.spread_k = 2;
    run_case(s, ++seed);
    s.name = "q = 0", s.special = 3, s.spread_q = 1, s.spread_k = 1;
    run_case(s, ++seed);
    s.name = "equal V rows", s.special = 2, s.segments = 0;
    run_case(s, ++seed);
    s.name = "K at 50", s.special = 0, s.offset_k = 50, s.spread_k = 0.1;
    run_case(s, ++seed);
    s.name = "small V", s.offset_k = 0, s.spread_k = 1, s.spread_v = 1e-3, s.segments = 1;
    run_case(s, ++seed);
    s.name = "large V", s.spread_v = 3000;
    run_case(s, ++seed);
  }
  s = plain_shape(), s.name = "logits of 1e4", s.spread_q = 100, s.spread_k = 100, s.tail = 50;
  run_case(s, ++seed);
}

/* The kernel made for latency. */
static void test_latency() {
  if (!has_latency) return;
  uint64_t seed = 5000;
  shape s;
  for (int warps : {1, 3, 8, 16})
    for (int blocks : {0, 4}) { /* 4: two parts a head */
      s = plain_shape(), s.latency = 1, s.name = "latency, warps", s.n_warps = warps, s.tail = 50;
      s.n_blocks = blocks;
      run_case(s, ++seed);
    }
  if (small_run) return;
  const rdkv_dtype types[] = {RDKV_F16, RDKV_BF16, RDKV_F32};
  for (int d : {64, 80, 96, 112, 128, 192, 256})
    for (int g : {1, 2, 3, 4, 5, 6, 7, 8, 12})
      for (int tail = 0; tail < 2; ++tail) {
        s = plain_shape(), s.latency = 1, s.name = tail ? "latency, tail" : "latency";
        s.k_dim = s.v_dim = d, s.group = g, s.dtype = types[seed % 3], s.batch = 2;
        if (tail) s.tail = 40, s.append = true, s.tail_dtype = types[g % 2];
        s.overlap = seed / 2 % 2;
        run_case(s, ++seed);
      }
  for (int k = 16; k <= 256; k += 16) {
    s = plain_shape(), s.latency = 1, s.name = "latency, k_dim differs", s.k_dim = k;
    run_case(s, ++seed);
  }
  for (uint32_t n : {0u, 1u, 2u, 4u, 40u, 1000u, 9000u, 30000u})
    for (int segments : {0, 1, 3}) {
      s = plain_shape(), s.latency = 1, s.name = "latency, tokens", s.tokens = n;
      s.segments = segments, s.layers_per_block = 1 + (segments == 1), s.batch = 3;
      if (n > 1000) s.batch = 1, s.kv_heads = 1;
      run_case(s, ++seed);
      s.group = 8, s.overlap = 1, s.tail = n > 1000 ? 700 : 17, s.append = n & 1;
      run_case(s, ++seed);
    }
  for (int g : {4, 8}) { /* more tiles for a warp than it has lanes */
    s = plain_shape(), s.latency = 1, s.group = g, s.name = "latency, long", s.tokens = 9000;
    s.n_warps = 2, s.n_blocks = 4;
    run_case(s, ++seed);
  }
  for (int g : {4, 8}) {
    s = plain_shape(), s.latency = 1, s.group = g, s.name = "latency, one dominates";
    s.spread_q = 8, s.spread_k = 2;
    run_case(s, ++seed);
    s.name = "latency, q = 0", s.special = 3, s.spread_q = 1, s.spread_k = 1;
    run_case(s, ++seed);
    s.name = "latency, V large", s.special = 0, s.spread_v = 3000;
    run_case(s, ++seed);
    s.name = "latency, V small", s.spread_v = 1e-3;
    run_case(s, ++seed);
    s.name = "latency, logits of 1e4", s.spread_v = 1, s.spread_q = s.spread_k = 100;
    run_case(s, ++seed);
  }
}

/* ---- a captured graph that is replayed while the tail grows ---------------------------------- */

static void test_graph(int latency) {
  const int steps = small_run ? 5 : 100;
  rdkv_cuda_config cfg;
  memset(&cfg, 0, sizeof cfg);
  cfg.batch = 2, cfg.n_q_heads = 8, cfg.n_kv_heads = 2, cfg.k_dim = 64, cfg.overlap = 1;
  cfg.dtype = RDKV_F16, cfg.tail_dtype = RDKV_F16, cfg.latency = latency;
  CUDA(rdkv_cuda_resolve(&cfg, &cfg));
  const head_counts counts[2] = {{{100, 70, 33, 5}, {20, 30, 10}}, {{10, 370, 3, 0}, {0, 64, 0}}};
  const std::vector<uint8_t> block = random_block(1, 0, 8, 2, 64, 64, counts, 1, 1, 5);
  const void *d_block = to_device(block.data(), block.size());
  const void **segments = to_device(&d_block, 1);
  const uint32_t capacity = 128;
  rdkv_cuda_sequence sequences[2];
  void *tails[2];
  for (int b = 0; b < 2; ++b) {
    memset(&sequences[b], 0, sizeof sequences[b]);
    CUDA(cudaMalloc(&tails[b], 2 * 2 * 64 * capacity * 2));
    CUDA(cudaMemset(tails[b], 0xff, 2 * 2 * 64 * capacity * 2));
    rdkv_cuda_tail(&cfg, tails[b], capacity, &sequences[b]);
    sequences[b].segments = segments, sequences[b].n_segments = 1;
  }
  rdkv_cuda_sequence *d_sequences = to_device(sequences, 2);
  uint32_t *lengths;
  CUDA(cudaMalloc(&lengths, 8)), CUDA(cudaMemset(lengths, 0, 8));
  random_source rng = {9};
  uint16_t h[16 * 64 * 3];
  for (uint16_t &x : h) x = half_bits(rng.normal());
  uint16_t *data = to_device(h, 16 * 64 * 3), *out;
  void *plan, *workspace;
  CUDA(cudaMalloc(&out, 2 * 16 * 64 * 2));
  CUDA(cudaMalloc(&plan, rdkv_cuda_plan_bytes(&cfg)));
  CUDA(cudaMalloc(&workspace, rdkv_cuda_workspace_bytes(&cfg)));
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  rdkv_cuda_io io;
  memset(&io, 0, sizeof io);
  io.q = data, io.k_new = data + 16 * 64, io.v_new = data + 32 * 64, io.tail_tokens = lengths;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CUDA(rdkv_cuda_plan(&cfg, d_sequences, lengths, plan, stream));
  for (int i = 0; i < 2; ++i) { /* twice: bitwise the same, overlapped or not */
    io.out = out + i * 16 * 64;
    rdkv_cuda_config launch = cfg;
    launch.overlap = i; /* not behind the plan itself, which it would read too early */
    CUDA(rdkv_cuda_attend(&launch, plan, 0, &io, workspace, stream));
  }
  CUDA(rdkv_cuda_advance(lengths, 2, stream));
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&exec, graph, 0));
  int different = 0, wrong = 0;
  for (int step = 0; step < steps; ++step) {
    CUDA(cudaMemset(out, 0xff, 2 * 16 * 64 * 2));
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaGraphLaunch(exec, stream));
    CUDA(cudaStreamSynchronize(stream));
    uint16_t got[2][16 * 64];
    CUDA(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    if (memcmp(got[0], got[1], sizeof got[0]) != 0) ++different;
    /* every new token is the same one: so the result is known from how often it is there */
    for (int b = 0; b < 2; ++b)
      for (int head = 0; head < 2; ++head) {
        std::vector<double> k, v;
        decode_block(block.data(), 0, head, k, v);
        const size_t n = k.size() / 64;
        for (int gq = 0; gq < 4; ++gq) {
          const size_t row = static_cast<size_t>((b * 8 + head * 4 + gq) * 64);
          double sum = 0, o[64] = {}, num = 0, den = 0;
          for (size_t t = 0; t <= n; ++t) {
            const size_t fresh = static_cast<size_t>((b * 2 + head) * 64);
            double x = 0;
            for (size_t d = 0; d < 64; ++d)
              x += half_value(h[row + d]) *
                   (t < n ? k[t * 64 + d] : half_value(h[16 * 64 + fresh + d]));
            const double w = exp(x / 8) * (t < n ? 1 : step + 1);
            sum += w;
            for (size_t d = 0; d < 64; ++d)
              o[d] += w * (t < n ? v[t * 64 + d] : half_value(h[32 * 64 + fresh + d]));
          }
          for (size_t d = 0; d < 64; ++d) {
            const double e = half_value(got[0][row + d]) - o[d] / sum;
            num += e * e, den += o[d] / sum * o[d] / sum;
          }
          if (!(sqrt(num / den) <= 2e-3)) ++wrong;
        }
      }
  }
  printf("graph: %d steps, %d differ between equal launches, %d rows wrong\n", steps, different,
         wrong);
  if (different || wrong) ++failures;
  /* the same graph at the same length, many times: bitwise the same */
  uint16_t first[16 * 64], now[16 * 64];
  int changed = 0;
  for (int i = 0; i < steps; ++i) {
    const uint32_t fixed[2] = {40, 41};
    CUDA(cudaMemcpy(lengths, fixed, 8, cudaMemcpyHostToDevice));
    CUDA(cudaGraphLaunch(exec, stream));
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpy(now, out, sizeof now, cudaMemcpyDeviceToHost));
    if (i == 0) memcpy(first, now, sizeof now);
    if (memcmp(first, now, sizeof now) != 0) ++changed;
  }
  printf("graph: %d of %d replays differ\n", changed, steps);
  if (changed) ++failures;
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  cudaFree(const_cast<void *>(d_block)), cudaFree(segments), cudaFree(tails[0]), cudaFree(tails[1]);
  cudaFree(d_sequences), cudaFree(lengths), cudaFree(data), cudaFree(out), cudaFree(plan);
  cudaFree(workspace);
}

/* A block on the device, a sequence of it alone and that sequence's tail, which is empty. */
struct lone_sequence {
  const void *block, **segments;
  rdkv_cuda_sequence *sequence;
  uint32_t *lengths;
  explicit lone_sequence(const std::vector<uint8_t> &bytes)
      : block(to_device(bytes.data(), bytes.size())), segments(to_device(&block, 1)) {
    rdkv_cuda_sequence s;
    memset(&s, 0, sizeof s);
    s.segments = segments, s.n_segments = 1;
    sequence = to_device(&s, 1);
    const uint32_t none = 0;
    lengths = to_device(&none, 1);
  }
  ~lone_sequence() {
    cudaFree(const_cast<void *>(block)), cudaFree(segments);
    cudaFree(sequence), cudaFree(lengths);
  }
  lone_sequence(const lone_sequence &) = delete;
  lone_sequence &operator=(const lone_sequence &) = delete;
};

/* ---- layers with unlike amounts of work in turn -----------------------------------------------
 */

/* Blocks that have work in one layer have none in the next, and launches take turns with what they
   leave to each other: whatever the order, the bits are those of a launch with a fresh plan.
   Queries change as well, so that what an earlier launch has left is no right answer. */
static void test_turns(int latency) {
  const int layers = 3, launches = small_run ? 12 : 120, queries = 3, heads = 2, q_heads = 8;
  const size_t values = static_cast<size_t>(q_heads) * 64;
  rdkv_cuda_config cfg;
  memset(&cfg, 0, sizeof cfg);
  cfg.n_layers = layers, cfg.batch = 1, cfg.n_q_heads = q_heads, cfg.n_kv_heads = heads;
  cfg.k_dim = 64, cfg.dtype = RDKV_F16, cfg.tail_dtype = RDKV_F16, cfg.latency = latency;
  CUDA(rdkv_cuda_resolve(&cfg, &cfg));
  const head_counts many = {{12000, 10000, 400, 0}, {10, 40, 0}}, one = {{1, 0, 0, 0}, {64, 0, 0}},
                    some = {{900, 500, 0, 0}, {32, 16, 16}};
  const head_counts counts[] = {many, some, one, one, some, many}; /* [layer][head] */
  const std::vector<uint8_t> block =
      random_block(layers, 0, q_heads, heads, 64, 64, counts, 1, 1, 5);
  const lone_sequence at(block);
  random_source rng = {11};
  std::vector<uint16_t> q(values * queries);
  for (uint16_t &x : q) x = half_bits(rng.normal());
  uint16_t *d_q = to_device(q.data(), q.size()), *out;
  void *plan, *workspace;
  CUDA(cudaMalloc(&out, values * 2 * static_cast<size_t>(launches)));
  CUDA(cudaMalloc(&plan, rdkv_cuda_plan_bytes(&cfg)));
  CUDA(cudaMalloc(&workspace, rdkv_cuda_workspace_bytes(&cfg)));
  CUDA(cudaMemset(plan, 0xff, rdkv_cuda_plan_bytes(&cfg)));
  CUDA(cudaMemset(workspace, 0xff, rdkv_cuda_workspace_bytes(&cfg)));
  rdkv_cuda_io io;
  memset(&io, 0, sizeof io);
  io.tail_tokens = at.lengths;
  const auto attend = [&](int layer, int query, int launch, int overlap) {
    rdkv_cuda_config c = cfg;
    c.overlap = overlap;
    io.q = d_q + values * static_cast<size_t>(query);
    io.out = out + values * static_cast<size_t>(launch);
    CUDA(rdkv_cuda_attend(&c, plan, layer, &io, workspace, nullptr));
  };
  std::vector<uint16_t> alone(values * layers * queries),
      got(values * static_cast<size_t>(launches));
  for (int i = 0; i < layers * queries; ++i) {
    CUDA(rdkv_cuda_plan(&cfg, at.sequence, at.lengths, plan, nullptr));
    attend(i / queries, i % queries, 0, 0);
    CUDA(cudaMemcpy(alone.data() + values * static_cast<size_t>(i), out, values * 2,
                    cudaMemcpyDeviceToHost));
  }
  int different = 0;
  for (int overlap = 0; overlap < 2; ++overlap) {
    std::vector<int> what;
    CUDA(cudaMemset(out, 0xff, got.size() * 2));
    CUDA(rdkv_cuda_plan(&cfg, at.sequence, at.lengths, plan, nullptr));
    CUDA(cudaDeviceSynchronize()); /* an overlapping launch would read the plan too early */
    for (int n = 0; n < launches; ++n) {
      /* first in turn, then at random */
      const int layer = n < launches / 2 ? n % layers : static_cast<int>(rng.below(layers));
      what.push_back(layer * queries + static_cast<int>(rng.below(queries)));
      attend(layer, what.back() % queries, n, overlap);
    }
    CUDA(cudaMemcpy(got.data(), out, got.size() * 2, cudaMemcpyDeviceToHost));
    for (int n = 0; n < launches; ++n)
      different += memcmp(got.data() + values * static_cast<size_t>(n),
                          alone.data() + values * static_cast<size_t>(what[static_cast<size_t>(n)]),
                          values * 2) != 0;
  }
  printf("turns%s: %d of %d launches differ from one alone\n", latency > 0 ? ", latency" : "",
         different, 2 * launches);
  if (different) ++failures;
  cudaFree(d_q), cudaFree(out), cudaFree(plan), cudaFree(workspace);
}

/* ---- many launches at once ------------------------------------------------------------------- */

/* Streams with a plan and a workspace each, a head's blocks more than the device holds beside the
   others': whatever order they start in, all must end, with the bits of a launch alone. Workspaces
   are poisoned in several ways. */
static void test_crowd(int latency, int heads) {
  const int streams = small_run ? 2 : 9, launches = small_run ? 3 : 40, queries = 4 * heads;
  const size_t values = static_cast<size_t>(queries) * 64;
  rdkv_cuda_config cfg;
  memset(&cfg, 0, sizeof cfg);
  cfg.batch = 1, cfg.n_q_heads = queries, cfg.n_kv_heads = heads, cfg.k_dim = 64;
  cfg.dtype = RDKV_F16, cfg.tail_dtype = RDKV_F16, cfg.latency = latency;
  CUDA(rdkv_cuda_resolve(&cfg, &cfg));
  const std::vector<head_counts> counts(static_cast<size_t>(heads),
                                        {{12000, 10000, 400, 0}, {10, 40, 0}});
  const std::vector<uint8_t> block =
      random_block(1, 0, queries, heads, 64, 64, counts.data(), 1, 1, 5);
  const lone_sequence at(block);
  random_source rng = {9};
  std::vector<uint16_t> q(values);
  for (uint16_t &x : q) x = half_bits(rng.normal());
  uint16_t *d_q = to_device(q.data(), values);
  std::vector<cudaStream_t> stream(static_cast<size_t>(streams));
  std::vector<void *> plan(stream.size()), workspace(stream.size());
  std::vector<uint16_t *> out(stream.size());
  const size_t results = values * static_cast<size_t>(launches);
  for (size_t i = 0; i < stream.size(); ++i) {
    const int poison = i % 3 == 0 ? 0xff : i % 3 == 1 ? 0 : 0x3c;
    CUDA(cudaStreamCreateWithFlags(&stream[i], cudaStreamNonBlocking));
    CUDA(cudaMalloc(&out[i], results * 2)), CUDA(cudaMemset(out[i], 0xff, results * 2));
    CUDA(cudaMalloc(&plan[i], rdkv_cuda_plan_bytes(&cfg)));
    CUDA(cudaMalloc(&workspace[i], rdkv_cuda_workspace_bytes(&cfg)));
    CUDA(cudaMemset(plan[i], poison, rdkv_cuda_plan_bytes(&cfg)));
    CUDA(cudaMemset(workspace[i], poison, rdkv_cuda_workspace_bytes(&cfg)));
  }
  CUDA(cudaDeviceSynchronize());
  rdkv_cuda_io io;
  memset(&io, 0, sizeof io);
  io.q = d_q, io.tail_tokens = at.lengths;
  for (size_t i = 0; i < stream.size(); ++i)
    CUDA(rdkv_cuda_plan(&cfg, at.sequence, at.lengths, plan[i], stream[i]));
  CUDA(cudaDeviceSynchronize());
  for (int n = 0; n < launches; ++n)
    for (size_t i = 0; i < stream.size(); ++i) {
      rdkv_cuda_config launch = cfg;
      launch.overlap = cfg.latency > 0 && i & 1;
      io.out = out[i] + values * static_cast<size_t>(n);
      CUDA(rdkv_cuda_attend(&launch, plan[i], 0, &io, workspace[i], stream[i]));
      if (n == 0 && i == 0) CUDA(cudaStreamSynchronize(stream[0])); /* alone */
    }
  CUDA(cudaDeviceSynchronize());
  std::vector<uint16_t> first, got(results);
  int different = 0;
  for (size_t i = 0; i < stream.size(); ++i) {
    CUDA(cudaMemcpy(got.data(), out[i], results * 2, cudaMemcpyDeviceToHost));
    if (i == 0) first.assign(got.begin(), got.begin() + static_cast<std::ptrdiff_t>(values));
    for (int n = 0; n < launches; ++n)
      different +=
          memcmp(got.data() + values * static_cast<size_t>(n), first.data(), values * 2) != 0;
    CUDA(cudaStreamDestroy(stream[i]));
    cudaFree(out[i]), cudaFree(plan[i]), cudaFree(workspace[i]);
  }
  printf("crowd%s, %d heads: %d streams, %d of %d launches differ\n",
         latency > 0 ? ", latency" : "", heads, streams, different, streams * launches);
  if (different) ++failures;
  cudaFree(d_q);
}

/* ---- shapes that are refused ----------------------------------------------------------------- */

static void test_refusals() {
  rdkv_cuda_config good, c, out;
  memset(&good, 0, sizeof good);
  good.batch = 1, good.n_q_heads = 8, good.n_kv_heads = 2, good.k_dim = 128;
  good.dtype = RDKV_F16, good.tail_dtype = RDKV_F16;
  int wrong = rdkv_cuda_resolve(&good, &out) != cudaSuccess;
  c = good, c.k_dim = 120, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.v_dim = 160, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.n_q_heads = 7, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.batch = 0, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.tail_dtype = RDKV_F32, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.n_warps = 8, c.teams = 3, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.softmax_scale = -1, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.latency = 2, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  wrong += rdkv_cuda_resolve(nullptr, &out) == cudaSuccess;
  /* which kernel: few heads, many, not wanted, not possible */
  wrong += rdkv_cuda_resolve(&good, &out) || (out.latency == 1) != has_latency;
  c = good, c.batch = 300, wrong += rdkv_cuda_resolve(&c, &out) || out.latency == 1;
  c.latency = 1, wrong += rdkv_cuda_resolve(&c, &out) == cudaSuccess;
  c = good, c.latency = -1, wrong += rdkv_cuda_resolve(&c, &out) || out.latency == 1;
  printf("refusals: %d wrong\n", wrong);
  if (wrong) ++failures;
}

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i)
    if (strcmp(argv[i], "small") == 0)
      small_run = true;
    else
      filters.push_back(argv[i]);
  int major = 0;
  CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  has_latency = major >= 9;
  if (wanted("blocks")) test_blocks();
  if (wanted("unpack")) test_unpack();
  if (wanted("refusals")) test_refusals();
  test_attend();
  test_latency();
  if (wanted("graph")) test_graph(-1);
  if (wanted("graph, latency") && has_latency) test_graph(1);
  if (wanted("turns")) test_turns(-1);
  if (wanted("turns, latency") && has_latency) test_turns(1);
  for (int heads : {1, 3}) {
    if (wanted("crowd")) test_crowd(-1, heads);
    if (wanted("crowd, latency") && has_latency) test_crowd(1, heads);
  }
  printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures ? 1 : 0;
}
