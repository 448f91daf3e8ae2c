/* tensorkv.compiled._shared: words in memory that processes share, to tell each other how far they are.
 *
 * A word is a count that only grows and that one process alone stores. Others wait until it is large enough. What was
 * written before the store is seen after the wait (release and acquire), on any processor. A wait spins for a moment
 * where cores are free, then sleeps in the kernel (futex), so that waiting processes leave the cores to those that work.
 *
 * A word takes a cache line of its own: 8 bytes of count, 4 bytes that say how many sleep.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
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

static double now(void) {
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

PyDoc_STRVAR(wait_doc,
             "wait(addresses, least, stop, timeout_s, spin_s)\n--\n\n"
             "Wait until each word has at least this count; return how many words have, from the first on.\n\n"
             "Args:\n"
             "    addresses: a buffer with a 64-bit address for each word.\n"
             "    least: the count.\n"
             "    stop: address of a word that ends every wait once it is not 0.\n"
             "    timeout_s: of the whole wait.\n"
             "    spin_s: how long to watch without sleeping.");

static PyObject *wait_for(PyObject *module, PyObject *args) {
    Py_buffer addresses;
    unsigned long long least, stop_address;
    double timeout, spin;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*KKdd", &addresses, &least, &stop_address, &timeout, &spin)) return NULL;
    const uint64_t *at = addresses.buf;
    Py_ssize_t done = 0, count = addresses.len / 8;
    Word *stop = word_at(stop_address);
    while (done < count && atomic_load_explicit(&word_at(at[done])->count, memory_order_acquire) >= least) done++;
    if (done < count) {
        Py_BEGIN_ALLOW_THREADS;
        double start = now(), past = 0;
        unsigned turns = 0;
        while (done < count) {
            Word *word = word_at(at[done]);
            uint64_t seen = atomic_load_explicit(&word->count, memory_order_acquire);
            if (seen >= least) {
                done++;
                continue;
            }
            if (atomic_load_explicit(&stop->count, memory_order_acquire)) break;
            if (++turns % 64 == 0 || past >= spin) past = now() - start;
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
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&addresses);
    return PyLong_FromSsize_t(done);
}

PyDoc_STRVAR(store_doc, "store(address, count)\n--\n\nStore a count, after all that was written before, and wake who waits.");

static PyObject *store_count(PyObject *module, PyObject *args) {
    unsigned long long address, count;
    (void)module;
    if (!PyArg_ParseTuple(args, "KK", &address, &count)) return NULL;
    Word *word = word_at(address);
    atomic_store(&word->count, count);
    if (atomic_load(&word->sleepers)) wake(word);
    return Py_NewRef(Py_None);
}

PyDoc_STRVAR(load_doc, "load(address)\n--\n\nReturn a count; what was written before it was stored can be read now.");

static PyObject *load_count(PyObject *module, PyObject *args) {
    unsigned long long address;
    (void)module;
    if (!PyArg_ParseTuple(args, "K", &address)) return NULL;
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&word_at(address)->count, memory_order_acquire));
}

PyDoc_STRVAR(wake_doc, "wake(address)\n--\n\nWake everyone who sleeps on a word, to look at the stop word.");

static PyObject *wake_all(PyObject *module, PyObject *args) {
    unsigned long long address;
    (void)module;
    if (!PyArg_ParseTuple(args, "K", &address)) return NULL;
    wake(word_at(address));
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"wait", wait_for, METH_VARARGS, wait_doc},
    {"store", store_count, METH_VARARGS, store_doc},
    {"load", load_count, METH_VARARGS, load_doc},
    {"wake", wake_all, METH_VARARGS, wake_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tensorkv.compiled._shared", "Words in memory that processes share.", 0, methods,
    NULL,                  NULL,               NULL,                                    NULL,
};

PyMODINIT_FUNC PyInit__shared(void) { return PyModule_Create(&definition); }
