"""The LoRAs that were added while running, in the database of the job store: every ingress replica reads the same."""

from __future__ import annotations

from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from deployments.errors import InvalidRequestError
from serve_app.adapters.records import Facts, ServedAdapter
from serve_app.errors import ConflictError
from serve_app.jobs.database import writing
from serve_app.jobs.tables import adapters


class AdapterStore:
    """Those of one model of an application; every method is one transaction, from any thread."""

    def __init__(self, engine: sa.Engine, application: str, model: str) -> None:
        self._engine = engine
        self._writing = writing(engine)
        self._key = {"application": application, "model": model}
        self._own = sa.and_(adapters.c.application == application, adapters.c.model == model)

    def all(self) -> dict[str, ServedAdapter]:
        """By name, the first added first."""
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(adapters).where(self._own).order_by(adapters.c.created_at)).all()
        return {row.name: _adapter(row) for row in rows}

    def add(self, new: ServedAdapter, at_most: int) -> ServedAdapter:
        """The adapter as it is in the store: the one of before, where it was the same.

        Raises ConflictError where the name stands for another one, InvalidRequestError where `at_most` are there.
        """
        assert new.facts is not None
        values = {
            "name": new.name,
            "path": new.path,
            "weight_name": new.weight_name,
            "component": new.component,
            "scale": new.scale,
            "facts": asdict(new.facts),
            "created_at": new.created,
        }
        try:
            with self._writing.begin() as connection:
                row = connection.execute(
                    sa.select(adapters).where(self._own, adapters.c.name == new.name)
                ).one_or_none()
                if row is None:
                    count = connection.execute(sa.select(sa.func.count()).select_from(adapters).where(self._own))
                    if count.scalar_one() >= at_most:
                        raise InvalidRequestError(
                            f"{at_most} LoRAs were added, and no more are kept: delete one first",
                            "name",
                            "limit_exceeded",
                        )
                    connection.execute(sa.insert(adapters).values(self._key | values))
                    return new
        except IntegrityError:  # PostgreSQL: the same name came in at the same time
            return self._as_before(self.all()[new.name], new)
        return self._as_before(_adapter(row), new)

    def remove(self, name: str) -> ServedAdapter | None:
        """The one that was there; None where there was none."""
        with self._writing.begin() as connection:
            row = connection.execute(sa.select(adapters).where(self._own, adapters.c.name == name)).one_or_none()
            if row is None:
                return None
            connection.execute(sa.delete(adapters).where(self._own, adapters.c.name == name))
            return _adapter(row)

    def _as_before(self, known: ServedAdapter, new: ServedAdapter) -> ServedAdapter:
        differs = [name for name in ("digest", "component", "scale") if getattr(known, name) != getattr(new, name)]
        if not differs:
            return known
        what = "content" if differs[0] == "digest" else differs[0]
        reason = f"name: {new.name!r} is taken by a LoRA of another {what}: delete it first"
        raise ConflictError(reason, "name", "name_taken")


def _adapter(row: sa.Row[tuple[object, ...]]) -> ServedAdapter:
    values = row._mapping
    return ServedAdapter(
        name=values["name"],
        path=values["path"],
        source="added",
        weight_name=values["weight_name"],
        component=values["component"],
        scale=values["scale"],
        created=values["created_at"],
        facts=Facts.of(values["facts"]),
    )
