"""Whether the scorers' third-party packages are what they claim to be, and which versions they are.

The package `rouge-chinese` 1.0.3 installs files over those of the package `rouge` and so silently changes every ROUGE
score computed with it (gov_report 26.63 becomes 15.77 on the same predictions). Our own ROUGE-L does not use the
package, but an environment in that state cannot reproduce published scores with any other tool, so scoring refuses to
run in it.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

from kvbench.errors import MetricError

_REMEDY = "run: pip uninstall -y rouge rouge-chinese && pip install rouge==1.0.1"


def _find(name: str, search_path: list[str] | None) -> Distribution | None:
    found = distributions(name=name) if search_path is None else distributions(name=name, path=search_path)
    return next(iter(found), None)


def check_environment(search_path: list[str] | None = None) -> None:
    """Refuse an environment in which the files of the package `rouge` are not its own.

    Every Python file of the installed package is compared with the SHA-256 its installation recorded.

    Args:
        search_path: folders to look for installed packages in; None for `sys.path`.

    Raises:
        MetricError: if a file of `rouge` was overwritten or deleted after its installation.
    """
    rouge = _find("rouge", search_path)
    if rouge is None:
        return
    culprit = " by rouge-chinese" if _find("rouge-chinese", search_path) is not None else ""
    for file in rouge.files or []:
        if file.parts[0] != "rouge" or file.suffix != ".py" or file.hash is None:
            continue
        path = Path(str(file.locate()))
        if not path.is_file():
            raise MetricError(f"{file} of package rouge {rouge.version} is missing; {_REMEDY}")
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, path.read_bytes()).digest()).rstrip(b"=")
        if digest.decode() != file.hash.value:
            raise MetricError(f"{file} of package rouge {rouge.version} was overwritten{culprit}; {_REMEDY}")


def scorer_versions() -> dict[str, str]:
    """Versions of the packages that scores depend on, for records; "missing" where one is not installed.

    ROUGE-L of LongBench and the code similarity are kvbench's own code and need no package.
    """
    versions = {}
    for name in ("jieba", "rouge_score", "Unidecode"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions
