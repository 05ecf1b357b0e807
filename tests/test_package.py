"""Importing the package costs nothing, and every method is one of its names."""

import subprocess
import sys

import pytest

import kvbench
from kvbench.methods.registry import load_policies


def test_importing_the_package_imports_no_library():
    code = "import sys, kvbench; print([m for m in ('torch', 'transformers', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_method_of_ours_is_a_name_of_the_package():
    ours = [policy for policy in load_policies().values() if policy.__module__.startswith("kvbench.")]
    assert len(ours) >= 5
    for policy in ours:
        assert getattr(kvbench, policy.__name__) is policy
        assert policy.__name__ in dir(kvbench)
    assert all(getattr(kvbench, name) for name in kvbench.__all__)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'KVMergre'"):
        _ = kvbench.KVMergre
