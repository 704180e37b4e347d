"""Progress bars of runs that are commands of their own: one line each, below the line that counts runs."""

from contextlib import AbstractContextManager
from pathlib import Path

from tqdm import tqdm

from trl_capo.progress import read_progress


class Bars(AbstractContextManager):
    """Bars by the line that they stand on. What they show is read from the files that the commands report to."""

    def __init__(self) -> None:
        self._bars: dict[int, tqdm] = {}

    def show(self, running: dict[int, tuple[str, Path]]) -> None:
        """Bring the bars up to date.

        Args:
            running: Name of the run and file of its reports, by line.
        """
        for line in self._bars.keys() - running.keys():
            self._bars.pop(line).close()
        for line, (name, path) in running.items():
            if (report := read_progress(path)) is None:
                continue
            shown = dict(desc=name, unit=report["unit"], total=report["total"])
            bar = self._bars.get(line)
            if bar is None or any(getattr(bar, key) != value for key, value in shown.items()):  # the next command
                if bar is not None:
                    bar.close()
                bar = tqdm(**shown, initial=report["done"], position=line, leave=False)
                self._bars[line] = bar
            if report["done"] != bar.n:
                bar.set_postfix({key: f"{number:.2f}" for key, number in report["numbers"].items()}, refresh=False)
                bar.n = report["done"]
                bar.refresh()  # `update` would leave out what comes soon after the last

    def __exit__(self, *error) -> None:
        self.show({})
