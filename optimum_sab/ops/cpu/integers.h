/* Products of bf16 inputs in integers, with AVX-512 and with Arm's dot products (binary_linear.c includes this).
 *
 * With AVX-512: the lookup of 16 floats serves 64 columns, and what is found takes an addition. A lookup of 32 integers
 * of 16 bits serves 128, and pairs of them are added in 16 bits before one instruction adds two such sums to 32 bits. So
 * the inputs of a piece, times their column scales, become integers in units that let the sum of the sizes of any aligned
 * eight be at most 32,766: rounding moves an input by at most 2⁻¹⁶ of the largest such sum, in the mean square over a
 * piece by no more than 4·10⁻⁴ of the norm of its inputs, which bf16's own rounding (2⁻⁹) hides. Sums of integers are
 * exact, so the order of the additions is free; what pieces add up to is fp32, in the order of the planes and the
 * columns. dots.h does the same arithmetic with other instructions, to the same bits.
 *
 * A lane of 32 bits holds a row's sign word. Its lower half looks up in the lower half of a table, the other in the
 * upper, so a step takes eight columns of 16 rows. In a piece of whole words, step k has nibbles k and k + 4, and the
 * word needs nothing but a shift; else nibbles of a byte, which `part_nibbles` puts there first.
 *
 * Tables of a cut are [piece, 4 tokens, step, token, 32], so that those of a panel are one stretch of memory, and
 * after them units [piece, token].
 */
enum {
    ENTRIES = 32,           /* of a table: two of 16 */
    STEP_FLOATS = ENTRIES / 2,
    LINE_WORDS = LINE_BITS / 32,
    LINE_STEPS = PATH == 2 ? LINE_BITS / 8 : LINE_WORDS,
    UNIT_FLOATS = PATH == 2 ? 1 : 2, /* of a piece and token */
    PIECE_BITS = LINE_BITS / 2,
    TOGETHER = 8,           /* strips that read a part of the tables while it is in the cache */
    PART_BYTES = 512 << 10, /* of tables */
};
enum { STORED, FIRST, SECOND }; /* planes */
#define LARGEST 4095.25f   /* 32,762 / 8; eight roundings of 1/2 come to it */
#define SMALLEST 0x1p-100f /* sum of eight, / 8; smaller inputs lose bits as they do at the end of fp32 */

static int64_t integer_floats(const cut_t *cut, int64_t tokens) {
    int64_t floats = (int64_t)cut->table_count * STEP_FLOATS + UNIT_FLOATS * cut->piece_count;
    return cut->planes ? (floats * tokens + 15) / 16 * 16 : 0;
}

INLINE float *units_of(const float *tables, const cut_t *cut, int64_t tokens) {
    return (float *)tables + (int64_t)cut->table_count * tokens * STEP_FLOATS;
}

/* The table of a piece's first step for the first of up to TOKENS tokens, from token `t` on. */
INLINE int16_t *tables_of(const float *tables, const piece_t *piece, int64_t tokens, int64_t t) {
    return (int16_t *)tables + (piece->table * tokens + piece->steps * t) * ENTRIES;
}

#if PATH != 2
#include "dots.h"
#else
/* ---- tables ---- */

/* x of 16 columns, as far as there are, times c. */
INLINE __m512 scaled_inputs(const uint16_t *x, const float *c, int64_t count) {
    __mmask16 lanes = (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1u);
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_loadu_ps(c));
}

/* Integers of `blocks` × 16 inputs; returns their unit, or NaN where an input is not finite. */
INLINE float quantize_inputs(int16_t *integer, const __m512 *x, const int blocks) {
    const __m512 eighth = _mm512_set1_ps(0.125f);
    __m512 most = _mm512_set1_ps(SMALLEST);
    __mmask16 other = 0;
    for (int i = 0; i < blocks; i++) {
        __m512 size = _mm512_abs_ps(x[i]);
        other |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        __m512 sum = _mm512_mul_ps(size, eighth);
        sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
        sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
        sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));
        most = _mm512_max_ps(most, sum);
    }
    float largest = _mm512_reduce_max_ps(most);
    __m512 into = _mm512_set1_ps(other ? 0.0f : LARGEST / largest);
    for (int i = 0; i < blocks; i++) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], into));
        _mm256_store_si256((__m256i *)(integer + 16 * i), _mm512_cvtepi32_epi16(whole));
    }
    return other ? NAN : largest / LARGEST;
}

/* Where the 16 sums ±x₀±x₁ + ±x₂±x₃ of two nibbles have their parts, in [x₀+x₁, x₀−x₁, x₂+x₃, …] and the same negated.
 * The second nibble lies `next` inputs behind the first. */
#define LOWER(at) 32 + (at), 33 + (at), 1 + (at), (at)
#define UPPER(at) 34 + (at), 34 + (at), 34 + (at), 34 + (at), 35 + (at), 35 + (at), 35 + (at), 35 + (at), \
                  3 + (at), 3 + (at), 3 + (at), 3 + (at), 2 + (at), 2 + (at), 2 + (at), 2 + (at)
#define LOWER_16(at) LOWER(at), LOWER(at), LOWER(at), LOWER(at)
static const int16_t lower_parts[2][ENTRIES] = {{LOWER_16(0), LOWER_16(16)}, {LOWER_16(0), LOWER_16(4)}};
static const int16_t upper_parts[2][ENTRIES] = {{UPPER(0), UPPER(16)}, {UPPER(0), UPPER(4)}};

/* Four tables, `stride` entries apart, of 32 inputs. */
INLINE void build_four(int16_t *table, int64_t stride, const int16_t *integer, int bytes, int steps) {
    __m512i x = _mm512_loadu_si512(integer), turned = _mm512_rol_epi32(x, 16);
    __m512i parts = _mm512_mask_sub_epi16(_mm512_add_epi16(x, turned), 0xaaaaaaaa, x, turned);
    __m512i negated = _mm512_sub_epi16(_mm512_setzero_si512(), parts);
    __m512i lower = _mm512_loadu_si512(lower_parts[bytes]), upper = _mm512_loadu_si512(upper_parts[bytes]);
    const __m512i next = _mm512_set1_epi16(bytes ? 8 : 4);
    for (int k = 0; k < steps; k++) {
        __m512i sum = _mm512_add_epi16(_mm512_permutex2var_epi16(parts, lower, negated),
                                       _mm512_permutex2var_epi16(parts, upper, negated));
        _mm512_store_si512(table + k * stride, sum);
        lower = _mm512_add_epi16(lower, next);
        upper = _mm512_add_epi16(upper, next);
    }
}

static void build_integer_piece(float *tables, const layer_t *layer, const cut_t *cut, int32_t k, int residual,
                                const void *const *x, int64_t tokens) {
    enum { BLOCKS = PIECE_BITS / 16 + 1 }; /* a piece may begin inside of a byte */
    const piece_t *piece = &cut->pieces[k];
    const int64_t count = piece->end - piece->bit, lead = piece->bytes ? piece->bit % 8 : 0;
    const int blocks = (int)((lead + count + 15) / 16);
    int16_t integer[BLOCKS * 16 + 16] __attribute__((aligned(64)));
    float c[BLOCKS * 16] = {0}, *unit = units_of(tables, cut, tokens) + k * tokens;
    int64_t column[PIECE_BITS];
    uint16_t gathered[BLOCKS * 16] = {0};
    memset(integer, 0, sizeof integer);
    if (residual)
        find_columns(column, c + lead, layer, piece);
    else
        floats_of_f16(c, layer->col_scale + piece->bit, count);
    for (int64_t t = 0; t < tokens; t++) {
        const uint16_t *own = (const uint16_t *)x[t] + piece->bit;
        int64_t first = t / TOKENS * TOKENS, width = tokens - first < TOKENS ? tokens - first : TOKENS;
        int16_t *table = tables_of(tables, piece, tokens, first) + (t - first) * ENTRIES;
        __m512 scaled[BLOCKS];
        if (residual)
            for (int64_t j = 0; j < count; j++)
                gathered[lead + j] = ((const uint16_t *)x[t])[column[j]];
        for (int i = 0; i < blocks; i++)
            scaled[i] = residual ? scaled_inputs(gathered + 16 * i, c + 16 * i, 16)
                                 : scaled_inputs(own + 16 * i, c + 16 * i, count - 16 * i);
        unit[t] = quantize_inputs(integer, scaled, blocks);
        for (int step = 0; step < piece->steps; step += 4)
            build_four(table + step * width * ENTRIES, width * ENTRIES, integer + 8 * step, piece->bytes,
                       piece->steps - step < 4 ? piece->steps - step : 4);
    }
}

/* ---- the product ---- */

/* words[word][row] of LINE_BITS columns of rows 0 .. `last` of a strip, after which the last is repeated. */
INLINE void transpose_line(veci *words, const uint8_t *bits, int64_t row_bytes, int64_t bytes, int64_t last) {
    UNROLL for (int p = 0; p < LINE_BITS / PANEL_BITS; p++) {
        const int64_t left = bytes - 16 * p;
        const __mmask16 inside = (__mmask16)(left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1u);
        ROLL for (int g = 0; g < GROUPS; g++) {
            __m512i part[4]; /* PANEL_BITS columns of rows i, 4 + i, 8 + i, 12 + i */
            UNROLL for (int i = 0; i < 4; i++) {
                part[i] = _mm512_setzero_si512();
                UNROLL for (int q = 0; q < 4; q++) {
                    int64_t r = g * LANES + 4 * q + i;
                    const uint8_t *from = bits + (r < last ? r : last) * row_bytes + 16 * p;
                    __m128i row = left >= 16 ? _mm_loadu_si128((const __m128i *)from)
                                             : _mm_maskz_loadu_epi8(inside, from);
                    /* A load that blends: shuffles would keep the lookups from their units. */
                    part[i] = _mm512_mask_broadcast_i32x4(part[i], (__mmask16)(0xf << 4 * q), row);
                }
            }
            __m512i low01 = _mm512_unpacklo_epi32(part[0], part[1]), low23 = _mm512_unpacklo_epi32(part[2], part[3]);
            __m512i high01 = _mm512_unpackhi_epi32(part[0], part[1]), high23 = _mm512_unpackhi_epi32(part[2], part[3]);
            veci *to = words + 4 * p * GROUPS + g;
            to[0 * GROUPS] = (veci)_mm512_unpacklo_epi64(low01, low23);
            to[1 * GROUPS] = (veci)_mm512_unpackhi_epi64(low01, low23);
            to[2 * GROUPS] = (veci)_mm512_unpacklo_epi64(high01, high23);
            to[3 * GROUPS] = (veci)_mm512_unpackhi_epi64(high01, high23);
        }
    }
}

/* Nibbles 0 2 4 6 1 3 5 7, from the lowest. */
INLINE __m512i part_nibbles(__m512i word) {
    __m512i moved = _mm512_and_si512(_mm512_xor_si512(word, _mm512_srli_epi32(word, 4)), _mm512_set1_epi32(0x00f000f0));
    word = _mm512_xor_si512(word, _mm512_xor_si512(moved, _mm512_slli_epi32(moved, 4)));
    moved = _mm512_and_si512(_mm512_xor_si512(word, _mm512_srli_epi32(word, 8)), _mm512_set1_epi32(0xff00));
    return _mm512_xor_si512(word, _mm512_xor_si512(moved, _mm512_slli_epi32(moved, 8)));
}

/* The lower nibbles of bytes; in the upper half, of the upper table. A lookup sees the lowest five bits of a half. */
INLINE __m512i entries_of(__m512i word) {
    return _mm512_ternarylogic_epi32(word, _mm512_set1_epi32(0x0f0f0f0f), _mm512_set1_epi32(0x10100000),
                                     0xea /* a & b | c */);
}

/* Where the four steps of a word look up. */
INLINE void four_entries(__m512i *entry, __m512i word, int64_t stride) {
    __m512i even = entries_of(word), odd = entries_of(_mm512_srli_epi16(word, 4));
    entry[0] = even;
    entry[stride] = odd;
    entry[2 * stride] = _mm512_srli_epi16(even, 8);
    entry[3 * stride] = _mm512_srli_epi16(odd, 8);
}

/* The word of one of a coded plane's two (coded.h), or the stored one; `stored` has the word before, GROUPS behind. */
INLINE __m512i derived_word(const veci *stored, int plane, const int code) {
    __m512i word = (__m512i)stored[0], before = (__m512i)stored[-GROUPS];
    if (plane == STORED)
        return word;
#ifdef __AVX512VBMI2__
#define SHIFT(k) _mm512_shldi_epi32(word, before, k)
    const int xor = 0x96; /* a ^ b ^ c */
    if (plane == FIRST)
        return _mm512_ternarylogic_epi32(word, code == TRELLIS16 ? SHIFT(1) : SHIFT(3), SHIFT(4), xor);
    if (code == TRELLIS16)
        return SHIFT(2);
    return _mm512_ternarylogic_epi32(word, SHIFT(1), _mm512_xor_si512(SHIFT(2), SHIFT(4)), xor);
#undef SHIFT
#else
    return plane == FIRST ? (__m512i)FIRST_DERIVED((vecu)word, (vecu)before, code)
                          : (__m512i)SECOND_DERIVED((vecu)word, (vecu)before, code);
#endif
}

/* sum + factor · (lower half + upper half). */
INLINE __m512i add_halves(__m512i sum, __m512i halves, __m512i factor) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, halves, factor);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(halves, factor));
#endif
}

/* Keeps the compiler from loading a value again for every use, and from moving its uses apart. */
INLINE __m512i in_register(__m512i value) {
    __asm__("" : "+v"(value));
    return value;
}

/* Two steps of a piece of whole words. */
INLINE void add_steps(__m512i sum[TOKENS][GROUPS], const __m512i *one, const __m512i *other, const int16_t *table,
                      __m512i factors, const int tokens) {
    UNROLL for (int t = 0; t < tokens; t++) {
        __m512i first = in_register(_mm512_load_si512(table + t * ENTRIES));
        __m512i second = in_register(_mm512_load_si512(table + (tokens + t) * ENTRIES));
        UNROLL for (int g = 0; g < GROUPS; g++) {
            __m512i found = _mm512_add_epi16(_mm512_permutexvar_epi16(one[g], first),
                                             _mm512_permutexvar_epi16(other[g], second));
            sum[t][g] = in_register(add_halves(sum[t][g], found, factors));
        }
    }
}

/* The four steps of a word. */
INLINE void add_word(__m512i sum[TOKENS][GROUPS], const veci *words, int plane, const int code, const int16_t *table,
                     __m512i factors, const int tokens) {
    __m512i even[GROUPS], odd[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; g++) {
        __m512i word = derived_word(words + g, plane, code);
        even[g] = in_register(entries_of(word));
        odd[g] = in_register(entries_of(_mm512_srli_epi16(word, 4)));
    }
    add_steps(sum, even, odd, table, factors, tokens);
    UNROLL for (int g = 0; g < GROUPS; g++) {
        even[g] = in_register(_mm512_srli_epi16(even[g], 8));
        odd[g] = in_register(_mm512_srli_epi16(odd[g], 8));
    }
    add_steps(sum, even, odd, table + 2 * tokens * ENTRIES, factors, tokens);
}

/* What the rows of a strip look up in each step of a piece: `entry` [step, group]. */
INLINE void find_entries(__m512i *entry, const veci *words, const piece_t *piece, int plane, const int code) {
    int word = piece->first >> 3, byte = piece->first >> 1;
    if (piece->bytes)
        for (int step = 0; step < piece->steps; step++, byte++)
            UNROLL for (int g = 0; g < GROUPS; g++) {
                __m512i parted = part_nibbles((__m512i)words[(byte >> 2) * GROUPS + g]);
                entry[step * GROUPS + g] = entries_of(_mm512_srl_epi16(parted, _mm_cvtsi32_si128((byte & 3) * 4)));
            }
    else
        for (int step = 0; step < piece->steps; step += 4, word++)
            UNROLL for (int g = 0; g < GROUPS; g++)
                four_entries(entry + step * GROUPS + g, derived_word(words + word * GROUPS + g, plane, code), GROUPS);
}

/* A piece of a plane, or of a coded plane's two, of which the first counts twice. */
typedef struct {
    const piece_t *piece;
    const veci *words;       /* of the panel, and before them the last of the panel before */
    const __m512i *entry[2]; /* of the piece; NULL where they are not found in advance */
    const uint8_t *ahead;    /* else memory to ask for, four lines with each word; all at once would be waited for */
} looked_up_t;

/* y[t][row] += a[row] · unit[t] · Σ of the piece's integers. */
INLINE void add_integer_piece(float *y, const looked_up_t *of, const int16_t *table, const float *unit,
                              const vecf *scale, const int code, const int tokens) {
    const int coded = code != NO_CODE;
    const int64_t stride = tokens * ENTRIES;
    const __m512i once = _mm512_set1_epi16(1), factors = _mm512_set1_epi16(coded ? 2 : 1);
    __m512i sum[TOKENS][GROUPS];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int g = 0; g < GROUPS; g++) sum[t][g] = _mm512_setzero_si512();
    if (!coded && of->piece->bytes) {
        const __m512i *entry = of->entry[0];
        ROLL for (int step = 0; step < of->piece->steps; step++) {
            UNROLL for (int t = 0; t < tokens; t++) {
                __m512i sums = in_register(_mm512_load_si512(table + t * ENTRIES));
                UNROLL for (int g = 0; g < GROUPS; g++)
                    sum[t][g] = add_halves(sum[t][g], _mm512_permutexvar_epi16(entry[g], sums), once);
            }
            entry += GROUPS;
            table += stride;
        }
    } else if (of->entry[0]) {
        const __m512i *first = of->entry[0], *second = of->entry[1];
        ROLL for (int step = 0; step < of->piece->steps; step += 2) {
            add_steps(sum, first, first + GROUPS, table, factors, tokens);
            if (coded) {
                add_steps(sum, second, second + GROUPS, table, once, tokens);
                second += 2 * GROUPS;
            }
            first += 2 * GROUPS;
            table += 2 * stride;
        }
    } else {
        const veci *words = of->words + (of->piece->first >> 3) * GROUPS;
        ROLL for (int step = 0; step < of->piece->steps; step += 4) {
            add_word(sum, words, coded ? FIRST : STORED, code, table, factors, tokens);
            if (coded)
                add_word(sum, words, SECOND, code, table, once, tokens);
            if (of->ahead)
                UNROLL for (int line = 0; line < 4; line++)
                    __builtin_prefetch(of->ahead + (16 * step + line * 16) * 4, 0, 2);
            words += GROUPS;
            table += 4 * stride;
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int g = 0; g < GROUPS; g++) {
            float *at = y + t * STRIP + g * LANES;
            __m512 factor = _mm512_mul_ps((__m512)scale[g], _mm512_set1_ps(unit[t]));
            _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][g]), factor, _mm512_load_ps(at)));
        }
}

/* For any number of tokens; `words` are of a panel. */
INLINE void add_integers(float *y, const veci *words, const cut_t *cut, const piece_t *piece, const float *tables,
                         const vecf *scale, const uint8_t *ahead, int64_t tokens, const int code) {
    const float *unit = units_of(tables, cut, tokens) + (piece - cut->pieces) * tokens;
    __m512i first[(PIECE_BITS / 8 + 1) * GROUPS], second[PIECE_BITS / 8 * GROUPS];
    looked_up_t of = {piece, words, {NULL, NULL}, ahead ? ahead + piece->first * 32 : NULL};
    int64_t t = 0;
    if (tokens > TOKENS || piece->bytes) {
        find_entries(first, words, piece, code ? FIRST : STORED, code);
        of.entry[0] = first;
        if (code) {
            find_entries(second, words, piece, SECOND, code);
            of.entry[1] = second;
        }
    }
    for (; t + TOKENS <= tokens; t += TOKENS)
        add_integer_piece(y + t * STRIP, &of, tables_of(tables, piece, tokens, t), unit + t, scale, code, TOKENS);
    const int16_t *rest = tables_of(tables, piece, tokens, t);
    if (tokens - t == 3)
        add_integer_piece(y + t * STRIP, &of, rest, unit + t, scale, code, 3);
    else if (tokens - t == 2)
        add_integer_piece(y + t * STRIP, &of, rest, unit + t, scale, code, 2);
    else if (tokens - t == 1)
        add_integer_piece(y + t * STRIP, &of, rest, unit + t, scale, code, 1);
}

#endif

static void build_integers(float *tables, const plan_t *plan, const tile_t *tile) {
    for (int i = CODED; i < CUTS; i++) {
        const cut_t *cut = &plan->cut[i];
        for (int32_t k = 0; k < cut->piece_count; k++)
            build_integer_piece(tables, tile->layer, cut, k, i == RESIDUAL, tile->x, tile->tokens);
        tables += integer_floats(cut, tile->tokens);
    }
}

/* A plane's panels `first` .. `last` for the rows of one strip. */
typedef struct {
    const cut_t *cut;
    const uint8_t *bits; /* of the plane */
    int64_t plane;
    int32_t first, last;
    int64_t code;
} part_t;

static void add_part(float *y, veci *before, const part_t *part, const layer_t *layer, const float *tables,
                     int64_t tokens, int64_t row) {
    const cut_t *cut = part->cut;
    int64_t blocks = block_count(layer), scale_bytes = layer->row_exponent ? 1 : 2;
    int64_t valid = layer->rows - row < STRIP ? layer->rows - row : STRIP, next = row + valid;
    int64_t ahead = layer->rows - next < STRIP ? layer->rows - next : STRIP;
    for (int32_t i = part->first; i < part->last; i++) {
        const panel_t *panel = &cut->panels[i];
        const uint8_t *stretch = part->bits + next * cut->row_bytes + ahead * panel->byte; /* of the next rows' signs */
        const int spread = tokens <= TOKENS && !cut->pieces[panel->first].bytes && ahead == STRIP &&
                           panel->bytes == LINE_BITS / 8;
        if (spread)
            ; /* word by word */
        else if (part->last - part->first == cut->panel_count)
            prefetch(stretch, ahead * panel->bytes);
        else
            for (int64_t r = 0; r < ahead; r++)
                __builtin_prefetch(part->bits + (next + r) * cut->row_bytes + panel->byte, 0, 2);
        veci words[(1 + LINE_WORDS) * GROUPS], *own = words + GROUPS;
        const uint8_t *bits = part->bits + row * cut->row_bytes + panel->byte;
        if (valid >= STRIP && panel->bytes == LINE_BITS / 8) /* constants, which the compiler makes use of */
            transpose_line(own, bits, cut->row_bytes, LINE_BITS / 8, STRIP);
        else
            transpose_line(own, bits, cut->row_bytes, panel->bytes, (valid < STRIP ? valid : STRIP) - 1);
        if (part->code) {
            memcpy(words, before, GROUPS * sizeof *words);
            memcpy(before, words + LINE_WORDS * GROUPS, GROUPS * sizeof *words);
        }
        for (int32_t k = panel->first; k < panel->last; k++) {
            const piece_t *piece = &cut->pieces[k];
            int64_t scales = part->plane * blocks + piece->block;
            prefetch((const char *)layer->row_scale + (scales * layer->rows + next) * scale_bytes, ahead * scale_bytes);
            vecf scale[GROUPS];
            decode_scales(scale, layer, scales, row, valid);
            const uint8_t *asked = spread ? stretch : NULL;
            if (part->code)
                UNROLL for (int g = 0; g < GROUPS; g++) scale[g] *= 0.5f;
            if (part->code == TRELLIS16)
                add_integers(y, own, cut, piece, tables, scale, asked, tokens, TRELLIS16);
            else if (part->code == TRELLIS16X2)
                add_integers(y, own, cut, piece, tables, scale, asked, tokens, TRELLIS16X2);
            else
                add_integers(y, own, cut, piece, tables, scale, asked, tokens, NO_CODE);
        }
    }
}

/* Rows `row` .. `end` of y for the tokens of a tile. What a part of the columns reads of the tables stays in the cache
 * for all strips. */
static void multiply_integers(const plan_t *plan, const tile_t *tile, const float *tables, int64_t row, int64_t end) {
    const layer_t *layer = tile->layer;
    const int64_t count = tile->tokens, strips = (end - row + STRIP - 1) / STRIP;
    float sum[TOGETHER][TILE * STRIP] __attribute__((aligned(64)));
    veci before[TOGETHER][GROUPS];
    int32_t panels = (int32_t)(PART_BYTES / (count * STEP_FLOATS * 4 * LINE_STEPS));
    for (int64_t s = 0; s < strips; s++)
        memset(sum[s], 0, sizeof(float) * (size_t)(count * STRIP));
    for (int i = CODED; i < CUTS; i++) {
        const cut_t *cut = &plan->cut[i];
        const uint8_t *bits = i == RESIDUAL ? layer->residual_sign : layer->weight;
        for (int64_t p = 0; p < cut->planes; p++) {
            int64_t stored = i == RESIDUAL ? p : cut->first_plane + p;
            int64_t code = i == CODED ? layer->coded : NO_CODE;
            part_t part = {cut, bits + stored * layer->rows * cut->row_bytes, cut->first_plane + p, 0, 0, code};
            memset(before, 0, sizeof before);
            for (; part.first < cut->panel_count; part.first = part.last) {
                int all = strips == 1 || cut->panel_count - part.first < panels;
                part.last = all ? cut->panel_count : part.first + panels;
                for (int64_t s = 0; s < strips; s++)
                    add_part(sum[s], before[s], &part, layer, tables, count, row + s * STRIP);
            }
        }
        tables += integer_floats(cut, count);
    }
    for (int64_t s = 0; s < strips; s++)
        finish_strip(plan, tile, sum[s], row + s * STRIP);
}
