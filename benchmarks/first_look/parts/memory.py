"""Part 5: out of memory in a merged batch: what is still held when its halves run, and that all forwards are made."""

from __future__ import annotations

import threading
from typing import Any

import torch

from benchmarks.first_look.part import Findings, Setting, gb
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber

REQUESTS = 8
SAMPLE_BYTES = 2_000_000_000  # that the forward of one sample takes for a moment
ROOM = 3.5  # samples


class Hungry(torch.nn.Module):
    """Takes memory for each sample, and notes what is held when a forward begins."""

    def __init__(self, setting: Setting, sample_bytes: int) -> None:
        super().__init__()
        self.setting, self.sample_bytes = setting, sample_bytes
        self.held: list[tuple[int, int]] = []

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        samples = hidden_states.shape[0]
        held = torch.cuda.memory_allocated() if self.setting.device.type == "cuda" else 0
        self.held.append((samples, held))
        taken = [self.taken(samples) for _ in range(2)]
        return hidden_states * 2 + taken[0][0] * 0

    def taken(self, samples: int) -> torch.Tensor:
        if self.setting.device.type != "cuda" and samples > ROOM:
            raise torch.OutOfMemoryError("there is no more (a rehearsal)")
        return torch.zeros(samples * self.sample_bytes // 2, dtype=torch.uint8, device=self.setting.device)


def look(setting: Setting) -> Findings:
    findings = Findings()
    each = setting.pick(SAMPLE_BYTES, 1000)
    if setting.device.type == "cuda":
        _free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, ROOM * each / total))
    model = Hungry(setting, each)
    outputs, errors = together(setting, model)
    findings.refuse_unless(not errors, f"of {REQUESTS} merged forwards {len(errors)} failed: {errors[:1]}")
    right = all(torch.equal(output, torch.full_like(output, 2.0 * number)) for number, output in outputs.items())
    findings.refuse_unless(right, "forwards that were made again after an OutOfMemoryError are wrong")
    most = max((held for samples, held in model.held), default=0)
    findings.note("forwards", model.held, f"samples of each forward: {[samples for samples, _ in model.held]}")
    findings.note("held", most, f"most that was held when a forward began: {gb(most)} (a sample takes {gb(each)})")
    findings.refuse_unless(most < each, f"{gb(most)} of failed forwards is still held while their halves run")
    return findings


def together(setting: Setting, model: Any) -> tuple[dict[int, torch.Tensor], list[str]]:
    """All requests' forwards at once, twice: the first merge is compared with lone forwards."""
    outputs: dict[int, torch.Tensor] = {}
    errors: list[str] = []
    engine = Engine(max_batch_size=REQUESTS, max_wait_s=0.5)

    def ask(number: int) -> None:
        fiber = Fiber(str(number))
        engine.begin(fiber)
        value = torch.full((1, 4), float(number), device=setting.device)
        try:
            outputs[number] = engine.call(
                fiber, lambda: engine.run(fiber, model, "transformer", None, (), {"hidden_states": value})
            )
        except Exception as error:  # noqa: BLE001  (of whatever kind: it is told)
            errors.append(f"{type(error).__name__}: {error}")
        finally:
            engine.end(fiber)

    try:
        for _ in range(2):
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(REQUESTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        engine.close()
    return outputs, errors
