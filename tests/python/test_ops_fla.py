# SPDX-License-Identifier: Apache-2.0
"""gdn.ops: flash-linear-attention's signatures, layouts and errors over libgdn's operators."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

from gdn import ops  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def inputs(B=2, T=20, H=2, HV=4, K=8, V=6, dtype=torch.float64, per_channel=False):
    x = dict(
        q=torch.randn(B, T, H, K, dtype=dtype),
        k=F.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1),
        v=torch.randn(B, T, HV, V, dtype=dtype),
        g=-torch.rand(B, T, HV, *([K] if per_channel else []), dtype=dtype),
        beta=torch.rand(B, T, HV, dtype=dtype),
        initial_state=torch.randn(B, HV, K, V, dtype=dtype),
    )
    return {name: t.requires_grad_() for name, t in x.items()}


def loop(q, k, v, g=None, beta=None, initial_state=None, scale=None, gv=None, erase=True):
    """The recurrence, token by token, for everything that has one."""
    G = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(G, 2) * (q.shape[-1] ** -0.5 if scale is None else scale), k.repeat_interleave(G, 2)
    S = (
        initial_state
        if initial_state is not None
        else q.new_zeros(*q.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1])
    )
    outs = []
    for t in range(q.shape[1]):
        if g is not None:
            S = S * (g[:, t].exp()[..., None, None] if g.dim() == 3 else g[:, t].exp()[..., None])
        if gv is not None:
            S = S * gv[:, t].exp()[..., None, :]
        u = v[:, t] - (torch.einsum("bhkv,bhk->bhv", S, k[:, t]) if erase else 0)
        if beta is not None:
            u = u * (beta[:, t][..., None] if beta.dim() == 3 else beta[:, t])
        S = S + k[:, t][..., None] * u[..., None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outs, 1), S


def check(actual, expected, inputs=()):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)
    if inputs:
        weights = [torch.randn_like(e) for e in expected]
        ga, ge = (
            torch.autograd.grad(
                sum((o * w).sum() for o, w in zip(side, weights, strict=True)), list(inputs), retain_graph=True
            )
            for side in (actual, expected)
        )
        for a, e in zip(ga, ge, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-8)


FLA = {  # the positional parameters of flash-linear-attention 0.6.0
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context",
    "fused_recurrent_gated_delta_rule": "q k v g gk gv beta scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval "
    "state_v_first cu_seqlens",
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states "
    "state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs",
    "fused_recurrent_kda": "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens",
    "chunk_delta_rule": "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens "
    "cu_seqlens_cpu",
    "fused_recurrent_delta_rule": "q k v beta scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel cu_seqlens",
    "chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state state_v_first cu_seqlens "
    "cu_seqlens_cpu",
    "fused_recurrent_simple_gla": "q k v g g_gamma scale initial_state output_final_state reverse state_v_first "
    "cu_seqlens",
    "chunk_retention": "q k v scale initial_state output_final_state cu_seqlens",
    "fused_recurrent_retention": "q k v scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_gla": "q k v gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "fused_recurrent_linear_attn": "q k v scale initial_state output_final_state reverse normalize cu_seqlens",
    "causal_conv1d": "x weight bias residual initial_state output_final_state activation backend cu_seqlens "
    "cu_seqlens_cpu chunk_indices cp_context",
    "causal_conv1d_update": "x cache residual weight bias activation",
    "rms_norm_gated": "x g weight bias activation residual prenorm residual_in_fp32 eps",
    "rms_norm": "x weight bias residual eps prenorm residual_in_fp32",
    "l2norm": "x eps output_dtype",
}


@pytest.mark.parametrize("name", list(FLA))
def test_arguments_stand_where_fla_has_them(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == FLA[name].split()
    assert getattr(ops, name).__doc__


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule(name):
    x = inputs()
    o = getattr(ops, name)(**x, output_final_state=True, scale=0.3)
    check(o, loop(**x, scale=0.3), x.values())
    assert getattr(ops, name)(**x)[1] is None


def test_decays_and_strengths_per_channel():
    x = inputs()
    gk, gv = (-torch.rand(2, 20, 4, n, dtype=torch.float64) for n in (8, 6))
    per_value = dict(x, beta=torch.rand(2, 20, 4, 6, dtype=torch.float64, requires_grad=True))
    for y in (x, per_value):
        both = loop(**dict(y, g=x["g"][..., None] + gk))
        check(ops.fused_recurrent_gated_delta_rule(**y, gk=gk, output_final_state=True), both, y.values())
        all_three = loop(**dict(y, g=x["g"][..., None] + gk), gv=gv)
        check(ops.fused_recurrent_gated_delta_rule(**y, gk=gk, gv=gv, output_final_state=True), all_three, y.values())
    packed = {n: t.detach().reshape(1, 40, *t.shape[2:]) for n, t in x.items() if n != "initial_state"}
    o, s = ops.fused_recurrent_gated_delta_rule(
        **packed,
        gv=gv.reshape(1, 40, 4, 6),
        initial_state=x["initial_state"].mT,
        state_v_first=True,
        output_final_state=True,
        cu_seqlens=torch.tensor([0, 20, 40]),
    )
    check((o.view(2, 20, 4, 6), s.mT), loop(**x, gv=gv))
    with pytest.raises(ValueError, match=r"gv must be \[2, 20, 4, 6\], got \[2, 20, 4, 5\]"):
        ops.fused_recurrent_gated_delta_rule(**x, gv=gv[..., :5])
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 40, got \[0, 30, 20, 40\]"):
        cu_seqlens = torch.tensor([0, 30, 20, 40])
        ops.fused_recurrent_gated_delta_rule(**packed, gv=gv.reshape(1, 40, 4, 6), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("strength", [0.1, 3.0, 30.0, 500.0, float("inf")])
def test_decays_per_value_channel_of_any_strength(strength):
    T = 70
    x = inputs(T=T)
    gv = torch.zeros(2, T, 4, 6, dtype=torch.float64)
    gv[:, ::3] = -strength * torch.rand(2, (T + 2) // 3, 4, 6, dtype=torch.float64)
    gv.requires_grad_(strength < 100)
    leaves = [*x.values(), *([gv] if gv.requires_grad else [])]
    expected = loop(**x, gv=gv)
    check(ops.fused_recurrent_gated_delta_rule(**x, gv=gv, output_final_state=True), expected, leaves)
    single = {n: t.detach().float() for n, t in x.items()}
    o, s = ops.fused_recurrent_gated_delta_rule(**single, gv=gv.detach().float(), output_final_state=True)
    torch.testing.assert_close(o.double(), expected[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s.double(), expected[1].detach(), rtol=1e-4, atol=1e-5)
    assert ops.fused_recurrent_gated_delta_rule(**single, gv=gv.detach().float())[1] is None


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("lower_bound", [None, -3.0, "no A_log"])
def test_kda(name, lower_bound):
    x = inputs(per_channel=True)
    A_log, dt_bias = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (4, 32))
    shifted = x["g"] + dt_bias.view(4, 8)
    leaves = [*x.values(), dt_bias, A_log]
    if lower_bound is None:
        g = -A_log.exp()[:, None] * F.softplus(shifted)
    elif lower_bound == "no A_log":
        lower_bound, A_log = -4.0, None
        g = lower_bound * shifted.sigmoid()
        leaves.pop()
    else:
        g = lower_bound * (A_log.exp()[:, None] * shifted).sigmoid()
    result = getattr(ops, name)(
        **x, output_final_state=True, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound
    )
    check(result, loop(**dict(x, g=g)), leaves)
    # fla's checkpoints have them as [1,1,HV,1] and [HV,K].
    gate = dict(A_log=A_log if A_log is None else A_log.view(1, 1, 4, 1), dt_bias=dt_bias.view(4, 8))
    again = getattr(ops, name)(**x, use_gate_in_kernel=True, lower_bound=lower_bound, **gate)
    torch.testing.assert_close(again[0], result[0])
    with pytest.raises(ValueError, match=rf"\[{name}\] dt_bias must be"):
        getattr(ops, name)(**x, use_gate_in_kernel=True, lower_bound=-1.0, dt_bias=dt_bias[:5])


def test_the_recurrent_forms_mix_dtypes():
    x = {n: t.detach().float() for n, t in inputs().items()}
    low = x["v"].half()
    o, _ = ops.fused_recurrent_gated_delta_rule(**dict(x, v=low))
    assert o.dtype == torch.float16
    torch.testing.assert_close(o, ops.fused_recurrent_gated_delta_rule(**dict(x, v=low.float()))[0].half())


def test_delta_rule_without_decay():
    x = inputs()
    del x["g"]
    for op in (ops.chunk_delta_rule, ops.fused_recurrent_delta_rule):
        check(op(**x, output_final_state=True), loop(**x), x.values())


def test_simple_gla():
    x = inputs()
    del x["beta"]
    gamma = -torch.rand(4, dtype=torch.float64)
    both = loop(**dict(x, g=x["g"] + gamma), erase=False)
    check(ops.chunk_simple_gla(**x, g_gamma=gamma, output_final_state=True), both, x.values())
    v_first = dict(x, g=None, initial_state=x["initial_state"].mT)
    o, s = ops.chunk_simple_gla(**v_first, output_final_state=True, state_v_first=True)
    check((o, s.mT), loop(**dict(x, g=None), erase=False))


def test_the_recurrent_forms_without_erase():
    x = inputs()
    del x["beta"]
    g, S0 = x.pop("g"), x["initial_state"]
    leaves = [*x.values(), g]
    keep = dict(output_final_state=True)
    check(ops.fused_recurrent_simple_gla(**x, g=g, **keep), loop(**x, g=g, erase=False), leaves)
    gk, gv = (-torch.rand(2, 20, 4, n, dtype=torch.float64) for n in (8, 6))
    by_key = loop(**x, g=gk, erase=False)
    check(ops.chunk_gla(**x, g=gk, **keep), by_key, x.values())
    check(ops.fused_recurrent_gla(**x, gk=gk, **keep), by_key, x.values())
    check(ops.fused_recurrent_gla(**x, gk=gk, gv=gv, **keep), loop(**x, g=gk, gv=gv, erase=False), x.values())
    v_first = dict(x, initial_state=S0.mT)
    o, s = ops.fused_recurrent_gla(**v_first, gk=gk, gv=gv, state_v_first=True, **keep)
    check((o, s.mT), loop(**x, g=gk, gv=gv, erase=False))
    # Backwards: the same on the tokens in the opposite order, packed or not.
    turned = {n: t if n == "initial_state" else t.flip(1) for n, t in x.items()}
    o, s = loop(**turned, g=g.flip(1), erase=False)
    check(ops.fused_recurrent_simple_gla(**x, g=g, reverse=True, **keep), (o.flip(1), s), leaves)
    packed = {n: t if n == "initial_state" else t.reshape(1, 40, *t.shape[2:]) for n, t in (x | {"g": g}).items()}
    cu_seqlens = torch.tensor([0, 20, 40])
    back = ops.fused_recurrent_simple_gla(**packed, reverse=True, cu_seqlens=cu_seqlens, **keep)
    check((back[0].view_as(o), back[1]), (o.flip(1), s), leaves)
    with pytest.raises(ValueError, match=r"\[chunk_gla\] g must be \[B,T,HV,K\], got \[2, 20, 4\]"):
        ops.chunk_gla(**x, g=g)
    with pytest.raises(ValueError, match=r"\[fused_recurrent_simple_gla\] g must be \[B,T,HV\], got \[2, 20, 4, 8\]"):
        ops.fused_recurrent_simple_gla(**x, g=gk)
    with pytest.raises(ValueError, match=r"^\[fused_recurrent_gla\] v must"):
        ops.fused_recurrent_gla(x["q"], x["k"], x["v"][:, :5], gk)


def test_retention():
    x = inputs(HV=2)
    del x["g"], x["beta"]
    decay = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64).log()
    expected = loop(**x, g=decay.expand(2, 20, 2), erase=False)
    for op in (ops.chunk_retention, ops.fused_recurrent_retention):
        for a, e in zip(op(**x, output_final_state=True), expected):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)  # the decays are float32, as in fla
        assert op(**x)[1] is None


def test_linear_attention_in_two_parts():
    x = inputs(HV=2)
    q, k, v = x["q"], x["k"], x["v"]
    S0, z0 = x["initial_state"], torch.rand(2, 1, 2, 8, dtype=torch.float64, requires_grad=True)
    z = z0 + k.cumsum(1)
    o, S = loop(q, k, v, initial_state=S0, erase=False)
    expected = o / ((q * 8**-0.5 * z).sum(-1, keepdim=True) + 1e-10)
    first, (S1, z1) = ops.chunk_linear_attn(*(t[:, :13] for t in (q, k, v)), None, (S0, z0), output_final_state=True)
    second, (S2, z2) = ops.chunk_linear_attn(*(t[:, 13:] for t in (q, k, v)), None, (S1, z1), output_final_state=True)
    check((torch.cat([first, second], 1), S2, z2), (expected, S, z[:, -1:]), [q, k, v, S0, z0])
    assert ops.chunk_linear_attn(q, k, v, normalize=False)[1] is None
    third = ops.fused_recurrent_linear_attn(q, k, v, None, (S0, z0), True, normalize=True)
    check((third[0], *third[1]), (expected, S, z[:, -1:]), [q, k, v, S0, z0])
    check(ops.fused_recurrent_linear_attn(q, k, v, None, S0, True), (o, S), [q, k, v, S0])


def test_step_follows_the_recurrence():
    x = {name: t.detach() for name, t in inputs(T=3).items()}
    expected_o, expected_s = loop(**x)
    pool = torch.zeros(5, 4, 8, 6, dtype=torch.float64)
    slots = torch.tensor([4, 1])
    pool[slots] = x.pop("initial_state")
    for t in range(3):
        o = ops.gated_delta_rule_step_(*(x[n][:, t] for n in ("q", "k", "v", "g", "beta")), pool, slots)
        torch.testing.assert_close(o, expected_o[:, t])
    torch.testing.assert_close(pool[slots], expected_s)
    assert not pool[[0, 2, 3]].any()


def test_convolution_parts_packing_and_update():
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (5,)))
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), w[:, None], b, groups=5)).mT
    check([ops.causal_conv1d(x, w, b, activation="silu")[0]], [expected], (x, w, b))
    check([ops.causal_conv1d(x, w, b, residual=x, activation="swish")[0]], [expected + x], (x, w, b))
    head, state = ops.causal_conv1d(x[:, :5], w, b, activation="silu", output_final_state=True)
    with torch.no_grad():
        outs = [head]
        for t in range(5, 9):
            y, same = ops.causal_conv1d_update(x[:, t : t + 1], state, weight=w, bias=b, activation="silu")
            assert same is state
            outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    cu = torch.tensor([0, 4, 18], dtype=torch.int32)
    y, _ = ops.causal_conv1d(x.reshape(1, 18, 5), w, b, activation="silu", cu_seqlens=cu)
    torch.testing.assert_close(y[:, :4], expected[:1, :4])
    with torch.no_grad():
        y, _ = ops.causal_conv1d_update(x[:1, :2], state, weight=w, residual=x[:1, :2])  # packed: two sequences
    assert y.shape == (1, 2, 5)


def test_norms():
    x, g, r = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def rms(x, eps):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    check([ops.l2norm(x)], [x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()], [x])
    check([ops.rms_norm_gated(x, g, w, None)], [rms(x, 1e-6) * w * F.silu(g)], [x, g, w])
    y = ops.rms_norm_gated(x, g, w, b, "sigmoid", r, prenorm=True)
    check(y, [(rms(x + r, 1e-6) * w + b) * g.sigmoid(), x + r], [x, g, w, b, r])
    check(ops.rms_norm(x, w, b, r, prenorm=True), [rms(x + r, 1e-5) * w + b, x + r], [x, w, b, r])
    check([ops.rms_norm(x, None)], [rms(x, 1e-5)], [x])
    assert ops.l2norm(x, output_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_and_strides(dtype):
    x = inputs(T=70, K=16, V=16)
    expected_o, expected_s = loop(**x)
    low = {n: t.detach().to(dtype) for n, t in x.items()}
    low["q"] = low["q"].transpose(1, 2).contiguous().transpose(1, 2)  # heads outside tokens
    low["v"] = torch.cat([low["v"], low["v"]], -1)[..., :16]  # gaps between rows
    o, s = ops.chunk_gated_delta_rule(**low, output_final_state=True)
    assert o.dtype == dtype and s.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (o - expected_o).norm() < tolerance * expected_o.norm()
    assert (s - expected_s).norm() < tolerance * expected_s.norm()


def test_compiles_as_a_full_graph_with_dynamic_shapes():
    def f(q, k, v, g, beta, initial_state):
        a, s = ops.chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        b, _ = ops.fused_recurrent_kda(q, k, a, g[..., None].expand(*g.shape, 8), beta)
        return ops.rms_norm_gated(b, v, None).sum() + s.square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (9, 33):
        x = inputs(T=T)
        torch.testing.assert_close(compiled(**x), f(**x))
        grads, wanted = (torch.autograd.grad(side(**x), list(x.values())) for side in (compiled, f))
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want)


def test_errors_have_the_right_class_and_one_line():
    x = {n: t.detach().float() for n, t in inputs().items()}
    q, k, v, g, beta, s0 = x.values()

    def error(kind, text, f, *args, **kwargs):
        with pytest.raises(kind) as caught:
            f(*args, **kwargs)
        assert text in str(caught.value) and "\n" not in str(caught.value), caught.value

    chunk, recurrent = ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule
    error(
        ValueError,
        "[chunk_gated_delta_rule] k must be [B,T,H,K] = [2, 20, 2, 8], got [2, 20, 1, 8]",
        chunk,
        q,
        k[:, :, :1],
        v,
        g,
        beta,
    )
    error(ValueError, "HV=3 and H=2", chunk, q, k, v[:, :, :3], g[:, :, :3], beta[:, :, :3])
    error(ValueError, "B must be 1 with cu_seqlens, got 2", chunk, q, k, v, g, beta, cu_seqlens=torch.tensor([0, 20]))
    one = [t[:1] for t in (q, k, v, g, beta)]
    error(ValueError, "never decrease, got 9 then 3", chunk, *one, cu_seqlens=torch.tensor([0, 9, 3, 20]))
    error(
        TypeError,
        "cu_seqlens must be int32 or int64, got torch.float32",
        chunk,
        *one,
        cu_seqlens=torch.tensor([0.0, 20]),
    )
    error(TypeError, "q must be float32, float64, bfloat16 or float16, got torch.int64", chunk, q.long(), k, v, g, beta)
    error(TypeError, "k must have the dtype of q (torch.float32), got torch.float64", chunk, q, k.double(), v, g, beta)
    error(TypeError, "beta must be a torch.Tensor, got float", chunk, q, k, v, g, 0.5)
    error(ValueError, "needs A_log", chunk, q, k, v, g, beta, use_gate_in_kernel=True)
    error(ValueError, "needs use_beta_sigmoid_in_kernel", chunk, q, k, v, g, beta, allow_neg_eigval=True)
    error(ValueError, "chunk_size must be 16, 32 or 64, got 48", chunk, q, k, v, g, beta, chunk_size=48)
    error(ValueError, "chunk_size must be 32 or 64, got 16", ops.chunk_kda, q, k, v, g[..., None], beta, chunk_size=16)
    error(ValueError, "cp_context", chunk, q, k, v, g, beta, cp_context=object())
    error(ValueError, "cannot both be given", chunk, q, k, v, g, beta, state_v_first=True, transpose_state_layout=True)
    error(DeprecationWarning, "head_first has been removed", chunk, q, k, v, g, beta, head_first=True)
    error(TypeError, "unexpected keyword argument 'gatte'", recurrent, q, k, v, gatte=g)
    error(ValueError, "[chunk_kda] g must be [B,T,HV,K], got [2, 20, 4]", ops.chunk_kda, q, k, v, g, beta)
    error(
        ValueError,
        "lower_bound must be in [-5,0), got -9",
        ops.chunk_kda,
        q,
        k,
        v,
        g[..., None].expand(-1, -1, -1, 8),
        beta,
        use_gate_in_kernel=True,
        safe_gate=True,
        lower_bound=-9,
    )
    error(ValueError, "[N,HV,K,V] = [2, 4, 8, 6]", chunk, q, k, v, g, beta, initial_state=s0[:1])
    error(ValueError, "weight must be given", ops.causal_conv1d, v)
    error(ValueError, "activation must be", ops.causal_conv1d, q[:, :, 0], torch.ones(8, 4), activation="gelu")
    error(
        RuntimeError,
        "no gradient",
        ops.causal_conv1d_update,
        q[:, :1, 0],
        torch.zeros(2, 8, 4),
        weight=torch.ones(8, 4, requires_grad=True),
    )
    error(ValueError, "a power of 2, got 24", ops.chunk_simple_gla, q, k, v, g, chunk_size=24)
    error(ValueError, "g must be on the device of q (cpu), got meta", recurrent, q, k, v, g=g.to("meta"))
    error(
        ValueError, "weight must be on the device of x", ops.causal_conv1d, v[:, :, 0], torch.ones(6, 4, device="meta")
    )
    error(ValueError, "g must be on the device of x", ops.rms_norm_gated, q, k.to("meta"), None)
    error(ValueError, "with data, got meta", chunk, *one, cu_seqlens=torch.tensor([0, 20], device="meta"))
    with pytest.warns(DeprecationWarning, match="renamed to `state_v_first`"):
        chunk(q, k, v, g, beta, initial_state=s0.mT, transpose_state_layout=True)


def test_function_transforms_are_refused_by_name():
    x = inputs()
    q = x.pop("q")
    with pytest.raises(RuntimeError, match=r"torch.func transforms are not supported"):
        torch.func.grad(lambda q: ops.chunk_gated_delta_rule(q, **x)[0].sum())(q.detach())


def test_what_is_not_wrapped_is_torchs():
    assert ops.delta_rule is torch.ops.gdn.delta_rule
    with pytest.raises(AttributeError):
        ops.no_such_operator  # noqa: B018
