"""One part, in this process: `python -m benchmarks.first_look PART DEVICE small|full`; its findings as JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict

import torch

from benchmarks.first_look.part import Findings, Setting


def main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the error stream from now on
    name, device, size = sys.argv[1:]
    setting = Setting(torch.device(device), size == "small")
    torch.set_num_threads(1 if setting.is_small else torch.get_num_threads())
    findings: Findings = importlib.import_module(f"benchmarks.first_look.parts.{name}").look(setting)
    answer.write(json.dumps(asdict(findings)))
    answer.flush()


if __name__ == "__main__":
    main()
