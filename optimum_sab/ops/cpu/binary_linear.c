/* A linear with a packed binary weight (docs/format.md), computed from the stored tensors as they are.
 *
 * A row's signs are bits, so four columns of one row are a number from 0 to 15, and what they contribute to an output
 * is one of 16 sums ±x0±x1±x2±x3 that every row shares. Those sums are built once per token; a row then costs one
 * lookup and one addition per four columns, and a 16-entry lookup in 16 rows at a time is one instruction of AVX-512.
 * Rows lie in the lanes of a vector, as they do in row_scale [planes, blocks, out]; nothing is summed across lanes.
 *
 * Vectors are those of GCC and Clang, which compile them for any processor; only the lookup, the transposition of sign
 * words and the decoding of scales are written again for AVX2 and AVX-512. -DSAB_PATH=0 forces the portable path,
 * -DSAB_PATH=1 AVX2. All arithmetic is fp32, but for bf16 inputs with AVX-512 or Arm's dot products (integers.h) and
 * coded planes with AVX2 (coded.h); -ffp-contract=off keeps `dequantize` exact. -DSAB_DOTS=1 does in portable code what
 * dot products do, slowly, to compare with.
 */
#define _GNU_SOURCE /* sched_getaffinity */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "pool.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed sign words are read as bytes, lowest first"
#endif

#ifndef SAB_PATH
#define SAB_PATH 2
#endif
#if SAB_PATH >= 2 && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define PATH 2
#elif SAB_PATH >= 1 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PATH 1
#else
#define PATH 0
#endif
/* Whether the portable path has products of bytes that are added by fours. */
#if PATH == 0 && (defined(SAB_DOTS) || (SAB_PATH >= 1 && defined(__ARM_FEATURE_DOTPROD)))
#define DOTS 1
#else
#define DOTS 0
#endif
#define INTEGERS (PATH == 2 || DOTS)

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROLL _Pragma("GCC unroll 1")

/* LANES rows in a vector, GROUPS vectors side by side (they share every load of a table), TABLE floats per nibble. */
#if PATH == 2
enum { LANES = 16, GROUPS = 4, TABLE = 16 };
#elif PATH == 1
enum { LANES = 8, GROUPS = 2, TABLE = 16 };
#else
enum { LANES = 8, GROUPS = 2, TABLE = 4 };
#endif
enum {
    STRIP = LANES * GROUPS, /* rows that are computed together */
    PANEL_BITS = 128,       /* columns of one transposition */
    LINE_BITS = 512,        /* and with tables of integers */
    WORDS = PANEL_BITS / 32,
    TILE = 32,              /* most tokens per pass over the weight */
    FLOAT_TILE = 8,         /* with tables of floats, where 4 and 16 are slower */
    TOKENS = 4,             /* tokens in registers */
    PLANES = 4,             /* MAX_PLANES of core/settings.py */
    PADDING = 64,           /* floats after a row in scratch memory */
    SMALL = 1 << 18,        /* weights times tokens below which waking threads costs more than they save */
};
enum { F32 = 0, BF16 = 1, F16 = 2 };
enum { OK = 0, NO_MEMORY = 1 };

typedef float vecf __attribute__((vector_size(4 * LANES)));
typedef int32_t veci __attribute__((vector_size(4 * LANES)));
typedef float vecf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The stored tensors and what their shapes follow from; `kernel.py` has the same structure. */
typedef struct {
    const uint8_t *weight;
    const uint8_t *residual_sign;
    const void *residual_index;
    const void *row_scale;
    const int8_t *row_exponent; /* fp8 only, else NULL */
    const uint16_t *col_scale;
    int64_t rows, columns, block_size;
    int64_t base_planes, residual_planes;
    int64_t salient, salient_last; /* salient columns of a block, and of the last block */
    int64_t wide_index;            /* residual_index is int16 */
    int64_t coded;                 /* by which code the first base plane stands for two, or 0 (coded.h) */
} layer_t;

/* Bits of one block inside one panel, with tables of integers half a line at most. A table is built from exactly these
 * bits; its other columns count as 0. */
typedef struct {
    int32_t block;
    int32_t first, last; /* nibbles of the panel */
    int32_t table;       /* index of the first nibble's table, or of the first step's */
    int32_t steps, bytes; /* integers.h; `bytes`: a step is a byte and not two nibbles of a word's halves; dots.h: a
                             step is a word */
    int64_t bit, end;    /* bits of the plane */
} piece_t;

/* PANEL_BITS or LINE_BITS columns of a plane, at a multiple of as many from the row's start and on. */
typedef struct {
    int64_t byte, bytes;
    int32_t first, last; /* pieces */
} panel_t;

/* How the rows of the coded plane, of the other base planes, or of the residual planes, are cut. */
typedef struct {
    int64_t row_bytes, planes, first_plane;
    panel_t *panels;
    piece_t *pieces;
    int32_t panel_count, piece_count, table_count;
} cut_t;

/* ---- numbers ---- */

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of_bf16(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }

INLINE uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (uint16_t)rounded;
}

INLINE float float_of_f16(uint16_t half) {
#if PATH >= 1
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
    if (exponent == 31)
        return float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent)
        return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float value = (float)mantissa * 0x1p-24f;
    return sign ? -value : value;
#endif
}

INLINE uint16_t f16_of_float(float value) {
#if PATH >= 1
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (size >= 0x477ff000u) /* 65520 and on round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (size >= 0x38800000u) /* 2^-14: normal */
        return (uint16_t)(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13));
    /* Adding 1/2 leaves the value in units of 2^-24, rounded to nearest even, in the lowest bits. */
    return (uint16_t)(sign | (bits_of_float(float_of_bits(size) + 0.5f) - 0x3f000000u));
#endif
}

INLINE float float_of_e4m3(uint8_t byte) {
    uint32_t sign = (uint32_t)(byte & 0x80u) << 24, size = byte & 0x7fu;
    if (size == 0x7f)
        return float_of_bits(sign | 0x7fc00000u);
    if (size >= 8)
        return float_of_bits(sign | ((size << 20) + (120u << 23)));
    float value = (float)size * 0x1p-9f;
    return sign ? -value : value;
}

INLINE void floats_of_f16(float *out, const uint16_t *from, int64_t count) {
    int64_t j = 0;
#if PATH >= 1
    for (; j + 8 <= count; j += 8)
        _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + j))));
#endif
    for (; j < count; j++)
        out[j] = float_of_f16(from[j]);
}

/* `count` values of x at `x[first]` times their column scales. */
INLINE void scale_inputs(float *out, const void *x, int dtype, int64_t first, int64_t count, const float *c) {
    if (dtype == F32) {
        const float *from = (const float *)x + first;
        for (int64_t j = 0; j < count; j++)
            out[j] = from[j] * c[j];
    } else if (dtype == BF16) {
        const uint16_t *from = (const uint16_t *)x + first;
        for (int64_t j = 0; j < count; j++)
            out[j] = float_of_bf16(from[j]) * c[j];
    } else {
        const uint16_t *from = (const uint16_t *)x + first;
        for (int64_t j = 0; j < count; j++)
            out[j] = float_of_f16(from[j]) * c[j];
    }
}

/* `count` floats into `out[first]` and on, rounded once. */
INLINE void store_values(void *out, int dtype, int64_t first, const float *value, int64_t count) {
    if (dtype == F32) {
        memcpy((float *)out + first, value, (size_t)count * 4);
    } else if (dtype == BF16) {
        uint16_t *to = (uint16_t *)out + first;
        for (int64_t j = 0; j < count; j++)
            to[j] = bf16_of_float(value[j]);
    } else {
        uint16_t *to = (uint16_t *)out + first;
        int64_t j = 0;
#if PATH >= 1
        for (; j + 8 <= count; j += 8)
            _mm_storeu_si128((__m128i *)(to + j),
                             _mm256_cvtps_ph(_mm256_loadu_ps(value + j), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; j < count; j++)
            to[j] = f16_of_float(value[j]);
    }
}

/* value[j] += bias[first + j], as when a rounded output is given its bias: the sum of what is stored is rounded again. */
INLINE void add_bias(float *value, const void *bias, int dtype, int64_t first, int64_t count) {
    if (dtype == F32)
        for (int64_t j = 0; j < count; j++)
            value[j] += ((const float *)bias)[first + j];
    else if (dtype == BF16)
        for (int64_t j = 0; j < count; j++)
            value[j] = float_of_bf16(bf16_of_float(value[j])) + float_of_bf16(((const uint16_t *)bias)[first + j]);
    else
        for (int64_t j = 0; j < count; j++)
            value[j] = float_of_f16(f16_of_float(value[j])) + float_of_f16(((const uint16_t *)bias)[first + j]);
}

/* a[plane, block, row .. row + STRIP) without the row exponent; rows from `valid` on get 0. */
INLINE void decode_scales(vecf *scale, const layer_t *layer, int64_t plane_block, int64_t row, int64_t valid) {
    int64_t at = plane_block * layer->rows + row;
#if PATH == 2
    UNROLL for (int g = 0; g < GROUPS; g++) {
        int64_t left = valid - g * LANES;
        __mmask16 lanes = (__mmask16)(left >= LANES ? 0xffff : left <= 0 ? 0 : (1u << left) - 1u);
        if (layer->row_exponent) {
            /* e4m3's bits, shifted, are those of a half 2^8 smaller; the conversion is exact, subnormals included. */
            __m128i bytes = _mm_maskz_loadu_epi8(lanes, (const uint8_t *)layer->row_scale + at + g * LANES);
            __m256i size = _mm256_and_si256(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(0x7f));
            __m256i sign = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 8);
            __m256i half = _mm256_ternarylogic_epi32(_mm256_slli_epi16(size, 7), sign, _mm256_set1_epi16(-0x8000),
                                                     0xf8 /* a | (b & c) */);
            half = _mm256_mask_mov_epi16(half, _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f)),
                                         _mm256_set1_epi16(0x7e00));
            scale[g] = (vecf)_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
        } else {
            scale[g] = (vecf)_mm512_cvtph_ps(
                _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)layer->row_scale + at + g * LANES));
        }
    }
#elif PATH == 1
    const int64_t size = layer->row_exponent ? 1 : 2;
    const uint8_t *from = (const uint8_t *)layer->row_scale + at * size;
    uint8_t rest[2 * STRIP] = {0};
    if (valid < STRIP) {
        memcpy(rest, from, (size_t)(valid * size));
        from = rest;
    }
    __m256i half;
    if (layer->row_exponent) { /* as above */
        __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), largest = _mm256_set1_epi16(0x7f);
        half = _mm256_and_si256(wide, largest);
        __m256i none = _mm256_cmpeq_epi16(half, largest);
        half = _mm256_or_si256(_mm256_slli_epi16(half, 7), _mm256_and_si256(wide, _mm256_set1_epi16(-0x8000)));
        half = _mm256_blendv_epi8(half, _mm256_set1_epi16(0x7e00), none);
    } else {
        half = _mm256_loadu_si256((const __m256i *)from);
    }
    const __m256 unit = _mm256_set1_ps(layer->row_exponent ? 256.0f : 1.0f);
    scale[0] = (vecf)_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), unit);
    scale[1] = (vecf)_mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), unit);
#else
    float value[STRIP] = {0};
    int64_t count = valid < STRIP ? valid : STRIP;
    if (layer->row_exponent)
        for (int64_t r = 0; r < count; r++)
            value[r] = float_of_e4m3(((const uint8_t *)layer->row_scale)[at + r]);
    else
        for (int64_t r = 0; r < count; r++)
            value[r] = float_of_f16(((const uint16_t *)layer->row_scale)[at + r]);
    memcpy(scale, value, sizeof value);
#endif
}

/* ---- cutting a layer ---- */

INLINE int64_t block_count(const layer_t *layer) {
    return (layer->columns + layer->block_size - 1) / layer->block_size;
}

INLINE int64_t salient_total(const layer_t *layer) {
    return layer->residual_planes ? (block_count(layer) - 1) * layer->salient + layer->salient_last : 0;
}

static void free_cut(cut_t *cut) {
    free(cut->panels);
    free(cut->pieces);
}

/* The steps of a piece (integers.h). Whole words need a shift and no more; what is behind a row's end counts as 0. */
INLINE void count_steps(piece_t *piece, int64_t bits) {
    int begins = piece->bit % 32 == 0, ends = piece->end % 32 == 0 || piece->end == bits;
    piece->bytes = !(begins && ends);
    if (DOTS)
        piece->steps = (piece->last + 7) / 8 - piece->first / 8;
    else
        piece->steps = piece->bytes ? (piece->last + 1) / 2 - piece->first / 2 : (piece->last - piece->first + 7) / 8 * 4;
}

/* Cut `bits` bits per row, `per_block` of them in every block (the last has what is left), into panels and pieces.
 * `cut` has what else is known, and nothing where there is nothing to cut. */
static int make_cut(cut_t *cut, int64_t bits, int64_t per_block, int64_t blocks, int integers) {
    if (cut->planes == 0 || bits == 0) {
        memset(cut, 0, sizeof *cut);
        return OK;
    }
    const int64_t width = integers ? LINE_BITS : PANEL_BITS, most = integers ? LINE_BITS / 2 : PANEL_BITS;
    int64_t panels = (bits + width - 1) / width;
    cut->panels = malloc((size_t)panels * sizeof(panel_t));
    cut->pieces = malloc((size_t)(panels * (width / most) + blocks) * sizeof(piece_t));
    if (!cut->panels || !cut->pieces)
        return NO_MEMORY; /* free_plan frees what there is */
    for (int64_t start = 0; start < bits; start += width) {
        int64_t stop = start + width < bits ? start + width : bits;
        panel_t *panel = &cut->panels[cut->panel_count++];
        panel->byte = start / 8;
        panel->bytes = cut->row_bytes - panel->byte < width / 8 ? cut->row_bytes - panel->byte : width / 8;
        panel->first = cut->piece_count;
        for (int64_t bit = start; bit < stop;) {
            int64_t block = bit / per_block, end = (block + 1) * per_block;
            end = end < bit + most ? end : bit + most;
            piece_t *piece = &cut->pieces[cut->piece_count++];
            piece->block = (int32_t)block;
            piece->bit = bit;
            piece->end = bit = end < stop ? end : stop;
            piece->first = (int32_t)((piece->bit - start) / 4);
            piece->last = (int32_t)((piece->end - start + 3) / 4);
            count_steps(piece, bits);
            piece->table = cut->table_count;
            cut->table_count += integers ? piece->steps : piece->last - piece->first;
        }
        panel->last = cut->piece_count;
    }
    return OK;
}

/* ---- tables ---- */

INLINE void build_table(float *table, const float *x) {
#if PATH == 0
    memcpy(table, x, 16);
#elif PATH == 1
    const __m256 sign0 = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), sign1 = _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1);
    const __m256 sign2 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1);
    __m256 low = _mm256_add_ps(_mm256_mul_ps(_mm256_broadcast_ss(x), sign0),
                               _mm256_mul_ps(_mm256_broadcast_ss(x + 1), sign1));
    __m256 third = _mm256_mul_ps(_mm256_broadcast_ss(x + 2), sign2), last = _mm256_broadcast_ss(x + 3);
    _mm256_storeu_ps(table, _mm256_add_ps(low, _mm256_sub_ps(third, last)));
    _mm256_storeu_ps(table + 8, _mm256_add_ps(low, _mm256_add_ps(third, last)));
#else
    static const float sign[4][16] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    for (int entry = 0; entry < 16; entry++)
        table[entry] = (x[0] * sign[0][entry] + x[1] * sign[1][entry]) +
                       (x[2] * sign[2][entry] + x[3] * sign[3][entry]);
#endif
}

/* The columns of a residual piece, and their scales. */
static void find_columns(int64_t *column, float *c, const layer_t *layer, const piece_t *piece) {
    for (int64_t j = 0; j < piece->end - piece->bit; j++) {
        int64_t offset = layer->wide_index ? ((const uint16_t *)layer->residual_index)[piece->bit + j]
                                           : ((const uint8_t *)layer->residual_index)[piece->bit + j];
        column[j] = piece->block * layer->block_size + offset;
        if (column[j] >= layer->columns) /* a damaged index may give a wrong sum, never a read outside x */
            column[j] = layer->columns - 1;
        c[j] = float_of_f16(layer->col_scale[column[j]]);
    }
}

/* The tables of one piece for `tokens` tokens, x[token] [columns]: `tables` [nibble, token, TABLE]. */
static void build_tables(float *tables, const layer_t *layer, const piece_t *piece, int residual,
                         const void *const *x, int dtype, int64_t tokens) {
    int64_t count = piece->end - piece->bit, lead = piece->bit % 4;
    int64_t column[PANEL_BITS];
    float c[PANEL_BITS], padded[PANEL_BITS + 8], gathered[PANEL_BITS];
    if (residual)
        find_columns(column, c, layer, piece);
    else
        floats_of_f16(c, layer->col_scale + piece->bit, count);
    memset(padded, 0, sizeof padded);
    for (int64_t t = 0; t < tokens; t++) {
        if (residual) {
            for (int64_t j = 0; j < count; j++)
                scale_inputs(gathered + j, x[t], dtype, column[j], 1, c + j);
            memcpy(padded + lead, gathered, (size_t)count * 4);
        } else {
            scale_inputs(padded + lead, x[t], dtype, piece->bit, count, c);
        }
        for (int64_t n = 0; n < piece->last - piece->first; n++)
            build_table(tables + ((piece->table + n) * tokens + t) * TABLE, padded + 4 * n);
    }
}

/* ---- the product ---- */

/* acc[t][g] += the sums that the lowest nibbles of `bits` pick. */
INLINE void add_nibble(vecf acc[TOKENS][GROUPS], const float *table, const veci *bits, const int tokens) {
#if PATH == 2
    UNROLL for (int t = 0; t < tokens; t++) {
        __m512 sums = _mm512_loadu_ps(table + t * TABLE);
        UNROLL for (int g = 0; g < GROUPS; g++) {
            __m512 found = _mm512_permutexvar_ps((__m512i)bits[g], sums); /* by the low four bits of each lane */
            /* Zen adds in two of its four units and multiplies in the others: as fma(found, 1, acc), which is the same
             * number, half of the additions go there; 12 % faster on Zen 4. */
            acc[t][g] = (t + g) % 2 ? (vecf)_mm512_fmadd_ps(found, _mm512_set1_ps(1.0f), (__m512)acc[t][g])
                                    : acc[t][g] + (vecf)found;
        }
    }
#elif PATH == 1
    UNROLL for (int t = 0; t < tokens; t++) {
        __m256 low = _mm256_loadu_ps(table + t * TABLE), high = _mm256_loadu_ps(table + t * TABLE + 8);
        UNROLL for (int g = 0; g < GROUPS; g++) {
            __m256i index = (__m256i)bits[g];
            acc[t][g] += (vecf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                _mm256_permutevar8x32_ps(high, index),
                                                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
        }
    }
#else
    UNROLL for (int j = 0; j < 4; j++) {
        UNROLL for (int g = 0; g < GROUPS; g++) {
            veci minus = (~bits[g] << (31 - j)) & INT32_MIN;
            UNROLL for (int t = 0; t < tokens; t++) {
                veci x = (veci){0} + (int32_t)bits_of_float(table[t * TABLE + j]);
                acc[t][g] += (vecf)(x ^ minus);
            }
        }
    }
#endif
}

/* y[t][row] += a[row] · Σ of the piece's signed inputs, for STRIP rows and `tokens` tokens. */
INLINE void add_piece(float *y, const veci *words, const piece_t *piece, const float *table, int64_t stride,
                      const vecf *scale, const int tokens) {
    vecf acc[TOKENS][GROUPS] = {0};
    int nibble = piece->first;
    while (nibble < piece->last) {
        int word = nibble >> 3, last = (word + 1) * 8;
        veci bits[GROUPS];
        if (!(nibble & 7) && last <= piece->last) { /* a whole word, the usual case */
            UNROLL for (int g = 0; g < GROUPS; g++) bits[g] = words[word * GROUPS + g];
            ROLL for (int n = 0; n < 8; n++) {
                add_nibble(acc, table, bits, tokens);
                UNROLL for (int g = 0; g < GROUPS; g++) bits[g] >>= 4;
                table += stride;
            }
            nibble = last;
            continue;
        }
        last = last < piece->last ? last : piece->last;
        UNROLL for (int g = 0; g < GROUPS; g++) bits[g] = words[word * GROUPS + g] >> 4 * (nibble & 7);
        for (; nibble < last; nibble++) {
            add_nibble(acc, table, bits, tokens);
            UNROLL for (int g = 0; g < GROUPS; g++) bits[g] >>= 4;
            table += stride;
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int g = 0; g < GROUPS; g++) {
            vecf_any *sum = (vecf_any *)(y + t * STRIP + g * LANES);
#if PATH == 2
            *sum = (vecf_any)_mm512_fmadd_ps((__m512)scale[g], (__m512)acc[t][g], (__m512)*sum);
#else
            *sum = *sum + scale[g] * acc[t][g];
#endif
        }
    }
}

/* words[word][row] of a panel of STRIP rows. Past the last row the last row is repeated; its results are not used. */
INLINE void transpose_rows(veci *words, const uint8_t *bits, int64_t row_bytes, int64_t bytes, int64_t last) {
#if PATH == 2
    __mmask16 inside = (__mmask16)((1u << bytes) - 1u);
    for (int g = 0; g < GROUPS; g++) {
        __m512i part[4];
        UNROLL for (int i = 0; i < 4; i++) {
            __m128i row[4];
            UNROLL for (int q = 0; q < 4; q++) {
                int64_t r = g * LANES + 4 * q + i;
                const uint8_t *from = bits + (r < last ? r : last) * row_bytes;
                row[q] = bytes == 16 ? _mm_loadu_si128((const __m128i *)from) : _mm_maskz_loadu_epi8(inside, from);
            }
            part[i] = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(row[0]), row[1], 1)),
                _mm256_inserti128_si256(_mm256_castsi128_si256(row[2]), row[3], 1), 1);
        }
        __m512i low01 = _mm512_unpacklo_epi32(part[0], part[1]), low23 = _mm512_unpacklo_epi32(part[2], part[3]);
        __m512i high01 = _mm512_unpackhi_epi32(part[0], part[1]), high23 = _mm512_unpackhi_epi32(part[2], part[3]);
        words[0 * GROUPS + g] = (veci)_mm512_unpacklo_epi64(low01, low23);
        words[1 * GROUPS + g] = (veci)_mm512_unpackhi_epi64(low01, low23);
        words[2 * GROUPS + g] = (veci)_mm512_unpacklo_epi64(high01, high23);
        words[3 * GROUPS + g] = (veci)_mm512_unpackhi_epi64(high01, high23);
    }
#elif PATH == 1
    for (int g = 0; g < GROUPS; g++) {
        __m256i part[4]; /* rows i and 4 + i */
        UNROLL for (int i = 0; i < 4; i++) {
            int32_t row[2][WORDS] = {{0}};
            UNROLL for (int q = 0; q < 2; q++) {
                int64_t r = g * LANES + 4 * q + i;
                memcpy(row[q], bits + (r < last ? r : last) * row_bytes, (size_t)bytes);
            }
            part[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)row[0])),
                                              _mm_loadu_si128((const __m128i *)row[1]), 1);
        }
        __m256i low01 = _mm256_unpacklo_epi32(part[0], part[1]), low23 = _mm256_unpacklo_epi32(part[2], part[3]);
        __m256i high01 = _mm256_unpackhi_epi32(part[0], part[1]), high23 = _mm256_unpackhi_epi32(part[2], part[3]);
        words[0 * GROUPS + g] = (veci)_mm256_unpacklo_epi64(low01, low23);
        words[1 * GROUPS + g] = (veci)_mm256_unpackhi_epi64(low01, low23);
        words[2 * GROUPS + g] = (veci)_mm256_unpacklo_epi64(high01, high23);
        words[3 * GROUPS + g] = (veci)_mm256_unpackhi_epi64(high01, high23);
    }
#else
    int32_t out[WORDS][STRIP];
    for (int64_t r = 0; r < STRIP; r++) {
        int32_t row[WORDS] = {0};
        memcpy(row, bits + (r < last ? r : last) * row_bytes, (size_t)bytes);
        UNROLL for (int w = 0; w < WORDS; w++) out[w][r] = row[w];
    }
    memcpy(words, out, sizeof out);
#endif
}

INLINE void transpose(veci *words, const uint8_t *bits, int64_t row_bytes, int64_t bytes, int64_t valid) {
    if (valid >= STRIP && bytes == PANEL_BITS / 8) /* constants, which the compiler makes use of */
        transpose_rows(words, bits, row_bytes, PANEL_BITS / 8, STRIP);
    else
        transpose_rows(words, bits, row_bytes, bytes, (valid < STRIP ? valid : STRIP) - 1);
}

/* `add_piece` for any number of tokens. */
INLINE void add_tokens(float *y, const veci *words, const piece_t *piece, const float *table, const vecf *scale,
                       int64_t tokens) {
    int64_t t = 0, stride = tokens * TABLE;
    for (; t + TOKENS <= tokens; t += TOKENS)
        add_piece(y + t * STRIP, words, piece, table + t * TABLE, stride, scale, TOKENS);
    if (tokens - t == 3)
        add_piece(y + t * STRIP, words, piece, table + t * TABLE, stride, scale, 3);
    else if (tokens - t == 2)
        add_piece(y + t * STRIP, words, piece, table + t * TABLE, stride, scale, 2);
    else if (tokens - t == 1)
        add_piece(y + t * STRIP, words, piece, table + t * TABLE, stride, scale, 1);
}

/* Ask for a stretch of memory that the next panel of rows will read. */
INLINE void prefetch(const void *start, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch((const char *)start + at, 0, 2);
}

/* y [tokens, STRIP] += the planes of `cut` for `valid` rows from `row` on. */
static void add_planes(float *y, const layer_t *layer, const cut_t *cut, const uint8_t *bits, const float *tables,
                       int64_t tokens, int64_t row, int64_t valid) {
    int64_t blocks = block_count(layer), scale_bytes = layer->row_exponent ? 1 : 2;
    int64_t next = row + valid, ahead = layer->rows - next < STRIP ? layer->rows - next : STRIP;
    for (int64_t p = 0; p < cut->planes; p++) {
        const uint8_t *plane = bits + p * layer->rows * cut->row_bytes;
        int64_t plane_block = (cut->first_plane + p) * blocks;
        for (int32_t i = 0; i < cut->panel_count; i++) {
            const panel_t *panel = &cut->panels[i];
            /* The next rows' signs are one contiguous stretch; each panel asks for its share of it. */
            prefetch(plane + next * cut->row_bytes + ahead * panel->byte, ahead * panel->bytes);
            veci words[WORDS * GROUPS];
            transpose(words, plane + row * cut->row_bytes + panel->byte, cut->row_bytes, panel->bytes, valid);
            for (int32_t k = panel->first; k < panel->last; k++) {
                const piece_t *piece = &cut->pieces[k];
                int64_t scales = plane_block + piece->block;
                prefetch((const char *)layer->row_scale + (scales * layer->rows + next) * scale_bytes,
                         ahead * scale_bytes);
                vecf scale[GROUPS];
                decode_scales(scale, layer, scales, row, valid);
                add_tokens(y, words, piece, tables + piece->table * tokens * TABLE, scale, tokens);
            }
        }
    }
}

#include "coded.h"

static void *scratch(int64_t floats) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)(floats > 0 ? floats : 1) * 4) ? NULL : memory;
}

/* What is added to a strip one after the other: each has its own tables. */
enum { CODED, BASE, RESIDUAL, CUTS };

/* How layers of one shape are cut, and how much room the tables of a tile take. */
typedef struct {
    cut_t cut[CUTS];
    int dtype;    /* of inputs, outputs and biases */
    int integers; /* tables of integers (integers.h) */
    int64_t tile, table_floats;
} plan_t;

/* Tokens that are multiplied together: pointers to the input and the output of each. */
typedef struct {
    const layer_t *layer;
    const void *bias; /* NULL where there is none */
    int64_t tokens;
    const void *x[TILE];
    void *y[TILE];
} tile_t;

INLINE int64_t value_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

static void free_plan(plan_t *plan) {
    for (int i = 0; i < CUTS; i++)
        free_cut(&plan->cut[i]);
}

/* What is left to be done to a strip's sums, and y. */
static void finish_strip(const plan_t *plan, const tile_t *tile, float *sum, int64_t row) {
    const layer_t *layer = tile->layer;
    int64_t valid = layer->rows - row < STRIP ? layer->rows - row : STRIP, count = tile->tokens;
    if (layer->row_exponent)
        for (int64_t r = 0; r < valid; r++) {
            float unit = ldexpf(1.0f, layer->row_exponent[row + r]);
            for (int64_t t = 0; t < count; t++)
                sum[t * STRIP + r] *= unit;
        }
    for (int64_t t = 0; t < count; t++) {
        if (tile->bias)
            add_bias(sum + t * STRIP, tile->bias, plan->dtype, row, valid);
        store_values(tile->y[t], plan->dtype, row, sum + t * STRIP, valid);
    }
}

#if INTEGERS
#include "integers.h"
#endif

/* Of one cut's tables for `tokens` tokens. */
static int64_t floats_of_tables(const plan_t *plan, int cut, int64_t tokens) {
#if INTEGERS
    if (plan->integers)
        return integer_floats(&plan->cut[cut], tokens);
#endif
    return cut == CODED ? coded_floats(&plan->cut[CODED], tokens) : plan->cut[cut].table_count * tokens * TABLE;
}

/* `plan` is to be freed whatever this returns. */
static int make_plan(plan_t *plan, const layer_t *layer, int dtype, int64_t tokens) {
    int64_t blocks = block_count(layer), salient = salient_total(layer), coded = layer->coded ? 1 : 0;
    int64_t row_bytes = (layer->columns + 31) / 32 * 4;
    memset(plan, 0, sizeof *plan);
    plan->dtype = dtype;
    plan->integers = INTEGERS && dtype == BF16;
    plan->tile = plan->integers ? TILE : FLOAT_TILE;
    if (plan->tile > tokens)
        plan->tile = tokens;
    plan->cut[CODED] = (cut_t){.row_bytes = row_bytes, .planes = coded};
    plan->cut[BASE] = (cut_t){.row_bytes = row_bytes, .planes = layer->base_planes - coded, .first_plane = coded};
    plan->cut[RESIDUAL] = (cut_t){
        .row_bytes = (salient + 7) / 8, .planes = layer->residual_planes, .first_plane = layer->base_planes};
    for (int i = CODED; i < CUTS; i++) {
        int status = make_cut(&plan->cut[i], i == RESIDUAL ? salient : layer->columns,
                              i == RESIDUAL ? layer->salient : layer->block_size, blocks, plan->integers);
        if (status != OK)
            return status;
        plan->table_floats += floats_of_tables(plan, i, plan->tile);
    }
    return OK;
}

static void build_tile(float *tables, const plan_t *plan, const tile_t *tile) {
#if INTEGERS
    if (plan->integers) {
        build_integers(tables, plan, tile);
        return;
    }
#endif
    build_coded_tables(tables, tile->layer, &plan->cut[CODED], tile->x, plan->dtype, tile->tokens);
    tables += floats_of_tables(plan, CODED, tile->tokens);
    for (int i = BASE; i <= RESIDUAL; i++) {
        for (int32_t k = 0; k < plan->cut[i].piece_count; k++)
            build_tables(tables, tile->layer, &plan->cut[i].pieces[k], i == RESIDUAL, tile->x, plan->dtype,
                         tile->tokens);
        tables += floats_of_tables(plan, i, tile->tokens);
    }
}

/* STRIP rows of y, from `row` on, for the tokens of one tile. */
static void multiply_strip(const plan_t *plan, const tile_t *tile, const float *tables, int64_t row) {
    const layer_t *layer = tile->layer;
    int64_t valid = layer->rows - row < STRIP ? layer->rows - row : STRIP, count = tile->tokens;
    float sum[FLOAT_TILE * STRIP] __attribute__((aligned(64)));
    memset(sum, 0, sizeof(float) * (size_t)(count * STRIP));
    const cut_t *base = &plan->cut[BASE];
    add_coded_plane(sum, layer, &plan->cut[CODED], tables, count, row, valid);
    tables += floats_of_tables(plan, CODED, count);
    add_planes(sum, layer, base, layer->weight + base->first_plane * layer->rows * base->row_bytes, tables, count, row,
               valid);
    tables += floats_of_tables(plan, BASE, count);
    add_planes(sum, layer, &plan->cut[RESIDUAL], layer->residual_sign, tables, count, row, valid);
    finish_strip(plan, tile, sum, row);
}

/* Strips that one piece of work has: as many as share what they read of the tables, where that is more than the cache
 * holds, but no more than leave everyone work. */
static int64_t strips_together(const plan_t *plan, int64_t strips, int threads) {
#if INTEGERS
    int64_t share = strips / (4 * (threads > 1 ? threads : 1));
    if (plan->integers && plan->table_floats * 4 > PART_BYTES)
        return share < 1 ? 1 : share < TOGETHER ? share : TOGETHER;
#endif
    (void)plan, (void)strips, (void)threads;
    return 1;
}

/* `strips` strips of y, from `row` on, as far as there are. */
static void multiply_strips(const plan_t *plan, const tile_t *tile, const float *tables, int64_t row, int64_t strips) {
    int64_t end = row + strips * STRIP < tile->layer->rows ? row + strips * STRIP : tile->layer->rows;
#if INTEGERS
    if (plan->integers) {
        multiply_integers(plan, tile, tables, row, end);
        return;
    }
#endif
    for (; row < end; row += STRIP)
        multiply_strip(plan, tile, tables, row);
}

/* Layers of one input that are multiplied together: of the same columns and settings. Where they have the same column
 * scales and salient columns too, as the solver gives to siblings, they read the same tables. */
enum { MEMBERS = 4 };

/* What threads that multiply share. A piece is `together` strips of one member for the tokens of one tile; pieces are
 * numbered tile by tile. */
typedef struct {
    const layer_t *layer[MEMBERS];
    const void *bias[MEMBERS]; /* NULL where there is none */
    void *y[MEMBERS];
    int64_t together, parts[MEMBERS + 1]; /* of the members before, each of `together` strips */
    int members, tables_of[MEMBERS]; /* the first member that has the same tables */
    plan_t plan;
    const void *x;
    int64_t tokens;
    pieces_t *pieces;
} product_t;

static tile_t tile_of(const product_t *of, int member, int64_t first) {
    const layer_t *layer = of->layer[member];
    int64_t left = of->tokens - first, size = value_bytes(of->plan.dtype);
    tile_t tile = {.layer = layer, .bias = of->bias[member], .tokens = left < of->plan.tile ? left : of->plan.tile};
    for (int64_t t = 0; t < tile.tokens; t++) {
        tile.x[t] = (const char *)of->x + (first + t) * layer->columns * size;
        tile.y[t] = (char *)of->y[member] + (first + t) * layer->rows * size;
    }
    return tile;
}

/* Every thread builds the tables that it reads: that takes a hundredth of the time, and nobody waits for anybody. */
static void multiply(void *job) {
    product_t *of = job;
    const int64_t parts = of->parts[of->members];
    int64_t tile_number = -1, piece;
    int tile_member = -1, built_of = -1, share = first_share(of->pieces);
    tile_t tile;
    float *tables = all_taken(of->pieces) ? NULL : scratch(of->plan.table_floats);
    while (tables && (piece = take_piece(of->pieces, &share)) >= 0) {
        int64_t number = piece / parts, part = piece % parts;
        int member = 0;
        while (part >= of->parts[member + 1])
            member++;
        int built = number == tile_number && of->tables_of[member] == built_of;
        if (number != tile_number || member != tile_member)
            tile = tile_of(of, member, number * of->plan.tile);
        if (!built)
            build_tile(tables, &of->plan, &tile);
        tile_number = number;
        tile_member = member;
        built_of = of->tables_of[member];
        multiply_strips(&of->plan, &tile, tables, (part - of->parts[member]) * of->together * STRIP, of->together);
    }
    free(tables);
}

/* Whether the tables of two layers are the same for every input. */
static int same_tables(const layer_t *one, const layer_t *other) {
    size_t index = (size_t)salient_total(one) * (one->wide_index ? 2 : 1);
    return !memcmp(one->col_scale, other->col_scale, (size_t)one->columns * 2) &&
           (!index || !memcmp(one->residual_index, other->residual_index, index));
}

/* y [tokens, rows] = x [tokens, columns] Ŵᵀ + bias [rows] for each of up to MEMBERS layers; all but the layers of type
 * `dtype` and contiguous. `bias`, or one of them, may be NULL. */
EXPORT int sab_linears(int members, const layer_t *const *layer, void *const *y, const void *const *bias, const void *x,
                       int64_t tokens, int dtype, int threads) {
    pieces_t pieces;
    product_t of = {.members = members, .x = x, .tokens = tokens, .pieces = &pieces};
    const layer_t *first = layer[0];
    int64_t strips = 0;
    for (int m = 0; m < members; m++) {
        of.layer[m] = layer[m];
        of.y[m] = y[m];
        of.bias[m] = bias ? bias[m] : NULL;
        of.tables_of[m] = m && same_tables(layer[m - 1], layer[m]) ? of.tables_of[m - 1] : m;
        strips += (layer[m]->rows + STRIP - 1) / STRIP;
    }
    int status = tokens ? make_plan(&of.plan, first, dtype, tokens) : OK;
    if (status == OK && tokens) {
        int64_t tiles = (tokens + of.plan.tile - 1) / of.plan.tile;
        if (strips * STRIP * first->columns * tokens < SMALL)
            threads = 1;
        of.together = strips_together(&of.plan, tiles * strips, threads);
        for (int m = 0; m < members; m++)
            of.parts[m + 1] = of.parts[m] + (layer[m]->rows + of.together * STRIP - 1) / (of.together * STRIP);
        run_together(multiply, &of, cut_pieces(&pieces, tiles * of.parts[members], threads));
        status = all_taken(&pieces) ? OK : NO_MEMORY;
    }
    free_plan(&of.plan);
    return status;
}

/* The same for one layer. */
EXPORT int sab_linear(const layer_t *layer, void *y, const void *bias, const void *x, int64_t tokens, int dtype,
                      int threads) {
    return sab_linears(1, &layer, &y, &bias, x, tokens, dtype, threads);
}

#include "experts.h"

/* ---- the dense weight ---- */

/* The salient columns as one bit per column. */
static void mark_salient(uint8_t *mark, const layer_t *layer) {
    int64_t salient = salient_total(layer);
    for (int64_t s = 0; s < salient; s++) {
        int64_t block = s / layer->salient;
        int64_t offset = layer->wide_index ? ((const uint16_t *)layer->residual_index)[s]
                                           : ((const uint8_t *)layer->residual_index)[s];
        int64_t column = block * layer->block_size + offset;
        if (column < layer->columns)
            mark[column / 8] |= (uint8_t)(1u << column % 8);
    }
}

/* Bits of a residual plane's row, moved to the places of their columns. `bits` may be read 16 bytes past its end. */
static void spread_bits(uint8_t *out, const uint8_t *bits, const uint8_t *mark, int64_t columns) {
    int64_t rank = 0;
    for (int64_t column = 0; column < columns; column += 64) {
        uint64_t places, low, high, spread = 0;
        memcpy(&places, mark + column / 8, 8);
        memcpy(&low, bits + rank / 8, 8);
        memcpy(&high, bits + rank / 8 + 8, 8);
        uint64_t run = rank % 8 ? low >> rank % 8 | high << (64 - rank % 8) : low;
#if defined(__BMI2__) && PATH >= 1
        spread = _pdep_u64(run, places);
#else
        for (uint64_t left = places; left; left &= left - 1, run >>= 1)
            if (run & 1)
                spread |= left & -left;
#endif
        memcpy(out + column / 8, &spread, 8);
        rank += __builtin_popcountll(places);
    }
}

#if PATH == 2
INLINE __mmask16 lane_mask(const uint8_t *bits) {
    uint16_t word;
    memcpy(&word, bits, 2);
    return (__mmask16)word;
}
#else
/* All ones in the lanes whose bit is 1. */
INLINE veci lane_mask(const uint8_t *bits) {
    static const veci bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return (((veci){0} + (int32_t)*bits) & bit) != 0;
}
#endif

/* +value in the lanes whose bit is 1, −value in the others. */
INLINE vecf signed_by(const uint8_t *bits, float value) {
#if PATH == 2
    return (vecf)_mm512_mask_blend_ps(lane_mask(bits), _mm512_set1_ps(-value), _mm512_set1_ps(value));
#else
    veci all = (veci){0} + (int32_t)bits_of_float(value);
    return (vecf)(all ^ (~lane_mask(bits) & INT32_MIN));
#endif
}

/* value + more in the lanes whose bit is 1, value in the others. */
INLINE vecf add_where(const uint8_t *bits, vecf value, vecf more) {
#if PATH == 2
    return (vecf)_mm512_mask_add_ps((__m512)value, lane_mask(bits), (__m512)value, (__m512)more);
#else
    veci inside = lane_mask(bits);
    return (vecf)((inside & (veci)(value + more)) | (~inside & (veci)value));
#endif
}

/* One row of the dense weight: the planes' bits, one pointer for each, base planes first. */
typedef struct {
    const uint8_t *bits[PLANES]; /* a coded plane's two first */
    const uint8_t *salient;      /* one bit per column */
    const float *column_scale;
} row_t;

/* Columns `start` .. `end` of one block: base planes in order, residual planes in order, then the column scale. */
INLINE void dequantize_block(float *out, const row_t *row, const float *a, int64_t start, int64_t end,
                             const int64_t base_planes, const int64_t residual_planes) {
    for (int64_t column = start; column < end; column += LANES) {
        vecf value = {0};
        for (int64_t p = 0; p < base_planes; p++)
            value += signed_by(row->bits[p] + column / 8, a[p]);
        for (int64_t p = base_planes; p < base_planes + residual_planes; p++)
            value = add_where(row->salient + column / 8, value, signed_by(row->bits[p] + column / 8, a[p]));
        *(vecf_any *)(out + column - start) = value * *(const vecf_any *)(row->column_scale + column);
    }
}

/* One row into out[first ..], block by block; `scale` [plane, block] has the stride STRIP, `dense` holds a block. */
static void dequantize_row(void *out, int dtype, int64_t first, float *dense, const layer_t *layer, const row_t *row,
                           const float *scale) {
    const int64_t blocks = block_count(layer), coded = layer->coded ? 1 : 0;
    const int64_t base = layer->base_planes + coded, residual = layer->residual_planes;
    const int64_t block_size = layer->block_size, columns = layer->columns;
    const row_t local = *row;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * block_size, end = start + block_size < columns ? start + block_size : columns;
        float a[PLANES];
        for (int64_t p = coded; p < base + residual; p++)
            a[p] = scale[((p - coded) * blocks + block) * STRIP];
        if (coded) {
            a[0] = a[1];
            a[1] = 0.5f * a[0];
        }
        if (base == 1 && residual == 1) /* the default, compiled without its loops */
            dequantize_block(dense, &local, a, start, end, 1, 1);
        else
            dequantize_block(dense, &local, a, start, end, base, residual);
        store_values(out, dtype, first + start, dense, end - start);
    }
}

/* What threads that make rows dense share; a piece is a strip. */
typedef struct {
    const layer_t *layer;
    int64_t begin, end;
    void *out;
    int dtype;
    const float *column_scale;
    const uint8_t *mark;
    int64_t mark_bytes;
    pieces_t *pieces;
} dense_t;

/* What one of them needs: a dense block, the scales of a strip, and a row's residual bits as stored and in place. */
typedef struct {
    float *dense, *scale;
    uint8_t *stored, *residual, *derived;
} room_t;

static void free_room(room_t *room) {
    free(room->dense);
    free(room->scale);
    free(room->stored);
    free(room->residual);
    free(room->derived);
}

static int make_room(room_t *room, const dense_t *of) {
    const layer_t *layer = of->layer;
    room->dense = scratch(layer->block_size);
    room->scale = scratch((layer->base_planes + layer->residual_planes) * block_count(layer) * STRIP);
    room->stored = calloc((size_t)((salient_total(layer) + 7) / 8 + 24), 1);
    room->residual = calloc((size_t)(of->mark_bytes * PLANES), 1);
    room->derived = malloc((size_t)((layer->columns + 31) / 32 * 8));
    if (room->dense && room->scale && room->stored && room->residual && room->derived)
        return OK;
    free_room(room);
    return NO_MEMORY;
}

static void dequantize_strip(const dense_t *of, const room_t *room, int64_t first) {
    const layer_t *layer = of->layer;
    int64_t blocks = block_count(layer), planes = layer->base_planes + layer->residual_planes;
    int64_t row_bytes = (layer->columns + 31) / 32 * 4, salient_bytes = (salient_total(layer) + 7) / 8;
    int64_t coded = layer->coded ? 1 : 0;
    int64_t valid = of->end - first < STRIP ? of->end - first : STRIP;
    float unit[STRIP];
    for (int64_t r = 0; r < STRIP; r++)
        unit[r] = layer->row_exponent && r < valid ? ldexpf(1.0f, layer->row_exponent[first + r]) : 1.0f;
    for (int64_t k = 0; k < planes * blocks; k++) {
        vecf raw[GROUPS];
        decode_scales(raw, layer, k, first, valid);
        for (int g = 0; g < GROUPS; g++)
            *(vecf_any *)(room->scale + k * STRIP + g * LANES) = raw[g] * *(const vecf_any *)(unit + g * LANES);
    }
    for (int64_t r = 0; r < valid; r++) {
        int64_t row = first + r;
        row_t one = {.salient = of->mark, .column_scale = of->column_scale};
        for (int64_t p = 0; p < layer->base_planes; p++)
            one.bits[coded + p] = layer->weight + (p * layer->rows + row) * row_bytes;
        if (coded) {
            derive_row(room->derived, room->derived + row_bytes, one.bits[1], row_bytes, layer->coded);
            one.bits[0] = room->derived;
            one.bits[1] = room->derived + row_bytes;
        }
        for (int64_t p = 0; p < layer->residual_planes; p++) {
            uint8_t *residual = room->residual + p * of->mark_bytes;
            one.bits[coded + layer->base_planes + p] = residual;
            memcpy(room->stored, layer->residual_sign + (p * layer->rows + row) * salient_bytes, (size_t)salient_bytes);
            spread_bits(residual, room->stored, of->mark, layer->columns);
        }
        dequantize_row(of->out, of->dtype, (row - of->begin) * layer->columns, room->dense, layer, &one,
                       room->scale + r);
    }
}

static void dequantize_strips(void *job) {
    dense_t *of = job;
    room_t room;
    int share = first_share(of->pieces);
    int64_t piece;
    if (make_room(&room, of) != OK)
        return; /* others may have room; the caller sees whether all was done */
    while ((piece = take_piece(of->pieces, &share)) >= 0)
        dequantize_strip(of, &room, of->begin + piece * STRIP);
    free_room(&room);
}

/* out [end - begin, columns] of type `dtype` = rows begin .. end of Ŵ. */
EXPORT int sab_dequantize(const layer_t *layer, int64_t begin, int64_t end, void *out, int dtype, int threads) {
    int64_t padded = layer->columns + PADDING;
    pieces_t pieces;
    dense_t of = {.layer = layer, .begin = begin, .end = end, .out = out, .dtype = dtype, .pieces = &pieces};
    of.mark_bytes = (layer->columns + 63) / 64 * 8 + 16;
    float *column_scale = scratch(padded);
    uint8_t *mark = calloc((size_t)of.mark_bytes, 1);
    int status = column_scale && mark ? OK : NO_MEMORY;
    if (status == OK) {
        for (int64_t j = 0; j < padded; j++)
            column_scale[j] = j < layer->columns ? float_of_f16(layer->col_scale[j]) : 0.0f;
        if (layer->residual_planes)
            mark_salient(mark, layer);
        of.column_scale = column_scale;
        of.mark = mark;
        if ((end - begin) * layer->columns < SMALL)
            threads = 1;
        int64_t strips = (end - begin + STRIP - 1) / STRIP;
        run_together(dequantize_strips, &of, cut_pieces(&pieces, strips, threads));
        status = all_taken(&pieces) ? OK : NO_MEMORY;
    }
    free(column_scale);
    free(mark);
    return status;
}

/* 2 is AVX-512, 1 is AVX2, 0 is the portable path. */
EXPORT int sab_path(void) { return PATH; }

/* 1 where integers (integers.h) are multiplied and added by one instruction. */
EXPORT int sab_vnni(void) {
#if PATH == 2 && defined(__AVX512VNNI__)
    return 1;
#else
    return 0;
#endif
}

/* 1 where bf16 inputs are multiplied as integers by dot products (dots.h). */
EXPORT int sab_dots(void) { return DOTS; }

/* 1 on processors with a unit for bf16 matrices, where dense products are several times faster. */
EXPORT int sab_matrix_unit(void) {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}

/* Whose threads help: 0 as it fits, whatever was found out before; 1 our own; 2 OpenMP's. For tests and measurements. */
EXPORT void sab_whose_threads(int wanted) { choose_threads(wanted); }

/* 1 if the library was compiled with OpenMP. */
EXPORT int sab_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
