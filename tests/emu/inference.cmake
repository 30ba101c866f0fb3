# The inference engine on the CUDA backend.
ht_add_emu_test(test_engine_cuda SOURCES test_engine_cuda.c
  LINK ht_inference ht_checkpoints ht_data ht_model ht_ops ht_base
       PkgConfig::JANSSON PkgConfig::UTF8PROC TIMEOUT 900)
