"""A method for each verdict, in the order of the data; `check_split` makes them all.

Encoder, denoiser and VAE are held against the unsplit pipeline, the engine and a resume against the plain loop, merged
forwards against lone ones. A stage that was given something else than the unsplit pipeline's is not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deployments.errors import CannotResumeError, DeviceFullError, TooLargeForDeviceError
from deployments.messages import Checkpoint, Conditioning, DecodeInputs, GenerationRequest
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.sessions.denoise import HandOff, Result
from deployments.stages.denoise import DenoiserStage
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.verify.differences import differences, largest
from deployments.verify.split import Split, another
from deployments.verify.unsplit import Unsplit, WatchedCall, watch_unsplit
from deployments.verify.verdict import BAD, Difference, Verdict

NOISE_MARGIN = 4.0  # times what two unsplit calls deviate: one pair of calls does not show the largest deviation
MAX_ROUNDS = 4
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of a merged request, relative to the largest value
HALF_TOLERANCE = 5e-2  # float16 and bfloat16
DEVIATE = "merged ones deviate, so the engine runs them alone"
OTHER_PROMPT = "dance monkey dance"

Part = Callable[[], Verdict]


def check_split(split: Split, args: DenoisingArgs, request: GenerationRequest, truth: Unsplit) -> Iterator[Verdict]:
    """`truth` is what the unsplit pipeline made of the request, unwatched."""
    checks = _Checks(split, args, request, truth)
    try:
        for part, check in checks.parts().items():
            yield checks.judged(part, check)
    finally:
        checks.close()


@dataclass
class _Checks:
    split: Split
    args: DenoisingArgs
    request: GenerationRequest
    truth: Unsplit
    noise: dict[str, float] = field(default_factory=dict)  # part -> largest deviation of two unsplit calls
    bad_before: str = ""  # the first of encoder, denoiser and vae that is not the unsplit pipeline's
    missing: str = ""  # the first part that made nothing, of which later ones would be given something
    engine: DenoiserStage | None = None

    def __post_init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []

    def parts(self) -> dict[str, Part]:
        return {
            "unsplit": self.unsplit_twice,
            "encoder": self.encoder,
            "denoiser": self.denoiser,
            "vae": self.vae,
            "engine": self.engine_alone,
            "merged": self.merged,
            **({"passes": self.passes_together} if self.args.guidance_passes != "apart" else {}),
            "resumed": self.resumed,
            "left": self.left_as_it_was,
        }

    def judged(self, part: str, check: Part) -> Verdict:
        if self.missing and part != "left":
            return Verdict(part, "not judged", f"the {self.missing} made nothing for it")
        try:
            return check()
        except (torch.AcceleratorError, DeviceFullError, TooLargeForDeviceError):
            raise
        except Exception as error:  # (whatever the pipeline's code raises where it is split)
            if is_out_of_memory(error):
                raise
            if part in ("unsplit", "encoder", "denoiser"):
                self.missing = part
            return Verdict(part, "fails", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        if self.engine is not None:
            self.engine.engine.close()

    # -- the parts ----------------------------------------------------------------------------------------------

    def unsplit_twice(self) -> Verdict:
        """Measures what two calls of the unsplit pipeline deviate, before anything is held against them."""
        whole = self.split.whole.unsplit
        plain, self.truth = self.truth, watch_unsplit(whole, self.request)
        found = differences(self.truth.output, plain.output, "output")
        if not found:
            return Verdict("unsplit", "same bits", "two calls")
        again = watch_unsplit(whole, self.request)
        floor = {
            "encoder": _deviation(self.truth, again, after=False),
            "denoiser": _deviation(self.truth, again, after=True),
            "vae": largest([*found, *differences(again.output, plain.output, "output")]),
        }
        if any(each is None or each > self._tolerance for each in floor.values()):
            return Verdict("unsplit", "fails", "two calls differ, and nothing can be held against them", tuple(found))
        self.noise = {part: each for part, each in floor.items() if each is not None}
        told = f"two calls differ; up to {NOISE_MARGIN:g} times as much is taken for the same"
        return Verdict("unsplit", "within bounds", told, tuple(found))

    def encoder(self) -> Verdict:
        """What the denoiser reads of the record is what the encoders returned to the unsplit pipeline."""
        self.conditioning = self.split.encode(self.request)
        calls = self.split.recorded(self.conditioning)
        names = list(dict.fromkeys((call.component, call.method) for call in calls))
        found, seen = [], []
        for name in names:
            recorded = [call.output for call in calls if (call.component, call.method) == name]
            returned = [call.returned for call in self.truth.calls_of(*name, after=False)]
            if returned:  # a call that was not watched shows in what comes after
                seen.append(".".join(name))
                found += _of_calls(recorded, returned, seen[-1])
        return self._held(
            "encoder", found, f"{len(calls)} call{'s' * (len(calls) != 1)}" + (f": {', '.join(seen)}" if seen else "")
        )

    def denoiser(self) -> Verdict:
        """The plain loop hands the decoders what the unsplit pipeline gave them."""
        self.handed_over = self.split.denoise(self.request, self.conditioning)
        outcome, way = self.split.outcome(self.handed_over), self._way()
        if isinstance(outcome, Result):
            return self._held("denoiser", differences(_fields(outcome.output), self.truth.output, "output"), way)
        found = []
        for name in dict.fromkeys((call.component, call.method) for call in outcome.decoder_calls):
            calls = [call for call in outcome.decoder_calls if (call.component, call.method) == name]
            given = [call.given for call in self.truth.calls_of(*name, after=True)]
            for index, (call, wanted) in enumerate(zip(calls, given, strict=False)):
                if call.args is not None:
                    place = f"{'.'.join(name)}{f'[{index}]' if len(calls) > 1 else ''} was given"
                    found += differences([list(call.args), call.kwargs], wanted, place)
        return self._held("denoiser", found, way)

    def vae(self) -> Verdict:
        """The pipeline's output."""
        output = self.split.decode(self.request, self.conditioning, self.handed_over)
        more = "with the complete hand-off" if self.split.complete else ""
        return self._held("vae", differences(output, self.truth.output, "output"), more)

    def engine_alone(self) -> Verdict:
        """The request alone in the engine, against the plain loop."""
        self.engine = self.split.open_denoiser(self.args)
        plain = self.split.outcome(self.split.denoise(self.request, self.conditioning))
        alone, _ = self.split.run(self.engine, self.request, self.conditioning, checkpoints=self.checkpoints)
        found = _of_outcomes(self.split.outcome(alone), plain)
        return self._compared("engine", "denoiser", found, "a request alone in it")

    def merged(self) -> Verdict:
        """Two requests in the engine at once, each against itself alone."""
        if self.args.deterministic or self.args.max_batch_size == 1:
            setting = "deterministic: true" if self.args.deterministic else "max_batch_size: 1"
            return Verdict("merged", "does not apply", f"not merged: `denoising` says {setting}")
        engine = self.engine or self.split.open_denoiser(self.args)
        requests = [replace(self.request, deterministic=False), another(self.request, OTHER_PROMPT)]
        conditionings = [self.split.encode(request) for request in requests]
        alone = [self._alone(engine, *pair) for pair in zip(requests, conditionings, strict=True)]
        together = self._second_merge(engine, requests, conditionings)
        if not together:
            refused = engine.engine.statistics.refused_structures
            why = DEVIATE if refused else "its forwards share no batch with those of another request"
            return Verdict("merged", "does not apply", f"not merged: {why}")
        made = [self.split.outcome(inputs) for inputs in together]
        found = [each for pair in zip(made, alone, strict=True) for each in _of_outcomes(*pair)]
        return self._within("merged", "two requests, merged", found)

    def passes_together(self) -> Verdict:
        """The guidance passes of one request in a batch, against the plain loop's one after the other."""
        engine = self.engine or self.split.open_denoiser(self.args)
        request = replace(self.request, deterministic=False)
        inputs, run = self.split.run(engine, request, self.conditioning)
        if not run.fiber.passes_together:
            refused = engine.engine.statistics.refused_structures
            why = DEVIATE if refused else "no two of a step can be in one forward"
            return Verdict("passes", "does not apply", f"not together: {why}")
        plain = self.split.outcome(self.split.denoise(self.request, self.conditioning))
        told = f"{run.fiber.passes_together} of {run.fiber.forwards} forwards with others of their request"
        return self._within("passes", told, _of_outcomes(self.split.outcome(inputs), plain))

    def resumed(self) -> Verdict:
        """From the checkpoint in the middle, in an engine that knows nothing of the request."""
        if not self.checkpoints:
            return Verdict("resumed", "does not apply", "no checkpoint is made of so few steps")
        half = self.checkpoints[len(self.checkpoints) // 2]
        plain = self.split.outcome(self.split.denoise(self.request, self.conditioning))
        fresh = self.split.open_denoiser(self.args.model_copy(update={"max_batch_size": 1}))
        try:
            inputs, run = self.split.run(fresh, self.request, self.conditioning, half)
        except CannotResumeError as error:
            return Verdict("resumed", "does not apply", f"not resumed: a request starts again ({error})")
        finally:
            fresh.engine.close()
        told = f"from step {half.step} of {run.session.steps_done}"
        return self._compared("resumed", "denoiser", _of_outcomes(self.split.outcome(inputs), plain), told)

    def left_as_it_was(self) -> Verdict:
        """The stages changed nothing that requests share."""
        again = watch_unsplit(self.split.whole.unsplit, self.request)
        found = differences(again.output, self.truth.output, "output")
        return self._compared("left", "vae", found, "the unsplit pipeline after all this")

    # -- what they share ------------------------------------------------------------------------------------------

    def _held(self, part: str, found: list[Difference], told: str) -> Verdict:
        """Against the unsplit pipeline: once a stage differs, those behind it are given something else."""
        if found and self.bad_before:
            return Verdict(part, "not judged", f"it was given something else: the {self.bad_before} differs")
        verdict = self._compared(part, part, found, told)
        if verdict.outcome in BAD:
            self.bad_before = part
        return verdict

    def _compared(self, part: str, measured: str, found: list[Difference], told: str) -> Verdict:
        if not found:
            return Verdict(part, "same bits", told)
        deviation, noise = largest(found), self.noise.get(measured, 0.0)
        if deviation is not None and deviation <= NOISE_MARGIN * noise:
            return Verdict(
                part, "within bounds", f"{told}; deviates by {deviation:.1e}, two unsplit calls by {noise:.1e}"
            )
        return Verdict(part, "differs", told, tuple(found))

    def _within(self, part: str, told: str, found: list[Difference]) -> Verdict:
        """The bound of merged forwards."""
        deviation, bound = largest(found), self._tolerance
        if not found:
            return Verdict(part, "same bits", told)
        told = f"{told}; bound {bound:.0e} of the largest value"
        if deviation is None or deviation > bound:
            return Verdict(part, "differs", told, tuple(found))
        return Verdict(part, "within bounds", f"{told}, largest deviation {deviation:.1e}")

    def _second_merge(
        self, engine: DenoiserStage, requests: list[GenerationRequest], conditionings: list[Conditioning]
    ) -> list[DecodeInputs]:
        """What is made the second time that forwards of both requests share a batch; empty where they do not: passes of
        one request may.

        The first time the engine compares merged forwards with lone ones, and hands out the lone ones.
        """
        merges = 0
        for _ in range(MAX_ROUNDS):  # a request may be done before the other has begun
            together = self.split.run_together(engine, requests, conditionings)
            merges += any(run.fiber.mates for _, run in together)
            if merges == 2:
                return [inputs for inputs, _ in together]
            if engine.engine.statistics.refused_structures:
                break
        return []

    def _alone(self, engine: DenoiserStage, request: GenerationRequest, given: Conditioning) -> HandOff | Result:
        inputs: DecodeInputs
        inputs, _ = self.split.run(engine, replace(request, deterministic=True), given)
        return self.split.outcome(inputs)

    def _way(self) -> str:
        return "by remote calls" if self.split.by_remote_calls else "by hand-off"

    @property
    def _tolerance(self) -> float:
        """What the engine allows a merged forward, by the precision of the denoisers."""
        stage = self.split.whole.unsplit
        modules = [stage.components[name] for name in stage.layout.denoisers if name in stage.components]
        dtypes = {p.dtype for module in modules for p in module.parameters() if p.is_floating_point()}
        return max((TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes), default=HALF_TOLERANCE)


def _of_calls(made: list[Any], truth: list[Any], name: str) -> list[Difference]:
    if len(made) != len(truth):
        return [Difference(name, f"{len(made)} calls are recorded, {len(truth)} were made")]
    places = [name if len(made) == 1 else f"{name}[{index}]" for index in range(len(made))]
    return [each for values in zip(made, truth, places, strict=True) for each in differences(*values)]


def _of_outcomes(made: HandOff | Result, truth: HandOff | Result) -> list[Difference]:
    if isinstance(made, Result) and isinstance(truth, Result):
        return differences(_fields(made.output), _fields(truth.output), "output")
    if isinstance(made, Result) or isinstance(truth, Result):
        return [Difference("outcome", f"a {type(made).__name__} in place of a {type(truth).__name__}")]
    calls, wanted = ([[c.component, c.method, c.args, c.kwargs] for c in each.decoder_calls] for each in (made, truth))
    return differences(calls, wanted, "decoder_calls")


def _fields(output: Any) -> Any:
    return dict(output) if hasattr(output, "keys") else output


def _deviation(one: Unsplit, other: Unsplit, after: bool) -> float | None:
    """The largest of what was returned before the denoising began, or given afterwards."""

    def values(calls: list[WatchedCall]) -> list[Any]:
        return [call.given if after else call.returned for call in calls if call.after == after]

    return largest(differences(values(one.calls), values(other.calls), "calls"))
