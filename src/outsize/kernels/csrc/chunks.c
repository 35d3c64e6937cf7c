/* Bundles of neurons: which to read, where a run of neighbours is one read (its plain twin is kernels/chunks.py), and
 * their fields put together as matrices (kernels/gather.py). */
#include <string.h>

#include "numbers.h"

/* Each row by itself: those bundles whose values sum to the most, less `gap` for every run of neighbours. With d the
 * best sum that ends with bundle i read, less the best that ends with it left out, d[i] = value[i] + d[i - 1] held
 * within -gap and 0: a run goes on where d[i - 1] > -gap, else it begins here; and what is left out follows a run where
 * d[i - 1] > 0. Sums are double; a value that is no number is never read. `room`: `count` numbers. */
void chunk_rows(const float *value, uint8_t *chosen, double *room, long rows, long count, float gap) {
    const double least = -(double)gap;
    for (long t = 0; t < rows; t++, value += count, chosen += count) {
        double d = least;
        for (long i = 0; i < count; i++) {
            d = value[i] + (d > least ? d < 0 ? d : 0 : least);
            room[i] = d;
        }
        int reads = d > 0;
        for (long i = count - 1; i >= 0; i--) {
            chosen[i] = (uint8_t)reads;
            if (i) reads = room[i - 1] > (reads ? least : 0);
        }
    }
}

/* A field of some records, put where a matrix has it: `pieces` of `size` bytes each, side by side in a record, `apart`
 * bytes apart in the matrix, in which record i's come at the at[i]-th place. */
void gather_pieces(const uint8_t *records, long stride, const int64_t *places, const int64_t *at, long count, uint8_t *to,
                   long pieces, long size, long apart) {
#pragma omp parallel for schedule(static) num_threads(threads_for(count * pieces * size))
    for (long i = 0; i < count; i++)
        for (long p = 0; p < pieces; p++)
            memcpy(to + p * apart + at[i] * size, records + places[i] * stride + p * size, (size_t)size);
}
