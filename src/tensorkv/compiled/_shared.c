/* tensorkv.compiled._shared: words in memory that processes share, for Python (see _words.h). */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_module.h"
#include "_words.h"

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
    size_t count = (size_t)addresses.len / 8, done = count_reached(addresses.buf, count, least);
    if (done < count) {
        Py_BEGIN_ALLOW_THREADS;
        done = wait_for_words(addresses.buf, count, done, least, word_at(stop_address), timeout, spin);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&addresses);
    return PyLong_FromSize_t(done);
}

PyDoc_STRVAR(store_doc, "store(address, count)\n--\n\nStore a count, after all that was written before, and wake who waits.");

static PyObject *store_count(PyObject *module, PyObject *args) {
    unsigned long long address, count;
    (void)module;
    if (!PyArg_ParseTuple(args, "KK", &address, &count)) return NULL;
    store_word(word_at(address), count);
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

MODULE(_shared, "Words in memory that processes share.")
