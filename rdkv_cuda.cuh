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
   were split over blocks, in a fixed order: the result is bitwise the same at every replay.

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
} rdkv_cuda_config;

/* What one layer's attention reads and writes, all in device memory. */
typedef struct rdkv_cuda_io {
  const void *q;     /* [batch][n_q_heads][k_dim] of config.dtype, after RoPE */
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
  float max[2];    /* column's reference: logit + log2 of the V scale stays below max + 6 */
  float sum[2];    /* this lane's part of the sum of 2^(logit - max) */
  float mid[2];    /* this lane's part of the sum of 2^(logit - max) * V midpoint */
  bool plain;      /* acc is in units of 2^9, as for fp16 V; else 2^(9-24), as for codes */
};

#define RDKV_CUDA__FULL 0xffffffffu
#define RDKV_CUDA__HEADROOM 6.0f /* rescaling waits until the max has grown by 2^6 */
#define RDKV_CUDA_LIFT                                                         \
  512.0f /* probabilities are held as 2^9 times their value: with the headroom \
             at most 2^15, and as far from fp16's underflow as can be */
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
  __half2_raw r;
  r.x = static_cast<unsigned short>(x & 0xffffu), r.y = static_cast<unsigned short>(x >> 16);
  return __half2(r);
}

__device__ __forceinline__ uint32_t rdkv_cuda__bits(__half2 h) {
  const __half2_raw r = h;
  return r.x | static_cast<uint32_t>(r.y) << 16;
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
  float x[3][4], m[3][4],
      constant = 0; /* this lane's channels 128 i + 4 lane + k, k_dim + 45 at most */
  uint32_t from[3][4], largest = 0;
  /* no branches before i = 2, so that all loads travel together */
#pragma unroll
  for (uint32_t i = 0; i < 3; ++i) {
    const uint32_t c = 128 * i + 4 * lane;
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      x[i][k] = head ? 0.0f : 1.0f, m[i][k] = 0, from[i][k] = c + k;
      if (!head || (i == 2 && all <= 256)) continue;
      const bool there = c + k < all; /* n is a multiple of 16, n_dropped of nothing */
      from[i][k] = there ? channel[c + k] : 0;
      m[i][k] = there ? __half2float(__ushort_as_half(mid[c + k])) : 0.0f;
      x[i][k] = c < n ? __half2float(__ushort_as_half(scale[c + k])) : 0.0f;
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < 3; ++i) {
    float value[4] = {0, 0, 0, 0};
    if (q && 128 * i < all && 128 * i + 4 * lane < all) rdkv_cuda__gather(q, from[i], dtype, value);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      constant += value[k] * m[i][k];
      x[i][k] *= value[k];
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

/* Logits (base 2) -> 2^(logit - max); updates max and sum. x[i] is of the lane's column i & 1, its
   token's V scale is scale_log2[i / 2]; logits of tokens that are not there are -Inf. */
template <int D, bool PAIRED, int N>
__device__ __forceinline__ void rdkv_cuda__weigh(rdkv_cuda_acc<D> &a, float (&x)[N],
                                                 const float (&scale_log2)[N / 2]) {
  bool over = false;
  float bound[2] = {a.max[0] + RDKV_CUDA__HEADROOM, a.max[1] + RDKV_CUDA__HEADROOM};
#pragma unroll
  for (int i = 0; i < N; ++i) over |= x[i] + scale_log2[i / 2] > bound[i & 1];
  if (__any_sync(RDKV_CUDA__FULL, over)) {
    float f[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float m = a.max[k];
      for (int i = k; i < N; i += 2) m = fmaxf(m, x[i] + scale_log2[i / 2]);
      for (int d = PAIRED ? 2 : 4; d < 32; d <<= 1)
        m = fmaxf(m, __shfl_xor_sync(RDKV_CUDA__FULL, m, d));
      f[k] = m == a.max[k] ? 1.0f : rdkv_cuda__exp2(a.max[k] - m);
      a.max[k] = m, a.sum[k] *= f[k], a.mid[k] *= f[k];
    }
#pragma unroll
    for (int i = 0; i < D; ++i)
      for (int c = 0; c < 4; ++c) a.acc[i][c] *= f[c & 1];
    for (int c = 0; c < 4; ++c) a.centre[c] *= f[c & 1];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = rdkv_cuda__exp2(x[i] - a.max[i & 1]);
#pragma unroll
  for (int i = 0; i < N; ++i) a.sum[i & 1] += x[i];
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

/* Adds N blocks of K to the products x, and moves on. */
template <int BITS, int N, bool PAIRED>
__device__ __forceinline__ void rdkv_cuda__key_blocks(float (&x)[2][4], const uint8_t *&block,
                                                      const uint8_t *&query, uint32_t rest) {
  const uint32_t lane = threadIdx.x & 31;
  uint4 w[N]; /* all loads first: the barrier keeps the compiler from spreading them out again */
  uint2 b[N], r[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    w[k] = rdkv_cuda__words<BITS>(block + 64 * BITS * k);
    b[k] = reinterpret_cast<const uint2 *>(query)[32 * k + lane];
    if (!PAIRED) r[k] = reinterpret_cast<const uint2 *>(query + rest)[32 * k + lane];
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < N; ++k)
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t f[4];
      rdkv_cuda__fragment<BITS>(w[k], s, f);
      rdkv_cuda__mma<false>(x[s], f[0], f[1], f[2], f[3], b[k].x, b[k].y);
      if (!PAIRED) rdkv_cuda__mma<false>(x[s], f[0], f[1], f[2], f[3], r[k].x, r[k].y);
    }
  block += N * 64 * BITS, query += N * 256;
}

template <int BITS, bool PAIRED>
__device__ __forceinline__ void rdkv_cuda__keys(float (&x)[2][4], const uint8_t *&block,
                                                const uint8_t *&query, uint32_t rest, uint32_t n) {
#pragma unroll 1
  for (; n >= 4; n -= 4) rdkv_cuda__key_blocks<BITS, 4, PAIRED>(x, block, query, rest);
  if (n & 2) rdkv_cuda__key_blocks<BITS, 2, PAIRED>(x, block, query, rest);
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
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2, upper = lane & 2;
  constexpr int N = PAIRED ? 4 : 8;
  float y[2][4] = {}, x[N];
  rdkv_cuda__keys<2, PAIRED>(y, tile, fragments, rest, widths & 255);
#pragma unroll
  for (int c = 0; c < 4; ++c) y[1][c] *= 0.0625f; /* 4^2 of the second half of 2-bit codes */
  rdkv_cuda__keys<4, PAIRED>(y, tile, fragments, rest, widths >> 8 & 255);
  rdkv_cuda__keys<8, PAIRED>(y, tile, fragments, rest, widths >> 16);
  /* A lane's tokens: 16 i + g and 16 i + g + 8, for i = 0 and 1; paired, lanes t and t + 2 hold a
     product and its rest: they exchange halves, then the lower one has i = 0, the upper one i = 1.
   */
  uint32_t words[N / 2];
  if (PAIRED) {
    float z[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      z[c] = __shfl_xor_sync(RDKV_CUDA__FULL, upper ? y[0][c] : y[1][c], 2);
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = (upper ? y[1][c] : y[0][c]) + z[c];
    const uint2 raw = *reinterpret_cast<const uint2 *>(tile + 16 * g + 4 * upper);
    words[0] = raw.x, words[1] = raw.y;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4 *>(tile + 16 * g);
    words[0] = raw.x, words[1] = raw.y;
    words[N / 2 - 2] = raw.z, words[N / 2 - 1] = raw.w;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = y[i >> 2][i & 3];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = x[i] * factor[i & 1].x + factor[i & 1].y;
  if (tokens < 32)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (8u * static_cast<uint32_t>(i / 2) + (PAIRED ? 8 * upper : 0) + g >= tokens)
        x[i] = -INFINITY;

  float scale[N / 2], mid[N / 2], scale_log2[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 v = __half22float2(rdkv_cuda__halves(run == 3 ? 0x3c00u : words[i]));
    scale[i] = v.x, mid[i] = v.y; /* 1 and 0 for V of 16 bits */
    /* a scale of 0 counts as fp16's smallest, so that 2^(logit - max) stays finite */
    scale_log2[i] = rdkv_cuda__log2(fmaxf(v.x, 5.9604645e-8f));
  }
  tile += 128;
  rdkv_cuda__units(a, run == 3);
  rdkv_cuda__weigh<D, PAIRED, N>(a, x, scale_log2);

  /* probabilities times V scale, less the factors that stay in the codes, as B fragments */
  const float odd = run == 0 ? 0.25f : run == 1 ? 0.0625f : 1.0f; /* pr = 1 */
  const float last = run == 0 ? 0.0625f : 1.0f;                   /* the second 16 tokens */
  uint32_t p[4];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    a.mid[0] += x[2 * i] * mid[i], a.mid[1] += x[2 * i + 1] * mid[i];
    float s = scale[i] * ((PAIRED ? upper != 0 : i >= 2) ? RDKV_CUDA_LIFT * last : RDKV_CUDA_LIFT);
    if (i & 1) s *= odd;
    p[i] = rdkv_cuda__transpose(rdkv_cuda__pair<false>(x[2 * i] * s, x[2 * i + 1] * s));
  }
  if (PAIRED) /* rows 4-7 of what was transposed are the second 16 tokens */
#pragma unroll
    for (int i = 0; i < 2; ++i) p[2 + i] = __shfl_xor_sync(RDKV_CUDA__FULL, p[i], 16);
  if (run == 0) {
    rdkv_cuda__values<2>(a, tile, p);
  } else if (run == 1) {
    rdkv_cuda__values<4>(a, tile, p);
  } else if (run == 2) {
    rdkv_cuda__values<8>(a, tile, p);
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s)
      for (int i = 0; i < D; ++i) {
        const uint4 v =
            reinterpret_cast<const uint4 *>(tile)[32 * (D * s + i) + static_cast<int>(lane)];
        rdkv_cuda__mma<false>(a.acc[i], v.x, v.y, v.z, v.w, p[2 * s], p[2 * s + 1]);
      }
  }
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
  const float none[N / 2] = {};
  rdkv_cuda__units(a, true);
  rdkv_cuda__weigh<D, PAIRED, N>(a, x, none);
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    p[i] = rdkv_cuda__transpose(
        rdkv_cuda__pair<BF16>(x[2 * i] * RDKV_CUDA_LIFT, x[2 * i + 1] * RDKV_CUDA_LIFT));
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
  RDKV_CUDA__ACTIVE = 1,  /* 0: a block without work */
  RDKV_CUDA__LAST = 2,    /* ends a group */
  RDKV_CUDA__MORE = 4,    /* the block has another share, pieces[next] */
  RDKV_CUDA__TAIL_END = 8 /* the group's part of the tail reaches to its end */
};

typedef struct rdkv_cuda__piece {
  rdkv_cuda_head head;
  void *k, *v; /* tail of this (layer, kv head) */
  uint32_t tile_begin, tile_end;
  uint32_t tail_begin, tail_end; /* parts of the tail, in 2^-32 of it */
  uint32_t sequence, kv_head;    /* kv_head counts passes apart */
  uint32_t k_token, v_token, capacity;
  uint32_t flags, next;
  uint32_t part, n_parts;    /* this group among the head's groups */
  uint32_t slot, first_slot; /* where it and the head's first one leave their results */
  uint32_t reserved[3];
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
  uint32_t heads, passes, n_kv_heads, n_blocks, max_segments;
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
   two; where there are many alike, each block gets whole ones. */
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
  quota = stretch ? (total + p.n_blocks - p.heads - 1) / (p.n_blocks - p.heads)
                  : (total + p.n_blocks - 1) / p.n_blocks;
  /* heads that are nearly alike: whole heads for a block, where that costs at most 6 % */
  const uint64_t whole = largest * ((p.heads + p.n_blocks - 1) / p.n_blocks);
  const bool alike = !stretch && whole * 16 <= quota * 17;
  if (alike) quota = whole;
  quota = max(quota, static_cast<uint64_t>(64)); /* below 8 KB a block's overhead is all there is */

  uint64_t start = 0;
  for (uint32_t base = 0; base < p.heads; base += blockDim.x) {
    const uint32_t h = base + threadIdx.x;
    const uint64_t w = h < p.heads ? weights[h] : 0;
    const uint64_t width = stretch      ? (w + quota - 1) / quota * quota
                           : alike && w ? quota / ((p.heads + p.n_blocks - 1) / p.n_blocks)
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
  uint32_t group, passes, n_q_heads, n_kv_heads;
  int k_dim, dtype, tail_bf16;
  uint32_t ring_bytes, key_fragments, tail_fragments; /* of shared memory */
  float factor_log2;
} rdkv_cuda__args;

/* Shared memory of a block: fragments of the query for packed and for dense K, this, and for each
   warp rdkv_cuda__warp and a ring of SLOTS copies. After the main loop the rings hold what the
   warps have to add up. */
#define RDKV_CUDA__SLOTS 3

typedef struct rdkv_cuda__shared {
  float2 key_factor[8], tail_factor[8];
  float top[8]; /* the block's max of each column */
  uint32_t last, reserved[23];
  rdkv_cuda__piece piece[2]; /* this one and the next */
} rdkv_cuda__shared;         /* 512 bytes */

typedef struct rdkv_cuda__warp {
  uint64_t barrier[4];
  float max[8], sum[8];
  const uint8_t *k_new, *v_new;  /* what the piece appends */
  uint32_t row_new, reserved[3]; /* its index or UINT32_MAX */
} rdkv_cuda__warp;               /* 128 bytes */

/* A warp's FIFO of copies into its part of shared memory. A copy that is too large for a slot takes
   the whole ring and travels alone. */
typedef struct rdkv_cuda__ring {
  uint32_t base, barrier, slot_bytes;
  uint32_t put, get;      /* the slots that are next */
  uint32_t phase;         /* of the barrier of slot get */
  uint32_t pending, room; /* copies under way, and how many there may be */
} rdkv_cuda__ring;

/* What a warp still has to fetch of its piece: every n_warps-th tile, then every n_warps-th 16
   tokens of the tail, K and V apart. */
typedef struct rdkv_cuda__feed {
  const uint8_t *source; /* of tile */
  uint32_t tile, run_end, tile_end;
  uint32_t bytes;            /* of a tile of this run */
  uint32_t chunk, chunk_end; /* 16 tokens each */
  uint32_t tokens;           /* of the tail, with the new one */
  bool value;
} rdkv_cuda__feed;

__device__ __forceinline__ uint32_t rdkv_cuda__shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/* The slot for a copy of bytes, or 0 if there is no room now. */
__device__ __forceinline__ uint32_t rdkv_cuda__reserve(rdkv_cuda__ring &r, uint32_t bytes) {
  if (r.pending == 0) r.room = RDKV_CUDA__SLOTS;
  if (bytes > r.slot_bytes) {
    if (r.pending) return 0;
    r.room = 1;
    return r.base;
  }
  return r.pending < r.room ? r.base + r.put * r.slot_bytes : 0;
}

/* Copies rows of row_bytes (a multiple of 16) to shared address to, pitch apart. Rows from the last
   one on repeat it; row_new comes from source_new. */
__device__ __forceinline__ void rdkv_cuda__issue(rdkv_cuda__ring &r, uint32_t to,
                                                 uint32_t row_bytes, uint32_t rows, uint32_t pitch,
                                                 const uint8_t *source, size_t stride,
                                                 uint32_t last, uint32_t row_new,
                                                 const uint8_t *source_new) {
  const uint32_t lane = threadIdx.x & 31;
#if __CUDA_ARCH__ >= 900
  const uint32_t barrier = r.barrier + 8u * r.put;
  if (lane == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(row_bytes * rows)
                 : "memory");
  if (rows > 1) __syncwarp();
  if (lane < rows) {
    const uint32_t row = min(lane, last);
    const uint8_t *from = row == row_new ? source_new : source + row * stride;
    asm volatile(
        "{\n\t.reg .b64 policy;\n\t"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], policy;\n\t}" ::"r"(to + lane * pitch),
        "l"(__cvta_generic_to_global(from)), "r"(row_bytes), "r"(barrier)
        : "memory");
  }
#else
  const uint32_t chunks = row_bytes / 16;
  for (uint32_t i = lane; i < rows * chunks; i += 32) {
    const uint32_t slot = rows == 1 ? 0 : i / chunks, row = min(slot, last);
    const uint8_t *from = row == row_new ? source_new : source + row * stride;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + slot * pitch +
                                                                   16u * (i - slot * chunks)),
                 "l"(__cvta_generic_to_global(from + 16u * (i - slot * chunks)))
                 : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  r.put = r.put + 1 == RDKV_CUDA__SLOTS ? 0 : r.put + 1;
  ++r.pending;
}

/* Waits for the oldest copy. Its address: that of slot get, or base if it is larger than a slot. */
__device__ __forceinline__ void rdkv_cuda__take(const rdkv_cuda__ring &r) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(r.barrier + 8u * r.get),
      "r"(r.phase)
      : "memory");
#else
  if (r.pending == 1) /* groups complete in order: leave the younger ones under way */
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (r.pending == 2)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  __syncwarp();
#endif
}

__device__ __forceinline__ void rdkv_cuda__release(rdkv_cuda__ring &r) {
  __syncwarp();
  --r.pending, ++r.get;
  if (r.get == RDKV_CUDA__SLOTS) r.get = 0, r.phase ^= 1;
}

/* Where a tile is in its run: what the loops over tiles keep, so that only a new run costs thought.
 */
__device__ __forceinline__ void rdkv_cuda__enter_run(const rdkv_cuda_head &h, uint32_t tile,
                                                     int *run, uint32_t *run_end,
                                                     uint32_t *token_end) {
  uint32_t start = 0, end = 0;
  int r = -1;
  do {
    ++r, start = end, end += (h.n_tokens[r] + 31) / 32;
  } while (tile >= end && r < 3);
  *run = r, *run_end = end, *token_end = 32 * start + h.n_tokens[r];
}

/* Issues the copies that there is room for. */
__device__ __forceinline__ void rdkv_cuda__fill_tiles(const rdkv_cuda__piece &x, int v_dim,
                                                      uint32_t n_warps, rdkv_cuda__ring &r,
                                                      rdkv_cuda__feed &f) {
#pragma unroll 1
  while (f.tile < f.tile_end) {
    if (f.tile >= f.run_end) { /* the first tile, or a new run */
      int run;
      uint32_t tokens;
      uint64_t offset;
      rdkv_cuda_tile_at(x.head, v_dim, f.tile, &run, &tokens, &offset);
      rdkv_cuda__enter_run(x.head, f.tile, &run, &f.run_end, &tokens);
      f.source = x.head.tiles + offset;
      f.bytes = rdkv_cuda_key_bytes(x.head) + 128u + (static_cast<uint32_t>(v_dim * 8) << run);
    }
    const uint32_t to = rdkv_cuda__reserve(r, f.bytes);
    if (!to) return;
    rdkv_cuda__issue(r, to, f.bytes, 1, 0, f.source, 0, 0, 1, nullptr);
    f.tile += n_warps, f.source += n_warps * f.bytes;
    if (r.pending == RDKV_CUDA__SLOTS) return;
  }
}

__device__ __forceinline__ void rdkv_cuda__fill_tail(const rdkv_cuda__warp &w,
                                                     const rdkv_cuda__piece &x, uint32_t k_dim,
                                                     uint32_t v_dim, uint32_t n_warps,
                                                     rdkv_cuda__ring &r, rdkv_cuda__feed &f) {
#pragma unroll 1
  while (f.chunk < f.chunk_end) {
    const uint32_t row_bytes = 2u * (f.value ? v_dim : k_dim);
    const uint32_t to = rdkv_cuda__reserve(r, 16u * (row_bytes + 16u));
    if (!to) return;
    const uint32_t first = 16u * f.chunk;
    const size_t stride = 2u * static_cast<size_t>(f.value ? x.v_token : x.k_token);
    rdkv_cuda__issue(r, to, row_bytes, 16, row_bytes + 16u,
                     static_cast<const uint8_t *>(f.value ? x.v : x.k) + first * stride, stride,
                     f.tokens - 1 - first, w.row_new - first, f.value ? w.v_new : w.k_new);
    if (f.value) f.chunk += n_warps;
    f.value = !f.value;
    if (r.pending == RDKV_CUDA__SLOTS) return;
  }
}

template <bool PAIRED, bool BF16, int D>
__device__ __forceinline__ void rdkv_cuda__tail_loop(rdkv_cuda_acc<D> &a, const rdkv_cuda__warp &w,
                                                     const rdkv_cuda__piece &x, uint32_t k_dim,
                                                     uint32_t n_warps, rdkv_cuda__ring &r,
                                                     rdkv_cuda__feed &f, uint32_t chunk,
                                                     const uint8_t *fragments, uint32_t rest,
                                                     const float2 (&factor)[2]) {
  const uint32_t lane = threadIdx.x & 31;
  uint32_t weights[2];
  bool value = false;
#pragma unroll 1
  while (chunk < f.chunk_end) {
    rdkv_cuda__take(r);
    const uint32_t at = r.base + r.get * r.slot_bytes;
    if (!value)
      rdkv_cuda_dense_keys<PAIRED, BF16>(a, at, 2u * k_dim + 16u, k_dim, f.tokens - 16u * chunk,
                                         fragments, rest, factor, weights);
    else
      rdkv_cuda_dense_values<BF16>(a, at, 32u * D + 16u, weights);
    rdkv_cuda__release(r);
    rdkv_cuda__fill_tail(w, x, k_dim, 16 * D, n_warps, r, f);
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

/* The rows of q and out that a piece's columns are, and how many columns have one. */
typedef struct rdkv_cuda__query_at {
  size_t head;
  uint32_t columns;
} rdkv_cuda__query_at;

__device__ __forceinline__ rdkv_cuda__query_at rdkv_cuda__query_of(const rdkv_cuda__args &p,
                                                                   const rdkv_cuda__piece &x) {
  rdkv_cuda__query_at q;
  const uint32_t kv_head = x.kv_head / p.passes, column0 = 8 * (x.kv_head % p.passes);
  q.columns = min(p.group - column0, 8u);
  q.head = static_cast<size_t>(x.sequence) * p.n_q_heads + kv_head * p.group + column0;
  return q;
}

/* Dim d of the four columns from c on, and with d = 0 their lse. */
__device__ __forceinline__ void rdkv_cuda__write(const rdkv_cuda__args &p,
                                                 const rdkv_cuda__query_at &q, uint32_t c,
                                                 uint32_t d, uint32_t v_dim, const float4 &top,
                                                 const float4 &sum, const float4 &value) {
  const float t[4] = {top.x, top.y, top.z, top.w}, s[4] = {sum.x, sum.y, sum.z, sum.w};
  const float v[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (uint32_t k = 0; k < 4; ++k)
    if (c + k < q.columns) {
      const size_t head = q.head + c + k;
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

/* Brings a sector to L1, if from is before end. */
__device__ __forceinline__ void rdkv_cuda__touch(const uint8_t *from, const uint8_t *end) {
  if (from < end)
    asm volatile("{\n\t.reg .b32 unused;\n\tld.global.b32 unused, [%0];\n\t}" ::"l"(
        __cvta_generic_to_global(from)));
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
  float *weight = scratch, *sums = scratch + n_heads, *tops = sums + n_heads;
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
    weight[i] = __ldcg(part + n_values + c), sums[i] = __ldcg(part + n_values + columns + c);
  }
  __syncthreads();
  if (threadIdx.x < columns) {
    float top = -INFINITY;
    for (uint32_t k = 0; k < n; ++k) top = fmaxf(top, weight[k * columns + threadIdx.x]);
    tops[threadIdx.x] = top;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n_heads; i += blockDim.x) {
    const float top = tops[i & (columns - 1)];
    const float e = weight[i] == top ? 1.0f : rdkv_cuda__exp2(weight[i] - top);
    weight[i] = e, sums[i] *= e;
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
      for (uint32_t k = 0; k < n; ++k)
        rdkv_cuda__fma4(sum, make_float4(1, 1, 1, 1),
                        *reinterpret_cast<const float4 *>(sums + k * columns + c));
      rdkv_cuda__write(p, rdkv_cuda__query_of(p, x), c, 4 * at / columns, v_dim, top, sum, value);
    }
  }
}

/* A block takes its pieces one after the other. Within a piece each warp works alone on its own
   tiles; the block meets before, to prepare the query, and after a group, to add up. */
template <int D, bool PAIRED>
static __global__ void __launch_bounds__(D <= 8 ? 512 : 256, 1)
    rdkv_cuda__attend_kernel(const __grid_constant__ rdkv_cuda__args p) {
  extern __shared__ __align__(128) uint8_t memory[];
  uint8_t *key_fragments = memory, *tail_fragments = memory + p.key_fragments;
  rdkv_cuda__shared *const sh =
      reinterpret_cast<rdkv_cuda__shared *>(tail_fragments + p.tail_fragments);
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n_warps = blockDim.x >> 5;
  rdkv_cuda__warp *const warps = reinterpret_cast<rdkv_cuda__warp *>(sh + 1);
  uint8_t *const rings = reinterpret_cast<uint8_t *>(warps + n_warps);

  if (warp == 0) rdkv_cuda__fetch(&sh->piece[0], p.pieces + blockIdx.x);
  rdkv_cuda__ring ring;
  ring.base = rdkv_cuda__shared_address(rings + warp * p.ring_bytes);
  ring.barrier = rdkv_cuda__shared_address(warps[warp].barrier);
  ring.slot_bytes = p.ring_bytes / RDKV_CUDA__SLOTS;
  ring.put = ring.get = ring.phase = ring.pending = 0, ring.room = RDKV_CUDA__SLOTS;
#if __CUDA_ARCH__ >= 900
  if (lane < RDKV_CUDA__SLOTS)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.barrier + 8u * lane)
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
    f.tile = x.tile_begin + warp, f.tile_end = x.tile_end, f.run_end = 0;
    f.chunk = f.chunk_end = f.tokens = 0, f.value = false;
    const bool keys = x.tile_begin < x.tile_end;
    if (keys) /* the table is on its way while the query is waited for */
      rdkv_cuda__touch(x.head.table + 32 * lane, x.head.tiles);
    rdkv_cuda__fill_tiles(x, 16 * D, n_warps, ring, f);
#if __CUDA_ARCH__ >= 900
    if (turn == 0) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    }
#endif
    const rdkv_cuda__query_at q = rdkv_cuda__query_of(p, x);
    const uint32_t q_bytes = k_dim * (p.dtype == RDKV_F32 ? 4u : 2u);
    const uint8_t *q_rows = static_cast<const uint8_t *>(p.io.q) + q.head * q_bytes;
    uint32_t chunk0 = 0, tail_tokens = 0;
    if (x.flags & RDKV_CUDA__LAST) tail_tokens = p.io.tail_tokens[x.sequence];
    /* the query, a column a warp: first for packed K, while the tail's length travels, then for the
     * tail */
    bool tail = false;
#pragma unroll
    for (int plain = 0; plain < 2; ++plain) {
      if (plain && x.flags & RDKV_CUDA__LAST) {
        f.tokens = min(tail_tokens, x.capacity);
        const uint32_t row_new = p.io.k_new ? f.tokens++ : UINT32_MAX;
        if (lane == 0) {
          const size_t at = static_cast<size_t>(x.sequence) * p.n_kv_heads + x.kv_head / p.passes;
          warps[warp].k_new = static_cast<const uint8_t *>(p.io.k_new) + 2 * at * k_dim;
          warps[warp].v_new = static_cast<const uint8_t *>(p.io.v_new) + 2 * at * (16 * D);
          warps[warp].row_new = row_new;
        }
        __syncwarp();
        const uint32_t n = (f.tokens + 15) / 16;
        chunk0 = __umulhi(n, x.tail_begin);
        f.chunk = chunk0 + warp;
        f.chunk_end = x.flags & RDKV_CUDA__TAIL_END ? n : __umulhi(n, x.tail_end);
        tail = chunk0 < f.chunk_end;
        if (f.tile >= f.tile_end)
          rdkv_cuda__fill_tail(warps[warp], x, k_dim, 16 * D, n_warps, ring, f);
      }
      if (!(plain ? tail : keys)) continue;
      uint8_t *to = plain ? tail_fragments : key_fragments;
#pragma unroll 1
      for (uint32_t c = warp; c < columns; c += n_warps) {
        const uint8_t *row = c < q.columns ? q_rows + c * q_bytes : nullptr;
        if (row && 32 * lane < q_bytes) rdkv_cuda__touch(row + 32 * lane, row + q_bytes);
        rdkv_cuda_query(plain ? nullptr : &x.head, plain && p.tail_bf16, row, p.dtype, p.k_dim,
                        p.factor_log2, c, to, to + (plain ? tail_rest : key_rest),
                        plain ? &sh->tail_factor[c] : &sh->key_factor[c]);
      }
    }
    if (x.flags & RDKV_CUDA__MORE && warp == n_warps - 1) {
      rdkv_cuda__piece &next = sh->piece[(turn + 1) & 1];
      rdkv_cuda__fetch(&next, p.pieces + x.next);
      rdkv_cuda__touch(next.head.table + 32 * lane, next.head.tiles);
    }
    __syncthreads();

    const uint32_t mine = 2 * (lane & 3) & (columns - 1);
    if (keys) {
      const float2 factor[2] = {sh->key_factor[mine], sh->key_factor[mine + 1]};
      const uint32_t widths = rdkv_cuda_key_widths(x.head);
      const uint8_t *own = rings + warp * p.ring_bytes;
      int run = 0;
      uint32_t run_end = 0, token_end = 0;
#pragma unroll 1
      for (uint32_t i = x.tile_begin + warp; i < x.tile_end; i += n_warps) {
        if (i >= run_end) rdkv_cuda__enter_run(x.head, i, &run, &run_end, &token_end);
        rdkv_cuda__take(ring);
        /* a copy that takes the whole ring lies at its start */
        const uint32_t at = ring.room == 1 ? 0 : ring.get * ring.slot_bytes;
        rdkv_cuda_tile<PAIRED>(a, own + at, widths, run, token_end - 32 * i, key_fragments,
                               key_rest, factor);
        rdkv_cuda__release(ring);
        rdkv_cuda__fill_tiles(x, 16 * D, n_warps, ring, f);
        if (f.tile >= f.tile_end)
          rdkv_cuda__fill_tail(warps[warp], x, k_dim, 16 * D, n_warps, ring, f);
      }
    }
    if (tail) {
      const float2 factor[2] = {sh->tail_factor[mine], sh->tail_factor[mine + 1]};
      if (p.tail_bf16)
        rdkv_cuda__tail_loop<PAIRED, true>(a, warps[warp], x, k_dim, n_warps, ring, f,
                                           chunk0 + warp, tail_fragments, tail_rest, factor);
      else
        rdkv_cuda__tail_loop<PAIRED, false>(a, warps[warp], x, k_dim, n_warps, ring, f,
                                            chunk0 + warp, tail_fragments, tail_rest, factor);
    }

    if (x.flags & RDKV_CUDA__LAST) {
      /* warps agree on each column's max, then leave their sums, [dim][column], in their rings */
      rdkv_cuda_finish<PAIRED>(a);
      const uint32_t g = lane >> 2, c2 = 2 * (lane & 3), n_values = 16 * D * columns;
      if (g == 0 && c2 < columns)
        *reinterpret_cast<float2 *>(&warps[warp].max[c2]) = make_float2(a.max[0], a.max[1]);
      __syncthreads();
      if (c2 < columns) {
        float2 top = make_float2(-INFINITY, -INFINITY);
        for (uint32_t w = 0; w < n_warps; ++w) {
          const float2 m = *reinterpret_cast<const float2 *>(&warps[w].max[c2]);
          top.x = fmaxf(top.x, m.x), top.y = fmaxf(top.y, m.y);
        }
        const float e[2] = {a.max[0] == top.x ? 1.0f : rdkv_cuda__exp2(a.max[0] - top.x),
                            a.max[1] == top.y ? 1.0f : rdkv_cuda__exp2(a.max[1] - top.y)};
        const float s[2] = {e[0] * (1.0f / RDKV_CUDA_LIFT), e[1] * (1.0f / RDKV_CUDA_LIFT)};
        const float m[2] = {e[0] * a.mid[0], e[1] * a.mid[1]};
        float2 *to =
            reinterpret_cast<float2 *>(rings + warp * p.ring_bytes) + (g * columns + c2) / 2;
#pragma unroll
        for (uint32_t i = 0; i < D; ++i) {
          to[8 * i * columns] = make_float2(a.acc[i][0] * s[0] + m[0], a.acc[i][1] * s[1] + m[1]);
          to[(8 * i + 4) * columns] =
              make_float2(a.acc[i][2] * s[0] + m[0], a.acc[i][3] * s[1] + m[1]);
        }
        if (g == 0) {
          *reinterpret_cast<float2 *>(&warps[warp].sum[c2]) =
              make_float2(e[0] * a.sum[0], e[1] * a.sum[1]);
          if (warp == 0) *reinterpret_cast<float2 *>(&sh->top[c2]) = top;
        }
      }
      __syncthreads();
      float *partial = p.partials + static_cast<size_t>(x.slot) * (n_values + 2 * columns);
      for (uint32_t o = threadIdx.x; o < n_values / 4; o += blockDim.x) {
        const uint32_t c = 4 * o & (columns - 1), d = 4 * o / columns;
        const float4 one = make_float4(1, 1, 1, 1),
                     top = *reinterpret_cast<const float4 *>(sh->top + c);
        float4 value = make_float4(0, 0, 0, 0), sum = value;
#pragma unroll 4
        for (uint32_t w = 0; w < n_warps; ++w) {
          rdkv_cuda__fma4(value, one,
                          reinterpret_cast<const float4 *>(rings + w * p.ring_bytes)[o]);
          rdkv_cuda__fma4(sum, one, *reinterpret_cast<const float4 *>(&warps[w].sum[c]));
        }
        if (x.n_parts == 1) {
          rdkv_cuda__write(p, rdkv_cuda__query_of(p, x), c, d, 16 * D, top, sum, value);
        } else {
          reinterpret_cast<float4 *>(partial)[o] = value;
          if (d == 0) {
            *reinterpret_cast<float4 *>(partial + n_values + c) = top;
            *reinterpret_cast<float4 *>(partial + n_values + columns + c) = sum;
          }
        }
      }
      if (x.n_parts > 1) {
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

/* A ring takes the largest tile, or three times 16 dense rows. Runs of K are padded apart: at most
   15 more channels of 4 bits and of 2 bits than k_dim 8-bit channels. */
static uint32_t rdkv_cuda__ring_bytes(const rdkv_cuda_config *c) {
  const int wide = c->k_dim > c->v_dim ? c->k_dim : c->v_dim;
  const int tile = c->k_dim * 32 + 384 + 128 + c->v_dim * 64;
  const int rows = RDKV_CUDA__SLOTS * 16 * (2 * wide + 16), bytes = tile > rows ? tile : rows;
  return static_cast<uint32_t>((bytes + 383) / 384 * 384); /* slots of whole 128 bytes */
}

/* Fragments of the query: for groups above 4 the rests lie behind. */
static uint32_t rdkv_cuda__fragments(const rdkv_cuda_config *c, int blocks) {
  return static_cast<uint32_t>(blocks) * (c->n_q_heads / c->n_kv_heads <= 4 ? 256u : 512u);
}

static uint32_t rdkv_cuda__shared_bytes(const rdkv_cuda_config *c) {
  return rdkv_cuda__fragments(c, c->k_dim / 16 + 2) + rdkv_cuda__fragments(c, c->k_dim / 16) +
         static_cast<uint32_t>(sizeof(rdkv_cuda__shared)) +
         static_cast<uint32_t>(c->n_warps) *
             (static_cast<uint32_t>(sizeof(rdkv_cuda__warp)) + rdkv_cuda__ring_bytes(c));
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
      c.n_warps < 0 || c.n_warps > (c.v_dim <= 128 ? 16 : 8) || c.blocks_per_sm < 0 ||
      c.n_blocks < 0)
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
  if (c.n_warps == 0) {
    /* few heads: as much in flight as one block can hold; many: blocks that cover for each other */
    c.n_warps = c.v_dim <= 128 && c.k_dim <= 128 ? (c.batch * c.n_kv_heads < sms / 4 ? 16 : 8) : 4;
    while (c.n_warps > 1 && rdkv_cuda__shared_bytes(&c) > static_cast<uint32_t>(shared))
      c.n_warps /= 2;
  }
  const uint32_t bytes = rdkv_cuda__shared_bytes(&c);
  if (bytes > static_cast<uint32_t>(shared)) return cudaErrorInvalidValue;
  e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e) return e;
  if (c.blocks_per_sm == 0) {
    /* one block leaves room for the next layer's to begin; many heads are better off with more */
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &c.blocks_per_sm, reinterpret_cast<const void *>(kernel), 32 * c.n_warps, bytes);
    if (e) return e;
    if (c.batch * c.n_kv_heads < sms / 4) c.blocks_per_sm = 1;
  }
  if (c.n_blocks == 0) c.n_blocks = c.blocks_per_sm * sms;
  if (c.n_blocks < 1) return cudaErrorInvalidValue;
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
  p.first_layer = cfg->first_layer, p.k_dim = cfg->k_dim, p.v_dim = cfg->v_dim;
  rdkv_cuda__plan_kernel<<<static_cast<uint32_t>(cfg->n_layers), RDKV_CUDA__PLAN_THREADS, 0,
                           stream>>>(p);
  return cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_attend(const rdkv_cuda_config *cfg, const void *plan, int layer,
                                        const rdkv_cuda_io *io, void *workspace,
                                        cudaStream_t stream) {
  if (!cfg || !plan || !io || !workspace || layer < 0 || layer >= cfg->n_layers || !io->q ||
      !io->out || !io->tail_tokens || !io->k_new != !io->v_new)
    return cudaErrorInvalidValue;
  const rdkv_cuda__layout l = rdkv_cuda__layout_of(cfg);
  const uint8_t *base = static_cast<const uint8_t *>(plan) + static_cast<size_t>(layer) * l.bytes;
  rdkv_cuda__args p;
  p.pieces = reinterpret_cast<const rdkv_cuda__piece *>(base);
  p.counters = reinterpret_cast<uint32_t *>(const_cast<uint8_t *>(base) + l.counters);
  p.partials = static_cast<float *>(workspace);
  p.io = *io;
  p.group = l.group, p.passes = l.passes;
  p.n_q_heads = static_cast<uint32_t>(cfg->n_q_heads);
  p.n_kv_heads = static_cast<uint32_t>(cfg->n_kv_heads);
  p.k_dim = cfg->k_dim, p.dtype = cfg->dtype, p.tail_bf16 = cfg->tail_dtype == RDKV_BF16;
  p.ring_bytes = rdkv_cuda__ring_bytes(cfg);
  p.key_fragments = rdkv_cuda__fragments(cfg, cfg->k_dim / 16 + 2);
  p.tail_fragments = rdkv_cuda__fragments(cfg, cfg->k_dim / 16);
  p.factor_log2 = cfg->softmax_scale * 1.44269504f;
  cudaLaunchConfig_t launch = cudaLaunchConfig_t();
  cudaLaunchAttribute attribute;
  launch.gridDim = dim3(static_cast<uint32_t>(cfg->n_blocks));
  launch.blockDim = dim3(32u * static_cast<uint32_t>(cfg->n_warps));
  launch.dynamicSmemBytes = rdkv_cuda__shared_bytes(cfg), launch.stream = stream;
  if (cfg->overlap) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    launch.attrs = &attribute, launch.numAttrs = 1;
  }
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
