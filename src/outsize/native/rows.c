/* Row kernels: what stands between the matrix products of a step of few rows.
 *
 * Every function treats each row by itself and in a fixed order, so a row's bits do not depend on the
 * other rows nor on the number of threads. Sums are fp32. The plain twins are in model/layers.py and
 * model/attention.py; tests/laws/test_native.py holds the two together.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float up(bf16 x) {
    union { uint32_t i; float f; } u = {(uint32_t)x << 16};
    return u.f;
}

static inline bf16 down(float x) { /* to nearest, ties to even */
    union { float f; uint32_t i; } u = {x};
    return (bf16)((u.i + 0x7FFF + ((u.i >> 16) & 1)) >> 16);
}

/* e^x to 2e-7 relative, as a polynomial so that loops over it become vector code. */
static inline float exp_poly(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t i; float f; } two = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * two.f;
}

static float inverse_rms(const float *x, long n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

/* out = rms_norm(h) * weight */
void norm_rows(const float *h, const float *weight, float eps, bf16 *out, long rows, long width) {
    for (long t = 0; t < rows; t++) {
        const float *x = h + t * width;
        float r = inverse_rms(x, width, eps);
#pragma omp simd
        for (long i = 0; i < width; i++) out[t * width + i] = down(x[i] * r * weight[i]);
    }
}

/* h += y, or h += rms_norm(y) * weight where a weight is given */
void residual_rows(float *h, const bf16 *y, const float *weight, float eps, long rows, long width) {
    for (long t = 0; t < rows; t++, h += width, y += width) {
        float r = 1.0f, sum = 0;
        if (!weight) {
#pragma omp simd
            for (long i = 0; i < width; i++) h[i] += up(y[i]);
            continue;
        }
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += up(y[i]) * up(y[i]);
        r = 1.0f / sqrtf(sum / width + eps);
#pragma omp simd
        for (long i = 0; i < width; i++) h[i] += up(y[i]) * r * weight[i];
    }
}

/* out = act(gate) * up; each row of gate_up is gate, then up. kind 0: silu, 1: gelu (tanh). */
void gate_rows(const bf16 *gate_up, bf16 *out, long rows, long width, int kind) {
#pragma omp parallel for schedule(static) if (rows * width > 32768)
    for (long t = 0; t < rows; t++) {
        const bf16 *g = gate_up + 2 * t * width, *u = g + width;
        bf16 *o = out + t * width;
#pragma omp simd
        for (long i = 0; i < width; i++) {
            float x = up(g[i]);
            /* gelu: x * (1 + tanh(z)) / 2 == x / (1 + e^(-2z)) */
            float z = kind ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
            o[i] = down(x / (1.0f + exp_poly(-z)) * up(u[i]));
        }
    }
}

typedef struct {
    long heads, kv_heads, head_dim, window; /* window 0: none */
    float scale, eps;
    const float *bias; /* (heads + 2 kv_heads) * head_dim, or null */
    const float *norm; /* (heads + kv_heads) * head_dim, or null */
    const float *sinks; /* heads: the score of attending to nothing; or null */
} Attention;

typedef struct {
    bf16 *cache; /* (2 kv_heads, capacity, head_dim): keys, then values */
    long slot;   /* where this row's entry goes; it sees slots up to this one */
    long capacity;
} Row;

enum { CHUNK = 256 }; /* entries a task reads; fixed, so that sums never regroup */

/* One row's query (scaled, fp32) and cache entry from its projections. */
static void prepare(const Attention *a, const bf16 *qkv, const float *turns, Row row, float *q) {
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
                float re = x[i] * turns[i] - x[i + 1] * turns[i + 1];
                x[i + 1] = x[i] * turns[i + 1] + x[i + 1] * turns[i];
                x[i] = re;
            }
        }
        if (c < H) {
            for (long i = 0; i < E; i++) q[c * E + i] = x[i] * a->scale;
        } else {
            bf16 *entry = row.cache + ((c - H) * row.capacity + row.slot) * E;
            for (long i = 0; i < E; i++) entry[i] = down(x[i]);
        }
    }
}

/* Softmax-weighted sum of values over n entries for the G queries of one key head:
 * out is G rows of E sums, then G largest scores, then G normalizers. */
static inline __attribute__((always_inline)) void
attend_chunk(const long E, long G, const float *q, const bf16 *k, const bf16 *v, long n, float *out) {
    float score[G][CHUNK], wide[E];
    for (long s = 0; s < n; s++, k += E) {
#pragma omp simd
        for (long i = 0; i < E; i++) wide[i] = up(k[i]);
        for (long g = 0; g < G; g++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < E; i++) sum += q[g * E + i] * wide[i];
            score[g][s] = sum;
        }
    }
    for (long g = 0; g < G; g++) {
        float top = -INFINITY, total = 0;
        for (long s = 0; s < n; s++) top = score[g][s] > top ? score[g][s] : top;
#pragma omp simd reduction(+ : total)
        for (long s = 0; s < n; s++) {
            score[g][s] = exp_poly(score[g][s] - top);
            total += score[g][s];
        }
        out[G * E + g] = top;
        out[G * E + G + g] = total;
    }
    memset(out, 0, sizeof(float) * G * E);
    for (long s = 0; s < n; s++, v += E) {
#pragma omp simd
        for (long i = 0; i < E; i++) wide[i] = up(v[i]);
        for (long g = 0; g < G; g++) {
            float w = score[g][s];
#pragma omp simd
            for (long i = 0; i < E; i++) out[g * E + i] += w * wide[i];
        }
    }
}

/* The same with the head's size known to the compiler, which then keeps sums in registers. */
static void attend_sized(long E, long G, const float *q, const bf16 *k, const bf16 *v, long n,
                         float *out) {
    switch (E) {
    case 64: attend_chunk(64, G, q, k, v, n, out); break;
    case 128: attend_chunk(128, G, q, k, v, n, out); break;
    case 256: attend_chunk(256, G, q, k, v, n, out); break;
    default: attend_chunk(E, G, q, k, v, n, out);
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
            total += w * p[G * E + G + g];
            for (long i = 0; i < E; i++) sum[i] += w * p[g * E + i];
        }
        for (long i = 0; i < E; i++) out[g * E + i] = down(sum[i] / total);
    }
}

static long first_seen(const Attention *a, Row row) {
    long end = row.slot + 1;
    return a->window && end > a->window ? end - a->window : 0;
}

/* Bias, norms, rotation, storing, attention: (rows, qkv) -> (rows, heads * head_dim).
 * turns is (rows, head_dim): cosine and sine of each pair. scratch holds rows * heads * head_dim
 * floats, then rows * kv_heads * max_chunks tasks of G * (head_dim + 2). */
void attend_rows(const Attention *a, const bf16 *qkv, const float *turns, const Row *row, long rows,
                 long max_chunks, float *scratch, bf16 *out) {
    long E = a->head_dim, H = a->heads, J = a->kv_heads, G = H / J, stride = G * (E + 2);
    float *q = scratch, *part = scratch + rows * H * E;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long t = 0; t < rows; t++)
            prepare(a, qkv + t * (H + 2 * J) * E, turns + t * E, row[t], q + t * H * E);
#pragma omp for schedule(static, 1)
        for (long task = 0; task < rows * max_chunks * J; task++) {
            long t = task / (max_chunks * J), c = task / J % max_chunks, j = task % J;
            long start = first_seen(a, row[t]) + c * CHUNK, end = row[t].slot + 1;
            if (start >= end) continue;
            if (end > start + CHUNK) end = start + CHUNK;
            const bf16 *k = row[t].cache + (j * row[t].capacity + start) * E;
            attend_sized(E, G, q + (t * H + j * G) * E, k, k + J * row[t].capacity * E,
                         end - start, part + ((t * J + j) * max_chunks + c) * stride);
        }
#pragma omp for schedule(static)
        for (long tj = 0; tj < rows * J; tj++) {
            long t = tj / J, j = tj % J;
            long chunks = (row[t].slot - first_seen(a, row[t])) / CHUNK + 1;
            combine(G, E, part + tj * max_chunks * stride, chunks, stride,
                    a->sinks ? a->sinks + j * G : 0, out + (t * H + j * G) * E);
        }
    }
}
