/* The trellis search of coded planes: one survivor per state, each with its own error feedback (eval/coded/search.py).

   Shifting a bit u into a state s of m bits gives the state (s << 1 | u) & (states - 1), so the state n is reached from
   n >> 1 and from (n >> 1) + states / 2: a survivor's choice is one bit, and moving survivors is a shuffle of lanes. */

#include <stdint.h>
#include <string.h>

#define WIDE 8
#define MOST 8 /* vectors: 64 states */
#define PLANES 4
#define LOST 1e30f
#define EXPORT __attribute__((visibility("default")))

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(32), aligned(4)));

struct search {
    int32_t rows, width, states, blocks, derived, free, capacity, tail;
    const float *lower;   /* [width, width]: U transposed, U'U = H^-1 */
    const float *column;  /* [width] */
    const int32_t *block; /* [width]: the block of row scales of a column */
    const int32_t *count; /* [width]: free planes that a column has */
    const float *scale;   /* [derived + free, blocks, rows] */
    const float *sign;    /* [derived, 2, states]: planes of a step into a state, by its choice */
    const uint8_t *forced; /* [rows, tail]: bits of the last columns */
    float *rest;          /* [rows, width] */
    float *cost;          /* [rows, states] */
    float *history;       /* [rows, capacity, states]: scaled errors of the columns that are not settled */
    double *paid;         /* [rows]: costs of what is settled */
    uint64_t *choice;     /* [1 + free, rows, width]: choice, then signs of free planes, a bit for each state */
};

static inline lanes broadcast(int32_t value) { return (lanes){value, value, value, value, value, value, value, value}; }

static inline vec select_lanes(lanes which, vec yes, vec no) { return (vec)(((lanes)yes & which) | ((lanes)no & ~which)); }

static inline vec shuffle(vec low, vec high, lanes index) {
#if defined(__clang__)
    vec result;
    for (int i = 0; i < WIDE; i++) result[i] = index[i] < WIDE ? low[index[i]] : high[index[i] - WIDE];
    return result;
#else
    return __builtin_shuffle(low, high, index);
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

/* Of the vectors `from` of all old states, those that the vector `o` of new states may come from. */
#define FIRST(from, o) ((from)[(o) / 2])
#define SECOND(from, o) ((from)[vectors == 1 ? 0 : vectors / 2 + (o) / 2])

static inline __attribute__((always_inline)) void advance(const struct search *p, int row, int first, int count, int held,
                                                          const int vectors) {
    const lanes pairs = {0, 0, 1, 1, 2, 2, 3, 3};
    const int states = vectors * WIDE;
    vec cost[MOST];
    lanes moved[MOST];
    float *const history = p->history + (int64_t)row * p->capacity * states;
    memcpy(cost, p->cost + (int64_t)row * states, sizeof(vec) * vectors);
    int pending = 0;
    for (int j = first; j < first + count; j++) {
        const int known = held + j - first; /* columns whose errors are kept */
        const float *factor = p->lower + (int64_t)j * p->width + (j - known);
        vec rest[MOST];
        for (int v = 0; v < vectors; v++) rest[v] = (vec){0} + p->rest[(int64_t)row * p->width + j];
        for (int k = 0; k < known; k++) {
            vec now[MOST];
            float *at = history + (int64_t)k * states;
            memcpy(now, at, sizeof(vec) * vectors);
            if (pending && k < known - 1) {
                vec before[MOST];
                memcpy(before, now, sizeof(vec) * vectors);
                for (int o = 0; o < vectors; o++) now[o] = shuffle(FIRST(before, o), SECOND(before, o), moved[o]);
                memcpy(at, now, sizeof(vec) * vectors);
            }
            for (int v = 0; v < vectors; v++) rest[v] -= factor[k] * now[v];
        }
        const int block = p->block[j], free = p->count[j];
        const float inverse = 1.0f / factor[known];
        float level[PLANES], step[PLANES];
        int order[PLANES], flipped[PLANES];
        for (int q = 0; q < p->derived; q++)
            level[q] = p->column[j] * p->scale[((int64_t)q * p->blocks + block) * p->rows + row];
        for (int f = 0; f < free; f++) { /* largest first: then the nearest level is found plane by plane */
            float value = p->column[j] * p->scale[((int64_t)(p->derived + f) * p->blocks + block) * p->rows + row];
            float size = value < 0 ? -value : value;
            int place = f;
            for (; place > 0 && step[place - 1] < size; place--) {
                step[place] = step[place - 1], order[place] = order[place - 1], flipped[place] = flipped[place - 1];
            }
            step[place] = size, order[place] = f, flipped[place] = value < 0;
        }
        vec after[MOST], error[MOST];
        uint64_t chosen = 0, signs[PLANES] = {0};
        for (int o = 0; o < vectors; o++) {
            const lanes near = pairs + broadcast(4 * (o & 1)), far = near + broadcast(vectors == 1 ? 4 : 0);
            vec miss[2], total[2];
            lanes up[2][PLANES];
            for (int c = 0; c < 2; c++) {
                const vec from = c ? SECOND(rest, o) : FIRST(rest, o), paid = c ? SECOND(cost, o) : FIRST(cost, o);
                miss[c] = shuffle(from, from, c ? far : near);
                for (int q = 0; q < p->derived; q++) {
                    vec plane;
                    memcpy(&plane, p->sign + ((q * 2 + c) * states + o * WIDE), sizeof plane);
                    miss[c] -= level[q] * plane;
                }
                for (int f = 0; f < free; f++) {
                    up[c][f] = miss[c] >= 0.0f;
                    const vec size = (vec){0} + step[f];
                    miss[c] -= select_lanes(up[c][f], size, -size);
                }
                miss[c] *= inverse;
                total[c] = shuffle(paid, paid, c ? far : near) + miss[c] * miss[c];
            }
            const lanes second = total[1] < total[0];
            after[o] = select_lanes(second, total[1], total[0]);
            error[o] = select_lanes(second, miss[1], miss[0]);
            moved[o] = near + (second & broadcast(vectors == 1 ? 4 : WIDE));
            chosen |= bits_of(second) << (o * WIDE);
            for (int f = 0; f < free; f++) {
                const lanes sign = (up[1][f] & second) | (up[0][f] & ~second);
                signs[f] |= bits_of(sign) << (o * WIDE);
            }
        }
        if (j >= p->width - p->tail) {
            const int bit = p->forced[(int64_t)row * p->tail + j - (p->width - p->tail)];
            const lanes odd = {0, -1, 0, -1, 0, -1, 0, -1};
            const lanes refused = bit ? ~odd : odd;
            for (int o = 0; o < vectors; o++) after[o] = select_lanes(refused, (vec){0} + LOST, after[o]);
        }
        memcpy(cost, after, sizeof(vec) * vectors);
        memcpy(history + (int64_t)known * states, error, sizeof(vec) * vectors);
        const int64_t place = (int64_t)row * p->width + j, plane = (int64_t)p->rows * p->width;
        p->choice[place] = chosen;
        for (int f = 0; f < free; f++) p->choice[(1 + order[f]) * plane + place] = flipped[f] ? ~signs[f] : signs[f];
        pending = 1;
    }
    const int known = held + count;
    for (int k = 0; pending && k < known - 1; k++) {
        vec before[MOST], now[MOST];
        float *at = history + (int64_t)k * states;
        memcpy(before, at, sizeof(vec) * vectors);
        for (int o = 0; o < vectors; o++) now[o] = shuffle(FIRST(before, o), SECOND(before, o), moved[o]);
        memcpy(at, now, sizeof(vec) * vectors);
    }
    memcpy(p->cost + (int64_t)row * states, cost, sizeof(vec) * vectors);
}

/* Take all rows through `count` columns from `first` on; the errors of `held` columns before it are kept. */
EXPORT void coded_advance(const struct search *p, int first, int count, int held) {
    for (int row = 0; row < p->rows; row++) {
        if (p->states == 8) advance(p, row, first, count, held, 1);
        else if (p->states == 16) advance(p, row, first, count, held, 2);
        else if (p->states == 32) advance(p, row, first, count, held, 4);
        else advance(p, row, first, count, held, 8);
    }
}

static int best(const struct search *p, int row) {
    const float *cost = p->cost + (int64_t)row * p->states;
    int found = 0;
    for (int s = 1; s < p->states; s++)
        if (cost[s] < cost[found]) found = s;
    return found;
}

static int before(const struct search *p, int row, int column, int state) {
    const uint64_t choice = p->choice[(int64_t)row * p->width + column];
    return (state >> 1) + ((choice >> state & 1) ? p->states / 2 : 0);
}

/* Settle the first `count` of the `held` columns before `next`: survivors that disagree with the best are dropped. */
EXPORT void coded_settle(const struct search *p, int next, int held, int count, float *errors) {
    for (int row = 0; row < p->rows; row++) {
        float *cost = p->cost + (int64_t)row * p->states, *history = p->history + (int64_t)row * p->capacity * p->states;
        const int found = best(p, row);
        const float least = cost[found];
        int wanted = -1;
        for (int s = -1; s < p->states; s++) {
            int state = s < 0 ? found : s;
            for (int j = next - 1; j >= next - held + count; j--) state = before(p, row, j, state);
            if (s < 0) wanted = state;
            else cost[s] = state == wanted && cost[s] < LOST / 2 ? cost[s] - least : LOST;
        }
        p->paid[row] += least;
        for (int k = 0; k < count; k++) errors[(int64_t)row * count + k] = history[(int64_t)k * p->states + found];
        memmove(history, history + (int64_t)count * p->states, sizeof(float) * (held - count) * p->states);
    }
}

/* The stored bits [rows, width] of the best path, whose cost is added to what is paid: bit 0 is u, bit 1 + f the sign
   of free plane f. */
EXPORT void coded_trace(const struct search *p, uint8_t *bits) {
    const int64_t plane = (int64_t)p->rows * p->width;
    for (int row = 0; row < p->rows; row++) {
        int state = best(p, row);
        p->paid[row] += p->cost[(int64_t)row * p->states + state];
        for (int j = p->width - 1; j >= 0; j--) {
            const int64_t place = (int64_t)row * p->width + j;
            int value = state & 1;
            for (int f = 0; f < p->count[j]; f++) value |= (int)(p->choice[(1 + f) * plane + place] >> state & 1) << (1 + f);
            bits[place] = (uint8_t)value;
            state = before(p, row, j, state);
        }
    }
}
