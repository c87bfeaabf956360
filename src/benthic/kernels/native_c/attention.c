/* Decoding attention in the latent space, and the writing of the cache it reads. */

#include "product.h"

#include <string.h>

#define CHUNK 64 /* tokens whose scores are held at a time */

/* Absorbed attention over pages. Queries [sequences * queries, heads, latent | rope] are a latent part and a rotary part
   with strides of a query and a head; cache [pages, block, width]; out [sequences, queries, heads, latent].

   Blocking. A row is one head of one query; eight rows of a sequence are one piece of work. Their queries are turned
   once so that rows lie side by side; the latents of up to CHUNK tokens are then multiplied with them (tiles of tokens x
   8 rows), weighed by an online softmax (largest score so far and sum of weights of each row in a register; outputs so
   far are scaled down when the largest grows) and, as weights of a product, added up (tiles of rows x 16 latent dims).
   Pages are read in place; the second product finds them in the first-level cache. No scratch memory depends on the
   length of a context. */
typedef struct {
    const float *latent;
    i64 latent_query, latent_head;
    const float *rope;
    i64 rope_query, rope_head;
    const float *cache;
    const i32 *table;
    i64 table_stride;
    const i32 *contexts;
    float *out;
    i64 sequences, queries, heads, width, latent_width, block;
    float scale;
} MlaDecode;

/* The softmax of eight rows so far. */
typedef struct {
    eight most, total;
} Weighed;

/* turned[i][row] = scale * query of row, for `rows` rows from `first`; rows past them are zeros. */
static void turn_queries(const MlaDecode *a, i64 sequence, i64 first, i64 rows, float *turned) {
    memset(turned, 0, sizeof(float) * a->width * EIGHT);
    for (i64 r = 0; r < rows; r++) {
        i64 query = sequence * a->queries + (first + r) / a->heads, head = (first + r) % a->heads;
        const float *latent = a->latent + query * a->latent_query + head * a->latent_head;
        const float *rope = a->rope + query * a->rope_query + head * a->rope_head - a->latent_width;
        for (i64 i = 0; i < a->latent_width; i++) turned[i * EIGHT + r] = latent[i] * a->scale;
        for (i64 i = a->latent_width; i < a->width; i++) turned[i * EIGHT + r] = rope[i] * a->scale;
    }
}

/* Scores of tokens `start`... become their weights relative to the largest so far; returns what earlier sums and
   outputs are to be scaled with. A row sees the tokens before `sees`. */
static eight weigh(Weighed *so_far, float *scores, i64 start, i64 tokens, ieight sees) {
    eight most = so_far->most, total = {};
    for (i64 j = 0; j < tokens; j++) {
        eight score = LOAD(eight, scores + j * EIGHT);
        most = choose((score > most) & ((i32)(start + j) < sees), score, most);
    }
    for (i64 j = 0; j < tokens; j++) {
        eight weight = vexp(LOAD(eight, scores + j * EIGHT) - most);
        weight = choose((i32)(start + j) < sees, weight, (eight){});
        total += weight;
        STORE(eight, scores + j * EIGHT, weight);
    }
    eight shrink = vexp(so_far->most - most);
    so_far->total = so_far->total * shrink + total;
    so_far->most = most;
    return shrink;
}

static void scale_rows(float *out, i64 rows, i64 width, eight by) {
    for (i64 r = 0; r < rows; r++)
        for (i64 i = 0; i < width; i++) out[r * width + i] *= by[r];
}

static void decode_eight(const MlaDecode *a, i64 sequence, i64 first, i64 rows) {
    float turned[a->width * EIGHT] __attribute__((aligned(64))), scores[CHUNK * EIGHT] __attribute__((aligned(64)));
    const i32 *table = a->table + sequence * a->table_stride;
    i64 context = a->contexts[sequence], panels = panels_of(a->latent_width);
    float *out = a->out + (sequence * a->queries * a->heads + first) * a->latent_width;
    Weighed so_far = {splat(-3.4e38f), {}};
    ieight sees;
    for (int r = 0; r < EIGHT; r++) sees[r] = (i32)(context - (a->queries - 1 - (first + r) / a->heads));
    turn_queries(a, sequence, first, rows, turned);
    memset(out, 0, sizeof(float) * rows * a->latent_width);
    for (i64 start = 0, tokens; start < context; start += tokens) {
        i64 inside = start % a->block, left = context - start;
        tokens = a->block - inside < CHUNK ? a->block - inside : CHUNK;
        tokens = left < tokens ? left : tokens;
        const float *page = a->cache + (table[start / a->block] * a->block + inside) * a->width;
        i64 then = left > tokens ? start + tokens : start;
        const float *next = a->cache + (table[then / a->block] * a->block + then % a->block) * a->width;
        product_eight(page, a->width, turned, a->width, scores, tokens, next);
        eight shrink = weigh(&so_far, scores, start, tokens, sees);
        if (start) scale_rows(out, rows, a->latent_width, shrink);
        product((Rows){scores, 1, EIGHT}, (Columns){page, a->width, PANEL}, tokens, out, a->latent_width, start > 0, rows,
                a->latent_width, 0, panels);
    }
    scale_rows(out, rows, a->latent_width, choose(so_far.total == 0.0f, (eight){}, 1.0f / so_far.total));
}

static void mla_decode_part(const void *arguments, Share share) {
    const MlaDecode *a = arguments;
    i64 rows = a->queries * a->heads, groups = (rows + EIGHT - 1) / EIGHT, all = a->sequences * groups;
    for (i64 piece = share.rank; piece < all; piece += share.of) {
        i64 first = piece % groups * EIGHT;
        decode_eight(a, piece / groups, first, rows - first < EIGHT ? rows - first : EIGHT);
    }
}

void mla_decode(const void *arguments) {
    const MlaDecode *a = arguments;
    i64 tokens = 0;
    for (i64 s = 0; s < a->sequences; s++) tokens += a->contexts[s];
    together(mla_decode_part, a, tokens * a->queries * a->heads * (a->width + a->latent_width));
}

/* Write [latent | rope] rows into their slots; slot -1 is skipped. */
typedef struct {
    float *cache;
    const float *latent;
    i64 latent_stride;
    const float *rope;
    i64 rope_stride;
    const i64 *slots;
    i64 tokens, latent_width, rope_width;
} StoreLatent;

void store_latent(const void *arguments) {
    const StoreLatent *a = arguments;
    for (i64 t = 0; t < a->tokens; t++) {
        if (a->slots[t] < 0) continue;
        float *to = a->cache + a->slots[t] * (a->latent_width + a->rope_width);
        memcpy(to, a->latent + t * a->latent_stride, sizeof(float) * a->latent_width);
        memcpy(to + a->latent_width, a->rope + t * a->rope_stride, sizeof(float) * a->rope_width);
    }
}
