"""How near to its tolerance every comparison of numbers comes, for `.ci/test-kernels`.

As a pytest plugin (`-p tests.tolerances`, with TOLERANCES=file) it notes the largest error over tolerance of each line
that calls `assert_close`, `assert_allclose` or `approx`, or asserts that something is below a number such as 1e-6:
1 means that the test is about to fail. As a program it puts the files of several runs side by side.
"""

import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path


ENOUGH = 0.1  # of the tolerance: room of ten times the error
REPOSITORY = Path(__file__).parents[1]
BOUND = re.compile(r"(?:tensor\()?(-?[\d.]+(?:e-?\d+)?)(?:, dtype=[\w.]+)?\)? <=? (\d+(?:\.\d+)?e-\d+|0\.00+\d+)")

worst: dict[str, float] = defaultdict(float)  # by place: the largest error over tolerance of the test that runs


def place() -> str | None:
    """File and line of the test that compares, without the frames of libraries."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPOSITORY / "tests") and path != Path(__file__):
            return f"{path.relative_to(REPOSITORY)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def note(error, tolerance) -> None:
    """Error and tolerance are arrays or numbers; a tolerance of 0 asks for equality and is no tolerance."""
    import numpy as np

    error, tolerance = np.broadcast_arrays(np.asarray(error, dtype=float), np.asarray(tolerance, dtype=float))
    told = (tolerance > 0) & np.isfinite(error) & np.isfinite(tolerance)
    where = place()
    if where and told.any():
        worst[where] = max(worst[where], float((error[told] / tolerance[told]).max()))


def pytest_configure(config):
    import numpy as np
    import pytest
    import torch

    assert_close, assert_allclose = torch.testing.assert_close, np.testing.assert_allclose
    approx_scalar = type(pytest.approx(1.0))  # sequences and arrays compare their elements by it
    equal = approx_scalar.__eq__

    def watched_assert_close(actual, expected, *args, **kwargs):
        assert_close(actual, expected, *args, **kwargs)
        pairs = [(actual, expected)]
        if isinstance(expected, dict):
            pairs = [(actual[key], expected[key]) for key in expected]
        elif isinstance(expected, (list, tuple)):
            pairs = list(zip(actual, expected, strict=True))
        for one, other in pairs:
            one, other = torch.as_tensor(one).detach(), torch.as_tensor(other).detach()
            rtol, atol = kwargs.get("rtol"), kwargs.get("atol")
            if rtol is None:
                defaults = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7), torch.bfloat16: (1.6e-2, 1e-5)}
                rtol, atol = defaults.get(other.dtype, (0.0, 0.0))
            one, other = one.cpu().double(), other.cpu().double()
            note((one - other).abs(), atol + rtol * other.abs())

    def watched_assert_allclose(actual, desired, rtol=1e-7, atol=0, **kwargs):
        assert_allclose(actual, desired, rtol=rtol, atol=atol, **kwargs)
        actual, desired = np.asarray(actual, dtype=float), np.asarray(desired, dtype=float)
        note(np.abs(actual - desired), atol + rtol * np.abs(desired))

    def watched_equal(self, actual):
        result = equal(self, actual)
        try:
            note(abs(float(actual) - float(self.expected)), float(self.tolerance))
        except (TypeError, ValueError):
            pass  # not numbers, or no tolerance for NaN
        return result

    torch.testing.assert_close, np.testing.assert_allclose = watched_assert_close, watched_assert_allclose
    approx_scalar.__eq__ = watched_equal


def pytest_assertion_pass(item, lineno, orig, expl):
    for value, bound in BOUND.findall(expl):
        where = f"{item.path.relative_to(REPOSITORY)}:{lineno}"
        worst[where] = max(worst[where], abs(float(value)) / float(bound))


def pytest_runtest_logreport(report):
    if report.when == "teardown" or hasattr(report, "node"):  # of a worker of xdist, which has written it itself
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "ratios": dict(worst)}
    worst.clear()
    with open(os.environ["TOLERANCES"], "a") as file:
        file.write(json.dumps(line) + "\n")


def summary(files: list[str]) -> int:
    """Prints one line a run and one a place without room; returns how many tests failed."""
    ratios, failures = defaultdict(dict), 0
    print(f"{'setting':<28} {'tests':>6} {'passed':>6} {'worst error/tolerance':>22}")  # noqa: T201
    for file in files:
        name = Path(file).stem
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        calls = [line for line in lines if line["when"] == "call"]
        failed = [line["test"] for line in lines if line["outcome"] == "failed"]
        failures += len(failed)
        for line in lines:
            for where, ratio in line["ratios"].items():
                ratios[where][name] = max(ratio, ratios[where].get(name, 0.0))
        largest = max((seen[name] for seen in ratios.values() if name in seen), default=0.0)
        passed = sum(line["outcome"] == "passed" for line in calls)
        print(f"{name:<28} {len(calls):>6} {passed:>6} {largest:>22.3f}")  # noqa: T201
        for test in failed:
            print(f"  failed: {test}")  # noqa: T201
    for where, seen in sorted(ratios.items(), key=lambda item: -max(item[1].values())):
        if max(seen.values()) > ENOUGH:
            values = " ".join(f"{seen.get(Path(file).stem, 0.0):.3f}" for file in files)
            moved = max(seen.values()) - min(seen.values())
            print(f"  {where:<45} {values}  moved {moved:.4f}")  # noqa: T201
    return failures


if __name__ == "__main__":
    sys.exit(summary(sys.argv[1:]) > 0)
