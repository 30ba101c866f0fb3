/* inference/draft.h: guesses at the next tokens of a sequence from its own tokens (n-gram lookup;
 * Saxena 2023, Yang et al. 2023), and how many of them are worth a try.
 *
 * The tokens that followed the most recent of the longest earlier occurrences of the sequence's end
 * (2 to 8 tokens) are the guess. What was accepted sets the length of the next guess; where little
 * is, guessing stops for a while, twice as long each time.
 */
#ifndef HT_INFERENCE_DRAFT_H
#define HT_INFERENCE_DRAFT_H

#include <stdint.h>

enum { HT_DRAFT_MOST = 8 };

struct ht_draft { // of one sequence
    float rate;   // of guesses that were right, recent ones weigh more
    int64_t length, pause, next_pause;
};

void ht_draft_init(struct ht_draft *d);

/* Guesses at what follows ids[0 .. n), at most `most` of them and HT_DRAFT_MOST; returns how many.
 */
int64_t ht_draft_guess(struct ht_draft *d, const int32_t *ids, int64_t n, int64_t most,
                       int32_t out[HT_DRAFT_MOST]);

/* Of n_guessed guesses, n_right were right. */
void ht_draft_learn(struct ht_draft *d, int64_t n_guessed, int64_t n_right);

#endif
