// SPDX-License-Identifier: Apache-2.0
// The delta-rule engine: one recurrence on a K x V state per value head, from which linear
// attention, RetNet, GLA, DeltaNet, Gated DeltaNet, KDA, Comba, gated writes and DPLR follow.
// Torch-free; raw pointers, caller's memory.
//
// Merged form (erase kNone, kKey, kOwn), per token t and value head, S of shape [K,V]:
//   S <- exp(g_t) * S;   u = beta_t * (v_t - S^T a_t);   S <- S + k_t u^T;   o_t = scale * S^T q_t
//   with a = 0 (kNone), a = k (kKey) or the tensor `a` (kOwn).
// Separate form (erase kSeparate), generic DPLR, the erase reads the state before its decay:
//   S <- exp(g_t) * S + k_t v_t^T + p_t (S_old^T a_t)^T;   o_t = scale * S^T q_t          (beta
//   must be null)
//
// Equations of the chunk form: README.md of this folder.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gdn/base/dtype.h"

namespace gdn {

enum class DeltaGate : uint8_t { kNone, kScalar, kChannel };
enum class DeltaErase : uint8_t { kNone, kKey, kOwn, kSeparate };

// Sizes and inputs shared by every entry point. T_total = number of tokens of all sequences, in
// order. HV is a multiple of H; value head j reads query, key, a and p of head j / (HV / H). T =
// the type of dtype; A = double where dtype is kF64, else float.
struct DeltaRuleParams {
  int64_t num_sequences = 0;  // N
  int64_t total_tokens = 0;   // T_total
  const int64_t* cu_seqlens =
      nullptr;  // [N+1] on the host, 0 = first, T_total = last; null: equal lengths T_total/N
  int64_t H = 0, HV = 0, K = 0, V = 0;  // any K, V >= 1
  DType dtype = DType::kF32;            // of q, k, v, a, p, o and their gradients
  DeltaGate gate = DeltaGate::kNone;
  DeltaErase erase = DeltaErase::kKey;
  double scale = 1.0;
  bool l2norm_qk = false;   // rows of q and k are first divided by sqrt(sum of squares + 1e-6)
  int chunk_size = 0;       // 0: the engine's choice; else 16, 32 or 64
  const void* q = nullptr;  // T [T_total,H,K]
  const void* k = nullptr;  // T [T_total,H,K]
  const void* v = nullptr;  // T [T_total,HV,V]
  const void* a = nullptr;  // T [T_total,H,K], kOwn and kSeparate
  const void* p = nullptr;  // T [T_total,H,K], kSeparate
  const void* g =
      nullptr;  // A [T_total,HV] (kScalar) or [T_total,HV,K] (kChannel), natural log, <= 0
  const void* beta = nullptr;  // A [T_total,HV], or [T_total,HV,V] with channel_beta; null means 1
  bool channel_beta = false;   // beta has one factor per value channel instead of one per head
  const void* initial_state = nullptr;  // A [N,HV,K,V]; null means 0
};

struct DeltaRuleOutputs {
  void* o = nullptr;            // T [T_total,HV,V]
  void* final_state = nullptr;  // A [N,HV,K,V]; null: not wanted
  void* saved = nullptr;        // A [delta_rule_saved_size(params)]; null: no backward will follow
};

struct DeltaRuleGrads {
  const void* d_o = nullptr;            // T [T_total,HV,V]; null means 0
  const void* d_final_state = nullptr;  // A [N,HV,K,V]; null means 0
  // Outputs; shapes of the inputs. All that belong to the member must be given, but d_initial_state
  // may be null.
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  void* da = nullptr;
  void* dp = nullptr;
  void* dg = nullptr;
  void* dbeta = nullptr;
  void* d_initial_state = nullptr;
};

// Elements of type A that `saved` must hold (chunk states and whatever else backward does not
// recompute).
int64_t delta_rule_saved_size(const DeltaRuleParams& params);

// Whole sequences in chunks. Throws gdn::Error on sizes that do not fit.
void delta_rule_chunk_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out);
void delta_rule_chunk_backward(const DeltaRuleParams& params, const void* saved,
                               const DeltaRuleGrads& grads);

// Token by token with SIMD; faster than the chunk form for short T. out.saved must be null: no
// backward.
void delta_rule_recurrent_forward(const DeltaRuleParams& params, const DeltaRuleOutputs& out);

// States that outlive a call, one per slot.
struct DeltaRulePool {
  void* states = nullptr;  // A [num_slots,HV,K,V]; BFloat16 with bf16
  int64_t num_slots = 0;
  const int64_t* slots = nullptr;  // [N]: sequence n uses states[slots[n]]; null: states[n]
  // Half the memory, so nearly twice the speed where memory is the limit. Each step rounds the
  // state to nearest even, 2^-9 of an element at most; the arithmetic is fp32 (not for fp64
  // inputs).
  bool bf16 = false;
};

// One token for each of N sequences (T_total == N, cu_seqlens and initial_state ignored), in place
// on a pool of states. Slots must differ from each other; a negative slot means "no sequence here":
// its outputs are zero and no state is touched.
void delta_rule_step(const DeltaRuleParams& params, const DeltaRulePool& pool,
                     void* o /* T [N,HV,V] */);

// The oracle: a literal token loop in double precision (inputs of any dtype), forward and backward.
// final_state and every gradient here are double arrays; o as well.
void delta_rule_naive_forward(const DeltaRuleParams& params, double* o,
                              double* final_state /* or null */);
void delta_rule_naive_backward(const DeltaRuleParams& params, const double* d_o,
                               const double* d_final_state /* or null */, double* dq, double* dk,
                               double* dv, double* da, double* dp, double* dg, double* dbeta,
                               double* d_initial_state);

}  // namespace gdn
