/* checkpoints/manifest_seal.h: constants shared by the printer and the parser of manifests. */
#ifndef HT_CHECKPOINTS_MANIFEST_SEAL_H
#define HT_CHECKPOINTS_MANIFEST_SEAL_H

#define HT_MANIFEST_FORMAT "hybridtrain-checkpoint"
#define HT_MANIFEST_VERSION 1

/* What follows the hashed bytes: exactly this with 32 digits, then the end of the file. */
#define HT_MANIFEST_SEAL ",\n\"xxh3_128\": \"%s\"\n}\n"
#define HT_MANIFEST_SEAL_BYTES 51 // printed

#endif
