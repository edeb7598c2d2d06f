/* ouro.h - the core as a C library: what a program includes. Nothing of Python.
 *
 *   ouro_packed_read   -> ouro_model        packed weights: model.ouro of a directory that `ouro quantize` made
 *   ouro_workspace_new -> ouro_workspace    scratch memory and threads; runs one thing at a time
 *   ouro_trace_run                          one forward, everything by step
 *   ouro_engine_new    -> ouro_engine       requests that generate; ouro_engine_step until none is pending
 *
 * Functions return OURO_OK or a negative status; ouro_last_error() says more. Each object is freed by the function
 * beside its maker. A model must outlive its workspaces, a workspace its engines. csrc/example shows all of it.
 */
#ifndef OURO_H
#define OURO_H

#include "engine/engine.h"
#include "engine/trace.h"
#include "model/packed.h"
#include "ouro_status.h"

#endif
