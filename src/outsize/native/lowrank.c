/* Low-rank additions to a linear map that stands for several, stacked: y += B_p (A_p x) for each part p.
 * A is (parts * rank, width) bf16; B is pairs of ranks by output, (rank / 2, outputs, 2) bf16. A row's
 * bits do not depend on how many others there are. The plain twin is model/adapter.py. */
#include "numbers.h"

typedef struct {
    long parts, rank, width, outputs;
    const long *ends; /* of each part's outputs; multiples of 16 */
    const bf16 *a, *b;
} LowRank;

static float dot(const bf16 *a, const bf16 *x, long n) {
#ifdef __AVX512BF16__
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(x + i));
    return _mm512_reduce_add_ps(sum);
#else
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += up(a[i]) * up(x[i]);
    return sum;
#endif
}

/* 16 outputs. */
static inline void add16(const LowRank *m, const bf16 *inner, long n, bf16 *y) {
    float sum[16];
#ifdef __AVX512BF16__
    __m512 acc = _mm512_setzero_ps();
    for (long r = 0; r < m->rank / 2; r++) {
        int32_t pair;
        memcpy(&pair, inner + 2 * r, 4);
        acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(m->b + (r * m->outputs + n) * 2),
                               (__m512bh)_mm512_set1_epi32(pair));
    }
    _mm512_storeu_ps(sum, acc);
#else
    memset(sum, 0, sizeof sum);
    for (long r = 0; r < m->rank; r++)
        for (long i = 0; i < 16; i++)
            sum[i] += up(inner[r]) * up(m->b[(r / 2 * m->outputs + n + i) * 2 + r % 2]);
#endif
    for (long i = 0; i < 16; i++) y[i] = down(up(y[i]) + sum[i]);
}

/* Changes y (count, outputs); x is (count, width), a multiple of 32; rank is even. scratch holds
 * count * parts * rank bf16. */
void lowrank_rows(const LowRank *m, const bf16 *x, bf16 *y, long count, bf16 *scratch) {
    long inner = m->parts * m->rank;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long i = 0; i < count * inner; i++)
            scratch[i] = down(dot(m->a + i % inner * m->width, x + i / inner * m->width, m->width));
#pragma omp for schedule(static)
        for (long block = 0; block < m->outputs / 16; block++) {
            long n = block * 16, part = 0;
            while (n >= m->ends[part]) part++;
            for (long t = 0; t < count; t++)
                add16(m, scratch + t * inner + part * m->rank, n, y + t * m->outputs + n);
        }
    }
}
