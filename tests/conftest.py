"""`--update-golden` writes the texts of tests/golden anew, `--pass mylab.rosa` checks passes from elsewhere; one thread, so that sums are made in one order."""

import checks
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing with them")
    parser.addoption("--pass", action="append", default=[], metavar="MODULE", help="run the generated checks over this pass instead of the built-in ones: tests/test_passes.py --pass mylab.rosa")


def pytest_configure(config):
    checks.OUTSIDE[:] = config.getoption("--pass")
