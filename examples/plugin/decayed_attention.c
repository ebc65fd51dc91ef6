/* An eviction policy as a plug-in: attention that fades. A token's score is the attention that it got, each step
 * counting `alpha` times the one after it, so that old fame is forgotten.
 *
 *   cc -shared -fPIC -O2 -I <kvlapse> decayed_attention.c -o libdecayed_attention.so
 *   kvlapse replay run.kvl --policy ./libdecayed_attention.so:alpha=0.3 --budget 25% -o run.kvr
 */
#include "core/policy/plugin_abi.h"

enum { ALPHA };

static int observe(const kvlapse_view* view, float* const* state) {
  const float alpha = (float)view->parameters[ALPHA];
  for (int32_t i = 0; i < view->n_slots; ++i) {
    float mean = 0;
    for (int32_t g = 0; g < view->group; ++g) mean += view->attention[g * view->n_slots + i];
    state[0][i] = alpha * state[0][i] + mean / (float)view->group;
  }
  return 0;
}

static int score(const kvlapse_view* view, const float* const* state, float* scores) {
  for (int32_t i = 0; i < view->n_slots; ++i) scores[i] = state[0][i];
  return 0;
}

static const kvlapse_parameter parameters[] = {
    {"alpha", "what a step leaves of earlier attention", 0.9, 0, 1},
};

static const kvlapse_plugin_info info = {
    .abi = KVLAPSE_PLUGIN_ABI,
    .name = "decayed_attention",
    .summary = "attention that fades from step to step",
    .version = 1,
    .signals = KVLAPSE_ATTENTION,
    .parameters = parameters,
    .n_parameters = 1,
    .state_columns = 1,
    .cadence = 1,
    .observe = observe,
    .score = score,
};

const kvlapse_plugin_info* kvlapse_plugin(void) {
  return &info;
}
