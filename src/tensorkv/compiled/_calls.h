/* The calls of a store, from the caller's arguments to what the verb returns, and their counts.
 *
 * A call of plain arrays is looked at, done and counted here, while Python's lock is held; what it is not plain in, or
 * what takes long, is left to Python. Included by _native.c.
 */
/* Calls of at most so many bytes are done while Python's lock is held. */
enum { AT_ONCE_NBYTES = 1 << 20 };

/* ------------------------------------------------------------ counts */

PyDoc_STRVAR(record_doc, "Counts of a verb, and of each of its keys.");

typedef struct {
    PyObject_HEAD
    unsigned long long calls, nbytes;
    double seconds;
    PyObject *keys; /* a dict of key to Record; NULL: there are none */
} Record;

static PyTypeObject *record_type;

static Record *new_record(void) {
    static allocfunc allocate;
    if (allocate == NULL) allocate = (allocfunc)PyType_GetSlot(record_type, Py_tp_alloc);
    return (Record *)allocate(record_type, 0);
}

static void record_dealloc(Record *record) {
    PyTypeObject *type = Py_TYPE((PyObject *)record);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    Py_XDECREF(record->keys);
    release(record);
    Py_DECREF(type);
}

static int count_call(Record *record, double seconds) {
    record->calls++;
    record->seconds += seconds;
    return record->keys != NULL || (record->keys = PyDict_New()) != NULL ? 0 : -1;
}

static int count_key(Record *record, PyObject *key, unsigned long long nbytes) {
    Record *own = (Record *)PyDict_GetItemWithError(record->keys, key);
    if (own == NULL) {
        if (PyErr_Occurred() || (own = new_record()) == NULL) return -1;
        int failed = PyDict_SetItem(record->keys, key, (PyObject *)own);
        Py_DECREF((PyObject *)own);
        if (failed) return -1;
    }
    own->calls++;
    own->nbytes += nbytes;
    record->nbytes += nbytes;
    return 0;
}

static PyObject *record_add(Record *record, PyObject *args) {
    double seconds;
    PyObject *keys, *nbytes;
    if (!PyArg_ParseTuple(args, "dO!O!", &seconds, &PyList_Type, &keys, &PyList_Type, &nbytes)) return NULL;
    Py_ssize_t count = PyList_Size(keys);
    if (PyList_Size(nbytes) != count) {
        PyErr_SetString(PyExc_ValueError, "add: expected as many numbers of bytes as keys");
        return NULL;
    }
    if (count_call(record, seconds)) return NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned long long number = PyLong_AsUnsignedLongLong(PyList_GetItem(nbytes, i));
        if (PyErr_Occurred() || count_key(record, PyList_GetItem(keys, i), number)) return NULL;
    }
    return Py_NewRef(Py_None);
}

static PyObject *record_forget(Record *record, PyObject *keys) {
    for (Py_ssize_t i = 0; record->keys != NULL && PyList_Check(keys) && i < PyList_Size(keys); i++) {
        PyObject *key = PyList_GetItem(keys, i);
        int has = PyDict_Contains(record->keys, key);
        if (has < 0 || (has && PyDict_DelItem(record->keys, key))) return NULL;
    }
    return Py_NewRef(Py_None);
}

static PyObject *record_of_keys(Record *record, PyObject *none) {
    (void)none;
    return record->keys == NULL ? PyDict_New() : PyDict_Copy(record->keys);
}

static PyMemberDef record_members[] = {
    {"calls", T_ULONGLONG, offsetof(Record, calls), READONLY, "How many calls."},
    {"nbytes", T_ULONGLONG, offsetof(Record, nbytes), READONLY, "Bytes of the arrays of all of them."},
    {"seconds", T_DOUBLE, offsetof(Record, seconds), READONLY, "How long all of them took."},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef record_methods[] = {
    {"add", (PyCFunction)record_add, METH_VARARGS,
     "add(seconds, keys, nbytes)\n--\n\nCount one call, which moved so many bytes for each of its keys."},
    {"forget", (PyCFunction)record_forget, METH_O, "forget(keys)\n--\n\nDrop the counts of a list of keys."},
    {"of_keys", (PyCFunction)record_of_keys, METH_NOARGS, "of_keys()\n--\n\nReturn a dict of key to its Record."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot record_slots[] = {
    {Py_tp_doc, (void *)record_doc},
    {Py_tp_members, record_members},
    {Py_tp_methods, record_methods},
    {Py_tp_dealloc, record_dealloc},
    {0, NULL},
};

static PyType_Spec record_spec = {"tensorkv.compiled._native.Record", sizeof(Record), 0, Py_TPFLAGS_DEFAULT, record_slots};

/* ------------------------------------------------------------ shards */

PyDoc_STRVAR(fields_doc, "What the compiled part reads of a shard.");

typedef struct {
    PyObject_HEAD
    PyObject *entries, *steps, *lock, *log;
    char looks, averages, decides;
} ShardFields;

static PyTypeObject *fields_type;

static int fields_traverse(ShardFields *fields, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)fields));
    Py_VISIT(fields->entries);
    Py_VISIT(fields->steps);
    Py_VISIT(fields->lock);
    Py_VISIT(fields->log);
    return 0;
}

static int fields_clear(ShardFields *fields) {
    Py_CLEAR(fields->entries);
    Py_CLEAR(fields->steps);
    Py_CLEAR(fields->lock);
    Py_CLEAR(fields->log);
    return 0;
}

static void fields_dealloc(ShardFields *fields) {
    PyTypeObject *type = Py_TYPE((PyObject *)fields);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack(fields);
    fields_clear(fields);
    release(fields);
    Py_DECREF(type);
}

static PyMemberDef fields_members[] = {
    {"_entries", T_OBJECT_EX, offsetof(ShardFields, entries), 0, "A dict of key to Cell."},
    {"_steps", T_OBJECT, offsetof(ShardFields, steps), 0,
     "The optimizer's step and those of single keys, each None without one; None if sums go another way."},
    {"_lock", T_OBJECT_EX, offsetof(ShardFields, lock), 0, "Its ``depth`` is not 0 while somebody reads or writes."},
    {"log", T_OBJECT, offsetof(ShardFields, log), 0, "Writes each change before it is applied, if there is one."},
    {"_looks", T_BOOL, offsetof(ShardFields, looks), 0, "Whether calls may be looked at here at all."},
    {"_decides", T_BOOL, offsetof(ShardFields, decides), 0,
     "Whether what is done with a push depends on the sums of all its keys."},
    {"averages", T_BOOL, offsetof(ShardFields, averages), 0, "Whether a push takes the mean of parts, not their sum."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot fields_slots[] = {
    {Py_tp_doc, (void *)fields_doc},      {Py_tp_members, fields_members}, {Py_tp_traverse, fields_traverse},
    {Py_tp_clear, fields_clear},          {Py_tp_dealloc, fields_dealloc}, {0, NULL},
};

static PyType_Spec fields_spec = {"tensorkv.compiled._native.ShardFields", sizeof(ShardFields), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, fields_slots};

/* Whether nobody reads or writes now; -1: an error. */
static int is_free(const ShardFields *fields) {
    static PyObject *depth_name;
    if (depth_name == NULL) depth_name = PyUnicode_InternFromString("depth");
    if (fields->lock == NULL) return 0;
    PyObject *depth = PyObject_GetAttr(fields->lock, depth_name);
    int free = depth == NULL ? -1 : PyLong_AsLong(depth) == 0;
    Py_XDECREF(depth);
    return free;
}

/* ------------------------------------------------------------ calls */

PyDoc_STRVAR(call_doc, "Call(record, verb, key, value, out, priority, like=None, ignore_sparse=False, flat=False)\n--\n\n"
                       "A push, pull or pushpull, as the caller wrote it. A subclass parses what is not plain: it has\n"
                       "``outcome() -> (keys, nbytes, result)``, ``like_spec(spec)`` for new outs like an array, and\n"
                       "``give(outs, specs)``, which returns outs as arrays of their keys' libraries.");

/* What a call was made with; then its keys, values and outs, one each or lists of these; then the specs of the keys whose
 * new outs are not returned as they are, by place. */
enum { RECORD, VERB, KEY, VALUE, OUT, PRIORITY, LIKE, IGNORE_SPARSE, FLAT, NUM_GIVEN, LEAST_GIVEN = LIKE };
enum { KEYS = NUM_GIVEN, VALUES, OUTS, SPECS, NUM_HELD };

typedef struct {
    PyObject_HEAD
    PyObject *held[NUM_HELD];
    Batch *batch;
    double start;
    int has_new_outs;
} Call;

static PyTypeObject *call_type;

static PyObject *call_new(PyTypeObject *type, PyObject *args, PyObject *named) {
    Py_ssize_t count = PyTuple_Size(args);
    if (count < LEAST_GIVEN || count > NUM_GIVEN || (named != NULL && PyDict_Size(named))) {
        PyErr_SetString(PyExc_TypeError, "Call: expected 6 to 9 arguments, without names");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Call *call = (Call *)allocate(type, 0);
    if (call == NULL) return NULL;
    call->start = monotonic_s();
    for (int i = 0; i < NUM_GIVEN; i++)
        call->held[i] = Py_NewRef(i < count ? PyTuple_GetItem(args, i) : i == LIKE ? Py_None : Py_False);
    return (PyObject *)call;
}

static int call_traverse(Call *call, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)call));
    for (int i = 0; i < NUM_HELD; i++) Py_VISIT(call->held[i]);
    return 0;
}

static int call_clear(Call *call) {
    for (int i = 0; i < NUM_HELD; i++) Py_CLEAR(call->held[i]);
    Py_CLEAR(call->batch);
    return 0;
}

static void call_dealloc(Call *call) {
    PyTypeObject *type = Py_TYPE((PyObject *)call);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack(call);
    call_clear(call);
    release(call);
    Py_DECREF(type);
}

/* The arrays of a mapping in the order of the keys, or what was given otherwise; NULL: they do not fit. */
static PyObject *in_order(PyObject *given, PyObject *keys) {
    if (!PyDict_CheckExact(given)) return Py_NewRef(given);
    Py_ssize_t count = length_of(keys);
    PyObject *listed = count == PyDict_Size(given) ? PyList_New(count) : NULL;
    for (Py_ssize_t i = 0; listed != NULL && i < count; i++) {
        PyObject *key = item_of(keys, i), *found = is_key(key) ? PyDict_GetItemWithError(given, key) : NULL;
        if (found == NULL || PyList_SetItem(listed, i, Py_NewRef(found))) Py_CLEAR(listed);
    }
    return listed;
}

/* Bring the arguments to keys, values and outs, one each or lists of these; whether they fit together as such. */
static int list_arguments(Call *call) {
    PyObject **held = call->held, *key = held[KEY], *value = held[VALUE], *out = held[OUT], *listed = NULL;
    int pulls = PyUnicode_CompareWithASCIIString(held[VERB], "push") != 0;
    int pushes = PyUnicode_CompareWithASCIIString(held[VERB], "pull") != 0;
    if (!PyLong_CheckExact(held[PRIORITY])) return 0;
    if (held[LIKE] != Py_None && (out != Py_None || (!pushes && PyDict_CheckExact(key)))) return 0;
    if (PyDict_CheckExact(key)) {
        /* A mapping has the values, or the outs of a pull. */
        if ((pushes ? value : out) != Py_None) return 0;
        held[KEYS] = PyDict_Keys(key);
        listed = PyDict_Values(key);
        *(pushes ? &value : &out) = listed;
    } else {
        held[KEYS] = PyList_CheckExact(key) ? PyList_AsTuple(key) : Py_NewRef(key);
    }
    if (held[KEYS] != NULL && (!pushes || value != Py_None)) {
        held[VALUES] = pushes ? in_order(value, held[KEYS]) : Py_NewRef(Py_None);
        held[OUTS] = pulls ? in_order(out, held[KEYS]) : Py_NewRef(Py_None);
    }
    call->has_new_outs = pulls && held[OUTS] == Py_None;
    Py_XDECREF(listed);
    if (held[VALUES] != NULL && held[OUTS] != NULL) return 1;
    for (int i = KEYS; i <= OUTS; i++) Py_CLEAR(held[i]);
    return 0;
}

/* Make an array for a key, as its spec says; NULL: not plain, or an error. */
static PyObject *new_out(Call *call, PyObject *entries, PyObject *key, Py_ssize_t index) {
    static PyObject *new_name, *like_name;
    if (new_name == NULL) new_name = PyUnicode_InternFromString("new");
    if (like_name == NULL) like_name = PyUnicode_InternFromString("like_spec");
    PyObject *found = is_key(key) ? PyDict_GetItemWithError(entries, key) : NULL;
    if (found == NULL || !PyObject_TypeCheck(found, cell_type) || plain_of((Cell *)found) == NULL) return NULL;
    PyObject *spec = ((Cell *)found)->spec;
    if (spec == NULL) return NULL;
    Py_INCREF(spec);
    if (call->held[LIKE] != Py_None) {
        PyObject *other = PyObject_CallMethodObjArgs((PyObject *)call, like_name, spec, NULL);
        Py_DECREF(spec);
        spec = other;
    }
    PyObject *array = spec == NULL ? NULL : PyObject_CallMethodObjArgs(spec, new_name, NULL);
    if (array == Py_None) Py_CLEAR(array);
    if (array != NULL && is_torch(array)) {
        if (call->held[SPECS] == NULL) call->held[SPECS] = PyDict_New();
        PyObject *place = PyLong_FromSsize_t(index);
        if (call->held[SPECS] == NULL || place == NULL || PyDict_SetItem(call->held[SPECS], place, spec)) Py_CLEAR(array);
        Py_XDECREF(place);
    }
    Py_XDECREF(spec);
    return array;
}

/* Make the outs that the caller has not given; whether that was done. */
static int make_outs(Call *call, PyObject *entries) {
    PyObject *keys = call->held[KEYS], *outs;
    Py_ssize_t count = length_of(keys);
    if (count < 0) {
        outs = new_out(call, entries, keys, 0);
    } else {
        outs = PyList_New(count);
        for (Py_ssize_t i = 0; i < count && outs != NULL; i++) {
            PyObject *made = new_out(call, entries, item_of(keys, i), i);
            if (made == NULL || PyList_SetItem(outs, i, made)) Py_CLEAR(outs);
        }
    }
    if (outs == NULL) return 0;
    Py_DECREF(call->held[OUTS]);
    call->held[OUTS] = outs;
    return 1;
}

/* What ``look`` returns for a call; of a shard, pushes are for its update rule. */
static PyObject *look_at_call(Call *call, PyObject *entries, const ShardFields *shard) {
    PyObject **held = call->held, *steps = NULL, *step = Py_None, *own_steps = Py_None;
    Py_CLEAR(call->batch);
    if (torch_api == NULL || (held[KEYS] == NULL && !list_arguments(call)))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    int depth = length_of(held[KEYS]) < 0 ? 1 : 2;
    if (call->has_new_outs && held[OUTS] == Py_None && !make_outs(call, entries))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *values = direct_values(held[VALUES], held[OUTS], depth, call->has_new_outs);
    if (values == NULL) return Py_NewRef(Py_None);
    /* From here on no other thread runs that could change the rule, but for what the garbage collector may call. */
    if (shard != NULL && held[VALUES] != Py_None) {
        if (shard->steps == NULL || !PyTuple_CheckExact(shard->steps) || PyTuple_Size(shard->steps) != 2) {
            Py_DECREF(values);
            return Py_NewRef(Py_None);
        }
        steps = Py_NewRef(shard->steps);
        step = PyTuple_GetItem(steps, 0);
        own_steps = PyTuple_GetItem(steps, 1);
    }
    PyObject *found = new_batch(entries, held[KEYS], values, held[OUTS], step, own_steps, held[FLAT] == Py_True);
    Py_DECREF(values);
    Py_XDECREF(steps);
    if (found == NULL || found == Py_None) return found;
    if (shard != NULL && shard->averages && ((Batch *)found)->pushes && !average((Batch *)found)) {
        Py_DECREF(found);
        return Py_NewRef(Py_None);
    }
    call->batch = (Batch *)Py_NewRef(found);
    call->batch->has_new_outs = call->has_new_outs;
    return found;
}

static PyObject *call_look(Call *call, PyObject *args) {
    PyObject *entries, *shard = Py_None;
    if (!PyArg_ParseTuple(args, "O!|O", &PyDict_Type, &entries, &shard)) return NULL;
    if (shard != Py_None && !PyObject_TypeCheck(shard, fields_type)) {
        PyErr_SetString(PyExc_TypeError, "look: expected a shard");
        return NULL;
    }
    return look_at_call(call, entries, shard == Py_None ? NULL : (const ShardFields *)shard);
}

static PyObject *call_run(Call *call, PyObject *given) {
    if (!PyObject_TypeCheck(given, fields_type)) {
        PyErr_SetString(PyExc_TypeError, "run: expected a shard");
        return NULL;
    }
    const ShardFields *shard = (const ShardFields *)given;
    if (!shard->looks || shard->entries == NULL || !PyDict_Check(shard->entries)) return Py_NewRef(Py_None);
    /* While new outs are made another thread may load a checkpoint, and with it other entries. */
    PyObject *entries = Py_NewRef(shard->entries), *found = look_at_call(call, entries, shard);
    Py_DECREF(entries);
    if (found == NULL || found == Py_None) return found;
    int is_logged = call->batch->pushes && shard->log != NULL && shard->log != Py_None;
    int is_decided_on = call->batch->pushes && (shard->decides || call->batch->is_frozen);
    if (call->batch->calls.total_nbytes > AT_ONCE_NBYTES || is_logged || is_decided_on || call->batch->unready != NULL)
        return found;
    int free = is_free(shard);
    if (free > 0 && call->batch->entries != shard->entries) free = 0;
    if (free > 0) {
        run_range(call->batch, 0, SIZE_MAX);
        count_done(call->batch, call->batch->pushes, NULL);
    }
    if (!free) return found;
    Py_DECREF(found);
    return free < 0 ? NULL : Py_NewRef(Py_True);
}

/* The new outs as they are returned: one, a list, or a dict. */
static PyObject *give_outs(Call *call) {
    static PyObject *give_name;
    if (give_name == NULL) give_name = PyUnicode_InternFromString("give");
    PyObject *outs = call->held[OUTS], *specs = call->held[SPECS];
    outs = specs == NULL ? Py_NewRef(outs) : PyObject_CallMethodObjArgs((PyObject *)call, give_name, outs, specs, NULL);
    if (outs == NULL || !PyDict_CheckExact(call->held[KEY])) return outs;
    PyObject *named = PyDict_New();
    for (Py_ssize_t i = 0; named != NULL && i < PyList_Size(outs); i++)
        if (PyDict_SetItem(named, item_of(call->held[KEYS], i), PyList_GetItem(outs, i))) Py_CLEAR(named);
    Py_DECREF(outs);
    return named;
}

static PyObject *call_end(Call *call, PyObject *none) {
    Record *record = (Record *)call->held[RECORD];
    (void)none;
    if (call->batch == NULL || !call->batch->is_done) {
        PyObject *keys, *nbytes, *result = NULL, *counted = NULL;
        PyObject *outcome = PyObject_CallMethod((PyObject *)call, "outcome", NULL);
        if (outcome != NULL && PyArg_ParseTuple(outcome, "OOO", &keys, &nbytes, &result))
            counted = PyObject_CallMethod((PyObject *)record, "add", "dOO", monotonic_s() - call->start, keys, nbytes);
        if (counted != NULL) Py_INCREF(result);
        Py_XDECREF(outcome);
        Py_XDECREF(counted);
        return counted == NULL ? NULL : result;
    }
    if (!PyObject_TypeCheck((PyObject *)record, record_type)) {
        PyErr_SetString(PyExc_TypeError, "end: expected a Record");
        return NULL;
    }
    if (count_call(record, monotonic_s() - call->start)) return NULL;
    const Calls *calls = &call->batch->calls;
    for (size_t i = 0; i < calls->num_keys; i++)
        if (count_key(record, calls->works[i].key, moved_by(calls, &calls->works[i]))) return NULL;
    return call->has_new_outs ? give_outs(call) : Py_NewRef(Py_None);
}

static PyMemberDef call_members[] = {
    {"verb", T_OBJECT_EX, offsetof(Call, held[VERB]), READONLY, "``push``, ``pull`` or ``pushpull``."},
    {"key", T_OBJECT_EX, offsetof(Call, held[KEY]), READONLY, "The caller's argument."},
    {"value", T_OBJECT_EX, offsetof(Call, held[VALUE]), READONLY, "The caller's argument."},
    {"out", T_OBJECT_EX, offsetof(Call, held[OUT]), READONLY, "The caller's argument."},
    {"priority", T_OBJECT_EX, offsetof(Call, held[PRIORITY]), READONLY, "The caller's argument."},
    {"like", T_OBJECT_EX, offsetof(Call, held[LIKE]), READONLY, "The caller's argument."},
    {"ignore_sparse", T_OBJECT_EX, offsetof(Call, held[IGNORE_SPARSE]), READONLY, "The caller's argument."},
    {"values", T_OBJECT, offsetof(Call, held[VALUES]), 0,
     "Of a call that was looked at: an array, or a list; to be replaced by arrays that can be looked at."},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef call_methods[] = {
    {"look", (PyCFunction)call_look, METH_VARARGS,
     "look(entries, shard=None)\n--\n\n"
     "Return a Batch of what the call does, without a step if no shard is given; None if it is not plain."},
    {"run", (PyCFunction)call_run, METH_O,
     "run(shard)\n--\n\n"
     "Do the call with a shard, and return True.\n\n"
     "The interpreter's lock is held all the time: no other thread and no signal handler runs in between. A call that\n"
     "is long, is logged, has states to be completed or finds the shard in use is only looked at."},
    {"end", (PyCFunction)call_end, METH_NOARGS, "end()\n--\n\nCount the call, and return what the verb returns."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot call_slots[] = {
    {Py_tp_doc, (void *)call_doc},    {Py_tp_new, call_new},         {Py_tp_members, call_members},
    {Py_tp_methods, call_methods},    {Py_tp_traverse, call_traverse}, {Py_tp_clear, call_clear},
    {Py_tp_dealloc, call_dealloc},    {0, NULL},
};

static PyType_Spec call_spec = {"tensorkv.compiled._native.Call", sizeof(Call), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, call_slots};
