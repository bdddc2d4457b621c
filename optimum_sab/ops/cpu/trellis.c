/* The trellis search of coded planes: one survivor for each of 16 states, with its own error feedback (core/trellis.py).

   Shifting a bit u into a state s of m bits gives the state (s << 1 | u) & (states - 1), so the state n is reached from
   n >> 1 and from (n >> 1) + states / 2: a survivor's choice is one bit, and moving survivors is a shuffle of lanes. */

#include <stdint.h>
#include <string.h>

#define WIDE 8
#define VECTORS 2
#define STATES (WIDE * VECTORS)
#define PLANES 4
#define LOST 1e30f
#define EXPORT __attribute__((visibility("default")))

/* As compiler.py asks: 1 with the vectors of AVX2, 0 without. */
EXPORT int sab_path(void) {
#if defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(32), aligned(4)));

typedef struct {
    int32_t rows, width, blocks, derived, free, capacity, tail;
    const float *lower;   /* [width, width]: U transposed, U'U = H^-1 */
    const float *column;  /* [width] */
    const int32_t *block; /* [width]: the block of row scales of a column */
    const int32_t *count; /* [width]: free planes that a column has */
    const float *scale;   /* [derived + free, blocks, rows] */
    const float *sign;    /* [derived, 2, STATES]: planes of a step into a state, by its choice */
    const uint8_t *forced; /* [rows, tail]: bits of the last columns */
    float *rest;          /* [rows, width] */
    float *cost;          /* [rows, STATES] */
    float *history;       /* [rows, capacity, STATES]: scaled errors of the columns that are not settled */
    uint64_t *choice;     /* [1 + free, rows, width]: choice, then signs of free planes, a bit for each state */
} search_t;

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

static inline lanes broadcast(int32_t value) { return (lanes){value, value, value, value, value, value, value, value}; }

static inline vec select_lanes(lanes which, vec yes, vec no) {
#if defined(__AVX__)
    return __builtin_ia32_blendvps256(no, yes, (vec)which);
#else
    return (vec)(((lanes)yes & which) | ((lanes)no & ~which));
#endif
}

static inline vec take_lanes(vec from, lanes index) {
#if defined(__clang__)
    vec result;
    for (int i = 0; i < WIDE; i++) result[i] = from[index[i]];
    return result;
#else
    return __builtin_shuffle(from, index);
#endif
}

static inline uint64_t bits_of(lanes which) {
#if defined(__AVX__)
    return (uint64_t)(unsigned)__builtin_ia32_movmskps256((__attribute__((vector_size(32))) float)which);
#else
    uint64_t bits = 0;
    for (int i = 0; i < WIDE; i++) bits |= (uint64_t)(which[i] & 1) << i;
    return bits;
#endif
}

/* Where the vector `o` of new states comes from, and at which lanes: by choice 0 from the lower half of the states. */
#define FROM(o, c) ((c) ? (vectors == 1 ? 0 : vectors / 2 + (o) / 2) : (o) / 2)
#define LANES(o, c) ((lanes){0, 0, 1, 1, 2, 2, 3, 3} + broadcast(4 * ((o) & 1) + ((c) && vectors == 1 ? 4 : 0)))

static inline __attribute__((always_inline)) void move(const vec *old, const lanes *second, vec *new, const int vectors) {
    UNROLL for (int o = 0; o < vectors; o++)
        new[o] = select_lanes(second[o], take_lanes(old[FROM(o, 1)], LANES(o, 1)), take_lanes(old[FROM(o, 0)], LANES(o, 0)));
}

/* The free planes' sizes at a column, largest first: then the nearest level is found plane by plane. */
struct steps {
    float size[PLANES];
    int order[PLANES], flipped[PLANES];
};

static inline struct steps sorted_steps(const search_t *p, int row, int j) {
    struct steps found = {{0}, {0}, {0}};
    for (int f = 0; f < p->count[j]; f++) {
        const float value = p->column[j] * p->scale[((int64_t)(p->derived + f) * p->blocks + p->block[j]) * p->rows + row];
        const float size = value < 0 ? -value : value;
        int place = f;
        for (; place > 0 && found.size[place - 1] < size; place--) {
            found.size[place] = found.size[place - 1];
            found.order[place] = found.order[place - 1];
            found.flipped[place] = found.flipped[place - 1];
        }
        found.size[place] = size, found.order[place] = f, found.flipped[place] = value < 0;
    }
    return found;
}

static void advance(const search_t *p, int row, int first, int count, int held) {
    enum { vectors = VECTORS };
    vec cost[VECTORS];
    lanes second[VECTORS];
    vec *const history = (vec *)(p->history + (int64_t)row * p->capacity * vectors * WIDE);
    vec *const costs = (vec *)(p->cost + (int64_t)row * vectors * WIDE);
    const vec *const sign = (const vec *)p->sign;
    UNROLL for (int v = 0; v < vectors; v++) cost[v] = costs[v], second[v] = broadcast(0);
    for (int j = first; j < first + count; j++) {
        const int known = held + j - first; /* columns whose errors are kept */
        const float *factor = p->lower + (int64_t)j * p->width + (j - known);
        vec rest[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) rest[v] = (vec){0} + p->rest[(int64_t)row * p->width + j];
        if (j == first) { /* nothing has moved */
            for (int k = 0; k < known; k++)
                UNROLL for (int v = 0; v < vectors; v++) rest[v] -= factor[k] * history[k * vectors + v];
        } else {
            for (int k = 0; k < known - 1; k++) {
                vec old[VECTORS], new[VECTORS];
                UNROLL for (int v = 0; v < vectors; v++) old[v] = history[k * vectors + v];
                move(old, second, new, vectors);
                UNROLL for (int v = 0; v < vectors; v++) {
                    history[k * vectors + v] = new[v];
                    rest[v] -= factor[k] * new[v];
                }
            }
            UNROLL for (int v = 0; v < vectors; v++) rest[v] -= factor[known - 1] * history[(known - 1) * vectors + v];
        }
        const int free = p->count[j];
        const float inverse = 1.0f / factor[known];
        const struct steps steps = sorted_steps(p, row, j);
        float level[PLANES];
        for (int q = 0; q < p->derived; q++)
            level[q] = p->column[j] * p->scale[((int64_t)q * p->blocks + p->block[j]) * p->rows + row];
        vec after[VECTORS];
        uint64_t chosen = 0, signs[PLANES] = {0};
        UNROLL for (int o = 0; o < vectors; o++) {
            vec miss[2], total[2];
            lanes up[2][PLANES];
            UNROLL for (int c = 0; c < 2; c++) {
                miss[c] = take_lanes(rest[FROM(o, c)], LANES(o, c));
                for (int q = 0; q < p->derived; q++) miss[c] -= level[q] * sign[(q * 2 + c) * vectors + o];
                for (int f = 0; f < free; f++) {
                    const vec size = (vec){0} + steps.size[f];
                    up[c][f] = miss[c] >= 0.0f;
                    miss[c] -= select_lanes(up[c][f], size, -size);
                }
                miss[c] *= inverse;
                total[c] = take_lanes(cost[FROM(o, c)], LANES(o, c)) + miss[c] * miss[c];
            }
            second[o] = total[1] < total[0];
            after[o] = select_lanes(second[o], total[1], total[0]);
            history[known * vectors + o] = select_lanes(second[o], miss[1], miss[0]);
            chosen |= bits_of(second[o]) << (o * WIDE);
            for (int f = 0; f < free; f++) {
                const lanes sign = (up[1][f] & second[o]) | (up[0][f] & ~second[o]);
                signs[f] |= bits_of(sign) << (o * WIDE);
            }
        }
        if (j >= p->width - p->tail) {
            const int bit = p->forced[(int64_t)row * p->tail + j - (p->width - p->tail)];
            const lanes odd = {0, -1, 0, -1, 0, -1, 0, -1};
            const lanes refused = bit ? ~odd : odd;
            UNROLL for (int o = 0; o < vectors; o++) after[o] = select_lanes(refused, (vec){0} + LOST, after[o]);
        }
        UNROLL for (int o = 0; o < vectors; o++) cost[o] = after[o];
        const int64_t place = (int64_t)row * p->width + j, plane = (int64_t)p->rows * p->width;
        p->choice[place] = chosen;
        for (int f = 0; f < free; f++)
            p->choice[(1 + steps.order[f]) * plane + place] = steps.flipped[f] ? ~signs[f] : signs[f];
    }
    for (int k = 0; k < held + count - 1; k++) {
        vec old[VECTORS], new[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) old[v] = history[k * vectors + v];
        move(old, second, new, vectors);
        UNROLL for (int v = 0; v < vectors; v++) history[k * vectors + v] = new[v];
    }
    UNROLL for (int v = 0; v < vectors; v++) costs[v] = cost[v];
}

/* Take all rows through `count` columns from `first` on; the errors of `held` columns before it are kept. */
EXPORT void sab_trellis_advance(const search_t *p, int first, int count, int held, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < p->rows; row++) advance(p, row, first, count, held);
}

static int best(const search_t *p, int row) {
    const float *cost = p->cost + (int64_t)row * STATES;
    int found = 0;
    for (int s = 1; s < STATES; s++)
        if (cost[s] < cost[found]) found = s;
    return found;
}

static int before(const search_t *p, int row, int column, int state) {
    const uint64_t choice = p->choice[(int64_t)row * p->width + column];
    return (state >> 1) + ((choice >> state & 1) ? STATES / 2 : 0);
}

/* Settle the first `count` of the `held` columns before `next`: survivors that disagree with the best are dropped. */
EXPORT void sab_trellis_settle(const search_t *p, int next, int held, int count, float *errors, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < p->rows; row++) {
        float *cost = p->cost + (int64_t)row * STATES, *history = p->history + (int64_t)row * p->capacity * STATES;
        const int found = best(p, row);
        const float least = cost[found];
        int wanted = -1;
        for (int s = -1; s < STATES; s++) {
            int state = s < 0 ? found : s;
            for (int j = next - 1; j >= next - held + count; j--) state = before(p, row, j, state);
            if (s < 0) wanted = state;
            else cost[s] = state == wanted && cost[s] < LOST / 2 ? cost[s] - least : LOST;
        }
            for (int k = 0; k < count; k++) errors[(int64_t)row * count + k] = history[(int64_t)k * STATES + found];
        memmove(history, history + (int64_t)count * STATES, sizeof(float) * (held - count) * STATES);
    }
}

/* The stored bits [rows, width] of the best path, bit 0 is u, bit 1 + f the sign
   of free plane f. */
EXPORT void sab_trellis_trace(const search_t *p, uint8_t *bits, int threads) {
    const int64_t plane = (int64_t)p->rows * p->width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int row = 0; row < p->rows; row++) {
        int state = best(p, row);
        for (int j = p->width - 1; j >= 0; j--) {
            const int64_t place = (int64_t)row * p->width + j;
            int value = state & 1;
            for (int f = 0; f < p->count[j]; f++) value |= (int)(p->choice[(1 + f) * plane + place] >> state & 1) << (1 + f);
            bits[place] = (uint8_t)value;
            state = before(p, row, j, state);
        }
    }
}
