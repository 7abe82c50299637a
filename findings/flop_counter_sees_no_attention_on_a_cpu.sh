#!/usr/bin/env bash
# PyTorch's FlopCounterMode counts no operation of fused attention on a CPU, nor of a layer's fast path. PyTorch 2.13.0, CPU.
#
# torch.utils.flop_counter.FlopCounterMode adds up matrix products and attention, the usual figure behind "FLOP/s reached".
# It has formulas for the CUDA kernels of scaled_dot_product_attention.
#
# Guess before running: one call on [1, 2, 64, 16] counts 4·B·H·N²·D = 524,288 forward on any device and by any backend,
# and a layer's products count whether it trains or not.
# Seen: by the math backend the forward pass counts 524,288 and both passes 1,572,864; by the default, which is the fused
# kernel of the CPU, both count 0, with a mask too, without a warning. nn.MultiheadAttention counts 524,288 (its
# projections alone) where gradients are recorded, and 0 under no_grad in eval mode, where one native operator takes the whole
# layer; nn.TransformerEncoderLayer goes from 1,572,864 to 0 so. The same model is "free" in inference. As printed:
#
#   math     forward 524288 both 1572864
#   default  forward 0 both 0 with a mask 0
#   MultiheadAttention      recorded 524288 in inference 0
#   TransformerEncoderLayer recorded 1572864 in inference 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$folder/counts.py" <<'PY'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

q = torch.randn(1, 2, 64, 16, requires_grad=True)


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward():
    return F.scaled_dot_product_attention(q, q, q)


def both():
    forward().sum().backward()


with sdpa_kernel(SDPBackend.MATH):
    math = count(forward), count(both)
mask = torch.zeros(64, 64)
fused = count(forward), count(both), count(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
print(f"math     forward {math[0]} both {math[1]}")
print(f"default  forward {fused[0]} both {fused[1]} with a mask {fused[2]}")
x, found = torch.randn(1, 64, 32), []
attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
for name, one, call in (
    ("MultiheadAttention     ", attention, lambda: attention(x, x, x, need_weights=False)),
    ("TransformerEncoderLayer", layer, lambda: layer(x)),
):
    recorded = count(call)
    one.eval()
    with torch.no_grad():
        inference = count(call)
    found.append((recorded, inference))
    print(f"{name} recorded {recorded} in inference {inference}")
assert math == (4 * 2 * 64 * 64 * 16, 3 * 4 * 2 * 64 * 64 * 16)
assert fused == (0, 0, 0)
assert found == [(524288, 0), (1572864, 0)]
PY
"$folder/venv/bin/python" -W ignore "$folder/counts.py"
