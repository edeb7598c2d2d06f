/* ouro_status.h - what a function of the core returns: OURO_OK or a negative code, with a detail for people.
 *
 * The detail is thread-local and stays until the next failure on that thread. The core never prints and never exits.
 */
#ifndef OURO_STATUS_H
#define OURO_STATUS_H

typedef enum ouro_status {
    OURO_OK = 0,
    OURO_ERR_ARGUMENT = -1,       /* an argument is NULL, out of range or contradicts another */
    OURO_ERR_SHAPE = -2,          /* sizes do not fit each other */
    OURO_ERR_MEMORY = -3,         /* an allocation failed, or would exceed what is allowed */
    OURO_ERR_CONTEXT = -4,        /* a sequence would be longer than the model's context */
    OURO_ERR_CANCELLED = -5,      /* the caller asked to stop */
    OURO_ERR_STATE = -6,          /* called at the wrong time, e.g. before the weights are complete */
    OURO_ERR_FORMAT = -7,         /* a packed file is damaged or of another version */
    OURO_ERR_UNSUPPORTED = -8,    /* this machine or build can not do it */
    OURO_ERR_SYSTEM = -9,         /* the operating system refused (threads, files) */
    OURO_ERR_BUSY = -10           /* too much is waiting already */
} ouro_status;

#if defined(__GNUC__)
#define OURO_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define OURO_PRINTF(f, a)
#endif

/* Records the detail and returns status. */
int ouro_fail(int status, const char *format, ...) OURO_PRINTF(2, 3);
const char *ouro_last_error(void);
const char *ouro_status_name(int status);

#endif
