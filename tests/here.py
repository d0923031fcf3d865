"""An engine without workers, and what runs leave behind: for tests that compare with an undisturbed study."""

import json
from typing import Any

from layerlens.experiments.grid import Plan
from layerlens.experiments.job import Ended, Job, perform
from layerlens.experiments.store import Store


class Here:
    """An engine that does each job at once, in this process."""

    def __init__(self) -> None:
        self.ended: list[Ended] = []

    @property
    def free(self) -> int:
        return 0 if self.ended else 1

    def start(self, job: Job) -> None:
        self.ended.append(perform(job))

    def wait(self, timeout_s: float) -> list[Ended]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        pass


def content(store: Store, plan: Plan) -> dict[str, Any]:
    """All that runs leave behind, without their times; each has logged each epoch once."""
    found: dict[str, Any] = {}
    for key, run in plan.distinct.items():
        folder = store.run_folder(key)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == list(range(1, run.config.epochs + 1))
        checkpoints = json.loads((folder / "result.json").read_text())["checkpoints"]
        found[key] = {
            "metrics": [{name: value for name, value in row.items() if name != "wall_s"} for row in rows],
            "weights": {name: (folder / name).read_bytes() for name in checkpoints},
            "measured": {m.file: json.loads((folder / m.file).read_text()) for m in run.measured},
        }
    return found
