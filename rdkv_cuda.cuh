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
       >>cuda-compress  >>cuda-sequence
       >>cuda-blocks                   device functions for kernels of your own
       >>cuda-plan  >>cuda-attend  >>cuda-latency  >>cuda-launch       the code
       >>cuda-compress  >>cuda-sequence

   HOW IT WORKS. Codes go from the packed tile into fp16 tensor-core fragments by AND alone: a code
   left inside the mantissa of a half with exponent 0 is a subnormal number worth code * 4^k *
   2^-24. K of groups of up to 4 heads goes into fragments of bytes, against a query of two or three
   bytes. Scales are never applied to codes: K's go into the query, V's into the probabilities. One
   launch attends to segments and tail, appends the new token, and combines the parts of heads that
   were split over blocks, in a fixed order: the result is bitwise the same at every replay.

   GUARANTEES
     no allocation, no synchronisation, no default stream, no device query after rdkv_cuda_resolve;
     lengths are read on the device, so a captured graph stays valid while tails grow.

   BUILD SWITCHES, defined before the include
     RDKV_CUDA_IMPLEMENTATION   compile the kernels and launchers here
     RDKV_CUDA_V_DIM            the one v_dim to compile kernels for; default all (a minute of
   nvcc). Compression of other dims goes its slow way. 0: none of attention, all of compression
     RDKV_CUDA_NO_COMPRESS      attention alone: no compression and no sequences that live on the
   device, a third of the time to compile
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
  int32_t latency;       /* 1: the kernel made for few heads, each of at least two blocks (sm_90);
                            -1: the other one; 0 = chosen */
  int32_t n_warps;       /* of a block; 0 = chosen */
  int32_t blocks_per_sm; /* 0 = chosen */
  int32_t teams;         /* of these blocks in one thread block of the launch; 0 = chosen */
  int32_t n_blocks;      /* of the grid; 0 = chosen: blocks_per_sm times the multiprocessors */
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

/* Divides the work of every layer into parts that take about equally long, one a block. One small
   launch. A plan is right for any tail length, and balanced for those that it was made with: make
   it anew when segments change, and when tails have grown much.
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

/* ---- >>cuda-compress : score, measure, allocate and pack on the device ------------------------

   The calls of rdkv.h of the same names, for arrays in device memory. cfg is resolved by
   rdkv_resolve. An rdkv_layer, an rdkv_kv and their arrays of them are the host's and read while
   the call runs; what their pointers point to lies on the device. A layer's arrays are as
   rdkv_layer_init lays them out in memory of rdkv_layer_bytes, of which nothing need be cleared:
   do that on the host with a buffer of its own and shift the pointers, or fill them in yourself.
   The same widths as rdkv.h from the same distortions or weights, the same bytes from the same
   widths; scores differ by rounding.

   status [1] on the device, set to RDKV_OK (0) by the caller before the first call of a chain: an
   rdkv_status. The first error stays, and allocate and pack do nothing behind one. workspace
   256-byte aligned, contents irrelevant; one may serve one stream's calls one after the other.
   A call returns cudaErrorInvalidValue for arguments that are wrong on their face. No allocation,
   no synchronisation; all may be captured. */

/* Workspace bytes of score and measure of n_items, and pack of one layer; of allocate; of pack of
   several layers. 0 if cfg is not resolved. */
size_t rdkv_cuda_layer_workspace(const rdkv_config *cfg, int n_items, uint32_t n_tokens);
size_t rdkv_cuda_allocate_workspace(const rdkv_config *cfg, int n_layers, uint32_t n_tokens);
size_t rdkv_cuda_pack_workspace(const rdkv_config *cfg, int n_layers, uint32_t n_tokens);

/* rdkv_score of n_items layers of one sequence, or of several sequences, that have the same number
   of tokens; kv [n_items], layers [n_items]. lse [n_items] on the host: the device addresses of the
   natural log-sum-exp of the scaled logits of the window's rows as the prefill attention leaves it,
   row i of query head h at lse[item][h * lse_stride + i], causal; it saves a pass over K. NULL:
   found here. out [n_items] on the host, its data on the device: what that attention gave these
   rows, [min(window, n_tokens)][n_q_heads][v_dim], any dtype and strides, as rdkv_queries.out of
   rdkv_compress_by; mean_out comes from it, which saves a pass over V. NULL: found here (RDKV_JOINT
   alone; RDKV_PAPER reads neither). With both K is read once and V not at all.
   Dense 16-byte aligned fp16 or bf16 rows of k_dim 64, 96, 128, 192 or 256 (K and Q of one type) go
   through the tensor cores, by warp groups where built for sm_90a (nvcc -arch=sm_90a); all else
   works, slowly. */
cudaError_t rdkv_cuda_score(const rdkv_config *cfg, const rdkv_kv *kv, const float *const *lse,
                            ptrdiff_t lse_stride, const rdkv_tensor *out, const rdkv_layer *layers,
                            int n_items, uint32_t *status, void *workspace, size_t workspace_bytes,
                            cudaStream_t stream);

/* rdkv_measure of n_items, whose K have one type, and their V. */
cudaError_t rdkv_cuda_measure(const rdkv_config *cfg, const rdkv_kv *kv, const rdkv_layer *layers,
                              int n_items, uint32_t *status, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream);

/* rdkv_allocate; the threshold that was used goes to lambda [n_layers] on the device, 0 with
   RDKV_PAPER. One launch, cooperative but for RDKV_PAPER without budget_bytes. */
cudaError_t rdkv_cuda_allocate(const rdkv_config *cfg, const rdkv_layer *layers, int n_layers,
                               double *lambda, uint32_t *status, void *workspace,
                               size_t workspace_bytes, cudaStream_t stream);

/* The same with RDKV_SCOPE_LAMBDA at a lambda on the device, given [1], say of
   rdkv_cuda_histogram_lambda. RDKV_JOINT alone. */
cudaError_t rdkv_cuda_allocate_at(const rdkv_config *cfg, const rdkv_layer *layers, int n_layers,
                                  const double *given, double *lambda, uint32_t *status,
                                  void *workspace, size_t workspace_bytes, cudaStream_t stream);

/* rdkv_histogram_add, _merge and _lambda, histograms and lambda [1] on the device; zero a
   histogram before the first layer. Over several GPUs all-reduce its sums, then every GPU finds the
   same lambda and allocates its layers or heads at it. */
cudaError_t rdkv_cuda_histogram_add(const rdkv_config *cfg, const rdkv_layer *layer,
                                    rdkv_histogram *histogram, cudaStream_t stream);
cudaError_t rdkv_cuda_histogram_merge(rdkv_histogram *dst, const rdkv_histogram *src,
                                      cudaStream_t stream);
cudaError_t rdkv_cuda_histogram_lambda(const rdkv_histogram *histogram, uint64_t budget_bytes,
                                       double *lambda, cudaStream_t stream);

/* rdkv_pack. lambda on the device, of the first layer, or NULL for 0. block [capacity] and
   block_bytes on the device; rdkv_block_bound is always capacity enough. On an error 0 goes to
   block_bytes; nothing is written to block but where a value of V is not finite, and then no
   header. */
cudaError_t rdkv_cuda_pack(const rdkv_config *cfg, const rdkv_kv *kv, const rdkv_layer *layers,
                           int n_layers, const double *lambda, int first_layer,
                           uint64_t token_begin, void *block, size_t capacity,
                           uint64_t *block_bytes, uint32_t *status, void *workspace,
                           size_t workspace_bytes, cudaStream_t stream);

/* rdkv_stream_layer: scores, measures, allocates and packs layer `index` = 0, 1, ... of cfg's
   n_layers into a block of its own, whose part of the budget is found on the device: right behind
   it in the stream the layer's dense K and V may be overwritten. state [1] on the device: a copy of
   a zeroed rdkv_stream whose earlier, if any, points to [n_layers] histograms there. lse and out as
   for rdkv_cuda_score, of the layer. layer's arrays and workspace may serve every layer.
   cudaErrorInvalidValue where config.max_error is set. */
size_t rdkv_cuda_stream_workspace(const rdkv_config *cfg, uint32_t n_tokens);
cudaError_t rdkv_cuda_stream_layer(const rdkv_config *cfg, rdkv_stream *state, int index,
                                   const rdkv_kv *kv, const float *lse, ptrdiff_t lse_stride,
                                   const rdkv_tensor *out, const rdkv_layer *layer, void *block,
                                   size_t capacity, uint64_t *block_bytes, uint32_t *status,
                                   void *workspace, size_t workspace_bytes, cudaStream_t stream);

/* ---- >>cuda-sequence : a cache that lives, on the device ---------------------------------------

   The sequences of rdkv.h in a batch: blocks of generated tokens become segments while a captured
   graph is replayed. The tail's oldest block is packed once its successor is complete, by its
   successor's queries; list, lengths, queries and the room for segments lie in device memory and
   change there, without the host. A step is

       for (layer = 0; layer < n_layers; ++layer) {
         rdkv_cuda_attend(&cfg, plan, layer, &io, workspace, stream);      // io.lse not NULL
         rdkv_cuda_keep(&cfg, &batch, layer, &io, stream);                 // its query, for later
       }
       rdkv_cuda_advance(tail_tokens, cfg.batch, stream);
       rdkv_cuda_sequence_compress(&rdkv, &cfg, &batch, &blocks, plan, memory, bytes, stream);

   The last call need not be in every step: once in 16, say, it finds several sequences with a
   complete block and serves them side by side (blocks.lanes), in little more time than one; tails
   then need room for 15 tokens more. A prefill may write rows of K, V and queries itself and set
   tail_tokens: a chunk of a prompt is a block. Rollback and fork are stream-ordered too. All calls
   of one batch belong on one stream. */

/* What a sequence needs beside its rdkv_cuda_sequence, whose capacity and list it shares: an array
   [batch] in device memory. Fields are the sequence's own on the device; a host that wants to read
   them copies them. */
typedef struct rdkv_cuda_live {
  void *q;    /* [layer][query head][capacity][k_dim] of tail_dtype: queries of the tail's tokens */
  void *out;  /* [layer][query head][capacity][v_dim] what attention gave them */
  float *lse; /* [layer][query head][capacity] log-sum-exp of the queries */
  uint8_t *arena; /* 128-byte aligned: where blocks go, one after the other; NULL = nowhere */
  uint64_t arena_bytes, arena_used;
  uint64_t arena_shared; /* bytes before it are in use by forks and are never written again */
  uint64_t tail_begin;   /* position of the tail's first token */
  uint32_t query_begin;  /* queries are kept from the tail's token query_begin on */
  uint32_t status;       /* an rdkv_status. While it is not RDKV_OK no blocks are made of this
                            sequence and its tail grows: set it to 0 to try again */
} rdkv_cuda_live;

/* The batch's arrays in device memory, each [batch]. sequences[i].segments has room for
   config.max_segments entries, which are written. */
typedef struct rdkv_cuda_batch {
  rdkv_cuda_sequence *sequences;
  rdkv_cuda_live *live;
  uint32_t *tail_tokens;
} rdkv_cuda_batch;

/* How generated tokens become segments; zero means default. */
typedef struct rdkv_cuda_blocks {
  uint32_t block;  /* tokens of a block, 1..1024; 0 = 128 */
  uint32_t recent; /* as many tokens at least stay dense; 0 = block, the least. A tail needs room
                      for block + max(block, recent), and the tokens between two calls */
  uint32_t fan;   /* 2..16: whenever the last `fan` segments in the arena are of equally many tokens
                     they become one, as rdkv_sequence_merge does it, with the sum of their budgets:
                     attention takes its time over every segment, small as it may be. 0: never */
  uint32_t rows;  /* tokens a head may hold of what is merged, beyond which it is not; 0 = 1024 */
  uint32_t lanes; /* 1..8: sequences that are served side by side where many have a complete block;
                     0 = 1. Each takes a workspace of its own */
} rdkv_cuda_blocks;

/* Bytes of the queries of one sequence; and their places at device address data [bytes], 256-byte
   aligned, as live's q, out and lse. Layers count from 0 to first_layer + n_layers - 1, as in the
   tail. n_q_heads (k_dim + v_dim) elements a token: 4 times K and V for groups of 4. */
size_t rdkv_cuda_queries_bytes(const rdkv_cuda_config *cfg, uint32_t capacity);
void rdkv_cuda_queries(const rdkv_cuda_config *cfg, void *data, uint32_t capacity,
                       rdkv_cuda_live *live);

/* Keeps the queries, outputs and log-sum-exps of a layer's attention for the token that it
   appended, in every sequence that has room for it. io: as given to attend, with lse; out 16-byte
   aligned too. One small launch. */
cudaError_t rdkv_cuda_keep(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *batch, int layer,
                           const rdkv_cuda_io *io, cudaStream_t stream);

/* Workspace bytes of rdkv_cuda_sequence_compress and _flush; 0 if the configs are not resolved or
   do not agree. It grows with layers, heads, block, rows and lanes, not with the batch. */
size_t rdkv_cuda_sequence_workspace(const rdkv_config *rdkv, const rdkv_cuda_config *cfg,
                                    const rdkv_cuda_blocks *blocks);

/* rdkv_sequence_compress for every sequence of the batch, and rdkv_cuda_plan if a segment was made.
   Captured into a graph (CUDA 12.4 or later) it is a loop on the device, over whatever has become
   complete when the graph gets there, and next to nothing while nothing has. On a stream that is
   not captured, or with an older toolkit, it is one turn: the first sequence with a complete block
   gets one segment, and where there is none the same kernels run for nothing; call it once for each
   block that the host knows to be complete.
   rdkv: resolved, of the same shape and n_layers, with the budget of one block or RDKV_SCOPE_LAMBDA
   and the prompt's lambda; its pins are by position in the sequence. plan as for rdkv_cuda_plan.
   workspace [bytes] 256-byte aligned.
   What a sequence cannot do goes to its status and leaves its tail dense: RDKV_ERR_FULL (list or
   arena), RDKV_ERR_ARGUMENT (queries missing), and as rdkv_compress. What cannot be merged stays as
   it is. Returns cudaErrorInvalidValue for arguments that are wrong on their face,
   cudaErrorNotSupported for merging with pins, RDKV_PAPER or positions. */
cudaError_t rdkv_cuda_sequence_compress(const rdkv_config *rdkv, const rdkv_cuda_config *cfg,
                                        const rdkv_cuda_batch *batch,
                                        const rdkv_cuda_blocks *blocks, void *plan, void *workspace,
                                        size_t bytes, cudaStream_t stream);

/* rdkv_sequence_flush of entry `index`, at the end of a turn, say before it is saved: its whole
   tail becomes segments, and rdkv_cuda_plan follows. Waits for the stream, to know how long the
   tail is, and returns before the work is done. Errors and arguments as for
   rdkv_cuda_sequence_compress; nothing is merged. */
cudaError_t rdkv_cuda_sequence_flush(const rdkv_config *rdkv, const rdkv_cuda_config *cfg,
                                     const rdkv_cuda_batch *batch, const rdkv_cuda_blocks *blocks,
                                     int index, void *plan, void *workspace, size_t bytes,
                                     cudaStream_t stream);

/* rdkv_sequence_rollback of every sequence i to its first n_tokens[i] tokens, n_tokens [batch] on
   the device (UINT64_MAX: as it is). Its errors go to the sequence's status and change nothing
   else: RDKV_ERR_ARGUMENT (more tokens than there are), RDKV_ERR_GONE (inside a segment). Where
   segments were dropped the plan must be made anew. */
cudaError_t rdkv_cuda_sequence_rollback(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *batch,
                                        const uint64_t *n_tokens, cudaStream_t stream);

/* rdkv_sequence_fork within the batch: sequence `to`, with memory and an arena of its own, goes on
   from where `from` is. Its errors go to the status of `to` and change nothing else: RDKV_ERR_FULL,
   RDKV_ERR_ARGUMENT (one of them keeps queries). The plan must be made anew. */
cudaError_t rdkv_cuda_sequence_fork(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *batch,
                                    int from, int to, cudaStream_t stream);

/* A sequence of rdkv.h, such as one that rdkv_load opened, becomes entry `index` of the batch,
   whose addresses, strides, capacity, arena and arena_bytes are set on the device: segments go to
   the arena as they are, tail and queries to their places. Its tail's dtype is tail_dtype. Waits
   for the stream. cudaErrorInvalidValue where the shape differs or room is missing; then the entry
   is as before. */
cudaError_t rdkv_cuda_sequence_upload(const rdkv_cuda_config *cfg, const rdkv_sequence *from,
                                      const rdkv_cuda_batch *batch, int index, cudaStream_t stream);

/* The way back, for rdkv_save: entry `index` into a sequence that rdkv_sequence_init made, with an
   arena that has room for all segments. Waits for the stream. cudaErrorInvalidValue where the shape
   differs or room is missing; then `to` is empty. */
cudaError_t rdkv_cuda_sequence_download(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *batch,
                                        int index, rdkv_sequence *to, cudaStream_t stream);

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
   columns 2t and 2t + 1: acc[i] = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). PAIRED: for 4, column
   t in two parts: (g, g, g+8, g+8). */
template <int D>
struct rdkv_cuda_acc {
  float acc[D][4];
  float max[2]; /* column's reference: logit + log2 of the V scale stays below max + 16 */
  float sum[2]; /* this lane's part of the sum of 2^(logit - max) */
  float mid[2]; /* this lane's part of the sum of 2^(logit - max) * V midpoint, less that of the
                   codes' midpoint 2^(b-1) in acc */
  bool plain;   /* acc is in units of 1, as for fp16 V; else 2^-24, as for codes */
};

#define RDKV_CUDA__FULL 0xffffffffu
#define RDKV_CUDA__LIFT                                                                            \
  9.0f /* the largest probability is held as 2^9: far from fp16's underflow, and with room for the \
          max to grow by 2^7 before anything must be rescaled */
/* K of groups of up to 4 by MMAs of bytes: fewer of them, and fewer instructions to unpack. Not
   where these are slow. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define RDKV_CUDA__BYTES false
#else
#define RDKV_CUDA__BYTES true
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RDKV_CUDA__REFILL true
#else
#define RDKV_CUDA__REFILL false /* copies complete in order there, and lanes share each */
#endif
#define RDKV_CUDA__PAIR 384 /* bytes of such a query for two blocks of 16 channels */
#define RDKV_CUDA__FINE                                                                           \
  1.9073486e-6f /* a factor above this needs the query's third bytes: without them logits are off \
                   by about 240 factors for 128 channels, so here by 3e-4 */
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

/* c += A (16 x 32, row, unsigned bytes) * B (32 x 8, column, signed bytes). */
__device__ __forceinline__ void rdkv_cuda__mma_bytes(int (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

/* The packed query of groups of up to 4: q' of channel c as an integer of 24 bits, three signed
   bytes. A unit is worth 4 in a run of 2 bits and 1/16 in one of 8 bits, as then all runs' rounding
   adds as much to a logit. x[i][k] is q' of channel 128 i + 4 lane + k in these units, largest the
   largest of all lanes, constant the lane's part of the sum of q times midpoints.
   fragments [pairs of a run's blocks]: [columns][2][4t][pr][block of the pair][e] the first and the
   second bytes; then [columns][4t][pr]... the third ones, which are 0 where they may be left out.
 */
template <int N>
__device__ __forceinline__ void rdkv_cuda__query_bytes(const rdkv_cuda_head &head,
                                                       const float (&x)[N][4], float largest,
                                                       float constant, float factor_log2,
                                                       uint32_t column, uint8_t *fragments,
                                                       float2 *factor) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t b2 = head.n_blocks[0], b4 = b2 + head.n_blocks[1], b8 = b4 + head.n_blocks[2];
  constexpr float range = 30580.0f; /* units of the largest; 4-bit q' grow by 1/15 at most */
  const float most = fmaxf(largest, 1e-30f);
  const float unit = most * (factor_log2 * (1 / (16 * range)));
  const bool fine = unit > RDKV_CUDA__FINE;
  const float up = __fdividef(fine ? 256 * range : range, most);
  int sum[2] = {0, 0}; /* of what the codes' midpoints add up to, 256ths apart */
  float next = 0;      /* what the block behind the lane's brings along */
#pragma unroll
  for (int i = N - 1; i >= 0; --i) {
    const uint32_t block = 8 * static_cast<uint32_t>(i) + (lane >> 2);
    if (block - (lane >> 2) >= b8) continue;
    const bool four = block >= b2 && block < b4;
    const uint32_t begin = block < b2 ? 0 : four ? b2 : b4, end = block < b2 ? b2 : four ? b4 : b8;
    const uint32_t pairs = block < b2 ? 0 : (b2 + 1) / 2 + (four ? 0 : (b4 - b2 + 1) / 2);
    const uint32_t in_run = block - begin;
    uint8_t *to =
        fragments + RDKV_CUDA__PAIR * (pairs + in_run / 2) + 8 * (lane & 3) + 2 * (in_run & 1);
    /* 4 bits: each code brings the one below it in its pair of blocks along, as a 16th */
    const float part = four ? 0.0625f : 0.0f;
    float v[4];
    const auto chain =
        [&](float above) { /* in bytes' order; not rounded yet */
                           v[3] = x[i][3] * up - part * above, v[1] = x[i][1] * up - part * v[3];
                           v[2] = x[i][2] * up - part * v[1], v[0] = x[i][0] * up - part * v[2];
        };
    chain(0);
    const float from = __shfl_sync(RDKV_CUDA__FULL, lane < 4 ? next : v[0], (lane + 4) & 31);
    next = v[0];
    if (!(in_run & 1) && block + 1 < end) chain(from);
    if (block >= b8) continue;
#pragma unroll
    for (int pr = 0; pr < 2; ++pr) {
      uint32_t bytes[3] = {0, 0, 0};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int y = __float2int_rn(v[2 * pr + e]) * (fine ? 1 : 256), two = (y + 128) >> 8;
        /* times its unit, middles of all widths */
        const int weight = four && (pr || e || in_run & 1) ? 136 : 128;
        const int low[3] = {(two + 128) >> 8, two, y};
        sum[0] += two * weight, sum[1] += (y - two * 256) * weight;
#pragma unroll
        for (int j = 0; j < 3; ++j) bytes[j] |= (static_cast<uint32_t>(low[j]) & 255) << (8 * e);
      }
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        uint16_t *at = reinterpret_cast<uint16_t *>(
            to + (j < 2 ? 64 * column + 32 * j : 256 + 32 * column) + 4 * pr);
        at[0] = static_cast<uint16_t>(bytes[j]);
        if (!(in_run & 1) && block + 1 == end) at[1] = 0;
      }
    }
  }
  constant = constant * factor_log2 -
             unit * (static_cast<float>(sum[0]) + static_cast<float>(sum[1]) * (1.0f / 256));
#pragma unroll
  for (int d = 16; d; d >>= 1) constant += __shfl_xor_sync(RDKV_CUDA__FULL, constant, d);
  if (lane == 0) *factor = make_float2(unit, constant);
}

/* Query of one column -> fragments, and (factor, constant) with logit in base 2 = factor * product
   + constant. head NULL: for plain K (a tail) instead of a segment; bf16: that K is bf16. fragments
   [blocks of 16 channels][8 columns][16] of 2 bytes; every column must be written, those without a
   query with q NULL. What rounding takes away goes to rest, in the same layout: the sum of both is
   exact to 2^-22. PAIRED: up to 4 columns, each two of the fragments, with rest = fragments + 32
   bytes; those of a segment are of other kinds and take 192 * (blocks of 16 channels + 3) bytes. q
   the head's k_dim values; factor_log2 = softmax_scale * log2(e). */
template <bool PAIRED>
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
  constexpr bool bytes = PAIRED && RDKV_CUDA__BYTES;
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
      from[k] = !head ? c + k : channel[min(c + k, all - 1)];
    uint2 s = make_uint2(0, 0), m = s; /* past the last one lie the channels */
    if (head && c < n) s = *reinterpret_cast<const uint2 *>(scale + c);
    if (head) m = *reinterpret_cast<const uint2 *>(mid + c);
    const float2 scales[2] = {__half22float2(rdkv_cuda__halves(s.x)),
                              __half22float2(rdkv_cuda__halves(s.y))};
    const float2 mids[2] = {__half22float2(rdkv_cuda__halves(m.x)),
                            __half22float2(rdkv_cuda__halves(m.y))};
    const float part = !head ? 1.0f : !bytes ? 1.0f : c < n2 ? 0.25f : c < n4 ? 1.0f : 16.0f;
    rdkv_cuda__gather(q, from, dtype, value);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      if (head && c + k < all) constant += value[k] * (k & 1 ? mids[k / 2].y : mids[k / 2].x);
      x[i][k] = value[k] * (head ? part * (k & 1 ? scales[k / 2].y : scales[k / 2].x) : 1.0f);
      largest = max(largest, static_cast<uint32_t>(__float_as_int(fabsf(x[i][k]))));
    }
  }
  largest = __reduce_max_sync(RDKV_CUDA__FULL, largest);
  if (bytes && head) {
    rdkv_cuda__query_bytes(*head, x, __uint_as_float(largest), constant, factor_log2, column,
                           static_cast<uint8_t *>(fragments), factor);
    return;
  }
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
    const float odd_middle = c < n2 ? 8.0f : 128.0f; /* middle / part */
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
        centred += (f.x + f.y + (f2.x + f2.y)) * (k ? odd_middle : middle);
        high[k] = rdkv_cuda__bits(h), low[k] = rdkv_cuda__bits(l);
      }
    }
    /* packed channels lie as they come; plain ones are permuted as ldmatrix permutes K */
    const uint32_t j = c & 15, at = 128 * (c >> 4) + (PAIRED ? 32 : 16) * column; /* 2 bytes */
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

/* Products x, logits x * factor.x + factor.y (base 2) -> e = 2^(logit - max) and p = e * scale;
   updates sum and, when p comes near the end of fp16, max. x[i] is of the lane's column i % C, its
   token's V scale is scale[i / C]; products of tokens that are not there are -Inf. */
template <int D, bool PAIRED, int N>
__device__ __forceinline__ void rdkv_cuda__weigh(rdkv_cuda_acc<D> &a, const float (&x)[N],
                                                 const float2 *factor,
                                                 const float (&scale)[PAIRED ? N : N / 2],
                                                 float (&e)[N], float (&p)[N]) {
  constexpr int C = PAIRED ? 1 : 2; /* columns of a lane */
  const float2 own[2] = {factor[0], factor[C - 1]};
  float high, all[C];
  const auto weigh = [&] {
    const float less[2] = {own[0].y - a.max[0], own[C - 1].y - a.max[C - 1]};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      e[i] = rdkv_cuda__exp2(fmaf(x[i], own[i % C].x, less[i % C]));
      p[i] = e[i] * scale[i / C];
      high = i ? high + p[i] : p[i], all[i % C] = i < C ? e[i] : all[i % C] + e[i];
    }
  };
  weigh();
  /* e itself may become large where V scales are small; NaN: the first tokens, max is -Inf */
  const float every = PAIRED ? all[0] : all[0] + all[C - 1];
  if (__any_sync(RDKV_CUDA__FULL, !(high + every * 9.5367432e-7f <= 65504.0f))) {
    float f[2];
#pragma unroll
    for (int k = 0; k < C; ++k) {
      float m = a.max[k];
      for (int i = k; i < N; i += C) /* a scale of 0 counts as fp16's smallest */
        m = fmaxf(m, fmaf(x[i], own[k].x, own[k].y) +
                         (rdkv_cuda__log2(fmaxf(scale[i / C], 5.9604645e-8f)) - RDKV_CUDA__LIFT));
      for (int d = 4; d < 32; d <<= 1) m = fmaxf(m, __shfl_xor_sync(RDKV_CUDA__FULL, m, d));
      f[k] = m == a.max[k] ? 1.0f : rdkv_cuda__exp2(a.max[k] - m);
      a.max[k] = m, a.sum[k] *= f[k], a.mid[k] *= f[k];
    }
#pragma unroll
    for (int i = 0; i < D; ++i)
      for (int c = 0; c < 4; ++c) a.acc[i][c] *= f[c & (C - 1)];
    weigh();
  }
#pragma unroll
  for (int k = 0; k < C; ++k) a.sum[k] += all[k];
}

/* Brings acc to the units of fp16 V, or to those of codes. */
template <int D>
__device__ __forceinline__ void rdkv_cuda__units(rdkv_cuda_acc<D> &a, bool plain) {
  if (a.plain == plain) return;
  const float f = plain ? RDKV_CUDA__CODE_UNIT : 1.0f / RDKV_CUDA__CODE_UNIT;
#pragma unroll
  for (int i = 0; i < D; ++i)
    for (int c = 0; c < 4; ++c) a.acc[i][c] *= f;
  a.plain = plain;
}

/* A lane's words of a block, and the A fragment of 16 of its 32 rows. */
template <int BITS>
__device__ __forceinline__ uint4 rdkv_cuda__words(const uint8_t *block,
                                                  uint32_t lane = threadIdx.x & 31) {
  if (BITS == 8) return reinterpret_cast<const uint4 *>(block)[lane];
  if (BITS == 2) return make_uint4(reinterpret_cast<const uint32_t *>(block)[lane], 0, 0, 0);
  const uint2 w = reinterpret_cast<const uint2 *>(block)[lane];
  return make_uint4(w.x, w.y, 0, 0);
}

/* MORE, of 4 bits: registers 2, 3 bring the codes of 0, 1 along, which saves masks. */
template <int BITS, bool MORE = false>
__device__ __forceinline__ void rdkv_cuda__fragment(uint4 w, int sub, uint32_t (&a)[4]) {
  if (BITS == 4 && MORE) {
    const uint32_t x = sub ? w.y : w.x;
    uint32_t y; /* not by __byte_perm, of which a shift and two masks are made */
    asm("prmt.b32 %0, %1, 0, 0x4341;" : "=r"(y) : "r"(x));
    a[0] = rdkv_cuda__codes(x, 0x000f000fu), a[1] = rdkv_cuda__codes(y, 0x000f000fu);
    a[2] = rdkv_cuda__codes(x, 0x00ff00ffu), a[3] = rdkv_cuda__codes(y, UINT32_MAX);
    return;
  }
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

template <int BITS, bool PAIRED, int N, int T>
__device__ __forceinline__ void rdkv_cuda__keys(float (&x)[T][2][4], const uint8_t *(&block)[T],
                                                const uint8_t *&query, uint32_t rest, uint32_t n) {
#pragma unroll 1
  for (; n >= N; n -= N) rdkv_cuda__key_blocks<BITS, N, PAIRED>(x, block, query, rest);
  if (N > 2 && n & 2) rdkv_cuda__key_blocks<BITS, 2, PAIRED>(x, block, query, rest);
  if (n & 1) rdkv_cuda__key_blocks<BITS, 1, PAIRED>(x, block, query, rest);
}

/* The same by bytes: of two blocks of K the A fragment of 16 of their 32 rows, four channels of a
   row in a register. Codes are worth 4 (first half of 2 bits), 64 (second half) or 16 (4 bits)
   times as much; of 4 bits those of an odd pair bring their even pair's with them. */
template <int BITS>
__device__ __forceinline__ void rdkv_cuda__byte_fragment(uint4 x, uint4 y, int sub,
                                                         uint32_t (&a)[4]) {
  if (BITS == 2) {
    const uint32_t u = __byte_perm(x.x, y.x, 0x6420), v = __byte_perm(x.x, y.x, 0x7531);
    const uint32_t mask = sub ? 0xc0c0c0c0u : 0x0c0c0c0cu;
    a[0] = u << 2 & mask, a[1] = v << 2 & mask, a[2] = u & mask, a[3] = v & mask;
  } else if (BITS == 4) {
    const uint32_t p = sub ? x.y : x.x, q = sub ? y.y : y.x;
    a[2] = __byte_perm(p, q, 0x6420), a[3] = __byte_perm(p, q, 0x7531);
    a[0] = a[2] << 4, a[1] = a[3] << 4;
  } else {
    const uint32_t p = sub ? x.z : x.x, q = sub ? y.z : y.x;
    const uint32_t r = sub ? x.w : x.y, s = sub ? y.w : y.y;
    a[0] = __byte_perm(p, q, 0x5410), a[1] = __byte_perm(p, q, 0x7632);
    a[2] = __byte_perm(r, s, 0x5410), a[3] = __byte_perm(r, s, 0x7632);
  }
}

/* Adds pairs of blocks of K of T tiles to the products x, and with FINE those with the query's
   third bytes to z. The pointers are the lane's own. */
template <int BITS, bool FINE, int N, int T>
__device__ __forceinline__ void rdkv_cuda__byte_pairs(int (&x)[T][2][4], int (&z)[T][2][4],
                                                      const uint8_t *(&block)[T],
                                                      const uint8_t *&query,
                                                      const uint8_t *&third) {
  uint4 w[N][T][2]; /* all loads first */
  uint2 q[N], r[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    q[k] = *reinterpret_cast<const uint2 *>(query + RDKV_CUDA__PAIR * k);
    if (FINE) r[k] = *reinterpret_cast<const uint2 *>(third + RDKV_CUDA__PAIR * k);
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        w[k][t][i] = rdkv_cuda__words<BITS>(block[t] + 64 * BITS * (2 * k + i), 0);
  }
#pragma unroll
  for (int t = 0; t < T; ++t) block[t] += 128 * BITS * N;
  query += RDKV_CUDA__PAIR * N, third += RDKV_CUDA__PAIR * N;
  asm volatile("" ::: "memory");
#pragma unroll
  for (int k = 0; k < N; ++k)
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t f[4];
        rdkv_cuda__byte_fragment<BITS>(w[k][t][0], w[k][t][1], s, f);
        rdkv_cuda__mma_bytes(x[t][s], f, q[k].x, q[k].y);
        if (FINE) rdkv_cuda__mma_bytes(z[t][s], f, r[k].x, r[k].y);
      }
}

/* The same for n blocks. Behind an odd last block the next bytes of the tile stand in for another
   one: the query is 0 there. */
template <int BITS, bool FINE, int T>
__device__ __forceinline__ void rdkv_cuda__byte_keys(int (&x)[T][2][4], int (&z)[T][2][4],
                                                     const uint8_t *(&block)[T],
                                                     const uint8_t *&query, uint32_t n) {
  const uint32_t lane = threadIdx.x & 31;
  const uint8_t *own[T], *first = query + 8 * lane;
  const uint8_t *third = query + 256 + 8 * ((lane >> 1 & 12) + (lane & 3));
#pragma unroll
  for (int t = 0; t < T; ++t) own[t] = block[t] + 2 * BITS * lane, block[t] += n * (64 * BITS);
  n = (n + 1) / 2, query += RDKV_CUDA__PAIR * n;
  constexpr int N = /* as many as registers allow */
      (T > 1 ? BITS < 8 : BITS == 4 && !FINE) ? 2 : 1;
#pragma unroll 1
  for (; n >= N; n -= N) rdkv_cuda__byte_pairs<BITS, FINE, N>(x, z, own, first, third);
  if (N > 1 && n) rdkv_cuda__byte_pairs<BITS, FINE, 1>(x, z, own, first, third);
}

/* The lane's products of T tiles with the query, in bytes: of its two columns the first bytes and
   the second ones. */
template <bool FINE, int T, int N>
__device__ __forceinline__ void rdkv_cuda__byte_products(const uint8_t *(&tile)[T], uint32_t widths,
                                                         const uint8_t *query, float (&x)[N]) {
  int y[T][2][4] = {}, z[T][2][4] = {};
  rdkv_cuda__byte_keys<2, FINE>(y, z, tile, query, widths & 255);
#pragma unroll
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < 4; ++c) y[t][0][c] *= 16, z[t][0][c] *= 16;
  rdkv_cuda__byte_keys<4, FINE>(y, z, tile, query, widths >> 8 & 255);
  rdkv_cuda__byte_keys<8, FINE>(y, z, tile, query, widths >> 16);
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 2 * (i & 1);
      x[4 * t + i] = static_cast<float>(y[t][i / 2][c] * 256 + y[t][i / 2][c + 1]);
      if (FINE) x[4 * t + i] += static_cast<float>(z[t][i / 2][c]) * (1.0f / 256);
    }
}

/* acc += V of 32 tokens of one width, weighted by p. */
template <int BITS, bool MORE, int D>
__device__ __forceinline__ void rdkv_cuda__values(rdkv_cuda_acc<D> &a, const uint8_t *block,
                                                  const uint32_t (&p)[4]) {
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
        rdkv_cuda__fragment<BITS, MORE>(w[i], s, f);
        rdkv_cuda__mma<false>(a.acc[base + i], f[0], f[1], f[2], f[3], p[2 * s], p[2 * s + 1]);
      }
    }
  }
}

/* What a V run's probabilities are multiplied by, to undo the factors that stay in its codes: for
   the lane's tokens, in pairs as rdkv_cuda__tiles has them. PAIRED: for the lane's registers of B,
   0 where its column has no part of a token; of 4 bits, what takes off again the codes that the
   column's own ones bring along. */
template <bool PAIRED>
struct rdkv_cuda__lift {
  __half2 of[4];
  float middle; /* of its codes */
};

template <bool PAIRED, bool MORE>
__device__ __forceinline__ rdkv_cuda__lift<PAIRED> rdkv_cuda__lift_of(int run) {
  rdkv_cuda__lift<PAIRED> l;
  const float odd = run == 0 ? 0.25f : run == 1 ? 0.0625f : 1.0f; /* pr = 1 */
  const float last = run == 0 ? 0.0625f : 1.0f;                   /* the second 16 tokens */
  const bool second = threadIdx.x & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float f = (i >= 2 ? last : 1.0f) * (i & 1 ? odd : 1.0f);
    const float none = MORE && second && run == 1 ? -odd : 0.0f;
    l.of[i] = __float2half2_rn(!PAIRED || second == (i & 1) ? f : none);
  }
  l.middle = run == 0 ? 2.0f : run == 1 ? 8.0f : run == 2 ? 128.0f : 0.0f;
  return l;
}

/* Probabilities of 8 tokens and of the 8 behind them as B fragments. PAIRED: those are two parts of
   a column, with 0 for the other tokens. */
template <bool PAIRED>
__device__ __forceinline__ void rdkv_cuda__weights(uint32_t low, uint32_t high, uint32_t (&b)[2]) {
  b[0] = rdkv_cuda__transpose(low);
  if (PAIRED)
    b[1] = threadIdx.x & 4 ? b[0] : 0, b[0] = threadIdx.x & 4 ? 0 : b[0];
  else
    b[1] = rdkv_cuda__transpose(high);
}

/* The lane's products of T tiles with the query, N blocks of 16 channels at a time. Its
   tokens: g, g + 8, g + 16, g + 24. PAIRED: the lane's columns are a query and its rest. */
template <bool PAIRED, int N, int T>
__device__ __forceinline__ void rdkv_cuda__products(const uint8_t *(&tile)[T], uint32_t widths,
                                                    const uint8_t *fragments, uint32_t rest,
                                                    float (&x)[(PAIRED ? 4 : 8) * T]) {
  float y[T][2][4] = {};
  rdkv_cuda__keys<2, PAIRED, N>(y, tile, fragments, rest, widths & 255);
#pragma unroll
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < 4; ++c) y[t][1][c] *= 0.0625f; /* 4^2 of the second half of 2-bit codes */
  rdkv_cuda__keys<4, PAIRED, N>(y, tile, fragments, rest, widths >> 8 & 255);
  rdkv_cuda__keys<8, PAIRED, N>(y, tile, fragments, rest, widths >> 16);
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!PAIRED)
        x[8 * t + i] = y[t][i >> 2][i & 3];
      else if (i & 1)
        x[4 * t + i / 2] = y[t][i >> 2][i & 2] + y[t][i >> 2][(i & 2) + 1];
}

/* rdkv_cuda_tile for T tiles of a run, more than one only where V has 2 or 4 bits and the query is
   not fine, with acc in the run's units already and its lift. BYTES: the query is of bytes; fine:
   its third ones count. K: blocks of 16 channels at a time where it is not, here as many as
   registers allow. */
template <bool PAIRED, bool BYTES, int K = 0, int T, int D>
__device__ __forceinline__ void rdkv_cuda__tiles(rdkv_cuda_acc<D> &a, const uint8_t *(&tile)[T],
                                                 uint32_t widths, int run, uint32_t tokens,
                                                 const uint8_t *fragments, uint32_t rest, bool fine,
                                                 const float2 *factor,
                                                 const rdkv_cuda__lift<PAIRED> &lift) {
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2;
  constexpr int C = PAIRED ? 1 : 2, N = 4 * C; /* a lane's columns; logits that it has of a tile */
  float x[N * T], e[N * T], p[N * T];
  if (!BYTES)
    rdkv_cuda__products<PAIRED, K ? K : T == 1 ? 4 : 2>(tile, widths, fragments, rest, x);
  else if (T == 1 && fine)
    rdkv_cuda__byte_products<true>(tile, widths, fragments, x);
  else
    rdkv_cuda__byte_products<false>(tile, widths, fragments, x);
  float scale[4 * T], mid[4 * T];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const uint4 raw = *reinterpret_cast<const uint4 *>(tile[t] + 16 * g);
    const uint32_t params[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) { /* 1 and 0 for V of 16 bits */
      const __half2 v = rdkv_cuda__halves(T == 1 && run == 3 ? 0x3c00u : params[i]);
      scale[4 * t + i] = __low2float(v), mid[4 * t + i] = __high2float(v);
    }
    tile[t] += 128;
  }
  if (T == 1 && tokens < 32)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (8u * static_cast<uint32_t>(i / C) + g >= tokens) x[i] = -INFINITY;

  rdkv_cuda__weigh<D, PAIRED, N * T>(a, x, factor, scale, e, p);

  /* probabilities times V scale, less the factors that stay in the codes, as B fragments */
  uint32_t b[T][4];
#pragma unroll
  for (int t = 0; t < T; ++t) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.mid[i % C] += e[N * t + i] * mid[4 * t + i / C];
    uint32_t w[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) { /* two tokens of a column, or two columns of a token */
      const __half2 h = __floats2half2_rn(p[N * t + 2 * i], p[N * t + 2 * i + 1]);
      a.mid[0] -= __low2float(h) * lift.middle, a.mid[C - 1] -= __high2float(h) * lift.middle;
      w[i] = rdkv_cuda__bits(PAIRED ? h : __hmul2(h, lift.of[i]));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[t][i] = rdkv_cuda__transpose(w[PAIRED ? i / 2 : i]);
      if (PAIRED) b[t][i] = rdkv_cuda__bits(__hmul2(rdkv_cuda__halves(b[t][i]), lift.of[i]));
    }
  }
  if (T > 1 || run < 2) {
#pragma unroll
    for (int t = 0; t < T; ++t)
      if (run == 0)
        rdkv_cuda__values<2, BYTES>(a, tile[t], b[t]);
      else
        rdkv_cuda__values<4, BYTES>(a, tile[t], b[t]);
  } else if (run == 2) {
#pragma unroll
    for (int t = 0; t < T; ++t) rdkv_cuda__values<8, BYTES>(a, tile[t], b[t]);
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

/* Whether the third bytes of a query count, for one of all lanes' columns. */
__device__ __forceinline__ bool rdkv_cuda__fine(const float2 *factor) {
  return __any_sync(RDKV_CUDA__FULL, factor->x > RDKV_CUDA__FINE);
}

/* Attends to one packed tile. tile 16-byte aligned; run and tokens as rdkv_cuda_tile_at gives them;
   widths from rdkv_cuda_key_widths; fragments as rdkv_cuda_query wrote them, 8-byte aligned;
   factor: of the lane's columns 2t and 2t + 1. PAIRED: there are up to 4 queries, and the lane's is
   column t. Else the rests lie rest bytes behind the fragments. */
template <bool PAIRED, int D>
__device__ __forceinline__ void rdkv_cuda_tile(rdkv_cuda_acc<D> &a, const uint8_t *tile,
                                               uint32_t widths, int run, uint32_t tokens,
                                               const uint8_t *fragments, uint32_t rest,
                                               const float2 (&factor)[2]) {
  rdkv_cuda__units(a, run == 3);
  const uint8_t *one[1] = {tile};
  rdkv_cuda__tiles<PAIRED, PAIRED && RDKV_CUDA__BYTES>(
      a, one, widths, run, tokens, fragments, rest, rdkv_cuda__fine(factor), factor,
      rdkv_cuda__lift_of<PAIRED, (PAIRED && RDKV_CUDA__BYTES)>(run));
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
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2;
  constexpr int C = PAIRED ? 1 : 2, N = 2 * C;
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
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = PAIRED ? y[2 * i] + y[2 * i + 1] : y[i];
    if (8u * static_cast<uint32_t>(i / C) + g >= tokens) x[i] = -INFINITY;
  }
  const float one[2] = {1, 1};
  float e[N], w[N];
  rdkv_cuda__units(a, true);
  rdkv_cuda__weigh<D, PAIRED, N>(a, x, factor, one, e, w);
  rdkv_cuda__weights<PAIRED>(rdkv_cuda__pair<BF16>(w[0], w[1]),
                             PAIRED ? 0 : rdkv_cuda__pair<BF16>(w[C], w[C + 1]), p);
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

/* Sums over the warp. Then acc + mid[k] is the sum of 2^(logit - max) * v of the lane's column k,
   and sum[k] that of 2^(logit - max): out is the first over the second, lse = ln(2) * (max +
   log2(sum)). PAIRED: k is 0, and acc[i][0] and acc[i][2] count. */
template <bool PAIRED, int D>
__device__ __forceinline__ void rdkv_cuda_finish(rdkv_cuda_acc<D> &a) {
  rdkv_cuda__units(a, true);
  if (PAIRED)
#pragma unroll
    for (int i = 0; i < D; ++i) a.acc[i][0] += a.acc[i][1], a.acc[i][2] += a.acc[i][3];
#pragma unroll
  for (int k = 0; k < (PAIRED ? 1 : 2); ++k)
    for (int d = 4; d < 32; d <<= 1) {
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

typedef struct __align__(16) rdkv_cuda__piece {
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
  uint32_t scale;                /* the largest of the head's table, fp16 */
}
rdkv_cuda__piece; /* 128 bytes, read 16 at a time */

/* A block's part in the latency kernel: its values, 32 / columns times the (max, sum) of all
   columns, and words of its own. A word is RDKV_CUDA__ABSENT, a NaN that no arithmetic yields,
   until it is there. Launches use two sets of parts in turn: each clears those that the one before
   has read. */
#define RDKV_CUDA__MOST_WARPS 16
#define RDKV_CUDA__PART_WORDS(values) \
  ((values) + 96u) /* own words: the last 32, in the first set */
#define RDKV_CUDA__ABSENT 0xffffffffu

/* What a warp of the latency kernel asks for at once, beside its block's first piece: its first
   tile, and how its ring is divided, for its other slots are filled once the query has come: at
   most HASTE in all, for more would stand in the first ones' way. Behind those of all warps the
   table of the piece's head. */
#define RDKV_CUDA__HASTE 2

typedef struct __align__(16) rdkv_cuda__first {
  const uint8_t *tile;
  uint32_t what; /* V run, tokens << 4, bytes << 12; 0: none */
  uint32_t also; /* with the first: row of q, UINT32_MAX for none; with the second: bytes from one
                    slot to the next, and how many there are in bits 24 to 31 */
}
rdkv_cuda__first;

/* An entry of a table, as queries are made of it. By bytes: scale is a float in its run's units,
   whose last 8 bits are the channel; mid as in the table. */
typedef struct rdkv_cuda__entry {
  uint32_t scale; /* fp16; channel << 16; exponent of what an odd pair's codes are worth << 24 */
  float mid;      /* less what the codes' midpoint is worth */
} rdkv_cuda__entry;

static __host__ __device__ uint32_t rdkv_cuda__n_entries(int k_dim) { /* runs are padded apart */
  const uint32_t n = (static_cast<uint32_t>(k_dim) + 45 + 63) / 64 * 64;
  return n < 256 ? 256 : n; /* no less than what a warp asks for without looking */
}

static __host__ __device__ uint32_t rdkv_cuda__start_bytes(int k_dim) {
  return RDKV_CUDA__MOST_WARPS * RDKV_CUDA__HASTE * sizeof(rdkv_cuda__first) +
         (rdkv_cuda__n_entries(k_dim) * sizeof(rdkv_cuda__entry) + 127) / 128 * 128;
}

/* One layer's plan: pieces [n_blocks] the first of each block, then [heads * max_segments] others;
   weights [heads]; counters [heads]; for the latency kernel starts [n_blocks]. Behind all layers
   two sets of the latency kernel's parts [n_blocks], of part bytes each (else 0). */
typedef struct rdkv_cuda__layout {
  uint32_t heads, passes, group; /* heads of the batch, with passes */
  size_t weights, counters, starts, bytes, part;
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
  l.starts = (l.counters + l.heads * sizeof(uint32_t) + 127) & ~static_cast<size_t>(127);
  l.bytes = l.starts;
  if (c->latency > 0)
    l.bytes += static_cast<size_t>(c->n_blocks) * rdkv_cuda__start_bytes(c->k_dim);
  const uint32_t values = (group <= 4 ? 4u : 8u) * static_cast<uint32_t>(c->v_dim);
  l.part = c->latency > 0 ? RDKV_CUDA__PART_WORDS(values) * sizeof(float) : 0;
  return l;
}

typedef struct rdkv_cuda__plan_args {
  const rdkv_cuda_sequence *sequences;
  const uint32_t *tail_tokens;
  uint8_t *plan;
  uint4 *parts;
  size_t layer_bytes, counters, weights, starts;
  uint32_t heads, passes, n_kv_heads, group, n_blocks, max_segments, n_parts, ring_bytes;
  int first_layer, k_dim, v_dim, latency, n_warps;
  bool bytes; /* what entries are made for */
} rdkv_cuda__plan_args;

/* What the first tiles of a head cost: their bytes, but no less than reading 14 bytes a dim of a
   tile takes: that long it takes to compute, on an H200. */
static __device__ uint64_t rdkv_cuda__cost(const rdkv_cuda__plan_args &p,
                                           const rdkv_cuda_head &head, uint32_t tiles) {
  const uint32_t least = static_cast<uint32_t>(14 * (p.k_dim + p.v_dim));
  uint64_t cost = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t n = min(tiles, (head.n_tokens[i] + 31) / 32);
    const uint32_t bytes =
        rdkv_cuda_key_bytes(head) + 128u + (static_cast<uint32_t>(p.v_dim * 8) << i);
    cost += static_cast<uint64_t>(n) * max(bytes, least), tiles -= n;
  }
  return cost;
}

/* Weight of a segment in 128 bytes, at least 1; 0 and an empty *head where the block lacks the
 * layer. */
static __device__ uint64_t rdkv_cuda__weight(const rdkv_cuda__plan_args &p,
                                             const rdkv_cuda_sequence &s, uint32_t segment,
                                             int layer, uint32_t kv_head, rdkv_cuda_head *head) {
  *head = rdkv_cuda_head();
  if (!rdkv_cuda_head_of(s.segments[segment], layer, static_cast<int>(kv_head), head)) return 0;
  return rdkv_cuda__cost(p, *head, rdkv_cuda_tiles(*head)) / 128 + 1;
}

/* The first tile that costs of those in front of it reach. */
static __device__ uint32_t rdkv_cuda__tile_after(const rdkv_cuda__plan_args &p,
                                                 const rdkv_cuda_head &head, uint64_t cost) {
  uint32_t low = 0, high = rdkv_cuda_tiles(head);
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (rdkv_cuda__cost(p, head, middle) >= cost)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

/* The largest scale of a head's table: not negative, so ordered as integers. */
static __device__ uint32_t rdkv_cuda__largest_scale(const rdkv_cuda_head &h) {
  const uint32_t n = 16u * (h.n_blocks[0] + h.n_blocks[1] + h.n_blocks[2]);
  uint32_t largest = 0;
  for (uint32_t i = 0; i < n / 8; ++i) {
    const uint4 x = reinterpret_cast<const uint4 *>(h.table)[i];
    largest = __vmaxu2(__vmaxu2(largest, __vmaxu2(x.x, x.y)), __vmaxu2(x.z, x.w));
  }
  return max(largest & 0xffffu, largest >> 16);
}

/* Entry i of a head's table; 0 behind its end. */
__device__ __forceinline__ rdkv_cuda__entry rdkv_cuda__entry_of(const rdkv_cuda_head &h, uint32_t i,
                                                                bool bytes) {
  const uint32_t n2 = 16u * h.n_blocks[0], n4 = n2 + 16u * h.n_blocks[1];
  const uint32_t n = n4 + 16u * h.n_blocks[2], all = n + h.n_dropped;
  const uint16_t *const table = reinterpret_cast<const uint16_t *>(h.table);
  rdkv_cuda__entry e = rdkv_cuda__entry();
  if (i < n) e.scale = __ldg(table + i);
  if (i < all) {
    const float scale = __half2float(__ushort_as_half(static_cast<uint16_t>(e.scale)));
    const uint32_t channel = __ldg(h.table + 2 * (n + all) + i);
    e.mid = __half2float(__ushort_as_half(__ldg(table + n + i)));
    if (bytes) {
      e.scale = __float_as_uint(scale * (i < n2 ? 0.25f : i < n4 ? 1.0f : 16.0f)) | channel;
      return e;
    }
    e.mid -= scale * (i < n2 ? 2.0f : i < n4 ? 8.0f : 128.0f), e.scale |= channel << 16;
    if (i & 2 && i < n4) e.scale |= (i < n2 ? 2u : 4u) << 24; /* of 4 and 16 */
  }
  return e;
}

#define RDKV_CUDA__PLAN_THREADS 256

/* A tile for rdkv_cuda__first. */
static __device__ rdkv_cuda__first rdkv_cuda__first_of(const rdkv_cuda_head &h, int v_dim,
                                                       uint32_t tile) {
  rdkv_cuda__first x;
  int run;
  uint32_t tokens;
  uint64_t offset;
  rdkv_cuda_tile_at(h, v_dim, tile, &run, &tokens, &offset);
  x.tile = h.tiles + offset, x.also = 0;
  const uint32_t bytes = rdkv_cuda_key_bytes(h) + 128u + (static_cast<uint32_t>(v_dim * 8) << run);
  x.what = static_cast<uint32_t>(run) | tokens << 4 | bytes << 12;
  return x;
}

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

  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n_parts;
       i += gridDim.x * blockDim.x)
    p.parts[i] =
        make_uint4(RDKV_CUDA__ABSENT, RDKV_CUDA__ABSENT, RDKV_CUDA__ABSENT, RDKV_CUDA__ABSENT);
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
      weights[h] = w;
      counters[h] = 0;
    }
    total += rdkv_cuda__scan(w, &before);
    largest = max(largest, rdkv_cuda__max(w));
  }
  const bool stretch = p.latency || p.n_blocks >= 4 * p.heads;
  quota = stretch ? (total + p.n_blocks - p.heads - 1) / (p.n_blocks - p.heads)
                  : (total + p.n_blocks - 1) / p.n_blocks;
  /* heads that are nearly alike: whole heads for a block, where that costs at most 6 % */
  const uint64_t whole = largest * ((p.heads + p.n_blocks - 1) / p.n_blocks);
  const bool alike = !stretch && whole * 16 <= quota * 17;
  if (alike) quota = whole;
  if (p.latency) { /* as many blocks for each head, if that is no worse */
    const uint32_t parts = p.n_blocks / p.heads;
    quota = min(quota, (largest + parts - 1) / parts);
  }
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
        x.scale = weight ? rdkv_cuda__largest_scale(x.head) : 0;
        done += weight;
        const uint64_t s1 = done == packed ? h1 : h0 + width * done / packed;
        for (uint64_t b = s0 / quota; b * quota < s1; ++b) {
          const uint64_t x0 = max(s0, b * quota), x1 = min(s1, (b + 1) * quota);
          const uint64_t g0 = max(h0, b * quota), g1 = min(h1, (b + 1) * quota);
          const uint64_t cost = weight ? (weight - 1) * 128 : 0;
          x.tile_begin = rdkv_cuda__tile_after(p, x.head, cost * (x0 - s0) / (s1 - s0));
          x.tile_end = x1 == s1 ? rdkv_cuda_tiles(x.head)
                                : rdkv_cuda__tile_after(p, x.head, cost * (x1 - s0) / (s1 - s0));
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
  if (!p.latency) return;
  __syncthreads();
  const uint32_t n_entries = rdkv_cuda__n_entries(p.k_dim), n = RDKV_CUDA__MOST_WARPS + n_entries;
  for (uint32_t i = threadIdx.x; i < p.n_blocks * n; i += blockDim.x) {
    const rdkv_cuda__piece &x = pieces[i / n];
    rdkv_cuda__first *const start = reinterpret_cast<rdkv_cuda__first *>(
        plan + p.starts + i / n * rdkv_cuda__start_bytes(p.k_dim));
    const uint32_t j = i % n;
    if (j >= RDKV_CUDA__MOST_WARPS) {
      const uint32_t entry = j - RDKV_CUDA__MOST_WARPS;
      reinterpret_cast<rdkv_cuda__entry *>(start +
                                           RDKV_CUDA__MOST_WARPS * RDKV_CUDA__HASTE)[entry] =
          x.tile_begin < x.tile_end
              ? rdkv_cuda__entry_of(x.head, entry, p.bytes && RDKV_CUDA__BYTES)
              : rdkv_cuda__entry();
      continue;
    }
    const uint32_t n_warps = static_cast<uint32_t>(p.n_warps), tile = x.tile_begin + j;
    rdkv_cuda__first *const first = start + RDKV_CUDA__HASTE * j;
    first[0] = first[1] = rdkv_cuda__first();
    uint32_t slots = 0, stride = 0;
    if (j < n_warps && tile < x.tile_end) { /* the last one is the warp's largest */
      const uint32_t last = (x.tile_end - 1 - tile) / n_warps;
      stride = rdkv_cuda__first_of(x.head, p.v_dim, tile + last * n_warps).what >> 12;
      slots = min(static_cast<uint32_t>(RDKV_CUDA__HASTE), p.ring_bytes / stride);
      for (uint32_t k = 0; k < slots && k <= last; ++k)
        first[k] = rdkv_cuda__first_of(x.head, p.v_dim, tile + k * n_warps);
    }
    first[0].also = j < x.columns ? x.first_query + j : UINT32_MAX;
    first[1].also = stride | slots << 24;
  }
}

/* ---- >>cuda-attend : one layer --------------------------------------------------------------- */

typedef struct rdkv_cuda__args {
  /* needed first: a line of constants */
  const rdkv_cuda__piece *pieces;
  const uint8_t *starts, *q;
  const uint32_t *tail_tokens;
  uint32_t start_bytes, row_bytes, ring_bytes; /* row: of q; ring: of shared memory */
  int overlap;
  /* the next one: called for by the entries, while the piece is on its way */
  const uint8_t *entries;
  float *partials;
  uint32_t *counters;
  uint32_t key_fragments, tail_fragments; /* of shared memory */
  uint32_t table_bytes, source_bytes;     /* a table, one and columns of rows of q */
  uint32_t passes, n_kv_heads;
  int k_dim, dtype, tail_bf16;
  uint32_t n_blocks, block_bytes;
  float factor_log2;
  rdkv_cuda_io io;
} rdkv_cuda__args;

/* Shared memory of a block: fragments of the query for packed and for dense K, what they are made
   of (table and rows of q; the next piece's come early), this, and for each warp rdkv_cuda__warp
   and a ring of copies. After the main loop the rings hold what the
   warps have to add up. */
#define RDKV_CUDA__ROW_SLOTS 3 /* of 16 dense rows: these set a ring's size */
#define RDKV_CUDA__SLOTS 6     /* at most: for tiles, as many as there is room for */

typedef struct rdkv_cuda__shared {
  float2 factor[8], tail_factor[8]; /* the latter where both queries are made at once */
  uint64_t barrier;                 /* of the copies of what queries are made of */
  int32_t max[8];                   /* of all warps, as rdkv_cuda__ordered */
  uint32_t last; /* combines for the head; or, how many blocks have left their share to this one */
  uint32_t left, set; /* has left its own; the set of parts */
  uint32_t tail_tokens;
  uint32_t reserved[18];
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

/* A warp's tiles, one V run after the other: every n_warps-th. Slots are as large as the tiles of
   the run whose copies are made; lane j looks after slot j. */
typedef struct rdkv_cuda__feed {
  uint64_t source;       /* address of the lane's next tile */
  uint32_t next;         /* its index */
  uint32_t due;          /* the tile that the warp must have come to before it is copied */
  uint32_t run, end;     /* the run, and the end of the piece's tiles in it */
  uint32_t bytes, slots; /* of a tile */
  uint32_t first;        /* slot of the warp's first tile */
} rdkv_cuda__feed;

/* A barrier of the threads that are called a block here: one of blockDim.y teams. */
__device__ __forceinline__ void rdkv_cuda__sync() {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(threadIdx.y), "r"(blockDim.x) : "memory");
}

/* Named barrier id of n warps: waits, or arrives only. */
template <bool WAIT>
__device__ __forceinline__ void rdkv_cuda__barrier(uint32_t id, uint32_t n) {
  if (WAIT)
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(32 * n) : "memory");
  else
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(32 * n) : "memory");
}

/* A value that is the same in all lanes, so that the compiler knows: branches and addresses made of
   it cost less. */
__device__ __forceinline__ uint32_t rdkv_cuda__uniform(uint32_t x) {
  return __shfl_sync(RDKV_CUDA__FULL, x, 0);
}

__device__ __forceinline__ uint32_t rdkv_cuda__count(bool x) { /* of the lanes, uniform as well */
  return rdkv_cuda__uniform(static_cast<uint32_t>(__popc(__ballot_sync(RDKV_CUDA__FULL, x))));
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

/* A lane's tile to a slot of its own, which lies at to, if it is one of mine. */
__device__ __forceinline__ void rdkv_cuda__copy_tile(const rdkv_cuda__ring &r, uint32_t slot,
                                                     uint32_t to, uint64_t from, uint32_t bytes,
                                                     bool mine) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred mine;\n\t"
      "setp.ne.u32 mine, %5, 0;\n\t"
      "@mine mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n\t"
      "@mine cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;\n\t}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(r.barrier + 8u * slot), "l"(r.policy),
      "r"(static_cast<uint32_t>(mine))
      : "memory");
#endif
}

/* Copies the tiles in front of end that are due once the warp has come to tile. */
__device__ __forceinline__ void rdkv_cuda__fill(rdkv_cuda__ring &r, rdkv_cuda__feed &f,
                                                uint32_t n_warps, uint32_t tile,
                                                uint32_t end = UINT32_MAX) {
  const uint32_t lane = threadIdx.x & 31;
  const bool mine = f.due <= tile && f.next < end;
#if __CUDA_ARCH__ >= 900
  rdkv_cuda__copy_tile(r, lane, r.base + lane * f.bytes, f.source, f.bytes, mine);
#else
  for (uint32_t left = __ballot_sync(RDKV_CUDA__FULL, mine); left;) { /* in the tiles' order */
    const bool wanted = left >> lane & 1;
    const uint32_t least = __reduce_min_sync(RDKV_CUDA__FULL, wanted ? f.next : UINT32_MAX);
    const int slot =
        __ffs(static_cast<int>(__ballot_sync(RDKV_CUDA__FULL, wanted && f.next == least))) - 1;
    const uint64_t source = __shfl_sync(RDKV_CUDA__FULL, f.source, slot);
    const uint32_t to = r.base + static_cast<uint32_t>(slot) * f.bytes;
    for (uint32_t i = 16 * lane; i < f.bytes; i += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(source + i)
                   : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    ++r.pending, left &= ~(1u << slot);
  }
#endif
  /* selects, no branches, here and in rdkv_cuda__next_run: after one ptxas takes no warp for
     converged any more */
  const uint32_t step = mine ? f.slots * n_warps : 0;
  const uint32_t due = f.next + step < f.end ? f.next + 1 : UINT32_MAX;
  f.due = mine ? due : f.due;
  f.source += static_cast<uint64_t>(step) * f.bytes, f.next += step;
}

/* While a run's tiles are taken in pairs and all its slots are filled, the next copies are those to
   the slots just emptied, in turn: all lanes know them, and one issues them without looking for who
   has the slot. Begins that: no lane's copy is due any more. Returns the source of the copy that
   follows in the slot. */
__device__ __forceinline__ uint64_t rdkv_cuda__steady(rdkv_cuda__feed &f, uint32_t slot) {
  f.due = UINT32_MAX;
  const uint32_t low = __shfl_sync(RDKV_CUDA__FULL, static_cast<uint32_t>(f.source), slot);
  const uint32_t high = __shfl_sync(RDKV_CUDA__FULL, static_cast<uint32_t>(f.source >> 32), slot);
  return static_cast<uint64_t>(rdkv_cuda__uniform(high)) << 32 | rdkv_cuda__uniform(low);
}

__device__ __forceinline__ void rdkv_cuda__refill(const rdkv_cuda__ring &r, uint32_t slot,
                                                  uint64_t from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred one;\n\t"
      "elect.sync _|one, 0xffffffff;\n\t"
      "@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n\t"
      "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;\n\t}" ::"r"(r.base + slot * bytes),
      "l"(from), "r"(bytes), "r"(r.barrier + 8u * slot), "l"(r.policy)
      : "memory");
#endif
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

/* Before the first run: as if one slot took all of the ring. */
__device__ __forceinline__ void rdkv_cuda__feed_begin(const rdkv_cuda__ring &r,
                                                      rdkv_cuda__feed &f) {
  f.bytes = r.size, f.slots = 1, f.end = 0;
}

/* Goes on to the next run with tiles for this warp, if there is one. All copies of the run before
   have been made; its last tiles, from tile on, lie in slots from slot on. Where a slot of the next
   run lies over one of these, it is due after that. The first tile goes to the first slot above
   them, if there is one, else to the lowest. */
__device__ __forceinline__ void rdkv_cuda__next_run(const rdkv_cuda__piece &x, int v_dim,
                                                    uint32_t n_warps, const rdkv_cuda__ring &r,
                                                    rdkv_cuda__feed &f, uint32_t tile,
                                                    uint32_t slot) {
  const uint32_t lane = threadIdx.x & 31, slots = f.slots, size = f.bytes;
  const uint32_t tile_end = rdkv_cuda__uniform(x.tile_end);
  uint32_t left = 0, next = tile; /* tiles of the run before; the first one behind them */
#pragma unroll 1
  for (; next < f.end; next += n_warps) ++left;
  if (next >= tile_end) return;
  const uint64_t tiles = reinterpret_cast<uint64_t>(x.head.tiles);
  uint64_t base = static_cast<uint64_t>(rdkv_cuda__uniform(static_cast<uint32_t>(tiles >> 32)))
                      << 32 |
                  rdkv_cuda__uniform(static_cast<uint32_t>(tiles));
  const uint32_t key_bytes = rdkv_cuda__uniform(rdkv_cuda_key_bytes(x.head)) + 128u;
  uint32_t begin = 0, n;
#pragma unroll 1
  for (f.run = 0;; ++f.run) {
    f.bytes = key_bytes + (static_cast<uint32_t>(v_dim * 8) << f.run);
    n = rdkv_cuda__run_tiles(x.head, f.run);
    if (next < begin + n) break;
    base += static_cast<uint64_t>(n) * f.bytes, begin += n;
  }
  f.end = min(begin + n, tile_end);
  f.slots = rdkv_cuda__count(lane < RDKV_CUDA__SLOTS && (lane + 1) * f.bytes <= r.size);
  uint32_t past = slot + left; /* the slot behind the last tile */
  past -= past > slots ? slots : 0;
  const bool mine = lane < f.slots, above = lane >= past && lane * f.bytes >= past * size;
  f.first = rdkv_cuda__count(mine && !above);
  f.first = f.first == f.slots ? 0 : f.first;
  f.next = next + (lane >= f.first ? lane - f.first : lane + f.slots - f.first) * n_warps;
  f.source = base + static_cast<uint64_t>(f.next - begin) * f.bytes;
  /* the slots up to this one are those that the lane's reaches into, or whose barrier it has */
  const float reach = __fdividef(static_cast<float>((lane + 1) * f.bytes) - 0.5f,
                                 static_cast<float>(size)); /* never near a whole number */
  const uint32_t under = min(slots, max(lane, static_cast<uint32_t>(reach)) + 1);
  const int later = static_cast<int>(past + (above ? slots : 0)) - static_cast<int>(under);
  const uint32_t due =
      next - static_cast<uint32_t>(max(0, min(later, static_cast<int>(left)))) * n_warps;
  f.due = mine & (f.next < f.end) ? due : UINT32_MAX;
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

/* From then on the piece's head has its table there. */
__device__ __forceinline__ void rdkv_cuda__copy_table(const rdkv_cuda__args &p, rdkv_cuda__piece &x,
                                                      uint8_t *to, uint64_t *barrier) {
  const uint32_t bytes = rdkv_cuda__table_bytes(x);
  const uint8_t *from = x.head.table;
  __syncwarp();
  if ((threadIdx.x & 31) == 0) {
    x.head.table = to;
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     rdkv_cuda__shared_address(barrier)),
                 "r"(bytes + x.columns * p.row_bytes)
                 : "memory");
#endif
  }
  __syncwarp();
  (void)p;
  rdkv_cuda__copy(to, from, bytes, barrier);
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
  rdkv_cuda__sync();
  for (uint32_t i = threadIdx.x; i < n_heads; i += blockDim.x) {
    float top = -INFINITY;
#pragma unroll 8
    for (uint32_t k = i & (columns - 1); k < n_heads; k += columns) top = fmaxf(top, maxima[k]);
    weight[i] = maxima[i] == top ? 1.0f : rdkv_cuda__exp2(maxima[i] - top);
    sums[i] *= weight[i];
    if (i < columns) tops[i] = top;
  }
  rdkv_cuda__sync();
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
      rdkv_cuda__sync();
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

/* A block takes its pieces one after the other. Within a piece each warp works alone on its own
   tiles; the block meets before, to prepare the query, and after a group, to add up. A block is a
   team of warps: several may share a thread block, and with it a multiprocessor's memory. */
template <int D, bool PAIRED>
static __global__ void __launch_bounds__(D <= 8 ? 512 : 256, 1)
    rdkv_cuda__attend_kernel(const __grid_constant__ rdkv_cuda__args p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t team = rdkv_cuda__uniform(threadIdx.y), block = blockIdx.x * blockDim.y + team;
  if (block >= p.n_blocks) return;
  uint8_t *const fragments = memory + team * p.block_bytes; /* of the query, packed or plain */
  uint8_t *const source = fragments + p.key_fragments;
  rdkv_cuda__shared *const sh = reinterpret_cast<rdkv_cuda__shared *>(source + p.source_bytes);
  const uint32_t lane = threadIdx.x & 31, n_warps = blockDim.x >> 5;
  /* each team counts from another warp on, so that warps with a tile more share no scheduler */
  const uint32_t warp = rdkv_cuda__uniform(((threadIdx.x >> 5) + team) % n_warps);
  rdkv_cuda__warp *const warps = reinterpret_cast<rdkv_cuda__warp *>(sh + 1);
  uint8_t *const rings = reinterpret_cast<uint8_t *>(warps + n_warps);

  if (warp == 0) rdkv_cuda__fetch(&sh->piece[0], p.pieces + block);
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
  rdkv_cuda__sync();
  if (!(sh->piece[0].flags & RDKV_CUDA__ACTIVE)) return;

  /* PAIRED: groups of up to 4, where each column of the query has its rest beside it */
  constexpr uint32_t columns = PAIRED ? 4 : 8;
  const uint32_t k_dim = static_cast<uint32_t>(p.k_dim);
  const uint32_t rest = PAIRED ? 32u : p.key_fragments / 2;
  rdkv_cuda_acc<D> a;
  rdkv_cuda_clear(a);
  for (uint32_t turn = 0;; ++turn) {
    rdkv_cuda__piece &x = sh->piece[turn & 1];
    rdkv_cuda__feed f;
    uint32_t tile = rdkv_cuda__uniform(x.tile_begin) + warp; /* the next one */
    rdkv_cuda__feed_begin(ring, f);
    const uint32_t tile_end = rdkv_cuda__uniform(x.tile_end);
    const bool tiles = tile < tile_end; /* this warp has some */
    const bool keys = x.tile_begin < x.tile_end;
    if (turn == 0 && warp == 0) rdkv_cuda__copy_table(p, x, source, &sh->barrier);
    uint32_t tail_tokens = 0;
    /* tiles first, if the query has to be waited for; else last: they keep memory busy */
    const bool early = turn == 0 && p.overlap;
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      if ((step == 0) == early) {
        if (tiles) {
          rdkv_cuda__next_run(x, 16 * D, n_warps, ring, f, tile, 0);
          rdkv_cuda__fill(ring, f, n_warps, tile, tile + RDKV_CUDA__HASTE * n_warps);
        }
      } else {
        if (turn == 0) {
#if __CUDA_ARCH__ >= 900
          asm volatile("griddepcontrol.wait;" ::: "memory");
          asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
          if (warp == 0) rdkv_cuda__copy_rows(p, x, source, &sh->barrier);
        }
        /* past the first-level cache, which may hold an older value */
        if (x.flags & RDKV_CUDA__LAST) tail_tokens = __ldcg(p.io.tail_tokens + x.sequence);
      }
    }
    bool tail = false;
#if __CUDA_ARCH__ >= 900
    if (warp < columns) rdkv_cuda__wait(rdkv_cuda__shared_address(&sh->barrier), turn & 1);
#else
    if (turn == 0) rdkv_cuda__sync();
#endif
    const uint32_t mine = columns / 4 * (lane & 3); /* the lane's first column */
    /* first packed K, while the tail's length travels, then the tail: each needs a query of its own
     */
#pragma unroll 1
    for (int plain = 0; plain < 2; ++plain) {
      if (plain) {
        if (!tail) break;
        rdkv_cuda__sync(); /* all have done with the fragments */
      }
      /* a column a warp */
      if (plain || keys)
#pragma unroll 1
        for (uint32_t c = warp; c < columns; c += n_warps) {
          const uint8_t *row = c < x.columns ? source + p.table_bytes + c * p.row_bytes : nullptr;
          rdkv_cuda_query<PAIRED>(plain ? nullptr : &x.head, plain && p.tail_bf16, row, p.dtype,
                                  p.k_dim, p.factor_log2, c, fragments, fragments + rest,
                                  &sh->factor[c]);
        }
      if (!plain && x.flags & RDKV_CUDA__LAST) {
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
      rdkv_cuda__sync();
      if (plain == tail && x.flags & RDKV_CUDA__MORE && warp == n_warps - 1) {
        rdkv_cuda__piece &next = sh->piece[(turn + 1) & 1]; /* what the next query is made of */
        rdkv_cuda__fetch(&next, p.pieces + x.next);
        rdkv_cuda__copy_table(p, next, source, &sh->barrier);
        rdkv_cuda__copy_rows(p, next, source, &sh->barrier);
      }
      const float2 *factor = sh->factor + mine;
      if (plain) {
        const float2 own_factor[2] = {factor[0], factor[PAIRED ? 0 : 1]};
        if (p.tail_bf16)
          rdkv_cuda__tail_loop<PAIRED, true>(a, warps[warp], x, k_dim, n_warps, ring, fragments,
                                             rest, own_factor);
        else
          rdkv_cuda__tail_loop<PAIRED, false>(a, warps[warp], x, k_dim, n_warps, ring, fragments,
                                              rest, own_factor);
        break;
      }
      if (!keys) continue;
      const uint32_t widths = rdkv_cuda__uniform(rdkv_cuda_key_widths(x.head));
      const uint8_t *own = rings + warp * p.ring_bytes;
      constexpr bool bytes = PAIRED && RDKV_CUDA__BYTES;
      const bool fine = bytes && rdkv_cuda__fine(factor);
      /* of the run that the warp is in; copies may be one ahead */
      uint32_t run = 0, size = 0, slots = 0, slot = 0, end = 0, full = 0, last = 0;
      rdkv_cuda__lift<PAIRED> lift = rdkv_cuda__lift_of<PAIRED, bytes>(0);
#pragma unroll 1
      while (tile < tile_end) {
        if (tile >= end) {
          run = f.run, size = f.bytes, slots = f.slots, slot = f.first, end = f.end;
          full = 0; /* tiles in front of it have 32 tokens */
#pragma unroll 1
          for (uint32_t i = 0; i < run; ++i) full += rdkv_cuda__run_tiles(x.head, i);
          full = min(end, full + rdkv_cuda__uniform(x.head.n_tokens[run]) / 32);
          lift = rdkv_cuda__lift_of<PAIRED, bytes>(static_cast<int>(run));
          rdkv_cuda__units(a, run == 3);
          last = end - min(end, slots * n_warps);
        }
        rdkv_cuda__fill(ring, f, n_warps, tile);
        if (tile >= last) /* all copies of the run are made */
          rdkv_cuda__next_run(x, 16 * D, n_warps, ring, f, tile, slot), last = end;
        if (PAIRED && !fine && run < 2 && slots >= 4 && tile + n_warps < full) {
          const bool steady = RDKV_CUDA__REFILL && last < end; /* the run's copies go on */
          uint64_t source = 0;
          if (steady) source = rdkv_cuda__steady(f, slot);
#pragma unroll 1
          while (true) {
            const uint32_t second = slot + 1 == slots ? 0 : slot + 1;
            rdkv_cuda__take(ring, slot), rdkv_cuda__take(ring, second);
            const uint8_t *at[2] = {own + slot * size, own + second * size};
            rdkv_cuda__tiles<PAIRED, bytes>(a, at, widths, static_cast<int>(run), 32, fragments,
                                            rest, fine, factor, lift);
            __syncwarp();
            if (steady) {
              const uint32_t step = n_warps * size;
              rdkv_cuda__refill(ring, slot, source, size);
              if (tile + n_warps < last) rdkv_cuda__refill(ring, second, source + step, size);
              source += 2 * step;
            }
            slot = second + 1 == slots ? 0 : second + 1, tile += 2 * n_warps;
            if (tile >= last || tile + n_warps >= full) break;
            if (!steady) rdkv_cuda__fill(ring, f, n_warps, tile);
          }
        } else {
          rdkv_cuda__take(ring, slot);
          const uint8_t *at[1] = {own + slot * size};
          rdkv_cuda__tiles<PAIRED, bytes>(a, at, widths, static_cast<int>(run),
                                          tile < full ? 32 : x.head.n_tokens[run] % 32, fragments,
                                          rest, fine, factor, lift);
          slot = slot + 1 == slots ? 0 : slot + 1, tile += n_warps;
          __syncwarp();
        }
      }
    }

    if (x.flags & RDKV_CUDA__LAST) {
      /* warps leave their sums as they are, [dim][column], in their rings */
      constexpr uint32_t own = PAIRED ? 1 : 2; /* columns of a lane */
      const uint32_t g = lane >> 2, n_values = 16 * D * columns;
      const float unit = a.plain ? 1.0f : RDKV_CUDA__CODE_UNIT;
      float *to = reinterpret_cast<float *>(rings + warp * p.ring_bytes) + g * columns + mine;
#pragma unroll
      for (uint32_t i = 0; i < 2 * D; ++i) {
        const float x0 = a.acc[i / 2][2 * (i & 1)], x1 = a.acc[i / 2][2 * (i & 1) + 1];
        if (PAIRED)
          to[8 * i * columns] = x0 + x1;
        else
          *reinterpret_cast<float2 *>(to + 8 * i * columns) = make_float2(x0, x1);
      }
#pragma unroll
      for (uint32_t k = 0; k < own; ++k) {
        for (uint32_t d = 4; d < 32; d <<= 1) {
          a.sum[k] += __shfl_xor_sync(RDKV_CUDA__FULL, a.sum[k], d);
          a.mid[k] += __shfl_xor_sync(RDKV_CUDA__FULL, a.mid[k], d);
        }
        if (g == 0) {
          rdkv_cuda__warp &w = warps[warp];
          w.max[mine + k] = a.max[k], w.sum[mine + k] = a.sum[k];
          w.mid[mine + k] = a.mid[k];
          w.unit = unit;
        }
      }
      rdkv_cuda__sync();
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
        if (x.n_parts == 1) {
          rdkv_cuda__write(p, x, c, d, 16 * D, top, sum, value);
        } else {
          reinterpret_cast<float4 *>(partial)[o] = value;
          if (d == 0) {
            *reinterpret_cast<float4 *>(partial + n_values + c) = top;
            *reinterpret_cast<float4 *>(partial + n_values + columns + c) = sum;
          }
        }
      }
      if (x.n_parts > 1) {
        rdkv_cuda__sync();
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
        rdkv_cuda__sync();
        if (sh->last) rdkv_cuda__combine<16 * D, columns>(p, x, reinterpret_cast<float *>(rings));
      }
      rdkv_cuda_clear(a);
    }
    if (!(x.flags & RDKV_CUDA__MORE)) break;
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::
                     : "memory"); /* plain writes to rings, then copies */
#endif
    rdkv_cuda__sync();
  }
}

/* ---- >>cuda-latency : one layer, where there is little to do ---------------------------------

   A few tiles a warp take less time than everything around them. So a block has one head; what it
   asks for first (its piece, each warp's first tile, the head's table) lies where it need not look
   it up; and the blocks of a head add up without fence or count: each leaves its sums in words that
   say themselves whether they are there, and waits for every n-th 32 values of all the others.

   It waits only for blocks that have started, for those come to their end whatever happens: with
   fewer multiprocessors free than a head has blocks, or with several such launches at once, waiting
   for the others might be for ever. Blocks count themselves in as they start, in the upper half of
   a word of the head: n - 1 add 1 and the first one takes n - 1 away, so 0 means all, now and at
   every launch's end. A block that finds another number leaves its share to the block that starts
   last, which reads in the lower half that somebody has; one word tells both, so they agree. */

/* A warp's tiles: every n_warps-th of a piece, whatever their widths. Lane j looks up every 32nd of
   them, from its j-th on, before the warp comes to it. */
typedef struct rdkv_cuda__look_ahead {
  uint32_t next;      /* the lane's next tile */
  uint32_t what;      /* as in rdkv_cuda__first */
  uint64_t source;    /* its address */
  uint32_t stride, n; /* bytes from one slot to the next, and how many there are */
} rdkv_cuda__look_ahead;

__device__ __forceinline__ void rdkv_cuda__look_up(const rdkv_cuda_head &head, int v_dim,
                                                   uint32_t tile_end, rdkv_cuda__look_ahead &s) {
  int run;
  uint32_t tokens;
  uint64_t offset;
  rdkv_cuda_tile_at(head, v_dim, min(s.next, tile_end - 1), &run, &tokens, &offset);
  const uint32_t bytes =
      rdkv_cuda_key_bytes(head) + 128u + (static_cast<uint32_t>(v_dim * 8) << run);
  s.what = static_cast<uint32_t>(run) | tokens << 4 | bytes << 12;
  s.source = __cvta_generic_to_global(head.tiles + offset);
}

/* 16 bytes of a row of q, past the first-level cache, which may hold older values; 0 if q is NULL.
 */
__device__ __forceinline__ uint4 rdkv_cuda__row_at(const uint8_t *q, uint32_t bytes, uint32_t i) {
  return q && i < bytes ? __ldcg(reinterpret_cast<const uint4 *>(q + i)) : make_uint4(0, 0, 0, 0);
}

/* Stores a row of q as floats, of which x is what rdkv_cuda__row_at gives for 16 lane. Returns its
   largest magnitude. */
__device__ __forceinline__ float rdkv_cuda__row(float *row, const uint8_t *q, uint32_t bytes,
                                                uint4 x, int dtype) {
  float high = 0;
  for (uint32_t i = 16 * (threadIdx.x & 31); i < bytes; i += 512) {
    if (i >= 512) x = rdkv_cuda__row_at(q, bytes, i);
    const uint32_t y[4] = {x.x, x.y, x.z, x.w};
    if (dtype == RDKV_F32) {
      *reinterpret_cast<uint4 *>(row + i / 4) = x;
#pragma unroll
      for (int k = 0; k < 4; ++k) high = fmaxf(high, fabsf(__uint_as_float(y[k])));
    } else {
      float2 f[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        f[k] = dtype == RDKV_F16
                   ? __half22float2(rdkv_cuda__halves(y[k]))
                   : make_float2(__uint_as_float(y[k] << 16), __uint_as_float(y[k] & 0xffff0000u));
        high = fmaxf(high, fmaxf(fabsf(f[k].x), fabsf(f[k].y)));
      }
      float4 *const to = reinterpret_cast<float4 *>(row + i / 2);
      to[0] = make_float4(f[0].x, f[0].y, f[1].x, f[1].y);
      to[1] = make_float4(f[2].x, f[2].y, f[3].x, f[3].y);
    }
  }
  __syncwarp();
  return __uint_as_float(__reduce_max_sync(RDKV_CUDA__FULL, __float_as_uint(high)));
}

/* Entries i and i + 1 of a table, i even, to a column's fragments; returns what they add to the
   constant. up: what brings products to [2^14, 2^15); n: entries with K. */
__device__ __forceinline__ float rdkv_cuda__query_pair(const rdkv_cuda__entry (&e)[2], uint32_t i,
                                                       uint32_t n, const float *row, float up,
                                                       uint8_t *fragments, uint32_t rest) {
  const float q0 = row[e[0].scale >> 16 & 255], q1 = row[e[1].scale >> 16 & 255];
  if (i < n) {
    /* codes of an odd pair are worth 4 (2 bits) or 16 (4 bits) times as much: undone here */
    up = __uint_as_float(__float_as_uint(up) - (e[0].scale >> 1 & 0x7f800000u));
    const float y0 = q0 * up * __low2float(rdkv_cuda__halves(e[0].scale));
    const float y1 = q1 * up * __low2float(rdkv_cuda__halves(e[1].scale));
    const __half2 high = __floats2half2_rn(y0, y1);
    const float2 f = __half22float2(high);
    uint8_t *const to = fragments + 256 * (i >> 4) + 2 * (i & 15);
    *reinterpret_cast<__half2 *>(to) = high;
    *reinterpret_cast<__half2 *>(to + rest) = __floats2half2_rn(y0 - f.x, y1 - f.y);
  }
  return q0 * e[0].mid + q1 * e[1].mid;
}

/* rdkv_cuda_query by bytes, of a row as floats and the entries of up to 192 channels. A lane's
   pairs are two halves of 4 of the first 128; of the others lanes from 16 on have the second
   halves. */
__device__ __forceinline__ void rdkv_cuda__query_entries(const rdkv_cuda_head &head,
                                                         const rdkv_cuda__entry (&e)[3][2],
                                                         const float *row, float factor_log2,
                                                         uint32_t column, uint8_t *fragments,
                                                         float2 *factor) {
  float x[2][4], constant = 0, largest = 0;
#pragma unroll
  for (int k = 0; k < 3; ++k)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float value = row[e[k][j].scale & 255];
      const float y = value * __uint_as_float(e[k][j].scale & ~255u);
      constant += value * e[k][j].mid;
      x[k / 2][2 * (k & 1) + j] = y, largest = fmaxf(largest, fabsf(y));
    }
#pragma unroll
  for (int j = 0; j < 2; ++j) x[1][2 + j] = __shfl_down_sync(RDKV_CUDA__FULL, x[1][j], 16);
  largest = __uint_as_float(__reduce_max_sync(RDKV_CUDA__FULL, __float_as_uint(largest)));
  rdkv_cuda__query_bytes(head, x, largest, constant, factor_log2, column, fragments, factor);
}

/* rdkv_cuda_query for plain K, of a row as floats and its largest magnitude: little code. */
__device__ __forceinline__ void rdkv_cuda__query_plain(const float *row, float largest, bool bf16,
                                                       uint32_t k_dim, float factor_log2,
                                                       uint8_t *fragments, uint32_t rest,
                                                       float2 *factor) {
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t exponent = max(41u, min(241u, __float_as_uint(largest) >> 23));
  const float up = __uint_as_float((268u - exponent) << 23);
#pragma unroll 1
  for (uint32_t c = 2 * lane; c < k_dim; c += 64) {
    const float2 x = *reinterpret_cast<const float2 *>(row + c);
    const float y0 = x.x * up, y1 = x.y * up;
    const uint32_t high = bf16 ? rdkv_cuda__pair<true>(y0, y1) : rdkv_cuda__pair<false>(y0, y1);
    const float2 f =
        bf16 ? make_float2(__uint_as_float(high << 16), __uint_as_float(high & 0xffff0000u))
             : __half22float2(rdkv_cuda__halves(high));
    const float z0 = y0 - f.x, z1 = y1 - f.y;
    uint8_t *const to = fragments + 256 * (c >> 4) + 8 * (c >> 1 & 3) + 4 * (c >> 3 & 1);
    *reinterpret_cast<uint32_t *>(to) = high; /* permuted as ldmatrix permutes K */
    *reinterpret_cast<uint32_t *>(to + rest) =
        bf16 ? rdkv_cuda__pair<true>(z0, z1) : rdkv_cuda__pair<false>(z0, z1);
  }
  if (lane == 0) *factor = make_float2(__uint_as_float((exponent - 14u) << 23) * factor_log2, 0);
}

/* Floats as integers of the same order, and back. */
__device__ __forceinline__ int32_t rdkv_cuda__ordered(int32_t x) {
  return x ^ (x >> 31 & 0x7fffffff);
}

/* Words that other blocks wait for, each by itself. */
__device__ __forceinline__ void rdkv_cuda__leave(float *to, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(x)
               : "memory");
}

__device__ __forceinline__ void rdkv_cuda__leave(float *to, const float4 &x) {
  asm volatile(
      "st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}

__device__ __forceinline__ uint32_t rdkv_cuda__look(const void *from) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(x)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return x;
}

/* Adds a value of n parts, 4 or fewer, that lie WORDS apart, to (value, all), relative to 2^high:
   values at from, columns' largest logits and sums at tops. Waits until all are there. */
template <bool ALL, uint32_t COLUMNS, uint32_t WORDS>
__device__ __forceinline__ void rdkv_cuda__add_parts(const float *from, const float *tops,
                                                     uint32_t n, float &high, float &value,
                                                     float &all) {
  float x, y, top;
  bool wait;
  do {
    float v[4], t[4], s[4];
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      v[k] = s[k] = 0, t[k] = -INFINITY;
      if (ALL || k < n) {
        v[k] = __uint_as_float(rdkv_cuda__look(from + k * WORDS));
        t[k] = __uint_as_float(rdkv_cuda__look(tops + k * WORDS));
        s[k] = __uint_as_float(rdkv_cuda__look(tops + k * WORDS + COLUMNS));
      }
    }
    top = fmaxf(fmaxf(high, fmaxf(t[0], t[1])), fmaxf(t[2], t[3]));
    const float zero = top == -INFINITY ? 0.0f : top; /* nothing yet: 0 of everything */
    const float before = rdkv_cuda__exp2(high - zero);
    x = value * before, y = all * before;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float e = rdkv_cuda__exp2(t[k] - zero);
      x += e * v[k], y += e * s[k];
    }
    wait = false; /* a word that is not there is a NaN, and so are the sums */
    if (!(x + y == x + y)) {
      uint32_t most = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        most = max(max(most, __float_as_uint(v[k])),
                   max(__float_as_uint(t[k]), __float_as_uint(s[k])));
      wait = most == RDKV_CUDA__ABSENT;
    }
  } while (__any_sync(RDKV_CUDA__FULL, wait));
  high = top, value = x, all = y;
}

/* The word at byte of the piece of which lane 2 + j has 16 bytes, j from 0. */
__device__ __forceinline__ uint32_t rdkv_cuda__word(const uint4 &piece, uint32_t byte) {
  const uint32_t x = byte & 8 ? (byte & 4 ? piece.w : piece.z) : (byte & 4 ? piece.y : piece.x);
  return __shfl_sync(RDKV_CUDA__FULL, x, 2 + static_cast<int>(byte / 16));
}
#define RDKV_CUDA__FIELD(member) rdkv_cuda__word(u, offsetof(rdkv_cuda__piece, member))
#define RDKV_CUDA__LONG(member)                                                              \
  (static_cast<uint64_t>(rdkv_cuda__word(u, offsetof(rdkv_cuda__piece, member) + 4)) << 32 | \
   RDKV_CUDA__FIELD(member))

/* BYTES: for several tiles a warp. K by bytes, whose query takes longer to make but whose tiles
   take less; and fewer copies under way at the start. */
template <int D, bool PAIRED, bool BYTES>
static __global__ void __launch_bounds__(D <= 8 ? 512 : 256, 1)
    rdkv_cuda__latency_kernel(const __grid_constant__ rdkv_cuda__args p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr uint32_t columns = PAIRED ? 4 : 8, v_dim = 16 * D, n_values = v_dim * columns;
  constexpr bool bytes = BYTES && RDKV_CUDA__BYTES;
  const uint32_t lane = threadIdx.x & 31, n_warps = blockDim.x >> 5;
  /* barriers, which lie at a known place, while the constants come */
  const uint32_t warp = rdkv_cuda__uniform(threadIdx.x >> 5);
  rdkv_cuda__warp *const warps = reinterpret_cast<rdkv_cuda__warp *>(memory);
  rdkv_cuda__ring ring;
  ring.barrier = rdkv_cuda__shared_address(warps[warp].barrier);
  ring.parity = ring.pending = 0;
  if (lane == 0)
#pragma unroll
    for (uint32_t i = 0; i < max(RDKV_CUDA__HASTE, RDKV_CUDA__ROW_SLOTS); ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.barrier + 8u * i)
                   : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  /* Loads: few and small, as the first-level cache hands out a word for all lanes at a time. Lanes
     0 and 1 have the warp's first tiles, lanes 2 to 9 the piece. */
  const rdkv_cuda__piece *piece = p.pieces + blockIdx.x;
  const uint8_t *const start = p.starts + static_cast<size_t>(blockIdx.x) * p.start_bytes;
  uint4 u = make_uint4(0, 0, 0, 0);
  if (lane < RDKV_CUDA__HASTE + sizeof(rdkv_cuda__piece) / 16)
    u = *reinterpret_cast<const uint4 *>(
        lane < RDKV_CUDA__HASTE
            ? start + sizeof(rdkv_cuda__first) * (RDKV_CUDA__HASTE * (threadIdx.x >> 5) + lane)
            : reinterpret_cast<const uint8_t *>(piece) + 16 * (lane - RDKV_CUDA__HASTE));
  const rdkv_cuda__entry *const entries = reinterpret_cast<const rdkv_cuda__entry *>(
      p.entries + static_cast<size_t>(blockIdx.x) * p.start_bytes);
  constexpr int n_pairs = 3; /* of entries, asked for at once by those that make the first query */
  rdkv_cuda__entry e[n_pairs][2] = {};
  const auto pair_at = [&](uint32_t k) {
    return !bytes ? 32 * k + lane : k < 2 ? 2 * lane + k : 64 + 2 * (lane & 15) + (lane >> 4);
  };
  const auto pair = [&](rdkv_cuda__entry(&to)[2], uint32_t k) {
    const uint4 x = reinterpret_cast<const uint4 *>(entries)[pair_at(k)];
    to[0].scale = x.x, to[0].mid = __uint_as_float(x.y);
    to[1].scale = x.z, to[1].mid = __uint_as_float(x.w);
  };
  if (warp < columns)
#pragma unroll
    for (uint32_t k = 0; k < n_pairs; ++k) pair(e[k], k);
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  rdkv_cuda__shared *const sh =
      reinterpret_cast<rdkv_cuda__shared *>(warps + RDKV_CUDA__MOST_WARPS);
  uint8_t *const rings = reinterpret_cast<uint8_t *>(sh + 1);
  uint8_t *const own = rings + warp * p.ring_bytes;
  uint8_t *const key_fragments = rings + n_warps * p.ring_bytes;
  uint8_t *const tail_fragments = key_fragments + p.key_fragments;
  float *const rows = reinterpret_cast<float *>(tail_fragments + p.tail_fragments); /* of q */
  ring.base = rdkv_cuda__shared_address(own), ring.size = p.ring_bytes;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(ring.policy));
  constexpr uint32_t part_words = RDKV_CUDA__PART_WORDS(n_values);
  float *part = p.partials + static_cast<size_t>(blockIdx.x) * part_words;
  uint32_t *const own_words = reinterpret_cast<uint32_t *>(part + part_words - 32);
  /* the last warps have the fewest tiles */
  const auto clear = [](float *set) {
#pragma unroll 1
    for (uint32_t i = blockDim.x - 1 - threadIdx.x; i < (part_words - 32) / 4; i += blockDim.x)
      reinterpret_cast<uint4 *>(set)[i] =
          make_uint4(RDKV_CUDA__ABSENT, RDKV_CUDA__ABSENT, RDKV_CUDA__ABSENT, RDKV_CUDA__ABSENT);
  };
  const uint32_t row_of_q = __shfl_sync(RDKV_CUDA__FULL, u.w, 0);
  const uint32_t sequence = RDKV_CUDA__FIELD(sequence);
  if (!(RDKV_CUDA__FIELD(flags) & RDKV_CUDA__ACTIVE)) {
    /* the sets change for all, and the one to come must be clear */
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const uint32_t set = rdkv_cuda__look(own_words) & 1;
    clear(part + (set ? 0 : static_cast<size_t>(p.n_blocks) * part_words));
    __syncthreads(); /* all have read the set */
    if (threadIdx.x == 0) *own_words = set ^ 1u;
    return;
  }
  uint4 q = make_uint4(0, 0, 0, 0);
  uint32_t tail_tokens = 0, started = 0, own_word = 0, one_more = 0;
  uint32_t *starts = nullptr;
  const bool keeper = warp == n_warps - 1 && lane == 0; /* has the least to do */
  /* for what the launch in front may have written */
  const auto ask = [&] {
    if (row_of_q != UINT32_MAX && 16 * lane < p.row_bytes)
      q = __ldcg(
          reinterpret_cast<const uint4 *>(p.q + static_cast<size_t>(row_of_q) * p.row_bytes) +
          lane);
    if (!bytes ||
        warp < columns) /* the others ask sh for it: it takes a cycle for each that asks */
      tail_tokens = __ldcg(p.tail_tokens + sequence);
    if (warp == n_warps - 1) {
      const uint32_t n = RDKV_CUDA__FIELD(n_parts), before = RDKV_CUDA__FIELD(part);
      starts = p.counters + sequence * p.n_kv_heads * p.passes + RDKV_CUDA__FIELD(kv_head);
      one_more = (before ? 1u : 1u - n) << 16;
      if (lane == 0) {
        own_word = rdkv_cuda__look(own_words);
        /* a value that differs by lane, for all ptxas knows: else it makes this a sum over the
           warp, which is waited for */
        uint32_t zero;
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(zero));
        started = atomicAdd(starts, one_more + zero);
      }
    }
  };
  if (!p.overlap) ask();
  rdkv_cuda__look_ahead s;
  s.what = u.z, s.source = static_cast<uint64_t>(u.y) << 32 | u.x;
  s.stride = __shfl_sync(RDKV_CUDA__FULL, u.w, 1), s.n = s.stride >> 24, s.stride &= 0xffffffu;
  __syncwarp(); /* the barriers are there */
  /* has tiles copied to slots [first, end) */
  const auto copy = [&](uint32_t first, uint32_t end) {
    rdkv_cuda__copy_tile(ring, lane, ring.base + lane * s.stride, s.source, s.what >> 12,
                         lane >= first && lane < end && s.what);
  };
  bool early = !bytes || warp < n_warps / 4;
  if (early) copy(0, 1);
  if (p.overlap) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    ask();
  }
  if (warp == n_warps - 1 &&
      lane - RDKV_CUDA__HASTE < sizeof(rdkv_cuda__piece) / 16) /* for the end */
    reinterpret_cast<uint4 *>(&sh->piece[1])[lane - RDKV_CUDA__HASTE] = u;
  const uint32_t key_rest = PAIRED ? 32u : p.key_fragments / 2;
  const uint32_t tail_rest = PAIRED ? 32u : p.tail_fragments / 2;
  const uint32_t k_dim = static_cast<uint32_t>(p.k_dim), mine = columns / 4 * (lane & 3);
  rdkv_cuda_acc<D> a;
  rdkv_cuda_clear(a);
  bool again = false;          /* not the block's first piece */
  uint32_t busy = 0, seen = 0; /* warps with something to add up; starts, a little later */
  for (;;) {
    const uint32_t tile_begin = RDKV_CUDA__FIELD(tile_begin);
    const uint32_t tile_end = RDKV_CUDA__FIELD(tile_end);
    const uint32_t flags = RDKV_CUDA__FIELD(flags);
    const bool keys = tile_begin < tile_end;
    rdkv_cuda_head head;
    const uint32_t blocks = RDKV_CUDA__FIELD(head.n_blocks);
    const uint32_t others = RDKV_CUDA__FIELD(head.n_blocks[2]);
    head.n_blocks[0] = static_cast<uint16_t>(blocks);
    head.n_blocks[1] = static_cast<uint16_t>(blocks >> 16);
    head.n_blocks[2] = static_cast<uint16_t>(others);
    head.n_dropped = static_cast<uint16_t>(others >> 16);
    const auto where_tiles_lie = [&] {
      head.tiles = reinterpret_cast<const uint8_t *>(RDKV_CUDA__LONG(head.tiles));
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        head.n_tokens[i] =
            rdkv_cuda__word(u, offsetof(rdkv_cuda__piece, head.n_tokens) + sizeof(uint32_t) * i);
    };
    const auto look_up = [&] {
      s.next = tile_begin + warp + lane * n_warps;
      rdkv_cuda__look_up(head, v_dim, tile_end, s);
      if (s.next >= tile_end) s.what = 0;
    };
    if (again) {
      where_tiles_lie();
      head.table = reinterpret_cast<const uint8_t *>(RDKV_CUDA__LONG(head.table));
      const int most = head.n_tokens[3] ? 3 : head.n_tokens[2] ? 2 : head.n_tokens[1] ? 1 : 0;
      s.stride = rdkv_cuda_key_bytes(head) + 128u + (v_dim * 8u << most);
      s.n = min(ring.size / s.stride, static_cast<uint32_t>(RDKV_CUDA__HASTE));
      if (keys) look_up(), copy(0, s.n);
    }
    const uint32_t widths = rdkv_cuda__uniform(rdkv_cuda_key_widths(head));
    const float scale =
        __half2float(__ushort_as_half(static_cast<uint16_t>(RDKV_CUDA__FIELD(scale))));
    const uint32_t columns_here = RDKV_CUDA__FIELD(columns);
    const uint32_t first_query = RDKV_CUDA__FIELD(first_query);
    const uint32_t n_keys = 16u * (head.n_blocks[0] + head.n_blocks[1] + head.n_blocks[2]);
#pragma unroll 1
    for (uint32_t c = warp; c < columns; c += n_warps) {
      float *const row = rows + c * (k_dim + 4); /* and its largest magnitude */
      const bool fresh = !again && c == warp;
      if (!again) {
        const uint8_t *const from =
            c < columns_here ? p.q + static_cast<size_t>(first_query + c) * p.row_bytes : nullptr;
        if (!fresh) q = rdkv_cuda__row_at(from, p.row_bytes, 16 * lane);
        const float largest = rdkv_cuda__row(row, from, p.row_bytes, q, p.dtype);
        if (lane == 0) row[k_dim] = largest;
        __syncwarp();
      }
      if (!keys) continue;
      if (bytes) {
        if (!fresh) {
          head.table = reinterpret_cast<const uint8_t *>(RDKV_CUDA__LONG(head.table));
#pragma unroll
          for (uint32_t k = 0; k < n_pairs; ++k)
#pragma unroll
            for (uint32_t j = 0; j < 2; ++j)
              e[k][j] = rdkv_cuda__entry_of(head, 2 * pair_at(k) + j, true);
        }
        rdkv_cuda__query_entries(head, e, row, p.factor_log2, c, key_fragments, &sh->factor[c]);
        continue;
      }
      const uint32_t exponent =
          max(41u, min(241u, __float_as_uint(scale * row[k_dim]) >> 23)); /* of an upper bound */
      const float up = __uint_as_float((268u - exponent) << 23);
      const uint32_t all = n_keys + head.n_dropped;
      float constant = 0;
      uint32_t k = 0;
      const auto add = [&](const rdkv_cuda__entry(&pair)[2], uint32_t k) {
        constant += rdkv_cuda__query_pair(pair, 64 * k + 2 * lane, n_keys, row, up,
                                          key_fragments + (PAIRED ? 64 : 32) * c, key_rest);
      };
      if (fresh)
#pragma unroll
        for (; k < n_pairs; ++k)
          if (64 * k < all) add(e[k], k);
#pragma unroll 1
      for (; 64 * k < all; ++k) {
        const uint32_t i = 64 * k + 2 * lane;
        if (again) {
          e[0][0] = rdkv_cuda__entry_of(head, i, false);
          e[0][1] = rdkv_cuda__entry_of(head, i + 1, false);
        } else {
          pair(e[0], k);
        }
        add(e[0], k);
      }
#pragma unroll
      for (int d = 16; d; d >>= 1) constant += __shfl_xor_sync(RDKV_CUDA__FULL, constant, d);
      if (lane == 0)
        sh->factor[c] = make_float2(
            RDKV_CUDA__CODE_UNIT * __uint_as_float((exponent - 14u) << 23) * p.factor_log2,
            constant * p.factor_log2);
    }
    bool tail = false;
    rdkv_cuda__warp &w = warps[warp];
    const auto set_tail = [&] {
      if (!(flags & RDKV_CUDA__LAST)) return;
      const uint32_t stored = min(tail_tokens, RDKV_CUDA__FIELD(capacity));
      const uint32_t tokens = stored + (p.io.k_new != nullptr), n = (tokens + 15) / 16;
      const uint32_t chunk = __umulhi(n, RDKV_CUDA__FIELD(tail_begin));
      const uint32_t end =
          flags & RDKV_CUDA__TAIL_END ? n : __umulhi(n, RDKV_CUDA__FIELD(tail_end));
      tail = chunk < end;
      if (!tail) return;
      const uint32_t kv_head = RDKV_CUDA__FIELD(kv_head);
      if (lane == 0) { /* the last warps have the fewest tiles */
        const size_t at = static_cast<size_t>(sequence) * p.n_kv_heads + kv_head / p.passes;
        w.k_new = static_cast<const uint8_t *>(p.io.k_new) + 2 * at * k_dim;
        w.v_new = static_cast<const uint8_t *>(p.io.v_new) + 2 * at * v_dim;
        w.row_new = p.io.k_new ? stored : UINT32_MAX;
        w.chunk = w.rows.chunk = chunk + n_warps - 1 - warp, w.rows.chunk_end = end;
        w.rows.tokens = tokens, w.rows.value = w.rows.put = w.rows.pending = 0;
      }
      __syncwarp();
    };
    if (!bytes || warp < columns) {
      set_tail();
      if (tail)
#pragma unroll 1
        for (uint32_t c = warp; c < columns; c += n_warps)
          rdkv_cuda__query_plain(rows + c * (k_dim + 4), rows[c * (k_dim + 4) + k_dim], p.tail_bf16,
                                 k_dim, p.factor_log2, tail_fragments + (PAIRED ? 64 : 32) * c,
                                 tail_rest, &sh->tail_factor[c]);
      if (bytes && threadIdx.x == 0) sh->tail_tokens = tail_tokens;
    }
    if (keeper && !again) {
      sh->left = 0, sh->set = own_word & 1;
      own_words[0] = own_word ^ 1u, own_words[1] = RDKV_CUDA__ABSENT; /* its share is its own */
    }
    if (threadIdx.x < columns && !again)
      sh->max[threadIdx.x] = rdkv_cuda__ordered(__float_as_int(-INFINITY));
    const bool second = !again && tile_begin + warp + n_warps < tile_end;
    if (!bytes) {
      __syncthreads();
      if (second) where_tiles_lie(), look_up(), copy(1, s.n);
    } else {
      /* those that make the query are awaited: what else they have to do comes behind that */
      if (warp < columns) rdkv_cuda__barrier<false>(1, n_warps);
      if (second) where_tiles_lie(), look_up();
      /* most first tiles are asked for only now: with all on their way at once, the rows of q of
         some blocks came 2,800 cycles later */
      if (!early) copy(0, 1), early = true;
      if (warp < columns)
        rdkv_cuda__barrier<true>(2, min(columns, n_warps));
      else
        rdkv_cuda__barrier<true>(1, n_warps);
      if (warp >= columns) tail_tokens = sh->tail_tokens, set_tail();
      if (second) { /* and second tiles once first ones are there */
        rdkv_cuda__wait(ring.barrier, 0);
        copy(1, s.n);
      }
    }
    busy = max(busy, tail ? n_warps : min(n_warps, tile_end - min(tile_begin, tile_end)));

    uint32_t slot = 0, turn = 0; /* which of the warp's tiles */
    float2 key_factor[2] = {};
    if (keys) key_factor[0] = sh->factor[mine], key_factor[1] = sh->factor[mine + !PAIRED];
    const bool fine = bytes && rdkv_cuda__fine(key_factor);
#pragma unroll 1
    for (uint32_t tile = tile_begin + warp; tile < tile_end; tile += n_warps) {
      const uint32_t what = __shfl_sync(RDKV_CUDA__FULL, s.what, static_cast<int>(turn & 31));
      const int run = static_cast<int>(what & 15);
      rdkv_cuda__take(ring, slot);
      rdkv_cuda__units(a, run == 3);
      const uint8_t *one[1] = {own + slot * s.stride};
      rdkv_cuda__tiles<PAIRED, bytes, 2>(a, one, widths, run, what >> 4 & 255, key_fragments,
                                         key_rest, fine, key_factor,
                                         rdkv_cuda__lift_of<PAIRED, bytes>(run)); /* 2: less code */
      __syncwarp();
      if (tile + s.n * n_warps < tile_end)
        rdkv_cuda__copy_tile(ring, slot, ring.base + slot * s.stride, s.source, s.what >> 12,
                             lane == (turn + s.n & 31));
      if (tile + 32 * n_warps < tile_end) { /* the lane whose tile this was goes on */
        s.next += lane == (turn & 31) ? 32 * n_warps : 0;
        rdkv_cuda__look_up(head, v_dim, tile_end, s);
      }
      slot = slot + 1 == s.n ? 0 : slot + 1, ++turn;
    }
    if (tail) {
      const float2 factor[2] = {sh->tail_factor[mine], sh->tail_factor[mine + !PAIRED]};
      if (p.tail_bf16)
        rdkv_cuda__tail_loop<PAIRED, true>(a, w, *piece, k_dim, n_warps, ring, tail_fragments,
                                           tail_rest, factor);
      else
        rdkv_cuda__tail_loop<PAIRED, false>(a, w, *piece, k_dim, n_warps, ring, tail_fragments,
                                            tail_rest, factor);
    }
    if (!(flags & RDKV_CUDA__MORE)) break;
    piece = p.pieces + RDKV_CUDA__FIELD(next), again = true;
    if (lane - RDKV_CUDA__HASTE < sizeof(rdkv_cuda__piece) / 16)
      u = reinterpret_cast<const uint4 *>(piece)[lane - RDKV_CUDA__HASTE];
    __syncthreads(); /* all have done with the query */
  }

  if (keeper) { /* the last to start has what others left to it */
    const uint32_t last = (started + one_more) >> 16 ? 0 : started & 0xffffu;
    if (last) atomicSub(starts, last);
    sh->last = last;
    seen = rdkv_cuda__look(starts);
  }

  /* all warps' sums to one scale, that of the block's largest logit */
  const float unit = a.plain ? 1.0f : RDKV_CUDA__CODE_UNIT;
  float *const values = reinterpret_cast<float *>(own); /* [dims][columns], then sums */
  const uint32_t apart = p.ring_bytes / sizeof(float);  /* from one warp's to the next */
  constexpr uint32_t own_columns = PAIRED ? 1 : 2;      /* of a lane */
  float sum = 0, mid[2] = {}; /* every second 8 lanes: the second column, if there is one */
  const bool upper = lane & 16, second = !PAIRED && lane & 8;
  if (warp < busy) {
    float pair[2] = {};
#pragma unroll
    for (uint32_t k = 0; k < own_columns; ++k) {
      if (lane < 4) atomicMax(&sh->max[mine + k], rdkv_cuda__ordered(__float_as_int(a.max[k])));
      pair[k] = (upper ? a.mid[k] : a.sum[k]) +
                __shfl_xor_sync(RDKV_CUDA__FULL, upper ? a.sum[k] : a.mid[k], 16);
    }
    sum = (second ? pair[1] : pair[0]) +
          __shfl_xor_sync(RDKV_CUDA__FULL, PAIRED || second ? pair[0] : pair[1], 8);
    sum += __shfl_xor_sync(RDKV_CUDA__FULL, sum, 4);
#pragma unroll
    for (uint32_t k = 0; k < own_columns; ++k) /* lanes 16 to 31 have mids */
      mid[k] = __shfl_sync(RDKV_CUDA__FULL, sum, static_cast<int>(16 + 8 * k + (lane & 3)));
  }
  __syncthreads();
  if (warp < busy) {
    float f[2] = {};
#pragma unroll
    for (uint32_t k = 0; k < own_columns; ++k) {
      const float top = __int_as_float(rdkv_cuda__ordered(sh->max[mine + k]));
      f[k] = a.max[k] == top ? 1.0f : rdkv_cuda__exp2(a.max[k] - top);
    }
    if ((lane & (PAIRED ? 28 : 20)) == 0)
      values[n_values + mine + second] = sum * (second ? f[1] : f[0]);
    mid[0] *= f[0], mid[1] *= f[1];
    f[0] *= unit, f[1] *= unit;
    float *const to = values + (lane >> 2) * columns + mine;
#pragma unroll
    for (uint32_t i = 0; i < 2 * D; ++i) {
      const float x0 = a.acc[i / 2][2 * (i & 1)], x1 = a.acc[i / 2][2 * (i & 1) + 1];
      if (PAIRED)
        to[8 * i * columns] = (x0 + x1) * f[0] + mid[0];
      else
        *reinterpret_cast<float2 *>(to + 8 * i * columns) =
            make_float2(x0 * f[0] + mid[0], x1 * f[1] + mid[1]);
    }
  }
  const uint32_t n = sh->piece[1].n_parts;
  clear(part + (sh->set ? 0 : static_cast<size_t>(p.n_blocks) * part_words));
  if (keeper && seen >> 16 && (seen = rdkv_cuda__look(starts)) >> 16) {
    /* Not all of the head's blocks have started: this one must not wait for them, as they may wait
       for its place. The last to start will take over its share. */
    own_words[1] = 0;
    __threadfence();
    for (uint32_t now; seen >> 16; seen = now) {
      now = atomicCAS(starts, seen, seen + 1);
      if (now == seen) {
        sh->left = 1;
        break;
      }
    }
  }
  __syncthreads();
  /* From here on a warp works for itself. The first ones add up the warps' values, the last one
     their sums, and leave them in memory, where a word says itself whether it is there. */
  const rdkv_cuda__piece &y = sh->piece[1];
  if (sh->set) part += static_cast<size_t>(p.n_blocks) * part_words;
  const auto write = [&](uint32_t o, float value, float all, float high) {
    const uint32_t c = o & (columns - 1), d = o / columns, row = y.first_query + c;
    if (c >= y.columns) return;
    rdkv_cuda__store(p.io.out, static_cast<size_t>(row) * v_dim + d, p.dtype,
                     all > 0 ? __fdividef(value, all) : 0.0f);
    if (d == 0 && p.io.lse) p.io.lse[row] = all > 0 ? (high + log2f(all)) * 0.69314718f : -INFINITY;
  };
  const float *const first_values = reinterpret_cast<const float *>(rings);
  const auto top_of = [&](uint32_t c) { return __int_as_float(rdkv_cuda__ordered(sh->max[c])); };
  const auto sum_of = [&](uint32_t c) {
    float all = 0;
#pragma unroll 4
    for (uint32_t k = 0; k < busy; ++k) all += first_values[k * apart + n_values + c];
    return all;
  };
  if (n > 1 &&
      warp == n_warps - 1) { /* tops, sums, and so on: each share's readers have their own */
    const uint32_t c = lane & (columns - 1);
    float all = 0;
#pragma unroll 2
    for (uint32_t k = lane / columns; k < busy; k += 32 / columns)
      all += first_values[k * apart + n_values + c];
#pragma unroll
    for (uint32_t d = columns; d < 32; d <<= 1) all += __shfl_xor_sync(RDKV_CUDA__FULL, all, d);
    const float x = lane & columns ? all : top_of(c);
    rdkv_cuda__leave(part + n_values + lane, x), rdkv_cuda__leave(part + n_values + 32 + lane, x);
  }
#pragma unroll 1
  for (uint32_t o = 4 * threadIdx.x; o < n_values; o += 4 * blockDim.x) {
    float4 value = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (uint32_t k = 0; k < busy; ++k)
      rdkv_cuda__fma4(value, make_float4(1, 1, 1, 1),
                      *reinterpret_cast<const float4 *>(first_values + k * apart + o));
    if (n > 1) {
      rdkv_cuda__leave(part + o, value);
    } else {
      const float v[4] = {value.x, value.y, value.z, value.w};
#pragma unroll 1
      for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t c = (o + k) & (columns - 1);
        write(o + k, k & 2 ? (k & 1 ? v[3] : v[2]) : (k & 1 ? v[1] : v[0]), sum_of(c), top_of(c));
      }
    }
  }
  if (n == 1) return;
  /* The head's blocks share the values: every n-th 32 or 8 of them are a block's, one after the
     other its warps', the last one's first. With more than four parts 8 lanes have every fourth. */
  const uint32_t share = n > 4 ? 8 : 32;
  const float *const first_part = part - static_cast<size_t>(y.part) * part_words;
#pragma unroll 1
  for (uint32_t k = 0, who = y.part; k < n; ++k, who = who + 1 == n ? 0 : who + 1) {
    if (k == 1 && !sh->last) break;
    if (k == 0 ? sh->left
               : rdkv_cuda__look(own_words + (static_cast<int64_t>(who) - y.part) * part_words + 1))
      continue;
#pragma unroll 1
    for (uint32_t first = share * (who + n * (n_warps - 1 - warp)); first < n_values;
         first += share * n * n_warps) {
      const uint32_t o = first + (lane & (share - 1)), turn = lane / share;
      const float *at = first_part + turn * part_words + o;
      const float *tops = first_part + turn * part_words + n_values + ((2 * columns * who) & 63) +
                          (o & (columns - 1));
      float value = 0, all = 0, high = -INFINITY;
      if (n <= 4) {
        rdkv_cuda__add_parts<false, columns, part_words>(at, tops, n, high, value, all);
        write(o, value, all, high);
        continue;
      }
      uint32_t left = n;
#pragma unroll 1
      for (; left >= 16; left -= 16, at += 16 * part_words, tops += 16 * part_words)
        rdkv_cuda__add_parts<true, columns, 4 * part_words>(at, tops, 4, high, value, all);
      if (left)
        rdkv_cuda__add_parts<false, columns, 4 * part_words>(
            at, tops, left > turn ? (left - turn + 3) / 4 : 0, high, value, all);
      float top = high;
#pragma unroll
      for (uint32_t d = 8; d < 32; d <<= 1)
        top = fmaxf(top, __shfl_xor_sync(RDKV_CUDA__FULL, top, d));
      const float f = high == top ? 1.0f : rdkv_cuda__exp2(high - top);
      value *= f, all *= f;
#pragma unroll
      for (uint32_t d = 8; d < 32; d <<= 1) {
        value += __shfl_xor_sync(RDKV_CUDA__FULL, value, d);
        all += __shfl_xor_sync(RDKV_CUDA__FULL, all, d);
      }
      if (turn == 0) write(o, value, all, top);
    }
  }
#else
  (void)p;
#endif
}

/* ---- >>cuda-launch : the host's side --------------------------------------------------------- */

static __global__ void rdkv_cuda__advance_kernel(uint32_t *tail_tokens, int batch) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < batch) ++tail_tokens[i];
}

typedef void (*rdkv_cuda__kernel)(rdkv_cuda__args);

/* Whether the latency kernel takes K by bytes: few parts of a head, so some tiles for a warp. */
static bool rdkv_cuda__many(const rdkv_cuda_config *c) {
  return c->latency > 0 && c->n_q_heads <= 4 * c->n_kv_heads && c->k_dim + 45 <= 192 &&
         static_cast<uint32_t>(c->n_blocks) < 5 * rdkv_cuda__layout_of(c).heads;
}

static rdkv_cuda__kernel rdkv_cuda__kernel_for(const rdkv_cuda_config *c) {
  const bool paired = c->n_q_heads <= 4 * c->n_kv_heads, many = rdkv_cuda__many(c);
  (void)paired, (void)many; /* of which a build without attention has no use */
#define RDKV_CUDA__CASE(dim)                                             \
  case dim:                                                              \
    if (c->latency > 0)                                                  \
      return !paired ? rdkv_cuda__latency_kernel<dim / 16, false, false> \
             : many  ? rdkv_cuda__latency_kernel<dim / 16, true, true>   \
                     : rdkv_cuda__latency_kernel<dim / 16, true, false>;  \
    return paired ? rdkv_cuda__attend_kernel<dim / 16, true>             \
                  : rdkv_cuda__attend_kernel<dim / 16, false>;
  switch (c->v_dim) {
#ifdef RDKV_CUDA_V_DIM
#if RDKV_CUDA_V_DIM > 0
    RDKV_CUDA__CASE(RDKV_CUDA_V_DIM)
#endif
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

/* Fragments of the query: for groups above 4 the rests lie behind. Those of bytes have up to 3
   pairs with one block. */
static uint32_t rdkv_cuda__fragments(const rdkv_cuda_config *c, int blocks) {
  const uint32_t n = static_cast<uint32_t>(blocks);
  const uint32_t bytes = (RDKV_CUDA__PAIR * (n + 3) / 2 + 127) / 128 * 128;
  if (c->n_q_heads / c->n_kv_heads > 4) return 512u * n;
  return 256u * n > bytes ? 256u * n : bytes;
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
  if (c->latency > 0) { /* no table, but rows as floats, each with its largest magnitude */
    const uint32_t columns = group <= 4 ? 4 : 8;
    return (columns * (static_cast<uint32_t>(c->k_dim) + 4) * 4 + 127) / 128 * 128;
  }
  return rdkv_cuda__table_room(c) +
         ((group < 8 ? group : 8) * rdkv_cuda__row_bytes(c) + 127) / 128 * 128;
}

static uint32_t rdkv_cuda__shared_bytes(const rdkv_cuda_config *c) {
  const uint32_t warps = static_cast<uint32_t>(c->n_warps);
  return rdkv_cuda__source_bytes(c) + rdkv_cuda__fragments(c, c->k_dim / 16 + 2) +
         (c->latency > 0 ? rdkv_cuda__fragments(c, c->k_dim / 16) : 0) +
         static_cast<uint32_t>(sizeof(rdkv_cuda__shared)) +
         (c->latency > 0 ? RDKV_CUDA__MOST_WARPS : warps) *
             static_cast<uint32_t>(sizeof(rdkv_cuda__warp)) +
         warps * rdkv_cuda__ring_bytes(c);
}

/* The latency kernel's geometry and latency = 1, if there are blocks for at least two parts of each
   head; else latency = -1. */
static cudaError_t rdkv_cuda__resolve_latency(rdkv_cuda_config *c, int sms, int shared) {
  rdkv_cuda_config t = *c;
  t.latency = 1, t.teams = 1, c->latency = -1;
  const void *f = reinterpret_cast<const void *>(rdkv_cuda__kernel_for(&t));
  cudaError_t e = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e) return e;
  int blocks = 0;
  for (t.n_warps = c->n_warps ? c->n_warps : c->v_dim <= 128 ? 16 : 8;; --t.n_warps) {
    const uint32_t bytes = rdkv_cuda__shared_bytes(&t);
    if (bytes <= static_cast<uint32_t>(shared))
      e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, f, 32 * t.n_warps, bytes);
    if (e) return e;
    if (blocks || c->n_warps || t.n_warps == 1) break;
  }
  if (t.blocks_per_sm == 0) t.blocks_per_sm = blocks;
  if (t.n_blocks == 0) t.n_blocks = t.blocks_per_sm * sms;
  if (blocks && t.n_blocks < 65536 && /* counted in half a word */
      static_cast<uint32_t>(t.n_blocks) >= 2 * rdkv_cuda__layout_of(&t).heads)
    *c = t;
  return c->latency < 0
             ? cudaSuccess /* the kernel may be another one now */
             : cudaFuncSetAttribute(reinterpret_cast<const void *>(rdkv_cuda__kernel_for(c)),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
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
      c.latency < -1 || c.latency > 1 || c.n_warps < 0 || c.n_warps > (c.v_dim <= 128 ? 16 : 8) ||
      c.teams < 0 || c.teams > 16 || c.n_warps * c.teams > (c.v_dim <= 128 ? 16 : 8) ||
      c.blocks_per_sm < 0 || c.n_blocks < 0)
    return cudaErrorInvalidValue;
  c.latency = -1;
  const rdkv_cuda__kernel kernel = rdkv_cuda__kernel_for(&c);
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
  if (major >= 9 && in->latency >= 0 && in->teams <= 1)
    e = rdkv_cuda__resolve_latency(&c, sms, shared);
  if (!e && in->latency > 0 && c.latency < 0) e = cudaErrorInvalidValue;
  if (!e && c.latency > 0) *out = c;
  if (e || c.latency > 0) return e;
  e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e) return e;
  /* few heads: as much in flight as one block can hold; many, or a launch that shares the device
     with the next: as many warps as fit in blocks that cover for each other */
  const bool few = c.batch * c.n_kv_heads < sms / 4;
  const int most = c.v_dim <= 128 && c.k_dim <= 128 ? (few && !c.overlap ? 16 : 8) : 4;
  if (c.teams == 0) {
    /* many heads: half the warps for each, so that what a head takes beside its tiles counts half
     */
    rdkv_cuda_config t = c;
    t.n_warps = t.teams = 4;
    const bool half = c.v_dim <= 128 && !c.n_warps && !c.blocks_per_sm && !c.n_blocks &&
                      rdkv_cuda__layout_of(&c).heads >= 2u * static_cast<uint32_t>(sms) &&
                      4 * rdkv_cuda__shared_bytes(&t) <= static_cast<uint32_t>(shared);
    c.teams = half ? 4 : 1, c.n_warps = half ? 4 : c.n_warps;
  }
  const int room = (c.v_dim <= 128 ? 16 : 8) / c.teams; /* the thread block's warps */
  const int first = c.n_warps     ? c.n_warps
                    : most < room ? most
                                  : room,
            last = c.n_warps || first != 8 ? first : 6;
  int blocks = 0;
  for (int n = first; n >= last; --n) {
    rdkv_cuda_config t = c;
    int fit = 0;
    t.n_warps = n;
    const uint32_t all = rdkv_cuda__shared_bytes(&t) * static_cast<uint32_t>(c.teams);
    if (all <= static_cast<uint32_t>(shared))
      e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &fit, reinterpret_cast<const void *>(kernel), 32 * n * c.teams, all);
    if (e) return e;
    fit *= c.teams;
    if (fit * n > blocks * c.n_warps || n == first) blocks = fit, c.n_warps = n;
  }
  while (blocks == 0 && c.n_warps > 1 && in->n_warps == 0) {
    c.n_warps /= 2;
    if (rdkv_cuda__shared_bytes(&c) * static_cast<uint32_t>(c.teams) <=
        static_cast<uint32_t>(shared))
      blocks = c.teams;
  }
  if (blocks == 0) return cudaErrorInvalidValue;
  if (c.blocks_per_sm == 0) c.blocks_per_sm = few ? 1 : blocks;
  if (c.n_blocks == 0) c.n_blocks = c.blocks_per_sm * sms;
  *out = c;
  return cudaSuccess;
}

extern "C" size_t rdkv_cuda_plan_bytes(const rdkv_cuda_config *cfg) {
  const rdkv_cuda__layout l = rdkv_cuda__layout_of(cfg);
  return l.bytes * static_cast<size_t>(cfg->n_layers) +
         2 * l.part * static_cast<size_t>(cfg->n_blocks);
}

extern "C" size_t rdkv_cuda_workspace_bytes(const rdkv_cuda_config *cfg) {
  const size_t columns = cfg->n_q_heads / cfg->n_kv_heads <= 4 ? 4 : 8;
  const size_t values = columns * static_cast<size_t>(cfg->v_dim);
  if (cfg->latency > 0) return 128; /* its parts lie in the plan, which clears them */
  return 2 * static_cast<size_t>(cfg->n_blocks) * (values + 2 * columns) * sizeof(float);
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
  p.layer_bytes = l.bytes, p.counters = l.counters, p.weights = l.weights, p.starts = l.starts;
  p.heads = l.heads, p.passes = l.passes, p.n_kv_heads = static_cast<uint32_t>(cfg->n_kv_heads);
  p.n_blocks = static_cast<uint32_t>(cfg->n_blocks);
  p.max_segments = static_cast<uint32_t>(cfg->max_segments);
  p.group = l.group;
  p.first_layer = cfg->first_layer, p.k_dim = cfg->k_dim, p.v_dim = cfg->v_dim;
  p.latency = cfg->latency > 0, p.n_warps = cfg->n_warps, p.bytes = rdkv_cuda__many(cfg);
  p.ring_bytes = rdkv_cuda__ring_bytes(cfg);
  p.parts = reinterpret_cast<uint4 *>(p.plan + l.bytes * static_cast<size_t>(cfg->n_layers));
  p.n_parts = static_cast<uint32_t>(2 * l.part / sizeof(uint4)) * p.n_blocks;
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
  p.starts = base + l.starts, p.start_bytes = rdkv_cuda__start_bytes(cfg->k_dim);
  p.entries = p.starts + RDKV_CUDA__MOST_WARPS * RDKV_CUDA__HASTE * sizeof(rdkv_cuda__first);
  p.partials = static_cast<float *>(workspace);
  if (l.part)
    p.partials =
        reinterpret_cast<float *>(const_cast<uint8_t *>(static_cast<const uint8_t *>(plan)) +
                                  l.bytes * static_cast<size_t>(cfg->n_layers));
  p.io = *io, p.q = static_cast<const uint8_t *>(io->q), p.tail_tokens = io->tail_tokens;
  p.passes = l.passes;
  p.n_kv_heads = static_cast<uint32_t>(cfg->n_kv_heads);
  p.k_dim = cfg->k_dim, p.dtype = cfg->dtype, p.tail_bf16 = cfg->tail_dtype == RDKV_BF16;
  p.ring_bytes = rdkv_cuda__ring_bytes(cfg);
  p.key_fragments = rdkv_cuda__fragments(cfg, cfg->k_dim / 16 + 2);
  p.tail_fragments = rdkv_cuda__fragments(cfg, cfg->k_dim / 16);
  p.table_bytes = rdkv_cuda__table_room(cfg), p.row_bytes = rdkv_cuda__row_bytes(cfg);
  p.source_bytes = rdkv_cuda__source_bytes(cfg), p.overlap = cfg->overlap != 0;
  p.n_blocks = static_cast<uint32_t>(cfg->n_blocks), p.block_bytes = rdkv_cuda__shared_bytes(cfg);
  p.factor_log2 = cfg->softmax_scale * 1.44269504f;
  cudaLaunchConfig_t launch = cudaLaunchConfig_t();
  cudaLaunchAttribute attribute;
  launch.attrs = &attribute;
  const uint32_t teams = static_cast<uint32_t>(cfg->teams);
  launch.gridDim = dim3((p.n_blocks + teams - 1) / teams);
  launch.blockDim = dim3(32u * static_cast<uint32_t>(cfg->n_warps), teams);
  launch.dynamicSmemBytes = p.block_bytes * teams, launch.stream = stream;
  if (cfg->overlap) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    launch.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&launch, rdkv_cuda__kernel_for(cfg), p);
}

extern "C" cudaError_t rdkv_cuda_advance(uint32_t *tail_tokens, int batch, cudaStream_t stream) {
  if (!tail_tokens || batch < 1) return cudaErrorInvalidValue;
  rdkv_cuda__advance_kernel<<<static_cast<uint32_t>((batch + 255) / 256), 256, 0, stream>>>(
      tail_tokens, batch);
  return cudaGetLastError();
}

#ifndef RDKV_CUDA_NO_COMPRESS
/* ---- >>cuda-compress : score, measure, allocate and pack on the device -------------------------

   Whatever decides a width or a code is computed as rdkv.h does it, operation by operation: the
   _rn intrinsics round every product and sum apart, integer counts may be added in any order, and
   floats are added in rdkv.h's order. Do not compile
   with -use_fast_math: flushed subnormals are other bits. */

namespace rdkv_cuda_compress {

typedef unsigned long long u64; /* as atomicAdd wants it */

enum {
  TILE = 32,     /* tokens of a tile */
  MAX_DIM = 256, /* as rdkv_config says */
  MAX_WINDOW = 1024,
  POOL = 127,   /* most neighbours on a side that are averaged over */
  PACKED = 304, /* most slots of a channel table: 16 blocks and a partly filled one for each run */
  CHUNK = 2048, /* tokens that a block looks through */
  THREADS = 256,
  LIST_THREADS = 512,
  LIST = 16 * LIST_THREADS, /* tokens that a block lists at a time */
  BINS = RDKV_HISTOGRAM_BINS
};
static const uint32_t FULL = 0xffffffffu, MAX_HALF = 0x477fe000u; /* bits of 65504.0f */

__host__ __device__ inline int level_of(int bits) {
#ifdef __CUDA_ARCH__
  if (static_cast<unsigned>(bits) <= 16 && (0x10115 >> bits & 1))
    return bits ? 31 - __clz(bits) : 0;
  return -1;
#else
  return bits == 0 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : bits == 8 ? 3 : bits == 16 ? 4 : -1;
#endif
}
__host__ __device__ inline int width_of(int level) { return level ? 1 << level : 0; }
__host__ __device__ inline int pad16(int n) { return (n + 15) & ~15; }
__host__ __device__ inline uint64_t round_up(uint64_t a, uint64_t to) {
  return (a + to - 1) / to * to;
}
__host__ __device__ inline uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
__host__ __device__ inline uint32_t most(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* ---- bytes, as rdkv.h counts them */

struct parts {
  uint64_t table, positions, tiles;
  uint32_t n_tiles[5]; /* [0] is their sum */
  uint32_t k_blocks;
  uint32_t k_tile; /* bytes of K in a tile */
};

__host__ __device__ inline uint64_t head_bytes(int v_dim, int positions, const uint32_t *count,
                                               const uint32_t *channels, parts *p) {
  const uint64_t d_blocks = static_cast<uint64_t>(pad16(v_dim)) / 16;
  uint64_t v = 0;
  p->k_blocks = p->k_tile = p->n_tiles[0] = 0;
  for (int l = 1; l < 4; ++l) {
    const uint32_t blocks = (channels[l] + 15) / 16;
    p->k_blocks += blocks, p->k_tile += blocks * (64u << l);
  }
  for (int l = 1; l < 5; ++l) {
    p->n_tiles[l] = (count[l] + TILE - 1) / TILE;
    p->n_tiles[0] += p->n_tiles[l];
    v += p->n_tiles[l] * d_blocks * (64u << l);
  }
  p->tiles = static_cast<uint64_t>(p->n_tiles[0]) * (p->k_tile + 128) + v;
  p->table = round_up(80 * static_cast<uint64_t>(p->k_blocks) + 3 * channels[0], 128);
  p->positions = positions ? static_cast<uint64_t>(p->n_tiles[0]) * 4 * TILE : 0;
  return p->table + p->positions + p->tiles;
}

__host__ __device__ inline uint64_t fixed_bytes(uint64_t n_heads) {
  return round_up(sizeof(rdkv_header) + n_heads * sizeof(rdkv_record), 128);
}

static uint64_t fp16_bytes(const rdkv_config *c, uint32_t n_tokens) {
  return static_cast<uint64_t>(c->n_kv_heads) * static_cast<uint64_t>(c->k_dim + c->v_dim) * 2 *
         static_cast<uint64_t>(c->n_layers) * n_tokens;
}

static uint64_t budget_of(const rdkv_config *c, uint32_t n_tokens, int n_layers) {
  uint64_t total = c->budget_bytes;
  const uint64_t l = static_cast<uint64_t>(c->n_layers), n = static_cast<uint64_t>(n_layers);
  if (total == 0)
    total = static_cast<uint64_t>(c->keep * static_cast<double>(fp16_bytes(c, n_tokens)));
  return total / l * n + total % l * n / l;
}

/* As rdkv__max_block. */
static uint64_t max_block(const rdkv_config *c, uint32_t n_tokens, int n_layers) {
  const uint64_t heads = static_cast<uint64_t>(n_layers) * static_cast<uint64_t>(c->n_kv_heads);
  const uint64_t kb = static_cast<uint64_t>(pad16(c->k_dim)) / 16,
                 vb = static_cast<uint64_t>(pad16(c->v_dim)) / 16;
  const uint64_t tile = 512 * kb + 384 + 128 + 1024 * vb + (c->positions ? 128 : 0);
  return fixed_bytes(heads) + heads * (tile * (static_cast<uint64_t>(n_tokens) / TILE + 4) + 2048);
}

/* ---- values */

__device__ __forceinline__ float half_value(uint16_t h) {
  return __half2float(__ushort_as_half(h));
}
__device__ __forceinline__ uint16_t to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ float nearest_half(float x) { return half_value(to_half(x)); }

/* An element as it lies in memory, and its value: apart, so that several can be asked for before
   the first is waited for. */
__device__ __forceinline__ uint32_t raw_element(const void *p, int dtype, ptrdiff_t i) {
  return dtype == RDKV_F32 ? static_cast<const uint32_t *>(p)[i]
                           : static_cast<const uint16_t *>(p)[i];
}
__device__ __forceinline__ float value_of(uint32_t raw, int dtype) {
  const float half = half_value(static_cast<uint16_t>(raw));
  return dtype == RDKV_F16 ? half : __uint_as_float(dtype == RDKV_BF16 ? raw << 16 : raw);
}
__device__ __forceinline__ float element(const void *p, int dtype, ptrdiff_t i) {
  return value_of(raw_element(p, dtype, i), dtype);
}

__device__ __forceinline__ const void *row_of(const rdkv_tensor &t, uint32_t token, int head) {
  const ptrdiff_t i =
      static_cast<ptrdiff_t>(token) * t.token_stride + static_cast<ptrdiff_t>(head) * t.head_stride;
  return static_cast<const char *>(t.data) + i * (t.dtype == RDKV_F32 ? 4 : 2);
}

__device__ __forceinline__ bool in_range(float x) {
  return (__float_as_uint(x) & 0x7fffffffu) <= MAX_HALF;
}

/* The first error stays. */
__device__ __forceinline__ void fail(uint32_t *status, rdkv_status error) {
  atomicCAS(status, static_cast<uint32_t>(RDKV_OK), static_cast<uint32_t>(error));
}

/* Floats as integers in the same order, so that atomics find the smallest and the largest. */
__device__ __forceinline__ int ordered(float x) {
  const int i = __float_as_int(x);
  return i < 0 ? i ^ 0x7fffffff : i;
}
__device__ __forceinline__ float unordered(int i) {
  return __int_as_float(i < 0 ? i ^ 0x7fffffff : i);
}

struct affine {
  float scale, mid, inv;
};

__device__ inline affine fit(float lo, float hi, int bits) {
  const float n = static_cast<float>(1 << (bits - 1));
  const float step = __fdiv_rn(__fsub_rn(hi, lo), 2 * n - 1);
  affine a;
  a.mid = nearest_half(__fadd_rn(lo, __fmul_rn(step, n)));
  const float up = __fdiv_rn(__fsub_rn(hi, a.mid), n - 1),
              down = __fdiv_rn(__fsub_rn(a.mid, lo), n);
  const float want = up > down ? up : (down > 0 ? down : 0);
  uint16_t h = to_half(want);
  if (half_value(h) < want) ++h;
  a.scale = half_value(h);
  a.inv = a.scale > 0 ? __fdiv_rn(1, a.scale) : 0;
  return a;
}

/* x to the nearest whole number, |x| < 2^22, ties to even. */
__device__ __forceinline__ float nearest(float x) {
  return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f);
}

/* The code, not yet lifted to 0..: clamped first, which whole bounds allow. */
__device__ __forceinline__ float code_of(float x, float mid, float inv, float lo, float hi) {
  return nearest(fmaxf(fminf(__fmul_rn(__fsub_rn(x, mid), inv), hi), lo));
}

/* rdkv__noise */
__host__ __device__ inline float noise_of(int n, int bits) {
  const float steps = static_cast<float>((1 << bits) - 1);
  return static_cast<float>(n) / (12 * steps * steps);
}

/* The authors' quantiser. */
struct zero_point {
  float scale, zero;
};

__device__ inline zero_point fit_paper(float lo, float hi, int bits) {
  const float top = static_cast<float>((1 << bits) - 1);
  zero_point z;
  z.scale = __fmul_rn(__fsub_rn(hi, lo), __fdiv_rn(1, top));
  if (z.scale < 1e-8f) z.scale = 1e-8f;
  z.zero = __fdiv_rn(-lo, z.scale);
  z.zero = rintf(z.zero < 0 ? 0 : z.zero > top ? top : z.zero);
  return z;
}
__device__ inline uint32_t code_paper(float x, zero_point z, int bits) {
  const float top = static_cast<float>((1 << bits) - 1);
  const float c = __fadd_rn(__fdiv_rn(x, z.scale), z.zero);
  return static_cast<uint32_t>(rintf(c < 0 ? 0 : c > top ? top : c));
}
__device__ inline affine affine_paper(zero_point z, int bits) {
  affine a;
  a.scale = nearest_half(z.scale), a.inv = 0;
  a.mid = nearest_half(__fsub_rn(__fmul_rn(a.scale, static_cast<float>(1 << (bits - 1))),
                                 __fmul_rn(a.scale, z.zero)));
  return a;
}

/* 16 bytes to shared memory; zeroes where there is no such row. */
__device__ __forceinline__ void copy_16(uint32_t to, const char *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_16(uint32_t to, const char *from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}

/* What is read once, of all of K or V, leaves the L2 first: in it is room for arrays, code and
   kept rows, which are read again. */
__device__ __forceinline__ u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_16_once(uint32_t to, const char *from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}

/* 4 bytes. */
__device__ __forceinline__ void copy_4(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

/* Launches of a call may overlap: what one needs of those before it it reads behind this. */
__device__ __forceinline__ void wait_for_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- sums over a block; all threads call them */

/* Sum over the lanes up to this one. */
template <typename T>
__device__ __forceinline__ T warp_scan(T sum) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (uint32_t d = 1; d < 32; d <<= 1) {
    const T below = __shfl_up_sync(FULL, sum, d);
    if (lane >= d) sum += below;
  }
  return sum;
}

__device__ inline u64 warp_sum(u64 x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(FULL, x, d);
  return x;
}

/* Sum of the threads before this one; *total that of all. scratch [33]. */
__device__ inline u64 block_scan(u64 x, u64 *scratch, u64 *total) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const int n_warps = static_cast<int>(blockDim.x) >> 5;
  u64 sum = warp_scan(x);
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  u64 warps = warp_scan(lane < n_warps ? scratch[lane] : 0); /* every warp adds up all */
  const u64 before = __shfl_sync(FULL, warps, warp > 0 ? warp - 1 : 0);
  *total = __shfl_sync(FULL, warps, 31);
  return (warp > 0 ? before : 0) + sum - x;
}

/* ---- tokens in order: which are kept, by run */

/* Tokens of one layer that are packed. */
struct order_args {
  const uint8_t *v_bits;     /* [heads][n] */
  const float *v_distortion; /* [heads][5][n] to add up, or NULL */
  double *sums;              /* [heads][parts] distortion */
  uint32_t *order;           /* [heads][n] by run */
  uint32_t *status;
  uint32_t n, each, parts; /* tokens of a part, parts of a head */
};

__device__ __forceinline__ uint32_t bin_of(float x) {
  return least(__float_as_uint(x) >> 20, BINS - 1);
}

/* ---- items: layers or sequences that one call takes together */

struct item {
  rdkv_tensor k, v, q, out;
  const float *lse;
  float *token, *q_square, *k_square, *mean_out, *v_distortion, *k_distortion;
  uint8_t *v_bits, *k_bits;
};

/* Parameters of a launch have room for as many. Heads count over all items of a launch then, kv
   heads within one. */
enum { ITEMS = 8 };
struct item_list {
  item at[ITEMS];
};

/* ---- K over the kept tokens: range and sums, in the order that rdkv__carry defines */

enum {
  STRETCH = 64,
  STRETCHES = 8, /* of a span */
  SPAN = STRETCH * STRETCHES
};

/* Two neighbouring elements as they lie in memory. */
template <int DTYPE>
struct raw_pair {
  uint32_t x;
  __device__ __forceinline__ void set(uint32_t word) { x = word; }
  __device__ __forceinline__ void load(const void *p, ptrdiff_t stride, int n) {
    const uint16_t *h = static_cast<const uint16_t *>(p);
    x = (n > 0 ? __ldg(h) : 0u) | (n > 1 ? static_cast<uint32_t>(__ldg(h + stride)) << 16 : 0u);
  }
  __device__ __forceinline__ float2 values() const {
    return DTYPE == RDKV_F16 ? __half22float2(rdkv_cuda__halves(x))
                             : make_float2(__uint_as_float(x << 16), __uint_as_float(x & ~0xffffu));
  }
};
template <>
struct raw_pair<RDKV_F32> {
  float x, y;
  __device__ __forceinline__ void set(uint32_t) {} /* words have no pairs of them */
  __device__ __forceinline__ void load(const void *p, ptrdiff_t stride, int n) {
    const float *f = static_cast<const float *>(p);
    x = n > 0 ? __ldg(f) : 0, y = n > 1 ? __ldg(f + stride) : 0;
  }
  __device__ __forceinline__ float2 values() const { return make_float2(x, y); }
};

/* N pairs of a row, which has n elements from there on; WHOLE: all of them, side by side. */
template <bool WHOLE, int DTYPE, int N>
__device__ __forceinline__ void load_pairs(raw_pair<DTYPE> (&x)[N], const char *row,
                                           ptrdiff_t stride, int n) {
  if (WHOLE && N == 4) {
    const uint4 y = __ldg(reinterpret_cast<const uint4 *>(row));
    x[0].set(y.x), x[1].set(y.y), x[N - 2].set(y.z), x[N - 1].set(y.w);
  } else if (WHOLE) {
    const uint2 y = __ldg(reinterpret_cast<const uint2 *>(row));
    x[0].set(y.x), x[1].set(y.y);
  } else {
#pragma unroll
    for (int c = 0; c < N; ++c)
      x[c].load(row + 2 * c * stride * (DTYPE == RDKV_F32 ? 4 : 2), stride, n - 2 * c);
  }
}

/* Smallest and largest of pairs, which begin at the ends of the half range; a NaN stays. */
template <int DTYPE>
struct extremes {
  uint32_t low, high;
  __device__ __forceinline__ void clear() {
    low = DTYPE == RDKV_F16 ? 0x7bff7bffu : 0x477f477fu, high = low | 0x80008000u;
  }
  __device__ __forceinline__ void take(uint32_t x) {
    if (DTYPE == RDKV_F16) {
      asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(low) : "r"(x));
      asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(high) : "r"(x));
    } else {
      asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(low) : "r"(x));
      asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(high) : "r"(x));
    }
  }
  __device__ __forceinline__ void take(const raw_pair<DTYPE> &p) { take(p.x); }
  __device__ __forceinline__ float2 lowest() const { return values(low); }
  __device__ __forceinline__ float2 highest() const { return values(high); }
  static __device__ __forceinline__ float2 values(uint32_t x) {
    const raw_pair<DTYPE> p = {x};
    return p.values();
  }
};
template <>
struct extremes<RDKV_F32> {
  float2 low, high;
  __device__ __forceinline__ void clear() { low.x = low.y = 65504.0f, high.x = high.y = -65504.0f; }
  static __device__ __forceinline__ void least_of(float *a, float x) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(*a) : "f"(x));
  }
  static __device__ __forceinline__ void most_of(float *a, float x) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(*a) : "f"(x));
  }
  __device__ __forceinline__ void take(const raw_pair<RDKV_F32> &p) {
    least_of(&low.x, p.x), least_of(&low.y, p.y), most_of(&high.x, p.x), most_of(&high.y, p.y);
  }
  __device__ __forceinline__ float2 lowest() const { return low; }
  __device__ __forceinline__ float2 highest() const { return high; }
};

/* Bytes from token to token of rows; tensor_ok sees to it that 64 times that fit. */
__device__ __forceinline__ int step_of(const rdkv_tensor &t) {
  return static_cast<int>(t.token_stride) * (t.dtype == RDKV_F32 ? 4 : 2);
}

/* True in all threads of the block that is the last one to get here. */
__device__ __forceinline__ bool last_block(uint32_t *done, uint32_t blocks) {
  __shared__ uint32_t before[1];
  __syncthreads();
  if (threadIdx.x == 0) /* speaks for all whom the barriers order */
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before[0])
                 : "l"(__cvta_generic_to_global(done))
                 : "memory");
  __syncthreads();
  return before[0] == blocks - 1;
}

/* ---- pack: a launch lists the kept tokens of each head and finds the range of K over them, a
   second one writes the block */

/* What the first launch finds out about a head of the block to be. */
struct head_counts {
  uint32_t count[5], channels[4]; /* tokens and channels of each level */
  double k;                       /* predicted distortion of K */
};

struct block_state {
  u64 head_sum, body_sum; /* checksums, that of the head without its header */
  uint32_t done;          /* blocks that have written their part */
};

struct pack_args {
  order_args list; /* of one layer */
  rdkv_tensor k, v;
  const uint8_t *k_bits; /* [heads][k_dim] of the layer */
  const float *k_distortion;
  head_counts *heads; /* [n_layers][heads]; where a kernel has one layer, that layer's */
  const head_counts *all_heads;
  float2 *ends;    /* [n_layers][heads][slices][k_dim] lowest and highest K; likewise */
  float *sums;     /* [heads][spans][k_dim] of K, in heads that drop channels */
  uint16_t *slots; /* [heads][k_dim] where a channel stands in the table */
  block_state *state;
  const double *lambda;
  const uint64_t *budget; /* that goes into the header, or NULL */
  uint8_t *block;
  uint64_t capacity;
  uint64_t *bytes;
  uint32_t n_heads;       /* in all layers */
  uint32_t slices, spans; /* of a head */
  uint32_t tile_blocks;   /* at most, of a head */
  int k_dim, v_dim, joint, positions;
  int again; /* ranges are known, from an earlier launch */
  rdkv_header header;
};

/* Predicted distortion of a head's V added up in order. value [1024]. One block. */
static __device__ __noinline__ double add_in_order(const order_args &a, int head, float *value) {
  double v = 0;
  for (uint32_t t0 = 0; t0 < a.n; t0 += 1024) {
    const uint32_t n = least(1024, a.n - t0);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      const int level = level_of(a.v_bits[static_cast<size_t>(head) * a.n + t0 + i]);
      value[i] = a.v_distortion[(static_cast<size_t>(head) * 5 + static_cast<size_t>(level)) * a.n +
                                t0 + i];
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (uint32_t i = 0; i < n; ++i) v = __dadd_rn(v, static_cast<double>(value[i]));
  }
  return v;
}

/* Adds four widths to the count of each run, which is 2, 4, 8 and 16 for one token. */
__device__ __forceinline__ void count_four(uint32_t x, uint32_t count[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) count[r] = __dp4a(x & 0x02020202u << r, 0x01010101u, count[r]);
}

/* Likewise this thread's share of n widths. */
__device__ __forceinline__ void count_widths(const uint8_t *bits, uint32_t n, uint32_t count[4]) {
  const uint32_t skew = static_cast<uint32_t>(16 - reinterpret_cast<uintptr_t>(bits) % 16) % 16;
  const uint32_t before = least(skew, n), whole = (n - before) / 16, tail = (n - before) % 16;
  if (threadIdx.x < before) count_four(bits[threadIdx.x], count);
  if (threadIdx.x < tail) count_four(bits[n - tail + threadIdx.x], count);
  const uint4 *x = reinterpret_cast<const uint4 *>(bits + before);
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < whole; i += LIST_THREADS) {
    const uint4 y = x[i];
    count_four(y.x, count), count_four(y.y, count);
    count_four(y.z, count), count_four(y.w, count);
  }
}

enum { LIST_WARPS = LIST_THREADS / 32 };

/* Sixteen widths from token t on, as they lie; 0 behind the last token. */
__device__ __forceinline__ void load_widths(const uint8_t *bits, uint32_t t, uint32_t n,
                                            uint32_t x[4]) {
  x[0] = x[1] = x[2] = x[3] = 0;
  if (t + 16 <= n && reinterpret_cast<uintptr_t>(bits + t) % 16 == 0) {
    const uint4 y = *reinterpret_cast<const uint4 *>(bits + t);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i)
      if (t + i < n) x[i / 4] |= static_cast<uint32_t>(bits[t + i]) << (8 * (i % 4));
  }
}

/* *to = x if `is` is 1 and not 0; without a branch. Returns `is`. */
__device__ __forceinline__ uint32_t store_if(uint32_t is, uint32_t *to, uint32_t x) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u32 [%1], %2; }" ::"r"(is),
               "l"(to), "r"(x)
               : "memory");
  return is;
}

/* Channels of a head: how many of each level, where each stands in the table, and the predicted
   distortion, which rdkv.h adds up one after the other. One block. */
static __device__ void list_channels(const pack_args &a, int head) {
  __shared__ uint32_t of_warp[MAX_DIM / 32][4];
  __shared__ double distortion[MAX_DIM];
  const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const uint32_t kd = static_cast<uint32_t>(a.k_dim);
  const size_t first = static_cast<size_t>(head) * kd;
  head_counts *h = a.heads + head;
  int level = -1;
  uint32_t rank = 0;
  if (tid < kd) {
    level = level_of(a.k_bits[first + tid]);
    if (level < 0 || (level == 4 && a.joint)) fail(a.list.status, RDKV_ERR_CONFIG);
    level = level < 0 ? 0 : level > 3 ? 3 : level;
    distortion[tid] =
        a.joint
            ? static_cast<double>(a.k_distortion[4 * first + static_cast<size_t>(level) * kd + tid])
            : 0;
  }
  if (warp < MAX_DIM / 32) {
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      const uint32_t mask = __ballot_sync(FULL, level == l);
      if (level == l) rank = static_cast<uint32_t>(__popc(mask & ((1u << lane) - 1)));
      if (lane == 0) of_warp[warp][l] = static_cast<uint32_t>(__popc(mask));
    }
  }
  __syncthreads();
  uint32_t slot = 0; /* where the level's channels begin; those that are dropped come last */
#pragma unroll
  for (int l = 1; l <= 4; ++l) {
    uint32_t n = 0;
#pragma unroll
    for (uint32_t w = 0; w < MAX_DIM / 32; ++w) {
      if (level == l % 4 && w < warp) rank += of_warp[w][l % 4];
      n += of_warp[w][l % 4];
    }
    if (tid == 0) h->channels[l % 4] = n;
    if (level == l % 4) a.slots[first + tid] = static_cast<uint16_t>(slot + rank);
    slot += (n + 15) / 16 * 16;
  }
  if (tid == LIST_THREADS - 1) { /* a warp that has little to do */
    double k = 0;
#pragma unroll 16
    for (uint32_t i = 0; i < kd; ++i) k = __dadd_rn(k, distortion[i]);
    h->k = k;
  }
}

/* Lists the tokens of part of a head, behind those of the parts before it, and adds up their
   distortion; the first part's block writes down what the head has. Every block counts all the
   head's widths, which is faster than a launch more. */
static __device__ void list_part(const pack_args &p, int head, uint32_t part) {
  __shared__ u64 scratch[33];
  __shared__ u64 sums[4][LIST_THREADS / 32];
  __shared__ double distortion[LIST_THREADS / 32];
  const order_args &a = p.list;
  const uint32_t tid = threadIdx.x, begin = part * a.each, end = least(begin + a.each, a.n);
  const uint8_t *widths = a.v_bits + static_cast<size_t>(head) * a.n;
  uint32_t count[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}; /* before the part, from there on */
  count_widths(widths, begin, count[0]);
  count_widths(widths + begin, a.n - begin, count[1]);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    count[0][r] >>= r + 1, count[1][r] >>= r + 1;
    const u64 sum = warp_sum(static_cast<u64>(count[0][r] + count[1][r]) << 32 | count[0][r]);
    if (tid % 32 == 0) sums[r][tid / 32] = sum;
  }
  __syncthreads();
  uint32_t first[5] = {0, 0, 0, 0, 0}, to[4]; /* where the runs start; where the part goes on */
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    u64 sum = 0;
    for (int w = 0; w < LIST_THREADS / 32; ++w) sum += sums[r][w];
    first[r + 1] = first[r] + static_cast<uint32_t>(sum >> 32);
    to[r] = first[r] + static_cast<uint32_t>(sum);
  }
  uint32_t *order = a.order + static_cast<size_t>(head) * a.n;
  const float *values = a.v_distortion + static_cast<size_t>(head) * 5 * a.n;
  double d = 0;
  bool odd = first[4] > a.n; /* of widths that are none; there is no room for such a list */
  for (uint32_t c0 = begin; c0 < end; c0 += LIST) {
    const uint32_t t0 = c0 + 16 * tid;
    uint32_t x[4], own[4] = {0, 0, 0, 0};
    load_widths(widths, t0, end, x);
    if (a.v_distortion) { /* all are asked for before the first is waited for */
      uint32_t of[16];
      float value[16];
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) of[i] = widths[least(c0 + i * LIST_THREADS + tid, end - 1)];
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) /* 2, 4, 8 and 16 to 1..4 */
        value[i] =
            values[static_cast<size_t>(31 - __clz(static_cast<int>((of[i] & 0x1e) | 1))) * a.n +
                   least(c0 + i * LIST_THREADS + tid, end - 1)];
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i)
        d += c0 + i * LIST_THREADS + tid < end ? static_cast<double>(value[i]) : 0;
    }
    u64 mine = 0, all; /* four counts of 16 bits */
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      odd |= (x[w] & ~0x1e1e1e1eu) != 0 || (x[w] & (x[w] >> 1 | x[w] >> 2 | x[w] >> 3)) != 0;
      count_four(x[w], own);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) mine |= static_cast<u64>(own[r] >> (r + 1)) << (16 * r);
    const u64 before = block_scan(mine, scratch, &all);
    if (first[4] > a.n) break;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t at = to[r] + static_cast<uint32_t>(before >> (16 * r) & 0xffff);
      to[r] += static_cast<uint32_t>(all >> (16 * r) & 0xffff);
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i)
        at += store_if(x[i / 4] >> (1 + r + 8 * (i % 4)) & 1, order + at, t0 + i);
    }
  }
  if (odd) fail(a.status, RDKV_ERR_CONFIG);
  for (int m = 16; m; m >>= 1) d += __shfl_xor_sync(FULL, d, m);
  if (tid % 32 == 0) distortion[tid / 32] = d;
  __syncthreads();
  if (tid == 0) {
    for (int w = 1; w < LIST_THREADS / 32; ++w) d += distortion[w];
    a.sums[static_cast<size_t>(head) * a.parts + part] = d;
  }
  if (part > 0 || tid > 0) return;
  head_counts *h = p.heads + head;
  if (head == 0) *p.bytes = 0;
  if (h == p.all_heads) p.state->done = 0, p.state->head_sum = p.state->body_sum = 0;
  h->count[0] = a.n - first[4];
#pragma unroll
  for (int l = 1; l < 5; ++l) h->count[l] = first[l] - first[l - 1];
}

/* K's rows are shared out to teams of 16 lanes, or of all 32 where there are more than 128
   channels; in a pass a block goes through as many spans as it has teams for their stretches. A
   slice of a head is every so manieth span. First token of a team of this warp: */
__device__ __forceinline__ uint32_t teams_of(const pack_args &a) { return a.k_dim <= 128 ? 2 : 1; }
__device__ __forceinline__ uint32_t stretch_of(const pack_args &a, uint32_t slice, uint32_t pass,
                                               uint32_t team) {
  const uint32_t at_once = LIST_WARPS * teams_of(a) / STRETCHES,
                 i = threadIdx.x / 32 * teams_of(a) + team;
  return ((pass * at_once + i / STRETCHES) * a.slices + slice) * SPAN + i % STRETCHES * STRETCH;
}

/* Widths of both teams' tokens, two a lane. */
__device__ __forceinline__ void load_bits(const pack_args &a, int head, uint32_t slice,
                                          uint32_t pass, uint32_t (&bits)[2][2]) {
  const uint8_t *widths = a.list.v_bits + static_cast<size_t>(head) * a.list.n;
#pragma unroll
  for (uint32_t team = 0; team < 2; ++team)
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t t = stretch_of(a, slice, pass, team) + 32 * half + (threadIdx.x & 31);
      bits[team][half] = team < teams_of(a) && t < a.list.n ? widths[t] : 0;
    }
}

/* Writes down a slice's lowest and highest K, found by the warps. */
template <int DTYPE>
static __device__ __forceinline__ void store_slice(const pack_args &a, int head, uint32_t slice,
                                                   const extremes<DTYPE> (&ends)[4],
                                                   float (*memory)[LIST_WARPS][MAX_DIM]) {
  const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const uint32_t kd = static_cast<uint32_t>(a.k_dim), teams = teams_of(a);
  const uint32_t team = teams == 2 ? lane >> 4 : 0, part = teams == 2 ? lane & 15 : lane;
  __syncthreads();
  bool bad = false;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float2 low = ends[c].lowest(), high = ends[c].highest();
    bad |= !(in_range(low.x) && in_range(low.y) && in_range(high.x) && in_range(high.y));
    if (teams == 2) {
      low.x = fminf(low.x, __shfl_xor_sync(FULL, low.x, 16));
      low.y = fminf(low.y, __shfl_xor_sync(FULL, low.y, 16));
      high.x = fmaxf(high.x, __shfl_xor_sync(FULL, high.x, 16));
      high.y = fmaxf(high.y, __shfl_xor_sync(FULL, high.y, 16));
    }
    if (team > 0) continue;
    *reinterpret_cast<float2 *>(&memory[0][warp][8 * part + 2 * static_cast<uint32_t>(c)]) = low;
    *reinterpret_cast<float2 *>(&memory[1][warp][8 * part + 2 * static_cast<uint32_t>(c)]) = high;
  }
  if (bad) fail(a.list.status, RDKV_ERR_NONFINITE);
  __syncthreads();
  if (tid >= kd) return;
  float2 end = make_float2(memory[0][0][tid], memory[1][0][tid]);
#pragma unroll
  for (int w = 1; w < LIST_WARPS; ++w)
    end.x = fminf(end.x, memory[0][w][tid]), end.y = fmaxf(end.y, memory[1][w][tid]);
  a.ends[(static_cast<size_t>(head) * a.slices + slice) * kd + tid] = end;
}

/* Lowest and highest K of every channel over the kept ones of tokens begin .. end - 1, which are a
   slice of a head; x: the first 16 widths of this thread. */
template <int DTYPE, bool WHOLE>
static __device__ __forceinline__ void find_ends(const pack_args &a, int head, uint32_t slice,
                                                 uint32_t begin, uint32_t end, uint32_t (&x)[4],
                                                 float (*memory)[LIST_WARPS][MAX_DIM]) {
  enum { ROWS = DTYPE == RDKV_F32 ? 4 : 8 }; /* asked for at once */
  __shared__ uint32_t of_warp[LIST_WARPS];
  uint16_t *list = reinterpret_cast<uint16_t *>(memory); /* [LIST] */
  const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const uint32_t teams = teams_of(a), lanes = 32 / teams, part = lane % lanes;
  const int channels = a.k_dim - static_cast<int>(8 * part); /* of this lane, at most 8 */
  const ptrdiff_t stride = a.k.dim_stride ? a.k.dim_stride : 1;
  const int step = step_of(a.k);
  const char *base = static_cast<const char *>(row_of(a.k, 0, head)) +
                     8 * part * stride * (DTYPE == RDKV_F32 ? 4 : 2);
  extremes<DTYPE> ends[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) ends[c].clear();
  for (uint32_t t0 = begin; t0 < end; t0 += LIST) {
    if (t0 > begin) {
      load_widths(a.list.v_bits + static_cast<size_t>(head) * a.list.n, t0 + 16 * tid, end, x);
      __syncthreads(); /* the list has been read */
    }
    uint32_t mask = 0; /* kept tokens */
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t y = x[j] | x[j] >> 2;
      mask |= ((y >> 1 | y >> 2) & 0x01010101u) * 0x10204080u >> 28 << (4 * j);
    }
    uint32_t at = warp_scan(static_cast<uint32_t>(__popc(mask))); /* up to this thread's */
    if (lane == 31) of_warp[warp] = at;
    __syncthreads();
    const uint32_t of_lane = lane < LIST_WARPS ? of_warp[lane] : 0,
                   kept = __reduce_add_sync(FULL, of_lane);
    at += __reduce_add_sync(FULL, lane < warp ? of_lane : 0) - static_cast<uint32_t>(__popc(mask));
#pragma unroll 1
    for (; mask; mask &= mask - 1)
      list[at++] = static_cast<uint16_t>(16 * tid +
                                         static_cast<uint32_t>(__ffs(static_cast<int>(mask))) - 1);
    __syncthreads();
    const char *rows = base + static_cast<ptrdiff_t>(t0) * step;
    const uint32_t all_teams = LIST_WARPS * teams;
#pragma unroll 1
    for (uint32_t r = warp * teams + lane / lanes; r < kept && channels > 0;
         r += ROWS * all_teams) {
      raw_pair<DTYPE> k[ROWS][4];
#pragma unroll
      for (uint32_t j = 0; j < ROWS; ++j) { /* the last one again and again does no harm */
        const char *row =
            rows + static_cast<ptrdiff_t>(list[least(r + j * all_teams, kept - 1)]) * step;
        load_pairs<WHOLE>(k[j], row, stride, channels);
      }
#pragma unroll
      for (uint32_t j = 0; j < ROWS; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) ends[c].take(k[j][c]);
    }
  }
  store_slice(a, head, slice, ends, memory);
}

/* The same over every so manieth span of a head that drops channels, and the sums of K over each
   span, in the order that rdkv__carry defines. */
template <int DTYPE, bool WHOLE>
static __device__ __noinline__ void find_sums(const pack_args &a, int head, uint32_t slice,
                                              float (*memory)[LIST_WARPS][MAX_DIM],
                                              int (*lists)[2][STRETCH + 8]) {
  uint32_t bits[2][2];
  load_bits(a, head, slice, 0, bits);
  enum { ROWS = DTYPE == RDKV_F32 ? 4 : 8 }; /* asked for at once */
  const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const uint32_t kd = static_cast<uint32_t>(a.k_dim);
  const uint32_t teams = teams_of(a);
  const uint32_t team = teams == 2 ? lane >> 4 : 0, part = teams == 2 ? lane & 15 : lane;
  const uint32_t at_once = LIST_WARPS * teams / STRETCHES;   /* spans */
  const int channels = a.k_dim - static_cast<int>(8 * part); /* of this lane, at most 8 */
  const ptrdiff_t stride = a.k.dim_stride ? a.k.dim_stride : 1;
  const int step = step_of(a.k);
  const char *base = static_cast<const char *>(row_of(a.k, 0, head)) +
                     8 * part * stride * (DTYPE == RDKV_F32 ? 4 : 2);
  extremes<DTYPE> ends[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) ends[c].clear();
  for (uint32_t pass = 0; pass * at_once * a.slices < a.spans; ++pass) {
    uint32_t kept = 0; /* tokens of the team's stretch */
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t low = __ballot_sync(FULL, bits[i][0] != 0),
                     high = __ballot_sync(FULL, bits[i][1] != 0);
      const uint32_t before = (1u << lane) - 1, n_low = static_cast<uint32_t>(__popc(low)),
                     both = n_low + static_cast<uint32_t>(__popc(high));
      int *list = lists[warp][i];
      if (bits[i][0]) list[__popc(low & before)] = static_cast<int>(lane) * step;
      if (bits[i][1])
        list[n_low + static_cast<uint32_t>(__popc(high & before))] =
            static_cast<int>(lane + 32) * step;
      /* one of them again and again, which does no harm to extremes */
      if (lane < ROWS) list[both + lane] = (low ? __ffs(low) - 1 : __ffs(high) + 31) * step;
      if (i == team) kept = both;
    }
    const uint32_t t0 = stretch_of(a, slice, pass, team);
    const char *rows = base + static_cast<ptrdiff_t>(t0) * step;
    const int *list = lists[warp][team];
    load_bits(a, head, slice, pass + 1, bits);
    __syncwarp();
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (uint32_t i = 0; i < kept && channels > 0; i += ROWS) {
      raw_pair<DTYPE> x[ROWS][4];
      int at[ROWS];
#pragma unroll
      for (int j = 0; j < ROWS; j += 4)
        *reinterpret_cast<int4 *>(at + j) = *reinterpret_cast<const int4 *>(list + i + j);
#pragma unroll
      for (uint32_t j = 0; j < ROWS; ++j) {
        const char *row = rows + at[j];
        load_pairs<WHOLE>(x[j], row, stride, channels);
      }
#pragma unroll
      for (uint32_t j = 0; j < ROWS; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) ends[c].take(x[j][c]);
#pragma unroll
      for (uint32_t j = 0; j < ROWS; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float2 y = x[j][c].values();
          sum[2 * c] = __fadd_rn(sum[2 * c], i + j < kept ? y.x : 0);
          sum[2 * c + 1] = __fadd_rn(sum[2 * c + 1], i + j < kept ? y.y : 0);
        }
    }
    {
      float *of_stretch = &memory[0][0][0]; /* [teams of the block][channels] */
      const uint32_t row = 256 / teams;
      __syncthreads();
#pragma unroll
      for (uint32_t c = 0; c < 8; ++c)
        of_stretch[(warp * teams + team) * row + 8 * part + c] = sum[c];
      __syncthreads();
      for (uint32_t i = tid; i < at_once * row; i += LIST_THREADS) {
        const uint32_t which = (pass * at_once + i / row) * a.slices + slice, c = i % row;
        float s = 0;
#pragma unroll
        for (uint32_t k = 0; k < STRETCHES; ++k)
          s = __fadd_rn(s, of_stretch[(i / row * STRETCHES + k) * row + c]);
        if (which < a.spans && c < kd)
          a.sums[(static_cast<size_t>(head) * a.spans + which) * kd + c] = s;
      }
    }
  }
  store_slice(a, head, slice, ends, memory);
}

/* DTYPE is K's; WHOLE: 8 channels are one load. Blocks with slices of K come first, as they take
   longer. */
template <int DTYPE, bool WHOLE>
__global__ void __launch_bounds__(LIST_THREADS, 2)
    list_kernel(const __grid_constant__ pack_args a) {
  __shared__ __align__(16) float memory[2][LIST_WARPS][MAX_DIM];
  __shared__ __align__(16) int lists[LIST_WARPS][2][STRETCH + 8];
  const int head = static_cast<int>(blockIdx.y);
  const uint32_t slices = gridDim.x - a.list.parts - 1, tid = threadIdx.x; /* all or none */
  if (blockIdx.x >= slices) {
    if (blockIdx.x - slices < a.list.parts)
      list_part(a, head, blockIdx.x - slices);
    else
      list_channels(a, head);
    return;
  }
  const uint32_t each = ((a.list.n + slices - 1) / slices + 15) / 16 * 16; /* tokens of a slice */
  const uint32_t begin = least(blockIdx.x * each, a.list.n), end = least(begin + each, a.list.n);
  uint32_t x[4];
  load_widths(a.list.v_bits + static_cast<size_t>(head) * a.list.n, begin + 16 * tid, end, x);
  const uint8_t *k_bits = a.k_bits + static_cast<size_t>(head) * static_cast<size_t>(a.k_dim);
  const bool sums =
      __syncthreads_or(a.joint && tid < static_cast<uint32_t>(a.k_dim) && k_bits[tid] == 0);
  if (sums)
    find_sums<DTYPE, WHOLE>(a, head, blockIdx.x, memory, lists);
  else if (!a.again)
    find_ends<DTYPE, WHOLE>(a, head, blockIdx.x, begin, end, x, memory);
}

/* What a block that writes tiles or the table has to know of its head. */
struct block_plan {
  uint32_t count[4]; /* tokens of each run */
  uint32_t run[4];   /* where it starts in the list */
  uint32_t channels[4];
  uint32_t first_tile[5]; /* tiles before each run; [4] all */
  uint32_t run_bytes[4];  /* of a tile of each run */
  uint64_t run_at[4];     /* where the run's first tile stands */
  uint32_t k_blocks[4];   /* blocks of 16 channels up to each level */
  uint32_t k_tile, kept;
  uint64_t table, position, tile; /* offsets */
  uint64_t total, head_bytes;     /* of the block to be */
  uint32_t blocks;                /* that have something to write, of all heads */
  bool go;                        /* there is something to write */
};

enum { TILE_WARPS = 4 }; /* of a block, which has a tile at a time */

/* Tokens of each run of a head. */
struct run_counts {
  uint32_t of[4];
  __device__ __forceinline__ uint32_t tiles() const {
    uint32_t n = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) n += (of[r] + TILE - 1) / TILE;
    return n;
  }
};

/* A tile and its tokens in the list of its head. */
struct tile_cursor {
  uint32_t run, in_run; /* tiles of the run before this one */
  uint32_t first, n;    /* 0: behind the last tile */
  /* Goes on by so many tiles. runs: [5] tokens of each, 0 the last. */
  __device__ __forceinline__ void advance(uint32_t tiles, const uint32_t *runs) {
    uint32_t count = runs[run], in_all;
    in_run += tiles;
    while (run < 4 && in_run >= (in_all = (count + TILE - 1) / TILE))
      in_run -= in_all, first += count, count = runs[++run];
    n = run < 4 ? least(count - in_run * TILE, TILE) : 0;
  }
  /* Where token i of the list stands, or another one of the tile. */
  __device__ __forceinline__ uint32_t at(uint32_t i) const {
    return first + in_run * TILE + least(i, n - 1);
  }
};

/* The same from what the first launch has found: of the first 32 heads, each lane one's, asked for
   before other things are waited for. */
struct plan_source {
  uint32_t error;
  head_counts first;
  __device__ __forceinline__ plan_source(const pack_args &a) {
    const uint32_t lane = threadIdx.x & 31;
    error = *a.list.status;
    if (lane < a.n_heads) first = a.all_heads[lane];
  }
  /* Of a head. All of a warp call it. */
  __device__ __forceinline__ run_counts runs_of(const pack_args &a, int head) const {
    const head_counts *own = a.heads + head;
    const uint32_t me = static_cast<uint32_t>(own - a.all_heads);
    run_counts runs;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t count = __shfl_sync(FULL, first.count[r + 1], static_cast<int>(me & 31));
      runs.of[r] = me < 32 ? count : own->count[r + 1];
    }
    return runs;
  }
  /* The first warp makes the plan; then a barrier. */
  __device__ __forceinline__ void make(const pack_args &a, int head, block_plan *h) const {
    if (threadIdx.x >= 32) return;
    const head_counts *own = a.heads + head;
    const uint32_t me = static_cast<uint32_t>(own - a.all_heads), lane = threadIdx.x;
    u64 table = 0, position = 0, tile = 0, tables = 0, positions = 0, tiles = 0;
    uint32_t blocks = 0;
    for (uint32_t i = lane; i < a.n_heads; i += 32) {
      const head_counts other = i < 32 ? first : a.all_heads[i];
      parts p;
      head_bytes(a.v_dim, a.positions, other.count, other.channels, &p);
      tables += p.table, positions += p.positions, tiles += p.tiles;
      if (i < me) table += p.table, position += p.positions, tile += p.tiles;
      blocks += 1 + least(p.n_tiles[0], a.tile_blocks);
      if (i != me) continue;
      h->k_tile = p.k_tile, h->kept = a.list.n - other.count[0];
      uint32_t run = 0, k_blocks = 0, n_tiles = 0;
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        h->channels[l] = other.channels[l];
        if (l > 0) k_blocks += (other.channels[l] + 15) / 16;
        h->k_blocks[l] = k_blocks;
        h->count[l] = other.count[l + 1], h->run[l] = run, run += other.count[l + 1];
        h->first_tile[l] = n_tiles, n_tiles += p.n_tiles[l + 1];
        h->run_bytes[l] = p.k_tile + 128 + static_cast<uint32_t>(pad16(a.v_dim) / 16) * (128u << l);
      }
      h->first_tile[4] = n_tiles;
    }
    table = warp_sum(table), tile = warp_sum(tile);
    tables = warp_sum(tables), tiles = warp_sum(tiles);
    if (a.positions) position = warp_sum(position), positions = warp_sum(positions);
    blocks = __reduce_add_sync(FULL, blocks);
    __syncwarp();
    if (lane > 0) return;
    const uint64_t fixed = fixed_bytes(a.n_heads);
    h->table = fixed + table, h->position = a.positions ? fixed + tables + position : 0;
    h->tile = fixed + tables + positions + tile;
    u64 at = h->tile;
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      h->run_at[l] = at;
      at += static_cast<u64>(h->first_tile[l + 1] - h->first_tile[l]) * h->run_bytes[l];
    }
    h->head_bytes = fixed + tables, h->total = fixed + tables + positions + tiles;
    h->blocks = blocks, h->go = error == RDKV_OK && h->total <= a.capacity;
    if (h->total > a.capacity) fail(a.list.status, RDKV_ERR_MEMORY);
  }
};

/* x / c, rounded to nearest, where r is the rounded 1 / c. */
__device__ __forceinline__ float divided(float x, float c, float r) {
  float q = __fmul_rn(x, r);
  q = __fmaf_rn(__fmaf_rn(-q, c, x), r, q);
  return __fmaf_rn(__fmaf_rn(-q, c, x), r, q);
}

/* fit() at 2, 4 or 8 bits. */
__device__ __forceinline__ affine fit_level(float lo, float hi, int level) {
  const float n = level == 1 ? 2.0f : level == 2 ? 8.0f : 128.0f;
  const float step = divided(__fsub_rn(hi, lo), 2 * n - 1,
                             level == 1   ? 1 / 3.0f
                             : level == 2 ? 1 / 15.0f
                                          : 1 / 255.0f);
  affine a;
  a.mid = nearest_half(__fadd_rn(lo, __fmul_rn(step, n)));
  const float up = divided(__fsub_rn(hi, a.mid), n - 1,
                           level == 1   ? 1.0f
                           : level == 2 ? 1 / 7.0f
                                        : 1 / 127.0f),
              down = __fmul_rn(__fsub_rn(a.mid, lo), level == 1   ? 0.5f
                                                     : level == 2 ? 0.125f
                                                                  : 0.0078125f);
  const float want = up > down ? up : (down > 0 ? down : 0);
  uint16_t h = to_half(want);
  if (half_value(h) < want) ++h;
  a.scale = half_value(h);
  a.inv = a.scale > 0 ? __frcp_rn(a.scale) : 0;
  return a;
}

/* How a channel becomes codes. */
struct channel_code {
  float mid, inv; /* or the authors' zero and scale */
  float back;     /* the authors' 1 / scale; else what lifts a code to 0.. and leaves it in the low
                     bits of the float */
};

/* What is known of a channel. */
struct channel_ends {
  uint32_t bits, slot;
  float lo, hi;
  __device__ __forceinline__ channel_ends(const pack_args &a, int head, uint32_t c) {
    const uint32_t kd = static_cast<uint32_t>(a.k_dim);
    const size_t at = static_cast<size_t>(head) * kd + c;
    const float2 *ends = a.ends + static_cast<size_t>(head) * a.slices * kd + c;
    bits = a.k_bits[at], slot = a.slots[at];
    lo = 3.402823466e38f, hi = -3.402823466e38f;
#pragma unroll 16
    for (uint32_t s = 0; s < a.slices; ++s, ends += kd) {
      const float2 x = *ends;
      lo = fminf(lo, x.x), hi = fmaxf(hi, x.y);
    }
  }
  /* 16 is stored as 8. */
  __device__ __forceinline__ int level() const {
    return 31 - __clz(static_cast<int>(least(bits, 8) | 1));
  }
  /* Its code; scale_mid: as the table has them. rows: K is of 16 bits. */
  __device__ __forceinline__ channel_code code(bool joint, bool rows, uint32_t *scale_mid) const {
    channel_code code = {0, 0, 0};
    const int level = this->level();
    *scale_mid = 0;
    if (level == 0) return code;
    const int bits = width_of(level);
    affine q;
    if (joint) {
      q = rows ? fit_level(lo, hi, level) : fit(lo, hi, bits);
      code.mid = q.mid, code.inv = q.inv;
      code.back = 12582912.0f + static_cast<float>(1 << (bits - 1));
    } else {
      const zero_point z = fit_paper(lo, hi, bits);
      q = affine_paper(z, bits);
      code.mid = z.zero, code.inv = z.scale, code.back = __fdiv_rn(1, z.scale);
    }
    *scale_mid = to_half(q.scale) | static_cast<uint32_t>(to_half(q.mid)) << 16;
    return code;
  }
};

/* Mean of a dropped channel over the kept tokens: spans by eights, as rdkv__carry has it. */
static __device__ float mean_of(const pack_args &a, int head, uint32_t kept, uint32_t c) {
  const float *spans =
      a.sums + static_cast<size_t>(head) * a.spans * static_cast<uint32_t>(a.k_dim) + c;
  float sum = 0, eight = 0;
#pragma unroll 32
  for (uint32_t s = 0; s < a.spans; ++s) {
    eight = __fadd_rn(eight, spans[s * static_cast<size_t>(a.k_dim)]);
    if (s % 8 == 7) sum = __fadd_rn(sum, eight), eight = 0;
  }
  return __fdiv_rn(__fadd_rn(sum, eight), static_cast<float>(kept));
}

__device__ __forceinline__ u64 mix(u64 x) { /* splitmix64's finaliser */
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
/* Word `at` of a block, two 32-bit words, adds mix_words(.., salt_of(at)) to the checksum. */
static const u64 SALT = 0x9e3779b97f4a7c15ull;
__device__ __forceinline__ u64 salt_of(u64 at) { return (at + 1) * SALT; }
__device__ __forceinline__ u64 mix_words(uint32_t low, uint32_t high, u64 salt) {
  return mix((static_cast<u64>(high) << 32 | low) + salt);
}

/* What a head's channels are, for its table. */
struct channel_table {
  uint32_t scale_mid[MAX_DIM];
  uint16_t slot[MAX_DIM];
  uint8_t level[MAX_DIM];
};

enum { TABLE_BYTES = 2048 + 4096 }; /* for a table, of at most 5 * PACKED, and values to add up */

/* A head's channel table and its record. memory [TABLE_BYTES]. One block of at least 64 threads. */
static __device__ __noinline__ void write_table(const pack_args &a, int head, const block_plan &h,
                                                const channel_table &channel, void *memory) {
  __shared__ rdkv_record record[1];
  __shared__ bool serial[1];
  u64 *table = static_cast<u64 *>(memory);
  const uint32_t tid = threadIdx.x, kd = static_cast<uint32_t>(a.k_dim);
  const uint32_t n = 16 * h.k_blocks[3], n_all = n + h.channels[0];
  const uint32_t words = (2 * n + 3 * n_all + 127) / 128 * 16;
  uint16_t *scales = reinterpret_cast<uint16_t *>(table), *mids = scales + n;
  uint8_t *channels = reinterpret_cast<uint8_t *>(mids + n_all);
  for (uint32_t i = tid; i < words; i += blockDim.x) table[i] = 0;
  if (tid / 32 == 1) {
    /* rdkv.h adds doubles one after the other and rounds the sum to float. Here they are added in
       another order; either sum is off by less than n * 2^-53 of itself, so where both ends of that
       range round to one float it is that float. Elsewhere, and where it is no number, they are
       added in order. */
    double v = 0;
    if (a.joint && tid - 32 < a.list.parts) /* there are at most 32 */
      v = a.list.sums[static_cast<size_t>(head) * a.list.parts + tid - 32];
    for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(FULL, v, m);
    const double slack = (static_cast<double>(a.list.n) + 8) * 4.44089209850062616e-16; /* 2^-51 */
    if (tid == 32) {
      serial[0] =
          !(v >= 0 && __double2float_rn(v * (1 - slack)) == __double2float_rn(v * (1 + slack)));
      rdkv_record r = rdkv_record();
#pragma unroll
      for (int l = 0; l < 4; ++l) r.n_tokens[l] = h.count[l];
#pragma unroll
      for (int l = 0; l < 3; ++l) r.n_channels[l] = static_cast<uint16_t>(h.channels[l + 1]);
      r.n_dropped = static_cast<uint16_t>(h.channels[0]);
      r.table = h.table, r.position = h.position, r.tile = h.tile;
      r.v_distortion = __double2float_rn(v);
      r.k_distortion = __double2float_rn(h.kept ? a.heads[head].k : 0);
      record[0] = r;
    }
  }
  __syncthreads();
  if (serial[0]) {
    const double v = add_in_order(a.list, head, static_cast<float *>(memory) + 2048 / 4);
    if (tid == 0) record[0].v_distortion = __double2float_rn(v);
  }
  for (uint32_t c = tid; c < kd; c += blockDim.x) {
    const uint32_t slot = channel.slot[c], scale_mid = channel.scale_mid[c];
    channels[slot] = static_cast<uint8_t>(c);
    if (h.kept == 0) continue;
    if (channel.level[c] > 0)
      scales[slot] = static_cast<uint16_t>(scale_mid),
      mids[slot] = static_cast<uint16_t>(scale_mid >> 16);
    else if (a.joint)
      mids[slot] = to_half(mean_of(a, head, h.kept, c));
  }
  __syncthreads();
  const u64 me = static_cast<u64>(a.heads + head - a.all_heads);
  const uint32_t record_words = static_cast<uint32_t>(sizeof(rdkv_record) / 8);
  const u64 record_at = (sizeof(rdkv_header) + me * sizeof(rdkv_record)) / 8;
  u64 *out = reinterpret_cast<u64 *>(a.block), sum = 0;
#pragma unroll 1
  for (uint32_t i = tid; i < words + record_words; i += blockDim.x) {
    const u64 x = i < words ? table[i] : reinterpret_cast<const u64 *>(record)[i - words];
    const u64 at = i < words ? h.table / 8 + i : record_at + i - words;
    out[at] = x, sum += mix(x + salt_of(at));
  }
  sum = warp_sum(sum);
  if (tid % 32 == 0) atomicAdd(&a.state->head_sum, sum);
}

/* The header, once nothing can fail any more, by one warp: a word for each thread. Its checksum
   counts the body's, and itself as 0. */
static __device__ __noinline__ void write_header(const pack_args &a, uint64_t total,
                                                 uint64_t head_bytes) {
  static_assert(sizeof(rdkv_header) == 32 * 8, "a word for each thread");
  const uint32_t lane = threadIdx.x;
  if (lane >= 32) return;
  /* all are asked for at once */
  const uint32_t status = *static_cast<volatile uint32_t *>(a.list.status);
  const u64 body = __ldcg(&a.state->body_sum), tables = __ldcg(&a.state->head_sum);
  const double lambda = a.lambda ? *a.lambda : 0;
  const u64 budget = a.budget ? *a.budget : a.header.budget_bytes;
  u64 *out = reinterpret_cast<u64 *>(a.block);
  u64 word = reinterpret_cast<const u64 *>(&a.header)[lane];
  if (lane == offsetof(rdkv_header, total_bytes) / 8) word = total;
  if (lane == offsetof(rdkv_header, head_bytes) / 8) word = head_bytes;
  if (lane == offsetof(rdkv_header, body_sum) / 8) word = body;
  if (lane == offsetof(rdkv_header, lambda) / 8)
    word = static_cast<u64>(__double_as_longlong(lambda));
  if (lane == offsetof(rdkv_header, budget_bytes) / 8) word = budget;
  if (status != RDKV_OK) return;
  u64 sum = mix(word + salt_of(lane));
  const uint32_t records = 32 + a.n_heads * static_cast<uint32_t>(sizeof(rdkv_record) / 8);
  const uint32_t fixed = static_cast<uint32_t>(fixed_bytes(a.n_heads) / 8);
  for (uint32_t i = records + lane; i < fixed; i += 32) /* up to the tables */
    out[i] = 0, sum += mix(salt_of(i));
  sum = warp_sum(sum) + tables;
  out[lane] = lane == offsetof(rdkv_header, head_sum) / 8 ? sum : word;
  if (lane == 0) *a.bytes = total;
}

/* Word `word` (of lane * words + j) of a block of 32 x 16 codes, by the format's formula; at(token
   bits, channel bits) gives the code. K: rows are tokens 16 sub + 8 r + g, columns channels 4 t + 2
   pr + e. V: rows are dims g + 8 r, columns tokens 16 sub + 2 t + 8 pr + e. */
template <bool V>
__device__ __forceinline__ uint32_t word_of(const uint8_t *codes, int stride, int level, int word) {
  const int words = 1 << (level - 1), lane = word / words, j = word % words;
  const int g = lane >> 2, t = lane & 3;
  uint32_t w = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int e = i & 1, r = i >> 1 & 1, pr = i >> 2 & 1, sub = i >> 3;
    int shift;
    if (level == 1) {
      shift = 2 * (2 * sub + pr) + 8 * r + 16 * e;
    } else if (level == 2) {
      if (sub != j) continue;
      shift = 4 * pr + 8 * r + 16 * e;
    } else {
      if (2 * sub + pr != j) continue;
      shift = 8 * (2 * r + e);
    }
    const int row = V ? 16 * sub + 2 * t + 8 * pr + e : 16 * sub + 8 * r + g; /* a token */
    const int column = V ? g + 8 * r : 4 * t + 2 * pr + e;
    w |= static_cast<uint32_t>(codes[row * stride + column]) << shift;
  }
  return w;
}

/* Tiles of one layer of any layout, the first block of a head has its table. J is at least the dims
   by 32. */
template <int J>
__global__ void __launch_bounds__(THREADS) tile_kernel(const __grid_constant__ pack_args a) {
  const int k_type = a.k.dtype, v_type = a.v.dtype;
  __shared__ __align__(16) uint8_t codes[TILE][PACKED + 4];
  __shared__ uint8_t v_codes[TILE][MAX_DIM + 4];
  __shared__ uint16_t params[64];
  __shared__ uint32_t token[TILE];
  __shared__ channel_code code_of_channel[MAX_DIM];
  __shared__ channel_table channel;
  __shared__ block_plan h[1];
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31, warp = tid >> 5, vd = a.v_dim, vp = pad16(vd);
  plan_source(a).make(a, head, h);
  if (tid < a.k_dim) {
    const channel_ends x(a, head, static_cast<uint32_t>(tid));
    code_of_channel[tid] = x.code(a.joint, false, &channel.scale_mid[tid]);
    channel.slot[tid] = static_cast<uint16_t>(x.slot),
    channel.level[tid] = static_cast<uint8_t>(x.level());
  }
  __syncthreads();
  if (!h->go) return;
  if (blockIdx.x == 0) {
    write_table(a, head, h[0], channel, codes);
    return;
  }
  const rdkv_tensor &k = a.k, &v = a.v;
  const ptrdiff_t ks = k.dim_stride ? k.dim_stride : 1, vs = v.dim_stride ? v.dim_stride : 1;
  enum { EACH = TILE / (THREADS / 32) };
  /* a lane's channels: slot in the table (-1: dropped) and quantiser; pads stay 0 */
  int slot[J], k_level[J];
  float mid[J], inv[J];
  bool bad = false;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    slot[j] = -1, k_level[j] = 1, mid[j] = inv[j] = 0;
    if (lane + 32 * j < a.k_dim) {
      const channel_code c = code_of_channel[lane + 32 * j];
      if (channel.level[lane + 32 * j] > 0) {
        slot[j] = channel.slot[lane + 32 * j], mid[j] = c.mid, inv[j] = c.inv;
        k_level[j] = channel.level[lane + 32 * j];
      }
    }
  }
  for (int i = tid; i < TILE * (PACKED + 4); i += THREADS) (&codes[0][0])[i] = 0;
  for (uint32_t tile = blockIdx.x - 1; tile < h->first_tile[4]; tile += gridDim.x - 1) {
    int run = 0;
    while (tile >= h->first_tile[run + 1]) ++run;
    const uint32_t in_run = tile - h->first_tile[run];
    const int level = run + 1,
              in_tile = static_cast<int>(least(h->count[run] - in_run * TILE, TILE));
    uint8_t *out = a.block + h->run_at[run] + static_cast<uint64_t>(in_run) * h->run_bytes[run];
    __syncthreads();
    if (tid < TILE) {
      const uint32_t t = tid < in_tile
                             ? a.list.order[static_cast<size_t>(head) * a.list.n + h->run[run] +
                                            in_run * TILE + static_cast<uint32_t>(tid)]
                             : 0xffffffffu;
      token[tid] = t;
      if (a.positions)
        reinterpret_cast<uint32_t *>(a.block +
                                     h->position)[tile * TILE + static_cast<uint32_t>(tid)] = t;
    }
    if (tid < 64) params[tid] = 0;
    __syncthreads();
    /* a warp takes every eighth token; all its rows are asked for before the first is waited for */
    uint32_t k_raw[EACH][J], v_raw[EACH][J];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int t = warp + THREADS / 32 * i;
      const uint32_t at = token[t < in_tile ? t : 0];
      const void *k_row = row_of(k, at, head), *v_row = row_of(v, at, head);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const int d = lane + 32 * j;
        k_raw[i][j] = v_raw[i][j] = 0;
        if (slot[j] >= 0) k_raw[i][j] = raw_element(k_row, k_type, d * ks);
        if (d < vd) v_raw[i][j] = raw_element(v_row, v_type, d * vs);
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int t = warp + THREADS / 32 * i;
      /* K: codes in table order */
#pragma unroll
      for (int j = 0; j < J; ++j) {
        if (slot[j] < 0) continue;
        const float x = value_of(k_raw[i][j], k_type);
        uint32_t code = 0;
        if (t < in_tile) {
          if (a.joint) {
            const float lo = -static_cast<float>(1 << ((1 << k_level[j]) - 1));
            code = static_cast<uint32_t>(__fsub_rn(code_of(x, mid[j], inv[j], lo, -lo - 1), lo));
          } else {
            const zero_point z = {inv[j], mid[j]};
            code = code_paper(x, z, 1 << k_level[j]);
          }
        }
        codes[t][slot[j]] = static_cast<uint8_t>(code);
      }
      /* V */
      float lo = 3.402823466e38f, hi = -3.402823466e38f;
#pragma unroll
      for (int j = 0; j < J; ++j) bad |= !in_range(value_of(v_raw[i][j], v_type));
      if (level == 4) { /* halves as they are */
        uint16_t *half = reinterpret_cast<uint16_t *>(out + h->k_tile + 128);
        const int sub = t >> 4, pr = t >> 3 & 1, tt = t >> 1 & 3, e = t & 1;
#pragma unroll
        for (int j = 0; j < J; ++j) {
          const int d = lane + 32 * j;
          if (d >= vp) continue;
          const int to = sub * (vp / 16) + d / 16, r = d >> 3 & 1, l = 4 * (d & 7) + tt;
          half[2 * ((to * 32 + l) * 4 + r + 2 * pr) + e] =
              t < in_tile && d < vd ? to_half(value_of(v_raw[i][j], v_type)) : 0;
        }
        if (lane == 0 && t < in_tile) params[2 * (4 * (t & 7) + (t >> 3))] = 0x3c00;
        continue;
      }
      if (t >= in_tile) {
        for (int d = lane; d < vp; d += 32) v_codes[t][d] = 0;
        continue;
      }
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const float x = value_of(v_raw[i][j], v_type);
        if (lane + 32 * j < vd) lo = fminf(lo, x), hi = fmaxf(hi, x);
      }
      for (int m = 16; m; m >>= 1) {
        lo = fminf(lo, __shfl_xor_sync(FULL, lo, m));
        hi = fmaxf(hi, __shfl_xor_sync(FULL, hi, m));
      }
      const int bits = 1 << level;
      const float low = -static_cast<float>(1 << (bits - 1));
      affine q;
      zero_point z = {0, 0};
      if (a.joint) {
        q = fit(lo, hi, bits);
      } else {
        z = fit_paper(lo, hi, bits);
        q = affine_paper(z, bits);
      }
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const int d = lane + 32 * j;
        if (d >= vp) continue;
        const float x = value_of(v_raw[i][j], v_type);
        uint32_t code = 0;
        if (d < vd)
          code =
              a.joint
                  ? static_cast<uint32_t>(__fsub_rn(code_of(x, q.mid, q.inv, low, -low - 1), low))
                  : code_paper(x, z, bits);
        v_codes[t][d] = static_cast<uint8_t>(code);
      }
      if (lane == 0) {
        const int to = 2 * (4 * (t & 7) + (t >> 3));
        params[to] = to_half(q.scale), params[to + 1] = to_half(q.mid);
      }
    }
    __syncthreads();
    uint32_t *words = reinterpret_cast<uint32_t *>(out);
    for (int l = 1, at = 0; l < 4; ++l) {
      const int first = static_cast<int>(h->k_blocks[l - 1]);
      const int all = (static_cast<int>(h->k_blocks[l]) - first) << (l + 4);
      for (int w = tid; w < all; w += THREADS)
        words[at + w] = word_of<false>(&codes[0][16 * (first + (w >> (l + 4)))], PACKED + 4, l,
                                       w & ((16 << l) - 1));
      at += all;
    }
    words += h->k_tile / 4;
    if (tid < 32) words[tid] = params[2 * tid] | static_cast<uint32_t>(params[2 * tid + 1]) << 16;
    words += 32;
    if (level < 4)
      for (int w = tid; w < vp / 16 << (level + 4); w += THREADS)
        words[w] = word_of<true>(&v_codes[0][16 * (w >> (level + 4))], MAX_DIM + 4, level,
                                 w & ((16 << level) - 1));
  }
  if (bad) fail(a.list.status, RDKV_ERR_NONFINITE);
}

/* ---- tiles of 16-bit K and V in aligned rows: a block copies a tile's to shared memory, from
   where each thread takes what makes a word; the rows of the next tile are on their way meanwhile.
   Short loops, for most blocks run their code a few times, and then it has to come from the L2. */

/* Lowest byte of each. */
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ uint32_t word_of_pair(__half2 x) {
  return __half_as_ushort(__low2half(x)) | static_cast<uint32_t>(__half_as_ushort(__high2half(x)))
                                               << 16;
}
__device__ __forceinline__ uint32_t word_of_pair(__nv_bfloat162 x) {
  return __bfloat16_as_ushort(__low2bfloat16(x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__high2bfloat16(x))) << 16;
}
__device__ __forceinline__ __nv_bfloat162 bf16_pair(uint32_t x) {
  return __halves2bfloat162(__ushort_as_bfloat16(static_cast<uint16_t>(x)),
                            __ushort_as_bfloat16(static_cast<uint16_t>(x >> 16)));
}

template <bool BF16>
__device__ __forceinline__ float2 pair_of(uint32_t x) {
  return BF16 ? make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u))
              : __half22float2(rdkv_cuda__halves(x));
}

/* A code in the low byte of a float's bits; mid, inv and back as in channel_code, top the authors'
   largest code. Ranges are those of the tokens themselves, so nothing saturates with RDKV_JOINT. */
template <bool JOINT>
__device__ __forceinline__ uint32_t code_bits(float x, float mid, float inv, float back, float top,
                                              float bottom = 0) {
  if (JOINT) return __float_as_uint(__fadd_rn(__fmul_rn(__fsub_rn(x, mid), inv), back));
  /* x / inv by one correction of a product with the rounded reciprocal: x / inv within 2^-46, then
     rounded. Where that is not x / inv rounded, the code is the same: of all x of 11 bits and all
     inv, 1832 quotients come so near to where one of the 65,532 codes of a zero begins, and all of
     them get the same code. */
  float q = __fmul_rn(x, back);
  q = __fmaf_rn(__fmaf_rn(-q, inv, x), back, q);
  q = __fadd_rn(q, mid);
  return __float_as_uint(__fadd_rn(fminf(fmaxf(q, bottom), top), 12582912.0f));
}

/* Bytes from row to row in shared memory: eight rows' 16-byte pieces lie in different banks. */
__host__ __device__ inline uint32_t row_pitch(int dim) {
  return 2 * static_cast<uint32_t>(dim) + 16;
}
/* Most slots of a channel table, whose codes come before the rows. */
__host__ __device__ inline uint32_t slots_of(int k_dim) {
  return static_cast<uint32_t>(k_dim) + 32;
}
__host__ __device__ inline uint32_t stage_bytes(int k_dim, int v_dim) {
  return TILE * (row_pitch(k_dim) + row_pitch(v_dim));
}
static size_t rows_shared(int k_dim, int v_dim) {
  return slots_of(k_dim) * sizeof(uint4) + most(2 * stage_bytes(k_dim, v_dim), TABLE_BYTES);
}

struct tile_place {
  uint8_t *out;
  u64 salt;         /* of its first word of 8 bytes */
  uint32_t in_tile; /* tokens that there are; behind them codes are 0 */
  uint32_t turn;    /* which of the block's shares this warp has */
};

/* Rows of K or V on their way to shared memory, 16 bytes a thread at a time. */
struct row_copy {
  const char *from;
  int step;
  uint32_t to, jump, row, rows; /* rows at once, and bytes to the next ones */
  bool mine;                    /* a lane beyond the pieces of its row has none */
  __device__ __forceinline__ row_copy(const rdkv_tensor &x, int dim, int head, uint32_t at) {
    const uint32_t lane = threadIdx.x & 31, pieces = static_cast<uint32_t>(dim) / 8;
    const uint32_t lanes = pieces <= 16 ? 16 : 32; /* that share a row */
    const uint32_t e = least(lane % lanes, pieces - 1);
    from = static_cast<const char *>(row_of(x, 0, head)) + 16 * e, step = step_of(x);
    mine = lane % lanes < pieces;
    row = threadIdx.x / lanes, rows = 32 * TILE_WARPS / lanes;
    to = at + 16 * e + row * row_pitch(dim), jump = rows * row_pitch(dim);
  }
  /* Asks for a tile, whose tokens the lanes of each warp have. */
  __device__ __forceinline__ void ask(uint32_t token, uint32_t offset) const {
    uint32_t at = to + offset;
#pragma unroll 1
    for (uint32_t i = row; i < TILE; i += 4 * rows)
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j, at += jump) {
        const uint32_t t = __shfl_sync(FULL, token, static_cast<int>(i + j * rows));
        if (mine) copy_16(at, from + static_cast<ptrdiff_t>(t) * step);
      }
  }
};

/* Words of 16 codes [8 sub + 4 pr + 2 r + e], each in the low byte, of `1 << LEVEL` bits. */
template <int LEVEL>
__device__ __forceinline__ void words_of(const uint32_t (&z)[16], uint32_t (&w)[1 << (LEVEL - 1)]) {
#pragma unroll
  for (int j = 0; j < 1 << (LEVEL - 1); ++j) {
    uint32_t byte[4]; /* 2 r + e */
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (LEVEL == 1)
        byte[i] = z[i] + (z[4 + i] << 2) + (z[8 + i] << 4) + (z[12 + i] << 6);
      else if (LEVEL == 2)
        byte[i] = z[8 * j % 16 + i] + (z[8 * j % 16 + 4 + i] << 4);
      else
        byte[i] = z[4 * j % 16 + i];
    }
    w[j] = LEVEL == 3 ? low_bytes(byte[0], byte[1], byte[2], byte[3])
                      : low_bytes(byte[0], byte[2], byte[1], byte[3]); /* r + 2 e */
  }
}

/* Of such words of K, the bits of tokens that exist: bit 2 sub + r of `exists`. */
template <int LEVEL>
__device__ __forceinline__ uint32_t mask_of(uint32_t exists, int j) {
  if (LEVEL == 1)
    return (exists & 1) * 0x000f000fu + (exists >> 1 & 1) * 0x0f000f00u +
           (exists >> 2 & 1) * 0x00f000f0u + (exists >> 3) * 0xf000f000u;
  const uint32_t pair = exists >> (LEVEL == 2 ? 2 * j : j / 2 * 2), low = pair & 1,
                 high = pair >> 1 & 1;
  return LEVEL == 2 ? low * 0x00ff00ffu + high * 0xff00ff00u : low * 0xffffu + high * 0xffff0000u;
}

/* Stores words j of a thread as LEVEL has them: 2 or 4 side by side. Returns their part of the
   checksum; salt is that of the first. */
template <int LEVEL>
__device__ __forceinline__ u64 put_words(const uint32_t (&w)[1 << (LEVEL - 1)], uint8_t *to,
                                         u64 salt) {
  enum { WORDS = 1 << (LEVEL - 1) };
  if (LEVEL == 2) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(w[0], w[1 % WORDS]);
    return mix_words(w[0], w[1 % WORDS], salt);
  }
  *reinterpret_cast<uint4 *>(to) = make_uint4(w[0], w[1 % WORDS], w[2 % WORDS], w[3 % WORDS]);
  return mix_words(w[0], w[1 % WORDS], salt) + mix_words(w[2 % WORDS], w[3 % WORDS], salt + SALT);
}

/* Two neighbouring threads have two words a and b each, which are halves of two words of the
   checksum: the even one stores that of a at `even`, the odd one that of b at `odd`. */
__device__ __forceinline__ u64 put_halves(uint32_t a, uint32_t b, bool there, uint8_t *to,
                                          u64 salt) {
  const bool odd = threadIdx.x & 1;
  const uint32_t theirs = __shfl_xor_sync(FULL, odd ? a : b, 1);
  const uint32_t low = odd ? theirs : a, high = odd ? b : theirs;
  if (!there) return 0;
  *reinterpret_cast<uint2 *>(to) = make_uint2(low, high);
  return mix_words(low, high, salt);
}

/* The authors' codes of 2 bits go by where each of them begins, pairs of values at a time. */
template <bool BF16>
__device__ __forceinline__ float value_16(uint32_t bits) {
  return BF16 ? __uint_as_float(bits << 16) : half_value(static_cast<uint16_t>(bits));
}
template <bool BF16>
__device__ __forceinline__ uint32_t nearest_16(float x) {
  return BF16 ? static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(x))) : to_half(x);
}

/* The least values from lo to hi with codes 1, 2 and 3, twice in a word each; infinity where there
   is none. back: 1 / scale. A code begins within a few 2^-23 of where it should, so at the nearest
   value or a neighbour: which one, the codes tell. */
template <bool BF16>
__device__ __forceinline__ void codes_begin(zero_point z, float back, float lo, float hi,
                                            uint32_t (&begin)[3]) {
  const auto code = [&](float x) { /* lifted, not clamped */
                                   return __uint_as_float(code_bits<false>(x, z.zero, z.scale, back,
                                                                           3.402823466e38f,
                                                                           -3.402823466e38f));
  };
  const float of_lo = code(lo), of_hi = code(hi);
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    const float want = 12582912.0f + static_cast<float>(k);
    const uint32_t bits =
        nearest_16<BF16>(__fmul_rn(__fsub_rn(static_cast<float>(k) - 0.5f, z.zero), z.scale));
    const uint32_t up = bits & 0x8000 ? bits == 0x8000 ? 0 : bits - 1 : bits + 1,
                   down = bits & 0x8000 ? bits + 1
                          : bits == 0   ? 0x8000
                                        : bits - 1;
    uint32_t t = code(value_16<BF16>(down)) >= want   ? down
                 : code(value_16<BF16>(bits)) >= want ? bits
                                                      : up;
    if (of_lo >= want) t = BF16 ? 0xff80 : 0xfc00;
    if (of_hi < want) t = BF16 ? 0x7f80 : 0x7c00;
    begin[k - 1] = t * 0x10001u;
  }
}

/* sum + weight * the codes of two values, which are sums of small whole numbers. */
template <bool BF16>
__device__ __forceinline__ uint32_t add_codes(uint32_t sum, uint32_t x, const uint32_t (&begin)[3],
                                              float weight) {
  if (BF16) {
    const __nv_bfloat162 y = bf16_pair(x);
    __nv_bfloat162 c = __hge2(y, bf16_pair(begin[0]));
    c = __hadd2(c, __hge2(y, bf16_pair(begin[1])));
    c = __hadd2(c, __hge2(y, bf16_pair(begin[2])));
    c = __hfma2(c, __float2bfloat162_rn(weight), bf16_pair(sum));
    return word_of_pair(c);
  }
  const __half2 y = rdkv_cuda__halves(x);
  __half2 c = __hge2(y, rdkv_cuda__halves(begin[0]));
  c = __hadd2(c, __hge2(y, rdkv_cuda__halves(begin[1])));
  c = __hadd2(c, __hge2(y, rdkv_cuda__halves(begin[2])));
  c = __hfma2(c, __float2half2_rn(weight), rdkv_cuda__halves(sum));
  return word_of_pair(c);
}
/* Such a sum, up to 255, as bytes 0 and 2 of a word. */
template <bool BF16>
__device__ __forceinline__ uint32_t sum_bytes(uint32_t sum) {
  if (!BF16) return word_of_pair(__hadd2(rdkv_cuda__halves(sum), __float2half2_rn(1024)));
  const uint32_t low = __float_as_uint(__fadd_rn(__uint_as_float(sum << 16), 12582912.0f)),
                 high = __float_as_uint(__fadd_rn(__uint_as_float(sum & 0xffff0000u), 12582912.0f));
  return __byte_perm(low, high, 0x0400);
}

/* A block of 16 channels of K of a tile, or two of 2 bits if `both`. codes: of their slots, with
   the byte where a channel's value stands in a row. Thread 4 g + t has tokens g + 8 r + 16 sub and
   slots 4 t + 2 pr + e. salt: of the first word of `out`. */
template <int LEVEL, bool JOINT, bool BF16>
__device__ __forceinline__ u64 pack_k(const uint4 *codes, bool both, const char *rows,
                                      uint32_t pitch, uint32_t exists, uint8_t *out, u64 salt) {
  enum { WORDS = 1 << (LEVEL - 1), BLOCKS = LEVEL == 1 ? 2 : 1 };
  const uint32_t lane = threadIdx.x & 31, t = lane & 3;
  const float top = static_cast<float>((1 << (1 << LEVEL)) - 1);
  const uint32_t to = LEVEL == 1 ? lane % 2 * 128 + lane / 2 * 8 : lane * (4 * WORDS);
  uint32_t w[BLOCKS][WORDS];
#pragma unroll
  for (uint32_t i = 0; i < BLOCKS; ++i) {
    uint32_t z[16], sum[2] = {0, 0}; /* e */
    const uint4 *q = codes + (i > 0 && both ? 16 : 0) + 4 * t;
#pragma unroll
    for (int c = 0; c < 4; ++c) { /* 2 pr + e */
      const uint4 code = q[c];
      const char *x = rows + code.w;
      if (LEVEL == 1 && !JOINT) {
        const uint32_t begin[3] = {code.x, code.y, code.z};
#pragma unroll
        for (int sub = 0; sub < 2; ++sub) {
          const uint32_t low = *reinterpret_cast<const uint16_t *>(x + 16 * sub * pitch),
                         high = *reinterpret_cast<const uint16_t *>(x + (16 * sub + 8) * pitch);
          sum[c % 2] = add_codes<BF16>(sum[c % 2], low | high << 16, begin,
                                       static_cast<float>(1 << (4 * sub + 2 * (c / 2))));
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) /* 2 sub + r */
          z[8 * (j / 2) + 4 * (c / 2) + 2 * (j % 2) + c % 2] = code_bits<JOINT>(
              value_16<BF16>(*reinterpret_cast<const uint16_t *>(x + 8 * j * pitch)),
              __uint_as_float(code.x), __uint_as_float(code.y), __uint_as_float(code.z), top);
      }
    }
    if (LEVEL == 1 && !JOINT)
      w[i][0] = __byte_perm(sum_bytes<BF16>(sum[0]), sum_bytes<BF16>(sum[1]), 0x6420);
    else
      words_of<LEVEL>(z, w[i]);
#pragma unroll
    for (int j = 0; j < WORDS; ++j) w[i][j] &= mask_of<LEVEL>(exists, j);
  }
  salt += to / 8 * SALT;
  if (LEVEL == 1)
    return put_halves(w[0][0], w[BLOCKS - 1][0], lane % 2 == 0 || both, out + to, salt);
  return put_words<LEVEL>(w[0], out + to, salt);
}

/* Smallest and largest of pairs of halves; a NaN stays. */
template <bool BF16>
__device__ __forceinline__ uint32_t pair_min(uint32_t a, uint32_t b) {
  if (BF16)
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  else
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
template <bool BF16>
__device__ __forceinline__ uint32_t pair_max(uint32_t a, uint32_t b) {
  if (BF16)
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  else
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

/* A warp's share of V of a tile at `1 << LEVEL` bits, every so manieth pair of blocks of 16 dims.
   Thread 16 half + 4 p + t has dims 2 p + o + 8 r of one of the pair, tokens 16 sub + 2 t + 8 pr +
   e. codes: of the tokens, mid, inv and back. */
template <int LEVEL, bool JOINT, bool BF16>
__device__ __forceinline__ u64 pack_v(const float4 *codes, const char *rows, uint32_t pitch,
                                      uint32_t blocks, uint32_t turn, uint8_t *out, u64 salt) {
  enum { WORDS = 1 << (LEVEL - 1) };
  if (2 * turn >= blocks) return 0;
  const uint32_t lane = threadIdx.x & 31, t = lane & 3, p = lane >> 2 & 3, half = lane >> 4;
  const float top = static_cast<float>((1 << (1 << LEVEL)) - 1);
  float mids[8], invs[8], backs[8]; /* of tokens [4 sub + 2 pr + e]; or where their codes begin */
#pragma unroll
  for (uint32_t k = 0; k < 8; ++k) {
    const uint32_t i = 16 * (k / 4) + 2 * t + 8 * (k / 2 % 2) + k % 2;
    const float4 code = codes[i];
    mids[k] = code.x, invs[k] = code.y;
    backs[k] = JOINT ? 12582912.0f + static_cast<float>(1 << ((1 << LEVEL) - 1)) : code.z;
  }
  uint32_t b = 2 * turn + half;
  rows += 2 * t * pitch + 32 * b + 4 * p;
  u64 sum = 0; /* words 8 p + t and 8 p + 4 + t */
  const uint32_t to = b * (128 * WORDS) + (LEVEL == 1 ? (8 * p + 4 * (t % 2) + t / 2 * 2) * 4
                                                      : (8 * p + t) * (4 * WORDS));
  salt += to / 8 * SALT, out += to;
#pragma unroll 1
  for (; b - half < blocks; b += 2 * TILE_WARPS) {
    uint32_t w[2][WORDS];
    uint32_t z[2][16], sums[4] = {0, 0, 0, 0}; /* [o][..]; [2 r + e] */
    const bool there = b < blocks;
    if (!there) rows -= 32; /* some values or other */
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t pair = *reinterpret_cast<const uint32_t *>(
            rows + (16 * (k / 4) + 8 * (k / 2 % 2) + k % 2) * pitch + 16 * r);
        if (LEVEL == 1 && !JOINT) {
          const uint32_t begin[3] = {__float_as_uint(mids[k]), __float_as_uint(invs[k]),
                                     __float_as_uint(backs[k])};
          sums[2 * r + k % 2] = add_codes<BF16>(sums[2 * r + k % 2], pair, begin,
                                                static_cast<float>(1 << (k / 2 * 2)));
        } else {
          const float2 x = pair_of<BF16>(pair);
          const int to = 8 * (k / 4) + 4 * (k / 2 % 2) + 2 * r + k % 2;
          z[0][to] = code_bits<JOINT>(x.x, mids[k], invs[k], backs[k], top);
          z[1][to] = code_bits<JOINT>(x.y, mids[k], invs[k], backs[k], top);
        }
      }
    if (LEVEL == 1 && !JOINT) {
      uint32_t bytes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bytes[i] = sum_bytes<BF16>(sums[i]);
      w[0][0] = low_bytes(bytes[0], bytes[2], bytes[1], bytes[3]);
      w[1][0] = low_bytes(bytes[0] >> 16, bytes[2] >> 16, bytes[1] >> 16, bytes[3] >> 16);
    }
    if (LEVEL > 1 || JOINT) words_of<LEVEL>(z[0], w[0]), words_of<LEVEL>(z[1], w[1]);
    if (LEVEL == 1) {
      sum += put_halves(w[0][0], w[1][0], there, out, salt);
    } else if (there) {
      sum += put_words<LEVEL>(w[0], out, salt);
      sum += put_words<LEVEL>(w[1], out + 16 * WORDS, salt + 2 * WORDS * SALT);
    }
    rows += 64 * TILE_WARPS, out += 2 * TILE_WARPS * 128 * WORDS;
    salt += 2 * TILE_WARPS * 16 * WORDS * SALT;
  }
  return sum;
}

/* V of a tile as halves: thread 4 g + t of a block has dims g + 8 r, tokens 16 sub + 2 t + 8 pr +
   e. */
template <bool BF16>
__device__ __forceinline__ u64 copy_v(const char *rows, uint32_t pitch, uint32_t blocks,
                                      const tile_place &tile, uint8_t *out, u64 salt) {
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  u64 sum = 0;
#pragma unroll 1
  for (uint32_t b = tile.turn; b < 2 * blocks; b += TILE_WARPS) {
    const uint32_t first = (b < blocks ? 0 : 16) + 2 * t;
    const char *from = rows + first * pitch + b % blocks * 32 + 2 * g;
    uint32_t w[4]; /* 2 pr + r */
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      w[i] = 0;
#pragma unroll
      for (uint32_t e = 0; e < 2; ++e) {
        const uint32_t token = 8 * (i / 2) + e;
        uint16_t x = *reinterpret_cast<const uint16_t *>(from + token * pitch + 16 * (i % 2));
        if (BF16) x = to_half(__uint_as_float(static_cast<uint32_t>(x) << 16));
        if (first + token < tile.in_tile) w[i] |= static_cast<uint32_t>(x) << (16 * e);
      }
    }
    sum += put_words<3>(w, out + (32 * b + lane) * 16, salt + (64 * b + 2 * lane) * SALT);
  }
  return sum;
}

/* Parameters of V of a tile, by a warp: a thread has a token. codes: what pack_v wants; a token
   that is not there gets codes 0. */
template <bool JOINT, bool BF16>
__device__ __forceinline__ u64 fit_values(int level, const tile_place &tile, const char *rows,
                                          uint32_t pitch, uint32_t pieces, uint8_t *out, u64 salt,
                                          float4 *codes, bool *bad) {
  const uint32_t lane = threadIdx.x & 31;
  const char *own = rows + lane * pitch;
  uint32_t low = BF16 ? 0x7f7f7f7fu : 0x7bff7bffu, high = low | 0x80008000u;
#pragma unroll 4
  for (uint32_t i = 0; i < pieces; ++i) {
    const uint4 x = *reinterpret_cast<const uint4 *>(own + 16 * i);
    low = pair_min<BF16>(low, pair_min<BF16>(pair_min<BF16>(x.x, x.y), pair_min<BF16>(x.z, x.w)));
    high = pair_max<BF16>(high, pair_max<BF16>(pair_max<BF16>(x.x, x.y), pair_max<BF16>(x.z, x.w)));
  }
  low = pair_min<BF16>(low, __byte_perm(low, low, 0x1032));
  high = pair_max<BF16>(high, __byte_perm(high, high, 0x1032));
  const float lo = pair_of<BF16>(low).x, hi = pair_of<BF16>(high).x;
  const bool there = lane < tile.in_tile;
  *bad |= there && (!in_range(lo) || !in_range(hi));
  uint32_t param = 0x3c00; /* a half is its own value */
  if (level < 4) {
    affine q;
    float4 code = make_float4(0, 0, 0, 0);
    if (JOINT) {
      q = fit_level(lo, hi, level);
      code.x = q.mid, code.y = q.inv;
    } else {
      const zero_point z = fit_paper(lo, hi, 1 << level);
      q = affine_paper(z, 1 << level);
      code.x = z.zero, code.y = z.scale, code.z = __fdiv_rn(1, z.scale);
      if (level == 1) {
        uint32_t begin[3];
        codes_begin<BF16>(z, code.z, lo, hi, begin);
        code = make_float4(__uint_as_float(begin[0]), __uint_as_float(begin[1]),
                           __uint_as_float(begin[2]), 0);
      }
    }
    param = to_half(q.scale) | static_cast<uint32_t>(to_half(q.mid)) << 16;
    if (!there && JOINT) { /* (x - 2^60) inv is half the codes below 0 */
      code.x = 1152921504606846976.0f;
      code.y = static_cast<float>(1 << ((1 << level) - 1)) / code.x;
    }
    if (!there && !JOINT) code.x = code.y = code.z = __uint_as_float(0x7fff7fffu);
    codes[lane] = code;
  }
  if (!there) param = 0;
  /* token i's word is 4 (i mod 8) + i / 8 */
  const uint32_t other = __shfl_xor_sync(FULL, param, 8);
  if (lane & 8) return 0;
  const uint32_t i = 2 * (lane & 7) + (lane >> 4);
  reinterpret_cast<uint2 *>(out)[i] = make_uint2(param, other);
  return mix_words(param, other, salt + i * SALT);
}

/* A warp's share of V of a tile. */
template <bool JOINT, bool BF16>
__device__ __forceinline__ u64 pack_values(int level, const tile_place &tile, const char *rows,
                                           uint32_t pitch, uint32_t blocks, uint8_t *out, u64 salt,
                                           const float4 *codes) {
  switch (level) {
    case 1:
      return pack_v<1, JOINT, BF16>(codes, rows, pitch, blocks, tile.turn, out, salt);
    case 2:
      return pack_v<2, JOINT, BF16>(codes, rows, pitch, blocks, tile.turn, out, salt);
    case 3:
      return pack_v<3, JOINT, BF16>(codes, rows, pitch, blocks, tile.turn, out, salt);
    default:
      return copy_v<BF16>(rows, pitch, blocks, tile, out, salt);
  }
}

/* A share of K of a tile: a block, or two of 2 bits. */
struct __align__(16) key_share {
  uint32_t what; /* level, 4 if it has two, 8 * the first block */
  uint32_t out;  /* bytes before it */
  u64 salt;      /* of these, to be added */
};
enum { KEY_SHARES = MAX_DIM / 16 + 3 };

/* The i-th of them. */
__device__ __forceinline__ key_share share_of(const block_plan &h, uint32_t i) {
  const uint32_t end1 = h.k_blocks[1], end2 = h.k_blocks[2], twos = end1 / 2;
  const uint32_t b = i + (i < end1 - twos ? i : twos);
  key_share s;
  s.what = (b < end1 ? 1 : b < end2 ? 2 : 3) + (b + 1 < end1 ? 4 : 0) + 8 * b;
  s.out = 128 * least(b, end1) + 256 * (most(least(b, end2), end1) - end1) +
          512 * (most(b, end2) - end2);
  s.salt = s.out / 8 * SALT;
  return s;
}

/* A warp's part of the shares of K: of seven the first three warps have two and the last, which
   finds the parameters of V, one. */
template <bool JOINT, bool BF16>
__device__ __forceinline__ u64 pack_keys(const key_share *shares, uint32_t n,
                                         const tile_place &tile, const uint4 *codes,
                                         const char *rows, uint32_t pitch) {
  static_assert(TILE_WARPS == 4, "shares of four warps");
  const uint32_t g = threadIdx.x >> 2 & 7;
  uint32_t exists = 0;
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) /* 2 sub + r */
    if (g + 8 * j < tile.in_tile) exists |= 1u << j;
  rows += g * pitch;
  u64 sum = 0;
#pragma unroll 1
  for (uint32_t i = tile.turn, of_seven = i; i < n;) {
    const key_share s = shares[i];
    const uint4 *q = codes + 16 * (s.what / 8);
    const uint32_t level = s.what & 3;
    uint8_t *out = tile.out + s.out;
    const u64 salt = tile.salt + s.salt;
    if (level == 1)
      sum += pack_k<1, JOINT, BF16>(q, s.what & 4, rows, pitch, exists, out, salt);
    else if (level == 2)
      sum += pack_k<2, JOINT, BF16>(q, false, rows, pitch, exists, out, salt);
    else
      sum += pack_k<3, JOINT, BF16>(q, false, rows, pitch, exists, out, salt);
    const uint32_t step = of_seven < 3 ? 4 : of_seven > 3 ? 3 : 7;
    i += step, of_seven += of_seven < 3 ? 4 : of_seven > 3 ? -4u : 0;
  }
  return sum;
}

template <bool JOINT, bool BF16>
__global__ void __launch_bounds__(32 * TILE_WARPS, 5)
    rows_kernel(const __grid_constant__ pack_args a) {
  extern __shared__ uint4 rows_memory[]; /* codes of the slots, then rows of two tiles */
  __shared__ u64 scratch[TILE_WARPS];
  __shared__ block_plan h;
  __shared__ channel_table channel;
  __shared__ float4 v_codes[TILE];
  __shared__ key_share shares[KEY_SHARES];
  __shared__ uint32_t run_of[5];
  const int head = static_cast<int>(blockIdx.y);
  const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t kd = static_cast<uint32_t>(a.k_dim), slots = slots_of(a.k_dim);
  const plan_source source(a);
  channel_ends x(a, head, least(threadIdx.x, kd - 1));
  const run_counts runs = source.runs_of(a, head);
  const uint32_t tiles = runs.tiles(), blocks = least(tiles, a.tile_blocks);
  if (blockIdx.x > blocks || source.error != RDKV_OK) return; /* then there may be no list */
  if (threadIdx.x < 5) run_of[threadIdx.x] = 0;
#pragma unroll
  for (uint32_t r = 0; r < 4; ++r)
    if (threadIdx.x == r) run_of[r] = runs.of[r];
  __syncthreads();
  uint32_t tile = blockIdx.x > 0 ? blockIdx.x - 1 : tiles;
  const uint32_t *order = a.list.order + static_cast<size_t>(head) * a.list.n;
  const uint32_t k_pitch = row_pitch(a.k_dim), v_pitch = row_pitch(a.v_dim);
  char *const stages = reinterpret_cast<char *>(rows_memory + slots);
  const uint32_t stages_at = static_cast<uint32_t>(__cvta_generic_to_shared(stages)),
                 stage_size = stage_bytes(a.k_dim, a.v_dim);
  const row_copy k_copy(a.k, a.k_dim, head, stages_at),
      v_copy(a.v, a.v_dim, head, stages_at + TILE * k_pitch);
  tile_cursor now = {0, 0, 0, 0}, next;
  now.advance(tile, run_of), next = now, next.advance(blocks, run_of);
  const uint32_t first_token = now.n ? order[now.at(lane)] : 0;
  uint32_t token = next.n ? order[next.at(lane)] : 0; /* of the next tile */
  if (now.n) k_copy.ask(first_token, 0), v_copy.ask(first_token, 0);
  asm volatile("cp.async.commit_group;" ::: "memory");
  /* slots without a channel have codes 0, which is what the authors' come to with NaN everywhere */
  const uint32_t none = JOINT ? 0 : 0x7fff7fffu;
  for (uint32_t i = threadIdx.x; i < slots; i += blockDim.x)
    rows_memory[i] = make_uint4(none, none, JOINT ? __float_as_uint(12582912.0f) : none, 0);
  __syncthreads();
  for (uint32_t c = threadIdx.x; c < kd; c += blockDim.x) {
    if (c >= blockDim.x) x = channel_ends(a, head, c);
    const channel_code q = x.code(JOINT, true, &channel.scale_mid[c]);
    channel.slot[c] = static_cast<uint16_t>(x.slot),
    channel.level[c] = static_cast<uint8_t>(x.level());
    uint32_t code[3] = {__float_as_uint(q.mid), __float_as_uint(q.inv), __float_as_uint(q.back)};
    if (!JOINT && x.level() == 1) {
      const zero_point z = {q.inv, q.mid};
      codes_begin<BF16>(z, q.back, x.lo, x.hi, code);
    }
    if (x.level() > 0) rows_memory[x.slot] = make_uint4(code[0], code[1], code[2], 2 * c);
  }
  source.make(a, head, &h);
  __syncthreads();
  if (!h.go) return;
  if (blockIdx.x == 0) {
    write_table(a, head, h, channel, stages);
  } else {
    const uint32_t n_shares = h.k_blocks[3] - h.k_blocks[1] / 2;
    if (threadIdx.x < n_shares) shares[threadIdx.x] = share_of(h, threadIdx.x);
    u64 sum = 0;
    bool bad = false;
    uint32_t stage = 0, turn = warp + blockIdx.x;
#pragma unroll 1
    for (; tile < tiles; tile += blocks, ++turn) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads(); /* the rows are there, and those of the tile before have been read */
      const char *k_rows = stages + stage * stage_size, *v_rows = k_rows + TILE * k_pitch;
      stage ^= 1;
      if (next.n) k_copy.ask(token, stage * stage_size), v_copy.ask(token, stage * stage_size);
      asm volatile("cp.async.commit_group;" ::: "memory");
      const uint64_t offset =
          h.run_at[now.run] + static_cast<uint64_t>(now.in_run) * h.run_bytes[now.run];
      const tile_place place = {a.block + offset, salt_of(offset / 8), now.n, turn % TILE_WARPS};
      const int level = static_cast<int>(now.run) + 1;
      if (a.positions && place.turn == 0) {
        const uint32_t mine = lane < now.n ? order[now.at(lane)] : ~0u;
        const uint32_t other = __shfl_xor_sync(FULL, mine, 1);
        const uint64_t to = h.position + 4 * (static_cast<uint64_t>(tile) * TILE + lane);
        *reinterpret_cast<uint32_t *>(a.block + to) = mine;
        if (!(lane & 1)) sum += mix_words(mine, other, salt_of(to / 8));
      }
      now = next, next.advance(blocks, run_of);
      if (next.n) token = order[next.at(lane)];
      uint8_t *out = place.out + h.k_tile; /* of V */
      const u64 salt = place.salt + h.k_tile / 8 * SALT;
      const uint32_t pieces = static_cast<uint32_t>(a.v_dim) / 8;
      if (place.turn == TILE_WARPS - 1)
        sum += fit_values<JOINT, BF16>(level, place, v_rows, v_pitch, pieces, out, salt, v_codes,
                                       &bad);
      sum += pack_keys<JOINT, BF16>(shares, n_shares, place, rows_memory, k_rows, k_pitch);
      __syncthreads(); /* V's parameters are there */
      sum += pack_values<JOINT, BF16>(level, place, v_rows, v_pitch, pieces / 2, out + 128,
                                      salt + 16 * SALT, v_codes);
    }
    if (bad) fail(a.list.status, RDKV_ERR_NONFINITE);
    sum = warp_sum(sum);
    if (lane == 0) scratch[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < TILE_WARPS; ++w) sum += scratch[w];
      atomicAdd(&a.state->body_sum, sum);
    }
  }
  if (last_block(&a.state->done, h.blocks)) write_header(a, h.total, h.head_bytes);
}

/* The body's checksum and the header, of a block whose tiles did not come by rows. */
static __global__ void __launch_bounds__(THREADS)
    body_sum_kernel(const __grid_constant__ pack_args a) {
  __shared__ u64 scratch[33];
  __shared__ block_plan h;
  plan_source(a).make(a, 0, &h);
  __syncthreads();
  if (!h.go) return;
  const u64 *words = reinterpret_cast<const u64 *>(a.block);
  const u64 end = h.total / 8, step = static_cast<u64>(gridDim.x) * blockDim.x;
  u64 sum = 0, all;
#pragma unroll 4
  for (u64 i = h.head_bytes / 8 + blockIdx.x * blockDim.x + threadIdx.x; i < end; i += step)
    sum += mix(words[i] + salt_of(i));
  block_scan(sum, scratch, &all);
  if (threadIdx.x == 0) atomicAdd(&a.state->body_sum, all);
  if (last_block(&a.state->done, gridDim.x)) write_header(a, h.total, h.head_bytes);
}

/* ---- measure: distances of V from the mean output give D(0) of the tokens; K is measured over
   those where it is largest */

enum {
  V_WARPS = THREADS / 32,
  V_ROWS = 16,   /* of a warp at a time, two threads each */
  V_ROUND = 368, /* tokens of which D(0) is found at a time */
  V_RING = 1024, /* rows remembered: of two rounds, on both sides of them POOL, and a warp's */
  QUADS = 128,   /* channels of K of a block */
  K_THREADS = 256
};

struct moments_part;

struct measure_args {
  uint32_t *any;       /* [heads][chunks] 1: a token there has a width */
  uint32_t *histogram; /* [heads][BINS] of D(0) */
  moments_part *parts; /* [heads][groups][parts] */
  uint32_t *kept;      /* [heads][groups] tokens that K is measured over */
  uint32_t *done;      /* [heads][groups] blocks that have written their parts */
  uint32_t *status;
  uint32_t n, chunks, want; /* D(0) chooses so many tokens for K, up to a bin */
  uint32_t v_tokens;        /* of a block */
  uint32_t spans, groups;   /* groups of 128 channels */
  uint32_t block;           /* log2 of the spans of a block, which are one part if they are 8 */
  int heads, k_dim, v_dim;  /* heads of an item */
  int half;                 /* neighbours on a side that D(0) is averaged over */
  float norm, noise[3];     /* softmax_scale squared; of V at 2, 4, 8 bits */
};

/* Which chunks have tokens with widths; zeroes what is counted up later; first of the launches. */
static __global__ void __launch_bounds__(THREADS)
    measure_begin_kernel(const __grid_constant__ measure_args a,
                         const __grid_constant__ item_list list) {
  const uint32_t h = blockIdx.z * static_cast<uint32_t>(a.heads) + blockIdx.y;
  const item &it = list.at[blockIdx.z];
  const uint32_t chunk = blockIdx.x, tid = threadIdx.x;
  bool mine = false;
  wait_for_launches();
  let_next_launch();
#pragma unroll
  for (uint32_t i = 0; i < CHUNK / THREADS; ++i) {
    const uint32_t t = chunk * CHUNK + i * THREADS + tid;
    if (t < a.n) mine |= it.v_bits[static_cast<size_t>(blockIdx.y) * a.n + t] != 0;
  }
  const int any = __syncthreads_or(mine);
  if (tid == 0) a.any[static_cast<size_t>(h) * a.chunks + chunk] = static_cast<uint32_t>(any);
  if (chunk > 0) return;
  for (uint32_t i = tid; i < BINS; i += THREADS) a.histogram[h * BINS + i] = 0;
  if (tid < a.groups) a.kept[h * a.groups + tid] = a.done[h * a.groups + tid] = 0;
}

/* Whether a token of the head has a width; all threads of a block call it. */
__device__ __forceinline__ bool any_width(const measure_args &a, uint32_t h) {
  bool mine = false;
  for (uint32_t i = threadIdx.x; i < a.chunks; i += blockDim.x)
    mine |= a.any[static_cast<size_t>(h) * a.chunks + i] != 0;
  return __syncthreads_or(mine);
}

/* What is known of the last rows, each at its number modulo V_RING. */
template <bool REST>
struct v_ring {
  float distance[V_RING];        /* squared, from the mean output */
  float square[V_RING];          /* of the range */
  float rest[REST ? V_RING : 1]; /* squared distance from halves */
  /* What the two threads of row `at` found: of rdkv.h's 16 lanes of sums each has 8. */
  __device__ __forceinline__ void store(int at, float lo, float hi, float (&e)[8], float (&r)[8]) {
    lo = fminf(lo, __shfl_xor_sync(FULL, lo, 1)), hi = fmaxf(hi, __shfl_xor_sync(FULL, hi, 1));
#pragma unroll
    for (int m = 4; m; m >>= 1)
#pragma unroll
      for (int i = 0; i < m; ++i) {
        e[i] = __fadd_rn(e[i], e[i + m]);
        if (REST) r[i] = __fadd_rn(r[i], r[i + m]);
      }
    e[0] = __fadd_rn(e[0], __shfl_xor_sync(FULL, e[0], 1));
    if (REST) r[0] = __fadd_rn(r[0], __shfl_xor_sync(FULL, r[0], 1));
    at &= V_RING - 1;
    if (threadIdx.x & 1) {
      const float range = __fsub_rn(hi, lo);
      square[at] = __fmul_rn(range, range);
      if (REST) rest[at] = r[0];
    } else {
      distance[at] = e[0];
    }
  }
};

/* The tokens of a block, the last ones first, as the L2 still has them, and the rows of V that it
   reads for them: those of `half` more on each side, V_ROWS at a time. */
struct v_part {
  uint32_t first, end; /* tokens */
  int row;             /* the first one */
  uint32_t units;      /* V_ROWS rows each */
  __device__ __forceinline__ v_part(const measure_args &a) {
    first = (gridDim.y - 1 - blockIdx.y) * a.v_tokens, end = least(first + a.v_tokens, a.n);
    row = static_cast<int>(first) - a.half, units = units_for(a, end - first);
  }
  /* Of so many tokens. */
  static __device__ __forceinline__ uint32_t units_for(const measure_args &a, uint32_t tokens) {
    return (tokens + 2 * static_cast<uint32_t>(a.half) + V_ROWS - 1) / V_ROWS;
  }
  __device__ __forceinline__ int row_of_lane(uint32_t unit) const {
    return row + static_cast<int>(unit * V_ROWS + (threadIdx.x & 31) / 2);
  }
};

/* D of a block's tokens at all widths, and how many D(0) lie in each bin, unless the head has
   widths, which needs to be known only when the first of them are found. unit(u) has a warp put
   V_ROWS rows into the ring. All threads call it. */
template <bool REST, typename Unit>
__device__ __forceinline__ void v_rounds(const measure_args &a, const item &it, int head,
                                         uint32_t h, const v_part &p, const v_ring<REST> &ring,
                                         const Unit &unit) {
  __shared__ uint32_t count[BINS];
  const uint32_t tid = threadIdx.x, rounds = (p.end - p.first + V_ROUND - 1) / V_ROUND;
  const int last = static_cast<int>(a.n) - 1;
  const float each = static_cast<float>(2 * a.half + 1);
  const float *const token = it.token + static_cast<size_t>(head) * a.n;
  float *const to = it.v_distortion + static_cast<size_t>(head) * 5 * a.n;
  float weight[2];
  const auto ask = [&](uint32_t round) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t in = i * THREADS + tid, t = p.first + round * V_ROUND + in;
      weight[i] = in < V_ROUND && t < p.end ? __ldg(token + t) : 0;
    }
  };
  const auto finish = [&](uint32_t round) {
    const uint32_t half = static_cast<uint32_t>(a.half), begin = p.first + round * V_ROUND;
    const bool inside = begin >= half && a.n - begin >= V_ROUND + half;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t in = i * THREADS + tid, t = p.first + round * V_ROUND + in;
      if (in >= V_ROUND || t >= p.end) continue;
      float sum = 0;
      if (inside)
#pragma unroll 4
        for (uint32_t j = 0; j <= 2 * half; ++j)
          sum = __fadd_rn(sum, ring.distance[(t - half + j) & (V_RING - 1)]);
      else
        for (int j = -a.half; j <= a.half; ++j) { /* at the ends of the sequence back again */
          int at = static_cast<int>(t) + j;
          at = at < 0 ? -at : at > last ? last - (at - last) : at;
          sum = __fadd_rn(sum, ring.distance[at & (V_RING - 1)]);
        }
      const uint32_t at = t & (V_RING - 1);
      const float w = weight[i], square = ring.square[at], d = __fmul_rn(w, __fdiv_rn(sum, each));
      to[t] = d;
#pragma unroll
      for (uint32_t l = 0; l < 3; ++l)
        to[(l + 1) * static_cast<size_t>(a.n) + t] = __fmul_rn(w, __fmul_rn(square, a.noise[l]));
      to[4 * static_cast<size_t>(a.n) + t] = REST ? __fmul_rn(w, ring.rest[at]) : 0;
      atomicAdd(&count[bin_of(d)], 1u);
    }
  };
  for (uint32_t i = tid; i < BINS; i += THREADS) count[i] = 0;
  ask(0);
  uint32_t round = 0;
  for (uint32_t u = tid / 32;; u += V_WARPS) {
    for (; round < rounds && u >= least(p.units, v_part::units_for(a, (round + 1) * V_ROUND));
         ++round) {
      __syncthreads(); /* who is a round ahead writes what no one reads */
      if (round == 0) {
        wait_for_launches();
        if (any_width(a, h)) return;
      }
      finish(round), ask(round + 1);
    }
    if (round == rounds) break;
    unit(u);
  }
  __syncthreads();
  for (uint32_t i = tid; i < BINS; i += THREADS)
    if (count[i]) atomicAdd(&a.histogram[h * BINS + i], count[i]);
}

/* Any dtype and stride. */
template <int DTYPE>
__global__ void __launch_bounds__(THREADS)
    v_error_kernel(const __grid_constant__ measure_args a, const __grid_constant__ item_list list) {
  enum { REST = DTYPE == RDKV_F32 };
  __shared__ float o[MAX_DIM];
  __shared__ v_ring<REST> ring;
  const int head = static_cast<int>(blockIdx.x), vd = a.v_dim;
  const int first_lane = 8 * (static_cast<int>(threadIdx.x) & 1);
  const uint32_t h = blockIdx.z * static_cast<uint32_t>(a.heads) + blockIdx.x;
  const item &it = list.at[blockIdx.z];
  let_next_launch();
  for (int d = static_cast<int>(threadIdx.x); d < vd; d += THREADS)
    o[d] = it.mean_out[head * vd + d];
  __syncthreads();
  const ptrdiff_t stride = it.v.dim_stride ? it.v.dim_stride : 1;
  const v_part part(a);
  bool good = true;
  v_rounds(a, it, head, h, part, ring, [&](uint32_t u) {
    const int at = part.row_of_lane(u), last = static_cast<int>(a.n) - 1;
    const void *row = row_of(it.v, static_cast<uint32_t>(at < 0 ? 0 : at < last ? at : last), head);
    float lo = 3.402823466e38f, hi = -3.402823466e38f, e[8], r[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = r[i] = 0;
    for (int d0 = first_lane; d0 < vd; d0 += 16)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (d0 + i < vd) {
          const float x = element(row, DTYPE, (d0 + i) * stride), d = __fsub_rn(x, o[d0 + i]);
          good &= in_range(x);
          lo = fminf(lo, x), hi = fmaxf(hi, x);
          e[i] = __fadd_rn(e[i], __fmul_rn(d, d));
          if (REST) {
            const float f = __fsub_rn(x, nearest_half(x));
            r[i] = __fadd_rn(r[i], __fmul_rn(f, f));
          }
        }
    ring.store(at, lo, hi, e, r);
  });
  if (!good) fail(a.status, RDKV_ERR_NONFINITE);
}

/* Where V_ROWS dense rows of 16 N elements of 16 bits go on a warp's way to them, in whole lines
   and two parts, of which one is on its way when the other is read. The memory of all is aligned,
   or halves of a sector would be asked for one by one. */
template <int N>
struct v_stage {
  enum { MIDDLE = N < 4 ? N : (N + 7) / 8 * 4 }; /* of N, where the second part begins */
  enum { PITCH = 32 * (N | 1), BYTES = V_ROWS * PITCH, ALIGNED = 128 };
  enum { ALL = BYTES * V_WARPS + ALIGNED };
  const uint8_t *memory;
  const char *rows; /* the lane's 16 bytes of a line */
  uint32_t to;      /* where these go, of the first row */
  int pitch, last;
  u64 policy;
  __device__ __forceinline__ v_stage(const void *all, const rdkv_tensor &v, int head, uint32_t n) {
    const uint32_t row = (threadIdx.x & 31) / 8, byte = 16 * (threadIdx.x & 7);
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(all));
    memory = static_cast<const uint8_t *>(all) + (ALIGNED - at % ALIGNED) % ALIGNED +
             threadIdx.x / 32 * BYTES;
    to = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + row * PITCH + byte;
    rows = static_cast<const char *>(row_of(v, 0, head)) + byte;
    pitch = step_of(v), last = static_cast<int>(n) - 1, policy = evict_first();
    asm("" : "+l"(rows), "+r"(pitch), "+r"(to)); /* not to be found out again each time */
  }
  /* A part of a unit's rows, those before the sequence and behind it being its ends, or of none. */
  template <int PART>
  __device__ __forceinline__ void ask(const v_part &p, uint32_t unit) const {
    const int row = p.row + static_cast<int>(unit * V_ROWS + (threadIdx.x & 31) / 8);
    const int chunk = threadIdx.x & 7;
#pragma unroll
    for (int i = 0; i < V_ROWS && unit < p.units; i += 4) {
      const char *from = rows + static_cast<ptrdiff_t>(max(0, min(row + i, last))) * pitch;
#pragma unroll
      for (int line = PART ? 32 * MIDDLE : 0; line < 32 * (PART ? N : MIDDLE); line += 128)
        if (line + 16 * chunk < 32 * N)
          copy_16_once(to + static_cast<uint32_t>(i * PITCH + line), from + line, policy);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  /* All parts but the last one that was asked for. */
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
  }
};

/* Dense rows of 16 N elements of 16 bits. */
template <int N, bool BF16>
__global__ void __launch_bounds__(THREADS, N > 8 ? 2 : 4)
    v_rows_kernel(const __grid_constant__ measure_args a, const __grid_constant__ item_list list) {
  typedef extremes<BF16 ? RDKV_BF16 : RDKV_F16> extremes_type;
  extern __shared__ uint4 rdkv_cuda_compress_memory[];
  __shared__ __align__(16) float o[16 * N];
  __shared__ v_ring<false> ring;
  const int head = static_cast<int>(blockIdx.x);
  const uint32_t lane = threadIdx.x & 31, half = lane & 1;
  const uint32_t h = blockIdx.z * static_cast<uint32_t>(a.heads) + blockIdx.x;
  const item &it = list.at[blockIdx.z];
  let_next_launch();
  v_stage<N> stage(rdkv_cuda_compress_memory, it.v, head, a.n);
  const v_part part(a);
  extremes_type all;
  all.clear();
  const float mean = threadIdx.x < 16 * N ? __ldg(&it.mean_out[head * 16 * N + threadIdx.x]) : 0;
  stage.template ask<0>(part, threadIdx.x / 32), stage.template ask<1>(part, threadIdx.x / 32);
  if (threadIdx.x < 16 * N) o[threadIdx.x] = mean;
  __syncthreads();
  v_rounds(a, it, head, h, part, ring, [&](uint32_t u) {
    const uint8_t *row = stage.memory + (lane >> 1) * v_stage<N>::PITCH + 16 * half;
    extremes_type ends;
    float e[8];
    ends.clear();
#pragma unroll
    for (int b = 0; b < N; ++b) {
      if (b == 0 || b == v_stage<N>::MIDDLE) stage.wait();
      const uint4 x = *reinterpret_cast<const uint4 *>(row + 32 * b);
      const float4 o0 = *reinterpret_cast<const float4 *>(&o[16 * b + 8 * half]);
      const float4 o1 = *reinterpret_cast<const float4 *>(&o[16 * b + 8 * half + 4]);
      const float p[8] = {o0.x, o0.y, o0.z, o0.w, o1.x, o1.y, o1.z, o1.w};
      const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 y = extremes_type::values(word[i]);
        const float u0 = __fsub_rn(y.x, p[2 * i]), u1 = __fsub_rn(y.y, p[2 * i + 1]);
        ends.take(word[i]);
        e[2 * i] = b == 0 ? __fmul_rn(u0, u0) : __fadd_rn(e[2 * i], __fmul_rn(u0, u0));
        e[2 * i + 1] = b == 0 ? __fmul_rn(u1, u1) : __fadd_rn(e[2 * i + 1], __fmul_rn(u1, u1));
      }
      if (b + 1 == v_stage<N>::MIDDLE || b + 1 == N)
        __syncwarp(); /* all have read what the next ones overwrite */
      if (b + 1 == v_stage<N>::MIDDLE) stage.template ask<0>(part, u + V_WARPS);
      if (b + 1 == N) stage.template ask<1>(part, u + V_WARPS);
    }
    all.take(ends.low), all.take(ends.high);
    const float2 low = ends.lowest(), high = ends.highest();
    ring.store(part.row_of_lane(u), fminf(low.x, low.y), fmaxf(high.x, high.y), e, e);
  });
  asm volatile("cp.async.wait_group 0;" ::: "memory"); /* of a head that has widths */
  const float2 low = all.lowest(), high = all.highest();
  if (!(in_range(low.x) && in_range(low.y) && in_range(high.x) && in_range(high.y)))
    fail(a.status, RDKV_ERR_NONFINITE);
}

__host__ __device__ inline uint32_t parts_of(const measure_args &a) {
  return a.block == 3 ? (a.spans + 7) / 8 : a.spans;
}

/* Whether the head has widths, so that these tell which tokens are kept; else *cut is the lowest
   bin of D(0) that is: with it there are `want` tokens at least, or it is 0 (rdkv__likely). All
   threads of a block call it. */
__device__ __forceinline__ bool find_cut(const measure_args &a, uint32_t h, uint32_t *cut) {
  enum { EACH = BINS / K_THREADS, WARPS = K_THREADS / 32 };
  __shared__ uint32_t of_warp[WARPS], found;
  const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const uint32_t top = BINS - 1 - threadIdx.x * EACH;
  uint32_t bins[EACH], mine = 0;
  if (threadIdx.x == 0) found = 0;
#pragma unroll
  for (uint32_t i = 0; i < EACH; ++i) bins[i] = a.histogram[h * BINS + top - i];
  if (any_width(a, h)) return true;
#pragma unroll
  for (uint32_t i = 0; i < EACH; ++i) mine += bins[i];
  uint32_t sum = warp_scan(mine);
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  sum -= mine;
#pragma unroll
  for (uint32_t w = 0; w < WARPS - 1; ++w)
    if (w < warp) sum += of_warp[w];
#pragma unroll
  for (uint32_t i = 0; i < EACH; ++i) {
    const uint32_t with = sum + bins[i];
    if (top - i > 0 && sum < a.want && with >= a.want) found = top - i;
    sum = with;
  }
  __syncthreads();
  *cut = found;
  return false;
}

/* Four neighbouring channels of a row, a lane's. WHOLE: one load has all four. */
template <int DTYPE, bool WHOLE>
struct quad_rows {
  const char *base; /* of token 0 */
  ptrdiff_t stride; /* elements */
  int n;            /* channels that exist */
  __device__ __forceinline__ quad_rows(const rdkv_tensor &t, int head, int d, int dim) {
    if (d >= dim) d = 0; /* a lane without channels goes along with the first one */
    stride = t.dim_stride ? t.dim_stride : 1;
    base = static_cast<const char *>(row_of(t, 0, head)) + d * stride * (DTYPE == RDKV_F32 ? 4 : 2);
    n = dim - d;
  }
  __device__ __forceinline__ void load(const char *row, raw_pair<DTYPE> (&x)[2]) const {
    load_pairs<WHOLE>(x, row, stride, n);
  }
};

/* A stretch in shared memory: the tokens that it keeps, whose place the sums take later. */
union stretch {
  struct {
    float d0[STRETCH]; /* of all */
    int at[STRETCH];   /* where the rows of those that are kept begin */
    float g[STRETCH];
  } list;
  float sum[3 * QUADS + 4]; /* of u, g u, g u^2 and g */
};

/* What the last block reads of another one: sums of a span or of 8, and the first one's extremes.
 */
struct moments_part {
  float sum[3 * QUADS + 4], low[QUADS], high[QUADS];
};

/* D of K from the parts of all blocks, added up in order, and so many kept tokens. total [644]. All
   threads of a block call it. */
__device__ __forceinline__ void finish_moments(const measure_args &a, const item &it, int head,
                                               uint32_t group, const moments_part *parts,
                                               uint32_t blocks, uint32_t n_kept, float *total) {
  const uint32_t tid = threadIdx.x, n_parts = parts_of(a), spans = 1u << a.block;
  const uint32_t column = tid % QUADS;
  const int c = static_cast<int>(QUADS * group + column);
  const float q_square = c < a.k_dim ? it.q_square[head * a.k_dim + c] : 0;
  float *const ends_of = total + 3 * QUADS + 4;
  if (tid <= 3 * QUADS / 2) {
    enum { AT_ONCE = 32 };
    const uint32_t ends_at = a.block == 3 ? 0 : 7; /* eight spans, or eight of these in one */
    float2 sum = make_float2(0, 0), eight = make_float2(0, 0);
    for (uint32_t p0 = 0; p0 < n_parts; p0 += AT_ONCE) {
      float2 y[AT_ONCE];
#pragma unroll
      for (uint32_t p = 0; p < AT_ONCE; ++p)
        y[p] = p0 + p < n_parts
                   ? __ldcg(reinterpret_cast<const float2 *>(&parts[p0 + p].sum[2 * tid]))
                   : make_float2(0, 0);
#pragma unroll
      for (uint32_t p = 0; p < AT_ONCE; ++p) {
        eight.x = __fadd_rn(eight.x, y[p].x), eight.y = __fadd_rn(eight.y, y[p].y);
        if ((p & ends_at) == ends_at) {
          sum.x = __fadd_rn(sum.x, eight.x), sum.y = __fadd_rn(sum.y, eight.y);
          eight = make_float2(0, 0);
        }
      }
    }
    *reinterpret_cast<float2 *>(&total[2 * tid]) = sum;
  }
  {
    const bool upper = tid >= QUADS;
    float x = upper ? -3.402823466e38f : 3.402823466e38f;
    const uint32_t apart = a.block == 3 ? 1 : spans;
#pragma unroll 16
    for (uint32_t b = 0; b < blocks; ++b) {
      const float y =
          __ldcg(upper ? &parts[b * apart].high[column] : &parts[b * apart].low[column]);
      x = upper ? fmaxf(x, y) : fminf(x, y);
    }
    ends_of[tid] = x;
  }
  __syncthreads();
  if (c >= a.k_dim) return;
  const float q2 = __fmul_rn(q_square, a.norm), g = total[3 * QUADS];
  const float range = __fsub_rn(ends_of[QUADS + column], ends_of[column]);
  const float square = __fmul_rn(range, range);
#pragma unroll
  for (uint32_t level = tid / QUADS; level < 4; level += K_THREADS / QUADS) {
    float D;
    if (level == 0) { /* the sum of g (u - mean)^2 */
      const float mean = __fdiv_rn(total[column], static_cast<float>(n_kept));
      D = __fsub_rn(2 * total[QUADS + column], __fmul_rn(mean, g));
      D = fmaxf(__fsub_rn(total[2 * QUADS + column], __fmul_rn(mean, D)), 0);
    } else {
      D = __fmul_rn(g, __fmul_rn(square, noise_of(1, 1 << level)));
    }
    it.k_distortion[(head * 4 + static_cast<int>(level)) * a.k_dim + c] = __fmul_rn(q2, D);
  }
}

/* D of K at each width, from its range and, with u the distance from the last token and D(0) of V
   for g, the sums of u, g u, g u^2 and g. DTYPE is K's. A block has 128 channels of 2^block spans
   of a head, at most 8, in dynamic shared memory. */
template <int DTYPE, bool WHOLE>
__global__ void __launch_bounds__(K_THREADS, 2)
    moments_kernel(const __grid_constant__ measure_args a, const __grid_constant__ item_list list) {
  enum { WARPS = K_THREADS / 32, BATCH = 8, MOST = 8 * STRETCHES };
  extern __shared__ uint4 rdkv_cuda_compress_memory[];
  __shared__ int low[QUADS], high[QUADS]; /* ordered */
  __shared__ uint32_t n_of[MOST], busy[MOST], n_busy[2], taken, all_kept;
  stretch *const memory = reinterpret_cast<stretch *>(rdkv_cuda_compress_memory);
  const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int head = static_cast<int>(blockIdx.y);
  const uint32_t h = blockIdx.z * static_cast<uint32_t>(a.heads) + blockIdx.y;
  const uint32_t group = blockIdx.x % a.groups, block = blockIdx.x / a.groups;
  const uint32_t blocks = gridDim.x / a.groups, spans = 1u << a.block;
  const item &it = list.at[blockIdx.z];
  const uint32_t first = (block << a.block) * SPAN;
  const int step = step_of(it.k);
  const quad_rows<DTYPE, WHOLE> rows(it.k, head, static_cast<int>(QUADS * group + 4 * lane),
                                     a.k_dim);
  const uint32_t n_parts = parts_of(a), h_group = h * a.groups + group;
  moments_part *const parts = a.parts + static_cast<size_t>(h_group) * n_parts;
  moments_part *const mine = parts + (a.block == 3 ? block : block << a.block);
  if (tid < QUADS) low[tid] = ordered(3.402823466e38f), high[tid] = ordered(-3.402823466e38f);
  if (tid < MOST) n_of[tid] = 0;
  if (tid == 0) n_busy[0] = n_busy[1] = 0, taken = WARPS, all_kept = 0;
  raw_pair<DTYPE> last[2];
  rows.load(rows.base + static_cast<ptrdiff_t>(a.n - 1) * step, last);
  const float2 o[2] = {last[0].values(), last[1].values()};
  wait_for_launches();
  { /* which tokens are kept, and their D(0) */
    const float *const d0 = it.v_distortion + 5 * static_cast<size_t>(head) * a.n;
    const uint8_t *const widths = it.v_bits + static_cast<size_t>(head) * a.n;
#pragma unroll 2
    for (uint32_t i = tid; i < spans * SPAN; i += K_THREADS)
      copy_4(static_cast<uint32_t>(
                 __cvta_generic_to_shared(&memory[i / STRETCH].list.d0[i % STRETCH])),
             d0 + least(first + i, a.n - 1));
    asm volatile("cp.async.commit_group;" ::: "memory");
    uint32_t cut = 0;
    const bool by_width = find_cut(a, h, &cut);
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    uint32_t has_width = 0; /* bits */
    if (by_width)
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) {
        const uint32_t t = first + (warp + WARPS * (i / 2)) * STRETCH + 32 * (i % 2) + lane;
        if (i < 2 * spans && t < a.n && widths[t] != 0) has_width |= 1u << i;
      }
    uint32_t n_mine = 0; /* of stretch warp + WARPS * lane */
#pragma unroll 2
    for (uint32_t i = 0; i < spans * STRETCHES / WARPS; ++i) {
      stretch &s = memory[warp + WARPS * i];
      uint32_t n = 0;
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t at = 32 * half + lane, t = first + (warp + WARPS * i) * STRETCH + at;
        const float d = s.list.d0[at];
        const bool kept = by_width ? has_width >> (2 * i + half) & 1 : t < a.n && bin_of(d) >= cut;
        const uint32_t mask = __ballot_sync(FULL, kept);
        const uint32_t to = n + static_cast<uint32_t>(__popc(mask & ((1u << lane) - 1)));
        if (kept) s.list.at[to] = static_cast<int>(at) * step, s.list.g[to] = d > 0 ? d : 0;
        n += static_cast<uint32_t>(__popc(mask));
      }
      __syncwarp();
      const uint32_t more = n + lane; /* up to a whole batch, the first one with weight 0 */
      if (lane < BATCH && more < STRETCH && n > 0)
        s.list.at[more] = s.list.at[0], s.list.g[more] = 0;
      if (lane == i) n_mine = n;
    }
    /* the long ones first, from the front */
    const bool is_long = n_mine > STRETCH / 2, is_short = n_mine > 0 && !is_long;
    const uint32_t longs = __ballot_sync(FULL, is_long), shorts = __ballot_sync(FULL, is_short);
    const uint32_t before = (1u << lane) - 1;
    uint32_t to = 0;
    if (lane < 2)
      to = atomicAdd(&n_busy[lane], static_cast<uint32_t>(__popc(lane ? shorts : longs)));
    const uint32_t front = __shfl_sync(FULL, to, 0) + static_cast<uint32_t>(__popc(longs & before));
    const uint32_t back = __shfl_sync(FULL, to, 1) + static_cast<uint32_t>(__popc(shorts & before));
    if (n_mine > 0) {
      n_of[warp + WARPS * lane] = n_mine;
      busy[is_long ? front : MOST - 1 - back] = warp + WARPS * lane;
      atomicAdd(&all_kept, n_mine);
    }
  }
  __syncthreads();
  /* warps take stretches as they come, and ask for the next batch of rows before they add up one */
  enum : uint32_t { NONE = ~0u };
  const uint32_t n_long = n_busy[0], n_stretches = n_long + n_busy[1];
  const auto stretch_at = [&](uint32_t i) -> uint32_t {
    return i >= n_stretches ? NONE : busy[i < n_long ? i : MOST - 1 - (i - n_long)];
  };
  const auto take = [&]() -> uint32_t {
    uint32_t i = 0;
    if (lane == 0) i = atomicAdd(&taken, 1u);
    return stretch_at(__shfl_sync(FULL, i, 0));
  };
  const auto load = [&](uint32_t s, uint32_t i, raw_pair<DTYPE>(&x)[BATCH][2]) {
    const char *from = rows.base + static_cast<ptrdiff_t>(first + s * STRETCH) * step;
    const int4 lower = *reinterpret_cast<const int4 *>(&memory[s].list.at[i]),
               upper = *reinterpret_cast<const int4 *>(&memory[s].list.at[i + 4]);
    const int at[BATCH] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
#pragma unroll
    for (int j = 0; j < BATCH; ++j) rows.load(from + at[j], x[j]);
  };
  extremes<DTYPE> ends[2];
  ends[0].clear(), ends[1].clear();
  float u[4] = {0, 0, 0, 0}, gu[4] = {0, 0, 0, 0}, guu[4] = {0, 0, 0, 0}, sum_g = 0;
  raw_pair<DTYPE> x[BATCH][2], ahead[BATCH][2];
  uint32_t s = NONE, n = 0, i = 0, coming = stretch_at(warp);
  while (true) {
    const bool ends_here = i + BATCH >= n;
    const uint32_t next = ends_here ? coming : s, next_i = ends_here ? 0 : i + BATCH;
    if (next != NONE) load(next, next_i, ahead);
    if (s != NONE) {
#pragma unroll
      for (uint32_t k0 = 0; k0 < BATCH; k0 += 4) {
        const float4 g4 = *reinterpret_cast<const float4 *>(&memory[s].list.g[i + k0]);
        const float g[4] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) {
          const float2 y[2] = {x[k0 + k][0].values(), x[k0 + k][1].values()};
          const float e[4] = {__fsub_rn(y[0].x, o[0].x), __fsub_rn(y[0].y, o[0].y),
                              __fsub_rn(y[1].x, o[1].x), __fsub_rn(y[1].y, o[1].y)};
          ends[0].take(x[k0 + k][0]), ends[1].take(x[k0 + k][1]);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float ge = __fmul_rn(g[k], e[c]);
            if (i + k0 + k < n) u[c] = __fadd_rn(u[c], e[c]); /* what pads weighs nothing */
            gu[c] = __fadd_rn(gu[c], ge), guu[c] = __fadd_rn(guu[c], __fmul_rn(ge, e[c]));
          }
          sum_g = __fadd_rn(sum_g, g[k]);
        }
      }
    }
    if (ends_here && s != NONE) {
      __syncwarp(); /* all have read the list */
      float4 *to = reinterpret_cast<float4 *>(memory[s].sum) + lane;
      to[0] = make_float4(u[0], u[1], u[2], u[3]);
      to[QUADS / 4] = make_float4(gu[0], gu[1], gu[2], gu[3]);
      to[QUADS / 2] = make_float4(guu[0], guu[1], guu[2], guu[3]);
      if (lane == 0) memory[s].sum[3 * QUADS] = sum_g;
#pragma unroll
      for (int c = 0; c < 4; ++c) u[c] = gu[c] = guu[c] = 0;
      sum_g = 0;
    }
    if (next == NONE) break;
    if (ends_here) n = n_of[next], coming = take();
    s = next, i = next_i;
#pragma unroll
    for (int k = 0; k < BATCH; ++k) x[k][0] = ahead[k][0], x[k][1] = ahead[k][1];
  }
  if (warp < n_stretches) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const float2 l = ends[p].lowest(), m = ends[p].highest();
      if (!(in_range(l.x) && in_range(l.y) && in_range(m.x) && in_range(m.y)))
        fail(a.status, RDKV_ERR_NONFINITE);
      const uint32_t c = 4 * lane + 2 * p;
      atomicMin(&low[c], ordered(l.x)), atomicMin(&low[c + 1], ordered(l.y));
      atomicMax(&high[c], ordered(m.x)), atomicMax(&high[c + 1], ordered(m.y));
    }
  }
  __syncthreads();
  if (tid < QUADS) {
    mine->low[tid] = unordered(low[tid]), mine->high[tid] = unordered(high[tid]);
  }
  const u64 kept_at = static_cast<u64>(__ballot_sync(FULL, n_of[32 + lane] != 0)) << 32 |
                      __ballot_sync(FULL, n_of[lane] != 0);
  if (tid <= 3 * QUADS / 2) { /* a stretch that keeps nothing adds nothing */
    float2 all = make_float2(0, 0);
#pragma unroll 2
    for (uint32_t span = 0; span < spans; ++span) {
      float2 sum = make_float2(0, 0);
#pragma unroll
      for (uint32_t w = 0; w < STRETCHES; ++w)
        if (kept_at >> (span * STRETCHES + w) & 1) {
          const float2 y = *reinterpret_cast<float2 *>(&memory[span * STRETCHES + w].sum[2 * tid]);
          sum.x = __fadd_rn(sum.x, y.x), sum.y = __fadd_rn(sum.y, y.y);
        }
      all.x = __fadd_rn(all.x, sum.x), all.y = __fadd_rn(all.y, sum.y);
      if (a.block < 3) {
        if (mine + span < parts + n_parts)
          *reinterpret_cast<float2 *>(&mine[span].sum[2 * tid]) = all;
        all = make_float2(0, 0);
      }
    }
    if (a.block == 3) *reinterpret_cast<float2 *>(&mine->sum[2 * tid]) = all;
  }
  if (tid == 0 && all_kept > 0) atomicAdd(&a.kept[h_group], all_kept);
  if (!last_block(&a.done[h_group], blocks)) return;
  finish_moments(a, it, head, group, parts, blocks, __ldcg(&a.kept[h_group]), memory->sum);
}

/* ---- score */

struct score_args {
  float *query;  /* [heads][k_dim][columns] scaled by softmax_scale * log2(e); for plain_kernel */
  float2 *stats; /* [heads][splits][columns] a reference, sum of 2^(logit - it) */
  float *square; /* [heads][splits][k_dim] */
  float *out;    /* [heads][splits][v_dim], where no rows of it are given */
  float *mean;   /* [heads][n] attention before pooling */
  uint32_t *status;
  ptrdiff_t lse_stride;
  double recent;    /* a query's weight is this by the root of its distance from the end */
  uint32_t n, seen; /* tokens; how many of them the first query sees besides its own */
  uint32_t split;   /* tokens of a split: a multiple of STAGE */
  uint32_t v_split; /* the same of V */
  int splits, v_splits, heads, group, window, columns, k_dim, v_dim, pool,
      joint;        /* heads of an item */
  int given;        /* log-sum-exp is */
  float scale, all; /* softmax_scale * log2(e); the queries' weights added up */
  float by_group;   /* 1 / group */
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* Zeroes bytes, shared by n_threads of which this is one. */
__device__ inline void clear_bytes(uint8_t *p, size_t bytes, size_t thread, size_t n_threads) {
  size_t head = (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
  if (head > bytes) head = bytes;
  const size_t words = (bytes - head) / 16, end = head + 16 * words;
  uint4 *wide = reinterpret_cast<uint4 *>(p + head);
  for (size_t i = thread; i < words; i += n_threads) wide[i] = make_uint4(0, 0, 0, 0);
  if (thread < head) p[thread] = 0;
  if (end + thread < bytes) p[end + thread] = 0;
}

/* Query of a column. The product is off by less than what is added, up to 2^22 columns. */
__device__ __forceinline__ int query_of(const score_args &a, int column) {
  return static_cast<int>((static_cast<float>(column) + 0.5f) * a.by_group);
}

/* As rdkv__recency, nearly: in double it took 2 us. */
__device__ __forceinline__ float query_weight(const score_args &a, int i) {
  return a.joint ? static_cast<float>(a.recent) * rsqrtf(static_cast<float>(a.window - i)) : 1;
}

/* Reference of a head's column for the pass that weighs, weight = 2^(logit - reference): from the
   log-sum-exp given, or what the splits found. The weight of the query goes in too; columns that
   pad weigh nothing. */
__device__ __forceinline__ float reference_of(const score_args &a, const item &it, int head, int h,
                                              int c) {
  if (c >= a.group * a.window) return __int_as_float(0x7f800000);
  const int i = query_of(a, c);
  double lse;
  if (a.given) {
    lse = static_cast<double>(it.lse[(head * a.group + c - i * a.group) * a.lse_stride + i]) *
          1.4426950408889634;
  } else {
    const size_t columns = static_cast<size_t>(a.columns);
    const float2 *s =
        a.stats + static_cast<size_t>(h) * static_cast<size_t>(a.splits) * columns + c;
    float top = -1e30f, sum = 0;
    for (int j0 = 0; j0 < a.splits; j0 += 32) {
      float2 x[32];
#pragma unroll
      for (int j = 0; j < 32; ++j)
        x[j] =
            j0 + j < a.splits ? s[static_cast<size_t>(j0 + j) * columns] : make_float2(-1e30f, 0);
      float most = top;
#pragma unroll
      for (int j = 0; j < 32; ++j) most = fmaxf(most, x[j].y > 0 ? x[j].x : -1e30f);
      sum *= exp2f(top - most), top = most;
#pragma unroll
      for (int j = 0; j < 32; ++j) sum += x[j].y > 0 ? x[j].y * exp2f(x[j].x - top) : 0;
    }
    lse = static_cast<double>(top) + static_cast<double>(log2f(sum));
  }
  const float weight =
      log2f(static_cast<float>(a.recent)) - 0.5f * log2f(static_cast<float>(a.window - i));
  return static_cast<float>(lse - static_cast<double>(a.joint ? weight : 0));
}

/* The queries as plain_kernel reads them, columns i * group + g. A block has 32 channels. */
static __global__ void __launch_bounds__(THREADS)
    query_kernel(score_args a, const __grid_constant__ item_list list) {
  const int head = static_cast<int>(blockIdx.y), used = a.group * a.window;
  const int tid = static_cast<int>(threadIdx.x);
  const int d = static_cast<int>(blockIdx.x) * 32 + (tid & 31);
  const item &it = list.at[blockIdx.z];
  if (d >= a.k_dim) return;
  const size_t row =
      (blockIdx.z * gridDim.y + blockIdx.y) * static_cast<size_t>(a.k_dim) + static_cast<size_t>(d);
  const ptrdiff_t stride = it.q.dim_stride ? it.q.dim_stride : 1;
  for (int c = tid >> 5; c < a.columns; c += THREADS / 32) {
    float x = 0;
    if (c < used)
      x = element(row_of(it.q, static_cast<uint32_t>(c / a.group), head * a.group + c % a.group),
                  it.q.dtype, d * stride);
    a.query[row * static_cast<size_t>(a.columns) + static_cast<size_t>(c)] = x * a.scale;
  }
}

/* Any dtype, stride and size, plain multiply and add: 16 rows of K at a time in shared memory, a
   thread a column, and as many passes as it takes. STATS finds the columns' softmax; else the
   weights of the tokens. */
template <bool STATS>
__global__ void __launch_bounds__(THREADS)
    plain_kernel(score_args a, const __grid_constant__ item_list list) {
  __shared__ float rows[16][MAX_DIM];
  __shared__ float sums[THREADS / 32][16];
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.z) * a.heads + head;
  const item &it = list.at[blockIdx.z];
  const uint32_t first = blockIdx.x * a.split, end = least(first + a.split, a.n);
  const uint32_t seen = a.seen;
  const ptrdiff_t stride = it.k.dim_stride ? it.k.dim_stride : 1;
  const float *query = a.query + static_cast<size_t>(h) * static_cast<size_t>(a.k_dim * a.columns);
  const size_t part = static_cast<size_t>(h) * static_cast<size_t>(a.splits) + blockIdx.x;
  float square = 0;
  bool bad = false;
  for (int c = tid; c - tid < a.columns; c += THREADS) {
    const float r = !STATS && c < a.columns ? reference_of(a, it, head, h, c) : 0;
    float top = -1e30f, sum = 0;
    for (uint32_t t0 = first; t0 < end; t0 += 16) {
      const int n = static_cast<int>(least(end - t0, 16));
      float x[16];
      __syncthreads();
      for (int i = tid; i < 16 * a.k_dim; i += THREADS) {
        const int t = i / a.k_dim, d = i - t * a.k_dim;
        const float k = t < n ? element(row_of(it.k, t0 + static_cast<uint32_t>(t), head),
                                        it.k.dtype, d * stride)
                              : 0;
        bad |= !in_range(k);
        rows[t][d] = k;
      }
      __syncthreads();
      if (!STATS && c == tid && tid < a.k_dim) {
#pragma unroll
        for (int t = 0; t < 16; ++t) square += rows[t][tid] * rows[t][tid];
      }
#pragma unroll
      for (int t = 0; t < 16; ++t) x[t] = 0;
      for (int d = 0; d < a.k_dim && c < a.columns; ++d) {
        const float q =
            query[static_cast<size_t>(d) * static_cast<size_t>(a.columns) + static_cast<size_t>(c)];
#pragma unroll
        for (int t = 0; t < 16; ++t) x[t] += rows[t][d] * q;
      }
      const float old = top;
#pragma unroll
      for (int t = 0; t < 16; ++t) {
        const uint32_t at = t0 + static_cast<uint32_t>(t);
        const bool hidden =
            t >= n || c >= a.columns ||
            (at > seen && static_cast<uint32_t>(c) < (at - seen) * static_cast<uint32_t>(a.group));
        if (STATS)
          x[t] = hidden ? -1e30f : x[t], top = fmaxf(top, x[t]);
        else
          x[t] = hidden ? 0 : exp2_fast(x[t] - r);
      }
      if (STATS) {
        sum *= exp2_fast(old - top);
#pragma unroll
        for (int t = 0; t < 16; ++t)
          if (x[t] > -1e30f) sum += exp2_fast(x[t] - top);
      } else {
#pragma unroll
        for (int t = 0; t < 16; ++t) {
          for (int d = 16; d; d >>= 1) x[t] += __shfl_xor_sync(FULL, x[t], d);
          if ((tid & 31) == 0) sums[tid >> 5][t] = x[t];
        }
        __syncthreads();
        if (tid < n) {
          float *to = a.mean + static_cast<size_t>(h) * a.n + t0 + static_cast<uint32_t>(tid);
          float w = c == tid ? 0 : *to;
          for (int i = 0; i < THREADS / 32; ++i) w += sums[i][tid];
          *to = w;
        }
      }
    }
    if (STATS && c < a.columns)
      a.stats[part * static_cast<size_t>(a.columns) + static_cast<size_t>(c)] =
          make_float2(top, sum);
  }
  if (!STATS && tid < a.k_dim)
    a.square[part * static_cast<size_t>(a.k_dim) + static_cast<size_t>(tid)] = square;
  if (bad) fail(a.status, RDKV_ERR_NONFINITE);
}

/* Dense fp16 or bf16 rows, with the tensor cores: queries are A and stay in registers, 16 M columns
   a warp; tokens of K are B, and come through shared memory by asynchronous copies, 64 at a time.
   Warps divide the columns among them, and where these are few the tokens too; more columns than a
   block has warps for take another pass. A product is a sum over channels in any order, so a lane's
   16-byte load of 8 neighbouring channels serves as the fragments of two steps, for K and Q alike:
   no rearranging. C is k_dim / 32. */
enum { STAGE = 64, WARPS = THREADS / 32 };

template <int C>
struct tensor_shape {
  enum {
    M = C <= 4 ? 2 : 1,
    CHUNKS = 4 * C,         /* of 16 bytes in a row */
    ROWS = THREADS / CHUNKS /* a thread copies, and looks after, one chunk of every ROWS-th row */
  };
};

/* Bytes of shared memory: two stages of K, the warps' parts of two stages' weights, and the
   threads' sums, which would leave the products too few registers. */
static size_t tensor_shared(int k_dim) {
  return 4 * STAGE * static_cast<size_t>(k_dim) + 2 * STAGE * WARPS * sizeof(float) +
         2 * THREADS * sizeof(float4);
}

/* A thread's chunks of a stage: rows ROWS apart, of which `left` are real from the stage's first
   row on. step: bytes from row to row. */
template <int C>
__device__ __forceinline__ void copy_stage(uint32_t to, const char *from, ptrdiff_t step,
                                           uint32_t left) {
  typedef tensor_shape<C> S;
  enum { APART = S::ROWS * S::CHUNKS * 16, EVEN = STAGE % S::ROWS == 0 };
  const int row = static_cast<int>(threadIdx.x) / S::CHUNKS;
  if (THREADS % S::CHUNKS != 0 && row >= S::ROWS) return;
  if (EVEN && left >= STAGE) {
#pragma unroll
    for (int i = 0; i < STAGE / S::ROWS; ++i, from += S::ROWS * step) copy_16(to + i * APART, from);
  } else {
#pragma unroll 1
    for (int i = row; i < STAGE; i += S::ROWS, to += APART) {
      const bool real = static_cast<uint32_t>(i) < left;
      copy_16(to, real ? from + (i - row) * step : from - row * step, real);
    }
  }
}

/* A token's weight: the sum of the column warps' parts. */
__device__ __forceinline__ float weight_of(const float *parts, int token, int column_warps) {
  const float4 *p = reinterpret_cast<const float4 *>(parts + token * WARPS);
  float4 x = p[0];
  float w = (x.x + x.y) + (x.z + x.w);
#pragma unroll 1
  for (int i = 4; i < column_warps; i += 4) x = p[1], w += (x.x + x.y) + (x.z + x.w);
  return w;
}

/* Logits of 16 tokens, as they lie in a stage, by a warp's columns: y[p][m][i] is that of token 8 p
   + 2 t + i mod 2 and column 16 m + g + 8 (i / 2). Four chains of products interleave. */
template <int C, bool BF16>
__device__ __forceinline__ void products(float (&y)[2][tensor_shape<C>::M][4],
                                         const uint4 (&q)[tensor_shape<C>::M][2][C],
                                         const uint4 *even, const uint4 *uneven) {
  enum { M = tensor_shape<C>::M };
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int m = 0; m < M; ++m) y[p][m][0] = y[p][m][1] = y[p][m][2] = y[p][m][3] = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const uint4 *from = (c & 1 ? uneven : even) + 4 * c;
    const uint4 b[2] = {from[0], from[8 * tensor_shape<C>::CHUNKS]};
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int p = 0; p < 2; ++p)
        rdkv_cuda__mma<BF16>(y[p][m], q[m][0][c].x, q[m][1][c].x, q[m][0][c].y, q[m][1][c].y,
                             b[p].x, b[p].y);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int p = 0; p < 2; ++p)
        rdkv_cuda__mma<BF16>(y[p][m], q[m][0][c].z, q[m][1][c].z, q[m][0][c].w, q[m][1][c].w,
                             b[p].z, b[p].w);
  }
}

/* Takes away logits that do not count: tokens from `end` on, and those after a query's own. token
   and column: those of y[0][0][0]. */
template <int M>
__device__ __forceinline__ void hide(const score_args &a, float (&y)[2][M][4], uint32_t token,
                                     int column, uint32_t end, uint32_t seen) {
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t t = token + static_cast<uint32_t>(8 * p + (i & 1));
        if (t >= end || (t > seen && static_cast<uint32_t>(column + 16 * m + 8 * (i >> 1)) <
                                         (t - seen) * static_cast<uint32_t>(a.group)))
          y[p][m][i] = -3e38f;
      }
}

/* Sums over the columns of 2^(logit - reference): of token 8 (g mod 2) + 2 t + g / 2 mod 2. */
template <int M>
__device__ __forceinline__ float over_columns(const float (&y)[2][M][4],
                                              const float2 (&reference)[M], float scale) {
  float w[4] = {0, 0, 0, 0}; /* over the lane's rows, of tokens 8 p + 2 t + e at 2 p + e */
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        w[2 * p + (i & 1)] +=
            exp2_fast(y[p][m][i] * scale - (i >> 1 ? reference[m].y : reference[m].x));
  /* over the 8 lanes g, halving what each has */
  const bool b0 = threadIdx.x & 4, b1 = threadIdx.x & 8;
  float keep = b0 ? w[2] : w[0], give = b0 ? w[0] : w[2];
  w[0] = keep + __shfl_xor_sync(FULL, give, 4);
  keep = b0 ? w[3] : w[1], give = b0 ? w[1] : w[3];
  w[1] = keep + __shfl_xor_sync(FULL, give, 4);
  keep = b1 ? w[1] : w[0], give = b1 ? w[0] : w[1];
  keep += __shfl_xor_sync(FULL, give, 8);
  return keep + __shfl_xor_sync(FULL, keep, 16);
}

/* Adds 2^(logit - top) over the tokens to a lane's sums of its rows; top moves when a sum has grown
   out of bounds, which the first one does. */
template <int M>
__device__ __forceinline__ void over_tokens(const float (&y)[2][M][4], float2 (&top)[M],
                                            float2 (&sum)[M], float scale) {
  const auto add = [&](int m, float2 from) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      from.x += exp2_fast(y[p][m][0] * scale - top[m].x) + exp2_fast(y[p][m][1] * scale - top[m].x);
      from.y += exp2_fast(y[p][m][2] * scale - top[m].y) + exp2_fast(y[p][m][3] * scale - top[m].y);
    }
    return from;
  };
  float2 s[M];
  float most = 0;
#pragma unroll
  for (int m = 0; m < M; ++m) s[m] = add(m, sum[m]), most = fmaxf(most, fmaxf(s[m].x, s[m].y));
  if (most > 1e18f) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float2 old = top[m];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        top[m].x = fmaxf(top[m].x, fmaxf(y[p][m][0], y[p][m][1]) * scale);
        top[m].y = fmaxf(top[m].y, fmaxf(y[p][m][2], y[p][m][3]) * scale);
      }
      s[m] = add(m, make_float2(sum[m].x * exp2_fast(old.x - top[m].x),
                                sum[m].y * exp2_fast(old.y - top[m].y)));
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) sum[m] = s[m];
}

/* to[0..7] += a chunk's values, or, SQUARE, their squares, weighted. */
template <int DTYPE, bool SQUARE>
__device__ __forceinline__ void add_chunk(float (&to)[8], const uint4 &x, float weight,
                                          extremes<DTYPE> *ends) {
  const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 y = extremes<DTYPE>::values(word[k]);
    if (DTYPE == RDKV_BF16) ends->take(word[k]);
    to[2 * k] += (SQUARE ? y.x : weight) * y.x, to[2 * k + 1] += (SQUARE ? y.y : weight) * y.y;
  }
}

/* STATS finds the columns' maxima and sums, of which each lane has its own for its rows and tokens
   until the end. Else the weights of the tokens. */
template <int C, bool BF16, bool STATS>
__global__ void __launch_bounds__(THREADS, 2)
    tensor_kernel(score_args a, const __grid_constant__ item_list list) {
  typedef tensor_shape<C> S;
  enum { M = S::M, CHUNKS = S::CHUNKS, ROWS = S::ROWS, DTYPE = BF16 ? RDKV_BF16 : RDKV_F16 };
  extern __shared__ uint4 rdkv_cuda_compress_memory[];
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.z) * a.heads + head;
  const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  __shared__ float reference[16 * M * WARPS];
  const item &it = list.at[blockIdx.z];
  /* [2][STAGE][CHUNKS] of K, swizzled; [2][STAGE][WARPS] column warps' parts of the tokens'
     weights; [2][THREADS] sums of squares */
  const uint4 *k_ring = rdkv_cuda_compress_memory;
  float *partial = reinterpret_cast<float *>(rdkv_cuda_compress_memory + 2 * STAGE * CHUNKS);
  float4 *my_sums = reinterpret_cast<float4 *>(partial + 2 * STAGE * WARPS) + tid;
  const uint32_t first = blockIdx.x * a.split, end = least(first + a.split, a.n);
  const uint32_t seen = a.seen;
  const int n_stages = static_cast<int>((end - first + STAGE - 1) / STAGE);
  const int needed = (a.columns - 1) / (16 * M) + 1; /* column warps */
  const int column_warps = needed > 4 ? 8 : needed > 2 ? 4 : needed;
  const int passes = (needed - 1) / WARPS + 1, token_warp = warp / column_warps;
  const int token_warps = WARPS / column_warps, column_warp = warp % column_warps;
  const int my_row = tid / CHUNKS, my_chunk = tid % CHUNKS;
  /* neighbouring rows' chunks in different halves of the banks, for the fragments' loads */
  const int my_k = my_row * CHUNKS + (C & 1 ? my_chunk : my_chunk ^ (my_row & 1) << 2);
  const int odd = C & 1 ? 0 : 4 * (g & 1);
  const uint32_t k_to = static_cast<uint32_t>(__cvta_generic_to_shared(k_ring + my_k));
  const bool has_rows = THREADS % CHUNKS == 0 || my_row < ROWS;
  const ptrdiff_t k_step = it.k.token_stride * 2;
  extremes<DTYPE> ends;
  ends.clear();
  for (int i = 0; i < (STATS ? 0 : 2); ++i) my_sums[i * THREADS] = make_float4(0, 0, 0, 0);
  for (int pass = 0; pass < passes; ++pass) {
    const bool last_pass = pass == passes - 1;
    const int column0 = 16 * M * (WARPS * pass + column_warp);
    const bool computes = column0 < a.columns;
    const char *k_from =
        static_cast<const char *>(row_of(it.k, first + static_cast<uint32_t>(my_row), head)) +
        16 * my_chunk;
    uint32_t left = a.n - first; /* tokens not yet asked for */
    const auto copy = [&](int slot) {
      copy_stage<C>(k_to + static_cast<uint32_t>(slot * STAGE * CHUNKS * 16), k_from, k_step, left);
      k_from += STAGE * k_step, left -= least(left, STAGE);
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
    __syncthreads(); /* all are done with the pass before */
    for (int i = tid; i < 2 * STAGE * WARPS; i += THREADS) partial[i] = 0;
    copy(0);
    if (!STATS && tid < 16 * M * WARPS)
      reference[tid] = reference_of(a, it, head, h, 16 * M * WARPS * pass + tid);
    if (!STATS) __syncthreads();
    /* queries; rows g and g + 8 of each 16 columns */
    uint4 q[M][2][C];
    float2 top[M], sum[M]; /* of these rows; else top is their reference */
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float r[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int column = column0 + 16 * m + 8 * u + g;
        const bool real = column < a.group * a.window;
        const int i = real ? column / a.group : 0, j = real ? column - i * a.group : 0;
        const uint16_t *row = static_cast<const uint16_t *>(
            row_of(it.q, static_cast<uint32_t>(i), head * a.group + j));
#pragma unroll
        for (int c = 0; c < C; ++c) {
          q[m][u][c] = *reinterpret_cast<const uint4 *>(row + 32 * c + 8 * t);
          if (!real) q[m][u][c] = make_uint4(0, 0, 0, 0);
        }
        r[u] = STATS ? -1e30f : reference[16 * (M * column_warp + m) + 8 * u + g];
      }
      top[m] = make_float2(r[0], r[1]), sum[m] = make_float2(0, 0);
    }
    for (int stage = 0; stage < n_stages + (STATS ? 0 : 1); ++stage) {
      const int slot = stage & 1;
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads(); /* this stage is there, and all are done with the one before */
      if (stage + 1 < n_stages) copy(slot ^ 1);
      const uint32_t t0 = first + static_cast<uint32_t>(STAGE * stage);
      const uint4 *k_stage = k_ring + slot * STAGE * CHUNKS;
      if (computes && stage < n_stages) {
        const bool edge = t0 + STAGE > seen || t0 + STAGE > end;
        const uint4 *even = k_stage + g * CHUNKS + t + odd, *uneven = even - 2 * odd;
        float *parts = partial + slot * STAGE * WARPS + column_warp +
                       (8 * (g & 1) + 2 * t + (g >> 1 & 1)) * WARPS;
        const auto take = [&](float(&y)[2][M][4], int n) {
          if (STATS) {
            over_tokens<M>(y, top, sum, a.scale);
          } else {
            const float w = over_columns<M>(y, top, a.scale);
            if (g < 4) parts[n * WARPS] = w;
          }
        };
        int n = 16 * token_warp;
        const int apart = 16 * token_warps;
        float y[2][M][4];
        if (edge) {
          for (; n < STAGE; n += apart) {
            products<C, BF16>(y, q, even + n * CHUNKS, uneven + n * CHUNKS);
            hide<M>(a, y, t0 + static_cast<uint32_t>(n + 2 * t), column0 + g, end, seen);
            take(y, n);
          }
        } else if (n < STAGE) { /* the next products are on their way while these are taken */
          products<C, BF16>(y, q, even + n * CHUNKS, uneven + n * CHUNKS);
          for (; n + apart < STAGE; n += apart) {
            float z[2][M][4];
            products<C, BF16>(z, q, even + (n + apart) * CHUNKS, uneven + (n + apart) * CHUNKS);
            take(y, n);
#pragma unroll
            for (int p = 0; p < 2; ++p)
#pragma unroll
              for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) y[p][m][i] = z[p][m][i];
          }
          take(y, n);
        }
      }
      const auto load_sums = [&](float(&to)[8], int at) {
        const float4 x = my_sums[at * THREADS], y = my_sums[(at + 1) * THREADS];
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        to[4] = y.x, to[5] = y.y, to[6] = y.z, to[7] = y.w;
      };
      const auto store_sums = [&](const float(&from)[8], int at) {
        my_sums[at * THREADS] = make_float4(from[0], from[1], from[2], from[3]);
        my_sums[(at + 1) * THREADS] = make_float4(from[4], from[5], from[6], from[7]);
      };
      if (!STATS && last_pass && has_rows && stage < n_stages) {
        float square[8];
        load_sums(square, 0);
#pragma unroll
        for (int i = 0; i < STAGE; i += ROWS)
          if (STAGE % ROWS == 0 || my_row + i < STAGE)
            add_chunk<DTYPE, true>(square, k_stage[my_k + i * CHUNKS], 1, &ends);
        store_sums(square, 0);
      }
      if (!STATS && stage > 0) { /* weights of the stage before */
        const uint32_t at = t0 - STAGE + threadIdx.x;
        float *mean = a.mean + static_cast<size_t>(h) * a.n + at;
        if (tid < STAGE && at < end)
          *mean = weight_of(partial + (slot ^ 1) * STAGE * WARPS, tid, column_warps) +
                  (pass > 0 ? *mean : 0);
      }
    }
    if (STATS) {
      /* the lanes t, and the warps that share the columns, add up what they have */
      float2 *all = reinterpret_cast<float2 *>(rdkv_cuda_compress_memory);
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads();
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const float x = u ? top[m].y : top[m].x;
          float s = u ? sum[m].y : sum[m].x, most = x;
          for (int d = 1; d < 4; d <<= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, d));
          s *= exp2_fast(x - most);
          for (int d = 1; d < 4; d <<= 1) s += __shfl_xor_sync(FULL, s, d);
          if (t == 0) all[warp * 16 * M + 16 * m + 8 * u + g] = make_float2(most, s);
        }
      __syncthreads();
      const int column = 16 * M * WARPS * pass + tid;
      if (tid < 16 * M * column_warps && column < a.columns) {
        float2 x = all[tid];
        for (int w = 1; w < token_warps; ++w) {
          const float2 y = all[w * column_warps * 16 * M + tid];
          const float most = fmaxf(x.x, y.x);
          x = make_float2(most, x.y * exp2_fast(x.x - most) + y.y * exp2_fast(y.x - most));
        }
        const size_t part = static_cast<size_t>(h) * static_cast<size_t>(a.splits) + blockIdx.x;
        a.stats[part * static_cast<size_t>(a.columns) + static_cast<size_t>(column)] = x;
      }
    }
  }
  if (!STATS) {
    bool good = true;
    if (BF16) {
      const float2 low = ends.lowest(), high = ends.highest();
      good = in_range(low.x) && in_range(low.y) && in_range(high.x) && in_range(high.y);
    } else { /* what is no half makes sums that are no numbers */
      float all = 0;
      for (int i = 0; i < 2; ++i) {
        const float4 x = my_sums[i * THREADS];
        all += (x.x + x.y) * 0 + (x.z + x.w) * 0;
      }
      good = all == 0;
    }
    if (!good) fail(a.status, RDKV_ERR_NONFINITE);
    const size_t part = static_cast<size_t>(h) * static_cast<size_t>(a.splits) + blockIdx.x;
    float *sums = reinterpret_cast<float *>(rdkv_cuda_compress_memory); /* [ROWS][32 C] */
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    if (has_rows)
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float4 *>(&sums[my_row * 32 * C + 8 * my_chunk + 4 * i]) =
            my_sums[i * THREADS];
    __syncthreads();
    if (tid < 32 * C) {
      float s = 0;
      for (int r = 0; r < ROWS; ++r) s += sums[r * 32 * C + tid];
      a.square[part * (32 * C) + static_cast<size_t>(tid)] = s;
    }
  }
}

/* The same on Hopper, where a program is built for sm_90a: groups of four warps multiply out of
   shared memory. Tokens are A, 64 at a time, 128 columns of queries B, so that a lane has the
   logits of two tokens and a quarter of the columns. Each group has its own tiles and two slots for
   them, and they take turns to multiply: while one does, the others take exponentials. Of more than
   128 columns a tile meets two sets, one after the other, before it goes, where both have room.
   Rows lie in pieces of 128 bytes (64 channels), 16-byte chunks swizzled by the row. Elsewhere it
   is empty, and known to the host by its launch bounds. */
enum { GROUP_TILE = 64, GROUP_COLUMNS = 128 };
__host__ __device__ constexpr int groups_of(int k_dim, bool stats, int sets) {
  return k_dim > 128 ? 2 : stats && sets > 1 ? 3 : 4; /* 3: sums take 32 registers a set */
}
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RDKV_CUDA__GROUP_THREADS(k_dim, stats, sets) 128 * groups_of(k_dim, stats, sets)
#else
#define RDKV_CUDA__GROUP_THREADS(k_dim, stats, sets) 32
#endif

/* Bytes of shared memory: queries, the groups' slots for K, references, warps' sums, alignment. */
static size_t group_shared(int k_dim, int n_groups, int sets) {
  const size_t groups = static_cast<size_t>(n_groups),
               columns = static_cast<size_t>(sets) * GROUP_COLUMNS;
  return (columns + 2 * groups * GROUP_TILE) * 2 * static_cast<size_t>(k_dim) +
         5 * groups * columns * sizeof(float) + 1024;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* The lower half of what describes rows of 128 bytes from `at` on, swizzled; groups of 8 rows are
   1024 bytes apart, says the upper half, which is the same everywhere. */
__device__ __forceinline__ uint32_t describe(uint32_t at) { return at >> 4 | 1u << 16; }
__device__ __forceinline__ u64 described(uint32_t lower) {
  return static_cast<u64>(64u | 1u << 30) << 32 | lower;
}
#define RDKV_CUDA__8(to, i)                                                                     \
  to(y[i]), to(y[i + 1]), to(y[i + 2]), to(y[i + 3]), to(y[i + 4]), to(y[i + 5]), to(y[i + 6]), \
      to(y[i + 7])
#define RDKV_CUDA__64(to)                                                               \
  RDKV_CUDA__8(to, 0), RDKV_CUDA__8(to, 8), RDKV_CUDA__8(to, 16), RDKV_CUDA__8(to, 24), \
      RDKV_CUDA__8(to, 32), RDKV_CUDA__8(to, 40), RDKV_CUDA__8(to, 48), RDKV_CUDA__8(to, 56)
template <bool BF16, bool ADD>
__device__ __forceinline__ void group_mma(float (&y)[64], uint32_t a, uint32_t b) {
#define RDKV_CUDA__GROUP_MMA(type, to, add)                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                       \
               " {"                                                                               \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
               "}, %64, %65, " add ", 1, 1, 0, 0;"                                                \
               : RDKV_CUDA__64(to)                                                                \
               : "l"(described(a)), "l"(described(b)))
  if (BF16 && ADD)
    RDKV_CUDA__GROUP_MMA("bf16", "+f", "1");
  else if (BF16)
    RDKV_CUDA__GROUP_MMA("bf16", "=f", "0");
  else if (ADD)
    RDKV_CUDA__GROUP_MMA("f16", "+f", "1");
  else
    RDKV_CUDA__GROUP_MMA("f16", "=f", "0");
#undef RDKV_CUDA__GROUP_MMA
}
/* Until all products are there. */
__device__ __forceinline__ void group_wait(float (&y)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : RDKV_CUDA__64("+f") : : "memory");
}
#undef RDKV_CUDA__64
#undef RDKV_CUDA__8

/* Adds up 2 M values over lanes M apart, or takes the larger ones: each lane keeps M of them. */
template <int M>
__device__ __forceinline__ void halve(float (&x)[32], bool largest) {
  const bool upper = threadIdx.x & M;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    const float keep = upper ? x[i + M] : x[i],
                take = __shfl_xor_sync(FULL, upper ? x[i] : x[i + M], M);
    x[i] = largest ? fmaxf(keep, take) : keep + take;
  }
}
/* Barriers: 1 to 4 of the groups, 5 to 8 of a group and the one whose turn is before it. */
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
__device__ __forceinline__ void turn_wait(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(group + 5) : "memory");
}
__device__ __forceinline__ void turn_pass(int group, int groups) {
  asm volatile("bar.arrive %0, 256;" ::"r"((group + 1) % groups + 5) : "memory");
}
#endif

/* A is k_dim / 64. */
template <int A, bool BF16, bool STATS, int SETS>
__global__ void __launch_bounds__(RDKV_CUDA__GROUP_THREADS(64 * A, STATS, SETS), 1)
    group_kernel(score_args a, const __grid_constant__ item_list list) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  enum {
    GROUPS = groups_of(64 * A, STATS, SETS),
    CHUNKS = 8 * A,      /* of 16 bytes in a row */
    ROWS = 128 / CHUNKS, /* a thread copies, and squares, one chunk of every ROWS-th row */
    COLUMNS = SETS * GROUP_COLUMNS,
    Q_PART = COLUMNS * 128, /* bytes of 64 channels of the queries, */
    STEP = GROUPS * GROUP_TILE,
    K_PART = GROUP_TILE * 128, /* of a tile */
    DTYPE = BF16 ? RDKV_BF16 : RDKV_F16
  };
  extern __shared__ uint4 rdkv_cuda_compress_memory[];
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.z) * a.heads + head;
  const int group = __shfl_sync(FULL, tid >> 7, 0), warp = tid >> 5 & 3;
  const int lane = tid & 31, g = lane >> 2, t = lane & 3;
  const item &it = list.at[blockIdx.z];
  const uint32_t memory =
      static_cast<uint32_t>(__cvta_generic_to_shared(rdkv_cuda_compress_memory));
  const uint32_t q_at = (memory + 1023) & ~1023u;
  uint8_t *const q_rows = reinterpret_cast<uint8_t *>(rdkv_cuda_compress_memory) + (q_at - memory);
  uint8_t *const k_rows = q_rows + A * Q_PART + group * (2 * A * K_PART);
  const uint32_t k_at = q_at + static_cast<uint32_t>(A * Q_PART + group * (2 * A * K_PART));
  float *const references =
      reinterpret_cast<float *>(q_rows + A * Q_PART + GROUPS * 2 * A * K_PART);
  float *const sums = references + GROUPS * COLUMNS; /* [4 GROUPS][columns] */
  /* a group's references, in the order in which its lanes take them */
  float *const reference = references + (STATS ? group * COLUMNS : 0);
  const auto order = [](int c) {
    return (c >> 4) * 16 + (c >> 1 & 3) * 4 + (c >> 3 & 1) * 2 + (c & 1);
  };
  const uint32_t first = blockIdx.x * a.split, end = least(first + a.split, a.n);
  const int passes = (a.columns - 1) / COLUMNS + 1;
  const int my_row = (tid & 127) / CHUNKS, my_chunk = tid % CHUNKS;
  const int k_step = step_of(it.k);
  const uint32_t of_q = describe(q_at), of_k = describe(k_at);
  const size_t part = static_cast<size_t>(h) * static_cast<size_t>(a.splits) + blockIdx.x;
  const auto place = [](int row, int chunk) {
    return static_cast<uint32_t>(row * 128 + ((chunk ^ row) & 7) * 16);
  };
  float square[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  const u64 policy = evict_first();
  extremes<DTYPE> ends;
  ends.clear();
  let_next_launch();
  /* STATS takes the first token's logits as references; where a sum then overflows it goes through
     all once more for the largest logits, and again with these (turns 1 and 2) */
  int turn = 0;
  if (group == GROUPS - 1) turn_pass(group, GROUPS); /* the first one's turn */
  for (int pass = 0; pass < passes;) {
    const int column0 = COLUMNS * pass;
    uint32_t t0 = first + static_cast<uint32_t>(GROUP_TILE * group);
    const char *k_from =
        static_cast<const char *>(row_of(it.k, t0 + static_cast<uint32_t>(my_row), head)) +
        16 * my_chunk;
    const auto copy = [&](int slot, uint32_t token) {
      const uint32_t to = k_at + static_cast<uint32_t>(slot * A * K_PART + my_chunk / 8 * K_PART);
      if (token + GROUP_TILE <= end) {
#pragma unroll
        for (int i = 0; i < GROUP_TILE; i += ROWS)
          copy_16_once(to + place(my_row + i, my_chunk), k_from + i * k_step, policy);
      } else if (token < end) {
#pragma unroll 1
        for (int i = 0; i < GROUP_TILE; i += ROWS) {
          const bool real = token + static_cast<uint32_t>(my_row + i) < end;
          copy_16(to + place(my_row + i, my_chunk), k_from + (real ? i : -my_row) * k_step, real);
        }
      }
      k_from += STEP * static_cast<ptrdiff_t>(k_step);
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
    if (pass > 0 || turn > 0) __syncthreads(); /* all are done with the pass before */
    copy(0, t0);
#pragma unroll 2
    for (int i = tid; i < COLUMNS * CHUNKS; i += 128 * GROUPS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS, column = column0 + row;
      const bool real = column < a.group * a.window;
      const int query = real ? query_of(a, column) : 0, of = real ? column - query * a.group : 0;
      copy_16(q_at + static_cast<uint32_t>(chunk / 8 * Q_PART) + place(row, chunk),
              static_cast<const char *>(
                  row_of(it.q, static_cast<uint32_t>(query), head * a.group + of)) +
                  16 * chunk,
              real);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (!STATS) wait_for_launches(); /* for STATS' */
    if (!STATS)
#pragma unroll 1
      for (int c = tid; c < (group == 0 ? COLUMNS : 0); c += 128)
        reference[order(c)] = reference_of(a, it, head, h, column0 + c);
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();    /* queries and references are there */
    copy(1, t0 + STEP); /* not before, or all would wait for it */
    float sum[SETS][32];
    if (STATS)
#pragma unroll
      for (int i = 0; i < 32 * SETS; ++i) sum[i / 32][i % 32] = turn == 1 ? -1e30f : 0;
    for (int slot = 0; t0 < end; t0 += STEP, slot ^= 1) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      if (!STATS && pass == 0) { /* what this thread has copied */
        const uint8_t *mine = k_rows + slot * A * K_PART + my_chunk / 8 * K_PART;
#pragma unroll
        for (int i = 0; i < GROUP_TILE; i += ROWS)
          add_chunk<DTYPE, true>(
              square, *reinterpret_cast<const uint4 *>(mine + place(my_row + i, my_chunk)), 1,
              &ends);
      }
      float before = 0; /* weights of the sets before */
#pragma unroll
      for (int set = 0; set < SETS; ++set) {
        float y[64]; /* of token 16 warp + g + 8 (i / 2 mod 2), column 8 (i / 4) + 2 t + i mod 2 */
        turn_wait(group); /* the tile is there, and it is this group's turn to multiply */
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int c = 0; c < 4 * A; ++c) {
          const uint32_t k = of_k + static_cast<uint32_t>(
                                        (slot * A * K_PART + c / 4 * K_PART + c % 4 * 32) >> 4),
                         q = of_q +
                             static_cast<uint32_t>(
                                 (c / 4 * Q_PART + set * GROUP_COLUMNS * 128 + c % 4 * 32) >> 4);
          if (c == 0)
            group_mma<BF16, false>(y, k, q);
          else
            group_mma<BF16, true>(y, k, q);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (!STATS) turn_pass(group, GROUPS);
        group_wait(y);
        if (STATS) turn_pass(group, GROUPS);
        if (set == SETS - 1) {
          group_barrier(group); /* all are done with the tile */
          copy(slot, t0 + 2 * STEP);
        }
        const uint32_t token = t0 + static_cast<uint32_t>(16 * warp + g);
        if (t0 + GROUP_TILE > a.seen || t0 + GROUP_TILE > end) {
#pragma unroll
          for (int u = 0; u < 2; ++u) { /* columns that do not count: those before from */
            const uint32_t at = token + static_cast<uint32_t>(8 * u);
            const int from = at >= end      ? GROUP_COLUMNS
                             : at <= a.seen ? 0
                                            : static_cast<int>(at - a.seen) * a.group - column0 -
                                                  GROUP_COLUMNS * set;
#pragma unroll
            for (int i = 0; i < 64; i += 4)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (2 * i + 2 * t + e < from) y[i + 2 * u + e] = -3e38f;
          }
        }
        const float4 *r = reinterpret_cast<const float4 *>(reference + GROUP_COLUMNS * set) + t;
        if (STATS) {
          if (turn == 0 && t0 < first + STEP) {
            if (warp == 0 && g == 0)
#pragma unroll
              for (int i = 0; i < 64; i += 4)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                  reference[GROUP_COLUMNS * set + order(2 * i + 2 * t + e)] =
                      fmaxf(y[i + e] * a.scale, -1e30f);
            group_barrier(group);
          }
          if (turn == 1) {
#pragma unroll
            for (int i = 0; i < 64; i += 4)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                sum[set][i / 2 + e] =
                    fmaxf(sum[set][i / 2 + e], fmaxf(y[i + e], y[i + 2 + e]) * a.scale);
          } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const float4 x = r[4 * i];
              const float from[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int at = 8 * i + e / 2 * 4 + e % 2;
                sum[set][4 * i + e] +=
                    exp2_fast(y[at] * a.scale - from[e]) + exp2_fast(y[at + 2] * a.scale - from[e]);
              }
            }
          }
        } else {
          float w[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float4 x = r[4 * i];
            const float from[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
              for (int u = 0; u < 2; ++u)
                w[u][e % 2] += exp2_fast(y[8 * i + e / 2 * 4 + 2 * u + e % 2] * a.scale - from[e]);
          }
          /* over the lanes t; even ones end with the first of the two tokens */
          const float low = w[0][0] + w[0][1], high = w[1][0] + w[1][1];
          float all = (t & 1 ? high : low) + __shfl_xor_sync(FULL, t & 1 ? low : high, 1);
          all += __shfl_xor_sync(FULL, all, 2);
          const uint32_t at = token + static_cast<uint32_t>(8 * t);
          float *to = a.mean + static_cast<size_t>(h) * a.n + at;
          if (t < 2 && at < end) {
            if (set > 0 || pass > 0) all += set > 0 ? before : *to;
            if (set == SETS - 1) *to = all;
          }
          before = all;
        }
      }
    }
    if (t0 - static_cast<uint32_t>(GROUP_TILE * group) < end) /* others have tiles left */
      for (int set = 0; set < SETS; ++set) turn_wait(group), turn_pass(group, GROUPS);
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (STATS) { /* over the lanes g, which end with 4 columns each, and the warps */
      bool good = true;
#pragma unroll
      for (int i = 0; i < 32 * SETS; ++i) good &= sum[i / 32][i % 32] < 1e37f;
      const bool again = __syncthreads_or(!good) && turn == 0;
#pragma unroll
      for (int set = 0; set < SETS; ++set) {
        float(&of)[32] = sum[set];
        halve<16>(of, turn == 1), halve<8>(of, turn == 1), halve<4>(of, turn == 1);
        float *to = sums + (4 * group + warp) * COLUMNS + GROUP_COLUMNS * set + 16 * g + 2 * t;
        to[0] = of[0], to[1] = of[1], to[8] = of[2], to[9] = of[3];
      }
      __syncthreads();
      for (int c = tid; c < (group == 0 ? COLUMNS : 0); c += 128) { /* see below */
        float x[GROUPS], top = -1e30f, all = 0;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
          x[i] = sums[4 * i * COLUMNS + c];
#pragma unroll
          for (int w = 1; w < 4; ++w) {
            const float more = sums[(4 * i + w) * COLUMNS + c];
            x[i] = turn == 1 ? fmaxf(x[i], more) : x[i] + more;
          }
          const float of = turn == 1 ? x[i] : references[i * COLUMNS + order(c)];
          if (x[i] > 0 || turn == 1) top = fmaxf(top, of);
        }
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
          float &of = references[i * COLUMNS + order(c)];
          if (turn == 1)
            of = top;
          else if (x[i] > 0)
            all += x[i] * exp2_fast(of - top);
        }
        if (column0 + c < a.columns && turn != 1)
          a.stats[part * static_cast<size_t>(a.columns) + static_cast<size_t>(column0 + c)] =
              make_float2(top, all);
      }
      turn = again ? 1 : turn == 1 ? 2 : 0;
      pass += turn == 0;
    } else {
      ++pass;
    }
  }
  if (group == 0) turn_wait(group); /* or it would be left over */
  if (STATS) return;
  bool good = true;
  if (BF16) {
    const float2 low = ends.lowest(), high = ends.highest();
    good = in_range(low.x) && in_range(low.y) && in_range(high.x) && in_range(high.y);
  } else { /* what is no half makes sums that are no numbers */
    float all = 0;
    for (int i = 0; i < 8; ++i) all += square[i] * 0;
    good = all == 0;
  }
  if (!good) fail(a.status, RDKV_ERR_NONFINITE);
  float *rows = reinterpret_cast<float *>(q_rows); /* [GROUPS * ROWS][64 A] */
  __syncthreads();
  for (int i = 0; i < 8; ++i) rows[(group * ROWS + my_row) * 64 * A + 8 * my_chunk + i] = square[i];
  __syncthreads();
  if (group > 0) return; /* racecheck sees no order from the first group's writes to the others */
  for (int d = tid; d < 64 * A; d += 128) {
    float s = 0;
    for (int r = 0; r < GROUPS * ROWS; ++r) s += rows[r * 64 * A + d];
    a.square[part * (64 * A) + static_cast<size_t>(d)] = s;
  }
#else
  (void)a, (void)list;
#endif
}

/* Sum of V weighted by the attention, a split each; any dtype and stride. */
static __global__ void __launch_bounds__(THREADS)
    out_kernel(score_args a, const __grid_constant__ item_list list) {
  __shared__ float sums[THREADS];
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.z) * a.heads + head;
  const item &it = list.at[blockIdx.z];
  const uint32_t first = blockIdx.x * a.v_split, end = least(first + a.v_split, a.n);
  const ptrdiff_t stride = it.v.dim_stride ? it.v.dim_stride : 1;
  const int n_rows = THREADS / a.v_dim, row = tid / a.v_dim, d = tid - row * a.v_dim;
  const float *mean = a.mean + static_cast<size_t>(h) * a.n;
  let_next_launch();
  wait_for_launches();
  float sum = 0;
  bool bad = false;
#pragma unroll 4
  for (uint32_t t = first + static_cast<uint32_t>(row); t < (row < n_rows ? end : 0);
       t += static_cast<uint32_t>(n_rows)) {
    const float x = element(row_of(it.v, t, head), it.v.dtype, d * stride);
    bad |= !in_range(x);
    sum += mean[t] * x;
  }
  if (bad) fail(a.status, RDKV_ERR_NONFINITE);
  sums[tid] = sum;
  __syncthreads();
  if (tid >= a.v_dim) return;
  for (int r = 1; r < n_rows; ++r) sum += sums[r * a.v_dim + tid];
  a.out[(static_cast<size_t>(h) * static_cast<size_t>(a.v_splits) + blockIdx.x) *
            static_cast<size_t>(a.v_dim) +
        static_cast<size_t>(tid)] = sum;
}

/* The same of dense 16-bit rows, 16 bytes a thread. All blocks are near each other at a time, so
   that the last tokens are in the L2 in the end. */
template <bool BF16>
__global__ void __launch_bounds__(THREADS)
    out_rows_kernel(score_args a, const __grid_constant__ item_list list) {
  enum { DTYPE = BF16 ? RDKV_BF16 : RDKV_F16, BATCH = 4 }; /* rows; one is on its way */
  __shared__ float sums[8 * THREADS];
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.z) * a.heads + head;
  const item &it = list.at[blockIdx.z];
  const int chunks = a.v_dim / 8, row = tid / chunks, chunk = tid - row * chunks;
  const uint32_t n_rows = static_cast<uint32_t>(THREADS / chunks);
  const uint32_t step = gridDim.x * BATCH * n_rows;
  const float *mean = a.mean + static_cast<size_t>(h) * a.n;
  let_next_launch();
  wait_for_launches();
  const char *const from = static_cast<const char *>(row_of(it.v, 0, head)) + 16 * chunk;
  const ptrdiff_t step_of_v = step_of(it.v);
  float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  extremes<DTYPE> ends;
  ends.clear();
  const auto ask = [&](uint32_t t, uint4(&x)[BATCH], float(&w)[BATCH]) {
#pragma unroll
    for (uint32_t i = 0; i < BATCH; ++i, t += n_rows) {
      x[i] = make_uint4(0, 0, 0, 0), w[i] = 0;
      if (t >= a.n) continue;
      x[i] = __ldcs(reinterpret_cast<const uint4 *>(from + static_cast<ptrdiff_t>(t) * step_of_v));
      w[i] = mean[t];
    }
  };
  const auto add = [&](const uint4(&x)[BATCH], const float(&w)[BATCH]) {
#pragma unroll
    for (uint32_t i = 0; i < BATCH; ++i) add_chunk<DTYPE, false>(sum, x[i], w[i], &ends);
  };
  if (static_cast<uint32_t>(row) < n_rows) {
    uint4 x[BATCH], y[BATCH];
    float v[BATCH], w[BATCH];
    uint32_t t = blockIdx.x * BATCH * n_rows + static_cast<uint32_t>(row);
    ask(t, x, v);
    for (; t < a.n; t += 2 * step) {
      ask(t + step, y, w), add(x, v);
      ask(t + 2 * step, x, v), add(y, w);
    }
  }
  bool good = true;
  if (BF16) {
    const float2 low = ends.lowest(), high = ends.highest();
    good = in_range(low.x) && in_range(low.y) && in_range(high.x) && in_range(high.y);
  } else { /* what is no half makes sums that are no numbers, even with weight 0 */
    float all = 0;
    for (int i = 0; i < 8; ++i) all += sum[i] * 0;
    good = all == 0;
  }
  if (!good) fail(a.status, RDKV_ERR_NONFINITE);
  if (static_cast<uint32_t>(row) < n_rows)
    for (int i = 0; i < 8; ++i) sums[row * a.v_dim + 8 * chunk + i] = sum[i];
  __syncthreads();
  if (tid >= a.v_dim) return;
  float s = 0;
  for (uint32_t r = 0; r < n_rows; ++r) s += sums[static_cast<int>(r) * a.v_dim + tid];
  a.out[(static_cast<size_t>(h) * static_cast<size_t>(a.v_splits) + blockIdx.x) *
            static_cast<size_t>(a.v_dim) +
        static_cast<size_t>(tid)] = s;
}

/* Sums over the window's rows of a head, of squares or of values by their queries' weights, for the
   32 channels from d0 on; all threads of a block call it, warp 0 gets them. */
template <bool SQUARE>
__device__ __forceinline__ double over_rows(const score_args &a, const rdkv_tensor &x, int d0,
                                            int dim, int head, const float *weight, double *sums) {
  enum { AHEAD = 16 };
  const int tid = static_cast<int>(threadIdx.x), used = a.group * a.window, d = d0 + (tid & 31);
  const ptrdiff_t stride = x.dim_stride ? x.dim_stride : 1;
  double sum = 0;
  bool bad = false;
  for (int c0 = tid >> 5; c0 < (d < dim ? used : 0); c0 += AHEAD * WARPS) {
    uint32_t raw[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int c = c0 + k * WARPS, i = query_of(a, c);
      raw[k] = 0;
      if (c < used)
        raw[k] = raw_element(row_of(x, static_cast<uint32_t>(i), (head - i) * a.group + c), x.dtype,
                             d * stride);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const float y = value_of(raw[k], x.dtype);
      const int c = c0 + k * WARPS;
      bad |= !in_range(y);
      if (c < used)
        sum += static_cast<double>(SQUARE ? y : weight[query_of(a, c)]) * static_cast<double>(y);
    }
  }
  if (bad) fail(a.status, RDKV_ERR_NONFINITE);
  sums[tid] = sum;
  __syncthreads();
  for (int w = 1; w < WARPS && tid < 32; ++w) sum += sums[32 * w + tid];
  return sum;
}

/* Sum over the splits of a head's parts [splits][dim]; all threads of a block call it, thread d <
   dim gets column d. */
__device__ __forceinline__ double over_splits(const float *parts, int splits, int dim, int h,
                                              double *sums) {
  const int tid = static_cast<int>(threadIdx.x), apart = THREADS / dim, first = tid / dim;
  const float *from =
      parts + static_cast<size_t>(h) * static_cast<size_t>(splits) * static_cast<size_t>(dim);
  double sum = 0;
  for (int j0 = first; j0 < (first < apart ? splits : 0); j0 += 16 * apart) {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      x[i] = j0 + i * apart < splits ? from[(j0 + i * apart) * dim + tid - first * dim] : 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += static_cast<double>(x[i]);
  }
  sums[tid] = sum;
  __syncthreads();
  for (int i = 1; i < apart && tid < dim; ++i) sum += sums[i * dim + tid];
  return sum;
}

/* The last launch: the attention pooled, EACH tokens a thread, and older widths cleared. The first
   blocks, of all heads, have the channels: the mean output and mean squares of the queries, 32 a
   block, which may not have to wait for the launches before, then those of K. */
static __host__ __device__ __forceinline__ int channel_blocks(const score_args &a) {
  return 1 + (a.k_dim + 31) / 32 + (a.v_dim + 31) / 32;
}
template <int EACH>
__global__ void __launch_bounds__(THREADS, 4)
    pool_kernel(score_args a, const __grid_constant__ item_list list) {
  enum { TOKENS = EACH * THREADS };
  __shared__ float near[TOKENS + 2 * POOL];
  __shared__ float see[MAX_WINDOW]; /* weight of query i, or of queries i and later */
  __shared__ double sums[THREADS];
  const int head = static_cast<int>(blockIdx.x), tid = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.z) * a.heads + head;
  const item &it = list.at[blockIdx.z];
  const size_t thread = (blockIdx.y * gridDim.x + blockIdx.x) * static_cast<size_t>(THREADS) +
                        threadIdx.x,
               n_threads = static_cast<size_t>(gridDim.y) * gridDim.x * THREADS;
  const int block = static_cast<int>(blockIdx.y), of_k = channel_blocks(a) - 1;
  const int of_q = (a.v_dim + 31) / 32;
  const int seen = static_cast<int>(a.seen), last = static_cast<int>(a.n) - 1;
  const int t0 = (block - channel_blocks(a)) * TOKENS;
  const int half = (a.pool - 1) / 2 > last ? last : (a.pool - 1) / 2;
  const double used = static_cast<double>(a.group) * a.window;
  const bool edge = t0 + TOKENS + half > seen; /* not all queries see all of these */
  clear_bytes(it.v_bits, static_cast<size_t>(a.heads) * a.n, thread, n_threads);
  clear_bytes(it.k_bits, static_cast<size_t>(a.heads * a.k_dim), thread, n_threads);
  if (block >= of_q && block < of_k) {
    const int d = 32 * (block - of_q);
    const double sum = over_rows<true>(a, it.q, d, a.k_dim, head, see, sums);
    if (tid < 32 && d + tid < a.k_dim)
      it.q_square[head * a.k_dim + d + tid] = static_cast<float>(sum / used);
    return;
  }
  if (t0 < 0 || edge) {
    for (int i = tid; i < a.window; i += THREADS) see[i] = query_weight(a, i);
    __syncthreads();
  }
  if (block < of_q && it.out.data) {
    const int d = 32 * block;
    const double sum = over_rows<false>(a, it.out, d, a.v_dim, head, see, sums);
    if (tid < 32 && d + tid < a.v_dim)
      it.mean_out[head * a.v_dim + d + tid] = static_cast<float>(sum / used);
    return;
  }
  wait_for_launches();
  if (block == of_k) {
    const double sum = over_splits(a.square, a.splits, a.k_dim, h, sums);
    if (tid < a.k_dim) it.k_square[head * a.k_dim + tid] = static_cast<float>(sum / a.n);
    return;
  }
  if (t0 < 0) {
    if (block > 0 || !a.out) return;
    const double sum = over_splits(a.out, a.v_splits, a.v_dim, h, sums);
    if (tid < a.v_dim) it.mean_out[head * a.v_dim + tid] = static_cast<float>(sum / used);
    return;
  }
  if (edge) {
    if (tid == 0) {
      float sum = 0;
#pragma unroll 8
      for (int i = a.window - 1; i >= 0; --i) see[i] = sum += see[i];
    }
    __syncthreads();
  }
  const float *mean = a.mean + static_cast<size_t>(h) * a.n;
#pragma unroll 4
  for (int i = tid; i < TOKENS + 2 * half; i += THREADS) {
    const int t = t0 + i - half, at = t < 0 ? -t : t > last ? last - (t - last) : t;
    near[i] = at >= 0 && at <= last ? mean[at] / (at > seen ? see[at - seen] : a.all) : 0;
  }
  __syncthreads();
  float *to = it.token + static_cast<size_t>(head) * a.n;
#pragma unroll
  for (int i = tid; i < TOKENS; i += THREADS) {
    float s = 0;
    for (int j = 0; j <= 2 * half; ++j) s += near[i + j];
    if (t0 + i <= last) to[t0 + i] = s / static_cast<float>(2 * half + 1);
  }
}

/* ---- allocate : one kernel, a cluster or cooperative, whose blocks all go through the steps of
   rdkv__solve */

enum {
  SOLVE = 512,            /* threads of a block, as many as there are fine bins */
  FINE = 512,             /* as RDKV__FINE */
  HIGH = 5,               /* as RDKV__HIGH */
  FEW = 2048,             /* as RDKV__FEW */
  BATCH = 2,              /* tokens that a thread asks for at once */
  UNITS = SOLVE,          /* of a head at most */
  NEAR = 8192,            /* tokens of a list whose slopes are kept */
  BUCKETS = 512,          /* by which a list is searched */
  SOLVE_WORDS = 4 * BINS, /* of shared memory beside the distortions */
  TEAM = 16,              /* blocks of a cluster that solves by itself, at most */
  TEAM_PART = 2048        /* tokens from which a block has company */
};
static const uint32_t PINNED = 0x7f7fffffu; /* FLT_MAX: what must be kept */

struct layer_view {
  const float *token, *q_square, *k_square, *v_distortion, *k_distortion;
  uint8_t *v_bits, *k_bits;
};

/* Tokens of a unit that are listed, and others that reach level 1.. */
struct unit_count {
  uint32_t listed, sure[4];
};

struct solve_head {
  uint32_t count[5], channels[4], k_tile, k_tokens;
  float k_lambda;     /* K is chosen by these */
  uint32_t pinned[5]; /* tokens that must reach a level */
  uint32_t done;      /* units that have been counted */
  double v, k;        /* predicted */
};

struct solve_state {
  uint32_t barrier, odd;
  double sum[3]; /* used in turn, the next one being cleared */
};

enum { VIEWS = 8 }; /* layers that go with the launch itself */
struct solve_views {
  layer_view view[VIEWS];
};

/* From which weight up, over lambda, a level may be chosen, and from which it is; the bits that it
   has more than the one below. */
struct paper_edges {
  float from[4], sure[4];
  uint32_t width[4];
};

struct solve_args {
  solve_views few;
  layer_view *layers; /* where there are more than VIEWS */
  solve_head *heads;  /* [n_layers][n_kv_heads] */
  uint32_t *bins[3];  /* [heads][BINS], used in turn: counted in, read, cleared */
  u64 *hist[3];       /* [BINS] */
  uint32_t *list;     /* [heads][n] tokens near the threshold, of each unit those it has */
  uint4 *slopes;      /* [heads][least(n, NEAR)] theirs, as far as there is room */
  unit_count *counts; /* [heads][UNITS] */
  uint32_t *tiles;    /* [heads * 4] where there are more than SOLVE, and the costs of one */
  uint8_t *pin;       /* [heads][n] lowest levels, or NULL */
  solve_state *state;
  double *lambda; /* [n_layers] */
  uint32_t *status;
  const uint64_t *given_budget; /* on the device, or NULL */
  const double *device_lambda;  /* likewise */
  uint64_t budget, fixed, most; /* most: no block is larger */
  uint64_t least_head;          /* what a head takes of which nothing is kept */
  double given_lambda, tokens, k_share, max_error, k_bits;
  float eps_k[5], eps_v[5];
  paper_edges edges; /* of eps_v */
  float v_mean;
  uint32_t n, n_heads, n_kv_heads;
  uint32_t stage;         /* there is shared memory for so many tokens */
  uint32_t slice, slices; /* of all heads: see solver */
  int n_layers, k_dim, v_dim, positions, scope;
};

struct solve_pin {
  uint32_t begin, end; /* positions in the sequence */
  float share;         /* of their tokens those with the largest D(0); 1: all */
  int level;
};
struct solve_pins {
  solve_pin pin[64];
};

static __global__ void view_kernel(layer_view *to, solve_views from, int n) {
  if (static_cast<int>(threadIdx.x) < n) to[threadIdx.x] = from.view[threadIdx.x];
}

/* Pins of a head, a block each. */
static __global__ void __launch_bounds__(THREADS)
    pin_kernel(const __grid_constant__ solve_args a, const __grid_constant__ solve_pins pins,
               int n_pins, const uint64_t *token_begin) {
  __shared__ uint32_t digits[256];
  __shared__ u64 scratch[33];
  __shared__ uint32_t found[2], pinned[5];
  const uint32_t head = blockIdx.x, layer = head / a.n_kv_heads, tid = threadIdx.x;
  const layer_view &view = a.n_layers <= VIEWS ? a.few.view[layer] : a.layers[layer];
  const float *d0 = view.v_distortion + static_cast<size_t>(head % a.n_kv_heads) * 5 * a.n;
  uint8_t *level = a.pin + static_cast<size_t>(head) * a.n;
  const uint64_t origin = token_begin ? *token_begin : 0;
  for (int i = 0; i < n_pins; ++i) {
    solve_pin p = pins.pin[i];
    p.begin = p.begin > origin ? least(static_cast<uint32_t>(p.begin - origin), a.n) : 0;
    p.end = p.end > origin ? least(static_cast<uint32_t>(p.end - origin), a.n) : 0;
    const double of = static_cast<double>(p.end - p.begin);
    const uint32_t take =
        least(static_cast<uint32_t>(ceil(static_cast<double>(p.share) * of)), p.end - p.begin);
    uint32_t k = take;
    u64 limit = 0; /* the least key taken; equal D(0) by rising index */
    for (int shift = 56; k < p.end - p.begin && shift >= 0; shift -= 8) {
      __syncthreads();
      digits[tid] = 0;
      __syncthreads();
      for (uint32_t t = p.begin + tid; t < p.end; t += THREADS) {
        const u64 key = static_cast<u64>(__float_as_uint(d0[t])) << 32 | static_cast<uint32_t>(~t);
        if (shift == 56 || key >> (shift + 8) == limit >> (shift + 8))
          atomicAdd(&digits[key >> shift & 255], 1u);
      }
      __syncthreads();
      const uint32_t digit = 255 - tid, here = digits[digit];
      u64 all;
      const u64 above = block_scan(here, scratch, &all);
      if (above < k && above + here >= k) found[0] = digit, found[1] = static_cast<uint32_t>(above);
      __syncthreads();
      limit |= static_cast<u64>(found[0]) << shift, k -= found[1];
    }
    for (uint32_t t = p.begin + tid; t < p.end && take > 0; t += THREADS) {
      const u64 key = static_cast<u64>(__float_as_uint(d0[t])) << 32 | static_cast<uint32_t>(~t);
      if (key >= limit && level[t] < p.level) level[t] = static_cast<uint8_t>(p.level);
    }
    __syncthreads();
  }
  if (tid < 5) pinned[tid] = 0;
  __syncthreads();
  for (uint32_t t = tid; t < a.n; t += THREADS)
    for (int l = 1; l <= level[t]; ++l) atomicAdd(&pinned[l], 1u);
  __syncthreads();
  if (tid < 5) a.heads[head].pinned[tid] = pinned[tid];
}

/* One function has it at a time. */
extern __shared__ uint4 solve_shared[]; /* SOLVE_WORDS; distortions [5][stage] */

/* m floats into shared memory, and zeroes up to the next multiple of 4, by a block; asynchronously.
 */
__device__ __noinline__ void stage_floats(float *to, const float *from, uint32_t m) {
  const bool whole = (reinterpret_cast<uintptr_t>(from) & 15) == 0;
  for (uint32_t t = 4 * threadIdx.x; t < m; t += 4 * SOLVE) {
    if (whole && t + 4 <= m) {
      copy_16(rdkv_cuda__shared_address(to + t), reinterpret_cast<const char *>(from + t));
      continue;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) to[t + i] = t + i < m ? from[t + i] : 0;
  }
}
__device__ __forceinline__ void staged_floats() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* How many bytes K takes in a tile: 4 bits before anything is known, as it is, or chosen anew by
   the threshold and the tokens that all or the bins of the pass before count, or none. */
enum { FRESH, KEEP, BY_BINS, BY_FINE, BY_ALL, BY_NONE };

/* Tokens of a unit of work, and so many units that each block has one if there are no more heads
   than blocks. */
__host__ __device__ inline uint32_t slice_of(uint32_t n, uint32_t n_heads, uint32_t blocks) {
  const uint32_t units = most(blocks / n_heads, 1), rows = n / 32 + (n % 32 > 0);
  return 32 * least(most((rows + units - 1) / units, 1), 1u << 17);
}

__host__ __device__ inline uint32_t slices_of(uint32_t n, uint32_t slice) {
  return n > 0 ? (n + slice - 1) / slice : 1;
}

/* What a token takes to reach a level from the one below, and 1 over what it takes from level to
   level. */
struct v_costs {
  float cost[4], inv[4][5];
};

/* Tokens of a head that a block works on. In shared memory, like all that is looked up often: a
   barrier makes a block forget what it has read from memory. Code that runs once takes its time
   too: whatever is long is a function of its own. */
struct unit {
  uint32_t number, i, k, t0, t1; /* k: which of its head's */
  uint32_t k_tile;               /* that costs are of, or FULL */
  uint32_t k_tokens;             /* K is chosen for so many */
  float k_lambda;                /* and this threshold */
  solve_head *h;
  const float *v, *kd; /* the head's distortions */
  const uint8_t *pin;
  uint8_t *v_bits, *k_bits;
  uint32_t *list;
  uint4 *slopes;
  unit_count *counts;
  v_costs costs;
  alignas(16) float dk[4 * MAX_DIM]; /* as kd */
};

__device__ __forceinline__ unit &solve_unit() {
  __shared__ unit x[1];
  return x[0];
}

__device__ __noinline__ void enter_unit(const solve_args &a, uint32_t first, uint32_t slice,
                                        uint32_t slices, uint32_t u) {
  unit &x = solve_unit();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t i = u / slices, head = first + i, layer = head / a.n_kv_heads;
    const layer_view &view = a.n_layers <= VIEWS ? a.few.view[layer] : a.layers[layer];
    const size_t row = head - layer * a.n_kv_heads, kd = static_cast<size_t>(a.k_dim);
    x.number = u, x.i = i, x.k = u - i * slices, x.t0 = x.k * slice, x.k_tile = FULL;
    x.t1 = least(x.t0 + slice, a.n), x.h = a.heads + head;
    x.v = view.v_distortion + row * 5 * a.n, x.kd = view.k_distortion + row * 4 * kd;
    x.pin = a.pin ? a.pin + static_cast<size_t>(head) * a.n : nullptr;
    x.v_bits = view.v_bits + row * a.n, x.k_bits = view.k_bits + row * kd;
    x.list = a.list + static_cast<size_t>(head) * a.n;
    x.slopes = a.slopes + static_cast<size_t>(head) * least(a.n, NEAR);
    x.counts = a.counts + static_cast<size_t>(head) * UNITS;
  }
  __syncthreads();
  stage_floats(x.dk, x.kd, 4 * static_cast<uint32_t>(a.k_dim));
}

/* By the bytes that K takes in a tile; by at least 16 threads, between barriers. */
__device__ __forceinline__ void set_costs(int v_dim, int positions, uint32_t k_tile, v_costs &c) {
  const uint32_t tid = threadIdx.x, block = static_cast<uint32_t>(pad16(v_dim)) / 16 * 64;
  const uint32_t rest = k_tile + 128 + (positions ? 128u : 0u);
  const uint32_t from = tid / 4, to = tid % 4 + 1;
  if (from >= 4 || from >= to) return;
  /* bytes of a tile at a level, which are exact in floats as parts of a token, too */
  const float step =
      static_cast<float>((block << to) + rest - (from ? (block << from) + rest : 0)) / TILE;
  c.inv[from][to] = __fdiv_rn(1, step);
  if (to == from + 1) c.cost[from] = step;
}

/* All blocks of a launch meet, and see what the others wrote. */
__device__ __noinline__ void solve_sync(uint32_t *counter, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  if (size == gridDim.x) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t seen;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < phase * gridDim.x);
  }
  __syncthreads();
}

/* How many of a head's blocks have got here before, and let see what they wrote. */
__device__ __forceinline__ uint32_t units_before(uint32_t *done) {
  __shared__ uint32_t before[1];
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before[0])
                 : "l"(done)
                 : "memory");
  __syncthreads();
  return before[0];
}

/* block_scan() with memory of its own. */
__device__ __noinline__ u64 solve_scan(u64 x, u64 *total) {
  __shared__ u64 scratch[33];
  return block_scan(x, scratch, total);
}

/* The launch's arguments, in shared memory: a barrier makes a block forget what it has read from
   memory. */
__device__ __forceinline__ solve_args &solve_arguments() {
  __shared__ solve_args x[1];
  return x[0];
}
__device__ __forceinline__ void take_arguments(const solve_args &given) {
  for (uint32_t i = threadIdx.x; i < sizeof given / 4; i += SOLVE)
    reinterpret_cast<uint32_t *>(&solve_arguments())[i] =
        reinterpret_cast<const uint32_t *>(&given)[i];
  __syncthreads();
}

/* Where a block stands. */
struct solver_state {
  uint32_t phase; /* barriers passed */
  uint32_t first, n_heads;
  uint32_t slice;  /* tokens of a unit of work */
  uint32_t slices; /* units of a head */
  bool staged;     /* this block's one unit is in shared memory */
  uint32_t set;    /* of bins */
  uint32_t sums;
  int choose;     /* K at the next pass */
  float chosen;   /* by this threshold */
  uint32_t above; /* and the tokens from this bin up */
  uint32_t each;  /* log2 of the tokens that one of a spectrum stands for */
  bool refused;   /* a distortion is no number >= 0 */
  bool waiting;   /* until the first bins are clear */
  float bias;
  uint32_t round_up;
};

/* The part of the heads that share a budget. */
struct solver : solver_state {
  const solve_args &a;

  __device__ solver() : solver_state(), a(solve_arguments()) {
    set = 2, choose = FRESH, bias = 1;
    part(0, a.n_heads);
  }
  __device__ solver(const solver &other) : solver_state(other), a(solve_arguments()) {}

  __device__ void part(uint32_t at, uint32_t n) {
    const bool again = staged;
    if (again) wait();
    first = at, n_heads = n;
    slice = n == a.n_heads ? a.slice : slice_of(a.n, n, gridDim.x);
    slices = n == a.n_heads ? a.slices : slices_of(a.n, slice);
    staged = slice <= a.stage && n * slices <= gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) solve_unit().number = ~0u;
    __syncthreads();
    if (!staged) return;
    if (blockIdx.x < n * slices) enter(blockIdx.x);
    const unit &x = solve_unit();
    const uint32_t m = blockIdx.x < n * slices ? x.t1 - x.t0 : 0;
    bool bulk = false; /* rows in 16-byte pieces, by one thread */
#if __CUDA_ARCH__ >= 900
    bulk = m > 0 && ((reinterpret_cast<uintptr_t>(x.v) | 4 * a.n) & 15) == 0;
    if (threadIdx.x == 0) {
      const uint32_t barrier = rdkv_cuda__shared_address(&stage_barrier());
      if (again) asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(bulk ? 20 * m : 0)
                   : "memory");
      for (uint32_t l = 0; l < 5 && bulk; ++l)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(rdkv_cuda__shared_address(distortions() + l * slice)),
            "l"(x.v + l * static_cast<size_t>(a.n) + x.t0), "r"(4 * m), "r"(barrier)
            : "memory");
    }
    __syncthreads();
#endif
#pragma unroll 1
    for (uint32_t l = 0; l < 5 && !bulk; ++l)
      stage_floats(distortions() + l * slice, x.v + l * static_cast<size_t>(a.n) + x.t0, m);
  }
  /* What has been asked for is there, once the threads have met. */
  __device__ void wait() const {
    staged_floats();
#if __CUDA_ARCH__ >= 900
    if (staged) rdkv_cuda__wait(rdkv_cuda__shared_address(&stage_barrier()), 0);
#endif
  }
  __device__ static u64 &stage_barrier() {
    __shared__ u64 x[1];
    return x[0];
  }
  __device__ unit &enter(uint32_t u) const {
    if (solve_unit().number != u) enter_unit(a, first, slice, slices, u);
    return solve_unit();
  }
  __device__ static float *distortions() {
    return reinterpret_cast<float *>(solve_shared + SOLVE_WORDS / 4);
  }
  __device__ void sync() {
    all_clear();
    solve_sync(&a.state->barrier, ++phase);
  }
  /* Where the blocks are one cluster the first bins are cleared; before they are counted in. */
  __device__ void clear() {
#if __CUDA_ARCH__ >= 900
    if (alone()) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    waiting = alone();
  }
  __device__ void all_clear() {
#if __CUDA_ARCH__ >= 900
    if (waiting) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    waiting = false;
  }

  /* The blocks are one cluster. */
  __device__ static bool alone() {
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size == gridDim.x;
#else
    return false;
#endif
  }

  __device__ solve_head *head(uint32_t i) const { return a.heads + first + i; }
  __device__ const layer_view &layer_of(uint32_t i) const {
    const uint32_t layer = (first + i) / a.n_kv_heads;
    return a.n_layers <= VIEWS ? a.few.view[layer] : a.layers[layer];
  }
  __device__ size_t row(uint32_t i) const { return (first + i) % a.n_kv_heads; }
  __device__ uint8_t *v_bits(uint32_t i) const { return layer_of(i).v_bits + row(i) * a.n; }
  __device__ uint8_t *k_bits(uint32_t i) const {
    return layer_of(i).k_bits + row(i) * static_cast<size_t>(a.k_dim);
  }
  __device__ const float *v_distortion(uint32_t i) const {
    return layer_of(i).v_distortion + row(i) * 5 * a.n;
  }
  __device__ const float *k_distortion(uint32_t i) const {
    return layer_of(i).k_distortion + row(i) * 4 * static_cast<size_t>(a.k_dim);
  }
  __device__ uint32_t *bins(uint32_t i) const {
    return a.bins[set] + static_cast<size_t>(i) * BINS;
  }
  __device__ const uint32_t *bins_before(uint32_t i) const {
    return a.bins[set == 0 ? 2 : set - 1] + static_cast<size_t>(i) * BINS;
  }
  __device__ u64 *hist() const { return a.hist[set]; }

  /* Where a copy of another has come to. */
  __device__ void leave(solver *other) const {
    other->phase = phase, other->set = set, other->refused = refused, other->waiting = waiting;
  }

  /* To the next set of bins, which is clear; the one after it is cleared. */
  __device__ void turn() {
    const uint32_t at = blockIdx.x * SOLVE + threadIdx.x, step = gridDim.x * SOLVE;
    set = set == 2 ? 0 : set + 1;
    const uint32_t next = set == 2 ? 0 : set + 1;
    for (uint32_t i = at; i < n_heads * BINS; i += step) a.bins[next][i] = 0;
    for (uint32_t i = at; i < BINS; i += step) a.hist[next][i] = 0;
  }
};

/* Whether weights or distortions are no numbers >= 0, once all have been seen. */
__device__ inline uint32_t seen_odd(const solver &s) {
  return *static_cast<volatile uint32_t *>(&s.a.state->odd);
}
__device__ inline bool refuse(solver &s, uint32_t odd) {
  s.refused = odd != 0;
  if (s.refused && blockIdx.x == 0 && threadIdx.x == 0) fail(s.a.status, RDKV_ERR_NONFINITE);
  return s.refused;
}

/* Nothing is kept. */
__device__ inline void clear_widths(const solver &s) {
  const size_t first = blockIdx.x * SOLVE + threadIdx.x, step = gridDim.x * SOLVE;
  for (uint32_t i = 0; i < s.n_heads; ++i) {
    for (size_t t = first; t < s.a.n; t += step) s.v_bits(i)[t] = 0;
    for (size_t c = first; c < static_cast<size_t>(s.a.k_dim); c += step) s.k_bits(i)[c] = 0;
  }
}

/* Slopes of a token's hull, as rdkv__hull. */
__device__ inline void hull(const float *d, const float *cost, int first, uint32_t *slope) {
  float gain[4], width[4], s[4];
  int end[4], n = 0, l = 0;
  for (; l < first; ++l) slope[l] = PINNED;
  for (; l < 4; ++l) {
    gain[n] = __fsub_rn(d[l], d[l + 1]), width[n] = cost[l], end[n] = l + 1;
    s[n] = __fdiv_rn(gain[n], width[n]);
    while (n > 0 && s[n] > s[n - 1]) {
      --n;
      gain[n] = __fadd_rn(gain[n], gain[n + 1]), width[n] = __fadd_rn(width[n], width[n + 1]);
      end[n] = end[n + 1];
      s[n] = __fdiv_rn(gain[n], width[n]);
    }
    ++n;
  }
  l = first;
  for (int i = 0; i < n; ++i)
    for (; l < end[i]; ++l) slope[l] = s[i] > 0 ? __float_as_uint(s[i]) : 0;
}

/* Bytes of K in a tile before K has been chosen: 4 bits. */
__host__ __device__ inline uint32_t first_k_tile(int k_dim) {
  return static_cast<uint32_t>(pad16(k_dim)) / 16 * 256;
}

/* Slopes of a token's hull from its distortions x, as rdkv.h's hull kernel. They never rise. */
__device__ __forceinline__ void slopes_of(const float *x, const v_costs &c, uint32_t slope[4]) {
  float m[4] = {0, 0, 0, 0};
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    float top = 0;
#pragma unroll
    for (int b = 4; b > a; --b) {
      top = fmaxf(top, __fmul_rn(__fsub_rn(x[a], x[b]), c.inv[a][b]));
      m[b - 1] = a ? fminf(m[b - 1], top) : top;
    }
  }
#pragma unroll
  for (int l = 0; l < 4; ++l) slope[l] = __float_as_uint(m[l]);
}

/* Of a token that is pinned to a level, if it is. */
__device__ __noinline__ uint4 pinned_hull(float x0, float x1, float x2, float x3, float x4,
                                          float4 costs, int level) {
  const float x[5] = {x0, x1, x2, x3, x4}, cost[4] = {costs.x, costs.y, costs.z, costs.w};
  uint32_t slope[4];
  hull(x, cost, level, slope);
  return make_uint4(slope[0], slope[1], slope[2], slope[3]);
}
__device__ __forceinline__ void pinned_slopes(const float *x, const v_costs &c, int pinned,
                                              uint32_t slope[4]) {
  if (!pinned) return;
  const uint4 p = pinned_hull(x[0], x[1], x[2], x[3], x[4],
                              make_float4(c.cost[0], c.cost[1], c.cost[2], c.cost[3]), pinned);
  slope[0] = p.x, slope[1] = p.y, slope[2] = p.z, slope[3] = p.w;
}

/* Tokens in a head's bins from `from` up. */
__device__ __forceinline__ uint32_t count_from(const uint32_t *bins, uint32_t from) {
  __shared__ uint32_t from_sum[SOLVE / 32];
  static_assert(BINS == 4 * SOLVE, "four bins a thread");
  const uint32_t tid = threadIdx.x, b = 4 * tid;
  const uint4 n = reinterpret_cast<const uint4 *>(bins)[tid];
  const uint32_t mine = (b >= from ? n.x : 0) + (b + 1 >= from ? n.y : 0) +
                        (b + 2 >= from ? n.z : 0) + (b + 3 >= from ? n.w : 0);
  const uint32_t warp = __reduce_add_sync(FULL, mine);
  if (tid % 32 == 0) from_sum[tid / 32] = warp;
  __syncthreads();
  return __reduce_add_sync(FULL, tid % 32 < SOLVE / 32 ? from_sum[tid % 32] : 0);
}

/* Slopes of a channel's hull, as rdkv__hull: a level takes `cost` more, the last one twice that. */
__device__ __forceinline__ void k_slopes(const float d[4], float cost, uint32_t slope[3]) {
  const float g0 = __fsub_rn(d[0], d[1]), g1 = __fsub_rn(d[1], d[2]), g2 = __fsub_rn(d[2], d[3]);
  const float s0 = __fdiv_rn(g0, cost), s1 = __fdiv_rn(g1, cost), s2 = __fdiv_rn(g2, 2 * cost);
  const bool two = s1 > s0; /* the first two steps are one */
  const float g01 = two ? __fadd_rn(g0, g1) : g1, c01 = two ? 2 * cost : cost;
  const float s01 = two ? __fdiv_rn(g01, c01) : s1;
  const bool last = s2 > s01; /* the last one joins them, or the one before */
  const float g12 = __fadd_rn(g01, g2), c12 = __fadd_rn(c01, 2 * cost);
  const float s12 = last ? __fdiv_rn(g12, c12) : s2;
  const bool all = last && !two && s12 > s0;
  const float whole = all ? __fdiv_rn(__fadd_rn(g0, g12), __fadd_rn(cost, c12)) : s12;
  const float y2 = whole, y1 = last ? whole : s01,
              y0 = all || (two && last) ? whole
                   : two                ? s01
                                        : s0;
  slope[0] = y0 > 0 ? __float_as_uint(y0) : 0, slope[1] = y1 > 0 ? __float_as_uint(y1) : 0;
  slope[2] = y2 > 0 ? __float_as_uint(y2) : 0;
}

/* What rdkv__choose_k finds of K of this block's unit: a thread the slopes of its channel; how many
   channels reach each level, in whole blocks. */
struct k_choice {
  uint32_t slope[3], reach[4];
};

__device__ __forceinline__ k_choice count_k(const solve_args &a, uint32_t n_tokens, float lambda) {
  k_choice y;
  const unit &x = solve_unit();
  const uint32_t tid = threadIdx.x, kd = static_cast<uint32_t>(a.k_dim);
  const uint32_t tiles = (most(n_tokens, 1) + TILE - 1) / TILE;
  float d[4] = {0, 0, 0, 0};
  staged_floats();
  __syncthreads();
#pragma unroll
  for (uint32_t l = 0; l < 4; ++l)
    if (tid < kd) d[l] = x.dk[l * kd + tid];
  y.slope[0] = y.slope[1] = y.slope[2] = 0, y.reach[0] = kd;
  if (tid < kd) k_slopes(d, static_cast<float>(tiles * 8), y.slope);
#pragma unroll
  for (uint32_t l = 0; l < 3; ++l) {
    const uint32_t n = static_cast<uint32_t>(
        __syncthreads_count(tid < kd && __uint_as_float(y.slope[l]) > lambda));
    y.reach[l + 1] = least((n + 8) / 16 * 16, y.reach[l]);
  }
  return y;
}

/* Gives K of this block's unit's head its widths: what rdkv__choose_k takes one by one is here a
   rank, for which each warp has some of the channels, and a lane all that it compares them with. */
__device__ __noinline__ void place_k(const solve_args &a) {
  enum { EACH = MAX_DIM / (SOLVE / 32) };
  __shared__ u64 k_key[MAX_DIM];
  __shared__ uint32_t k_rank[MAX_DIM];
  const unit &x = solve_unit();
  const uint32_t tid = threadIdx.x, kd = static_cast<uint32_t>(a.k_dim), lane = tid & 31;
  const uint32_t each = kd <= MAX_DIM / 2 ? EACH / 2 : EACH, first = tid / 32 * each;
  const k_choice y = count_k(a, x.k_tokens, x.k_lambda);
  uint32_t level = 0;
#pragma unroll
  for (uint32_t l = 0; l < 3; ++l) {
    const uint32_t want = y.reach[l + 1];
    uint32_t rank = 0;
    if (want > 0 && want < y.reach[l]) {
      if (tid < MAX_DIM) {
        k_key[tid] = tid < kd && level == l ? static_cast<u64>(y.slope[l]) << 32 | ~tid : 0;
        k_rank[tid] = 0;
      }
      __syncthreads();
      u64 own[EACH];
#pragma unroll
      for (uint32_t o = 0; o < EACH; ++o) own[o] = o < each ? k_key[first + o] : 0;
#pragma unroll 1
      for (uint32_t c = lane; c < kd; c += 32) {
        const u64 key = k_key[c];
        uint32_t above = 0;
#pragma unroll
        for (uint32_t o = 0; o < EACH; ++o)
          if (o < EACH / 2 || each > EACH / 2) above += own[o] > key;
        if (key && above) atomicAdd(&k_rank[c], above);
      }
      __syncthreads();
      if (tid < kd) rank = k_rank[tid];
    }
    if (level == l && rank < want) level = l + 1;
  }
  if (tid < kd) x.k_bits[tid] = static_cast<uint8_t>(width_of(static_cast<int>(level)));
}

/* The costs of a unit whose head's K is as it is, or as it is chosen now, which a head's first
   block writes down. Between barriers. */
__device__ __forceinline__ void find_costs(const solver &s, unit &x) {
  const uint32_t tid = threadIdx.x;
  uint32_t k_tile = first_k_tile(s.a.k_dim);
  if (s.choose == KEEP) {
    if (x.k_tile != FULL) return;
    k_tile = x.h->k_tile;
    if (tid == 0) x.k_tokens = x.h->k_tokens, x.k_lambda = x.h->k_lambda;
  } else if (s.choose != FRESH) {
    const uint32_t n_tokens = s.choose == BY_BINS
                                  ? count_from(s.bins_before(x.i), s.above) << s.each
                              : s.choose == BY_FINE ? s.bins_before(x.i)[s.above]
                              : s.choose == BY_ALL  ? s.a.n
                                                    : 0;
    const float lambda = s.chosen < 1e37f ? __fmul_rn(s.chosen, s.bias) : s.chosen;
    const k_choice y = count_k(s.a, n_tokens, lambda);
    k_tile = 0;
#pragma unroll
    for (int l = 1; l < 4; ++l)
      k_tile += (y.reach[l] - (l < 3 ? y.reach[l + 1] : 0) + 15) / 16 * (64u << l);
    if (tid == 0) x.k_tokens = n_tokens, x.k_lambda = lambda;
    if (x.t0 == 0 && tid == 0) {
      solve_head *h = x.h;
      h->k_tile = k_tile, h->k_tokens = n_tokens, h->k_lambda = lambda;
#pragma unroll
      for (int l = 0; l < 4; ++l) h->channels[l] = y.reach[l] - (l < 3 ? y.reach[l + 1] : 0);
    }
  }
  set_costs(s.a.v_dim, s.a.positions, k_tile, x.costs);
  if (tid == 0) x.k_tile = k_tile; /* seen at the next meeting */
}

/* f(token, slopes) over all tokens of the part, or 8 of 8 << looked of them; but skip(token) where
   a warp has none with a slope of at least what begin(unit) says. begin before and end(unit) after
   the tokens of a unit are for the whole block. */
template <typename Begin, typename F, typename Skip, typename End>
__device__ __forceinline__ void each_token(solver &s, uint32_t looked, Begin begin, F f, Skip skip,
                                           End end) {
  const uint32_t n = s.a.n, units = s.n_heads * s.slices;
  uint32_t top = 0;
  for (uint32_t u = blockIdx.x; u < units; u += gridDim.x) {
    unit &x = s.enter(u);
    find_costs(s, x);
    const uint32_t t0 = x.t0, t1 = x.t1;
    const float *d = s.staged ? s.distortions() - t0 : x.v;
    const size_t stride = s.staged ? s.slice : n;
    const uint8_t *pin = x.pin;
    s.wait();
    const uint32_t floor = begin(x); /* the threads meet there */
    const v_costs c = x.costs;
    const bool fresh = s.choose == FRESH;
    const uint32_t each = 3 + looked;
    const uint32_t g0 = t0 >> each, n_looked = t1 > t0 ? (((t1 - 1) >> each) - g0 + 1) * 8 : 0;
    const auto token = [&](uint32_t i) {
      const uint32_t g = g0 + i / 8;
      return (g << each) + (g & ((1u << looked) - 1)) * 8 + i % 8;
    };
    const uint32_t least_all = pin || fresh ? 0 : floor; /* of what is looked at */
    const float *row[5];
#pragma unroll
    for (int l = 0; l < 5; ++l) row[l] = d + static_cast<size_t>(l) * stride;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < (n_looked + 31) / 32 * 32;
         i += BATCH * SOLVE) { /* by warps */
      float first[BATCH];
      uint32_t t[BATCH];
      bool in[BATCH], some[BATCH];
#pragma unroll
      for (uint32_t b = 0; b < BATCH; ++b) {
        t[b] = token(i + b * SOLVE), in[b] = i + b * SOLVE < n_looked && t[b] >= t0 && t[b] < t1;
        first[b] = in[b] ? row[0][t[b]] : 0;
      }
#pragma unroll
      for (uint32_t b = 0; b < BATCH; ++b) /* no slope is above all of D(0) for the least step */
        some[b] = __any_sync(FULL, __float_as_uint(__fmul_rn(first[b], c.inv[0][1])) >= least_all);
#pragma unroll
      for (uint32_t b = 0; b < BATCH; ++b) {
        if (!some[b]) {
          if (in[b]) skip(t[b]);
          continue;
        }
        float y[5] = {first[b], 0, 0, 0, 0};
        uint32_t slope[4];
#pragma unroll
        for (int l = 1; l < 5; ++l)
          if (in[b]) y[l] = row[l][t[b]];
        slopes_of(y, c, slope); /* of zeroes beyond the end */
        if (in[b]) {
          if (pin) pinned_slopes(y, c, pin[t[b]], slope);
          f(t[b], slope);
        }
        __syncwarp();
      }
    }
    end(x);
    if (!fresh) continue;
    const uint32_t m = t1 - t0; /* all are looked through, K, too */
    for (uint32_t i = threadIdx.x; s.staged && i < (m + 3) / 4; i += SOLVE)
#pragma unroll
      for (int l = 0; l < 5; ++l) {
        const uint4 y = reinterpret_cast<const uint4 *>(row[l] + t0)[i];
        top = most(most(most(y.x, y.y), most(y.z, y.w)), top);
      }
    for (uint32_t i = threadIdx.x; !s.staged && i < m; i += SOLVE)
#pragma unroll
      for (int l = 0; l < 5; ++l) top = most(top, __float_as_uint(row[l][t0 + i]));
    for (uint32_t j = threadIdx.x; j < 4 * static_cast<uint32_t>(s.a.k_dim); j += SOLVE)
      top = most(top, __float_as_uint(x.dk[j]));
  }
  if (top >= 0x7f800000u) atomicOr(&s.a.state->odd, 1u);
}

/* Shared memory as a histogram. Lanes that count the same at a time take no longer. */
__device__ __forceinline__ uint32_t *clear_memory(uint32_t words) {
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < words / 4; i += SOLVE)
    solve_shared[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  return reinterpret_cast<uint32_t *>(solve_shared);
}

/* Tokens of each head by slope of level 1, and what is spent at each slope. */
__device__ __forceinline__ void spectrum(solver &s, float floor) {
  uint32_t *count = nullptr;
  s.turn();
  each_token(
      s, s.each,
      [&](const unit &) {
        count = clear_memory(4 * BINS);
        return __float_as_uint(floor) + 1;
      },
      [&](uint32_t, const uint32_t *slope) {
        if (__uint_as_float(slope[0]) <= floor) return;
#pragma unroll
        for (uint32_t l = 0; l < 4; ++l)
          atomicAdd(&count[l * BINS + least(slope[l] >> 20, BINS - 1)], 1u);
      },
      [](uint32_t) {},
      [&](const unit &x) {
        s.all_clear();
        __syncthreads();
#pragma unroll
        for (uint32_t b = threadIdx.x; b < BINS; b += SOLVE) {
          uint32_t bytes = 0, tokens = 0;
#pragma unroll
          for (uint32_t l = 0; l < 4; ++l) {
            const uint32_t n = count[l * BINS + b];
            bytes += n * static_cast<uint32_t>(x.costs.cost[l]); /* whole: 128 / 32 divides */
            if (l == 0) tokens = n;
          }
          if (tokens) atomicAdd(&s.bins(x.i)[b], tokens);
          if (bytes) atomicAdd(&s.hist()[b], static_cast<u64>(bytes));
        }
      });
  s.sync();
}

/* Lowest edge of a bin down to which everything fits; *lowest the edge of the lowest bin in use. */
__device__ __forceinline__ float spectrum_edge(const solver &s, uint64_t bytes, float *lowest) {
  __shared__ uint32_t edge_found[2];
  enum { EACH = BINS / SOLVE };
  const uint32_t top = BINS - 1 - threadIdx.x * EACH;
  const u64 *hist = s.hist();
  u64 here[EACH], mine = 0, all;
#pragma unroll
  for (uint32_t i = 0; i < EACH; ++i) here[i] = hist[top - i], mine += here[i];
  if (threadIdx.x == 0) edge_found[0] = 0, edge_found[1] = BINS;
  u64 sum = solve_scan(mine, &all);
  if (sum <= bytes && sum + mine > bytes) {
#pragma unroll
    for (uint32_t i = 0; i < EACH; ++i) {
      const uint32_t bin = top - i;
      if (bin > 0 && sum <= bytes && sum + here[i] > bytes) edge_found[0] = bin;
      sum += here[i];
    }
  }
  if (lowest) {
    uint32_t low = BINS;
#pragma unroll
    for (uint32_t i = 0; i < EACH; ++i)
      if (top - i > 0 && here[i]) low = top - i;
    low = __reduce_min_sync(FULL, low);
    if (threadIdx.x % 32 == 0 && low < BINS) atomicMin(&edge_found[1], low);
  }
  __syncthreads();
  const uint32_t found = edge_found[0], low = edge_found[1];
  if (lowest) /* where not all tokens were seen ten octaves lower */
    *lowest = low == BINS ? 0
                          : __uint_as_float((s.each == 0 ? low
                                             : low > 81  ? low - 80
                                                         : 1)
                                            << 20);
  return __uint_as_float(found < 0x7f7 ? (found + 1) << 20 : PINNED);
}

/* rdkv__tiles of n tokens that reach the threshold, round_up among them. high [HIGH] tokens from
   each octave above the fine bins up, or NULL: none. */
__device__ __forceinline__ uint32_t whole_tiles(uint32_t n, uint32_t all, const uint32_t *high,
                                                uint32_t pinned) {
  if (n >= all) return (all + TILE - 1) / TILE;
  const uint32_t tiles = n / TILE, paid = most(tiles * TILE, pinned);
  uint32_t worth = n > paid ? n - paid : 0;
#pragma unroll
  for (uint32_t i = 0; i < HIGH && high; ++i) worth += high[i] > paid ? (high[i] - paid) << i : 0;
  return tiles + (worth >= TILE);
}

/* The same; with a budget pins are filled up to tiles. */
__device__ __forceinline__ uint32_t tiles_at(const solver &s, uint32_t reach, const uint32_t *high,
                                             uint32_t pinned) {
  return most(whole_tiles(reach + s.round_up, s.a.n, high, pinned),
              s.round_up ? 0 : (pinned + TILE - 1) / TILE);
}

/* rdkv__reach. */
__device__ __forceinline__ uint32_t reach_of(uint32_t tiles, uint32_t pinned, uint32_t below) {
  return least(most(tiles * TILE, pinned), below);
}

/* What a tile that reaches level l + 1 takes more than at level l. */
__device__ __forceinline__ uint32_t tile_cost(const solver &s, const solve_head *h, uint32_t l) {
  const uint32_t block = static_cast<uint32_t>(pad16(s.a.v_dim)) / 16 * 64;
  return l ? block << l : h->k_tile + 128 + 2 * block + (s.a.positions ? 4 * TILE : 0);
}

/* Bytes of a head's channel table. */
__device__ __forceinline__ uint32_t table_bytes(const solve_head *h) {
  uint32_t blocks = 0;
#pragma unroll
  for (int l = 1; l < 4; ++l) blocks += (h->channels[l] + 15) / 16;
  return static_cast<uint32_t>(round_up(80 * blocks + 3 * h->channels[0], 128));
}

/* Cumulates a head's fine bins from the top, and adds what it takes, in whole tiles, if the
   threshold lies at the lower edge of each to hist. By the head's last block, a quarter of which
   has a level, a thread four bins. */
__device__ __forceinline__ void add_up(const solver &s, const unit &x) {
  __shared__ uint32_t fine_warp[SOLVE / 32], fine_high[4][HIGH], fine_bytes[4][FINE]; /* of 64 */
  enum { QUARTER = SOLVE / 4 };
  static_assert(FINE == SOLVE, "four bins a thread");
  const solve_head *h = x.h;
  const uint32_t tid = threadIdx.x, lane = tid & 31, l = tid / QUARTER;
  const uint32_t bin = FINE - 4 - tid % QUARTER * 4; /* and the three above it */
  uint4 *at = reinterpret_cast<uint4 *>(s.bins(x.i) + l * FINE + bin);
  uint4 n = *at;
  const uint32_t cost = tile_cost(s, h, l) / 64, pinned = h->pinned[l + 1];
  u64 bytes = table_bytes(h);
  n.z += n.w, n.y += n.z, n.x += n.y;
  uint32_t sum = warp_scan(n.x);
  if (lane == 31) fine_warp[tid / 32] = sum;
  __syncthreads();
  sum -= n.x;
  for (uint32_t w = l * QUARTER / 32; w < tid / 32; ++w) sum += fine_warp[w];
  n.x += sum, n.y += sum, n.z += sum, n.w += sum;
  *at = n;
  const uint32_t each[4] = {n.x, n.y, n.z, n.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i)
    if (bin + i >= FINE - HIGH) fine_high[l][bin + i - (FINE - HIGH)] = each[i];
  __syncthreads();
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i)
    fine_bytes[l][bin + i] = tiles_at(s, each[i], fine_high[l], pinned) * cost;
  __syncthreads();
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) bytes += 64ull * fine_bytes[i][tid];
  atomicAdd(&s.hist()[tid], bytes);
}

/* rdkv__fine_bin. */
__device__ __forceinline__ uint32_t fine_bin(uint32_t base, uint32_t slope) {
  const uint32_t x = slope - base, fine = FINE - HIGH;
  return least(x < fine ? x : fine + (x - fine) / 256, base ? FINE - 1 : fine - 1);
}

/* Tokens of every head and level by slope from base up, as add_up() leaves them. */
__device__ __forceinline__ void fine_bins(solver &s, float base) {
  const uint32_t bottom = __float_as_uint(base) >> 15;
  uint32_t *count = nullptr;
  s.turn();
  each_token(
      s, 0,
      [&](const unit &) {
        count = clear_memory(4 * FINE);
        return most(bottom << 15, 1);
      },
      [&](uint32_t, const uint32_t *slope) {
#pragma unroll
        for (uint32_t l = 0; l < 4; ++l) {
          const uint32_t b = slope[l] >> 15;
          if (slope[l] == 0 || b < bottom) break;
          atomicAdd(&count[l * FINE + fine_bin(bottom, b)], 1u);
        }
      },
      [](uint32_t) {},
      [&](const unit &x) {
        __syncthreads();
#pragma unroll
        for (uint32_t b = threadIdx.x; b < 4 * FINE; b += SOLVE) {
          const uint32_t n = count[b];
          if (n) atomicAdd(&s.bins(x.i)[b], n);
        }
        if (units_before(&x.h->done) + 1 < s.slices) return;
        add_up(s, x);
        if (threadIdx.x == 0) x.h->done = 0;
      });
  s.sync();
}

__device__ __forceinline__ uint32_t fine_edge(float base, uint32_t bin) {
  const uint32_t fine = FINE - HIGH;
  return ((__float_as_uint(base) >> 15) + (bin < fine ? bin : fine + 256 * (bin - fine))) << 15;
}

/* A threshold for whole tiles: the lower edge of a fine bin; or FINE, pins alone. */
struct cut {
  float base;
  uint32_t bin;

  __device__ uint32_t floor() const { return bin < FINE ? most(fine_edge(base, 0), 1) : PINNED; }
};

/* Where the budget is spent: what each level of each head has, and what a tile costs there. */
struct spending {
  uint32_t *tiles, *cost;
};

/* rdkv__spend's whole tiles of n tokens. */
__device__ __forceinline__ uint32_t full_tiles(uint32_t n, uint32_t all) {
  return n < all ? n / TILE : (n + TILE - 1) / TILE;
}

/* rdkv__spend, by one block. */
__device__ __forceinline__ void spend(const solver &s, const cut &at, u64 budget, u64 left,
                                      const spending &p) {
  __shared__ uint32_t spend_bin[1], spend_from[1];
  __shared__ u64 spend_left[1];
  const uint32_t tid = threadIdx.x, lane = tid & 31, n = 4 * s.n_heads, all = s.a.n;
  for (uint32_t bin = at.bin; left > budget / 4096;) {
    /* the next bin down with a tile more that fits */
    __syncthreads();
    if (tid == 0) spend_bin[0] = 0;
    __syncthreads();
    for (uint32_t q = tid / 32; q < n; q += SOLVE / 32) {
      const uint32_t tiles = p.tiles[q];
      if (p.cost[q] > left || (q % 4 > 0 && p.tiles[q - 1] <= tiles)) continue;
      const uint4 *bins = reinterpret_cast<const uint4 *>(s.bins(q / 4) + q % 4 * FINE) + lane;
      uint32_t more = 0; /* bins down to which there are */
#pragma unroll
      for (uint32_t i = 0; i < FINE / 128; ++i) {
        const uint4 x = bins[32 * i];
        more += (full_tiles(x.x, all) > tiles) + (full_tiles(x.y, all) > tiles) +
                (full_tiles(x.z, all) > tiles) + (full_tiles(x.w, all) > tiles);
      }
      more = least(__reduce_add_sync(FULL, more), bin);
      if (lane == 0 && more) atomicMax(&spend_bin[0], more);
    }
    __syncthreads();
    if (spend_bin[0] == 0) return;
    bin = spend_bin[0] - 1;
    /* as many as fit, in order: up to a level of which not all do, then from there on */
    for (uint32_t from = 0; from < n;) {
      const uint32_t q = from / 4 * 4 + tid;
      uint32_t has = 0, cost = 0, want = 0;
      if (q < n) {
        has = want = p.tiles[q], cost = p.cost[q];
        if (q >= from && cost <= left)
          want = most(has, full_tiles((s.bins(q / 4) + q % 4 * FINE)[bin], all));
      }
#pragma unroll
      for (uint32_t l = 1; l < 4; ++l) {
        const uint32_t below = __shfl_up_sync(FULL, want, 1);
        if (q % 4 == l) want = most(has, least(want, below));
      }
      const u64 bytes = static_cast<u64>(want - has) * cost;
      u64 sum;
      const u64 before = solve_scan(bytes, &sum);
      if (before + bytes <= left && want > has) p.tiles[q] = want;
      if (before <= left && before + bytes > left) {
        const uint32_t fit = static_cast<uint32_t>((left - before) / cost);
        p.tiles[q] = has + fit;
        spend_left[0] = left - before - static_cast<u64>(fit) * cost, spend_from[0] = q + 1;
      }
      __syncthreads();
      from = sum > left ? spend_from[0] : from / 4 * 4 + SOLVE;
      left = sum > left ? spend_left[0] : left - sum;
      __syncthreads();
    }
  }
}

/* Tokens of a head that reach each level, and slopes between which it must be looked at which: all
   above `to` do that reach the level below; from `from` up there are enough, also where lower
   levels' last tiles keep some from this one. */
struct windows {
  uint32_t want[4], from[4], to[4];
};

__device__ __forceinline__ windows &solve_windows() {
  __shared__ windows x[1];
  return x[0];
}

/* Tokens in a thread's fine bin of each level and in the one above. */
struct fine_counts {
  uint32_t n[4], above[4];
};
__device__ __forceinline__ fine_counts fine_counts_of(const solver &s, uint32_t head) {
  fine_counts y;
#pragma unroll
  for (uint32_t l = 0; l < 4; ++l) { /* all are asked for before any is waited for */
    const uint32_t *bins = s.bins(head) + l * FINE + threadIdx.x;
    y.n[l] = bins[0], y.above[l] = threadIdx.x + 1 < FINE ? bins[1] : 0;
  }
  return y;
}

__device__ __forceinline__ windows find_windows(const solver &s, const unit &x, const cut &at,
                                                const fine_counts &c, const uint32_t *tiles) {
  windows &w = solve_windows(), y;
  const uint32_t tid = threadIdx.x;
  uint32_t below = s.a.n;
#pragma unroll
  for (uint32_t l = 0; l < 4; ++l)
    below = y.want[l] = reach_of(tiles[l], x.h->pinned[l + 1], below);
#pragma unroll
  for (uint32_t l = 0; l < 4 && tid == 0; ++l)
    w.want[l] = y.want[l], w.from[l] = y.want[l] > 0 ? at.floor() : ~0u, w.to[l] = ~0u;
  __syncthreads();
#pragma unroll
  for (uint32_t l = 0; l < 4; ++l) {
    const uint32_t want = y.want[l], enough = want + 3 * TILE;
    const uint32_t n = c.n[l], above = c.above[l];
    if (want == 0 || at.bin == FINE) continue;
    if (n >= enough && above < enough) w.from[l] = most(fine_edge(at.base, tid), 1);
    if (n > want && above <= want && tid + 1 < FINE) w.to[l] = fine_edge(at.base, tid + 1);
    if (n <= want && tid == 0) w.to[l] = at.floor();
  }
  __syncthreads();
#pragma unroll
  for (uint32_t l = 0; l < 4; ++l) y.from[l] = w.from[l], y.to[l] = w.to[l];
  return y;
}

/* Slopes of a token of the unit's head, where not all tokens are looked at at once. */
__device__ __forceinline__ uint4 slopes_at(const solve_args &a, uint32_t t) {
  const unit &x = solve_unit();
  const float *d = x.v + t;
  float y[5];
  uint32_t slope[4];
#pragma unroll
  for (uint32_t j = 0; j < 5; ++j) y[j] = d[static_cast<size_t>(j) * a.n];
  slopes_of(y, x.costs, slope);
  if (x.pin) pinned_slopes(y, x.costs, x.pin[t], slope);
  return make_uint4(slope[0], slope[1], slope[2], slope[3]);
}

/* The first `want` of n tokens with a width get the next one. By one block. */
__device__ __noinline__ void raise_first(uint8_t *bits, uint32_t n, uint8_t from, uint8_t to,
                                         uint32_t want) {
  const uint32_t skew = reinterpret_cast<uintptr_t>(bits) % 16, words = (skew + n + 15) / 16;
  const uint32_t each = (words + SOLVE - 1) / SOLVE, four = from * 0x01010101u;
  const uint32_t w0 = least(threadIdx.x * each, words), w1 = least(w0 + each, words);
  const auto begin = [&](uint32_t w) { return 16 * w > skew ? 16 * w - skew : 0; };
  uint32_t mine = 0;
  for (uint32_t w = w0; w < w1; ++w) {
    const uint32_t t0 = begin(w), t1 = least(begin(w + 1), n);
    if (t1 - t0 == 16) {
      const uint4 x = *reinterpret_cast<const uint4 *>(bits + t0);
      mine += static_cast<uint32_t>(
          __popc(__vcmpeq4(x.x, four) & 0x01010101u) + __popc(__vcmpeq4(x.y, four) & 0x01010101u) +
          __popc(__vcmpeq4(x.z, four) & 0x01010101u) + __popc(__vcmpeq4(x.w, four) & 0x01010101u));
    } else {
      for (uint32_t t = t0; t < t1; ++t) mine += bits[t] == from;
    }
  }
  u64 all;
  uint32_t before = static_cast<uint32_t>(solve_scan(mine, &all));
  for (uint32_t t = begin(w0), t1 = least(begin(w1), n); mine > 0 && t < t1 && before < want; ++t)
    if (bits[t] == from) bits[t] = to, ++before;
  __syncthreads();
}

/* rdkv__assign for one head, by one block: of the tokens that are listed, m, or of all the head's,
   where those that are sure have their width. For level after level the last key that rises is
   found, slope above inverted index: a token's level is the one up to which its keys are no less.
   slices: of the lists, or 0: all tokens. False: the lists do not suffice. */
__device__ __noinline__ bool raise(const solve_args &a, uint32_t floor, uint32_t slices,
                                   uint32_t slice) {
  __shared__ uint32_t raise_count[BUCKETS], raise_warp[SOLVE / 32], raise_found[3], raise_fill[4];
  __shared__ uint32_t raise_first_of[UNITS + 2], raise_sure[4];
  __shared__ u64 raise_limit[4];
  const unit &x = solve_unit();
  const windows &w = solve_windows();
  const bool listed = slices > 0;
  const uint32_t tid = threadIdx.x, lane = tid & 31, room = least(a.n, NEAR) / most(slices, 1);
  static_assert(BUCKETS == SOLVE, "a bucket a thread");
  __syncthreads();
  raise_count[tid] = 0;
  if (tid < 4) raise_sure[tid] = 0;
  __syncthreads();
  for (uint32_t k = tid, before = 0; k < slices + (-slices & 31) && tid < 32; k += 32) {
    const unit_count mine = k < slices ? x.counts[k] : unit_count();
    uint32_t sum = warp_scan(mine.listed);
    if (k <= slices) raise_first_of[k + 1] = before + sum;
    before += __shfl_sync(FULL, sum, 31);
#pragma unroll
    for (uint32_t l = 0; l < 4; ++l)
      if (mine.sure[l]) atomicAdd(&raise_sure[l], mine.sure[l]);
  }
  if (tid == 0) raise_first_of[0] = 0;
  __syncthreads();
  const uint32_t m = listed ? raise_first_of[slices] : a.n;
  const auto ask = [&](uint32_t j, uint4 *y) {
    if (!listed) {
      *y = slopes_at(a, j);
      return j;
    }
    uint32_t k = 0; /* the unit that has it */
    for (uint32_t step = slices > 1 ? 1u << (31 - __clz(static_cast<int>(slices - 1))) : 0; step;
         step >>= 1)
      if (k + step < slices && raise_first_of[k + step] <= j) k += step;
    const uint32_t in = j - raise_first_of[k], t = x.list[static_cast<size_t>(k) * slice + in];
    *y = in < room ? x.slopes[k * room + in] : slopes_at(a, t);
    return t;
  };
  uint4 mine = make_uint4(0, 0, 0, 0); /* a thread's first one, mostly the only one */
  const uint32_t mine_t = tid < m ? ask(tid, &mine) : 0;
  const auto entry = [&](uint32_t j, uint32_t slope[4]) {
    uint4 y = mine;
    const uint32_t t = j == tid ? mine_t : ask(j, &y);
    slope[0] = y.x, slope[1] = y.y, slope[2] = y.z, slope[3] = y.w;
    return t;
  };
  /* its level, the highest at most, and the key of that level */
  const auto level_at = [&](uint32_t t, const uint32_t slope[4], uint32_t highest, u64 *key) {
    uint32_t level = 0;
#pragma unroll
    for (uint32_t l = 0; l < 4; ++l) {
      const u64 k = static_cast<u64>(slope[l]) << 32 | static_cast<uint32_t>(~t);
      if (l == highest) *key = k;
      level += l < highest && level == l && k >= raise_limit[l];
    }
    return level;
  };
#pragma unroll 1
  for (uint32_t l = 0; l < 4; ++l) {
    const uint32_t from = listed ? w.from[l] : floor, to = listed ? w.to[l] : ~0u;
    uint32_t need = w.want[l] - raise_sure[l];
    u64 limit = static_cast<u64>(from) << 32, top = ~0ull, end = static_cast<u64>(to) << 32;
    uint32_t missing = 0;
    for (bool first = true; need > 0; first = false) {
      /* keys in [limit, top) by buckets, of which the last one goes on beyond end */
      const u64 span = end - limit - 1;
      const uint32_t shift =
          span < BUCKETS ? 0 : 55 - static_cast<uint32_t>(__clzll(static_cast<long long>(span)));
      __syncthreads();
      for (uint32_t j = tid; j < m; j += SOLVE) {
        uint32_t slope[4];
        u64 key = 0;
        const uint32_t t = entry(j, slope);
        if (level_at(t, slope, l, &key) == l && key >= limit && key < top)
          atomicAdd(&raise_count[min((key - limit) >> shift, static_cast<u64>(BUCKETS - 1))], 1u);
      }
      __syncthreads();
      const uint32_t here = raise_count[BUCKETS - 1 - tid];
      raise_count[BUCKETS - 1 - tid] = 0;
      uint32_t sum = warp_scan(here);
      if (lane == 31) raise_warp[tid / 32] = sum;
      __syncthreads();
      const uint32_t warp = lane < SOLVE / 32 ? raise_warp[lane] : 0;
      const uint32_t all = __reduce_add_sync(FULL, warp);
      sum += __reduce_add_sync(FULL, lane < tid / 32 ? warp : 0);
      if (first && all <= need) {
        missing = need - all;
        break;
      }
      if (sum - here < need && sum >= need)
        raise_found[0] = BUCKETS - 1 - tid, raise_found[1] = here, raise_found[2] = sum - here;
      __syncthreads();
      const uint32_t bucket = raise_found[0];
      need -= raise_found[2], limit += static_cast<u64>(bucket) << shift;
      if (need == raise_found[1]) break;
      if (bucket < BUCKETS - 1) top = limit + (1ull << shift);
      end = top;
    }
    if (missing > 0 && from > floor) return false;
    __syncthreads();
    if (tid == 0) raise_limit[l] = need > 0 ? limit : ~0ull, raise_fill[l] = missing;
    __syncthreads();
  }
  for (uint32_t j = tid; j < m; j += SOLVE) {
    uint32_t slope[4];
    u64 key;
    const uint32_t t = entry(j, slope), level = level_at(t, slope, 4, &key);
    x.v_bits[t] = static_cast<uint8_t>(width_of(static_cast<int>(level)));
  }
#pragma unroll 1
  for (int l = 0; l < 4; ++l) {
    if (raise_fill[l] == 0) continue;
    __syncthreads();
    raise_first(x.v_bits, a.n, static_cast<uint8_t>(width_of(l)),
                static_cast<uint8_t>(width_of(l + 1)), raise_fill[l]);
  }
  return true;
}

/* Gives every token the level that is sure and lists those of the windows, from which the last
   block of a head takes the others. */
__device__ __forceinline__ void assign(solver &s, const cut &at, const fine_counts &first,
                                       const uint32_t *tiles) {
  __shared__ unit_count counted[1];
  windows w;
  solve_head *h = nullptr;
  uint8_t *v_bits = nullptr;
  uint32_t *list = nullptr;
  uint4 *slopes = nullptr;
  u64 taken = 0; /* 16 bits a level: a thread has at most 2^22 / SOLVE tokens of a unit */
  const uint32_t room = least(s.a.n, NEAR) / s.slices; /* for a unit's slopes */
  each_token(
      s, 0,
      [&](const unit &x) {
        h = x.h, v_bits = x.v_bits, list = x.list + x.t0, slopes = x.slopes + x.k * room;
        if (threadIdx.x == 0) counted[0] = unit_count(); /* the threads meet below */
        w = find_windows(s, x, at, x.number == blockIdx.x ? first : fine_counts_of(s, x.i),
                         tiles + 4 * x.i);
        taken = 0;
        return least(least(w.from[0], w.from[1]), least(w.from[2], w.from[3]));
      },
      [&](uint32_t t, const uint32_t *slope) {
        uint32_t level = 0; /* that is sure */
        bool open = false;
#pragma unroll
        for (uint32_t l = 0; l < 4; ++l) level += level == l && slope[l] >= w.to[l];
#pragma unroll
        for (uint32_t l = 0; l < 4; ++l) open |= l >= level && slope[l] >= w.from[l];
        if (open) {
          const uint32_t to = atomicAdd(&counted->listed, 1u);
          list[to] = t;
          if (to < room) slopes[to] = make_uint4(slope[0], slope[1], slope[2], slope[3]);
        } else if (level) {
          taken += 0x0001000100010001ull >> (64 - 16 * level);
        }
        v_bits[t] = static_cast<uint8_t>(width_of(static_cast<int>(level)));
      },
      [&](uint32_t t) { v_bits[t] = 0; },
      [&](const unit &x) {
#pragma unroll
        for (uint32_t l = 0; l < 4; ++l) {
          const uint32_t n =
              __reduce_add_sync(FULL, static_cast<uint32_t>(taken >> (16 * l) & 0xffff));
          if (threadIdx.x % 32 == 0 && n) atomicAdd(&counted->sure[l], n);
        }
        __syncthreads();
        if (threadIdx.x == 0) x.counts[x.k] = counted[0];
        const uint32_t before = units_before(&h->done);
        if (before == 0 && s.slices > 1) place_k(s.a);
        if (before + 1 < s.slices) return;
        if (!raise(s.a, at.floor(), s.slices, s.slice)) raise(s.a, at.floor(), 0, 0);
        if (s.slices == 1) place_k(s.a);
        __syncthreads();
        if (threadIdx.x > 0) return;
        uint32_t below = s.a.n;
        for (uint32_t l = 0; l < 4; ++l) h->count[l] = below - w.want[l], below = w.want[l];
        h->count[4] = below, h->done = 0;
      });
}

/* The widths, once the threshold is known: the tiles above it, those below it as long as the budget
   lasts, and their tokens. */
__device__ __forceinline__ void finish(solver &s, const cut &at, const fine_counts &first,
                                       u64 budget) {
  __shared__ uint32_t finish_tiles[2 * SOLVE];
  const uint32_t n = 4 * s.n_heads, tid = threadIdx.x;
  const bool alike = n <= SOLVE; /* all blocks spend, the same way */
  const spending p = {alike ? finish_tiles : s.a.tiles,
                      alike ? finish_tiles + SOLVE : s.a.tiles + n};
  if (alike || blockIdx.x == 0) {
    const bool some = at.bin < FINE;
    const u64 took = some ? s.hist()[at.bin] : 0; /* as add_up() left it */
    for (uint32_t q = tid; q < n; q += SOLVE) {
      const solve_head *h = s.head(q / 4);
      const uint32_t *bins = s.bins(q / 4) + q % 4 * FINE;
      uint32_t high[HIGH];
#pragma unroll
      for (uint32_t j = 0; j < HIGH; ++j) high[j] = some ? bins[FINE - HIGH + j] : 0;
      p.tiles[q] = tiles_at(s, some ? bins[at.bin] : 0, high, h->pinned[q % 4 + 1]);
      p.cost[q] = tile_cost(s, h, q % 4);
    }
    if (some && s.round_up == 0) spend(s, at, budget, budget - took, p);
    __syncthreads();
  }
  if (!alike) s.sync();
  assign(s, at, first, p.tiles);
}

__device__ __noinline__ uint64_t bytes_now(const solver &s) {
  u64 bytes = 0, all;
  for (uint32_t i = threadIdx.x; i < s.n_heads; i += SOLVE) {
    parts p;
    bytes += head_bytes(s.a.v_dim, s.a.positions, s.head(i)->count, s.head(i)->channels, &p);
  }
  solve_scan(bytes, &all);
  return all;
}

/* ---- predicted distortion */

/* Added up as rdkv__predict_all does; or, of an empty cache, as config.max_error wants it. */
__device__ __noinline__ double predict_all(solver &s, bool empty) {
  __shared__ float predict_value[SOLVE];
  double carry = 0; /* an empty cache's sum goes on from head to head */
  s.sync();         /* widths are there */
  for (uint32_t i = 0; i < s.n_heads; ++i) {
    if (empty ? blockIdx.x != 0 : i % gridDim.x != blockIdx.x) continue;
    const float *d = s.v_distortion(i), *dk = s.k_distortion(i);
    double v = empty ? carry : 0, k = 0;
    for (uint32_t t0 = 0; t0 < s.a.n; t0 += SOLVE) {
      const uint32_t n = least(SOLVE, s.a.n - t0), t = t0 + threadIdx.x;
      __syncthreads();
      if (threadIdx.x < n)
        predict_value[threadIdx.x] =
            d[empty ? t : static_cast<size_t>(level_of(s.v_bits(i)[t])) * s.a.n + t];
      __syncthreads();
      if (threadIdx.x == 0)
        for (uint32_t j = 0; j < n; ++j) v = __dadd_rn(v, static_cast<double>(predict_value[j]));
    }
    carry = v;
    if (threadIdx.x == 0) {
      if (!empty && s.head(i)->count[0] < s.a.n)
        for (int c = 0; c < s.a.k_dim; ++c)
          k = __dadd_rn(k, static_cast<double>(dk[level_of(s.k_bits(i)[c]) * s.a.k_dim + c]));
      s.head(i)->v = v, s.head(i)->k = k;
    }
    __syncthreads();
  }
  s.sync();
  double sum = 0;
  for (uint32_t i = 0; i < s.n_heads && !empty; ++i)
    sum = __dadd_rn(sum, __dadd_rn(s.head(i)->v, s.head(i)->k));
  if (empty) sum = s.head(s.n_heads - 1)->v;
  s.sync();
  return sum;
}

/* The same in any order. */
__device__ __noinline__ double predict_about(solver &s, bool empty) {
  __shared__ double about_sum[SOLVE / 32];
  double *at = &s.a.state->sum[s.sums % 3], mine = 0;
  s.sync(); /* widths are there */
  if (blockIdx.x == 0 && threadIdx.x == 0) s.a.state->sum[(s.sums + 1) % 3] = 0;
  ++s.sums;
  for (uint32_t u = blockIdx.x; u < s.n_heads * s.slices; u += gridDim.x) {
    const uint32_t i = u / s.slices, t0 = (u - i * s.slices) * s.slice;
    const uint32_t t1 = least(t0 + s.slice, s.a.n);
    const float *d = s.v_distortion(i);
    const uint8_t *v_bits = s.v_bits(i);
    for (uint32_t t = t0 + threadIdx.x; t < t1; t += SOLVE)
      mine +=
          static_cast<double>(d[empty ? t : static_cast<size_t>(level_of(v_bits[t])) * s.a.n + t]);
    if (t0 == 0 && !empty && s.head(i)->count[0] < s.a.n)
      for (int c = static_cast<int>(threadIdx.x); c < s.a.k_dim; c += SOLVE)
        mine += static_cast<double>(s.k_distortion(i)[level_of(s.k_bits(i)[c]) * s.a.k_dim + c]);
  }
  for (int m = 16; m; m >>= 1) mine += __shfl_xor_sync(FULL, mine, m);
  __syncthreads();
  if (threadIdx.x % 32 == 0) about_sum[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (uint32_t w = 1; w < SOLVE / 32; ++w) mine += about_sum[w];
    if (mine != 0) atomicAdd(at, mine);
  }
  s.sync();
  return *static_cast<volatile double *>(at);
}

/* Whether the widths meet config.max_error. A sum in any order is off by less than a part of
   n * 2^-53 for each of n terms: only where that leaves it open are sums taken as rdkv.h does. */
__device__ __noinline__ bool within_error(solver &s) {
  const double slack = (static_cast<double>(s.a.n) * s.n_heads + 1024) * 8.8817841970012523e-16;
  const double sum = predict_about(s, false), target = predict_about(s, true) * s.a.max_error;
  if (sum < target * (1 - slack)) return true;
  if (sum > target * (1 + slack)) return false;
  const double exact = predict_all(s, false);
  return exact <= __dmul_rn(predict_all(s, true), s.a.max_error);
}

/* ---- widths for a budget */

/* rdkv__solve; or rdkv__solve_at a threshold that is given. */
__device__ __noinline__ void solve(solver &state, uint64_t budget, double *used, bool given,
                                   float threshold) {
  solver s = state; /* in registers */
  const float max = __uint_as_float(PINNED);
  /* fine bins from somewhat below what is given, which lies at the edge of one all the same */
  const uint32_t bits = __float_as_uint(threshold), below = least(bits >> 15, FINE / 2);
  float lowest = 0;
  cut at = {0, FINE};
  fine_counts first = {}; /* of this block's first unit */
  bool raised = false;
  s.choose = FRESH, s.each = 0;
  while (!given && s.a.n / FEW / 2 >> s.each) ++s.each;
  for (int round = 0; round < 2; ++round) {
    spectrum(s, given ? threshold / 2 : round ? threshold / 16 : 0);
    const uint32_t odd = round == 0 ? seen_odd(s) : 0;
    if (!given) threshold = spectrum_edge(s, budget >> s.each, round ? nullptr : &lowest);
    if (refuse(s, odd)) return s.leave(&state);
    s.choose = BY_BINS, s.chosen = threshold, s.above = __float_as_uint(threshold) >> 20;
  }
  if (given) s.round_up = TILE / 4;
  for (int tries = 0;; ++tries) { /* move the window until the budget lies in it */
    at.base = given ? __uint_as_float(bits - (below << 15)) : threshold / 2;
    fine_bins(s, at.base);
    if (blockIdx.x < s.n_heads * s.slices) first = fine_counts_of(s, blockIdx.x / s.slices);
    s.choose = KEEP, at.bin = below;
    if (given) break;
    at.bin = FINE;
    /* the lowest bin that fits */
    const uint32_t lo = static_cast<uint32_t>(
        __syncthreads_count(threadIdx.x < FINE - HIGH && s.hist()[threadIdx.x] > budget));
    if (lo == FINE - HIGH) {
      if (threshold > 1e37f || tries > 80) { /* pins alone, K dropped */
        s.choose = BY_NONE, s.chosen = max;
        break;
      }
      threshold = threshold * 2 > lowest ? threshold * 2 : lowest;
      s.choose = BY_FINE, s.chosen = threshold, s.above = FINE - HIGH - 1;
      raised = true;
    } else if (at.base > 0 && tries <= 64 && lo == 0) {
      threshold = at.base > lowest ? at.base : 0; /* below the lowest slope: everything */
      if (!raised) s.choose = threshold > 0 ? BY_FINE : BY_ALL, s.chosen = threshold, s.above = 0;
    } else {
      at.bin = lo;
      break;
    }
  }
  if (!given)
    *used = static_cast<double>(at.bin < FINE ? __uint_as_float(fine_edge(at.base, at.bin)) : max);
  finish(s, at, first, budget);
  s.leave(&state);
}

/* The least that heads can take: what is pinned, K dropped. */
__device__ __noinline__ uint64_t least_bytes(const solver &s, uint32_t first, uint32_t n_heads) {
  if (!s.a.pin) return n_heads * s.a.least_head;
  const uint32_t channels[4] = {static_cast<uint32_t>(s.a.k_dim), 0, 0, 0};
  uint32_t count[5];
  uint64_t bytes = 0;
  parts p;
  for (uint32_t i = first; i < first + n_heads; ++i) {
    uint32_t last = s.a.n;
    for (int l = 0; l < 4; ++l) {
      const uint32_t pinned = s.a.heads[i].pinned[l + 1];
      const uint32_t reach = least((pinned + TILE - 1) / TILE * TILE, s.a.n);
      count[l] = last - reach, last = reach;
    }
    count[4] = last;
    bytes += head_bytes(s.a.v_dim, s.a.positions, count, channels, &p);
  }
  return bytes;
}

/* rdkv__solve_best. */
__device__ inline void solve_best(solver &s, uint64_t budget, double *used) {
  const uint64_t tile = static_cast<uint64_t>(pad16(s.a.k_dim + s.a.v_dim)) / 16 * 256;
  const int n_bias = s.a.n >= 1024                       ? 1
                     : budget / tile < 8ull * s.n_heads  ? 7
                     : budget / tile < 64ull * s.n_heads ? 5
                                                         : 1;
  const bool large = static_cast<uint64_t>(s.a.n) * s.n_heads * (budget / 128) > 1 << 17;
  uint64_t lowest = large ? budget : least_bytes(s, s.first, s.n_heads), best_budget = budget;
  double best = 0;
  float best_bias = 0;
  bool first = true;
  if (lowest < budget / 4 * 3) lowest = budget / 4 * 3;
  const bool one = n_bias == 1 && budget < lowest + 128;
  for (uint64_t b = budget;; b -= 128) {
    for (int i = 0; i < n_bias; ++i) {
      s.bias = i == 0   ? 1.0f
               : i == 1 ? 4.0f
               : i == 2 ? 0.25f
               : i == 3 ? 16.0f
               : i == 4 ? 64.0f
               : i == 5 ? 2.0f
                        : 0.5f;
      solve(s, b, used, false, 0);
      if (one || s.refused) return;
      const double sum = predict_all(s, false);
      if (first || sum < best) best = sum, best_bias = s.bias, best_budget = b, first = false;
    }
    if (b < lowest + 128) break;
  }
  if (n_bias > 1 || best_budget != budget) { /* the last one tried is not the one to keep */
    s.bias = best_bias;
    solve(s, best_budget, used, false, 0);
  }
}

/* The smallest budget that meets config.max_error, within 0.1 %. */
__device__ inline void solve_error(solver &s, double *used) {
  uint64_t lo = least_bytes(s, 0, s.n_heads) / 128, hi = s.a.most / 128, mid = hi;
  solve(s, hi * 128, used, false, 0);
  if (s.refused) return;
  if (!within_error(s)) { /* beyond 16-bit V and 8-bit K */
    clear_widths(s);
    if (blockIdx.x == 0 && threadIdx.x == 0) fail(s.a.status, RDKV_ERR_BUDGET);
    return;
  }
  while (hi - lo > hi / 1024) {
    mid = lo + (hi - lo) / 2;
    solve(s, mid * 128, used, false, 0);
    if (within_error(s))
      hi = mid;
    else
      lo = mid + 1;
  }
  if (mid != hi) solve(s, hi * 128, used, false, 0);
}

/* ---- the authors' solver: a cluster of blocks a head, one block where there are no clusters.
   rdkv__paper_solve asks where the mean width at a lambda lies: below, within 1 % of or above the
   budget. Counts of the weights by size mostly tell; else all widths are worked out. */

enum {
  CLUSTER = 8,         /* blocks at most */
  CLUSTER_PART = 2048, /* weights from which a block has company */
  WEIGHTS = 16384,     /* of a block that stay in shared memory */
  SIZES = 4096,        /* bins of weights, 1/128 of an octave each, from the largest one down */
  SIZE_SHIFT = 16,
  LEAST_SIZE = (127 - 60) << (23 - SIZE_SHIFT), /* 2^-60: times an eps it is no subnormal */
  PAPER_WORDS = 2 * SIZES + 4 + WEIGHTS         /* of shared memory */
};

/* By the hull of eps against width. The margin is for costs that are rounded twice. */
static paper_edges paper_edges_of(const float *eps) {
  paper_edges e = paper_edges();
  for (int l = 0, next; l < 4; l = next) {
    double at = 0;
    next = 4;
    for (int m = l + 1; m < 5; ++m) {
      const double gain = static_cast<double>(eps[l]) - static_cast<double>(eps[m]);
      const double x = (width_of(m) - width_of(l)) / gain;
      if (gain > 0 && (at == 0 || x < at)) at = x, next = m;
    }
    if (at == 0) break; /* no level above is any better */
    const double cost = at * static_cast<double>(eps[l]) + width_of(l);
    const double margin = (1 + cost / (width_of(next) - width_of(next - 1))) / (1 << 20);
    const bool known = margin < 0.25 && static_cast<double>(eps[l]) > 1e-15;
    for (int m = l; m < next; ++m) {
      e.from[m] = known ? static_cast<float>(at * (1 - margin)) : 0;
      e.sure[m] = known ? static_cast<float>(at * (1 + margin)) : INFINITY;
    }
    e.width[next - 1] = static_cast<uint32_t>(width_of(next) - width_of(l));
    if (!known)
      for (int m = l; m < next; ++m)
        e.width[m] = static_cast<uint32_t>(width_of(m + 1) - width_of(m));
  }
  return e;
}

/* Mean width of V. */
__host__ __device__ inline float v_mean_of(double k_share, double tokens, uint32_t n) {
  return n > 0 ? static_cast<float>((1 - k_share) * 2 * tokens * 16 / static_cast<double>(n)) : 0;
}

/* rate[l] = lambda * width */
__device__ __forceinline__ uint32_t paper_width(float w, const float *eps, const float *rate) {
  float best = w; /* eps 1, no bits */
  uint32_t width = 0;
#pragma unroll
  for (int l = 1; l < 5; ++l) {
    const float cost = l < 4 ? __fadd_rn(__fmul_rn(w, eps[l]), rate[l]) : rate[l]; /* eps 0 */
    if (cost < best) best = cost, width = 1u << l;
  }
  return width;
}

/* The mean as rdkv.h rounds it, to double and then to float, which is as to float at once where
   float holds the sum. */
__device__ __noinline__ float mean_of_many(u64 sum, uint32_t n) {
  return __double2float_rn(__ddiv_rn(static_cast<double>(sum), static_cast<double>(n)));
}
__device__ __forceinline__ float mean_width(u64 sum, uint32_t n) {
  return n > 1u << 20
             ? mean_of_many(sum, n)
             : __fdiv_rn(static_cast<float>(static_cast<uint32_t>(sum)), static_cast<float>(n));
}

/* rdkv__paper_solve, which asks for the mean width at x. */
struct paper_search {
  float budget, lo, hi, x;
  int stage, step; /* at 0, at the ceiling, at midpoints */

  __device__ paper_search(float top, float mean)
      : budget(mean), lo(0), hi(paper_ceiling(top)), x(0), stage(0), step(0) {}

  __device__ static float paper_ceiling(float top) {
    const float hi = __fmul_rn(top, 0.375f);
    return hi > 1e-8f ? hi : 1e-8f;
  }
  __device__ static float middle(float lo, float hi) { return __fmul_rn(__fadd_rn(lo, hi), 0.5f); }
  __device__ bool over(float mean) const { return mean > budget; }
  __device__ bool close(float mean) const {
    return fabsf(__fsub_rn(mean, budget)) <= __fmul_rn(0.01f, budget);
  }

  /* On, from what the mean at x is; false: x it is. */
  __device__ bool next(bool is_over, bool is_close) {
    if (stage == 0) {
      if (!is_over) return false;
      x = hi, stage = 1;
      return true;
    }
    if (stage == 1) {
      if (is_over) {
        x = hi = __fmul_rn(hi, 2);
        if (++step < 64) return true;
      }
      stage = 2, step = 0;
    } else {
      if (is_close || ++step == 64) return false;
      if (is_over)
        lo = x;
      else
        hi = x;
    }
    x = middle(lo, hi);
    return true;
  }
};

/* A warp's walk through a search. Each lane has a lambda that may be asked for next: in a chain of
   halves, or in a tree of midpoints where node n has 2n below and 2n + 1 above. All of them are
   judged at once. */
struct paper_walk {
  paper_search s;
  float lo, hi, lambda;              /* the lane's */
  uint32_t depth, if_over, if_under; /* lanes on the way to it, by which side of them it is */
  bool over, close, known;           /* the mean at s.x, and whether that is certain */

  __device__ paper_walk(float top, float mean) : s(top, mean) { propose(); }

  __device__ void propose() {
    const uint32_t lane = threadIdx.x & 31;
    const bool start = s.stage == 0 && lane > 0; /* lane 0 has 0, lane 1 the ceiling */
    if (s.lo == 0) {
      depth = lane - start;
      lambda = __fmul_rn(s.stage == 0 ? s.hi : s.x, __uint_as_float((127 - depth) << 23));
      lo = 0, hi = depth == 0 ? s.hi : __fmul_rn(lambda, 2);
      if (s.stage == 0 && lane == 0) lambda = 0;
      if_over = start, if_under = ((1u << lane) - 1) & ~if_over;
      if (s.stage == 1 && lane > 0) if_over = FULL; /* never */
      return;
    }
    const uint32_t node = most(lane, 1);
    depth = 31 - static_cast<uint32_t>(__clz(static_cast<int>(node)));
    lo = s.lo, hi = s.hi, lambda = s.x, if_over = if_under = 0;
#pragma unroll
    for (uint32_t d = 4; d-- > 0;) { /* its bits below the first one are the way */
      const bool deeper = d < depth, up = node >> d & 1;
      const uint32_t at = deeper ? 1u << (node >> (d + 1)) : 0;
      lo = deeper && up ? lambda : lo, hi = deeper && !up ? lambda : hi;
      if_over |= up ? at : 0, if_under |= up ? 0 : at;
      lambda = paper_search::middle(lo, hi);
    }
  }

  /* By bounds of the mean at the lane's lambda: s goes on to the last one that is sure to be asked
     for. */
  __device__ void judge(float low, float high) {
    const bool o = s.over(low), c = s.close(low);
    const bool sure = c == s.close(high) && o == s.over(high);
    const uint32_t overs = __ballot_sync(FULL, sure && !c && o);
    const uint32_t unders = __ballot_sync(FULL, sure && !c && !o);
    const int at = 31 - __clz(static_cast<int>(__ballot_sync(
                            FULL, (overs & if_over) == if_over && (unders & if_under) == if_under &&
                                      static_cast<uint32_t>(s.step) + depth < 64)));
    const uint32_t is = o | c << 1 | sure << 2, at_last = __shfl_sync(FULL, is, at);
    over = at_last & 1, close = at_last & 2, known = at_last & 4;
    const bool start = s.stage == 0;
    s.lo = __shfl_sync(FULL, lo, at), s.hi = __shfl_sync(FULL, hi, at);
    s.x = __shfl_sync(FULL, lambda, at);
    if (start)
      s.stage = least(static_cast<uint32_t>(at), 2), s.step = at > 2 ? at - 2 : 0;
    else
      s.step += __shfl_sync(FULL, static_cast<int>(depth), at);
  }

  /* On; false: s.x it is. */
  __device__ bool next() {
    if (!s.next(over, close)) return false;
    propose();
    return true;
  }
};

/* This block's place among those of a head, a power of two, which write to each other's shared
   memory. What arrives there is waited for by its bytes. */
struct paper_team {
  uint32_t log, rank, turn;
  uint2 *shares; /* [2][CLUSTER * SOLVE / 32] */
  u64 *barrier;  /* [4] of the turns, and of bins that arrive */

  __device__ paper_team() : log(0), rank(0), turn(0) {
    __shared__ uint2 team_shares[2 * CLUSTER * SOLVE / 32];
    __shared__ u64 team_barrier[4];
    shares = team_shares, barrier = team_barrier;
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    log = 31 - __clz(static_cast<int>(size));
    if (size == 1) return;
    if (threadIdx.x < 4)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(
                       rdkv_cuda__shared_address(barrier + threadIdx.x))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ uint32_t size() const { return 1u << log; }

  /* Before the first words leave: the others are there. */
  __device__ void meet() const {
#if __CUDA_ARCH__ >= 900
    if (log) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

#if __CUDA_ARCH__ >= 900
  __device__ static uint32_t there(const void *p, uint32_t block) {
    uint32_t at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(at)
        : "r"(rdkv_cuda__shared_address(p)), "r"(block));
    return at;
  }
#endif
  __device__ void put(uint2 *p, uint32_t block, uint2 x, uint32_t which) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::
            "r"(there(p, block)),
        "r"(there(barrier + which, block)), "r"(x.x), "r"(x.y)
        : "memory");
#endif
  }
  __device__ void put(uint32_t *p, uint32_t block, uint4 x, uint32_t which) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, "
        "%5}, [%1];" ::"r"(there(p, block)),
        "r"(there(barrier + which, block)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
#endif
  }
  __device__ void await(uint32_t which, uint32_t bytes, uint32_t phase) const {
#if __CUDA_ARCH__ >= 900
    const uint32_t at = rdkv_cuda__shared_address(barrier + which);
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                   : "memory");
    rdkv_cuda__wait(at, phase);
#endif
  }

  /* What each warp of each block hands in: size() * SOLVE / 32, for all, until the turn after the
     next. This block's threads meet. */
  __device__ const uint2 *share(uint32_t x, uint32_t y) {
    const uint32_t side = turn & 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint2 *const at = shares + side * (CLUSTER * SOLVE / 32), *to = at + rank * (SOLVE / 32) + warp;
    if (log == 0) {
      if (lane == 0) *to = make_uint2(x, y);
    } else if (lane < size()) {
      put(to, lane, make_uint2(x, y), side);
    }
    __syncthreads();
    if (log) await(side, size() * (SOLVE / 32) * 8, turn >> 1 & 1);
    ++turn;
    return at;
  }
};

/* The channels of a head: its first block. */
struct paper_channels {
  float weight[MAX_DIM], lambda[32];
  uint32_t sum[SOLVE / 32 - 1][32];
  int more;
};

/* Sums of widths at a lambda a lane, each warp but the first over some of the channels. */
__device__ inline void add_channels(const solve_args &a, paper_channels &c, float lambda) {
  float rate[5];
  uint32_t sum = 0;
  for (int l = 1; l < 5; ++l) rate[l] = __fmul_rn(lambda, static_cast<float>(width_of(l)));
  const uint32_t warp = threadIdx.x / 32 - 1;
#pragma unroll 3
  for (uint32_t i = warp; i < static_cast<uint32_t>(a.k_dim); i += SOLVE / 32 - 1)
    sum += paper_width(c.weight[i], a.eps_k, rate);
  c.sum[warp][threadIdx.x & 31] = sum;
}

/* rdkv__paper_solve for them, the sums of the first lambdas being there. */
__device__ inline void solve_channels(const solve_args &a, paper_channels &c, float top,
                                      float budget, uint8_t *bits, uint32_t *channels) {
  const uint32_t lane = threadIdx.x & 31, kd = static_cast<uint32_t>(a.k_dim);
  paper_walk walk(top, budget);
  for (;;) {
    if (threadIdx.x < 32) {
      uint32_t sum = 0;
#pragma unroll
      for (int w = 0; w < SOLVE / 32 - 1; ++w) sum += c.sum[w][lane];
      const float mean = mean_width(sum, kd);
      walk.judge(mean, mean);
      const bool more = walk.next();
      c.lambda[lane] = walk.lambda;
      if (lane == 0) c.more = more;
    }
    __syncthreads();
    if (!c.more) break;
    if (threadIdx.x >= 32) add_channels(a, c, c.lambda[lane]);
    __syncthreads();
  }
  if (threadIdx.x >= 32) return;
  float rate[5];
  for (int l = 1; l < 5; ++l) rate[l] = __fmul_rn(walk.s.x, static_cast<float>(width_of(l)));
  for (uint32_t i = lane; i < kd; i += 32) {
    const uint32_t width = paper_width(c.weight[i], a.eps_k, rate);
    bits[i] = static_cast<uint8_t>(width);
    if (channels) atomicAdd(&channels[width > 4 ? 3 : width / 2], 1u);
  }
}

/* A head's weights, or this block's part of them: a thread has four in turn, which it alone reads
   and writes. In shared memory: counts by size, their sums, weights. */
struct paper_part {
  const solve_args &a;
  const layer_view &view;
  const size_t row;
  paper_team team;
  const float *weight;
  uint8_t *bits;
  uint32_t begin, n, staged, base;

  __device__ paper_part(const solve_args &args, uint32_t layer, uint32_t head)
      : a(args),
        view(a.n_layers <= VIEWS ? a.few.view[layer] : a.layers[layer]),
        row(head),
        staged(FULL),
        base(0) {
    const uint32_t each = (a.n + 4 * team.size() - 1) >> (team.log + 2) << 2;
    begin = least(team.rank * each, a.n), n = least(each, a.n - begin);
    weight = view.token + row * a.n + begin, bits = view.v_bits + row * a.n + begin;
  }

  __device__ static uint32_t *sizes() { return reinterpret_cast<uint32_t *>(solve_shared); }
  __device__ static uint32_t *above() { return sizes() + SIZES; } /* [SIZES + 4] */
  __device__ static float *weights() { return reinterpret_cast<float *>(above() + SIZES + 4); }

  /* f(t, weights t to t + 3, zeroes beyond the end) */
  template <typename F>
  __device__ __forceinline__ void each(F f) {
    for (uint32_t first = 0; first < n; first += WEIGHTS) {
      const uint32_t m = least(WEIGHTS, n - first);
      if (staged != first)
        stage_floats(weights(), weight + first, m), staged_floats(), staged = first;
#pragma unroll 2
      for (uint32_t t = 4 * threadIdx.x; t < m; t += 4 * SOLVE)
        f(first + t, *reinterpret_cast<const float4 *>(weights() + t));
    }
  }
  /* Largest bits; of what is no number >= 0 they are larger than of infinity. */
  __device__ uint32_t top() {
    uint32_t x = 0;
    each([&](uint32_t, float4 w) {
      x = most(most(x, most(__float_as_uint(w.x), __float_as_uint(w.y))),
               most(__float_as_uint(w.z), __float_as_uint(w.w)));
    });
    return __reduce_max_sync(FULL, x);
  }

  /* Bin; 0 has all that are smaller, too. */
  __device__ uint32_t size_of(float x) const {
    return least(most(__float_as_uint(x) >> SIZE_SHIFT, base) - base, SIZES);
  }

  /* Counts of the head's weights in each bin and above, for the largest of them. sizes() is zero.
   */
  __device__ void count(uint32_t top) {
    __shared__ uint32_t scratch[SOLVE / 32];
    const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
    base = most(most(top >> SIZE_SHIFT, SIZES - 1) - (SIZES - 1), LEAST_SIZE);
    each([&](uint32_t, float4 w) {
      atomicAdd(sizes() + size_of(w.x), 1u), atomicAdd(sizes() + size_of(w.y), 1u);
      atomicAdd(sizes() + size_of(w.z), 1u), atomicAdd(sizes() + size_of(w.w), 1u);
    });
    if (tid == 0) atomicSub(sizes(), -n & 3u); /* the zeroes beyond the end */
    __syncthreads();
    if (team.log) { /* each block adds up some of the bins, for all */
      const uint32_t slice = SIZES >> team.log;
      for (uint32_t b = 4 * tid; b < SIZES; b += 4 * SOLVE)
        team.put(above() + team.rank * slice + (b & (slice - 1)), (b << team.log) / SIZES,
                 *reinterpret_cast<const uint4 *>(sizes() + b), 2);
      team.await(2, SIZES * 4, 0);
      for (uint32_t b = 4 * tid; b < slice; b += 4 * SOLVE) {
        uint4 all = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t i = 0; i < CLUSTER; ++i) {
          if (i >= team.size()) continue;
          const uint4 x = *reinterpret_cast<const uint4 *>(above() + i * slice + b);
          all.x += x.x, all.y += x.y, all.z += x.z, all.w += x.w;
        }
#pragma unroll
        for (uint32_t i = 0; i < CLUSTER; ++i)
          if (i < team.size()) team.put(sizes() + team.rank * slice + b, i, all, 3);
      }
      team.await(3, SIZES * 4, 0);
    }
    enum { EACH = SIZES / SOLVE }; /* from above */
    uint4 x[EACH / 4];
    uint4 *const mine = reinterpret_cast<uint4 *>(sizes() + SIZES - EACH - EACH * tid);
    uint32_t sum = 0, all;
#pragma unroll
    for (int i = EACH / 4; i-- > 0;) {
      x[i] = mine[i];
      x[i].w += sum, x[i].z += x[i].w, x[i].y += x[i].z, x[i].x += x[i].y, sum = x[i].x;
    }
    all = sum;
    sum = warp_scan(sum);
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    sum += __reduce_add_sync(FULL, lane < warp ? scratch[lane] : 0) - all;
#pragma unroll
    for (int i = 0; i < EACH / 4; ++i)
      mine[SIZES / 4 + i] = make_uint4(x[i].x + sum, x[i].y + sum, x[i].z + sum, x[i].w + sum);
    if (tid == 0) above()[SIZES] = 0;
    __syncthreads();
  }

  /* Of the head's mean width at lambda. */
  __device__ float2 bounds(float lambda) const {
    u64 low = 0, high = 0;
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      const uint32_t from = size_of(__fmul_rn(lambda, a.edges.from[l]));
      const uint32_t sure = size_of(__fmul_rn(lambda, a.edges.sure[l]));
      high += static_cast<u64>(a.edges.width[l]) * above()[from];
      low += static_cast<u64>(a.edges.width[l]) * above()[least(sure + 1, SIZES)];
    }
    return make_float2(mean_width(low, a.n), mean_width(high, a.n));
  }

  /* The head's widths at lambda: their mean, and how many are not 0. */
  __device__ float widths(float lambda, uint32_t *kept) {
    const bool words = (reinterpret_cast<uintptr_t>(bits) & 3) == 0;
    float rate[5];
    uint32_t sum = 0, some = 0, high = 0;
    for (int l = 1; l < 5; ++l) rate[l] = __fmul_rn(lambda, static_cast<float>(width_of(l)));
    each([&](uint32_t t, float4 w) {
      const uint32_t four = paper_width(w.x, a.eps_v, rate) | paper_width(w.y, a.eps_v, rate) << 8 |
                            paper_width(w.z, a.eps_v, rate) << 16 |
                            paper_width(w.w, a.eps_v, rate) << 24;
      sum = __dp4a(four, 0x01010101u, sum), some += static_cast<uint32_t>(__popc(four));
      if (words && t + 4 <= n)
        *reinterpret_cast<uint32_t *>(bits + t) = four;
      else
        for (uint32_t i = 0; i < 4 && t + i < n; ++i)
          bits[t + i] = static_cast<uint8_t>(four >> (8 * i));
    });
    const uint2 *const all =
        team.share(__reduce_add_sync(FULL, sum), __reduce_add_sync(FULL, some));
    sum = some = 0;
    for (uint32_t i = threadIdx.x & 31; i < team.size() * (SOLVE / 32); i += 32)
      sum += all[i].x & 0xffffu, high += all[i].x >> 16, some += all[i].y;
    sum = __reduce_add_sync(FULL, sum), high = __reduce_add_sync(FULL, high);
    *kept = __reduce_add_sync(FULL, some);
    return mean_width(sum + (static_cast<u64>(high) << 16), a.n);
  }
};

/* rdkv__paper_layer for a head, its mean width of V and bits of K over a channel. counts: its
   solve_head, if that is wanted. False: no weights. */
__device__ inline bool paper_head(const solve_args &a, uint32_t layer, uint32_t head, float v_mean,
                                  double k_bits, solve_head *counts) {
  __shared__ paper_channels channels;
  __shared__ float order[1]; /* where widths are wanted, or -1 */
  const uint32_t tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
  const uint32_t kd = static_cast<uint32_t>(a.k_dim);
  paper_part part(a, layer, head);
  const bool first_block = part.team.rank == 0;
  const uint32_t error = *a.status;
  uint32_t top = 0, odd = 0;
  float k_top = 0;
  for (uint32_t c = tid; c < kd && first_block; c += SOLVE) {
    const float q = part.view.q_square[part.row * kd + c];
    const float k = part.view.k_square[part.row * kd + c];
    if (most(__float_as_uint(q), __float_as_uint(k)) >= 0x7f800000u) top = FULL;
    channels.weight[c] = __fmul_rn(q, k);
  }
  for (uint32_t b = 4 * tid; b < SIZES; b += 4 * SOLVE)
    *reinterpret_cast<uint4 *>(part.sizes() + b) = make_uint4(0, 0, 0, 0);
  if (counts && tid < 5) counts->count[tid] = 0;
  if (counts && tid < 4) counts->channels[tid] = 0;
  top = most(__reduce_max_sync(FULL, top), part.top());
  part.team.meet();
  const uint2 *const tops = part.team.share(top, __reduce_or_sync(FULL, error));
  for (uint32_t i = lane; i < part.team.size() * (SOLVE / 32); i += 32)
    top = most(top, tops[i].x), odd |= tops[i].y;
  top = __reduce_max_sync(FULL, top);
  if (top >= 0x7f800000u || __any_sync(FULL, odd)) { /* for all blocks of the head */
    if (tid == 0) fail(a.status, RDKV_ERR_NONFINITE);
    return false;
  }
  part.count(top);
  paper_walk walk(__uint_as_float(top), v_mean);
  for (uint32_t c = lane; c < kd && first_block; c += 32) k_top = fmaxf(k_top, channels.weight[c]);
  k_top = __uint_as_float(__reduce_max_sync(FULL, __float_as_uint(k_top)));
  if (warp > 0 && first_block) { /* while the first warp begins */
    add_channels(a, channels, paper_walk(k_top, 0).lambda);
  }
  float done = -1;
  uint32_t kept = 0;
  for (bool on = a.n > 0;;) { /* the first warp decides, all work */
    if (warp == 0) {
      walk.known = true;
      while (on && walk.known) {
        const float2 m = part.bounds(walk.lambda);
        walk.judge(m.x, m.y);
        on = !walk.known || walk.next();
      }
      /* a search that asks the same twice does so until its end */
      order[0] = a.n == 0 || done == walk.s.x ? -1 : walk.s.x;
    }
    __syncthreads();
    done = order[0];
    if (done < 0) break;
    const float mean = part.widths(done, &kept);
    if (warp == 0 && on) {
      walk.over = walk.s.over(mean), walk.close = walk.s.close(mean);
      on = walk.next();
    }
  }
  if (counts) {
    for (uint32_t t = 4 * tid; t < part.n; t += 4 * SOLVE)
      for (uint32_t i = t; i < t + 4 && i < part.n; ++i)
        atomicAdd(&counts->count[level_of(part.bits[i])], 1u);
  }
  if (!first_block) return true;
  uint8_t *const to = part.view.k_bits + part.row * kd;
  if (kept > 0) {
    solve_channels(a, channels, k_top, __double2float_rn(k_bits / static_cast<double>(kept)), to,
                   counts ? counts->channels : nullptr);
  } else {
    for (uint32_t c = tid; c < kd; c += SOLVE) to[c] = 0;
    if (counts && tid == 0) counts->channels[0] = kd;
  }
  return true;
}

static __global__ void __launch_bounds__(SOLVE, 1)
    paper_kernel(const __grid_constant__ solve_args a) {
  uint32_t head = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(head));
#endif
  if (!paper_head(a, blockIdx.y, head, a.v_mean, a.k_bits, nullptr)) return;
  for (int l = static_cast<int>(threadIdx.x); l < a.n_layers && blockIdx.x + blockIdx.y == 0;
       l += SOLVE)
    a.lambda[l] = 0;
}

/* For a budget of bytes: most tokens whose block fits. A cooperative launch without clusters. */
static __global__ void __launch_bounds__(SOLVE, 1)
    paper_search_kernel(const __grid_constant__ solve_args a) {
  take_arguments(a);
  solver s;
  const uint64_t budget = a.given_budget ? *a.given_budget : a.budget;
  const bool failed = *a.status != RDKV_OK;
  double lo = 0, hi = 2 * static_cast<double>(a.n) + 1;
  auto fits = [&](double tokens) {
    for (uint32_t i = blockIdx.x; i < a.n_heads; i += gridDim.x) {
      __syncthreads();
      paper_head(a, i / a.n_kv_heads, i % a.n_kv_heads, v_mean_of(a.k_share, tokens, a.n),
                 a.k_share * 2 * tokens * 16, a.heads + i);
    }
    s.sync();
    const bool fit = a.fixed + bytes_now(s) <= budget;
    s.sync();
    return fit;
  };
  s.sync();
  if (failed) return;
  for (int step = 0; step <= 24; ++step) {
    const double mid = budget == 0 ? a.tokens : step < 24 ? (lo + hi) / 2 : lo;
    const bool fit = fits(mid);
    if (budget == 0) break;
    if (step == 24 && !fit) {
      clear_widths(s);
      if (blockIdx.x == 0 && threadIdx.x == 0) fail(a.status, RDKV_ERR_BUDGET);
      return;
    }
    if (fit)
      lo = mid;
    else
      hi = mid;
  }
  for (int l = static_cast<int>(threadIdx.x); l < a.n_layers && blockIdx.x == 0; l += SOLVE)
    a.lambda[l] = 0;
}

/* Bytes of one of the parts that are left, in whole units of 128. */
__device__ __forceinline__ uint64_t part_of(uint64_t left, uint32_t parts) {
  return (parts == 1 ? left : left / parts) / 128 * 128;
}

static __device__ __forceinline__ void solve_all(const solve_args &a, solver &s, uint32_t failed) {
  const uint32_t first = blockIdx.x * SOLVE + threadIdx.x, step = gridDim.x * SOLVE;
  const uint32_t kd = static_cast<uint32_t>(a.k_dim);
  const bool by_budget = a.scope != RDKV_SCOPE_LAMBDA && a.max_error == 0;
  const uint32_t n_parts = !by_budget || a.scope == RDKV_SCOPE_MODEL ? 1u
                           : a.scope == RDKV_SCOPE_LAYER ? static_cast<uint32_t>(a.n_layers)
                                                         : a.n_heads;
  const uint32_t each = a.n_heads / n_parts;
  const uint64_t budget = a.given_budget ? *a.given_budget : a.budget;
  if (s.alone()) { /* what a memset does otherwise */
    for (uint32_t i = first; i < a.n_heads * BINS; i += step) a.bins[0][i] = 0;
    for (uint32_t i = first; i < BINS; i += step) a.hist[0][i] = 0;
    if (first == 0) *a.state = solve_state();
  }
  for (uint32_t i = first; i < a.n_heads; i += step) {
    s.head(i)->done = 0;
    for (int l = 0; l < 5 && !a.pin; ++l) s.head(i)->pinned[l] = 0;
  }
  if (failed != RDKV_OK) return;
  s.clear();
  bool too_little = by_budget && budget < a.fixed;
  for (uint32_t i = 0; i < n_parts && by_budget && !too_little && (i == 0 || a.pin); ++i)
    too_little = part_of(budget - a.fixed, n_parts) < least_bytes(s, i * each, each);
  /* Weights and distortions must be finite and >= 0. Where all heads go through one solve its first
     pass sees that, before anything is written. */
  const bool look = n_parts > 1 || too_little;
  bool odd = false;
  for (int l = 0; l < a.n_layers && look; ++l) {
    const layer_view &layer = a.n_layers <= VIEWS ? a.few.view[l] : a.layers[l];
    const size_t n = static_cast<size_t>(a.n) * a.n_kv_heads * 5;
#pragma unroll 4
    for (size_t t = first; t < n; t += step)
      odd |= __float_as_uint(layer.v_distortion[t]) >= 0x7f800000u;
  }
  for (uint32_t j = first; j < a.n_heads * 4 * kd && look; j += step) {
    const uint32_t i = j / (4 * kd), c = j - i * (4 * kd);
    odd |= __float_as_uint(s.k_distortion(i)[c]) >= 0x7f800000u;
  }
  if (look) s.all_clear();
  if (odd) atomicOr(&a.state->odd, 1u);
  if (look) {
    s.sync();
    if (refuse(s, seen_odd(s))) return;
  }
  if (too_little) {
    if (blockIdx.x == 0 && threadIdx.x == 0) fail(a.status, RDKV_ERR_BUDGET);
    return;
  }
  double used = 0;
  if (a.scope == RDKV_SCOPE_LAMBDA) {
    used = a.device_lambda ? *a.device_lambda : a.given_lambda;
    solve(s, 0, nullptr, true,
          used > 3.4028234663852886e38 ? __uint_as_float(PINNED) : __double2float_rn(used));
  } else if (a.max_error > 0) {
    solve_error(s, &used);
  } else {
    uint64_t left = budget - a.fixed;
    for (uint32_t i = 0; i < n_parts; ++i) { /* equal parts; crumbs go on to the next */
      if (n_parts > 1) s.part(i * each, each);
      solve_best(s, part_of(left, n_parts - i), &used);
      if (s.refused) return;
      if (blockIdx.x == 0 && threadIdx.x == 0)
        for (uint32_t h = i * each; h < (i + 1) * each; ++h) a.lambda[h / a.n_kv_heads] = used;
      if (i + 1 == n_parts) return;
      s.sync();
      left -= bytes_now(s);
      s.sync();
    }
  }
  for (int l = static_cast<int>(threadIdx.x); l < a.n_layers && blockIdx.x == 0; l += SOLVE)
    a.lambda[l] = used;
}

static __global__ void __launch_bounds__(SOLVE, 1)
    solve_kernel(const __grid_constant__ solve_args given) {
  const uint32_t failed = *given.status; /* nobody writes it before the first barrier */
  take_arguments(given);
  solver s;
  solve_all(s.a, s, failed);
  s.wait(); /* nothing is under way when the block ends */
}

/* ---- widths at a given threshold : heads do not depend on each other, and a block has one */

enum { AT_TOKENS = 1024 }; /* of a head at most */

/* rdkv__solve_at of a head of few tokens, a thread each, and for each channel. */
static __global__ void __launch_bounds__(AT_TOKENS)
    at_kernel(const __grid_constant__ solve_args a) {
  __shared__ u64 k_key[MAX_DIM];
  __shared__ v_costs c;
  if (*a.status != RDKV_OK) return;
  const uint32_t tid = threadIdx.x, kd = static_cast<uint32_t>(a.k_dim), n = a.n;
  const uint32_t layer = blockIdx.x / a.n_kv_heads, row = blockIdx.x % a.n_kv_heads;
  const layer_view &view = a.n_layers <= VIEWS ? a.few.view[layer] : a.layers[layer];
  const bool has_token = tid < n, has_channel = tid < kd;
  const double given = a.device_lambda ? *a.device_lambda : a.given_lambda;
  const float threshold =
      given > 3.4028234663852886e38 ? __uint_as_float(PINNED) : __double2float_rn(given);
  const uint32_t edge = __float_as_uint(threshold),
                 base =
                     (edge >> 15) - least(edge >> 15, FINE / 2); /* as rdkv__fine_bins wants it */
  const int pin = a.pin && has_token ? a.pin[static_cast<size_t>(blockIdx.x) * n + tid] : 0;
  float x[5] = {0, 0, 0, 0, 0}, k[4] = {0, 0, 0, 0};
  bool odd = false;
#pragma unroll
  for (size_t l = 0; l < 5; ++l)
    if (has_token) x[l] = view.v_distortion[(static_cast<size_t>(row) * 5 + l) * n + tid];
#pragma unroll
  for (uint32_t l = 0; l < 4; ++l)
    if (has_channel) k[l] = view.k_distortion[(row * 4 + l) * kd + tid];
#pragma unroll
  for (int l = 0; l < 5; ++l) odd |= __float_as_uint(x[l]) >= 0x7f800000u;
#pragma unroll
  for (int l = 0; l < 4; ++l) odd |= __float_as_uint(k[l]) >= 0x7f800000u;
  if (odd) fail(a.status, RDKV_ERR_NONFINITE);
  uint32_t k_tile = first_k_tile(a.k_dim), k_level = 0, slope[4] = {0, 0, 0, 0};
  const auto v_slopes = [&](uint32_t k_bytes) {
    __syncthreads();
    set_costs(a.v_dim, a.positions, k_bytes, c);
    __syncthreads();
    if (has_token) slopes_of(x, c, slope), pinned_slopes(x, c, pin, slope);
  };
  /* K for the tokens at the threshold, which depend on the bytes that K takes: two rounds */
  for (int round = 0; round < 2; ++round) {
    v_slopes(k_tile);
    const uint32_t tokens =
        static_cast<uint32_t>(__syncthreads_count(__uint_as_float(slope[0]) > threshold / 2 &&
                                                  bin_of(__uint_as_float(slope[0])) >= edge >> 20));
    const float tiles = static_cast<float>((most(tokens, 1) + TILE - 1) / TILE);
    uint32_t k_slope[3], reach[5] = {kd, 0, 0, 0, 0};
    k_slopes(k, tiles * 8, k_slope);
    k_level = 0;
#pragma unroll
    for (uint32_t l = 0; l < 3; ++l) { /* the best of those at the level below, whole blocks */
      const int able = __syncthreads_count(has_channel && __uint_as_float(k_slope[l]) > threshold);
      const uint32_t want = least((static_cast<uint32_t>(able) + 8) / 16 * 16, reach[l]);
      const u64 key = static_cast<u64>(k_slope[l]) << 32 | ~tid;
      uint32_t rank = 0;
      if (want > 0 && want < reach[l]) {
        if (has_channel) k_key[tid] = k_level == l ? key : 0;
        __syncthreads();
#pragma unroll 16
        for (uint32_t o = 0; o < kd && has_channel; ++o) rank += k_key[o] > key;
      }
      if (k_level == l && rank < want) k_level = l + 1;
      reach[l + 1] = want;
    }
    const uint32_t before = k_tile;
    k_tile = 0;
    for (int l = 1; l < 4; ++l) k_tile += (reach[l] - reach[l + 1] + 15) / 16 * (64u << l);
    if (k_tile == before) break; /* the next round would end like this one */
  }
  if (has_channel)
    view.k_bits[row * kd + tid] = static_cast<uint8_t>(width_of(static_cast<int>(k_level)));
  /* level after level the best of those at the level below rise, as many as rdkv__tiles says for
     the threshold's fine bin; a tile may lack a quarter */
  v_slopes(k_tile);
  uint32_t below = n;
  int level = has_token ? 0 : -1;
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    uint32_t reach =
        static_cast<uint32_t>(__syncthreads_count(slope[l] > 0 && slope[l] >> 15 >= edge >> 15));
    const uint32_t pinned = a.pin ? a.heads[blockIdx.x].pinned[l + 1] : 0;
    uint32_t high[HIGH] = {0};
#pragma unroll
    for (uint32_t i = 0; i < HIGH; ++i)
      if (base > 0 && (i ? high[i - 1] : reach) > pinned)
        high[i] = static_cast<uint32_t>(
            __syncthreads_count(slope[l] >> 15 >= base + FINE - HIGH + 256 * i));
    uint32_t want = least(whole_tiles(reach + TILE / 4, n, high, pinned) * TILE, n);
    want = least(most(want, pinned), below);
    const u64 key =
        static_cast<u64>(slope[l] >> 15 >= base ? slope[l] : 0) << 10 | (AT_TOKENS - 1 - tid);
    u64 limit = 0; /* the least key that rises: bit by bit, until it leaves as many as it should */
    for (u64 bit = want > 0 && want < below ? 1ull << 41 : 0; bit; bit >>= 1) {
      const uint32_t above =
          static_cast<uint32_t>(__syncthreads_count(level == l && key >= (limit | bit)));
      if (above >= want) limit |= bit;
      if (above == want) break;
    }
    if (level == l && want > 0 && key >= limit) level = l + 1;
    below = want;
  }
  if (has_token)
    view.v_bits[static_cast<size_t>(row) * n + tid] = static_cast<uint8_t>(width_of(level));
  if (tid == 0 && row == 0) a.lambda[layer] = given;
}

/* ---- histograms, and layer after layer of a prompt */

struct histogram_args {
  const float *v_distortion; /* [heads][5][n] */
  const uint8_t *k_bits;     /* [heads][k_dim]; where all are 0, 4 bits are counted with */
  u64 *bytes;                /* [BINS] */
  uint32_t n, slice;
  int k_dim, v_dim, positions;
};

/* rdkv__spectrum of a slice of a head. */
static __global__ void __launch_bounds__(SOLVE) histogram_kernel(histogram_args a) {
  __shared__ v_costs costs;
  __shared__ uint32_t count[4 * BINS];
  __shared__ uint32_t channels[4];
  const uint32_t tid = threadIdx.x, kd = static_cast<uint32_t>(a.k_dim);
  const float *d = a.v_distortion + static_cast<size_t>(blockIdx.y) * 5 * a.n;
  const uint32_t t0 = blockIdx.x * a.slice, t1 = least(t0 + a.slice, a.n);
  if (tid < 4) channels[tid] = 0;
  for (uint32_t b = tid; b < 4 * BINS; b += SOLVE) count[b] = 0;
  __syncthreads();
  if (tid < kd) {
    const int level = level_of(a.k_bits[blockIdx.y * kd + tid]);
    atomicAdd(&channels[level < 0 ? 0 : level > 3 ? 3 : level], 1u);
  }
  __syncthreads();
  uint32_t k_tile = 0;
  for (int l = 1; l < 4; ++l) k_tile += (channels[l] + 15) / 16 * (64u << l);
  set_costs(a.v_dim, a.positions, k_tile ? k_tile : first_k_tile(a.k_dim), costs);
  __syncthreads();
  const v_costs c = costs;
  for (uint32_t t = t0 + tid; t < t1; t += SOLVE) {
    float x[5];
    uint32_t slope[4];
#pragma unroll
    for (int l = 0; l < 5; ++l) x[l] = d[static_cast<size_t>(l) * a.n + t];
    slopes_of(x, c, slope);
#pragma unroll
    for (uint32_t l = 0; l < 4; ++l)
      if (slope[l]) atomicAdd(&count[l * BINS + least(slope[l] >> 20, BINS - 1)], 1u);
  }
  __syncthreads();
  for (uint32_t b = tid + (tid == 0 ? SOLVE : 0); b < BINS; b += SOLVE) { /* not the lowest bin */
    u64 bytes = 0;
#pragma unroll
    for (uint32_t l = 0; l < 4; ++l)
      bytes += static_cast<u64>(count[l * BINS + b]) * static_cast<uint32_t>(c.cost[l]);
    if (bytes) atomicAdd(&a.bytes[b], bytes);
  }
}

__device__ __forceinline__ u64 add_capped(u64 a, u64 b) { return a + b < a ? ~0ull : a + b; }

static __global__ void merge_kernel(u64 *dst, const uint64_t *src) {
  const uint32_t b = blockIdx.x * THREADS + threadIdx.x;
  if (b < BINS) dst[b] = add_capped(dst[b], src[b]);
}

/* rdkv_histogram_lambda by one warp, 64 bins a lane. Sums stay at the largest, as there. */
static __global__ void lambda_kernel(const uint64_t *hist, uint64_t bytes, double *lambda) {
  enum { EACH = BINS / 32 };
  const uint32_t lane = threadIdx.x, top = BINS - 1 - lane * EACH;
  u64 sum = 0;
#pragma unroll 16
  for (uint32_t i = 0; i < EACH; ++i) sum = add_capped(sum, hist[top - i]);
  for (int d = 1; d < 32; d <<= 1) {
    const u64 y = __shfl_up_sync(FULL, sum, d);
    if (lane >= static_cast<uint32_t>(d)) sum = add_capped(sum, y);
  }
  sum = __shfl_up_sync(FULL, sum, 1);
  if (lane == 0) sum = 0;
  uint32_t found = 0; /* the highest bin with which it is too much */
#pragma unroll 16
  for (uint32_t i = 0; i < EACH; ++i) {
    sum = add_capped(sum, hist[top - i]);
    if (top > i && sum > bytes) found = most(found, top - i);
  }
  found = __reduce_max_sync(FULL, found);
  if (lane == 0)
    *lambda = static_cast<double>(__uint_as_float(found < 0x7f7 ? (found + 1) << 20 : PINNED));
}

struct stream_args {
  rdkv_stream *state;
  u64 *own;         /* [BINS] the layer's histogram */
  uint64_t *budget; /* of the layer */
  const double *lambda;
  const uint64_t *bytes;
  uint32_t *status;
  uint64_t total, fixed, tables; /* the budget of all layers; of a layer's block */
  int layer, n_layers, share;    /* share: RDKV_JOINT by budget */
};

/* The layer's part of the budget, as rdkv_stream_layer finds it: by rdkv__stream_share, or evenly.
   Sums of bytes are whole numbers, so doubles have them exactly in any order. One block. */
static __global__ void __launch_bounds__(THREADS) share_kernel(stream_args a) {
  enum { EACH = BINS / THREADS };
  __shared__ u64 scratch[33];
  __shared__ u64 any[1];
  __shared__ uint32_t end[1];
  __shared__ u64 fits[2]; /* own, reach */
  const rdkv_stream *s = a.state;
  const rdkv_histogram *earlier = s->earlier;
  const uint32_t tid = threadIdx.x, first = tid * EACH; /* bins are counted from the top here */
  const u64 after = static_cast<u64>(a.n_layers - a.layer - 1);
  const u64 left = a.total > s->spent_bytes ? a.total - s->spent_bytes : 0;
  if (s->next_layer != a.layer) {
    if (tid == 0) fail(a.status, RDKV_ERR_ARGUMENT);
    return;
  }
  if (!a.share) {
    if (tid == 0) *a.budget = left / (after + 1);
    return;
  }
  u64 own[EACH], ahead[EACH], now[EACH], then[EACH], sums[4] = {0, 0, 0, 0}, all;
  if (tid == 0) any[0] = 0, end[0] = BINS - 1, fits[0] = fits[1] = 0;
  __syncthreads();
  for (uint32_t i = 0; i < EACH; ++i) {
    const uint32_t bin = BINS - 1 - first - i;
    own[i] = a.own[bin], now[i] = s->seen.bytes[bin] + own[i], ahead[i] = 0;
    for (int l = a.layer + 1; l < a.n_layers && earlier; ++l)
      ahead[i] = add_capped(ahead[i], earlier[l].bytes[bin]);
    if (ahead[i] && bin > 0) any[0] = 1;
  }
  __syncthreads();
  const bool known = any[0] != 0;
  for (uint32_t i = 0; i < EACH; ++i) {
    const uint32_t bin = BINS - 1 - first - i;
    if (!known)
      ahead[i] = __double2ull_rz(
          __dmul_rn(__ddiv_rn(static_cast<double>(now[i]), static_cast<double>(a.layer + 1)),
                    static_cast<double>(after)));
    then[i] = known ? s->seen_in_earlier.bytes[bin] + earlier[a.layer].bytes[bin] : now[i];
    sums[0] += own[i], sums[1] += ahead[i], sums[2] += now[i], sums[3] += then[i];
  }
  for (int k = 0; k < 4; ++k) sums[k] = block_scan(sums[k], scratch, &all);
  const u64 tables = a.tables * (after + 1), room = left > tables ? left - tables : 0;
  u64 mine[2][EACH]; /* own and all bytes down to a bin */
  for (uint32_t i = 0; i < EACH; ++i) {
    sums[0] += own[i], sums[1] += ahead[i], sums[2] += now[i], sums[3] += then[i];
    const double own_sum = static_cast<double>(sums[0]), ahead_sum = static_cast<double>(sums[1]);
    double sum = own_sum;
    if (sums[1] > 0)
      sum = __dadd_rn(
          sum, __dmul_rn(ahead_sum, __ddiv_rn(__dadd_rn(static_cast<double>(sums[2]), ahead_sum),
                                              __dadd_rn(static_cast<double>(sums[3]), ahead_sum))));
    mine[0][i] = sums[0], mine[1][i] = __double2ull_rz(sum);
    if (sum > static_cast<double>(room)) atomicMin(&end[0], first + i);
  }
  __syncthreads();
  for (uint32_t i = 0; i < EACH; ++i)
    if (first + i + 1 == end[0]) fits[0] = mine[0][i], fits[1] = mine[1][i];
  __syncthreads();
  if (tid > 0) return;
  u64 part = fits[0];
  if (room > fits[1]) part += (room - fits[1]) / (after + 1);
  part = after == 0 ? left : part + tables / (after + 1);
  if (part > left) part = left;
  *a.budget = part ? part : 1;
}

/* The layer has been packed: what later layers and the next prompt want to know. */
static __global__ void __launch_bounds__(THREADS) seen_kernel(stream_args a) {
  rdkv_stream *s = a.state;
  if (*a.status != RDKV_OK) return;
  for (uint32_t b = threadIdx.x; b < BINS && a.own; b += THREADS) {
    s->seen.bytes[b] = add_capped(s->seen.bytes[b], a.own[b]);
    if (!s->earlier) continue;
    uint64_t *earlier = &s->earlier[a.layer].bytes[b];
    s->seen_in_earlier.bytes[b] = add_capped(s->seen_in_earlier.bytes[b], *earlier);
    *earlier = a.own[b];
  }
  if (threadIdx.x == 0)
    s->lambda = *a.lambda, s->spent_bytes += *a.bytes, s->next_layer = a.layer + 1;
}

/* ---- the host's side */

/* Takes pieces of a workspace, or counts their bytes. */
struct arena {
  uint8_t *next;
  size_t bytes;
  template <typename T>
  void take(T **p, uint64_t n) {
    const size_t size = static_cast<size_t>(round_up(n * sizeof(T), 256));
    if (next) *p = reinterpret_cast<T *>(next + bytes);
    bytes += size;
  }
};

static bool resolved(const rdkv_config *c) {
  return c && c->n_layers > 0 && c->n_kv_heads > 0 && c->k_dim > 0 && c->k_dim <= MAX_DIM &&
         c->v_dim > 0 && c->v_dim <= MAX_DIM && c->window > 0 && c->n_q_heads % c->n_kv_heads == 0;
}
static bool tensor_ok(const rdkv_tensor &t) {
  return t.data && static_cast<unsigned>(t.dtype) <= RDKV_BF16 && t.token_stride < 1 << 23 &&
         t.token_stride > -(1 << 23) &&
         reinterpret_cast<uintptr_t>(t.data) % (t.dtype == RDKV_F32 ? 4 : 2) == 0;
}
static bool layer_ok(const rdkv_layer *l) {
  return l && l->token && l->q_square && l->k_square && l->mean_out && l->v_distortion &&
         l->k_distortion && l->v_bits && l->k_bits;
}
static bool layers_ok(const rdkv_layer *layers, int n_layers) {
  for (int i = 0; i < n_layers; ++i)
    if (!layer_ok(&layers[i]) || layers[i].n_tokens != layers[0].n_tokens) return false;
  return n_layers > 0;
}
static uint32_t chunks_of(uint32_t n) { return n ? (n + CHUNK - 1) / CHUNK : 1; }
static uint32_t blocks_of(uint32_t n, uint32_t each, uint32_t limit) {
  const uint32_t blocks = n / each + (n % each != 0);
  return blocks < 1 ? 1 : blocks > limit ? limit : blocks;
}

typedef void (*tile_kernel_type)(pack_args);

/* 16-byte loads of whole rows are possible. */
static bool wide_rows(const rdkv_tensor &t, int dim, int each) {
  return t.dtype != RDKV_F32 && (t.dim_stride == 0 || t.dim_stride == 1) && dim % each == 0 &&
         t.token_stride % 8 == 0 && t.head_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

static void launch_list(const pack_args &a, uint32_t heads, uint32_t slices, cudaStream_t stream) {
  const bool whole = wide_rows(a.k, a.k_dim, 8);
  const tile_kernel_type list =
      a.k.dtype == RDKV_F32 ? list_kernel<RDKV_F32, false>
      : a.k.dtype == RDKV_F16
          ? (whole ? list_kernel<RDKV_F16, true> : list_kernel<RDKV_F16, false>)
          : (whole ? list_kernel<RDKV_BF16, true> : list_kernel<RDKV_BF16, false>);
  list<<<dim3(slices + a.list.parts + 1, heads), LIST_THREADS, 0, stream>>>(a);
}

/* The kernel for rows in 16-byte pieces; NULL where they are not. */
static tile_kernel_type rows_kernel_of(const pack_args &a) {
  if (!wide_rows(a.k, a.k_dim, 16) || !wide_rows(a.v, a.v_dim, 16) || a.k.dtype != a.v.dtype)
    return nullptr;
  const bool bf16 = a.k.dtype == RDKV_BF16;
  return a.joint ? (bf16 ? rows_kernel<true, true> : rows_kernel<true, false>)
                 : (bf16 ? rows_kernel<false, true> : rows_kernel<false, false>);
}
/* The items as kernels see them, n at most ITEMS of them from `first` on. */
static item_list items_of(const rdkv_kv *kv, const rdkv_layer *layers, int n_items, int first,
                          int *n) {
  item_list list;
  *n = n_items - first < ITEMS ? n_items - first : ITEMS;
  for (int i = 0; i < *n; ++i) {
    const rdkv_kv &from = kv[first + i];
    const rdkv_layer &l = layers[first + i];
    item &to = list.at[i];
    to.k = from.k, to.v = from.v, to.q = from.q, to.out.data = nullptr, to.lse = nullptr;
    to.token = l.token, to.q_square = l.q_square, to.k_square = l.k_square;
    to.mean_out = l.mean_out, to.v_distortion = l.v_distortion;
    to.k_distortion = l.k_distortion, to.v_bits = l.v_bits, to.k_bits = l.k_bits;
  }
  return list;
}

/* score */

struct score_memory {
  arena m;
  score_args a;
};

/* Divides each head's tokens among blocks: one for each of a multiprocessor's places, or as many
   times that as leaves those of one together 8192 tokens. */
static void split_tokens(const score_args &a, uint64_t heads, uint32_t places, uint32_t *split,
                         int *splits) {
  const uint64_t each = a.n * heads / (132 * places) + 1, unit = 4 * GROUP_TILE / places;
  const uint64_t most = 8192 / places;
  *split = static_cast<uint32_t>(each / (each / most + 1) / unit * unit + unit);
  *splits = static_cast<int>(blocks_of(a.n, *split, 0x7fffffff));
}

static void layout_score(const rdkv_config *cfg, int n_items, uint32_t n, void *workspace,
                         score_memory *s) {
  score_args *a = &s->a;
  const uint64_t heads = least(static_cast<uint32_t>(n_items), ITEMS) *
                         static_cast<uint64_t>(cfg->n_kv_heads); /* of a launch */
  *a = score_args();
  s->m.next = static_cast<uint8_t *>(workspace), s->m.bytes = 0;
  a->n = n, a->heads = cfg->n_kv_heads, a->group = cfg->n_q_heads / cfg->n_kv_heads;
  a->window = static_cast<int>(least(static_cast<uint32_t>(cfg->window), n));
  a->columns = (a->group * (a->window < 1 ? 1 : a->window) + 15) / 16 * 16;
  a->k_dim = cfg->k_dim, a->v_dim = cfg->v_dim, a->pool = cfg->pool;
  a->joint = cfg->profile == RDKV_JOINT;
  a->scale = cfg->softmax_scale * 1.44269504088896341f;
  double sum = 0;
  for (int i = 1; i <= a->window; ++i) sum += 1 / sqrt(static_cast<double>(i));
  a->recent = a->window / sum, a->by_group = 1.0f / static_cast<float>(a->group);
  for (int i = 1; i <= a->window; ++i) /* from the last query on, as rdkv.h adds them up */
    a->all += a->joint ? static_cast<float>(a->recent / sqrt(static_cast<double>(i))) : 1;
  split_tokens(*a, heads, 2, &a->split, &a->splits);
  split_tokens(*a, heads, 4, &a->v_split, &a->v_splits);
  const uint64_t splits = static_cast<uint64_t>(a->splits),
                 columns = static_cast<uint64_t>(a->columns);
  s->m.take(&a->query, heads * static_cast<uint64_t>(a->k_dim) * columns);
  s->m.take(&a->stats, heads * splits * columns);
  s->m.take(&a->square, heads * splits * static_cast<uint64_t>(a->k_dim));
  s->m.take(&a->out, heads * static_cast<uint64_t>(a->v_splits) * static_cast<uint64_t>(a->v_dim));
  s->m.take(&a->mean, heads * n + 1);
}

typedef void (*score_kernel)(score_args, item_list);
template <int C>
static score_kernel tensor_kernel_for(bool bf16, bool stats) {
  return bf16 ? (stats ? tensor_kernel<C, true, true> : tensor_kernel<C, true, false>)
              : (stats ? tensor_kernel<C, false, true> : tensor_kernel<C, false, false>);
}

/* NULL where the tensor cores do not serve. */
static score_kernel tensor_kernel_of(const score_args &a, bool bf16, bool stats, size_t *shared) {
  score_kernel k = nullptr;
  (void)bf16; /* of which a build for another dim has no use */
#define RDKV_CUDA__CASE(dim)                      \
  case dim:                                       \
    k = tensor_kernel_for<dim / 32>(bf16, stats); \
    break;
  switch (a.k_dim) {
#if defined(RDKV_CUDA_V_DIM) && RDKV_CUDA_V_DIM > 0
#if RDKV_CUDA_V_DIM % 32 == 0
    RDKV_CUDA__CASE(RDKV_CUDA_V_DIM)
#endif
#else
    RDKV_CUDA__CASE(64)
    RDKV_CUDA__CASE(96)
    RDKV_CUDA__CASE(128)
    RDKV_CUDA__CASE(192)
    RDKV_CUDA__CASE(256)
#endif
  }
#undef RDKV_CUDA__CASE
  *shared = tensor_shared(a.k_dim);
  if (k && *shared > 48 * 1024 &&
      cudaFuncSetAttribute(reinterpret_cast<const void *>(k),
                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(*shared)) != cudaSuccess) {
    cudaGetLastError(); /* more than this device has: the plain kernel then */
    k = nullptr;
  }
  return k;
}

template <int A, int SETS>
static score_kernel group_kernel_for(bool bf16, bool stats) {
  return bf16 ? (stats ? group_kernel<A, true, true, SETS> : group_kernel<A, true, false, SETS>)
              : (stats ? group_kernel<A, false, true, SETS> : group_kernel<A, false, false, SETS>);
}

/* The kernel of warp groups; NULL where the program has none or it does not serve. */
static score_kernel group_kernel_of(const score_args &a, bool bf16, bool stats, size_t *shared,
                                    int *threads) {
  score_kernel k = nullptr;
  const int sets = a.columns > GROUP_COLUMNS && a.k_dim <= 128 ? 2 : 1,
            groups = groups_of(a.k_dim, stats, sets);
  (void)bf16;
  if (a.columns <= 64) return k; /* a group would be idle */
#define RDKV_CUDA__CASE(dim)                                                                  \
  case dim:                                                                                   \
    k = sets == 1 ? group_kernel_for<dim / 64, 1>(bf16, stats) : group_kernel_for < dim / 64, \
    dim <= 128 ? 2 : 1 > (bf16, stats);                                                       \
    break;
  switch (a.k_dim) {
#if defined(RDKV_CUDA_V_DIM) && RDKV_CUDA_V_DIM > 0
#if RDKV_CUDA_V_DIM % 64 == 0
    RDKV_CUDA__CASE(RDKV_CUDA_V_DIM)
#endif
#else
    RDKV_CUDA__CASE(64)
    RDKV_CUDA__CASE(128)
    RDKV_CUDA__CASE(256)
#endif
  }
#undef RDKV_CUDA__CASE
  cudaFuncAttributes is;
  const void *f = reinterpret_cast<const void *>(k);
  *shared = group_shared(a.k_dim, groups, sets), *threads = 128 * groups;
  if (k && (cudaFuncGetAttributes(&is, f) != cudaSuccess || is.maxThreadsPerBlock < *threads ||
            cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(*shared)) != cudaSuccess)) {
    cudaGetLastError();
    k = nullptr;
  }
  return k;
}

/* Of score or measure. early: it may start before what was launched before it ends (Hopper). */
template <typename Args>
static cudaError_t launch_score(void (*kernel)(Args, item_list), dim3 grid, int threads,
                                size_t shared, bool early, cudaStream_t stream, const Args &a,
                                const item_list &list) {
  cudaLaunchConfig_t launch = cudaLaunchConfig_t();
  cudaLaunchAttribute attribute;
  launch.gridDim = grid, launch.blockDim = dim3(static_cast<uint32_t>(threads));
  launch.dynamicSmemBytes = shared, launch.stream = stream;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &attribute, launch.numAttrs = early;
  return cudaLaunchKernelEx(&launch, kernel, a, list);
}

/* measure */

typedef void (*measure_kernel)(measure_args, item_list);

/* The kernel for whole rows; NULL where there is none. */
static measure_kernel v_rows_kernel_of(bool bf16, int v_dim, size_t *shared) {
  measure_kernel k = nullptr;
#define RDKV_CUDA__CASE(dim)                                                   \
  case dim:                                                                    \
    k = bf16 ? v_rows_kernel<dim / 16, true> : v_rows_kernel<dim / 16, false>; \
    *shared = v_stage<dim / 16>::ALL;                                          \
    break;
  switch (v_dim) {
#if defined(RDKV_CUDA_V_DIM) && RDKV_CUDA_V_DIM > 0
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
  }
#undef RDKV_CUDA__CASE
  if (k && cudaFuncSetAttribute(reinterpret_cast<const void *>(k),
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(*shared)) != cudaSuccess) {
    cudaGetLastError();
    k = nullptr;
  }
  return k;
}

struct measure_memory {
  arena m;
  measure_args a;
};

static void layout_measure(const rdkv_config *cfg, int n_items, uint32_t n, void *workspace,
                           measure_memory *s) {
  const uint64_t heads = least(static_cast<uint32_t>(n_items), ITEMS) *
                         static_cast<uint64_t>(cfg->n_kv_heads); /* of a launch */
  measure_args &a = s->a;
  a = measure_args();
  s->m.next = static_cast<uint8_t *>(workspace), s->m.bytes = 0;
  a.n = n, a.chunks = chunks_of(n);
  a.heads = cfg->n_kv_heads, a.k_dim = cfg->k_dim, a.v_dim = cfg->v_dim;
  a.half = (cfg->pool - 1) / 2;
  if (static_cast<uint32_t>(a.half) >= n) a.half = n > 0 ? static_cast<int>(n) - 1 : 0;
  a.norm = static_cast<float>(static_cast<double>(cfg->softmax_scale) *
                              static_cast<double>(cfg->softmax_scale)); /* exact, then rounded */
  for (int j = 0; j < 3; ++j) a.noise[j] = noise_of(cfg->v_dim > 2 ? cfg->v_dim - 2 : 0, 2 << j);
  a.spans = n / SPAN + (n % SPAN != 0);
  a.groups = static_cast<uint32_t>(cfg->k_dim + QUADS - 1) / QUADS;
  const uint64_t rows = heads * a.groups; /* two blocks on a multiprocessor, so many spans each */
  while (a.block < 3 && (a.spans >> a.block) * rows > 2 * 132) ++a.block;
  s->m.take(&a.any, heads * a.chunks + 1);
  s->m.take(&a.histogram, heads * BINS);
  s->m.take(&a.kept, rows);
  s->m.take(&a.done, rows);
  s->m.take(&a.parts, rows * parts_of(a) + 1);
}

/* allocate */

struct solve_memory {
  arena m;
  solve_args a;
};

static void layout_solve(const rdkv_config *cfg, int n_layers, uint32_t n, void *workspace,
                         solve_memory *s) {
  const uint64_t heads = static_cast<uint64_t>(n_layers) * static_cast<uint64_t>(cfg->n_kv_heads);
  const bool paper = cfg->profile == RDKV_PAPER;
  s->a = solve_args();
  s->m.next = static_cast<uint8_t *>(workspace), s->m.bytes = 0;
  s->m.take(&s->a.pin, cfg->n_pins > 0 ? heads * n : 0);
  s->m.take(&s->a.state, 1);
  s->m.take(&s->a.hist[0], paper ? 0 : BINS);
  s->m.take(&s->a.bins[0], paper ? 0 : heads * BINS);
  s->m.take(&s->a.hist[1], paper ? 0 : BINS); /* up to here it is zeroed */
  s->m.take(&s->a.hist[2], paper ? 0 : BINS);
  s->m.take(&s->a.bins[1], paper ? 0 : heads * BINS);
  s->m.take(&s->a.bins[2], paper ? 0 : heads * BINS);
  s->m.take(&s->a.layers, static_cast<uint64_t>(n_layers));
  s->m.take(&s->a.heads, heads);
  s->m.take(&s->a.list, paper ? 0 : heads * n);
  s->m.take(&s->a.slopes, paper ? 0 : heads * least(n, NEAR));
  s->m.take(&s->a.counts, paper ? 0 : heads * UNITS);
  s->m.take(&s->a.tiles, paper || 4 * heads <= SOLVE ? 0 : 8 * heads);
}

struct solve_launch {
  const void *kernel;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attribute;
  bool team; /* one cluster, whose barriers cost less; else all blocks are resident */
};

/* Whether the device, or the part of one that there is, has room for the cluster; the last answer
   is kept. */
static bool cluster_fits(solve_launch *how, int device) {
  static thread_local struct {
    int device, clusters;
    unsigned blocks;
    size_t shared;
  } last = {-1, 0, 0, 0};
  cudaLaunchConfig_t &c = how->config;
  if (last.device != device || last.blocks != c.gridDim.x || last.shared != c.dynamicSmemBytes) {
    last.device = device, last.blocks = c.gridDim.x, last.shared = c.dynamicSmemBytes;
    c.attrs = &how->attribute, c.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&last.clusters, how->kernel, &c))
      last.clusters = 0, cudaGetLastError();
  }
  return last.clusters > 0;
}

/* Blocks for a solve. */
static cudaError_t plan_solve(bool search, solve_args *a, solve_launch *how) {
  cudaFuncAttributes is;
  cudaLaunchConfig_t &c = how->config;
  int device = 0, most_blocks = 0, shared = 0;
  const uint64_t tokens = static_cast<uint64_t>(a->n) * a->n_heads;
  const uint64_t work = tokens / (SOLVE * BATCH) + 1;
  how->kernel = search ? reinterpret_cast<const void *>(paper_search_kernel)
                       : reinterpret_cast<const void *>(solve_kernel);
  cudaError_t e = cudaGetDevice(&device);
  if (!e) e = cudaDeviceGetAttribute(&most_blocks, cudaDevAttrMultiProcessorCount, device);
  if (!e) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!e) e = cudaFuncGetAttributes(&is, how->kernel);
  if (e) return e;
  /* no more blocks than there is work for, as barriers take longer the more meet there */
  uint32_t blocks = static_cast<uint32_t>(most_blocks), size = 1;
  if (search && blocks > a->n_heads) blocks = a->n_heads;
  if (blocks > work) blocks = most(static_cast<uint32_t>(work), least(a->n_heads, blocks));
  while (size < TEAM && (size < a->n_heads || size * TEAM_PART < tokens)) size *= 2;
  /* heads that share a budget, and their tokens in a block */
  const uint32_t heads = a->max_error > 0 || a->scope == RDKV_SCOPE_MODEL ? a->n_heads
                         : a->scope == RDKV_SCOPE_LAYER                   ? a->n_kv_heads
                         : a->scope == RDKV_SCOPE_HEAD                    ? 1
                                                                          : a->n_heads;
  const int room = shared - static_cast<int>(is.sharedSizeBytes) - 4 * SOLVE_WORDS;
  const auto fits = [&](uint32_t n) { return !search && static_cast<int64_t>(n) * 20 <= room; };
  how->team = is.ptxVersion >= 90 && size >= a->n_heads && fits(slice_of(a->n, a->n_heads, size));
  for (;; how->team = false) {
    const uint32_t n = how->team ? size : blocks;
    a->stage = slice_of(a->n, heads, n);
    if (!fits(a->stage)) a->stage = 0;
    a->slice = slice_of(a->n, a->n_heads, n), a->slices = slices_of(a->n, a->slice);
    c.gridDim = dim3(n), c.blockDim = dim3(SOLVE);
    c.dynamicSmemBytes = search ? 4 * PAPER_WORDS : 4 * SOLVE_WORDS + 20 * a->stage;
    e = cudaFuncSetAttribute(how->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(c.dynamicSmemBytes));
    if (e) return e;
    if (!how->team) break;
    how->attribute.id = cudaLaunchAttributeClusterDimension;
    how->attribute.val.clusterDim.x = size;
    how->attribute.val.clusterDim.y = how->attribute.val.clusterDim.z = 1;
    e = cudaFuncSetAttribute(how->kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (e || cluster_fits(how, device)) return e;
  }
  how->attribute.id = cudaLaunchAttributeCooperative;
  how->attribute.val.cooperative = 1;
  return e;
}

/* rdkv_allocate for a budget or a lambda on the device, or NULL: the config's. token_begin on the
   device, or NULL for 0: the range's place in the sequence, of which the pins are. */
static cudaError_t allocate(const rdkv_config *cfg, const rdkv_layer *layers, int n_layers,
                            const uint64_t *budget, const double *given,
                            const uint64_t *token_begin, double *lambda, uint32_t *status,
                            void *workspace, size_t bytes, cudaStream_t stream) {
  const uint32_t n = layers[0].n_tokens;
  solve_memory s;
  layout_solve(cfg, n_layers, n, workspace, &s);
  if (bytes < s.m.bytes) return cudaErrorInvalidValue;
  solve_args &a = s.a;
  const bool paper = cfg->profile == RDKV_PAPER;
  const bool search = paper && cfg->token_budget == 0 && cfg->budget_bytes > 0;
  const bool alone = cfg->scope == RDKV_SCOPE_LAMBDA && cfg->profile == RDKV_JOINT &&
                     cfg->max_error == 0 && n <= AT_TOKENS; /* each head by itself */
  a.n = n;
  a.n_kv_heads = static_cast<uint32_t>(cfg->n_kv_heads);
  a.n_heads = static_cast<uint32_t>(n_layers) * a.n_kv_heads, a.n_layers = n_layers;
  a.scope = cfg->scope, a.max_error = cfg->max_error;
  solve_launch how = solve_launch();
  if (!alone && (!paper || search)) {
    const cudaError_t e = plan_solve(search, &a, &how);
    if (e) return e;
  }
  uint8_t *const zero = cfg->n_pins > 0 ? a.pin : reinterpret_cast<uint8_t *>(a.state);
  uint8_t *const used =
      reinterpret_cast<uint8_t *>(alone || how.team ? static_cast<void *>(a.state) : a.hist[1]);
  cudaError_t e = cudaSuccess;
  if (used > zero && (!paper || search))
    e = cudaMemsetAsync(zero, 0, static_cast<size_t>(used - zero), stream);
  if (e) return e;
  for (int first = 0; first < n_layers; first += VIEWS) {
    solve_views views;
    int i = 0;
    for (; i < VIEWS && first + i < n_layers; ++i) {
      const rdkv_layer &l = layers[first + i];
      const layer_view v = {l.token,        l.q_square, l.k_square, l.v_distortion,
                            l.k_distortion, l.v_bits,   l.k_bits};
      views.view[i] = v;
    }
    a.few = views;
    if (n_layers > VIEWS) view_kernel<<<1, VIEWS, 0, stream>>>(a.layers + first, views, i);
  }
  if (cfg->n_pins == 0) a.pin = nullptr;
  a.given_budget = budget, a.device_lambda = given, a.lambda = lambda, a.status = status;
  a.k_dim = cfg->k_dim, a.v_dim = cfg->v_dim, a.positions = cfg->positions;
  a.budget = budget_of(cfg, n, n_layers), a.fixed = fixed_bytes(a.n_heads);
  a.most = max_block(cfg, n, n_layers);
  const uint32_t none[5] = {n, 0, 0, 0, 0}, dropped[4] = {static_cast<uint32_t>(a.k_dim), 0, 0, 0};
  parts p;
  a.least_head = head_bytes(a.v_dim, a.positions, none, dropped, &p);
  a.given_lambda = cfg->lambda, a.k_share = cfg->k_share;
  a.tokens = cfg->token_budget;
  if (cfg->token_budget == 0) a.tokens = cfg->keep * static_cast<double>(n); /* or searched */
  a.eps_k[0] = a.eps_v[0] = 1, a.eps_k[4] = a.eps_v[4] = 0;
  for (int i = 0; i < 3; ++i) a.eps_k[i + 1] = cfg->eps_k[i], a.eps_v[i + 1] = cfg->eps_v[i];
  a.edges = paper_edges_of(a.eps_v), a.v_mean = v_mean_of(a.k_share, a.tokens, n);
  a.k_bits = a.k_share * 2 * a.tokens * 16;
  for (int first = 0; first < cfg->n_pins; first += 64) {
    solve_pins pins;
    int i = 0;
    for (; i < 64 && first + i < cfg->n_pins; ++i) {
      const rdkv_pin &p = cfg->pins[first + i];
      solve_pin &to = pins.pin[i];
      to.begin = p.begin, to.end = p.end, to.level = level_of(p.min_bits);
      to.share = p.share > 0 && p.share < 1 ? p.share : 1;
    }
    pin_kernel<<<a.n_heads, THREADS, 0, stream>>>(a, pins, i, token_begin);
  }
  if (alone) {
    const uint32_t threads =
        static_cast<uint32_t>(round_up(most(n, static_cast<uint32_t>(a.k_dim)), 32));
    at_kernel<<<a.n_heads, threads, 0, stream>>>(a);
    return cudaGetLastError();
  }
  if (paper && !search) {
    cudaFuncAttributes is;
    const void *f = reinterpret_cast<const void *>(paper_kernel);
    e = cudaFuncGetAttributes(&is, f);
    if (!e)
      e = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, PAPER_WORDS * 4);
    if (e) return e;
    uint32_t size = 1; /* blocks of a head: code for a device before Hopper knows one */
    while (is.ptxVersion >= 90 && size < CLUSTER && size * CLUSTER_PART < n &&
           2 * size * a.n_heads <= 128)
      size *= 2;
    cudaLaunchConfig_t launch = cudaLaunchConfig_t();
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    launch.gridDim = dim3(size * a.n_kv_heads, static_cast<uint32_t>(n_layers));
    launch.blockDim = dim3(SOLVE), launch.dynamicSmemBytes = PAPER_WORDS * 4;
    launch.stream = stream;
    launch.attrs = &attribute, launch.numAttrs = size > 1;
    return cudaLaunchKernelEx(&launch, paper_kernel, a);
  }
  void *pack[] = {&a};
  cudaLaunchAttribute attribute;
  how.config.stream = stream, how.config.attrs = &attribute, how.config.numAttrs = 1;
  attribute = how.attribute;
  e = cudaLaunchKernelExC(&how.config, how.kernel, pack);
  return e ? e : cudaGetLastError();
}

/* pack */

struct pack_memory {
  arena m;
  pack_args a;
};

static void layout_pack(const rdkv_config *cfg, int n_layers, uint32_t n, void *workspace,
                        pack_memory *s) {
  const uint64_t kv = static_cast<uint64_t>(cfg->n_kv_heads),
                 heads = static_cast<uint64_t>(n_layers) * kv,
                 kd = static_cast<uint64_t>(cfg->k_dim);
  pack_args &a = s->a;
  a = pack_args();
  s->m.next = static_cast<uint8_t *>(workspace), s->m.bytes = 0;
  a.list.n = n;
  /* a block lists at most a 32nd of a head, as each of them counts all of it */
  a.list.each = LIST * blocks_of(n, 32 * LIST, ~0u);
  a.list.parts = blocks_of(n, a.list.each, ~0u);
  /* a block for most multiprocessors to go through K */
  a.spans = n / SPAN + (n % SPAN != 0);
  a.slices = least(least(most(128 / static_cast<uint32_t>(kv), 1), 32), most(a.spans, 1));
  s->m.take(&a.state, 1);
  s->m.take(&a.heads, heads);
  s->m.take(&a.list.order, kv * n + 1);
  s->m.take(&a.slots, kv * kd);
  s->m.take(&a.list.sums, kv * a.list.parts);
  s->m.take(&a.ends, heads * a.slices * kd);
  s->m.take(&a.sums, kv * a.spans * kd + 1);
  a.all_heads = a.heads;
}

/* The arguments for one of the layers. */
static pack_args pack_layer(const rdkv_config *cfg, const pack_args &all, const rdkv_kv *kv,
                            const rdkv_layer *layers, int layer) {
  pack_args a = all;
  const size_t first = static_cast<size_t>(layer) * static_cast<size_t>(cfg->n_kv_heads);
  a.heads += first;
  a.ends += first * a.slices * static_cast<size_t>(a.k_dim);
  a.list.v_bits = layers[layer].v_bits;
  a.list.v_distortion = a.joint ? layers[layer].v_distortion : nullptr;
  a.k_bits = layers[layer].k_bits, a.k_distortion = layers[layer].k_distortion;
  a.k = kv[layer].k, a.v = kv[layer].v;
  return a;
}

} /* namespace rdkv_cuda_compress */

extern "C" size_t rdkv_cuda_layer_workspace(const rdkv_config *cfg, int n_items,
                                            uint32_t n_tokens) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || n_items < 1) return 0;
  score_memory s;
  measure_memory m;
  pack_memory p;
  layout_score(cfg, n_items, n_tokens, nullptr, &s);
  layout_measure(cfg, n_items, n_tokens, nullptr, &m);
  layout_pack(cfg, 1, n_tokens, nullptr, &p);
  const size_t a = s.m.bytes > m.m.bytes ? s.m.bytes : m.m.bytes;
  return a > p.m.bytes ? a : p.m.bytes;
}

extern "C" size_t rdkv_cuda_pack_workspace(const rdkv_config *cfg, int n_layers,
                                           uint32_t n_tokens) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || n_layers < 1) return 0;
  pack_memory p;
  layout_pack(cfg, n_layers, n_tokens, nullptr, &p);
  return p.m.bytes;
}

extern "C" size_t rdkv_cuda_allocate_workspace(const rdkv_config *cfg, int n_layers,
                                               uint32_t n_tokens) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || n_layers < 1) return 0;
  solve_memory s;
  layout_solve(cfg, n_layers, n_tokens, nullptr, &s);
  return s.m.bytes;
}

namespace rdkv_cuda_compress {

/* rdkv_cuda_score by queries of which the first sits at position `seen` of the range. out may point
   to a tensor without data: mean_out is left to the caller. */
static cudaError_t score_by(const rdkv_config *cfg, const rdkv_kv *kv, uint32_t seen,
                            const float *const *lse, ptrdiff_t lse_stride, const rdkv_tensor *out,
                            const rdkv_layer *layers, int n_items, uint32_t *status,
                            void *workspace, size_t bytes, cudaStream_t stream) {
  if (!resolved(cfg) || !kv || !layers || !layers_ok(layers, n_items) || !status || !workspace)
    return cudaErrorInvalidValue;
  const uint32_t n = layers[0].n_tokens, heads = static_cast<uint32_t>(cfg->n_kv_heads);
  score_memory s;
  layout_score(cfg, n_items, n, workspace, &s);
  score_args &a = s.a;
  if (bytes < s.m.bytes) return cudaErrorInvalidValue;
  bool tensor = true, wide = true;
  for (int i = 0; i < n_items; ++i) {
    const rdkv_tensor &k = kv[i].k, &v = kv[i].v, &q = kv[i].q;
    if (n == 0) { /* widths of older scores */
      const cudaError_t e =
          cudaMemsetAsync(layers[i].k_bits, 0, heads * static_cast<size_t>(cfg->k_dim), stream);
      if (e) return e;
      continue;
    }
    if (!tensor_ok(k) || !tensor_ok(q) || (a.joint && !out && !tensor_ok(v)) || (lse && !lse[i]) ||
        (a.joint && out && out[i].data && !tensor_ok(out[i])))
      return cudaErrorInvalidValue;
    tensor = tensor && wide_rows(k, a.k_dim, 32) && wide_rows(q, a.k_dim, 32) &&
             k.dtype == kv[0].k.dtype && q.dtype == k.dtype;
    wide = wide && wide_rows(v, a.v_dim, 8) && v.dtype == kv[0].v.dtype;
  }
  if (n == 0) return cudaSuccess;
  const bool bf16 = kv[0].k.dtype == RDKV_BF16;
  size_t stats_shared = 0, shared = 0;
  int stats_threads = THREADS, threads = THREADS;
  score_kernel stats = nullptr, weigh = nullptr;
  if (tensor) {
    stats = group_kernel_of(a, bf16, true, &stats_shared, &stats_threads);
    weigh = group_kernel_of(a, bf16, false, &shared, &threads);
  }
  const bool grouped = stats && weigh;
  if (!grouped) stats_threads = threads = THREADS;
  if (tensor && !grouped) {
    stats = tensor_kernel_of(a, bf16, true, &stats_shared);
    weigh = tensor_kernel_of(a, bf16, false, &shared);
  }
  const bool plain = !weigh || !stats;
  if (plain) stats = plain_kernel<true>, weigh = plain_kernel<false>, stats_shared = shared = 0;
  const score_kernel sum_v = !a.joint || out              ? nullptr
                             : !wide                      ? out_kernel
                             : kv[0].v.dtype == RDKV_BF16 ? out_rows_kernel<true>
                                                          : out_rows_kernel<false>;
  if (!sum_v) a.out = nullptr;
  a.status = status, a.seen = seen, a.lse_stride = lse_stride, a.given = lse != nullptr;
  if (grouped) /* a block has a multiprocessor for itself */
    split_tokens(a, heads * least(static_cast<uint32_t>(n_items), ITEMS), 1, &a.split, &a.splits);
  /* few enough blocks for all to be there at once, or many */
  const uint32_t each = n / (4 * THREADS) * heads > 4 * 132 ? 8 : 4;
  const score_kernel pooled = each == 8 ? pool_kernel<8> : pool_kernel<4>;
  for (int first = 0, of = 0; first < n_items; first += of) {
    item_list list = items_of(kv, layers, n_items, first, &of);
    for (int i = 0; i < of; ++i) {
      if (lse) list.at[i].lse = lse[first + i];
      if (out && a.joint) list.at[i].out = out[first + i];
    }
    const uint32_t items = static_cast<uint32_t>(of);
    const dim3 grid(static_cast<uint32_t>(a.splits), heads, items);
    const dim3 v_grid(static_cast<uint32_t>(a.v_splits), heads, items);
    const dim3 queries(static_cast<uint32_t>(a.k_dim + 31) / 32, heads, items);
    const dim3 pool(
        heads, static_cast<uint32_t>(channel_blocks(a)) + (n - 1) / (each * THREADS) + 1, items);
    cudaError_t e = cudaSuccess;
    if (plain) query_kernel<<<queries, THREADS, 0, stream>>>(a, list);
    if (!lse) e = launch_score(stats, grid, stats_threads, stats_shared, false, stream, a, list);
    if (!e) e = launch_score(weigh, grid, threads, shared, grouped && !lse, stream, a, list);
    if (!e && sum_v) e = launch_score(sum_v, v_grid, THREADS, 0, grouped, stream, a, list);
    if (!e) e = launch_score(pooled, pool, THREADS, 0, grouped, stream, a, list);
    if (e) return e;
  }
  return cudaGetLastError();
}

} /* namespace rdkv_cuda_compress */

extern "C" cudaError_t rdkv_cuda_score(const rdkv_config *cfg, const rdkv_kv *kv,
                                       const float *const *lse, ptrdiff_t lse_stride,
                                       const rdkv_tensor *out, const rdkv_layer *layers,
                                       int n_items, uint32_t *status, void *workspace, size_t bytes,
                                       cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !layers) return cudaErrorInvalidValue;
  const uint32_t n = layers->n_tokens, window = least(static_cast<uint32_t>(cfg->window), n);
  for (int i = 0; i < n_items && out; ++i)
    if (n > 0 && !out[i].data) return cudaErrorInvalidValue;
  return score_by(cfg, kv, n - window, lse, lse_stride, out, layers, n_items, status, workspace,
                  bytes, stream);
}

extern "C" cudaError_t rdkv_cuda_measure(const rdkv_config *cfg, const rdkv_kv *kv,
                                         const rdkv_layer *layers, int n_items, uint32_t *status,
                                         void *workspace, size_t bytes, cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !kv || !layers || !layers_ok(layers, n_items) || !status || !workspace)
    return cudaErrorInvalidValue;
  const uint32_t n = layers[0].n_tokens, heads = static_cast<uint32_t>(cfg->n_kv_heads);
  measure_memory s;
  layout_measure(cfg, n_items, n, workspace, &s);
  if (bytes < s.m.bytes) return cudaErrorInvalidValue;
  if (cfg->profile == RDKV_PAPER || n == 0) return cudaSuccess;
  bool wide = true, whole = true;
  for (int i = 0; i < n_items; ++i) {
    if (!tensor_ok(kv[i].k) || !tensor_ok(kv[i].v) || kv[i].k.dtype != kv[0].k.dtype ||
        kv[i].v.dtype != kv[0].v.dtype)
      return cudaErrorInvalidValue;
    wide = wide && wide_rows(kv[i].v, cfg->v_dim, 16);
    whole = whole && wide_rows(kv[i].k, cfg->k_dim, 8);
  }
  measure_args &a = s.a;
  a.status = status;
  /* the tokens that K is measured over: 4 bits of 16, about */
  const double keep = cfg->budget_bytes == 0 ? cfg->keep
                                             : static_cast<double>(cfg->budget_bytes) /
                                                   static_cast<double>(fp16_bytes(cfg, n));
  const double part = keep * 4;
  a.want = part >= 1 ? n : static_cast<uint32_t>(part * static_cast<double>(n));
  if (a.want < TILE) a.want = TILE;
  size_t v_shared = 0;
  measure_kernel v_error =
      wide ? v_rows_kernel_of(kv->v.dtype == RDKV_BF16, cfg->v_dim, &v_shared) : nullptr;
  if (!v_error)
    v_shared = 0, v_error = kv->v.dtype == RDKV_F16    ? v_error_kernel<RDKV_F16>
                            : kv->v.dtype == RDKV_BF16 ? v_error_kernel<RDKV_BF16>
                                                       : v_error_kernel<RDKV_F32>;
  const rdkv_dtype type = kv->k.dtype;
  const measure_kernel moments =
      type == RDKV_F32 ? moments_kernel<RDKV_F32, false>
      : type == RDKV_F16
          ? (whole ? moments_kernel<RDKV_F16, true> : moments_kernel<RDKV_F16, false>)
          : (whole ? moments_kernel<RDKV_BF16, true> : moments_kernel<RDKV_BF16, false>);
  const size_t shared = sizeof(stretch) * STRETCHES << a.block;
  cudaFuncAttributes is; /* code for a device before Hopper cannot begin early */
  cudaError_t e = cudaFuncGetAttributes(&is, reinterpret_cast<const void *>(moments));
  if (!e)
    e = cudaFuncSetAttribute(reinterpret_cast<const void *>(moments),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (!e) /* as the other kernels', or a multiprocessor would have to be empty in between */
    e = cudaFuncSetAttribute(reinterpret_cast<const void *>(measure_begin_kernel),
                             cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
  for (int first = 0, of = 0; !e && first < n_items; first += of) {
    const item_list list = items_of(kv, layers, n_items, first, &of);
    const uint32_t items = static_cast<uint32_t>(of);
    /* as many blocks as 132 multiprocessors take at once; twice as many where there is much to do,
       for some are slower. All warps have the same number of rows. */
    const uint32_t beside = 2 * static_cast<uint32_t>(a.half), step = V_WARPS * V_ROWS;
    uint32_t tokens = n / most(4 * 132 / (heads * items), 1) + 1;
    if (tokens > 256) tokens = (tokens + 1) / 2;
    a.v_tokens = (tokens + beside + step - 1) / step * step - beside;
    const dim3 chunks(a.chunks, heads, items);
    const dim3 rows(heads, blocks_of(n, a.v_tokens, ~0u), items); /* rows of all heads together */
    const dim3 spans(blocks_of(a.spans, 1u << a.block, ~0u) * a.groups, heads, items);
    const bool early = is.ptxVersion >= 90;
    e = launch_score(measure_begin_kernel, chunks, THREADS, 0, early, stream, a, list);
    if (!e) e = launch_score(v_error, rows, THREADS, v_shared, early, stream, a, list);
    if (!e) e = launch_score(moments, spans, K_THREADS, shared, early, stream, a, list);
  }
  return e ? e : cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_allocate(const rdkv_config *cfg, const rdkv_layer *layers,
                                          int n_layers, double *lambda, uint32_t *status,
                                          void *workspace, size_t bytes, cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !layers || n_layers > cfg->n_layers || !layers_ok(layers, n_layers) ||
      !lambda || !status || !workspace)
    return cudaErrorInvalidValue;
  return allocate(cfg, layers, n_layers, nullptr, nullptr, nullptr, lambda, status, workspace,
                  bytes, stream);
}

extern "C" cudaError_t rdkv_cuda_allocate_at(const rdkv_config *cfg, const rdkv_layer *layers,
                                             int n_layers, const double *given, double *lambda,
                                             uint32_t *status, void *workspace, size_t bytes,
                                             cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !layers || n_layers > cfg->n_layers || !layers_ok(layers, n_layers) ||
      !given || !lambda || !status || !workspace || cfg->profile == RDKV_PAPER)
    return cudaErrorInvalidValue;
  rdkv_config at = *cfg;
  at.scope = RDKV_SCOPE_LAMBDA;
  return allocate(&at, layers, n_layers, nullptr, given, nullptr, lambda, status, workspace, bytes,
                  stream);
}

namespace rdkv_cuda_compress {

static void add_histogram(const rdkv_config *cfg, const rdkv_layer *layer, uint64_t *bytes,
                          cudaStream_t stream) {
  const uint32_t heads = static_cast<uint32_t>(cfg->n_kv_heads);
  histogram_args a;
  a.v_distortion = layer->v_distortion, a.k_bits = layer->k_bits;
  a.bytes = reinterpret_cast<u64 *>(bytes), a.n = layer->n_tokens;
  a.k_dim = cfg->k_dim, a.v_dim = cfg->v_dim, a.positions = cfg->positions;
  if (a.n == 0) return;
  const uint32_t slices = blocks_of(a.n, 4 * SOLVE, 264 / heads + 1);
  a.slice = (a.n + slices - 1) / slices;
  histogram_kernel<<<dim3(slices, heads), SOLVE, 0, stream>>>(a);
}

} /* namespace rdkv_cuda_compress */

extern "C" cudaError_t rdkv_cuda_histogram_add(const rdkv_config *cfg, const rdkv_layer *layer,
                                               rdkv_histogram *histogram, cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !layer_ok(layer) || !histogram) return cudaErrorInvalidValue;
  add_histogram(cfg, layer, histogram->bytes, stream);
  return cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_histogram_merge(rdkv_histogram *dst, const rdkv_histogram *src,
                                                 cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!dst || !src) return cudaErrorInvalidValue;
  merge_kernel<<<BINS / THREADS, THREADS, 0, stream>>>(reinterpret_cast<u64 *>(dst->bytes),
                                                       src->bytes);
  return cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_histogram_lambda(const rdkv_histogram *histogram,
                                                  uint64_t budget_bytes, double *lambda,
                                                  cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!histogram || !lambda) return cudaErrorInvalidValue;
  lambda_kernel<<<1, 32, 0, stream>>>(histogram->bytes, budget_bytes, lambda);
  return cudaGetLastError();
}

namespace rdkv_cuda_compress {

static cudaError_t pack(const rdkv_config *cfg, const rdkv_kv *kv, const rdkv_layer *layers,
                        int n_layers, const double *lambda, const uint64_t *budget, int first_layer,
                        uint64_t token_begin, void *block, size_t capacity, uint64_t *block_bytes,
                        uint32_t *status, void *workspace, size_t bytes, cudaStream_t stream) {
  const uint32_t n = layers[0].n_tokens, heads = static_cast<uint32_t>(cfg->n_kv_heads);
  pack_memory s;
  layout_pack(cfg, n_layers, n, workspace, &s);
  if (bytes < s.m.bytes) return cudaErrorInvalidValue;
  pack_args &a = s.a;
  a.list.status = status;
  a.lambda = lambda, a.budget = budget, a.block = static_cast<uint8_t *>(block),
  a.capacity = capacity;
  a.bytes = block_bytes, a.n_heads = static_cast<uint32_t>(n_layers) * heads;
  a.joint = cfg->profile == RDKV_JOINT, a.positions = cfg->positions;
  a.k_dim = cfg->k_dim, a.v_dim = cfg->v_dim;
  rdkv_header &h = a.header;
  h.magic = 0x564b4452u, h.version = RDKV_FORMAT_VERSION;
  h.first_layer = static_cast<uint32_t>(first_layer), h.n_layers = static_cast<uint32_t>(n_layers);
  h.n_q_heads = static_cast<uint32_t>(cfg->n_q_heads), h.n_kv_heads = heads;
  h.k_dim = static_cast<uint32_t>(cfg->k_dim), h.v_dim = static_cast<uint32_t>(cfg->v_dim);
  h.token_begin = token_begin, h.n_tokens = n, h.positions = static_cast<uint32_t>(cfg->positions);
  h.profile = static_cast<uint32_t>(cfg->profile), h.scope = static_cast<uint32_t>(cfg->scope);
  h.window = static_cast<uint32_t>(cfg->window), h.pool = static_cast<uint32_t>(cfg->pool);
  h.softmax_scale = cfg->softmax_scale, h.k_share = static_cast<float>(cfg->k_share);
  for (int i = 0; i < 3; ++i) h.eps_k[i] = cfg->eps_k[i], h.eps_v[i] = cfg->eps_v[i];
  h.keep = cfg->keep, h.max_error = cfg->max_error, h.token_budget = cfg->token_budget;
  h.budget_bytes = cfg->budget_bytes;
  cudaError_t e = cudaSuccess;
  bool all_rows = true; /* then the body's checksum is added up on the way */
  for (int i = 0; i < n_layers; ++i) {
    const pack_args l = pack_layer(cfg, a, kv, layers, i);
    launch_list(l, heads, a.slices, stream);
    all_rows = all_rows && rows_kernel_of(l);
  }
  /* at most a wave of blocks of 132 multiprocessors */
  const uint32_t tiles = n ? n / TILE + 4 : 0;
  a.tile_blocks = least(tiles, all_rows ? most(5 * 132 / heads, 2) - 1 : 1024 / heads + 1);
  a.again = 1;
  const size_t shared = all_rows ? rows_shared(cfg->k_dim, cfg->v_dim) : 0;
  for (int i = 0; i < n_layers; ++i) {
    const pack_args l = pack_layer(cfg, a, kv, layers, i);
    if (n_layers > 1) /* the list and K's sums have room for one layer */
      launch_list(l, heads, a.joint ? a.slices : 0, stream);
    const tile_kernel_type k = all_rows                                 ? rows_kernel_of(l)
                               : cfg->k_dim <= 128 && cfg->v_dim <= 128 ? tile_kernel<4>
                                                                        : tile_kernel<8>;
    if (shared > 48 * 1024 && (e = cudaFuncSetAttribute(reinterpret_cast<const void *>(k),
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared))) != cudaSuccess)
      return e;
    k<<<dim3(1 + a.tile_blocks, heads), all_rows ? 32 * TILE_WARPS : THREADS, shared, stream>>>(l);
  }
  if (!all_rows) body_sum_kernel<<<264, THREADS, 0, stream>>>(pack_layer(cfg, a, kv, layers, 0));
  return cudaGetLastError();
}

} /* namespace rdkv_cuda_compress */

extern "C" cudaError_t rdkv_cuda_pack(const rdkv_config *cfg, const rdkv_kv *kv,
                                      const rdkv_layer *layers, int n_layers, const double *lambda,
                                      int first_layer, uint64_t token_begin, void *block,
                                      size_t capacity, uint64_t *block_bytes, uint32_t *status,
                                      void *workspace, size_t bytes, cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !kv || !layers || n_layers > 65535 || !layers_ok(layers, n_layers) ||
      first_layer < 0 || !block || reinterpret_cast<uintptr_t>(block) % 128 != 0 || !block_bytes ||
      !status || !workspace)
    return cudaErrorInvalidValue;
  for (int i = 0; i < n_layers; ++i)
    if (layers[0].n_tokens > 0 && (!tensor_ok(kv[i].k) || !tensor_ok(kv[i].v)))
      return cudaErrorInvalidValue;
  return pack(cfg, kv, layers, n_layers, lambda, nullptr, first_layer, token_begin, block, capacity,
              block_bytes, status, workspace, bytes, stream);
}

namespace rdkv_cuda_compress {

/* What a stream keeps from step to step of a layer, in front of the workspace of the steps. */
struct stream_memory {
  arena m;
  rdkv_histogram *own;
  uint64_t *budget;
  double *lambda;
};

static void layout_stream(void *workspace, stream_memory *s) {
  s->m.next = static_cast<uint8_t *>(workspace), s->m.bytes = 0;
  s->m.take(&s->own, 1);
  s->m.take(&s->budget, 1);
  s->m.take(&s->lambda, 1);
}

} /* namespace rdkv_cuda_compress */

extern "C" size_t rdkv_cuda_stream_workspace(const rdkv_config *cfg, uint32_t n_tokens) {
  using namespace rdkv_cuda_compress;
  stream_memory s;
  if (!resolved(cfg)) return 0;
  layout_stream(nullptr, &s);
  const size_t a = rdkv_cuda_layer_workspace(cfg, 1, n_tokens),
               b = rdkv_cuda_allocate_workspace(cfg, 1, n_tokens);
  return s.m.bytes + (a > b ? a : b);
}

extern "C" cudaError_t rdkv_cuda_stream_layer(const rdkv_config *cfg, rdkv_stream *state, int index,
                                              const rdkv_kv *kv, const float *lse,
                                              ptrdiff_t lse_stride, const rdkv_tensor *out,
                                              const rdkv_layer *layer, void *block, size_t capacity,
                                              uint64_t *block_bytes, uint32_t *status,
                                              void *workspace, size_t bytes, cudaStream_t stream) {
  using namespace rdkv_cuda_compress;
  if (!resolved(cfg) || !state || index < 0 || index >= cfg->n_layers || !kv || !layer_ok(layer) ||
      cfg->max_error > 0 || !status || !workspace ||
      bytes < rdkv_cuda_stream_workspace(cfg, layer->n_tokens))
    return cudaErrorInvalidValue;
  const uint32_t n = layer->n_tokens;
  const uint64_t heads = static_cast<uint64_t>(cfg->n_kv_heads);
  const bool joint = cfg->profile == RDKV_JOINT;
  const bool share = joint && cfg->scope != RDKV_SCOPE_LAMBDA;
  const bool by_budget = share || (!joint && cfg->token_budget == 0 && cfg->budget_bytes > 0);
  rdkv_config one = *cfg;
  one.n_layers = 1;
  stream_memory s;
  layout_stream(workspace, &s);
  uint8_t *const work = static_cast<uint8_t *>(workspace) + s.m.bytes;
  const size_t work_bytes = bytes - s.m.bytes;
  stream_args a;
  a.state = state, a.own = joint ? reinterpret_cast<u64 *>(s.own->bytes) : nullptr;
  a.budget = s.budget, a.lambda = s.lambda, a.bytes = block_bytes, a.status = status;
  a.total = budget_of(cfg, n, cfg->n_layers), a.fixed = fixed_bytes(heads);
  /* every channel's entry, most of them not dropped */
  a.tables =
      heads * round_up(5 * static_cast<uint64_t>(pad16(cfg->k_dim)), 128) + fixed_bytes(heads);
  a.layer = index, a.n_layers = cfg->n_layers, a.share = share;
  cudaError_t e = rdkv_cuda_score(&one, kv, lse ? &lse : nullptr, lse_stride, out, layer, 1, status,
                                  work, work_bytes, stream);
  if (!e) e = rdkv_cuda_measure(&one, kv, layer, 1, status, work, work_bytes, stream);
  if (!e && share) {
    e = cudaMemsetAsync(s.own, 0, sizeof *s.own, stream);
    add_histogram(&one, layer, s.own->bytes, stream);
  }
  if (e) return e;
  share_kernel<<<1, THREADS, 0, stream>>>(a);
  e = allocate(&one, layer, 1, by_budget ? s.budget : nullptr, nullptr, nullptr, s.lambda, status,
               work, work_bytes, stream);
  if (!e)
    e = pack(&one, kv, layer, 1, s.lambda, by_budget ? s.budget : nullptr, index, 0, block,
             capacity, block_bytes, status, work, work_bytes, stream);
  if (!e && joint) { /* now with the K that was chosen */
    e = cudaMemsetAsync(s.own, 0, sizeof *s.own, stream);
    add_histogram(&one, layer, s.own->bytes, stream);
  }
  if (e) return e;
  seen_kernel<<<1, THREADS, 0, stream>>>(a);
  return cudaGetLastError();
}

/* ---- >>cuda-sequence : a cache that lives, on the device ---------------------------------------

   One turn packs the oldest block of one sequence: pick (which), gather (its K, V and the queries
   of the block after it to fixed addresses, all layers), then score, measure, allocate and pack as
   ever, settle (to the arena, into the list) and move (what is left of the tail to its start). A
   merge is the same with rows unpacked from segments. Layers are independent in all but allocation,
   so that the others get them as heads of one layer. */

namespace rdkv_cuda_live_code {

using rdkv_cuda_compress::arena;
using rdkv_cuda_compress::mix;
using rdkv_cuda_compress::u64;

enum { THREADS = 256, NONE = -1, MAX_FAN = 16, MAX_LAYERS = 512, MAX_LANES = 8 };

/* What one turn's kernels tell each other. */
struct turn {
  int picked;           /* a sequence, or NONE */
  uint32_t status;      /* of the chain that compresses it */
  uint32_t made;        /* its segment is in the list */
  uint32_t tokens;      /* of its tail before */
  uint64_t begin;       /* position of that tail's first token */
  uint32_t merge;       /* segments that become one; 0: it is about a block of the tail */
  uint32_t first_query; /* the tail's token whose query is the first that scores */
  uint32_t n_tokens;    /* of the range */
  uint64_t budget;      /* of what is merged */
  uint64_t bytes;       /* of the new segment */
  uint8_t *to;          /* where it goes */
};

struct live_args {
  rdkv_cuda_batch batch;
  turn *state;       /* of this lane */
  size_t lane_bytes; /* to that of the next one */
  int n_lanes;
  uint16_t *k, *v, *q; /* [layer][head][rows][dim]; of q [queries] */
  float *lse;          /* [layer][query head][queries] */
  float *token;        /* [layer][kv head][rows] */
  uint32_t *counts;    /* [layer][kv head][MAX_FAN + 1] rows before those of each merged segment */
  float *mean_out;     /* [layer][kv head][v_dim] */
  double *lambda;      /* [layer] */
  uint8_t *packed;
  int n_sequences, n_layers, first_layer, n_q_heads, n_kv_heads, k_dim, v_dim, max_segments;
  uint32_t block, least;         /* tokens of a block; of a tail at which one is made */
  uint32_t first_query, queries; /* by which it is scored: the tail's tokens that they are of */
  uint32_t rows; /* of a head in k and v: a block's, or what a merged segment may hold */
  uint32_t fan;
  double keep; /* and budget_bytes: a block's budget */
  uint64_t budget_bytes;
  int bf16, joint;
};

/* The per-token arrays of a sequence: of each layer K and V of every kv head, q, out and lse of
   every query head, in this order. Rows of `bytes`, `stride` bytes apart; base NULL: none. */
struct rows {
  uint8_t *base;
  size_t stride;
  uint32_t bytes;
  int what, head; /* 0 K, 1 V, 2 q, 3 out, 4 lse; head counts over the layers */
};
enum { ROW_K, ROW_V, ROW_Q, ROW_OUT, ROW_LSE };

__host__ __device__ inline int arrays_of(const live_args &a) {
  return a.n_layers * (2 * a.n_kv_heads + 3 * a.n_q_heads);
}

__device__ inline rows rows_of(const live_args &a, int sequence, int index) {
  const rdkv_cuda_sequence &s = a.batch.sequences[sequence];
  const rdkv_cuda_live &l = a.batch.live[sequence];
  const int each = 2 * a.n_kv_heads + 3 * a.n_q_heads, layer = index / each;
  const int64_t at = a.first_layer + layer;
  rows r;
  int head = index - layer * each;
  if (head < 2 * a.n_kv_heads) {
    r.what = head < a.n_kv_heads ? ROW_K : ROW_V;
    head -= r.what * a.n_kv_heads;
    void *base = r.what == ROW_K ? s.k : s.v;
    const int64_t first =
        r.what == ROW_K ? at * s.k_layer + head * s.k_head : at * s.v_layer + head * s.v_head;
    r.base = static_cast<uint8_t *>(base) + 2 * first;
    r.stride = 2 * static_cast<size_t>(r.what == ROW_K ? s.k_token : s.v_token);
    r.bytes = 2 * static_cast<uint32_t>(r.what == ROW_K ? a.k_dim : a.v_dim);
    if (!base) r.base = nullptr;
    r.head = layer * a.n_kv_heads + head;
    return r;
  }
  head -= 2 * a.n_kv_heads;
  r.what = ROW_Q + head / a.n_q_heads;
  head %= a.n_q_heads;
  const size_t row =
      (static_cast<size_t>(at) * static_cast<size_t>(a.n_q_heads) + static_cast<size_t>(head)) *
      s.capacity;
  void *base = r.what == ROW_Q ? l.q : r.what == ROW_OUT ? l.out : static_cast<void *>(l.lse);
  r.bytes = r.what == ROW_LSE ? 4 : 2 * static_cast<uint32_t>(r.what == ROW_Q ? a.k_dim : a.v_dim);
  r.stride = r.bytes;
  r.base = base ? static_cast<uint8_t *>(base) + row * r.bytes : nullptr;
  r.head = layer * a.n_q_heads + head;
  return r;
}

/* Row `from` of r becomes row `to` of another, 16 bytes (lse: 4) at `column` of it. */
__device__ __forceinline__ void copy_piece(const rows &to, size_t to_row, const rows &from,
                                           size_t from_row, uint32_t column) {
  const uint8_t *src = from.base + from_row * from.stride;
  uint8_t *dst = to.base + to_row * to.stride;
  if (to.what == ROW_LSE)
    *reinterpret_cast<float *>(dst) = *reinterpret_cast<const float *>(src);
  else
    reinterpret_cast<uint4 *>(dst)[column] = reinterpret_cast<const uint4 *>(src)[column];
}
__device__ __forceinline__ uint32_t pieces_of(const rows &r) {
  return r.what == ROW_LSE ? 1 : r.bytes / 16;
}

/* Whether the sequence has a block to compress; one that cannot be gets its status. */
static __device__ bool ready(const live_args &a, int i) {
  rdkv_cuda_live &l = a.batch.live[i];
  const rdkv_cuda_sequence &s = a.batch.sequences[i];
  if (l.status != RDKV_OK || a.batch.tail_tokens[i] < a.least) return false;
  if (!l.q || !l.out || !l.lse || l.query_begin > a.first_query)
    l.status = RDKV_ERR_ARGUMENT;
  else if (!l.arena || s.n_segments >= static_cast<uint32_t>(a.max_segments))
    l.status = RDKV_ERR_FULL;
  return l.status == RDKV_OK;
}

/* The first sequences that are ready, one a lane; whether there is one. One block. */
static __device__ bool pick(const live_args &a) {
  __shared__ uint32_t set[4096 / 32];
  for (int i = static_cast<int>(threadIdx.x); i < 4096 / 32; i += THREADS) set[i] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < a.n_sequences; i += THREADS)
    if (ready(a, i)) atomicOr(&set[i / 32], 1u << i % 32);
  __syncthreads();
  if (threadIdx.x == 0) {
    int word = 0;
    for (int lane = 0; lane < a.n_lanes; ++lane) {
      while (word < 4096 / 32 - 1 && set[word] == 0) ++word;
      const int picked = set[word] ? 32 * word + __ffs(static_cast<int>(set[word])) - 1 : NONE;
      set[word] &= set[word] - 1;
      turn *t = reinterpret_cast<turn *>(reinterpret_cast<uint8_t *>(a.state) +
                                         static_cast<size_t>(lane) * a.lane_bytes);
      t->picked = picked, t->made = t->merge = 0, t->bytes = 0;
      t->first_query = a.first_query, t->n_tokens = a.block;
      /* where there is nothing to do allocate and pack stand still behind an error */
      t->status = picked == NONE ? RDKV_ERR_ARGUMENT : RDKV_OK;
      t->tokens = picked == NONE ? 0 : a.batch.tail_tokens[picked];
      t->begin = picked == NONE ? 0 : a.batch.live[picked].tail_begin;
    }
  }
  __syncthreads();
  return a.state->picked != NONE;
}

static __global__ void pick_kernel(live_args a) { pick(a); }

static __global__ void gather_kernel(live_args a) {
  const turn t = *a.state;
  if (t.picked == NONE || (a.rows != a.block && !t.merge)) return;
  const rows from = rows_of(a, t.picked, static_cast<int>(blockIdx.y));
  if (from.what == ROW_OUT || (t.merge && from.what < ROW_Q)) return;
  rows to = from;
  const uint32_t n = from.what < ROW_Q ? a.block : a.queries;
  to.stride = from.bytes;
  to.base = reinterpret_cast<uint8_t *>(from.what == ROW_K   ? static_cast<void *>(a.k)
                                        : from.what == ROW_V ? static_cast<void *>(a.v)
                                        : from.what == ROW_Q ? static_cast<void *>(a.q)
                                                             : static_cast<void *>(a.lse)) +
            static_cast<size_t>(from.head) * n * from.bytes;
  const uint32_t pieces = pieces_of(from), first = from.what < ROW_Q ? 0 : t.first_query;
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n * pieces; i += gridDim.x * THREADS)
    copy_piece(to, i / pieces, from, first + i / pieces, i % pieces);
}

__device__ __forceinline__ float value16(uint16_t x, int bf16) {
  return bf16 ? __uint_as_float(static_cast<uint32_t>(x) << 16) : __half2float(__ushort_as_half(x));
}

/* Mean output of the queries' attention to everything: weights as rdkv__recency. A block for 16
   dims, blockIdx.y, of a (layer, kv head), a thread for 8 of them in every 128th row. */
static __global__ void __launch_bounds__(THREADS) mean_out_kernel(live_args a) {
  __shared__ double sums[THREADS / 32][16], part[THREADS / 32];
  const int sequence = a.state->picked, tid = static_cast<int>(threadIdx.x);
  const uint32_t first = a.state->first_query;
  if (sequence == NONE) return;
  const int layer = static_cast<int>(blockIdx.x) / a.n_kv_heads, group = a.n_q_heads / a.n_kv_heads;
  const int head = static_cast<int>(blockIdx.x) % a.n_kv_heads;
  const int n = static_cast<int>(a.queries), each = 2 * a.n_kv_heads + 3 * a.n_q_heads;
  double all = 0, acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  bool bad = false;
  for (int i = tid; i < n; i += THREADS) all += 1 / sqrt(static_cast<double>(n - i));
  for (int m = 16; m; m >>= 1) all += __shfl_xor_sync(rdkv_cuda_compress::FULL, all, m);
  if (tid % 32 == 0) part[tid / 32] = all;
  __syncthreads();
  all = 0;
  for (int w = 0; w < THREADS / 32; ++w) all += part[w];
  const rows out =
      rows_of(a, sequence, layer * each + 2 * a.n_kv_heads + a.n_q_heads + head * group);
  const size_t pitch = a.batch.sequences[sequence].capacity * out.stride;
  for (int i = tid / 2; i < n; i += THREADS / 2) {
    const double w =
        static_cast<double>(static_cast<float>(n / all / sqrt(static_cast<double>(n - i))));
    const uint8_t *at = out.base + (first + static_cast<size_t>(i)) * out.stride + 32 * blockIdx.y +
                        16 * (threadIdx.x % 2);
#pragma unroll 4
    for (int g = 0; g < group; ++g) {
      const uint4 y = *reinterpret_cast<const uint4 *>(at + static_cast<size_t>(g) * pitch);
      const uint32_t z[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = value16(static_cast<uint16_t>(z[j / 2] >> (16 * (j & 1))), a.bf16);
        bad |= !rdkv_cuda_compress::in_range(x);
        acc[j] += w * static_cast<double>(x);
      }
    }
  }
  if (bad) rdkv_cuda_compress::fail(&a.state->status, RDKV_ERR_NONFINITE);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    for (int m = 16; m > 1; m >>= 1) acc[j] += __shfl_xor_sync(rdkv_cuda_compress::FULL, acc[j], m);
    if (tid % 32 < 2) sums[tid / 32][8 * (tid % 32) + j] = acc[j];
  }
  __syncthreads();
  if (tid >= 16) return;
  double s = 0;
  for (int w = 0; w < THREADS / 32; ++w) s += sums[w][tid];
  a.mean_out[static_cast<int>(blockIdx.x) * a.v_dim + 16 * static_cast<int>(blockIdx.y) + tid] =
      static_cast<float>(s / (static_cast<double>(group) * n));
}

/* The new segment gets its place in the arena and the list, and its true shape, position and length
   in the header (words 5, 6, 8 and 9; 3 is the checksum, a sum, which need not be computed anew).
   One thread. */
static __global__ void settle_kernel(live_args a, bool merge) {
  turn *t = a.state;
  if (t->picked == NONE || (merge && t->merge == 0)) return;
  rdkv_cuda_live &l = a.batch.live[t->picked];
  rdkv_cuda_sequence &s = a.batch.sequences[t->picked];
  const void **list = const_cast<const void **>(s.segments);
  const uint32_t at = s.n_segments - t->merge;
  uint64_t first = l.arena_used, begin = l.tail_begin;
  if (t->merge) {
    const uint8_t *old = static_cast<const uint8_t *>(list[at]);
    first = static_cast<uint64_t>(old - l.arena);
    begin = reinterpret_cast<const rdkv_header *>(old)->token_begin;
  }
  if (t->status == RDKV_OK && l.arena_bytes - first < t->bytes) t->status = RDKV_ERR_FULL;
  if (t->status != RDKV_OK) {
    if (!t->merge) l.status = t->status; /* what cannot be merged stays as it is */
    return;
  }
  u64 *words = reinterpret_cast<u64 *>(a.packed), sum = words[3], header[10];
  for (u64 i = 5; i < 10; ++i) header[i] = words[i];
  header[5] = (words[5] & 0xffffffffu) | static_cast<u64>(a.n_layers) << 32;
  header[6] = static_cast<u64>(a.n_q_heads) | static_cast<u64>(a.n_kv_heads) << 32;
  header[8] = begin;
  header[9] = (words[9] >> 32 << 32) | t->n_tokens;
  for (u64 i = 5; i < 10; ++i) {
    const u64 salt = (i + 1) * 0x9e3779b97f4a7c15ull;
    sum += mix(header[i] + salt) - mix(words[i] + salt);
    words[i] = header[i];
  }
  words[3] = sum;
  t->to = l.arena + first, t->made = 1;
  list[at] = t->to;
  s.n_segments = at + 1, l.arena_used = first + t->bytes;
  if (t->merge) return;
  l.tail_begin += a.block;
  l.query_begin = l.query_begin > a.block ? l.query_begin - a.block : 0;
  a.batch.tail_tokens[t->picked] = t->tokens - a.block;
}

/* The segment to the arena, blockIdx.y 0; the tail's rows down by a block. A thread moves the rows
   that are a block apart, so that it alone reads what it overwrites. */
static __global__ void move_kernel(live_args a) {
  const turn t = *a.state;
  if (!t.made || (t.merge && blockIdx.y)) return;
  const uint32_t first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
  if (blockIdx.y == 0) {
    const uint4 *from = reinterpret_cast<const uint4 *>(a.packed);
    for (uint64_t i = first; i < t.bytes / 16; i += step)
      reinterpret_cast<uint4 *>(t.to)[i] = from[i];
    return;
  }
  const rows r = rows_of(a, t.picked, static_cast<int>(blockIdx.y) - 1);
  const uint32_t pieces = pieces_of(r);
  for (uint32_t i = first; i < a.block * pieces; i += step)
    for (uint32_t to = i / pieces; to + a.block < t.tokens; to += a.block)
      copy_piece(r, to, r, to + a.block, i % pieces);
}

/* Whether the last segments of the sequence that was just given one are to become one: `fan` of
   equally many tokens, its own, one behind the other, which fit in the rows there are. One block.
 */
static __device__ bool mergeable(const live_args &a) {
  __shared__ uint32_t fits;
  turn *t = a.state;
  const bool made = t->made;
  __syncthreads();
  if (threadIdx.x == 0) {
    fits = made, t->made = t->merge = 0, t->bytes = 0, t->status = RDKV_ERR_ARGUMENT;
    if (made) {
      const rdkv_cuda_live &l = a.batch.live[t->picked];
      const rdkv_cuda_sequence &s = a.batch.sequences[t->picked];
      const uint32_t tokens = a.batch.tail_tokens[t->picked];
      uint64_t sum = 0;
      fits = s.n_segments >= a.fan && tokens >= a.block && l.query_begin <= tokens - a.block;
      const uint8_t *next = nullptr;
      uint32_t each = 0;
      for (uint32_t i = 0; i < a.fan && fits; ++i) {
        const uint8_t *at = static_cast<const uint8_t *>(s.segments[s.n_segments - a.fan + i]);
        const rdkv_header *h = reinterpret_cast<const rdkv_header *>(at);
        if (i == 0) next = at, each = h->n_tokens;
        fits = at == next && at >= l.arena + l.arena_shared && at < l.arena + l.arena_used &&
               h->n_tokens == each && h->first_layer == static_cast<uint32_t>(a.first_layer) &&
               h->n_layers == static_cast<uint32_t>(a.n_layers);
        next = at + h->total_bytes, sum += h->n_tokens;
      }
      fits = fits && next == l.arena + l.arena_used && sum < 0xffffffffu;
      t->n_tokens = static_cast<uint32_t>(sum), t->first_query = tokens - a.block;
      const double fp16 = static_cast<double>(a.n_layers) * a.n_kv_heads * (a.k_dim + a.v_dim) * 2;
      t->budget = a.budget_bytes ? a.budget_bytes * (sum / a.block)
                                 : static_cast<uint64_t>(a.keep * fp16 * static_cast<double>(sum));
    }
  }
  __syncthreads();
  if (!fits) return false;
  const rdkv_cuda_sequence &s = a.batch.sequences[t->picked];
  bool over = false;
  for (int h = static_cast<int>(threadIdx.x); h < a.n_layers * a.n_kv_heads; h += THREADS) {
    uint32_t *count = a.counts + h * (MAX_FAN + 1), n = 0;
    for (uint32_t i = 0; i < a.fan; ++i) {
      rdkv_cuda_head head;
      rdkv_cuda_head_of(s.segments[s.n_segments - a.fan + i], a.first_layer + h / a.n_kv_heads,
                        h % a.n_kv_heads, &head);
      count[i] = n;
      for (int run = 0; run < 4; ++run) n += head.n_tokens[run];
    }
    count[a.fan] = n;
    over |= n > a.rows;
  }
  if (__syncthreads_or(over)) return false;
  if (threadIdx.x == 0) t->merge = a.fan, t->status = RDKV_OK;
  return true;
}

static __global__ void mergeable_kernel(live_args a) { mergeable(a); }

/* A code of a K block, token 0..31 and column 0..15; of a V block, dim 0..15. */
__device__ __forceinline__ int code_at(const uint32_t *words, int level, int lane, int sub, int pr,
                                       int r, int e) {
  if (level == 1) return static_cast<int>(words[lane] >> (2 * (2 * sub + pr) + 8 * r + 16 * e) & 3);
  if (level == 2) return static_cast<int>(words[2 * lane + sub] >> (4 * pr + 8 * r + 16 * e) & 15);
  return static_cast<int>(words[4 * lane + 2 * sub + pr] >> (8 * (2 * r + e)) & 255);
}
__device__ __forceinline__ int key_code(const uint32_t *words, int level, int t, int c) {
  return code_at(words, level, 4 * (t & 7) + (c >> 2), t >> 4, c >> 1 & 1, t >> 3 & 1, c & 1);
}
__device__ __forceinline__ int value_code(const uint32_t *words, int level, int t, int d) {
  return code_at(words, level, 4 * (d & 7) + (t >> 1 & 3), t >> 4, t >> 3 & 1, d >> 3, t & 1);
}

/* What the segments hold, as fp16 rows: segments are blockIdx.z, heads blockIdx.y, tiles shared out
   over blockIdx.x. */
static __global__ void __launch_bounds__(THREADS) unpack_kernel(live_args a) {
  __shared__ uint16_t k[32][256], v[32][256];
  const turn turn_now = *a.state;
  if (!turn_now.merge) return;
  const int head = static_cast<int>(blockIdx.y), tid = static_cast<int>(threadIdx.x);
  const rdkv_cuda_sequence &s = a.batch.sequences[turn_now.picked];
  const uint32_t i = blockIdx.z;
  const void *block = s.segments[s.n_segments - turn_now.merge + i];
  const int layer = head / a.n_kv_heads, kv_head = head % a.n_kv_heads;
  rdkv_cuda_head h;
  rdkv_cuda_head_of(block, a.first_layer + layer, kv_head, &h);
  const rdkv_record &record =
      reinterpret_cast<const rdkv_record *>(static_cast<const rdkv_header *>(block) + 1)[head];
  const int first[4] = {0, h.n_blocks[0], h.n_blocks[0] + h.n_blocks[1],
                        h.n_blocks[0] + h.n_blocks[1] + h.n_blocks[2]};
  const int slots = 16 * first[3], all = slots + h.n_dropped;
  const uint16_t *scale = reinterpret_cast<const uint16_t *>(h.table), *mid = scale + slots;
  const uint8_t *channel = reinterpret_cast<const uint8_t *>(mid + all);
  for (uint32_t tile = blockIdx.x; tile < rdkv_cuda_tiles(h); tile += gridDim.x) {
    int run;
    uint32_t tokens, row = a.counts[head * (MAX_FAN + 1) + static_cast<int>(i)], tiles = 0;
    uint64_t offset;
    rdkv_cuda_tile_at(h, a.v_dim, tile, &run, &tokens, &offset);
    for (int r = 0; r < run; ++r) row += h.n_tokens[r], tiles += (h.n_tokens[r] + 31) / 32;
    row += 32 * (tile - tiles);
    const uint32_t *words = reinterpret_cast<const uint32_t *>(h.tiles + offset);
    const int n = static_cast<int>(tokens);
    __syncthreads();
    for (int x = tid; x < 32 * all; x += THREADS) {
      const int t = x & 31, slot = x >> 5;
      float value = rdkv_cuda_compress::half_value(mid[slot]);
      if (slot < slots) {
        const int b = slot >> 4, level = b < first[1] ? 1 : b < first[2] ? 2 : 3;
        if (slot - 16 * first[level - 1] >= record.n_channels[level - 1]) continue; /* a pad */
        const uint32_t *at = words + 32 * min(b, first[1]) +
                             64 * min(max(b - first[1], 0), first[2] - first[1]) +
                             128 * max(b - first[2], 0);
        value += rdkv_cuda_compress::half_value(scale[slot]) *
                 static_cast<float>(key_code(at, level, t, slot & 15) - (1 << ((1 << level) - 1)));
      }
      k[t][channel[slot]] = rdkv_cuda_compress::to_half(value);
    }
    words += 32 * first[1] + 64 * (first[2] - first[1]) + 128 * (first[3] - first[2]);
    const uint16_t *params = reinterpret_cast<const uint16_t *>(words);
    words += 32;
    for (int x = tid; x < 32 * a.v_dim; x += THREADS) {
      const int t = x & 31, d = x >> 5, level = run + 1;
      if (level == 4) {
        const int lane = 4 * (d & 7) + (t >> 1 & 3), word = (d >> 3 & 1) + 2 * (t >> 3 & 1);
        const int b = (t >> 4) * (a.v_dim / 16) + d / 16;
        v[t][d] =
            reinterpret_cast<const uint16_t *>(words)[2 * ((b * 32 + lane) * 4 + word) + (t & 1)];
      } else {
        const int at = 2 * (4 * (t & 7) + (t >> 3));
        const int code = value_code(words + (d / 16) * (16 << level), level, t, d & 15);
        v[t][d] =
            rdkv_cuda_compress::to_half(rdkv_cuda_compress::half_value(params[at + 1]) +
                                        rdkv_cuda_compress::half_value(params[at]) *
                                            static_cast<float>(code - (1 << ((1 << level) - 1))));
      }
    }
    __syncthreads();
    const size_t to = static_cast<size_t>(head) * a.rows + row;
    for (int x = tid; x < n * a.k_dim; x += THREADS)
      a.k[to * static_cast<size_t>(a.k_dim) + static_cast<size_t>(x)] = k[x / a.k_dim][x % a.k_dim];
    for (int x = tid; x < n * a.v_dim; x += THREADS)
      a.v[to * static_cast<size_t>(a.v_dim) + static_cast<size_t>(x)] = v[x / a.v_dim][x % a.v_dim];
  }
}

/* Rows that a head does not have repeat its first one, so that no range is wider for them. */
static __global__ void pad_kernel(live_args a) {
  const turn t = *a.state;
  if (!t.merge) return;
  const size_t head = blockIdx.y;
  const uint32_t n = a.counts[head * (MAX_FAN + 1) + t.merge];
  const auto pad = [&](uint16_t *base, uint32_t pieces) {
    uint4 *to = reinterpret_cast<uint4 *>(base) + head * a.rows * pieces;
    for (uint32_t i = n * pieces + blockIdx.x * THREADS + threadIdx.x; i < a.rows * pieces;
         i += gridDim.x * THREADS)
      to[i] = n ? to[i % pieces] : make_uint4(0, 0, 0, 0);
  };
  pad(a.k, static_cast<uint32_t>(a.k_dim) / 8), pad(a.v, static_cast<uint32_t>(a.v_dim) / 8);
}

/* Such rows weigh nothing: no width saves anything, so that they are left out. */
static __global__ void mask_kernel(live_args a) {
  const turn t = *a.state;
  if (!t.merge) return;
  const uint32_t n = a.counts[blockIdx.x * (MAX_FAN + 1) + t.merge];
  for (uint32_t i = n + threadIdx.x; i < a.rows; i += THREADS)
    a.token[static_cast<size_t>(blockIdx.x) * a.rows + i] = 0;
}

/* A thread takes 8 elements of q or out; blockIdx.y is the sequence. */
static __global__ void keep_kernel(live_args a, int layer, rdkv_cuda_io io, int dtype) {
  const uint32_t sequence = blockIdx.y, token = a.batch.tail_tokens[sequence];
  const uint32_t capacity = a.batch.sequences[sequence].capacity;
  const rdkv_cuda_live &l = a.batch.live[sequence];
  const uint32_t of_q = static_cast<uint32_t>(a.k_dim) / 8;
  const uint32_t each = of_q + static_cast<uint32_t>(a.v_dim) / 8;
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x, head = i / each;
  const uint32_t n_heads = static_cast<uint32_t>(a.n_q_heads);
  if (head >= n_heads || token >= capacity || !l.q || !l.out || !l.lse) return;
  const size_t row =
      (static_cast<size_t>(a.first_layer + layer) * n_heads + head) * capacity + token;
  const bool is_out = i % each >= of_q;
  const size_t piece = i % each - (is_out ? of_q : 0), pieces = is_out ? each - of_q : of_q;
  const size_t from = sequence * n_heads + head, at = from * pieces + piece;
  const void *src = is_out ? io.out : io.q;
  uint4 *to = static_cast<uint4 *>(is_out ? l.out : l.q) + row * pieces + piece;
  if (dtype == (a.bf16 ? RDKV_BF16 : RDKV_F16)) {
    *to = static_cast<const uint4 *>(src)[at];
  } else {
    uint16_t x[8];
    for (int k = 0; k < 8; ++k) {
      const float f = rdkv_cuda_compress::element(src, dtype, static_cast<ptrdiff_t>(8 * at) + k);
      x[k] = a.bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(f)) : rdkv_cuda_compress::to_half(f);
    }
    *to = make_uint4(
        x[0] | static_cast<uint32_t>(x[1]) << 16, x[2] | static_cast<uint32_t>(x[3]) << 16,
        x[4] | static_cast<uint32_t>(x[5]) << 16, x[6] | static_cast<uint32_t>(x[7]) << 16);
  }
  if (i % each == 0) l.lse[row] = io.lse[from];
}

static __device__ uint64_t end_of(const void *segment) {
  const rdkv_header *h = static_cast<const rdkv_header *>(segment);
  return h->token_begin + h->n_tokens;
}

/* As rdkv_sequence_rollback. A thread a sequence. */
static __global__ void rollback_kernel(live_args a, const uint64_t *n_tokens) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= a.n_sequences || n_tokens[i] == UINT64_MAX) return;
  rdkv_cuda_live &l = a.batch.live[i];
  rdkv_cuda_sequence &s = a.batch.sequences[i];
  const uint64_t want = n_tokens[i];
  uint32_t left = 0;
  if (want > l.tail_begin + a.batch.tail_tokens[i]) {
    l.status = RDKV_ERR_ARGUMENT;
    return;
  }
  if (want >= l.tail_begin) {
    left = static_cast<uint32_t>(want - l.tail_begin);
  } else {
    uint64_t end = 0;
    uint32_t n = 0;
    for (uint32_t j = 0; j < s.n_segments; ++j) {
      const uint64_t e = end_of(s.segments[j]);
      if (e <= want)
        end = e > end ? e : end;
      else if (static_cast<const rdkv_header *>(s.segments[j])->token_begin < want)
        end = UINT64_MAX;
    }
    if (end != want) {
      l.status = RDKV_ERR_GONE;
      return;
    }
    for (uint32_t j = 0; j < s.n_segments; ++j) {
      const uint8_t *at = static_cast<const uint8_t *>(s.segments[j]);
      if (end_of(at) <= want)
        const_cast<const void **>(s.segments)[n++] = at;
      else if (l.arena && at >= l.arena + l.arena_shared && at < l.arena + l.arena_used)
        l.arena_used = static_cast<uint64_t>(at - l.arena);
    }
    s.n_segments = n, l.tail_begin = want;
  }
  a.batch.tail_tokens[i] = left;
  if (l.query_begin > left) l.query_begin = left;
}

/* As rdkv_sequence_fork, but for the rows. One thread. */
static __global__ void fork_kernel(live_args a, int from, int to) {
  rdkv_cuda_live &l = a.batch.live[from], &m = a.batch.live[to];
  const rdkv_cuda_sequence &s = a.batch.sequences[from];
  rdkv_cuda_sequence &t = a.batch.sequences[to];
  const uint32_t n = a.batch.tail_tokens[from];
  m.status = !l.q != !m.q ? RDKV_ERR_ARGUMENT : n > t.capacity ? RDKV_ERR_FULL : RDKV_OK;
  if (m.status != RDKV_OK) return;
  for (uint32_t i = 0; i < s.n_segments; ++i)
    const_cast<const void **>(t.segments)[i] = s.segments[i];
  t.n_segments = s.n_segments, m.tail_begin = l.tail_begin, m.query_begin = l.query_begin;
  m.arena_used = m.arena_shared; /* nothing of its own yet */
  l.arena_shared = l.arena_used;
  a.batch.tail_tokens[to] = n;
}

static __global__ void fork_rows_kernel(live_args a, int from, int to) {
  if (a.batch.live[to].status != RDKV_OK) return;
  const rows src = rows_of(a, from, static_cast<int>(blockIdx.y));
  const rows dst = rows_of(a, to, static_cast<int>(blockIdx.y));
  if (!src.base || !dst.base) return;
  const uint32_t pieces = pieces_of(src), n = a.batch.tail_tokens[to];
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n * pieces; i += gridDim.x * THREADS)
    copy_piece(dst, i / pieces, src, i / pieces, i % pieces);
}

/* ---- the host's side */

static live_args args_of(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *batch) {
  live_args a = live_args();
  a.batch = *batch;
  a.n_sequences = cfg->batch, a.n_layers = cfg->n_layers, a.first_layer = cfg->first_layer;
  a.n_q_heads = cfg->n_q_heads, a.n_kv_heads = cfg->n_kv_heads;
  a.k_dim = cfg->k_dim, a.v_dim = cfg->v_dim, a.max_segments = cfg->max_segments;
  a.bf16 = cfg->tail_dtype == RDKV_BF16;
  return a;
}
static bool batch_ok(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *b) {
  return cfg && b && b->sequences && b->live && b->tail_tokens;
}

/* The workspace of a turn. */
struct turn_memory {
  arena m;
  live_args a;
  rdkv_config cfg;   /* of the block */
  rdkv_config heads; /* the same with the layers' heads in one layer */
  rdkv_layer all;    /* that layer */
  uint8_t *work;
  size_t work_bytes, packed_bytes;
};

/* merge: of a turn that merges; both lie in the same memory. */
static bool layout_turn(const rdkv_config *rdkv, const rdkv_cuda_config *cfg,
                        const rdkv_cuda_batch *batch, const rdkv_cuda_blocks *blocks, bool merge,
                        void *workspace, turn_memory *t) {
  const uint32_t block = blocks && blocks->block ? blocks->block : 128;
  const uint32_t rows = merge ? (blocks->rows ? blocks->rows : 1024) : block;
  if (!cfg || !rdkv_cuda_compress::resolved(rdkv) || rdkv->n_layers != cfg->n_layers ||
      rdkv->n_q_heads != cfg->n_q_heads || rdkv->n_kv_heads != cfg->n_kv_heads ||
      rdkv->k_dim != cfg->k_dim || rdkv->v_dim != cfg->v_dim || !blocks || block > 1024 ||
      rows < block || rows > 65536 || blocks->fan == 1 || blocks->fan > MAX_FAN ||
      blocks->lanes > MAX_LANES || cfg->n_layers > MAX_LAYERS)
    return false;
  t->a = args_of(cfg, batch);
  t->cfg = *rdkv, t->cfg.window = static_cast<int32_t>(block); /* all queries count */
  if (merge) t->cfg.pool = 1; /* segments do not keep the order of tokens */
  t->heads = t->cfg, t->heads.n_layers = 1;
  t->heads.n_q_heads = cfg->n_layers * cfg->n_q_heads;
  t->heads.n_kv_heads = cfg->n_layers * cfg->n_kv_heads;
  t->a.n_lanes = blocks->lanes ? static_cast<int>(blocks->lanes) : 1;
  t->a.block = t->a.first_query = t->a.queries = block, t->a.rows = rows;
  t->a.fan = blocks->fan;
  t->a.least = block + (blocks->recent > block ? blocks->recent : block);
  t->a.keep = rdkv->keep, t->a.budget_bytes = rdkv->budget_bytes;
  t->a.joint = rdkv->profile == RDKV_JOINT;
  const uint64_t kv = static_cast<uint64_t>(t->heads.n_kv_heads);
  const uint64_t qs = static_cast<uint64_t>(t->heads.n_q_heads);
  const uint64_t kd = static_cast<uint64_t>(cfg->k_dim), vd = static_cast<uint64_t>(cfg->v_dim);
  rdkv_layer *l = &t->all;
  *l = rdkv_layer();
  l->n_tokens = rows;
  t->m.next = static_cast<uint8_t *>(workspace), t->m.bytes = 0;
  t->m.take(&t->a.state, 1);
  t->m.take(&t->a.lambda, static_cast<uint64_t>(cfg->n_layers));
  t->m.take(&t->a.counts, kv * (MAX_FAN + 1));
  t->m.take(&t->a.k, kv * rows * kd);
  t->m.take(&t->a.v, kv * rows * vd);
  t->m.take(&t->a.q, qs * block * kd);
  t->m.take(&t->a.lse, qs * block);
  t->m.take(&l->token, kv * rows);
  t->m.take(&l->q_square, kv * kd);
  t->m.take(&l->k_square, kv * kd);
  t->m.take(&l->mean_out, kv * vd);
  t->m.take(&l->v_distortion, kv * 5 * rows);
  t->m.take(&l->k_distortion, kv * 4 * kd);
  t->m.take(&l->v_bits, kv * rows);
  t->m.take(&l->k_bits, kv * kd);
  t->a.mean_out = l->mean_out, t->a.token = l->token;
  rdkv_config any = t->cfg; /* a merged segment's budget is not of its rows */
  if (merge) any.scope = RDKV_SCOPE_LAMBDA, any.budget_bytes = 0;
  t->packed_bytes = rdkv_block_bound(&any, rows);
  t->m.take(&t->a.packed, t->packed_bytes);
  t->work_bytes = 0;
  for (uint32_t n = merge ? rows : 1; n <= rows; ++n) { /* fewer tokens may take more */
    const size_t a = rdkv_cuda_layer_workspace(&t->heads, 1, n);
    const size_t b = rdkv_cuda_allocate_workspace(&t->cfg, cfg->n_layers, n);
    const size_t most = a > b ? a : b;
    if (most > t->work_bytes) t->work_bytes = most;
  }
  t->m.take(&t->work, t->work_bytes);
  return t->packed_bytes > 0;
}

/* Makes it a turn of the tail's first n tokens, scored by `queries` queries, none more than a block
   has, from that of the tail's token first_query on. */
static void narrow(turn_memory *t, uint32_t n, uint32_t first_query, uint32_t queries) {
  t->a.block = t->a.rows = t->a.least = t->all.n_tokens = n;
  t->a.first_query = first_query, t->a.queries = queries;
}

/* The launches of a turn, after pick or mergeable. */
static cudaError_t launch_turn(turn_memory *t, bool merge, cudaStream_t stream) {
  const live_args &a = t->a;
  const uint32_t n = a.rows;
  const int kv_heads = t->heads.n_kv_heads, q_heads = t->heads.n_q_heads;
  uint32_t *status = &a.state->status;
  const uint32_t widest =
      static_cast<uint32_t>(a.k_dim > a.v_dim ? a.k_dim : a.v_dim) / 8 * a.block;
  const dim3 grid((widest + THREADS - 1) / THREADS, static_cast<uint32_t>(arrays_of(a)));
  gather_kernel<<<grid, THREADS, 0, stream>>>(a);
  if (merge) {
    const dim3 heads(4, static_cast<uint32_t>(kv_heads)), pieces(4, heads.y, a.fan);
    unpack_kernel<<<pieces, THREADS, 0, stream>>>(a);
    pad_kernel<<<heads, THREADS, 0, stream>>>(a);
  }
  rdkv_kv kv;
  const rdkv_dtype type = a.bf16 && !merge ? RDKV_BF16 : RDKV_F16;
  kv.k = rdkv_dense(a.k, type, kv_heads, a.k_dim), kv.v = rdkv_dense(a.v, type, kv_heads, a.v_dim);
  kv.q = rdkv_dense(a.q, a.bf16 ? RDKV_BF16 : RDKV_F16, q_heads, a.k_dim);
  kv.k.token_stride = kv.q.token_stride = a.k_dim, kv.v.token_stride = a.v_dim;
  kv.k.head_stride = static_cast<ptrdiff_t>(n) * a.k_dim;
  kv.q.head_stride = static_cast<ptrdiff_t>(a.queries) * a.k_dim;
  kv.v.head_stride = static_cast<ptrdiff_t>(n) * a.v_dim;
  rdkv_layer *l = &t->all;
  const float *lse = a.lse;
  rdkv_config by = t->heads; /* the header says how many there are of a whole block */
  by.window = static_cast<int32_t>(a.queries);
  const rdkv_tensor later = rdkv_tensor(); /* mean_out_kernel's */
  cudaError_t e =
      rdkv_cuda_compress::score_by(&by, &kv, merge ? n : a.first_query, &lse, a.queries, &later, l,
                                   1, status, t->work, t->work_bytes, stream);
  if (e) return e;
  if (merge) mask_kernel<<<static_cast<uint32_t>(kv_heads), THREADS, 0, stream>>>(a);
  const dim3 dims(static_cast<uint32_t>(kv_heads), static_cast<uint32_t>(a.v_dim) / 16);
  if (a.joint) mean_out_kernel<<<dims, THREADS, 0, stream>>>(a);
  e = rdkv_cuda_measure(&t->heads, &kv, l, 1, status, t->work, t->work_bytes, stream);
  /* allocation shares out bytes over the true layers; at a lambda there is nothing to share out */
  const bool at_lambda = a.joint && t->cfg.scope == RDKV_SCOPE_LAMBDA;
  rdkv_layer layers[MAX_LAYERS];
  for (int i = 0; i < t->cfg.n_layers && !at_lambda; ++i) {
    const size_t first = static_cast<size_t>(i) * static_cast<size_t>(a.n_kv_heads);
    const size_t kd = static_cast<size_t>(a.k_dim), vd = static_cast<size_t>(a.v_dim);
    layers[i] = *l;
    layers[i].token += first * n, layers[i].q_square += first * kd;
    layers[i].k_square += first * kd, layers[i].mean_out += first * vd;
    layers[i].v_distortion += first * 5 * n, layers[i].k_distortion += first * 4 * kd;
    layers[i].v_bits += first * n, layers[i].k_bits += first * kd;
  }
  if (!e)
    e = rdkv_cuda_compress::allocate(at_lambda ? &t->heads : &t->cfg, at_lambda ? l : layers,
                                     at_lambda ? 1 : t->cfg.n_layers,
                                     merge ? &a.state->budget : nullptr, nullptr, &a.state->begin,
                                     a.lambda, status, t->work, t->work_bytes, stream);
  if (!e)
    e = rdkv_cuda_pack(&t->heads, &kv, l, 1, a.lambda, a.first_layer, 0, a.packed, t->packed_bytes,
                       &a.state->bytes, status, t->work, t->work_bytes, stream);
  if (e) return e;
  settle_kernel<<<1, 1, 0, stream>>>(a, merge);
  const dim3 moves(grid.x, grid.y + 1);
  move_kernel<<<moves, THREADS, 0, stream>>>(a);
  return cudaGetLastError();
}

/* A conditional node behind what the stream has captured so far; its body is captured on *inner. */
#if CUDART_VERSION >= 12040
static cudaError_t capture_state(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                 cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                 const cudaGraphEdgeData **edges, size_t *n) {
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, status, nullptr, graph, nodes, edges, n);
#else
  return cudaStreamGetCaptureInfo_v3(stream, status, nullptr, graph, nodes, edges, n);
#endif
}

static cudaError_t add_conditional(cudaStream_t stream, cudaGraphConditionalHandle handle,
                                   cudaGraphConditionalNodeType type, cudaGraph_t *body) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph;
  const cudaGraphNode_t *nodes;
  const cudaGraphEdgeData *edges;
  cudaGraphNode_t node;
  size_t n;
  cudaError_t e = capture_state(stream, &status, &graph, &nodes, &edges, &n);
  if (e) return e;
  cudaGraphNodeParams p = {};
  p.type = cudaGraphNodeTypeConditional;
  p.conditional.handle = handle, p.conditional.type = type, p.conditional.size = 1;
#if CUDART_VERSION >= 13000
  e = cudaGraphAddNode(&node, graph, nodes, edges, n, &p);
  if (!e)
    e = cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1,
                                            cudaStreamSetCaptureDependencies);
#else
  e = cudaGraphAddNode_v2(&node, graph, nodes, edges, n, &p);
  if (!e)
    e = cudaStreamUpdateCaptureDependencies_v2(stream, &node, nullptr, 1,
                                               cudaStreamSetCaptureDependencies);
#endif
  if (!e) *body = p.conditional.phGraph_out[0];
  return e;
}

static __global__ void pick_conditional_kernel(live_args a, cudaGraphConditionalHandle handle) {
  const bool some = pick(a);
  if (threadIdx.x == 0) cudaGraphSetConditional(handle, some);
}

static __global__ void mergeable_conditional_kernel(live_args a,
                                                    cudaGraphConditionalHandle handle) {
  const bool merge = mergeable(a);
  if (threadIdx.x == 0) cudaGraphSetConditional(handle, merge);
}

/* Streams and events of a capture. */
struct capture_lanes {
  cudaStream_t stream[MAX_LANES];
  cudaEvent_t event[MAX_LANES];
};

static cudaError_t open_lanes(capture_lanes *c, int n) {
  *c = capture_lanes();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t e = cudaThreadExchangeStreamCaptureMode(&mode); /* they are made during a capture */
  if (e) return e;
  for (int i = 0; i < n && !e; ++i) {
    e = cudaStreamCreateWithFlags(&c->stream[i], cudaStreamNonBlocking);
    if (!e) e = cudaEventCreateWithFlags(&c->event[i], cudaEventDisableTiming);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return e;
}
static cudaError_t close_lanes(capture_lanes *c) {
  cudaError_t e = cudaSuccess;
  for (int i = 0; i < MAX_LANES; ++i) {
    const cudaError_t a = c->stream[i] ? cudaStreamDestroy(c->stream[i]) : cudaSuccess;
    const cudaError_t b = c->event[i] ? cudaEventDestroy(c->event[i]) : cudaSuccess;
    if (!e) e = a ? a : b;
  }
  return e;
}

/* One round of all lanes, captured on their streams, which come together on that of lane 0. merges
   [lane] gets the body of the loop that merges. */
static cudaError_t capture_round(turn_memory *t, turn_memory *m, cudaGraph_t loop, capture_lanes *c,
                                 cudaGraphConditionalHandle *merge, cudaGraph_t *merges) {
  const int n = t->a.n_lanes;
  cudaError_t e = cudaEventRecord(c->event[0], c->stream[0]);
  for (int i = 0; i < n && !e; ++i) {
    if (i > 0) e = cudaStreamWaitEvent(c->stream[i], c->event[0], 0);
    if (!e) e = launch_turn(&t[i], false, c->stream[i]);
    if (!e && m)
      e = cudaGraphConditionalHandleCreate(&merge[i], loop, 0, cudaGraphCondAssignDefault);
    if (!e && m) {
      mergeable_conditional_kernel<<<1, THREADS, 0, c->stream[i]>>>(m[i].a, merge[i]);
      e = add_conditional(c->stream[i], merge[i], cudaGraphCondTypeWhile, &merges[i]);
    }
    if (!e && i > 0) e = cudaEventRecord(c->event[i], c->stream[i]);
  }
  for (int i = 1; i < n && !e; ++i) e = cudaStreamWaitEvent(c->stream[0], c->event[i], 0);
  return e;
}

/* Into the graph: pick; if there is one { while there is one { in each lane { turn; while the last
   segments are to be merged { merge } }; pick } plan }. */
static cudaError_t capture_turns(turn_memory *t, turn_memory *m, const rdkv_cuda_config *cfg,
                                 void *plan, cudaGraph_t graph, cudaStream_t stream) {
  const cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaGraphConditionalHandle some, more, merge[MAX_LANES];
  cudaGraph_t body, loop, merges[MAX_LANES], same;
  capture_lanes c;
  cudaError_t e = cudaGraphConditionalHandleCreate(&some, graph, 0, cudaGraphCondAssignDefault);
  if (e) return e;
  pick_conditional_kernel<<<1, THREADS, 0, stream>>>(t->a, some);
  e = add_conditional(stream, some, cudaGraphCondTypeIf, &body);
  if (!e) e = cudaGraphConditionalHandleCreate(&more, body, 1, cudaGraphCondAssignDefault);
  if (e) return e;
  e = open_lanes(&c, t->a.n_lanes);
  const cudaStream_t inner = c.stream[0];
  if (!e) e = cudaStreamBeginCaptureToGraph(inner, body, nullptr, nullptr, 0, mode);
  if (!e) {
    e = add_conditional(inner, more, cudaGraphCondTypeWhile, &loop);
    if (!e) e = rdkv_cuda_plan(cfg, t->a.batch.sequences, t->a.batch.tail_tokens, plan, inner);
    const cudaError_t end = cudaStreamEndCapture(inner, &same);
    if (!e) e = end;
  }
  if (!e) e = cudaStreamBeginCaptureToGraph(inner, loop, nullptr, nullptr, 0, mode);
  if (!e) {
    e = capture_round(t, m, loop, &c, merge, merges);
    if (!e) pick_conditional_kernel<<<1, THREADS, 0, inner>>>(t->a, more);
    const cudaError_t end = cudaStreamEndCapture(inner, &same);
    if (!e) e = end;
  }
  for (int i = 0; i < t->a.n_lanes && m && !e; ++i) {
    e = cudaStreamBeginCaptureToGraph(inner, merges[i], nullptr, nullptr, 0, mode);
    if (e) break;
    e = launch_turn(&m[i], true, inner);
    if (!e) mergeable_conditional_kernel<<<1, THREADS, 0, inner>>>(m[i].a, merge[i]);
    const cudaError_t end = cudaStreamEndCapture(inner, &same);
    if (!e) e = end;
  }
  const cudaError_t closed = close_lanes(&c);
  return e ? e : closed ? closed : cudaGetLastError();
}
#endif

/* Rows of a tail of rdkv.h, whose buffer holds the lengths [n_layers] first. */
static uint8_t *host_rows(const rdkv_tail *t, int layer, int head, bool is_v) {
  const size_t k = static_cast<size_t>((t->k_dim + 15) / 16 * 16) * t->capacity * 2;
  const size_t v = static_cast<size_t>((t->v_dim + 15) / 16 * 16) * t->capacity * 2;
  const size_t heads = static_cast<size_t>(t->n_kv_heads);
  const size_t first = (static_cast<size_t>(t->n_layers) * 4 + 63) / 64 * 64;
  return static_cast<uint8_t *>(t->memory) + first + static_cast<size_t>(layer) * heads * (k + v) +
         (is_v ? heads * k + static_cast<size_t>(head) * v : static_cast<size_t>(head) * k);
}

static bool same_shape(const rdkv_cuda_config *cfg, const rdkv_sequence *s) {
  return s && s->tail.memory && s->tail.n_layers == cfg->first_layer + cfg->n_layers &&
         s->tail.n_kv_heads == cfg->n_kv_heads && s->tail.k_dim == cfg->k_dim &&
         s->tail.v_dim == cfg->v_dim && s->tail.dtype == cfg->tail_dtype &&
         s->n_q_heads == static_cast<uint32_t>(cfg->n_q_heads) && cfg->v_dim % 16 == 0;
}

/* Copies the rows of tail and queries between host and device. */
static cudaError_t copy_rows(const rdkv_cuda_config *cfg, const rdkv_sequence *host,
                             const rdkv_cuda_sequence &s, const rdkv_cuda_live &l, uint32_t tokens,
                             uint32_t queries, bool up, cudaStream_t stream) {
  const cudaMemcpyKind kind = up ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
  cudaError_t e = cudaSuccess;
  for (int layer = 0; layer < host->tail.n_layers && !e; ++layer) {
    for (int i = 0; i < 2 * cfg->n_kv_heads && tokens && !e; ++i) {
      const bool is_v = i >= cfg->n_kv_heads;
      const int head = is_v ? i - cfg->n_kv_heads : i;
      const size_t width = 2 * static_cast<size_t>(is_v ? cfg->v_dim : cfg->k_dim);
      const size_t pitch = 2 * static_cast<size_t>(is_v ? s.v_token : s.k_token);
      uint16_t *device =
          static_cast<uint16_t *>(is_v ? s.v : s.k) +
          (is_v ? layer * s.v_layer + head * s.v_head : layer * s.k_layer + head * s.k_head);
      uint8_t *at = host_rows(&host->tail, layer, head, is_v);
      e = up ? cudaMemcpy2DAsync(device, pitch, at, width, width, tokens, kind, stream)
             : cudaMemcpy2DAsync(at, width, device, pitch, width, tokens, kind, stream);
    }
    for (int head = 0; head < cfg->n_q_heads && queries && !e; ++head) {
      const size_t row = (static_cast<size_t>(layer) * static_cast<size_t>(cfg->n_q_heads) +
                          static_cast<size_t>(head)) *
                             s.capacity +
                         l.query_begin;
      for (int i = 0; i < 2 && !e; ++i) {
        const size_t dim = static_cast<size_t>(i ? cfg->v_dim : cfg->k_dim);
        uint16_t *device = static_cast<uint16_t *>(i ? l.out : l.q) + row * dim;
        uint8_t *at = host_rows(&host->queries, layer, head, i == 1);
        e = up ? cudaMemcpyAsync(device, at, queries * dim * 2, kind, stream)
               : cudaMemcpyAsync(at, device, queries * dim * 2, kind, stream);
      }
      float *at = host->lse +
                  static_cast<size_t>(layer) * host->queries.capacity * host->lse_stride +
                  head; /* one of a row's [lse_stride] */
      const size_t pitch = host->lse_stride * sizeof(float);
      if (!e)
        e = up ? cudaMemcpy2DAsync(l.lse + row, 4, at, pitch, 4, queries, kind, stream)
               : cudaMemcpy2DAsync(at, pitch, l.lse + row, 4, 4, queries, kind, stream);
    }
  }
  return e;
}

} /* namespace rdkv_cuda_live_code */

extern "C" size_t rdkv_cuda_queries_bytes(const rdkv_cuda_config *cfg, uint32_t capacity) {
  const size_t rows = static_cast<size_t>(cfg->first_layer + cfg->n_layers) *
                      static_cast<size_t>(cfg->n_q_heads) * capacity;
  return rows * (2 * static_cast<size_t>(cfg->k_dim + cfg->v_dim) + sizeof(float));
}

extern "C" void rdkv_cuda_queries(const rdkv_cuda_config *cfg, void *data, uint32_t capacity,
                                  rdkv_cuda_live *live) {
  const size_t rows = static_cast<size_t>(cfg->first_layer + cfg->n_layers) *
                      static_cast<size_t>(cfg->n_q_heads) * capacity;
  uint16_t *q = static_cast<uint16_t *>(data), *out = q + rows * static_cast<size_t>(cfg->k_dim);
  live->q = q, live->out = out;
  live->lse = reinterpret_cast<float *>(out + rows * static_cast<size_t>(cfg->v_dim));
}

extern "C" cudaError_t rdkv_cuda_keep(const rdkv_cuda_config *cfg, const rdkv_cuda_batch *batch,
                                      int layer, const rdkv_cuda_io *io, cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  if (!batch_ok(cfg, batch) || layer < 0 || layer >= cfg->n_layers || !io || !io->q || !io->out ||
      !io->lse || reinterpret_cast<uintptr_t>(io->q) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(io->out) % 16 != 0)
    return cudaErrorInvalidValue;
  const uint32_t pieces = static_cast<uint32_t>(cfg->n_q_heads * (cfg->k_dim + cfg->v_dim)) / 8;
  const dim3 grid((pieces + THREADS - 1) / THREADS, static_cast<uint32_t>(cfg->batch));
  keep_kernel<<<grid, THREADS, 0, stream>>>(args_of(cfg, batch), layer, *io, cfg->dtype);
  return cudaGetLastError();
}

namespace rdkv_cuda_live_code {

/* Bytes that one lane takes; 0: not possible. */
static size_t lane_bytes(const rdkv_config *rdkv, const rdkv_cuda_config *cfg,
                         const rdkv_cuda_blocks *blocks) {
  turn_memory t, m;
  const rdkv_cuda_batch none = rdkv_cuda_batch();
  if (!layout_turn(rdkv, cfg, &none, blocks, false, nullptr, &t)) return 0;
  if (blocks->fan == 0) return t.m.bytes;
  if (!layout_turn(rdkv, cfg, &none, blocks, true, nullptr, &m)) return 0;
  return t.m.bytes > m.m.bytes ? t.m.bytes : m.m.bytes;
}

} /* namespace rdkv_cuda_live_code */

extern "C" size_t rdkv_cuda_sequence_workspace(const rdkv_config *rdkv, const rdkv_cuda_config *cfg,
                                               const rdkv_cuda_blocks *blocks) {
  const size_t each = rdkv_cuda_live_code::lane_bytes(rdkv, cfg, blocks);
  return each ? each * (blocks->lanes ? blocks->lanes : 1) : 0;
}

extern "C" cudaError_t rdkv_cuda_sequence_compress(const rdkv_config *rdkv,
                                                   const rdkv_cuda_config *cfg,
                                                   const rdkv_cuda_batch *batch,
                                                   const rdkv_cuda_blocks *blocks, void *plan,
                                                   void *workspace, size_t bytes,
                                                   cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  turn_memory t[MAX_LANES], m[MAX_LANES];
  const size_t each = lane_bytes(rdkv, cfg, blocks);
  if (!batch_ok(cfg, batch) || !plan || !workspace || each == 0 ||
      bytes < rdkv_cuda_sequence_workspace(rdkv, cfg, blocks))
    return cudaErrorInvalidValue;
  const bool merge = blocks->fan > 0;
  if (merge && (rdkv->profile == RDKV_PAPER || rdkv->positions || rdkv->n_pins > 0))
    return cudaErrorNotSupported;
  for (uint32_t i = 0; i < (blocks->lanes ? blocks->lanes : 1); ++i) {
    uint8_t *own = static_cast<uint8_t *>(workspace) + i * each;
    layout_turn(rdkv, cfg, batch, blocks, false, own, &t[i]);
    if (merge) layout_turn(rdkv, cfg, batch, blocks, true, own, &m[i]);
    t[i].a.lane_bytes = m[i].a.lane_bytes = each;
  }
#if CUDART_VERSION >= 12040
  cudaStreamCaptureStatus status;
  cudaGraph_t graph;
  const cudaGraphNode_t *nodes;
  const cudaGraphEdgeData *edges;
  size_t n;
  const cudaError_t captures = capture_state(stream, &status, &graph, &nodes, &edges, &n);
  if (captures) return captures;
  if (status == cudaStreamCaptureStatusActive)
    return capture_turns(t, merge ? m : nullptr, cfg, plan, graph, stream);
#endif
  t->a.n_lanes = 1;
  pick_kernel<<<1, THREADS, 0, stream>>>(t->a);
  cudaError_t e = launch_turn(t, false, stream);
  /* what is merged may complete another `fan` */
  const uint64_t most = static_cast<uint64_t>(cfg->max_segments);
  for (uint64_t n = blocks->fan; merge && n <= most && !e; n *= blocks->fan) {
    mergeable_kernel<<<1, THREADS, 0, stream>>>(m->a);
    e = launch_turn(m, true, stream);
  }
  return e ? e : rdkv_cuda_plan(cfg, batch->sequences, batch->tail_tokens, plan, stream);
}

extern "C" cudaError_t rdkv_cuda_sequence_flush(const rdkv_config *rdkv,
                                                const rdkv_cuda_config *cfg,
                                                const rdkv_cuda_batch *batch,
                                                const rdkv_cuda_blocks *blocks, int index,
                                                void *plan, void *workspace, size_t bytes,
                                                cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  if (!batch_ok(cfg, batch) || index < 0 || index >= cfg->batch || !plan || !workspace)
    return cudaErrorInvalidValue;
  turn_memory t;
  rdkv_cuda_config one = *cfg; /* that sequence is the whole batch */
  one.batch = 1;
  const rdkv_cuda_batch own = {batch->sequences + index, batch->live + index,
                               batch->tail_tokens + index};
  if (!layout_turn(rdkv, &one, &own, blocks, false, workspace, &t) || bytes < t.m.bytes)
    return cudaErrorInvalidValue;
  rdkv_cuda_live l;
  uint32_t tokens;
  const uint32_t block = t.a.block;
  cudaError_t e = cudaMemcpyAsync(&l, own.live, sizeof l, cudaMemcpyDeviceToHost, stream);
  if (!e)
    e = cudaMemcpyAsync(&tokens, own.tail_tokens, sizeof tokens, cudaMemcpyDeviceToHost, stream);
  if (!e) e = cudaStreamSynchronize(stream);
  while (!e && tokens > 0) {
    const uint32_t n = tokens < block ? tokens : block,
                   end = tokens < 2 * block ? tokens : 2 * block;
    uint32_t first = tokens > block ? block : 0;
    if (first < l.query_begin && l.query_begin < end) first = l.query_begin; /* else an error */
    narrow(&t, n, first, end - first);
    pick_kernel<<<1, THREADS, 0, stream>>>(t.a);
    e = launch_turn(&t, false, stream);
    tokens -= n, l.query_begin = l.query_begin > n ? l.query_begin - n : 0;
  }
  return e ? e : rdkv_cuda_plan(cfg, batch->sequences, batch->tail_tokens, plan, stream);
}

extern "C" cudaError_t rdkv_cuda_sequence_rollback(const rdkv_cuda_config *cfg,
                                                   const rdkv_cuda_batch *batch,
                                                   const uint64_t *n_tokens, cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  if (!batch_ok(cfg, batch) || !n_tokens) return cudaErrorInvalidValue;
  rollback_kernel<<<static_cast<uint32_t>(cfg->batch + 31) / 32, 32, 0, stream>>>(
      args_of(cfg, batch), n_tokens);
  return cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_sequence_fork(const rdkv_cuda_config *cfg,
                                               const rdkv_cuda_batch *batch, int from, int to,
                                               cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  if (!batch_ok(cfg, batch) || from < 0 || to < 0 || from >= cfg->batch || to >= cfg->batch ||
      from == to)
    return cudaErrorInvalidValue;
  const live_args a = args_of(cfg, batch);
  fork_kernel<<<1, 1, 0, stream>>>(a, from, to);
  const dim3 grid(8, static_cast<uint32_t>(arrays_of(a)));
  fork_rows_kernel<<<grid, THREADS, 0, stream>>>(a, from, to);
  return cudaGetLastError();
}

extern "C" cudaError_t rdkv_cuda_sequence_upload(const rdkv_cuda_config *cfg,
                                                 const rdkv_sequence *from,
                                                 const rdkv_cuda_batch *batch, int index,
                                                 cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  if (!batch_ok(cfg, batch) || index < 0 || index >= cfg->batch || !same_shape(cfg, from))
    return cudaErrorInvalidValue;
  rdkv_cuda_sequence s;
  rdkv_cuda_live l;
  cudaError_t e =
      cudaMemcpyAsync(&s, batch->sequences + index, sizeof s, cudaMemcpyDeviceToHost, stream);
  if (!e) e = cudaMemcpyAsync(&l, batch->live + index, sizeof l, cudaMemcpyDeviceToHost, stream);
  if (!e) e = cudaStreamSynchronize(stream);
  if (e) return e;
  const uint32_t tokens = from->tail.n_tokens[0];
  const bool queries = from->queries.memory && l.q && l.out && l.lse;
  uint64_t used = 0;
  for (int i = 0; i < from->n_segments; ++i) used += from->segments[i].header->total_bytes;
  if (from->n_segments > cfg->max_segments || tokens > s.capacity ||
      (used > 0 && (!l.arena || used > l.arena_bytes)))
    return cudaErrorInvalidValue;
  used = 0;
  for (int i = 0; i < from->n_segments && !e; ++i) {
    const void *to = l.arena + used;
    e = rdkv_cuda_upload(&from->segments[i], l.arena + used, stream);
    if (!e) /* pageable memory: to is read before the call returns */
      e = cudaMemcpyAsync(const_cast<const void **>(s.segments) + i, &to, sizeof to,
                          cudaMemcpyHostToDevice, stream);
    used += from->segments[i].header->total_bytes;
  }
  s.n_segments = static_cast<uint32_t>(from->n_segments);
  l.arena_used = used, l.arena_shared = 0, l.tail_begin = from->tail_begin;
  l.query_begin = queries ? from->query_begin : tokens, l.status = RDKV_OK;
  if (!e)
    e = copy_rows(cfg, from, s, l, tokens, queries ? from->queries.n_tokens[0] : 0, true, stream);
  if (!e)
    e = cudaMemcpyAsync(batch->sequences + index, &s, sizeof s, cudaMemcpyHostToDevice, stream);
  if (!e) e = cudaMemcpyAsync(batch->live + index, &l, sizeof l, cudaMemcpyHostToDevice, stream);
  if (!e)
    e = cudaMemcpyAsync(batch->tail_tokens + index, &tokens, sizeof tokens, cudaMemcpyHostToDevice,
                        stream);
  const cudaError_t end = cudaStreamSynchronize(stream);
  return e ? e : end;
}

extern "C" cudaError_t rdkv_cuda_sequence_download(const rdkv_cuda_config *cfg,
                                                   const rdkv_cuda_batch *batch, int index,
                                                   rdkv_sequence *to, cudaStream_t stream) {
  using namespace rdkv_cuda_live_code;
  if (!batch_ok(cfg, batch) || index < 0 || index >= cfg->batch || !same_shape(cfg, to))
    return cudaErrorInvalidValue;
  rdkv_cuda_sequence s;
  rdkv_cuda_live l;
  uint32_t tokens;
  cudaError_t e =
      cudaMemcpyAsync(&s, batch->sequences + index, sizeof s, cudaMemcpyDeviceToHost, stream);
  if (!e) e = cudaMemcpyAsync(&l, batch->live + index, sizeof l, cudaMemcpyDeviceToHost, stream);
  if (!e)
    e = cudaMemcpyAsync(&tokens, batch->tail_tokens + index, sizeof tokens, cudaMemcpyDeviceToHost,
                        stream);
  if (!e) e = cudaStreamSynchronize(stream);
  if (e) return e;
  const bool queries = to->queries.memory && l.q && l.out && l.lse;
  const uint32_t n_queries = queries && tokens > l.query_begin ? tokens - l.query_begin : 0;
  to->n_segments = 0, to->arena_used = to->arena_shared, to->tail_begin = l.tail_begin;
  rdkv_tail_rewind(&to->tail, 0);
  if (to->queries.memory) rdkv_tail_rewind(&to->queries, 0);
  if (s.n_segments > static_cast<uint32_t>(to->max_segments) || tokens > to->tail.capacity ||
      (s.n_segments && !to->arena))
    return cudaErrorInvalidValue;
  rdkv_segment last = rdkv_segment();
  for (uint32_t i = 0; i < s.n_segments && !e; ++i) {
    const void *block;
    rdkv_header h;
    uint8_t *at = to->arena + to->arena_used;
    const size_t room = to->arena_bytes - to->arena_used;
    e = cudaMemcpyAsync(&block, s.segments + i, sizeof block, cudaMemcpyDeviceToHost, stream);
    if (!e) e = cudaStreamSynchronize(stream);
    if (!e) e = cudaMemcpyAsync(&h, block, sizeof h, cudaMemcpyDeviceToHost, stream);
    if (!e) e = cudaStreamSynchronize(stream);
    if (!e && h.total_bytes > room) e = cudaErrorInvalidValue;
    if (!e) e = cudaMemcpyAsync(at, block, h.total_bytes, cudaMemcpyDeviceToHost, stream);
    if (!e) e = cudaStreamSynchronize(stream);
    if (!e && rdkv_open(at, h.total_bytes, RDKV_MAP, &last) != RDKV_OK) e = cudaErrorInvalidValue;
    if (!e) to->segments[i] = last, to->arena_used += h.total_bytes;
  }
  to->query_begin = queries ? l.query_begin : tokens;
  if (!e) e = copy_rows(cfg, to, s, l, tokens, n_queries, false, stream);
  const cudaError_t end = cudaStreamSynchronize(stream);
  if (e || end) return e ? e : end;
  to->n_segments = static_cast<int32_t>(s.n_segments);
  for (int layer = 0; layer < to->tail.n_layers; ++layer) {
    to->tail.n_tokens[layer] = tokens;
    if (to->queries.memory) to->queries.n_tokens[layer] = n_queries;
  }
  return cudaSuccess;
}

#endif /* RDKV_CUDA_NO_COMPRESS */
#endif /* RDKV_CUDA_IMPLEMENTED */
#endif /* RDKV_CUDA_IMPLEMENTATION */
