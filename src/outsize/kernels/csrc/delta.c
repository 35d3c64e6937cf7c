/* The gated delta rule (arXiv 2412.06464) of few rows of one sequence, one after the other: each value head keeps a
 * matrix S (key x value). Every head, and every row, is computed in a fixed order, whatever the number of threads. The
 * plain twin is kernels/delta.py.
 */
#include "numbers.h"

typedef struct {
    long key_heads, value_heads, key, value, kernel, tiled;
    const float *conv; /* (kernel, channels) */
} Delta;

enum { SOME = 64 }; /* numbers of a value at once */

/* Channels of one row: a mean of the last rows', activated. */
static void mix(const Delta *d, const bf16 *rows, long channels, long from, long to, float *out) {
#pragma omp simd
    for (long c = from; c < to; c++) {
        float x = up(rows[c]) * d->conv[c];
        for (long i = 1; i < d->kernel; i++) x = mul_add(up(rows[i * channels + c]), d->conv[i * channels + c], x);
        out[c] = x / (1.0f + exp_poly(-x));
    }
}

/* To length one, times `scale`. */
static void unit(float *x, long n, float scale) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    const float times = scale / sqrtf(sum + 1e-6f);
#pragma omp simd
    for (long i = 0; i < n; i++) x[i] *= times;
}

/* Some numbers of one head's values: what S holds under the key, faded, and what the query reads of it once that has
 * moved towards the value. */
static inline void step(float *s, long stride, long key, long some, const float *q, const float *k, const float *v,
                        float fade, float share, float *out) {
    float found[SOME] = {0}, sum[SOME] = {0};
    for (long i = 0; i < key; i++) {
        const float *row = s + i * stride, a = k[i];
#pragma omp simd
        for (long j = 0; j < some; j++) found[j] = mul_add(a, row[j], found[j]);
    }
#pragma omp simd
    for (long j = 0; j < some; j++) found[j] = (v[j] - fade * found[j]) * share;
    for (long i = 0; i < key; i++) {
        float *row = s + i * stride;
        const float a = k[i], b = q[i];
#pragma omp simd
        for (long j = 0; j < some; j++) {
            row[j] = mul_add(a, found[j], fade * row[j]);
            sum[j] = mul_add(b, row[j], sum[j]);
        }
    }
    memcpy(out, sum, some * sizeof *sum);
}

/* out (T, H, V) of `count` rows, whose inputs are in `window` (kernel - 1 + T, channels). `gates` (T, 2H): logarithms of
 * decays, shares of the difference. Changes `states` (H, K, V). `mixed`: room for (T, channels). */
void delta_rows(const Delta *d, const bf16 *window, const float *gates, float *states, float *out, long count,
                float *mixed) {
    const long K = d->key, V = d->value, H = d->value_heads, keys = d->key_heads * K;
    const long channels = 2 * keys + H * V, blocks = (channels + 511) / 512, each = H / d->key_heads;
    const int threads = threads_for(3 * count * H * K * V);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long task = 0; task < count * blocks; task++) {
            const long t = task / blocks, from = task % blocks * 512, to = from + 512;
            mix(d, window + t * channels, channels, from, to < channels ? to : channels, mixed + t * channels);
        }
#pragma omp for schedule(static)
        for (long task = 0; task < count * 2 * d->key_heads; task++) {
            const long t = task / (2 * d->key_heads), head = task % (2 * d->key_heads);
            unit(mixed + t * channels + head * K, K, head < d->key_heads ? 1.0f / sqrtf((float)K) : 1.0f);
        }
#pragma omp for schedule(static)
        for (long h = 0; h < H; h++) {
            const long of = d->tiled ? h % d->key_heads : h / each;
            for (long t = 0; t < count; t++) {
                const float *row = mixed + t * channels, *q = row + of * K, *k = q + keys;
                const float *v = row + 2 * keys + h * V, *gate = gates + t * 2 * H + h;
                const float fade = exp_poly(gate[0]), share = gate[H];
                float *s = states + h * K * V, *to = out + (t * H + h) * V;
                long j = 0;
                for (; j + SOME <= V; j += SOME) step(s + j, V, K, SOME, q, k, v + j, fade, share, to + j);
                if (j < V) step(s + j, V, K, V - j, q, k, v + j, fade, share, to + j);
            }
        }
    }
}
