// SPDX-License-Identifier: Apache-2.0
// Every mixer that configurations can name: one include and one line each.
#include "gdn/mixers/attention/layer.h"
#include "gdn/mixers/delta_net/layer.h"
#include "gdn/mixers/dplr/layer.h"
#include "gdn/mixers/gated_attention/layer.h"
#include "gdn/mixers/gated_delta_net/layer.h"
#include "gdn/mixers/gated_delta_net_2/layer.h"
#include "gdn/mixers/gated_delta_product/layer.h"
#include "gdn/mixers/gated_write/layer.h"
#include "gdn/mixers/gla/layer.h"
#include "gdn/mixers/kimi_delta_attention/layer.h"
#include "gdn/mixers/linear_attention/layer.h"
#include "gdn/mixers/lstm/layer.h"
#include "gdn/mixers/mamba/layer.h"
#include "gdn/mixers/mamba2/layer.h"
#include "gdn/mixers/mixer.h"
#include "gdn/mixers/mla/layer.h"
#include "gdn/mixers/retention/layer.h"
#include "gdn/mixers/rwkv4/layer.h"
#include "gdn/mixers/rwkv7/layer.h"
#include "gdn/mixers/s4d/layer.h"
#include "gdn/mixers/simple_gla/layer.h"
#include "gdn/mixers/titans/layer.h"
#include "gdn/mixers/ttt/layer.h"

namespace gdn {

const std::vector<MixerInfo>& mixers() {
  // clang-format off
  static const std::vector<MixerInfo> all = {
      gated_delta_net_info(),
      delta_net_info(),
      kimi_delta_attention_info(),
      gated_delta_net_2_info(),
      gated_delta_product_info(),
      gated_write_info(),
      dplr_info(),
      rwkv7_info(),
      linear_attention_info(),
      retention_info(),
      simple_gla_info(),
      gla_info(),
      mamba2_info(),
      mamba_info(),
      rwkv4_info(),
      s4d_info(),
      lstm_info(),
      attention_info(),
      gated_attention_info(),
      mla_info(),
      ttt_linear_info(),
      ttt_mlp_info(),
      titans_lmm_info(),
      titans_mac_info(),
      titans_mag_info(),
      titans_mal_info(),
  };
  // clang-format on
  return all;
}

}  // namespace gdn
