#!/usr/bin/env bash
# torch.compile fuses attention until it has seen a second head dimension, and never with dynamic=True. PyTorch 2.13.0, CPU.
#
# The compiler knows softmax(q kᵀ · D^-½) v and puts a fused kernel in its place, which keeps no N × N matrix. By default
# it compiles for the sizes it sees, and marks a size as dynamic once it has changed.
#
# Guess before running: whatever sizes a call has, the spelling is the same and is fused; a new head dimension costs one
# more compilation.
# Seen: with one head dimension it is fused at every length, also where N is dynamic. The second head dimension makes D
# dynamic, the scale D^-½ a symbol, and the pattern is not found any more: from then on every new shape is unfused. With
# dynamic=True it is not fused at all. dynamic=False fuses all of them. The answers are right throughout; what changes is
# memory: 1 matrix kept instead of none, as printed:
#
#   default        N 128 D 64 fused | N 200 D 64 fused | N 256 D 32 not fused | N 300 D 16 not fused
#   dynamic=True   N 128 D 64 not fused | N 200 D 64 not fused | N 256 D 32 not fused | N 300 D 16 not fused
#   dynamic=False  N 128 D 64 fused | N 200 D 64 fused | N 256 D 32 fused | N 300 D 16 fused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$folder/fuses.py" <<'PY'
import torch
from torch.profiler import profile


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def fused(call, n, d):
    q, k, v = (torch.randn(1, 2, n, d, requires_grad=True) for _ in range(3))
    call(q, k, v)
    with profile() as seen:
        o = call(q, k, v)
    assert torch.allclose(o, attention(q, k, v), atol=1e-5)
    return any("scaled_dot_product" in event.name for event in seen.events())


sizes = ((128, 64), (200, 64), (256, 32), (300, 16))
found = {}
for name, how in (("default", None), ("dynamic=True", True), ("dynamic=False", False)):
    torch._dynamo.reset()
    call = torch.compile(attention, dynamic=how)
    found[name] = [fused(call, *size) for size in sizes]
    words = [f"N {n} D {d} {'fused' if one else 'not fused'}" for (n, d), one in zip(sizes, found[name])]
    print(f"{name:14}", " | ".join(words))
assert found == {
    "default": [True, True, False, False],
    "dynamic=True": [False] * 4,
    "dynamic=False": [True] * 4,
}
PY
KINETO_LOG_LEVEL=6 "$folder/venv/bin/python" "$folder/fuses.py"
