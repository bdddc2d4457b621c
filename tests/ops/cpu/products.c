/* The products of the layers that are read from standard input, for a processor that this machine emulates.
 *
 * A layer is twelve int64 (shape, tokens, dtype, threads) and eight arrays (the stored tensors, x, bias), each behind its
 * number of bytes, 0 for one that there is not. Written are `sab_path` and `sab_dots`, and y of each layer.
 */
#include "binary_linear.c"

#include <stdio.h>

static void *read_array(void) {
    int64_t bytes;
    void *array = NULL;
    if (fread(&bytes, 8, 1, stdin) != 1 || (bytes && !(array = malloc((size_t)bytes))) ||
        fread(array, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(1);
    return array;
}

int main(void) {
    int64_t shape[12], paths[2] = {sab_path(), sab_dots()};
    fwrite(paths, 8, 2, stdout);
    while (fread(shape, 8, 12, stdin) == 12) {
        void *arrays[8];
        for (int i = 0; i < 8; i++)
            arrays[i] = read_array();
        layer_t layer = {arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5], shape[0], shape[1], shape[2],
                         shape[3],  shape[4],  shape[5],  shape[6],  shape[7],  shape[8]};
        int64_t tokens = shape[9], bytes = tokens * layer.rows * (shape[10] == F32 ? 4 : 2);
        void *y = malloc((size_t)bytes);
        if (!y || sab_linear(&layer, y, arrays[7], arrays[6], tokens, (int)shape[10], (int)shape[11]) != OK)
            return 2;
        fwrite(y, 1, (size_t)bytes, stdout);
        free(y);
        for (int i = 0; i < 8; i++)
            free(arrays[i]);
    }
    return 0;
}
