/* core/base/seqs.h: how a flat row of tokens is divided into sequences.
 *
 * A micro-batch is n_tokens flat rows; sequence s covers rows starts[s] .. starts[s+1]-1.
 * Convolution, scan and attention never look across a border; positions restart at 0. Documents of
 * a packed row are sequences of their own (spec 3.9, 4.5); with pack_leak each whole row is one
 * sequence.
 */
#ifndef HT_BASE_SEQS_H
#define HT_BASE_SEQS_H

#include <stdint.h>

struct ht_seqs {
    int64_t n_seqs; // at least 1
    const int32_t
        *starts; // (n_seqs + 1), starts[0] = 0, strictly increasing, starts[n_seqs] = n_tokens
};

#endif
