# SPDX-License-Identifier: Apache-2.0
"""The delta rule's ops from Python: schema, fake tensors, autograd, torch.compile and errors."""

import itertools
import os
import pathlib

import pytest
import torch

LIBRARY = os.environ.get("GDN_LIBRARY", str(pathlib.Path(__file__).resolve().parents[2] / "build" / "libgdn.so"))
torch.ops.load_library(LIBRARY)
gdn = torch.ops.gdn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def loop(q, k, v, g=None, beta=None, a=None, p=None, scale=None, initial_state=None, erase="key"):
    """The recurrence as written in gdn/kernels/delta_rule/delta_rule.h, in torch."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale

    def heads(x):
        return x.repeat_interleave(HV // H, 2)

    q, k = heads(q), heads(k)
    key = {"key": k, "none": torch.zeros_like(k)}.get(erase)
    if key is None:
        key = heads(a)
    S = q.new_zeros(B, HV, K, V) if initial_state is None else initial_state
    outs = []
    for t in range(T):
        old = S
        if g is not None:
            decay = g[:, t].exp()
            S = S * (decay[..., None, None] if g.dim() == 3 else decay[..., None])
        if erase == "separate":
            read = torch.einsum("bhkv,bhk->bhv", old, key[:, t])
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            S = S + torch.einsum("bhk,bhv->bhkv", heads(p)[:, t], read)
        else:
            u = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, key[:, t])
            if beta is not None:
                u = u * beta[:, t][..., None]
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outs, 1), S


def inputs(B=2, T=7, H=2, HV=4, K=3, V=5, gate="scalar", dtype=torch.float64, seed=0):
    r = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=r, dtype=dtype)

    x = {
        "q": rand(B, T, H, K),
        "k": torch.nn.functional.normalize(rand(B, T, H, K), dim=-1),
        "v": rand(B, T, HV, V),
        "beta": torch.rand(B, T, HV, generator=r, dtype=dtype) * 1.8,
        "initial_state": rand(B, HV, K, V),
    }
    if gate == "scalar":
        x["g"] = -torch.rand(B, T, HV, generator=r, dtype=dtype)
    if gate == "channel":
        x["g"] = -torch.rand(B, T, HV, K, generator=r, dtype=dtype)
    return {name: t.requires_grad_() for name, t in x.items()}


MEMBERS = [(gate, erase) for gate in ("none", "scalar", "channel") for erase in ("none", "key", "own", "separate")]


def member(gate, erase, **sizes):
    x = inputs(gate=gate, **sizes)
    if erase in ("own", "separate"):
        x["a"] = (x["k"].detach() * 0.7).requires_grad_()
    if erase == "separate":
        x["p"] = (x["k"].detach() * -0.5).requires_grad_()
        del x["beta"]
    return x


@pytest.mark.parametrize("form", ["chunk", "recurrent", "naive"])
@pytest.mark.parametrize("gate,erase", MEMBERS)
def test_values_and_gradients_equal_the_loop(gate, erase, form):
    x = member(gate, erase, T=37)
    o, s, _ = gdn.delta_rule(**x, erase=erase, form=form, chunk_size=16, output_final_state=True)
    expected_o, expected_s = loop(**x, erase=erase)
    torch.testing.assert_close(o, expected_o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s, expected_s, rtol=1e-9, atol=1e-9)
    do, ds = torch.randn_like(o), torch.randn_like(s)
    grads = torch.autograd.grad((o * do).sum() + (s * ds).sum(), list(x.values()))
    expected = torch.autograd.grad((expected_o * do).sum() + (expected_s * ds).sum(), list(x.values()))
    for name, grad, want in zip(x, grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-8, msg=f"gradient of {name}")


@pytest.mark.parametrize("gate,erase", [("scalar", "key"), ("channel", "separate")])
def test_gradcheck(gate, erase):
    x = member(gate, erase, B=1, T=4, H=1, HV=2, K=2, V=3)
    names = list(x)

    def f(*tensors):
        return gdn.delta_rule(**dict(zip(names, tensors, strict=True)), erase=erase, output_final_state=True)[:2]

    assert torch.autograd.gradcheck(f, tuple(x.values()))


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_gradients(output):
    x = member("scalar", "key")
    out = gdn.delta_rule(**x, output_final_state=True)[output].sum()
    expected = loop(**x)[output].sum()
    grads = torch.autograd.grad(out, list(x.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(x.values()), allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if want is None else want)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_opcheck(form):
    x = member("scalar", "key")
    torch.library.opcheck(gdn.delta_rule.default, (), {**x, "form": form, "output_final_state": True})
    x = member("channel", "own")
    torch.library.opcheck(gdn.delta_rule.default, (), {**x, "form": form, "erase": "own"})


def test_opcheck_packed_backward_and_step():
    x = {name: t.detach() for name, t in inputs(B=1, T=9).items()}
    state = x.pop("initial_state").expand(3, -1, -1, -1).contiguous()
    cu = torch.tensor([0, 4, 4, 9])
    torch.library.opcheck(gdn.delta_rule.default, (), {**x, "initial_state": state, "cu_seqlens": cu})
    do = torch.randn_like(x["v"])
    saved = torch.empty(0, dtype=do.dtype)
    torch.library.opcheck(
        gdn.delta_rule_bwd.default,
        (do, None, x["q"], x["k"], x["v"], x["g"], x["beta"], None, None, None, state, cu, saved, "key", "chunk", 0),
    )
    one = {name: t[0] for name, t in x.items()}
    pool = torch.randn(12, *state.shape[1:], dtype=do.dtype)
    torch.library.opcheck(
        gdn.delta_rule_step_.default,
        (
            one["q"],
            one["k"],
            one["v"],
            one["g"],
            one["beta"],
            None,
            None,
            pool,
            torch.tensor([3, -1, 0, 11, 5, 6, 7, 8, 9]),
        ),
    )


def test_a_saved_forward_serves_backward():
    x = {name: t.detach() for name, t in inputs(T=40).items()}
    o, _, saved = gdn.delta_rule(**x, save=True)
    assert saved.numel() > 0
    assert gdn.delta_rule(**x)[2].numel() == 0
    do = torch.randn_like(o)

    def backward(saved):
        return gdn.delta_rule_bwd(
            do,
            None,
            x["q"],
            x["k"],
            x["v"],
            x["g"],
            x["beta"],
            None,
            None,
            None,
            x["initial_state"],
            None,
            saved,
            "key",
            "chunk",
            0,
        )

    for a, b in zip(backward(saved), backward(saved.new_empty(0)), strict=True):
        assert torch.equal(a, b)


def test_backward_twice_says_so():
    x = member("scalar", "key")
    o = gdn.delta_rule(**x)[0]
    (dq,) = torch.autograd.grad(o.sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"delta_rule_bwd.*not implemented"):
        dq.sum().backward()


def test_packed_equals_separate():
    x = inputs(B=1, T=50)
    initial = torch.randn(4, 4, 3, 5, dtype=torch.float64)
    x["initial_state"] = initial
    ends = [0, 17, 17, 18, 50]
    for form in ("chunk", "recurrent", "naive"):
        o, s, _ = gdn.delta_rule(
            **x, cu_seqlens=torch.tensor(ends, dtype=torch.int32), form=form, output_final_state=True
        )
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            part = {key: t[:, begin:end] for key, t in x.items() if key != "initial_state"}
            if begin == end:
                assert torch.equal(s[n], initial[n])
                continue
            expected_o, expected_s = loop(**part, initial_state=initial[n : n + 1])
            torch.testing.assert_close(o[:, begin:end], expected_o, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(s[n : n + 1], expected_s, rtol=1e-9, atol=1e-9)


def l2norm(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def gated_in_kernel(x):
    """Arguments for raw gates, and what the loop gets for them."""
    A_log, dt_bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    raw = dict(x, g=x["g"] * 3, beta=x["beta"] * 3 - 2, q=x["q"] * 2, k=x["k"] * 3)
    cooked = dict(
        raw,
        q=l2norm(raw["q"]),
        k=l2norm(raw["k"]),
        g=-A_log.exp() * torch.nn.functional.softplus(raw["g"] + dt_bias),
        beta=2 * raw["beta"].sigmoid(),
    )
    flags = dict(
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
    )
    return raw, cooked, flags


def ordered(x, *names):
    x = dict(x)
    return [x.pop(name) for name in names], x


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule_with_everything_in_kernel(name, v_first):
    raw, cooked, flags = gated_in_kernel(inputs(T=21))
    expected_o, expected_s = loop(**cooked, scale=0.3)
    if v_first:
        raw["initial_state"] = raw["initial_state"].transpose(2, 3)
        expected_s = expected_s.transpose(2, 3)
    (q, k, v), rest = ordered(raw, "q", "k", "v")
    o, s = getattr(gdn, name)(q, k, v, **rest, **flags, scale=0.3, output_final_state=True, state_v_first=v_first)
    torch.testing.assert_close(o, expected_o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s, expected_s, rtol=1e-9, atol=1e-9)


def test_recurrent_channel_gate_adds_up():
    x = inputs(T=6)
    gk = -torch.rand(2, 6, 4, 3, dtype=torch.float64)
    o, _ = gdn.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], g=x["g"], gk=gk, beta=x["beta"])
    expected, _ = loop(x["q"], x["k"], x["v"], x["g"][..., None] + gk, x["beta"])
    torch.testing.assert_close(o, expected)
    o, _ = gdn.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"])  # grouped values, no beta
    torch.testing.assert_close(o, loop(x["q"], x["k"], x["v"])[0])


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_kda_gate_in_kernel(lower_bound):
    x = inputs(gate="channel", T=20)
    A_log = torch.randn(4, dtype=torch.float64)
    dt_bias = torch.randn(12, dtype=torch.float64)
    shifted = x["g"] + dt_bias.view(4, 3)
    if lower_bound is None:
        g = -A_log.exp()[:, None] * torch.nn.functional.softplus(shifted)
    else:
        g = lower_bound * torch.sigmoid(A_log.exp()[:, None] * shifted)
    o, s = gdn.chunk_kda(
        x["q"],
        x["k"],
        x["v"],
        x["g"],
        x["beta"],
        initial_state=x["initial_state"],
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        safe_gate=lower_bound is not None,
        lower_bound=lower_bound,
        output_final_state=True,
    )
    expected_o, expected_s = loop(**dict(x, g=g))
    torch.testing.assert_close(o, expected_o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s, expected_s, rtol=1e-9, atol=1e-9)


def test_the_rest_of_the_family():
    x = member("channel", "separate", T=19)
    q, k, v, g, s0 = x["q"], x["k"], x["v"], x["g"], x["initial_state"]
    beta = torch.rand(2, 19, 4, dtype=torch.float64)
    more = dict(initial_state=s0, output_final_state=True)

    def check(result, expected):
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    check(
        gdn.chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True, **more),
        loop(l2norm(q), l2norm(k), v, beta=beta, initial_state=s0),
    )
    plain = loop(q, k, v, initial_state=s0, erase="none")
    check(gdn.chunk_linear_attn(q, k, v, normalize=False, **more), plain)
    scores = (q.repeat_interleave(2, 2) * k.repeat_interleave(2, 2).cumsum(1)).sum(-1) * 3**-0.5
    o, s = gdn.chunk_linear_attn(q, k, v, **more)
    check((o, s), (plain[0] / (scores[..., None] + 1e-10), plain[1]))
    scalar = g[..., 0]
    check(
        gdn.chunk_simple_gla(q, k, v, scalar, **more),
        loop(q, k, v, scalar, initial_state=s0, erase="none"),
    )
    check(gdn.chunk_gla(q, k, v, g, **more), loop(q, k, v, g, initial_state=s0, erase="none"))
    check(
        gdn.chunk_dplr_delta_rule(q, k, v, x["a"], x["p"], g, **more),
        loop(q, k, v, g, a=x["a"], p=x["p"], initial_state=s0, erase="separate"),
    )
    check(
        gdn.naive_gated_delta_rule(q, k, v, scalar, beta, **more),
        loop(q, k, v, scalar, beta, initial_state=s0),
    )


def test_step_in_a_pool():
    x = {name: t.detach() for name, t in inputs(B=3, T=2).items()}
    pool = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    before = pool.clone()
    slots = torch.tensor([5, -1, 2])
    expected_o, expected_s = loop(**dict(x, initial_state=before[[5, 0, 2]]))
    for t in range(2):
        token = {name: x[name][:, t] for name in ("q", "k", "v", "g", "beta")}
        o = gdn.gated_delta_rule_step_(**token, state=pool, slots=slots)
        torch.testing.assert_close(o[[0, 2]], expected_o[[0, 2], t], rtol=1e-9, atol=1e-9)
        assert torch.equal(o[1], torch.zeros_like(o[1]))
    torch.testing.assert_close(pool[[5, 2]], expected_s[[0, 2]], rtol=1e-9, atol=1e-9)
    others = [0, 1, 3, 4]
    assert torch.equal(pool[others], before[others])


def test_beta_per_value_channel():
    x = member("scalar", "key", T=40)
    x["beta"] = torch.rand(2, 40, 4, 5, dtype=torch.float64, requires_grad=True)
    (q, k, v), rest = ordered(x, "q", "k", "v")
    o, s, _ = gdn.delta_rule(q, k, v, **rest, output_final_state=True)
    # One value channel is a recurrence of its own, with a beta per token.
    for j in range(5):
        one = dict(
            x, v=x["v"][..., j : j + 1], beta=x["beta"][..., j], initial_state=x["initial_state"][..., j : j + 1]
        )
        expected_o, expected_s = loop(**one)
        torch.testing.assert_close(o[..., j : j + 1], expected_o, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(s[..., j : j + 1], expected_s, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(o)
    (d_beta,) = torch.autograd.grad(o, x["beta"], grad)
    naive = gdn.delta_rule(q, k, v, **rest, form="naive")[0]
    (expected,) = torch.autograd.grad(naive, x["beta"], grad)
    torch.testing.assert_close(d_beta, expected, rtol=1e-9, atol=1e-9)


def test_bf16_states_in_a_pool():
    x = {name: t.detach().float() for name, t in inputs(B=3, T=1).items()}
    token = {name: x[name][:, 0] for name in ("q", "k", "v", "g", "beta")}
    pool = torch.randn(3, 4, 3, 5).bfloat16()
    exact = pool.float()
    o = gdn.gated_delta_rule_step_(**token, state=pool)
    expected = gdn.gated_delta_rule_step_(**token, state=exact)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool, exact.bfloat16(), rtol=2**-7, atol=0)


def test_step_refuses_gradients():
    x = inputs(B=1, T=1)
    token = {name: x[name][:, 0] for name in ("q", "k", "v", "g", "beta")}
    with pytest.raises(RuntimeError, match="is not differentiable: call it under no_grad"):
        gdn.gated_delta_rule_step_(**token, state=torch.zeros(1, 4, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    x = {name: t.detach() for name, t in inputs(T=70, K=16, V=8).items()}
    x["q"], x["k"], x["v"] = (x[name].to(dtype) for name in ("q", "k", "v"))
    wide = {name: t.double() for name, t in x.items()}
    (q, k, v), rest = ordered(x, "q", "k", "v")
    o, s = gdn.chunk_gated_delta_rule(q, k, v, **rest, output_final_state=True)
    assert o.dtype == dtype and s.dtype == torch.float32
    expected_o, expected_s = loop(**wide)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (o.double() - expected_o).norm() < tolerance * expected_o.norm()
    assert (s.double() - expected_s).norm() < max(tolerance / 10, 1e-5) * expected_s.norm()


@pytest.mark.parametrize("K", [24, 32])  # one of which may be multiplied as bf16
def test_bfloat16_gradients(K):
    names = ("q", "k", "v", "g", "beta", "initial_state")
    x = {name: t.detach() for name, t in inputs(T=70, K=K, V=32).items()}
    x = {name: t.bfloat16() if name in ("q", "k", "v") else t.float() for name, t in x.items()}
    results = []
    for f, dtype in ((gdn.chunk_gated_delta_rule, None), (loop, torch.float64)):
        leaves = {name: x[name].to(dtype or x[name].dtype, copy=True).requires_grad_() for name in names}
        (q, k, v), rest = ordered(leaves, "q", "k", "v")
        o, s = f(q, k, v, **rest, **({"output_final_state": True} if dtype is None else {}))
        weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).reshape(o.shape).bfloat16()
        (o * weight.to(o.dtype)).sum().add(s.sin().sum()).backward()
        results.append([o, s, *(leaf.grad for leaf in leaves.values())])
    for name, got, expected in zip(("o", "s", *names), *results):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 6e-3, f"{name}: {error}"


def test_compile_with_dynamic_shapes():
    def f(q, k, v, g, beta, initial_state, A_log, dt_bias):
        o, s = gdn.chunk_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=A_log,
            dt_bias=dt_bias,
        )
        return o.sin().sum() + s.square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 18, 33):
        x = inputs(T=T)
        args = [x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")]
        args += [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        torch.testing.assert_close(compiled(*args), f(*args))
        grads = torch.autograd.grad(compiled(*args), args)
        for grad, want in zip(grads, torch.autograd.grad(f(*args), args), strict=True):
            torch.testing.assert_close(grad, want)


def test_errors_name_op_rule_and_value():
    x = {name: t.detach() for name, t in inputs(T=16).items()}
    q, k, v, g, beta, s0 = (x[n] for n in ("q", "k", "v", "g", "beta", "initial_state"))

    def error(f, text):
        with pytest.raises(RuntimeError) as caught:
            f()
        assert text in str(caught.value), str(caught.value)

    chunk = gdn.chunk_gated_delta_rule
    error(
        lambda: chunk(q, k[:, :, :1], v, g, beta),
        "[chunk_gated_delta_rule] k must be [B,T,H,K] = [2, 16, 2, 3], got [2, 16, 1, 3]",
    )
    error(
        lambda: chunk(q, k, v[:, :, :3], g[:, :, :3], beta[:, :, :3]),
        "the heads of v (HV) must be a multiple of those of q (H), got HV=3 and H=2",
    )
    error(
        lambda: chunk(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 32])),
        "[chunk_gated_delta_rule] B must be 1 with cu_seqlens, got 2",
    )
    error(
        lambda: chunk(q[:1], k[:1], v[:1], g[:1], beta[:1], cu_seqlens=torch.tensor([0, 15])),
        "[chunk_gated_delta_rule] cu_seqlens must end with the number of tokens, 16, got 15",
    )
    error(
        lambda: chunk(q, k, v, g, beta, initial_state=s0[:1]),
        "initial_state must be [N,HV,K,V] = [2, 4, 3, 5], got [1, 4, 3, 5]",
    )
    error(
        lambda: chunk(q, k, v, g, beta, initial_state=s0, state_v_first=True),
        "initial_state must be [N,HV,K,V] = [2, 4, 3, 5], got [2, 4, 5, 3]",
    )
    error(lambda: chunk(q, k, v, g, beta, chunk_size=48), "chunk_size must be 16, 32, 64 or 0")
    error(lambda: chunk(q, k.float(), v, g, beta), "k must have the dtype of q (Double), got Float")
    error(lambda: chunk(q.long(), k.long(), v.long(), g, beta), "q must be float32, float64")
    error(
        lambda: chunk(q, k, v, g, beta, allow_neg_eigval=True),
        "allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True",
    )
    error(lambda: chunk(q, k, v, g, beta, use_gate_in_kernel=True), "use_gate_in_kernel=True needs A_log")
    error(lambda: chunk(q, k, v, g[:, :, :2], beta), "g must be [B,T,HV] = [2, 16, 4], got [2, 16, 2]")
    error(lambda: gdn.chunk_kda(q, k, v, g, beta), "[chunk_kda] g must be [B,T,HV,K], got [2, 16, 4]")
    error(
        lambda: gdn.chunk_kda(q, k, v, g[..., None].expand(-1, -1, -1, 2), beta),
        "[chunk_kda] g must be [B,T,HV,K] = [2, 16, 4, 3], got [2, 16, 4, 2]",
    )
    error(
        lambda: gdn.delta_rule(q, k, v, erase="sometimes"),
        "[delta_rule] erase must be none, key, own or separate, got sometimes",
    )
    error(lambda: gdn.delta_rule(q, k, v, erase="own"), 'erase "own" takes an a')
    error(lambda: gdn.delta_rule(q.float(), k.float(), v.float(), g=g), "g must be Float for Float q")
    step = gdn.gated_delta_rule_step_
    one = [t[:, 0] for t in (q, k, v, g, beta)]
    error(lambda: step(*one, s0, slots=torch.tensor([0, 2])), "slots must be below the number of slots, 2, got 2")
    error(lambda: step(*one, s0[:1].contiguous()), "[gated_delta_rule_step_] state must hold 2 sequences, got 1")
    error(
        lambda: step(*one, s0.transpose(0, 1).contiguous().transpose(0, 1)),
        "[gated_delta_rule_step_] state must be contiguous",
    )
