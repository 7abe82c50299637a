#!/usr/bin/env bash
# PyTorch 2.13.0: an operator made by torch.library.custom_op, whose backward pass is registered as documented, with a
# setup_context, is differentiated by torch.autograd and batched by torch.vmap, but not by torch.func.grad. The error
# asks for a "setup_context staticmethod" of an autograd.Function, where there is a setup_context and nobody wrote a
# Function: it speaks of one that the registration made.
# Guessed before: torch.func.grad gives what torch.autograd gives, tensor([0., 2., 4.]).
# A way round: an autograd.Function of one's own with a setup_context, called directly; the operator inside its forward.
# Seen: autograd tensor([0., 2., 4.]) / vmap tensor([0., 1., 4.]) /
# func.grad RuntimeError: In order to use an autograd.Function with functorch transforms (vmap, grad, jvp, jacrev, ...),
# it must override the setup_context staticmethod.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, grad: 2 * grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
x = torch.arange(3.0)
leaf = x.clone().requires_grad_()
square(leaf).sum().backward()
print("autograd", leaf.grad)
print("vmap", torch.vmap(square)(x))
assert leaf.grad.tolist() == [0, 2, 4] and torch.vmap(square)(x).tolist() == [0, 1, 4]
try:
    torch.func.grad(lambda x: square(x).sum())(x)
except RuntimeError as error:
    print(f"func.grad RuntimeError: {error}")
    assert "must override the setup_context staticmethod" in str(error)
else:
    raise SystemExit("changed: torch.func.grad takes it now")
PYTHON
