/* tensorkv.compiled._signals: a call during which no signal handler of Python runs.
 *
 * Python runs handlers between any two bytecodes of the main thread, and what they raise unwinds the call that runs
 * there. So for the time of a call each of them is replaced by one that notes its signal. When the call has ended and
 * the handlers are back, those run whose signals were noted.
 *
 * Built for Python's stable ABI. Used in the main thread of the main interpreter alone, so its state is static.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <signal.h>
#include <string.h>

#ifndef NSIG
#define NSIG 65
#endif

enum { MOST_TRIES = 1000 };

typedef struct {
    int number;
    PyObject *handler;
    struct sigaction action; /* with the flags that signal.siginterrupt has set */
} Kept;

static PyObject *get_handler, *set_handler, *recorder, *numbers[NSIG];
static Kept kept[NSIG];
static int num_kept, is_deferring;
static unsigned char seen[NSIG];

static PyObject *record(PyObject *self, PyObject *args) {
    long number = PyLong_AsLong(PyTuple_GetItem(args, 0));
    (void)self;
    if (number > 0 && number < NSIG) seen[number] = 1;
    PyErr_Clear();
    return Py_NewRef(Py_None);
}

/* Python runs the handlers of signals that have come before it sets another; what they raise is raised here. */
static int set(int number, PyObject *handler) {
    PyObject *old = PyObject_CallFunctionObjArgs(set_handler, numbers[number], handler, NULL);
    Py_XDECREF(old);
    return old == NULL ? -1 : 0;
}

/* Keep the exception that is raised if it is the first. */
static void keep_first(PyObject *first[3]) {
    if (first[0] == NULL)
        PyErr_Fetch(&first[0], &first[1], &first[2]);
    else
        PyErr_Clear();
}

/* Put the handlers back, run those whose signals have come, and raise the first exception that one of them raises. */
static int restore(void) {
    PyObject *first[3] = {NULL, NULL, NULL}, *frame = (PyObject *)PyEval_GetFrame();
    Kept ended[NSIG];
    unsigned char has_come[NSIG];
    int num_ended = num_kept;
    memcpy(ended, kept, sizeof kept);
    for (int i = 0; i < num_ended; i++) {
        PyObject *current = PyObject_CallFunctionObjArgs(get_handler, numbers[ended[i].number], NULL);
        /* The call may have set a handler itself. */
        for (int tries = 0; current == recorder && tries < MOST_TRIES; tries++) {
            if (!set(ended[i].number, ended[i].handler)) {
                sigaction(ended[i].number, &ended[i].action, NULL);
                break;
            }
            keep_first(first);
        }
        Py_XDECREF(current);
    }
    num_kept = is_deferring = 0;
    /* A handler may call the store, which defers others. */
    memcpy(has_come, seen, sizeof seen);
    for (int i = 0; i < num_ended; i++) {
        if (has_come[ended[i].number]) {
            PyObject *result = PyObject_CallFunctionObjArgs(ended[i].handler, numbers[ended[i].number],
                                                            frame == NULL ? Py_None : frame, NULL);
            if (result == NULL) keep_first(first);
            Py_XDECREF(result);
        }
        Py_DECREF(ended[i].handler);
    }
    if (first[0] == NULL) return 0;
    PyErr_Restore(first[0], first[1], first[2]);
    return -1;
}

static int replace(void) {
    memset(seen, 0, sizeof seen);
    for (int number = 1; number < NSIG; number++) {
        PyObject *handler = numbers[number] == NULL ? NULL : PyObject_CallFunctionObjArgs(get_handler, numbers[number], NULL);
        if (handler != NULL && PyCallable_Check(handler) && !sigaction(number, NULL, &kept[num_kept].action)) {
            kept[num_kept].number = number;
            kept[num_kept++].handler = handler;
        } else {
            Py_XDECREF(handler);
            PyErr_Clear();
        }
    }
    is_deferring = 1;
    for (int i = 0; i < num_kept; i++) {
        if (set(kept[i].number, recorder)) {
            PyObject *type, *value, *traceback;
            PyErr_Fetch(&type, &value, &traceback);
            if (restore()) PyErr_Clear();
            PyErr_Restore(type, value, traceback);
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(defer_doc, "defer(work, *args)\n--\n\n"
                        "Return what the work returns; signal handlers of Python run when it has ended.\n\n"
                        "To be called in the main thread. A call inside of another just does the work.");

static PyObject *defer(PyObject *module, PyObject *args) {
    PyObject *type, *value, *traceback, *result = NULL;
    (void)module;
    if (PyTuple_Size(args) < 1) {
        PyErr_SetString(PyExc_TypeError, "defer: expected a function");
        return NULL;
    }
    PyObject *work = PyTuple_GetItem(args, 0), *rest = PyTuple_GetSlice(args, 1, PyTuple_Size(args));
    int is_inner = is_deferring;
    if (rest == NULL || (!is_inner && replace())) goto done;
    result = PyObject_CallObject(work, rest);
    if (!is_inner) {
        PyErr_Fetch(&type, &value, &traceback);
        if (restore()) {
            Py_CLEAR(result);
            Py_XDECREF(type);
            Py_XDECREF(value);
            Py_XDECREF(traceback);
        } else {
            PyErr_Restore(type, value, traceback);
        }
    }
done:
    Py_XDECREF(rest);
    return result;
}

PyDoc_STRVAR(run_handlers_doc, "run_handlers()\n--\n\n"
                               "Run the handlers of signals that have come during a call of ``defer``.\n\n"
                               "What they raise is raised here; other signals are deferred until the call has ended.");

static PyObject *run_handlers(PyObject *module, PyObject *none) {
    PyObject *first[3] = {NULL, NULL, NULL};
    (void)module, (void)none;
    if (!is_deferring || memchr(seen, 1, sizeof seen) == NULL) return Py_NewRef(Py_None);
    if (restore()) keep_first(first);
    if (replace()) keep_first(first);
    if (first[0] == NULL) return Py_NewRef(Py_None);
    PyErr_Restore(first[0], first[1], first[2]);
    return NULL;
}

PyDoc_STRVAR(is_deferring_doc, "is_deferring()\n--\n\nReturn whether a call of ``defer`` is under way.");

static PyObject *get_is_deferring(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    return PyBool_FromLong(is_deferring);
}

PyDoc_STRVAR(after_fork_doc, "after_fork()\n--\n\n"
                             "Put the handlers back in a child that was forked, by any thread, during a call.");

static PyObject *after_fork(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    memset(seen, 0, sizeof seen);
    return restore() ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef record_def = {"record", record, METH_VARARGS, "Note a signal."};

static PyMethodDef methods[] = {
    {"defer", defer, METH_VARARGS, defer_doc},
    {"run_handlers", run_handlers, METH_NOARGS, run_handlers_doc},
    {"is_deferring", get_is_deferring, METH_NOARGS, is_deferring_doc},
    {"after_fork", after_fork, METH_NOARGS, after_fork_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tensorkv.compiled._signals", "A call during which no signal handler runs.", -1, methods,
    NULL,                  NULL,                        NULL,                                          NULL,
};

PyMODINIT_FUNC PyInit__signals(void) {
    /* The functions of signal itself are written in Python, so handlers could run inside of them. */
    PyObject *functions = PyImport_ImportModule("_signal"), *module = NULL;
    if (functions == NULL) return NULL;
    get_handler = PyObject_GetAttrString(functions, "getsignal");
    set_handler = PyObject_GetAttrString(functions, "signal");
    recorder = PyCFunction_New(&record_def, NULL);
    for (int number = 1; number < NSIG; number++) {
        struct sigaction action;
        if (!sigaction(number, NULL, &action)) numbers[number] = PyLong_FromLong(number);
    }
    if (get_handler != NULL && set_handler != NULL && recorder != NULL) module = PyModule_Create(&definition);
    Py_DECREF(functions);
    if (module != NULL && PyModule_AddStringConstant(module, "SOURCES", SOURCES)) Py_CLEAR(module);
    return module;
}
