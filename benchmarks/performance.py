"""docs/performance.md: the tables of the last runs on one page, with what limits each and what did not help.

    python -m benchmarks.performance
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import DOCS

PAGE = Path("docs/performance.md")

# benchmark -> what limits it, and what was tried; the figures are those of its own run.
REMARKS = {
    "overhead": """What is added are Ray's own hops (the empty chain above), the preparation that each stage repeats
because it runs the pipeline's own `__call__` (about 5 ms of processor time a stage), and forwards that are slower
while Ray's processes want a core of the two.
What helped: no item after the inputs of the VAE stage (a hop less), no inspection of signatures and fewer looks at each
value at each forward (1.1 to 0.3 ms between two forwards without work), seeding only the generators in use, and
requests as greenlets of the engine's thread (no thread switch in a step). What did not: user code and
router in Serve's main loop (`RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0`,
`RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0`): 67 ms against 67 ms besides compute, at best of 21 requests of one step.""",
    "side_by_side": """This run has all ways and all scenarios, on a machine whose host gave a quarter of the processor
time to others (up to half of it in round 5, and tests ran beside round 3): ways that need both cores, and hops
between processes, pay more for that than a single process does. [An earlier run](benchmarks/side_by_side_quieter.md)
of four ways in a quiet hour found 0.76 (small) and 0.95 (standard pictures) one at a time, and 7.4 times shorter a
p95 under mixed load than (b1), 0.88 times (c)'s; its 8 callers asked twice each, so that the start and the end, in
which no stage overlaps, were most of it: 1.17.
One at a time: the added milliseconds are those of "Where the milliseconds go" below, a quarter of so small a picture.
8 callers: one thread of arithmetic in one denoiser bounds three stages, and a batch of this model gains little on a
CPU (1.4 for eight forwards of 80 tokens, 1.1 of 528); the encoder and the VAE have the other core. With a denoiser
for each core (e2) 1.9 of the two cores are busy: a picture costs about as much processor time as in process, of which
Ray, the ingress and the other stages take what the batches save, so that two cores cannot give much more than 1.5.
What helped: requests that do not wait for company, and the VAE and encoder working while the denoiser does.
(c) starts a thread for each request and so uses both cores without any hop: best for long texts, and behind a single
process with small pictures from 4 callers on. (b) as documented fails most requests that come at once; those that it
does answer are quick, because the others are gone.
Mixed load: where the host took half of the machine in the middle of the long request, it was late, and the short ones
waited for it by seconds; a late request no longer holds up others for longer than they take (changed after this
run).""",
    "engine": """A batch of eight gains only what the transformer's forward gains ("gain of the forward"): on one CPU
thread that is the overhead of small matrix products, and nothing once they are large. Between two batches each request
has about 0.4 ms of its pipeline's own Python, one after the other whatever runs them.
What helped: requests as greenlets of the engine's one thread. As threads of their own, eight at hidden 64 gained 1.9 to
2.0 in the same hour in which greenlets gained 2.7 to 3.3: eight threads that wake together fight for the interpreter,
and to wake a thread on another core of this virtual machine takes 350 microseconds (20 on the same core). The p95 of
short requests beside a long one fell from 567 ms to between 89 and 152 in three runs with it and with forwards that no
longer wait for company that does not fit. What did not help: a longer wait for company, a shorter thread switch
interval, other settings of malloc.
Binding all threads to one core helped as much as greenlets, but would bind torch's own threads too.
Runs of two days: gains of 2.9, 2.9, 3.1 and 2.9 at hidden 64 and 2.05, 1.95, 2.1 and 3.0 at hidden 256 (48 tokens);
the long request slowed by 1.0, 0.75, 1.24 and 0.51 times the work of the short ones. The cancel that took 1.4 s in this
run was one of 50, while the host took up to half of the processor time; in 150 more, alone on the machine, the slowest
took 33 ms (1.1 steps). Tests ran beside the larger model's rows from its lone request on.""",
    "cache_dit": """The blocks that are computed bound the time. Between two computed steps TaylorSeer's extrapolation
is nearer to the truth than the plain residual, at the same blocks.""",
    "loading": """Streaming pays where the store is slower than one reader; a file that the page cache holds is read at
memory speed either way.""",
    "stages": """What is not compute: Serve's proxy and its hops (an actor call each, on cores that the stages want
too), the preparation of each stage, which runs the pipeline's own `__call__`, and the upload, for which the caller
waits.""",
    "recovery": """One kill of each kind. With a spare replica: Ray must notice the death, and the prompt is encoded
again. Without one: a process must start, import torch and diffusers and load its weights. What is done again is
bounded by the interval of the checkpoints.""",
    "cancel": """A forward that runs is not interrupted: one step at most. Before it: a cancel goes through Serve's
proxy, the ingress and the denoiser's stream, each on an event loop of its own; that of a job is written to the job
store first.""",
    "overload": """A 429 costs the ingress about 2 ms of processor time in the application; Serve's proxy and its hop
to the ingress cost several times that, and on these cores they take it from the stages.""",
    "serving": """Two cores hold the client, Ray and all stages: the latencies are of a machine that is full.""",
    "scale": """The bound knows the future and pays no start-up time; a policy sees only what has happened.""",
}


def main() -> None:
    results = [json.loads(file.read_text(encoding="utf-8")) for file in DOCS.glob("*.json")]
    devices = sorted({str(result.get("device", "cpu")) for result in results})
    lines = [
        "# Performance",
        "",
        "Made by `python -m benchmarks.performance` from the last run of each benchmark. "
        + ("Nothing here ran on a GPU." if devices == ["cpu"] else f"Devices: {', '.join(devices)}."),
    ]
    for name, remark in REMARKS.items():
        table = DOCS / f"{name}.md"
        if not table.exists():
            lines += ["", f"## {name}", "", f"Not run yet: `python -m benchmarks.{name}`."]
            continue
        text = table.read_text(encoding="utf-8").rstrip().replace("\n## ", "\n### ").replace("# ", "## ", 1)
        lines += ["", text, "", f"*Machine: {machine_of(name)}.*", "", remark]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def machine_of(name: str) -> str:
    result: dict[str, Any] = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    machine = result.get("machine")
    if not machine:
        return "not noted in this run"
    versions = ", ".join(f"{key} {machine[key]}" for key in ("python", "torch") if key in machine)
    return f"{machine['cores']} cores, load average {machine['load_average'][0]:.1f}, {versions}"


if __name__ == "__main__":
    main()
