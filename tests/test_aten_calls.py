"""The stages run the ops that the model runs, of any architecture: none that it does not run, and none more often."""

from __future__ import annotations

import pytest
from zoo.calls import DOZEN, compared, more_in_the_pipe
from zoo.models import ARCHITECTURES

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOZEN)
def test_the_pipe_runs_no_op_that_the_model_does_not_run(name: str) -> None:
    found, _ = compared(BY_NAME[name])
    assert not more_in_the_pipe(found), found
