/* Products with palettes: w = unit * step * level (* outer) (+ low), as kernels/palettes.py lays them out.
 *
 * Inputs are taken as integers of 16 bits, one scale for each 32 of them. Levels are bytes, of which `offset` is taken
 * later, so that none is negative. A chunk's sum of products is an exact integer (of a chunk: 32 inputs, or 16 where
 * groups are as small); it meets the step of its group and the inputs' scale in fp32, in a fixed order. Lanes are rows
 * of the matrix, so nothing is summed across lanes, and a step is loaded for sixteen rows at once. What is done for a
 * row of x does not depend on how many others there are, so neither do its bits.
 */
#include "numbers.h"

typedef _Float16 half;
enum { TILE = 16, BLOCK = 256, TAKEN = 32, FP16 = 0, HALF_FLOAT = 1, FP32 = 2, INT8 = 3, UINT8 = 4, ZERO = 5 };

/* Of steps and lows: (tiles, groups, 16); of blocks: (tiles, width / 256, 16), fp16. */
struct Palette {
    long group;
    long step_kind, low_kind;
    const void *step;
    const half *block; /* where steps are whole numbers */
    const void *low;   /* or null; ZERO: UINT8, less than the level in steps */
    const half *low_block;
    const float *outer;    /* (tiles, 16), or null */
    const uint8_t *levels; /* (1 << bits) less `offset`, for every tile; or signed, of each tile's own, `stride` apart;
                              null: codes are levels */
    long stride, offset;
    float unit;
};

static inline long groups_of(const Matrix *m) { return m->width / m->palette->group; }
static inline long chunk_of(const Matrix *m) { return m->palette->group < TAKEN ? TILE : TAKEN; }

/* Groups whose steps share a float. */
static inline long run_of(const Matrix *m) {
    return m->palette->block ? BLOCK / m->palette->group : groups_of(m);
}

/* A row of x: high and low bytes of its integers where there are products of bytes, else the integers; of each chunk
 * what the offset brings, and the sum of its inputs; of each 32 inputs what an integer is worth. */
typedef struct {
    int8_t *high, *low;
    int16_t *whole;
    int32_t *start;
    float *sum, *scale;
} Row;

enum { ROW_BYTES = 4 }; /* for each input of a row, at most: two of them integers */

static inline Row row_at(char *scratch, long row, const Matrix *m) {
    const long K = m->width, chunks = K / chunk_of(m);
    char *p = scratch + row * K * ROW_BYTES;
    Row x = {(int8_t *)p, (int8_t *)p + K, (int16_t *)p, (int32_t *)(p + 2 * K), (float *)(p + 2 * K) + chunks,
             (float *)(p + 2 * K) + 2 * chunks};
    return x;
}

/* Where a row's products go, or its inputs lie: bf16, or fp32. */
static inline char *number_at(const void *x, long i, int wide) { return (char *)x + i * (wide ? 4 : 2); }

/* 32 inputs of a row, from k on. */
static void take(const Matrix *m, const void *x, int wide, long k, Row row) {
    const long chunk = chunk_of(m);
    float taken[TAKEN];
    int16_t whole[TAKEN];
    for (long i = 0; i < TAKEN; i++) taken[i] = wide ? ((const float *)x)[k + i] : up(((const bf16 *)x)[k + i]);
#ifdef __AVX512VNNI__
    const float scale = integers32(taken, IN_BYTES, whole);
#else
    const float scale = integers32(taken, WHOLE, whole);
#endif
    row.scale[k / TAKEN] = scale;
    for (long c = 0; c < TAKEN; c += chunk) {
        int32_t sum = 0;
        for (long i = c; i < c + chunk; i++) sum += whole[i];
        row.start[(k + c) / chunk] = -(int32_t)m->palette->offset * sum;
        row.sum[(k + c) / chunk] = (float)sum * scale;
    }
#ifdef __AVX512VNNI__
    for (long i = 0; i < TAKEN; i++) {
        const int32_t high = (whole[i] + 128) >> 8;
        row.high[k + i] = (int8_t)high;
        row.low[k + i] = (int8_t)(whole[i] - 256 * high);
    }
#else
    memcpy(row.whole + k, whole, sizeof whole);
#endif
}

#ifdef __AVX512VNNI__
enum { MAX_ROWS = 8 };

static inline __m512 floats16(const void *p, long kind, long at) {
    switch (kind) {
    case FP16: return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const half *)p + at)));
    case HALF_FLOAT:
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const bf16 *)p + at))), 16));
    case FP32: return _mm512_loadu_ps((const float *)p + at);
    case INT8: return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)((const int8_t *)p + at))));
    default: return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)((const uint8_t *)p + at))));
    }
}

static inline void floats_of(const void *p, long kind, long at, float *out) {
    _mm512_storeu_ps(out, floats16(p, kind, at));
}

/* Sixteen levels a register, in each of its quarters. */
typedef struct {
    __m512i quarters[4];
} Table;

static inline __attribute__((always_inline)) Table table_of(const Matrix *m, const long bits, long tile) {
    Table t = {{_mm512_setzero_si512()}};
    const uint8_t *levels = m->palette->levels;
    for (long i = 0; i < (bits > 4 ? 1 << (bits - 4) : 1) && levels; i++) {
        __m128i some = _mm_setzero_si128();
        const uint8_t *p = levels + tile * m->palette->stride + 16 * i;
        if (bits >= 4) some = _mm_loadu_si128((const void *)p);
        else memcpy(&some, p, bits == 3 ? 8 : 4);
        if (m->palette->stride) some = _mm_xor_si128(some, _mm_set1_epi8((char)128));
        t.quarters[i] = _mm512_broadcast_i32x4(some);
    }
    return t;
}

/* The levels of inputs 4j to 4j + 3 of 16 that lie at p: of row r in bytes 4r to 4r + 3. */
static inline __attribute__((always_inline)) __m512i
levels_at(const uint8_t *p, const long bits, const long j, const int coded, const Table *table) {
    const __m512i fifteen = _mm512_set1_epi8(15), three = _mm512_set1_epi8(3);
    __m512i code;
    if (bits == 8) return _mm512_loadu_si512(p + 64 * j);
    if (bits < 4) {
        code = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 2 * j), three);
    } else {
        code = _mm512_loadu_si512(p + j / 2 * 64);
        code = _mm512_and_si512(j & 1 ? _mm512_srli_epi16(code, 4) : code, fifteen);
    }
    if (bits == 3 || bits == 5) {
        uint64_t high;
        memcpy(&high, p + (bits == 3 ? 64 : 128) + 8 * j, 8);
        code = _mm512_mask_add_epi8(code, high, code, _mm512_set1_epi8(bits == 3 ? 4 : 16));
    }
    if (bits == 6) {
        __m512i two = _mm512_loadu_si512(p + 128);
        two = j < 2 ? _mm512_slli_epi16(two, 4 - 2 * j) : _mm512_srli_epi16(two, 2 * j - 4);
        code = _mm512_or_si512(code, _mm512_and_si512(two, _mm512_set1_epi8(48)));
    }
    if (!coded) return code;
    __m512i out = _mm512_shuffle_epi8(table->quarters[0], code);
    for (long i = 1; bits > 4 && i < 1 << (bits - 4); i++) {
        const __m512i own = _mm512_and_si512(code, _mm512_set1_epi8(48));
        out = _mm512_mask_shuffle_epi8(out, _mm512_cmpeq_epi8_mask(own, _mm512_set1_epi8((char)(16 * i))),
                                       table->quarters[i], code);
    }
    return out;
}

/* One tile's products with up to `count` rows of x, the first of which is number `row`, the last number `last`. */
static inline __attribute__((always_inline)) void
tile_rows(const Matrix *m, const long bits, const int coded, long tile, char *scratch, long row, long last,
          const long count, char *y, int wide) {
    const struct Palette *pal = m->palette;
    const long width = m->width, group = pal->group, groups = groups_of(m), run = run_of(m), chunk = chunk_of(m);
    const uint8_t *p = m->codes + tile * 2 * bits * width;
    const Table table = table_of(m, bits, tile);
    const __m512 one = _mm512_set1_ps(1);
    Row x[MAX_ROWS];
    __m512 total[MAX_ROWS], part[MAX_ROWS], low[MAX_ROWS];
    for (long t = 0; t < count; t++) {
        x[t] = row_at(scratch, row + t < last ? row + t : last, m);
        total[t] = _mm512_setzero_ps();
    }
    for (long first = 0; first < groups; first += run) {
        for (long t = 0; t < count; t++) part[t] = low[t] = _mm512_setzero_ps();
        for (long k = first * group; k < (first + run) * group; k += chunk) {
            __m512i high[MAX_ROWS], sum[MAX_ROWS];
            for (long t = 0; t < count; t++) {
                high[t] = _mm512_setzero_si512();
                sum[t] = _mm512_set1_epi32(x[t].start[k / chunk]);
            }
            for (long at = k; at < k + chunk; at += TILE, p += 32 * bits) {
                for (long i = 0; i < 32 * bits; i += 64) _mm_prefetch((const char *)(p + 1536 + i), _MM_HINT_T0);
#pragma GCC unroll 4
                for (long j = 0; j < 4; j++) {
                    const __m512i w = levels_at(p, bits, j, coded, &table);
                    for (long t = 0; t < count; t++) {
                        int32_t four[2];
                        memcpy(four, x[t].high + at + 4 * j, 4);
                        memcpy(four + 1, x[t].low + at + 4 * j, 4);
                        high[t] = _mm512_dpbusd_epi32(high[t], w, _mm512_set1_epi32(four[0]));
                        sum[t] = _mm512_dpbusd_epi32(sum[t], w, _mm512_set1_epi32(four[1]));
                    }
                }
            }
            const long at = (tile * groups + k / group) * TILE;
            const __m512 step = floats16(pal->step, pal->step_kind, at);
            for (long t = 0; t < count; t++) {
                const __m512 v = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[t], _mm512_slli_epi32(high[t], 8)));
                part[t] = _mm512_fmadd_ps(v, _mm512_mul_ps(step, _mm512_set1_ps(x[t].scale[k / TAKEN])), part[t]);
            }
            if (!pal->low) continue;
            __m512 lows = floats16(pal->low, pal->low_kind, at);
            if (pal->low_kind == ZERO) lows = _mm512_fnmadd_ps(lows, step, _mm512_setzero_ps());
            for (long t = 0; t < count; t++)
                low[t] = _mm512_fmadd_ps(lows, _mm512_set1_ps(x[t].sum[k / chunk]), low[t]);
        }
        const long at = (tile * (groups / run) + first / run) * TILE;
        const __m512 block = pal->block ? floats16(pal->block, FP16, at) : one;
        for (long t = 0; t < count; t++) total[t] = _mm512_fmadd_ps(part[t], block, total[t]);
        if (!pal->low) continue;
        const __m512 low_block = pal->low_block ? floats16(pal->low_block, FP16, at) : one;
        for (long t = 0; t < count; t++) total[t] = _mm512_fmadd_ps(low[t], low_block, total[t]);
    }
    __m512 all = _mm512_set1_ps(pal->unit);
    if (pal->outer) all = _mm512_mul_ps(all, floats16(pal->outer, FP32, tile * TILE));
    for (long t = 0; t < count && row + t <= last; t++) {
        void *out = number_at(y, t * m->rows, wide);
        const __m512 product = _mm512_mul_ps(total[t], all);
        if (wide) _mm512_storeu_ps(out, product);
        else store_bf16(out, product);
    }
}

/* Two times sixteen numbers, rounded to bf16: those of a in the lower half. */
static inline __attribute__((always_inline)) __m512i two_bf16(__m512 a, __m512 b, const int fast) {
#ifdef __AVX512BF16__
    if (fast) return (__m512i)_mm512_cvtne2ps_pbh(b, a);
#endif
    const __m512i one = _mm512_set1_epi32(1), half_less = _mm512_set1_epi32(0x7FFF);
    const __m512i places = _mm512_set_epi32(
        0x3F003D, 0x3B0039, 0x370035, 0x330031, 0x2F002D, 0x2B0029, 0x270025, 0x230021, 0x1F001D, 0x1B0019, 0x170015,
        0x130011, 0x0F000D, 0x0B0009, 0x070005, 0x030001);
    __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    x = _mm512_add_epi32(_mm512_add_epi32(x, half_less), _mm512_and_si512(_mm512_srli_epi32(x, 16), one));
    y = _mm512_add_epi32(_mm512_add_epi32(y, half_less), _mm512_and_si512(_mm512_srli_epi32(y, 16), one));
    return _mm512_permutex2var_epi16(x, places, y);
}

/* Does the processor's own rounding, which takes tiny numbers for zeros, give the same of any level * s + l? Where
 * neither is tiny, nor is a sum of them, unless it is zero: all are multiples of 2^-123. */
static inline int none_is_tiny(__m512 s, __m512 l) {
#ifdef __AVX512BF16__
    const __m512 least = _mm512_set1_ps(0x1p-100f), most = _mm512_set1_ps(0x1p100f), zero = _mm512_setzero_ps();
    __mmask16 fine = 0xFFFF;
    for (int i = 0; i < 2; i++) {
        const __m512 x = _mm512_abs_ps(i ? l : s);
        const __mmask16 large = _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, most, _CMP_LE_OQ);
        fine &= large | _mm512_cmp_ps_mask(x, zero, _CMP_EQ_OQ);
    }
    return fine == 0xFFFF;
#else
    (void)s, (void)l;
    return 0;
#endif
}

static inline __attribute__((always_inline)) void
decode_as(const Matrix *m, const long bits, const int coded, long tile, const uint8_t *p, __m512 s, __m512 l,
          bf16 *out, long stride, const int fast) {
    const Table table = table_of(m, bits, tile);
    const __m512i offset = _mm512_set1_epi8((char)m->palette->offset);
    for (long k = 0; k < m->palette->group; k += TILE, p += 32 * bits)
#pragma GCC unroll 4
        for (long j = 0; j < 4; j++, out += 4 * stride) {
            const __m512i w = _mm512_sub_epi8(levels_at(p, bits, j, coded, &table), offset);
            __m512 x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512i level = _mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * i), 24);
                x[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(level), s, l);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
                const __m512i two = two_bf16(x[i], x[i + 1], fast);
                _mm256_storeu_si256((void *)(out + i * stride), _mm512_castsi512_si256(two));
                _mm256_storeu_si256((void *)(out + (i + 1) * stride), _mm512_extracti64x4_epi64(two, 1));
            }
        }
}

/* One group of a tile, from input k on, as numbers: input after input, `stride` apart, sixteen rows each. */
static inline __attribute__((always_inline)) void
decode_group(const Matrix *m, const long bits, const int coded, long tile, const uint8_t *p, const float *step,
             const float *low, bf16 *out, long stride) {
    const __m512 s = _mm512_loadu_ps(step), l = _mm512_loadu_ps(low);
    if (none_is_tiny(s, l)) decode_as(m, bits, coded, tile, p, s, l, out, stride, 1);
    else decode_as(m, bits, coded, tile, p, s, l, out, stride, 0);
}
#else
enum { MAX_ROWS = 4 };

static inline void floats_of(const void *p, long kind, long at, float *out) {
#ifdef __F16C__
    if (kind == FP16) {
        const half *x = (const half *)p + at;
        _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const void *)x)));
        _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(x + 8))));
        return;
    }
#endif
    switch (kind) {
    case FP16:
        for (long r = 0; r < TILE; r++) out[r] = (float)((const half *)p)[at + r];
        break;
    case HALF_FLOAT:
        for (long r = 0; r < TILE; r++) out[r] = up(((const bf16 *)p)[at + r]);
        break;
    case FP32: memcpy(out, (const float *)p + at, TILE * sizeof *out); break;
    case INT8:
        for (long r = 0; r < TILE; r++) out[r] = ((const int8_t *)p)[at + r];
        break;
    default:
        for (long r = 0; r < TILE; r++) out[r] = ((const uint8_t *)p)[at + r];
    }
}

#ifdef __aarch64__
typedef uint8x16_t Levels; /* of an input: a byte a row */

static inline __attribute__((always_inline)) uint8x16_t
look_up(const uint8_t *table, const long bits, uint8x16_t code) {
    const uint8x16x4_t t = {{vld1q_u8(table), vld1q_u8(table + 16), vld1q_u8(table + 32), vld1q_u8(table + 48)}};
    const uint8x16x2_t half = {{t.val[0], t.val[1]}};
    return bits == 6 ? vqtbl4q_u8(t, code) : bits == 5 ? vqtbl2q_u8(half, code) : vqtbl1q_u8(t.val[0], code);
}

/* The levels of inputs 4j to 4j + 3 of 16 that lie at p. */
static inline __attribute__((always_inline)) void
levels_at(const uint8_t *p, const long bits, const long j, const uint8_t *table, Levels *out) {
    const uint8x16x4_t low = vld4q_u8(bits < 4 ? p : bits == 8 ? p + 64 * j : p + j / 2 * 64);
    const uint8x16x4_t top = bits == 6 ? vld4q_u8(p + 128) : low;
    uint8x16_t high = vdupq_n_u8(0);
    if (bits == 3 || bits == 5) { /* a row's four bits are half a byte */
        const uint8x8_t eight = vld1_u8(p + (bits == 3 ? 64 : 128) + 8 * j);
        high = vcombine_u8(vzip1_u8(eight, eight), vzip2_u8(eight, eight));
    }
    for (long i = 0; i < 4; i++) {
        uint8x16_t code = low.val[i];
        if (bits < 8) code = bits < 4 ? code >> 2 * j & 3 : code >> 4 * (j & 1) & 15;
        if (bits == 3 || bits == 5) {
            const uint8x16_t bit = vreinterpretq_u8_u16(vdupq_n_u16((uint16_t)(0x1001 << i)));
            code |= vtstq_u8(high, bit) & vdupq_n_u8(bits == 3 ? 4 : 16);
        }
        if (bits == 6) code |= (top.val[i] >> 2 * j & 3) << 4;
        out[i] = table ? look_up(table, bits, code) : code;
    }
}

/* The same as bytes: of four inputs, sixteen rows. */
static inline __attribute__((always_inline)) void
level_bytes(const uint8_t *p, const long bits, const long j, const uint8_t *table, uint8_t (*out)[TILE]) {
    Levels w[4];
    levels_at(p, bits, j, table, w);
    memcpy(out, w, sizeof w);
}

/* The levels of a chunk of inputs. */
static inline __attribute__((always_inline)) void
levels_of(const uint8_t *p, const long bits, const uint8_t *table, const long chunk, Levels *out) {
    for (long at = 0; at < chunk; at += TILE, p += 32 * bits)
        for (long j = 0; j < 4; j++, out += 4) levels_at(p, bits, j, table, out);
}

/* Adds what a chunk of inputs, from k on, brings the tile's sixteen rows. */
static inline __attribute__((always_inline)) void
add_chunk(const Matrix *m, const Levels *w, const Row *x, long k, const float *step, const float *lows, const long count,
          float (*part)[TILE], float (*low)[TILE]) {
    const long chunk = chunk_of(m);
    int32x4_t acc[MAX_ROWS][4];
    for (long t = 0; t < count; t++)
        for (long q = 0; q < 4; q++) acc[t][q] = vdupq_n_s32(x[t].start[k / chunk]);
    for (long at = k; at < k + chunk; at += 4, w += 4) {
#define INPUT(i)                                                                                         \
    do {                                                                                                 \
        const int16x8_t a = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w[i])));                          \
        const int16x8_t b = vreinterpretq_s16_u16(vmovl_high_u8(w[i]));                                  \
        for (long t = 0; t < count; t++) {                                                               \
            const int16x4_t four = vld1_s16(x[t].whole + at);                                            \
            acc[t][0] = vmlal_lane_s16(acc[t][0], vget_low_s16(a), four, i);                             \
            acc[t][1] = vmlal_high_lane_s16(acc[t][1], a, four, i);                                      \
            acc[t][2] = vmlal_lane_s16(acc[t][2], vget_low_s16(b), four, i);                             \
            acc[t][3] = vmlal_high_lane_s16(acc[t][3], b, four, i);                                      \
        }                                                                                                \
    } while (0)
        INPUT(0);
        INPUT(1);
        INPUT(2);
        INPUT(3);
#undef INPUT
    }
    for (long t = 0; t < count; t++)
        for (long q = 0; q < 4; q++) {
            float *out = part[t] + 4 * q;
            const float32x4_t steps = vmulq_n_f32(vld1q_f32(step + 4 * q), x[t].scale[k / TAKEN]);
            vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vcvtq_f32_s32(acc[t][q]), steps));
            if (!lows) continue;
            out = low[t] + 4 * q;
            vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), vld1q_f32(lows + 4 * q), x[t].sum[k / chunk]));
        }
}
#else
typedef uint8_t u32 __attribute__((vector_size(32)));
typedef v16 Levels; /* two inputs of eight rows */

/* Each byte's entry of a table of 16, or 0 from 128 on. */
static inline u32 look_up16(const uint8_t *table, u32 code) {
#ifdef __AVX2__
    return (u32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), (__m256i)code);
#else
    u32 out;
    for (long i = 0; i < 32; i++) out[i] = code[i] < 128 ? table[code[i] & 15] : 0;
    return out;
#endif
}

/* Which bits of the 32 at p are set, as `value`. */
static inline u32 bits32(const uint8_t *p, uint8_t value) {
    u32 out, one;
    for (long i = 0; i < 32; i++) one[i] = (uint8_t)(1 << (i & 7));
#ifdef __AVX2__
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    out = (u32)_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
#else
    for (long i = 0; i < 32; i++) out[i] = p[i / 8];
#endif
    return (u32)((out & one) == one) & value;
}

static inline u32 load32(const uint8_t *p) {
    u32 out;
    memcpy(&out, p, sizeof out);
    return out;
}

/* The levels of inputs 4j to 4j + 3 of 16 that lie at p, of rows 8 * eight and the seven after: four bytes a row. */
static inline __attribute__((always_inline)) u32
levels_at(const uint8_t *p, const long bits, const long j, const long eight, const uint8_t *table) {
    u32 code;
    if (bits == 8) return load32(p + 64 * j + 32 * eight);
    if (bits < 4) code = load32(p + 32 * eight) >> 2 * j & 3;
    else code = load32(p + j / 2 * 64 + 32 * eight) >> 4 * (j & 1) & 15;
    if (bits == 3) code |= bits32(p + 64 + 8 * j + 4 * eight, 4);
    if (bits == 5) code |= bits32(p + 128 + 8 * j + 4 * eight, 16);
    if (bits == 6) code |= (load32(p + 128 + 32 * eight) >> 2 * j & 3) << 4;
    if (!table) return code;
    u32 out = look_up16(table, code & 15);
    for (long i = 1; bits > 4 && i < 1 << (bits - 4); i++) {
        const u32 own = (u32)(code >> 4 == (uint8_t)i);
        out = (out & ~own) | (look_up16(table + 16 * i, code & 15) & own);
    }
    return out;
}

/* The same as bytes: of four inputs, sixteen rows. */
static inline __attribute__((always_inline)) void
level_bytes(const uint8_t *p, const long bits, const long j, const uint8_t *table, uint8_t (*out)[TILE]) {
    for (long q = 0; q < 2; q++) {
        const u32 bytes = levels_at(p, bits, j, q, table);
        for (long i = 0; i < 32; i++) out[i % 4][8 * q + i / 4] = bytes[i];
    }
}

/* Of each four bytes the first two or the last two, as integers of 16 bits. */
static inline v16 widened(u32 bytes, const long last) {
#ifdef __AVX2__
    const __m128i pairs = last ? _mm_set_epi8(-1, 15, -1, 14, -1, 11, -1, 10, -1, 7, -1, 6, -1, 3, -1, 2)
                               : _mm_set_epi8(-1, 13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0);
    return (v16)_mm256_shuffle_epi8((__m256i)bytes, _mm256_broadcastsi128_si256(pairs));
#else
    v16 out;
    for (long i = 0; i < 16; i++) out[i] = bytes[i / 2 * 4 + 2 * last + i % 2];
    return out;
#endif
}

/* The levels of a chunk, as they meet two inputs: for each 4 of these, rows 0 to 7 and 8 to 15, two times two. */
static inline __attribute__((always_inline)) void
levels_of(const uint8_t *p, const long bits, const uint8_t *table, const long chunk, Levels *out) {
    for (long at = 0; at < chunk; at += TILE, p += 32 * bits)
        for (long j = 0; j < 4; j++)
            for (long q = 0; q < 2; q++, out += 2) {
                const u32 bytes = levels_at(p, bits, j, q, table);
                out[0] = widened(bytes, 0);
                out[1] = widened(bytes, 1);
            }
}

/* Adds what a chunk of inputs, from k on, brings the tile's sixteen rows. */
static inline __attribute__((always_inline)) void
add_chunk(const Matrix *m, const Levels *w, const Row *x, long k, const float *step, const float *lows, const long count,
          float (*part)[TILE], float (*low)[TILE]) {
    const long chunk = chunk_of(m);
    v8i acc[MAX_ROWS][2];
    for (long t = 0; t < count; t++) acc[t][0] = acc[t][1] = (v8i){0} + x[t].start[k / chunk];
    for (long at = k; at < k + chunk; at += 4, w += 4)
        for (long i = 0; i < 2; i++)
            for (long t = 0; t < count; t++) {
                int32_t two;
                memcpy(&two, x[t].whole + at + 2 * i, sizeof two);
                const v16 v = (v16)((v8i){0} + two);
                acc[t][0] += dot16(w[i], v);
                acc[t][1] += dot16(w[2 + i], v);
            }
    for (long t = 0; t < count; t++)
        for (long q = 0; q < 2; q++) {
            float *out = part[t] + 8 * q;
            v8 sum = mul_add8(floats8(acc[t][q]), load8(step + 8 * q) * x[t].scale[k / TAKEN], load8(out));
            memcpy(out, &sum, sizeof sum);
            if (!lows) continue;
            out = low[t] + 8 * q;
            sum = mul_add8(load8(lows + 8 * q), all8(x[t].sum[k / chunk]), load8(out));
            memcpy(out, &sum, sizeof sum);
        }
}
#endif

/* A tile's levels, with room for sixteen; null where codes are levels. */
static inline const uint8_t *table_of(const Matrix *m, const long bits, long tile, uint8_t *room) {
    if (!m->palette->levels) return 0;
    memcpy(room, m->palette->levels + tile * m->palette->stride, (size_t)1 << bits);
    for (long i = 0; i < 1 << bits && m->palette->stride; i++) room[i] ^= 128;
    return room;
}

/* One tile's products with `count` rows of x, up to PASS. */
static inline __attribute__((always_inline)) void
tile_rows(const Matrix *m, const long bits, const int coded, long tile, char *scratch, long count, char *y,
          int wide) {
    const struct Palette *pal = m->palette;
    const long group = pal->group, groups = groups_of(m), run = run_of(m), chunk = chunk_of(m);
    const uint8_t *p = m->codes + tile * 2 * bits * m->width;
    uint8_t room[64] = {0};
    const uint8_t *table = coded ? table_of(m, bits, tile, room) : 0;
    Row x[PASS];
    float total[PASS][TILE], part[PASS][TILE], low[PASS][TILE], step[TILE], lows[TILE], block[TILE], low_block[TILE];
    for (long t = 0; t < count; t++) x[t] = row_at(scratch, t, m);
    for (long r = 0; r < TILE; r++) block[r] = low_block[r] = 1;
    memset(total, 0, count * sizeof *total);
    for (long first = 0; first < groups; first += run) {
        memset(part, 0, count * sizeof *part);
        memset(low, 0, count * sizeof *low);
        for (long k = first * group; k < (first + run) * group; k += chunk, p += 2 * bits * chunk) {
            const long at = (tile * groups + k / group) * TILE;
            Levels w[TAKEN];
            levels_of(p, bits, table, chunk, w);
            floats_of(pal->step, pal->step_kind, at, step);
            if (pal->low) floats_of(pal->low, pal->low_kind, at, lows);
            for (long r = 0; r < TILE && pal->low_kind == ZERO; r++) lows[r] = -lows[r] * step[r];
            for (long t = 0; t < count; t += MAX_ROWS) {
#define CALL(n) add_chunk(m, w, x + t, k, step, pal->low ? lows : 0, n, part + t, low + t)
                switch (count - t) {
                case 1: CALL(1); break;
                case 2: CALL(2); break;
                case 3: CALL(3); break;
                default: CALL(4);
                }
#undef CALL
            }
        }
        const long at = (tile * (groups / run) + first / run) * TILE;
        if (pal->block) floats_of(pal->block, FP16, at, block);
        if (pal->low_block) floats_of(pal->low_block, FP16, at, low_block);
        for (long t = 0; t < count; t++)
            for (long r = 0; r < TILE; r += 8) {
                v8 sum = mul_add8(load8(part[t] + r), load8(block + r), load8(total[t] + r));
                sum = mul_add8(load8(low[t] + r), load8(low_block + r), sum);
                memcpy(total[t] + r, &sum, sizeof sum);
            }
    }
    for (long t = 0; t < count; t++)
        for (long r = 0; r < TILE; r++) {
            float all = pal->unit * (pal->outer ? pal->outer[tile * TILE + r] : 1);
            void *out = number_at(y, t * m->rows + r, wide);
            if (wide) *(float *)out = total[t][r] * all;
            else *(bf16 *)out = down(total[t][r] * all);
        }
}

static inline __attribute__((always_inline)) void
decode_group(const Matrix *m, const long bits, const int coded, long tile, const uint8_t *p, const float *step,
             const float *low, bf16 *out, long stride) {
    uint8_t room[64] = {0};
    const uint8_t *table = coded ? table_of(m, bits, tile, room) : 0;
    for (long k = 0; k < m->palette->group; k += TILE, p += 32 * bits)
        for (long j = 0; j < 4; j++) {
            uint8_t level[4][TILE];
            level_bytes(p, bits, j, table, level);
            for (long i = 0; i < 4; i++, out += stride)
                for (long r = 0; r < TILE; r++)
                    out[r] = down(mul_add((float)(level[i][r] - (int)m->palette->offset), step[r], low[r]));
        }
}
#endif

#ifdef __AVX512VNNI__
/* A constant for each number of rows would take a compiler half a minute: of 3, 5 and 7 one is computed twice. */
static inline __attribute__((always_inline)) void
sized(const Matrix *m, const long bits, const int coded, long tile, char *scratch, long row, long count, char *y,
      int wide) {
    const long last = row + count - 1;
#define ROWS(n) tile_rows(m, bits, coded, tile, scratch, row, last, n, y, wide)
    if (count == 1) ROWS(1);
    else if (count == 2) ROWS(2);
    else if (count <= 4) ROWS(4);
    else if (count <= 6) ROWS(6);
    else ROWS(8);
#undef ROWS
}
#endif

/* CALL(bits, coded) with constants: are codes looked up? Those of up to 4 bits always are. */
#define FOR_PALETTE(m, CALL)                                                                             \
    switch ((m)->bits * 2 + ((m)->palette->levels != 0)) {                                               \
    case 5: CALL(2, 1); break;                                                                           \
    case 7: CALL(3, 1); break;                                                                           \
    case 9: CALL(4, 1); break;                                                                           \
    case 10: CALL(5, 0); break;                                                                          \
    case 11: CALL(5, 1); break;                                                                          \
    case 12: CALL(6, 0); break;                                                                          \
    case 13: CALL(6, 1); break;                                                                          \
    case 16: CALL(8, 0); break;                                                                          \
    }

/* A tile's products with `count` rows of x, already taken. */
static void linear_rows(const Matrix *m, long tile, char *scratch, long count, char *y, int wide) {
#ifdef __AVX512VNNI__
    const long passes = (count + MAX_ROWS - 1) / MAX_ROWS;
    for (long i = 0; i < passes; i++) {
        const long first = count * i / passes, few = count * (i + 1) / passes - first;
#define CALL(bits, coded) sized(m, bits, coded, tile, scratch, first, few, number_at(y, first * m->rows, wide), wide)
        FOR_PALETTE(m, CALL)
#undef CALL
    }
#else
#define CALL(bits, coded) tile_rows(m, bits, coded, tile, scratch, count, y, wide)
    FOR_PALETTE(m, CALL)
#undef CALL
#endif
}

/* y = x @ w.T for `count` rows of x: bf16, or fp32 where `wide` is set. scratch holds 4 * width bytes for each of
 * min(count, PASS) of them. */
void palette_linear(const Matrix *m, const void *x, void *y, long count, int wide, char *scratch) {
    const long K = m->width, N = m->rows;
    for (long from = 0; from < count; from += PASS) {
        const long some = count - from < PASS ? count - from : PASS;
#pragma omp parallel num_threads(threads_for(some * N * K))
        {
#pragma omp for schedule(static)
            for (long g = 0; g < some * (K / TAKEN); g++) {
                const long row = g / (K / TAKEN);
                take(m, number_at(x, (from + row) * K, wide), wide, g % (K / TAKEN) * TAKEN, row_at(scratch, row, m));
            }
#pragma omp for schedule(static)
            for (long tile = 0; tile < N / TILE; tile++)
                linear_rows(m, tile, scratch, some, number_at(y, from * N + tile * TILE, wide), wide);
        }
    }
}

/* A group of a tile's inputs. */
static void decode_some(const Matrix *m, long tile, long g, bf16 *out, long stride) {
    const struct Palette *pal = m->palette;
    const long groups = groups_of(m), run = run_of(m);
    const long at = (tile * groups + g) * TILE, of_block = (tile * (groups / run) + g / run) * TILE;
    const uint8_t *p = m->codes + (tile * groups + g) * 2 * m->bits * pal->group;
    float step[TILE], low[TILE], block[TILE], low_block[TILE];
    for (long r = 0; r < TILE; r++) low[r] = 0, block[r] = low_block[r] = 1;
    floats_of(pal->step, pal->step_kind, at, step);
    if (pal->block) floats_of(pal->block, FP16, of_block, block);
    if (pal->low) floats_of(pal->low, pal->low_kind, at, low);
    if (pal->low_block) floats_of(pal->low_block, FP16, of_block, low_block);
    for (long r = 0; r < TILE; r++) {
        low[r] = pal->low_kind == ZERO ? -low[r] * step[r] : low[r] * low_block[r];
        step[r] *= block[r] * pal->unit * (pal->outer ? pal->outer[tile * TILE + r] : 1);
    }
#define CALL(bits, coded) decode_group(m, bits, coded, tile, p, step, low, out, stride)
    FOR_PALETTE(m, CALL)
#undef CALL
}

/* out (width, count) bf16: rows first to first + count, multiples of 16, as numbers. */
void palette_decode(const Matrix *m, bf16 *out, long first, long count) {
    const long tiles = count / TILE, group = m->palette->group;
    enum { BESIDE = 4 }; /* tiles whose numbers lie beside one another: 128 bytes, written before they leave the cache */
#pragma omp parallel for schedule(static) num_threads(threads_for(count * m->width))
    for (long tile = 0; tile < tiles; tile += BESIDE)
        for (long g = 0; g < groups_of(m); g++)
            for (long t = tile; t < tile + BESIDE && t < tiles; t++)
                decode_some(m, first / TILE + t, g, out + g * group * count + t * TILE, count);
}
