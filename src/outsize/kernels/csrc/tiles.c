/* Products with int4 weights in the layout of kernels/layouts.py: blocks of 64 rows, for each input 32 bytes
 * whose low nibbles are rows 0-31 and high nibbles rows 32-63; w = step * (code - 8) + zero in groups of 32.
 *
 * Where the processor has products of bf16, codes become such numbers by a table in a register (exact) and two
 * inputs of a row are multiplied and added at a time; elsewhere inputs become integers of 16 bits, one scale a
 * group, and a group's sum is exact. It meets its step and zero once. The decoded codes serve up to six rows of x.
 * What is done for a row does not depend on how many others there are, so neither do its bits.
 */
#include "numbers.h"

enum { GROUP = 32, BLOCK = 64, MAX_ROWS = 6 };

/* Are products of bf16 faster than those of floats? */
int bf16_products(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
/* bf16 of i - 8, twice over: an index's fifth bit, which belongs to the other nibble, changes nothing. */
static inline __m512i numbers(void) {
    static const bf16 table[16] = {0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80,
                                   0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
    __m256i half = _mm256_loadu_si256((const void *)table);
    return _mm512_broadcast_i64x4(half);
}

/* One block of 64 outputs for `count` rows. `sums` are each row's sums of its groups' inputs. Lanes hold
 * outputs in the order 0-7, 16-23, 8-15, 24-31, and so on plus 32: what unpacking bytes leaves. */
static inline __attribute__((always_inline)) void
block(const uint8_t *p, const bf16 *scales, long stride, long width, const bf16 *x, const float *sums,
      const long count, bf16 *out, long out_stride) {
    const __m512i table = numbers();
    __m512 total[MAX_ROWS][4];
    for (long t = 0; t < count; t++)
        for (long q = 0; q < 4; q++) total[t][q] = _mm512_setzero_ps();
    const long groups = width / GROUP;
    for (long g = 0; g < groups; g++, scales += stride) {
        __m512 acc[MAX_ROWS][4];
        for (long t = 0; t < count; t++)
            for (long q = 0; q < 4; q++) acc[t][q] = _mm512_setzero_ps();
        for (long k = 0; k < GROUP; k += 2, p += 64) {
            __m256i a = _mm256_loadu_si256((const void *)p);
            __m256i b = _mm256_loadu_si256((const void *)(p + 32));
            _mm_prefetch((const char *)(p + 1536), _MM_HINT_T0);
            __m512i lo = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(a, b));
            __m512i hi = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(a, b));
            __m512bh w[4] = {
                (__m512bh)_mm512_permutexvar_epi16(lo, table),
                (__m512bh)_mm512_permutexvar_epi16(hi, table),
                (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(lo, 4), table),
                (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(hi, 4), table)};
            for (long t = 0; t < count; t++) {
                int32_t pair;
                memcpy(&pair, x + t * width + g * GROUP + k, 4);
                __m512bh v = (__m512bh)_mm512_set1_epi32(pair);
                for (long q = 0; q < 4; q++) acc[t][q] = _mm512_dpbf16_ps(acc[t][q], w[q], v);
            }
        }
        for (long q = 0; q < 4; q++) {
            const bf16 *s = scales + 2 * (q / 2 * 32 + q % 2 * 8);
            __m512i pairs = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_loadu_si256((const void *)s)),
                _mm256_loadu_si256((const void *)(s + 32)), 1);
            __m512 step = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
            for (long t = 0; t < count; t++) {
                total[t][q] = _mm512_fmadd_ps(acc[t][q], step, total[t][q]);
                total[t][q] = _mm512_fmadd_ps(_mm512_set1_ps(sums[t * groups + g]), zero, total[t][q]);
            }
        }
    }
    for (long t = 0; t < count; t++)
        for (long q = 0; q < 4; q++) {
            __m256i y = (__m256i)_mm512_cvtneps_pbh(total[t][q]);
            bf16 *o = out + t * out_stride + q / 2 * 32 + q % 2 * 8;
            _mm_storeu_si128((void *)o, _mm256_castsi256_si128(y));
            _mm_storeu_si128((void *)(o + 16), _mm256_extracti128_si256(y, 1));
        }
}

static void block_sized(const uint8_t *p, const bf16 *scales, long stride, long width, const bf16 *x,
                        const float *sums, long count, bf16 *out, long out_stride) {
#define CALL(size) block(p, scales, stride, width, x, sums, size, out, out_stride)
    FOR_1_TO_6(count, CALL)
#undef CALL
}
#else
typedef struct {
    long rows, width;
    const int16_t *x;          /* (rows, width) */
    const float *scale, *sums; /* of each group: (rows, width / GROUP) */
} Inputs;

/* Codes of two inputs, side by side, for eight outputs: low or high nibbles of the bytes at p and at p + 32. */
static inline v16 code_pairs(const uint8_t *p, long high) {
#ifdef __aarch64__
    uint8x16_t both = vcombine_u8(vld1_u8(p), vld1_u8(p + 32));
    both = high ? both >> 4 : both & 15;
    both = vzip1q_u8(both, vextq_u8(both, both, 8));
    return (v16)joined((uint32x4_t)vmovl_u8(vget_low_u8(both)), (uint32x4_t)vmovl_high_u8(both));
#else
    v8i both = bytes8(p) | bytes8(p + 32) << 16;
    return (v16)((high ? both >> 4 : both) & 0x000F000F);
#endif
}

/* Adds to `total` what 32 inputs, from g * GROUP on, bring 16 * eights outputs of `count` rows. The weights lie as
 * codes at p, or decoded at `pairs`, 64 pairs for two inputs. */
static inline __attribute__((always_inline)) void
slice(const uint8_t *p, const int16_t *pairs, const bf16 *scales, Inputs in, long g, long first, long lane,
      const long count, const long eights, float (*total)[BLOCK]) {
    v8i acc[MAX_ROWS][2 * 4];
    for (long t = 0; t < count; t++)
        for (long q = 0; q < 2 * eights; q++) acc[t][q] = (v8i){0};
    const int16_t *x = in.x + first * in.width + g * GROUP;
    for (long k = 0; k < GROUP; k += 2) {
        v16 w[2 * 4];
        for (long q = 0; q < 2 * eights; q++) {
            long at = lane + q / 2 * 8;
            w[q] = pairs ? load16(pairs + k * BLOCK + 2 * (q % 2 * 32 + at)) : code_pairs(p + k * 32 + at, q % 2);
        }
        for (long t = 0; t < count; t++) {
            int32_t two;
            memcpy(&two, x + t * in.width + k, sizeof two);
            v16 v = (v16)repeated(two);
            for (long q = 0; q < 2 * eights; q++) acc[t][q] += dot16(w[q], v);
        }
    }
    for (long q = 0; q < 2 * eights; q++) {
        long at = q % 2 * 32 + lane + q / 2 * 8;
        v8 step, low;
        pairs8(scales + 2 * at, &step, &low);
        low -= 8 * step;
        for (long t = 0; t < count; t++) {
            long group = (first + t) * (in.width / GROUP) + g;
            float *out = total[t] + at;
            v8 sum = mul_add8(floats8(acc[t][q]), step * in.scale[group], load8(out));
            sum = mul_add8(low, all8(in.sums[group]), sum);
            memcpy(out, &sum, sizeof sum);
        }
    }
}

/* All 64 outputs: few rows in wide slices, many in narrow ones, so that sums stay in registers. */
static inline __attribute__((always_inline)) void
slices(const uint8_t *p, const int16_t *pairs, const bf16 *scales, Inputs in, long g, long first,
       const long count, float (*total)[BLOCK]) {
    const long eights = count == 1 ? 4 : count <= 3 ? 2 : 1;
    for (long lane = 0; lane < 32; lane += 8 * eights)
        slice(p, pairs, scales, in, g, first, lane, count, eights, total);
}

static void block(const uint8_t *p, const bf16 *scales, long stride, Inputs in, bf16 *out, long out_stride) {
    float total[PASS][BLOCK];
    int16_t pairs[GROUP * BLOCK];
    memset(total, 0, in.rows * sizeof *total);
    for (long g = 0; g < in.width / GROUP; g++, p += GROUP * 32, scales += stride) {
        for (long k = 0; k < GROUP && in.rows > MAX_ROWS; k += 2)
            for (long q = 0; q < 8; q++) {
                v16 w = code_pairs(p + k * 32 + q % 4 * 8, q / 4);
                memcpy(pairs + k * BLOCK + q * 16, &w, sizeof w);
            }
        for (long first = 0; first < in.rows; first += MAX_ROWS) {
            long some = in.rows - first < MAX_ROWS ? in.rows - first : MAX_ROWS;
#define CALL(size) slices(p, 0, scales, in, g, first, size, total + first)
#define CALL_PAIRS(size) slices(p, pairs, scales, in, g, first, size, total + first)
            if (in.rows > MAX_ROWS) FOR_1_TO_6(some, CALL_PAIRS)
            else FOR_1_TO_6(some, CALL)
#undef CALL
#undef CALL_PAIRS
        }
    }
    for (long t = 0; t < in.rows; t++)
        for (long r = 0; r < BLOCK; r++) out[t * out_stride + r] = down(total[t][r]);
}
#endif

/* Of a group of inputs, the sum. */
static inline float sum_of(const bf16 *x) {
    return sum8((ups8(x) + ups8(x + 8)) + (ups8(x + 16) + ups8(x + 24)));
}

/* y = x @ w.T, all bf16, for `count` rows of x. rows, a multiple of 64, are outputs; scales is
 * (width / 32, rows, 2): step and zero. scratch holds width / 32 floats for each of
 * min(count, PASS) rows; without products of bf16 these twice, and width / 2 more. */
void tile_linear(const uint8_t *packed, const bf16 *scales, const bf16 *x, bf16 *y, long rows, long width,
                 long count, float *scratch) {
    long groups = width / GROUP;
    for (long from = 0; from < count; from += PASS, x += PASS * width, y += PASS * rows) {
        long some = count - from < PASS ? count - from : PASS;
#ifdef __AVX512BF16__
        for (long g = 0; g < some * groups; g++) scratch[g] = sum_of(x + g * GROUP);
        /* Passes are of even sizes, and shared among threads like blocks, which may be as few as nine. */
        const long passes = (some + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads_for(some * rows * width))
        for (long b = 0; b < rows / BLOCK; b++)
            for (long i = 0; i < passes; i++) {
                long first = some * i / passes, few = some * (i + 1) / passes - first;
                block_sized(packed + b * width * GROUP, scales + 2 * b * BLOCK, 2 * rows, width,
                            x + first * width, scratch + first * groups, few, y + first * rows + b * BLOCK,
                            rows);
            }
#else
        float *scale = scratch + some * groups;
        int16_t *integers = (int16_t *)(scale + some * groups);
        Inputs in = {some, width, integers, scale, scratch};
#pragma omp parallel num_threads(threads_for(some * rows * width))
        {
#pragma omp for schedule(static)
            for (long g = 0; g < some * groups; g++) {
                float taken[GROUP];
                for (long i = 0; i < GROUP; i++) taken[i] = up(x[g * GROUP + i]);
                scratch[g] = sum_of(x + g * GROUP);
                scale[g] = integers32(taken, WHOLE, integers + g * GROUP);
            }
#pragma omp for schedule(static)
            for (long b = 0; b < rows / BLOCK; b++)
                block(packed + b * width * GROUP, scales + 2 * b * BLOCK, 2 * rows, in, y + b * BLOCK, rows);
        }
#endif
    }
}
