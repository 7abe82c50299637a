"""What a fork server imports once for all workers that start from it; none of it touches a GPU."""

import sympy  # noqa: F401
import torch  # noqa: F401

import attnlib.dilated
import attnlib.timing.sweep  # noqa: F401
