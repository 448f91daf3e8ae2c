/* An all-reduce of one call's plain arrays over the workers of a host, in memory that they share.
 *
 * Each owner updates some elements of the values. These are cut into pieces, and the pieces into buckets that fit into a
 * slot of a staging buffer. Of each bucket, every worker puts its sums of what others own into the slot, and each owner
 * adds the parts of all and updates its values; outs are written when all values are there. Where the sums of all keys
 * decide on the update, as with a bound on their norm, each owner keeps its sums and adds their squares; it updates its
 * values when the caller has said how. Where a worker may have to wait for long for another, ``advance`` returns, and
 * goes on there when it is called again. Included by _native.c.
 */

/* A piece of a key that one owner updates, and where its elements lie in a slot. */
typedef struct {
    Piece piece;
    uint64_t offset;
    size_t owner;
} Owned;

enum { FILLED, READ, READY, NUM_SLOT_WORDS };
enum { TO_STAGE, TO_AGREE, TO_REDUCE, TO_DECIDE, TO_UPDATE, TO_FILL_OUTS, DONE };
static const char *const PHASES[] = {"stage_in", "agree", "reduce", "decide", "update", "fill_outs", "done"};
/* Calls of at most so many bytes are made while Python's lock is held. */
enum { MAX_HELD_NBYTES = 64 << 10 };

PyDoc_STRVAR(reduce_doc,
             "SharedReduce(rank, size, room, spin_s, soon_s, stop, entered, agreed, entries, entry_step, slots, row, "
             "counts_at, words, data, uses)\n--\n\n"
             "Sums the parts of plain calls over the workers of a host, who share memory, and updates their values.\n\n"
             "Args:\n"
             "    rank, size: of this worker among those of the host, each of whom owns values.\n"
             "    room: the bytes of a bucket.\n"
             "    spin_s, soon_s: how long to wait without sleeping, and altogether, before ``advance`` returns.\n"
             "    stop: address of a word that ends every wait.\n"
             "    entered: addresses of the words of all workers that count the calls that they have entered.\n"
             "    agreed: address of this worker's word that counts the calls that it has compared.\n"
             "    entries, entry_step: where the first worker's entry of call 0 is, and the bytes to that of the next worker.\n"
             "    slots, row, counts_at, words, data: of the staging buffer: how many slots, the bytes of a worker in one, where\n"
             "        among these the counts of parts begin, and the addresses of words and of parts.\n"
             "    uses: address of 64-bit numbers that count how often each slot was used.");

typedef struct {
    PyObject_HEAD
    /* The workers, and what they share. */
    size_t rank, size, room, slots, row, counts_at;
    double spin, soon;
    Word *stop, *agreed;
    uint64_t *entered;
    char *entries, *words, *data;
    size_t entry_step;
    uint64_t *uses;
    /* The present call. */
    Batch *batch;
    Owned *owned;
    size_t *starts; /* where the pieces of each bucket begin, of each owner */
    size_t num_buckets, staged, reduced, ready;
    uint64_t *bucket_uses;
    unsigned long long number;
    size_t entry_offset;
    int phase;
    PyObject *members; /* a list of the workers that take part; NULL: all */
    uint64_t *awaited;
    /* Of a call whose update is decided on by all sums: these, of this worker's parts of the values, one after another,
     * each from the beginning of a line; the sum of the squares of the rescaled sums; and which keys are left out. The
     * memory of the sums stays for the next such call: to get it from the kernel takes as long as to sum. */
    int decides, is_refused;
    double rescale;
    size_t own_nbytes, summed_nbytes, sums_nbytes;
    char *sums, *left_out;
    ExactSum squares;
} SharedReduce;

static PyTypeObject *reduce_type;

static void drop_call(SharedReduce *reduce) {
    free_memory(reduce->owned);
    free_memory(reduce->starts);
    free_memory(reduce->bucket_uses);
    free_memory(reduce->left_out);
    reduce->owned = NULL;
    reduce->starts = NULL;
    reduce->bucket_uses = NULL;
    reduce->left_out = NULL;
    Py_CLEAR(reduce->members);
    Py_CLEAR(reduce->batch);
}

/* Have memory for so many bytes of sums; whether there is as much. */
static int reserve_sums(SharedReduce *reduce, size_t nbytes) {
    if (nbytes && nbytes <= reduce->sums_nbytes) return 1;
    free_memory(reduce->sums);
    reduce->sums = nbytes ? new_memory(nbytes) : NULL;
    reduce->sums_nbytes = reduce->sums == NULL ? 0 : nbytes;
    return reduce->sums_nbytes == nbytes;
}

static void reduce_dealloc(SharedReduce *reduce) {
    PyTypeObject *type = Py_TYPE((PyObject *)reduce);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    drop_call(reduce);
    reserve_sums(reduce, 0);
    PyMem_Free(reduce->entered);
    PyMem_Free(reduce->awaited);
    release(reduce);
    Py_DECREF(type);
}

static PyObject *reduce_new(PyTypeObject *type, PyObject *args, PyObject *named) {
    unsigned long long stop, agreed, entries, words, data, uses;
    Py_ssize_t rank, size, room, entry_step, slots, row, counts_at;
    double spin, soon;
    Py_buffer entered;
    (void)named;
    if (!PyArg_ParseTuple(args, "nnnddKy*KKnnnnKKK", &rank, &size, &room, &spin, &soon, &stop, &entered, &agreed, &entries,
                          &entry_step, &slots, &row, &counts_at, &words, &data, &uses))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    SharedReduce *reduce = size < 1 || size > MAX_COLUMNS || entered.len != 8 * size ? NULL : (SharedReduce *)allocate(type, 0);
    if (reduce != NULL) {
        reduce->rank = (size_t)rank, reduce->size = (size_t)size, reduce->room = (size_t)room;
        reduce->slots = (size_t)slots, reduce->row = (size_t)row, reduce->entry_step = (size_t)entry_step;
        reduce->counts_at = (size_t)counts_at;
        reduce->spin = spin, reduce->soon = soon;
        reduce->stop = word_at(stop), reduce->agreed = word_at(agreed);
        reduce->entries = (char *)(uintptr_t)entries;
        reduce->words = (char *)(uintptr_t)words, reduce->data = (char *)(uintptr_t)data;
        reduce->uses = (uint64_t *)(uintptr_t)uses;
        reduce->phase = DONE;
        reduce->entered = PyMem_Malloc(8 * (size_t)size);
        reduce->awaited = PyMem_Malloc(8 * (size_t)size);
        if (reduce->entered != NULL) memcpy(reduce->entered, entered.buf, 8 * (size_t)size);
        if (reduce->entered == NULL || reduce->awaited == NULL) Py_CLEAR(reduce);
    }
    PyBuffer_Release(&entered);
    if (reduce == NULL && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "SharedReduce: too many workers, or no memory");
    return (PyObject *)reduce;
}

/* ------------------------------------------------------------ pieces */

/* What one owner updates of a value: its first element, and how many. */
static size_t run_of(const Work *work, size_t owner, size_t *first) {
    if (work->owner != DIVIDED) {
        *first = 0;
        return work->owner == (int)owner ? work->numel : 0;
    }
    const Cell *cell = work->cell;
    size_t width = work->numel / (size_t)border_of(cell, PyList_Size(cell->borders) - 1);
    *first = (size_t)border_of(cell, (Py_ssize_t)owner) * width;
    return (size_t)border_of(cell, (Py_ssize_t)owner + 1) * width - *first;
}

static size_t sum_itemsize(const Work *work) { return ITEMSIZES[sum_dtype_of(work->dtype)]; }

static size_t in_lines(size_t nbytes) { return (nbytes + 63) / 64 * 64; }

typedef struct {
    size_t room, *filled, *counts; /* of each owner, the bytes of its runs so far; of each bucket and owner, pieces */
    Owned *owned;                  /* NULL: pieces are only counted */
    size_t owners;
} Cut;

/* Cut a run of an owner, which begins in the bytes of all of its runs where the one before has ended. */
static void cut_run(Cut *cut, size_t key, const Work *work, size_t owner) {
    size_t first, numel = run_of(work, owner, &first), itemsize = sum_itemsize(work);
    size_t low = cut->filled[owner], high = low + numel * itemsize;
    cut->filled[owner] = low + in_lines(numel * itemsize);
    for (size_t at = low; at < high;) {
        size_t bucket = at / cut->room, end = (bucket + 1) * cut->room < high ? (bucket + 1) * cut->room : high;
        size_t *place = &cut->counts[bucket * cut->owners + owner];
        if (cut->owned != NULL)
            cut->owned[*place] = (Owned){{(int64_t)key, (int64_t)(first + (at - low) / itemsize), (int64_t)((end - at) / itemsize)},
                                         at % cut->room,
                                         owner};
        ++*place;
        at = end;
    }
}

static void cut_runs(Cut *cut, const Batch *batch) {
    memset(cut->filled, 0, cut->owners * sizeof *cut->filled);
    for (size_t key = 0; key < batch->calls.num_keys; key++) {
        const Work *work = &batch->calls.works[key];
        if (work->owner >= 0) cut_run(cut, key, work, (size_t)work->owner);
        for (size_t owner = 0; owner < cut->owners && work->owner == DIVIDED; owner++) cut_run(cut, key, work, owner);
    }
}

/* Cut what each owner has to do into buckets, in each of which every owner finds about as much, as
 * ``tensorkv.engines.partition.cut`` does; whether there was memory. */
static int cut_call(SharedReduce *reduce) {
    const Batch *batch = reduce->batch;
    size_t owners = reduce->size, total = 0, most = 0;
    size_t filled[MAX_COLUMNS] = {0};
    Cut cut = {.room = reduce->room / owners / 64 * 64, .filled = filled, .owners = owners};
    if (cut.room < 64) cut.room = 64;
    for (size_t key = 0; key < batch->calls.num_keys; key++) {
        const Work *work = &batch->calls.works[key];
        for (size_t owner = 0, first; owner < owners; owner++)
            if (work->owner == DIVIDED || work->owner == (int)owner)
                filled[owner] += in_lines(run_of(work, owner, &first) * sum_itemsize(work));
    }
    for (size_t owner = 0; owner < owners; owner++) most = filled[owner] > most ? filled[owner] : most;
    reduce->own_nbytes = filled[reduce->rank];
    reduce->num_buckets = (most + cut.room - 1) / cut.room;
    size_t num_starts = reduce->num_buckets * owners;
    reduce->starts = new_zeros((num_starts + 1) * sizeof *reduce->starts);
    reduce->bucket_uses = new_zeros((reduce->num_buckets + 1) * sizeof *reduce->bucket_uses);
    if (reduce->starts == NULL || reduce->bucket_uses == NULL) return 0;
    cut.counts = reduce->starts;
    cut_runs(&cut, batch);
    for (size_t i = 0; i <= num_starts; i++) {
        size_t count = i < num_starts ? reduce->starts[i] : 0;
        reduce->starts[i] = total;
        total += count;
    }
    cut.owned = reduce->owned = new_memory((total + 1) * sizeof *reduce->owned);
    if (reduce->owned == NULL) return 0;
    cut_runs(&cut, batch);
    /* Each has moved to where the next begins. */
    memmove(reduce->starts + 1, reduce->starts, num_starts * sizeof *reduce->starts);
    reduce->starts[0] = 0;
    for (size_t bucket = 0; bucket < reduce->num_buckets; bucket++) {
        size_t before = 0;
        for (size_t owner = 0; owner < owners; owner++) {
            size_t at = bucket * owners + owner, low = bucket * cut.room;
            for (size_t i = reduce->starts[at]; i < reduce->starts[at + 1]; i++) reduce->owned[i].offset += before;
            before += filled[owner] <= low ? 0 : filled[owner] - low < cut.room ? filled[owner] - low : cut.room;
        }
    }
    return 1;
}

/* ------------------------------------------------------------ the stages of a bucket */

static size_t slot_of(const SharedReduce *reduce, size_t bucket) { return bucket % reduce->slots; }

static uint64_t slot_word(const SharedReduce *reduce, size_t bucket, int which, size_t worker) {
    size_t place = (slot_of(reduce, bucket) * NUM_SLOT_WORDS + (size_t)which) * reduce->size + worker;
    return (uint64_t)(uintptr_t)(reduce->words + 64 * place);
}

static char *staged_parts(const SharedReduce *reduce, size_t bucket, size_t worker) {
    return reduce->data + (slot_of(reduce, bucket) * reduce->size + worker) * reduce->row;
}

/* Of how many parts a worker's sum of a piece is made; a piece begins a line of the slot. */
static int64_t *staged_count(const SharedReduce *reduce, size_t bucket, size_t worker, const Owned *owned) {
    return (int64_t *)(void *)(staged_parts(reduce, bucket, worker) + reduce->counts_at) + owned->offset / 64;
}

/* Whether the owner of a piece can read this worker's own part where it is. */
static int is_read_there(const Batch *batch, const Owned *owned) {
    const Work *work = &batch->calls.works[owned->piece.key];
    return work->num_parts == 1 && !is_low(work->dtype);
}

/* Have the processor fetch what a piece that comes soon is of; ``stop`` ends the pieces of the bucket. */
static void fetch_piece(const SharedReduce *reduce, size_t index, size_t stop) {
    if (index + AHEAD < stop) fetch_cell(&reduce->batch->calls, (size_t)reduce->owned[index + AHEAD].piece.key);
    if (index + FETCHED_AHEAD < stop)
        fetch_arrays(&reduce->batch->calls, (size_t)reduce->owned[index + FETCHED_AHEAD].piece.key, 1, 0);
}

static void stage_bucket(SharedReduce *reduce, size_t bucket) {
    const size_t *starts = &reduce->starts[bucket * reduce->size];
    char *target = staged_parts(reduce, bucket, reduce->rank);
    for (size_t i = starts[0]; i < starts[reduce->size]; i++) {
        const Owned *owned = &reduce->owned[i];
        fetch_piece(reduce, i, starts[reduce->size]);
        if (reduce->batch->calls.averages)
            *staged_count(reduce, bucket, reduce->rank, owned) = reduce->batch->calls.works[owned->piece.key].num_parts;
        if (owned->owner == reduce->rank && is_read_there(reduce->batch, owned)) continue;
        uint64_t address = (uint64_t)(uintptr_t)(target + owned->offset);
        run_piece(reduce->batch, &owned->piece, &address, 1, 0, 0, owned->piece.count, 1, STAGE_PIECES);
    }
}

/* The place of a member among the workers. */
static size_t member(const SharedReduce *reduce, size_t index) {
    return reduce->members == NULL ? index : PyLong_AsSize_t(PyList_GetItem(reduce->members, (Py_ssize_t)index));
}

static size_t num_members(const SharedReduce *reduce) {
    return reduce->members == NULL ? reduce->size : (size_t)PyList_Size(reduce->members);
}

/* This worker's sums of a key, which begin at some address, as the parts of an update. */
static Item item_of_sums(const Work *work, const char **address) {
    int dtype = work->dtype;
    *address = (const char *)((uintptr_t)*address - work->own_first * ITEMSIZES[sum_dtype_of(dtype)]);
    return (Item){.parts = address, .num_parts = 1, .has_wide_parts = is_low(dtype)};
}

/* Sum a piece of this worker's, and add the squares of the groups of elements that end in it while they are in cache. */
static void keep_sums(SharedReduce *reduce, const Piece *piece, const uint64_t *addresses, size_t count, double divisor) {
    enum { AT_A_TIME = 2 * BLOCK };
    const Work *work = &reduce->batch->calls.works[piece->key];
    int dtype = work->dtype;
    size_t itemsize = sum_itemsize(work), begin = work->own_first, end = begin + work->own_numel;
    size_t first = (size_t)piece->first, stop = first + (size_t)piece->count;
    const char *parts[MAX_COLUMNS], *kept;
    if (first == begin) reduce->summed_nbytes = in_lines(reduce->summed_nbytes);
    kept = reduce->sums + reduce->summed_nbytes - (first - begin) * itemsize;
    reduce->summed_nbytes += (stop - first) * itemsize;
    Item squared = item_of_sums(work, &kept);
    char *target = (char *)(uintptr_t)kept;
    for (size_t i = 0; i < count; i++) parts[i] = before(addresses[i], piece, sum_dtype_of(dtype));
    Item item = {.parts = parts, .outs = &target, .num_parts = count, .num_outs = 1, .divisor = divisor};
    item.has_wide_parts = item.has_wide_outs = is_low(dtype);
    for (size_t at = first; at < stop; at += AT_A_TIME) {
        size_t to = stop - at < AT_A_TIME ? stop : at + AT_A_TIME;
        size_t low = begin + (at - begin) / GROUP * GROUP, high = to == end ? end : begin + (to - begin) / GROUP * GROUP;
        run_item(&item, dtype, NULL, at, to);
        if (dtype <= BFLOAT16) square_item(&squared, dtype, reduce->rescale, low, high, &reduce->squares);
    }
}

/* Where this worker's sums of a key begin; ``at`` is where those of the key before have ended. NULL: it has none. */
static const char *kept_sums(const SharedReduce *reduce, const Work *work, size_t *at) {
    const char *kept = reduce->sums + *at;
    *at += in_lines(work->own_numel * sum_itemsize(work));
    return work->own_numel ? kept : NULL;
}

static int is_left_out(const SharedReduce *reduce, size_t key) { return reduce->left_out != NULL && reduce->left_out[key]; }

/* Update this worker's parts of the values by the sums that it has kept. */
static void update_by_sums(SharedReduce *reduce) {
    size_t at = 0;
    for (size_t i = 0; i < reduce->batch->calls.num_keys && !reduce->is_refused; i++) {
        const Work *work = &reduce->batch->calls.works[i];
        fetch_cell(&reduce->batch->calls, i + AHEAD);
        const char *kept = kept_sums(reduce, work, &at);
        if (kept == NULL || is_left_out(reduce, i)) continue;
        Step step;
        Item item = item_of_work(&reduce->batch->calls, work), sums = item_of_sums(work, &kept);
        item.parts = sums.parts, item.num_parts = sums.num_parts, item.has_wide_parts = sums.has_wide_parts;
        item.num_outs = 0, item.divisor = 0;
        run_item(&item, work->dtype, step_for(reduce->batch, work, &step), work->own_first,
                 work->own_first + work->own_numel);
    }
}

static void reduce_bucket(SharedReduce *reduce, size_t bucket, const size_t *members, size_t count) {
    const size_t *starts = &reduce->starts[bucket * reduce->size + reduce->rank];
    const char *bases[MAX_COLUMNS];
    for (size_t j = 0; j < count; j++) bases[j] = staged_parts(reduce, bucket, members[j]);
    for (size_t i = starts[0]; i < starts[1]; i++) {
        const Owned *owned = &reduce->owned[i];
        const Work *work = &reduce->batch->calls.works[owned->piece.key];
        uint64_t addresses[MAX_COLUMNS];
        double divisor = 0;
        fetch_piece(reduce, i, starts[1]);
        for (size_t j = 0; j < count && reduce->batch->calls.averages; j++)
            divisor += (double)*staged_count(reduce, bucket, members[j], owned);
        for (size_t j = 0; j < count; j++) addresses[j] = (uint64_t)(uintptr_t)(bases[j] + owned->offset);
        for (size_t j = 0; j < count; j++)
            if (members[j] == reduce->rank && is_read_there(reduce->batch, owned))
                addresses[j] = (uint64_t)(uintptr_t)(reduce->batch->calls.addresses[work->first_part] +
                                                     (size_t)owned->piece.first * ITEMSIZES[work->dtype]);
        if (reduce->decides)
            keep_sums(reduce, &owned->piece, addresses, count, divisor);
        else
            run_piece(reduce->batch, &owned->piece, addresses, count, divisor, 0, owned->piece.count, 1, UPDATE_PIECES);
    }
}

static void copy_to_outs(Batch *batch) {
    for (size_t i = 0; i < batch->calls.num_keys; i++) {
        const Work *work = &batch->calls.works[i];
        Item item = item_of_work(&batch->calls, work);
        fetch_arrays(&batch->calls, i + FETCHED_AHEAD, 0, !batch->past_cache);
        item.num_parts = 0;
        item.num_past_cache = batch->past_cache ? item.num_outs : 0;
        run_item(&item, work->dtype, NULL, 0, work->numel);
    }
#if defined(__x86_64__)
    if (batch->past_cache) _mm_sfence();
#endif
}

/* ------------------------------------------------------------ a call */

/* Wait a moment for a word of each worker; NULL: all have the count. Else what Python is to wait for: the words, the
 * count, and the workers, if they are not the first ones. */
static PyObject *await(SharedReduce *reduce, size_t count, uint64_t least, int *failed) {
    size_t done = count_reached(reduce->awaited, count, least);
    if (done < count) {
        Py_BEGIN_ALLOW_THREADS;
        done = wait_for_words(reduce->awaited, count, done, least, reduce->stop, reduce->soon, reduce->spin);
        Py_END_ALLOW_THREADS;
    }
    if (done == count) return NULL;
    PyObject *members = reduce->members == NULL || reduce->phase != TO_REDUCE ? Py_None : reduce->members;
    PyObject *found = Py_BuildValue("y#KO", (const char *)reduce->awaited, (Py_ssize_t)(8 * count),
                                    (unsigned long long)least, members);
    *failed = found == NULL;
    return found;
}

static PyObject *await_slot(SharedReduce *reduce, size_t bucket, int which, uint64_t least, int *failed) {
    size_t count = which == FILLED ? num_members(reduce) : reduce->size;
    for (size_t i = 0; i < count; i++)
        reduce->awaited[i] = slot_word(reduce, bucket, which, which == FILLED ? member(reduce, i) : i);
    return await(reduce, count, least, failed);
}

static void store_slot(SharedReduce *reduce, size_t bucket, int which) {
    store_word(word_at(slot_word(reduce, bucket, which, reduce->rank)), reduce->bucket_uses[bucket]);
}

/* Whether all workers have entered the same call. */
static int have_same_entries(const SharedReduce *reduce) {
    const char *first = reduce->entries + reduce->entry_offset;
    for (size_t i = 1; i < reduce->size; i++)
        if (memcmp(first, first + i * reduce->entry_step, 8)) return 0;
    return 1;
}

/* What follows when no bucket is to be reduced any more. */
static int phase_after_sums(SharedReduce *reduce) {
    static const ExactSum nothing;
    if (!reduce->decides) return TO_FILL_OUTS;
    merge_exact(&reduce->squares, &nothing);
    return TO_DECIDE;
}

/* Do what comes next; NULL: it is done. Else what is to be waited for, False where the entries differ, or True where
 * ``decide`` is to be called. */
static PyObject *advance_call(SharedReduce *reduce, int *failed) {
    PyObject *found;
    size_t members[MAX_COLUMNS], count;
    int is_long = reduce->batch->calls.total_nbytes > MAX_HELD_NBYTES;
    PyThreadState *state = NULL;
    switch (reduce->phase) {
        case TO_STAGE:
            found = await_slot(reduce, reduce->staged, READ, reduce->bucket_uses[reduce->staged] - 1, failed);
            if (found != NULL || *failed) return found;
            if (is_long) state = PyEval_SaveThread();
            stage_bucket(reduce, reduce->staged);
            if (is_long) PyEval_RestoreThread(state);
            store_slot(reduce, reduce->staged++, FILLED);
            reduce->phase = reduce->staged == 1 ? TO_AGREE : TO_REDUCE;
            return NULL;
        case TO_AGREE:
            memcpy(reduce->awaited, reduce->entered, 8 * reduce->size);
            if (reduce->members == NULL) {
                found = await(reduce, reduce->size, reduce->number + 1, failed);
                if (found != NULL || *failed) return found;
                if (!have_same_entries(reduce)) return Py_NewRef(Py_False);
                store_word(reduce->agreed, reduce->number + 1);
            }
            if (reduce->num_buckets == 0)
                reduce->phase = phase_after_sums(reduce);
            else
                reduce->phase = reduce->num_buckets > 1 ? TO_STAGE : TO_REDUCE;
            return NULL;
        case TO_REDUCE:
            found = await_slot(reduce, reduce->reduced, FILLED, reduce->bucket_uses[reduce->reduced], failed);
            if (found != NULL || *failed) return found;
            count = num_members(reduce);
            for (size_t i = 0; i < count; i++) members[i] = member(reduce, i);
            if (is_long) state = PyEval_SaveThread();
            reduce_bucket(reduce, reduce->reduced, members, count);
            if (is_long) PyEval_RestoreThread(state);
            store_slot(reduce, reduce->reduced, READ);
            if (!reduce->decides) store_slot(reduce, reduce->reduced, READY);
            if (++reduce->reduced == reduce->num_buckets)
                reduce->phase = phase_after_sums(reduce);
            else
                reduce->phase = reduce->staged < reduce->num_buckets ? TO_STAGE : TO_REDUCE;
            return NULL;
        case TO_DECIDE:
            return Py_NewRef(Py_True);
        case TO_UPDATE:
            if (is_long) state = PyEval_SaveThread();
            update_by_sums(reduce);
            if (is_long) PyEval_RestoreThread(state);
            for (size_t bucket = 0; bucket < reduce->num_buckets; bucket++) store_slot(reduce, bucket, READY);
            reduce->phase = reduce->is_refused ? DONE : TO_FILL_OUTS;
            return NULL;
        case TO_FILL_OUTS:
            for (; reduce->ready < reduce->num_buckets; reduce->ready++) {
                found = await_slot(reduce, reduce->ready, READY, reduce->bucket_uses[reduce->ready], failed);
                if (found != NULL || *failed) return found;
            }
            if (is_long) state = PyEval_SaveThread();
            copy_to_outs(reduce->batch);
            if (is_long) PyEval_RestoreThread(state);
            count_done(reduce->batch, 1, reduce->left_out);
            reduce->phase = DONE;
    }
    return NULL;
}

static PyObject *reduce_begin(SharedReduce *reduce, PyObject *args) {
    PyObject *given, *rescale = Py_None;
    Py_ssize_t entry_offset;
    if (!PyArg_ParseTuple(args, "OKn|O", &given, &reduce->number, &entry_offset, &rescale)) return NULL;
    double factor = rescale == Py_None ? 1 : PyFloat_AsDouble(rescale);
    if (PyErr_Occurred()) return NULL;
    Batch *batch = (Batch *)given;
    if (!PyObject_TypeCheck(given, batch_type) || !batch->pushes || batch->is_remote || !batch->has_wholes) {
        PyErr_SetString(PyExc_ValueError, "begin: expected a batch with parts, of cells with owners");
        return NULL;
    }
    drop_call(reduce);
    reduce->batch = (Batch *)Py_NewRef(given);
    reduce->decides = rescale != Py_None;
    reduce->is_refused = 0;
    reduce->rescale = factor;
    reduce->summed_nbytes = 0;
    memset(&reduce->squares, 0, sizeof reduce->squares);
    if (!cut_call(reduce) || !reserve_sums(reduce, reduce->decides ? reduce->own_nbytes + 1 : 0)) {
        drop_call(reduce);
        return PyErr_NoMemory();
    }
    for (size_t bucket = 0; bucket < reduce->num_buckets; bucket++)
        reduce->bucket_uses[bucket] = ++reduce->uses[slot_of(reduce, bucket)];
    reduce->staged = reduce->reduced = reduce->ready = 0;
    reduce->entry_offset = (size_t)entry_offset;
    reduce->phase = reduce->num_buckets ? TO_STAGE : TO_AGREE;
    return Py_NewRef(Py_None);
}

static PyObject *reduce_step(SharedReduce *reduce, PyObject *none) {
    int failed = 0;
    (void)none;
    PyObject *found = reduce->phase == DONE ? NULL : advance_call(reduce, &failed);
    if (reduce->phase == DONE) drop_call(reduce);
    return failed ? NULL : found != NULL ? found : Py_NewRef(Py_None);
}

static PyObject *reduce_advance(SharedReduce *reduce, PyObject *none) {
    PyObject *found = Py_NewRef(Py_None);
    while (found == Py_None && reduce->phase != DONE) {
        Py_DECREF(found);
        found = reduce_step(reduce, none);
    }
    return found;
}

static PyObject *reduce_phase(SharedReduce *reduce, void *closure) {
    (void)closure;
    return PyUnicode_FromString(PHASES[reduce->phase]);
}

static PyObject *reduce_squares(SharedReduce *reduce, void *closure) {
    (void)closure;
    return pack_exact(&reduce->squares);
}

static int is_to_decide(const SharedReduce *reduce) {
    if (reduce->phase == TO_DECIDE) return 1;
    PyErr_SetString(PyExc_ValueError, "expected a call that is to be decided on");
    return 0;
}

static PyObject *reduce_count_nonfinite(SharedReduce *reduce, PyObject *none) {
    size_t at = 0;
    (void)none;
    PyObject *found = is_to_decide(reduce) ? PyDict_New() : NULL;
    for (size_t i = 0; found != NULL && i < reduce->batch->calls.num_keys; i++) {
        const Work *work = &reduce->batch->calls.works[i];
        const char *kept = kept_sums(reduce, work, &at);
        if (kept == NULL || work->dtype > BFLOAT16) continue;
        Item item = item_of_sums(work, &kept);
        size_t first = work->own_first, count;
        if ((count = count_nonfinite(&item, work->dtype, first, first + work->own_numel)) == 0) continue;
        PyObject *place = PyLong_FromSize_t(i), *number = PyLong_FromSize_t(count);
        if (place == NULL || number == NULL || PyDict_SetItem(found, place, number)) Py_CLEAR(found);
        Py_XDECREF(place);
        Py_XDECREF(number);
    }
    return found;
}

static PyObject *reduce_leave_out(SharedReduce *reduce, PyObject *args) {
    static const ExactSum nothing;
    const char *left_out;
    Py_ssize_t length;
    size_t at = 0;
    if (!PyArg_ParseTuple(args, "y#", &left_out, &length) || !is_to_decide(reduce)) return NULL;
    if ((size_t)length != reduce->batch->calls.num_keys)
        return PyErr_Format(PyExc_ValueError, "expected a byte for each key");
    free_memory(reduce->left_out);
    reduce->left_out = new_memory((size_t)length);
    if (reduce->left_out == NULL) return PyErr_NoMemory();
    memcpy(reduce->left_out, left_out, (size_t)length);
    memset(&reduce->squares, 0, sizeof reduce->squares);
    for (size_t i = 0; i < reduce->batch->calls.num_keys; i++) {
        const Work *work = &reduce->batch->calls.works[i];
        const char *kept = kept_sums(reduce, work, &at);
        if (kept == NULL || work->dtype > BFLOAT16 || is_left_out(reduce, i)) continue;
        Item item = item_of_sums(work, &kept);
        size_t first = work->own_first;
        square_item(&item, work->dtype, reduce->rescale, first, first + work->own_numel, &reduce->squares);
    }
    merge_exact(&reduce->squares, &nothing);
    return Py_NewRef(Py_None);
}

static PyObject *reduce_decide(SharedReduce *reduce, PyObject *args) {
    double scale;
    if (!PyArg_ParseTuple(args, "d", &scale) || !is_to_decide(reduce)) return NULL;
    reduce->batch->scale = scale;
    reduce->phase = TO_UPDATE;
    return Py_NewRef(Py_None);
}

static PyObject *reduce_refuse(SharedReduce *reduce, PyObject *none) {
    (void)none;
    if (!is_to_decide(reduce)) return NULL;
    reduce->is_refused = 1;
    reduce->phase = TO_UPDATE;
    return Py_NewRef(Py_None);
}

static PyGetSetDef reduce_attributes[] = {
    {"phase", (getter)reduce_phase, NULL,
     "What comes next: stage_in, agree, reduce, decide, update, fill_outs; or done.", NULL},
    {"squares", (getter)reduce_squares, NULL,
     "Of a call that is to be decided on, the sum of the squares of this worker's sums, as of a batch.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyObject *reduce_agree(SharedReduce *reduce, PyObject *members) {
    if (!PyList_Check(members) || PyList_Size(members) > (Py_ssize_t)reduce->size) {
        PyErr_SetString(PyExc_ValueError, "agree: expected a list of workers");
        return NULL;
    }
    Py_XDECREF(reduce->members);
    reduce->members = PyList_GetSlice(members, 0, PyList_Size(members));
    return reduce->members == NULL ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef reduce_methods[] = {
    {"begin", (PyCFunction)reduce_begin, METH_VARARGS,
     "begin(batch, number, entry, rescale=None)\n--\n\n"
     "Begin a call that this worker has entered.\n\n"
     "Args:\n"
     "    batch: what it does.\n"
     "    number: of the call.\n"
     "    entry: where its entries are.\n"
     "    rescale: a factor on sums before they are squared, if all sums decide on the update; None: they do not."},
    {"advance", (PyCFunction)reduce_advance, METH_NOARGS,
     "advance()\n--\n\n"
     "Go on with the call, and return None when it is done, its outs are written and it is counted.\n\n"
     "Returns:\n"
     "    What is to be waited for before it is called again: addresses of words, the count, and the workers whose words\n"
     "    these are (None: the first ones); False: the workers have not entered the same call, or have left; or True:\n"
     "    the sums are made, and ``decide`` or ``refuse`` is to be called."},
    {"step", (PyCFunction)reduce_step, METH_NOARGS,
     "step()\n--\n\nGo on by one phase of one bucket; None if that was done, otherwise what ``advance`` returns."},
    {"agree", (PyCFunction)reduce_agree, METH_O,
     "agree(members)\n--\n\nSay which workers take part in the present call, if not all do."},
    {"count_nonfinite", (PyCFunction)reduce_count_nonfinite, METH_NOARGS,
     "count_nonfinite()\n--\n\n"
     "Return, by the places of keys, how many of this worker's sums are NaN or Inf, without those that have none."},
    {"leave_out", (PyCFunction)reduce_leave_out, METH_VARARGS,
     "leave_out(which)\n--\n\n"
     "Leave out keys for which there is a byte that is not 0, also of ``squares``; their values stay as they are."},
    {"decide", (PyCFunction)reduce_decide, METH_VARARGS,
     "decide(scale)\n--\n\nHave ``advance`` update values by the sums times a number."},
    {"refuse", (PyCFunction)reduce_refuse, METH_NOARGS,
     "refuse()\n--\n\nHave ``advance`` end the call; neither values nor outs change."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot reduce_slots[] = {
    {Py_tp_doc, (void *)reduce_doc},
    {Py_tp_new, reduce_new},
    {Py_tp_methods, reduce_methods},
    {Py_tp_getset, reduce_attributes},
    {Py_tp_dealloc, reduce_dealloc},
    {0, NULL},
};

static PyType_Spec reduce_spec = {"tensorkv.compiled._native.SharedReduce", sizeof(SharedReduce), 0, Py_TPFLAGS_DEFAULT,
                                  reduce_slots};
