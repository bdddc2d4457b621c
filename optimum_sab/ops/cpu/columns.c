/* The two loops of the solver that go from column to column: error feedback (core/feedback.py) and sign descent
 * (core/descent.py), bit for bit what torch computes there.
 *
 * Every row goes its own way through the columns, so rows lie in the lanes of vectors and threads share rows out. What
 * torch adds to all later columns behind each column is added here to a column when its turn comes: the same terms, in
 * the same order, but read from the cache. For a panel of columns at a time the sums stay in registers. Whether a
 * product is rounded before it is added hangs on how torch was compiled; -DSAB_FUSED=0 rounds it, otherwise it is not.
 * Everything else is rounded step by step (-ffp-contract=off).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef SAB_FUSED
#define SAB_FUSED 1
#endif
#ifndef SAB_PATH
#define SAB_PATH 2
#endif
#if SAB_PATH >= 2 && defined(__AVX512F__) && defined(__AVX512DQ__)
enum { PATH = 2, LANES = 16, GROUPS = 4, PANEL = 6 };
#elif SAB_PATH >= 1 && defined(__AVX2__)
enum { PATH = 1, LANES = 8, GROUPS = 2, PANEL = 4 };
#else
enum { PATH = 0, LANES = 4, GROUPS = 2, PANEL = 4 };
#endif
enum { STRIP = LANES * GROUPS }; /* rows that go together */
enum { OK = 0, NO_MEMORY = 1 };

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* A block of columns: how its levels are made, and what one column's error does to later ones. */
typedef struct {
    int64_t rows, width;
    int64_t base_planes, planes;
    const float *row_scale;     /* [rows], of the first plane */
    const float *base_levels;   /* [2^base_planes, rows], every sum of ±a; not read with one base plane */
    const float *levels;        /* [2^planes, rows], of salient columns; not read without one or with one plane */
    const float *column_scale;  /* [width] */
    const uint8_t *salient;     /* [width] */
    const float *coupling;      /* [width, ...]; row j has what column j does to later ones, or minus that */
    int64_t coupling_stride;
    const float *diagonal;      /* [width], by which errors or gradients are divided */
} block_t;

/* Where signs go: plane p, row i, column j at signs[p][i * stride + j]. */
typedef struct {
    float *plane[4];
    int64_t stride;
} signs_t;

/* What a thread works in; every array is [width, STRIP]. */
typedef struct {
    vec *value, *moved, *current;
    ivec *code;
    vec *base_levels, *levels; /* [2^planes, STRIP] */
    vec row_scale[GROUPS];
} scratch_t;

/* sum + factor · m. */
INLINE vec add_product(vec sum, float factor, vec m) {
#if !SAB_FUSED
    return sum + factor * m;
#elif defined(__AVX512F__) && SAB_PATH >= 2
    return (vec)_mm512_fmadd_ps(_mm512_set1_ps(factor), (__m512)m, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__) && SAB_PATH >= 1
    return (vec)_mm256_fmadd_ps(_mm256_set1_ps(factor), (__m256)m, (__m256)sum);
#else
    UNROLL for (int i = 0; i < LANES; i++) sum[i] = fmaf(factor, m[i], sum[i]);
    return sum;
#endif
}

INLINE vec spread(float x) { return x - (vec){0}; }

INLINE vec select_vec(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE ivec select_ivec(ivec mask, ivec yes, ivec no) { return (mask & yes) | (~mask & no); }

static int64_t panels_of(int64_t width) { return (width + PANEL - 1) / PANEL; }

/* coupling with the columns of a panel side by side: [panel][j before the panel's end][PANEL], zero beyond the width. */
static float *pack_coupling(const block_t *b) {
    int64_t panels = panels_of(b->width);
    float *packed = malloc(sizeof(float) * (size_t)(panels * b->width * PANEL) + 64);
    if (!packed) return NULL;
    for (int64_t k = 0; k < panels; k++) {
        float *to = packed + k * b->width * PANEL;
        int64_t first = k * PANEL, count = b->width - first < PANEL ? b->width - first : PANEL;
        for (int64_t j = 0; j < first + count; j++, to += PANEL)
            for (int64_t c = 0; c < PANEL; c++)
                to[c] = c < count ? b->coupling[j * b->coupling_stride + first + c] : 0.0f;
    }
    return packed;
}

/* value[first + c] += coupling[j, first + c] · moved[j] for all j before the panel, j after j. */
INLINE void apply_earlier(const float *packed, vec *value, const vec *moved, int64_t first, int64_t count) {
    vec sum[PANEL][GROUPS];
    UNROLL for (int c = 0; c < PANEL; c++)
        UNROLL for (int g = 0; g < GROUPS; g++) sum[c][g] = c < count ? value[(first + c) * GROUPS + g] : (vec){0};
    for (int64_t j = 0; j < first; j++) {
        vec m[GROUPS];
        UNROLL for (int g = 0; g < GROUPS; g++) m[g] = moved[j * GROUPS + g];
        UNROLL for (int c = 0; c < PANEL; c++) {
            float factor = packed[j * PANEL + c];
            UNROLL for (int g = 0; g < GROUPS; g++) sum[c][g] = add_product(sum[c][g], factor, m[g]);
        }
    }
    UNROLL for (int c = 0; c < PANEL; c++)
        UNROLL for (int g = 0; g < GROUPS; g++) if (c < count) value[(first + c) * GROUPS + g] = sum[c][g];
}

/* The level of column j nearest to `wanted`, the first of equals; its number goes to `code`, bit p the sign of plane p. */
INLINE void pick(const block_t *b, const scratch_t *s, int64_t j, const vec *wanted, vec *found, ivec *code) {
    int64_t active = b->salient[j] ? b->planes : b->base_planes;
    vec scale = spread(b->column_scale[j]);
    if (active == 1) {
        for (int g = 0; g < GROUPS; g++) {
            vec level = s->row_scale[g] * scale;
            ivec up = wanted[g] * level >= 0.0f;
            found[g] = select_vec(up, level, -level);
            code[g] = up & 1;
        }
        return;
    }
    const vec *levels = active == b->base_planes ? s->base_levels : s->levels;
    for (int g = 0; g < GROUPS; g++) {
        vec best = levels[g] * scale;
        vec least = (vec)((ivec)(best - wanted[g]) & 0x7fffffff);
        ivec choice = {0};
        for (int32_t k = 1; k < 1 << active; k++) {
            vec level = levels[k * GROUPS + g] * scale;
            vec distance = (vec)((ivec)(level - wanted[g]) & 0x7fffffff);
            ivec closer = distance < least;
            best = select_vec(closer, level, best);
            least = select_vec(closer, distance, least);
            choice = select_ivec(closer, (ivec){0} + k, choice);
        }
        found[g] = best;
        code[g] = choice;
    }
}

INLINE int64_t rows_from(const block_t *b, int64_t row) { return b->rows - row < STRIP ? b->rows - row : STRIP; }

/* [width, STRIP] of rows [.., width]; rows that are not there are zero. */
static void gather(const float *from, int64_t stride, int64_t count, int64_t width, vec *to) {
    float *out = (float *)to;
    if (count < STRIP) memset(out, 0, sizeof(float) * (size_t)(width * STRIP));
    for (int64_t j = 0; j < width; j += 16)
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = j; c < j + 16 && c < width; c++) out[c * STRIP + i] = from[i * stride + c];
}

/* The same of [count, rows]: a strip of columns. */
static void gather_levels(const float *from, const block_t *b, int64_t row, int64_t planes, vec *to) {
    int64_t count = rows_from(b, row);
    memset(to, 0, sizeof(float) * (size_t)((1 << planes) * STRIP));
    for (int64_t k = 0; k < 1 << planes; k++)
        memcpy((float *)to + k * STRIP, from + k * b->rows + row, sizeof(float) * (size_t)count);
}

static void gather_scales(const block_t *b, int64_t row, scratch_t *s) {
    memset(s->row_scale, 0, sizeof s->row_scale);
    memcpy(s->row_scale, b->row_scale + row, sizeof(float) * (size_t)rows_from(b, row));
    if (b->base_planes > 1) gather_levels(b->base_levels, b, row, b->base_planes, s->base_levels);
    if (b->levels && b->planes > b->base_planes) gather_levels(b->levels, b, row, b->planes, s->levels);
}

/* Signs of the columns that have them; others are left as they are. */
static void scatter_signs(const block_t *b, const scratch_t *s, int64_t row, const signs_t *signs) {
    const int32_t *code = (const int32_t *)s->code;
    int64_t count = rows_from(b, row);
    for (int64_t p = 0; p < b->planes; p++)
        for (int64_t i = 0; i < count; i++) {
            float *to = signs->plane[p] + (row + i) * signs->stride;
            for (int64_t j = 0; j < b->width; j++)
                if (p < b->base_planes || b->salient[j]) to[j] = (code[j * STRIP + i] >> p & 1) ? 1.0f : -1.0f;
        }
}

static int make_scratch(const block_t *b, int descends, scratch_t *s) {
    size_t column = sizeof(vec) * GROUPS, levels = column << b->planes;
    size_t bytes = column * (size_t)b->width * (descends ? 4 : 3) + 2 * levels;
    char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) return 0;
    s->value = (vec *)memory;
    s->moved = s->value + b->width * GROUPS;
    s->code = (ivec *)(s->moved + b->width * GROUPS);
    s->base_levels = (vec *)(s->code + b->width * GROUPS);
    s->levels = (vec *)((char *)s->base_levels + levels);
    s->current = (vec *)((char *)s->levels + levels); /* there only if it descends */
    return 1;
}

/* What is done with a block: descent where `current` is given, else error feedback. */
typedef struct {
    const float *value;   /* [rows, width]: the weight, or the gradient */
    const float *current; /* [rows, ...]: the block's columns of the weight as it is now */
    float *moved;         /* errors [width, rows]; or, [rows, ...], the error that grows by what changes */
    int64_t stride;       /* floats from row to row of the last two, in descent */
} pass_t;

/* One strip. In feedback every column takes the level nearest to it, and `moved` becomes its scaled error. In descent it
 * takes the level that lowers the error most, `moved` becomes by how much the error grows, and `value` is the gradient. */
INLINE void go_through(const block_t *b, const float *packed, scratch_t *s, const int descends) {
    for (int64_t first = 0; first < b->width; first += PANEL, packed += b->width * PANEL) {
        int64_t count = b->width - first < PANEL ? b->width - first : PANEL;
        if (count == PANEL)
            apply_earlier(packed, s->value, s->moved, first, PANEL);
        else
            apply_earlier(packed, s->value, s->moved, first, count);
        for (int64_t j = first; j < first + count; j++) {
            vec *value = s->value + j * GROUPS, wanted[GROUPS], found[GROUPS];
            for (int64_t i = first; i < j; i++) {
                float factor = packed[i * PANEL + j - first];
                for (int g = 0; g < GROUPS; g++) value[g] = add_product(value[g], factor, s->moved[i * GROUPS + g]);
            }
            for (int g = 0; g < GROUPS; g++)
                wanted[g] = descends ? s->current[j * GROUPS + g] + value[g] / b->diagonal[j] : value[g];
            pick(b, s, j, wanted, found, s->code + j * GROUPS);
            for (int g = 0; g < GROUPS; g++)
                s->moved[j * GROUPS + g] =
                    descends ? s->current[j * GROUPS + g] - found[g] : (value[g] - found[g]) / b->diagonal[j];
        }
    }
}

/* What one strip's pass leaves behind, signs aside. */
static void put_moved(const block_t *b, const pass_t *of, const scratch_t *s, int64_t row, int64_t count) {
    const float *moved = (const float *)s->moved;
    if (of->current)
        for (int64_t i = 0; i < count; i++) {
            float *to = of->moved + (row + i) * of->stride;
            for (int64_t j = 0; j < b->width; j++) to[j] += moved[j * STRIP + i];
        }
    else
        for (int64_t j = 0; j < b->width; j++)
            memcpy(of->moved + j * b->rows + row, moved + j * STRIP, sizeof(float) * (size_t)count);
}

static int run(const block_t *b, const pass_t *of, const signs_t *signs, int threads) {
    float *packed = pack_coupling(b);
    if (!packed) return NO_MEMORY;
    int failed = 0;
    int64_t strips = (b->rows + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(threads)
    {
        scratch_t s;
        if (!make_scratch(b, of->current != NULL, &s)) {
#pragma omp atomic write
            failed = 1;
            s.value = NULL;
        }
#pragma omp for schedule(dynamic)
        for (int64_t k = 0; k < strips; k++) {
            if (!s.value) continue;
            int64_t row = k * STRIP, count = rows_from(b, row);
            gather(of->value + row * b->width, b->width, count, b->width, s.value);
            gather_scales(b, row, &s);
            if (of->current) {
                gather(of->current + row * of->stride, of->stride, count, b->width, s.current);
                go_through(b, packed, &s, 1);
            } else {
                go_through(b, packed, &s, 0);
            }
            put_moved(b, of, &s, row, count);
            scatter_signs(b, &s, row, signs);
        }
        free(s.value);
    }
    free(packed);
    return failed ? NO_MEMORY : OK;
}

EXPORT int sab_path(void) { return PATH; }

/* Error feedback through a block. `weight` is [rows, width]; `errors` [width, rows] is what it returns. `coupling` is
 * minus the corner of U. */
EXPORT int sab_feedback(const block_t *b, const float *weight, float *errors, const signs_t *signs, int threads) {
    return run(b, &(pass_t){.value = weight, .moved = errors}, signs, threads);
}

/* A sweep of sign descent through a block. `gradient` is [rows, width]; `current` and `error` are the block's columns of
 * the value and of the error, [rows, ...] with `stride` floats from row to row; `error` grows by what changes.
 * `coupling` is the corner of H. */
EXPORT int sab_descend(const block_t *b, const float *gradient, const float *current, float *error, int64_t stride,
                       const signs_t *signs, int threads) {
    return run(b, &(pass_t){gradient, current, error, stride}, signs, threads);
}
