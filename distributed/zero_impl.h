/* distributed/zero_impl.h: what the zero*.c files share. */
#ifndef HT_DISTRIBUTED_ZERO_IMPL_H
#define HT_DISTRIBUTED_ZERO_IMPL_H

#include "distributed/zero.h"

enum {
    HT_ZERO_ALIGN = 64, // elements; every part starts on a cache line in each dtype
    HT_ZERO_SLOTS = 4,  // reductions under way; more would only hold memory
    HT_ZERO_PLACES = 3, // of units: the one in use, the next or last one, the first where kept
};

struct ht_zero_bucket {
    int64_t start, end;  // flat offsets; end may pass region_end
    int64_t region_end;  // of real elements
    int64_t shard_start; // of a rank's part in its shard
    int region;
    bool summed;                 // a micro-batch of this step is in the shard already
    struct ht_comm_request *req; // all-gather under way
};

/* Regions [cuts[r], cuts[r+1]) are cut into buckets one by one; the last region is the vectors'. */
struct ht_zero_cut {
    int n_regions, n_buckets, n_matrix_buckets;
    struct ht_zero_bucket *buckets; // ascending
    int *first;                     // (n_regions + 1) first bucket of each region
    int64_t shard_size;
};

struct ht_zero_slot { // a reduction under way
    struct ht_comm_request *req;
    void *staging;
    float *part; // stages 2 and 3: sums that are added to the shard
    bool add;
    int bucket;
};

struct ht_zero_place { // of a unit's weights or gradient
    void *data;
    int64_t room; // elements
    int unit;     // -1: none
    int64_t used; // when, in calls
    bool in_use;
    bool gathering; // weights: requests under way
};

struct ht_zero {
    struct ht_comm *comm;
    struct ht_backend *be;
    int rank, n_ranks, stage;
    int64_t n_matrix, n_total;
    enum ht_dtype wire, weight_dtype;
    bool keep_first;
    struct ht_zero_cut cut;
    int n_slices;
    struct ht_zero_slice *slices;
    struct ht_zero_slice whole; // the only slice of stage 0

    int n_slots;
    struct ht_zero_slot slots[HT_ZERO_SLOTS];
    int64_t next_slot, clock;
    float *tail[2];         // zero-padded copies of the last bucket of m and of v
    void *weight_tail;      // stage 2: the same of the weights of a unit
    int weight_tail_bucket; // which is in it, -1: none
    float *shard_grad;      // (shard_size); NULL where the gradient buffer serves
    void *shard_weight;
    struct ht_zero_place weights[HT_ZERO_PLACES], grads[HT_ZERO_PLACES];
    struct ht_zero_bytes bytes;

    float *grad;   // of the round under way
    int n_started; // buckets, in starting order; stages 0 and 1
};

/* zero_plan.c: buckets and slices, functions of sizes alone. */
enum ht_status ht_zero_cut_create(struct ht_zero_cut *out, const int64_t *cuts, int n_regions,
                                  int64_t bucket_bytes, int n_ranks);
void ht_zero_cut_free(struct ht_zero_cut *c);
enum ht_status ht_zero_check_sizes(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes,
                                   int n_ranks);
enum ht_status ht_zero_cut_slices(struct ht_zero_slice **out, int *n_out,
                                  const struct ht_zero_cut *c, int n_ranks, int rank);

/* zero.c: zeroed memory of the backend, counted in *count. */
enum ht_status ht_zero_buffer(struct ht_zero *z, void *out, const char *what, size_t n_bytes,
                              size_t *count);

/* Start the reduction of one bucket whose local gradient stands at in; finish that of a slot. */
enum ht_status ht_zero_bucket_start(struct ht_zero *z, int index, float *in);
enum ht_status ht_zero_slot_finish(struct ht_zero *z, struct ht_zero_slot *s);

/* zero_units.c: places of units. */
enum ht_status ht_zero_create_places(struct ht_zero *z);
enum ht_status ht_zero_finish_region(struct ht_zero *z, int region); // its reductions
enum ht_status ht_zero_forget_weights(struct ht_zero *z);

static inline bool ht_zero_by_unit(const struct ht_zero *z)
{
    return z->stage >= 2;
}

#endif
