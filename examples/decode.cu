/* decode.cu - decode on the GPU from a block that the CPU has packed, and compare with rdkv_attend.
   nvcc -O3 -std=c++17 -arch=native -o decode examples/decode.cu && ./decode [FILE]
   FILE holds a block (rdkv_compress's output as it is); without it the program packs one. Each step
   of the loop replays one captured graph, which attends, appends the step's token and counts it.
   Then the last step is done once more by a kernel made of the header's device functions. */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 128 /* compiles faster */
#define RDKV_CUDA_NO_COMPRESS
#include "../rdkv_cuda.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <vector>

enum { TOKENS = 4096, Q_HEADS = 8, KV_HEADS = 2, DIM = 128, WINDOW = 32, STEPS = 20, GROUP = 4 };

static void check(cudaError_t e) {
  if (e != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(e)), exit(1);
}
static void check(rdkv_status s) {
  if (s != RDKV_OK) fprintf(stderr, "%s\n", rdkv_status_string(s)), exit(1);
}
static void *host_memory(size_t bytes) { /* 128-byte aligned, kept to the end */
  const uintptr_t p = reinterpret_cast<uintptr_t>(malloc(bytes + 128));
  return reinterpret_cast<void *>((p + 127) & ~static_cast<uintptr_t>(127));
}
static void *device_memory(size_t bytes) {
  void *p = nullptr;
  check(cudaMalloc(&p, bytes));
  check(cudaMemset(p, 0, bytes));
  check(cudaDeviceSynchronize()); /* main's stream does not wait for it */
  return p;
}
static float noise(uint32_t i) { /* from a hash of i, uniform, variance 1 */
  i = (i ^ (i >> 16)) * 0x7feb352du, i = (i ^ (i >> 15)) * 0x846ca68bu;
  return static_cast<float>(i >> 8) / (1 << 24) * 3.46f - 1.73f;
}

/* Attention over the packed part alone: a warp for each kv head, tiles read where they lie. */
static __global__ void warp_attend(const void *block, const __half *q, float scale, float *out) {
  __shared__ __align__(16) uint8_t fragments[(DIM / 16 + 2) * 256];
  __shared__ float2 factors[GROUP];
  rdkv_cuda_head head;
  rdkv_cuda_head_of(block, 0, static_cast<int>(blockIdx.x), &head);
  for (uint32_t c = 0; c < GROUP; ++c)
    rdkv_cuda_query<true>(&head, false, q + (blockIdx.x * GROUP + c) * DIM, RDKV_F16, DIM,
                          scale * 1.442695f, c, fragments, fragments + 32, &factors[c]);
  __syncwarp();
  const uint32_t lane = threadIdx.x, g = lane >> 2, column = lane & 3;
  const float2 factor[2] = {factors[column], factors[column]};
  rdkv_cuda_acc<DIM / 16> a;
  rdkv_cuda_clear(a);
  for (uint32_t i = 0; i < rdkv_cuda_tiles(head); ++i) {
    int run;
    uint32_t tokens;
    uint64_t offset;
    rdkv_cuda_tile_at(head, DIM, i, &run, &tokens, &offset);
    rdkv_cuda_tile<true>(a, head.tiles + offset, rdkv_cuda_key_widths(head), run, tokens, fragments,
                         0, factor);
  }
  rdkv_cuda_finish<true>(a);
  for (uint32_t i = 0; i < DIM / 16; ++i)
    for (uint32_t k = 0; k < 2; ++k)
      out[(blockIdx.x * GROUP + column) * DIM + 16 * i + g + 8 * k] =
          (a.acc[i][2 * k] + a.mid[0]) / a.sum[0];
}

static double distance(const float *a, const float *b, int n) {
  double d = 0, s = 0;
  for (int i = 0; i < n; ++i)
    d += static_cast<double>((a[i] - b[i]) * (a[i] - b[i])), s += static_cast<double>(b[i] * b[i]);
  return sqrt(d / s);
}

int main(int argc, char **argv) {
  rdkv_config cfg = rdkv_config();
  cfg.n_q_heads = Q_HEADS, cfg.n_kv_heads = KV_HEADS, cfg.k_dim = DIM, cfg.keep = 0.10;
  check(rdkv_resolve(&cfg, &cfg));
  size_t bytes = 0, room = 64 << 20, need = 64 << 20;
  void *block = host_memory(room), *scratch = host_memory(need);
  if (argc > 1) {
    FILE *f = fopen(argv[1], "rb");
    if (f) bytes = fread(block, 1, room, f), fclose(f);
  } else {
    std::vector<float> k(TOKENS * KV_HEADS * DIM), v(k.size()), q(WINDOW * Q_HEADS * DIM);
    for (uint32_t i = 0; i < k.size(); ++i) k[i] = noise(i), v[i] = noise(~i);
    for (uint32_t i = 0; i < q.size(); ++i) q[i] = noise(7 * i + 5);
    const rdkv_kv kv = {rdkv_dense(k.data(), RDKV_F32, KV_HEADS, DIM),
                        rdkv_dense(v.data(), RDKV_F32, KV_HEADS, DIM),
                        rdkv_dense(q.data(), RDKV_F32, Q_HEADS, DIM)};
    check(rdkv_compress(&cfg, &kv, TOKENS, block, room, &bytes, scratch, need));
  }
  rdkv_segment segment;
  check(rdkv_open(block, bytes, RDKV_VERIFY, &segment));
  rdkv_tail tail;
  const size_t tail_bytes = rdkv_tail_bytes(&cfg, STEPS, RDKV_F16);
  check(rdkv_tail_init(&cfg, STEPS, RDKV_F16, host_memory(tail_bytes), tail_bytes, &tail));
  const rdkv_cache cache = {&segment, 1, &tail, cfg.isa};

  rdkv_cuda_config gpu = rdkv_cuda_config();
  gpu.batch = 1, gpu.n_q_heads = Q_HEADS, gpu.n_kv_heads = KV_HEADS, gpu.k_dim = DIM;
  gpu.dtype = RDKV_F16, gpu.tail_dtype = RDKV_F16, gpu.softmax_scale = cfg.softmax_scale;
  check(rdkv_cuda_resolve(&gpu, &gpu));
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  void *device_block = device_memory(bytes);
  check(rdkv_cuda_upload(&segment, device_block, stream));
  rdkv_cuda_sequence sequence = rdkv_cuda_sequence(), *sequences;
  void **segments = static_cast<void **>(device_memory(sizeof(void *)));
  check(cudaMemcpy(segments, &device_block, sizeof(void *), cudaMemcpyHostToDevice));
  sequence.segments = segments, sequence.n_segments = 1;
  rdkv_cuda_tail(&gpu, device_memory(tail_bytes), STEPS, &sequence);
  sequences = static_cast<rdkv_cuda_sequence *>(device_memory(sizeof sequence));
  check(cudaMemcpy(sequences, &sequence, sizeof sequence, cudaMemcpyHostToDevice));
  void *plan = device_memory(rdkv_cuda_plan_bytes(&gpu));
  void *workspace = device_memory(rdkv_cuda_workspace_bytes(&gpu));
  uint32_t *tail_tokens = static_cast<uint32_t *>(device_memory(sizeof(uint32_t)));
  __half *in =
      static_cast<__half *>(device_memory((Q_HEADS + 2 * KV_HEADS) * DIM * sizeof(__half)));
  __half *out = static_cast<__half *>(device_memory(Q_HEADS * DIM * sizeof(__half)));
  check(cudaStreamSynchronize(stream));
  check(rdkv_cuda_plan(&gpu, sequences, tail_tokens, plan, stream));

  rdkv_cuda_io io = rdkv_cuda_io();
  io.q = in, io.k_new = in + Q_HEADS * DIM, io.v_new = in + (Q_HEADS + KV_HEADS) * DIM;
  io.out = out, io.tail_tokens = tail_tokens;
  cudaGraph_t graph;
  cudaGraphExec_t step;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  check(rdkv_cuda_attend(&gpu, plan, 0, &io, workspace, stream));
  check(rdkv_cuda_advance(tail_tokens, 1, stream));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&step, graph, 0));

  double worst = 0;
  float q[Q_HEADS * DIM], want[Q_HEADS * DIM], have[Q_HEADS * DIM];
  for (uint32_t t = 0; t < STEPS; ++t) {
    __half token[(Q_HEADS + 2 * KV_HEADS) * DIM], result[Q_HEADS * DIM];
    for (uint32_t i = 0; i < (Q_HEADS + 2 * KV_HEADS) * DIM; ++i)
      token[i] = __float2half(noise(100000 * (t + 1) + i));
    for (int i = 0; i < Q_HEADS * DIM; ++i) q[i] = __half2float(token[i]);
    check(cudaMemcpyAsync(in, token, sizeof token, cudaMemcpyHostToDevice, stream));
    check(cudaGraphLaunch(step, stream));
    check(cudaMemcpyAsync(result, out, sizeof result, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    check(rdkv_tail_append(&tail, 0, rdkv_dense(token + Q_HEADS * DIM, RDKV_F16, KV_HEADS, DIM),
                           rdkv_dense(token + (Q_HEADS + KV_HEADS) * DIM, RDKV_F16, KV_HEADS, DIM),
                           1));
    check(rdkv_attend(&cfg, &cache, 0, q, want, nullptr, scratch, need));
    for (int i = 0; i < Q_HEADS * DIM; ++i) have[i] = __half2float(result[i]);
    const double d = distance(have, want, Q_HEADS * DIM);
    if (!(d <= worst)) worst = d;
  }
  printf("%lu bytes for %d tokens; %d steps; GPU and CPU differ by %.1e\n",
         static_cast<unsigned long>(bytes), TOKENS, STEPS, worst);

  float *alone = static_cast<float *>(device_memory(sizeof have));
  warp_attend<<<KV_HEADS, 32, 0, stream>>>(device_block, in, gpu.softmax_scale, alone);
  check(cudaStreamSynchronize(stream));
  check(cudaMemcpy(have, alone, sizeof have, cudaMemcpyDeviceToHost));
  const rdkv_cache packed = {&segment, 1, nullptr, cfg.isa};
  check(rdkv_attend(&cfg, &packed, 0, q, want, nullptr, scratch, need));
  const double d = distance(have, want, Q_HEADS * DIM);
  printf("the packed part alone, by a kernel of one's own: %.1e\n", d);
  return worst <= 1e-3 && d <= 1e-3 ? 0 : 1;
}
