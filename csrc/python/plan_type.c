/* plan_type.c - `_core.Plan`: a plan of captures, edits and Python calls over arrays it keeps alive. */
#include "python/common.h"

#include <math.h>

#include "base/cpu.h"
#include "tap/plan.h"

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", NULL};
    PyObject *module = PyType_GetModuleByDef(type, &ouro_core_module);
    if (!module) return NULL;
    module_state *state = PyModule_GetState(module);
    model_object *model;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!", names, state->model_type, &model)) return NULL;
    plan_object *self = (plan_object *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->owners = PyList_New(0);
    self->n_layers = model->model->config.n_layers;
    self->n_heads = model->model->config.n_heads;
    self->n_kv_heads = model->model->config.n_kv_heads;
    int status = self->owners ? ouro_plan_new(&model->model->config, model->model->kernels, &self->plan) : OURO_ERR_MEMORY;
    if (status == OURO_OK) return (PyObject *)self;
    Py_DECREF(self);
    return ouro_raise(status);
}

static int plan_traverse(PyObject *o, visitproc visit, void *arg)
{
    Py_VISIT(((plan_object *)o)->owners);
    Py_VISIT(Py_TYPE(o));
    return 0;
}

static int plan_clear(PyObject *o)
{
    /* the plan points into what the owners hold: it goes first */
    ouro_plan_free(((plan_object *)o)->plan);
    ((plan_object *)o)->plan = NULL;
    Py_CLEAR(((plan_object *)o)->owners);
    return 0;
}

static void plan_dealloc(PyObject *o)
{
    PyTypeObject *type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    plan_clear(o);
    type->tp_free(o);
    Py_DECREF(type);
}

/* ---- taps ---------------------------------------------------------------------------------------------------------- */

/* int32 arrays of a spec, released together */
typedef struct lists { PyArrayObject *steps, *layers, *heads, *positions; } lists;

static void lists_fini(lists *l)
{
    Py_XDECREF(l->steps);
    Py_XDECREF(l->layers);
    Py_XDECREF(l->heads);
    Py_XDECREF(l->positions);
}

static int ints(PyObject *from, int nd, PyArrayObject **to)
{
    if (!from || from == Py_None) return 1;
    *to = (PyArrayObject *)PyArray_FROMANY(from, NPY_INT32, nd, nd, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    return *to != NULL;
}

static int fill_spec(ouro_tap_spec *s, lists *l, PyObject *steps, PyObject *layers, PyObject *heads, PyObject *positions)
{
    if (!ints(steps, 1, &l->steps) || !ints(layers, 1, &l->layers) || !ints(heads, 1, &l->heads) || !ints(positions, 2, &l->positions))
        return 0;
    s->steps = l->steps ? PyArray_DATA(l->steps) : NULL;
    s->n_steps = l->steps ? (int)PyArray_SIZE(l->steps) : 0;
    s->layers = l->layers ? PyArray_DATA(l->layers) : NULL;
    s->n_layers = l->layers ? (int)PyArray_SIZE(l->layers) : 0;
    s->heads = l->heads ? PyArray_DATA(l->heads) : NULL;
    s->n_heads = l->heads ? (int)PyArray_SIZE(l->heads) : 0;
    if (!l->positions) return 1;
    s->pos_at = PyArray_DATA(l->positions);
    s->rows = (int)PyArray_DIM(l->positions, 0);
    s->n_pos = (int)PyArray_DIM(l->positions, 1);
    return 1;
}

/* An array [step, layer, row, pos, head, cols] as the plan addresses it. */
static int fill_array(ouro_tap_spec *s, PyObject *o)
{
    if (o == Py_None) return 1;
    if (!PyArray_Check(o) || PyArray_NDIM((PyArrayObject *)o) != 6) {
        PyErr_SetString(PyExc_TypeError, "expected an array [step, layer, row, pos, head, cols]");
        return 0;
    }
    PyArrayObject *a = (PyArrayObject *)o;
    int bf16 = PyArray_TYPE(a) == NPY_UINT16;
    npy_intp item = bf16 ? 2 : 4;
    if ((!bf16 && PyArray_TYPE(a) != NPY_FLOAT32) || !PyArray_ISALIGNED(a) || !PyArray_ISNOTSWAPPED(a)
        || (PyArray_DIM(a, 5) > 1 && PyArray_STRIDE(a, 5) != item) || PyArray_DIM(a, 5) > INT32_MAX
        || (s->kind == OURO_TAP_READ && !PyArray_ISWRITEABLE(a))) {
        PyErr_SetString(PyExc_TypeError, "expected float32 (or, to be filled, uint16) with contiguous columns");
        return 0;
    }
    s->array = (ouro_tap_array){.data = PyArray_DATA(a), .cols = (int)PyArray_DIM(a, 5), .bf16 = bf16};
    for (int i = 0; i < OURO_TAP_AXES; i++) s->array.size[i] = PyArray_DIM(a, i), s->array.stride[i] = PyArray_STRIDE(a, i);
    return 1;
}

static PyObject *add(plan_object *self, ouro_tap_spec *s, lists *l, PyObject *owner)
{
    int status = ouro_plan_add(self->plan, s);
    lists_fini(l);
    if (status != OURO_OK) return ouro_raise(status);
    if (PyList_Append(self->owners, owner) < 0) return NULL;
    Py_RETURN_NONE;
}

/* capture(point, steps, layers, positions, array) */
static PyObject *plan_capture(PyObject *o, PyObject *args)
{
    PyObject *steps, *layers, *positions, *array;
    ouro_tap_spec s = {.kind = OURO_TAP_READ};
    lists l = {0};
    int point;
    if (!PyArg_ParseTuple(args, "iOOOO", &point, &steps, &layers, &positions, &array)) return NULL;
    s.point = (ouro_point)point;
    if (fill_spec(&s, &l, steps, layers, NULL, positions) && fill_array(&s, array))
        return add((plan_object *)o, &s, &l, array);
    lists_fini(&l);
    return NULL;
}

/* edit(kind, point, steps, layers, heads, positions, array, scale, seed) */
static PyObject *plan_edit(PyObject *o, PyObject *args)
{
    PyObject *steps, *layers, *heads, *positions, *array;
    ouro_tap_spec s = {0};
    lists l = {0};
    int kind, point;
    unsigned long long seed;
    if (!PyArg_ParseTuple(args, "iiOOOOOfK", &kind, &point, &steps, &layers, &heads, &positions, &array, &s.scale, &seed)) return NULL;
    if (kind == OURO_TAP_READ || kind == OURO_TAP_CALL) return PyErr_Format(PyExc_ValueError, "%d is not a kind of edit", kind);
    s.kind = (ouro_tap_kind)kind;
    s.point = (ouro_point)point;
    s.seed = seed;
    if (fill_spec(&s, &l, steps, layers, heads, positions) && fill_array(&s, array))
        return add((plan_object *)o, &s, &l, array);
    lists_fini(&l);
    return NULL;
}

/* ---- calls ----------------------------------------------------------------------------------------------------------- */

/* How the lanes of one meeting fill an array [rows, pos, heads, cols]. */
typedef struct grid { int rows, pos, heads, cols; float ahead; } grid; /* ahead: in columns that a row does not have */

static grid grid_of(const ouro_lane *lanes, int n, ouro_point point, const ouro_rows *rows)
{
    grid g = {.heads = rows->heads, .ahead = point == OURO_P_SCORES ? -INFINITY : 0.0f};
    for (int i = 0, run = 0; i < n; i++) {
        run = i && lanes[i].row == lanes[i - 1].row ? run + 1 : 1;
        g.rows += run == 1;
        if (run > g.pos) g.pos = run;
        int cols = rows->cols ? rows->cols : lanes[i].pos + 1;
        if (cols > g.cols) g.cols = cols;
    }
    return g;
}

/* Copies between lanes and the array; back: only rows that differ, marked in `changed`. */
static void exchange(const ouro_lane *lanes, int n, const ouro_rows *rows, grid g, float *array, uint8_t *changed)
{
    for (int i = 0, row = -1, pos = 0; i < n; i++) {
        pos = i && lanes[i].row == lanes[i - 1].row ? pos + 1 : 0;
        row += pos == 0;
        ouro_rows from = ouro_row_of(rows, lanes, i);
        size_t bytes = (size_t)from.cols * sizeof(float);
        for (int h = 0; h < g.heads; h++) {
            float *x = from.data + (size_t)h * from.head_stride;
            float *y = array + (((size_t)row * (size_t)g.pos + (size_t)pos) * (size_t)g.heads + (size_t)h) * (size_t)g.cols;
            if (!changed) {
                memcpy(y, x, bytes);
                for (int c = from.cols; c < g.cols; c++) y[c] = g.ahead;
            } else if (memcmp(x, y, bytes)) {
                memcpy(x, y, bytes);
                changed[i] = 1;
            }
        }
    }
}

static PyObject *positions_of(const ouro_lane *lanes, int n, grid g)
{
    npy_intp size = g.pos;
    PyArrayObject *a = (PyArrayObject *)PyArray_EMPTY(1, &size, NPY_INT64, 0);
    for (int i = 0, begin = 0; a && i < n; i++) {
        if (i && lanes[i].row != lanes[i - 1].row) begin = i;
        if (i - begin + 1 == g.pos) {
            for (int k = 0; k < g.pos; k++) ((int64_t *)PyArray_DATA(a))[k] = lanes[begin + k].pos;
            break;
        }
    }
    return (PyObject *)a;
}

/* fn(array [rows, pos, heads, cols], point, step, layer, positions) -> None or a replacement */
static int call_python(PyObject *fn, const ouro_lane *lanes, int n, ouro_point point, int layer, const ouro_rows *rows, uint8_t *changed)
{
    grid g = grid_of(lanes, n, point, rows);
    npy_intp shape[4] = {g.rows, g.pos, g.heads, g.cols};
    PyObject *array = ouro_new_floats(4, shape, 1), *pos = array ? positions_of(lanes, n, g) : NULL, *result = NULL;
    PyArrayObject *back = NULL;
    if (pos) {
        exchange(lanes, n, rows, g, PyArray_DATA((PyArrayObject *)array), NULL);
        result = PyObject_CallFunction(fn, "OiiiO", array, (int)point, lanes[0].step, layer, pos);
    }
    if (result) back = (PyArrayObject *)PyArray_FROMANY(result == Py_None ? array : result, NPY_FLOAT32, 4, 4, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    if (back && !PyArray_CompareLists(PyArray_DIMS(back), shape, 4)) {
        PyErr_SetString(PyExc_ValueError, "a hook returned an array of another shape");
        Py_CLEAR(back);
    }
    if (back) exchange(lanes, n, rows, g, PyArray_DATA(back), changed);
    int status = back == NULL;
    Py_XDECREF(back);
    Py_XDECREF(result);
    Py_XDECREF(pos);
    Py_XDECREF(array);
    return status;
}

/* The arithmetic flushes denormals; Python code does not expect that. */
static int call(void *arg, const ouro_lane *lanes, int n, ouro_point point, int layer, const ouro_rows *rows, uint8_t *changed)
{
    unsigned mode = ouro_ftz_suspend();
    PyGILState_STATE gil = PyGILState_Ensure();
    int status = call_python(arg, lanes, n, point, layer, rows, changed);
    PyGILState_Release(gil);
    ouro_ftz_leave(mode);
    return status;
}

/* call(point, steps, layers, function) */
static PyObject *plan_call(PyObject *o, PyObject *args)
{
    PyObject *steps, *layers, *fn;
    ouro_tap_spec s = {.kind = OURO_TAP_CALL, .call = call};
    lists l = {0};
    int point;
    if (!PyArg_ParseTuple(args, "iOOO", &point, &steps, &layers, &fn)) return NULL;
    s.point = (ouro_point)point;
    s.call_arg = fn;
    if (fill_spec(&s, &l, steps, layers, NULL, NULL)) return add((plan_object *)o, &s, &l, fn);
    lists_fini(&l);
    return NULL;
}

static PyMethodDef methods[] = {
    {"capture", plan_capture, METH_VARARGS,
     "capture($self, point, steps, layers, positions, array, /)\n--\n\nRows of a point are written to array [step, layer, row, pos, head, cols]."},
    {"edit", plan_edit, METH_VARARGS,
     "edit($self, kind, point, steps, layers, heads, positions, array, scale, seed, /)\n--\n\nRows of a point are changed."},
    {"call", plan_call, METH_VARARGS,
     "call($self, point, steps, layers, function, /)\n--\n\nfunction(array, point, step, layer, positions) sees and may replace rows."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)plan_new},
    {Py_tp_dealloc, (void *)plan_dealloc},
    {Py_tp_traverse, (void *)plan_traverse},
    {Py_tp_clear, (void *)plan_clear},
    {Py_tp_methods, methods},
    {Py_tp_doc, (void *)"What is read from a run and what is changed in it; see csrc/tap/plan.h."},
    {0, NULL},
};

PyType_Spec ouro_plan_spec = {"ouro._core.Plan", sizeof(plan_object), 0,
                              Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, slots};
