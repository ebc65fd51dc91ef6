# kvlapse_embed_schema(target folder function): compiles folder/000N_*.sql into `target` as
# std::span<const kvlapse::Migration> kvlapse::<function>(), in the order of the numbers. Declared in a header of the
# layer; Migration is in trace/sqlite.h. A changed or new file configures again.
function(kvlapse_embed_schema target folder function)
  file(GLOB scripts CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${folder}/*.sql)
  list(SORT scripts)
  set(entries "")
  foreach(script ${scripts})
    set_property(DIRECTORY ${CMAKE_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${script})
    get_filename_component(name ${script} NAME_WE)
    file(READ ${script} sql)
    string(APPEND entries "    {\"${name}\", R\"schema(${sql})schema\"},\n")
  endforeach()
  set(output ${CMAKE_BINARY_DIR}/generated/${function}.cpp)
  file(CONFIGURE OUTPUT ${output} @ONLY CONTENT [[#include "trace/sqlite.h"

namespace kvlapse {
std::span<const Migration> @function@();
std::span<const Migration> @function@() {
  static constexpr Migration kMigrations[] = {
@entries@  };
  return kMigrations;
}
}  // namespace kvlapse
]])
  target_sources(${target} PRIVATE ${output})
endfunction()
