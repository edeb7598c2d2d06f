/* status.c - thread-local failure details; see ouro_status.h. */
#include "ouro_status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char detail[512] = "";

int ouro_fail(int status, const char *format, ...)
{
    char text[sizeof detail];                /* an argument may be the last detail itself */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(detail, text, sizeof detail);
    return status;
}

const char *ouro_last_error(void) { return detail; }

const char *ouro_status_name(int status)
{
    static const char *const names[] = {"ok", "bad argument", "bad shape", "out of memory", "context too long",
                                        "cancelled", "wrong state", "bad format", "unsupported", "system error",
                                        "too busy"};
    int i = -status;
    return i >= 0 && i < (int)(sizeof names / sizeof *names) ? names[i] : "unknown status";
}
