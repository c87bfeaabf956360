/* The threads that share one op's work. */

#pragma once

#include "vectors.h"

/* Which part of the work a thread takes. */
typedef struct {
    int rank, of;
} Share;

typedef void Part(const void *arguments, Share share);

/* Run `part` once for each thread that is there, and return when all are done. `work` estimates its cost in products
   (or four times the elements it touches); too little is done by the caller alone. The result must not depend on how
   many share. */
void together(Part *part, const void *arguments, i64 work);

/* The share's range of `count` things. */
INLINE i64 first_of(Share share, i64 count) { return count * share.rank / share.of; }
INLINE i64 last_of(Share share, i64 count) { return count * (share.rank + 1) / share.of; }
