/* Numbers and matrices as the kernels see them. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

typedef uint16_t bf16;
enum { PASS = 48 }; /* rows of x that tiles.c and groups.c take at a time: their scratch is for so many */

extern int most_threads; /* of a kernel; 0: as many as OpenMP has (rows.c) */

/* Threads for so many multiplications: where they take few microseconds, waking others takes longer. */
static inline int threads_for(long work) {
#ifdef _OPENMP
    return work < 1 << 16 ? 1 : most_threads ? most_threads : omp_get_max_threads();
#else
    (void)work;
    return 1;
#endif
}

typedef struct {
    long bits;            /* groups of 4, 5 or 8 bits (groups.c); 0: int4 tiles (tiles.c); of a palette's codes */
    long rows, width;     /* outputs, inputs */
    const uint8_t *codes; /* 4, 5: (rows, width / 2), low nibbles group A, high ones group B; 8: bytes */
    const uint8_t *high;  /* 5: (rows, width / 8), the fifth bits; else null */
    const void *scale;    /* groups: (rows, width / 32) fp16; tiles: (width / 32, rows, 2) bf16 */
    const struct Palette *palette; /* of codes into a table (palettes.c); else null */
} Matrix;

static inline float up(bf16 x) {
    union { uint32_t i; float f; } u = {(uint32_t)x << 16};
    return u.f;
}

static inline bf16 down(float x) { /* to nearest, ties to even */
    union { float f; uint32_t i; } u = {x};
    return (bf16)((u.i + 0x7FFF + ((u.i >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__
/* As `down`, of 16 numbers. */
static inline void store_bf16(bf16 *out, __m512 x) {
    __m512i i = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
    i = _mm512_add_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(0x7FFF)), odd);
    _mm256_storeu_si256((void *)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(i, 16)));
}
#endif

/* Eight floats: one register of AVX2, two of NEON. What processors without products of bf16 compute with. */
typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
/* Sixteen integers of 16 bits: what codes and inputs meet as where there are no products of bf16. */
typedef int16_t v16 __attribute__((vector_size(32)));

#ifdef __aarch64__
/* Two registers of NEON as one. (With generic vectors alone, gcc computes a number at a time.) */
static inline v8i joined(uint32x4_t first, uint32x4_t second) {
    v8i out;
    memcpy(&out, &first, sizeof first);
    memcpy((char *)&out + sizeof first, &second, sizeof second);
    return out;
}
#endif

static inline v8 load8(const float *x) {
    v8 out;
    memcpy(&out, x, sizeof out);
    return out;
}

/* One integer, eight times. */
static inline v8i repeated(int32_t one) {
#ifdef __aarch64__
    return joined(vdupq_n_u32((uint32_t)one), vdupq_n_u32((uint32_t)one));
#else
    return (v8i){0} + one;
#endif
}

/* One float, eight times. */
static inline v8 all8(float one) {
#ifdef __aarch64__
    return (v8)joined((uint32x4_t)vdupq_n_f32(one), (uint32x4_t)vdupq_n_f32(one));
#else
    return (v8){one, one, one, one, one, one, one, one};
#endif
}

/* a * b + c, rounded once where the processor can. Said here, since a compiler may choose otherwise for one row than for
 * four, and a row's bits are to be its own. */
static inline float mul_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline v8 mul_add8(v8 a, v8 b, v8 c) {
#ifdef __FMA__
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    float32x4_t x[2], y[2], z[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    for (long i = 0; i < 2; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    return (v8)joined((uint32x4_t)z[0], (uint32x4_t)z[1]);
#else
    return a * b + c;
#endif
}

static inline v8 max8(v8 a, v8 b) {
#ifdef __AVX2__
    return (v8)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__aarch64__)
    float32x4_t x[2], y[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (long i = 0; i < 2; i++) x[i] = vmaxq_f32(x[i], y[i]);
    return (v8)joined((uint32x4_t)x[0], (uint32x4_t)x[1]);
#else
    const v8i more = a > b;
    return (v8)(((v8i)a & more) | ((v8i)b & ~more));
#endif
}

/* Bytes as integers. */
static inline v8i bytes8(const uint8_t *p) {
#ifdef __AVX2__
    return (v8i)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
#elif defined(__aarch64__)
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return joined(vmovl_u16(vget_low_u16(wide)), vmovl_high_u16(wide));
#else
    return (v8i){p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
#endif
}

/* Eight bf16 as floats. */
static inline v8 ups8(const bf16 *p) {
#ifdef __AVX2__
    return (v8)((v8i)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)) << 16);
#elif defined(__aarch64__)
    const uint16x8_t all = vld1q_u16(p);
    return (v8)joined(vshll_n_u16(vget_low_u16(all), 16), vshll_high_n_u16(all, 16));
#else
    return (v8)((v8i){p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]} << 16);
#endif
}

/* Sixteen bf16 that lie in pairs: the first of each, and the second. */
static inline void pairs8(const bf16 *p, v8 *first, v8 *second) {
    v8i both;
    memcpy(&both, p, sizeof both);
    *first = (v8)(both << 16);
    *second = (v8)(both & (int32_t)0xFFFF0000);
}

static inline v16 load16(const int16_t *x) {
    v16 out;
    memcpy(&out, x, sizeof out);
    return out;
}

/* Eight sums of two neighbours' products. */
static inline v8i dot16(v16 a, v16 b) {
#ifdef __AVX2__
    return (v8i)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
    int16x8_t x[2], y[2];
    uint32x4_t sum[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (long i = 0; i < 2; i++)
        sum[i] = (uint32x4_t)vpaddq_s32(vmull_s16(vget_low_s16(x[i]), vget_low_s16(y[i])), vmull_high_s16(x[i], y[i]));
    return joined(sum[0], sum[1]);
#else
    v8i x = (v8i)a, y = (v8i)b;
    return (x >> 16) * (y >> 16) + (x << 16 >> 16) * (y << 16 >> 16);
#endif
}

enum { WHOLE = 16384, IN_BYTES = 8192 }; /* with IN_BYTES, high bytes fit, too */

/* A group of 32 inputs as integers. The largest becomes `most` to twice that, a power of two: with 16384 all are right to
 * 2^-15 of it, and bf16 ones down to 2^-7 of it exactly. Returns what one is worth, a power of two; not a number, or
 * infinite, where an input is. */
static inline float integers32(const float *x, float most, int16_t *out) {
    union { uint32_t i; float f; } top = {0}, one;
    for (long i = 0; i < 32; i++) {
        memcpy(&one, x + i, sizeof one);
        one.i &= 0x7FFFFFFF; /* as integers, positive floats are in order */
        top.i = one.i > top.i ? one.i : top.i;
    }
    top.i &= 0x7F800000;
    float inverse = top.f > 1e-30f ? most / top.f : 0;
    for (long i = 0; i < 32; i++) {
        float v = x[i] * inverse;
        one.f = (v > 32767.0f ? 32767.0f : v) + 12582912.0f; /* 1.5 * 2^23: rounds, the integer its low bits */
        out[i] = (int16_t)one.i;
    }
    return top.f / most;
}

static inline v8 floats8(v8i x) {
#ifdef __aarch64__
    int32x4_t both[2];
    memcpy(both, &x, sizeof both);
    return (v8)joined((uint32x4_t)vcvtq_f32_s32(both[0]), (uint32x4_t)vcvtq_f32_s32(both[1]));
#else
    return __builtin_convertvector(x, v8);
#endif
}

static inline float sum8(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

/* e^x to 2e-7 relative, as a polynomial so that loops over it become vector code. */
static inline float exp_poly(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = floorf(mul_add(x, 1.44269504f, 0.5f));
    float r = mul_add(n, 2.12194440e-4f, mul_add(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = mul_add(p, r, 1.3981999507e-3f);
    p = mul_add(p, r, 8.3334519073e-3f);
    p = mul_add(p, r, 4.1665795894e-2f);
    p = mul_add(p, r, 1.6666665459e-1f);
    p = mul_add(p, r, 5.0000001201e-1f);
    union { int32_t i; float f; } two = {((int32_t)n + 127) << 23};
    return (mul_add(p * r, r, r) + 1.0f) * two.f;
}

static inline float inverse_rms(const float *x, long n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

/* CALL(n) with n a constant, where `count` is n: the compiler then keeps what n sizes in registers. */
#define FOR_1_TO_6(count, CALL)                                                                           \
    switch (count) {                                                                                     \
    case 1: CALL(1); break;                                                                              \
    case 2: CALL(2); break;                                                                              \
    case 3: CALL(3); break;                                                                              \
    case 4: CALL(4); break;                                                                              \
    case 5: CALL(5); break;                                                                              \
    case 6: CALL(6); break;                                                                              \
    }
#define FOR_1_TO_8(count, CALL)                                                                           \
    switch (count) {                                                                                     \
    case 7: CALL(7); break;                                                                              \
    case 8: CALL(8); break;                                                                              \
    default: FOR_1_TO_6(count, CALL)                                                                     \
    }
