/* inference/session.c: opening a model. */
#include "inference/session.h"

#include <string.h>

enum { DEFAULT_CONTEXT = 4096, BLOCK_TOKENS = 512 };

int64_t ht_session_find_eos(const struct ht_weights *weights, const struct ht_tokenizer *tokenizer)
{
    static const char *const ends[] = { "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>",
                                        "[EOS]" };
    static const char *const others[] = { "<unk>", "<pad>", "<s>",    "<bos>",
                                          "[UNK]", "[PAD]", "<mask>", "[MASK]" };
    const int64_t vocab_size = ht_weights_model(weights)->vocab_size;
    int64_t only = -1;

    if (ht_weights_eos_id(weights) >= 0 || !tokenizer) return ht_weights_eos_id(weights);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        const int32_t id = ht_tokenizer_find(tokenizer, ends[i]);
        if (id >= 0 && id < vocab_size && ht_tokenizer_is_special(tokenizer, id)) return id;
    }
    for (int64_t id = 0; id < ht_tokenizer_vocab_size(tokenizer); id++) {
        if (!ht_tokenizer_is_special(tokenizer, (int32_t)id)) continue;
        if (only >= 0) return -1;
        only = id;
    }
    if (only < 0 || only >= vocab_size) return -1;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(ht_tokenizer_token(tokenizer, (int32_t)only), others[i]) == 0) return -1;
    return only;
}

enum ht_status ht_session_open(struct ht_session *s, const struct ht_session_options *o)
{
    *s = (struct ht_session){ 0 };
    HT_TRY(ht_weights_open(&s->weights, o->path, o->log));
    const struct ht_model_config *c = ht_weights_model(s->weights);
    s->context = o->context > 0 ? o->context : DEFAULT_CONTEXT;
    HT_TRY(ht_backend_create_cpu(&s->backend, o->threads, 1 << 20));
    // below AVX-512 bf16 products are done in fp32 anyway
    const bool bf16 = !o->fp32 && ht_weights_stored_dtype(s->weights) == HT_DTYPE_BF16;
    HT_TRY(ht_model_create(&s->model, &s->backend, c, bf16 ? HT_DTYPE_BF16 : HT_DTYPE_F32,
                           HT_DECAY_MATRICES, 0, 0, s->context));
    HT_TRY(ht_weights_load(s->weights, &s->model->list, s->model->matrix, s->model->dtype,
                           s->model->vector, NULL));
    HT_TRY(ht_decoder_create(&s->decoder, s->model, BLOCK_TOKENS));
    HT_TRY(ht_state_create(&s->state, s->model, s->context));
    const char *tokenizer = o->tokenizer ? o->tokenizer : ht_weights_tokenizer_path(s->weights);
    if (tokenizer) HT_TRY(ht_tokenizer_load(&s->tokenizer, tokenizer));
    s->eos_id = ht_session_find_eos(s->weights, s->tokenizer);
    return HT_OK;
}

void ht_session_close(struct ht_session *s)
{
    ht_tokenizer_free(s->tokenizer);
    ht_state_free(s->state);
    ht_decoder_free(s->decoder);
    ht_model_free(s->model);
    ht_backend_free(&s->backend);
    ht_weights_close(s->weights);
    *s = (struct ht_session){ 0 };
}
