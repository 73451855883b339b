// SPDX-License-Identifier: Apache-2.0
// Every mixer that configurations can name: one include and one line each.
#include "gdn/mixers/attention/layer.h"
#include "gdn/mixers/delta_net/layer.h"
#include "gdn/mixers/gated_delta_net/layer.h"
#include "gdn/mixers/mixer.h"

namespace gdn {

const std::vector<MixerInfo>& mixers() {
  static const std::vector<MixerInfo> all = {
      gated_delta_net_info(),
      delta_net_info(),
      attention_info(),
  };
  return all;
}

}  // namespace gdn
