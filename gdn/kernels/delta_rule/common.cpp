// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/delta_rule/common.h"

#include "gdn/base/check.h"

namespace gdn::delta_rule {

void check_params(const DeltaRuleParams& p, const char* op) {
  GDN_CHECK(p.num_sequences >= 0 && p.total_tokens >= 0, "[", op,
            "] num_sequences and total_tokens must not be negative, got ", p.num_sequences, " and ",
            p.total_tokens);
  GDN_CHECK(p.H >= 1 && p.K >= 1 && p.V >= 1, "[", op,
            "] H, K and V must be at least 1, got H=", p.H, " K=", p.K, " V=", p.V);
  GDN_CHECK(p.HV >= 1 && p.HV % p.H == 0, "[", op, "] HV must be a multiple of H, got HV=", p.HV,
            " H=", p.H);
  GDN_CHECK(p.chunk_size == 0 || p.chunk_size == 16 || p.chunk_size == 32 || p.chunk_size == 64,
            "[", op, "] chunk_size must be 16, 32, 64 or 0 (automatic), got ", p.chunk_size);
  if (p.cu_seqlens != nullptr) {
    GDN_CHECK(p.cu_seqlens[0] == 0, "[", op, "] cu_seqlens must start with 0, got ",
              p.cu_seqlens[0]);
    for (int64_t n = 0; n < p.num_sequences; ++n) {
      GDN_CHECK(p.cu_seqlens[n] <= p.cu_seqlens[n + 1], "[", op,
                "] cu_seqlens must not decrease, got ", p.cu_seqlens[n], " before ",
                p.cu_seqlens[n + 1]);
    }
    GDN_CHECK(p.cu_seqlens[p.num_sequences] == p.total_tokens, "[", op,
              "] cu_seqlens must end with the number of tokens ", p.total_tokens, ", got ",
              p.cu_seqlens[p.num_sequences]);
  } else {
    GDN_CHECK(p.num_sequences == 0 ? p.total_tokens == 0 : p.total_tokens % p.num_sequences == 0,
              "[", op,
              "] total_tokens must be a multiple of num_sequences without cu_seqlens, got ",
              p.total_tokens, " and ", p.num_sequences);
  }
  GDN_CHECK(!p.channel_beta || p.beta != nullptr || p.total_tokens == 0, "[", op,
            "] beta must be given with channel_beta");
  GDN_CHECK(p.erase != DeltaErase::kSeparate || p.beta == nullptr, "[", op,
            "] beta must be null with a separate erase");
  if (p.total_tokens == 0) return;
  GDN_CHECK(p.q != nullptr && p.k != nullptr && p.v != nullptr, "[", op,
            "] q, k and v must be given");
  GDN_CHECK(!has_a(p.erase) || p.a != nullptr, "[", op, "] a must be given for this erase");
  GDN_CHECK(p.erase != DeltaErase::kSeparate || p.p != nullptr, "[", op,
            "] p must be given for a separate erase");
  GDN_CHECK(p.gate == DeltaGate::kNone || p.g != nullptr, "[", op,
            "] g must be given for this gate");
}

void check_outputs(const DeltaRuleParams& p, const DeltaRuleOutputs& out, const char* op) {
  GDN_CHECK(p.total_tokens == 0 || out.o != nullptr, "[", op, "] o must be given");
}

void check_grads(const DeltaRuleParams& p, const DeltaRuleGrads& grads, const char* op) {
  if (p.total_tokens == 0) return;
  GDN_CHECK(grads.dq != nullptr && grads.dk != nullptr && grads.dv != nullptr, "[", op,
            "] dq, dk and dv must be given");
  GDN_CHECK(!has_a(p.erase) || grads.da != nullptr, "[", op, "] da must be given for this erase");
  GDN_CHECK(p.erase != DeltaErase::kSeparate || grads.dp != nullptr, "[", op,
            "] dp must be given for a separate erase");
  GDN_CHECK(p.gate == DeltaGate::kNone || grads.dg != nullptr, "[", op,
            "] dg must be given for this gate");
  GDN_CHECK(p.beta == nullptr || grads.dbeta != nullptr, "[", op,
            "] dbeta must be given where beta is");
}

}  // namespace gdn::delta_rule
