/* Mixture of experts: the gate, and rows on their way to experts and home.

   Blocking: tokens are independent in the gate and on the way home, copied rows are on the way out; threads take
   ranges of them. Sorting itself is a pass of counting, done by the caller. */

#include "team.h"

#include <string.h>

/* Index of the greatest entry; the first among equals; -1 when all are -inf. */
INLINE i64 best_of(const float *values, i64 count) {
    i64 best = -1;
    float most = -__builtin_inff();
    for (i64 i = 0; i < count; i++)
        if (values[i] > most) most = values[i], best = i;
    return best;
}

/* The gate (DeepSeek-V3 report eq. 13-16): `best` is how many scores of a group make its own score; 0: no groups. */
typedef struct {
    const float *logits, *bias;
    float *scores;
    i32 *expert;
    float *weight;
    i64 tokens, experts, top_k, n_group, topk_group, best;
    i32 softmax, norm;
    float factor;
} Route;

static void score_experts(const Route *a, const float *in, float *score) {
    i64 experts = a->experts, e = 0;
    float shift = 0, total = 0;
    if (a->softmax) {
        i64 at = best_of(in, experts);
        shift = at < 0 ? 0 : in[at];
    }
    for (; e < experts; e += EIGHT) {
        i64 take = experts - e < EIGHT ? experts - e : EIGHT;
        eight x = {};
        if (take == EIGHT) x = LOAD(eight, in + e);
        else
            for (i64 k = 0; k < take; k++) x[k] = in[e + k];
        if (a->softmax) x = vexp(x - shift);
        else x = 1.0f / (1.0f + vexp(-x));
        if (take == EIGHT) STORE(eight, score + e, x);
        else
            for (i64 k = 0; k < take; k++) score[e + k] = x[k];
    }
    if (!a->softmax) return;
    for (e = 0; e < experts; e++) total += score[e];
    for (e = 0; e < experts; e++) score[e] /= total;
}

/* Rule out the experts of all but the best groups. */
static void keep_groups(const Route *a, float *choice) {
    const float least = -__builtin_inff();
    float group[a->n_group];
    i32 kept[a->n_group];
    i64 size = a->experts / a->n_group;
    for (i64 g = 0; g < a->n_group; g++) {
        float first = least, second = least;
        for (i64 e = g * size; e < (g + 1) * size; e++)
            if (choice[e] > first) second = first, first = choice[e];
            else if (choice[e] > second) second = choice[e];
        group[g] = a->best > 1 && size > 1 ? first + second : first;
        kept[g] = 0;
    }
    for (i64 k = 0; k < a->topk_group; k++) {
        i64 g = best_of(group, a->n_group);
        if (g >= 0) kept[g] = 1, group[g] = least;
    }
    for (i64 e = 0; e < a->experts; e++)
        if (!kept[e / size]) choice[e] = least;
}

static void route_part(const void *arguments, Share share) {
    const Route *a = arguments;
    float choice[a->experts];
    for (i64 t = first_of(share, a->tokens); t < last_of(share, a->tokens); t++) {
        float *score = a->scores + t * a->experts, *weight = a->weight + t * a->top_k, total = 0;
        score_experts(a, a->logits + t * a->experts, score);
        for (i64 e = 0; e < a->experts; e++) choice[e] = a->bias ? score[e] + a->bias[e] : score[e];
        if (a->best) keep_groups(a, choice);
        for (i64 k = 0; k < a->top_k; k++) {
            i64 e = best_of(choice, a->experts);
            e = e < 0 ? k : e; /* scores that are not numbers: any experts will do, the weights stay NaN */
            choice[e] = -__builtin_inff();
            a->expert[t * a->top_k + k] = (i32)e;
            total += weight[k] = score[e];
        }
        for (i64 k = 0; k < a->top_k; k++) weight[k] *= a->norm ? a->factor / (total + 1e-20f) : a->factor;
    }
}

void route(const void *arguments) {
    const Route *a = arguments;
    together(route_part, a, a->tokens * a->experts * (16 + a->top_k * 4));
}

/* Copy every token to each of its experts: rows sorted by expert, by token within one. */
typedef struct {
    const float *x;
    const i32 *expert;
    float *rows;
    i32 *ends;
    i64 *row_of, *copy_of;
    i64 tokens, top_k, experts, width;
} Permute;

static void permute_part(const void *arguments, Share share) {
    const Permute *a = arguments;
    i64 copies = a->tokens * a->top_k, mine = first_of(share, copies), end = last_of(share, copies);
    for (i64 row = mine; row < end; row++)
        memcpy(a->rows + row * a->width, a->x + a->copy_of[row] / a->top_k * a->width, sizeof(float) * a->width);
}

void permute(const void *arguments) {
    const Permute *a = arguments;
    i64 next[a->experts + 1], copies = a->tokens * a->top_k;
    memset(next, 0, sizeof next);
    for (i64 i = 0; i < copies; i++) next[a->expert[i] + 1]++;
    for (i64 e = 0; e < a->experts; e++) {
        next[e + 1] += next[e];
        a->ends[e] = (i32)next[e + 1];
    }
    for (i64 i = 0; i < copies; i++) {
        i64 row = next[a->expert[i]]++;
        a->row_of[i] = row;
        a->copy_of[row] = i;
    }
    together(permute_part, a, copies * a->width * 4);
}

/* out_t = sum_k weight_tk rows[row_tk]. */
typedef struct {
    const float *rows;
    const i64 *row_of;
    const float *weight;
    float *out;
    i64 tokens, top_k, width;
} Unpermute;

static void unpermute_part(const void *arguments, Share share) {
    const Unpermute *a = arguments;
    for (i64 t = first_of(share, a->tokens); t < last_of(share, a->tokens); t++) {
        float *to = a->out + t * a->width;
        memset(to, 0, sizeof(float) * a->width);
        for (i64 k = 0; k < a->top_k; k++) {
            const float *row = a->rows + a->row_of[t * a->top_k + k] * a->width;
            float w = a->weight[t * a->top_k + k];
            for (i64 i = 0; i < a->width; i++) to[i] += w * row[i];
        }
    }
}

void unpermute(const void *arguments) {
    const Unpermute *a = arguments;
    together(unpermute_part, a, a->tokens * a->top_k * a->width * 4);
}
