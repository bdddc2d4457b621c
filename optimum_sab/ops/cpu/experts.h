/* Products of pairs (token, expert) with a stack of layers, one for each expert, in one launch over the experts that
 * somebody goes to (binary_linear.c includes this).
 *
 * Pairs are put in the order of their experts. What follows each other there for one expert is cut into tiles; a piece
 * is a strip or a few of one tile, so few pairs make many pieces. Weights, inputs and outputs stay where they are: a tile has
 * pointers to its rows. Every pair's sums are those that `sab_linear` makes, in the same order, whoever shares its tile.
 *
 * Experts have column scales of their own, so tables are of a pair, and cannot be shared by experts that read one row.
 */

/* Stacked tensors of `experts` layers, each of which lies `stride` bytes behind the one before; `layer.py` has the same
 * structure. */
typedef struct {
    layer_t first;
    int64_t experts;
    struct {
        int64_t weight, residual_sign, residual_index, row_scale, row_exponent, col_scale;
    } stride;
} experts_t;

/* Pairs `first` .. `first + tokens` in the order of their experts. */
typedef struct {
    int64_t expert, first, tokens;
} run_t;

/* What threads that multiply share. */
typedef struct {
    const experts_t *stack;
    plan_t plan;
    const char *x;
    char *y;
    const char *bias;
    const int64_t *order; /* pairs by expert */
    const run_t *runs;
    int64_t repeats, together, parts; /* parts of `together` strips */
    pieces_t *pieces;
} routed_t;

INLINE layer_t layer_of(const experts_t *stack, int64_t expert) {
    layer_t layer = stack->first;
    layer.weight += expert * stack->stride.weight;
    layer.col_scale = (const uint16_t *)((const char *)layer.col_scale + expert * stack->stride.col_scale);
    layer.row_scale = (const char *)layer.row_scale + expert * stack->stride.row_scale;
    if (layer.row_exponent)
        layer.row_exponent += expert * stack->stride.row_exponent;
    if (layer.residual_planes) {
        layer.residual_sign += expert * stack->stride.residual_sign;
        layer.residual_index = (const char *)layer.residual_index + expert * stack->stride.residual_index;
    }
    return layer;
}

static void multiply_routed(void *job) {
    routed_t *of = job;
    int64_t built = -1, piece, size = value_bytes(of->plan.dtype);
    int share = first_share(of->pieces);
    layer_t layer;
    tile_t tile = {.layer = &layer};
    float *tables = all_taken(of->pieces) ? NULL : scratch(of->plan.table_floats);
    while (tables && (piece = take_piece(of->pieces, &share)) >= 0) {
        int64_t number = piece / of->parts;
        if (number != built) {
            const run_t *run = &of->runs[number];
            built = number;
            layer = layer_of(of->stack, run->expert);
            tile.bias = of->bias ? of->bias + run->expert * layer.rows * size : NULL;
            tile.tokens = run->tokens;
            for (int64_t t = 0; t < run->tokens; t++) {
                int64_t pair = of->order[run->first + t];
                tile.x[t] = of->x + pair / of->repeats * layer.columns * size;
                tile.y[t] = of->y + pair * layer.rows * size;
            }
            build_tile(tables, &of->plan, &tile);
        }
        multiply_strips(&of->plan, &tile, tables, piece % of->parts * of->together * STRIP, of->together);
    }
    free(tables);
}

INLINE int is_expert(const experts_t *stack, int64_t expert) { return expert >= 0 && expert < stack->experts; }

/* Fill `order` and `runs`, which hold as many as there are pairs; `start` has a 0 for each expert and one more. Returns
 * how many runs there are. */
static int64_t order_pairs(const experts_t *stack, const int64_t *expert, int64_t pairs, int64_t tile, int64_t *start,
                           int64_t *order, run_t *runs) {
    int64_t count = 0, before = 0;
    for (int64_t s = 0; s < pairs; s++)
        if (is_expert(stack, expert[s]))
            start[expert[s]]++;
    for (int64_t e = 0; e < stack->experts; e++) {
        int64_t own = start[e];
        start[e] = before;
        for (int64_t first = 0; first < own; first += tile)
            runs[count++] = (run_t){e, before + first, own - first < tile ? own - first : tile};
        before += own;
    }
    for (int64_t s = 0; s < pairs; s++)
        if (is_expert(stack, expert[s]))
            order[start[expert[s]]++] = s;
    return count;
}

/* y [pairs, rows]: row s = x[s / repeats] Ŵ[e]ᵀ + bias[e] for e = expert[s], or 0 where that is none of the stack's.
 * x [pairs / repeats, columns], y and bias [experts, rows] of type `dtype` and contiguous; bias may be NULL. */
EXPORT int sab_experts(const experts_t *stack, void *y, const void *bias, const void *x, const int64_t *expert,
                       int64_t pairs, int64_t repeats, int dtype, int threads) {
    const layer_t *layer = &stack->first;
    int64_t row_bytes = layer->rows * value_bytes(dtype);
    pieces_t pieces;
    routed_t of = {.stack = stack, .x = x, .y = y, .bias = bias, .repeats = repeats, .pieces = &pieces};
    int64_t *start = calloc((size_t)stack->experts + 1, sizeof *start);
    int64_t *order = malloc((size_t)(pairs + 1) * sizeof *order);
    run_t *runs = malloc((size_t)(pairs + 1) * sizeof *runs);
    int status = make_plan(&of.plan, layer, dtype, pairs ? pairs : 1);
    if (!start || !order || !runs)
        status = NO_MEMORY;
    if (status == OK) {
        for (int64_t s = 0; s < pairs; s++)
            if (!is_expert(stack, expert[s]))
                memset(of.y + s * row_bytes, 0, (size_t)row_bytes);
        int64_t count = order_pairs(stack, expert, pairs, of.plan.tile, start, order, runs);
        of.order = order;
        of.runs = runs;
        int64_t strips = (layer->rows + STRIP - 1) / STRIP;
        if (strips * STRIP * layer->columns * pairs < SMALL)
            threads = 1;
        of.together = strips_together(&of.plan, count * strips, threads);
        of.parts = (strips + of.together - 1) / of.together;
        run_together(multiply_routed, &of, cut_pieces(&pieces, count * of.parts, threads));
        status = all_taken(&pieces) ? OK : NO_MEMORY;
    }
    free_plan(&of.plan);
    free(start);
    free(order);
    free(runs);
    return status;
}
