/* exits.c - exit rules from Python: calling a custom one, and asking any rule about the states of a trace. */
#include "python/exits.h"

#include "engine/exit_trace.h"

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

int ouro_call_rule(void *arg, const ouro_exit_signal *s)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    int answer = -1;
    PyObject *signal = Py_BuildValue("{s:i,s:i,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:i,s:i}", "step", s->step, "n_steps",
                                     s->n_steps, "exit_lambda", s->exit_lambda, "exit_pdf", s->exit_pdf, "exit_cdf",
                                     s->exit_cdf, "state_delta", s->state_delta, "state_relative", s->state_relative,
                                     "acceleration", s->acceleration, "kl", s->kl, "entropy", s->entropy, "confidence",
                                     s->confidence, "top_token", s->top_token, "previous_top_token", s->previous_top_token);
    PyObject *result = signal && !PyErr_Occurred() ? PyObject_CallOneArg(PyList_GET_ITEM(arg, 0), signal) : NULL;
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
    int kind;
    if (!PyArg_ParseTuple(args, "OOifiiO", &states_in, &gates_in, &kind, &rule.threshold, &rule.min_steps, &rule.delay, &function)
        || !ouro_model_is_ready(self))
        return NULL;
    rule.kind = (ouro_exit_kind)kind;
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
