"""The vocabulary: shapes refuse nonsense, a machine is what is known of it, and the oracle where nothing is seen."""

import json
from pathlib import Path

import pytest
import torch

from attnlib import VARIANTS, variant
from attnlib.core import Machine, Shape, UserError, needs_dtype, oracle
from attnlib.laws import evaluate
from attnlib.memory.ledger import ledger

H200 = Path(__file__).parent.parent / "data" / "nvidia-h200" / "machine.json"


@pytest.mark.parametrize(
    "size", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 2.5, 1), (1, 1, 1, "8"), (True, 1, 1, 1), (1, 1, 1, 1, "float8")]
)
def test_shape_refuses_nonsense(size):
    with pytest.raises(UserError):
        Shape(*size)


def test_unknown_variant_is_refused():
    with pytest.raises(UserError, match="naive_custom"):
        variant("flash9")


def test_oracle_gives_zero_where_nothing_is_seen():
    q, k, v = Shape(1, 1, 4, 2).inputs()
    reach = torch.zeros(4, 4)
    reach[1:] = 1
    o = oracle(q, k, v, reach)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert (o[:, :, 0] == 0).all() and (grads[0][:, :, 0] == 0).all()
    assert all(torch.isfinite(x).all() for x in (o, *grads))


# what takes a device: a law, a formula, what can run there, a ledger
ASK = {
    "law": lambda device: VARIANTS["naive"].law.bytes("backward_peak", Shape(1, 1, 64, 8), device),
    "moment": lambda device: VARIANTS["naive"].law.at("backward_peak", Shape(1, 1, 64, 8), device),
    "formula": lambda device: evaluate(VARIANTS["naive"].traffic.backward, Shape(1, 1, 64, 8), device),
    "needs": lambda device: VARIANTS["sdpa_cudnn"].needs(Shape(1, 1, 64, 8), device),
    "dtype": lambda device: needs_dtype(Shape(1, 1, 64, 8, "bfloat16"), device),
    "ledger": lambda device: ledger(VARIANTS["naive"], Shape(1, 1, 64, 8), device),
}


@pytest.mark.parametrize("ask", ASK)
def test_one_device_has_one_answer_however_it_is_named(ask):
    """A string, a torch.device and a Machine; with an index or without. The old laws compared strings, and gave the
    figure of a GPU for torch.device("cpu")."""
    cpu, gpu = Machine.of("cpu"), Machine.of("cuda")
    assert ASK[ask]("cpu") == ASK[ask](torch.device("cpu")) == ASK[ask](cpu)
    assert ASK[ask]("cuda") == ASK[ask](torch.device("cuda")) == ASK[ask](gpu) == ASK[ask](torch.device("cuda:0"))
    assert ask == "dtype" or ASK[ask](cpu) != ASK[ask](gpu)


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize(
    "device", ["tpu", "CPU", "", "cuda:x", None, torch.device("mps"), torch.device("meta")], ids=str
)
def test_what_is_no_device_is_refused(ask, device):
    with pytest.raises(UserError, match="device must be cpu, cuda"):
        ASK[ask](device)


def test_a_machine_is_what_its_record_says_and_not_what_is_at_hand():
    """Older records lack fields, newer ones may have more."""
    facts = next(one for one in json.loads(H200.read_text()).values() if "packages" in one)
    found = Machine.from_facts(facts | {"colour": "green"})
    assert (found.kind, found.multiprocessors, found.capability, found.threads) == ("cuda", 132, (9, 0), 16)
    assert found.packages == ("flash-attn-4",) and not found.is_cpu and Machine.of(found) is found
    assert Machine.from_facts({"kind": "cuda"}).packages == ()
    assert found.ceilings["gemm_tflop_s"].keys() == {"float32", "bfloat16", "float16"}
