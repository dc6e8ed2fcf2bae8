# The sources of the kernels, for cuda/CMakeLists.txt and for the ggml-cpu and ggml-cuda targets of the patched llama.cpp.
#
#   PQ_SOURCES_BASE, PQ_SOURCES_AVX2, PQ_SOURCES_AVX512   paths relative to this folder
#   PQ_FLAGS_BASE, PQ_FLAGS_AVX2, PQ_FLAGS_AVX512         compile flags of each list, empty where the compiler has none
#   PQ_SOURCES_CUDA, PQ_FLAGS_CUDA                        the same for CUDA; its flags are for the whole target
#   pq_set_source_flags(<folder>)                         gives the sources, found in <folder>, their flags. Source properties
#                                                         hold in the directory scope that sets them: call it where the target is.
#
# All C++ sources are compiled on every architecture; one whose instruction set is not enabled turns into a stub.

set(PQ_SOURCES_BASE   pq/pq-codebook.cpp cpu/pq-cpu.cpp cpu/pq-kernels-scalar.cpp)
set(PQ_SOURCES_AVX2   cpu/pq-kernels-avx2.cpp)
set(PQ_SOURCES_AVX512 cpu/pq-kernels-avx512.cpp)

set(PQ_FLAGS_BASE   "")
set(PQ_FLAGS_AVX2   "")
set(PQ_FLAGS_AVX512 "")

if (NOT MSVC)
    # codes are equal on every instruction set only if no compiler fuses a multiplication and an addition by itself
    set(PQ_FLAGS_BASE -ffp-contract=off)
endif()

if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64|i[3-6]86)$" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
    if (MSVC)
        set(PQ_FLAGS_AVX2   /arch:AVX2)
        set(PQ_FLAGS_AVX512 /arch:AVX512)
    else()
        include(CheckCXXCompilerFlag)
        check_cxx_compiler_flag("-mavx2 -mfma -mf16c" PQ_COMPILER_HAS_AVX2)
        check_cxx_compiler_flag("-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi" PQ_COMPILER_HAS_AVX512)
        if (PQ_COMPILER_HAS_AVX2)
            set(PQ_FLAGS_AVX2 -mavx2 -mfma -mf16c)
        endif()
        if (PQ_COMPILER_HAS_AVX512)
            set(PQ_FLAGS_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx2 -mfma -mf16c)
        endif()
    endif()
endif()

macro(pq_set_source_flags folder)
    foreach (_pq_set BASE AVX2 AVX512)
        foreach (_pq_source ${PQ_SOURCES_${_pq_set}})
            set_source_files_properties("${folder}/${_pq_source}" PROPERTIES COMPILE_OPTIONS "${PQ_FLAGS_BASE};${PQ_FLAGS_${_pq_set}}")
        endforeach()
    endforeach()
endmacro()

file(GLOB PQ_SOURCES_CUDA RELATIVE ${CMAKE_CURRENT_LIST_DIR} CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/kernels/*.cu)

# Not ggml's -use_fast_math: it flushes small distances to zero, and codes would differ from the CPU's.
set(PQ_FLAGS_CUDA "")
