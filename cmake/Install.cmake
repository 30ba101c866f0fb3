# pkg-config file and the headers of the library.
file(RELATIVE_PATH HT_PC_TO_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${CMAKE_SOURCE_DIR}/cmake/hybridtrain.pc.in ${CMAKE_BINARY_DIR}/hybridtrain.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/hybridtrain.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(DIRECTORY core ssm attention data distributed training checkpoints inference
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/hybridtrain FILES_MATCHING PATTERN "*.h")
install(TARGETS ht_base ht_config ht_ops ht_ssm ht_attention ht_data ht_distributed ht_model
                ht_checkpoints ht_inference ht_serve ht_training
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}/hybridtrain)
install(DIRECTORY recipes DESTINATION ${CMAKE_INSTALL_DATADIR}/hybridtrain)
