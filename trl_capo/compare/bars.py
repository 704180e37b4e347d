"""Progress bars for runs in separate commands: one line each, below the line that counts runs."""

from contextlib import AbstractContextManager
from pathlib import Path

from tqdm import tqdm

from trl_capo.progress import read_progress


class Bars(AbstractContextManager):
    """Progress bars by line number. They show the contents of the commands' report files."""

    def __init__(self) -> None:
        self._bars: dict[int, tqdm] = {}

    def show(self, running: dict[int, tuple[str, Path]]) -> None:
        """Update the bars.

        Args:
            running: Name of each run and its report file, by line.
        """
        for line in self._bars.keys() - running.keys():
            self._bars.pop(line).close()
        for line, (name, path) in running.items():
            if (report := read_progress(path)) is None:
                continue
            shown = dict(desc=name, unit=report["unit"], total=report["total"])
            bar = self._bars.get(line)
            if bar is None or any(getattr(bar, key) != value for key, value in shown.items()):  # a new command
                if bar is not None:
                    bar.close()
                bar = tqdm(**shown, initial=report["done"], position=line, leave=False)
                self._bars[line] = bar
            if report["done"] != bar.n:
                bar.set_postfix({key: f"{number:.2f}" for key, number in report["numbers"].items()}, refresh=False)
                bar.n = report["done"]
                bar.refresh()  # `update` would skip changes soon after the last one

    def __exit__(self, *error) -> None:
        self.show({})
