import importlib.util
import threading
import warnings
from typing import Any

import pytest
import torch

from lit_stepwise.engines.server.weights import NCCLSender, pieces
from lit_stepwise.errors import EngineError


def test_pieces_end_with_the_weight_that_fills_them() -> None:
    sizes = {"a": 2, "b": 1, "c": 5, "d": 1}
    weights = ((name, torch.zeros(size, dtype=torch.int64)) for name, size in sizes.items())
    assert [list(piece) for piece in pieces(weights, 24)] == [["a", "b"], ["c"], ["d"]]


class Stuck:
    """A broadcast that the other side never joins."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.entered.set()
        self.released.wait()


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_weights_go_from_gpu_to_gpu_by_vllms_own_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.distributed.weight_transfer import nccl_engine

    met, sent, calls = [], [], []

    class Recorder:
        def call(self, path: str, bodies: Any = None, get: bool = False) -> list[Any]:
            calls.append((path, bodies))
            return [{"world_size": 2, "success": True}, {"world_size": 3, "success": True}]

    def broadcast(iterator: Any, group: str, **settings: Any) -> None:
        assert group == "group"
        sent.append([(name, weight.tolist()) for name, weight in iterator])

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: met.append(info) or "group")
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr("lit_stepwise.engines.server.weights.PIECE_BYTES", 8)
    with pytest.raises(EngineError, match="weights_backend=nccl needs a GPU in the first rank; use file"):
        NCCLSender(Recorder())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "_post_send_sync", lambda self: None)
    sender = NCCLSender(Recorder())  # type: ignore[arg-type]
    sender.send(iter([("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([3.0]))]), "us:4")
    assert met[0].world_size == 6
    joined = dict(calls)["/init_weight_transfer_engine"]
    assert [each["init_info"]["rank_offset"] for each in joined] == [1, 3]
    assert {each["init_info"]["master_port"] for each in joined} == {met[0].master_port}
    assert sent == [[("a", [1.0, 2.0])], [("b", [3.0])]]
    updates = [body["update_info"] for path, body in calls if path == "/update_weights"]
    assert [(each["names"], each["dtype_names"], each["shapes"]) for each in updates] == [
        (["a"], ["float32"], [[2]]),
        (["b"], ["float32"], [[1]]),
    ]
    assert [path for path, _ in calls].count("/start_weight_update") == 1

    def gone(self: Recorder, path: str, bodies: Any = None) -> list[Any]:
        assert stuck.entered.wait(60)
        raise EngineError("it is gone")

    stuck = Stuck()
    monkeypatch.setattr(Recorder, "call", gone)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda **_: stuck.wait())
    with pytest.raises(EngineError, match="it is gone"):  # though NCCL would wait for it forever
        sender._send_piece({"a": torch.zeros(1)})
    stuck.released.set()
