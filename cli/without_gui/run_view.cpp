// Stands in for the dashboard in a program that is built without it.
#include "core/base/error.h"
#include "gui/view.h"

namespace kvlapse::gui {

void run_view(const ViewOptions&) {
  fail("view: this kvlapse was built without the dashboard; configure with -DKVLAPSE_GUI=ON and build again");
}

}  // namespace kvlapse::gui
