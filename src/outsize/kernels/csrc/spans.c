/* Attention of a long span: many rows of one sequence over its cache, block by block, with a running maximum and sum
 * (FlashAttention, arXiv 2205.14135). Entries are cut at multiples of BLOCK and a row's sums are made in their order, so that its
 * bits do not depend on which rows are computed with it. The plain twin is kernels/attention.py: attend_span.
 *
 * Both products have one inner loop: up to ROWS rows of pairs of bf16, each repeated, against up to four registers of
 * pairs. Keys are turned for it, so that a lane is an entry; of values, pairs are neighbouring entries.
 */
#include "numbers.h"
#include <stdlib.h>

typedef struct {
    long heads, kv_heads, head_dim, rows;
    long capacity; /* entries from one head of the cache to the next */
    long count;    /* entries that are stored */
    float scale, cap;   /* cap 0: none; else scores x are cap * tanh(x / cap) */
    const float *sinks; /* heads: the score of attending to nothing; or null */
} Span;

#ifdef __AVX512BF16__
enum { BLOCK = 256, LANES = 16, ROWS = 6, TOGETHER = 192 };

/* n keys, a lane an entry: (BLOCK / 16, E / 2, 16 pairs). Those past n are zeros. */
static void turn(const bf16 *k, long n, long E, uint32_t *out) {
    for (long s = 0; s < BLOCK; s++)
        for (long e = 0; e < E / 2; e++) {
            uint32_t pair = 0;
            if (s < n) memcpy(&pair, k + s * E + 2 * e, sizeof pair);
            out[(s / LANES * (E / 2) + e) * LANES + s % LANES] = pair;
        }
}

/* n values, pairs of neighbouring entries: (BLOCK / 2, E). Those past n are zeros. */
static void pair(const bf16 *v, long n, long E, uint32_t *out) {
    for (long s = 0; s < BLOCK; s += 2, out += E) {
        const bf16 *first = v + s * E, *second = first + E;
        if (s + 1 < n)
            for (long e = 0; e < E; e++) out[e] = first[e] | (uint32_t)second[e] << 16;
        else
            for (long e = 0; e < E; e++) out[e] = s < n ? first[e] : 0;
    }
}

/* acc[i][v] += row i's pairs times column v's, `at` apart for the next pair, `beside` for the next register. */
static inline __attribute__((always_inline)) void
multiply(const bf16 *const *row, const uint32_t *b, long pairs, long at, long beside, const long rows, const long registers,
         __m512 (*acc)[4]) {
    for (long p = 0; p < pairs; p++, b += at) {
        __m512bh column[4];
        for (long v = 0; v < registers; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + v * beside);
        for (long i = 0; i < rows; i++) {
            int32_t two;
            memcpy(&two, row[i] + 2 * p, sizeof two);
            const __m512bh repeated = (__m512bh)_mm512_set1_epi32(two);
            for (long v = 0; v < registers; v++) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], repeated, column[v]);
        }
    }
}

static inline __attribute__((always_inline)) void
score_rows(const bf16 *const *q, const uint32_t *keys, long E, const long rows, float (*score)[BLOCK]) {
    for (long s = 0; s < BLOCK; s += 4 * LANES, keys += 4 * E / 2 * LANES) {
        __m512 acc[ROWS][4];
        for (long i = 0; i < rows; i++)
            for (long v = 0; v < 4; v++) acc[i][v] = _mm512_setzero_ps();
        multiply(q, keys, E / 2, LANES, E / 2 * LANES, rows, 4, acc);
        for (long i = 0; i < rows; i++)
            for (long v = 0; v < 4; v++) _mm512_storeu_ps(score[i] + s + v * LANES, acc[i][v]);
    }
}

static inline __attribute__((always_inline)) void
mix_some(const bf16 *const *share, const uint32_t *values, long E, const float *shrink, const long rows, const long registers,
         float *const *out) {
    __m512 acc[ROWS][4];
    for (long i = 0; i < rows; i++)
        for (long v = 0; v < registers; v++)
            acc[i][v] = _mm512_mul_ps(_mm512_set1_ps(shrink[i]), _mm512_loadu_ps(out[i] + v * LANES));
    multiply(share, values, BLOCK / 2, E, LANES, rows, registers, acc);
    for (long i = 0; i < rows; i++)
        for (long v = 0; v < registers; v++) _mm512_storeu_ps(out[i] + v * LANES, acc[i][v]);
}

static inline __attribute__((always_inline)) void
mix_rows(const bf16 *const *share, const uint32_t *values, long E, const float *shrink, const long rows, float *const *out) {
    float *some[ROWS];
    long e = 0;
    for (; e < E; e += e + 64 <= E ? 64 : 32) {
        for (long i = 0; i < rows; i++) some[i] = out[i] + e;
        if (e + 64 <= E) mix_some(share, values + e, E, shrink, rows, 4, some);
        else mix_some(share, values + e, E, shrink, rows, 2, some);
    }
}

/* A row's scores of a block -> shares of what is seen, in bf16; the running maximum and sum go on. Returns by what
 * the former sums shrink. */
static float soften(const Span *a, float *score, long lo, long hi, float *most, float *sum, bf16 *share) {
    float top = *most, total = 0;
#pragma omp simd
    for (long s = 0; s < BLOCK; s++) score[s] *= a->scale;
    if (a->cap) {
        const float cap = a->cap;
#pragma omp simd
        for (long s = 0; s < BLOCK; s++) score[s] = cap * (1.0f - 2.0f / (1.0f + exp_poly(2.0f * score[s] / cap)));
    }
    for (long s = 0; s < lo; s++) score[s] = -INFINITY;
    for (long s = hi; s < BLOCK; s++) score[s] = -INFINITY;
#pragma omp simd reduction(max : top)
    for (long s = 0; s < BLOCK; s++) top = score[s] > top ? score[s] : top;
#pragma omp simd reduction(+ : total)
    for (long s = 0; s < BLOCK; s++) {
        const float x = score[s] == -INFINITY ? 0 : exp_poly(score[s] - top);
        share[s] = down(x);
        total += up(share[s]);
    }
    const float shrink = *most == -INFINITY ? 0 : exp_poly(*most - top);
    *most = top;
    *sum = mul_add(*sum, shrink, total);
    return shrink;
}

typedef struct {
    uint32_t *keys, *values; /* of a block */
    float *out, *most, *sum; /* of each row */
} Room;

typedef struct {
    const Span *a;
    const bf16 *q;
    const long *lo, *hi;
    Room room;
} Work;

/* Rows r0 to r1 of tokens from t0 on, key head j, over the block that begins at entry `start`. */
static void step(const Work *w, long t0, long j, long r0, const long rows, long start) {
    const Span *a = w->a;
    const long G = a->heads / a->kv_heads, E = a->head_dim;
    const bf16 *query[ROWS], *shares[ROWS];
    float score[ROWS][BLOCK], shrink[ROWS], *out[ROWS];
    bf16 share[ROWS][BLOCK];
    long used = 0, at[ROWS];
    for (long r = r0; r < r0 + rows; r++) {
        const long t = t0 + r / G;
        if (w->hi[t] <= start || w->lo[t] >= start + BLOCK) continue;
        query[used] = w->q + (t * a->heads + j * G + r % G) * E;
        at[used++] = r;
    }
    if (!used) return;
#define CALL(size) score_rows(query, w->room.keys, E, size, score)
    FOR_1_TO_6(used, CALL)
#undef CALL
    for (long i = 0; i < used; i++) {
        const long r = at[i], t = t0 + r / G, lo = w->lo[t] - start, hi = w->hi[t] - start;
        out[i] = w->room.out + r * E;
        shares[i] = share[i];
        shrink[i] = soften(a, score[i], lo > 0 ? lo : 0, hi < BLOCK ? hi : BLOCK, w->room.most + r, w->room.sum + r, share[i]);
    }
#define CALL(size) mix_rows(shares, w->room.values, E, shrink, size, out)
    FOR_1_TO_6(used, CALL)
#undef CALL
}

/* Tokens t0 to t1 of key head j's queries. */
static void some(const Work *w, const bf16 *cache, long t0, long t1, long j, bf16 *out) {
    const Span *a = w->a;
    const long G = a->heads / a->kv_heads, E = a->head_dim, rows = (t1 - t0) * G;
    for (long r = 0; r < rows; r++) {
        w->room.most[r] = a->sinks ? a->sinks[j * G + r % G] : -INFINITY;
        w->room.sum[r] = a->sinks ? 1 : 0;
    }
    memset(w->room.out, 0, rows * E * sizeof(float));
    for (long start = w->lo[t0] / BLOCK * BLOCK; start < w->hi[t1 - 1]; start += BLOCK) {
        const long n = a->count - start < BLOCK ? a->count - start : BLOCK;
        turn(cache + (j * a->capacity + start) * E, n, E, w->room.keys);
        pair(cache + ((a->kv_heads + j) * a->capacity + start) * E, n, E, w->room.values);
        for (long r = 0; r < rows; r += ROWS) step(w, t0, j, r, rows - r < ROWS ? rows - r : ROWS, start);
    }
    for (long r = 0; r < rows; r++) {
        bf16 *to = out + ((t0 + r / G) * a->heads + j * G + r % G) * E;
        for (long e = 0; e < E; e++) to[e] = down(w->room.out[r * E + e] / w->room.sum[r]);
    }
}
#endif

/* q, out (rows, heads, head_dim); cache (2 kv_heads, capacity, head_dim): keys, then values. Row t sees the entries
 * [lo[t], hi[t]), both of which rise. head_dim is a multiple of 32. Returns 0 where the processor has no products of bf16,
 * or there is no memory. */
int attend_span(const Span *a, const bf16 *q, const bf16 *cache, const long *lo, const long *hi, bf16 *out) {
#ifdef __AVX512BF16__
    const long G = a->heads / a->kv_heads, E = a->head_dim;
    const long tokens = TOGETHER / G > 8 ? TOGETHER / G : 8, parts = (a->rows + tokens - 1) / tokens;
    const long size = (2 * BLOCK / 2 + tokens * G) * E + 2 * tokens * G; /* numbers of four bytes, a thread */
    int failed = 0;
#pragma omp parallel num_threads(threads_for(a->rows * a->count * a->heads * E))
    {
        uint32_t *mine = malloc(size * sizeof *mine);
        if (!mine) {
#pragma omp atomic write
            failed = 1;
        }
        float *sums = (float *)(mine + BLOCK * E);
        const Room room = {mine, mine + BLOCK / 2 * E, sums, sums + tokens * G * E, sums + tokens * G * (E + 1)};
        const Work work = {a, q, lo, hi, room};
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < parts * a->kv_heads; i++) {
            const long part = parts - 1 - i / a->kv_heads, t0 = part * tokens; /* the longest first */
            const long t1 = t0 + tokens < a->rows ? t0 + tokens : a->rows;
            if (mine) some(&work, cache, t0, t1, i % a->kv_heads, out);
        }
        free(mine);
    }
    return !failed;
#else
    (void)a, (void)q, (void)cache, (void)lo, (void)hi, (void)out;
    return 0;
#endif
}
