#!/usr/bin/env python3
"""Training tokens/s of the peers on the CPU, at the shape of a recipe's model.

    python3 torch_train.py hf   --config config.json --seq 1024 --rows 4 --steps 3
    python3 torch_train.py best --config config.json --seq 1024 --rows 4 --steps 3 [--no-compile]

hf: transformers' BambaForCausalLM as it is (bf16 autocast). best: the fastest plain PyTorch that we could write:
chunked SSD by einsum, scaled_dot_product_attention, torch.compile, bf16 autocast, fused AdamW. config.json is the
model's Hugging Face form (`hybridtrain --print-hf-config RECIPE`). One JSON object goes to stdout.
"""
import argparse
import json
import resource
import time

import torch
import torch.nn.functional as F
from torch import nn


def rms(x, w, eps):
    v = x.float()
    return (w * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


class Mamba(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden_size"]
        self.H, self.P, self.N = c["mamba_n_heads"], c["mamba_d_head"], c["mamba_d_state"]
        self.G, self.W, self.Q, self.eps = c["mamba_n_groups"], c["mamba_d_conv"], 64, c["rms_norm_eps"]
        self.dI = self.H * self.P
        self.CD = self.dI + 2 * self.G * self.N
        self.in_proj = nn.Linear(h, self.dI + self.CD + self.H, bias=False)
        self.conv = nn.Conv1d(self.CD, self.CD, self.W, groups=self.CD, padding=self.W - 1)
        self.dt_bias = nn.Parameter(torch.randn(self.H) - 4)
        self.A_log = nn.Parameter(torch.rand(self.H).mul(15).add(1).log())
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.Parameter(torch.ones(self.dI))
        self.out_proj = nn.Linear(self.dI, h, bias=False)

    def forward(self, u):
        b, T, _ = u.shape
        z, xbc, dt = self.in_proj(u).split([self.dI, self.CD, self.H], -1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :T].transpose(1, 2))
        x, B, C = xbc.split([self.dI, self.G * self.N, self.G * self.N], -1)
        Q, H, P, N = self.Q, self.H, self.P, self.N
        n = T // Q
        dt = F.softplus(dt.float() + self.dt_bias).view(b, n, Q, H)
        a = (-torch.exp(self.A_log) * dt).cumsum(2)  # (b, n, Q, H)
        x = x.reshape(b, n, Q, H, P)
        B = B.reshape(b, n, Q, N)  # one group, as in Bamba
        C = C.reshape(b, n, Q, N)
        xd = (x * dt[..., None]).to(x.dtype)
        ah = a.permute(0, 1, 3, 2)  # (b, n, H, Q)
        L = torch.exp((ah[..., :, None] - ah[..., None, :]).masked_fill(
            torch.ones(Q, Q, dtype=torch.bool, device=u.device).triu(1), float("-inf")))
        K = torch.einsum("bcin,bcjn->bcij", C, B)
        y = torch.einsum("bchij,bcjhp->bcihp", (K[:, :, None] * L).to(x.dtype), xd)
        w = torch.exp(ah[..., -1:] - ah)  # (b, n, H, Q)
        R = torch.einsum("bcjn,bchj,bcjhp->bchpn", B, w.to(x.dtype), xd).float()
        # states between chunks by one product with the decays from chunk to chunk, as in the minimal Mamba-2 listing
        g = F.pad(ah[..., -1].cumsum(1), (0, 0, 1, 0)).transpose(1, 2)  # (b, H, n+1): decay before chunk c, in logs
        M = torch.exp((g[..., :-1, None] - g[..., None, 1:]).masked_fill(
            torch.ones(n, n, dtype=torch.bool, device=u.device).triu(), float("-inf")))
        S = torch.einsum("bhzc,bchpn->bzhpn", M, R).to(x.dtype)
        y = y + torch.einsum("bcin,bchpn->bcihp", C, S) * torch.exp(a)[..., None].to(x.dtype)
        y = (y + self.D[:, None] * x).reshape(b, T, self.dI)
        return self.out_proj(rms((y * F.silu(z)), self.norm, self.eps).to(u.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden_size"]
        self.nh, self.nkv = c["num_attention_heads"], c["num_key_value_heads"]
        self.hd = h // self.nh
        self.qkv = nn.Linear(h, (self.nh + 2 * self.nkv) * self.hd, bias=False)
        self.o = nn.Linear(self.nh * self.hd, h, bias=False)
        self.rd = self.hd // 2

    def rope(self, t, cos, sin):
        r, rest = t[..., :self.rd], t[..., self.rd:]
        half = self.rd // 2
        rot = torch.cat((-r[..., half:], r[..., :half]), -1)
        return torch.cat((r * cos + rot * sin, rest), -1)

    def forward(self, u):
        b, T, _ = u.shape
        q, k, v = self.qkv(u).split([self.nh * self.hd, self.nkv * self.hd, self.nkv * self.hd], -1)
        q = q.view(b, T, self.nh, self.hd).transpose(1, 2)
        k = k.view(b, T, self.nkv, self.hd).transpose(1, 2)
        v = v.view(b, T, self.nkv, self.hd).transpose(1, 2)
        f = 10000.0 ** (-torch.arange(0, self.rd, 2).float() / self.rd)
        ang = torch.outer(torch.arange(T).float(), f)
        cos, sin = (torch.cat((fn(ang), fn(ang)), -1).to(q.dtype) for fn in (torch.cos, torch.sin))
        q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.nh != self.nkv)
        return self.o(o.transpose(1, 2).reshape(b, T, self.nh * self.hd))


class Block(nn.Module):
    def __init__(self, c, attention):
        super().__init__()
        h, self.eps = c["hidden_size"], c["rms_norm_eps"]
        self.n1, self.n2 = nn.Parameter(torch.ones(h)), nn.Parameter(torch.ones(h))
        self.mixer = Attention(c) if attention else Mamba(c)
        self.gate_up = nn.Linear(h, 2 * c["intermediate_size"], bias=False)
        self.down = nn.Linear(c["intermediate_size"], h, bias=False)

    def forward(self, r):
        r = r + self.mixer(rms(r, self.n1, self.eps))
        g, u = self.gate_up(rms(r, self.n2, self.eps)).chunk(2, -1)
        return r + self.down(F.silu(g) * u)


class Best(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.blocks = nn.ModuleList(Block(c, i in c["attn_layer_indices"])
                                    for i in range(c["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(c["hidden_size"]))
        self.head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        if c.get("tie_word_embeddings"):
            self.head.weight = self.embed.weight
        self.eps = c["rms_norm_eps"]

    def forward(self, ids, labels):
        r = self.embed(ids)
        for block in self.blocks:
            r = block(r)
        logits = self.head(rms(r, self.norm, self.eps))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("which", choices=["hf", "best"])
    p.add_argument("--config", required=True)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--chunk", type=int, help="hf only: mamba_chunk_size")
    p.add_argument("--recompute", action="store_true", help="hf only: gradient checkpointing, where memory is short")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    c = json.load(open(a.config))
    if a.which == "hf":
        from transformers import BambaConfig, BambaForCausalLM
        if a.chunk:
            c["mamba_chunk_size"] = a.chunk
        model = BambaForCausalLM(BambaConfig(**{k: v for k, v in c.items() if k != "architectures"}))
        if a.recompute:
            model.gradient_checkpointing_enable()
            model.train()
        run = lambda ids, labels: model(input_ids=ids, labels=ids, use_cache=False).loss
    else:
        model = Best(c)
        run = model if a.no_compile else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, c["vocab_size"], (a.rows, a.seq))
    labels = torch.randint(0, c["vocab_size"], (a.rows, a.seq))
    times = []
    for _ in range(a.steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(ids, labels)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    step_s = sorted(times[1:])[a.steps // 2]
    print(json.dumps({"peer": a.which, "torch": torch.__version__, "compiled": a.which == "best" and not a.no_compile,
                      "parameters": sum(q.numel() for q in model.parameters()), "seq": a.seq, "rows": a.rows, "chunk": a.chunk, "recompute": a.recompute,
                      "first_step_s": round(times[0], 3), "step_s": round(step_s, 4),
                      "tokens_per_s": round(a.rows * a.seq / step_s, 1), "loss": round(loss.item(), 3),
                      "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
