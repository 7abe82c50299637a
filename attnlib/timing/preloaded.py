"""What a fork server imports once, with torch and sympy, for all workers that start from it; none of it asks a GPU."""

import attnlib.dilated
import attnlib.timing.sweep  # noqa: F401
