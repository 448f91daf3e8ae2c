/* Words in memory that processes share, to tell each other how far they are. Included by _shared.c and _native.c.
 *
 * A word is a count that only grows and that one process alone stores. Others wait until it is large enough. What was
 * written before the store is seen after the wait (release and acquire), on any processor. A wait spins for a moment
 * where cores are free, then sleeps in the kernel (futex), so that waiting processes leave the cores to those that work.
 *
 * A word takes a cache line of its own: 8 bytes of count, 4 bytes that say how many sleep.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    _Atomic uint64_t count;
    _Atomic uint32_t sleepers;
} Word;

static Word *word_at(unsigned long long address) { return (Word *)(uintptr_t)address; }

/* The half of the count that changes with every store; a futex is 32 bits wide. */
static uint32_t *low_half(Word *word) {
    uint32_t *halves = (uint32_t *)(void *)&word->count;
    const union {
        uint64_t whole;
        uint32_t half[2];
    } one = {1};
    return one.half[0] ? halves : halves + 1;
}

static double monotonic_s(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_on(Word *word, uint64_t seen, double seconds) {
    struct timespec most = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
#ifdef __linux__
    syscall(SYS_futex, low_half(word), FUTEX_WAIT, (uint32_t)seen, &most, NULL, 0);
#else
    (void)word, (void)seen;
    most.tv_sec = 0;
    if (most.tv_nsec > 50000) most.tv_nsec = 50000;
    nanosleep(&most, NULL);
#endif
}

static void wake(Word *word) {
#ifdef __linux__
    syscall(SYS_futex, low_half(word), FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

/* How many words have at least this count, from the first on; waits for some time until all have. */
static size_t wait_for_words(const uint64_t *addresses, size_t count, size_t done, uint64_t least, Word *stop, double timeout,
                             double spin) {
    double start = monotonic_s(), past = 0;
    unsigned turns = 0;
    while (done < count) {
        Word *word = word_at(addresses[done]);
        uint64_t seen = atomic_load_explicit(&word->count, memory_order_acquire);
        if (seen >= least) {
            done++;
            continue;
        }
        if (atomic_load_explicit(&stop->count, memory_order_acquire)) break;
        if (++turns % 64 == 0 || past >= spin) past = monotonic_s() - start;
        if (past >= timeout) break;
        if (past < spin) {
            relax();
            continue;
        }
        /* Either the store comes after this and sees a sleeper, or the kernel sees the new count. */
        atomic_fetch_add(&word->sleepers, 1);
        seen = atomic_load(&word->count);
        if (seen < least && !atomic_load(&stop->count)) sleep_on(word, seen, timeout - past);
        atomic_fetch_sub(&word->sleepers, 1);
    }
    return done;
}

/* How many words have at least this count now, from the first on. */
static size_t count_reached(const uint64_t *addresses, size_t count, uint64_t least) {
    size_t done = 0;
    while (done < count && atomic_load_explicit(&word_at(addresses[done])->count, memory_order_acquire) >= least) done++;
    return done;
}

/* Store a count, after all that was written before, and wake those that sleep. */
static void store_word(Word *word, uint64_t count) {
    atomic_store(&word->count, count);
    if (atomic_load(&word->sleepers)) wake(word);
}
