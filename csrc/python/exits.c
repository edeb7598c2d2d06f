/* exits.c - exit rules from Python: calling a custom one, and asking any rule about the states of a trace. */
#include "python/exits.h"

#include <math.h>
#include <stddef.h>

#include "engine/exit_trace.h"
#include "engine/signals.h"

PyObject *ouro_take_exception(void)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (!type) return NULL;
    PyErr_NormalizeException(&type, &value, &trace);
    if (value && trace) PyException_SetTraceback(value, trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return value;
}

/* The numbers of a signal by their names in `ouro.exits.Signal`; all but the first two and the last two are floats. */
#define FIELD(name) {#name, offsetof(ouro_exit_signal, name)}
static const struct { const char *name; size_t at; } FLOATS[] = {
    FIELD(exit_lambda), FIELD(exit_pdf), FIELD(exit_cdf), FIELD(state_delta), FIELD(state_relative), FIELD(acceleration), FIELD(kl),
    FIELD(entropy), FIELD(confidence)};
enum { N_FLOATS = sizeof FLOATS / sizeof *FLOATS };

static PyObject *signal_dict(const ouro_exit_signal *s)
{
    PyObject *d = Py_BuildValue("{s:i,s:i,s:i,s:i}", "step", s->step, "n_steps", s->n_steps, "top_token", s->top_token,
                                "previous_top_token", s->previous_top_token);
    for (int i = 0; d && i < N_FLOATS; i++) {
        PyObject *x = PyFloat_FromDouble((double)*(const float *)((const char *)s + FLOATS[i].at));
        if (!x || PyDict_SetItemString(d, FLOATS[i].name, x)) Py_CLEAR(d);
        Py_XDECREF(x);
    }
    return d;
}

int ouro_call_rule(void *arg, const ouro_exit_signal *s)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    int answer = -1;
    PyObject *signal = signal_dict(s);
    PyObject *result = signal ? PyObject_CallOneArg(PyList_GET_ITEM(arg, 0), signal) : NULL;
    if (result) answer = PyObject_IsTrue(result);
    Py_XDECREF(signal);
    Py_XDECREF(result);
    PyObject *error = ouro_take_exception();
    if (error) PyList_SetItem(arg, 1, error), answer = -1;
    PyGILState_Release(gil);
    return answer;
}

/* Runs the rule over checked arrays; 0 with an exception set. */
static int run(model_object *self, const ouro_exit_rule *rule, PyObject *slot, const ouro_exit_trace *x)
{
    poll_clock clock = {0};
    int status;
    ouro_model_lock(self);
    Py_BEGIN_ALLOW_THREADS
    status = ouro_exit_trace_run(self->ws, rule, x, ouro_poll_signals, &clock);
    Py_END_ALLOW_THREADS
    ouro_model_unlock(self);
    if (status == OURO_OK) return 1;
    PyObject *error = slot ? PyList_GET_ITEM(slot, 1) : Py_None;
    if (error != Py_None && !PyErr_Occurred()) PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    ouro_raise(status);
    return 0;
}

PyObject *ouro_model_exit_steps(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    PyObject *states_in, *gates_in, *function, *result = NULL, *slot = NULL;
    ouro_exit_rule rule = {0};
    if (!PyArg_ParseTuple(args, "OOsfiiO", &states_in, &gates_in, &rule.name, &rule.threshold, &rule.min_steps, &rule.delay, &function)
        || !ouro_model_is_ready(self))
        return NULL;
    PyArrayObject *states = (PyArrayObject *)PyArray_FROMANY(states_in, NPY_FLOAT32, 3, 3, NPY_ARRAY_IN_ARRAY);
    PyArrayObject *gates = states ? (PyArrayObject *)PyArray_FROMANY(gates_in, NPY_FLOAT32, 2, 2, NPY_ARRAY_IN_ARRAY) : NULL;
    if (!gates) goto done;
    npy_intp steps = PyArray_DIM(states, 0), n = PyArray_DIM(states, 1);
    if (PyArray_DIM(states, 2) != self->model->config.d_model || PyArray_DIM(gates, 0) != steps || PyArray_DIM(gates, 1) != n
        || steps > INT32_MAX || n > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "states have shape (%zd, %zd, %zd) and gate logits (%zd, %zd), expected (step, n, %d) and (step, n)",
                     (Py_ssize_t)steps, (Py_ssize_t)n, (Py_ssize_t)PyArray_DIM(states, 2), (Py_ssize_t)PyArray_DIM(gates, 0),
                     (Py_ssize_t)PyArray_DIM(gates, 1), (int)self->model->config.d_model);
        goto done;
    }
    if (function != Py_None) {
        slot = Py_BuildValue("[OO]", function, Py_None);
        if (!slot) goto done;
        rule.custom = ouro_call_rule, rule.custom_arg = slot;
    }
    result = PyArray_EMPTY(1, &n, NPY_INT32, 0);
    ouro_exit_trace x = {.states = PyArray_DATA(states), .gate_logit = PyArray_DATA(gates), .n = (int)n, .n_steps = (int)steps,
                         .exit_step = result ? PyArray_DATA((PyArrayObject *)result) : NULL};
    if (result && !run(self, &rule, slot, &x)) Py_CLEAR(result);
done:
    Py_XDECREF(slot);
    Py_XDECREF(states);
    Py_XDECREF(gates);
    return result;
}

/* gates [n_steps][n] -> out [3][n_steps][n] */
static void distribute(const float *gates, npy_intp n_steps, npy_intp n, float *out)
{
    float *lambda = out, *pdf = out + n_steps * n, *cdf = pdf + n_steps * n;
    for (npy_intp i = 0; i < n; i++) {
        ouro_exit_track track;
        ouro_exit_signal signal;
        ouro_exit_begin(&track);
        for (npy_intp at = i, t = 0; t < n_steps; t++, at += n) {
            ouro_exit_gate(&track, gates[at], (int)t, (int)n_steps, &signal);
            lambda[at] = signal.exit_lambda, pdf[at] = signal.exit_pdf, cdf[at] = signal.exit_cdf;
        }
    }
}

PyObject *ouro_python_exit_distribution(PyObject *module, PyObject *gate_logit)
{
    (void)module;
    PyArrayObject *gates = (PyArrayObject *)PyArray_FROMANY(gate_logit, NPY_FLOAT32, 2, 2, NPY_ARRAY_IN_ARRAY);
    if (!gates) return NULL;
    npy_intp dims[3] = {3, PyArray_DIM(gates, 0), PyArray_DIM(gates, 1)};
    PyObject *result = dims[1] > INT32_MAX ? PyErr_Format(PyExc_ValueError, "too many steps") : PyArray_EMPTY(3, dims, NPY_FLOAT32, 0);
    if (result) distribute(PyArray_DATA(gates), dims[1], dims[2], PyArray_DATA((PyArrayObject *)result));
    Py_DECREF(gates);
    return result;
}

/* ---- rules over numbers that were measured once --------------------------------------------------------------------- */

typedef struct measured {
    PyArrayObject *floats[N_FLOATS], *top;   /* [n_steps][n] float32, int32; NULL: not measured */
    npy_intp n_steps, n;                     /* -1 until an array has said */
} measured;

static void measured_fini(measured *m)
{
    for (int k = 0; k < N_FLOATS; k++) Py_XDECREF(m->floats[k]);
    Py_XDECREF(m->top);
}

/* The array of a name, checked; NULL without an exception when there is none. */
static PyArrayObject *measured_array(measured *m, PyObject *signals, const char *name, int type)
{
    PyObject *found = PyDict_GetItemString(signals, name);
    if (!found) return NULL;
    PyArrayObject *a = (PyArrayObject *)PyArray_FROMANY(found, type, 2, 2, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    if (!a) return NULL;
    if (m->n < 0) m->n_steps = PyArray_DIM(a, 0), m->n = PyArray_DIM(a, 1);
    if (PyArray_DIM(a, 0) == m->n_steps && PyArray_DIM(a, 1) == m->n && m->n_steps <= OURO_MAX_STEPS) return a;
    PyErr_Format(PyExc_ValueError, "%s has shape (%zd, %zd), expected (%zd, %zd) and at most %d steps", name,
                 (Py_ssize_t)PyArray_DIM(a, 0), (Py_ssize_t)PyArray_DIM(a, 1), (Py_ssize_t)m->n_steps, (Py_ssize_t)m->n,
                 OURO_MAX_STEPS);
    Py_DECREF(a);
    return NULL;
}

static int measured_init(measured *m, PyObject *signals)
{
    *m = (measured){.n = -1};
    for (int k = 0; k < N_FLOATS && !PyErr_Occurred(); k++)
        m->floats[k] = measured_array(m, signals, FLOATS[k].name, NPY_FLOAT32);
    if (!PyErr_Occurred()) m->top = measured_array(m, signals, "top_token", NPY_INT32);
    if (!PyErr_Occurred() && m->n < 0) PyErr_SetString(PyExc_ValueError, "no signal of an exit rule was given: see ouro.exits.Signal");
    if (!PyErr_Occurred()) return 1;
    measured_fini(m);
    return 0;
}

/* The step after which position i leaves. */
static int leaves_at(const measured *m, const ouro_exit_rule *rule, npy_intp i)
{
    ouro_exit_track track;
    ouro_exit_signal s = {.top_token = -1};
    ouro_exit_begin(&track);
    for (npy_intp t = 0; t < m->n_steps; t++) {
        size_t at = (size_t)(t * m->n + i);
        ouro_signal_begin(&s);
        s.step = (int)t, s.n_steps = (int)m->n_steps;
        for (int k = 0; k < N_FLOATS; k++)
            *(float *)((char *)&s + FLOATS[k].at) = m->floats[k] ? ((const float *)PyArray_DATA(m->floats[k]))[at] : NAN;
        if (m->top) s.top_token = ((const int32_t *)PyArray_DATA(m->top))[at];
        if (ouro_exit_ask(rule, &track, &s) > 0) return (int)t;
    }
    return (int)m->n_steps - 1;
}

PyObject *ouro_python_exit_steps(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *signals, *result = NULL;
    ouro_exit_rule rule = {0};
    measured m;
    if (!PyArg_ParseTuple(args, "O!sfii", &PyDict_Type, &signals, &rule.name, &rule.threshold, &rule.min_steps, &rule.delay)) return NULL;
    int status = ouro_exit_check(&rule);
    if (status != OURO_OK) {
        ouro_raise(status);
        return NULL;
    }
    if (!measured_init(&m, signals)) return NULL;
    result = PyArray_EMPTY(1, &m.n, NPY_INT32, 0);
    for (npy_intp i = 0; result && i < m.n; i++)
        ((int32_t *)PyArray_DATA((PyArrayObject *)result))[i] = leaves_at(&m, &rule, i);
    measured_fini(&m);
    return result;
}
