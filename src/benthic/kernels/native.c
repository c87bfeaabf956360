/* Decoding on a CPU: the ops of one step on few rows, where calls into a library cost more than the arithmetic.

   float32 only, inference only; every function equals its definition in benthic.kernels.reference up to the order of
   sums. Compiled on first use for the machine it runs on (benthic.kernels.native); threads are those of torch.

   Vectors are GCC/Clang vector extensions, so the same source serves AVX2, AVX-512 and NEON. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef int32_t i32;

#define LANES 16
#define HALF 8
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(4 * HALF), aligned(4), may_alias));
typedef int32_t ihalf __attribute__((vector_size(4 * HALF), aligned(4), may_alias));

#define LOAD(TYPE, p) (*(const TYPE *)(p))
#define STORE(TYPE, p, v) (*(TYPE *)(p) = (v))
#define INLINE static inline __attribute__((always_inline))

/* Work below which one thread does it: a quarter of a millisecond of arithmetic, or of memory traffic. Waking threads
   costs microseconds on an idle machine, but milliseconds where another process holds the second core (a server's
   clients, say), and a step of a small model passes here a hundred times. */
#define PARALLEL_PRODUCTS (16 << 20)
#define PARALLEL_ELEMENTS (1 << 20)

INLINE half splat(float x) { return x - (half){}; }
INLINE half choose(ihalf where, half yes, half no) { return (half)((where & (ihalf)yes) | (~where & (ihalf)no)); }

/* e^x for x <= 88 with a relative error below 2e-7: 2^round(x log2 e) times a polynomial on [-ln2/2, ln2/2] (that of
   Cephes' expf). NaN stays NaN: a sick request must be noticed, not healed. */
INLINE half vexp(half x) {
    const half low = splat(-87.3f), high = splat(88.0f);
    x = choose(x < low, low, choose(x > high, high, x));
    half t = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to nearest */
    ihalf n = (ihalf)t - 0x4b400000;
    half k = t - 12582912.0f;
    half r = x - k * 0.693359375f + k * 2.12194440e-4f;
    half p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (half)((n + 127) << 23);
}

INLINE float exp1(float x) { return vexp(splat(x))[0]; }

/* Rows of weights that are fetched ahead of use. */
#define AHEAD 12

/* y[r][c] (+)= sum_i x(r, i) w[i][c] for ROWS rows and VECTORS vectors of columns, all sums in registers; x(r, i) is
   x[r * x_row + i * x_step]. */
#define TILE(ROWS, VECTORS, TYPE)                                                                                      \
    static void tile_##ROWS##_##VECTORS##_##TYPE(const float *x, i64 x_row, i64 x_step, const float *w, i64 w_stride,  \
                                                 i64 inner, float *y, i64 y_stride, int add) {                         \
        const int lanes = sizeof(TYPE) / sizeof(float);                                                                \
        TYPE sum[ROWS][VECTORS] = {};                                                                                  \
        if (add)                                                                                                       \
            for (int r = 0; r < ROWS; r++)                                                                             \
                for (int v = 0; v < VECTORS; v++) sum[r][v] = LOAD(TYPE, y + r * y_stride + v * lanes);                \
        for (i64 i = 0; i < inner; i++) {                                                                              \
            TYPE column[VECTORS];                                                                                      \
            for (int v = 0; v < VECTORS; v++) __builtin_prefetch(w + (i + AHEAD) * w_stride + v * lanes);              \
            for (int v = 0; v < VECTORS; v++) column[v] = LOAD(TYPE, w + i * w_stride + v * lanes);                    \
            for (int r = 0; r < ROWS; r++)                                                                             \
                for (int v = 0; v < VECTORS; v++) sum[r][v] += x[r * x_row + i * x_step] * column[v];                  \
        }                                                                                                              \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int v = 0; v < VECTORS; v++) STORE(TYPE, y + r * y_stride + v * lanes, sum[r][v]);                    \
    }

#define ALL_ROWS(VECTORS, TYPE)                                                                                        \
    TILE(1, VECTORS, TYPE) TILE(2, VECTORS, TYPE) TILE(3, VECTORS, TYPE) TILE(4, VECTORS, TYPE)                        \
    TILE(5, VECTORS, TYPE) TILE(6, VECTORS, TYPE)
ALL_ROWS(4, vec) ALL_ROWS(1, vec) ALL_ROWS(1, half)

typedef void tile_fn(const float *, i64, i64, const float *, i64, i64, float *, i64, int);
#define TILE_ROWS 6
#define TILE_LIST(V, T)                                                                                                \
    { 0, tile_1_##V##_##T, tile_2_##V##_##T, tile_3_##V##_##T, tile_4_##V##_##T, tile_5_##V##_##T, tile_6_##V##_##T }
static tile_fn *const WIDE[] = TILE_LIST(4, vec), *const NARROW[] = TILE_LIST(1, vec), *const HALVES[] = TILE_LIST(1, half);

#define WIDE_COLUMNS (4 * LANES)

static void tail_columns(const float *x, i64 x_row, i64 x_step, const float *w, i64 w_stride, i64 inner, float *y,
                         i64 y_stride, int add, i64 rows, i64 columns) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns; c++) {
            float sum = add ? y[r * y_stride + c] : 0;
#pragma omp simd reduction(+ : sum)
            for (i64 i = 0; i < inner; i++) sum += x[r * x_row + i * x_step] * w[i * w_stride + c];
            y[r * y_stride + c] = sum;
        }
}

/* y (+)= x w for any number of rows and columns. */
static void product(const float *x, i64 x_row, i64 x_step, const float *w, i64 w_stride, i64 inner, float *y,
                    i64 y_stride, int add, i64 rows, i64 columns) {
    i64 c = 0;
    while (c + HALF <= columns) {
        i64 left = columns - c, take = left >= WIDE_COLUMNS ? WIDE_COLUMNS : left >= LANES ? LANES : HALF;
        tile_fn *const *tiles = take == WIDE_COLUMNS ? WIDE : take == LANES ? NARROW : HALVES;
        for (i64 r = 0; r < rows; r += TILE_ROWS)
            tiles[rows - r < TILE_ROWS ? rows - r : TILE_ROWS](x + r * x_row, x_row, x_step, w + c, w_stride, inner,
                                                               y + r * y_stride + c, y_stride, add);
        c += take;
    }
    if (c < columns) tail_columns(x, x_row, x_step, w + c, w_stride, inner, y + c, y_stride, add, rows, columns - c);
}

/* out_r = x_r w_e for the rows of each expert. x [rows, inner], w [experts, inner, outer], out [rows, outer];
   w's columns lie side by side. Rows past the last end become zeros. */
void grouped_linear(const float *x, const float *w, i64 w_expert, i64 w_stride, const i32 *ends, float *out, i64 rows,
                    i64 experts, i64 inner, i64 outer) {
    i64 panels = (outer + WIDE_COLUMNS - 1) / WIDE_COLUMNS;
#pragma omp parallel for collapse(2) schedule(dynamic) if (rows * outer * inner > PARALLEL_PRODUCTS)
    for (i64 e = 0; e < experts; e++)
        for (i64 panel = 0; panel < panels; panel++) {
            i64 start = e ? ends[e - 1] : 0, c = panel * WIDE_COLUMNS;
            i64 columns = outer - c < WIDE_COLUMNS ? outer - c : WIDE_COLUMNS;
            product(x + start * inner, inner, 1, w + e * w_expert + c, w_stride, inner, out + start * outer + c, outer, 0,
                    ends[e] - start, columns);
        }
    i64 last = experts ? ends[experts - 1] : 0;
    if (last < rows) memset(out + last * outer, 0, sizeof(float) * (rows - last) * outer);
}

/* out = x w; x [rows, inner] with a row stride, w [inner, outer] with its columns side by side. */
void linear(const float *x, i64 x_stride, const float *w, i64 w_stride, float *out, i64 rows, i64 inner, i64 outer) {
#pragma omp parallel for schedule(dynamic) if (rows * outer * inner > PARALLEL_PRODUCTS)
    for (i64 c = 0; c < outer; c += WIDE_COLUMNS)
        product(x, x_stride, 1, w + c, w_stride, inner, out + c, outer, 0, rows,
                outer - c < WIDE_COLUMNS ? outer - c : WIDE_COLUMNS);
}

/* out_b = x_b w_b; x [batch, rows, inner] with any strides, w [batch, inner, outer] with its columns side by side,
   out with strides for batch and row. */
void bmm(const float *x, i64 x_batch, i64 x_row, i64 x_step, const float *w, i64 w_batch, i64 w_stride, float *out,
         i64 out_batch, i64 out_row, i64 batch, i64 rows, i64 inner, i64 outer) {
#pragma omp parallel for if (batch * rows * outer * inner > PARALLEL_PRODUCTS)
    for (i64 b = 0; b < batch; b++)
        product(x + b * x_batch, x_row, x_step, w + b * w_batch, w_stride, inner, out + b * out_batch, out_row, 0, rows,
                outer);
}

/* Where the rows of decode queries lie: each is a latent part and a rotary part, with strides of a query and a head. */
typedef struct {
    const float *latent, *rope;
    i64 latent_query, latent_head, rope_query, rope_head;
} Queries;

/* Absorbed attention of one sequence; `scratch` holds context * lanes floats. A row is one head of one query. */
static void decode_sequence(Queries q, const float *cache, i64 block, i64 width, i64 latent, const i32 *table,
                            i64 context, i64 queries, i64 heads, float scale, float *out, float *transposed,
                            float *scratch) {
    i64 rows = queries * heads, lanes = (rows + HALF - 1) / HALF * HALF;
    memset(transposed, 0, sizeof(float) * width * lanes);
    for (i64 r = 0; r < rows; r++) {
        const float *from = q.latent + r / heads * q.latent_query + r % heads * q.latent_head;
        const float *turned = q.rope + r / heads * q.rope_query + r % heads * q.rope_head;
        for (i64 i = 0; i < latent; i++) transposed[i * lanes + r] = from[i] * scale;
        for (i64 i = latent; i < width; i++) transposed[i * lanes + r] = turned[i - latent] * scale;
    }
    for (i64 start = 0; start < context; start += block) {
        i64 tokens = context - start < block ? context - start : block;
        product(cache + table[start / block] * block * width, width, 1, transposed, lanes, width,
                scratch + start * lanes, lanes, 0, tokens, lanes);
    }
    for (i64 c = 0; c < lanes; c += HALF) {
        ihalf sees = {};
        for (int l = 0; l < HALF; l++) {
            i64 query = (c + l) / heads;
            sees[l] = query < queries ? (i32)(context - (queries - 1 - query)) : (i32)context;
        }
        half most = splat(-3.4e38f), total = {};
        for (i64 j = 0; j < context; j++) {
            half score = LOAD(half, scratch + j * lanes + c);
            most = choose((score > most) & ((i32)j < sees), score, most);
        }
        for (i64 j = 0; j < context; j++) {
            half weight = vexp(LOAD(half, scratch + j * lanes + c) - most);
            weight = choose((i32)j < sees, weight, (half){});
            total += weight;
            STORE(half, scratch + j * lanes + c, weight);
        }
        total = choose(total == 0.0f, (half){}, 1.0f / total);
        for (i64 j = 0; j < context; j++)
            STORE(half, scratch + j * lanes + c, LOAD(half, scratch + j * lanes + c) * total);
    }
    if (context == 0) memset(out, 0, sizeof(float) * rows * latent);
    for (i64 start = 0; start < context; start += block) {
        i64 tokens = context - start < block ? context - start : block;
        product(scratch + start * lanes, 1, lanes, cache + table[start / block] * block * width, width, tokens, out,
                latent, start > 0, rows, latent);
    }
}

/* q [sequences * queries, heads, latent | rope] with strides, cache [pages, block, width],
   out [sequences, queries, heads, latent]. Returns 0, or -1 when scratch memory could not be had. */
int mla_decode(const float *q_latent, i64 latent_query, i64 latent_head, const float *q_rope, i64 rope_query,
               i64 rope_head, const float *cache, const i32 *table, i64 table_stride, const i32 *contexts, float *out,
               i64 sequences, i64 queries, i64 heads, i64 width, i64 latent, i64 block, float scale) {
    i64 rows = queries * heads, lanes = (rows + HALF - 1) / HALF * HALF, longest = 0, all = 0;
    for (i64 s = 0; s < sequences; s++) {
        longest = contexts[s] > longest ? contexts[s] : longest;
        all += contexts[s];
    }
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (all * rows * width > PARALLEL_PRODUCTS)
    {
        float *scratch = malloc(sizeof(float) * (longest + width) * lanes);
        failed = scratch == 0;
#pragma omp for schedule(dynamic)
        for (i64 s = 0; s < sequences; s++)
            if (scratch)
            {
                Queries q = {q_latent + s * queries * latent_query, q_rope + s * queries * rope_query,
                             latent_query, latent_head, rope_query, rope_head};
                decode_sequence(q, cache, block, width, latent, table + s * table_stride, contexts[s], queries, heads,
                                scale, out + s * rows * latent, scratch, scratch + width * lanes);
            }
        free(scratch);
    }
    return failed ? -1 : 0;
}

/* Write [latent | rope] rows into their slots; slot -1 is skipped. */
void store_latent(float *cache, const float *latent, i64 latent_stride, const float *rope, i64 rope_stride,
                  const i64 *slots, i64 tokens, i64 latent_width, i64 rope_width) {
    i64 width = latent_width + rope_width;
    for (i64 t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        memcpy(cache + slots[t] * width, latent + t * latent_stride, sizeof(float) * latent_width);
        memcpy(cache + slots[t] * width + latent_width, rope + t * rope_stride, sizeof(float) * rope_width);
    }
}

/* out = total / sqrt(mean(total^2) + eps) * weight with total = x + residual, which is written to `total` unless
   residual is null (then total = x and nothing else is written). */
void add_rms_norm(const float *x, i64 x_stride, const float *residual, i64 residual_stride, const float *weight,
                  float *total, float *out, i64 rows, i64 width, float eps) {
#pragma omp parallel for if (rows * width > PARALLEL_ELEMENTS)
    for (i64 r = 0; r < rows; r++) {
        const float *in = x + r * x_stride;
        float sum = 0;
        if (residual) {
            float *added = total + r * width;
            const float *other = residual + r * residual_stride;
            for (i64 i = 0; i < width; i++) added[i] = in[i] + other[i];
            in = added;
        }
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < width; i++) sum += in[i] * in[i];
        float scale = 1.0f / __builtin_sqrtf(sum / width + eps);
        for (i64 i = 0; i < width; i++) out[r * width + i] = in[i] * scale * weight[i];
    }
}

/* silu(gate) * up; gate_up [rows, 2 width]. */
void swiglu(const float *gate_up, i64 stride, float *out, i64 rows, i64 width) {
#pragma omp parallel for if (rows * width > PARALLEL_ELEMENTS)
    for (i64 r = 0; r < rows; r++) {
        const float *gate = gate_up + r * stride, *up = gate + width;
        i64 i = 0;
        for (; i + HALF <= width; i += HALF) {
            half g = LOAD(half, gate + i);
            STORE(half, out + r * width + i, g / (1.0f + vexp(-g)) * LOAD(half, up + i));
        }
        for (; i < width; i++) out[r * width + i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
    }
}

/* Rotate pairs (x_j, x_{j + half}); x [tokens, heads, 2 half] with strides, out contiguous. */
void rope(const float *x, i64 token_stride, i64 head_stride, const float *cosine, const float *sine, float *out,
          i64 tokens, i64 heads, i64 half) {
#pragma omp parallel for if (tokens * heads * half > PARALLEL_ELEMENTS)
    for (i64 t = 0; t < tokens; t++)
        for (i64 h = 0; h < heads; h++) {
            const float *in = x + t * token_stride + h * head_stride, *c = cosine + t * half, *s = sine + t * half;
            float *to = out + (t * heads + h) * 2 * half;
            for (i64 j = 0; j < half; j++) {
                to[j] = in[j] * c[j] - in[j + half] * s[j];
                to[j + half] = in[j + half] * c[j] + in[j] * s[j];
            }
        }
}

/* Index of the greatest entry; the first among equals; -1 when all are -inf. */
INLINE i64 best_of(const float *values, i64 count) {
    i64 best = -1;
    float most = -__builtin_inff();
    for (i64 i = 0; i < count; i++)
        if (values[i] > most) most = values[i], best = i;
    return best;
}

/* The gate (DeepSeek-V3 report eq. 13-16): `best` is how many scores of a group make its own score; 0: no groups. */
void route(const float *logits, const float *bias, float *scores, i32 *expert, float *weight, i64 tokens, i64 experts,
           i64 top_k, i64 n_group, i64 topk_group, i64 best, int softmax, int norm, float factor) {
    float *choice = malloc(sizeof(float) * (experts + 2 * n_group)), *group = choice + experts, *kept = group + n_group;
    for (i64 t = 0; t < tokens; t++) {
        const float *in = logits + t * experts;
        float *score = scores + t * experts, total = 0;
        if (softmax) {
            i64 at = best_of(in, experts);
            float most = at < 0 ? 0 : in[at];
            for (i64 e = 0; e < experts; e++) total += score[e] = exp1(in[e] - most);
            for (i64 e = 0; e < experts; e++) score[e] /= total;
        } else
            for (i64 e = 0; e < experts; e++) score[e] = 1.0f / (1.0f + exp1(-in[e]));
        for (i64 e = 0; e < experts; e++) choice[e] = bias ? score[e] + bias[e] : score[e];
        if (best) {
            i64 size = experts / n_group;
            for (i64 g = 0; g < n_group; g++) {
                float first = -__builtin_inff(), second = first;
                for (i64 e = g * size; e < (g + 1) * size; e++)
                    if (choice[e] > first) second = first, first = choice[e];
                    else if (choice[e] > second) second = choice[e];
                group[g] = best > 1 && size > 1 ? first + second : first;
                kept[g] = 0;
            }
            for (i64 k = 0; k < topk_group; k++) {
                i64 g = best_of(group, n_group);
                if (g >= 0) kept[g] = 1, group[g] = -__builtin_inff();
            }
            for (i64 e = 0; e < experts; e++)
                if (!kept[e / size]) choice[e] = -__builtin_inff();
        }
        total = 0;
        for (i64 k = 0; k < top_k; k++) {
            i64 e = best_of(choice, experts);
            e = e < 0 ? k : e; /* scores that are not numbers: any experts will do, the weights stay NaN */
            choice[e] = -__builtin_inff();
            expert[t * top_k + k] = (i32)e;
            total += weight[t * top_k + k] = score[e];
        }
        for (i64 k = 0; k < top_k; k++) weight[t * top_k + k] *= norm ? factor / (total + 1e-20f) : factor;
    }
    free(choice);
}

/* Copy every token to each of its experts: rows sorted by expert, by token within one. */
void permute(const float *x, const i32 *expert, float *rows, i32 *ends, i64 *row_of, i64 *copy_of, i64 tokens, i64 top_k,
             i64 experts, i64 width) {
    i64 *next = calloc(experts + 1, sizeof(i64));
    for (i64 i = 0; i < tokens * top_k; i++) next[expert[i] + 1]++;
    for (i64 e = 0; e < experts; e++) {
        next[e + 1] += next[e];
        ends[e] = (i32)next[e + 1];
    }
    for (i64 i = 0; i < tokens * top_k; i++) {
        i64 row = next[expert[i]]++;
        row_of[i] = row;
        copy_of[row] = i;
    }
    free(next);
#pragma omp parallel for if (tokens * top_k * width > PARALLEL_ELEMENTS)
    for (i64 row = 0; row < tokens * top_k; row++)
        memcpy(rows + row * width, x + copy_of[row] / top_k * width, sizeof(float) * width);
}

/* out_t = sum_k weight_tk rows[row_tk]. */
void unpermute(const float *rows, const i64 *row_of, const float *weight, float *out, i64 tokens, i64 top_k, i64 width) {
#pragma omp parallel for if (tokens * top_k * width > PARALLEL_ELEMENTS)
    for (i64 t = 0; t < tokens; t++) {
        float *to = out + t * width;
        memset(to, 0, sizeof(float) * width);
        for (i64 k = 0; k < top_k; k++) {
            const float *row = rows + row_of[t * top_k + k] * width;
            float w = weight[t * top_k + k];
            for (i64 i = 0; i < width; i++) to[i] += w * row[i];
        }
    }
}

/* What a taped step needs besides: sums, rows of the embedding, angles. */

void add(const float *a, const float *b, float *out, i64 count) {
    for (i64 i = 0; i < count; i++) out[i] = a[i] + b[i];
}

void scale(const float *a, float by, float *out, i64 count) {
    for (i64 i = 0; i < count; i++) out[i] = a[i] * by;
}

void embedding(const float *weight, i64 row_stride, i64 step, const i64 *tokens, float *out, i64 count, i64 width) {
    for (i64 t = 0; t < count; t++)
        for (i64 i = 0; i < width; i++) out[t * width + i] = weight[tokens[t] * row_stride + i * step];
}

void outer(const i64 *positions, const float *frequency, float *out, i64 count, i64 width) {
    for (i64 t = 0; t < count; t++)
        for (i64 i = 0; i < width; i++) out[t * width + i] = (float)positions[t] * frequency[i];
}

void cosine(const float *a, float *out, i64 count) {
    for (i64 i = 0; i < count; i++) out[i] = cosf(a[i]);
}

void sine(const float *a, float *out, i64 count) {
    for (i64 i = 0; i < count; i++) out[i] = sinf(a[i]);
}
