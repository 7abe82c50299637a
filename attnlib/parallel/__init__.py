"""Attention over a sequence that several ranks share, each with rows of its own: exact in output and gradients."""

from attnlib.parallel.layout import shard_of as shard_of
from attnlib.parallel.layout import shards as shards
from attnlib.parallel.layout import whole_of as whole_of
from attnlib.parallel.link import Link as Link
from attnlib.parallel.link import connect as connect
from attnlib.parallel.ring import ring_attention as ring_attention
from attnlib.parallel.shared import dilated_attention as dilated_attention
from attnlib.parallel.ulysses import ulysses_attention as ulysses_attention
