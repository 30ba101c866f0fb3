/* checkpoints/folder.h: names and checks of checkpoint folders. */
#ifndef HT_CHECKPOINTS_FOLDER_H
#define HT_CHECKPOINTS_FOLDER_H

#include <stdint.h>

#include "checkpoints/manifest.h"
#include "core/base/log.h"
#include "core/base/status.h"

/* "step-00001000" */
void ht_ckpt_step_name(char name[32], int64_t step);

/* The step of such a name, -1 for any other. */
int64_t ht_ckpt_step_of_name(const char *name);

/* Steps of the published checkpoints of dir, newest first. A missing dir has none. Caller frees. */
enum ht_status ht_ckpt_list_steps(int64_t **steps, int *n, const char *dir);

/* Remove the folders .step-*.tmp-* of writers that are gone. A writer holds a lock (flock) on its
 * folder; one that is locked is left alone and named in the log. */
enum ht_status ht_ckpt_remove_stale(const char *dir, const struct ht_log *log);

/* The manifest of folder, checked against the folder: complete, every listed file there with its
 * size, no file beside them, every element of every tensor covered once. No content hashes yet.
 * Manifest indexed. */
enum ht_status ht_ckpt_folder_open(struct ht_manifest *out, const char *folder);

/* The content of one file against its hash. A difference is traced to the tensor (or the HDF5
 * structure) and the byte range: HT_ERR_FORMAT. */
enum ht_status ht_ckpt_folder_check_file(const struct ht_manifest *m, int file, const char *folder);

#endif
