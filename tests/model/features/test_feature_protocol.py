"""A planted feature, one class and one row: everything that a feature has needs no change elsewhere."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.denoising.checkpoint import ResumableSession
from deployments.errors import CannotResumeError, InvalidRequestError
from deployments.features import install_features
from deployments.features.feature import NOTHING, Feature, Summary, Surrounding
from deployments.messages import Checkpoint, DecodeInputs, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import encode
from deployments.tensors.packing import unpack
from deployments.tensors.values import map_values, tensors
from env_config.variables import EnvConfig
from tests.support.stage_modules import denoiser_stage
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

pytestmark = pytest.mark.filterwarnings("default")

STEPS = 4


# --- the feature ---


@dataclass(frozen=True)
class Pushed:
    """A measurement of the feature's own."""

    forwards: int


class Push:
    """Adds to each output of the transformer, the more the later the step: what it keeps decides the numbers."""

    def __init__(self, strength: float, session: ResumableSession, saved: Any) -> None:
        self.strength = strength
        self.session = session
        self.pushed = saved["pushed"] if saved else torch.zeros(())

    def surround(self, component: str, module: Any) -> Surrounding:
        if self.session.is_skipping:
            return NOTHING
        self.pushed = self.pushed + 1
        amount = self.strength * float(self.pushed)
        return Surrounding(partial(self._pushing, module, amount), merge_key=amount)

    @contextmanager
    def _pushing(self, module: torch.nn.Module, amount: float) -> Iterator[None]:
        hook = module.register_forward_hook(lambda _, arguments, output: map_values(lambda x: x + amount, output))
        try:
            yield
        finally:
            hook.remove()

    def snapshot(self) -> Any:
        return {"pushed": self.pushed}

    def end(self) -> None:
        """It holds nothing."""

    def summary(self) -> Summary:
        return Summary({"forwards": int(self.pushed)}, (Pushed(int(self.pushed)),))


def wanted(env: EnvConfig, asked: Any) -> float | None:
    if asked is not None and not isinstance(asked["strength"], float):
        raise InvalidRequestError("push.strength must be a number", param="push")
    return asked and asked["strength"]


PUSH = Feature("push", wanted, Push, install=lambda modules, env: f"push: ready in {', '.join(modules.components)}")


# --- what it does ---


class Denoising:
    """A tiny FLUX whose denoiser has the feature."""

    def __init__(self, folder: Path, *features: Feature) -> None:
        tiny_patches()
        self.encoder, self.stage = load_stage(folder, ("encoder",)), load_stage(folder, ("denoiser",))
        self.told: list[object] = []
        args = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, merging="always")
        self.denoiser = DenoiserStage(self.stage, args, measure=self.told.append, features=features)

    def request(self, strength: Any = None, **settings: Any) -> GenerationRequest:
        arguments = request_arguments("flux") | {"num_inference_steps": STEPS}
        features = {} if strength is None else {"push": {"strength": strength}}
        png = OutputFormat("image", "png")
        return GenerationRequest("r", "flux", arguments, 0, png, **{"features": features, **settings})

    def run(self, request: GenerationRequest, checkpoint: Checkpoint | None = None) -> torch.Tensor:
        return self.run_and_save(request, checkpoint)[0]

    def run_and_save(
        self, request: GenerationRequest, checkpoint: Checkpoint | None = None
    ) -> tuple[torch.Tensor, list[Checkpoint]]:
        made: list[Checkpoint] = []
        follower = DenoisingFollower(checkpoint=made.append)
        inputs, _ = self.denoiser.denoise(request, encode(self.encoder, request), checkpoint, follower=follower)
        return latents(inputs), made

    def run_together(self, requests: list[GenerationRequest]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self.run, requests))


def latents(inputs: DecodeInputs) -> torch.Tensor:
    return max(tensors(unpack(inputs.content, torch.device("cpu"))), key=torch.Tensor.numel)


@pytest.fixture(scope="module")
def folder(checkpoints_root: Path) -> Path:
    return checkpoint("flux", checkpoints_root)


@pytest.fixture
def denoising(folder: Path) -> Iterator[Denoising]:
    made = Denoising(folder, PUSH)
    yield made
    made.denoiser.engine.close()


def test_a_feature_works_for_the_requests_that_ask_for_it_and_leaves_no_trace_in_others(
    denoising: Denoising, folder: Path
) -> None:
    without = Denoising(folder)
    truth = without.run(without.request())
    without.denoiser.engine.close()
    assert torch.equal(denoising.run(denoising.request()), truth)
    assert not torch.allclose(denoising.run(denoising.request(0.1)), truth, atol=1e-2)
    assert torch.equal(denoising.run(denoising.request()), truth)


def test_forwards_of_equal_merge_keys_share_a_batch_and_others_do_not(denoising: Denoising) -> None:
    requests = [denoising.request(strength) for strength in (0.1, 0.1, 0.7, None, None)]
    alone = [denoising.run(replace(request, deterministic=True)) for request in requests]
    denoising.run_together(requests)  # the first merges are checked
    denoising.denoiser.engine.statistics.batch_sizes.clear()
    together = denoising.run_together(requests)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # Whether two meet at a step is chance; that more than two could, or that the third shared with one, is not.
    assert set(denoising.denoiser.engine.statistics.batch_sizes) <= {1, 2}
    assert denoising.denoiser.engine.statistics.merged > 0


def test_its_state_survives_a_checkpoint(denoising: Denoising, folder: Path) -> None:
    request = denoising.request(0.1)
    truth, checkpoints = denoising.run_and_save(request)
    elsewhere = Denoising(folder, PUSH)
    assert torch.equal(elsewhere.run(request, checkpoints[STEPS // 2]), truth)
    [summary] = elsewhere.denoiser.recent_summaries["push"]
    assert summary == {"request_id": "r", "forwards": STEPS}, "those before the checkpoint too"
    elsewhere.denoiser.engine.close()


def test_its_settings_bind_a_checkpoint(denoising: Denoising, folder: Path) -> None:
    request = denoising.request(0.1)
    _, checkpoints = denoising.run_and_save(request)
    elsewhere = Denoising(folder, replace(PUSH, settings=lambda env: "stronger"))
    with pytest.raises(CannotResumeError, match="other settings"):
        elsewhere.run(request, checkpoints[0])
    elsewhere.denoiser.engine.close()


def test_its_summary_is_kept_and_its_measurements_are_told(denoising: Denoising) -> None:
    denoising.run(denoising.request())
    denoising.run(denoising.request(0.1))
    assert list(denoising.denoiser.recent_summaries["push"]) == [{"request_id": "r", "forwards": STEPS}]
    assert [each for each in denoising.told if isinstance(each, Pushed)] == [Pushed(STEPS)]


def test_a_wrong_or_an_unknown_feature_is_refused_before_anything_runs(denoising: Denoising) -> None:
    with pytest.raises(InvalidRequestError, match=r"push\.strength must be a number"):
        denoising.run(denoising.request("strongly"))
    with pytest.raises(InvalidRequestError, match="unknown feature 'pull'; known are push") as refused:
        denoising.run(denoising.request(features={"pull": {}}))
    assert refused.value.param == "pull"
    assert denoising.denoiser.engine.statistics.forwards == 0


def test_it_prepares_the_modules_of_a_stage() -> None:
    stage = denoiser_stage(transformer=torch.nn.Identity())
    assert install_features(stage, EnvConfig.from_environ({}), (PUSH,)) == ["push: ready in transformer"]
