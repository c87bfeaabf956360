/* Products of few rows with weights. */

#pragma once

#include "team.h"

#define PANEL 16 /* columns of a panel, a cache line */

/* x(r, i) = at[r * row + i * step]. */
typedef struct {
    const float *at;
    i64 row, step;
} Rows;

/* w(i, c) = at[c / PANEL * panel + i * step + c % PANEL]: columns side by side when panel is PANEL; a panel of its own,
   one line after another, when step is PANEL (then the last panel is filled up with zeros). */
typedef struct {
    const float *at;
    i64 step, panel;
} Columns;

INLINE Columns columns_of(const float *w, i64 stride, i64 inner) {
    return stride ? (Columns){w, stride, PANEL} : (Columns){w, PANEL, PANEL * inner};
}

INLINE i64 panels_of(i64 columns) { return (columns + PANEL - 1) / PANEL; }

/* y[r][c] (+)= sum_i x(r, i) w(i, c) for the columns of panels `first` to `last`. */
void product(Rows x, Columns w, i64 inner, float *y, i64 y_stride, int add, i64 rows, i64 columns, i64 first, i64 last);

/* y[r][c] = sum_i x[r][i] w[i][c] for eight columns, which lie side by side in w and in y. As many rows from `next` on
   are fetched ahead. */
void product_eight(const float *x, i64 x_row, const float *w, i64 inner, float *y, i64 rows, const float *next);
