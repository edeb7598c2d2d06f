/* harness.h - the few lines that the C tests stand on.
 *
 * Every csrc/tests/test_*.c has `int main(void)` and can be built alone. The Makefile links them all into one program,
 * test_core: each file's main is renamed after the file (-Dmain=test_NAME) and runner.c calls them in order of name.
 * A new test file is found by its name; nothing else has to be written. Its main returns non-zero when something
 * failed, and counts with CHECK, so that test_core can close with the line "N passed, N failed".
 */
#ifndef OURO_TESTS_HARNESS_H
#define OURO_TESTS_HARNESS_H

#include <stdio.h>

/* One counter for the whole program, wherever this header is included. Only the main thread counts. */
__attribute__((weak)) long harness_passed, harness_failed;

/* Counts; prints the first failures with their place and the message (a format and its values). */
#define EXPECT(condition, ...) do { \
        if (condition) harness_passed++; \
        else if (harness_failed++ < 50) { \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            printf(__VA_ARGS__); \
            printf("\n"); \
        } \
    } while (0)

/* Runs one test function and says so; the last words before a crash name it. */
#define RUN(test) do { \
        printf("%s\n", #test); \
        fflush(stdout); \
        test(); \
    } while (0)

#endif
