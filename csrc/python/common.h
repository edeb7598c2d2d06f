/* common.h - what the files of the extension share: module state, statuses as exceptions, Ctrl-C during C work. */
#ifndef OURO_PYTHON_COMMON_H
#define OURO_PYTHON_COMMON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL ouro_numpy_api
#ifndef OURO_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "model/workspace.h"
#include "ouro_status.h"

typedef struct module_state {
    PyTypeObject *model_type, *forks_type, *kept_type, *engine_type, *plan_type;
} module_state;

/* A model with its workspace. `lock` is held while the workspace computes: calls from several threads take turns. */
typedef struct model_object {
    PyObject_HEAD
    ouro_model *model;
    ouro_workspace *ws;
    ouro_blas *blas;
    PyThread_type_lock lock;
    unsigned long holder;            /* thread that holds it */
} model_object;

/* A plan and the arrays and functions it points to. */
typedef struct plan_object {
    PyObject_HEAD
    struct ouro_plan *plan;
    PyObject *owners;
    int n_layers, n_heads, n_kv_heads;   /* of the model it was made for */
} plan_object;

/* Keys and values of one sequence from trace to trace (engine/kept.h). */
typedef struct kept_object {
    PyObject_HEAD
    model_object *model;
    struct ouro_kept *kept;
} kept_object;

extern PyType_Spec ouro_model_spec, ouro_forks_spec, ouro_kept_spec, ouro_engine_spec, ouro_plan_spec;
extern struct PyModuleDef ouro_core_module;

/* Sets the exception that goes with a status (keeping one that is already set); returns NULL. */
PyObject *ouro_raise(int status);

/* The poll function of long calls: lets Python handle signals, at most every 20 ms. arg: a poll_clock. */
typedef struct poll_clock { double last; } poll_clock;
int ouro_poll_signals(void *arg);

/* Takes the model's lock without holding the GIL meanwhile; 0 and an exception when this thread holds it already. */
int ouro_model_lock(model_object *m);
void ouro_model_unlock(model_object *m);
/* 0 and an exception when the weights are not complete */
int ouro_model_is_ready(const model_object *m);

/* functions of limits.c */
PyObject *ouro_python_read_bandwidth(PyObject *self, PyObject *args);
PyObject *ouro_python_peak(PyObject *self, PyObject *args);
/* The observer of a Plan or of None; 0 and an exception for anything else or a plan of another model. */
int ouro_plan_of(const model_object *m, PyObject *plan, const ouro_observer **observer);
/* Those of a Kept or of None; 0 and an exception for anything else or one of another model. */
int ouro_kept_of(model_object *m, PyObject *o, struct ouro_kept **kept);

/* "float32", "bfloat16", "int8", "int4": the names of formats and of computes; -1 and an exception for another */
const char *ouro_format_name(int format);
int ouro_format_by_name(const char *name);

/* packed.c: `Model.save`, and the functions `look_packed` and `open_packed` */
PyObject *ouro_model_save(PyObject *model, PyObject *args);
extern PyMethodDef ouro_packed_functions[];

/* model_memory.c: methods of Model */
PyObject *ouro_model_info(PyObject *model, PyObject *unused);
PyObject *ouro_model_kept_pages(PyObject *model, PyObject *unused);
PyObject *ouro_model_reserve_pages(PyObject *model, PyObject *args);
PyObject *ouro_model_read_weights(PyObject *model, PyObject *unused);
PyObject *ouro_model_free_pages(PyObject *model, PyObject *unused);

/* A new C-contiguous float32 array; filled with NaN when `blank`. */
PyObject *ouro_new_floats(int nd, const npy_intp *shape, int blank);

#endif
