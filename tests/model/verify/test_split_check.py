"""`verify: true`: a replica that denoises does not start where the split makes something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import CheckpointError
from deployments.messages import STAGES
from deployments.model import ModelArgs
from deployments.replicas.replica import StageReplica
from deployments.replicas.split_check import check_split
from tests.support.whole_replica import set_variables

# Python runs it at the start of the process of the check.
FAULT = """
import deployments.stages.encode as encode
whole = encode.pack_conditioning

def pack_conditioning(calls, *others):
    for call in calls:
        call.output[0].mul_(1.01)
    return whole(calls, *others)

encode.pack_conditioning = pack_conditioning
"""


def test_a_planted_fault_keeps_a_replica_from_starting_with_a_sentence(
    flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, tmp_path, {})
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        check_split(ModelArgs(path=str(flux_checkpoint), name="flux"), (STAGES,))
    said = str(refused.value)
    assert said.startswith("verify: flux: the split does not make what the unsplit FluxPipeline makes. encoder differs")
    assert "pipeline.encode_prompt[0]: " in said
    assert "elements differ by at most" in said


def test_a_replica_checks_before_it_loads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, tmp_path, {})

    def refuse(model: ModelArgs, processes: object) -> None:
        raise CheckpointError(f"verify: {model.name} {processes}")

    monkeypatch.setattr("deployments.replicas.replica.check_split", refuse)
    with pytest.raises(CheckpointError, match="verify: flux"):
        StageReplica(ModelArgs(path="missing", name="flux"), ("denoiser",), checked=(STAGES,))
