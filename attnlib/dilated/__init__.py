"""LongNet's dilated attention: `dilated`, on strided views, and `dilated_reference`, to be read."""

from attnlib.dilated.attention import dilated as dilated
from attnlib.dilated.definition import dilated_reference as dilated_reference
