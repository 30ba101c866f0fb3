/* inference/draft.c: n-gram lookup. */
#include "inference/draft.h"

enum {
    SHORTEST = 2,
    LONGEST = 8,
    WINDOW = 16384, // tokens that are looked through: 10 microseconds
    FIRST_PAUSE = 32,
    LAST_PAUSE = 1024
};

/* Below this share of right guesses a pass with guesses may cost more than it saves: with a model
 * of 8.6 million parameters, which is bound by arithmetic, 56% and less gained nothing and 72%
 * gained a fifth (bench_speculate). Where weights come from memory, less is enough. */
#define WORTH_IT 0.4f

void ht_draft_init(struct ht_draft *d)
{
    *d = (struct ht_draft){ .rate = 0.5f, .length = 4, .next_pause = FIRST_PAUSE };
}

/* How many tokens before and with ids[i] equal those before and with ids[j]. */
static int64_t match_length(const int32_t *ids, int64_t i, int64_t j)
{
    int64_t n = 0;

    while (n < LONGEST && n <= i && ids[i - n] == ids[j - n]) n++;
    return n;
}

int64_t ht_draft_guess(struct ht_draft *d, const int32_t *ids, int64_t n, int64_t most,
                       int32_t out[HT_DRAFT_MOST])
{
    const int64_t first = n > WINDOW ? n - WINDOW : 0;
    int64_t best = SHORTEST - 1, after = -1;

    if (d->pause > 0) {
        d->pause--;
        return 0;
    }
    if (most > d->length) most = d->length;
    for (int64_t i = n - 2; i >= first && best < LONGEST && most > 0; i--) {
        if (ids[i] != ids[n - 1]) continue;
        const int64_t length = match_length(ids, i, n - 1);
        if (length > best) {
            best = length;
            after = i + 1;
        }
    }
    if (after < 0) return 0;
    // past the sequence's end the guess repeats itself
    for (int64_t t = 0; t < most; t++) out[t] = after + t < n ? ids[after + t] : out[after + t - n];
    return most;
}

void ht_draft_learn(struct ht_draft *d, int64_t n_guessed, int64_t n_right)
{
    if (n_guessed == 0) return;
    d->rate += 0.3f * ((float)n_right / (float)n_guessed - d->rate);
    d->length = n_right + 2 < HT_DRAFT_MOST ? n_right + 2 : HT_DRAFT_MOST;
    if (d->rate >= WORTH_IT) {
        if (n_right == n_guessed) d->next_pause = FIRST_PAUSE;
        return;
    }
    d->pause = d->next_pause;
    d->next_pause = 2 * d->next_pause < LAST_PAUSE ? 2 * d->next_pause : LAST_PAUSE;
    d->rate = 0.3f; // after the pause it has to show itself soon
}
