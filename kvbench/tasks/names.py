"""Names under which Hydra finds the benchmark tasks: `task=qasper` for `task=longbench/qasper`, and globs over folders.

Hydra lists the options of a group without its subfolders, so `task=glob(longbench/*)` alone would match nothing. A
config source, one of Hydra's plug-in points, adds the nested names to the listing (the YAML files stay what is loaded)
and a short alias for every LongBench data set. ZeroSCROLLS shares names with LongBench and is always written out:
`task=zeroscrolls/qasper`.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP = "task"
ALIASED_FOLDER = "longbench"


def nested_task_names(task_folder: Path) -> list[str]:
    """Options of the group `task` that lie in subfolders: "longbench/qasper"; a leading "_" marks shared parts.

    Args:
        task_folder: `configs/task`.
    """
    files = sorted(task_folder.glob("*/*.yaml"))
    return [f"{file.parent.name}/{file.stem}" for file in files if not file.stem.startswith("_")]


def task_aliases(task_folder: Path) -> dict[str, str]:
    """Short names of the LongBench tasks, {"qasper": "longbench/qasper"}; a file of that name in `configs/task` wins.

    Args:
        task_folder: `configs/task`.
    """
    pairs = (name.split("/") for name in nested_task_names(task_folder))
    return {
        short: f"{folder}/{short}"
        for folder, short in pairs
        if folder == ALIASED_FOLDER and not (task_folder / f"{short}.yaml").is_file()
    }


class TaskNames(ConfigSource):
    """Offers the aliases as configs and the nested names in the group's listing; its path is `configs/task`."""

    @staticmethod
    def scheme() -> str:
        """The scheme of this source's path."""
        return "kvbench-tasks"

    def load_config(self, config_path: str) -> ConfigResult:
        """The alias `config_path`: a defaults list with the task's own file.

        Raises:
            ConfigLoadError: if there is no such alias.
        """
        target = self._alias(config_path)
        if target is None:
            raise ConfigLoadError(f"no task alias {config_path}")
        node = OmegaConf.create({"defaults": [f"/{GROUP}/{target}@_here_"]})
        return ConfigResult(
            provider=self.provider, path=f"{self.scheme()}://{self.path}", config=node, header={"package": None}
        )

    def is_group(self, config_path: str) -> bool:
        """Whether this source has something to list there."""
        return config_path.rstrip("/") == GROUP

    def is_config(self, config_path: str) -> bool:
        """Whether this is an alias."""
        return self._alias(config_path) is not None

    def available(self) -> bool:
        """Whether the folder exists."""
        return Path(self.path).is_dir()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Aliases and nested names."""
        if not self.is_group(config_path) or results_filter == ObjectType.GROUP:
            return []
        folder = Path(self.path)
        return sorted([*task_aliases(folder), *nested_task_names(folder)])

    def _alias(self, config_path: str) -> str | None:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return task_aliases(Path(self.path)).get(name) if group == GROUP else None


class TaskNamesSearchPath(SearchPathPlugin):
    """Appends the source above to Hydra's search path, after the application's own folder."""

    task_folder: Path

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls this while it builds the search path."""
        search_path.append("kvbench", f"{TaskNames.scheme()}://{self.task_folder}")


def register_task_names(task_folder: Path) -> None:
    """Make nested tasks visible to globs and LongBench tasks reachable by short name.

    Call it before Hydra composes; may be called repeatedly.

    Args:
        task_folder: `configs/task`.
    """
    TaskNamesSearchPath.task_folder = task_folder
    Plugins.instance().register(TaskNames)
    Plugins.instance().register(TaskNamesSearchPath)
