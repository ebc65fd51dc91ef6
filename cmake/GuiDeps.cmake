# Dear ImGui (docking branch), ImPlot, GLFW and the ImGui test engine, as plain source trees that our own few targets
# compile. Three ways to provide them, first match wins:
#   KVLAPSE_IMGUI_DIR, KVLAPSE_IMPLOT_DIR, KVLAPSE_GLFW_DIR, KVLAPSE_IMGUI_TEST_ENGINE_DIR   checkouts of each
#   KVLAPSE_GUI_DEPS                  an unpacked imgui-bundle tree (holds external/)
#   neither                           the source package imgui-bundle of PyPI, pinned by hash, kept in KVLAPSE_CACHE_DIR
set(KVLAPSE_CACHE_DIR "${CMAKE_SOURCE_DIR}/.cache" CACHE PATH "Downloads that are kept between builds")
set(KVLAPSE_GUI_DEPS "" CACHE PATH "An unpacked imgui-bundle source tree; empty: fetch it")
set(bundle_version 1.93.0)
set(bundle_sha256 10ad1dab8258a6787b4f07bb926b08d0efc648a7906242568c8dd778c5e719bf)

function(kvlapse_fetch_bundle out)
  set(tarball ${KVLAPSE_CACHE_DIR}/imgui_bundle-${bundle_version}.tar.gz)
  set(tree ${KVLAPSE_CACHE_DIR}/imgui_bundle-${bundle_version})
  if(NOT EXISTS ${tree}/unpacked)
    if(EXISTS ${tarball})
      file(SHA256 ${tarball} found)
      if(NOT found STREQUAL bundle_sha256)
        message(STATUS "${tarball}: SHA-256 ${found}, expected ${bundle_sha256}; fetching it again")
        file(REMOVE ${tarball})
      endif()
    endif()
    if(NOT EXISTS ${tarball})
      find_package(Python3 REQUIRED COMPONENTS Interpreter)
      file(WRITE ${KVLAPSE_CACHE_DIR}/imgui_bundle.requirements
        "imgui-bundle==${bundle_version} --hash=sha256:${bundle_sha256}\n")
      message(STATUS "Fetching imgui-bundle ${bundle_version} (54 MB)")
      execute_process(
        COMMAND ${Python3_EXECUTABLE} -m pip download -q --disable-pip-version-check --retries 1 --timeout 15 --no-deps --no-binary imgui-bundle --require-hashes
          -r ${KVLAPSE_CACHE_DIR}/imgui_bundle.requirements -d ${KVLAPSE_CACHE_DIR}
        RESULT_VARIABLE result ERROR_VARIABLE errors)
      if(NOT result EQUAL 0 OR NOT EXISTS ${tarball})
        message(FATAL_ERROR "Could not fetch imgui-bundle ${bundle_version} with pip:\n${errors}\n"
          "Give a source tree with -DKVLAPSE_GUI_DEPS=PATH, or build without the dashboard (-DKVLAPSE_GUI=OFF).")
      endif()
    endif()
    file(SHA256 ${tarball} found)
    if(NOT found STREQUAL bundle_sha256)
      message(FATAL_ERROR "${tarball}: SHA-256 ${found}, expected ${bundle_sha256}")
    endif()
    set(folders)
    foreach(folder imgui/imgui implot/implot glfw/glfw imgui_test_engine/imgui_test_engine)
      list(APPEND folders imgui_bundle-${bundle_version}/external/${folder})
    endforeach()
    execute_process(COMMAND ${CMAKE_COMMAND} -E tar xzf ${tarball} ${folders}
      WORKING_DIRECTORY ${KVLAPSE_CACHE_DIR} RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "${tarball}: could not unpack")
    endif()
    file(TOUCH ${tree}/unpacked)
  endif()
  set(${out} ${tree} PARENT_SCOPE)
endfunction()

if(KVLAPSE_GUI_DEPS)
  set(bundle_tree ${KVLAPSE_GUI_DEPS})
elseif(NOT KVLAPSE_IMGUI_DIR OR NOT KVLAPSE_IMPLOT_DIR OR NOT KVLAPSE_GLFW_DIR)
  kvlapse_fetch_bundle(bundle_tree)
endif()
function(kvlapse_gui_folder name default probe)
  set(KVLAPSE_${name}_DIR "" CACHE PATH "Source tree of ${name}; empty: the one of the bundle")
  set(folder "${KVLAPSE_${name}_DIR}")
  if(NOT folder)
    set(folder ${bundle_tree}/external/${default})
  endif()
  if(NOT EXISTS ${folder}/${probe})
    message(FATAL_ERROR "${folder}: no ${probe} there; set KVLAPSE_${name}_DIR or KVLAPSE_GUI_DEPS")
  endif()
  set(${name}_DIR ${folder} PARENT_SCOPE)
endfunction()
kvlapse_gui_folder(IMGUI imgui/imgui imgui.cpp)
kvlapse_gui_folder(IMPLOT implot/implot implot.cpp)
kvlapse_gui_folder(GLFW glfw/glfw include/GLFW/glfw3.h)
if(KVLAPSE_TESTS)
  kvlapse_gui_folder(IMGUI_TEST_ENGINE imgui_test_engine/imgui_test_engine imgui_test_engine/imgui_te_engine.cpp)
endif()

set(GLFW_BUILD_DOCS OFF CACHE BOOL "" FORCE)
set(GLFW_BUILD_TESTS OFF CACHE BOOL "" FORCE)
set(GLFW_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
set(GLFW_INSTALL OFF CACHE BOOL "" FORCE)
option(GLFW_BUILD_WAYLAND "Wayland windows (X11 and the null platform are always there)" OFF)
set(GLFW_LIBRARY_TYPE STATIC CACHE STRING "" FORCE)
add_subdirectory(${GLFW_DIR} ${CMAKE_BINARY_DIR}/glfw EXCLUDE_FROM_ALL SYSTEM)

find_package(OpenGL REQUIRED COMPONENTS OpenGL)

# Others' code: its warnings are its own.
add_library(kvlapse_imgui_headers INTERFACE)
target_include_directories(kvlapse_imgui_headers SYSTEM INTERFACE ${IMGUI_DIR} ${IMGUI_DIR}/backends ${IMPLOT_DIR} ${GLFW_DIR}/deps)
target_compile_definitions(kvlapse_imgui_headers INTERFACE "IMPLOT_CUSTOM_NUMERIC_TYPES=(float)(double)"
  IMGUI_DISABLE_DEMO_WINDOWS IMGUI_DISABLE_OBSOLETE_FUNCTIONS)
if(KVLAPSE_SANITIZE)
  target_compile_options(kvlapse_imgui_headers INTERFACE -fsanitize=${KVLAPSE_SANITIZE} -fno-omit-frame-pointer)
endif()

set(imgui_sources ${IMGUI_DIR}/imgui.cpp ${IMGUI_DIR}/imgui_draw.cpp ${IMGUI_DIR}/imgui_tables.cpp ${IMGUI_DIR}/imgui_widgets.cpp)
if(EXISTS ${IMGUI_DIR}/imgui_stacklayout.cpp)  # the bundle's imgui.cpp calls it
  list(APPEND imgui_sources ${IMGUI_DIR}/imgui_stacklayout.cpp)
endif()
function(kvlapse_foreign_library name)
  add_library(${name} STATIC ${ARGN})
  target_link_libraries(${name} PUBLIC kvlapse_imgui_headers)
  target_compile_options(${name} PRIVATE -w -O1)  # fast enough for every frame, and compiled in two thirds of the time
endfunction()

# Two of the core: with IMGUI_ENABLE_TEST_ENGINE every program must link the test engine, whose licence is not MIT.
kvlapse_foreign_library(kvlapse_imgui ${imgui_sources})
kvlapse_foreign_library(kvlapse_implot ${IMPLOT_DIR}/implot.cpp ${IMPLOT_DIR}/implot_items.cpp)
kvlapse_foreign_library(kvlapse_imgui_backends ${IMGUI_DIR}/backends/imgui_impl_glfw.cpp
  ${IMGUI_DIR}/backends/imgui_impl_opengl3.cpp ${IMGUI_DIR}/backends/imgui_impl_null.cpp)
target_link_libraries(kvlapse_imgui_backends PUBLIC glfw OpenGL::GL ${CMAKE_DL_LIBS})

if(KVLAPSE_TESTS)
  kvlapse_foreign_library(kvlapse_imgui_tested ${imgui_sources})
  target_compile_options(kvlapse_imgui_tested PRIVATE -O0)  # drives tests only: compiling it fast is worth more
  file(GLOB engine_sources ${IMGUI_TEST_ENGINE_DIR}/imgui_test_engine/*.cpp)
  target_sources(kvlapse_imgui_tested PRIVATE ${engine_sources})
  target_include_directories(kvlapse_imgui_tested SYSTEM PUBLIC ${IMGUI_TEST_ENGINE_DIR} ${IMGUI_TEST_ENGINE_DIR}/imgui_test_engine)
  target_compile_definitions(kvlapse_imgui_tested PUBLIC IMGUI_ENABLE_TEST_ENGINE
    IMGUI_TEST_ENGINE_ENABLE_COROUTINE_STDTHREAD_IMPL=1 IMGUI_TEST_ENGINE_ENABLE_STD_FUNCTION=1
    IMGUI_TEST_ENGINE_ENABLE_CAPTURE=0)
endif()
