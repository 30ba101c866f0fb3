/* bench/hybridbench/load.h: a load for any OpenAI-compatible server: requests arrive as a Poisson
 * process (or as fast as a number of clients allows), answers are streamed, and every token's time
 * is noted.
 *
 *   time to first token   from the request's due time to the first piece of text
 *   time per output token (last piece - first piece) / (tokens - 1)
 *   inter-token latency   between neighbouring pieces of one answer
 *
 * Times count from when a request was due, not from when a client was free: a server that falls
 * behind cannot hide its queue (coordinated omission). Prompts are made of common English words;
 * how many tokens that were says the server's usage report.
 */
#ifndef HT_BENCH_LOAD_H
#define HT_BENCH_LOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "bench/hybridbench/lengths.h"
#include "bench/hybridbench/samples.h"

struct ht_load_options {
    const char *url;     // http://HOST:PORT[/PREFIX], /v1/completions follows
    const char *model;   // NULL: what /v1/models names first
    const char *api_key; // NULL for none
    bool chat;           // /v1/chat/completions
    int64_t n_requests;  // 1..10,000,000
    double rate;         // arrivals per second; INFINITY: all due at once
    int concurrency;     // requests under way at once, 1..4096
    struct ht_lengths prompt_words, output_tokens;
    int64_t shared_words; // every prompt begins with these same words
    double timeout_s;     // of one request
    uint64_t seed;
    void (*progress)(void *user, int64_t finished, int64_t n_requests); // or NULL
    void *user;
};

struct ht_load_result {
    int64_t n_ok, n_refused, n_failed; // refused: status 429 or 503
    char first_failure[256];           // what the first one that failed said
    int64_t prompt_tokens, output_tokens;
    double wall_s; // first due time to last answer
    struct ht_samples first_token_s, per_token_s, between_tokens_s, total_s; // of answered requests
};

/* Blocks until every request is answered, refused or timed out. HT_ERR_ARG: an option outside its
 * bounds or an URL that is not http; HT_ERR_IO: no server there. */
enum ht_status ht_load_run(struct ht_load_result *out, const struct ht_load_options *o);
void ht_load_result_free(struct ht_load_result *r);

#endif
