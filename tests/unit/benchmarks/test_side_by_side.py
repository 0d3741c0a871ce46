"""The comparison of ways to serve a pipeline, with stand-ins for the pipelines: what is counted, and what is found."""

import asyncio
import io
import os
from argparse import Namespace
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from benchmarks import side_by_side, side_by_side_report
from benchmarks.openai_requests import RequestError
from benchmarks.rivals.diffusers_server import create_app
from benchmarks.side_by_side import SMALL, Kind, Scenario
from benchmarks.side_by_side_report import Goal, Spread
from benchmarks.ways import (
    CONFIG,
    LABELS,
    DiffusersServer,
    Made,
    Picture,
    Processes,
    RayExample,
    Running,
    Triptych,
    role,
    serve_config,
)


def picture_of(picture: Picture) -> Image.Image:
    """Of one colour, which the seed chooses."""
    return Image.new("RGB", (picture.side, picture.side), (picture.seed * 20 % 256, 100, 100))


def png_of(picture: Picture) -> bytes:
    file = io.BytesIO()
    picture_of(picture).save(file, "PNG")
    return file.getvalue()


class StandIn:
    """Makes the right picture; every `other_every`th is another one, every `fails_every`th request fails."""

    def __init__(self, other_every: int = 0, fails_every: int = 0, seconds: float = 0.0) -> None:
        self.other_every, self.fails_every, self.seconds = other_every, fails_every, seconds
        self.asked = self.under_way = self.most_under_way = 0

    async def make(self, picture: Picture, deterministic: bool = False) -> Made:
        self.asked += 1
        number = self.asked
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.seconds)
        self.under_way -= 1
        if self.fails_every and number % self.fails_every == 0:
            raise RequestError("http_500", "")
        if self.other_every and number % self.other_every == 0:
            picture = Picture(picture.prompt, picture.seed + 1, picture.side, picture.steps, picture.text_tokens)
        return Made(png_of(picture), {"denoise": 0.5})


def scenario_of(count: int, callers: int | None) -> Scenario:
    return Scenario("a scenario", (SMALL,) * count, callers, side_by_side.ALL)


async def figures_of(way: Any, scenario: Scenario) -> dict[str, Any]:
    references, alone_s = await side_by_side.make_references(StandIn(), [scenario])
    return await side_by_side.measured(Running(way, Processes()), scenario, 0, references, alone_s)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "PAUSE_S", 0.0)
    monkeypatch.setattr(side_by_side, "SETTLE_S", 0.0)


@pytest.mark.parametrize("callers", [1, 4, 8])
async def test_so_many_callers_wait_for_their_answers(callers: int) -> None:
    way = StandIn(seconds=0.01)
    found = await figures_of(way, scenario_of(8, callers))
    assert way.most_under_way == callers
    assert len(found["latencies_s"]["small"]) == way.asked == 8


async def test_a_mixed_load_comes_whatever_became_of_what_came_before() -> None:
    way = StandIn(seconds=0.3)
    found = await figures_of(way, scenario_of(6, None))
    assert way.most_under_way > 1
    assert found["failures"] == {}


async def test_errors_and_wrong_pictures_are_failures_and_no_throughput() -> None:
    found = await figures_of(StandIn(other_every=3, fails_every=4), scenario_of(11, 1))
    assert found["failures"] == {"wrong picture": 3, "http_500": 2}
    assert len(found["latencies_s"]["small"]) == 6
    assert found["throughput"] == pytest.approx(6 / found["duration_s"])
    assert found["timings"] == {"denoise": 0.5}


async def test_a_way_that_hangs_and_one_that_is_not_there_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(side_by_side, "REQUEST_TIMEOUT_S", 0.02)
    assert (await figures_of(StandIn(seconds=5), scenario_of(2, 2)))["failures"] == {"timeout": 2}
    async with httpx.AsyncClient(base_url="http://a-way", transport=httpx.MockTransport(refused)) as http:
        found = await figures_of(RayExample(http), scenario_of(1, 1))
    assert found["failures"] == {"connection: ConnectError": 1}


def test_rounding_is_not_another_picture_but_another_seed_is() -> None:
    picture = SMALL.picture(3)
    reference = side_by_side.pixels_of(png_of(picture))
    rounded = io.BytesIO()
    Image.fromarray((reference + 1).astype("uint8")).save(rounded, "PNG")
    assert not side_by_side.is_other(rounded.getvalue(), reference)
    assert side_by_side.is_other(png_of(SMALL.picture(4)), reference)
    assert side_by_side.is_other(png_of(Kind("larger", 128, 8, 64).picture(3)), reference)


def test_the_requests_of_a_scenario_differ_and_are_the_same_in_each_round() -> None:
    for scenario in side_by_side.SCENARIOS.values():
        assert len(set(scenario.pictures())) == len(scenario.kinds)
        assert scenario.pictures() == scenario.pictures()
    assert side_by_side.arrivals(20, 2.0, 1) == side_by_side.arrivals(20, 2.0, 1)
    assert len(side_by_side.arrivals(20, 2.0, 1)) == 20


async def test_the_port_of_diffusers_server_saves_each_picture_and_answers_with_its_url(tmp_path: Path) -> None:
    made: list[object] = []

    def own_pipeline() -> Any:
        made.append(object())
        return lambda **body: picture_of(Picture(**body))

    app = create_app(own_pipeline, tmp_path, "http://a-server")
    picture = SMALL.picture(5)
    async with httpx.AsyncClient(base_url="http://a-server", transport=httpx.ASGITransport(app)) as http:
        way = DiffusersServer(http)
        answers = await asyncio.gather(way.make(picture), way.make(picture))
    assert [answer.png for answer in answers] == [png_of(picture)] * 2
    assert len(made) == 2  # each request has its own pipeline
    assert len(os.listdir(tmp_path)) == 2


async def test_each_server_is_asked_for_the_same_picture_in_its_own_words() -> None:
    asked = []
    picture = Picture("a fox", 3, 64, 8, 128)

    async def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        await request.aread()
        if request.method == "GET":
            return httpx.Response(200, content=png_of(picture))
        return httpx.Response(200, json={"data": [{"b64_json": "QUJD"}], "timings": [{"denoise": 0.5}]})

    async with httpx.AsyncClient(base_url="http://serve", transport=httpx.MockTransport(handler)) as http:
        assert (await RayExample(http).make(picture)).png == png_of(picture)
        assert await Triptych(http).make(picture, deterministic=True) == Made(b"ABC", {"denoise": 0.5})
    ray, triptych = asked
    assert dict(ray.url.params) == {name: str(value) for name, value in asdict(picture).items()}
    assert triptych.url.path == "/v1/images/generations"
    assert httpx.Response(200, content=triptych.content).json() == {
        "prompt": "a fox", "seed": 3, "size": "64x64", "num_inference_steps": 8, "max_sequence_length": 128,
        "deterministic": True,
    }  # fmt: skip


def test_a_config_has_one_way_alone_with_the_settings_of_the_project() -> None:
    base: dict[str, Any] = {
        "import_path": "serve_app.app:build_app",
        "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}},
        "args": {"model": "a", "default_arguments": {"height": 8}},
    }
    [rival] = serve_config(base, "/models/a", "cpu", "ray_example_replicas", 8000, Path("folder"))["applications"]
    [ours] = serve_config(base, "/models/a", "cpu", "three_stage", 8000, Path("folder"))["applications"]
    assert rival["args"] == {"model": "/models/a", "device": "cpu", "max_ongoing_requests": 1, "num_replicas": 2}
    assert rival["route_prefix"] == ours["route_prefix"] == "/"
    assert ours["args"]["default_arguments"] == {"height": 8}
    assert [each["name"] for each in ours["deployments"]] == ["Ingress", "Encoder", "Denoiser", "VAE"]
    assert base["args"]["model"] == "a"


def test_one_way_has_a_denoiser_more() -> None:
    base = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"][0]
    (ours,) = serve_config(base, "/models/a", "cpu", "three_stage_replicas", 8000, Path("folder"))["applications"]
    assert ours["args"]["placement"] == "three_stage"
    assert {each["name"]: each.get("num_replicas") for each in ours["deployments"]} == {
        "Ingress": None, "Encoder": None, "Denoiser": 2, "VAE": None,
    }  # fmt: skip


def test_on_an_accelerator_each_stage_has_a_share_of_it() -> None:
    base = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"][0]
    [rival] = serve_config(base, "/models/a", "cuda", "ray_example", 8000, Path("folder"))["applications"]
    [ours] = serve_config(base, "/models/a", "cuda", "three_stage", 8000, Path("folder"))["applications"]
    assert rival["args"]["device"] == "cuda"
    assert ours["runtime_env"]["env_vars"]["SGLANG_DIFFUSION_TARGET_DEVICE"] == "cuda"
    shares = {each["name"]: each["ray_actor_options"].get("num_gpus") for each in ours["deployments"]}
    assert shares == {"Ingress": None, "Encoder": 0.1, "Denoiser": 0.1, "VAE": 0.1}


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("ray::ServeReplica:three_stage:Denoiser.handle_request", "three_stage:Denoiser"),
        ("ray::ServeReplica:one_stage:Pipeline", "one_stage:Pipeline"),
        ("ray::ProxyActor.run", "Serve's proxy"),
        ("/usr/bin/raylet --x", "the rest of Ray"),
    ],
)
def test_processes_are_called_by_their_role(title: str, expected: str) -> None:
    assert role(title) == expected


def round_of(
    throughput: float,
    p95_s: float | None = None,
    failures: dict[str, int] | None = None,
    throughput_of_base: float | None = None,
) -> dict[str, Any]:
    return {
        "requests": 4,
        "failures": failures or {},
        "duration_s": 2.0,
        "throughput": throughput,
        "throughput_of_base": throughput_of_base,
        "latencies_s": {"small": [] if p95_s is None else [p95_s]},
        "timings": {"denoise": 0.1},
        "processor_s": {"client": 0.4, "three_stage:VAE": 1.2, "idle": 0.0001},
    }


def test_a_throughput_is_compared_with_that_of_diffusers_in_process_just_before() -> None:
    rounds = [round_of(2, throughput_of_base=1), round_of(6, throughput_of_base=2), round_of(9, throughput_of_base=10)]
    assert side_by_side_report.ratio_to_base(rounds) == Spread(2.0, 0.9, 3.0)
    assert side_by_side_report.ratio_to_base([round_of(2)]) is None
    ways = {"in_process": [round_of(50)] * 3, "three_stage": rounds}
    goal = Goal("closed_8", "three_stage", "in_process", 1.5, "throughput")
    assert side_by_side_report.reached(goal, {"closed_8": {"ways": ways}}) == Spread(2.0, 0.9, 3.0)


def test_ratios_are_taken_in_each_round() -> None:
    ours, theirs = [round_of(2), round_of(6), round_of(9)], [round_of(1), round_of(2), round_of(10)]
    assert side_by_side_report.ratio(ours, theirs, side_by_side_report.throughput) == Spread(2.0, 0.9, 3.0)


def test_a_round_in_which_nothing_was_made_has_no_ratio_to_it() -> None:
    ours, theirs = [round_of(2), round_of(6)], [round_of(0), round_of(2)]
    assert side_by_side_report.ratio(ours, theirs, side_by_side_report.throughput) == Spread(3.0, 3.0, 3.0)
    assert side_by_side_report.ratio(ours[:1], theirs[:1], side_by_side_report.throughput) is None


def test_a_goal_of_latency_counts_how_many_times_shorter_it_is() -> None:
    goal = Goal("mixed", "three_stage", "diffusers_server", 2.0, "p95_small")
    ways = {"three_stage": [round_of(1, 0.5), round_of(1, None)], "diffusers_server": [round_of(1, 2), round_of(1, 9)]}
    assert side_by_side_report.reached(goal, {"mixed": {"ways": ways}}) == Spread(4.0, 4.0, 4.0)
    assert side_by_side_report.reached(goal, {}) is None


def test_a_percentile_is_that_of_all_rounds_together_beside_those_of_each() -> None:
    goal = Goal("mixed", "three_stage", "diffusers_server", 2.0, "p95_small")
    ours, theirs = [round_of(1, 1.0)] * 40, [round_of(1, 2.0)] * 39 + [round_of(1, 30.0)]
    ways = {"three_stage": ours, "diffusers_server": theirs}
    assert side_by_side_report.reached(goal, {"mixed": {"ways": ways}}) == Spread(2.0, 2.0, 30.0)


def test_a_comparison_with_a_way_that_failed_says_so() -> None:
    goal = Goal("mixed", "three_stage", "ray_example", 2.0, "p95_small")
    ways = {"three_stage": [round_of(1, 0.5)], "ray_example": [round_of(1, 0.4, {"http_500": 3})]}
    *_, verdict = side_by_side_report.goal_cells(goal, {"mixed": {"title": "mixed", "ways": ways}})
    assert verdict == "missed; 3 of the other's 4 requests failed, and count in no latency"


def test_processor_time_is_told_per_request_and_idle_processes_are_left_out() -> None:
    found = side_by_side_report.processor_ms_per_picture([round_of(1)])
    assert found == pytest.approx({"client": 100, "three_stage:VAE": 300})


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of the real ways; what is started, asked and stopped, in its order, is in the list."""
    turns: list[str] = []

    class Noted(StandIn):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        async def make(self, picture: Picture, deterministic: bool = False) -> Made:
            turns.append(self.name)
            return await super().make(picture, deterministic)

    @asynccontextmanager
    async def running(name: str, *_: object) -> Any:
        turns.append(f"start {name}")
        yield Running(Noted(name), Processes())
        turns.append(f"stop {name}")

    monkeypatch.setattr(side_by_side, "running", running)
    monkeypatch.setattr(
        side_by_side, "SCENARIOS", {"sequential_small": scenario_of(1, 1), "mixed": scenario_of(2, None)}
    )
    return turns


async def test_nothing_but_the_measured_way_and_diffusers_in_process_is_up(stand_ins: list[str]) -> None:
    options = Namespace(
        ways=["one_stage", "three_stage"], scenarios=["sequential_small", "mixed"], rounds=2, threads=1, port=1,
        model=Path("emoji-flux"), device="cpu", scale=1,
    )  # fmt: skip
    found = [result async for result in side_by_side.measure(options)]
    assert [result["rounds"] for result in found] == [1, 2]  # written after each
    result = found[-1]
    starts_and_stops = [each for each in stand_ins if " " in each]
    assert starts_and_stops == [
        "start in_process",
        "start one_stage", "stop one_stage", "start three_stage", "stop three_stage",
        "start one_stage", "stop one_stage", "start three_stage", "stop three_stage",
        "stop in_process",
    ]  # fmt: skip
    started = len(stand_ins) - 1 - stand_ins[::-1].index("start three_stage")
    warm_up, base_before, *rest = stand_ins[started + 1 : stand_ins.index("stop three_stage", started)]
    assert (warm_up, base_before) == ("three_stage", "in_process")
    assert rest == ["three_stage"] * 3
    assert list(result["scenarios"]["mixed"]["ways"]) == ["in_process", "one_stage", "three_stage"]
    page = "\n".join(side_by_side_report.as_markdown(result))
    assert f"| {LABELS['three_stage']} | " in page
    assert "| not run |" in page


def test_the_page_names_goals_that_are_reached_and_missed_and_counts_failures() -> None:
    ways = {
        "in_process": [round_of(1.0)],
        "three_stage": [round_of(0.98, 0.1, {"wrong picture": 2, "http_500": 1}, throughput_of_base=1.0)],
    }
    kinds = [asdict(SMALL)]
    result = {
        "model": "emoji-flux", "device": "cpu",
        "machine": {"cores": 2, "load_average": (0.1, 0.1, 0.1), "stolen": 0.04},
        "threads": 1, "rounds": 1, "kinds": kinds,
        "wrong_picture": 2.0, "lone": {"three_stage": {"64x64": 0.0}},
        "scenarios": {name: {"title": name, "ways": ways} for name in ("sequential_small", "closed_8")},
    }  # fmt: skip
    page = side_by_side_report.as_markdown(result)
    [small] = [line for line in page if line.startswith("| sequential_small: throughput")]
    [eight, _] = [line for line in page if line.startswith("| closed_8: throughput")]  # the other: two denoisers
    assert small.endswith("| 0.97 | 0.98 (0.98 to 0.98) | reached |")
    assert eight.endswith("| missed |")
    assert "2 wrong picture, 1 http_500 of 4" in "\n".join(page)
