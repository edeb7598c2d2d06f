/* model_memory.c - what a model holds: sizes by part, cache pages that are kept, a plain read of its weights. Methods of `_core.Model`. */
#include "python/common.h"

#include <stdlib.h>

#include "base/memory.h"
#include "base/stock.h"
#include "bench/limits.h"
#include "engine/cache.h"

PyObject *ouro_model_info(PyObject *o, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)o;
    const ouro_model *m = self->model;
    size_t layers = 0;
    for (int l = 0; l < m->config.n_layers; l++) {
        const ouro_layer *y = &m->layers[l];
        layers += ouro_matrix_bytes(&y->qkv) + ouro_matrix_bytes(&y->o) + ouro_matrix_bytes(&y->gate_up) + ouro_matrix_bytes(&y->down);
    }
    size_t head = ouro_matrix_bytes(&m->head), embed = m->config.tied ? 0 : ouro_matrix_bytes(&m->embed);
    const ouro_formats *f = &m->formats;
    return Py_BuildValue("{s:s,s:i,s:n,s:n,s:n,s:n,s:n,s:n,s:s,s:O,s:{s:s,s:s,s:s,s:s,s:s}}", "kernels", m->kernels->name, "threads",
                         self->ws ? self->ws->n_threads : 0, "weight_bytes", (Py_ssize_t)m->arena_bytes, "layer_bytes",
                         (Py_ssize_t)layers, "head_bytes", (Py_ssize_t)head, "embed_bytes", (Py_ssize_t)embed,
                         "kv_page_bytes", self->ws ? (Py_ssize_t)self->ws->kv.page_bytes : (Py_ssize_t)0,
                         "workspace_bytes", self->ws ? (Py_ssize_t)self->ws->bytes : (Py_ssize_t)0, "blas",
                         self->blas ? ouro_blas_config(self->blas) : "", "mapped", m->map.data ? Py_True : Py_False,
                         "formats", "layers", ouro_format_name((int)f->layers), "o", ouro_format_name((int)f->o), "down",
                         ouro_format_name((int)f->down), "head", ouro_format_name((int)f->head), "embed",
                         ouro_format_name((int)f->embed));
}

/* kept_pages(), reserve_pages() and free_pages() may be called while another thread runs the model: the stock has a lock. */

PyObject *ouro_model_kept_pages(PyObject *o, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)o;
    return PyLong_FromSize_t(self->ws ? ouro_stock_kept(&self->ws->pages) : 0);
}

/* reserve_pages(n_positions) -> bytes that are kept then */
PyObject *ouro_model_reserve_pages(PyObject *o, PyObject *args)
{
    model_object *self = (model_object *)o;
    int n;
    if (!PyArg_ParseTuple(args, "i", &n) || !ouro_model_is_ready(self)) return NULL;
    if (n < 0) return PyErr_Format(PyExc_ValueError, "n_tokens is %d, expected 0 or more", n);
    size_t bytes = ouro_cache_bytes(&self->ws->kv, n, self->model->config.n_steps), kept = ouro_stock_kept(&self->ws->pages);
    if (bytes > OURO_KEPT_PAGES) bytes = OURO_KEPT_PAGES;
    if (bytes > kept && bytes - kept > ouro_available_memory())
        return PyErr_Format(PyExc_MemoryError, "pages of %d tokens need %zu more bytes, %zu are free", n, bytes - kept,
                            ouro_available_memory());
    Py_BEGIN_ALLOW_THREADS
    kept = ouro_stock_fill(&self->ws->pages, bytes);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(kept);
}

/* read_weights() -> bytes, seconds: a plain read of the layers' weights by the model's threads, what a pass can not go below */
PyObject *ouro_model_read_weights(PyObject *o, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)o;
    if (!ouro_model_is_ready(self)) return NULL;
    int n_layers = self->model->config.n_layers, status = OURO_ERR_MEMORY, n = 0;
    double seconds = 0.0;
    size_t bytes = 0;
    ouro_extent *extents = calloc((size_t)n_layers * 4, sizeof *extents);
    if (!extents) return PyErr_NoMemory();
    for (int l = 0; l < n_layers; l++) {
        const ouro_layer *y = &self->model->layers[l];
        const ouro_matrix *all[] = {&y->qkv, &y->o, &y->gate_up, &y->down};
        for (int i = 0; i < 4; i++, n++) {
            extents[n] = (ouro_extent){all[i]->data, ouro_matrix_bytes(all[i])};
            bytes += extents[n].bytes;
        }
    }
    int locked = ouro_model_lock(self);
    if (locked) {
        Py_BEGIN_ALLOW_THREADS
        status = ouro_map_check(&self->model->map);
        if (status == OURO_OK) status = ouro_measure_extents(self->ws->pool, extents, n, &seconds);
        Py_END_ALLOW_THREADS
        ouro_model_unlock(self);
    }
    free(extents);
    if (!locked) return NULL;
    return status == OURO_OK ? Py_BuildValue("nd", (Py_ssize_t)bytes, seconds) : ouro_raise(status);
}

PyObject *ouro_model_free_pages(PyObject *o, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)o;
    size_t freed = 0;
    Py_BEGIN_ALLOW_THREADS
    if (self->ws) freed = ouro_stock_empty(&self->ws->pages);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(freed);
}
