/* tests/fuzz/fuzz_safetensors.c: a safetensors file; every byte of every tensor that it shows is
 * read. */
#include "checkpoints/safetensors.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct ht_safetensors *s = NULL;
    const enum ht_status st = ht_safetensors_open(&s, fuzz_file(data, n, NULL));
    uint64_t sum = 0;

    if (st == HT_OK) {
        for (int i = 0; i < ht_safetensors_count(s); i++) {
            const struct ht_safetensors_tensor *t = ht_safetensors_at(s, i);
            const unsigned char *bytes = t->data;
            const size_t n_bytes = (size_t)t->n * ht_dtype_bytes(t->dtype);
            FUZZ_HOLDS(n_bytes <= n);
            for (size_t k = 0; k < n_bytes; k++) sum += bytes[k];
            FUZZ_HOLDS(ht_safetensors_find(s, t->name) == t);
        }
    } else {
        FUZZ_REFUSED(st);
    }
    ht_safetensors_close(s);
    FUZZ_HOLDS(sum <= 255 * n); // each byte of the file is in one tensor at most
    return 0;
}
