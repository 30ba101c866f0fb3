/* inference/api_fields.c: JSON of clients: fields of a type and range, prompts as ids. */
#include <math.h>
#include <string.h>

#include "inference/api_impl.h"

void ht_api_bad(struct ht_api_error *e, int http, const char *param)
{
    e->http = http;
    e->type = "invalid_request_error";
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
}

const char *ht_api_type_name(const json_t *j)
{
    static const char *const names[] = { "an object", "an array", "a string", "an integer",
                                         "a number",  "true",     "false",    "null" };
    return j ? names[json_typeof(j)] : "missing";
}

/* Brackets inside strings do not count. */
static bool is_too_deep(const char *p, size_t n)
{
    bool quoted = false;
    int depth = 0;
    for (size_t i = 0; i < n; i++) {
        if (quoted) {
            if (p[i] == '\\')
                i++;
            else if (p[i] == '"')
                quoted = false;
        } else if (p[i] == '"') {
            quoted = true;
        } else if (p[i] == '[' || p[i] == '{') {
            if (++depth > HT_API_MAX_DEPTH) return true;
        } else if (p[i] == ']' || p[i] == '}') {
            depth--;
        }
    }
    return false;
}

enum ht_status ht_api_parse_json(json_t **out, const char *body, size_t n_bytes,
                                 struct ht_api_error *e)
{
    json_error_t where;
    *out = NULL;
    if (is_too_deep(body, n_bytes))
        return HT_API_BAD(e, NULL, "the body is nested more than %d deep", HT_API_MAX_DEPTH);
    *out = json_loadb(body, n_bytes, JSON_REJECT_DUPLICATES, &where);
    if (!*out)
        return HT_API_BAD(e, NULL, "the body is not JSON: line %d, column %d: %s", where.line,
                          where.column, where.text);
    if (json_is_object(*out)) return HT_OK;
    json_decref(*out);
    *out = NULL;
    return HT_API_BAD(e, NULL, "the body is not a JSON object");
}

json_t *ht_api_get(const json_t *o, const char *key)
{
    json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

enum ht_status ht_api_get_bool(const json_t *o, const char *key, bool *out, struct ht_api_error *e)
{
    const json_t *v = ht_api_get(o, key);
    if (!v) return HT_OK;
    if (!json_is_boolean(v))
        return HT_API_BAD(e, key, "%s is %s; it must be true or false", key, ht_api_type_name(v));
    *out = json_is_true(v);
    return HT_OK;
}

enum ht_status ht_api_get_int(const json_t *o, const char *key, int64_t low, int64_t high,
                              bool clip, int64_t *out, struct ht_api_error *e)
{
    const json_t *v = ht_api_get(o, key);
    if (!v) return HT_OK;
    double real = json_number_value(v);
    if (!json_is_number(v) || real != floor(real))
        return HT_API_BAD(e, key, "%s is %s; it must be an integer", key,
                          json_is_number(v) ? "a fraction" : ht_api_type_name(v));
    if (json_is_integer(v)) {
        *out = json_integer_value(v);
    } else {
        if (real < -9e18 || (real > 9e18 && !clip))
            return HT_API_BAD(e, key, "%s is %g; it must be from %lld to %lld", key, real,
                              (long long)low, (long long)high);
        *out = real > 9e18 ? INT64_MAX : (int64_t)real;
    }
    if (clip && *out > high) *out = high;
    if (*out < low || *out > high)
        return HT_API_BAD(e, key, "%s is %lld; it must be from %lld to %lld", key, (long long)*out,
                          (long long)low, (long long)high);
    return HT_OK;
}

enum ht_status ht_api_get_real(const json_t *o, const char *key, double low, double high, bool open,
                               float *out, struct ht_api_error *e)
{
    const json_t *v = ht_api_get(o, key);
    if (!v) return HT_OK;
    if (!json_is_number(v))
        return HT_API_BAD(e, key, "%s is %s; it must be a number", key, ht_api_type_name(v));
    const double real = json_number_value(v);
    if (!(real >= low && real <= high) || (open && (float)real <= (float)low))
        return HT_API_BAD(e, key, "%s is %g; it must be %s %g and at most %g", key, real,
                          open ? "above" : "at least", low, high);
    *out = (float)real + 0.0f; // no -0
    return HT_OK;
}

enum ht_status ht_api_get_string(const json_t *o, const char *key, const char **out,
                                 struct ht_api_error *e)
{
    const json_t *v = ht_api_get(o, key);
    if (!v) return HT_OK;
    if (!json_is_string(v))
        return HT_API_BAD(e, key, "%s is %s; it must be a string", key, ht_api_type_name(v));
    *out = json_string_value(v);
    return HT_OK;
}

enum ht_status ht_api_add_text(struct ht_ids *ids, const json_t *text, bool special,
                               const struct ht_api_context *c, struct ht_api_error *e)
{
    if (!c->tokenizer)
        return HT_API_BAD(e, "prompt", "this model has no tokenizer; give token ids");
    return ht_encode(c->encoder, json_string_value(text), json_string_length(text), special, ids);
}

enum ht_status ht_api_add_ids(struct ht_ids *ids, const json_t *list,
                              const struct ht_api_context *c, const char *param,
                              struct ht_api_error *e)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const json_int_t id = json_integer_value(v);
        if (!json_is_integer(v))
            return HT_API_BAD(e, param, "%s: item %zu is %s; it must be a token id", param, i,
                              ht_api_type_name(v));
        if (id < 0 || id >= c->vocab_size)
            return HT_API_BAD(e, param, "%s: token id %lld; ids are from 0 to %lld", param,
                              (long long)id, (long long)c->vocab_size - 1);
        const int32_t token = (int32_t)id;
        HT_TRY(ht_ids_append(ids, &token, 1));
    }
    return HT_OK;
}
