"""What a training run tells: figures by step, speed, and a profile where it is asked for."""

import json
import time
from pathlib import Path

import jax
import numpy as np

CURVES = "metrics.jsonl"


class Curves:
    """metrics.jsonl and TensorBoard events, written by the first process alone.

    What an interrupted run wrote past its checkpoint is taken out of metrics.jsonl; TensorBoard
    itself hides events that were written again.

    Args:
      folder: of the model.
      start: steps that the run goes on from.
    """

    def __init__(self, folder: Path, start: int):
        from clu import metric_writers  # brings TensorFlow, which only training needs

        self._file = None
        if jax.process_index() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CURVES
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                with_step = _parse(line)
                if with_step is not None and with_step["step"] <= start:
                    kept.append(line)
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(f"{line}\n" for line in kept))
        whole.replace(path)
        self._file = open(path, "a")
        self._writer = metric_writers.SummaryWriter(str(folder))

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Writes figures of one step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **figures}) + "\n")
            self._file.flush()
            self._writer.write_scalars(step, figures)

    def close(self) -> None:
        """Ends both files."""
        if self._file is not None:
            self._file.close()
            self._writer.close()


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a line that a kill cut short
        return None


class Meter:
    """How fast training goes, over the steps since it was last read, in T5X's names.

    Args:
      flops_per_step: operations that a step needs.
      peak_flops: operations a second of all devices together, at best.
      devices: how many they are.
      times: by how much a whole batch is more than the rows that are counted here.
    """

    def __init__(
        self, flops_per_step: int, peak_flops: float, devices: int = 1, times: float = 1.0
    ):
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._devices, self._times = devices, times
        self.restart()

    def restart(self) -> None:
        """Forgets what was; call it after anything that isn't a step."""
        self._began = time.perf_counter()
        self._waited, self._steps, self._rows, self._tokens, self._slots = 0.0, 0, 0, 0, 0

    def count(self, batch: dict[str, np.ndarray], waited: float) -> None:
        """Counts a step over a batch for which training waited so many seconds."""
        self._steps += 1
        self._rows += len(batch["lengths"])
        self._tokens += int(batch["lengths"].sum())
        self._slots += batch["tokens"].size
        if "other_tokens" in batch:
            self._tokens += int(batch["other_lengths"].sum())
            self._slots += batch["other_tokens"].size
        self._waited += waited

    def read(self) -> dict[str, float]:
        """The figures, once the last step counted is done; starts over. None of no steps."""
        if not self._steps:
            self.restart()
            return {}
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rate = self._flops_per_step * self._steps / seconds
        tokens = self._tokens * self._times / seconds
        figures = {
            "timing/seconds": seconds,
            "timing/steps_per_second": self._steps / seconds,
            "timing/seqs_per_second": self._rows * self._times / seconds,
            "timing/target_tokens_per_second": tokens,
            "timing/target_tokens_per_second_per_core": tokens / self._devices,
            "timing/model_flops_utilization": rate / self._peak_flops,
            "timing/data_wait_fraction": self._waited / seconds,
            "padding_fraction": 1 - self._tokens / max(self._slots, 1),
        }
        self.restart()
        return figures


class Profile:
    """A profiler trace of some steps, for TensorBoard or Perfetto.

    Args:
      folder: gets plugins/profile/.
      first: step before which the trace begins; 0 for no trace.
      count: steps in it.
    """

    def __init__(self, folder: Path, first: int, count: int):
        self._folder, self._first, self._last = folder, first, first + count - 1
        self._running = False

    def before(self, step: int) -> None:
        """Begins the trace if its first step comes next."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        """Ends the trace if its last step was this one; `result` is of that step."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends the trace if it is still running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
