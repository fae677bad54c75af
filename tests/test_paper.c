/* RDKV_PAPER against the outputs of the authors' published code in golden/ (golden/README.md says
   how they were made). Includes the library itself, to reach its private functions. */
#define RDKV_STATIC
#define RDKV_IMPLEMENTATION
#include "problem.h"

/* The [head][row][dim] array of a golden file as a tensor. */
static rdkv_tensor tensor_from(const npy *a) {
  rdkv_tensor t;
  t.data = a->f, t.dtype = RDKV_F32;
  t.head_stride = (ptrdiff_t)(a->shape[1] * a->shape[2]), t.token_stride = (ptrdiff_t)a->shape[2],
  t.dim_stride = 1;
  return t;
}

/* The largest |a - b| / |b|. */
static double worst_relative(const float *a, const float *b, size_t n) {
  double worst = 0.0;
  size_t i;
  for (i = 0; i < n; i++) {
    double e = fabs((double)a[i] - (double)b[i]);
    if (!(e <= DBL_MAX)) return HUGE_VAL;
    if (e > 0.0 && e / fabs((double)b[i]) > worst) worst = e / fabs((double)b[i]);
  }
  return worst;
}

static rdkv_config paper_config(int n_q_heads, int n_kv_heads, int dim) {
  rdkv_config c = config_of(n_q_heads, n_kv_heads, dim, dim);
  c.profile = RDKV_PAPER;
  return c;
}

/* ---- scores ---------------------------------------------------------------------------------- */

static void scores(void) {
  static const char *const names[] = {
      "score_0_hq4_hkv1_w32_t257_d64", "score_1_hq8_hkv2_w32_t1024_d128",
      "score_2_hq7_hkv1_w16_t100_d128", "score_3_hq4_hkv4_w32_t40_d64"};
  double worst_token = 0.0, worst_channel = 0.0;
  size_t i, j;
  rdkv_isa isa;
  for (i = 0; i < 4; i++) {
    npy q = npy_read(names[i], "q_obs"), k = npy_read(names[i], "k");
    npy token = npy_read(names[i], "token_scores"), channel = npy_read(names[i], "channel_scores");
    uint32_t n = (uint32_t)k.shape[1];
    for (isa = next_isa(RDKV_ISA_AUTO); isa != RDKV_ISA_AUTO; isa = next_isa(isa)) {
      rdkv_config c = paper_config((int)q.shape[0], (int)k.shape[0], (int)k.shape[2]);
      problem p;
      float *product = new_floats(channel.count);
      double w;
      c.isa = isa, c.pool = 1, c.window = (int32_t)q.shape[1];
      p = problem_make(&c, n, RDKV_F32, DENSE, 1);
      p.kv[0].q = tensor_from(&q), p.kv[0].k = p.kv[0].v = tensor_from(&k);
      test_where("%s, isa %s", names[i], isa_name(isa));
      problem_score(&p);
      w = worst_relative(p.layer[0].token, token.f, token.count);
      CHECK_LE(w, 1e-5);
      if (w > worst_token) worst_token = w;
      for (j = 0; j < channel.count; j++)
        product[j] = p.layer[0].q_square[j] * p.layer[0].k_square[j];
      w = worst_relative(product, channel.f, channel.count);
      CHECK_LE(w, 1e-5);
      if (w > worst_channel) worst_channel = w;
      mem_free(product);
      problem_free(&p);
    }
    npy_free(&q), npy_free(&k), npy_free(&token), npy_free(&channel);
  }
  printf("scores: worst relative difference %.2e (tokens), %.2e (channels)\n", worst_token,
         worst_channel);
}

/* ---- pooling --------------------------------------------------------------------------------- */

static void pooling(void) {
  static const int tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 33, 257};
  double worst = 0.0;
  size_t i, row;
  int kernel;
  for (i = 0; i < 10; i++)
    for (kernel = 5; kernel <= 7; kernel += 2) {
      char name[32];
      npy in, want;
      float out[257];
      snprintf(name, sizeof name, "in_t%d", tokens[i]), in = npy_read("pool", name);
      snprintf(name, sizeof name, "out_k%d_t%d", kernel, tokens[i]), want = npy_read("pool", name);
      test_where("%s", name);
      for (row = 0; row < 3; row++) {
        size_t n = (size_t)tokens[i];
        rdkv__pool(in.f + row * n, (uint32_t)n, kernel, out);
        CHECK_LE(worst_relative(out, want.f + row * n, n), 1e-5);
        if (worst_relative(out, want.f + row * n, n) > worst)
          worst = worst_relative(out, want.f + row * n, n);
      }
      npy_free(&in), npy_free(&want);
    }
  printf("pooling: worst relative difference %.2e\n", worst);
}

/* ---- allocation ------------------------------------------------------------------------------ */

/* Rows of scores at each budget: the widths are the authors' to the last one. */
static void widths(void) {
  static const char *const names[] = {"alloc_t600", "alloc_t128", "alloc_t5"};
  static const float budgets[] = {0.2f, 0.4f, 1.0f, 2.0f, 4.0f, 8.0f};
  static const float eps_v[5] = {1.0f, 0.312f, 0.0138f, 4.8e-5f, 0.0f};
  static const float eps_k[5] = {1.0f, 0.277f, 0.011f, 6.1e-5f, 0.0f};
  size_t i, b, r, t, compared = 0, mismatches = 0, before;
  for (i = 0; i < 3; i++) {
    npy scores_of = npy_read(names[i], "scores"), bits_v = npy_read(names[i], "bits_V");
    npy bits_k = npy_read(names[i], "bits_K"), row_budgets = npy_read(names[i], "row_budgets");
    npy bits_row = npy_read(names[i], "bits_K_row_budgets");
    size_t rows = scores_of.shape[0], n = scores_of.shape[1];
    uint8_t *bits = (uint8_t *)mem_new(n);
    for (b = 0; b < 7; b++)
      for (r = 0; r < rows; r++) {
        const float *w = scores_of.f + r * n;
        before = mismatches;
        test_where("%s, budget %d, row %d", names[i], (int)b, (int)r);
        if (b < 6) {
          rdkv__paper_solve(w, (uint32_t)n, eps_v, budgets[b], bits);
          for (t = 0; t < n; t++, compared++)
            mismatches += bits[t] != bits_v.i[(b * rows + r) * n + t];
          rdkv__paper_solve(w, (uint32_t)n, eps_k, budgets[b], bits);
          for (t = 0; t < n; t++, compared++)
            mismatches += bits[t] != bits_k.i[(b * rows + r) * n + t];
        } else {
          rdkv__paper_solve(w, (uint32_t)n, eps_k, row_budgets.f[r], bits);
          for (t = 0; t < n; t++, compared++) mismatches += bits[t] != bits_row.i[r * n + t];
        }
        CHECK_EQ(mismatches - before, 0);
      }
    mem_free(bits);
    npy_free(&scores_of), npy_free(&bits_v), npy_free(&bits_k), npy_free(&row_budgets),
        npy_free(&bits_row);
  }
  printf("widths: %lu of %lu differ\n", (unsigned long)mismatches, (unsigned long)compared);
}

/* ---- quantiser ------------------------------------------------------------------------------- */

/* K per channel over tokens and V per token over channels: scale, zero point, codes and values. */
static void quantiser(void) {
  static const char *const names[] = {"quant_k_per_channel", "quant_v_per_token"};
  size_t compared = 0, wrong_scales = 0, wrong_codes = 0;
  double worst = 0.0;
  int i, bits;
  for (i = 0; i < 2; i++)
    for (bits = 2; bits <= 8; bits *= 2) {
      char name[32];
      npy x = npy_read(names[i], "x"), codes, scale, zero, value;
      size_t h, t, d, group, n = x.shape[1], dims = x.shape[2], groups = i ? n : dims;
      snprintf(name, sizeof name, "codes_b%d", bits), codes = npy_read(names[i], name);
      snprintf(name, sizeof name, "scale_b%d", bits), scale = npy_read(names[i], name);
      snprintf(name, sizeof name, "zp_b%d", bits), zero = npy_read(names[i], name);
      snprintf(name, sizeof name, "dequant_b%d", bits), value = npy_read(names[i], name);
      for (h = 0; h < x.shape[0]; h++)
        for (group = 0; group < groups; group++) {
          float lo = FLT_MAX, hi = -FLT_MAX;
          rdkv__zero_point z;
          rdkv__affine a;
          test_where("%s, %d bits, head %d, group %d", names[i], bits, (int)h, (int)group);
          for (t = i ? group : 0; t < (i ? group + 1 : n); t++)
            for (d = i ? 0 : group; d < (i ? dims : group + 1); d++) {
              float v = x.f[(h * n + t) * dims + d];
              if (v < lo) lo = v;
              if (v > hi) hi = v;
            }
          z = rdkv__fit_paper(lo, hi, bits), a = rdkv__affine_paper(z, bits);
          wrong_scales += to_half(z.scale) != to_half(scale.f[h * groups + group]);
          wrong_scales +=
              a.scale < scale.f[h * groups + group] || a.scale > scale.f[h * groups + group];
          wrong_scales += to_half(z.zero) != to_half(zero.f[h * groups + group]);
          for (t = i ? group : 0; t < (i ? group + 1 : n); t++)
            for (d = i ? 0 : group; d < (i ? dims : group + 1); d++) {
              size_t at = (h * n + t) * dims + d;
              int code = rdkv__code_paper(x.f[at], z, bits);
              double e = (double)a.mid + (double)a.scale * (code - (1 << (bits - 1))) -
                         (double)value.f[at];
              compared++;
              wrong_codes += code != codes.i[at];
              /* they store the zero point and round values to halves, the format stores the mid */
              CHECK_LE(fabs(e), (fabs((double)value.f[at]) + fabs((double)a.mid)) * 5e-4 + 6e-8);
              if (a.scale > 1e-4f && fabs(e) / (double)a.scale > worst)
                worst = fabs(e) / (double)a.scale;
            }
        }
      npy_free(&x), npy_free(&codes), npy_free(&scale), npy_free(&zero), npy_free(&value);
    }
  test_where("all");
  CHECK_EQ(wrong_scales, 0), CHECK_EQ(wrong_codes, 0);
  printf(
      "quantiser: %lu codes, %lu differ; scales and zero points %lu differ; values by at most %.3f "
      "steps\n",
      (unsigned long)compared, (unsigned long)wrong_codes, (unsigned long)wrong_scales, worst);
}

/* ---- end to end ------------------------------------------------------------------------------ */

static void end_to_end(void) {
  static const char *const names[] = {"e2e_d128_f16scores", "e2e_d128_f32scores",
                                      "e2e_d64_f16scores", "e2e_d64_f32scores",
                                      "e2e_d128_generous_f16scores"};
  static const char *const inputs[] = {"e2e_d128_f16scores", "e2e_d128_f16scores",
                                       "e2e_d64_f16scores", "e2e_d64_f16scores",
                                       "e2e_d128_generous_f16scores"};
  double worst = 0.0, worst_lse = 0.0, worst_k = 0.0;
  size_t i, j, h;
  for (i = 0; i < 5; i++) {
    npy q = npy_read(inputs[i], "q_obs"), k = npy_read(inputs[i], "k"),
        v = npy_read(inputs[i], "v");
    npy decode = npy_read(inputs[i], "q_decode"), pooled = npy_read(names[i], "pooled");
    npy channel = npy_read(names[i], "channel_scores"), token = npy_read(names[i], "token_scores");
    npy v_bits = npy_read(names[i], "v_bits"), k_bits = npy_read(names[i], "k_bits");
    npy offsets = npy_read(names[i], "head_offsets"), ids = npy_read(names[i], "kept_ids");
    npy k_want = npy_read(names[i], "k_dequant_standalone"),
        v_want = npy_read(names[i], "v_dequant");
    npy out_want = npy_read(names[i], "attn_out_standalone"),
        lse_want = npy_read(names[i], "attn_lse_standalone");
    size_t hq = q.shape[0], heads = k.shape[0], n = k.shape[1], d = k.shape[2], scratch_bytes,
           mismatches = 0;
    rdkv_config c = paper_config((int)hq, (int)heads, (int)d);
    problem p;
    rdkv_segment s;
    rdkv_cache cache;
    float *out, *lse;
    void *scratch;
    double *want;
    c.token_budget = i == 4 ? 128.0 : 64.0, c.positions = 1;
    p = problem_make(&c, (uint32_t)n, RDKV_F32, DENSE, 1);
    p.kv[0].q = tensor_from(&q), p.kv[0].k = tensor_from(&k), p.kv[0].v = tensor_from(&v);
    test_where("%s", names[i]);

    if (i == 1 || i == 3) { /* scored in f32 by the authors' code: ours, pooled, are the same */
      problem_score(&p);
      CHECK_LE(worst_relative(p.layer[0].token, pooled.f, pooled.count), 1e-5);
    }
    memcpy(p.layer[0].token, pooled.f, pooled.count * sizeof(float));
    memcpy(p.layer[0].q_square, channel.f, channel.count * sizeof(float));
    for (j = 0; j < channel.count; j++) p.layer[0].k_square[j] = 1.0f;
    CHECK_OK(problem_allocate(&p));
    for (j = 0; j < v_bits.count; j++) mismatches += p.layer[0].v_bits[j] != v_bits.i[j];
    CHECK_EQ(mismatches, 0);
    for (mismatches = 0, j = 0; j < k_bits.count; j++)
      mismatches += p.layer[0].k_bits[j] != k_bits.i[j];
    CHECK_EQ(mismatches, 0);

    CHECK_OK(problem_pack(&p));
    s = problem_open(&p);
    for (h = 0; h < heads; h++) { /* rows in any order: found by position */
      size_t begin = (size_t)offsets.i[h], rows = (size_t)offsets.i[h + 1] - begin;
      uint32_t *position = (uint32_t *)mem_new(n * 4), count = 0;
      int32_t *row_of = (int32_t *)mem_new(n * 4);
      float *kk = new_floats(n * d), *vv = new_floats(n * d);
      double error = 0.0, square = 0.0, v_error = 0.0, v_square = 0.0;
      CHECK_OK(rdkv_unpack(&s, 0, (int)h, kk, vv, position, &count));
      CHECK_EQ(count, rows);
      for (j = 0; j < n; j++) row_of[j] = -1;
      for (j = 0; j < rows; j++) row_of[ids.i[begin + j]] = (int32_t)j;
      for (j = 0; j < count; j++) {
        const float *kw, *vw;
        size_t x;
        if (!CHECK(position[j] < n && row_of[position[j]] >= 0)) break;
        kw = k_want.f + (begin + (size_t)row_of[position[j]]) * d;
        vw = v_want.f + (begin + (size_t)row_of[position[j]]) * d;
        for (x = 0; x < d; x++) {
          double ek = (double)kk[j * d + x] - (double)kw[x], ev;
          error += ek * ek, square += (double)kw[x] * (double)kw[x];
          ev = (double)vv[j * d + x] - (double)vw[x];
          v_error += ev * ev, v_square += (double)vw[x] * (double)vw[x];
        }
      }
      /* the authors round values to halves, the format stores a rounded mid */
      CHECK_LE(sqrt(error / square), 1e-3), CHECK_LE(sqrt(v_error / v_square), 1e-3);
      if (sqrt(error / square) > worst_k) worst_k = sqrt(error / square);
      mem_free(position), mem_free(row_of), mem_free(kk), mem_free(vv);
    }

    out = new_floats(hq * d), lse = new_floats(hq),
    want = (double *)malloc(hq * d * sizeof(double));
    scratch_bytes = rdkv_attend_scratch(&p.cfg), scratch = mem_new(scratch_bytes);
    memset(&cache, 0, sizeof cache);
    cache.segments = &s, cache.n_segments = 1, cache.isa = p.cfg.isa;
    for (j = 0; j < decode.shape[0]; j++) {
      CHECK_OK(
          rdkv_attend(&p.cfg, &cache, 0, decode.f + j * hq * d, out, lse, scratch, scratch_bytes));
      for (h = 0; h < hq * d; h++) want[h] = (double)out_want.f[j * hq * d + h];
      CHECK_LE(relative_l2(out, want, hq * d), 1e-3);
      if (relative_l2(out, want, hq * d) > worst) worst = relative_l2(out, want, hq * d);
      for (h = 0; h < hq; h++) {
        double e = fabs((double)lse[h] - (double)lse_want.f[j * hq + h]);
        CHECK_LE(e, 2e-3);
        if (e > worst_lse) worst_lse = e;
      }
    }
    free(want);
    mem_free(out), mem_free(lse), mem_free(scratch);
    npy_free(&q), npy_free(&k), npy_free(&v), npy_free(&decode), npy_free(&pooled),
        npy_free(&channel), npy_free(&token);
    npy_free(&v_bits), npy_free(&k_bits), npy_free(&offsets), npy_free(&ids), npy_free(&k_want),
        npy_free(&v_want);
    npy_free(&out_want), npy_free(&lse_want);
    problem_free(&p);
  }
  printf("end to end: worst relative L2 of attention %.2e, of K %.2e; worst lse difference %.2e\n",
         worst, worst_k, worst_lse);
}

int main(void) {
  RUN(scores);
  RUN(pooling);
  RUN(widths);
  RUN(quantiser);
  RUN(end_to_end);
  return test_done();
}
