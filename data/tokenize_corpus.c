/* data/tokenize_corpus.c: batches of documents. */
#include "data/tokenize_corpus.h"

#include <omp.h>
#include <stdbool.h>
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
        if (progress && !progress(user, done, total, n_docs, 0)) {
            st = HT_FAIL(HT_ERR_STOPPED, "stopped after %lld documents", (long long)n_docs);
            goto done;
        }
    }
done:
    free_batch(b);
    return st;
}

/* A batch and its tokens; two of them take turns. */
struct turn {
    struct batch batch;
    struct ht_ids ids[BATCH_DOCS];
};

struct run {
    const struct ht_corpus_job *job;
    struct ht_corpus_counts *counts; // (2)
    int n_threads;
    struct ht_encoder **encoders;       // (n_threads)
    struct ht_shard_writer *writers[2]; // documents, held-out documents
    struct turn *turns[2];
    int64_t n_docs; // written
    enum ht_status st;
    char message[512]; // of st: messages live in the thread that failed
};

static void free_run(struct run *r)
{
    for (int k = 0; k < 2; k++) {
        ht_shard_writer_free(r->writers[k]);
        if (!r->turns[k]) continue;
        for (int i = 0; i < BATCH_DOCS; i++) ht_ids_free(&r->turns[k]->ids[i]);
        free(r->turns[k]->batch.text);
        free(r->turns[k]);
    }
    for (int i = 0; r->encoders && i < r->n_threads; i++) ht_encoder_free(r->encoders[i]);
    free(r->encoders);
}

static enum ht_status prepare(struct run *r)
{
    const struct ht_corpus_job *job = r->job;
    const int64_t vocab_size = ht_tokenizer_vocab_size(job->tokenizer);
    const char *hash = ht_tokenizer_hash(job->tokenizer);

    r->encoders = calloc((size_t)r->n_threads, sizeof(struct ht_encoder *));
    for (int k = 0; k < 2; k++) r->turns[k] = calloc(1, sizeof *r->turns[k]);
    if (!r->encoders || !r->turns[0] || !r->turns[1])
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %d encoders", r->n_threads);
    for (int i = 0; i < r->n_threads; i++)
        HT_TRY(ht_encoder_create(&r->encoders[i], job->tokenizer));
    HT_TRY(ht_shard_writer_create(&r->writers[0], job->out_path, vocab_size, hash));
    if (job->holdout_every > 0)
        HT_TRY(ht_shard_writer_create(&r->writers[1], job->holdout_path, vocab_size, hash));
    return HT_OK;
}

/* The first failure of any thread. */
static void note(struct run *r, enum ht_status st)
{
    if (st == HT_OK) return;
#pragma omp critical(corpus_failure)
    if (r->st == HT_OK) {
        strncpy(r->message, ht_error_message(), sizeof r->message - 1);
#pragma omp atomic write
        r->st = st;
    }
}

static bool failed(struct run *r)
{
    enum ht_status st;
#pragma omp atomic read
    st = r->st;
    return st != HT_OK;
}

static enum ht_status write_batch(struct run *r, struct turn *turn)
{
    for (int64_t i = 0; i < turn->batch.n; i++) {
        const int64_t every = r->job->holdout_every;
        const int to = every > 0 && (r->n_docs + 1) % every == 0;
        const int64_t n_bytes = (int64_t)turn->batch.length[i];
        HT_TRY(ht_shard_writer_add(r->writers[to], turn->ids[i].ids, turn->ids[i].n, n_bytes));
        r->counts[to].n_docs++;
        r->counts[to].n_tokens += turn->ids[i].n;
        r->counts[to].n_bytes += n_bytes;
        r->n_docs++;
    }
    turn->batch.n = 0;
    return HT_OK;
}

static enum ht_status encode_document(struct run *r, struct turn *turn, int64_t i)
{
    struct ht_encoder *encoder = r->encoders[omp_get_thread_num()];

    turn->ids[i].n = 0;
    HT_TRY(ht_encode(encoder, turn->batch.texts[i], turn->batch.length[i], false, &turn->ids[i]));
    return r->job->eos_id >= 0 ? ht_ids_append(&turn->ids[i], &r->job->eos_id, 1) : HT_OK;
}

/* Encode now; meanwhile write the other turn's batch and read its next. */
static void take_turn(struct run *r, struct turn *now, struct turn *other)
{
#pragma omp parallel num_threads(r->n_threads)
    {
#pragma omp single nowait
        {
            enum ht_status st = write_batch(r, other);
            if (st == HT_OK) st = next_batch(&other->batch, r->job->source);
            note(r, st);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < now->batch.n; i++)
            if (!failed(r)) note(r, encode_document(r, now, i));
    }
}

static enum ht_status report(const struct run *r)
{
    uint64_t done, total;

    if (!r->job->progress) return HT_OK;
    ht_text_progress(r->job->source, &done, &total);
    if (r->job->progress(r->job->user, done, total, r->n_docs,
                         r->counts[0].n_tokens + r->counts[1].n_tokens))
        return HT_OK;
    return HT_FAIL(HT_ERR_STOPPED, "stopped after %lld documents; nothing is kept",
                   (long long)r->n_docs);
}

enum ht_status ht_corpus_tokenize(const struct ht_corpus_job *job,
                                  struct ht_corpus_counts counts[2])
{
    struct run r = { .job = job, .counts = counts };
    enum ht_status st = HT_OK;
    int now = 0;

    memset(counts, 0, 2 * sizeof *counts);
    if (job->holdout_every < 0 || job->holdout_every == 1)
        return HT_FAIL(HT_ERR_ARG, "every %lld-th document held out; it must be 2 or more",
                       (long long)job->holdout_every);
    r.n_threads = job->n_threads > 0 ? job->n_threads : omp_get_max_threads();
    HT_TRY_GOTO(st, done, prepare(&r));
    HT_TRY_GOTO(st, done, next_batch(&r.turns[0]->batch, job->source));
    while (r.turns[now]->batch.n > 0) {
        take_turn(&r, r.turns[now], r.turns[!now]);
        if (r.st != HT_OK) {
            st = HT_FAIL(r.st, "%s", r.message);
            goto done;
        }
        HT_TRY_GOTO(st, done, report(&r));
        now = !now;
        // the batch just encoded is written in the next turn, or here when no batch follows
        if (r.turns[now]->batch.n == 0) HT_TRY_GOTO(st, done, write_batch(&r, r.turns[!now]));
    }
    HT_TRY_GOTO(st, done, report(&r));
    if (r.writers[1]) HT_TRY_GOTO(st, done, ht_shard_writer_finish(r.writers[1], NULL, NULL));
    HT_TRY_GOTO(st, done, ht_shard_writer_finish(r.writers[0], NULL, NULL));
done:
    free_run(&r);
    return st;
}
