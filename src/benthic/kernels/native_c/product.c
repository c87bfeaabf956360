/* Products of few rows with weights: decoding multiplies each weight with a few rows once, so it is bound by how fast
   weights arrive and, from four rows on, by multiply-adds.

   Blocking. A tile keeps ROWS x PANEL sums in registers (AVX2: 6 rows x 2 vectors of 8, twelve of sixteen registers;
   AVX-512: 16 rows x 1 vector of 16) and walks down the inner dim: one line of weights and one number of each row a
   step. All tiles of a panel follow one another, so the panel (at most DEPTH lines, 16 KB) comes from far once and from
   the first-level cache after that; meanwhile the next panel is fetched ahead. Rows are dealt evenly to the tiles: 16
   rows on AVX2 are 6 + 5 + 5.

   Weights that lie in panels stream in line by line. From weights whose columns lie side by side, a panel's lines are
   as far apart as the matrix is wide: one page, and often one cache set, for all. With many rows such a panel is first
   copied together. Measured on one Zen 3 core of 95 GFLOP/s, 192 x 2048: 78 GFLOP/s from panels with 4 rows and with
   16; 51 and 64 from columns.

   Every sum runs over the inner dim in order whatever the tile, so results do not depend on rows, threads or layout. */

#include "product.h"

#include <string.h>

#if defined(__AVX512F__)
#define MOST_ROWS 16
#define EACH_ROWS(TILE) TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) \
    TILE(12) TILE(13) TILE(14) TILE(15) TILE(16)
#else
#define MOST_ROWS 6
#define EACH_ROWS(TILE) TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#endif
#define MOST_EIGHTS 12
#define EACH_EIGHTS(TILE) TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) \
    TILE(12)

#define VECTORS (PANEL / LANES)
#define DEPTH 256     /* lines of a panel that are multiplied before the next ones */
#define COPY_ROWS 24  /* from here on a panel of scattered lines is copied together first */

/* Keeps the compiler from fetching the numbers of all rows before it multiplies: it would run out of registers. */
#define IN_ORDER __asm__ volatile("" ::: "memory")

typedef void Tile(Rows x, const float *w, i64 step, i64 inner, float *y, i64 y_stride, int add, const float *next);

#define TILE(ROWS)                                                                                                     \
    static void tile_##ROWS(Rows x, const float *w, i64 step, i64 inner, float *y, i64 y_stride, int add,              \
                            const float *next) {                                                                       \
        vec sum[ROWS][VECTORS];                                                                                        \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                                        \
            UNROLLED for (int v = 0; v < VECTORS; v++)                                                                 \
                sum[r][v] = add ? LOAD(vec, y + r * y_stride + v * LANES) : (vec){};                                   \
        const float *from = x.at;                                                                                      \
        for (i64 i = 0; i < inner; i++, from += x.step, w += step, next += step) {                                     \
            __builtin_prefetch(next);                                                                                  \
            vec line[VECTORS];                                                                                         \
            UNROLLED for (int v = 0; v < VECTORS; v++) line[v] = LOAD(vec, w + v * LANES);                             \
            UNROLLED for (int r = 0; r < ROWS; r++) {                                                                  \
                IN_ORDER;                                                                                              \
                vec number = from[r * x.row] - (vec){};                                                                \
                UNROLLED for (int v = 0; v < VECTORS; v++) sum[r][v] += number * line[v];                              \
            }                                                                                                          \
        }                                                                                                              \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                                        \
            UNROLLED for (int v = 0; v < VECTORS; v++) STORE(vec, y + r * y_stride + v * LANES, sum[r][v]);            \
    }
EACH_ROWS(TILE)

#define NAME(ROWS) tile_##ROWS,
static Tile *const tiles[] = {0, EACH_ROWS(NAME)};

/* Tiles of eight columns: heads side by side, in the scores of attention. */
#define TILE_EIGHT(ROWS)                                                                                               \
    static void eight_##ROWS(const float *x, i64 x_row, const float *w, i64 inner, float *y, const float *next) {      \
        eight sum[ROWS] = {};                                                                                          \
        for (i64 i = 0; i < inner; i++, next += ROWS) {                                                                \
            __builtin_prefetch(next);                                                                                  \
            eight line = LOAD(eight, w + i * EIGHT);                                                                   \
            UNROLLED for (int r = 0; r < ROWS; r++) {                                                                  \
                IN_ORDER;                                                                                              \
                sum[r] += splat(x[r * x_row + i]) * line;                                                              \
            }                                                                                                          \
        }                                                                                                              \
        UNROLLED for (int r = 0; r < ROWS; r++) STORE(eight, y + r * EIGHT, sum[r]);                                   \
    }
EACH_EIGHTS(TILE_EIGHT)

#define NAME_EIGHT(ROWS) eight_##ROWS,
static void (*const eights[])(const float *, i64, const float *, i64, float *, const float *) = {0, EACH_EIGHTS(NAME_EIGHT)};

void product_eight(const float *x, i64 x_row, const float *w, i64 inner, float *y, i64 rows, const float *next) {
    i64 count = (rows + MOST_EIGHTS - 1) / MOST_EIGHTS;
    for (i64 n = 0; n < count; n++) {
        i64 r = n * rows / count, take = (n + 1) * rows / count - r;
        eights[take](x + r * x_row, x_row, w, inner, y + r * EIGHT, next + r * x_row);
    }
}

/* All rows with one panel of at most DEPTH lines. */
static void panel_product(Rows x, const float *w, i64 step, i64 inner, float *y, i64 y_stride, int add, i64 rows,
                          const float *next) {
    i64 count = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (i64 n = 0; n < count; n++) {
        i64 r = n * rows / count, take = (n + 1) * rows / count - r;
        Rows here = {x.at + r * x.row, x.row, x.step};
        tiles[take](here, w, step, inner, y + r * y_stride, y_stride, add, next);
        next = w;
    }
}

/* The same for a panel of fewer than PANEL columns: through a tile that is whole. */
static void part_product(Rows x, const float *w, i64 step, i64 inner, float *y, i64 y_stride, int add, i64 rows,
                         i64 columns) {
    float whole[MOST_ROWS * PANEL] = {};
    for (i64 r = 0; r < rows; r += MOST_ROWS) {
        i64 take = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
        for (i64 k = 0; add && k < take; k++) memcpy(whole + k * PANEL, y + (r + k) * y_stride, sizeof(float) * columns);
        Rows here = {x.at + r * x.row, x.row, x.step};
        tiles[take](here, w, step, inner, whole, PANEL, add, w);
        for (i64 k = 0; k < take; k++) memcpy(y + (r + k) * y_stride, whole + k * PANEL, sizeof(float) * columns);
    }
}

static void copy_panel(const float *w, i64 step, i64 lines, i64 columns, float *to) {
    for (i64 i = 0; i < lines; i++, w += step, to += PANEL)
        for (i64 c = 0; c < PANEL; c++) to[c] = c < columns ? w[c] : 0;
}

void product(Rows x, Columns w, i64 inner, float *y, i64 y_stride, int add, i64 rows, i64 columns, i64 first, i64 last) {
    float copy[DEPTH * PANEL] __attribute__((aligned(64)));
    if (inner == 0 && !add)
        for (i64 r = 0; r < rows; r++) memset(y + r * y_stride, 0, sizeof(float) * columns);
    for (i64 p = first; p < last; p++)
        for (i64 i = 0; i < inner; i += DEPTH) {
            i64 lines = inner - i < DEPTH ? inner - i : DEPTH, left = columns - p * PANEL, step = w.step;
            const float *at = w.at + p * w.panel + i * step;
            const float *next = i + lines < inner ? at + lines * step : p + 1 < last ? w.at + (p + 1) * w.panel : at;
            Rows here = {x.at + i * x.step, x.row, x.step};
            if (step != PANEL && (rows >= COPY_ROWS || left < PANEL)) {
                copy_panel(at, step, lines, left < PANEL ? left : PANEL, copy);
                at = next = copy;
                step = PANEL;
            }
            if (left >= PANEL)
                panel_product(here, at, step, lines, y + p * PANEL, y_stride, add || i, rows, next);
            else
                part_product(here, at, step, lines, y + p * PANEL, y_stride, add || i, rows, left);
        }
}

/* out = x w; x [rows, inner] with a row stride, w [inner, outer] with its columns side by side, or in panels when its
   stride is 0. */
typedef struct {
    const float *x;
    i64 x_stride;
    const float *w;
    i64 w_stride;
    float *out;
    i64 rows, inner, outer;
} Linear;

static void linear_part(const void *arguments, Share share) {
    const Linear *a = arguments;
    i64 panels = panels_of(a->outer);
    product((Rows){a->x, a->x_stride, 1}, columns_of(a->w, a->w_stride, a->inner), a->inner, a->out, a->outer, 0, a->rows,
            a->outer, first_of(share, panels), last_of(share, panels));
}

void linear(const void *arguments) {
    const Linear *a = arguments;
    together(linear_part, a, a->rows * a->inner * a->outer);
}

/* out_r = x_r w_e for the rows of each expert. x [rows, inner], w [experts, inner, outer], out [rows, outer]; w's columns
   lie side by side, or in panels when their stride is 0. Rows past the last end become zeros. Threads share the
   panels of every expert, which is fair whatever the gate chose. */
typedef struct {
    const float *x, *w;
    i64 w_expert, w_stride;
    const i32 *ends;
    float *out;
    i64 rows, experts, inner, outer;
} GroupedLinear;

static void grouped_linear_part(const void *arguments, Share share) {
    const GroupedLinear *a = arguments;
    i64 panels = panels_of(a->outer), start = 0;
    for (i64 e = 0; e < a->experts; start = a->ends[e++])
        if (a->ends[e] > start)
            product((Rows){a->x + start * a->inner, a->inner, 1},
                    columns_of(a->w + e * a->w_expert, a->w_stride, a->inner), a->inner, a->out + start * a->outer,
                    a->outer, 0, a->ends[e] - start, a->outer, first_of(share, panels), last_of(share, panels));
    if (share.rank == 0) memset(a->out + start * a->outer, 0, sizeof(float) * (a->rows - start) * a->outer);
}

void grouped_linear(const void *arguments) {
    const GroupedLinear *a = arguments;
    together(grouped_linear_part, a, a->rows * a->inner * a->outer);
}

/* out_b = x_b w_b; x [batch, rows, inner] with any strides, w [batch, inner, outer] with its columns side by side (or in
   panels when their stride is 0), out with strides for batch and row. */
typedef struct {
    const float *x;
    i64 x_batch, x_row, x_step;
    const float *w;
    i64 w_batch, w_stride;
    float *out;
    i64 out_batch, out_row, batch, rows, inner, outer;
} Bmm;

static void bmm_part(const void *arguments, Share share) {
    const Bmm *a = arguments;
    i64 panels = panels_of(a->outer), first = first_of(share, a->batch * panels), last = last_of(share, a->batch * panels);
    while (first < last) {
        i64 b = first / panels, end = (b + 1) * panels < last ? (b + 1) * panels : last;
        product((Rows){a->x + b * a->x_batch, a->x_row, a->x_step},
                columns_of(a->w + b * a->w_batch, a->w_stride, a->inner), a->inner, a->out + b * a->out_batch, a->out_row,
                0, a->rows, a->outer, first - b * panels, end - b * panels);
        first = end;
    }
}

void bmm(const void *arguments) {
    const Bmm *a = arguments;
    together(bmm_part, a, a->batch * a->rows * a->inner * a->outer);
}

/* Lay w [batch, inner, outer], with any strides, out in panels: to [batch, panels, inner, PANEL]. */
typedef struct {
    const float *w;
    i64 w_batch, w_row, w_column;
    float *to;
    i64 batch, inner, outer;
} LayPanels;

void lay_panels(const void *arguments) {
    const LayPanels *a = arguments;
    float *to = a->to;
    for (i64 b = 0; b < a->batch; b++)
        for (i64 c = 0; c < a->outer; c += PANEL)
            for (i64 i = 0; i < a->inner; i++)
                for (i64 k = 0; k < PANEL; k++)
                    *to++ = c + k < a->outer ? a->w[b * a->w_batch + i * a->w_row + (c + k) * a->w_column] : 0;
}
