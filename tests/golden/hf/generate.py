#!/usr/bin/env python3
"""Golden logits, loss and gradients from Hugging Face transformers on small random models.

    python3 generate.py            # writes bamba/ mamba2/ llama/ beside this file

Needs torch, transformers and safetensors (versions are written to versions.txt); nothing of the product or
its tests needs Python. Every folder is in Hugging Face form (config.json, model.safetensors, fp32) plus
expected.safetensors: ids (as fp32), logits, loss (mean over T-1 labels), grad.NAME for every parameter.
"""
import json
import os
import platform

import torch
import transformers
from safetensors.torch import save_file
from transformers import (BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM, Mamba2Config,
                          Mamba2ForCausalLM)

HERE = os.path.dirname(os.path.abspath(__file__))
N_TOKENS = 45


def randomise(model):
    """Larger and less regular values than the library's own initialisation: nothing hides behind 1 or 0."""
    g = torch.Generator().manual_seed(1234)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("A_log"):
                p.copy_(torch.rand(p.shape, generator=g) * 2.0)
            elif name.endswith("dt_bias"):
                p.copy_(torch.randn(p.shape, generator=g) - 3.0)
            elif "norm" in name or name.endswith(".D"):
                p.copy_(1.0 + 0.3 * torch.randn(p.shape, generator=g))
            elif p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=g) * (1.5 / p.shape[1] ** 0.5))
            else:
                p.copy_(0.4 * torch.randn(p.shape, generator=g))


def generate(name, model, vocab):
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    randomise(model)
    model.train()
    ids = torch.randint(3, vocab, (1, N_TOKENS), generator=torch.Generator().manual_seed(99))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss.backward()
    expected = {"ids": ids[0].float(), "logits": logits[0].detach().contiguous(),
                "loss": loss.detach().reshape(1)}
    for pname, p in model.named_parameters():
        expected["grad." + pname] = p.grad.float().contiguous()
    save_file(expected, os.path.join(folder, "expected.safetensors"))
    state = {k: v.detach().float().contiguous() for k, v in model.named_parameters()}
    save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1, sort_keys=True, default=str)
        f.write("\n")
    print(name, "loss", loss.item(), "parameters", sum(p.numel() for p in model.parameters()))


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generate("bamba", BambaForCausalLM(BambaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
        mamba_d_state=16, mamba_expand=2, mamba_chunk_size=16, tie_word_embeddings=False, pad_token_id=0,
        max_position_embeddings=128)), 96)
    generate("mamba2", Mamba2ForCausalLM(Mamba2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, state_size=16, expand=2,
        n_groups=1, conv_kernel=4, chunk_size=16, tie_word_embeddings=False, residual_in_fp32=True)), 96)
    generate("llama", LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=256,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64})), 96)
    with open(os.path.join(HERE, "versions.txt"), "w") as f:
        f.write(f"python {platform.python_version()}\ntorch {torch.__version__}\n"
                f"transformers {transformers.__version__}\nseeds 1234 (weights), 99 (ids)\n")


if __name__ == "__main__":
    main()
