/* limits.c - `_core.read_bandwidth` and `_core.peak`: csrc/bench/limits.h for Python. Each call has threads of its own. */
#include "python/common.h"

#include "bench/limits.h"

#define MAX_ROUNDS 1000

static PyObject *list_of(const double *x, int n)
{
    PyObject *list = PyList_New(n);
    for (int i = 0; list && i < n; i++) {
        PyObject *value = PyFloat_FromDouble(x[i]);
        if (value) PyList_SET_ITEM(list, i, value);
        else Py_CLEAR(list);
    }
    return list;
}

/* unit -1: a read of `bytes` */
static PyObject *measure(int unit, size_t bytes, int threads, int rounds)
{
    double rates[MAX_ROUNDS];
    if (rounds < 1 || rounds > MAX_ROUNDS || threads < 0 || threads > 1024)
        return PyErr_Format(PyExc_ValueError, "expected 1 to %d rounds and 0 to 1024 threads, got %d and %d", MAX_ROUNDS,
                            rounds, threads);
    ouro_pool *pool = ouro_pool_new(threads);
    if (!pool) return PyErr_NoMemory();
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = unit < 0 ? ouro_measure_read(pool, bytes, rounds, rates) : ouro_measure_peak(pool, (ouro_unit)unit, rounds, rates);
    Py_END_ALLOW_THREADS
    ouro_pool_free(pool);
    return status == OURO_OK ? list_of(rates, rounds) : ouro_raise(status);
}

PyObject *ouro_python_read_bandwidth(PyObject *self, PyObject *args)
{
    (void)self;
    Py_ssize_t bytes;
    int threads, rounds;
    if (!PyArg_ParseTuple(args, "nii", &bytes, &threads, &rounds)) return NULL;
    if (bytes < 0) return PyErr_Format(PyExc_ValueError, "expected a number of bytes, got %zd", bytes);
    return measure(-1, (size_t)bytes, threads, rounds);
}

PyObject *ouro_python_peak(PyObject *self, PyObject *args)
{
    (void)self;
    static const char *const names[OURO_N_UNITS] = {"float32", "bfloat16", "int8"};
    const char *name;
    int threads, rounds, unit = 0;
    if (!PyArg_ParseTuple(args, "sii", &name, &threads, &rounds)) return NULL;
    while (unit < OURO_N_UNITS && strcmp(name, names[unit])) unit++;
    if (unit == OURO_N_UNITS)
        return PyErr_Format(PyExc_ValueError, "unknown unit '%s', expected float32, bfloat16 or int8", name);
    PyObject *rates = measure(unit, 0, threads, rounds);
    return rates ? Py_BuildValue("sN", ouro_peak_loop_of((ouro_unit)unit).instruction, rates) : NULL;
}
