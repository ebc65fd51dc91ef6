#include "core/policy/registry.h"

#include "core/policy/policies/policies.h"

namespace kvlapse {

std::span<const PolicyEntry> policy_registry() {
  static constexpr PolicyEntry kEntries[] = {
      {full_info, make_full},
      {window_info, make_window},
      {streaming_llm_info, make_streaming_llm},
      {streaming_llm_zefan_cai_info, make_streaming_llm_zefan_cai},
      {streaming_llm_kvpress_info, make_streaming_llm_kvpress},
      {random_info, make_random},
      {h2o_fminference_info, make_h2o_fminference},
      {h2o_longflow_info, make_h2o_longflow},
      {observed_attention_info, make_observed_attention},
      {tova_info, make_tova},
      {tova_kvpress_info, make_tova_kvpress},
      {scissorhands_info, make_scissorhands},
      {keyformer_info, make_keyformer},
      {snapkv_zefan_cai_info, make_snapkv_zefan_cai},
      {snapkv_kvpress_info, make_snapkv_kvpress},
      {pyramidkv_info, make_pyramidkv},
      {adakv_info, make_adakv, adakv_info_for},
      {vatp_guozhiyu_info, make_vatp_guozhiyu},
      {vatp_longflow_info, make_vatp_longflow},
      {lazy_eviction_info, make_lazy_eviction},
      {crystal_kv_info, make_crystal_kv},
      {gkv_info, make_gkv},
      {vase_info, make_vase},
      {raas_info, make_raas},
      {longflow_info, make_longflow},
      {caote_info, make_caote},
      {fastcaote_info, make_fastcaote},
      {rkv_zefan_cai_info, make_rkv_zefan_cai},
      {rkv_longflow_info, make_rkv_longflow},
      {knorm_info, make_knorm},
      {keydiff_info, make_keydiff},
      {lagkv_info, make_lagkv},
      {expected_attention_info, make_expected_attention},
      {triattention_info, make_triattention},
      {quest_info, make_quest},
      {oracle_topb_info, make_oracle_topb},
      {oracle_mass_info, make_oracle_mass},
      {oracle_max_info, make_oracle_max},
      {oracle_next_use_info, make_oracle_next_use},
      {oracle_error_info, make_oracle_error},
  };
  return kEntries;
}

}  // namespace kvlapse
