/* tests/fuzz/fuzz_hf_config.c: Hugging Face's config.json. What is accepted can be written and read
 * again. */
#include "core/config/recipe.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct ht_model_config m, again; // large
    char *text = fuzz_text(data, n), *written = NULL;
    const enum ht_status st = ht_model_config_from_hf(&m, text, n, "config.json");

    if (st == HT_OK) {
        FUZZ_HOLDS(ht_model_config_check(&m, "config.json") == HT_OK);
        // not everything that can be read has a form there: the writer may refuse
        if (ht_model_config_to_hf(&written, &m) == HT_OK) {
            FUZZ_HOLDS(ht_model_config_from_hf(&again, written, strlen(written), "again") == HT_OK);
            FUZZ_HOLDS(again.n_layers == m.n_layers && again.d_model == m.d_model &&
                       again.vocab_size == m.vocab_size &&
                       !memcmp(again.layer_kind, m.layer_kind, sizeof m.layer_kind));
        }
    } else {
        FUZZ_REFUSED(st);
    }
    free(written);
    free(text);
    return 0;
}
