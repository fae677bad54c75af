/* A long answer on the GPU: what a step's attention takes from the first generated token to the
   last, with blocks compressed inside the graph, and without.
   nvcc -O3 -std=c++17 -arch=native bench/bench_sequence.cu -o bench_sequence && ./bench_sequence
   [--batch n] [--layers n] [--tokens n] [--block n] [--recent n] [--keep x] [--bytes] [--fan n]
   [--rows n] [--lanes n] [--warps n] [--every n] [--dense] [--together]
   Shape: Llama 3.1 8B (32 query heads, 8 kv heads, dims 128), a prompt of 128K tokens packed at a
   budget of 1024 (random codes, the widths of bench_cuda.cu). A graph holds 32 steps, each of
   attention, append and kept queries of all layers; every n-th step then tests for complete blocks
   and makes segments of them. Every step and its attention are timed on the device. Sequences
   complete their blocks one after the other, a block's steps shared out evenly, or all at once
   (--together). */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 128 /* compiles faster */
#include "../rdkv_cuda.cuh"

#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <vector>
#include "../tests/cuda/random_block.h"

static void check(cudaError_t e, int line) {
  if (e == cudaSuccess) return;
  fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(e));
  exit(2);
}
#define CHECK(call) check(call, __LINE__)

enum { STEPS = 32, Q_HEADS = 32, KV_HEADS = 8, DIM = 128 };

/* About normal, by channel of another size. */
static __global__ void fill_kernel(__half *data, size_t n, uint32_t seed, float size) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    float sum = 0;
    for (int k = 0; k < 4; ++k) {
      x ^= x >> 15, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u, x ^= x >> 16;
      sum += static_cast<float>(x & 0xffff) * (1.0f / 65536) - 0.5f;
    }
    const float channel = 0.5f + static_cast<float>(i % 7) * 0.25f;
    data[i] = __float2half(sum * 1.7f * channel * size);
  }
}

/* Notes the time, in ns: two stamps a step, when its attention and when all of it is done. */
static __global__ void stamp_kernel(unsigned long long *stamps, uint32_t *n) {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  stamps[(*n)++] = now;
}

static size_t total_memory = 0;
template <typename T>
static T *room(size_t n) {
  void *p;
  CHECK(cudaMalloc(&p, n * sizeof(T)));
  total_memory += n * sizeof(T);
  return static_cast<T *>(p);
}

/* Header of the last segment of the batch's first sequence. */
static rdkv_header last_header(const rdkv_cuda_sequence *sequences) {
  rdkv_cuda_sequence s;
  rdkv_header h;
  const void *at;
  CHECK(cudaMemcpy(&s, sequences, sizeof s, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(&at, s.segments + s.n_segments - 1, sizeof at, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(&h, at, sizeof h, cudaMemcpyDeviceToHost));
  return h;
}

static double mean(const std::vector<double> &x) {
  double sum = 0;
  for (const double y : x) sum += y;
  return sum / static_cast<double>(x.size());
}
static double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<ptrdiff_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

int main(int argc, char **argv) {
  int batch = 64, layers = 8, tokens = 4096, block = 128, recent = 0, dense = 0, fan = 4;
  int rows = 0, warps = 0, lanes = 8, every = 16;
  double keep = 0.03;
  bool by_bytes = false, together = false;
  for (int i = 1; i < argc; ++i) {
    const char *value = i + 1 < argc ? argv[i + 1] : "0";
    if (!strcmp(argv[i], "--dense")) {
      dense = 1;
      continue;
    }
    if (!strcmp(argv[i], "--bytes")) {
      by_bytes = true;
      continue;
    }
    if (!strcmp(argv[i], "--together")) {
      together = true;
      continue;
    }
    if (!strcmp(argv[i], "--batch")) batch = atoi(value);
    if (!strcmp(argv[i], "--layers")) layers = atoi(value);
    if (!strcmp(argv[i], "--tokens")) tokens = atoi(value);
    if (!strcmp(argv[i], "--block")) block = atoi(value);
    if (!strcmp(argv[i], "--recent")) recent = atoi(value);
    if (!strcmp(argv[i], "--keep")) keep = atof(value);
    if (!strcmp(argv[i], "--fan")) fan = atoi(value);
    if (!strcmp(argv[i], "--rows")) rows = atoi(value);
    if (!strcmp(argv[i], "--lanes")) lanes = atoi(value);
    if (!strcmp(argv[i], "--warps")) warps = atoi(value);
    if (!strcmp(argv[i], "--every")) every = atoi(value);
    ++i;
  }
  const size_t n = static_cast<size_t>(batch);
  const uint32_t capacity =
      dense ? static_cast<uint32_t>(tokens)
            : static_cast<uint32_t>(block + std::max(block, recent) + every - 1);
  rdkv_cuda_config cfg;
  memset(&cfg, 0, sizeof cfg);
  cfg.n_layers = layers, cfg.batch = batch, cfg.n_q_heads = Q_HEADS, cfg.n_kv_heads = KV_HEADS;
  cfg.k_dim = DIM, cfg.dtype = RDKV_F16, cfg.tail_dtype = RDKV_F16;
  cfg.max_segments = dense ? 1 : 1 + tokens / block;
  cfg.n_warps = warps;
  CHECK(rdkv_cuda_resolve(&cfg, &cfg));
  const rdkv_cuda_blocks blocks = {static_cast<uint32_t>(block), static_cast<uint32_t>(recent),
                                   static_cast<uint32_t>(fan), static_cast<uint32_t>(rows),
                                   static_cast<uint32_t>(lanes)};
  rdkv_config rdkv;
  memset(&rdkv, 0, sizeof rdkv);
  rdkv.n_layers = layers, rdkv.n_q_heads = Q_HEADS, rdkv.n_kv_heads = KV_HEADS, rdkv.k_dim = DIM;
  rdkv.keep = keep, rdkv.pool = 1;
  if (rdkv_resolve(&rdkv, &rdkv) != RDKV_OK) return 2;

  const head_counts counts = {{2896, 2592, 20, 0}, {31, 80, 0}}; /* T_eff 5,508 */
  const std::vector<head_counts> all(static_cast<size_t>(layers * KV_HEADS), counts);
  const std::vector<uint8_t> prompt =
      random_block(layers, 0, Q_HEADS, KV_HEADS, DIM, DIM, all.data(), 1, 1, 7);
  const size_t arena_bytes =
      dense ? 0
            : static_cast<size_t>(keep * 2 * tokens * layers * KV_HEADS * 2 * DIM * 2) + (1 << 20);
  const size_t tail = static_cast<size_t>(layers * KV_HEADS * 2 * DIM) * capacity;
  std::vector<rdkv_cuda_sequence> sequences(n);
  std::vector<rdkv_cuda_live> lives(n);
  uint8_t *first = nullptr;
  for (size_t b = 0; b < n; ++b) {
    memset(&sequences[b], 0, sizeof sequences[b]), memset(&lives[b], 0, sizeof lives[b]);
    uint16_t *rows_of_tail = room<uint16_t>(tail);
    CHECK(cudaMemset(rows_of_tail, 0, 2 * tail));
    rdkv_cuda_tail(&cfg, rows_of_tail, capacity, &sequences[b]);
    const void **list = room<const void *>(static_cast<size_t>(cfg.max_segments));
    uint8_t *at = room<uint8_t>(prompt.size());
    if (b == 0)
      first = at, CHECK(cudaMemcpy(at, prompt.data(), prompt.size(), cudaMemcpyHostToDevice));
    else
      CHECK(cudaMemcpyAsync(at, first, prompt.size(), cudaMemcpyDeviceToDevice));
    CHECK(cudaMemcpy(list, &at, sizeof at, cudaMemcpyHostToDevice));
    sequences[b].segments = list, sequences[b].n_segments = 1;
    lives[b].tail_begin = 1u << 20; /* as random_block says */
    if (dense) continue;
    uint8_t *queries = room<uint8_t>(rdkv_cuda_queries_bytes(&cfg, capacity));
    CHECK(cudaMemset(queries, 0, rdkv_cuda_queries_bytes(&cfg, capacity)));
    rdkv_cuda_queries(&cfg, queries, capacity, &lives[b]);
    lives[b].arena = room<uint8_t>(arena_bytes), lives[b].arena_bytes = arena_bytes;
  }
  rdkv_cuda_batch live;
  live.sequences = room<rdkv_cuda_sequence>(n), live.live = room<rdkv_cuda_live>(n);
  live.tail_tokens = room<uint32_t>(n);
  const size_t q_each = n * Q_HEADS * DIM, k_each = n * KV_HEADS * DIM;
  const size_t sets = static_cast<size_t>(STEPS) * static_cast<size_t>(layers);
  __half *q = room<__half>(q_each * sets), *k = room<__half>(k_each * sets);
  __half *v = room<__half>(k_each * sets), *out = room<__half>(q_each);
  float *lse = room<float>(n * Q_HEADS);
  fill_kernel<<<2048, 256>>>(q, q_each * sets, 1, 1);
  fill_kernel<<<2048, 256>>>(k, k_each * sets, 2, 1);
  fill_kernel<<<2048, 256>>>(v, k_each * sets, 3, 1);
  unsigned long long *stamps = room<unsigned long long>(2 * static_cast<size_t>(tokens) + 2);
  uint32_t *n_stamps = room<uint32_t>(1);
  void *plan = room<uint8_t>(rdkv_cuda_plan_bytes(&cfg));
  void *workspace = room<uint8_t>(rdkv_cuda_workspace_bytes(&cfg));
  const size_t bytes = dense ? 0 : rdkv_cuda_sequence_workspace(&rdkv, &cfg, &blocks);
  void *memory = dense ? nullptr : room<uint8_t>(bytes);
  CHECK(cudaDeviceSynchronize());

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto attend = [&](int s) {
    for (int l = 0; l < layers; ++l) {
      const size_t at = static_cast<size_t>(s * layers + l);
      rdkv_cuda_io io;
      memset(&io, 0, sizeof io);
      io.q = q + at * q_each, io.k_new = k + at * k_each, io.v_new = v + at * k_each;
      io.out = out, io.lse = lse, io.tail_tokens = live.tail_tokens;
      CHECK(rdkv_cuda_attend(&cfg, plan, l, &io, workspace, stream));
      if (!dense) CHECK(rdkv_cuda_keep(&cfg, &live, l, &io, stream));
    }
    CHECK(rdkv_cuda_advance(live.tail_tokens, batch, stream));
  };
  const auto compress = [&]() {
    CHECK(rdkv_cuda_sequence_compress(&rdkv, &cfg, &live, &blocks, plan, memory, bytes, stream));
  };
  const auto stamp = [&]() { stamp_kernel<<<1, 1, 0, stream>>>(stamps, n_stamps); };
  const auto reset = [&](bool staggered) {
    std::vector<uint32_t> tail_tokens(n, 0); /* of zeros */
    for (size_t b = 0; b < n && staggered; ++b)
      tail_tokens[b] = static_cast<uint32_t>(b * static_cast<size_t>(block) / n);
    CHECK(cudaMemset(n_stamps, 0, 4));
    CHECK(cudaMemcpy(live.tail_tokens, tail_tokens.data(), n * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(live.sequences, sequences.data(), n * sizeof sequences[0],
                     cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(live.live, lives.data(), n * sizeof lives[0], cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
    CHECK(rdkv_cuda_plan(&cfg, live.sequences, live.tail_tokens, plan, stream));
  };
  /* the lambda of all blocks: what the first one comes to by its part of the bytes */
  reset(false);
  if (!dense && !by_bytes) {
    for (uint32_t t = 0; t < capacity; ++t) attend(static_cast<int>(t % STEPS));
    compress();
    CHECK(cudaStreamSynchronize(stream));
    rdkv.scope = RDKV_SCOPE_LAMBDA, rdkv.lambda = last_header(live.sequences).lambda;
  }
  reset(!together && !dense);
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int s = 0; s < STEPS; ++s) {
    attend(s), stamp();
    if (!dense && (s + 1) % every == 0)
      compress();
    else if (dense && s == 0) /* tails grow: balance anew now and then */
      CHECK(rdkv_cuda_plan(&cfg, live.sequences, live.tail_tokens, plan, stream));
    stamp();
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CHECK(cudaGraphUpload(exec, stream));
  if (dense)
    printf("batch %d, %d layers, %d tokens, all dense", batch, layers, tokens);
  else
    printf(
        "batch %d, %d layers, %d tokens, blocks of %d, recent %d, keep %.4f by %s, fan %d, %d "
        "lanes, every %d steps",
        batch, layers, tokens, block, recent, keep, by_bytes ? "bytes" : "lambda", fan, lanes,
        every);
  printf(": %.1f GB, prompt %.2f MB a sequence\n", static_cast<double>(total_memory) * 1e-9,
         static_cast<double>(prompt.size()) * 1e-6);
  /* a window is as long as two blocks, at least: some of them are merged */
  const int window = std::max(2 * block, tokens / 16) / STEPS * STEPS;
  std::vector<double> steps, attention; /* us of each step */
  double at_first = 0;
  stamp();
  for (int done = 0; done + window <= tokens; done += window) {
    for (int r = 0; r < window / STEPS; ++r) CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    const size_t n_steps = static_cast<size_t>(window);
    std::vector<unsigned long long> at(2 * n_steps + 1);
    CHECK(
        cudaMemcpy(at.data(), stamps + 2 * done, at.size() * sizeof at[0], cudaMemcpyDeviceToHost));
    steps.clear(), attention.clear();
    for (size_t i = 1; i < n_steps; ++i) { /* the very first one waits for the host */
      attention.push_back(static_cast<double>(at[2 * i + 1] - at[2 * i]) * 1e-3);
      steps.push_back(static_cast<double>(at[2 * i + 2] - at[2 * i]) * 1e-3);
    }
    if (done == 0)
      at_first = median(std::vector<double>(attention.begin(), attention.begin() + STEPS / 2));
    CHECK(cudaMemcpy(lives.data(), live.live, n * sizeof lives[0], cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(sequences.data(), live.sequences, n * sizeof sequences[0],
                     cudaMemcpyDeviceToHost));
    uint32_t status = 0;
    for (const rdkv_cuda_live &l : lives) status = std::max(status, l.status);
    printf(
        "  tokens %5d to %5d: %8.1f us a step, median %8.1f, longest %8.1f; attention %8.1f, "
        "%6.2f a layer; %2u segments, %.2f MB of blocks, status %u\n",
        done, done + window, mean(steps), median(steps),
        *std::max_element(steps.begin(), steps.end()), mean(attention), mean(attention) / layers,
        sequences[0].n_segments, static_cast<double>(lives[0].arena_used) * 1e-6, status);
    fflush(stdout);
  }
  printf(
      "a step at the end against the first ones' attention (%.1f us): mean %.3f, median %.3f, its "
      "attention alone %.3f\n",
      at_first, mean(steps) / at_first, median(steps) / at_first, mean(attention) / at_first);
  return 0;
}
