"""Attention over a sequence that several ranks share, each with rows of its own: exact in output and gradients."""

from attnlib.parallel.layout import shard_of, shards, whole_of
from attnlib.parallel.link import Link, connect
from attnlib.parallel.ring import ring_attention
from attnlib.parallel.shared import dilated_attention

__all__ = ["Link", "connect", "dilated_attention", "ring_attention", "shard_of", "shards", "whole_of"]
