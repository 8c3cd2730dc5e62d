"""Public names are explicit: what `milkglass.X` offers is the stub's list, and every one of them is there."""

from __future__ import annotations

import subprocess
import sys

import milkglass

NAMES = {
    "AdaptivePeriodicAverager",
    "Adversary",
    "Audit",
    "Certificate",
    "Channel",
    "Client",
    "Clipping",
    "ConditionalEntropy",
    "GaussianKState",
    "LearnedNoise",
    "LocalTransport",
    "Marvell",
    "MaxNorm",
    "Message",
    "MilkglassError",
    "NoPeek",
    "Noise",
    "Pairs",
    "Recipe",
    "RecordingTransport",
    "Release",
    "Server",
    "Stages",
    "TopKState",
    "Transcript",
    "Trial",
    "View",
    "audit",
    "average_buffers",
    "certify",
    "cut",
    "distance_correlation",
    "distance_correlation_sqr",
    "distance_covariance",
    "distance_covariance_sqr",
    "gaussian_k_hook",
    "linear_distance_correlation",
    "load_recipe",
    "permutation_floor",
    "streaming_distance_correlation",
    "train",
    "u_distance_correlation_sqr",
    "u_distance_covariance_sqr",
}


def test_the_public_names_are_these_and_no_others() -> None:
    assert set(milkglass.__all__) == NAMES
    for name in NAMES:
        assert getattr(milkglass, name) is not None


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import milkglass, sys; assert not {'torch', 'pydantic', 'sklearn'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
