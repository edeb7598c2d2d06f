/* lookup.c - see lookup.h. */
#include "engine/lookup.h"

#define LONGEST 16               /* tokens that are compared; more would tell no more */
#define FURTHEST 8192            /* places that are looked at */

int32_t ouro_lookup(const int32_t *tokens, int n)
{
    int best = OURO_LOOKUP_LEAST - 1, last = n > FURTHEST ? n - FURTHEST : 0;
    int32_t next = -1;
    for (int end = n - 1; end > last && best < LONGEST; end--) {     /* a stretch that ends before `end` */
        int same = 0;
        while (same < end && same < LONGEST && tokens[end - 1 - same] == tokens[n - 1 - same]) same++;
        if (same > best) best = same, next = tokens[end];
    }
    return next;
}
