/* The kernels as a program that calls them one after another, as tests/kernels/aarch64.py asks: memory is a file, which
 * both map, and a call lies at its beginning. A byte on standard input says that there is one, a byte on standard output
 * that it is over. Pointers in the file are addresses here, so it must lie at PLACE.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define PLACE ((void *)(1L << 36))
enum { SIZE = 1 << 28, ARGUMENTS = 10 };

typedef struct {
    char name[24];
    long arguments[ARGUMENTS];
    double number; /* the argument that is a float, if there is one */
    long result;
} Call;

/* On aarch64 whole numbers and floats are handed over in registers of their own, in order: so one type will do for
 * every function, and a float may stand last. */
typedef long (*Function)(long, long, long, long, long, long, long, long, long, long, float);

#define FUNCTIONS(X)                                                                                     \
    X(norm_rows) X(residual_rows) X(gate_rows) X(combine_rows) X(set_threads) X(attend_rows)             \
    X(group_linear) X(group_decode) X(tile_linear) X(tile_decode) X(bf16_products) X(palette_linear) X(palette_decode) X(lowrank_rows)   \
    X(expert_rows) X(nested_rows) X(checksum) X(decode_entries) X(delta_rows) X(head_rows) X(chunk_rows) X(gather_pieces)
#define DECLARE(name) void name(void);
#define ENTRY(name) {#name, (Function)(void *)name},
FUNCTIONS(DECLARE)

void *reads_open(int count);
void reads_close(void *pool), reads_submit(void *pool, void *job), reads_promote(void *pool, void *job);
void reads_wait(void *pool, void *job);
int reads_cancel(void *pool, void *job);

/* Reads by threads: `count` jobs of `size` bytes each, the last of which is put first, and the one before it taken back
 * if it has not begun. Returns whether it was, or -1 where there are no threads. A job's state is its last number. */
static long read_jobs(long threads, char *jobs, long count, long size, int *states) {
    void *pool = reads_open((int)threads);
    if (!pool) return -1;
    for (long i = 0; i < count; i++) reads_submit(pool, jobs + i * size);
    reads_promote(pool, jobs + (count - 1) * size);
    const int cancelled = reads_cancel(pool, jobs + (count - 2) * size);
    for (long i = 0; i < count; i++) {
        reads_wait(pool, jobs + i * size);
        memcpy(states + i, jobs + (i + 1) * size - sizeof *states, sizeof *states);
    }
    reads_close(pool);
    return cancelled;
}

static const struct {
    const char *name;
    Function function;
} functions[] = {FUNCTIONS(ENTRY) ENTRY(read_jobs)};

static Function find(const char *name) {
    for (unsigned long i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!strcmp(functions[i].name, name)) return functions[i].function;
    return 0;
}

int main(int count, char **words) {
    int file = count == 2 ? open(words[1], O_RDWR) : -1;
    Call *call = mmap(PLACE, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (call != PLACE) return 2;
    while (getchar() != EOF) {
        Function f = find(call->name);
        if (!f) return 3;
        const long *a = call->arguments;
        call->result = f(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], (float)call->number);
        putchar('\n');
        fflush(stdout);
    }
    return 0;
}
