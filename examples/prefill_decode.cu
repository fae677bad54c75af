/* prefill_decode.cu - a whole decoder of Llama-3.1-8B's shape, full cache against compressed.
   nvcc -O3 -std=c++17 -arch=native examples/prefill_decode.cu -o prefill_decode -lcublas
   ./prefill_decode            tokens a second and memory, contexts 32K and 128K, batch 1 to 64
   ./prefill_decode --check    a small model's logits against a plain one on the CPU
   Prefill goes layer by layer: a layer's dense K and V are compressed, then overwritten by the next
   layer's. Decoding replays one CUDA graph a step: norms, GEMMs, RoPE, attention with append, LM
   head, argmax. The full cache runs the same loop, with the same attention kernel on dense fp16.
   Weights are random and so are the prompt's K and V: attention over the prompt is not computed.
   What RDKV needs stands between the two lines of ====; all else is the model's. */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 128 /* compiles faster */
#include "../rdkv_cuda.cuh"

#include <cublas_v2.h>

#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

#define CLI_PROGRAM "prefill_decode"
#include "cli.h"

enum { DIM = 128, WINDOW = 32 }; /* of a head; queries that score the prompt */

struct shape {
  size_t layers, hidden, q_heads, kv_heads, ffn, vocab;
};
static const shape LLAMA_8B = {32, 4096, 32, 8, 14336, 128256}, SMALL = {2, 1024, 8, 2, 2048, 4096};

/* ---- errors, memory, launches ---------------------------------------------------------------- */

static void check(cudaError_t e, const char *call, int line) {
  if (e) die("line %d: %s: %s", line, call, cudaGetErrorString(e));
}
static void check(cublasStatus_t s, const char *call, int line) {
  if (s) die("line %d: %s: %s", line, call, cublasGetStatusString(s));
}
static void check(rdkv_status s, const char *call, int line) {
  if (s) die("line %d: %s: %s", line, call, rdkv_status_string(s));
}
#define CHECK(call) check(call, #call, __LINE__)

static size_t lowest_free; /* since whoever wants to know a peak has set it */

static size_t free_memory() {
  size_t now, total;
  CHECK(cudaMemGetInfo(&now, &total));
  return now;
}

/* Device memory that is given back together. */
struct memory {
  std::vector<void *> all;
  memory() = default;
  memory(const memory &) = delete;
  ~memory() {
    for (void *p : all) CHECK(cudaFree(p));
  }
  template <typename T>
  T *get(size_t n) {
    void *p = nullptr;
    const cudaError_t e = cudaMalloc(&p, n * sizeof(T));
    if (e) die("%.1f MB of device memory: %s", n * sizeof(T) / 1e6, cudaGetErrorString(e));
    all.push_back(p);
    lowest_free = std::min(lowest_free, free_memory());
    return static_cast<T *>(p);
  }
};

static cudaStream_t stream;
static cublasHandle_t blas;
static bool always_cublas = false;
static int overlap; /* 1: the device knows programmatic dependent launch */

static void copy(void *to, const void *from, size_t bytes) { /* any direction */
  CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  CHECK(cudaStreamSynchronize(stream));
}

/* Launches a kernel that may begin while the one before it still runs: it calls after_previous
   before it touches what others write. */
template <typename... P, typename... A>
static void launch(void (*kernel)(P...), dim3 grid, size_t threads, size_t shared, A... args) {
  cudaLaunchConfig_t c = cudaLaunchConfig_t();
  cudaLaunchAttribute a;
  a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  a.val.programmaticStreamSerializationAllowed = 1;
  c.gridDim = grid, c.blockDim = dim3(threads), c.dynamicSmemBytes = shared, c.stream = stream;
  c.attrs = &a, c.numAttrs = overlap;
  CHECK(cudaLaunchKernelEx(&c, kernel, static_cast<P>(args)...));
}

static __device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

/* ---- random weights, and a prompt's K, V and last queries ------------------------------------ */

static __device__ uint32_t hash(uint32_t a, uint32_t b) {
  uint32_t x = a * 0x9e3779b9u ^ (b + 0x7f4a7c15u) * 0x85ebca6bu;
  x = (x ^ (x >> 16)) * 0x7feb352du, x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
static __device__ float noise(uint32_t a, uint32_t b) { /* near normal, variance 1 */
  const uint32_t x = hash(a, b), y = x * 0x2c1b3c6du ^ x >> 13;
  return ((x & 0xffff) + (x >> 16) + (y & 0xffff) + (y >> 16)) * 2.643e-5f - 3.4641f;
}

static __global__ void fill(__half *x, size_t n, float size, float mean, uint32_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += stride)
    x[i] = __float2half(mean + size * noise(i, seed + (i >> 32)));
}

/* Keys: an eighth of the channels is four times as large as the others; one token in 64 and the
   first four lie in a direction that the window's queries look in. */
static __device__ float direction(uint32_t head, uint32_t c, uint32_t seed) {
  return hash(head * DIM + c, seed + 1) & 1 ? 1.0f : -1.0f;
}
static __global__ void prompt_kv(__half *k, __half *v, size_t head_stride, uint32_t seed) {
  const uint32_t t = blockIdx.x, h = blockIdx.y, c = threadIdx.x, i = t * DIM + c;
  const bool heavy = t < 4 || hash(t, seed + 2 + h) % 64 == 0;
  const float size = hash(h * DIM + c, seed + 3) % 8 == 0 ? 2.0f : 0.5f;
  const size_t at = h * head_stride + i;
  k[at] = __float2half(size * noise(i, seed + 16 + h) + (heavy ? direction(h, c, seed) : 0.0f));
  v[at] = __float2half(noise(i, seed + 4096 + h) + (hash(h, c) % 16 == 0 ? 1.0f : 0.0f));
}
static __global__ void prompt_q(__half *q, uint32_t group, uint32_t seed) {
  const uint32_t h = blockIdx.y, c = threadIdx.x, i = (blockIdx.x * gridDim.y + h) * DIM + c;
  q[i] = __float2half(noise(i, seed + 5) + 0.5f * direction(h / group, c, seed));
}

/* What the prefill of a layer leaves: k, v [kv heads][capacity][DIM], q [WINDOW][q heads][DIM]. */
static void prefill_layer(const shape &s, size_t layer, size_t tokens, size_t capacity, __half *k,
                          __half *v, __half *q) {
  const uint32_t seed = 100000 + 10000 * layer;
  prompt_kv<<<dim3(tokens, s.kv_heads), DIM, 0, stream>>>(k, v, capacity * DIM, seed);
  if (q) prompt_q<<<dim3(WINDOW, s.q_heads), DIM, 0, stream>>>(q, s.q_heads / s.kv_heads, seed);
  CHECK(cudaGetLastError());
}

/* ==== what RDKV needs: compress each layer of the prompt, then attend ========================= */

/* A prompt's packed cache: a block a layer, `room` bytes apart. */
struct packed {
  uint8_t *blocks;
  size_t room, bytes; /* bytes: that the blocks really have */
};

static packed compress_prompt(const shape &s, size_t tokens, double keep, memory &kept) {
  rdkv_config c = rdkv_config(); /* of one layer: its block never exceeds its share of the bytes */
  c.n_q_heads = s.q_heads, c.n_kv_heads = s.kv_heads, c.k_dim = DIM, c.window = WINDOW;
  c.keep = keep;
  CHECK(rdkv_resolve(&c, &c));
  packed p = packed();
  p.room = (rdkv_block_bound(&c, tokens) + 127) / 128 * 128;
  p.blocks = kept.get<uint8_t>(p.room * s.layers);

  memory local; /* one layer's K and V, and scratch: goes on return */
  const size_t rows = s.kv_heads * tokens, channels = s.kv_heads * DIM;
  __half *k = local.get<__half>(rows * DIM), *v = local.get<__half>(rows * DIM);
  __half *q = local.get<__half>(WINDOW * s.q_heads * DIM);
  rdkv_layer l = rdkv_layer();
  l.n_tokens = tokens, l.token = local.get<float>(rows), l.mean_out = local.get<float>(channels);
  l.q_square = local.get<float>(channels), l.k_square = local.get<float>(channels);
  l.v_distortion = local.get<float>(5 * rows), l.k_distortion = local.get<float>(4 * channels);
  l.v_bits = local.get<uint8_t>(rows), l.k_bits = local.get<uint8_t>(channels);
  const size_t need = std::max(rdkv_cuda_layer_workspace(&c, 1, tokens),
                               rdkv_cuda_allocate_workspace(&c, 1, tokens));
  void *work = local.get<uint8_t>(need);
  double *lambda = local.get<double>(1);
  uint64_t *bytes = local.get<uint64_t>(s.layers);
  uint32_t *status = local.get<uint32_t>(1);
  CHECK(cudaMemsetAsync(status, 0, sizeof *status, stream));
  const ptrdiff_t head = tokens * DIM; /* [kv head][token][DIM] */
  const rdkv_kv kv = {{k, RDKV_F16, DIM, head, 1},
                      {v, RDKV_F16, DIM, head, 1},
                      rdkv_dense(q, RDKV_F16, s.q_heads, DIM)};
  for (size_t i = 0; i < s.layers; ++i) {
    prefill_layer(s, i, tokens, tokens, k, v, q); /* over the layer before */
    CHECK(rdkv_cuda_score(&c, &kv, nullptr, 0, nullptr, &l, 1, status, work, need, stream));
    CHECK(rdkv_cuda_measure(&c, &kv, &l, 1, status, work, need, stream));
    CHECK(rdkv_cuda_allocate(&c, &l, 1, lambda, status, work, need, stream));
    CHECK(rdkv_cuda_pack(&c, &kv, &l, 1, lambda, i, 0, p.blocks + i * p.room, p.room, bytes + i,
                         status, work, need, stream));
  }
  std::vector<uint64_t> sizes(s.layers);
  uint32_t outcome;
  copy(&outcome, status, sizeof outcome), copy(sizes.data(), bytes, s.layers * sizeof *bytes);
  CHECK(static_cast<rdkv_status>(outcome));
  for (uint64_t x : sizes) p.bytes += x;
  return p;
}

/* What attention reads while decoding: a batch of sequences, each with blocks and a tail. */
struct cache {
  rdkv_cuda_config cfg;
  uint32_t *tail_tokens; /* [batch] on the device */
  void *plan, *workspace;
  size_t prompt; /* tokens that are not in the tail */
};

/* blocks [batch][layers]. None: the full cache, whose prompt is the tail's first `dense` tokens. */
static cache make_cache(const shape &s, const std::vector<void *> &blocks, size_t batch,
                        size_t prompt, size_t dense, size_t capacity, memory &kept) {
  cache c = cache();
  c.prompt = prompt;
  c.cfg.n_layers = s.layers, c.cfg.batch = batch, c.cfg.k_dim = DIM;
  c.cfg.n_q_heads = s.q_heads, c.cfg.n_kv_heads = s.kv_heads;
  c.cfg.max_segments = blocks.empty() ? 1 : s.layers; /* a layer passes over the others' blocks */
  c.cfg.dtype = c.cfg.tail_dtype = RDKV_F16;
  c.cfg.overlap = !blocks.empty(); /* a dense cache is read faster without; no-op before sm_90 */
  CHECK(rdkv_cuda_resolve(&c.cfg, &c.cfg));
  void **segments = kept.get<void *>(blocks.size() + 1);
  copy(segments, blocks.data(), blocks.size() * sizeof(void *));
  std::vector<rdkv_cuda_sequence> list(batch);
  const size_t half_layer = s.kv_heads * capacity * DIM; /* a layer's K, or V */
  for (size_t b = 0; b < batch; ++b) {
    __half *tail = kept.get<__half>(s.layers * 2 * half_layer), *k = tail;
    rdkv_cuda_tail(&c.cfg, tail, capacity, &list[b]);
    if (!blocks.empty()) list[b].segments = segments + b * s.layers, list[b].n_segments = s.layers;
    for (size_t l = 0; dense && l < s.layers; ++l, k += 2 * half_layer)
      prefill_layer(s, l, dense, capacity, k, k + half_layer, nullptr);
  }
  rdkv_cuda_sequence *sequences = kept.get<rdkv_cuda_sequence>(batch);
  copy(sequences, list.data(), batch * sizeof list[0]);
  const std::vector<uint32_t> lengths(batch, dense);
  c.tail_tokens = kept.get<uint32_t>(batch);
  copy(c.tail_tokens, lengths.data(), batch * sizeof lengths[0]);
  c.plan = kept.get<uint8_t>(rdkv_cuda_plan_bytes(&c.cfg));
  c.workspace = kept.get<uint8_t>(rdkv_cuda_workspace_bytes(&c.cfg));
  CHECK(rdkv_cuda_plan(&c.cfg, sequences, c.tail_tokens, c.plan, stream));
  return c;
}

/* A layer's attention; q, k and v are the new token's, after RoPE. */
static void attend(const cache &c, size_t layer, const __half *q, const __half *k, const __half *v,
                   __half *out) {
  rdkv_cuda_io io = rdkv_cuda_io();
  io.q = q, io.k_new = k, io.v_new = v, io.out = out, io.tail_tokens = c.tail_tokens;
  CHECK(rdkv_cuda_attend(&c.cfg, c.plan, layer, &io, c.workspace, stream));
}

/* ==== the model =============================================================================== */

struct layer_weights { /* all [out][in] */
  const __half *norm1, *qkv, *o, *norm2, *gate_up, *down;
};
struct model {
  shape s;
  const __half *embedding, *norm, *head;
  std::vector<layer_weights> layers;
};

/* Calls f(matrix, rows, columns) for each matrix, a norm's weights being one row. */
template <typename F>
static void each_matrix(model &m, F f) {
  const shape &s = m.s;
  m.layers.resize(s.layers);
  f(m.embedding, s.vocab, s.hidden);
  for (layer_weights &l : m.layers) {
    f(l.norm1, 1, s.hidden), f(l.qkv, (s.q_heads + 2 * s.kv_heads) * DIM, s.hidden);
    f(l.o, s.hidden, s.q_heads * DIM), f(l.norm2, 1, s.hidden);
    f(l.gate_up, 2 * s.ffn, s.hidden), f(l.down, s.hidden, s.ffn);
  }
  f(m.norm, 1, s.hidden), f(m.head, s.vocab, s.hidden);
}

static size_t count_weights(model m) {
  size_t n = 0;
  each_matrix(m, [&](const __half *&, size_t rows, size_t columns) { n += rows * columns; });
  return n;
}

static model make_model(const shape &s, memory &kept) {
  model m = {s, nullptr, nullptr, nullptr, {}};
  __half *next = kept.get<__half>(count_weights(m));
  uint32_t seed = 1;
  each_matrix(m, [&](const __half *&w, size_t rows, size_t columns) {
    const float size = rows == 1 ? 0.1f : seed == 1 ? 1.0f : 1 / sqrtf(columns);
    fill<<<2048, 256, 0, stream>>>(next, rows * columns, size, rows == 1, seed++);
    CHECK(cudaGetLastError());
    w = next, next += rows * columns;
  });
  return m;
}

/* x[b] += y[b], or x[b] = the embedding of token[b]; h = RMSNorm of x. A block a sequence, four
   elements a thread. */
static __global__ void add_norm(float *x, const __half *y, const int *token, const __half *weight,
                                __half *h, size_t hidden) {
  __shared__ float part[32];
  after_previous();
  const size_t i = 4 * threadIdx.x, at = blockIdx.x * hidden + i;
  const __half2 *add =
      reinterpret_cast<const __half2 *>(token ? y + token[blockIdx.x] * hidden + i : y + at);
  float4 v = token ? make_float4(0, 0, 0, 0) : *reinterpret_cast<float4 *>(x + at);
  const float2 a0 = __half22float2(add[0]), a1 = __half22float2(add[1]);
  v.x += a0.x, v.y += a0.y, v.z += a1.x, v.w += a1.y;
  *reinterpret_cast<float4 *>(x + at) = v;
  float sum = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  const float r = rsqrtf(sum / hidden + 1e-5f);
  const __half2 *w = reinterpret_cast<const __half2 *>(weight + i);
  const float2 w0 = __half22float2(w[0]), w1 = __half22float2(w[1]);
  __half2 *out = reinterpret_cast<__half2 *>(h + at);
  out[0] = __floats2half2_rn(v.x * r * w0.x, v.y * r * w0.y);
  out[1] = __floats2half2_rn(v.z * r * w1.x, v.w * r * w1.y);
}

/* Where the new token's q, k and v go, and its position: prompt + tail_tokens[sequence]. */
struct rotary {
  const uint32_t *tail_tokens;
  uint32_t prompt, q_heads, kv_heads;
  __half *q, *k, *v;
};

/* Elements i and i + DIM / 2 of head h of sequence b, of q and k turned to their position. */
static __device__ void put_rotated(const rotary &r, uint32_t b, uint32_t h, uint32_t i, float x,
                                   float y) {
  const bool is_q = h < r.q_heads, is_v = h >= r.q_heads + r.kv_heads;
  const uint32_t kv_head = h - r.q_heads - (is_v ? r.kv_heads : 0);
  __half *out = (is_q ? r.q + (b * r.q_heads + h) * DIM
                      : (is_v ? r.v : r.k) + (b * r.kv_heads + kv_head) * DIM) +
                i;
  const float position = r.prompt + r.tail_tokens[b], base = -18.931569f; /* log2 of 1/500000 */
  const float turns = position * exp2f(base * i / (DIM / 2)) * 0.15915494f;
  float s = 0, c = 1;
  if (!is_v) sincospif(2 * (turns - floorf(turns)), &s, &c);
  out[0] = __float2half(x * c - y * s), out[DIM / 2] = __float2half(y * c + x * s);
}

/* qkv [batch][q heads + 2 kv heads][DIM]. A head of a sequence a block. */
static __global__ void rope(const __half *qkv, rotary r) {
  after_previous();
  const uint32_t h = blockIdx.x, b = blockIdx.y, i = threadIdx.x;
  const __half *in = qkv + (b * gridDim.x + h) * DIM + i;
  put_rotated(r, b, h, i, __half2float(in[0]), __half2float(in[DIM / 2]));
}

static __device__ float gated(float gate, float up) { return gate * up / (1 + __expf(-gate)); }

static __global__ void silu_times_up(const __half2 *gate_up, __half2 *out, uint32_t pairs) {
  after_previous();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
  if (i >= pairs) return;
  const float2 g = __half22float2(gate_up[2 * b * pairs + i]);
  const float2 u = __half22float2(gate_up[(2 * b + 1) * pairs + i]);
  out[b * pairs + i] = __floats2half2_rn(gated(g.x, u.x), gated(g.y, u.y));
}

/* The next token: index of the largest logit, the lowest of equal ones. A block a sequence. */
static __global__ void argmax(const __half *logits, uint32_t vocab, int *token) {
  __shared__ unsigned long long best;
  if (threadIdx.x == 0) best = 0;
  after_previous();
  const __half2 *row = reinterpret_cast<const __half2 *>(logits + size_t(blockIdx.x) * vocab);
  float top = -INFINITY;
  uint32_t at = 0;
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < vocab / 2; i += blockDim.x) {
    const float2 x = __half22float2(row[i]);
    if (x.x > top) top = x.x, at = 2 * i;
    if (x.y > top) top = x.y, at = 2 * i + 1;
  }
  uint32_t order = __float_as_uint(top); /* made to compare as the floats do */
  order = order >> 31 ? ~order : order | 0x80000000u;
  __syncthreads();
  atomicMax(&best, static_cast<unsigned long long>(order) << 32 | ~at);
  __syncthreads();
  if (threadIdx.x == 0) token[blockIdx.x] = ~static_cast<uint32_t>(best);
}

/* y [batch][rows] = x [batch][k] times w [rows][k], for a batch of at most 8: what counts is to
   read w at the memory's speed. A block has 16 rows, eight pairs of two that are `pair` apart, and
   a warp of it a part of k. Each lane copies to shared memory what it will multiply itself, AHEAD
   steps ahead; the first of them before the kernel in front has ended. Of 32 neighbours in k the
   eight that lie together go to one lane, in w and x alike: a sum does not mind the order. */
enum { GEMV_WARPS = 16, AHEAD = 4, GEMV_SHARED = AHEAD * 2 * 32 * GEMV_WARPS * 16 };

static __device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1,
                                                uint32_t a2, uint32_t a3, uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The rest of the 128 bytes, which the next step wants, comes to the L2 with it. */
static __device__ __forceinline__ void copy_16(uint4 *to, const __half *from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

/* What comes of a pair of rows: both, a gate times an up, or two elements of a head for RoPE. */
enum pairs { BOTH, GATED, ROTATED };

template <pairs P>
static __global__ void __launch_bounds__(32 * GEMV_WARPS)
    gemv(const __half *w, const __half *x, __half *y, uint32_t rows, uint32_t pair, uint32_t k,
         uint32_t batch, rotary r) {
  extern __shared__ uint4 ring[]; /* [AHEAD][2][thread] */
  __shared__ float sums[GEMV_WARPS][16][8];
  const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t steps = k / (32 * GEMV_WARPS), first = 32 * steps * warp + 8 * t;
  const uint32_t row0 = 8 * blockIdx.x / pair * pair + 8 * blockIdx.x; /* the first of its rows */
  const __half *high = w + size_t(row0 + g) * k + first, *low = high + size_t(pair) * k;
  auto slot = [&](uint32_t step, uint32_t half) {
    return ring + (step % AHEAD * 2 + half) * 32 * GEMV_WARPS + threadIdx.x;
  };
  auto fetch = [&](uint32_t step) {
    if (step < steps)
      copy_16(slot(step, 0), high + 32 * step), copy_16(slot(step, 1), low + 32 * step);
    asm volatile("cp.async.commit_group;" ::: "memory"); /* of nothing too: the count goes on */
  };
  for (uint32_t i = 0; i < AHEAD; ++i) fetch(i);
  after_previous();
  x += size_t(min(g, batch - 1)) * k + first;
  float c[4] = {0, 0, 0, 0};
  uint4 next = *reinterpret_cast<const uint4 *>(x); /* of x, a step ahead */
#pragma unroll 4
  for (uint32_t i = 0; i < steps; ++i) {
    const uint4 b = next;
    next = *reinterpret_cast<const uint4 *>(x + 32 * min(i + 1, steps - 1));
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
    const uint4 p = *slot(i, 0), q = *slot(i, 1);
    multiply(c, p.x, q.x, p.y, q.y, b.x, b.y);
    multiply(c, p.z, q.z, p.w, q.w, b.z, b.w);
    fetch(i + AHEAD);
  }
  for (int i = 0; i < 4; ++i) sums[warp][g + 8 * (i / 2)][2 * t + i % 2] = c[i];
  __syncthreads();
  const uint32_t i = threadIdx.x % 8, row = row0 + i, column = threadIdx.x / 8;
  if (column >= batch) return;
  float a = 0, b = 0;
  for (int j = 0; j < GEMV_WARPS; ++j) a += sums[j][i][column], b += sums[j][i + 8][column];
  if (P == ROTATED)
    put_rotated(r, column, row / DIM, row % DIM, a, b);
  else if (P == GATED)
    y[size_t(column) * pair + row] = __float2half(gated(a, b));
  else
    y[size_t(column) * rows + row] = __float2half(a),
                              y[size_t(column) * rows + row + pair] = __float2half(b);
}

template <pairs P>
static void multiply_by(const __half *w, const __half *x, __half *y, size_t rows, size_t pair,
                        size_t k, size_t batch, const rotary &r) {
  launch(gemv<P>, dim3(rows / 16), 32 * GEMV_WARPS, GEMV_SHARED, w, x, y, rows, pair, k, batch, r);
}

static bool by_gemv(size_t batch) { return batch <= 8 && !always_cublas; }

static void gemm(const __half *w, const __half *x, __half *y, size_t rows, size_t k, size_t batch) {
  const float one = 1, zero = 0;
  if (by_gemv(batch))
    multiply_by<BOTH>(w, x, y, rows, 8, k, batch, rotary());
  else
    CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, rows, batch, k, &one, w, CUDA_R_16F, k, x,
                       CUDA_R_16F, k, &zero, y, CUDA_R_16F, rows, CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT));
}

struct activations {
  float *x;
  __half *h, *qkv, *q, *k, *v, *out, *y, *gate_up, *gate, *logits;
  int *token;
};

static activations make_activations(const shape &s, size_t batch, memory &kept) {
  const size_t q = s.q_heads * DIM, kv = s.kv_heads * DIM;
  auto halves = [&](size_t n) { return kept.get<__half>(batch * n); };
  activations a;
  a.x = kept.get<float>(batch * s.hidden), a.h = halves(s.hidden), a.gate = halves(s.ffn);
  a.qkv = halves(q + 2 * kv), a.q = halves(q), a.k = halves(kv), a.v = halves(kv);
  a.out = halves(q), a.y = halves(s.hidden), a.gate_up = halves(2 * s.ffn);
  a.logits = halves(s.vocab), a.token = kept.get<int>(batch);
  std::vector<int> first(batch);
  for (size_t b = 0; b < batch; ++b) first[b] = (7 + 1013 * b) % s.vocab;
  copy(a.token, first.data(), batch * sizeof(int));
  return a;
}

/* One token for each sequence: all that the graph has. */
static void step(const model &m, const cache &c, const activations &a) {
  const shape &s = m.s;
  const size_t batch = c.cfg.batch, heads = s.q_heads + 2 * s.kv_heads;
  const bool few = by_gemv(batch); /* then the GEMMs do what comes right after them too */
  const rotary r = {c.tail_tokens,
                    static_cast<uint32_t>(c.prompt),
                    static_cast<uint32_t>(s.q_heads),
                    static_cast<uint32_t>(s.kv_heads),
                    a.q,
                    a.k,
                    a.v};
  auto add_and_norm = [&](const __half *y, const int *token, const __half *weight) {
    launch(add_norm, dim3(batch), s.hidden / 4, 0, a.x, y, token, weight, a.h, s.hidden);
  };
  add_and_norm(m.embedding, a.token, m.layers[0].norm1);
  for (size_t i = 0; i < s.layers; ++i) {
    const layer_weights &l = m.layers[i];
    if (few) {
      multiply_by<ROTATED>(l.qkv, a.h, nullptr, heads * DIM, DIM / 2, s.hidden, batch, r);
    } else {
      gemm(l.qkv, a.h, a.qkv, heads * DIM, s.hidden, batch);
      launch(rope, dim3(heads, batch), DIM / 2, 0, a.qkv, r);
    }
    attend(c, i, a.q, a.k, a.v, a.out);
    gemm(l.o, a.out, a.y, s.hidden, s.q_heads * DIM, batch);
    add_and_norm(a.y, nullptr, l.norm2);
    if (few) {
      multiply_by<GATED>(l.gate_up, a.h, a.gate, 2 * s.ffn, s.ffn, s.hidden, batch, r);
    } else {
      gemm(l.gate_up, a.h, a.gate_up, 2 * s.ffn, s.hidden, batch);
      launch(silu_times_up, dim3((s.ffn / 2 + 255) / 256, batch), 256, 0,
             reinterpret_cast<const __half2 *>(a.gate_up), reinterpret_cast<__half2 *>(a.gate),
             s.ffn / 2);
    }
    gemm(l.down, a.gate, a.y, s.hidden, s.ffn, batch);
    add_and_norm(a.y, nullptr, i + 1 < s.layers ? m.layers[i + 1].norm1 : m.norm);
  }
  gemm(m.head, a.h, a.logits, s.vocab, s.hidden, batch);
  launch(argmax, dim3(batch), 1024, 0, a.logits, s.vocab, a.token);
  CHECK(rdkv_cuda_advance(c.tail_tokens, batch, stream));
}

static cudaGraphExec_t capture_step(const model &m, const cache &c, const activations &a) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  step(m, c, a);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CHECK(cudaGraphDestroy(graph));
  return exec;
}

/* ---- a run: prefill, then decode ------------------------------------------------------------- */

struct result {
  double ms;                        /* a step */
  size_t packed, prefill, kv, peak; /* bytes: blocks of one prompt; peak while it is compressed;
                                       cache while decoding; peak of all */
};

/* The cache of a batch: packed if keep > 0, else dense. */
static cache prepare(const shape &s, size_t context, size_t batch, double keep, size_t steps,
                     memory &kept, result *r) {
  const size_t before = lowest_free = free_memory();
  std::vector<void *> blocks;
  if (keep > 0) {
    const packed p = compress_prompt(s, context, keep, kept);
    r->packed = p.bytes, r->prefill = before - lowest_free;
    for (size_t b = 0; b < batch; ++b) { /* all the same prompt, but none shares another's memory */
      uint8_t *own = b ? kept.get<uint8_t>(p.room * s.layers) : p.blocks;
      if (b) copy(own, p.blocks, p.room * s.layers);
      for (size_t l = 0; l < s.layers; ++l) blocks.push_back(own + l * p.room);
    }
  }
  const size_t dense = keep > 0 ? 0 : context;
  const cache c = make_cache(s, blocks, batch, context - dense, dense, dense + steps, kept);
  r->kv = before - free_memory();
  return c;
}

static result run(const model &m, size_t context, size_t batch, double keep, int steps) {
  enum { WARM = 3 };
  memory kept;
  result r = result();
  const size_t before = free_memory();
  const cache c = prepare(m.s, context, batch, keep, steps + WARM, kept, &r);
  const activations a = make_activations(m.s, batch, kept);
  const cudaGraphExec_t graph = capture_step(m, c, a);
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin)), CHECK(cudaEventCreate(&end));
  for (int i = 0; i < WARM + steps; ++i) {
    if (i == WARM) CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(graph, stream));
  }
  CHECK(cudaEventRecord(end, stream));
  CHECK(cudaStreamSynchronize(stream));
  float ms;
  CHECK(cudaEventElapsedTime(&ms, begin, end));
  r.ms = ms / steps, r.peak = before - std::min(lowest_free, free_memory());
  CHECK(cudaEventDestroy(begin)), CHECK(cudaEventDestroy(end));
  CHECK(cudaGraphExecDestroy(graph));
  return r;
}

/* ---- --check: the same model in plain C++ ---------------------------------------------------- */

typedef std::vector<double> vec;

static vec download(const __half *p, size_t n) {
  std::vector<__half> h(n);
  copy(h.data(), p, n * sizeof(__half));
  vec f(n);
  for (size_t i = 0; i < n; ++i) f[i] = __half2float(h[i]);
  return f;
}

struct plain {
  const model *m;
  vec w;                 /* all weights */
  std::vector<vec> k, v; /* [layer][kv head], of each [token][DIM] */
  const double *at(const __half *p) const { return w.data() + (p - m->embedding); }
};

static vec product(const double *w, const vec &x, size_t rows) {
  vec y(rows);
  for (double &sum : y)
    for (double e : x) sum += e * *w++;
  return y;
}

static vec normed(const vec &x, const double *w) {
  double sum = 0;
  for (double e : x) sum += e * e;
  vec y(x);
  for (double &e : y) e *= *w++ / sqrt(sum / x.size() + 1e-5);
  return y;
}

static void add(vec &x, const vec &y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

/* The logits after one more token. */
static vec plain_step(plain &p, int token) {
  const shape &s = p.m->s;
  const size_t position = p.k[0].size() / DIM, group = s.q_heads / s.kv_heads;
  const double *e = p.at(p.m->embedding) + token * s.hidden;
  vec x(e, e + s.hidden);
  for (size_t i = 0; i < s.layers; ++i) {
    const layer_weights &l = p.m->layers[i];
    vec qkv = product(p.at(l.qkv), normed(x, p.at(l.norm1)), (s.q_heads + 2 * s.kv_heads) * DIM);
    for (size_t j = 0; j < (s.q_heads + s.kv_heads) * DIM; ++j) {
      if (j % DIM >= DIM / 2) continue;
      const double angle = position * pow(500000, -2.0 * (j % DIM) / DIM), a = qkv[j];
      const double b = qkv[j + DIM / 2];
      qkv[j] = a * cos(angle) - b * sin(angle), qkv[j + DIM / 2] = b * cos(angle) + a * sin(angle);
    }
    vec out;
    for (size_t h = 0; h < s.q_heads; ++h) {
      vec &k = p.k[i * s.kv_heads + h / group], &v = p.v[i * s.kv_heads + h / group];
      const double *q = &qkv[h * DIM], *k_new = &qkv[(s.q_heads + h / group) * DIM];
      const double *v_new = k_new + s.kv_heads * DIM;
      if (h % group == 0)
        k.insert(k.end(), k_new, k_new + DIM), v.insert(v.end(), v_new, v_new + DIM);
      vec o(DIM);
      double sum = 0;
      for (size_t t = 0; t <= position; ++t) {
        double logit = 0;
        for (size_t c = 0; c < DIM; ++c) logit += q[c] * k[t * DIM + c];
        const double weight = exp(logit / sqrt(1.0 * DIM));
        sum += weight;
        for (size_t c = 0; c < DIM; ++c) o[c] += weight * v[t * DIM + c];
      }
      for (double c : o) out.push_back(c / sum);
    }
    add(x, product(p.at(l.o), out, s.hidden));
    vec g = product(p.at(l.gate_up), normed(x, p.at(l.norm2)), 2 * s.ffn);
    for (size_t j = 0; j < s.ffn; ++j) g[j] *= g[j + s.ffn] / (1 + exp(-g[j]));
    g.resize(s.ffn);
    add(x, product(p.at(l.down), g, s.hidden));
  }
  return product(p.at(p.m->head), normed(x, p.at(p.m->norm)), s.vocab);
}

/* Largest relative L2 distance of a step's logits from the plain model's, which is given the tokens
   that the GPU chose. */
static double check_run(const model &m, plain p, size_t context, double keep) {
  enum { STEPS = 4, BATCH = 2 };
  memory kept;
  result r;
  const cache c = prepare(m.s, context, BATCH, keep, STEPS, kept, &r);
  const activations a = make_activations(m.s, BATCH, kept);
  const cudaGraphExec_t graph = capture_step(m, c, a);
  std::vector<plain> sequence(BATCH, p);
  double worst = 0;
  for (int i = 0; i < STEPS; ++i) {
    int token[BATCH];
    copy(token, a.token, sizeof token);
    CHECK(cudaGraphLaunch(graph, stream));
    const vec have = download(a.logits, BATCH * m.s.vocab);
    for (size_t b = 0; b < BATCH; ++b) {
      const vec want = plain_step(sequence[b], token[b]);
      double d = 0, n = 0;
      for (size_t j = 0; j < m.s.vocab; ++j)
        d += pow(have[b * m.s.vocab + j] - want[j], 2), n += want[j] * want[j];
      if (!(sqrt(d / n) <= worst)) worst = sqrt(d / n);
    }
  }
  CHECK(cudaGraphExecDestroy(graph));
  return worst;
}

static int check_all() {
  const size_t context = 1000;
  const double keep[] = {0, 0.5, 0.08}, bound[] = {5e-3, 3e-2, 1};
  memory kept;
  const model m = make_model(SMALL, kept);
  plain p = {&m, download(m.embedding, count_weights(m)), {}, {}};
  const size_t head = context * DIM;
  __half *k = kept.get<__half>(SMALL.kv_heads * head), *v = kept.get<__half>(SMALL.kv_heads * head);
  for (size_t l = 0; l < SMALL.layers; ++l) {
    prefill_layer(SMALL, l, context, context, k, v, nullptr);
    for (size_t h = 0; h < SMALL.kv_heads; ++h)
      p.k.push_back(download(k + h * head, head)), p.v.push_back(download(v + h * head, head));
  }
  double d[3];
  bool good = true;
  for (int i = 0; i < 3; ++i)
    for (int by_cublas = 0; by_cublas < 2; ++by_cublas) {
      always_cublas = by_cublas, d[i] = check_run(m, p, context, keep[i]);
      printf("keep %3.0f %%, GEMMs by %-6s logits off by %.1e, at most %.0e: %s\n",
             keep[i] > 0 ? 100 * keep[i] : 100.0, by_cublas ? "cuBLAS" : "gemv", d[i], bound[i],
             d[i] <= bound[i] ? "ok" : "FAILED");
      good = good && d[i] <= bound[i];
    }
  if (!(d[2] > 2 * d[1])) /* a test that sees nothing would pass the others */
    puts("less kept, yet not worse: FAILED"), good = false;
  return good ? 0 : 1;
}

/* ---- main ------------------------------------------------------------------------------------ */

static std::vector<int> numbers(std::string text, int low, int high) {
  std::vector<int> list;
  for (size_t comma = 0; comma != std::string::npos; text.erase(0, comma + 1)) {
    comma = text.find(',');
    list.push_back(number(text.substr(0, comma).c_str(), low, high));
  }
  return list;
}

/* Runs if there is memory, and prints the table's fields. */
static result attempt(const model &m, size_t context, int batch, double keep, int steps) {
  const double token = 4.0 * m.s.layers * m.s.kv_heads * DIM; /* bytes in the full cache */
  const double need = batch * token * ((keep > 0 ? keep : 1) * context + steps + 4) +
                      token * context / m.s.layers + 1e9; /* one layer, and all else */
  const result r = need < free_memory() ? run(m, context, batch, keep, steps) : result();
  if (r.ms > 0)
    printf(" %8.1f %8.3f %7.2f %8.2f |", batch * 1e3 / r.ms, r.ms, r.kv / 1e9, r.peak / 1e9);
  else
    printf(" %34s |", "does not fit");
  return r;
}

static void table(const model &m, size_t context, const std::vector<int> &batches, double keep,
                  int steps) {
  printf("\n%zu tokens\nbatch | %8s %8s %7s %8s | %8s %8s %7s %8s | ratio\n", context, "full t/s",
         "ms/step", "KV GB", "peak GB", "RDKV t/s", "ms/step", "KV GB", "peak GB");
  result first = result();
  for (int batch : batches) {
    fprintf(stderr, "%zu tokens, batch %d ...\r", context, batch);
    printf("%5d |", batch);
    const result full = attempt(m, context, batch, 0, steps);
    const result small = attempt(m, context, batch, keep, steps);
    if (full.ms > 0 && small.ms > 0) printf(" %.2f", full.ms / small.ms);
    puts(""), fflush(stdout);
    if (first.prefill == 0) first = small;
  }
  const double all = 4.0 * m.s.layers * m.s.kv_heads * DIM * context, layer = all / m.s.layers;
  printf(
      "One prompt, layer by layer: packed %.1f MB, %.2f %% of the full cache's %.1f MB. Peak %.1f "
      "MB:\n%.1f MB one layer's dense K and V, the rest %.2f %% of the full cache, scratch "
      "included.\n",
      first.packed / 1e6, 100 * first.packed / all, all / 1e6, first.prefill / 1e6, layer / 1e6,
      100 * (first.prefill - layer) / all);
}

static void usage() {
  puts(
      "usage: prefill_decode [options]\n"
      "  --context N,...  tokens of the prompt, default 32768,131072\n"
      "  --batch N,...    sequences, default 1,4,8,64\n"
      "  --keep PERCENT   of the full cache's bytes, default 2.48 (the paper's)\n"
      "  --steps N        tokens to decode and time, default 32\n"
      "  --cublas         all GEMMs by cuBLAS; else a kernel here does those of a batch up to 8\n"
      "  --check          compare a small model's logits with a plain one on the CPU");
  exit(0);
}

int main(int argc, char **argv) {
  std::vector<int> contexts = {32768, 131072}, batches = {1, 4, 8, 64};
  double keep = 2.48;
  int steps = 32;
  bool checks = false;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") usage();
    if (name == "--check" || name == "--cublas") {
      (name == "--check" ? checks : always_cublas) = true;
      continue;
    }
    if (++i == argc) die("%s: unknown, or without its value; see --help", name.c_str());
    if (name == "--context")
      contexts = numbers(argv[i], 1024, 1 << 22);
    else if (name == "--batch")
      batches = numbers(argv[i], 1, 4096);
    else if (name == "--steps")
      steps = number(argv[i], 1, 100000);
    else if (name == "--keep")
      keep = atof(argv[i]);
    else
      die("unknown option %s; see --help", name.c_str());
  }
  if (!(keep > 0 && keep <= 100)) die("--keep is a percentage");
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  overlap = device.major >= 9;
  for (auto k : {gemv<BOTH>, gemv<GATED>, gemv<ROTATED>})
    CHECK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, GEMV_SHARED));
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  memory kept;
  CHECK(cublasCreate(&blas));
  CHECK(cublasSetStream(blas, stream));
  CHECK(cublasSetWorkspace(blas, kept.get<uint8_t>(64 << 20), 64 << 20));
  if (checks) return check_all();
  const model m = make_model(LLAMA_8B, kept);
  printf(
      "%s. Llama-3.1-8B's shape, fp16, random weights (%.2f GB), a prompt of random K and V. Full\n"
      "cache: dense fp16. RDKV: %.4g %% of its bytes. A batch is copies of one prompt, each in "
      "memory\n"
      "of its own. %d steps of one CUDA graph. Peak: of prefill and decoding, without weights.\n",
      device.name, 2e-9 * count_weights(m), keep, steps);
  for (int context : contexts) table(m, context, batches, keep / 100, steps);
  return 0;
}
