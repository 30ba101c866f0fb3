/* tests/core/config/config_case.c: recipes of published models, and a folder for recipe files. */
#include "tests/core/config/config_case.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"

const struct published published[] = {
    { "Bamba-9B",
      "arch = \"bamba\"; vocab_size = 128256; d_model = 4096; n_layers = 32; n_heads = 32;"
      "n_kv_heads = 8; attention_layers = [9, 18, 27]; ssm_heads = 128; d_state = 128; d_ff = "
      "14336;",
      9780235392, 407, 18.79e9 },
    { "Codestral Mamba 7B",
      "arch = \"mamba2\"; vocab_size = 32768; d_model = 4096; n_layers = 64; n_groups = 8;"
      "d_state = 128;",
      7285403648, 579, 0 },
    { "Mamba-2 2.7B",
      "arch = \"mamba2\"; vocab_size = 50288; d_model = 2560; n_layers = 64; d_state = 128;"
      "tied_head = true;",
      2702599680, 578, 0 },
    { "Llama-3.1-8B",
      "arch = \"llama\"; vocab_size = 128256; d_model = 4096; n_layers = 32; n_heads = 32;"
      "n_kv_heads = 8; d_ff = 14336; rope_theta = 5e5; rope_scaling = \"llama3\";",
      8030261248, 291, 16.08e9 },
};
const int n_published = sizeof published / sizeof *published;

void case_text(char *out, size_t size, const char *model)
{
    snprintf(out, size,
             "model: { %s };\n"
             "data: { seq_len = 4096; };\n"
             "train: { global_batch_tokens = 4096; steps = 100; };\n"
             "optimizer: { lr = 1e-3; };\n",
             model);
}

void case_config(struct ht_config *out, const char *model)
{
    char text[2048];

    case_text(text, sizeof text, model);
    const enum ht_status st = ht_recipe_parse(out, NULL, text, "case.cfg", 0, NULL, 1);
    ck_assert_msg(st == HT_OK, "%s", ht_error_message());
}

void case_refused(const char *text, const char *const *words)
{
    static struct ht_config c;
    struct ht_recipe *r = NULL;
    const enum ht_status st = ht_recipe_parse(&c, &r, text, "a.cfg", 0, NULL, 1);

    ck_assert_msg(st == HT_ERR_RECIPE, "status %d for\n%s\n%s", (int)st, text, ht_error_message());
    ck_assert_ptr_null(r);
    for (; *words; words++)
        ck_assert_msg(strstr(ht_error_message(), *words) != NULL, "\"%s\" is not in \"%s\"", *words,
                      ht_error_message());
}

struct folder case_folder(void)
{
    struct folder f;

    snprintf(f.path, sizeof f.path, "%s/recipes-XXXXXX", HT_BINARY_DIR);
    ck_assert_ptr_nonnull(mkdtemp(f.path));
    return f;
}

const char *case_write(char out[512], const struct folder *f, const char *name, const char *text)
{
    snprintf(out, 512, "%s/%s", f->path, name);
    char *slash = strrchr(out, '/');
    *slash = 0;
    ck_assert_int_eq(ht_file_make_dirs(out), HT_OK);
    *slash = '/';
    ck_assert_int_eq(ht_file_publish(out, text, strlen(text)), HT_OK);
    return out;
}

void case_remove(const struct folder *f)
{
    ck_assert_int_eq(ht_file_remove_tree(f->path), HT_OK);
}
