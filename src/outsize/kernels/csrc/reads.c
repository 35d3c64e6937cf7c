/* A few threads that read pieces of records, as storage/reader.py does, without Python's lock: what is waited
 * for goes before what is read ahead, and whoever ends a record last compares its checksum. Only what goes
 * well is done here; anything else is reported, and read again from Python, which knows how to complain.
 */
#include <pthread.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#endif
#include "numbers.h"
#if defined __x86_64__
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { WAITING, GOOD, FAILED, CANCELLED };

/* Looks at a record before sleeping until it is there: one or two milliseconds. To be woken takes a twentieth of
 * one, and a virtual machine's core that slept is slow at first (docs/decisions.md: 20.4 to 18.4 ms a step). */
enum { SPINS = 50000 };
enum { VECTORS = 256 }; /* buffers that one request fills */

/* A record of several that follow each other in a file, which go to buffers that need not. */
typedef struct {
    char *out;
    uint32_t crc;
    int check; /* compare with the checksum? */
} Part;

typedef struct Job {
    struct Job *after; /* in its queue */
    char *out;
    long size, offset, piece;
    long taken, left;  /* bytes given to threads; pieces not ended */
    const Part *parts; /* null: all goes to `out` */
    long each;         /* bytes of a part, of which a piece has whole ones */
    int fd, check;    /* compare with the checksum? */
    uint32_t crc;
    int bad, urgent;
    int state;
} Job;

typedef struct {
    Job *head, *tail;
} Queue;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    Queue queues[2]; /* urgent, ahead */
    int stop, count, idle;
    pthread_t threads[];
} Pool;

static void put(Pool *pool, Job *job) {
    Queue *q = &pool->queues[!job->urgent];
    job->after = 0;
    if (q->tail) q->tail->after = job;
    else q->head = job;
    q->tail = job;
}

static void unlink_job(Pool *pool, Job *job) {
    Queue *q = &pool->queues[!job->urgent];
    Job *before = 0;
    for (Job *j = q->head; j; before = j, j = j->after) {
        if (j != job) continue;
        if (before) before->after = j->after;
        else q->head = j->after;
        if (q->tail == j) q->tail = before;
        return;
    }
}

static int read_all(int fd, char *out, long size, long offset) {
    while (size > 0) {
        ssize_t got = pread(fd, out, (size_t)size, offset);
        if (got <= 0) return 0;
        out += got, offset += got, size -= got;
    }
    return 1;
}

/* Of a job in parts, `size` bytes from `at` on: as few requests as there can be. */
static int read_parts(const Job *job, long at, long size) {
    struct iovec some[VECTORS];
    while (size > 0) {
        long inside = at % job->each, left = size;
        int count = 0;
        for (const Part *part = job->parts + at / job->each; left > 0 && count < VECTORS; part++, inside = 0) {
            const long length = job->each - inside < left ? job->each - inside : left;
            some[count++] = (struct iovec){part->out + inside, (size_t)length};
            left -= length;
        }
        const ssize_t got = preadv(job->fd, some, count, job->offset + at);
        if (got <= 0) return 0;
        at += got, size -= got;
    }
    return 1;
}

static uint32_t table[8][256];

static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0xEDB88320u : c >> 1;
        table[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
        for (int i = 0; i < 256; i++) table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
}

static uint32_t crc_bytes(uint32_t c, const uint8_t *p, long n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint32_t a, b;
        memcpy(&a, p, 4), memcpy(&b, p + 4, 4), a ^= c;
        c = table[7][a & 255] ^ table[6][a >> 8 & 255] ^ table[5][a >> 16 & 255] ^ table[4][a >> 24] ^
            table[3][b & 255] ^ table[2][b >> 8 & 255] ^ table[1][b >> 16 & 255] ^ table[0][b >> 24];
    }
    for (; n > 0; n--) c = c >> 8 ^ table[0][(c ^ *p++) & 255];
    return c;
}

#ifdef __PCLMUL__
/* 64 bytes at a time, as polynomials: four registers are carried over 512 bits, then made one, then 32 bits
 * (Gopal et al., Fast CRC computation for generic polynomials, Intel 2009; the constants are powers of x). */
static inline __m128i carry(__m128i a, __m128i k, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(a, k, 0x00), high = _mm_clmulepi64_si128(a, k, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

#if defined(__VPCLMULQDQ__) && defined(__AVX512F__)
static inline __m512i carry4(__m512i a, __m512i k, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(a, k, 0x00), high = _mm512_clmulepi64_epi128(a, k, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96); /* all three xored */
}

/* As `far` below does 64 bytes at a time, 256: sixteen polynomials, over 2048 bits, and then four. Returns the bytes
 * taken. */
static long crc_wide(uint32_t c, const uint8_t *p, long n, __m128i far, __m128i *x) {
    const __m512i farther = _mm512_broadcast_i64x2(_mm_set_epi64x(0x01322d1430, 0x011542778a));
    const __m512i near = _mm512_broadcast_i64x2(far);
    const long whole = n / 256 * 256;
    __m512i z[4];
    for (long i = 0; i < 4; i++) z[i] = _mm512_loadu_si512(p + 64 * i);
    z[0] = _mm512_xor_si512(z[0], _mm512_castsi128_si512(_mm_cvtsi32_si128((int)c)));
    for (long at = 256; at < whole; at += 256)
        for (long i = 0; i < 4; i++) z[i] = carry4(z[i], farther, _mm512_loadu_si512(p + at + 64 * i));
    for (long i = 1; i < 4; i++) z[i] = carry4(z[i - 1], near, z[i]);
    _mm512_storeu_si512(x, z[3]);
    return whole;
}
#endif

static uint32_t crc_blocks(uint32_t c, const uint8_t *p, long n) {
    const __m128i far = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i near = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i last = _mm_set_epi64x(0, 0x0163cd6124);
    const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i words = _mm_setr_epi32(-1, 0, -1, 0);
    __m128i x[4];
    long taken = 64;
#if defined(__VPCLMULQDQ__) && defined(__AVX512F__)
    if (n >= 256) taken = crc_wide(c, p, n, far, x);
    else
#endif
    {
        for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)p + i);
        x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)c));
    }
    for (p += taken, n -= taken; n >= 64; p += 64, n -= 64)
        for (int i = 0; i < 4; i++) x[i] = carry(x[i], far, _mm_loadu_si128((const __m128i *)p + i));
    __m128i a = x[0];
    for (int i = 1; i < 4; i++) a = carry(a, near, x[i]);
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, near, 0x10));
    __m128i b = _mm_srli_si128(a, 4);
    a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, words), last, 0x00), b);
    b = _mm_clmulepi64_si128(_mm_and_si128(a, words), barrett, 0x10);
    b = _mm_clmulepi64_si128(_mm_and_si128(b, words), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(a, b), 1);
}
#endif

/* The checksum that zlib.crc32 gives. */
uint32_t checksum(const uint8_t *p, long n) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_table);
    uint32_t c = ~0u;
#ifdef __PCLMUL__
    if (n >= 64) {
        c = crc_blocks(c, p, n);
        p += n / 64 * 64, n %= 64;
    }
#endif
    return ~crc_bytes(c, p, n);
}

/* Is what was read what is expected, as far as it is to be compared? */
static int is_sound(const Job *job) {
    if (!job->parts) return !job->check || checksum((const uint8_t *)job->out, job->size) == job->crc;
    for (long i = 0; i < job->size / job->each; i++) {
        const Part *part = job->parts + i;
        if (part->check && checksum((const uint8_t *)part->out, job->each) != part->crc) return 0;
    }
    return 1;
}

static Job *take(Pool *pool, long *at) {
    for (int i = 0; i < 2; i++) {
        Job *job = pool->queues[i].head;
        if (!job) continue;
        *at = job->taken;
        job->taken += job->piece;
        if (job->taken >= job->size) unlink_job(pool, job);
        return job;
    }
    return 0;
}

/* Who asks for short turns is let in as soon as its read is over, not when those who compute have had all of theirs
 * (Linux from 6.12 on; nothing changes elsewhere). Meanwhile the disk would have nothing to do. */
static void short_turns(void) {
#ifdef SYS_sched_setattr
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t slice, deadline, period; /* ns */
    } wish = {.size = sizeof wish, .policy = SCHED_OTHER, .nice = getpriority(PRIO_PROCESS, 0), .slice = 100000};
    if (sched_getscheduler(0) == SCHED_OTHER) syscall(SYS_sched_setattr, 0, &wish, 0);
#endif
}

static void *work(void *argument) {
    Pool *pool = argument;
    short_turns();
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        long at;
        Job *job = take(pool, &at);
        if (!job) {
            if (pool->stop) break;
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        long size = job->size - at < job->piece ? job->size - at : job->piece;
        int good = job->parts ? read_parts(job, at, size)
                              : read_all(job->fd, job->out + at, size, job->offset + at);
        pthread_mutex_lock(&pool->lock);
        if (!good) job->bad = 1;
        if (--job->left > 0) continue;
        if (job->check && !job->bad) {
            pthread_mutex_unlock(&pool->lock);
            int same = is_sound(job);
            pthread_mutex_lock(&pool->lock);
            job->bad = !same;
        }
        __atomic_store_n(&job->state, job->bad ? FAILED : GOOD, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return 0;
}

/* Null if there is no memory or no thread to be had. */
Pool *reads_open(int count) {
    Pool *pool = calloc(1, sizeof *pool + (size_t)count * sizeof(pthread_t));
    if (!pool) return 0;
    pthread_mutex_init(&pool->lock, 0);
    pthread_cond_init(&pool->work, 0);
    pthread_cond_init(&pool->done, 0);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 256 << 10);
    while (pool->count < count && !pthread_create(&pool->threads[pool->count], &small, work, pool))
        pool->count++;
    pthread_attr_destroy(&small);
    if (pool->count) return pool;
    free(pool);
    return 0;
}

/* Ends what is queued, then the threads. */
void reads_close(Pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stop = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->count; i++) pthread_join(pool->threads[i], 0);
    free(pool);
}

/* The job must stay where it is until it is over. */
void reads_submit(Pool *pool, Job *job) {
    pthread_mutex_lock(&pool->lock);
    put(pool, job);
    long wake = job->left < pool->idle ? job->left : pool->idle;
    pthread_mutex_unlock(&pool->lock);
    /* With the lock held, who wakes would sleep again until it is free. */
    for (; wake > 0; wake--) pthread_cond_signal(&pool->work);
}

void reads_promote(Pool *pool, Job *job) {
    pthread_mutex_lock(&pool->lock);
    if (!job->urgent && job->taken < job->size && job->state == WAITING) {
        unlink_job(pool, job);
        job->urgent = 1;
        put(pool, job);
    }
    pthread_mutex_unlock(&pool->lock);
}

/* 1 if nobody had begun it: then it is over. */
int reads_cancel(Pool *pool, Job *job) {
    pthread_mutex_lock(&pool->lock);
    int is_new = job->taken == 0 && job->state == WAITING;
    if (is_new) {
        unlink_job(pool, job);
        job->state = CANCELLED;
    }
    pthread_mutex_unlock(&pool->lock);
    return is_new;
}

void reads_wait(Pool *pool, Job *job) {
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&job->state, __ATOMIC_ACQUIRE) != WAITING) return;
        PAUSE();
    }
    pthread_mutex_lock(&pool->lock);
    while (job->state == WAITING) pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
