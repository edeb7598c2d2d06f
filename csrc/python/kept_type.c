/* kept_type.c - `_core.Kept`: keys and values of a sequence that grows, for traces that run what is new of it (engine/kept.h). */
#include "python/common.h"

#include "engine/kept.h"

static PyObject *kept_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "positions", "passes", NULL};
    PyObject *module = PyType_GetModuleByDef(type, &ouro_core_module);
    if (!module) return NULL;
    module_state *state = PyModule_GetState(module);
    model_object *model;
    int positions, passes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!ii", names, state->model_type, &model, &positions, &passes)
        || !ouro_model_is_ready(model))
        return NULL;
    kept_object *self = (kept_object *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->model = (model_object *)Py_NewRef((PyObject *)model);
    int status = ouro_kept_new(model->ws, positions, passes, &self->kept);
    if (status == OURO_OK) return (PyObject *)self;
    Py_DECREF(self);
    return ouro_raise(status);
}

static void kept_dealloc(PyObject *o)
{
    kept_object *self = (kept_object *)o;
    PyTypeObject *type = Py_TYPE(o);
    ouro_kept_free(self->kept);
    Py_XDECREF(self->model);
    type->tp_free(o);
    Py_DECREF(type);
}

int ouro_kept_of(model_object *m, PyObject *o, ouro_kept **kept)
{
    *kept = NULL;
    if (o == Py_None) return 1;
    PyObject *module = PyType_GetModuleByDef(Py_TYPE((PyObject *)m), &ouro_core_module);
    module_state *state = module ? PyModule_GetState(module) : NULL;
    if (!state) return 0;
    if (!PyObject_TypeCheck(o, state->kept_type) || ((kept_object *)o)->model != m) {
        PyErr_Format(PyExc_TypeError, "kept is %s, expected Kept of this model or None", Py_TYPE(o)->tp_name);
        return 0;
    }
    *kept = ((kept_object *)o)->kept;
    return 1;
}

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)kept_new},
    {Py_tp_dealloc, (void *)kept_dealloc},
    {Py_tp_doc, (void *)"Keys and values of one sequence: a trace that is given them runs the positions that are new."},
    {0, NULL},
};

PyType_Spec ouro_kept_spec = {"ouro._core.Kept", sizeof(kept_object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
