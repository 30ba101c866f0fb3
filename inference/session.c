/* inference/session.c: opening a model for one sequence. */
#include "inference/session.h"

enum { DEFAULT_CONTEXT = 4096, BLOCK_TOKENS = 512 };

enum ht_status ht_session_open(struct ht_session *s, const struct ht_session_options *o)
{
    struct ht_weights *weights;

    *s = (struct ht_session){ 0 };
    HT_TRY(ht_weights_open(&weights, o->path, o->log));
    s->context = o->context > 0 ? o->context : DEFAULT_CONTEXT;
    HT_TRY(ht_loaded_open(&s->l, weights, o->tokenizer, o->weights ? o->weights : "stored",
                          o->threads, s->context));
    HT_TRY(ht_decoder_create(&s->decoder, s->l.model, BLOCK_TOKENS));
    return ht_state_create(&s->state, s->l.model, s->context);
}

void ht_session_close(struct ht_session *s)
{
    ht_state_free(s->state);
    ht_decoder_free(s->decoder);
    ht_loaded_close(&s->l);
    *s = (struct ht_session){ 0 };
}
