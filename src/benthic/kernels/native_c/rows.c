/* Work on single rows: norms, activations, rotations, and what a taped step needs besides.

   Blocking: none is needed, every number is touched once or twice; threads take ranges of rows. */

#include "team.h"

#include <math.h>
#include <string.h>

/* out = total / sqrt(mean(total^2) + eps) * weight with total = x + residual, which is written to `total` unless
   residual is null (then total = x and nothing else is written). */
typedef struct {
    const float *x;
    i64 x_stride;
    const float *residual;
    i64 residual_stride;
    const float *weight;
    float *total, *out;
    i64 rows, width;
    float eps;
} AddRmsNorm;

static void add_rms_norm_part(const void *arguments, Share share) {
    const AddRmsNorm *a = arguments;
    i64 width = a->width;
    for (i64 r = first_of(share, a->rows); r < last_of(share, a->rows); r++) {
        const float *in = a->x + r * a->x_stride, *weight = a->weight;
        float *out = a->out + r * width, sum = 0;
        if (a->residual) {
            float *added = a->total + r * width;
            const float *other = a->residual + r * a->residual_stride;
            for (i64 i = 0; i < width; i++) added[i] = in[i] + other[i];
            in = added;
        }
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < width; i++) sum += in[i] * in[i];
        float scale = 1.0f / __builtin_sqrtf(sum / width + a->eps);
        for (i64 i = 0; i < width; i++) out[i] = in[i] * scale * weight[i];
    }
}

void add_rms_norm(const void *arguments) {
    const AddRmsNorm *a = arguments;
    together(add_rms_norm_part, a, a->rows * a->width * 4);
}

/* silu(gate) * up; gate_up [rows, 2 width]. */
typedef struct {
    const float *gate_up;
    i64 stride;
    float *out;
    i64 rows, width;
} Swiglu;

static void swiglu_part(const void *arguments, Share share) {
    const Swiglu *a = arguments;
    for (i64 r = first_of(share, a->rows); r < last_of(share, a->rows); r++) {
        const float *gate = a->gate_up + r * a->stride, *up = gate + a->width;
        float *out = a->out + r * a->width;
        i64 i = 0;
        for (; i + EIGHT <= a->width; i += EIGHT) {
            eight g = LOAD(eight, gate + i);
            STORE(eight, out + i, g / (1.0f + vexp(-g)) * LOAD(eight, up + i));
        }
        for (; i < a->width; i++) out[i] = gate[i] / (1.0f + exp1(-gate[i])) * up[i];
    }
}

void swiglu(const void *arguments) {
    const Swiglu *a = arguments;
    together(swiglu_part, a, a->rows * a->width * 16);
}

/* Rotate pairs (x_j, x_{j + half}); x [tokens, heads, 2 half] with strides, out contiguous. */
typedef struct {
    const float *x;
    i64 token_stride, head_stride;
    const float *cosine, *sine;
    float *out;
    i64 tokens, heads, half;
} Rope;

static void rope_part(const void *arguments, Share share) {
    const Rope *a = arguments;
    i64 half = a->half;
    for (i64 t = first_of(share, a->tokens); t < last_of(share, a->tokens); t++)
        for (i64 h = 0; h < a->heads; h++) {
            const float *in = a->x + t * a->token_stride + h * a->head_stride;
            const float *c = a->cosine + t * half, *s = a->sine + t * half;
            float *to = a->out + (t * a->heads + h) * 2 * half;
            for (i64 j = 0; j < half; j++) {
                to[j] = in[j] * c[j] - in[j + half] * s[j];
                to[j + half] = in[j + half] * c[j] + in[j] * s[j];
            }
        }
}

void rope(const void *arguments) {
    const Rope *a = arguments;
    together(rope_part, a, a->tokens * a->heads * a->half * 8);
}

/* out = a + b. */
typedef struct {
    const float *a, *b;
    float *out;
    i64 count;
} Add;

void add(const void *arguments) {
    const Add *a = arguments;
    for (i64 i = 0; i < a->count; i++) a->out[i] = a->a[i] + a->b[i];
}

/* out = a * by. */
typedef struct {
    const float *a;
    float by;
    float *out;
    i64 count;
} Scale;

void scale(const void *arguments) {
    const Scale *a = arguments;
    for (i64 i = 0; i < a->count; i++) a->out[i] = a->a[i] * a->by;
}

/* Rows of weight [vocabulary, width], which has strides. */
typedef struct {
    const float *weight;
    i64 row_stride, step;
    const i64 *tokens;
    float *out;
    i64 count, width;
} Embedding;

void embedding(const void *arguments) {
    const Embedding *a = arguments;
    for (i64 t = 0; t < a->count; t++) {
        const float *row = a->weight + a->tokens[t] * a->row_stride;
        for (i64 i = 0; i < a->width; i++) a->out[t * a->width + i] = row[i * a->step];
    }
}

/* Angles: positions times frequencies. */
typedef struct {
    const i64 *positions;
    const float *frequency;
    float *out;
    i64 count, width;
} Outer;

void outer(const void *arguments) {
    const Outer *a = arguments;
    for (i64 t = 0; t < a->count; t++)
        for (i64 i = 0; i < a->width; i++) a->out[t * a->width + i] = (float)a->positions[t] * a->frequency[i];
}

typedef struct {
    const float *a;
    float *out;
    i64 count;
} Elementwise;

void cosine(const void *arguments) {
    const Elementwise *a = arguments;
    for (i64 i = 0; i < a->count; i++) a->out[i] = cosf(a->a[i]);
}

void sine(const void *arguments) {
    const Elementwise *a = arguments;
    for (i64 i = 0; i < a->count; i++) a->out[i] = sinf(a->a[i]);
}
