"""Counts the checks of a Python script, and ends it with `N passed, N failed`."""

import sys


class Tally:
    """A count of checks. Each check prints one line."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, what, wrong):
        """Counts a check. `wrong` is what is wrong, or nothing. Returns whether the check has passed."""
        if wrong:
            self.failed += 1
            print(f"FAILED  {what}: {wrong}", flush=True)
        else:
            self.passed += 1
            print(f"ok      {what}", flush=True)
        return not wrong

    def end(self):
        print(f"{self.passed} passed, {self.failed} failed")
        # A script without checks has not succeeded.
        sys.exit(self.failed > 0 or not self.passed)
