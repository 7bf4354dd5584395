# SentencePiece, which brings no CMake package: its library, its trainer, and its version, which the names of cached models hold.
find_library(SENTENCEPIECE_LIBRARY sentencepiece REQUIRED)
find_library(SENTENCEPIECE_TRAIN_LIBRARY sentencepiece_train REQUIRED)
find_path(SENTENCEPIECE_INCLUDE_DIR sentencepiece_trainer.h REQUIRED)
get_filename_component(folder ${SENTENCEPIECE_LIBRARY} DIRECTORY)
set(SENTENCEPIECE_VERSION unknown)
if(EXISTS ${folder}/pkgconfig/sentencepiece.pc)
  file(STRINGS ${folder}/pkgconfig/sentencepiece.pc line REGEX "^Version:")
  string(REGEX REPLACE "^Version: *" "" SENTENCEPIECE_VERSION "${line}")
endif()

# Loaded by dlmopen, see datasets/sentencepiece/library.h. No sanitizer: its runtime cannot be loaded into a second namespace.
add_library(moelab_pieces MODULE datasets/sentencepiece/library.cpp)
target_include_directories(moelab_pieces PRIVATE ${PROJECT_SOURCE_DIR})
target_include_directories(moelab_pieces SYSTEM PRIVATE ${SENTENCEPIECE_INCLUDE_DIR})
target_link_libraries(moelab_pieces PRIVATE ${SENTENCEPIECE_TRAIN_LIBRARY} ${SENTENCEPIECE_LIBRARY})
set_target_properties(moelab_pieces PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR} CXX_VISIBILITY_PRESET hidden)
