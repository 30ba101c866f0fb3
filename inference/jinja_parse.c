/* inference/jinja_parse.c: tokens -> syntax tree: tags, bodies, a whole template. */
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_parser.h"

static enum ht_status body(struct ht_jparser *p, struct ht_jnode **out);

static enum ht_status end_block(struct ht_jparser *p)
{
    return ht_jparse_want(p, HT_JT_BLOCK_END, "%}");
}

/* Is the next tag {% word? */
static bool at_tag(const struct ht_jparser *p, const char *word)
{
    return p->tok->kind == HT_JT_BLOCK_BEGIN && p->tok[1].kind == HT_JT_NAME &&
           p->tok[1].n == strlen(word) && memcmp(p->tok[1].p, word, p->tok[1].n) == 0;
}
static bool take_tag(struct ht_jparser *p, const char *word)
{
    const bool yes = at_tag(p, word);
    p->tok += yes ? 2 : 0;
    return yes;
}
static enum ht_status want_tag(struct ht_jparser *p, const char *word)
{
    if (take_tag(p, word)) {
        if (p->tok->kind == HT_JT_NAME && strncmp(word, "end", 3) == 0)
            p->tok++; // {% endmacro name %}
        return end_block(p);
    }
    if (p->tok->kind == HT_JT_BLOCK_BEGIN) p->tok++;
    return ht_jparse_unexpected(p, word);
}

static enum ht_status if_statement(struct ht_jparser *p, struct ht_jnode *n)
{
    struct ht_jnode *e;
    for (;;) {
        HT_TRY(ht_jparse_tuple(p, &e));
        HT_TRY(end_block(p));
        HT_TRY(ht_jparse_add(p, n, e));
        HT_TRY(body(p, &e));
        HT_TRY(ht_jparse_add(p, n, e));
        if (take_tag(p, "elif")) continue;
        if (take_tag(p, "else")) {
            HT_TRY(end_block(p));
            HT_TRY(body(p, &n->c));
        }
        return want_tag(p, "endif");
    }
}

static enum ht_status for_statement(struct ht_jparser *p, struct ht_jnode *n)
{
    HT_TRY(ht_jparse_target(p, &n->a, false));
    if (!ht_jparse_take_word(p, "in")) return ht_jparse_unexpected(p, "in");
    HT_TRY(ht_jparse_logic(p, &n->b, HT_JN_OR));
    if (ht_jparse_is_op(p, ',')) return HT_JPARSE_FAIL(p, "'for' over a list without brackets");
    if (ht_jparse_take_word(p, "if")) HT_TRY(ht_jparse_expression(p, &n->d));
    if (ht_jparse_is_word(p, "recursive"))
        return HT_JPARSE_FAIL(p, "'for .. recursive' is not supported");
    HT_TRY(end_block(p));
    p->loops++;
    HT_TRY(body(p, &n->c));
    p->loops--;
    if (take_tag(p, "else")) {
        HT_TRY(end_block(p));
        HT_TRY(body(p, &n->e));
    }
    return want_tag(p, "endfor");
}

static enum ht_status set_statement(struct ht_jparser *p, struct ht_jnode *n)
{
    HT_TRY(ht_jparse_target(p, &n->a, true));
    if (ht_jparse_take_op(p, '=')) {
        HT_TRY(ht_jparse_tuple(p, &n->b));
        return end_block(p);
    }
    n->kind = HT_JN_SET_BLOCK;
    if (ht_jparse_is_op(p, '|')) {
        HT_TRY(ht_jparse_node(p, &n->c, HT_JN_HOLE));
        while (ht_jparse_take_op(p, '|')) HT_TRY(ht_jparse_one_filter(p, &n->c));
    }
    HT_TRY(end_block(p));
    HT_TRY(body(p, &n->b));
    return want_tag(p, "endset");
}

/* "(a, b=1)" and the body, up to end. */
static enum ht_status macro_rest(struct ht_jparser *p, struct ht_jnode *n, const char *end)
{
    struct ht_jnode *e;
    HT_TRY(ht_jparse_node(p, &n->b, HT_JN_LIST));
    if (ht_jparse_take_op(p, '(')) {
        while (!ht_jparse_is_op(p, ')')) {
            HT_TRY(ht_jparse_node(p, &e, HT_JN_NAME));
            HT_TRY(ht_jparse_name(p, &e->name));
            HT_TRY(ht_jparse_add(p, n, e));
            if (n->n > 64) return HT_JPARSE_FAIL(p, "more than 64 parameters");
            if (ht_jparse_take_op(p, '=')) {
                HT_TRY(ht_jparse_expression(p, &e));
                HT_TRY(ht_jparse_add(p, n->b, e));
            } else if (n->b->n) {
                return HT_JPARSE_FAIL(p,
                                      "a parameter without default behind one that has a default");
            }
            if (!ht_jparse_take_op(p, ',')) break;
        }
        HT_TRY(ht_jparse_want_op(p, ')'));
    }
    if (strcmp(end, "endcall") == 0) return HT_OK;
    HT_TRY(end_block(p));
    const int loops = p->loops;
    p->loops = 0;
    HT_TRY(body(p, &n->c));
    p->loops = loops;
    return want_tag(p, end);
}

static enum ht_status call_statement(struct ht_jparser *p, struct ht_jnode *n)
{
    HT_TRY(ht_jparse_node(p, &n->b, HT_JN_MACRO));
    HT_TRY(ht_jparse_string(p, &n->b->name, "caller", 6));
    HT_TRY(macro_rest(p, n->b, "endcall"));
    HT_TRY(ht_jparse_expression(p, &n->a));
    if (n->a->kind != HT_JN_CALL) return HT_JPARSE_FAIL(p, "{% call %} needs a call");
    HT_TRY(end_block(p));
    const int loops = p->loops;
    p->loops = 0;
    HT_TRY(body(p, &n->b->c));
    p->loops = loops;
    return want_tag(p, "endcall");
}

static enum ht_status with_statement(struct ht_jparser *p, struct ht_jnode *n)
{
    struct ht_jnode *e;
    while (p->tok->kind != HT_JT_BLOCK_END) {
        HT_TRY(ht_jparse_target(p, &e, false));
        HT_TRY(ht_jparse_add(p, n, e));
        HT_TRY(ht_jparse_want_op(p, '='));
        HT_TRY(ht_jparse_expression(p, &e));
        HT_TRY(ht_jparse_add(p, n, e));
        if (!ht_jparse_take_op(p, ',')) break;
    }
    HT_TRY(end_block(p));
    HT_TRY(body(p, &n->c));
    return want_tag(p, "endwith");
}

/* One tag, behind {%. */
static enum ht_status statement(struct ht_jparser *p, struct ht_jnode **out)
{
    HT_TRY(ht_jparse_node(p, out, HT_JN_IF));
    struct ht_jnode *n = *out;
    if (ht_jparse_take_word(p, "if")) return if_statement(p, n);
    if (ht_jparse_take_word(p, "for")) {
        n->kind = HT_JN_FOR;
        return for_statement(p, n);
    }
    if (ht_jparse_take_word(p, "set")) {
        n->kind = HT_JN_SET;
        return set_statement(p, n);
    }
    if (ht_jparse_take_word(p, "macro")) {
        n->kind = HT_JN_MACRO;
        HT_TRY(ht_jparse_name(p, &n->name));
        return macro_rest(p, n, "endmacro");
    }
    if (ht_jparse_take_word(p, "call")) {
        n->kind = HT_JN_CALL_BLOCK;
        return call_statement(p, n);
    }
    if (ht_jparse_take_word(p, "with")) {
        n->kind = HT_JN_WITH;
        return with_statement(p, n);
    }
    if (ht_jparse_take_word(p, "filter")) {
        n->kind = HT_JN_FILTER_BLOCK;
        HT_TRY(ht_jparse_node(p, &n->a, HT_JN_HOLE));
        do HT_TRY(ht_jparse_one_filter(p, &n->a));
        while (ht_jparse_take_op(p, '|'));
        HT_TRY(end_block(p));
        HT_TRY(body(p, &n->b));
        return want_tag(p, "endfilter");
    }
    if (ht_jparse_take_word(p, "generation")) {
        n->kind = HT_JN_GENERATION;
        HT_TRY(end_block(p));
        HT_TRY(body(p, &n->b));
        return want_tag(p, "endgeneration");
    }
    if (ht_jparse_is_word(p, "break") || ht_jparse_is_word(p, "continue")) {
        if (p->loops == 0) return HT_JPARSE_FAIL(p, "{% break %} or {% continue %} outside a loop");
        n->kind = ht_jparse_is_word(p, "break") ? HT_JN_BREAK : HT_JN_CONTINUE;
        p->tok++;
        return end_block(p);
    }
    if (p->tok->kind != HT_JT_NAME) return ht_jparse_unexpected(p, "a statement");
    return ht_jparse_fail(p, "unknown or misplaced tag", p->tok->p, p->tok->n);
}

static bool ends_body(const struct ht_jparser *p)
{
    static const char *const ends[] = { "else", "elif" };
    if (p->tok->kind == HT_JT_END) return true;
    if (p->tok->kind != HT_JT_BLOCK_BEGIN || p->tok[1].kind != HT_JT_NAME) return false;
    if (p->tok[1].n > 3 && memcmp(p->tok[1].p, "end", 3) == 0) return true;
    return at_tag(p, ends[0]) || at_tag(p, ends[1]);
}

static enum ht_status body(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *n, *e;
    if (++p->depth > HT_JINJA_MAX_DEPTH) return HT_JPARSE_FAIL(p, "blocks nested too deep");
    HT_TRY(ht_jparse_node(p, out, HT_JN_BODY));
    while (!ends_body(p)) {
        if (p->tok->kind == HT_JT_TEXT) {
            HT_TRY(ht_jparse_node(p, &n, HT_JN_TEXT));
            n->value.kind = HT_JV_STRING;
            HT_TRY(ht_jparse_string(p, &n->value.s, p->tok->p, p->tok->n));
            p->tok++;
        } else if (p->tok->kind == HT_JT_OUTPUT_BEGIN) {
            p->tok++;
            HT_TRY(ht_jparse_tuple(p, &e));
            HT_TRY(ht_jparse_wrap(p, &n, HT_JN_OUTPUT, e));
            HT_TRY(ht_jparse_want(p, HT_JT_OUTPUT_END, "}}"));
        } else {
            p->tok++;
            HT_TRY(statement(p, &n));
        }
        n->height = 0; // blocks are bounded by p->depth
        HT_TRY(ht_jparse_add(p, *out, n));
    }
    (*out)->height = 0;
    p->depth--;
    return HT_OK;
}

enum ht_status ht_jinja_parse(struct ht_jinja **out, const char *text, size_t n_bytes,
                              const char *name_)
{
    enum ht_status st = HT_OK;
    struct ht_jtoken *tokens = NULL;
    struct ht_jinja *t = calloc(1, sizeof *t);
    char *copy;
    size_t n = 0;

    *out = NULL;
    if (t) t->name = strdup(name_);
    if (!t || !t->name) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a template", name_);
        goto done;
    }
    if (n_bytes > HT_JINJA_MAX_BYTES) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: %zu bytes; a template has at most %d", name_, n_bytes,
                     HT_JINJA_MAX_BYTES);
        goto done;
    }
    t->arena.limit = HT_JINJA_MAX_MEMORY;
    copy = ht_jarena_take(&t->arena, n_bytes + 1);
    if (!copy) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", name_, n_bytes);
        goto done;
    }
    json_t *utf8 = json_stringn(text, n_bytes); // NULL unless valid UTF-8
    if (!utf8 || memchr(text, '\0', n_bytes)) {
        json_decref(utf8);
        st = HT_FAIL(HT_ERR_FORMAT, "%s: not UTF-8 text", name_);
        goto done;
    }
    json_decref(utf8);
    for (size_t i = 0; i < n_bytes; i++) { // line ends as Jinja makes them
        if (text[i] == '\r') {
            copy[n++] = '\n';
            if (i + 1 < n_bytes && text[i + 1] == '\n') i++;
        } else {
            copy[n++] = text[i];
        }
    }
    if (n > 0 && copy[n - 1] == '\n') n--; // keep_trailing_newline is off
    HT_TRY_GOTO(st, done, ht_jinja_tokens(&tokens, &t->arena, copy, n, t->name));
    struct ht_jparser p = { .t = t, .tok = tokens };
    HT_TRY_GOTO(st, done, body(&p, &t->body));
    if (p.tok->kind != HT_JT_END) {
        p.tok++;
        st = ht_jparse_fail(&p, "a tag that closes nothing:", p.tok->p, p.tok->n);
        goto done;
    }
    *out = t;
    t = NULL;
done:
    ht_jinja_free(t);
    return st;
}

void ht_jinja_free(struct ht_jinja *t)
{
    if (!t) return;
    ht_jarena_free(&t->arena);
    free(t->name);
    free(t);
}
