/* data/tokenize_corpus.c: batches of documents. */
#include "data/tokenize_corpus.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "data/shard.h"

enum { BATCH_BYTES = 8 << 20, BATCH_DOCS = 8192 };

struct batch {
    char *text; // documents one after the other
    size_t n_bytes, room;
    size_t start[BATCH_DOCS], length[BATCH_DOCS];
    const char *texts[BATCH_DOCS];
    int64_t n;
};

static enum ht_status append(struct batch *b, const char *text, size_t n)
{
    if (b->n_bytes + n + 1 > b->room) {
        const size_t room = b->n_bytes + n + 1 + BATCH_BYTES;
        char *bigger = realloc(b->text, room);
        if (!bigger) return HT_FAIL(HT_ERR_MEMORY, "no memory for documents of %zu bytes", room);
        b->text = bigger;
        b->room = room;
    }
    memcpy(b->text + b->n_bytes, text, n);
    b->text[b->n_bytes + n] = '\0';
    b->start[b->n] = b->n_bytes;
    b->length[b->n++] = n;
    b->n_bytes += n + 1;
    return HT_OK;
}

/* n = 0: the source is empty. */
static enum ht_status next_batch(struct batch *b, struct ht_text_source *source)
{
    const char *text;
    size_t n;

    b->n = 0;
    b->n_bytes = 0;
    while (b->n < BATCH_DOCS && b->n_bytes < BATCH_BYTES) {
        HT_TRY(ht_text_next(source, &text, &n));
        if (!text) break;
        HT_TRY(append(b, text, n));
    }
    for (int64_t i = 0; i < b->n; i++) b->texts[i] = b->text + b->start[i];
    return HT_OK;
}

static void free_batch(struct batch *b)
{
    if (b) free(b->text);
    free(b);
}

enum ht_status ht_corpus_count_words(struct ht_text_source *source, struct ht_bpe_trainer *trainer,
                                     ht_corpus_progress *progress, void *user)
{
    struct batch *b = calloc(1, sizeof *b);
    enum ht_status st = HT_OK;
    uint64_t done, total;
    int64_t n_docs = 0;

    if (!b) return HT_FAIL(HT_ERR_MEMORY, "no memory for documents");
    for (;;) {
        HT_TRY_GOTO(st, done, next_batch(b, source));
        if (b->n == 0) break;
        HT_TRY_GOTO(st, done, ht_bpe_trainer_add(trainer, b->texts, b->length, b->n));
        n_docs += b->n;
        ht_text_progress(source, &done, &total);
        if (progress) progress(user, done, total, n_docs, 0);
    }
done:
    free_batch(b);
    return st;
}

struct workers {
    int n;
    struct ht_encoder **encoders;
    struct ht_ids ids[BATCH_DOCS]; // of the batch's documents
};

static void free_workers(struct workers *w)
{
    if (!w) return;
    for (int i = 0; i < w->n; i++) ht_encoder_free(w->encoders[i]);
    for (int i = 0; i < BATCH_DOCS; i++) ht_ids_free(&w->ids[i]);
    free(w->encoders);
    free(w);
}

static enum ht_status create_workers(struct workers **out, const struct ht_tokenizer *t, int n)
{
    enum ht_status st = HT_OK;
    struct workers *w = calloc(1, sizeof *w);

    *out = NULL;
    if (w) w->encoders = calloc((size_t)n, sizeof(struct ht_encoder *));
    if (!w || !w->encoders) {
        free(w);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %d encoders", n);
    }
    w->n = n;
    for (int i = 0; i < n && st == HT_OK; i++) st = ht_encoder_create(&w->encoders[i], t);
    if (st == HT_OK)
        *out = w;
    else
        free_workers(w);
    return st;
}

static enum ht_status encode_batch(struct workers *w, const struct batch *b, int32_t eos_id)
{
    enum ht_status first = HT_OK;
    char message[512] = "";

#pragma omp parallel for num_threads(w->n) schedule(dynamic)
    for (int64_t i = 0; i < b->n; i++) {
        w->ids[i].n = 0;
        enum ht_status st = ht_encode(w->encoders[omp_get_thread_num()], b->texts[i], b->length[i],
                                      false, &w->ids[i]);
        if (st == HT_OK && eos_id >= 0) st = ht_ids_append(&w->ids[i], &eos_id, 1);
        if (st != HT_OK)
#pragma omp critical(corpus_failure)
            if (first == HT_OK) { // the message lives in the thread that failed
                first = st;
                strncpy(message, ht_error_message(), sizeof message - 1);
            }
    }
    return first == HT_OK ? HT_OK : HT_FAIL(first, "%s", message);
}

enum ht_status ht_corpus_tokenize(struct ht_text_source *source,
                                  const struct ht_tokenizer *tokenizer, int32_t eos_id,
                                  int n_threads, const char *out_path,
                                  struct ht_corpus_counts *counts, ht_corpus_progress *progress,
                                  void *user)
{
    struct batch *b = calloc(1, sizeof *b);
    struct ht_shard_writer *writer = NULL;
    struct workers *w = NULL;
    enum ht_status st = HT_OK;
    uint64_t done_bytes, total_bytes;

    *counts = (struct ht_corpus_counts){ 0 };
    if (!b) return HT_FAIL(HT_ERR_MEMORY, "no memory for documents");
    HT_TRY_GOTO(st, done,
                create_workers(&w, tokenizer, n_threads > 0 ? n_threads : omp_get_max_threads()));
    HT_TRY_GOTO(st, done,
                ht_shard_writer_create(&writer, out_path, ht_tokenizer_vocab_size(tokenizer),
                                       ht_tokenizer_hash(tokenizer)));
    for (;;) {
        HT_TRY_GOTO(st, done, next_batch(b, source));
        if (b->n == 0) break;
        HT_TRY_GOTO(st, done, encode_batch(w, b, eos_id));
        for (int64_t i = 0; i < b->n; i++) {
            HT_TRY_GOTO(
                st, done,
                ht_shard_writer_add(writer, w->ids[i].ids, w->ids[i].n, (int64_t)b->length[i]));
            counts->n_tokens += w->ids[i].n;
            counts->n_bytes += (int64_t)b->length[i];
        }
        counts->n_docs += b->n;
        ht_text_progress(source, &done_bytes, &total_bytes);
        if (progress) progress(user, done_bytes, total_bytes, counts->n_docs, counts->n_tokens);
    }
    HT_TRY_GOTO(st, done, ht_shard_writer_finish(writer, NULL, NULL));
done:
    ht_shard_writer_free(writer);
    free_workers(w);
    free_batch(b);
    return st;
}
