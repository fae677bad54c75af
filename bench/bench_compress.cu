/* Time of each step of compression on the GPU, a layer at a time: 8 kv heads, groups of 4, head_dim
   128, fp16. Medians of replays of a graph of 16 layers; up to 8K tokens K and V stay in the L2,
   above they do not fit. With lse: the log-sum-exp of the window's rows is handed over; and out:
   their output as well. total: a chain of all steps. Attention of the window is either peaked,
   token weights log-normal with sigma 2.5 as bench_cuda's, or flat, which keeps more tokens at
   fewer bits. Below each row the bytes that a step must move and its part of the rate of a kernel
   that only reads K and V. --keep LIST: parts of the bytes to keep; --csv: one line a row; a
   number: that many tokens alone. nvcc -O3 -std=c++17 -arch=native bench/bench_compress.cu -o
   bench_compress && ./bench_compress */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 128
#include "../rdkv_cuda.cuh"

#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

static void check(cudaError_t e, int line) {
  if (e == cudaSuccess) return;
  fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(e));
  exit(2);
}
#define CHECK(call) check(call, __LINE__)

static __device__ float hash_normal(uint64_t z) { /* nearly, of deviation 1 */
  float s = 0;
  for (int k = 0; k < 4; ++k) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull, z ^= z >> 27;
    s += static_cast<float>(z >> 40) * 5.9604645e-8f - 0.5f;
  }
  return s * 1.7320508f;
}

/* Near-normal values of deviation `size`. common: that much more, times the sign of one direction
   of all rows (queries), or times that and a number of 32 tokens' own (K of 1024 elements a
   token). */
static __global__ void fill(__half *x, size_t n, float size, uint32_t seed, float common = 0,
                            bool tokens = false) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    float value = size * hash_normal((i + 1) * 0x9e3779b97f4a7c15ull + seed);
    if (common > 0) {
      const float sign = (i % 128 * 0x9e3779b97f4a7c15ull >> 40 & 1) ? common : -common;
      const uint64_t stretch = (i >> 15 << 3 | (i >> 7 & 7)) + 1; /* 32 tokens of a head */
      value += tokens ? sign * hash_normal(stretch * 0x94d049bb133111ebull) : sign;
    }
    x[i] = __float2half_rn(value);
  }
}

/* Logits of the window: peaked, nearly 2.5 times a normal number that 32 tokens share; flat, normal
   for each row and token by itself. Both with this log-sum-exp, nearly. */
static void fill_layer(__half *k, __half *v, __half *q, size_t n, size_t q_size, bool peaked,
                       uint32_t seed) {
  fill<<<1024, 256>>>(k, n, 1, seed, peaked ? 0.5f : 0, true);
  fill<<<1024, 256>>>(v, n, 1, seed + 1);
  fill<<<64, 256>>>(q, q_size, peaked ? 0.3f : 2, seed + 2, peaked ? 0.442f : 0);
}
static float near_lse(uint32_t n, bool peaked) {
  return logf(static_cast<float>(n)) + (peaked ? 3.2f : 2);
}

template <typename T>
static T *device(size_t n) {
  T *p = nullptr;
  CHECK(cudaMalloc(&p, n * sizeof(T) + 256));
  return p;
}

/* A layer whose arrays lie `shift` bytes further. */
static rdkv_layer moved(rdkv_layer l, ptrdiff_t shift) {
  float **const arrays[] = {&l.token,    &l.q_square,     &l.k_square,
                            &l.mean_out, &l.v_distortion, &l.k_distortion};
  for (float **p : arrays) *p = reinterpret_cast<float *>(reinterpret_cast<char *>(*p) + shift);
  l.v_bits += shift, l.k_bits += shift;
  return l;
}

static size_t free_memory() {
  size_t now, total;
  CHECK(cudaMemGetInfo(&now, &total));
  return now;
}

/* The full cache of 32 layers, in bytes; 0 if it does not fit. */
static size_t full_cache(size_t layer_bytes) {
  std::vector<void *> layers;
  const size_t before = free_memory();
  void *p;
  while (layers.size() < 32 && cudaMalloc(&p, layer_bytes) == cudaSuccess) layers.push_back(p);
  const size_t used = layers.size() < 32 ? 0 : before - free_memory();
  for (void *layer : layers) CHECK(cudaFree(layer));
  cudaGetLastError(); /* of the allocation that failed */
  return used;
}

/* Of a call, of 16 in a graph. */
template <typename F>
static double median_us(F run) {
  enum { CALLS = 16 };
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t a, b;
  std::vector<float> t;
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaEventCreate(&a)), CHECK(cudaEventCreate(&b));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < CALLS; ++i) run(stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < 11; ++i) {
    float ms;
    CHECK(cudaEventRecord(a, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(b, stream));
    CHECK(cudaEventSynchronize(b)), CHECK(cudaEventElapsedTime(&ms, a, b));
    if (i >= 2) t.push_back(ms * 1000 / CALLS);
  }
  std::sort(t.begin(), t.end());
  CHECK(cudaGraphExecDestroy(exec)), CHECK(cudaGraphDestroy(graph));
  CHECK(cudaEventDestroy(a)), CHECK(cudaEventDestroy(b)), CHECK(cudaStreamDestroy(stream));
  return t[t.size() / 2];
}

/* Reads all and keeps nothing. */
static __global__ void read_all(const uint4 *x, size_t n, uint32_t *out) {
  uint32_t sum = 0;
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
#pragma unroll 8
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += step) {
    const uint4 v = x[i];
    sum |= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678u) *out = sum;
}

/* What a step must move, MB: K and V once for each pass over them, the arrays, the block. */
struct step_bytes {
  double mb[6]; /* score, with the log-sum-exp, with the output as well, measure, allocate, pack */
  step_bytes(bool joint, double tokens, double heads, double kept, double block) {
    const double k = tokens * heads * 128 * 2, array = tokens * heads * 4;
    mb[2] = k + array, mb[1] = mb[2] + (joint ? k : 0), mb[0] = mb[1] + k;
    mb[3] = joint ? k + kept * 128 * 2 + 6 * array : 0; /* V, K of what is kept, arrays */
    mb[4] = (joint ? 5 : 1) * array + array / 4;
    mb[5] = array / 4 + kept * 2 * 128 * 2 + block;
    for (double &x : mb) x /= 1e6;
  }
};

/* Score and measure of many layers in one call, us a layer. */
static void many_layers(int n_layers, uint32_t n) {
  rdkv_config c = rdkv_config();
  c.n_q_heads = 32, c.n_kv_heads = 8, c.k_dim = 128, c.window = 32, c.n_layers = n_layers;
  if (rdkv_resolve(&c, &c) != RDKV_OK) exit(2);
  const size_t items = static_cast<size_t>(n_layers), rows = n * static_cast<size_t>(8 * 128);
  const size_t q_rows = 32 * 32 * 128, layer_bytes = (rdkv_layer_bytes(&c, n) + 255) / 256 * 256;
  const size_t work_bytes = rdkv_cuda_layer_workspace(&c, n_layers, n);
  __half *k = device<__half>(items * rows), *v = device<__half>(items * rows);
  __half *q = device<__half>(items * q_rows);
  char *mem = device<char>(items * layer_bytes), *work = device<char>(work_bytes);
  uint32_t *status = device<uint32_t>(1);
  float *lse = device<float>(32 * 32);
  const std::vector<float> guess(32 * 32, near_lse(n, true));
  CHECK(cudaMemcpy(lse, guess.data(), guess.size() * 4, cudaMemcpyHostToDevice));
  CHECK(cudaMemset(status, 0, 4));
  fill_layer(k, v, q, items * rows, items * q_rows, true, 1);
  std::vector<rdkv_kv> kv(items);
  std::vector<rdkv_layer> layers(items);
  const std::vector<const float *> lse_of(items, lse);
  void *host = aligned_alloc(64, layer_bytes);
  for (size_t i = 0; i < items; ++i) {
    rdkv_layer h;
    kv[i].k = rdkv_dense(k + i * rows, RDKV_F16, 8, 128);
    kv[i].v = rdkv_dense(v + i * rows, RDKV_F16, 8, 128);
    kv[i].q = rdkv_dense(q + i * q_rows, RDKV_F16, 32, 128);
    if (rdkv_layer_init(&c, n, host, layer_bytes, &h) != RDKV_OK) exit(2);
    layers[i] = moved(h, mem + i * layer_bytes - static_cast<char *>(host));
  }
  double us[3];
  for (int given = 0; given < 2; ++given)
    us[given] = median_us([&](cudaStream_t s) {
      CHECK(rdkv_cuda_score(&c, kv.data(), given ? lse_of.data() : nullptr, 32, nullptr,
                            layers.data(), n_layers, status, work, work_bytes, s));
    });
  us[2] = median_us([&](cudaStream_t s) {
    CHECK(rdkv_cuda_measure(&c, kv.data(), layers.data(), n_layers, status, work, work_bytes, s));
  });
  printf("joint   peaked  %7u %6d         %9.1f %9.1f           %9.1f   %d layers in one call\n", n,
         32, us[0] / n_layers, us[1] / n_layers, us[2] / n_layers, n_layers);
  void *all[] = {k, v, q, mem, work, status, lse};
  for (void *p : all) CHECK(cudaFree(p));
  free(host);
}

int main(int argc, char **argv) {
  bool csv = false, all_rows = true;
  uint32_t only = 0;
  std::vector<double> keeps = {0.0248, 1024. / 131072, 0.1}; /* the second: 1,024 tokens at 128K */
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--csv") == 0) {
      csv = true;
    } else if (strcmp(argv[i], "--keep") == 0 && i + 1 < argc) {
      keeps.clear(), all_rows = false;
      for (char *p = argv[++i]; *p; p += *p == ',') keeps.push_back(strtod(p, &p));
    } else {
      only = static_cast<uint32_t>(atoi(argv[i])), all_rows = false;
    }
  }
  const uint32_t lengths[] = {8192, 32768, 131072};
  printf(
      csv ? "profile,weights,tokens,window,keep,score,score_lse,score_out,measure,allocate,pack,"
            "total,total_lse,total_out,"
            "bytes,kept,read_us,score_mb,score_lse_mb,score_out_mb,measure_mb,allocate_mb,pack_mb\n"
          : "%-7s %-7s %7s %6s %7s %9s %9s %9s %9s %9s %9s %9s %9s %9s   us a layer\n",
      "profile", "weights", "tokens", "window", "keep", "score", "with lse", "and out", "measure",
      "allocate", "pack", "total", "with lse", "and out");
  size_t peak = 0, dense = 0; /* of 32 layers one after the other; one layer's K and V */
  for (int which = 0; which < 2 * static_cast<int>(keeps.size()) + 2; ++which)
    for (uint32_t n : lengths)
      for (int window = 32; window <= 64; window *= 2) {
        const int profile = which % 2;
        const bool peaked = which / 2 < static_cast<int>(keeps.size()); /* flat: the first alone */
        const double keep = keeps[peaked ? static_cast<size_t>(which / 2) : 0];
        if (only && only != n) continue;
        const size_t before = free_memory();
        rdkv_config c = rdkv_config();
        c.n_q_heads = 32, c.n_kv_heads = 8, c.k_dim = 128, c.window = window;
        c.profile = profile ? RDKV_PAPER : RDKV_JOINT, c.keep = keep;
        if (rdkv_resolve(&c, &c) != RDKV_OK) return 2;
        const size_t row = 8 * 128, rows = static_cast<size_t>(window);
        __half *k = device<__half>(2 * n * row), *v = k + n * row;
        __half *q = device<__half>(rows * 32 * 128);
        fill_layer(k, v, q, n * row, rows * 32 * 128, peaked, 1);
        rdkv_kv kv;
        kv.k = rdkv_dense(k, RDKV_F16, 8, 128), kv.v = rdkv_dense(v, RDKV_F16, 8, 128);
        kv.q = rdkv_dense(q, RDKV_F16, 32, 128);
        /* the layout of the host's arrays, on the device */
        const size_t layer_bytes = rdkv_layer_bytes(&c, n);
        void *host = aligned_alloc(64, (layer_bytes + 63) / 64 * 64);
        char *mem = device<char>(layer_bytes);
        rdkv_layer h, l;
        if (rdkv_layer_init(&c, n, host, layer_bytes, &h) != RDKV_OK) return 2;
        l = moved(h, mem - static_cast<char *>(host));
        CHECK(cudaMemset(mem, 0, layer_bytes));
        const size_t work_bytes =
            std::max(rdkv_cuda_layer_workspace(&c, 1, n), rdkv_cuda_allocate_workspace(&c, 1, n));
        const size_t capacity = rdkv_block_bound(&c, n);
        char *work = device<char>(work_bytes), *block = device<char>(capacity);
        double *lambda = device<double>(1);
        uint64_t *bytes = device<uint64_t>(1);
        uint32_t *status = device<uint32_t>(1);
        CHECK(cudaMemset(status, 0, 4));
        const std::vector<float> guess(32 * rows, near_lse(n, peaked));
        float *lse = device<float>(guess.size());
        CHECK(cudaMemcpy(lse, guess.data(), guess.size() * 4, cudaMemcpyHostToDevice));
        const float *lse_of = lse;
        __half *o = device<__half>(rows * 32 * 128);
        fill<<<64, 256>>>(o, rows * 32 * 128, 0.1f, 4);
        const rdkv_tensor out = rdkv_dense(o, RDKV_F16, 32, 128);
        /* given: the log-sum-exp from 1 on, the window's output with 2 */
        const auto score = [&](int given, cudaStream_t s) {
          CHECK(rdkv_cuda_score(&c, &kv, given ? &lse_of : nullptr, window,
                                given == 2 ? &out : nullptr, &l, 1, status, work, work_bytes, s));
        };
        const auto measure = [&](cudaStream_t s) {
          CHECK(rdkv_cuda_measure(&c, &kv, &l, 1, status, work, work_bytes, s));
        };
        const auto allocate = [&](cudaStream_t s) {
          CHECK(rdkv_cuda_allocate(&c, &l, 1, lambda, status, work, work_bytes, s));
        };
        const auto pack = [&](cudaStream_t s) {
          CHECK(rdkv_cuda_pack(&c, &kv, &l, 1, lambda, 0, 0, block, capacity, bytes, status, work,
                               work_bytes, s));
        };
        double us[6], total[3];
        for (int given = 2; given >= 0; --given) {
          us[given] = median_us([&](cudaStream_t s) { score(given, s); });
          total[given] =
              median_us([&](cudaStream_t s) { score(given, s), measure(s), allocate(s), pack(s); });
        }
        score(0, 0);
        us[3] = profile ? 0 : median_us(measure); /* nothing to do */
        us[4] = median_us(allocate), us[5] = median_us(pack);
        const double read_us = median_us([&](cudaStream_t s) {
          read_all<<<1056, 256, 0, s>>>(reinterpret_cast<const uint4 *>(k), n * row / 4, status);
        });
        uint32_t failed;
        uint64_t packed;
        std::vector<uint8_t> bits(static_cast<size_t>(n) * 8);
        CHECK(cudaMemcpy(bits.data(), l.v_bits, bits.size(), cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(&failed, status, 4, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(&packed, bytes, 8, cudaMemcpyDeviceToHost));
        if (failed) {
          fprintf(stderr, "status %u\n", failed);
          return 2;
        }
        const double kept =
            static_cast<double>(bits.size() - std::count(bits.begin(), bits.end(), 0));
        const step_bytes must(!profile, n, 8, kept, static_cast<double>(packed));
        const double read_rate = n * row * 4 / read_us / 1e6; /* MB a us */
        printf(csv ? "%s,%s,%u,%d,%g" : "%-7s %-7s %7u %6d %5.2f %%", profile ? "paper" : "joint",
               peaked ? "peaked" : "flat", n, window, csv ? keep : 100 * keep);
        for (double x : us) printf(csv ? ",%.1f" : " %9.1f", x);
        for (double x : total) printf(csv ? ",%.1f" : " %9.1f", x);
        if (!csv) puts("");
        if (csv) {
          printf(",%llu,%.0f,%.1f", static_cast<unsigned long long>(packed), kept / 8, read_us);
          for (double mb : must.mb) printf(",%.2f", mb);
          puts("");
        } else {
          printf("        MB; of %.2f TB/s             ", read_rate);
          for (int i = 0; i < 6; ++i)
            if (must.mb[i] > 0)
              printf(" %5.*f %2.0f%%", must.mb[i] < 100, must.mb[i],
                     100 * must.mb[i] / read_rate / us[i]);
            else
              printf("          ");
          puts("");
          if (window == 32)
            printf(
                "        workspace %.1f MB, arrays %.1f MB, block %.2f MB of %.1f, %.0f tokens "
                "kept a head\n",
                work_bytes / 1e6, layer_bytes / 1e6, packed / 1e6, n * row * 4 / 1e6, kept / 8);
        }
        free(host);
        if (all_rows && !csv && which == 0 && n == 131072 && window == 32) {
          const size_t room = (capacity + 127) / 128 * 128;
          char *blocks = device<char>(31 * room); /* the last layer's is `block` */
          for (size_t i = 0; i < 32; ++i) {
            fill_layer(k, v, q, n * row, rows * 32 * 128, peaked, 3 * static_cast<uint32_t>(i));
            CHECK(
                rdkv_cuda_score(&c, &kv, nullptr, 0, nullptr, &l, 1, status, work, work_bytes, 0));
            CHECK(rdkv_cuda_measure(&c, &kv, &l, 1, status, work, work_bytes, 0));
            CHECK(rdkv_cuda_allocate(&c, &l, 1, lambda, status, work, work_bytes, 0));
            CHECK(rdkv_cuda_pack(&c, &kv, &l, 1, lambda, static_cast<int>(i), 0,
                                 i < 31 ? blocks + i * room : block, capacity, bytes, status, work,
                                 work_bytes, 0));
          }
          CHECK(cudaMemcpy(&failed, status, 4, cudaMemcpyDeviceToHost));
          peak = failed ? 0 : before - free_memory(), dense = n * row * 4;
          CHECK(cudaFree(blocks));
        }
        void *all[] = {k, q, o, mem, work, block, lambda, bytes, status, lse};
        for (void *p : all) CHECK(cudaFree(p));
      }
  if (all_rows && !csv) many_layers(32, 8192), many_layers(4, 131072);
  if (peak > 0) {
    const size_t full = full_cache(dense);
    printf(
        "device memory, 131072 tokens, 32 layers, MB: layer by layer at most %.1f (blocks, one "
        "layer's K and V %.1f, arrays, workspace), full cache ",
        peak / 1e6, dense / 1e6);
    printf(full ? "%.1f\n" : "does not fit\n", full / 1e6);
  }
  return 0;
}
