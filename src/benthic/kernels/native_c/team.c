/* One caller and its helpers: fork and join around single ops, cheap enough for ops of a few microseconds.

   The caller asks a helper by writing to the helper's own cache line and hears from it there: two transfers between
   cores an op, no system call. A helper that is not at hand is not waited for but left out:

   - After its last job a helper watches its line for SPINS looks, then offers its core to others between looks
     (AWAY meanwhile, so that nobody counts on it), and sleeps after IDLE_NS without a job. An idle engine burns nothing.
   - Where other processes hold the cores, a helper is mostly AWAY and the caller works alone, at the speed of one
     thread. Only a helper that loses its core in the middle of a job is waited for. */

#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#define MOST_HELPERS 63
#define LEAST_WORK (96 << 10) /* about two microseconds of one thread; asking and hearing takes half of one */
#define SPINS 2000
#define IDLE_NS 2000000

enum { AWAY, WAITING, ASKED, GO };

typedef struct {
    _Atomic int state;
    Part *part;
    const void *arguments;
    Share share;
} __attribute__((aligned(128))) Helper;

static Helper helpers[MOST_HELPERS];
static _Thread_local int wanted; /* how many helpers this caller may ask */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static _Atomic int started, sleeping;
static pid_t owner;    /* under `lock`: the process whose threads they are */
static unsigned rouses; /* under `lock`: how often sleepers were woken */

INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static i64 now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void sleep_until_woken(void) {
    pthread_mutex_lock(&lock);
    unsigned seen = rouses;
    atomic_fetch_add(&sleeping, 1);
    while (rouses == seen) pthread_cond_wait(&wake, &lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&lock);
}

/* Returns once the caller has asked for this helper and written its job. */
static void wait_for_job(Helper *self) {
    i64 since = now_ns();
    for (;;) {
        atomic_store_explicit(&self->state, WAITING, memory_order_release);
        for (int i = 0; i < SPINS; i++) {
            if (atomic_load_explicit(&self->state, memory_order_acquire) == GO) return;
            relax();
        }
        int expected = WAITING;
        if (!atomic_compare_exchange_strong(&self->state, &expected, AWAY)) {
            while (atomic_load_explicit(&self->state, memory_order_acquire) != GO) relax();
            return;
        }
        if (now_ns() - since < IDLE_NS) {
            sched_yield();
        } else {
            sleep_until_woken();
            since = now_ns();
        }
    }
}

static void *serve(void *argument) {
    Helper *self = argument;
    for (;;) {
        wait_for_job(self);
        self->part(self->arguments, self->share);
    }
    return 0;
}

/* Helpers are started when they are first wanted; fewer than that will do. */
static void start(int helpers_wanted) {
    sigset_t all, before;
    sigfillset(&all); /* signals are for the process's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; started < helpers_wanted; started++) {
        atomic_store(&helpers[started].state, AWAY);
        if (pthread_create(&thread, 0, serve, &helpers[started])) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static void muster(int threads) {
    wanted = threads - 1 < MOST_HELPERS ? threads - 1 : MOST_HELPERS;
    pid_t self = getpid();
    if (started >= wanted && owner == self && !sleeping) return;
    pthread_mutex_lock(&lock);
    if (owner != self) { /* a forked child has none of its parent's threads */
        owner = self;
        started = 0;
        sleeping = 0;
    }
    start(wanted);
    rouses++;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
}

void together(Part *part, const void *arguments, i64 work) {
    Helper *asked[MOST_HELPERS];
    int count = 0;
    for (int i = 0; i < wanted && i < started && work >= LEAST_WORK * (count + 1); i++) {
        int expected = WAITING;
        if (atomic_load_explicit(&helpers[i].state, memory_order_relaxed) == WAITING &&
            atomic_compare_exchange_strong(&helpers[i].state, &expected, ASKED))
            asked[count++] = &helpers[i];
    }
    for (int i = 0; i < count; i++) {
        asked[i]->part = part;
        asked[i]->arguments = arguments;
        asked[i]->share = (Share){i + 1, count + 1};
        atomic_store_explicit(&asked[i]->state, GO, memory_order_release);
    }
    part(arguments, (Share){0, count + 1});
    for (int i = 0; i < count; i++)
        for (int looks = 0; atomic_load_explicit(&asked[i]->state, memory_order_acquire) == GO; looks++)
            if (looks < SPINS) relax();
            else sched_yield();
}

typedef struct {
    void (*function)(const void *arguments);
    const void *arguments;
} Call;

/* Make calls one after another with up to `threads` threads. */
void run(const Call *calls, i64 count, int threads) {
    if (threads > 1) muster(threads);
    else wanted = 0;
    for (i64 i = 0; i < count; i++) calls[i].function(calls[i].arguments);
}

void run_one(void (*function)(const void *arguments), const void *arguments, int threads) {
    run(&(Call){function, arguments}, 1, threads);
}
