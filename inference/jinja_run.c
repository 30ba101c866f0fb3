/* inference/jinja_run.c: rendering. Every statement is a step; scopes are Jinja's: for, macro and
 * with make one, if does not, and what set assigns inside a loop ends with the turn. */
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_run.h"

enum flow { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE };

static const struct ht_jv undefined;

static enum ht_status run(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *body,
                          enum flow *flow);

static bool same_name(const struct ht_jstring *a, const struct ht_jstring *b)
{
    return a->n == b->n && memcmp(a->p, b->p, a->n) == 0;
}

static struct ht_jv *own_variable(struct ht_jscope *s, const struct ht_jstring *name)
{
    for (size_t i = 0; i < s->n; i++)
        if (same_name(s->vars[i].name, name)) return &s->vars[i].value;
    return NULL;
}

static enum ht_status assign(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jstring *name,
                             struct ht_jv v)
{
    struct ht_jv *there = own_variable(s, name);
    HT_TRY(ht_jinja_charge(r, s->n / 16));
    if (there) {
        *there = v;
        return HT_OK;
    }
    if (s->n == s->capacity) {
        const size_t capacity = s->capacity ? 2 * s->capacity : 4;
        struct ht_jvar *grown;
        HT_TRY(ht_jinja_take(r, &grown, capacity * sizeof *grown));
        if (s->n) memcpy(grown, s->vars, s->n * sizeof *grown);
        s->vars = grown;
        s->capacity = capacity;
    }
    s->vars[s->n++] = (struct ht_jvar){ name, v };
    return HT_OK;
}

enum ht_status ht_jrun_look_up(struct ht_jrun *r, struct ht_jscope *s,
                               const struct ht_jstring *name, struct ht_jv *out)
{
    for (; s; s = s->parent) {
        const struct ht_jv *v = own_variable(s, name);
        HT_TRY(ht_jinja_charge(r, 1 + s->n / 16));
        if (v) {
            *out = *v;
            return HT_OK;
        }
    }
    const int id = ht_jinja_global_id(name);
    *out = undefined;
    if (id < 0) return HT_OK;
    struct ht_jfunction *f;
    HT_TRY(ht_jinja_take(r, &f, sizeof *f));
    *f = (struct ht_jfunction){ .kind = HT_JF_GLOBAL, .id = id };
    *out = (struct ht_jv){ .kind = HT_JV_FUNCTION, .function = f };
    return HT_OK;
}

static enum ht_status new_scope(struct ht_jrun *r, struct ht_jscope *parent, struct ht_jscope **out)
{
    HT_TRY(ht_jinja_take(r, out, sizeof **out));
    (*out)->parent = parent;
    return HT_OK;
}

/* Run a body into a text of its own. */
static enum ht_status capture(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *body,
                              struct ht_jv *out)
{
    struct ht_jbuffer text = { 0 }, *const outer = r->out;
    enum flow flow;
    r->out = &text;
    HT_TRY(run(r, s, body, &flow));
    r->out = outer;
    return ht_jbuffer_string(r, &text, out);
}

static enum ht_status call_macro(struct ht_jrun *r, const struct ht_jfunction *f,
                                 const struct ht_jargs *a, struct ht_jv *out)
{
    static const struct ht_jstring caller = { "caller", 6, NULL, false };
    const struct ht_jnode *m = f->node;
    const size_t first_default = m->n - m->b->n;
    struct ht_jscope *s;
    size_t used = 0;

    HT_TRY(new_scope(r, f->scope, &s));
    if (a->n > m->n)
        return HT_JFAIL(r, "macro '%.*s' takes %zu arguments", (int)m->name->n, m->name->p, m->n);
    if (f->caller.kind == HT_JV_FUNCTION) HT_TRY(assign(r, s, &caller, f->caller));
    for (size_t i = 0; i < m->n; i++) {
        struct ht_jv v = undefined;
        bool given = i < a->n;
        if (given) v = a->positional[i];
        for (size_t k = 0; !given && k < a->n_named; k++) {
            if (!same_name(a->names[k], m->items[i]->name)) continue;
            given = true;
            v = a->named[k];
            used++;
        }
        if (!given && i >= first_default)
            HT_TRY(ht_jrun_eval(r, s, m->b->items[i - first_default], &v));
        HT_TRY(assign(r, s, m->items[i]->name, v));
    }
    if (used < a->n_named)
        return HT_JFAIL(r, "macro '%.*s': an argument of unknown name", (int)m->name->n,
                        m->name->p);
    return capture(r, s, m->c, out);
}

enum ht_status ht_jinja_call(struct ht_jrun *r, struct ht_jv f, const struct ht_jargs *a,
                             struct ht_jv *out)
{
    if (f.kind != HT_JV_FUNCTION) return HT_JFAIL(r, "%s cannot be called", ht_jv_kind_name(f));
    switch (f.function->kind) {
    case HT_JF_GLOBAL: return ht_jinja_global(r, f.function->id, a, out);
    case HT_JF_METHOD: return ht_jinja_method(r, f.function->id, f.function->self, a, out);
    case HT_JF_MACRO: break;
    }
    return call_macro(r, f.function, a, out);
}

static enum ht_status assign_to(struct ht_jrun *r, struct ht_jscope *s,
                                const struct ht_jnode *target, struct ht_jv v)
{
    struct ht_jlist *l;
    struct ht_jv space, key;
    if (target->kind == HT_JN_NAME) return assign(r, s, target->name, v);
    if (target->kind == HT_JN_ATTRIBUTE) {
        HT_TRY(ht_jrun_look_up(r, s, target->a->name, &space));
        if (space.kind != HT_JV_NAMESPACE)
            return HT_JFAIL(r, "only a namespace's attributes can be set");
        key = (struct ht_jv){ .kind = HT_JV_STRING, .s = target->name };
        return ht_jdict_set(r, space.dict, key, v);
    }
    HT_TRY(ht_jv_iterate(r, v, &l));
    if (l->n != target->n) return HT_JFAIL(r, "%zu values for %zu names", l->n, target->n);
    for (size_t i = 0; i < l->n; i++) HT_TRY(assign_to(r, s, target->items[i], l->items[i]));
    return HT_OK;
}

static enum ht_status run_for(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                              enum flow *flow)
{
    static const struct ht_jstring loop_name = { "loop", 4, NULL, false };
    struct ht_jlist *l;
    struct ht_jscope *inner;
    struct ht_jloop *loop;
    struct ht_jv v, kept;

    HT_TRY(ht_jrun_eval(r, s, n->b, &v));
    HT_TRY(ht_jv_iterate(r, v, &l));
    if (n->d) { // for .. if: the loop counts only what passes
        HT_TRY(ht_jv_list(r, &kept, 0, false));
        for (size_t i = 0; i < l->n; i++) {
            HT_TRY(new_scope(r, s, &inner));
            HT_TRY(assign_to(r, inner, n->a, l->items[i]));
            HT_TRY(ht_jrun_eval(r, inner, n->d, &v));
            if (ht_jv_truth(v)) HT_TRY(ht_jlist_add(r, kept.list, l->items[i]));
        }
        l = kept.list;
    }
    if (l->n == 0) return n->e ? run(r, s, n->e, flow) : HT_OK;
    HT_TRY(ht_jinja_take(r, &loop, sizeof *loop));
    *loop = (struct ht_jloop){ .items = l };
    for (size_t i = 0; i < l->n; i++) {
        enum flow inside = FLOW_ON;
        HT_TRY(ht_jinja_charge(r, 1));
        loop->index = i;
        HT_TRY(new_scope(r, s, &inner));
        HT_TRY(assign(r, inner, &loop_name, (struct ht_jv){ .kind = HT_JV_LOOP, .loop = loop }));
        HT_TRY(assign_to(r, inner, n->a, l->items[i]));
        HT_TRY(run(r, inner, n->c, &inside));
        if (inside == FLOW_BREAK) break;
    }
    return HT_OK;
}

static enum ht_status run_generation(struct ht_jrun *r, struct ht_jscope *s,
                                     const struct ht_jnode *n)
{
    struct ht_jv text;
    HT_TRY(capture(r, s, n->b, &text));
    if (r->n_generations == r->capacity_generations) {
        const size_t capacity = r->capacity_generations ? 2 * r->capacity_generations : 8;
        struct ht_jinja_span *grown;
        HT_TRY(ht_jinja_take(r, &grown, capacity * sizeof *grown));
        if (r->n_generations) memcpy(grown, r->generations, r->n_generations * sizeof *grown);
        r->generations = grown;
        r->capacity_generations = capacity;
    }
    r->generations[r->n_generations++] = (struct ht_jinja_span){ r->out->n, r->out->n + text.s->n };
    return ht_jbuffer_add_string(r, r->out, text.s);
}

static enum ht_status make_macro(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                 struct ht_jv *out)
{
    struct ht_jfunction *f;
    HT_TRY(ht_jinja_take(r, &f, sizeof *f));
    *f = (struct ht_jfunction){ .kind = HT_JF_MACRO, .node = n, .scope = s };
    *out = (struct ht_jv){ .kind = HT_JV_FUNCTION, .function = f };
    return HT_OK;
}

static enum ht_status run_call(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n)
{
    struct ht_jv f, caller;
    struct ht_jargs a;
    HT_TRY(ht_jrun_eval(r, s, n->a->a, &f));
    if (f.kind != HT_JV_FUNCTION || f.function->kind != HT_JF_MACRO)
        return HT_JFAIL(r, "{%% call %%} needs a macro");
    HT_TRY(ht_jrun_arguments(r, s, n->a, &a));
    HT_TRY(make_macro(r, s, n->b, &caller));
    struct ht_jfunction with = *f.function;
    with.caller = caller;
    HT_TRY(call_macro(r, &with, &a, &f));
    return ht_jbuffer_add_string(r, r->out, f.s);
}

/* The text of a body through a chain of filters; chain NULL: as it is. */
static enum ht_status filtered(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *chain,
                               const struct ht_jnode *body, struct ht_jv *out)
{
    struct ht_jscope *inner;
    const struct ht_jv outer = r->hole;
    HT_TRY(new_scope(r, s, &inner));
    HT_TRY(capture(r, inner, body, out));
    if (!chain) return HT_OK;
    r->hole = *out;
    HT_TRY(ht_jrun_eval(r, s, chain, out));
    r->hole = outer;
    return HT_OK;
}

static enum ht_status run_if(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                             enum flow *flow)
{
    struct ht_jv v;
    for (size_t i = 0; i < n->n; i += 2) {
        HT_TRY(ht_jrun_eval(r, s, n->items[i], &v));
        if (ht_jv_truth(v)) return run(r, s, n->items[i + 1], flow);
    }
    return n->c ? run(r, s, n->c, flow) : HT_OK;
}

static enum ht_status run_one(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                              enum flow *flow)
{
    struct ht_jscope *inner;
    struct ht_jv v;

    switch (n->kind) {
    case HT_JN_TEXT: return ht_jbuffer_add_string(r, r->out, n->value.s);
    case HT_JN_OUTPUT: HT_TRY(ht_jrun_eval(r, s, n->a, &v)); return ht_jbuffer_print(r, r->out, v);
    case HT_JN_IF: return run_if(r, s, n, flow);
    case HT_JN_FOR: return run_for(r, s, n, flow);
    case HT_JN_SET: HT_TRY(ht_jrun_eval(r, s, n->b, &v)); return assign_to(r, s, n->a, v);
    case HT_JN_SET_BLOCK: HT_TRY(filtered(r, s, n->c, n->b, &v)); return assign_to(r, s, n->a, v);
    case HT_JN_MACRO: HT_TRY(make_macro(r, s, n, &v)); return assign(r, s, n->name, v);
    case HT_JN_CALL_BLOCK: return run_call(r, s, n);
    case HT_JN_FILTER_BLOCK:
        HT_TRY(filtered(r, s, n->a, n->b, &v));
        return ht_jbuffer_print(r, r->out, v);
    case HT_JN_WITH:
        HT_TRY(new_scope(r, s, &inner));
        for (size_t i = 0; i < n->n; i += 2) {
            HT_TRY(ht_jrun_eval(r, s, n->items[i + 1], &v));
            HT_TRY(assign_to(r, inner, n->items[i], v));
        }
        return run(r, inner, n->c, flow);
    case HT_JN_GENERATION: return run_generation(r, s, n);
    case HT_JN_BREAK: *flow = FLOW_BREAK; return HT_OK;
    case HT_JN_CONTINUE: *flow = FLOW_CONTINUE; return HT_OK;
    default: return HT_JFAIL(r, "an expression where a statement is needed");
    }
}

static enum ht_status run(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *body,
                          enum flow *flow)
{
    *flow = FLOW_ON;
    HT_TRY(ht_jinja_enter(r));
    for (size_t i = 0; i < body->n && *flow == FLOW_ON; i++) {
        HT_TRY(ht_jinja_charge(r, 1));
        r->line = body->items[i]->line;
        HT_TRY(run_one(r, s, body->items[i], flow));
    }
    r->depth--;
    return HT_OK;
}

static enum ht_status copy_out(struct ht_jrun *r, const struct ht_jbuffer *text,
                               struct ht_jinja_output *out)
{
    out->text = malloc(text->n + 1);
    out->user = malloc(text->n + 1);
    out->generations = malloc((r->n_generations + 1) * sizeof *out->generations);
    if (!out->text || !out->user || !out->generations)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes", text->n);
    if (text->n) memcpy(out->text, text->p, text->n);
    if (text->n) memcpy(out->user, text->mask, text->n);
    if (r->n_generations)
        memcpy(out->generations, r->generations, r->n_generations * sizeof *out->generations);
    out->text[text->n] = '\0';
    out->n_bytes = text->n;
    out->n_generations = r->n_generations;
    return HT_OK;
}

enum ht_status ht_jinja_render(const struct ht_jinja *t, const struct ht_jinja_var *vars,
                               size_t n_vars, time_t now, struct ht_jinja_output *out)
{
    struct ht_jbuffer text = { 0 };
    struct ht_jrun r = { .name = t->name,
                         .line = 1,
                         .arena = { .limit = HT_JINJA_MAX_MEMORY },
                         .out = &text,
                         .now = now };
    enum ht_status st = HT_OK;
    struct ht_jscope *globals;
    enum flow flow;

    *out = (struct ht_jinja_output){ 0 };
    HT_TRY_GOTO(st, done, new_scope(&r, NULL, &globals));
    for (size_t i = 0; i < n_vars; i++) {
        struct ht_jv name, v;
        if (!vars[i].value) continue;
        HT_TRY_GOTO(st, done, ht_jv_literal(&r, &name, vars[i].name, strlen(vars[i].name)));
        HT_TRY_GOTO(st, done, ht_jv_from_json(&r, &v, vars[i].value, &vars[i], vars[i].user));
        HT_TRY_GOTO(st, done, assign(&r, globals, name.s, v));
    }
    HT_TRY_GOTO(st, done, run(&r, globals, t->body, &flow));
    HT_TRY_GOTO(st, done, copy_out(&r, &text, out));
done:
    if (st != HT_OK) ht_jinja_output_free(out);
    ht_jarena_free(&r.arena);
    return st;
}

void ht_jinja_output_free(struct ht_jinja_output *out)
{
    free(out->text);
    free(out->user);
    free(out->generations);
    *out = (struct ht_jinja_output){ 0 };
}
