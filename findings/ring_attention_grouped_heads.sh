#!/usr/bin/env bash
# ring-attention-pytorch 0.5.20 beside PyTorch 2.13.0: with fewer heads of K and V than of Q, the two pair heads in
# different ways. PyTorch's scaled_dot_product_attention(…, enable_gqa=True) gives a key head to query heads that are next
# to each other, i // groups; ring_flash_attn and default_attention deal key heads out like cards, i % key heads. Both
# take the same tensors without a word, and nothing differs but the numbers.
# Guessed before: ring_flash_attn gives what PyTorch's call gives, as it does with as many heads of each.
# A way round: repeat K and V along the heads before the call, x.repeat_interleave(groups, dim=-2).
# Seen, of both functions: grouped: differs by up to 1.16 / as many heads: equal / grouped, key heads dealt out: equal /
# repeated before the call: equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy ring-attention-pytorch==0.5.20 einops==0.8.1 \
  beartype==0.22.9 jaxtyping==0.3.11
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from ring_attention_pytorch.ring_attention import default_attention
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn
from torch.nn.functional import scaled_dot_product_attention


def rows(function, q, k, v):
    return function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def off(a, b):
    return (a - b).abs().max().item()


torch.manual_seed(0)
q, k, v = (torch.randn(1, heads, 64, 16) for heads in (4, 2, 2))
groups = q.shape[1] // k.shape[1]
alike = [x.repeat_interleave(groups, dim=1) for x in (k, v)]
dealt = [x.repeat(1, groups, 1, 1) for x in (k, v)]
torchs = scaled_dot_product_attention(q, k, v, enable_gqa=True)
for function in (ring_flash_attn, default_attention):
    ours = rows(function, q, k, v)
    print(function.__name__, "grouped: differs by up to", round(off(ours, torchs), 2))
    same = {
        "as many heads": off(rows(function, q, *dealt), scaled_dot_product_attention(q, *dealt)),
        "grouped, key heads dealt out": off(ours, scaled_dot_product_attention(q, *dealt)),
        "repeated before the call": off(rows(function, q, *alike), torchs),
    }
    print(*(f"{what}: {'equal' if distance < 1e-5 else distance}" for what, distance in same.items()), sep=" / ")
    assert off(ours, torchs) > 0.1 and max(same.values()) < 1e-5, "changed: heads are paired in another way now"
PYTHON
