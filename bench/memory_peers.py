#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times gdn's test-time memories against plain PyTorch with autograd on the same chunk equations.

Both run forward and backward interleaved in one process, on the same threads and random inputs, and outputs and
gradients are compared first. Prints medians and ratios.

    python bench/memory_peers.py                                # B=8, H=4, head_dim=64, T=512
    python bench/memory_peers.py --seq-len 2048 --threads 1 2 --seconds 10
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from machine import cpu_name  # beside this file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))
import gdn  # noqa: F401  (registers torch.ops.gdn)

CHUNK = 16
CLIP = 10.0


def silu_slope(z):
    r = torch.sigmoid(z)
    return r * (1 + z * (1 - r))


def layer_norm_gradient(z, gain, offset, target, eps=1e-6):
    """Gradient of 1/2 |gain x^ + offset - target|^2 at z, x^ the normed z."""
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    hat = centred * rstd
    e = gain * (gain * hat + offset - target)
    return (e - e.mean(-1, keepdim=True) - hat * (e * hat).mean(-1, keepdim=True)) * rstd


def ttt_linear(q, k, v, eta, tau, W, gain, offset):
    """q, k, v [B,H,T,d], eta [B,H,T], W [B,H,d,d]: the dual form, one mini-batch after another."""
    gain, offset = gain[:, None], offset[:, None]
    outs = []
    for t in range(0, q.shape[2], CHUNK):
        Q, K, V = (x[:, :, t : t + CHUNK] for x in (q, k, v))
        D = layer_norm_gradient(K @ W, gain, offset, V - K)
        om = torch.tril(tau[:, None] * eta[:, :, None, t : t + CHUNK])
        Y = Q @ W - (om * (Q @ K.transpose(-1, -2))) @ D
        outs.append(Q + F.layer_norm(Y, Y.shape[-1:], eps=1e-6) * gain + offset)
        W = W - (om[:, :, -1, :, None] * K).transpose(-1, -2) @ D
    return torch.cat(outs, 2)


def lmm_coefficients(theta, eta, alpha):
    """[B,H,n] each -> Om [n,n], beta, cc, m_to (last row of the momenta), m_n: products of the gates by logarithms."""
    n = theta.shape[-1]
    B, N = torch.cumsum(torch.log1p(-alpha), -1), torch.cumsum(torch.log(eta), -1)
    lower = torch.tril(torch.ones(n, n, dtype=torch.bool))
    decay = torch.exp((B[..., :, None] - B[..., None, :]).masked_fill(~lower, float("-inf")))
    momenta = torch.exp((N[..., :, None] - N[..., None, :]).masked_fill(~lower, float("-inf")))
    m = torch.exp(N)
    om = (decay @ momenta) * theta[..., None, :]
    cc = (decay @ m[..., None])[..., 0]
    return om, torch.exp(B), cc, momenta[..., -1, :] * theta, m[..., -1]


def clipped(x, D):
    norm = x.norm(dim=-1, keepdim=True) * D.norm(dim=-1, keepdim=True)
    return D * (CLIP / norm).clamp(max=1)


def titans_lmm(q, k, v, theta, eta, alpha, W1, W2):
    """Depth 2, SiLU, decay towards the start weights, as the mixer's defaults are."""
    start = (W1, W2)
    M, S = [W1, W2], [torch.zeros_like(W1), torch.zeros_like(W2)]
    outs = []
    for t in range(0, q.shape[2], CHUNK):
        Q, K, V = (x[:, :, t : t + CHUNK] for x in (q, k, v))
        om, beta, cc, kap, m_n = lmm_coefficients(*(x[:, :, t : t + CHUNK] for x in (theta, eta, alpha)))
        Z1 = K @ M[0]
        X1 = F.silu(Z1)
        D2 = 2 * (X1 @ M[1] - V)
        D1 = (D2 @ M[1].transpose(-1, -2)) * silu_slope(Z1)
        Xs, Ds = (K, X1), (clipped(K, D1), clipped(X1, D2))
        A = Q
        new_M, new_S = [], []
        for layer in range(2):
            X, D, W0 = Xs[layer], Ds[layer], start[layer]
            P = om * (A @ X.transpose(-1, -2))
            Y = A @ W0 + beta[..., None] * (A @ (M[layer] - W0)) + cc[..., None] * (A @ S[layer]) - P @ D
            A = F.silu(Y) if layer == 0 else Y
            lam = om[:, :, -1, :, None]
            last = (..., -1, None, None)
            new_M.append(W0 + beta[last] * (M[layer] - W0) + cc[last] * S[layer] - (lam * X).transpose(-1, -2) @ D)
            new_S.append(m_n[..., None, None] * S[layer] - (kap[..., None] * X).transpose(-1, -2) @ D)
        M, S = new_M, new_S
        outs.append(A)
    return torch.cat(outs, 2)


def op(inputs, rule, depth, hidden, loss_scale, clip):
    """inputs: q, k, v, rate, eta, alpha, tau, anchor, norm_weight, norm_bias, memory (torch.ops.gdn's order)."""
    activation = "gelu" if rule == "ttt" else "silu"
    return torch.ops.gdn.test_time_memory(
        [*inputs, None, None, None, None], rule, activation, [depth, hidden, 0, CHUNK, 0, 0], [1e-6, loss_scale, clip]
    )[0]


def leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def ttt_case(B, T, H, d, seed=0):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, d) * 0.5 for _ in range(3))
    eta = torch.rand(B, T, H) / d
    x = leaves(q, k, v, eta, torch.randn(H, d, d) * 0.02, torch.ones(H, d), torch.zeros(H, d))
    tau = 1 / torch.arange(1.0, CHUNK + 1)

    def ours():
        q, k, v, eta, W, gain, offset = x
        memory = W.flatten(1).expand(B, H, d * d)
        return op([q, k, v, eta, None, None, tau, None, gain, offset, memory], "ttt", 1, 0, 1.0, 0.0)

    def plain():
        q, k, v, eta, W, gain, offset = x
        heads = [y.transpose(1, 2) for y in (q, k, v, eta)]
        return ttt_linear(*heads, tau, W.expand(B, H, d, d), gain, offset).transpose(1, 2)

    return "ttt_linear", x, ours, plain


def lmm_case(B, T, H, d, seed=0):
    torch.manual_seed(seed)
    hidden = 4 * d
    q, k = (F.normalize(torch.randn(B, T, H, d), dim=-1) for _ in range(2))
    theta, eta, alpha = torch.rand(B, T, H) * 0.05, torch.rand(B, T, H) * 0.8 + 0.1, torch.rand(B, T, H) * 0.04
    W1, W2 = torch.randn(H, d, hidden) * d**-0.5, torch.randn(H, hidden, d) * hidden**-0.5
    x = leaves(q, k, torch.randn(B, T, H, d) * 0.5, theta, eta, alpha, W1, W2)

    def ours():
        q, k, v, theta, eta, alpha, W1, W2 = x
        start = torch.cat([W1.flatten(1), W2.flatten(1)], 1)
        memory = start.expand(B, H, start.shape[1])
        return op([q, k, v, theta, eta, alpha, None, start, None, None, memory], "lmm", 2, hidden, 2.0, CLIP)

    def plain():
        heads = [y.transpose(1, 2) for y in x[:6]]
        W = [w.expand(B, *w.shape) for w in x[6:]]
        return titans_lmm(*heads, *W).transpose(1, 2)

    return "titans_lmm, depth 2", x, ours, plain


def lmm_flops(d):
    """Of a token and head, forward and backward: passes over the weights (the kernel's README) and the scores."""
    return 25.7 * 2 * 2 * d * 4 * d + 2 * CHUNK * 40 * d


def ttt_flops(d):
    """As above: one layer, no momentum, no anchor: 3 passes forward, 9 backward."""
    return 12 * 2 * d * d + 2 * CHUNK * 8 * d


def gradients(fn, x, grad):
    return torch.autograd.grad(fn(), x, grad)


def check(case, B, T, H, d):
    name, x, ours, plain = case(B, T, H, d)
    grad = torch.randn(B, T, H, d)
    for label, a, b in [("o", ours(), plain()), *zip(range(99), gradients(ours, x, grad), gradients(plain, x, grad))]:
        error = ((a - b).norm() / b.norm()).item()
        if error > 1e-3:
            raise SystemExit(f"memory_peers.py: {name}: the two disagree on {label}: relative error {error:.2e}")


def medians(x, grad, functions, seconds):
    """Median milliseconds of each function's gradients, called in turn for about `seconds` (at least 3 rounds)."""
    times = [[] for _ in functions]
    for fn in functions:
        gradients(fn, x, grad)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for fn, samples in zip(functions, times):
            start = time.perf_counter()
            gradients(fn, x, grad)
            samples.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(samples) for samples in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512, help="a multiple of the chunk, 16")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=6.0, help="measuring time of each row")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file, too")
    args = parser.parse_args()
    shape = (args.batch, args.seq_len, args.heads, args.head_dim)
    print(f"{cpu_name()}, {os.cpu_count()} CPUs; torch {torch.__version__}")
    print(f"B,T,H,d = {shape}, fp32, forward + backward, ms\n")
    print("| memory | threads | gdn | plain PyTorch | ratio | gdn tokens/s | gdn GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for case, flops in ((ttt_case, ttt_flops), (lmm_case, lmm_flops)):
        check(case, 1, 3 * CHUNK, 2, 16)
        for threads in args.threads:
            torch.set_num_threads(threads)
            name, x, ours, plain = case(*shape)
            a, b = medians(x, torch.randn(shape), [ours, plain], args.seconds)
            rate = args.batch * args.seq_len / a * 1e3
            gflops = rate * args.heads * flops(args.head_dim) / 1e9
            print(f"| {name} | {threads} | {a:.1f} | {b:.1f} | {b / a:.1f}x | {rate:.0f} | {gflops:.0f} |", flush=True)
            rows.append({"name": name, "threads": threads, "ms": a, "peer_ms": b, "rate": rate, "gflops": gflops})
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"shape": shape, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
