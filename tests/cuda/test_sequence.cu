/* Tests of the sequences of rdkv_cuda.cuh, side by side with those of rdkv.h. Exit code 0: all
   passed. With "small" as argument: fewer and smaller cases, for compute-sanitizer; with "plain":
   launches instead of graphs; with another word: the tests whose names contain it.
   nvcc -O2 -std=c++17 -arch=native tests/cuda/test_sequence.cu -o test_sequence && ./test_sequence
 */
#define RDKV_IMPLEMENTATION
#define RDKV_CUDA_IMPLEMENTATION
#define RDKV_CUDA_V_DIM 64
#include "../../rdkv_cuda.cuh"

#include <vector>
#include "../problem.h"
#include "device.h"

static bool plain_run = false;  /* no graphs: compute-sanitizer says more about plain launches */
static const char *wanted = ""; /* the tests whose names contain it */
#define TEST(function) \
  if (strstr(#function, wanted)) RUN(function)

enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, K_DIM = 64, V_DIM = 64, MAX_SEGMENTS = 24 };
enum { OUT = Q_HEADS * V_DIM, QUERY = Q_HEADS * K_DIM, KEY = KV_HEADS * K_DIM };

/* Tokens of each sequence in device memory, as a model would make them. */
struct source {
  const uint16_t *k[8][LAYERS], *v[8][LAYERS], *q[8][LAYERS];
};

static __global__ void feed_kernel(source from, const uint32_t *cursor, int layer, uint16_t *q,
                                   uint16_t *k, uint16_t *v) {
  const uint32_t b = blockIdx.x, at = cursor[b];
  for (uint32_t i = threadIdx.x; i < QUERY; i += blockDim.x)
    q[b * QUERY + i] = from.q[b][layer][at * QUERY + i];
  for (uint32_t i = threadIdx.x; i < KEY; i += blockDim.x)
    k[b * KEY + i] = from.k[b][layer][at * KEY + i],
                v[b * KEY + i] = from.v[b][layer][at * KEY + i];
}

/* log [sequence][token][layer][OUT] */
static __global__ void log_kernel(const uint16_t *out, const uint32_t *cursor, uint32_t n_tokens,
                                  int layer, uint16_t *log) {
  const uint32_t b = blockIdx.x;
  for (uint32_t i = threadIdx.x; i < OUT; i += blockDim.x)
    log[((b * n_tokens + cursor[b]) * LAYERS + static_cast<uint32_t>(layer)) * OUT + i] =
        out[b * OUT + i];
}

static __global__ void next_kernel(uint32_t *cursor) { ++cursor[threadIdx.x]; }

/* A batch on the device and everything that a step of it needs. */
struct world {
  rdkv_config block; /* how blocks are compressed */
  rdkv_cuda_config cfg;
  rdkv_cuda_batch batch;
  rdkv_cuda_blocks blocks;
  uint32_t n_tokens, capacity;
  size_t arena_bytes, memory_bytes;
  source from;
  std::vector<void *> owned;
  uint16_t *q, *k, *v, *out, *log;
  float *lse;
  uint32_t *cursor;
  void *plan, *workspace, *memory;
  cudaStream_t stream;
  cudaGraphExec_t step;
};

template <typename T>
static T *room(world *w, size_t n, int byte = 0xff) {
  void *p;
  CUDA(cudaMalloc(&p, n * sizeof(T) + 256));
  CUDA(cudaMemset(p, byte, n * sizeof(T) + 256));
  w->owned.push_back(p);
  return static_cast<T *>(p);
}

template <typename T>
static std::vector<T> fetched(const T *device, size_t n) {
  std::vector<T> x(n);
  CUDA(cudaMemcpy(x.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
  return x;
}

/* cudaMemcpy may return before the last bytes are there, and the stream does not wait for it. */
template <typename T>
static void send(T *device, const T *host, size_t n) {
  CUDA(cudaMemcpy(device, host, n * sizeof(T), cudaMemcpyHostToDevice));
  CUDA(cudaDeviceSynchronize());
}

static void forward(world *w) {
  const uint32_t n = static_cast<uint32_t>(w->cfg.batch);
  for (int l = 0; l < LAYERS; ++l) {
    rdkv_cuda_io io;
    memset(&io, 0, sizeof io);
    io.q = w->q, io.out = w->out, io.lse = w->lse, io.k_new = w->k, io.v_new = w->v;
    io.tail_tokens = w->batch.tail_tokens;
    feed_kernel<<<n, 128, 0, w->stream>>>(w->from, w->cursor, l, w->q, w->k, w->v);
    CUDA(rdkv_cuda_attend(&w->cfg, w->plan, l, &io, w->workspace, w->stream));
    CUDA(rdkv_cuda_keep(&w->cfg, &w->batch, l, &io, w->stream));
    log_kernel<<<n, 128, 0, w->stream>>>(w->out, w->cursor, w->n_tokens, l, w->log);
  }
  CUDA(rdkv_cuda_advance(w->batch.tail_tokens, w->cfg.batch, w->stream));
  next_kernel<<<1, n, 0, w->stream>>>(w->cursor);
}

static void compress(world *w) {
  CUDA(rdkv_cuda_sequence_compress(&w->block, &w->cfg, &w->batch, &w->blocks, w->plan, w->memory,
                                   w->memory_bytes, w->stream));
}

/* problems [batch]; memory is full of NaNs where nothing has been written. */
static world make_world(problem *const *problems, int batch, const rdkv_config *block,
                        rdkv_cuda_blocks blocks, uint32_t capacity, size_t arena_bytes) {
  world w = world();
  w.block = *block, w.blocks = blocks, w.capacity = capacity;
  w.n_tokens = problems[0]->n_tokens, w.arena_bytes = arena_bytes;
  w.cfg.n_layers = LAYERS, w.cfg.batch = batch, w.cfg.n_q_heads = Q_HEADS;
  w.cfg.n_kv_heads = KV_HEADS, w.cfg.k_dim = K_DIM, w.cfg.v_dim = V_DIM;
  w.cfg.dtype = RDKV_F16, w.cfg.tail_dtype = RDKV_F16, w.cfg.max_segments = MAX_SEGMENTS;
  if (small_run) w.cfg.n_blocks = 2 * KV_HEADS * batch; /* an idle block costs a tool as much */
  CUDA(rdkv_cuda_resolve(&w.cfg, &w.cfg));
  const size_t n = static_cast<size_t>(batch), tokens = w.n_tokens;
  std::vector<rdkv_cuda_sequence> sequences(n);
  std::vector<rdkv_cuda_live> lives(n);
  for (size_t b = 0; b < n; ++b) {
    rdkv_cuda_sequence &s = sequences[b];
    rdkv_cuda_live &l = lives[b];
    memset(&s, 0, sizeof s), memset(&l, 0, sizeof l);
    rdkv_cuda_tail(&w.cfg, room<uint16_t>(&w, LAYERS * KV_HEADS * (K_DIM + V_DIM) * capacity),
                   capacity, &s);
    s.segments = room<const void *>(&w, MAX_SEGMENTS);
    rdkv_cuda_queries(&w.cfg, room<uint8_t>(&w, rdkv_cuda_queries_bytes(&w.cfg, capacity)),
                      capacity, &l);
    l.arena = room<uint8_t>(&w, arena_bytes), l.arena_bytes = arena_bytes;
    for (int i = 0; i < LAYERS; ++i) {
      uint16_t *k = room<uint16_t>(&w, tokens * KEY), *v = room<uint16_t>(&w, tokens * KEY);
      uint16_t *q = room<uint16_t>(&w, tokens * QUERY);
      CUDA(cudaMemcpy(k, problems[b]->raw[i][0], tokens * KEY * 2, cudaMemcpyHostToDevice));
      CUDA(cudaMemcpy(v, problems[b]->raw[i][1], tokens * KEY * 2, cudaMemcpyHostToDevice));
      CUDA(cudaMemcpy(q, problems[b]->raw[i][2], tokens * QUERY * 2, cudaMemcpyHostToDevice));
      w.from.k[b][i] = k, w.from.v[b][i] = v, w.from.q[b][i] = q;
    }
  }
  w.batch.sequences = room<rdkv_cuda_sequence>(&w, n), w.batch.live = room<rdkv_cuda_live>(&w, n);
  w.batch.tail_tokens = room<uint32_t>(&w, n, 0), w.cursor = room<uint32_t>(&w, n, 0);
  CUDA(cudaMemcpy(w.batch.sequences, sequences.data(), n * sizeof sequences[0],
                  cudaMemcpyHostToDevice));
  CUDA(cudaMemcpy(w.batch.live, lives.data(), n * sizeof lives[0], cudaMemcpyHostToDevice));
  w.q = room<uint16_t>(&w, n * QUERY), w.k = room<uint16_t>(&w, n * KEY);
  w.v = room<uint16_t>(&w, n * KEY), w.out = room<uint16_t>(&w, n * OUT);
  w.lse = room<float>(&w, n * Q_HEADS), w.log = room<uint16_t>(&w, n * tokens * LAYERS * OUT);
  w.plan = room<uint8_t>(&w, rdkv_cuda_plan_bytes(&w.cfg));
  w.workspace = room<uint8_t>(&w, rdkv_cuda_workspace_bytes(&w.cfg));
  w.memory_bytes = rdkv_cuda_sequence_workspace(&w.block, &w.cfg, &w.blocks);
  CHECK(w.memory_bytes > 0);
  w.memory = room<uint8_t>(&w, w.memory_bytes);
  CUDA(cudaStreamCreateWithFlags(&w.stream, cudaStreamNonBlocking));
  CUDA(cudaDeviceSynchronize());
  CUDA(rdkv_cuda_plan(&w.cfg, w.batch.sequences, w.batch.tail_tokens, w.plan, w.stream));
  cudaGraph_t graph;
  CUDA(cudaStreamBeginCapture(w.stream, cudaStreamCaptureModeGlobal));
  forward(&w), compress(&w);
  CUDA(cudaStreamEndCapture(w.stream, &graph));
  CUDA(cudaGraphInstantiate(&w.step, graph, 0));
  CUDA(cudaGraphDestroy(graph));
  return w;
}

static void free_world(world *w) {
  CUDA(cudaStreamSynchronize(w->stream));
  CUDA(cudaGraphExecDestroy(w->step)), CUDA(cudaStreamDestroy(w->stream));
  for (void *p : w->owned) CUDA(cudaFree(p));
}

/* Whether a sequence has a complete block. */
static bool complete(const world *w) {
  const rdkv_cuda_blocks &k = w->blocks;
  const uint32_t least = k.block + (k.recent > k.block ? k.recent : k.block);
  const size_t n = static_cast<size_t>(w->cfg.batch);
  CUDA(cudaStreamSynchronize(w->stream));
  const std::vector<rdkv_cuda_live> lives = fetched(w->batch.live, n);
  const std::vector<uint32_t> tails = fetched(w->batch.tail_tokens, n);
  for (size_t b = 0; b < n; ++b)
    if (lives[b].status == RDKV_OK && tails[b] >= least) return true;
  return false;
}

static void replay(world *w, uint32_t n) {
  for (uint32_t i = 0; i < n; ++i) {
    if (!plain_run) {
      CUDA(cudaGraphLaunch(w->step, w->stream));
      continue;
    }
    forward(w);
    while (complete(w)) compress(w);
  }
  CUDA(cudaStreamSynchronize(w->stream));
}

static rdkv_cuda_live live_of(const world *w, int b) { return fetched(w->batch.live + b, 1)[0]; }
static uint32_t tail_of(const world *w, int b) { return fetched(w->batch.tail_tokens + b, 1)[0]; }
static uint32_t segments_of(const world *w, int b) {
  return fetched(w->batch.sequences + b, 1)[0].n_segments;
}

/* ---- the same on the host -------------------------------------------------------------------- */

struct host {
  rdkv_sequence s;
  void *memory, *arena, *scratch, *work;
  size_t scratch_bytes, work_bytes;
};

static host make_host(const problem *p, const rdkv_config *block, uint32_t block_tokens,
                      uint32_t capacity, size_t arena_bytes) {
  host h;
  const size_t bytes = rdkv_sequence_bytes(&p->cfg, MAX_SEGMENTS, capacity, RDKV_F16, 1);
  h.memory = mem_new(bytes), h.arena = mem_new(arena_bytes);
  CHECK_OK(rdkv_sequence_init(&p->cfg, MAX_SEGMENTS, capacity, RDKV_F16, 1, h.memory, bytes, &h.s));
  h.work_bytes = rdkv_attend_scratch(&p->cfg), h.work = mem_new(h.work_bytes);
  h.scratch_bytes = rdkv_sequence_scratch(block, block_tokens);
  h.scratch = mem_new(h.scratch_bytes);
  h.s.arena = static_cast<uint8_t *>(h.arena), h.s.arena_bytes = arena_bytes;
  return h;
}

static void free_host(host *h) {
  mem_free(h->memory), mem_free(h->arena), mem_free(h->scratch), mem_free(h->work);
}

static rdkv_tensor row(rdkv_tensor x, uint32_t at) {
  x.data = static_cast<const char *>(x.data) + 2 * x.token_stride * static_cast<ptrdiff_t>(at);
  return x;
}

static void host_step(host *h, const problem *p, uint32_t t, float *out) {
  for (int l = 0; l < LAYERS; l++) {
    CHECK_OK(rdkv_tail_append(&h->s.tail, l, row(p->kv[l].k, t), row(p->kv[l].v, t), 1));
    CHECK_OK(rdkv_sequence_attend(&p->cfg, &h->s, l, p->q[l] + t * QUERY, out + l * OUT, nullptr,
                                  h->work, h->work_bytes));
  }
}

/* The largest distance between a logged output and one of rdkv.h, relative to the latter's size. */
static double apart(const uint16_t *log, const float *out) {
  double worst = 0;
  for (int h = 0; h < LAYERS * Q_HEADS; ++h) {
    double d2 = 0, o2 = 0;
    for (int d = 0; d < V_DIM; ++d) {
      const double o = static_cast<double>(out[h * V_DIM + d]);
      const double e = static_cast<double>(from_half(log[h * V_DIM + d])) - o;
      d2 += e * e, o2 += o * o;
    }
    const double x = sqrt(d2 / o2);
    worst = x > worst || x != x ? x : worst;
  }
  return worst;
}

static problem tokens(uint32_t n_tokens, uint64_t seed) {
  rdkv_config c = config_of(Q_HEADS, KV_HEADS, K_DIM, V_DIM);
  c.n_layers = LAYERS, c.window = static_cast<int32_t>(n_tokens), c.keep = 0.4, c.pool = 1;
  if (small_run) c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 2e-6; /* which takes less time */
  return problem_make(&c, n_tokens, RDKV_F16, DENSE, seed);
}

/* ---- blocks ---------------------------------------------------------------------------------- */

/* Step by step the same lengths as on the host, the same shape of blocks, and outputs that agree
   with the host's attention to what lies on the device. */
static void block_by_block() {
  const uint32_t n = small_run ? 40 : 400, block = small_run ? 16 : 32, capacity = 80;
  const uint32_t recent = small_run ? 20 : 40;
  problem p[3];
  problem *all[3];
  for (int b = 0; b < 3; ++b) p[b] = tokens(n, 40 + static_cast<uint64_t>(b)), all[b] = &p[b];
  rdkv_config c = p[0].cfg;
  world w = make_world(all, 3, &c, {block, recent, 0, 0, 2}, capacity, 1 << 20);
  replay(&w, n);
  const std::vector<uint16_t> log = fetched(w.log, 3 * static_cast<size_t>(n) * LAYERS * OUT);
  for (int b = 0; b < 3; ++b) {
    host h = make_host(&p[b], &c, block, capacity, 1 << 20);
    host down = make_host(&p[b], &c, block, capacity, 1 << 20);
    float out[LAYERS * OUT];
    double worst = 0;
    for (uint32_t t = 0; t < n; ++t) {
      host_step(&h, &p[b], t, out);
      CHECK_OK(rdkv_sequence_compress(&c, &h.s, block, recent, h.scratch, h.scratch_bytes));
      const double e = apart(&log[(static_cast<size_t>(b) * n + t) * LAYERS * OUT], out);
      if (e > worst || e != e) worst = e;
    }
    test_where("sequence %d", b);
    /* widths may differ where scores, off by rounding, are near a tie */
    printf("   sequence %d: outputs at most %.2e off the host's\n", b, worst);
    CHECK_LE(worst, 0.05);
    const rdkv_cuda_live l = live_of(&w, b);
    CHECK_EQ(l.status, RDKV_OK);
    CHECK_EQ(segments_of(&w, b), h.s.n_segments);
    CHECK_EQ(tail_of(&w, b), h.s.tail.n_tokens[0]);
    CHECK_EQ(l.tail_begin, h.s.tail_begin);
    CUDA(rdkv_cuda_sequence_download(&w.cfg, &w.batch, b, &down.s, w.stream));
    CHECK_EQ(down.s.n_segments, h.s.n_segments);
    long other = 0, slots = 0, same = 0, parts = 0;
    for (int i = 0; i < down.s.n_segments && i < h.s.n_segments; ++i) {
      const rdkv_header *x = down.s.segments[i].header, *y = h.s.segments[i].header;
      rdkv_segment s;
      CHECK_OK(rdkv_open(down.s.segments[i].block, static_cast<size_t>(x->total_bytes), RDKV_VERIFY,
                         &s));
      CHECK_EQ(x->token_begin, y->token_begin);
      CHECK_EQ(x->n_tokens, y->n_tokens);
      CHECK(x->n_layers == y->n_layers && x->n_q_heads == y->n_q_heads &&
            x->n_kv_heads == y->n_kv_heads && x->first_layer == y->first_layer &&
            x->window == y->window && x->pool == y->pool && x->profile == y->profile);
      const size_t tables = static_cast<size_t>(down.s.segments[i].records[0].table);
      same += x->total_bytes == y->total_bytes && /* records say predictions, of rounded scores */
              !memcmp(down.s.segments[i].block + tables, h.s.segments[i].block + tables,
                      static_cast<size_t>(x->total_bytes) - tables);
      ++parts;
      for (int r = 0; r < LAYERS * KV_HEADS; ++r)
        for (int k = 0; k < 4; ++k) {
          const long a = down.s.segments[i].records[r].n_tokens[k];
          const long e = h.s.segments[i].records[r].n_tokens[k];
          other += a > e ? a - e : e - a, slots += e;
        }
    }
    printf("   %ld of %ld blocks the same bytes, %ld of %ld tokens of another width\n", same, parts,
           other, slots);
    CHECK_LE(other, 0.02 * static_cast<double>(slots));
    CHECK(2 * same >= parts);
    CHECK_EQ(down.s.tail.n_tokens[1], h.s.tail.n_tokens[1]);
    CHECK_EQ(down.s.queries.n_tokens[1], h.s.queries.n_tokens[1]);
    free_host(&h), free_host(&down);
  }
  free_world(&w);
  for (int b = 0; b < 3; ++b) problem_free(&p[b]);
}

/* ---- what attention gives, against the host over what is on the device ----------------------- */

/* One step more of sequence b, which the log then has at token t, against attention of rdkv.h over
   the downloaded sequence, token appended: to the rounding of the output to fp16. */
static void check_step(world *w, const problem *p, int b, uint32_t t, const char *where) {
  host h = make_host(p, &w->block, w->blocks.block, w->capacity, w->arena_bytes);
  float out[LAYERS * OUT];
  const uint16_t *log = w->log + (static_cast<size_t>(b) * w->n_tokens + t) * LAYERS * OUT;
  CUDA(rdkv_cuda_sequence_download(&w->cfg, &w->batch, b, &h.s, w->stream));
  CUDA(cudaMemset(w->log + (static_cast<size_t>(b) * w->n_tokens + t) * LAYERS * OUT, 0xff,
                  LAYERS * OUT * 2));
  CUDA(cudaDeviceSynchronize());
  replay(w, 1);
  host_step(&h, p, t, out);
  test_where("%s, sequence %d, token %u", where, b, t);
  CHECK_LE(apart(fetched(log, LAYERS * OUT).data(), out), 2e-3);
  free_host(&h);
}

static void set_cursor(world *w, const std::vector<uint32_t> &cursor) {
  send(w->cursor, cursor.data(), cursor.size());
}

/* A graph that is replayed: at every stage of a block's life attention is that of the cache. */
static void attention() {
  if (small_run) return; /* nothing in it that other tests do not run */
  const uint32_t n = 200;
  problem p[2] = {tokens(n, 50), tokens(n, 51)}, *all[2] = {&p[0], &p[1]};
  rdkv_config c = p[0].cfg;
  c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 2e-6;
  world w = make_world(all, 2, &c, {16, 0, 0, 0, 1}, 40, 1 << 20);
  uint32_t done = 0;
  for (uint32_t t = 1; t < n; t += 13) {
    replay(&w, t - done);
    check_step(&w, &p[0], 0, t, "attention"), done = t + 1;
  }
  CHECK(segments_of(&w, 1) >= 2);
  free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

/* Sequence 0 of the device is the host's, to the byte: but for the predictions in its segments'
   records, which are of rounded scores, and the checksum over them. */
static void check_same(world *w, const host *h, host *down, const char *where) {
  CUDA(rdkv_cuda_sequence_download(&w->cfg, &w->batch, 0, &down->s, w->stream));
  test_where("%s, %d segments", where, h->s.n_segments);
  const uint32_t tail = h->s.tail.n_tokens[0];
  CHECK_EQ(down->s.n_segments, h->s.n_segments);
  CHECK_EQ(down->s.tail_begin, h->s.tail_begin);
  CHECK_EQ(down->s.tail.n_tokens[0], tail);
  for (int i = 0; i < h->s.n_segments && i < down->s.n_segments; ++i) {
    const rdkv_segment &x = down->s.segments[i], &y = h->s.segments[i];
    const size_t tables = static_cast<size_t>(x.records[0].table);
    CHECK_EQ(x.header->total_bytes, y.header->total_bytes);
    CHECK(!memcmp(x.block + tables, y.block + tables,
                  static_cast<size_t>(y.header->total_bytes) - tables));
    CHECK_EQ(x.header->body_sum, y.header->body_sum);
    CHECK_EQ(x.header->token_begin, y.header->token_begin);
    CHECK(!memcmp(&x.header->first_layer, &y.header->first_layer,
                  offsetof(rdkv_header, lambda) - offsetof(rdkv_header, first_layer)));
  }
  for (int l = 0; l < LAYERS && tail > 0; ++l) {
    for (int head = 0; head < Q_HEADS; ++head)
      for (int is_v = 0; is_v < 2; ++is_v) {
        const rdkv_tail *x[2] = {&down->s.tail, &down->s.queries};
        const rdkv_tail *y[2] = {&h->s.tail, &h->s.queries};
        for (int i = head < KV_HEADS ? 0 : 1; i < 2; ++i)
          CHECK(!memcmp(rdkv__tail_rows(x[i], l, head, is_v), rdkv__tail_rows(y[i], l, head, is_v),
                        tail * K_DIM * 2));
      }
    CHECK(!memcmp(rdkv__lse(&down->s, l, 0), rdkv__lse(&h->s, l, 0),
                  tail * h->s.lse_stride * sizeof(float)));
  }
}

/* A chunked prompt: rows of K, V, queries, outputs and log-sum-exps are written to the device by
   the chunk; a chunk is packed once the next one is there, and at the end the rest. From the same
   rows come the same bytes as on the host, by every kind of budget; what is left of the tail is the
   same too. */
static void chunks() {
  const uint32_t n = 200;
  const rdkv_pin_reason any = RDKV_PIN_OTHER;
  const rdkv_pin pins[] = {{0, 4, 16, any, 0}, {25, 60, 8, any, 0.3f}, {90, 1000, 2, any, 0.5f}};
  problem p = tokens(n, 55), *all[1] = {&p};
  float out[LAYERS * OUT];
  for (int kind = 0; kind < 6; ++kind) {
    if (small_run && kind != 1 && kind != 4) continue;
    const uint32_t chunk = kind == 4 ? 32 : 64;
    rdkv_config c = p.cfg;
    if (!small_run) c.scope = RDKV_SCOPE_MODEL;
    if (kind == 1) c.scope = RDKV_SCOPE_LAMBDA, c.lambda = 1e-6;
    if (kind == 2) c.scope = RDKV_SCOPE_HEAD, c.budget_bytes = 20000, c.pool = 5;
    if (kind == 3) {
      memset(&c, 0, sizeof c);
      c.n_layers = LAYERS, c.n_q_heads = Q_HEADS, c.n_kv_heads = KV_HEADS, c.k_dim = K_DIM;
      c.profile = RDKV_PAPER, c.keep = 0.3;
    }
    if (kind == 4) c.pins = pins, c.n_pins = 3, c.keep = 0.95;
    if (kind == 5) c.max_error = 0.02;
    CHECK_OK(rdkv_resolve(&c, &c));
    world w = make_world(all, 1, &c, {chunk, 0, 0, 0, 1}, 160, 1 << 20);
    host h = make_host(&p, &c, chunk, 160, 1 << 20), down = make_host(&p, &c, chunk, 160, 1 << 20);
    for (uint32_t t = 0; t < 140; ++t) host_step(&h, &p, t, out);
    CUDA(rdkv_cuda_sequence_upload(&w.cfg, &h.s, &w.batch, 0, w.stream));
    while (complete(&w)) compress(&w);
    CHECK_OK(rdkv_sequence_compress(&c, &h.s, chunk, 0, h.scratch, h.scratch_bytes));
    char where[40];
    snprintf(where, sizeof where, "kind %d", kind);
    check_same(&w, &h, &down, where);
    CHECK_EQ(live_of(&w, 0).status, RDKV_OK);
    CHECK_EQ(h.s.n_segments, kind == 4 ? 3 : 1);
    CUDA(rdkv_cuda_sequence_flush(&c, &w.cfg, &w.batch, &w.blocks, 0, w.plan, w.memory,
                                  w.memory_bytes, w.stream));
    const rdkv_status st = rdkv_sequence_flush(&c, &h.s, chunk, h.scratch, h.scratch_bytes);
    snprintf(where, sizeof where, "kind %d, flushed", kind);
    check_same(&w, &h, &down, where);
    CHECK_EQ(live_of(&w, 0).status, st);
    if (kind == 1 || kind == 2) CHECK_EQ(h.s.tail.n_tokens[0], 0);
    send(w.cursor, std::vector<uint32_t>(1, 140).data(), 1);
    check_step(&w, &p, 0, 140, "chunks");
    free_host(&h), free_host(&down), free_world(&w);
  }
  problem_free(&p);
}

/* All that the batch holds on the device, so that a state can be gone back to. */
struct snapshot {
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<void *> at;
};
static void take_memory(snapshot *s, void *at, size_t bytes) {
  s->at.push_back(at);
  s->bytes.push_back(fetched(static_cast<uint8_t *>(at), bytes));
}
static snapshot take(const world *w) {
  snapshot s;
  const size_t n = static_cast<size_t>(w->cfg.batch);
  const std::vector<rdkv_cuda_sequence> sequences = fetched(w->batch.sequences, n);
  const std::vector<rdkv_cuda_live> lives = fetched(w->batch.live, n);
  for (size_t b = 0; b < n; ++b) {
    take_memory(&s, sequences[b].k, LAYERS * KV_HEADS * (K_DIM + V_DIM) * 2 * w->capacity);
    take_memory(&s, const_cast<const void **>(sequences[b].segments), MAX_SEGMENTS * 8);
    take_memory(&s, lives[b].q, rdkv_cuda_queries_bytes(&w->cfg, w->capacity));
    take_memory(&s, lives[b].arena, w->arena_bytes);
  }
  take_memory(&s, w->batch.sequences, n * sizeof sequences[0]);
  take_memory(&s, w->batch.live, n * sizeof lives[0]);
  take_memory(&s, w->batch.tail_tokens, n * 4), take_memory(&s, w->cursor, n * 4);
  take_memory(&s, w->plan, rdkv_cuda_plan_bytes(&w->cfg));
  return s;
}
static void put(const snapshot &s) {
  for (size_t i = 0; i < s.at.size(); ++i)
    CUDA(cudaMemcpy(s.at[i], s.bytes[i].data(), s.bytes[i].size(), cudaMemcpyHostToDevice));
}

/* The same steps from the same state, blocks made on the way, leave the same bytes every time,
   whatever the workspaces held. */
static void replays() {
  if (small_run) return; /* as in attention */
  const uint32_t n = 90, from = 40;
  problem p[2] = {tokens(n, 60), tokens(n, 61)}, *all[2] = {&p[0], &p[1]};
  world w = make_world(all, 2, &p[0].cfg, {16, 0, 0, 0, 1}, 34, 1 << 19);
  replay(&w, from);
  const snapshot start = take(&w);
  snapshot end;
  long other = 0;
  for (int round = 0; round < 100; ++round) {
    put(start);
    CUDA(cudaMemset(w.memory, round % 2 ? 0xff : 0, w.memory_bytes));
    CUDA(cudaMemset(w.workspace, round % 2 ? 0 : 0xff, rdkv_cuda_workspace_bytes(&w.cfg)));
    CUDA(cudaDeviceSynchronize());
    replay(&w, n - from);
    snapshot now = take(&w);
    now.bytes.push_back(
        fetched(reinterpret_cast<uint8_t *>(w.log), 2 * static_cast<size_t>(n) * LAYERS * OUT * 2));
    if (round == 0)
      end = now;
    else
      other += now.bytes != end.bytes;
  }
  CHECK_EQ(other, 0);
  CHECK(segments_of(&w, 0) >= 4);
  /* without a graph: the same, one turn at a time */
  put(start);
  CUDA(cudaDeviceSynchronize());
  for (uint32_t t = from; t < n; ++t) {
    forward(&w);
    CUDA(cudaStreamSynchronize(w.stream));
    if (tail_of(&w, 0) >= 32)
      for (int b = 0; b < 2; ++b) compress(&w);
  }
  CUDA(cudaStreamSynchronize(w.stream));
  snapshot now = take(&w);
  now.bytes.push_back(
      fetched(reinterpret_cast<uint8_t *>(w.log), 2 * static_cast<size_t>(n) * LAYERS * OUT * 2));
  for (size_t i = 0; i < now.bytes.size(); ++i) {
    if (i + 2 == now.bytes.size()) continue; /* plans that came between leave traces beside this */
    test_where("array %d without a graph", static_cast<int>(i));
    CHECK(now.bytes[i] == end.bytes[i]);
  }
  compress(&w); /* nothing is complete: nothing happens */
  CUDA(cudaStreamSynchronize(w.stream));
  const snapshot again = take(&w);
  for (size_t i = 0; i + 1 < again.bytes.size(); ++i) CHECK(again.bytes[i] == now.bytes[i]);
  free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

static void go_back(world *w, uint64_t a, uint64_t b) {
  const uint64_t to[2] = {a, b};
  uint64_t *device = room<uint64_t>(w, 2);
  send(device, to, 2);
  CUDA(rdkv_cuda_sequence_rollback(&w->cfg, &w->batch, device, w->stream));
  CUDA(cudaStreamSynchronize(w->stream));
}

static void set_status(world *w, int b, uint32_t status) {
  send(&w->batch.live[b].status, &status, 1);
}

/* Back within the tail and ahead again: the same bits. To a boundary between segments: those after
   it are gone and their room is free. Into a segment: an error, and nothing else. */
static void rollback() {
  const uint32_t less = small_run ? 3 : 0, skip = 16 * less, n = 120 - skip; /* blocks, tokens */
  const uint32_t back = small_run ? 16 : 48, ahead = small_run ? 8 : 40;
  problem p[2] = {tokens(n, 70), tokens(n, 71)}, *all[2] = {&p[0], &p[1]};
  world w = make_world(all, 2, &p[0].cfg, {16, 0, 0, 0, 1}, 40, 1 << 19);
  const size_t log_bytes = 2 * static_cast<size_t>(n) * LAYERS * OUT;
  replay(&w, 100 - skip); /* 5 segments, 20 dense */
  const std::vector<uint16_t> want = fetched(w.log, log_bytes);
  CHECK_EQ(segments_of(&w, 0), 5 - less);
  CHECK_EQ(tail_of(&w, 0), 20);
  go_back(&w, 97 - skip, UINT64_MAX);
  CHECK_EQ(tail_of(&w, 0), 17);
  CHECK_EQ(tail_of(&w, 1), 20);
  go_back(&w, 100 - skip, 101 - skip);
  CHECK_EQ(live_of(&w, 0).status, RDKV_ERR_ARGUMENT); /* more than there are */
  CHECK_EQ(live_of(&w, 1).status, RDKV_ERR_ARGUMENT);
  set_status(&w, 0, RDKV_OK), set_status(&w, 1, RDKV_OK);
  go_back(&w, 97 - skip, 97 - skip);
  CUDA(cudaMemset(w.log, 0xff, log_bytes * 2));
  CUDA(cudaDeviceSynchronize());
  set_cursor(&w, {97 - skip, 97 - skip});
  replay(&w, 3);
  const std::vector<uint16_t> got = fetched(w.log, log_bytes);
  for (size_t b = 0; b < 2; ++b)
    CHECK(!memcmp(&got[(b * n + n - 23) * LAYERS * OUT], &want[(b * n + n - 23) * LAYERS * OUT],
                  3 * LAYERS * OUT * 2));
  const uint64_t used = live_of(&w, 0).arena_used;
  go_back(&w, 72 - skip, 79 - skip);
  CHECK_EQ(live_of(&w, 0).status, RDKV_ERR_GONE);
  CHECK_EQ(live_of(&w, 1).status, RDKV_ERR_GONE);
  CHECK_EQ(segments_of(&w, 0), 5 - less);
  CHECK_EQ(tail_of(&w, 0), 20);
  CHECK_EQ(live_of(&w, 0).arena_used, used);
  set_status(&w, 0, RDKV_OK), set_status(&w, 1, RDKV_OK);
  go_back(&w, back, back);
  CHECK_EQ(live_of(&w, 0).status, RDKV_OK);
  CHECK_EQ(segments_of(&w, 0), back / 16);
  CHECK_EQ(tail_of(&w, 0), 0);
  CHECK_EQ(live_of(&w, 0).tail_begin, back);
  CHECK(live_of(&w, 0).arena_used < used);
  CUDA(rdkv_cuda_plan(&w.cfg, w.batch.sequences, w.batch.tail_tokens, w.plan, w.stream));
  set_cursor(&w, {back, back});
  replay(&w, ahead);
  check_step(&w, &p[0], 0, back + ahead, "after going back");
  CHECK_EQ(segments_of(&w, 0), back / 16 + ahead / 32);
  free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

/* The fork has its parent's tokens and goes its own way; neither disturbs the other. */
static void fork() {
  const uint32_t n = 140, at = small_run ? 36 : 60, ahead = small_run ? 14 : 40;
  problem p[2] = {tokens(n, 80), tokens(n, 81)}, *all[2] = {&p[0], &p[1]};
  world w = make_world(all, 2, &p[0].cfg, {16, 0, 0, 0, 1}, 40, 1 << 19);
  replay(&w, at);
  CUDA(rdkv_cuda_sequence_fork(&w.cfg, &w.batch, 0, 1, w.stream));
  CUDA(rdkv_cuda_plan(&w.cfg, w.batch.sequences, w.batch.tail_tokens, w.plan, w.stream));
  CUDA(cudaStreamSynchronize(w.stream));
  CHECK_EQ(live_of(&w, 1).status, RDKV_OK);
  CHECK_EQ(segments_of(&w, 1), segments_of(&w, 0));
  CHECK_EQ(live_of(&w, 1).arena_used, 0);
  CHECK_EQ(live_of(&w, 0).arena_shared, live_of(&w, 0).arena_used);
  host before = make_host(&p[0], &w.block, 16, w.capacity, 1 << 19);
  host after = make_host(&p[0], &w.block, 16, w.capacity, 1 << 19);
  CUDA(rdkv_cuda_sequence_download(&w.cfg, &w.batch, 1, &before.s, w.stream));
  const int shared = before.s.n_segments;
  /* the parent goes back to before a shared segment and on with other tokens */
  go_back(&w, 16, UINT64_MAX);
  CUDA(rdkv_cuda_plan(&w.cfg, w.batch.sequences, w.batch.tail_tokens, w.plan, w.stream));
  set_cursor(&w, {at + 20, at});
  replay(&w, ahead);
  CUDA(rdkv_cuda_sequence_download(&w.cfg, &w.batch, 1, &after.s, w.stream));
  CHECK(after.s.n_segments > shared);
  for (int i = 0; i < shared; ++i) {
    const rdkv_segment &x = before.s.segments[i], &y = after.s.segments[i];
    CHECK(x.header->total_bytes == y.header->total_bytes &&
          !memcmp(x.block, y.block, static_cast<size_t>(x.header->total_bytes)));
  }
  check_step(&w, &p[1], 1, at + ahead, "fork");
  check_step(&w, &p[0], 0, at + 20 + ahead + 1, "parent");
  /* no room: an error of the fork, and nothing else */
  const uint32_t tail = tail_of(&w, 1);
  rdkv_cuda_sequence s = fetched(w.batch.sequences + 1, 1)[0];
  const uint32_t capacity = s.capacity;
  s.capacity = 1;
  send(w.batch.sequences + 1, &s, 1);
  CUDA(rdkv_cuda_sequence_fork(&w.cfg, &w.batch, 0, 1, w.stream));
  CUDA(cudaStreamSynchronize(w.stream));
  CHECK_EQ(live_of(&w, 1).status, RDKV_ERR_FULL);
  CHECK_EQ(tail_of(&w, 1), tail);
  s.capacity = capacity;
  send(w.batch.sequences + 1, &s, 1);
  free_host(&before), free_host(&after), free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

static int append_bytes(void *user, const void *data, size_t bytes) {
  std::vector<uint8_t> *to = static_cast<std::vector<uint8_t> *>(user);
  to->insert(to->end(), static_cast<const uint8_t *>(data),
             static_cast<const uint8_t *>(data) + bytes);
  return 0;
}

/* Device, file, another sequence on the device, file: the same file; and it goes on from there. */
static void save_and_load() {
  const uint32_t n = 140;
  problem p[2] = {tokens(n, 90), tokens(n, 91)}, *all[2] = {&p[0], &p[1]};
  world w = make_world(all, 2, &p[0].cfg, {16, 20, 0, 0, 1}, 48, 1 << 19);
  const uint32_t at = small_run ? 40 : 90, ahead = small_run ? 14 : 30;
  std::vector<uint8_t> file, again;
  host a = make_host(&p[0], &w.block, 16, w.capacity, 1 << 19);
  host b = make_host(&p[0], &w.block, 16, w.capacity, 1 << 19);
  host c = make_host(&p[0], &w.block, 16, w.capacity, 1 << 19);
  replay(&w, at);
  CUDA(rdkv_cuda_sequence_download(&w.cfg, &w.batch, 0, &a.s, w.stream));
  CHECK(a.s.n_segments >= (small_run ? 1 : 3) && a.s.tail.n_tokens[0] > 0);
  CHECK_OK(rdkv_save(&a.s, append_bytes, &file));
  uint8_t *aligned = static_cast<uint8_t *>(mem_new(file.size()));
  memcpy(aligned, file.data(), file.size());
  CHECK_OK(rdkv_load(&p[0].cfg, aligned, file.size(), RDKV_VERIFY, &b.s));
  CUDA(rdkv_cuda_sequence_upload(&w.cfg, &b.s, &w.batch, 1, w.stream));
  CUDA(rdkv_cuda_sequence_download(&w.cfg, &w.batch, 1, &c.s, w.stream));
  CHECK_OK(rdkv_save(&c.s, append_bytes, &again));
  CHECK(file == again);
  CUDA(rdkv_cuda_plan(&w.cfg, w.batch.sequences, w.batch.tail_tokens, w.plan, w.stream));
  replay(&w, ahead);
  check_step(&w, &p[1], 1, at + ahead, "loaded");
  CHECK(segments_of(&w, 1) > static_cast<uint32_t>(a.s.n_segments));
  CHECK_EQ(live_of(&w, 1).status, RDKV_OK);
  /* what does not fit is refused */
  rdkv_cuda_live l = live_of(&w, 0);
  const uint64_t bytes = l.arena_bytes;
  l.arena_bytes = 128;
  send(w.batch.live, &l, 1);
  CHECK(rdkv_cuda_sequence_upload(&w.cfg, &b.s, &w.batch, 0, w.stream) == cudaErrorInvalidValue);
  l.arena_bytes = bytes;
  send(w.batch.live, &l, 1);
  a.s.arena_bytes = 128;
  CHECK(rdkv_cuda_sequence_download(&w.cfg, &w.batch, 0, &a.s, w.stream) == cudaErrorInvalidValue);
  CHECK_EQ(a.s.n_segments, 0);
  mem_free(aligned), free_host(&a), free_host(&b), free_host(&c), free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

/* No room in the arena: that sequence says so, keeps its tokens dense, and the other goes on. With
   room and its status cleared it catches up. */
static void no_room() {
  const uint32_t n = 120, at = small_run ? 36 : 70;
  problem p[2] = {tokens(n, 95), tokens(n, 96)}, *all[2] = {&p[0], &p[1]};
  world w = make_world(all, 2, &p[0].cfg, {16, 0, 0, 0, 1}, 80, 1 << 19);
  rdkv_cuda_live l = live_of(&w, 0);
  l.arena_bytes = 4096 + 128; /* of one block, about */
  send(w.batch.live, &l, 1);
  replay(&w, at);
  CHECK_EQ(live_of(&w, 0).status, RDKV_ERR_FULL);
  CHECK_EQ(live_of(&w, 1).status, RDKV_OK);
  CHECK_EQ(tail_of(&w, 0) + 16 * segments_of(&w, 0), at);
  CHECK_EQ(segments_of(&w, 1), at / 16 - 1);
  check_step(&w, &p[0], 0, at, "full");
  l = live_of(&w, 0);
  l.arena_bytes = 1 << 19, l.status = RDKV_OK;
  send(w.batch.live, &l, 1);
  replay(&w, 1); /* all that is complete at once */
  CHECK_EQ(segments_of(&w, 0), segments_of(&w, 1));
  CHECK_EQ(tail_of(&w, 0), tail_of(&w, 1));
  check_step(&w, &p[0], 0, at + 2, "room again");
  free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

/* Four segments of equal length become one, four of those again: what they held, at the sum of
   their budgets. Attention stays that of the cache. */
static void merging() {
  const uint32_t n = small_run ? 80 : 320, fan = small_run ? 2 : 4, all_of = 16 * fan;
  problem p[2] = {tokens(n, 98), tokens(n, 99)}, *all[2] = {&p[0], &p[1]};
  if (!small_run) p[0].cfg.scope = RDKV_SCOPE_MODEL;
  world w = make_world(all, small_run ? 1 : 2, &p[0].cfg, {16, 0, fan, 256, 2}, 40, 1 << 20);
  host h = make_host(&p[0], &w.block, 16, w.capacity, 1 << 20);
  replay(&w, all_of + 31); /* `fan` blocks and 31 tokens */
  CHECK_EQ(live_of(&w, 0).status, RDKV_OK);
  CHECK_EQ(segments_of(&w, 0), 1);
  CHECK_EQ(tail_of(&w, 0), 31);
  CUDA(rdkv_cuda_sequence_download(&w.cfg, &w.batch, 0, &h.s, w.stream));
  rdkv_segment s;
  CHECK_OK(rdkv_open(h.s.segments[0].block,
                     static_cast<size_t>(h.s.segments[0].header->total_bytes), RDKV_VERIFY, &s));
  CHECK_EQ(s.header->n_tokens, all_of);
  CHECK_EQ(s.header->token_begin, 0);
  CHECK_EQ(live_of(&w, 0).arena_used, s.header->total_bytes);
  if (!small_run) { /* at a lambda a block takes what it takes */
    const double dense = all_of * LAYERS * KV_HEADS * (K_DIM + V_DIM) * 2;
    CHECK_LE(s.header->total_bytes, 0.4 * dense);
    CHECK(s.header->total_bytes > 0.3 * dense);
  }
  check_step(&w, &p[0], 0, all_of + 31, "merged");
  if (!small_run) {
    replay(&w, 191);
    CHECK_EQ(live_of(&w, 0).status, RDKV_OK);
    CHECK_EQ(segments_of(&w, 0), 1); /* 16 blocks in two steps */
    check_step(&w, &p[1], 1, 287, "merged twice");
  }
  free_host(&h), free_world(&w);
  problem_free(&p[0]), problem_free(&p[1]);
}

/* The same by config.max_error. */
static void merging_by_error() {
  if (small_run) return;
  problem p = tokens(110, 98), *all[1] = {&p};
  p.cfg.max_error = 0.05;
  world w = make_world(all, 1, &p.cfg, {16, 0, 4, 256, 1}, 40, 1 << 20);
  replay(&w, 95);
  CHECK_EQ(live_of(&w, 0).status, RDKV_OK);
  CHECK_EQ(segments_of(&w, 0), 1);
  check_step(&w, &p, 0, 95, "merged by error");
  free_world(&w);
  problem_free(&p);
}

int main(int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "small"))
      small_run = true;
    else if (!strcmp(argv[i], "plain"))
      plain_run = true;
    else
      wanted = argv[i];
  }
  TEST(block_by_block);
  TEST(attention);
  TEST(chunks);
  TEST(replays);
  TEST(rollback);
  TEST(fork);
  TEST(save_and_load);
  TEST(no_room);
  TEST(merging);
  TEST(merging_by_error);
  return test_done();
}
