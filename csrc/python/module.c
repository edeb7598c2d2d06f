/* module.c - `ouro._core`: the module, its exceptions and small functions. One file per type beside this one. */
#define OURO_IMPORTS_NUMPY
#include "python/common.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "base/memory.h"
#include "engine/sampling.h"
#include "python/exits.h"

/* ---- statuses ------------------------------------------------------------------------------------------------ */

static PyObject *exception_of(int status)
{
    const char *name = status == OURO_ERR_MEMORY ? "MemoryLimitError"
                       : status == OURO_ERR_CONTEXT ? "ContextLengthError"
                       : status == OURO_ERR_UNSUPPORTED ? "UnsupportedError"
                       : status == OURO_ERR_BUSY ? "QueueFullError"
                       : status == OURO_ERR_FORMAT ? "CheckpointError" : NULL;
    PyObject *errors = name ? PyImport_ImportModule("ouro.errors") : NULL;
    PyObject *type = errors ? PyObject_GetAttrString(errors, name) : NULL;
    Py_XDECREF(errors);
    if (type) return type;
    PyErr_Clear();
    switch (status) {
    case OURO_ERR_ARGUMENT: case OURO_ERR_SHAPE: case OURO_ERR_CONTEXT: case OURO_ERR_FORMAT:
        return Py_NewRef(PyExc_ValueError);
    case OURO_ERR_MEMORY: return Py_NewRef(PyExc_MemoryError);
    case OURO_ERR_CANCELLED: return Py_NewRef(PyExc_KeyboardInterrupt);
    case OURO_ERR_SYSTEM: return Py_NewRef(PyExc_OSError);
    default: return Py_NewRef(PyExc_RuntimeError);
    }
}

PyObject *ouro_raise(int status)
{
    if (PyErr_Occurred()) return NULL;
    PyObject *type = exception_of(status);
    const char *detail = ouro_last_error();          /* what it names may be cut off inside a character */
    PyObject *text = PyUnicode_DecodeUTF8(detail, (Py_ssize_t)strlen(detail), "replace");
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    Py_DECREF(type);
    return NULL;
}

int ouro_poll_signals(void *arg)
{
    poll_clock *clock = arg;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    if (now - clock->last < 0.02) return 0;
    clock->last = now;
    PyGILState_STATE gil = PyGILState_Ensure();
    int stop = PyErr_CheckSignals() != 0;
    PyGILState_Release(gil);
    return stop;
}

PyObject *ouro_new_floats(int nd, const npy_intp *shape, int blank)
{
    PyObject *a = PyArray_EMPTY(nd, (npy_intp *)(uintptr_t)shape, NPY_FLOAT32, 0);
    if (!a || !blank) return a;
    float *x = PyArray_DATA((PyArrayObject *)a);
    npy_intp n = PyArray_SIZE((PyArrayObject *)a);
    for (npy_intp i = 0; i < n; i++) x[i] = NAN;
    return a;
}

/* ---- functions ------------------------------------------------------------------------------------------------ */

static PyObject *cpu_features(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(ouro_cpu_get()->features);
}

static PyObject *cpu_count(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyLong_FromLong(ouro_cpu_count());
}

static PyObject *available_memory(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyLong_FromSize_t(ouro_available_memory());
}

static PyObject *resident_memory(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyLong_FromSize_t(ouro_resident_memory());
}

static PyObject *gumbel(PyObject *self, PyObject *args)
{
    (void)self;
    unsigned long long seed;
    unsigned int stream;
    int position, token;
    if (!PyArg_ParseTuple(args, "KIii", &seed, &stream, &position, &token)) return NULL;
    ouro_sampling s = {.seed = seed, .stream = stream};
    return PyFloat_FromDouble(ouro_gumbel(&s, position, token));
}

/* Shared by `filter` and `sample`: logits, history and settings. The caller releases both arrays. */
static int sampling_arguments(PyObject *args, PyObject *kwargs, PyArrayObject **logits, PyArrayObject **history,
                              ouro_sampling *s, int *position)
{
    static char *names[] = {"logits", "history", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
                            "seed", "stream", "position", NULL};
    PyObject *z, *h;
    unsigned long long seed = 0;
    *s = (ouro_sampling){.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f};
    *position = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|fifffKIi", names, &z, &h, &s->temperature, &s->top_k, &s->top_p,
                                     &s->min_p, &s->repetition_penalty, &seed, &s->stream, position))
        return 0;
    s->seed = seed;
    *logits = (PyArrayObject *)PyArray_FROMANY(z, NPY_FLOAT32, 1, 1, NPY_ARRAY_IN_ARRAY);
    *history = *logits ? (PyArrayObject *)PyArray_FROMANY(h, NPY_INT32, 1, 1, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST) : NULL;
    int ok = *history != NULL && ouro_sampling_check(s) == OURO_OK;
    if (*history && !ok) ouro_raise(OURO_ERR_ARGUMENT);
    npy_intp v = ok ? PyArray_SIZE(*logits) : 0;
    for (npy_intp i = 0; ok && i < PyArray_SIZE(*history); i++) {
        int32_t t = ((int32_t *)PyArray_DATA(*history))[i];
        if (t >= 0 && t < v) continue;
        PyErr_Format(PyExc_ValueError, "history holds token %d, outside of %zd logits", (int)t, (Py_ssize_t)v);
        ok = 0;
    }
    if (ok && v == 0) ok = 0, PyErr_SetString(PyExc_ValueError, "logits are empty");
    if (ok) return 1;
    Py_CLEAR(*logits);
    Py_CLEAR(*history);
    return 0;
}

static PyObject *filter_or_sample(PyObject *args, PyObject *kwargs, int sample)
{
    PyArrayObject *logits = NULL, *history = NULL;
    ouro_sampling s;
    ouro_sampler sampler;
    int position;
    if (!sampling_arguments(args, kwargs, &logits, &history, &s, &position)) return NULL;
    npy_intp v = PyArray_SIZE(logits);
    PyObject *result = NULL;
    int status = ouro_sampler_init(&sampler, (int)v);
    if (status != OURO_OK) {
        ouro_raise(status);
    } else if (sample) {
        result = PyLong_FromLong(ouro_sample(&sampler, &s, PyArray_DATA(logits), PyArray_DATA(history),
                                             (int)PyArray_SIZE(history), position));
    } else if ((result = ouro_new_floats(1, &v, 0)) != NULL) {
        ouro_sample_filter(&sampler, &s, PyArray_DATA(logits), PyArray_DATA(history), (int)PyArray_SIZE(history),
                           PyArray_DATA((PyArrayObject *)result));
    }
    if (status == OURO_OK) ouro_sampler_fini(&sampler);
    Py_DECREF(logits);
    Py_DECREF(history);
    return result;
}

static PyObject *filter_logits(PyObject *self, PyObject *args, PyObject *kwargs)
{
    (void)self;
    return filter_or_sample(args, kwargs, 0);
}

static PyObject *sample(PyObject *self, PyObject *args, PyObject *kwargs)
{
    (void)self;
    return filter_or_sample(args, kwargs, 1);
}

static PyMethodDef methods[] = {
    {"cpu_features", cpu_features, METH_NOARGS, "cpu_features($module)\n--\n\nNames of the instruction sets in use, space separated."},
    {"cpu_count", cpu_count, METH_NOARGS, "cpu_count($module)\n--\n\nProcessors in the affinity mask."},
    {"available_memory", available_memory, METH_NOARGS, "available_memory($module)\n--\n\nBytes that can still be used."},
    {"resident_memory", resident_memory, METH_NOARGS, "resident_memory($module)\n--\n\nResident bytes of this process."},
    {"read_bandwidth", ouro_python_read_bandwidth, METH_VARARGS,
     "read_bandwidth($module, nbytes, threads, rounds, /)\n--\n\nBytes per second of a plain read of nbytes, by round."},
    {"peak", ouro_python_peak, METH_VARARGS,
     "peak($module, unit, threads, rounds, /)\n--\n\nInstruction and operations per second of a unit, by round."},
    {"gumbel", gumbel, METH_VARARGS, "gumbel($module, seed, stream, position, token, /)\n--\n\nThe noise of one token."},
    {"exit_steps", ouro_python_exit_steps, METH_VARARGS,
     "exit_steps($module, signals, kind, threshold, min_steps, delay, /)\n--\n\nWhere a rule lets positions go [n], by signals "
     "{name: array [step, n]} that were measured once."},
    {"exit_distribution", ouro_python_exit_distribution, METH_O,
     "exit_distribution($module, gate_logit, /)\n--\n\nlambda, pdf and cdf [3, step, n] of gate logits [step, n], as generation has them."},
    {"filter_logits", (PyCFunction)(void (*)(void))filter_logits, METH_VARARGS | METH_KEYWORDS,
     "filter_logits($module, logits, history, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0, "
     "stream=0, position=0)\n--\n\nFiltered logits over temperature, -inf where filtered."},
    {"sample", (PyCFunction)(void (*)(void))sample, METH_VARARGS | METH_KEYWORDS,
     "sample($module, logits, history, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0, "
     "stream=0, position=0)\n--\n\nThe token drawn for a position."},
    {NULL, NULL, 0, NULL},
};

/* ---- the module ------------------------------------------------------------------------------------------------ */

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **slot)
{
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot ? PyModule_AddType(module, *slot) : -1;
}

static int module_exec(PyObject *module)
{
    import_array1(-1);
    module_state *s = PyModule_GetState(module);
    if (PyModule_AddFunctions(module, ouro_packed_functions) < 0) return -1;
    if (add_type(module, &ouro_model_spec, &s->model_type) < 0) return -1;
    if (add_type(module, &ouro_forks_spec, &s->forks_type) < 0) return -1;
    if (add_type(module, &ouro_kept_spec, &s->kept_type) < 0) return -1;
    if (add_type(module, &ouro_engine_spec, &s->engine_type) < 0) return -1;
    return add_type(module, &ouro_plan_spec, &s->plan_type);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *s = PyModule_GetState(module);
    Py_VISIT(s->model_type);
    Py_VISIT(s->forks_type);
    Py_VISIT(s->kept_type);
    Py_VISIT(s->engine_type);
    Py_VISIT(s->plan_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *s = PyModule_GetState(module);
    Py_CLEAR(s->model_type);
    Py_CLEAR(s->forks_type);
    Py_CLEAR(s->kept_type);
    Py_CLEAR(s->engine_type);
    Py_CLEAR(s->plan_type);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
    {0, NULL},
};

struct PyModuleDef ouro_core_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ouro._core",
    .m_doc = "The C core of ouro: packed looped models, traces and the engine that generates.",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&ouro_core_module); }
