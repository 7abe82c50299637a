#!/usr/bin/env bash
# ring-attention-pytorch 0.5.20: ring_flash_attn(…, causal=True, max_lookback_seq_len=w) is no window of w keys. It skips
# whole buckets: a query sees its own bucket up to itself and the w // bucket_size buckets before. So how far a query
# looks depends on its place in its bucket, over a span as wide as a bucket; and where w is less than a bucket, the first
# query of each bucket sees itself alone, however large w is.
# Guessed before: query i sees the last w keys, min(i + 1, w) of them (or w + 1).
# A way round: read w as buckets, and make buckets small beside it.
# Seen, N = 64 in buckets of 16, keys seen by queries 16 to 63: w = 16: 17 to 32 / w = 8: 1 to 16 / w = 31: 17 to 32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy ring-attention-pytorch==0.5.20 einops==0.8.1 \
  beartype==0.22.9 jaxtyping==0.3.11
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

n, bucket = 64, 16
equal = torch.zeros(1, n, 1, n)  # all scores are 0, so that a query weighs all keys that it sees alike
each = torch.eye(n)[None, :, None]  # and its output tells which those are
seen = {}
for w in (16, 8, 31):
    weights = ring_flash_attn(equal, equal, each, causal=True, bucket_size=bucket, max_lookback_seq_len=w)[0, :, 0]
    seen[w] = (weights > 1e-6).sum(-1)[bucket:]
    print(f"w = {w}: {seen[w].min()} to {seen[w].max()}", end=" / ")
    place = torch.arange(bucket, n) % bucket
    assert (seen[w] == place + 1 + bucket * (w // bucket)).all(), "changed: it looks back in another way now"
print()
PYTHON
