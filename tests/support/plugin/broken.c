/* A plug-in that fails as its parameter says: 0 works, 1 returns an error, 2 writes through null, 3 scores NaN. */
#include <stddef.h>

#include "core/policy/plugin_abi.h"

static int score(const kvlapse_view* view, const float* const* state, float* scores) {
  (void)state;
  const int how = (int)view->parameters[0];
  if (how == 1) return 7;
  if (how == 2) *(volatile int*)NULL = 1;
  for (int32_t i = 0; i < view->n_slots; ++i) scores[i] = how == 3 ? 0.0f / (float)(view->layer) : (float)view->positions[i];
  return 0;
}

static const kvlapse_parameter parameters[] = {{"how", "how it fails", 0, 0, 3}};

static const kvlapse_plugin_info info = {
    .abi = KVLAPSE_PLUGIN_ABI + PLUGIN_ABI_OFFSET,
    .name = "broken",
    .summary = "fails in every way",
    .version = 1,
    .parameters = parameters,
    .n_parameters = 1,
    .cadence = 1,
    .score = score,
};

const kvlapse_plugin_info* kvlapse_plugin(void) { return &info; }
