/* checkpoints/manifest.h: what a checkpoint folder must contain, byte for byte.
 *
 * A JSON file with its own hash as the last field; the hash covers every byte before that field,
 * and what follows it is fixed, so no single bit can change unnoticed. While a save is under way
 * each rank leaves a manifest of its own file (kind "part"), which rank 0 merges; the finished one
 * has kind "checkpoint".
 *
 *   "files":   [name, bytes, XXH3-128]
 *   "tensors": [name, [shape]]
 *   "pieces":  [array, tensor, first element in the tensor, elements, file, byte offset, XXH3-128]
 *              array 0 master, 1 exp_avg, 2 exp_avg_sq; tensor and file count in the lists above
 *
 * The text is untrusted: names, counts, ranges and sums are checked before use.
 */
#ifndef HT_CHECKPOINTS_MANIFEST_H
#define HT_CHECKPOINTS_MANIFEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "checkpoints/hash.h"
#include "core/base/status.h"
#include "core/config/tensor_list.h"

#define HT_MANIFEST_NAME "manifest.json"
#define HT_MANIFEST_MAX_BYTES ((size_t)512 << 20)
#define HT_CKPT_ARRAYS 3

struct ht_mf_file {
    char name[64];
    int64_t n_bytes;
    struct ht_hash hash;
};

struct ht_mf_tensor {
    char name[96];
    int n_dims;
    int64_t shape[3], n;
};

struct ht_mf_piece {
    int array, tensor, file;
    int64_t start, n; // elements [start, start + n) of the tensor
    int64_t at;       // byte offset in the file; 4 * n bytes, fp32, little endian
    struct ht_hash hash;
};

struct ht_manifest {
    bool is_part;
    int world;
    int64_t step, tokens;
    int n_files, n_tensors;
    int64_t n_pieces;
    struct ht_mf_file *files;
    struct ht_mf_tensor *tensors;
    struct ht_mf_piece *pieces; // after ht_manifest_index: by array, tensor, start
};

extern const char *const ht_ckpt_array_names[HT_CKPT_ARRAYS];

/* "rank-00000-of-00002.h5" */
void ht_ckpt_rank_file(char name[64], int rank, int world);

/* name is safe as a file's name in a folder: letters, digits, '.', '_', '-', not starting with '.'.
 */
bool ht_ckpt_name_ok(const char *name);
bool ht_ckpt_tensor_name_ok(const char *name); // the same letters, any length

/* Names and shapes of a tensor list; HT_ERR_ARG for a name that a file cannot carry. */
enum ht_status ht_manifest_set_tensors(struct ht_manifest *m, const struct ht_tensor_list *list);

/* The text, sealed. Caller frees. */
enum ht_status ht_manifest_print(char **text, size_t *n_bytes, const struct ht_manifest *m);

/* Seal checked, then the structure; path is for messages. HT_ERR_FORMAT. */
enum ht_status ht_manifest_parse(struct ht_manifest *out, const char *text, size_t n_bytes,
                                 const char *path);
enum ht_status ht_manifest_read(struct ht_manifest *out, const char *path);
void ht_manifest_free(struct ht_manifest *m);

/* Append the file and pieces of a part (same world, step and tensors) to m. */
enum ht_status ht_manifest_merge(struct ht_manifest *m, const struct ht_manifest *part,
                                 const char *path);

/* Sort the pieces and check that they cover every element of every tensor of all three arrays
 * exactly once. */
enum ht_status ht_manifest_index(struct ht_manifest *m, const char *path);

/* Number of the file of that name, -1 when there is none. */
int ht_manifest_find_file(const struct ht_manifest *m, const char *name);

#endif
