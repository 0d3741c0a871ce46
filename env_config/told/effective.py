"""The effective value of each variable in a process, and where it comes from."""

from dataclasses import dataclass
from typing import Literal

from env_config.section import EnvSection, shown
from env_config.variables import SECTIONS, EnvConfig

Source = Literal["environment", "default", "from primary"]


@dataclass(frozen=True)
class EffectiveValue:
    variable: str
    value: str  # secrets are masked
    source: Source


def effective_values(env: EnvConfig) -> tuple[EffectiveValue, ...]:
    """One row for each of the 45 variables, in the document's order."""
    fallbacks: dict[str, tuple[EnvSection, Source]] = {
        "cache_dit_secondary": (env.cache_dit_secondary.resolve(env.cache_dit), "from primary")
    }
    rows = []
    for name, section_type in SECTIONS.items():
        section: EnvSection = getattr(env, name)
        fallback, fallback_source = fallbacks.get(name, (section, "default"))
        for declaration in section_type.declarations():
            is_set = declaration.field in section.model_fields_set
            value = getattr(section if is_set else fallback, declaration.field)
            source: Source = "environment" if is_set else fallback_source
            rows.append(EffectiveValue(declaration.variable, shown(value), source))
    return tuple(rows)
