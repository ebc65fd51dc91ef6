/* C interface of a user-defined eviction policy, loaded without a rebuild:
 *
 *   kvlapse replay run.kvl --policy ./libmine.so:alpha=0.3 --budget 25% -o run.kvr
 *
 * A plug-in is a shared library that exports one symbol, kvlapse_plugin, returning a static description.
 * Everything that a policy reads is fp32, in slot order, valid during the call. Functions are called from
 * several threads at once and must give the same answer for the same arguments: no hidden state, no clock, no
 * unseeded randomness. What a policy remembers about a token lives in state columns that move with it. Do not
 * throw or exit.
 *
 * The interface is versioned: a library built for another KVLAPSE_PLUGIN_ABI is refused by name.
 * An example: examples/plugin/decayed_attention.c
 */
#ifndef KVLAPSE_PLUGIN_ABI_H
#define KVLAPSE_PLUGIN_ABI_H

#include <stdint.h>

#define KVLAPSE_PLUGIN_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

/* Signals that a policy reads; the others are null in the view. */
enum {
  KVLAPSE_LOGITS = 1 << 0,    /* q.k / sqrt(D) of the newest query */
  KVLAPSE_ATTENTION = 1 << 1, /* softmax of these */
  KVLAPSE_OUTPUT = 1 << 2,    /* attention output of the newest query */
  KVLAPSE_VALUE_L1 = 1 << 3,  /* sum over D of |v| */
  KVLAPSE_KEYS = 1 << 4,      /* K rows, post-RoPE */
  KVLAPSE_VALUES = 1 << 5     /* V rows */
};

typedef struct kvlapse_parameter {
  const char* name;
  const char* summary;
  double value, min, max; /* value: the default */
} kvlapse_parameter;

/* One kv head of one layer at one step. G query heads share it. */
typedef struct kvlapse_view {
  int32_t layer, kv_head;
  int32_t step;             /* position of the newest token */
  int32_t n_prompt;         /* tokens of the prompt */
  int32_t budget;           /* slots per kv head in this layer */
  int32_t n_slots;          /* n: held tokens, the newest one included */
  int32_t group;            /* G */
  int32_t head_dim;         /* D */
  int32_t newest;           /* slot of the newest token, in observe; -1 in score */
  const int32_t* positions; /* [n] token position of each slot */
  const float* logits;      /* [G, n] */
  const float* attention;   /* [G, n] */
  const float* output;      /* [G, D] */
  const float* value_l1;    /* [n] */
  const float* keys;        /* [n, D] */
  const float* values;      /* [n, D] */
  const double* parameters; /* in the order of the description */
} kvlapse_view;

typedef struct kvlapse_plugin_info {
  uint32_t abi;     /* KVLAPSE_PLUGIN_ABI */
  const char* name; /* [a-z0-9_]+ */
  const char* summary;
  uint32_t version; /* raise it when victims change: results are keyed by it */
  uint32_t signals; /* KVLAPSE_LOGITS | ... */
  const kvlapse_parameter* parameters;
  uint32_t n_parameters;
  uint32_t state_columns; /* floats kept per token and kv head; 0 for a new token */
  uint32_t cadence;       /* acts after every that many tokens; 1: each, overwriting the victim's slot */
  /* After every token's attention, before any eviction; state[c] is column c, [n]. May be null when there is
   * no state. Return 0; anything else stops the run with a message that names the plug-in. */
  int (*observe)(const kvlapse_view* view, float* const* state);
  /* Fills scores[n]; higher is kept. Protected tokens are scored too, their values are ignored. Return 0. */
  int (*score)(const kvlapse_view* view, const float* const* state, float* scores);
} kvlapse_plugin_info;

/* The symbol that a plug-in exports. */
const kvlapse_plugin_info* kvlapse_plugin(void);

#ifdef __cplusplus
}
#endif

#endif
