# The layer stack on the CUDA backend: all kernels of a training step together.
ht_add_emu_test(test_model_cuda SOURCES test_model_cuda.c LINK ht_model ht_ops ht_base TIMEOUT 900)
# States of many sequences, decoding and prompts.
ht_add_emu_test(test_pool_cuda SOURCES test_pool_cuda.c LINK ht_model ht_ops ht_base TIMEOUT 900)
# Steps of training: the loss curve of the CPU.
ht_add_emu_test(test_training_cuda SOURCES test_training_cuda.c LINK ht_model ht_ops ht_base TIMEOUT 900)
