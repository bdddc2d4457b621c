/* Threads that share work, none of which is waited for while it has no core (binary_linear.c includes this).
 *
 * Work is cut into small pieces, and everyone takes pieces until there are none: the caller at once, helpers when the
 * system lets them. The caller waits only for what somebody is in the middle of when no piece is left. A helper that
 * gets no core costs nothing, and no result depends on who computed what.
 *
 * Helpers are the threads that OpenMP keeps for torch, because those spin for milliseconds after each of torch's own
 * products and would be in the way of others. But OpenMP ends with a barrier for all of them: where that turns out to
 * wait, as on a machine with other busy processes, the helpers are threads of our own for a while. They sleep, and are
 * woken once for each call.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    MOST_THREADS = 256,
    SLOTS = 16,            /* callers at the same time that own threads help; others work alone */
    PATIENCE = 50000,      /* ns of looking for a change before sleeping; about what waking a thread takes */
    TURN = 100000,         /* ns, the shortest that Linux gives */
    STACK_BYTES = 1 << 19,
    LOST = 200000,         /* ns that a barrier may wait, beside a quarter of the work */
    SHORTEST_REST = 1 << 26, LONGEST_REST = 1 << 30, /* ns without OpenMP after it has lost time: 1/15 s to 1 s */
};

/* ---- pieces ---- */

/* Consecutive pieces. `next` is on a cache line of its own: everyone adds to it. */
typedef struct {
    _Atomic int64_t next __attribute__((aligned(64)));
    int64_t end;
} share_t;

/* Everyone takes pieces of a share of their own, so that neighbours mostly go to one thread, which has asked for their
 * memory; then those that others have not come to. */
typedef struct {
    int shares;
    _Atomic int arrived;
    share_t share[MOST_THREADS];
} pieces_t;

/* For up to `threads` threads; returns how many of them there is work for. */
static int cut_pieces(pieces_t *of, int64_t pieces, int threads) {
    if (threads > MOST_THREADS)
        threads = MOST_THREADS;
    if (threads > pieces)
        threads = (int)pieces;
    if (threads < 1)
        threads = 1;
    of->shares = threads;
    of->arrived = 0;
    for (int s = 0; s < threads; s++) {
        of->share[s].next = pieces * s / threads;
        of->share[s].end = pieces * (s + 1) / threads;
    }
    return threads;
}

static int first_share(pieces_t *of) { return atomic_fetch_add(&of->arrived, 1) % of->shares; }

/* A piece that nobody has taken, or -1; `share` is where to look first. */
static int64_t take_piece(pieces_t *of, int *share) {
    for (int s = 0; s < of->shares; s++) {
        share_t *from = &of->share[*share];
        if (atomic_load_explicit(&from->next, memory_order_relaxed) < from->end) {
            int64_t piece = atomic_fetch_add(&from->next, 1);
            if (piece < from->end)
                return piece;
        }
        *share = (*share + 1) % of->shares;
    }
    return -1;
}

static int all_taken(pieces_t *of) {
    for (int s = 0; s < of->shares; s++)
        if (atomic_load(&of->share[s].next) < of->share[s].end)
            return 0;
    return 1;
}

/* ---- waiting ---- */

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

#if defined(__linux__)
static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static void forget_sleepers(void) {}

/* Ask for short turns, which come sooner after waking; the share of the processor stays what it was. Linux before 6.12
 * makes nothing of it. */
static void ask_for_short_turns(void) {
#if defined(SYS_sched_getattr) && defined(SYS_sched_setattr)
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } own = {0};
    if (syscall(SYS_sched_getattr, 0, &own, sizeof own, 0) || own.policy != SCHED_OTHER)
        return;
    own.size = sizeof own;
    own.runtime = TURN;
    syscall(SYS_sched_setattr, 0, &own, 0); /* nothing depends on it */
#endif
}
#else
static void ask_for_short_turns(void) {}

static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_changed = PTHREAD_COND_INITIALIZER;

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    pthread_mutex_lock(&sleep_mutex);
    while (atomic_load(word) == value)
        pthread_cond_wait(&sleep_changed, &sleep_mutex);
    pthread_mutex_unlock(&sleep_mutex);
}

static void wake(_Atomic uint32_t *word, int count) {
    (void)word, (void)count;
    pthread_mutex_lock(&sleep_mutex);
    pthread_cond_broadcast(&sleep_changed);
    pthread_mutex_unlock(&sleep_mutex);
}

static void forget_sleepers(void) {
    sleep_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    sleep_changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
#endif

/* Whether *word becomes something else than `value` before PATIENCE is over. */
static int changes_soon(_Atomic uint32_t *word, uint32_t value) {
    int64_t end = nanoseconds() + PATIENCE;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value)
                return 1;
            relax();
        }
    } while (nanoseconds() < end);
    return 0;
}

/* ---- threads of our own ---- */

typedef void (*work_t)(void *job);

/* A caller's offer. `word` counts the helpers inside, above them how many more may come; SLEEPS is set where the
 * caller sleeps until all have left. Slots are never freed, so a late look at one harms nobody. */
enum { INSIDE = 0xfff, ONE_MORE = 0x1000, MORE = 0xfff000, SLEEPS = 0x1000000 };
typedef struct {
    _Atomic uint32_t word __attribute__((aligned(64)));
    _Atomic uint32_t taken;
    work_t work;
    void *job;
} slot_t;

static slot_t slots[SLOTS];
static _Atomic uint32_t offers; /* counts them; sleeping helpers wait for it to change */
static _Atomic uint32_t sleepers, helpers, growing;
static int forked; /* OpenMP's threads are not there either, and it would wait for them */

/* Come in where there is an offer, work, and leave. */
static int help_somebody(void) {
    for (int i = 0; i < SLOTS; i++) {
        slot_t *slot = &slots[i];
        uint32_t word = atomic_load(&slot->word);
        while (word & MORE)
            if (atomic_compare_exchange_weak(&slot->word, &word, word - ONE_MORE + 1)) {
                slot->work(slot->job);
                if (atomic_fetch_sub(&slot->word, 1) == (SLEEPS | 1)) /* the last one */
                    wake(&slot->word, 1);
                return 1;
            }
    }
    return 0;
}

static void *help(void *nothing) {
    ask_for_short_turns();
    for (;;) {
        uint32_t seen = atomic_load(&offers);
        if (help_somebody() || changes_soon(&offers, seen))
            continue;
        atomic_fetch_add(&sleepers, 1);
        sleep_while(&offers, seen);
        atomic_fetch_sub(&sleepers, 1);
    }
    return nothing;
}

static void grow(uint32_t wanted) {
    uint32_t nobody = 0;
    if (atomic_load(&helpers) >= wanted || !atomic_compare_exchange_strong(&growing, &nobody, 1))
        return;
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    if (!pthread_attr_init(&attributes)) {
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        sigfillset(&all); /* signals are for the program's own threads */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (atomic_load(&helpers) < wanted && !pthread_create(&thread, &attributes, help, NULL))
            atomic_fetch_add(&helpers, 1);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
    }
    atomic_store(&growing, 0);
}

/* A forked process has none of the threads. */
static void forget_threads(void) {
    forked = 1;
    sleepers = helpers = growing = 0;
    for (int i = 0; i < SLOTS; i++)
        slots[i].word = slots[i].taken = 0;
    forget_sleepers();
}

__attribute__((constructor)) static void mind_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

/* Until all helpers have left the slot. */
static void wait_for_the_last(slot_t *slot) {
    uint32_t word = atomic_fetch_and(&slot->word, INSIDE) & INSIDE; /* nobody may come any more */
    while (word & INSIDE) {
        if (word & SLEEPS)
            sleep_while(&slot->word, word);
        else if (!changes_soon(&slot->word, word))
            atomic_fetch_or(&slot->word, SLEEPS);
        word = atomic_load(&slot->word);
    }
}

static void run_with_own(work_t work, void *job, int threads) {
    slot_t *slot = NULL;
    uint32_t more = (uint32_t)threads - 1;
    grow(more);
    for (int i = 0; i < SLOTS && !slot; i++) {
        uint32_t nobody = 0;
        if (atomic_compare_exchange_strong(&slots[i].taken, &nobody, 1))
            slot = &slots[i];
    }
    if (!slot) {
        work(job);
        return;
    }
    slot->work = work;
    slot->job = job;
    atomic_store(&slot->word, more * ONE_MORE);
    atomic_fetch_add(&offers, 1);
    if (atomic_load(&sleepers))
        wake(&offers, (int)more);
    work(job);
    wait_for_the_last(slot);
    atomic_store(&slot->word, 0);
    atomic_store(&slot->taken, 0);
}

/* ---- whose threads ---- */

enum { WHOSE_FITS = 0, WHOSE_OWN = 1, WHOSE_OPENMP = 2 };
static int whose = WHOSE_FITS;

#ifdef _OPENMP
static _Atomic int64_t openmp_rests_until, openmp_rest = SHORTEST_REST;

/* False where OpenMP's barriers have lost time lately. */
static int openmp_fits(void) {
    return whose == WHOSE_OPENMP || (whose == WHOSE_FITS && !forked && nanoseconds() >= openmp_rests_until);
}

static void run_with_openmp(work_t work, void *job, int threads) {
    int64_t began = nanoseconds(), worked = 0;
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num()) {
            work(job);
        } else {
            int64_t start = nanoseconds();
            work(job);
            worked = nanoseconds() - start;
        }
    }
    int64_t end = nanoseconds(), lost = end - began - worked, rest = openmp_rest;
    if (lost > LOST + worked / 4) {
        openmp_rests_until = end + rest;
        openmp_rest = rest * 2 < LONGEST_REST ? rest * 2 : LONGEST_REST;
    } else if (rest > SHORTEST_REST) {
        openmp_rest = rest / 2 > SHORTEST_REST ? rest / 2 : SHORTEST_REST;
    }
}
#endif

static void choose_threads(int wanted) {
    whose = wanted;
#ifdef _OPENMP
    openmp_rests_until = 0;
    openmp_rest = SHORTEST_REST;
#endif
}

static int available_cores(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set))
        return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

/* Run work(job) here and in up to threads - 1 others; returns when nobody is inside of it. */
static void run_together(work_t work, void *job, int threads) {
    if (threads > 1) {
        int cores = available_cores();
        if (threads > cores) /* they would only take turns */
            threads = cores;
#ifdef _OPENMP
        else if (openmp_fits()) {
            run_with_openmp(work, job, threads);
            return;
        }
#endif
    }
    if (threads > 1)
        run_with_own(work, job, threads);
    else
        work(job);
}
