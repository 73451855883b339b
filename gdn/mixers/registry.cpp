// SPDX-License-Identifier: Apache-2.0
// Every mixer that configurations can name: one include and one line each.
#include "gdn/mixers/attention/layer.h"
#include "gdn/mixers/delta_net/layer.h"
#include "gdn/mixers/gated_attention/layer.h"
#include "gdn/mixers/gated_delta_net/layer.h"
#include "gdn/mixers/lstm/layer.h"
#include "gdn/mixers/mamba/layer.h"
#include "gdn/mixers/mamba2/layer.h"
#include "gdn/mixers/mixer.h"
#include "gdn/mixers/mla/layer.h"
#include "gdn/mixers/rwkv4/layer.h"
#include "gdn/mixers/s4d/layer.h"

namespace gdn {

const std::vector<MixerInfo>& mixers() {
  static const std::vector<MixerInfo> all = {
      gated_delta_net_info(), delta_net_info(), mamba_info(), mamba2_info(),
      rwkv4_info(),           s4d_info(),       lstm_info(),  attention_info(),
      gated_attention_info(), mla_info(),
  };
  return all;
}

}  // namespace gdn
