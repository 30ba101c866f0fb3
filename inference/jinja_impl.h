/* inference/jinja_impl.h: syntax tree and values, for jinja*.c only. */
#ifndef HT_INFERENCE_JINJA_IMPL_H
#define HT_INFERENCE_JINJA_IMPL_H

#include "inference/jinja.h"

// ---- memory: everything of a template, or of one rendering, goes at once ----

struct ht_jarena {
    struct ht_jarena_block *blocks;
    size_t used, limit; // bytes
};
void *ht_jarena_take(struct ht_jarena *a, size_t n_bytes); // zeroed; NULL beyond the limit
void ht_jarena_free(struct ht_jarena *a);

// ---- values ----

enum ht_jv_kind {
    HT_JV_UNDEFINED,
    HT_JV_NONE,
    HT_JV_BOOL,
    HT_JV_INT,
    HT_JV_FLOAT,
    HT_JV_STRING,
    HT_JV_LIST,
    HT_JV_DICT,
    HT_JV_NAMESPACE,
    HT_JV_LOOP,
    HT_JV_FUNCTION
};

struct ht_jstring {
    const char *p; // UTF-8, not NUL-terminated
    size_t n;
    const unsigned char *mask; // (n) by byte: came from outside; NULL: `user` holds for all
    bool user;
};

struct ht_jv {
    enum ht_jv_kind kind;
    union {
        bool b;
        int64_t i;
        double f;
        const struct ht_jstring *s;
        struct ht_jlist *list;
        struct ht_jdict *dict; // also NAMESPACE
        struct ht_jloop *loop;
        struct ht_jfunction *function;
        const char *name; // UNDEFINED: of what; may be NULL
    };
};

struct ht_jlist {
    struct ht_jv *items;
    size_t n, capacity;
    bool tuple;
};
struct ht_jdict {
    struct ht_jv *keys, *values; // in order of insertion
    size_t n, capacity;
};
struct ht_jloop {
    struct ht_jlist *items;
    size_t index;
    struct ht_jv changed; // what loop.changed saw last
    bool has_changed;
};

struct ht_jnode;
struct ht_jscope;
enum ht_jfunction_kind { HT_JF_GLOBAL, HT_JF_METHOD, HT_JF_MACRO };
struct ht_jfunction {
    enum ht_jfunction_kind kind;
    int id;                      // GLOBAL, METHOD
    struct ht_jv self;           // METHOD
    const struct ht_jnode *node; // MACRO
    struct ht_jscope *scope;
    struct ht_jv caller; // MACRO: what caller() is
};

struct ht_jargs { // of a call, filter or test
    struct ht_jv *positional;
    size_t n;
    const struct ht_jstring **names;
    struct ht_jv *named;
    size_t n_named;
};

// ---- syntax ----

enum ht_jnode_kind {
    // statements
    HT_JN_BODY,         // items
    HT_JN_TEXT,         // value
    HT_JN_OUTPUT,       // a
    HT_JN_IF,           // items: condition, body, ..; c: else
    HT_JN_FOR,          // a target, b iterable, c body, d filter, e else
    HT_JN_SET,          // a target, b value
    HT_JN_SET_BLOCK,    // a target, b body, c filtered (a filter chain over HT_JN_HOLE), or NULL
    HT_JN_MACRO,        // name, items parameters (NAME), b defaults (LIST, the last ones), c body
    HT_JN_CALL_BLOCK,   // a call, b the macro that caller is
    HT_JN_FILTER_BLOCK, // a filter chain over HT_JN_HOLE, b body
    HT_JN_WITH,         // items: target, value, ..; c body
    HT_JN_GENERATION,   // b body
    HT_JN_BREAK,
    HT_JN_CONTINUE,
    // expressions
    HT_JN_LITERAL,   // value
    HT_JN_NAME,      // name
    HT_JN_LIST,      // items; op 1: a tuple
    HT_JN_DICT,      // items: key, value, ..
    HT_JN_ATTRIBUTE, // a, name
    HT_JN_ITEM,      // a, b
    HT_JN_SLICE,     // a, b start, c stop, d step (each may be NULL)
    HT_JN_CALL,      // a, arguments
    HT_JN_FILTER,    // a, name, arguments
    HT_JN_TEST,      // a, name, arguments; op 1: negated
    HT_JN_UNARY,     // a, op '-' '+' '!'
    HT_JN_BINARY,    // a, b, op
    HT_JN_CONCAT,    // items
    HT_JN_COMPARE,   // a first; items the others, ops
    HT_JN_AND,
    HT_JN_OR,
    HT_JN_CONDITION, // a value, b condition, c else (may be NULL)
    HT_JN_HOLE       // the text a filter block or set block gives its filters
};

enum ht_jcompare {
    HT_JC_EQ,
    HT_JC_NE,
    HT_JC_LT,
    HT_JC_LE,
    HT_JC_GT,
    HT_JC_GE,
    HT_JC_IN,
    HT_JC_NOT_IN
};
enum { HT_JOP_FLOOR = 'f', HT_JOP_POWER = 'p' }; // beside '+', '-', '*', '/', '%'

struct ht_jnode {
    enum ht_jnode_kind kind;
    int line, op, height;
    const struct ht_jstring *name;
    struct ht_jv value;
    struct ht_jnode *a, *b, *c, *d, *e;
    struct ht_jnode **items; // or positional arguments
    size_t n, capacity;
    int *ops;                           // COMPARE
    const struct ht_jstring **keywords; // named arguments
    struct ht_jnode **keyword_values;
    size_t n_keywords;
};

struct ht_jinja {
    char *name;
    struct ht_jarena arena;
    struct ht_jnode *body;
};

// ---- tokens (jinja_lex.c) ----

enum ht_jtoken_kind {
    HT_JT_END,
    HT_JT_TEXT,
    HT_JT_BLOCK_BEGIN,
    HT_JT_BLOCK_END,
    HT_JT_OUTPUT_BEGIN,
    HT_JT_OUTPUT_END,
    HT_JT_NAME,
    HT_JT_STRING, // text without quotes, escapes not yet replaced
    HT_JT_INT,
    HT_JT_FLOAT,
    HT_JT_OPERATOR // op: one or two characters, the first in the low byte
};
struct ht_jtoken {
    enum ht_jtoken_kind kind;
    int line, op;
    const char *p;
    size_t n;
};
#define HT_JOP2(a, b) ((a) | (b) << 8)

/* All tokens of text (newlines already \n), in the arena, the last one END. */
enum ht_status ht_jinja_tokens(struct ht_jtoken **out, struct ht_jarena *arena, const char *text,
                               size_t n, const char *name);

// ---- rendering ----

struct ht_jscope {
    struct ht_jscope *parent;
    struct ht_jvar {
        const struct ht_jstring *name;
        struct ht_jv value;
    } * vars;
    size_t n, capacity;
};

struct ht_jbuffer { // text being made, in the arena
    char *p;
    unsigned char *mask;
    size_t n, capacity;
};

struct ht_jrun {
    const char *name; // of the template
    int line;
    struct ht_jarena arena;
    int64_t steps;
    int depth;
    struct ht_jbuffer *out; // what statements write to
    struct ht_jv hole;
    time_t now;
    bool raised; // raise_exception was called
    struct ht_jinja_span *generations;
    size_t n_generations, capacity_generations;
};

#define HT_JFAIL(r, ...) ht_jinja_fail((r), __VA_ARGS__)
enum ht_status ht_jinja_fail(struct ht_jrun *r, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
enum ht_status ht_jinja_charge(struct ht_jrun *r, size_t steps);
enum ht_status ht_jinja_enter(struct ht_jrun *r); // one level deeper; r->depth-- to leave
enum ht_status ht_jinja_no_memory(struct ht_jrun *r);
/* *out = zeroed bytes that live until the end of the rendering. */
#define ht_jinja_take(r, out, n_bytes)                                                             \
    ((*(out) = ht_jarena_take(&(r)->arena, (n_bytes))) ? HT_OK : ht_jinja_no_memory(r))

// jinja_value.c
static inline struct ht_jv ht_jv_bool(bool b)
{
    return (struct ht_jv){ .kind = HT_JV_BOOL, .b = b };
}
static inline struct ht_jv ht_jv_int(int64_t i)
{
    return (struct ht_jv){ .kind = HT_JV_INT, .i = i };
}
static inline struct ht_jv ht_jv_float(double f)
{
    return (struct ht_jv){ .kind = HT_JV_FLOAT, .f = f };
}
static inline struct ht_jv ht_jv_none(void)
{
    return (struct ht_jv){ .kind = HT_JV_NONE };
}
const char *ht_jv_kind_name(struct ht_jv v);
bool ht_jv_truth(struct ht_jv v);
bool ht_jstring_is(const struct ht_jstring *s, const char *text);
enum ht_status ht_jv_literal(struct ht_jrun *r, struct ht_jv *out, const char *text, size_t n);
/* A view of bytes [start, end) of s. */
enum ht_status ht_jv_part(struct ht_jrun *r, struct ht_jv *out, const struct ht_jstring *s,
                          size_t start, size_t end);
enum ht_status ht_jv_list(struct ht_jrun *r, struct ht_jv *out, size_t capacity, bool tuple);
enum ht_status ht_jlist_add(struct ht_jrun *r, struct ht_jlist *l, struct ht_jv v);
enum ht_status ht_jv_dict(struct ht_jrun *r, struct ht_jv *out, size_t capacity);
enum ht_status ht_jdict_set(struct ht_jrun *r, struct ht_jdict *d, struct ht_jv key,
                            struct ht_jv v);
enum ht_status ht_jdict_find(struct ht_jrun *r, const struct ht_jdict *d, struct ht_jv key,
                             struct ht_jv **out); // NULL when absent
struct ht_jv *ht_jdict_get(const struct ht_jdict *d, const char *key);
enum ht_status ht_jv_equal(struct ht_jrun *r, struct ht_jv a, struct ht_jv b, bool *out);
enum ht_status ht_jv_order(struct ht_jrun *r, struct ht_jv a, struct ht_jv b, int *out);
enum ht_status ht_jv_contains(struct ht_jrun *r, struct ht_jv inside, struct ht_jv v, bool *out);
/* What `for` walks over: the list itself, keys of a dict, characters of a string. */
enum ht_status ht_jv_iterate(struct ht_jrun *r, struct ht_jv v, struct ht_jlist **out);
enum ht_status ht_jv_length(struct ht_jrun *r, struct ht_jv v, int64_t *out);
enum ht_status ht_jv_from_json(struct ht_jrun *r, struct ht_jv *out, const json_t *j,
                               const struct ht_jinja_var *var, bool user);

// jinja_text.c
enum ht_status ht_jbuffer_add(struct ht_jrun *r, struct ht_jbuffer *b, const char *p, size_t n,
                              bool user);
enum ht_status ht_jbuffer_add_string(struct ht_jrun *r, struct ht_jbuffer *b,
                                     const struct ht_jstring *s);
enum ht_status ht_jbuffer_string(struct ht_jrun *r, const struct ht_jbuffer *b, struct ht_jv *out);
enum ht_status ht_jbuffer_print(struct ht_jrun *r, struct ht_jbuffer *b, struct ht_jv v); // str(v)
struct ht_jjson { // of tojson
    bool ascii, sort_keys;
    int indent;                          // -1: on one line
    const struct ht_jstring *item, *key; // separators
};
enum ht_status ht_jbuffer_json(struct ht_jrun *r, struct ht_jbuffer *b, struct ht_jv v,
                               const struct ht_jjson *o, int level);
enum ht_status ht_jv_to_string(struct ht_jrun *r, struct ht_jv v, struct ht_jv *out);
/* The code point at p (valid UTF-8) and its bytes; put writes one. */
size_t ht_utf8_get(const char *p, size_t n, int32_t *c);
size_t ht_utf8_put(char p[4], int32_t c);
size_t ht_utf8_count(const char *p, size_t n);
size_t ht_utf8_offset(const char *p, size_t n, size_t index); // bytes before code point index
bool ht_utf8_is_space(int32_t c);

// jinja_run.c and jinja_operators.c
enum ht_status ht_jinja_call(struct ht_jrun *r, struct ht_jv f, const struct ht_jargs *a,
                             struct ht_jv *out);
enum ht_status ht_jinja_attribute(struct ht_jrun *r, struct ht_jv v, const struct ht_jstring *name,
                                  struct ht_jv *out);
enum ht_status ht_jinja_item(struct ht_jrun *r, struct ht_jv v, struct ht_jv key,
                             struct ht_jv *out);
enum ht_status ht_jinja_binary(struct ht_jrun *r, int op, struct ht_jv a, struct ht_jv b,
                               struct ht_jv *out);

// jinja_methods.c
int ht_jinja_method_id(struct ht_jv self, const struct ht_jstring *name); // -1: no such method
enum ht_status ht_jinja_method(struct ht_jrun *r, int id, struct ht_jv self,
                               const struct ht_jargs *a, struct ht_jv *out);
int ht_jinja_global_id(const struct ht_jstring *name);
enum ht_status ht_jinja_global(struct ht_jrun *r, int id, const struct ht_jargs *a,
                               struct ht_jv *out);
enum ht_status ht_jinja_strip(struct ht_jrun *r, const struct ht_jstring *s,
                              const struct ht_jstring *chars, bool left, bool right,
                              struct ht_jv *out);
enum ht_status ht_jinja_replace(struct ht_jrun *r, const struct ht_jstring *s,
                                const struct ht_jstring *from, const struct ht_jstring *to,
                                int64_t count, struct ht_jv *out);
enum ht_jcase { HT_JCASE_UPPER, HT_JCASE_LOWER, HT_JCASE_TITLE, HT_JCASE_CAPITAL };
enum ht_status ht_jinja_case(struct ht_jrun *r, const struct ht_jstring *s, enum ht_jcase how,
                             struct ht_jv *out);

// jinja_filters.c and jinja_tests.c
enum ht_status ht_jinja_filter(struct ht_jrun *r, const struct ht_jstring *name, struct ht_jv v,
                               const struct ht_jargs *a, struct ht_jv *out);
enum ht_status ht_jinja_test(struct ht_jrun *r, const struct ht_jstring *name, struct ht_jv v,
                             const struct ht_jargs *a, bool *out);
bool ht_jinja_has_filter(const struct ht_jstring *name);
bool ht_jinja_has_test(const struct ht_jstring *name);
/* Argument number i or of that name; NULL when not given. */
struct ht_jv *ht_jargs_get(const struct ht_jargs *a, size_t i, const char *name);
enum ht_status ht_jargs_string(struct ht_jrun *r, const struct ht_jargs *a, size_t i,
                               const char *name, const struct ht_jstring **out); // NULL: absent
enum ht_status ht_jargs_int(struct ht_jrun *r, const struct ht_jargs *a, size_t i, const char *name,
                            int64_t *out); // left alone when absent

#endif
