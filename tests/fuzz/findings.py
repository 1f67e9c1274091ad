"""What a part of the fuzzing found: rows for the table, and faults."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """`rows` are (what, figure); `faults` are sentences, and none is the aim."""

    part: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def row(self, what: str, figure: object) -> None:
        self.rows.append((what, str(figure)))
