/* The experts that a few rows chose, in one call: for each expert its rows are gathered, taken through gate and
 * up, the activation, and down, weighed, and put where the row keeps that choice's output. The functions
 * are those that a single expert goes through, so the bits are the same.
 */
#include "numbers.h"

void group_linear(const Matrix *m, const void *x, void *y, long count, int wide, char *scratch);
void tile_linear(const uint8_t *packed, const bf16 *scales, const bf16 *x, bf16 *y, long rows, long width,
                 long count, float *scratch);
void palette_linear(const Matrix *m, const void *x, void *y, long count, int wide, char *scratch);
void gate_rows(const bf16 *gate_up, bf16 *out, long rows, long width, int kind);

typedef struct {
    Matrix gate_up, down;
} Expert;

typedef struct {
    long row, slot;
    double weight;
} Place;

static void linear(const Matrix *m, const bf16 *x, bf16 *y, long count, char *scratch) {
    if (m->palette) palette_linear(m, x, y, count, 0, scratch);
    else if (m->bits) group_linear(m, x, y, count, 0, scratch);
    else tile_linear(m->codes, m->scale, x, y, m->rows, m->width, count, (float *)scratch);
}

/* x is (T, D) bf16, out (T, used, D) fp32. Expert e has counts[e] places, one after the other. scratch holds
 * `most` (the largest count) times 4 * max(D, F) + 4 * D + 6 * F bytes: see Kernels.experts. */
void expert_rows(const Expert *const *experts, const long *counts, const Place *places, long num,
                 const bf16 *x, float *out, long used, long most, int kind, char *scratch) {
    for (long e = 0; e < num; places += counts[e++]) {
        const Expert *expert = experts[e];
        long D = expert->gate_up.width, F = expert->down.width, count = counts[e];
        bf16 *rows = (bf16 *)scratch, *gate_up = rows + most * D, *inner = gate_up + most * 2 * F;
        bf16 *y = inner + most * F;
        char *rest = (char *)(y + most * D);
        for (long i = 0; i < count; i++) memcpy(rows + i * D, x + places[i].row * D, 2 * D);
        linear(&expert->gate_up, rows, gate_up, count, rest);
        gate_rows(gate_up, inner, count, F, kind);
        linear(&expert->down, inner, y, count, rest);
        for (long i = 0; i < count; i++) {
            float *o = out + (places[i].row * used + places[i].slot) * D, w = (float)places[i].weight;
            for (long d = 0; d < D; d++) o[d] = up(y[i * D + d]) * w;
        }
    }
}

/* Nested experts: row t goes through the first pieces[t] of them, one at least, and their outputs are added up in
 * order. x is (rows, D) bf16, out (rows, D) fp32. scratch as above with `most` = rows, and 8 * rows bytes. */
void nested_rows(const Expert *const *experts, const long *pieces, long rows, const bf16 *x, float *out, int kind,
                 char *scratch) {
    long *who = (long *)scratch;
    scratch += 8 * rows;
    for (long e = 0;; e++) {
        long count = 0;
        for (long t = 0; t < rows; t++)
            if (pieces[t] > e) who[count++] = t;
        if (!count) return;
        const Expert *expert = experts[e];
        const long D = expert->gate_up.width, F = expert->down.width;
        bf16 *some = (bf16 *)scratch, *gate_up = some + rows * D, *inner = gate_up + rows * 2 * F;
        bf16 *y = inner + rows * F;
        char *rest = (char *)(y + rows * D);
        for (long i = 0; i < count; i++) memcpy(some + i * D, x + who[i] * D, 2 * D);
        linear(&expert->gate_up, some, gate_up, count, rest);
        gate_rows(gate_up, inner, count, F, kind);
        linear(&expert->down, inner, y, count, rest);
        for (long i = 0; i < count; i++) {
            float *o = out + who[i] * D;
            for (long d = 0; d < D; d++) o[d] = e ? o[d] + up(y[i * D + d]) : up(y[i * D + d]);
        }
    }
}
