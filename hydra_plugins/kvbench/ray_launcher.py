"""Jobs of a sweep as Ray tasks, on this machine or on a cluster that is running already.

    python -m kvbench -m 'shard=range(8)' hydra/launcher=ray
    python -m kvbench -m 'shard=range(8)' hydra/launcher=ray hydra.launcher.init.address=auto

Hydra's own plug-in, hydra-ray-launcher 1.2.2, asks for cloudpickle below 3 and, for its AWS half, boto3; docs/scale.md
has the evidence. This one needs `ray` alone. It offers the same two settings, `init` for `ray.init` and `remote` for
`ray.remote`, and ends in one line when a worker dies.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class RayLauncher(Launcher):
    """Runs every job of a batch as one Ray task and waits for all of them.

    Args:
        init: keywords of `ray.init`; not used if this process is connected to Ray already.
        remote: keywords of `ray.remote`, e.g. `num_gpus` and `num_cpus` of each job.
    """

    def __init__(self, init: Mapping[str, Any], remote: Mapping[str, Any]) -> None:
        self.init, self.remote = _plain(init), _plain(remote)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra calls this before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; `LaunchError` if Ray is not installed, cannot be reached, or lost a worker for good."""
        from kvbench.errors import LaunchError  # late: Hydra imports its plug-ins at every start

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        try:
            ray = importlib.import_module("ray")
        except ImportError as error:
            raise LaunchError(
                f"hydra/launcher=ray needs the package ray ({error}): pip install 'kvbench[ray]'"
            ) from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user wants it
        started = not ray.is_initialized()
        try:
            if started:
                ray.init(**self.init)
            task = ray.remote(**self.remote)(_run) if self.remote else ray.remote(_run)
            configs = [self._job_config(words, number) for number, words in enumerate(job_overrides, initial_job_idx)]
            same = (self.task_function, Singleton.get_state(), Path.cwd())
            returned: list[JobReturn] = ray.get([task.remote(self.hydra_context, one, *same) for one in configs])
            return returned
        except (ray.exceptions.RayError, ConnectionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LaunchError(
                f"Ray gave up ({reason}): finished samples are recorded, the same command goes on"
            ) from error
        finally:
            if started:
                ray.shutdown()

    def _job_config(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config


def _run(
    context: HydraContext, config: DictConfig, task_function: TaskFunction, state: dict[Any, Any], folder: Path
) -> JobReturn:
    """One job, in the worker; `folder` is where the call was made, for relative paths such as `output.root`."""
    os.chdir(folder)
    setup_globals()
    Singleton.set_state(state)
    HydraConfig.instance().set_config(config)
    return run_job(task_function, config, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=context)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.create(dict(settings)), resolve=True)
    return {name: value for name, value in plain.items() if value is not None}
