/* data/text_source.c: walking folders, cutting files into documents. */
#include "data/text_source.h"

#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "data/text_stream.h"

struct file {
    char *path;
    uint64_t bytes;
};

struct ht_text_source {
    struct ht_text_options o;
    struct file *files;
    size_t n_files, capacity, current;
    uint64_t total_bytes, done_bytes; // done: of finished files
    struct ht_text_stream *stream;    // of the current file
    int64_t line;
    char *text; // growing buffer of one document
    size_t room;
    json_t *json; // owner of the last JSONL document
    char place[4200];
};

static enum ht_status add_file(struct ht_text_source *s, const char *path, uint64_t bytes)
{
    if (s->n_files == s->capacity) {
        const size_t capacity = s->capacity ? 2 * s->capacity : 64;
        struct file *files = realloc(s->files, capacity * sizeof *files);
        if (!files) return HT_FAIL(HT_ERR_MEMORY, "no memory for a list of %zu files", capacity);
        s->files = files;
        s->capacity = capacity;
    }
    char *copy = strdup(path);
    if (!copy) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its name", path);
    s->files[s->n_files++] = (struct file){ copy, bytes };
    s->total_bytes += bytes;
    return HT_OK;
}

static int by_name(const FTSENT **a, const FTSENT **b)
{
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

static enum ht_status add_path(struct ht_text_source *s, const char *path)
{
    char *const roots[2] = { (char *)(uintptr_t)path, NULL };
    enum ht_status st = HT_OK;
    FTSENT *e;
    FTS *walk = fts_open(roots, FTS_COMFOLLOW | FTS_PHYSICAL | FTS_NOCHDIR, by_name);

    if (!walk) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    while (st == HT_OK && (e = fts_read(walk))) {
        const bool hidden = e->fts_level > 0 && e->fts_name[0] == '.';
        struct stat sb;
        switch (e->fts_info) {
        case FTS_D:
            if (hidden) fts_set(walk, e, FTS_SKIP);
            break;
        case FTS_F:
            if (!hidden) st = add_file(s, e->fts_path, (uint64_t)e->fts_statp->st_size);
            break;
        case FTS_SL: // a link to a file is read, a link to a folder is not followed
            if (!hidden && stat(e->fts_path, &sb) == 0 && S_ISREG(sb.st_mode))
                st = add_file(s, e->fts_path, (uint64_t)sb.st_size);
            break;
        case FTS_DNR:
        case FTS_ERR:
        case FTS_NS: st = HT_FAIL(HT_ERR_IO, "%s: %s", e->fts_path, strerror(e->fts_errno)); break;
        case FTS_DEFAULT:
            if (e->fts_level == 0) st = HT_FAIL(HT_ERR_IO, "%s: neither a file nor a folder", path);
            break;
        default: break;
        }
    }
    fts_close(walk);
    return st;
}

enum ht_status ht_text_open(struct ht_text_source **out, char *const *paths, int n_paths,
                            const struct ht_text_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_text_source *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "no memory for a text source");
    s->o = *o;
    if (!s->o.field) s->o.field = "text";
    if (!s->o.max_document_bytes) s->o.max_document_bytes = (size_t)1 << 30;
    for (int i = 0; i < n_paths; i++) HT_TRY_GOTO(st, done, add_path(s, paths[i]));
    if (s->n_files == 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: no files to read", n_paths ? paths[0] : "no input");
        goto done;
    }
    *out = s;
    s = NULL;
done:
    ht_text_close(s);
    return st;
}

void ht_text_close(struct ht_text_source *s)
{
    if (!s) return;
    ht_text_stream_close(s->stream);
    for (size_t i = 0; i < s->n_files; i++) free(s->files[i].path);
    free(s->files);
    free(s->text);
    json_decref(s->json);
    free(s);
}

/* Room for n bytes and a NUL. */
static enum ht_status make_room(struct ht_text_source *s, size_t n)
{
    if (n > s->o.max_document_bytes)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s:%lld: a document of more than %zu bytes; a text file is one document "
                       "unless every line is to be one (--lines)",
                       s->files[s->current].path, (long long)s->line, s->o.max_document_bytes);
    if (n < s->room) return HT_OK;
    const size_t room = n + n / 2 + 65536;
    char *text = realloc(s->text, room);
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for a document of %zu bytes", n);
    s->text = text;
    s->room = room;
    return HT_OK;
}

static void skip_byte_order_mark(struct ht_text_source *s, size_t *n)
{
    if (s->line > 1 || *n < 3 || memcmp(s->text, "\xEF\xBB\xBF", 3) != 0) return;
    *n -= 3;
    memmove(s->text, s->text + 3, *n + 1);
}

/* One line without its end (LF or CR LF), or the rest of the file; *ended when nothing was left. */
static enum ht_status read_piece(struct ht_text_source *s, bool whole_file, size_t *n, bool *ended)
{
    const char *data;
    size_t got;
    bool any = false;

    *n = 0;
    *ended = false;
    s->line++;
    for (;;) {
        HT_TRY(ht_text_stream_peek(s->stream, &data, &got));
        if (got == 0) break;
        any = true;
        const char *newline = whole_file ? NULL : memchr(data, '\n', got);
        const size_t take = newline ? (size_t)(newline - data) : got;
        HT_TRY(make_room(s, *n + take));
        memcpy(s->text + *n, data, take);
        *n += take;
        ht_text_stream_skip(s->stream, take + (newline != NULL));
        if (newline) break;
    }
    HT_TRY(make_room(s, *n));
    if (!whole_file && *n > 0 && s->text[*n - 1] == '\r') --*n;
    s->text[*n] = '\0';
    skip_byte_order_mark(s, n);
    *ended = !any;
    return HT_OK;
}

/* The suffix before .gz or .zst. */
static bool is_jsonl(const char *path)
{
    size_t n = strlen(path);
    if (n > 3 && strcmp(path + n - 3, ".gz") == 0) n -= 3;
    if (n > 4 && strncmp(path + n - 4, ".zst", 4) == 0) n -= 4;
    return (n > 6 && strncmp(path + n - 6, ".jsonl", 6) == 0) ||
           (n > 7 && strncmp(path + n - 7, ".ndjson", 7) == 0);
}

static enum ht_status parse_object(struct ht_text_source *s, size_t n_line, const char **text,
                                   size_t *n)
{
    const char *path = s->files[s->current].path;
    json_error_t error;

    json_decref(s->json);
    s->json = json_loadb(s->text, n_line, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    if (!s->json)
        return HT_FAIL(HT_ERR_FORMAT, "%s:%lld: column %d: %s", path, (long long)s->line,
                       error.column, error.text);
    const json_t *value = json_object_get(s->json, s->o.field);
    if (!json_is_string(value))
        return HT_FAIL(HT_ERR_FORMAT, "%s:%lld: %s \"%s\" (choose with --field)", path,
                       (long long)s->line, value ? "not a string:" : "no field", s->o.field);
    *text = json_string_value(value);
    *n = json_string_length(value);
    return HT_OK;
}

enum ht_status ht_text_next(struct ht_text_source *s, const char **text, size_t *n_bytes)
{
    *text = NULL;
    *n_bytes = 0;
    while (s->current < s->n_files) {
        const struct file *f = &s->files[s->current];
        const bool jsonl = is_jsonl(f->path), whole = !jsonl && !s->o.lines;
        bool ended;

        if (!s->stream) {
            HT_TRY(ht_text_stream_open(&s->stream, f->path));
            s->line = 0;
        }
        if (!(whole && s->line > 0)) {
            HT_TRY(read_piece(s, whole, n_bytes, &ended));
            // an empty text file is an empty document; empty lines are none
            const bool skip = whole ? false : *n_bytes == 0;
            if (!ended && skip) continue;
            if (!ended || (whole && s->line == 1)) {
                *text = s->text;
                return jsonl ? parse_object(s, *n_bytes, text, n_bytes) : HT_OK;
            }
        }
        ht_text_stream_close(s->stream);
        s->stream = NULL;
        s->done_bytes += f->bytes;
        s->current++;
    }
    return HT_OK;
}

const char *ht_text_place(struct ht_text_source *s)
{
    if (s->current >= s->n_files) return "end of input";
    snprintf(s->place, sizeof s->place, "%s:%lld", s->files[s->current].path, (long long)s->line);
    return s->place;
}

void ht_text_progress(const struct ht_text_source *s, uint64_t *done, uint64_t *total)
{
    *done = s->done_bytes + (s->stream ? ht_text_stream_read_bytes(s->stream) : 0);
    *total = s->total_bytes;
}
