/* exits.h - exit rules on the Python side, for the engine and for traces. */
#ifndef OURO_PYTHON_EXITS_H
#define OURO_PYTHON_EXITS_H

#include "python/common.h"

#include "engine/exit.h"

/* The current exception as an object with its traceback, cleared; NULL when there is none. */
PyObject *ouro_take_exception(void);

/* A custom exit rule: rule(signal dict) -> bool. Called while the core works, without the GIL. arg: [callable, exception];
 * what the rule raises stays there. */
int ouro_call_rule(void *arg, const ouro_exit_signal *s);

/* exit_distribution(gate_logit [step, n]) -> float32 [3, step, n]: lambda, pdf, cdf, by the code that generation uses */
PyObject *ouro_python_exit_distribution(PyObject *module, PyObject *gate_logit);

/* Model.exit_steps(states, gate_logit, kind, threshold, min_steps, delay, rule) -> int32 array [n] */
PyObject *ouro_model_exit_steps(PyObject *self, PyObject *args);

/* exit_steps(signals {name: array [step, n]}, kind, threshold, min_steps, delay) -> int32 array [n]: the same rules over numbers that
 * were measured once; one that is not given is NaN. */
PyObject *ouro_python_exit_steps(PyObject *module, PyObject *args);

#endif
