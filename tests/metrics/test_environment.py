import base64
import hashlib

import pytest

from kvbench.errors import MetricError
from kvbench.metrics.environment import check_environment, scorer_versions

FILES = {"rouge/__init__.py": "one = 1\n", "rouge/rouge.py": "two = 2\n"}


def install(folder, name, version, files):
    """Write files and their recorded checksums as an installer does."""
    record = ""
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "RECORD").write_text(f"{record}{information.name}/RECORD,,\n")


def test_this_environment_is_sound():
    check_environment()


def test_intact_or_absent_rouge_passes(tmp_path):
    check_environment([str(tmp_path)])
    install(tmp_path, "rouge", "1.0.1", FILES)
    check_environment([str(tmp_path)])


def test_rouge_chinese_installed_first_is_harmless(tmp_path):
    install(tmp_path, "rouge-chinese", "1.0.3", {path: text + "other = 1\n" for path, text in FILES.items()})
    install(tmp_path, "rouge", "1.0.1", FILES)
    check_environment([str(tmp_path)])


def test_overwritten_by_rouge_chinese(tmp_path):
    install(tmp_path, "rouge", "1.0.1", FILES)
    install(tmp_path, "rouge-chinese", "1.0.3", {path: text + "other = 1\n" for path, text in FILES.items()})
    with pytest.raises(MetricError, match=r"of package rouge 1.0.1 was overwritten by rouge-chinese; run: pip"):
        check_environment([str(tmp_path)])


def test_overwritten_by_something_else(tmp_path):
    install(tmp_path, "rouge", "1.0.1", FILES)
    (tmp_path / "rouge/rouge.py").write_text("two = 3\n")
    with pytest.raises(MetricError, match=r"rouge/rouge.py of package rouge 1.0.1 was overwritten; run: pip"):
        check_environment([str(tmp_path)])


def test_files_lost_by_uninstalling_rouge_chinese(tmp_path):
    install(tmp_path, "rouge", "1.0.1", FILES)
    (tmp_path / "rouge/rouge.py").unlink()
    with pytest.raises(MetricError, match=r"rouge/rouge.py of package rouge 1.0.1 is missing"):
        check_environment([str(tmp_path)])


def test_versions():
    assert scorer_versions()["jieba"] == "0.42.1"
    assert set(scorer_versions()) == {"jieba", "rouge_score", "Unidecode"}
