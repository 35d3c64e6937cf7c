/* Low-rank additions to a linear map that stands for several, stacked: y += B_p S_p (A_p x) for each part p.
 * A is (parts * rank, width); B is pairs of ranks by output, (rank / 2, outputs, 2). Both are bf16, and there is
 * no S; or both are codes of eight bits, and S has their scales. A row's bits do not depend on how many others
 * there are. The plain twin is kernels/plain.py. */
#include "numbers.h"

enum { LANES = 32, AT_ONCE = 4 }; /* numbers of 16 bits in a register; rows of A */

typedef struct {
    long parts, rank, width, outputs;
    const long *ends; /* of each part's outputs; multiples of 16 */
    const void *a, *b;
    const float *scale; /* parts * rank; null where a and b are bf16 */
} LowRank;

/* Codes as bf16, which has them all. n is a multiple of LANES. */
static void widen(const int8_t *codes, bf16 *out, long n) {
#ifdef __AVX512BF16__
    for (long i = 0; i < n; i += LANES) {
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(codes + i))));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(codes + i + 16))));
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
#else
    for (long i = 0; i < n; i++) out[i] = down(codes[i]);
#endif
}

/* Products of x with `some` (up to AT_ONCE) rows of A, side by side: one alone waits for itself at each step. */
static inline void dots(const bf16 *a, const bf16 *x, long n, long some, float *out) {
#ifdef __AVX512BF16__
    __m512 sum[AT_ONCE];
    for (long r = 0; r < AT_ONCE; r++) sum[r] = _mm512_setzero_ps();
    if (some == AT_ONCE)
        for (long i = 0; i < n; i += LANES) {
            __m512bh v = (__m512bh)_mm512_loadu_si512(x + i);
            for (long r = 0; r < AT_ONCE; r++)
                sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_loadu_si512(a + r * n + i), v);
        }
    else
        for (long r = 0; r < some; r++)
            for (long i = 0; i < n; i += LANES)
                sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_loadu_si512(a + r * n + i),
                                          (__m512bh)_mm512_loadu_si512(x + i));
    for (long r = 0; r < some; r++) out[r] = _mm512_reduce_add_ps(sum[r]);
#else
    for (long r = 0; r < some; r++) {
        v8 sum = {0}, other = {0};
        for (long i = 0; i < n; i += 16) {
            sum = mul_add8(ups8(a + r * n + i), ups8(x + i), sum);
            other = mul_add8(ups8(a + r * n + i + 8), ups8(x + i + 8), other);
        }
        out[r] = sum8(sum + other);
    }
#endif
}

/* Where row t's product with row i of A goes: pairs of rows lie together, so that threads share few lines. */
static inline long place(long i, long t, long count) { return (i / 2 * count + t) * 2 + i % 2; }

/* 16 outputs; `b` holds their factors, LANES for each pair of ranks; `inner` a row's products, a pair every `step`. */
static inline void add16(const bf16 *b, long stride, long rank, const bf16 *inner, long step, bf16 *y) {
#ifdef __AVX512BF16__
    __m512 acc = _mm512_setzero_ps();
    for (long r = 0; r < rank / 2; r++) {
        int32_t pair;
        memcpy(&pair, inner + r * step, 4);
        acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(b + r * stride),
                               (__m512bh)_mm512_set1_epi32(pair));
    }
    __m512i was = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)y)), 16);
    __m256bh sum = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(was), acc));
    _mm256_storeu_si256((void *)y, (__m256i)sum);
#else
    v8 sum[2] = {{0}, {0}};
    for (long r = 0; r < rank / 2; r++)
        for (long h = 0; h < 2; h++) {
            v8 first, second;
            pairs8(b + r * stride + 16 * h, &first, &second);
            sum[h] = mul_add8(first, all8(up(inner[r * step])), sum[h]);
            sum[h] = mul_add8(second, all8(up(inner[r * step + 1])), sum[h]);
        }
    for (long i = 0; i < 16; i++) y[i] = down(up(y[i]) + sum[i / 8][i % 8]);
#endif
}

/* The factors of 16 outputs: their place in B, or, from codes, in `room`, one pair of ranks after another. */
static const bf16 *factors_at(const LowRank *m, long n, bf16 *room, long *stride) {
    *stride = m->scale ? LANES : 2 * m->outputs;
    if (!m->scale) return (const bf16 *)m->b + 2 * n;
    for (long r = 0; r < m->rank / 2; r++)
        widen((const int8_t *)m->b + (r * m->outputs + n) * 2, room + r * LANES, LANES);
    return room;
}

/* Rows of A from `first` on: where they are, or, from codes, in `room`. */
static const bf16 *rows_at(const LowRank *m, long first, long some, bf16 *room) {
    if (!m->scale) return (const bf16 *)m->a + first * m->width;
    widen((const int8_t *)m->a + first * m->width, room, some * m->width);
    return room;
}

/* Changes y (count, outputs); x is (count, width), a multiple of 32; rank is even. scratch holds bf16: `count` for
 * each of A's rows; and, where there are codes, as many as A has, or as B has, whichever is more. */
void lowrank_rows(const LowRank *m, const bf16 *x, bf16 *y, long count, bf16 *scratch) {
    long inner = m->parts * m->rank, steps = (inner + AT_ONCE - 1) / AT_ONCE;
    bf16 *room = scratch + count * inner;
#pragma omp parallel num_threads(threads_for(count * inner * m->width))
    {
#pragma omp for schedule(static)
        for (long step = 0; step < steps; step++) {
            long first = step * AT_ONCE, some = inner - first < AT_ONCE ? inner - first : AT_ONCE;
            const bf16 *a = rows_at(m, first, some, room + first * m->width);
            for (long t = 0; t < count; t++) {
                float sum[AT_ONCE];
                dots(a, x + t * m->width, m->width, some, sum);
                for (long r = 0; r < some; r++)
                    scratch[place(first + r, t, count)] = down(m->scale ? sum[r] * m->scale[first + r] : sum[r]);
            }
        }
#pragma omp for schedule(static)
        for (long block = 0; block < m->outputs / 16; block++) {
            long n = block * 16, part = 0, stride;
            while (n >= m->ends[part]) part++;
            const bf16 *b = factors_at(m, n, room + n * m->rank, &stride);
            for (long t = 0; t < count; t++)
                add16(b, stride, m->rank, scratch + place(part * m->rank, t, count), 2 * count,
                      y + t * m->outputs + n);
        }
    }
}
