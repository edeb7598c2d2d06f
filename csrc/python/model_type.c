/* model_type.c - `_core.Model`: packing weights, traces and readouts. */
#include "python/common.h"
#include "python/exits.h"

#include "base/cpu.h"
#include "engine/trace.h"
#include "tap/plan.h"

int ouro_model_lock(model_object *m)
{
    unsigned long me = PyThread_get_thread_ident();
    if (!PyThread_acquire_lock(m->lock, NOWAIT_LOCK)) {
        if (m->holder == me) {           /* only Python code called by the pass itself can come here */
            PyErr_SetString(PyExc_RuntimeError, "the model is in the middle of a call: a hook or an exit rule can not run it again");
            return 0;
        }
        Py_BEGIN_ALLOW_THREADS
        PyThread_acquire_lock(m->lock, WAIT_LOCK);
        Py_END_ALLOW_THREADS
    }
    m->holder = me;
    return 1;
}

void ouro_model_unlock(model_object *m)
{
    m->holder = 0;
    PyThread_release_lock(m->lock);
}

int ouro_plan_of(const model_object *m, PyObject *plan, const ouro_observer **observer)
{
    *observer = NULL;
    if (plan == Py_None) return 1;
    PyObject *module = PyType_GetModuleByDef(Py_TYPE((PyObject *)(uintptr_t)m), &ouro_core_module);
    module_state *state = module ? PyModule_GetState(module) : NULL;
    if (!state) return 0;
    if (!PyObject_TypeCheck(plan, state->plan_type)) {
        PyErr_Format(PyExc_TypeError, "plan is %s, expected a Plan or None", Py_TYPE(plan)->tp_name);
        return 0;
    }
    const plan_object *p = (const plan_object *)plan;
    if (p->n_layers != m->model->config.n_layers || p->n_heads != m->model->config.n_heads || p->n_kv_heads != m->model->config.n_kv_heads) {
        PyErr_SetString(PyExc_ValueError, "the plan was made for a model of another shape");
        return 0;
    }
    *observer = ouro_plan_observer(p->plan);
    return 1;
}

int ouro_model_is_ready(const model_object *m)
{
    if (m->ws) return 1;
    PyErr_SetString(PyExc_RuntimeError, "the model is not ready: put all weights, then call finish()");
    return 0;
}

/* ---- making one ------------------------------------------------------------------------------------------------ */

static const char *const format_names[] = {"float32", "bfloat16", "int8", "int4"};

const char *ouro_format_name(int format) { return format_names[format]; }

int ouro_format_by_name(const char *name)
{
    for (int i = 0; i < 4; i++)
        if (strcmp(name, format_names[i]) == 0) return i;
    PyErr_Format(PyExc_ValueError, "unknown format '%s', expected float32, bfloat16, int8 or int4", name);
    return -1;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_layers", "n_steps", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp",
                            "d_vocab", "n_ctx", "eps", "rope_theta", "tie_word_embeddings", "compute", "layers", "o",
                            "down", "head", "embed", "isa", NULL};
    ouro_config c = {0};
    const char *compute_name, *format_name[5], *isa = NULL;
    int tied = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiiiiiiiifdpssssss|z", names, &c.n_layers, &c.n_steps, &c.n_heads,
                                     &c.n_kv_heads, &c.d_model, &c.d_head, &c.d_mlp, &c.d_vocab, &c.n_ctx, &c.eps,
                                     &c.rope_theta, &tied, &compute_name, &format_name[0], &format_name[1],
                                     &format_name[2], &format_name[3], &format_name[4], &isa))
        return NULL;
    c.tied = tied;
    int compute = ouro_format_by_name(compute_name), format[5];
    if (compute < 0) return NULL;
    for (int i = 0; i < 5; i++)
        if ((format[i] = ouro_format_by_name(format_name[i])) < 0) return NULL;
    model_object *self = (model_object *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->lock = PyThread_allocate_lock();
    ouro_formats f = {(ouro_format)format[0], (ouro_format)format[1], (ouro_format)format[2], (ouro_format)format[3],
                      (ouro_format)format[4]};
    int status = self->lock ? ouro_model_new(&c, (ouro_compute)compute, &f, isa, &self->model) : OURO_ERR_MEMORY;
    if (status == OURO_OK) return (PyObject *)self;
    Py_DECREF(self);
    return ouro_raise(status);
}

static void model_dealloc(PyObject *o)
{
    model_object *self = (model_object *)o;
    PyTypeObject *type = Py_TYPE(o);
    ouro_workspace_free(self->ws);
    ouro_model_free(self->model);
    ouro_blas_close(self->blas);
    if (self->lock) PyThread_free_lock(self->lock);
    type->tp_free(o);
    Py_DECREF(type);
}

static PyObject *model_put(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    int tensor, layer, dtype, row0, rows, cols;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "iiiiy*", &tensor, &layer, &dtype, &row0, &data)) return NULL;
    int status = OURO_ERR_ARGUMENT;
    if ((unsigned)tensor >= OURO_N_TENSORS || (unsigned)dtype > OURO_DT_F32) {
        ouro_fail(status, "unknown tensor %d or dtype %d", tensor, dtype);
    } else {
        ouro_tensor_shape(&self->model->config, (ouro_tensor)tensor, &rows, &cols);
        Py_ssize_t row = (Py_ssize_t)cols * (Py_ssize_t)ouro_dtype_size((ouro_dtype)dtype);
        if (data.len % row || data.len / row > rows) {
            ouro_fail(status, "%s: %zd bytes are not whole rows of %zd bytes, at most %d of them",
                      ouro_tensor_name((ouro_tensor)tensor), data.len, row, rows);
        } else {
            Py_BEGIN_ALLOW_THREADS
            status = ouro_model_put(self->model, (ouro_tensor)tensor, layer, (ouro_dtype)dtype, row0, (int)(data.len / row), data.buf);
            Py_END_ALLOW_THREADS
        }
    }
    PyBuffer_Release(&data);
    if (status != OURO_OK) return ouro_raise(status);
    Py_RETURN_NONE;
}

/* put_int4(tensor, layer, scales, q): a whole matrix of a layer; scales uint16 [rows, groups], q int8 [rows, cols] */
static PyObject *model_put_int4(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    int tensor, layer, rows, cols, status = OURO_ERR_ARGUMENT;
    Py_buffer scales, q;
    if (!PyArg_ParseTuple(args, "iiy*y*", &tensor, &layer, &scales, &q)) return NULL;
    if ((unsigned)tensor >= OURO_N_TENSORS) {
        ouro_fail(status, "unknown tensor %d", tensor);
    } else {
        ouro_tensor_shape(&self->model->config, (ouro_tensor)tensor, &rows, &cols);
        Py_ssize_t groups = (cols + OURO_GROUP4 - 1) / OURO_GROUP4;
        if (scales.len != 2 * rows * groups || q.len != (Py_ssize_t)rows * cols)
            ouro_fail(status, "%s: %zd bytes of scales and %zd of q, expected %zd and %zd", ouro_tensor_name((ouro_tensor)tensor),
                      scales.len, q.len, 2 * rows * groups, (Py_ssize_t)rows * cols);
        else status = ouro_model_put_int4(self->model, (ouro_tensor)tensor, layer, 0, rows, scales.buf, q.buf);
    }
    PyBuffer_Release(&scales);
    PyBuffer_Release(&q);
    if (status != OURO_OK) return ouro_raise(status);
    Py_RETURN_NONE;
}

static PyObject *model_finish(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    int threads, kv;
    const char *kv_name, *blas = NULL;
    if (!PyArg_ParseTuple(args, "is|z", &threads, &kv_name, &blas) || (kv = ouro_format_by_name(kv_name)) < 0) return NULL;
    if (self->ws) {
        PyErr_SetString(PyExc_RuntimeError, "the model is finished already");
        return NULL;
    }
    int status = ouro_model_finish(self->model);
    if (status == OURO_OK && blas) {
        status = ouro_blas_open(blas, &self->blas);
        self->model->blas = self->blas;
    }
    if (status == OURO_OK) status = ouro_workspace_new(self->model, (ouro_kv_dtype)kv, threads, &self->ws);
    if (status != OURO_OK) return ouro_raise(status);
    Py_RETURN_NONE;
}

/* weight(tensor, layer, row0, n_rows) -> [n_rows, cols] */
static PyObject *model_weight(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    int tensor, layer, row0, n_rows, rows, cols;
    if (!PyArg_ParseTuple(args, "iiii", &tensor, &layer, &row0, &n_rows)) return NULL;
    if ((unsigned)tensor >= OURO_N_TENSORS || n_rows < 0)
        return PyErr_Format(PyExc_ValueError, "tensor %d, %d rows: no such tensor or number", tensor, n_rows);
    ouro_tensor_shape(&self->model->config, (ouro_tensor)tensor, &rows, &cols);
    npy_intp shape[2] = {n_rows <= rows ? n_rows : 0, cols};
    PyObject *array = ouro_new_floats(2, shape, 0);
    if (!array) return NULL;
    int status = ouro_model_get(self->model, (ouro_tensor)tensor, layer, row0, n_rows, PyArray_DATA((PyArrayObject *)array));
    if (status == OURO_OK) return array;
    Py_DECREF(array);
    return ouro_raise(status);
}

/* ---- traces ------------------------------------------------------------------------------------------------------ */

/* Borrowed pointers and lengths of a sequence of int32 arrays; the arrays are kept by `owners` (a list). */
typedef struct batch {
    int n, longest, ragged;
    const int32_t **tokens;
    int32_t *lengths;
    PyObject *owners;
} batch;

static void batch_fini(batch *b)
{
    PyMem_Free(b->tokens);
    PyMem_Free(b->lengths);
    Py_XDECREF(b->owners);
}

static int batch_init(batch *b, PyObject *sequences)
{
    memset(b, 0, sizeof *b);
    PyObject *fast = PySequence_Fast(sequences, "expected a sequence of int32 arrays");
    if (!fast) return 0;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
    b->owners = PyList_New(0);
    b->tokens = PyMem_Calloc((size_t)n + 1, sizeof *b->tokens);
    b->lengths = PyMem_Calloc((size_t)n + 1, sizeof *b->lengths);
    int ok = b->owners && b->tokens && b->lengths && n <= INT32_MAX;
    for (Py_ssize_t i = 0; ok && i < n; i++) {
        PyObject *a = PyArray_FROMANY(PySequence_Fast_GET_ITEM(fast, i), NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY);
        ok = a && PyList_Append(b->owners, a) == 0 && PyArray_SIZE((PyArrayObject *)a) <= INT32_MAX;
        if (ok) {
            b->tokens[i] = PyArray_DATA((PyArrayObject *)a);
            b->lengths[i] = (int32_t)PyArray_SIZE((PyArrayObject *)a);
            b->longest = b->lengths[i] > b->longest ? b->lengths[i] : b->longest;
            b->ragged |= b->lengths[i] != b->lengths[0];
        }
        Py_XDECREF(a);
    }
    b->n = (int)n;
    Py_DECREF(fast);
    if (!ok) batch_fini(b);
    if (!ok && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the batch is too large");
    return ok;
}

/* The passes of a program: [(step, layers, closes), ...] or None. `layers` (a list) owns the arrays. */
static int read_turns(PyObject *program, ouro_turn **turns, int *n, PyObject **layers)
{
    *turns = NULL, *n = 0, *layers = NULL;
    if (program == Py_None) return 1;
    Py_ssize_t size = PySequence_Size(program);
    if (size < 0) return 0;
    *turns = PyMem_Calloc((size_t)size + 1, sizeof **turns);
    *layers = PyList_New(0);
    if (!*turns) PyErr_NoMemory();
    if (!*turns || !*layers || size > INT32_MAX) return 0;
    *n = (int)size;
    int opens = 1;
    for (Py_ssize_t i = 0; i < size; i++) {
        PyObject *item = PySequence_GetItem(program, i), *list = NULL;
        int step, closes, ok = item && PyArg_ParseTuple(item, "iOp", &step, &list, &closes);
        PyArrayObject *a = ok ? (PyArrayObject *)PyArray_FROMANY(list, NPY_INT, 1, 1, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST) : NULL;
        ok = a && PyList_Append(*layers, (PyObject *)a) == 0;
        if (ok) (*turns)[i] = (ouro_turn){step, {PyArray_DATA(a), (int)PyArray_SIZE(a), true, opens, closes}};
        opens = closes;
        Py_XDECREF(a);
        Py_XDECREF(item);
        if (!ok) return 0;
    }
    return 1;
}

/* trace(sequences, n_steps, logits, max_lanes, plan=None, program=None, kept=None) -> (states, gate_logit, logits or None) of the
 * positions that were run: with kept pages those behind the ones they hold */
static PyObject *model_trace(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    PyObject *sequences, *states = NULL, *gate = NULL, *logits = NULL, *result = NULL, *plan = Py_None, *program = Py_None, *layers;
    PyObject *kept_in = Py_None;
    ouro_kept *kept;
    int n_steps, want, max_lanes, n_turns;
    ouro_turn *turns;
    batch b;
    if (!PyArg_ParseTuple(args, "Oiii|OOO", &sequences, &n_steps, &want, &max_lanes, &plan, &program, &kept_in)
        || !ouro_model_is_ready(self) || !ouro_kept_of(self, kept_in, &kept))
        return NULL;
    const ouro_observer *observer = NULL;
    if (!ouro_plan_of(self, plan, &observer)) return NULL;
    if (n_steps < 1 || n_steps > OURO_MAX_STEPS)
        return PyErr_Format(PyExc_ValueError, "n_steps is %d, expected 1 to %d", n_steps, OURO_MAX_STEPS);
    if (!batch_init(&b, sequences)) return NULL;
    const ouro_config *c = &self->model->config;
    int locked = 0;
    if (!read_turns(program, &turns, &n_turns, &layers) || !(locked = ouro_model_lock(self))) goto done;
    /* from here on no other thread moves what is kept */
    int rows = b.longest - (kept && kept->done < b.longest ? kept->done : 0);
    npy_intp shape[4] = {n_steps, b.n, rows, c->d_model};
    states = ouro_new_floats(4, shape, b.ragged);
    gate = states ? ouro_new_floats(3, shape, b.ragged) : NULL;
    shape[0] = want == 2 ? n_steps : 1;
    if (want == 3) shape[2] = 1;
    shape[3] = c->d_vocab;
    if (gate && want) logits = ouro_new_floats(4, shape, b.ragged);
    if (gate && (logits || !want)) {
        ouro_trace t = {.tokens = b.tokens, .lengths = b.lengths, .batch = b.n, .pos = rows, .n_steps = n_steps,
                        .max_lanes = max_lanes, .states = PyArray_DATA((PyArrayObject *)states),
                        .gate_logit = PyArray_DATA((PyArrayObject *)gate),
                        .logits = logits ? PyArray_DATA((PyArrayObject *)logits) : NULL, .all_logits = want == 2, .next_only = want == 3,
                        .turns = turns, .n_turns = n_turns, .observer = observer, .kept = kept};
        poll_clock clock = {0};
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = ouro_trace_run(self->ws, &t, ouro_poll_signals, &clock);
        Py_END_ALLOW_THREADS
        if (status != OURO_OK) ouro_raise(status);
        else result = PyTuple_Pack(3, states, gate, logits ? logits : Py_None);
    }
done:
    if (locked) ouro_model_unlock(self);
    batch_fini(&b);
    PyMem_Free(turns);
    Py_XDECREF(layers);
    Py_XDECREF(states);
    Py_XDECREF(gate);
    Py_XDECREF(logits);
    return result;
}

static int fill_readouts(ouro_readout *rows, npy_intp n, const ouro_config *c, PyArrayObject *states, PyObject *logits,
                         PyObject *entropy, PyObject *log_z, PyObject *argmax)
{
    const float *h = PyArray_DATA(states);
    for (npy_intp i = 0; i < n; i++)
        rows[i] = (ouro_readout){.state = h + i * c->d_model,
                                 .logits = logits ? (float *)PyArray_DATA((PyArrayObject *)logits) + i * c->d_vocab : NULL,
                                 .entropy = (float *)PyArray_DATA((PyArrayObject *)entropy) + i,
                                 .log_z = (float *)PyArray_DATA((PyArrayObject *)log_z) + i,
                                 .argmax = (int32_t *)PyArray_DATA((PyArrayObject *)argmax) + i};
    return 1;
}

/* readout(states, want_logits) -> (logits or None, entropy, log_z, argmax) */
static PyObject *model_readout(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    PyObject *object, *result = NULL, *logits = NULL;
    int want;
    if (!PyArg_ParseTuple(args, "Op", &object, &want) || !ouro_model_is_ready(self)) return NULL;
    const ouro_config *c = &self->model->config;
    PyArrayObject *states = (PyArrayObject *)PyArray_FROMANY(object, NPY_FLOAT32, 2, 2, NPY_ARRAY_IN_ARRAY);
    if (!states) return NULL;
    if (PyArray_DIM(states, 1) != c->d_model) {
        PyErr_Format(PyExc_ValueError, "states have %zd columns, expected d_model %d", (Py_ssize_t)PyArray_DIM(states, 1), (int)c->d_model);
        Py_DECREF(states);
        return NULL;
    }
    npy_intp n = PyArray_DIM(states, 0), shape[2] = {n, c->d_vocab};
    PyObject *entropy = ouro_new_floats(1, &n, 0), *log_z = ouro_new_floats(1, &n, 0);
    PyObject *argmax = PyArray_EMPTY(1, &n, NPY_INT32, 0);
    ouro_readout *rows = PyMem_Calloc((size_t)n + 1, sizeof *rows);
    if (want) logits = ouro_new_floats(2, shape, 0);
    if (!rows) PyErr_NoMemory();
    if (entropy && log_z && argmax && rows && (logits || !want)
        && fill_readouts(rows, n, c, states, logits, entropy, log_z, argmax)) {
        poll_clock clock = {0};
        int status;
        if (ouro_model_lock(self)) {
            Py_BEGIN_ALLOW_THREADS
            status = ouro_read_out(self->ws, rows, (int)n, ouro_poll_signals, &clock);
            Py_END_ALLOW_THREADS
            ouro_model_unlock(self);
        } else {
            status = OURO_ERR_STATE;
        }
        if (status != OURO_OK) ouro_raise(status);
        else result = PyTuple_Pack(4, logits ? logits : Py_None, entropy, log_z, argmax);
    }
    PyMem_Free(rows);
    Py_DECREF(states);
    Py_XDECREF(logits);
    Py_XDECREF(entropy);
    Py_XDECREF(log_z);
    Py_XDECREF(argmax);
    return result;
}

static PyMethodDef methods[] = {
    {"put", model_put, METH_VARARGS, "put($self, tensor, layer, dtype, row0, data, /)\n--\n\nPacks whole rows of one tensor."},
    {"put_int4", model_put_int4, METH_VARARGS,
     "put_int4($self, tensor, layer, scales, q, /)\n--\n\nPacks a matrix of a layer that is quantised already."},
    {"finish", model_finish, METH_VARARGS,
     "finish($self, threads, kv_dtype, blas=None, /)\n--\n\n"
     "Checks that all weights came; readies the model."},
    {"weight", model_weight, METH_VARARGS,
     "weight($self, tensor, layer, row0, n_rows, /)\n--\n\nRows of one tensor as they are stored, float32."},
    {"trace", model_trace, METH_VARARGS,
     "trace($self, sequences, n_steps, logits, max_lanes, plan=None, program=None, kept=None, /)\n--\n\n"
     "States, gate logits and logits by step."},
    {"exit_steps", ouro_model_exit_steps, METH_VARARGS,
     "exit_steps($self, states, gate_logit, kind, threshold, min_steps, delay, rule, /)\n--\n\nThe step at which an exit rule lets each position go."},
    {"readout", model_readout, METH_VARARGS,
     "readout($self, states, want_logits, /)\n--\n\nLogits, entropy, log sum exp and top token of states."},
    {"save", ouro_model_save, METH_VARARGS, "save($self, path, progress=None, /)\n--\n\nWrites the packed weights as one file."},
    {"kept_pages", ouro_model_kept_pages, METH_NOARGS,
     "kept_pages($self)\n--\n\nBytes of cache pages that no request holds and that are kept for the next."},
    {"reserve_pages", ouro_model_reserve_pages, METH_VARARGS,
     "reserve_pages($self, n_positions, /)\n--\n\nMakes cache pages beforehand; the bytes that are kept then."},
    {"read_weights", ouro_model_read_weights, METH_NOARGS, "read_weights($self)\n--\n\nReads the layers' weights once: bytes, seconds."},
    {"free_pages", ouro_model_free_pages, METH_NOARGS,
     "free_pages($self)\n--\n\nGives the kept cache pages back to the system; their bytes."},
    {"info", ouro_model_info, METH_NOARGS, "info($self)\n--\n\nSizes by part, kernels and threads in use."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)model_new},
    {Py_tp_dealloc, (void *)model_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, (void *)"A packed looped model and the threads that run it."},
    {0, NULL},
};

PyType_Spec ouro_model_spec = {"ouro._core.Model", sizeof(model_object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
