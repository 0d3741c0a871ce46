"""The engine with a model of a few lines: what is merged, who fails, who goes first, who leaves."""

import functools
import gc
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.fiber import CancelledStage, Fiber
from deployments.engine.orders import earliest_deadline
from deployments.engine.statistics import BatchRun, Cancelled
from deployments.errors import DeadlineExceededError, GenerationFailedError
from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).parents[4]
TOKENS, WIDTH = 6, 8
PATIENCE_S = 60

Outputs = Future[list[torch.Tensor]]


class Denoiser(torch.nn.Module):
    """Mixes the tokens of each sample; `gate` holds a forward, `largest` is what fits into memory."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(WIDTH, WIDTH)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.largest = 1000
        self.sizes: list[int] = []  # of the batches that it was given
        self.order: list[float] = []  # the time step of each forward's first sample

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(hidden_states))
        self.order.append(float(timestep.reshape(-1)[0]))
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        if len(hidden_states) > self.largest:
            raise torch.OutOfMemoryError(f"{len(hidden_states)} samples do not fit")
        if bool((timestep < 0).any()):
            raise ValueError("a time step below 0")
        return self.compute(hidden_states, timestep)

    def compute(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scaled = hidden_states * timestep.reshape(-1, 1, 1).cos()
        mixed: torch.Tensor = self.mix(scaled) + scaled.mean(1, keepdim=True)
        return mixed


class MixesSamples(Denoiser):
    """Samples of one batch change each other: what it makes of a merged batch is wrong."""

    def compute(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().compute(hidden_states, timestep) + hidden_states.mean()


class SlowDenoiser(Denoiser):
    """So slow that the next forward of every request waits when one ends."""

    def compute(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return super().compute(hidden_states, timestep)


class NotesThreads(Denoiser):
    """Notes which threads ran its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def compute(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.threads.append(threading.current_thread().name)
        return super().compute(hidden_states, timestep)


class ClosesTheGate(Denoiser):
    """Lets one forward pass each time that the gate is opened."""

    def compute(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.gate.clear()
        return super().compute(hidden_states, timestep)


class Requests:
    """Threads that run forwards through one engine."""

    def __init__(self, engine: Engine, module: Denoiser) -> None:
        self.engine = engine
        self.module = module
        self.threads = ThreadPoolExecutor(32)

    def start(self, steps: list[float], fiber: Fiber | None = None, tokens: int = TOKENS) -> Outputs:
        """One request: a forward for each time step."""
        fiber = fiber or Fiber("request")
        self.engine.begin(fiber)
        return self.threads.submit(self._work, fiber, steps, tokens)

    def _work(self, fiber: Fiber, steps: list[float], tokens: int) -> list[torch.Tensor]:
        try:
            return self.engine.call(fiber, lambda: [self.step(fiber, t, tokens) for t in steps])
        finally:
            self.engine.end(fiber)

    def step(self, fiber: Fiber, timestep: float, tokens: int = TOKENS) -> torch.Tensor:
        arguments = {"hidden_states": sample(timestep, tokens), "timestep": torch.tensor([timestep])}
        output: torch.Tensor = self.engine.run(fiber, self.module, "transformer", None, (), arguments)
        return output

    def hold_device(self) -> Outputs:
        """A request of another shape that keeps the device busy until the gate opens."""
        self.module.gate.clear()
        while self.module.entered.acquire(blocking=False):
            pass
        holding = self.start([0.001], tokens=TOKENS + 1)
        assert self.module.entered.acquire(timeout=PATIENCE_S)
        return holding

    def start_together(self, steps: list[list[float]], **settings: Any) -> list[Outputs]:
        """Requests whose first forwards wait for the device at the same time."""
        holding = self.hold_device()
        started = [self.start(own, Fiber(f"request {i}", **settings)) for i, own in enumerate(steps)]
        wait_until(lambda: self.engine.num_waiting == len(steps))
        self.module.gate.set()
        holding.result(PATIENCE_S)
        return started


MakeEngine = Callable[..., Engine]
MakeRequests = Callable[..., Requests]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(**settings: Any) -> Engine:
        made.append(Engine(**{"max_wait_s": 0.05, "merging": "always", **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def make_requests(make_engine: MakeEngine) -> Iterator[MakeRequests]:
    made: list[Requests] = []

    def make(module: Denoiser, **settings: Any) -> Requests:
        made.append(Requests(make_engine(**settings), module))
        return made[-1]

    yield make
    for each in made:
        each.module.gate.set()
        each.threads.shutdown(wait=True)


def sample(timestep: float, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(round(abs(timestep) * 1000) if abs(timestep) < 1e6 else 0)
    return torch.randn(1, tokens, WIDTH, generator=generator)


@torch.no_grad()
def truth(module: Denoiser, timestep: float, tokens: int = TOKENS) -> torch.Tensor:
    return module.compute(sample(timestep, tokens), torch.tensor([timestep]))


def wait_until(happened: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def assert_right(made: Outputs, module: Denoiser, steps: list[float]) -> None:
    outputs = made.result(PATIENCE_S)
    assert len(outputs) == len(steps)
    for output, timestep in zip(outputs, steps, strict=True):
        torch.testing.assert_close(output, truth(module, timestep), rtol=1e-5, atol=1e-5)


EIGHT = [[0.1 * i] for i in range(1, 9)]


# --- merging ---


def test_requests_at_different_steps_share_batches_and_get_their_own_outputs(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module, max_wait_s=0.5)
    steps = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6], [0.7, 0.8, 0.9]]
    for own, made in zip(steps, served.start_together(steps), strict=True):
        assert_right(made, module, own)
    assert served.engine.statistics.batch_sizes == {1: 1 + 1, 2: 1, 3: 2}


def test_a_request_joins_and_leaves_between_the_steps_of_another(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    long, short = Fiber("long"), Fiber("short")
    served.engine.begin(long)
    outputs = [served.threads.submit(served.step, long, 0.1).result(PATIENCE_S)]
    served.engine.begin(short)
    for step in (0.2, 0.3):
        holding = served.hold_device()
        both = [served.threads.submit(served.step, fiber, t) for fiber, t in ((long, step), (short, step + 0.5))]
        wait_until(lambda: served.engine.num_waiting == 2)
        module.gate.set()
        holding.result(PATIENCE_S)
        outputs.append(both[0].result(PATIENCE_S))
        torch.testing.assert_close(both[1].result(PATIENCE_S), truth(module, step + 0.5))
    served.engine.end(short)
    outputs.append(served.threads.submit(served.step, long, 0.4).result(PATIENCE_S))
    served.engine.end(long)
    assert served.engine.statistics.batch_sizes == {1: 1 + 2 + 1, 2: 2}
    for output, step in zip(outputs, (0.1, 0.2, 0.3, 0.4), strict=True):
        torch.testing.assert_close(output, truth(module, step))


def test_forwards_of_other_shapes_do_not_share(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    holding = served.hold_device()
    made = {tokens: served.start([0.5], tokens=tokens) for tokens in (3, 4, 5)}
    wait_until(lambda: served.engine.num_waiting == 3)
    module.gate.set()
    holding.result(PATIENCE_S)
    for tokens, future in made.items():
        torch.testing.assert_close(future.result(PATIENCE_S)[0], truth(module, 0.5, tokens))
    assert served.engine.statistics.batch_sizes == {1: 4}


def test_a_model_that_mixes_samples_is_found_at_the_first_merge_and_never_merged(make_requests: MakeRequests) -> None:
    module = MixesSamples()
    served = make_requests(module)
    steps = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    for _ in range(2):
        for made, own in zip(served.start_together(steps), steps, strict=True):
            assert_right(made, module, own)
    assert served.engine.statistics.refused_structures == 1
    assert served.engine.statistics.merged == 0
    assert 0 < sum(size > 1 for size in module.sizes) <= 3, "only the attempts to merge, once"


def test_a_sample_without_numbers_does_not_forbid_the_merging_of_others(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    made = served.start_together([[0.1], [float("inf")], [0.3]])
    assert_right(made[0], module, [0.1])
    assert_right(made[2], module, [0.3])
    assert made[1].result(PATIENCE_S)[0].isnan().all()
    assert served.engine.statistics.refused_structures == 0
    assert served.engine.statistics.merged == 3


def test_deterministic_requests_run_alone_and_give_the_bits_of_a_lone_forward(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    steps = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    for own, made in zip(steps, served.start_together(steps, deterministic=True), strict=True):
        for output, timestep in zip(made.result(PATIENCE_S), own, strict=True):
            assert torch.equal(output, truth(module, timestep))
    assert served.engine.statistics.batch_sizes == {1: 7}
    assert set(module.sizes) == {1}


def test_no_batch_is_larger_than_max_batch_size(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module, max_batch_size=3)
    for _ in range(2):
        for own, made in zip(EIGHT, served.start_together(EIGHT), strict=True):
            assert_right(made, module, own)
    assert max(module.sizes) == 3
    assert served.engine.statistics.batch_sizes[3] == 4


def test_no_merged_forward_has_more_tokens_than_max_batch_tokens(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module, max_batch_tokens=2 * TOKENS + 1)
    for own, made in zip(EIGHT, served.start_together(EIGHT), strict=True):
        assert_right(made, module, own)
    assert max(module.sizes) == 2


def test_a_sample_larger_than_the_bound_still_runs(make_requests: MakeRequests) -> None:
    module = Denoiser()
    assert_right(make_requests(module, max_batch_tokens=1).start([0.1]), module, [0.1])


def test_requests_that_come_while_another_is_prepared_share_its_first_batch(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module, max_wait_s=PATIENCE_S)
    first, second = Fiber("first"), Fiber("second")
    served.engine.begin(first)

    def prepare() -> torch.Tensor:
        second_made.append(served.start([0.2], second))
        wait_until(lambda: served.engine.num_waiting == 1)
        return served.step(first, 0.1)

    second_made: list[Outputs] = []
    torch.testing.assert_close(served.engine.call(first, prepare), truth(module, 0.1))
    assert_right(second_made[0], module, [0.2])
    assert served.engine.statistics.batch_sizes == {2: 1}
    served.engine.end(first)


def test_no_forward_waits_longer_than_max_wait_s_for_requests_that_keep_coming(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module, max_wait_s=0.0)
    holding = served.hold_device()
    made = [served.start(own) for own in EIGHT]
    wait_until(lambda: served.engine.num_waiting == len(EIGHT))
    module.gate.set()
    holding.result(PATIENCE_S)
    for own, outputs in zip(EIGHT, made, strict=True):
        assert_right(outputs, module, own)
    assert served.engine.statistics.batch_sizes == {1: 9}, "each was run before the next one was prepared"


def test_a_new_request_joins_a_running_one_however_short_the_wait(make_requests: MakeRequests) -> None:
    module = SlowDenoiser()
    served = make_requests(module, max_wait_s=0.0)
    long = Fiber("long")
    running = served.start([100.0 + i for i in range(LONG_STEPS)], long)
    wait_until(lambda: long.forwards > 0)
    assert_right(served.start([0.1]), module, [0.1])
    assert not running.done()
    running.result(PATIENCE_S)


def test_other_requests_go_on_while_one_asks_another_stage(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    fiber, answered = Fiber("asks"), threading.Event()
    served.engine.begin(fiber)

    def work() -> list[Any]:
        before = served.step(fiber, 0.1)
        thread = served.engine.elsewhere(lambda: answered.wait(PATIENCE_S) and threading.current_thread().name)
        return [before, thread, served.step(fiber, 0.2)]

    asking = served.threads.submit(served.engine.call, fiber, work)
    assert_right(served.start([0.5, 0.6]), module, [0.5, 0.6])
    assert not asking.done()
    answered.set()
    before, thread, after = asking.result(PATIENCE_S)
    assert thread.startswith("elsewhere")
    torch.testing.assert_close(before, truth(module, 0.1))
    torch.testing.assert_close(after, truth(module, 0.2))
    served.engine.end(fiber)


def test_a_request_keeps_its_own_setting_of_gradients(make_requests: MakeRequests) -> None:
    served = make_requests(Denoiser())
    seen: dict[str, list[bool]] = {"with": [], "without": []}

    def work(name: str, fiber: Fiber, is_enabled: bool) -> None:
        with torch.set_grad_enabled(is_enabled):
            for timestep in (0.1, 0.2, 0.3):
                assert not served.step(fiber, timestep).requires_grad
                seen[name].append(torch.is_grad_enabled())

    holding = served.hold_device()
    made = []
    for name, is_enabled in (("with", True), ("without", False)):
        fiber = Fiber(name)
        served.engine.begin(fiber)
        made.append(served.threads.submit(served.engine.call, fiber, functools.partial(work, name, fiber, is_enabled)))
    wait_until(lambda: served.engine.num_waiting == 2)
    served.module.gate.set()
    for each in (holding, *made):
        each.result(PATIENCE_S)
    assert seen == {"with": [True] * 3, "without": [False] * 3}


# --- errors ---


def test_a_poisoned_request_in_a_batch_of_eight_fails_alone(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    steps = [[0.1], [0.2], [0.3], [-1.0], [0.5], [0.6], [0.7], [0.8]]
    for _ in range(2):  # at the first merge, and when the structure is known
        made = served.start_together(steps)
        with pytest.raises(ValueError, match="a time step below 0"):
            made.pop(3).result(PATIENCE_S)
        for own, future in zip(steps[:3] + steps[4:], made, strict=True):
            assert_right(future, module, own)
    assert served.engine.statistics.bisections >= 4
    assert_right(served.start([0.9]), module, [0.9])


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_the_bound_is_remembered(
    make_requests: MakeRequests,
) -> None:
    module = Denoiser()
    module.largest = 3
    served = make_requests(module)
    for _ in range(2):  # the first merge is tried with two
        for own, made in zip(EIGHT, served.start_together(EIGHT), strict=True):
            assert_right(made, module, own)
    assert 8 in module.sizes
    module.sizes.clear()
    for own, made in zip(EIGHT, served.start_together(EIGHT), strict=True):
        assert_right(made, module, own)
    assert max(module.sizes) == 2, "8 does not fit, 4 does not fit, 2 does"


def test_a_request_that_does_not_fit_alone_gets_the_error_itself(make_requests: MakeRequests) -> None:
    module = Denoiser()
    module.largest = 0
    served = make_requests(module)
    with pytest.raises(torch.OutOfMemoryError):
        served.start([0.1]).result(PATIENCE_S)
    module.largest = 8
    assert_right(served.start([0.1]), module, [0.1])


def test_errors_of_torch_in_the_requests_own_code_leave_the_process_alive() -> None:
    # torch walks the C stack at each error: where that is not in order, the process crashes.
    command = [*python_with_libraries(), "-m", "tests.support.erring_process"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, ["alive"]), ended.stderr


# --- cancelling ---


def test_a_request_that_has_not_begun_is_cancelled_at_once(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    running = served.hold_device()
    fiber = Fiber("unwanted")
    waiting = served.start([0.2], fiber)
    wait_until(lambda: served.engine.num_waiting == 1)
    served.engine.cancel(fiber)
    with pytest.raises(CancelledStage):
        waiting.result(PATIENCE_S)  # while the device is still busy
    assert not running.done()
    module.gate.set()
    running.result(PATIENCE_S)
    assert module.order == pytest.approx([0.001])


def test_a_waiting_forward_is_cancelled_at_once(make_requests: MakeRequests) -> None:
    module = ClosesTheGate()
    served = make_requests(module, max_batch_size=1)
    running = served.hold_device()
    urgent, unwanted = Fiber("urgent", deadline=0.0), Fiber("unwanted", deadline=time.monotonic() + 3600)
    made = [served.start([0.1], urgent), served.start([0.2], unwanted)]
    wait_until(lambda: served.engine.num_waiting == 2)
    module.gate.set()
    assert module.entered.acquire(timeout=PATIENCE_S)  # the urgent one has the device, and the other waits for it
    running.result(PATIENCE_S)
    served.engine.cancel(unwanted)
    with pytest.raises(CancelledStage):
        made[1].result(PATIENCE_S)
    assert not made[0].done()
    module.gate.set()
    assert_right(made[0], module, [0.1])
    module.gate.set()
    assert_right(served.start([0.3]), module, [0.3])
    assert module.order == pytest.approx([0.001, 0.1, 0.3])


def test_a_running_request_is_cancelled_at_its_next_forward(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    module.gate.clear()
    fiber = Fiber("unwanted")
    running = served.start([0.1, 0.2, 0.3], fiber)
    assert module.entered.acquire(timeout=PATIENCE_S)
    served.engine.cancel(fiber)
    served.engine.cancel(fiber)
    module.gate.set()
    with pytest.raises(CancelledStage):
        running.result(PATIENCE_S)
    assert module.order == pytest.approx([0.1])
    assert served.engine.statistics.cancelled == 1


def test_a_request_ends_when_its_deadline_has_passed(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    late = Fiber("late", deadline=time.monotonic() - 1, expires=time.monotonic() - 1)
    with pytest.raises(DeadlineExceededError, match="deadline"):
        served.start([0.1], late).result(PATIENCE_S)
    assert module.sizes == []


@pytest.fixture
def no_collections() -> Iterator[None]:
    """What lies in a circle stays: on a device, the next collection would be too late."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_two_hundred_requests_leave_no_thread_and_no_tensor(make_requests: MakeRequests) -> None:
    module = Denoiser()
    served = make_requests(module)
    before = set(threading.enumerate())
    kept: list[weakref.ref[torch.Tensor]] = []
    outcomes: list[str] = []

    def request(number: int) -> None:
        fiber = Fiber(str(number))
        served.engine.begin(fiber)
        try:
            for step in range(3):
                output = served.step(fiber, 0.1 * number + 0.01 * step)
                kept.append(weakref.ref(output))
                if number % 5 == 0:
                    served.engine.cancel(fiber)
            outcomes.append("done")
        except CancelledStage:
            outcomes.append("cancelled")
        finally:
            served.engine.end(fiber)

    for group in range(10):
        threads = [threading.Thread(target=request, args=(20 * group + i,)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert (outcomes.count("done"), outcomes.count("cancelled")) == (160, 40)
    assert set(threading.enumerate()) == before
    assert len(kept) == 160 * 3 + 40
    wait_until(lambda: all(reference() is None for reference in kept))
    assert (served.engine.num_waiting, served.engine.num_fibers) == (0, 0)


# --- order ---

LONG_STEPS = 50


def run_long_and_short(served: Requests) -> list[float]:
    """The order of the forwards of a long request (time steps from 100 on) and of three short ones that come
    while it runs; their shapes differ."""
    long = Fiber("long", remaining_forwards=lambda: max(1, LONG_STEPS - long.forwards))
    long.deadline = long.arrived + 3600
    made = [served.start([100.0 + i for i in range(LONG_STEPS)], long, tokens=TOKENS + 1)]
    wait_until(lambda: long.forwards > 0)
    for number in range(3):
        short = Fiber("short", deadline=time.monotonic() + 60, remaining_forwards=lambda: 1)
        made.append(served.start([number + 0.1, number + 0.2], short))
    for future in made:
        future.result(PATIENCE_S)
    return served.module.order


def test_short_requests_pass_a_long_one_in_the_order_slack(make_requests: MakeRequests) -> None:
    order = run_long_and_short(make_requests(SlowDenoiser(), order="slack"))
    last_short = max(i for i, step in enumerate(order) if step < 100)
    assert sum(step >= 100 for step in order[last_short:]) >= LONG_STEPS // 2


def test_short_requests_wait_for_a_long_one_in_the_order_fifo(make_requests: MakeRequests) -> None:
    order = run_long_and_short(make_requests(SlowDenoiser(), order="fifo"))
    last_long = max(i for i, step in enumerate(order) if step >= 100)
    assert sum(step < 100 for step in order[last_long:]) >= 3


def test_a_long_request_finishes_while_short_ones_keep_coming(make_requests: MakeRequests) -> None:
    served = make_requests(SlowDenoiser(), order="slack")
    long = Fiber("long", remaining_forwards=lambda: max(1, 30 - long.forwards))
    long.deadline = long.arrived + 3 * 30 * 0.01
    finished = served.start([100.0 + i for i in range(30)], long, tokens=TOKENS + 1)
    short: list[Outputs] = []
    give_up = time.monotonic() + PATIENCE_S
    while not finished.done():
        assert time.monotonic() < give_up, "the long one starves"
        while sum(not each.done() for each in short) < 3:  # there is always a short one that waits
            fiber = Fiber("short", deadline=time.monotonic() + 3 * 0.01, remaining_forwards=lambda: 1)
            short.append(served.start([len(short) * 0.001], fiber, tokens=TOKENS + 2 + len(short) % 3))
        time.sleep(0.001)
    assert len(finished.result()) == 30
    assert len(short) > 3, "short ones were served beside it"


def test_a_new_request_without_a_deadline_is_not_left_behind_a_running_one(make_requests: MakeRequests) -> None:
    served = make_requests(SlowDenoiser(), order="slack")
    long = Fiber("long", deadline=time.monotonic() - 1, remaining_forwards=lambda: 100)
    running = served.start([100.0 + i for i in range(LONG_STEPS)], long, tokens=TOKENS + 1)
    wait_until(lambda: long.forwards > 0)
    served.start([0.1]).result(PATIENCE_S)
    assert not running.done()
    running.result(PATIENCE_S)


# --- the end, and what is told ---


def test_an_accelerator_belongs_to_the_engines_thread(make_requests: MakeRequests) -> None:
    module = NotesThreads()
    make_requests(module).start([1.0, 2.0]).result(PATIENCE_S)
    assert module.threads == ["engine"] * 2


def test_a_closed_engine_refuses_forwards_and_ends_its_thread(make_engine: MakeEngine) -> None:
    engine, module = make_engine(), Denoiser()
    engine.close()
    assert not engine.is_alive
    with pytest.raises(GenerationFailedError, match="closed"):
        Requests(engine, module).step(Fiber("late"), 0.1)


def test_a_closed_engine_lets_every_request_leave_its_work(make_requests: MakeRequests) -> None:
    module = SlowDenoiser()
    served = make_requests(module)
    left: list[int] = []

    def work(fiber: Fiber) -> None:
        try:
            for step in range(1000):
                served.step(fiber, 0.1 + step)
        finally:
            left.append(1)

    fibers = [Fiber(str(number)) for number in range(6)]
    made = [served.threads.submit(served.engine.call, fiber, functools.partial(work, fiber)) for fiber in fibers]
    wait_until(lambda: all(fiber.forwards for fiber in fibers))
    served.engine.close()
    for each in made:
        with pytest.raises(GenerationFailedError, match="closed"):
            each.result(PATIENCE_S)
    assert len(left) == len(fibers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_ever_when_the_engines_thread_fails(make_requests: MakeRequests) -> None:
    def fail(measurement: object) -> None:
        raise OSError("nothing can be measured any more")

    module = Denoiser()
    served = make_requests(module, measure=fail)
    started = [served.hold_device(), served.start([0.1]), served.start([0.2])]
    wait_until(lambda: served.engine.num_waiting == 2)
    module.gate.set()
    for waiting in started:
        with pytest.raises(GenerationFailedError, match="closed"):
            waiting.result(PATIENCE_S)
    wait_until(lambda: not served.engine.is_alive)
    with pytest.raises(GenerationFailedError, match="closed"):
        served.start([0.1]).result(PATIENCE_S)


def test_every_turn_of_the_device_is_measured(make_requests: MakeRequests) -> None:
    told: list[object] = []
    module = Denoiser()
    served = make_requests(module, measure=told.append)
    for _ in range(2):
        for made in served.start_together([[0.1], [0.2], [0.3]]):
            made.result(PATIENCE_S)
    unwanted = Fiber("unwanted")
    served.engine.begin(unwanted)
    served.engine.cancel(unwanted)
    served.engine.end(unwanted)
    wait_until(lambda: sum(isinstance(each, BatchRun) for each in told) == 4)
    turns = [each for each in told if isinstance(each, BatchRun)]
    assert [turn.num_forwards for turn in turns] == [1, 3, 1, 3]
    assert [turn.is_merged for turn in turns] == [False, True, False, True]
    assert {turn.shape for turn in turns} == {f"{TOKENS}x{WIDTH}", f"{TOKENS + 1}x{WIDTH}"}
    assert all(len(turn.queue_seconds) == turn.num_forwards and turn.seconds > 0 for turn in turns)
    assert told.count(Cancelled()) == 1
    described = served.engine.describe()
    expected = {"forwards": 8, "batches": 4, "merged": 6, "cancelled": 1, "waiting_forwards": 0, "is_alive": True}
    assert {name: described[name] for name in expected} == expected
    assert served.engine.num_fibers == 0
    assert sorted(map(sorted, served.engine.costs.table().values())) == [[1], [1, 2, 3]]


def test_what_a_request_still_needs_is_predicted_from_its_own_forwards(make_requests: MakeRequests) -> None:
    requests = make_requests(SlowDenoiser())
    engine, fiber = requests.engine, Fiber("request", remaining_forwards=lambda: 10)
    engine.begin(fiber)
    assert engine.remaining_s() == [], "nothing is known before its first forward"
    for timestep in (0.1, 0.2, 0.3):
        requests.step(fiber, timestep)
    assert engine.remaining_s() == [pytest.approx(10 * fiber.seconds / 3)]
    assert engine.statistics.seconds == pytest.approx(fiber.seconds)
    engine.end(fiber)
    assert engine.remaining_s() == []


def test_a_slow_first_forward_does_not_tell_how_long_a_step_takes(make_requests: MakeRequests) -> None:
    module = SlowDenoiser()
    requests = make_requests(module, max_batch_size=1)
    requests.start([0.1] * 5).result(PATIENCE_S)
    module.gate.clear()
    fiber = Fiber("late")
    made = requests.start([0.2], fiber)
    time.sleep(0.3)
    module.gate.set()
    made.result(PATIENCE_S)
    assert fiber.step_s < fiber.seconds / 2


def test_a_long_request_that_is_late_holds_up_a_short_one_for_no_longer_than_the_short_one_may_take() -> None:
    def fiber(forwards: int, remaining: int, deadline: float) -> Fiber:
        return Fiber("r", deadline=deadline, remaining_forwards=lambda: remaining, forwards=forwards, step_s=0.25)

    late = fiber(forwards=20, remaining=20, deadline=-1.0)  # 10 s of its own
    short = fiber(forwards=0, remaining=2, deadline=1.0)  # 0.5 s of its own
    assert earliest_deadline(late, 0.0) < earliest_deadline(short, 0.0)
    assert earliest_deadline(short, 1.2) < earliest_deadline(late, 1.2)
    assert earliest_deadline(late, 20.0) < earliest_deadline(fiber(0, 2, 21.0), 20.0)  # and it does not starve


def test_work_that_does_not_end_in_the_engines_thread_is_seen_from_outside() -> None:
    engine, held, begun = Engine(), threading.Event(), threading.Event()

    class Hangs(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            begun.set()
            held.wait(30)
            return hidden_states

    def forward(fiber: Fiber) -> None:
        engine.run(fiber, Hangs(), "transformer", None, (), {"hidden_states": torch.ones(1, 4)})

    def step(fiber: Fiber) -> None:
        begun.set()
        held.wait(30)

    try:
        for work, first in ((forward, True), (step, False), (forward, False)):
            fiber = Fiber("hangs")
            engine.begin(fiber)
            with ThreadPoolExecutor(1) as thread:
                called = thread.submit(engine.call, fiber, lambda work=work, fiber=fiber: work(fiber))
                assert begun.wait(30)
                seconds, is_first = engine.under_way.look().seconds, engine.under_way.look().is_first
                held.set()
                called.result(30)
            engine.end(fiber)
            assert seconds > 0
            assert is_first is first
            held.clear()
            begun.clear()
    finally:
        held.set()
        engine.close()
