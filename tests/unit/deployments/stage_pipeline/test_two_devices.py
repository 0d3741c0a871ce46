"""A stage on the CPU sends to one on an accelerator: what components take and give lands there, the rest on the host.

The device `meta` stands for the accelerator: it shows where a tensor was put.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from deployments.messages import ComponentAnswer
from deployments.stage_pipeline.hand_off import pack_outcome, unpack_outcome
from deployments.stage_pipeline.remote_calls import component_call
from deployments.stage_pipeline.sessions.denoise import DecoderCall, HandOff
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stages.encode import pack_conditioning, unpack_conditioning
from deployments.tensors.packing import made_on, pack, unpack
from deployments.tensors.values import MissingTensor, with_nan

CPU, ACCELERATOR = torch.device("cpu"), torch.device("meta")
THERE: Any = SimpleNamespace(device=ACCELERATOR, handed_over={})


def call() -> EncoderCall:
    state = torch.Generator().get_state()
    return EncoderCall("text_encoder", "forward", Transformer2DModelOutput(torch.ones(2)), ([state], [state]))


def test_conditioning_of_an_encoder_on_the_cpu_lands_on_the_denoisers_device_and_its_random_states_do_not() -> None:
    [arrived] = unpack_conditioning(pack_conditioning([call()], CPU), THERE)
    assert arrived.output.sample.device == ACCELERATOR
    assert arrived.random_states is not None
    assert [state.device for states in arrived.random_states for state in states] == [CPU, CPU]


def test_what_a_denoiser_on_the_cpu_leaves_to_decode_lands_on_the_device_of_the_vae() -> None:
    missing = MissingTensor((2,), torch.float32, on_stage_device=False)
    described = EncoderCall("text_encoder", "forward", [missing], None)
    outcome = HandOff(
        [described], [], [missing], [DecoderCall("vae", "decode", (torch.ones(2),), {"z": torch.ones(1)})]
    )
    arrived = unpack_outcome(pack_outcome(outcome, CPU), THERE)
    assert isinstance(arrived, HandOff)
    [decoded] = arrived.decoder_calls
    assert {decoded.args[0].device, decoded.kwargs["z"].device} == {ACCELERATOR}
    assert {
        with_nan(each, ACCELERATOR).device for each in (arrived.descriptions[0], *arrived.encoder_calls[0].output)
    } == {ACCELERATOR}


def test_a_call_of_a_component_elsewhere_and_its_answer_land_on_the_device_of_whoever_reads_them() -> None:
    session: Any = SimpleNamespace(
        device=CPU, switches=lambda component: {}, stage=SimpleNamespace(memory=SimpleNamespace(is_steady=True))
    )
    asked = component_call(session, "vae", "encode", (torch.ones(2),), {"x": torch.ones(1)})
    args, kwargs, _, _ = unpack(asked.arguments, ACCELERATOR)
    assert {args[0].device, kwargs["x"].device} == {ACCELERATOR}
    states = torch.get_rng_state()
    answer = ComponentAnswer(pack((made_on(CPU, torch.ones(2)), [], [states])))
    output = unpack(answer.outcome, ACCELERATOR)
    assert output[0].device == ACCELERATOR
    assert output[2][0].device == CPU


def test_what_a_stage_on_an_accelerator_keeps_on_the_host_stays_on_the_host() -> None:
    kept, sent = torch.ones(2), torch.ones(2, device="meta")
    assert made_on(ACCELERATOR, [kept, sent]) == [kept, sent]
    assert unpack(pack({"kept": kept}), ACCELERATOR)["kept"].device == CPU
