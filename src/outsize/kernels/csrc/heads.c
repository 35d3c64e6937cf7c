/* Each head's numbers times a matrix of its own (latent attention): few rows, a weight read once for all of them. A
 * row's bits do not depend on how many others there are. The plain twin is kernels/plain.py: each_head. */
#include "numbers.h"

/* Numbers of 16 bits in a register; rows of a matrix that are one task; numbers ahead that are called for: the
 * processor alone foresees half of them. */
enum { LANES = 32, AT_ONCE = 8, AHEAD = 8192 };

/* Products of x with `some` rows of w, of n numbers, a multiple of LANES. */
static inline void dots(const bf16 *w, const bf16 *x, long n, long some, bf16 *out) {
#ifdef __AVX512BF16__
    for (long r = 0; r < some; r++, w += n) {
        __m512 a = _mm512_setzero_ps(), b = a;
        for (long i = 0; i < n; i += 2 * LANES) {
            __builtin_prefetch(w + i + AHEAD), __builtin_prefetch(w + i + LANES + AHEAD);
            a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_loadu_si512(w + i), (__m512bh)_mm512_loadu_si512(x + i));
            if (i + LANES < n)
                b = _mm512_dpbf16_ps(b, (__m512bh)_mm512_loadu_si512(w + i + LANES),
                                     (__m512bh)_mm512_loadu_si512(x + i + LANES));
        }
        out[r] = down(_mm512_reduce_add_ps(_mm512_add_ps(a, b)));
    }
#else
    for (long r = 0; r < some; r++) {
        v8 sum = {0}, other = {0};
        for (long i = 0; i < n; i += 16) {
            sum = mul_add8(ups8(w + r * n + i), ups8(x + i), sum);
            other = mul_add8(ups8(w + r * n + i + 8), ups8(x + i + 8), other);
        }
        out[r] = down(sum8(sum + other));
    }
#endif
}

/* x (T, heads, width), w (heads, rows, width) -> out (T, heads, rows). */
void head_rows(const bf16 *x, const bf16 *w, bf16 *out, long count, long heads, long rows, long width) {
    const long blocks = (rows + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel for schedule(static) num_threads(threads_for(count *heads *rows *width))
    for (long task = 0; task < heads * blocks; task++) {
        const long h = task / blocks, first = task % blocks * AT_ONCE;
        const long some = rows - first < AT_ONCE ? rows - first : AT_ONCE;
        for (long t = 0; t < count; t++)
            dots(w + (h * rows + first) * width, x + (t * heads + h) * width, width, some,
                 out + (t * heads + h) * rows + first);
    }
}
