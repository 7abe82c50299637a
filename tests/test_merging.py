"""Parts of attention joined in place, plainly and by Triton, on views of any strides."""

import pytest
import torch

from attnlib.dilated.merging import add, merge, packed
from attnlib.dilated.views import View

VIEW = View((3, 2, 5), (0, 1, 1), ((0, 0, 16), (0, 1, 1), (0, 0, 3)))  # segments, rising heads, every third row


def parts(device, dtype):
    """Two sets of scores and values over the rows of a view, the first seen by only some rows."""
    draw = torch.Generator().manual_seed(3)
    scores = [torch.randn(3, 2, 5, keys, generator=draw) for keys in (4, 7)]
    scores[0][0, 0, :2] = float("-inf")
    values = [torch.randn(3, 2, keys, 24, generator=draw) for keys in (4, 7)]
    outputs = [torch.softmax(s, -1).nan_to_num() @ v for s, v in zip(scores, values, strict=True)]
    lses = [torch.logsumexp(s, -1) for s in scores]
    exact = torch.softmax(torch.cat(scores, -1), -1) @ torch.cat(values, -2), torch.logsumexp(torch.cat(scores, -1), -1)
    return [x.to(device, dtype) for x in outputs], [x.to(device) for x in lses], exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_parts_are_one_attention(dtype, device):
    (o1, o2), (lse1, lse2), (exact, exact_lse) = parts(device, dtype)
    o, lse = (
        torch.full(size, 7.0, dtype=t, device=device)
        for size, t in (((1, 4, 48, 24), dtype), ((1, 4, 48), torch.float32))
    )
    VIEW.of(o).copy_(o1), VIEW.of(lse).copy_(lse1)
    merge(VIEW.of(o), VIEW.of(lse), o2, lse2)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(VIEW.of(o).float().cpu(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(VIEW.of(lse).cpu(), exact_lse, rtol=1e-6, atol=1e-6)
    VIEW.of(o).fill_(7.0)
    assert (o == 7).all(), "only the view's rows may change"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_added(dtype, device):
    total = torch.zeros(1, 4, 48, 24, dtype=dtype, device=device)
    part = torch.arange(3 * 2 * 5 * 24, dtype=dtype, device=device).view(3, 5, 2, 24).transpose(1, 2)
    other = total.transpose(1, 2).contiguous().transpose(1, 2)
    add([VIEW.of(total), VIEW.of(other)], [part, -part])
    add([VIEW.of(total), VIEW.of(other)], [part, part])
    assert (VIEW.of(total) == 2 * part).all() and total.count_nonzero() == part.count_nonzero()
    assert (other == 0).all()


@pytest.mark.gpu
def test_what_is_packed_lies_in_memory_as_rows_of_heads():
    """`[b, n, h, D]`, which FlashAttention-2's backward pass wants: copied where it does not, itself where it does."""
    loose = torch.randn(2, 3, 7, 8, device="cuda")
    (tight,) = packed(loose)
    assert tight.transpose(1, 2).is_contiguous() and torch.equal(tight, loose)
    assert packed(tight)[0] is tight


@pytest.mark.gpu
def test_triton_and_plain_agree():
    (o1, o2), (lse1, lse2), _ = parts("cuda", torch.float32)
    plain, plain_lse = o1.cpu(), lse1.cpu()
    merge(plain, plain_lse, o2.cpu(), lse2.cpu())
    merge(o1, lse1, o2, lse2)
    torch.testing.assert_close(o1.cpu(), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse1.cpu(), plain_lse, rtol=1e-5, atol=1e-6)
