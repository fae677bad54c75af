/* rdkv_cuda.cuh - v0.1 - decode on the GPU from a KV cache packed by rdkv.h

   USE: in ONE .cu file, after or beside RDKV_IMPLEMENTATION,
       #define RDKV_CUDA_IMPLEMENTATION
       #include "rdkv_cuda.cuh"
   and in all others, C files too, just the include. Needs the CUDA Toolkit (runtime, fp16 and bf16
   headers) and a GPU of compute capability 8.0 or higher. nvcc -O3 -arch=native.

   PROGRAM: a layer's attention for a batch of sequences.

       rdkv_cuda_config cfg = {0};
       cfg.n_layers = 32, cfg.batch = 1, cfg.n_q_heads = 32, cfg.n_kv_heads = 8, cfg.k_dim = 128;
       cfg.dtype = RDKV_F16, cfg.tail_dtype = RDKV_F16;
       rdkv_cuda_resolve(&cfg, &cfg);                         // host only, once
       rdkv_cuda_upload(&segment, device_block, stream);      // format v1 as it is
       ... fill sequences[batch] (below) and copy them to the device ...
       rdkv_cuda_plan(&cfg, sequences, tail_tokens, plan, stream);   // now and then
       for (layer = 0; layer < 32; ++layer)                   // every step; capturable in a graph
         rdkv_cuda_attend(&cfg, plan, layer, &io, workspace, stream);
       rdkv_cuda_advance(tail_tokens, cfg.batch, stream);     // one more token in every tail

   examples/decode.cu is a whole program.

   CONTENTS (search for the tag)
       >>cuda-types  >>cuda-host       the API, callable from C
       >>cuda-blocks                   device functions for kernels of your own
       >>cuda-plan  >>cuda-attend  >>cuda-launch       the code

   HOW IT WORKS. Codes go from the packed tile into fp16 tensor-core fragments by AND alone: a code
   left inside the mantissa of a half with exponent 0 is a subnormal number worth code * 4^k *
   2^-24. Scales are never applied to codes: K's go into the query, V's into the probabilities. One
   launch attends to segments and tail, appends the new token, and combines the parts of heads that
   were split over blocks, through global memory or within a cluster, in a fixed order: the result
   is bitwise the same at every replay.

   GUARANTEES
     no allocation, no synchronisation, no default stream, no device query after rdkv_cuda_resolve;
     lengths are read on the device, so a captured graph stays valid while tails grow.

   BUILD SWITCHES, defined before the include
     RDKV_CUDA_IMPLEMENTATION   compile the kernels and launchers here
     RDKV_CUDA_V_DIM            the one v_dim to compile kernels for; default all (a minute of nvcc)
     RDKV_CUDA_MAGIC_UNPACK     codes as normal numbers (OR and subtract) instead of subnormals

   Licence: MIT or public domain, as rdkv.h. */

#ifndef RDKV_CUDA_CUH
#define RDKV_CUDA_CUH

#include <cuda_runtime_api.h>
#include <math.h>
#include "rdkv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- >>cuda-types : what the kernels read ---------------------------------------------------- */

/* One sequence, in device memory: packed segments and a dense tail under one softmax. A dense cache
   is a sequence without segments; both kinds may stand in one batch.
   Element d of the tail's K is k[layer * k_layer + kv_head * k_head + token * k_token + d], of type
   tail_dtype; V likewise. Rows are 16-byte aligned, so all strides are multiples of 8. */
typedef struct rdkv_cuda_sequence {
  const void *const
      *segments; /* [n_segments] on the device: addresses of blocks there that rdkv_open
                    has accepted, 128-byte aligned; those without the layer are passed */
  void *k, *v;   /* tail; may be NULL if capacity is 0 */
  int64_t k_layer, k_head, v_layer, v_head; /* strides in elements */
  int32_t k_token, v_token;
  uint32_t n_segments; /* at most config.max_segments; more are not read */
  uint32_t capacity;   /* tokens that the tail has room for */
} rdkv_cuda_sequence;

/* Shape and launch geometry. Zero-initialise, set the shape, call rdkv_cuda_resolve. */
typedef struct rdkv_cuda_config {
  int32_t n_layers;     /* layers planned together; 0 = 1 */
  int32_t first_layer;  /* the model's index of the first of them */
  int32_t batch;        /* sequences, 1..4096 */
  int32_t n_q_heads;    /* a multiple of n_kv_heads; groups above 8 read the cache in passes of 8 */
  int32_t n_kv_heads;   /* 0 = n_q_heads */
  int32_t k_dim;        /* a multiple of 16 in 16..256 */
  int32_t v_dim;        /* 64, 80, 96, 112, 128, 192 or 256; 0 = k_dim */
  int32_t max_segments; /* of one sequence; 0 = 1 */
  rdkv_dtype dtype;     /* of q and out */
  rdkv_dtype tail_dtype; /* RDKV_F16 or RDKV_BF16: of the tail, k_new and v_new */
  float softmax_scale;   /* 0 = 1/sqrt(k_dim) */
  int32_t overlap;       /* 1: programmatic dependent launch. Then segments and plan must have been
                            written before the kernel in front of attend in the stream began */
  int32_t n_warps;       /* of a block; 0 = chosen */
  int32_t blocks_per_sm; /* 0 = chosen */
  int32_t n_blocks;      /* of the grid; 0 = chosen: blocks_per_sm times the multiprocessors */
  int32_t cluster;       /* blocks of a thread-block cluster, which may add up a head among
                            themselves: a power of 2 up to 16; 0 = chosen, 1 = none */
} rdkv_cuda_config;

/* What one layer's attention reads and writes, all in device memory. */
typedef struct rdkv_cuda_io {
  const void *q;     /* [batch][n_q_heads][k_dim] of config.dtype, after RoPE; 16-byte aligned */
  void *out;         /* [batch][n_q_heads][v_dim] of config.dtype; must not overlap q */
  float *lse;        /* [batch][n_q_heads] natural log of the sum of exp of the logits, or NULL */
  const void *k_new; /* [batch][n_kv_heads][k_dim] of tail_dtype, 16-byte aligned: the token to
                        append at tail_tokens and to attend to; NULL = none */
  const void *v_new; /* [batch][n_kv_heads][v_dim]; NULL exactly if k_new is */
  const uint32_t *tail_tokens; /* [batch] tokens in each tail, the new one not counted */
} rdkv_cuda_io;

/* ---- >>cuda-host : the API, callable from C -------------------------------------------------- */

/* Checks a config, fills in the defaults, and prepares the kernel on the current device.
   in and out may be the same object. Host only; the one call that asks the device anything.
   Returns cudaErrorInvalidValue for a shape that is not supported. */
cudaError_t rdkv_cuda_resolve(const rdkv_cuda_config *in, rdkv_cuda_config *out);

/* Bytes of a plan, and of the workspace that all layers share. cfg resolved. */
size_t rdkv_cuda_plan_bytes(const rdkv_cuda_config *cfg);
size_t rdkv_cuda_workspace_bytes(const rdkv_cuda_config *cfg);

/* Copies an opened segment's block to device memory [header->total_bytes], 128-byte aligned. */
cudaError_t rdkv_cuda_upload(const rdkv_segment *segment, void *device, cudaStream_t stream);

/* Describes a tail laid out as rdkv_tail_init does ([layer][kv head][capacity][dim], K then V of
   each layer) at device address data; segments and n_segments of the sequence are left alone. */
void rdkv_cuda_tail(const rdkv_cuda_config *cfg, void *data, uint32_t capacity,
                    rdkv_cuda_sequence *sequence);

/* Divides the work of every layer into byte-balanced parts, one a block. One small launch. A plan
   is right for any tail length, and balanced for those that it was made with: make it anew when
   segments change, and when tails have grown much.
   sequences [batch], tail_tokens [batch], plan [rdkv_cuda_plan_bytes] 128-byte aligned: on the
   device. */
cudaError_t rdkv_cuda_plan(const rdkv_cuda_config *cfg, const rdkv_cuda_sequence *sequences,
                           const uint32_t *tail_tokens, void *plan, cudaStream_t stream);

/* Attention of one layer for the whole batch, in one launch. layer counts from 0 to n_layers - 1.
   workspace [rdkv_cuda_workspace_bytes] 128-byte aligned, contents irrelevant; calls that may run
   at the same time need a plan and a workspace each. A token beyond the tail's capacity is attended
   to but not stored. With nothing to attend to out is 0 and lse -Inf. fp32 accumulation. */
cudaError_t rdkv_cuda_attend(const rdkv_cuda_config *cfg, const void *plan, int layer,
                             const rdkv_cuda_io *io, void *workspace, cudaStream_t stream);

/* Adds 1 to every tail's length, after the last layer of a step that appended. */
cudaError_t rdkv_cuda_advance(uint32_t *tail_tokens, int batch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

/* ==== end of the API for C ==================================================================== */

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* ---- >>cuda-blocks : device functions for kernels of your own --------------------------------

   All are warp-collective: 32 lanes call them together, with warp-uniform arguments. None has a
   block barrier or shared memory of its own. A warp that wants to attend calls
   - rdkv_cuda_head_of: where a head's tiles lie;
   - rdkv_cuda_query: a query to fragments, in memory of the caller's (shared memory is best);
   - rdkv_cuda_tile: attends to one tile, which may lie in global or shared memory;
   - rdkv_cuda_finish: sums over the warp.
   D is v_dim / 16. A warp takes up to 8 query heads, called columns, of one kv head. */

/* One (layer, kv head) of a block. */
typedef struct rdkv_cuda_head {
  const uint8_t *tiles, *table;
  uint32_t n_tokens[4]; /* in the V runs of 2, 4, 8, 16 bits */
  uint16_t n_blocks[3]; /* blocks of 16 channels in the K runs of 2, 4, 8 bits */
  uint16_t n_dropped;
} rdkv_cuda_head;

/* Running attention of a warp for 8 columns. Lane 4g + t holds dims 16i + g and 16i + g + 8 of
   columns 2t and 2t + 1: acc[i] = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). */
template <int D>
struct rdkv_cuda_acc {
  float acc[D][4];
  float centre[4]; /* what the codes' midpoint 2^(b-1) would add up to, in units of acc */
  float max[2];    /* column's reference: logit + log2 of the V scale stays below max + 7 */
  float sum[2];    /* this lane's part of the sum of 2^(logit - max) */
  float mid[2];    /* this lane's part of the sum of 2^(logit - max) * V midpoint */
  bool plain;      /* acc is in units of 2^9, as for fp16 V; else 2^(9-24), as for codes */
};

#define RDKV_CUDA__FULL 0xffffffffu
#define RDKV_CUDA_LIFT                                                                           \
  512.0f /* probabilities are held as 2^9 times their value: far from fp16's underflow, and with \
             room for the max to grow by 2^7 before anything must be rescaled */
#ifdef RDKV_CUDA_MAGIC_UNPACK
#define RDKV_CUDA__CODE_UNIT 1.0f
#else
#define RDKV_CUDA__CODE_UNIT 16777216.0f /* a code reaches the tensor core as code * 2^-24 */
#endif

__device__ __forceinline__ float rdkv_cuda__exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rdkv_cuda__log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* c += A (16 x 16, row) * B (16 x 8, column). */
template <bool BF16>
__device__ __forceinline__ void rdkv_cuda__mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint32_t b0, uint32_t b1) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Transposes an 8 x 8 matrix of 16-bit elements, row g in lanes 4g..4g+3. */
__device__ __forceinline__ uint32_t rdkv_cuda__transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

template <bool BF16>
__device__ __forceinline__ uint32_t rdkv_cuda__pair(float low, float high) {
  uint32_t y;
  if (BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ __half2 rdkv_cuda__halves(uint32_t x) {
  return *reinterpret_cast<const __half2 *>(&x);
}

__device__ __forceinline__ uint32_t rdkv_cuda__bits(__half2 h) {
  return *reinterpret_cast<const uint32_t *>(&h);
}

/* The masked codes of two halves, as the tensor core takes them. */
__device__ __forceinline__ uint32_t rdkv_cuda__codes(uint32_t x, uint32_t mask) {
#ifdef RDKV_CUDA_MAGIC_UNPACK
  const uint32_t magic = (x & mask) | 0x64006400u, one = 0x64006400u; /* 1024 + code, then exact */
  uint32_t y;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"(magic), "r"(one));
  return y;
#else
  return x & mask;
#endif
}

/* A lane's words of a block -> A fragment of 16 of its 32 rows (sub 0 or 1): of 2 bits the one
   word, of 4 bits word sub, of 8 bits words 2 sub and 2 sub + 1. Factors that stay in: 2 bit 4^(2
   sub + pr), 4 bit 16^pr, where pr is 0 for fragment registers 0, 1 and 1 for 2, 3. */
__device__ __forceinline__ void rdkv_cuda__unpack2(uint32_t x, int sub, uint32_t (&a)[4]) {
  const uint32_t y = x >> 8, low = sub ? 0x00300030u : 0x00030003u, high = low << 2;
  a[0] = rdkv_cuda__codes(x, low), a[1] = rdkv_cuda__codes(y, low);
  a[2] = rdkv_cuda__codes(x, high), a[3] = rdkv_cuda__codes(y, high);
}

__device__ __forceinline__ void rdkv_cuda__unpack4(uint32_t x, uint32_t (&a)[4]) {
  const uint32_t y = x >> 8;
  a[0] = rdkv_cuda__codes(x, 0x000f000fu), a[1] = rdkv_cuda__codes(y, 0x000f000fu);
  a[2] = rdkv_cuda__codes(x, 0x00f000f0u), a[3] = rdkv_cuda__codes(y, 0x00f000f0u);
}

__device__ __forceinline__ void rdkv_cuda__unpack8(uint32_t x, uint32_t y, uint32_t (&a)[4]) {
  a[0] = rdkv_cuda__codes(__byte_perm(x, 0, 0x4140), 0x00ff00ffu);
  a[1] = rdkv_cuda__codes(__byte_perm(x, 0, 0x4342), 0x00ff00ffu);
  a[2] = rdkv_cuda__codes(__byte_perm(y, 0, 0x4140), 0x00ff00ffu);
  a[3] = rdkv_cuda__codes(__byte_perm(y, 0, 0x4342), 0x00ff00ffu);
}

__device__ __forceinline__ void rdkv_cuda__store(void *p, size_t i, int dtype, float x) {
  if (dtype == RDKV_F32)
    static_cast<float *>(p)[i] = x;
  else if (dtype == RDKV_F16)
    static_cast<__half *>(p)[i] = __float2half_rn(x);
  else
    static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(x);
}

/* The head of a block that rdkv_open has accepted; false if the block lacks the layer. Any thread.
 */
__device__ __forceinline__ bool rdkv_cuda_head_of(const void *block, int layer, int kv_head,
                                                  rdkv_cuda_head *head) {
  const rdkv_header *h = static_cast<const rdkv_header *>(block);
  const uint32_t first = h->first_layer, at = static_cast<uint32_t>(layer) - first;
  if (at >= h->n_layers) return false;
  const uint8_t *base = static_cast<const uint8_t *>(block);
  const rdkv_record *r = reinterpret_cast<const rdkv_record *>(base + sizeof(rdkv_header)) +
                         (at * h->n_kv_heads + static_cast<uint32_t>(kv_head));
  for (int i = 0; i < 4; ++i) head->n_tokens[i] = r->n_tokens[i];
  for (int i = 0; i < 3; ++i)
    head->n_blocks[i] = static_cast<uint16_t>((r->n_channels[i] + 15) / 16);
  head->n_dropped = r->n_dropped;
  head->tiles = base + r->tile, head->table = base + r->table;
  return true;
}

/* Geometry of a head's tiles. */
__device__ __forceinline__ uint32_t rdkv_cuda_key_bytes(const rdkv_cuda_head &h) {
  return 128u * (h.n_blocks[0] + 2u * h.n_blocks[1] + 4u * h.n_blocks[2]);
}

/* The blocks of 2, 4 and 8 bits, 8 bits each. */
__device__ __forceinline__ uint32_t rdkv_cuda_key_widths(const rdkv_cuda_head &h) {
  return h.n_blocks[0] | static_cast<uint32_t>(h.n_blocks[1]) << 8 |
         static_cast<uint32_t>(h.n_blocks[2]) << 16;
}

__device__ __forceinline__ uint32_t rdkv_cuda_tiles(const rdkv_cuda_head &h) {
  uint32_t n = 0;
  for (int i = 0; i < 4; ++i) n += (h.n_tokens[i] + 31) / 32;
  return n;
}

/* A tile's V run (0..3: 2, 4, 8, 16 bits), its real tokens (1..32), and where it starts. */
__device__ __forceinline__ void rdkv_cuda_tile_at(const rdkv_cuda_head &h, int v_dim, uint32_t tile,
                                                  int *run, uint32_t *tokens, uint64_t *offset) {
  uint32_t start = 0, units = tile; /* units of v_dim/16 * 128 bytes: 1, 2, 4, 8 by run */
  int r = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint32_t end = start + (h.n_tokens[i] + 31) / 32;
    if (r == i && tile >= end) r = i + 1, start = end;
    if (tile > end) units += (tile - end) << i;
    if (r <= i) break;
  }
  const uint32_t n = r == 0   ? h.n_tokens[0]
                     : r == 1 ? h.n_tokens[1]
                     : r == 2 ? h.n_tokens[2]
                              : h.n_tokens[3];
  *run = r;
  *tokens = min(32u, n - 32u * (tile - start));
  *offset = static_cast<uint64_t>(tile) * (rdkv_cuda_key_bytes(h) + 128u) +
            static_cast<uint64_t>(units) * static_cast<uint32_t>(v_dim * 8);
}

template <int D>
__device__ __forceinline__ void rdkv_cuda_clear(rdkv_cuda_acc<D> &a) {
#pragma unroll
  for (int i = 0; i < D; ++i)
    for (int c = 0; c < 4; ++c) a.acc[i][c] = 0;
  for (int c = 0; c < 4; ++c) a.centre[c] = 0;
  for (int c = 0; c < 2; ++c) a.max[c] = -INFINITY, a.sum[c] = 0, a.mid[c] = 0;
  a.plain = false;
}

/* Four values of a vector of any type. */
__device__ __forceinline__ void rdkv_cuda__gather(const void *p, const uint32_t (&i)[4], int dtype,
                                                  float (&x)[4]) {
  if (dtype == RDKV_F16) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = __half2float(static_cast<const __half *>(p)[i[k]]);
  } else if (dtype == RDKV_BF16) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      x[k] = __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i[k]]);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = static_cast<const float *>(p)[i[k]];
  }
}

/* Query of one column -> fragments, and (factor, constant) with logit in base 2 = factor * product
   + constant. head NULL: for plain K (a tail) instead of a segment; bf16: that K is bf16. fragments
   [blocks of 16 channels][8 columns][16] of 2 bytes; every column must be written, those without a
   query with q NULL. What rounding takes away goes to rest, in the same layout: the sum of both is
   exact to 2^-22. Up to 4 columns, rest may be column + 4 of the same fragments: there rest =
   fragments + 128 bytes. q the head's k_dim values; factor_log2 = softmax_scale * log2(e). */
__device__ __forceinline__ void rdkv_cuda_query(const rdkv_cuda_head *head, bool bf16,
                                                const void *q, int dtype, int k_dim,
                                                float factor_log2, uint32_t column, void *fragments,
                                                void *rest, float2 *factor) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t n2 = head ? 16u * head->n_blocks[0] : 0,
                 n4 = head ? n2 + 16u * head->n_blocks[1] : 0;
  const uint32_t n = head ? n4 + 16u * head->n_blocks[2] : static_cast<uint32_t>(k_dim);
  const uint32_t all = head ? n + head->n_dropped : n;
  const uint16_t *scale = reinterpret_cast<const uint16_t *>(head ? head->table : nullptr);
  const uint16_t *mid = scale + n;
  const uint8_t *channel = reinterpret_cast<const uint8_t *>(mid + all);
  float x[3][4], constant = 0; /* this lane's channels 128 i + 4 lane + k, k_dim + 45 at most */
  uint32_t largest = 0;
#pragma unroll
  for (uint32_t i = 0; i < 3; ++i) {
    const uint32_t c = 128 * i + 4 * lane;
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) x[i][k] = 0;
    if (!q || 128 * i >= all || c >= all) continue;
    uint32_t from[4];
    float value[4];
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) /* all is a multiple of 4 for plain K alone */
      from[k] = !head ? c + k : c + k < all ? channel[c + k] : 0;
    rdkv_cuda__gather(q, from, dtype, value);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      if (!head) {
        x[i][k] = value[k];
      } else {
        if (c + k < all) constant += value[k] * __half2float(__ushort_as_half(mid[c + k]));
        if (c < n) x[i][k] = value[k] * __half2float(__ushort_as_half(scale[c + k]));
      }
      largest = max(largest, static_cast<uint32_t>(__float_as_int(fabsf(x[i][k]))));
    }
  }
  largest = __reduce_max_sync(RDKV_CUDA__FULL, largest);
  /* the largest value is brought to [2^14, 2^15) */
  const int exponent = static_cast<int>(largest >> 23) - 127;
  const int lift = largest > 0 ? max(-100, min(100, 14 - exponent)) : 0;
  const float up = __int_as_float((127 + lift) << 23), down = __int_as_float((127 - lift) << 23);
  float centred = 0;
#pragma unroll
  for (uint32_t i = 0; i < 3; ++i) {
    const uint32_t c = 128 * i + 4 * lane;
    if (128 * i >= n || c >= n) continue;
    /* codes of an odd pair are worth 4 (2 bits) or 16 (4 bits) times as much: undone here */
    const float part = !head || c >= n4 ? 1.0f : c < n2 ? 0.25f : 0.0625f;
    const float middle = c < n2 ? 2.0f : c < n4 ? 8.0f : 128.0f;
    uint32_t high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float y0 = x[i][2 * k] * up * (k ? part : 1.0f);
      const float y1 = x[i][2 * k + 1] * up * (k ? part : 1.0f);
      if (bf16) {
        high[k] = rdkv_cuda__pair<true>(y0, y1);
        low[k] =
            rdkv_cuda__pair<true>(y0 - __int_as_float(static_cast<int>(high[k] << 16)),
                                  y1 - __int_as_float(static_cast<int>(high[k] & 0xffff0000u)));
      } else {
        const __half2 h = __floats2half2_rn(y0, y1);
        const float2 f = __half22float2(h);
        const __half2 l = __floats2half2_rn(y0 - f.x, y1 - f.y);
        const float2 f2 = __half22float2(l);
        centred += (f.x + f.y + (f2.x + f2.y)) * (k ? middle / part : middle);
        high[k] = rdkv_cuda__bits(h), low[k] = rdkv_cuda__bits(l);
      }
    }
    /* packed channels lie as they come; plain ones are permuted as ldmatrix permutes K */
    const uint32_t j = c & 15, at = 128 * (c >> 4) + 16 * column; /* in 2 bytes */
    const uint32_t at0 = at + (head ? j : 4 * ((j & 7) >> 1) + 2 * (j >> 3));
    const uint32_t at1 = at + (head ? j + 2 : 4 * (((j + 2) & 7) >> 1) + 2 * (j >> 3));
    uint16_t *f = static_cast<uint16_t *>(fragments), *r = static_cast<uint16_t *>(rest);
    *reinterpret_cast<uint32_t *>(f + at0) = high[0],
                                      *reinterpret_cast<uint32_t *>(f + at1) = high[1];
    *reinterpret_cast<uint32_t *>(r + at0) = low[0],
                                      *reinterpret_cast<uint32_t *>(r + at1) = low[1];
  }
  constant = head ? constant - centred * down : 0.0f;
#pragma unroll
  for (int d = 16; d; d >>= 1) constant += __shfl_xor_sync(RDKV_CUDA__FULL, constant, d);
  if (lane == 0)
    *factor = make_float2((head ? RDKV_CUDA__CODE_UNIT : 1.0f) * down * factor_log2,
                          constant * factor_log2);
}

/* Logits x (base 2) -> e = 2^(x - max) and p = e * scale * lift; updates sum and, when p comes near
   the end of fp16, max. x[i] is of the lane's column i & 1, its token's V scale is scale[i / 2],
   and lift repeats; logits of tokens that are not there are -Inf. */
template <int D, bool PAIRED, int N, int L>
__device__ __forceinline__ void rdkv_cuda__weigh(rdkv_cuda_acc<D> &a, const float (&x)[N],
                                                 const float (&scale)[N / 2],
                                                 const float (&lift)[L], float (&e)[N],
                                                 float (&p)[N]) {
  float high = 0, all = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    e[i] = rdkv_cuda__exp2(x[i] - a.max[i & 1]);
    p[i] = e[i] * (scale[i / 2] * lift[i / 2 % L]);
    high += p[i], all += e[i];
  }
  /* e itself may become large where V scales are small; NaN: the first tokens, max is -Inf */
  if (__any_sync(RDKV_CUDA__FULL, !(high + all * 3.0517578e-5f <= 65504.0f))) {
    float f[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float m = a.max[k];
      for (int i = k; i < N; i += 2) /* a scale of 0 counts as fp16's smallest */
        m = fmaxf(m, x[i] + rdkv_cuda__log2(fmaxf(scale[i / 2], 5.9604645e-8f)));
      for (int d = PAIRED ? 2 : 4; d < 32; d <<= 1)
        m = fmaxf(m, __shfl_xor_sync(RDKV_CUDA__FULL, m, d));
      f[k] = m == a.max[k] ? 1.0f : rdkv_cuda__exp2(a.max[k] - m);
      a.max[k] = m, a.sum[k] *= f[k], a.mid[k] *= f[k];
    }
#pragma unroll
    for (int i = 0; i < D; ++i)
      for (int c = 0; c < 4; ++c) a.acc[i][c] *= f[c & 1];
    for (int c = 0; c < 4; ++c) a.centre[c] *= f[c & 1];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      e[i] = rdkv_cuda__exp2(x[i] - a.max[i & 1]);
      p[i] = e[i] * (scale[i / 2] * lift[i / 2 % L]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) a.sum[i & 1] += e[i];
}

/* Brings acc to the units of fp16 V, or to those of codes. */
template <int D>
__device__ __forceinline__ void rdkv_cuda__units(rdkv_cuda_acc<D> &a, bool plain) {
  if (a.plain == plain) return;
  const float f = plain ? RDKV_CUDA__CODE_UNIT : 1.0f / RDKV_CUDA__CODE_UNIT;
#pragma unroll
  for (int i = 0; i < D; ++i)
    for (int c = 0; c < 4; ++c) a.acc[i][c] = (a.acc[i][c] - a.centre[c & 1]) * f;
  for (int c = 0; c < 4; ++c) a.centre[c] = 0;
  a.plain = plain;
}

/* A lane's words of a block, and the A fragment of 16 of its 32 rows. */
template <int BITS>
__device__ __forceinline__ uint4 rdkv_cuda__words(const uint8_t *block) {
  const uint32_t lane = threadIdx.x & 31;
  if (BITS == 8) return reinterpret_cast<const uint4 *>(block)[lane];
  if (BITS == 2) return make_uint4(reinterpret_cast<const uint32_t *>(block)[lane], 0, 0, 0);
  const uint2 w = reinterpret_cast<const uint2 *>(block)[lane];
  return make_uint4(w.x, w.y, 0, 0);
}

template <int BITS>
__device__ __forceinline__ void rdkv_cuda__fragment(uint4 w, int sub, uint32_t (&a)[4]) {
  if (BITS == 2) rdkv_cuda__unpack2(w.x, sub, a);
  if (BITS == 4) rdkv_cuda__unpack4(sub ? w.y : w.x, a);
  if (BITS == 8) rdkv_cuda__unpack8(sub ? w.z : w.x, sub ? w.w : w.y, a);
}

/* Adds N blocks of K of T tiles to the products x, and moves on. */
template <int BITS, int N, bool PAIRED, int T>
__device__ __forceinline__ void rdkv_cuda__key_blocks(float (&x)[T][2][4],
                                                      const uint8_t *(&block)[T],
                                                      const uint8_t *&query, uint32_t rest) {
  const uint32_t lane = threadIdx.x & 31;
  uint4 w[N][T]; /* all loads first */
  uint2 b[N], r[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (int t = 0; t < T; ++t) w[k][t] = rdkv_cuda__words<BITS>(block[t] + 64 * BITS * k);
    b[k] = reinterpret_cast<const uint2 *>(query)[32 * k + lane];
    if (!PAIRED) r[k] = reinterpret_cast<const uint2 *>(query + rest)[32 * k + lane];
  }
  asm volatile("" ::: "memory");
#pragma unroll
  for (int k = 0; k < N; ++k)
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t f[4];
        rdkv_cuda__fragment<BITS>(w[k][t], s, f);
        rdkv_cuda__mma<false>(x[t][s], f[0], f[1], f[2], f[3], b[k].x, b[k].y);
        if (!PAIRED) rdkv_cuda__mma<false>(x[t][s], f[0], f[1], f[2], f[3], r[k].x, r[k].y);
      }
#pragma unroll
  for (int t = 0; t < T; ++t) block[t] += N * 64 * BITS;
  query += N * 256;
}

template <int BITS, bool PAIRED, int T>
__device__ __forceinline__ void rdkv_cuda__keys(float (&x)[T][2][4], const uint8_t *(&block)[T],
                                                const uint8_t *&query, uint32_t rest, uint32_t n) {
  constexpr int N = T == 1 ? 4 : 2; /* as many as registers allow */
#pragma unroll 1
  for (; n >= N; n -= N) rdkv_cuda__key_blocks<BITS, N, PAIRED>(x, block, query, rest);
  if (N > 2 && n & 2) rdkv_cuda__key_blocks<BITS, 2, PAIRED>(x, block, query, rest);
  if (n & 1) rdkv_cuda__key_blocks<BITS, 1, PAIRED>(x, block, query, rest);
}

/* acc += V of 32 tokens of one width, weighted by p; centre likewise for the midpoint. */
template <int BITS, int D>
__device__ __forceinline__ void rdkv_cuda__values(rdkv_cuda_acc<D> &a, const uint8_t *block,
                                                  const uint32_t (&p)[4]) {
  const uint32_t middle = BITS == 2 ? 0xaaaaaaaau : BITS == 4 ? 0x88888888u : 0x80808080u;
  uint32_t f[4];
#pragma unroll
  for (int base = 0; base < D; base += 4) { /* sums that depend on each other stand four apart */
    uint4 w[4];
#pragma unroll
    for (int i = 0; i < 4 && base + i < D; ++i)
      w[i] = rdkv_cuda__words<BITS>(block + 64 * BITS * (base + i));
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int i = 0; i < 4 && base + i < D; ++i) {
        rdkv_cuda__fragment<BITS>(w[i], s, f);
        rdkv_cuda__mma<false>(a.acc[base + i], f[0], f[1], f[2], f[3], p[2 * s], p[2 * s + 1]);
      }
      if (base == 0) {
        rdkv_cuda__fragment<BITS>(make_uint4(middle, middle, middle, middle), s, f);
        rdkv_cuda__mma<false>(a.centre, f[0], f[1], f[2], f[3], p[2 * s], p[2 * s + 1]);
      }
    }
  }
}

/* What a V run's probabilities are multiplied by, to undo the factors that stay in its codes: for
   the lane's tokens, in the order of rdkv_cuda_tile's x. */
template <bool PAIRED>
struct rdkv_cuda__lift {
  float of[PAIRED ? 2 : 4];
};

template <bool PAIRED>
__device__ __forceinline__ rdkv_cuda__lift<PAIRED> rdkv_cuda__lift_of(int run) {
  rdkv_cuda__lift<PAIRED> l;
  const float odd = run == 0 ? 0.25f : run == 1 ? 0.0625f : 1.0f; /* pr = 1 */
  const float last = run == 0 ? 0.0625f : 1.0f;                   /* the second 16 tokens */
#pragma unroll
  for (int i = 0; i < (PAIRED ? 2 : 4); ++i)
    l.of[i] = RDKV_CUDA_LIFT * ((PAIRED ? (threadIdx.x & 2) != 0 : i >= 2) ? last : 1.0f) *
              (i & 1 ? odd : 1.0f);
  return l;
}

/* rdkv_cuda_tile for T tiles of a run, with acc in the run's units already and its lift. */
template <bool PAIRED, int T, int D>
__device__ __forceinline__ void rdkv_cuda__tiles(rdkv_cuda_acc<D> &a, const uint8_t *(&tile)[T],
                                                 uint32_t widths, int run, uint32_t tokens,
                                                 const uint8_t *fragments, uint32_t rest,
                                                 const float2 *factor,
                                                 const rdkv_cuda__lift<PAIRED> &lift) {
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2, upper = lane & 2;
  constexpr int N = PAIRED ? 4 : 8; /* logits that a lane has of a tile */
  float y[T][2][4] = {}, x[N * T], e[N * T], p[N * T];
  rdkv_cuda__keys<2, PAIRED>(y, tile, fragments, rest, widths & 255);
#pragma unroll
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < 4; ++c) y[t][1][c] *= 0.0625f; /* 4^2 of the second half of 2-bit codes */
  rdkv_cuda__keys<4, PAIRED>(y, tile, fragments, rest, widths >> 8 & 255);
  rdkv_cuda__keys<8, PAIRED>(y, tile, fragments, rest, widths >> 16);
  /* A lane's tokens: 16 i + g and 16 i + g + 8, for i = 0 and 1; paired, lanes t and t + 2 hold a
     product and its rest: they exchange halves, then the lower one has i = 0, the upper one i = 1.
   */
  float scale[N / 2 * T], mid[N / 2 * T];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    uint32_t params[4];
    if (PAIRED) {
      float z[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        z[c] = __shfl_xor_sync(RDKV_CUDA__FULL, upper ? y[t][0][c] : y[t][1][c], 2);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[N * t + c] = (upper ? y[t][1][c] : y[t][0][c]) + z[c];
      const uint2 raw = *reinterpret_cast<const uint2 *>(tile[t] + 16 * g + 4 * upper);
      params[0] = raw.x, params[1] = raw.y;
    } else {
      const uint4 raw = *reinterpret_cast<const uint4 *>(tile[t] + 16 * g);
      params[0] = raw.x, params[1] = raw.y, params[2] = raw.z, params[3] = raw.w;
#pragma unroll
      for (int i = 0; i < N; ++i) x[N * t + i] = y[t][i >> 2][i & 3];
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) { /* 1 and 0 for V of 16 bits */
      const __half2 v = rdkv_cuda__halves(run == 3 ? 0x3c00u : params[i]);
      scale[N / 2 * t + i] = __low2float(v), mid[N / 2 * t + i] = __high2float(v);
    }
    tile[t] += 128;
  }
  const float2 factor2[2] = {factor[0], factor[1]};
#pragma unroll
  for (int i = 0; i < N * T; ++i) x[i] = x[i] * factor2[i & 1].x + factor2[i & 1].y;
  if (T == 1 && tokens < 32)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (8u * static_cast<uint32_t>(i / 2) + (PAIRED ? 8 * upper : 0) + g >= tokens)
        x[i] = -INFINITY;

  rdkv_cuda__weigh<D, PAIRED, N * T>(a, x, scale, lift.of, e, p);

  /* probabilities times V scale, less the factors that stay in the codes, as B fragments */
  uint32_t b[T][4];
#pragma unroll
  for (int t = 0; t < T; ++t) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int k = N / 2 * t + i;
      a.mid[0] += e[2 * k] * mid[k], a.mid[1] += e[2 * k + 1] * mid[k];
      b[t][i] = rdkv_cuda__transpose(rdkv_cuda__pair<false>(p[2 * k], p[2 * k + 1]));
    }
    if (PAIRED) /* rows 4-7 of what was transposed are the second 16 tokens */
#pragma unroll
      for (int i = 0; i < 2; ++i) b[t][2 + i] = __shfl_xor_sync(RDKV_CUDA__FULL, b[t][i], 16);
  }
  if (run < 2) {
#pragma unroll
    for (int t = 0; t < T; ++t)
      if (run == 0)
        rdkv_cuda__values<2>(a, tile[t], b[t]);
      else
        rdkv_cuda__values<4>(a, tile[t], b[t]);
  } else if (run == 2) {
#pragma unroll
    for (int t = 0; t < T; ++t) rdkv_cuda__values<8>(a, tile[t], b[t]);
  } else {
#pragma unroll
    for (int t = 0; t < T; ++t)
      for (int s = 0; s < 2; ++s)
        for (int i = 0; i < D; ++i) {
          const uint4 v =
              reinterpret_cast<const uint4 *>(tile[t])[32 * (D * s + i) + static_cast<int>(lane)];
          rdkv_cuda__mma<false>(a.acc[i], v.x, v.y, v.z, v.w, b[t][2 * s], b[t][2 * s + 1]);
        }
  }
}

/* Attends to one packed tile. tile 16-byte aligned; run and tokens as rdkv_cuda_tile_at gives them;
   widths from rdkv_cuda_key_widths; fragments as rdkv_cuda_query wrote them, 8-byte aligned;
   factor: of the lane's two columns. PAIRED: the rests are columns 4-7 of the fragments, there are
   up to 4 queries, and columns 4-7 of acc mean nothing. Else the rests lie rest bytes behind the
   fragments. */
template <bool PAIRED, int D>
__device__ __forceinline__ void rdkv_cuda_tile(rdkv_cuda_acc<D> &a, const uint8_t *tile,
                                               uint32_t widths, int run, uint32_t tokens,
                                               const uint8_t *fragments, uint32_t rest,
                                               const float2 (&factor)[2]) {
  rdkv_cuda__units(a, run == 3);
  const uint8_t *one[1] = {tile};
  rdkv_cuda__tiles<PAIRED>(a, one, widths, run, tokens, fragments, rest, factor,
                           rdkv_cuda__lift_of<PAIRED>(run));
}

__device__ __forceinline__ void rdkv_cuda__ldmatrix(uint32_t (&f)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void rdkv_cuda__ldmatrix_trans(uint32_t (&f)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
               : "r"(address)
               : "memory");
}

/* Attends to 16 dense tokens, K first, V second, so that their copies may arrive one after the
   other. keys and values are shared-memory addresses of 16 rows, pitch bytes apart; pitch a
   multiple of 16 and best 16 more than one of 128. Rows of tokens that are not there must hold
   finite numbers. */
template <bool PAIRED, bool BF16, int D>
__device__ __forceinline__ void rdkv_cuda_dense_keys(rdkv_cuda_acc<D> &a, uint32_t keys,
                                                     uint32_t pitch, uint32_t k_dim,
                                                     uint32_t tokens, const uint8_t *fragments,
                                                     uint32_t rest, const float2 (&factor)[2],
                                                     uint32_t (&p)[2]) {
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2, upper = lane & 2;
  constexpr int N = PAIRED ? 2 : 4;
  keys += (lane & 15) * pitch + (lane >> 4) * 16u, fragments += 8 * lane;
  float y[4] = {}, x[N];
  uint32_t f[4];
#pragma unroll 4
  for (uint32_t i = 0; i < k_dim / 16; ++i) {
    rdkv_cuda__ldmatrix(f, keys + 32u * i);
    const uint2 b = *reinterpret_cast<const uint2 *>(fragments + 256 * i);
    rdkv_cuda__mma<BF16>(y, f[0], f[1], f[2], f[3], b.x, b.y);
    if (!PAIRED) {
      const uint2 r = *reinterpret_cast<const uint2 *>(fragments + rest + 256 * i);
      rdkv_cuda__mma<BF16>(y, f[0], f[1], f[2], f[3], r.x, r.y);
    }
  }
  /* as in rdkv_cuda_tile, but i is 0 alone: of a pair the lower lane has token g, the upper one g +
   * 8 */
  if (PAIRED) {
    float z[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) z[c] = __shfl_xor_sync(RDKV_CUDA__FULL, upper ? y[c] : y[2 + c], 2);
#pragma unroll
    for (int c = 0; c < 2; ++c) x[c] = (upper ? y[2 + c] : y[c]) + z[c];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = y[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = x[i] * factor[i & 1].x + factor[i & 1].y;
    if (8u * static_cast<uint32_t>(i / 2) + (PAIRED ? 4 * upper : 0) + g >= tokens)
      x[i] = -INFINITY;
  }
  float one[N / 2], lift[N / 2], e[N], w[N];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) one[i] = 1, lift[i] = RDKV_CUDA_LIFT;
  rdkv_cuda__units(a, true);
  rdkv_cuda__weigh<D, PAIRED, N>(a, x, one, lift, e, w);
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    p[i] = rdkv_cuda__transpose(rdkv_cuda__pair<BF16>(w[2 * i], w[2 * i + 1]));
  if (PAIRED) p[1] = __shfl_xor_sync(RDKV_CUDA__FULL, p[0], 16);
}

template <bool BF16, int D>
__device__ __forceinline__ void rdkv_cuda_dense_values(rdkv_cuda_acc<D> &a, uint32_t values,
                                                       uint32_t pitch, const uint32_t (&p)[2]) {
  const uint32_t lane = threadIdx.x & 31;
  values += ((lane & 7) + (lane >> 4) * 8u) * pitch + ((lane >> 3) & 1u) * 16u;
  uint32_t f[4];
#pragma unroll
  for (int i = 0; i < D; ++i) {
    rdkv_cuda__ldmatrix_trans(f, values + 32u * static_cast<uint32_t>(i));
    rdkv_cuda__mma<BF16>(a.acc[i], f[0], f[1], f[2], f[3], p[0], p[1]);
  }
}

/* Sums over the warp. Then acc * scale + mid[k] is the sum of 2^(logit - max) * v of the lane's
   column k, scale = 1 / RDKV_CUDA_LIFT, and sum[k] that of 2^(logit - max): out is the first over
   the second, lse = ln(2) * (max + log2(sum)). */
template <bool PAIRED, int D>
__device__ __forceinline__ void rdkv_cuda_finish(rdkv_cuda_acc<D> &a) {
  rdkv_cuda__units(a, true);
#pragma unroll
  for (int k = 0; k < 2; ++k)
    for (int d = PAIRED ? 2 : 4; d < 32; d <<= 1) {
      a.sum[k] += __shfl_xor_sync(RDKV_CUDA__FULL, a.sum[k], d);
      a.mid[k] += __shfl_xor_sync(RDKV_CUDA__FULL, a.mid[k], d);
    }
}

#endif /* __CUDACC__ */
#endif /* RDKV_CUDA_CUH */

/* ==== end of API: you can stop reading here =================================================== */

#ifdef RDKV_CUDA_IMPLEMENTATION
#ifndef RDKV_CUDA_IMPLEMENTED
#define RDKV_CUDA_IMPLEMENTED

/* ---- >>cuda-plan : who does what ------------------------------------------------------------- */

/* A block's share of one segment of one head. Shares of one head that follow each other in a block
   form a group, which has one softmax state; the last share of a group also takes the group's part
   of the tail. */
enum {
  RDKV_CUDA__ACTIVE = 1,   /* 0: a block without work */
  RDKV_CUDA__LAST = 2,     /* ends a group */
  RDKV_CUDA__MORE = 4,     /* the block has another share, pieces[next] */
  RDKV_CUDA__TAIL_END = 8, /* the group's part of the tail reaches to its end */
  RDKV_CUDA__CLUSTER = 16  /* the head's blocks are a cluster */
};

typedef struct rdkv_cuda__piece {
  rdkv_cuda_head head;
  void *k, *v; /* tail of this (layer, kv head) */
  uint32_t tile_begin, tile_end;
  uint32_t tail_begin, tail_end; /* parts of the tail, in 2^-32 of it */
  uint32_t sequence, kv_head;    /* kv_head counts passes apart */
  uint32_t k_token, v_token, capacity;
  uint32_t flags, next;
  uint32_t part, n_parts;        /* this group among the head's groups */
  uint32_t slot, first_slot;     /* where it and the head's first one leave their results */
  uint32_t first_query, columns; /* row of q and out of its first column; how many have one */
  uint32_t reserved;
} rdkv_cuda__piece; /* 128 bytes, read 16 at a time */

/* One layer's plan: pieces [n_blocks] the first of each block, then [heads * max_segments] others;
   weights [heads]; counters [heads]. */
typedef struct rdkv_cuda__layout {
  uint32_t heads, passes, group; /* heads of the batch, with passes */
  size_t weights, counters, bytes;
} rdkv_cuda__layout;

static rdkv_cuda__layout rdkv_cuda__layout_of(const rdkv_cuda_config *c) {
  rdkv_cuda__layout l;
  const int group = c->n_q_heads / c->n_kv_heads;
  l.group = static_cast<uint32_t>(group);
  l.passes = static_cast<uint32_t>((group + 7) / 8);
  l.heads = static_cast<uint32_t>(c->batch) * static_cast<uint32_t>(c->n_kv_heads) * l.passes;
  const size_t pieces = static_cast<size_t>(c->n_blocks) +
                        static_cast<size_t>(l.heads) * static_cast<size_t>(c->max_segments);
  l.weights = pieces * sizeof(rdkv_cuda__piece);
  l.counters = l.weights + l.heads * sizeof(uint64_t);
  l.bytes = (l.counters + l.heads * sizeof(uint32_t) + 127) & ~static_cast<size_t>(127);
  return l;
}

typedef struct rdkv_cuda__plan_args {
  const rdkv_cuda_sequence *sequences;
  const uint32_t *tail_tokens;
  uint8_t *plan;
  size_t layer_bytes, counters, weights;
  uint32_t heads, passes, n_kv_heads, group, n_blocks, max_segments, cluster;
  int first_layer, k_dim, v_dim;
} rdkv_cuda__plan_args;

/* Weight of a segment in 128 bytes, at least 1; 0 and an empty *head where the block lacks the
 * layer. */
static __device__ uint64_t rdkv_cuda__weight(const rdkv_cuda__plan_args &p,
                                             const rdkv_cuda_sequence &s, uint32_t segment,
                                             int layer, uint32_t kv_head, rdkv_cuda_head *head) {
  *head = rdkv_cuda_head();
  if (!rdkv_cuda_head_of(s.segments[segment], layer, static_cast<int>(kv_head), head)) return 0;
  int run;
  uint32_t tokens;
  uint64_t offset;
  rdkv_cuda_tile_at(*head, p.v_dim, rdkv_cuda_tiles(*head), &run, &tokens, &offset);
  return offset / 128 + 1;
}

/* The first tile that starts at or after byte. */
static __device__ uint32_t rdkv_cuda__tile_after(const rdkv_cuda__plan_args &p,
                                                 const rdkv_cuda_head &head, uint64_t byte) {
  uint32_t low = 0, high = rdkv_cuda_tiles(head);
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    int run;
    uint32_t tokens;
    uint64_t offset;
    rdkv_cuda_tile_at(head, p.v_dim, middle, &run, &tokens, &offset);
    if (offset >= byte)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

#define RDKV_CUDA__PLAN_THREADS 256

/* Sum over the block of a value each thread has; exclusive prefix in *before. */
static __device__ uint64_t rdkv_cuda__scan(uint64_t x, uint64_t *before) {
  __shared__ uint64_t warp_sum[RDKV_CUDA__PLAN_THREADS / 32];
  const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint64_t y = x;
  for (uint32_t d = 1; d < 32; d <<= 1) {
    const uint64_t z = __shfl_up_sync(RDKV_CUDA__FULL, y, d);
    if (lane >= d) y += z;
  }
  __syncthreads();
  if (lane == 31) warp_sum[warp] = y;
  __syncthreads();
  uint64_t base = 0, total = 0;
  for (uint32_t i = 0; i < RDKV_CUDA__PLAN_THREADS / 32; ++i) {
    if (i == warp) base = total;
    total += warp_sum[i];
  }
  *before = base + y - x;
  return total;
}

static __device__ uint64_t rdkv_cuda__max(uint64_t x) {
  __shared__ unsigned long long largest;
  __syncthreads();
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  atomicMax(&largest, static_cast<unsigned long long>(x));
  __syncthreads();
  return largest;
}

/* One block a layer. The heads' weights are laid end to end and cut into n_blocks equal shares.
   Where there are few heads, each is stretched to a whole number of shares, so that no block serves
   two: to a cluster's, unless heads differ too much; where there are many alike, each block gets
   whole ones. */
static __global__ void __launch_bounds__(RDKV_CUDA__PLAN_THREADS)
    rdkv_cuda__plan_kernel(const rdkv_cuda__plan_args p) {
  uint8_t *plan = p.plan + blockIdx.x * p.layer_bytes;
  rdkv_cuda__piece *pieces = reinterpret_cast<rdkv_cuda__piece *>(plan);
  uint32_t *counters = reinterpret_cast<uint32_t *>(plan + p.counters);
  uint64_t *weights = reinterpret_cast<uint64_t *>(plan + p.weights);
  const int layer = p.first_layer + static_cast<int>(blockIdx.x);
  const uint64_t fixed = 4; /* what a head costs without any token, in 128 bytes */
  uint64_t total = 0, largest = 0, before, quota;

  for (uint32_t b = threadIdx.x; b < p.n_blocks; b += blockDim.x) pieces[b] = rdkv_cuda__piece();
  for (uint32_t base = 0; base < p.heads; base += blockDim.x) {
    const uint32_t h = base + threadIdx.x;
    uint64_t w = 0;
    if (h < p.heads) {
      const uint32_t sequence = h / (p.n_kv_heads * p.passes);
      const uint32_t kv_head = h / p.passes % p.n_kv_heads;
      const rdkv_cuda_sequence &s = p.sequences[sequence];
      rdkv_cuda_head head;
      w = fixed + static_cast<uint64_t>(p.tail_tokens[sequence]) *
                      static_cast<uint32_t>(p.k_dim + p.v_dim) / 64;
      for (uint32_t i = 0; i < min(s.n_segments, p.max_segments); ++i)
        w += rdkv_cuda__weight(p, s, i, layer, kv_head, &head);
      weights[h] = w, counters[h] = 0;
    }
    total += rdkv_cuda__scan(w, &before);
    largest = max(largest, rdkv_cuda__max(w));
  }
  const bool stretch = p.n_blocks >= 4 * p.heads;
  /* parts that do not form a cluster come together through global memory: that takes about as long
     as reading 300 * 128 bytes */
  const bool clusters = p.cluster > 1 && p.n_blocks == p.heads * p.cluster &&
                        largest / p.cluster <= total / p.n_blocks + 300;
  quota = stretch ? (total + p.n_blocks - p.heads - 1) / (p.n_blocks - p.heads)
                  : (total + p.n_blocks - 1) / p.n_blocks;
  /* heads that are nearly alike: whole heads for a block, where that costs at most 6 % */
  const uint64_t whole = largest * ((p.heads + p.n_blocks - 1) / p.n_blocks);
  const bool alike = !stretch && whole * 16 <= quota * 17;
  if (alike) quota = whole;
  quota = max(quota, static_cast<uint64_t>(64)); /* below 8 KB a block's overhead is all there is */
  if (clusters) quota = (largest + p.cluster - 1) / p.cluster;

  uint64_t start = 0;
  for (uint32_t base = 0; base < p.heads; base += blockDim.x) {
    const uint32_t h = base + threadIdx.x;
    const uint64_t w = h < p.heads ? weights[h] : 0;
    const uint64_t width = clusters && w ? quota * p.cluster
                           : stretch     ? (w + quota - 1) / quota * quota
                           : alike && w  ? quota / ((p.heads + p.n_blocks - 1) / p.n_blocks)
                                         : w;
    const uint64_t sum = rdkv_cuda__scan(width, &before);
    if (h < p.heads) {
      const uint64_t h0 = start + before, h1 = h0 + width, b0 = h0 / quota, b1 = (h1 - 1) / quota;
      const uint32_t sequence = h / (p.n_kv_heads * p.passes);
      const uint32_t kv_head = h / p.passes % p.n_kv_heads;
      const rdkv_cuda_sequence &s = p.sequences[sequence];
      const uint32_t n = min(s.n_segments, p.max_segments);
      const uint64_t tail = static_cast<uint64_t>(p.tail_tokens[sequence]) *
                            static_cast<uint32_t>(p.k_dim + p.v_dim) / 64;
      const uint64_t packed = w - fixed - tail;
      const size_t element = 2;
      rdkv_cuda__piece x = rdkv_cuda__piece();
      x.k = static_cast<uint8_t *>(s.k) +
            static_cast<size_t>(layer * s.k_layer + kv_head * s.k_head) * element;
      x.v = static_cast<uint8_t *>(s.v) +
            static_cast<size_t>(layer * s.v_layer + kv_head * s.v_head) * element;
      x.sequence = sequence, x.kv_head = h % (p.n_kv_heads * p.passes);
      const uint32_t column0 = 8 * (h % p.passes);
      x.first_query = (sequence * p.n_kv_heads + kv_head) * p.group + column0;
      x.columns = min(p.group - column0, 8u);
      x.k_token = static_cast<uint32_t>(s.k_token), x.v_token = static_cast<uint32_t>(s.v_token);
      x.capacity = s.capacity;
      x.n_parts = static_cast<uint32_t>(b1 - b0 + 1);
      x.first_slot = static_cast<uint32_t>(2 * b0 + (h0 > b0 * quota));
      uint64_t done = 0, s0 = h0;
      uint32_t self = p.n_blocks + h * p.max_segments;
      for (uint32_t i = 0; s0 < h1; ++i) {
        const uint64_t weight = i < n ? rdkv_cuda__weight(p, s, i, layer, kv_head, &x.head) : 0;
        if (weight == 0 && packed > 0) continue; /* a head without segments gets an empty piece */
        done += weight;
        const uint64_t s1 = done == packed ? h1 : h0 + width * done / packed;
        for (uint64_t b = s0 / quota; b * quota < s1; ++b) {
          const uint64_t x0 = max(s0, b * quota), x1 = min(s1, (b + 1) * quota);
          const uint64_t g0 = max(h0, b * quota), g1 = min(h1, (b + 1) * quota);
          const uint64_t bytes = weight ? (weight - 1) * 128 : 0;
          x.tile_begin = rdkv_cuda__tile_after(p, x.head, bytes * (x0 - s0) / (s1 - s0));
          x.tile_end = x1 == s1 ? rdkv_cuda_tiles(x.head)
                                : rdkv_cuda__tile_after(p, x.head, bytes * (x1 - s0) / (s1 - s0));
          x.tail_begin = static_cast<uint32_t>(((g0 - h0) << 32) / width);
          x.tail_end = static_cast<uint32_t>(((g1 - h0) << 32) / width);
          x.part = static_cast<uint32_t>(b - b0);
          x.slot = b == b0 ? x.first_slot : static_cast<uint32_t>(2 * b);
          x.flags = RDKV_CUDA__ACTIVE;
          if (clusters) x.flags |= RDKV_CUDA__CLUSTER;
          if (x1 == g1) x.flags |= RDKV_CUDA__LAST;
          if (g1 == h1) x.flags |= RDKV_CUDA__TAIL_END;
          if (x1 < (b + 1) * quota && (x1 < h1 || h + 1 < p.heads)) x.flags |= RDKV_CUDA__MORE;
          x.next = s1 == h1 ? p.n_blocks + (h + 1) * p.max_segments : self + 1;
          pieces[x0 == b * quota ? b : self] = x;
        }
        s0 = s1, ++self;
      }
    }
    start += sum;
  }
}

/* ---- >>cuda-attend : one layer --------------------------------------------------------------- */

typedef struct rdkv_cuda__args {
  const rdkv_cuda__piece *pieces;
  uint32_t *counters;
  float *partials;
  rdkv_cuda_io io;
  uint32_t passes, n_kv_heads;
  int k_dim, dtype, tail_bf16;
  uint32_t ring_bytes, key_fragments, tail_fragments; /* of shared memory */
  uint32_t table_bytes, row_bytes, source_bytes; /* a table, a row of q, one and columns of those */
  int overlap;
  float factor_log2;
} rdkv_cuda__args;

/* Shared memory of a block: fragments of the query for packed and for dense K, what they are made
   of (table and rows of q; the next piece's come early), this, and for each warp rdkv_cuda__warp
   and a ring of copies. After the main loop the rings hold what the
   warps have to add up. */
#define RDKV_CUDA__ROW_SLOTS 3 /* of 16 dense rows: these set a ring's size */
#define RDKV_CUDA__SLOTS 6     /* at most: for tiles, as many as there is room for */
#define RDKV_CUDA__HASTE 2     /* filled before the query has come: more would stand in its way */

typedef struct rdkv_cuda__shared {
  float2 key_factor[8], tail_factor[8];
  float top[8], sum[8]; /* the block's max and sum of each column */
  uint64_t barrier;     /* of the copies of what queries are made of */
  uint32_t last, reserved[13];
  rdkv_cuda__piece piece[2]; /* this one and the next */
} rdkv_cuda__shared;         /* 512 bytes */

/* Then every n_warps-th 16 tokens of the tail, K and V apart. */
typedef struct rdkv_cuda__rows {
  uint32_t chunk, chunk_end; /* 16 tokens each */
  uint32_t tokens;           /* of the tail, with the new one */
  uint32_t value;            /* 0: K is next; 1: V */
  uint32_t put, pending;     /* the slot they go to; copies under way */
} rdkv_cuda__rows;

typedef struct rdkv_cuda__warp {
  uint64_t barrier[RDKV_CUDA__SLOTS];
  float max[8], sum[8], mid[8]; /* of each column, and what a unit of acc is worth */
  float unit;
  uint32_t row_new; /* index of the token that the piece appends, or UINT32_MAX */
  const uint8_t *k_new, *v_new;
  rdkv_cuda__rows rows; /* while the warp is busy with tiles: saves registers */
  uint32_t chunk;       /* the first of those */
  uint32_t reserved[3];
} rdkv_cuda__warp; /* 208 bytes */

/* A warp's part of shared memory: slots for copies under way, filled and emptied in turn. */
typedef struct rdkv_cuda__ring {
  uint32_t base, size, barrier; /* shared addresses of the first slot and of its barrier */
  uint32_t parity;              /* bit j: of the phase that slot j's barrier completes next */
  uint32_t pending;             /* before sm_90: groups of copies under way */
  uint64_t policy;              /* evict first */
} rdkv_cuda__ring;

/* A warp's tiles of one V run after the other: every n_warps-th. Lane j looks after slot j. */
typedef struct rdkv_cuda__feed {
  uint64_t source;            /* address of the lane's next tile */
  uint32_t next;              /* its index */
  uint32_t tile, end;         /* the warp's next tile, and the end of those in this run */
  uint32_t run, bytes, slots; /* bytes of a tile */
  uint32_t begin;             /* the run's first tile and its address */
  uint64_t base;
} rdkv_cuda__feed;

/* A value that is the same in all lanes, so that the compiler knows: branches and addresses made of
   it cost less. */
__device__ __forceinline__ uint32_t rdkv_cuda__uniform(uint32_t x) {
  return __shfl_sync(RDKV_CUDA__FULL, x, 0);
}

__device__ __forceinline__ uint32_t rdkv_cuda__shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void rdkv_cuda__wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

/* Waits for the copy in a slot. Slots are taken in the order in which they were filled. */
__device__ __forceinline__ void rdkv_cuda__take(rdkv_cuda__ring &r, uint32_t slot) {
#if __CUDA_ARCH__ >= 900
  rdkv_cuda__wait(r.barrier + 8u * slot, r.parity >> slot & 1);
  r.parity ^= 1u << slot;
#else
  switch (r.pending--) { /* groups complete in order: leave the younger ones under way */
    case 1:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
      break; /* of up to 8 */
  }
  __syncwarp();
#endif
}

/* Copies tiles to count slots from first on, which the warp has done with, while there are any. */
__device__ __forceinline__ void rdkv_cuda__fill(rdkv_cuda__ring &r, rdkv_cuda__feed &f,
                                                uint32_t n_warps, uint32_t first, uint32_t count) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t turn = lane >= first ? lane - first : lane + f.slots - first;
  const bool mine = lane < f.slots && turn < count && f.next < f.end;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred mine;\n\t"
      "setp.ne.u32 mine, %5, 0;\n\t"
      "@mine mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n\t"
      "@mine cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;\n\t}" ::"r"(r.base + lane * f.bytes),
      "l"(f.source), "r"(f.bytes), "r"(r.barrier + 8u * lane), "l"(r.policy),
      "r"(static_cast<uint32_t>(mine))
      : "memory");
#else
  for (uint32_t k = 0; k < count; ++k) {
    const uint32_t slot = first + k < f.slots ? first + k : first + k - f.slots;
    const uint64_t source = __shfl_sync(RDKV_CUDA__FULL, f.source, static_cast<int>(slot));
    if (!__shfl_sync(RDKV_CUDA__FULL, static_cast<int>(mine), static_cast<int>(slot))) continue;
    for (uint32_t i = 16 * lane; i < f.bytes; i += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(r.base + slot * f.bytes + i),
                   "l"(source + i)
                   : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    ++r.pending;
  }
#endif
  if (mine) {
    f.source += static_cast<uint64_t>(f.slots * n_warps) * f.bytes;
    f.next += f.slots * n_warps;
  }
}

/* Copies 16 rows of row_bytes (a multiple of 16) to shared address to, pitch apart. Rows from the
   last one on repeat it; row_new comes from source_new. */
__device__ __forceinline__ void rdkv_cuda__issue_rows(rdkv_cuda__ring &r, uint32_t slot,
                                                      uint32_t to, uint32_t row_bytes,
                                                      uint32_t pitch, const uint8_t *source,
                                                      size_t stride, uint32_t last,
                                                      uint32_t row_new, const uint8_t *source_new) {
  const uint32_t lane = threadIdx.x & 31;
#if __CUDA_ARCH__ >= 900
  const uint32_t barrier = r.barrier + 8u * slot;
  if (lane == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(row_bytes * 16)
                 : "memory");
  __syncwarp();
  if (lane < 16) {
    const uint32_t row = min(lane, last);
    const uint8_t *from = row == row_new ? source_new : source + row * stride;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to + lane * pitch),
        "l"(__cvta_generic_to_global(from)), "r"(row_bytes), "r"(barrier), "l"(r.policy)
        : "memory");
  }
#else
  const uint32_t chunks = row_bytes / 16;
  for (uint32_t i = lane; i < 16 * chunks; i += 32) {
    const uint32_t at = i / chunks, row = min(at, last), byte = 16u * (i - at * chunks);
    const uint8_t *from = row == row_new ? source_new : source + row * stride;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at * pitch + byte),
                 "l"(__cvta_generic_to_global(from + byte))
                 : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  (void)slot, ++r.pending;
#endif
}

__device__ __forceinline__ uint32_t rdkv_cuda__run_tiles(const rdkv_cuda_head &h, uint32_t run) {
  return (rdkv_cuda__uniform(h.n_tokens[run]) + 31) / 32;
}

/* Starts at tile, before its run. */
__device__ __forceinline__ void rdkv_cuda__feed_tiles(const rdkv_cuda__piece &x, uint32_t tile,
                                                      rdkv_cuda__feed &f) {
  const uint64_t tiles = reinterpret_cast<uint64_t>(x.head.tiles);
  f.base = static_cast<uint64_t>(rdkv_cuda__uniform(static_cast<uint32_t>(tiles >> 32))) << 32 |
           rdkv_cuda__uniform(static_cast<uint32_t>(tiles));
  f.tile = tile, f.begin = 0, f.run = UINT32_MAX;
}

/* Goes on to the next run with tiles for this warp, and has up to count copies under way; false if
   there is none. */
__device__ __forceinline__ bool rdkv_cuda__next_run(const rdkv_cuda__piece &x, int v_dim,
                                                    uint32_t n_warps, rdkv_cuda__ring &r,
                                                    rdkv_cuda__feed &f, uint32_t count) {
  const uint32_t tile_end = rdkv_cuda__uniform(x.tile_end);
  if (f.tile >= tile_end) return false;
  const uint32_t key_bytes = rdkv_cuda__uniform(rdkv_cuda_key_bytes(x.head)) + 128u;
  uint32_t n = 0;
  do {
    f.base += static_cast<uint64_t>(n) * f.bytes, f.begin += n;
    f.bytes = key_bytes + (static_cast<uint32_t>(v_dim * 8) << ++f.run);
    n = rdkv_cuda__run_tiles(x.head, f.run);
  } while (f.tile >= f.begin + n);
  f.end = min(f.begin + n, tile_end);
  f.slots = min(r.size / f.bytes, static_cast<uint32_t>(RDKV_CUDA__SLOTS));
  f.next = f.tile + (threadIdx.x & 31) * n_warps;
  f.source = f.base + static_cast<uint64_t>(f.next - f.begin) * f.bytes;
  rdkv_cuda__fill(r, f, n_warps, 0, min(count, f.slots));
  f.base += static_cast<uint64_t>(n) * f.bytes, f.begin += n;
  return true;
}

/* Issues the copies of rows of the tail that there is room for. */
__device__ __forceinline__ void rdkv_cuda__fill_rows(const rdkv_cuda__warp &w,
                                                     const rdkv_cuda__piece &x, uint32_t k_dim,
                                                     uint32_t v_dim, uint32_t n_warps,
                                                     rdkv_cuda__ring &r, rdkv_cuda__rows &f) {
#pragma unroll 1
  while (f.chunk < f.chunk_end && f.pending < RDKV_CUDA__ROW_SLOTS) {
    const uint32_t row_bytes = 2u * (f.value ? v_dim : k_dim), first = 16u * f.chunk;
    const size_t stride = 2u * static_cast<size_t>(f.value ? x.v_token : x.k_token);
    rdkv_cuda__issue_rows(
        r, f.put, r.base + f.put * (r.size / RDKV_CUDA__ROW_SLOTS), row_bytes, row_bytes + 16u,
        static_cast<const uint8_t *>(f.value ? x.v : x.k) + first * stride, stride,
        f.tokens - 1 - first, w.row_new - first, f.value ? w.v_new : w.k_new);
    f.put = f.put + 1 == RDKV_CUDA__ROW_SLOTS ? 0 : f.put + 1;
    if (f.value) f.chunk += n_warps;
    f.value ^= 1, ++f.pending;
  }
}

template <bool PAIRED, bool BF16, int D>
__device__ __forceinline__ void rdkv_cuda__tail_loop(rdkv_cuda_acc<D> &a, const rdkv_cuda__warp &w,
                                                     const rdkv_cuda__piece &x, uint32_t k_dim,
                                                     uint32_t n_warps, rdkv_cuda__ring &r,
                                                     const uint8_t *fragments, uint32_t rest,
                                                     const float2 (&factor)[2]) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t slot_bytes = r.size / RDKV_CUDA__ROW_SLOTS;
  uint32_t chunk = rdkv_cuda__uniform(w.chunk), slot = 0, weights[2];
  rdkv_cuda__rows f;
  f.chunk = rdkv_cuda__uniform(w.rows.chunk), f.chunk_end = rdkv_cuda__uniform(w.rows.chunk_end);
  f.tokens = rdkv_cuda__uniform(w.rows.tokens), f.value = rdkv_cuda__uniform(w.rows.value);
  f.put = rdkv_cuda__uniform(w.rows.put), f.pending = rdkv_cuda__uniform(w.rows.pending);
  bool value = false;
  rdkv_cuda__fill_rows(w, x, k_dim, 16 * D, n_warps, r, f);
#pragma unroll 1
  while (chunk < f.chunk_end) {
    rdkv_cuda__take(r, slot);
    const uint32_t at = r.base + slot * slot_bytes;
    slot = slot + 1 == RDKV_CUDA__ROW_SLOTS ? 0 : slot + 1;
    if (!value)
      rdkv_cuda_dense_keys<PAIRED, BF16>(a, at, 2u * k_dim + 16u, k_dim, f.tokens - 16u * chunk,
                                         fragments, rest, factor, weights);
    else
      rdkv_cuda_dense_values<BF16>(a, at, 32u * D + 16u, weights);
    __syncwarp();
    --f.pending;
    rdkv_cuda__fill_rows(w, x, k_dim, 16 * D, n_warps, r, f);
    if (value) {
      if (w.row_new - 16u * chunk < 16u && w.row_new < x.capacity) { /* append */
        uint4 *k = reinterpret_cast<uint4 *>(static_cast<uint8_t *>(x.k) +
                                             2u * static_cast<size_t>(x.k_token) * w.row_new);
        uint4 *v = reinterpret_cast<uint4 *>(static_cast<uint8_t *>(x.v) +
                                             2u * static_cast<size_t>(x.v_token) * w.row_new);
        if (lane < k_dim / 8) k[lane] = reinterpret_cast<const uint4 *>(w.k_new)[lane];
        if (lane < 2 * D) v[lane] = reinterpret_cast<const uint4 *>(w.v_new)[lane];
      }
      chunk += n_warps;
    }
    value = !value;
  }
}

/* Dim d of the four columns from c on, and with d = 0 their lse. */
__device__ __forceinline__ void rdkv_cuda__write(const rdkv_cuda__args &p,
                                                 const rdkv_cuda__piece &x, uint32_t c, uint32_t d,
                                                 uint32_t v_dim, const float4 &top,
                                                 const float4 &sum, const float4 &value) {
  const float t[4] = {top.x, top.y, top.z, top.w}, s[4] = {sum.x, sum.y, sum.z, sum.w};
  const float v[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (uint32_t k = 0; k < 4; ++k)
    if (c + k < x.columns) {
      const size_t head = x.first_query + c + k;
      rdkv_cuda__store(p.io.out, head * v_dim + d, p.dtype,
                       s[k] > 0 ? __fdividef(v[k], s[k]) : 0.0f);
      if (d == 0 && p.io.lse)
        p.io.lse[head] = s[k] > 0 ? (t[k] + log2f(s[k])) * 0.69314718f : -INFINITY;
    }
}

__device__ __forceinline__ void rdkv_cuda__fma4(float4 &a, const float4 &w, const float4 &v) {
  a.x += w.x * v.x, a.y += w.y * v.y, a.z += w.z * v.z, a.w += w.w * v.w;
}

__device__ __forceinline__ void rdkv_cuda__fetch(rdkv_cuda__piece *to,
                                                 const rdkv_cuda__piece *from) {
  const uint32_t lane = threadIdx.x & 31;
  __syncwarp();
  if (lane < sizeof(rdkv_cuda__piece) / 16)
    reinterpret_cast<uint4 *>(to)[lane] = reinterpret_cast<const uint4 *>(from)[lane];
  __syncwarp();
}

/* What a piece's query is made of: the table of its head and the rows of q. One warp copies them;
   rows may wait until the launch in front has written them. */
__device__ __forceinline__ uint32_t rdkv_cuda__table_bytes(const rdkv_cuda__piece &x) {
  const uint32_t n = 16u * (x.head.n_blocks[0] + x.head.n_blocks[1] + x.head.n_blocks[2]);
  return x.tile_begin < x.tile_end ? (5 * n + 3 * x.head.n_dropped + 15) / 16 * 16 : 0;
}

__device__ __forceinline__ void rdkv_cuda__copy(uint8_t *to, const uint8_t *from, uint32_t bytes,
                                                uint64_t *barrier) {
#if __CUDA_ARCH__ >= 900
  if (bytes)
    asm volatile(
        "{\n\t.reg .pred one;\n\t"
        "elect.sync _|one, 0xffffffff;\n\t"
        "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];\n\t}" ::"r"(rdkv_cuda__shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(rdkv_cuda__shared_address(barrier))
        : "memory");
#else
  (void)barrier;
  for (uint32_t i = threadIdx.x & 31; i < bytes / 16; i += 32)
    reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
#endif
}

__device__ __forceinline__ void rdkv_cuda__copy_table(const rdkv_cuda__args &p,
                                                      const rdkv_cuda__piece &x, uint8_t *to,
                                                      uint64_t *barrier) {
  const uint32_t bytes = rdkv_cuda__table_bytes(x);
#if __CUDA_ARCH__ >= 900
  const uint32_t all = bytes + x.columns * p.row_bytes;
  if ((threadIdx.x & 31) == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     rdkv_cuda__shared_address(barrier)),
                 "r"(all)
                 : "memory");
  __syncwarp();
#endif
  rdkv_cuda__copy(to, x.head.table, bytes, barrier);
}

__device__ __forceinline__ void rdkv_cuda__copy_rows(const rdkv_cuda__args &p,
                                                     const rdkv_cuda__piece &x, uint8_t *to,
                                                     uint64_t *barrier) {
  rdkv_cuda__copy(
      to + p.table_bytes,
      static_cast<const uint8_t *>(p.io.q) + static_cast<size_t>(x.first_query) * p.row_bytes,
      x.columns * p.row_bytes, barrier);
}

/* The head's last block adds up all parts, in their order, each [values][max][sum]. Slots:
   first_slot, then that of the first group of each following block. scratch: the rings. */
template <uint32_t v_dim, uint32_t columns>
__device__ __forceinline__ void rdkv_cuda__combine(const rdkv_cuda__args &p,
                                                   const rdkv_cuda__piece &x, float *scratch) {
  constexpr uint32_t n_values = v_dim * columns;
  const uint32_t n = x.n_parts, even = x.first_slot & ~1u, stride = n_values + 2 * columns;
  const uint32_t n4 = n_values / 4, n_heads = n * columns;
  /* threads that share a value take every share-th part of it */
  const uint32_t share = max(1u, blockDim.x / n4);
  float *weight = scratch, *sums = scratch + n_heads, *maxima = sums + n_heads;
  float *tops = maxima + n_heads;
  float4 *both = reinterpret_cast<float4 *>(tops + 8);
  const uint32_t o = threadIdx.x % n4, h = threadIdx.x / n4;
  float4 v[4]; /* the first parts travel while the weights are made */
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t i = h + j * share;
    if (h < share && i < n)
      v[j] =
          __ldcg(reinterpret_cast<const float4 *>(
                     p.partials + static_cast<size_t>(i ? even + 2 * i : x.first_slot) * stride) +
                 o);
  }
  for (uint32_t i = threadIdx.x; i < n_heads; i += blockDim.x) {
    const uint32_t k = i / columns, c = i & (columns - 1);
    const float *part = p.partials + static_cast<size_t>(k ? even + 2 * k : x.first_slot) * stride;
    maxima[i] = __ldcg(part + n_values + c), sums[i] = __ldcg(part + n_values + columns + c);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n_heads; i += blockDim.x) {
    float top = -INFINITY;
#pragma unroll 8
    for (uint32_t k = i & (columns - 1); k < n_heads; k += columns) top = fmaxf(top, maxima[k]);
    weight[i] = maxima[i] == top ? 1.0f : rdkv_cuda__exp2(maxima[i] - top);
    sums[i] *= weight[i];
    if (i < columns) tops[i] = top;
  }
  __syncthreads();
  for (uint32_t base = 0; base < n4; base += blockDim.x) {
    const uint32_t at = base + o, c = 4 * at & (columns - 1);
    float4 value = make_float4(0, 0, 0, 0), sum = value;
    const float4 top = *reinterpret_cast<const float4 *>(tops + c);
    if (h < share && at < n4) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j)
        if (h + j * share < n && base == 0)
          rdkv_cuda__fma4(value,
                          *reinterpret_cast<const float4 *>(weight + (h + j * share) * columns + c),
                          v[j]);
#pragma unroll 4
      for (uint32_t i = base ? h : h + 4 * share; i < n; i += share)
        rdkv_cuda__fma4(
            value, *reinterpret_cast<const float4 *>(weight + i * columns + c),
            __ldcg(reinterpret_cast<const float4 *>(
                       p.partials + static_cast<size_t>(i ? even + 2 * i : x.first_slot) * stride) +
                   at));
    }
    if (share > 1) { /* then n4 < blockDim.x, and this is the only round */
      if (h > 0 && h < share) both[(h - 1) * n4 + o] = value;
      __syncthreads();
      if (h == 0)
        for (uint32_t k = 1; k < share; ++k)
          rdkv_cuda__fma4(value, make_float4(1, 1, 1, 1), both[(k - 1) * n4 + o]);
    }
    if (h == 0 && at < n4) {
#pragma unroll 4
      for (uint32_t k = 0; k < n; ++k)
        rdkv_cuda__fma4(sum, make_float4(1, 1, 1, 1),
                        *reinterpret_cast<const float4 *>(sums + k * columns + c));
      rdkv_cuda__write(p, x, c, 4 * at / columns, v_dim, top, sum, value);
    }
  }
}

#if __CUDA_ARCH__ >= 900
/* Of the same variable in the cluster's block rank. */
__device__ __forceinline__ uint32_t rdkv_cuda__remote(const void *p, uint32_t rank) {
  uint32_t y;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(y)
      : "r"(rdkv_cuda__shared_address(p)), "r"(rank));
  return y;
}

__device__ __forceinline__ float rdkv_cuda__remote_float(const float *p, uint32_t rank) {
  float y;
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(y)
               : "r"(rdkv_cuda__remote(p, rank))
               : "memory");
  return y;
}

__device__ __forceinline__ float4 rdkv_cuda__remote_float4(const float *p, uint32_t rank) {
  float4 y;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w)
               : "r"(rdkv_cuda__remote(p, rank))
               : "memory");
  return y;
}

/* The blocks of a cluster add up what each has left in values [v_dim][columns], sh->top and
   sh->sum: each writes its part of the dims. One warp works; all threads call. weight: room for 18
   times the columns. */
template <uint32_t v_dim, uint32_t columns>
__device__ __forceinline__ void rdkv_cuda__combine_cluster(const rdkv_cuda__args &p,
                                                           const rdkv_cuda__piece &x,
                                                           const rdkv_cuda__shared *sh,
                                                           const float *values, float *weight) {
  constexpr uint32_t n4 = v_dim * columns / 4; /* a lane takes four columns of a dim */
  const uint32_t n = x.n_parts, share = (n4 + n - 1) / n, lane = threadIdx.x & 31;
  const uint32_t width = share <= 4 ? 4 : share <= 8 ? 8 : share <= 16 ? 16 : 32;
  const uint32_t group = lane / width, groups = 32 / width; /* lanes that share the blocks */
  const uint32_t end = min(n4, (x.part + 1) * share);
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (uint32_t first = x.part * share; first < end; first += width) {
      const uint32_t at = first + lane % width, o = min(at, end - 1), c = 4 * o & (columns - 1);
      float4 v[4]; /* the first values travel while the weights are made */
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j)
        if (group + j * groups < n)
          v[j] = rdkv_cuda__remote_float4(values + 4 * o, group + j * groups);
      float t[columns / 2], s[columns / 2]; /* of block and column 32 j + lane */
#pragma unroll
      for (uint32_t j = 0; j < columns / 2; ++j) {
        const uint32_t i = 32 * j + lane, k = i / columns;
        t[j] = k < n ? rdkv_cuda__remote_float(sh->top + i % columns, k) : -INFINITY;
        s[j] = k < n ? rdkv_cuda__remote_float(sh->sum + i % columns, k) : 0.0f;
      }
      float top = -INFINITY, sum = 0;
#pragma unroll
      for (uint32_t j = 0; j < columns / 2; ++j) top = fmaxf(top, t[j]);
      for (uint32_t d = columns; d < 32; d <<= 1)
        top = fmaxf(top, __shfl_xor_sync(RDKV_CUDA__FULL, top, d));
#pragma unroll
      for (uint32_t j = 0; j < columns / 2; ++j) {
        const float e = t[j] == top ? 1.0f : rdkv_cuda__exp2(t[j] - top);
        weight[32 * j + lane] = e, sum += e * s[j];
      }
      for (uint32_t d = columns; d < 32; d <<= 1) sum += __shfl_xor_sync(RDKV_CUDA__FULL, sum, d);
      if (lane < columns) weight[16 * columns + lane] = top, weight[17 * columns + lane] = sum;
      __syncwarp();
      float4 value = make_float4(0, 0, 0, 0);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t k = group + j * groups;
        if (k < n)
          rdkv_cuda__fma4(value, *reinterpret_cast<const float4 *>(weight + k * columns + c), v[j]);
      }
#pragma unroll 4
      for (uint32_t k = group + 4 * groups; k < n; k += groups)
        rdkv_cuda__fma4(value, *reinterpret_cast<const float4 *>(weight + k * columns + c),
                        rdkv_cuda__remote_float4(values + 4 * o, k));
      for (uint32_t d = width; d < 32; d <<= 1) {
        value.x += __shfl_xor_sync(RDKV_CUDA__FULL, value.x, d);
        value.y += __shfl_xor_sync(RDKV_CUDA__FULL, value.y, d);
        value.z += __shfl_xor_sync(RDKV_CUDA__FULL, value.z, d);
        value.w += __shfl_xor_sync(RDKV_CUDA__FULL, value.w, d);
      }
      if (group == 0 && at < end)
        rdkv_cuda__write(p, x, c, 4 * at / columns, v_dim,
                         *reinterpret_cast<const float4 *>(weight + 16 * columns + c),
                         *reinterpret_cast<const float4 *>(weight + 17 * columns + c), value);
      __syncwarp();
    }
  }
  /* nobody leaves while its values may still be read */
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
#endif

/* A block takes its pieces one after the other. Within a piece each warp works alone on its own
   tiles; the block meets before, to prepare the query, and after a group, to add up. */
template <int D, bool PAIRED>
static __global__ void __launch_bounds__(D <= 8 ? 512 : 256, 1)
    rdkv_cuda__attend_kernel(const __grid_constant__ rdkv_cuda__args p) {
  extern __shared__ __align__(128) uint8_t memory[];
  uint8_t *key_fragments = memory, *tail_fragments = memory + p.key_fragments;
  uint8_t *const source = tail_fragments + p.tail_fragments;
  rdkv_cuda__shared *const sh = reinterpret_cast<rdkv_cuda__shared *>(source + p.source_bytes);
  const uint32_t warp = rdkv_cuda__uniform(threadIdx.x >> 5);
  const uint32_t lane = threadIdx.x & 31, n_warps = blockDim.x >> 5;
  rdkv_cuda__warp *const warps = reinterpret_cast<rdkv_cuda__warp *>(sh + 1);
  uint8_t *const rings = reinterpret_cast<uint8_t *>(warps + n_warps);

  if (warp == 0) rdkv_cuda__fetch(&sh->piece[0], p.pieces + blockIdx.x);
  rdkv_cuda__ring ring;
  ring.base = rdkv_cuda__shared_address(rings + warp * p.ring_bytes);
  ring.barrier = rdkv_cuda__shared_address(warps[warp].barrier);
  ring.size = p.ring_bytes, ring.parity = ring.pending = 0, ring.policy = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(ring.policy));
  if (lane < RDKV_CUDA__SLOTS)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.barrier + 8u * lane)
                 : "memory");
  if (threadIdx.x == 0)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(rdkv_cuda__shared_address(&sh->barrier))
        : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  __syncthreads();
  if (!(sh->piece[0].flags & RDKV_CUDA__ACTIVE)) return;

  /* PAIRED: groups of up to 4, where the rests of the query are columns 4-7 */
  constexpr uint32_t columns = PAIRED ? 4 : 8;
  const uint32_t k_dim = static_cast<uint32_t>(p.k_dim);
  const uint32_t key_rest = PAIRED ? 128u : p.key_fragments / 2;
  const uint32_t tail_rest = PAIRED ? 128u : p.tail_fragments / 2;
  rdkv_cuda_acc<D> a;
  rdkv_cuda_clear(a);
  for (uint32_t turn = 0;; ++turn) {
    const rdkv_cuda__piece &x = sh->piece[turn & 1];
    rdkv_cuda__feed f;
    const uint32_t tile_begin = rdkv_cuda__uniform(x.tile_begin) + warp;
    rdkv_cuda__feed_tiles(x, tile_begin, f);
    bool tiles = false; /* this warp has some */
    const bool keys = x.tile_begin < x.tile_end;
    if (turn == 0 && warp == 0) rdkv_cuda__copy_table(p, x, source, &sh->barrier);
    /* tiles first, if the query has to be waited for; else last: they keep memory busy */
    const bool early = turn == 0 && p.overlap;
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      if ((step == 0) == early) {
        tiles = rdkv_cuda__next_run(x, 16 * D, n_warps, ring, f,
                                    early ? RDKV_CUDA__SLOTS : RDKV_CUDA__HASTE);
      } else if (turn == 0) {
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
        if (warp == 0) rdkv_cuda__copy_rows(p, x, source, &sh->barrier);
      }
    }
    uint32_t tail_tokens = 0;
    if (x.flags & RDKV_CUDA__LAST) tail_tokens = p.io.tail_tokens[x.sequence];
    /* the query, a column a warp: first for packed K, while the tail's length travels, then for the
     * tail */
    bool tail = false;
#if __CUDA_ARCH__ >= 900
    if (warp < columns) rdkv_cuda__wait(rdkv_cuda__shared_address(&sh->barrier), turn & 1);
#else
    if (turn == 0) __syncthreads();
#endif
    rdkv_cuda_head head = x.head;
    head.table = source;
#pragma unroll
    for (int plain = 0; plain < 2; ++plain) {
      if (plain && x.flags & RDKV_CUDA__LAST) {
        rdkv_cuda__rows rows;
        rows.tokens = min(tail_tokens, x.capacity);
        const uint32_t row_new = p.io.k_new ? rows.tokens++ : UINT32_MAX;
        const uint32_t n = (rows.tokens + 15) / 16, chunk = __umulhi(n, x.tail_begin);
        rows.chunk = chunk + warp, rows.value = rows.put = rows.pending = 0;
        rows.chunk_end = x.flags & RDKV_CUDA__TAIL_END ? n : __umulhi(n, x.tail_end);
        tail = chunk < rows.chunk_end;
        rdkv_cuda__warp &w = warps[warp];
        const uint32_t first = rows.chunk;
        if (lane == 0) {
          const size_t at = static_cast<size_t>(x.sequence) * p.n_kv_heads + x.kv_head / p.passes;
          w.k_new = static_cast<const uint8_t *>(p.io.k_new) + 2 * at * k_dim;
          w.v_new = static_cast<const uint8_t *>(p.io.v_new) + 2 * at * (16 * D);
          w.row_new = row_new, w.chunk = first;
        }
        __syncwarp();
        if (!tiles) rdkv_cuda__fill_rows(w, x, k_dim, 16 * D, n_warps, ring, rows);
        if (lane == 0) w.rows = rows;
      }
      if (!(plain ? tail : keys)) continue;
      uint8_t *to = plain ? tail_fragments : key_fragments;
#pragma unroll 1
      for (uint32_t c = warp; c < columns; c += n_warps) {
        const uint8_t *row = c < x.columns ? source + p.table_bytes + c * p.row_bytes : nullptr;
        rdkv_cuda_query(plain ? nullptr : &head, plain && p.tail_bf16, row, p.dtype, p.k_dim,
                        p.factor_log2, c, to, to + (plain ? tail_rest : key_rest),
                        plain ? &sh->tail_factor[c] : &sh->key_factor[c]);
      }
    }
    __syncthreads();
    if (tiles && !early && f.slots > RDKV_CUDA__HASTE)
      rdkv_cuda__fill(ring, f, n_warps, RDKV_CUDA__HASTE, f.slots - RDKV_CUDA__HASTE);
    if (x.flags & RDKV_CUDA__MORE && warp == n_warps - 1) { /* what the next query is made of */
      rdkv_cuda__piece &next = sh->piece[(turn + 1) & 1];
      rdkv_cuda__fetch(&next, p.pieces + x.next);
      rdkv_cuda__copy_table(p, next, source, &sh->barrier);
      rdkv_cuda__copy_rows(p, next, source, &sh->barrier);
    }

    const uint32_t mine = 2 * (lane & 3) & (columns - 1);
    if (keys) {
      const float2 *factor = sh->key_factor + mine;
      const uint32_t widths = rdkv_cuda__uniform(rdkv_cuda_key_widths(x.head));
      const uint8_t *own = rings + warp * p.ring_bytes;
      while (tiles) {
        const uint32_t run_tokens = rdkv_cuda__uniform(x.head.n_tokens[f.run]);
        /* f.begin is where the run ends by now */
        const uint32_t full = min(f.end, f.begin - (run_tokens % 32 != 0));
        const rdkv_cuda__lift<PAIRED> lift = rdkv_cuda__lift_of<PAIRED>(static_cast<int>(f.run));
        uint32_t slot = 0;
        rdkv_cuda__units(a, f.run == 3);
#pragma unroll 1
        while (f.tile < f.end) {
          const uint32_t second = slot + 1 == f.slots ? 0 : slot + 1;
          rdkv_cuda__take(ring, slot);
          if (PAIRED && f.slots >= 4 && f.tile + n_warps < full) {
            rdkv_cuda__take(ring, second);
            const uint8_t *at[2] = {own + slot * f.bytes, own + second * f.bytes};
            rdkv_cuda__tiles<PAIRED>(a, at, widths, static_cast<int>(f.run), 32, key_fragments,
                                     key_rest, factor, lift);
            __syncwarp();
            rdkv_cuda__fill(ring, f, n_warps, slot, 2);
            slot = second + 1 == f.slots ? 0 : second + 1, f.tile += 2 * n_warps;
          } else {
            const uint8_t *at[1] = {own + slot * f.bytes};
            rdkv_cuda__tiles<PAIRED>(a, at, widths, static_cast<int>(f.run),
                                     f.tile < full ? 32 : run_tokens % 32, key_fragments, key_rest,
                                     factor, lift);
            __syncwarp();
            rdkv_cuda__fill(ring, f, n_warps, slot, 1);
            slot = second, f.tile += n_warps;
          }
        }
        tiles = rdkv_cuda__next_run(x, 16 * D, n_warps, ring, f, RDKV_CUDA__SLOTS);
      }
    }
    if (tail) {
      const float2 factor[2] = {sh->tail_factor[mine], sh->tail_factor[mine + 1]};
      if (p.tail_bf16)
        rdkv_cuda__tail_loop<PAIRED, true>(a, warps[warp], x, k_dim, n_warps, ring, tail_fragments,
                                           tail_rest, factor);
      else
        rdkv_cuda__tail_loop<PAIRED, false>(a, warps[warp], x, k_dim, n_warps, ring, tail_fragments,
                                            tail_rest, factor);
    }

    if (x.flags & RDKV_CUDA__LAST) {
      /* warps leave their sums as they are, [dim][column], in their rings */
      const uint32_t g = lane >> 2, c2 = 2 * (lane & 3), n_values = 16 * D * columns;
      const float unit = (a.plain ? 1.0f : RDKV_CUDA__CODE_UNIT) / RDKV_CUDA_LIFT;
      if (c2 < columns) {
        float2 *to =
            reinterpret_cast<float2 *>(rings + warp * p.ring_bytes) + (g * columns + c2) / 2;
#pragma unroll
        for (uint32_t i = 0; i < D; ++i) {
          to[8 * i * columns] = make_float2(a.acc[i][0], a.acc[i][1]);
          to[(8 * i + 4) * columns] = make_float2(a.acc[i][2], a.acc[i][3]);
        }
      }
      for (uint32_t d = columns / 2; d < 32; d <<= 1)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          a.sum[k] += __shfl_xor_sync(RDKV_CUDA__FULL, a.sum[k], d);
          a.mid[k] += __shfl_xor_sync(RDKV_CUDA__FULL, a.mid[k], d);
        }
      if (g == 0 && c2 < columns) {
        rdkv_cuda__warp &w = warps[warp];
        *reinterpret_cast<float2 *>(&w.max[c2]) = make_float2(a.max[0], a.max[1]);
        *reinterpret_cast<float2 *>(&w.sum[c2]) = make_float2(a.sum[0], a.sum[1]);
        *reinterpret_cast<float2 *>(&w.mid[c2]) =
            make_float2(a.mid[0] - a.centre[0] * unit, a.mid[1] - a.centre[1] * unit);
        w.unit = unit;
      }
      __syncthreads();
      /* a cluster's blocks leave their sums where warp 0 left its: read by the same thread */
      const bool cluster = x.flags & RDKV_CUDA__CLUSTER;
      float *partial = p.partials + static_cast<size_t>(x.slot) * (n_values + 2 * columns);
      for (uint32_t o = threadIdx.x; o < n_values / 4; o += blockDim.x) {
        const uint32_t c = 4 * o & (columns - 1), d = 4 * o / columns;
        float4 top = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
#pragma unroll 2
        for (uint32_t w = 0; w < n_warps; ++w) {
          const float4 m = *reinterpret_cast<const float4 *>(&warps[w].max[c]);
          top.x = fmaxf(top.x, m.x), top.y = fmaxf(top.y, m.y);
          top.z = fmaxf(top.z, m.z), top.w = fmaxf(top.w, m.w);
        }
        float4 value = make_float4(0, 0, 0, 0), sum = value;
#pragma unroll 2
        for (uint32_t w = 0; w < n_warps; ++w) {
          const float4 m = *reinterpret_cast<const float4 *>(&warps[w].max[c]);
          float4 e = make_float4(m.x == top.x ? 1.0f : rdkv_cuda__exp2(m.x - top.x),
                                 m.y == top.y ? 1.0f : rdkv_cuda__exp2(m.y - top.y),
                                 m.z == top.z ? 1.0f : rdkv_cuda__exp2(m.z - top.z),
                                 m.w == top.w ? 1.0f : rdkv_cuda__exp2(m.w - top.w));
          rdkv_cuda__fma4(sum, e, *reinterpret_cast<const float4 *>(&warps[w].sum[c]));
          rdkv_cuda__fma4(value, e, *reinterpret_cast<const float4 *>(&warps[w].mid[c]));
          e.x *= warps[w].unit, e.y *= warps[w].unit, e.z *= warps[w].unit, e.w *= warps[w].unit;
          rdkv_cuda__fma4(value, e, reinterpret_cast<const float4 *>(rings + w * p.ring_bytes)[o]);
        }
        if (cluster) {
          reinterpret_cast<float4 *>(rings)[o] = value;
          if (d == 0) {
            *reinterpret_cast<float4 *>(sh->top + c) = top;
            *reinterpret_cast<float4 *>(sh->sum + c) = sum;
          }
        } else if (x.n_parts == 1) {
          rdkv_cuda__write(p, x, c, d, 16 * D, top, sum, value);
        } else {
          reinterpret_cast<float4 *>(partial)[o] = value;
          if (d == 0) {
            *reinterpret_cast<float4 *>(partial + n_values + c) = top;
            *reinterpret_cast<float4 *>(partial + n_values + columns + c) = sum;
          }
        }
      }
#if __CUDA_ARCH__ >= 900
      if (cluster)
        rdkv_cuda__combine_cluster<16 * D, columns>(p, x, sh, reinterpret_cast<float *>(rings),
                                                    reinterpret_cast<float *>(key_fragments));
#endif
      if (x.n_parts > 1 && !cluster) {
        __syncthreads();
        if (threadIdx.x == 0) {
          /* releases this block's part (the barrier above has ordered it before), acquires the
             others'; wraps to 0, ready for the next launch */
          const uint32_t head = x.sequence * p.n_kv_heads * p.passes + x.kv_head;
          uint32_t before;
          asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                       : "=r"(before)
                       : "l"(__cvta_generic_to_global(p.counters + head)), "r"(x.n_parts - 1)
                       : "memory");
          sh->last = before == x.n_parts - 1;
        }
        __syncthreads();
        if (sh->last) rdkv_cuda__combine<16 * D, columns>(p, x, reinterpret_cast<float *>(rings));
      }
      rdkv_cuda_clear(a);
    }
    if (!(x.flags & RDKV_CUDA__MORE)) break;
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::
                     : "memory"); /* plain writes to rings, then copies */
#endif
    __syncthreads();
  }
}

/* ---- >>cuda-launch : the host's side --------------------------------------------------------- */

static __global__ void rdkv_cuda__advance_kernel(uint32_t *tail_tokens, int batch) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < batch) ++tail_tokens[i];
}

typedef void (*rdkv_cuda__kernel)(rdkv_cuda__args);

static rdkv_cuda__kernel rdkv_cuda__kernel_for(int v_dim, bool paired) {
#define RDKV_CUDA__CASE(dim)                                 \
  case dim:                                                  \
    return paired ? rdkv_cuda__attend_kernel<dim / 16, true> \
                  : rdkv_cuda__attend_kernel<dim / 16, false>;
  switch (v_dim) {
#ifdef RDKV_CUDA_V_DIM
    RDKV_CUDA__CASE(RDKV_CUDA_V_DIM)
#else
    RDKV_CUDA__CASE(64)
    RDKV_CUDA__CASE(80)
    RDKV_CUDA__CASE(96)
    RDKV_CUDA__CASE(112)
    RDKV_CUDA__CASE(128)
    RDKV_CUDA__CASE(192)
    RDKV_CUDA__CASE(256)
#endif
    default:
      return nullptr;
  }
#undef RDKV_CUDA__CASE
}

/* A ring takes the largest tile, and three times 16 dense rows. Runs of K are padded apart: at most
   15 more channels of 4 bits and of 2 bits than k_dim 8-bit channels. */
static uint32_t rdkv_cuda__ring_bytes(const rdkv_cuda_config *c) {
  const int wide = c->k_dim > c->v_dim ? c->k_dim : c->v_dim;
  const int tile = c->k_dim * 32 + 384 + 128 + c->v_dim * 64;
  const int rows = 3 * 16 * (2 * wide + 16), bytes = tile > rows ? tile : rows;
  return static_cast<uint32_t>((bytes + 383) / 384 * 384); /* slots of whole 128 bytes */
}

/* Fragments of the query: for groups above 4 the rests lie behind. */
static uint32_t rdkv_cuda__fragments(const rdkv_cuda_config *c, int blocks) {
  return static_cast<uint32_t>(blocks) * (c->n_q_heads / c->n_kv_heads <= 4 ? 256u : 512u);
}

/* What fragments are made of: a head's table (runs padded as above) and rows of q. */
static uint32_t rdkv_cuda__table_room(const rdkv_cuda_config *c) {
  return (static_cast<uint32_t>(c->k_dim + 45) * 5 + 127) / 128 * 128;
}

static uint32_t rdkv_cuda__row_bytes(const rdkv_cuda_config *c) {
  return static_cast<uint32_t>(c->k_dim) * (c->dtype == RDKV_F32 ? 4u : 2u);
}

static uint32_t rdkv_cuda__source_bytes(const rdkv_cuda_config *c) {
  const uint32_t group = static_cast<uint32_t>(c->n_q_heads / c->n_kv_heads);
  return rdkv_cuda__table_room(c) +
         ((group < 8 ? group : 8) * rdkv_cuda__row_bytes(c) + 127) / 128 * 128;
}

static uint32_t rdkv_cuda__shared_bytes(const rdkv_cuda_config *c) {
  return rdkv_cuda__source_bytes(c) + rdkv_cuda__fragments(c, c->k_dim / 16 + 2) +
         rdkv_cuda__fragments(c, c->k_dim / 16) + static_cast<uint32_t>(sizeof(rdkv_cuda__shared)) +
         static_cast<uint32_t>(c->n_warps) *
             (static_cast<uint32_t>(sizeof(rdkv_cuda__warp)) + rdkv_cuda__ring_bytes(c));
}

static void rdkv_cuda__cluster_attribute(const rdkv_cuda_config *c, cudaLaunchConfig_t *launch) {
  cudaLaunchAttribute *a = launch->attrs + launch->numAttrs++;
  a->id = cudaLaunchAttributeClusterDimension;
  a->val.clusterDim.x = static_cast<uint32_t>(c->cluster);
  a->val.clusterDim.y = a->val.clusterDim.z = 1;
}

/* The largest cluster with which a head each fits on the device at once; 1 if none does. */
static cudaError_t rdkv_cuda__largest_cluster(rdkv_cuda_config *c, rdkv_cuda__kernel kernel,
                                              int n_blocks, uint32_t bytes) {
  const int heads = static_cast<int>(rdkv_cuda__layout_of(c).heads);
  for (c->cluster = 16; c->cluster > 1; c->cluster /= 2) {
    if (heads * c->cluster > n_blocks) continue;
    cudaLaunchConfig_t launch = cudaLaunchConfig_t();
    cudaLaunchAttribute attribute;
    launch.gridDim = dim3(static_cast<uint32_t>(heads * c->cluster));
    launch.blockDim = dim3(32u * static_cast<uint32_t>(c->n_warps));
    launch.dynamicSmemBytes = bytes, launch.attrs = &attribute;
    rdkv_cuda__cluster_attribute(c, &launch);
    int fit = 0;
    const cudaError_t e =
        cudaOccupancyMaxActiveClusters(&fit, reinterpret_cast<const void *>(kernel), &launch);
    if (e) return e;
    if (fit >= heads) break;
  }
  return cudaSuccess;
}

static size_t rdkv_cuda__partial_floats(const rdkv_cuda_config *c) {
  const size_t columns = c->n_q_heads / c->n_kv_heads <= 4 ? 4 : 8;
  return columns * (static_cast<size_t>(c->v_dim) + 2);
}

extern "C" cudaError_t rdkv_cuda_resolve(const rdkv_cuda_config *in, rdkv_cuda_config *out) {
  if (!in || !out) return cudaErrorInvalidValue;
  rdkv_cuda_config c = *in;
  if (c.n_layers == 0) c.n_layers = 1;
  if (c.n_kv_heads == 0) c.n_kv_heads = c.n_q_heads;
  if (c.v_dim == 0) c.v_dim = c.k_dim;
  if (c.max_segments == 0) c.max_segments = 1;
  if (c.n_layers < 1 || c.first_layer < 0 || c.batch < 1 || c.batch > 4096 || c.n_kv_heads < 1 ||
      c.n_q_heads < 1 || c.n_q_heads % c.n_kv_heads != 0 || c.n_q_heads > 65536 || c.k_dim < 16 ||
      c.k_dim > 256 || c.k_dim % 16 != 0 || c.max_segments < 1 || c.max_segments > 65536 ||
      c.dtype < RDKV_F32 || c.dtype > RDKV_BF16 ||
      (c.tail_dtype != RDKV_F16 && c.tail_dtype != RDKV_BF16) || !(c.softmax_scale >= 0) ||
      c.cluster < 0 || c.cluster > 16 || (c.cluster & (c.cluster - 1)) != 0 || c.n_warps < 0 ||
      c.n_warps > (c.v_dim <= 128 ? 16 : 8) || c.blocks_per_sm < 0 || c.n_blocks < 0)
    return cudaErrorInvalidValue;
  const rdkv_cuda__kernel kernel = rdkv_cuda__kernel_for(c.v_dim, c.n_q_heads <= 4 * c.n_kv_heads);
  if (!kernel) return cudaErrorInvalidValue;
  if (c.softmax_scale == 0) c.softmax_scale = 1.0f / sqrtf(static_cast<float>(c.k_dim));
  int device, sms, major, shared;
  cudaError_t e = cudaGetDevice(&device);
  if (!e) e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (!e) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!e) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e) return e;
  if (major < 8) return cudaErrorInvalidValue;
  if (major < 9) c.overlap = 0;
  e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e) return e;
  /* few heads: as much in flight as one block can hold; many, or a launch that shares the device
     with the next: as many warps as fit in blocks that cover for each other */
  const bool few = c.batch * c.n_kv_heads < sms / 4;
  const int most = c.v_dim <= 128 && c.k_dim <= 128 ? (few && !c.overlap ? 16 : 8) : 4;
  const int first = c.n_warps ? c.n_warps : most, last = c.n_warps || first != 8 ? first : 6;
  int blocks = 0;
  for (int n = first; n >= last; --n) {
    rdkv_cuda_config t = c;
    int fit = 0;
    t.n_warps = n;
    if (rdkv_cuda__shared_bytes(&t) <= static_cast<uint32_t>(shared))
      e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &fit, reinterpret_cast<const void *>(kernel), 32 * n, rdkv_cuda__shared_bytes(&t));
    if (e) return e;
    if (fit * n > blocks * c.n_warps || n == first) blocks = fit, c.n_warps = n;
  }
  while (blocks == 0 && c.n_warps > 1 && in->n_warps == 0) {
    c.n_warps /= 2;
    if (rdkv_cuda__shared_bytes(&c) <= static_cast<uint32_t>(shared)) blocks = 1;
  }
  if (blocks == 0) return cudaErrorInvalidValue;
  const uint32_t bytes = rdkv_cuda__shared_bytes(&c);
  if (c.blocks_per_sm == 0) c.blocks_per_sm = few ? 1 : blocks;
  /* clusters are short of multiprocessors, which an overlapped launch makes up for */
  if (c.cluster == 0 && (!c.overlap || c.n_blocks ||
                         rdkv_cuda__layout_of(&c).heads * 8u > static_cast<uint32_t>(blocks * sms)))
    c.cluster = 1;
  if (major >= 9 && c.cluster != 1) {
    e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                             cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (!e && c.cluster == 0) e = rdkv_cuda__largest_cluster(&c, kernel, sms, bytes);
    if (e) return e;
  }
  if (c.n_blocks == 0)
    c.n_blocks = c.cluster > 1 ? static_cast<int>(rdkv_cuda__layout_of(&c).heads) * c.cluster
                               : c.blocks_per_sm * sms;
  if (c.n_blocks < 1 || c.n_blocks % c.cluster != 0 || (c.cluster > 1 && major < 9))
    return cudaErrorInvalidValue;
  *out = c;
  return cudaSuccess;
}

extern "C" size_t rdkv_cuda_plan_bytes(const rdkv_cuda_config *cfg) {
  return rdkv_cuda__layout_of(cfg).bytes * static_cast<size_t>(cfg->n_layers);
}

extern "C" size_t rdkv_cuda_workspace_bytes(const rdkv_cuda_config *cfg) {
  return 2 * static_cast<size_t>(cfg->n_blocks) * rdkv_cuda__partial_floats(cfg) * sizeof(float);
}

extern "C" cudaError_t rdkv_cuda_upload(const rdkv_segment *segment, void *device,
                                        cudaStream_t stream) {
  if (!segment || !device || reinterpret_cast<uintptr_t>(device) % 128 != 0)
    return cudaErrorInvalidValue;
  return cudaMemcpyAsync(device, segment->block, segment->header->total_bytes,
                         cudaMemcpyHostToDevice, stream);
}

extern "C" void rdkv_cuda_tail(const rdkv_cuda_config *cfg, void *data, uint32_t capacity,
                               rdkv_cuda_sequence *s) {
  const int64_t k = static_cast<int64_t>(capacity) * cfg->k_dim;
  const int64_t v = static_cast<int64_t>(capacity) * cfg->v_dim;
  s->k = data, s->v = static_cast<uint16_t *>(data) + cfg->n_kv_heads * k;
  s->k_layer = s->v_layer = cfg->n_kv_heads * (k + v);
  s->k_head = k, s->v_head = v, s->k_token = cfg->k_dim, s->v_token = cfg->v_dim;
  s->capacity = capacity;
}

extern "C" cudaError_t rdkv_cuda_plan(const rdkv_cuda_config *cfg,
                                      const rdkv_cuda_sequence *sequences,
                                      const uint32_t *tail_tokens, void *plan,
                                      cudaStream_t stream) {
  if (!cfg || !sequences || !tail_tokens || !plan || reinterpret_cast<uintptr_t>(plan) % 128 != 0)
    return cudaErrorInvalidValue;
  const rdkv_cuda__layout l = rdkv_cuda__layout_of(cfg);
  rdkv_cuda__plan_args p;
  p.sequences = sequences, p.tail_tokens = tail_tokens, p.plan = static_cast<uint8_t *>(plan);
  p.layer_bytes = l.bytes, p.counters = l.counters, p.weights = l.weights;
  p.heads = l.heads, p.passes = l.passes, p.n_kv_heads = static_cast<uint32_t>(cfg->n_kv_heads);
  p.n_blocks = static_cast<uint32_t>(cfg->n_blocks);
  p.max_segments = static_cast<uint32_t>(cfg->max_segments);
  p.cluster = static_cast<uint32_t>(cfg->cluster), p.group = l.group;
  p.first_layer = cfg->first_layer, p.k_dim = cfg->k_dim, p.v_dim = cfg->v_dim;
  rdkv_cuda__plan_kernel<<<static_cast<uint32_t>(cfg->n_layers), RDKV_CUDA__PLAN_THREADS, 0,
                           stream>>>(p);
  return cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_attend(const rdkv_cuda_config *cfg, const void *plan, int layer,
                                        const rdkv_cuda_io *io, void *workspace,
                                        cudaStream_t stream) {
  if (!cfg || !plan || !io || !workspace || layer < 0 || layer >= cfg->n_layers || !io->q ||
      !io->out || reinterpret_cast<uintptr_t>(io->q) % 16 != 0 || !io->tail_tokens ||
      !io->k_new != !io->v_new)
    return cudaErrorInvalidValue;
  const rdkv_cuda__layout l = rdkv_cuda__layout_of(cfg);
  const uint8_t *base = static_cast<const uint8_t *>(plan) + static_cast<size_t>(layer) * l.bytes;
  rdkv_cuda__args p;
  p.pieces = reinterpret_cast<const rdkv_cuda__piece *>(base);
  p.counters = reinterpret_cast<uint32_t *>(const_cast<uint8_t *>(base) + l.counters);
  p.partials = static_cast<float *>(workspace);
  p.io = *io;
  p.passes = l.passes;
  p.n_kv_heads = static_cast<uint32_t>(cfg->n_kv_heads);
  p.k_dim = cfg->k_dim, p.dtype = cfg->dtype, p.tail_bf16 = cfg->tail_dtype == RDKV_BF16;
  p.ring_bytes = rdkv_cuda__ring_bytes(cfg);
  p.key_fragments = rdkv_cuda__fragments(cfg, cfg->k_dim / 16 + 2);
  p.tail_fragments = rdkv_cuda__fragments(cfg, cfg->k_dim / 16);
  p.table_bytes = rdkv_cuda__table_room(cfg), p.row_bytes = rdkv_cuda__row_bytes(cfg);
  p.source_bytes = rdkv_cuda__source_bytes(cfg), p.overlap = cfg->overlap;
  p.factor_log2 = cfg->softmax_scale * 1.44269504f;
  cudaLaunchConfig_t launch = cudaLaunchConfig_t();
  cudaLaunchAttribute attributes[2];
  launch.attrs = attributes;
  launch.gridDim = dim3(static_cast<uint32_t>(cfg->n_blocks));
  launch.blockDim = dim3(32u * static_cast<uint32_t>(cfg->n_warps));
  launch.dynamicSmemBytes = rdkv_cuda__shared_bytes(cfg), launch.stream = stream;
  if (cfg->overlap) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    launch.numAttrs = 1;
  }
  if (cfg->cluster > 1) rdkv_cuda__cluster_attribute(cfg, &launch);
  return cudaLaunchKernelEx(
      &launch, rdkv_cuda__kernel_for(cfg->v_dim, cfg->n_q_heads <= 4 * cfg->n_kv_heads), p);
}

extern "C" cudaError_t rdkv_cuda_advance(uint32_t *tail_tokens, int batch, cudaStream_t stream) {
  if (!tail_tokens || batch < 1) return cudaErrorInvalidValue;
  rdkv_cuda__advance_kernel<<<static_cast<uint32_t>((batch + 255) / 256), 256, 0, stream>>>(
      tail_tokens, batch);
  return cudaGetLastError();
}

#endif /* RDKV_CUDA_IMPLEMENTED */
#endif /* RDKV_CUDA_IMPLEMENTATION */
