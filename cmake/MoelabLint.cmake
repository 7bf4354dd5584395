# Compiles every header alone: a header that only works behind another one fails here.
file(GLOB headers RELATIVE ${PROJECT_SOURCE_DIR} CONFIGURE_DEPENDS
     core/*.h core/io/*.h core/losses/*.h core/model/*.h datasets/*.h trainers/*.h experiments/*.h)
set(lint_sources)
foreach(header ${headers})
  string(REPLACE "/" "_" name ${header})
  set(source ${PROJECT_BINARY_DIR}/lint/${name}.cpp)
  file(CONFIGURE OUTPUT ${source} CONTENT "#include \"${header}\"\n")
  list(APPEND lint_sources ${source})
endforeach()
moelab_objects(moelab_lint ${lint_sources})
set_target_properties(moelab_lint PROPERTIES UNITY_BUILD OFF)
target_compile_options(moelab_lint PRIVATE -fsyntax-only)
