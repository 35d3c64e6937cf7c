/* Pieces of matrices out of records, put where a matrix has them. The plain twin is kernels/pieces.py. */
#include <string.h>

#include "numbers.h"

/* Piece i is in record places[i] and goes `to[i]` bytes into `out`. form: bytes of a record; where in it the piece
 * begins; blocks of a piece, each in one run of so many bytes; and how far apart in `out` they are. */
void place_pieces(const uint8_t *records, const int64_t *places, uint8_t *out, const long *to, long count,
                  const long *form) {
    const long stride = form[0], offset = form[1], blocks = form[2], run = form[3], step = form[4];
#pragma omp parallel for schedule(static) num_threads(threads_for(count * blocks * run / 8))
    for (long task = 0; task < count * blocks; task++) {
        const long i = task / blocks, b = task % blocks;
        memcpy(out + to[i] + b * step, records + places[i] * stride + offset + b * run, run);
    }
}
