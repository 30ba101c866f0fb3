/* inference/http_metrics.c: Prometheus text. */
#include <string.h>

#include "inference/http_impl.h"

static const double bounds[HT_HTTP_BUCKETS - 1] = { 0.001, 0.0025, 0.005, 0.01, 0.025,
                                                    0.05,  0.1,    0.25,  0.5,  1,
                                                    2.5,   5,      10,    30,   120 };

void ht_histogram_add(struct ht_histogram *h, double seconds)
{
    int i = 0;
    if (!(seconds >= 0)) return;
    while (i < HT_HTTP_BUCKETS - 1 && seconds > bounds[i]) i++;
    h->buckets[i]++;
    h->count++;
    h->sum += seconds;
}

static void head(struct ht_api_text *out, const char *prefix, const char *name, const char *type,
                 const char *help)
{
    ht_api_add(out, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, help, prefix, name, type);
}

static void value(struct ht_api_text *out, const char *prefix, const char *name, const char *type,
                  const char *help, double v)
{
    head(out, prefix, name, type, help);
    ht_api_add(out, "%s%s %.15g\n", prefix, name, v);
}

static void histogram(struct ht_api_text *out, const char *prefix, const char *name,
                      const char *help, const struct ht_histogram *h)
{
    int64_t sum = 0;
    head(out, prefix, name, "histogram", help);
    for (int i = 0; i < HT_HTTP_BUCKETS - 1; i++) {
        sum += h->buckets[i];
        ht_api_add(out, "%s%s_bucket{le=\"%g\"} %lld\n", prefix, name, bounds[i], (long long)sum);
    }
    ht_api_add(out, "%s%s_bucket{le=\"+Inf\"} %lld\n%s%s_sum %.9g\n%s%s_count %lld\n", prefix, name,
               (long long)h->count, prefix, name, h->sum, prefix, name, (long long)h->count);
}

void ht_http_write_metrics(struct ht_api_text *out, const struct ht_http_metrics *m,
                           const struct ht_engine *e, const char *prefix)
{
    static const char *const finishes[5] = { NULL, "stop", "length", "cancelled", "error" };
    static const char *const reasons[HT_REJECT_COUNT] = {
        "bad_request", "key",         "not_found",    "too_large",   "queue",
        "unavailable", "connections", "slow_request", "slow_reader", "error"
    };
    const bool vllm = strcmp(prefix, "vllm:") == 0;
    struct ht_engine_stats s = { 0 };

    if (e) ht_engine_get_stats(e, &s);
    value(out, prefix, vllm ? "num_requests_running" : "requests_running", "gauge",
          "Sequences being computed.", (double)s.running);
    value(out, prefix, vllm ? "num_requests_waiting" : "requests_waiting", "gauge",
          "Requests in the queue.", (double)s.waiting);
    value(out, prefix, "prompt_tokens_total", "counter", "Prompt tokens taken in.",
          (double)s.prompt_tokens);
    value(out, prefix, "generation_tokens_total", "counter", "Tokens generated.",
          (double)s.generated_tokens);
    value(out, prefix, vllm ? "kv_cache_usage_perc" : "kv_cache_usage_ratio", "gauge",
          "Share of the KV pool in use.", s.kv_usage);
    value(out, prefix, "state_cache_usage_ratio", "gauge", "Share of the state slots in use.",
          s.state_usage);
    value(out, prefix, "prefix_cache_queries_total", "counter", "Lookups in the prefix cache.",
          (double)s.prefix_queries);
    value(out, prefix, "prefix_cache_hits_total", "counter", "Lookups that found something.",
          (double)s.prefix_hits);
    value(out, prefix, "prefix_cached_tokens_total", "counter", "Prompt tokens not computed again.",
          (double)s.cached_tokens);
    value(out, prefix, "prefix_cache_bytes", "gauge", "Size of the prefix cache.",
          (double)s.prefix_bytes);
    value(out, prefix, "preemptions_total", "counter", "Sequences set aside for others.",
          (double)s.preemptions);
    value(out, prefix, "speculated_tokens_total", "counter", "Draft tokens tried.",
          (double)s.speculated);
    value(out, prefix, "accepted_tokens_total", "counter", "Draft tokens kept.",
          (double)s.accepted);
    value(out, prefix, "engine_steps_total", "counter", "Steps of the engine.", (double)s.steps);
    value(out, prefix, "connections", "gauge", "Open connections.", m->connections);
    histogram(out, prefix, "time_to_first_token_seconds", "From arrival to the first token.",
              &m->first_token);
    histogram(out, prefix, "inter_token_latency_seconds", "Between tokens of one choice.",
              &m->inter_token);
    histogram(out, prefix, "e2e_request_latency_seconds", "From arrival to the end of the answer.",
              &m->end_to_end);
    histogram(out, prefix, vllm ? "request_queue_time_seconds" : "queue_seconds", "In the queue.",
              &m->queue);
    head(out, prefix, vllm ? "request_success_total" : "requests_total", "counter",
         "Choices ended.");
    for (int i = 1; i < 5; i++)
        ht_api_add(out, "%s%s{%s=\"%s\"} %lld\n", prefix,
                   vllm ? "request_success_total" : "requests_total",
                   vllm ? "finished_reason" : "finish_reason", finishes[i],
                   (long long)m->finished[i]);
    head(out, prefix, "rejected_total", "counter", "Requests and connections refused or cut.");
    for (int i = 0; i < HT_REJECT_COUNT; i++)
        ht_api_add(out, "%srejected_total{reason=\"%s\"} %lld\n", prefix, reasons[i],
                   (long long)m->rejected[i]);
}
