/* Products with int4 weights in the layout of encoding/int4.py: blocks of 64 rows, for each input 32 bytes
 * whose low nibbles are rows 0-31 and high nibbles rows 32-63; w = step * (code - 8) + zero in groups of 32.
 *
 * Codes become bf16 numbers by a table in a register (exact), two inputs of a row are multiplied and added
 * at a time, and a group's sum meets its step and zero once. The decoded codes serve up to six rows of x. What
 * is done for a row does not depend on how many others there are, so neither do its bits. Needs AVX-512 BF16.
 */
#include "numbers.h"

enum { GROUP = 32, BLOCK = 64, MAX_ROWS = 6 };

int tile_supported(void) {
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
#endif

/* y = x @ w.T, all bf16, for `count` rows of x. rows, a multiple of 64, are outputs; scales is
 * (width / 32, rows, 2): step and zero. scratch holds count * width / 32 floats. */
void tile_linear(const uint8_t *packed, const bf16 *scales, const bf16 *x, bf16 *y, long rows, long width,
                 long count, float *scratch) {
#ifdef __AVX512BF16__
    long groups = width / GROUP;
    for (long g = 0; g < count * groups; g++) {
        float sum = 0;
        for (long i = 0; i < GROUP; i++) sum += up(x[g * GROUP + i]);
        scratch[g] = sum;
    }
#pragma omp parallel for schedule(static)
    for (long b = 0; b < rows / BLOCK; b++)
        for (long first = 0; first < count; first += MAX_ROWS) {
            long some = count - first < MAX_ROWS ? count - first : MAX_ROWS;
            block_sized(packed + b * width * GROUP, scales + 2 * b * BLOCK, 2 * rows, width,
                        x + first * width, scratch + first * groups, some, y + first * rows + b * BLOCK,
                        rows);
        }
#endif
}
