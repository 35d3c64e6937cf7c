/* Attention of a step of few rows: bias, norms, rotation, storing, and each row over its sequence's cache.
 *
 * A row sees the entries [first, seen), and [from, slot]: for ordinary rows the second run is empty, for a
 * mask it is its own block so far. The first run is cut where the cache's entries are multiples of CHUNK,
 * so that the cuts depend on the row alone; rows of one sequence share the reading of a chunk. Everything
 * else happens in a fixed order a row, so that its bits do not depend on its company. Keys of 16 entries
 * are turned, so that a lane is an entry and no sum crosses lanes (without products of bf16 they are not: a key
 * becomes floats once for up to eight queries). The plain twin is kernels/attention.py.
 */
#include "numbers.h"
#include <stdlib.h>

enum { CHUNK = 256, LANES = 16, TILE = 8, SHARED = 8 };

typedef struct {
    long heads, kv_heads, head_dim, window; /* window 0: none */
    float scale, eps;
    const float *bias; /* (heads + 2 kv_heads) * head_dim, or null */
    const float *norm; /* (heads + kv_heads) * head_dim, or null */
    const float *sinks; /* heads: the score of attending to nothing; or null */
    float cap; /* 0: none; else scores x are cap * tanh(x / cap) */
} Attention;

typedef struct {
    bf16 *cache; /* (2 kv_heads, capacity, head_dim): keys, then values */
    long slot;   /* where this row's entry goes */
    long capacity, first, seen, from;
    uint8_t *coded; /* or null: (2 kv_heads, coded_capacity, ...), where the entry is kept in 8 bits */
    long coded_capacity;
} Row;

/* Rows r0 to r1, which share a cache, over entries lo to hi; `own`: the one row's second run. */
typedef struct {
    long r0, r1, head, lo, hi, own;
} Task;

/* Bytes of an entry that is kept in 8 bits: E codes, and a step in bf16 for each GROUP of them, or for all. */
enum { KV_GROUP = 32 };
static long group_of(long E) { return E % KV_GROUP ? E : KV_GROUP; }
static long coded_bytes(long E) { return E + E / group_of(E) * (long)sizeof(bf16); }

/* An entry in 8 bits; and the numbers that its codes stand for. */
static void code8(bf16 *entry, long E, uint8_t *coded) {
    for (long g = 0, n = group_of(E); g < E / n; g++, entry += n) {
        float most = 0;
        for (long i = 0; i < n; i++) {
            const float x = up(entry[i]), size = x < 0 ? -x : x;
            most = size > most ? size : most;
        }
        const bf16 kept = down(most / 127);
        const float step = up(kept);
        for (long i = 0; i < n; i++) {
            float code = step ? rintf(up(entry[i]) / step) : 0;
            code = code > 127 ? 127 : code < -127 ? -127 : code;
            coded[g * n + i] = (uint8_t)(int8_t)code;
            entry[i] = down(code * step);
        }
        memcpy(coded + E + g * sizeof kept, &kept, sizeof kept);
    }
}

/* out (heads, capacity, E): the first `count` entries of `coded` (heads, coded_capacity, ...) as numbers. */
void decode_entries(const uint8_t *coded, bf16 *out, const long *shape, long count) {
    const long heads = shape[0], coded_capacity = shape[1], capacity = shape[2], E = shape[3];
    const long bytes = coded_bytes(E), n = group_of(E);
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads_for(heads * count * E))
    for (long c = 0; c < heads; c++)
        for (long s = 0; s < count; s++) {
            const int8_t *code = (const int8_t *)coded + (c * coded_capacity + s) * bytes;
            bf16 *entry = out + (c * capacity + s) * E;
            for (long g = 0; g < E / n; g++) {
                bf16 kept;
                memcpy(&kept, code + E + g * sizeof kept, sizeof kept);
                const float step = up(kept);
                for (long i = g * n; i < (g + 1) * n; i++) entry[i] = down(code[i] * step);
            }
        }
}

/* One row's query (scaled) and cache entry from its projections. */
static void prepare(const Attention *a, const bf16 *qkv, const float *cos_sin, Row row, bf16 *q) {
    long E = a->head_dim, H = a->heads, J = a->kv_heads;
    float x[E];
    for (long c = 0; c < H + 2 * J; c++) {
        for (long i = 0; i < E; i++) x[i] = up(qkv[c * E + i]) + (a->bias ? a->bias[c * E + i] : 0);
        if (c < H + J) {
            if (a->norm) {
                float r = inverse_rms(x, E, a->eps);
                for (long i = 0; i < E; i++) x[i] *= r * a->norm[c * E + i];
            }
            for (long i = 0; i < E; i += 2) {
                float re = x[i] * cos_sin[i] - x[i + 1] * cos_sin[i + 1];
                x[i + 1] = x[i] * cos_sin[i + 1] + x[i + 1] * cos_sin[i];
                x[i] = re;
            }
        }
        if (c < H) {
            for (long i = 0; i < E; i++) q[c * E + i] = down(x[i] * a->scale);
        } else {
            bf16 *entry = row.cache + ((c - H) * row.capacity + row.slot) * E;
            for (long i = 0; i < E; i++) entry[i] = down(x[i]);
            if (row.coded)
                code8(entry, E, row.coded + ((c - H) * row.coded_capacity + row.slot) * coded_bytes(E));
        }
    }
}

static int is_fast(long E) {
#ifdef __AVX512BF16__
    return E % 32 == 0;
#else
    return E % 8 == 0;
#endif
}

/* The plain way, for heads of other sizes. */
static void
plain_scores(const bf16 *k, long n, long E, const bf16 *const *q, const long count, float (*out)[CHUNK]) {
    for (long i = 0; i < count; i++)
        for (long s = 0; s < n; s++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long e = 0; e < E; e++) sum += up(q[i][e]) * up(k[s * E + e]);
            out[i][s] = sum;
        }
}

static void
plain_mix(const bf16 *v, long n, long E, float (*w)[CHUNK], const long count, float *const *out) {
    for (long i = 0; i < count; i++) {
        memset(out[i], 0, E * sizeof(float));
        for (long s = 0; s < n; s++) {
#pragma omp simd
            for (long e = 0; e < E; e++) out[i][e] += w[i][s] * up(v[s * E + e]);
        }
    }
}

#ifdef __AVX512BF16__
/* Rows of 16 32-bit numbers -> columns. */
static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i ab = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), AB = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        __m512i cd = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        __m512i CD = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(ab, cd, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(AB, CD, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(AB, CD, 0xdd);
    }
    memcpy(r, t, sizeof t);
}

/* Keys of n entries, 16 at a time, pairs of numbers by entry: (blocks, E / 2, 16). */
static void turn(const bf16 *k, long n, long E, uint32_t *out) {
    for (long s = 0; s < n; s += LANES)
        for (long e = 0; e < E / 2; e += 16, out += 256) {
            __m512i r[16];
            for (long i = 0; i < 16; i++)
                r[i] = s + i < n ? _mm512_loadu_si512(k + (s + i) * E + 2 * e) : _mm512_setzero_si512();
            transpose(r);
            for (long i = 0; i < 16; i++) _mm512_storeu_si512(out + i * 16, r[i]);
        }
}

static inline __attribute__((always_inline)) void
scores(const uint32_t *turned, long n, long E, const bf16 *const *q, const long count, float (*out)[CHUNK]) {
    for (long s = 0; s < n; s += LANES, turned += E / 2 * LANES) {
        __m512 acc[TILE];
        for (long i = 0; i < count; i++) acc[i] = _mm512_setzero_ps();
        for (long e = 0; e < E / 2; e++) {
            __m512bh k = (__m512bh)_mm512_loadu_si512(turned + e * LANES);
            for (long i = 0; i < count; i++) {
                int32_t pair;
                memcpy(&pair, q[i] + 2 * e, 4);
                acc[i] = _mm512_dpbf16_ps(acc[i], k, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
        for (long i = 0; i < count; i++) _mm512_storeu_ps(out[i] + s, acc[i]);
    }
}

static inline __attribute__((always_inline)) void
mix(const bf16 *v, long n, long E, float (*w)[CHUNK], const long count, float *const *out) {
    for (long e = 0; e < E; e += 2 * LANES) {
        __m512 a[TILE], b[TILE];
        for (long i = 0; i < count; i++) a[i] = b[i] = _mm512_setzero_ps();
        for (long s = 0; s < n; s++) {
            __m512i both = _mm512_loadu_si512(v + s * E + e);
            __m512 x = _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
            __m512 y = _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
            for (long i = 0; i < count; i++) {
                __m512 share = _mm512_set1_ps(w[i][s]);
                a[i] = _mm512_fmadd_ps(share, x, a[i]);
                b[i] = _mm512_fmadd_ps(share, y, b[i]);
            }
        }
        for (long i = 0; i < count; i++) {
            _mm512_storeu_ps(out[i] + e, a[i]);
            _mm512_storeu_ps(out[i] + e + LANES, b[i]);
        }
    }
}
#else
/* A key becomes floats once for all queries. */
static inline __attribute__((always_inline)) void
scores(const bf16 *k, long n, long E, const bf16 *const *q, const long count, float (*out)[CHUNK]) {
    float query[TILE][E];
    for (long i = 0; i < count; i++)
        for (long e = 0; e < E; e++) query[i][e] = up(q[i][e]);
    for (long s = 0; s < n; s++, k += E) {
        v8 acc[TILE];
        for (long i = 0; i < count; i++) acc[i] = (v8){0};
        for (long e = 0; e < E; e += 8) {
            v8 key = ups8(k + e);
            for (long i = 0; i < count; i++) acc[i] = mul_add8(key, load8(query[i] + e), acc[i]);
        }
        for (long i = 0; i < count; i++) out[i][s] = sum8(acc[i]);
    }
}

static inline __attribute__((always_inline)) void
mix(const bf16 *v, long n, long E, float (*w)[CHUNK], const long count, float *const *out) {
    for (long e = 0; e < E; e += 8) {
        v8 acc[TILE];
        for (long i = 0; i < count; i++) acc[i] = (v8){0};
        for (long s = 0; s < n; s++) {
            v8 value = ups8(v + s * E + e);
            for (long i = 0; i < count; i++) acc[i] = mul_add8(value, all8(w[i][s]), acc[i]);
        }
        for (long i = 0; i < count; i++) memcpy(out[i] + e, &acc[i], sizeof acc[i]);
    }
}
#endif

/* Eight at a time as intrinsics, since gcc makes three instructions of a choice, and clang none of a reduction. */
static float largest(const float *x, long n) {
    v8 eight = all8(-INFINITY);
    long s = 0;
    for (; s + 8 <= n; s += 8) eight = max8(eight, load8(x + s));
    float most = eight[0];
    for (long i = 1; i < 8; i++) most = eight[i] > most ? eight[i] : most;
    for (; s < n; s++) most = x[s] > most ? x[s] : most;
    return most;
}

/* tanh(z) == 1 - 2 / (1 + e^(2z)) */
static void capped(float *score, long n, float cap) {
#pragma omp simd
    for (long s = 0; s < n; s++) score[s] = cap * (1.0f - 2.0f / (1.0f + exp_poly(2.0f * score[s] / cap)));
}

/* Scores to weights, over [lo, hi) of n; nothing elsewhere. */
static void soften(float *score, long n, long lo, long hi, float *top, float *total) {
    float most = largest(score + lo, hi - lo), sum = 0;
    for (long s = 0; s < lo; s++) score[s] = 0;
#pragma omp simd reduction(+ : sum)
    for (long s = lo; s < hi; s++) {
        score[s] = exp_poly(score[s] - most);
        sum += score[s];
    }
    for (long s = hi; s < n; s++) score[s] = 0;
    *top = most;
    *total = sum;
}

/* `k`: keys, turned where there are products of bf16 and the heads' size allows it. */
static void scores_sized(const void *k, long n, long E, const bf16 *const *q, long count, float (*out)[CHUNK]) {
    if (!is_fast(E)) { plain_scores(k, n, E, q, count, out); return; }
#define CALL(size) scores(k, n, E, q, size, out)
    FOR_1_TO_8(count, CALL)
#undef CALL
}

static void mix_sized(const bf16 *v, long n, long E, float (*w)[CHUNK], long count, float *const *out) {
    if (!is_fast(E)) { plain_mix(v, n, E, w, count, out); return; }
#define CALL(size) mix(v, n, E, w, size, out)
    FOR_1_TO_8(count, CALL)
#undef CALL
}

static long num_chunks(Row row) { return (row.seen - 1) / CHUNK - row.first / CHUNK + 1; }

/* `part` of row t, key head j: parts of G rows of E sums, then G largest scores, then G normalizers. */
static void run(const Attention *a, Task task, const Row *row, const bf16 *q, float *part, long max_parts) {
    long E = a->head_dim, H = a->heads, J = a->kv_heads, G = H / J, stride = G * (E + 2);
    long n = task.hi - task.lo, j = task.head, queries = (task.r1 - task.r0) * G;
    const bf16 *k = row[task.r0].cache + (j * row[task.r0].capacity + task.lo) * E;
    const bf16 *v = k + J * row[task.r0].capacity * E;
    const void *keys = k;
#ifdef __AVX512BF16__
    uint32_t turned[(n + LANES - 1) / LANES * LANES * E / 2];
    if (is_fast(E)) {
        turn(k, n, E, turned);
        keys = turned;
    }
#endif
    for (long at = 0; at < queries; at += TILE) {
        long count = queries - at < TILE ? queries - at : TILE, used = 0;
        const bf16 *query[TILE];
        float *out[TILE], *top[TILE];
        long lo[TILE], hi[TILE];
        for (long i = 0; i < count; i++) {
            long t = task.r0 + (at + i) / G, g = (at + i) % G;
            Row r = row[t];
            long from = task.own ? r.from : r.first, to = task.own ? r.slot + 1 : r.seen;
            long low = from > task.lo ? from - task.lo : 0, high = (to < task.hi ? to : task.hi) - task.lo;
            if (low >= high) continue;
            long c = task.own ? num_chunks(r) : task.lo / CHUNK - r.first / CHUNK;
            float *p = part + ((t * J + j) * max_parts + c) * stride;
            query[used] = q + (t * H + j * G + g) * E;
            out[used] = p + g * E;
            top[used] = p + G * E + g;
            lo[used] = low;
            hi[used++] = high;
        }
        float w[TILE][CHUNK];
        scores_sized(keys, n, E, query, used, w);
        if (a->cap)
            for (long i = 0; i < used; i++) capped(w[i], n, a->cap);
        for (long i = 0; i < used; i++) soften(w[i], n, lo[i], hi[i], top[i], top[i] + G);
        mix_sized(v, n, E, w, used, out);
    }
}

/* Chunks of one row and key head, joined in order. */
static void combine(long G, long E, const float *part, long chunks, long stride,
                    const float *sinks, bf16 *out) {
    for (long g = 0; g < G; g++) {
        float top = sinks ? sinks[g] : -INFINITY, total = 0, sum[E];
        memset(sum, 0, sizeof sum);
        for (long c = 0; c < chunks; c++) {
            float m = part[c * stride + G * E + g];
            top = m > top ? m : top;
        }
        if (sinks) total = exp_poly(sinks[g] - top);
        for (long c = 0; c < chunks; c++) {
            const float *p = part + c * stride;
            float w = exp_poly(p[G * E + g] - top);
            total = mul_add(w, p[G * E + G + g], total);
            for (long i = 0; i < E; i++) sum[i] = mul_add(w, p[g * E + i], sum[i]);
        }
        for (long i = 0; i < E; i++) out[g * E + i] = down(sum[i] / total);
    }
}

/* Rows of one cache, at most SHARED of them, over each chunk that any of them sees. */
static long plan(const Row *row, long rows, long J, Task *task) {
    long count = 0;
    for (long r0 = 0, r1; r0 < rows; r0 = r1) {
        long first = row[r0].first, seen = row[r0].seen;
        for (r1 = r0; r1 < rows && r1 < r0 + SHARED && row[r1].cache == row[r0].cache; r1++) {
            first = row[r1].first < first ? row[r1].first : first;
            seen = row[r1].seen > seen ? row[r1].seen : seen;
        }
        for (long c = first / CHUNK; c <= (seen - 1) / CHUNK; c++)
            for (long j = 0; j < J; j++) {
                long hi = (c + 1) * CHUNK < seen ? (c + 1) * CHUNK : seen;
                if (task) task[count] = (Task){r0, r1, j, c * CHUNK, hi, 0};
                count++;
            }
        for (long t = r0; t < r1; t++)
            for (long j = 0; j < J && row[t].from <= row[t].slot; j++) {
                if (task) task[count] = (Task){t, t + 1, j, row[t].from, row[t].slot + 1, 1};
                count++;
            }
    }
    return count;
}

/* (rows, qkv) -> (rows, heads * head_dim). cos_sin is (rows, head_dim): cosine and sine of each pair. scratch
 * holds rows * heads * head_dim bf16 queries, then rows * kv_heads * max_parts parts of G * (head_dim + 2)
 * floats. */
void attend_rows(const Attention *a, const bf16 *qkv, const float *cos_sin, const Row *row, long rows,
                 long max_parts, float *scratch, bf16 *out) {
    long E = a->head_dim, H = a->heads, J = a->kv_heads, G = H / J, stride = G * (E + 2);
    bf16 *q = (bf16 *)scratch;
    float *part = scratch + (rows * H * E + 1) / 2;
    long count = plan(row, rows, J, 0);
    Task *task = malloc(count * sizeof *task);
    plan(row, rows, J, task);
    long seen = 0;
    for (long t = 0; t < rows; t++) seen += row[t].seen - row[t].first + 1;
#pragma omp parallel num_threads(threads_for(2 * seen * H * E))
    {
#pragma omp for schedule(static)
        for (long t = 0; t < rows; t++)
            prepare(a, qkv + t * (H + 2 * J) * E, cos_sin + t * E, row[t], q + t * H * E);
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < count; i++) run(a, task[i], row, q, part, max_parts);
#pragma omp for schedule(static)
        for (long tj = 0; tj < rows * J; tj++) {
            long t = tj / J, j = tj % J, parts = num_chunks(row[t]) + (row[t].from <= row[t].slot);
            combine(G, E, part + tj * max_parts * stride, parts, stride,
                    a->sinks ? a->sinks + j * G : 0, out + (t * H + j * G) * E);
        }
    }
    free(task);
}
