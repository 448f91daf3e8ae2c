/* tensorkv.compiled._layouts: the layouts of many tensors, as docs/wal-format.md describes them.
 *
 * Built for Python's stable ABI. What is not written the way that ``join`` writes it, json reads.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdio.h>
#include <string.h>

#include "_module.h"

/* Whether JSON writes a character unescaped. */
static inline int is_plain(char c) { return c >= ' ' && c <= '~' && c != '"' && c != '\\'; }

static inline int is_digit(char c) { return c >= '0' && c <= '9'; }

/* ---------------------------------------------------------------- writing */

typedef struct {
    char *start;
    Py_ssize_t used, room;
} Text;

static int add(Text *text, const char *more, Py_ssize_t size) {
    if (size > text->room - text->used) {
        Py_ssize_t room = 2 * text->room + size;
        char *grown = room > text->room ? PyMem_Realloc(text->start, (size_t)room) : NULL;
        if (grown == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        text->start = grown;
        text->room = room;
    }
    memcpy(text->start + text->used, more, (size_t)size);
    text->used += size;
    return 0;
}

static int add_str(Text *text, PyObject *str) {
    Py_ssize_t size;
    const char *utf8 = PyUnicode_AsUTF8AndSize(str, &size);
    return utf8 == NULL ? -1 : add(text, utf8, size);
}

static int add_key(Text *text, PyObject *key, PyObject *encode) {
    if (PyUnicode_CheckExact(key)) {
        Py_ssize_t size, plain = 0;
        const char *utf8 = PyUnicode_AsUTF8AndSize(key, &size);
        if (utf8 == NULL)
            /* A surrogate by itself. */
            PyErr_Clear();
        else {
            while (plain < size && is_plain(utf8[plain])) plain++;
            if (plain == size) return add(text, "\"", 1) < 0 || add(text, utf8, size) < 0 ? -1 : add(text, "\"", 1);
        }
    } else if (PyLong_CheckExact(key)) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(key, &overflow);
        char digits[24];
        if (!overflow) return add(text, digits, snprintf(digits, sizeof digits, "%lld", number));
    }
    PyObject *encoded = PyObject_CallFunctionObjArgs(encode, key, NULL);
    int failed = encoded == NULL ? -1 : add_str(text, encoded);
    Py_XDECREF(encoded);
    return failed;
}

PyDoc_STRVAR(join_doc,
             "join(keys, ends, numbers, encode)\n--\n\n"
             "Return a layout.\n\n"
             "Args:\n"
             "    keys: of each tensor.\n"
             "    ends: what follows the key and a comma, as bytes, of each kind of tensor.\n"
             "    numbers: of each tensor's kind, a list.\n"
             "    encode: returns the JSON of a key.");

static PyObject *join(PyObject *module, PyObject *args) {
    PyObject *given, *given_ends, *numbers, *encode, *made = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOO!O", &given, &given_ends, &PyList_Type, &numbers, &encode)) return NULL;
    /* Copies, since encode may change what it was given from. */
    PyObject *keys = PySequence_List(given), *ends = keys == NULL ? NULL : PySequence_List(given_ends);
    Text text = {NULL, 0, 0};
    Py_ssize_t count = keys == NULL ? 0 : PyList_Size(keys), kinds = ends == NULL ? 0 : PyList_Size(ends);
    if (keys == NULL || ends == NULL) goto end;
    if (PyList_Size(numbers) != count) {
        PyErr_SetString(PyExc_ValueError, "expected the number of each key's kind");
        goto end;
    }
    if (add(&text, "[", 1) < 0) goto end;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *number = PyList_GetItem(numbers, i);
        Py_ssize_t kind = number == NULL ? -1 : PyLong_AsSsize_t(number), size;
        if (kind == -1 && PyErr_Occurred()) goto end;
        if (kind < 0 || kind >= kinds) {
            PyErr_Format(PyExc_IndexError, "kind %zd of %zd", kind, kinds);
            goto end;
        }
        char *tail;
        if (PyBytes_AsStringAndSize(PyList_GetItem(ends, kind), &tail, &size) < 0) goto end;
        if (add(&text, i ? ",[" : "[", i ? 2 : 1) < 0 || add_key(&text, PyList_GetItem(keys, i), encode) < 0 ||
            add(&text, ",", 1) < 0 || add(&text, tail, size) < 0)
            goto end;
    }
    if (add(&text, "]", 1) == 0) made = PyBytes_FromStringAndSize(text.start, text.used);
end:
    PyMem_Free(text.start);
    Py_XDECREF(keys);
    Py_XDECREF(ends);
    return made;
}

/* ---------------------------------------------------------------- reading */

typedef struct {
    const char *at, *stop;
} Cursor;

static inline int takes(Cursor *cursor, char wanted) {
    if (cursor->at >= cursor->stop || *cursor->at != wanted) return 0;
    cursor->at++;
    return 1;
}

/* A string without escapes, and its length; -1: there is none. */
static Py_ssize_t take_string(Cursor *cursor) {
    if (!takes(cursor, '"')) return -1;
    const char *start = cursor->at;
    while (cursor->at < cursor->stop && is_plain(*cursor->at)) cursor->at++;
    Py_ssize_t size = cursor->at - start;
    return takes(cursor, '"') ? size : -1;
}

/* A key, or NULL; without an error where json has to read it. */
static PyObject *take_key(Cursor *cursor) {
    if (cursor->at < cursor->stop && *cursor->at == '"') {
        Py_ssize_t size = take_string(cursor);
        return size < 0 ? NULL : PyUnicode_FromStringAndSize(cursor->at - 1 - size, size);
    }
    int is_negative = takes(cursor, '-');
    const char *start = cursor->at;
    long long number = 0;
    for (; cursor->at < cursor->stop && is_digit(*cursor->at); cursor->at++) {
        if (cursor->at - start == 18) return NULL;
        number = 10 * number + (*cursor->at - '0');
    }
    if (cursor->at == start || (*start == '0' && (is_negative || cursor->at - start > 1))) return NULL;
    return PyLong_FromLongLong(is_negative ? -number : number);
}

/* Role, dtype and shape, up to the end of the tensor's list; 0: json has to read them. */
static int take_end(Cursor *cursor) {
    if (take_string(cursor) < 0 || !takes(cursor, ',') || take_string(cursor) < 0 || !takes(cursor, ',')) return 0;
    if (!takes(cursor, '[')) return 0;
    while (cursor->at < cursor->stop && (is_digit(*cursor->at) || *cursor->at == ',')) cursor->at++;
    return takes(cursor, ']') && takes(cursor, ']');
}

/* The number of a kind, added if it is new; NULL with an error. */
static PyObject *number_of(PyObject *known, PyObject *ends, const char *start, Py_ssize_t size) {
    PyObject *end = PyBytes_FromStringAndSize(start, size), *number = NULL;
    if (end == NULL) return NULL;
    number = Py_XNewRef(PyDict_GetItemWithError(known, end));
    if (number == NULL && !PyErr_Occurred()) {
        number = PyLong_FromSsize_t(PyList_Size(ends));
        if (number != NULL && (PyDict_SetItem(known, end, number) < 0 || PyList_Append(ends, end) < 0)) Py_CLEAR(number);
    }
    Py_DECREF(end);
    return number;
}

/* Append what the layout says; 0: json has to read it; -1: an error. */
static int read_all(Cursor *cursor, PyObject *keys, PyObject *ends, PyObject *numbers, PyObject *known) {
    const char *before = NULL;
    Py_ssize_t before_size = 0;
    PyObject *number = NULL;
    int found = 1;
    while (found == 1 && cursor->at < cursor->stop) {
        if ((before != NULL && !takes(cursor, ',')) || !takes(cursor, '[')) found = 0;
        PyObject *key = found == 1 ? take_key(cursor) : NULL;
        if (key == NULL) {
            found = PyErr_Occurred() ? -1 : 0;
            break;
        }
        found = PyList_Append(keys, key) < 0 ? -1 : takes(cursor, ',');
        Py_DECREF(key);
        const char *start = cursor->at;
        if (found == 1) found = take_end(cursor);
        if (found != 1) break;
        Py_ssize_t size = cursor->at - start;
        /* Most tensors are of the same kind as the one before. */
        if (before == NULL || size != before_size || memcmp(before, start, (size_t)size) != 0) {
            Py_XDECREF(number);
            number = number_of(known, ends, start, size);
            before = start;
            before_size = size;
        }
        if (number == NULL || PyList_Append(numbers, number) < 0) found = -1;
    }
    Py_XDECREF(number);
    return found;
}

PyDoc_STRVAR(split_doc,
             "split(layout)\n--\n\n"
             "Undo join: return a tuple of keys, a list of ends and a list of numbers.\n\n"
             "Returns:\n"
             "    None if it is not written the way that join writes it. The ends may still be invalid JSON.");

static PyObject *split(PyObject *module, PyObject *args) {
    Py_buffer layout;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*", &layout)) return NULL;
    const char *start = layout.buf;
    PyObject *keys = PyList_New(0), *ends = PyList_New(0), *numbers = PyList_New(0), *known = PyDict_New(), *made = NULL;
    int found = keys == NULL || ends == NULL || numbers == NULL || known == NULL ? -1 : 0;
    if (found == 0 && layout.len >= 2 && start[0] == '[' && start[layout.len - 1] == ']') {
        Cursor cursor = {start + 1, start + layout.len - 1};
        found = read_all(&cursor, keys, ends, numbers, known);
    }
    if (found == 0)
        made = Py_NewRef(Py_None);
    else if (found == 1) {
        PyObject *tuple = PyList_AsTuple(keys);
        made = tuple == NULL ? NULL : Py_BuildValue("NOO", tuple, ends, numbers);
    }
    Py_XDECREF(keys);
    Py_XDECREF(ends);
    Py_XDECREF(numbers);
    Py_XDECREF(known);
    PyBuffer_Release(&layout);
    return made;
}

/* ---------------------------------------------------------------- places */

PyDoc_STRVAR(place_doc,
             "place(sizes, numbers)\n--\n\n"
             "Find where each of a row of tensors begins: at the next multiple of its element's size.\n\n"
             "Args:\n"
             "    sizes: a list with the bytes of an element and of the whole, for each kind of tensor.\n"
             "    numbers: of each tensor's kind, a list.\n\n"
             "Returns:\n"
             "    the first byte of each as 64-bit numbers, and the byte after the last one.\n\n"
             "Raises:\n"
             "    OverflowError: that is at 2^62 or later.");

static PyObject *place(PyObject *module, PyObject *args) {
    PyObject *given, *numbers, *starts = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &given, &PyList_Type, &numbers)) return NULL;
    const unsigned long long most = 1ULL << 62;
    Py_ssize_t kinds = PyList_Size(given), count = PyList_Size(numbers), kind = 0, i = 0;
    unsigned long long at = 0, (*sizes)[2] = PyMem_Calloc((size_t)kinds + 1, sizeof *sizes);
    if (sizes == NULL) return PyErr_NoMemory();
    for (; kind < kinds; kind++) {
        PyObject *pair = PyList_GetItem(given, kind), *itemsize, *nbytes;
        if (!PyArg_ParseTuple(pair, "OO", &itemsize, &nbytes)) break;
        sizes[kind][0] = PyLong_AsUnsignedLongLong(itemsize);
        sizes[kind][1] = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(nbytes);
        if (PyErr_Occurred()) break;
        if (sizes[kind][0] == 0 || sizes[kind][0] > most || sizes[kind][1] > most) {
            PyErr_SetString(PyExc_OverflowError, "tensors of 2^62 bytes or more, or elements of none");
            break;
        }
    }
    if (kind == kinds) starts = PyBytes_FromStringAndSize(NULL, 8 * count);
    char *column = starts == NULL ? NULL : PyBytes_AsString(starts);
    for (; column != NULL && i < count; i++) {
        Py_ssize_t number = PyLong_AsSsize_t(PyList_GetItem(numbers, i));
        if (number < 0 || number >= kinds) {
            if (!PyErr_Occurred()) PyErr_Format(PyExc_IndexError, "kind %zd of %zd", number, kinds);
            break;
        }
        unsigned long long over = at % sizes[number][0], start = over ? at + sizes[number][0] - over : at;
        memcpy(column + 8 * i, &start, 8);
        at = start + sizes[number][1];
        if (at >= most) {
            PyErr_SetString(PyExc_OverflowError, "tensors of 2^62 bytes or more");
            break;
        }
    }
    PyMem_Free(sizes);
    if (starts != NULL && i < count) Py_CLEAR(starts);
    return starts == NULL ? NULL : Py_BuildValue("NK", starts, at);
}

static PyMethodDef methods[] = {
    {"join", join, METH_VARARGS, join_doc},
    {"split", split, METH_VARARGS, split_doc},
    {"place", place, METH_VARARGS, place_doc},
    {NULL, NULL, 0, NULL},
};

MODULE(_layouts, "The layouts of many tensors, and where tensors lie.")
