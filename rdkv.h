/* rdkv.h - v0.1 - compress a transformer's KV cache after prefill, decode from the compressed form

   USE: in ONE C or C++ file
       #define RDKV_IMPLEMENTATION
       #include "rdkv.h"
   and in all others just
       #include "rdkv.h"
   Link with -lm. There is nothing else to build.

   PROGRAM: compress one layer to a tenth of its bytes, then attend to it.

       rdkv_config cfg = {0};                            // zero means default
       cfg.n_q_heads = 8; cfg.n_kv_heads = 2; cfg.k_dim = 128; cfg.keep = 0.10;
       if ((st = rdkv_resolve(&cfg, &cfg)) != RDKV_OK) die(rdkv_status_string(st));
       rdkv_kv kv = { rdkv_dense(k, RDKV_F32, 2, 128),   // [tokens][kv heads][dim], after RoPE
                      rdkv_dense(v, RDKV_F32, 2, 128),
                      rdkv_dense(q, RDKV_F32, 8, 128) }; // the prompt's last cfg.window queries
       rdkv_compress(&cfg, &kv, n_tokens, block, rdkv_block_bound(&cfg, n_tokens), &bytes,
                     scratch, rdkv_compress_scratch(&cfg, n_tokens));
       rdkv_segment seg;  rdkv_open(block, bytes, RDKV_VERIFY, &seg);
       rdkv_cache cache = { &seg, 1, NULL, cfg.isa };
       rdkv_attend(&cache, 0, q_now, out, NULL, work, rdkv_attend_scratch(&cfg));

   examples/minimal.c is that program in full; examples/needle.c is a whole language model around
   it.

   CONTENTS (search for the tag)
       >>types  >>config  >>score  >>allocate  >>pack  >>open  >>tail  >>attend  >>report
       >>sequence  >>file                                                               the API
       >>impl-util  >>impl-half  >>impl-kernels  >>impl-config  >>impl-score  >>impl-allocate
       >>impl-pack  >>impl-open  >>impl-tail  >>impl-attend  >>impl-report
       >>impl-sequence  >>impl-file  >>simd                                             the code

   WHAT IT COMPUTES. The error of the attention output is written as a sum over V tokens and K
   channels, each a function of the bits that the unit gets (16, 8, 4, 2 or 0). Bits go where a byte
   removes most error: one threshold (lambda) over all heads and layers, until an exact byte budget
   is spent. Method: arXiv 2605.08317 (profile RDKV_PAPER); the default, RDKV_JOINT, measures each
   unit's distortion and shares lambda over the whole model.

   WHAT IT DOES NOT DO. It does not run a model, apply RoPE, allocate memory, print, make threads or
   read files. It does not compress while you prefill with an unfinished prompt: K and V of the
   token range must be there when it is scored. GPU: see rdkv_cuda.cuh.

   GUARANTEES
     memory       no malloc; every buffer is the caller's, every size has a query, all sums are
                  checked
     errors       a status; on error no output is written (scratch may be)
     threads      no globals; a const cache may be attended from many threads, layers may be
                  appended
                  and packed concurrently
     untrusted    rdkv_open checks every offset, count and checksum before anything is used
     determinism  from the same weights the same widths and the same bytes on every instruction set
     format       version 1, little-endian, relocatable; a reader refuses versions it does not know

   BUILD SWITCHES, defined before the include
     RDKV_IMPLEMENTATION   compile the code here
     RDKV_STATIC           make every function static (a private copy)
     RDKV_ASSERT(x)        default assert(x); internal invariants only, never input
     RDKV_NO_SIMD          scalar code only
     RDKV_SELF             this file's name if you renamed it, default "rdkv.h" (the SIMD levels
                           compile one shared body, so the file includes itself)

   Licence: MIT or public domain, at the end of the file. */

#ifndef RDKV_H
#define RDKV_H

#include <stddef.h>
#include <stdint.h>

#define RDKV_VERSION 1        /* of the library, 0.1 */
#define RDKV_FORMAT_VERSION 1 /* of the packed block */

#ifdef RDKV_STATIC
#if defined(__GNUC__)
#define RDKV_API __attribute__((unused)) static
#else
#define RDKV_API static
#endif
#else
#define RDKV_API extern
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- >>types : what goes in and out ---------------------------------------------------------- */

/* Result of every call that can fail. */
typedef enum rdkv_status {
  RDKV_OK = 0,
  RDKV_ERR_ARGUMENT,  /* a null pointer, a negative count, an index out of range */
  RDKV_ERR_CONFIG,    /* a config field out of its range, or fields that contradict each other */
  RDKV_ERR_OVERFLOW,  /* a size does not fit size_t or the format's fields */
  RDKV_ERR_MEMORY,    /* a buffer is smaller than its size query says */
  RDKV_ERR_ALIGNMENT, /* a buffer is not aligned as documented */
  RDKV_ERR_NONFINITE, /* NaN, Inf or (K, V) a value outside the half range in the input */
  RDKV_ERR_BUDGET,    /* the budget is below what pins and tables alone take */
  RDKV_ERR_FULL,      /* the tail, the list of segments or the arena has no room */
  RDKV_ERR_TRUNCATED, /* fewer bytes than the block says it has */
  RDKV_ERR_FORMAT,    /* not a block, or one whose fields contradict each other */
  RDKV_ERR_VERSION,   /* a block of another format version */
  RDKV_ERR_CHECKSUM,  /* the bytes are not those that were written */
  RDKV_ERR_GONE,      /* the dense tokens to go back to have been compressed */
  RDKV_ERR_SINK       /* the caller's write function failed */
} rdkv_status;

/* One short English sentence for a status; never NULL. */
RDKV_API const char *rdkv_status_string(rdkv_status status);

typedef enum rdkv_dtype { RDKV_F32 = 0, RDKV_F16 = 1, RDKV_BF16 = 2 } rdkv_dtype;

/* A read-only [token][head][dim] array; strides count elements, dim_stride 0 means 1.
   data is aligned to its element type and is never written. */
typedef struct rdkv_tensor {
  const void *data;
  rdkv_dtype dtype;
  ptrdiff_t token_stride, head_stride, dim_stride;
} rdkv_tensor;

/* The tensor of a contiguous [token][n_heads][dim] array. */
static inline rdkv_tensor rdkv_dense(const void *data, rdkv_dtype dtype, int n_heads, int dim) {
  rdkv_tensor t;
  t.data = data, t.dtype = dtype;
  t.token_stride = (ptrdiff_t)n_heads * dim, t.head_stride = dim, t.dim_stride = 1;
  return t;
}

/* One layer's input: K after RoPE and V of the tokens to compress, and the queries (after RoPE)
   that tell which of them matter, usually those of the last tokens. */
typedef struct rdkv_kv {
  rdkv_tensor k; /* [n_tokens][n_kv_heads][k_dim] */
  rdkv_tensor v; /* [n_tokens][n_kv_heads][v_dim] */
  rdkv_tensor q; /* [min(window, n_tokens)][n_q_heads][k_dim]; row i sits at position
                    n_tokens - min(window, n_tokens) + i */
} rdkv_kv;

/* ---- >>config : one struct, zero means default ----------------------------------------------- */

typedef enum rdkv_profile {
  RDKV_JOINT = 0, /* measured distortions, K and V under one lambda (see README); the default */
  RDKV_PAPER = 1  /* the authors' published default, bit for bit (arXiv 2605.08317) */
} rdkv_profile;

/* Over what RDKV_JOINT shares one lambda. */
typedef enum rdkv_scope {
  RDKV_SCOPE_MODEL = 0, /* every layer given to one rdkv_allocate call; the default and the best */
  RDKV_SCOPE_LAYER = 1, /* each layer gets an equal part of the bytes */
  RDKV_SCOPE_HEAD = 2,  /* each kv head gets an equal part of the bytes */
  RDKV_SCOPE_LAMBDA = 3 /* config.lambda is given, bytes follow */
} rdkv_scope;

/* Instruction sets. AUTO becomes the best that this machine has when the config is resolved. */
typedef enum rdkv_isa {
  RDKV_ISA_AUTO = 0,
  RDKV_ISA_SCALAR = 1,
  RDKV_ISA_AVX2 = 2, /* with FMA and F16C */
  RDKV_ISA_AVX512 = 3,
  RDKV_ISA_NEON = 4
} rdkv_isa;

/* Why a range is pinned: for the caller's own book-keeping, not read here. */
typedef enum rdkv_pin_reason {
  RDKV_PIN_OTHER = 0,
  RDKV_PIN_SINK = 1, /* the first tokens, which many heads rest on */
  RDKV_PIN_SYSTEM = 2,
  RDKV_PIN_TOOLS = 3,
  RDKV_PIN_USER = 4
} rdkv_pin_reason;

/* Tokens [begin, end) keep at least min_bits (2, 4, 8 or 16) in every head: all of them, or the
   share of them that the head would miss most. A share is a fair floor: instructions that the last
   queries do not look at would otherwise go as a whole. Positions of the sequence: rdkv_compress
   and rdkv_stream_layer start at 0, rdkv_compress_by and blocks at their token_begin (a share is
   then of the tokens that they have of the range); rdkv_allocate counts from the range's first
   token. Ranges may overlap and may reach past the last token. Obeyed by RDKV_JOINT; an error with
   RDKV_PAPER. */
typedef struct rdkv_pin {
  uint32_t begin, end;
  int32_t min_bits;
  rdkv_pin_reason reason;
  float share; /* in [0, 1], rounded up to tokens; 0 = all */
} rdkv_pin;

/* Everything that can be chosen. Zero-initialise, set what you know, call rdkv_resolve. */
typedef struct rdkv_config {
  int32_t n_layers;     /* layers that share the budget; 0 = 1 */
  int32_t n_q_heads;    /* required; a multiple of n_kv_heads */
  int32_t n_kv_heads;   /* 0 = n_q_heads */
  int32_t k_dim;        /* required, 1..256: head dimension of Q and K */
  int32_t v_dim;        /* 1..256: head dimension of V; 0 = k_dim */
  float softmax_scale;  /* factor on q.k; 0 = 1/sqrt(k_dim) */
  rdkv_profile profile; /* 0 = RDKV_JOINT */
  rdkv_scope scope;  /* 0 = RDKV_SCOPE_MODEL; RDKV_PAPER has a budget per head whatever is said */
  rdkv_isa isa;      /* 0 = best of this machine */
  int32_t window;    /* queries that score, 1..1024; 0 = 32 */
  int32_t pool;      /* odd width of the average pooling over tokens, 1..255; 0 = 5, 1 = none */
  int32_t positions; /* 1: store each kept token's position (4 bytes a slot) */
  double keep;       /* budget as a part of the fp16 cache, in (0, 1]; 0 = 0.10 */
  uint64_t budget_bytes; /* budget for all n_layers in bytes; takes precedence over keep */
  double max_error;      /* in (0, 1): instead of a budget, the smallest cache whose predicted
                            distortion is at most this part of that of an empty one; 0 = off */
  double lambda;         /* RDKV_SCOPE_LAMBDA: distortion that a byte must save, >= 0 */
  double token_budget;   /* RDKV_PAPER: B, fp16-equivalent tokens a head;
                            0 = from budget_bytes or keep */
  double k_share;        /* RDKV_PAPER: rho, the part of the bits for K, in (0, 1); 0 = 0.5 */
  float eps_k[3];        /* RDKV_PAPER: normalised MSE at 2, 4, 8 bits; {0} = published default */
  float eps_v[3];        /* the same for V */
  const rdkv_pin *pins;  /* [n_pins], read while a call runs; NULL = none */
  int32_t n_pins;
} rdkv_config;

/* Checks a config and fills in the defaults.
   in  [1] read; out [1] written only when RDKV_OK is returned; both may be the same object.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT (null), RDKV_ERR_CONFIG (a value out of range, or an
   instruction set that this machine lacks). Every other call wants a resolved config. */
RDKV_API rdkv_status rdkv_resolve(const rdkv_config *in, rdkv_config *out);

/* 1 if this build and this machine have the instruction set, else 0. */
RDKV_API int rdkv_isa_available(rdkv_isa isa);

/* Mean quantisation errors over layers from the authors' calibration (Junkai1860/RDKV), for
   config.eps_k and config.eps_v with RDKV_PAPER: 2, 4, 8 bits. */
static const float RDKV_EPS_K_LLAMA_3_1_8B[3] = {0.14894f, 0.0062426f, 2.1757e-5f};
static const float RDKV_EPS_V_LLAMA_3_1_8B[3] = {0.31287f, 0.013986f, 4.8554e-5f};
static const float RDKV_EPS_K_MISTRAL_7B_V0_2[3] = {0.28014f, 0.011569f, 6.8658e-5f};
static const float RDKV_EPS_V_MISTRAL_7B_V0_2[3] = {0.29571f, 0.013022f, 4.5239e-5f};

/* Measures such a table on real data: squared error of fake quantisation over squared value, K per
   channel over tokens, V per token over channels, with the quantiser of RDKV_PAPER.
   cfg resolved; kv the layer's K and V (q is not read); eps_k, eps_v [3] written, for 2, 4, 8 bits.
   Average over layers and prompts yourself: the values are means.
   scratch as rdkv_layer_scratch(cfg, n_tokens).
   Returns RDKV_OK or RDKV_ERR_ARGUMENT, _MEMORY, _ALIGNMENT, _NONFINITE. */
RDKV_API rdkv_status rdkv_calibrate(const rdkv_config *cfg, const rdkv_kv *kv, uint32_t n_tokens,
                                    float eps_k[3], float eps_v[3], void *scratch,
                                    size_t scratch_bytes);

/* ---- >>score : weights of tokens and channels ------------------------------------------------ */

/* One layer between scoring and packing: weights, distortions and widths. The arrays lie in the
   caller's memory and may be read and written between calls: to bring your own weights fill token,
   q_square and mean_out and skip rdkv_score; to bring your own widths fill v_bits and k_bits
   and skip rdkv_allocate. */
typedef struct rdkv_layer {
  uint32_t n_tokens;
  float *token;    /* [n_kv_heads][n_tokens] mean attention of the window's queries (RDKV_JOINT: the
                      last ones count most), summed over the group, pooled, >= 0 */
  float *q_square; /* [n_kv_heads][k_dim] mean over queries of q^2 */
  float *k_square; /* [n_kv_heads][k_dim] mean over tokens of k^2 */
  float *mean_out; /* [n_kv_heads][v_dim] mean output of the window's attention */
  float *v_distortion; /* [n_kv_heads][5][n_tokens] at 0, 2, 4, 8, 16 bits */
  float *k_distortion; /* [n_kv_heads][4][k_dim] at 0, 2, 4, 8 bits */
  uint8_t *v_bits;     /* [n_kv_heads][n_tokens] 0, 2, 4, 8 or 16 */
  uint8_t *k_bits;     /* [n_kv_heads][k_dim] 0, 2, 4 or 8; RDKV_PAPER may say 16, stored as 8 */
  double lambda;       /* set by rdkv_allocate: the threshold that was used (RDKV_JOINT) */
} rdkv_layer;

/* Bytes of memory that a layer's arrays take; 0 if they do not fit size_t. */
RDKV_API size_t rdkv_layer_bytes(const rdkv_config *cfg, uint32_t n_tokens);

/* Lays the arrays out in mem and zeroes them.
   mem [bytes] 64-byte aligned, kept by the caller as long as layer is used.
   Returns RDKV_OK or RDKV_ERR_ARGUMENT, _MEMORY, _ALIGNMENT, _OVERFLOW. */
RDKV_API rdkv_status rdkv_layer_init(const rdkv_config *cfg, uint32_t n_tokens, void *mem,
                                     size_t bytes, rdkv_layer *layer);

/* Scratch bytes for rdkv_score, rdkv_measure, rdkv_calibrate and rdkv_pack; 0 on overflow. */
RDKV_API size_t rdkv_layer_scratch(const rdkv_config *cfg, uint32_t n_tokens);

/* Scores one layer: how much the window's queries attend to each token and use each channel.
   cfg resolved; kv as described there (V is read by RDKV_JOINT alone); layer initialised, its
   token, q_square, k_square and mean_out are written.
   scratch [scratch_bytes] 64-byte aligned, rdkv_layer_scratch bytes.
   What attention gave the queries, where that is known: rdkv_compress_by takes it.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _MEMORY, _ALIGNMENT, or _NONFINITE (then the arrays of layer
   are undefined). Threads: calls on different layers and scratch are independent.
   Source: arXiv 2605.08317 and its published code. */
RDKV_API rdkv_status rdkv_score(const rdkv_config *cfg, const rdkv_kv *kv, rdkv_layer *layer,
                                void *scratch, size_t scratch_bytes);

/* Measures the layer's distortions at each width (RDKV_JOINT; RDKV_PAPER needs none: a no-op): at 0
   bits what the data say, at 2, 4 and 8 bits an even spread of errors over the steps of the range.
   Reads layer->token, q_square, mean_out and K, V; writes v_distortion, k_distortion. K is
   measured over the tokens that v_bits keeps, or, where v_bits keeps none yet, over the tokens that
   are likely to be kept at this budget. Calling it again after rdkv_allocate refines K.
   Other things as for rdkv_score. Source: README, How it works. */
RDKV_API rdkv_status rdkv_measure(const rdkv_config *cfg, const rdkv_kv *kv, rdkv_layer *layer,
                                  void *scratch, size_t scratch_bytes);

/* ---- >>allocate : widths under a byte budget ------------------------------------------------- */

/* Scratch bytes for rdkv_allocate over n_layers layers of n_tokens; 0 on overflow. */
RDKV_API size_t rdkv_allocate_scratch(const rdkv_config *cfg, int n_layers, uint32_t n_tokens);

/* Chooses v_bits and k_bits of every layer.
   layers [n_layers] scored and measured, all of the same n_tokens; their widths and lambda are
   written (where it fails they are as before or all 0). The budget is cfg's times n_layers /
   cfg->n_layers: pass all layers at once for the model scope. RDKV_JOINT never goes over it,
   counting everything rdkv_pack stores.
   scratch [scratch_bytes] 64-byte aligned.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _MEMORY, _ALIGNMENT, _NONFINITE (a weight or distortion that
   is NaN, Inf or negative), _BUDGET (pins and tables alone are over the budget; or, RDKV_PAPER with
   budget_bytes, no token fits). Source: README, How it works; RDKV_PAPER as the
   authors' code. */
RDKV_API rdkv_status rdkv_allocate(const rdkv_config *cfg, rdkv_layer *layers, int n_layers,
                                   void *scratch, size_t scratch_bytes);

/* Slopes of the rate-distortion hulls against bytes, in bins of 1/8 octave: the mergeable summary
   from which any number of machines solve one lambda together. A plain value: zero it,
   add layers, sum bytes[] over machines, solve. 16 KiB. */
#define RDKV_HISTOGRAM_BINS 2048
typedef struct rdkv_histogram {
  uint64_t bytes[RDKV_HISTOGRAM_BINS]; /* that would be spent on steps whose slope is in the bin */
} rdkv_histogram;

/* Adds a measured layer. Returns RDKV_OK, RDKV_ERR_ARGUMENT. */
RDKV_API rdkv_status rdkv_histogram_add(const rdkv_config *cfg, const rdkv_layer *layer,
                                        rdkv_histogram *histogram);

/* dst += src. dst and src may not overlap. */
RDKV_API void rdkv_histogram_merge(rdkv_histogram *dst, const rdkv_histogram *src);

/* The smallest bin edge lambda at which the histogram spends at most budget_bytes. */
RDKV_API double rdkv_histogram_lambda(const rdkv_histogram *histogram, uint64_t budget_bytes);

/* ---- >>pack : format v1 ---------------------------------------------------------------------- */

/* Block: header, records, channel tables, positions, tiles; every part at a multiple of 128 bytes
   from the block's start. Multi-byte fields are little-endian. Unused bytes are zero. */
typedef struct rdkv_header {
  uint32_t magic;   /* 0x564b4452, "RDKV" */
  uint32_t version; /* RDKV_FORMAT_VERSION */
  uint64_t total_bytes;
  uint64_t head_bytes; /* header, records and channel tables: what must be read to open */
  uint64_t head_sum;   /* rdkv_checksum of [0, head_bytes), head_sum itself taken as 0 */
  uint64_t
      body_sum; /* the same of [head_bytes, total_bytes), words counted from the block's start */
  uint32_t first_layer, n_layers;
  uint32_t n_q_heads, n_kv_heads, k_dim, v_dim;
  uint64_t token_begin; /* position of the first token of the range */
  uint32_t n_tokens;    /* tokens of the range before compression */
  uint32_t positions;   /* 1: stored */
  /* how it was made, for the reader's information */
  uint32_t profile, scope, window, pool;
  float softmax_scale;
  float eps_k[3], eps_v[3];
  float k_share;
  double keep, max_error, lambda, token_budget;
  uint64_t budget_bytes;
  uint8_t reserved[88];
} rdkv_header; /* 256 bytes */

/* One (layer, kv head), layers outer. K channels are stored in runs of 2, 4 and 8 bits, each run
   padded to 16; tokens in runs of 2, 4, 8 and 16 V bits, each run padded to tiles of 32. */
typedef struct rdkv_record {
  uint32_t n_tokens[4];   /* real tokens in the V runs of 2, 4, 8, 16 bits */
  uint16_t n_channels[3]; /* real channels in the K runs of 2, 4, 8 bits */
  uint16_t n_dropped;     /* the other channels; the four add up to k_dim */
  uint64_t table;         /* offset of the channel table: with n the padded channels of the 3 runs,
                             half scale[n], half mid[n + n_dropped], u8 channel[n + n_dropped];
                             a pad has scale 0, mid 0, channel 0 */
  uint64_t position; /* offset of u32 position[32 * tiles], UINT32_MAX in pads; 0 if not stored */
  uint64_t tile;     /* offset of the tiles: runs of 2, 4, 8, 16 one after the other */
  float v_distortion, k_distortion; /* predicted; 0 with RDKV_PAPER */
  uint64_t reserved;
} rdkv_record; /* 64 bytes */

/* A tile is 32 tokens: [K: n2 x 128 B | n4 x 256 B | n8 x 512 B] [V parameters 128 B]
   [V: ceil(v_dim/16) x (128 | 256 | 512 | 1024) B], n2, n4, n8 the blocks of 16 channels.
   A block is 32 x 16 codes of b bits = 32 lanes x b/2 words of 32 bits, lane-major, lane = 4g + t.
   With sub, r, pr, e each 0 or 1:
     2 bit: word 0,         bit  2*(2*sub+pr) + 8*r + 16*e
     4 bit: word sub,       bit  4*pr + 8*r + 16*e
     8 bit: word 2*sub+pr,  byte 2*r + e
    16 bit (V alone): [sub][d block][lane][4 words], word r + 2*pr, half e
   K block kb holds token 16*sub + 8*r + g, channel 16*kb + 4*t + 2*pr + e (table order);
   V block db holds token 16*sub + 2*t + 8*pr + e, dim 16*db + g + 8*r.
   V parameters, at byte 16*g: 4 x half2 (scale, mid) of tokens g, g+8, g+16, g+24.
   value = mid + scale * (code - 2^(b-1)). Pads are zero and must not be attended to. */

/* Upper bound of the bytes of a block of cfg->n_layers layers: the budget where there is one. */
RDKV_API size_t rdkv_block_bound(const rdkv_config *cfg, uint32_t n_tokens);

/* Exact bytes of the block that rdkv_pack writes for these widths; 0 on overflow. */
RDKV_API size_t rdkv_block_bytes(const rdkv_config *cfg, const rdkv_layer *layers, int n_layers);

/* Quantises and packs layers whose widths are chosen.
   kv, layers [n_layers]; first_layer the model's index of layers[0]; token_begin the position of
   the first token. block [capacity] 128-byte aligned, *bytes its length; both written only on
   success.
   scratch [scratch_bytes] 64-byte aligned, rdkv_layer_scratch bytes. block must not overlap K or V.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _CONFIG (a width that does not exist), _MEMORY (capacity is
   below rdkv_block_bytes, or scratch), _ALIGNMENT, _OVERFLOW, _NONFINITE.
   Source: README, Format; RDKV_PAPER's quantiser is
   that of the authors' code. */
RDKV_API rdkv_status rdkv_pack(const rdkv_config *cfg, const rdkv_kv *kv, const rdkv_layer *layers,
                               int n_layers, int first_layer, uint64_t token_begin, void *block,
                               size_t capacity, size_t *bytes, void *scratch, size_t scratch_bytes);

/* Scratch bytes for rdkv_compress; 0 on overflow. */
RDKV_API size_t rdkv_compress_scratch(const rdkv_config *cfg, uint32_t n_tokens);

/* score, measure, allocate and pack of a whole model in one call: kv [cfg->n_layers], token_begin
   0. Other things as for rdkv_pack and rdkv_allocate; capacity rdkv_block_bound is always enough.
   */
RDKV_API rdkv_status rdkv_compress(const rdkv_config *cfg, const rdkv_kv *kv, uint32_t n_tokens,
                                   void *block, size_t capacity, size_t *bytes, void *scratch,
                                   size_t scratch_bytes);

/* Layer-by-layer compression of a prompt: call rdkv_stream_layer for layer 0, 1, ... right after
   its prefill attention, then free or overwrite its dense K and V. Lambda is solved on the layers
   seen so far and carried on; the last layer ends on the budget. What the layers to come need is
   guessed: from an earlier prompt of the model if there was one, else from the mean of those seen.
   State of one prompt: zero it, set earlier. */
typedef struct rdkv_stream {
  rdkv_histogram *earlier; /* [n_layers], the caller's, kept from prompt to prompt: slopes of each
                              layer at the last prompt. Zero before the first; read, then
                              overwritten with this prompt's layer by layer. NULL = none */
  int32_t next_layer;
  double lambda;
  uint64_t spent_bytes;                 /* of cfg's budget, all blocks so far */
  rdkv_histogram seen, seen_in_earlier; /* of layers before next_layer: this prompt, the earlier */
} rdkv_stream;

/* Scratch bytes for rdkv_stream_layer; 0 on overflow. Does not grow with cfg->n_layers. */
RDKV_API size_t rdkv_stream_scratch(const rdkv_config *cfg, uint32_t n_tokens);

/* Compresses the stream's next layer into a block of its own (first_layer = its index).
   capacity: rdkv_stream_bound(cfg, stream) is always enough. Everything else, errors too, as for
   rdkv_compress; on error the stream is as before. */
RDKV_API size_t rdkv_stream_bound(const rdkv_config *cfg, uint32_t n_tokens,
                                  const rdkv_stream *stream);
RDKV_API rdkv_status rdkv_stream_layer(const rdkv_config *cfg, rdkv_stream *stream,
                                       const rdkv_kv *kv, uint32_t n_tokens, void *block,
                                       size_t capacity, size_t *bytes, void *scratch,
                                       size_t scratch_bytes);

/* ---- >>open : a block as a segment ----------------------------------------------------------- */

/* A block that has been checked. A view: it owns nothing, and the block must outlive it. */
typedef struct rdkv_segment {
  const uint8_t *block; /* 128-byte aligned */
  const rdkv_header *header;
  const rdkv_record *records; /* [n_layers][n_kv_heads] */
} rdkv_segment;

/* How much rdkv_open reads. */
typedef enum rdkv_open_mode {
  RDKV_VERIFY = 0, /* everything, both checksums */
  RDKV_MAP = 1     /* header, records and tables alone: safe to use, codes unchecked */
} rdkv_open_mode;

/* Checks an untrusted block and gives a view of it.
   block [bytes] 128-byte aligned, not written; bytes may be larger than the block.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _ALIGNMENT, _TRUNCATED, _FORMAT, _VERSION, _CHECKSUM; segment
   is written only when RDKV_OK. After RDKV_OK no call on the segment reads outside the block. */
RDKV_API rdkv_status rdkv_open(const void *block, size_t bytes, rdkv_open_mode mode,
                               rdkv_segment *segment);

/* Checksum of the format: the sum over 8-byte words w_i (the last one filled up with zeros) of
   mix(w_i + (i + 1) * 0x9e3779b97f4a7c15), mod 2^64, mix being splitmix64's finaliser. A sum, so
   that parts can be computed in any order. data 8-byte aligned, first_word the index of its first
   word. */
RDKV_API uint64_t rdkv_checksum(const void *data, size_t bytes, uint64_t first_word);

/* The dequantised K and V of one head, in stored order, pads left out.
   layer is the model's index. k [n][k_dim] (a dropped channel is its mean), v [n][v_dim],
   position [n] (RDKV_ERR_ARGUMENT if the block has none); each may be NULL. n = the head's kept
   tokens, written to *n_tokens. Returns RDKV_OK or RDKV_ERR_ARGUMENT. */
RDKV_API rdkv_status rdkv_unpack(const rdkv_segment *segment, int layer, int kv_head, float *k,
                                 float *v, uint32_t *position, uint32_t *n_tokens);

/* ---- >>tail : new tokens, dense -------------------------------------------------------------- */

/* Tokens that are not compressed: K and V of each layer in one caller's buffer, as
   [layer][kv head][capacity][dim], K then V of each layer, in f16 (or f32, bf16). Layers count
   their tokens apart, so that they may be appended concurrently. */
typedef struct rdkv_tail {
  void *memory;
  uint32_t *n_tokens; /* [n_layers], inside memory */
  uint32_t capacity;
  rdkv_dtype dtype;
  int32_t n_layers, n_kv_heads, k_dim, v_dim;
  rdkv_isa isa;
} rdkv_tail;

/* Bytes of a tail's memory; 0 on overflow. */
RDKV_API size_t rdkv_tail_bytes(const rdkv_config *cfg, uint32_t capacity, rdkv_dtype dtype);

/* Makes an empty tail in mem [bytes], 64-byte aligned, kept by the caller as long as the tail.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _MEMORY, _ALIGNMENT, _OVERFLOW. */
RDKV_API rdkv_status rdkv_tail_init(const rdkv_config *cfg, uint32_t capacity, rdkv_dtype dtype,
                                    void *mem, size_t bytes, rdkv_tail *tail);

/* Appends n tokens to one layer: k [n][n_kv_heads][k_dim], v [n][n_kv_heads][v_dim], after RoPE.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _FULL, _NONFINITE; on error nothing is appended.
   Threads: one writer a layer; different layers concurrently. */
RDKV_API rdkv_status rdkv_tail_append(rdkv_tail *tail, int layer, rdkv_tensor k, rdkv_tensor v,
                                      uint32_t n);

/* Shortens every layer to at most n_tokens tokens: 0 resets, less rolls back. */
RDKV_API void rdkv_tail_rewind(rdkv_tail *tail, uint32_t n_tokens);

/* ---- >>attend : decode from the compressed form ---------------------------------------------- */

/* What a query attends to: the segments and the tail under one softmax. A plain value; make a copy
   to fork a sequence. Segments without the layer asked for are passed over, so a list may hold one
   block a layer (rdkv_stream_layer) as well as several token ranges. */
typedef struct rdkv_cache {
  const rdkv_segment *segments; /* [n_segments] opened, all of the same shape; may be NULL if 0 */
  int32_t n_segments;
  const rdkv_tail *tail; /* NULL = none */
  rdkv_isa isa;          /* a resolved config's, or RDKV_ISA_SCALAR */
} rdkv_cache;

/* Scratch bytes for rdkv_attend and rdkv_attend_head: some 100 KB, whatever the length. */
RDKV_API size_t rdkv_attend_scratch(const rdkv_config *cfg);

/* Attention of one layer's query heads over the cache.
   cfg resolved (shape and softmax_scale are taken from it and must match the segments);
   layer the model's index. q [n_q_heads][k_dim] f32, after RoPE. out [n_q_heads][v_dim] f32, may be
   the same memory as q. lse [n_q_heads] f32 or NULL: natural log of the sum of exp of the scaled
   logits, to merge with attention over other tokens. With nothing to attend to out is 0, lse -Inf.
   scratch [scratch_bytes] 64-byte aligned, one for each thread.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT (also shapes that do not match), _MEMORY, _ALIGNMENT.
   fp32 accumulation. Threads: any number on one const cache. */
RDKV_API rdkv_status rdkv_attend(const rdkv_config *cfg, const rdkv_cache *cache, int layer,
                                 const float *q, float *out, float *lse, void *scratch,
                                 size_t scratch_bytes);

/* The same for the query heads of one kv head, for threads over heads: q [group][k_dim],
   out [group][v_dim], lse [group] or NULL, group = n_q_heads / n_kv_heads. */
RDKV_API rdkv_status rdkv_attend_head(const rdkv_config *cfg, const rdkv_cache *cache, int layer,
                                      int kv_head, const float *q, float *out, float *lse,
                                      void *scratch, size_t scratch_bytes);

/* ---- >>report : what was spent, what it cost ------------------------------------------------- */

/* Counts over heads; bytes add up to bytes_total. */
typedef struct rdkv_report {
  uint64_t bytes_total;
  uint64_t bytes_head;                       /* header and records (0 for a single head) */
  uint64_t bytes_tables;                     /* channel tables and their padding */
  uint64_t bytes_positions;                  /* if stored */
  uint64_t bytes_k, bytes_v, bytes_v_params; /* tiles, pads included */
  uint64_t bytes_fp16;                       /* the same tokens uncompressed in fp16 */
  double ratio;                              /* bytes_total / bytes_fp16 */
  uint64_t v_tokens[5];                      /* tokens at 0, 2, 4, 8, 16 bits */
  uint64_t k_channels[4];                    /* channels at 0, 2, 4, 8 bits */
  double v_distortion, k_distortion;         /* predicted (RDKV_JOINT) */
} rdkv_report;

/* Fills a report of a segment: of one head (layer the model's index), or with layer = -1 of all.
   Returns RDKV_OK or RDKV_ERR_ARGUMENT. */
RDKV_API rdkv_status rdkv_report_segment(const rdkv_segment *segment, int layer, int kv_head,
                                         rdkv_report *report);

/* Measures what compression really did to one layer: the relative L2 distance between attention
   over the cache and attention over the dense K and V of the same tokens (fp64), for given queries
   that see all tokens. q [n_q_heads][k_dim] f32 rows, n_queries of them; *error written.
   Returns as rdkv_attend, and RDKV_ERR_NONFINITE. */
RDKV_API rdkv_status rdkv_measure_error(const rdkv_config *cfg, const rdkv_cache *cache, int layer,
                                        const rdkv_kv *kv, uint32_t n_tokens, const float *q,
                                        int n_queries, double *error, void *scratch,
                                        size_t scratch_bytes);

/* Scratch bytes for rdkv_measure_error; 0 on overflow. */
RDKV_API size_t rdkv_measure_error_scratch(const rdkv_config *cfg, uint32_t n_tokens);

/* ---- >>sequence : a cache that lives --------------------------------------------------------- */

/* Queries that say which tokens of a block matter: those of the tokens after it, or its own. Where
   out and lse are known the block is weighed against everything that the queries attended to, else
   against its own tokens alone. */
typedef struct rdkv_queries {
  rdkv_tensor q;     /* [n][n_q_heads][k_dim] after RoPE */
  rdkv_tensor out;   /* [n][n_q_heads][v_dim] what attention gave them; data NULL = not known */
  const float *lse;  /* [n][lse_stride], n_q_heads used: log-sum-exp as of rdkv_attend, or NULL */
  size_t lse_stride; /* 0 = n_q_heads */
  uint32_t n;        /* the last config.window of them are used */
  uint32_t position; /* of the first, counted from the block's first token: n_tokens if it follows
                        the block. Query i sees tokens up to position + i */
} rdkv_queries;

/* Compresses a range of tokens by given queries: a chunk of a prompt once the next chunk has been
   attended to, or a block of generated tokens. rdkv_compress is this with the range's own queries.
   kv, by [cfg->n_layers]; kv's q is not read. Every token must be seen by the last query.
   token_begin: position of the first token. Everything else as for rdkv_compress. */
RDKV_API rdkv_status rdkv_compress_by(const rdkv_config *cfg, const rdkv_kv *kv,
                                      const rdkv_queries *by, uint32_t n_tokens,
                                      uint64_t token_begin, void *block, size_t capacity,
                                      size_t *bytes, void *scratch, size_t scratch_bytes);

/* Scratch bytes for rdkv_repack of these segments; 0 on overflow or if they cannot be repacked. */
RDKV_API size_t rdkv_repack_scratch(const rdkv_config *cfg, const rdkv_segment *segments, int n);

/* Packs segments into one, without the K and V that they were made of: several into one, which
   saves headers, tables and unfilled tiles, or one into a smaller one. What they hold is weighed
   anew by given queries, as if it were all that the range's tokens had.
   segments [n], each with all cfg->n_layers layers, each from the position where the one before
   ends. by [cfg->n_layers]: queries that come after; position is not read. cfg: keep is of all the
   range's tokens. Positions are not carried over (cfg->positions: RDKV_ERR_CONFIG), neither are
   pins (n_pins: the same), nor does RDKV_PAPER repack; tokens are not pooled, for segments do not
   keep their order. block must not overlap the segments. Otherwise as rdkv_compress_by. */
RDKV_API rdkv_status rdkv_repack(const rdkv_config *cfg, const rdkv_segment *segments, int n,
                                 const rdkv_queries *by, void *block, size_t capacity,
                                 size_t *bytes, void *scratch, size_t scratch_bytes);

/* A sequence: a list of segments, then a dense tail, and what is needed to turn the tail's oldest
   tokens into further segments. Fields may be read; those marked `yours` set. */
typedef struct rdkv_sequence {
  rdkv_segment *segments; /* [max_segments] in order of position */
  int32_t n_segments, max_segments;
  uint64_t tail_begin; /* position of the tail's first token */
  rdkv_tail tail;      /* append with rdkv_tail_append */
  /* Queries of the tail's tokens, as K, and what attention gave them, as V, of n_q_heads heads;
     memory NULL = not kept (then blocks cannot be made). Row 0 is of the tail's token query_begin
     (yours: more than 0 if the tail starts with tokens whose queries you have not). */
  rdkv_tail queries;
  float *lse; /* [n_layers][capacity][lse_stride] log-sum-exp of the queries */
  uint32_t n_q_heads, lse_stride, query_begin;
  /* Yours: where blocks go, 128-byte aligned, one after the other; NULL = nowhere. Bytes before
     arena_shared are in use by forks and are never written again. */
  uint8_t *arena;
  size_t arena_bytes, arena_used, arena_shared;
} rdkv_sequence;

/* Bytes of a sequence's memory; 0 on overflow. Queries take n_q_heads (k_dim + v_dim) elements a
   token. */
RDKV_API size_t rdkv_sequence_bytes(const rdkv_config *cfg, int max_segments, uint32_t capacity,
                                    rdkv_dtype dtype, int keep_queries);

/* Makes an empty sequence.
   capacity tokens of the tail, in dtype; blocks of b tokens need 2 b, or b and those
   that are to stay dense, and room for drafts.
   mem [bytes] 64-byte aligned, kept by the caller as long as the sequence.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _MEMORY, _ALIGNMENT, _OVERFLOW. */
RDKV_API rdkv_status rdkv_sequence_init(const rdkv_config *cfg, int max_segments, uint32_t capacity,
                                        rdkv_dtype dtype, int keep_queries, void *mem, size_t bytes,
                                        rdkv_sequence *sequence);

/* What rdkv_attend takes; valid until the sequence changes. */
static inline rdkv_cache rdkv_sequence_cache(const rdkv_sequence *s) {
  rdkv_cache c;
  c.segments = s->segments, c.n_segments = s->n_segments, c.tail = &s->tail, c.isa = s->tail.isa;
  return c;
}

/* Tokens of the sequence, and so the position of the next one (as layer 0 has them). */
static inline uint64_t rdkv_sequence_tokens(const rdkv_sequence *s) {
  return s->tail_begin + s->tail.n_tokens[0];
}

/* Adds a segment, such as the compressed prompt, before the tail. With an empty tail, positions go
   on at the segment's end. Returns RDKV_OK, RDKV_ERR_ARGUMENT (another shape, or the tail holds
   tokens of its range), _FULL. */
RDKV_API rdkv_status rdkv_sequence_add(rdkv_sequence *sequence, const rdkv_segment *segment);

/* rdkv_attend for the token that was appended last, whose query, output and log-sum-exp are kept
   if the sequence keeps them. Returns as rdkv_attend, and RDKV_ERR_ARGUMENT if queries of tokens
   before are missing. Threads: one a layer. */
RDKV_API rdkv_status rdkv_sequence_attend(const rdkv_config *cfg, rdkv_sequence *sequence,
                                          int layer, const float *q, float *out, float *lse,
                                          void *scratch, size_t scratch_bytes);

/* Scratch bytes for rdkv_sequence_compress and _flush; 0 on overflow. */
RDKV_API size_t rdkv_sequence_scratch(const rdkv_config *cfg, uint32_t block);

/* Turns the tail's oldest tokens into segments in the arena, `block` tokens at a time: each block
   once the block after it is complete, whose queries score it. Call it after every token, or now
   and then. Call it when the tokens so far stand: those that may yet be taken back (drafts) are
   best appended after it.
   cfg: as for the model, with the budget of one block: keep, budget_bytes or, with
   RDKV_SCOPE_LAMBDA, the prompt's lambda (rdkv_header.lambda).
   block 1..1024, 0 = 128. recent: as many tokens at least stay dense, for what was said last is
   attended to most (bench/README.md); 0 = block, the least.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT (also layers or queries that are not equally far), _FULL (list
   or arena: nothing is lost, the block stays dense), and as rdkv_compress. On error the blocks made
   so far stay. Threads: none may use the sequence meanwhile. Source: arXiv 2605.08317. */
RDKV_API rdkv_status rdkv_sequence_compress(const rdkv_config *cfg, rdkv_sequence *sequence,
                                            uint32_t block, uint32_t recent, void *scratch,
                                            size_t scratch_bytes);

/* At the end of a turn, the whole tail: the last complete block is scored by what follows it, the
   rest by its own queries, causally. Otherwise as rdkv_sequence_compress. */
RDKV_API rdkv_status rdkv_sequence_flush(const rdkv_config *cfg, rdkv_sequence *sequence,
                                         uint32_t block, void *scratch, size_t scratch_bytes);

/* Scratch bytes for rdkv_sequence_merge; 0 on overflow or if it cannot be done. */
RDKV_API size_t rdkv_sequence_merge_scratch(const rdkv_config *cfg, const rdkv_sequence *sequence,
                                            int n);

/* Makes one segment of the last n, as rdkv_repack does, by the last cfg->window queries of the
   tail. The new one is written behind them and then moved to where they were; segments outside the
   arena, or shared with forks, stay where they are and are only left out of the list.
   Returns as rdkv_repack, RDKV_ERR_ARGUMENT (no such segments or queries), _FULL (the arena has no
   room beside the old ones); on error the sequence is as before. */
RDKV_API rdkv_status rdkv_sequence_merge(const rdkv_config *cfg, rdkv_sequence *sequence, int n,
                                         void *scratch, size_t scratch_bytes);

/* Goes back to the first n_tokens tokens: shortens the tail, or empties it and drops segments from
   the end, whose arena is free again. If no block was made since, what follows has the same bits as
   if the sequence had never gone ahead; a block made since stays compressed.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT (more tokens than there are), _GONE (n_tokens lies inside a
   segment: its tokens are no longer dense); on error nothing changes. */
RDKV_API rdkv_status rdkv_sequence_rollback(rdkv_sequence *sequence, uint64_t n_tokens);

/* Makes `fork` go on from where the sequence is: the list and the used part of the tail are copied,
   segments are shared and must outlive both. fork: initialised with room enough and the same shape
   and dtype; its arena, if any, is its own. From then on the parent keeps its arena's present bytes
   when it rolls back. Returns RDKV_OK, RDKV_ERR_ARGUMENT, _FULL; on error nothing changes. */
RDKV_API rdkv_status rdkv_sequence_fork(rdkv_sequence *sequence, rdkv_sequence *fork);

/* ---- >>file : save and load ------------------------------------------------------------------ */

/* A saved sequence: head, segments as they are in memory, tail. Segments start at multiples of 128
   bytes, so that a mapped file is attended to where it lies. Little-endian; every byte is under a
   checksum. Head: this, then an rdkv_file_entry for each segment, zeros up to a multiple of 128.
   Tail: [layer][K, V][kv head][n_tail][dim padded to 16], the same of the queries (q as K, out as
   V, n_q_heads heads), f32 lse [layer][n_queries][n_q_heads padded to 2], zeros up to 128. */
typedef struct rdkv_file {
  uint32_t magic;       /* 0x534b4452, "RDKS" */
  uint32_t version;     /* RDKV_FILE_VERSION */
  uint64_t total_bytes; /* of the file */
  uint64_t head_bytes;
  uint64_t head_sum; /* rdkv_checksum of [0, head_bytes), head_sum itself taken as 0 */
  uint64_t tail;     /* offset; everything from here on is the tail */
  uint64_t tail_sum; /* of [tail, total_bytes), words counted from the file's start */
  uint64_t tail_begin;
  uint32_t n_segments, n_layers, n_q_heads, n_kv_heads, k_dim, v_dim;
  uint32_t n_tail, tail_dtype; /* dense tokens, and their rdkv_dtype */
  uint32_t n_queries, query_begin;
  uint8_t reserved[32];
} rdkv_file; /* 128 bytes */
#define RDKV_FILE_VERSION 1

typedef struct rdkv_file_entry {
  uint64_t offset, bytes;      /* of the segment, in the file */
  uint64_t head_sum, body_sum; /* as in its header */
} rdkv_file_entry;             /* 32 bytes */

/* Takes the next bytes of a file; returns 0, or anything else to stop (RDKV_ERR_SINK). */
typedef int rdkv_write(void *user, const void *data, size_t bytes);

/* Bytes of the sequence as a file; 0 if it cannot be saved. */
RDKV_API uint64_t rdkv_save_bytes(const rdkv_sequence *sequence);

/* Writes a sequence, whose layers must be equally far, in pieces: a segment is one piece.
   A prefix to share is a sequence with an empty tail.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _SINK (what was written so far is not a file). */
RDKV_API rdkv_status rdkv_save(const rdkv_sequence *sequence, rdkv_write *write, void *user);

/* Checks the head of an untrusted file and copies its fixed part, to learn the shape and the
   room that rdkv_load needs. file [bytes] 128-byte aligned; bytes must be those of the file.
   Returns RDKV_OK, RDKV_ERR_ARGUMENT, _ALIGNMENT, _TRUNCATED, _FORMAT (also a machine of the other
   byte order, and bytes after the end), _VERSION, _CHECKSUM; *head is written only when RDKV_OK. */
RDKV_API rdkv_status rdkv_file_head(const void *file, size_t bytes, rdkv_file *head);

/* Opens a saved sequence in memory, such as a mapped file. Segments stay where they are: the file
   must outlive the sequence, and is not written. Tail and queries are copied; queries are left out
   if the sequence does not keep them.
   cfg resolved, of the file's shape. mode: RDKV_VERIFY reads everything and finds any change of
   any byte; RDKV_MAP reads the head, the segments' heads and the tail: safe to use, codes
   unchecked. sequence: initialised, empty. Returns as rdkv_file_head, and RDKV_ERR_CONFIG (the file
   has another shape), _FULL (room for segments or tokens is missing), _NONFINITE; on error the
   sequence stays empty. */
RDKV_API rdkv_status rdkv_load(const rdkv_config *cfg, const void *file, size_t bytes,
                               rdkv_open_mode mode, rdkv_sequence *sequence);

#ifdef __cplusplus
}
#endif
#endif /* RDKV_H */

/* ==== end of API: you can stop reading here =================================================== */

#if defined(RDKV_IMPLEMENTATION) && !defined(RDKV__SIMD_BODY)
#ifndef RDKV_IMPLEMENTED
#define RDKV_IMPLEMENTED

#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>

#ifndef RDKV_ASSERT
#define RDKV_ASSERT(x) assert(x)
#endif
#ifndef RDKV_SELF
#define RDKV_SELF "rdkv.h"
#endif

#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__)
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rdkv: format v1 is little-endian and so must the machine be"
#endif
#elif !defined(_WIN32)
#error "rdkv: cannot tell that this machine is little-endian"
#endif

#if defined(RDKV_STATIC)
#define RDKV_DEF static
#else
#define RDKV_DEF
#endif

#if !defined(RDKV_NO_SIMD) && (defined(__x86_64__) || defined(_M_X64))
#define RDKV__X86 1
#include <immintrin.h>
#else
#define RDKV__X86 0
#endif
#if !defined(RDKV_NO_SIMD) && (defined(__aarch64__) || defined(_M_ARM64))
#define RDKV__ARM 1
#include <arm_neon.h>
#else
#define RDKV__ARM 0
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- >>impl-util : sizes, rounding, tests on bits -------------------------------------------- */

#define RDKV__MAGIC 0x564b4452u
#define RDKV__TILE 32       /* tokens of a tile */
#define RDKV__MAX_DIM 256   /* as config says */
#define RDKV__MAX_BLOCKS 19 /* K blocks of a head: 16 and a partly filled one for each run */
#define RDKV__PACKED (16 * RDKV__MAX_BLOCKS)
#define RDKV__MAX_TOKENS 0x7fffffffu
#define RDKV__MAX_WINDOW 1024 /* as config says */
#define RDKV__HEADS 4 /* query heads that go through a cache together: their sums fit registers */
#define RDKV__BATCH 8 /* tiles that share one step of the softmax */
#define RDKV__SLOTS (RDKV__BATCH * RDKV__TILE)
#define RDKV__COEF_V (8 * RDKV__HEADS * 16) /* V coefficients of a tile */
#define RDKV__CHUNK 256                     /* tokens whose slopes are computed at a time */
#define RDKV__ROWS 96             /* rows scored at a time: a multiple of the micro-kernel's 6 */
#define RDKV__MAX_HALF 0x477fe000 /* bits of 65504.0f, the largest half */

typedef char rdkv__header_is_256_bytes[sizeof(rdkv_header) == 256 ? 1 : -1];
typedef char rdkv__record_is_64_bytes[sizeof(rdkv_record) == 64 ? 1 : -1];

static const int rdkv__v_width[5] = {0, 2, 4, 8, 16};

/* Level of a width: 0, 1, 2, 3, 4 for 0, 2, 4, 8, 16 bits; -1 if there is no such width. */
static int rdkv__level(int bits) {
  switch (bits) {
    case 0:
      return 0;
    case 2:
      return 1;
    case 4:
      return 2;
    case 8:
      return 3;
    case 16:
      return 4;
    default:
      return -1;
  }
}

/* Saturating sums and products: a size that does not fit ends as UINT64_MAX and is refused once. */
static uint64_t rdkv__add(uint64_t a, uint64_t b) {
  return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}
static uint64_t rdkv__mul(uint64_t a, uint64_t b) {
  return b && a > UINT64_MAX / b ? UINT64_MAX : a * b;
}
static uint64_t rdkv__round_up(uint64_t a, uint64_t to) {
  return rdkv__add(a, to - 1) == UINT64_MAX ? UINT64_MAX : (a + to - 1) / to * to;
}
/* 0 where the size does not fit an object. */
static size_t rdkv__size(uint64_t a) { return a > (uint64_t)PTRDIFF_MAX ? 0 : (size_t)a; }
static int rdkv__pad16(int n) { return (n + 15) & ~15; }
static uint32_t rdkv__min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
static uint32_t rdkv__max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }
static int rdkv__aligned(const void *p, size_t to) { return (uintptr_t)p % to == 0; }

static uint32_t rdkv__bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
static float rdkv__float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

/* x rounded to float here and now: no fused multiply-add across it, no excess precision, no
   reassociation. What decides a width or a code goes through it, so that all builds agree. */
#if defined(__GNUC__) && defined(__SSE_MATH__)
static float rdkv__f(float x) {
  __asm__("" : "+x"(x));
  return x;
}
#elif defined(__GNUC__) && defined(__aarch64__)
static float rdkv__f(float x) {
  __asm__("" : "+w"(x));
  return x;
}
#else
static float rdkv__f(float x) {
  volatile float y = x;
  return y;
}
#endif

/* A part of caller's scratch; 64-byte aligned pieces are taken from the front. */
typedef struct rdkv__arena {
  uint8_t *next;
  size_t left;
} rdkv__arena;

/* Adds the piece's bytes to a size query (arena NULL), or takes the piece. */
static void *rdkv__take(rdkv__arena *arena, uint64_t *bytes, uint64_t count, size_t each) {
  uint64_t n = rdkv__round_up(rdkv__mul(count, each), 64);
  void *piece = NULL;
  if (bytes) *bytes = rdkv__add(*bytes, n);
  if (arena) {
    RDKV_ASSERT(n <= arena->left);
    piece = arena->next;
    arena->next += n, arena->left -= (size_t)n;
  }
  return piece;
}

/* The checks that every call with scratch makes. */
static rdkv_status rdkv__scratch(void *scratch, size_t bytes, size_t need, rdkv__arena *arena) {
  if (need == 0) return RDKV_ERR_OVERFLOW;
  if (scratch == NULL) return RDKV_ERR_ARGUMENT;
  if (!rdkv__aligned(scratch, 64)) return RDKV_ERR_ALIGNMENT;
  if (bytes < need) return RDKV_ERR_MEMORY;
  arena->next = (uint8_t *)scratch, arena->left = bytes;
  return RDKV_OK;
}

RDKV_DEF const char *rdkv_status_string(rdkv_status status) {
  switch (status) {
    case RDKV_OK:
      return "ok";
    case RDKV_ERR_ARGUMENT:
      return "a null pointer, a bad count or an index out of range";
    case RDKV_ERR_CONFIG:
      return "a config field is out of its range or contradicts another";
    case RDKV_ERR_OVERFLOW:
      return "a size does not fit";
    case RDKV_ERR_MEMORY:
      return "a buffer is smaller than its size query says";
    case RDKV_ERR_ALIGNMENT:
      return "a buffer is not aligned as documented";
    case RDKV_ERR_NONFINITE:
      return "NaN, Inf or a value outside the half range in the input";
    case RDKV_ERR_BUDGET:
      return "the budget is below what must be stored";
    case RDKV_ERR_FULL:
      return "the tail, the list of segments or the arena has no room";
    case RDKV_ERR_TRUNCATED:
      return "fewer bytes than the block says it has";
    case RDKV_ERR_FORMAT:
      return "not a block, or its fields contradict each other";
    case RDKV_ERR_VERSION:
      return "a block of another format version";
    case RDKV_ERR_CHECKSUM:
      return "the block's bytes are not those that were written";
    case RDKV_ERR_GONE:
      return "the dense tokens to go back to have been compressed";
    case RDKV_ERR_SINK:
      return "the caller's write function failed";
  }
  return "unknown status";
}

/* ---- >>impl-half : fp16 and bf16 by integer arithmetic --------------------------------------- */

static float rdkv__from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 0x3ff;
  if (exp == 31) return rdkv__float(sign | 0x7f800000 | man << 13);
  if (exp == 0) { /* zero or subnormal: man * 2^-24, exact in float */
    float x = (float)man * 5.9604644775390625e-8f;
    return rdkv__float(rdkv__bits(x) | sign);
  }
  return rdkv__float(sign | (exp + 112) << 23 | man << 13);
}

/* Nearest half, ties to even; beyond the range Inf. */
static uint16_t rdkv__to_half(float x) {
  uint32_t u = rdkv__bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff, shift, man, half;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and up round to Inf */
  if (a >= 0x38800000) {                                 /* normal: at least 2^-14 */
    a += 0xfff + ((a >> 13) & 1);
    return (uint16_t)(sign | (a - 0x38000000) >> 13);
  }
  if (a < 0x33000000) return (uint16_t)sign; /* below 2^-25 */
  man = (a & 0x7fffff) | 0x800000, shift = 126 - (a >> 23);
  half = man >> shift;
  man &= (1u << shift) - 1;
  if (man > 1u << (shift - 1) || (man == 1u << (shift - 1) && (half & 1))) half++;
  return (uint16_t)(sign | half);
}

/* Smallest half that is not below x; 0 <= x <= 65504. */
static uint16_t rdkv__to_half_up(float x) {
  uint16_t h = rdkv__to_half(x);
  return rdkv__from_half(h) < x ? (uint16_t)(h + 1) : h;
}

static uint16_t rdkv__to_bf16(float x) {
  uint32_t u = rdkv__bits(x);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static float rdkv__element(const void *p, rdkv_dtype type, ptrdiff_t i) {
  switch (type) {
    case RDKV_F16:
      return rdkv__from_half(((const uint16_t *)p)[i]);
    case RDKV_BF16:
      return rdkv__float((uint32_t)((const uint16_t *)p)[i] << 16);
    case RDKV_F32:
      break;
  }
  return ((const float *)p)[i];
}

static const void *rdkv__at(const rdkv_tensor *t, uint32_t token, int head) {
  ptrdiff_t i = (ptrdiff_t)token * t->token_stride + (ptrdiff_t)head * t->head_stride;
  return (const char *)t->data + i * (t->dtype == RDKV_F32 ? 4 : 2);
}

static int rdkv__tensor_ok(const rdkv_tensor *t) {
  if (t->data == NULL || (unsigned)t->dtype > RDKV_BF16) return 0;
  return rdkv__aligned(t->data, t->dtype == RDKV_F32 ? 4 : 2);
}

/* ---- >>impl-kernels : what is compiled once for each instruction set ------------------------- */

/* A quantiser of one group: value = mid + scale * code, code in -2^(b-1) .. 2^(b-1)-1. */
typedef struct rdkv__affine {
  float scale, mid, inv; /* scale and mid are exact halves; inv = 1 / scale, 0 where scale is 0 */
} rdkv__affine;

/* Scale and mid for values in [lo, hi]: mid is rounded to a half first, and scale is then the
   smallest half with which both ends are in range, so nothing saturates. */
static rdkv__affine rdkv__fit(float lo, float hi, int bits) {
  float n = (float)(1 << (bits - 1)), up, down;
  rdkv__affine a;
  float step = rdkv__f(rdkv__f(hi - lo) / (2 * n - 1));
  a.mid = rdkv__from_half(rdkv__to_half(rdkv__f(lo + rdkv__f(step * n))));
  up = rdkv__f(rdkv__f(hi - a.mid) / (n - 1));
  down = rdkv__f(rdkv__f(a.mid - lo) / n);
  a.scale = rdkv__from_half(rdkv__to_half_up(up > down ? up : (down > 0 ? down : 0)));
  a.inv = a.scale > 0 ? rdkv__f(1 / a.scale) : 0;
  return a;
}

/* One instruction set. Buffers called padded have room for, and where read zeros up to, the next
   multiple of 16. Everything that decides widths or codes is the same to the bit on every set:
   sums run in 16 lanes (element i in lane i mod 16), products are rounded before they are added
   unless they are exact. */
typedef struct rdkv__kernels {
  /* dst [n padded] = one row as float, pads 0; the largest |bits|, to test for NaN and range */
  uint32_t (*row)(const void *src, rdkv_dtype type, ptrdiff_t stride, int n, float *dst);
  /* out[r][i] = sum over d of rows[r][d] * qt[d][i]; nq a multiple of 16 */
  void (*logits)(const float *qt, size_t nq, const float *rows, size_t stride, int n_rows, int dim,
                 float *out);
  /* running maximum and sum of exp of nq columns */
  void (*softmax)(const float *logits, int n_rows, size_t nq, float *max, float *sum);
  /* per row: sum over columns of exp(logit - max) * inv */
  void (*weigh)(const float *logits, int n_rows, size_t nq, const float *max, const float *inv,
                float *sum);
  /* y += a * x; n a multiple of 16 */
  void (*axpy)(float a, const float *x, int n, float *y);
  /* smallest and largest of x [n], n > 0 */
  void (*ends)(const float *x, int n, float *lo, float *hi);
  /* squared distance of v [n] from o, or, NULL, from v rounded to halves */
  float (*distance)(const float *v, const float *o, int n);
  /* slopes [4][CHUNK] of n tokens' hulls, n a multiple of 16 */
  void (*hull)(const float *d, size_t stride, int n, const float *inv, float *slope);
  /* running minimum, maximum and sum of n channels; n a multiple of 16 */
  void (*range)(const float *x, int n, float *lo, float *hi, float *sum);
  /* smallest and largest of n channels, and with u = x - o the sums [3][256] of u, g u and g u^2;
     n a multiple of 16 */
  void (*moments)(const float *x, const float *o, int n, float g, float *lo, float *hi, float *sum);
  /* codes of x [n], n a multiple of 16: round((x - mid) * inv), clamped to lo..hi, minus lo */
  void (*quantise)(const float *x, int n, const float *mid, const float *inv, const float *lo,
                   const float *hi, uint8_t *code);
  /* the same with one mid, inv, lo and hi for all */
  void (*quantise_one)(const float *x, int n, const float *mid, const float *inv, const float *lo,
                       const float *hi, uint8_t *code);
  /* n halves as floats, n a multiple of 16 */
  void (*halves)(const uint16_t *h, int n, float *x);
  /* attend, for up to 4 query heads: see the code */
  float (*k_coef)(int level, int n_blocks, const uint8_t *channel, const float *scale,
                  const float *mid, const float *q, float *to, int next);
  void (*k_codes)(int level, const uint32_t *words, int n_blocks, const float *coef, int n_heads,
                  float *logits, float *work, int add);
  void (*v_coef)(int level, const uint32_t *params, const float *p, int n_heads, float *coef,
                 float *rest);
  void (*v_codes)(int level, const uint32_t *tiles, size_t tile_words, int n_tiles, int n_blocks,
                  const float *coef, int n_heads, float *acc, size_t head_stride, int first);
  void (*v_fold)(int level, const float *acc, int n_blocks, float *out);
  float (*max)(const float *x, int n);
  void (*exp_sum)(const float *logits, float max, float *p, int n, float *sum);
  void (*scale)(float *x, int n, float by);
  void (*k_dense)(const void *rows, rdkv_dtype type, int n_rows, int dim, const float *q,
                  int n_heads, float *logits);
  void (*v_dense)(const void *rows, rdkv_dtype type, int n_rows, int dim, const float *p,
                  int n_heads, float *out, size_t head_stride);
} rdkv__kernels;

/* The sum of 16 lanes in one fixed order: 8 and 8, which two threads of a GPU have, then both. */
static float rdkv__lanes(const float *a) {
  float s[16];
  int i, n;
  for (i = 0; i < 16; i++) s[i] = a[i];
  for (n = 4; n > 0; n >>= 1)
    for (i = 0; i < n; i++) {
      s[i] = rdkv__f(s[i] + s[i + n]);
      s[8 + i] = rdkv__f(s[8 + i] + s[8 + i + n]);
    }
  return rdkv__f(s[0] + s[8]);
}

/* Squared error of one of n values spread over a range, as a part of the range squared: codes are
   steps of range / (2^b - 1) apart, and an error is anything up to half a step, all alike. What
   the ends are sure to be costs nothing. */
static float rdkv__noise(int n, int bits) {
  float steps = (float)((1 << bits) - 1);
  return (float)n / (12 * steps * steps);
}

/* Sums over tokens run over those of 64 positions, then twice over 8 such sums, then over all of
   these, so that a GPU can work on many at once. n sums at each of the four levels, step floats
   apart. Between token t and the next one (UINT32_MAX: there is none) what is complete goes up a
   level. */
static void rdkv__carry(float *sum, size_t step, int n, uint32_t t, uint32_t next) {
  int i, level;
  for (level = 0; level < 3 && t >> (6 + 3 * level) != next >> (6 + 3 * level); level++)
    for (i = 0; i < n; i++) {
      float *from = sum + (size_t)level * step + i;
      from[step] += *from, *from = 0;
    }
}

/* Channel of a K block that word i (mod 16) holds, for each coefficient: 4 at 2 and 4 bits (k = 2
   pr + e), 2 at 8 bits (k = e). */
static const int32_t rdkv__k_slot[10][16] = {
    {0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12},
    {1, 5, 9, 13, 1, 5, 9, 13, 1, 5, 9, 13, 1, 5, 9, 13},
    {2, 6, 10, 14, 2, 6, 10, 14, 2, 6, 10, 14, 2, 6, 10, 14},
    {3, 7, 11, 15, 3, 7, 11, 15, 3, 7, 11, 15, 3, 7, 11, 15},
    {0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12},
    {1, 1, 5, 5, 9, 9, 13, 13, 1, 1, 5, 5, 9, 9, 13, 13},
    {2, 2, 6, 6, 10, 10, 14, 14, 2, 2, 6, 6, 10, 10, 14, 14},
    {3, 3, 7, 7, 11, 11, 15, 15, 3, 3, 7, 7, 11, 11, 15, 15},
    {0, 2, 0, 2, 4, 6, 4, 6, 8, 10, 8, 10, 12, 14, 12, 14},
    {1, 3, 1, 3, 5, 7, 5, 7, 9, 11, 9, 11, 13, 15, 13, 15}};
static const uint8_t rdkv__k_first[5] = {0, 0, 4, 8, 10}; /* rows of level 1.. */

/* Slot of the token that multiplies word j (mod 16) of a V block, for each coefficient: 8 at 2
   bits, 4 at 4, 2 at 8, 4 at 16. Slot 4g + k is token g + 8k of the tile. */
static const int32_t rdkv__v_slot[18][16] = {
    {0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24},
    {4, 12, 20, 28, 4, 12, 20, 28, 4, 12, 20, 28, 4, 12, 20, 28},
    {1, 9, 17, 25, 1, 9, 17, 25, 1, 9, 17, 25, 1, 9, 17, 25},
    {5, 13, 21, 29, 5, 13, 21, 29, 5, 13, 21, 29, 5, 13, 21, 29},
    {2, 10, 18, 26, 2, 10, 18, 26, 2, 10, 18, 26, 2, 10, 18, 26},
    {6, 14, 22, 30, 6, 14, 22, 30, 6, 14, 22, 30, 6, 14, 22, 30},
    {3, 11, 19, 27, 3, 11, 19, 27, 3, 11, 19, 27, 3, 11, 19, 27},
    {7, 15, 23, 31, 7, 15, 23, 31, 7, 15, 23, 31, 7, 15, 23, 31},
    {0, 2, 8, 10, 16, 18, 24, 26, 0, 2, 8, 10, 16, 18, 24, 26},
    {4, 6, 12, 14, 20, 22, 28, 30, 4, 6, 12, 14, 20, 22, 28, 30},
    {1, 3, 9, 11, 17, 19, 25, 27, 1, 3, 9, 11, 17, 19, 25, 27},
    {5, 7, 13, 15, 21, 23, 29, 31, 5, 7, 13, 15, 21, 23, 29, 31},
    {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
    {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31},
    {0, 0, 1, 1, 8, 8, 9, 9, 16, 16, 17, 17, 24, 24, 25, 25},
    {4, 4, 5, 5, 12, 12, 13, 13, 20, 20, 21, 21, 28, 28, 29, 29},
    {2, 2, 3, 3, 10, 10, 11, 11, 18, 18, 19, 19, 26, 26, 27, 27},
    {6, 6, 7, 7, 14, 14, 15, 15, 22, 22, 23, 23, 30, 30, 31, 31}};
static const uint32_t rdkv__top_bits[4] = {0, 0xaaaaaaaa, 0x88888888, 0x80808080};
static const float rdkv__code_unit[4] = {0, 1, 1, 5.9604644775390625e-8f}; /* 2^-24 at 8 bits */
static const uint8_t rdkv__v_first[6] = {0, 0, 8, 12, 14, 18};             /* rows of level 1.. */

#define RDKV__SIMD_BODY 1 /* RDKV_ISA_SCALAR */
#include RDKV_SELF
#undef RDKV__SIMD_BODY
#if RDKV__X86
#define RDKV__SIMD_BODY 2 /* RDKV_ISA_AVX2 */
#include RDKV_SELF
#undef RDKV__SIMD_BODY
#if defined(__GNUC__) && !defined(__clang__) /* flaws of gcc's own intrinsics */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif
#define RDKV__SIMD_BODY 3 /* RDKV_ISA_AVX512 */
#include RDKV_SELF
#undef RDKV__SIMD_BODY
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
#if RDKV__ARM
#define RDKV__SIMD_BODY 4 /* RDKV_ISA_NEON */
#include RDKV_SELF
#undef RDKV__SIMD_BODY
#endif

RDKV_DEF int rdkv_isa_available(rdkv_isa isa) {
  if (isa == RDKV_ISA_SCALAR) return 1;
#if RDKV__X86 && defined(__GNUC__)
  __builtin_cpu_init();
  /* every CPU with AVX2 has F16C */
  if (isa == RDKV_ISA_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == RDKV_ISA_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif RDKV__X86 /* other compilers: what the build is allowed to use */
#if defined(__AVX2__)
  if (isa == RDKV_ISA_AVX2) return 1;
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
  if (isa == RDKV_ISA_AVX512) return 1;
#endif
#endif
#if RDKV__ARM
  if (isa == RDKV_ISA_NEON) return 1;
#endif
  return 0;
}

static const rdkv__kernels *rdkv__kernels_of(rdkv_isa isa) {
  switch (isa) {
#if RDKV__X86
    case RDKV_ISA_AVX2:
      return &rdkv__kernels_avx2;
    case RDKV_ISA_AVX512:
      return &rdkv__kernels_avx512;
#endif
#if RDKV__ARM
    case RDKV_ISA_NEON:
      return &rdkv__kernels_neon;
#endif
    default:
      return &rdkv__kernels_scalar;
  }
}

/* ---- >>impl-config --------------------------------------------------------------------------- */

/* 1 if lo <= x <= hi, on bits of a double, so that NaN is refused under -ffast-math too; lo >= 0 */
static int rdkv__within(double x, double lo, double hi) {
  uint64_t u;
  memcpy(&u, &x, 8);
  if (u == 0x8000000000000000u) u = 0; /* -0 */
  return u < 0x7ff0000000000000u && x >= lo && x <= hi;
}

/* x == 0 on bits: under -ffast-math a NaN may compare equal to 0 */
static int rdkv__zero(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u << 1 == 0;
}

RDKV_DEF rdkv_status rdkv_resolve(const rdkv_config *in, rdkv_config *out) {
  /* means over models, by the authors */
  static const float eps_k[3] = {0.277f, 0.011f, 6.1e-5f}, eps_v[3] = {0.312f, 0.0138f, 4.8e-5f};
  rdkv_config c;
  int i, isa;
  if (in == NULL || out == NULL) return RDKV_ERR_ARGUMENT;
  c = *in;
  if (c.n_layers == 0) c.n_layers = 1;
  if (c.n_kv_heads == 0) c.n_kv_heads = c.n_q_heads;
  if (c.v_dim == 0) c.v_dim = c.k_dim;
  if (c.window == 0) c.window = 32;
  if (c.pool == 0) c.pool = 5;
  if (c.n_layers < 1 || c.n_layers > 65535 || c.n_q_heads < 1 || c.n_q_heads > 65535 ||
      c.n_kv_heads < 1 || c.n_kv_heads > c.n_q_heads || c.n_q_heads % c.n_kv_heads != 0 ||
      c.k_dim < 1 || c.k_dim > RDKV__MAX_DIM || c.v_dim < 1 || c.v_dim > RDKV__MAX_DIM ||
      c.window < 1 || c.window > RDKV__MAX_WINDOW || c.pool < 1 || c.pool > 255 ||
      c.pool % 2 == 0 || (unsigned)c.profile > RDKV_PAPER ||
      (unsigned)c.scope > RDKV_SCOPE_LAMBDA || (unsigned)c.positions > 1)
    return RDKV_ERR_CONFIG;
  if (rdkv__zero((double)c.softmax_scale)) c.softmax_scale = (float)(1 / sqrt((double)c.k_dim));
  if (rdkv__zero(c.keep)) c.keep = 0.10;
  if (rdkv__zero(c.k_share)) c.k_share = 0.5;
  for (i = 0; i < 3; i++) {
    if (in->eps_k[0] == 0 && in->eps_k[1] == 0 && in->eps_k[2] == 0) c.eps_k[i] = eps_k[i];
    if (in->eps_v[0] == 0 && in->eps_v[1] == 0 && in->eps_v[2] == 0) c.eps_v[i] = eps_v[i];
    if (!rdkv__within((double)c.eps_k[i], 0, 1) || !rdkv__within((double)c.eps_v[i], 0, 1))
      return RDKV_ERR_CONFIG;
  }
  /* the scale's ceiling keeps logits of values in the half range finite */
  if (!rdkv__within((double)c.softmax_scale, 1e-6, 1e6) || !rdkv__within(c.keep, 1e-9, 1) ||
      !rdkv__within(c.k_share, 1e-6, 1 - 1e-6) || !rdkv__within(c.max_error, 0, 1 - 1e-9) ||
      !rdkv__within(c.lambda, 0, 1e300) || !rdkv__within(c.token_budget, 0, 1e12))
    return RDKV_ERR_CONFIG;
  if (c.n_pins < 0 || (c.n_pins > 0 && c.pins == NULL)) return RDKV_ERR_CONFIG;
  for (i = 0; i < c.n_pins; i++)
    if (rdkv__level(c.pins[i].min_bits) < 1 || c.pins[i].begin > c.pins[i].end ||
        !rdkv__within((double)c.pins[i].share, 0, 1))
      return RDKV_ERR_CONFIG;
  if (c.profile == RDKV_PAPER && (c.n_pins > 0 || c.max_error > 0)) return RDKV_ERR_CONFIG;
  if (c.profile != RDKV_PAPER && c.token_budget > 0) return RDKV_ERR_CONFIG;
  if (c.scope == RDKV_SCOPE_LAMBDA && c.max_error > 0) return RDKV_ERR_CONFIG;
  if (c.isa == RDKV_ISA_AUTO) {
    for (isa = RDKV_ISA_NEON; isa > RDKV_ISA_SCALAR; isa--)
      if (rdkv_isa_available((rdkv_isa)isa)) break;
    c.isa = (rdkv_isa)isa;
  } else if ((unsigned)c.isa > RDKV_ISA_NEON || !rdkv_isa_available(c.isa)) {
    return RDKV_ERR_CONFIG;
  }
  *out = c;
  return RDKV_OK;
}

/* ---- >>impl-score : weights of tokens and channels ------------------------------------------- */

/* A config that rdkv_resolve has not seen has zeroes where resolved ones have none. */
static int rdkv__resolved(const rdkv_config *c) {
  return c && c->n_layers > 0 && c->n_kv_heads > 0 && c->k_dim > 0 && c->v_dim > 0 &&
         c->window > 0 && c->isa != RDKV_ISA_AUTO;
}

/* Takes a layer's arrays from an arena, or counts their bytes. */
static uint64_t rdkv__layer_layout(const rdkv_config *cfg, uint32_t n_tokens, rdkv__arena *arena,
                                   rdkv_layer *l) {
  uint64_t bytes = 0, h = (uint64_t)cfg->n_kv_heads, t = rdkv__mul(h, n_tokens);
  uint64_t kd = h * (uint64_t)cfg->k_dim, vd = h * (uint64_t)cfg->v_dim;
  l->token = (float *)rdkv__take(arena, &bytes, t, 4);
  l->q_square = (float *)rdkv__take(arena, &bytes, kd, 4);
  l->k_square = (float *)rdkv__take(arena, &bytes, kd, 4);
  l->mean_out = (float *)rdkv__take(arena, &bytes, vd, 4);
  l->v_distortion = (float *)rdkv__take(arena, &bytes, rdkv__mul(t, 5), 4);
  l->k_distortion = (float *)rdkv__take(arena, &bytes, kd * 4, 4);
  l->v_bits = (uint8_t *)rdkv__take(arena, &bytes, t, 1);
  l->k_bits = (uint8_t *)rdkv__take(arena, &bytes, kd, 1);
  return bytes;
}

RDKV_DEF size_t rdkv_layer_bytes(const rdkv_config *cfg, uint32_t n_tokens) {
  rdkv_layer l;
  if (!rdkv__resolved(cfg) || n_tokens > RDKV__MAX_TOKENS) return 0;
  return rdkv__size(rdkv__layer_layout(cfg, n_tokens, NULL, &l));
}

RDKV_DEF rdkv_status rdkv_layer_init(const rdkv_config *cfg, uint32_t n_tokens, void *mem,
                                     size_t bytes, rdkv_layer *layer) {
  rdkv__arena arena;
  rdkv_status st;
  size_t need;
  if (!rdkv__resolved(cfg) || layer == NULL) return RDKV_ERR_ARGUMENT;
  need = rdkv_layer_bytes(cfg, n_tokens);
  st = rdkv__scratch(mem, bytes, need, &arena);
  if (st != RDKV_OK) return st;
  memset(layer, 0, sizeof *layer);
  memset(mem, 0, need);
  layer->n_tokens = n_tokens;
  rdkv__layer_layout(cfg, n_tokens, &arena, layer);
  return RDKV_OK;
}

static int rdkv__layer_ok(const rdkv_layer *l) {
  return l && l->n_tokens <= RDKV__MAX_TOKENS && l->token && l->q_square && l->k_square &&
         l->mean_out && l->v_distortion && l->k_distortion && l->v_bits && l->k_bits;
}

static void rdkv__clear(const rdkv_config *cfg, rdkv_layer *l) {
  memset(l->v_bits, 0, (size_t)cfg->n_kv_heads * l->n_tokens);
  memset(l->k_bits, 0, (size_t)cfg->n_kv_heads * (size_t)cfg->k_dim);
}

/* Scratch of the calls that go through a layer's K and V. */
typedef struct rdkv__work {
  float *qt;        /* [k_dim][columns] queries, transposed and scaled */
  float *logits;    /* [ROWS][columns] */
  float *max, *sum; /* [columns] */
  float *rows;      /* [ROWS][dim padded]; rdkv_pack: [TILE] */
  float *mean;      /* [n_tokens] attention before pooling */
  uint32_t *order;  /* [n_tokens] kept tokens, by run */
  float *channel;   /* [24][MAX_DIM] small per-channel tables */
  double *total;    /* [MAX_DIM] */
  uint8_t *codes;   /* [TILE][PACKED] */
} rdkv__work;

static uint64_t rdkv__work_layout(const rdkv_config *cfg, uint32_t n_tokens, rdkv__arena *arena,
                                  rdkv__work *w) {
  uint64_t bytes = 0, n = rdkv__max_u32(n_tokens, 1);
  uint64_t nq = (uint64_t)(cfg->n_q_heads / cfg->n_kv_heads) * (uint64_t)cfg->window;
  nq = (nq + 15) / 16 * 16;
  w->qt = (float *)rdkv__take(arena, &bytes, nq * (uint64_t)cfg->k_dim, 4);
  w->logits = (float *)rdkv__take(arena, &bytes, nq * RDKV__ROWS, 4);
  w->max = (float *)rdkv__take(arena, &bytes, nq, 4);
  w->sum = (float *)rdkv__take(arena, &bytes, nq, 4);
  w->rows = (float *)rdkv__take(arena, &bytes, RDKV__ROWS * RDKV__MAX_DIM, 4);
  w->mean = (float *)rdkv__take(arena, &bytes, n, 4);
  w->order = (uint32_t *)rdkv__take(arena, &bytes, n, 4);
  w->channel = (float *)rdkv__take(arena, &bytes, 24 * RDKV__MAX_DIM, 4);
  w->total = (double *)rdkv__take(arena, &bytes, RDKV__MAX_DIM, 8);
  w->codes = (uint8_t *)rdkv__take(arena, &bytes, RDKV__TILE * RDKV__PACKED, 1);
  return bytes;
}

RDKV_DEF size_t rdkv_layer_scratch(const rdkv_config *cfg, uint32_t n_tokens) {
  rdkv__work w;
  if (!rdkv__resolved(cfg) || n_tokens > RDKV__MAX_TOKENS) return 0;
  return rdkv__size(rdkv__work_layout(cfg, n_tokens, NULL, &w));
}

static rdkv_status rdkv__work_begin(const rdkv_config *cfg, uint32_t n_tokens, void *scratch,
                                    size_t bytes, rdkv__work *w) {
  rdkv__arena arena;
  rdkv_status st = rdkv__scratch(scratch, bytes, rdkv_layer_scratch(cfg, n_tokens), &arena);
  if (st == RDKV_OK) rdkv__work_layout(cfg, n_tokens, &arena, w);
  return st;
}

/* One row of a tensor as float, zero-padded to 16; 0 if a value is NaN, Inf or beyond the half
   range */
static int rdkv__row(const rdkv__kernels *kn, const rdkv_tensor *t, uint32_t token, int head, int n,
                     float *dst) {
  ptrdiff_t stride = t->dim_stride == 0 ? 1 : t->dim_stride;
  return kn->row(rdkv__at(t, token, head), t->dtype, stride, n, dst) <= RDKV__MAX_HALF;
}

/* Asks for a row that will be read soon: rows of one head lie a page apart, out of the hardware
   prefetcher's reach. */
#define RDKV__AHEAD 16
static void rdkv__ahead(const rdkv_tensor *t, uint32_t token, int head, int n) {
#if defined(__GNUC__)
  const char *p = (const char *)rdkv__at(t, token, head);
  int i, bytes = n * (t->dtype == RDKV_F32 ? 4 : 2);
  for (i = 0; i < bytes && t->dim_stride <= 1; i += 64) __builtin_prefetch(p + i);
#else
  (void)t, (void)token, (void)head, (void)n;
#endif
}

/* Averages over `pool` neighbours; the ends are reflected; a wider kernel than 2T-1 shrinks to it.
 */
static void rdkv__pool(const float *in, uint32_t n, int pool, float *out) {
  int64_t half = (pool - 1) / 2, t, i, last = (int64_t)n - 1;
  if (half > last) half = last;
  for (t = 0; t <= last; t++) {
    float s = 0;
    if (t >= half && t + half <= last) {
      for (i = t - half; i <= t + half; i++) s = rdkv__f(s + in[i]);
    } else {
      for (i = t - half; i <= t + half; i++)
        s = rdkv__f(s + in[i < 0 ? -i : i > last ? 2 * last - i : i]);
    }
    out[t] = rdkv__f(s / (float)(2 * half + 1));
  }
}

/* Weights of the window's queries, 1 on average. The next queries will be most like the last ones:
   with RDKV_JOINT the weight falls with the square root of the distance from the end
   (bench/README.md); the authors take all alike. */
static void rdkv__recency(const rdkv_config *cfg, int window, float *weight) {
  double sum = 0;
  int i;
  for (i = 1; i <= window; i++) sum += 1 / sqrt((double)i);
  for (i = 0; i < window; i++)
    weight[i] = cfg->profile == RDKV_PAPER ? 1 : (float)(window / sum / sqrt((double)(window - i)));
}

/* rdkv_score by any queries: the first of those in kv->q sits at position `first` of the range and
   every token is seen by the last one. by: what their attention over all tokens was, or NULL where
   the range is all there is. */
static rdkv_status rdkv__score_by(const rdkv_config *cfg, const rdkv_kv *kv, int window,
                                  uint32_t first, const rdkv_queries *by, rdkv_layer *layer,
                                  void *scratch, size_t scratch_bytes) {
  const rdkv__kernels *kn;
  rdkv__work w;
  rdkv_status st;
  uint32_t n, t, t0, rows;
  int head, group, kd, vd, kp, vp, i, g, d, pass, joint;
  float weight[RDKV__MAX_WINDOW];
  float see[RDKV__MAX_WINDOW + 1]; /* weight of queries i and later */
  size_t nq, used;
  if (!rdkv__resolved(cfg) || kv == NULL || !rdkv__layer_ok(layer)) return RDKV_ERR_ARGUMENT;
  n = layer->n_tokens;
  st = rdkv__work_begin(cfg, n, scratch, scratch_bytes, &w);
  if (st != RDKV_OK) return st;
  joint = cfg->profile == RDKV_JOINT;
  if (n > 0 &&
      (!rdkv__tensor_ok(&kv->k) || !rdkv__tensor_ok(&kv->q) || (joint && !rdkv__tensor_ok(&kv->v))))
    return RDKV_ERR_ARGUMENT;
  kn = rdkv__kernels_of(cfg->isa);
  group = cfg->n_q_heads / cfg->n_kv_heads, kd = cfg->k_dim, vd = cfg->v_dim;
  kp = rdkv__pad16(kd), vp = rdkv__pad16(vd);
  used = (size_t)group * (size_t)window, nq = (used + 15) / 16 * 16;
  rdkv__recency(cfg, window, weight);
  for (i = window - 1, see[window] = 0; i >= 0; i--) see[i] = weight[i] + see[i + 1];
  rdkv__clear(cfg, layer); /* widths of older scores */
  for (head = 0; head < cfg->n_kv_heads && n > 0; head++) {
    float *token = layer->token + (size_t)head * n;
    float *q2 = layer->q_square + (size_t)head * (size_t)kd, *part = w.channel;
    float *k2 = layer->k_square + (size_t)head * (size_t)kd;
    /* queries as columns i * group + g: those that do not see token first + j are the first j *
       group */
    memset(w.qt, 0, nq * (size_t)kd * sizeof(float));
    for (d = 0; d < kd; d++) w.total[d] = 0;
    for (i = 0; i < window; i++) {
      for (g = 0; g < group; g++) {
        if (!rdkv__row(kn, &kv->q, (uint32_t)i, head * group + g, kd, w.rows))
          return RDKV_ERR_NONFINITE;
        for (d = 0; d < kd; d++) {
          w.qt[(size_t)d * nq + (size_t)(i * group + g)] = w.rows[d] * cfg->softmax_scale;
          w.total[d] += (double)w.rows[d] * (double)w.rows[d];
        }
      }
    }
    for (d = 0; d < kd; d++) q2[d] = (float)(w.total[d] / (double)used), w.total[d] = 0;
    for (used = 0; used < nq; used++) w.max[used] = -1e30f, w.sum[used] = 0;
    used = (size_t)group * (size_t)window;
    /* pass 0: maximum and sum of each column's softmax; pass 1: the weights */
    for (pass = 0; pass < 2; pass++) {
      for (t0 = 0; t0 < n; t0 += rows) {
        float sum[RDKV__ROWS];
        rows = rdkv__min_u32(n - t0, RDKV__ROWS);
        memset(part, 0, RDKV__MAX_DIM * sizeof(float));
        for (t = 0; t < rows; t++) {
          float *row = w.rows + t * (uint32_t)kp;
          if (t0 + t + RDKV__AHEAD < n) rdkv__ahead(&kv->k, t0 + t + RDKV__AHEAD, head, kd);
          if (!rdkv__row(kn, &kv->k, t0 + t, head, kd, row)) return RDKV_ERR_NONFINITE;
          if (pass == 0)
            for (d = 0; d < kd; d++) part[d] += row[d] * row[d];
        }
        if (pass == 0)
          for (d = 0; d < kd; d++) w.total[d] += (double)part[d];
        kn->logits(w.qt, nq, w.rows, (size_t)kp, (int)rows, kd, w.logits);
        for (t = 0; t < rows; t++) {
          size_t c, hidden = t0 + t > first ? (size_t)(t0 + t - first) * (size_t)group : 0;
          for (c = 0; c < hidden; c++) w.logits[t * nq + c] = -1e30f;
        }
        if (pass == 0) {
          kn->softmax(w.logits, (int)rows, nq, w.max, w.sum);
          continue;
        }
        kn->weigh(w.logits, (int)rows, nq, w.max, w.sum, sum);
        for (t = 0; t < rows; t++) {
          int hidden = t0 + t > first ? (int)(t0 + t - first) : 0;
          w.mean[t0 + t] = sum[t];
          token[t0 + t] = sum[t] / see[hidden];
        }
      }
      if (pass == 0) { /* from here on w.sum is its inverse, 0 in columns that pad */
        size_t c;
        for (c = 0; c < used && by && by->lse;
             c++) { /* with the tokens that are not in the range */
          float all = expf(by->lse[c / (size_t)group * by->lse_stride +
                                   (size_t)head * (size_t)group + c % (size_t)group] -
                           w.max[c]);
          if (all > w.sum[c]) w.sum[c] = all;
        }
        for (c = 0; c < nq; c++) w.sum[c] = c < used ? weight[c / (size_t)group] / w.sum[c] : 0;
        for (d = 0; d < kd; d++) k2[d] = (float)(w.total[d] / (double)n);
      }
    }
    if (joint) { /* mean output of the window's attention, in parts so that few roundings add up */
      float *out = layer->mean_out + (size_t)head * (size_t)vd;
      double all = (double)used;
      for (d = 0; d < vd; d++) w.total[d] = 0;
      for (i = 0; i < window * group && by && by->out.data; i++) {
        if (!rdkv__row(kn, &by->out, (uint32_t)(i / group), head * group + i % group, vd, w.rows))
          return RDKV_ERR_NONFINITE;
        for (d = 0; d < vd; d++) w.total[d] += (double)weight[i / group] * (double)w.rows[d];
      }
      if (by && by->lse && by->out.data == NULL) /* that of the range's tokens */
        for (t = 0, all = 1e-30; t < n; t++) all += (double)w.mean[t];
      for (t0 = by && by->out.data ? n : 0; t0 < n; t0 += rows) {
        rows = rdkv__min_u32(n - t0, 256);
        memset(part, 0, RDKV__MAX_DIM * sizeof(float));
        for (t = t0; t < t0 + rows; t++) {
          if (t + RDKV__AHEAD < n) rdkv__ahead(&kv->v, t + RDKV__AHEAD, head, vd);
          if (!rdkv__row(kn, &kv->v, t, head, vd, w.rows)) return RDKV_ERR_NONFINITE;
          kn->axpy(w.mean[t], w.rows, vp, part);
        }
        for (d = 0; d < vd; d++) w.total[d] += (double)part[d];
      }
      for (d = 0; d < vd; d++) out[d] = (float)(w.total[d] / all);
    }
    memcpy(w.mean, token, (size_t)n * sizeof(float));
    rdkv__pool(w.mean, n, cfg->pool, token);
  }
  return RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_score(const rdkv_config *cfg, const rdkv_kv *kv, rdkv_layer *layer,
                                void *scratch, size_t scratch_bytes) {
  uint32_t window;
  if (!rdkv__resolved(cfg) || kv == NULL || !rdkv__layer_ok(layer)) return RDKV_ERR_ARGUMENT;
  window = rdkv__min_u32((uint32_t)cfg->window, layer->n_tokens);
  return rdkv__score_by(cfg, kv, (int)window, layer->n_tokens - window, NULL, layer, scratch,
                        scratch_bytes);
}

/* Bins of 1/8 octave over all floats >= 0: the exponent and three bits of the mantissa. */
static int rdkv__bin(float slope) { return (int)(rdkv__bits(slope) >> 20); }
static float rdkv__bin_edge(int bin) { return rdkv__float((uint32_t)bin << 20); }

/* The tokens that K is measured over before widths exist: the n largest D(0), up to a bin. */
static uint32_t rdkv__likely(const float *d0, uint32_t n, double part, uint32_t *order) {
  uint32_t count[RDKV_HISTOGRAM_BINS], t, kept = 0, sum = 0, want;
  int bin;
  want = part >= 1 ? n : (uint32_t)(part * (double)n);
  if (want < RDKV__TILE) want = RDKV__TILE;
  memset(count, 0, sizeof count);
  for (t = 0; t < n; t++) count[rdkv__bin(d0[t])]++;
  for (bin = RDKV_HISTOGRAM_BINS - 1; bin > 0; bin--) {
    sum += count[bin];
    if (sum >= want) break;
  }
  for (t = 0; t < n; t++)
    if (rdkv__bin(d0[t]) >= bin) order[kept++] = t;
  return kept;
}

static double rdkv__keep(const rdkv_config *cfg, uint32_t n_tokens);

RDKV_DEF rdkv_status rdkv_measure(const rdkv_config *cfg, const rdkv_kv *kv, rdkv_layer *layer,
                                  void *scratch, size_t scratch_bytes) {
  const rdkv__kernels *kn;
  rdkv__work w;
  rdkv_status st;
  uint32_t n, t, i, kept;
  int head, kd, vd, kp, d, j;
  if (!rdkv__resolved(cfg) || kv == NULL || !rdkv__layer_ok(layer)) return RDKV_ERR_ARGUMENT;
  n = layer->n_tokens;
  st = rdkv__work_begin(cfg, n, scratch, scratch_bytes, &w);
  if (st != RDKV_OK || cfg->profile == RDKV_PAPER || n == 0) return st;
  if (!rdkv__tensor_ok(&kv->k) || !rdkv__tensor_ok(&kv->v)) return RDKV_ERR_ARGUMENT;
  kn = rdkv__kernels_of(cfg->isa), kd = cfg->k_dim, vd = cfg->v_dim, kp = rdkv__pad16(kd);
  for (head = 0; head < cfg->n_kv_heads; head++) {
    const float *token = layer->token + (size_t)head * n;
    const uint8_t *v_bits = layer->v_bits + (size_t)head * n;
    float *dv = layer->v_distortion + (size_t)head * 5 * n;
    float *dk = layer->k_distortion + (size_t)head * 4 * (size_t)kd;
    float *ref = w.channel, *lo = ref + RDKV__MAX_DIM, *hi = lo + RDKV__MAX_DIM;
    float *sum = hi + RDKV__MAX_DIM, *all = sum + 3 * 4 * RDKV__MAX_DIM; /* four levels; the last */
    float norm = rdkv__f(cfg->softmax_scale * cfg->softmax_scale);
    for (t = 0, kept = 0; t < n; t++)
      if (v_bits[t]) w.order[kept++] = t;
    if (kept == 0) {
      memset(w.channel, 0, RDKV__MAX_DIM * sizeof(float));
      memcpy(w.channel, layer->mean_out + (size_t)head * (size_t)vd, (size_t)vd * sizeof(float));
      for (t = 0; t < n; t++) {
        float low, high, range;
        if (t + RDKV__AHEAD < n) rdkv__ahead(&kv->v, t + RDKV__AHEAD, head, vd);
        if (!rdkv__row(kn, &kv->v, t, head, vd, w.rows)) return RDKV_ERR_NONFINITE;
        dv[t] = kn->distance(w.rows, w.channel, vd);
        kn->ends(w.rows, vd, &low, &high);
        range = rdkv__f(high - low), range = rdkv__f(range * range);
        for (j = 1; j < 4; j++) /* the ends have codes of their own */
          dv[(size_t)j * n + t] =
              rdkv__f(token[t] * rdkv__f(range * rdkv__noise(vd > 2 ? vd - 2 : 0, 1 << j)));
        dv[(size_t)4 * n + t] = 0; /* a bfloat16 too is a half, or too small to matter */
        if (kv->v.dtype == RDKV_F32)
          dv[(size_t)4 * n + t] = rdkv__f(token[t] * kn->distance(w.rows, NULL, vd));
      }
      /* |v - o|^2 is averaged over the neighbours as the attention is: what is dropped comes in
         stretches then. Taken alone it drops all tokens of a kind (those whose V is near the mean,
         say every ';') and with them the whole of a later query that wants just these. */
      rdkv__pool(dv, n, cfg->pool, w.mean);
      for (t = 0; t < n; t++) dv[t] = rdkv__f(token[t] * w.mean[t]);
      kept = rdkv__likely(dv, n, rdkv__keep(cfg, n) * 4, w.order); /* 4 bits of 16, about */
    }
    /* K's sums are of its distances from the last token, so that nothing is lost where a channel
       lies far from 0 */
    memset(w.channel, 0, 24 * RDKV__MAX_DIM * sizeof(float));
    if (!rdkv__row(kn, &kv->k, n - 1, head, kd, ref)) return RDKV_ERR_NONFINITE;
    for (d = 0; d < kp; d++) lo[d] = FLT_MAX, hi[d] = -FLT_MAX;
    for (i = 0; i < kept; i++) {
      /* An error e of the token's logit moves the output by about a e (v - o), a the attention. The
         square is at most a e^2 |v - o|^2, first power as for V: with w for a, e^2 times D(0) of V.
         a^2, which trusts every later query to attend as the window does, starves K. */
      float g = dv[t = w.order[i]];
      if (i + RDKV__AHEAD < kept) rdkv__ahead(&kv->k, w.order[i + RDKV__AHEAD], head, kd);
      if (!rdkv__row(kn, &kv->k, t, head, kd, w.rows)) return RDKV_ERR_NONFINITE;
      kn->moments(w.rows, ref, kp, g, lo, hi, sum);
      sum[3 * RDKV__MAX_DIM] = rdkv__f(sum[3 * RDKV__MAX_DIM] + g);
      rdkv__carry(sum, 4 * RDKV__MAX_DIM, 3 * RDKV__MAX_DIM + 1, t,
                  i + 1 < kept ? w.order[i + 1] : UINT32_MAX);
    }
    for (d = 0; d < kd; d++) {
      float q2 = rdkv__f(layer->q_square[(size_t)head * (size_t)kd + (size_t)d] * norm);
      float g = all[3 * RDKV__MAX_DIM], range = rdkv__f(hi[d] - lo[d]);
      float mean = rdkv__f(all[d] / (float)kept), gu = all[RDKV__MAX_DIM + d];
      /* sum of g (u - mean)^2 */
      float apart = rdkv__f(2 * gu - rdkv__f(mean * g));
      apart = rdkv__f(all[2 * RDKV__MAX_DIM + d] - rdkv__f(mean * apart));
      dk[d] = rdkv__f(q2 * (apart > 0 ? apart : 0));
      range = rdkv__f(range * range);
      for (j = 1; j < 4; j++)
        dk[(size_t)j * (size_t)kd + (size_t)d] =
            rdkv__f(q2 * rdkv__f(g * rdkv__f(range * rdkv__noise(1, 1 << j))));
    }
  }
  return RDKV_OK;
}

/* The authors' quantiser (Junkai1860/RDKV): value = (code - zero) * scale. */
typedef struct rdkv__zero_point {
  float scale, zero; /* before they are stored as halves */
} rdkv__zero_point;

static rdkv__zero_point rdkv__fit_paper(float lo, float hi, int bits) {
  float top = (float)((1 << bits) - 1);
  rdkv__zero_point z;
  z.scale = rdkv__f(rdkv__f(hi - lo) * rdkv__f(1 / top));
  if (z.scale < 1e-8f) z.scale = 1e-8f;
  z.zero = rdkv__f(-lo / z.scale);
  z.zero = (float)lrintf(z.zero < 0 ? 0 : z.zero > top ? top : z.zero);
  return z;
}
static int rdkv__code_paper(float x, rdkv__zero_point z, int bits) {
  float top = (float)((1 << bits) - 1), c;
  volatile float scale = z.scale; /* a true division: no reciprocal may be hoisted out of a loop */
  c = rdkv__f(rdkv__f(x / scale) + z.zero);
  return (int)lrintf(c < 0 ? 0 : c > top ? top : c);
}
/* As the format stores it: the middle of the range as a half. */
static rdkv__affine rdkv__affine_paper(rdkv__zero_point z, int bits) {
  rdkv__affine a;
  float scale = rdkv__from_half(rdkv__to_half(z.scale));
  a.scale = scale, a.inv = 0;
  a.mid =
      rdkv__from_half(rdkv__to_half(rdkv__f(scale * (float)(1 << (bits - 1)) - scale * z.zero)));
  return a;
}

RDKV_DEF rdkv_status rdkv_calibrate(const rdkv_config *cfg, const rdkv_kv *kv, uint32_t n_tokens,
                                    float eps_k[3], float eps_v[3], void *scratch,
                                    size_t scratch_bytes) {
  const rdkv__kernels *kn;
  rdkv__work w;
  rdkv_status st;
  double k_error[3] = {0, 0, 0}, v_error[3] = {0, 0, 0}, k_square = 0, v_square = 0;
  rdkv__zero_point fit[3][RDKV__MAX_DIM];
  int head, d, j, kd, vd, kp;
  uint32_t t;
  if (!rdkv__resolved(cfg) || kv == NULL || eps_k == NULL || eps_v == NULL || n_tokens == 0 ||
      n_tokens > RDKV__MAX_TOKENS || !rdkv__tensor_ok(&kv->k) || !rdkv__tensor_ok(&kv->v))
    return RDKV_ERR_ARGUMENT;
  st = rdkv__work_begin(cfg, n_tokens, scratch, scratch_bytes, &w);
  if (st != RDKV_OK) return st;
  kn = rdkv__kernels_of(cfg->isa), kd = cfg->k_dim, vd = cfg->v_dim, kp = rdkv__pad16(kd);
  for (head = 0; head < cfg->n_kv_heads; head++) {
    float *lo = w.channel, *hi = lo + RDKV__MAX_DIM, *sum = hi + RDKV__MAX_DIM;
    for (d = 0; d < kp; d++) lo[d] = FLT_MAX, hi[d] = -FLT_MAX, sum[d] = 0;
    for (t = 0; t < n_tokens; t++) {
      if (!rdkv__row(kn, &kv->k, t, head, kd, w.rows)) return RDKV_ERR_NONFINITE;
      kn->range(w.rows, kp, lo, hi, sum);
    }
    for (j = 0; j < 3; j++)
      for (d = 0; d < kd; d++) fit[j][d] = rdkv__fit_paper(lo[d], hi[d], 2 << j);
    for (t = 0; t < n_tokens; t++) {
      float vlo, vhi;
      rdkv__row(kn, &kv->k, t, head, kd, w.rows);
      for (d = 0; d < kd; d++) {
        double x = (double)w.rows[d];
        k_square += x * x;
        for (j = 0; j < 3; j++) {
          rdkv__zero_point z = fit[j][d];
          double s = (double)rdkv__from_half(rdkv__to_half(z.scale));
          double e = ((double)rdkv__code_paper(w.rows[d], z, 2 << j) - (double)z.zero) * s - x;
          k_error[j] += e * e;
        }
      }
      if (!rdkv__row(kn, &kv->v, t, head, vd, w.rows)) return RDKV_ERR_NONFINITE;
      kn->ends(w.rows, vd, &vlo, &vhi);
      for (j = 0; j < 3; j++) {
        rdkv__zero_point z = rdkv__fit_paper(vlo, vhi, 2 << j);
        double s = (double)rdkv__from_half(rdkv__to_half(z.scale));
        for (d = 0; d < vd; d++) {
          double x = (double)w.rows[d];
          double e = ((double)rdkv__code_paper(w.rows[d], z, 2 << j) - (double)z.zero) * s - x;
          v_error[j] += e * e;
          if (j == 0) v_square += x * x;
        }
      }
    }
  }
  for (j = 0; j < 3; j++) {
    eps_k[j] = k_square > 0 ? (float)(k_error[j] / k_square) : 0;
    eps_v[j] = v_square > 0 ? (float)(v_error[j] / v_square) : 0;
  }
  return RDKV_OK;
}

/* ---- >>impl-allocate : widths under a byte budget -------------------------------------------- */

/* What one head takes in a block. count [5] tokens and channels [4] channels at each level. */
typedef struct rdkv__parts {
  uint64_t table, positions, tiles; /* bytes; tiles all in all */
  uint64_t k, params, v;            /* the bytes of tiles by kind */
  uint32_t n_tiles[5];              /* [0] is their sum */
  int k_blocks[4];                  /* [0] is their sum */
  uint32_t k_tile;                  /* bytes of K in a tile */
} rdkv__parts;

static uint64_t rdkv__head_bytes(int v_dim, int positions, const uint32_t *count,
                                 const uint32_t *channels, rdkv__parts *p) {
  uint64_t d_blocks = (uint64_t)rdkv__pad16(v_dim) / 16, n;
  int l;
  memset(p, 0, sizeof *p);
  for (l = 1; l < 4; l++) {
    p->k_blocks[l] = (int)((channels[l] + 15) / 16);
    p->k_blocks[0] += p->k_blocks[l];
    p->k_tile += (uint32_t)p->k_blocks[l] * (64u << l);
  }
  for (l = 1; l < 5; l++) {
    p->n_tiles[l] = (count[l] + RDKV__TILE - 1) / RDKV__TILE;
    p->n_tiles[0] += p->n_tiles[l];
    p->v += p->n_tiles[l] * d_blocks * (64u << l);
  }
  p->k = (uint64_t)p->n_tiles[0] * p->k_tile;
  p->params = (uint64_t)p->n_tiles[0] * 128;
  p->tiles = p->k + p->params + p->v;
  n = 16 * (uint64_t)p->k_blocks[0];
  p->table = rdkv__round_up(5 * n + 3 * (uint64_t)channels[0], 128);
  p->positions = positions ? (uint64_t)p->n_tiles[0] * 4 * RDKV__TILE : 0;
  return p->table + p->positions + p->tiles;
}

/* Header and records. */
static uint64_t rdkv__fixed_bytes(uint64_t n_heads) {
  return rdkv__round_up(sizeof(rdkv_header) + n_heads * sizeof(rdkv_record), 128);
}

static void rdkv__count(const uint8_t *bits, uint32_t n, uint32_t *count, int levels) {
  uint32_t i;
  memset(count, 0, (size_t)levels * sizeof *count);
  for (i = 0; i < n; i++) {
    int l = rdkv__level(bits[i]);
    count[l < levels ? l : levels - 1]++; /* RDKV_PAPER's K at 16 is stored as 8 */
  }
}

static uint64_t rdkv__fp16_bytes(const rdkv_config *cfg, uint32_t n_tokens, int n_layers) {
  uint64_t per = (uint64_t)cfg->n_kv_heads * (uint64_t)(cfg->k_dim + cfg->v_dim) * 2;
  return rdkv__mul(rdkv__mul(per, (uint64_t)n_layers), n_tokens);
}

/* The budget of n_layers of the config's layers. */
static uint64_t rdkv__budget(const rdkv_config *cfg, uint32_t n_tokens, int n_layers) {
  uint64_t total = cfg->budget_bytes, l = (uint64_t)cfg->n_layers, n = (uint64_t)n_layers;
  if (total == 0)
    total = (uint64_t)(cfg->keep * (double)rdkv__fp16_bytes(cfg, n_tokens, cfg->n_layers));
  return total / l * n + total % l * n / l;
}

/* The same as a part of the fp16 cache. */
static double rdkv__keep(const rdkv_config *cfg, uint32_t n_tokens) {
  if (cfg->budget_bytes == 0) return cfg->keep;
  return (double)cfg->budget_bytes / (double)rdkv__fp16_bytes(cfg, n_tokens, cfg->n_layers);
}

/* No block of n_layers can be larger: every K channel at 8 bits, every V token at 16, and the pads.
 */
static uint64_t rdkv__max_block(const rdkv_config *cfg, uint32_t n_tokens, int n_layers) {
  uint64_t heads = (uint64_t)n_layers * (uint64_t)cfg->n_kv_heads, tile, head;
  uint64_t kb = (uint64_t)rdkv__pad16(cfg->k_dim) / 16, vb = (uint64_t)rdkv__pad16(cfg->v_dim) / 16;
  tile = 512 * kb + 384 + 128 + 1024 * vb + (cfg->positions ? 128 : 0);
  head = tile * ((uint64_t)n_tokens / RDKV__TILE + 4) + 2048; /* table: 5 * 16 * 19 at most */
  return rdkv__add(rdkv__fixed_bytes(heads), rdkv__mul(heads, head));
}

#define RDKV__FEW 2048 /* tokens of a head by which K is chosen at least, if it has them */
#define RDKV__FINE 512 /* bins of a head's histogram: nearly 2 octaves of 256 */
#define RDKV__HIGH 5   /* the last ones have an octave each */
#define RDKV__PINNED 0x7f7fffffu /* slope of what must be kept: FLT_MAX */

/* One head while its widths are chosen. */
typedef struct rdkv__head {
  const float *v_distortion, *k_distortion;
  uint8_t *v_bits, *k_bits;
  uint32_t n_tokens;
  uint32_t count[5], channels[4]; /* tokens and channels at each level */
  uint32_t tiles[4];              /* that reach level 1.. */
  uint8_t *pin;                   /* [n_tokens] lowest level, NULL = no pins */
  uint32_t pinned[5];             /* tokens that must reach a level */
  uint32_t k_tile;
  uint32_t bins[4 * RDKV__FINE]; /* tokens by slope, for level 1.. apart or for level 1 alone */
} rdkv__head;

typedef struct rdkv__solver {
  const rdkv_config *cfg;
  const rdkv__kernels *kn;
  rdkv__head *heads;
  uint64_t n_heads;
  uint32_t *key, *index, *key2, *index2; /* [n_tokens] sorting */
  uint8_t *pins;                         /* [n_heads][n_tokens] lowest level; no pins: unused */
  float k_bias;                          /* on the threshold that K widths are chosen at; 1 */
  uint32_t round_up;                     /* tokens that a tile may lack; 0 with a budget */
} rdkv__solver;

/* Slopes of the lower convex hull of a unit's distortion over cumulated cost, as bits of floats >=
   0 (which compare like the floats): slope[l] is what reaching level l+1 saves per unit of cost.
   Adjacent steps are pooled until slopes fall. first: levels below it are not optional. */
static void rdkv__hull(const float *d, const float *cost, int levels, int first, uint32_t *slope) {
  float gain[4], width[4], s[4];
  int end[4], n = 0, l, i;
  for (l = 0; l < first; l++) slope[l] = RDKV__PINNED;
  for (l = first; l < levels; l++) {
    gain[n] = rdkv__f(d[l] - d[l + 1]), width[n] = cost[l], end[n] = l + 1;
    s[n] = rdkv__f(gain[n] / width[n]);
    while (n > 0 && s[n] > s[n - 1]) {
      n--;
      gain[n] = rdkv__f(gain[n] + gain[n + 1]), width[n] = rdkv__f(width[n] + width[n + 1]);
      end[n] = end[n + 1];
      s[n] = rdkv__f(gain[n] / width[n]);
    }
    n++;
  }
  for (i = 0, l = first; i < n; i++)
    for (; l < end[i]; l++) slope[l] = s[i] > 0 ? rdkv__bits(s[i]) : 0;
}

/* Bytes that a token takes for each level beyond the one before, at the head's present K. */
static void rdkv__v_costs(const rdkv__solver *s, const rdkv__head *h, float cost[4]) {
  uint32_t block = (uint32_t)rdkv__pad16(s->cfg->v_dim) / 16 * 128;
  uint32_t whole = h->k_tile + 128 + block + (s->cfg->positions ? 128u : 0u);
  cost[0] = (float)whole / RDKV__TILE, cost[1] = (float)block / RDKV__TILE;
  cost[2] = (float)(2 * block) / RDKV__TILE, cost[3] = (float)(4 * block) / RDKV__TILE;
}

/* Slopes of tokens [t0, t0 + n), n <= CHUNK: slope[l][i], floats >= 0. */
static void rdkv__v_slopes(const rdkv__solver *s, const rdkv__head *h, uint32_t t0, uint32_t n,
                           const float cost[4], float slope[4][RDKV__CHUNK]) {
  const float *d = h->v_distortion + t0;
  size_t stride = h->n_tokens;
  float inv[10], last[5 * 16];
  uint32_t whole = n & ~15u, i;
  int a, b, l, k = 0;
  for (a = 3; a >= 0;
       a--) { /* cost_ab for a = 3, then 2 ...; b from 4 down, as the kernel wants it */
    for (b = 4; b > a; b--) {
      float sum = 0;
      for (l = a; l < b; l++) sum += cost[l]; /* exact: multiples of 4 */
      inv[k++] = rdkv__f(1 / sum);
    }
  }
  s->kn->hull(d, stride, (int)whole, inv, slope[0]);
  if (whole < n) { /* a copy, so that nothing is read past the last row */
    memset(last, 0, sizeof last);
    for (l = 0; l < 5; l++)
      memcpy(last + 16 * l, d + (size_t)l * stride + whole, (n - whole) * sizeof *d);
    s->kn->hull(last, 16, 16, inv, slope[0] + whole);
  }
  for (i = 0; i < n && h->pin; i++) {
    uint32_t pinned[4];
    float x[5];
    if (h->pin[t0 + i] == 0) continue;
    for (l = 0; l < 5; l++) x[l] = d[(size_t)l * stride + i];
    rdkv__hull(x, cost, 4, h->pin[t0 + i], pinned);
    for (l = 0; l < 4; l++) slope[l][i] = rdkv__float(pinned[l]);
  }
}

/* K widths of a head for a threshold and a number of kept tokens. Every run but the last is whole
   blocks of 16: the count at each level is rounded to the nearest, the best channels first. */
static void rdkv__choose_k(const rdkv__solver *s, rdkv__head *h, float threshold,
                           uint32_t n_tokens) {
  uint32_t slope[RDKV__MAX_DIM][3], c, kd = (uint32_t)s->cfg->k_dim, count, want, level;
  uint32_t tiles = (rdkv__max_u32(n_tokens, 1) + RDKV__TILE - 1) / RDKV__TILE;
  float cost[3], d[4], lambda = threshold < 1e37f ? threshold * s->k_bias : threshold;
  int l;
  /* a tile has 8 bytes for each channel and 2 bits */
  cost[0] = cost[1] = (float)(tiles * 8), cost[2] = (float)(tiles * 16);
  for (c = 0; c < kd; c++) {
    for (l = 0; l < 4; l++) d[l] = h->k_distortion[(uint32_t)l * kd + c];
    rdkv__hull(d, cost, 3, 0, slope[c]);
    h->k_bits[c] = 0;
  }
  for (l = 0, level = kd; l < 3; l++) {
    for (c = 0, want = 0; c < kd; c++) want += rdkv__float(slope[c][l]) > lambda;
    want = (want + 8) / 16 * 16;
    want = rdkv__min_u32(want, level);
    for (count = 0; count < want; count++) { /* the best of those that reached the level below */
      uint32_t best = kd;
      for (c = 0; c < kd; c++)
        if (h->k_bits[c] == rdkv__v_width[l] && (best == kd || slope[c][l] > slope[best][l]))
          best = c;
      h->k_bits[best] = (uint8_t)rdkv__v_width[l + 1];
    }
    level = want;
  }
  rdkv__count(h->k_bits, kd, h->channels, 4);
  h->k_tile = 0;
  for (l = 1; l < 4; l++) h->k_tile += (h->channels[l] + 15) / 16 * (64u << l);
}

/* Lower edge of a bin below the last HIGH ones. */
static float rdkv__fine_edge(float base, int bin) {
  return rdkv__float(((rdkv__bits(base) >> 15) + (uint32_t)bin) << 15);
}

/* Tiles that reach level l + 1 if the threshold lies at the lower edge of a bin below HIGH: those
   of the tokens whose slope reaches it, the last of which may be short where it holds the last
   token. Tokens that are left over have one more, which others fill, where they are worth it: HIGH
   bins begin at about twice the threshold, so each counts as 1, 2, 4 .. 32. */
static uint32_t rdkv__tiles(const rdkv__solver *s, const rdkv__head *h, int l, int bin) {
  const uint32_t *bins = &h->bins[l * RDKV__FINE], *high = bins + RDKV__FINE - RDKV__HIGH;
  uint32_t n = bins[bin] + s->round_up, tiles = n / RDKV__TILE, worth, paid, i;
  if (n >= h->n_tokens) return (h->n_tokens + RDKV__TILE - 1) / RDKV__TILE;
  paid = rdkv__max_u32(tiles * RDKV__TILE, h->pinned[l + 1]);
  worth = n > paid ? n - paid : 0;
  for (i = 0; i < RDKV__HIGH && high[i] > paid; i++) worth += (high[i] - paid) << i;
  return tiles + (worth >= RDKV__TILE);
}

/* Tokens that reach level l + 1, of those that reach level l: pins of level l alone may have left
   no room for what level l + 1 is worth to them. */
static uint32_t rdkv__reach(const rdkv__head *h, int l, uint32_t below) {
  uint32_t n = rdkv__max_u32(h->tiles[l] * RDKV__TILE, h->pinned[l + 1]);
  return rdkv__min_u32(n, below);
}

/* Bytes of a head whose tiles[] reach each level, which it counts in tokens. */
static uint64_t rdkv__tiles_bytes(const rdkv__solver *s, rdkv__head *h) {
  rdkv__parts parts;
  uint32_t before = h->n_tokens, reach;
  int l;
  for (l = 0; l < 4; l++) {
    reach = rdkv__reach(h, l, before);
    h->count[l] = before - reach, before = reach;
  }
  h->count[4] = before;
  return rdkv__head_bytes(s->cfg->v_dim, s->cfg->positions, h->count, h->channels, &parts);
}

/* Bytes if the threshold lies at the lower edge of a fine bin. With a budget what is pinned is
   filled up to whole tiles, so that any tile more costs the same. FINE: pins alone. */
static uint64_t rdkv__bytes_at(const rdkv__solver *s, int bin) {
  uint64_t i, bytes = 0;
  for (i = 0; i < s->n_heads; i++) {
    rdkv__head *h = &s->heads[i];
    int l;
    for (l = 0; l < 4; l++) {
      uint32_t pinned = (h->pinned[l + 1] + RDKV__TILE - 1) / RDKV__TILE;
      h->tiles[l] = bin < RDKV__FINE ? rdkv__tiles(s, h, l, bin) : 0;
      if (s->round_up == 0) h->tiles[l] = rdkv__max_u32(h->tiles[l], pinned);
    }
    bytes += rdkv__tiles_bytes(s, h);
  }
  return bytes;
}

/* Sorts key and index by falling key, equal keys by rising index: index must come in rising. */
static void rdkv__sort(const rdkv__solver *s, uint32_t n) {
  uint32_t count[2048], *k = s->key, *x = s->index, *k2 = s->key2, *x2 = s->index2, *swap, i, sum;
  int pass;
  for (pass = 0; pass < 4; pass++) { /* 3 digits of 11 bits; the 4th pass brings it home */
    int shift = pass * 11;
    if (pass == 3) {
      memcpy(k2, k, n * sizeof *k), memcpy(x2, x, n * sizeof *x);
      break;
    }
    memset(count, 0, sizeof count);
    for (i = 0; i < n; i++) count[(~k[i] >> shift) & 2047]++;
    for (i = 0, sum = 0; i < 2048; i++) {
      uint32_t c = count[i];
      count[i] = sum, sum += c;
    }
    for (i = 0; i < n; i++) {
      uint32_t to = count[(~k[i] >> shift) & 2047]++;
      k2[to] = k[i], x2[to] = x[i];
    }
    swap = k, k = k2, k2 = swap;
    swap = x, x = x2, x2 = swap;
  }
}

/* Tokens at level l whose slope of level l + 1 is at least floor, into key and index. Returns how
   many. */
static uint32_t rdkv__gather(const rdkv__solver *s, const rdkv__head *h, int l, float floor) {
  float cost[4], slope[4][RDKV__CHUNK];
  uint32_t t, n = 0, i, chunk;
  rdkv__v_costs(s, h, cost);
  for (t = 0; t < h->n_tokens; t += chunk) {
    chunk = rdkv__min_u32(h->n_tokens - t, RDKV__CHUNK);
    rdkv__v_slopes(s, h, t, chunk, cost, slope);
    for (i = 0; i < chunk; i++)
      if (slope[l][i] >= floor && h->v_bits[t + i] == rdkv__v_width[l])
        s->key[n] = rdkv__bits(slope[l][i]), s->index[n++] = t + i;
  }
  return n;
}

/* Gives a head its widths: level after level the best of those at the level below rise, as many as
   tiles[] has room for. Where those down to the floor do not fill the last tile the first ones of
   the others do: they gain next to nothing, and need not be put in order. */
static void rdkv__assign(const rdkv__solver *s, rdkv__head *h, float floor) {
  uint32_t i, t, n, want, below = h->n_tokens;
  int l;
  memset(h->v_bits, 0, h->n_tokens);
  for (l = 0; l < 4; l++) {
    uint8_t from = (uint8_t)rdkv__v_width[l], to = (uint8_t)rdkv__v_width[l + 1];
    want = rdkv__reach(h, l, below);
    n = rdkv__gather(s, h, l, floor);
    if (n > want) rdkv__sort(s, n);
    for (i = 0; i < want && i < n; i++) h->v_bits[s->index[i]] = to;
    for (t = 0; i < want; t++)
      if (h->v_bits[t] == from) h->v_bits[t] = to, i++;
    below = want;
  }
}

/* Spends what is left, the threshold lying at the lower edge of a fine bin: edge after edge further
   down the whole tiles that it adds, of head after head and level after level. What does not fit is
   passed over; a 4096th of the budget may be left. */
static void rdkv__spend(const rdkv__solver *s, uint64_t budget, uint64_t left, int bin) {
  uint64_t i;
  float cost[4];
  int l;
  while (bin-- > 0 && left > budget / 4096) {
    for (i = 0; i < s->n_heads; i++) {
      rdkv__head *h = &s->heads[i];
      rdkv__v_costs(s, h, cost);
      for (l = 0; l < 4; l++) {
        uint64_t tile = (uint64_t)cost[l] * RDKV__TILE, fit = left / tile;
        uint32_t n = h->bins[l * RDKV__FINE + bin];
        uint32_t tiles = n < h->n_tokens ? n / RDKV__TILE : (n + RDKV__TILE - 1) / RDKV__TILE;
        if (l > 0) tiles = rdkv__min_u32(tiles, h->tiles[l - 1]);
        if (tiles <= h->tiles[l]) continue;
        tiles -= h->tiles[l];
        if (tiles > fit) tiles = (uint32_t)fit;
        h->tiles[l] += tiles, left -= tiles * tile;
      }
    }
  }
  for (i = 0; i < s->n_heads; i++) rdkv__tiles_bytes(s, &s->heads[i]);
}

/* Adds what a head would spend at each slope to hist; counts its tokens by level-1 slope in
   h->bins. Looks at 8 of 8 * each tokens; each a power of two. */
static void rdkv__spectrum(const rdkv__solver *s, rdkv__head *h, float floor, uint32_t each,
                           uint64_t *hist) {
  float cost[4], slope[4][RDKV__CHUNK];
  uint32_t t, i, l, chunk;
  RDKV_ASSERT(sizeof h->bins == RDKV_HISTOGRAM_BINS * sizeof(uint32_t));
  memset(h->bins, 0, sizeof h->bins);
  rdkv__v_costs(s, h, cost);
  for (t = 0; t < h->n_tokens; t += chunk) {
    chunk = rdkv__min_u32(h->n_tokens - t, RDKV__CHUNK);
    rdkv__v_slopes(s, h, t, chunk, cost, slope);
    for (i = 0; i < chunk; i++) {
      if (slope[0][i] <= floor || ((t + i) / 8 ^ (t + i) / 8 / each) % each) continue;
      h->bins[rdkv__bin(slope[0][i])]++;
      for (l = 0; l < 4; l++)
        hist[rdkv__bin(slope[l][i])] += (uint64_t)cost[l]; /* whole: 128 / 32 divides */
    }
  }
  hist[0] = 0; /* what gains nothing is never bought */
}

/* Lowest edge of a bin down to which everything fits. */
static float rdkv__spectrum_edge(const uint64_t *hist, uint64_t bytes) {
  uint64_t sum = 0;
  int bin;
  for (bin = RDKV_HISTOGRAM_BINS - 1; bin > 0; bin--) {
    sum = rdkv__add(sum, hist[bin]);
    if (sum > bytes) break;
  }
  return bin < 0x7f7 ? rdkv__bin_edge(bin + 1) : FLT_MAX;
}

/* Bin of a slope not below base, in 1/256 octaves as both are given; what is above 0 is not far
   above it. */
static int rdkv__fine_bin(uint32_t base, uint32_t slope) {
  const uint32_t fine = RDKV__FINE - RDKV__HIGH;
  slope -= base;
  if (slope < fine || base == 0) return (int)rdkv__min_u32(slope, fine - 1);
  return (int)rdkv__min_u32(fine + (slope - fine) / 256, RDKV__FINE - 1);
}

/* Tokens of every head by slope from base up, cumulated from the top. */
static void rdkv__fine_bins(const rdkv__solver *s, float base) {
  uint32_t bottom = rdkv__bits(base) >> 15, t, b, j, chunk;
  float slope[4][RDKV__CHUNK];
  uint64_t i;
  for (i = 0; i < s->n_heads; i++) {
    rdkv__head *h = &s->heads[i];
    float cost[4];
    int l, bin;
    memset(h->bins, 0, sizeof h->bins);
    rdkv__v_costs(s, h, cost);
    for (t = 0; t < h->n_tokens; t += chunk) {
      chunk = rdkv__min_u32(h->n_tokens - t, RDKV__CHUNK);
      rdkv__v_slopes(s, h, t, chunk, cost, slope);
      for (j = 0; j < chunk; j++) {
        for (l = 0; l < 4; l++) {
          b = rdkv__bits(slope[l][j]) >> 15;
          if (slope[l][j] <= 0 || b < bottom) break;
          h->bins[l * RDKV__FINE + rdkv__fine_bin(bottom, b)]++;
        }
      }
    }
    for (l = 0; l < 4; l++)
      for (bin = RDKV__FINE - 2; bin >= 0; bin--)
        h->bins[l * RDKV__FINE + bin] += h->bins[l * RDKV__FINE + bin + 1];
  }
}

static void rdkv__choose_all_k(const rdkv__solver *s, float threshold, int from_bin) {
  uint64_t i;
  for (i = 0; i < s->n_heads; i++)
    rdkv__choose_k(s, &s->heads[i], threshold,
                   from_bin < 0 ? s->heads[i].n_tokens : s->heads[i].bins[from_bin]);
}

/* Chooses the widths of s->heads for at most `budget` bytes, no less than rdkv__least_bytes.
   1. threshold from a histogram of V slopes, K for it, once more with the bytes that K takes (the
   lowest slope is taken 10 octaves lower where not all tokens are seen);
   2. exact bytes, whole tiles, over fine bins around it; 3. tile by tile below; 4. widths. */
static void rdkv__solve(const rdkv__solver *s, uint64_t budget, double *threshold_used) {
  uint64_t hist[RDKV_HISTOGRAM_BINS], i, sum;
  uint32_t each = 1; /* tokens that one stands for */
  float threshold = 0, base = 0, lowest = 0;
  int round, bin = 0, tries, raised = 0, lo = 0, hi = RDKV__FINE - RDKV__HIGH - 1;
  for (i = 0; i < s->n_heads; i++) /* start: K at 4 bits */
    s->heads[i].k_tile = (uint32_t)rdkv__pad16(s->cfg->k_dim) / 16 * 256;
  while (s->heads[0].n_tokens / RDKV__FEW / 2 >= each) each *= 2;
  for (round = 0; round < 2; round++) {
    memset(hist, 0, sizeof hist);
    for (i = 0; i < s->n_heads; i++)
      rdkv__spectrum(s, &s->heads[i], round ? threshold / 16 : 0, each, hist);
    for (bin = RDKV_HISTOGRAM_BINS - 1; round == 0 && bin > 0; bin--)
      if (hist[bin]) lowest = rdkv__bin_edge(each == 1 ? bin : bin > 81 ? bin - 80 : 1);
    threshold = rdkv__spectrum_edge(hist, budget / each);
    for (i = 0; i < s->n_heads; i++) {
      rdkv__head *h = &s->heads[i];
      uint32_t n = 0;
      for (bin = (int)(rdkv__bits(threshold) >> 20); bin < RDKV_HISTOGRAM_BINS; bin++)
        n += h->bins[bin];
      rdkv__choose_k(s, h, threshold, n * each);
    }
  }
  for (tries = 0;; tries++) { /* move the window until the budget lies in it */
    base = threshold / 2;
    rdkv__fine_bins(s, base);
    if (rdkv__bytes_at(s, hi) > budget) {
      if (threshold > 1e37f || tries > 80) { /* what cannot be left out: pins, K dropped */
        for (i = 0; i < s->n_heads; i++) rdkv__choose_k(s, &s->heads[i], FLT_MAX, 0);
        lo = RDKV__FINE;
        break;
      }
      threshold = threshold * 2 > lowest ? threshold * 2 : lowest;
      rdkv__choose_all_k(s, threshold, hi);
      raised = 1;
    } else if (base > 0 && tries <= 64 && rdkv__bytes_at(s, 0) <= budget) {
      threshold = base > lowest ? base : 0; /* below the lowest slope: everything */
      if (!raised) rdkv__choose_all_k(s, threshold, threshold > 0 ? 0 : -1); /* or it would swing */
    } else {
      while (lo < hi) { /* the lowest bin that fits */
        int mid = (lo + hi) / 2;
        if (rdkv__bytes_at(s, mid) <= budget)
          hi = mid;
        else
          lo = mid + 1;
      }
      break;
    }
  }
  threshold = lo < RDKV__FINE ? rdkv__fine_edge(base, lo) : FLT_MAX;
  *threshold_used = (double)threshold;
  sum = rdkv__bytes_at(s, lo);
  if (lo < RDKV__FINE) rdkv__spend(s, budget, budget - sum, lo);
  for (i = 0; i < s->n_heads; i++)
    rdkv__assign(s, &s->heads[i], lo < RDKV__FINE ? rdkv__fine_edge(base, 0) : FLT_MAX);
}

/* Predicted distortion of a head's widths. K of a head without tokens does not matter. */
static void rdkv__predict(const rdkv_config *cfg, const rdkv__head *h, double *v, double *k) {
  size_t n = h->n_tokens, kd = (size_t)cfg->k_dim, i, kept = 0;
  *v = *k = 0;
  for (i = 0; i < n; i++) {
    *v += (double)h->v_distortion[(size_t)rdkv__level(h->v_bits[i]) * n + i];
    kept += h->v_bits[i] != 0;
  }
  for (i = 0; i < kd && kept > 0; i++)
    *k += (double)h->k_distortion[(size_t)rdkv__level(h->k_bits[i]) * kd + i];
}

static double rdkv__predict_all(const rdkv__solver *s) {
  double sum = 0, v, k;
  uint64_t i;
  for (i = 0; i < s->n_heads; i++) rdkv__predict(s->cfg, &s->heads[i], &v, &k), sum += v + k;
  return sum;
}

/* The least that heads can take: what is pinned, K dropped. */
static uint64_t rdkv__least_bytes(const rdkv__solver *s, const rdkv__head *heads,
                                  uint64_t n_heads) {
  uint32_t count[5], channels[4] = {0, 0, 0, 0};
  rdkv__parts parts;
  uint64_t i, bytes = 0;
  int l;
  channels[0] = (uint32_t)s->cfg->k_dim;
  for (i = 0; i < n_heads; i++) {
    uint32_t before = heads[i].n_tokens, reach;
    for (l = 0; l < 4; l++) {
      reach = (uint32_t)rdkv__round_up(heads[i].pinned[l + 1], RDKV__TILE);
      reach = rdkv__min_u32(reach, heads[i].n_tokens);
      count[l] = before - reach, before = reach;
    }
    count[4] = before;
    bytes = rdkv__add(bytes,
                      rdkv__head_bytes(s->cfg->v_dim, s->cfg->positions, count, channels, &parts));
  }
  return bytes;
}

/* Widths at a given threshold, whole tiles. */
static void rdkv__solve_at(rdkv__solver *s, float threshold) {
  uint64_t hist[RDKV_HISTOGRAM_BINS], i;
  float base;
  int round, bin;
  for (i = 0; i < s->n_heads; i++)
    s->heads[i].k_tile = (uint32_t)rdkv__pad16(s->cfg->k_dim) / 16 * 256;
  memset(hist, 0, sizeof hist);
  for (round = 0; round < 2; round++) {
    for (i = 0; i < s->n_heads; i++) {
      uint32_t n = 0;
      rdkv__spectrum(s, &s->heads[i], threshold / 2, 1, hist);
      for (bin = (int)(rdkv__bits(threshold) >> 20); bin < RDKV_HISTOGRAM_BINS; bin++)
        n += s->heads[i].bins[bin];
      rdkv__choose_k(s, &s->heads[i], threshold, n);
    }
  }
  bin = (int)rdkv__min_u32(rdkv__bits(threshold) >> 15, RDKV__FINE / 2);
  base = rdkv__float(rdkv__bits(threshold) - ((uint32_t)bin << 15));
  rdkv__fine_bins(s, base);
  s->round_up = RDKV__TILE / 4; /* a tile may lack a quarter: no budget is exceeded */
  rdkv__bytes_at(s, bin);
  for (i = 0; i < s->n_heads; i++) rdkv__assign(s, &s->heads[i], rdkv__fine_edge(base, 0));
}

/* Where a short prompt's budget is only a few tiles a step of K is large against it and the
   threshold a poor guide: then K is tried dearer and cheaper, on tiny problems somewhat smaller
   budgets too (so that more bytes are not worse), and the best is taken. */
static void rdkv__solve_best(rdkv__solver *s, uint64_t budget, double *threshold_used) {
  static const float bias[7] = {1, 4, 0.25f, 16, 64, 2, 0.5f};
  uint64_t tile = (uint64_t)rdkv__pad16(s->cfg->k_dim + s->cfg->v_dim) / 16 * 256, b;
  uint64_t n = s->heads[0].n_tokens, least, best_budget = budget;
  double best = 0;
  int i, which = -1,
         n_bias = n >= 1024                         ? 1
                  : budget / tile < 8 * s->n_heads  ? 7
                  : budget / tile < 64 * s->n_heads ? 5
                                                    : 1;
  least = rdkv__least_bytes(s, s->heads, s->n_heads);
  if (least < budget / 4 * 3) least = budget / 4 * 3; /* far smaller ones are worse anyway */
  if (n * s->n_heads * (budget / 128) > 1 << 17) least = budget;
  for (b = budget;; b -= 128) {
    for (i = 0; i < n_bias; i++) {
      double sum;
      s->k_bias = bias[i];
      rdkv__solve(s, b, threshold_used);
      sum = rdkv__predict_all(s);
      if (which < 0 || sum < best) best = sum, which = i, best_budget = b;
    }
    if (b < least + 128) break;
  }
  if (n_bias > 1 || best_budget != budget) { /* the last one tried is not the one to keep */
    s->k_bias = bias[which];
    rdkv__solve(s, best_budget, threshold_used);
  }
}

/* ---- the authors' solver (Junkai1860/RDKV): float throughout, product and sum rounded apart -- */

/* Widths of a row at lambda; returns their sum. */
static uint64_t rdkv__paper_widths(const float *w, uint32_t n, const float eps[5], float lambda,
                                   uint8_t *bits) {
  float rate[5];
  uint64_t sum = 0;
  uint32_t i;
  int l;
  for (l = 0; l < 5; l++) rate[l] = rdkv__f(lambda * (float)rdkv__v_width[l]);
  for (i = 0; i < n; i++) {
    float best = rdkv__f(rdkv__f(w[i] * eps[0]) + rate[0]);
    int level = 0;
    for (l = 1; l < 5; l++) {
      float cost = rdkv__f(rdkv__f(w[i] * eps[l]) + rate[l]);
      if (cost < best) best = cost, level = l;
    }
    bits[i] = (uint8_t)rdkv__v_width[level];
    sum += (uint64_t)rdkv__v_width[level];
  }
  return sum;
}

/* Bisection as published: ends within 1 % of the mean width `budget`, or at the 64th midpoint. */
static void rdkv__paper_solve(const float *w, uint32_t n, const float eps[5], float budget,
                              uint8_t *bits) {
  float lo = 0, hi, max = 0, mid, mean;
  uint32_t i;
  int step;
  if (n == 0) return;
  for (i = 0; i < n; i++) max = w[i] > max ? w[i] : max;
  mean = (float)((double)rdkv__paper_widths(w, n, eps, 0, bits) / (double)n);
  if (mean <= budget) return;
  hi = rdkv__f(max * 0.375f);
  hi = hi > 1e-8f ? hi : 1e-8f;       /* the least ceiling that reproduces the authors' widths */
  for (step = 0; step < 64; step++) { /* the ceiling: 2^64 times is beyond any ratio of weights */
    mean = (float)((double)rdkv__paper_widths(w, n, eps, hi, bits) / (double)n);
    if (mean <= budget) break;
    hi = rdkv__f(hi * 2);
  }
  for (step = 0; step < 64; step++) {
    mid = rdkv__f(rdkv__f(lo + hi) * 0.5f);
    mean = (float)((double)rdkv__paper_widths(w, n, eps, mid, bits) / (double)n);
    if (rdkv__f(fabsf(rdkv__f(mean - budget))) <= rdkv__f(0.01f * budget)) return;
    if (mean > budget)
      lo = mid;
    else
      hi = mid;
  }
}

/* RDKV_PAPER for one layer and a budget of fp16-equivalent tokens a head. */
static void rdkv__paper_layer(const rdkv_config *cfg, rdkv_layer *l, double tokens) {
  float ev[5], ek[5], channel[RDKV__MAX_DIM];
  uint32_t n = l->n_tokens, t;
  int head, d, i, kd = cfg->k_dim;
  ev[0] = ek[0] = 1, ev[4] = ek[4] = 0;
  for (i = 0; i < 3; i++) ev[i + 1] = cfg->eps_v[i], ek[i + 1] = cfg->eps_k[i];
  for (head = 0; head < cfg->n_kv_heads; head++) {
    uint8_t *vb = l->v_bits + (size_t)head * n, *kb = l->k_bits + (size_t)head * (size_t)kd;
    uint32_t kept = 0;
    rdkv__paper_solve(l->token + (size_t)head * n, n, ev,
                      (float)((1 - cfg->k_share) * 2 * tokens * 16 / (double)n), vb);
    for (t = 0; t < n; t++) kept += vb[t] != 0;
    for (d = 0; d < kd; d++)
      channel[d] =
          rdkv__f(l->q_square[(size_t)(head * kd + d)] * l->k_square[(size_t)(head * kd + d)]);
    for (d = 0; d < kd; d++) kb[d] = 0;
    if (kept)
      rdkv__paper_solve(channel, (uint32_t)kd, ek,
                        (float)(cfg->k_share * 2 * tokens * 16 / (double)kept), kb);
  }
}

static int rdkv__all_finite(const float *p, size_t n) {
  size_t i;
  uint32_t bad = 0;
  for (i = 0; i < n; i++) bad |= (uint32_t)(rdkv__bits(p[i]) >= 0x7f800000); /* or negative */
  return !bad;
}

static uint64_t rdkv__allocate_layout(const rdkv_config *cfg, int n_layers, uint32_t n_tokens,
                                      rdkv__arena *arena, rdkv__solver *s) {
  uint64_t bytes = 0, n = rdkv__max_u32(n_tokens, 1);
  s->n_heads = (uint64_t)n_layers * (uint64_t)cfg->n_kv_heads;
  s->heads = (rdkv__head *)rdkv__take(arena, &bytes, s->n_heads, sizeof(rdkv__head));
  s->key = (uint32_t *)rdkv__take(arena, &bytes, n, 4);
  s->index = (uint32_t *)rdkv__take(arena, &bytes, n, 4);
  s->key2 = (uint32_t *)rdkv__take(arena, &bytes, n, 4);
  s->index2 = (uint32_t *)rdkv__take(arena, &bytes, n, 4);
  s->pins = (uint8_t *)rdkv__take(arena, &bytes, cfg->n_pins ? rdkv__mul(s->n_heads, n) : 0, 1);
  return bytes;
}

RDKV_DEF size_t rdkv_allocate_scratch(const rdkv_config *cfg, int n_layers, uint32_t n_tokens) {
  rdkv__solver s;
  if (!rdkv__resolved(cfg) || n_layers < 1 || n_tokens > RDKV__MAX_TOKENS) return 0;
  return rdkv__size(rdkv__allocate_layout(cfg, n_layers, n_tokens, NULL, &s));
}

static void rdkv__head_begin(const rdkv_config *cfg, const rdkv_layer *l, int head, rdkv__head *h) {
  size_t n = l->n_tokens, kd = (size_t)cfg->k_dim;
  memset(h, 0, sizeof *h);
  h->n_tokens = l->n_tokens;
  h->v_distortion = l->v_distortion + (size_t)head * 5 * n;
  h->k_distortion = l->k_distortion + (size_t)head * 4 * kd;
  h->v_bits = l->v_bits + (size_t)head * n, h->k_bits = l->k_bits + (size_t)head * kd;
  h->k_tile = (uint32_t)rdkv__pad16(cfg->k_dim) / 16 * 256;
}

/* Fills in a head's pins. */
static void rdkv__pin(const rdkv__solver *s, rdkv__head *h, uint8_t *levels) {
  const rdkv_config *cfg = s->cfg;
  uint32_t t, n, m;
  int i, l;
  if (cfg->n_pins == 0) return;
  h->pin = levels;
  memset(levels, 0, h->n_tokens);
  for (i = 0; i < cfg->n_pins; i++) {
    const rdkv_pin *p = &cfg->pins[i];
    uint32_t end = rdkv__min_u32(p->end, h->n_tokens);
    for (t = p->begin, n = 0; t < end; t++)
      s->key[n] = rdkv__bits(h->v_distortion[t]), s->index[n++] = t;
    m = n;
    if (p->share > 0 && p->share < 1) {
      m = rdkv__min_u32((uint32_t)ceil((double)p->share * (double)n), n);
      rdkv__sort(s, n);
    }
    for (t = 0; t < m; t++) {
      l = rdkv__level(p->min_bits);
      if (levels[s->index[t]] < l) levels[s->index[t]] = (uint8_t)l;
    }
  }
  for (t = 0; t < h->n_tokens; t++)
    for (l = 1; l <= levels[t]; l++) h->pinned[l]++;
}

RDKV_DEF rdkv_status rdkv_allocate(const rdkv_config *cfg, rdkv_layer *layers, int n_layers,
                                   void *scratch, size_t scratch_bytes) {
  rdkv__solver s, part;
  rdkv__arena arena;
  rdkv_status st;
  uint64_t budget, left, i, n_parts, each, fixed;
  uint32_t n, l;
  int a, head;
  if (!rdkv__resolved(cfg) || layers == NULL || n_layers < 1 || n_layers > cfg->n_layers)
    return RDKV_ERR_ARGUMENT;
  n = layers[0].n_tokens;
  for (a = 0; a < n_layers; a++)
    if (!rdkv__layer_ok(&layers[a]) || layers[a].n_tokens != n) return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_allocate_scratch(cfg, n_layers, n), &arena);
  if (st != RDKV_OK) return st;
  rdkv__allocate_layout(cfg, n_layers, n, &arena, &s);
  s.k_bias = 1, s.round_up = 0, s.cfg = cfg, s.kn = rdkv__kernels_of(cfg->isa);
  for (a = 0; a < n_layers; a++) {
    size_t h = (size_t)cfg->n_kv_heads, kd = (size_t)cfg->k_dim;
    if (cfg->profile == RDKV_PAPER ? !rdkv__all_finite(layers[a].token, h * n) ||
                                         !rdkv__all_finite(layers[a].q_square, h * kd) ||
                                         !rdkv__all_finite(layers[a].k_square, h * kd)
                                   : !rdkv__all_finite(layers[a].v_distortion, 5 * h * n) ||
                                         !rdkv__all_finite(layers[a].k_distortion, 4 * h * kd))
      return RDKV_ERR_NONFINITE;
  }
  budget = rdkv__budget(cfg, n, n_layers);
  if (cfg->profile == RDKV_PAPER) {
    double lo = 0, hi = 2 * (double)n + 1, tokens = cfg->token_budget;
    int step;
    if (tokens == 0 && cfg->budget_bytes == 0) tokens = cfg->keep * (double)n;
    for (step = 0; tokens == 0 && step < 24; step++) { /* most tokens whose block fits */
      double mid = (lo + hi) / 2;
      size_t bytes;
      for (a = 0; a < n_layers; a++) rdkv__paper_layer(cfg, &layers[a], mid);
      bytes = rdkv_block_bytes(cfg, layers, n_layers);
      if (bytes > 0 && bytes <= budget)
        lo = mid;
      else
        hi = mid;
    }
    if (tokens == 0) tokens = lo;
    for (a = 0; a < n_layers; a++) rdkv__paper_layer(cfg, &layers[a], tokens);
    if (cfg->budget_bytes > 0 && cfg->token_budget == 0 &&
        rdkv_block_bytes(cfg, layers, n_layers) > budget) {
      for (a = 0; a < n_layers; a++) rdkv__clear(cfg, &layers[a]);
      return RDKV_ERR_BUDGET;
    }
    return RDKV_OK;
  }
  for (a = 0, i = 0; a < n_layers; a++) {
    for (head = 0; head < cfg->n_kv_heads; head++, i++) {
      rdkv__head_begin(cfg, &layers[a], head, &s.heads[i]);
      rdkv__pin(&s, &s.heads[i], s.pins + i * n);
    }
  }
  fixed = rdkv__fixed_bytes(s.n_heads);
  if (cfg->scope == RDKV_SCOPE_LAMBDA) {
    rdkv__solve_at(&s, cfg->lambda > (double)FLT_MAX ? FLT_MAX : (float)cfg->lambda);
    for (a = 0; a < n_layers; a++) layers[a].lambda = cfg->lambda;
    return RDKV_OK;
  }
  if (cfg->max_error > 0) { /* the smallest budget that meets the target, within 0.1 % */
    double target = 0, used = 0;
    uint64_t lo = rdkv__least_bytes(&s, s.heads, s.n_heads) / 128;
    uint64_t hi = rdkv__max_block(cfg, n, n_layers) / 128, mid = hi;
    for (i = 0; i < s.n_heads; i++)
      for (l = 0; l < n; l++) target += (double)s.heads[i].v_distortion[l];
    target *= cfg->max_error;
    rdkv__solve(&s, hi * 128, &used);
    if (rdkv__predict_all(&s) > target) { /* beyond 16-bit V and 8-bit K */
      for (a = 0; a < n_layers; a++) rdkv__clear(cfg, &layers[a]);
      return RDKV_ERR_BUDGET;
    }
    while (hi - lo > hi / 1024) {
      mid = lo + (hi - lo) / 2;
      rdkv__solve(&s, mid * 128, &used);
      if (rdkv__predict_all(&s) <= target)
        hi = mid;
      else
        lo = mid + 1;
    }
    if (mid != hi) rdkv__solve(&s, hi * 128, &used);
    for (a = 0; a < n_layers; a++) layers[a].lambda = used;
    return RDKV_OK;
  }
  n_parts = cfg->scope == RDKV_SCOPE_MODEL   ? 1
            : cfg->scope == RDKV_SCOPE_LAYER ? (uint64_t)n_layers
                                             : s.n_heads;
  each = s.n_heads / n_parts;
  for (i = 0; i < n_parts; i++)
    if (budget < fixed ||
        (budget - fixed) / n_parts / 128 * 128 < rdkv__least_bytes(&s, s.heads + i * each, each))
      return RDKV_ERR_BUDGET;
  for (i = 0, left = budget - fixed; i < n_parts; i++) { /* equal parts; crumbs go on to the next */
    uint64_t h;
    double used = 0;
    rdkv__parts p;
    part = s;
    part.heads = s.heads + i * each, part.n_heads = each;
    rdkv__solve_best(&part, left / (n_parts - i) / 128 * 128, &used);
    for (h = i * each; h < (i + 1) * each; h++) {
      left -=
          rdkv__head_bytes(cfg->v_dim, cfg->positions, s.heads[h].count, s.heads[h].channels, &p);
      layers[h / (uint64_t)cfg->n_kv_heads].lambda = used;
    }
  }
  return RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_histogram_add(const rdkv_config *cfg, const rdkv_layer *layer,
                                        rdkv_histogram *histogram) {
  rdkv__solver s;
  rdkv__head h;
  int head;
  if (!rdkv__resolved(cfg) || !rdkv__layer_ok(layer) || histogram == NULL) return RDKV_ERR_ARGUMENT;
  memset(&s, 0, sizeof s);
  s.cfg = cfg, s.kn = rdkv__kernels_of(cfg->isa);
  for (head = 0; head < cfg->n_kv_heads; head++) {
    rdkv__head_begin(cfg, layer, head, &h);
    rdkv__count(h.k_bits, (uint32_t)cfg->k_dim, h.channels, 4);
    if (h.channels[0] < (uint32_t)cfg->k_dim) { /* K is chosen already */
      rdkv__parts p;
      rdkv__head_bytes(cfg->v_dim, 0, h.count, h.channels, &p);
      h.k_tile = p.k_tile;
    }
    rdkv__spectrum(&s, &h, 0, 1, histogram->bytes);
  }
  return RDKV_OK;
}

RDKV_DEF void rdkv_histogram_merge(rdkv_histogram *dst, const rdkv_histogram *src) {
  int i;
  for (i = 0; i < RDKV_HISTOGRAM_BINS; i++) dst->bytes[i] = rdkv__add(dst->bytes[i], src->bytes[i]);
}

RDKV_DEF double rdkv_histogram_lambda(const rdkv_histogram *histogram, uint64_t budget_bytes) {
  return (double)rdkv__spectrum_edge(histogram->bytes, budget_bytes);
}

/* ---- >>impl-pack : format v1 ----------------------------------------------------------------- */

RDKV_DEF size_t rdkv_block_bound(const rdkv_config *cfg, uint32_t n_tokens) {
  uint64_t bytes, budget;
  if (!rdkv__resolved(cfg) || n_tokens > RDKV__MAX_TOKENS) return 0;
  bytes = rdkv__max_block(cfg, n_tokens, cfg->n_layers);
  budget = rdkv__budget(cfg, n_tokens, cfg->n_layers);
  if (cfg->profile == RDKV_JOINT && cfg->scope != RDKV_SCOPE_LAMBDA && cfg->max_error == 0 &&
      budget < bytes)
    bytes = budget;
  return rdkv__size(bytes);
}

/* Counts of one head of a layer; 0 if a width does not exist. */
static int rdkv__head_counts(const rdkv_config *cfg, const rdkv_layer *l, int head,
                             uint32_t count[5], uint32_t channels[4]) {
  size_t n = l->n_tokens, kd = (size_t)cfg->k_dim, i;
  const uint8_t *vb = l->v_bits + (size_t)head * n, *kb = l->k_bits + (size_t)head * kd;
  for (i = 0; i < n; i++)
    if (rdkv__level(vb[i]) < 0) return 0;
  for (i = 0; i < kd; i++)
    if (rdkv__level(kb[i]) < 0 || (kb[i] == 16 && cfg->profile != RDKV_PAPER)) return 0;
  rdkv__count(vb, l->n_tokens, count, 5);
  rdkv__count(kb, (uint32_t)kd, channels, 4);
  return 1;
}

RDKV_DEF size_t rdkv_block_bytes(const rdkv_config *cfg, const rdkv_layer *layers, int n_layers) {
  uint64_t bytes;
  uint32_t count[5], channels[4];
  rdkv__parts p;
  int a, head;
  if (!rdkv__resolved(cfg) || layers == NULL || n_layers < 1) return 0;
  bytes = rdkv__fixed_bytes((uint64_t)n_layers * (uint64_t)cfg->n_kv_heads);
  for (a = 0; a < n_layers; a++) {
    if (!rdkv__layer_ok(&layers[a])) return 0;
    for (head = 0; head < cfg->n_kv_heads; head++) {
      if (!rdkv__head_counts(cfg, &layers[a], head, count, channels)) return 0;
      bytes = rdkv__add(bytes, rdkv__head_bytes(cfg->v_dim, cfg->positions, count, channels, &p));
    }
  }
  return rdkv__size(bytes);
}

static uint64_t rdkv__mix(uint64_t x) { /* splitmix64's finaliser */
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

RDKV_DEF uint64_t rdkv_checksum(const void *data, size_t bytes, uint64_t first_word) {
  const uint8_t *p = (const uint8_t *)data;
  uint64_t sum = 0, salt = (first_word + 1) * 0x9e3779b97f4a7c15u, w;
  size_t i;
  for (i = 0; i + 8 <= bytes; i += 8, salt += 0x9e3779b97f4a7c15u) {
    memcpy(&w, p + i, 8);
    sum += rdkv__mix(w + salt);
  }
  if (i < bytes) {
    w = 0;
    memcpy(&w, p + i, bytes - i);
    sum += rdkv__mix(w + salt);
  }
  return sum;
}

/* Checksum of a block's head; its own field, word 3, counts as zero. */
static uint64_t rdkv__head_sum(const uint8_t *block, const rdkv_header *h) {
  uint64_t salt = 4 * 0x9e3779b97f4a7c15u;
  return rdkv_checksum(block, (size_t)h->head_bytes, 0) - rdkv__mix(h->head_sum + salt) +
         rdkv__mix(salt);
}

/* Channels of a head in table order: runs of 2, 4, 8 bits, -1 in pads, then those dropped. */
typedef struct rdkv__table {
  int16_t channel[16 * RDKV__MAX_BLOCKS + RDKV__MAX_DIM];
  int n, n_all; /* padded channels; and with those dropped */
} rdkv__table;

static void rdkv__order_channels(const uint8_t *k_bits, int kd, rdkv__table *t) {
  int l, d;
  t->n = 0;
  for (l = 1; l < 4; l++) {
    for (d = 0; d < kd; d++) {
      int level = rdkv__level(k_bits[d]);
      if ((level > 3 ? 3 : level) == l) t->channel[t->n++] = (int16_t)d;
    }
    while (t->n % 16) t->channel[t->n++] = -1;
  }
  t->n_all = t->n;
  for (d = 0; d < kd; d++)
    if (k_bits[d] == 0) t->channel[t->n_all++] = (int16_t)d;
}

/* Four neighbouring codes, one a byte (2 pr + e), to where a word holds them; and two (e). */
static uint32_t rdkv__spread_k(int level, uint32_t x) {
  if (level == 1) return (x & 0x3) | (x & 0x300) << 8 | (x & 0x30000) >> 14 | (x & 0x3000000) >> 6;
  return (x & 0xf) | (x & 0xf00) << 8 | (x & 0xf0000) >> 12 | (x & 0xf000000) >> 4;
}
static uint32_t rdkv__spread_v(uint32_t x) { return (x & 0xff) | (x & 0xff00) << 8; }

static uint32_t rdkv__load_u32(const uint8_t *p) {
  uint32_t x;
  memcpy(&x, p, 4);
  return x;
}
static uint32_t rdkv__load_u16(const uint8_t *p) {
  uint16_t x;
  memcpy(&x, p, 2);
  return x;
}

/* Writes a K block from codes [32 tokens][PACKED], 16 channels from codes on. */
static void rdkv__put_k(uint32_t *words, int level, const uint8_t *codes) {
  int g, t, sub;
  for (g = 0; g < 8; g++) {
    for (t = 0; t < 4; t++) {
      for (sub = 0; sub < 2; sub++) {
        const uint8_t *from = codes + (16 * sub + g) * RDKV__PACKED + 4 * t;
        uint32_t r0 = rdkv__load_u32(from), r1 = rdkv__load_u32(from + 8 * RDKV__PACKED);
        uint32_t *to = words + (4 * g + t) * (1 << (level - 1));
        if (level == 3) { /* bytes e of pr 0 and pr 1 */
          to[2 * sub] = (r0 & 0xffff) | r1 << 16;
          to[2 * sub + 1] = r0 >> 16 | (r1 & 0xffff0000);
        } else {
          r0 = rdkv__spread_k(level, r0) | rdkv__spread_k(level, r1) << 8;
          if (level == 1)
            *to = sub ? *to | r0 << 4 : r0;
          else
            to[sub] = r0;
        }
      }
    }
  }
}

/* Writes a V block from codes [16 dims][32 tokens]. */
static void rdkv__put_v(uint32_t *words, int level, const uint8_t *codes) {
  int g, t, sub, pr;
  for (g = 0; g < 8; g++) {
    for (t = 0; t < 4; t++) {
      uint32_t *to = words + (4 * g + t) * (1 << (level - 1));
      if (level == 1) *to = 0;
      for (sub = 0; sub < 2; sub++) {
        for (pr = 0; pr < 2; pr++) {
          const uint8_t *from = codes + g * RDKV__TILE + 16 * sub + 8 * pr + 2 * t;
          uint32_t r0 = rdkv__load_u16(from), r1 = rdkv__load_u16(from + 8 * RDKV__TILE);
          if (level == 3) {
            to[2 * sub + pr] = r0 | r1 << 16;
          } else {
            r0 = rdkv__spread_v(r0) | rdkv__spread_v(r1) << 8;
            if (level == 1)
              *to |= r0 << (4 * sub + 2 * pr);
            else
              to[sub] = pr ? to[sub] | r0 << 4 : r0;
          }
        }
      }
    }
  }
}

/* One head: its table, positions and tiles into a zeroed block. */
static void rdkv__pack_head(const rdkv_config *cfg, const rdkv__kernels *kn, const rdkv_kv *kv,
                            const rdkv_layer *l, int head, const rdkv_record *rec, uint8_t *block,
                            rdkv__work *w) {
  int kd = cfg->k_dim, vd = cfg->v_dim, kp = rdkv__pad16(kd), vp = rdkv__pad16(vd), d, i, level;
  int paper = cfg->profile == RDKV_PAPER;
  const uint8_t *v_bits = l->v_bits + (size_t)head * l->n_tokens;
  const uint8_t *k_bits = l->k_bits + (size_t)head * (size_t)kd;
  float *mid = w->channel, *inv = mid + RDKV__PACKED, *from = inv + RDKV__PACKED;
  float *to = from + RDKV__PACKED, *x = to + RDKV__PACKED; /* in table order */
  float *lo = x + RDKV__PACKED, *hi = lo + RDKV__MAX_DIM, *sum = hi + RDKV__MAX_DIM;
  uint16_t *scales = (uint16_t *)(void *)(block + rec->table), *mids;
  uint8_t *channels, *tile = block + rec->tile;
  uint32_t *position = (uint32_t *)(void *)(block + rec->position);
  rdkv__zero_point zero[RDKV__MAX_DIM];
  rdkv__table table;
  uint8_t width[RDKV__PACKED], row_code[RDKV__MAX_DIM];
  int blocks[4];
  uint32_t n = 0, t, run, first;
  for (level = 1; level < 5; level++)
    for (t = 0; t < l->n_tokens; t++)
      if (v_bits[t] == rdkv__v_width[level]) w->order[n++] = t;
  for (level = 1, blocks[0] = 0; level < 4; level++) /* where each run of channels ends */
    blocks[level] = blocks[level - 1] + (rec->n_channels[level - 1] + 15) / 16;
  /* channel table */
  for (d = 0; d < kp; d++) lo[d] = FLT_MAX, hi[d] = -FLT_MAX;
  memset(sum, 0, 4 * RDKV__MAX_DIM * sizeof(float));
  for (t = first = 0; t < l->n_tokens; t++) {
    if (t + RDKV__AHEAD < l->n_tokens && v_bits[t + RDKV__AHEAD])
      rdkv__ahead(&kv->k, t + RDKV__AHEAD, head, kd);
    if (v_bits[t] == 0) continue;
    rdkv__carry(sum, RDKV__MAX_DIM, kd, first, t);
    rdkv__row(kn, &kv->k, first = t, head, kd, w->rows);
    kn->range(w->rows, kp, lo, hi, sum);
  }
  rdkv__carry(sum, RDKV__MAX_DIM, kd, first, UINT32_MAX);
  rdkv__order_channels(k_bits, kd, &table);
  mids = scales + table.n, channels = (uint8_t *)(mids + table.n_all);
  memset(mid, 0, 4 * RDKV__PACKED * sizeof(float));
  for (i = 0; i < table.n_all && n > 0; i++) {
    rdkv__affine a;
    int bits;
    d = table.channel[i];
    if (d < 0) continue;
    bits = k_bits[d] > 8 ? 8 : k_bits[d];
    if (bits == 0) {
      mids[i] = paper ? 0 : rdkv__to_half(rdkv__f(sum[3 * RDKV__MAX_DIM + d] / (float)n));
      continue;
    }
    if (paper) {
      zero[d] = rdkv__fit_paper(lo[d], hi[d], bits);
      a = rdkv__affine_paper(zero[d], bits);
    } else {
      a = rdkv__fit(lo[d], hi[d], bits);
    }
    scales[i] = rdkv__to_half(a.scale), mids[i] = rdkv__to_half(a.mid);
    mid[i] = a.mid, inv[i] = a.inv, width[i] = (uint8_t)bits;
    from[i] = -(float)(1 << (bits - 1)), to[i] = -from[i] - 1;
  }
  for (i = 0; i < table.n_all; i++)
    channels[i] = (uint8_t)(table.channel[i] < 0 ? 0 : table.channel[i]);
  /* tiles */
  for (level = 1, run = 0; level < 5; run += rec->n_tokens[level - 1], level++) {
    for (first = 0; first < rec->n_tokens[level - 1]; first += RDKV__TILE) {
      uint32_t in_tile = rdkv__min_u32(rec->n_tokens[level - 1] - first, RDKV__TILE);
      const uint32_t *order = w->order + run + first;
      uint32_t *words = (uint32_t *)(void *)tile;
      uint16_t *params;
      int kl;
      memset(w->codes, 0, RDKV__TILE * RDKV__PACKED);
      for (t = 0; t < in_tile; t++) { /* in table order; pads have code 0 */
        uint8_t *code = w->codes + t * RDKV__PACKED;
        if (first + t + RDKV__AHEAD < rec->n_tokens[level - 1])
          rdkv__ahead(&kv->k, order[t + RDKV__AHEAD], head, kd);
        rdkv__row(kn, &kv->k, order[t], head, kd, w->rows);
        for (i = 0; i < table.n; i++) {
          d = table.channel[i];
          if (paper)
            code[i] = d < 0 ? 0 : (uint8_t)rdkv__code_paper(w->rows[d], zero[d], width[i]);
          else
            x[i] = d < 0 ? 0 : w->rows[d];
        }
        if (!paper) kn->quantise(x, table.n, mid, inv, from, to, code);
      }
      for (i = 0, kl = 1; i < table.n; i += 16) {
        while (i >= 16 * blocks[kl]) kl++;
        rdkv__put_k(words, kl, w->codes + i);
        words += 16 << kl;
      }
      params = (uint16_t *)(void *)words;
      words += 32;
      memset(w->codes, 0, RDKV__TILE * RDKV__MAX_DIM); /* now [dim][token] */
      for (t = 0; t < in_tile; t++) {
        uint32_t slot = 2 * (4 * (t & 7) + (t >> 3));
        float vlo, vhi;
        if (first + t + RDKV__AHEAD < rec->n_tokens[level - 1])
          rdkv__ahead(&kv->v, order[t + RDKV__AHEAD], head, vd);
        rdkv__row(kn, &kv->v, order[t], head, vd, w->rows);
        if (level == 4) {
          uint16_t *half = (uint16_t *)(void *)words;
          uint32_t sub = t >> 4, pr = (t >> 3) & 1, tt = (t >> 1) & 3, e = t & 1;
          for (d = 0; d < vd; d++) {
            uint32_t lane = 4 * ((uint32_t)d & 7) + tt, r = ((uint32_t)d >> 3) & 1;
            uint32_t b = sub * (uint32_t)(vp / 16) + (uint32_t)d / 16;
            half[2 * ((b * 32 + lane) * 4 + r + 2 * pr) + e] = rdkv__to_half(w->rows[d]);
          }
          params[slot] = 0x3c00; /* scale 1, mid 0: a half is its own value */
          continue;
        }
        kn->ends(w->rows, vd, &vlo, &vhi);
        if (paper) {
          rdkv__zero_point z = rdkv__fit_paper(vlo, vhi, 1 << level);
          rdkv__affine a = rdkv__affine_paper(z, 1 << level);
          params[slot] = rdkv__to_half(a.scale), params[slot + 1] = rdkv__to_half(a.mid);
          for (d = 0; d < vd; d++)
            row_code[d] = (uint8_t)rdkv__code_paper(w->rows[d], z, 1 << level);
        } else {
          rdkv__affine a = rdkv__fit(vlo, vhi, 1 << level);
          float least = -(float)(1 << ((1 << level) - 1)), most = -least - 1;
          params[slot] = rdkv__to_half(a.scale), params[slot + 1] = rdkv__to_half(a.mid);
          kn->quantise_one(w->rows, vp, &a.mid, &a.inv, &least, &most, row_code);
        }
        for (d = 0; d < vd; d++) w->codes[d * RDKV__TILE + (int)t] = row_code[d];
      }
      for (i = 0; i < vp / 16 && level < 4; i++)
        rdkv__put_v(words + i * (16 << level), level, w->codes + i * 16 * RDKV__TILE);
      words += vp / 16 * (16 << level);
      tile = (uint8_t *)words;
      if (cfg->positions) {
        for (t = 0; t < RDKV__TILE; t++) *position++ = t < in_tile ? order[t] : UINT32_MAX;
      }
    }
  }
}

RDKV_DEF rdkv_status rdkv_pack(const rdkv_config *cfg, const rdkv_kv *kv, const rdkv_layer *layers,
                               int n_layers, int first_layer, uint64_t token_begin, void *block,
                               size_t capacity, size_t *bytes, void *scratch,
                               size_t scratch_bytes) {
  const rdkv__kernels *kn;
  rdkv__work w;
  rdkv_status st;
  rdkv_header *h = (rdkv_header *)block;
  rdkv_record *rec;
  rdkv__head state;
  uint8_t *out = (uint8_t *)block;
  uint64_t table, position, tile;
  uint32_t n, count[5], channels[4], t;
  size_t total;
  int a, head, l, j;
  if (!rdkv__resolved(cfg) || kv == NULL || layers == NULL || n_layers < 1 || n_layers > 65535 ||
      first_layer < 0 || block == NULL || bytes == NULL)
    return RDKV_ERR_ARGUMENT;
  n = layers[0].n_tokens;
  for (a = 0; a < n_layers; a++) {
    if (!rdkv__layer_ok(&layers[a]) || layers[a].n_tokens != n) return RDKV_ERR_ARGUMENT;
    if (n > 0 && (!rdkv__tensor_ok(&kv[a].k) || !rdkv__tensor_ok(&kv[a].v)))
      return RDKV_ERR_ARGUMENT;
    for (head = 0; head < cfg->n_kv_heads; head++)
      if (!rdkv__head_counts(cfg, &layers[a], head, count, channels)) return RDKV_ERR_CONFIG;
  }
  if (!rdkv__aligned(block, 128)) return RDKV_ERR_ALIGNMENT;
  total = rdkv_block_bytes(cfg, layers, n_layers);
  if (total == 0) return RDKV_ERR_OVERFLOW;
  if (capacity < total) return RDKV_ERR_MEMORY;
  st = rdkv__work_begin(cfg, n, scratch, scratch_bytes, &w);
  if (st != RDKV_OK) return st;
  kn = rdkv__kernels_of(cfg->isa);
  for (a = 0; a < n_layers; a++) { /* nothing is written before all of the input is known good */
    for (head = 0; head < cfg->n_kv_heads; head++)
      for (t = 0; t < n; t++)
        if (layers[a].v_bits[(size_t)head * n + t] &&
            (!rdkv__row(kn, &kv[a].k, t, head, cfg->k_dim, w.rows) ||
             !rdkv__row(kn, &kv[a].v, t, head, cfg->v_dim, w.rows)))
          return RDKV_ERR_NONFINITE;
  }
  memset(block, 0, total);
  h->magic = RDKV__MAGIC, h->version = RDKV_FORMAT_VERSION, h->total_bytes = total;
  h->first_layer = (uint32_t)first_layer, h->n_layers = (uint32_t)n_layers;
  h->n_q_heads = (uint32_t)cfg->n_q_heads, h->n_kv_heads = (uint32_t)cfg->n_kv_heads;
  h->k_dim = (uint32_t)cfg->k_dim, h->v_dim = (uint32_t)cfg->v_dim;
  h->token_begin = token_begin, h->n_tokens = n, h->positions = (uint32_t)cfg->positions;
  h->profile = (uint32_t)cfg->profile, h->scope = (uint32_t)cfg->scope;
  h->window = (uint32_t)cfg->window, h->pool = (uint32_t)cfg->pool;
  h->softmax_scale = cfg->softmax_scale, h->k_share = (float)cfg->k_share;
  memcpy(h->eps_k, cfg->eps_k, sizeof h->eps_k), memcpy(h->eps_v, cfg->eps_v, sizeof h->eps_v);
  h->keep = cfg->keep, h->max_error = cfg->max_error, h->token_budget = cfg->token_budget;
  h->lambda = layers[0].lambda, h->budget_bytes = cfg->budget_bytes;
  rec = (rdkv_record *)(void *)(out + sizeof *h);
  table = rdkv__fixed_bytes((uint64_t)n_layers * (uint64_t)cfg->n_kv_heads);
  for (j = 0; j < 3; j++) { /* offsets of all tables, then of all positions, then of all tiles */
    uint64_t *at = j == 0 ? &table : j == 1 ? &position : &tile;
    if (j == 1) h->head_bytes = position = table;
    if (j == 2) tile = position;
    for (a = 0; a < n_layers; a++) {
      for (head = 0; head < cfg->n_kv_heads; head++) {
        rdkv_record *r = &rec[a * cfg->n_kv_heads + head];
        rdkv__parts p;
        rdkv__head_counts(cfg, &layers[a], head, count, channels);
        rdkv__head_bytes(cfg->v_dim, cfg->positions, count, channels, &p);
        if (j == 0) {
          double v, k;
          for (l = 0; l < 4; l++) r->n_tokens[l] = count[l + 1];
          for (l = 0; l < 3; l++) r->n_channels[l] = (uint16_t)channels[l + 1];
          r->n_dropped = (uint16_t)channels[0];
          if (cfg->profile == RDKV_JOINT) {
            rdkv__head_begin(cfg, &layers[a], head, &state);
            rdkv__predict(cfg, &state, &v, &k);
            r->v_distortion = (float)v, r->k_distortion = (float)k;
          }
          r->table = *at, *at += p.table;
        } else if (j == 1) {
          r->position = cfg->positions ? *at : 0, *at += p.positions;
        } else {
          r->tile = *at, *at += p.tiles;
        }
      }
    }
  }
  RDKV_ASSERT(tile == total);
  for (a = 0; a < n_layers; a++)
    for (head = 0; head < cfg->n_kv_heads; head++)
      rdkv__pack_head(cfg, kn, &kv[a], &layers[a], head, &rec[a * cfg->n_kv_heads + head], out, &w);
  h->body_sum =
      rdkv_checksum(out + h->head_bytes, total - (size_t)h->head_bytes, h->head_bytes / 8);
  h->head_sum = rdkv__head_sum(out, h);
  *bytes = total;
  return RDKV_OK;
}

/* Memory of a whole-model call: every layer, and scratch for one stage at a time. */
static uint64_t rdkv__compress_layout(const rdkv_config *cfg, int n_layers, uint32_t n_tokens,
                                      rdkv__arena *arena, rdkv_layer **layers, uint8_t **mem,
                                      uint8_t **scratch, uint64_t *scratch_bytes) {
  uint64_t bytes = 0, each = rdkv__round_up(rdkv_layer_bytes(cfg, n_tokens), 64);
  uint64_t a = rdkv_layer_scratch(cfg, n_tokens),
           b = rdkv_allocate_scratch(cfg, n_layers, n_tokens);
  if (each == 0 || a == 0 || b == 0) return UINT64_MAX;
  *scratch_bytes = a > b ? a : b;
  *layers = (rdkv_layer *)rdkv__take(arena, &bytes, (uint64_t)n_layers, sizeof(rdkv_layer));
  *mem = (uint8_t *)rdkv__take(arena, &bytes, (uint64_t)n_layers, (size_t)each);
  *scratch = (uint8_t *)rdkv__take(arena, &bytes, *scratch_bytes, 1);
  return bytes;
}

static size_t rdkv__compress_bytes(const rdkv_config *cfg, int n_layers, uint32_t n_tokens) {
  rdkv_layer *layers;
  uint8_t *mem, *scratch;
  uint64_t sb;
  if (!rdkv__resolved(cfg) || n_tokens > RDKV__MAX_TOKENS) return 0;
  return rdkv__size(
      rdkv__compress_layout(cfg, n_layers, n_tokens, NULL, &layers, &mem, &scratch, &sb));
}

RDKV_DEF size_t rdkv_compress_scratch(const rdkv_config *cfg, uint32_t n_tokens) {
  size_t bytes = cfg ? rdkv__compress_bytes(cfg, cfg->n_layers, n_tokens) : 0;
  if (bytes == 0 || cfg->n_pins <= 0) return bytes;
  return rdkv__size(rdkv__add(bytes, rdkv__round_up((uint64_t)cfg->n_pins * sizeof(rdkv_pin), 64)));
}

RDKV_DEF size_t rdkv_stream_scratch(const rdkv_config *cfg, uint32_t n_tokens) {
  size_t bytes = rdkv__compress_bytes(cfg, 1, n_tokens);
  return bytes ? rdkv__size(rdkv__add(bytes, 2 * sizeof(rdkv_histogram))) : 0;
}

/* The config's pins as a range that starts at token_begin sees them. */
static const rdkv_pin *rdkv__move_pins(const rdkv_config *cfg, uint64_t token_begin,
                                       rdkv__arena *arena) {
  rdkv_pin *pins;
  int i;
  if (cfg->n_pins <= 0 || token_begin == 0) return cfg->pins;
  pins = (rdkv_pin *)rdkv__take(arena, NULL, (uint64_t)cfg->n_pins, sizeof *pins);
  for (i = 0; i < cfg->n_pins; i++) {
    pins[i] = cfg->pins[i];
    pins[i].begin = pins[i].begin > token_begin ? pins[i].begin - (uint32_t)token_begin : 0;
    pins[i].end = pins[i].end > token_begin ? pins[i].end - (uint32_t)token_begin : 0;
  }
  return pins;
}

/* Scores each layer, by its own last queries or by those handed in, measures it, allocates over all
   and packs. K is measured over the tokens likely to be kept: measuring it again over those that
   were kept, and allocating again, was no better in the answers of a trained model. */
static rdkv_status rdkv__compress(const rdkv_config *cfg, const rdkv_kv *kv, const rdkv_queries *by,
                                  uint32_t n_tokens, uint64_t token_begin, void *block,
                                  size_t capacity, size_t *bytes, void *scratch,
                                  size_t scratch_bytes) {
  rdkv_config moved;
  rdkv__arena arena;
  rdkv_layer *layers;
  rdkv_status st;
  uint8_t *mem, *work;
  uint64_t work_bytes;
  size_t each;
  int a;
  if (!rdkv__resolved(cfg) || kv == NULL || block == NULL || bytes == NULL)
    return RDKV_ERR_ARGUMENT;
  for (a = 0; by && a < cfg->n_layers; a++)
    if (n_tokens > 0 && (by[a].n < 1 || by[a].n > RDKV__MAX_TOKENS ||
                         by[a].position > RDKV__MAX_TOKENS || by[a].position + by[a].n < n_tokens ||
                         (by[a].out.data != NULL && !rdkv__tensor_ok(&by[a].out)) ||
                         (by[a].lse_stride && by[a].lse_stride < (size_t)cfg->n_q_heads)))
      return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_compress_scratch(cfg, n_tokens), &arena);
  if (st != RDKV_OK) return st;
  rdkv__compress_layout(cfg, cfg->n_layers, n_tokens, &arena, &layers, &mem, &work, &work_bytes);
  moved = *cfg, cfg = &moved; /* pins are of the sequence */
  moved.pins = rdkv__move_pins(cfg, token_begin, &arena);
  each = (size_t)rdkv__round_up(rdkv_layer_bytes(cfg, n_tokens), 64);
  for (a = 0; a < cfg->n_layers && st == RDKV_OK; a++) {
    rdkv_kv one = kv[a];
    st = rdkv_layer_init(cfg, n_tokens, mem + (size_t)a * each, each, &layers[a]);
    if (st == RDKV_OK && by == NULL) {
      st = rdkv_score(cfg, &one, &layers[a], work, (size_t)work_bytes);
    } else if (st == RDKV_OK) {
      rdkv_queries last = by[a];
      uint32_t n = rdkv__min_u32(last.n, (uint32_t)cfg->window), before = last.n - n;
      if (last.lse_stride == 0) last.lse_stride = (size_t)cfg->n_q_heads;
      one.q = last.q;
      if (before > 0) { /* the last ones alone */
        one.q.data = rdkv__at(&one.q, before, 0);
        if (last.out.data) last.out.data = rdkv__at(&last.out, before, 0);
        if (last.lse) last.lse += before * last.lse_stride;
      }
      st = rdkv__score_by(cfg, &one, (int)n, last.position + before, &last, &layers[a], work,
                          (size_t)work_bytes);
    }
    if (st == RDKV_OK) st = rdkv_measure(cfg, &one, &layers[a], work, (size_t)work_bytes);
  }
  if (st == RDKV_OK) st = rdkv_allocate(cfg, layers, cfg->n_layers, work, (size_t)work_bytes);
  if (st != RDKV_OK) return st;
  return rdkv_pack(cfg, kv, layers, cfg->n_layers, 0, token_begin, block, capacity, bytes, work,
                   (size_t)work_bytes);
}

RDKV_DEF rdkv_status rdkv_compress(const rdkv_config *cfg, const rdkv_kv *kv, uint32_t n_tokens,
                                   void *block, size_t capacity, size_t *bytes, void *scratch,
                                   size_t scratch_bytes) {
  return rdkv__compress(cfg, kv, NULL, n_tokens, 0, block, capacity, bytes, scratch, scratch_bytes);
}

RDKV_DEF rdkv_status rdkv_compress_by(const rdkv_config *cfg, const rdkv_kv *kv,
                                      const rdkv_queries *by, uint32_t n_tokens,
                                      uint64_t token_begin, void *block, size_t capacity,
                                      size_t *bytes, void *scratch, size_t scratch_bytes) {
  if (by == NULL) return RDKV_ERR_ARGUMENT;
  return rdkv__compress(cfg, kv, by, n_tokens, token_begin, block, capacity, bytes, scratch,
                        scratch_bytes);
}

RDKV_DEF size_t rdkv_stream_bound(const rdkv_config *cfg, uint32_t n_tokens,
                                  const rdkv_stream *stream) {
  uint64_t most, left;
  if (!rdkv__resolved(cfg) || stream == NULL || n_tokens > RDKV__MAX_TOKENS) return 0;
  most = rdkv__max_block(cfg, n_tokens, 1);
  left = rdkv__budget(cfg, n_tokens, cfg->n_layers);
  left = left > stream->spent_bytes ? left - stream->spent_bytes : 0;
  if (cfg->profile == RDKV_JOINT && cfg->scope != RDKV_SCOPE_LAMBDA && left < most) most = left;
  return rdkv__size(most);
}

/* Finds the threshold down to which this layer's steps and those expected of the layers to come fit
   into `bytes`: *own of this layer, *reach of all. The layers to come are taken to spend what they
   spent in the earlier prompt, more or less as the layers seen do, in so far as those weigh against
   them; or, without such a prompt, what those seen spend on average. */
static void rdkv__stream_share(const rdkv_stream *stream, const rdkv_histogram *own_bins,
                               int n_layers, rdkv_histogram *ahead, uint64_t bytes, uint64_t *own,
                               uint64_t *reach) {
  int at = stream->next_layer, known, l, bin;
  double own_sum = 0, ahead_sum = 0, now = 0, then = 0;
  memset(ahead, 0, sizeof *ahead);
  for (l = at + 1; l < n_layers && stream->earlier; l++)
    rdkv_histogram_merge(ahead, &stream->earlier[l]);
  for (bin = RDKV_HISTOGRAM_BINS - 1; bin > 0; bin--)
    if (ahead->bytes[bin]) break;
  known = bin > 0;
  if (!known) {
    for (bin = 0; bin < RDKV_HISTOGRAM_BINS; bin++) {
      double mean = (double)(stream->seen.bytes[bin] + own_bins->bytes[bin]) / (at + 1);
      ahead->bytes[bin] = (uint64_t)(mean * (n_layers - at - 1));
    }
  }
  for (bin = RDKV_HISTOGRAM_BINS - 1; bin > 0; bin--) {
    double sum;
    own_sum += (double)own_bins->bytes[bin], ahead_sum += (double)ahead->bytes[bin];
    now += (double)(stream->seen.bytes[bin] + own_bins->bytes[bin]);
    if (known)
      then += (double)(stream->seen_in_earlier.bytes[bin] + stream->earlier[at].bytes[bin]);
    else
      then = now;
    sum = own_sum;
    if (ahead_sum > 0) sum += ahead_sum * ((now + ahead_sum) / (then + ahead_sum));
    if (sum > (double)bytes) break;
    *own = (uint64_t)own_sum, *reach = (uint64_t)sum;
  }
}

/* Allocates and packs a layer that has been scored and measured; bins [2]. */
static rdkv_status rdkv__stream_pack(const rdkv_config *cfg, rdkv_stream *stream, const rdkv_kv *kv,
                                     rdkv_layer *layer, rdkv_histogram *bins, void *block,
                                     size_t capacity, size_t *bytes, void *work,
                                     size_t work_bytes) {
  rdkv_config one = *cfg;
  rdkv_histogram *own_bins = &bins[0], *ahead = &bins[1];
  rdkv_status st;
  uint64_t fixed = rdkv__fixed_bytes((uint64_t)cfg->n_kv_heads);
  uint64_t left = rdkv__budget(cfg, layer->n_tokens, cfg->n_layers);
  uint64_t after = (uint64_t)(cfg->n_layers - stream->next_layer - 1);
  one.n_layers = 1;
  left = left > stream->spent_bytes ? left - stream->spent_bytes : 0;
  if (cfg->profile == RDKV_PAPER && cfg->token_budget == 0 && cfg->budget_bytes > 0)
    one.budget_bytes = left / (after + 1);
  if (cfg->profile == RDKV_JOINT && cfg->scope != RDKV_SCOPE_LAMBDA) {
    uint64_t free_bytes = left, tables, own = 0, reach = 0;
    memset(own_bins, 0, sizeof *own_bins);
    rdkv_histogram_add(&one, layer, own_bins);
    /* every channel's entry, most of them not dropped */
    tables = (uint64_t)cfg->n_kv_heads * rdkv__round_up(5 * (uint64_t)rdkv__pad16(cfg->k_dim), 128);
    tables = (tables + fixed) * (after + 1);
    free_bytes = free_bytes > tables ? free_bytes - tables : 0;
    rdkv__stream_share(stream, own_bins, cfg->n_layers, ahead, free_bytes, &own, &reach);
    /* what the common threshold leaves is shared evenly */
    if (free_bytes > reach) own += (free_bytes - reach) / (after + 1);
    one.budget_bytes = after == 0 ? left : own + tables / (after + 1);
    if (one.budget_bytes > left) one.budget_bytes = left;
    if (one.budget_bytes == 0) one.budget_bytes = 1; /* 0 would mean keep */
  }
  st = rdkv_allocate(&one, layer, 1, work, work_bytes);
  if (st == RDKV_OK)
    st = rdkv_pack(&one, kv, layer, 1, stream->next_layer, 0, block, capacity, bytes, work,
                   work_bytes);
  if (st != RDKV_OK) return st;
  if (cfg->profile == RDKV_JOINT) { /* now with the K that was chosen */
    memset(own_bins, 0, sizeof *own_bins);
    rdkv_histogram_add(&one, layer, own_bins);
    rdkv_histogram_merge(&stream->seen, own_bins);
    if (stream->earlier) {
      rdkv_histogram *earlier = &stream->earlier[stream->next_layer];
      rdkv_histogram_merge(&stream->seen_in_earlier, earlier);
      *earlier = *own_bins;
    }
  }
  stream->lambda = layer->lambda;
  stream->spent_bytes += *bytes;
  stream->next_layer++;
  return RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_stream_layer(const rdkv_config *cfg, rdkv_stream *stream,
                                       const rdkv_kv *kv, uint32_t n_tokens, void *block,
                                       size_t capacity, size_t *bytes, void *scratch,
                                       size_t scratch_bytes) {
  rdkv_config one;
  rdkv__arena arena;
  rdkv_layer *layer;
  rdkv_histogram *bins;
  rdkv_status st;
  uint8_t *mem, *work;
  uint64_t work_bytes;
  if (!rdkv__resolved(cfg) || stream == NULL || kv == NULL || block == NULL || bytes == NULL ||
      stream->next_layer < 0 || stream->next_layer >= cfg->n_layers)
    return RDKV_ERR_ARGUMENT;
  if (cfg->max_error > 0) return RDKV_ERR_CONFIG;
  one = *cfg;
  one.n_layers = 1;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_stream_scratch(cfg, n_tokens), &arena);
  if (st != RDKV_OK) return st;
  rdkv__compress_layout(&one, 1, n_tokens, &arena, &layer, &mem, &work, &work_bytes);
  bins = (rdkv_histogram *)rdkv__take(&arena, NULL, 2, sizeof *bins);
  st = rdkv_layer_init(&one, n_tokens, mem, rdkv_layer_bytes(&one, n_tokens), layer);
  if (st == RDKV_OK) st = rdkv_score(&one, kv, layer, work, (size_t)work_bytes);
  if (st == RDKV_OK) st = rdkv_measure(&one, kv, layer, work, (size_t)work_bytes);
  if (st != RDKV_OK) return st;
  return rdkv__stream_pack(cfg, stream, kv, layer, bins, block, capacity, bytes, work,
                           (size_t)work_bytes);
}

/* ---- >>impl-open : a block as a segment ------------------------------------------------------ */

static int rdkv__half_ok(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

/* One channel table: every channel once, pads empty, numbers finite. */
static int rdkv__table_ok(const uint8_t *p, const rdkv_record *r, int k_dim,
                          const rdkv__parts *parts) {
  const uint16_t *scale = (const uint16_t *)(const void *)p, *mid;
  const uint8_t *channel;
  uint8_t seen[RDKV__MAX_DIM];
  int n = 16 * parts->k_blocks[0], all = n + r->n_dropped, i, l, at = 0, real;
  mid = scale + n, channel = (const uint8_t *)(mid + all);
  memset(seen, 0, sizeof seen);
  for (l = 1; l < 4; l++) {
    real = r->n_channels[l - 1];
    for (i = 0; i < 16 * parts->k_blocks[l]; i++, at++) {
      if (!rdkv__half_ok(scale[at]) || !rdkv__half_ok(mid[at])) return 0;
      if (i < real) {
        if (channel[at] >= k_dim || seen[channel[at]]++) return 0;
      } else if (scale[at] || mid[at] || channel[at]) {
        return 0;
      }
    }
  }
  for (; at < all; at++)
    if (!rdkv__half_ok(mid[at]) || channel[at] >= k_dim || seen[channel[at]]++) return 0;
  return 1;
}

RDKV_DEF rdkv_status rdkv_open(const void *block, size_t bytes, rdkv_open_mode mode,
                               rdkv_segment *segment) {
  const uint8_t *p = (const uint8_t *)block;
  const rdkv_header *h = (const rdkv_header *)block;
  const rdkv_record *rec;
  uint64_t n_heads, at, i, t, fixed;
  uint32_t count[5], channels[4];
  rdkv__parts parts;
  int stage, l;
  if (block == NULL || segment == NULL || (unsigned)mode > RDKV_MAP) return RDKV_ERR_ARGUMENT;
  if (!rdkv__aligned(block, 128)) return RDKV_ERR_ALIGNMENT;
  if (bytes < sizeof *h) return RDKV_ERR_TRUNCATED;
  if (h->magic != RDKV__MAGIC) return RDKV_ERR_FORMAT;
  if (h->version != RDKV_FORMAT_VERSION) return RDKV_ERR_VERSION;
  if (h->n_layers < 1 || h->n_layers > 65535 || h->n_kv_heads < 1 || h->n_kv_heads > 65535 ||
      h->n_q_heads < h->n_kv_heads || h->n_q_heads > 65535 || h->n_q_heads % h->n_kv_heads ||
      h->k_dim < 1 || h->k_dim > RDKV__MAX_DIM || h->v_dim < 1 || h->v_dim > RDKV__MAX_DIM ||
      h->n_tokens > RDKV__MAX_TOKENS || h->first_layer > 0x7fffffff || h->positions > 1 ||
      h->total_bytes % 128 || h->head_bytes % 128)
    return RDKV_ERR_FORMAT;
  n_heads = (uint64_t)h->n_layers * h->n_kv_heads;
  fixed = rdkv__fixed_bytes(n_heads);
  if (h->head_bytes < fixed || h->total_bytes < h->head_bytes) return RDKV_ERR_FORMAT;
  if (h->total_bytes > bytes) return RDKV_ERR_TRUNCATED;
  if (rdkv__head_sum(p, h) != h->head_sum) return RDKV_ERR_CHECKSUM;
  for (i = 0; i < sizeof h->reserved; i++)
    if (h->reserved[i]) return RDKV_ERR_FORMAT;
  rec = (const rdkv_record *)(const void *)(p + sizeof *h);
  for (stage = 0, at = fixed; stage < 3; stage++) { /* every offset is where the counts put it */
    for (i = 0; i < n_heads; i++) {
      const rdkv_record *r = &rec[i];
      uint64_t kept = 0;
      channels[0] = r->n_dropped;
      for (l = 1; l < 4; l++) channels[l] = r->n_channels[l - 1];
      for (l = 1; l < 5; l++) count[l] = r->n_tokens[l - 1], kept += count[l];
      if (kept > h->n_tokens || channels[0] + channels[1] + channels[2] + channels[3] != h->k_dim)
        return RDKV_ERR_FORMAT;
      count[0] = 0;
      rdkv__head_bytes((int)h->v_dim, (int)h->positions, count, channels, &parts);
      if (stage == 0) {
        if (r->table != at || r->reserved) return RDKV_ERR_FORMAT;
        at += parts.table;
        if (at > h->head_bytes || !rdkv__table_ok(p + r->table, r, (int)h->k_dim, &parts))
          return RDKV_ERR_FORMAT;
      } else if (stage == 1) {
        if (r->position != (h->positions ? at : 0)) return RDKV_ERR_FORMAT;
        at += parts.positions;
      } else {
        if (r->tile != at) return RDKV_ERR_FORMAT;
        at += parts.tiles;
      }
      if (at > h->total_bytes) return RDKV_ERR_FORMAT;
    }
    if (stage == 0 && at != h->head_bytes) return RDKV_ERR_FORMAT;
  }
  if (at != h->total_bytes) return RDKV_ERR_FORMAT;
  if (mode == RDKV_VERIFY) {
    if (rdkv_checksum(p + h->head_bytes, (size_t)(h->total_bytes - h->head_bytes),
                      h->head_bytes / 8) != h->body_sum)
      return RDKV_ERR_CHECKSUM;
    for (i = 0; i < n_heads && h->positions; i++) {
      const uint32_t *position = (const uint32_t *)(const void *)(p + rec[i].position);
      for (l = 0; l < 4; l++)
        for (t = 0; t < rdkv__round_up(rec[i].n_tokens[l], RDKV__TILE); t++, position++)
          if (t < rec[i].n_tokens[l] ? *position >= h->n_tokens : *position != UINT32_MAX)
            return RDKV_ERR_FORMAT;
    }
  }
  segment->block = p, segment->header = h, segment->records = rec;
  return RDKV_OK;
}

/* The record of (layer, head), or NULL if the segment has no such layer. */
static const rdkv_record *rdkv__record(const rdkv_segment *s, int layer, int head) {
  uint32_t first = s->header->first_layer;
  if (layer < 0 || (uint32_t)layer < first || (uint32_t)layer - first >= s->header->n_layers)
    return NULL;
  return s->records + (size_t)((uint32_t)layer - first) * s->header->n_kv_heads + (size_t)head;
}

static void rdkv__record_parts(const rdkv_segment *s, const rdkv_record *r, rdkv__parts *p) {
  uint32_t count[5], channels[4];
  int l;
  count[0] = 0, channels[0] = r->n_dropped;
  for (l = 1; l < 5; l++) count[l] = r->n_tokens[l - 1];
  for (l = 1; l < 4; l++) channels[l] = r->n_channels[l - 1];
  rdkv__head_bytes((int)s->header->v_dim, (int)s->header->positions, count, channels, p);
}

/* One code of a K block, token 0..31 and column 0..15, and of a V block (dim 0..15). */
static int rdkv__get_k(const uint32_t *words, int level, uint32_t token, int column) {
  uint32_t sub = token >> 4, r = (token >> 3) & 1, g = token & 7, c = (uint32_t)column;
  uint32_t lane = 4 * g + (c >> 2), pr = (c >> 1) & 1, e = c & 1;
  if (level == 1) return (int)(words[lane] >> (2 * (2 * sub + pr) + 8 * r + 16 * e) & 3);
  if (level == 2) return (int)(words[2 * lane + sub] >> (4 * pr + 8 * r + 16 * e) & 15);
  return (int)(words[4 * lane + 2 * sub + pr] >> (8 * (2 * r + e)) & 255);
}
static int rdkv__get_v(const uint32_t *words, int level, uint32_t token, int dim) {
  uint32_t sub = token >> 4, pr = (token >> 3) & 1, t = (token >> 1) & 3, e = token & 1;
  uint32_t d = (uint32_t)dim, lane = 4 * (d & 7) + t, r = d >> 3;
  if (level == 1) return (int)(words[lane] >> (2 * (2 * sub + pr) + 8 * r + 16 * e) & 3);
  if (level == 2) return (int)(words[2 * lane + sub] >> (4 * pr + 8 * r + 16 * e) & 15);
  return (int)(words[4 * lane + 2 * sub + pr] >> (8 * (2 * r + e)) & 255);
}

RDKV_DEF rdkv_status rdkv_unpack(const rdkv_segment *segment, int layer, int kv_head, float *k,
                                 float *v, uint32_t *position, uint32_t *n_tokens) {
  const rdkv_record *r;
  const uint16_t *scale, *mid;
  const uint8_t *channel, *tile;
  const uint32_t *stored;
  rdkv__parts p;
  uint32_t n = 0, first, t, kd, vd, d;
  int level, i, b, kl, all;
  if (segment == NULL || segment->block == NULL || n_tokens == NULL || kv_head < 0 ||
      (uint32_t)kv_head >= segment->header->n_kv_heads)
    return RDKV_ERR_ARGUMENT;
  r = rdkv__record(segment, layer, kv_head);
  if (r == NULL || (position && !segment->header->positions)) return RDKV_ERR_ARGUMENT;
  rdkv__record_parts(segment, r, &p);
  kd = segment->header->k_dim, vd = segment->header->v_dim;
  all = 16 * p.k_blocks[0] + r->n_dropped;
  scale = (const uint16_t *)(const void *)(segment->block + r->table);
  mid = scale + 16 * p.k_blocks[0], channel = (const uint8_t *)(mid + all);
  tile = segment->block + r->tile;
  stored = (const uint32_t *)(const void *)(segment->block + r->position);
  for (level = 1; level < 5; level++) {
    for (first = 0; first < r->n_tokens[level - 1]; first += RDKV__TILE) {
      const uint32_t *words = (const uint32_t *)(const void *)tile;
      const uint16_t *params, *half;
      uint32_t in_tile = rdkv__min_u32(r->n_tokens[level - 1] - first, RDKV__TILE);
      for (kl = 1, i = 0; kl < 4; kl++) {
        int left = r->n_channels[kl - 1];
        for (b = 0; b < p.k_blocks[kl]; b++, words += 16 << kl) {
          int j;
          for (j = 0; j < 16; j++, i++) {
            float s = rdkv__from_half(scale[i]), m = rdkv__from_half(mid[i]);
            if (k == NULL || left-- <= 0) continue;
            for (t = 0; t < in_tile; t++)
              k[(size_t)(n + t) * kd + channel[i]] =
                  m + s * (float)(rdkv__get_k(words, kl, t, j) - (1 << ((1 << kl) - 1)));
          }
        }
      }
      for (; i < all && k; i++)
        for (t = 0; t < in_tile; t++)
          k[(size_t)(n + t) * kd + channel[i]] = rdkv__from_half(mid[i]);
      params = (const uint16_t *)(const void *)words, words += 32;
      half = (const uint16_t *)(const void *)words;
      for (t = 0; t < in_tile && v; t++) {
        uint32_t slot = 2 * (4 * (t & 7) + (t >> 3));
        float s = rdkv__from_half(params[slot]), m = rdkv__from_half(params[slot + 1]);
        for (d = 0; d < vd; d++) {
          float *to = &v[(size_t)(n + t) * vd + d];
          if (level == 4) {
            uint32_t lane = 4 * (d & 7) + ((t >> 1) & 3),
                     word = ((d >> 3) & 1) + 2 * ((t >> 3) & 1);
            uint32_t block = (t >> 4) * ((vd + 15) / 16) + d / 16;
            *to = rdkv__from_half(half[2 * ((block * 32 + lane) * 4 + word) + (t & 1)]);
          } else {
            int code = rdkv__get_v(words + d / 16 * (16u << level), level, t, (int)(d & 15));
            *to = m + s * (float)(code - (1 << ((1 << level) - 1)));
          }
        }
      }
      if (position) memcpy(position + n, stored, in_tile * sizeof *position);
      stored += segment->header->positions ? RDKV__TILE : 0;
      n += in_tile;
      tile += p.k_tile + 128 + (size_t)((vd + 15) / 16) * (64u << level);
    }
  }
  *n_tokens = n;
  return RDKV_OK;
}

/* ---- >>impl-tail : new tokens, dense --------------------------------------------------------- */

/* Bytes of one layer's K or V in a tail: rows are padded to 16 elements. */
static uint64_t rdkv__tail_part(int n_kv_heads, uint32_t capacity, int dim, rdkv_dtype dtype) {
  uint64_t row = (uint64_t)rdkv__pad16(dim) * (dtype == RDKV_F32 ? 4 : 2);
  return rdkv__mul(rdkv__mul(row, capacity), (uint64_t)n_kv_heads);
}

/* Where a head's K (or V) rows of a layer start. */
static uint8_t *rdkv__tail_rows(const rdkv_tail *t, int layer, int head, int is_v) {
  size_t k = (size_t)rdkv__tail_part(t->n_kv_heads, t->capacity, t->k_dim, t->dtype);
  size_t v = (size_t)rdkv__tail_part(t->n_kv_heads, t->capacity, t->v_dim, t->dtype);
  size_t at = (size_t)rdkv__round_up((uint64_t)t->n_layers * sizeof(uint32_t), 64);
  at += (size_t)layer * (k + v) + (is_v ? k + v / (size_t)t->n_kv_heads * (size_t)head
                                        : k / (size_t)t->n_kv_heads * (size_t)head);
  return (uint8_t *)t->memory + at;
}

RDKV_DEF size_t rdkv_tail_bytes(const rdkv_config *cfg, uint32_t capacity, rdkv_dtype dtype) {
  uint64_t each;
  if (!rdkv__resolved(cfg) || (unsigned)dtype > RDKV_BF16 || capacity > RDKV__MAX_TOKENS) return 0;
  each = rdkv__add(rdkv__tail_part(cfg->n_kv_heads, capacity, cfg->k_dim, dtype),
                   rdkv__tail_part(cfg->n_kv_heads, capacity, cfg->v_dim, dtype));
  return rdkv__size(rdkv__add(rdkv__round_up((uint64_t)cfg->n_layers * sizeof(uint32_t), 64),
                              rdkv__mul(each, (uint64_t)cfg->n_layers)));
}

RDKV_DEF rdkv_status rdkv_tail_init(const rdkv_config *cfg, uint32_t capacity, rdkv_dtype dtype,
                                    void *mem, size_t bytes, rdkv_tail *tail) {
  rdkv__arena arena;
  rdkv_status st;
  size_t need;
  if (!rdkv__resolved(cfg) || tail == NULL || (unsigned)dtype > RDKV_BF16) return RDKV_ERR_ARGUMENT;
  need = rdkv_tail_bytes(cfg, capacity, dtype);
  st = rdkv__scratch(mem, bytes, need, &arena);
  if (st != RDKV_OK) return st;
  memset(mem, 0, (size_t)cfg->n_layers * sizeof(uint32_t));
  tail->memory = mem, tail->n_tokens = (uint32_t *)mem;
  tail->capacity = capacity, tail->dtype = dtype, tail->isa = cfg->isa;
  tail->n_layers = cfg->n_layers, tail->n_kv_heads = cfg->n_kv_heads;
  tail->k_dim = cfg->k_dim, tail->v_dim = cfg->v_dim;
  return RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_tail_append(rdkv_tail *tail, int layer, rdkv_tensor k, rdkv_tensor v,
                                      uint32_t n) {
  const rdkv__kernels *kn;
  float row[RDKV__MAX_DIM];
  uint32_t at, i;
  int head, part, write, d;
  if (tail == NULL || tail->memory == NULL || layer < 0 || layer >= tail->n_layers)
    return RDKV_ERR_ARGUMENT;
  if (n == 0) return RDKV_OK;
  if (!rdkv__tensor_ok(&k) || !rdkv__tensor_ok(&v)) return RDKV_ERR_ARGUMENT;
  at = tail->n_tokens[layer];
  if (n > tail->capacity - at) return RDKV_ERR_FULL;
  kn = rdkv__kernels_of(tail->isa);
  for (write = 0; write < 2; write++) { /* look at everything before the first row is written */
    for (part = 0; part < 2; part++) {
      const rdkv_tensor *t = part ? &v : &k;
      int dim = part ? tail->v_dim : tail->k_dim, padded = rdkv__pad16(dim);
      for (head = 0; head < tail->n_kv_heads; head++) {
        uint8_t *rows = rdkv__tail_rows(tail, layer, head, part);
        for (i = 0; i < n; i++) {
          if (!rdkv__row(kn, t, i, head, dim, row)) return RDKV_ERR_NONFINITE;
          if (!write) continue;
          if (tail->dtype == RDKV_F32) {
            memcpy(rows + (size_t)(at + i) * (size_t)padded * 4, row, (size_t)padded * 4);
          } else {
            uint16_t *to = (uint16_t *)(void *)rows + (size_t)(at + i) * (size_t)padded;
            for (d = 0; d < padded; d++)
              to[d] = tail->dtype == RDKV_F16 ? rdkv__to_half(row[d]) : rdkv__to_bf16(row[d]);
          }
        }
      }
    }
  }
  tail->n_tokens[layer] = at + n;
  return RDKV_OK;
}

RDKV_DEF void rdkv_tail_rewind(rdkv_tail *tail, uint32_t n_tokens) {
  int i;
  if (tail == NULL || tail->memory == NULL) return;
  for (i = 0; i < tail->n_layers; i++)
    tail->n_tokens[i] = rdkv__min_u32(tail->n_tokens[i], n_tokens);
}

/* ---- >>impl-attend : decode from the compressed form ----------------------------------------- */

/* The running maximum is raised, and all sums rescaled, only when a logit exceeds it by this much:
   exp(8) leaves float far from overflow. */
#define RDKV__SLACK 8.0f

typedef struct rdkv__attend_work {
  float *q;          /* [n_q_heads][k_dim padded] times softmax_scale */
  float *packed;     /* [2][PACKED + MAX_DIM] scale and mid of the channels */
  float *coef_k;     /* [MAX_BLOCKS][4][HEADS][16] */
  float *coef_v;     /* [BATCH][COEF_V] */
  float *logits, *p; /* [HEADS][SLOTS] */
  float *work;       /* [HEADS][256] */
  float *acc;        /* [HEADS][acc_stride] sums of V codes of the present run */
  float *out;        /* [HEADS][v_dim padded] */
  float *sum, *rest; /* [HEADS][16] in lanes: sum of p; what all dims share */
  float max[RDKV__HEADS], konst[RDKV__HEADS];
  size_t acc_stride;
  int kp, vp;
} rdkv__attend_work;

static uint64_t rdkv__attend_layout(const rdkv_config *cfg, rdkv__arena *arena,
                                    rdkv__attend_work *w) {
  uint64_t bytes = 0;
  w->kp = rdkv__pad16(cfg->k_dim), w->vp = rdkv__pad16(cfg->v_dim);
  w->acc_stride = (size_t)w->vp * 16;
  w->q = (float *)rdkv__take(arena, &bytes, (uint64_t)cfg->n_q_heads * (uint64_t)w->kp, 4);
  w->packed = (float *)rdkv__take(arena, &bytes, 2 * (RDKV__PACKED + RDKV__MAX_DIM), 4);
  w->coef_k = (float *)rdkv__take(arena, &bytes, RDKV__MAX_BLOCKS * 64 * RDKV__HEADS, 4);
  w->coef_v = (float *)rdkv__take(arena, &bytes, RDKV__BATCH * RDKV__COEF_V, 4);
  w->logits = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * RDKV__SLOTS, 4);
  w->p = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * RDKV__SLOTS, 4);
  w->work = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * 256, 4);
  w->acc = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * w->acc_stride, 4);
  w->out = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * (uint64_t)w->vp, 4);
  w->sum = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * 16, 4);
  w->rest = (float *)rdkv__take(arena, &bytes, RDKV__HEADS * 16, 4);
  return bytes;
}

RDKV_DEF size_t rdkv_attend_scratch(const rdkv_config *cfg) {
  rdkv__attend_work w;
  if (!rdkv__resolved(cfg)) return 0;
  return rdkv__size(rdkv__attend_layout(cfg, NULL, &w));
}

/* Coefficients of K codes for the heads' queries and the logits' constant, from a channel table:
   logit = sum q_c (mid_c + scale_c (code - 2^(b-1))). */
static void rdkv__attend_table(const rdkv__kernels *kn, const rdkv_segment *s, const rdkv_record *r,
                               const rdkv__parts *parts, const float *q, int n_heads,
                               rdkv__attend_work *w) {
  const uint16_t *scale = (const uint16_t *)(const void *)(s->block + r->table);
  const uint8_t *channel;
  int n = 16 * parts->k_blocks[0], all = n + r->n_dropped, h, i, b, level;
  float *scales = w->packed, *mids = scales + RDKV__PACKED;
  channel = (const uint8_t *)(scale + n + all);
  kn->halves(scale, n, scales);
  kn->halves(scale + n, n, mids);
  for (i = n; i < all; i++) mids[i] = rdkv__from_half(scale[n + i]);
  for (h = 0; h < n_heads; h++) {
    const float *qh = q + h * w->kp;
    float sum = 0;
    for (level = 1, b = 0; level < 4; b += parts->k_blocks[level++])
      if (parts->k_blocks[level])
        sum += kn->k_coef(level, parts->k_blocks[level], channel + 16 * b, scales + 16 * b,
                          mids + 16 * b, qh, w->coef_k + (b * 4 * n_heads + h) * 16, n_heads * 16);
    for (i = n; i < all; i++) sum += qh[channel[i]] * mids[i];
    w->konst[h] = sum;
  }
}

/* Takes n logits a head (a multiple of 16), less konst[h], into the softmax: p, sums, maxima.
   acc_used: floats of acc in use for each head. */
static void rdkv__attend_softmax(const rdkv__kernels *kn, rdkv__attend_work *w, const float *konst,
                                 int n_heads, int n, size_t acc_used) {
  int h;
  for (h = 0; h < n_heads; h++) {
    const float *l = w->logits + h * RDKV__SLOTS;
    float max = kn->max(l, n) + konst[h], by;
    if (max > w->max[h] + RDKV__SLACK || w->max[h] <= -FLT_MAX) {
      by = w->max[h] <= -FLT_MAX ? 0 : expf(w->max[h] - max);
      kn->scale(w->sum + h * 16, 16, by);
      kn->scale(w->rest + h * 16, 16, by);
      kn->scale(w->out + h * w->vp, w->vp, by);
      kn->scale(w->acc + (size_t)h * w->acc_stride, (int)acc_used, by);
      w->max[h] = max;
    }
    kn->exp_sum(l, w->max[h] - konst[h], w->p + h * RDKV__SLOTS, n, w->sum + h * 16);
  }
}

/* One head's packed tokens. */
static void rdkv__attend_segment(const rdkv__kernels *kn, const rdkv_segment *s,
                                 const rdkv_record *r, const float *q, int n_heads,
                                 rdkv__attend_work *w) {
  const uint8_t *batch = s->block + r->tile;
  int blocks = w->vp / 16, first, h, level, kl, b, i;
  uint32_t t, n;
  rdkv__parts parts;
  rdkv__record_parts(s, r, &parts);
  if (parts.n_tiles[0] == 0) return;
  rdkv__attend_table(kn, s, r, &parts, q, n_heads, w);
  for (level = 1; level < 5; level++) {
    size_t used = (size_t)blocks * (level == 4 ? 128 : 32u << level);
    size_t tile_bytes = parts.k_tile + 128 + (size_t)blocks * (64u << level);
    uint32_t left = parts.n_tiles[level];
    if (left == 0) continue;
    for (first = 1; left > 0; left -= n, batch += n * tile_bytes, first = 0) {
      n = rdkv__min_u32(left, RDKV__BATCH);
      for (h = 0; h < n_heads && parts.k_blocks[0] == 0; h++)
        memset(w->logits + h * RDKV__SLOTS, 0, n * RDKV__TILE * sizeof(float));
      for (t = 0; t < n; t++) {
        const uint8_t *tile = batch + t * tile_bytes;
        const uint32_t *words = (const uint32_t *)(const void *)tile;
#if defined(__GNUC__) /* the next batch, while this one is computed */
        const uint8_t *next = tile + RDKV__BATCH * tile_bytes, *end = next + tile_bytes;
        if (t + RDKV__BATCH < left)
          for (; next < end; next += 64) __builtin_prefetch(next, 0, 2);
#endif
        for (kl = 1, b = 0; kl < 4; kl++) {
          if (parts.k_blocks[kl] == 0) continue;
          kn->k_codes(kl, words, parts.k_blocks[kl], w->coef_k + b * 64 * n_heads, n_heads,
                      w->logits + t * RDKV__TILE, w->work, b > 0);
          words += parts.k_blocks[kl] * (16 << kl), b += parts.k_blocks[kl];
        }
      }
      if (n == left &&
          r->n_tokens[level - 1] % RDKV__TILE) { /* pads: slot i is token i/4 + 8 (i%4) */
        uint32_t real = r->n_tokens[level - 1] % RDKV__TILE;
        for (i = 0; i < RDKV__TILE; i++)
          for (h = 0; h < n_heads && (uint32_t)(i / 4 + 8 * (i % 4)) >= real; h++)
            w->logits[h * RDKV__SLOTS + (int)(n - 1) * RDKV__TILE + i] = -FLT_MAX;
      }
      rdkv__attend_softmax(kn, w, w->konst, n_heads, (int)n * RDKV__TILE, first ? 0 : used);
      batch += parts.k_tile; /* to the V parameters of the first tile */
      for (t = 0; t < n; t++)
        kn->v_coef(level, (const uint32_t *)(const void *)(batch + t * tile_bytes),
                   w->p + t * RDKV__TILE, n_heads, w->coef_v + t * RDKV__COEF_V, w->rest);
      kn->v_codes(level, (const uint32_t *)(const void *)(batch + 128), tile_bytes / 4, (int)n,
                  blocks, w->coef_v, n_heads, w->acc, w->acc_stride, first);
      batch -= parts.k_tile;
    }
    for (h = 0; h < n_heads; h++)
      kn->v_fold(level, w->acc + (size_t)h * w->acc_stride, blocks, w->out + h * w->vp);
  }
}

/* The dense tail. */
static void rdkv__attend_tail(const rdkv__kernels *kn, const rdkv_tail *t, int layer, int head,
                              const float *q, int n_heads, rdkv__attend_work *w) {
  static const float none[RDKV__HEADS] = {0, 0, 0, 0};
  size_t size = t->dtype == RDKV_F32 ? 4 : 2;
  const uint8_t *k = rdkv__tail_rows(t, layer, head, 0), *v = rdkv__tail_rows(t, layer, head, 1);
  uint32_t n = t->n_tokens[layer], i, j, rows, padded;
  int h;
  for (i = 0; i < n; i += rows) {
    rows = rdkv__min_u32(n - i, RDKV__SLOTS), padded = (rows + 15) & ~15u;
    kn->k_dense(k + (size_t)i * (size_t)w->kp * size, t->dtype, (int)rows, w->kp, q, n_heads,
                w->logits);
    for (h = 0; h < n_heads; h++)
      for (j = rows; j < padded; j++) w->logits[h * RDKV__SLOTS + (int)j] = -FLT_MAX;
    rdkv__attend_softmax(kn, w, none, n_heads, (int)padded, 0);
    kn->v_dense(v + (size_t)i * (size_t)w->vp * size, t->dtype, (int)rows, w->vp, w->p, n_heads,
                w->out, (size_t)w->vp);
  }
}

/* Checks a cache against a config and a layer. */
static rdkv_status rdkv__cache_ok(const rdkv_config *cfg, const rdkv_cache *c, int layer) {
  int i;
  if (!rdkv__resolved(cfg) || c == NULL || layer < 0 || c->n_segments < 0 ||
      (c->n_segments > 0 && c->segments == NULL) || (unsigned)c->isa > RDKV_ISA_NEON)
    return RDKV_ERR_ARGUMENT;
  for (i = 0; i < c->n_segments; i++) {
    const rdkv_header *h = c->segments[i].header;
    if (h == NULL || h->n_kv_heads != (uint32_t)cfg->n_kv_heads ||
        h->k_dim != (uint32_t)cfg->k_dim || h->v_dim != (uint32_t)cfg->v_dim)
      return RDKV_ERR_ARGUMENT;
  }
  if (c->tail &&
      (c->tail->memory == NULL || c->tail->n_kv_heads != cfg->n_kv_heads ||
       c->tail->k_dim != cfg->k_dim || c->tail->v_dim != cfg->v_dim || layer >= c->tail->n_layers))
    return RDKV_ERR_ARGUMENT;
  return RDKV_OK;
}

/* Query heads [first, first + n) of one kv head; q are the layer's scaled queries in w->q. */
static void rdkv__attend_heads(const rdkv_config *cfg, const rdkv_cache *c, int layer, int kv_head,
                               const float *q, int n, float *out, float *lse,
                               rdkv__attend_work *w) {
  const rdkv__kernels *kn = rdkv__kernels_of(c->isa);
  int first, h, i, d, vd = cfg->v_dim;
  for (first = 0; first < n; first += RDKV__HEADS) {
    int n_heads = n - first < RDKV__HEADS ? n - first : RDKV__HEADS;
    const float *qh = q + first * w->kp;
    memset(w->out, 0, (size_t)RDKV__HEADS * (size_t)w->vp * sizeof(float));
    memset(w->sum, 0, RDKV__HEADS * 16 * sizeof(float));
    memset(w->rest, 0, RDKV__HEADS * 16 * sizeof(float));
    for (h = 0; h < n_heads; h++) w->max[h] = -FLT_MAX;
    for (i = 0; i < c->n_segments; i++) {
      const rdkv_record *r = rdkv__record(&c->segments[i], layer, kv_head);
      if (r) rdkv__attend_segment(kn, &c->segments[i], r, qh, n_heads, w);
    }
    if (c->tail) rdkv__attend_tail(kn, c->tail, layer, kv_head, qh, n_heads, w);
    for (h = 0; h < n_heads; h++) {
      float *to = out + (size_t)(first + h) * (size_t)vd, sum = 0, rest = 0, inv;
      for (i = 0; i < 16; i++) sum += w->sum[h * 16 + i], rest += w->rest[h * 16 + i];
      inv = sum > 0 ? 1 / sum : 0;
      for (d = 0; d < vd; d++) to[d] = (w->out[h * w->vp + d] + rest) * inv;
      if (lse) /* -Inf by bits: a constant would not survive -ffinite-math-only */
        lse[first + h] = sum > 0 ? w->max[h] + logf(sum) : rdkv__float(0xff800000);
    }
  }
}

static void rdkv__attend_queries(const rdkv_config *cfg, const float *q, int n,
                                 rdkv__attend_work *w) {
  int h, d;
  for (h = 0; h < n; h++)
    for (d = 0; d < w->kp; d++)
      w->q[h * w->kp + d] =
          d < cfg->k_dim ? q[(size_t)h * (size_t)cfg->k_dim + (size_t)d] * cfg->softmax_scale : 0;
}

RDKV_DEF rdkv_status rdkv_attend_head(const rdkv_config *cfg, const rdkv_cache *cache, int layer,
                                      int kv_head, const float *q, float *out, float *lse,
                                      void *scratch, size_t scratch_bytes) {
  rdkv__attend_work w;
  rdkv__arena arena;
  rdkv_status st = rdkv__cache_ok(cfg, cache, layer);
  int group;
  if (st != RDKV_OK) return st;
  if (q == NULL || out == NULL || kv_head < 0 || kv_head >= cfg->n_kv_heads)
    return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_attend_scratch(cfg), &arena);
  if (st != RDKV_OK) return st;
  rdkv__attend_layout(cfg, &arena, &w);
  group = cfg->n_q_heads / cfg->n_kv_heads;
  rdkv__attend_queries(cfg, q, group, &w);
  rdkv__attend_heads(cfg, cache, layer, kv_head, w.q, group, out, lse, &w);
  return RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_attend(const rdkv_config *cfg, const rdkv_cache *cache, int layer,
                                 const float *q, float *out, float *lse, void *scratch,
                                 size_t scratch_bytes) {
  rdkv__attend_work w;
  rdkv__arena arena;
  rdkv_status st = rdkv__cache_ok(cfg, cache, layer);
  int group, head;
  if (st != RDKV_OK) return st;
  if (q == NULL || out == NULL) return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_attend_scratch(cfg), &arena);
  if (st != RDKV_OK) return st;
  rdkv__attend_layout(cfg, &arena, &w);
  group = cfg->n_q_heads / cfg->n_kv_heads;
  rdkv__attend_queries(cfg, q, cfg->n_q_heads, &w); /* a copy: out may be the same memory */
  for (head = 0; head < cfg->n_kv_heads; head++)
    rdkv__attend_heads(cfg, cache, layer, head, w.q + head * group * w.kp, group,
                       out + (size_t)head * (size_t)group * (size_t)cfg->v_dim,
                       lse ? lse + head * group : NULL, &w);
  return RDKV_OK;
}

/* ---- >>impl-report : what was spent, what it cost -------------------------------------------- */

RDKV_DEF rdkv_status rdkv_report_segment(const rdkv_segment *segment, int layer, int kv_head,
                                         rdkv_report *report) {
  const rdkv_header *h;
  rdkv_report out;
  uint32_t i, first = 0, n;
  int l;
  if (segment == NULL || segment->header == NULL || report == NULL || layer < -1)
    return RDKV_ERR_ARGUMENT;
  h = segment->header, n = h->n_layers * h->n_kv_heads;
  memset(&out, 0, sizeof out);
  if (layer >= 0) {
    const rdkv_record *r;
    if (kv_head < 0 || (uint32_t)kv_head >= h->n_kv_heads) return RDKV_ERR_ARGUMENT;
    r = rdkv__record(segment, layer, kv_head);
    if (r == NULL) return RDKV_ERR_ARGUMENT;
    first = (uint32_t)(r - segment->records), n = 1;
  } else {
    out.bytes_head = rdkv__fixed_bytes(n);
  }
  for (i = first; i < first + n; i++) {
    const rdkv_record *r = &segment->records[i];
    rdkv__parts p;
    uint64_t kept = 0;
    rdkv__record_parts(segment, r, &p);
    out.bytes_tables += p.table, out.bytes_positions += p.positions;
    out.bytes_k += p.k, out.bytes_v += p.v, out.bytes_v_params += p.params;
    for (l = 0; l < 4; l++) out.v_tokens[l + 1] += r->n_tokens[l], kept += r->n_tokens[l];
    out.v_tokens[0] += h->n_tokens - kept;
    for (l = 0; l < 3; l++) out.k_channels[l + 1] += r->n_channels[l];
    out.k_channels[0] += r->n_dropped;
    out.v_distortion += (double)r->v_distortion, out.k_distortion += (double)r->k_distortion;
    out.bytes_fp16 += (uint64_t)h->n_tokens * (h->k_dim + h->v_dim) * 2;
  }
  out.bytes_total = out.bytes_head + out.bytes_tables + out.bytes_positions + out.bytes_k +
                    out.bytes_v + out.bytes_v_params;
  out.ratio = out.bytes_fp16 ? (double)out.bytes_total / (double)out.bytes_fp16 : 0;
  *report = out;
  return RDKV_OK;
}

RDKV_DEF size_t rdkv_measure_error_scratch(const rdkv_config *cfg, uint32_t n_tokens) {
  uint64_t bytes;
  if (!rdkv__resolved(cfg) || n_tokens > RDKV__MAX_TOKENS) return 0;
  bytes = rdkv__round_up(rdkv_attend_scratch(cfg), 64);
  bytes += rdkv__round_up((uint64_t)cfg->n_q_heads * (uint64_t)cfg->v_dim * 4, 64);
  return rdkv__size(rdkv__add(bytes, rdkv__mul(rdkv__round_up(rdkv__max_u32(n_tokens, 1), 8), 8)));
}

RDKV_DEF rdkv_status rdkv_measure_error(const rdkv_config *cfg, const rdkv_cache *cache, int layer,
                                        const rdkv_kv *kv, uint32_t n_tokens, const float *q,
                                        int n_queries, double *error, void *scratch,
                                        size_t scratch_bytes) {
  const rdkv__kernels *kn;
  rdkv__arena arena;
  rdkv_status st = rdkv__cache_ok(cfg, cache, layer);
  double *p, off = 0, all = 0;
  float *out, row[RDKV__MAX_DIM];
  void *work;
  size_t work_bytes;
  int i, h, d;
  uint32_t t;
  if (st != RDKV_OK) return st;
  if (kv == NULL || q == NULL || n_queries < 1 || error == NULL ||
      (n_tokens > 0 && (!rdkv__tensor_ok(&kv->k) || !rdkv__tensor_ok(&kv->v))))
    return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_measure_error_scratch(cfg, n_tokens), &arena);
  if (st != RDKV_OK) return st;
  kn = rdkv__kernels_of(cfg->isa);
  work_bytes = rdkv_attend_scratch(cfg);
  work = rdkv__take(&arena, NULL, work_bytes, 1);
  out = (float *)rdkv__take(&arena, NULL, (uint64_t)cfg->n_q_heads * (uint64_t)cfg->v_dim, 4);
  p = (double *)rdkv__take(&arena, NULL, rdkv__max_u32(n_tokens, 1), 8);
  for (i = 0; i < n_queries; i++) {
    const float *qi = q + (size_t)i * (size_t)cfg->n_q_heads * (size_t)cfg->k_dim;
    st = rdkv_attend(cfg, cache, layer, qi, out, NULL, work, work_bytes);
    if (st != RDKV_OK) return st;
    for (h = 0; h < cfg->n_q_heads; h++) {
      int kv_head = h / (cfg->n_q_heads / cfg->n_kv_heads);
      const float *qh = qi + (size_t)h * (size_t)cfg->k_dim;
      double sum = 0, max = -1e300, exact[RDKV__MAX_DIM];
      for (t = 0; t < n_tokens; t++) {
        double dot = 0;
        if (!rdkv__row(kn, &kv->k, t, kv_head, cfg->k_dim, row)) return RDKV_ERR_NONFINITE;
        for (d = 0; d < cfg->k_dim; d++) dot += (double)qh[d] * (double)row[d];
        p[t] = dot * (double)cfg->softmax_scale;
        max = p[t] > max ? p[t] : max;
      }
      for (d = 0; d < cfg->v_dim; d++) exact[d] = 0;
      for (t = 0; t < n_tokens; t++) {
        double a = exp(p[t] - max);
        if (!rdkv__row(kn, &kv->v, t, kv_head, cfg->v_dim, row)) return RDKV_ERR_NONFINITE;
        for (d = 0; d < cfg->v_dim; d++) exact[d] += a * (double)row[d];
        sum += a;
      }
      for (d = 0; d < cfg->v_dim; d++) {
        double x = sum > 0 ? exact[d] / sum : 0;
        double y = (double)out[(size_t)h * (size_t)cfg->v_dim + (size_t)d] - x;
        off += y * y, all += x * x;
      }
    }
  }
  *error = all > 0 ? sqrt(off / all) : off > 0 ? 1 : 0;
  return RDKV_OK;
}

/* ---- >>impl-sequence : a cache that lives ---------------------------------------------------- */

/* One config and one layer for a head alone, to weigh each head's own tokens. */
static rdkv_config rdkv__one_head(const rdkv_config *cfg) {
  rdkv_config c = *cfg;
  c.n_layers = 1, c.n_q_heads = cfg->n_q_heads / cfg->n_kv_heads, c.n_kv_heads = 1, c.pool = 1;
  return c;
}

typedef struct rdkv__repack_work {
  rdkv_kv *kv;        /* [n_layers] of k and v */
  rdkv_layer *layers; /* [n_layers] */
  uint8_t *mem;       /* [n_layers] of each bytes: the layers' arrays */
  uint8_t *head_mem;  /* a layer of one head */
  float *k, *v;       /* [n_layers][n_kv_heads][rows][k_dim], v_dim */
  uint8_t *work;
  size_t each, head_bytes, work_bytes;
  uint32_t rows;     /* most tokens that a head keeps */
  uint32_t n_tokens; /* of the range */
} rdkv__repack_work;

/* Tokens that a head keeps in all segments. */
static uint64_t rdkv__rows_of(const rdkv_segment *s, int n, int layer, int head) {
  uint64_t rows = 0;
  int i, l;
  for (i = 0; i < n; i++)
    for (l = 0; l < 4; l++) rows += rdkv__record(&s[i], layer, head)->n_tokens[l];
  return rows;
}

static rdkv_status rdkv__repack_layout(const rdkv_config *cfg, const rdkv_segment *s, int n,
                                       rdkv__arena *arena, rdkv__repack_work *w, uint64_t *bytes) {
  rdkv_config one;
  uint64_t tokens = 0, rows = 0, heads, r, a, b, c;
  int i, l, h;
  *bytes = 0;
  if (!rdkv__resolved(cfg) || s == NULL || n < 1) return RDKV_ERR_ARGUMENT;
  if (cfg->profile == RDKV_PAPER || cfg->positions || cfg->n_pins) return RDKV_ERR_CONFIG;
  for (i = 0; i < n; i++) {
    const rdkv_header *hd = s[i].header;
    if (hd == NULL || hd->first_layer != 0 || hd->n_layers != (uint32_t)cfg->n_layers ||
        hd->n_kv_heads != (uint32_t)cfg->n_kv_heads || hd->k_dim != (uint32_t)cfg->k_dim ||
        hd->v_dim != (uint32_t)cfg->v_dim ||
        hd->token_begin != rdkv__add(s[0].header->token_begin, tokens))
      return RDKV_ERR_ARGUMENT;
    tokens += hd->n_tokens;
  }
  for (l = 0; l < cfg->n_layers; l++)
    for (h = 0; h < cfg->n_kv_heads; h++)
      if ((r = rdkv__rows_of(s, n, l, h)) > rows) rows = r;
  if (tokens > RDKV__MAX_TOKENS) return RDKV_ERR_OVERFLOW;
  one = rdkv__one_head(cfg);
  w->rows = (uint32_t)rows, w->n_tokens = (uint32_t)tokens;
  w->each = rdkv_layer_bytes(cfg, w->rows), w->head_bytes = rdkv_layer_bytes(&one, w->rows);
  a = rdkv_layer_scratch(cfg, w->rows), b = rdkv_allocate_scratch(cfg, cfg->n_layers, w->rows);
  c = rdkv_layer_scratch(&one, w->rows);
  if (w->each == 0 || w->head_bytes == 0 || a == 0 || b == 0 || c == 0) return RDKV_ERR_OVERFLOW;
  b = a > b ? a : b, w->work_bytes = (size_t)(b > c ? b : c);
  heads = (uint64_t)cfg->n_layers * (uint64_t)cfg->n_kv_heads;
  w->kv = (rdkv_kv *)rdkv__take(arena, bytes, (uint64_t)cfg->n_layers, sizeof(rdkv_kv));
  w->layers = (rdkv_layer *)rdkv__take(arena, bytes, (uint64_t)cfg->n_layers, sizeof(rdkv_layer));
  w->mem = (uint8_t *)rdkv__take(arena, bytes, (uint64_t)cfg->n_layers,
                                 (size_t)rdkv__round_up(w->each, 64));
  w->head_mem = (uint8_t *)rdkv__take(arena, bytes, w->head_bytes, 1);
  w->k = (float *)rdkv__take(arena, bytes, rdkv__mul(heads * (uint64_t)cfg->k_dim, rows + 1), 4);
  w->v = (float *)rdkv__take(arena, bytes, rdkv__mul(heads * (uint64_t)cfg->v_dim, rows + 1), 4);
  w->work = (uint8_t *)rdkv__take(arena, bytes, w->work_bytes, 1);
  return RDKV_OK;
}

RDKV_DEF size_t rdkv_repack_scratch(const rdkv_config *cfg, const rdkv_segment *segments, int n) {
  rdkv__repack_work w;
  uint64_t bytes;
  if (rdkv__repack_layout(cfg, segments, n, NULL, &w, &bytes) != RDKV_OK) return 0;
  return rdkv__size(bytes);
}

/* Weighs and measures one head's n tokens, k and v [n][dim], into its part of the layer. */
static rdkv_status rdkv__repack_head(const rdkv_config *cfg, const rdkv__repack_work *w, int layer,
                                     int head, const float *k, const float *v, uint32_t n,
                                     const rdkv_queries *by) {
  rdkv_config one = rdkv__one_head(cfg);
  rdkv_layer *to = &w->layers[layer], from;
  rdkv_queries last = *by;
  rdkv_kv kv;
  rdkv_status st;
  uint32_t used = rdkv__min_u32(by->n, (uint32_t)cfg->window), before = by->n - used;
  size_t kd = (size_t)cfg->k_dim, vd = (size_t)cfg->v_dim, h = (size_t)head, l;
  kv.k = rdkv_dense(k, RDKV_F32, 1, cfg->k_dim), kv.v = rdkv_dense(v, RDKV_F32, 1, cfg->v_dim);
  kv.q = by->q, kv.q.data = rdkv__at(&by->q, before, head * one.n_q_heads);
  if (last.out.data) last.out.data = rdkv__at(&by->out, before, head * one.n_q_heads);
  if (last.lse_stride == 0) last.lse_stride = (size_t)cfg->n_q_heads;
  if (last.lse) last.lse += before * last.lse_stride + h * (size_t)one.n_q_heads;
  st = rdkv_layer_init(&one, n, w->head_mem, w->head_bytes, &from);
  if (st == RDKV_OK)
    st = rdkv__score_by(&one, &kv, (int)used, n, &last, &from, w->work, w->work_bytes);
  if (st == RDKV_OK) st = rdkv_measure(&one, &kv, &from, w->work, w->work_bytes);
  if (st != RDKV_OK) return st;
  memcpy(to->token + h * w->rows, from.token, n * sizeof(float));
  memcpy(to->q_square + h * kd, from.q_square, kd * sizeof(float));
  memcpy(to->k_square + h * kd, from.k_square, kd * sizeof(float));
  memcpy(to->mean_out + h * vd, from.mean_out, vd * sizeof(float));
  memcpy(to->k_distortion + h * 4 * kd, from.k_distortion, 4 * kd * sizeof(float));
  for (l = 0; l < 5; l++)
    memcpy(to->v_distortion + (h * 5 + l) * w->rows, from.v_distortion + l * n, n * sizeof(float));
  return RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_repack(const rdkv_config *cfg, const rdkv_segment *segments, int n,
                                 const rdkv_queries *by, void *block, size_t capacity,
                                 size_t *bytes, void *scratch, size_t scratch_bytes) {
  rdkv__repack_work w;
  rdkv__arena arena;
  rdkv_config c;
  rdkv_header *h = (rdkv_header *)block;
  rdkv_status st;
  uint64_t need;
  int l, head, i;
  if (by == NULL || block == NULL || bytes == NULL) return RDKV_ERR_ARGUMENT;
  st = rdkv__repack_layout(cfg, segments, n, NULL, &w, &need);
  if (st != RDKV_OK) return st;
  for (l = 0; l < cfg->n_layers; l++)
    if (by[l].n < 1 || by[l].n > RDKV__MAX_TOKENS || !rdkv__tensor_ok(&by[l].q) ||
        (by[l].out.data != NULL && !rdkv__tensor_ok(&by[l].out)) ||
        (by[l].lse_stride && by[l].lse_stride < (size_t)cfg->n_q_heads))
      return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv__size(need), &arena);
  if (st != RDKV_OK) return st;
  rdkv__repack_layout(cfg, segments, n, &arena, &w, &need);
  c = *cfg; /* keep is of all tokens, not of those that are left */
  c.budget_bytes = rdkv__budget(cfg, w.n_tokens, cfg->n_layers);
  if (c.budget_bytes == 0) c.budget_bytes = 1; /* 0 would mean keep */
  for (l = 0; l < cfg->n_layers; l++) {
    size_t k_all = (size_t)cfg->n_kv_heads * w.rows * (size_t)cfg->k_dim;
    size_t v_all = (size_t)cfg->n_kv_heads * w.rows * (size_t)cfg->v_dim;
    float *k = w.k + (size_t)l * k_all, *v = w.v + (size_t)l * v_all;
    rdkv_kv *kv = &w.kv[l];
    kv->k = rdkv_dense(k, RDKV_F32, 1, cfg->k_dim), kv->v = rdkv_dense(v, RDKV_F32, 1, cfg->v_dim);
    kv->k.head_stride = (ptrdiff_t)w.rows * cfg->k_dim;
    kv->v.head_stride = (ptrdiff_t)w.rows * cfg->v_dim;
    kv->q = by[l].q;
    st = rdkv_layer_init(cfg, w.rows, w.mem + (size_t)l * (size_t)rdkv__round_up(w.each, 64),
                         w.each, &w.layers[l]);
    for (head = 0; head < cfg->n_kv_heads && st == RDKV_OK; head++) {
      float *kh = k + (size_t)head * w.rows * (size_t)cfg->k_dim;
      float *vh = v + (size_t)head * w.rows * (size_t)cfg->v_dim;
      uint32_t rows = 0, more = 0;
      for (i = 0; i < n && st == RDKV_OK; i++, rows += more)
        st = rdkv_unpack(&segments[i], l, head, kh + (size_t)rows * (size_t)cfg->k_dim,
                         vh + (size_t)rows * (size_t)cfg->v_dim, NULL, &more);
      if (st == RDKV_OK && rows > 0) st = rdkv__repack_head(cfg, &w, l, head, kh, vh, rows, &by[l]);
    }
    if (st != RDKV_OK) return st;
  }
  st = rdkv_allocate(&c, w.layers, cfg->n_layers, w.work, w.work_bytes);
  if (st == RDKV_OK)
    st = rdkv_pack(&c, w.kv, w.layers, cfg->n_layers, 0, segments[0].header->token_begin, block,
                   capacity, bytes, w.work, w.work_bytes);
  if (st != RDKV_OK) return st;
  h->n_tokens = w.n_tokens, h->budget_bytes = cfg->budget_bytes;
  h->head_sum = rdkv__head_sum((const uint8_t *)block, h);
  return RDKV_OK;
}

/* Queries and outputs are a tail whose heads are query heads. */
static rdkv_config rdkv__query_shape(const rdkv_config *cfg) {
  rdkv_config c = *cfg;
  c.n_kv_heads = c.n_q_heads;
  return c;
}

static uint64_t rdkv__sequence_layout(const rdkv_config *cfg, int max_segments, uint32_t capacity,
                                      rdkv_dtype dtype, int keep_queries, rdkv__arena *arena,
                                      rdkv_segment **list, void **tail, void **queries,
                                      float **lse) {
  rdkv_config c = rdkv__query_shape(cfg);
  uint64_t bytes = 0, a = rdkv_tail_bytes(cfg, capacity, dtype), b = 0, l = 0;
  if (keep_queries) {
    b = rdkv_tail_bytes(&c, capacity, dtype);
    l = rdkv__mul((uint64_t)cfg->n_layers * (((uint64_t)cfg->n_q_heads + 1) & ~(uint64_t)1),
                  capacity);
  }
  if (a == 0 || (keep_queries && b == 0)) return UINT64_MAX;
  *list = (rdkv_segment *)rdkv__take(arena, &bytes, (uint64_t)max_segments, sizeof(rdkv_segment));
  *tail = rdkv__take(arena, &bytes, a, 1);
  *queries = rdkv__take(arena, &bytes, b, 1);
  *lse = (float *)rdkv__take(arena, &bytes, l, sizeof(float));
  return bytes;
}

RDKV_DEF size_t rdkv_sequence_bytes(const rdkv_config *cfg, int max_segments, uint32_t capacity,
                                    rdkv_dtype dtype, int keep_queries) {
  rdkv_segment *list;
  void *tail, *queries;
  float *lse;
  if (!rdkv__resolved(cfg) || max_segments < 0) return 0;
  return rdkv__size(rdkv__sequence_layout(cfg, max_segments, capacity, dtype, keep_queries, NULL,
                                          &list, &tail, &queries, &lse));
}

RDKV_DEF rdkv_status rdkv_sequence_init(const rdkv_config *cfg, int max_segments, uint32_t capacity,
                                        rdkv_dtype dtype, int keep_queries, void *mem, size_t bytes,
                                        rdkv_sequence *sequence) {
  rdkv__arena arena;
  rdkv_sequence s;
  rdkv_config c;
  rdkv_status st;
  void *tail, *queries;
  memset(&s, 0, sizeof s);
  if (!rdkv__resolved(cfg) || max_segments < 0 || sequence == NULL || (unsigned)dtype > RDKV_BF16)
    return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(mem, bytes,
                     rdkv_sequence_bytes(cfg, max_segments, capacity, dtype, keep_queries), &arena);
  if (st != RDKV_OK) return st;
  rdkv__sequence_layout(cfg, max_segments, capacity, dtype, keep_queries, &arena, &s.segments,
                        &tail, &queries, &s.lse);
  s.max_segments = max_segments;
  s.n_q_heads = (uint32_t)cfg->n_q_heads, s.lse_stride = (s.n_q_heads + 1) & ~1u;
  c = rdkv__query_shape(cfg);
  rdkv_tail_init(cfg, capacity, dtype, tail, rdkv_tail_bytes(cfg, capacity, dtype), &s.tail);
  if (keep_queries)
    rdkv_tail_init(&c, capacity, dtype, queries, rdkv_tail_bytes(&c, capacity, dtype), &s.queries);
  *sequence = s;
  return RDKV_OK;
}

static int rdkv__sequence_ok(const rdkv_sequence *s) {
  return s && s->tail.memory && s->n_segments >= 0 && s->n_segments <= s->max_segments &&
         (s->segments || s->max_segments == 0);
}

/* 1 if the layers hold equally many tokens, and queries for those from query_begin on. */
static int rdkv__sequence_level(const rdkv_sequence *s) {
  int l;
  for (l = 1; l < s->tail.n_layers; l++) {
    if (s->tail.n_tokens[l] != s->tail.n_tokens[0]) return 0;
    if (s->queries.memory && s->queries.n_tokens[l] != s->queries.n_tokens[0]) return 0;
  }
  return s->queries.memory == NULL || s->queries.n_tokens[0] == 0 ||
         (uint64_t)s->queries.n_tokens[0] + s->query_begin == s->tail.n_tokens[0];
}

static uint64_t rdkv__segment_end(const rdkv_segment *s) {
  return rdkv__add(s->header->token_begin, s->header->n_tokens);
}

static int rdkv__segment_fits(const rdkv_sequence *s, const rdkv_header *h) {
  return h->n_kv_heads == (uint32_t)s->tail.n_kv_heads && h->k_dim == (uint32_t)s->tail.k_dim &&
         h->v_dim == (uint32_t)s->tail.v_dim && h->n_q_heads == s->n_q_heads;
}

RDKV_DEF rdkv_status rdkv_sequence_add(rdkv_sequence *sequence, const rdkv_segment *segment) {
  uint64_t end;
  uint32_t n = 0;
  int l;
  if (!rdkv__sequence_ok(sequence) || segment == NULL || segment->header == NULL ||
      !rdkv__segment_fits(sequence, segment->header))
    return RDKV_ERR_ARGUMENT;
  end = rdkv__segment_end(segment);
  for (l = 0; l < sequence->tail.n_layers; l++) n = rdkv__max_u32(n, sequence->tail.n_tokens[l]);
  if (n > 0 && end > sequence->tail_begin) return RDKV_ERR_ARGUMENT;
  if (sequence->n_segments == sequence->max_segments) return RDKV_ERR_FULL;
  sequence->segments[sequence->n_segments++] = *segment;
  if (end > sequence->tail_begin) sequence->tail_begin = end;
  return RDKV_OK;
}

/* A layer of a tail as tensors, from a token on. */
static rdkv_tensor rdkv__tail_tensor(const rdkv_tail *t, int layer, int is_v, uint32_t from) {
  rdkv_tensor x;
  x.token_stride = rdkv__pad16(is_v ? t->v_dim : t->k_dim);
  x.head_stride = x.token_stride * (ptrdiff_t)t->capacity;
  x.dim_stride = 1, x.dtype = t->dtype;
  x.data = rdkv__tail_rows(t, layer, 0, is_v) +
           (size_t)x.token_stride * from * (t->dtype == RDKV_F32 ? 4u : 2u);
  return x;
}

/* Calls for each layer, part and head of a tail: the bytes of a row. */
static size_t rdkv__tail_row(const rdkv_tail *t, int is_v) {
  return (size_t)rdkv__pad16(is_v ? t->v_dim : t->k_dim) * (t->dtype == RDKV_F32 ? 4 : 2);
}

/* dst's rows of a layer become n of src's from `from` on; both may be the same tail. */
static void rdkv__tail_copy(rdkv_tail *dst, const rdkv_tail *src, int layer, uint32_t from,
                            uint32_t n) {
  int part, head;
  for (part = 0; part < 2; part++)
    for (head = 0; head < src->n_kv_heads; head++)
      memmove(rdkv__tail_rows(dst, layer, head, part),
              rdkv__tail_rows(src, layer, head, part) + from * rdkv__tail_row(src, part),
              n * rdkv__tail_row(src, part));
  dst->n_tokens[layer] = n;
}

static float *rdkv__lse(const rdkv_sequence *s, int layer, uint32_t row) {
  return s->lse + ((size_t)layer * s->queries.capacity + row) * s->lse_stride;
}

/* dst's queries of a layer become n of src's from `from` on. */
static void rdkv__queries_copy(rdkv_sequence *dst, const rdkv_sequence *src, int layer,
                               uint32_t from, uint32_t n) {
  rdkv__tail_copy(&dst->queries, &src->queries, layer, from, n);
  memmove(rdkv__lse(dst, layer, 0), rdkv__lse(src, layer, from),
          (size_t)n * src->lse_stride * sizeof(float));
}

RDKV_DEF rdkv_status rdkv_sequence_attend(const rdkv_config *cfg, rdkv_sequence *sequence,
                                          int layer, const float *q, float *out, float *lse,
                                          void *scratch, size_t scratch_bytes) {
  rdkv_cache cache;
  rdkv_tail *queries;
  rdkv_status st;
  uint32_t n;
  int head;
  if (!rdkv__sequence_ok(sequence)) return RDKV_ERR_ARGUMENT;
  queries = &sequence->queries;
  cache = rdkv_sequence_cache(sequence);
  if (queries->memory == NULL)
    return rdkv_attend(cfg, &cache, layer, q, out, lse, scratch, scratch_bytes);
  if (!rdkv__resolved(cfg) || layer < 0 || layer >= queries->n_layers || q == NULL || out == NULL ||
      queries->n_kv_heads != cfg->n_q_heads || queries->k_dim != cfg->k_dim ||
      queries->v_dim != cfg->v_dim)
    return RDKV_ERR_ARGUMENT;
  n = queries->n_tokens[layer];
  if ((uint64_t)n + sequence->query_begin + 1 != sequence->tail.n_tokens[layer])
    return RDKV_ERR_ARGUMENT;
  { /* q first: out may be the same memory */
    rdkv_tensor t = rdkv_dense(q, RDKV_F32, cfg->n_q_heads, cfg->k_dim), none = t;
    float zero[RDKV__MAX_DIM];
    memset(zero, 0, sizeof zero);
    none.data = zero, none.head_stride = 0;
    st = rdkv_tail_append(queries, layer, t, none, 1);
    if (st != RDKV_OK) return st;
  }
  st = rdkv_attend(cfg, &cache, layer, q, out, rdkv__lse(sequence, layer, n), scratch,
                   scratch_bytes);
  if (st != RDKV_OK) {
    queries->n_tokens[layer] = n;
    return st;
  }
  for (head = 0; head < cfg->n_q_heads; head++) {
    uint8_t *row = rdkv__tail_rows(queries, layer, head, 1) + n * rdkv__tail_row(queries, 1);
    const float *from = out + (size_t)head * (size_t)cfg->v_dim;
    uint16_t *half = (uint16_t *)(void *)row;
    int d;
    if (queries->dtype == RDKV_F32) memcpy(row, from, (size_t)cfg->v_dim * sizeof(float));
    for (d = 0; d < cfg->v_dim && queries->dtype != RDKV_F32; d++)
      half[d] = queries->dtype == RDKV_F16 ? rdkv__to_half(from[d]) : rdkv__to_bf16(from[d]);
  }
  if (lse) memcpy(lse, rdkv__lse(sequence, layer, n), (size_t)cfg->n_q_heads * sizeof(float));
  return RDKV_OK;
}

/* The config that blocks are scored with: all queries of a block count. */
static rdkv_config rdkv__block_config(const rdkv_config *cfg, uint32_t block) {
  rdkv_config c = *cfg;
  c.window = (int32_t)rdkv__max_u32(1, rdkv__min_u32(block, RDKV__MAX_WINDOW));
  return c;
}

/* What the sequence's compression needs before the scratch of rdkv_compress_by. */
static uint64_t rdkv__block_layout(const rdkv_config *cfg, rdkv__arena *arena, rdkv_kv **kv,
                                   rdkv_queries **by) {
  uint64_t bytes = 0;
  *kv = (rdkv_kv *)rdkv__take(arena, &bytes, (uint64_t)cfg->n_layers, sizeof **kv);
  *by = (rdkv_queries *)rdkv__take(arena, &bytes, (uint64_t)cfg->n_layers, sizeof **by);
  return bytes;
}

RDKV_DEF size_t rdkv_sequence_scratch(const rdkv_config *cfg, uint32_t block) {
  rdkv_config c;
  rdkv_kv *kv;
  rdkv_queries *by;
  size_t bytes;
  if (block == 0) block = 128;
  if (!rdkv__resolved(cfg) || block > RDKV__MAX_WINDOW) return 0;
  c = rdkv__block_config(cfg, block);
  bytes = rdkv_compress_scratch(&c, block);
  return bytes ? rdkv__size(rdkv__add(bytes, rdkv__block_layout(cfg, NULL, &kv, &by))) : 0;
}

/* The tail's first n tokens become a segment, scored by the queries of tokens [q_begin, q_end) of
   the tail. */
static rdkv_status rdkv__sequence_block(const rdkv_config *cfg, rdkv_sequence *s, uint32_t n,
                                        uint32_t q_begin, uint32_t q_end, rdkv_kv *kv,
                                        rdkv_queries *by, void *scratch, size_t scratch_bytes) {
  rdkv_segment segment;
  rdkv_status st;
  size_t bytes = 0;
  uint32_t drop;
  int l;
  if (q_begin < s->query_begin) q_begin = s->query_begin;
  if (q_end <= q_begin) return RDKV_ERR_ARGUMENT;
  if (s->n_segments == s->max_segments || s->arena == NULL) return RDKV_ERR_FULL;
  if (!rdkv__aligned(s->arena + s->arena_used, 128)) return RDKV_ERR_ALIGNMENT;
  for (l = 0; l < cfg->n_layers; l++) {
    kv[l].k = rdkv__tail_tensor(&s->tail, l, 0, 0), kv[l].v = rdkv__tail_tensor(&s->tail, l, 1, 0);
    by[l].q = kv[l].q = rdkv__tail_tensor(&s->queries, l, 0, q_begin - s->query_begin);
    by[l].out = rdkv__tail_tensor(&s->queries, l, 1, q_begin - s->query_begin);
    by[l].lse = rdkv__lse(s, l, q_begin - s->query_begin), by[l].lse_stride = s->lse_stride;
    by[l].n = q_end - q_begin, by[l].position = q_begin;
  }
  st = rdkv_compress_by(cfg, kv, by, n, s->tail_begin, s->arena + s->arena_used,
                        s->arena_bytes - s->arena_used, &bytes, scratch, scratch_bytes);
  if (st == RDKV_ERR_MEMORY) st = RDKV_ERR_FULL; /* scratch was looked at before */
  if (st == RDKV_OK) st = rdkv_open(s->arena + s->arena_used, bytes, RDKV_MAP, &segment);
  if (st != RDKV_OK) return st;
  s->segments[s->n_segments++] = segment;
  s->arena_used += bytes, s->tail_begin += n;
  drop = n > s->query_begin ? n - s->query_begin : 0;
  for (l = 0; l < cfg->n_layers; l++) {
    rdkv__tail_copy(&s->tail, &s->tail, l, n, s->tail.n_tokens[l] - n);
    if (s->queries.n_tokens[l] > drop)
      rdkv__queries_copy(s, s, l, drop, s->queries.n_tokens[l] - drop);
    else
      s->queries.n_tokens[l] = 0;
  }
  s->query_begin = s->query_begin > n ? s->query_begin - n : 0;
  return RDKV_OK;
}

/* least: dense tokens at which a block is made; 0: all. */
static rdkv_status rdkv__sequence_blocks(const rdkv_config *cfg, rdkv_sequence *s, uint32_t block,
                                         uint64_t least, void *scratch, size_t scratch_bytes) {
  rdkv_config c;
  rdkv__arena arena;
  rdkv_kv *kv;
  rdkv_queries *by;
  rdkv_status st = RDKV_OK;
  uint32_t n;
  if (!rdkv__resolved(cfg) || !rdkv__sequence_ok(s) || block < 1 || block > RDKV__MAX_WINDOW ||
      s->tail.n_layers != cfg->n_layers || s->tail.n_kv_heads != cfg->n_kv_heads ||
      s->tail.k_dim != cfg->k_dim || s->tail.v_dim != cfg->v_dim || s->queries.memory == NULL ||
      s->n_q_heads != (uint32_t)cfg->n_q_heads || s->arena_used > s->arena_bytes)
    return RDKV_ERR_ARGUMENT;
  if (!rdkv__sequence_level(s)) return RDKV_ERR_ARGUMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_sequence_scratch(cfg, block), &arena);
  if (st != RDKV_OK) return st;
  rdkv__block_layout(cfg, &arena, &kv, &by);
  c = rdkv__block_config(cfg, block);
  while (st == RDKV_OK && (n = s->tail.n_tokens[0]) > 0 && n >= least) {
    uint32_t end = rdkv__min_u32(n, 2 * block);
    if (n <= block) /* its own queries */
      st = rdkv__sequence_block(&c, s, n, 0, n, kv, by, arena.next, arena.left);
    else
      st = rdkv__sequence_block(&c, s, block, block, end, kv, by, arena.next, arena.left);
  }
  return st;
}

RDKV_DEF rdkv_status rdkv_sequence_compress(const rdkv_config *cfg, rdkv_sequence *sequence,
                                            uint32_t block, uint32_t recent, void *scratch,
                                            size_t scratch_bytes) {
  if (block == 0) block = 128;
  return rdkv__sequence_blocks(cfg, sequence, block, (uint64_t)block + rdkv__max_u32(block, recent),
                               scratch, scratch_bytes);
}

RDKV_DEF rdkv_status rdkv_sequence_flush(const rdkv_config *cfg, rdkv_sequence *sequence,
                                         uint32_t block, void *scratch, size_t scratch_bytes) {
  return rdkv__sequence_blocks(cfg, sequence, block == 0 ? 128 : block, 0, scratch, scratch_bytes);
}

RDKV_DEF size_t rdkv_sequence_merge_scratch(const rdkv_config *cfg, const rdkv_sequence *sequence,
                                            int n) {
  size_t bytes;
  if (!rdkv__sequence_ok(sequence) || n < 1 || n > sequence->n_segments) return 0;
  bytes = rdkv_repack_scratch(cfg, sequence->segments + sequence->n_segments - n, n);
  if (bytes == 0) return 0;
  return rdkv__size(
      rdkv__add(bytes, rdkv__round_up((uint64_t)cfg->n_layers * sizeof(rdkv_queries), 64)));
}

RDKV_DEF rdkv_status rdkv_sequence_merge(const rdkv_config *cfg, rdkv_sequence *sequence, int n,
                                         void *scratch, size_t scratch_bytes) {
  rdkv_sequence *s = sequence;
  rdkv_segment *old, segment;
  rdkv_queries *by;
  rdkv__arena arena;
  rdkv_status st;
  uint8_t *to;
  uint64_t sum = 0;
  uintptr_t first, base;
  size_t bytes = 0;
  int l, i, own;
  if (!rdkv__resolved(cfg) || !rdkv__sequence_ok(s) || n < 1 || n > s->n_segments ||
      s->queries.memory == NULL || s->n_q_heads != (uint32_t)cfg->n_q_heads ||
      s->queries.n_layers != cfg->n_layers || s->arena_used > s->arena_bytes)
    return RDKV_ERR_ARGUMENT;
  if (s->arena == NULL) return RDKV_ERR_FULL;
  to = s->arena + s->arena_used;
  if (!rdkv__aligned(to, 128)) return RDKV_ERR_ALIGNMENT;
  st = rdkv__scratch(scratch, scratch_bytes, rdkv_sequence_merge_scratch(cfg, s, n), &arena);
  if (st != RDKV_OK) return st;
  by = (rdkv_queries *)rdkv__take(&arena, NULL, (uint64_t)cfg->n_layers, sizeof *by);
  for (l = 0; l < cfg->n_layers; l++) {
    by[l].q = rdkv__tail_tensor(&s->queries, l, 0, 0);
    by[l].out = rdkv__tail_tensor(&s->queries, l, 1, 0);
    by[l].lse = rdkv__lse(s, l, 0), by[l].lse_stride = s->lse_stride;
    by[l].n = s->queries.n_tokens[l], by[l].position = 0;
  }
  old = s->segments + s->n_segments - n;
  st = rdkv_repack(cfg, old, n, by, to, s->arena_bytes - s->arena_used, &bytes, arena.next,
                   arena.left);
  if (st == RDKV_ERR_MEMORY) st = RDKV_ERR_FULL; /* scratch was looked at before */
  if (st != RDKV_OK) return st;
  first = (uintptr_t)old[0].block, base = (uintptr_t)s->arena;
  for (i = 0, own = first >= base + s->arena_shared; i < n; i++) {
    own = own && (uintptr_t)old[i].block == first + sum;
    sum += old[i].header->total_bytes;
  }
  if (own && first + sum == base + s->arena_used) {
    memmove(s->arena + (first - base), to, bytes);
    to = s->arena + (first - base), s->arena_used = first - base;
  }
  st = rdkv_open(to, bytes, RDKV_MAP, &segment);
  RDKV_ASSERT(st == RDKV_OK);
  *old = segment;
  s->n_segments -= n - 1, s->arena_used += bytes;
  return st;
}

/* The tail keeps its first n tokens, and their queries. */
static void rdkv__sequence_shorten(rdkv_sequence *s, uint32_t n) {
  rdkv_tail_rewind(&s->tail, n);
  if (s->queries.memory) rdkv_tail_rewind(&s->queries, n > s->query_begin ? n - s->query_begin : 0);
  if (n < s->query_begin) s->query_begin = n;
}

RDKV_DEF rdkv_status rdkv_sequence_rollback(rdkv_sequence *sequence, uint64_t n_tokens) {
  rdkv_sequence *s = sequence;
  uint64_t end = 0;
  uint32_t most = 0;
  int i, n = 0;
  if (!rdkv__sequence_ok(s)) return RDKV_ERR_ARGUMENT;
  for (i = 0; i < s->tail.n_layers; i++) most = rdkv__max_u32(most, s->tail.n_tokens[i]);
  if (n_tokens > s->tail_begin + most) return RDKV_ERR_ARGUMENT;
  if (n_tokens >= s->tail_begin) {
    rdkv__sequence_shorten(s, (uint32_t)(n_tokens - s->tail_begin));
    return RDKV_OK;
  }
  for (i = 0; i < s->n_segments; i++) {
    uint64_t e = rdkv__segment_end(&s->segments[i]);
    if (e <= n_tokens)
      end = e > end ? e : end;
    else if (s->segments[i].header->token_begin < n_tokens)
      return RDKV_ERR_GONE;
  }
  if (end != n_tokens) return RDKV_ERR_GONE; /* tokens between segments, dense once */
  for (i = 0; i < s->n_segments; i++) {
    if (rdkv__segment_end(&s->segments[i]) <= n_tokens) {
      s->segments[n++] = s->segments[i];
    } else if (s->arena) {
      uintptr_t at = (uintptr_t)s->segments[i].block, base = (uintptr_t)s->arena;
      if (at >= base + s->arena_shared && at < base + s->arena_used) s->arena_used = at - base;
    }
  }
  s->n_segments = n, s->tail_begin = n_tokens;
  rdkv__sequence_shorten(s, 0);
  return RDKV_OK;
}

static int rdkv__same_tail(const rdkv_tail *a, const rdkv_tail *b) {
  return a->dtype == b->dtype && a->n_layers == b->n_layers && a->n_kv_heads == b->n_kv_heads &&
         a->k_dim == b->k_dim && a->v_dim == b->v_dim;
}

RDKV_DEF rdkv_status rdkv_sequence_fork(rdkv_sequence *sequence, rdkv_sequence *fork) {
  rdkv_sequence *s = sequence;
  int l;
  if (!rdkv__sequence_ok(s) || !rdkv__sequence_ok(fork) || s == fork ||
      !rdkv__same_tail(&s->tail, &fork->tail) || s->n_q_heads != fork->n_q_heads ||
      (s->queries.memory == NULL) != (fork->queries.memory == NULL) ||
      (s->queries.memory && !rdkv__same_tail(&s->queries, &fork->queries)))
    return RDKV_ERR_ARGUMENT;
  if (s->n_segments > fork->max_segments) return RDKV_ERR_FULL;
  for (l = 0; l < s->tail.n_layers; l++)
    if (s->tail.n_tokens[l] > fork->tail.capacity) return RDKV_ERR_FULL;
  if (s->n_segments > 0)
    memcpy(fork->segments, s->segments, (size_t)s->n_segments * sizeof *s->segments);
  fork->n_segments = s->n_segments, fork->tail_begin = s->tail_begin;
  fork->query_begin = s->query_begin;
  fork->arena_used = fork->arena_shared; /* nothing of its own yet */
  for (l = 0; l < s->tail.n_layers; l++) {
    rdkv__tail_copy(&fork->tail, &s->tail, l, 0, s->tail.n_tokens[l]);
    if (s->queries.memory) rdkv__queries_copy(fork, s, l, 0, s->queries.n_tokens[l]);
  }
  s->arena_shared = s->arena_used;
  return RDKV_OK;
}

/* ---- >>impl-file : save and load ------------------------------------------------------------- */

#define RDKV__FILE_MAGIC 0x534b4452u

typedef char rdkv__file_is_128_bytes[sizeof(rdkv_file) == 128 ? 1 : -1];
typedef char rdkv__entry_is_32_bytes[sizeof(rdkv_file_entry) == 32 ? 1 : -1];

static uint64_t rdkv__file_head_bytes(uint64_t n_segments) {
  return rdkv__round_up(
      rdkv__add(sizeof(rdkv_file), rdkv__mul(n_segments, sizeof(rdkv_file_entry))), 128);
}

/* Bytes of n tokens of a tail in a file. */
static uint64_t rdkv__file_rows(uint64_t layers, uint64_t heads, uint32_t k_dim, uint32_t v_dim,
                                uint32_t dtype, uint64_t n) {
  uint64_t row = (uint64_t)rdkv__pad16((int)k_dim) + (uint64_t)rdkv__pad16((int)v_dim);
  return rdkv__mul(rdkv__mul(layers * heads, row * (dtype == RDKV_F32 ? 4 : 2)), n);
}

/* Where the parts of a file's tail end: tail, queries, lse. */
static void rdkv__file_parts(const rdkv_file *f, uint64_t end[3]) {
  end[0] = rdkv__add(f->tail, rdkv__file_rows(f->n_layers, f->n_kv_heads, f->k_dim, f->v_dim,
                                              f->tail_dtype, f->n_tail));
  end[1] = rdkv__add(end[0], rdkv__file_rows(f->n_layers, f->n_q_heads, f->k_dim, f->v_dim,
                                             f->tail_dtype, f->n_queries));
  end[2] = rdkv__add(
      end[1], rdkv__mul((uint64_t)f->n_layers * ((f->n_q_heads + 1) & ~1u) * 4, f->n_queries));
}

/* What a file of this sequence starts with, but for the sums; 0 if it cannot be saved. */
static int rdkv__file_describe(const rdkv_sequence *s, rdkv_file *f) {
  uint64_t end[3];
  int i;
  memset(f, 0, sizeof *f);
  if (!rdkv__sequence_ok(s) || !rdkv__sequence_level(s)) return 0;
  for (i = 0; i < s->n_segments; i++) {
    const rdkv_header *h = s->segments[i].header;
    if (h == NULL || !rdkv__segment_fits(s, h)) return 0;
    f->tail = rdkv__add(f->tail, h->total_bytes);
  }
  f->magic = RDKV__FILE_MAGIC, f->version = RDKV_FILE_VERSION;
  f->n_segments = (uint32_t)s->n_segments, f->n_layers = (uint32_t)s->tail.n_layers;
  f->n_q_heads = s->n_q_heads, f->n_kv_heads = (uint32_t)s->tail.n_kv_heads;
  f->k_dim = (uint32_t)s->tail.k_dim, f->v_dim = (uint32_t)s->tail.v_dim;
  f->n_tail = s->tail.n_tokens[0], f->tail_dtype = (uint32_t)s->tail.dtype;
  f->tail_begin = s->tail_begin;
  if (s->queries.memory) f->n_queries = s->queries.n_tokens[0], f->query_begin = s->query_begin;
  f->head_bytes = rdkv__file_head_bytes(f->n_segments);
  f->tail = rdkv__add(f->tail, f->head_bytes);
  rdkv__file_parts(f, end);
  f->total_bytes = rdkv__round_up(end[2], 128);
  return f->total_bytes <= (uint64_t)INT64_MAX;
}

RDKV_DEF uint64_t rdkv_save_bytes(const rdkv_sequence *sequence) {
  rdkv_file f;
  return rdkv__file_describe(sequence, &f) ? f.total_bytes : 0;
}

/* Where pieces go: to a checksum (write NULL) or to the caller. */
typedef struct rdkv__sink {
  rdkv_write *write;
  void *user;
  uint64_t at, sum;
  int failed;
} rdkv__sink;

/* bytes is a multiple of 8, data 8-byte aligned. */
static void rdkv__put(rdkv__sink *k, const void *data, size_t bytes) {
  if (bytes == 0 || k->failed) return;
  if (k->write)
    k->failed = k->write(k->user, data, bytes) != 0;
  else
    k->sum += rdkv_checksum(data, bytes, k->at / 8);
  k->at += bytes;
}

static void rdkv__put_rows(rdkv__sink *k, const rdkv_tail *t) {
  int l, part, head;
  for (l = 0; l < t->n_layers; l++)
    for (part = 0; part < 2; part++)
      for (head = 0; head < t->n_kv_heads; head++)
        rdkv__put(k, rdkv__tail_rows(t, l, head, part), t->n_tokens[l] * rdkv__tail_row(t, part));
}

/* Zeros up to a multiple of 128. */
static void rdkv__put_pad(rdkv__sink *k) {
  static const uint64_t zero[16] = {0};
  rdkv__put(k, zero, (size_t)((128 - k->at % 128) % 128));
}

static void rdkv__put_tail(rdkv__sink *k, const rdkv_sequence *s) {
  int l;
  rdkv__put_rows(k, &s->tail);
  if (s->queries.memory) {
    rdkv__put_rows(k, &s->queries);
    for (l = 0; l < s->queries.n_layers; l++)
      rdkv__put(k, rdkv__lse(s, l, 0),
                (size_t)s->queries.n_tokens[l] * s->lse_stride * sizeof(float));
  }
  rdkv__put_pad(k);
}

/* The head: to a checksum, or to the caller. */
static void rdkv__put_head(rdkv__sink *k, const rdkv_sequence *s, const rdkv_file *f) {
  uint64_t at = f->head_bytes;
  int i;
  rdkv__put(k, f, sizeof *f);
  for (i = 0; i < s->n_segments; i++) {
    const rdkv_header *h = s->segments[i].header;
    rdkv_file_entry e;
    e.offset = at, e.bytes = h->total_bytes, e.head_sum = h->head_sum, e.body_sum = h->body_sum;
    rdkv__put(k, &e, sizeof e);
    at += e.bytes;
  }
  rdkv__put_pad(k);
}

RDKV_DEF rdkv_status rdkv_save(const rdkv_sequence *sequence, rdkv_write *write, void *user) {
  rdkv_file f;
  rdkv__sink k;
  int i;
  if (write == NULL || !rdkv__file_describe(sequence, &f)) return RDKV_ERR_ARGUMENT;
  memset(&k, 0, sizeof k);
  k.at = f.tail;
  rdkv__put_tail(&k, sequence);
  RDKV_ASSERT(k.at == f.total_bytes);
  f.tail_sum = k.sum;
  k.at = k.sum = 0;
  rdkv__put_head(&k, sequence, &f);
  f.head_sum = k.sum;
  k.at = 0, k.write = write, k.user = user;
  rdkv__put_head(&k, sequence, &f);
  for (i = 0; i < sequence->n_segments; i++)
    rdkv__put(&k, sequence->segments[i].block, (size_t)sequence->segments[i].header->total_bytes);
  rdkv__put_tail(&k, sequence);
  return k.failed ? RDKV_ERR_SINK : RDKV_OK;
}

RDKV_DEF rdkv_status rdkv_file_head(const void *file, size_t bytes, rdkv_file *head) {
  const rdkv_file *f = (const rdkv_file *)file;
  const uint8_t *p = (const uint8_t *)file;
  const rdkv_file_entry *e;
  uint64_t salt = 4 * 0x9e3779b97f4a7c15u, at, end[3], i, j;
  if (file == NULL || head == NULL) return RDKV_ERR_ARGUMENT;
  if (!rdkv__aligned(file, 128)) return RDKV_ERR_ALIGNMENT;
  if (bytes < sizeof *f) return RDKV_ERR_TRUNCATED;
  if (f->magic != RDKV__FILE_MAGIC) return RDKV_ERR_FORMAT;
  if (f->version != RDKV_FILE_VERSION) return RDKV_ERR_VERSION;
  if (f->n_layers < 1 || f->n_layers > 65535 || f->n_kv_heads < 1 || f->n_kv_heads > 65535 ||
      f->n_q_heads < f->n_kv_heads || f->n_q_heads > 65535 || f->n_q_heads % f->n_kv_heads ||
      f->k_dim < 1 || f->k_dim > RDKV__MAX_DIM || f->v_dim < 1 || f->v_dim > RDKV__MAX_DIM ||
      f->tail_dtype > RDKV_BF16 || f->n_tail > RDKV__MAX_TOKENS || f->n_segments > 0x7fffffff ||
      f->n_queries > f->n_tail || f->query_begin > f->n_tail ||
      (f->n_queries > 0 && f->n_queries + f->query_begin != f->n_tail) ||
      f->tail_begin > UINT64_MAX - f->n_tail ||
      f->head_bytes != rdkv__file_head_bytes(f->n_segments) || f->total_bytes % 128)
    return RDKV_ERR_FORMAT;
  if (f->head_bytes > bytes || f->total_bytes > bytes) return RDKV_ERR_TRUNCATED;
  if (f->total_bytes < bytes) return RDKV_ERR_FORMAT;
  if (rdkv_checksum(p, (size_t)f->head_bytes, 0) - rdkv__mix(f->head_sum + salt) +
          rdkv__mix(salt) !=
      f->head_sum)
    return RDKV_ERR_CHECKSUM;
  for (i = 0; i < sizeof f->reserved; i++)
    if (f->reserved[i]) return RDKV_ERR_FORMAT;
  e = (const rdkv_file_entry *)(const void *)(p + sizeof *f);
  for (i = 0, at = f->head_bytes; i < f->n_segments; i++, at += e->bytes, e++)
    if (e->offset != at || e->bytes < sizeof(rdkv_header) || e->bytes % 128 ||
        e->bytes > f->total_bytes - at)
      return RDKV_ERR_FORMAT;
  for (j = (uint64_t)((const uint8_t *)e - p); j < f->head_bytes; j++)
    if (p[j]) return RDKV_ERR_FORMAT;
  rdkv__file_parts(f, end);
  if (f->tail != at || end[2] > f->total_bytes || f->total_bytes - end[2] >= 128)
    return RDKV_ERR_FORMAT;
  for (j = end[2]; j < f->total_bytes; j++)
    if (p[j]) return RDKV_ERR_FORMAT;
  *head = *f;
  return RDKV_OK;
}

/* Appends n tokens that lie in a file from p on to a tail; where that fails the tail is empty. */
static rdkv_status rdkv__file_take(rdkv_tail *t, const uint8_t *p, rdkv_dtype dtype, uint32_t n) {
  size_t size = dtype == RDKV_F32 ? 4 : 2;
  rdkv_tensor x[2];
  rdkv_status st = RDKV_OK;
  int l, part;
  for (l = 0; l < t->n_layers && st == RDKV_OK; l++) {
    for (part = 0; part < 2; part++) {
      x[part].data = p, x[part].dtype = dtype, x[part].dim_stride = 1;
      x[part].token_stride = rdkv__pad16(part ? t->v_dim : t->k_dim);
      x[part].head_stride = x[part].token_stride * (ptrdiff_t)n;
      p += (size_t)x[part].head_stride * (size_t)t->n_kv_heads * size;
    }
    st = rdkv_tail_append(t, l, x[0], x[1], n);
  }
  if (st != RDKV_OK) rdkv_tail_rewind(t, 0);
  return st;
}

RDKV_DEF rdkv_status rdkv_load(const rdkv_config *cfg, const void *file, size_t bytes,
                               rdkv_open_mode mode, rdkv_sequence *sequence) {
  rdkv_sequence *s = sequence;
  const uint8_t *p = (const uint8_t *)file;
  const rdkv_file_entry *e;
  rdkv_segment segment;
  rdkv_status st;
  rdkv_file f;
  uint64_t end[3];
  uint32_t i;
  int l, queries;
  if (!rdkv__resolved(cfg) || !rdkv__sequence_ok(s) || (unsigned)mode > RDKV_MAP ||
      s->n_segments > 0 || s->tail.n_layers != cfg->n_layers ||
      s->tail.n_kv_heads != cfg->n_kv_heads || s->tail.k_dim != cfg->k_dim ||
      s->tail.v_dim != cfg->v_dim || (s->queries.memory && s->queries.n_kv_heads != cfg->n_q_heads))
    return RDKV_ERR_ARGUMENT;
  for (l = 0; l < s->tail.n_layers; l++)
    if (s->tail.n_tokens[l] > 0) return RDKV_ERR_ARGUMENT;
  st = rdkv_file_head(file, bytes, &f);
  if (st != RDKV_OK) return st;
  if (f.n_layers != (uint32_t)cfg->n_layers || f.n_q_heads != (uint32_t)cfg->n_q_heads ||
      f.n_kv_heads != (uint32_t)cfg->n_kv_heads || f.k_dim != (uint32_t)cfg->k_dim ||
      f.v_dim != (uint32_t)cfg->v_dim)
    return RDKV_ERR_CONFIG;
  if (f.n_segments > (uint32_t)s->max_segments || f.n_tail > s->tail.capacity) return RDKV_ERR_FULL;
  if (rdkv_checksum(p + f.tail, (size_t)(f.total_bytes - f.tail), f.tail / 8) != f.tail_sum)
    return RDKV_ERR_CHECKSUM;
  e = (const rdkv_file_entry *)(const void *)(p + sizeof f);
  for (i = 0; i < f.n_segments; i++) {
    const rdkv_header *h = (const rdkv_header *)(const void *)(p + e[i].offset);
    st = rdkv_open(p + e[i].offset, (size_t)e[i].bytes, mode, &segment);
    if (st == RDKV_ERR_TRUNCATED) st = RDKV_ERR_FORMAT; /* the file says where it ends */
    if (st != RDKV_OK) return st;
    if (rdkv__segment_end(&segment) > f.tail_begin || h->total_bytes != e[i].bytes ||
        h->n_q_heads != f.n_q_heads || h->n_kv_heads != f.n_kv_heads || h->k_dim != f.k_dim ||
        h->v_dim != f.v_dim)
      return RDKV_ERR_FORMAT;
    if (h->head_sum != e[i].head_sum || h->body_sum != e[i].body_sum) return RDKV_ERR_CHECKSUM;
  }
  rdkv__file_parts(&f, end);
  queries = s->queries.memory != NULL && f.n_queries > 0;
  st = rdkv__file_take(&s->tail, p + f.tail, (rdkv_dtype)f.tail_dtype, f.n_tail);
  if (st == RDKV_OK && queries)
    st = rdkv__file_take(&s->queries, p + end[0], (rdkv_dtype)f.tail_dtype, f.n_queries);
  if (st != RDKV_OK) {
    rdkv_tail_rewind(&s->tail, 0);
    return st;
  }
  for (l = 0; l < s->tail.n_layers && queries; l++) {
    size_t n = (size_t)f.n_queries * s->lse_stride * sizeof(float);
    memcpy(rdkv__lse(s, l, 0), p + end[1] + (size_t)l * n, n);
  }
  for (i = 0; i < f.n_segments; i++) /* as rdkv_open has found them */
    rdkv_open(p + e[i].offset, (size_t)e[i].bytes, RDKV_MAP, &s->segments[i]);
  s->n_segments = (int32_t)f.n_segments;
  s->tail_begin = f.tail_begin;
  s->query_begin = queries ? f.query_begin : f.n_tail;
  return RDKV_OK;
}

#ifdef __cplusplus
}
#endif

#endif /* RDKV_IMPLEMENTED */
#endif /* RDKV_IMPLEMENTATION && !RDKV__SIMD_BODY */

/* ---- >>simd : the kernels, included once for each instruction set ---------------------------- */

#ifdef RDKV__SIMD_BODY

/* Vectors of VL floats: LD, ST, SET; LDI loads VL words; KEEP stops the compiler from fusing a
   product into a later sum. CODE_b(w, s) is the b-bit field of each word from bit s on as a
   signed number; FLIP inverts each field's top bit first, which turns code into code - 2^(b-1).
   CODE_8 gives 2^24 times that (a byte moved to a word's top); rdkv__code_unit takes it back. */
#if RDKV__SIMD_BODY == 1
#define RDKV__NAME(f) rdkv__##f##_scalar
#define RDKV__VL 1
#define RDKV__NV 4
#define RDKV__FN static
#define RDKV__VF float
#define RDKV__VI int32_t
#define RDKV__LD(p) (*(p))
#define RDKV__ST(p, v) (*(p) = (v))
#define RDKV__SET(x) (x)
#define RDKV__LDI(p) ((int32_t) * (p))
#define RDKV__ADD(a, b) ((a) + (b))
#define RDKV__SUB(a, b) ((a) - (b))
#define RDKV__MUL(a, b) ((a) * (b))
#define RDKV__FMA(a, b, c) ((a) * (b) + (c))
#define RDKV__MIN(a, b) ((b) < (a) ? (b) : (a))
#define RDKV__MAX(a, b) ((b) > (a) ? (b) : (a))
#define RDKV__KEEP(v) ((v) = rdkv__f(v))
#define RDKV__HALVES(p) rdkv__from_half(*(p))
#define RDKV__BFLOATS(p) rdkv__float((uint32_t) * (p) << 16)
#define RDKV__ROUND_HALF(v) rdkv__from_half(rdkv__to_half(v))
#define RDKV__TO_INT(v) ((int32_t)lrintf(v))
#define RDKV__TO_FLOAT(v) ((float)(v))
#define RDKV__ABS_BITS(v) ((int32_t)(rdkv__bits(v) & 0x7fffffff))
#define RDKV__MAXI(a, b) ((b) > (a) ? (b) : (a))
#define RDKV__STI(p, v) (*(p) = (v))
#define RDKV__ST_CODES(p, v) (*(p) = (uint8_t)(v))
#define RDKV__FLIP(w, bits) ((int32_t)((uint32_t)(w) ^ (bits)))
#define RDKV__SIGNED(w, s, b) (float)((int32_t)((uint32_t)(w) << (32 - (b) - (s))) >> (32 - (b)))
#define RDKV__CODE_2(w, s) RDKV__SIGNED(w, s, 2)
#define RDKV__CODE_4(w, s) RDKV__SIGNED(w, s, 4)
#define RDKV__CODE_8(w, s) ((float)(int32_t)((uint32_t)(w) << (24 - (s)) & 0xff000000))
#define RDKV__LOW_HALF(w) rdkv__from_half((uint16_t)((uint32_t)(w)&0xffff))
#define RDKV__HIGH_HALF(w) rdkv__from_half((uint16_t)((uint32_t)(w) >> 16))
#elif RDKV__SIMD_BODY == 2
#define RDKV__NAME(f) rdkv__##f##_avx2
#define RDKV__VL 8
#define RDKV__NV 2
#if defined(__GNUC__)
#define RDKV__FN __attribute__((target("avx2,fma,f16c"))) static
#define RDKV__KEEP(v) __asm__("" : "+x"(v))
#else
#define RDKV__FN static
#define RDKV__KEEP(v) ((void)0)
#endif
#define RDKV__VF __m256
#define RDKV__VI __m256i
#define RDKV__LD(p) _mm256_loadu_ps(p)
#define RDKV__ST(p, v) _mm256_storeu_ps(p, v)
#define RDKV__SET(x) _mm256_set1_ps(x)
#define RDKV__LDI(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define RDKV__ADD(a, b) _mm256_add_ps(a, b)
#define RDKV__SUB(a, b) _mm256_sub_ps(a, b)
#define RDKV__MUL(a, b) _mm256_mul_ps(a, b)
#define RDKV__FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define RDKV__FNMA(a, b, c) _mm256_fnmadd_ps(a, b, c)
#define RDKV__MIN(a, b) _mm256_min_ps(a, b)
#define RDKV__MAX(a, b) _mm256_max_ps(a, b)
#define RDKV__HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define RDKV__BFLOATS(p)                 \
  _mm256_castsi256_ps(_mm256_slli_epi32( \
      _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))), 16))
#define RDKV__ROUND_HALF(v) _mm256_cvtph_ps(_mm256_cvtps_ph(v, 8))
#define RDKV__TO_INT(v) _mm256_cvtps_epi32(v)
#define RDKV__TO_FLOAT(v) _mm256_cvtepi32_ps(v)
#define RDKV__ROUND(v) _mm256_round_ps(v, 8)
#define RDKV__EXP2I(v, n) \
  _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(n, 23)))
#define RDKV__ABS_BITS(v) _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff))
#define RDKV__MAXI(a, b) _mm256_max_epi32(a, b)
#define RDKV__STI(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), v)
#define RDKV__ST_CODES(p, v)                                                                 \
  do {                                                                                       \
    __m128i c_ = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); \
    _mm_storel_epi64((__m128i *)(void *)(p), _mm_packus_epi16(c_, c_));                      \
  } while (0)
#define RDKV__FLIP(w, bits) _mm256_xor_si256(w, _mm256_set1_epi32((int)(bits)))
#define RDKV__SIGNED(w, s, b) \
  _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w, 32 - (b) - (s)), 32 - (b)))
#define RDKV__CODE_2(w, s) /* 0, 1, -2, -1: the flipped code's own order */ \
  _mm256_permutevar_ps(_mm256_setr_ps(0, 1, -2, -1, 0, 1, -2, -1), _mm256_srli_epi32(w, s))
#define RDKV__CODE_4(w, s) RDKV__SIGNED(w, s, 4)
#define RDKV__CODE_8(w, s) /* byte s/8 to the top of each word, zeros below */               \
  _mm256_cvtepi32_ps(_mm256_shuffle_epi8(                                                    \
      w, _mm256_add_epi32(_mm256_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080,  \
                                            0x00808080, 0x04808080, 0x08808080, 0x0c808080), \
                          _mm256_set1_epi32((s) / 8 << 24))))
#define RDKV__PACK16(w) /* the low halves of 8 words */ \
  _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0x08))
#define RDKV__LOW_HALF(w) \
  _mm256_cvtph_ps(RDKV__PACK16(_mm256_and_si256(w, _mm256_set1_epi32(0xffff))))
#define RDKV__HIGH_HALF(w) _mm256_cvtph_ps(RDKV__PACK16(_mm256_srli_epi32(w, 16)))
#elif RDKV__SIMD_BODY == 3
#define RDKV__NAME(f) rdkv__##f##_avx512
#define RDKV__VL 16
#define RDKV__NV 4
#if defined(__GNUC__)
#define RDKV__FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))) static
#define RDKV__KEEP(v) __asm__("" : "+v"(v))
#else
#define RDKV__FN static
#define RDKV__KEEP(v) ((void)0)
#endif
#define RDKV__VF __m512
#define RDKV__VI __m512i
#define RDKV__LD(p) _mm512_loadu_ps(p)
#define RDKV__ST(p, v) _mm512_storeu_ps(p, v)
#define RDKV__SET(x) _mm512_set1_ps(x)
#define RDKV__LDI(p) _mm512_loadu_si512((const void *)(p))
#define RDKV__ADD(a, b) _mm512_add_ps(a, b)
#define RDKV__SUB(a, b) _mm512_sub_ps(a, b)
#define RDKV__MUL(a, b) _mm512_mul_ps(a, b)
#define RDKV__FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define RDKV__FNMA(a, b, c) _mm512_fnmadd_ps(a, b, c)
#define RDKV__MIN(a, b) _mm512_min_ps(a, b)
#define RDKV__MAX(a, b) _mm512_max_ps(a, b)
#define RDKV__HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define RDKV__BFLOATS(p)                 \
  _mm512_castsi512_ps(_mm512_slli_epi32( \
      _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(p))), 16))
#define RDKV__ROUND_HALF(v) _mm512_cvtph_ps(_mm512_cvtps_ph(v, 8))
#define RDKV__TO_INT(v) _mm512_cvtps_epi32(v)
#define RDKV__TO_FLOAT(v) _mm512_cvtepi32_ps(v)
#define RDKV__ROUND(v) _mm512_roundscale_ps(v, 8)
#define RDKV__EXP2I(v, n) \
  _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(n, 23)))
#define RDKV__ABS_BITS(v) _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff))
#define RDKV__MAXI(a, b) _mm512_max_epi32(a, b)
#define RDKV__STI(p, v) _mm512_storeu_si512((void *)(p), v)
#define RDKV__ST_CODES(p, v) _mm_storeu_si128((__m128i *)(void *)(p), _mm512_cvtepi32_epi8(v))
#define RDKV__FLIP(w, bits) _mm512_xor_si512(w, _mm512_set1_epi32((int)(bits)))
#define RDKV__CODE_2(w, s)                                                                     \
  _mm512_permutevar_ps(_mm512_setr_ps(0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1), \
                       _mm512_srli_epi32(w, s))
#define RDKV__CODE_4(w, s)                       \
  _mm512_permutexvar_ps(_mm512_srli_epi32(w, s), \
                        _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1))
#define RDKV__CODE_8(w, s) /* byte s/8 to the top of each word, zeros below */               \
  _mm512_cvtepi32_ps(_mm512_shuffle_epi8(                                                    \
      w, _mm512_add_epi32(_mm512_set4_epi32(0x0c808080, 0x08808080, 0x04808080, 0x00808080), \
                          _mm512_set1_epi32((s) / 8 << 24))))
#define RDKV__LOW_HALF(w) _mm512_cvtph_ps(_mm512_cvtepi32_epi16(w))
#define RDKV__HIGH_HALF(w) _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)))
#elif RDKV__SIMD_BODY == 4
#define RDKV__NAME(f) rdkv__##f##_neon
#define RDKV__VL 4
#define RDKV__NV 4
#define RDKV__FN static
#if defined(__GNUC__)
#define RDKV__KEEP(v) __asm__("" : "+w"(v))
#else
#define RDKV__KEEP(v) ((void)0)
#endif
#define RDKV__VF float32x4_t
#define RDKV__VI int32x4_t
#define RDKV__LD(p) vld1q_f32(p)
#define RDKV__ST(p, v) vst1q_f32(p, v)
#define RDKV__SET(x) vdupq_n_f32(x)
#define RDKV__LDI(p) vreinterpretq_s32_u32(vld1q_u32(p))
#define RDKV__ADD(a, b) vaddq_f32(a, b)
#define RDKV__SUB(a, b) vsubq_f32(a, b)
#define RDKV__MUL(a, b) vmulq_f32(a, b)
#define RDKV__FMA(a, b, c) vfmaq_f32(c, a, b)
#define RDKV__FNMA(a, b, c) vfmsq_f32(c, a, b)
#define RDKV__MIN(a, b) vminq_f32(a, b)
#define RDKV__MAX(a, b) vmaxq_f32(a, b)
#define RDKV__HALVES(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define RDKV__BFLOATS(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define RDKV__ROUND_HALF(v) vcvt_f32_f16(vcvt_f16_f32(v))
#define RDKV__TO_INT(v) vcvtnq_s32_f32(v)
#define RDKV__TO_FLOAT(v) vcvtq_f32_s32(v)
#define RDKV__ROUND(v) vrndnq_f32(v)
#define RDKV__EXP2I(v, n) \
  vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(n, 23)))
#define RDKV__ABS_BITS(v) vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7fffffff))
#define RDKV__MAXI(a, b) vmaxq_s32(a, b)
#define RDKV__STI(p, v) vst1q_s32(p, v)
#define RDKV__ST_CODES(p, v)                                                   \
  do {                                                                         \
    int32_t c_[4];                                                             \
    vst1q_s32(c_, v);                                                          \
    (p)[0] = (uint8_t)c_[0], (p)[1] = (uint8_t)c_[1], (p)[2] = (uint8_t)c_[2], \
    (p)[3] = (uint8_t)c_[3];                                                   \
  } while (0)
#define RDKV__FLIP(w, bits) veorq_s32(w, vreinterpretq_s32_u32(vdupq_n_u32(bits)))
#define RDKV__SIGNED(w, s, b) \
  vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(w, vdupq_n_s32(32 - (b) - (s))), 32 - (b)))
#define RDKV__CODE_2(w, s) RDKV__SIGNED(w, s, 2)
#define RDKV__CODE_4(w, s) RDKV__SIGNED(w, s, 4)
#define RDKV__CODE_8(w, s) \
  vcvtq_f32_s32(vandq_s32(vshlq_s32(w, vdupq_n_s32(24 - (s))), vdupq_n_s32((int)0xff000000)))
#define RDKV__LOW_HALF(w) vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(w))))
#define RDKV__HIGH_HALF(w) \
  vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(vreinterpretq_u32_s32(w), 16)))
#endif

#if defined(__GNUC__)
#define RDKV__INLINE RDKV__FN inline __attribute__((always_inline))
#else
#define RDKV__INLINE RDKV__FN inline
#endif
#define RDKV__LANES (16 / RDKV__VL) /* vectors that make up 16 lanes */

/* exp(x) for -87 <= x <= 88, clamped below; relative error under 2e-7. The polynomial is Taylor's
   series on [-ln2/2, ln2/2], the first term left out being r^8/8!. */
RDKV__INLINE RDKV__VF RDKV__NAME(exp)(RDKV__VF x) {
#if RDKV__VL == 1
  return expf(x < -87.0f ? -87.0f : x);
#else
  RDKV__VF n, r, p;
  x = RDKV__MAX(x, RDKV__SET(-87.0f));
  n = RDKV__ROUND(RDKV__MUL(x, RDKV__SET(1.44269504f)));
  r = RDKV__FNMA(n, RDKV__SET(0.693359375f), x); /* ln 2 in two parts, the first exact */
  r = RDKV__FNMA(n, RDKV__SET(-2.12194440e-4f), r);
  p = RDKV__FMA(RDKV__SET(1.98412698e-4f), r, RDKV__SET(1.38888889e-3f));
  p = RDKV__FMA(p, r, RDKV__SET(8.33333333e-3f));
  p = RDKV__FMA(p, r, RDKV__SET(4.16666667e-2f));
  p = RDKV__FMA(p, r, RDKV__SET(1.66666667e-1f));
  p = RDKV__FMA(p, r, RDKV__SET(0.5f));
  p = RDKV__FMA(p, r, RDKV__SET(1.0f));
  p = RDKV__FMA(p, r, RDKV__SET(1.0f));
  return RDKV__EXP2I(p, RDKV__TO_INT(n));
#endif
}

RDKV__INLINE float RDKV__NAME(sum)(RDKV__VF v) {
#if RDKV__VL == 16
  return _mm512_reduce_add_ps(v);
#else
  float a[RDKV__VL];
  int n, i;
  RDKV__ST(a, v);
  for (n = RDKV__VL / 2; n > 0; n /= 2)
    for (i = 0; i < n; i++) a[i] += a[i + n];
  return a[0];
#endif
}

#if RDKV__VL == 16
/* Four groups of 4, 8 or 16 neighbouring floats, each summed to 4. */
RDKV__INLINE __m512 rdkv__quads_avx512(const int level, const float *p) {
  __m512 a = _mm512_loadu_ps(p), b, c, d;
  if (level == 1) return a;
  b = _mm512_loadu_ps(p + 16);
  if (level == 3) {
    c = _mm512_loadu_ps(p + 32), d = _mm512_loadu_ps(p + 48);
    a = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    b = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
/* In each quarter the sums of a's, b's, c's and d's four floats. */
RDKV__INLINE __m512 rdkv__tree_avx512(__m512 a, __m512 b, __m512 c, __m512 d) {
  a = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  c = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(a, c, 0x44), _mm512_shuffle_ps(a, c, 0xee));
}
#endif

#if RDKV__VL > 1
/* Four sums at once, [x0, x1, x2, x3] in 4 floats at `to`. */
RDKV__INLINE void RDKV__NAME(sum4)(const RDKV__VF *x, float *to) {
#if RDKV__VL == 4
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
#elif RDKV__VL == 8
  __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#else
  __m512 y = rdkv__tree_avx512(x[0], x[1], x[2], x[3]);
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(y), _mm512_extractf32x8_ps(y, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#endif
}
#endif

/* VL elements of a dense row as floats; type is a constant wherever this is inlined */
RDKV__INLINE RDKV__VF RDKV__NAME(load)(const void *p, rdkv_dtype type, int i) {
  if (type == RDKV_F16) return RDKV__HALVES((const uint16_t *)p + i);
  if (type == RDKV_BF16) return RDKV__BFLOATS((const uint16_t *)p + i);
  return RDKV__LD((const float *)p + i);
}

RDKV__INLINE uint32_t RDKV__NAME(row_of)(const void *src, rdkv_dtype type, int n, float *dst) {
  int32_t lane[RDKV__VL];
  uint32_t max = 0;
  int i = 0, j;
  if (n >= RDKV__VL) {
    RDKV__VF v = RDKV__NAME(load)(src, type, 0);
    RDKV__VI m = RDKV__ABS_BITS(v);
    RDKV__ST(dst, v);
    for (i = RDKV__VL; i + RDKV__VL <= n; i += RDKV__VL) {
      v = RDKV__NAME(load)(src, type, i);
      RDKV__ST(dst + i, v);
      m = RDKV__MAXI(m, RDKV__ABS_BITS(v));
    }
    RDKV__STI(lane, m);
    for (j = 0; j < RDKV__VL; j++) max = rdkv__max_u32(max, (uint32_t)lane[j]);
  }
  for (; i < n; i++) {
    dst[i] = rdkv__element(src, type, i);
    max = rdkv__max_u32(max, rdkv__bits(dst[i]) & 0x7fffffff);
  }
  for (; i & 15; i++) dst[i] = 0;
  return max;
}

RDKV__FN uint32_t RDKV__NAME(row)(const void *src, rdkv_dtype type, ptrdiff_t stride, int n,
                                  float *dst) {
  uint32_t max = 0;
  int i;
  if (stride == 1) {
    switch (type) {
      case RDKV_F16:
        return RDKV__NAME(row_of)(src, RDKV_F16, n, dst);
      case RDKV_BF16:
        return RDKV__NAME(row_of)(src, RDKV_BF16, n, dst);
      case RDKV_F32:
        return RDKV__NAME(row_of)(src, RDKV_F32, n, dst);
    }
  }
  for (i = 0; i < n; i++) {
    dst[i] = rdkv__element(src, type, (ptrdiff_t)i * stride);
    max = rdkv__max_u32(max, rdkv__bits(dst[i]) & 0x7fffffff);
  }
  for (; i & 15; i++) dst[i] = 0;
  return max;
}

/* nr rows against nv vectors of columns; nr and nv are constants, the sums stay in registers */
RDKV__INLINE void RDKV__NAME(dot)(const float *qt, size_t nq, const float *rows, size_t stride,
                                  const int nr, const int nv, int dim, float *out) {
  RDKV__VF acc[6][4];
  int r, v, d;
  for (r = 0; r < nr; r++)
    for (v = 0; v < nv; v++) acc[r][v] = RDKV__SET(0.0f);
  for (d = 0; d < dim; d++) {
    RDKV__VF q[4];
    for (v = 0; v < nv; v++) q[v] = RDKV__LD(qt + (size_t)d * nq + v * RDKV__VL);
    for (r = 0; r < nr; r++) {
      RDKV__VF x = RDKV__SET(rows[(size_t)r * stride + (size_t)d]);
      for (v = 0; v < nv; v++) acc[r][v] = RDKV__FMA(x, q[v], acc[r][v]);
    }
  }
  for (r = 0; r < nr; r++)
    for (v = 0; v < nv; v++) RDKV__ST(out + (size_t)r * nq + v * RDKV__VL, acc[r][v]);
}

RDKV__FN void RDKV__NAME(logits)(const float *qt, size_t nq, const float *rows, size_t stride,
                                 int n_rows, int dim, float *out) {
  size_t c, step;
  int r;
  for (c = 0; c < nq; c += step) {
    step = nq - c >= RDKV__NV * RDKV__VL ? RDKV__NV * RDKV__VL : RDKV__VL;
    for (r = 0; r < n_rows; r += n_rows - r >= 6 ? 6 : 1) {
      const float *x = rows + (size_t)r * stride;
      float *y = out + (size_t)r * nq + c;
      if (n_rows - r >= 6) {
        if (step == RDKV__VL)
          RDKV__NAME(dot)(qt + c, nq, x, stride, 6, 1, dim, y);
        else
          RDKV__NAME(dot)(qt + c, nq, x, stride, 6, RDKV__NV, dim, y);
      } else {
        if (step == RDKV__VL)
          RDKV__NAME(dot)(qt + c, nq, x, stride, 1, 1, dim, y);
        else
          RDKV__NAME(dot)(qt + c, nq, x, stride, 1, RDKV__NV, dim, y);
      }
    }
  }
}

RDKV__FN void RDKV__NAME(softmax)(const float *logits, int n_rows, size_t nq, float *max,
                                  float *sum) {
  size_t c;
  int r;
  for (c = 0; c < nq; c += RDKV__VL) {
    RDKV__VF old = RDKV__LD(max + c), m = old, s = RDKV__SET(0.0f);
    for (r = 0; r < n_rows; r++) m = RDKV__MAX(m, RDKV__LD(logits + (size_t)r * nq + c));
    for (r = 0; r < n_rows; r++)
      s = RDKV__ADD(s, RDKV__NAME(exp)(RDKV__SUB(RDKV__LD(logits + (size_t)r * nq + c), m)));
    s = RDKV__FMA(RDKV__LD(sum + c), RDKV__NAME(exp)(RDKV__SUB(old, m)), s);
    RDKV__ST(max + c, m);
    RDKV__ST(sum + c, s);
  }
}

RDKV__FN void RDKV__NAME(weigh)(const float *logits, int n_rows, size_t nq, const float *max,
                                const float *inv, float *sum) {
  size_t c;
  int r;
  for (r = 0; r < n_rows; r++) {
    RDKV__VF s = RDKV__SET(0.0f);
    for (c = 0; c < nq; c += RDKV__VL) {
      RDKV__VF l = RDKV__LD(logits + (size_t)r * nq + c);
      l = RDKV__NAME(exp)(RDKV__SUB(l, RDKV__LD(max + c)));
      s = RDKV__FMA(l, RDKV__LD(inv + c), s);
    }
    sum[r] = RDKV__NAME(sum)(s);
  }
}

RDKV__FN void RDKV__NAME(axpy)(float a, const float *x, int n, float *y) {
  RDKV__VF va = RDKV__SET(a);
  int i;
  for (i = 0; i < n; i += RDKV__VL)
    RDKV__ST(y + i, RDKV__FMA(va, RDKV__LD(x + i), RDKV__LD(y + i)));
}

RDKV__FN void RDKV__NAME(ends)(const float *v, int n, float *lowest, float *highest) {
  float lo = v[0], hi = v[0], a[RDKV__VL];
  int i = 0;
  if (n >= RDKV__VL) {
    RDKV__VF x = RDKV__LD(v), y = x;
    for (i = RDKV__VL; i + RDKV__VL <= n; i += RDKV__VL) {
      x = RDKV__MIN(x, RDKV__LD(v + i));
      y = RDKV__MAX(y, RDKV__LD(v + i));
    }
    for (n -= i, v += i, i = 0; i < n; i++) lo = v[i] < lo ? v[i] : lo, hi = v[i] > hi ? v[i] : hi;
    RDKV__ST(a, x);
    for (i = 0; i < RDKV__VL; i++) lo = a[i] < lo ? a[i] : lo;
    RDKV__ST(a, y);
    for (i = 0; i < RDKV__VL; i++) hi = a[i] > hi ? a[i] : hi;
  } else {
    for (i = 0; i < n; i++) lo = v[i] < lo ? v[i] : lo, hi = v[i] > hi ? v[i] : hi;
  }
  *lowest = lo, *highest = hi;
}

RDKV__FN float RDKV__NAME(distance)(const float *v, const float *o, int n) {
  float lane[16];
  RDKV__VF acc[RDKV__LANES], x, d;
  int i, k, whole = n & ~15;
  for (k = 0; k < RDKV__LANES; k++) acc[k] = RDKV__SET(0.0f);
  for (i = 0; i < whole; i += 16)
    for (k = 0; k < RDKV__LANES; k++) {
      x = RDKV__LD(v + i + k * RDKV__VL);
      d = RDKV__SUB(x, o ? RDKV__LD(o + i + k * RDKV__VL) : RDKV__ROUND_HALF(x));
      d = RDKV__MUL(d, d);
      RDKV__KEEP(d);
      acc[k] = RDKV__ADD(acc[k], d);
    }
  for (k = 0; k < RDKV__LANES; k++) RDKV__ST(lane + k * RDKV__VL, acc[k]);
  for (i = whole; i < n; i++) {
    float e = rdkv__f(v[i] - (o ? o[i] : rdkv__from_half(rdkv__to_half(v[i]))));
    lane[i & 15] = rdkv__f(lane[i & 15] + rdkv__f(e * e));
  }
  return rdkv__lanes(lane);
}

/* Hull slopes of n tokens, slope[l][i] = min over a <= l of max over b > l of (d_a - d_b) /
   cost_ab: what pooling adjacent steps gives, without branches. d [5][stride], inv the ten 1 /
   cost_ab. */
RDKV__FN void RDKV__NAME(hull)(const float *d, size_t stride, int n, const float *inv,
                               float *slope) {
  int i, a, b, l, k;
  for (i = 0; i < n; i += RDKV__VL) {
    RDKV__VF x[5], m[4];
    for (l = 0; l < 5; l++) x[l] = RDKV__LD(d + (size_t)l * stride + i);
    for (a = 0, k = 10; a < 4; a++) {
      RDKV__VF top = RDKV__SET(0.0f);
      k -= 4 - a; /* the pairs (a, 4), (a, 3) ... end the list for a = 0 */
      for (b = 4; b > a; b--, k++) {
        RDKV__VF s = RDKV__SUB(x[a], x[b]);
        RDKV__KEEP(s);
        top = RDKV__MAX(top, RDKV__MUL(s, RDKV__SET(inv[k])));
        m[b - 1] = a ? RDKV__MIN(m[b - 1], top) : top;
      }
      k -= 4 - a;
    }
    for (l = 0; l < 4; l++) RDKV__ST(slope + l * RDKV__CHUNK + i, m[l]);
  }
}

RDKV__FN void RDKV__NAME(range)(const float *x, int n, float *lo, float *hi, float *sum) {
  int i;
  for (i = 0; i < n; i += RDKV__VL) {
    RDKV__VF v = RDKV__LD(x + i);
    RDKV__ST(lo + i, RDKV__MIN(RDKV__LD(lo + i), v));
    RDKV__ST(hi + i, RDKV__MAX(RDKV__LD(hi + i), v));
    RDKV__ST(sum + i, RDKV__ADD(RDKV__LD(sum + i), v));
  }
}

RDKV__FN void RDKV__NAME(moments)(const float *x, const float *o, int n, float g, float *lo,
                                  float *hi, float *sum) {
  RDKV__VF vg = RDKV__SET(g);
  int i;
  for (i = 0; i < n; i += RDKV__VL) {
    RDKV__VF v = RDKV__LD(x + i), u = RDKV__SUB(v, RDKV__LD(o + i)), p;
    float *first = sum + RDKV__MAX_DIM + i, *second = first + RDKV__MAX_DIM;
    RDKV__KEEP(u);
    RDKV__ST(lo + i, RDKV__MIN(RDKV__LD(lo + i), v));
    RDKV__ST(hi + i, RDKV__MAX(RDKV__LD(hi + i), v));
    RDKV__ST(sum + i, RDKV__ADD(RDKV__LD(sum + i), u));
    p = RDKV__MUL(vg, u);
    RDKV__KEEP(p);
    RDKV__ST(first, RDKV__ADD(RDKV__LD(first), p));
    p = RDKV__MUL(p, u);
    RDKV__KEEP(p);
    RDKV__ST(second, RDKV__ADD(RDKV__LD(second), p));
  }
}

/* step 1: every element has its own quantiser; 0: one for all */
RDKV__INLINE void RDKV__NAME(codes)(const float *x, int n, const float *mid, const float *inv,
                                    const float *lo, const float *hi, uint8_t *code,
                                    const int step) {
  int i;
  for (i = 0; i < n; i += RDKV__VL) {
    RDKV__VF l = step ? RDKV__LD(lo + i) : RDKV__SET(*lo);
    RDKV__VF h = step ? RDKV__LD(hi + i) : RDKV__SET(*hi);
    RDKV__VF c = RDKV__SUB(RDKV__LD(x + i), step ? RDKV__LD(mid + i) : RDKV__SET(*mid));
    RDKV__KEEP(c);
    c = RDKV__MUL(c, step ? RDKV__LD(inv + i) : RDKV__SET(*inv));
    RDKV__KEEP(c);
    c = RDKV__TO_FLOAT(RDKV__TO_INT(c));
    c = RDKV__SUB(RDKV__MAX(RDKV__MIN(c, h), l), l);
    RDKV__ST_CODES(code + i, RDKV__TO_INT(c));
  }
}

RDKV__FN void RDKV__NAME(quantise)(const float *x, int n, const float *mid, const float *inv,
                                   const float *lo, const float *hi, uint8_t *code) {
  RDKV__NAME(codes)(x, n, mid, inv, lo, hi, code, 1);
}

RDKV__FN void RDKV__NAME(quantise_one)(const float *x, int n, const float *mid, const float *inv,
                                       const float *lo, const float *hi, uint8_t *code) {
  RDKV__NAME(codes)(x, n, mid, inv, lo, hi, code, 0);
}

/* Two fields of a word vector, r = 0 and 1, share a coefficient: acc[h][a + r] += code *
   coefficient k of head h. */
#define RDKV__FIELDS(x0_, x1_, a_, k_)                           \
  do {                                                           \
    RDKV__VF x0__ = x0_, x1__ = x1_;                             \
    for (h = 0; h < nh; h++) {                                   \
      RDKV__VF c__ = RDKV__LD(c + ((k_)*nh + h) * 16);           \
      RDKV__KEEP(c__);                                           \
      acc[h][a_] = RDKV__FMA(x0__, c__, acc[h][a_]);             \
      acc[h][(a_) + 1] = RDKV__FMA(x1__, c__, acc[h][(a_) + 1]); \
    }                                                            \
  } while (0)
#define RDKV__FIELD_MAC(x_, a_, k_)                                              \
  do {                                                                           \
    RDKV__VF x__ = x_;                                                           \
    for (h = 0; h < nh; h++)                                                     \
      acc[h][a_] = RDKV__FMA(x__, RDKV__LD(c + ((k_)*nh + h) * 16), acc[h][a_]); \
  } while (0)
#define RDKV__BLOCK_2(s_)                                                           \
  do {                                                                              \
    RDKV__FIELDS(RDKV__CODE_2(w, 0), RDKV__CODE_2(w, 8), 0, 0);                     \
    RDKV__FIELDS(RDKV__CODE_2(w, 16), RDKV__CODE_2(w, 24), 0, 1);                   \
    RDKV__FIELDS(RDKV__CODE_2(w, 2), RDKV__CODE_2(w, 10), 0, 2);                    \
    RDKV__FIELDS(RDKV__CODE_2(w, 18), RDKV__CODE_2(w, 26), 0, 3);                   \
    RDKV__FIELDS(RDKV__CODE_2(w, 4), RDKV__CODE_2(w, 12), 2 * (s_), 4 - 4 * (s_));  \
    RDKV__FIELDS(RDKV__CODE_2(w, 20), RDKV__CODE_2(w, 28), 2 * (s_), 5 - 4 * (s_)); \
    RDKV__FIELDS(RDKV__CODE_2(w, 6), RDKV__CODE_2(w, 14), 2 * (s_), 6 - 4 * (s_));  \
    RDKV__FIELDS(RDKV__CODE_2(w, 22), RDKV__CODE_2(w, 30), 2 * (s_), 7 - 4 * (s_)); \
  } while (0)
#define RDKV__BLOCK_4                                             \
  do {                                                            \
    RDKV__FIELDS(RDKV__CODE_4(w, 0), RDKV__CODE_4(w, 8), 0, 0);   \
    RDKV__FIELDS(RDKV__CODE_4(w, 16), RDKV__CODE_4(w, 24), 0, 1); \
    RDKV__FIELDS(RDKV__CODE_4(w, 4), RDKV__CODE_4(w, 12), 0, 2);  \
    RDKV__FIELDS(RDKV__CODE_4(w, 20), RDKV__CODE_4(w, 28), 0, 3); \
  } while (0)
#define RDKV__BLOCK_8                                            \
  do {                                                           \
    RDKV__FIELDS(RDKV__CODE_8(w, 0), RDKV__CODE_8(w, 16), 0, 0); \
    RDKV__FIELDS(RDKV__CODE_8(w, 8), RDKV__CODE_8(w, 24), 0, 1); \
  } while (0)

/* K blocks of one width: work[h][a][word] = products summed over blocks and fields. coef
   [block][4][nh][16] is indexed by word mod 16; level and nh are constants. */
RDKV__INLINE void RDKV__NAME(k_run)(const int level, const int nh, const uint32_t *words,
                                    int n_blocks, const float *coef, float *work) {
  const int nw = 16 << level, na = level == 1 ? 4 : 2;
  int i, b, h, a;
  for (i = 0; i < nw; i += RDKV__VL) {
    RDKV__VF acc[4][4];
    for (h = 0; h < nh; h++)
      for (a = 0; a < na; a++) acc[h][a] = RDKV__SET(0.0f);
    for (b = 0; b < n_blocks; b++) {
      RDKV__VI w = RDKV__FLIP(RDKV__LDI(words + b * nw + i), rdkv__top_bits[level]);
      const float *c = coef + b * 64 * nh + (i & 15);
      if (level == 1)
        RDKV__BLOCK_2(1);
      else if (level == 2)
        RDKV__BLOCK_4;
      else
        RDKV__BLOCK_8;
    }
    for (h = 0; h < nh; h++)
      for (a = 0; a < na; a++) RDKV__ST(work + h * 256 + a * nw + i, acc[h][a]);
  }
}

/* Sums the products of a tile over channels, and adds them to logits [32] or sets these; logit 4g +
   2 sub + r is that of token 16 sub + 8 r + g, the order of the V parameters. */
RDKV__INLINE void RDKV__NAME(k_fold)(const int level, const float *work, float *logits, int add) {
#if RDKV__VL == 16 /* four g at a time, the same steps as below */
  int g, r;
  for (g = 0; g < 8; g += 4) {
    __m512 y, x[4];
    for (r = 0; r < (level == 1 ? 4 : 2); r++)
      x[r] = rdkv__quads_avx512(level, work + r * (16 << level) + g * (2 << level));
    if (level == 1) {
      y = rdkv__tree_avx512(x[0], x[1], x[2], x[3]);
    } else {
      if (level == 2) /* x[r] = s0, s1, s0, s1 */
        y = _mm512_add_ps(_mm512_shuffle_ps(x[0], x[1], 0x44), _mm512_shuffle_ps(x[0], x[1], 0xee));
      else /* x[r] = s0, s0, s1, s1 */
        y = _mm512_add_ps(_mm512_shuffle_ps(x[0], x[1], 0x88), _mm512_shuffle_ps(x[0], x[1], 0xdd));
      y = _mm512_shuffle_ps(y, y, 0xd8);
    }
    if (add) y = _mm512_add_ps(y, _mm512_loadu_ps(logits + 4 * g));
    _mm512_storeu_ps(logits + 4 * g, y);
  }
#else
  int g, sub, r, t;
  for (g = 0; g < 8; g++) {
#if RDKV__VL == 1
    for (sub = 0; sub < 2; sub++) {
      for (r = 0; r < 2; r++) {
        float s = add ? logits[4 * g + 2 * sub + r] : 0;
        for (t = 0; t < 4; t++) {
          if (level == 1) s += work[(2 * sub + r) * 32 + 4 * g + t];
          if (level == 2) s += work[r * 64 + (4 * g + t) * 2 + sub];
          if (level == 3)
            s += work[r * 128 + (4 * g + t) * 4 + 2 * sub] +
                 work[r * 128 + (4 * g + t) * 4 + 2 * sub + 1];
        }
        logits[4 * g + 2 * sub + r] = s;
      }
    }
#elif RDKV__SIMD_BODY == 4
    float32x4_t y, x0, x1;
    (void)sub, (void)t;
    if (level == 1) {
      x0 = vpaddq_f32(vld1q_f32(work + 4 * g), vld1q_f32(work + 32 + 4 * g));
      x1 = vpaddq_f32(vld1q_f32(work + 64 + 4 * g), vld1q_f32(work + 96 + 4 * g));
      y = vpaddq_f32(x0, x1);
    } else {
      float32x4_t x[2];
      for (r = 0; r < 2; r++) {
        const float *p = work + r * (level == 2 ? 64 : 128) + g * (level == 2 ? 8 : 16);
        x[r] = vaddq_f32(vld1q_f32(p), vld1q_f32(p + 4));
        if (level == 3) x[r] = vaddq_f32(x[r], vaddq_f32(vld1q_f32(p + 8), vld1q_f32(p + 12)));
      }
      if (level == 2) { /* x[r] = s0, s1, s0, s1 */
        x0 = vaddq_f32(x[0], vextq_f32(x[0], x[0], 2));
        x1 = vaddq_f32(x[1], vextq_f32(x[1], x[1], 2));
      } else { /* x[r] = s0, s0, s1, s1 */
        x0 = vpaddq_f32(x[0], x[0]);
        x1 = vpaddq_f32(x[1], x[1]);
      }
      y = vzip1q_f32(x0, x1);
    }
    if (add) y = vaddq_f32(y, vld1q_f32(logits + 4 * g));
    vst1q_f32(logits + 4 * g, y);
#else
    __m128 y, x[4];
    (void)sub, (void)t;
    if (level == 1) {
      for (r = 0; r < 4; r++) x[r] = _mm_loadu_ps(work + r * 32 + 4 * g);
      y = _mm_add_ps(_mm_unpacklo_ps(x[0], x[1]), _mm_unpackhi_ps(x[0], x[1]));
      x[0] = _mm_add_ps(_mm_unpacklo_ps(x[2], x[3]), _mm_unpackhi_ps(x[2], x[3]));
      y = _mm_add_ps(_mm_movelh_ps(y, x[0]), _mm_movehl_ps(x[0], y));
    } else {
      for (r = 0; r < 2; r++) {
        const float *p = work + r * (level == 2 ? 64 : 128) + g * (level == 2 ? 8 : 16);
        x[r] = _mm_add_ps(_mm_loadu_ps(p), _mm_loadu_ps(p + 4));
        if (level == 3)
          x[r] = _mm_add_ps(x[r], _mm_add_ps(_mm_loadu_ps(p + 8), _mm_loadu_ps(p + 12)));
      }
      if (level == 2) /* x[r] = s0, s1, s0, s1 */
        y = _mm_add_ps(_mm_movelh_ps(x[0], x[1]), _mm_movehl_ps(x[1], x[0]));
      else /* x[r] = s0, s0, s1, s1 */
        y = _mm_add_ps(_mm_shuffle_ps(x[0], x[1], 0x88), _mm_shuffle_ps(x[0], x[1], 0xdd));
      y = _mm_shuffle_ps(y, y, 0xd8);
    }
    if (add) y = _mm_add_ps(y, _mm_loadu_ps(logits + 4 * g));
    _mm_storeu_ps(logits + 4 * g, y);
#endif
  }
#endif
}

#define RDKV__FOR_HEADS(f, level, ...) \
  switch (n_heads) {                   \
    case 1:                            \
      f(level, 1, __VA_ARGS__);        \
      break;                           \
    case 2:                            \
      f(level, 2, __VA_ARGS__);        \
      break;                           \
    case 3:                            \
      f(level, 3, __VA_ARGS__);        \
      break;                           \
    default:                           \
      f(level, 4, __VA_ARGS__);        \
      break;                           \
  }

RDKV__FN void RDKV__NAME(k_codes)(int level, const uint32_t *words, int n_blocks, const float *coef,
                                  int n_heads, float *logits, float *work, int add) {
  int h;
  if (level == 1) {
    RDKV__FOR_HEADS(RDKV__NAME(k_run), 1, words, n_blocks, coef, work)
    for (h = 0; h < n_heads; h++)
      RDKV__NAME(k_fold)(1, work + h * 256, logits + h * RDKV__SLOTS, add);
  } else if (level == 2) {
    RDKV__FOR_HEADS(RDKV__NAME(k_run), 2, words, n_blocks, coef, work)
    for (h = 0; h < n_heads; h++)
      RDKV__NAME(k_fold)(2, work + h * 256, logits + h * RDKV__SLOTS, add);
  } else {
    RDKV__FOR_HEADS(RDKV__NAME(k_run), 3, words, n_blocks, coef, work)
    for (h = 0; h < n_heads; h++)
      RDKV__NAME(k_fold)(3, work + h * 256, logits + h * RDKV__SLOTS, add);
  }
}

/* V blocks of n_tiles tiles of one width, tile_words apart: acc[h][block][r][word] (16 bit:
   [block][word]) += (first: =) products summed over the tokens that share a word, in registers from
   tile to tile. coef [tile][8][HEADS][16], of the 8 as many as the width has, packed by nh. */
RDKV__INLINE void RDKV__NAME(v_run)(const int level, const int nh, const uint32_t *tiles,
                                    size_t tile_words, int n_tiles, int n_blocks, const float *coef,
                                    float *sums, size_t stride, int first) {
  const int nw = level == 4 ? 128 : 16 << level, na = level == 4 ? 1 : 2;
  int i, b, h, a, n;
  for (b = 0; b < n_blocks; b++) {
    for (i = 0; i < nw; i += RDKV__VL) {
      const float *c = coef + (i & 15);
      const uint32_t *words = tiles + b * nw + i;
      float *p = sums + b * na * nw + i;
      RDKV__VF acc[4][2];
      for (h = 0; h < nh; h++)
        for (a = 0; a < na; a++)
          acc[h][a] = first ? RDKV__SET(0.0f) : RDKV__LD(p + (size_t)h * stride + a * nw);
      for (n = 0; n < n_tiles; n++, words += tile_words, c += RDKV__COEF_V) {
        if (level == 4) {
          RDKV__VI w = RDKV__LDI(words);
          RDKV__FIELD_MAC(RDKV__LOW_HALF(w), 0, 0);
          RDKV__FIELD_MAC(RDKV__HIGH_HALF(w), 0, 1);
          w = RDKV__LDI(words + n_blocks * 128);
          RDKV__FIELD_MAC(RDKV__LOW_HALF(w), 0, 2);
          RDKV__FIELD_MAC(RDKV__HIGH_HALF(w), 0, 3);
        } else {
          RDKV__VI w = RDKV__FLIP(RDKV__LDI(words), rdkv__top_bits[level]);
          if (level == 1)
            RDKV__BLOCK_2(0);
          else if (level == 2)
            RDKV__BLOCK_4;
          else
            RDKV__BLOCK_8;
        }
      }
      for (h = 0; h < nh; h++)
        for (a = 0; a < na; a++) RDKV__ST(p + (size_t)h * stride + a * nw, acc[h][a]);
    }
  }
}

RDKV__FN void RDKV__NAME(v_codes)(int level, const uint32_t *tiles, size_t tile_words, int n_tiles,
                                  int n_blocks, const float *coef, int n_heads, float *acc,
                                  size_t stride, int first) {
#define RDKV__ARGS tiles, tile_words, n_tiles, n_blocks, coef, acc, stride, first
  if (level == 1) {
    RDKV__FOR_HEADS(RDKV__NAME(v_run), 1, RDKV__ARGS)
  } else if (level == 2) {
    RDKV__FOR_HEADS(RDKV__NAME(v_run), 2, RDKV__ARGS)
  } else if (level == 3) {
    RDKV__FOR_HEADS(RDKV__NAME(v_run), 3, RDKV__ARGS)
  } else {
    RDKV__FOR_HEADS(RDKV__NAME(v_run), 4, RDKV__ARGS)
  }
#undef RDKV__ARGS
}

/* Adds acc of one run to out: sums over the words that hold different tokens of one dim. */
RDKV__FN void RDKV__NAME(v_fold)(int level, const float *acc, int n_blocks, float *out) {
  int b, r, g, i, n = 2 << level; /* neighbours of one dim */
  for (b = 0; b < n_blocks; b++) {
#if RDKV__VL == 16
    if (level < 4) {
      const float *a = acc + b * (32 << level);
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      __m512 x[4];
      for (i = 0; i < 4; i++) {
        if (level == 1) x[i] = rdkv__quads_avx512(1, a + i * 16);
        if (level == 2) x[i] = rdkv__quads_avx512(2, a + i * 32);
        if (level == 3) x[i] = rdkv__quads_avx512(3, a + i * 64);
      }
      x[0] = rdkv__tree_avx512(x[0], x[1], x[2], x[3]);
      x[0] = _mm512_permutexvar_ps(order, x[0]);
      _mm512_storeu_ps(out + 16 * b, _mm512_add_ps(_mm512_loadu_ps(out + 16 * b), x[0]));
      continue;
    }
#endif
    for (r = 0; r < 2; r++) {
#if RDKV__VL == 4 || RDKV__VL == 8
      for (g = 0; g < 8 && level < 4; g += 4) {
        const float *a = acc + b * (32 << level) + r * (16 << level) + g * n;
        float *to = out + 16 * b + 8 * r + g;
#if RDKV__SIMD_BODY == 4
        float32x4_t x[4];
        int j;
        for (j = 0; j < 4; j++) {
          x[j] = vld1q_f32(a + j * n);
          for (i = 4; i < n; i += 4) x[j] = vaddq_f32(x[j], vld1q_f32(a + j * n + i));
        }
        x[0] = vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), x[0]));
#else
        __m128 x[4];
        int j;
        for (j = 0; j < 4; j++) {
          x[j] = _mm_loadu_ps(a + j * n);
          for (i = 4; i < n; i += 4) x[j] = _mm_add_ps(x[j], _mm_loadu_ps(a + j * n + i));
        }
        _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
        x[0] = _mm_add_ps(_mm_add_ps(x[0], x[1]), _mm_add_ps(x[2], x[3]));
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), x[0]));
#endif
      }
#endif
      for (g = (RDKV__VL == 4 || RDKV__VL == 8) && level < 4 ? 8 : 0; g < 8; g++) {
        const float *a = acc + b * (32 << level) + r * (16 << level) + g * n;
        float sum = 0;
        if (level == 4) {
          a = acc + b * 128 + g * 16 + r;
          for (i = 0; i < 16; i += 2) sum += a[i];
        } else {
          for (i = 0; i < n; i++) sum += a[i];
        }
        out[16 * b + 8 * r + g] += sum;
      }
    }
  }
}

/* Coefficients of K blocks for k_codes, [block][4][next / 16][16] of which k-th is at k * next,
   from the scaled query and the blocks' channels. Returns the sum of q * mid over them. */
RDKV__FN float RDKV__NAME(k_coef)(int level, int n_blocks, const uint8_t *channel,
                                  const float *scale, const float *mid, const float *q, float *to,
                                  int next) {
  const int n = rdkv__k_first[level + 1] - rdkv__k_first[level];
  const int32_t(*slot)[16] = rdkv__k_slot + rdkv__k_first[level];
  float x[16];
  RDKV__VF sum = RDKV__SET(0.0f), y;
  int b, i, k;
  for (b = 0; b < n_blocks; b++, channel += 16, scale += 16, mid += 16, to += 4 * next) {
    for (i = 0; i < 16; i += RDKV__VL) {
#if RDKV__VL == 16
      y = _mm512_i32gather_ps(
          _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)channel)), q, 4);
#elif RDKV__VL == 8
      y = _mm256_i32gather_ps(
          q, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(channel + i))),
          4);
#else
      float gathered[RDKV__VL];
      for (k = 0; k < RDKV__VL; k++) gathered[k] = q[channel[i + k]];
      y = RDKV__LD(gathered);
#endif
      sum = RDKV__FMA(y, RDKV__LD(mid + i), sum);
      y = RDKV__MUL(RDKV__MUL(y, RDKV__LD(scale + i)), RDKV__SET(rdkv__code_unit[level]));
      RDKV__ST(x + i, y);
    }
    for (k = 0; k < n; k++) {
#if RDKV__VL == 16
      _mm512_storeu_ps(to + k * next, _mm512_permutexvar_ps(_mm512_loadu_si512(slot[k]), y));
#else
      for (i = 0; i < 16; i++) to[k * next + i] = x[slot[k][i]];
#endif
    }
  }
  return RDKV__NAME(sum)(sum);
}

RDKV__FN void RDKV__NAME(halves)(const uint16_t *h, int n, float *x) {
  int i;
  for (i = 0; i < n; i += RDKV__VL) RDKV__ST(x + i, RDKV__HALVES(h + i));
}

RDKV__FN float RDKV__NAME(max)(const float *x, int n) {
  float a[RDKV__VL];
  RDKV__VF m = RDKV__LD(x);
  int i, k;
  for (i = RDKV__VL; i < n; i += RDKV__VL) m = RDKV__MAX(m, RDKV__LD(x + i));
  RDKV__ST(a, m);
  for (k = RDKV__VL / 2; k > 0; k /= 2)
    for (i = 0; i < k; i++) a[i] = a[i + k] > a[i] ? a[i + k] : a[i];
  return a[0];
}

/* From the probabilities p [h][SLOTS] of one tile, in slot order: coef [k][nh][16] for v_codes,
   with the scales in, and rest[h][16] += what all dims of a token share, p * mid. */
RDKV__FN void RDKV__NAME(v_coef)(int level, const uint32_t *params, const float *p, int n_heads,
                                 float *coef, float *rest) {
  float scaled[RDKV__TILE];
  const float *from = p;
  int h, i, k, n = rdkv__v_first[level + 1] - rdkv__v_first[level];
  for (h = 0; h < n_heads; h++, p += RDKV__SLOTS, rest += 16) {
    from = p;
    if (level < 4) {
      RDKV__VF sum = RDKV__LD(rest), unit = RDKV__SET(rdkv__code_unit[level]);
      for (i = 0; i < RDKV__TILE; i += RDKV__VL) {
        RDKV__VI w = RDKV__LDI(params + i);
        RDKV__VF x = RDKV__LD(p + i);
        sum = RDKV__FMA(x, RDKV__HIGH_HALF(w), sum);
        RDKV__ST(scaled + i, RDKV__MUL(RDKV__MUL(x, RDKV__LOW_HALF(w)), unit));
      }
      RDKV__ST(rest, sum);
      from = scaled;
    }
    for (k = 0; k < n; k++) {
      const int32_t *slot = rdkv__v_slot[rdkv__v_first[level] + k];
      float *to = coef + (k * n_heads + h) * 16;
#if RDKV__VL == 16
      _mm512_storeu_ps(to, _mm512_permutex2var_ps(_mm512_loadu_ps(from), _mm512_loadu_si512(slot),
                                                  _mm512_loadu_ps(from + 16)));
#elif RDKV__VL == 8
      RDKV__ST(to, _mm256_i32gather_ps(from, RDKV__LDI(slot), 4));
      if (level == 3 || level == 4)
        RDKV__ST(to + 8, _mm256_i32gather_ps(from, RDKV__LDI(slot + 8), 4));
      else
        RDKV__ST(to + 8, RDKV__LD(to));
#else
      for (i = 0; i < 16; i++) to[i] = from[slot[i]];
#endif
    }
  }
}

/* p = exp(logits - max), sum[16] += p */
RDKV__FN void RDKV__NAME(exp_sum)(const float *logits, float max, float *p, int n, float *sum) {
  RDKV__VF s = RDKV__LD(sum), m = RDKV__SET(max);
  int i;
  for (i = 0; i < n; i += RDKV__VL) {
    RDKV__VF x = RDKV__NAME(exp)(RDKV__SUB(RDKV__LD(logits + i), m));
    RDKV__ST(p + i, x);
    s = RDKV__ADD(s, x);
  }
  RDKV__ST(sum, s);
}

RDKV__FN void RDKV__NAME(scale)(float *x, int n, float by) {
  RDKV__VF v = RDKV__SET(by);
  int i;
  for (i = 0; i < n; i += RDKV__VL) RDKV__ST(x + i, RDKV__MUL(RDKV__LD(x + i), v));
}

/* Dense rows of dim (a multiple of 16) elements: logits[h][row] = rows . q[h], four rows at a time.
 */
RDKV__INLINE void RDKV__NAME(k_rows)(const int type, const int nh, const void *rows, int n_rows,
                                     int dim, const float *q, float *logits) {
  RDKV__VF acc[4][4];
  int r = 0, i, h, j;
#if RDKV__VL > 1
  for (; r + 4 <= n_rows; r += 4) {
    for (h = 0; h < nh; h++)
      for (j = 0; j < 4; j++) acc[h][j] = RDKV__SET(0.0f);
    for (i = 0; i < dim; i += RDKV__VL) {
      RDKV__VF x[4];
      for (j = 0; j < 4; j++) x[j] = RDKV__NAME(load)(rows, (rdkv_dtype)type, (r + j) * dim + i);
      for (h = 0; h < nh; h++) {
        RDKV__VF y = RDKV__LD(q + h * dim + i);
        for (j = 0; j < 4; j++) acc[h][j] = RDKV__FMA(x[j], y, acc[h][j]);
      }
    }
    for (h = 0; h < nh; h++) RDKV__NAME(sum4)(acc[h], logits + h * RDKV__SLOTS + r);
  }
#endif
  for (; r < n_rows; r++) {
    for (h = 0; h < nh; h++) acc[h][0] = RDKV__SET(0.0f);
    for (i = 0; i < dim; i += RDKV__VL) {
      RDKV__VF x = RDKV__NAME(load)(rows, (rdkv_dtype)type, r * dim + i);
      for (h = 0; h < nh; h++) acc[h][0] = RDKV__FMA(x, RDKV__LD(q + h * dim + i), acc[h][0]);
    }
    for (h = 0; h < nh; h++) logits[h * RDKV__SLOTS + r] = RDKV__NAME(sum)(acc[h][0]);
  }
  (void)j;
}

/* out[h] += sum over rows of p[h][row] * row. */
RDKV__INLINE void RDKV__NAME(v_rows)(const int type, const int nh, const void *rows, int n_rows,
                                     int dim, const float *p, float *out, size_t stride) {
  int r, i, h;
  for (i = 0; i < dim; i += RDKV__VL) {
    RDKV__VF acc[4];
    for (h = 0; h < nh; h++) acc[h] = RDKV__LD(out + (size_t)h * stride + i);
    for (r = 0; r < n_rows; r++) {
      RDKV__VF x = RDKV__NAME(load)(rows, (rdkv_dtype)type, r * dim + i);
      for (h = 0; h < nh; h++) acc[h] = RDKV__FMA(x, RDKV__SET(p[h * RDKV__SLOTS + r]), acc[h]);
    }
    for (h = 0; h < nh; h++) RDKV__ST(out + (size_t)h * stride + i, acc[h]);
  }
}

RDKV__FN void RDKV__NAME(k_dense)(const void *rows, rdkv_dtype type, int n_rows, int dim,
                                  const float *q, int n_heads, float *logits) {
  if (type == RDKV_F16) {
    RDKV__FOR_HEADS(RDKV__NAME(k_rows), RDKV_F16, rows, n_rows, dim, q, logits)
  } else if (type == RDKV_BF16) {
    RDKV__FOR_HEADS(RDKV__NAME(k_rows), RDKV_BF16, rows, n_rows, dim, q, logits)
  } else {
    RDKV__FOR_HEADS(RDKV__NAME(k_rows), RDKV_F32, rows, n_rows, dim, q, logits)
  }
}

RDKV__FN void RDKV__NAME(v_dense)(const void *rows, rdkv_dtype type, int n_rows, int dim,
                                  const float *p, int n_heads, float *out, size_t head_stride) {
  if (type == RDKV_F16) {
    RDKV__FOR_HEADS(RDKV__NAME(v_rows), RDKV_F16, rows, n_rows, dim, p, out, head_stride)
  } else if (type == RDKV_BF16) {
    RDKV__FOR_HEADS(RDKV__NAME(v_rows), RDKV_BF16, rows, n_rows, dim, p, out, head_stride)
  } else {
    RDKV__FOR_HEADS(RDKV__NAME(v_rows), RDKV_F32, rows, n_rows, dim, p, out, head_stride)
  }
}

static const rdkv__kernels RDKV__NAME(kernels) = {
    RDKV__NAME(row),     RDKV__NAME(logits),  RDKV__NAME(softmax),  RDKV__NAME(weigh),
    RDKV__NAME(axpy),    RDKV__NAME(ends),    RDKV__NAME(distance), RDKV__NAME(hull),
    RDKV__NAME(range),   RDKV__NAME(moments), RDKV__NAME(quantise), RDKV__NAME(quantise_one),
    RDKV__NAME(halves),  RDKV__NAME(k_coef),  RDKV__NAME(k_codes),  RDKV__NAME(v_coef),
    RDKV__NAME(v_codes), RDKV__NAME(v_fold),  RDKV__NAME(max),      RDKV__NAME(exp_sum),
    RDKV__NAME(scale),   RDKV__NAME(k_dense), RDKV__NAME(v_dense)};

#undef RDKV__NAME
#undef RDKV__VL
#undef RDKV__NV
#undef RDKV__FN
#undef RDKV__INLINE
#undef RDKV__LANES
#undef RDKV__VF
#undef RDKV__VI
#undef RDKV__LD
#undef RDKV__ST
#undef RDKV__SET
#undef RDKV__LDI
#undef RDKV__ADD
#undef RDKV__SUB
#undef RDKV__MUL
#undef RDKV__FMA
#undef RDKV__FNMA
#undef RDKV__MIN
#undef RDKV__MAX
#undef RDKV__KEEP
#undef RDKV__HALVES
#undef RDKV__BFLOATS
#undef RDKV__ROUND_HALF
#undef RDKV__TO_INT
#undef RDKV__TO_FLOAT
#undef RDKV__ROUND
#undef RDKV__EXP2I
#undef RDKV__ABS_BITS
#undef RDKV__MAXI
#undef RDKV__STI
#undef RDKV__ST_CODES
#undef RDKV__FLIP
#undef RDKV__SIGNED
#undef RDKV__CODE_2
#undef RDKV__CODE_4
#undef RDKV__CODE_8
#undef RDKV__PACK16
#undef RDKV__LOW_HALF
#undef RDKV__HIGH_HALF
#undef RDKV__FIELD_MAC
#undef RDKV__BLOCK_2
#undef RDKV__BLOCK_4
#undef RDKV__BLOCK_8
#undef RDKV__FOR_HEADS

#endif /* RDKV__SIMD_BODY */

/* ---- licence ---------------------------------------------------------------------------------
   This software is available under two licences; choose the one you prefer.

   ALTERNATIVE A - MIT License

   Copyright (c) 2026 the RDKV authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
   associated documentation files (the "Software"), to deal in the Software without restriction,
   including without limitation the rights to use, copy, modify, merge, publish, distribute,
   sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
   furnished to do so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all copies or
   substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
   NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
   NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
   DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   ALTERNATIVE B - Public Domain (www.unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this software, either
   in source code form or as a compiled binary, for any purpose, commercial or non-commercial, and
   by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this software dedicate
   any and all copyright interest in the software to the public domain. We make this dedication for
   the benefit of the public at large and to the detriment of our heirs and successors. We intend
   this dedication to be an overt act of relinquishment in perpetuity of all present and future
   rights to this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
   NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
   NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
   CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
