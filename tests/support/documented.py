"""The document of SGLang Diffusion, copied unchanged to documented_variables.md, as rows."""

from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).with_name("documented_variables.md")


@dataclass(frozen=True)
class DocumentedVariable:
    heading: str
    name: str
    default: str
    description: str


def documented_variables() -> list[DocumentedVariable]:
    rows = []
    heading = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("| `SGLANG_"):
            name, default, description = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append(DocumentedVariable(heading, name.strip("`"), default.strip("`"), description))
    return rows


DOCUMENTED = documented_variables()
