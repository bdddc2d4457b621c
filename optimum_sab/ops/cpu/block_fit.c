/* The rounds of the alternating fit of one block (core/alternating.py), row by row while a row is in the cache: its signs
 * for the last scales, its row scales, and what it adds to the sums that the next column scales are made of. The same
 * formulas as in torch; sums are rounded in another order.
 *
 * Salient columns come last, so that a row is two runs of columns: of the base planes, and of all planes.
 */
#include <float.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { PATH = 2 };
#elif defined(__AVX2__)
enum { PATH = 1 };
#else
enum { PATH = 0 };
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
enum { MAX_PLANES = 4, CHUNK = 64, STRIP = 64 /* rows whose column sums are kept in fp32 */ };
enum { OK = 0, NO_MEMORY = 1 };

typedef struct {
    int64_t rows, width, plain; /* columns; those before the salient ones */
    int64_t base_planes, planes, iterations;
    const float *weight;       /* [rows, width] */
    const float *significance; /* [width] */
    float *column_scale;       /* [width], changed in place */
    float *row_scale;          /* [planes, rows], written */
    float *sign;               /* [planes, rows, width], changed in place; the first columns of residual planes are not */
} fit_t;

/* The nearest of the levels c · Σ ±a to every weight of a run, the first of equals. */
INLINE void choose(const float *restrict w, const float *restrict c, const float *restrict a, float *const *sign,
                   int64_t n, const int planes) {
    if (planes == 1) {
        float *restrict only = sign[0];
        for (int64_t j = 0; j < n; j++) only[j] = a[0] * c[j] * w[j] >= 0.0f ? 1.0f : -1.0f;
        return;
    }
    float level[1 << MAX_PLANES];
    for (int k = 0; k < 1 << planes; k++) {
        level[k] = 0.0f;
        for (int p = 0; p < planes; p++) level[k] += k >> p & 1 ? a[p] : -a[p];
    }
    int32_t picked[CHUNK];
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t count = n - first < CHUNK ? n - first : CHUNK;
        for (int64_t j = 0; j < count; j++) {
            float least = FLT_MAX;
            int32_t pick = 0;
            for (int32_t k = 0; k < 1 << planes; k++) {
                float miss = w[first + j] - level[k] * c[first + j], distance = miss * miss;
                pick = distance < least ? k : pick;
                least = distance < least ? distance : least;
            }
            picked[j] = pick;
        }
        for (int p = 0; p < planes; p++) {
            float *restrict to = sign[p] + first;
            for (int64_t j = 0; j < count; j++) to[j] = picked[j] >> p & 1 ? 1.0f : -1.0f;
        }
    }
}

/* Adds a run's part of the system of a row's scales. */
INLINE void add_moments(const float *w, const float *pulled, const float *moment, float *const *sign, int64_t n,
                        const int planes, double gram[MAX_PLANES][MAX_PLANES], double *right) {
    float all = 0.0f, r[MAX_PLANES] = {0}, g[MAX_PLANES][MAX_PLANES] = {{0}};
#pragma omp simd reduction(+ : all)
    for (int64_t j = 0; j < n; j++) all += moment[j];
    for (int p = 0; p < planes; p++) {
        float sum = 0.0f;
        const float *s = sign[p];
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += s[j] * (w[j] * pulled[j]);
        r[p] = sum;
        for (int q = p + 1; q < planes; q++) {
            float both = 0.0f;
            const float *t = sign[q];
#pragma omp simd reduction(+ : both)
            for (int64_t j = 0; j < n; j++) both += s[j] * t[j] * moment[j];
            g[p][q] = both;
        }
    }
    for (int p = 0; p < planes; p++) {
        right[p] += r[p];
        gram[p][p] += all;
        for (int q = p + 1; q < planes; q++) gram[p][q] += g[p][q];
    }
}

/* Least squares with a vanishing ridge, as in torch; by Cholesky. */
static void solve_small(double gram[MAX_PLANES][MAX_PLANES], double *right, int64_t planes, float *a) {
    double trace = 0.0, L[MAX_PLANES][MAX_PLANES];
    for (int64_t p = 0; p < planes; p++) trace += gram[p][p];
    double ridge = (trace > FLT_MIN * 1e8 ? trace : FLT_MIN * 1e8) * 1e-7;
    for (int64_t p = 0; p < planes; p++)
        for (int64_t q = p; q < planes; q++) {
            double value = gram[p][q] + (p == q ? ridge : 0.0);
            for (int64_t k = 0; k < p; k++) value -= L[p][k] * L[q][k] * L[k][k]; /* L D Lᵀ, D on the diagonal */
            if (p == q)
                L[p][p] = value > 0.1 * ridge ? value : 0.1 * ridge;
            else
                L[q][p] = value / L[p][p];
        }
    for (int64_t p = 0; p < planes; p++)
        for (int64_t k = 0; k < p; k++) right[p] -= L[p][k] * right[k];
    for (int64_t p = planes - 1; p >= 0; p--) {
        right[p] /= L[p][p];
        for (int64_t k = p + 1; k < planes; k++) right[p] -= L[k][p] * right[k];
        a[p] = (float)right[p];
    }
}

/* Adds a run's v·w and v², v = Σ a s. */
INLINE void add_columns(const float *restrict w, const float *a, float *const *sign, int64_t n, const int planes,
                        float *restrict above, float *restrict below) {
    const float *s[MAX_PLANES];
    for (int p = 0; p < planes; p++) s[p] = sign[p];
    for (int64_t j = 0; j < n; j++) {
        float v = 0.0f;
        for (int p = 0; p < planes; p++) v += a[p] * s[p][j];
        above[j] += v * w[j];
        below[j] += v * v;
    }
}

/* One of `choose`, `add_moments` and `add_columns` with the number of planes known when it is compiled. */
#define WITH_PLANES(planes, call)                                                                                       \
    switch (planes) {                                                                                                   \
    case 1: { enum { P = 1 }; call; break; }                                                                            \
    case 2: { enum { P = 2 }; call; break; }                                                                            \
    case 3: { enum { P = 3 }; call; break; }                                                                            \
    default: { enum { P = 4 }; call; }                                                                                  \
    }

typedef struct {
    int64_t first, count; /* columns of a run */
    int planes;
} run_t;

static void signs_of(const fit_t *f, const run_t *run, int64_t row, float **sign) {
    for (int p = 0; p < run->planes; p++) sign[p] = f->sign + (p * f->rows + row) * f->width + run->first;
}

static void choose_row(const fit_t *f, const run_t *runs, int64_t row, const float *a) {
    for (int r = 0; r < 2; r++) {
        const run_t *run = runs + r;
        float *sign[MAX_PLANES];
        signs_of(f, run, row, sign);
        const float *w = f->weight + row * f->width + run->first, *c = f->column_scale + run->first;
        WITH_PLANES(run->planes, choose(w, c, a, sign, run->count, P))
    }
}

EXPORT int sab_path(void) { return PATH; }

EXPORT int sab_fit_block(const fit_t *f) {
    const int64_t width = f->width;
    float *memory = malloc(sizeof(float) * 4 * (size_t)width + sizeof(double) * 2 * (size_t)width);
    if (!memory) return NO_MEMORY;
    double *totals = (double *)memory;
    float *pulled = (float *)(totals + 2 * width), *moment = pulled + width, *above = moment + width;
    float *below = above + width;
    const run_t runs[2] = {{0, f->plain, (int)f->base_planes}, {f->plain, width - f->plain, (int)f->planes}};
    for (int64_t round = 0; round < f->iterations; round++) {
        memset(totals, 0, sizeof(double) * 2 * (size_t)width);
        for (int64_t j = 0; j < width; j++) {
            pulled[j] = f->significance[j] * f->column_scale[j];
            moment[j] = f->significance[j] * (f->column_scale[j] * f->column_scale[j]);
        }
        for (int64_t strip = 0; strip < f->rows; strip += STRIP) {
            memset(above, 0, sizeof(float) * 2 * (size_t)width);
            for (int64_t i = strip; i < f->rows && i < strip + STRIP; i++) {
                float a[MAX_PLANES];
                for (int64_t p = 0; p < f->planes; p++) a[p] = f->row_scale[p * f->rows + i];
                if (round) choose_row(f, runs, i, a);
                double gram[MAX_PLANES][MAX_PLANES] = {{0}}, right[MAX_PLANES] = {0};
                for (int r = 0; r < 2; r++) {
                    const run_t *run = runs + r;
                    float *sign[MAX_PLANES];
                    signs_of(f, run, i, sign);
                    const float *w = f->weight + i * width + run->first;
                    WITH_PLANES(run->planes, add_moments(w, pulled + run->first, moment + run->first, sign, run->count,
                                                         P, gram, right))
                }
                solve_small(gram, right, f->planes, a);
                for (int64_t p = 0; p < f->planes; p++) f->row_scale[p * f->rows + i] = a[p];
                for (int r = 0; r < 2; r++) {
                    const run_t *run = runs + r;
                    float *sign[MAX_PLANES];
                    signs_of(f, run, i, sign);
                    const float *w = f->weight + i * width + run->first;
                    WITH_PLANES(run->planes,
                                add_columns(w, a, sign, run->count, P, above + run->first, below + run->first))
                }
            }
            for (int64_t j = 0; j < width; j++) totals[j] += above[j], totals[width + j] += below[j];
        }
        for (int64_t j = 0; j < width; j++)
            if (totals[width + j] * f->significance[j] > 0.0)
                f->column_scale[j] = (float)(totals[j] / totals[width + j]);
    }
    for (int64_t i = 0; i < f->rows; i++) {
        float a[MAX_PLANES];
        for (int64_t p = 0; p < f->planes; p++) a[p] = f->row_scale[p * f->rows + i];
        choose_row(f, runs, i, a);
    }
    free(memory);
    return OK;
}
