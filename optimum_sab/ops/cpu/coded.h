/* Coded planes: a stored plane u of row scale a that stands for P₁ of scale a and P₂ of scale a/2 (core/code.py;
 * binary_linear.c includes this).
 *
 * Shifts carry over from word to word of a row, so panels go in their order. Where rows end inside of a word, derived
 * bits behind the end are whatever they are: they meet inputs of 0.
 */
enum { NO_CODE, TRELLIS16, TRELLIS16X2 }; /* layer_t.coded */

/* `k` columns to the right, what comes in being the end of the word before. */
#define SHIFTED(word, before, k) ((word) << (k) | (before) >> (32 - (k)))
#define FIRST_DERIVED(word, before, code)                                                                              \
    ((word) ^ ((code) == TRELLIS16 ? SHIFTED(word, before, 1) : SHIFTED(word, before, 3)) ^ SHIFTED(word, before, 4))
#define SECOND_DERIVED(word, before, code)                                                                             \
    ((code) == TRELLIS16                                                                                               \
         ? SHIFTED(word, before, 2)                                                                                    \
         : (word) ^ SHIFTED(word, before, 1) ^ SHIFTED(word, before, 2) ^ SHIFTED(word, before, 4))

typedef uint32_t vecu __attribute__((vector_size(4 * LANES)));

INLINE void derive_words_by(veci *first, veci *second, const veci *before, const veci *words, const int code) {
    UNROLL for (int i = 0; i < WORDS * GROUPS; i++) {
        vecu word = (vecu)words[i], left = (vecu)(i < GROUPS ? before[i] : words[i - GROUPS]);
        first[i] = (veci)FIRST_DERIVED(word, left, code);
        second[i] = (veci)SECOND_DERIVED(word, left, code);
    }
}

/* A panel's derived planes; `before` is the last word of the panel before, and becomes that of this one. */
INLINE void derive_words(veci *first, veci *second, veci *before, const veci *words, int64_t code) {
    if (code == TRELLIS16)
        derive_words_by(first, second, before, words, TRELLIS16);
    else
        derive_words_by(first, second, before, words, TRELLIS16X2);
    UNROLL for (int g = 0; g < GROUPS; g++) before[g] = words[(WORDS - 1) * GROUPS + g];
}

/* One row's derived planes. */
static void derive_row(uint8_t *first, uint8_t *second, const uint8_t *stored, int64_t bytes, int64_t code) {
    uint32_t left = 0, word;
    for (int64_t at = 0; at < bytes; at += 4, left = word) {
        memcpy(&word, stored + at, 4);
        memcpy(first + at, &(uint32_t){FIRST_DERIVED(word, left, code)}, 4);
        memcpy(second + at, &(uint32_t){SECOND_DERIVED(word, left, code)}, 4);
    }
}

#if PATH == 1
/* AVX2 looks up 16 bytes in 32 places with one instruction, and takes five for 16 floats in 8 places. So tables hold
 * integers here, cut into limbs of seven bits. Inputs of a panel are numbers of 25 bits and a sign, in units of 2⁻²⁵ of
 * the power of two above the largest: closer to fp32 than sums in fp32 are, and summed without rounding.
 *
 * Nibbles of both planes lie side by side in the bytes of a row. What is looked up for two nibbles is at most 254, and
 * one instruction makes 2 P₁ + P₂ of it, in 16 bits. A row has 16 bits, so a vector has the 16 rows of a strip: row i in
 * the lower half of lane i, row 8 + i in the upper.
 */
enum {
    LIMBS = 4,
    LIMB_BITS = 7,
    ENTRY_BITS = LIMBS * LIMB_BITS,
    INPUT_BITS = ENTRY_BITS - 3, /* four of them and a sign are an entry */
    TABLE_BYTES = 16 * LIMBS,    /* as many as a table of floats has */
    PAIRS = PANEL_BITS / 8,
    TOGETHER = 2, /* tokens in registers */
    SMALLEST = -100, /* exponent of a panel's largest input; units are at least 2⁻¹²⁵ */
};

/* Tables [nibble, token, limb, 16 bytes], of an even number of nibbles, then units [piece, token]. */
static int64_t coded_floats(const cut_t *cut, int64_t tokens) {
    return cut->planes ? ((int64_t)(cut->table_count + 1) * TABLE_BYTES / 4 + cut->piece_count) * tokens : 0;
}

INLINE float *coded_units(float *tables, const cut_t *cut, int64_t tokens) {
    return tables + (int64_t)(cut->table_count + 1) * TABLE_BYTES / 4 * tokens;
}

/* Seven bits of each lane in each of its bytes, lowest first; then bytes of four lanes side by side. */
INLINE __m256i cut_into_limbs(__m256i entry) {
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, /* and once more */
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i halves = _mm256_or_si256(_mm256_and_si256(entry, _mm256_set1_epi32(0x3fff)),
                                     _mm256_and_si256(_mm256_slli_epi32(entry, 2), _mm256_set1_epi32(0x3fff0000)));
    __m256i limbs = _mm256_or_si256(_mm256_and_si256(halves, _mm256_set1_epi32(0x7f007f)),
                                    _mm256_and_si256(_mm256_slli_epi32(halves, 1), _mm256_set1_epi32(0x7f007f00)));
    return _mm256_shuffle_epi8(limbs, bytes);
}

/* The 16 sums of four inputs, and 2^(ENTRY_BITS - 1) so that none is negative. */
INLINE void build_coded_table(uint8_t *table, const int32_t *x) {
    const __m256i sign0 = _mm256_setr_epi32(-1, 1, -1, 1, -1, 1, -1, 1);
    const __m256i sign1 = _mm256_setr_epi32(-1, -1, 1, 1, -1, -1, 1, 1);
    const __m256i sign3 = _mm256_setr_epi32(-1, -1, -1, -1, 1, 1, 1, 1);
    __m256i sum = _mm256_add_epi32(_mm256_sign_epi32(_mm256_set1_epi32(x[0]), sign0),
                                   _mm256_sign_epi32(_mm256_set1_epi32(x[1]), sign1));
    sum = _mm256_add_epi32(sum, _mm256_sign_epi32(_mm256_set1_epi32(x[3]), sign3));
    sum = _mm256_add_epi32(sum, _mm256_set1_epi32(1 << (ENTRY_BITS - 1)));
    __m256i third = _mm256_set1_epi32(x[2]);
    __m256i low = cut_into_limbs(_mm256_sub_epi32(sum, third));  /* entries 0 to 3 and 8 to 11 */
    __m256i high = cut_into_limbs(_mm256_add_epi32(sum, third)); /* 4 to 7 and 12 to 15 */
    __m256i limbs01 = _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(low, high), 0xd8 /* 0 2 1 3 */);
    __m256i limbs23 = _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(low, high), 0xd8);
    _mm256_storeu_si256((__m256i *)table, limbs01);
    _mm256_storeu_si256((__m256i *)(table + 32), limbs23);
}

static void build_coded_tables(float *tables, const layer_t *layer, const cut_t *cut, const void *const *x,
                               int dtype, int64_t tokens) {
    float *unit = coded_units(tables, cut, tokens), c[PANEL_BITS], scaled[PANEL_BITS];
    int32_t integers[PANEL_BITS];
    for (int32_t k = 0; k < cut->piece_count; k++) {
        const piece_t *piece = &cut->pieces[k];
        int64_t count = piece->end - piece->bit, nibbles = (count + 7) / 8 * 2;
        floats_of_f16(c, layer->col_scale + piece->bit, count);
        memset(scaled, 0, sizeof scaled);
        for (int64_t t = 0; t < tokens; t++) {
            scale_inputs(scaled, x[t], dtype, piece->bit, count, c);
            float size = 0.0f;
            int finite = 1, exponent = SMALLEST;
            for (int j = 0; j < PANEL_BITS; j++) {
                float own = fabsf(scaled[j]);
                size = own > size ? own : size;
                finite &= own < INFINITY;
            }
            if (finite && size > 0.0f)
                frexpf(size, &exponent);
            exponent = exponent < SMALLEST ? SMALLEST : exponent;
            float into = ldexpf(1.0f, INPUT_BITS - exponent);
            for (int j = 0; j < PANEL_BITS; j += 8)
                _mm256_storeu_si256((__m256i *)(integers + j),
                                    _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(scaled + j), _mm256_set1_ps(into))));
            /* P₁ has its full scale in 2 P₁ + P₂ where the unit is half. */
            unit[k * tokens + t] = finite ? ldexpf(0.5f, exponent - INPUT_BITS) : NAN;
            for (int64_t n = 0; n < nibbles; n++)
                build_coded_table((uint8_t *)tables + ((piece->table + n) * tokens + t) * TABLE_BYTES,
                                  integers + 4 * n);
        }
    }
}

/* index[nibble]: nibbles of P₁ in the even bytes, of P₂ in the odd ones. */
INLINE void index_rows(__m256i *index, const veci *first, const veci *second) {
    const __m256i odd_bytes = _mm256_set1_epi16(-256), nibble = _mm256_set1_epi8(15);
    UNROLL for (int w = 0; w < WORDS; w++) {
        __m256i even[GROUPS], odd[GROUPS], byte[4];
        UNROLL for (int g = 0; g < GROUPS; g++) {
            __m256i one = (__m256i)first[w * GROUPS + g], two = (__m256i)second[w * GROUPS + g];
            even[g] = _mm256_blendv_epi8(one, _mm256_slli_epi32(two, 8), odd_bytes);
            odd[g] = _mm256_blendv_epi8(_mm256_srli_epi32(one, 8), two, odd_bytes);
        }
        byte[0] = _mm256_blend_epi16(even[0], _mm256_slli_epi32(even[1], 16), 0xaa);
        byte[1] = _mm256_blend_epi16(odd[0], _mm256_slli_epi32(odd[1], 16), 0xaa);
        byte[2] = _mm256_blend_epi16(_mm256_srli_epi32(even[0], 16), even[1], 0xaa);
        byte[3] = _mm256_blend_epi16(_mm256_srli_epi32(odd[0], 16), odd[1], 0xaa);
        UNROLL for (int b = 0; b < 4; b++) {
            index[w * 8 + 2 * b] = _mm256_and_si256(byte[b], nibble);
            index[w * 8 + 2 * b + 1] = _mm256_and_si256(_mm256_srli_epi16(byte[b], 4), nibble);
        }
    }
}

INLINE __m256i look_up(const uint8_t *bytes, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes)), index);
}

/* y[t][row] += a[row] · Σ of a panel's coded inputs. */
INLINE void add_coded_panel(float *y, const __m256i *index, int pairs, const uint8_t *table, int64_t stride,
                            const float *unit, const vecf *scale, const int tokens) {
    const __m256i weights = _mm256_set1_epi16(0x0102), lower = _mm256_set1_epi32(0xffff);
    const __m256i bias = _mm256_set1_epi32(2 * pairs * 3 << (ENTRY_BITS - 1 - 2 * LIMB_BITS));
    __m256i sum[TOGETHER][LIMBS];
    memset(sum, 0, sizeof sum);
    ROLL for (int n = 0; n < pairs; n++) {
        __m256i one = index[2 * n], other = index[2 * n + 1];
        UNROLL for (int t = 0; t < tokens; t++) {
            UNROLL for (int l = 0; l < LIMBS; l++) {
                const uint8_t *limb = table + t * TABLE_BYTES + 16 * l;
                __m256i found = _mm256_add_epi8(look_up(limb, one), look_up(limb + stride, other));
                sum[t][l] = _mm256_add_epi16(sum[t][l], _mm256_maddubs_epi16(found, weights));
            }
        }
        table += 2 * stride;
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int g = 0; g < GROUPS; g++) {
            __m256i limb[LIMBS];
            UNROLL for (int l = 0; l < LIMBS; l++)
                limb[l] = g ? _mm256_srli_epi32(sum[t][l], 16) : _mm256_and_si256(sum[t][l], lower);
            __m256i low = _mm256_add_epi32(limb[0], _mm256_slli_epi32(limb[1], LIMB_BITS));
            __m256i high = _mm256_sub_epi32(_mm256_add_epi32(limb[2], _mm256_slli_epi32(limb[3], LIMB_BITS)), bias);
            __m256 whole = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(1 << 2 * LIMB_BITS),
                                           _mm256_cvtepi32_ps(low));
            float *at = y + t * STRIP + g * LANES;
            __m256 factor = _mm256_mul_ps((__m256)scale[g], _mm256_broadcast_ss(unit + t));
            _mm256_storeu_ps(at, _mm256_fmadd_ps(factor, whole, _mm256_loadu_ps(at)));
        }
    }
}

INLINE void add_coded(float *y, const veci *first, const veci *second, const cut_t *cut, int32_t k,
                      const float *tables, const vecf *scale, int64_t tokens) {
    const int64_t stride = tokens * TABLE_BYTES;
    const uint8_t *table = (const uint8_t *)tables + cut->pieces[k].table * stride;
    const float *unit = coded_units((float *)tables, cut, tokens) + k * tokens;
    int pairs = (cut->pieces[k].last + 1) / 2;
    __m256i index[2 * PAIRS];
    index_rows(index, first, second);
    int64_t t = 0;
    for (; t + TOGETHER <= tokens; t += TOGETHER)
        add_coded_panel(y + t * STRIP, index, pairs, table + t * TABLE_BYTES, stride, unit + t, scale, TOGETHER);
    if (t < tokens)
        add_coded_panel(y + t * STRIP, index, pairs, table + t * TABLE_BYTES, stride, unit + t, scale, 1);
}
#else
/* Tables as of plain planes. */
static int64_t coded_floats(const cut_t *cut, int64_t tokens) { return (int64_t)cut->table_count * tokens * TABLE; }

static void build_coded_tables(float *tables, const layer_t *layer, const cut_t *cut, const void *const *x,
                               int dtype, int64_t tokens) {
    for (int32_t k = 0; k < cut->piece_count; k++)
        build_tables(tables, layer, &cut->pieces[k], 0, x, dtype, tokens);
}

INLINE void add_coded(float *y, const veci *first, const veci *second, const cut_t *cut, int32_t k,
                      const float *tables, const vecf *scale, int64_t tokens) {
    const piece_t *piece = &cut->pieces[k];
    vecf half[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; g++) half[g] = scale[g] * 0.5f;
    tables += piece->table * tokens * TABLE;
    add_tokens(y, first, piece, tables, scale, tokens);
    add_tokens(y, second, piece, tables, half, tokens);
}
#endif

/* y [tokens, STRIP] += the coded plane for `valid` rows from `row` on. Blocks are whole panels (core/settings.py), so a
 * panel is one piece. */
static void add_coded_plane(float *y, const layer_t *layer, const cut_t *cut, const float *tables, int64_t tokens,
                            int64_t row, int64_t valid) {
    int64_t scale_bytes = layer->row_exponent ? 1 : 2;
    int64_t next = row + valid, ahead = layer->rows - next < STRIP ? layer->rows - next : STRIP;
    veci before[GROUPS] = {0};
    for (int32_t k = 0; k < cut->panel_count; k++) {
        const panel_t *panel = &cut->panels[k];
        int64_t scales = cut->pieces[k].block;
        prefetch(layer->weight + next * cut->row_bytes + ahead * panel->byte, ahead * panel->bytes);
        prefetch((const char *)layer->row_scale + (scales * layer->rows + next) * scale_bytes, ahead * scale_bytes);
        veci words[WORDS * GROUPS], first[WORDS * GROUPS], second[WORDS * GROUPS];
        transpose(words, layer->weight + row * cut->row_bytes + panel->byte, cut->row_bytes, panel->bytes, valid);
        derive_words(first, second, before, words, layer->coded);
        vecf scale[GROUPS];
        decode_scales(scale, layer, scales, row, valid);
        add_coded(y, first, second, cut, k, tables, scale, tokens);
    }
}
