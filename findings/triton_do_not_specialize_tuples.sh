#!/usr/bin/env bash
# Triton 3.6.0: do_not_specialize, which tells a kernel to be compiled once for all values of an argument, does not reach
# the numbers inside a tuple. A plain 1, 16 or 5 of such an argument is all of one kind; in a tuple, 1 becomes a constant
# and 16 a multiple of 16, each with a kernel of its own: n numbers in a tuple can make 3^n kernels. The same holds for
# do_not_specialize_on_alignment. No GPU is needed to see it: the key by which a launch finds its kernel is made on the
# host, here by the function that Triton itself makes from a kernel's signature.
# Guessed before: a tuple is left as it is, number by number.
# A way round: encode the numbers so that none is 1 or a multiple of 16, 2 x + 3 say, and decode them in the kernel.
# Seen: plain [('i32', None), ('i32', None), ('i32', None)] / tuple (('constexpr', 'i32', 'i32'), (1, 'D', '')) /
# encoded (('i32', 'i32', 'i32'), ('', '', ''))
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.6.0
cat > "$folder/seen.py" <<'PYTHON'
import triton
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature


@triton.jit(do_not_specialize=["numbers"])
def kernel(numbers):
    pass


bind = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)


def kind(value):
    """What the key of a launch holds for an argument."""
    return bind(value)[1][0]


plain, nested = [kind(x) for x in (1, 16, 5)], kind((1, 16, 5))
encoded = kind(tuple(2 * x + 3 for x in (1, 16, 5)))
print("plain", plain, "/ tuple", nested, "/ encoded", encoded)
assert plain == [("i32", None)] * 3, "changed: a plain number"
assert nested == (("constexpr", "i32", "i32"), (1, "D", "")), "changed: a tuple is left alone now"
assert encoded == (("i32",) * 3, ("",) * 3)
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
