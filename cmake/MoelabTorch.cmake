# The imported targets of LibTorch. The CPU flavour takes libtorch_cpu and libc10 alone: the wheel's own package files would
# drag in its CUDA libraries (0.5 s and 350 MB at every start), and they are not needed.
#
# TORCH_DIR (cache or environment) is the folder that holds include/ and lib/.
if(NOT TORCH_DIR)
  if(DEFINED ENV{TORCH_DIR} AND NOT "$ENV{TORCH_DIR}" STREQUAL "")
    set(TORCH_DIR "$ENV{TORCH_DIR}" CACHE PATH "LibTorch: the folder with include/ and lib/")
  elseif(EXISTS "${CMAKE_CURRENT_LIST_DIR}/../scripts/setup.sh")
    execute_process(COMMAND "${CMAKE_CURRENT_LIST_DIR}/../scripts/setup.sh" --torch-dir
                    OUTPUT_VARIABLE _torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
    set(TORCH_DIR "${_torch_dir}" CACHE PATH "LibTorch: the folder with include/ and lib/")
  endif()
endif()
if(NOT EXISTS "${TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "no LibTorch in '${TORCH_DIR}': run scripts/setup.sh, or set TORCH_DIR")
endif()

function(_moelab_import name)
  if(NOT TARGET moelab_torch::${name})
    add_library(moelab_torch::${name} SHARED IMPORTED GLOBAL)
    set_target_properties(moelab_torch::${name} PROPERTIES
      IMPORTED_LOCATION "${TORCH_DIR}/lib/lib${name}.so" IMPORTED_NO_SONAME FALSE)
  endif()
endfunction()
_moelab_import(torch_cpu)
_moelab_import(c10)

# Two OpenMP runtimes in one process would each keep threads of their own: the wheel's libgomp where there is one, else the
# compiler's, which a LibTorch without a bundled one loads too.
if(NOT TARGET moelab_torch::openmp)
  if(EXISTS "${TORCH_DIR}/lib/libgomp.so.1")
    add_library(moelab_torch::openmp SHARED IMPORTED GLOBAL)
    set_target_properties(moelab_torch::openmp PROPERTIES
      IMPORTED_LOCATION "${TORCH_DIR}/lib/libgomp.so.1" IMPORTED_NO_SONAME FALSE)
  else()
    find_package(OpenMP REQUIRED COMPONENTS CXX)
    add_library(moelab_torch::openmp INTERFACE IMPORTED GLOBAL)
    target_link_libraries(moelab_torch::openmp INTERFACE ${OpenMP_gomp_LIBRARY})
  endif()
endif()

if(NOT TARGET moelab_torch::torch)
  add_library(moelab_torch::torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(moelab_torch::torch SYSTEM INTERFACE
    "${TORCH_DIR}/include" "${TORCH_DIR}/include/torch/csrc/api/include")
  target_link_libraries(moelab_torch::torch INTERFACE moelab_torch::torch_cpu moelab_torch::c10)
  # LibTorch's libraries are built with NDEBUG, and members of its classes depend on it: at::RecordFunction has one more without.
  target_compile_definitions(moelab_torch::torch INTERFACE NDEBUG)
  # The wheel's NVIDIA runtime libraries are found by its own run path; the linker must not insist on seeing them.
  target_link_options(moelab_torch::torch INTERFACE -Wl,--allow-shlib-undefined)
endif()
