/* Row kernels: what stands between the matrix products of a step of few rows.
 *
 * Every function treats each row by itself and in a fixed order, so a row's bits do not depend on the
 * other rows nor on the number of threads. Sums are fp32. The plain twins are kernels/plain.py and
 * kernels/norm.py; tests/laws/test_native.py holds the two together.
 */
#include "numbers.h"

int most_threads = 0;

/* How many threads every kernel here uses from now on, if it has work for them. */
void set_threads(int count) { most_threads = count; }

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
        for (long i = 0; i < width; i++) h[i] = mul_add(up(y[i]) * r, weight[i], h[i]);
    }
}

/* out = act(gate) * up; each row of gate_up is gate, then up. kind 0: silu, 1: gelu (tanh). */
void gate_rows(const bf16 *gate_up, bf16 *out, long rows, long width, int kind) {
#pragma omp parallel for schedule(static) num_threads(threads_for(2 * rows * width))
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

/* out (T, D) = inner (T, F) @ codes (F, D) * scale (F): rows of eight bits, each added in turn, but for those that
 * meet a zero. So a row's sum is that of the rows it uses, whatever others are there. */
void combine_rows(const bf16 *inner, const int8_t *codes, const bf16 *scale, bf16 *out, long count, long num,
                  long width) {
    enum { SOME = 128 };
    const long blocks = (width + SOME - 1) / SOME;
#pragma omp parallel for schedule(static) num_threads(threads_for(count * num * width))
    for (long task = 0; task < count * blocks; task++) {
        const long t = task / blocks, from = task % blocks * SOME;
        const long some = width - from < SOME ? width - from : SOME;
        float sum[SOME] = {0};
        for (long i = 0; i < num; i++) {
            const float a = up(inner[t * num + i]);
            if (a == 0) continue;
            const float b = a * up(scale[i]);
            const int8_t *row = codes + i * width + from;
#pragma omp simd
            for (long d = 0; d < some; d++) sum[d] = mul_add((float)row[d], b, sum[d]);
        }
        for (long d = 0; d < some; d++) out[t * width + from + d] = down(sum[d]);
    }
}
