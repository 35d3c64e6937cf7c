/* Products with weights in groups of 32 that share a scale: w = scale * (code - offset).
 *
 * bf16 inputs meet codes as bf16 numbers where the processor has products of those. Else, with AVX-512 VNNI,
 * the input is taken as 16-bit integers, one scale a group, split into a high and a low byte, so that products and
 * sums within a group are exact integers; groups are then summed in fp32 in a fixed order. Other processors multiply
 * the 16 bits as they are. A row's bits depend on nothing but the row.
 * Blocks of 64 weights: two groups, A then B.
 */
#include "numbers.h"

typedef _Float16 half;
enum { GROUP = 32, BLOCK = 64, LANES = 16, MAX_ROWS = 8 };

#ifdef __AVX512VNNI__
/* One input row: high and low bytes; for every 4 weights, -offset times their inputs and the scale of
 * their group. In scratch these are width bytes each. */
typedef struct {
    int8_t *high, *low;
    int32_t *start;
    float *scale;
} Row;

typedef char *Input; /* row after row */

static Row row_at(Input input, long row, long width) {
    char *p = input + row * width * 4;
    Row x = {(int8_t *)p, (int8_t *)p + width, (int32_t *)(p + 2 * width), (float *)(p + 3 * width)};
    return x;
}

static Input input_at(char *scratch, long first, long rows, long width) {
    (void)rows;
    return scratch + first * width * 4;
}

static void take(const Matrix *m, const float *x, long row, long rows, Input input) {
    (void)rows;
    Row out = row_at(input, row, m->width);
    for (long g = 0; g < m->width / GROUP; g++, x += GROUP) {
        float top = 0;
        for (long i = 0; i < GROUP; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        float inverse = top > 0 ? 32000.0f / top : 0;
        for (long i = 0; i < GROUP; i++) {
            int32_t v = (int32_t)lrintf(x[i] * inverse), h = (v + 128) >> 8;
            out.high[g * GROUP + i] = (int8_t)h;
            out.low[g * GROUP + i] = (int8_t)(v - 256 * h);
        }
        for (long l = 0; l < GROUP / 4; l++) {
            int32_t sum = 0;
            for (long i = g * GROUP + 4 * l; i < g * GROUP + 4 * l + 4; i++)
                sum += 256 * out.high[i] + out.low[i];
            out.start[g * GROUP / 4 + l] = -(1 << (m->bits - 1)) * sum;
            out.scale[g * GROUP / 4 + l] = top / 32000.0f;
        }
    }
}

static inline __attribute__((always_inline)) __m512i codes_of(const Matrix *m, long bits, long at) {
    if (bits == 8) return _mm512_loadu_si512(m->codes + at);
    __m256i packed = _mm256_loadu_si256((const void *)(m->codes + at / 2)), low = _mm256_set1_epi8(15);
    __m256i a = _mm256_and_si256(packed, low);
    __m256i b = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
    __m512i z = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    if (bits == 4) return z;
    uint64_t fifth;
    memcpy(&fifth, m->high + at / 8, 8);
    return _mm512_mask_add_epi8(z, fifth, z, _mm512_set1_epi8(16));
}

static inline __attribute__((always_inline)) void
dot(const Matrix *m, long bits, long n, Input input, long count, float *out) {
    __m512 sum[MAX_ROWS];
    Row x[MAX_ROWS];
    for (long t = 0; t < count; t++) {
        sum[t] = _mm512_setzero_ps();
        x[t] = row_at(input, t, m->width);
    }
    const half *scale = (const half *)m->scale + n * (m->width / GROUP);
    const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    for (long k = 0; k < m->width; k += BLOCK) {
        __m512i w = codes_of(m, bits, n * m->width + k);
        _mm_prefetch((const char *)(m->codes + (n * m->width + k) * (bits == 8 ? 8 : 4) / 8 + 2048),
                     _MM_HINT_T0);
        uint32_t pair;
        memcpy(&pair, scale + k / GROUP, 4);
        __m512 d = _mm512_permutexvar_ps(
            lanes, _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128((int)pair))));
        for (long t = 0; t < count; t++) {
            __m512i v = _mm512_setzero_si512();
            v = _mm512_dpbusd_epi32(v, w, _mm512_loadu_si512(x[t].high + k));
            v = _mm512_add_epi32(_mm512_slli_epi32(v, 8), _mm512_loadu_si512(x[t].start + k / 4));
            v = _mm512_dpbusd_epi32(v, w, _mm512_loadu_si512(x[t].low + k));
            __m512 s = _mm512_mul_ps(d, _mm512_loadu_ps(x[t].scale + k / 4));
            sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), s, sum[t]);
        }
    }
    for (long t = 0; t < count; t++) {
        float lane[LANES];
        _mm512_storeu_ps(lane, sum[t]);
        out[t] = 0;
        for (long l = 0; l < LANES; l++) out[t] += lane[l];
    }
}
#else
/* Up to MAX_ROWS input rows as integers. Of each group, what an integer is worth in each row, then each row's integers:
 * in scratch 2.125 * width bytes a row. */
typedef struct {
    float *scale; /* (width / GROUP, rows) */
    int16_t *x;   /* (width / GROUP, rows, GROUP) */
} Input;

static Input input_at(char *scratch, long first, long rows, long width) {
    char *p = scratch + first * width * 4;
    Input x = {(float *)p, (int16_t *)(p + rows * (width / GROUP) * sizeof(float))};
    return x;
}

static void take(const Matrix *m, const float *x, long row, long rows, Input out) {
    for (long g = 0; g < m->width / GROUP; g++)
        out.scale[g * rows + row] = integers32(x + g * GROUP, WHOLE, out.x + (g * rows + row) * GROUP);
}

typedef uint8_t u32 __attribute__((vector_size(32)));

/* 16 where a code's fifth bit is set. */
static inline u32 fifths(const uint8_t *high) {
#ifdef __AVX2__
    int32_t bits;
    memcpy(&bits, high, 4);
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), bit);
    return (u32)_mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(16));
#elif defined(__aarch64__)
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)), sixteen = vdupq_n_u8(16);
    const uint8x16_t a = vcombine_u8(vdup_n_u8(high[0]), vdup_n_u8(high[1]));
    const uint8x16_t b = vcombine_u8(vdup_n_u8(high[2]), vdup_n_u8(high[3]));
    return (u32)joined((uint32x4_t)(vtstq_u8(a, bit) & sixteen), (uint32x4_t)(vtstq_u8(b, bit) & sixteen));
#else
    u32 out;
    for (long i = 0; i < GROUP; i++) out[i] = (high[i / 8] >> (i % 8) & 1) << 4;
    return out;
#endif
}

/* Sixteen of a group's bytes, signed, as integers of 16 bits. */
static inline v16 widened(u32 bytes, long half) {
#ifdef __AVX2__
    __m256i all = (__m256i)bytes;
    return (v16)_mm256_cvtepi8_epi16(half ? _mm256_extracti128_si256(all, 1) : _mm256_castsi256_si128(all));
#elif defined(__aarch64__)
    int8x16_t halves[2];
    memcpy(halves, &bytes, sizeof halves);
    return (v16)joined((uint32x4_t)vmovl_s8(vget_low_s8(halves[half])), (uint32x4_t)vmovl_high_s8(halves[half]));
#else
    v16 out;
    for (long i = 0; i < 16; i++) out[i] = (int8_t)bytes[16 * half + i];
    return out;
#endif
}

/* The block of 64 codes that begins at `at`, less their offset. */
static inline __attribute__((always_inline)) void codes_of(const Matrix *m, long bits, unsigned long at, v16 *out) {
    u32 a, b;
    if (bits == 8) {
        memcpy(&a, m->codes + at, sizeof a);
        memcpy(&b, m->codes + at + GROUP, sizeof b);
    } else {
        memcpy(&a, m->codes + at / 2, sizeof a);
        b = a >> 4;
        a &= 15;
        if (bits == 5) {
            a |= fifths(m->high + at / 8);
            b |= fifths(m->high + at / 8 + 4);
        }
    }
    a -= (uint8_t)(1 << (bits - 1));
    b -= (uint8_t)(1 << (bits - 1));
    for (long i = 0; i < 4; i++) out[i] = widened(i < 2 ? a : b, i % 2);
}

/* Scales as floats, each once for all rows. */
static inline void scales_of(const half *scale, long groups, float *out) {
    long g = 0;
#ifdef __F16C__
    for (; g + 8 <= groups; g += 8) _mm256_storeu_ps(out + g, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(scale + g))));
#endif
    for (; g < groups; g++) out[g] = (float)scale[g];
}

/* Of weights and inputs together, MAX_ROWS apart; what follows a group's own is of no use. */
static inline __attribute__((always_inline)) void
scales_for(const Matrix *m, long n, const float *scale, const long count, float *out) {
    const long groups = m->width / GROUP;
    float own[groups];
    scales_of((const half *)m->scale + n * groups, groups, own);
    for (long g = 0; g < groups; g++) {
        v8 both = load8(scale + g * count) * own[g];
        memcpy(out + g * MAX_ROWS, &both, sizeof both);
    }
}

static inline __attribute__((always_inline)) void
dot(const Matrix *m, const long bits, long n, Input x, const long count, float *out) {
    const long groups = m->width / GROUP;
    v8 sum[MAX_ROWS];
    float scale[groups * MAX_ROWS];
    scales_for(m, n, x.scale, count, scale);
    for (long t = 0; t < count; t++) sum[t] = (v8){0};
    for (long g = 0; g < groups; g += 2) {
        v16 w[4];
        codes_of(m, bits, n * m->width + g * GROUP, w);
        for (long i = 0; i < 2; i++)
            for (long t = 0; t < count; t++) {
                const int16_t *in = x.x + ((g + i) * count + t) * GROUP;
                v8i both = dot16(w[2 * i], load16(in)) + dot16(w[2 * i + 1], load16(in + 16));
                sum[t] = mul_add8(floats8(both), all8(scale[(g + i) * MAX_ROWS + t]), sum[t]);
            }
    }
    for (long t = 0; t < count; t++) out[t] = sum8(sum[t]);
}
#endif

static void dot_sized(const Matrix *m, long n, Input x, long count, float *out) {
#define CALL4(size) dot(m, 4, n, x, size, out)
#define CALL5(size) dot(m, 5, n, x, size, out)
#define CALL8(size) dot(m, 8, n, x, size, out)
    if (m->bits == 4) FOR_1_TO_8(count, CALL4)
    else if (m->bits == 5) FOR_1_TO_8(count, CALL5)
    else FOR_1_TO_8(count, CALL8)
#undef CALL4
#undef CALL5
#undef CALL8
}

#ifdef __AVX512BF16__
/* Codes as bf16 numbers, exact, meet x in pairs; a group is one register wide, so its sum meets its scale at
 * once. Weights are decoded once for all rows. For bf16 inputs alone; integers serve fp32 ones. */
static inline __attribute__((always_inline)) void
numbers_of(const Matrix *m, long bits, long at, __m512i table, __m512bh *w) {
    if (bits == 8) {
        __m512 part[4];
        for (long i = 0; i < 4; i++) {
            __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(m->codes + at + 16 * i)));
            part[i] = _mm512_cvtepi32_ps(_mm512_sub_epi32(c, _mm512_set1_epi32(128)));
        }
        w[0] = _mm512_cvtne2ps_pbh(part[1], part[0]);
        w[1] = _mm512_cvtne2ps_pbh(part[3], part[2]);
        return;
    }
    __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(m->codes + at / 2)));
    __m512i a = both, b = _mm512_srli_epi16(both, 4);
    if (bits == 5) {
        uint64_t fifth;
        memcpy(&fifth, m->high + at / 8, 8);
        const __m512i top = _mm512_set1_epi16(16);
        a = _mm512_and_si512(a, _mm512_set1_epi16(15));
        a = _mm512_mask_add_epi16(a, (__mmask32)fifth, a, top);
        b = _mm512_mask_add_epi16(b, (__mmask32)(fifth >> 32), b, top);
    }
    w[0] = (__m512bh)_mm512_permutexvar_epi16(a, table);
    w[1] = (__m512bh)_mm512_permutexvar_epi16(b, table);
}

static inline __m512i table_of(long bits) {
    bf16 table[32];
    for (long i = 0; i < 32; i++) table[i] = down((float)(bits == 5 ? i - 16 : i % 16 - 8));
    return _mm512_loadu_si512(table);
}

/* A row's scales as floats: at each group one is then an operand in memory, where converting and spreading it took
 * as many instructions as its 32 products. */
static inline void scales_of(const half *scale, long groups, float *out) {
    for (long g = 0; g < groups; g += LANES) {
        __mmask16 some = groups - g < LANES ? (__mmask16)((1u << (groups - g)) - 1) : 0xFFFF;
        __m512 d = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scale + g));
        _mm512_mask_storeu_ps(out + g, some, d);
    }
}

static inline __attribute__((always_inline)) void
dot_numbers(const Matrix *m, const long bits, long n, const bf16 *x, const long count,
            const __m512i table, float *out) {
    __m512 sum[MAX_ROWS][2]; /* of even and odd groups: two chains of additions, not one */
    for (long t = 0; t < count; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    float scale[m->width / GROUP];
    scales_of((const half *)m->scale + n * (m->width / GROUP), m->width / GROUP, scale);
    for (long k = 0; k < m->width; k += BLOCK) {
        __m512bh w[2];
        numbers_of(m, bits, n * m->width + k, table, w);
        _mm_prefetch((const char *)(m->codes + (n * m->width + k) * (bits == 8 ? 8 : 4) / 8 + 2048),
                     _MM_HINT_T0);
        for (long g = 0; g < 2; g++) {
            __m512 d = _mm512_set1_ps(scale[k / GROUP + g]);
            for (long t = 0; t < count; t++) {
                __m512 v = _mm512_dpbf16_ps(_mm512_setzero_ps(), w[g],
                                            (__m512bh)_mm512_loadu_si512(x + t * m->width + k + g * GROUP));
                sum[t][g] = _mm512_fmadd_ps(v, d, sum[t][g]);
            }
        }
    }
    for (long t = 0; t < count; t++) out[t] = _mm512_reduce_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]));
}

static void numbers_sized(const Matrix *m, long n, const bf16 *x, long count, const __m512i table, float *out) {
#define CALL4(size) dot_numbers(m, 4, n, x, size, table, out)
#define CALL5(size) dot_numbers(m, 5, n, x, size, table, out)
#define CALL8(size) dot_numbers(m, 8, n, x, size, table, out)
    if (m->bits == 4) FOR_1_TO_8(count, CALL4)
    else if (m->bits == 5) FOR_1_TO_8(count, CALL5)
    else FOR_1_TO_8(count, CALL8)
#undef CALL4
#undef CALL5
#undef CALL8
}

static void numbers_linear(const Matrix *m, const bf16 *x, bf16 *y, long count) {
    long K = m->width, N = m->rows;
    const __m512i table = table_of(m->bits);
#pragma omp parallel for schedule(static) num_threads(threads_for(count * K * N))
    for (long n = 0; n < N; n++)
        for (long first = 0; first < count; first += MAX_ROWS) {
            long some = count - first < MAX_ROWS ? count - first : MAX_ROWS;
            float out[MAX_ROWS];
            numbers_sized(m, n, x + first * K, some, table, out);
            for (long t = 0; t < some; t++) y[(first + t) * N + n] = down(out[t]);
        }
}
#endif

/* At most PASS rows, from row `from` on. */
static void
taken_linear(const Matrix *m, const void *x, void *y, long from, long count, int wide, char *scratch) {
    long K = m->width, N = m->rows;
#pragma omp parallel num_threads(threads_for(count * K * N))
    {
#pragma omp for schedule(static)
        for (long t = 0; t < count; t++) {
            float row[K];
            for (long i = 0; i < K; i++)
                row[i] = wide ? ((const float *)x)[(from + t) * K + i] : up(((const bf16 *)x)[(from + t) * K + i]);
            long first = t - t % MAX_ROWS, some = count - first < MAX_ROWS ? count - first : MAX_ROWS;
            take(m, row, t - first, some, input_at(scratch, first, some, K));
        }
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++)
            for (long first = 0; first < count; first += MAX_ROWS) {
                long some = count - first < MAX_ROWS ? count - first : MAX_ROWS;
                float out[MAX_ROWS];
                dot_sized(m, n, input_at(scratch, first, some, K), some, out);
                for (long t = 0; t < some; t++) {
                    long at = (from + first + t) * N + n;
                    if (wide) ((float *)y)[at] = out[t];
                    else ((bf16 *)y)[at] = down(out[t]);
                }
            }
    }
}

/* y = x @ w.T for `count` rows. x and y are bf16, or fp32 where `wide` is set. scratch holds
 * min(count, PASS) * 4 * width bytes. */
void group_linear(const Matrix *m, const void *x, void *y, long count, int wide, char *scratch) {
#ifdef __AVX512BF16__
    if (!wide) {
        numbers_linear(m, x, y, count);
        return;
    }
#endif
    for (long from = 0; from < count; from += PASS)
        taken_linear(m, x, y, from, count - from < PASS ? count - from : PASS, wide, scratch);
}


#ifdef __AVX512VNNI__
static inline __attribute__((always_inline)) void
decode_row(const Matrix *m, long bits, long n, bf16 *out) {
    const half *scale = (const half *)m->scale + n * (m->width / GROUP);
    const __m512i offset = _mm512_set1_epi8((char)(1 << (bits - 1)));
    for (long k = 0; k < m->width; k += BLOCK) {
        __m512i z = _mm512_sub_epi8(codes_of(m, bits, n * m->width + k), offset);
        __m512 a = _mm512_set1_ps((float)scale[k / GROUP]), b = _mm512_set1_ps((float)scale[k / GROUP + 1]);
#define QUARTER(i) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(z, i)))
        store_bf16(out + k, _mm512_mul_ps(QUARTER(0), a));
        store_bf16(out + k + 16, _mm512_mul_ps(QUARTER(1), a));
        store_bf16(out + k + 32, _mm512_mul_ps(QUARTER(2), b));
        store_bf16(out + k + 48, _mm512_mul_ps(QUARTER(3), b));
#undef QUARTER
    }
}
#else
static inline __attribute__((always_inline)) void
decode_row(const Matrix *m, long bits, long n, bf16 *out) {
    const half *scale = (const half *)m->scale + n * (m->width / GROUP);
    for (long k = 0; k < m->width; k += BLOCK) {
        v16 codes[4];
        codes_of(m, bits, n * m->width + k, codes);
        for (long i = 0; i < BLOCK; i++) out[k + i] = down(codes[i / 16][i % 16] * (float)scale[(k + i) / GROUP]);
    }
}
#endif

/* out (rows, width) bf16: every weight as a number. */
void group_decode(const Matrix *m, bf16 *out) {
#pragma omp parallel for schedule(static) num_threads(threads_for(m->rows * m->width))
    for (long n = 0; n < m->rows; n++) {
        bf16 *row = out + n * m->width;
        if (m->bits == 4) decode_row(m, 4, n, row);
        else if (m->bits == 5) decode_row(m, 5, n, row);
        else decode_row(m, 8, n, row);
    }
}

#ifdef __AVX512VNNI__
/* 32 codes of one input, half of a block's rows each way. */
static inline void tile_input(const uint8_t *p, const float *step, const float *zero, bf16 *out) {
    const __m512i nibble = _mm512_set1_epi32(15), eight = _mm512_set1_epi32(8);
    for (long r = 0; r < GROUP; r += LANES) {
        __m512i two = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(p + r)));
        __m512 low = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(two, nibble), eight));
        __m512 high = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(two, 4), eight));
        store_bf16(out + r, _mm512_fmadd_ps(low, _mm512_loadu_ps(step + r), _mm512_loadu_ps(zero + r)));
        store_bf16(out + r + GROUP, _mm512_fmadd_ps(high, _mm512_loadu_ps(step + r + GROUP),
                                                    _mm512_loadu_ps(zero + r + GROUP)));
    }
}
#else
static inline void tile_input(const uint8_t *p, const float *step, const float *zero, bf16 *out) {
    for (long r = 0; r < GROUP; r++) {
        out[r] = down((float)((p[r] & 15) - 8) * step[r] + zero[r]);
        out[r + GROUP] = down((float)((p[r] >> 4) - 8) * step[r + GROUP] + zero[r + GROUP]);
    }
}
#endif

/* The int4 layout of kernels/layouts.py: blocks of 64 rows, for each input 32 bytes whose low nibbles are
 * rows 0-31 and high nibbles rows 32-63. scales is (width / 32, rows, 2) bf16: step and zero.
 * out is (width, count) bf16: rows first to first + count, multiples of 64. */
void tile_decode(const uint8_t *packed, const bf16 *scales, bf16 *out, long rows, long width, long first,
                 long count) {
#pragma omp parallel for schedule(static) num_threads(threads_for(count * width))
    for (long block = 0; block < count / BLOCK; block++) {
        const uint8_t *p = packed + (first / BLOCK + block) * width * GROUP;
        for (long g = 0; g < width / GROUP; g++) {
            float step[BLOCK], zero[BLOCK];
            const bf16 *s = scales + (g * rows + first + block * BLOCK) * 2;
            for (long r = 0; r < BLOCK; r++) {
                step[r] = up(s[2 * r]);
                zero[r] = up(s[2 * r + 1]);
            }
            for (long k = g * GROUP; k < (g + 1) * GROUP; k++, p += GROUP)
                tile_input(p, step, zero, out + k * count + block * BLOCK);
        }
    }
}
