/* Speed of rdkv_cuda.cuh: microseconds a layer, bytes moved, and what part of the read ceiling that
   is. nvcc -O3 -std=c++17 -arch=native bench/bench_cuda.cu -o bench_cuda && ./bench_cuda [--csv]
   [--warps n] [--blocks_per_sm n] [--teams n] [--latency n] [--replays n] [part of a row's name
   ...]
   Shape: Llama 3.1 8B (32 query heads, 8 kv heads, dims 128), 128K tokens. A captured graph runs
   over layers whose caches lie apart in memory, far more than the L2 holds; time is the median of
   the replays over the number of layers. Codes are random; the widths are those that the paper's
   profile gives to log-normal weights of sigma 2.5. */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 128 /* compiles faster */
#define RDKV_CUDA_NO_COMPRESS
#include "../rdkv_cuda.cuh"

#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include "../tests/cuda/random_block.h"

static void check(cudaError_t e, int line) {
  if (e == cudaSuccess) return;
  fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(e));
  exit(2);
}
#define CHECK(call) check(call, __LINE__)

static bool csv = false;
static int replays = 200, force_warps = 0, force_blocks = 0;
static int force_latency = 0, force_teams = 0;
static std::vector<const char *> filters; /* rows to run: those that contain one of these */

static __global__ void empty_kernel() {}

/* Reads bytes and does nothing with them: what the memory can do. */
static __global__ void __launch_bounds__(512)
    read_kernel(const uint4 *data, size_t n, uint4 *never) {
  uint4 x = make_uint4(0, 0, 0, 0);
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (size_t k = 0; k < 8; ++k)
      v[k] = i + k * stride < n ? __ldcs(data + i + k * stride) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (size_t k = 0; k < 8; ++k) x.x ^= v[k].x, x.y ^= v[k].y, x.z ^= v[k].z, x.w ^= v[k].w;
  }
  if (x.x == 0x12345678u && x.y == 0x9abcdef0u) *never = x;
}

static __global__ void fill_kernel(uint32_t *data, size_t n,
                                   uint32_t seed) { /* halves in (-2, 2) */
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 15, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u, x ^= x >> 16;
    data[i] = x & 0xbfffbfffu;
  }
}

/* Median seconds of a graph of what launch(i, stream) does for i in [0, n). */
template <typename F>
static double time_graph(int n, int rounds, F launch) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaEventCreate(&begin)), CHECK(cudaEventCreate(&end));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < n; ++i) launch(i, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<float> ms(static_cast<size_t>(rounds));
  for (int r = -5; r < rounds; ++r) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    if (r >= 0) CHECK(cudaEventElapsedTime(&ms[static_cast<size_t>(r)], begin, end));
  }
  CHECK(cudaGraphExecDestroy(exec)), CHECK(cudaGraphDestroy(graph)),
      CHECK(cudaStreamDestroy(stream));
  std::sort(ms.begin(), ms.end());
  return static_cast<double>(ms[ms.size() / 2]) * 1e-3 / n;
}

static double ceiling = 0; /* bytes a second, read */

static void measure_limits(int sms) {
  const double empty = time_graph(32, replays, [&](int, cudaStream_t s) {
    empty_kernel<<<static_cast<uint32_t>(sms), 256, 0, s>>>();
  });
  const size_t total = static_cast<size_t>(9) << 30;
  uint8_t *data;
  CHECK(cudaMalloc(&data, total));
  fill_kernel<<<2048, 512>>>(reinterpret_cast<uint32_t *>(data), total / 4, 1);
  CHECK(cudaDeviceSynchronize());
  printf(csv ? "empty kernel,,,,,%.3f,,\n"
             : "empty kernel                                            %8.2f us\n",
         empty * 1e6);
  for (double mb : {4.33, 17.3, 34.6, 138.0, 277.0}) {
    const size_t bytes = static_cast<size_t>(mb * 1e6) / 4096 * 4096;
    double best = 1e9;
    for (int per_sm : {1, 2, 4})
      best = std::min(best, time_graph(32, replays, [&](int i, cudaStream_t s) {
                        const uint8_t *p = data + static_cast<size_t>(i) * (total / 32);
                        read_kernel<<<static_cast<uint32_t>(per_sm * sms), 512, 0, s>>>(
                            reinterpret_cast<const uint4 *>(p), bytes / 16,
                            reinterpret_cast<uint4 *>(data));
                      }));
    ceiling = std::max(ceiling, static_cast<double>(bytes) / best);
    printf(csv ? "read %.4g MB,,,,%.6g,%.3f,%.3f,\n"
               : "read %8.4g MB                       %8.2f MB       %8.2f us  %6.2f TB/s\n",
           mb, static_cast<double>(bytes) * 1e-6, best * 1e6,
           static_cast<double>(bytes) / best * 1e-12);
  }
  CHECK(cudaFree(data));
}

struct scenario {
  const char *name;
  head_counts counts; /* of every head; no tokens at all: no segment */
  int batch;
  uint32_t tail;
  int layers, overlap;
  bool append;
};

static void run(const scenario &s) {
  char label[128];
  snprintf(label, sizeof label, "%s%s, batch %d, tail %u", s.name, s.overlap ? " +overlap" : "",
           s.batch, s.tail);
  bool wanted = filters.empty();
  for (const char *f : filters) wanted = wanted || strstr(label, f);
  if (!wanted) return;
  const int kv_heads = 8, q_heads = 32, dim = 128;
  rdkv_cuda_config cfg;
  memset(&cfg, 0, sizeof cfg);
  cfg.n_layers = s.layers, cfg.batch = s.batch, cfg.n_q_heads = q_heads, cfg.n_kv_heads = kv_heads;
  cfg.k_dim = dim, cfg.dtype = RDKV_F16, cfg.tail_dtype = RDKV_F16, cfg.max_segments = s.layers;
  cfg.overlap = s.overlap, cfg.n_warps = force_warps, cfg.blocks_per_sm = force_blocks;
  cfg.latency = force_latency, cfg.teams = force_teams;
  CHECK(rdkv_cuda_resolve(&cfg, &cfg));
  const bool packed =
      s.counts.tokens[0] + s.counts.tokens[1] + s.counts.tokens[2] + s.counts.tokens[3];
  const size_t batch = static_cast<size_t>(s.batch), layers = static_cast<size_t>(s.layers);
  double bytes = 0; /* a layer: tiles, tables, tail */
  uint8_t *blocks = nullptr;
  size_t block_bytes = 0;
  std::vector<const void *> list;
  if (packed) {
    std::vector<head_counts> counts(static_cast<size_t>(kv_heads), s.counts);
    const std::vector<uint8_t> block =
        random_block(1, 0, q_heads, kv_heads, dim, dim, counts.data(), 1, 1, 7);
    block_bytes = round_up(block.size(), 1024);
    bytes += static_cast<double>(block.size()) * s.batch;
    CHECK(cudaMalloc(&blocks, block_bytes * batch * layers));
    CHECK(cudaMemcpy(blocks, block.data(), block.size(), cudaMemcpyHostToDevice));
    for (size_t i = 0; i < batch * layers; ++i) {
      uint8_t *to = blocks + i * block_bytes;
      const uint32_t layer = static_cast<uint32_t>(i % layers);
      if (i) CHECK(cudaMemcpyAsync(to, blocks, block.size(), cudaMemcpyDeviceToDevice));
      CHECK(cudaMemcpyAsync(to + offsetof(rdkv_header, first_layer), &layer, 4,
                            cudaMemcpyHostToDevice));
      list.push_back(to);
    }
  }
  const uint32_t capacity = s.tail + 16;
  const size_t tail_bytes = static_cast<size_t>(kv_heads) * capacity * 2 * dim * 2 * layers;
  uint8_t *tails;
  CHECK(cudaMalloc(&tails, tail_bytes * batch));
  fill_kernel<<<2048, 512>>>(reinterpret_cast<uint32_t *>(tails), tail_bytes * batch / 4, 3);
  bytes += static_cast<double>(s.tail) * kv_heads * 2 * dim * 2 * s.batch;
  const void **segments = nullptr;
  if (packed) {
    CHECK(cudaMalloc(&segments, list.size() * sizeof *segments));
    CHECK(
        cudaMemcpy(segments, list.data(), list.size() * sizeof *segments, cudaMemcpyHostToDevice));
  }
  std::vector<rdkv_cuda_sequence> sequences(batch);
  std::vector<uint32_t> lengths(batch, s.tail);
  for (size_t b = 0; b < batch; ++b) {
    memset(&sequences[b], 0, sizeof sequences[b]);
    rdkv_cuda_tail(&cfg, tails + b * tail_bytes, capacity, &sequences[b]);
    sequences[b].segments = segments + b * layers;
    sequences[b].n_segments = packed ? static_cast<uint32_t>(s.layers) : 0;
  }
  rdkv_cuda_sequence *d_sequences;
  uint32_t *d_lengths;
  void *plan, *workspace;
  uint16_t *q, *out;
  const size_t values = batch * q_heads * dim;
  CHECK(cudaMalloc(&d_sequences, batch * sizeof *d_sequences));
  CHECK(cudaMalloc(&d_lengths, batch * 4));
  CHECK(cudaMalloc(&plan, rdkv_cuda_plan_bytes(&cfg)));
  CHECK(cudaMalloc(&workspace, rdkv_cuda_workspace_bytes(&cfg)));
  CHECK(cudaMalloc(&q, values * 2 * 3)), CHECK(cudaMalloc(&out, values * 2));
  CHECK(cudaMemcpy(d_sequences, sequences.data(), batch * sizeof *d_sequences,
                   cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(d_lengths, lengths.data(), batch * 4, cudaMemcpyHostToDevice));
  fill_kernel<<<64, 256>>>(reinterpret_cast<uint32_t *>(q), values * 3 / 2, 5);
  CHECK(cudaDeviceSynchronize());
  CHECK(rdkv_cuda_plan(&cfg, d_sequences, d_lengths, plan, nullptr));
  CHECK(cudaDeviceSynchronize());
  rdkv_cuda_io io;
  memset(&io, 0, sizeof io);
  io.q = q, io.out = out, io.tail_tokens = d_lengths;
  if (s.append) io.k_new = q + values, io.v_new = q + 2 * values;
  const int rounds = bytes * s.layers > 8e9 ? std::max(10, replays / 8) : replays;
  const double t = time_graph(s.layers, rounds, [&](int i, cudaStream_t stream) {
    CHECK(rdkv_cuda_attend(&cfg, plan, i, &io, workspace, stream));
  });
  printf(csv ? "\"%s\",%d,%d,%d,%.6g,%.3f,%.3f,%.1f\n"
             : "%-42s %3d blocks of %2d warps, %d at a time %8.2f MB %9.2f us  %6.2f TB/s  "
               "%5.1f %%\n",
         label, cfg.n_blocks, cfg.n_warps, cfg.teams, bytes * 1e-6, t * 1e6, bytes / t * 1e-12,
         ceiling > 0 ? 100 * bytes / t / ceiling : 0.0);
  fflush(stdout);
  cudaFree(blocks), cudaFree(tails), cudaFree(segments), cudaFree(d_sequences), cudaFree(d_lengths);
  cudaFree(plan), cudaFree(workspace), cudaFree(q), cudaFree(out);
}

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--csv"))
      csv = true;
    else if (!strcmp(argv[i], "--replays") && i + 1 < argc)
      replays = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--warps") && i + 1 < argc)
      force_warps = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--latency") && i + 1 < argc)
      force_latency = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--teams") && i + 1 < argc)
      force_teams = atoi(argv[++i]);
    else if (!strcmp(argv[i], "--blocks_per_sm") && i + 1 < argc)
      force_blocks = atoi(argv[++i]);
    else
      filters.push_back(argv[i]);
  }
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  int driver;
  CHECK(cudaDriverGetVersion(&driver));
  if (csv)
    printf("name,blocks,warps,teams,MB,us,TB/s,percent of ceiling\n");
  else
    printf("%s, %d SMs, driver for CUDA %d.%d\n", prop.name, prop.multiProcessorCount,
           driver / 1000, driver % 1000 / 10);
  if (filters.empty()) measure_limits(prop.multiProcessorCount);

  const head_counts none = {{0, 0, 0, 0}, {0, 0, 0}};
  const head_counts b1024 = {{2896, 2592, 20, 0}, {31, 80, 0}};   /* T_eff 5,508 */
  const head_counts b4096 = {{8780, 11408, 296, 0}, {34, 85, 0}}; /* T_eff 20,484 */
  const head_counts mild32 = {{0, 32768, 0, 0}, {0, 128, 0}},
                    mild128 = {{0, 131072, 0, 0}, {0, 128, 0}};
  const head_counts two = {{8192, 0, 0, 0}, {128, 0, 0}};       /* nothing but 2 bits */
  const head_counts mixed = {{6600, 1500, 92, 0}, {96, 16, 0}}; /* mostly 2 bits, T_eff 8,192 */
  for (int overlap = 0; overlap < 2; ++overlap) {
    for (int batch : {1, 8, 64, 256}) {
      scenario s = {"budget 1024", b1024, batch, 0, 32, overlap, false};
      run(s);
    }
    for (int batch : {1, 8, 64}) {
      scenario s = {"budget 4096", b4096, batch, 0, 32, overlap, false};
      run(s);
    }
  }
  for (uint32_t tail : {256u, 1024u})
    for (int batch : {1, 64}) {
      scenario s = {"budget 1024, append", b1024, batch, tail, 32, 0, true};
      run(s);
    }
  run({"mild 4 bit, 32K", mild32, 1, 0, 32, 0, false});
  run({"mild 4 bit, 128K", mild128, 1, 0, 32, 0, false});
  run({"2-bit mix, T_eff 8K", mixed, 64, 0, 32, 0, false});
  run({"2 bits alone, T_eff 8K", two, 64, 0, 32, 0, false});
  for (uint32_t t : {1024u, 4096u, 32768u, 131072u}) run({"dense", none, 1, t, 32, 0, false});
  run({"dense", none, 64, 1057, 32, 0, false}); /* the bytes of budget 1024 */
  run({"dense", none, 8, 131072, 8, 0, false});
  return 0;
}
