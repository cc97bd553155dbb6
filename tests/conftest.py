"""`--update-golden` writes the texts of tests/golden anew; one thread, so that sums are made in one order."""

import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing with them")
