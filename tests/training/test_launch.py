"""Where a run works: what a processor does with numbers that are as good as zero."""

import torch

from lamina.training.launch import denormals_flushed, launch


def test_numbers_that_are_as_good_as_zero_are_zero_while_a_run_works_and_not_after():
    def tiny(*_):
        return float(torch.tensor(1e-38) * 0.1)

    assert tiny() > 0 and launch(tiny) == 0.0 and tiny() > 0
    with denormals_flushed():
        assert launch(tiny) == 0.0 and tiny() == 0.0  # who had it so before has it so after
    assert tiny() > 0
