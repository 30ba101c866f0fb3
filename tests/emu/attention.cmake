# attention/: rope, flash, the KV cache.
set(attention_case ${CMAKE_SOURCE_DIR}/tests/attention/attention_case.c
                   ${CMAKE_SOURCE_DIR}/tests/ref/attention_ref.c)
ht_add_emu_test(test_rope_cuda SOURCES test_rope_cuda.c ${CMAKE_SOURCE_DIR}/tests/ref/attention_ref.c
                LINK ht_attention)
ht_add_emu_test(test_flash_cuda SOURCES test_flash_cuda.c ${attention_case} LINK ht_attention)
ht_add_emu_test(test_kv_attention_cuda SOURCES test_kv_attention_cuda.c ${attention_case}
                LINK ht_attention)
