/* inference/chat_template.h: a conversation -> the text and the tokens a model was trained to see
 * [11].
 *
 * The template is the model folder's: chat_template.jinja, else `chat_template` of
 * tokenizer_config.json (a string, or a list of {name, template}, of which "default" is taken, or
 * "tool_use" when there are tools), rendered as transformers' apply_chat_template does
 * (inference/jinja.h).
 *
 * What a client typed stays text: rendering marks every byte that came from a message, a tool or a
 * document, and ht_chat_encode finds no special token that touches a marked byte. "<|im_end|>"
 * inside a message is encoded as the characters it consists of, while the template's own <|im_end|>
 * is one token; all other text gets the ids that transformers gives it. A message's role is the
 * template's text (some templates write '<|' + role + '|>'), so a role may only be of letters,
 * digits, '_' and '-'.
 */
#ifndef HT_INFERENCE_CHAT_TEMPLATE_H
#define HT_INFERENCE_CHAT_TEMPLATE_H

#include <time.h>

#include <jansson.h>

#include "data/tokenizer.h"
#include "inference/jinja.h"

struct ht_chat_template;

/* Jinja text. HT_ERR_FORMAT names the line. */
enum ht_status ht_chat_template_create(struct ht_chat_template **out, const char *text,
                                       size_t n_bytes, const char *name);
void ht_chat_template_free(struct ht_chat_template *t);

/* The folder's template and, if it has one, that for tools; *out is NULL when the folder has none.
 */
enum ht_status ht_chat_template_load(struct ht_chat_template **out, const char *folder);

const char *ht_chat_template_text(const struct ht_chat_template *t); // the default one

struct ht_chat_input {
    const json_t *messages;  // array of {role, content, ..}
    const json_t *tools;     // array, or NULL
    const json_t *documents; // array, or NULL
    const json_t *extra;     // object of further variables (chat_template_kwargs), or NULL
    const char *bos, *eos;   // texts of these tokens; NULL when there are none
    bool add_generation_prompt;
    time_t now; // 0: the clock
};

/* HT_ERR_ARG: a role of other characters, or the template refuses; HT_ERR_FORMAT: the template
 * fails. */
enum ht_status ht_chat_render(const struct ht_chat_template *t, const struct ht_chat_input *in,
                              struct ht_jinja_output *out);

/* Ids of rendered text; bos is not added twice: the text holds what the template wants. */
enum ht_status ht_chat_encode(struct ht_encoder *e, const struct ht_jinja_output *text,
                              struct ht_ids *out);

#endif
