"""What checks in Python count and end with: `N passed, N failed`."""

import sys


class Tally:
    """Checks, said one a line as they are made."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, what, wrong):
        """`wrong` is what is wrong, or nothing."""
        if wrong:
            self.failed += 1
            print(f"FAILED  {what}: {wrong}", flush=True)
        else:
            self.passed += 1
            print(f"ok      {what}", flush=True)
        return not wrong

    def end(self):
        print(f"{self.passed} passed, {self.failed} failed")
        # Nothing at all is no success.
        sys.exit(self.failed > 0 or not self.passed)
