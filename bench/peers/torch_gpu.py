#!/usr/bin/env python3
"""Times of PyTorch's and mamba_ssm's kernels at the shapes of bench/gpu/gpu_ops.h, on the same GPU in the same run.

    python3 torch_gpu.py kernels --tokens 4096 > peers.tsv    operation <tab> microseconds <tab> who
    python3 torch_gpu.py slice --seq 4096 --rows 2            one JSON object; beside bench_gpu_slice

kernels: the operation's name is bench_gpu_kernels' own; several lines with one name are several peers, and
scripts/gpu_check takes the fastest. CUDA events, median of 20 after 3, L2 overwritten before each, random data.
slice: the layers of torch_train.py under torch.compile, with mamba_ssm's scan and convolution where it is installed.
What is not installed, or refuses a shape, is named on stderr and left out.
--device cpu --small runs everything once with tiny shapes, to see that it works.
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch_train

WIDE = dict(d=4096, ff=14336, vocab=128256, heads=128, p=64, n=128, q=32, kv=8, hd=128, seqs=256, kv_seqs=64, past=4096)
SMALL = dict(d=64, ff=192, vocab=400, heads=8, p=16, n=16, q=4, kv=2, hd=16, seqs=4, kv_seqs=4, past=40)
device = "cuda"


def sync():
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Microseconds of f(), median."""

    def __init__(self, runs):
        self.runs = runs
        self.flush = torch.empty((256 << 20) if device == "cuda" else 4096, dtype=torch.uint8, device=device)

    def __call__(self, f):
        times = []
        for i in range(self.runs + 3):
            self.flush.zero_()
            if device == "cuda":
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                f()
                stop.record()
                stop.synchronize()
                us = 1e3 * start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                f()
                us = 1e6 * (time.perf_counter() - begin)
            if i >= 3:
                times.append(us)
        return statistics.median(times)


def rand(*shape, dtype=torch.bfloat16, grad=False, scale=1.0):
    return (torch.randn(*shape, device=device, dtype=torch.float32) * scale).to(dtype).requires_grad_(grad)


def backward_of(out, *inputs):
    """A function that repeats the backward pass of out."""
    outs = out if isinstance(out, (tuple, list)) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True)


def products(w, t):
    inner = w["heads"] * w["p"]
    for name, n, k in [("gemm in_proj", 2 * inner + 2 * w["n"] + w["heads"], w["d"]), ("gemm gate_up", 2 * w["ff"], w["d"]),
                       ("gemm down", w["d"], w["ff"])]:
        yield name, "torch matmul", lambda n=n, k=k: (lambda a, b: lambda: a @ b.t())(rand(t, k), rand(n, k, scale=0.02))

    def weight_grad():
        a, b = rand(t, 2 * w["ff"]), rand(t, w["d"])
        return lambda: a.t() @ b

    yield "gemm gate_up weight gradient", "torch matmul, bf16 result", weight_grad


def rows(w, t):
    compiled = torch.compile if device == "cuda" else (lambda f: f)

    def norm(r, branch, weight):
        r = r + branch.float()
        return r, (weight * (r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + 1e-5))).to(branch.dtype)

    def norm_forward():
        f, r, b, v = compiled(norm), rand(t, w["d"], dtype=torch.float32), rand(t, w["d"]), torch.ones(w["d"], device=device)
        return lambda: f(r, b, v)

    def norm_backward():
        f = compiled(norm)
        r, b = rand(t, w["d"], dtype=torch.float32, grad=True), rand(t, w["d"], grad=True)
        v = torch.ones(w["d"], device=device, requires_grad=True)
        return backward_of(f(r, b, v), r, b, v)

    def swiglu(x):
        g, u = x.chunk(2, -1)
        return F.silu(g) * u

    def swiglu_forward():
        f, x = compiled(swiglu), rand(t, 2 * w["ff"])
        return lambda: f(x)

    def swiglu_backward():
        x = rand(t, 2 * w["ff"], grad=True)
        return backward_of(compiled(swiglu)(x), x)

    yield "rmsnorm forward", "torch.compile", norm_forward
    yield "rmsnorm backward", "torch.compile", norm_backward
    yield "swiglu forward", "torch.compile", swiglu_forward
    yield "swiglu backward", "torch.compile", swiglu_backward

    def adamw():  # fp32 parameters: torch has no bf16 copy to write, 28 bytes an element instead of 30
        p = torch.nn.Parameter(rand(w["d"] * w["vocab"], dtype=torch.float32, scale=0.02))
        p.grad = torch.randn_like(p)
        optimizer = torch.optim.AdamW([p], lr=1e-4, fused=True)
        return optimizer.step

    yield "adamw", "torch fused", adamw


def loss(w, t):
    name = "head and loss, forward and backward"

    def make(chunk):
        u, weight = rand(t, w["d"], grad=True), rand(w["vocab"], w["d"], scale=0.02, grad=True)
        labels = torch.randint(0, w["vocab"], (t,), device=device)

        def run():
            u.grad = weight.grad = None
            for i in range(0, t, chunk):
                F.cross_entropy((u[i:i + chunk] @ weight.t()).float(), labels[i:i + chunk], reduction="sum").backward()

        return run

    yield name, "torch, 2048 rows at a time", lambda: make(2048)

    def liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        f = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        u, weight = rand(t, w["d"], grad=True), rand(w["vocab"], w["d"], scale=0.02, grad=True)
        labels = torch.randint(0, w["vocab"], (t,), device=device)
        return lambda: f(weight, u, labels).backward()

    yield name, "Liger", liger


def attention(w, t):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    backends = [("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", getattr(SDPBackend, "CUDNN_ATTENTION", None))]

    def make(backend, backward):
        q = rand(1, w["q"], t, w["hd"], grad=backward)
        k, v = (rand(1, w["kv"], t, w["hd"], grad=backward) for _ in range(2))

        def forward():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return backward_of(forward(), q, k, v) if backward else forward

    for who, backend in backends:
        if backend is not None:
            yield "attention forward", who, lambda b=backend: make(b, False)
            yield "attention backward", who, lambda b=backend: make(b, True)

    def fa3(backward):
        from flash_attn_interface import flash_attn_func
        q = rand(1, t, w["q"], w["hd"], grad=backward)
        k, v = (rand(1, t, w["kv"], w["hd"], grad=backward) for _ in range(2))

        def forward():
            out = flash_attn_func(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out

        return backward_of(forward(), q, k, v) if backward else forward

    yield "attention forward", "FlashAttention-3", lambda: fa3(False)
    yield "attention backward", "FlashAttention-3", lambda: fa3(True)

    def decode():
        q = rand(w["kv_seqs"], w["q"], 1, w["hd"])
        k, v = (rand(w["kv_seqs"], w["kv"], w["past"] + 1, w["hd"]) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    yield f"kv attention, {w['kv_seqs']} sequences of {w['past']}", "SDPA, its own choice", decode


def scan(w, t):
    h, p, n = w["heads"], w["p"], w["n"]

    def make(backward):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        x, b, c = rand(1, t, h, p, grad=backward), rand(1, t, 1, n, grad=backward), rand(1, t, 1, n, grad=backward)
        dt = rand(1, t, h, grad=backward)
        a = (-1.0 - 15.0 * torch.rand(h, device=device)).requires_grad_(backward)
        d = torch.ones(h, device=device, requires_grad=backward)
        bias = torch.full((h,), -4.0, device=device, requires_grad=backward)

        def forward():
            return mamba_chunk_scan_combined(x, dt, a, b, c, chunk_size=256, D=d, dt_bias=bias, dt_softplus=True)

        return backward_of(forward(), x, dt, a, b, c, d, bias) if backward else forward

    yield "ssd forward", "mamba_ssm (Triton)", lambda: make(False)
    yield "ssd backward", "mamba_ssm (Triton)", lambda: make(True)

    def step():
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        s = w["seqs"]
        state = rand(s, h, p, n, dtype=torch.float32)
        x, b, c = rand(s, h, p), rand(s, 1, n), rand(s, 1, n)
        dt = rand(s, h)[:, :, None].expand(s, h, p)
        a = (-1.0 - torch.rand(h, device=device))[:, None, None].expand(h, p, n)
        d = torch.ones(h, device=device)[:, None].expand(h, p)
        bias = torch.full((h,), -4.0, device=device)[:, None].expand(h, p)
        return lambda: selective_state_update(state, x, dt, a, b, c, d, dt_bias=bias, dt_softplus=True)

    yield f"ssd step, {w['seqs']} sequences", "mamba_ssm (Triton)", step

    def conv(backward):
        from causal_conv1d import causal_conv1d_fn
        cd = h * p + 2 * n
        x = rand(1, t, cd, grad=backward)
        weight, bias = rand(cd, 4, grad=backward), rand(cd, grad=backward)
        forward = lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
        return backward_of(forward(), x, weight, bias) if backward else forward

    yield "conv1d forward", "causal_conv1d", lambda: conv(False)
    yield "conv1d backward", "causal_conv1d", lambda: conv(True)


def gated(w, t):
    inner = w["heads"] * w["p"]
    compiled = torch.compile if device == "cuda" else (lambda f: f)

    def plain(y, z, weight):
        v = y.float() * F.silu(z.float())
        return (weight * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-5))).to(y.dtype)

    def make(backward):
        y, z = rand(t, inner, grad=backward), rand(t, inner, grad=backward)
        weight = torch.ones(inner, device=device, requires_grad=backward)
        f = compiled(plain)
        return backward_of(f(y, z, weight), y, z, weight) if backward else (lambda: f(y, z, weight))

    yield "gated norm forward", "torch.compile", lambda: make(False)
    yield "gated norm backward", "torch.compile", lambda: make(True)


def kernels(a, w):
    clock = Clock(1 if a.small else 20)
    missed = 0
    for group in (rows, loss, products, attention, scan, gated):
        for name, who, make in group(w, a.tokens):
            try:
                f = make()
                us = clock(f)
                print(f"{name}\t{us:.1f}\t{who}", flush=True)
                del f
            except Exception as e:  # a peer that is not installed, or that refuses the shape, is left out
                missed += 1
                print(f"{name}: {who}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", file=sys.stderr)
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"{missed} peers left out", file=sys.stderr)


class FastMamba(torch_train.Mamba):
    """The mixer with mamba_ssm's and causal_conv1d's kernels."""

    def forward(self, u):
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        b, t, _ = u.shape
        z, xbc, dt = self.in_proj(u).split([self.dI, self.CD, self.H], -1)
        xbc = causal_conv1d_fn(xbc.transpose(1, 2), self.conv.weight.squeeze(1), self.conv.bias, activation="silu").transpose(1, 2)
        x, bb, cc = xbc.split([self.dI, self.G * self.N, self.G * self.N], -1)
        y = mamba_chunk_scan_combined(x.reshape(b, t, self.H, self.P), dt, -torch.exp(self.A_log.float()),
                                      bb.reshape(b, t, self.G, self.N), cc.reshape(b, t, self.G, self.N), chunk_size=256,
                                      D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self.out_proj(torch_train.rms(y.reshape(b, t, self.dI) * F.silu(z), self.norm, self.eps).to(u.dtype))


def slice_(a, w):
    c = {"hidden_size": w["d"], "intermediate_size": w["ff"], "vocab_size": w["vocab"], "num_hidden_layers": 7,
         "attn_layer_indices": [3], "num_attention_heads": w["q"], "num_key_value_heads": w["kv"], "mamba_n_heads": w["heads"],
         "mamba_d_head": w["p"], "mamba_d_state": w["n"], "mamba_n_groups": 1, "mamba_d_conv": 4, "rms_norm_eps": 1e-5}
    who = "torch.compile, chunked scan by einsum"
    try:
        import causal_conv1d  # noqa: F401
        import mamba_ssm  # noqa: F401
        torch_train.Mamba = FastMamba
        who = "torch.compile, mamba_ssm"
    except ImportError as e:
        print(f"slice: {e}: the scan is torch's", file=sys.stderr)
    torch.set_default_device(device)
    model = torch_train.Best(c)  # fp32 masters; products in bf16 by autocast
    run = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, w["vocab"], (a.rows, a.seq))
    labels = torch.randint(0, w["vocab"], (a.rows, a.seq))
    times = []
    for _ in range(a.steps + 3):
        sync()
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            value = run(ids, labels)
        value.backward()
        sync()
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sync()
        times.append((middle - begin, time.perf_counter() - begin))
    passes, steps = (statistics.median(x) for x in zip(*times[3:]))
    print(json.dumps({"peer": who, "torch": torch.__version__, "seq": a.seq, "rows": a.rows,
                      "pass_ms": round(1e3 * passes, 3), "step_ms": round(1e3 * steps, 3),
                      "tokens_per_s": round(a.rows * a.seq / steps, 1), "loss": round(value.item(), 3)}))


def main():
    global device
    p = argparse.ArgumentParser()
    p.add_argument("which", choices=["kernels", "slice"])
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--seq", type=int, default=4096)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true")
    a = p.parse_args()
    device = a.device
    torch.manual_seed(0)
    (kernels if a.which == "kernels" else slice_)(a, SMALL if a.small else WIDE)


if __name__ == "__main__":
    main()
