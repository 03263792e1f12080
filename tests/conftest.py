"""Settings of the whole suite."""

import logging
import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports triton, which reads it once

# examples are the same on every machine, and a slow machine is no failure
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=50
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def fresh_logging() -> None:
    """Each test begins with the package's logger as its import leaves it, so that ``caplog`` sees every message."""
    log = logging.getLogger("fastdeitlt")
    log.setLevel(logging.NOTSET)
    log.propagate, log.handlers = True, []


@pytest.fixture(autouse=True)
def own_random_numbers() -> None:
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["bf16", "no-bf16"])
def native_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU reports bfloat16 instructions: what depends on it is tested both ways on every processor."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param
