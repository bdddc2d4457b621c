/* Products of bf16 inputs in integers by instructions that add four products of bytes (Arm's sdot; integers.h includes
 * this). The integers, and so every bit of the outputs, are those of the lookups of AVX-512.
 *
 * A lane of 32 bits holds a row's sign word. Where bit k of its four bytes is 1, a comparison makes bytes of −1, and they
 * are multiplied with the inputs of columns k, 8 + k, 16 + k and 24 + k, so nothing is shifted or moved. An input
 * q is 256 h + l + 128 with h and l of eight bits and a sign, and with S the sum of the inputs whose bit is 1,
 * Σ ±q = 2 S − Σ q = −512 Σ(−h) − 2 Σ(−l) + 256 · (number of those bits) − Σ q.
 *
 * Tables of a cut are [piece, token, word, limb, 8 bits, 4 bytes], and after them units [piece, token, 2]: the unit, and
 * Σ q.
 */
enum {
    VECTORS = STRIP / 4, /* of four rows each */
    LIMB_BYTES = 32,     /* of a word's inputs, lower limbs first */
    TOGETHER_DOTS = 2,   /* tokens in registers */
};
typedef int8_t bytes_t __attribute__((vector_size(16)));
typedef int32_t sums_t __attribute__((vector_size(16)));

/* ---- tables ---- */

/* Integers of `count` inputs, a multiple of 8; returns their unit, or NaN where an input is not finite. */
static float integers_of(int32_t *integer, const float *x, int64_t count) {
    float largest = SMALLEST;
    int other = 0;
    for (int64_t i = 0; i < count; i += 8) {
        float size[8];
        for (int j = 0; j < 8; j++) {
            size[j] = fabsf(x[i + j]);
            other |= !(size[j] < INFINITY);
            size[j] *= 0.125f;
        }
        float sum = ((size[0] + size[1]) + (size[2] + size[3])) + ((size[4] + size[5]) + (size[6] + size[7]));
        largest = sum > largest ? sum : largest;
    }
    float into = LARGEST / largest;
    for (int64_t i = 0; i < count; i++)
        integer[i] = other ? 0 : (int32_t)rintf(x[i] * into);
    return other ? NAN : largest / LARGEST;
}

static void build_integer_piece(float *tables, const layer_t *layer, const cut_t *cut, int32_t k, int residual,
                                const void *const *x, int64_t tokens) {
    enum { MOST = PIECE_BITS + 64 }; /* a piece may begin, and end, inside of a word */
    const piece_t *piece = &cut->pieces[k];
    const int64_t count = piece->end - piece->bit, lead = piece->bit % 32, all = 32 * piece->steps;
    float c[PIECE_BITS + 8], scaled[MOST], *unit = units_of(tables, cut, tokens) + 2 * k * tokens;
    int64_t column[PIECE_BITS];
    int32_t integer[MOST];
    if (residual)
        find_columns(column, c, layer, piece);
    else
        floats_of_f16(c, layer->col_scale + piece->bit, count);
    memset(scaled, 0, sizeof scaled);
    for (int64_t t = 0; t < tokens; t++, unit += 2) {
        int8_t *table = (int8_t *)tables_of(tables, piece, tokens, t);
        int32_t total = 0;
        if (residual)
            for (int64_t j = 0; j < count; j++)
                scale_inputs(scaled + lead + j, x[t], BF16, column[j], 1, c + j);
        else
            scale_inputs(scaled + lead, x[t], BF16, piece->bit, count, c);
        unit[0] = integers_of(integer, scaled, all);
        for (int64_t j = 0; j < all; j++) {
            int64_t word = j / 32, byte = j % 32 / 8, bit = j % 8;
            int8_t *to = table + word * 2 * LIMB_BYTES + bit * 4 + byte;
            const int inside = j >= lead && j < lead + count;
            to[0] = (int8_t)(inside ? (integer[j] & 255) - 128 : 0);
            to[LIMB_BYTES] = (int8_t)(inside ? integer[j] >> 8 : 0);
            total += integer[j];
        }
        memcpy(unit + 1, &total, 4);
    }
}

/* ---- the product ---- */

/* words[word][row] of LINE_BITS columns of rows 0 .. `last` of a strip, after which the last is repeated. */
INLINE void transpose_line(veci *words, const uint8_t *bits, int64_t row_bytes, int64_t bytes, int64_t last) {
    for (int p = 0; 16 * p < bytes; p++)
        transpose(words + 4 * p * GROUPS, bits + 16 * p, row_bytes, bytes - 16 * p < 16 ? bytes - 16 * p : 16, last + 1);
}

/* Sums of a strip's rows, of one or two tokens. */
typedef struct {
    sums_t low[TOGETHER_DOTS][VECTORS], high[TOGETHER_DOTS][VECTORS]; /* −Σ l and −Σ h where bits are 1 */
    sums_t ones[VECTORS];                                             /* and how many are */
} dots_t;

#if defined(__ARM_FEATURE_DOTPROD)
/* sum[row] + Σ of four bytes of the row and four inputs, those at `at`, which instructions hold. */
#define ADD_DOTS(sum, bytes, inputs, at) \
    (sums_t) vdotq_laneq_s32((int32x4_t)(sum), (int8x16_t)(bytes), (int8x16_t)(inputs), at)
#define ADD_BIT(at)                                                                                \
    do {                                                                                           \
        UNROLL for (int r = 0; r < VECTORS; r++) {                                                 \
            bytes_t minus = (bytes_t)((word[r] & (int8_t)(1u << (4 * half + (at)))) != 0);         \
            UNROLL for (int t = 0; t < tokens; t++) {                                              \
                sum->low[t][r] = ADD_DOTS(sum->low[t][r], minus, low[t], at);                      \
                sum->high[t][r] = ADD_DOTS(sum->high[t][r], minus, high[t], at);                   \
            }                                                                                      \
        }                                                                                          \
    } while (0)

/* The columns of a word; the second token's tables lie `next` bytes behind the first's. */
INLINE void add_word(dots_t *sum, const bytes_t *word, const int8_t *table, int64_t next, const int tokens) {
    UNROLL for (int half = 0; half < 2; half++) {
        bytes_t low[TOGETHER_DOTS], high[TOGETHER_DOTS];
        UNROLL for (int t = 0; t < tokens; t++) {
            memcpy(&low[t], table + t * next + 16 * half, 16);
            memcpy(&high[t], table + t * next + LIMB_BYTES + 16 * half, 16);
        }
        ADD_BIT(0);
        ADD_BIT(1);
        ADD_BIT(2);
        ADD_BIT(3);
    }
}

/* sum[row] + the number of bits that are 1. */
INLINE sums_t count_ones(sums_t sum, bytes_t words) {
    return (sums_t)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_u8(vcntq_u8((uint8x16_t)words)), vdupq_n_s8(1));
}
#else
/* The same a bit at a time. */
static void add_word(dots_t *sum, const bytes_t *word, const int8_t *table, int64_t next, int tokens) {
    ROLL for (int i = 0; i < tokens * STRIP; i++) {
        int t = i / STRIP, r = i % STRIP;
        uint32_t bits = (uint32_t)((sums_t)word[r / 4])[r % 4];
        const int8_t *own = table + t * next;
        ROLL for (int column = 0; column < 32; column++) {
            int at = column % 8 * 4 + column / 8;
            if (bits >> column & 1) {
                sum->low[t][r / 4][r % 4] -= own[at];
                sum->high[t][r / 4][r % 4] -= own[LIMB_BYTES + at];
            }
        }
    }
}

INLINE sums_t count_ones(sums_t sum, bytes_t words) {
    for (int r = 0; r < 4; r++)
        sum[r] += __builtin_popcount((uint32_t)((sums_t)words)[r]);
    return sum;
}
#endif

/* The words of one of a coded plane's two (coded.h), or the stored ones; `stored` has the words before, GROUPS behind. */
INLINE void derived_words(bytes_t *word, const veci *stored, int plane, const int code) {
    veci own[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; g++) {
        vecu here = (vecu)stored[g], before = (vecu)stored[g - GROUPS];
        own[g] = plane == FIRST    ? (veci)FIRST_DERIVED(here, before, code)
                 : plane == SECOND ? (veci)SECOND_DERIVED(here, before, code)
                                   : stored[g];
    }
    memcpy(word, own, sizeof own);
}

/* y[t][row] += a[row] · unit[t] · Σ of the piece's integers, of which a coded plane's first one's count twice. */
INLINE void add_dots_piece(float *y, const veci *words, const piece_t *piece, const int8_t *table, const float *unit,
                           const float *scale, const uint8_t *ahead, const int code, const int tokens) {
    const int coded = code != NO_CODE;
    const int64_t next = (int64_t)piece->steps * 2 * LIMB_BYTES, lead = piece->bit % 32;
    const int64_t end = lead + piece->end - piece->bit;
    int32_t ones[STRIP], low[STRIP], high[STRIP];
    dots_t sum;
    memset(&sum, 0, sizeof sum);
    for (int plane = coded ? FIRST : STORED; plane <= (coded ? SECOND : STORED); plane++) {
        if (plane == SECOND) {
            UNROLL for (int r = 0; r < VECTORS; r++) {
                sum.ones[r] *= 2;
                UNROLL for (int t = 0; t < tokens; t++) sum.low[t][r] *= 2, sum.high[t][r] *= 2;
            }
        }
        ROLL for (int64_t w = 0; w < piece->steps; w++) {
            uint32_t inside = ~0u;
            bytes_t word[VECTORS];
            derived_words(word, words + ((piece->first >> 3) + w) * GROUPS, plane, code);
            if (w == 0)
                inside <<= lead;
            if (32 * (w + 1) > end)
                inside &= ~0u >> (32 * (w + 1) - end);
            UNROLL for (int r = 0; r < VECTORS; r++)
                sum.ones[r] = count_ones(sum.ones[r], (bytes_t)((sums_t)word[r] & (int32_t)inside));
            if (ahead && plane != SECOND)
                __builtin_prefetch(ahead + w * STRIP * 4, 0, 2);
            add_word(&sum, word, table + w * 2 * LIMB_BYTES, next, tokens);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        int32_t total;
        memcpy(ones, sum.ones, sizeof ones);
        memcpy(&total, unit + 2 * t + 1, 4);
        memcpy(low, sum.low[t], sizeof low);
        memcpy(high, sum.high[t], sizeof high);
        for (int r = 0; r < STRIP; r++) {
            int32_t whole = 256 * ones[r] - 512 * high[r] - 2 * low[r] - (coded ? 3 : 1) * total;
            y[t * STRIP + r] = __builtin_fmaf((float)whole, scale[r] * unit[2 * t], y[t * STRIP + r]);
        }
    }
}

/* For any number of tokens; `words` are of a panel. */
INLINE void add_integers(float *y, const veci *words, const cut_t *cut, const piece_t *piece, const float *tables,
                         const vecf *scale, const uint8_t *ahead, int64_t tokens, const int code) {
    const float *unit = units_of(tables, cut, tokens) + 2 * (piece - cut->pieces) * tokens;
    float a[STRIP];
    int64_t t = 0;
    memcpy(a, scale, sizeof a);
    if (ahead)
        ahead += piece->first / 8 * STRIP * 4;
    for (; t < tokens; t += TOGETHER_DOTS) {
        const int8_t *table = (const int8_t *)tables_of(tables, piece, tokens, t);
        if (tokens - t >= TOGETHER_DOTS)
            add_dots_piece(y + t * STRIP, words, piece, table, unit + 2 * t, a, t ? NULL : ahead, code, TOGETHER_DOTS);
        else
            add_dots_piece(y + t * STRIP, words, piece, table, unit + 2 * t, a, t ? NULL : ahead, code, 1);
    }
}
