// Declarations of every policy's catalogue entry and factory, one line per entry of this folder.
#pragma once

#include <memory>

#include "core/policy/policy.h"
#include "core/policy/spec.h"

// <name>_info() is the catalogue entry with default parameters, make_<name>() builds from a resolved one.
#define KVLAPSE_POLICY(name) \
  PolicyInfo name##_info();  \
  std::unique_ptr<Policy> make_##name(PolicyInfo info)

namespace kvlapse {

KVLAPSE_POLICY(full);
KVLAPSE_POLICY(window);
KVLAPSE_POLICY(streaming_llm);
KVLAPSE_POLICY(streaming_llm_zefan_cai);
KVLAPSE_POLICY(streaming_llm_kvpress);
KVLAPSE_POLICY(random);
KVLAPSE_POLICY(h2o_fminference);
KVLAPSE_POLICY(h2o_longflow);
KVLAPSE_POLICY(observed_attention);
KVLAPSE_POLICY(tova);
KVLAPSE_POLICY(tova_kvpress);
KVLAPSE_POLICY(scissorhands);
KVLAPSE_POLICY(keyformer);
KVLAPSE_POLICY(snapkv_zefan_cai);
KVLAPSE_POLICY(snapkv_kvpress);
KVLAPSE_POLICY(pyramidkv);
KVLAPSE_POLICY(adakv);
PolicyInfo adakv_info_for(const PolicySpec& spec);
KVLAPSE_POLICY(vatp_guozhiyu);
KVLAPSE_POLICY(vatp_longflow);
KVLAPSE_POLICY(lazy_eviction);
KVLAPSE_POLICY(crystal_kv);
KVLAPSE_POLICY(gkv);
KVLAPSE_POLICY(vase);
KVLAPSE_POLICY(raas);
KVLAPSE_POLICY(longflow);
KVLAPSE_POLICY(caote);
KVLAPSE_POLICY(fastcaote);
KVLAPSE_POLICY(rkv_zefan_cai);
KVLAPSE_POLICY(rkv_longflow);
KVLAPSE_POLICY(knorm);
KVLAPSE_POLICY(keydiff);
KVLAPSE_POLICY(lagkv);
KVLAPSE_POLICY(expected_attention);
KVLAPSE_POLICY(triattention);
KVLAPSE_POLICY(quest);
KVLAPSE_POLICY(oracle_topb);
KVLAPSE_POLICY(oracle_mass);
KVLAPSE_POLICY(oracle_max);
KVLAPSE_POLICY(oracle_next_use);
KVLAPSE_POLICY(oracle_error);

}  // namespace kvlapse

#undef KVLAPSE_POLICY
