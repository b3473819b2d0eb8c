"""A progress that keeps what a person would see."""

from __future__ import annotations


class Said(list):
    """The sentences, and how far each work came."""

    def say(self, text: str) -> None:
        self.append(text)

    def done(self, work: str, count: int, total: int | None = None) -> None:
        self.append(f"{work} {count}/{total}")

    def training(self, work: str, row: dict, batch: int) -> None:
        self.append(f"{work} step {row['step']}")
