/* runner.c - main of test_core: every test file in turn, then one line of counts. See harness.h.
 *
 *   test_core [PART ...]       only the files whose name contains one of the parts
 */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

/* suites.inc holds one line SUITE(test_name) for each file; the Makefile writes it */
#define SUITE(name) int name(void);
#include "suites.inc"
#undef SUITE

static const struct suite { const char *name; int (*run)(void); } suites[] = {
#define SUITE(name) {#name, name},
#include "suites.inc"
#undef SUITE
};

static int wanted(const char *name, int n, char **parts)
{
    for (int i = 0; i < n; i++)
        if (strstr(name, parts[i])) return 1;
    return n == 0;
}

int main(int argc, char **argv)
{
    int ran = 0;
    for (size_t i = 0; i < sizeof suites / sizeof *suites; i++) {
        if (!wanted(suites[i].name, argc - 1, argv + 1)) continue;
        ran++;
        printf("== %s\n", suites[i].name);
        long failed = harness_failed;
        int status = suites[i].run();
        if (status && harness_failed == failed) harness_failed++;       /* a failure nobody counted */
    }
    if (!ran) harness_failed++, printf("no test file has such a name\n");
    printf("%ld passed, %ld failed\n", harness_passed, harness_failed);
    return harness_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
