/* inference/jinja.h: the part of the Jinja template language that chat templates are written in.
 *
 * Statements: for (if, else, break, continue, unpacking), if, set (also namespaces, blocks,
 * tuples), macro, call, filter, with, raw, generation. Expressions, filters, tests and methods as
 * in Jinja 3.1 over Python's str, list and dict, with the environment of transformers: trim_blocks,
 * lstrip_blocks, immutable values, tojson without HTML escapes, raise_exception, strftime_now. What
 * is not there is an error with its line, never a guess.
 *
 * Every byte of a string knows whether it came from outside (`user`): concatenation, slices,
 * filters and methods carry that along, so that the output says which of its bytes a client typed.
 *
 * Templates and values are untrusted: nodes, steps, output, memory and depth are bounded. Strings
 * are counted in code points, integers have 64 bits (overflow is an error), case is mapped one code
 * point to one.
 */
#ifndef HT_INFERENCE_JINJA_H
#define HT_INFERENCE_JINJA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <jansson.h>

#include "core/base/status.h"

enum {
    HT_JINJA_MAX_BYTES = 1 << 20,    // of a template
    HT_JINJA_MAX_NODES = 100000,     // of its syntax tree
    HT_JINJA_MAX_STEPS = 1000000,    // nodes visited; work on long strings counts one per KiB
    HT_JINJA_MAX_OUTPUT = 8 << 20,   // bytes
    HT_JINJA_MAX_MEMORY = 256 << 20, // bytes of all values of a rendering
    HT_JINJA_MAX_DEPTH = 64,         // nesting of blocks, brackets and operators
    HT_JINJA_MAX_CALLS = 400         // nesting while rendering
};

struct ht_jinja;

/* HT_ERR_FORMAT with the line. name is for messages and is copied. */
enum ht_status ht_jinja_parse(struct ht_jinja **out, const char *text, size_t n_bytes,
                              const char *name);
void ht_jinja_free(struct ht_jinja *t);

struct ht_jinja_var {
    const char *name;
    json_t *value;                   // borrowed; strings must stay while rendering runs
    bool user;                       // its strings came from outside
    const char *const *trusted_keys; // values of these keys of objects count as the template's own
                                     // text (a message's role); NULL-terminated, or NULL
};

struct ht_jinja_span {
    size_t start, end; // bytes
};

struct ht_jinja_output {
    char *text; // NUL-terminated UTF-8
    size_t n_bytes;
    unsigned char *user;               // (n_bytes) 1 where the byte came from outside
    struct ht_jinja_span *generations; // what stood in generation blocks
    size_t n_generations;
};

/* HT_ERR_FORMAT: the template stopped with an error (its line, or what raise_exception said);
 * HT_ERR_ARG after raise_exception. now: for strftime_now. Any thread; templates are read-only. */
enum ht_status ht_jinja_render(const struct ht_jinja *t, const struct ht_jinja_var *vars,
                               size_t n_vars, time_t now, struct ht_jinja_output *out);
void ht_jinja_output_free(struct ht_jinja_output *out);

#endif
