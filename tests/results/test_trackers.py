"""Where a run's figures go besides the table: one line of CSV a run, and trackers behind one small interface."""

import sys
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest

from kvbench.errors import ConfigError, RecordError
from kvbench.results import trackers
from kvbench.results.trackers import RunFigures, check_tracker, track, write_csv

ARMS = [{"arm": "full", "n": 2, "score": 50.0}, {"arm": "h2o@0.5", "n": 2, "score": 25.0, "kl": 0.5, "gold_nll": None}]


@pytest.fixture
def run(tmp_path):
    (folder := tmp_path / "runs" / "passkey-m-1").mkdir(parents=True)
    return RunFigures.of(folder, {"model": "m", "n_samples": 2}, {"log": None, "model": {"name": "m"}}, ARMS)


def test_the_csv_has_one_line_a_run_the_newest(run, tmp_path):
    other = RunFigures(run.folder.with_name("other"), {"model": "é"}, {}, {"cam@0.5/score": 1.0})
    for one in (run, other, RunFigures(run.folder, run.facts, run.settings, {"h2o@0.5/score": 75.0})):
        assert write_csv(one) == tmp_path / "runs.csv"
    found = pd.read_csv(tmp_path / "runs.csv", index_col="run")
    assert list(found.index) == ["other", "passkey-m-1"]
    assert found.loc["other", "model"] == "é"
    assert found.loc["passkey-m-1", "h2o@0.5/score"] == 75.0
    assert pd.isna(found.loc["other", "h2o@0.5/score"])
    assert "h2o@0.5/gold_nll" not in found.columns


def test_a_file_of_that_name_that_is_not_ours_is_left_alone(run, tmp_path):
    (tmp_path / "runs.csv").write_text("name,age\na,1\n")
    with pytest.raises(RecordError, match=r"runs\.csv has no column run: move it away, or set output\.csv=false"):
        write_csv(run)
    assert (tmp_path / "runs.csv").read_text() == "name,age\na,1\n"


class Recorder(ModuleType):
    """A package that remembers how it was called, and works as a context manager wherever it is entered."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return call

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.calls.append(("end", (), {}))


@pytest.fixture
def fake(monkeypatch):
    def make(name):
        module = Recorder(name)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(trackers, "find_spec", lambda wanted: SimpleNamespace())
        return module

    return make


def called(module, name):
    return [(arguments, options) for found, arguments, options in module.calls if found == name]


def test_wandb_gets_configuration_and_figures(fake, run):
    wandb = fake("wandb")
    wandb.summary = Recorder("summary")
    track("wandb", run)
    ((_, options),) = called(wandb, "init")
    assert options["config"] == run.settings
    assert (options["project"], options["name"], options["resume"]) == ("kvbench", "passkey-m-1", "allow")
    assert called(wandb, "log") == [((dict(run.figures),), {})]
    assert called(wandb.summary, "update") == [(({"model": "m", "n_samples": 2},), {})]
    assert wandb.calls[-1][0] == "end"


def test_mlflow_gets_names_that_it_takes(fake, run):
    mlflow = fake("mlflow")
    track("mlflow", run)
    ((metrics,), _) = called(mlflow, "log_metrics")[0]
    assert metrics["h2o_0.5/score"] == 25.0
    ((parameters,), _) = called(mlflow, "log_params")[0]
    assert parameters == {"log": "None", "model.name": "m", "model": "m", "n_samples": "2"}


def test_tensorboard_gets_a_scalar_for_each_figure(fake, run):
    fake("torch.utils.tensorboard")
    writer = sys.modules["torch.utils.tensorboard"]
    track("tensorboard", run)
    assert called(writer, "SummaryWriter") == [((), {"log_dir": str(run.folder / "tensorboard")})]
    assert [arguments for arguments, _ in called(writer, "add_scalar")] == list(run.figures.items())
    assert writer.calls[-1][0] == "close"


def test_one_s_own_tracker_is_a_function(run, monkeypatch):
    seen = []
    module = ModuleType("mine")
    module.send = seen.append
    monkeypatch.setitem(sys.modules, "mine", module)
    track("mine:send", run)
    assert seen == [run]

    def fails(_):
        raise ValueError("no network")

    module.send = fails
    with pytest.raises(RecordError, match=r"log=mine:send failed \(ValueError: no network\): the records are complete"):
        track("mine:send", run)


def test_what_cannot_be_tracked_is_told_before_anything_runs(monkeypatch):
    check_tracker(None)
    with pytest.raises(ConfigError, match=r"log=wandbb is unknown: did you mean wandb\?"):
        check_tracker("wandbb")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log=mlflow needs the package mlflow, which is not installed: pip install"):
        check_tracker("mlflow")
