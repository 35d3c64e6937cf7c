/* Sums between ranks: partial sums packed into few bits, unpacked and added up in order of ranks.
 *
 * A row is turned in blocks of 32, 64 or 128 numbers (an orthonormal Hadamard transform, so that no number is much
 * larger than its neighbours), and each block's numbers become whole numbers times one fp16 step. The sum is taken
 * in turned space and turned back once. The layout and the plain twin are kernels/turned.py; every operation is
 * one rounding in fp32, in the same order there, so both give the same bits (tests/laws/test_turned.py).
 */
#include "numbers.h"

typedef _Float16 half;
enum { WIDEST = 128 };
#define INLINE static inline __attribute__((always_inline))

INLINE float norm_of(const int block) {
    return block == 128 ? 0.08838834764831845f : block == 64 ? 0.125f : 0.17677669529663687f;
}

INLINE void turn(float *x, const int block) {
    for (int h = 1; h < block; h *= 2)
        for (int i = 0; i < block; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    const float norm = norm_of(block);
    for (int i = 0; i < block; i++) x[i] *= norm;
}

/* Byte j of a plane of w bits holds, lowest first, those of codes j, j + block * w / 8, ... */
INLINE void pack_codes(const uint8_t *q, uint8_t *out, const int block, const int bits) {
    if (bits == 8) {
        memcpy(out, q, block);
        return;
    }
    for (int i = 0; i < block / 2; i++) out[i] = (q[i] & 15) | (uint8_t)(q[i + block / 2] << 4);
    out += block / 2;
    for (int j = 0; bits == 5 && j < block / 8; j++) {
        uint8_t all = 0;
        for (int k = 0; k < 8; k++) all |= (uint8_t)((q[j + k * (block / 8)] >> 4) << k);
        out[j] = all;
    }
    for (int j = 0; bits == 6 && j < block / 4; j++) {
        uint8_t all = 0;
        for (int k = 0; k < 4; k++) all |= (uint8_t)((q[j + k * (block / 4)] >> 4) << 2 * k);
        out[j] = all;
    }
}

INLINE void unpack_codes(const uint8_t *in, uint8_t *q, const int block, const int bits) {
    if (bits == 8) {
        memcpy(q, in, block);
        return;
    }
    for (int i = 0; i < block / 2; i++) {
        q[i] = in[i] & 15;
        q[i + block / 2] = in[i] >> 4;
    }
    in += block / 2;
    for (int k = 0; bits == 5 && k < 8; k++)
        for (int j = 0; j < block / 8; j++) q[j + k * (block / 8)] |= (uint8_t)((in[j] >> k & 1) << 4);
    for (int k = 0; bits == 6 && k < 4; k++)
        for (int j = 0; j < block / 4; j++) q[j + k * (block / 4)] |= (uint8_t)((in[j] >> 2 * k & 3) << 4);
}

INLINE void pack_block(float *v, uint8_t *codes, half *step, const int block, const int bits) {
    const float most = (float)((1 << (bits - 1)) - 1);
    float largest = 0;
    for (int i = 0; i < block; i++) largest = fmaxf(largest, fabsf(v[i]));
    const float wanted = largest / most;
    const half s = (half)(wanted < 65504.0f ? wanted : 65504.0f);
    const float back = (float)s, inverse = back > 0 ? 1.0f / back : 0.0f;
    uint8_t q[WIDEST];
    for (int i = 0; i < block; i++) {
        const float r = rintf(v[i] * inverse);
        q[i] = (uint8_t)((int)(r > most ? most : r < -most ? -most : r) + (1 << (bits - 1)));
    }
    pack_codes(q, codes, block, bits);
    *step = s;
}

INLINE void pack_some(const void *x, uint8_t *out, long from, long to, long width, const int block,
                      const int bits, int is_fp32, int is_turned) {
    const long blocks = width / block, size = block * bits / 8, stride = blocks * (size + 2);
    for (long t = from; t < to; t++)
        for (long b = 0; b < blocks; b++) {
            float v[WIDEST];
            half step;
            const long at = t * width + b * block;
            if (is_fp32) memcpy(v, (const float *)x + at, block * sizeof(float));
            else
                for (int i = 0; i < block; i++) v[i] = up(((const bf16 *)x)[at + i]);
            if (!is_turned) turn(v, block);
            pack_block(v, out + t * stride + b * size, &step, block, bits);
            memcpy(out + t * stride + blocks * size + 2 * b, &step, 2);
        }
}

INLINE void sum_some(const uint8_t *const *in, long num, float *out, long from, long to, long width,
                     const int block, const int bits, int keep_turned) {
    const long blocks = width / block, size = block * bits / 8, stride = blocks * (size + 2);
    for (long t = from; t < to; t++)
        for (long b = 0; b < blocks; b++) {
            float v[WIDEST] = {0};
            for (long r = 0; r < num; r++) {
                uint8_t q[WIDEST];
                half step;
                const uint8_t *row = in[r] + t * stride;
                memcpy(&step, row + blocks * size + 2 * b, 2);
                unpack_codes(row + b * size, q, block, bits);
                const float s = (float)step; /* a code times it is exact */
                for (int i = 0; i < block; i++) v[i] += (float)((int)q[i] - (1 << (bits - 1))) * s;
            }
            if (!keep_turned) turn(v, block);
            memcpy(out + t * width + b * block, v, block * sizeof(float));
        }
}

enum { SOME = 8 }; /* rows that a thread takes at once */

#define WITH(block, bits, call)                                                                    \
    if (block == 128) { WITH_BITS(128, bits, call) }                                               \
    else if (block == 64) { WITH_BITS(64, bits, call) }                                            \
    else { WITH_BITS(32, bits, call) }
#define WITH_BITS(block, bits, call)                                                               \
    switch (bits) {                                                                                \
    case 4: call(block, 4); break;                                                                 \
    case 5: call(block, 5); break;                                                                 \
    case 6: call(block, 6); break;                                                                 \
    default: call(block, 8);                                                                       \
    }

/* shape: rows, width, block, bits. x: bf16 or fp32; is_turned: it is in turned space already. */
void turned_pack(const void *x, uint8_t *out, const long *shape, int is_fp32, int is_turned) {
    const long rows = shape[0], width = shape[1], block = shape[2], bits = shape[3];
#pragma omp parallel for schedule(static) num_threads(threads_for(8 * rows * width))
    for (long from = 0; from < rows; from += SOME) {
        const long to = from + SOME < rows ? from + SOME : rows;
#define CALL(a, b) pack_some(x, out, from, to, width, a, b, is_fp32, is_turned)
        WITH(block, bits, CALL)
#undef CALL
    }
}

/* out (T, D) fp32 = the sum of `num` messages in order, turned back unless keep_turned */
void turned_sum(const uint8_t *const *in, long num, float *out, const long *shape, int keep_turned) {
    const long rows = shape[0], width = shape[1], block = shape[2], bits = shape[3];
#pragma omp parallel for schedule(static) num_threads(threads_for(8 * rows * width))
    for (long from = 0; from < rows; from += SOME) {
        const long to = from + SOME < rows ? from + SOME : rows;
#define CALL(a, b) sum_some(in, num, out, from, to, width, a, b, keep_turned)
        WITH(block, bits, CALL)
#undef CALL
    }
}
